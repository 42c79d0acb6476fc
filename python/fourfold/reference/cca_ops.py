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


def half_plane(h: int, w: int) -> list[tuple[int, int]]:
    """One (k, l) of each pair of conjugate frequencies, column by column: those without a partner in the column come first."""
    found = []
    for l in range(w // 2 + 1):  # noqa: E741
        found += [(k, l) for k in ([0, h // 2] if h % 2 == 0 else [0])]
        for k in range(1, (h + 1) // 2):
            found += [(k, l)] if 2 * l % w == 0 else [(k, l), (-k, l)]
    return found


def image_spectra(x: Tensor, pivot: Tensor, spectra: Tensor) -> None:
    """spectra [F, 2, n, c] = real and imaginary parts of the conjugate of fft2 of x [n, c, h, w] - pivot, at half_plane."""
    if not x.numel():
        return
    transformed = torch.fft.fft2(x.double() - pivot).conj()
    kept = torch.stack([transformed[:, :, k, column] for k, column in half_plane(*x.shape[2:])])
    spectra.copy_(torch.view_as_real(kept.resolve_conj()).permute(0, 3, 1, 2))


def spectra_gram_(a: Tensor, b: Tensor, total: Tensor, sums: Tensor | None) -> None:
    """total [F, c1, c2] += real plus imaginary part of the sum of conj(a) b^T over all samples; sums [F, c1, 2] += those of a.

    a [F, 2, n, c1] and b [F, 2, n, c2] are real and imaginary parts.
    """
    a, b = a.double(), b.double()
    total += a[:, 0].mT @ (b[:, 0] + b[:, 1]) + a[:, 1].mT @ (b[:, 1] - b[:, 0])
    if sums is not None:
        sums += a.sum(2).mT
