"""Cases of tests/test_triton_interpreter.py: run with TRITON_INTERPRET=1."""

import os
import types

import pytest
import torch
import triton
import triton.language as tl
from fourfold import triton_kernels
from fourfold.ops import coordconv as coordconv_functions
from fourfold.triton_kernels import add_map, batch_sum, coord_tables, coord_tables_backward, dct_normalize, normalize_grids
from fourfold.triton_kernels import cca as cca_kernels
from fourfold.triton_kernels import coordconv as coordconv_kernels
from fourfold.triton_kernels import maskmm as maskmm_kernels
from gpu import cases_blockdct as blockdct
from gpu import cases_cca as cca
from gpu import cases_coordconv as coordconv
from gpu import cases_maskmm as maskmm
from gpu import harness
from gpu.harness import DTYPES

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton_interpreter.py"


@pytest.mark.parametrize("dtype", DTYPES, ids=blockdct.name_of)
@pytest.mark.parametrize("layout", ["planar", "blocks"])
def test_dct_normalize(layout, dtype):
    rtol = 2**-7 if dtype == torch.bfloat16 else 0.0  # the interpreter truncates to bfloat16; GPUs round
    blockdct.normalize_matches(dct_normalize, layout, dtype, torch.device("cpu"), rtol)


@pytest.mark.parametrize("dtype", DTYPES, ids=blockdct.name_of)
def test_normalize_grids(dtype):
    blockdct.grids_match(normalize_grids, dtype, torch.device("cpu"), 2**-7 if dtype == torch.bfloat16 else 0.0)


def test_nothing_to_do():
    table = torch.ones(1, 64)
    for shape, freqs in (
        ((0, 3, 4, 64), None),
        ((2, 0, 4, 64), None),
        ((2, 3, 4, 64), []),
    ):
        y = dct_normalize(
            torch.zeros(shape, dtype=torch.int16),
            table,
            None,
            None,
            freqs,
            "planar",
            torch.float32,
        )
        assert y.numel() == 0
        assert y.shape == (shape[0], 64 if freqs is None else 0, *shape[1:3])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coefs": torch.zeros(3, 4, 64)}, "coefs must be int16"),
        ({"qtable": torch.ones(2, 64)}, "G a divisor of 3"),
        (
            {"qtable": torch.ones(1, 64, dtype=torch.float64)},
            "qtable must be torch.float32",
        ),
        ({"mean": torch.ones(64)}, r"mean must be \[2\]"),
        ({"freqs": [0, 64]}, "freqs must lie in 0..63"),
        ({"freqs": [3, 3]}, "not repeat"),
        ({"layout": "interleaved"}, "layout must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change, words):
    coefs = torch.zeros(3, 2, 4, 64, dtype=torch.int16)
    given = {
        "coefs": coefs,
        "qtable": torch.ones(1, 64),
        "mean": None,
        "std": None,
        "freqs": [0, 1],
        "layout": "planar",
    }
    with pytest.raises(ValueError, match=words):
        dct_normalize(**{**given, **change}, dtype=torch.float32)


# ---- coordconv ----

CPU = torch.device("cpu")
LAUNCHERS = {
    "_coord_tables": coord_tables,
    "_coord_tables_backward": coord_tables_backward,
    "_add_map_": add_map,
    "_batch_sum": batch_sum,
}
OPS = types.SimpleNamespace(**LAUNCHERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=coordconv.name_of)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_coord_tables(rank, dtype):
    coordconv.tables_match(OPS, rank, dtype, CPU, trials=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=coordconv.name_of)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_add_map(rank, dtype, monkeypatch):
    monkeypatch.setattr(coordconv_kernels, "ENOUGH", 1)  # so that a program takes several images of these small batches
    rtol = 2**-7 if dtype == torch.bfloat16 else None  # the interpreter truncates to bfloat16; GPUs round
    coordconv.add_map_matches(OPS, rank, dtype, CPU, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES, ids=coordconv.name_of)
def test_batch_sum(dtype):
    coordconv.batch_sum_matches(OPS, dtype, CPU)


def test_wide_indices(monkeypatch):
    """Those of tensors with more than 2**31 elements, on small ones."""
    monkeypatch.setattr(coordconv_kernels, "_is_wide", lambda elements: elements > 0)
    for rank in (1, 2, 3):
        coordconv.add_map_matches(OPS, rank, torch.float32, CPU)
    coordconv.batch_sum_matches(OPS, torch.float32, CPU)


def test_no_batch():
    coordconv.nothing_to_do(OPS, CPU)


def test_not_numbers():
    coordconv.not_numbers(OPS, CPU)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=coordconv.name_of)
