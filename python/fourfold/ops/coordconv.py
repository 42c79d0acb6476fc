"""CoordConv: coord_conv1d/2d/3d, coord_conv_transpose2d, add_coords.

The coordinates do not depend on the input, so ``conv(cat(x, coords), cat(W, Wc)) = conv(x, W) + map`` with a map [Cout, *out]
that the weights and the image size give. Two ways to the same result:

eager: the vendor's convolution, then one pass that adds the map from small separable tables and applies the activation;
otherwise (compiling, exporting, torch.func, tensor subclasses): plain aten operations that compilers and exporters know.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference._dtypes import accumulate_type
from . import _checks as check
from ._coord_plan import (
    CoordSpec,
    Geometry,
    Plan,
    coordinate_batch,
    coordinates,
    kept_coordinates,
    kept_radius,
    pad,
    plan_of,
)
from ._register import register, transforming

ACTIVATIONS = ("relu", "silu", "gelu")  # or None
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
GROUPS_MODES = ("shared", "concat")

IntOrInts = int | Sequence[int]

_AXES = ("L", "H,W", "D,H,W")


# ---- the ops underneath: all internal --------------------------------------------------------------------------------


def _is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, *size] lies in channels_last order (and not in the usual one)."""
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _in_channels_last(x: Tensor) -> Tensor:
    """x [B, C, *size] with two or three spatial axes, copied into channels_last order where it does not lie so."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _image_like(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty image [C, *size] in the memory order of grad [B, C, *size]."""
    if not grad.is_contiguous() and grad.movedim(1, -1).is_contiguous():
        return torch.empty(*grad.shape[2:], grad.shape[1], dtype=dtype, device=grad.device).movedim(-1, 0)
    return torch.empty(grad.shape[1:], dtype=dtype, device=grad.device)


def _table_length(out_size: Sequence[int], class_count: Sequence[int]) -> int:
    every = 1
    for count in class_count:
        every = every * count
    return sum(out * (every // own) for out, own in zip(out_size, class_count, strict=True))


def _coord_tables_fake(
    coord_weight: Tensor,
    taps: Tensor,
    valid: Tensor,
    out_size: Sequence[int],
    class_count: Sequence[int],
    channels: Sequence[int],
    channels_last: bool,
) -> Tensor:
    length, cout = _table_length(out_size, class_count), coord_weight.shape[0]
    return taps.new_empty(length, cout).T if channels_last else taps.new_empty(cout, length)


def _coord_tables_backward_fake(
    map_grad: Tensor,
    taps: Tensor,
    valid: Tensor,
    classes: Tensor,
    kernel: Sequence[int],
    class_count: Sequence[int],
    channels: Sequence[int],
    coord_channels: int,
) -> tuple[Tensor, Tensor]:
    cout = map_grad.shape[0]
    return map_grad.new_empty(cout, coord_channels, *kernel), map_grad.new_empty(cout)


def _batch_sum_fake(grad: Tensor, relu_output: Tensor | None) -> tuple[Tensor, Tensor]:
    kept = grad.new_empty(0) if relu_output is None else torch.empty_like(grad)
    return _image_like(grad, accumulate_type(grad.dtype)), kept


_coord_tables = register("_coord_tables", fake=_coord_tables_fake)
_coord_tables_backward = register("_coord_tables_backward", fake=_coord_tables_backward_fake)
_batch_sum = register("_batch_sum", fake=_batch_sum_fake)
_add_map_ = register("_add_map_", fake=lambda *_: None)


# ---- arguments -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Convolution:
    """A convolution's arguments, checked; what torch.convolution wants, and the coordinates' view of it."""

    geometry: Geometry
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # by the convolution itself
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    before: tuple[int, ...]  # by F.pad, ahead of it
    after: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        return self.geometry.mode == "transposed"

    @property
    def pads(self) -> bool:
        return any(self.before) or any(self.after)

    def padded(self, x: Tensor) -> Tensor:
        if not self.pads:
            return x
        mode = self.geometry.mode
        return pad(x, self.before, self.after, "zeros" if mode == "transposed" else mode)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """x already padded."""
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, groups
        )


def _ints(op: str, name: str, value: Any, rank: int, least: int) -> tuple[int, ...]:
    """A number or one per axis, as a tuple."""
    if type(value) is int:
        values: tuple[int, ...] = (value,) * rank
    elif isinstance(value, (tuple, list)):
        values = tuple(v if type(v) is int else check.integer(op, name, v) for v in value)
        if len(values) == 1:
            values = values * rank
    else:
        values = (check.integer(op, name, value),) * rank
    if len(values) != rank:
        raise ValueError(f"{op}: {name} must be an int or {rank} of them, got {value!r}")
    if min(values) < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value!r}")
    return values


