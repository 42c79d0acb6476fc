"""JPEG files to coefficients, to batches and to scores, against libjpeg-turbo itself and against the way through pixels.

Of the same files: quantised coefficients by a bare loop in C over libjpeg-turbo and by other readers of coefficients; RGB
pixels by decoders, which is what a network on pixels needs instead; ready batches; and both kinds of networks, from bytes to
scores. Who is not installed is absent, and the report says so.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib.metadata
import io
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fourfold as ff
import numpy
import torch
import torch.nn.functional as F
from fourfold.reference import blockdct as reference
from torch import Tensor, nn

from . import cases as shapes
from .bench_blockdct_rgb import colours
from .harness import Absent, Call, Case, Contestant, Settings, Tolerance, in_fresh_memory, needed

FAMILY = "jpeg"
EXACT = Tolerance(0.0, 0.0)
# Decoders compute in integers: the transform, chroma between its samples and colour are rounded, one after the other.
LEVELS = Tolerance(4.0, 0.0)
REENCODED = Tolerance(8.0, 0.25)
NORMALISED = Tolerance(1e-4, 1e-5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, in 0..1
NORMALISED_LEVELS = Tolerance(LEVELS.absolute / 255 / min(STD), 1e-5)

File = bytes
Files = Sequence[File]


def check_own_reader() -> None:
    if not ff.has_jpeg():
        raise Absent("fourfold was built without libjpeg")


# --- the files ------------------------------------------------------------------------------------------------------------


@functools.cache
def photographs() -> tuple[Any, ...]:
    """Two, as Pillow's images."""
    image = needed("PIL.Image", "pillow")
    datasets = needed("sklearn.datasets", "scikit-learn")
    return tuple(image.fromarray(datasets.load_sample_image(name)) for name in ("china.jpg", "flower.jpg"))


@functools.cache
def files(photos: shapes.Photos) -> tuple[File, ...]:
    """Crops of the photographs in turn, larger and smaller ones from corner to corner, brought to one size and encoded."""
    made = []
    for i in range(photos.count):
        photo = photographs()[i % 2]
        scale = min(photo.width / photos.width, photo.height / photos.height) * (1 - 0.2 * i / photos.count)
        width, height = photos.width * scale, photos.height * scale
        across, down = (i * 0.618) % 1 * (photo.width - width), (i * 0.382) % 1 * (photo.height - height)
        crop = photo.resize((photos.width, photos.height), box=(across, down, across + width, down + height))
        file = io.BytesIO()
        crop.save(
            file, "JPEG", quality=photos.quality, subsampling=photos.sampling, progressive=photos.progressive, optimize=False
        )
        made.append(file.getvalue())
    return tuple(made)


def tables_of(file: File) -> list[Tensor]:
    """The quantisation tables of Y, Cb and Cr as Pillow reads them, [64] in natural order."""
    with needed("PIL.Image", "pillow").open(io.BytesIO(file)) as image:
        found = [image.quantization[slot] for _, _, _, slot in image.layer]
    return [torch.tensor(table, dtype=torch.float64) for table in found]


