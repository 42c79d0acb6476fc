"""The ops under the CoordConvs: samples for the battery; wrong calls of them and of the public functions, word for word."""

from __future__ import annotations

import itertools
from typing import Any

import battery
import pytest
import torch
from battery import Op, Refusal, Sample
from fourfold import CoordSpec
from fourfold.ops import _coord_plan, coordconv
from fourfold.ops._coord_plan import Geometry, Plan
from fourfold.reference import REFERENCES
from torch import Tensor

CPU = torch.device("cpu")
#: The public functions over these ops: they have no schema.
COMPOSITES = ("coord_conv1d", "coord_conv2d", "coord_conv3d", "coord_conv_transpose2d", "add_coords")


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def eighths(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers whose sums every dtype holds exactly, so that only an activation rounds."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return (torch.randint(-15, 16, shape, generator=generator) / 8).to(dtype)


def in_channels_last(x: Tensor, channel: int) -> Tensor:
    """x in that memory order, whatever its rank."""
    return x.movedim(channel, -1).contiguous().movedim(-1, channel)


# ---- plans ---------------------------------------------------------------------------------------------------------------


def geometry(
    size: tuple[int, ...], k: Any = 3, stride: Any = 1, before: Any = 1, dilation: Any = 1, mode: str = "zeros"
) -> Geometry:
    rank = len(size)
    k, stride, before, dilation = ((v,) * rank if isinstance(v, int) else v for v in (k, stride, before, dilation))
    axes = list(zip(size, k, stride, before, dilation, strict=True))
    if mode == "transposed":
        out = tuple((n - 1) * s - 2 * b + d * (m - 1) + 1 for n, m, s, b, d in axes)
    else:
        out = tuple((n + 2 * b - d * (m - 1) - 1) // s + 1 for n, m, s, b, d in axes)
    return Geometry(size, out, k, stride, before, dilation, mode)


# Label, geometry, Cout, the order of the coordinates.
GEOMETRIES: list[tuple[str, Geometry, int, str]] = [
    ("1d", geometry((9,)), 5, "ij"),
    ("1d one class", geometry((40,), 1, 1, 0), 16, "ij"),
    ("1x1", geometry((7, 9), 1, 1, 0), 17, "ij"),
    ("3x3", geometry((6, 20)), 33, "ji"),
    ("3x3 stride 2", geometry((9, 12), 3, 2, 1), 8, "ij"),
    ("5x5 on less", geometry((3, 2), 5, 1, 4), 3, "ij"),
    ("uneven kernel", geometry((5, 8), (4, 1), (1, 2), (2, 0), (1, 3)), 7, "ji"),
    ("dilation", geometry((13, 11), 3, 1, 4, 4), 4, "ij"),
    ("reflect", geometry((6, 7), mode="reflect"), 4, "ij"),
    ("circular", geometry((6, 7), mode="circular"), 1, "ji"),
    ("transposed", geometry((4, 5), 3, 2, 1, mode="transposed"), 6, "ij"),
    ("transposed with holes", geometry((3, 4), 2, 3, 0, 2, mode="transposed"), 18, "ji"),
    ("3d", geometry((4, 5, 6)), 5, "ji"),
    ("3d uneven", geometry((3, 2, 9), (1, 2, 3), (2, 1, 1), (0, 1, 2), 1), 9, "ij"),
    ("one output", geometry((1, 1), 1, 1, 0), 1, "ij"),
]  # fmt: skip


def plan_of(geometry: Geometry, order: str, dtype: torch.dtype) -> Plan:
    return _coord_plan.plan_of(geometry, CoordSpec(order=order, norm="centers"), dtype, CPU)


def plans(dtype: torch.dtype) -> list[tuple[str, Plan, int, bool]]:
    """(label, plan in that dtype, Cout, channels_last)."""
    return [
        (f"{label}{' channels_last' if last else ''}", plan_of(g, order, dtype), cout, last)
        for (label, g, cout, order), last in itertools.product(GEOMETRIES, (False, True))
    ]


LARGE = geometry((60, 70))


# ---- _coord_tables -------------------------------------------------------------------------------------------------------


def tables_sample(label: str, plan: Plan, cout: int, last: bool, extra: int = 0) -> Sample:
    """extra: coordinate channels of no axis, such as a radius."""
    g = plan.geometry
    weight = randn(cout, len(g.size) + extra, *g.kernel, dtype=plan.taps.dtype)
    return Sample(label, (weight, plan.taps, plan.valid, g.out_size, plan.class_count, plan.channels, last))


def tables_samples(dtype: torch.dtype) -> list[Sample]:
    found = [tables_sample(label, plan, cout, last, extra=cout % 2) for label, plan, cout, last in plans(dtype)]
    return [*found, tables_sample("no outputs", plan_of(GEOMETRIES[3][1], "ij", dtype), 0, True)]


def small_plans() -> list[tuple[str, Plan, int, bool]]:
    return [entry for entry in plans(torch.float64) if entry[0].startswith(("1d", "uneven", "transposed with", "3d uneven"))]


# ---- _add_map_ -----------------------------------------------------------------------------------------------------------


def add_map(
    y: Tensor, tables: Tensor, classes: Tensor, class_count: tuple[int, ...], dense: Tensor | None, activation: str, keep: bool
) -> Tensor:
    """The op on a copy; with keep, its two results one after the other."""
    y = y.clone()
    activated = torch.empty_like(y) if keep else None
    coordconv._add_map_(y, tables, classes, class_count, dense, activation, activated)
    return y if activated is None else battery.joined((y, activated))


def add_map_reference(y: Tensor, *args: Any) -> Tensor:
    *args, keep = args
    y = y.clone()
    activated = torch.empty_like(y) if keep else None
    REFERENCES["_add_map_"](y, *args, activated)
    return y if activated is None else battery.joined((y, activated))


def add_map_sample(
    label: str, dtype: torch.dtype, plan: Plan, shape: tuple[int, int], last: bool, activation: str, keep: bool, dense: bool
) -> Sample:
    batch, cout = shape
    numbers = eighths if activation in {"silu", "gelu"} else randn
    kind = plan.taps.dtype
    y = numbers(batch, cout, *plan.geometry.out_size, dtype=dtype)
    tables = numbers(cout, plan.table_length, dtype=kind)
    map_part = numbers(cout, *plan.geometry.out_size, dtype=kind, seed=1) if dense else None
    if last:
        y, tables = in_channels_last(y, 1), tables.T.contiguous().T
        map_part = None if map_part is None else in_channels_last(map_part, 0)
    return Sample(label, (y, tables, plan.classes, plan.class_count, map_part, activation, keep))


#: The activation, whether the sum is kept beside it, whether there is a dense part.
FORMS = [("none", False, False), ("relu", False, True), ("silu", False, False), ("gelu", False, True), ("silu", True, True),
         ("gelu", True, False), ("none", True, True), ("relu", True, False)]  # fmt: skip


def add_map_samples(dtype: torch.dtype) -> list[Sample]:
    samples = []
    for i, (label, plan, cout, last) in enumerate(plans(battery.ACCUMULATE[dtype])):
        for activation, keep, dense in FORMS if label.startswith("3x3") else FORMS[i % 4 :: 4]:
            text = f"{label} {activation}{' kept' if keep else ''}"
            samples.append(add_map_sample(text, dtype, plan, (1 + i % 3, cout), last, activation, keep, dense))
    plan = plan_of(GEOMETRIES[3][1], "ij", battery.ACCUMULATE[dtype])
    empty = [add_map_sample(f"no {what}", dtype, plan, shape, False, "relu", True, True)
             for what, shape in (("images", (0, 3)), ("channels", (2, 0)))]  # fmt: skip
    return samples + empty


# ---- _batch_sum ----------------------------------------------------------------------------------------------------------


def relu_outputs(*shape: int, dtype: torch.dtype) -> Tensor:
    return randn(*shape, dtype=dtype, seed=5).relu()


SIZES = [(3, 5, 9), (2, 4, 6, 7), (1, 17, 5, 3), (5, 1, 8, 8), (2, 3, 3, 4, 5), (33, 2, 1, 1), (2, 40, 10, 13), (0, 3, 4, 4),
         (2, 0, 4, 4), (0, 3, 7)]  # fmt: skip


def batch_sum_samples(dtype: torch.dtype) -> list[Sample]:
    samples = []
    kinds = (torch.float64,) if dtype == torch.float64 else (torch.float16, torch.bfloat16, torch.float32)
    for kind, size, last, masked in itertools.product(kinds, SIZES, (False, True), (False, True)):
        grad, relu = randn(*size, dtype=kind), relu_outputs(*size, dtype=kind) if masked else None
        if last:
            grad, relu = in_channels_last(grad, 1), None if relu is None else in_channels_last(relu, 1)
        samples.append(Sample(f"{kind} {size}{' channels_last' * last}{' relu, some dropped' * masked}", (grad, relu)))
    return samples


# ---- _coord_tables_backward ----------------------------------------------------------------------------------------------


def tables_backward_sample(label: str, plan: Plan, cout: int, last: bool, extra: int = 0) -> Sample:
    g = plan.geometry
    grad = randn(cout, *g.out_size, dtype=plan.taps.dtype)
    grad = in_channels_last(grad, 0) if last else grad
    channels = len(g.size) + extra
    return Sample(label, (grad, plan.taps, plan.valid, plan.classes, g.kernel, plan.class_count, plan.channels, channels))


def tables_backward_samples(dtype: torch.dtype) -> list[Sample]:
    found = [tables_backward_sample(label, plan, cout, last, extra=cout % 2) for label, plan, cout, last in plans(dtype)]
    return [*found, tables_backward_sample("no outputs", plan_of(GEOMETRIES[3][1], "ij", dtype), 0, False)]


# ---- wrong calls of the ops ----------------------------------------------------------------------------------------------

HUGE = 2**62


def refused(op: str, message: str, good: tuple[Any, ...], **changes: Any) -> Refusal:
    """The op called with one or several of its good arguments changed, by place: a3=.."""
    args = list(good)
    for place, value in changes.items():
        args[int(place[1:])] = value
    return Refusal(ValueError, f"{op}: {message}", lambda: getattr(torch.ops.fourfold, op)(*args))


def plan_refusals(op: str, good: tuple[Any, ...], at_taps: int, at_counts: int, at_channels: int) -> list[Refusal]:
    """What the two table ops refuse alike, given arguments of the 3x3 plan on 6 x 20."""
    taps, valid = good[at_taps], good[at_taps + 1]
    a, b, c, d = f"a{at_taps}", f"a{at_taps + 1}", f"a{at_counts}", f"a{at_channels}"
    each = "every axis must have outputs and at most as many classes, got"
    return [
        refused(op, "class_count must have 2 entries, got 1", good, **{c: [3]}),
        refused(op, f"{each} 6 and 0", good, **{c: [0, 3]}),
        refused(op, f"{each} 6 and 7", good, **{c: [7, 3]}),
        refused(op, f"{each} 20 and {HUGE}", good, **{c: [3, HUGE]}),
        refused(op, "taps must be 78 contiguous values in float32, got shape (77,)", good, **{a: taps[:-1]}),
        refused(op, "taps must be 78 contiguous values in float32, got shape (78,)", good, **{a: taps[:1].expand(78)}),
        refused(op, "valid must be 18 contiguous values in float32, got shape (0,)", good, **{b: valid[:0]}),
        refused(op, "valid must be 18 contiguous values in float32, got shape (18,)", good, **{b: valid.double()}),
        refused(op, "valid must be 18 contiguous values in float32, got shape (19,)", good, **{b: torch.zeros(19)}),
        refused(op, "valid must be 15 contiguous values in float32, got shape (18,)", good, **{c: [2, 3]}),
        refused(op, "channels must have 2 entries, got 1", good, **{d: [0]}),
        refused(op, "channels must lie in 0..1, got 2", good, **{d: [0, 2]}),
        refused(op, "channels must lie in 0..1, got -1", good, **{d: [-1, 0]}),
        refused(op, f"channels must lie in 0..1, got {-HUGE}", good, **{d: [0, -HUGE]}),
    ]


def tables_refusals() -> list[Refusal]:
    op, plan = "_coord_tables", plan_of(GEOMETRIES[3][1], "ij", torch.float32)
    good = tables_sample("", plan, 4, False).args
    weight, each = good[0], "every axis must have outputs and at most as many classes, got"
    return [
        *plan_refusals(op, good, 1, 4, 5),
        refused(op, "there must be 1 to 3 spatial axes, got 0", good, a3=[]),
        refused(op, "there must be 1 to 3 spatial axes, got 4", good, a3=[1, 1, 1, 1]),
        refused(op, f"{each} 0 and 3", good, a3=[0, 20]),
        refused(op, f"{each} -6 and 3", good, a3=[-6, 20]),
        refused(op, "the map is too large", good, a3=[HUGE, 20]),
        refused(op, "the map is too large", good, a3=[2**39, 2**39]),
        refused(op, "coord_weight must be [Cout, nc, *k] with 2 kernel axes, got (4, 2, 3)", good, a0=weight[..., 0]),
        refused(op, "coord_weight must be of the type of taps", good, a0=weight.double()),
        refused(op, "coord_weight must be of the type of taps", good, a0=weight.bfloat16()),
        refused(op, "taps must be 78 contiguous values in float32, got shape (78,)", good, a1=plan.taps.to(torch.int32)),
        refused(op, "taps must be 104 contiguous values in float32, got shape (78,)", good, a0=torch.zeros(4, 2, 4, 4)),
        refused(op, "kernel sizes must be at least 1, got 0", good, a0=weight[:, :, :0]),
        refused(op, "channels must lie in 0..-1, got 0", good, a0=weight[:, :0]),
        # 2^30 taps times 2^34 outputs would be 0 in 64 bits.
        refused(op, "the taps are too many",
                (torch.zeros(1).expand(1, 1, 2**30), torch.zeros(0), torch.zeros(0), [2**34], [2**34], [0], False)),
    ]  # fmt: skip


def tables_backward_refusals() -> list[Refusal]:
    op, plan = "_coord_tables_backward", plan_of(GEOMETRIES[3][1], "ij", torch.float32)
    good = tables_backward_sample("", plan, 4, False).args
    grad, classes = good[0], plan.classes
    shape = "map_grad must be [C, *out] with 1 to 3 spatial axes, got"
    return [
        *plan_refusals(op, good, 1, 5, 6),
        refused(op, f"{shape} (4,)", good, a0=grad[:, 0, 0]),
        refused(op, f"{shape} (1, 1, 4, 6, 20)", good, a0=grad[None, None]),
        refused(op, "map_grad must be of the type of taps", good, a0=grad.half()),
        refused(op, "map_grad must be of the type of taps", good, a0=grad.double()),
        refused(op, "map_grad must be contiguous or channels_last", good, a0=torch.zeros(4, 20, 6).mT),
        refused(op, "map_grad must be contiguous or channels_last", good, a0=grad[:, :1].expand(4, 6, 20)),
        refused(op, "kernel must have 2 sizes, got 3", good, a4=[3, 3, 3]),
        refused(op, "kernel sizes must be at least 1, got -3", good, a4=[-3, 3]),
        refused(op, "the taps are too many", good, a4=[HUGE, 3]),
        refused(op, "taps must be 84 contiguous values in float32, got shape (78,)", good, a4=[4, 3]),
        *classes_refusals(op, good, 3, classes),
        refused(op, "coord_channels must be 1 to 4, got 0", good, a7=0),
        refused(op, f"coord_channels must be 1 to 4, got {HUGE}", good, a7=HUGE),
        refused(op, "channels must lie in 0..0, got 1", good, a7=1),
    ]


def classes_refusals(op: str, good: tuple[Any, ...], place: int, classes: Tensor) -> list[Refusal]:
    def with_number(number: int, at: int) -> dict[str, Tensor]:
        changed = classes.clone()
        changed[at] = number
        return {f"a{place}": changed}

    length = "classes must be 26 contiguous values in int32, got shape"
    return [
        refused(op, f"{length} (25,)", good, **{f"a{place}": classes[1:]}),
        refused(op, f"{length} (26,)", good, **{f"a{place}": classes.long()}),
        refused(op, f"{length} (26,)", good, **{f"a{place}": classes.repeat(2)[::2]}),
        refused(op, "classes must lie in 0..2, got 3", good, **with_number(3, 0)),
        refused(op, "classes must lie in 0..2, got -1", good, **with_number(-1, 25)),
        refused(op, f"classes must lie in 0..2, got {2**31 - 1}", good, **with_number(2**31 - 1, 7)),
    ]


def add_map_refusals() -> list[Refusal]:
    op, plan = "_add_map_", plan_of(GEOMETRIES[3][1], "ij", torch.float32)
    y, tables, dense = torch.zeros(2, 4, 6, 20), torch.zeros(4, 78), torch.zeros(4, 6, 20)
    good = (y, tables, plan.classes, plan.class_count, dense, "relu", torch.zeros_like(y))
    form = "tables must be [4, 78] in the map's type, got"
    image = "dense must be an image of y's shape and memory order in the map's type, got"
    kept = "activated must be of y's shape, type and memory order, got"
    return [
        refused(op, "y must be float16, bfloat16, float32 or float64", good, a0=y.int()),
        refused(op, "y must be [B, C, *out] with 1 to 3 spatial axes, got (4, 20)", good, a0=y[0, :, 0]),
        refused(op, "y must be [B, C, *out] with 1 to 3 spatial axes, got (1, 1, 2, 4, 6, 20)", good, a0=y[None, None]),
        refused(op, "activation must be 'none', 'relu', 'silu' or 'gelu', got 'tanh'", good, a5="tanh"),
        refused(op, "y must be contiguous or channels_last", good, a0=torch.zeros(2, 4, 20, 6).mT),
        refused(op, "y must be contiguous or channels_last", good, a0=y[:, :, :, :1].expand_as(y)),
        refused(op, "class_count must have 2 entries, got 3", good, a3=[3, 3, 3]),
        refused(op, "every axis must have outputs and at most as many classes, got 6 and -1", good, a3=[-1, 3]),
        *classes_refusals(op, good, 2, plan.classes),
        refused(op, f"{form} (4, 77)", good, a1=tables[:, 1:]),
        refused(op, f"{form} (5, 78)", good, a1=torch.zeros(5, 78)),
        refused(op, f"{form} (4, 78)", good, a1=tables.double()),
        refused(op, f"{form} (4, 1, 78)", good, a1=tables[:, None]),
        refused(op, "tables must be [4, 52] in the map's type, got (4, 78)", good, a2=plan.classes * 0, a3=[2, 2]),
        refused(op, f"{image} (4, 6, 19)", good, a4=dense[..., 1:]),
        refused(op, f"{image} (1, 4, 6, 20)", good, a4=dense[None]),
        refused(op, f"{image} (4, 6, 20)", good, a4=dense.half()),
        refused(op, f"{image} (4, 6, 20)", good, a4=in_channels_last(dense, 0)),
        refused(op, f"{image} (4, 6, 20)", good, a4=dense[:1].expand_as(dense)),
        refused(op, f"{kept} (1, 4, 6, 20)", good, a6=y[:1]),
        refused(op, f"{kept} (2, 4, 6, 20)", good, a6=y.double()),
        refused(op, f"{kept} (2, 4, 6, 20)", good, a6=in_channels_last(y, 1)),
    ]  # fmt: skip


def batch_sum_refusals() -> list[Refusal]:
    op, grad = "_batch_sum", torch.zeros(2, 3, 4, 5)
    good, relu = (grad, grad), "relu_output must be of grad's shape, type and memory order, got"
    return [
        refused(op, "grad must be float16, bfloat16, float32 or float64", good, a0=grad.long()),
        refused(op, "grad must be [B, C, *size] with 1 to 3 spatial axes, got (2, 3)", good, a0=grad[..., 0, 0]),
        refused(op, "grad must be [B, C, *size] with 1 to 3 spatial axes, got (1, 1, 2, 3, 4, 5)", good, a0=grad[None, None]),
        refused(op, "grad must be contiguous or channels_last", good, a0=grad[:1].expand_as(grad)),
        refused(op, f"{relu} (2, 3, 4, 4)", good, a1=grad[..., 1:]),
        refused(op, f"{relu} (2, 3, 4, 5)", good, a1=grad.half()),
        refused(op, f"{relu} (2, 3, 4, 5)", good, a1=in_channels_last(grad, 1)),
        refused(op, f"{relu} (3, 4, 5)", good, a1=grad[0]),
    ]


# ---- what the battery is fed ---------------------------------------------------------------------------------------------

IN_TWO_ORDERS = {
    "accepts_any_strides": "takes contiguous and channels_last memory and refuses the rest",
    "fake_agrees": "likewise; opcheck compares the fake on what it takes",
}
SKIPS_OUTSIDE = {"keeps_nan_in_its_place": "leaves out taps outside the image, which the reference multiplies by 0"}
BIG = plan_of(LARGE, "ij", torch.float32)

OPS = (
    Op(
        name="_coord_tables",
        call=lambda *args: coordconv._coord_tables(*args),  # noqa: PLW0108  (a function refuses out= as Python does)
        reference=REFERENCES["_coord_tables"],
        samples=tables_samples,
        small=lambda: [tables_sample(label, plan, 2, last) for label, plan, _cout, last in small_plans()],
        sizes=lambda: [tables_sample(str(n), plan_of(GEOMETRIES[3][1], "ij", torch.float32), n, False) for n in (4, 7, 19)],
        dynamic=(0,),
        large=lambda dtype: tables_sample("large", plan_of(LARGE, "ij", dtype), 300, True),
        refusals=tables_refusals,
        dtypes=(torch.float32, torch.float64),
        differentiable=False,
        excused=SKIPS_OUTSIDE,
    ),
    Op(
        name="_coord_tables_backward",
        call=lambda *args: battery.joined(coordconv._coord_tables_backward(*args)),
        reference=lambda *args: battery.joined(REFERENCES["_coord_tables_backward"](*args)),
        samples=tables_backward_samples,
        small=lambda: [tables_backward_sample(label, plan, 2, last) for label, plan, _cout, last in small_plans()],
        sizes=lambda: [
            tables_backward_sample(str(n), plan_of(GEOMETRIES[3][1], "ij", torch.float32), n, False) for n in (4, 7)
        ],
        dynamic=(0,),
        large=lambda dtype: tables_backward_sample("large", plan_of(LARGE, "ij", dtype), 100, True),
        refusals=tables_backward_refusals,
        dtypes=(torch.float32, torch.float64),
        differentiable=False,
        excused={**IN_TWO_ORDERS, **SKIPS_OUTSIDE},
    ),
    Op(
        name="_add_map_",
        call=add_map,
        reference=add_map_reference,
        samples=add_map_samples,
        small=lambda: [
            add_map_sample(f"{label} {form[0]}", torch.float64, plan, (2, 3), last, *form)
            for (label, plan, _, last), form in zip(small_plans(), itertools.cycle(FORMS), strict=False)
        ],
        sizes=lambda: [add_map_sample(str(n), torch.float32, BIG, (n, 3), False, "silu", True, True) for n in (2, 5)],
        dynamic=(0,),
        large=lambda dtype: add_map_sample(
            "large", dtype, plan_of(LARGE, "ij", battery.ACCUMULATE[dtype]), (9, 40), dtype != torch.float32, "gelu", True, True
        ),
        refusals=add_map_refusals,
        differentiable=False,
        excused=IN_TWO_ORDERS,
    ),
    Op(
        name="_batch_sum",
        call=lambda grad, relu: battery.joined(coordconv._batch_sum(grad, relu)),
        reference=lambda grad, relu: battery.joined(REFERENCES["_batch_sum"](grad, relu)),
        samples=batch_sum_samples,
        small=lambda: [sample for sample in batch_sum_samples(torch.float64) if max(sample.args[0].shape) < 10],
        sizes=lambda: [Sample(str(size), (randn(*size, dtype=torch.float32), None)) for size in ((2, 3, 5, 6), (4, 3, 8, 7))],
        dynamic=(0, 2, 3),
        large=lambda dtype: Sample("large", (randn(17, 40, 60, 70, dtype=dtype), relu_outputs(17, 40, 60, 70, dtype=dtype))),
        refusals=batch_sum_refusals,
        dtypes=(torch.float32, torch.float64),
        differentiable=False,
        excused=IN_TWO_ORDERS,
    ),
)  # fmt: skip

test_op = battery.tests_of(OPS)


@pytest.mark.skipif(len(battery.tiers()) < 2, reason="this machine has one tier")
def test_every_tier_agrees(tmp_path):
    battery.every_tier_agrees("test_coordconv", OPS, tmp_path)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", battery.FLOATING)
def test_relu_keeps_nan_and_drops_infinity(dtype):
    """As torch.relu does, in whole vectors and in what is left of them."""
    plan = plan_of(GEOMETRIES[3][1], "ij", battery.ACCUMULATE[dtype])
    y = randn(2, 4, *plan.geometry.out_size, dtype=dtype)
    y.view(-1)[::3], y.view(-1)[1::3] = float("nan"), -float("inf")
    tables = torch.zeros(4, plan.table_length, dtype=plan.taps.dtype)
    result = add_map(y, tables, plan.classes, plan.class_count, None, "relu", False)
    battery.assert_same(result, y.relu(), "relu")
    total, kept = coordconv._batch_sum(torch.ones_like(y), y.relu())
    expected = torch.ones_like(y).masked_fill(y.relu() <= 0, 0)
    battery.assert_same(kept, expected, "gradient of relu")
    battery.assert_same(total, expected.to(total.dtype).sum(0), "batch sum")