def _paddings(
    op: str, padding: Any, stride: tuple[int, ...], dilation: tuple[int, ...], kernel: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """padding as widths before and after, per axis."""
    rank = len(kernel)
    if not isinstance(padding, str):
        widths = _ints(op, "padding", padding, rank, 0)
        return widths, widths
    check.one_of(op, "padding", padding, ("same", "valid"))
    if padding == "valid":
        return (0,) * rank, (0,) * rank
    if any(s != 1 for s in stride):
        raise ValueError(f"{op}: padding='same' needs stride 1, got {stride}; give the widths as ints")
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)


def check_sizes(
    op: str, rank: int, *, kernel_size: Any, stride: Any, padding: Any, dilation: Any, output_padding: Any = None
) -> None:
    """Checks what a module keeps, in its own name, before there is an input; output_padding: of the transposed form."""
    if isinstance(kernel_size, (tuple, list)) and len(kernel_size) != rank:
        # One number would do for the others, but of the kernel torch.nn makes a weight with as many axes.
        raise ValueError(f"{op}: kernel_size must be an int or {rank} of them, got {kernel_size!r}")
    kernel = _ints(op, "kernel_size", kernel_size, rank, 1)
    strides, dilations = _ints(op, "stride", stride, rank, 1), _ints(op, "dilation", dilation, rank, 1)
    if output_padding is None:
        _paddings(op, padding, strides, dilations, kernel)
    else:
        _ints(op, "padding", padding, rank, 0)
        _ints(op, "output_padding", output_padding, rank, 0)


def _check_tensors(op: str, x: Any, weight: Any, coord_weight: Any, bias: Any, rank: int) -> None:
    check.floating(op, "x", x)
    check.floating(op, "weight", weight)
    check.floating(op, "coord_weight", coord_weight)
    if bias is not None:
        check.floating(op, "bias", bias)
    if x.dim() not in (rank + 1, rank + 2):
        axes = _AXES[rank - 1]
        raise ValueError(
            f"{op}: expected {rank + 1}D (C,{axes}) or {rank + 2}D (N,C,{axes}) input, got {x.dim()}D of shape {tuple(x.shape)}"
        )
    if weight.dim() != rank + 2:
        raise ValueError(f"{op}: weight must be {rank + 2}D, got {weight.dim()}D of shape {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("coord_weight", coord_weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: x is on {x.device}, but {name} is on {tensor.device}; move one with .to()")


def _check_dtypes(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{op}: x is {check.dtype_name(x)}, but {name} is {check.dtype_name(tensor)}; convert one with .to()"
            )


def _check_channels(op: str, got: int, expected: int, nc: int, excluding: str) -> None:
    if got == expected:
        return
    hint = ""
    if got == expected + nc:
        hint = f"; {excluding} excludes the {nc} coordinate channels, so pass x without AddCoords"
    raise ValueError(f"{op}: expected {expected} input channels, got {got}{hint}")


def _check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], why: str = "") -> None:
    if not check.has_shape(tensor, *shape):
        raise ValueError(f"{op}: {name} must have shape {shape}{why}, got {tuple(tensor.shape)}")


def _check_padding(op: str, mode: str, size: Sequence[int], before: Sequence[int], after: Sequence[int]) -> None:
    """The padding modes' own limits, which F.pad states without the axis."""
    if mode not in ("reflect", "circular"):
        return
    for axis, (n, left, right) in enumerate(zip(size, before, after, strict=True)):
        width = max(left, right)
        if width >= n + (mode == "circular"):
            limit = "less than" if mode == "reflect" else "at most"
            raise ValueError(
                f"{op}: padding {width} must be {limit} the input size {n} of axis {_axis_name(len(size), axis)} in "
                f"padding_mode={mode!r}"
            )


def _axis_name(rank: int, axis: int) -> str:
    return _AXES[rank - 1].split(",")[axis]


def _check_out_size(op: str, size: Sequence[int], out_size: Sequence[int], kernel: tuple[int, ...]) -> None:
    if any(n < 1 for n in size) or any(n < 1 for n in out_size):
        raise ValueError(
            f"{op}: the output size would be {tuple(out_size)} for input size {tuple(size)} and kernel {kernel}; every size "
            "must be at least 1"
        )


