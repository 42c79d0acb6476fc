"""Pixel operations on the coefficients of 8 x 8 blocks, without leaving the DCT: flips, quarter turns, crops, half the size.

All are composed of torch's own operations. Mirroring a block negates its odd frequencies, transposing it transposes its
frequencies, and whatever is linear along one axis of the pixels, such as a mean or repeating an edge, is a small matrix along
the same axis of the frequencies (Smith and Rowe, "Compressed domain processing of JPEG-encoded images", 1996).
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference._dtypes import accumulate_type
from . import _checks as check
from ._register import transforming

# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_blocks(op: str, coefs: Any) -> None:
    check.tensor(op, "coefs", coefs)
    if coefs.dtype != torch.int16 and coefs.dtype not in check.FLOATING:
        raise TypeError(f"{op}: coefs must be int16, float16, bfloat16, float32 or float64, got {check.dtype_name(coefs)}")
    if coefs.dim() < 3 or coefs.shape[-1] != 64:
        raise ValueError(
            f"{op}: coefs must be blocks [.., h, w, 64], got {tuple(coefs.shape)}; "
            "planar coefficients [.., 64, h, w] become blocks with movedim(-3, -1)"
        )
    if coefs.shape[-3] < 1 or coefs.shape[-2] < 1:
        raise ValueError(f"{op}: coefs must have at least one block, got {tuple(coefs.shape)}")


def _check_negatable(op: str, coefs: Tensor) -> None:
    """Looks at values where that waits for nothing."""
    if coefs.dtype != torch.int16 or coefs.device.type != "cpu" or type(coefs) is not Tensor or coefs.numel() == 0:
        return
    if torch.compiler.is_compiling() or transforming():
        return
    # The mean of a block keeps its sign; it is left out only where that matters, since a slice is slow to walk through.
    if coefs.amin().item() == -32768 and coefs[..., 1:].amin().item() == -32768:
        raise ValueError(f"{op}: coefs holds -32768, which int16 cannot negate (no JPEG encoder writes it); pass coefs.float()")


# ---- the maps --------------------------------------------------------------------------------------------------------


def _mirror(coefs: Tensor, *, rows: bool = False, columns: bool = False) -> Tensor:
    """Blocks in reverse order along rows (u) and columns (v), their odd frequencies along the same axes negated."""
    f = torch.arange(64, device=coefs.device)
    u, v = f // 8, f % 8
    odd = u + v if rows and columns else u if rows else v
    signs = (1 - 2 * (odd % 2)).to(coefs.dtype)
    return (coefs * signs).flip((-3, -2) if rows and columns else -3 if rows else -2)


def _transpose(coefs: Tensor) -> Tensor:
    """The grid of blocks transposed, and each block."""
    return coefs.unflatten(-1, (8, 8)).transpose(-4, -3).transpose(-2, -1).flatten(-2)


def _cosines(like: Tensor) -> Tensor:
    """The orthonormal DCT-II [8, 8] in float64, row u is frequency u; made on the device, which waits for nothing."""
    k = torch.arange(8, dtype=torch.float64, device=like.device)
    rows = torch.cos((2 * k + 1) * k[:, None] * (math.pi / 16)) / 2
    return torch.where(k[:, None] == 0, math.sqrt(1 / 8), rows)


def _along(matrix: Tensor, blocks: Tensor, axis: int) -> Tensor:
    """matrix [8, 8] on one axis of the frequencies of blocks [.., h, w, 8, 8]: 0 for rows, 1 for columns."""
    matrix = matrix.to(blocks.dtype)
    return matrix @ blocks if axis == 0 else blocks @ matrix.T


def _extend(blocks: Tensor, d: Tensor, axis: int, length: int, before: int, count: int) -> Tensor:
    """Edges repeated along one axis: blocks [.., h, w, 8, 8] whose first `length` pixels count, `before` blocks into `count`.

    Block c becomes M c with M = D R D^T, where R picks pixels. R that picks pixel k everywhere gives a constant block, so
    M = (D 1) (D e_k)^T has one row, the others are zero.
    """
    grid = axis - 4
    last, k = (length - 1) // 8, (length - 1) % 8  # divmod knows no symbolic sizes
    after = count - before - last - 1
    ones = d.sum(1)  # D 1: sqrt(8) for frequency 0, else 0
    parts = [blocks.narrow(grid, 0, last)]
    if before:
        edge = _along(torch.outer(ones, d[:, 0]), blocks.narrow(grid, 0, 1), axis)
        parts.insert(0, edge.expand(*_with_length(edge, grid, before)))
    edge = blocks.narrow(grid, last, 1)
    if k < 7:
        picked = d.T[torch.arange(8, device=d.device).clamp(max=k)]  # R D^T
        parts.append(_along(d @ picked, edge, axis))
    else:
        parts.append(edge)
    if after:
        edge = _along(torch.outer(ones, d[:, k]), edge, axis)
        parts.append(edge.expand(*_with_length(edge, grid, after)))
    return torch.cat(parts, grid)


def _with_length(x: Tensor, dim: int, length: int) -> list[int]:
    sizes = list(x.shape)
    sizes[dim] = length
    return sizes


def _halve(coefs: Tensor, d: Tensor) -> Tensor:
    """The mean of 2 x 2 pixels of coefs [.., h, w, 64], h and w even: one product, four blocks' 256 numbers to one's 64.

    Along one axis pixel c of two blocks goes to pixel c // 2 of one, which is D M (D^T, D^T); both axes are its outer product.
    """
    one = ((d.repeat_interleave(2, 1) / 2).unflatten(1, (2, 8)) @ d.T).movedim(0, -1)  # [2, 8, 8]: block, from, to
    both = one[:, None, :, None, :, None] * one[None, :, None, :, None, :]
    h, w = coefs.shape[-3] // 2, coefs.shape[-2] // 2
    fours = coefs.unflatten(-3, (h, 2)).unflatten(-2, (w, 2)).transpose(-4, -3).flatten(-3)
    return fours @ both.reshape(256, 64).to(coefs.dtype)


def _without_autocast(coefs: Tensor) -> Any:
    """A context in which matrix products keep their type, as all transforms here do."""
    kind = coefs.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


# ---- functions -------------------------------------------------------------------------------------------------------


def dct_flip(coefs: Tensor, dim: int) -> Tensor:
    """Mirrors the image that blocks of coefficients stand for: exactly the flip of its pixels, in one pass over integers.

    The image is that of whole blocks. Where H or W is no multiple of 8, the pixels that fill up the last block come first
    afterwards: crop to whole blocks before, with :func:`dct_crop`. Under 4:2:0 chroma, whole blocks of chroma are 16 pixels.

    Args:
        coefs: [.., h, w, 64], blocks of 8 x 8 in row-major frequency order, quantised or not; int16, float16, bfloat16,
            float32 or float64.
        dim: which way, as in torch.flip: the dimension of block rows (-3, upside down) or of block columns (-2, left to right).

    Returns:
        [.., h, w, 64] in the dtype of coefs, without rounding. Differentiable.

    Raises:
        TypeError: coefs is not a tensor of these dtypes, or dim is not an int.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "dct_flip"
    _check_blocks(op, coefs)
    dim = check.integer(op, "dim", dim)
    rank = coefs.dim()
    rows, columns = dim == -3 or dim == rank - 3, dim == -2 or dim == rank - 2
    if not (rows or columns):
        raise ValueError(
            f"{op}: dim must be {rank - 3} or -3 (block rows), {rank - 2} or -2 (block columns) of coefs {tuple(coefs.shape)}, "
            f"got {dim}"
        )
    _check_negatable(op, coefs)
    return _mirror(coefs, rows=rows, columns=columns)


