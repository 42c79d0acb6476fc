"""Superposed masks: many tasks' masks over one weight, of which a batch wears a mixture, or each sample its own.

The masks stay bits (Wortsman et al., 2020, "Supermasks in Superposition", arXiv 2006.14769). `_superpose` is linear in weight
and in alpha, and `_masked_dots` is its gradient; `task_linear` is linear in x and in weight, and its gradients are the other
two forms of the same sum. So every gradient's gradient is one of these ops again.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference._dtypes import accumulate_type
from . import _checks as check
from ._register import looped, register
from .maskmm import check_linear, in_autocast, pack_mask, row_bytes

# ---- all masks at once -----------------------------------------------------------------------------------------------


def _sum(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def _superpose_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


def _superpose_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, masks, alpha = ctx.saved_tensors
    return (
        _superpose(grad, masks, alpha) if ctx.needs_input_grad[0] else None,
        None,
        _masked_dots(grad, weight, masks) if ctx.needs_input_grad[2] else None,
    )


def _superpose_jvp(ctx: Any, weight_t: Tensor | None, masks_t: None, alpha_t: Tensor | None) -> Tensor | None:
    weight, masks, alpha = ctx.saved_tensors
    return _sum(
        None if weight_t is None else _superpose(weight_t, masks, alpha),
        None if alpha_t is None else _superpose(weight, masks, alpha_t),
    )


_superpose = register(
    "_superpose",
    fake=lambda weight, masks, alpha: weight.new_empty(weight.shape),
    setup_context=_superpose_setup,
    backward=_superpose_vjp,
    jvp=_superpose_jvp,
    vmap=looped("_superpose"),
)


def _masked_dots_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, b, masks = ctx.saved_tensors
    return (
        _superpose(b, masks, grad) if ctx.needs_input_grad[0] else None,
        _superpose(a, masks, grad) if ctx.needs_input_grad[1] else None,
        None,
    )


def _masked_dots_jvp(ctx: Any, a_t: Tensor | None, b_t: Tensor | None, masks_t: None) -> Tensor | None:
    a, b, masks = ctx.saved_tensors
    return _sum(
        None if a_t is None else _masked_dots(a_t, b, masks),
        None if b_t is None else _masked_dots(a, b_t, masks),
    )


_masked_dots = register(
    "_masked_dots",
    fake=lambda a, b, masks: a.new_empty((masks.shape[0],), dtype=accumulate_type(a.dtype)),
    setup_context=_superpose_setup,
    backward=_masked_dots_vjp,
    jvp=_masked_dots_jvp,
    vmap=looped("_masked_dots"),
)


# ---- a mask per sample -----------------------------------------------------------------------------------------------


def _three_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.save_for_forward(*inputs[:4])


def _task_linear_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, masks, task = ctx.saved_tensors
    return (
        _task_linear_transposed(grad, weight, masks, task) if ctx.needs_input_grad[0] else None,
        _task_outer(grad, x, masks, task) if ctx.needs_input_grad[1] else None,
        None,
        None,
        grad.sum(tuple(range(grad.dim() - 1))) if ctx.needs_input_grad[4] else None,
    )


def _task_linear_jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, *others: Any) -> Tensor | None:
    x, weight, masks, task = ctx.saved_tensors
    bias_t = others[2]
    moved = _sum(
        None if x_t is None else _task_linear(x_t, weight, masks, task, None),
        None if weight_t is None else _task_linear(x, weight_t, masks, task, None),
    )
    if bias_t is not None:
        bias_t = bias_t.expand(*x.shape[:-1], -1)
    return _sum(moved, bias_t)


_task_linear = register(
    "task_linear",
    fake=lambda x, weight, masks, task, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    setup_context=_three_setup,
    backward=_task_linear_vjp,
    jvp=_task_linear_jvp,
    vmap=looped("task_linear"),
)


def _transposed_vjp(ctx: Any, grad_x: Tensor) -> tuple[Any, ...]:
    grad, weight, masks, task = ctx.saved_tensors
    return (
        _task_linear(grad_x, weight, masks, task, None) if ctx.needs_input_grad[0] else None,
        _task_outer(grad, grad_x, masks, task) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


def _transposed_jvp(ctx: Any, grad_t: Tensor | None, weight_t: Tensor | None, *others: None) -> Tensor | None:
    grad, weight, masks, task = ctx.saved_tensors
    return _sum(
        None if grad_t is None else _task_linear_transposed(grad_t, weight, masks, task),
        None if weight_t is None else _task_linear_transposed(grad, weight_t, masks, task),
    )


_task_linear_transposed = register(
    "_task_linear_transposed",
    fake=lambda grad, weight, masks, task: grad.new_empty((*grad.shape[:-1], weight.shape[1])),
    setup_context=_three_setup,
    backward=_transposed_vjp,
    jvp=_transposed_jvp,
    vmap=looped("_task_linear_transposed"),
)


def _outer_vjp(ctx: Any, grad_weight: Tensor) -> tuple[Any, ...]:
    grad, x, masks, task = ctx.saved_tensors
    return (
        _task_linear(x, grad_weight, masks, task, None) if ctx.needs_input_grad[0] else None,
        _task_linear_transposed(grad, grad_weight, masks, task) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


def _outer_jvp(ctx: Any, grad_t: Tensor | None, x_t: Tensor | None, *others: None) -> Tensor | None:
    grad, x, masks, task = ctx.saved_tensors
    return _sum(
        None if grad_t is None else _task_outer(grad_t, x, masks, task),
        None if x_t is None else _task_outer(grad, x_t, masks, task),
    )


_task_outer = register(
    "_task_outer",
    fake=lambda grad, x, masks, task: x.new_empty((grad.shape[-1], x.shape[-1])),
    setup_context=_three_setup,
    backward=_outer_vjp,
    jvp=_outer_jvp,
    vmap=looped("_task_outer"),
)


# ---- arguments -------------------------------------------------------------------------------------------------------


def packed_masks(op: str, masks: Any, weight: Tensor) -> Tensor:
    """The masks argument [T, N, ..] as packed bits; pad bits are looked at where the bits are read."""
    check.tensor(op, "masks", masks)
    n, k = weight.shape
    if masks.device != weight.device:
        raise ValueError(f"{op}: masks are on {masks.device}, weight on {weight.device}; move one with .to()")
    if masks.dtype not in {torch.uint8, torch.bool}:
        hint = "; masks keep or drop, alpha weighs them" if masks.is_floating_point() else "; compare first, as in masks != 0"
        raise TypeError(f"{op}: masks must be bool or packed uint8, got {check.dtype_name(masks)}{hint}")
    columns = k if masks.dtype == torch.bool else row_bytes(k)
    if masks.dim() != 3 or masks.shape[1] != n or masks.shape[2] != columns:
        kind = "bool" if masks.dtype == torch.bool else "packed"
        hint = ""
        if check.has_shape(masks, n, columns):
            hint = "; one mask for all is masked_linear's, or masks[None]"
        elif masks.dim() == 3 and masks.dtype == torch.bool and (masks.shape[1], masks.shape[2]) == (k, n):
            hint = "; did you mean masks.mT?"
        raise ValueError(
            f"{op}: {kind} masks for weight {tuple(weight.shape)} must be [T, {n}, {columns}], got {tuple(masks.shape)}{hint}"
        )
    if masks.shape[0] == 0:
        raise ValueError(f"{op}: masks must hold at least one mask, got {tuple(masks.shape)}")
    if masks.dtype == torch.uint8:
        return masks.contiguous()
    return pack_mask(masks.flatten(0, 1)).unflatten(0, (masks.shape[0], n))


# ---- functions -------------------------------------------------------------------------------------------------------


def superposed_linear(x: Tensor, weight: Tensor, masks: Tensor, alpha: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight * sum_t alpha[t] * masks[t], bias)``, the masks read as bits (arXiv 2006.14769).

    The coefficients sum_t alpha[t] * masks[t] are added up in the order of the tasks, in float32 (float64 for float64), and the
    weight is multiplied by them once. So with alpha one-hot the result has the bits of F.linear with weight * masks[t]. A mask
    selects where alpha's gradient is made: what lies off it, NaN too, adds nothing.

    Args:
        x: [.., K], float16, bfloat16, float32 or float64.
        weight: [N, K] of the same dtype.
        masks: packed uint8 [T, N, 8 * ceil(K / 64)], T at least 1, or bool [T, N, K], which is packed on every call.
        alpha: [T], floating, taken in float32 (float64 for float64).
        bias: [N], or None.

    Returns:
        [.., N] in x's dtype. Twice differentiable in x, weight, alpha and bias; alpha's gradient is one pass over the bits.
        Under autocast x and bias take autocast's type, and so does the superposed weight after it is made.

    Raises:
        TypeError: x, weight, alpha or bias is not floating or they differ in dtype, or masks are neither bool nor uint8.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "superposed_linear"
    check_linear(op, x, weight, bias)
    bits = packed_masks(op, masks, weight)
    check.floating(op, "alpha", alpha)
    if not check.has_shape(alpha, bits.shape[0]):
        raise ValueError(f"{op}: alpha must be [{bits.shape[0]}], one number per mask, got {list(alpha.shape)}")
    if alpha.device != x.device:
        raise ValueError(f"{op}: alpha is on {alpha.device}, x on {x.device}; move one with .to()")
    x, weight, bias = in_autocast(op, x, weight, bias)
    effective = _superpose(weight, bits, alpha.to(accumulate_type(weight.dtype)))
    return F.linear(x, effective.to(x.dtype), bias)


def task_linear(x: Tensor, weight: Tensor, masks: Tensor, task: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in which every sample of the batch wears the mask of its own task (arXiv 2006.14769).

    On CPU a sample's result doesn't depend on the others of its batch: it has the same bits alone. No masked weight is made.

    Args:
        x: [B, .., K], float16, bfloat16, float32 or float64.
        weight: [N, K] of the same dtype.
        masks: packed uint8 [T, N, 8 * ceil(K / 64)], T at least 1, or bool [T, N, K], which is packed on every call.
        task: int64 [B], the number of each sample's mask, in 0..T-1.
        bias: [N], or None; the same for every task.

    Returns:
        [B, .., N] in x's dtype: x[b] @ (weight on masks[task[b]]).T + bias; 16-bit ones are computed in float32. Twice
        differentiable in x, weight and bias; the gradient of weight adds up those of the samples, each exactly 0 off its mask.
        Under autocast x, weight and bias take autocast's type.

    Raises:
        TypeError: x, weight or bias is not floating or they differ in dtype, masks are neither bool nor uint8, or task is not
            int64.
        ValueError: anything else, such as task ids out of range (looked for on CPU); the message names what was expected and
            what came.
    """
    op = "task_linear"
    check_linear(op, x, weight, bias)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be [B, .., K], got {tuple(x.shape)}")
    bits = packed_masks(op, masks, weight)
    check.tensor(op, "task", task)
    if task.dtype != torch.int64:
        raise TypeError(f"{op}: task must be int64, got {check.dtype_name(task)}")
    if not check.has_shape(task, x.shape[0]):
        raise ValueError(f"{op}: task must be [{x.shape[0]}], one number per sample, got {list(task.shape)}")
    if task.device != x.device:
        raise ValueError(f"{op}: task is on {task.device}, x on {x.device}; move one with .to()")
    x, weight, bias = in_autocast(op, x, weight, bias)
    return _task_linear(x, weight.to(x.dtype), bits, task, bias)


