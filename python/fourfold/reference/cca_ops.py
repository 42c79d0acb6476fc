"""The ops underneath representation similarity: samples into matrices, sums that stay exact, and 16-bit products.

x [N, C, S] is N * S samples of C features; sample n * S + s is x[n, :, s].
"""

import torch
from torch import Tensor


def samples_of(x: Tensor) -> Tensor:
    """The samples as rows of a float64 matrix [N * S, C]."""
    return x.transpose(1, 2).flatten(0, 1).double()


def pack_samples(x: Tensor, pivot: Tensor, first: int, panel: Tensor, sums: Tensor, norms: Tensor) -> None:
    """panel = samples first, first + 1, .. minus pivot, in its dtype; norms = what its rows' squares sum up to.

    sums [C + 1] += the column sums of what the panel holds and the sum of the norms, both before they are rounded.
    """
    panel.copy_(samples_of(x)[first : first + len(panel)] - pivot)
    squares = panel.double().square().sum(1)
    norms.copy_(squares)
    sums += torch.cat([panel.double().sum(0), squares.sum()[None]])


def add_wide_(total: Tensor, part: Tensor) -> None:
    """total += part."""
    total += part


def count_nonfinite(x: Tensor) -> Tensor:
    """How many elements are NaN or infinite."""
    return (~x.isfinite()).sum()


def gram_(x: Tensor, y: Tensor, total: Tensor) -> None:
    """total += the sum over all samples of x y^T."""
    total += samples_of(x).T @ samples_of(y)
