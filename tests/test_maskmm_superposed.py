"""Superposed masks: samples and wrong calls for the battery; what holds bit for bit; which task a batch is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import battery
import pytest
import torch
import torch.nn.functional as F
from battery import FLOATING, Op, Refusal, Sample
from fourfold.ops import maskmm, maskmm_superposed
from fourfold.reference import maskmm_superposed as reference
from torch import Tensor

#: The public functions over these ops without a schema.
COMPOSITES = ("superposed_linear", "infer_task")

#: (N, K, T): one bit, a word but one, a word, a word and one, a real layer, more words than are treated at a time, nothing.
SHAPES = ((1, 1, 1), (3, 63, 3), (2, 64, 5), (5, 65, 8), (10, 784, 13), (2, 4200, 2), (9, 5, 21), (0, 5, 2), (4, 0, 3))
#: (rows of x before K, N, K, T): teams of four, two and one, of one task and of several; a middle dimension; nothing.
BATCHES = (
    ((1,), 1, 1, 1),
    ((4,), 3, 63, 3),
    ((9,), 2, 64, 2),
    ((7,), 5, 65, 30),
    ((70,), 6, 130, 4),
    ((3, 5), 9, 20, 2),
    ((2, 3, 2), 4, 70, 3),
    ((5,), 37, 300, 3),
    ((0,), 3, 5, 2),
    ((3,), 0, 5, 2),
    ((3,), 4, 0, 2),
    ((2, 0), 4, 6, 2),
)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def random_masks(n: int, k: int, tasks: int, seed: int = 0) -> Tensor:
    """Half full, with a bit in every row and column, so that the battery's NaN shows; the first one keeps all."""
    generator = torch.Generator().manual_seed(n + k + tasks + seed)
    masks = torch.rand(tasks, n, k, generator=generator) < 0.5
    masks |= (torch.arange(n)[:, None] - torch.arange(k)) % max(1, min(n, k)) == 0
    masks[0] = True
    return masks


def pack(masks: Tensor) -> Tensor:
    return maskmm.pack_mask(masks.flatten(0, 1)).unflatten(0, masks.shape[:2])


def packed(n: int, k: int, tasks: int) -> Tensor:
    return pack(random_masks(n, k, tasks))


def refused(op: str, message: str, good: tuple[Any, ...], **changes: Any) -> Refusal:
    """The op itself called with one or several of its good arguments changed, by place: a3=.."""
    args = list(good)
    for place, value in changes.items():
        args[int(place[1:])] = value
    return Refusal(ValueError, f"{op}: {message}", lambda: getattr(torch.ops.fourfold, op)(*args))


# ---- all masks at once ---------------------------------------------------------------------------------------------------


def superpose_sample(n: int, k: int, tasks: int, dtype: torch.dtype) -> Sample:
    weight, alpha = randn(n, k, dtype=dtype), randn(tasks, dtype=battery.ACCUMULATE[dtype], seed=1)
    return Sample(f"{n} x {k}, {tasks} masks", (weight, packed(n, k, tasks), alpha))


def dots_sample(n: int, k: int, tasks: int, dtype: torch.dtype) -> Sample:
    """In numbers of dtype, to a result in the type that they are computed in."""
    a, b = randn(n, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1)
    return Sample(f"{n} x {k}, {tasks} masks ({dtype})", (a, b, packed(n, k, tasks)))


def dots_samples(dtype: torch.dtype) -> list[Sample]:
    kinds = [kind for kind in FLOATING if battery.ACCUMULATE[kind] == dtype]
    return [dots_sample(*shape, kind) for kind in kinds for shape in SHAPES]


def masks_refusals(op: str, good: tuple[Any, ...], place: int) -> list[Refusal]:
    """Of masks for a weight [3, 70], given the op's good arguments and the place of masks among them."""
    masks, at = good[place], f"a{place}"
    form = "masks must be [T, 3, 16] with at least one mask, got"
    return [
        refused(op, f"{form} (3, 16)", good, **{at: masks[0]}),
        refused(op, f"{form} (0, 3, 16)", good, **{at: masks[:0]}),
        refused(op, f"{form} (4, 2, 16)", good, **{at: masks[:, :2]}),
        refused(op, "masks must be uint8", good, **{at: masks.short()}),
        refused(op, "masks of 12 rows of 70 must have 12 rows of 16 bytes, got (4, 3, 8)", good, **{at: masks[..., :8]}),
        refused(op, "masks of 12 rows of 70 must have 12 rows of 16 bytes, got (4, 3, 17)", good,
                **{at: F.pad(masks, (0, 1))}),
        refused(op, "masks must be contiguous", good, **{at: masks.mT.contiguous().mT}),
        refused(op, "masks must be contiguous", good, **{at: masks[:1].expand_as(masks)}),
    ]  # fmt: skip


def overflowing(masks: Tensor, task: int = 0) -> Tensor:
    """With a bit beyond column 70 in the last row of one mask."""
    masks = masks.clone()
    masks[task, -1, 8] |= 64
    return masks


