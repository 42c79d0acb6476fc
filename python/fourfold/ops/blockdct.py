"""Blockwise DCT: block_dct, block_idct, dct_normalize, zigzag.

All but dct_normalize are linear in their tensor and in ``scale``, so four ops are each other's gradients: the transform and
its adjoint (which sums what edge replication spread, and multiplies by scale where the inverse divides), the inverse and
its adjoint.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reference._dtypes import accumulate_type
from . import _checks as check
from . import _frequencies as frequencies
from ._frequencies import Freqs
from ._register import calls, register

BLOCK_SIZES = (2, 4, 8, 16, 32)
LAYOUTS = ("planar", "blocks", "interleaved")

# ---- shapes ----------------------------------------------------------------------------------------------------------


def _coef_shape(x_shape: Sequence[int], n: int, layout: str, f: int) -> tuple[int, ...]:
    b, c, height, width = x_shape
    h, w = (height + n - 1) // n, (width + n - 1) // n
    if layout == "planar":
        return (b, c * f, h, w)
    return (b, c, h, w, f) if layout == "blocks" else (b, c, h * n, w * n)


def _image_shape(y: Tensor, n: int, layout: str, f: int, size: Sequence[int] | None) -> tuple[int, ...]:
    c = y.shape[1] // f if layout == "planar" else y.shape[1]
    step = 1 if layout == "interleaved" else n
    height, width = (y.shape[2] * step, y.shape[3] * step) if size is None else size
    return (y.shape[0], c, height, width)


def _new(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor for the result; 4-D results take over a channels_last memory format, as convolutions do."""
    channels_last = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    if len(shape) == 4 and channels_last:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return like.new_empty(shape)


# ---- scale -----------------------------------------------------------------------------------------------------------


def _factors(scale: Tensor, channels: int, n: int, layout: str, grid: tuple[int, int]) -> Tensor:
    """scale [C or 1, F] as a tensor that multiplies coefficients in their layout; grid: (h, w) in blocks."""
    if layout == "planar":
        return scale.expand(channels, -1).reshape(1, -1, 1, 1)
    if layout == "blocks":
        return scale[:, None, None, :]
    return scale.reshape(-1, n, n).tile(1, *grid)


