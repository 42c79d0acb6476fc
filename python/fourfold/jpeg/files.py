"""JPEG files as quantised DCT coefficients: read, read_batch, write. No pixel is decoded or encoded."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from .. import _load
from .._pages import see
from ..ops import _checks as check

COLOR_SPACES = ("gray", "ycbcr", "rgb", "cmyk", "ycck")
_COMPONENTS = (1, 3, 3, 4, 4)

Source = bytes | bytearray | memoryview | str | os.PathLike[str] | Tensor | np.ndarray[Any, Any]


class JpegError(ValueError):
    """A file that cannot be read, or coefficients that no file can hold. The message names the source and the fault."""


@dataclass(slots=True, eq=False, repr=False)
class JpegCoefficients:
    """The quantised DCT coefficients of a JPEG file.

    Attributes:
        components: int16 [h, w, 64] each, natural (row-major) order of frequencies. h is ⌈⌈H·v/v_max⌉/8⌉ and w is
            ⌈⌈W·h/h_max⌉/8⌉: no blocks that only fill up an MCU.
        qtables: int32 [64] each, one per component, natural order.
        size: (H, W) in pixels.
        sampling: (h, v) of each component, as in the file: ((2, 2), (1, 1), (1, 1)) is 4:2:0.
        color_space: "gray", "ycbcr", "rgb", "cmyk" or "ycck".
        progressive: whether the file was progressive.
        warnings: how many flaws the reading passed over; 0 for a sound file, 1 for one that lacks its end marker alone.

    The tensors of one `read`, and of one `read_batch`, lie in one piece of memory. A copy or a pickle holds its own image only.
    """

    components: tuple[Tensor, ...]
    qtables: tuple[Tensor, ...]
    size: tuple[int, int]
    sampling: tuple[tuple[int, int], ...]
    color_space: str
    progressive: bool = False
    warnings: int = 0

    def __repr__(self) -> str:
        """Its size and grids, in one line, without the coefficients."""
        grids = ", ".join(f"{c.shape[0]}x{c.shape[1]}" for c in self.components)
        factors = ", ".join(f"{h}x{v}" for h, v in self.sampling)
        flaws = f", {self.warnings} warning{'s'[: self.warnings > 1]}" if self.warnings else ""
        kind = "progressive, " if self.progressive else ""
        return f"JpegCoefficients({kind}{self.color_space}, size {self.size}, sampling {factors}, blocks {grids}{flaws})"

    def __reduce__(self) -> tuple[Any, ...]:
        """As one tensor, which a DataLoader's worker sends through one piece of shared memory."""
        parts = [t.reshape(-1).view(torch.int16) for t in (*self.qtables, *self.components)]
        grids = tuple(tuple(c.shape[:2]) for c in self.components)
        facts = (self.size, self.sampling, self.color_space, self.progressive, self.warnings)
        return _unpacked, (torch.cat(parts), grids, *facts)


def _unpacked(packed: Tensor, grids: tuple[tuple[int, int], ...], *facts: Any) -> JpegCoefficients:
    n = len(grids)
    parts = packed.split([128] * n + [h * w * 64 for h, w in grids])
    qtables = tuple(part.view(torch.int32) for part in parts[:n])
    components = tuple(part.view(h, w, 64) for part, (h, w) in zip(parts[n:], grids, strict=True))
    return JpegCoefficients(components, qtables, *facts)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _libjpeg(op: str) -> Any:
    if _load.jpeg is None:
        raise RuntimeError(f"{op}: {_load.missing['jpeg']}{see('jpeg.md#without-libjpeg')}")
    return _load.jpeg


def _readable(op: str, source: Any, name: str) -> Any:
    """What _jpeg.read takes: an object with a buffer of bytes, or a path as a tuple of one bytes object."""
    if isinstance(source, bytes | bytearray):
        return source
    if isinstance(source, str | os.PathLike):
        path = os.fsencode(source)
        if b"\0" in path:
            raise ValueError(f"{op}: {name} is a path with a null character: {source!r}")
        return (path,)
    if isinstance(source, Tensor):
        check.tensor(op, name, source)
        if source.dtype != torch.uint8 or source.dim() != 1:
            raise TypeError(f"{op}: {name} must be a uint8 tensor [n], got {check.dtype_name(source)} {list(source.shape)}")
        if source.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be on the CPU, got {source.device}; pass {name}.cpu()")
        return source.contiguous().numpy()
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 1:
            raise TypeError(f"{op}: {name} must be a uint8 array [n], got {source.dtype} {list(source.shape)}")
        return np.ascontiguousarray(source)
    try:
        view = memoryview(source)
    except TypeError:
        raise TypeError(
            f"{op}: {name} must be bytes, a path, or a uint8 tensor or array [n], got {type(source).__name__}"
        ) from None
    if view.itemsize != 1 or view.ndim != 1:
        raise TypeError(f"{op}: {name} must hold bytes in one dimension, got format {view.format!r} in {view.ndim}")
    return view if view.c_contiguous else view.tobytes()


