"""Masked matmul's ops in Triton: masks to and from bits, samplers, masked and superposed weights, matrix products with them.

Kernels see packed bits as 32-bit words, two to each of the format's 64-bit words, so that a tile of words is a tile
[words, 32] of weights.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Words per program of what goes over a weight once: 16 weights a thread.
WORDS, WARPS = 64, 4
# Programs of a sum over a weight, whose parts whoever needs the sum adds up again: the same on every device.
PARTS = 256
# Masks at a time, and words, where all masks of a bank are summed.
MASKS, BANK_WORDS = 4, 32
# Rows and columns of a tile of weights where each sample has its own mask.
TASK_ROWS, TASK_COLUMNS = 16, 64
# Tiles of a product with masked weights: across its columns, and along what is summed over.
ACROSS = 32
# A tile of products at the bits of a mask: a word of the format.
BLOCK = 64
# With fewer programs than these, multiprocessors wait for memory; then a product is split along the axis it sums over.
ENOUGH = 512
# Up to so many rows of x weights are masked on their way into the product; beyond, writing them once costs less than the
# vendor's product gains. float32 has no tensor core of its precision, float64 none that is fed fast enough here.
FUSED_ROWS = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 32, torch.float64: 0}

# The sampler's bits are those of every other device: no multiplication and addition may be rounded as one.
EXACT = {"num_warps": WARPS, "enable_fp_fusion": False}
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
PRODUCT = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---- words and weights -----------------------------------------------------------------------------------------------


@triton.jit
def _place(first, total, K, width, WORDS: tl.constexpr):
    """Of the words from first on: which they are, where the weights of each begin in [N, K], and which weights there are."""
    word = first + tl.arange(0, WORDS)
    row = word // width
    column = (word - row * width) * 32
    inside = (word < total)[:, None] & (column[:, None] + tl.arange(0, 32)[None, :] < K)
    return word, row.to(tl.int64) * K + column, inside


@triton.jit
def _tile(pointer, start, inside):
    """The weights [words, 32] of words that start there."""
    return tl.load(pointer + start[:, None] + tl.arange(0, 32)[None, :], mask=inside, other=0)


@triton.jit
def _store_tile(pointer, start, value, inside):
    tl.store(pointer + start[:, None] + tl.arange(0, 32)[None, :], value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _bits_of(word):
    """Words [..] as booleans [.., 32]."""
    return (tl.expand_dims(word, -1) >> tl.arange(0, 32)) & 1 != 0


@triton.jit
def _packed(bit):
    """Booleans [words, 32] as words."""
    return tl.sum(bit.to(tl.int32) << tl.arange(0, 32)[None, :], 1)


@triton.jit
def _ones_in(word):
    """Bits set in each word."""
    n = word.to(tl.uint32)
    n = n - ((n >> 1) & 0x55555555)
    n = (n & 0x33333333) + ((n >> 2) & 0x33333333)
    n = (n + (n >> 4)) & 0x0F0F0F0F
    n = n + (n >> 8)
    return ((n + (n >> 16)) & 63).to(tl.int32)


@triton.jit
def _sum_of(parts, COUNT: tl.constexpr):
    return tl.sum(tl.load(parts + tl.arange(0, COUNT)), 0)


def _rows(x: Tensor) -> tuple[int, int]:
    return x.shape[0], math.prod(x.shape[1:])


def _row_words(k: int) -> int:
    return 2 * triton.cdiv(k, 64)


def _words(bits: Tensor) -> Tensor:
    """bits as 32-bit words; copied where they don't lie on words."""
    bits = bits.contiguous()
    return (bits if bits.data_ptr() % 8 == 0 else bits.clone()).view(torch.int32)


def _new_bits(like: Tensor) -> tuple[Tensor, Tensor]:
    """Unwritten bits for a weight of that shape, and their words."""
    n, k = _rows(like)
    words = torch.empty(n, _row_words(k), dtype=torch.int32, device=like.device)
    return words.view(torch.uint8), words


def _tiles(words: Tensor, k: int) -> tuple[tuple[int], tuple[int, int, int]]:
    """A program for every tile of words, and what _place needs."""
    return (triton.cdiv(words.numel(), WORDS),), (words.numel(), k, words.shape[-1])


