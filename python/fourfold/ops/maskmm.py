"""Packed masks, masks made from scores, and layers whose weight wears one.

W∘M is made a tile at a time and kept nowhere: backward saves x, weight, scores and bits, and makes the tiles again. A
supermask's gradient is straight-through: scores get what the mask, taken as real numbers, would get, times the sampler's slope
(Zhou et al., 2019, arXiv 1905.01067; Ramanujan et al., 2019, arXiv 1911.13299).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._pages import see
from ..reference._dtypes import accumulate_type
from . import _checks as check
from ._register import looped, recording, register, transforming

SAMPLERS = ("bernoulli", "topk", "threshold")
RESCALES = ("dwr", "dwr_grad")

Pair = int | Sequence[int]


def row_bytes(k: int) -> int:
    """Bytes of a packed row of k bits: whole 64-bit words."""
    return 8 * ((k + 63) // 64)


def rows_of(weight: Tensor) -> tuple[int, int]:
    """(N, K) of a weight [N, ...]."""
    return weight.shape[0], math.prod(weight.shape[1:])


# ---- the ops -------------------------------------------------------------------------------------------------------------


def _bits_like(scores: Tensor) -> Tensor:
    n, k = rows_of(scores)
    return scores.new_empty((n, row_bytes(k)), dtype=torch.uint8)


def _unpack_mask_fake(bits: Tensor, k: int) -> Tensor:
    return bits.new_empty((bits.shape[0], k), dtype=torch.bool)


_pack_mask = register("pack_mask", fake=_bits_like, vmap=looped("pack_mask"))
_unpack_mask = register("unpack_mask", fake=_unpack_mask_fake, vmap=looped("unpack_mask"))
_bernoulli_mask = register(
    "bernoulli_mask", fake=lambda scores, seed, offset: _bits_like(scores), vmap=looped("bernoulli_mask")
)
_topk_mask = register("topk_mask", fake=lambda scores, density, by_magnitude: _bits_like(scores), vmap=looped("topk_mask"))
_threshold_mask = register("threshold_mask", fake=lambda scores, threshold: _bits_like(scores), vmap=looped("threshold_mask"))


def _apply_mask_fake(
    weight: Tensor, bits: Tensor, scores: Tensor | None, signed: bool, rescale: str, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


def _apply_mask_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, bits, scores, signed, rescale, _ = inputs
    ctx.save_for_backward(bits, scores)
    ctx.save_for_forward(bits, scores)
    ctx.options = signed, rescale
    ctx.dtypes = weight.dtype, output.dtype


def _apply_mask_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bits, scores = ctx.saved_tensors
    return _apply_mask(grad, bits, scores, *ctx.options, ctx.dtypes[0]), None, None, None, None, None


def _apply_mask_jvp(ctx: Any, weight: Tensor | None, *others: Any) -> Tensor | None:
    bits, scores = ctx.saved_tensors
    return None if weight is None else _apply_mask(weight, bits, scores, *ctx.options, ctx.dtypes[1])


_apply_mask = register(
    "_apply_mask",
    fake=_apply_mask_fake,
    setup_context=_apply_mask_setup,
    backward=_apply_mask_vjp,
    jvp=_apply_mask_jvp,
    vmap=looped("_apply_mask"),
)


def _mask_gradients_fake(
    grad: Tensor,
    weight: Tensor,
    bits: Tensor,
    scores: Tensor | None,
    slope: str,
    signed: bool,
    rescale: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    of_scores = scores is not None and wanted[1]
    return (
        weight.new_empty(weight.shape if wanted[0] else (0,)),
        scores.new_empty(scores.shape) if of_scores and scores is not None else weight.new_empty((0,)),
    )


_mask_gradients = register("_mask_gradients", fake=_mask_gradients_fake, vmap=looped("_mask_gradients"))


def _masked_linear_fake(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    slope: str,
    signed: bool,
    rescale: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _masked_linear_backward_fake(
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
    of_x = x.new_empty(x.shape if wanted[0] else (0,))
    return of_x, *_mask_gradients_fake(weight, weight, bits, scores, slope, signed, rescale, wanted[1:])


def _rescale_factor(bits: Tensor, weight: Tensor, rescale: str) -> Tensor | float:
    """n / ones, or 1."""
    if not rescale:
        return 1.0
    n, k = rows_of(weight)
    return n * k / _unpack_mask(bits, k).sum(dtype=torch.float64)


def _slope(scores: Tensor, slope: str) -> Any:
    """What the straight-through gradient is multiplied by."""
    if slope == "sigmoid":
        return scores.sigmoid() * (-scores).sigmoid()
    return scores.sign() if slope == "sign" else 1.0


def score_gradient(
    grad: Tensor, weight: Tensor, bits: Tensor, scores: Tensor, slope: str, signed: bool, rescale: str
) -> Tensor:
    """The straight-through gradient of scores in differentiable operations, from that of the effective weight."""
    work = accumulate_type(weight.dtype)
    s = scores.detach().to(work)
    factor = _slope(s, slope)
    c = _rescale_factor(bits, weight, rescale)
    product = grad.to(work) * weight.to(work)
    result = product * (factor * c)
    if rescale == "dwr_grad":
        kept = _apply_mask(product, bits, None, False, "", work).sum()
        result = result - kept * c * c / weight.numel() * factor
    return result.to(scores.dtype)


def _straight_through_tangent(
    weight: Tensor, bits: Tensor, scores: Tensor, tangent: Tensor, slope: str, rescale: str, dtype: torch.dtype
) -> Tensor:
    """The tangent of the effective weight that a tangent of scores brings: the adjoint of score_gradient."""
    work = accumulate_type(weight.dtype)
    c = _rescale_factor(bits, weight, rescale)
    step = tangent.to(work) * (_slope(scores.detach().to(work), slope) * c)
    result = weight.to(work) * step
    if rescale == "dwr_grad":
        result = result - _apply_mask(weight, bits, None, False, "", work) * (step.sum() * c / weight.numel())
    return result.to(dtype)


def _masked_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bits, bias, scores, *options = inputs
    ctx.save_for_backward(x, weight, bits, scores)
    ctx.save_for_forward(x, weight, bits, scores)
    ctx.options = tuple(options)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _masked_linear_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bits, scores = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[4] and scores is not None]
    of_bias = grad.sum_to_size(grad.shape[-1]) if needs[3] and ctx.bias_dtype is not None else None
    slope, signed, rescale = ctx.options
    if torch.is_grad_enabled():  # create_graph: the same in differentiable operations
        flat_grad, flat_x = grad.flatten(0, -2) if grad.dim() > 1 else grad[None], x.reshape(-1, x.shape[-1])
        of_weight: Tensor | None = flat_grad.transpose(0, 1) @ flat_x if wanted[1] or wanted[2] else None
        of_scores: Tensor | None = None
        if wanted[2] and of_weight is not None:
            of_scores = score_gradient(of_weight, weight, bits, scores, slope, signed, rescale)
        if of_weight is not None:
            of_weight = _apply_mask(of_weight, bits, scores, signed, rescale, weight.dtype) if wanted[1] else None
        of_x = grad @ _apply_mask(weight, bits, scores, signed, rescale, x.dtype) if wanted[0] else None
        return of_x, of_weight, None, of_bias, of_scores, None, None, None
    results = _masked_linear_backward(grad, x, weight, bits, scores, slope, signed, rescale, wanted)
    of_x, of_weight, of_scores = (result if want else None for result, want in zip(results, wanted, strict=True))
    return of_x, of_weight, None, of_bias, of_scores, None, None, None


def _masked_linear_jvp(
    ctx: Any, x: Tensor | None, weight: Tensor | None, bits: None, bias: Tensor | None, scores: Tensor | None, *others: Any
) -> Tensor:
    x0, weight0, bits0, scores0 = ctx.saved_tensors
    slope, _, rescale = ctx.options
    parts = [] if bias is None else [bias.expand(*x0.shape[:-1], -1)]
    if x is not None:
        parts.append(_masked_linear(x, weight0, bits0, None, scores0, *ctx.options))
    if weight is not None:
        parts.append(_masked_linear(x0, weight, bits0, None, scores0, *ctx.options))
    if scores is not None:
        parts.append(F.linear(x0, _straight_through_tangent(weight0, bits0, scores0, scores, slope, rescale, x0.dtype)))
    return sum(parts[1:], parts[0])


def _masked_linear_vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *others: Any) -> tuple[Tensor, int]:
    if any(dim is not None for dim in in_dims[1:]):
        return looped("_masked_linear")(info, in_dims, x, *others)
    return _masked_linear(x.movedim(in_dims[0], 0), *others), 0


_masked_linear_backward = register(
    "_masked_linear_backward", fake=_masked_linear_backward_fake, vmap=looped("_masked_linear_backward")
)
_masked_linear = register(
    "_masked_linear",
    fake=_masked_linear_fake,
    setup_context=_masked_linear_setup,
    backward=_masked_linear_vjp,
    jvp=_masked_linear_jvp,
    vmap=_masked_linear_vmap,
)


class _MaskedConvolution(torch.autograd.Function):
    """The vendor's convolution with the effective weight, which backward makes again instead of keeping it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bits: Tensor,
        bias: Tensor | None,
        scores: Tensor | None,
        mask_options: tuple[str, bool, str],
        convolution: tuple[Any, ...],
    ) -> Tensor:
        effective = _effective(weight, bits, scores, *mask_options[1:], x.dtype)
        return F.conv2d(x, effective, bias, *convolution)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bits, bias, scores, ctx.mask_options, ctx.convolution = inputs
        ctx.save_for_backward(x, weight, bits, scores)
        ctx.save_for_forward(x, weight, bits, scores)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, bits, scores = ctx.saved_tensors
        needs = ctx.needs_input_grad
        slope, signed, rescale = ctx.mask_options
        of_scores = needs[4] and scores is not None
        wanted = [needs[0], needs[1] or of_scores, needs[3] and ctx.has_bias]
        stride, padding, dilation, groups = ctx.convolution
        effective = _effective(weight, bits, scores, signed, rescale, x.dtype)
        of_x, of_effective, of_bias = torch.ops.aten.convolution_backward.default(
            grad,
            x,
            effective,
            [weight.shape[0]] if wanted[2] else None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            wanted,
        )
        weight_grad: Tensor | None = None
        score_grad: Tensor | None = None
        if torch.is_grad_enabled():
            if needs[1]:
                weight_grad = _apply_mask(of_effective, bits, scores, signed, rescale, weight.dtype)
            if of_scores:
                score_grad = score_gradient(of_effective, weight, bits, scores, slope, signed, rescale)
        elif wanted[1]:
            pair = _mask_gradients(of_effective, weight, bits, scores, slope, signed, rescale, [needs[1], of_scores])
            weight_grad, score_grad = pair[0] if needs[1] else None, pair[1] if of_scores else None
        return of_x if wanted[0] else None, weight_grad, None, of_bias if wanted[2] else None, score_grad, None, None


