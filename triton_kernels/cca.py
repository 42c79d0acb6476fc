"""The ops underneath representation similarity in Triton: panels, wide sums, a count, 16-bit Gram matrices, spectra of images.

x [N, C, S] of any strides is N * S samples of C features; sample n * S + s is x[n, :, s]. Sums never meet in atomics: programs
write parts, and a second kernel adds these up in an order that depends on shapes only.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
# A tile of a panel. Its column sums and squared norms are parts.
SAMPLES, CHANNELS = 32, 64
# Where parts are added up: at a time, and sums per program.
PARTS, SUMS = 16, 64
# Of one row, where a matrix is added to a wide one.
COLUMNS = 512
# Elements that a program counts at a time, and at most so many programs.
COUNTED, COUNTERS = 2048, 1024

# Up to so many samples are summed in float32; then they are added in float64.
CHUNK = 1024
# A Gram matrix in tiles of BLOCK x BLOCK, or of SMALL x SMALL where there are no more channels. The float64 sums of a
# program are 128 registers of each of its threads, and what a step reads has to fit in beside them: ALONG samples, and fewer
# where they come in pieces of less than 16 bytes.
BLOCK, SMALL, ALONG, ALONG_PIECES = 128, 64, 32, 16
# Programs that keep multiprocessors busy, and the fewest chunks that are worth the part that a program writes.
PROGRAMS = {BLOCK: (256, 2), SMALL: (512, 1)}
# Elements of a copy in another order, for what lies in memory so that it can only be read two bytes at a time.
REPACKED = 1 << 25

# Spectra: frequencies of one image by images, and channels by channels of a product over so many samples at a time.
FREQUENCIES, IMAGES = 32, 32
SPECTRA, STEP = 64, 8

OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
PRODUCT = {
    BLOCK: {"num_warps": 8, "num_stages": 4, "enable_fp_fusion": True},
    SMALL: {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": True},
}
SPECTRA_PRODUCT = {"num_warps": 8, "enable_fp_fusion": True}

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The exponent's bits, all set in NaN and Inf alone, and the integer that holds them.
EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


@triton.jit
def _place_of(sample, S, stride_n, stride_s, ONE: tl.constexpr):
    """Where samples begin; ONE: stride_s leads from each to the next, across images too."""
    if ONE:
        return sample * stride_s
    image = sample // S
    return image * stride_n + (sample - image * S) * stride_s


@triton.jit
def _sum_down(parts, column, count, width, inside, PARTS: tl.constexpr, SUMS: tl.constexpr):
    """Sums over the rows of parts [count, width], of SUMS of its columns."""
    total = tl.zeros([PARTS, SUMS], dtype=tl.float64)
    for first in range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)
        place = part.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(parts + place, mask=(part < count)[:, None] & inside[None, :], other=0)
    return tl.sum(total, 0)


def _is_wide(elements: int) -> bool:
    """Whether numbers up to this one need 64 bits, programs that reach past the end included."""
    return elements >= 2**31 - 2**22


def _one_stride(x: Tensor) -> int | None:
    """The stride that leads from each sample to the next, across images too; None where there is no such stride."""
    (n, _, s), (stride_n, _, stride_s) = x.shape, x.stride()
    if n == 1 or s == 1:
        return stride_s if s > 1 else stride_n if n > 1 else 0
    return stride_s if stride_n == s * stride_s else None


def _reach(x: Tensor) -> int:
    """The last element's place."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


# ---- samples into a panel --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first", "count", "C", "S", "stride_n", "stride_c", "stride_s", "stride_row", "stride_pivot"])
def _pack_samples_kernel(
    x,  # [N, C, S]
    pivot,  # [C] float64, or None: then nothing is subtracted, and there are no parts
    panel,  # [count, C]
    columns,  # parts [programs down, C] of the column sums
    rows,  # parts [programs across, count] of the squared norms
    squares,  # parts [programs down, programs across] of the norms' sum
    first,  # sample
    count, C, S, stride_n, stride_c, stride_s, stride_row, stride_pivot,
    UNIT: tl.constexpr,  # the axis of stride 1: "channel", "sample" or ""
    ONE: tl.constexpr,
    WIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(0).to(INDEX) * SAMPLES + tl.arange(0, SAMPLES)
    across = channel.to(INDEX) if UNIT == "channel" else channel.to(INDEX) * stride_c
    if UNIT == "sample":
        down = _place_of(row + first, S, stride_n, 1, ONE)
    else:
        down = _place_of(row + first, S, stride_n, stride_s, ONE)
    inside = (row < count)[:, None] & (channel < C)[None, :]
    value = tl.load(x + (down[:, None] + across[None, :]), mask=inside, other=0)
    place = row.to(tl.int64)[:, None] * stride_row + channel[None, :]
    if pivot is None:
        tl.store(panel + place, value, mask=inside)
    else:
        value = value.to(tl.float64) - tl.load(pivot + channel * stride_pivot, mask=channel < C, other=0)[None, :]
        value = tl.where(inside, value.to(panel.dtype.element_ty), 0.0)
        tl.store(panel + place, value, mask=inside)
        value = value.to(tl.float64)
        tl.store(columns + tl.program_id(0).to(tl.int64) * C + channel, tl.sum(value, 0), mask=channel < C)
        norm = tl.sum(value * value, 1)
        tl.store(rows + tl.program_id(1).to(tl.int64) * count + row, norm, mask=row < count)
        tl.store(squares + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), tl.sum(norm, 0))


