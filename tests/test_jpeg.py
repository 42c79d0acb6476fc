"""ff.jpeg's files: against a decoder of our own in Python, against Pillow's pixels, and against broken and hostile bytes.

The decoder below is the definition (T.81, sequential Huffman coding) written out. What it can't read is compared with what it
can: Pillow's progressive with Pillow's baseline of one picture, and what write makes in every coding with what it was given.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import math
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import battery
import fourfold as ff
import numpy as np
import pytest
import torch
from fourfold import _load, jpeg
from fourfold.jpeg import JpegCoefficients, JpegError, files
from PIL import Image
from torch.utils.data import DataLoader, Dataset

pytestmark = pytest.mark.skipif(not ff.has_jpeg(), reason="built without libjpeg")

ZIGZAG = ff.zigzag().tolist()
BROKEN = " (see docs/jpeg.md#broken-files)"  # how messages about a file's contents end
Grid = tuple[int, int]


# ---- files to read ---------------------------------------------------------------------------------------------------


def photo(height: int, width: int, channels: int = 3) -> np.ndarray[Any, Any]:
    """Smooth shapes, edges and some noise."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width] / 16
    planes = [np.sin(x + k) * np.cos(y * (k + 1) / 2) * 80 + 128 + 40 * (x + y > 2 + k) for k in range(channels)]
    pixels = np.stack(planes, -1) + rng.normal(0, 8, (height, width, channels))
    return pixels.clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray[Any, Any], mode: str | None = None, **options: Any) -> bytes:
    """Pillow's JPEG file of the pixels."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if mode is not None:
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture)


def made(
    size: Grid, sampling: tuple[Grid, ...] = ((1, 1),), color_space: str = "gray", *, seed: int = 0, spread: int = 40
) -> JpegCoefficients:
    """Random sparse coefficients for this size and sampling."""
    rng = np.random.default_rng(seed)
    h_max, v_max = (max(f) for f in zip(*sampling, strict=True))
    components = []
    for h, v in sampling:
        rows, cols = (math.ceil(math.ceil(n * f / m) / 8) for n, f, m in ((size[0], v, v_max), (size[1], h, h_max)))
        blocks = rng.integers(-spread, spread + 1, (rows, cols, 64)) * (rng.random((rows, cols, 64)) < 0.2)
        blocks[..., 0] = rng.integers(-1000, 1000, (rows, cols))
        components.append(torch.from_numpy(blocks.astype(np.int16)))
    tables = [torch.from_numpy(rng.integers(1, 256, 64).astype(np.int32)) for _ in range(2)]
    return JpegCoefficients(tuple(components), tuple(tables[c > 0] for c in range(len(sampling))), size, sampling, color_space)


def written(coefs: JpegCoefficients, **options: Any) -> bytes:
    """What jpeg.write gives, with the codings that it does not offer: arithmetic=, restart_interval=."""
    options = {"progressive": False, "optimize": True, **options}
    arrays = ([t.numpy() for t in tensors] for tensors in (coefs.components, coefs.qtables))
    data = _load.jpeg.write(*arrays, coefs.size, coefs.sampling, files.COLOR_SPACES.index(coefs.color_space), **options)
    assert isinstance(data, bytes), data
    return data


def assert_same(got: JpegCoefficients, want: JpegCoefficients) -> None:
    assert (got.size, got.sampling, got.color_space) == (want.size, want.sampling, want.color_space)
    for mine, other in zip((*got.components, *got.qtables), (*want.components, *want.qtables), strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape and torch.equal(mine, other)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment, compressed data with the scan it belongs to."""
    at = 2
    while data[at + 1] != 0xD9:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            while data[end] != 0xFF or data[end + 1] == 0 or 0xD0 <= data[end + 1] <= 0xD7:
                end += 1
        yield marker, at, end
        at = end


def frame_of(data: bytes) -> int:
    """Where the frame header is."""
    return next(at for marker, at, _ in segments(data) if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC))


def without(data: bytes, marker: int) -> bytes:
    for _, at, end in reversed([s for s in segments(data) if s[0] == marker]):
        data = data[:at] + data[end:]
    return data


def patched(data: bytes, at: int, *values: int) -> bytes:
    return data[:at] + bytes(values) + data[at + len(values) :]


# ---- the decoder that all of it is compared with ---------------------------------------------------------------------


class Bits:
    def __init__(self, data: bytes) -> None:
        self.bits = "".join(f"{b:08b}" for b in data.replace(b"\xff\x00", b"\xff"))
        self.at = 0

    def number(self, n: int) -> int:
        """The n bits that follow, as the signed number that T.81's EXTEND makes of them."""
        taken = self.bits[self.at : self.at + n]
        assert len(taken) == n, "the data ends early"
        self.at += n
        return 0 if n == 0 else int(taken, 2) - (0 if taken[0] == "1" else 2**n - 1)

    def symbol(self, codes: dict[str, int]) -> int:
        for n in range(1, 17):
            code = self.bits[self.at : self.at + n]
            if code in codes:
                self.at += n
                return codes[code]
        raise AssertionError("no such code")


