"""CoordConv's ops in Triton: the tables of a coordinate map, the pass that adds it, and the way back from both.

Spatial axes carry the numbers 0, 1, 2 from the first of three; an image with fewer has the last ones. A size, kernel or class
count that an image lacks is 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
# A thread takes 16 bytes of each image, and a program the same place in several, for which it looks the map up once.
BYTES, IMAGES = 16 * 32 * WARPS, 4
# With fewer programs than these, multiprocessors idle at the end or wait for memory; then each takes fewer images.
ENOUGH = 1024
# Tiles of coord_tables, in columns and channels, and of coord_tables_backward, in outputs and channels.
COLUMNS, OUTPUTS, CHANNELS = 32, 512, 8
# coord_tables_backward's second kernel: results per program, and tiles at a time.
RESULTS, PARTS = 64, 32

ACTIVATIONS = ("none", "relu", "silu", "gelu")
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}


# ---- a convolution's plan --------------------------------------------------------------------------------------------


@triton.jit
def _at_tap(taps, valid, k, place, out, kernel, mask, OWN: tl.constexpr):
    """What one axis contributes at its tap k: the coordinate at output `place`, or whether class `place` has that tap."""
    pointer = taps + (k * out + place) if OWN else valid + (place * kernel + k)
    return tl.load(pointer, mask=mask, other=0)


@triton.jit
def _of_axes(
    taps, valid, k0, k1, k2, place0, place1, place2, N0, N1, N2, Q0, Q1, Q2, K0, K1, K2, mask,
    AXIS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """The product of all axes at a tap; places are outputs on AXIS and classes on the others."""
    taps1 = K0 * N0 if RANK == 3 else 0
    valid1 = Q0 * K0 if RANK == 3 else 0
    taps2 = taps1 + K1 * N1 if RANK >= 2 else 0
    valid2 = valid1 + Q1 * K1 if RANK >= 2 else 0
    factor = _at_tap(taps + taps2, valid + valid2, k2, place2, N2, K2, mask, AXIS == 2)
    if RANK >= 2:
        factor *= _at_tap(taps + taps1, valid + valid1, k1, place1, N1, K1, mask, AXIS == 1)
    if RANK == 3:
        factor *= _at_tap(taps, valid, k0, place0, N0, K0, mask, AXIS == 0)
    return factor


def _from_last(values: Sequence[int]) -> list[int]:
    """One for each of three axes."""
    return [*[1] * (3 - len(values)), *values]


def _table_length(out_size: Sequence[int], class_count: Sequence[int]) -> int:
    every = math.prod(class_count)
    return sum(out * (every // own) for out, own in zip(out_size, class_count, strict=True))


# ---- coord_tables ----------------------------------------------------------------------------------------------------

_TABLES_SIZES = [
    "COUT", "L", "N0", "N1", "N2", "Q0", "Q1", "Q2", "K0", "K1", "K2",
    "start1", "start2", "channel0", "channel1", "channel2", "stride_out", "stride_in", "stride0", "stride1", "stride2",
]  # fmt: skip


@triton.jit
def _block_tile(
    coord_weight, taps, valid, tables, COUT, L, N0, N1, N2, Q0, Q1, Q2, K0, K1, K2,
    start,  # of the axis's block in the tables
    weight,  # of its coordinate channel in coord_weight
    stride_out, stride0, stride1, stride2,
    AXIS: tl.constexpr,
    RANK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of one axis's block [Cout, classes of the others, out]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    if AXIS == 0:
        size = Q1 * Q2 * N0
        place0, others = column % N0, column // N0
        place1, place2 = others // Q2, others % Q2
    elif AXIS == 1:
        size = Q0 * Q2 * N1
        place1, others = column % N1, column // N1
        place0, place2 = others // Q2, others % Q2
    else:
        size = Q0 * Q1 * N2
        place2, others = column % N2, column // N2
        place0, place1 = others // Q1, others % Q1
    inside, known = column < size, channel < COUT
    total = tl.zeros([COLUMNS, CHANNELS], dtype=tables.dtype.element_ty)
    for tap in range(K0 * K1 * K2):
        k0, k1, k2 = tap // K2 // K1, tap // K2 % K1, tap % K2
        factor = _of_axes(
            taps, valid, k0, k1, k2, place0, place1, place2, N0, N1, N2, Q0, Q1, Q2, K0, K1, K2, inside, AXIS, RANK
        )
        row = coord_weight + weight + (k0 * stride0 + k1 * stride1 + k2 * stride2)
        value = tl.load(row + channel * stride_out, mask=known, other=0)
        total += factor[:, None] * value.to(total.dtype)[None, :]
    column = (column + start).to(tl.int64)
    place = column[:, None] * COUT + channel[None, :] if CHANNELS_LAST else channel[None, :] * L + column[:, None]
    tl.store(tables + place, total, mask=inside[:, None] & known[None, :])


@triton.jit(do_not_specialize=_TABLES_SIZES)
def _coord_tables_kernel(
    coord_weight,  # [Cout, nc, *k], strided
    taps,
    valid,
    tables,  # [Cout, L], or [L, Cout] if CHANNELS_LAST
    COUT, L, N0, N1, N2, Q0, Q1, Q2, K0, K1, K2,
    start1, start2,  # of blocks 1 and 2; block 0, or the first there is, starts at 0
    channel0, channel1, channel2,  # the axes' coordinate channels
    stride_out, stride_in, stride0, stride1, stride2,
    RANK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    axis = tl.program_id(2) + (3 - RANK)
    if axis == 2:
        _block_tile(
            coord_weight, taps, valid, tables, COUT, L, N0, N1, N2, Q0, Q1, Q2, K0, K1, K2, start2, channel2 * stride_in,
            stride_out, stride0, stride1, stride2, 2, RANK, CHANNELS_LAST, COLUMNS, CHANNELS,
        )  # fmt: skip
    if RANK >= 2:  # noqa: SIM102  (known when compiling, unlike axis)
        if axis == 1:
            _block_tile(
                coord_weight, taps, valid, tables, COUT, L, N0, N1, N2, Q0, Q1, Q2, K0, K1, K2, start1, channel1 * stride_in,
                stride_out, stride0, stride1, stride2, 1, RANK, CHANNELS_LAST, COLUMNS, CHANNELS,
            )  # fmt: skip
    if RANK == 3:  # noqa: SIM102
        if axis == 0:
            _block_tile(
                coord_weight, taps, valid, tables, COUT, L, N0, N1, N2, Q0, Q1, Q2, K0, K1, K2, 0, channel0 * stride_in,
                stride_out, stride0, stride1, stride2, 0, RANK, CHANNELS_LAST, COLUMNS, CHANNELS,
            )  # fmt: skip


def coord_tables(
    coord_weight: Tensor,
    taps: Tensor,
    valid: Tensor,
    out_size: Sequence[int],
    class_count: Sequence[int],
    channels: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """The op fourfold::_coord_tables for CUDA tensors: [Cout, L] in the type of taps.

    coord_weight [Cout, nc, *k], strided as it may be, in the same type; the other arguments are a plan's.
    """
    op, kernel = "_coord_tables", list(coord_weight.shape[2:])
    _check_plan(op, kernel, taps, valid, out_size, class_count, channels, coord_weight.shape[1])
    if coord_weight.dtype != taps.dtype or coord_weight.device != taps.device:
        what = f"{coord_weight.dtype} on {coord_weight.device}"
        raise ValueError(f"{op}: coord_weight must be {taps.dtype} on {taps.device}, got {what}")
    cout, length, rank = coord_weight.shape[0], _table_length(out_size, class_count), len(kernel)
    tables = taps.new_empty(length, cout).T if channels_last else taps.new_empty(cout, length)
    if tables.numel() == 0:
        return tables
    blocks = [out * (math.prod(class_count) // own) for out, own in zip(out_size, class_count, strict=True)]
    strides = coord_weight.stride()
    with torch.cuda.device_of(taps):
        _coord_tables_kernel[triton.cdiv(max(blocks), COLUMNS), triton.cdiv(cout, CHANNELS), rank](
            coord_weight,
            taps,
            valid,
            tables,
            cout,
            length,
            *_from_last(out_size),
            *_from_last(class_count),
            *_from_last(kernel),
            sum(blocks[:-2]),
            sum(blocks[:-1]),
            *_from_last(channels),
            *strides[:2],
            *_from_last(strides[2:]),
            RANK=rank,
            CHANNELS_LAST=channels_last,
            COLUMNS=COLUMNS,
            CHANNELS=CHANNELS,
            **OPTIONS,
        )
    return tables


# ---- add_map ---------------------------------------------------------------------------------------------------------


@triton.jit
def _digit(n, radix, word, WIDE: tl.constexpr):
    """n // radix and n % radix, without a division where n is of 32 bits; word: _word(radix)."""
    if WIDE:
        quotient = n // radix
    else:
        product = tl.umulhi(n.to(tl.uint32) * 2, word.to(tl.uint32))
        quotient = (product >> (word >> 32 & 31).to(tl.uint32)).to(tl.int32)
    return quotient, n - quotient * radix