class _ConvolutionWithTangents(_MaskedConvolution):
    """The same for torch.func and forward mode; compilers take no Function that has a jvp."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(
        ctx: Any, x: Tensor | None, weight: Tensor | None, bits: None, bias: Tensor | None, scores: Tensor | None, *others: Any
    ) -> Tensor:
        x0, weight0, bits0, scores0 = ctx.saved_tensors
        (slope, signed, rescale), convolution = ctx.mask_options, ctx.convolution
        parts = [] if bias is None else [bias[:, None, None]]
        if x is not None:
            parts.append(F.conv2d(x, _effective(weight0, bits0, scores0, signed, rescale, x0.dtype), None, *convolution))
        if weight is not None:
            parts.append(F.conv2d(x0, _effective(weight, bits0, scores0, signed, rescale, x0.dtype), None, *convolution))
        if scores is not None:
            of_weight = _straight_through_tangent(weight0, bits0, scores0, scores, slope, rescale, x0.dtype)
            parts.append(F.conv2d(x0, of_weight, None, *convolution))
        return sum(parts[1:], parts[0])


_RecordedConvolution = recording(
    "masked_conv2d", _MaskedConvolution.forward, _MaskedConvolution.setup_context, _MaskedConvolution.backward
)


def _effective(weight: Tensor, bits: Tensor, scores: Tensor | None, signed: bool, rescale: str, dtype: torch.dtype) -> Tensor:
    """The effective weight in weight's memory format."""
    effective = _apply_mask(weight, bits, scores, signed, rescale, dtype)
    if transforming() or weight.is_contiguous() or not weight.is_contiguous(memory_format=torch.channels_last):
        return effective
    return effective.contiguous(memory_format=torch.channels_last)


