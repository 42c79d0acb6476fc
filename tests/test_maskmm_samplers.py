"""bernoulli_mask, topk_mask, threshold_mask: which bits they set, exactly.

That every instruction set sets the same ones is test_maskmm.test_every_tier_agrees, where bits must be equal.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from battery import FLOATING
from fourfold.ops.maskmm import bernoulli_mask, pack_mask, threshold_mask, topk_mask, unpack_mask
from fourfold.reference import maskmm as reference
from test_maskmm import at_the_edge, scores_of
from torch import Tensor

WORD = 0xFFFFFFFF


def bits_of(bits: Tensor, k: int) -> Tensor:
    """As bool, by the definition of packed masks and numpy's own unpacking."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, bitorder="little")[:, :k].astype(bool))


# ---- bits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("k", [1, 7, 8, 63, 64, 65, 127, 128, 784, 1000])
def test_packing_is_little_endian(k):
    """As numpy packs, each row padded with zeros to whole 64-bit words."""
    mask = torch.rand(5, k) < 0.5
    packed = np.packbits(mask.numpy(), axis=1, bitorder="little")
    bits = pack_mask(mask)
    assert bits.shape == (5, 8 * math.ceil(k / 64))
    assert np.array_equal(bits.numpy()[:, : packed.shape[1]], packed)
    assert not bits[:, packed.shape[1] :].any()
    assert torch.equal(unpack_mask(bits, k), mask)


# ---- Philox, written once more -------------------------------------------------------------------------------------------


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, any counter and key."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & WORD, (p0 >> 32) ^ c[3] ^ k[1], p0 & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def words(n: int, seed: int, offset: int = 0) -> list[int]:
    """Those of flat indices 0 .. n - 1."""
    found: list[int] = []
    for i in range((n + 3) // 4):
        counter = (offset + i) % 2**64
        found += philox([counter & WORD, counter >> 32, 0, 0], [seed & WORD, seed >> 32])
    return found[:n]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([WORD] * 4, [WORD] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, expected):
    """Those that Random123, the authors' library, publishes."""
    assert " ".join(f"{word:08x}" for word in philox(counter, key)) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 2**32 - 2, 2**63 - 1, 2**64 - 3])
def test_reference_draws_these_words(seed, offset):
    """In signed arithmetic, across the carry into the second counter word and past the end of the counter."""
    signed = [word - 2**64 if word >= 2**63 else word for word in (seed, offset)]
    assert reference.philox(5, torch.tensor(signed[0]), signed[1]).flatten().tolist() == words(20, seed, offset)


# ---- the probability -----------------------------------------------------------------------------------------------------


def sigmoid(score: float) -> np.float32:
    """The stated sequence, a numpy float32 at a time: each of its operations is rounded on its own."""
    f = np.float32
    s = f(score)
    a = min(abs(s), f(87))
    n = (a * f(1.44269502) + f(12582912)) - f(12582912)
    r = (n * f(0.693359375) - a) + n * f(-2.12194440e-4)
    e = f(1) / f(720)
    for c in (f(1) / f(120), f(1) / f(24), f(1) / f(6), f(0.5), f(1), f(1)):
        e = e * r + c
    e = np.ldexp(e, -int(n))
    return (e if s < 0 else f(1)) / (f(1) + e)


#: Scores and the number of 32-bit words below their probability: floor(p * 2^32).
KEEPING = [(-math.inf, 0), (-100, 0), (-87.5, 0), (-20, 8), (-9, 529975), (-4.5, 47188568), (-3, 203692576), (-2.25, 409522816),
           (-1.75, 635857856), (-1.25, 956489856), (-1, 1155094656), (-0.75, 1377916928), (-0.5, 1621524864),
           (-0.25, 1880437632), (-0.125, 2013440512), (-(2**-20), 2147482624), (-0.0, 2**31), (0.0, 2**31),
           (2**-20, 2147484672), (0.125, 2281527040), (0.25, 2414529792), (0.5, 2673442560), (0.75, 2917050368),
           (1, 3139872768), (1.25, 3338477568),
           (1.75, 3659109632), (2.25, 3885444352), (3, 4091274752), (4.5, 4247778816), (9, 4294437376), (16.5, 4294966784),
           (17.5, 2**32), (100, 2**32), (math.inf, 2**32)]  # fmt: skip