def _word(radix: int) -> int:
    """ceil(2**(31 + s) / radix) in the low half and s above it, for s the bits of radix - 1: exact for any n below 2**31.

    Bit 62 makes every word an int64.
    """
    bits = (radix - 1).bit_length()
    return 1 << 62 | bits << 32 | -(-(1 << 31 + bits) // radix)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """In x's type. Keeps NaN."""
    if ACTIVATION == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x


_WORDS = ["word0", "word1", "word2"]


_MAP_SIZES = [
    "batch", "units", "tiles", "length", "N0", "N1", "N2", "Q0", "Q1", "Q2", "radix0", "radix1", "radix2", *_WORDS
]  # fmt: skip


@triton.jit(do_not_specialize=_MAP_SIZES)
def _add_map_kernel(
    y,  # [B, Cout, *out], or [B, *out, Cout] if CHANNELS_LAST
    tables,  # [Cout, L], or [L, Cout] if CHANNELS_LAST
    classes,
    dense,  # an image like y's, or None
    activated,  # like y, or None
    batch,
    units,  # of ALIGN elements in an image
    tiles,  # in an image
    length,  # L
    N0, N1, N2, Q0, Q1, Q2,
    radix0, radix1, radix2, word0, word1, word2,  # runs of RUN per row of memory, then the axes further out
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,  # elements of an image come in multiples of it
    RUN: tl.constexpr,  # neighbours that share all of their place but the last digit: 1 or ALIGN
    IMAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of the map, added to the same tile of several images."""
    tile = tl.program_id(0) % tiles
    image = tl.program_id(0) // tiles * IMAGES + tl.arange(0, IMAGES)
    if WIDE:
        tile = tile.to(tl.int64)
    run = tile * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)
    known = (run < units * (ALIGN // RUN))[:, None]
    element = run[:, None] * RUN + tl.arange(0, RUN)[None, :]

    far, near = _digit(run, radix0, word0, WIDE)
    near = near[:, None] * RUN + tl.arange(0, RUN)[None, :]
    far = far[:, None]
    if CHANNELS_LAST:
        channel = near
        far, at2 = _digit(far, radix1, word1, WIDE)
        at1 = far
        if RANK == 3:
            at0, at1 = _digit(far, radix2, word2, WIDE)
    else:
        at2 = near
        if RANK >= 2:
            far, at1 = _digit(far, radix1, word1, WIDE)
        if RANK == 3:
            far, at0 = _digit(far, radix2, word2, WIDE)
        channel = far

    # Each axis's block of the tables is [classes of the others, out].
    row = radix0 * RUN if CHANNELS_LAST else length
    if RANK == 1:
        total = _of_tables(tables, channel, at2, row, known, CHANNELS_LAST)
    elif RANK == 2:
        q1 = tl.load(classes + at1, mask=known, other=0)
        q2 = tl.load(classes + N1 + at2, mask=known, other=0)
        total = _of_tables(tables, channel, q2 * N1 + at1, row, known, CHANNELS_LAST)
        total += _of_tables(tables, channel, Q2 * N1 + q1 * N2 + at2, row, known, CHANNELS_LAST)
    else:
        q0 = tl.load(classes + at0, mask=known, other=0)
        q1 = tl.load(classes + N0 + at1, mask=known, other=0)
        q2 = tl.load(classes + N0 + N1 + at2, mask=known, other=0)
        start1 = Q1 * Q2 * N0
        start2 = start1 + Q0 * Q2 * N1
        total = _of_tables(tables, channel, (q1 * Q2 + q2) * N0 + at0, row, known, CHANNELS_LAST)
        total += _of_tables(tables, channel, start1 + (q0 * Q2 + q2) * N1 + at1, row, known, CHANNELS_LAST)
        total += _of_tables(tables, channel, start2 + (q0 * Q1 + q1) * N2 + at2, row, known, CHANNELS_LAST)
    if dense is not None:
        total += tl.load(dense + element, mask=known, other=0)

    place = (image.to(tl.int64) * units)[:, None, None] * ALIGN + element[None]
    inside = (image < batch)[:, None, None] & known[None]
    value = tl.load(y + place, mask=inside, other=0).to(total.dtype) + total[None]
    value = value.to(y.dtype.element_ty)
    result = _activated(value.to(total.dtype), ACTIVATION).to(value.dtype)
    if activated is None:
        tl.store(y + place, result, mask=inside)
    else:
        tl.store(y + place, value, mask=inside)
        tl.store(activated + place, result, mask=inside)


@triton.jit
def _of_tables(tables, channel, column, row, mask, CHANNELS_LAST: tl.constexpr):
    place = column * row + channel if CHANNELS_LAST else channel * row + column
    return tl.load(tables + place, mask=mask, other=0)


def add_map(
    y: Tensor,
    tables: Tensor,
    classes: Tensor,
    class_count: Sequence[int],
    dense: Tensor | None,
    activation: str,
    activated: Tensor | None,
) -> None:
    """The op fourfold::_add_map_ for CUDA tensors: y += map (+ dense), then the activation, into y or into activated.

    y [B, Cout, *out] and activated, dense [Cout, *out] and tables [Cout, L] all in one memory order, contiguous or
    channels_last; tables and dense float32, or float64 where y is float64.
    """
    _check_add_map(y, tables, classes, class_count, dense, activation, activated)
    if y.numel() == 0:
        return
    batch, cout, *out_size = y.shape
    last, rank, elements = _is_channels_last(y), len(out_size), y[0].numel()
    align = _common(elements, y)
    run = align if _common(cout if last else out_size[-1], y) == _common(0, y) else 1
    block = BYTES // y.element_size()
    tiles = triton.cdiv(elements, block)
    images = _images(batch, tiles)
    inner = [cout // run, *reversed(out_size[1:])] if last else [out_size[-1] // run, *reversed(out_size[:-1])]
    radices = [*inner, 1, 1][:3]
    with torch.cuda.device_of(y):
        _add_map_kernel[(tiles * triton.cdiv(batch, images),)](
            y,
            tables,
            classes,
            dense,
            activated,
            batch,
            elements // align,
            tiles,
            tables.shape[1],
            *_from_last(out_size),
            *_from_last(class_count),
            *radices,
            *map(_word, radices),
            ACTIVATION=activation,
            RANK=rank,
            CHANNELS_LAST=last,
            WIDE=_is_wide(max(elements, tables.numel())),
            ALIGN=align,
            RUN=run,
            IMAGES=images,
            BLOCK=block,
            **OPTIONS,
        )


def _is_wide(elements: int) -> bool:
    """Whether indices up to there, and those of a tile beyond, need 64 bits."""
    return elements >= 2**31 - 2**16


def _common(count: int, x: Tensor) -> int:
    """The largest power of two that divides count, or 16 bytes of x if that is less: how many elements go at once."""
    return math.gcd(count, 16 // x.element_size())


def _images(batch: int, tiles: int) -> int:
    """How many images a program of add_map takes."""
    images = min(IMAGES, triton.next_power_of_2(batch))
    while images > 1 and tiles * triton.cdiv(batch, images) < ENOUGH:
        images //= 2
    return images


# ---- batch_sum -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["batch", "units", "tiles", "share"])
def _batch_sum_kernel(
    grad,  # [B, units * ALIGN]
    relu_output,  # like grad, or None
    kept,  # like grad, or None
    total,  # [parts, units * ALIGN]
    batch,
    units,
    tiles,  # in an image
    share,  # images per part
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of the sum over one part of the batch."""
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if WIDE:
        tile = tile.to(tl.int64)
    element = tile * BLOCK + tl.arange(0, BLOCK)
    known = element < units * ALIGN
    end = tl.minimum(part * share + share, batch)
    result = tl.zeros([BLOCK], dtype=total.dtype.element_ty)
    for first in range(part * share, end, IMAGES):
        image = first + tl.arange(0, IMAGES)
        place = (image.to(tl.int64) * units)[:, None] * ALIGN + element[None, :]
        inside = (image < end)[:, None] & known[None, :]
        value = tl.load(grad + place, mask=inside, other=0).to(result.dtype)
        if relu_output is not None:
            output = tl.load(relu_output + place, mask=inside, other=0).to(result.dtype)
            value = tl.where(output <= 0, 0.0, value)
            tl.store(kept + place, value.to(kept.dtype.element_ty), mask=inside)
        result += tl.sum(value, 0)
    tl.store(total + part.to(tl.int64) * units * ALIGN + element, result, mask=known)


def batch_sum(grad: Tensor, relu_output: Tensor | None) -> tuple[Tensor, Tensor]:
    """The op fourfold::_batch_sum for CUDA tensors: (grad [B, ...] summed over the batch, grad zeroed as relu does, or empty).

    The sum is float32, or float64 for float64. grad and relu_output are in one memory order, contiguous or channels_last,
    and so are both results.
    """
    op = "_batch_sum"
    if not grad.is_floating_point() or not 3 <= grad.dim() <= 5 or not _is_dense(grad):
        what = f"{grad.dtype} {tuple(grad.shape)} with strides {grad.stride()}"
        raise ValueError(f"{op}: grad must be floating [B, C, *size], contiguous or channels_last, got {what}")
    if relu_output is not None:
        _check_like(op, "relu_output", relu_output, grad)
    kept = None if relu_output is None else torch.empty_like(grad)
    work = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if _is_channels_last(grad):
        total = torch.empty(1, *grad.shape[2:], grad.shape[1], dtype=work, device=grad.device).movedim(-1, 1)
    else:
        total = torch.empty(1, *grad.shape[1:], dtype=work, device=grad.device)
    if total.numel() > 0:
        _sum_into(total, grad, relu_output, kept)
    return total[0], grad.new_empty(0) if kept is None else kept


def _sum_into(total: Tensor, grad: Tensor, relu_output: Tensor | None, kept: Tensor | None) -> None:
    """total [1, ...] becomes the sum of grad [B, ...]: at once, or part by part where one image is too little work."""
    batch, elements = grad.shape[0], total.numel()
    block = BYTES // grad.element_size()
    tiles = triton.cdiv(elements, block)
    parts = min(triton.cdiv(batch, 2 * IMAGES), triton.cdiv(ENOUGH, 2 * tiles)) if tiles * 2 <= ENOUGH else 1
    parts = max(parts, 1)
    share = triton.cdiv(batch, parts)
    partial = total if parts == 1 else total.new_empty(parts, elements)
    align = _common(elements, grad)
    with torch.cuda.device_of(grad):
        _batch_sum_kernel[(tiles * parts,)](
            grad,
            relu_output,
            kept,
            partial,
            batch,
            elements // align,
            tiles,
            share,
            WIDE=_is_wide(elements),
            ALIGN=align,
            IMAGES=IMAGES,
            BLOCK=block,
            **OPTIONS,
        )
    if partial is not total:
        _sum_into(total, partial, None, None)


# ---- coord_tables_backward -------------------------------------------------------------------------------------------

_SIZES = ["COUT", "S", "N0", "N1", "N2", "Q0", "Q1", "Q2", "K0", "K1", "K2"]


@triton.jit(do_not_specialize=_SIZES)
def _partial_gradient_kernel(
    map_grad,  # [Cout, S], or [S, Cout] if CHANNELS_LAST
    taps,
    valid,
    classes,
    partial,  # [tiles, RANK * K0 * K1 * K2 + 1, Cout]
    COUT, S, N0, N1, N2, Q0, Q1, Q2, K0, K1, K2,
    RANK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """What one tile of outputs adds to each axis's gradient at each tap, and to the bias's."""
    at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    inside, known = at < S, channel < COUT
    place = at.to(tl.int64)
    place = place[:, None] * COUT + channel[None, :] if CHANNELS_LAST else channel[None, :] * S + place[:, None]
    grad = tl.load(map_grad + place, mask=inside[:, None] & known[None, :], other=0)

    at2, at1 = at % N2, at // N2
    at0 = at1 // N1
    at1 = at1 % N1
    start1 = N0 if RANK == 3 else 0
    start2 = start1 + N1 if RANK >= 2 else 0
    q0, q1, q2 = at0, at1, at2
    if RANK >= 2:
        q2 = tl.load(classes + start2 + at2, mask=inside, other=0)
        q1 = tl.load(classes + start1 + at1, mask=inside, other=0)
    if RANK == 3:
        q0 = tl.load(classes + at0, mask=inside, other=0)

    size = K0 * K1 * K2
    result = partial + tl.program_id(0).to(tl.int64) * (RANK * size + 1) * COUT + channel
    tl.store(result + RANK * size * COUT, tl.sum(grad, 0), mask=known)
    for tap in range(size):
        k0, k1, k2 = tap // K2 // K1, tap // K2 % K1, tap % K2
        for axis in tl.static_range(3 - RANK, 3):
            place0 = at0 if axis == 0 else q0
            place1 = at1 if axis == 1 else q1
            place2 = at2 if axis == 2 else q2
            factor = _of_axes(
                taps, valid, k0, k1, k2, place0, place1, place2, N0, N1, N2, Q0, Q1, Q2, K0, K1, K2, inside, axis, RANK
            )
            row = (axis - (3 - RANK)) * size + tap
            tl.store(result + row * COUT, tl.sum(grad * factor[:, None], 0), mask=known)


@triton.jit(do_not_specialize=["tiles", "results", "size", "coord_channels", "COUT", "channel0", "channel1", "channel2"])
def _gradient_kernel(
    partial,  # [tiles, RANK * size + 1, Cout]
    coord_grad,  # [Cout, coord_channels, size]
    bias_grad,  # [Cout]
    tiles,
    results,  # elements of coord_grad and bias_grad together
    size,  # taps
    coord_channels,
    COUT,
    channel0, channel1, channel2,  # the axes' coordinate channels, the first axis's first
    RANK: tl.constexpr,
    RESULTS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The sum of all tiles, put where it belongs; a channel that is no axis's gets zeros."""
    index = tl.program_id(0) * RESULTS + tl.arange(0, RESULTS)
    bias = coord_channels * size
    out, entry = index // (bias + 1), index % (bias + 1)
    coord_channel, tap = entry // size, entry % size
    axis = tl.where(coord_channel == channel0, 0, RANK)
    if RANK >= 2:
        axis = tl.where(coord_channel == channel1, 1, axis)
    if RANK == 3:
        axis = tl.where(coord_channel == channel2, 2, axis)
    # The bias's row follows those of the axes.
    row = tl.where(entry == bias, RANK * size, axis * size + tap)
    summed = (index < results) & ((entry == bias) | (axis < RANK))
    total = tl.zeros([RESULTS], dtype=partial.dtype.element_ty)
    for first in range(0, tiles, PARTS):
        tile = first + tl.arange(0, PARTS)
        place = tile.to(tl.int64)[:, None] * ((RANK * size + 1) * COUT) + (row * COUT + out)[None, :]
        total += tl.sum(tl.load(partial + place, mask=(tile < tiles)[:, None] & summed[None, :], other=0), 0)
    tl.store(coord_grad + out.to(tl.int64) * bias + entry, total, mask=(index < results) & (entry < bias))
    tl.store(bias_grad + out, total, mask=(index < results) & (entry == bias))


def coord_tables_backward(
    map_grad: Tensor,
    taps: Tensor,
    valid: Tensor,
    classes: Tensor,
    kernel: Sequence[int],
    class_count: Sequence[int],
    channels: Sequence[int],
    coord_channels: int,
) -> tuple[Tensor, Tensor]:
    """The op fourfold::_coord_tables_backward for CUDA tensors: gradients [Cout, coord_channels, *kernel] and [Cout].

    map_grad [Cout, *out], contiguous or with Cout innermost, in the type of taps; the other arguments are a plan's.
    """
    op, out_size = "_coord_tables_backward", list(map_grad.shape[1:])
    _check_plan(op, kernel, taps, valid, out_size, class_count, channels, coord_channels)
    _check_vector(op, "classes", classes, sum(out_size), torch.int32, taps.device)
    if map_grad.dtype != taps.dtype or map_grad.device != taps.device:
        raise ValueError(f"{op}: map_grad must be {taps.dtype} on {taps.device}, got {map_grad.dtype} on {map_grad.device}")
    last = not map_grad.is_contiguous() and map_grad.movedim(0, -1).is_contiguous()
    if not last:
        map_grad = map_grad.contiguous()
    cout, rank, outputs, size = map_grad.shape[0], len(out_size), math.prod(out_size), math.prod(kernel)
    coord_grad = map_grad.new_empty(cout, coord_channels, *kernel)
    bias_grad = map_grad.new_empty(cout)
    if cout == 0:
        return coord_grad, bias_grad
    tiles = triton.cdiv(outputs, OUTPUTS)
    partial = map_grad.new_empty(tiles, rank * size + 1, cout)
    results = coord_grad.numel() + cout
    with torch.cuda.device_of(map_grad):
        _partial_gradient_kernel[tiles, triton.cdiv(cout, CHANNELS)](
            map_grad,
            taps,
            valid,
            classes,
            partial,
            cout,
            outputs,
            *_from_last(out_size),
            *_from_last(class_count),
            *_from_last(kernel),
            RANK=rank,
            CHANNELS_LAST=last,
            OUTPUTS=OUTPUTS,
            CHANNELS=CHANNELS,
            **OPTIONS,
        )
        _gradient_kernel[(triton.cdiv(results, RESULTS),)](
            partial,
            coord_grad,
            bias_grad,
            tiles,
            results,
            size,
            coord_channels,
            cout,
            *[*channels, -1, -1][:3],
            RANK=rank,
            RESULTS=RESULTS,
            PARTS=PARTS,
            **OPTIONS,
        )
    return coord_grad, bias_grad


# ---- what keeps the kernels inside their buffers; the public functions have checked all of it with better words ---------


def _is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, *size] lies in channels_last order (and not in the usual one)."""
    return x.dim() in (4, 5) and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or _is_channels_last(x)


def _check_vector(op: str, name: str, given: Tensor, length: int, dtype: torch.dtype, device: torch.device) -> None:
    if given.shape != (length,) or given.dtype != dtype or given.device != device or not given.is_contiguous():
        what = f"{given.dtype} {tuple(given.shape)} on {given.device}"
        raise ValueError(f"{op}: {name} must be contiguous {dtype} [{length}] on {device}, got {what}")


def _check_like(op: str, name: str, given: Tensor, like: Tensor) -> None:
    same = (given.shape, given.dtype, given.device) == (like.shape, like.dtype, like.device)
    if not same or not _is_dense(given) or _is_channels_last(given) != _is_channels_last(like):
        what = f"{given.dtype} {tuple(given.shape)} on {given.device} with strides {given.stride()}"
        raise ValueError(
            f"{op}: {name} must be {like.dtype} {tuple(like.shape)} on {like.device} in the same order, got {what}"
        )


def _check_axes(op: str, **counts: Sequence[int]) -> None:
    rank = len(next(iter(counts.values())))
    for name, values in counts.items():
        if not 1 <= rank <= 3 or len(values) != rank or min(values) < 1:
            raise ValueError(f"{op}: {name} must be a positive number for each of 1 to 3 axes, got {list(values)}")


def _check_plan(
    op: str,
    kernel: Sequence[int],
    taps: Tensor,
    valid: Tensor,
    out_size: Sequence[int],
    class_count: Sequence[int],
    channels: Sequence[int],
    coord_channels: int,
) -> None:
    _check_axes(op, out_size=out_size, class_count=class_count, kernel=kernel)
    if len(channels) != len(kernel) or len({c for c in channels if 0 <= c < coord_channels}) != len(kernel):
        raise ValueError(f"{op}: channels must be one below {coord_channels} for each axis, got {list(channels)}")
    if taps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: taps must be float32 or float64, got {taps.dtype}")
    lengths = [sum(k * n for k, n in zip(kernel, sizes, strict=True)) for sizes in (out_size, class_count)]
    _check_vector(op, "taps", taps, lengths[0], taps.dtype, taps.device)
    _check_vector(op, "valid", valid, lengths[1], taps.dtype, taps.device)
    if _is_wide(max(*lengths, _table_length(out_size, class_count), math.prod(out_size))):
        raise ValueError(f"{op}: out_size {list(out_size)} with kernel {list(kernel)} is more than its indices can hold")


def _check_add_map(
    y: Tensor,
    tables: Tensor,
    classes: Tensor,
    class_count: Sequence[int],
    dense: Tensor | None,
    activation: str,
    activated: Tensor | None,
) -> None:
    op = "_add_map_"
    if not y.is_floating_point() or not 3 <= y.dim() <= 5 or not _is_dense(y):
        what = f"{y.dtype} {tuple(y.shape)} with strides {y.stride()}"
        raise ValueError(f"{op}: y must be floating [B, C, *size], contiguous or channels_last, got {what}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if y.numel() > 0:
        _check_axes(op, out_size=y.shape[2:], class_count=class_count)
    _check_vector(op, "classes", classes, sum(y.shape[2:]), torch.int32, y.device)
    work = torch.float64 if y.dtype == torch.float64 else torch.float32
    last, image = _is_channels_last(y), tuple(y.shape[1:])
    table = y.shape[1], _table_length(y.shape[2:], class_count)
    for name, given, shape in (("tables", tables, table), ("dense", dense, image)):
        if given is None:
            continue
        ordered = given.movedim(0, -1) if last else given
        if given.shape != shape or given.dtype != work or given.device != y.device or not ordered.is_contiguous():
            what = f"{given.dtype} {tuple(given.shape)} on {given.device} with strides {given.stride()}"
            raise ValueError(f"{op}: {name} must be {work} {shape} on {y.device} in y's memory order, got {what}")
    if activated is not None:
        _check_like(op, "activated", activated, y)


# ---- for CI ----------------------------------------------------------------------------------------------------------


def _compiled(
    kernel: Any, pointers: dict[str, str | None], constants: dict[str, Any], words: Sequence[str] = ()
) -> tuple[Any, ...]:
    """Every argument that is neither a pointer nor a constant nor a word is an int; a pointer of None is not given."""
    constants = {**constants, **{name: None for name, kind in pointers.items() if kind is None}}
    signature = {name: kind for name, kind in pointers.items() if kind is not None} | dict.fromkeys(words, "i64")
    rest = [name for name in kernel.arg_names if name not in signature and name not in constants]
    return kernel, signature | dict.fromkeys(rest, "i32"), constants, OPTIONS


def _compiled_add_map(
    dtype: str, work: str, activation: str, rank: int, last: bool, wide: bool, aligned: bool, more: bool
) -> tuple[Any, ...]:
    """aligned: images in whole vectors; more: with dense and activated."""
    size = int(dtype[-2:]) // 8
    run = 16 // size if aligned else 1
    pointers: dict[str, str | None] = {"y": dtype, "tables": work, "classes": "*i32"}
    pointers |= {"dense": work if more else None, "activated": dtype if more else None}
    constants = {"ACTIVATION": activation, "RANK": rank, "CHANNELS_LAST": last, "WIDE": wide, "ALIGN": run, "RUN": run}
    return _compiled(_add_map_kernel, pointers, constants | {"IMAGES": IMAGES, "BLOCK": BYTES // size}, _WORDS)


def _compiled_batch_sum(dtype: str, work: str, relu: bool) -> tuple[Any, ...]:
    size = int(dtype[-2:]) // 8
    pointers = {"grad": dtype, "relu_output": dtype if relu else None, "kept": dtype if relu else None, "total": work}
    constants = {"WIDE": False, "ALIGN": 16 // size, "IMAGES": IMAGES, "BLOCK": BYTES // size}
    return _compiled(_batch_sum_kernel, pointers, constants)


def _compiled_small(work: str, rank: int, last: bool) -> list[tuple[Any, ...]]:
    pointers = {"taps": work, "valid": work, "partial": work, "coord_grad": work, "bias_grad": work, "tables": work}
    pointers |= {"coord_weight": work, "map_grad": work, "classes": "*i32"}

    def of(kernel: Any, **constants: int) -> tuple[Any, ...]:
        taken = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
        return _compiled(kernel, taken, {"RANK": rank, **constants})

    return [
        of(_coord_tables_kernel, CHANNELS_LAST=last, COLUMNS=COLUMNS, CHANNELS=CHANNELS),
        of(_partial_gradient_kernel, CHANNELS_LAST=last, OUTPUTS=OUTPUTS, CHANNELS=CHANNELS),
        of(_gradient_kernel, RESULTS=RESULTS, PARTS=PARTS),
    ]


#: (kernel, signature, constants, options): what CI compiles for every supported architecture.
COMPILED = [
    _compiled_add_map("*fp32", "*fp32", "relu", 2, True, False, True, False),
    _compiled_add_map("*bf16", "*fp32", "relu", 2, True, False, True, False),
    _compiled_add_map("*fp16", "*fp32", "gelu", 2, False, False, True, True),
    _compiled_add_map("*bf16", "*fp32", "silu", 3, True, True, False, True),
    _compiled_add_map("*fp32", "*fp32", "none", 1, False, False, False, False),
    _compiled_add_map("*fp64", "*fp64", "gelu", 3, False, True, True, True),
    *(_compiled_batch_sum(*types, relu) for types, relu in ((("*bf16", "*fp32"), True), (("*fp32", "*fp32"), False))),
    _compiled_batch_sum("*fp64", "*fp64", True),
    *_compiled_small("*fp32", 2, True),
    *_compiled_small("*fp64", 3, False),
]
