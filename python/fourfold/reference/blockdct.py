"""Blockwise DCT: images cut into N x N blocks, each transformed by the orthonormal DCT-II (JPEG's transform for N = 8).

Arguments are those of the ops: ``scale`` is None or [C or 1, F] in the accumulation type, ``freqs`` None or row-major indices.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtypes import accumulate_type


def dct_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal DCT-II [n, n]: row u is frequency u."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos((2 * k + 1) * k[:, None] * math.pi / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


def to_layout(coefs: Tensor, layout: str, n: int) -> Tensor:
    """[B, C, h, w, F] to the layout."""
    b, c, h, w, f = coefs.shape
    if layout == "planar":
        return coefs.permute(0, 1, 4, 2, 3).reshape(b, c * f, h, w)
    if layout == "interleaved":
        return coefs.reshape(b, c, h, w, n, n).transpose(3, 4).reshape(b, c, h * n, w * n)
    return coefs


def from_layout(y: Tensor, layout: str, n: int, f: int) -> Tensor:
    """The layout to [B, C, h, w, F]."""
    if layout == "planar":
        return y.reshape(y.shape[0], y.shape[1] // f, f, *y.shape[2:]).permute(0, 1, 3, 4, 2)
    if layout == "interleaved":
        b, c, h, w = y.shape
        return y.reshape(b, c, h // n, n, w // n, n).transpose(3, 4).reshape(b, c, h // n, w // n, n * n)
    return y


def transform(blocks: Tensor, n: int) -> Tensor:
    """DCT-II of [.., H, W] cut into blocks: [.., h, w, N*N]."""
    *lead, height, width = blocks.shape
    d = dct_matrix(n, blocks.dtype, blocks.device)
    cut = blocks.reshape(*lead, height // n, n, width // n, n).transpose(-3, -2)
    return (d @ cut @ d.T).flatten(-2)


def inverse_transform(coefs: Tensor, n: int) -> Tensor:
    """The inverse: [.., h, w, N*N] to [.., H, W]."""
    *lead, h, w, _ = coefs.shape
    d = dct_matrix(n, coefs.dtype, coefs.device)
    return (d.T @ coefs.unflatten(-1, (n, n)) @ d).transpose(-3, -2).reshape(*lead, h * n, w * n)


def replicate_edges(x: Tensor, rows: int, columns: int) -> Tensor:
    """x [B, C, H, W] with its last row and column repeated up to multiples of rows and columns."""
    i = torch.arange(-(-x.shape[2] // rows) * rows, device=x.device).clamp(max=x.shape[2] - 1)
    j = torch.arange(-(-x.shape[3] // columns) * columns, device=x.device).clamp(max=x.shape[3] - 1)
    return x[:, :, i][..., j]


def fold_edges(x: Tensor, size: Sequence[int]) -> Tensor:
    """The adjoint of replicate_edges: what lies beyond size (H, W) is summed into the last row and column."""
    for dim, length in ((2, size[0]), (3, size[1])):
        inside = x.narrow(dim, 0, length - 1)
        x = torch.cat([inside, x.narrow(dim, length - 1, x.shape[dim] - length + 1).sum(dim, keepdim=True)], dim)
    return x


def keep(coefs: Tensor, freqs: Sequence[int] | None) -> Tensor:
    """[.., N*N] to the frequencies asked for, [.., F]."""
    return coefs if freqs is None else coefs[..., list(freqs)]


def spread(coefs: Tensor, freqs: Sequence[int] | None, n: int) -> Tensor:
    """The transpose of keep: missing frequencies are zero."""
    if freqs is None:
        return coefs
    index = torch.tensor(freqs, device=coefs.device, dtype=torch.long)
    return coefs.new_zeros(*coefs.shape[:-1], n * n).index_copy(-1, index, coefs)


def count(freqs: Sequence[int] | None, n: int) -> int:
    """F, how many frequencies are kept."""
    return n * n if freqs is None else len(freqs)


def like_input(result: Tensor, x: Tensor) -> Tensor:
    """result in x's dtype; 4-D results also take over a channels_last memory format."""
    result = result.to(x.dtype)
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if result.dim() == 4 and channels_last:
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous()


def block_dct(
    x: Tensor, block_size: int, layout: str, freqs: Sequence[int] | None, scale: Tensor | None, shift: float
) -> Tensor:
    """scale * DCT(x + shift) of each block, edges replicated."""
    z = replicate_edges(x.to(accumulate_type(x.dtype)) + shift, block_size, block_size)
    coefs = keep(transform(z, block_size), freqs)
    if scale is not None:
        coefs = coefs * scale[:, None, None, :]
    return like_input(to_layout(coefs, layout, block_size), x)


