"""What can be done to coefficients without leaving the DCT: each function is the pixel operation between an IDCT and a DCT.

Arguments and results are blocks [.., h, w, 64], N = 8.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._dtypes import accumulate_type
from .blockdct import inverse_transform, transform


def through_pixels(coefs: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """DCT(operation(IDCT(coefs))), operation on [.., 8h, 8w]."""
    work = accumulate_type(coefs.dtype)
    return transform(operation(inverse_transform(coefs.to(work), 8)), 8)


def in_dtype_of(result: Tensor, coefs: Tensor) -> Tensor:
    """Integers in, integers out: result is one of them but for rounding errors."""
    return (result if coefs.is_floating_point() else result.round()).to(coefs.dtype)


def dct_flip(coefs: Tensor, dim: int) -> Tensor:
    """The image mirrored; dim counts as in coefs."""
    dim = dim if dim < 0 else dim - coefs.dim()
    return in_dtype_of(through_pixels(coefs, lambda image: image.flip(dim + 1)), coefs)


def dct_rot90(coefs: Tensor, k: int = 1) -> Tensor:
    """The image turned by k quarters, counterclockwise."""
    return in_dtype_of(through_pixels(coefs, lambda image: torch.rot90(image, k, (-2, -1))), coefs)


def dct_crop(coefs: Tensor, box: Sequence[int]) -> Tensor:
    """The image cropped; box is (top, left, height, width) in blocks."""
    top, left, height, width = (8 * side for side in box)
    return in_dtype_of(through_pixels(coefs, lambda image: image[..., top : top + height, left : left + width]), coefs)


def dct_downscale2(coefs: Tensor) -> Tensor:
    """The mean of each 2 x 2 pixels, after repeating the last pixel row and column up to an even number of blocks."""
    result = through_pixels(coefs, lambda image: box_mean(edge_pad(image, 16)))
    return result.to(coefs.dtype if coefs.is_floating_point() else torch.float32)


def dct_edge_pad(coefs: Tensor, size: Sequence[int], before: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """The image of this size [.., H, W] put `before` blocks into a frame of `blocks` blocks, its edges repeated outwards."""

    def framed(image: Tensor) -> Tensor:
        for dim, length, start, count in zip((-2, -1), size, before, blocks, strict=True):
            places = (torch.arange(8 * count, device=image.device) - 8 * start).clamp(0, length - 1)
            image = image.index_select(dim, places)
        return image

    return through_pixels(coefs, framed).to(coefs.dtype)


def edge_pad(image: Tensor, multiple: int) -> Tensor:
    """image with its last row and column repeated to a multiple."""
    for dim in (-2, -1):
        length = image.shape[dim]
        places = torch.arange(-(-length // multiple) * multiple, device=image.device).clamp(max=length - 1)
        image = image.index_select(dim, places)
    return image


def box_mean(image: Tensor) -> Tensor:
    """The mean of each 2 x 2 pixels of [.., H, W]."""
    *lead, height, width = image.shape
    return image.reshape(*lead, height // 2, 2, width // 2, 2).mean((-3, -1))
