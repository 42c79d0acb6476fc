"""The ops of spectra, which transform images and multiply their frequencies, against their references in plain torch."""

from __future__ import annotations

import math
from typing import Any

import battery
import pytest
import torch
from battery import Op, Refusal, Sample
from fourfold.ops._cca_ops import _image_spectra, _spectra_gram_
from fourfold.reference import REFERENCES
from torch import Tensor

SIZES = [(1, 1), (1, 2), (2, 1), (1, 7), (5, 1), (2, 2), (4, 4), (3, 5), (8, 6), (5, 12), (17, 9), (32, 32)]


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def half_plane(h: int, w: int) -> int:
    own = (2 - h % 2) * (2 - w % 2)
    return (h * w + own) // 2


def spectra_of(call: Any, x: Tensor, pivot: Tensor, dtype: torch.dtype, inside: bool = False) -> Tensor:
    """The op's result, in memory of its own or among the samples and channels of a larger tensor."""
    n, c, h, w = x.shape
    shape = (half_plane(h, w), 2, n, c)
    if not inside:
        result = torch.empty(shape, dtype=dtype)
        call(x, pivot, result)
        return result
    whole = torch.full((shape[0], 2, n + 3, c + 2), 7, dtype=dtype)
    result = whole[:, :, :n, 1:-1]
    call(x, pivot, result)
    return result


def transform(x: Tensor, pivot: Tensor, dtype: torch.dtype, inside: bool = False) -> Tensor:
    return spectra_of(_image_spectra, x, pivot, dtype, inside)


def transform_reference(x: Tensor, pivot: Tensor, dtype: torch.dtype, inside: bool = False) -> Tensor:
    return spectra_of(REFERENCES["_image_spectra"], x, pivot, dtype, inside)


def sample(dtype: torch.dtype, kind: torch.dtype, n: int, c: int, h: int, w: int, layout: str = "images") -> Sample:
    x = randn(n, c, h, w, dtype=kind) + 3
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "samples":
        x = x.permute(1, 3, 2, 0).contiguous().permute(3, 0, 2, 1)
    elif layout == "gaps":
        whole = x.new_full([2 * length + 1 for length in x.shape], float("nan"))
        x = whole[1::2, 1::2, 1::2, 1::2].copy_(x)
    return Sample(f"{kind} {n, c, h, w} {layout}", (x, randn(c, h, w, dtype=torch.float64), dtype, layout == "gaps"))