def decoded(data: bytes) -> JpegCoefficients:
    """Sequential Huffman-coded files, by the book."""
    tables: dict[int, torch.Tensor] = {}
    codes: dict[int, dict[str, int]] = {}
    interval = 0
    for marker, at, end in segments(data):
        body = data[at + 4 : end]
        if marker == 0xDB:
            while body:
                step = 1 + (body[0] >> 4)
                table = torch.zeros(64, dtype=torch.int32)
                table[ZIGZAG] = torch.tensor(
                    [int.from_bytes(body[1 + step * k : 1 + step * (k + 1)], "big") for k in range(64)], dtype=torch.int32
                )
                tables[body[0] & 15] = table
                body = body[1 + 64 * step :]
        elif marker == 0xC4:
            while body:
                symbols, code, book = iter(body[17:]), 0, {}
                for n in range(1, 17):
                    for _ in range(body[n]):
                        book[f"{code:0{n}b}"] = next(symbols)
                        code += 1
                    code <<= 1
                codes[body[0]] = book
                body = body[17 + len(book) :]
        elif marker == 0xDD:
            interval = int.from_bytes(body[:2], "big")
        elif marker in (0xC0, 0xC1):
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            ids, factors, numbers = zip(*[tuple(body[6 + 3 * c : 9 + 3 * c]) for c in range(body[5])], strict=True)
            sampling = tuple((f >> 4, f & 15) for f in factors)
            h_max, v_max = (max(f) for f in zip(*sampling, strict=True))
            grids = [(-(-height * v // (8 * v_max)), -(-width * h // (8 * h_max))) for h, v in sampling]
            mcus = (-(-height // (8 * v_max)), -(-width // (8 * h_max)))
            # Room for the blocks that only fill up MCUs.
            planes = [np.zeros((mcus[0] * v + v, mcus[1] * h + h, 64), np.int16) for h, v in sampling]
        elif marker == 0xDA:
            scan = [(ids.index(body[1 + 2 * k]), body[2 + 2 * k]) for k in range(body[0])]
            compressed = data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") : end]
            alone = len(scan) == 1
            shape = grids[scan[0][0]] if alone else mcus
            pieces = [[]]
            for i, mcu in enumerate(itertools.product(*map(range, shape))):
                if interval and i and i % interval == 0:
                    pieces.append([])
                pieces[-1].append(mcu)
            for n, piece in enumerate(pieces):
                length = compressed.find(bytes([0xFF, 0xD0 + n % 8])) if n + 1 < len(pieces) else len(compressed)
                bits, compressed = Bits(compressed[:length]), compressed[length + 2 :]
                before = dict.fromkeys(range(4), 0)
                for row, col in piece:
                    for c, numbers_of in scan:
                        h, v = (1, 1) if alone else sampling[c]
                        for i, j in itertools.product(range(v), range(h)):
                            block = planes[c][row * v + i, col * h + j]
                            before[c] += bits.number(bits.symbol(codes[numbers_of >> 4]))
                            block[0] = before[c]
                            k = 1
                            while k < 64:
                                run, size = divmod(bits.symbol(codes[16 + (numbers_of & 15)]), 16)
                                if (run, size) == (0, 0):
                                    break
                                k += run
                                if size:
                                    block[ZIGZAG[k]] = bits.number(size)
                                k += 1
    components = tuple(torch.from_numpy(p[:h, :w].copy()) for p, (h, w) in zip(planes, grids, strict=True))
    # The markers of other color spaces are read by none of the files that come here.
    space = {1: "gray", 3: "ycbcr", 4: "cmyk"}[len(components)]
    return JpegCoefficients(components, tuple(tables[n] for n in numbers), (height, width), sampling, space)


# ---- reading ---------------------------------------------------------------------------------------------------------

PILLOW = [
    {"quality": 30},
    {"quality": 90, "subsampling": "4:2:2"},
    {"quality": 95, "subsampling": "4:4:4", "optimize": True},
    {"quality": 75, "restart_marker_blocks": 3},
    {"quality": 60, "restart_marker_rows": 1, "subsampling": "4:2:2"},
]


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 17), (33, 47), (64, 16)], ids=str)
@pytest.mark.parametrize("options", PILLOW, ids=str)
def test_read_baseline(size: Grid, options: dict[str, Any]) -> None:
    data = encoded(photo(*size), **options)
    got = jpeg.read(data)
    assert_same(got, decoded(data))
    assert not got.progressive and got.warnings == 0
    assert all(c.is_contiguous() and c.data_ptr() % 64 == 0 for c in got.components)


@pytest.mark.parametrize("size", [(1, 1), (17, 9), (50, 71)], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_read_progressive(size: Grid, subsampling: str) -> None:
    options = {"quality": 85, "subsampling": subsampling}
    got = jpeg.read(encoded(photo(*size), progressive=True, **options))
    assert got.progressive
    assert_same(got, decoded(encoded(photo(*size), **options)))


@pytest.mark.parametrize("size", [(1, 1), (25, 18)], ids=str)
@pytest.mark.parametrize(("mode", "space"), [("L", "gray"), ("CMYK", "cmyk"), ("RGB", "ycbcr")])
def test_read_color_spaces(size: Grid, mode: str, space: str) -> None:
    data = encoded(photo(*size), mode)
    got = jpeg.read(data)
    assert got.color_space == space
    assert_same(got, decoded(data))


def test_pixels() -> None:
    """The coefficients mean what the format says: their inverse transform is Pillow's picture, to its rounding."""
    data = encoded(photo(29, 43, 1), quality=90)
    coefs = jpeg.read(data)
    blocks = (coefs.components[0] * coefs.qtables[0])[None, None].float()
    picture = ff.block_idct(blocks, layout="blocks", shift=-128.0, size=coefs.size)[0, 0]
    assert (picture.clip(0, 255) - torch.from_numpy(pixels_of(data).copy())).abs().max() < 1.01


SAMPLINGS = [
    ((1, 1), (1, 1), (1, 1)),
    ((1, 2), (1, 1), (1, 1)),  # 4:4:0
    ((4, 1), (1, 1), (1, 1)),  # 4:1:1
    ((4, 2), (1, 1), (1, 1)),  # 4:1:0
    ((3, 1), (1, 1), (1, 1)),
    ((3, 2), (2, 1), (1, 1)),  # neither divides the other
    ((2, 3), (1, 2), (1, 1)),
    ((1, 1), (2, 2), (1, 3)),  # luma is not the largest
    ((4, 4), (1, 1), (3, 2)),  # too many blocks for one MCU: scans of one component each
    ((4, 4), (3, 3), (4, 4)),
]


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (50, 39)], ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_samplings(size: Grid, sampling: tuple[Grid, ...]) -> None:
    coefs = made(size, sampling, "ycbcr")
    for options in ({}, {"optimize": False}, {"restart_interval": 2}):
        data = written(coefs, **options)
        assert_same(decoded(data), coefs)
        assert_same(jpeg.read(data), coefs)
    for options in ({"progressive": True}, {"progressive": True, "restart_interval": 3}, {"arithmetic": True},
                    {"arithmetic": True, "progressive": True}):  # fmt: skip
        got = jpeg.read(written(coefs, **options))
        assert_same(got, coefs)
        assert got.progressive == options.get("progressive", False)


@pytest.mark.parametrize("sampling", [(1, 1), (2, 2), (3, 4)], ids=str)
def test_one_component_of_any_sampling(sampling: Grid) -> None:
    """Its factors say nothing, but are kept."""
    coefs = made((19, 35), (sampling,))
    for progressive in (False, True):
        assert_same(jpeg.read(jpeg.write(coefs, progressive=progressive)), coefs)
    assert_same(decoded(jpeg.write(coefs)), coefs)


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (21, 67)], ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": False}], ids=str)
def test_write_is_lossless(size: Grid, mode: str, options: dict[str, Any]) -> None:
    data = encoded(photo(*size), mode, quality=80)
    coefs = jpeg.read(data)
    again = jpeg.write(coefs, **options)
    got = jpeg.read(again)
    assert_same(got, coefs)
    assert got.progressive == options.get("progressive", False) and got.warnings == 0
    assert np.array_equal(pixels_of(again), pixels_of(data))


@pytest.mark.parametrize(("space", "count"), [("gray", 1), ("ycbcr", 3), ("rgb", 3), ("cmyk", 4), ("ycck", 4)])
def test_write_color_spaces(space: str, count: int) -> None:
    coefs = made((20, 12), ((1, 1),) * count, space)
    pictures = []
    for options in ({}, {"progressive": True}, {"optimize": False}, {"arithmetic": True}):
        data = written(coefs, **options)
        assert_same(jpeg.read(data), coefs)
        pictures.append(pixels_of(data))
    assert all(np.array_equal(p, pictures[0]) for p in pictures)
    assert pictures[0].shape == (20, 12, *((count,) if count > 1 else ()))


def test_write_rgb_means_rgb() -> None:
    coefs = made((8, 8), ((1, 1),) * 3, "rgb")
    for c, level in zip(coefs.components, (60, -20, 0), strict=True):
        c.zero_()
        c[0, 0, 0] = level * 8
    flat = torch.ones(64, dtype=torch.int32)
    coefs.qtables = (flat, flat, flat)
    assert pixels_of(jpeg.write(coefs))[3, 4].tolist() == [188, 108, 128]


def test_write_large_steps() -> None:
    """Steps above 255 take a table of 16 bits, which a baseline file can't have."""
    coefs = made((9, 9))
    coefs.qtables[0][5:7] = torch.tensor([256, 65535], dtype=torch.int32)
    for progressive in (False, True):
        data = jpeg.write(coefs, progressive=progressive)
        assert data[frame_of(data) + 1] == (0xC2 if progressive else 0xC1)
        assert_same(jpeg.read(data), coefs)


def test_write_extremes() -> None:
    """All that 8-bit JPEG can code, in the order in which differences are taken."""
    coefs = made((32, 32), ((2, 2), (1, 1), (1, 1)), "ycbcr", spread=1023)
    y = coefs.components[0]
    # Two MCUs beside each other: blocks are coded 2 x 2.
    y[:, :, 0] = torch.tensor([[1024, -1023, 1024, -1023], [1024, -1023, 1024, -1023]] * 2)
    y[0, 0, 63], y[3, 3, 1] = 1023, -1023
    for options in ({}, {"progressive": True}, {"optimize": False}):
        assert_same(jpeg.read(jpeg.write(coefs, **options)), coefs)


def test_write_takes_differences_in_the_order_of_the_scan() -> None:
    """MCUs of 2 x 2 blocks, or rows of blocks where components are coded one by one."""
    together, apart = ((2, 2), (1, 1), (1, 1)), ((4, 4), (1, 1), (1, 1))
    for sampling, good, bad in [
        (together, [[0, 2000, -2000, 0], [1000, 0, 0, 0]], [[0, 0, 2000, 2000], [0, -2000, 0, 0]]),
        (apart, [[0, 0, 0, 2000, 0, 0], [-2000, 0, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, 2000], [-2000, 0, 0, 0, 0, 0]]),
    ]:
        coefs = made((16, 8 * len(good[0])), sampling, "ycbcr")
        coefs.components[0][..., 0] = torch.tensor(good)
        assert_same(jpeg.read(jpeg.write(coefs, optimize=False)), coefs)
        coefs.components[0][..., 0] = torch.tensor(bad)
        with pytest.raises(JpegError, match="a DC coefficient may differ by 2047"):
            jpeg.write(coefs)


def refusals() -> list[tuple[str, Any, str]]:
    found = []

    def refuse(message: str, change: Any, *args: Any) -> None:
        found.append((message, change, args))

    def coefficient(c: int, at: tuple[int, int, int], value: int) -> Any:
        return lambda coefs: coefs.components[c].__setitem__(at, value)

    def field(name: str, value: Any) -> Any:
        return lambda coefs: setattr(coefs, name, value)

    ac = "AC coefficients must be within -1023..1023, got"
    refuse(f"{ac} 1024 at components[0][1, 2, 7]", coefficient(0, (1, 2, 7), 1024))
    refuse(f"{ac} -32768 at components[2][0, 0, 63]", coefficient(2, (0, 0, 63), -32768))
    dc = "a DC coefficient may differ by 2047 from the one coded before it, got"
    refuse(f"{dc} 2048 after 0 at components[1][0, 0, 0]", coefficient(1, (0, 0, 0), 2048))
    refuse(f"{dc} -32768 after 7 at components[0][1, 0, 0]", coefficient(0, (1, 0, 0), -32768))
    refuse("size must be 1 to 65500 in both directions, got (0, 31)", field("size", (0, 31)))
    refuse("size must be 1 to 65500 in both directions, got (20, 65501)", field("size", (20, 65501)))
    refuse("no JPEG has size (-1, 5) and sampling ((2, 2), (1, 1), (1, 1))", field("size", (-1, 5)))
    refuse(
        "components[0] must have 3 x 5 blocks for this size and sampling, got 3 x 4",
        field("size", (20, 33)),
    )
    refuse(
        "components[1] must have 3 x 2 blocks for this size and sampling, got 2 x 2",
        field("sampling", ((2, 1), (1, 1), (1, 1))),
    )
    refuse("sampling factors must be 1 to 4, got (5, 1) for component 1", field("sampling", ((2, 2), (5, 1), (1, 1))))
    refuse("components must have 4 entries for color_space 'cmyk', got 3", field("color_space", "cmyk"))
    refuse("sampling must have 3 entries for color_space 'ycbcr', got 1", field("sampling", ((1, 1),)))
    refuse("quantisation steps must be 1 to 65535, got 0 in qtables[0][9]", lambda c: c.qtables[0].__setitem__(9, 0))
    refuse("quantisation steps must be 1 to 65535, got 65536 in qtables[1][0]", lambda c: c.qtables[1].__setitem__(0, 65536))
    return found


@pytest.mark.parametrize(("message", "change", "args"), refusals(), ids=lambda v: v if isinstance(v, str) else "")
def test_write_refuses_what_no_file_can_hold(message: str, change: Any, args: Any) -> None:
    coefs = made((20, 31), ((2, 2), (1, 1), (1, 1)), "ycbcr")
    coefs.components[0][..., 0], coefs.components[1][..., 0] = 7, 0
    change(coefs)
    for options in ({}, {"optimize": False}, {"progressive": True}):
        with pytest.raises(JpegError) as error:
            jpeg.write(coefs, **options)
        assert str(error.value) == f"jpeg.write: {message} (see docs/jpeg.md#writing)"


def test_write_refuses_other_types() -> None:
    coefs = made((8, 8))

    def check(error: type[Exception], message: str, **fields: Any) -> None:
        wrong = copy.copy(coefs)
        for name, value in fields.items():
            setattr(wrong, name, value)
        with pytest.raises(error) as caught:
            jpeg.write(wrong)
        assert str(caught.value) == f"jpeg.write: {message}"

    (blocks,), (table,) = coefs.components, coefs.qtables
    check(TypeError, "components[0] must be int16, got int32", components=(blocks.int(),))
    check(TypeError, "components[0] must be a Tensor, got ndarray", components=(blocks.numpy(),))
    check(TypeError, "components must be a tuple of tensors, got Tensor", components=blocks)
    check(ValueError, "components[0] must have shape [h, w, 64], got (1, 1, 8, 8)", components=(blocks.view(1, 1, 8, 8),))
    check(ValueError, "components[0] must be on the CPU, got meta; pass it through .cpu()", components=(blocks.to("meta"),))
    check(TypeError, "qtables[0] must be int32, got int64", qtables=(table.long(),))
    check(ValueError, "qtables[0] must have shape [64], got (8, 8)", qtables=(table.view(8, 8),))
    check(TypeError, "size must be pairs of ints, got ((8.0, 8),)", size=(8.0, 8))
    check(TypeError, "sampling must be pairs of ints, got (1, 1)", sampling=(1, 1))
    spaces = "color_space must be one of ('gray', 'ycbcr', 'rgb', 'cmyk', 'ycck'), got"
    check(ValueError, f"{spaces} 'lab'", color_space="lab")
    with pytest.raises(TypeError, match=r"^jpeg\.write: coefs must be JpegCoefficients, got bytes$"):
        jpeg.write(b"")
    with pytest.raises(TypeError, match=r"^jpeg\.write: progressive must be True or False, got 1$"):
        jpeg.write(coefs, progressive=1)


def test_write_any_strides() -> None:
    coefs = made((24, 40), ((2, 1), (1, 1), (1, 1)), "ycbcr")
    wrong = copy.copy(coefs)
    wrong.components = tuple(c.transpose(0, 1).contiguous().transpose(0, 1) for c in coefs.components)
    wrong.qtables = tuple(torch.stack([t, t], 1)[:, 0] for t in coefs.qtables)
    assert jpeg.write(wrong) == jpeg.write(coefs)


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_sources(tmp_path: Path) -> None:
    data = encoded(photo(20, 30))
    want = jpeg.read(data)
    path = tmp_path / "phötö.jpg"
    path.write_bytes(data)
    spread = torch.zeros(len(data), 2, dtype=torch.uint8)
    spread[:, 1] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    array = np.frombuffer(data, np.uint8)
    sources = [bytearray(data), memoryview(data), path, str(path), spread[:, 1], spread[:, 1].contiguous(), array,
               spread[:, 1].numpy(), memoryview(bytes(b for b in data for _ in "xy"))[::2]]  # fmt: skip
    for source in sources:
        assert_same(jpeg.read(source), want)
    for threads in (1, 3):
        for got in jpeg.read_batch(sources, threads=threads):
            assert_same(got, want)


def test_wrong_sources(tmp_path: Path) -> None:
    def check(error: type[Exception], message: str, source: Any, **options: Any) -> None:
        with pytest.raises(error) as caught:
            jpeg.read(source, **options)
        assert type(caught.value) is error
        assert str(caught.value) == message + BROKEN * (error is JpegError)

    kinds = "jpeg.read: source must be bytes, a path, or a uint8 tensor or array [n], got"
    check(TypeError, f"{kinds} int", 3)
    check(TypeError, f"{kinds} NoneType", None)
    check(TypeError, f"{kinds} list", [255, 216])
    check(TypeError, "jpeg.read: source must be a uint8 tensor [n], got int16 [4]", torch.zeros(4, dtype=torch.int16))
    check(TypeError, "jpeg.read: source must be a uint8 tensor [n], got uint8 [2, 2]", torch.zeros(2, 2, dtype=torch.uint8))
    check(TypeError, "jpeg.read: source must be a uint8 array [n], got int8 [4]", np.zeros(4, np.int8))
    check(TypeError, "jpeg.read: source must hold bytes in one dimension, got format 'H' in 1", memoryview(np.zeros(2, "H")))
    on_meta = torch.zeros(4, dtype=torch.uint8, device="meta")
    check(ValueError, "jpeg.read: source must be on the CPU, got meta; pass source.cpu()", on_meta)
    check(ValueError, "jpeg.read: source is a path with a null character: 'a\\x00b'", "a\0b")
    missing = tmp_path / "none.jpg"
    check(FileNotFoundError, f"[Errno 2] jpeg.read: No such file or directory: '{missing}'", missing)
    check(IsADirectoryError, f"[Errno 21] jpeg.read: Is a directory: '{tmp_path}'", str(tmp_path))
    check(TypeError, "jpeg.read: strict must be True or False, got 1", b"", strict=1)
    check(TypeError, "jpeg.read: max_pixels must be an int, got 1.5", b"", max_pixels=1.5)
    check(ValueError, "jpeg.read: max_scans must be at least 1, got 0", b"", max_scans=0)
    empty = tmp_path / "empty.jpg"
    empty.touch()
    check(JpegError, f"jpeg.read: {empty}: empty", empty)
    check(JpegError, "jpeg.read: /dev/zero: not a JPEG, it starts with 00 00 00 00 instead of ff d8", "/dev/zero")


def steps_of_others(work: Any) -> int:
    """How often this thread could run while another one worked."""
    thread = threading.Thread(target=work)
    thread.start()
    steps = 0
    while thread.is_alive():
        time.sleep(0.001)
        steps += 1
    return steps


def test_read_without_the_gil(tmp_path: Path) -> None:
    """From a pipe, which makes its reader wait."""
    data, pipe = tmp_path / "file.jpg", tmp_path / "pipe"
    data.write_bytes(encoded(photo(300, 200), quality=95))
    os.mkfifo(pipe)
    for read in (lambda: jpeg.read(pipe), lambda: jpeg.read_batch([pipe], threads=2)[0]):
        got: list[Any] = []
        with subprocess.Popen(["sh", "-c", 'sleep 0.3; cat "$0" > "$1"', data, pipe]):
            assert steps_of_others(lambda: got.append(read())) > 20  # noqa: B023
        assert got[0].size == (300, 200)


def test_write_without_the_gil() -> None:
    coefs = made((3000, 3000), spread=3)
    assert steps_of_others(lambda: jpeg.write(coefs)) > 5


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_read_batch() -> None:
    datas = [encoded(photo(8 * i + 3, 90 - i), quality=10 * i + 5, progressive=i % 3 == 0) for i in range(9)] * 3
    for threads in (None, 1, 2, 5, 100):
        got = jpeg.read_batch(iter(datas), threads=threads)
        assert len(got) == len(datas)
        for mine, data in zip(got, datas, strict=True):
            assert_same(mine, jpeg.read(data))
    # One piece of memory: from the first tensor to the last there are only the tensors and their tables.
    tensors = [t for coefs in got for t in (*coefs.components, *coefs.qtables)]
    begin, end = min(t.data_ptr() for t in tensors), max(t.data_ptr() + t.nbytes for t in tensors)
    assert end - begin == sum(t.nbytes for t in tensors)
    assert jpeg.read_batch([]) == []


def test_read_batch_errors(tmp_path: Path) -> None:
    good = encoded(photo(40, 40))
    path = tmp_path / "cut.jpg"
    path.write_bytes(good[:-80])
    missing = tmp_path / "none.jpg"
    sources = [good, good[:900], path, missing, b"", good]
    skipped = jpeg.read_batch(sources, on_error="skip", threads=2)
    assert [s is None for s in skipped] == [False, True, True, True, True, False]
    assert_same(skipped[5], skipped[0])
    lenient = jpeg.read_batch(sources, on_error="skip", strict=False)
    assert [s is None for s in lenient] == [False, False, False, True, True, False]
    truncated = "it is truncated, in scan 1; strict=False reads what is there"
    for threads in (1, 2, 4):
        # The first that fails, although later ones fail sooner: those of b"" and of no file at once.
        with pytest.raises(JpegError) as error:
            jpeg.read_batch(sources, threads=threads)
        assert str(error.value) == f"jpeg.read_batch: source 1 (900 bytes): {truncated}{BROKEN}"
    with pytest.raises(JpegError) as error:
        jpeg.read_batch([good, path])
    assert str(error.value) == f"jpeg.read_batch: source 1 ({path}): {truncated}{BROKEN}"
    with pytest.raises(FileNotFoundError) as error:
        jpeg.read_batch([good, good, missing])
    assert error.value.filename == str(missing) and "source 2" in str(error.value)
    for wrong, message in [
        ({"sources": [good, 1]}, "sources[1] must be bytes, a path, or a uint8 tensor or array [n], got int"),
        ({"sources": good}, "sources must be a list of files, got one bytes; call jpeg.read"),
        ({"sources": [good], "threads": 0}, "threads must be at least 1, got 0"),
        ({"sources": [good], "on_error": "ignore"}, "on_error must be one of ('raise', 'skip'), got 'ignore'"),
    ]:
        with pytest.raises((TypeError, ValueError)) as error:
            jpeg.read_batch(**wrong)
        assert str(error.value) == f"jpeg.read_batch: {message}"


class Folder(Dataset[JpegCoefficients]):
    def __init__(self, datas: list[bytes]) -> None:
        self.datas = datas

    def __len__(self) -> int:
        return len(self.datas)

    def __getitem__(self, i: int) -> JpegCoefficients:
        one, two = jpeg.read_batch([self.datas[i], self.datas[0]], threads=2)
        assert one is not None and two is not None
        return one

    def __getitems__(self, indices: list[int]) -> list[JpegCoefficients | None]:
        if 1 in indices:
            with pytest.raises(JpegError, match="not a JPEG"):
                jpeg.read(b"xx")
        return jpeg.read_batch([self.datas[i] for i in indices], threads=2)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12's, of any fork of a process with threads
def test_in_workers(start: str) -> None:
    datas = [encoded(photo(20 + i, 30)) for i in range(6)]
    want = jpeg.read_batch(datas, threads=3)  # threads before the fork
    workers = 2 if start == "fork" else 1
    loader = DataLoader(Folder(datas), batch_size=2, num_workers=workers, collate_fn=list, multiprocessing_context=start)
    got = [coefs for batch in loader for coefs in batch]
    for mine, other in zip(got, want, strict=True):
        assert_same(mine, other)


def test_copies() -> None:
    batch = jpeg.read_batch([encoded(photo(17, 90 + i)) for i in range(20)])
    coefs = batch[7]
    data = pickle.dumps(coefs)
    assert len(data) < 2 * sum(c.nbytes for c in coefs.components)  # this image's, not the batch's
    for again in (pickle.loads(data), copy.deepcopy(coefs)):
        assert_same(again, coefs)
        assert again.progressive is False and again.warnings == 0
        again.components[1][0, 0, 0] += 1
        assert not torch.equal(again.components[1], coefs.components[1])
    error = pickle.loads(pickle.dumps(JpegError("jpeg.read: x.jpg: empty")))
    assert type(error) is JpegError and str(error) == "jpeg.read: x.jpg: empty" and isinstance(error, ValueError)


def test_repr() -> None:
    data = encoded(photo(33, 50), progressive=True)
    fields = "size (33, 50), sampling 2x2, 1x1, 1x1, blocks 5x7, 3x4, 3x4"
    assert repr(jpeg.read(data)) == f"JpegCoefficients(progressive, ycbcr, {fields})"
    assert repr(jpeg.read(data[:-2])) == f"JpegCoefficients(progressive, ycbcr, {fields}, 1 warning)"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("none"), "this fourfold was built without libjpeg; install its headers"),
        (
            ImportError("libjpeg.so.62: cannot open shared object file"),
            "the libjpeg that this fourfold was built with does not load (libjpeg.so.62: cannot open shared object file); ",
        ),
    ],
    ids=["built without", "not there any more"],
)
def test_without_libjpeg(error: ImportError, reason: str) -> None:
    """Everything else works, and the functions that need it say what to do."""
    battery.run_script(
        f"""
import sys

class Missing:
    def find_spec(self, name, *rest):
        if name == "fourfold._jpeg":
            raise {type(error).__name__}({str(error)!r})

sys.meta_path.insert(0, Missing())
import fourfold as ff
import torch

assert not ff.has_jpeg()
assert ff.build_info()["libjpeg"] is None
y, _ = ff.rgb_to_dct(torch.zeros(1, 3, 8, 8))
blocks, table = y.short().reshape(1, 1, 64), torch.ones(64, dtype=torch.int32)
coefs = ff.jpeg.JpegCoefficients((blocks,), (table,), (8, 8), ((1, 1),), "gray")
for op, call in (
    ("read", lambda: ff.jpeg.read(b"")),
    ("read_batch", lambda: ff.jpeg.read_batch([b""])),
    ("write", lambda: ff.jpeg.write(coefs)),
):
    try:
        call()
    except RuntimeError as refusal:
        assert str(refusal).startswith(f"jpeg.{{op}}: " + {reason!r}), refusal
    else:
        raise AssertionError(op)
"""
    )