# ---- arguments -----------------------------------------------------------------------------------------------------------


def packed_bits(op: str, mask: Any, weight: Tensor, name: str = "mask") -> Tensor:
    """A mask argument as packed bits: bool of weight's shape, bool [N, K], or packed already."""
    check.tensor(op, name, mask)
    n, k = rows_of(weight)
    if mask.device != weight.device:
        raise ValueError(f"{op}: {name} is on {mask.device}, weight on {weight.device}; move one with .to()")
    if mask.dtype == torch.uint8:
        if not check.has_shape(mask, n, row_bytes(k)):
            raise ValueError(
                f"{op}: packed {name} for weight {tuple(weight.shape)} must be {(n, row_bytes(k))}, got {tuple(mask.shape)}"
                f"{see('maskmm.md#masks')}"
            )
        check_pad(op, mask, k, name)
        return mask.contiguous()
    if mask.dtype != torch.bool:
        hint = _soft_hint(mask) + see("maskmm.md#masks")
        raise TypeError(f"{op}: {name} must be bool or packed uint8, got {check.dtype_name(mask)}{hint}")
    if tuple(mask.shape) != tuple(weight.shape) and not check.has_shape(mask, n, k):
        hint = f"; did you mean {name}.t()?" if tuple(mask.shape) == tuple(weight.shape[::-1]) else ""
        raise ValueError(f"{op}: {name} shape {tuple(mask.shape)} does not match weight shape {tuple(weight.shape)}{hint}")
    return _pack_mask(mask.reshape(n, k))


