"""The CUDA sources compiled for the CPU and run thread by thread, see gpu/cuda_on_host.h."""

import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from gpu import cases_blockdct as blockdct
from gpu import cases_blockdct_rgb as rgb
from gpu import cases_maskmm as maskmm
from gpu.harness import DTYPES

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation needs g++")
    path = tmp_path_factory.mktemp("emulation") / "fourfold_on_host.so"
    installed = Path(torch.__file__).parent
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
    ]
    command += [
        "-fsanitize=alignment,bounds",
        "-fno-sanitize-recover=all",
    ]  # vector accesses must be aligned, as on a GPU
    command += [
        f"-I{HERE / 'gpu'}",
        f"-I{HERE.parent / 'csrc'}",
        "-isystem",
        f"{installed / 'include'}",
    ]
    command += [
        f"{HERE / 'gpu/emulate.cpp'}",
        f"-L{installed / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
    ]
    built = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def ops(library):
    return torch.ops.fourfold_on_host


def test_division(library):
    draw = random.Random(0)
    divisors = [
        *range(1, 70),
        *(2**k + d for k in range(7, 31) for d in (-1, 0, 1)),
        *(draw.randrange(1, 2**31) for _ in range(200)),
    ]
    for d in divisors:
        multiple = d * draw.randrange(1, 2**31 // d + 1)
        for n in (
            0,
            1,
            d - 1,
            d,
            multiple - 1,
            min(multiple, 2**31 - 1),
            2**31 - 1,
            draw.randrange(2**31),
        ):
            assert library.quotient(n, d) == n // d, (n, d)


@pytest.mark.parametrize("dtype", DTYPES, ids=blockdct.name_of)
@pytest.mark.parametrize("layout", blockdct.LAYOUTS)
@pytest.mark.parametrize("n", blockdct.SIZES)
def test_matches_the_reference(ops, n, layout, dtype):
    blockdct.matches(ops, n, layout, dtype, CPU)


def test_many_tiles(ops):
    blockdct.many_tiles(ops, CPU)


def test_nothing_to_do(ops):
    blockdct.nothing_to_do(ops, CPU)


def test_refusals(ops):
    with pytest.raises((RuntimeError, ValueError), match="scale must be"):
        ops.block_dct(torch.zeros(1, 3, 8, 8), 8, "planar", None, torch.ones(2, 64), 0.0)
    with pytest.raises((RuntimeError, ValueError), match="out has shape"):
        ops._block_dct_out(
            torch.zeros(1, 3, 8, 8),
            8,
            "planar",
            None,
            None,
            0.0,
            torch.zeros(1, 3, 8, 8),
        )


@pytest.mark.parametrize("pixels", rgb.PIXELS, ids=blockdct.name_of)
@pytest.mark.parametrize("layout", rgb.LAYOUTS)
@pytest.mark.parametrize("subsampling", rgb.SUBSAMPLINGS)
def test_rgb_matches_the_reference(ops, subsampling, layout, pixels):
    rgb.matches(ops, subsampling, layout, pixels, CPU)


def test_rgb_many_tiles(ops):
    rgb.many_tiles(ops, CPU)


def test_rgb_nothing_to_do(ops):
    rgb.nothing_to_do(ops, CPU)


def test_rgb_refusals(ops):
    def refuses(match, image, *options):
        with pytest.raises((RuntimeError, ValueError), match=match):
            ops.rgb_to_dct(image, *options)

    image = torch.zeros(1, 3, 8, 8)
    refuses("rgb must be", torch.zeros(1, 4, 8, 8), "4:2:0", "planar", None, None, torch.float32)
    refuses("rgb must be", image.int(), "4:2:0", "planar", None, None, torch.float32)
    refuses("H and W of at least 1", image[:, :, :0], "4:2:0", "planar", None, None, torch.float32)
    refuses("subsampling must be", image, "4:1:1", "planar", None, None, torch.float32)
    refuses("layout must be", image, "4:2:0", "interleaved", None, None, torch.float32)
    refuses("freqs must lie", image, "4:2:0", "planar", [64], None, torch.float32)
    refuses("dtype must be", image, "4:2:0", "planar", None, None, torch.int16)
    refuses("scale must be", image, "4:2:0", "planar", None, torch.ones(1, 64), torch.float32)
    refuses("scale must be", image, "4:2:0", "planar", None, torch.ones(3, 64), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=maskmm.name_of)
def test_mask_places(ops, dtype):
    maskmm.places_match(ops, dtype, CPU, shapes=((1, 1), (5, 65), (9, 330)))


def test_mask_starts_of_many_pieces(ops):
    """So many that hundreds of blocks scan them, and one block their totals in three rounds."""
    bits = torch.randint(256, (1100, 8 * 1000), dtype=torch.uint8)
    ones = sum(bits >> i & 1 for i in range(8)).view(-1, 8).sum(1)
    expected = torch.nn.functional.pad(ones.cumsum(0), (1, 0))
    assert torch.equal(ops._mask_starts(bits, 64000, 64), expected)


def test_masks_of_wrong_counts(ops):
    maskmm.wrong_counts(ops, CPU)


def test_masks_off_words(ops):
    maskmm.off_words(ops, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=maskmm.name_of)
def test_topk(ops, dtype):
    maskmm.topk_matches(ops, dtype, CPU, shapes=((1, 1), (5, 65), (6, 3, 3, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=maskmm.name_of)
def test_topk_over_several_blocks(ops, dtype):
    maskmm.topk_matches(ops, dtype, CPU, shapes=((140, 130),))


@pytest.mark.parametrize("dtype", DTYPES, ids=maskmm.name_of)
def test_sparse_linear(ops, dtype):
    maskmm.sparse_matches(ops, dtype, CPU, rows=(1, 9), shapes=((1, 1), (20, 130)))


def test_sparse_linear_of_many_rows(ops):
    maskmm.sparse_matches(ops, torch.float32, CPU, rows=(70,), shapes=((9, 130),))
    maskmm.sparse_matches(ops, torch.float32, CPU, rows=(2,), shapes=((130, 70),))


def test_sparse_linear_of_wide_rows(ops):
    maskmm.wide_rows_match(ops, CPU)


def test_mask_refusals(ops):
    def refuses(match, op, *arguments):
        with pytest.raises((RuntimeError, ValueError), match=match):
            op(*arguments)

    scores = torch.zeros(2, 70)
    bits, starts = torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    refuses("density must lie", ops.topk_mask, scores, 0.0, True)
    refuses("scores must be", ops.topk_mask, scores.int(), 0.5, True)
    refuses(r"scores must be \[N, K\]", ops.topk_mask, scores[0], 0.5, True)
    refuses("slab must be", ops._mask_starts, bits, 70, 48)
    refuses("bits of 2 rows of 130", ops._mask_starts, bits, 130, 64)
    refuses("nnz must lie in 0..256", ops._mask_columns, bits, 257)
    refuses("nnz must lie in 0..140", ops._gather_mask, scores, bits, -1)
    refuses("bits must be uint8", ops._gather_mask, scores, bits.int(), 0)
    refuses(r"values must be \[nnz\]", ops._scatter_mask, scores, bits, 70)
    x, values = torch.zeros(1, 70), torch.zeros(3)
    refuses("format must be", ops._sparse_linear, x, values, bits, starts, None, None, "coo")
    refuses("columns must be", ops._sparse_linear, x, values, bits, starts, None, None, "csr16")
    refuses("values must have the dtype", ops._sparse_linear, x, values.half(), bits, starts, None, None, "bitmap")
    refuses("starts of 2 rows", ops._sparse_linear, x, values, bits, starts[:2], None, None, "bitmap")
    refuses("bias must be", ops._sparse_linear, x, values, bits, starts, None, torch.zeros(3), "bitmap")
    refuses("grad must be", ops._sparse_linear_transposed, x, values, bits, starts, None, 70, "bitmap")