DECODERS = {
    "PIL": "import io; from PIL import Image; theirs = lambda: numpy.asarray(Image.open(io.BytesIO(data)))",
    "cv2": "import cv2; theirs = lambda: cv2.imdecode(numpy.frombuffer(data, numpy.uint8), cv2.IMREAD_COLOR)",
    "simplejpeg": "import simplejpeg; theirs = lambda: simplejpeg.decode_jpeg(data)",
    "torchvision": "import torch, torchvision; "
    "theirs = lambda: torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).numpy()",
}


@pytest.mark.parametrize("library", DECODERS)
def test_beside_another_libjpeg(library: str, tmp_path: Path) -> None:
    """Each in a process of its own, then both in one, whichever comes first: the same results."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    file = tmp_path / "photo.jpg"
    file.write_bytes(encoded(photo(100, 120)))
    ours = "import fourfold; ours = lambda: numpy.concatenate([c.flatten() for c in fourfold.jpeg.read(data).components])"

    def run(*parts: str) -> dict[str, str]:
        lines = ["import hashlib, numpy, sys", f"data = open({str(file)!r}, 'rb').read()", *parts]
        lines += ["for _ in range(3):"]
        lines += ["    for name in ('ours', 'theirs'):"]
        lines += ["        if name in globals(): print(name, hashlib.sha256(globals()[name]().tobytes()).hexdigest())"]
        return dict(line.split() for line in battery.run_script("\n".join(lines)).stdout.splitlines())

    if subprocess.run([sys.executable, "-c", f"import {library}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{library} is installed, but does not import")
    alone = run(ours) | run(DECODERS[library])
    assert set(alone) == {"ours", "theirs"}
    assert run(ours, DECODERS[library]) == alone
    assert run(DECODERS[library], ours) == alone


# ---- broken files ----------------------------------------------------------------------------------------------------


def attempt(data: bytes | bytearray, **options: Any) -> JpegCoefficients | None:
    """What is read, or None if it is refused in the proper way."""
    try:
        return jpeg.read(data, **options)
    except JpegError as error:
        message = str(error)
    assert message.startswith(f"jpeg.read: {len(data)} bytes: ")
    return None


def refused(data: bytes, message: str, **options: Any) -> None:
    with pytest.raises(JpegError) as error:
        jpeg.read(data, **options)
    assert str(error.value) == f"jpeg.read: {len(data)} bytes: {message}{BROKEN}"


@pytest.mark.parametrize("kind", ["baseline", "restarts", "progressive", "arithmetic", "separate scans"])
def test_truncated_at_every_byte(kind: str) -> None:
    if kind == "arithmetic":
        data = written(made((20, 20)), arithmetic=True)
    elif kind == "separate scans":
        data = jpeg.write(made((20, 20), ((4, 4), (1, 1), (1, 1)), "ycbcr"))
    else:
        data = encoded(photo(28, 36), quality=50, progressive=kind == "progressive", restart_marker_blocks=kind == "restarts")
    whole = jpeg.read(data)
    first_scan = next(end for marker, _, end in segments(data) if marker == 0xDA)
    accepted = []
    for n in range(len(data)):
        cut = data[:n]
        strict, lenient = attempt(cut), attempt(cut, strict=False)
        if strict is not None:
            assert_same(strict, whole)
            accepted.append(n)
        if lenient is None:
            assert n < first_scan
            continue
        assert lenient.warnings >= 1
        assert [c.shape for c in lenient.components] == [c.shape for c in whole.components]
        assert all(map(torch.equal, lenient.qtables, whole.qtables))
    # A cut that loses data is refused. Those left lose the end marker alone, or with it bits that only fill up the last byte.
    assert kind == "arithmetic" or set(accepted) >= {len(data) - 2, len(data) - 1}
    assert all(n >= len(data) - (3 if kind != "arithmetic" else 0) for n in accepted)


def test_truncated_leaves_zeros() -> None:
    """Not strict: what comes before the cut is there, one block may be half there, and zeros follow."""
    data = encoded(photo(64, 64, 1), quality=80)
    whole = jpeg.read(data).components[0].view(-1, 64)
    scan = next(at for marker, at, _ in segments(data) if marker == 0xDA) + 10  # where its data begins
    counts = []
    for n in range(scan, len(data) - 3, 3):
        got = jpeg.read(data[:n], strict=False)
        assert got.warnings == 2  # no end marker, and no data
        blocks = got.components[0].view(-1, 64)
        same = (blocks == whole).all(1).long().cumprod(0).sum().item()
        assert not blocks[same + 1 :].any()
        counts.append(same)
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] >= 62


def test_bit_flips() -> None:
    """A flipped bit is an error, a warning or another picture, and nothing worse."""
    rng = np.random.default_rng(7)
    sound = [
        encoded(photo(24, 40)),
        encoded(photo(24, 40), progressive=True),
        encoded(photo(24, 40), restart_marker_blocks=1, subsampling="4:4:4"),
        written(made((24, 40), ((3, 1), (1, 2), (1, 1)), "ycbcr"), arithmetic=True),
        encoded(photo(16, 24), "CMYK"),
    ]
    outcomes: list[str] = []
    for data in sound * 400:
        broken = bytearray(data)
        for at in rng.integers(2, len(data), rng.integers(1, 4)):
            broken[at] ^= 1 << rng.integers(8)
        strict, lenient = attempt(broken, max_pixels=10**6), attempt(broken, strict=False, max_pixels=10**6)
        if lenient is None:
            assert strict is None
            outcomes.append("refused")
            continue
        if strict is not None:
            assert_same(strict, lenient)
            assert strict.warnings == lenient.warnings <= 1
        else:
            # Either libjpeg said something, or the bytes could not hold so large a frame.
            assert lenient.warnings > 0
        outcomes.append("read" if strict is not None else "warned")
        assert all(c.shape[2] == 64 and c.dtype == torch.int16 for c in lenient.components)
    assert min(outcomes.count(kind) for kind in ("refused", "read", "warned")) > 100


def test_missing_end_marker() -> None:
    for options in ({}, {"progressive": True}):
        data = encoded(photo(30, 30), **options)
        whole = jpeg.read(data)
        got = jpeg.read(data[:-2])
        assert_same(got, whole)
        assert got.warnings == 1
        # What follows the end marker belongs to nobody.
        assert jpeg.read(data + b"\xff\xd8 trailing \xff\xc0").warnings == 0


def test_progressive_without_its_last_scans() -> None:
    data = encoded(photo(40, 24), progressive=True)
    whole = jpeg.read(data)
    scans = [(at, end) for marker, at, end in segments(data) if marker == 0xDA]
    tables = {end: at for marker, at, end in segments(data) if marker == 0xC4}
    for n, (at, _) in list(enumerate(scans))[1:]:
        begin = tables.get(at, at)
        # With an end marker this is a whole file of less precision; without, it has lost its end.
        complete = jpeg.read(data[:begin] + b"\xff\xd9")
        assert complete.warnings == 0
        assert all(
            torch.equal(a[..., 0] >> 1, b[..., 0] >> 1) for a, b in zip(complete.components, whole.components, strict=True)
        )
        message = f"it ends after scan {n} of a progressive image, before its last; strict=False reads what is there"
        refused(data[:begin], message)
        lenient = jpeg.read(data[:begin], strict=False)
        assert lenient.warnings == 2
        assert_same(lenient, complete)


def test_missing_component() -> None:
    data = jpeg.write(made((40, 40), ((4, 4), (1, 1), (1, 1)), "ycbcr"))
    (*_, (at, end)) = [(at, end) for marker, at, end in segments(data) if marker == 0xDA]
    cut = data[:at] + data[end:]
    refused(cut, "no scan holds component 2; strict=False reads what is there")
    lenient = jpeg.read(cut, strict=False)
    assert lenient.warnings == 1 and not lenient.components[2].any() and lenient.components[1].any()


def test_missing_tables() -> None:
    coefs = jpeg.read(encoded(photo(24, 24)))
    data = jpeg.write(coefs, optimize=False)
    motion = without(data, 0xC4)
    refused(motion, "DC Huffman table 0 is missing; strict=False reads a Motion-JPEG frame, which means the standard's tables")
    lenient = jpeg.read(motion, strict=False)
    assert_same(lenient, coefs)
    assert lenient.warnings == 1
    for strict in (True, False):
        refused(without(data, 0xDB), "Quantization table 0x00 was not defined", strict=strict)
        progressive = without(encoded(photo(24, 24), progressive=True), 0xC4)
        refused(progressive, "Huffman table 0x00 was not defined", strict=strict)
    # The standard's tables don't stand in for one that only a later scan lacks.
    separate = jpeg.write(made((40, 40), ((4, 4), (1, 1), (1, 1)), "ycbcr"))
    tables = [(at, end) for marker, at, end in segments(separate) if marker == 0xC4]
    for number in (0x01, 0x11):
        ((at, end),) = [t for t in tables if separate[t[0] + 4] == number][:1]
        refused(separate[:at] + separate[end:], "Huffman table 0x01 was not defined")


PROCESSES = {
    3: "lossless",
    5: "hierarchical (differential sequential)",
    6: "hierarchical (differential progressive)",
    7: "hierarchical (differential lossless)",
    11: "lossless arithmetic",
    13: "hierarchical (differential sequential arithmetic)",
    14: "hierarchical (differential progressive arithmetic)",
    15: "hierarchical (differential lossless arithmetic)",
}


@pytest.mark.parametrize("strict", [True, False])
def test_frames_that_cannot_be_read(strict: bool) -> None:
    data = encoded(photo(16, 16))
    sof = frame_of(data)
    for number, process in PROCESSES.items():
        message = (
            f"SOF{number}, a {process} JPEG, has no coefficients that can be read; re-encode it as baseline or progressive"
        )
        refused(patched(data, sof + 1, 0xC0 + number), message, strict=strict)

    def refuse(message: str, at: int, *values: int) -> None:
        refused(patched(data, sof + at, *values), message, strict=strict)

    refuse("12-bit samples (SOF0); only 8-bit JPEGs can be read, re-encode it", 4, 12)
    refuse("12-bit samples (SOF1); only 8-bit JPEGs can be read, re-encode it", 1, 0xC1, 0, 17, 12)
    dnl = "(a height given after the image, by a DNL marker, is not supported)"
    refuse(f"the frame header says 16 x 0 pixels {dnl}", 5, 0, 0)
    refuse(f"the frame header says 0 x 16 pixels {dnl}", 7, 0, 0)
    refuse("65535 x 16 pixels exceed libjpeg's limit of 65500 in one direction", 7, 255, 255)
    refuse("the frame header SOF0 has the wrong length", 9, 4)
    refuse("component 1 has sampling factors (0, 1); they must be 1 to 4", 14, 0x01)
    refuse("component 0 has sampling factors (5, 2); they must be 1 to 4", 11, 0x52)
    head, tail = data[:sof], data[sof + 19 :]
    for count in (2, 5, 10):
        frame = bytes([0xFF, 0xC0, 0, 8 + 3 * count, 8, 0, 16, 0, 16, count]) + b"".join(
            bytes([c, 17, 0]) for c in range(count)
        )
        refused(head + frame + tail, f"{count} components; expected 1 (gray), 3 (YCbCr, RGB) or 4 (CMYK, YCCK)", strict=strict)
    hierarchical = "a hierarchical JPEG (DHP or EXP marker) has no coefficients that can be read"
    refused(head + b"\xff\xde" + data[sof + 2 :], hierarchical, strict=strict)
    refused(data[: sof + 19] + data[sof:], "Invalid JPEG file structure: two SOF markers", strict=strict)
    refused(head + tail, "a scan starts before any frame header", strict=strict)
    refused(head + b"\xff\xd9", "it holds tables only, no image", strict=strict)
    refused(head, "it ends before the frame header", strict=strict)
    refused(head[:100], "it ends inside the segment of marker ff db, before the frame header", strict=strict)
    refused(b"\xff\xd8" + data, "two start-of-image markers", strict=strict)
    refused(b"\xff\xd8", "it ends before the frame header", strict=strict)
    refused(b"\xff\xd8\xff\xe0\x00\x01", "the segment of marker ff e0 has a length below 2", strict=strict)
    refused(b"", "empty", strict=strict)
    refused(b"\xff", "not a JPEG, it starts with ff instead of ff d8", strict=strict)
    refused(b"\x89PNG\r\n", "not a JPEG, it starts with 89 50 4e 47 instead of ff d8", strict=strict)
    refused(data[1:], "not a JPEG, it starts with d8 ff e0 00 instead of ff d8", strict=strict)


def test_strict_refuses_warnings() -> None:
    data = encoded(photo(16, 16), restart_marker_blocks=1)
    sof = frame_of(data)
    noise = data[:sof] + b"noise" + data[sof:]
    refused(noise, "Corrupt JPEG data: 5 extraneous bytes before marker 0xc0; strict=False reads what is there")
    lenient = jpeg.read(noise, strict=False)
    assert lenient.warnings == 1
    assert_same(lenient, jpeg.read(data))


def test_large_frames_cost_nothing() -> None:
    """A few hundred bytes that say 65500 x 65500."""
    data = encoded(photo(16, 16))
    sof = frame_of(data)
    bomb = patched(data, sof + 5, *(65500).to_bytes(2, "big") * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for strict in (True, False):
        message = "65500 x 65500 pixels exceed max_pixels=268435456; raise it if you trust the file"
        refused(bomb, message, strict=strict)
    held = f"it is truncated: {len(bomb)} bytes cannot hold the {8188**2 + 2 * 4094**2} blocks of 65500 x 65500 pixels"
    message = f"{held}; strict=False reads what is there"
    refused(bomb, message, max_pixels=2**40)
    refused(data, "16 x 16 pixels exceed max_pixels=255; raise it if you trust the file", max_pixels=255)
    assert jpeg.read(data, max_pixels=256).size == (16, 16)
    # A frame that the bytes might hold, and don't: memory is touched only where something is decoded.
    padded = patched(data, sof + 5, *(8000).to_bytes(2, "big") * 2) + bytes(500_000)
    refused(padded, "Corrupt JPEG data: premature end of data segment; strict=False reads what is there")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB; the frame has 187 MiB


def test_a_quantisation_step_of_0() -> None:
    """Which `write` refuses: read and write are inverses in a strict reading."""
    data = encoded(photo(16, 16))
    (start, *_) = [at for marker, at, _ in segments(data) if marker == 0xDB]
    flawed = patched(data, start + 5, 0)  # behind marker, length, and the table's number
    refused(flawed, "quantisation table 0 has a step of 0; strict=False reads what is there", strict=True)
    lenient = jpeg.read(flawed, strict=False)
    assert lenient.warnings == 1
    assert lenient.qtables[0][0] == 0


def test_files_are_read_as_far_as_they_make_sense(tmp_path: Path) -> None:
    """A file of any size on disk: no more is read than an image can need, and without a frame header 64 MiB."""
    endless, long = tmp_path / "endless.jpg", tmp_path / "long.jpg"
    data = encoded(photo(16, 16))
    for path, start in ((endless, b"\xff\xd8"), (long, data)):
        path.write_bytes(start)
        os.truncate(path, 2**33)  # sparse
    script = """