# ---- checks: what keeps kernels inside their buffers; the public functions have checked all of it with better words ---


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_floating(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None:
            _require(x.dtype in FLOATS, f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_rows(op: str, name: str, x: Tensor) -> None:
    _require(x.dim() >= 2, f"{op}: {name} must be [N, K], got {tuple(x.shape)}")


def _check_bits(op: str, name: str, bits: Tensor, lead: tuple[int, ...], k: int, device: torch.device) -> None:
    shape = (*lead, 4 * _row_words(k))
    ok = bits.dtype == torch.uint8 and tuple(bits.shape) == shape and bits.device == device
    _require(ok, f"{op}: {name} must be uint8 {shape} on {device}, got {bits.dtype} {tuple(bits.shape)} on {bits.device}")


def _check_shape(op: str, name: str, x: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    if x is not None:
        ok = tuple(x.shape) == tuple(shape) and x.device == device
        _require(ok, f"{op}: {name} must be {tuple(shape)} on {device}, got {tuple(x.shape)} on {x.device}")


# ---- masks to and from bits ------------------------------------------------------------------------------------------


@triton.jit
def _pack_mask_kernel(
    mask,  # bytes [N, K]
    bits,
    total,
    K,
    width,  # words in a row
    WORDS: tl.constexpr,
):
    word, start, inside = _place(tl.program_id(0) * WORDS, total, K, width, WORDS)
    tl.store(bits + word, _packed(_tile(mask, start, inside) != 0), mask=word < total)


def pack_mask(mask: Tensor) -> Tensor:
    """The op fourfold::pack_mask for CUDA tensors: bool [N, ...] -> uint8 [N, 8 * ceil(K / 64)]."""
    op = "pack_mask"
    _check_rows(op, "mask", mask)
    _require(mask.dtype == torch.bool, f"{op}: mask must be bool, got {mask.dtype}")
    bits, words = _new_bits(mask)
    if words.numel() > 0:
        grid, sizes = _tiles(words, _rows(mask)[1])
        with torch.cuda.device_of(mask):
            _pack_mask_kernel[grid](mask.contiguous().view(torch.uint8), words, *sizes, WORDS=WORDS, **OPTIONS)
    return bits


@triton.jit
def _unpack_mask_kernel(bits, mask, total, K, width, WORDS: tl.constexpr):
    word, start, inside = _place(tl.program_id(0) * WORDS, total, K, width, WORDS)
    _store_tile(mask, start, _bits_of(tl.load(bits + word, mask=word < total, other=0)), inside)


def unpack_mask(bits: Tensor, k: int) -> Tensor:
    """The op fourfold::unpack_mask for CUDA tensors: uint8 [N, 8 * ceil(k / 64)] -> bool [N, k]."""
    op = "unpack_mask"
    _require(bits.dim() == 2 and k >= 0, f"{op}: bits must be [N, {4 * _row_words(k)}], got {tuple(bits.shape)}")
    _check_bits(op, "bits", bits, (bits.shape[0],), k, bits.device)
    mask = torch.empty(bits.shape[0], k, dtype=torch.bool, device=bits.device)
    if mask.numel() > 0:
        words = _words(bits)
        grid, sizes = _tiles(words, k)
        with torch.cuda.device_of(bits):
            _unpack_mask_kernel[grid](words, mask.view(torch.uint8), *sizes, WORDS=WORDS, **OPTIONS)
    return mask


# ---- samplers --------------------------------------------------------------------------------------------------------


@triton.jit
def _threshold_mask_kernel(
    scores,
    bits,
    threshold,  # a float64 as the integer of its bits: a float argument would be rounded to float32
    total,
    K,
    width,
    WORDS: tl.constexpr,
):
    word, start, inside = _place(tl.program_id(0) * WORDS, total, K, width, WORDS)
    bound = threshold.to(tl.int64).to(tl.float64, bitcast=True)
    kept = _tile(scores, start, inside).to(tl.float64) >= bound
    tl.store(bits + word, _packed(kept & inside), mask=word < total)


def threshold_mask(scores: Tensor, threshold: float) -> Tensor:
    """The op fourfold::threshold_mask for CUDA tensors: bit = score >= threshold, compared in float64."""
    op = "threshold_mask"
    _check_floating(op, scores=scores)
    _check_rows(op, "scores", scores)
    bits, words = _new_bits(scores)
    if words.numel() > 0:
        grid, sizes = _tiles(words, _rows(scores)[1])
        bound = torch.tensor(threshold, dtype=torch.float64).view(torch.int64).item()
        with torch.cuda.device_of(scores):
            _threshold_mask_kernel[grid](scores.contiguous(), words, bound, *sizes, WORDS=WORDS, **EXACT)
    return bits


@triton.jit
def _philox(counter, key):
    """Four words of Philox4x32-10 (Salmon et al., 2011); counter and key of 64 bits, the counter's upper half zero."""
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32 & 0xFFFFFFFF).to(tl.uint32)
    c0, c1 = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32 & 0xFFFFFFFF).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    a = tl.full([], 0xD2511F53, tl.uint32)
    b = tl.full([], 0xCD9E8D57, tl.uint32)
    step0 = tl.full([], 0x9E3779B9, tl.uint32)
    step1 = tl.full([], 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, a), c0 * a
        high1, low1 = tl.umulhi(c2, b), c2 * b
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += step0
        k1 += step1
    return c0, c1, c2, c3


@triton.jit
def _sigmoid(s):
    """That of every device: this sequence of float32 operations, each rounded on its own."""
    a = tl.minimum(tl.abs(s), 87.0)
    n = (a * 1.44269502 + 12582912.0) - 12582912.0
    r = (n * 0.693359375 - a) + n * -2.12194440e-4
    q = r * (1 / 720) + (1 / 120)
    q = q * r + (1 / 24)
    q = q * r + (1 / 6)
    q = q * r + 0.5
    q = q * r + 1.0
    e = q * r + 1.0
    e = (e.to(tl.int32, bitcast=True) - (n.to(tl.int32) << 23)).to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(s < 0, e, 1.0), e + 1.0)


@triton.jit(do_not_specialize=["offset"])
def _bernoulli_mask_kernel(
    scores,
    seed,  # [1]
    bits,
    offset,
    total,
    K,
    width,
    ALIGNED: tl.constexpr,  # every row starts with word 0 of a counter
    WORDS: tl.constexpr,
):
    word, start, inside = _place(tl.program_id(0) * WORDS, total, K, width, WORDS)
    probability = _sigmoid(_tile(scores, start, inside).to(tl.float32))
    key = tl.load(seed)
    if ALIGNED:
        c0, c1, c2, c3 = _philox(offset + (start >> 2)[:, None] + tl.arange(0, 8)[None, :], key)
        drawn = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [WORDS, 32])
    else:
        flat = start[:, None] + tl.arange(0, 32)[None, :]
        c0, c1, c2, c3 = _philox(offset + (flat >> 2), key)
        which = flat & 3
        drawn = tl.where(which < 2, tl.where(which == 0, c0, c1), tl.where(which == 2, c2, c3))
    kept = drawn.to(tl.int64) < (probability * 4294967296.0).to(tl.int64)
    tl.store(bits + word, _packed(kept & inside), mask=word < total)


def bernoulli_mask(scores: Tensor, seed: Tensor, offset: int) -> Tensor:
    """The op fourfold::bernoulli_mask for CUDA tensors: the same bits as on any other device. seed: int64, one element."""
    op = "bernoulli_mask"
    _check_floating(op, scores=scores)
    _check_rows(op, "scores", scores)
    ok = seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == scores.device
    _require(ok, f"{op}: seed must be one int64 on {scores.device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}")
    bits, words = _new_bits(scores)
    if words.numel() > 0:
        k = _rows(scores)[1]
        grid, sizes = _tiles(words, k)
        with torch.cuda.device_of(scores):
            _bernoulli_mask_kernel[grid](
                scores.contiguous(), seed, words, offset, *sizes, ALIGNED=k % 4 == 0, WORDS=WORDS, **EXACT
            )
    return bits


# ---- effective weights -----------------------------------------------------------------------------------------------


@triton.jit
def _count_kernel(bits, counts, total, WORDS: tl.constexpr):
    """Ones in this program's share of the words."""
    count = tl.zeros([WORDS], dtype=tl.int32)
    for first in range(tl.program_id(0) * WORDS, total, tl.num_programs(0) * WORDS):
        word = first + tl.arange(0, WORDS)
        count += _ones_in(tl.load(bits + word, mask=word < total, other=0))
    tl.store(counts + tl.program_id(0), tl.sum(count.to(tl.int64), 0))


def _counts(words: Tensor) -> Tensor:
    """Numbers of ones, to be added up."""
    counts = torch.empty(PARTS, dtype=torch.int64, device=words.device)
    with torch.cuda.device_of(words):
        _count_kernel[(PARTS,)](words, counts, words.numel(), WORDS=1024, **OPTIONS)
    return counts


@triton.jit
def _factor(counts, weights, PARTS: tl.constexpr):
    """n / ones, correctly rounded in float64."""
    return weights.to(tl.float64) / _sum_of(counts, PARTS).to(tl.float64)


@triton.jit
def _effective(value, kept, scores, start, inside, factor, SIGNED: tl.constexpr):
    """Weights in the type that is computed in -> effective ones; factor: of value's type, or None."""
    if factor is not None:
        value *= factor
    if SIGNED:
        value = tl.where(_tile(scores, start, inside) < 0, -value, value)
    return tl.where(kept, value, 0.0)