def _options(op: str, strict: Any, max_pixels: Any, max_scans: Any) -> tuple[bool, int, int]:
    if strict is not True and strict is not False:
        raise TypeError(f"{op}: strict must be True or False, got {strict!r}")
    if type(max_pixels) is not int:
        max_pixels = check.integer(op, "max_pixels", max_pixels)
    if type(max_scans) is not int:
        max_scans = check.integer(op, "max_scans", max_scans)
    if max_pixels < 1 or max_scans < 1:
        name, value = ("max_pixels", max_pixels) if max_pixels < 1 else ("max_scans", max_scans)
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    # No frame has more pixels, and no file more scans.
    return strict, min(max_pixels, 2**32), min(max_scans, 2**31 - 1)


def _image(found: Any) -> JpegCoefficients:
    components, qtables, *facts = found
    from_numpy = torch.from_numpy
    return JpegCoefficients(tuple(map(from_numpy, components)), tuple(map(from_numpy, qtables)), *facts)


def _refuse(op: str, source: Any, readable: Any, found: str | int | None, index: int | None = None) -> NoReturn:
    where = "" if index is None else f"source {index}: "
    if found is None:
        raise MemoryError(f"{op}: {where}no memory for the coefficients")
    if isinstance(found, int):
        # OSError makes a FileNotFoundError, IsADirectoryError, ... of it.
        raise OSError(found, f"{op}: {where}{os.strerror(found)}", os.fspath(source))
    name = os.fsdecode(readable[0]) if isinstance(readable, tuple) else f"{memoryview(readable).nbytes} bytes"
    if index is not None:
        name = f"source {index} ({name})"
    raise JpegError(f"{op}: {name}: {found}{see('jpeg.md#broken-files')}")


def read(source: Source, *, strict: bool = True, max_pixels: int = 2**28, max_scans: int = 100) -> JpegCoefficients:
    """Reads a JPEG file's quantised DCT coefficients, exactly the integers that are in the file.

    Baseline, extended, progressive and arithmetic-coded files of 8-bit samples; gray, YCbCr, RGB, CMYK and YCCK; every
    sampling. Runs without the GIL.

    Args:
        source: the file's bytes (bytes, bytearray, memoryview, or a uint8 tensor or numpy array [n]) or its path.
        strict: refuse a file with any flaw that libjpeg would pass over with a warning, a missing end marker alone excepted.
            False: what could not be read is zero, and the result's ``warnings`` counts the flaws.
        max_pixels: refuse a frame of more pixels, before any memory is allocated for it, and one whose scans walk over more
            than 20 times as many: a small file can keep its reader busy for long.
        max_scans: refuse a file of more scans.

    Raises:
        JpegError: the file cannot be read; the message names the source and says why.
        OSError: the path cannot be read, FileNotFoundError where there is none.
        TypeError: source is something else.
        RuntimeError: fourfold was built without libjpeg.
    """
    op = "jpeg.read"
    options = _options(op, strict, max_pixels, max_scans)
    readable = source if type(source) is bytes else _readable(op, source, "source")
    (found,) = _libjpeg(op).read((readable,), *options, 1, True)
    if type(found) is not tuple:
        _refuse(op, source, readable, found)
    return _image(found)


def read_batch(
    sources: Iterable[Source],
    *,
    threads: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    strict: bool = True,
    max_pixels: int = 2**28,
    max_scans: int = 100,
) -> list[JpegCoefficients | None]:
    """Reads many JPEG files in native threads, without the GIL, into one piece of memory allocated once.

    The threads live as long as the call, so that it may run in a DataLoader's workers, forked or spawned. As long as one
    image is kept, the memory of all is.

    Args:
        sources: as for `read`.
        threads: how many; None takes torch.get_num_threads(), which is 1 in a DataLoader's worker.
        on_error: "raise" raises for the first source that fails, and names its index; "skip" gives None in its place, also for
            a path that cannot be read.
        strict: as for `read`.
        max_pixels: as for `read`, of each file.
        max_scans: as for `read`, of each file.

    Raises:
        JpegError, OSError, TypeError, RuntimeError: as `read`.
    """
    op = "jpeg.read_batch"
    check.one_of(op, "on_error", on_error, ("raise", "skip"))
    options = _options(op, strict, max_pixels, max_scans)
    threads = torch.get_num_threads() if threads is None else check.integer(op, "threads", threads)
    if threads < 1:
        raise ValueError(f"{op}: threads must be at least 1, got {threads}")
    single = isinstance(sources, bytes | bytearray | memoryview | str | os.PathLike | Tensor | np.ndarray)
    if single or not hasattr(sources, "__iter__"):
        raise TypeError(f"{op}: sources must be a list of files, got one {type(sources).__name__}; call jpeg.read")
    sources = list(sources)
    readables = [s if type(s) is bytes else _readable(op, s, f"sources[{i}]") for i, s in enumerate(sources)]
    skip = on_error == "skip"
    results: list[JpegCoefficients | None] = []
    for i, found in enumerate(_libjpeg(op).read(readables, *options, min(threads, 2**31), not skip)):
        if type(found) is tuple:
            results.append(_image(found))
        elif skip and found is not None:
            results.append(None)
        else:
            _refuse(op, sources[i], readables[i], found, i)
    return results