BEYOND = "masks have bits set beyond their 70 columns, which must be zero; pack with pack_mask"


def superpose_refusals() -> list[Refusal]:
    op, good = "_superpose", superpose_sample(3, 70, 4, torch.float32).args
    weight, _, alpha = good
    form = "alpha must be [4] in float32 (float64 for float64), got"
    return [
        *masks_refusals(op, good, 1),
        refused(op, "weight must be float16, bfloat16, float32 or float64", good, a0=weight.int()),
        refused(op, "weight must be [N, K], got (70,)", good, a0=weight[0]),
        refused(op, "weight must be [N, K], got (3, 70, 1)", good, a0=weight[..., None]),
        refused(op, f"{form} (3,)", good, a2=alpha[:3]),
        refused(op, f"{form} (4, 1)", good, a2=alpha[:, None]),
        refused(op, f"{form} (4,)", good, a2=alpha.double()),
        refused(op, f"{form} (4,)", good, a2=alpha.long()),
    ]


def dots_refusals() -> list[Refusal]:
    op, good = "_masked_dots", dots_sample(3, 70, 4, torch.float32).args
    a, b, _ = good
    return [
        *masks_refusals(op, good, 2),
        refused(op, "a must be float16, bfloat16, float32 or float64", good, a0=a.int()),
        refused(op, "a must be [N, K], got (70,)", good, a0=a[0]),
        refused(op, "b must have the type and shape of a, (3, 70), got (3, 69)", good, a1=b[:, 1:]),
        refused(op, "b must have the type and shape of a, (3, 70), got (3, 70)", good, a1=b.double()),
        refused(op, "b must have the type and shape of a, (3, 70), got (210,)", good, a1=b.flatten()),
    ]


# ---- a mask per sample ---------------------------------------------------------------------------------------------------


def tasks_of(batch: int, tasks: int) -> Tensor:
    """Of a batch in which each task comes up anywhere; the first mask, which keeps all, once at least."""
    task = torch.randint(tasks, (batch,), generator=torch.Generator().manual_seed(batch))
    task[-1:] = 0
    return task


def linear_sample(lead: tuple[int, ...], n: int, k: int, tasks: int, dtype: torch.dtype, bias: bool = True) -> Sample:
    x, weight = randn(*lead, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1)
    args = (x, weight, packed(n, k, tasks), tasks_of(lead[0], tasks))
    return Sample(f"{lead}, {n} x {k}, {tasks} masks{' bias' * bias}", (*args, randn(n, dtype=dtype, seed=2) if bias else None))


def linear_samples(dtype: torch.dtype) -> list[Sample]:
    return [linear_sample(*batch, dtype, bias=i % 3 != 1) for i, batch in enumerate(BATCHES)]


def transposed_sample(lead: tuple[int, ...], n: int, k: int, tasks: int, dtype: torch.dtype) -> Sample:
    grad, weight = randn(*lead, n, dtype=dtype), randn(n, k, dtype=dtype, seed=1)
    return Sample(f"{lead}, {n} x {k}, {tasks} masks", (grad, weight, packed(n, k, tasks), tasks_of(lead[0], tasks)))


def outer_sample(lead: tuple[int, ...], n: int, k: int, tasks: int, dtype: torch.dtype) -> Sample:
    grad, x = randn(*lead, n, dtype=dtype), randn(*lead, k, dtype=dtype, seed=1)
    return Sample(f"{lead}, {n} x {k}, {tasks} masks", (grad, x, packed(n, k, tasks), tasks_of(lead[0], tasks)))


def task_linear(x: Tensor, weight: Tensor, masks: Tensor, task: Tensor, bias: Tensor | None = None) -> Tensor:
    """The function, tasks repeated for more samples: the battery exports a batch of any size beside one task tensor."""
    turn = torch.arange(x.shape[0], device=task.device) % max(1, task.shape[0])
    return maskmm_superposed.task_linear(x, weight, masks, task[turn], bias)


def in_bfloat16(x: Tensor, weight: Tensor, masks: Tensor, task: Tensor, bias: Tensor | None) -> Tensor:
    """What autocast makes of it: the exact result of rounded arguments."""
    x, weight, bias = (None if t is None else t.bfloat16().double() for t in (x, weight, bias))
    return reference.task_linear(x, weight, masks, task, bias)


def task_refusals(op: str, good: tuple[Any, ...], place: int) -> list[Refusal]:
    """Of task [5] for 4 masks."""
    task, at = good[place], f"a{place}"

    def with_id(i: int, at: int) -> Tensor:
        return task.index_fill(0, torch.tensor(at), i)

    return [
        refused(op, "task must be int64 [5], got (4,)", good, **{at: task[1:]}),
        refused(op, "task must be int64 [5], got (5, 1)", good, **{at: task[:, None]}),
        refused(op, "task must be int64 [5], got (5,)", good, **{at: task.int()}),
        refused(op, "task ids must lie in 0..3, got 4 at index 2", good, **{at: with_id(4, 2)}),
        refused(op, "task ids must lie in 0..3, got -1 at index 0", good, **{at: with_id(-1, 0)}),
        refused(op, f"task ids must lie in 0..3, got {2**62} at index 4", good, **{at: with_id(2**62, 4)}),
    ]