def _scaled(coefs: Tensor, scale: Tensor, n: int, layout: str) -> Tensor:
    """coefs * scale, computed in the accumulation type and rounded once."""
    channels = coefs.shape[1] // scale.shape[1] if layout == "planar" else coefs.shape[1]
    factors = _factors(scale, channels, n, layout, (coefs.shape[2] // n, coefs.shape[3] // n))
    return (coefs.to(scale.dtype) * factors).to(coefs.dtype)


def _scale_gradient(product: Tensor, scale: Tensor, n: int, layout: str) -> Tensor:
    """Sums product, shaped as coefficients, over all blocks: [C or 1, F]."""
    b, c, h, w = product.shape[:4]
    if layout == "planar":
        f = scale.shape[1]
        total = product.reshape(b, c // f, f, h, w).sum((0, 3, 4))
    elif layout == "blocks":
        total = product.sum((0, 2, 3))
    else:
        total = product.reshape(b, c, h // n, n, w // n, n).sum((0, 2, 4)).reshape(c, n * n)
    return total.sum(0, keepdim=True) if scale.shape[0] == 1 else total


# ---- vmap ------------------------------------------------------------------------------------------------------------


def _vmap_of(op: Any, is_image: bool) -> Any:
    """The batched form of an op (tensor, block_size, layout, freqs, scale, ...).

    Samples go to the batch, or, where scale differs from sample to sample, to the channels.
    """

    def vmap(info: Any, in_dims: Any, x: Tensor, n: int, layout: str, freqs: Freqs, scale: Tensor | None, *rest: Any) -> Any:
        x_dim, scale_dim = in_dims[0], in_dims[4]
        samples = info.batch_size
        if scale_dim is None:
            batched = x.movedim(x_dim, 0)
            return call_op(op, batched.flatten(0, 1), n, layout, freqs, scale, *rest).unflatten(0, batched.shape[:2]), 0
        assert scale is not None
        x = x.movedim(x_dim, 1) if x_dim is not None else x.unsqueeze(1).expand(-1, samples, *[-1] * (x.dim() - 1))
        scale = scale.movedim(scale_dim, 0)
        f = scale.shape[2]
        channels = x.shape[2] // f if layout == "planar" and not is_image else x.shape[2]
        scale = scale.expand(samples, channels, f).reshape(samples * channels, f).contiguous()
        y = call_op(op, x.flatten(1, 2), n, layout, freqs, scale, *rest)
        return y.unflatten(1, (samples, -1)), 1

    def call_op(op: Any, *args: Any) -> Tensor:
        result: Tensor = calls[op](*args)
        return result

    return vmap


# ---- the four ops ----------------------------------------------------------------------------------------------------


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.n, ctx.layout, ctx.freqs, scale, *ctx.rest = inputs
    ctx.x_shape = x.shape
    # The input is kept only where the gradient of scale, or a tangent of either, needs it.
    kept = x if scale is not None else None
    ctx.save_for_backward(kept, scale)
    ctx.save_for_forward(kept, scale)


def _needs_scale(ctx: Any) -> bool:
    return bool(ctx.needs_input_grad[4])


def _block_dct_fake(x: Tensor, n: int, layout: str, freqs: Freqs, scale: Tensor | None, shift: float) -> Tensor:
    return _new(x, _coef_shape(x.shape, n, layout, frequencies.count(freqs, n)))


def _block_dct_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, scale = ctx.saved_tensors
    grad_x = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_x = _block_dct_backward(grad, ctx.n, ctx.layout, ctx.freqs, scale, ctx.x_shape[2:])
    if _needs_scale(ctx):
        plain = _block_dct(x.to(scale.dtype), ctx.n, ctx.layout, ctx.freqs, None, ctx.rest[0])
        grad_scale = _scale_gradient(grad * plain, scale, ctx.n, ctx.layout)
    return grad_x, None, None, None, grad_scale, None


def _block_dct_jvp(ctx: Any, x_t: Tensor | None, *tangents: Any) -> Tensor:
    x, scale = ctx.saved_tensors
    scale_t = tangents[3]
    terms = []
    if x_t is not None:
        terms.append(_block_dct(x_t, ctx.n, ctx.layout, ctx.freqs, scale, 0.0))
    if scale_t is not None:
        plain = _block_dct(x, ctx.n, ctx.layout, ctx.freqs, None, ctx.rest[0])
        terms.append(_scaled(plain, scale_t, ctx.n, ctx.layout))
    return _sum(terms)


def _sum(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


_block_dct = register(
    "block_dct",
    fake=_block_dct_fake,
    setup_context=_remember,
    backward=_block_dct_vjp,
    jvp=_block_dct_jvp,
    vmap=_vmap_of("block_dct", is_image=True),
)


def _block_dct_backward_fake(
    grad: Tensor, n: int, layout: str, freqs: Freqs, scale: Tensor | None, size: Sequence[int]
) -> Tensor:
    return _new(grad, _image_shape(grad, n, layout, frequencies.count(freqs, n), size))


def _block_dct_backward_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, scale = ctx.saved_tensors
    grad_y = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_y = _block_dct(grad, ctx.n, ctx.layout, ctx.freqs, scale, 0.0)
    if _needs_scale(ctx):
        plain = _block_dct(grad.to(scale.dtype), ctx.n, ctx.layout, ctx.freqs, None, 0.0)
        grad_scale = _scale_gradient(y * plain, scale, ctx.n, ctx.layout)
    return grad_y, None, None, None, grad_scale, None


def _block_dct_backward_jvp(ctx: Any, y_t: Tensor | None, *tangents: Any) -> Tensor:
    y, scale = ctx.saved_tensors
    scale_t = tangents[3]
    terms = []
    if y_t is not None:
        terms.append(_block_dct_backward(y_t, ctx.n, ctx.layout, ctx.freqs, scale, *ctx.rest))
    if scale_t is not None:
        scaled = _scaled(y, scale_t, ctx.n, ctx.layout)
        terms.append(_block_dct_backward(scaled, ctx.n, ctx.layout, ctx.freqs, None, *ctx.rest))
    return _sum(terms)


_block_dct_backward = register(
    "_block_dct_backward",
    fake=_block_dct_backward_fake,
    setup_context=_remember,
    backward=_block_dct_backward_vjp,
    jvp=_block_dct_backward_jvp,
    vmap=_vmap_of("_block_dct_backward", is_image=False),
)


def _block_idct_fake(
    y: Tensor, n: int, layout: str, freqs: Freqs, scale: Tensor | None, shift: float, size: Sequence[int] | None
) -> Tensor:
    return _new(y, _image_shape(y, n, layout, frequencies.count(freqs, n), size))


def _block_idct_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, scale = ctx.saved_tensors
    grad_y = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_y = _block_idct_backward(grad, ctx.n, ctx.layout, ctx.freqs, scale)
    if _needs_scale(ctx):
        through = _block_idct_backward(grad.to(scale.dtype), ctx.n, ctx.layout, ctx.freqs, scale)
        grad_scale = -_scale_gradient(y * through, scale, ctx.n, ctx.layout) / scale
    return grad_y, None, None, None, grad_scale, None, None


def _block_idct_jvp(ctx: Any, y_t: Tensor | None, *tangents: Any) -> Tensor:
    y, scale = ctx.saved_tensors
    scale_t = tangents[3]
    size = ctx.rest[1]
    terms = []
    if y_t is not None:
        terms.append(_block_idct(y_t, ctx.n, ctx.layout, ctx.freqs, scale, 0.0, size))
    if scale_t is not None:
        scaled = _scaled(y, -scale_t / scale, ctx.n, ctx.layout)
        terms.append(_block_idct(scaled, ctx.n, ctx.layout, ctx.freqs, scale, 0.0, size))
    return _sum(terms)


_block_idct = register(
    "block_idct",
    fake=_block_idct_fake,
    setup_context=_remember,
    backward=_block_idct_vjp,
    jvp=_block_idct_jvp,
    vmap=_vmap_of("block_idct", is_image=False),
)


def _block_idct_backward_fake(grad: Tensor, n: int, layout: str, freqs: Freqs, scale: Tensor | None) -> Tensor:
    return _new(grad, _coef_shape(grad.shape, n, layout, frequencies.count(freqs, n)))


def _block_idct_backward_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, scale = ctx.saved_tensors
    grad_x = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_x = _block_idct(grad, ctx.n, ctx.layout, ctx.freqs, scale, 0.0, ctx.x_shape[2:])
    if _needs_scale(ctx):
        through = _block_idct_backward(x.to(scale.dtype), ctx.n, ctx.layout, ctx.freqs, scale)
        grad_scale = -_scale_gradient(grad * through, scale, ctx.n, ctx.layout) / scale
    return grad_x, None, None, None, grad_scale


def _block_idct_backward_jvp(ctx: Any, x_t: Tensor | None, *tangents: Any) -> Tensor:
    x, scale = ctx.saved_tensors
    scale_t = tangents[3]
    terms = []
    if x_t is not None:
        terms.append(_block_idct_backward(x_t, ctx.n, ctx.layout, ctx.freqs, scale))
    if scale_t is not None:
        plain = _block_idct_backward(x, ctx.n, ctx.layout, ctx.freqs, scale)
        terms.append(_scaled(plain, -scale_t / scale, ctx.n, ctx.layout))
    return _sum(terms)


_block_idct_backward = register(
    "_block_idct_backward",
    fake=_block_idct_backward_fake,
    setup_context=_remember,
    backward=_block_idct_backward_vjp,
    jvp=_block_idct_backward_jvp,
    vmap=_vmap_of("_block_idct_backward", is_image=True),
)

_block_dct_out = register("_block_dct_out", fake=lambda *args: None)
_block_idct_out = register("_block_idct_out", fake=lambda *args: None)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _deliver(op: str, result: Tensor, out: Tensor | None, *inputs: Tensor | None) -> Tensor:
    if out is None:
        return result
    check.out_tensor(op, out, tuple(result.shape), *inputs)
    return out.copy_(result)


def _scale(op: str, scale: Any, channels: int, f: int, like: Tensor) -> Tensor | None:
    """scale as [C or 1, F] in the accumulation type on like's device."""
    if scale is None:
        return None
    scale = check.numbers(op, "scale", scale, accumulate_type(like.dtype), like.device)
    if not (check.has_shape(scale, f) or check.has_shape(scale, channels, f)):
        raise ValueError(f"{op}: scale must be [{f}] or [{channels}, {f}], got {list(scale.shape)}")
    return scale.reshape(-1, f).contiguous()


def _shift(op: str, shift: Any) -> float:
    if isinstance(shift, Tensor):
        raise TypeError(f"{op}: shift must be a number, got a Tensor; add a tensor to the input yourself")
    if not isinstance(shift, (int, float, np.number)):
        raise TypeError(f"{op}: shift must be a number, got {type(shift).__name__}")
    try:
        return float(shift)
    except OverflowError:
        raise ValueError(f"{op}: shift must be within the range of float64, got {shift}") from None


def _check_common(op: str, block_size: Any, layout: Any, freqs: Any) -> int:
    """Checks what both directions share; returns block_size as an int."""
    block_size = check.integer(op, "block_size", block_size)
    check.one_of(op, "block_size", block_size, BLOCK_SIZES)
    check.one_of(op, "layout", layout, LAYOUTS)
    if freqs is not None and layout == "interleaved":
        raise ValueError(f"{op}: layout 'interleaved' keeps every frequency in place; drop freqs")
    return block_size


def check_options(op: str, block_size: Any, layout: Any, freqs: Any, scale: Any, shift: Any) -> dict[str, Any]:
    """Checks the options that a module keeps, in its own name, before there is an input; returns them as it keeps them."""
    n = _check_common(op, block_size, layout, freqs)
    kept = frequencies.listed(op, freqs, n)
    f = frequencies.count(kept, n)
    if scale is not None and not (scale.dim() in {1, 2} and scale.shape[-1] == f):
        raise ValueError(f"{op}: scale must be [{f}] or [C, {f}], got {list(scale.shape)}")
    return {"block_size": n, "layout": layout, "freqs": kept, "shift": _shift(op, shift)}


# ---- public functions ------------------------------------------------------------------------------------------------


def block_dct(
    x: Tensor,
    block_size: int = 8,
    *,
    layout: str = "planar",
    freqs: Freqs | Tensor = None,
    scale: Tensor | Sequence[float] | None = None,
    shift: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Orthonormal 2-D DCT-II of each N x N block of an image, in one pass.

    ``scale * DCT(x + shift)``; for N = 8 and shift = -128 this is the transform of JPEG (ITU-T T.81, A.3.3). Rows and columns
    that don't fill a block are filled by repeating the last one. Twice differentiable in x and scale.

    Args:
        x: [B, C, H, W], float16, bfloat16, float32 or float64, any strides. 16-bit inputs are computed in float32 and rounded
            once.
        block_size: N, one of 2, 4, 8, 16, 32.
        layout: "planar" gives [B, C*F, h, w] (channel-major: plane c*F + f), "blocks" [B, C, h, w, F], "interleaved"
            [B, C, h*N, w*N] with coefficient (u, v) of a block at its pixel (u, v); h = ceil(H/N), w = ceil(W/N). 4-D results
            of a channels_last input are channels_last.
        freqs: the frequencies to keep, as row-major indices u*N + v, in output order; F = len(freqs). A list, or an int64
            tensor, without repeats. None: all F = N*N in row-major order. Not for layout "interleaved".
        scale: [F] or [C, F], in output order.
        shift: added to x before the transform, in the units of x.
        out: a tensor of exactly the result's shape, dtype and device, with any strides, that shares no memory with the inputs.

    Returns:
        The coefficients, in the dtype of x and the units of x * scale.

    Raises:
        TypeError: x is not a floating-point tensor, or an argument has the wrong type.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "block_dct"
    check.floating(op, "x", x, convert=True)
    block_size = _check_common(op, block_size, layout, freqs)
    if x.dim() != 4:
        fix = "; add the batch dimension with x[None]" if x.dim() == 3 else ""
        raise ValueError(f"{op}: x must be [B, C, H, W], got {tuple(x.shape)}{fix}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{op}: x must have H and W of at least 1, got {tuple(x.shape)}")
    if frequencies.is_index(freqs, op):
        factors = _scale(op, scale, x.shape[1], freqs.shape[0], x)
        full = block_dct(x.to(accumulate_type(x.dtype)), block_size, layout=layout, shift=shift)
        result = frequencies.select(full, freqs, block_size, layout)
        result = (result if factors is None else _scaled(result, factors, block_size, layout)).to(x.dtype)
        return _deliver(op, result, out, x, factors)
    kept = frequencies.listed(op, freqs, block_size)
    factors = _scale(op, scale, x.shape[1], frequencies.count(kept, block_size), x)
    offset = _shift(op, shift)
    if out is None:
        return _block_dct(x, block_size, layout, kept, factors, offset)
    check.out_tensor(op, out, _coef_shape(x.shape, block_size, layout, frequencies.count(kept, block_size)), x, factors)
    _block_dct_out(x, block_size, layout, kept, factors, offset, out)
    return check.written(out)


def block_idct(
    y: Tensor,
    block_size: int = 8,
    *,
    layout: str = "planar",
    channels: int | None = None,
    freqs: Freqs | Tensor = None,
    scale: Tensor | Sequence[float] | None = None,
    shift: float = 0.0,
    size: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The inverse of :func:`block_dct` with the same arguments: ``IDCT(y / scale) - shift``, in one pass.

    Frequencies missing from freqs count as zero. Twice differentiable in y and scale.

    Args:
        y: coefficients in the layout: planar [B, C*F, h, w], blocks [B, C, h, w, F] or interleaved [B, C, h*N, w*N]; float16,
            bfloat16, float32 or float64, any strides.
        block_size: N, one of 2, 4, 8, 16, 32.
        layout: "planar", "blocks" or "interleaved".
        channels: C, only to check the number that follows from y and F.
        freqs: which frequency each coefficient is; see :func:`block_dct`.
        scale: [F] or [C, F]; what block_dct multiplied by. Zeros divide like zeros: the blocks become infinite or NaN.
        shift: what block_dct added.
        size: (H, W) of the image, which must round up to the blocks of y; None: whole blocks.
        out: a tensor of exactly the result's shape, dtype and device, with any strides, that shares no memory with the inputs.

    Returns:
        The image [B, C, H, W], in the dtype of y.

    Raises:
        TypeError: y is not a floating-point tensor, or an argument has the wrong type.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "block_idct"
    check.floating(op, "y", y, convert=True)
    n = _check_common(op, block_size, layout, freqs)
    rank = 5 if layout == "blocks" else 4
    if y.dim() != rank:
        fix = ""
        if (rank, y.dim()) in {(4, 5), (5, 4)}:
            fix = "; [B, C*F, h, w] is layout='planar'" if rank == 5 else "; [B, C, h, w, F] is layout='blocks'"
        elif y.dim() == 3:
            fix = "; add the batch dimension with y[None]"
        raise ValueError(f"{op}: y must be {rank}-D in layout {layout!r}, got {tuple(y.shape)}{fix}")
    index: Tensor | None = freqs if frequencies.is_index(freqs, op) else None
    kept = None if index is not None else frequencies.listed(op, freqs, n)
    f = frequencies.count(kept, n) if index is None else index.shape[0]
    if layout == "planar" and y.shape[1] % f:
        raise ValueError(
            f"{op}: planar y must have channels * {f} planes, got {y.shape[1]}; check block_size, freqs and layout"
        )
    if layout == "blocks" and y.shape[4] != f:
        raise ValueError(f"{op}: the last dimension of y must be {f} frequencies, got {tuple(y.shape)}")
    if layout == "interleaved" and (y.shape[2] % n or y.shape[3] % n):
        raise ValueError(f"{op}: y must be whole blocks of {n} in layout 'interleaved', got {tuple(y.shape)}")
    shape = _image_shape(y, n, layout, f, None)
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"{op}: y must have at least one block, got {tuple(y.shape)}")
    if channels is not None and check.integer(op, "channels", channels) != shape[1]:
        raise ValueError(f"{op}: channels={channels}, but y of shape {tuple(y.shape)} has {shape[1]} in layout {layout!r}")
    if size is not None:
        if not isinstance(size, (tuple, list)):
            raise TypeError(f"{op}: size must be (H, W), two ints, got {size!r}")
        if len(size) != 2:
            raise ValueError(f"{op}: size must be (H, W), two ints, got {size!r}")
        height, width = (check.integer(op, "each of size", s) for s in size)
        if not (0 <= shape[2] - height < n and 0 <= shape[3] - width < n):
            raise ValueError(
                f"{op}: size {(height, width)} does not fit {shape[2] // n} x {shape[3] // n} blocks of {n}; "
                f"it must round up to {(shape[2], shape[3])}"
            )
        size = [height, width]
    factors = _scale(op, scale, shape[1], f, y)
    offset = _shift(op, shift)
    if index is not None:
        coefs = y.to(accumulate_type(y.dtype))
        coefs = coefs if factors is None else _scaled(coefs, 1 / factors, n, layout)
        image = block_idct(frequencies.spread(coefs, index, n, layout), n, layout=layout, shift=shift, size=size).to(y.dtype)
        return _deliver(op, image, out, y, factors)
    if out is None:
        return _block_idct(y, n, layout, kept, factors, offset, size)
    check.out_tensor(op, out, _image_shape(y, n, layout, f, size), y, factors)
    _block_idct_out(y, n, layout, kept, factors, offset, size, out)
    return check.written(out)


def zigzag(block_size: int = 8) -> Tensor:
    """JPEG's zigzag order as row-major frequency indices, for ``freqs``: int64 [N*N] (ITU-T T.81, figure 5).

    ``zigzag()[:24]`` are the 24 lowest frequencies.

    Raises:
        ValueError: block_size is not 2, 4, 8, 16 or 32.
    """
    check.one_of("zigzag", "block_size", block_size, BLOCK_SIZES)

    def along_diagonals(f: int) -> tuple[int, int]:
        u, v = divmod(f, block_size)
        return u + v, u if (u + v) % 2 else v

    return torch.tensor(sorted(range(block_size * block_size), key=along_diagonals))


# ---- dct_normalize ---------------------------------------------------------------------------------------------------


def _dct_normalize_fake(
    coefs: Tensor,
    qtable: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    freqs: Freqs,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    *lead, h, w, _ = coefs.shape
    f = frequencies.count(freqs, 8)
    return coefs.new_empty((*lead, f, h, w) if layout == "planar" else (*lead, h, w, f), dtype=dtype)


def _normalize_remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    coefs, qtable, mean, std, ctx.freqs, ctx.layout, ctx.dtype = inputs
    ctx.save_for_backward(coefs, qtable, mean, std)
    ctx.save_for_forward(coefs, qtable, mean, std)


def _by_slot(values: Tensor, layout: str) -> Tensor:
    """[F] to a tensor that multiplies a result in its layout."""
    return values[:, None, None] if layout == "planar" else values


def _over_blocks(values: Tensor, layout: str) -> Tensor:
    """Sums a result over the blocks of each plane: [leading dimensions, F]."""
    summed = values.sum((-2, -1)) if layout == "planar" else values.sum((-3, -2))
    return summed.reshape(math.prod(summed.shape[:-1]), summed.shape[-1])


def _normalize_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    coefs, qtable, mean, std = ctx.saved_tensors
    work = accumulate_type(ctx.dtype)
    grad = grad.to(work)
    grad_qtable = grad_mean = grad_std = None
    if ctx.needs_input_grad[1]:
        ones = torch.ones_like(qtable)
        product = grad * _dct_normalize(coefs, ones, None, std, ctx.freqs, ctx.layout, work)
        per_plane = _over_blocks(product, ctx.layout)
        tables, f = qtable.shape[0], per_plane.shape[1]
        summed = per_plane.reshape(tables, per_plane.shape[0] // max(tables, 1), f).sum(1)
        if ctx.freqs is None:
            grad_qtable = summed
        else:
            index = torch.tensor(ctx.freqs, device=grad.device)
            grad_qtable = torch.zeros_like(qtable).index_copy(1, index, summed)
    if ctx.needs_input_grad[2]:
        total = _over_blocks(grad, ctx.layout).sum(0)
        grad_mean = -total if std is None else -total / std
    if ctx.needs_input_grad[3]:
        product = grad * _dct_normalize(coefs, qtable, mean, std, ctx.freqs, ctx.layout, work)
        grad_std = -_over_blocks(product, ctx.layout).sum(0) / std
    return None, grad_qtable, grad_mean, grad_std, None, None, None


def _normalize_jvp(
    ctx: Any, coefs_t: None, qtable_t: Tensor | None, mean_t: Tensor | None, std_t: Tensor | None, *_: Any
) -> Tensor:
    coefs, qtable, mean, std = ctx.saved_tensors
    work = accumulate_type(ctx.dtype)
    total = None
    if qtable_t is not None:
        total = _dct_normalize(coefs, qtable_t.contiguous(), None, std, ctx.freqs, ctx.layout, work)
    if mean_t is not None:
        term = -_by_slot(mean_t if std is None else mean_t / std, ctx.layout)
        total = term if total is None else total + term
    if std_t is not None:
        term = -_dct_normalize(coefs, qtable, mean, std, ctx.freqs, ctx.layout, work) * _by_slot(std_t / std, ctx.layout)
        total = term if total is None else total + term
    assert total is not None
    shape = _dct_normalize_fake(coefs, qtable, mean, std, ctx.freqs, ctx.layout, ctx.dtype).shape
    return total.to(ctx.dtype).expand(shape)


def _normalize_vmap(info: Any, in_dims: Any, coefs: Tensor, qtable: Tensor, mean: Any, std: Any, *rest: Any) -> Any:
    op = calls["dct_normalize"]
    samples = info.batch_size
    coefs = coefs.movedim(in_dims[0], 0) if in_dims[0] is not None else coefs.expand(samples, *coefs.shape)
    if in_dims[2] is None and in_dims[3] is None:
        if in_dims[1] is not None:
            qtable = qtable.movedim(in_dims[1], 0).flatten(0, 1)
        elif qtable.shape[0] > 1:
            qtable = qtable.expand(samples, *qtable.shape).flatten(0, 1)
        return op(coefs, qtable.contiguous(), mean, std, *rest), 0

    def sample(values: Any, dim: int | None, k: int) -> Any:
        return values if dim is None else values.select(dim, k).contiguous()

    each = [
        op(coefs[k], *(sample(v, d, k) for v, d in zip((qtable, mean, std), in_dims[1:4], strict=True)), *rest)
        for k in range(samples)
    ]
    return torch.stack(each), 0


_dct_normalize = register(
    "dct_normalize",
    fake=_dct_normalize_fake,
    setup_context=_normalize_remember,
    backward=_normalize_vjp,
    jvp=_normalize_jvp,
    vmap=_normalize_vmap,
)


def dct_normalize(
    coefs: Tensor,
    qtable: Tensor,
    *,
    mean: Tensor | float | None = None,
    std: Tensor | float | None = None,
    freqs: Freqs | Tensor = None,
    layout: str = "planar",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Quantised JPEG coefficients to network input: ``(coefs * qtable - mean) / std`` per frequency, relaid, in one pass.

    Args:
        coefs: int16 [.., h, w, 64], quantised blocks in natural (row-major) frequency order.
        qtable: [64], or [B, 64] for one table per image of coefs [B, .., h, w, 64], or [B, C, 64] for coefs [B, C, h, w, 64];
            integers or floats.
        mean: [F] in output order, or a number, in units of dequantised coefficients. None: 0.
        std: [F] in output order, or a number. None: 1.
        freqs: the frequencies to keep, as row-major indices, in output order; a list, or an int64 tensor, without repeats.
        layout: "planar" gives [.., F, h, w], "blocks" [.., h, w, F].
        dtype: of the result: float16, bfloat16, float32 or float64. float64 also computes in float64, the others in float32.

    Differentiable, twice, in qtable, mean and std.

    Raises:
        TypeError: coefs is not int16, or an argument has the wrong type.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "dct_normalize"
    check.tensor(op, "coefs", coefs)
    check.tensor(op, "qtable", qtable)
    if coefs.dtype != torch.int16:
        raise TypeError(f"{op}: coefs must be int16 quantised coefficients, got {check.dtype_name(coefs)}")
    check.one_of(op, "layout", layout, ("planar", "blocks"))
    if dtype not in check.FLOATING:
        raise TypeError(f"{op}: dtype must be float16, bfloat16, float32 or float64, got {check.dtype_name(dtype)}")
    if coefs.dim() < 3 or coefs.shape[-1] != 64:
        raise ValueError(f"{op}: coefs must be [.., h, w, 64], got {tuple(coefs.shape)}")
    if qtable.is_complex() or qtable.dtype == torch.bool:
        raise TypeError(f"{op}: qtable must hold numbers, got {check.dtype_name(qtable)}")
    index: Tensor | None = freqs if frequencies.is_index(freqs, op) else None
    kept = None if index is not None else frequencies.listed(op, freqs, 8)
    f = frequencies.count(kept, 8) if index is None else index.shape[0]
    lead = coefs.shape[:-3]
    if not any(check.has_shape(qtable, *lead[:shared], 64) for shared in range(min(len(lead), 2) + 1)):
        raise ValueError(
            f"{op}: qtable must be [64], or one table per image as [B, 64] or [B, C, 64], got {list(qtable.shape)} for "
            f"coefs {tuple(coefs.shape)}"
        )
    if qtable.device != coefs.device:
        raise ValueError(f"{op}: qtable is on {qtable.device}, coefs on {coefs.device}; move one with .to()")
    work = accumulate_type(dtype)
    tables = qtable.to(work).reshape(-1, 64)
    tables = tables if tables.is_contiguous() else tables.contiguous()
    mean = _statistic(op, "mean", mean, f, work, coefs)
    std = _statistic(op, "std", std, f, work, coefs)
    if index is not None:
        y = _dct_normalize(coefs, tables, None, None, None, layout, work).index_select(-3 if layout == "planar" else -1, index)
        y = y if mean is None else y - _by_slot(mean, layout)
        return (y if std is None else y / _by_slot(std, layout)).to(dtype)
    return _dct_normalize(coefs, tables, mean, std, kept, layout, dtype)


def _normalize_grids_fake(
    grids: Sequence[Tensor],
    qtable: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    planes: int,
    mirrored: Sequence[int],
    freqs: Freqs,
    dtype: torch.dtype,
) -> Tensor:
    h, w, _ = grids[0].shape
    return grids[0].new_empty((len(grids) // planes, planes * frequencies.count(freqs, 8), h, w), dtype=dtype)


#: For jpeg.DctDataset: images from wherever they were cut out of, in one pass, without stacking them first. No gradients.
_normalize_grids = register("_normalize_grids", fake=_normalize_grids_fake)


def _statistic(op: str, name: str, value: Any, f: int, work: torch.dtype, coefs: Tensor) -> Tensor | None:
    """mean or std as [F] in the accumulation type on the device of coefs."""
    if value is None:
        return None
    value = check.numbers(op, name, value, work, coefs.device)
    if not (check.has_shape(value) or check.has_shape(value, f)):
        raise ValueError(f"{op}: {name} must be a number or [{f}], got {list(value.shape)}")
    return value.expand(f).contiguous()
