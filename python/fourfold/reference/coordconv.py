"""CoordConv: a convolution whose input has coordinate channels beside its own (Liu et al., 2018, arXiv 1807.03247).

First the definition by concatenation, then the four ops underneath, which never concatenate:
``conv(cat(x, coords), cat(W, Wc)) = conv(x, W) + map`` with a map that depends on Wc and the image size only. The ops take a
convolution's plan in pieces; ``fourfold.ops._coord_plan.Plan`` says what they hold.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtypes import accumulate_type

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}


# ---- the definition --------------------------------------------------------------------------------------------------


def coord_conv(
    x: Tensor, coords: Tensor, weight: Tensor, coord_weight: Tensor, groups: int, convolve: Callable[..., Tensor]
) -> Tensor:
    """By concatenation; every group sees all coordinates.

    x [B, Cin, *size], coords [nc, *size] as the layer sees them, padding included; convolve(input, weight, groups).
    """
    batch, channels = x.shape[:2]
    rest = x.shape[2:]
    coords = coords.expand(batch, groups, *coords.shape)
    both = torch.cat([x.reshape(batch, groups, channels // groups, *rest), coords], 2).flatten(1, 2)
    return convolve(both, torch.cat([weight, coord_weight], 1), groups)


# ---- the ops underneath ----------------------------------------------------------------------------------------------


def _per_axis(flat: Tensor, counts: Sequence[int]) -> list[Tensor]:
    return list(flat.split(list(counts)))


def _others(values: Sequence[Any], axis: int) -> list[Any]:
    return [*values[:axis], *values[axis + 1 :]]


def _matrices(
    taps: Tensor, valid: Tensor, kernel: Sequence[int], out_size: Sequence[int], class_count: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Per axis: taps [k, out] and valid [classes, k]."""
    taps_of = _per_axis(taps, [k * o for k, o in zip(kernel, out_size, strict=True)])
    valid_of = _per_axis(valid, [n * k for n, k in zip(class_count, kernel, strict=True)])
    return (
        [t.reshape(k, -1) for t, k in zip(taps_of, kernel, strict=True)],
        [v.reshape(-1, k) for v, k in zip(valid_of, kernel, strict=True)],
    )


def _blocks(out_size: Sequence[int], class_count: Sequence[int]) -> list[tuple[int, ...]]:
    """The shape of each axis's part of the tables: the classes of the other axes, then its own outputs."""
    return [(*_others(class_count, axis), out) for axis, out in enumerate(out_size)]


def coord_tables(
    coord_weight: Tensor,  # [Cout, nc, *k]
    taps: Tensor,
    valid: Tensor,
    out_size: Sequence[int],
    class_count: Sequence[int],
    channels: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """The map in separable form [Cout, L]: for each axis [classes of the others, out], flattened one after the other."""
    kernel = coord_weight.shape[2:]
    taps_of, valid_of = _matrices(taps, valid, kernel, out_size, class_count)
    parts = []
    for axis, channel in enumerate(channels):
        table = coord_weight[:, channel].to(taps.dtype)
        for other in range(len(out_size)):
            # Each contraction takes a tap dimension away in its place and puts the new one there.
            matrix = taps_of[axis].T if other == axis else valid_of[other]
            table = torch.tensordot(table, matrix, dims=([1 + other], [1])).movedim(-1, 1 + other)
        parts.append(table.movedim(1 + axis, -1).flatten(1))
    tables = torch.cat(parts, 1)
    return tables.T.contiguous().T if channels_last else tables


def coord_map(tables: Tensor, classes: Tensor, out_size: Sequence[int], class_count: Sequence[int]) -> Tensor:
    """What coord_tables stand for: the map [Cout, *out]."""
    number = [c.long() for c in _per_axis(classes, out_size)]
    shapes = _blocks(out_size, class_count)
    total = tables.new_zeros(tables.shape[0], *out_size)
    for axis, part in enumerate(tables.split([math.prod(s) for s in shapes], 1)):
        block = part.unflatten(1, shapes[axis])
        for place, index in enumerate(_others(number, axis)):
            block = block.index_select(1 + place, index)
        total = total + block.movedim(-1, 1 + axis)
    return total


def add_map_(
    y: Tensor,  # [B, Cout, *out]
    tables: Tensor,
    classes: Tensor,
    class_count: Sequence[int],
    dense: Tensor | None,  # [Cout, *out]
    activation: str,
    activated: Tensor | None,
) -> None:
    """y += map (+ dense), then the activation: into y itself, or into activated."""
    total = coord_map(tables, classes, y.shape[2:], class_count)
    if dense is not None:
        total = total + dense
    y.copy_(y.to(total.dtype) + total)
    if activated is not None:
        activated.copy_(ACTIVATIONS[activation](y))
    else:
        y.copy_(ACTIVATIONS[activation](y))


def batch_sum(grad: Tensor, relu_output: Tensor | None) -> tuple[Tensor, Tensor]:
    """grad [B, ...] summed over the batch in its accumulation type; before that, zeroed where relu_output is not above 0.

    The second result is the zeroed grad, or empty.
    """
    kept = grad if relu_output is None else grad.masked_fill(relu_output <= 0, 0)
    total = kept.to(accumulate_type(grad.dtype)).sum(0)
    return total, grad.new_empty(0) if relu_output is None else kept


def coord_tables_backward(
    map_grad: Tensor,  # [Cout, *out]
    taps: Tensor,
    valid: Tensor,
    classes: Tensor,
    kernel: Sequence[int],
    class_count: Sequence[int],
    channels: Sequence[int],
    coord_channels: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of coord_weight [Cout, coord_channels, *k] (zero for a radius) and of a bias [Cout]."""
    out_size = map_grad.shape[1:]
    taps_of, valid_of = _matrices(taps, valid, kernel, out_size, class_count)
    number = [c.long() for c in _per_axis(classes, out_size)]
    result = map_grad.new_zeros(map_grad.shape[0], coord_channels, *kernel)
    for axis, channel in enumerate(channels):
        grad = map_grad
        for other in range(len(out_size)):
            matrix = taps_of[axis] if other == axis else valid_of[other][number[other]].T
            grad = torch.tensordot(grad, matrix, dims=([1 + other], [1])).movedim(-1, 1 + other)
        result[:, channel] = grad
    return result, map_grad.flatten(1).sum(1)
