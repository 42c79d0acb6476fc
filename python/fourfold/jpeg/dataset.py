"""Folders of JPEG files as batches of coefficients for a network: DctDataset, collate, frequency_stats.

A file is entropy-decoded to int16 coefficients, cropped and mirrored as blocks, and normalised in one pass, without pixels.
"""

import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._pages import see
from .._progress import progress_bar
from ..ops import _checks as check
from ..ops.blockdct import _normalize_grids, check_options, dct_normalize
from ..ops.blockdct_domain import dct_flip, edge_pad
from ..reference._dtypes import accumulate_type
from .files import JpegCoefficients, JpegError, read, read_batch

#: What DctDataset.from_folder takes for a JPEG file, in any case.
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif")

Item: TypeAlias = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Any]

_MCU = 16  # pixels of a 4:2:0 minimum coded unit: two luma blocks, one chroma block
#: By (horizontal, vertical) steps of Cb and Cr.
_SAMPLINGS = {
    ((1, 1), (1, 1)): "4:4:4",
    ((2, 1), (2, 1)): "4:2:2",
    ((2, 2), (2, 2)): "4:2:0",
    ((1, 2), (1, 2)): "4:4:0",
    ((4, 1), (4, 1)): "4:1:1",
    ((4, 2), (4, 2)): "4:1:0",
}


# ---- one file --------------------------------------------------------------------------------------------------------


class _Image(NamedTuple):
    """A file: quantised Y [h, w, 64], Cb and Cr [h', w', 64], their tables [64], and (H, W) in pixels."""

    planes: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    size: tuple[int, int]


class _Window(NamedTuple):
    """Where an image goes: per axis the MCUs cut off before it or, if it is padded, put before it; whether it is mirrored."""

    offset: tuple[int, int]
    pads: tuple[bool, bool]
    flip: bool


