"""Superposed supermasks: masks of many tasks over one weight, against the masks of numbers of SupSup's formulation.

Published (Wortsman et al., 2020): all masks stacked as float32, times a number per task, summed, times the weight; autograd
finds the gradient of these numbers. The same sum is a matrix product, which is how one would rewrite it. The rivals' masks lie
ready in the form that each one wants.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import fourfold as ff
import torch
import torch.nn.functional as F
from fourfold.reference import maskmm as reference
from torch import Tensor

from . import cases as shapes
from .harness import Call, Case, Contestant, Settings, Tolerance, in_fresh_memory, with_backward

FAMILY = "maskmm"
# A gradient of alpha sums up N x K products.
FLOAT32 = Tolerance(1e-4, 1e-5, of_rms=True)
DENSITY = 0.5  # of a mask, as SupSup's threshold on symmetric scores leaves it


def random_masks(count: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Bool [count, *shape]."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.rand(shape, generator=generator) < DENSITY for _ in range(count)]).to(device)


def pack_masks(masks: Tensor) -> Tensor:
    return torch.stack([reference.pack_mask(mask) for mask in masks])


# --- all masks at once ----------------------------------------------------------------------------------------------------


class Superposition:
    """A layer with the masks of many tasks, and a batch whose task is asked for."""

    def __init__(self, place: shapes.Linear, tasks: int, gradient: bool, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.place, shape = place, (place.rows, place.columns)
        self.bools = random_masks(tasks, shape, device)
        self.bits, self.numbers = pack_masks(self.bools), self.bools.float()
        self.x = torch.randn(place.batch, place.columns, generator=generator).to(device)
        self.weight = (torch.randn(shape, generator=generator) / math.sqrt(place.columns)).to(device)
        self.grad = torch.randn(place.batch, place.rows, generator=generator).to(device)
        self.alpha = torch.rand(tasks, generator=generator).to(device).requires_grad_(gradient)

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


def _with_alpha(p: Superposition, forward: Callable[[], Tensor]) -> Call:
    """The result and the gradient of alpha."""

    def call() -> tuple[Tensor, ...]:
        y = forward()
        return y, *torch.autograd.grad(y, [p.alpha], p.grad)

    return call


def superposed_ours(p: Superposition, state: str) -> Call:
    return _with_alpha(p, lambda: ff.superposed_linear(p.x, p.weight, p.bits, p.alpha))


def published(masks: Tensor, alpha: Tensor) -> Tensor:
    """Each mask times its number: as large as all masks."""
    return (alpha[:, None, None] * masks).sum(0)


def einsum(masks: Tensor, alpha: Tensor) -> Tensor:
    return torch.einsum("t,tnk->nk", alpha, masks)


def tensordot(masks: Tensor, alpha: Tensor) -> Tensor:
    return torch.tensordot(alpha, masks, dims=1)


def matvec(masks: Tensor, alpha: Tensor) -> Tensor:
    """Of all weights as rows, tasks as columns."""
    return torch.mv(masks.flatten(1).t(), alpha).view(masks.shape[1:])


def superposed(summed: Callable[[Tensor, Tensor], Tensor], compiled: bool = False) -> Callable[[Superposition, str], Call]:
    """The weight times a sum of masks, and autograd."""

    def make(p: Superposition, state: str) -> Call:
        def forward() -> Tensor:
            return F.linear(p.x, p.weight * summed(p.numbers, p.alpha))

        return _with_alpha(p, torch.compile(forward, dynamic=False, fullgraph=True) if compiled else forward)

    return make


def superposed_exactly(p: Superposition) -> list[Tensor]:
    """In float64, mask by mask: all of them would not fit."""
    weight = p.weight.double()
    total = torch.zeros_like(weight)
    for mask, a in zip(p.bools, p.alpha.detach().double(), strict=True):
        total += mask * a
    of_total = (p.grad.double().t() @ p.x.double()) * weight
    return [F.linear(p.x.double(), weight * total), torch.stack([of_total[mask].sum() for mask in p.bools])]


def _superposition(settings: Settings, place: shapes.Linear, tasks: int, **flags: bool) -> Case:
    rivals = [
        Contestant("stacked float masks, as published", superposed(published)),
        Contestant("tensordot", superposed(tensordot)),
        Contestant("einsum", superposed(einsum)),
        Contestant("matrix times vector", superposed(matvec)),
    ]
    if settings.compiles:
        rivals.append(Contestant("stacked float masks, compiled", superposed(published, compiled=True)))
    m, n, k = place.batch, place.rows, place.columns
    return Case(
        family=FAMILY,
        op="superposed_linear",
        label=f"{place}, {tasks} masks, gradient of alpha",
        problem=functools.partial(Superposition, place, tasks, True),
        reference=superposed_exactly,
        ours=Contestant("fourfold", superposed_ours),
        rivals=tuple(rivals),
        tolerance=FLOAT32,
        held=Superposition.tensors,
        state="heap",
        bytes=2 * tasks * n * k // 8 + 4 * (2 * n * k + 2 * m * k + 2 * m * n),
        flops=4 * m * n * k,
        source=place.source,
        **flags,
    )


# --- a mask per sample ----------------------------------------------------------------------------------------------------


class Samples:
    """A batch in which every sample wears the mask of its own task."""

    def __init__(self, place: shapes.Linear, tasks: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (place.rows, place.columns)
        self.bools = random_masks(tasks, shape, device)
        self.bits, self.numbers = pack_masks(self.bools), self.bools.float()
        self.x = torch.randn(place.batch, place.columns, generator=generator).to(device)
        self.weight = (torch.randn(shape, generator=generator) / math.sqrt(place.columns)).to(device)
        self.task = torch.randint(tasks, (place.batch,), generator=generator).to(device)

    def clone(self) -> Tensor:
        return self.x.clone()


def tasks_ours(p: Samples, state: str) -> Call:
    return lambda: ff.task_linear(p.x, p.weight, p.bits, p.task)


def by_bmm(p: Samples, state: str) -> Call:
    """A masked weight for each sample."""
    return lambda: torch.bmm(p.weight * p.numbers[p.task], p.x[..., None])[..., 0]


def by_bmm_compiled(p: Samples, state: str) -> Call:
    return torch.compile(by_bmm(p, state), dynamic=False, fullgraph=True)


def _by_task(p: Samples, weight_of: Callable[[int], Tensor]) -> Call:
    def call() -> Tensor:
        y = torch.empty(len(p.x), len(p.weight), device=p.x.device)
        for task in p.task.unique().tolist():
            rows = (p.task == task).nonzero()[:, 0]
            y[rows] = F.linear(p.x[rows], weight_of(task))
        return y

    return call


def by_task(p: Samples, state: str) -> Call:
    """The samples of a task together."""
    return _by_task(p, lambda task: p.weight * p.numbers[task])


def by_task_kept(p: Samples, state: str) -> Call:
    """With a masked weight in memory for every task: 32 times the masks as bits."""
    kept = p.numbers * p.weight
    return _by_task(p, lambda task: kept[task])


def _tasks_exactly(p: Samples) -> Tensor:
    weight = p.weight.double()
    return torch.stack([(weight * p.bools[t]) @ x for t, x in zip(p.task.tolist(), p.x.double(), strict=True)])


def _samples(settings: Settings, place: shapes.Linear, tasks: int, **flags: bool) -> Case:
    rivals = [
        Contestant("group by task", by_task),
        Contestant("group by task, every masked weight kept", by_task_kept),
    ]
    # With 256 samples bmm takes seconds, and gigabytes.
    few = place.batch <= 64 and not (settings.quick and place.batch > 8)
    rivals += [Contestant("bmm", by_bmm)] * few
    rivals += [Contestant("bmm, compiled", by_bmm_compiled)] * (few and settings.compiles)
    m, n, k = place.batch, place.rows, place.columns
    return Case(
        family=FAMILY,
        op="task_linear",
        label=f"{place}, {tasks} tasks",
        problem=functools.partial(Samples, place, tasks),
        reference=_tasks_exactly,
        ours=Contestant("fourfold", tasks_ours),
        rivals=tuple(rivals),
        tolerance=FLOAT32,
        state="heap",
        bytes=min(m, tasks) * n * k // 8 + 4 * (n * k + m * k + m * n),
        flops=2 * m * n * k,
        source=place.source,
        **flags,
    )


class TrainedSamples(Samples):
    """With gradients of x and of the weight that all tasks share."""

    def __init__(self, place: shapes.Linear, tasks: int, device: torch.device) -> None:
        super().__init__(place, tasks, device)
        self.grad = torch.randn(place.batch, place.rows, generator=torch.Generator().manual_seed(1)).to(device)
        for leaf in (self.x, self.weight):
            leaf.requires_grad_()

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


def _training(make: Callable[[Samples, str], Call]) -> Callable[[TrainedSamples, str], Call]:
    return lambda p, state: with_backward(make(p, state), [p.weight, p.x], [p.grad])


def _tasks_with_gradients(p: TrainedSamples) -> list[Tensor]:
    weight, of_weight, rows = p.weight.detach().double(), torch.zeros_like(p.weight, dtype=torch.float64), []
    for task, x, grad in zip(p.task.tolist(), p.x.detach().double(), p.grad.double(), strict=True):
        of_weight += torch.outer(grad, x) * p.bools[task]
        masked = weight * p.bools[task]
        rows.append((masked @ x, masked.t() @ grad))
    y, of_x = (torch.stack(part) for part in zip(*rows, strict=True))
    return [y, of_weight, of_x]


def _samples_training(settings: Settings, place: shapes.Linear, tasks: int) -> Case:
    # Whoever keeps masked weights beforehand has no weight to train.
    case = _samples(settings, place, tasks)
    return dataclasses.replace(
        case,
        label=f"{case.label}, forward and backward",
        problem=functools.partial(TrainedSamples, place, tasks),
        reference=_tasks_with_gradients,
        ours=Contestant("fourfold", _training(tasks_ours)),
        rivals=tuple(Contestant(rival.name, _training(rival.make)) for rival in case.rivals if rival.make is not by_task_kept),
        held=TrainedSamples.tensors,
        bytes=3 * case.bytes,
        flops=3 * case.flops,
    )


# --- which task is this? --------------------------------------------------------------------------------------------------


class _Stacked(torch.nn.Module):
    """A layer whose masks are stacked numbers, as published, or whose sum of masks is a product."""

    def __init__(self, weight: Tensor, masks: Tensor, summed: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.masks, self.summed = weight, masks, summed
        self.alpha = weight.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.summed(self.masks, self.alpha))


class Network:
    """Fully connected layers with the masks of many tasks, and a batch of one task."""

    def __init__(self, widths: tuple[int, ...], batch: int, tasks: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tasks, self.device = tasks, device
        self.x = torch.randn(batch, widths[0], generator=generator).to(device)
        self.weights, self.masks = [], []
        for k, n in itertools.pairwise(widths):
            signs = torch.randint(2, (n, k), generator=generator) * 2 - 1
            self.weights.append((signs / math.sqrt(k * DENSITY)).to(device))  # SupSup's signed constants
            self.masks.append(random_masks(tasks, (n, k), device))

    @functools.cached_property
    def numbers(self) -> list[Tensor]:
        return [masks.float() for masks in self.masks]

    def stacked(self, summed: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> torch.nn.Sequential:
        pairs = zip(self.weights, self.numbers, strict=True)
        return _with_relus([_Stacked(weight.to(dtype), masks.to(dtype), summed) for weight, masks in pairs])


def _with_relus(layers: list[torch.nn.Module]) -> torch.nn.Sequential:
    between = [part for layer in layers for part in (layer, torch.nn.ReLU())]
    return torch.nn.Sequential(*between[:-1])


def _falls_fastest(p: Network, model: torch.nn.Sequential) -> Tensor:
    """One-shot: the task along which the entropy falls fastest."""
    alpha = torch.full((p.tasks,), 1 / p.tasks, device=p.device, dtype=model[0].weight.dtype, requires_grad=True)
    for layer in model:
        if isinstance(layer, _Stacked):
            layer.alpha = alpha
    log_p = model(p.x.to(alpha.dtype)).log_softmax(-1)
    (slope,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(-1).mean(), alpha)
    return slope.argmin()[None]


def infer_ours(p: Network, state: str) -> Call:
    layers = []
    for weight, masks in zip(p.weights, p.masks, strict=True):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=p.device)
        linear.weight = torch.nn.Parameter(weight)
        layers.append(ff.nn.SuperposedLinear.from_linear(linear, masks))
    model = _with_relus(layers).eval()
    return lambda: ff.infer_task(model, p.x)


def infer_by(summed: Callable[[Tensor, Tensor], Tensor], compiled: bool = False) -> Callable[[Network, str], Call]:
    def make(p: Network, state: str) -> Call:
        model = p.stacked(summed, torch.float32)
        if compiled:
            model.compile(dynamic=False, fullgraph=True)
        return lambda: int(_falls_fastest(p, model))

    return make


def _as_tensor(task: int) -> Tensor:
    return torch.tensor([task])


def _inferred_exactly(p: Network) -> Tensor:
    return _falls_fastest(p, p.stacked(einsum, torch.float64)).double()


def _inference(settings: Settings, widths: tuple[int, ...], tasks: int, source: str, **flags: bool) -> Case:
    rivals = [("stacked float masks, as published", published), ("tensordot", tensordot), ("matrix times vector", matvec)]
    weights = sum(k * n for k, n in itertools.pairwise(widths))
    entrants = [Contestant(name, infer_by(summed), tensors=_as_tensor) for name, summed in rivals]
    if settings.compiles:
        entrants.append(Contestant("stacked float masks, compiled", infer_by(published, compiled=True), tensors=_as_tensor))
    return Case(
        family=FAMILY,
        op="infer_task",
        label=f"{'-'.join(map(str, widths))}, {tasks} tasks, batch 16",
        problem=functools.partial(Network, widths, 16, tasks),
        reference=_inferred_exactly,
        ours=Contestant("fourfold", infer_ours, tensors=_as_tensor),
        rivals=tuple(entrants),
        tolerance=Tolerance(0.0, 0.0),
        state="heap",
        bytes=2 * tasks * weights // 8 + 8 * weights,
        flops=16 * 6 * weights,
        source=source,
        **flags,
    )


# --- call overhead --------------------------------------------------------------------------------------------------------

TINY = "so small that only the call costs"


def _overheads() -> Iterator[Case]:
    place, tasks = shapes.Linear(8, 64, 1, TINY), 2
    given = {"family": FAMILY, "rivals": (), "state": "heap", "source": TINY, "quick": True, "overhead": True}

    def summed_beforehand(p: Superposition) -> Tensor:
        return p.weight * published(p.numbers, p.alpha.detach())

    def linear(p: Superposition, state: str) -> Call:
        weight = summed_beforehand(p)
        return lambda: F.linear(p.x, weight)

    for gradient in (False, True):
        yield Case(
            op="superposed_linear",
            label=f"float32 {place}, {tasks} masks" + ", gradient recorded" * gradient,
            problem=functools.partial(Superposition, place, tasks, gradient),
            reference=lambda p: superposed_exactly(p)[:1],
            ours=Contestant("fourfold", lambda p, state: lambda: ff.superposed_linear(p.x, p.weight, p.bits, p.alpha)),
            tolerance=FLOAT32,
            yardsticks=(Contestant("F.linear", linear, reference=lambda p: superposed_exactly(p)[:1]),),
            **given,
        )
    yield Case(
        op="task_linear",
        label=f"float32 {place}, {tasks} tasks",
        problem=functools.partial(Samples, place, tasks),
        reference=_tasks_exactly,
        ours=Contestant("fourfold", tasks_ours),
        tolerance=FLOAT32,
        overhead_goal=12.0,
        **given,
    )
    yield Case(
        op="infer_task",
        label=f"64-8, {tasks} tasks, batch 1",
        problem=functools.partial(Network, (64, 8), 1, tasks),
        reference=_inferred_exactly,
        ours=Contestant("fourfold", infer_ours, tensors=_as_tensor),
        tolerance=Tolerance(0.0, 0.0),
        yardsticks=(Contestant("torch operations", infer_by(published), tensors=_as_tensor),),
        **given,
    )


# --- what the harness asks for --------------------------------------------------------------------------------------------


def cases(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for place in shapes.random_linears(settings.seed):
            yield _superposition(settings, place, 10, quick=True)
            yield _samples(settings, place, 10, quick=True)
        return
    yield from _overheads()
    for tasks in (10, 100):
        few = tasks == 10
        yield _superposition(settings, shapes.SUPSUP, tasks, quick=few)
    for tasks in (10, 100):
        for batch in (8, 64, 256):
            quick = tasks == 10 and batch == 8
            yield _samples(settings, shapes.SUPSUP._replace(batch=batch), tasks, quick=quick)
    yield _samples_training(settings, shapes.SUPSUP._replace(batch=64), 10)
    yield in_fresh_memory(_superposition(settings, shapes.SUPSUP, 10))
    yield in_fresh_memory(_samples(settings, shapes.SUPSUP._replace(batch=64), 10))
    source = "SupSup on permuted MNIST; its task inference in batches of 16"
    for widths in ((784, 300, 100, 10), (784, 1024, 1024, 10)):
        for tasks in (10, 100):
            quick = widths[1] == 300 and tasks == 10
            yield _inference(settings, widths, tasks, source, quick=quick)
    yield in_fresh_memory(_inference(settings, (784, 1024, 1024, 10), 10, source))


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
