"""Sparse weights: values [nnz], one for each set bit of a packed mask, in row-major order.

The three products are derivatives of one form, the sum over set bits (n, k) of y[n] * value[n, k] * x[k], each by one factor.
A dropped weight takes no part in any of them: unlike a zero it doesn't turn an infinity into NaN.
"""

import torch
from torch import Tensor

from ._dtypes import accumulate_type
from .maskmm import unpack_mask


def places(bits: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """Row and column of each set bit."""
    width = bits.shape[1] * 8
    flat = torch.nonzero_static(unpack_mask(bits, width).flatten(), size=nnz)[:, 0]
    return flat // max(width, 1), flat % max(width, 1)


def mask_starts(bits: Tensor, k: int, slab: int) -> Tensor:
    """Where each piece of `slab` columns of each row begins in values, and behind them nnz: int64 [N * ceil(k / slab) + 1]."""
    pieces = (k + slab - 1) // slab
    padded = bits.new_zeros((bits.shape[0], pieces * slab), dtype=torch.int64)
    padded[:, :k] = unpack_mask(bits, k)
    counts = padded.reshape(-1, slab).sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def mask_columns(bits: Tensor, nnz: int) -> Tensor:
    """The low 16 bits of each value's column, as int16 [nnz]."""
    columns = places(bits, nnz)[1] % 65536
    return torch.where(columns < 32768, columns, columns - 65536).to(torch.int16)


def gather_mask(weight: Tensor, bits: Tensor, nnz: int) -> Tensor:
    """The kept values of weight [N, ...]."""
    return weight.flatten(1)[places(bits, nnz)]


def scatter_mask(values: Tensor, bits: Tensor, k: int) -> Tensor:
    """The weight [N, k] of these values, 0 elsewhere."""
    return values.new_zeros((bits.shape[0], k)).index_put(places(bits, values.shape[0]), values)


def rows(x: Tensor) -> Tensor:
    """[.., K] as [M, K]."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def sparse_linear(
    x: Tensor,  # [.., K]
    values: Tensor,
    bits: Tensor,
    starts: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    format: str,  # noqa: A002
) -> Tensor:
    """x @ W^T + bias: [.., N]. starts, columns and format say how kernels go about it."""
    work = accumulate_type(x.dtype)
    row, column = places(bits, values.shape[0])
    products = rows(x).to(work)[:, column] * values.to(work)
    y = products.new_zeros((products.shape[0], bits.shape[0])).index_add(1, row, products)
    y = y if bias is None else y + bias.to(work)
    return y.to(x.dtype).reshape(*x.shape[:-1], bits.shape[0])


def sparse_linear_transposed(
    grad: Tensor,  # [.., N]
    values: Tensor,
    bits: Tensor,
    starts: Tensor,
    columns: Tensor | None,
    k: int,
    format: str,  # noqa: A002
) -> Tensor:
    """grad @ W: [.., k]."""
    work = accumulate_type(grad.dtype)
    row, column = places(bits, values.shape[0])
    products = rows(grad).to(work)[:, row] * values.to(work)
    x = products.new_zeros((products.shape[0], k)).index_add(1, column, products)
    return x.to(grad.dtype).reshape(*grad.shape[:-1], k)


def sddmm(
    a: Tensor,  # [N, D]
    b: Tensor,  # [K, D]
    bits: Tensor,
    nnz: int,
) -> Tensor:
    """The inner products of rows of a and b at the set bits: [nnz]."""
    work = accumulate_type(a.dtype)
    row, column = places(bits, nnz)
    return (a.to(work)[row] * b.to(work)[column]).sum(1).to(a.dtype)
