"""dct_normalize in Triton: quantised JPEG coefficients to network inputs in one pass."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Blocks per program: 64 blocks of 64 coefficients are 32 values a thread, and a full line of memory in either layout.
BLOCKS = 64
# Fused multiply-adds would round once where the reference rounds twice.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
WORDS = [f"freqs{i}" for i in range(8)]


@triton.jit(do_not_specialize=WORDS)
def _dct_normalize_kernel(
    coefs,  # int16 [L, blocks, 64]
    qtable,  # [G, 64]
    mean,  # [F] or None
    std,  # [F] or None
    out,  # [L, F, blocks] if PLANAR else [L, blocks, F]
    blocks,
    tiles,  # programs per image plane
    planes_per_table,  # L / G
    freqs0,  # eight frequencies each, see _packed; a table in memory would have to be copied there first
    freqs1,
    freqs2,
    freqs3,
    freqs4,
    freqs5,
    freqs6,
    freqs7,
    F: tl.constexpr,
    CHOSEN: tl.constexpr,  # False: all 64 frequencies in order
    SLOTS: tl.constexpr,  # F rounded up to a power of two
    BLOCKS: tl.constexpr,
    PLANAR: tl.constexpr,
):
    """(coefs * qtable - mean) / std over one tile of one plane, each step rounded on its own as in the reference."""
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * BLOCKS
    block = tl.arange(0, BLOCKS)
    slot = tl.arange(0, SLOTS)
    kept = slot < F
    inside = (first + block < blocks)[:, None] & kept[None, :]

    freq = slot
    if CHOSEN:
        low = tl.where(slot < 16, tl.where(slot < 8, freqs0, freqs1), tl.where(slot < 24, freqs2, freqs3))
        high = tl.where(slot < 48, tl.where(slot < 40, freqs4, freqs5), tl.where(slot < 56, freqs6, freqs7))
        freq = ((tl.where(slot < 32, low, high) >> (slot % 8 * 8)) & 63).to(tl.int32)
    table = tl.load(qtable + plane // planes_per_table * 64 + freq, mask=kept, other=0)
    tile = coefs + (plane * blocks + first) * 64
    value = tl.load(tile + block[:, None] * 64 + freq[None, :], mask=inside, other=0).to(table.dtype) * table[None, :]
    if mean is not None:
        value -= tl.load(mean + slot, mask=kept, other=0)[None, :]
    if std is not None:
        divisor = tl.load(std + slot, mask=kept, other=1)[None, :]
        # In float32 a plain division is an approximation.
        value = value / divisor if table.dtype == tl.float64 else tl.div_rn(value, divisor)

    if PLANAR:
        row = (plane * F + slot) * blocks + first
        place = row[None, :] + block[:, None]
    else:
        place = (plane * blocks + first) * F + (block[:, None] * F + slot[None, :])
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def dct_normalize(
    coefs: Tensor,
    qtable: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    freqs: Sequence[int] | None,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """The op fourfold::dct_normalize for CUDA tensors.

    coefs int16 [.., h, w, 64]; qtable [G, 64] with G a divisor of the leading size; mean, std [F]; these three float32,
    or float64 where dtype is float64. Returns [.., F, h, w] (layout "planar") or [.., h, w, F] ("blocks").
    """
    _check(coefs, qtable, mean, std, freqs, layout, dtype)
    *lead, h, w, _ = coefs.shape
    f = 64 if freqs is None else len(freqs)
    planar = layout == "planar"
    out = torch.empty(
        (*lead, f, h, w) if planar else (*lead, h, w, f),
        dtype=dtype,
        device=coefs.device,
    )
    if out.numel() == 0:
        return out
    planes, tiles = math.prod(lead), triton.cdiv(h * w, BLOCKS)
    with torch.cuda.device_of(coefs):
        _dct_normalize_kernel[(planes * tiles,)](
            coefs.contiguous(),
            qtable.contiguous(),
            None if mean is None else mean.contiguous(),
            None if std is None else std.contiguous(),
            out,
            h * w,
            tiles,
            planes // qtable.shape[0],
            *_packed(freqs or ()),
            F=f,
            CHOSEN=freqs is not None,
            SLOTS=triton.next_power_of_2(f),
            BLOCKS=BLOCKS,
            PLANAR=planar,
            **OPTIONS,
        )
    return out


def normalize_grids(
    grids: Sequence[Tensor],
    qtable: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    planes: int,
    mirrored: Sequence[int],
    freqs: Sequence[int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The op fourfold::_normalize_grids for CUDA tensors: stacked, because the kernel reads from one piece of memory.

    grids int16 [h, w, 64], planes of them an image; qtable [B * planes, 64]; mean, std [planes, F]. Returns
    [B, planes * F, h, w].
    """
    if planes < 1 or not grids or len(grids) % planes:
        raise ValueError(f"_normalize_grids: grids must be those of whole images of {planes} planes, got {len(grids)}")
    coefs = torch.stack([grid.flip(1) if k in mirrored else grid for k, grid in enumerate(grids)])
    if mirrored:
        qtable = qtable.clone()
        qtable[list(mirrored), 1::2] *= -1
    parts = []
    for c in range(planes):
        statistics = (None if rows is None else rows[c] for rows in (mean, std))
        parts.append(dct_normalize(coefs[c::planes], qtable[c::planes], *statistics, freqs, "planar", dtype))
    return parts[0] if planes == 1 else torch.cat(parts, 1)