#: Bits of six rows of these scores each, as 64-bit words, for (seed, offset).
TABLE = {
    (0, 0): "00000003fff0ad80 00000003ffd58800 00000003f9b31400 00000003ffd5e080 00000003ffb69000 00000003fe424880",
    (1, 0): "00000003fff1e000 00000003ff2f7000 00000003ff9fc480 00000003fd3f2c00 00000003feffc800 00000003fba63600",
    (2**63 + 12345, 0): "00000003ffc33800 00000003fffc9800 00000003fffca400 00000003fb9c5c00 00000003fff37640 00000003ffb50400",
    (2**64 - 1, 2**32 - 5):
        "00000003ffda3480 00000003fff3aa00 00000003f8d3a000 00000003fff39d00 00000003f3f25840 00000003ffb86000",
    (20190501067, 2**64 - 3):
        "00000003fdac4a00 00000003fd54aa00 00000003fef91000 00000003ffa3a080 00000003ff828800 00000003fd5e3400",
}  # fmt: skip


def as_words(bits: Tensor) -> str:
    return " ".join(f"{int.from_bytes(bytes(row.tolist()), 'little'):016x}" for row in bits)


@pytest.mark.kernel
@pytest.mark.parametrize(("seed", "offset"), TABLE)
def test_table(seed, offset):
    """The bits that every device, thread count and instruction set gives, today and tomorrow."""
    scores = torch.tensor([score for score, _ in KEEPING]).expand(6, -1)
    drawn = words(scores.numel(), seed, offset)
    by_hand = [u < keeping for u, (_, keeping) in zip(drawn, KEEPING * 6, strict=True)]
    assert as_words(reference.pack_mask(torch.tensor(by_hand).view(6, -1))) == TABLE[seed, offset]
    for dtype in (torch.float32, torch.float64):
        assert as_words(bernoulli_mask(scores.to(dtype), seed, offset=offset)) == TABLE[seed, offset], dtype


def test_table_of_probabilities():
    scores = torch.tensor([score for score, _ in KEEPING])
    expected = [keeping for _, keeping in KEEPING]
    assert [int(float(sigmoid(score)) * 2**32) for score, _ in KEEPING] == expected
    assert (reference.sigmoid(scores).double() * 2**32).long().tolist() == expected


def test_reference_is_the_stated_sequence():
    """To the bit; its constants are float32's nearest."""
    scores = torch.cat([torch.randn(2000) * 3, torch.linspace(-90, 90, 999), torch.randn(500) * 1e-6])
    assert reference.sigmoid(scores).tolist() == [float(sigmoid(score)) for score in scores.tolist()]


def test_probability_is_exact_to_2_to_the_minus_20():
    scores = torch.cat([torch.linspace(-90, 90, 2_000_001), torch.linspace(-1, 1, 500_001), torch.logspace(-40, 1, 10_001)])
    exact = scores.double().sigmoid()
    error = (reference.sigmoid(scores).double() - exact).abs()
    assert error.max() < 2.0**-20
    inside = scores > -87
    assert (error / exact)[inside].max() < 2.0**-20  # of itself too, however small


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_at_the_edge(dtype):
    """Scores whose probability is their own word to within float32: a sigmoid that is off by an ulp shows here."""
    scores, drawn = at_the_edge(100, 2000, 77)
    mask = unpack_mask(bernoulli_mask(scores.to(dtype), 77), 2000)
    p = reference.sigmoid(scores)
    assert torch.equal(mask, drawn < (p * 2.0**32).long())
    assert 0.3 < mask.double().mean() < 0.7
    an_ulp_off = drawn < (torch.nextafter(p, torch.tensor(2.0)) * 2.0**32).long()
    assert (an_ulp_off != mask).sum() > 1000