def raw_linear_refusals() -> list[Refusal]:
    op, good = "task_linear", linear_sample((5,), 3, 70, 4, torch.float32).args
    x, weight, masks, task, bias = good
    return [
        *masks_refusals(op, good, 2),
        *task_refusals(op, good, 3),
        refused(op, BEYOND, good, a2=overflowing(masks, int(task[1]))),
        refused(op, "x must be float16, bfloat16, float32 or float64", good, a0=x.int()),
        refused(op, "x must be [B, .., 70], got (70,)", good, a0=x[0]),
        refused(op, "x must be [B, .., 70], got (5, 69)", good, a0=x[:, 1:]),
        refused(op, "weight must be float16, bfloat16, float32 or float64", good, a1=weight.bool()),
        refused(op, "weight must be [N, K], got (70,)", good, a1=weight[0]),
        refused(op, "weight must be of the input's type", good, a1=weight.double()),
        refused(op, "bias must be of the input's type", good, a4=bias.half()),
        refused(op, "bias must be [3], got (2,)", good, a4=bias[1:]),
    ]


def linear_refusals() -> list[Refusal]:
    op, (x, weight, bits, task, bias) = "task_linear", linear_sample((5,), 3, 70, 4, torch.float32).args

    def call(error: type[Exception], message: str, **changes: Any) -> Refusal:
        args = {"x": x, "weight": weight, "masks": bits, "task": task, "bias": bias, **changes}
        return Refusal(error, f"{op}: {message}", lambda: maskmm_superposed.task_linear(**args))

    return [
        *raw_linear_refusals(),
        *argument_refusals(call, x, weight, bits, bias),
        call(ValueError, "x must be [B, .., K], got (70,)", x=x[0]),
        call(TypeError, "task must be a Tensor, got int", task=3),
        call(TypeError, "task must be int64, got int32", task=task.int()),
        call(TypeError, "task must be int64, got float32", task=task.float()),
        call(ValueError, "task must be [5], one number per sample, got [6]", task=torch.zeros(6, dtype=torch.int64)),
        call(ValueError, "task must be [5], one number per sample, got []", task=task[0]),
        call(ValueError, "task is on meta, x on cpu; move one with .to()", task=task.to("meta")),
        call(ValueError, "task ids must lie in 0..3, got 4 at index 0", task=task + 4 - task[0]),
        call(ValueError, BEYOND, masks=overflowing(bits, int(task[2]))),
    ]


def argument_refusals(call: Callable[..., Refusal], x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor) -> list[Refusal]:
    """What both public functions say of x [5, 70], weight [3, 70], four masks and bias."""
    masks = random_masks(3, 70, 4)
    form = "masks for weight (3, 70) must be [T, 3, {}], got"
    single = "; one mask for all is masked_linear's, or masks[None]"
    return [
        call(TypeError, "x must be a Tensor, got list", x=[0.0]),
        call(TypeError, "x must be float16, bfloat16, float32 or float64, got int64", x=x.long()),
        call(TypeError, "weight must be float16, bfloat16, float32 or float64, got int32", weight=weight.int()),
        call(TypeError, "weight must be float32 as x is, got float64; convert one with .to()", weight=weight.double()),
        call(TypeError, "bias must be float32 as x is, got bfloat16; convert one with .to()", bias=bias.bfloat16()),
        call(ValueError, "weight must be [N, K], got (70,)", weight=weight[0]),
        call(ValueError, "last dimension of x is 69, weight (3, 70) needs 70; x is [.., K]", x=x[:, 1:]),
        call(ValueError, "bias must be [3], got [2]", bias=bias[1:]),
        call(TypeError, "masks must be a Tensor, got list", masks=[bits[0]]),
        call(TypeError, "masks must be bool or packed uint8, got float32; masks keep or drop, alpha weighs them",
             masks=masks.float()),
        call(TypeError, "masks must be bool or packed uint8, got int64; compare first, as in masks != 0", masks=masks.long()),
        call(ValueError, "masks are on meta, weight on cpu; move one with .to()", masks=bits.to("meta")),
        call(ValueError, f"packed {form.format(16)} (4, 3, 8)", masks=bits[..., :8]),
        call(ValueError, f"packed {form.format(16)} (4, 2, 16)", masks=bits[:, 1:]),
        call(ValueError, f"packed {form.format(16)} (3, 16){single}", masks=bits[0]),
        call(ValueError, f"bool {form.format(70)} (3, 70){single}", masks=masks[0]),
        call(ValueError, f"bool {form.format(70)} (4, 70, 3); did you mean masks.mT?", masks=masks.mT),
        call(ValueError, f"bool {form.format(70)} (4, 3, 69)", masks=masks[..., 1:]),
        call(ValueError, "masks must hold at least one mask, got (0, 3, 16)", masks=bits[:0]),
        call(ValueError, "masks must hold at least one mask, got (0, 3, 70)", masks=masks[:0]),
    ]  # fmt: skip


