"""RGB images to and from JPEG-convention DCT coefficients: rgb_to_dct, dct_to_rgb.

rgb_to_dct is linear in rgb, but for luma's level shift, and in ``scale``; its adjoint is composed of block_dct's and of the
adjoints of colour conversion and box filter.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference._dtypes import accumulate_type
from ..reference.blockdct import fold_edges, replicate_edges
from ..reference.blockdct_rgb import LUMA, SUBSAMPLINGS
from . import _checks as check
from . import _frequencies as frequencies
from ._frequencies import Freqs
from ._register import calls, register
from .blockdct import _block_dct, _block_dct_backward, block_idct

LAYOUTS = ("planar", "blocks")

#: Cb = (B - Y) * BLUE, Cr = (R - Y) * RED.
BLUE, RED = 1 / (2 - 2 * LUMA[2]), 1 / (2 - 2 * LUMA[0])


def _work_type(rgb: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in {rgb, dtype} else torch.float32


def _grid(height: int, width: int, v: int, h: int) -> tuple[int, int]:
    """Blocks down and across of a component that has a sample for each v x h pixels."""
    return (height + 8 * v - 1) // (8 * v), (width + 8 * h - 1) // (8 * h)


# ---- the op ----------------------------------------------------------------------------------------------------------


def _fake(
    rgb: Tensor, subsampling: str, layout: str, freqs: Freqs, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    f = frequencies.count(freqs, 8)

    def component(channels: int, v: int, h: int) -> Tensor:
        b, rows, columns = rgb.shape[0], *_grid(rgb.shape[2], rgb.shape[3], v, h)
        shape = (b, channels * f, rows, columns) if layout == "planar" else (b, channels, rows, columns, f)
        return rgb.new_empty(shape, dtype=dtype)

    return component(1, 1, 1), component(2, *SUBSAMPLINGS[subsampling])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rgb, ctx.subsampling, ctx.layout, ctx.freqs, scale, ctx.dtype = inputs
    ctx.size, ctx.rgb_dtype = rgb.shape[2:], rgb.dtype
    kept = rgb if scale is not None else None  # only the gradient and the tangent of scale need it
    ctx.save_for_backward(kept, scale)
    ctx.save_for_forward(kept, scale)


def _adjoint(y: Tensor, cbcr: Tensor, ctx: Any, scale: Tensor | None, work: torch.dtype) -> Tensor:
    v, h = SUBSAMPLINGS[ctx.subsampling]
    luma_scale, chroma_scale = (None, None) if scale is None else (scale[:1], scale[1:])
    luma = _block_dct_backward(y.to(work), 8, ctx.layout, ctx.freqs, luma_scale, ctx.size)[:, 0]
    rows, columns = _grid(ctx.size[0], ctx.size[1], v, h)
    cells = _block_dct_backward(cbcr.to(work), 8, ctx.layout, ctx.freqs, chroma_scale, (8 * rows, 8 * columns))
    spread = (cells / (v * h)).repeat_interleave(v, 2).repeat_interleave(h, 3)
    folded = fold_edges(spread, ctx.size)
    blue, red = folded[:, 0] * BLUE, folded[:, 1] * RED
    luma = luma - blue - red
    return torch.stack([LUMA[0] * luma + red, LUMA[1] * luma, LUMA[2] * luma + blue], 1)


def _linear(rgb: Tensor, ctx: Any, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The op without luma's shift. Taking away a large constant again would leave nothing of a small tangent."""
    v, h = SUBSAMPLINGS[ctx.subsampling]
    luma_scale, chroma_scale = (None, None) if scale is None else (scale[:1], scale[1:])
    red, green, blue = rgb.unbind(1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    chroma = replicate_edges(torch.stack([(blue - luma) * BLUE, (red - luma) * RED], 1), 8 * v, 8 * h)
    y = _block_dct(luma[:, None], 8, ctx.layout, ctx.freqs, luma_scale, 0.0)
    return y, _block_dct(F.avg_pool2d(chroma, (v, h)), 8, ctx.layout, ctx.freqs, chroma_scale, 0.0)


def _per_frequency(y: Tensor, cbcr: Tensor, layout: str) -> Tensor:
    """Sums results over the blocks of each component: [3, F]."""
    if layout == "blocks":
        return torch.cat([y.sum((0, 2, 3)), cbcr.sum((0, 2, 3))])
    return torch.cat([y.sum((0, 2, 3)), cbcr.sum((0, 2, 3))]).reshape(3, -1)


def _backward(ctx: Any, grad_y: Tensor, grad_cbcr: Tensor) -> tuple[Any, ...]:
    rgb, scale = ctx.saved_tensors
    work = _work_type(ctx.rgb_dtype, ctx.dtype)
    grad_rgb = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_rgb = _adjoint(grad_y, grad_cbcr, ctx, scale, work).to(ctx.rgb_dtype)
    if ctx.needs_input_grad[4]:
        y, cbcr = _rgb_to_dct(rgb, ctx.subsampling, ctx.layout, ctx.freqs, None, work)
        grad_scale = _per_frequency(grad_y * y, grad_cbcr * cbcr, ctx.layout)
    return grad_rgb, None, None, None, grad_scale, None


def _by_slot(scale: Tensor, layout: str) -> Tensor:
    """scale [C, F] as a factor of coefficients of C channels."""
    return scale.reshape(-1, 1, 1) if layout == "planar" else scale[:, None, None, :]


def _jvp(ctx: Any, rgb_t: Tensor | None, *tangents: Any) -> tuple[Tensor, Tensor]:
    rgb, scale = ctx.saved_tensors
    scale_t = tangents[3]
    work = _work_type(ctx.rgb_dtype, ctx.dtype)
    terms = []
    if rgb_t is not None:
        terms.append(_linear(rgb_t.to(work), ctx, scale))
    if scale_t is not None:
        y, cbcr = _rgb_to_dct(rgb, ctx.subsampling, ctx.layout, ctx.freqs, None, work)
        terms.append((y * _by_slot(scale_t[:1], ctx.layout), cbcr * _by_slot(scale_t[1:], ctx.layout)))
    y, cbcr = (torch.stack(parts).sum(0) if len(parts) > 1 else parts[0] for parts in zip(*terms, strict=True))
    return y.to(ctx.dtype), cbcr.to(ctx.dtype)


def _vmap(info: Any, in_dims: Any, rgb: Tensor, *rest: Any) -> Any:
    op = calls["rgb_to_dct"]
    samples, scale, scale_dim = info.batch_size, rest[3], in_dims[4]
    if scale_dim is None:
        batched = rgb.movedim(in_dims[0], 0)
        results = op(batched.flatten(0, 1), *rest)
        return tuple(coefs.unflatten(0, batched.shape[:2]) for coefs in results), (0, 0)
    each = []
    for k in range(samples):
        image = rgb if in_dims[0] is None else rgb.select(in_dims[0], k)
        each.append(op(image, *rest[:3], scale.select(scale_dim, k).contiguous(), rest[4]))
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0)