def test_coord_conv(dtype, last, monkeypatch):
    """The public functions on these launchers, gradients included."""
    for name, launcher in LAUNCHERS.items():
        monkeypatch.setattr(coordconv_functions, name, launcher)
    coordconv.whole_matches(dtype, last, CPU)


@triton.jit
def _digits_kernel(n, quotient, rest, radix, word, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    high, low = coordconv_kernels._digit(tl.load(n + place), radix, word, False)
    tl.store(quotient + place, high)
    tl.store(rest + place, low)


@pytest.mark.parametrize("radix", [1, 2, 3, 5, 7, 8, 76, 361, 4096, 65537, 1234567, 2**30, 2**30 + 1, 2**31 - 1])
def test_division_without_a_division(radix):
    """Over all 31 bits, next to the multiples above all."""
    multiples = torch.randint(1, 2**31 // radix + 1, (256,)) * radix
    edges = torch.tensor([0, 1, radix - 1, radix, radix + 1, 2**31 - 2, 2**31 - 1])
    n = torch.cat([multiples, multiples - 1, multiples + 1, edges, torch.randint(2**31, (1024 - 3 * 256 - len(edges),))])
    n = n.clamp(0, 2**31 - 1).to(torch.int32)
    quotient, rest = torch.empty_like(n), torch.empty_like(n)
    _digits_kernel[(1,)](n, quotient, rest, radix, coordconv_kernels._word(radix), BLOCK=1024)
    assert torch.equal(quotient, n // radix)
    assert torch.equal(rest, n % radix)


def plan():
    return coordconv.plan_of_layer((4, 5), 3, CPU)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coord_weight": torch.zeros(6, 2, 3, 3, dtype=torch.float16)}, "coord_weight must be torch.float32"),
        ({"coord_weight": torch.zeros(6, 2, 3, 5)}, "taps must be contiguous"),
        ({"coord_weight": torch.zeros(6, 2)}, "for each of 1 to 3 axes"),
        ({"taps": torch.zeros(27, dtype=torch.float16)}, "taps must be float32 or float64"),
        ({"valid": torch.zeros(18, dtype=torch.float64)}, "valid must be contiguous torch.float32"),
        ({"out_size": (4, 6)}, "taps must be contiguous"),
        ({"class_count": (3, 0)}, "class_count must be a positive number"),
        ({"channels": (0, 2)}, "channels must be one below 2 for each axis"),
        ({"channels": (1, 1)}, "channels must be one below 2 for each axis"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals_of_coord_tables(change, words):
    p = plan()
    given = {"coord_weight": torch.zeros(6, 2, 3, 3), "taps": p.taps, "valid": p.valid, "out_size": (4, 5)}
    given |= {"class_count": p.class_count, "channels": p.channels, "channels_last": False}
    with pytest.raises(ValueError, match=words):
        coord_tables(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"map_grad": torch.zeros(6, 4, 5, dtype=torch.float64)}, "map_grad must be torch.float32"),
        ({"map_grad": torch.zeros(6, 4, 6)}, "taps must be contiguous"),
        ({"classes": torch.zeros(9, dtype=torch.int64)}, "classes must be contiguous torch.int32"),
        ({"kernel": (3,)}, "kernel must be a positive number for each"),
        ({"coord_channels": 1}, "channels must be one below 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals_of_coord_tables_backward(change, words):
    p = plan()
    given = {"map_grad": torch.zeros(6, 4, 5), "taps": p.taps, "valid": p.valid, "classes": p.classes, "kernel": (3, 3)}
    given |= {"class_count": p.class_count, "channels": p.channels, "coord_channels": 2}
    with pytest.raises(ValueError, match=words):
        coord_tables_backward(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y": torch.zeros(2, 6, 4, 5, dtype=torch.int32)}, "y must be floating"),
        ({"y": torch.zeros(2, 6, 5, 4).mT}, "contiguous or channels_last"),
        ({"y": torch.zeros(6, 4)}, r"y must be floating \[B, C, \*size\]"),
        ({"y": torch.zeros(2, 4, 5, 6).movedim(-1, 1)}, "tables must be torch.float32 .* in y's memory order"),
        ({"tables": torch.zeros(6, 26)}, "tables must be"),
        ({"tables": torch.zeros(6, 27, dtype=torch.float16)}, "tables must be torch.float32"),
        ({"classes": torch.zeros(8, dtype=torch.int32)}, r"classes must be contiguous torch.int32 \[9\]"),
        ({"class_count": (3, 3, 3)}, "class_count must be"),
        ({"dense": torch.zeros(6, 5, 4)}, "dense must be"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"activated": torch.zeros(2, 6, 4, 6)}, "activated must be torch.float32"),
        ({"activated": torch.zeros(2, 4, 5, 6).movedim(-1, 1)}, "activated must be .* in the same order"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals_of_add_map(change, words):
    p = plan()
    assert p.table_length == 27
    given = {"y": torch.zeros(2, 6, 4, 5), "tables": torch.zeros(6, 27), "classes": p.classes, "class_count": p.class_count}
    given |= {"dense": None, "activation": "relu", "activated": None}
    with pytest.raises(ValueError, match=words):
        add_map(**{**given, **change})


@pytest.mark.parametrize(
    ("grad", "relu_output", "words"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.int32), None, "grad must be floating"),
        (torch.zeros(2, 3), None, r"grad must be floating \[B, C, \*size\]"),
        (torch.zeros(2, 3, 4).mT, None, "contiguous or channels_last"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, 4), "relu_output must be torch.float32"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.float16), "relu_output must be torch.float32"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, 3).movedim(-1, 1), "relu_output must be .* in the same order"),
    ],
)
def test_refusals_of_batch_sum(grad, relu_output, words):
    with pytest.raises(ValueError, match=words):
        batch_sum(grad, relu_output)