def transposed_refusals() -> list[Refusal]:
    op, good = "_task_linear_transposed", transposed_sample((5,), 3, 70, 4, torch.float32).args
    grad, weight, masks, task = good
    return [
        *masks_refusals(op, good, 2),
        *task_refusals(op, good, 3),
        refused(op, BEYOND, good, a2=overflowing(masks, int(task[1]))),
        refused(op, "grad must be float16, bfloat16, float32 or float64", good, a0=grad.int()),
        refused(op, "grad must be [B, .., 3], got (3,)", good, a0=grad[0]),
        refused(op, "grad must be [B, .., 3], got (5, 2)", good, a0=grad[:, 1:]),
        refused(op, "weight must be [N, K], got (70,)", good, a1=weight[0]),
        refused(op, "weight must be of the input's type", good, a1=weight.double()),
    ]


def outer_refusals() -> list[Refusal]:
    op, good = "_task_outer", outer_sample((5,), 3, 70, 4, torch.float32).args
    grad, x, masks, task = good
    batch = "grad [B, .., N] and x [B, .., K] must"
    return [
        *masks_refusals(op, good, 2),
        *task_refusals(op, good, 3),
        refused(op, BEYOND, good, a2=overflowing(masks, int(task[1]))),
        refused(op, "grad must be float16, bfloat16, float32 or float64", good, a0=grad.int()),
        refused(op, "x must be float16, bfloat16, float32 or float64", good, a1=x.int()),
        refused(op, "x must be of the input's type", good, a1=x.double()),
        refused(op, f"{batch} have as many dimensions, got (3,) and (5, 70)", good, a0=grad[0]),
        refused(op, f"{batch} have as many dimensions, got (5, 1, 3) and (5, 70)", good, a0=grad[:, None]),
        refused(op, f"{batch} be of one batch, got (4, 3) and (5, 70)", good, a0=grad[1:]),
        refused(op, f"{batch} be of one batch, got (5, 2, 3) and (5, 1, 70)", good,
                a0=grad[:, None].expand(5, 2, 3), a1=x[:, None]),
    ]  # fmt: skip


def superposed_refusals() -> list[Refusal]:
    op, (x, weight, bits, _, bias) = "superposed_linear", linear_sample((5,), 3, 70, 4, torch.float32).args
    alpha = randn(4, dtype=torch.float32)

    def call(error: type[Exception], message: str, **changes: Any) -> Refusal:
        args = {"x": x, "weight": weight, "masks": bits, "alpha": alpha, "bias": bias, **changes}
        return Refusal(error, f"{op}: {message}", lambda: maskmm_superposed.superposed_linear(**args))

    return [
        *argument_refusals(call, x, weight, bits, bias),
        call(TypeError, "alpha must be a Tensor, got list", alpha=[1.0] * 4),
        call(TypeError, "alpha must be float16, bfloat16, float32 or float64, got int64", alpha=alpha.long()),
        call(ValueError, "alpha must be [4], one number per mask, got [3]", alpha=alpha[1:]),
        call(ValueError, "alpha must be [4], one number per mask, got []", alpha=alpha[0]),
        call(ValueError, "alpha is on meta, x on cpu; move one with .to()", alpha=alpha.to("meta")),
        call(ValueError, BEYOND, masks=overflowing(bits)),
        # In backward, where forward has not looked.
        Refusal(ValueError, f"{op}: {BEYOND}", lambda: torch.ops.fourfold._masked_dots(weight, weight, overflowing(bits))),
    ]


# ---- what the battery is fed ---------------------------------------------------------------------------------------------

SMALL = (((1,), 1, 1, 1), ((5,), 3, 6, 2), ((2, 3), 2, 4, 3))
ROWS_OF_ALL = {"exports": "grows one argument, and the rows of this one are those of the others"}

