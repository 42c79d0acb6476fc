"""RGB images to JPEG-convention DCT coefficients and back.

Arguments are those of the op: ``freqs`` None or row-major indices, ``scale`` None or [3, F] in the accumulation type.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtypes import accumulate_type
from .blockdct import inverse_transform, keep, replicate_edges, to_layout, transform

#: Vertical and horizontal extent, in pixels, of the cell that shares one chroma sample.
SUBSAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}

#: Weights of R, G and B in luma, BT.601.
LUMA = (0.299, 0.587, 0.114)


def ycbcr(rgb: Tensor) -> Tensor:
    """Full-range YCbCr [B, 3, H, W] of RGB in 0..255, all three centred at 0."""
    red, green, blue = rgb.unbind(1)
    y = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return torch.stack([y - 128, (blue - y) / (2 - 2 * LUMA[2]), (red - y) / (2 - 2 * LUMA[0])], 1)


def rgb_to_dct(
    rgb: Tensor, subsampling: str, layout: str, freqs: Sequence[int] | None, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """scale * DCT of luma - 128, and of chroma averaged over its cells."""
    v, h = SUBSAMPLINGS[subsampling]
    work = torch.promote_types(accumulate_type(rgb.dtype), accumulate_type(dtype))
    ycc = ycbcr(rgb.to(work))
    y = transform(replicate_edges(ycc[:, :1], 8, 8), 8)
    cbcr = transform(F.avg_pool2d(replicate_edges(ycc[:, 1:], 8 * v, 8 * h), (v, h)), 8)
    y, cbcr = keep(y, freqs), keep(cbcr, freqs)
    if scale is not None:
        y, cbcr = y * scale[:1, None, None, :], cbcr * scale[1:, None, None, :]
    return to_layout(y, layout, 8).to(dtype).contiguous(), to_layout(cbcr, layout, 8).to(dtype).contiguous()


def dct_to_rgb(y: Tensor, cbcr: Tensor, subsampling: str, size: tuple[int, int] | None) -> Tensor:
    """RGB [B, 3, H, W] of planar coefficients, each chroma sample repeated over its cell."""
    v, h = SUBSAMPLINGS[subsampling]
    work = accumulate_type(y.dtype)

    def pixels(coefs: Tensor, channels: int) -> Tensor:
        return inverse_transform(coefs.to(work).unflatten(1, (channels, 64)).movedim(2, -1), 8)

    luma = pixels(y, 1)
    height, width = size if size is not None else luma.shape[2:]
    chroma = pixels(cbcr, 2).repeat_interleave(v, 2).repeat_interleave(h, 3)[..., :height, :width]
    luma = luma[:, 0, :height, :width] + 128
    blue = luma + (2 - 2 * LUMA[2]) * chroma[:, 0]
    red = luma + (2 - 2 * LUMA[0]) * chroma[:, 1]
    green = (luma - LUMA[0] * red - LUMA[2] * blue) / LUMA[1]
    return torch.stack([red, green, blue], 1).to(y.dtype)