def block_idct(
    y: Tensor,
    block_size: int,
    layout: str,
    freqs: Sequence[int] | None,
    scale: Tensor | None,
    shift: float,
    size: Sequence[int] | None,
) -> Tensor:
    """IDCT(y / scale) - shift, cropped to size."""
    coefs = from_layout(y.to(accumulate_type(y.dtype)), layout, block_size, count(freqs, block_size))
    if scale is not None:
        coefs = coefs / scale[:, None, None, :]
    image = inverse_transform(spread(coefs, freqs, block_size), block_size) - shift
    if size is not None:
        image = image[..., : size[0], : size[1]]
    return like_input(image, y)


def block_dct_backward(
    grad: Tensor,
    block_size: int,
    layout: str,
    freqs: Sequence[int] | None,
    scale: Tensor | None,
    size: Sequence[int],
) -> Tensor:
    """The adjoint of block_dct in x: IDCT(scale * grad), where pixels beyond size are summed into the edge they came from."""
    coefs = from_layout(grad.to(accumulate_type(grad.dtype)), layout, block_size, count(freqs, block_size))
    if scale is not None:
        coefs = coefs * scale[:, None, None, :]
    image = inverse_transform(spread(coefs, freqs, block_size), block_size)
    return like_input(fold_edges(image, size), grad)


def block_idct_backward(
    grad: Tensor, block_size: int, layout: str, freqs: Sequence[int] | None, scale: Tensor | None
) -> Tensor:
    """The adjoint of block_idct in y: DCT(grad, padded with zeros to whole blocks) / scale."""
    z = grad.to(accumulate_type(grad.dtype))
    z = F.pad(z, (0, -z.shape[3] % block_size, 0, -z.shape[2] % block_size))
    coefs = keep(transform(z, block_size), freqs)
    if scale is not None:
        coefs = coefs / scale[:, None, None, :]
    return like_input(to_layout(coefs, layout, block_size), grad)


def block_dct_out(
    x: Tensor,
    block_size: int,
    layout: str,
    freqs: Sequence[int] | None,
    scale: Tensor | None,
    shift: float,
    out: Tensor,
) -> None:
    """block_dct into out."""
    out.copy_(block_dct(x, block_size, layout, freqs, scale, shift))


def block_idct_out(
    y: Tensor,
    block_size: int,
    layout: str,
    freqs: Sequence[int] | None,
    scale: Tensor | None,
    shift: float,
    size: Sequence[int] | None,
    out: Tensor,
) -> None:
    """block_idct into out."""
    out.copy_(block_idct(y, block_size, layout, freqs, scale, shift, size))


def dct_normalize(
    coefs: Tensor,
    qtable: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    freqs: Sequence[int] | None,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """(coefs * qtable - mean) / std for the frequencies asked for.

    coefs int16 [.., h, w, 64]; qtable [G, 64]: one table for each of G equal parts of the leading dimensions; mean and std [F].
    """
    lead = coefs.shape[:-3]
    tables = qtable.repeat_interleave(math.prod(lead) // max(qtable.shape[0], 1), 0).reshape(*lead, 1, 1, 64)
    y = keep(coefs.to(accumulate_type(dtype)) * tables, freqs)
    if mean is not None:
        y = y - mean
    if std is not None:
        y = y / std
    return (y.movedim(-1, -3) if layout == "planar" else y).contiguous().to(dtype)


def _normalize_grids(
    grids: Sequence[Tensor],
    qtable: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    planes: int,
    mirrored: Sequence[int],
    freqs: Sequence[int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """dct_normalize of B images whose planes, [h, w, 64] each, lie apart: [B, planes * F, h, w].

    qtable: [B * planes, 64]; mean and std: [planes, F]; mirrored: the numbers of the grids that are mirrored left to right.
    """
    y = torch.stack(list(grids)).to(accumulate_type(dtype)) * qtable[:, None, None, :]
    signs = torch.tensor([1, -1] * 32, device=y.device)
    y = torch.stack([plane.flip(1) * signs if k in mirrored else plane for k, plane in enumerate(y)])
    y = keep(y, freqs).unflatten(0, (-1, planes))
    if mean is not None:
        y = y - mean[:, None, None, :]
    if std is not None:
        y = y / std[:, None, None, :]
    return y.movedim(-1, 2).flatten(1, 2).contiguous().to(dtype)