def _describe(
    op: str,
    x: Tensor,
    kernel: tuple[int, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
) -> _Convolution:
    rank = len(kernel)
    strides = _ints(op, "stride", stride, rank, 1)
    dilations = _ints(op, "dilation", dilation, rank, 1)
    before, after = _paddings(op, padding, strides, dilations, kernel)
    size = tuple(x.shape[-rank:])
    _check_padding(op, padding_mode, size, before, after)
    out_size = tuple(
        (n + left + right - d * (k - 1) - 1) // s + 1
        for n, left, right, d, k, s in zip(size, before, after, dilations, kernel, strides, strict=True)
    )
    _check_out_size(op, size, out_size, kernel)
    geometry = Geometry(size, out_size, kernel, strides, before, dilations, padding_mode)
    zero = (0,) * rank
    if padding_mode != "zeros":
        return _Convolution(geometry, strides, zero, dilations, zero, groups, before, after)
    # An uneven "same" keeps its surplus, at the end, for F.pad.
    surplus = tuple(right - left for left, right in zip(before, after, strict=True))
    return _Convolution(geometry, strides, before, dilations, zero, groups, zero, surplus)


def _describe_transposed(
    op: str, x: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> _Convolution:
    rank = len(kernel)
    strides = _ints(op, "stride", stride, rank, 1)
    dilations = _ints(op, "dilation", dilation, rank, 1)
    widths = _ints(op, "padding", padding, rank, 0)
    extra = _ints(op, "output_padding", output_padding, rank, 0)
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise ValueError(f"{op}: output_padding must be smaller than stride or dilation, got {output_padding!r}")
    size = tuple(x.shape[-rank:])
    out_size = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(size, strides, widths, dilations, kernel, extra, strict=True)
    )
    _check_out_size(op, size, out_size, kernel)
    geometry = Geometry(size, out_size, kernel, strides, widths, dilations, "transposed")
    zero = (0,) * rank
    return _Convolution(geometry, strides, widths, dilations, extra, groups, zero, zero)


# ---- plain aten ------------------------------------------------------------------------------------------------------


def _map_in_aten(
    convolution: _Convolution, spec: CoordSpec, coord_weight: Tensor, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """The map [1, Cout, *out] as compilers and exporters like it; coord_weight [Cout, nc, *k].

    A convolution even where kernels are 1 x 1: a compiler would compute that map anew for every sample. The coordinates lie in
    memory as x does, so that the map does too.
    """
    coords = coordinate_batch(convolution.geometry.size, spec, dtype, coord_weight.device)
    if channels_last:
        coords = _in_channels_last(coords)
    coord_weight = coord_weight.to(dtype)
    weight = coord_weight.transpose(0, 1) if convolution.transposed else coord_weight
    return convolution(convolution.padded(coords), weight, None, 1)


_ACTIVATE = {None: lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def _in_aten(
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None,
    convolution: _Convolution,
    spec: CoordSpec,
    activation: str | None,
) -> Tensor:
    y = convolution(convolution.padded(x), weight, bias, convolution.groups)
    coord_map = _map_in_aten(convolution, spec, coord_weight, accumulate_type(y.dtype), _is_channels_last(x))
    result: Tensor = _ACTIVATE[activation]((y.to(coord_map.dtype) + coord_map).to(y.dtype))
    return result


# ---- eager -----------------------------------------------------------------------------------------------------------


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _is_plain(*tensors: Any) -> bool:
    """Whether the call is an ordinary eager one on ordinary tensors, which the mutating ops may serve."""
    if (
        torch.compiler.is_compiling()
        or transforming()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN_TYPES or t.layout is not torch.strided):
            return False
    return tensors[0].device.type in ("cpu", "cuda")


def _dense_part(plan: Plan, convolution: _Convolution, coord_weight: Tensor, like: Tensor) -> Tensor | None:
    """The radius channel's part of the map [Cout, *out], in the memory order of like [B, Cout, *out]."""
    if plan.spec.r is None:
        return None
    r = convolution.padded(kept_radius(plan.geometry.size, plan.spec, plan.taps.dtype, like.device))
    weight = coord_weight[:, -1:].to(plan.taps.dtype)
    dense = convolution(r, weight.transpose(0, 1) if convolution.transposed else weight, None, 1)[0]
    return dense.movedim(0, -1).contiguous().movedim(-1, 0) if _is_channels_last(like) else dense.contiguous()


def _add_map(
    y: Tensor, coord_weight: Tensor, plan: Plan, convolution: _Convolution, activation: str | None, keep: bool
) -> Tensor:
    """y [B, Cout, *out], fresh from the convolution, becomes activation(y + map) in place and is returned.

    keep: y becomes y + map, the activated tensor is another.
    """
    channels_last = _is_channels_last(y)
    tables = _coord_tables(
        coord_weight.to(plan.taps.dtype),
        plan.taps,
        plan.valid,
        plan.geometry.out_size,
        plan.class_count,
        plan.channels,
        channels_last,
    )
    activated = torch.empty_like(y) if keep else None
    dense = _dense_part(plan, convolution, coord_weight, y)
    _add_map_(y, tables, plan.classes, plan.class_count, dense, activation or "none", activated)
    return y if activated is None else activated


class _CoordConv(torch.autograd.Function):
    """A CoordConv with its activation as one node.

    It keeps what the plain convolution and activation would: x, weight, and the activation's input (relu: output). For silu
    and gelu that input is a second result, so that a gradient of the gradient finds its way back through it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        coord_weight: Tensor,
        bias: Tensor | None,
        convolution: _Convolution,
        plan: Plan,
        activation: str | None,
    ) -> Any:
        y = _dense(convolution(x, weight, bias, convolution.groups))
        keep = activation in ("silu", "gelu")
        result = _add_map(y, coord_weight, plan, convolution, activation, keep)
        ctx.set_materialize_grads(False)
        ctx.convolution, ctx.plan, ctx.activation = convolution, plan, activation
        ctx.coord_channels, ctx.coord_dtype = coord_weight.shape[1], coord_weight.dtype
        ctx.bias_sizes = None if bias is None else [y.shape[1]]
        ctx.save_for_backward(x, weight, y if activation is not None else None)
        return (result, y) if keep else result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_y: Tensor | None = None) -> Any:
        x, weight, kept = ctx.saved_tensors
        convolution = ctx.convolution
        need_x, need_weight, need_coords, need_bias = ctx.needs_input_grad[:4]
        summed = grad_coords = grad_bias = None
        if grad is not None:
            if ctx.activation == "relu":
                if need_coords and not torch.is_grad_enabled():
                    summed, grad = _batch_sum(_dense_as(grad, kept), kept)
                else:
                    grad = torch.ops.aten.threshold_backward(grad, kept, 0)
            elif ctx.activation == "silu":
                if torch.is_grad_enabled():  # silu_backward has no gradient of its own
                    sigmoid = kept.sigmoid()
                    grad = grad * sigmoid * (1 + kept * (1 - sigmoid))
                else:
                    grad = torch.ops.aten.silu_backward(grad, kept)
            elif ctx.activation == "gelu":
                grad = torch.ops.aten.gelu_backward(grad, kept)
        if grad_y is not None:
            grad = grad_y if grad is None else grad + grad_y
        if grad is None:
            return (None,) * 7
        if need_coords and torch.is_grad_enabled():
            grad_coords = _coord_gradient_in_aten(grad, ctx)
        elif need_coords:
            if summed is None:
                summed, _ = _batch_sum(_dense(grad), None)
            grad_coords, grad_bias = _coord_gradient(summed, ctx)
            grad_bias = grad_bias.to(weight.dtype) if need_bias else None
        from_vendor = need_bias and grad_bias is None
        grad_x = grad_weight = None
        if need_x or need_weight or from_vendor:
            grad_x, grad_weight, vendor_bias = torch.ops.aten.convolution_backward(
                grad,
                x,
                weight,
                ctx.bias_sizes,
                convolution.stride,
                convolution.padding,
                convolution.dilation,
                convolution.transposed,
                convolution.output_padding,
                convolution.groups,
                [need_x, need_weight, from_vendor],
            )
            grad_bias = vendor_bias if from_vendor else grad_bias
        return grad_x, grad_weight, grad_coords, grad_bias, None, None, None


def _dense(t: Tensor) -> Tensor:
    """t in one of the two memory orders that the ops know."""
    return t if t.is_contiguous() or _is_channels_last(t) else t.contiguous()


def _dense_as(t: Tensor, like: Tensor) -> Tensor:
    """t in like's one of these orders."""
    return _in_channels_last(t) if _is_channels_last(like) else t.contiguous()


def _convolution_weight_gradient(grad: Tensor, coords: Tensor, convolution: _Convolution) -> Tensor:
    """The gradient of a weight [Cout, nc, *k] over coords [1, nc, *size]; grad [1, Cout, *out]."""
    nc, cout, kernel = coords.shape[1], grad.shape[1], convolution.geometry.kernel
    weight = coords.new_empty((nc, cout, *kernel) if convolution.transposed else (cout, nc, *kernel))
    gradient = torch.ops.aten.convolution_backward(
        grad,
        convolution.padded(coords),
        weight,
        None,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.transposed,
        convolution.output_padding,
        1,
        [False, True, False],
    )[1]
    result: Tensor = gradient.transpose(0, 1) if convolution.transposed else gradient
    return result


def _coord_gradient(summed: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    """The gradients of coord_weight and bias from the batch sum [Cout, *out] of the result's gradient."""
    plan = ctx.plan
    grad_coords, grad_bias = _coord_tables_backward(
        summed, plan.taps, plan.valid, plan.classes, plan.geometry.kernel, plan.class_count, plan.channels, ctx.coord_channels
    )
    if plan.spec.r is not None:
        r = kept_radius(plan.geometry.size, plan.spec, plan.taps.dtype, summed.device)
        grad_coords[:, -1:] = _convolution_weight_gradient(summed[None], r, ctx.convolution)
    return grad_coords.to(ctx.coord_dtype), grad_bias


def _coord_gradient_in_aten(grad: Tensor, ctx: Any) -> Tensor:
    """The gradient of coord_weight in operations that have gradients themselves."""
    plan = ctx.plan
    coords = coordinate_batch(plan.geometry.size, plan.spec, plan.taps.dtype, grad.device)
    summed = grad.to(plan.taps.dtype).sum(0, keepdim=True)
    return _convolution_weight_gradient(summed, coords, ctx.convolution).to(ctx.coord_dtype)


def _run(
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,  # [Cout, nc, *k]
    bias: Tensor | None,
    convolution: _Convolution,
    spec: CoordSpec,
    activation: str | None,
) -> Tensor:
    """The CoordConv of a batch, arguments checked and autocast applied."""
    if not _is_plain(x, weight, coord_weight, bias):
        return _in_aten(x, weight, coord_weight, bias, convolution, spec, activation)
    plan = plan_of(convolution.geometry, spec, accumulate_type(x.dtype), x.device)
    return _run_eager(x, weight, coord_weight, bias, convolution, plan, activation)


def _run_eager(
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None,
    convolution: _Convolution,
    plan: Plan,
    activation: str | None,
) -> Tensor:
    if convolution.pads:
        x = convolution.padded(x)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, coord_weight, bias):
        result = _CoordConv.apply(x, weight, coord_weight, bias, convolution, plan, activation)
        return result[0] if activation in ("silu", "gelu") else result
    y = _dense(convolution(x, weight, bias, convolution.groups))
    return _add_map(y, coord_weight, plan, convolution, activation, keep=False)


# ---- autocast, batches, groups ---------------------------------------------------------------------------------------


def _autocast(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """x, weight and bias in autocast's type where it is on, and a context in which it is off: coordinates stay float32."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        _check_dtypes(op, x, weight, bias)
        return x, weight, bias, contextlib.nullcontext()
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 else t.to(dtype)

    x, weight, bias = cast(x), cast(weight), None if bias is None else cast(bias)
    _check_dtypes(op, x, weight, bias)
    return x, weight, bias, torch.autocast(kind, enabled=False)


def _finish(
    op: str,
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None,
    convolution: _Convolution,
    spec: CoordSpec,
    activation: str | None,
) -> Tensor:
    rank = len(convolution.geometry.size)
    x, weight, bias, without_autocast = _autocast(op, x, weight, bias)
    with without_autocast:
        if x.dim() == rank + 1:
            return _run(x[None], weight, coord_weight, bias, convolution, spec, activation)[0]
        return _run(x, weight, coord_weight, bias, convolution, spec, activation)


def _groups(op: str, groups: Any, cout: int) -> int:
    groups = check.integer(op, "groups", groups)
    if groups < 1 or cout % groups:
        raise ValueError(f"{op}: groups must divide the {cout} output channels, got {groups}")
    return int(groups)


def _spec(op: str, spec: Any) -> CoordSpec:
    if spec is None:
        return _DEFAULT
    if not isinstance(spec, CoordSpec):
        raise TypeError(f"{op}: spec must be a CoordSpec, got {type(spec).__name__}; for a preset pass CoordSpec.preset(name)")
    return spec


_DEFAULT = CoordSpec()


# Eager calls that passed all checks, by everything the checks look at: they cost more than a small convolution.
_passed: dict[tuple[Any, ...], tuple[_Convolution, Plan]] = {}
_MOST_PASSED = 1024
_KEYED = (int, str, type(None), CoordSpec)


def _signature(x: Any, weight: Any, coord_weight: Any, bias: Any, *options: Any) -> tuple[Any, ...] | None:
    """The key of an eager call in _passed; None for calls that have none."""
    if x is None or weight is None or coord_weight is None or not _is_plain(x, weight, coord_weight, bias):
        return None
    if x.is_nested or weight.is_nested or coord_weight.is_nested or (bias is not None and bias.is_nested):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    for option in options:  # 1.0 equals 1, and would pass for it
        if type(option) not in _KEYED and not (type(option) is tuple and all(type(n) is int for n in option)):
            return None
    of_bias = None if bias is None else (bias.shape, bias.dtype, bias.device)
    return (
        x.shape, x.dtype, x.device, weight.shape, weight.dtype, weight.device, coord_weight.shape, coord_weight.dtype,
        coord_weight.device, of_bias, *options,
    )  # fmt: skip


def _remember(key: tuple[Any, ...] | None, convolution: _Convolution, spec: CoordSpec, x: Tensor) -> None:
    if key is None:
        return
    if len(_passed) >= _MOST_PASSED:
        _passed.clear()
    _passed[key] = convolution, plan_of(convolution.geometry, spec, accumulate_type(x.dtype), x.device)


def coord_conv(
    op: str,
    rank: int,
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    padding_mode: str,
    spec: CoordSpec | None,
    activation: str | None,
    groups_mode: str = "shared",
    excluding: str = "weight",
) -> Tensor:
    """coord_conv of any rank under the name that errors shall have; excluding: what leaves the coordinates out."""
    options = (rank, stride, padding, dilation, groups, padding_mode, spec, activation, groups_mode)
    key = _signature(x, weight, coord_weight, bias, *options)
    passed = None if key is None else _passed.get(key)
    if passed is not None and x.dim() == rank + 2:
        return _run_eager(x, weight, coord_weight, bias, *passed, activation)
    _check_tensors(op, x, weight, coord_weight, bias, rank)
    if activation is not None:
        check.one_of(op, "activation", activation, ACTIVATIONS)
    check.one_of(op, "padding_mode", padding_mode, PADDING_MODES)
    check.one_of(op, "groups_mode", groups_mode, GROUPS_MODES)
    spec = _spec(op, spec)
    cout, kernel, nc = weight.shape[0], tuple(weight.shape[2:]), spec.channels(rank)
    groups = _groups(op, groups, cout)
    _check_shape(op, "coord_weight", coord_weight, (cout, nc, *kernel), f" for {nc} coordinate channels")
    if bias is not None:
        _check_shape(op, "bias", bias, (cout,))
    if groups_mode == "concat" and groups > 1:
        return _concat_groups(
            op, rank, x, weight, coord_weight, bias, stride, padding, dilation, groups, padding_mode, spec, activation
        )
    _check_channels(op, x.shape[-rank - 1], weight.shape[1] * groups, nc, excluding)
    convolution = _describe(op, x, kernel, stride, padding, dilation, groups, padding_mode)
    result = _finish(op, x, weight, coord_weight, bias, convolution, spec, activation)
    _remember(key, convolution, spec, x)
    return result


def _concat_groups(
    op: str,
    rank: int,
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    spec: CoordSpec,
    activation: str | None,
) -> Tensor:
    """groups_mode "concat": the groups cut up the concatenated channels, so that one group alone sees the coordinates.

    The columns of the concatenated weight that multiply coordinates in that group multiply channels of x in the others.
    """
    nc, channel_dim = spec.channels(rank), x.dim() - rank - 1
    per_group, cout = weight.shape[1] + nc, weight.shape[0] // groups
    channels = x.shape[channel_dim]
    if (channels + nc) % groups:
        raise ValueError(
            f"{op}: groups={groups} must divide in_channels + coord channels = {channels + nc} in groups_mode='concat'"
        )
    _check_channels(op, channels, per_group * groups - nc, nc, "weight")
    append = spec.position == "append"
    both = torch.cat([weight, coord_weight.to(weight.dtype)] if append else [coord_weight.to(weight.dtype), weight], 1)
    last = groups - 1
    seeing, rest = (slice(last * cout, None), slice(0, last * cout)) if append else (slice(0, cout), slice(cout, None))
    mine, others = (slice(last * per_group, None), slice(0, last * per_group))
    if not append:
        mine, others = slice(0, weight.shape[1]), slice(weight.shape[1], None)

    def part(channel: slice, output: slice, coords: bool) -> Tensor:
        part_x = x.narrow(channel_dim, channel.start, (channels if channel.stop is None else channel.stop) - channel.start)
        part_bias = None if bias is None else bias[output]
        if coords:
            part_weight = weight[output]
            if weight.shape[1] == 0:  # a group of coordinates alone; the vendor's convolution wants a channel
                shape = list(part_x.shape)
                shape[channel_dim] = 1
                part_x = torch.cat([part_x, part_x.new_zeros(shape)], channel_dim)
                part_weight = torch.cat([part_weight, part_weight.new_zeros(cout, 1, *weight.shape[2:])], 1)
            return coord_conv(
                op, rank, part_x, part_weight, coord_weight[output], part_bias, stride, padding, dilation, 1,
                padding_mode, spec, activation,
            )  # fmt: skip
        convolution = _describe(op, part_x, tuple(weight.shape[2:]), stride, padding, dilation, last, padding_mode)
        batch, cast, cast_bias, without_autocast = _autocast(op, part_x, both[output], part_bias)
        with without_autocast:
            unbatched = batch.dim() == rank + 1
            y = convolution(convolution.padded(batch[None] if unbatched else batch), cast, cast_bias, last)
            y = _ACTIVATE[activation](y)
            return y[0] if unbatched else y

    with_coords, without = part(mine, seeing, True), part(others, rest, False)
    return torch.cat([without, with_coords] if append else [with_coords, without], channel_dim)


def coord_conv_transpose(
    op: str,
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
    spec: CoordSpec | None,
    activation: str | None,
    excluding: str = "weight",
) -> Tensor:
    """coord_conv_transpose2d under the name that errors shall have; excluding: what leaves the coordinates out."""
    rank = 2
    options = ("transposed", stride, padding, output_padding, groups, dilation, spec, activation)
    key = _signature(x, weight, coord_weight, bias, *options)
    passed = None if key is None else _passed.get(key)
    if passed is not None and x.dim() == rank + 2:
        return _run_eager(x, weight, coord_weight.transpose(0, 1), bias, *passed, activation)
    _check_tensors(op, x, weight, coord_weight, bias, rank)
    if activation is not None:
        check.one_of(op, "activation", activation, ACTIVATIONS)
    spec = _spec(op, spec)
    groups = check.integer(op, "groups", groups)
    nc, kernel = spec.channels(rank), tuple(weight.shape[2:])
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{op}: groups must divide the {weight.shape[0]} input channels, got {groups}")
    cout = weight.shape[1] * groups
    _check_shape(op, "coord_weight", coord_weight, (nc, cout, *kernel), f" for {nc} coordinate channels")
    if bias is not None:
        _check_shape(op, "bias", bias, (cout,))
    _check_channels(op, x.shape[-rank - 1], weight.shape[0], nc, excluding)
    convolution = _describe_transposed(op, x, kernel, stride, padding, output_padding, groups, dilation)
    result = _finish(op, x, weight, coord_weight.transpose(0, 1), bias, convolution, spec, activation)
    _remember(key, convolution, spec, x)
    return result


# ---- public ----------------------------------------------------------------------------------------------------------


def coord_conv1d(
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    spec: CoordSpec | None = None,
    activation: str | None = None,
    groups_mode: str = "shared",
) -> Tensor:
    """:func:`coord_conv2d` for x [B, Cin, L] or [Cin, L], weight [Cout, Cin/groups, k], coord_weight [Cout, nc, k].

    Raises:
        TypeError: an argument has the wrong type, or dtypes differ.
        ValueError: anything else; the message names what was expected and what came.
    """
    return coord_conv(
        "coord_conv1d", 1, x, weight, coord_weight, bias, stride, padding, dilation, groups, padding_mode, spec, activation,
        groups_mode,
    )  # fmt: skip


def coord_conv2d(
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    spec: CoordSpec | None = None,
    activation: str | None = None,
    groups_mode: str = "shared",
) -> Tensor:
    """Convolution of x and its coordinates (CoordConv, Liu et al., 2018, arXiv 1807.03247), at the price of that of x alone.

    Equals ``conv2d(cat([x, coords], 1), cat([weight, coord_weight], 1), ...)`` followed by the activation, without the
    concatenation: the coordinates' share is a map that does not depend on the batch, added in one pass with the activation.
    The map is computed in float32 (float64 for float64) and added before a 16-bit result is rounded, so that coordinates stay
    distinct in bfloat16 at any image size. Twice differentiable in x, weight, coord_weight and bias.

    Args:
        x: [B, Cin, H, W] or [Cin, H, W]; float16, bfloat16, float32 or float64. The result follows its memory format.
        weight: [Cout, Cin/groups, kh, kw], of x's dtype (any under autocast).
        coord_weight: [Cout, nc, kh, kw] for the nc coordinate channels of spec; any floating dtype.
        bias: [Cout], of x's dtype.
        stride: an int or one per axis.
        padding: an int, one per axis, "same" or "valid". Coordinates are padded like any channel: zeros, or the coordinates
            that the other modes give.
        dilation: an int or one per axis.
        groups: groups of x's channels.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        spec: which coordinates; default ``CoordSpec()``: i then j, each from -1 to 1. Its position does not matter here.
        activation: None, "relu", "silu" or "gelu" (exact), fused into the pass that adds the map.
        groups_mode: "shared": every group sees all coordinates. "concat": groups cut up the concatenated channels as published
            implementations do; ``cat([weight, coord_weight], 1)`` (for position "prepend" the other way round) is then their
            weight [Cout, (Cin + nc)/groups, kh, kw], so weight is [Cout, (Cin + nc)/groups - nc, kh, kw].

    Returns:
        [B, Cout, Ho, Wo] or [Cout, Ho, Wo], in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument has the wrong type, or dtypes differ.
        ValueError: anything else; the message names what was expected and what came.
    """
    return coord_conv(
        "coord_conv2d", 2, x, weight, coord_weight, bias, stride, padding, dilation, groups, padding_mode, spec, activation,
        groups_mode,
    )  # fmt: skip


def coord_conv3d(
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    spec: CoordSpec | None = None,
    activation: str | None = None,
    groups_mode: str = "shared",
) -> Tensor:
    """:func:`coord_conv2d` for x [B, Cin, D, H, W] or [Cin, D, H, W] and weights with three kernel axes.

    Raises:
        TypeError: an argument has the wrong type, or dtypes differ.
        ValueError: anything else; the message names what was expected and what came.
    """
    return coord_conv(
        "coord_conv3d", 3, x, weight, coord_weight, bias, stride, padding, dilation, groups, padding_mode, spec, activation,
        groups_mode,
    )  # fmt: skip


def coord_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    *,
    spec: CoordSpec | None = None,
    activation: str | None = None,
) -> Tensor:
    """Transposed convolution of x and its coordinates; every group sees all coordinates.

    Args:
        x: [B, Cin, H, W] or [Cin, H, W].
        weight: [Cin, Cout/groups, kh, kw].
        coord_weight: [nc, Cout, kh, kw].
        bias: [Cout].
        stride: an int or one per axis, like the next two and dilation.
        padding: of ``conv_transpose2d``: that many outputs fewer at each border.
        output_padding: that many outputs more at the end.
        groups: groups of x's channels.
        dilation: the distance between taps.
        spec: which coordinates, as in :func:`coord_conv2d`.
        activation: None, "relu", "silu" or "gelu", as in :func:`coord_conv2d`.

    Returns:
        [B, Cout, Ho, Wo] or [Cout, Ho, Wo], in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument has the wrong type, or dtypes differ.
        ValueError: anything else; the message names what was expected and what came.
    """
    return coord_conv_transpose(
        "coord_conv_transpose2d", x, weight, coord_weight, bias, stride, padding, output_padding, groups, dilation, spec,
        activation,
    )  # fmt: skip


# Positions in a batch for which coordinates are kept for every sample, as cat wants them.
_KEPT_POSITIONS = 1 << 17


def _copies_channels(x: Tensor) -> bool:
    """Whether x, in channels_last order, is copied faster channel by channel than in rows; as a gradient it isn't."""
    return x.device.type == "cpu" and x.shape[1] <= 4 and not (x.requires_grad and torch.is_grad_enabled())


def add_coords(x: Tensor, spec: CoordSpec | None = None) -> Tensor:
    """x with its coordinate channels concatenated, for networks that want them as such; coord_conv needs no such copy.

    Args:
        x: [B, C, *size] with one to three spatial axes, always batched; float16, bfloat16, float32 or float64.
        spec: which coordinates, and whether they come after or before x's channels; default ``CoordSpec()``.

    Returns:
        [B, C + nc, *size] in x's dtype and memory format. The coordinates are rounded once to that dtype: in bfloat16,
        neighbours collide beyond about 512 pixels, which is one reason to prefer coord_conv.

    Raises:
        TypeError: x is not a floating-point tensor, or spec is not a CoordSpec.
        ValueError: x has another number of dimensions.
    """
    op = "add_coords"
    check.floating(op, "x", x)
    spec = _spec(op, spec)
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"{op}: x must be [B, C, *size] with 1 to 3 spatial axes, got {x.dim()}D of shape {tuple(x.shape)}")
    size = tuple(x.shape[2:])
    if any(n < 1 for n in size):
        raise ValueError(f"{op}: every spatial size of x must be at least 1, got {tuple(x.shape)}")
    channels_last, plain = _is_channels_last(x), _is_plain(x)
    if not plain:
        coords = coordinates(size, spec, accumulate_type(x.dtype), x.device).to(x.dtype)[None]
    elif channels_last and _copies_channels(x):
        coords = kept_coordinates(size, spec, x.dtype, x.device, True).expand(x.shape[0], -1, *size)
        channels = [*x.unbind(1), *coords.unbind(1)] if spec.position == "append" else [*coords.unbind(1), *x.unbind(1)]
        return torch.stack(channels, -1).movedim(-1, 1)
    else:
        samples = x.shape[0] if x.shape[0] * math.prod(size) <= _KEPT_POSITIONS else 1
        coords = kept_coordinates(size, spec, x.dtype, x.device, channels_last, samples)
    coords = coords.expand(x.shape[0], -1, *size)
    # Copied for every sample: what it takes for cat to copy whole rows.
    if channels_last:
        coords = _in_channels_last(coords)
    elif plain:
        coords = coords.contiguous()
    result = torch.cat([x, coords] if spec.position == "append" else [coords, x], 1)
    return _in_channels_last(result) if channels_last else result.contiguous()