# ---- which task is this? ---------------------------------------------------------------------------------------------

METHODS = ("oneshot", "binary")


class _CommonAlpha:
    """While entered, every layer of superposed masks reads one common alpha; then each has its own again."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.masks: list[Tensor] = []
        self.own: list[Tensor] = []
        self._places: list[dict[str, Any]] = []
        for layer in model.modules():
            alpha, masks = (getattr(layer, name, None) for name in ("alpha", "mask_bits"))
            if isinstance(alpha, Tensor) and isinstance(masks, Tensor) and self._place(layer) is not None:
                self.masks.append(masks)
                self.own.append(alpha)
                self._places.append(self._place(layer) or {})

    @staticmethod
    def _place(layer: torch.nn.Module) -> dict[str, Any] | None:
        """Where alpha is kept: among buffers, parameters or plain attributes; None in a wrapper that only hands on."""
        places: tuple[dict[str, Any], ...] = (layer._buffers, layer._parameters, layer.__dict__)
        return next((place for place in places if "alpha" in place), None)

    def set(self, alpha: Tensor) -> None:
        for place, masks in zip(self._places, self.masks, strict=True):
            place["alpha"] = alpha.to(masks.device)

    def __enter__(self) -> "_CommonAlpha":
        return self

    def __exit__(self, *error: object) -> None:
        for place, own in zip(self._places, self.own, strict=True):
            place["alpha"] = own


def _entropy(logits: Any) -> Tensor:
    """Of the classes, the mean over the batch."""
    op = "infer_task"
    check.floating(op, "model(x)", logits)
    if logits.dim() < 1 or logits.numel() == 0:
        raise ValueError(f"{op}: model(x) must be [.., classes] and not empty, got {tuple(logits.shape)}")
    log_p = logits.to(accumulate_type(logits.dtype)).log_softmax(-1)
    # A class ruled out by a logit of -infinity adds nothing.
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1).mean()


def infer_task(model: torch.nn.Module, x: Tensor, *, method: str = "oneshot") -> int:
    """The task whose mask makes the model most certain about a batch: SupSup's inference (arXiv 2006.14769).

    Every layer that has `alpha` [T] and `mask_bits` [T, ..], as :class:`fourfold.nn.SuperposedLinear` does, gets one common
    alpha, and its own back in the end, also after an error. H is the mean over the batch of the entropy of softmax(model(x)).
    "oneshot": with alpha = 1/T, the task along which H falls fastest, by one backward pass. "binary": the better half of the
    tasks left, rounded up, until one is left: about log2(T) backward passes, and surer where tasks are many. Among equals the
    lowest number wins.

    Args:
        model: module that maps x to logits [.., classes]. It runs in the mode that it is in: call ``model.eval()`` first if it
            has dropout or batch norm.
        x: [B, ..], what the model takes: a batch of one task, whose number is unknown.
        method: "oneshot" or "binary".

    Returns:
        The task as an int in 0..T-1. Waits for the device; no gradient of the model is touched.

    Raises:
        TypeError: model is not a module, method not a string, or model(x) not a floating tensor.
        ValueError: method is another, the model has no such layers, these differ in T, or the entropy does not depend on alpha
            or its gradient is not finite.
    """
    op = "infer_task"
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    check.one_of(op, "method", method, METHODS)
    if isinstance(x, Tensor):
        check.local(op, "x", x)
    common = _CommonAlpha(model)
    if not common.own:
        raise ValueError(f"{op}: model has no layer with superposed masks; make one with nn.SuperposedLinear.from_linear")
    counts = sorted({masks.shape[0] for masks in common.masks})
    if len(counts) > 1 or counts[0] == 0:
        raise ValueError(f"{op}: every layer must hold the same number of masks, at least one, got {counts}")
    device, kind = common.masks[0].device, torch.float32
    if any(own.dtype == torch.float64 for own in common.own):
        kind = torch.float64
    alive = torch.arange(counts[0], device=device)
    # A gradient is needed here wherever this is called from.
    with common, torch.inference_mode(False), torch.enable_grad():
        given = x.clone() if isinstance(x, Tensor) and x.is_inference() else x
        while len(alive) > 1:
            alpha = torch.zeros(counts[0], dtype=kind, device=device).index_fill(0, alive, 1 / len(alive)).requires_grad_()
            common.set(alpha)
            entropy = _entropy(model(given))
            slope = torch.autograd.grad(entropy, alpha, allow_unused=True)[0] if entropy.requires_grad else None
            if slope is None:
                raise ValueError(f"{op}: model(x) does not depend on alpha; it must run its superposed layers without a task")
            slope = slope[alive]
            if not bool(slope.isfinite().all()):
                raise ValueError(f"{op}: the entropy of model(x) has no finite gradient; look for NaN in x and in the weights")
            keep = 1 if method == "oneshot" else math.ceil(len(alive) / 2)
            alive = alive[slope.argsort(stable=True)[:keep]].sort().values
    return int(alive)