def _soft_hint(mask: Tensor) -> str:
    """What to do with a mask of numbers."""
    if not mask.is_floating_point():
        return "; compare first, as in mask != 0"
    if not check.contents(mask):
        return "; compare first, as in mask > 0.5"
    soft = ((mask != 0) & (mask != 1)).flatten().nonzero()
    if len(soft) == 0:
        return " of zeros and ones; pass mask.bool()"
    first = int(soft[0])
    return (
        f" with {mask.flatten()[first].item():g} at flat index {first}; a mask keeps or drops: for soft masks use "
        "superposed_linear or multiply the weight"
    )


#: Packed masks that are alive and were looked through: (version, address, columns) of then.
_clear: Any = WeakTensorKeyDictionary()


def check_pad(op: str, bits: Tensor, k: int, name: str = "bits") -> None:
    """Raises ValueError if a pad bit of packed rows of k is set; looks once, until somebody changes them."""
    if k % 64 == 0 or not check.contents(bits) or bits.numel() == 0:
        return
    state = None if bits.is_inference() else (bits._version, bits.data_ptr(), k)
    if state is not None and _clear.get(bits) == state:
        return
    whole, part = divmod(k, 8)
    if bool((bits[..., whole] >> part).any()) or bool(bits[..., whole + 1 :].any()):
        raise ValueError(f"{op}: {name} has bits set beyond its {k} columns, which must be zero; pack with pack_mask")
    if state is not None:
        _clear[bits] = state


def _check_scores(op: str, scores: Any) -> None:
    check.floating(op, "scores", scores)
    if scores.dim() < 2:
        raise ValueError(f"{op}: scores must be [N, K] or have a convolution weight's shape, got {tuple(scores.shape)}")
    if scores.device.type != "cpu" and check.contents(scores):  # on CPU the kernel finds them on its way
        nan = scores.isnan().flatten().nonzero()
        if len(nan):
            raise ValueError(
                f"{op}: scores hold {len(nan)} NaN, the first at flat index {int(nan[0])}; mend them before a mask is made"
            )


def _word(op: str, name: str, value: Any) -> int:
    """An unsigned 64-bit number as the signed one of the same bits."""
    if isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    value = check.integer(op, name, value)
    if isinstance(value, int):
        if not 0 <= value < 2**64:
            raise ValueError(f"{op}: {name} must lie in 0..2**64-1, got {value}")
        return value - 2**64 if value >= 2**63 else value
    return value