OPS = (
    Op(
        name="_superpose",
        call=lambda *args: maskmm_superposed._superpose(*args),  # noqa: PLW0108  (a function refuses out= as Python does)
        reference=reference.superpose,
        samples=lambda dtype: [superpose_sample(*shape, dtype) for shape in SHAPES],
        small=lambda: [superpose_sample(*shape, torch.float64) for shape in ((1, 1, 1), (3, 4, 2), (2, 66, 5))],
        sizes=lambda: [superpose_sample(*shape, torch.float32) for shape in ((5, 70, 3), (6, 129, 4), (9, 200, 9))],
        dynamic=(0, 1),
        large=lambda dtype: superpose_sample(300, 1000, 21, dtype),
        refusals=superpose_refusals,
        excused=ROWS_OF_ALL,
    ),
    Op(
        name="_masked_dots",
        call=lambda *args: maskmm_superposed._masked_dots(*args),  # noqa: PLW0108
        reference=reference.masked_dots,
        samples=dots_samples,
        small=lambda: [dots_sample(*shape, torch.float64) for shape in ((1, 1, 1), (3, 4, 2), (2, 66, 5))],
        sizes=lambda: [dots_sample(*shape, torch.float32) for shape in ((5, 70, 3), (6, 129, 4), (9, 200, 9))],
        dynamic=(0, 1),
        large=lambda dtype: dots_sample(300, 1000, 21, dtype),
        refusals=dots_refusals,
        dtypes=(torch.float32, torch.float64),
        excused=ROWS_OF_ALL,
    ),
    Op(
        name="task_linear",
        call=task_linear,
        reference=reference.task_linear,
        samples=linear_samples,
        small=lambda: [linear_sample(*batch, torch.float64, bias=i != 1) for i, batch in enumerate(SMALL)],
        sizes=lambda: [linear_sample(lead, 11, 70, 6, torch.float32) for lead in ((4, 3), (7, 5), (2, 9))],
        dynamic=(0, 1),
        large=lambda dtype: linear_sample((29,), 300, 400, 7, dtype),
        refusals=linear_refusals,
        autocast=in_bfloat16,
    ),
    Op(
        name="_task_linear_transposed",
        call=lambda *args: maskmm_superposed._task_linear_transposed(*args),  # noqa: PLW0108
        reference=reference.task_linear_transposed,
        samples=lambda dtype: [transposed_sample(*batch, dtype) for batch in BATCHES],
        small=lambda: [transposed_sample(*batch, torch.float64) for batch in SMALL],
        sizes=lambda: [transposed_sample(lead, 11, 70, 6, torch.float32) for lead in ((4, 3), (7, 5), (2, 9))],
        dynamic=(0, 1),
        large=lambda dtype: transposed_sample((29,), 300, 400, 7, dtype),
        refusals=transposed_refusals,
        excused=ROWS_OF_ALL,
    ),
    Op(
        name="_task_outer",
        call=lambda *args: maskmm_superposed._task_outer(*args),  # noqa: PLW0108
        reference=reference.task_outer,
        samples=lambda dtype: [outer_sample(*batch, dtype) for batch in BATCHES],
        small=lambda: [outer_sample(*batch, torch.float64) for batch in SMALL],
        sizes=lambda: [outer_sample(lead, 11, 70, 6, torch.float32) for lead in ((4, 3), (7, 5), (2, 9))],
        dynamic=(0, 1),
        large=lambda dtype: outer_sample((29,), 300, 400, 7, dtype),
        refusals=outer_refusals,
        excused=ROWS_OF_ALL,
    ),
)

test_op = battery.tests_of(OPS)


@pytest.mark.slow  # the kernel tests run on every tier in CI
@pytest.mark.skipif(len(battery.tiers()) < 2, reason="this machine has one tier")
def test_every_tier_agrees(tmp_path):
    battery.every_tier_agrees("test_maskmm_superposed", OPS, tmp_path)


@pytest.mark.parametrize("refusal", superposed_refusals(), ids=lambda refusal: refusal.message[:90])
def test_superposed_linear_refuses(refusal):
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    assert f"{caught.type.__name__}: {caught.value}" == f"{refusal.error.__name__}: {refusal.message}"


def test_every_raise_is_tested():
    more = [*superposed_refusals(), *infer_refusals()]
    assert battery.unreached_raises(OPS, maskmm_superposed, more) == []


# ---- superposed_linear ---------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("n", "k", "tasks"), [(5, 65, 8), (10, 784, 13), (3, 63, 1)])
def test_one_hot_alpha_is_the_mask_alone(dtype, n, k, tasks):
    """Bit for bit: the weight, and so the layer."""
    masks, weight, x = random_masks(n, k, tasks), randn(n, k, dtype=dtype), randn(4, k, dtype=dtype, seed=1)
    bias = randn(n, dtype=dtype)
    for t in range(tasks):
        alpha = F.one_hot(torch.tensor(t), tasks).to(battery.ACCUMULATE[dtype])
        battery.assert_same(maskmm_superposed._superpose(weight, pack(masks), alpha), weight * masks[t], f"weight {t}")
        y = maskmm_superposed.superposed_linear(x, weight, pack(masks), alpha, bias)
        battery.assert_same(y, F.linear(x, weight * masks[t], bias), f"task {t}")


@pytest.mark.parametrize("dtype", FLOATING)
def test_superposed_linear_is_its_definition(dtype):
    """Also with bool masks, and alpha of the weight's type."""
    masks, weight, x = random_masks(7, 70, 5), randn(7, 70, dtype=dtype), randn(2, 3, 70, dtype=dtype, seed=1)
    alpha, bias = randn(5).to(dtype), randn(7, dtype=dtype)
    effective = (weight.double() * torch.einsum("t,tnk->nk", alpha.double(), masks.double())).to(dtype)
    exact = F.linear(x.double(), effective.double(), bias.double())
    for given in (masks, pack(masks)):
        y = maskmm_superposed.superposed_linear(x, weight, given, alpha, bias)
        assert y.dtype == dtype
        battery.assert_close(y, exact, f"{given.dtype}", slack=2)