@pytest.mark.kernel
def test_float64_scores_are_rounded_first():
    """To the nearest float32, ties to even, whatever is nearest to the word then."""
    base = torch.randn(50, 64).double()
    between = base + base.abs() * 2.0**-26 * torch.randint(-3, 4, base.shape)
    assert (between != between.float().double()).any()
    assert torch.equal(bernoulli_mask(between, 3), bernoulli_mask(between.float(), 3))
    huge = torch.tensor([[1e300, -1e300, 1e-300]], dtype=torch.float64)
    assert unpack_mask(bernoulli_mask(huge.expand(40, 3), 3), 3)[:, :2].tolist() == [[True, False]] * 40


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
def test_certain_scores(dtype):
    """p = 1 always keeps, p = 0 never does."""
    for score, kept in ((math.inf, True), (100, True), (18, True), (-math.inf, False), (-100, False)):
        mask = unpack_mask(bernoulli_mask(torch.full((300, 333), score, dtype=dtype), 4), 333)
        assert bool((mask == kept).all()), score


@pytest.mark.kernel
def test_every_dtype_draws_alike():
    """Scores that all of them hold get the same bits."""
    scores = torch.randint(-64, 65, (40, 70)) / 16
    expected = bernoulli_mask(scores.double(), 9)
    assert all(torch.equal(bernoulli_mask(scores.to(dtype), 9), expected) for dtype in FLOATING)


# ---- the stream ----------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("k", [4, 8, 60, 64, 68, 1000])
@pytest.mark.parametrize("start", [0, 2**32 - 7, 2**64 - 3])
def test_offset_continues_a_stream(k, start):
    """Rows drawn in two parts, the second from where the first stopped."""
    scores = torch.randn(9, k)
    whole = bernoulli_mask(scores, 5, offset=start)
    second = (start + 4 * k // 4) % 2**64
    assert torch.equal(whole[4:], bernoulli_mask(scores[4:], 5, offset=second))
    assert torch.equal(whole[:4], bernoulli_mask(scores[:4], 5, offset=start))


@pytest.mark.kernel
@pytest.mark.parametrize("k", [1, 2, 3, 5, 63, 65, 130])
def test_flat_index_ignores_padding(k):
    """Rows follow one another without gaps, at any remainder of the counter's four words."""
    scores = torch.randn(13, k)
    drawn = torch.tensor(words(scores.numel(), 2**63 + 1, 2**32 - 4)).view(13, k)
    limits = torch.tensor([int(float(sigmoid(s)) * 2**32) for s in scores.flatten().tolist()]).view(13, k)
    mask = bits_of(bernoulli_mask(scores, 2**63 + 1, offset=2**32 - 4), k)
    assert torch.equal(mask, drawn < limits)


@pytest.mark.kernel
def test_seeds():
    """All 64 bits count; int and tensor, of any one-element shape, are the same seed."""
    scores = torch.zeros(4, 256)
    seeds = [0, 1, 2**31, 2**32, 2**63, 2**63 + 1, 2**64 - 1]
    masks = [bernoulli_mask(scores, seed) for seed in seeds]
    assert len({bytes(mask.flatten().tolist()) for mask in masks}) == len(seeds)
    for seed, mask in zip(seeds, masks, strict=True):
        signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
        assert torch.equal(bernoulli_mask(scores, signed), mask)
        assert torch.equal(bernoulli_mask(scores, signed.view(1, 1)), mask)
        assert torch.equal(bernoulli_mask(scores, np.uint64(seed)), mask)


def chance(statistic: float, freedom: int) -> float:
    """Of a chi-square statistic at least this large."""
    return torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(statistic / 2)).item()