def _seed(op: str, seed: Any, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    if isinstance(seed, Tensor):
        check.local(op, "seed", seed)
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be an int or an int64 tensor, got {check.dtype_name(seed)}")
        if seed.numel() != 1:
            raise ValueError(f"{op}: seed must have one element, got shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"{op}: seed is on {seed.device}, scores on {device}; move one with .to()")
        return seed.reshape(())
    return torch.full((), _word(op, "seed", seed), dtype=torch.int64, device=device)


def real(op: str, name: str, value: Any) -> Any:
    """Any kind of real number (numpy's too) as a float, a compiler's as it is; raises TypeError for the rest."""
    if isinstance(value, (float, torch.SymFloat)):
        return value
    if isinstance(value, (bool, str, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    return float(value)


def check_density(op: str, density: Any) -> float:
    """density as a float in (0, 1]."""
    density = real(op, "density", density)
    if not 0 < density <= 1:
        raise ValueError(
            f"{op}: density must lie in (0, 1], got {density}: it is the fraction kept, 0.9 keeps 90% (hidden-networks calls "
            "this sparsity)"
        )
    return density


def check_linear(op: str, x: Any, weight: Any, bias: Any) -> None:
    """What F.linear asks of its arguments."""
    check.floating(op, "x", x)
    check.floating(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [N, K], got {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        got = x.shape[-1] if x.dim() else "missing"
        raise ValueError(
            f"{op}: last dimension of x is {got}, weight {tuple(weight.shape)} needs {weight.shape[1]}; x is [.., K]"
        )
    _check_together(op, x, weight, bias)


def _check_together(op: str, x: Tensor, weight: Tensor, bias: Any) -> None:
    if weight.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.device}, x on {x.device}; move one with .to()")
    if bias is None:
        return
    check.floating(op, "bias", bias)
    if not check.has_shape(bias, weight.shape[0]):
        raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"{op}: bias is on {bias.device}, x on {x.device}; move one with .to()")


def in_autocast(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x and bias in autocast's type where it is on; the weight stays float32, because its tiles are made in x's type anyway."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x = x if x.dtype == torch.float64 else x.to(dtype)
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)
        weight = weight if weight.dtype in {torch.float64, torch.float32} else weight.to(dtype)
        if weight.dtype == torch.float32 and x.dtype == dtype:
            return x, weight, bias
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{op}: {name} must be {check.dtype_name(x)} as x is, got {check.dtype_name(tensor)}; convert one with .to()"
            )
    return x, weight, bias


def _pair(op: str, name: str, value: Any, least: int) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) == 1:
        values *= 2
    if len(values) != 2:
        raise ValueError(f"{op}: {name} must be an int or two, got {value!r}")
    values = tuple(check.integer(op, name, v) for v in values)
    if any(v < least for v in values):
        raise ValueError(f"{op}: {name} must be at least {least}, got {value!r}")
    return values


def _convolution(
    op: str, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple[Tensor, tuple[Any, ...]]:
    """x, padded already where a convolution can't, and (stride, padding, dilation, groups) of aten's convolution."""
    check.floating(op, "x", x)
    check.floating(op, "weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must be [Cout, Cin/groups, kh, kw], got {tuple(weight.shape)}")
    groups = check.integer(op, "groups", groups)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{op}: groups must divide the {weight.shape[0]} output channels, got {groups}")
    if x.dim() not in {3, 4} or x.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"{op}: x must be [B, {weight.shape[1] * groups}, H, W] for weight {tuple(weight.shape)} and groups={groups}, got "
            f"{tuple(x.shape)}"
        )
    _check_together(op, x, weight, bias)
    stride, dilation = _pair(op, "stride", stride, 1), _pair(op, "dilation", dilation, 1)
    if isinstance(padding, str):
        check.one_of(op, "padding", padding, ("same", "valid"))
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"{op}: padding='same' needs stride 1, got {stride}; give the widths as ints")
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = (totals[0] // 2, totals[1] // 2)
        if any(total % 2 for total in totals):
            x = F.pad(x, (0, totals[1] % 2, 0, totals[0] % 2))
    else:
        padding = _pair(op, "padding", padding, 0)
    for axis, (size, p, d, k) in enumerate(zip(x.shape[-2:], padding, dilation, weight.shape[2:], strict=True)):
        if size + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f"{op}: {'HW'[axis]} of x, {size} with padding {p}, is smaller than the kernel, {k} with dilation {d}"
            )
    return x, (stride, padding, dilation, groups)


def _sample(
    op: str, weight: Tensor, scores: Any, sampler: Any, density: Any, seed: Any, rescale: Any, signed: Any
) -> tuple[Tensor, str]:
    """The packed mask of a supermask layer, and the slope of its gradient."""
    _check_scores(op, scores)
    check.one_of(op, "sampler", sampler, SAMPLERS)
    if rescale is not None:
        check.one_of(op, "rescale", rescale, RESCALES)
    if not isinstance(signed, bool):
        raise TypeError(f"{op}: signed must be a bool, got {signed!r}")
    if tuple(scores.shape) != tuple(weight.shape):
        raise ValueError(f"{op}: scores {tuple(scores.shape)} must have weight's shape {tuple(weight.shape)}")
    if scores.device != weight.device:
        raise ValueError(f"{op}: scores are on {scores.device}, weight on {weight.device}; move one with .to()")
    if sampler == "topk" and density is None:
        raise ValueError(f"{op}: sampler 'topk' needs density, the fraction kept")
    if sampler != "topk" and density is not None:
        raise ValueError(f"{op}: density goes with sampler 'topk', got density={density} and {sampler!r}")
    if sampler != "bernoulli" and seed is not None:
        raise ValueError(f"{op}: seed goes with sampler 'bernoulli', got {sampler!r}")
    if signed and sampler != "topk":
        raise ValueError(f"{op}: signed=True goes with sampler 'topk', got {sampler!r}")
    if signed and rescale == "dwr_grad":
        raise ValueError(f"{op}: rescale='dwr_grad' counts ones and is not defined for signed masks; use 'dwr'")
    bits, slope = _draw(op, scores.detach(), sampler, density, seed, signed)
    if rescale is not None and check.contents(bits) and weight.numel() and not bits.any():
        raise ValueError(
            f"{op}: rescale={rescale!r} divides by the number of kept weights, and none is kept; raise scores or density"
        )
    return bits, slope


def _draw(op: str, scores: Tensor, sampler: str, density: Any, seed: Any, signed: bool) -> tuple[Tensor, str]:
    if sampler == "bernoulli":
        return _bernoulli_mask(scores, _seed(op, seed, scores.device), 0), "sigmoid"
    if sampler == "topk":
        return _topk_mask(scores, check_density(op, density), True), "one" if signed else "sign"
    return _threshold_mask(scores, 0.0), "one"


# ---- masks ---------------------------------------------------------------------------------------------------------------


def pack_mask(mask: Tensor) -> Tensor:
    """A mask as bits: 1/8 of its memory, 1/32 of a float mask's.

    Args:
        mask: bool [N, K], or of a weight's shape [N, ...], whose rows are its K other elements.

    Returns:
        uint8 [N, 8 * ceil(K / 64)]: bit k of a row is bit k % 8 of byte k // 8 (little-endian); pad bits are zero.

    Raises:
        TypeError: mask is not a bool tensor.
        ValueError: mask has fewer than two dimensions.
    """
    op = "pack_mask"
    check.tensor(op, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool, got {check.dtype_name(mask)}; compare first, as in scores > 0")
    if mask.dim() < 2:
        raise ValueError(f"{op}: mask must be [N, K], got {tuple(mask.shape)}")
    return _pack_mask(mask)


def unpack_mask(bits: Tensor, k: int) -> Tensor:
    """The bool mask of packed bits; the inverse of :func:`pack_mask`.

    Args:
        bits: uint8 [N, 8 * ceil(k / 64)].
        k: columns of the mask.

    Returns:
        bool [N, k].

    Raises:
        TypeError: bits is not a uint8 tensor, or k not an int.
        ValueError: bits are of another number of columns, or have bits set beyond k (looked for on eager CPU calls).
    """
    op = "unpack_mask"
    check.tensor(op, "bits", bits)
    if bits.dtype != torch.uint8:
        raise TypeError(f"{op}: bits must be uint8, got {check.dtype_name(bits)}")
    k = check.integer(op, "k", k)
    if k < 0:
        raise ValueError(f"{op}: k must be at least 0, got {k}")
    if bits.dim() != 2 or bits.shape[1] != row_bytes(k):
        raise ValueError(f"{op}: bits of k={k} must be [N, {row_bytes(k)}], got {tuple(bits.shape)}")
    check_pad(op, bits, k)
    return _unpack_mask(bits.contiguous(), k)


def bernoulli_mask(scores: Tensor, seed: int | Tensor, *, offset: int = 0) -> Tensor:
    """A random packed mask that keeps each weight with probability sigmoid(score).

    The bits depend on scores, seed and offset alone: they are the same on every device, for every number of threads and
    every instruction set. Word j of Philox4x32-10 at counter offset + i belongs to flat index 4 i + j; the bit is set where it
    is below sigmoid(score) * 2**32, sigmoid in float32 by one stated sequence of IEEE operations (Salmon et al., 2011; Zhou et
    al., 2019, arXiv 1905.01067).

    Args:
        scores: [N, K], or a convolution weight's shape; float16, bfloat16, float32 or float64 (rounded to float32).
        seed: int in 0..2**64-1, or an int64 tensor with one element on scores' device.
        offset: int in 0..2**64-1, added to the counter: a mask of n scores uses ceil(n / 4) of them.

    Returns:
        uint8 [N, 8 * ceil(K / 64)], as :func:`pack_mask`. Not differentiable; see :func:`supermask_linear`.

    Raises:
        TypeError: scores are not floating, or seed or offset not ints.
        ValueError: scores have fewer than two dimensions or hold NaN (looked for on CPU), or seed or offset is out of range.
    """
    op = "bernoulli_mask"
    _check_scores(op, scores)
    if seed is None:
        raise TypeError(f"{op}: seed must be an int or an int64 tensor, got None")
    return _bernoulli_mask(scores.detach(), _seed(op, seed, scores.device), _word(op, "offset", offset))


def topk_mask(scores: Tensor, density: float, *, abs: bool = True) -> Tensor:  # noqa: A002 (torch's own word)
    """The packed mask of the largest scores of the whole tensor.

    Args:
        scores: [N, K], or a convolution weight's shape; float16, bfloat16, float32 or float64.
        density: the fraction kept, in (0, 1]: n - int((1 - density) * n) of n scores.
        abs: rank by magnitude. Among equals the lowest flat index wins; -0 and +0 are equal.

    Returns:
        uint8 [N, 8 * ceil(K / 64)], as :func:`pack_mask`. Not differentiable; see :func:`supermask_linear`.

    Raises:
        TypeError: scores are not floating, density is not a number or abs not a bool.
        ValueError: scores have fewer than two dimensions or hold NaN (looked for on CPU), or density is out of range.
    """
    op = "topk_mask"
    _check_scores(op, scores)
    if not isinstance(abs, bool):
        raise TypeError(f"{op}: abs must be a bool, got {abs!r}")
    return _topk_mask(scores.detach(), check_density(op, density), abs)


def threshold_mask(scores: Tensor, threshold: float = 0.0) -> Tensor:
    """The packed mask of the scores that reach a threshold.

    Args:
        scores: [N, K], or a convolution weight's shape; float16, bfloat16, float32 or float64.
        threshold: a mask bit is set where score >= threshold.

    Returns:
        uint8 [N, 8 * ceil(K / 64)], as :func:`pack_mask`. Not differentiable; see :func:`supermask_linear`.

    Raises:
        TypeError: scores are not floating, or threshold is not a number.
        ValueError: scores have fewer than two dimensions or hold NaN (looked for on CPU), or threshold is NaN.
    """
    op = "threshold_mask"
    _check_scores(op, scores)
    threshold = real(op, "threshold", threshold)
    if threshold != threshold:  # noqa: PLR0124 (compilers can't trace math.isnan)
        raise ValueError(f"{op}: threshold must not be NaN")
    return _threshold_mask(scores.detach(), threshold)


# ---- layers --------------------------------------------------------------------------------------------------------------


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight * mask, bias)`` without keeping weight * mask.

    Args:
        x: [.., K], float16, bfloat16, float32 or float64.
        weight: [N, K] of the same dtype.
        mask: bool [N, K], or packed uint8 [N, 8 * ceil(K / 64)].
        bias: [N], or None.

    Returns:
        [.., N] in x's dtype; 16-bit ones are computed in float32. Twice differentiable in x, weight and bias; weight's gradient
        is exactly 0 off the mask, so that no optimizer revives a pruned weight by it. Under autocast x and bias take autocast's
        type.

    Raises:
        TypeError: x, weight or bias is not floating or they differ in dtype, or mask is neither bool nor uint8.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "masked_linear"
    check_linear(op, x, weight, bias)
    bits = packed_bits(op, mask, weight)
    x, weight, bias = in_autocast(op, x, weight, bias)
    return _masked_linear(x, weight, bits, bias, None, "one", False, "")


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` with weight * mask, without keeping weight * mask for backward.

    Args:
        x: [B, Cin, H, W] or [Cin, H, W], float16, bfloat16, float32 or float64; its memory format is kept as F.conv2d keeps it.
        weight: [Cout, Cin / groups, kh, kw] of the same dtype.
        mask: bool of weight's shape, bool [Cout, K], or packed uint8 [Cout, 8 * ceil(K / 64)], K = Cin / groups * kh * kw.
        bias: [Cout], or None.
        stride: as F.conv2d.
        padding: as F.conv2d; also "same" or "valid".
        dilation: as F.conv2d.
        groups: as F.conv2d.

    Returns:
        What F.conv2d returns. Twice differentiable in x, weight and bias; weight's gradient is exactly 0 off the mask.

    Raises:
        TypeError: x, weight or bias is not floating or they differ in dtype, or mask is neither bool nor uint8.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "masked_conv2d"
    x, convolution = _convolution(op, x, weight, bias, stride, padding, dilation, groups)
    bits = packed_bits(op, mask, weight)
    x, weight, bias = in_autocast(op, x, weight, bias)
    return _masked_convolution(x, weight, bits, bias, None, ("one", False, ""), convolution)


def supermask_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None = None,
    *,
    sampler: str = "bernoulli",
    density: float | None = None,
    seed: int | Tensor | None = None,
    rescale: str | None = None,
    signed: bool = False,
) -> Tensor:
    """:func:`masked_linear` with a mask made from scores in the forward pass, and a straight-through gradient to them.

    Args:
        x: [.., K], float16, bfloat16, float32 or float64.
        weight: [N, K] of the same dtype; gets the masked gradient if it requires one.
        scores: [N, K], floating. Their gradient is that of the effective weight times weight times the sampler's slope.
        bias: [N], or None.
        sampler: "bernoulli" keeps with probability sigmoid(score), slope sigmoid'(score) (Zhou et al., 2019); "topk" keeps the
            largest magnitudes, slope sign(score) (Ramanujan et al., 2019); "threshold" keeps score >= 0, slope 1.
        density: the fraction that "topk" keeps, in (0, 1]; for "topk" alone.
        seed: of "bernoulli", as :func:`bernoulli_mask`'s; None draws one from torch's generator of the device, as dropout does.
        rescale: "dwr" multiplies by n / ones, a constant for the gradient; "dwr_grad" differentiates the count through the
            mask.
        signed: for "topk": kept weights are also multiplied by the sign of their score (0 counts as +); slope 1.

    Returns:
        [.., N] in x's dtype. For backward x, weight, scores and the packed mask are kept, nothing else.

    Raises:
        TypeError: a tensor is not floating, x, weight and bias differ in dtype, or an option has the wrong type.
        ValueError: anything else, as scores with NaN, or none kept where rescale divides by their number (looked for on CPU).
    """
    op = "supermask_linear"
    check_linear(op, x, weight, bias)
    x, weight, bias = in_autocast(op, x, weight, bias)
    bits, slope = _sample(op, weight, scores, sampler, density, seed, rescale, signed)
    return _masked_linear(x, weight, bits, bias, scores, slope, signed, rescale or "")


def supermask_conv2d(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    sampler: str = "bernoulli",
    density: float | None = None,
    seed: int | Tensor | None = None,
    rescale: str | None = None,
    signed: bool = False,
) -> Tensor:
    """:func:`masked_conv2d` with a mask made from scores in the forward pass, and a straight-through gradient to them.

    Args:
        x: [B, Cin, H, W] or [Cin, H, W], float16, bfloat16, float32 or float64.
        weight: [Cout, Cin / groups, kh, kw] of the same dtype.
        scores: of weight's shape, floating.
        bias: [Cout], or None.
        stride: as F.conv2d.
        padding: as F.conv2d; also "same" or "valid".
        dilation: as F.conv2d.
        groups: as F.conv2d.
        sampler: as :func:`supermask_linear`.
        density: as :func:`supermask_linear`.
        seed: as :func:`supermask_linear`.
        rescale: as :func:`supermask_linear`.
        signed: as :func:`supermask_linear`.

    Returns:
        What F.conv2d returns. For backward x, weight, scores and the packed mask are kept, nothing else.

    Raises:
        TypeError: a tensor is not floating, x, weight and bias differ in dtype, or an option has the wrong type.
        ValueError: anything else, as scores with NaN, or none kept where rescale divides by their number (looked for on CPU).
    """
    op = "supermask_conv2d"
    x, convolution = _convolution(op, x, weight, bias, stride, padding, dilation, groups)
    x, weight, bias = in_autocast(op, x, weight, bias)
    bits, slope = _sample(op, weight, scores, sampler, density, seed, rescale, signed)
    return _masked_convolution(x, weight, bits, bias, scores, (slope, signed, rescale or ""), convolution)


def _masked_convolution(x: Tensor, *args: Any) -> Tensor:
    if x.dim() == 3:
        return _masked_convolution(x[None], *args)[0]
    y: Tensor
    if transforming():
        y = _ConvolutionWithTangents.apply(x, *args)
    elif torch.compiler.is_compiling():
        y = _MaskedConvolution.apply(x, *args)
    elif torch.is_grad_enabled() and torch._C._any_requires_grad(x, *args):
        y = _RecordedConvolution.apply(x, *args)
    else:
        y = _MaskedConvolution.forward(x, *args)
    return y
