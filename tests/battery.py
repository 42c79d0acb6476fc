"""The battery that every op must pass.

A family declares its ops in ``tests/test_<family>.py`` as a tuple ``OPS`` of `Op` and says ``test_op = battery.tests_of(OPS)``:
one test per op and check. ``tests/test_battery.py`` shows each check failing on an op that is broken in just that way.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import importlib
import inspect
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Allowed error as (share of the exact value, share of the largest exact value). The second one is for cancellation. 16-bit
# results are computed in float32 and rounded once, so half a unit in their last place is all they may be off on top of that.
TOLERANCE = {
    torch.float16: (2.0**-11, 2e-6),
    torch.bfloat16: (2.0**-8, 2e-6),
    torch.float32: (1e-6, 2e-6),
    torch.float64: (1e-14, 1e-14),
    torch.uint8: (0.0, 0.0),
    torch.bool: (0.0, 0.0),
}

ACCUMULATE = {**dict.fromkeys(FLOATING, torch.float32), torch.float64: torch.float64}


# ---- what a family declares ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call of an op."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def replace(self, change: Callable[[Tensor], Tensor], only: int | None = None) -> Sample:
        """With all its tensors, or the one of that number, changed."""
        flat, structure = tree_flatten((self.args, self.kwargs))
        places = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
        for i in places if only is None else [places[only]]:
            flat[i] = change(flat[i])
        args, kwargs = tree_unflatten(flat, structure)
        return Sample(self.label, args, kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in tree_flatten((self.args, self.kwargs))[0] if isinstance(value, Tensor)]

    def double(self) -> Sample:
        return self.replace(lambda t: t.double() if t.is_floating_point() else t)

    def requiring_grad(self) -> Sample:
        return self.replace(lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t)

    def run(self, call: Callable[..., Any], **more: Any) -> Any:
        return call(*self.args, **self.kwargs, **more)

    def of_floats(self, call: Callable[..., Any], without: int | None = None) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """The call as a function of the sample's floating tensors alone, and these; but for the argument of that place."""
        flat, structure = tree_flatten((self.args, self.kwargs))
        fixed = None if without is None else self.args[without]
        places = [
            i for i, value in enumerate(flat) if isinstance(value, Tensor) and value.is_floating_point() and value is not fixed
        ]

        def function(*tensors: Tensor) -> Any:
            values = list(flat)
            for i, tensor in zip(places, tensors, strict=True):
                values[i] = tensor
            args, kwargs = tree_unflatten(values, structure)
            return call(*args, **kwargs)

        return function, tuple(flat[i] for i in places)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A wrong call, and the error it gets, word for word."""

    error: type[Exception]
    message: str
    call: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Op:
    """What the battery must know of an op."""

    name: str  # in torch.ops.fourfold
    call: Callable[..., Tensor]  # the public function; of an internal op, the function that ops/ calls it by
    reference: Callable[..., Tensor]  # takes what `call` takes; plain torch, float64 for float64 tensors
    samples: Callable[[torch.dtype], list[Sample]]  # results of that dtype: layouts, options, odd and empty sizes
    small: Callable[[], list[Sample]]  # float64 and tiny, each way of being differentiable
    sizes: Callable[[], list[Sample]]  # float32, the same call with args[0] in several sizes of every dynamic dimension
    dynamic: tuple[int, ...]  # those dimensions
    large: Callable[[torch.dtype], Sample]  # work for several threads, and results larger than the caches
    refusals: Callable[[], list[Refusal]]
    out: str | None = None  # the op behind out=, if there is one
    dtypes: tuple[torch.dtype, ...] = FLOATING  # of the results
    differentiable: bool = True  # internal ops may have no gradient formula: they serve inside those of others
    straight_through: int | None = None  # the argument that results depend on by steps: its gradient is the reference's
    autocast: Callable[..., Tensor] | None = None  # what autocast to bfloat16 makes of a call, if it makes a difference
    excused: dict[str, str] = dataclasses.field(default_factory=dict)  # checks that ask too much of an internal op: why

    @property
    def internal(self) -> bool:
        return self.name.startswith("_")

    @property
    def floating(self) -> bool:
        """Whether it gives numbers: bits have no gradient and hold no NaN."""
        return all(dtype.is_floating_point for dtype in self.dtypes)

    def all_samples(self) -> Iterator[tuple[torch.dtype, Sample]]:
        for dtype in self.dtypes:
            for sample in self.samples(dtype):
                yield dtype, sample


# ---- comparing -----------------------------------------------------------------------------------------------------------


def without_page(error: BaseException) -> str:
    """What it says, without the page that explains it: tests/test_docs.py looks at these."""
    return str(error).partition(" (see docs/")[0]


def assert_close(
    actual: Tensor, exact: Tensor, label: str, *, slack: float = 1.0, computed_in: torch.dtype = torch.float64
) -> None:
    """actual against a float64 result, within the tolerance of its dtype, or of the coarser one that it was computed in; NaN
    where and only where the exact one is NaN."""
    assert actual.shape == exact.shape, f"{label}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    rtol, share = map(max, TOLERANCE[actual.dtype], TOLERANCE[computed_in])
    exact = exact.double()
    magnitude = exact.abs().nan_to_num(0.0).max().item() if exact.numel() else 0.0
    limits = {"rtol": slack * rtol, "atol": slack * share * max(magnitude, 1.0), "equal_nan": True}
    if not torch.allclose(actual.double(), exact, **limits):  # the one below is slow, and says where they differ
        dtype = str(actual.dtype).removeprefix("torch.")
        torch.testing.assert_close(actual.double(), exact, **limits, msg=lambda text: f"{label} ({dtype}): {text}")


def assert_same(actual: Tensor, expected: Tensor, label: str) -> None:
    """The same numbers; any NaN equals any other."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{label}: {text}")