def test_frequencies():
    """Chi-square of counts per score, of each of Philox's four words, and of neighbours being alike: one in a million."""
    levels = torch.linspace(-4, 4, 17)
    rows, k = 3000, 17 * 4
    scores = levels.repeat_interleave(4).expand(rows, k)
    mask = unpack_mask(bernoulli_mask(scores, 2024), k)
    p, counts = scores[0].double().sigmoid(), mask.sum(0, dtype=torch.float64)
    assert chance(((counts - rows * p).square() / (rows * p * (1 - p))).sum().item(), k) > 1e-6
    assert chance(((counts - rows * (p + 0.02)).square() / (rows * p * (1 - p))).sum().item(), k) < 1e-6  # and would show that
    fair = unpack_mask(bernoulli_mask(torch.zeros(1000, 1000), 7), 1000)
    for step in (1, 2, 3, 4, 1000):
        flat = fair.flatten()
        alike = (flat[step:] == flat[:-step]).double()
        assert chance(((alike.sum() - alike.numel() / 2).square() / (alike.numel() / 4)).item(), 1) > 1e-6, step


@pytest.mark.kernel
@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_threads_change_nothing(threads):
    torch.set_num_threads(1)
    scores = scores_of(401, 807, dtype=torch.float32)
    calls = [
        lambda: bernoulli_mask(scores, 1, offset=2**32 - 1000),
        lambda: topk_mask(scores, 0.31),
        lambda: topk_mask(scores.bfloat16(), 0.31, abs=False),
        lambda: topk_mask(torch.zeros_like(scores), 0.62),
        lambda: threshold_mask(scores, 0.2),
        lambda: pack_mask(scores > 0),
    ]
    expected = [call() for call in calls]
    torch.set_num_threads(threads)
    assert all(torch.equal(call(), wanted) for call, wanted in zip(calls, expected, strict=True))


# ---- the largest scores --------------------------------------------------------------------------------------------------


def ranked(scores: Tensor, keep: int, by_magnitude: bool) -> Tensor:
    """By Python's sort, which is stable, on Python's numbers."""
    values = [abs(s) if by_magnitude else s for s in scores.flatten().double().tolist()]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask.view(scores.shape[0], -1)


@pytest.mark.kernel
@pytest.mark.parametrize("by_magnitude", [True, False])
@pytest.mark.parametrize("dtype", FLOATING)
def test_topk_is_a_stable_sort(dtype, by_magnitude):
    """With ties, both zeros, both infinities, subnormal numbers, and the type's largest."""
    tiny = torch.finfo(dtype).smallest_normal
    special = [0.0, -0.0, math.inf, -math.inf, tiny, -tiny, tiny / 2, -tiny / 2, torch.finfo(dtype).max, torch.finfo(dtype).min]
    generator = torch.Generator().manual_seed(3)
    for n, k in ((1, 1), (7, 3), (2, 64), (5, 65), (9, 130), (3, 700)):
        scores = (torch.randint(-6, 7, (n, k), generator=generator) / 4).to(dtype)
        scores.view(-1)[::3] = torch.tensor(special * (n * k), dtype=dtype)[: len(scores.view(-1)[::3])]
        for density in (1.0, 0.999, 0.75, 0.5, 0.3, 0.1, 0.01, 1e-9):
            keep = n * k - int((1 - density) * (n * k))
            mask = bits_of(topk_mask(scores, density, abs=by_magnitude), k)
            assert mask.sum() == keep, (n, k, density)
            assert torch.equal(mask, ranked(scores, keep, by_magnitude)), (n, k, density)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