_rgb_to_dct = register("rgb_to_dct", fake=_fake, setup_context=_remember, backward=_backward, jvp=_jvp, vmap=_vmap)


# ---- public functions ------------------------------------------------------------------------------------------------


def check_options(op: str, subsampling: Any, layout: Any, dtype: Any) -> None:
    """Checks the options of rgb_to_dct that need no image."""
    check.one_of(op, "subsampling", subsampling, tuple(SUBSAMPLINGS))
    check.one_of(op, "layout", layout, LAYOUTS)
    if dtype not in check.FLOATING:
        raise TypeError(f"{op}: dtype must be float16, bfloat16, float32 or float64, got {check.dtype_name(dtype)}")


def rgb_to_dct(
    rgb: Tensor,
    *,
    subsampling: str = "4:2:0",
    layout: str = "planar",
    freqs: Freqs | Tensor = None,
    scale: Tensor | Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """JPEG-convention DCT coefficients (y, cbcr) of RGB images, in one pass over the pixels.

    What a JPEG encoder computes before it quantises (ITU-T T.81 and T.871): full-range BT.601 YCbCr, chroma averaged over
    its cells, luma minus 128, orthonormal 8 x 8 DCT; in real numbers, without the encoder's rounding. The grids are those that
    :func:`fourfold.jpeg.read` gives. Input of the networks of Gueguen et al., "Faster Neural Networks Straight from JPEG"
    (NeurIPS 2018).

    Args:
        rgb: [B, 3, H, W], uint8, or float16, bfloat16, float32 or float64 in 0..255. Planar (contiguous) and interleaved
            (channels_last) pixels, and crops of them, are read in place. Rows and columns that don't fill a block, or chroma's
            cell, are filled by repeating the last one; chroma is averaged after that (libjpeg, below the image, before).
        subsampling: "4:4:4", "4:2:2" (chroma halved in width) or "4:2:0" (in both directions).
        layout: "planar" gives y [B, F, h, w] and cbcr [B, 2F, h', w'], Cb's F frequencies before Cr's; "blocks" gives
            y [B, 1, h, w, F] and cbcr [B, 2, h', w', F]. h = ceil(H / 8), w = ceil(W / 8); for 4:2:0 h' = ceil(H / 16) and
            w' = ceil(W / 16).
        freqs: the frequencies to keep, as row-major indices, in output order; a list, or an int64 tensor, without repeats.
            None keeps all 64.
        scale: [F], or [3, F] for Y, Cb and Cr, in output order: multiplies the coefficients.
        dtype: of the results. float64 here, or for rgb, computes in float64, everything else in float32.

    Returns:
        (y, cbcr), contiguous whatever the memory format of rgb: their channels are frequencies. Twice differentiable in rgb and
        scale.

    Raises:
        TypeError: rgb is neither uint8 nor floating, or an argument has the wrong type.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "rgb_to_dct"
    check.tensor(op, "rgb", rgb)
    if rgb.dtype != torch.uint8 and rgb.dtype not in check.FLOATING:
        raise TypeError(
            f"{op}: rgb must be uint8, or float16, bfloat16, float32 or float64 in 0..255, got {check.dtype_name(rgb)}"
        )
    check_options(op, subsampling, layout, dtype)
    if rgb.dim() != 4 or rgb.shape[1] != 3:
        hint = "; add the missing dimension with rgb[None]" if rgb.dim() == 3 else ""
        hint = "; bring channels forward with rgb.permute(0, 3, 1, 2)" if rgb.dim() == 4 and rgb.shape[3] == 3 else hint
        raise ValueError(f"{op}: rgb must be [B, 3, H, W], got {tuple(rgb.shape)}{hint}")
    if rgb.shape[2] == 0 or rgb.shape[3] == 0:
        raise ValueError(f"{op}: rgb must have H and W of at least 1, got {tuple(rgb.shape)}")
    index: Tensor | None = freqs if frequencies.is_index(freqs, op) else None
    kept = None if index is not None else frequencies.listed(op, freqs, 8)
    f = frequencies.count(kept, 8) if index is None else index.shape[0]
    work = _work_type(rgb.dtype, dtype)
    if scale is not None:
        scale = check.numbers(op, "scale", scale, work, rgb.device)
        if not (check.has_shape(scale, f) or check.has_shape(scale, 3, f)):
            raise ValueError(f"{op}: scale must be [{f}] or [3, {f}], got {list(scale.shape)}")
        scale = scale.expand(3, f).contiguous()
    if index is None:
        return _rgb_to_dct(rgb, subsampling, layout, kept, scale, dtype)
    y, cbcr = (frequencies.select(c, index, 8, layout) for c in _rgb_to_dct(rgb, subsampling, layout, None, None, work))
    if scale is not None:
        y, cbcr = y * _by_slot(scale[:1], layout), cbcr * _by_slot(scale[1:], layout)
    return y.to(dtype), cbcr.to(dtype)


def dct_to_rgb(y: Tensor, cbcr: Tensor, *, subsampling: str = "4:2:0", size: Sequence[int] | None = None) -> Tensor:
    """RGB images of JPEG-convention DCT coefficients: what a decoder computes, in real numbers and without clipping.

    Inverse DCT, luma plus 128, each chroma sample repeated over its cell (the box upsampling that "non-fancy" decoders do), RGB
    by BT.601. The inverse of :func:`rgb_to_dct` for 4:4:4; with subsampling, chroma has lost what its box filter took.

    Args:
        y: [B, 64, h, w], float16, bfloat16, float32 or float64.
        cbcr: [B, 128, h', w'] of the same dtype, Cb's 64 frequencies before Cr's; h' = ceil(h / 2) for "4:2:0",
            w' = ceil(w / 2) for "4:2:0" and "4:2:2".
        subsampling: "4:4:4", "4:2:2" or "4:2:0".
        size: (H, W) of the image, to crop to; it must round up to the blocks of y. None: whole blocks.

    Returns:
        [B, 3, H, W] in y's dtype, nominally 0..255, not clipped; 16-bit ones are computed in float32 and rounded once. Twice
        differentiable.

    Raises:
        TypeError: y or cbcr is not a floating tensor, or they differ in dtype.
        ValueError: anything else; the message names what was expected and what came.
    """
    op = "dct_to_rgb"
    check.one_of(op, "subsampling", subsampling, tuple(SUBSAMPLINGS))
    check.floating(op, "y", y)
    check.floating(op, "cbcr", cbcr)
    if cbcr.dtype != y.dtype:
        raise TypeError(f"{op}: cbcr must be {check.dtype_name(y)} as y is, got {check.dtype_name(cbcr)}")
    v, h = SUBSAMPLINGS[subsampling]
    if y.dim() != 4 or y.shape[1] != 64:
        raise ValueError(f"{op}: y must be [B, 64, h, w], got {tuple(y.shape)}")
    rows, columns = (y.shape[2] + v - 1) // v, (y.shape[3] + h - 1) // h
    if not check.has_shape(cbcr, y.shape[0], 128, rows, columns):
        raise ValueError(
            f"{op}: cbcr must be {(y.shape[0], 128, rows, columns)} for y {tuple(y.shape)} and {subsampling}, got "
            f"{tuple(cbcr.shape)}"
        )
    if cbcr.device != y.device:
        raise ValueError(f"{op}: cbcr is on {cbcr.device}, y on {y.device}; move one with .to()")
    if y.shape[2] == 0 or y.shape[3] == 0:
        raise ValueError(f"{op}: y must have h and w of at least 1, got {tuple(y.shape)}")
    if size is None:
        size = (8 * y.shape[2], 8 * y.shape[3])
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"{op}: size must be (H, W), got {size!r}")
    height, width = (check.integer(op, "each of size", length) for length in size)
    if (height + 7) // 8 != y.shape[2] or (width + 7) // 8 != y.shape[3]:
        raise ValueError(
            f"{op}: size {(height, width)} must round up to the {y.shape[2]} x {y.shape[3]} blocks of y, "
            f"{(8 * y.shape[2], 8 * y.shape[3])}"
        )
    work = accumulate_type(y.dtype)
    luma = block_idct(y.to(work), size=(height, width), shift=-128.0)[:, 0]
    cells = block_idct(cbcr.to(work)).repeat_interleave(v, 2).repeat_interleave(h, 3)[..., :height, :width]
    blue, red = luma + cells[:, 0] / BLUE, luma + cells[:, 1] / RED
    green = (luma - LUMA[0] * red - LUMA[2] * blue) / LUMA[1]
    return torch.stack([red, green, blue], 1).to(y.dtype)