def _name(source: Any, index: int) -> str:
    """A source as errors name it."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"paths[{index}]"


def _read(op: str, source: Any, index: int) -> JpegCoefficients:
    try:
        return read(source)
    except JpegError as error:  # which names a path itself
        raise JpegError(f"{op}: paths[{index}]: {error}") from error


def _sampling_name(coefs: JpegCoefficients) -> str:
    """As 4:2:0, or the factors where there is no such name."""
    (h, v), *chroma = coefs.sampling
    for steps, name in _SAMPLINGS.items():
        if all((h, v) == (a * across, b * down) for (a, b), (across, down) in zip(steps, chroma, strict=True)):
            return name
    return " ".join(f"{across}x{down}" for across, down in coefs.sampling)


def _check_color(op: str, coefs: JpegCoefficients, name: str) -> None:
    if coefs.color_space not in ("ycbcr", "gray"):
        raise JpegError(
            f"{op}: {name} must be ycbcr or gray, got {coefs.color_space}; re-encode it, or decode it and use rgb_to_dct"
            f"{see('jpeg.md#batches')}"
        )


def _image(op: str, coefs: JpegCoefficients, name: str) -> _Image:
    """A 4:2:0 file, or a gray one with chroma of zeros."""
    _check_color(op, coefs, name)
    if coefs.color_space == "gray":
        h, w = (-(-side // _MCU) for side in coefs.size)
        nothing, table = coefs.components[0].new_zeros(h, w, 64), torch.ones_like(coefs.qtables[0])
        return _Image((*coefs.components, nothing, nothing), (*coefs.qtables, table, table), coefs.size)
    sampling = _sampling_name(coefs)
    if sampling != "4:2:0":
        raise JpegError(
            f"{op}: {name} must have 4:2:0 chroma, got {sampling}; re-encode it, or decode it and use "
            f"rgb_to_dct(..., subsampling='4:2:0'){see('jpeg.md#batches')}"
        )
    return _Image(coefs.components, coefs.qtables, coefs.size)


# ---- the dataset -----------------------------------------------------------------------------------------------------


class DctDataset(torch.utils.data.Dataset[Item]):
    """JPEG files as coefficients for a DCT network: (y, cbcr), or (y, cbcr, target).

    y is [F, h, w], cbcr [2F, h', w'] (Cb's F planes, then Cr's): dequantised, ``(coefficient - mean) / std``, in dtype. A file
    of H x W pixels has h = ceil(H/8), h' = ceil(H/16); with ``size``, h = size/8 and h' = size/16. No pixel is decoded.

    Colour files must be YCbCr with 4:2:0 chroma: another sampling or colour space is a JpegError that names the file. A gray
    file gets the chroma that the same picture has in a colour file, coefficients of zero, which normalise to ``-mean / std``.

    ``size`` crops images that are larger and pads those that are smaller, each axis for itself. It moves in steps of 16 pixels,
    a block of chroma, which keeps both grids in register: a crop holds only pixels of the image, exactly as in the file.
    Padding repeats the outermost pixels of the image (not the filling of its last blocks) on either side, in each plane at its
    own resolution; it is computed from dequantised coefficients, exactly but for rounding. Images lie centred, at the step
    below the exact middle. With ``train`` the position is drawn at random and half of the images are mirrored left to right.
    The random numbers are torch's, three for each image, so ``torch.manual_seed`` and the seeds of DataLoader workers make
    them repeatable. Processes of one job that seed torch alike draw alike, for other images, unless the DataLoader of each has
    a ``generator`` of its own seed.

    A plain map-style dataset: shuffling, DistributedSampler and worker processes are the DataLoader's. It fetches whole
    batches (``__getitems__``), decoded by native threads and normalised in one pass, which :func:`collate` hands on without a
    copy; with ``pin_memory=True`` the DataLoader pins them. ``DataLoader(data, 64, shuffle=True, num_workers=4,
    collate_fn=ff.jpeg.collate)`` is all that it takes.

    Args:
        paths: the files; anything that :func:`jpeg.read` takes.
        targets: one for each path; given back as it is. None: items have no target.
        freqs: the frequencies to keep, as row-major indices in output order; None: all F = 64.
        mean: [F] in output order, or [3, F] for Y, Cb, Cr, in units of dequantised coefficients, as
            :func:`frequency_stats` gives them. None: 0.
        std: the same, all positive. None: 1.
        dtype: of y and cbcr: float16, bfloat16, float32 or float64.
        size: pixels, an int or (H, W), multiples of 16. None: files as they are, whose grids must agree within a batch.
        train: random crops and mirrors instead of centred ones; needs size.
        threads: for decoding a batch. None: torch.get_num_threads(), which is 1 in a DataLoader worker.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: anything else; the message names what was expected and what came.
    """

    #: Of from_folder: the class names, and the number of each.
    classes: list[str]
    class_to_idx: dict[str, int]

    def __init__(
        self,
        paths: Sequence[Any],
        targets: Sequence[Any] | Tensor | None = None,
        *,
        freqs: Sequence[int] | Tensor | None = None,
        mean: Tensor | Sequence[Any] | None = None,
        std: Tensor | Sequence[Any] | None = None,
        dtype: torch.dtype = torch.float32,
        size: int | Sequence[int] | None = None,
        train: bool = False,
        threads: int | None = None,
    ) -> None:
        op = "DctDataset"
        if isinstance(paths, (str, bytes, os.PathLike, Tensor)) or not hasattr(paths, "__iter__"):
            raise TypeError(
                f"{op}: paths must be a list of files, got {type(paths).__name__}; a folder is read by DctDataset.from_folder"
            )
        self.paths = list(paths)
        if targets is not None and not hasattr(targets, "__len__"):
            raise TypeError(f"{op}: targets must be one for each of {len(self.paths)} paths, got {type(targets).__name__}")
        if targets is not None and len(targets) != len(self.paths):
            raise ValueError(f"{op}: targets must be one for each of {len(self.paths)} paths, got {len(targets)}")
        self.targets = targets
        if dtype not in check.FLOATING:
            raise TypeError(f"{op}: dtype must be float16, bfloat16, float32 or float64, got {check.dtype_name(dtype)}")
        self.dtype = dtype
        self.freqs: list[int] | None = check_options(op, 8, "planar", freqs, None, 0.0)["freqs"]
        self.mean = _statistic(op, "mean", mean, self.freqs, dtype)
        self.std = _statistic(op, "std", std, self.freqs, dtype)
        if self.std is not None and not (self.std > 0).all():
            raise ValueError(
                f"{op}: std must be positive, got {self.std.min().item():g}; take 1 for frequencies that never vary, as "
                "frequency_stats does, or leave them out of freqs"
            )
        self.size = _size(op, size)
        if train and size is None:
            raise ValueError(f"{op}: train=True crops at random, which needs size=")
        self.train = bool(train)
        self.threads = threads if threads is None else check.integer(op, "threads", threads)
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"{op}: threads must be at least 1, got {threads}")

    @classmethod
    def from_folder(cls, root: str | os.PathLike[str], **options: Any) -> "DctDataset":
        """The files of root/<class>/**, with the number of their class as target.

        The layout of torchvision's ImageFolder: ``classes`` are the names of the folders in root, sorted; ``class_to_idx``
        numbers them; files lie in them at any depth, end in .jpg, .jpeg, .jpe or .jfif in any case, and come in sorted order.

        Args:
            root: the folder.
            **options: the keyword arguments of DctDataset.

        Raises:
            FileNotFoundError: root is not there.
            ValueError: it holds no folders, or one without JPEG files; the message names it.
        """
        op = "DctDataset.from_folder"
        if not os.path.isdir(root):
            raise FileNotFoundError(f"{op}: no folder {os.fspath(root)!r}")
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not classes:
            raise ValueError(f"{op}: {os.fspath(root)!r} must hold one folder for each class, and holds none")
        paths, targets = [], []
        for number, name in enumerate(classes):
            files = list(_jpegs_below(os.path.join(root, name)))
            if not files:
                raise ValueError(
                    f"{op}: class {name!r} must have files ending in {', '.join(EXTENSIONS)}, and {os.path.join(root, name)!r} "
                    "has none; remove the folder or fill it"
                )
            paths += files
            targets += [number] * len(files)
        dataset = cls(paths, targets, **options)
        dataset.classes, dataset.class_to_idx = classes, {name: number for number, name in enumerate(classes)}
        return dataset

    def __len__(self) -> int:
        """How many files there are."""
        return len(self.paths)

    def __repr__(self) -> str:
        """How many files, and what becomes of them."""
        options = {"size": self.size, "train": self.train or None, "freqs": self.freqs and f"{len(self.freqs)} frequencies"}
        shown = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        return f"DctDataset({len(self)} files{shown}, dtype={self.dtype})"

    def __getitem__(self, index: int) -> Item:
        """(y, cbcr) or (y, cbcr, target) of one file."""
        index = check.integer("DctDataset", "an index", index)
        return self._item(index, self._read(index), self._draw())

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The items of a batch, as the DataLoader asks for them: equal to those of single indices in this order."""
        draws = [self._draw() for _ in indices]
        files = read_batch([self.paths[i] for i in indices], threads=self.threads, on_error="skip")
        # A file that can't be read is read again by itself: then its error names it.
        images = [
            self._read(i) if coefs is None else _image("DctDataset", coefs, _name(self.paths[i], i))
            for i, coefs in zip(indices, files, strict=True)
        ]
        windows = [self._window(image, draw) for image, draw in zip(images, draws, strict=True)]
        cut = [self._cut(image, window) for image, window in zip(images, windows, strict=True)]
        one_grid = len({tuple(plane.shape for plane in image.planes) for image in cut}) == 1
        if not one_grid or any(any(window.pads) for window in windows):
            return [self._item(i, image, draw) for i, image, draw in zip(indices, images, draws, strict=True)]
        y, cbcr = self._normalized(cut, [window.flip for window in windows])
        return _Batch([self._with_target(i, *planes) for i, *planes in zip(indices, y, cbcr, strict=True)], y, cbcr)

    # ---- from a file to an item

    def _read(self, index: int) -> _Image:
        op, source = "DctDataset", self.paths[index]
        return _image(op, _read(op, source, index), _name(source, index))

    def _draw(self) -> list[float]:
        """Three numbers in [0, 1) for each image, whatever becomes of it: rows, columns, mirroring."""
        return torch.rand(3, dtype=torch.float64, device="cpu").tolist() if self.train else []

    def _window(self, image: _Image, draw: list[float]) -> _Window:
        if self.size is None:
            return _Window((0, 0), (False, False), False)
        offset, pads = [], []
        for axis, (length, wanted) in enumerate(zip(image.size, self.size, strict=True)):
            pad = length < wanted
            # A crop leaves out an MCU that the image only begins; a frame must hold it.
            steps = wanted // _MCU + length // -_MCU if pad else length // _MCU - wanted // _MCU
            offset.append(int(draw[axis] * (steps + 1)) if self.train else steps // 2)
            pads.append(pad)
        return _Window((offset[0], offset[1]), (pads[0], pads[1]), self.train and draw[2] < 0.5)

    def _cut(self, image: _Image, window: _Window) -> _Image:
        """Views, cropped along the axes that are not padded."""
        if self.size is None:
            return image
        planes = list(image.planes)
        for axis in (0, 1):
            if not window.pads[axis]:
                for c, step in enumerate((2, 1, 1)):
                    planes[c] = planes[c].narrow(axis, step * window.offset[axis], step * (self.size[axis] // _MCU))
        return image._replace(planes=tuple(planes))

    def _item(self, index: int, image: _Image, draw: list[float]) -> Item:
        window = self._window(image, draw)
        cut = self._cut(image, window)
        if any(window.pads):
            return self._with_target(index, *self._padded(cut, window))
        y, cbcr = self._normalized([cut], [window.flip])
        return self._with_target(index, y[0], cbcr[0])

    def _with_target(self, index: int, y: Tensor, cbcr: Tensor) -> Item:
        return (y, cbcr) if self.targets is None else (y, cbcr, self.targets[index])

    def _normalized(self, images: Sequence[_Image], flips: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Images of one grid, mirrored or not, to planes [B, F, h, w] and [B, 2F, h', w']."""

        def planes(part: slice) -> Tensor:
            grids = [plane for image in images for plane in image.planes[part]]
            count = len(grids) // len(images)
            tables = torch.stack([table for image in images for table in image.tables[part]]).to(accumulate_type(self.dtype))
            mean, std = (None if rows is None else rows.expand(3, -1)[part].contiguous() for rows in (self.mean, self.std))
            mirrored = [k for k in range(len(grids)) if flips[k // count]]
            return _normalize_grids(grids, tables, mean, std, count, mirrored, self.freqs, self.dtype)

        return planes(slice(0, 1)), planes(slice(1, 3))

    def _padded(self, image: _Image, window: _Window) -> tuple[Tensor, Tensor]:
        """One image, cut along the axes that are not padded, to planes [F, h, w] and [2F, h', w'], by way of floats."""
        assert self.size is not None
        planes = []
        for c, step in enumerate((2, 1, 1)):
            coefs, table = image.planes[c], image.tables[c]
            blocks = dct_normalize(coefs, table, layout="blocks", dtype=accumulate_type(self.dtype))
            size, before, frame = [], [], []
            for axis in (0, 1):
                pad = window.pads[axis]
                frame.append(self.size[axis] // _MCU * step)
                before.append(window.offset[axis] * step if pad else 0)
                size.append(-(-image.size[axis] * step // 2) if pad else 8 * frame[axis])
            blocks = edge_pad(blocks, size, before, frame)
            blocks = dct_flip(blocks, -2) if window.flip else blocks
            blocks = blocks if self.freqs is None else blocks[..., self.freqs]
            mean, std = (None if rows is None else rows.expand(3, -1)[c] for rows in (self.mean, self.std))
            if mean is not None:
                blocks = blocks - mean
            if std is not None:
                blocks = blocks / std
            planes.append(blocks.movedim(-1, -3).to(self.dtype).contiguous())
        y, cb, cr = planes
        return y, torch.cat([cb, cr])


class _Batch(list[Item]):
    """The items of a batch that lie one after the other in y and cbcr."""

    def __init__(self, items: list[Item], y: Tensor, cbcr: Tensor) -> None:
        super().__init__(items)
        self.made_of, self.y, self.cbcr = tuple(items), y, cbcr

    def unchanged(self) -> bool:
        return len(self) == len(self.made_of) and all(a is b for a, b in zip(self, self.made_of, strict=True))


def _statistic(op: str, name: str, values: Any, freqs: list[int] | None, dtype: torch.dtype) -> Tensor | None:
    """mean or std as a finite tensor [F] or [3, F] in the type that dtype is computed in."""
    if values is None:
        return None
    values = check.numbers(op, name, values, accumulate_type(dtype), torch.device("cpu"))
    f = 64 if freqs is None else len(freqs)
    if not (check.has_shape(values, f) or check.has_shape(values, 3, f)):
        hint = f"; take those of freqs with {name}[..., freqs]" if values.shape[-1:] == (64,) else ""
        raise ValueError(f"{op}: {name} must be [{f}] or [3, {f}], got {list(values.shape)}{hint}")
    if not values.isfinite().all():
        raise ValueError(f"{op}: {name} must be finite, got {values[~values.isfinite()][0].item()}")
    return values


def _size(op: str, size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise ValueError(f"{op}: size must be an int or (H, W), got {size!r}")
        height, width = (check.integer(op, "each of size", side) for side in size)
    else:
        height = width = check.integer(op, "size", size)
    if height < 1 or width < 1 or height % _MCU or width % _MCU:
        raise ValueError(
            f"{op}: size must be multiples of {_MCU} pixels (a block of 4:2:0 chroma), got {(height, width)}; "
            f"the nearest is {tuple(max(_MCU, round(side / _MCU) * _MCU) for side in (height, width))}"
        )
    return height, width


def _jpegs_below(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise error  # a folder that cannot be read is not an empty one

    for place, _folders, names in sorted(os.walk(folder, onerror=refuse, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS):
                yield os.path.join(place, name)


def collate(items: Sequence[Item]) -> Any:
    """Items of a DctDataset as one batch: y [B, F, h, w], cbcr [B, 2F, h', w'] and, where there are targets, these.

    For ``DataLoader(..., collate_fn=ff.jpeg.collate)``. Targets are collated by torch.utils.data.default_collate: ints become
    an int64 tensor. What a DctDataset fetched as a batch is handed on without a copy.

    Returns:
        (y, cbcr) or (y, cbcr, targets).

    Raises:
        TypeError: the items are not tuples of a DctDataset.
        ValueError: there are none, or their block grids differ; the message names these.
    """
    op = "jpeg.collate"
    if not items:
        raise ValueError(f"{op}: items must be those of a batch, got none")
    for item in items:
        if not isinstance(item, tuple) or len(item) not in (2, 3) or not all(isinstance(t, Tensor) for t in item[:2]):
            raise TypeError(f"{op}: items must be (y, cbcr) or (y, cbcr, target) of a DctDataset, got {type(item).__name__}")
        if len(item) != len(items[0]):
            raise ValueError(f"{op}: items must all have a target or none, got tuples of {len(items[0])} and {len(item)}")
    grids = sorted({(tuple(item[0].shape[-2:]), tuple(item[1].shape[-2:])) for item in items})
    if len(grids) > 1:
        found = ", ".join(f"{y[0]} x {y[1]}" for y, _ in grids)
        raise ValueError(f"{op}: images must have one grid of luma blocks, got {found}; pass size= to the DctDataset")
    if isinstance(items, _Batch) and items.unchanged():
        y, cbcr = items.y, items.cbcr
    else:
        y, cbcr = (torch.utils.data.default_collate([item[plane] for item in items]) for plane in (0, 1))
    if len(items[0]) == 2:
        return y, cbcr
    return y, cbcr, torch.utils.data.default_collate([target for _y, _cbcr, *rest in items for target in rest])


# ---- statistics ------------------------------------------------------------------------------------------------------


def frequency_stats(
    paths: Sequence[Any], *, threads: int | None = None, progress: bool = True, max_images: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each frequency over all blocks of many files, for DctDataset's mean and std.

    Of dequantised coefficients; every block counts once, those at an image's edge included. Sums are exact integers, so the
    result does not depend on the order of the files or the number of threads. The deviation divides by the number of blocks;
    where a frequency never varies, as high ones of coarsely quantised chroma don't, std is 1, so that it can be divided by.
    Colour files must be YCbCr, of one chroma sampling; gray files count for Y only, and without any colour file Cb and Cr
    have mean 0 and std 1.

    Args:
        paths: the files; anything that :func:`jpeg.read` takes. Of a dataset: ``data.paths``.
        threads: for decoding. None: torch.get_num_threads().
        progress: shows a bar where tqdm is installed and standard error is a terminal.
        max_images: reads no more than so many files, evenly spread over paths.

    Returns:
        mean and std, float32 [3, 64] for Y, Cb, Cr in row-major frequency order.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are no files; a file can't be read, is neither YCbCr nor gray, or has another chroma sampling than the
            first: these are JpegErrors that name it.
    """
    op = "frequency_stats"
    if isinstance(paths, (str, bytes, os.PathLike, Tensor)):
        raise TypeError(f"{op}: paths must be a list of files, got {type(paths).__name__}")
    sources = list(paths)
    if not sources:
        raise ValueError(f"{op}: paths must name at least one file, got none")
    chosen = list(range(len(sources)))
    if max_images is not None:
        if check.integer(op, "max_images", max_images) < 1:
            raise ValueError(f"{op}: max_images must be at least 1, got {max_images}")
        count = min(len(sources), max_images)
        chosen = [i * len(sources) // count for i in range(count)]
    if threads is not None and check.integer(op, "threads", threads) < 1:
        raise ValueError(f"{op}: threads must be at least 1, got {threads}")

    at_once = max(16, 2 * (threads or torch.get_num_threads()))  # files read together: they are in memory together, too
    blocks = [0, 0, 0]
    sums, squares = [[0] * 64 for _ in range(3)], [[0] * 64 for _ in range(3)]
    first: tuple[str, str] | None = None  # a colour file and its sampling
    bar = progress_bar(len(chosen), "file") if progress else None
    for start in range(0, len(chosen), at_once):
        part = chosen[start : start + at_once]
        files = read_batch([sources[i] for i in part], threads=threads, on_error="skip")
        for i, read_at_once in zip(part, files, strict=True):
            name = _name(sources[i], i)
            coefs = _read(op, sources[i], i) if read_at_once is None else read_at_once
            _check_color(op, coefs, name)
            if coefs.color_space == "ycbcr":
                sampling = _sampling_name(coefs)
                first = first or (name, sampling)
                if sampling != first[1]:
                    raise JpegError(f"{op}: files must have one chroma sampling, {first[0]} has {first[1]}, {name} {sampling}")
            for c, (component, table) in enumerate(zip(coefs.components, coefs.qtables, strict=True)):
                values = component.reshape(-1, 64).double()
                blocks[c] += values.shape[0]
                # At most 2^30 times 2^22 blocks (jpeg.read's max_pixels): float64 holds these sums exactly.
                total, square = values.sum(0).tolist(), values.square().sum(0).tolist()
                for f, q in enumerate(table.tolist()):
                    sums[c][f] += q * int(total[f])
                    squares[c][f] += q * q * int(square[f])
        if bar is not None:
            bar.update(len(part))
    if bar is not None:
        bar.close()

    mean = torch.zeros(3, 64, dtype=torch.float64, device="cpu")
    std = torch.ones_like(mean)
    for c, n in enumerate(blocks):
        for f in range(64) if n else ():
            mean[c, f] = sums[c][f] / n
            std[c, f] = math.sqrt(Fraction(n * squares[c][f] - sums[c][f] ** 2, n * n)) or 1.0
    return mean.float(), std.float()