def _packed(freqs: Sequence[int]) -> list[int]:
    """freqs as eight words of eight bytes, the first lowest. Bit 62, above any frequency, makes every word an int64."""
    filled = [*freqs, *[0] * (64 - len(freqs))]
    return [sum(f << 8 * i for i, f in enumerate(filled[start : start + 8])) | 1 << 62 for start in range(0, 64, 8)]


def _check(
    coefs: Tensor,
    qtable: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    freqs: Sequence[int] | None,
    layout: str,
    dtype: torch.dtype,
) -> None:
    """What keeps the kernel inside its buffers; the public function has checked all of it with better words."""
    op = "dct_normalize"
    if coefs.dtype != torch.int16 or coefs.dim() < 3 or coefs.shape[-1] != 64:
        raise ValueError(f"{op}: coefs must be int16 [.., h, w, 64], got {coefs.dtype} {tuple(coefs.shape)}")
    if layout not in ("planar", "blocks"):
        raise ValueError(f"{op}: layout must be 'planar' or 'blocks', got {layout!r}")
    if freqs is not None and not (len(set(freqs)) == len(freqs) and all(0 <= f < 64 for f in freqs)):
        raise ValueError(f"{op}: freqs must lie in 0..63 and not repeat, got {list(freqs)}")
    planes, f = math.prod(coefs.shape[:-3]), 64 if freqs is None else len(freqs)
    groups = qtable.shape[0] if qtable.dim() == 2 else 0
    if qtable.shape != (groups, 64) or (planes and (groups == 0 or planes % groups)):
        raise ValueError(f"{op}: qtable must be [G, 64] with G a divisor of {planes}, got {tuple(qtable.shape)}")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    for name, given, size in (("qtable", qtable, None), ("mean", mean, f), ("std", std, f)):
        if given is None:
            continue
        if given.dtype != work or given.device != coefs.device:
            raise ValueError(f"{op}: {name} must be {work} on {coefs.device}, got {given.dtype} on {given.device}")
        if size is not None and given.shape != (size,):
            raise ValueError(f"{op}: {name} must be [{size}], got {tuple(given.shape)}")


def _compiled(work: str, dtype: str, f: int, planar: bool) -> tuple[Any, ...]:
    signature = {"coefs": "*i16", "qtable": work, "mean": work, "std": work, "out": dtype}
    signature |= dict.fromkeys(("blocks", "tiles", "planes_per_table"), "i32") | dict.fromkeys(WORDS, "i64")
    constants = {"F": f, "CHOSEN": f < 64, "SLOTS": triton.next_power_of_2(f), "BLOCKS": BLOCKS, "PLANAR": planar}
    return _dct_normalize_kernel, signature, constants, OPTIONS


#: (kernel, signature, constants, options): what CI compiles for every supported architecture.
COMPILED = [
    _compiled(work, dtype, f, planar)
    for work, dtype, f in (
        ("*fp32", "*fp32", 64),
        ("*fp32", "*fp16", 24),
        ("*fp32", "*bf16", 64),
        ("*fp64", "*fp64", 64),
    )
    for planar in (True, False)
]