def dct_rot90(coefs: Tensor, k: int = 1) -> Tensor:
    """Turns the image that blocks of coefficients stand for by quarters, as torch.rot90 turns its pixels.

    Each block is transposed, so a quantisation table [64] must be too: ``qtable.view(8, 8).T.flatten()`` for odd k. Chroma
    halved in width is halved in height after a quarter turn: 4:2:2 becomes 4:4:0, and 4:2:0 stays. As with :func:`dct_flip`,
    pixels that fill up a last block turn with it, and may lie at the first row or column afterwards.

    Args:
        coefs: [.., h, w, 64], blocks of 8 x 8 in row-major frequency order, quantised or not; int16, float16, bfloat16,
            float32 or float64.
        k: quarter turns counterclockwise; negative ones are clockwise.

    Returns:
        [.., w, h, 64] for odd k, else [.., h, w, 64], in the dtype of coefs, without rounding; a copy for every k.
        Differentiable.

    Raises:
        TypeError: coefs is not a tensor of these dtypes, or k is not an int.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "dct_rot90"
    _check_blocks(op, coefs)
    turns = check.integer(op, "k", k) % 4
    if turns == 0:
        return coefs.clone()
    _check_negatable(op, coefs)
    if turns == 2:
        return _mirror(coefs, rows=True, columns=True)
    return _transpose(_mirror(coefs, rows=turns == 3, columns=turns == 1))


def dct_crop(coefs: Tensor, box: Sequence[int]) -> Tensor:
    """Cuts whole blocks out of the image that blocks of coefficients stand for.

    Under 4:2:0 chroma a box (t, l, h, w) of chroma is (2t, 2l, 2h, 2w) of luma: 16 pixels are the step at which both agree.

    Args:
        coefs: [.., h, w, 64], blocks of 8 x 8, quantised or not; int16, float16, bfloat16, float32 or float64.
        box: (top, left, height, width) in blocks, not in pixels.

    Returns:
        [.., height, width, 64], a view of coefs. Differentiable.

    Raises:
        TypeError: coefs is not a tensor of these dtypes, or box not a sequence of ints.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "dct_crop"
    _check_blocks(op, coefs)
    if not isinstance(box, (tuple, list)):
        raise TypeError(f"{op}: box must be (top, left, height, width) in blocks, got {box!r}")
    if len(box) != 4:
        raise ValueError(f"{op}: box must be (top, left, height, width) in blocks, got {box!r}")
    top, left, height, width = (check.integer(op, "each of box", side) for side in box)
    h, w = coefs.shape[-3], coefs.shape[-2]
    if not (top >= 0 and left >= 0 and height >= 1 and width >= 1 and top + height <= h and left + width <= w):
        raise ValueError(
            f"{op}: box (top, left, height, width) = {(top, left, height, width)} must lie within {h} x {w} blocks of 8 pixels"
        )
    return coefs.narrow(-3, top, height).narrow(-2, left, width)


