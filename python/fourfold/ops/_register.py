"""How an op gets its fake, its gradient and its vmap rule: one mechanism for all families.

``torch.library.register_autograd`` alone makes ``torch.func.grad`` fail and forward-mode AD return zero tangents in silence.
So while a functorch transform or a dual level is active, the same formulas are served through an ``autograd.Function``, and
eager calls are recorded by a quicker one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

Formula = Callable[..., Any]

#: The names of the ops registered here: {op: what it has}. ``tests/test_every_op.py`` reads it.
registered: dict[str, set[str]] = {}

#: What `register` returned for each. A vmap rule calls an op by it: other transforms may be active outside of the vmap.
calls: dict[str, Callable[..., Any]] = {}


def transforming() -> bool:
    """Whether a torch.func transform or a dual level of forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def register(
    name: str,
    *,
    fake: Formula,
    setup_context: Formula | None = None,
    backward: Formula | None = None,
    jvp: Formula | None = None,
    vmap: Formula | None = None,
) -> Callable[..., Any]:
    """Registers an op's formulas and returns the function to call it by.

    Args:
        name: of the op in ``torch.ops.fourfold``.
        fake: result from metadata, for tracing.
        setup_context: ``(ctx, inputs, output)``: keeps what the formulas need, with ``save_for_backward`` and, for jvp,
            ``save_for_forward``.
        backward: ``(ctx, grad) -> gradients of all inputs``, in differentiable operations.
        jvp: ``(ctx, *tangents) -> tangent``; without it, forward-mode AD is an error.
        vmap: ``(info, in_dims, *inputs) -> (output, out_dim)``.
    """
    qualified = f"fourfold::{name}"
    op = getattr(torch.ops.fourfold, name).default
    registered[name] = {"fake"}
    torch.library.register_fake(qualified, fake)
    if vmap is not None:
        registered[name].add("vmap")
        torch.library.register_vmap(qualified, vmap)
    if backward is None:
        calls[name] = op
        return op
    registered[name].add("autograd")
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)

    formulas = {"forward": op, "setup_context": setup_context, "backward": backward, "jvp": jvp, "vmap": vmap}
    members = {key: staticmethod(formula) for key, formula in formulas.items() if formula is not None}
    function: Any = type(f"{name}_function", (torch.autograd.Function,), members)

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # spares the 3 microseconds that the formula's Python kernel costs
            return op(*args)

    recorded = recording(name, below, setup_context, backward)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return op(*args)
        if transforming():
            return function.apply(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return recorded.apply(*args)
        return below(*args)

    calls[name] = call
    return call


def recording(name: str, forward: Formula, setup_context: Formula | None, backward: Formula) -> Any:
    """The ``autograd.Function`` of these formulas for eager calls outside of transforms.

    torch.library's and those with a ``setup_context`` of their own take twice as long over a small call.
    """

    def recorded_forward(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(recorded_forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def looped(name: str) -> Formula:
    """The vmap rule of an op that has no better one: a call per element of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        def part(i: int) -> list[Any]:
            return [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)]

        results = [calls[name](*part(i)) for i in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return rule