import resource, sys
import fourfold as ff
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        ff.jpeg.read(path)
    except ff.jpeg.JpegError as error:
        print(error)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024, "KiB"
"""
    said = battery.run_script(script, str(endless), str(long)).stdout.splitlines()
    first = 2**26
    assert said == [
        f"jpeg.read: {endless}: in its first {first} bytes: it ends before the frame header{BROKEN}",
        f"jpeg.read: {long}: more than {first + 256 * 6} bytes, which is more than its image can need{BROKEN}",
    ]


def test_scan_bomb() -> None:
    data = jpeg.write(made((8, 8), ((4, 4), (1, 1), (1, 1)), "ycbcr"))
    (*_, (at, end)) = [(at, end) for marker, at, end in segments(data) if marker == 0xDA]
    many = data[:end] + data[at:end] * 4997 + data[end:]
    for strict in (True, False):
        refused(many, "more than max_scans=100 scans; raise it if you trust the file", strict=strict)
    # A scan again says the same again.
    assert_same(jpeg.read(many, max_scans=5000), jpeg.read(data))
    with pytest.raises(JpegError, match="more than max_scans=4999 scans"):
        jpeg.read(many, max_scans=4999)
    # 20 times max_pixels is what all scans together may walk over.
    assert_same(jpeg.read(many, max_scans=5000, max_pixels=16_000), jpeg.read(data))
    work = "5000 scans of 8 x 8 pixels are more work than max_pixels=15999 allows; raise it if you trust the file"
    refused(many, work, max_scans=5000, max_pixels=15_999)
    ten = encoded(photo(16, 16), progressive=True)
    assert jpeg.read(ten, max_scans=10).progressive
    refused(ten, "more than max_scans=9 scans; raise it if you trust the file", max_scans=9)