@triton.jit(do_not_specialize=["down", "across", "count", "C", "stride_sums", "stride_norms"])
def _add_parts_kernel(
    columns, rows, squares,
    sums,  # [C + 1]
    norms,  # [count]
    down, across,  # programs that wrote parts
    count, C, stride_sums, stride_norms,
    PARTS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """First programs for the column sums, then programs for the norms, and one for the norms' sum."""
    near = tl.arange(0, SUMS)
    program = tl.program_id(0)
    of_columns = tl.cdiv(C, SUMS)
    of_norms = tl.cdiv(count, SUMS).to(tl.int32)
    if program < of_columns:
        channel = program * SUMS + near
        known = channel < C
        place = sums + channel.to(tl.int64) * stride_sums
        total = tl.load(place, mask=known, other=0) + _sum_down(columns, channel, down, C, known, PARTS, SUMS)
        tl.store(place, total, mask=known)
    elif program < of_columns + of_norms:
        row = (program - of_columns).to(tl.int64) * SUMS + near
        known = row < count
        norm = _sum_down(rows, row, across, count, known, PARTS, SUMS)
        tl.store(norms + row * stride_norms, norm.to(norms.dtype.element_ty), mask=known)
    else:
        total = tl.zeros([PARTS * SUMS], dtype=tl.float64)
        parts = down * across
        for start in range(0, parts, PARTS * SUMS):
            part = start + tl.arange(0, PARTS * SUMS)
            total += tl.load(squares + part, mask=part < parts, other=0)
        place = sums + C.to(tl.int64) * stride_sums
        tl.store(place, tl.load(place) + tl.sum(total, 0))


def _pack(x: Tensor, pivot: Tensor | None, first: int, panel: Tensor, parts: Sequence[Tensor | None]) -> tuple[int, int]:
    """Fills panel; how many programs wrote parts, down and across."""
    count, channels = panel.shape
    one, strides = _one_stride(x), x.stride()
    if one is not None:
        strides = 0, strides[1], one
    unit = "channel" if strides[1] == 1 else "sample" if strides[2] == 1 else ""
    grid = triton.cdiv(count, SAMPLES), triton.cdiv(channels, CHANNELS)
    with torch.cuda.device_of(x):
        _pack_samples_kernel[grid](
            x,
            pivot,
            panel,
            *parts,
            first,
            count,
            channels,
            x.shape[2],
            *strides,
            panel.stride(0),
            0 if pivot is None else pivot.stride(0),
            UNIT=unit,
            ONE=one is not None,
            WIDE=_is_wide(max(_reach(x), x.shape[0] * x.shape[2])),
            SAMPLES=SAMPLES,
            CHANNELS=CHANNELS,
            **OPTIONS,
        )
    return grid


def pack_samples(x: Tensor, pivot: Tensor, first: int, panel: Tensor, sums: Tensor, norms: Tensor) -> None:
    """The op fourfold::_pack_samples for CUDA tensors: panel [K, C] = samples first, first + 1, .. of x [N, C, S] - pivot [C].

    sums [C + 1] += the panel's column sums and the sum of its squared norms; norms [K] = these. pivot and sums are float64,
    panel and norms both float64 or float32.
    """
    op = "_pack_samples"
    _check_samples(op, "x", x, FLOATS)
    (n, c, s), count = x.shape, panel.shape[0]
    types = (torch.float64,) if panel.dtype == torch.float64 else (torch.float32, torch.float64)
    _check_matrix(op, "panel", panel, (count, c), types[0], x.device)
    _check_vector(op, "pivot", pivot, c, torch.float64, x.device)
    _check_vector(op, "sums", sums, c + 1, torch.float64, x.device)
    _check_vector(op, "norms", norms, count, panel.dtype, x.device)
    _require(0 <= first <= n * s - count, f"{op}: samples {first}..{first + count} must lie in 0..{n * s}")
    if count == 0 or c == 0:
        norms.zero_()
        return
    down, across = triton.cdiv(count, SAMPLES), triton.cdiv(c, CHANNELS)
    parts = [sums.new_empty(size) for size in (down * c, across * count, down * across)]
    _pack(x, pivot, first, panel, parts)
    with torch.cuda.device_of(x):
        _add_parts_kernel[(triton.cdiv(c, SUMS) + triton.cdiv(count, SUMS) + 1,)](
            *parts, sums, norms, down, across, count, c, sums.stride(0), norms.stride(0), PARTS=PARTS, SUMS=SUMS, **OPTIONS
        )


# ---- wide sums -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["width", "stride_total", "stride_part"])
def _add_wide_kernel(total, part, width, stride_total, stride_part, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    place = total + row * stride_total + column
    value = tl.load(part + row * stride_part + column, mask=inside, other=0)
    tl.store(place, tl.load(place, mask=inside, other=0) + value.to(tl.float64), mask=inside)


def add_wide(total: Tensor, part: Tensor) -> None:
    """The op fourfold::_add_wide_ for CUDA tensors: total [R, W] float64 += part [R, W] float32."""
    op = "_add_wide_"
    _require(total.dim() == 2, f"{op}: total must be [R, W], got {tuple(total.shape)}")
    _check_matrix(op, "total", total, tuple(total.shape), torch.float64, total.device)
    _check_matrix(op, "part", part, tuple(total.shape), torch.float32, total.device)
    if total.numel() == 0:
        return
    rows, width = total.shape
    with torch.cuda.device_of(total):
        _add_wide_kernel[rows, triton.cdiv(width, COLUMNS)](
            total, part, width, total.stride(0), part.stride(0), COLUMNS=COLUMNS, **OPTIONS
        )


# ---- a count of what is not finite -----------------------------------------------------------------------------------

_COUNTED_SIZES = ["size1", "size2", "size3", "stride0", "stride1", "stride2", "stride3"]


@triton.jit(do_not_specialize=_COUNTED_SIZES)
def _count_nonfinite_kernel(
    x,  # as integers
    counts,
    total,
    size1, size2, size3,  # the last RANK - 1 of them are x's
    stride0, stride1, stride2, stride3,  # the last RANK
    EXPONENT: tl.constexpr,
    RANK: tl.constexpr,
    UNIT: tl.constexpr,  # the last stride is 1
    WIDE: tl.constexpr,
    COUNTED: tl.constexpr,
):  # fmt: skip
    """Of this program's share of the elements."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    count = tl.zeros([COUNTED], dtype=tl.int32)
    for first in range(tl.program_id(0).to(INDEX) * COUNTED, total, tl.num_programs(0).to(INDEX) * COUNTED):
        element = first + tl.arange(0, COUNTED)
        inside = element < total
        place = tl.zeros_like(element)
        if RANK >= 2:
            place += element % size3 * (1 if UNIT else stride3)
            element = element // size3
        if RANK >= 3:
            place += element % size2 * stride2
            element = element // size2
        if RANK == 4:
            place += element % size1 * stride1
            element = element // size1
        if RANK == 1 and UNIT:
            place += element
        elif RANK == 1:
            place += element * stride3
        elif RANK == 2:
            place += element * stride2
        elif RANK == 3:
            place += element * stride1
        else:
            place += element * stride0
        value = tl.load(x + place, mask=inside, other=0)
        count += ((value & EXPONENT) == EXPONENT).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(count.to(tl.int64), 0))


def _axes(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of what x visits, in memory order, with as few axes as there can be."""
    axes: list[tuple[int, int]] = []
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda axis: -axis[1]):
        if axes and axes[-1][1] == size * stride:
            axes[-1] = axes[-1][0] * size, stride
        elif size > 1:
            axes.append((size, stride))
    return axes or [(1, 1)]


def count_nonfinite(x: Tensor) -> Tensor:
    """The op fourfold::_count_nonfinite for CUDA tensors: int64, of x of any shape and strides."""
    op = "_count_nonfinite"
    _require(x.dtype in FLOATS, f"{op}: x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    axes = _axes(x)
    if len(axes) > 4:
        size, stride = axes[0]
        rest = [size for size, _ in axes[1:]], [stride for _, stride in axes[1:]]
        return torch.stack([count_nonfinite(x.as_strided(*rest, x.storage_offset() + i * stride)) for i in range(size)]).sum()
    total = x.numel()
    counts = torch.empty(min(triton.cdiv(total, COUNTED), COUNTERS), dtype=torch.int64, device=x.device)
    sizes, strides = zip(*[(1, 0)] * (4 - len(axes)), *axes, strict=True)
    dtype, exponent = EXPONENTS[x.dtype]
    with torch.cuda.device_of(x):
        _count_nonfinite_kernel[(len(counts),)](
            x.view(dtype),
            counts,
            total,
            *sizes[1:],
            *strides,
            EXPONENT=exponent,
            RANK=len(axes),
            UNIT=strides[-1] == 1,
            WIDE=_is_wide(max(_reach(x), total)),
            COUNTED=COUNTED,
            **OPTIONS,
        )
    return counts.sum()


# ---- Gram matrices of 16-bit samples ---------------------------------------------------------------------------------


@triton.jit
def _tile_of(tile, down, SAME: tl.constexpr):
    """Which rows and which columns; SAME: of the tiles on and above the diagonal, column by column."""
    if SAME:
        j = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1) - 1) * 0.5).to(tl.int32)
        # float32 can be one off.
        j -= (j * (j + 1) // 2 > tile).to(tl.int32)
        j += ((j + 1) * (j + 2) // 2 <= tile).to(tl.int32)
        i = tile - j * (j + 1) // 2
    else:
        j = tile // down
        i = tile - j * down
    return i, j


_GRAM_SIZES = [
    "CX", "CY", "S", "count", "share", "x_stride_n", "x_stride_c", "x_stride_s", "y_stride_n", "y_stride_c", "y_stride_s"
]  # fmt: skip


@triton.jit(do_not_specialize=_GRAM_SIZES)
def _gram_kernel(
    x,
    y,
    parts,  # float64 [splits, tiles, BLOCK, BLOCK]
    # These come in units of the alignment of what they count, so that whole pieces are known to be there or not:
    CX, CY,  # channels that may be read
    S, count,  # samples of an image, and of all
    x_stride_n, x_stride_c, x_stride_s, y_stride_n, y_stride_c, y_stride_s,
    share,  # chunks of a program
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,  # the axis of stride 1: "channel" or "sample"
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, S_ALIGN: tl.constexpr,
    ONE: tl.constexpr,
    WIDE: tl.constexpr,
    SAME: tl.constexpr,
    FACTOR: tl.constexpr,  # the type of x and y
    BLOCK: tl.constexpr,
    ALONG: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of the matrix, of this program's share of the samples."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    S = S.to(INDEX) * S_ALIGN
    count = count.to(INDEX) * S_ALIGN
    if X_UNIT == "channel":
        CX = CX * X_ALIGN
    if Y_UNIT == "channel":
        CY = CY * Y_ALIGN
    i, j = _tile_of(tl.program_id(0), tl.cdiv(CX, BLOCK), SAME)
    row = i * BLOCK + tl.arange(0, BLOCK)
    column = j * BLOCK + tl.arange(0, BLOCK)
    of_row = row.to(INDEX) if X_UNIT == "channel" else row.to(INDEX) * (x_stride_c.to(INDEX) * X_ALIGN)
    of_column = column.to(INDEX) if Y_UNIT == "channel" else column.to(INDEX) * (y_stride_c.to(INDEX) * Y_ALIGN)
    x_image = x_stride_n.to(INDEX) * X_ALIGN
    y_image = y_stride_n.to(INDEX) * Y_ALIGN
    x_next = 1 if X_UNIT == "sample" else x_stride_s.to(INDEX) * X_ALIGN
    y_next = 1 if Y_UNIT == "sample" else y_stride_s.to(INDEX) * Y_ALIGN
    wide = tl.zeros([BLOCK, BLOCK], tl.float64)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, tl.cdiv(count, CHUNK).to(tl.int32))
    # As one loop, reading runs ahead from each chunk into the next.
    for chunk in tl.range(begin, end, flatten=True):
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for step in tl.range(0, CHUNK, ALONG):
            sample = (tl.full([], 0, INDEX) + chunk) * CHUNK + step + tl.arange(0, ALONG)
            known = sample < count
            place = of_row[:, None] + _place_of(sample, S, x_image, x_next, ONE)[None, :]
            a = tl.load(x + place, mask=(row < CX)[:, None] & known[None, :], other=0)
            place = of_column[None, :] + _place_of(sample, S, y_image, y_next, ONE)[:, None]
            b = tl.load(y + place, mask=(column < CY)[None, :] & known[:, None], other=0)
            total = tl.dot(a.to(FACTOR), b.to(FACTOR), total)
        wide += total.to(tl.float64)
    part = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (BLOCK * BLOCK)
    tl.store(parts + part + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], wide)


@triton.jit(do_not_specialize=["splits", "tiles", "CX", "CY", "stride_row", "stride_column"])
def _add_gram_parts_kernel(
    parts,  # [splits, tiles, BLOCK, BLOCK]
    total,  # [CX, CY]
    splits, tiles, CX, CY, stride_row, stride_column,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    i, j = _tile_of(tile, tl.cdiv(CX, BLOCK), SAME)
    near = tl.program_id(1) * SUMS + tl.arange(0, SUMS)
    row, column = i * BLOCK + near // BLOCK, j * BLOCK + near % BLOCK
    inside = (row < CX) & (column < CY)
    size = tiles.to(tl.int64) * (BLOCK * BLOCK)
    sums = _sum_down(parts + tile.to(tl.int64) * (BLOCK * BLOCK), near, splits, size, inside, PARTS, SUMS)
    place = total + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
    tl.store(place, tl.load(place, mask=inside, other=0) + sums, mask=inside)


class _Operand(NamedTuple):
    """How a kernel reads samples."""

    memory: Tensor
    unit: str
    align: int  # elements, a power of two
    channels: int  # that may be read, some of them perhaps beyond x's
    strides: tuple[int, int, int]
    reach: int  # the last element's place


def _in_place(x: Tensor, one: bool) -> _Operand | None:
    """x as it lies there, where that comes in pieces of 8 or 16 bytes."""
    n, c, s = x.shape
    stride_n, stride_c, stride_s = x.stride()
    if one:
        stride = _one_stride(x)
        if stride is None:
            return None
        stride_n, stride_s, s = 0, stride, n * s
    stride_n, stride_c = (0 if n == 1 else stride_n), (0 if c == 1 else stride_c)
    if stride_s == 1:
        unit, align = "sample", math.gcd(8, s, stride_n, stride_c)
    elif stride_c == 1:
        unit, align = "channel", math.gcd(8, c, stride_n, stride_s)
    else:
        return None
    if align < 4 or x.data_ptr() % 16:
        return None
    return _Operand(x, unit, align, c, (stride_n, stride_c, stride_s), _reach(x))


def _repacked(x: Tensor, one: bool) -> _Operand:
    """A copy with channels innermost, and rows of whole pieces."""
    n, c, s = x.shape
    width = triton.cdiv(c, 8) * 8
    memory = x.new_empty(n * s, width)
    memory[:, c:].zero_()
    _pack(x, None, 0, memory[:, :c], (None, None, None))
    return _Operand(memory, "channel", 8, width, (0 if one else s * width, 1, width), memory.numel() - 1)


def _add_gram(x: Tensor, y: Tensor, same: bool, total: Tensor) -> None:
    (n, cx, s), cy = x.shape, y.shape[1]
    # What is copied can be had either way.
    one = all(_one_stride(t) is not None or _in_place(t, False) is None for t in (x, y))
    left = _in_place(x, one) or _repacked(x, one)
    right = left if same else _in_place(y, one) or _repacked(y, one)
    count, s = n * s, n * s if one else s
    of_samples = math.gcd(8, s) if "sample" in (left.unit, right.unit) else 1
    # Two ways to read leave no room for the registers of a large tile.
    block = SMALL if min(cx, cy) <= SMALL or left.unit != right.unit else BLOCK
    chunk = min(CHUNK, max(2 * ALONG, triton.next_power_of_2(count)))
    tiles = [triton.cdiv(channels, block) for channels in (cx, cy)]
    every = tiles[0] * (tiles[0] + 1) // 2 if same else tiles[0] * tiles[1]
    chunks, (programs, fewest) = triton.cdiv(count, chunk), PROGRAMS[block]
    share = max(min(fewest, chunks), triton.cdiv(chunks, max(1, programs // every)))
    splits = triton.cdiv(chunks, share)
    parts = total.new_empty(splits * every * block * block)

    def units(operand: _Operand) -> list[int]:
        return [stride // operand.align for stride in operand.strides]

    def channels(operand: _Operand) -> int:
        return operand.channels // operand.align if operand.unit == "channel" else operand.channels

    with torch.cuda.device_of(x):
        _gram_kernel[every, splits](
            left.memory,
            right.memory,
            parts,
            channels(left),
            channels(right),
            s // of_samples,
            count // of_samples,
            *units(left),
            *units(right),
            share,
            X_UNIT=left.unit,
            Y_UNIT=right.unit,
            X_ALIGN=left.align,
            Y_ALIGN=right.align,
            S_ALIGN=of_samples,
            ONE=one,
            WIDE=_is_wide(max(left.reach, right.reach, count)),
            SAME=same,
            FACTOR=_factor_type(x.dtype),
            BLOCK=block,
            ALONG=ALONG if min(left.align, right.align) == 8 else ALONG_PIECES,
            CHUNK=chunk,
            **PRODUCT[block],
        )
        _add_gram_parts_kernel[every, block * block // SUMS](
            parts, total, splits, every, cx, cy, *total.stride(), SAME=same, BLOCK=block, PARTS=PARTS, SUMS=SUMS, **OPTIONS
        )


def _factor_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def gram(x: Tensor, y: Tensor, total: Tensor) -> None:
    """The op fourfold::_gram_ for CUDA tensors: total [Cx, Cy] float64 += the sum over all samples of x y^T.

    x [N, Cx, S] and y [N, Cy, S], both float16 or bfloat16. If they are the same memory, what lies below the diagonal's
    blocks is left as it is.
    """
    op = "_gram_"
    _check_samples(op, "x", x, (torch.float16, torch.bfloat16))
    _check_samples(op, "y", y, (x.dtype,))
    same_samples = (x.shape[0], x.shape[2], x.device) == (y.shape[0], y.shape[2], y.device)
    what = f"{tuple(x.shape)} on {x.device} and {tuple(y.shape)} on {y.device}"
    _require(same_samples, f"{op}: x [N, Cx, S] and y [N, Cy, S] of the same N and S needed on one device, got {what}")
    ok = total.shape == (x.shape[1], y.shape[1]) and total.dtype == torch.float64 and total.device == x.device
    what = f"{total.dtype} {tuple(total.shape)} on {total.device}"
    _require(ok, f"{op}: total must be torch.float64 ({x.shape[1]}, {y.shape[1]}) on {x.device}, got {what}")
    if x.numel() == 0 or y.numel() == 0:
        return
    same = (x.data_ptr(), x.shape, x.stride()) == (y.data_ptr(), y.shape, y.stride())
    step, axis = x.shape[0], 0
    if any(_in_place(t, False) is None and _in_place(t, True) is None for t in (x, y)):
        axis = 0 if x.shape[0] > 1 else 2
        step = max(1, REPACKED // (max(x.numel(), y.numel()) // x.shape[axis]))
    for first in range(0, x.shape[axis], step):
        count = min(step, x.shape[axis] - first)
        _add_gram(x.narrow(axis, first, count), y.narrow(axis, first, count), same, total)


# ---- spectra of images -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "C", "h", "w", "stride_frequency", "stride_part", "stride_sample"])
def _sort_spectra_kernel(
    transformed,  # [rows, h, w // 2 + 1, 2] of all samples' channels: real and imaginary parts
    spectra,  # [F, 2, n, C]
    rows, C, h, w, stride_frequency, stride_part, stride_sample,
    FREQUENCIES: tl.constexpr,
    IMAGES: tl.constexpr,
):  # fmt: skip
    """Conjugated, and sorted by frequency: one of each pair of conjugate ones, by columns, (k, l) and (-k, l) side by side."""
    across = w // 2 + 1
    place = tl.program_id(1) * FREQUENCIES + tl.arange(0, FREQUENCIES)
    image = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    k, column = place // across, place % across
    own = (2 * column) % w == 0  # (-k, l) is the conjugate of (k, l)
    singles = 2 - h % 2
    second = k > (h - 1) // 2
    step = tl.where(own, 1, 2)
    within = singles + (tl.minimum(k, h - k) - 1) * step + tl.where(second, step - 1, 0)
    within = tl.where(2 * k == h, 1, tl.where(k == 0, 0, within))
    alone = (k == 0) | (2 * k == h)
    # The first column is as long as its half, the others in front of this one are whole.
    frequency = tl.where(column == 0, within, h // 2 + 1 + (column - 1) * h + within)
    known = (place < h * across) & (alone | (own != 1) | (second != 1))
    inside = known[:, None] & (image < rows)[None, :]
    source = (image.to(tl.int64) * (h * across))[None, :] + place[:, None]
    real = tl.load(transformed + 2 * source, mask=inside, other=0)
    imaginary = -tl.load(transformed + 2 * source + 1, mask=inside, other=0)
    imaginary = tl.where((alone & own)[:, None], 0.0, imaginary)
    to = frequency.to(tl.int64)[:, None] * stride_frequency
    to += ((image // C).to(tl.int64) * stride_sample + image % C)[None, :]
    tl.store(spectra + to, real, mask=inside)
    tl.store(spectra + to + stride_part, imaginary, mask=inside)


def image_spectra(x: Tensor, pivot: Tensor, spectra: Tensor) -> None:
    """The op fourfold::_image_spectra for CUDA tensors: spectra [F, 2, n, c] = those of x [n, c, h, w] - pivot [c, h, w].

    Real and imaginary parts of the conjugate of its DFT, at one of each pair of conjugate frequencies. The transform is
    cuFFT's, in the type of spectra.
    """
    op = "_image_spectra"
    ok = x.dim() == 4 and x.dtype in FLOATS and x.shape[2] > 0 and x.shape[3] > 0
    _require(ok, f"{op}: x must be a floating [n, c, h, w] with pixels, got {x.dtype} {tuple(x.shape)}")
    n, c, h, w = x.shape
    ok = pivot.shape == (c, h, w) and pivot.dtype == torch.float64 and pivot.device == x.device
    _require(ok, f"{op}: pivot must be torch.float64 {(c, h, w)} on {x.device}, got {pivot.dtype} {tuple(pivot.shape)}")
    shape = (h * w + (2 - h % 2) * (2 - w % 2)) // 2, 2, n, c
    ok = spectra.shape == shape and spectra.dtype in (torch.float32, torch.float64) and spectra.device == x.device
    ok = ok and (c <= 1 or spectra.stride(3) == 1)
    what = f"{spectra.dtype} {tuple(spectra.shape)} on {spectra.device} with strides {spectra.stride()}"
    _require(ok, f"{op}: spectra must be float32 or float64 {shape} on {x.device} with contiguous channels, got {what}")
    _require(n * c < 2**31 - IMAGES, f"{op}: n * c must be below 2**31, got {n * c}")
    if n * c == 0:
        return
    centred = (x.double() - pivot).to(spectra.dtype).contiguous()
    transformed = torch.view_as_real(torch.fft.rfft2(centred).contiguous())
    with torch.cuda.device_of(x):
        _sort_spectra_kernel[triton.cdiv(n * c, IMAGES), triton.cdiv(h * (w // 2 + 1), FREQUENCIES)](
            transformed,
            spectra,
            n * c,
            c,
            h,
            w,
            *spectra.stride()[:3],
            FREQUENCIES=FREQUENCIES,
            IMAGES=IMAGES,
            **OPTIONS,
        )


_SPECTRA_SIZES = [
    "n", "C1", "C2", "a_frequency", "a_part", "a_sample", "b_frequency", "b_part", "b_sample", "stride_frequency", "stride_row"
]  # fmt: skip


@triton.jit(do_not_specialize=_SPECTRA_SIZES)
def _spectra_gram_kernel(
    a,  # [F, 2, n, C1]
    b,  # [F, 2, n, C2]
    total,  # [F, C1, C2]
    sums,  # [F, C1, 2] or None
    n, C1, C2, a_frequency, a_part, a_sample, b_frequency, b_part, b_sample, stride_frequency, stride_row,
    SPECTRA: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    frequency = tl.program_id(0).to(tl.int64)
    i, j = tl.program_id(1), tl.program_id(2)
    row = i * SPECTRA + tl.arange(0, SPECTRA)
    column = j * SPECTRA + tl.arange(0, SPECTRA)
    a += frequency * a_frequency
    b += frequency * b_frequency
    wide = tl.zeros([SPECTRA, SPECTRA], tl.float64)
    real_sum = tl.zeros([SPECTRA], tl.float64)
    imaginary_sum = tl.zeros([SPECTRA], tl.float64)
    for first in range(0, n, STEP):
        sample = first + tl.arange(0, STEP)
        known = (sample < n)[:, None]
        left = a + (sample.to(tl.int64) * a_sample)[:, None] + row[None, :]
        right = b + (sample.to(tl.int64) * b_sample)[:, None] + column[None, :]
        left_known, right_known = known & (row < C1)[None, :], known & (column < C2)[None, :]
        real = tl.load(right, mask=right_known, other=0)
        imaginary = tl.load(right + b_part, mask=right_known, other=0)
        factor = tl.load(left, mask=left_known, other=0)
        wide += tl.dot(tl.trans(factor), real + imaginary, input_precision="ieee", out_dtype=factor.dtype)
        if sums is not None:
            real_sum += tl.sum(factor.to(tl.float64), 0)
        factor = tl.load(left + a_part, mask=left_known, other=0)
        wide += tl.dot(tl.trans(factor), imaginary - real, input_precision="ieee", out_dtype=factor.dtype)
        if sums is not None:
            imaginary_sum += tl.sum(factor.to(tl.float64), 0)
    place = total + frequency * stride_frequency + row.to(tl.int64)[:, None] * stride_row + column[None, :]
    inside = (row < C1)[:, None] & (column < C2)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0) + wide, mask=inside)
    if sums is not None:
        place = sums + 2 * (frequency * C1 + row)
        first_column = row < tl.where(j == 0, C1, 0)
        tl.store(place, tl.load(place, mask=first_column, other=0) + real_sum, mask=first_column)
        tl.store(place + 1, tl.load(place + 1, mask=first_column, other=0) + imaginary_sum, mask=first_column)


def spectra_gram(a: Tensor, b: Tensor, total: Tensor, sums: Tensor | None) -> None:
    """The op fourfold::_spectra_gram_ for CUDA tensors: total [F, c1, c2] += real plus imaginary part of conj(a) b^T.

    Summed over all samples of a [F, 2, n, c1] and b [F, 2, n, c2], both float32 or float64; sums [F, c1, 2] += those of a.
    """
    op = "_spectra_gram_"
    ok = a.dim() == 4 and a.shape[1] == 2 and a.dtype in (torch.float32, torch.float64)
    _require(ok, f"{op}: a must be float32 or float64 [F, 2, n, c], got {a.dtype} {tuple(a.shape)}")
    (frequencies, _, n, rows), columns = a.shape, b.shape[-1]
    ok = b.shape == (frequencies, 2, n, columns) and b.dtype == a.dtype and b.device == a.device
    _require(ok, f"{op}: b must be {a.dtype} [{frequencies}, 2, {n}, c] on {a.device}, got {b.dtype} {tuple(b.shape)}")
    ok = total.shape == (frequencies, rows, columns) and total.dtype == torch.float64 and total.device == a.device
    ok = ok and (columns <= 1 or total.stride(2) == 1)
    what = f"{total.dtype} {tuple(total.shape)} on {total.device} with strides {total.stride()}"
    _require(ok, f"{op}: total must be torch.float64 {(frequencies, rows, columns)} with contiguous rows, got {what}")
    if sums is not None:
        ok = sums.shape == (frequencies, rows, 2) and sums.dtype == torch.float64 and sums.device == a.device
        what = f"{sums.dtype} {tuple(sums.shape)} on {sums.device} with strides {sums.stride()}"
        ok = ok and sums.is_contiguous()
        _require(ok, f"{op}: sums must be contiguous torch.float64 {(frequencies, rows, 2)} on {a.device}, got {what}")
    if a.numel() == 0:
        return
    a, b = (t if t.shape[3] <= 1 or t.stride(3) == 1 else t.contiguous() for t in (a, b))
    # Sums are the first column's of programs; without a column there is still one for them.
    with torch.cuda.device_of(a):
        _spectra_gram_kernel[frequencies, triton.cdiv(rows, SPECTRA), max(1, triton.cdiv(columns, SPECTRA))](
            a,
            b,
            total,
            sums,
            n,
            rows,
            columns,
            *a.stride()[:3],
            *b.stride()[:3],
            *total.stride()[:2],
            SPECTRA=SPECTRA,
            STEP=STEP,
            **SPECTRA_PRODUCT,
        )


# ---- checks: what keeps kernels inside their buffers; the public functions have checked all of it with better words ---


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_samples(op: str, name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    kinds = " or ".join(str(dtype) for dtype in dtypes)
    ok = x.dim() == 3 and x.dtype in dtypes and max(x.shape) < 2**31 - BLOCK
    _require(ok, f"{op}: {name} must be {kinds} [N, C, S], got {x.dtype} {tuple(x.shape)}")


def _check_matrix(op: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    ok = x.shape == shape and x.dtype == dtype and x.device == device and (x.shape[1] <= 1 or x.stride(1) == 1)
    what = f"{x.dtype} {tuple(x.shape)} on {x.device} with strides {x.stride()}"
    _require(ok, f"{op}: {name} must be {dtype} {tuple(shape)} on {device} with unit column stride, got {what}")


def _check_vector(op: str, name: str, x: Tensor, length: int, dtype: torch.dtype, device: torch.device) -> None:
    ok = x.shape == (length,) and x.dtype == dtype and x.device == device
    _require(ok, f"{op}: {name} must be {dtype} [{length}] on {device}, got {x.dtype} {tuple(x.shape)} on {x.device}")


# ---- for CI ----------------------------------------------------------------------------------------------------------


def _compiled(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], options: dict[str, Any], index: str = "i32"
) -> tuple[Any, ...]:
    """Arguments that are neither pointers nor constants are numbers of the type index."""
    signature = {name: pointers.get(name, index) for name in kernel.arg_names if name not in constants}
    return kernel, signature, constants, options


def _compiled_pack(dtype: str, panel: str, unit: str, wide: bool, pivot: bool = True) -> tuple[Any, ...]:
    pointers = {"x": dtype, "panel": panel, **dict.fromkeys(("pivot", "columns", "rows", "squares"), "*fp64")}
    constants: dict[str, Any] = {"UNIT": unit, "ONE": unit == "channel", "WIDE": wide, "SAMPLES": SAMPLES, "CHANNELS": CHANNELS}
    if not pivot:
        constants |= dict.fromkeys(("pivot", "columns", "rows", "squares"))
    return _compiled(_pack_samples_kernel, pointers, constants, OPTIONS, "i64" if wide else "i32")


def _compiled_count(dtype: str, exponent: int, rank: int, wide: bool) -> tuple[Any, ...]:
    constants = {"EXPONENT": exponent, "RANK": rank, "UNIT": rank < 4, "WIDE": wide, "COUNTED": COUNTED}
    return _compiled(_count_nonfinite_kernel, {"x": dtype, "counts": "*i64"}, constants, OPTIONS, "i64" if wide else "i32")


def _compiled_gram(
    dtype: str, units: tuple[str, str], aligns: tuple[int, int], same: bool, block: int, wide: bool = False
) -> tuple[Any, ...]:
    constants = {
        "X_UNIT": units[0],
        "Y_UNIT": units[1],
        "X_ALIGN": aligns[0],
        "Y_ALIGN": aligns[1],
        "S_ALIGN": min(aligns) if "sample" in units else 1,
        "ONE": "sample" not in units,
        "WIDE": wide,
        "SAME": same,
        "FACTOR": {"*fp16": tl.float16, "*bf16": tl.bfloat16}[dtype],
        "BLOCK": block,
        "ALONG": ALONG if min(aligns) == 8 else ALONG_PIECES,
        "CHUNK": CHUNK,
    }
    index = "i64" if wide else "i32"
    return _compiled(_gram_kernel, {"x": dtype, "y": dtype, "parts": "*fp64"}, constants, PRODUCT[block], index)


def _compiled_sums(same: bool, block: int) -> tuple[Any, ...]:
    constants = {"SAME": same, "BLOCK": block, "PARTS": PARTS, "SUMS": SUMS}
    return _compiled(_add_gram_parts_kernel, {"parts": "*fp64", "total": "*fp64"}, constants, OPTIONS)


def _compiled_spectra(dtype: str, index: str) -> tuple[Any, ...]:
    constants = {"FREQUENCIES": FREQUENCIES, "IMAGES": IMAGES}
    return _compiled(_sort_spectra_kernel, {"transformed": dtype, "spectra": dtype}, constants, OPTIONS, index)


def _compiled_spectra_gram(dtype: str, sums: bool, index: str) -> tuple[Any, ...]:
    pointers = {"a": dtype, "b": dtype, "total": "*fp64", "sums": "*fp64"}
    constants = {"SPECTRA": SPECTRA, "STEP": STEP} | ({} if sums else {"sums": None})
    return _compiled(_spectra_gram_kernel, pointers, constants, SPECTRA_PRODUCT, index)


_PARTS = {**dict.fromkeys(("columns", "rows", "squares", "sums"), "*fp64"), "norms": "*fp32"}

#: (kernel, signature, constants, options): what CI compiles for every supported architecture.
COMPILED = [
    _compiled_pack("*bf16", "*fp64", "sample", False),
    _compiled_pack("*fp32", "*fp32", "", True),
    _compiled_pack("*bf16", "*bf16", "sample", False, pivot=False),
    _compiled(_add_parts_kernel, _PARTS, {"PARTS": PARTS, "SUMS": SUMS}, OPTIONS),
    _compiled(_add_wide_kernel, {"total": "*fp64", "part": "*fp32"}, {"COLUMNS": COLUMNS}, OPTIONS),
    _compiled_count("*i16", 0x7F80, 1, False),
    _compiled_count("*i64", 0x7FF0000000000000, 4, True),
    _compiled_gram("*bf16", ("sample", "sample"), (8, 8), True, BLOCK),
    _compiled_gram("*bf16", ("channel", "channel"), (8, 8), True, BLOCK),
    _compiled_gram("*fp16", ("sample", "sample"), (4, 4), False, BLOCK, wide=True),
    _compiled_gram("*fp16", ("channel", "sample"), (8, 4), False, SMALL, wide=True),
    _compiled_sums(True, BLOCK),
    _compiled_sums(False, SMALL),
    _compiled_spectra("*fp64", "i32"),
    _compiled_spectra("*fp32", "i64"),
    _compiled_spectra_gram("*fp64", True, "i32"),
    _compiled_spectra_gram("*fp32", True, "i64"),
    _compiled_spectra_gram("*fp64", False, "i64"),
]