def dct_downscale2(coefs: Tensor) -> Tensor:
    """Halves the image that blocks of coefficients stand for: exactly the mean of each 2 x 2 of its pixels.

    Where h or w is odd, the last pixel row or column is repeated to one more block before, so that the last block of the result
    is whole; so half the chroma of 4:4:4 is the chroma of 4:2:0. Other sizes need pixels: ``rgb_to_dct`` of the resized image.

    Args:
        coefs: [.., h, w, 64], blocks of 8 x 8 in row-major frequency order, int16, float16, bfloat16, float32 or float64.
            Quantised coefficients must be multiplied by their table first, or share one table with the result.

    Returns:
        [.., ceil(h/2), ceil(w/2), 64], not rounded to integers: float32 for int16, else the dtype of coefs (16-bit floats are
        computed in float32 and rounded once). Differentiable.

    Raises:
        TypeError: coefs is not a tensor of these dtypes.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "dct_downscale2"
    _check_blocks(op, coefs)
    with _without_autocast(coefs):
        result, d = coefs.to(accumulate_type(coefs.dtype)), _cosines(coefs)
        for axis in (0, 1):
            length = coefs.shape[axis - 3]
            if length % 2:
                result = _extend(result.unflatten(-1, (8, 8)), d, axis, 8 * length, 0, length + 1).flatten(-2)
        result = _halve(result, d)
    return result.to(coefs.dtype) if coefs.is_floating_point() else result


def edge_pad(coefs: Tensor, size: Sequence[int], before: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """Puts an image into a larger frame, its edge pixels repeated outwards: what jpeg.DctDataset pads with.

    Exact, but no integers: the pixels of the last block that lie beyond `size` are replaced too.

    Args:
        coefs: [.., h, w, 64], floating point, dequantised.
        size: (H, W) in pixels, ceil(H/8) = h and ceil(W/8) = w.
        before: how many blocks of the frame lie above and to the left.
        blocks: the frame's height and width in blocks; before + (h, w) at most.
    """
    with _without_autocast(coefs):
        result, d = coefs.to(accumulate_type(coefs.dtype)).unflatten(-1, (8, 8)), _cosines(coefs)
        for axis in (0, 1):
            if size[axis] < 8 * blocks[axis]:
                result = _extend(result, d, axis, size[axis], before[axis], blocks[axis])
        return result.flatten(-2).to(coefs.dtype)
