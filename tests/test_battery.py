"""Each check of the battery fails on an op that is broken in just the way that it looks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import battery
import fourfold as ff
import pytest
import torch
from battery import Op, Refusal, Sample, run_script
from test_blockdct import OPS
from test_maskmm import OPS as MASK_OPS
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.autograd.gradcheck import GradcheckError
from torch.testing._internal.optests import OpCheckError

DCT, IDCT = OPS[:2]
#: One that gives bits, and one with a straight-through gradient, in autocast's type.
PACK, SUPERMASK = (next(op for op in MASK_OPS if op.name == name) for name in ("pack_mask", "supermask_linear"))


def broken(change: Callable[..., Tensor], op: Op = DCT, **more: Any) -> Op:
    """The op with another function to call."""
    return dataclasses.replace(op, call=change, **more)


def inexact(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return ff.block_dct(x, *args, **kwargs) * (1 + 2e-5)


def rounded_twice(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs.pop("out", None)
    return ff.block_dct(x.float() if x.dtype == torch.float16 else x, *args, **kwargs).bfloat16().to(x.dtype)


def in_another_dtype(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return ff.block_dct(x, *args, **kwargs).double()


def of_threads(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return ff.block_dct(x, *args, **kwargs) * (1 + 1e-15 * torch.get_num_threads())


def as_if_contiguous(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return ff.block_dct(torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride()), *args, **kwargs)


def without_nan(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return ff.block_dct(x, *args, **kwargs).nan_to_num()


def nan_everywhere(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    y = ff.block_dct(x, *args, **kwargs)
    return y + y.sum() * 0


def unwritten(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    y = ff.block_dct(x, *args, **kwargs)
    result = torch.empty_like(y)
    result.flatten()[1:].copy_(y.flatten()[1:])
    return torch.where(result.isnan(), result, y)


def beyond_out(x: Tensor, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    y = ff.block_dct(x, *args, **kwargs)
    if out is None:
        return y
    whole = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
    whole.zero_()
    return out.copy_(y)


def another_out(x: Tensor, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    return ff.block_dct(x, *args, **kwargs)


def unchecked_out(x: Tensor, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    if isinstance(out, list):
        raise TypeError("block_dct: out must be a Tensor, got list")
    y = ff.block_dct(x, *args, **kwargs)
    return y if out is None else out.copy_(y)


def constant_scale(x: Tensor, *args: Any, scale: Any = None, **kwargs: Any) -> Tensor:
    return ff.block_dct(x, *args, scale=scale.detach() if isinstance(scale, Tensor) else scale, **kwargs) + 0 * (
        scale.sum() if isinstance(scale, Tensor) else 0
    )


def inverse_for_adjoint(y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The gradient of the inverse is taken for the transform itself."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return ff.block_idct(y, *args, **kwargs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            options = {k: v for k, v in kwargs.items() if k in {"layout", "freqs", "scale"}}
            return ff.block_dct(grad, *args, **options)

    return Wrong.apply(y)


def contiguous_when_fake(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    y = ff.block_dct(x, *args, **kwargs)
    return y.contiguous() if isinstance(x, torch._subclasses.FakeTensor) else y


def breaks_the_graph(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    torch._dynamo.graph_break()
    return ff.block_dct(x, *args, **kwargs)


def drifts_when_compiled(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return ff.block_dct(x, *args, **kwargs) + (1e-3 if torch.compiler.is_compiling() else 0)


def of_one_height(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return ff.block_dct(x, *args, **kwargs) + (0 if x.shape[2] == 41 else 0.0)


def of_one_batch(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return ff.block_dct(x, *args, **kwargs) + (0 if x.shape[0] == 2 else 0.0)


def past_the_transforms(x: Tensor, n: int = 8, *, layout="planar", freqs=None, scale=None, shift=0.0, out=None) -> Tensor:
    """The op, without what serves torch.func and forward mode."""
    rows = None if scale is None else torch.as_tensor(scale, dtype=x.dtype).reshape(-1, n * n if freqs is None else len(freqs))
    return torch.ops.fourfold.block_dct(x, n, layout, freqs, rows, shift)


def of_first_sample(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A vmap rule that takes the first of the samples for all."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return ff.block_dct(x, *args, **kwargs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
            y = Wrong.apply(x.select(in_dims[0], 0))
            return y.expand(info.batch_size, *y.shape), 0

    return Wrong.apply(x)


def of_autocast(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    y = ff.block_dct(x, *args, **kwargs)
    return y.bfloat16().to(y.dtype) if torch.is_autocast_enabled("cpu") else y


def a_bit_off(mask: Tensor) -> Tensor:
    bits = PACK.call(mask)
    bits.view(-1)[-1:] ^= 1
    return bits


def with_half_the_slope(x: Tensor, weight: Tensor, scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return SUPERMASK.call(x, weight, (scores + scores.detach()) / 2, *args, **kwargs)


def deaf_to_autocast(*args: Any, **kwargs: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return SUPERMASK.call(*args, **kwargs)


def test_the_battery_passes_without_a_fault():
    battery.matches_reference(DCT)
    battery.matches_reference(PACK)
    battery.gradients_match_reference(SUPERMASK)
    battery.autocast_changes_nothing(SUPERMASK)


@pytest.mark.parametrize(
    ("check", "op"),
    [
        (battery.matches_reference, broken(inexact)),
        (battery.matches_reference, broken(rounded_twice)),
        (battery.matches_reference, broken(in_another_dtype)),
        (battery.matches_reference_when_large, broken(inexact)),
        (battery.matches_reference_when_large, broken(of_threads, dtypes=(torch.float64,))),
        (battery.matches_reference_when_large, broken(another_out)),
        (battery.accepts_any_strides, broken(as_if_contiguous)),
        (battery.keeps_nan_in_its_place, broken(without_nan)),
        (battery.keeps_nan_in_its_place, broken(nan_everywhere)),
        (battery.writes_every_element, broken(unwritten)),
        (battery.out_argument, broken(beyond_out)),
        (battery.out_argument, broken(another_out)),
        (battery.out_argument_is_refused, broken(unchecked_out)),
        (battery.out_argument_is_refused, broken(another_out, out=None)),
        (battery.gradients_are_right, broken(constant_scale)),
        (battery.gradients_are_right, broken(inverse_for_adjoint, IDCT)),
        (battery.gradients_match_reference, broken(constant_scale)),
        (battery.gradients_match_reference, broken(inverse_for_adjoint, IDCT)),
        (battery.fake_agrees, broken(contiguous_when_fake)),
        (battery.compiles, broken(breaks_the_graph)),
        (battery.compiles, broken(drifts_when_compiled)),
        (battery.compiles_once_for_all_sizes, broken(of_one_height)),
        (battery.compiles_with_inductor, broken(breaks_the_graph)),
        (battery.exports, broken(of_one_batch)),
        (battery.works_in_transforms, broken(past_the_transforms)),
        (battery.works_in_transforms, broken(inverse_for_adjoint, IDCT)),
        (battery.works_in_vmap, broken(past_the_transforms)),
        (battery.works_in_vmap, broken(of_first_sample)),
        (battery.autocast_changes_nothing, broken(of_autocast)),
        (battery.autocast_changes_nothing, broken(deaf_to_autocast, SUPERMASK)),
        (battery.matches_reference, broken(a_bit_off, PACK)),
        (battery.gradients_match_reference, broken(with_half_the_slope, SUPERMASK)),
        (battery.refuses_wrong_input, broken(ff.block_dct, refusals=list)),
        (
            battery.refuses_wrong_input,
            broken(ff.block_dct, refusals=lambda: [Refusal(TypeError, "another text", lambda: ff.block_dct(None))]),
        ),
    ],
    ids=lambda value: value.call.__name__ if isinstance(value, Op) else value.__name__,
)
def test_check_fails(check, op):
    with pytest.raises((AssertionError, pytest.fail.Exception, *TORCHS)):
        check(op)


#: How torch itself says that it can't differentiate, trace or export.
TORCHS = (GradcheckError, Unsupported, torch._dynamo.exc.UserError, RuntimeError)


def test_every_check_is_shown_to_fail():
    marks = [mark for mark in test_check_fails.pytestmark if mark.name == "parametrize"]
    shown = {check for check, _ in marks[0].args[1]}
    # opcheck compares with torch's own rules: test_opcheck_fails.
    assert {check for check, _ in battery.CHECKS} - shown == {battery.passes_opcheck}


def test_opcheck_fails():
    """On an op whose fake has another shape."""
    library = torch.library.Library("fourfold_broken", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: torch.cat([x, x]), "CPU")
    torch.library.register_fake("fourfold_broken::double", torch.empty_like)
    call = torch.ops.fourfold_broken.double
    op = broken(call, out=None, small=lambda: [Sample("", (torch.ones(2),))])
    assert [args[0].shape for _, args in battery.op_calls(op, op.small()[0])] == [(2,)]
    with pytest.raises(OpCheckError):
        battery.passes_opcheck(op)


def test_a_refusal_that_no_test_reaches_is_found():
    from fourfold.ops import blockdct

    few = dataclasses.replace(DCT, refusals=lambda: DCT.refusals()[:1])
    assert len(battery.unreached_raises((few,), blockdct, [])) > 10


@pytest.mark.parametrize("at_end", [True, False])
def test_walls_stop_a_stray_access(at_end):
    """A read one element beyond guarded memory ends the process."""
    script = (
        "import sys, torch; from battery import guarded; x = guarded(torch.arange(100.0), {0}); "
        "assert x.sum() == 4950; print('inside', flush=True); "
        "import ctypes; ctypes.c_float.from_address(x.data_ptr() + ({1})).value"
    )
    run_script(script.format(at_end, 396 if at_end else 0))
    done = run_script(script.format(at_end, 400 if at_end else -4), ok=False)
    assert done.stdout == "inside\n"
    assert done.returncode < 0


def test_poison_shows():
    with battery.poisoned_memory():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_storages_hold_what_they_are_given():
    x = torch.arange(120.0).view(2, 3, 4, 5)
    names = []
    for name, whole, view in battery.storages((2, 3, 4, 5), torch.float32):
        assert torch.equal(view.copy_(x), x)
        assert whole.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
        names.append((name, view.stride()))
    assert len({strides for _, strides in names}) == len(names) - 1  # "off by one element" has the contiguous ones