def over_threads(work: Callable[[Sequence[Any]], list[Any]], given: Sequence[Any]) -> Call:
    """work(given), shared out over as many Python threads as torch may use."""
    count = torch.get_num_threads()
    if count == 1:
        return lambda: work(given)
    pool = ThreadPoolExecutor(count)
    parts = [given[len(given) * i // count : len(given) * (i + 1) // count] for i in range(count)]
    return lambda: [result for part in pool.map(work, parts) for result in part]


# --- reading coefficients -------------------------------------------------------------------------------------------------

LOOP = """
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

// found[i]: the blocks of file i, component by component, in memory of malloc; what is there from before is freed.
void read_files(int count, const unsigned char *const *data, const size_t *sizes, short **found) {
  for (int i = 0; i < count; ++i) {
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr errors;
    info.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, data[i], sizes[i]);
    jpeg_read_header(&info, TRUE);
    jvirt_barray_ptr *planes = jpeg_read_coefficients(&info);
    size_t blocks = 0;
    for (int c = 0; c < info.num_components; ++c) {
      blocks += (size_t)info.comp_info[c].width_in_blocks * info.comp_info[c].height_in_blocks;
    }
    free(found[i]);
    short *to = found[i] = malloc(blocks * sizeof(JBLOCK));
    for (int c = 0; c < info.num_components; ++c) {
      const size_t size = info.comp_info[c].width_in_blocks * sizeof(JBLOCK);
      for (JDIMENSION row = 0; row < info.comp_info[c].height_in_blocks; ++row, to += size / sizeof(short)) {
        memcpy(to, (*info.mem->access_virt_barray)((j_common_ptr)&info, planes[c], row, 1, FALSE)[0], size);
      }
    }
    jpeg_destroy_decompress(&info);
  }
}
"""


# Appended to the loop: files are opened and read outside the clock, and written as often as wanted.
WRITER = """
static struct jpeg_error_mgr errors;

void *open_file(const unsigned char *data, size_t size, void **planes) {
  struct jpeg_decompress_struct *info = malloc(sizeof *info);
  info->err = jpeg_std_error(&errors);
  jpeg_create_decompress(info);
  jpeg_mem_src(info, data, size);
  jpeg_read_header(info, TRUE);
  *planes = jpeg_read_coefficients(info);
  return info;
}

void close_file(void *info) {
  jpeg_destroy_decompress(info);
  free(info);
}

// written[i]: file i anew, in memory of malloc; what is there from before is freed.
void write_files(int count, void *const *infos, void *const *planes, int optimize, unsigned char **written,
                 unsigned long *sizes) {
  for (int i = 0; i < count; ++i) {
    struct jpeg_compress_struct info;
    struct jpeg_error_mgr own;
    info.err = jpeg_std_error(&own);
    jpeg_create_compress(&info);
    free(written[i]);
    written[i] = NULL;
    sizes[i] = 0;
    jpeg_mem_dest(&info, &written[i], &sizes[i]);
    jpeg_copy_critical_parameters(infos[i], &info);
    info.optimize_coding = optimize;
    jpeg_write_coefficients(&info, planes[i]);
    jpeg_finish_compress(&info);
    jpeg_destroy_compress(&info);
  }
}
"""


@functools.cache
def bare_loop() -> ctypes.CDLL:
    """LOOP and WRITER, compiled now by the system's compiler against the system's libjpeg; Absent where that fails."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Absent("no C compiler found; install one, or name it with CC")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "loop.c", Path(folder) / "loop.so"
        source.write_text(LOOP + WRITER)
        command = [*compiler.split(), "-O3", "-shared", "-fPIC", "-o", str(library), str(source), "-ljpeg"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line or "cannot find" in line), "no message")
            raise Absent(f"{compiler} can't build it ({said.split(':', 3)[-1].strip()}); install libjpeg-turbo's headers")
        loaded = ctypes.CDLL(str(library))
    loaded.open_file.restype = ctypes.c_void_p
    return loaded


class Loop:
    """The bare loop over some files. Its results live until it runs again."""

    def __init__(self, given: Files, grids: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.given, self.grids = given, grids
        self.read = bare_loop().read_files
        count = len(given)
        self.data = (ctypes.c_char_p * count)(*given)
        self.sizes = (ctypes.c_size_t * count)(*map(len, given))
        self.found = (ctypes.POINTER(ctypes.c_int16) * count)()

    def __call__(self) -> Loop:
        self.read(len(self.given), self.data, self.sizes, self.found)
        return self

    def tensors(self) -> list[Tensor]:
        """Copies."""
        planes = []
        for blocks, grids in zip(self.found, self.grids, strict=True):
            total = sum(h * w for h, w in grids)
            whole = torch.from_numpy(numpy.ctypeslib.as_array(blocks, (total, 64)).copy())
            parts = whole.split([h * w for h, w in grids])
            planes += [part.view(h, w, 64) for part, (h, w) in zip(parts, grids, strict=True)]
        return planes


class Album:
    """Files to read."""

    def __init__(self, photos: shapes.Photos, device: torch.device) -> None:
        self.photos, self.files = photos, files(photos)
        across, down = {"4:2:0": (2, 2), "4:4:4": (1, 1)}[photos.sampling]
        luma = (-(-photos.height // 8), -(-photos.width // 8))
        chroma = (-(-photos.height // (8 * down)), -(-photos.width // (8 * across)))
        self.grids, self.cell = [luma, chroma, chroma], (down, across)

    @functools.cached_property
    def paths(self) -> list[str]:
        """The files on disk, as long as this lives, for readers that know paths only."""
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder)
        paths = [folder / f"{i}.jpg" for i in range(len(self.files))]
        for path, file in zip(paths, self.files, strict=True):
            path.write_bytes(file)
        return [str(path) for path in paths]

    @functools.cached_property
    def coefficients(self) -> list[Tensor]:
        """The integers in the files."""
        return self.read(self.files)

    def read(self, given: Files) -> list[Tensor]:
        """The integers in files of this size and sampling as libjpeg says, or where the loop can't be built as we say."""
        try:
            return Loop(given, [self.grids] * len(given))().tensors()
        except Absent:
            return in_blocks([ff.jpeg.read(file) for file in given])

    @functools.cached_property
    def pixels(self) -> list[Tensor]:
        """RGB [H, W, 3] as a decoder means it, in float64: chroma between its samples is interpolated."""
        made = []
        height, width = self.photos.height, self.photos.width
        for i, file in enumerate(self.files):
            planes = []
            for coefs, table in zip(self.coefficients[3 * i : 3 * i + 3], tables_of(file), strict=True):
                planes.append(reference.inverse_transform(coefs * table, 8).add(128).round().clamp(0, 255)[None, None])
            if self.cell != (1, 1):
                samples = (plane[..., : -(-height // 2), : -(-width // 2)] for plane in planes[1:])
                planes[1:] = [F.interpolate(plane, scale_factor=2.0, mode="bilinear") for plane in samples]
            ycc = torch.cat([plane[0, :, :height, :width] for plane in planes])
            ycc[1:] -= 128
            rgb = torch.einsum("kc,chw->hwk", torch.linalg.inv(colours()), ycc)
            made.append(rgb.clamp(0, 255))
        return made


def in_blocks(images: Sequence[Any]) -> list[Tensor]:
    return [component for image in images for component in image.components]


def in_files(p: Album) -> list[Tensor]:
    return [plane.double() for plane in p.coefficients]


def in_pixels(p: Album) -> list[Tensor]:
    return p.pixels


def arrays(results: Sequence[Any]) -> list[Tensor]:
    """Of numpy arrays, several for each file."""
    return [torch.from_numpy(part) for parts in results for part in parts]


def read_one_by_one(p: Album, state: str) -> Call:
    check_own_reader()
    return lambda: [ff.jpeg.read(file) for file in p.files]


def read_at_once(p: Album, state: str) -> Call:
    check_own_reader()
    return lambda: ff.jpeg.read_batch(p.files)


def read_bare(p: Album, state: str) -> Call:
    count = torch.get_num_threads()
    parts = [p.files[len(p.files) * i // count : len(p.files) * (i + 1) // count] for i in range(count)]
    loops = [Loop(part, [p.grids] * len(part)) for part in parts]
    if count == 1:
        return lambda: [loops[0]()]
    pool = ThreadPoolExecutor(count)
    return lambda: list(pool.map(Loop.__call__, loops))  # ctypes lets go of the GIL


def in_loops(loops: Sequence[Loop]) -> list[Tensor]:
    return [plane for loop in loops for plane in loop.tensors()]


def jpeg2dct() -> Any:
    return needed("jpeg2dct.numpy", "jpeg2dct", "; its licence is for non-commercial use")


def jpeg2dct_name() -> str:
    """Of the package: the original is built against the system's libjpeg, the fork brings a newer one."""
    try:
        importlib.metadata.version("jpeg2dct-numpy")
    except importlib.metadata.PackageNotFoundError:
        return "jpeg2dct"
    return "jpeg2dct-numpy"


def read_jpeg2dct(p: Album, state: str) -> Call:
    if p.photos.sampling != "4:2:0":
        raise Absent(f"encodes {p.photos.sampling} files anew and gives other numbers")
    loads = jpeg2dct().loads
    return over_threads(lambda part: [loads(file, normalized=False) for file in part], p.files)


def read_jpeglib(p: Album, state: str) -> Call:
    """From paths: it takes nothing else."""
    read_dct = needed("jpeglib", "jpeglib").read_dct
    if torch.get_num_threads() > 1:
        raise Absent("jpeglib is not safe in threads: it fails, or ends the process")

    def planes(path: str) -> tuple[Any, ...]:
        image = read_dct(path)
        return image.Y, image.Cb, image.Cr

    return over_threads(lambda part: [planes(path) for path in part], p.paths)


def in_jpeglib(results: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """Its blocks are [h, w, 8, 8]."""
    return [plane.flatten(2) for plane in arrays(results)]


def decode_pillow(p: Album, state: str) -> Call:
    image = needed("PIL.Image", "pillow")
    return over_threads(lambda part: [numpy.asarray(image.open(io.BytesIO(file))) for file in part], p.files)


def decode_simplejpeg(p: Album, state: str) -> Call:
    decode = needed("simplejpeg", "simplejpeg").decode_jpeg
    return over_threads(lambda part: [decode(file) for file in part], p.files)


def copies(results: Sequence[Any]) -> list[Tensor]:
    return [torch.tensor(result) for result in results]  # Pillow's arrays are read-only


BARE = Contestant("libjpeg-turbo in a C loop", read_bare, tensors=in_loops)
READERS = (Contestant(jpeg2dct_name(), read_jpeg2dct, tensors=arrays), Contestant("jpeglib", read_jpeglib, tensors=in_jpeglib))
DECODERS = (
    Contestant("simplejpeg to RGB", decode_simplejpeg, LEVELS, in_pixels, copies),
    Contestant("Pillow to RGB", decode_pillow, LEVELS, in_pixels, copies),
)


def _reading(photos: shapes.Photos, *, batch: bool = False, quick: bool = False) -> Case:
    one_by_one = Contestant("fourfold", read_one_by_one, tensors=in_blocks)
    rivals = (BARE, *READERS, *DECODERS)
    if batch:
        ours = Contestant("fourfold", read_at_once, tensors=in_blocks)
        rivals = (BARE, Contestant("jpeg.read, one by one", read_one_by_one, tensors=in_blocks), *rivals[1:])
    return Case(
        family=FAMILY,
        op="jpeg.read_batch" if batch else "jpeg.read",
        label=str(photos),
        problem=functools.partial(Album, photos),
        reference=in_files,
        ours=ours if batch else one_by_one,
        rivals=rivals,
        tolerance=EXACT,
        state="heap",
        handles=(photos.count, "images"),
        threaded=batch,
        source=photos.source,
        quick=quick,
    )


def _readings(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for shape in shapes.random_images(settings.seed):
            photos = shapes.Photos(*shape.size[2:], 90, source=shape.source)
            yield _reading(photos, quick=True)
            yield _reading(photos._replace(count=shapes.BATCH), batch=True, quick=True)
        return
    for photos in shapes.PHOTOS:
        usual = photos.quality == 90 and photos.sampling == "4:2:0" and not photos.progressive
        yield _reading(photos, quick=usual)
    for photos in shapes.PHOTOS:
        small = photos.width == 224
        usual = photos.quality == 90 and photos.sampling == "4:2:0" and not photos.progressive
        if usual:
            yield _reading(photos._replace(count=shapes.BATCH), batch=True, quick=small)
            yield in_fresh_memory(_reading(photos._replace(count=shapes.BATCH), batch=True))


# --- writing coefficients -------------------------------------------------------------------------------------------------


class Shelf(Album):
    """Files read already, to be written again: their coefficients as each library holds them."""

    def __init__(self, photos: shapes.Photos, optimize: bool, device: torch.device) -> None:
        super().__init__(photos, device)
        self.optimize = optimize


Written = tuple[Shelf, Files]


def coefficients_written(result: Written) -> list[Tensor]:
    shelf, written = result
    return shelf.read(written)


def write_ours(p: Shelf, state: str) -> Call:
    check_own_reader()
    images = [ff.jpeg.read(file) for file in p.files]
    return lambda: (p, [ff.jpeg.write(image, optimize=p.optimize) for image in images])


class Writer:
    """libjpeg's own structures of some files, from which it writes them; lives as long as its results are wanted."""

    def __init__(self, given: Files, optimize: bool) -> None:
        self.library, self.given, self.optimize = bare_loop(), given, optimize
        count = len(given)
        self.infos, self.planes = (ctypes.c_void_p * count)(), (ctypes.c_void_p * count)()
        self.written, self.sizes = (ctypes.c_void_p * count)(), (ctypes.c_ulong * count)()
        for i, file in enumerate(given):
            slot = ctypes.c_void_p()
            self.infos[i] = self.library.open_file(file, ctypes.c_size_t(len(file)), ctypes.byref(slot))
            self.planes[i] = slot.value
        weakref.finalize(self, _close, self.library, list(self.infos))

    def __call__(self) -> Writer:
        self.library.write_files(len(self.given), self.infos, self.planes, int(self.optimize), self.written, self.sizes)
        return self

    def files(self) -> list[File]:
        """Copies."""
        return [ctypes.string_at(place, size) for place, size in zip(self.written, self.sizes, strict=True)]


def _close(library: ctypes.CDLL, infos: list[int]) -> None:
    for info in infos:
        library.close_file(ctypes.c_void_p(info))


def write_bare(p: Shelf, state: str) -> Call:
    writer = Writer(p.files, p.optimize)
    return lambda: (p, writer())


def of_writer(result: tuple[Shelf, Writer]) -> list[Tensor]:
    shelf, writer = result
    return shelf.read(writer.files())


def write_jpeglib(p: Shelf, state: str) -> Call:
    """To paths: it takes nothing else."""
    images = [needed("jpeglib", "jpeglib").read_dct(path) for path in p.paths]
    for image in images:
        image.load()  # it reads a file when it is first asked
    targets = [f"{path}.written" for path in p.paths]
    flags = ["+OPTIMIZE_CODING" if p.optimize else "-OPTIMIZE_CODING"]

    def call() -> tuple[Shelf, list[str]]:
        for image, target in zip(images, targets, strict=True):
            image.write_dct(target, flags=flags)
        return p, targets

    return call


def of_paths(result: tuple[Shelf, list[str]]) -> list[Tensor]:
    shelf, paths = result
    return shelf.read([Path(path).read_bytes() for path in paths])


def encode_simplejpeg(p: Shelf, state: str) -> Call:
    """From pixels, as one does without coefficients."""
    jpeg = needed("simplejpeg", "simplejpeg")
    images = [jpeg.decode_jpeg(file) for file in p.files]
    sampling = p.photos.sampling.replace(":", "")
    return lambda: (
        p,
        [jpeg.encode_jpeg(image, quality=p.photos.quality, colorsubsampling=sampling) for image in images],
    )


def encode_pillow(p: Shelf, state: str) -> Call:
    """From pixels, as one does without coefficients."""
    module = needed("PIL.Image", "pillow")
    images = [module.open(io.BytesIO(file)).convert("RGB") for file in p.files]

    def encode(image: Any) -> File:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=p.photos.quality, subsampling=p.photos.sampling, optimize=p.optimize)
        return file.getvalue()

    return lambda: (p, [encode(image) for image in images])


def _writing(photos: shapes.Photos, optimize: bool, *, quick: bool = False) -> Case:
    return Case(
        family=FAMILY,
        op="jpeg.write",
        label=f"{photos}, {'own Huffman tables' if optimize else 'standard Huffman tables'}",
        problem=functools.partial(Shelf, photos, optimize),
        reference=in_files,
        ours=Contestant("fourfold", write_ours, tensors=coefficients_written),
        rivals=(
            Contestant("libjpeg-turbo in a C loop", write_bare, tensors=of_writer),
            Contestant("jpeglib", write_jpeglib, tensors=of_paths),
            # What was decoded is rounded, and its chroma brought to full size and back: coefficients differ by a few steps.
            Contestant("simplejpeg from RGB", encode_simplejpeg, REENCODED, tensors=coefficients_written),
            Contestant("Pillow from RGB", encode_pillow, REENCODED, tensors=coefficients_written),
        ),
        tolerance=EXACT,
        state="heap",
        handles=(photos.count, "images"),
        threaded=False,
        source=photos.source,
        quick=quick,
    )


def _writings(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        return
    for photos in shapes.PHOTOS:
        if photos.quality == 90 and photos.sampling == "4:2:0" and not photos.progressive:
            for optimize in (True, False):
                yield _writing(photos, optimize, quick=photos.width == 224 and optimize)


# --- statistics of many files ---------------------------------------------------------------------------------------------


def stats_ours(p: Album, state: str) -> Call:
    check_own_reader()
    return lambda: ff.jpeg.frequency_stats(p.files, threads=torch.get_num_threads(), progress=False)


def _stats_of(read: Callable[[], Sequence[Sequence[Tensor]]], tables: Sequence[Sequence[Tensor]]) -> Call:
    """read() gives each file's components [h, w, 64]; sums in float64, file by file."""

    def call() -> tuple[Tensor, Tensor]:
        total, squares, count = torch.zeros(3, 64).double(), torch.zeros(3, 64).double(), torch.zeros(3, 1).double()
        for components, of_file in zip(read(), tables, strict=True):
            for c, (component, table) in enumerate(zip(components, of_file, strict=True)):
                values = component.reshape(-1, 64) * table
                total[c] += values.sum(0)
                squares[c] += values.square().sum(0)
                count[c] += len(values)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        return mean, torch.where(std == 0, 1.0, std)

    return call


def stats_one_by_one(p: Album, state: str) -> Call:
    check_own_reader()
    return _stats_of(lambda: [ff.jpeg.read(file).components for file in p.files], list(map(tables_of, p.files)))


def stats_jpeglib(p: Album, state: str) -> Call:
    read = read_jpeglib(p, state)

    def components() -> list[list[Tensor]]:
        return [[torch.from_numpy(plane).flatten(2) for plane in planes] for planes in read()]

    return _stats_of(components, list(map(tables_of, p.files)))


def exact_stats(p: Album) -> tuple[Tensor, Tensor]:
    means, stds = [], []
    tables = list(map(tables_of, p.files))
    for c in range(3):
        blocks = [p.coefficients[3 * i + c].reshape(-1, 64) * table[c] for i, table in enumerate(tables)]
        std, mean = torch.std_mean(torch.cat(blocks), 0, correction=0)
        means.append(mean)
        stds.append(torch.where(std == 0, 1.0, std))
    return torch.stack(means), torch.stack(stds)


def _stats(photos: shapes.Photos, *, quick: bool = False) -> Case:
    return Case(
        family=FAMILY,
        op="jpeg.frequency_stats",
        label=str(photos),
        problem=functools.partial(Album, photos),
        reference=exact_stats,
        ours=Contestant("fourfold", stats_ours),
        rivals=(
            Contestant("jpeg.read, one by one, then torch", stats_one_by_one),
            Contestant("jpeglib, then torch", stats_jpeglib),
        ),
        tolerance=Tolerance(1e-3, 1e-5),  # the result is float32, of values up to 1000
        state="heap",
        handles=(photos.count, "images"),
        source=photos.source,
        quick=quick,
    )


# --- ready batches --------------------------------------------------------------------------------------------------------


class Pipeline(Album):
    """Files of one size, on their way to a network, and the statistics that normalise them."""

    def __init__(self, photos: shapes.Photos, device: torch.device) -> None:
        super().__init__(photos, device)
        check_own_reader()
        mean, std = ff.jpeg.frequency_stats(self.files, progress=False)
        self.mean, self.std = mean, std.clamp(min=1)
        scale = 255 * torch.tensor(STD)
        self.gain, self.offset = 1 / scale, -torch.tensor(MEAN) / torch.tensor(STD)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.files), self.photos.height, self.photos.width, 3


def load_ours(p: Pipeline, state: str) -> Call:
    """As a DataLoader with collate does."""
    data = ff.jpeg.DctDataset(p.files, mean=p.mean, std=p.std)
    indices = list(range(len(p.files)))
    return lambda: ff.jpeg.collate(data.__getitems__(indices))


def load_jpeg2dct(p: Pipeline, state: str) -> Call:
    """Dequantised by the library, then stacked, normalised and made planar by torch."""
    loads = jpeg2dct().loads
    read = over_threads(lambda part: [loads(file) for file in part], p.files)

    def call() -> tuple[Tensor, Tensor]:
        planes = []
        for c, results in enumerate(zip(*read(), strict=True)):
            coefs = torch.from_numpy(numpy.stack(results)).float()
            planes.append(coefs.sub_(p.mean[c]).div_(p.std[c]).permute(0, 3, 1, 2))
        return planes[0].contiguous(), torch.cat(planes[1:], 1).contiguous()

    return call


BY_BATCH, BY_IMAGE, CHANNELS_LAST = "whole batch", "image by image", "image by image, channels_last"


def _normalised(p: Pipeline, decode: Callable[[], Tensor], how: str) -> Call:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] as the chain is mostly written, or in an image's size of memory, in place."""
    b, height, width, _ = p.shape
    if how == BY_BATCH:
        mean, std = (torch.tensor(t).view(3, 1, 1) for t in (MEAN, STD))

        def chain() -> Tensor:
            return ((decode().permute(0, 3, 1, 2).float() / 255 - mean) / std).contiguous()

        return chain
    memory_format = torch.channels_last if how == CHANNELS_LAST else torch.contiguous_format
    # In full: a factor per channel, where channels are innermost, is no vector arithmetic to torch.
    gain, offset = (t.expand(1, height, width, 3).permute(0, 3, 1, 2) for t in (p.gain, p.offset))
    gain, offset = (t.contiguous(memory_format=memory_format)[0] for t in (gain, offset))

    def call() -> Tensor:
        batch = decode().permute(0, 3, 1, 2)
        out = torch.empty((b, 3, height, width), memory_format=memory_format)
        for levels, image in zip(batch, out, strict=True):
            image.copy_(levels).mul_(gain).add_(offset)
        return out

    return call


def load_pillow(how: str, p: Pipeline, state: str) -> Call:
    image = needed("PIL.Image", "pillow")
    decode = over_threads(lambda part: [numpy.asarray(image.open(io.BytesIO(file))) for file in part], p.files)
    return _normalised(p, lambda: torch.from_numpy(numpy.stack(decode())), how)


def load_simplejpeg(how: str, p: Pipeline, state: str) -> Call:
    """Decoded into the batch's own memory."""
    decode = needed("simplejpeg", "simplejpeg").decode_jpeg
    count = torch.get_num_threads()
    parts = [range(len(p.files))[i::count] for i in range(count)]
    pool = ThreadPoolExecutor(count) if count > 1 else None

    def batch() -> Tensor:
        levels = torch.empty(p.shape, dtype=torch.uint8)
        rows = levels.numpy()

        def into_rows(part: Sequence[int]) -> None:
            for i in part:
                decode(p.files[i], buffer=rows[i])

        for _ in pool.map(into_rows, parts) if pool else map(into_rows, parts):
            pass
        return levels

    return _normalised(p, batch, how)


def coefficient_batch(p: Pipeline) -> tuple[Tensor, Tensor]:
    """Normalised and planar, in float64."""
    planes: list[list[Tensor]] = [[], [], []]
    for i, file in enumerate(p.files):
        for c, table in enumerate(tables_of(file)):
            values = (p.coefficients[3 * i + c] * table - p.mean[c].double()) / p.std[c].double()
            planes[c].append(values.movedim(-1, 0))
    y, cb, cr = (torch.stack(plane) for plane in planes)
    return y, torch.cat([cb, cr], 1)


def pixel_batch(p: Pipeline) -> Tensor:
    """Normalised, in float64."""
    return torch.stack(p.pixels).permute(0, 3, 1, 2) * p.gain.double().view(3, 1, 1) + p.offset.double().view(3, 1, 1)


def _pipeline(settings: Settings) -> Case:
    photos = next(p for p in shapes.PHOTOS if p.width == 224)._replace(count=shapes.BATCH)
    by_pixels = [
        Contestant(f"{name} to RGB, {how}", functools.partial(load, how), NORMALISED_LEVELS, pixel_batch)
        for name, load in (("simplejpeg", load_simplejpeg), ("Pillow", load_pillow))
        for how in (CHANNELS_LAST, BY_IMAGE, BY_BATCH)
        if how != CHANNELS_LAST or not settings.quick
    ]
    return Case(
        family=FAMILY,
        op="jpeg.DctDataset",
        label=f"{photos}, normalised float32 batch",
        problem=functools.partial(Pipeline, photos),
        reference=coefficient_batch,
        ours=Contestant("fourfold", load_ours),
        rivals=(Contestant(jpeg2dct_name(), load_jpeg2dct), *by_pixels),
        tolerance=NORMALISED,
        state="heap",
        handles=(photos.count, "images"),
        source=photos.source,
        quick=True,
    )


# --- networks -------------------------------------------------------------------------------------------------------------

VARIANT = "late_concat_rfa_thinner"
GMAC = 3.98  # of the variant, an image of 224 x 224
MODES = ("eager", "batch norms folded", "compiled")
# Of scores. In bfloat16 the roundings of 50 layers add up to a tenth of them, and the worst of 8000 is off by four times that.
SCORES = {torch.float32: Tolerance(1e-3, 0.0, of_rms=True), torch.bfloat16: Tolerance(0.5, 0.0, of_rms=True)}


class Networks(Pipeline):
    """A network on coefficients and one on pixels, their weights random, their batch norms fitted to the batch."""

    def __init__(self, photos: shapes.Photos, dtype: torch.dtype, mode: str, device: torch.device) -> None:
        super().__init__(photos, device)
        self.dtype, self.mode, self.device = dtype, mode, device
        self.exact = _fitted(photos, device)
        self.on_coefficients, self.on_pixels = (self._prepared(network) for network in self.exact)

    def _prepared(self, network: nn.Module) -> nn.Module:
        network = copy.deepcopy(network)
        if self.mode == "batch norms folded":
            fold_batch_norms(network)
        return network.to(self.dtype, memory_format=torch.channels_last)

    def laid(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """As the networks want them."""
        return tuple(part.to(self.device, self.dtype, memory_format=torch.channels_last) for part in batch)

    def run(self, network: nn.Module, batch: Call) -> Call:
        """network(*batch()), compiled where p's mode wants it."""
        run: Callable[..., Tensor] = network
        if self.mode == "compiled":
            run = torch.compile(network, dynamic=False)

        def call() -> Tensor:
            with torch.no_grad():
                return run(*batch())

        if self.mode == "compiled" and self.device.type == "cpu":
            from torch._inductor import config

            with config.patch(freezing=True):  # folds the batch norms, and lets inductor pack the weights
                call()
        return call


@functools.cache
def _fitted(photos: shapes.Photos, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """In float32, in eval mode. Without fitted batch norms a random network's activations grow from block to block."""
    p = Pipeline(photos, device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = ff.models.dct_resnet50(VARIANT), ff.models.resnet50(stride_in_1x1=True)
    for network, batch in zip(networks, (coefficients_of(p), (decoded(p),)), strict=True):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the statistics of this batch alone
        with torch.no_grad():
            network.to(device)(*(part.to(device, torch.float32) for part in batch))
        network.eval()
    return networks


def fold_batch_norms(network: nn.Module) -> None:
    """Puts each batch norm that follows a convolution into its weights: conv1 and bn1, or neighbours in a Sequential."""
    for module in list(network.modules()):
        children = dict(module.named_children())
        for name, norm in children.items():
            before = str(int(name) - 1) if name.isdigit() else name.replace("bn", "conv")
            conv = children.get(before)
            if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d):
                setattr(module, before, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(module, name, nn.Identity())


def coefficients_of(p: Pipeline) -> tuple[Tensor, Tensor]:
    """Dequantised and planar, not normalised: the network's own batch norms do that. In float64."""
    y, cbcr = coefficient_batch(p)
    mean, std = (t.double() for t in (p.mean, p.std))
    chroma = [part.flatten().view(-1, 1, 1) for part in (std[1:], mean[1:])]
    return y * std[0].view(-1, 1, 1) + mean[0].view(-1, 1, 1), cbcr * chroma[0] + chroma[1]


def score_ours(p: Networks, state: str) -> Call:
    data = ff.jpeg.DctDataset(p.files, dtype=p.dtype)
    indices = list(range(len(p.files)))
    return p.run(p.on_coefficients, lambda: p.laid(*ff.jpeg.collate(data.__getitems__(indices))))


def score_simplejpeg(p: Networks, state: str) -> Call:
    load = load_simplejpeg(CHANNELS_LAST, p, state)
    return p.run(p.on_pixels, lambda: p.laid(load()))


def score_pillow(p: Networks, state: str) -> Call:
    load = load_pillow(CHANNELS_LAST, p, state)
    return p.run(p.on_pixels, lambda: p.laid(load()))


def score_ready_coefficients(p: Networks, state: str) -> Call:
    batch = p.laid(*coefficients_of(p))
    return p.run(p.on_coefficients, lambda: batch)


def score_ready_pixels(p: Networks, state: str) -> Call:
    batch = p.laid(decoded(p))
    return p.run(p.on_pixels, lambda: batch)


def decoded(p: Pipeline) -> Tensor:
    """Normalised pixels as Pillow gives them: the level more or less that pixel_batch allows would show in the scores."""
    return load_pillow(CHANNELS_LAST, p, "heap")().double()


def _scores(p: Networks, network: nn.Module, *batch: Tensor) -> Tensor:
    exact = copy.deepcopy(network).double()
    with torch.no_grad():
        return exact(*(part.to(p.device) for part in batch))


def coefficient_scores(p: Networks) -> Tensor:
    return _scores(p, p.exact[0], *coefficients_of(p))


def pixel_scores(p: Networks) -> Tensor:
    return _scores(p, p.exact[1], decoded(p))


def _network(settings: Settings, count: int, dtype: torch.dtype, mode: str, from_bytes: bool, *, quick: bool = False) -> Case:
    photos = next(p for p in shapes.PHOTOS if p.width == 224)._replace(count=count)
    rivals = (Contestant("resnet50", score_ready_pixels, None, pixel_scores),)
    if from_bytes:
        rivals = (
            Contestant("resnet50 by simplejpeg", score_simplejpeg, None, pixel_scores),
            Contestant("resnet50 by Pillow", score_pillow, None, pixel_scores),
        )
    what = "bytes to scores" if from_bytes else "batch to scores"
    return Case(
        family=FAMILY,
        op="models.dct_resnet50",
        label=f"{VARIANT}, {count} of 224x224, {what}, {str(dtype).removeprefix('torch.')} channels_last {mode}",
        problem=functools.partial(Networks, photos, dtype, mode),
        reference=coefficient_scores,
        ours=Contestant("fourfold", score_ours if from_bytes else score_ready_coefficients),
        rivals=rivals,
        tolerance=SCORES[dtype],
        state="heap",
        flops=int(2e9 * GMAC * count),
        handles=(count, "images"),
        source=photos.source,
        quick=quick,
    )


def _networks(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        return
    if settings.quick:
        yield _network(settings, 1, torch.float32, "eager", True, quick=True)
        return
    for dtype in (torch.float32, torch.bfloat16):
        for mode in MODES if settings.compiles else MODES[:2]:
            for from_bytes in (True, False):
                yield _network(settings, 8, dtype, mode, from_bytes)


# --- what the harness asks for --------------------------------------------------------------------------------------------


def cases(settings: Settings) -> Iterator[Case]:
    if settings.device == "cpu":  # files are the processor's work
        yield from _readings(settings)
        yield from _writings(settings)
        if not settings.random_shapes:
            yield _stats(next(p for p in shapes.PHOTOS if p.width == 224)._replace(count=shapes.BATCH), quick=True)
            yield _pipeline(settings)
            yield in_fresh_memory(_pipeline(settings))
    yield from _networks(settings)


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