def numbers(like: Tensor, seed: int = 1) -> Tensor:
    """Random numbers shaped as a result, the same on each call."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like.dtype)


def joined(results: tuple[Tensor, ...]) -> Tensor:
    """The results of an op that has several as one tensor; torch.cat has ideas of its own under autocast."""
    whole = results[0].new_empty(sum(result.numel() for result in results))
    start = 0
    for result in results:
        whole[start : start + result.numel()] = result.flatten()
        start += result.numel()
    return whole


def gradients(call: Callable[..., Tensor], sample: Sample, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Of the result, weighted with fixed numbers that dtype can hold, in the sample's floating tensors."""
    tracked = sample.requiring_grad()
    inputs = [t for t in tracked.tensors if t.requires_grad]
    if not inputs:  # integers alone
        return []
    result = tracked.run(call)
    return list(torch.autograd.grad(result, inputs, numbers(result).to(dtype).to(result.dtype)))


# ---- memory --------------------------------------------------------------------------------------------------------------


def storages(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Places for a tensor: (name, the whole storage, the view of it that has this shape)."""
    rank, numel = len(shape), 1
    for length in shape:
        numel *= length

    def storage(*sizes: int) -> Tensor:
        return torch.full(sizes, 7, dtype=dtype)

    whole = storage(*shape)
    yield "contiguous", whole, whole
    whole = storage(numel + 1)
    yield "off by one element", whole, whole[1:].view(shape)
    if rank == 0:
        return
    whole = storage(*shape[:-1], shape[-1] + 3)
    yield "gaps between rows", whole, whole[..., : shape[-1]]
    whole = storage(*(2 * length + 1 for length in shape))
    yield "gaps everywhere", whole, whole[tuple(slice(1, None, 2) for _ in shape)]
    whole = storage(*reversed(shape))
    yield "transposed", whole, whole.permute(*range(rank - 1, -1, -1))
    if rank == 4:
        whole = storage(shape[0], shape[2], shape[3], shape[1])
        yield "channels_last", whole, whole.permute(0, 3, 1, 2)


_libc = ctypes.CDLL(None, use_errno=True)


def guarded(x: Tensor, at_end: bool) -> Tensor:
    """A copy that ends, or starts, where memory that must not be touched starts, or ends. Never freed.

    In x's memory order, so far as it has one: channels_last stays so.
    """
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    x = x.permute(order).contiguous()
    back = [order.index(d) for d in range(x.dim())]
    size = x.numel() * x.element_size()
    if size == 0:
        return x.permute(back)
    page = mmap.PAGESIZE
    room = -(-size // page) * page
    pages = mmap.mmap(-1, room + 2 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for wall in (first, first + page + room):
        assert _libc.mprotect(ctypes.c_void_p(wall), page, 0) == 0
    start = first + page + (room - size if at_end else 0)
    memory = (ctypes.c_char * size).from_address(start)
    _kept_alive.append(pages)
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x).permute(back)


_kept_alive: list[mmap.mmap] = []


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, and the largest integer, until something is written to it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(64).isnan().all()
        assert torch.ones(2).new_empty(64, dtype=torch.bfloat16).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


class Recorder(TorchDispatchMode):
    """Keeps the calls of ops of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("fourfold"):
            assert not kwargs, "ops are called with positional arguments"
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def op_calls(op: Op, sample: Sample) -> list[tuple[Any, tuple[Any, ...]]]:
    """What the sample's call, and the same into out=, come to at the level of torch.ops.fourfold."""
    with Recorder() as recorder, torch.no_grad():
        result = sample.run(op.call)
        if op.out:
            sample.run(op.call, out=torch.empty_like(result))
    return recorder.calls


# ---- the checks ----------------------------------------------------------------------------------------------------------

Check = Callable[[Op], None]
CHECKS: list[tuple[Check, tuple[pytest.MarkDecorator, ...]]] = []


def check(*marks: pytest.MarkDecorator) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS.append((function, marks))
        return function

    return add


#: Checks of gradients and nothing else.
OF_GRADIENTS: set[str] = {"gradients_are_right", "gradients_match_reference", "works_in_transforms", "works_in_vmap"}


def applies(op: Op, function: Check) -> bool:
    """Whether the check is one of the op's."""
    name = function.__name__
    if not (op.differentiable and op.floating) and name in OF_GRADIENTS:
        return False
    if name == "keeps_nan_in_its_place" and not op.floating:
        return False
    if name == "passes_opcheck" and not torch._C._jit_get_schemas_for_operator(f"fourfold::{op.name}"):
        return False  # a composite: its ops are checked themselves
    return name not in op.excused and (op.out is not None or name != "out_argument")


def tests_of(ops: tuple[Op, ...]) -> Callable[[Op, Check], None]:
    """The test function of a family: one test per op and check."""
    cases = [
        pytest.param(op, function, id=f"{op.name}-{function.__name__}", marks=marks)
        for op, (function, marks) in itertools.product(ops, CHECKS)
        if applies(op, function)
    ]

    @pytest.mark.parametrize(("op", "check"), cases)
    def test_op(op: Op, check: Check) -> None:
        check(op)

    return test_op


@check(pytest.mark.kernel)
def matches_reference(op: Op) -> None:
    for dtype, sample in op.all_samples():
        result = sample.run(op.call)
        assert result.dtype == dtype, f"{sample.label}: {result.dtype}"
        assert_close(result, sample.double().run(op.reference), sample.label)


@check(pytest.mark.kernel)
def matches_reference_when_large(op: Op) -> None:
    """And gives the same bits with any number of threads, into new memory and into out=."""
    for dtype in op.dtypes:
        sample = op.large(dtype)
        torch.set_num_threads(1)
        result = sample.run(op.call)
        assert_close(result, sample.double().run(op.reference), sample.label)
        torch.set_num_threads(2)
        assert_same(sample.run(op.call), result, f"{sample.label} with 2 threads")
        for threads in (1, 2) if op.out else ():
            torch.set_num_threads(threads)
            out = torch.full_like(result, float("nan"))
            sample.run(op.call, out=out)
            assert_same(out, result, f"{sample.label} into out= with {threads} threads")


@check(pytest.mark.kernel)
def accepts_any_strides(op: Op) -> None:
    """However an input lies in memory."""
    for _dtype, sample in op.all_samples():
        exact = sample.double().run(op.reference)
        for i, tensor in enumerate(sample.tensors[:1] if op.internal else sample.tensors):
            for name, _whole, view in storages(tuple(tensor.shape), tensor.dtype):
                other = sample.replace(lambda t, view=view: view.copy_(t), only=i)
                assert_close(other.run(op.call), exact, f"{sample.label}, tensor {i} {name}")
            if tensor.dim() and tensor.shape[0] > 1:
                expanded = sample.replace(lambda t: t[:1].expand_as(t), only=i)
                same = expanded.double().run(op.reference)
                assert_close(expanded.run(op.call), same, f"{sample.label}, tensor {i} expanded")


@check(pytest.mark.kernel)
def keeps_nan_in_its_place(op: Op) -> None:
    """One NaN spoils what the reference says it spoils, and no more."""
    for _dtype, sample in op.all_samples():
        for i, tensor in enumerate(sample.tensors):
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            if op.straight_through is not None and tensor is sample.args[op.straight_through]:
                continue  # no step is a NaN's: it is refused

            def spoil(t: Tensor) -> Tensor:
                t = t.clone()
                t.view(-1)[t.numel() * 2 // 3] = float("nan")
                return t

            spoilt = sample.replace(lambda t: t.contiguous()).replace(spoil, only=i)
            exact = spoilt.double().run(op.reference)
            assert exact.isnan().any() or "dropped" in sample.label or not exact.numel(), sample.label
            assert_close(spoilt.run(op.call), exact, f"{sample.label}, NaN in tensor {i}")


@check(pytest.mark.kernel)
def writes_every_element(op: Op) -> None:
    """Fresh memory that holds NaN shows in no result and no gradient."""
    for dtype, sample in op.all_samples():
        expected = sample.run(op.call)
        with poisoned_memory():
            assert_same(sample.run(op.call), expected, f"{sample.label} ({dtype})")
    for sample in op.small() if op.differentiable and op.floating else ():
        expected_gradients = gradients(op.call, sample)
        with poisoned_memory():
            for gradient, expected in zip(gradients(op.call, sample), expected_gradients, strict=True):
                assert_same(gradient, expected, f"gradient of {sample.label}")


@check(pytest.mark.kernel)
def out_argument(op: Op) -> None:
    """Any strides are written, and nothing between them."""
    for dtype, sample in op.all_samples():
        exact = sample.double().run(op.reference)
        for name, whole, out in storages(tuple(exact.shape), dtype):
            label = f"{sample.label} into out= {name}"
            before = whole.clone()
            assert sample.run(op.call, out=out) is out, label
            assert_close(out, exact, label)
            out.fill_(7)
            assert_same(whole, before, f"{label}: what lies between")


@check()
def out_argument_is_refused(op: Op) -> None:
    """Where it doesn't fit, or couldn't carry a gradient or tangent."""
    if not op.out:
        with pytest.raises(TypeError, match="out"):
            op.small()[0].run(op.call, out=None)
        return
    sample = op.small()[0]
    result = sample.run(op.call)
    shape, device = tuple(result.shape), result.device

    def refused(out: Any, error: type[Exception], message: str, call: Sample = sample) -> None:
        before = out.detach().clone() if isinstance(out, Tensor) else None
        with pytest.raises(error) as caught:
            call.run(op.call, out=out)
        assert without_page(caught.value) == f"{op.name}: {message}"
        if before is not None:
            assert_same(out.detach(), before, f"out after: {message}")

    refused([0.0], TypeError, "out must be a Tensor, got list")
    refused(result.float(), TypeError, "out must be float64, got float32")
    longer = result.new_zeros((*shape[:-1], shape[-1] + 1))
    refused(longer, ValueError, f"out must have shape {shape} on {device}, got {tuple(longer.shape)} on {device}")
    refused(result[None], ValueError, f"out must have shape {shape} on {device}, got {(1, *shape)} on {device}")
    expanded = result.new_zeros([1] * result.dim()).expand(shape)
    refused(
        expanded,
        ValueError,
        "out must not be an expanded tensor, whose elements share memory; pass out.contiguous()",
    )
    if result.dtype in (torch.float32, torch.float64):
        negated = torch.zeros(shape, dtype=result.dtype.to_complex()).conj().imag
        refused(negated, ValueError, "out must not be a view that negates, as x.conj().imag is; pass out.resolve_neg()")
    autograd = (
        "out= does not support autograd, but an argument requires a gradient; call it under torch.no_grad() or without out="
    )
    refused(result.clone().requires_grad_(), ValueError, autograd)
    refused(result, ValueError, autograd, sample.requiring_grad())
    with torch.no_grad():
        assert_same(sample.requiring_grad().run(op.call, out=torch.zeros_like(result)), result, "under no_grad")
    shared = torch.zeros(sample.tensors[0].numel() + result.numel(), dtype=result.dtype)
    inside = sample.replace(lambda t: shared[: t.numel()].view(t.shape).copy_(t), only=0)
    refused(
        shared[-result.numel() :].view(shape),
        ValueError,
        "out must not share memory with an input; pass a tensor of its own",
        inside,
    )
    with forward_ad.dual_level():
        dual = sample.replace(lambda t: forward_ad.make_dual(t, torch.ones_like(t)), only=0)
        forward = "out= does not support torch.func transforms and forward-mode AD; call it without out="
        refused(torch.zeros_like(result), ValueError, forward, dual)


@check()
def gradients_are_right(op: Op) -> None:
    """Once, twice and forward, by finite differences, and equal to autograd through the reference."""
    for sample in op.small():
        function, tensors = sample.of_floats(op.call, op.straight_through)
        tracked = tuple(t.detach().clone().requires_grad_() for t in tensors)
        assert gradcheck(function, tracked, check_forward_ad=True, check_batched_grad=True), sample.label
        assert gradgradcheck(function, tracked, check_fwd_over_rev=True), sample.label


@check(pytest.mark.kernel)
def gradients_match_reference(op: Op) -> None:
    for dtype, sample in op.all_samples():
        exact = gradients(op.reference, sample.double(), dtype)
        for i, gradient in enumerate(gradients(op.call, sample, dtype)):
            label = f"{sample.label} ({dtype}), gradient {i}"
            assert_close(gradient, exact[i], label, slack=4, computed_in=ACCUMULATE[dtype])


@check()
def passes_opcheck(op: Op) -> None:
    for sample in op.small():
        for overload, args in op_calls(op, sample):
            has_gradient = torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "Autograd")
            tracked = Sample("", args).requiring_grad().args if has_gradient else args
            torch.library.opcheck(overload, tracked)


@check()
def fake_agrees(op: Op) -> None:
    """Metadata alone gives the result's shape, dtype and strides."""
    for dtype, sample in op.all_samples():
        first = sample.tensors[0]
        # Strides don't depend on the dtype: they are varied with one of them.
        places = itertools.islice(storages(tuple(first.shape), first.dtype), None if dtype == op.dtypes[0] else 1)
        for name, _whole, view in places:
            given = sample.replace(lambda t, view=view: view.copy_(t), only=0)
            real = given.run(op.call)
            with FakeTensorMode() as mode:
                fake = given.replace(mode.from_tensor).run(op.call)
            for what in ("shape", "dtype", "device"):
                assert getattr(fake, what) == getattr(real, what), f"{sample.label} {name} ({dtype}): {what}"
            assert fake.stride() == real.stride(), f"{sample.label} {name} ({dtype}): {fake.stride()} {real.stride()}"
            meta = given.replace(lambda t: t.to("meta")).run(op.call)
            assert meta.shape == real.shape
            assert meta.dtype == real.dtype


@check()
def compiles(op: Op) -> None:
    """In one graph, forward and backward, with the bits of eager."""
    for sample in op.small():
        torch.compiler.reset()
        compiled = torch.compile(op.call, fullgraph=True, backend="aot_eager")
        expected = sample.run(op.call)
        assert_same(sample.run(compiled), expected, sample.label)
        if op.out:
            out = torch.full_like(expected, float("nan"))
            sample.run(compiled, out=out)
            assert_same(out, expected, f"{sample.label} into out=")
        if not (op.differentiable and op.floating):
            continue
        for gradient, wanted in zip(gradients(compiled, sample), gradients(op.call, sample), strict=True):
            assert_same(gradient, wanted, f"gradient of {sample.label}")


@check()
def compiles_once_for_all_sizes(op: Op) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import, and no business of the scripts below

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.call, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for sample in op.sizes():
        for dim in op.dynamic:
            torch._dynamo.mark_dynamic(sample.args[0], dim)
        assert_same(sample.run(compiled), sample.run(op.call), sample.label)
        graphs.append(counter.frame_count)
    assert len(graphs) > 1
    assert set(graphs) == {graphs[0]}, f"graphs after each size: {graphs}"


@check()
def compiles_with_inductor(op: Op) -> None:
    torch.compiler.reset()
    sample = op.small()[0]

    def surrounded(*args: Any, **kwargs: Any) -> Tensor:
        first = args[0] * 2 if args[0].is_floating_point() else args[0].flip(0)
        return op.call(first, *args[1:], **kwargs).sin()

    compiled = torch.compile(surrounded, fullgraph=True)
    pairs = [(sample.run(compiled), sample.run(surrounded))]
    if op.differentiable and op.floating:
        pairs += zip(gradients(compiled, sample), gradients(surrounded, sample), strict=True)
    for actual, expected in pairs:
        assert_close(actual, expected, sample.label, slack=10)


@check()
def exports(op: Op) -> None:
    """With a static and with a dynamic batch."""
    first, *rest = op.sizes()[0].args
    kwargs = op.sizes()[0].kwargs

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op.call(x, *rest, **kwargs)

    module = Module()
    assert_same(torch.export.export(module, (first,)).module()(first), module(first), "static")
    program = torch.export.export(module, (first,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for x in (first, torch.cat([first, first + 1 if first.is_floating_point() else first.flip(0), first])):
        assert_same(program.module()(x), module(x), f"batch of {x.shape[0]}")


def weighted(function: Callable[..., Tensor], weights: Tensor) -> Callable[..., Tensor]:
    """The sum of the result, each element times a number of its own: something to differentiate."""
    return lambda *inputs: (function(*inputs) * weights).sum()


@check()
def works_in_transforms(op: Op) -> None:
    """torch.func.grad, jvp and dual numbers, in each tensor, as the reference gives them."""
    for sample in op.small():
        label = sample.label
        call, tensors = sample.of_floats(op.call)
        reference, _ = sample.of_floats(op.reference)
        every = tuple(range(len(tensors)))
        weights = numbers(call(*tensors))
        ours = torch.func.grad(weighted(call, weights), every)(*tensors)
        for gradient, expected in zip(ours, torch.func.grad(weighted(reference, weights), every)(*tensors), strict=True):
            assert_close(gradient, expected, f"grad of {label}", slack=10)
        tangents = tuple(numbers(t, 2 + i) for i, t in enumerate(tensors))
        result, tangent = torch.func.jvp(call, tensors, tangents)
        exact, exact_tangent = torch.func.jvp(reference, tensors, tangents)
        assert_close(result, exact, f"jvp of {label}")
        assert_close(tangent, exact_tangent, f"tangent of {label}", slack=10)
        for i in every:
            with forward_ad.dual_level():
                duals = [*tensors]
                duals[i] = forward_ad.make_dual(tensors[i], tangents[i])
                dual_tangent = forward_ad.unpack_dual(call(*duals)).tangent
            assert dual_tangent is not None, f"dual numbers in {label}"
            alone = tuple(t if k == i else torch.zeros_like(t) for k, t in enumerate(tangents))
            assert_close(dual_tangent, torch.func.jvp(reference, tensors, alone)[1], f"tangent {i} of {label}", slack=10)


@check()
def works_in_vmap(op: Op) -> None:
    """And so does its gradient, with samples of all tensors or of one."""
    for sample in op.small():
        call, tensors = sample.of_floats(op.call)
        reference, _ = sample.of_floats(op.reference)
        every = tuple(range(len(tensors)))
        ours, exact = (torch.func.grad(weighted(f, numbers(call(*tensors))), every) for f in (call, reference))
        for mapped in (every, *((i,) for i in every)):
            # Samples lie in the middle, not first, to see that the rule moves them.
            in_dims = tuple(t.dim() // 2 if i in mapped else None for i, t in enumerate(tensors))
            places = list(zip(tensors, in_dims, strict=True))
            stacked = [t if dim is None else torch.stack([t, t + 1, t * 2], dim) for t, dim in places]
            results = torch.func.vmap(call, in_dims)(*stacked)
            gradients = torch.func.vmap(ours, in_dims)(*stacked)
            for k in range(3):
                alone = [t if dim is None else t.select(dim, k) for t, dim in zip(stacked, in_dims, strict=True)]
                label = f"{sample.label}, mapped {mapped}, sample {k}"
                assert_close(results[k], reference(*alone), label, slack=10)
                for gradient, expected in zip(gradients, exact(*alone), strict=True):
                    assert_close(gradient[k], expected, f"gradient of {label}", slack=10)


@check()
def autocast_changes_nothing(op: Op) -> None:
    """Or what the op says that it changes: the result is in bfloat16 then, of arguments in it; float64 is left alone."""
    for dtype, sample in op.all_samples():
        expected = sample.run(op.call)
        with torch.autocast("cpu", torch.bfloat16):
            result = sample.run(op.call)
        if op.autocast is None or dtype == torch.float64:
            assert_same(result, expected, sample.label)
        else:
            assert result.dtype == torch.bfloat16, f"{sample.label}: {result.dtype}"
            assert_close(result, sample.run(op.autocast), f"{sample.label} ({dtype})")


@check()
def refuses_wrong_input(op: Op) -> None:
    refusals = op.refusals()
    assert refusals, f"{op.name} has no refusals"
    for refusal in refusals:
        with pytest.raises(refusal.error) as caught:
            refusal.call()
        assert f"{caught.type.__name__}: {without_page(caught.value)}" == f"{refusal.error.__name__}: {refusal.message}"


# ---- checks of a whole family --------------------------------------------------------------------------------------------


def unreached_raises(ops: tuple[Op, ...], module: Any, more: list[Refusal]) -> list[str]:
    """The `raise` statements of a module that no refusal reaches."""
    file = inspect.getsourcefile(module)
    lines = set()
    for refusal in [*more, *(refusal for op in ops for refusal in op.refusals())]:
        with pytest.raises(refusal.error) as caught:
            refusal.call()
        trace = caught.tb
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == file:
                lines.add(trace.tb_lineno)
            trace = trace.tb_next
    source = Path(file).read_text()
    return [
        f"{file}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and lines.isdisjoint(range(node.lineno, node.end_lineno + 1))
    ]


def tiers() -> list[str]:
    """The tiers that this machine has kernels for, lowest first."""
    import fourfold

    order = fourfold.build_info()["isa_tiers"]
    return [tier for tier in order if tier in order[: order.index(_kernel_tier(order)) + 1]]


def _kernel_tier(order: list[str]) -> str:
    from fourfold import _C

    machine = _C.machine_capability()
    return machine if machine in order else order[-1]


def results_between_walls(ops: tuple[Op, ...]) -> list[Tensor]:
    """Every sample's result, from and into memory whose neighbourhood is out of bounds: a stray access ends the process."""
    results = []
    for op in ops:
        for _dtype, sample in op.all_samples():
            for at_end in (True, False):
                given = sample.replace(lambda t, at_end=at_end: guarded(t, at_end))
                result = given.run(op.call)
                if op.out:
                    out = guarded(torch.zeros_like(result, memory_format=torch.contiguous_format), at_end)
                    given.run(op.call, out=out)
                    assert_same(out, result, f"{op.name} {sample.label} into guarded memory")
            results.append(result)
    return results


def every_tier_agrees(test_module: str, ops: tuple[Op, ...], scratch: Path) -> None:
    """Each tier, in a process of its own and between walls, gives the results of this process to within rounding."""
    labels = [f"{op.name} {sample.label}" for op in ops for _, sample in op.all_samples()]
    expected = [sample.double().run(op.reference) for op in ops for _, sample in op.all_samples()]
    for tier in tiers():
        file = scratch / f"{tier}.pt"
        run_script(
            f"import sys, torch, battery, fourfold, {test_module} as tests; "
            f"assert fourfold.cpu_capability() == {tier!r}; "
            "torch.save(battery.results_between_walls(tests.OPS), sys.argv[1])",
            str(file),
            FOURFOLD_CPU_CAPABILITY=tier,
        )
        results = torch.load(file)
        for label, result, exact in zip(labels, results, expected, strict=True):
            assert_close(result, exact, f"{label} on {tier}")


def run_script(script: str, *args: str, ok: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own that can import these tests."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", script, *args], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) is ok, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def composites(family: str) -> tuple[str, ...]:
    """The public functions without a schema that a family's test file declares."""
    return getattr(importlib.import_module(f"test_{family}"), "COMPOSITES", ())


def families() -> dict[str, tuple[Op, ...]]:
    """The ops that the test files declare: {family: ops}."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        if "= battery.tests_of(OPS)" in file.read_text():
            found[file.stem.removeprefix("test_")] = importlib.import_module(file.stem).OPS
    return found