def test_topk_of_distinct_scores(dtype):
    """Every score its own bit pattern: each digit of the selection matters."""
    raw = torch.randperm(2**15)[: 60 * 81].to(torch.int16)  # finite and not negative, as float16 and as bfloat16 once scaled
    scores = raw.double().view(60, 81) / 2**7 if dtype in (torch.float32, torch.float64) else None
    if dtype == torch.float64:
        scores = 1 + scores * 2.0**-45  # the lowest bits alone
    if dtype == torch.float32:
        scores = 1 + scores * 2.0**-16
    if scores is None:
        half = torch.arange(60 * 81, dtype=torch.int16)[torch.randperm(60 * 81)] + 2**12
        scores = half.view(dtype).view(60, 81)
    scores = scores.to(dtype)
    scores = scores * torch.where(torch.rand(60, 81) < 0.5, -1, 1).to(dtype)
    for density in (0.5, 0.1, 0.9):
        for by_magnitude in (True, False):
            keep = scores.numel() - int((1 - density) * scores.numel())
            mask = bits_of(topk_mask(scores, density, abs=by_magnitude), 81)
            assert torch.equal(mask, ranked(scores, keep, by_magnitude))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("n", "density", "kept"),
    [(10, 0.9, 10), (10, 0.7, 7), (10, 0.1, 1), (10, 0.05, 1), (10, 1e-20, 0), (10, 1.0, 10), (200, 0.995, 199), (100, 0.3, 30),
     (100, 0.29, 29), (7, 0.5, 4)],
)  # fmt: skip
def test_density_is_the_fraction_kept(n, density, kept):
    """Trap: published code calls it sparsity, and leaves out int((1 - density) * n): of 10 at 0.9 that is int(0.99..) = 0."""
    for dtype in FLOATING:
        scores = torch.arange(n, dtype=torch.float64).to(dtype).view(1, n)
        mask = bits_of(topk_mask(scores, density), n)
        assert mask.tolist() == [[i >= n - kept for i in range(n)]]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
def test_ties_go_to_the_lowest_index(dtype):
    """Trap: published code ranks by an unstable sort."""
    mask = bits_of(topk_mask(torch.ones(300, 70, dtype=dtype), 0.25), 70).flatten()
    assert mask[:5250].all() and not mask[5250:].any()
    signs = torch.tensor([[-1.0, 1.0, -1.0, 1.0, 2.0]], dtype=dtype)
    assert bits_of(topk_mask(signs, 0.6), 5).tolist() == [[True, True, False, False, True]]
    assert bits_of(topk_mask(signs, 0.6, abs=False), 5).tolist() == [[False, True, False, True, True]]
    zeros = torch.tensor([[-0.0, 0.0, -0.0, -1.0]], dtype=dtype)
    assert bits_of(topk_mask(zeros, 0.5, abs=False), 4).tolist() == [[True, True, False, False]]


# ---- thresholds ----------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_threshold_reaches():
    """Trap: the fast variant of supsup keeps scores >= 0, zeros of both signs too, by value and not by magnitude."""
    for dtype in FLOATING:
        scores = torch.tensor([[0.0, -0.0, 1.0, -1.0, 5.0, -5.0, math.inf, -math.inf, 1e-7, -1e-7]], dtype=dtype)
        kept = [True, True, True, False, True, False, True, False, True, False]
        assert bits_of(threshold_mask(scores), 10).tolist() == [kept]


@pytest.mark.kernel
def test_thresholds_between_numbers():
    """A threshold need not be a number of the scores' type: it is compared as it is."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        below = torch.tensor(0.1, dtype=dtype)
        if below.double() > 0.1:
            below = torch.nextafter(below, torch.tensor(0.0, dtype=dtype))
        above = torch.nextafter(below, torch.tensor(1.0, dtype=dtype))
        assert below.double() < 0.1 < above.double()
        assert bits_of(threshold_mask(torch.stack([below, above])[None], 0.1), 2).tolist() == [[False, True]]
    for limit, kept in ((math.inf, [True, False, False]), (1e300, [True, False, False]), (-1e300, [True, True, False])):
        assert bits_of(threshold_mask(torch.tensor([[math.inf, 0.0, -math.inf]]), limit), 3).tolist() == [kept]
    assert bits_of(threshold_mask(torch.tensor([[math.inf, 0.0, -math.inf]]), -math.inf), 3).all()
