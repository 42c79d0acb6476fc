"""dct_flip, dct_rot90, dct_crop, dct_downscale2: what they do to frequencies, and that pixels say the same."""

from __future__ import annotations

import math
from typing import Any

import battery
import fourfold as ff
import numpy as np
import pytest
import scipy.fft
import torch
from battery import Op, Refusal, Sample, assert_close, assert_same
from fourfold.ops import blockdct_domain
from fourfold.ops.blockdct_domain import dct_crop, dct_downscale2, dct_flip, dct_rot90
from fourfold.reference import blockdct_domain as reference
from torch import Tensor
from torch._subclasses import FakeTensorMode

#: Public functions without a schema.
COMPOSITES = ("dct_flip", "dct_rot90", "dct_crop", "dct_downscale2")


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(*shape: int, dtype: torch.dtype = torch.int16) -> Tensor:
    """Over the range that can be negated."""
    return torch.randint(-32767, 32768, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# ---- frequency by frequency ----------------------------------------------------------------------------------------------
# What one coefficient becomes. The references in fourfold.reference say it in pixels; there a NaN spoils its whole block.


def flip_by_frequency(coefs: Tensor, dim: int) -> Tensor:
    vertical = dim in {-3, coefs.dim() - 3}
    mirrored = coefs.flip(-3 if vertical else -2)
    planes = [mirrored[..., f] * (-1) ** (f // 8 if vertical else f % 8) for f in range(64)]
    return torch.stack(planes, -1)


def turn_by_frequency(coefs: Tensor, k: int = 1) -> Tensor:
    for _ in range(k % 4):  # pixel (i, j) comes from (j, W - 1 - i): mirrored, then transposed
        mirrored = flip_by_frequency(coefs, -2).transpose(-3, -2)
        coefs = torch.stack([mirrored[..., f % 8 * 8 + f // 8] for f in range(64)], -1)
    return coefs


def crop_by_frequency(coefs: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    top, left, height, width = box
    return torch.stack([torch.stack([coefs[..., top + i, left + j, :] for j in range(width)], -2) for i in range(height)], -3)


GRIDS = ((1, 1), (1, 4), (2, 3), (5, 2))


def samples_with(options: list[tuple[Any, ...]]) -> Any:
    """Samples of every grid, with any number of leading dimensions."""

    def samples(dtype: torch.dtype) -> list[Sample]:
        shapes = [*((2, *grid) for grid in GRIDS), (3, 4), (2, 1, 2, 2)]
        return [Sample(f"{shape} {args}", (randn(*shape, 64, dtype=dtype), *args)) for shape in shapes for args in options]

    return samples


def crop_samples(dtype: torch.dtype) -> list[Sample]:
    """What lies at two thirds of the input, where the battery puts a NaN, is kept by all but one."""
    cases = (
        ("whole", (1, 1), (0, 0, 1, 1)),
        ("columns", (1, 4), (0, 1, 1, 2)),
        ("dropped", (2, 3), (1, 0, 1, 2)),
        ("one block", (5, 2), (1, 1, 1, 1)),
        ("inner", (3, 3), (0, 0, 2, 2)),
    )
    return [Sample(f"{label} {box} of {grid}", (randn(2, *grid, 64, dtype=dtype), box)) for label, grid, box in cases]


def small_with(options: list[tuple[Any, ...]], grid: tuple[int, int] = (1, 2)) -> Any:
    return lambda: [Sample(str(args), (randn(*grid, 64), *args)) for args in options]


def sizes_with(*args: Any) -> Any:
    """Of even grids: the parity of a grid is part of dct_downscale2's graph."""
    shapes = ((3, 4, 6), (2, 6, 4), (5, 8, 10))
    return lambda: [Sample(str(shape), (randn(*shape, 64, dtype=torch.float32), *args)) for shape in shapes]


def large_with(*args: Any) -> Any:
    return lambda dtype: Sample("large", (randn(2, 105, 104, 64, dtype=dtype), *args))


def refusals_of(name: str, call: Any, *args: Any) -> list[Refusal]:
    """What all of them refuse."""
    x = torch.zeros(2, 3, 64)
    dtypes = "int16, float16, bfloat16, float32 or float64"
    hint = "planar coefficients [.., 64, h, w] become blocks with movedim(-3, -1)"
    return [
        Refusal(TypeError, f"{name}: coefs must be a Tensor, got list", lambda: call([1.0], *args)),
        Refusal(TypeError, f"{name}: coefs must be {dtypes}, got int32", lambda: call(x.int(), *args)),
        Refusal(TypeError, f"{name}: coefs must be {dtypes}, got complex64", lambda: call(x * 1j, *args)),
        Refusal(
            ValueError,
            f"{name}: coefs must be blocks [.., h, w, 64], got (64, 2, 3); {hint}",
            lambda: call(x.movedim(-1, 0), *args),
        ),
        Refusal(ValueError, f"{name}: coefs must be blocks [.., h, w, 64], got (3, 64); {hint}", lambda: call(x[0], *args)),
        Refusal(
            ValueError,
            f"{name}: coefs must have at least one block, got (2, 0, 64)",
            lambda: call(x[:, :0], *args),
        ),
    ]


def flip_refusals() -> list[Refusal]:
    x = torch.zeros(4, 2, 3, 64)
    allowed = "1 or -3 (block rows), 2 or -2 (block columns) of coefs (4, 2, 3, 64)"
    lowest = torch.full((1, 1, 64), -32768, dtype=torch.int16)
    return [
        *refusals_of("dct_flip", dct_flip, -2),
        *(
            Refusal(ValueError, f"dct_flip: dim must be {allowed}, got {dim}", lambda dim=dim: dct_flip(x, dim))
            for dim in (0, 3, -1, -4, 4)
        ),
        Refusal(TypeError, "dct_flip: dim must be an int, got 'h'", lambda: dct_flip(x, "h")),
        Refusal(
            ValueError,
            "dct_flip: coefs holds -32768, which int16 cannot negate (no JPEG encoder writes it); pass coefs.float()",
            lambda: dct_flip(lowest, -2),
        ),
    ]


def turn_refusals() -> list[Refusal]:
    lowest = torch.full((1, 1, 64), -32768, dtype=torch.int16)
    return [
        *refusals_of("dct_rot90", dct_rot90),
        Refusal(TypeError, "dct_rot90: k must be an int, got 1.0", lambda: dct_rot90(torch.zeros(2, 3, 64), 1.0)),
        Refusal(
            ValueError,
            "dct_rot90: coefs holds -32768, which int16 cannot negate (no JPEG encoder writes it); pass coefs.float()",
            lambda: dct_rot90(lowest),
        ),
    ]


def crop_refusals() -> list[Refusal]:
    x = torch.zeros(2, 3, 64)
    within = "must lie within 2 x 3 blocks of 8 pixels"
    return [
        *refusals_of("dct_crop", dct_crop, (0, 0, 1, 1)),
        Refusal(TypeError, "dct_crop: box must be (top, left, height, width) in blocks, got 3", lambda: dct_crop(x, 3)),
        Refusal(
            ValueError,
            "dct_crop: box must be (top, left, height, width) in blocks, got (0, 1)",
            lambda: dct_crop(x, (0, 1)),
        ),
        Refusal(TypeError, "dct_crop: each of box must be an int, got 0.5", lambda: dct_crop(x, (0.5, 0, 1, 1))),
        *(
            Refusal(
                ValueError,
                f"dct_crop: box (top, left, height, width) = {box} {within}",
                lambda box=box: dct_crop(x, box),
            )
            for box in ((-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0), (1, 0, 2, 1), (0, 2, 1, 2))
        ),
    ]


FLIPS: list[tuple[Any, ...]] = [(-3,), (-2,)]
TURNS: list[tuple[Any, ...]] = [(), (-1,), (0,), (2,), (7,)]

OPS = (
    Op(
        "dct_flip", dct_flip, flip_by_frequency, samples_with(FLIPS), small_with(FLIPS), sizes_with(-3), (0, 1, 2),
        large_with(-2), flip_refusals,
    ),
    Op(
        "dct_rot90", dct_rot90, turn_by_frequency, samples_with(TURNS), small_with([(), (2,)]), sizes_with(3), (0, 1, 2),
        large_with(1), turn_refusals,
    ),
    Op(
        "dct_crop", dct_crop, crop_by_frequency, crop_samples, small_with([((0, 1, 1, 1),)]), sizes_with((1, 0, 1, 2)),
        (0, 1, 2), large_with((90, 3, 11, 100)), crop_refusals,
    ),
    Op(
        "dct_downscale2", dct_downscale2, reference.dct_downscale2, samples_with([()]), small_with([()], (2, 1)),
        sizes_with(), (0,), large_with(), lambda: refusals_of("dct_downscale2", dct_downscale2),
    ),
)  # fmt: skip

test_op = battery.tests_of(OPS)


def test_every_refusal_is_tested():
    assert not battery.unreached_raises(OPS, blockdct_domain, [])


# ---- pixels --------------------------------------------------------------------------------------------------------------


def pixels(coefs: Tensor) -> np.ndarray:
    """[.., h, w, 64] to the image [.., 8h, 8w], by another library."""
    *lead, h, w, _ = coefs.shape
    blocks = scipy.fft.idctn(coefs.double().numpy().reshape(*lead, h, w, 8, 8), axes=(-2, -1), norm="ortho")
    return np.moveaxis(blocks, -2, -3).reshape(*lead, 8 * h, 8 * w)


def agree(coefs: Tensor, image: np.ndarray) -> None:
    assert_close(torch.from_numpy(pixels(coefs)), torch.from_numpy(np.ascontiguousarray(image)), "pixels")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("make", [randn, integers])
def test_agrees_with_pixels(make, grid):
    coefs = make(2, *grid, 64)
    image = pixels(coefs)
    for result, expected in (
        (dct_flip(coefs, -3), image[:, ::-1]),
        (dct_flip(coefs, 1), image[:, ::-1]),
        (dct_flip(coefs, -2), image[..., ::-1]),
        (dct_flip(coefs, 2), image[..., ::-1]),
        *((dct_rot90(coefs, k), np.rot90(image, k, (-2, -1))) for k in range(-2, 6)),
        (dct_crop(coefs, (grid[0] - 1, 0, 1, grid[1])), image[:, -8:]),
    ):
        assert result.dtype == coefs.dtype
        agree(result, expected)


def test_references_agree_with_frequencies():
    """The pixel meaning in fourfold.reference is what the battery compared with, of integers too."""
    for dtype in (torch.float64, torch.int16):
        coefs = integers(2, 3, 4, 64, dtype=dtype)
        pairs = [
            *((reference.dct_flip(coefs, dim), flip_by_frequency(coefs, dim)) for dim in (-3, -2, 1, 2)),
            *((reference.dct_rot90(coefs, k), turn_by_frequency(coefs, k)) for k in range(-1, 5)),
            (reference.dct_crop(coefs, (1, 2, 2, 1)), crop_by_frequency(coefs, (1, 2, 2, 1))),
        ]
        for actual, exact in pairs:
            assert actual.dtype == dtype
            assert_close(actual.double(), exact, "reference")


@pytest.mark.parametrize("grid", [(2, 4), (1, 1), (3, 2), (2, 5)])
def test_downscale_is_the_mean_of_pixels(grid):
    coefs = integers(*grid, 64) // 16
    image = pixels(coefs)
    image = np.pad(image, [(0, -n % 16) for n in image.shape], mode="edge")
    result = dct_downscale2(coefs)
    assert result.dtype == torch.float32
    mean = (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4
    assert_close(result, ff.block_dct(torch.from_numpy(mean)[None, None], layout="blocks")[0, 0], "mean")


def test_a_quarter_turn_transposes_the_table():
    """So that dequantising commutes with turning."""
    coefs, table = integers(3, 2, 64) // 256, torch.arange(1, 65)
    turned_table = table.view(8, 8).T.flatten()
    for k in (1, 3):
        assert_same(
            ff.dct_normalize(dct_rot90(coefs, k), turned_table, layout="blocks"),
            dct_rot90(ff.dct_normalize(coefs, table, layout="blocks"), k),
            f"k={k}",
        )


def test_a_flip_moves_the_padding_to_the_front():
    """What the docstring says of images that are not whole blocks."""
    image = torch.rand(1, 1, 8, 13, dtype=torch.float64)
    flipped = ff.block_idct(dct_flip(ff.block_dct(image, layout="blocks"), -2), layout="blocks")
    assert_close(flipped[..., 3:], image.flip(-1), "the image")
    assert_close(flipped[..., :3], image[..., -1:].expand(1, 1, 8, 3), "the padding")


def test_integers_stay_exact():
    """Twice there and back, at the ends of the range."""
    coefs = integers(2, 3, 64)
    coefs[0, 0, :8] = torch.tensor([32767, -32767] * 4, dtype=torch.int16)
    for dim in (-3, -2):
        assert torch.equal(dct_flip(dct_flip(coefs, dim), dim), coefs)
    assert torch.equal(dct_rot90(dct_rot90(coefs, 1), -1), coefs)
    assert torch.equal(dct_rot90(coefs, 2), dct_flip(dct_flip(coefs, -3), -2))
    lowest = torch.full((1, 1, 64), -32768, dtype=torch.int16)
    assert torch.equal(dct_rot90(lowest, 4), lowest)  # nothing is negated
    assert dct_flip(lowest.float(), -2)[0, 0, 1] == 32768


@pytest.mark.parametrize("dtype", [torch.int16, *battery.FLOATING])
def test_no_images(dtype):
    none = torch.zeros(0, 3, 2, 64, dtype=dtype)
    for result, grid in (
        (dct_flip(none, -2), (3, 2)),
        (dct_rot90(none), (2, 3)),
        (dct_rot90(none, 2), (3, 2)),
        (dct_crop(none, (0, 0, 1, 1)), (1, 1)),
        (dct_downscale2(none), (2, 1)),
    ):
        assert result.shape == (0, *grid, 64)


@pytest.mark.parametrize("dtype", [torch.int16, *battery.FLOATING])
def test_copies_and_views(dtype):
    coefs = torch.ones(3, 3, 64, dtype=dtype)
    assert dct_rot90(coefs, 0).data_ptr() != coefs.data_ptr()
    assert dct_crop(coefs, (0, 0, 2, 2)).data_ptr() == coefs.data_ptr()


def test_integers_compile_and_map():
    coefs = integers(2, 3, 64)

    def all_of_them(c: Tensor) -> tuple[Tensor, ...]:
        return dct_flip(c, -2), dct_rot90(c), dct_crop(c, (0, 1, 2, 2)), dct_downscale2(c)

    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    mapped = torch.func.vmap(all_of_them)(torch.stack([coefs, coefs.flip(0)]))
    with FakeTensorMode() as mode:
        fakes = all_of_them(mode.from_tensor(coefs))
    results = zip(all_of_them(coefs), compiled(coefs), mapped, fakes, strict=True)
    for place, (real, other, pair, fake) in enumerate(results):
        assert_same(other, real, "compiled")
        for mapped_alone, exact in ((pair[0], real), (pair[1], all_of_them(coefs.flip(0))[place])):
            assert mapped_alone.dtype == real.dtype
            assert_close(mapped_alone.double(), exact.double(), "mapped", computed_in=torch.float32)
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_downscale_of_a_grid_whose_size_the_compiler_does_not_know():
    compiled = torch.compile(dct_downscale2, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in ((4, 4), (3, 4), (5, 7), (7, 5)):
        coefs = randn(2, *grid, 64)
        torch.testing.assert_close(compiled(coefs), dct_downscale2(coefs))


@pytest.mark.parametrize("size", [(16, 32), (17, 9), (24, 25), (1, 1), (8, 40)])
def test_half_the_chroma_of_444_is_the_chroma_of_420(size):
    """Box filter after replicating edges at full resolution, as rgb_to_dct defines it."""
    plane = torch.rand(1, 1, *size, dtype=torch.float64)
    full = ff.block_dct(plane, layout="blocks")
    padded = reference.edge_pad(plane, 16)
    halved = ff.block_dct(reference.box_mean(padded), layout="blocks")
    assert_close(dct_downscale2(full), halved, "chroma")


# ---- edge_pad, which DctDataset pads with --------------------------------------------------------------------------------

FRAMES = [  # size in pixels, blocks before, blocks of the frame
    ((8, 8), (0, 0), (1, 1)),
    ((8, 16), (1, 0), (2, 4)),
    ((13, 8), (0, 2), (3, 4)),
    ((1, 1), (1, 1), (4, 3)),
    ((23, 31), (2, 1), (5, 5)),
    ((24, 33), (0, 0), (3, 5)),
]


@pytest.mark.parametrize(("size", "before", "blocks"), FRAMES)
def test_edge_pad_repeats_pixels(size, before, blocks):
    """The image's own, not those that fill up its last block."""
    image = randn(2, *(8 * math.ceil(n / 8) for n in size)).numpy()
    coefs = ff.block_dct(torch.from_numpy(image)[None], layout="blocks")[0]
    widths = [(8 * b, 8 * (n - b) - s) for s, b, n in zip(size, before, blocks, strict=True)]
    expected = np.pad(image[:, : size[0], : size[1]], [(0, 0), *widths], mode="edge")
    padded = blockdct_domain.edge_pad(coefs, size, before, blocks)
    agree(padded, expected)
    assert_close(padded, reference.dct_edge_pad(coefs, size, before, blocks), "reference")
    narrow = blockdct_domain.edge_pad(coefs.float(), size, before, blocks)
    assert_close(narrow, padded, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(blockdct_domain.edge_pad(coefs.float(), size, before, blocks), narrow, "autocast")
