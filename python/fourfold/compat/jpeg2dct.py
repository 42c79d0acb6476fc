"""The functions and shapes of the jpeg2dct library, from its documentation, over ``fourfold.jpeg``.

``from fourfold.compat.jpeg2dct import load, loads`` in place of ``from jpeg2dct.numpy import load, loads``. What differs:
nothing is re-encoded, a file that is not 4:2:0 has the chroma grid it has; broken files, CMYK and RGB ones, and products that
int16 can't hold are errors.
"""

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from ..jpeg.files import JpegError, read
from ..ops import _checks as check

Coefficients = npt.NDArray[np.int16]


def loads(data: Any, normalized: bool = True, channels: int = 3) -> tuple[Coefficients, ...]:
    """The DCT coefficients of a JPEG file in memory: (y, cb, cr), int16 [h, w, 64] each.

    Natural (row-major) frequency order. For an image of H x W, h = ceil(H/8) and w = ceil(W/8); chroma of a 4:2:0 file, and the
    zeros that a gray file gets for it, are [ceil(H/16), ceil(W/16), 64]. Chroma sampled otherwise is returned on its own grid,
    never transcoded: [ceil(H/8), ceil(W/8), 64] for 4:4:4.

    Args:
        data: bytes, or anything else that :func:`fourfold.jpeg.read` takes.
        normalized: True multiplies by the file's quantisation tables, False gives the integers of the file.
        channels: 3, or 1 for y alone.

    Returns:
        (y, cb, cr), or (y,): arrays of their own.

    Raises:
        TypeError: data is none of these, or an argument has the wrong type.
        ValueError: channels is neither 3 nor 1; or, as a JpegError, the file can't be read, is neither YCbCr nor gray, or has a
            coefficient whose product with its table leaves int16.
    """
    return _coefficients("jpeg2dct.loads", data, normalized, channels)


def load(filename: str | os.PathLike[str], normalized: bool = True, channels: int = 3) -> tuple[Coefficients, ...]:
    """:func:`loads` of a file on disk.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: as loads.
    """
    return _coefficients("jpeg2dct.load", filename, normalized, channels)


def _coefficients(op: str, source: Any, normalized: bool, channels: int) -> tuple[Coefficients, ...]:
    check.one_of(op, "channels", check.integer(op, "channels", channels), (3, 1))
    coefs = read(source)
    if coefs.color_space not in ("ycbcr", "gray"):
        raise JpegError(f"{op}: the file must be ycbcr or gray, got {coefs.color_space}; read it with fourfold.jpeg.read")
    planes = []
    for component, table in list(zip(coefs.components, coefs.qtables, strict=True))[:channels]:
        plane = component.numpy()
        if normalized:
            product = plane.astype(np.int64) * table.numpy()
            if product.size and not -32768 <= product.min() <= product.max() <= 32767:
                largest = max(product.min(), product.max(), key=abs)
                raise JpegError(
                    f"{op}: dequantised coefficients must fit int16, got {largest}; pass normalized=False and multiply by the "
                    "tables of fourfold.jpeg.read in a wider type"
                )
            plane = product.astype(np.int16)
        planes.append(np.ascontiguousarray(plane))
    if len(planes) < channels:
        h, w = (-(-side // 16) for side in coefs.size)
        planes += [np.zeros((h, w, 64), np.int16) for _ in range(2)]
    return tuple(planes)