# ---- writing ---------------------------------------------------------------------------------------------------------


def _tensors(op: str, name: str, tensors: Any, dtype: torch.dtype, dim: int) -> list[np.ndarray[Any, Any]]:
    if not isinstance(tensors, Sequence):
        raise TypeError(f"{op}: {name} must be a tuple of tensors, got {type(tensors).__name__}")
    shape = "[h, w, 64]" if dim == 3 else "[64]"
    arrays = []
    for i, t in enumerate(tensors):
        check.tensor(op, f"{name}[{i}]", t)
        if t.dtype != dtype:
            raise TypeError(f"{op}: {name}[{i}] must be {check.dtype_name(dtype)}, got {check.dtype_name(t)}")
        if t.dim() != dim or t.shape[-1] != 64:
            raise ValueError(f"{op}: {name}[{i}] must have shape {shape}, got {tuple(t.shape)}")
        if t.device.type != "cpu":
            raise ValueError(f"{op}: {name}[{i}] must be on the CPU, got {t.device}; pass it through .cpu()")
        arrays.append(t.contiguous().numpy())
    return arrays


def _pairs(op: str, name: str, pairs: Any) -> list[tuple[int, int]]:
    try:
        return [(check.integer(op, name, a), check.integer(op, name, b)) for a, b in pairs]
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be pairs of ints, got {pairs!r}") from None


def write(coefs: JpegCoefficients, *, progressive: bool = False, optimize: bool = True) -> bytes:
    """Writes quantised DCT coefficients as a JPEG file, without any loss.

    `read` of the result has the same components, qtables, size, sampling and color_space. Whatever else the original file
    held (EXIF, ICC profile, restart intervals) is not kept. Runs without the GIL.

    Args:
        coefs: from `read`, or made by hand: tensors on the CPU, int16 [h, w, 64] and int32 [64].
        progressive: write a progressive file, whatever the original was.
        optimize: compute Huffman tables for this file (always so for a progressive one); False takes the standard's example
            tables and is faster.

    Raises:
        JpegError: no JPEG can hold this: a coefficient out of range, a grid of blocks that does not belong to the size and the
            sampling, a quantisation step outside 1..65535 (a step above 255 makes an extended sequential file).
        TypeError: a field has another type or dtype.
        RuntimeError: fourfold was built without libjpeg.
    """
    op, there = "jpeg.write", see("jpeg.md#writing")
    if not isinstance(coefs, JpegCoefficients):
        raise TypeError(f"{op}: coefs must be JpegCoefficients, got {type(coefs).__name__}")
    for name, flag in (("progressive", progressive), ("optimize", optimize)):
        if flag is not True and flag is not False:
            raise TypeError(f"{op}: {name} must be True or False, got {flag!r}")
    check.one_of(op, "color_space", coefs.color_space, COLOR_SPACES)
    components = _tensors(op, "components", coefs.components, torch.int16, 3)
    qtables = _tensors(op, "qtables", coefs.qtables, torch.int32, 1)
    sampling = _pairs(op, "sampling", coefs.sampling)
    (size,) = _pairs(op, "size", (coefs.size,))
    color_space = COLOR_SPACES.index(coefs.color_space)
    count = _COMPONENTS[color_space]
    for name, fields in (("components", components), ("qtables", qtables), ("sampling", sampling)):
        if len(fields) != count:
            found = f"{len(fields)}{there}"
            raise JpegError(f"{op}: {name} must have {count} entries for color_space {coefs.color_space!r}, got {found}")
    if not all(0 <= s < 2**31 for s in (*size, *(f for pair in sampling for f in pair))):
        raise JpegError(f"{op}: no JPEG has size {size} and sampling {tuple(sampling)}{there}")
    written = _libjpeg(op).write(components, qtables, size, sampling, color_space, progressive, optimize)
    if isinstance(written, str):
        raise JpegError(f"{op}: {written}{there}")
    return written