@triton.jit
def _apply_mask_kernel(
    weight,
    bits,
    scores,  # or None
    counts,  # [PARTS], or None without rescaling
    out,
    weights,  # N * K
    total,
    K,
    width,
    SIGNED: tl.constexpr,
    WORK: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    word, start, inside = _place(tl.program_id(0) * WORDS, total, K, width, WORDS)
    kept = _bits_of(tl.load(bits + word, mask=word < total, other=0))
    factor = None
    if counts is not None:
        factor = _factor(counts, weights, PARTS).to(WORK)
    value = _tile(weight, start, inside).to(WORK)
    _store_tile(out, start, _effective(value, kept, scores, start, inside, factor, SIGNED), inside)


def apply_mask(weight: Tensor, bits: Tensor, scores: Tensor | None, signed: bool, rescale: str, dtype: torch.dtype) -> Tensor:
    """The op fourfold::_apply_mask for CUDA tensors: the effective weight, of weight's shape, contiguous, in dtype."""
    op = "_apply_mask"
    _check_mask(op, weight, bits, scores, signed, rescale)
    _require(dtype in FLOATS, f"{op}: dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel() > 0:
        words = _words(bits)
        grid, sizes = _tiles(words, _rows(weight)[1])
        counts = _counts(words) if rescale else None
        with torch.cuda.device_of(weight):
            _apply_mask_kernel[grid](
                weight.contiguous(),
                words,
                scores.contiguous() if scores is not None and signed else None,
                counts,
                out,
                weight.numel(),
                *sizes,
                SIGNED=signed,
                WORK=_work(weight.dtype, dtype),
                PARTS=PARTS,
                WORDS=WORDS,
                **OPTIONS,
            )
    return out


def _work(*dtypes: torch.dtype) -> tl.dtype:
    return tl.float64 if torch.float64 in dtypes else tl.float32


def _check_mask(op: str, weight: Tensor, bits: Tensor, scores: Tensor | None, signed: bool, rescale: str) -> None:
    _check_floating(op, weight=weight, scores=scores)
    _check_rows(op, "weight", weight)
    n, k = _rows(weight)
    _check_bits(op, "bits", bits, (n,), k, weight.device)
    _check_shape(op, "scores", scores, weight.shape, weight.device)
    _require(scores is not None or not signed, f"{op}: signed needs scores")
    _require(rescale in ("", "dwr", "dwr_grad"), f"{op}: rescale must be '', 'dwr' or 'dwr_grad', got {rescale!r}")


# ---- gradients of weight and scores ----------------------------------------------------------------------------------


@triton.jit
def _kept_dot_kernel(
    grad, weight, bits, dots, total, K, width, WORK: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """The sum of grad * weight over the kept ones among this program's share."""
    result = tl.zeros([WORDS, 32], dtype=WORK)
    for first in range(tl.program_id(0) * WORDS, total, tl.num_programs(0) * WORDS):
        word, start, inside = _place(first, total, K, width, WORDS)
        kept = _bits_of(tl.load(bits + word, mask=word < total, other=0))
        product = _tile(grad, start, inside).to(WORK) * _tile(weight, start, inside).to(WORK)
        result += tl.where(kept, product, 0.0)
    tl.store(dots + tl.program_id(0), tl.sum(tl.sum(result, 1), 0))


@triton.jit
def _mask_gradients_kernel(
    grad,  # of the effective weight
    weight,
    bits,
    scores,  # or None
    counts,  # [PARTS], or None without rescaling
    dots,  # [PARTS], or None where the count is a constant
    weight_grad,  # or None
    score_grad,  # or None
    weights,  # N * K
    total,
    K,
    width,
    SLOPE: tl.constexpr,
    SIGNED: tl.constexpr,
    WORK: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    word, start, inside = _place(tl.program_id(0) * WORDS, total, K, width, WORDS)
    kept = _bits_of(tl.load(bits + word, mask=word < total, other=0))
    value = _tile(grad, start, inside).to(WORK)
    factor = None
    if counts is not None:
        factor = _factor(counts, weights, PARTS).to(WORK)
    if weight_grad is not None:
        _store_tile(weight_grad, start, _effective(value, kept, scores, start, inside, factor, SIGNED), inside)
    if score_grad is not None:
        value *= _tile(weight, start, inside).to(WORK)
        if counts is not None:
            value *= factor
        if dots is not None:
            ones = _sum_of(counts, PARTS).to(WORK)
            value -= _sum_of(dots, PARTS) * factor / ones
        if SLOPE != "one":
            s = _tile(scores, start, inside).to(WORK)
            if SLOPE == "sign":
                value = tl.where(s > 0, value, tl.where(s < 0, -value, value * s))
            else:
                e = tl.exp(-tl.abs(s))
                value *= e / ((1 + e) * (1 + e))
        _store_tile(score_grad, start, value, inside)


def mask_gradients(
    grad: Tensor,
    weight: Tensor,
    bits: Tensor,
    scores: Tensor | None,
    slope: str,
    signed: bool,
    rescale: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The op fourfold::_mask_gradients for CUDA tensors: gradients of weight and scores as wanted, the others empty."""
    op = "_mask_gradients"
    _check_mask(op, weight, bits, scores, signed, rescale)
    _check_floating(op, grad=grad)
    _check_shape(op, "grad", grad, weight.shape, weight.device)
    _require(slope in ("sigmoid", "sign", "one"), f"{op}: slope must be 'sigmoid', 'sign' or 'one', got {slope!r}")
    of_weight = torch.empty(weight.shape if wanted[0] else (0,), dtype=weight.dtype, device=weight.device)
    of_scores = of_weight.new_empty((0,))
    if wanted[1] and scores is not None:
        of_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    if of_weight.numel() == 0 and of_scores.numel() == 0:
        return of_weight, of_scores
    words = _words(bits)
    grid, sizes = _tiles(words, _rows(weight)[1])
    grad, weight = grad.contiguous(), weight.contiguous()
    scores = None if scores is None else scores.contiguous()
    work = _work(weight.dtype, weight.dtype if scores is None else scores.dtype)
    counts = _counts(words) if rescale else None
    dots = None
    with torch.cuda.device_of(weight):
        if rescale == "dwr_grad" and of_scores.numel() > 0:
            dots = torch.empty(PARTS, dtype=torch.float64 if work == tl.float64 else torch.float32, device=weight.device)
            _kept_dot_kernel[(PARTS,)](grad, weight, words, dots, *sizes, WORK=work, WORDS=WORDS, **OPTIONS)
        _mask_gradients_kernel[grid](
            grad,
            weight,
            words,
            scores,
            counts,
            dots,
            of_weight if of_weight.numel() > 0 else None,
            of_scores if of_scores.numel() > 0 else None,
            weight.numel(),
            *sizes,
            SLOPE=slope,
            SIGNED=signed,
            WORK=work,
            PARTS=PARTS,
            WORDS=WORDS,
            **OPTIONS,
        )
    return of_weight, of_scores


# ---- products with masked weights ------------------------------------------------------------------------------------


@triton.jit
def _masked_tile(
    weight, bits, scores, factor, first_n, first_k, n, k, N, K, width,
    SIGNED: tl.constexpr,
    WORK: tl.constexpr,
):  # fmt: skip
    """Effective weights of rows first_n + n [.., 1] and columns first_k + k [1, ..], in the type that is computed in."""
    inside = (first_n + n < N) & (first_k + k < K)
    column = first_k + k
    row = tl.full([], 0, tl.int64) + first_n
    word = tl.load(bits + row * width + (n * width + column // 32), mask=inside, other=0)
    kept = (word >> (column % 32)) & 1 != 0
    place = n * K + column
    value = tl.load(weight + row * K + place, mask=kept, other=0).to(WORK)
    if factor is not None:
        value *= factor
    if SIGNED:
        value = tl.where(tl.load(scores + row * K + place, mask=kept, other=0) < 0, -value, value)
    return value


@triton.jit
def _masked_product_kernel(
    x,  # [B, M, K], or the gradient [B, M, N] if TRANSPOSED
    weight,  # [N, K]
    bits,  # words [N, width], or [tasks, N, width]
    task,  # [B], or None
    scores,  # or None
    counts,  # [PARTS], or None without rescaling
    bias,  # [N], or None
    out,  # [B, M, N], or [B, M, K] if TRANSPOSED; with splits one of these each, one after the other
    weights,  # N * K
    M, N, K, width, tasks, tiles,  # tiles: of BLOCK_M rows
    share,  # of the axis that is summed over, for each split
    TRANSPOSED: tl.constexpr,
    SIGNED: tl.constexpr,
    FACTOR: tl.constexpr,  # the type that x and effective weights are multiplied in
    WORK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACROSS: tl.constexpr,
    ALONG: tl.constexpr,
):  # fmt: skip
    """Weights go dense into a tile, its bits beside them, and meet before the product."""
    batch = (tl.program_id(2) // tiles).to(tl.int64)
    first_m = tl.program_id(2) % tiles * BLOCK_M
    near = tl.arange(0, BLOCK_M)[:, None]
    m = first_m + near
    known = True
    if task is not None:
        number = tl.load(task + batch)
        known = (number >= 0) & (number < tasks)
        bits += tl.where(known, number, 0) * width * N
    # A weight of another type than x is rounded to x's once it is effective; one of the same is not rounded before the end.
    factor = None
    if counts is not None and weight.dtype != x.dtype:
        factor = _factor(counts, weights, PARTS).to(WORK)
    first = tl.program_id(0) * ACROSS
    across, along = tl.arange(0, ACROSS), tl.arange(0, ALONG)
    total = tl.zeros([BLOCK_M, ACROSS], dtype=WORK)
    summed, columns = (N, K) if TRANSPOSED else (K, N)
    x += (batch * M + first_m) * summed
    begin = tl.program_id(1) * share
    for at in range(begin, tl.minimum(begin + share, summed), ALONG):
        place = (at + along)[None, :]
        part = tl.load(x + (near * summed + place), mask=(m < M) & (place < summed), other=0)
        if TRANSPOSED:
            tile = _masked_tile(
                weight, bits, scores, factor, at, first, along[:, None], across[None, :], N, K, width, SIGNED, WORK
            ).to(part.dtype)
        else:
            tile = _masked_tile(
                weight, bits, scores, factor, first, at, across[:, None], along[None, :], N, K, width, SIGNED, WORK
            ).to(part.dtype)
            tile = tl.trans(tile)
        total = tl.dot(part.to(FACTOR), tile.to(FACTOR), total, input_precision="ieee", out_dtype=WORK)
    if counts is not None and weight.dtype == x.dtype:
        total *= _factor(counts, weights, PARTS).to(WORK)
    column = (first + across)[None, :]
    if bias is not None:
        total += tl.load(bias + column, mask=column < columns, other=0).to(WORK)
    if task is not None:
        total = tl.where(known, total, float("nan"))
    rows = (tl.program_id(1) * (tl.num_programs(2) // tiles) + batch) * M + m
    tl.store(out + rows * columns + column, total.to(out.dtype.element_ty), mask=(m < M) & (column < columns))


@triton.jit
def _add_splits_kernel(
    parts,  # [splits, size]
    counts,  # [PARTS], or None without rescaling
    bias,  # [columns], or None
    out,  # [size]
    weights,  # N * K
    splits,
    size,
    columns,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the sum of parts in their order, times n / ones, plus bias."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros([BLOCK], dtype=parts.dtype.element_ty)
    for _ in range(splits):
        total += tl.load(parts + place, mask=inside, other=0)
        parts += size
    if counts is not None:
        total *= _factor(counts, weights, PARTS).to(total.dtype)
    if bias is not None:
        total += tl.load(bias + place % columns, mask=inside, other=0).to(total.dtype)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def _add_splits(parts: Tensor, counts: Tensor | None, bias: Tensor | None, out: Tensor, weights: int) -> None:
    """out [.., columns] from parts [splits, *out.shape]."""
    with torch.cuda.device_of(out):
        _add_splits_kernel[(triton.cdiv(out.numel(), 512),)](
            parts,
            counts,
            bias,
            out,
            weights,
            parts.shape[0],
            out.numel(),
            out.shape[-1],
            PARTS=PARTS,
            BLOCK=512,
            **OPTIONS,
        )


def _masked_product(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    task: Tensor | None,
    scores: Tensor | None,
    counts: Tensor | None,
    bias: Tensor | None,
    signed: bool,
    transposed: bool,
) -> Tensor:
    """x [B, M, K] times the effective weight's transpose, or x [B, M, N] times the effective weight; in x's dtype."""
    (batch, m, summed), (n, k) = x.shape, weight.shape
    columns = k if transposed else n
    out = torch.empty(batch, m, columns, dtype=x.dtype, device=x.device)
    block_m, along = min(max(16, triton.next_power_of_2(m)), 64), _along(x.dtype)
    tiles = triton.cdiv(m, block_m)
    across, down = triton.cdiv(columns, ACROSS), batch * tiles
    splits = max(1, min(triton.cdiv(ENOUGH, across * down), triton.cdiv(summed, 4 * along)))
    share = triton.cdiv(triton.cdiv(summed, splits), along) * along
    splits = triton.cdiv(summed, share)
    work = _work(x.dtype, weight.dtype)
    parts = out
    if splits > 1:
        parts = torch.empty(splits, *out.shape, dtype=torch.float64 if work == tl.float64 else torch.float32, device=x.device)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        _masked_product_kernel[across, splits, down](
            x.contiguous(),
            weight.contiguous(),
            _words(bits),
            task,
            scores.contiguous() if scores is not None and signed else None,
            counts,
            bias if splits == 1 else None,
            parts,
            n * k,
            m,
            n,
            k,
            _row_words(k),
            1 if task is None else bits.shape[0],
            tiles,
            share,
            TRANSPOSED=transposed,
            SIGNED=signed,
            FACTOR=_factor_type(x.dtype),
            WORK=work,
            PARTS=PARTS,
            BLOCK_M=block_m,
            ACROSS=ACROSS,
            ALONG=along,
            **PRODUCT,
        )
    if splits > 1:
        _add_splits(parts, None, bias, out, n * k)
    return out


def _factor_type(dtype: torch.dtype) -> tl.dtype:
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
    return types[dtype]


def _along(dtype: torch.dtype) -> int:
    """How much of the axis that is summed over a tile holds; tensor cores need few registers for it."""
    return 64 if dtype.itemsize == 2 else 16


def _is_fused(x: Tensor, weight: Tensor) -> bool:
    """Whether x [M, ..] is so small that weights are masked on their way into the product; places in a tile have 31 bits."""
    return (
        0 < x.shape[0] <= FUSED_ROWS[x.dtype]
        and weight.dtype != torch.float64
        and weight.numel() > 0
        and max(weight.shape) < 2**24
    )


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    slope: str,
    signed: bool,
    rescale: str,
) -> Tensor:
    """The op fourfold::_masked_linear for CUDA tensors: x [.., K] times the effective weight [N, K], in x's dtype."""
    op = "_masked_linear"
    _check_mask(op, weight, bits, scores, signed, rescale)
    _check_floating(op, x=x, bias=bias)
    _require(weight.dim() == 2, f"{op}: weight must be [N, K], got {tuple(weight.shape)}")
    n, k = weight.shape
    _check_shape(op, "x", x, (*x.shape[:-1], k), weight.device)
    _check_shape(op, "bias", bias, (n,), weight.device)
    _require(bias is None or bias.dtype == x.dtype, f"{op}: bias must be {x.dtype}")
    flat = x.reshape(-1, k)
    if _is_fused(flat, weight):
        counts = _counts(_words(bits)) if rescale else None
        y = _masked_product(flat[None], weight, bits, None, scores, counts, bias, signed, False)
    else:
        y = _dense_product(flat, weight, bits, scores, signed, rescale, bias, False)
    return y.view(*x.shape[:-1], n)


def _dense_product(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    scores: Tensor | None,
    signed: bool,
    rescale: str,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """x [M, K] times the effective weight's transpose plus bias, or x [M, N] times the effective weight, by the vendor."""
    if not rescale or x.dtype != weight.dtype or x.dtype.itemsize > 2:
        effective = apply_mask(weight, bits, scores, signed, rescale, x.dtype)
        return x @ effective if transposed else torch.nn.functional.linear(x, effective, bias)
    # A rescaled weight is no number of its 16-bit type: the product is rescaled instead, before it is rounded.
    effective = apply_mask(weight, bits, scores, signed, "", x.dtype)
    wide = _wide_product(x, effective if transposed else effective.mT)
    out = torch.empty(wide.shape, dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        _add_splits(wide[None], _counts(_words(bits)), bias, out, weight.numel())
    return out


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of 16-bit ones in float32: what follows rounds once."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda" and a.numel() > 0 and b.numel() > 0:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def masked_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    scores: Tensor | None,
    slope: str,
    signed: bool,
    rescale: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The op fourfold::_masked_linear_backward for CUDA tensors: gradients of x, weight and scores as wanted."""
    op = "_masked_linear_backward"
    _check_mask(op, weight, bits, scores, signed, rescale)
    _check_floating(op, grad=grad, x=x)
    _require(weight.dim() == 2, f"{op}: weight must be [N, K], got {tuple(weight.shape)}")
    n, k = weight.shape
    _check_shape(op, "x", x, (*x.shape[:-1], k), weight.device)
    _check_shape(op, "grad", grad, (*x.shape[:-1], n), weight.device)
    _require(grad.dtype == x.dtype, f"{op}: grad must be {x.dtype}, got {grad.dtype}")
    flat_grad, flat_x = grad.reshape(-1, n), x.reshape(-1, k)
    of_x = x.new_empty((0,))
    if wanted[0] and not _is_fused(flat_grad, weight):
        of_x = _dense_product(flat_grad, weight, bits, scores, signed, rescale, None, True).view(x.shape)
    elif wanted[0]:
        counts = _counts(_words(bits)) if rescale else None
        of_x = _masked_product(flat_grad[None], weight, bits, None, scores, counts, None, signed, True).view(x.shape)
    of_weight, of_scores = weight.new_empty((0,)), weight.new_empty((0,))
    if wanted[1] or wanted[2]:
        effective_grad = _wide_product(flat_grad.mT, flat_x)
        of_weight, of_scores = mask_gradients(
            effective_grad, weight, bits, scores, slope, signed, rescale, [wanted[1], wanted[2]]
        )
    return of_x, of_weight, of_scores


# ---- dot products at the bits of a mask ------------------------------------------------------------------------------


@triton.jit
def _sddmm_kernel(
    a,  # [N, D]
    b,  # [K, D]
    bits,
    starts,  # [N * width / 2 + 1]: where the values of each 64-bit word begin
    values,
    N, K, D, width, length,  # length: of values
    FACTOR: tl.constexpr,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A dense tile of products, of which only what the mask keeps leaves the multiprocessor."""
    near = tl.arange(0, BLOCK)
    first_n, first_k = (tl.program_id(0) * BLOCK).to(tl.int64), (tl.program_id(1) * BLOCK).to(tl.int64)
    n, k = first_n + near, first_k + near
    a += first_n * D
    b += first_k * D
    total = tl.zeros([BLOCK, BLOCK], dtype=WORK)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        rows = tl.load(a + (near[:, None] * D + d[None, :]), mask=(n < N)[:, None] & (d < D)[None, :], other=0)
        columns = tl.load(b + (near[:, None] * D + d[None, :]), mask=(k < K)[:, None] & (d < D)[None, :], other=0)
        total = tl.dot(rows.to(FACTOR), tl.trans(columns).to(FACTOR), total, input_precision="ieee", out_dtype=WORK)
    # BLOCK is 64: one word of the format a row, in two halves.
    here = n * width + tl.program_id(1) * 2
    low = tl.load(bits + here, mask=n < N, other=0)[:, None]
    high = tl.load(bits + here + 1, mask=n < N, other=0)[:, None]
    begin = tl.load(starts + here // 2, mask=n < N, other=0)[:, None]
    lane = near[None, :]
    near = lane & 31
    word = tl.where(lane < 32, low, high)
    before = _ones_in(word & ((1 << near) - 1)) + tl.where(lane < 32, 0, _ones_in(low))
    kept = ((word >> near) & 1 != 0) & (begin + before < length)
    tl.store(values + begin + before, total.to(values.dtype.element_ty), mask=kept)


def sddmm(a: Tensor, b: Tensor, bits: Tensor, nnz: int) -> Tensor:
    """The op fourfold::sddmm for CUDA tensors: values [nnz] = <a[n], b[k]> at the set bits, row-major. a [N, D], b [K, D]."""
    op = "sddmm"
    _check_floating(op, a=a, b=b)
    ok = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[1] and a.dtype == b.dtype and a.device == b.device
    _require(ok, f"{op}: a [N, D] and b [K, D] of one dtype needed, got {a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}")
    (n, d), k = a.shape, b.shape[0]
    _check_bits(op, "bits", bits, (n,), k, a.device)
    _require(d < 2**24, f"{op}: D must be below 2**24, got {d}")
    _require(0 <= nnz <= n * k, f"{op}: nnz must lie in 0..{n * k}, got {nnz}")
    values = a.new_zeros((nnz,))
    if nnz > 0:
        starts = torch.ops.fourfold._mask_starts(bits, k, 64)
        grid = (triton.cdiv(n, BLOCK), triton.cdiv(k, BLOCK))
        with torch.cuda.device_of(a):
            _sddmm_kernel[grid](
                a.contiguous(),
                b.contiguous(),
                _words(bits),
                starts,
                values,
                n,
                k,
                d,
                _row_words(k),
                nnz,
                FACTOR=_factor_type(a.dtype),
                WORK=_work(a.dtype),
                BLOCK=BLOCK,
                BLOCK_D=_along(a.dtype),
                **PRODUCT,
            )
    return values


# ---- superposed masks ------------------------------------------------------------------------------------------------


@triton.jit
def _superpose_kernel(
    weight,
    masks,  # words [T, N, width]
    alpha,  # [T]
    out,
    count,  # T
    total,
    K,
    width,
    WORK: tl.constexpr,
    MASKS: tl.constexpr,
    WORDS: tl.constexpr,
):
    word, start, inside = _place(tl.program_id(0) * WORDS, total, K, width, WORDS)
    result = tl.zeros([WORDS, 32], dtype=WORK)
    bank = masks + word
    end = tl.full([], 0, tl.int32) + count
    for first in range(0, count, MASKS):
        for i in tl.static_range(MASKS):
            known = first + i < end
            share = tl.load(alpha + first + i, mask=known, other=0).to(WORK)
            bits = tl.load(bank, mask=word < tl.where(known, total, 0), other=0)
            bank += total
            result += tl.where(_bits_of(bits), share, 0.0)
    _store_tile(out, start, result * _tile(weight, start, inside).to(WORK), inside)


def superpose(weight: Tensor, masks: Tensor, alpha: Tensor) -> Tensor:
    """The op fourfold::_superpose for CUDA tensors: weight times the sum of alpha[t] * mask t, in weight's dtype."""
    op = "_superpose"
    _check_bank(op, weight, masks)
    _check_floating(op, alpha=alpha)
    _check_shape(op, "alpha", alpha, masks.shape[:1], weight.device)
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if out.numel() > 0:
        words, k = _words(masks), _rows(weight)[1]
        total = weight.shape[0] * _row_words(k)
        with torch.cuda.device_of(weight):
            _superpose_kernel[(triton.cdiv(total, BANK_WORDS),)](
                weight.contiguous(),
                words,
                alpha.contiguous(),
                out,
                masks.shape[0],
                total,
                k,
                _row_words(k),
                WORK=_work(weight.dtype, alpha.dtype),
                MASKS=MASKS,
                WORDS=BANK_WORDS,
                **OPTIONS,
            )
    return out


def _check_bank(op: str, weight: Tensor, masks: Tensor) -> None:
    _check_floating(op, weight=weight)
    _check_rows(op, "weight", weight)
    n, k = _rows(weight)
    _require(masks.dim() == 3, f"{op}: masks must be [T, {n}, {4 * _row_words(k)}], got {tuple(masks.shape)}")
    _check_bits(op, "masks", masks, (masks.shape[0], n), k, weight.device)


@triton.jit
def _masked_dots_kernel(
    a,
    b,
    masks,  # words [T, N, width]
    partial,  # [tiles, T]
    count,  # T
    total,
    K,
    width,
    share,  # masks for each program
    WORK: tl.constexpr,
    MASKS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """What one tile adds to the dots of a share of the masks."""
    word, start, inside = _place(tl.program_id(0) * WORDS, total, K, width, WORDS)
    product = _tile(a, start, inside).to(WORK) * _tile(b, start, inside).to(WORK)
    begin = tl.program_id(1) * share
    for first in range(begin, tl.minimum(begin + share, count), MASKS):
        t = first + tl.arange(0, MASKS)
        known = (t < count)[:, None] & (word < total)[None, :]
        bits = tl.load(masks + t.to(tl.int64)[:, None] * total + word[None, :], mask=known, other=0)
        dots = tl.sum(tl.sum(tl.where(_bits_of(bits), product[None, :, :], 0.0), 2), 1)
        tl.store(partial + tl.program_id(0).to(tl.int64) * count + t, dots, mask=(t < count) & (t < begin + share))


def masked_dots(a: Tensor, b: Tensor, masks: Tensor) -> Tensor:
    """The op fourfold::_masked_dots for CUDA tensors: [T], the sum of a * b over each mask, float32 or float64."""
    op = "_masked_dots"
    _check_bank(op, a, masks)
    _check_floating(op, b=b)
    _check_shape(op, "b", b, a.shape, a.device)
    work = _work(a.dtype, b.dtype)
    dtype = torch.float64 if work == tl.float64 else torch.float32
    if a.numel() == 0 or masks.shape[0] == 0:
        return torch.zeros(masks.shape[0], dtype=dtype, device=a.device)
    count, k = masks.shape[0], _rows(a)[1]
    total = a.shape[0] * _row_words(k)
    tiles = triton.cdiv(total, BANK_WORDS)
    share = triton.cdiv(triton.cdiv(count, triton.cdiv(ENOUGH, tiles)), MASKS) * MASKS
    partial = torch.empty(tiles, count, dtype=dtype, device=a.device)
    with torch.cuda.device_of(a):
        _masked_dots_kernel[tiles, triton.cdiv(count, share)](
            a.contiguous(),
            b.contiguous(),
            _words(masks),
            partial,
            count,
            total,
            k,
            _row_words(k),
            share,
            WORK=work,
            MASKS=MASKS,
            WORDS=BANK_WORDS,
            **OPTIONS,
        )
    return partial.sum(0)


# ---- a mask for each sample ------------------------------------------------------------------------------------------


@triton.jit
def _kept_by_task(masks, number, known, n, k, N, K, width):
    """Which weights the masks number [samples] keep, [samples, rows, columns]; n [rows], k [columns]."""
    place = n.to(tl.int64)[None, :, None] * width + (k // 32)[None, None, :]
    inside = known[:, None, None] & (n < N)[None, :, None] & (k < K)[None, None, :]
    word = tl.load(masks + number[:, None, None] * width * N + place, mask=inside, other=0)
    return (word >> (k % 32)[None, None, :]) & 1 != 0


@triton.jit
def _numbers(task, row, rows, per_task, tasks):
    """The tasks of rows, 0 where there is none, and whether there is one."""
    number = tl.load(task + row // per_task, mask=row < rows, other=-1)
    known = (number >= 0) & (number < tasks)
    return tl.where(known, number, 0), known


@triton.jit
def _task_rows_kernel(
    x,  # [rows, K], or the gradient [rows, N] if TRANSPOSED
    weight,
    masks,  # words [tasks, N, width]
    task,  # [rows / per_task]
    bias,  # [N], or None
    out,  # [rows, N], or [rows, K] if TRANSPOSED
    rows, per_task, tasks, N, K, width,
    TRANSPOSED: tl.constexpr,
    WORK: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each of SAMPLES rows of x has its own mask; the weights are read once for all of them."""
    row = tl.program_id(1) * SAMPLES + tl.arange(0, SAMPLES)
    number, known = _numbers(task, row, rows, per_task, tasks)
    here = (row < rows)[:, None]
    wide = row.to(tl.int64)[:, None]
    if TRANSPOSED:
        k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([SAMPLES, COLUMNS], dtype=WORK)
        for first in range(0, N, ROWS):
            n = first + tl.arange(0, ROWS)
            inside = (n < N)[:, None] & (k < K)[None, :]
            value = tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0).to(WORK)
            kept = _kept_by_task(masks, number, known, n, k, N, K, width)
            factor = tl.load(x + wide * N + n[None, :], mask=here & (n < N)[None, :], other=0).to(WORK)
            total += tl.sum(tl.where(kept, value[None], 0.0) * factor[:, :, None], 1)
        place, inside = wide * K + k[None, :], here & (k < K)[None, :]
    else:
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        total = tl.zeros([SAMPLES, ROWS], dtype=WORK)
        for first in range(0, K, COLUMNS):
            k = first + tl.arange(0, COLUMNS)
            inside = (n < N)[:, None] & (k < K)[None, :]
            value = tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0).to(WORK)
            kept = _kept_by_task(masks, number, known, n, k, N, K, width)
            factor = tl.load(x + wide * K + k[None, :], mask=here & (k < K)[None, :], other=0).to(WORK)
            total += tl.sum(tl.where(kept, value[None], 0.0) * factor[:, None, :], 2)
        if bias is not None:
            total += tl.load(bias + n, mask=n < N, other=0).to(WORK)[None, :]
        place, inside = wide * N + n[None, :], here & (n < N)[None, :]
    total = tl.where(known[:, None], total, float("nan"))
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def _task_product(
    op: str, x: Tensor, weight: Tensor, masks: Tensor, task: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """Each sample of x times its own masked weight; NaN for one whose task there is not."""
    _check_bank(op, weight, masks)
    _check_floating(op, x=x, bias=bias)
    _require(weight.dim() == 2, f"{op}: weight must be [N, K], got {tuple(weight.shape)}")
    n, k = weight.shape
    name, (summed, columns) = ("grad", (n, k)) if transposed else ("x", (k, n))
    _require(x.dim() >= 2, f"{op}: {name} must be [B, .., {summed}], got {tuple(x.shape)}")
    _check_shape(op, name, x, (*x.shape[:-1], summed), weight.device)
    _check_task(op, task, x)
    _check_shape(op, "bias", bias, (n,), weight.device)
    batch, lead = x.shape[0], x.shape[:-1]
    rows = math.prod(lead)
    if rows == 0 or columns == 0:
        return x.new_empty((*lead, columns))
    per_task = rows // batch
    if per_task >= 8 and torch.float64 not in (x.dtype, weight.dtype) and 0 < max(weight.shape) < 2**24:
        stacked = x.reshape(batch, per_task, summed)
        return _masked_product(stacked, weight, masks, task, None, None, bias, False, transposed).view(*lead, columns)
    out = torch.empty(*lead, columns, dtype=x.dtype, device=x.device)
    work = _work(x.dtype, weight.dtype)
    grid = (triton.cdiv(columns, TASK_COLUMNS if transposed else TASK_ROWS), triton.cdiv(rows, _samples(work)))
    with torch.cuda.device_of(x):
        _task_rows_kernel[grid](
            x.contiguous(),
            weight.contiguous(),
            _words(masks),
            task.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            rows,
            per_task,
            masks.shape[0],
            n,
            k,
            _row_words(k),
            TRANSPOSED=transposed,
            WORK=work,
            SAMPLES=_samples(work),
            ROWS=TASK_ROWS,
            COLUMNS=TASK_COLUMNS,
            **OPTIONS,
        )
    return out


def _samples(work: tl.dtype) -> int:
    """Samples that share one reading of a tile of weights."""
    return 2 if work == tl.float64 else 4


def _check_task(op: str, task: Tensor, x: Tensor) -> None:
    ok = task.dtype == torch.int64 and tuple(task.shape) == (x.shape[0],) and task.device == x.device
    what = f"{task.dtype} {tuple(task.shape)} on {task.device}"
    _require(ok, f"{op}: task must be int64 ({x.shape[0]},) on {x.device}, got {what}")


def task_linear(x: Tensor, weight: Tensor, masks: Tensor, task: Tensor, bias: Tensor | None) -> Tensor:
    """The op fourfold::task_linear for CUDA tensors: x [B, .., K] -> [B, .., N], sample b with mask task[b]."""
    return _task_product("task_linear", x, weight, masks, task, bias, False)


def task_linear_transposed(grad: Tensor, weight: Tensor, masks: Tensor, task: Tensor) -> Tensor:
    """The op fourfold::_task_linear_transposed for CUDA tensors: grad [B, .., N] -> [B, .., K]."""
    return _task_product("_task_linear_transposed", grad, weight, masks, task, None, True)


@triton.jit
def _task_outer_kernel(
    grad,  # [rows, N]
    x,  # [rows, K]
    masks,  # words [tasks, N, width]
    task,
    out,  # [N, K]
    rows, per_task, tasks, N, K, width,
    WORK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (k < K)[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=WORK)
    place = n.to(tl.int64)[:, None] * width + (k // 32)[None, :]
    for row in range(rows):
        number = tl.load(task + row // per_task)
        known = (number >= 0) & (number < tasks)
        words = masks + tl.where(known, number, 0) * width * N
        kept = (tl.load(words + place, mask=inside, other=0) >> (k % 32)[None, :]) & 1 != 0
        wide = tl.full([], 0, tl.int64) + row
        product = (
            tl.load(grad + wide * N + n, mask=n < N, other=0).to(WORK)[:, None]
            * tl.load(x + wide * K + k, mask=k < K, other=0).to(WORK)[None, :]
        )
        total += tl.where(known, tl.where(kept, product, 0.0), float("nan"))
    tl.store(out + n.to(tl.int64)[:, None] * K + k[None, :], total.to(out.dtype.element_ty), mask=inside)


def task_outer(grad: Tensor, x: Tensor, masks: Tensor, task: Tensor) -> Tensor:
    """The op fourfold::_task_outer for CUDA tensors: [N, K], the sum over samples of grad's and x's outer product, masked."""
    op = "_task_outer"
    _check_floating(op, grad=grad, x=x)
    _require(x.dim() >= 2, f"{op}: x must be [B, .., K], got {tuple(x.shape)}")
    k, n = x.shape[-1], grad.shape[-1]
    _check_shape(op, "grad", grad, (*x.shape[:-1], n), x.device)
    _require(masks.dim() == 3, f"{op}: masks must be [T, {n}, {4 * _row_words(k)}], got {tuple(masks.shape)}")
    _check_bits(op, "masks", masks, (masks.shape[0], n), k, x.device)
    _check_task(op, task, x)
    rows = math.prod(x.shape[:-1])
    if rows == 0:
        return x.new_zeros((n, k))
    out = x.new_empty((n, k))
    if out.numel() > 0:
        grid = (triton.cdiv(n, TASK_ROWS), triton.cdiv(k, TASK_COLUMNS))
        with torch.cuda.device_of(x):
            _task_outer_kernel[grid](
                grad.contiguous(),
                x.contiguous(),
                _words(masks),
                task.contiguous(),
                out,
                rows,
                rows // x.shape[0],
                masks.shape[0],
                n,
                k,
                _row_words(k),
                WORK=_work(grad.dtype, x.dtype),
                ROWS=TASK_ROWS,
                COLUMNS=TASK_COLUMNS,
                **OPTIONS,
            )
    return out


# ---- for CI ----------------------------------------------------------------------------------------------------------

_BITS = ("bits", "masks")
_WIDE = {"seed": "*i64", "counts": "*i64", "starts": "*i64", "task": "*i64", "threshold": "i64", "offset": "i64"}


def _compiled(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], options: dict[str, Any], absent: str = ""
) -> tuple[Any, ...]:
    """Arguments that nothing is said of are 32-bit sizes; those in absent are None."""
    constants = {**constants, **dict.fromkeys(absent.split())}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    known = {**dict.fromkeys(_BITS, "*i32"), **_WIDE, **pointers}
    signature = {name: known.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return kernel, signature, constants, options


def _compiled_for(dtype: str, work: str) -> list[tuple[Any, ...]]:
    """The kernels for weights, x and results of one type."""
    of_type = ("scores", "weight", "grad", "weight_grad", "score_grad", "x", "a", "b", "bias", "values", "out")
    pointers = {**dict.fromkeys(of_type, dtype), **dict.fromkeys(("dots", "partial", "parts"), work), "alpha": work}
    types = {"*fp16": tl.float16, "*bf16": tl.bfloat16, "*fp32": tl.float32, "*fp64": tl.float64}
    usual: dict[str, Any] = {
        "FACTOR": types[dtype],
        "WORK": tl.float64 if work == "*fp64" else tl.float32,
        "PARTS": PARTS,
        "WORDS": WORDS,
    }
    bank = {**usual, "WORDS": BANK_WORDS, "MASKS": MASKS}
    tasks = {**usual, "SAMPLES": _samples(usual["WORK"]), "ROWS": TASK_ROWS, "COLUMNS": TASK_COLUMNS}
    along = 64 if dtype[-2:] == "16" else 16
    product = {**usual, "ACROSS": ACROSS, "ALONG": along, "BLOCK_M": 64 if dtype[-2:] == "16" else 32}
    every = [
        _compiled(_threshold_mask_kernel, pointers, usual, EXACT),
        *(_compiled(_bernoulli_mask_kernel, pointers, {**usual, "ALIGNED": aligned}, EXACT) for aligned in (True, False)),
        _compiled(_apply_mask_kernel, pointers, {**usual, "SIGNED": True}, OPTIONS),
        _compiled(_apply_mask_kernel, pointers, {**usual, "SIGNED": False}, OPTIONS, "scores counts"),
        _compiled(_kept_dot_kernel, pointers, usual, OPTIONS),
        _compiled(_mask_gradients_kernel, pointers, {**usual, "SLOPE": "sigmoid", "SIGNED": False}, OPTIONS),
        _compiled(_mask_gradients_kernel, pointers, {**usual, "SLOPE": "sign", "SIGNED": True}, OPTIONS, "dots"),
        _compiled(_superpose_kernel, pointers, bank, OPTIONS),
        _compiled(_masked_dots_kernel, pointers, bank, OPTIONS),
        *(_compiled(_task_rows_kernel, pointers, {**tasks, "TRANSPOSED": way}, OPTIONS) for way in (False, True)),
        _compiled(_task_outer_kernel, pointers, tasks, OPTIONS),
        _compiled(_sddmm_kernel, pointers, {**usual, "BLOCK": BLOCK, "BLOCK_D": along}, PRODUCT),
        _compiled(_add_splits_kernel, pointers, {**usual, "BLOCK": 512}, OPTIONS),
    ]
    if dtype != "*fp64":
        split = {**pointers, "out": work}
        none = "task scores counts bias"
        for way in (False, True):
            constants = {**product, "TRANSPOSED": way}
            every += [
                _compiled(_masked_product_kernel, split, {**constants, "SIGNED": False}, PRODUCT, none),
                _compiled(_masked_product_kernel, pointers, {**constants, "SIGNED": True}, PRODUCT),
            ]
    return every


#: (kernel, signature, constants, options): what CI compiles for every supported architecture.
COMPILED = [
    _compiled(_pack_mask_kernel, {"mask": "*u8"}, {"WORDS": WORDS}, OPTIONS),
    _compiled(_unpack_mask_kernel, {"mask": "*u8"}, {"WORDS": WORDS}, OPTIONS),
    _compiled(_count_kernel, {}, {"WORDS": 1024}, OPTIONS),
    *_compiled_for("*fp32", "*fp32"),
    *_compiled_for("*bf16", "*fp32"),
    *_compiled_for("*fp16", "*fp32"),
    *_compiled_for("*fp64", "*fp64"),
]
