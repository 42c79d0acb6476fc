"""The internal ops of representation similarity against their references in plain torch."""

from __future__ import annotations

import itertools
from typing import Any

import battery
import pytest
import torch
from battery import Op, Refusal, Sample
from fourfold.ops._cca_ops import _add_wide_, _count_nonfinite, _gram_, _pack_samples
from fourfold.reference import REFERENCES
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
EVERY = (*HALVES, torch.float32, torch.float64)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def eighths(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers whose products every dtype can sum exactly."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return (torch.randint(-15, 16, shape, generator=generator) / 8).to(dtype)


def refused(op: str, message: str, good: tuple[Any, ...], **changes: Any) -> Refusal:
    """The op called with one or several of its good arguments changed, by place: a3=.."""
    args = list(good)
    for place, value in changes.items():
        args[int(place[1:])] = value
    return Refusal(ValueError, f"{op}: {message}", lambda: getattr(torch.ops.fourfold, op)(*args))


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x [N, C, S] in memory as images, channels_last, neurons by samples, or with gaps everywhere."""
    if layout == "images":
        return x
    if layout == "gaps":
        whole = x.new_full([2 * length + 1 for length in x.shape], float("nan"))
        view = whole[1::2, 1::2, 1::2]
        view.copy_(x)
        return view
    order = {"channels_last": (0, 2, 1), "neurons": (1, 0, 2)}[layout]
    return x.permute(order).contiguous().permute([order.index(d) for d in range(3)])


LAYOUTS = ("images", "channels_last", "neurons", "gaps")

# ---- _pack_samples -------------------------------------------------------------------------------------------------------


def packed(call: Any, x: Tensor, pivot: Tensor, first: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Panel, norms and sums of the op into memory of their own; the sums begin at 1."""
    channels = x.shape[1]
    panel = torch.empty(rows, channels, dtype=dtype)
    norms = torch.empty(rows, dtype=dtype)
    sums = torch.ones(channels + 1, dtype=torch.float64)
    call(x, pivot, first, panel, sums, norms)
    return panel, norms, sums


def pack(x: Tensor, pivot: Tensor, first: int, rows: int, dtype: torch.dtype) -> Tensor:
    return battery.joined(packed(_pack_samples, x, pivot, first, rows, dtype))


def pack_reference(x: Tensor, pivot: Tensor, first: int, rows: int, dtype: torch.dtype) -> Tensor:
    return battery.joined(packed(REFERENCES["_pack_samples"], x, pivot, first, rows, dtype))


#: N, C, S; the samples packed.
RANGES = [
    ((3, 5, 49), (0, 147)),
    ((3, 5, 49), (30, 90)),
    ((2, 33, 16), (0, 32)),
    ((2, 17, 16), (5, 9)),
    ((40, 7, 1), (3, 37)),
    ((5, 1, 9), (2, 40)),
    ((1, 64, 70), (1, 68)),
    ((7, 3, 4), (6, 21)),
    ((2, 16, 5), (4, 0)),
    ((0, 4, 5), (0, 0)),
    ((3, 4, 0), (0, 0)),
    ((3, 0, 5), (1, 13)),
]


def pack_sample(
    dtype: torch.dtype, kind: torch.dtype, shape: tuple[int, ...], part: tuple[int, int], layout: str = "images"
) -> Sample:
    x = in_layout(randn(*shape, dtype=kind) + 3, layout)
    label = f"{kind} {shape} from {part[0]}, {part[1]} rows, {layout}, outside are dropped"
    return Sample(label, (x, randn(shape[1], dtype=torch.float64), *part, dtype))


def pack_samples(dtype: torch.dtype) -> list[Sample]:
    # Every range in every layout, each time of another type.
    return [
        pack_sample(dtype, battery.FLOATING[(i + j) % 4], *sizes, layout)
        for i, sizes in enumerate(RANGES)
        for j, layout in enumerate(LAYOUTS if 0 not in sizes[0] else LAYOUTS[:1])
    ]


def pack_refusals() -> list[Refusal]:
    op, x = "_pack_samples", torch.zeros(3, 4, 5)
    wide = torch.float64
    panel, sums, norms = torch.zeros(6, 4), torch.zeros(5, dtype=wide), torch.zeros(6)
    good = (x, torch.zeros(4, dtype=wide), 2, panel, sums, norms)
    kinds = "panel must be [K, 4] in float32 or float64, got"
    rows = "panel must have contiguous rows that don't overlap"
    outside = "must lie within x, which has 15"
    shared = torch.zeros(64, dtype=wide)
    inside = shared[:24].view(6, 4)
    apart = torch.zeros(6, dtype=wide)
    return [
        refused(op, "x must be float16, bfloat16, float32 or float64", good, a0=x.int()),
        refused(op, "x must be [N, C, S] on the CPU, got (4, 5)", good, a0=x[0]),
        refused(op, "x must be [N, C, S] on the CPU, got (1, 3, 4, 5)", good, a0=x[None]),
        refused(op, "pivot must be [4] in float64, got (4,)", good, a1=torch.zeros(4)),
        refused(op, "pivot must be [4] in float64, got (5,)", good, a1=sums),
        refused(op, "pivot must be [4] in float64, got (1, 4)", good, a1=good[1][None]),
        refused(op, f"{kinds} (6, 5)", good, a3=torch.zeros(6, 5)),
        refused(op, f"{kinds} (4,)", good, a3=panel[0]),
        refused(op, f"{kinds} (6, 4)", good, a3=panel.half()),
        refused(op, f"{kinds} (6, 4)", good, a3=panel.long()),
        refused(op, rows, good, a3=torch.zeros(4, 6).T),
        refused(op, rows, good, a3=torch.zeros(6, 8)[:, ::2]),
        refused(op, rows, good, a3=panel[:1].expand(6, 4)),
        refused(op, rows, good, a3=panel[:, :1].expand(6, 4)),
        refused(op, rows, good, a3=torch.zeros(30).as_strided((6, 4), (3, 1))),
        refused(op, f"samples -1 to -1 + 6 {outside}", good, a2=-1),
        refused(op, f"samples 10 to 10 + 6 {outside}", good, a2=10),
        refused(op, f"samples {2**63 - 1} to {2**63 - 1} + 6 {outside}", good, a2=2**63 - 1),
        refused(op, f"samples {-(2**63)} to {-(2**63)} + 6 {outside}", good, a2=-(2**63)),
        refused(op, f"samples 0 to 0 + 16 {outside}", good, a2=0, a3=torch.zeros(16, 4), a5=torch.zeros(16)),
        refused(op, "sums must be contiguous [5] in float64, got (4,)", good, a4=sums[1:]),
        refused(op, "sums must be contiguous [5] in float64, got (5,)", good, a4=sums.float()),
        refused(op, "sums must be contiguous [5] in float64, got (5,)", good, a4=torch.zeros(10, dtype=wide)[::2]),
        refused(op, "sums must be contiguous [5] in float64, got (5,)", good, a4=sums[:1].expand(5)),
        refused(op, "norms must be [6] in the panel's type, got (6,)", good, a5=norms.double()),
        refused(op, "norms must be [6] in the panel's type, got (5,)", good, a5=norms[1:]),
        refused(op, "norms must be [6] in the panel's type, got (6, 1)", good, a5=norms[:, None]),
        refused(op, "norms must not be an expanded tensor, whose elements share memory", good, a5=norms[:1].expand(6)),
        refused(op, "panel must not share memory with x", good, a0=shared[:60].view(3, 4, 5), a3=inside, a5=apart),
        refused(op, "panel must not share memory with pivot", good, a1=shared[20:24], a3=inside, a5=apart),
        refused(op, "panel must not share memory with sums", good, a3=inside, a4=shared[23:28], a5=apart),
        refused(op, "panel must not share memory with norms", good, a3=inside, a5=shared[19:25]),
        refused(op, "panel must not share memory with norms", good, a3=inside, a5=shared[3:24:4]),
        refused(op, "sums must not share memory with pivot", good, a1=shared[:4], a4=shared[3:8]),
        refused(op, "sums must not share memory with norms", good, a3=panel.double(), a4=shared[:5], a5=shared[4:10]),
    ]  # fmt: skip


# ---- _add_wide_ ----------------------------------------------------------------------------------------------------------


def add_wide(part: Tensor, start: float) -> Tensor:
    total = torch.full(part.shape, start, dtype=torch.float64)
    _add_wide_(total, part)
    return total


def add_wide_reference(part: Tensor, start: float) -> Tensor:
    total = torch.full(part.shape, start, dtype=torch.float64)
    REFERENCES["_add_wide_"](total, part)
    return total


def add_wide_sample(rows: int, width: int) -> Sample:
    return Sample(f"{rows} x {width}", (randn(rows, width, dtype=torch.float32), 1.5))


def add_wide_refusals() -> list[Refusal]:
    op, total, part = "_add_wide_", torch.zeros(6, 4, dtype=torch.float64), torch.zeros(6, 4)
    good = (total, part)
    form = "total must be [R, W] in float64 with contiguous rows that don't overlap, got"
    other = "part must be [6, 4] in float32, got"
    return [
        refused(op, f"{form} (6, 4)", good, a0=part),
        refused(op, f"{form} (6,)", good, a0=total[:, 0]),
        refused(op, f"{form} (6, 4)", good, a0=total[:1].expand(6, 4)),
        refused(op, f"{form} (6, 4)", good, a0=torch.zeros(4, 6, dtype=torch.float64).T),
        refused(op, f"{other} (6, 4)", good, a1=total.clone()),
        refused(op, f"{other} (5, 4)", good, a1=part[1:]),
        refused(op, f"{other} (6, 3)", good, a1=part[:, 1:]),
        refused(op, f"{other} (6, 4, 1)", good, a1=part[..., None]),
        refused(op, "total must not share memory with part", good, a1=total.view(torch.float32)[:, :4]),
    ]


# ---- _count_nonfinite ----------------------------------------------------------------------------------------------------


def sprinkled(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers, the largest and smallest there are, and about every ninth NaN or infinite."""
    x = randn(*shape, dtype=dtype)
    dice = torch.randint(0, 18, shape, generator=torch.Generator().manual_seed(len(shape)))
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), most, -most, least, least / 2, 0.0, -0.0)):
        x = torch.where(dice == (i if i < 2 else 2 * i), torch.tensor(value, dtype=dtype), x)
    return x


SHAPES = [(), (1,), (31,), (64,), (200,), (3, 65), (2, 3, 37), (2, 5, 6, 7), (4, 0, 3), (33, 70), (1, 1, 5, 1), (70000,)]


def count_samples(dtype: torch.dtype) -> list[Sample]:
    shapes = [
        (kind, shape) for i, shape in enumerate(SHAPES) for kind in (battery.FLOATING[i % 4], battery.FLOATING[(i + 1) % 4])
    ]
    return [Sample(f"{kind} {shape}", (sprinkled(*shape, dtype=kind),)) for kind, shape in shapes]


def count_refusals() -> list[Refusal]:
    kinds = "x must be float16, bfloat16, float32 or float64"
    return [
        refused("_count_nonfinite", kinds, (torch.zeros(3, dtype=dtype),))
        for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8)
    ]


# ---- _gram_ --------------------------------------------------------------------------------------------------------------


def gram_with(call: Any, x: Tensor, y: Tensor | None) -> Tensor:
    """The product added to 1, of x by itself its upper triangle alone."""
    other = x if y is None else y
    total = torch.ones(x.shape[1], other.shape[1], dtype=torch.float64)
    call(x, other, total)
    return total.triu() if y is None else total


def gram(x: Tensor, y: Tensor | None) -> Tensor:
    return gram_with(_gram_, x, y)


def gram_reference(x: Tensor, y: Tensor | None) -> Tensor:
    return gram_with(REFERENCES["_gram_"], x, y)


#: N, Cx, Cy, S: below a tile, more than one, more than what is packed at a time, odd images, one sample each.
SIZES = [
    (1, 1, 1, 1),
    (3, 5, 7, 49),
    (2, 33, 16, 31),
    (40, 17, 48, 1),
    (2, 20, 130, 64),
    (9, 16, 3, 3),
    (1, 40, 9, 1500),
    (3, 3, 3, 700),
    (0, 4, 5, 6),
    (3, 4, 5, 0),
    (3, 0, 5, 6),
    (3, 4, 0, 6),
]


def gram_sample(dtype: torch.dtype, size: tuple[int, int, int, int], layouts: tuple[str, str], both: bool) -> Sample:
    n, cx, cy, s = size
    x = in_layout(eighths(n, cx, s, dtype=dtype), layouts[0])
    y = in_layout(eighths(n, cy, s, dtype=dtype, seed=1), layouts[1]) if both else None
    return Sample(f"{dtype} {size} {layouts}{'' if both else ' by itself'}", (x, y))


def gram_samples(dtype: torch.dtype) -> list[Sample]:
    pairs = list(itertools.product(LAYOUTS, LAYOUTS))
    every = [gram_sample(kind, SIZES[1], pair, True) for i, pair in enumerate(pairs) for kind in (EVERY[i % 4], EVERY[i // 4])]
    return every + [
        gram_sample(EVERY[(i + both) % 4], size, pairs[5 * i % 16], both)
        for i, size in enumerate(SIZES)
        for both in (True, False)
    ]


def gram_refusals() -> list[Refusal]:
    op, x, y = "_gram_", torch.zeros(3, 4, 5).half(), torch.zeros(3, 6, 5).half()
    total = torch.zeros(4, 6, dtype=torch.float64)
    good = (x, y, total)
    form = "total must be [4, 6] in float64 with contiguous rows that don't overlap, got"
    same = "x [N, C, S] and y must have the same samples, got (3, 4, 5) and"
    shared = torch.zeros(300).half()
    wide = shared[:200].view(torch.float64)
    return [
        refused(op, "x must be float16, bfloat16, float32 or float64", good, a0=x.int()),
        refused(op, "x must be [N, C, S] on the CPU, got (4, 5)", good, a0=x[0]),
        refused(op, "y must be [N, C, S] on the CPU, got (6, 5)", good, a1=y[0]),
        refused(op, "y must be of x's type", good, a1=y.bfloat16()),
        refused(op, "y must be of x's type", good, a1=y.float()),
        refused(op, f"{same} (2, 6, 5)", good, a1=y[1:]),
        refused(op, f"{same} (3, 6, 4)", good, a1=y[..., 1:]),
        refused(op, f"{same} (5, 6, 3)", good, a1=y.transpose(0, 2)),
        refused(op, f"{form} (4, 6)", good, a2=total.float()),
        refused(op, f"{form} (6, 4)", good, a2=total.view(6, 4)),
        refused(op, f"{form} (24,)", good, a2=total.flatten()),
        refused(op, f"{form} (4, 6)", good, a2=total[:1].expand(4, 6)),
        refused(op, f"{form} (4, 6)", good, a2=torch.zeros(6, 4, dtype=torch.float64).T),
        refused(op, "total must not share memory with x", good, a0=shared[:60].view(3, 4, 5), a2=wide[:24].view(4, 6)),
        refused(op, "total must not share memory with y", good, a1=shared[:90].view(3, 6, 5), a2=wide[22:46].view(4, 6)),
    ]  # fmt: skip


# ---- all of them ---------------------------------------------------------------------------------------------------------

COUNTS = {"keeps_nan_in_its_place": "counts it; test_counts_each_kind looks at that"}

#: What is made of these ops and torch's; tested in test_cca.py and test_cca_dft.py.
COMPOSITES = ("cca", "svcca", "pwcca", "cka", "cka_matrix", "procrustes", "rv", "dft_cca")

OPS = (
    Op(
        name="_pack_samples",
        call=pack,
        reference=pack_reference,
        samples=pack_samples,
        small=lambda: [
            pack_sample(torch.float64, torch.float64, (2, 3, 4), (1, 6)),
            pack_sample(torch.float64, torch.float64, (2, 3, 4), (0, 8), "channels_last"),
        ],
        sizes=lambda: [pack_sample(torch.float32, torch.float32, (n, 3, 4), (1, 6)) for n in (2, 3, 5)],
        dynamic=(0,),
        large=lambda dtype: pack_sample(dtype, torch.float32, (9, 130, 500), (17, 4400)),
        refusals=pack_refusals,
        dtypes=(torch.float32, torch.float64),
        differentiable=False,
    ),
    Op(
        name="_add_wide_",
        call=add_wide,
        reference=add_wide_reference,
        samples=lambda dtype: [add_wide_sample(*size) for size in ((1, 1), (5, 17), (3, 64), (7, 1), (0, 4), (4, 0))],
        small=lambda: [add_wide_sample(3, 4)],
        sizes=lambda: [add_wide_sample(n, 4) for n in (2, 3, 5)],
        dynamic=(0,),
        large=lambda dtype: add_wide_sample(700, 1001),
        refusals=add_wide_refusals,
        dtypes=(torch.float64,),
        differentiable=False,
    ),
    Op(
        name="_count_nonfinite",
        call=lambda *args: _count_nonfinite(*args).double(),
        reference=lambda *args: REFERENCES["_count_nonfinite"](*args).double(),
        samples=count_samples,
        small=lambda: [Sample("small", (sprinkled(3, 4, dtype=torch.float64),))],
        sizes=lambda: [Sample(str(n), (sprinkled(n, 4, dtype=torch.float32),)) for n in (2, 3, 5)],
        dynamic=(0,),
        large=lambda dtype: Sample("large", (sprinkled(40, 30, 50, 60, dtype=torch.float16),)),
        refusals=count_refusals,
        dtypes=(torch.float64,),
        differentiable=False,
        excused=COUNTS,
    ),
    Op(
        name="_gram_",
        call=gram,
        reference=gram_reference,
        samples=gram_samples,
        small=lambda: [gram_sample(torch.bfloat16, (2, 3, 4, 5), ("images", "images"), both) for both in (True, False)],
        sizes=lambda: [gram_sample(torch.float16, (n, 3, 3, 5), ("images", "images"), False) for n in (2, 3, 5)],
        dynamic=(0,),
        large=lambda dtype: gram_sample(torch.bfloat16, (9, 150, 70, 301), ("images", "channels_last"), True),
        refusals=gram_refusals,
        dtypes=(torch.float64,),
        differentiable=False,
    ),
)

test_op = battery.tests_of(OPS)


@pytest.mark.skipif(len(battery.tiers()) < 2, reason="this machine has one tier")
def test_every_tier_agrees(tmp_path):
    battery.every_tier_agrees("test_cca_ops", OPS, tmp_path)


def assert_same_panel(x: Tensor, pivot: Tensor, first: int, rows: int, dtype: torch.dtype, label: str) -> None:
    """The panel bit for bit; norms and sums to their rounding, each against its own size."""
    panel, norms, sums = packed(_pack_samples, x, pivot, first, rows, dtype)
    exact_panel, exact_norms, exact_sums = packed(REFERENCES["_pack_samples"], x, pivot, first, rows, dtype)
    battery.assert_same(panel, exact_panel, label)
    torch.testing.assert_close(norms, exact_norms, rtol=8 * torch.finfo(dtype).eps, atol=0, msg=label)
    scale = exact_panel.double().abs().sum(0).add(1)
    assert ((sums - exact_sums)[:-1].abs() <= 1e-15 * rows**0.5 * scale).all(), label
    torch.testing.assert_close(sums[-1], exact_sums[-1], rtol=1e-14, atol=0, msg=label)


@pytest.mark.kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pivot_is_subtracted_in_float64(dtype, layout):
    """At a mean of 1e4, where float32 would keep three digits; every start and end within images."""
    pivot = torch.full((19,), 1e4, dtype=torch.float64) + randn(19, dtype=torch.float64)
    for kind in (torch.float32, torch.float64):
        x = in_layout(randn(5, 19, 23, dtype=kind) + 1e4, layout)
        for first, rows in ((0, 115), (1, 113), (22, 2), (23, 46), (7, 33), (114, 1), (100, 15)):
            assert_same_panel(x, pivot, first, rows, dtype, f"{kind} {layout} {first} {rows}")


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_panel_is_a_part_of_a_matrix(dtype):
    """And the norms a column of it; nothing beside them is written."""
    x, pivot = randn(3, 6, 11, dtype=torch.float32), randn(6, dtype=torch.float64)
    for first, rows in ((0, 33), (4, 20)):
        whole = torch.full((rows + 2, 11), 7.0, dtype=dtype)
        panel, norms = whole[1:-1, 2:8], whole[1:-1, 9]
        sums = torch.zeros(7, dtype=torch.float64)
        _pack_samples(x, pivot, first, panel, sums, norms)
        exact, exact_norms, exact_sums = packed(REFERENCES["_pack_samples"], x, pivot, first, rows, dtype)
        battery.assert_same(panel, exact, "panel")
        torch.testing.assert_close(norms, exact_norms, rtol=1e-6, atol=0)
        torch.testing.assert_close(sums, exact_sums - 1, rtol=1e-13, atol=1e-13)
        panel.fill_(7)
        norms.fill_(7)
        assert (whole == 7).all()


@pytest.mark.kernel
def test_sums_of_a_long_panel_are_exact():
    """As many small parts, not as one long sum."""
    x = (torch.arange(2**20, dtype=torch.float64) % 7 / 8).view(1, 1, -1).half()
    for dtype in (torch.float32, torch.float64):
        _, _, sums = packed(_pack_samples, x, torch.zeros(1, dtype=torch.float64), 0, 2**20, dtype)
        values = x.double()
        assert sums.tolist() == [1 + values.sum().item(), 1 + values.square().sum().item()]


@pytest.mark.kernel
def test_pack_is_the_same_with_any_number_of_threads():
    for layout, dtype in itertools.product(LAYOUTS, (torch.float32, torch.float64)):
        x = in_layout(randn(7, 37, 401, dtype=torch.float32), layout)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(packed(_pack_samples, x, torch.zeros(37, dtype=torch.float64), 11, 2700, dtype))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


@pytest.mark.kernel
def test_add_wide_into_a_part():
    whole = torch.full((9, 20), 7.0, dtype=torch.float64)
    part = randn(7, 30, dtype=torch.float32)[:, 3:20]
    _add_wide_(whole[1:8, 2:19], part)
    assert torch.equal(whole[1:8, 2:19], part.double() + 7)
    whole[1:8, 2:19] = 7
    assert (whole == 7).all()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", battery.FLOATING)
def test_counts_each_kind(dtype):
    """NaN and infinities of both signs, wherever they are; the largest and the smallest number are finite."""
    finite = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max, torch.finfo(dtype).tiny / 2, 0.0], dtype=dtype)
    x = finite.repeat(60)
    assert _count_nonfinite(x).item() == 0
    assert _count_nonfinite(x).dtype == torch.int64
    for i, value in itertools.product((0, 1, 63, 130, 239), (float("nan"), -float("nan"), float("inf"), -float("inf"))):
        spoilt = x.clone()
        spoilt[i] = value
        assert _count_nonfinite(spoilt).item() == 1
    everything = torch.full((500_000,), float("nan"), dtype=dtype)
    assert _count_nonfinite(everything).item() == 500_000
    assert _count_nonfinite(everything[:1].expand(3, 10**12)).item() == 3 * 10**12
    assert _count_nonfinite(everything[: 600_000 // 2 * 1 : 3]).item() == 100_000


@pytest.mark.parametrize("dtype", HALVES)
def test_count_of_every_pattern(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert _count_nonfinite(x).item() == (~x.isfinite()).sum().item()


@pytest.mark.kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", EVERY)
def test_gram_of_random_numbers(dtype, layout):
    """Within rounding of a few hundred sums, eight times float32's unit: those of bfloat16's squares err to one side."""
    x, y = (in_layout(randn(4, c, 900, dtype=dtype, seed=c), layout) for c in (37, 20))
    for other in (y, None):
        exact = gram_reference(x, other)
        error = (gram(x, other) - exact).norm() / exact.norm()
        assert error <= (2.0**-47 if dtype == torch.float64 else 2.0**-21), f"{error:.1e}"


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", EVERY)
def test_gram_products_and_sums_are_exact(dtype):
    """The largest products of 8-bit numbers, of which float32 holds the sum of 1024 and no more."""
    x = torch.full((3, 2, 4099), 127.0, dtype=dtype)
    y = torch.full((3, 5, 4099), 129.0, dtype=dtype)
    assert torch.equal(gram(x, y), torch.full((2, 5), 127 * 129 * 3 * 4099 + 1.0, dtype=torch.float64))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", HALVES)
def test_gram_of_normal_numbers_is_exact(dtype):
    """One product each, over all of the type's normal numbers: what float32 holds exactly as a normal number comes out so."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[(patterns.abs() >= torch.finfo(dtype).smallest_normal) & patterns.isfinite()]
    x = patterns[torch.randperm(len(patterns), generator=torch.Generator().manual_seed(0))[:4096]]
    y = x.roll(1)
    exact = x.double() * y.double()
    held = (exact.abs() >= torch.finfo(torch.float32).smallest_normal) & (exact.abs() <= torch.finfo(torch.float32).max)
    x, y, exact = x[held], y[held], exact[held]
    assert len(x) > 2000
    found = []
    for begin in range(0, len(x), 64):
        part = slice(begin, begin + 64)
        count = len(x[part])
        total = torch.zeros(count, count, dtype=torch.float64)
        # Each sample has one number that is not zero on either side, in alternating halves of a pair.
        _gram_(torch.diag(x[part])[None], torch.diag(y[part])[None], total)
        assert total.count_nonzero() == count
        found.append(total.diagonal())
    assert torch.equal(torch.cat(found), exact)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", EVERY)
def test_gram_into_a_part_of_a_matrix(dtype):
    x, y = (eighths(2, c, 33, dtype=dtype, seed=c) for c in (18, 35))
    whole = torch.full((20, 40), 7.0, dtype=torch.float64)
    _gram_(x, y, whole[1:19, 3:38])
    assert torch.equal(whole[1:19, 3:38] - 7, gram_reference(x, y) - 1)
    whole[1:19, 3:38] = 7
    assert (whole == 7).all()
    _gram_(x, x, whole[1:19, 3:21])
    assert torch.equal((whole[1:19, 3:21] - 7).triu(), (gram_reference(x, x) - 1).triu())


@pytest.mark.kernel
def test_gram_is_the_same_with_any_number_of_threads():
    for dtype, c in itertools.product(EVERY, (20, 300)):
        x = randn(5, c, 700, dtype=dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gram(x, None))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", EVERY)
def test_gram_of_equal_memory_seen_differently(dtype):
    """Only the same channels of the same samples are a layer by itself."""
    x = eighths(3, 24, 24, dtype=dtype)
    for y in (x.transpose(1, 2), x.clone()):
        assert torch.equal(gram(x, y), gram_reference(x, y))
    x = eighths(1, 40, 30, dtype=dtype)
    assert torch.equal(gram(x[:, :20], x), gram_reference(x[:, :20], x))