# ---- maskmm ----

# The launchers under the names of their ops.
MASKMM = types.SimpleNamespace(
    **{
        name: getattr(triton_kernels, name.strip("_"))
        for name in (
            *("pack_mask", "unpack_mask", "bernoulli_mask", "threshold_mask", "_apply_mask", "_mask_gradients"),
            *("_masked_linear", "_masked_linear_backward", "sddmm", "_superpose", "_masked_dots", "task_linear"),
            *("_task_linear_transposed", "_task_outer"),
        )
    }
)


@pytest.fixture
def interpretable(monkeypatch):
    """Sums in fewer parts, which take the interpreter long; bfloat16 factors widened, which it can't multiply; and its bfloat16
    results, which it truncates where GPUs round."""
    monkeypatch.setitem(harness.TOLERANCE, torch.bfloat16, (2**-7, harness.TOLERANCE[torch.bfloat16][1]))
    monkeypatch.setattr(maskmm_kernels, "PARTS", 4)
    factor_type = maskmm_kernels._factor_type
    monkeypatch.setattr(
        maskmm_kernels, "_factor_type", lambda dtype: tl.float32 if dtype == torch.bfloat16 else factor_type(dtype)
    )


def test_bits():
    maskmm.bits_match(MASKMM, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=maskmm.name_of)
def test_samplers(dtype):
    maskmm.samplers_match(MASKMM, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=maskmm.name_of)