def samples(dtype: torch.dtype) -> list[Sample]:
    layouts = ("images", "channels_last", "samples", "gaps")
    found = [
        sample(dtype, kind, (1, 3, 2, 5)[(i + j) % 4], (3, 1, 8, 21)[(i + j) % 4], h, w, layouts[(i + i // 4) % 4])
        for j, kind in enumerate(battery.FLOATING)
        for i, (h, w) in enumerate(SIZES)
    ]
    return [*found, sample(dtype, torch.float32, 0, 3, 4, 5), sample(dtype, torch.float32, 4, 0, 4, 5)]


def refusals() -> list[Refusal]:
    wide = torch.float64
    good = (torch.zeros(6, 3, 4, 5), torch.zeros(3, 4, 5, dtype=wide), torch.zeros(11, 2, 6, 3, dtype=wide))
    x, pivot, spectra = good
    shared = torch.zeros(2000, dtype=wide)
    whole = shared[:396].view(spectra.shape)

    def refused(message: str, *, x: Tensor = x, pivot: Tensor = pivot, spectra: Tensor = spectra) -> Refusal:
        return Refusal(ValueError, f"_image_spectra: {message}", lambda: torch.ops.fourfold._image_spectra(x, pivot, spectra))

    kinds = "spectra must be [11, 2, 6, 3] in float32 or float64, got"
    expanded = "spectra must not be an expanded tensor, whose elements share memory"
    return [
        refused("x must be float16, bfloat16, float32 or float64", x=x.long()),
        refused("x must be [n, c, h, w] on the CPU, got (3, 4, 5)", x=x[0]),
        refused("x must have pixels, got (6, 3, 0, 5)", x=x[:, :, :0]),
        refused("x must have pixels, got (6, 3, 4, 0)", x=x[..., :0]),
        refused("pivot must be [3, 4, 5] in float64, got (3, 4, 5)", pivot=pivot.float()),
        refused("pivot must be [3, 4, 5] in float64, got (2, 4, 5)", pivot=pivot[1:]),
        refused("pivot must be [3, 4, 5] in float64, got (3, 3, 5)", pivot=pivot[:, 1:]),
        refused("pivot must be [3, 4, 5] in float64, got (3, 4, 4)", pivot=pivot[..., 1:]),
        refused("pivot must be [3, 4, 5] in float64, got (1, 3, 4, 5)", pivot=pivot[None]),
        refused(f"{kinds} (11, 2, 6, 3)", spectra=spectra.half()),
        refused(f"{kinds} (10, 2, 6, 3)", spectra=spectra[1:]),
        refused(f"{kinds} (11, 1, 6, 3)", spectra=spectra[:, 1:]),
        refused(f"{kinds} (11, 2, 5, 3)", spectra=spectra[:, :, 1:]),
        refused(f"{kinds} (11, 2, 6, 2)", spectra=spectra[..., 1:]),
        refused(f"{kinds} (11, 2, 6, 3, 1)", spectra=spectra[..., None]),
        refused("the channels of spectra must be contiguous", spectra=torch.zeros(11, 2, 6, 6, dtype=wide)[..., ::2]),
        refused("the channels of spectra must be contiguous", spectra=spectra[..., :1].expand(11, 2, 6, 3)),
        refused(expanded, spectra=spectra[:1].expand(11, 2, 6, 3)),
        refused(expanded, spectra=torch.zeros(600, dtype=wide).as_strided((11, 2, 6, 3), (36, 18, 2, 1))),
        refused("spectra must not share memory with x", x=shared[395:755].view(x.shape), spectra=whole),
        refused("spectra must not share memory with pivot", pivot=shared[395:455].view(pivot.shape), spectra=whole),
    ]  # fmt: skip


# ---- _spectra_gram_ --------------------------------------------------------------------------------------------------


def grams(call: Any, whole: Tensor, rows: int, with_sums: bool) -> Tensor:
    """The total and the sums, which begin at 1, of the first rows channels and those after one more."""
    a, b = whole[..., :rows], whole[..., rows + 1 :]
    total = a.new_ones(a.shape[0], a.shape[3], b.shape[3], dtype=torch.float64)
    sums = a.new_ones(a.shape[0], a.shape[3], 2, dtype=torch.float64)
    call(a, b, total, sums if with_sums else None)
    return battery.joined((total, sums))


def gram_sample(kind: torch.dtype, f: int, n: int, rows: int, columns: int, with_sums: bool = True) -> Sample:
    # Eighths, whose sums are exact in float32 too.
    whole = (randn(f, 2, n, rows + columns + 1, dtype=torch.float64) * 8).round().clamp(-24, 24).div(8).to(kind)
    return Sample(f"{kind} {f, n, rows, columns} {with_sums}, a channel is dropped", (whole, rows, with_sums))


GRAMS = [
    (1, 1, 1, 1),
    (2, 3, 5, 9),
    (3, 64, 16, 8),
    (2, 65, 7, 33),
    (1, 200, 40, 17),
    (2, 130, 1, 64),
    (2, 10, 31, 32),
    (1, 0, 3, 4),
    (0, 3, 3, 4),
]


def gram_samples(dtype: torch.dtype) -> list[Sample]:
    return [gram_sample(kind, *size, i % 2 == 0) for kind in (torch.float32, torch.float64) for i, size in enumerate(GRAMS)]


def gram_refusals() -> list[Refusal]:
    wide = torch.float64
    a, b = torch.zeros(4, 2, 6, 3, dtype=wide), torch.zeros(4, 2, 6, 5, dtype=wide)
    total, sums = torch.zeros(4, 3, 5, dtype=wide), torch.zeros(4, 3, 2, dtype=wide)
    shared = torch.zeros(400, dtype=wide)
    inside, first = shared[:144].view(a.shape), shared[:24].view(sums.shape)

    def refused(message: str, *, a: Tensor = a, b: Tensor = b, total: Tensor = total, sums: Tensor = sums) -> Refusal:
        return Refusal(ValueError, f"_spectra_gram_: {message}", lambda: torch.ops.fourfold._spectra_gram_(a, b, total, sums))

    kinds, totals = "a must be [F, 2, n, c] on the CPU in float32 or float64, got", "total must be [4, 3, 5] in float64, got"
    right, moments = "b must be [4, 2, 6, c] in a's type, got", "sums must be contiguous [4, 3, 2] in float64, got"
    apart = "total must have contiguous rows that don't overlap"
    return [
        refused(f"{kinds} (4, 2, 6, 3)", a=a.half()),
        refused(f"{kinds} (4, 1, 6, 3)", a=a[:, 1:]),
        refused(f"{kinds} (2, 6, 3)", a=a[0]),
        refused(f"{right} (4, 2, 6, 5)", b=b.float()),
        refused(f"{right} (3, 2, 6, 5)", b=b[1:]),
        refused(f"{right} (4, 1, 6, 5)", b=b[:, 1:]),
        refused(f"{right} (4, 2, 5, 5)", b=b[:, :, 1:]),
        refused(f"{totals} (4, 3, 5)", total=total.float()),
        refused(f"{totals} (3, 3, 5)", total=total[1:]),
        refused(f"{totals} (4, 2, 5)", total=total[:, 1:]),
        refused(f"{totals} (4, 3, 4)", total=total[..., 1:]),
        refused(apart, total=total[:1].expand(total.shape)),
        refused(apart, total=torch.zeros(4, 5, 3, dtype=wide).mT),
        refused("total must not share memory with a or b", a=inside, total=shared[143:203].view(total.shape)),
        refused(f"{moments} (4, 3, 2)", sums=sums.float()),
        refused(f"{moments} (4, 2, 2)", sums=sums[:, 1:]),
        refused(f"{moments} (4, 3, 2)", sums=torch.zeros(4, 2, 3, dtype=wide).mT),
        refused("sums must not share memory with a, b or total", a=inside, sums=shared[143:167].view(sums.shape)),
        refused("sums must not share memory with a, b or total", total=shared[23:83].view(total.shape), sums=first),
    ]  # fmt: skip


OPS = (
    Op(
        name="_image_spectra",
        call=transform,
        reference=transform_reference,
        samples=samples,
        small=lambda: [sample(torch.float64, torch.float64, 3, 2, *size) for size in ((2, 3), (4, 1))],
        sizes=lambda: [sample(torch.float32, torch.float32, n, 3, 4, 5) for n in (2, 3, 9)],
        dynamic=(0,),
        large=lambda dtype: sample(dtype, torch.float32, 260, 9, 32, 32),
        refusals=refusals,
        dtypes=(torch.float32, torch.float64),
        differentiable=False,
        excused={
            "keeps_nan_in_its_place": "an FFT spreads a NaN into imaginary parts that are 0 for all images, and sines of 0"
        },
    ),
    Op(
        name="_spectra_gram_",
        call=lambda *args: grams(_spectra_gram_, *args),
        reference=lambda *args: grams(REFERENCES["_spectra_gram_"], *args),
        samples=gram_samples,
        small=lambda: [gram_sample(torch.float64, 2, 3, 4, 5, with_sums) for with_sums in (True, False)],
        sizes=lambda: [gram_sample(torch.float32, f, 3, 4, 5) for f in (2, 3, 5)],
        dynamic=(0,),
        large=lambda dtype: gram_sample(torch.float64, 40, 150, 70, 33),
        refusals=gram_refusals,
        dtypes=(torch.float64,),
        differentiable=False,
    ),
)

test_op = battery.tests_of(OPS)


@pytest.mark.skipif(len(battery.tiers()) < 2, reason="this machine has one tier")
def test_every_tier_agrees(tmp_path):
    battery.every_tier_agrees("test_cca_spectra", OPS, tmp_path)


def test_leaves_its_neighbours_alone():
    for n in (1, 8, 21):
        x, whole = randn(n, 3, 6, 5, dtype=torch.float32), torch.full((16, 2, n + 3, 5), 7.0, dtype=torch.float64)
        result = whole[:, :, :n, 1:-1]
        _image_spectra(x, torch.zeros(3, 6, 5, dtype=torch.float64), result)
        assert (result != 7).all()
        result.fill_(7)
        assert (whole == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_results_of_any_alignment(dtype):
    """What is stored past the caches, where rows begin anywhere."""
    x, pivot = randn(260, 9, 32, 32, dtype=torch.float32), torch.zeros(9, 32, 32, dtype=torch.float64)
    expected = transform(x, pivot, dtype)
    assert expected.nbytes > 8 << 20
    whole = torch.full((514, 2, 261, 12), 7, dtype=dtype)
    for offset in (0, 1, 3):
        result = whole[:, :, :260, offset : offset + 9]
        _image_spectra(x, pivot, result)
        assert torch.equal(result, expected)
        result.fill_(7)
        assert (whole == 7).all()


@pytest.mark.parametrize("layout", ["images", "channels_last"])
def test_nan_stays_with_its_image_and_channel(layout):
    """And of products, in its row and column."""
    given = sample(torch.float64, torch.float32, 3, 21, 6, 5, layout)
    x, pivot = given.args[:2]
    clean = transform(x, pivot, torch.float64)
    x = x.clone()
    x[1, 4, 2, 3] = math.nan
    found = transform(x, pivot, torch.float64)
    hit = torch.zeros(3, 21, dtype=torch.bool)
    hit[1, 4] = True
    assert found[:, 0, hit].isnan().all() and torch.equal(found[:, :, ~hit], clean[:, :, ~hit])
    total, sums = torch.zeros(len(found), 21, 21, dtype=torch.float64), torch.zeros(len(found), 21, 2, dtype=torch.float64)
    _spectra_gram_(found, found, total, sums)
    rows = hit.any(0)
    assert total[:, rows].isnan().all() and total[:, :, rows].isnan().all() and sums[:, rows, 0].isnan().all()
    assert total[:, ~rows][:, :, ~rows].isfinite().all() and sums[:, ~rows].isfinite().all()


def test_real_frequencies_have_no_imaginary_part():
    """Exactly, and neither sine nor cosine leaves anything of an image that is the same everywhere."""
    x = randn(9, 2, 12, 8, dtype=torch.float64)
    found = transform(x, torch.zeros(2, 12, 8, dtype=torch.float64), torch.float64)
    assert (found[[0, 1], 1] == 0).all() and (found[:, 1] == 0).flatten(1).all(1).sum() == 4
    flat = x[:, :, :1, :1].expand_as(x)
    found = transform(flat, torch.zeros(2, 12, 8, dtype=torch.float64), torch.float64)
    assert found[1:].abs().max() < 1e-13