def test_superposed_linear_learns_alpha():
    """All gradients at once, of both orders, through the layer."""
    masks, x = random_masks(3, 5, 4), randn(2, 5)
    leaves = tuple(randn(*size, seed=7).requires_grad_() for size in ((3, 5), (4,), (3,)))

    def layer(weight: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
        return maskmm_superposed.superposed_linear(x, weight, masks, alpha, bias)

    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)


def test_superposed_linear_in_autocast():
    """The weight is superposed in float32 and then rounded; alpha's gradient is float32."""
    masks, weight, x = packed(7, 70, 5), randn(7, 70, dtype=torch.float32), randn(2, 70, dtype=torch.float32, seed=1)
    alpha = randn(5, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = maskmm_superposed.superposed_linear(x, weight, masks, alpha)
    effective = maskmm_superposed._superpose(weight, masks, alpha.detach())
    battery.assert_same(y, F.linear(x.bfloat16(), effective.bfloat16()), "autocast")
    y.sum().backward()
    assert alpha.grad.dtype == torch.float32
    grad = x.bfloat16().sum(0).expand(7, 70)
    exact = reference.masked_dots(grad.double(), weight.double(), masks)
    torch.testing.assert_close(alpha.grad.double(), exact, rtol=0.02, atol=0.02)


def test_superposed_linear_compiles_in_one_graph():
    masks, weight, x = packed(7, 70, 5), randn(7, 70), randn(2, 70, seed=1)
    alpha = randn(5)
    torch.compiler.reset()
    compiled = torch.compile(maskmm_superposed.superposed_linear, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in (x, weight, alpha)]
    eager = [t.clone().requires_grad_() for t in (x, weight, alpha)]
    y = compiled(leaves[0], leaves[1], masks, leaves[2])
    expected = maskmm_superposed.superposed_linear(eager[0], eager[1], masks, eager[2])
    battery.assert_same(y, expected, "forward")
    y.sin().sum().backward()
    expected.sin().sum().backward()
    for leaf, other in zip(leaves, eager, strict=True):
        battery.assert_same(leaf.grad, other.grad, "gradient")


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
def test_2500_masks(dtype):
    """As many as the paper's longest run, and a task among them."""
    n, k, tasks = 3, 65, 2500
    masks, weight, x = random_masks(n, k, tasks), randn(n, k, dtype=dtype), randn(6, k, dtype=dtype, seed=1)
    bits, kind = pack(masks), battery.ACCUMULATE[dtype]
    alpha = torch.full((tasks,), 1 / tasks, dtype=kind)
    effective = maskmm_superposed._superpose(weight, bits, alpha)
    battery.assert_close(effective, reference.superpose(weight.double(), bits, alpha.double()), "superpose", slack=4)
    dots = maskmm_superposed._masked_dots(weight, weight, bits)
    battery.assert_close(dots, reference.masked_dots(weight.double(), weight.double(), bits), "dots")
    task = torch.tensor([2499, 0, 1250, 2499, 7, 1250])
    y = maskmm_superposed.task_linear(x, weight, bits, task)
    exact = torch.einsum("bk,bnk->bn", x.double(), masks[task] * weight.double())
    battery.assert_close(y, exact, "task_linear")


@pytest.mark.kernel
def test_a_mask_selects():
    """What lies off every mask in use does not count, NaN and infinity neither; where alpha adds up to 0 they do."""
    masks = torch.tensor([[[True, False, True]], [[True, False, False]]])
    weight = torch.tensor([[2.0, float("nan"), float("inf")]])
    bits = pack(masks)
    dots = maskmm_superposed._masked_dots(weight, torch.ones(1, 3), bits)
    battery.assert_same(dots, torch.tensor([float("inf"), 2.0]), "dots")
    y = maskmm_superposed.task_linear(torch.ones(2, 3), weight, bits, torch.tensor([0, 1]))
    battery.assert_same(y, torch.tensor([[float("inf")], [2.0]]), "task_linear")
    grad = maskmm_superposed._task_outer(torch.full((1, 1), float("nan")), torch.ones(1, 3), bits, torch.tensor([1]))
    battery.assert_same(grad, torch.tensor([[float("nan"), 0.0, 0.0]]), "gradient of the weight")
    effective = maskmm_superposed._superpose(weight, bits, torch.tensor([1.0, float("nan")]))
    battery.assert_same(effective, torch.tensor([[float("nan"), float("nan"), float("inf")]]), "alpha off the mask")


# ---- task_linear ---------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("lead", "tasks"), [((8,), 8), ((23,), 3), ((6, 5), 2), ((1,), 4)])
def test_a_sample_does_not_depend_on_its_batch(dtype, lead, tasks):
    """The results, and the gradient of x, have the bits of each sample alone."""
    x, weight, bits, task, bias = linear_sample(lead, 9, 141, tasks, dtype).args
    grad = randn(*lead, 9, dtype=dtype, seed=5)
    y = maskmm_superposed.task_linear(x, weight, bits, task, bias)
    grad_x = maskmm_superposed._task_linear_transposed(grad, weight, bits, task)
    for b in range(lead[0]):
        one = slice(b, b + 1)
        battery.assert_same(maskmm_superposed.task_linear(x[one], weight, bits, task[one], bias), y[one], f"sample {b}")
        # The mask alone, as a bank of one.
        alone = maskmm_superposed.task_linear(x[one], weight, bits[task[one]], torch.zeros(1, dtype=torch.int64), bias)
        battery.assert_same(alone, y[one], f"sample {b}, its mask alone")
        of_one = maskmm_superposed._task_linear_transposed(grad[one], weight, bits, task[one])
        battery.assert_same(of_one, grad_x[one], f"gradient of sample {b}")


def test_weight_gradient_is_zero_off_the_mask():
    """Exactly, so that no optimizer moves a weight that no task of the batch wears."""
    x, weight, _, _, _ = linear_sample((6,), 4, 66, 3, torch.float32).args
    masks = random_masks(4, 66, 3)
    masks[0] = masks[1]
    weight.requires_grad_()
    task = torch.tensor([0, 1, 2, 2, 1, 0])
    (maskmm_superposed.task_linear(x, weight, masks, task) * float("inf")).sum().backward()
    worn = masks.any(0)
    assert bool((weight.grad[~worn] == 0).all())
    assert bool((weight.grad[worn] != 0).all())


def test_task_linear_takes_bool_masks():
    x, weight, bits, task, bias = linear_sample((5,), 4, 66, 3, torch.float32).args
    masks = random_masks(4, 66, 3)
    expected = maskmm_superposed.task_linear(x, weight, bits, task, bias)
    battery.assert_same(maskmm_superposed.task_linear(x, weight, masks, task, bias), expected, "bool")


def test_pad_bits_of_other_tasks_are_not_looked_at():
    x, weight, bits, task, bias = linear_sample((5,), 3, 70, 4, torch.float32).args
    other = overflowing(bits, 3)
    task = task % 3
    expected = maskmm_superposed.task_linear(x, weight, bits, task, bias)
    battery.assert_same(maskmm_superposed.task_linear(x, weight, other, task, bias), expected, "task_linear")


# ---- infer_task ----------------------------------------------------------------------------------------------------------


class Superposed(torch.nn.Module):
    """The least that infer_task asks of a layer."""

    def __init__(self, weight: Tensor, masks: Tensor, alpha: str = "buffer") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.register_buffer("mask_bits", pack(masks))
        values = torch.full((len(masks),), 1 / max(1, len(masks)), dtype=weight.dtype)
        if alpha == "buffer":
            self.register_buffer("alpha", values)
        else:
            self.alpha = torch.nn.Parameter(values) if alpha == "parameter" else values

    def forward(self, x: Tensor) -> Tensor:
        return maskmm_superposed.superposed_linear(x, self.weight, self.mask_bits, self.alpha)


WIDTH = 8


def blocks(tasks: int, dtype: torch.dtype = torch.float32, alpha: str = "buffer") -> Superposed:
    """Task t wears block t of the columns: data in that block alone tells classes apart under that mask alone."""
    generator = torch.Generator().manual_seed(tasks)
    weight = 3 * torch.randn(5, tasks * WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    own = torch.arange(tasks * WIDTH) // WIDTH == torch.arange(tasks)[:, None]
    return Superposed(weight, own[:, None].expand(tasks, 5, tasks * WIDTH), alpha)


def of_task(t: int, tasks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.zeros(16, tasks, WIDTH, dtype=dtype)
    x[:, t] = randn(16, WIDTH, dtype=dtype, seed=t)
    return x.flatten(1)


@pytest.mark.parametrize("method", maskmm_superposed.METHODS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_infer_task_finds_the_task(method, dtype):
    tasks = 11
    model = blocks(tasks, dtype)
    found = [maskmm_superposed.infer_task(model, of_task(t, tasks, dtype), method=method) for t in range(tasks)]
    assert found == list(range(tasks))
    assert all(type(t) is int for t in found)


@pytest.mark.parametrize("method", maskmm_superposed.METHODS)
def test_infer_task_is_the_steepest_fall_of_entropy(method):
    """By its definition, on a network of two layers and masks without order."""
    tasks = 6
    masks = random_masks(20, 30, tasks), random_masks(7, 20, tasks)
    masks[0][0], masks[1][0] = masks[0][1].roll(1), masks[1][1].roll(1)
    first, second = (Superposed(randn(*m.shape[1:]), m) for m in masks)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    for seed in range(5):
        x = randn(9, 30, seed=seed)
        alive = list(range(tasks))
        passes = 0
        while len(alive) > 1:
            alpha = torch.tensor([(t in alive) / len(alive) for t in range(tasks)], dtype=torch.float64).requires_grad_()
            hidden = F.linear(x, first.weight * torch.einsum("t,tnk->nk", alpha, masks[0].double())).relu()
            p = F.linear(hidden, second.weight * torch.einsum("t,tnk->nk", alpha, masks[1].double())).softmax(-1)
            (slope,) = torch.autograd.grad(torch.special.entr(p).sum(-1).mean(), alpha)
            alive = sorted(alive, key=lambda t: float(slope[t]))
            alive = alive[: 1 if method == "oneshot" else -(-len(alive) // 2)]
            passes += 1
        assert passes == (1 if method == "oneshot" else 3)
        assert maskmm_superposed.infer_task(model, x, method=method) == alive[0]


@pytest.mark.parametrize("method", maskmm_superposed.METHODS)
def test_infer_task_takes_the_lowest_of_equals(method):
    masks = random_masks(4, 9, 5)
    masks[:] = masks[1]
    model = Superposed(randn(4, 9, dtype=torch.float32), masks)
    assert maskmm_superposed.infer_task(model, randn(3, 9, dtype=torch.float32), method=method) == 0


@pytest.mark.parametrize("alpha", ["buffer", "parameter", "attribute"])
def test_infer_task_leaves_the_model_as_it_was(alpha):
    model = blocks(4, alpha=alpha)
    own, mode, values = model.alpha, model.train(), model.alpha.detach().clone()
    assert maskmm_superposed.infer_task(model, of_task(2, 4)) == 2
    assert model.alpha is own
    battery.assert_same(model.alpha.detach(), values, "alpha")
    assert mode.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(model.state_dict()) == list(blocks(4, alpha=alpha).state_dict())
    failing = torch.nn.Sequential(model, torch.nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes"):
        maskmm_superposed.infer_task(failing, of_task(2, 4))
    assert model.alpha is own


def test_infer_task_needs_no_gradient_outside():
    """Under no_grad and inference_mode, of a model whose parameters are frozen."""
    model = blocks(4).requires_grad_(False)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert maskmm_superposed.infer_task(model, of_task(3, 4) * 1) == 3
            assert torch.is_grad_enabled() is False


def test_infer_task_of_one_task_runs_nothing():
    model = blocks(1)
    model.forward = pytest.fail
    assert maskmm_superposed.infer_task(model, of_task(0, 1)) == 0


def test_infer_task_bears_ruled_out_classes():
    """A logit of -infinity is a class of probability 0, not a NaN."""
    model = blocks(3)
    ruled_out = torch.tensor([0.0, 0.0, -float("inf"), 0.0, 0.0])
    model.register_forward_hook(lambda module, args, y: y + ruled_out)
    assert [maskmm_superposed.infer_task(model, of_task(t, 3)) for t in range(3)] == [0, 1, 2]


def infer_refusals() -> list[Refusal]:
    model, x = blocks(3), of_task(0, 3)
    sequence = torch.nn.Sequential(blocks(3), torch.nn.Linear(5, 5))
    uneven = torch.nn.Sequential(blocks(3), Superposed(randn(5, 5, dtype=torch.float32), random_masks(5, 5, 2)))
    empty = Superposed(randn(5, 5, dtype=torch.float32), random_masks(5, 5, 1)[:0])
    asleep = torch.nn.Sequential(blocks(3))
    asleep.forward = torch.nn.Linear(24, 5).forward

    def call(error: type[Exception], message: str, *args: Any, **options: Any) -> Refusal:
        return Refusal(error, f"infer_task: {message}", lambda: maskmm_superposed.infer_task(*args, **options))

    class Answer(torch.nn.Module):
        """A model that gives this whatever comes."""

        def __init__(self, answer: Any) -> None:
            super().__init__()
            self.layer, self.answer = blocks(3), answer

        def forward(self, x: Tensor) -> Any:
            return self.answer

    same = "every layer must hold the same number of masks, at least one, got"
    unmoved = "model(x) does not depend on alpha; it must run its superposed layers without a task"
    return [
        call(TypeError, "model must be a torch.nn.Module, got function", of_task, x),
        call(TypeError, "method must be one of ('oneshot', 'binary'), got 1", model, x, method=1),
        call(ValueError, "method must be one of ('oneshot', 'binary'), got 'g'", model, x, method="g"),
        call(
            ValueError,
            "model has no layer with superposed masks; make one with nn.SuperposedLinear.from_linear",
            sequence[1],
            x,
        ),
        call(ValueError, f"{same} [2, 3]", uneven, x),
        call(ValueError, f"{same} [0]", empty, x),
        call(TypeError, "model(x) must be a Tensor, got list", Answer([1.0]), x),
        call(TypeError, "model(x) must be float16, bfloat16, float32 or float64, got int64", Answer(torch.tensor([1])), x),
        call(ValueError, "model(x) must be [.., classes] and not empty, got ()", Answer(torch.tensor(1.0)), x),
        call(ValueError, "model(x) must be [.., classes] and not empty, got (0, 5)", model, x[:0]),
        call(ValueError, unmoved, Answer(torch.ones(3)), x),
        call(ValueError, unmoved, asleep, x),
        call(
            ValueError,
            "the entropy of model(x) has no finite gradient; look for NaN in x and in the weights",
            model,
            x * float("nan"),
        ),
    ]


@pytest.mark.parametrize("refusal", infer_refusals(), ids=lambda refusal: refusal.message[:90])
def test_infer_task_refuses(refusal):
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    assert f"{caught.type.__name__}: {caught.value}" == f"{refusal.error.__name__}: {refusal.message}"