def test_effective_weights(dtype, interpretable):
    maskmm.effective_matches(MASKMM, dtype, CPU, shapes=((5, 65), (3, 3, 3, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=maskmm.name_of)
def test_masked_linear(dtype, interpretable):
    # An effective weight that is rounded to bfloat16 on the way is another one where it is truncated.
    options = maskmm.SIGNS_AND_RESCALES if dtype != torch.bfloat16 else ((False, ""), (True, ""))
    maskmm.linear_matches(MASKMM, dtype, CPU, rows=(3, 40), shapes=((5, 65), (33, 70)), options=options)


def test_masked_linear_by_the_vendor(interpretable):
    maskmm.linear_matches(MASKMM, torch.float16, CPU, rows=(150,), shapes=((5, 65),))


def test_split_products(interpretable):
    maskmm.linear_matches(MASKMM, torch.float16, CPU, rows=(1,), shapes=((40, 1100),), options=((False, "dwr"),))
    maskmm.linear_matches(MASKMM, torch.float32, CPU, rows=(1,), shapes=((600, 40),), options=((True, ""),))


@pytest.mark.parametrize("dtype", DTYPES, ids=maskmm.name_of)
def test_sddmm(dtype, interpretable):
    maskmm.sddmm_matches(MASKMM.sddmm, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=maskmm.name_of)
def test_superposed(dtype, interpretable):
    maskmm.superposed_match(MASKMM, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=maskmm.name_of)
def test_tasks(dtype, interpretable):
    maskmm.tasks_match(MASKMM, dtype, CPU, leads=((5,), (3, 2), (2, 9)), shapes=((33, 100),))


def test_tasks_in_other_sizes():
    maskmm.tasks_match(MASKMM, torch.float32, CPU, leads=((1,), (1, 2, 40)), shapes=((5, 65),))


def test_tasks_that_there_are_not():
    maskmm.unknown_tasks(MASKMM, CPU)


def test_many_masks_in_several_shares(monkeypatch):
    """Few tiles and many masks: programs share the masks out."""
    monkeypatch.setattr(maskmm_kernels, "ENOUGH", 8)
    maskmm.superposed_match(MASKMM, torch.float32, CPU)


SCORES = torch.zeros(2, 70)
BITS = torch.zeros(2, 16, dtype=torch.uint8)
MASKED = (SCORES, BITS, None, None, "one", False, "")
BANK = torch.zeros(3, 2, 16, dtype=torch.uint8)
TASK = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("op", "given", "words"),
    [
        ("pack_mask", (SCORES,), "mask must be bool"),
        ("unpack_mask", (BITS, 150), r"bits must be uint8 \(2, 24\)"),
        ("bernoulli_mask", (SCORES, torch.zeros(2, dtype=torch.int64), 0), "seed must be one int64"),
        ("bernoulli_mask", (SCORES.int(), TASK[:1], 0), "scores must be float16"),
        ("threshold_mask", (SCORES[0], 0.0), r"scores must be \[N, K\]"),
        ("_apply_mask", (SCORES, BITS, None, True, "", torch.float32), "signed needs scores"),
        ("_apply_mask", (SCORES, BITS, None, False, "twice", torch.float32), "rescale must be"),
        ("_apply_mask", (SCORES, BITS, None, False, "", torch.int32), "dtype must be"),
        ("_mask_gradients", (SCORES.T, SCORES, BITS, None, "one", False, "", [True, False]), r"grad must be \(2, 70\)"),
        ("_mask_gradients", (SCORES, SCORES, BITS, SCORES, "two", False, "", [True, True]), "slope must be"),
        ("_masked_linear", (SCORES[:, :69], *MASKED), r"x must be \(2, 70\)"),
        ("_masked_linear", (SCORES, SCORES, BITS, SCORES[0], None, "one", False, ""), r"bias must be \(2,\)"),
        ("sddmm", (SCORES, SCORES.T, BITS, 0), "a .* and b .* of one dtype"),
        ("sddmm", (torch.zeros(2, 5), torch.zeros(70, 5), BITS, 141), "nnz must lie in 0..140"),
        ("_superpose", (SCORES, BITS, torch.zeros(2)), r"masks must be \[T, 2, 16\]"),
        ("_superpose", (SCORES, BANK, torch.zeros(2)), r"alpha must be \(3,\)"),
        ("_masked_dots", (SCORES, SCORES[:1], BANK), r"b must be \(2, 70\)"),
        ("task_linear", (torch.zeros(4, 69), SCORES, BANK, TASK, None), r"x must be \(4, 70\)"),
        ("task_linear", (torch.zeros(4, 70), SCORES, BANK, TASK.int(), None), r"task must be int64 \(4,\)"),
        ("_task_outer", (torch.zeros(4, 2), torch.zeros(3, 70), BANK, TASK), r"grad must be \(3, 2\)"),
    ],
)
def test_refusals_of_maskmm(op, given, words):
    with pytest.raises(ValueError, match=f"{op}: {words}"):
        getattr(MASKMM, op)(*given)


# ---- cca ----

CCA = types.SimpleNamespace(
    **{
        name: getattr(triton_kernels, name.strip("_"))
        for name in ("_pack_samples", "_add_wide_", "_count_nonfinite", "_gram_", "_image_spectra", "_spectra_gram_")
    }
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Of a Gram matrix, in few steps; 16-bit factors widened: the interpreter takes bfloat16 for integers, and is slow."""
    large, small = 32, 16
    for name in ("ALONG", "ALONG_PIECES", "SUMS"):
        monkeypatch.setattr(cca_kernels, name, 256)
    monkeypatch.setattr(cca_kernels, "PROGRAMS", {large: (4, 2), small: (6, 1)})
    monkeypatch.setattr(cca_kernels, "PRODUCT", {large: {}, small: {}})
    monkeypatch.setattr(cca_kernels, "BLOCK", large)
    monkeypatch.setattr(cca_kernels, "SMALL", small)
    monkeypatch.setattr(cca_kernels, "_factor_type", lambda dtype: tl.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=cca.name_of)
def test_pack_samples(dtype):
    panels, styles = (cca.PANELS, cca.STYLES) if dtype == torch.bfloat16 else (cca.PANELS[1:2], cca.STYLES[:2])
    cca.pack_matches(CCA, dtype, CPU, panels, styles)


def test_add_wide():
    cca.add_wide_matches(CCA, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=cca.name_of)
def test_count_nonfinite(dtype):
    cca.count_matches(CCA, dtype, CPU)


@pytest.mark.parametrize("dtype", cca.HALVES, ids=cca.name_of)
def test_gram(dtype, small_tiles):
    if dtype == torch.bfloat16:
        cca.grams_match(CCA, dtype, CPU, ((3, 24, 40, 8), (2, 34, 18, 36), (5, 9, 13, 49), (70, 16, 12, 1)))
        cca.grams_match(CCA, dtype, CPU, cca.GRAMS[-1:], cca.STYLES[:2])  # three chunks
    else:
        cca.grams_match(CCA, dtype, CPU, cca.GRAMS[:1], cca.STYLES[:2])


def test_gram_of_real_numbers(small_tiles):
    cca.gram_rounds_little(CCA, torch.float16, CPU, (3, 20, 24, 400))


def test_gram_in_large_tiles(monkeypatch):
    monkeypatch.setattr(cca_kernels, "_factor_type", lambda dtype: tl.float32)
    monkeypatch.setattr(cca_kernels, "SUMS", 1024)
    cca.grams_match(CCA, torch.bfloat16, CPU, ((3, 130, 66, 12),), cca.STYLES[:1])


def test_gram_of_nothing():
    cca.nothing_to_multiply(CCA, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=cca.name_of)
def test_image_spectra(dtype):
    cca.spectra_match(CCA, dtype, CPU, cca.IMAGES if dtype == torch.float32 else cca.IMAGES[:2])
    if dtype == torch.float32:
        cca.spectra_match(CCA, dtype, CPU, ((3, 12, 9, 8),), cca.STYLES[:1])  # several programs each way


@pytest.mark.parametrize("dtype", cca.WIDE, ids=cca.name_of)
def test_spectra_gram(dtype, monkeypatch):
    cca.spectra_grams_match(CCA, dtype, CPU, cca.SPECTRA_GRAMS)
    monkeypatch.setattr(cca_kernels, "SPECTRA", 16)
    cca.spectra_grams_match(CCA, dtype, CPU, cca.SPECTRA_GRAMS[2:3])


def test_wide_indices_of_cca(small_tiles, monkeypatch):
    """Those of tensors with more than 2**31 elements, and a copy of what is not aligned in parts, on small ones."""
    monkeypatch.setattr(cca_kernels, "_is_wide", lambda elements: elements > 0)
    monkeypatch.setattr(cca_kernels, "REPACKED", 500)
    cca.pack_matches(CCA, torch.float32, CPU, cca.PANELS[1:2], cca.STYLES[::2])
    cca.count_matches(CCA, torch.bfloat16, CPU)
    cca.grams_match(CCA, torch.bfloat16, CPU, ((5, 9, 13, 49), (3, 24, 40, 8)), cca.STYLES[1::2])


X = torch.zeros(2, 3, 5)
HALF = X.bfloat16()
WIDE_3 = torch.zeros(3, dtype=torch.float64)
PACKED = (X, WIDE_3, 0, torch.zeros(4, 3), torch.zeros(4, dtype=torch.float64), torch.zeros(4))
TOTAL = torch.zeros(3, 3, dtype=torch.float64)
IMAGES = (torch.zeros(4, 3, 2, 5), torch.zeros(3, 2, 5, dtype=torch.float64), torch.zeros(6, 2, 4, 3))
PARTS = torch.zeros(6, 2, 4, 3)
PRODUCTS = (PARTS, PARTS, torch.zeros(6, 3, 3, dtype=torch.float64), torch.zeros(6, 3, 2, dtype=torch.float64))


def changed(given, place, value):
    return (*given[:place], value, *given[place + 1 :])


@pytest.mark.parametrize(
    ("op", "given", "words"),
    [
        ("_pack_samples", changed(PACKED, 0, X.int()), r"x must be .* \[N, C, S\], got torch.int32"),
        ("_pack_samples", changed(PACKED, 0, X[0]), r"x must be .* \[N, C, S\]"),
        ("_pack_samples", changed(PACKED, 1, WIDE_3.float()), r"pivot must be torch.float64 \[3\]"),
        ("_pack_samples", changed(PACKED, 2, 7), r"samples 7..11 must lie in 0..10"),
        ("_pack_samples", changed(PACKED, 2, -1), r"samples -1..3 must lie in 0..10"),
        ("_pack_samples", changed(PACKED, 3, torch.zeros(3, 4).T), "panel must be .* unit column stride"),
        ("_pack_samples", changed(PACKED, 3, torch.zeros(4, 3).half()), "panel must be torch.float32"),
        ("_pack_samples", changed(PACKED, 4, WIDE_3), r"sums must be torch.float64 \[4\]"),
        ("_pack_samples", changed(PACKED, 5, torch.zeros(4, dtype=torch.float64)), r"norms must be torch.float32 \[4\]"),
        ("_add_wide_", (TOTAL.float(), X[0, :, :3]), "total must be torch.float64"),
        ("_add_wide_", (TOTAL, X[0]), r"part must be torch.float32 \(3, 3\)"),
        ("_add_wide_", (TOTAL, X[0, :, :3].T), "part must be .* unit column stride"),
        ("_count_nonfinite", (X.int(),), "x must be float16"),
        ("_gram_", (X, X, TOTAL), "x must be torch.float16 or torch.bfloat16"),
        ("_gram_", (HALF, HALF.half(), TOTAL), "y must be torch.bfloat16"),
        ("_gram_", (HALF, HALF[:1], TOTAL), "x .* and y .* of the same N and S"),
        ("_gram_", (HALF, HALF[:, :2], TOTAL), r"total must be torch.float64 \(3, 2\)"),
        ("_gram_", (HALF, HALF, TOTAL.float()), r"total must be torch.float64 \(3, 3\)"),
        (
            "_image_spectra",
            changed(IMAGES, 0, IMAGES[0].int()),
            r"x must be a floating \[n, c, h, w\] with pixels, got torch.int32",
        ),
        ("_image_spectra", changed(IMAGES, 0, IMAGES[0][0]), r"x must be a floating \[n, c, h, w\]"),
        ("_image_spectra", changed(IMAGES, 0, IMAGES[0][..., :0]), "x must be a floating .* with pixels"),
        ("_image_spectra", changed(IMAGES, 1, IMAGES[1].float()), r"pivot must be torch.float64 \(3, 2, 5\)"),
        ("_image_spectra", changed(IMAGES, 2, PARTS[1:]), r"spectra must be float32 or float64 \(6, 2, 4, 3\)"),
        ("_image_spectra", changed(IMAGES, 2, PARTS.half()), "spectra must be float32 or float64"),
        ("_image_spectra", changed(IMAGES, 2, torch.zeros(6, 2, 3, 4).mT), "spectra must be .* with contiguous channels"),
        ("_spectra_gram_", changed(PRODUCTS, 0, PARTS.half()), r"a must be float32 or float64 \[F, 2, n, c\]"),
        ("_spectra_gram_", changed(PRODUCTS, 0, PARTS[:, 1:]), r"a must be float32 or float64 \[F, 2, n, c\]"),
        ("_spectra_gram_", changed(PRODUCTS, 1, PARTS.double()), r"b must be torch.float32 \[6, 2, 4, c\]"),
        ("_spectra_gram_", changed(PRODUCTS, 1, PARTS[:, :, 1:]), r"b must be torch.float32 \[6, 2, 4, c\]"),
        ("_spectra_gram_", changed(PRODUCTS, 2, PRODUCTS[2].mT), r"total must be torch.float64 .* contiguous rows"),
        ("_spectra_gram_", changed(PRODUCTS, 2, PRODUCTS[2].float()), r"total must be torch.float64 \(6, 3, 3\)"),
        ("_spectra_gram_", changed(PRODUCTS, 3, PRODUCTS[3].float()), r"sums must be contiguous torch.float64 \(6, 3, 2\)"),
    ],
)
def test_refusals_of_cca(op, given, words):
    with pytest.raises(ValueError, match=f"{op}: {words}"):
        getattr(CCA, op)(*given)
