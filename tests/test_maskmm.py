"""Packed masks, masks from scores, masked weights: samples and wrong calls for the battery."""

from __future__ import annotations

import itertools
import math
from typing import Any

import battery
import pytest
import torch
import torch.nn.functional as F
from battery import FLOATING, Op, Refusal, Sample
from fourfold.ops import maskmm
from fourfold.reference import REFERENCES
from fourfold.reference.maskmm import kept, philox, slope_of
from torch import Tensor

# Of torch's about itself, where it compiles an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

#: The public functions over these ops: they have no schema.
COMPOSITES = ("masked_linear", "masked_conv2d", "supermask_linear", "supermask_conv2d", "mask_from_criterion")

F32 = torch.float32

#: One bit, a word but one, a word, a word and one, whole rows of words and a rest, nothing.
SIZES = ((1, 1), (3, 63), (2, 64), (5, 65), (7, 784), (33, 130), (0, 5), (4, 0))


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def random_mask(*shape: int, density: float = 0.4, seed: int = 0) -> Tensor:
    """With at least one bit, where the battery puts a NaN."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    mask = torch.rand(shape, generator=generator) < density
    if mask.numel():
        mask.view(-1)[mask.numel() * 2 // 3] = True
    return mask


def pack(mask: Tensor) -> Tensor:
    return REFERENCES["pack_mask"](mask)


# ---- bits ----------------------------------------------------------------------------------------------------------------


def pack_samples(_dtype: torch.dtype) -> list[Sample]:
    masks = [random_mask(*shape) for shape in (*SIZES, (3, 2, 3, 3), (2, 0, 3, 3))]
    masks += [torch.ones(5, 65, dtype=torch.bool), torch.zeros(5, 65, dtype=torch.bool)]
    return [Sample(f"{i} {tuple(mask.shape)}", (mask,)) for i, mask in enumerate(masks)]


def pack_refusals() -> list[Refusal]:
    def refused(error: type[Exception], message: str, mask: Any) -> Refusal:
        return Refusal(error, f"pack_mask: {message}", lambda: maskmm.pack_mask(mask))

    mask = random_mask(2, 3)
    return [
        refused(TypeError, "mask must be a Tensor, got list", [[True]]),
        refused(TypeError, "mask must be a dense tensor, got a sparse_coo one; convert it first", mask.to_sparse()),
        refused(TypeError, "mask must be bool, got float32; compare first, as in scores > 0", mask.float()),
        refused(TypeError, "mask must be bool, got uint8; compare first, as in scores > 0", mask.byte()),
        refused(ValueError, "mask must be [N, K], got (3,)", mask[0]),
        refused(ValueError, "mask must be [N, K], got ()", mask[0, 0]),
        raw("pack_mask", "mask must be bool", (mask,), a0=mask.byte()),
        raw("pack_mask", "mask must be [N, K], got (3,)", (mask,), a0=mask[0]),
    ]


def unpack_samples(_dtype: torch.dtype) -> list[Sample]:
    return [Sample(f"{n} x {k}", (pack(random_mask(n, k)), k)) for n, k in SIZES]


def unpack_refusals() -> list[Refusal]:
    bits = pack(random_mask(3, 70))

    def refused(error: type[Exception], message: str, b: Any = bits, k: Any = 70) -> Refusal:
        return Refusal(error, f"unpack_mask: {message}", lambda: maskmm.unpack_mask(b, k))

    pad = "bits has bits set beyond its 70 columns, which must be zero; pack with pack_mask"
    return [
        refused(TypeError, "bits must be a Tensor, got NoneType", None),
        refused(TypeError, "bits must be uint8, got int8", bits.to(torch.int8)),
        refused(TypeError, "k must be an int, got 70.0", k=70.0),
        refused(ValueError, "k must be at least 0, got -1", k=-1),
        refused(ValueError, "bits of k=64 must be [N, 8], got (3, 16)", k=64),
        refused(ValueError, "bits of k=129 must be [N, 24], got (3, 16)", k=129),
        refused(ValueError, "bits of k=70 must be [N, 16], got (1, 3, 16)", bits[None]),
        refused(ValueError, pad, flipped(bits, 1, 8, 1 << 6)),
        refused(ValueError, pad, flipped(bits, 2, 15, 1 << 7)),
        refused(ValueError, pad, flipped(bits, 0, 9, 1)),
        raw("unpack_mask", "k must be at least 0, got -1", (bits, 70), a1=-1),
        raw("unpack_mask", "bits must be [N, 16], got (1, 3, 16)", (bits, 70), a0=bits[None]),
        raw("unpack_mask", "bits must be uint8", (bits, 70), a0=bits.int()),
        raw("unpack_mask", "bits of 3 rows of 60 must have 3 rows of 8 bytes, got (3, 16)", (bits, 70), a1=60),
        raw("unpack_mask", "bits must be contiguous", (bits, 70), a0=bits.t().contiguous().t()),
    ]


def flipped(bits: Tensor, row: int, byte: int, which: int) -> Tensor:
    """With one bit changed."""
    bits = bits.clone()
    bits[row, byte] ^= which
    return bits


def raw(op: str, message: str, good: tuple[Any, ...], **changes: Any) -> Refusal:
    """The op itself, called with one or several of its good arguments changed, by place: a3=.."""
    args = list(good)
    for place, value in changes.items():
        args[int(place[1:])] = value
    return Refusal(ValueError, f"{op}: {message}", lambda: getattr(torch.ops.fourfold, op)(*args))


# ---- masks from scores ---------------------------------------------------------------------------------------------------


def scores_of(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """With ties, both zeros, both infinities and what a sigmoid takes to 0 and 1."""
    scores = (randn(*shape, seed=seed) * 2).to(dtype)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 100.0, -100.0, 1.5, -1.5, 1.5, 1.5], dtype=dtype)
    places = scores.view(-1)[5::7]
    places.copy_(special.repeat(places.numel() // 10 + 1)[: places.numel()])
    return scores


def of_scores(options: list[tuple[Any, ...]], sizes: Any = SIZES) -> list[Sample]:
    """Every dtype and size; each of the options with some of them."""
    turn = itertools.cycle(options)
    return [
        Sample(f"{dtype} {shape} {rest}", (scores_of(*shape, dtype=dtype), *rest))
        for dtype, shape in itertools.product(FLOATING, (*sizes, (3, 2, 3, 3)))
        for rest in (next(turn), next(turn))
    ]


def small_scores(rest: list[tuple[Any, ...]]) -> list[Sample]:
    return [Sample(f"{args}", (scores_of(3, 5), *args)) for args in rest]


SEEDS: list[tuple[Any, ...]] = [
    (0, 0),
    (2**64 - 1, 2**32 - 3),
    (torch.tensor(-7), 2**64 - 1),
    (2**63, 2**63),
    (torch.tensor([12345678901234]), 2**32 - 1),
]


def at_the_edge(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores [N, K] whose probability is their own word, but for float32's precision; and these words."""
    words = philox(n * k // 4, torch.tensor(seed), 0).view(n, k)
    return torch.logit((words.double() + 0.5) / 2**32).to(torch.float32), words


def bernoulli(scores: Tensor, seed: Any, offset: int = 0) -> Tensor:
    return maskmm.bernoulli_mask(scores, seed, offset=offset)


def signed64(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def bernoulli_exact(scores: Tensor, seed: Any, offset: int = 0) -> Tensor:
    seed = seed if isinstance(seed, Tensor) else torch.tensor(signed64(seed))
    return REFERENCES["bernoulli_mask"](scores, seed, signed64(offset))


def scores_refusals(op: str, call: Any) -> list[Refusal]:
    """What the three samplers refuse alike; call takes scores."""
    scores = scores_of(3, 9)
    nan = scores.clone()
    nan[1, 4] = nan[2, 0] = math.nan
    holds = f"{op}: scores hold 2 NaN, the first at flat index 13; mend them before a mask is made"
    floating = "must be float16, bfloat16, float32 or float64, got"
    found = [
        Refusal(TypeError, f"{op}: scores must be a Tensor, got float", lambda: call(1.0)),
        Refusal(TypeError, f"{op}: scores {floating} int64", lambda: call(torch.ones(2, 2, dtype=torch.int64))),
        Refusal(TypeError, f"{op}: scores {floating} bool", lambda: call(scores > 0)),
        Refusal(
            ValueError,
            f"{op}: scores must be [N, K] or have a convolution weight's shape, got (9,)",
            lambda: call(scores[0]),
        ),
    ]
    found += [Refusal(ValueError, holds, lambda dtype=dtype: call(nan.to(dtype))) for dtype in FLOATING]
    return [*found, Refusal(ValueError, holds, lambda: when_asked_to_check(call, nan.as_subclass(Elsewhere)))]


class Elsewhere(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))


def when_asked_to_check(call: Any, scores: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOURFOLD_CHECK", "1")
        return call(scores)


def raw_scores_refusals(op: str, *rest: Any) -> list[Refusal]:
    scores = scores_of(3, 9)
    return [
        raw(op, "scores must be float16, bfloat16, float32 or float64", (scores, *rest), a0=scores.long()),
        raw(op, "scores must be [N, K], got (9,)", (scores, *rest), a0=scores[0]),
    ]


def bernoulli_refusals() -> list[Refusal]:
    op, scores = "bernoulli_mask", scores_of(3, 9)

    def refused(error: type[Exception], message: str, seed: Any, **offset: Any) -> Refusal:
        return Refusal(error, f"{op}: {message}", lambda: maskmm.bernoulli_mask(scores, seed, **offset))

    one = "seed must be an int64 tensor with one element on the scores' device, got shape"
    good = (scores, torch.tensor(0), 0)
    return [
        *scores_refusals(op, lambda s: maskmm.bernoulli_mask(s, 0)),
        *raw_scores_refusals(op, *good[1:]),
        refused(TypeError, "seed must be an int, got 0.5", 0.5),
        refused(TypeError, "seed must be an int, got True", True),
        refused(TypeError, "seed must be an int, got '1'", "1"),
        refused(TypeError, "seed must be an int or an int64 tensor, got None", None),
        refused(TypeError, "seed must be an int or an int64 tensor, got int32", torch.tensor(1, dtype=torch.int32)),
        refused(TypeError, "seed must be an int or an int64 tensor, got float32", torch.tensor(1.0)),
        refused(ValueError, "seed must have one element, got shape (2,)", torch.tensor([1, 2])),
        refused(ValueError, "seed is on meta, scores on cpu; move one with .to()", torch.tensor(1, device="meta")),
        refused(ValueError, "seed must lie in 0..2**64-1, got -1", -1),
        refused(ValueError, f"seed must lie in 0..2**64-1, got {2**64}", 2**64),
        refused(TypeError, "offset must be an int, got 1.0", 0, offset=1.0),
        refused(ValueError, "offset must lie in 0..2**64-1, got -4", 0, offset=-4),
        raw(op, f"{one} (2,)", good, a1=torch.tensor([1, 2])),
        raw(op, f"{one} ()", good, a1=torch.tensor(1.0)),
    ]


DENSITIES: list[tuple[Any, ...]] = [(density, abs_) for density in (0.5, 1.0, 0.03, 1e-12, 0.9, 0.25) for abs_ in (True, False)]


def topk(scores: Tensor, density: float, abs_: bool = True) -> Tensor:
    return maskmm.topk_mask(scores, density, abs=abs_)


def density_refusals(op: str, call: Any) -> list[Refusal]:
    kept = "it is the fraction kept, 0.9 keeps 90% (hidden-networks calls this sparsity)"
    number = "density must be a number, got"
    return [
        *(
            Refusal(ValueError, f"{op}: density must lie in (0, 1], got {float(d)}: {kept}", lambda d=d: call(d))
            for d in (0.0, 0, -0.1, 1.5, 90, math.nan)
        ),
        Refusal(TypeError, f"{op}: {number} '0.5'", lambda: call("0.5")),
        Refusal(TypeError, f"{op}: {number} True", lambda: call(True)),
    ]


def topk_refusals() -> list[Refusal]:
    op, scores = "topk_mask", scores_of(3, 9)
    return [
        *scores_refusals(op, lambda s: maskmm.topk_mask(s, 0.5)),
        *raw_scores_refusals(op, 0.5, True),
        *density_refusals(op, lambda density: maskmm.topk_mask(scores, density)),
        Refusal(TypeError, f"{op}: density must be a number, got None", lambda: maskmm.topk_mask(scores, None)),
        Refusal(TypeError, f"{op}: abs must be a bool, got 1", lambda: maskmm.topk_mask(scores, 0.5, abs=1)),
        raw(op, "density must lie in (0, 1], got 0", (scores, 0.5, True), a1=0.0),
        raw(op, "density must lie in (0, 1], got nan", (scores, 0.5, True), a1=math.nan),
    ]


#: 0.1 is no float32, and no 16-bit number; 1e300 and -1e300 are beyond what these hold.
THRESHOLDS: list[tuple[Any, ...]] = [(0.0,), (0.1,), (-1.5,), (math.inf,), (-math.inf,), (1e300,), (-1e300,), (1.5,), (1e-46,)]


def threshold_refusals() -> list[Refusal]:
    op, scores = "threshold_mask", scores_of(3, 9)
    return [
        *scores_refusals(op, maskmm.threshold_mask),
        *raw_scores_refusals(op, 0.0),
        Refusal(TypeError, f"{op}: threshold must be a number, got None", lambda: maskmm.threshold_mask(scores, None)),
        Refusal(TypeError, f"{op}: threshold must be a number, got True", lambda: maskmm.threshold_mask(scores, True)),
        Refusal(ValueError, f"{op}: threshold must not be NaN", lambda: maskmm.threshold_mask(scores, math.nan)),
        raw(op, "threshold must not be NaN", (scores, 0.0), a1=math.nan),
    ]


# ---- effective weights ---------------------------------------------------------------------------------------------------


def with_signs(weight: Tensor, negative: Tensor | None) -> Tensor | None:
    return None if negative is None else torch.where(negative, -1.0, 1.0).to(weight.dtype)


def apply_mask(weight: Tensor, bits: Tensor, negative: Tensor | None, rescale: str, dtype: torch.dtype) -> Tensor:
    """The op; scores, which matter by their sign alone, are made from a mask."""
    return maskmm._apply_mask(weight, bits, with_signs(weight, negative), negative is not None, rescale, dtype)


def apply_mask_exact(weight: Tensor, bits: Tensor, negative: Tensor | None, rescale: str, _dtype: torch.dtype) -> Tensor:
    given = (with_signs(weight, negative), negative is not None, rescale, torch.float64)
    return REFERENCES["_apply_mask"](weight, bits, *given)


def apply_sample(dtype: torch.dtype, shape: tuple[int, ...], signed: bool, rescale: str) -> Sample:
    negative = random_mask(*shape, density=0.5, seed=2) if signed else None
    label = f"{shape}{' signed' * signed} {rescale}"
    return Sample(label, (randn(*shape, dtype=dtype), pack(random_mask(*shape)), negative, rescale, dtype))


APPLIED = [(False, ""), (True, ""), (False, "dwr"), (True, "dwr_grad")]


def apply_samples(dtype: torch.dtype) -> list[Sample]:
    forms = itertools.cycle(APPLIED)
    return [apply_sample(dtype, shape, *next(forms)) for shape in (*SIZES, (3, 2, 3, 3), (4, 65), (6, 129), (5, 70))]


def mask_refusals(op: str, good: tuple[Any, ...], at: int, *, at_scores: int, at_signed: int, at_rescale: int) -> list[Refusal]:
    """What all ops with a masked weight [3, 70] refuse alike; at: the weight's place, then come its bits."""
    weight, bits = good[at], good[at + 1]
    w, b, s = f"a{at}", f"a{at + 1}", f"a{at_scores}"
    many = "bits of 3 rows of 70 must have 3 rows of 16 bytes, got"
    none = "rescale divides by the number of kept weights, and none is kept; raise the scores or the density"
    return [
        raw(op, "weight must be [N, K], got (70,)", good, **{w: weight[0]}),
        raw(op, "weight must be float16, bfloat16, float32 or float64", good, **{w: weight.int()}),
        raw(op, "bits must be uint8", good, **{b: bits.bool()}),
        raw(op, f"{many} (3, 8)", good, **{b: bits[:, :8].contiguous()}),
        raw(op, f"{many} (4, 16)", good, **{b: torch.cat([bits, bits[:1]])}),
        raw(op, f"{many} (16,)", good, **{b: bits[0]}),
        raw(op, "bits must be contiguous", good, **{b: bits.t().contiguous().t()}),
        raw(op, "scores (3, 69) must have weight's shape (3, 70)", good, **{s: weight[:, 1:]}),
        raw(op, "scores must be float16, bfloat16, float32 or float64", good, **{s: weight.long()}),
        raw(op, "signed needs scores", good, **{s: None, f"a{at_signed}": True}),
        raw(op, "rescale must be '', 'dwr' or 'dwr_grad', got 'half'", good, **{f"a{at_rescale}": "half"}),
        raw(op, none, good, **{b: bits * 0, f"a{at_rescale}": "dwr"}),
    ]


def apply_refusals() -> list[Refusal]:
    op, weight = "_apply_mask", randn(3, 70, dtype=torch.float32)
    good = (weight, pack(random_mask(3, 70)), None, False, "", torch.float32)
    return [
        *mask_refusals(op, good, 0, at_scores=2, at_signed=3, at_rescale=4),
        raw(op, "dtype must be float16, bfloat16, float32 or float64", good, a5=torch.int32),
        raw(op, "weight and result must both be float64, or neither", good, a5=torch.float64),
        raw(op, "weight and result must both be float64, or neither", good, a0=weight.double()),
    ]


# ---- gradients of effective weights --------------------------------------------------------------------------------------

#: Slope, signed, rescale: the public samplers and rescale modes.
FORMS = [("sigmoid", False, ""), ("sign", False, ""), ("one", False, ""), ("one", True, ""), ("sigmoid", False, "dwr"),
         ("sign", False, "dwr"), ("one", True, "dwr"), ("sigmoid", False, "dwr_grad"), ("sign", False, "dwr_grad")]  # fmt: skip


def gradients_sample(
    dtype: torch.dtype, shape: tuple[int, ...], form: tuple[str, bool, str], wanted: tuple[bool, bool], with_scores: bool = True
) -> Sample:
    grad, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    scores = randn(*shape, dtype=dtype, seed=2) if with_scores else None
    if scores is not None:
        scores.view(-1)[::5] = 0.0
    # Not every gradient depends on every tensor.
    label = f"{shape} {form}{'' if with_scores else ' no scores'} {wanted} some dropped"
    return Sample(label, (grad, weight, pack(random_mask(*shape)), scores, *form, wanted))


def gradients_samples(dtype: torch.dtype) -> list[Sample]:
    shapes = itertools.cycle((*SIZES, (3, 2, 3, 3)))
    found = [gradients_sample(dtype, next(shapes), form, (True, True)) for _ in range(3) for form in FORMS]
    found += [gradients_sample(dtype, (5, 65), FORMS[i], wanted) for i, wanted in enumerate([(True, False), (False, True)])]
    return [*found, gradients_sample(dtype, (5, 65), ("one", False, ""), (True, False), with_scores=False)]


def gradients_refusals() -> list[Refusal]:
    op, weight, f32 = "_mask_gradients", randn(3, 70, dtype=torch.float32), torch.float32
    bits, wanted = pack(random_mask(3, 70)), [True, True]
    good = (randn(3, 70, dtype=f32), weight, bits, randn(3, 70, dtype=f32), "sigmoid", False, "", wanted)
    both = "must both be float64, or neither"
    return [
        *mask_refusals(op, good, 1, at_scores=3, at_signed=5, at_rescale=6),
        raw(op, "slope must be 'sigmoid', 'sign' or 'one', got 'two'", good, a4="two"),
        raw(op, "grad (3, 71) must have weight's shape (3, 70)", good, a0=randn(3, 71, dtype=f32)),
        raw(op, "grad must be [N, K], got (70,)", good, a0=weight[0]),
        raw(op, "grad must be float16, bfloat16, float32 or float64", good, a0=weight.int()),
        raw(op, f"grad and weight {both}", good, a0=weight.double(), a7=[False, True]),
        raw(op, f"weight and result {both}", good, a0=weight.double()),
        raw(op, f"weight and scores {both}", good, a3=weight.double()),
        raw(op, "scores are wanted the gradient of, and there are none", good, a3=None),
    ]


# ---- masked products -----------------------------------------------------------------------------------------------------


def straight_through(weight: Tensor, bits: Tensor, scores: Tensor | None, slope: str, signed: bool, rescale: str) -> Tensor:
    """The effective weight, as a function of scores too: in their derivative the mask is taken for real numbers."""
    mask = kept(bits, weight)
    ones = mask.sum().to(weight.dtype)
    c = mask.numel() / ones if rescale else 1.0
    sign = torch.where(scores < 0, -1.0, 1.0).to(weight.dtype) if signed and scores is not None else 1.0
    value = torch.where(mask, weight * sign * c, 0.0)
    if scores is None:
        return value
    numbers = torch.where(weight.isnan(), 0.0, weight)
    step = (scores - scores.detach()) * slope_of(scores.detach(), slope)  # 0, but for derivatives
    value = value + numbers * c * step
    return value - torch.where(mask, numbers, 0.0) * (c / ones) * step.sum() if rescale == "dwr_grad" else value


def linear_exact(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, scores: Tensor | None, slope: str, signed: bool, rescale: str
) -> Tensor:
    return F.linear(x, straight_through(weight, bits, scores, slope, signed, rescale), bias)


def linear_sample(
    dtype: torch.dtype,
    rows: tuple[int, ...],
    size: tuple[int, int],
    form: tuple[str, bool, str],
    with_scores: bool = True,
    bias: bool = True,
) -> Sample:
    n, k = size
    scores = randn(n, k, dtype=dtype, seed=2) if with_scores else None
    label = f"{rows} x {size} {form}{' bias' * bias}{' scores' * with_scores}"
    given = (randn(*rows, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1), pack(random_mask(n, k)))
    return Sample(label, (*given, randn(n, dtype=dtype, seed=3) if bias else None, scores, *form))


ROWS = ((3,), (), (2, 3), (0,), (1,), (17,))


def linear_samples(dtype: torch.dtype) -> list[Sample]:
    rows, forms, bias = itertools.cycle(ROWS), itertools.cycle(FORMS), itertools.cycle((True, True, False))
    found = [linear_sample(dtype, next(rows), size, next(forms), bias=next(bias)) for size in SIZES * 2]
    return [*found, *(linear_sample(dtype, (4,), size, ("one", False, ""), with_scores=False) for size in SIZES)]


def small_linear() -> list[Sample]:
    f64 = torch.float64
    return [linear_sample(f64, (), (2, 3), ("one", False, ""), with_scores=False),
            linear_sample(f64, (2, 1), (3, 2), ("sigmoid", False, "dwr_grad")),
            linear_sample(f64, (2,), (3, 2), ("one", True, "dwr"), bias=False)]  # fmt: skip


def linear_refusals() -> list[Refusal]:
    op, f32 = "_masked_linear", torch.float32
    x, weight, bias = randn(2, 70, dtype=f32), randn(3, 70, dtype=f32), randn(3, dtype=f32)
    good = (x, weight, pack(random_mask(3, 70)), bias, weight, "one", False, "")
    return [
        *mask_refusals(op, good, 1, at_scores=4, at_signed=6, at_rescale=7),
        raw(op, "x must be float16, bfloat16, float32 or float64", good, a0=x.int()),
        raw(op, "x must be [.., 70], got (2, 69)", good, a0=x[:, 1:]),
        raw(op, "x must be [.., 70], got ()", good, a0=x[0, 0]),
        raw(op, "x and weight must both be float64, or neither", good, a0=x.double()),
        raw(op, "weight must be [N, K], got (3, 7, 10)", good, a1=weight.view(3, 7, 10)),
        raw(op, "bias must be [3] of the type of x, got (2,)", good, a3=bias[1:]),
        raw(op, "bias must be [3] of the type of x, got (3,)", good, a3=bias.half()),
        raw(op, "slope must be 'sigmoid', 'sign' or 'one', got ''", good, a5=""),
    ]


def backward_sample(
    dtype: torch.dtype, rows: tuple[int, ...], size: tuple[int, int], form: tuple[str, bool, str], wanted: tuple[bool, ...]
) -> Sample:
    x, weight, bits, _bias, scores, *form = linear_sample(dtype, rows, size, form).args
    label = f"{rows} x {size} {form} {wanted} some dropped"
    return Sample(label, (randn(*rows, size[0], dtype=dtype, seed=4), x, weight, bits, scores, *form, wanted))


def backward_samples(dtype: torch.dtype) -> list[Sample]:
    rows, forms = itertools.cycle(ROWS), itertools.cycle(FORMS)
    every = (True, True, True)
    found = [backward_sample(dtype, next(rows), size, next(forms), every) for size in SIZES * 2]
    some = [wanted for wanted in itertools.product((False, True), repeat=3) if any(wanted)]
    return [*found, *(backward_sample(dtype, (4,), (5, 65), FORMS[4], wanted) for wanted in some)]


def backward_refusals() -> list[Refusal]:
    op, f32 = "_masked_linear_backward", torch.float32
    x, weight, grad = randn(2, 70, dtype=f32), randn(3, 70, dtype=f32), randn(2, 3, dtype=f32)
    good = (grad, x, weight, pack(random_mask(3, 70)), weight, "one", False, "", [True, True, True])
    both = "must both be float64, or neither"
    return [
        *mask_refusals(op, good, 2, at_scores=4, at_signed=6, at_rescale=7),
        raw(op, "x must be [.., 70], got (2, 69)", good, a1=x[:, 1:]),
        raw(op, "x must be float16, bfloat16, float32 or float64", good, a1=x.int()),
        raw(op, f"x and weight {both}", good, a1=x.double()),
        raw(op, "grad must be [.., 3], got (2, 2)", good, a0=grad[:, 1:]),
        raw(op, f"grad and weight {both}", good, a0=grad.double()),
        raw(op, "grad must be of the type of x", good, a0=grad.half()),
        raw(op, "grad (1, 3) and x (2, 70) must have the same rows", good, a0=grad[1:]),
        raw(op, "scores are wanted the gradient of, and there are none", good, a4=None),
        raw(op, "slope must be 'sigmoid', 'sign' or 'one', got ''", good, a5=""),
    ]


# ---- the public functions over them --------------------------------------------------------------------------------------

PRODUCTS = {"linear": F.linear, "conv2d": F.conv2d}


def bits_of(mask: Tensor, weight: Tensor) -> Tensor:
    return mask if mask.dtype == torch.uint8 else pack(mask.reshape(weight.shape))


def masked_exact(op: str) -> Any:
    """masked_linear or masked_conv2d by their definition."""

    def function(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, *convolution: Any) -> Tensor:
        return PRODUCTS[op](x, torch.where(kept(bits_of(mask, weight), weight), weight, 0.0), bias, *convolution)

    return function


def sampled(weight: Tensor, scores: Tensor, **options: Any) -> tuple[Tensor, str]:
    """The bits, and the slope."""
    scores = scores.detach()
    sampler = options.get("sampler", "bernoulli")
    if sampler == "bernoulli":
        return bernoulli_exact(scores, options["seed"]), "sigmoid"
    if sampler == "topk":
        return REFERENCES["topk_mask"](scores, options["density"], True), "one" if options.get("signed") else "sign"
    return REFERENCES["threshold_mask"](scores, 0.0), "one"


def supermask_exact(op: str) -> Any:
    """supermask_linear or supermask_conv2d by their definition."""

    def function(
        x: Tensor, weight: Tensor, scores: Tensor, bias: Tensor | None = None, *convolution: Any, **options: Any
    ) -> Tensor:
        bits, slope = sampled(weight, scores, **options)
        given = (slope, options.get("signed", False), options.get("rescale") or "")
        return PRODUCTS[op](x, straight_through(weight, bits, scores, *given), bias, *convolution)

    return function


def in_autocast(op: str, *, supermask: bool) -> Any:
    """The same of what autocast makes of the arguments; the effective weight of a float32 weight is rounded to its type."""

    def function(
        x: Tensor, weight: Tensor, third: Tensor, bias: Tensor | None = None, *convolution: Any, **options: Any
    ) -> Tensor:
        low = torch.bfloat16
        bits = sampled(weight, third, **options)[0] if supermask else bits_of(third, weight)
        signed, rescale = options.get("signed", False), options.get("rescale") or ""
        wider = weight.dtype == torch.float32
        scores, weight = third if supermask else None, weight if wider else weight.to(low)
        effective = REFERENCES["_apply_mask"](weight, bits, scores, signed, rescale, low if wider else F32).double()
        bias = None if bias is None else bias.to(low).double()
        return PRODUCTS[op](x.to(low).double(), effective, bias, *convolution)

    return function


#: Options of a supermask: every sampler with every rescale and sign that it takes.
OPTIONS: list[dict[str, Any]] = [
    {"seed": 5},
    {"sampler": "topk", "density": 0.4},
    {"sampler": "threshold"},
    {"sampler": "topk", "density": 0.7, "signed": True, "rescale": "dwr"},
    {"sampler": "bernoulli", "seed": torch.tensor(-3), "rescale": "dwr_grad"},
    {"sampler": "threshold", "rescale": "dwr_grad"},
    {"seed": 2**64 - 1, "rescale": "dwr"},
    {"sampler": "topk", "density": 1.0, "signed": True},
    {"sampler": "topk", "density": 0.2, "rescale": "dwr_grad"},
]


def masked_linear_samples(dtype: torch.dtype) -> list[Sample]:
    found, rows = [], itertools.cycle(ROWS)
    for i, (n, k) in enumerate(SIZES * 2):
        mask, lead = random_mask(n, k), next(rows)
        bias = randn(n, dtype=dtype, seed=3) if i % 3 else None
        args = (randn(*lead, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1), pack(mask) if i % 2 else mask, bias)
        found.append(Sample(f"{lead} x {(n, k)}{' bits' * (i % 2)}", args))
    return found


def supermask_linear_samples(dtype: torch.dtype) -> list[Sample]:
    rows, options, found = itertools.cycle(ROWS), itertools.cycle(OPTIONS), []
    for i, (n, k) in enumerate([size for size in SIZES if 0 not in size] * 3):
        lead, chosen = next(rows), next(options)
        bias = randn(n, dtype=dtype, seed=3) if i % 3 else None
        args = (randn(*lead, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1), keeping(n, k, dtype=dtype), bias)
        found.append(Sample(f"{lead} x {(n, k)} {chosen} some dropped", args, chosen))
    return found


def keeping(*shape: int, dtype: torch.dtype) -> Tensor:
    """Scores of which some are kept, whatever the sampler."""
    scores = randn(*shape, dtype=dtype, seed=2)
    scores.view(-1)[0] = 9.0
    return scores


# x, weight, stride, padding, dilation, groups. Convolutions differ in whether a padding's zero times NaN is NaN: there is none.
CONVOLUTIONS: list[tuple[Any, ...]] = [
    ((2, 4, 7, 6), (6, 2, 3, 3), 2, 0, 1, 2),
    ((1, 3, 5, 5), (4, 3, 1, 1), 1, 0, 1, 1),
    ((3, 6, 8), (5, 3, 3, 2), (1, 2), "valid", 1, 1),
    ((2, 2, 9, 9), (2, 2, 3, 3), 1, 0, (2, 3), 1),
    ((2, 7, 6, 5), (8, 7, 3, 3), 1, 0, 1, 1),
    ((0, 2, 5, 6), (3, 2, 2, 2), 1, 0, 1, 1),
]
#: In 16 bits they are what the vendor's are, which round more than once.
CONVOLVED = (torch.float32, torch.float64)


def conv_sample(dtype: torch.dtype, case: tuple[Any, ...], third: Any, options: dict[str, Any], bias: bool = True) -> Sample:
    size, shape, *convolution = case
    x, weight = randn(*size, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    args = (x, weight, third, randn(shape[0], dtype=dtype, seed=3) if bias else None, *convolution)
    return Sample(f"{case} {options} some dropped", args, options)


def masked_conv_samples(dtype: torch.dtype) -> list[Sample]:
    found = []
    for i, case in enumerate(CONVOLUTIONS):
        mask = random_mask(*case[1])
        found.append(conv_sample(dtype, case, (mask, mask.flatten(1), pack(mask))[i % 3], {}, bias=bool(i % 2)))
    return found


def supermask_conv_samples(dtype: torch.dtype) -> list[Sample]:
    cases = itertools.cycle(CONVOLUTIONS)
    return [
        conv_sample(dtype, case, keeping(*case[1], dtype=dtype), options, bias=i % 3 != 0)
        for i, (options, case) in enumerate(zip(OPTIONS, cases, strict=False))
    ]


def small_masked_linear() -> list[Sample]:
    f64 = torch.float64
    mask = random_mask(3, 2)
    return [Sample("bool", (randn(2, 2, 2, dtype=f64), randn(3, 2), mask, randn(3))),
            Sample("bits", (randn(2), randn(3, 2), pack(mask)))]  # fmt: skip


def small_masked_conv() -> list[Sample]:
    mask = random_mask(2, 1, 2, 2)
    return [Sample("groups", (randn(1, 2, 3, 2), randn(2, 1, 2, 2), mask, randn(2), 1, (1, 0), 1, 2)),
            Sample("unbatched, bits", (randn(1, 3, 3), randn(2, 1, 2, 2), pack(mask), None, 2))]  # fmt: skip


def small_supermask_linear() -> list[Sample]:
    return [Sample(f"{options}", (randn(2, 2), randn(3, 2, seed=1), keeping(3, 2, dtype=torch.float64), randn(3)), options)
            for options in OPTIONS[2:6]]  # fmt: skip


def small_supermask_conv() -> list[Sample]:
    case = ((1, 2, 3, 2), (2, 1, 2, 2), 1, (1, 0), 1, 2)
    return [conv_sample(torch.float64, case, keeping(*case[1], dtype=torch.float64), options) for options in OPTIONS[3:5]]


def tensors_refusals(op: str, x: Tensor, weight: Tensor, third: Any) -> list[Refusal]:
    """What the four refuse of x, weight and bias alike."""
    call, floating = getattr(maskmm, op), "must be float16, bfloat16, float32 or float64, got"

    def refused(error: type[Exception], message: str, a: Any = x, b: Any = weight, *bias: Any) -> Refusal:
        return Refusal(error, f"{op}: {message}", lambda: call(a, b, third, *bias))

    bias = torch.zeros(weight.shape[0])
    return [
        refused(TypeError, "x must be a Tensor, got list", [1.0]),
        refused(TypeError, f"x {floating} int64", x.long()),
        refused(TypeError, "weight must be a Tensor, got NoneType", x, None),
        refused(TypeError, f"weight {floating} bool", x, weight.bool()),
        refused(TypeError, "weight must be float64 as x is, got float32; convert one with .to()", x.double()),
        refused(TypeError, "weight must be float32 as x is, got bfloat16; convert one with .to()", x, weight.bfloat16()),
        refused(TypeError, "bias must be float32 as x is, got float16; convert one with .to()", x, weight, bias.half()),
        refused(TypeError, f"bias {floating} int32", x, weight, bias.int()),
        refused(TypeError, "bias must be a Tensor, got int", x, weight, 1),
        refused(ValueError, "bias must be [3], got [1, 3]", x, weight, bias[None]),
        refused(ValueError, "bias must be [3], got [2]", x, weight, bias[1:]),
        refused(ValueError, "weight is on cpu, x on meta; move one with .to()", x.to("meta")),
        refused(ValueError, "bias is on meta, x on cpu; move one with .to()", x, weight, bias.to("meta")),
    ]


def mask_argument_refusals(op: str, x: Tensor, weight: Tensor) -> list[Refusal]:
    """Of a mask for a weight [3, K] or [3, ..]."""
    call, shape, k = getattr(maskmm, op), tuple(weight.shape), weight[0].numel()
    mask = random_mask(*shape)
    soft = mask.float()
    soft.view(-1)[7] = 0.3
    pad = f"mask has bits set beyond its {k} columns, which must be zero; pack with pack_mask"
    turned = mask.permute(*reversed(range(mask.dim())))
    match = f"does not match weight shape {shape}"
    packed = f"packed mask for weight {shape} must be {(3, maskmm.row_bytes(k))}, got"
    only = "mask must be bool or packed uint8, got"

    def refused(error: type[Exception], message: str, wrong: Any) -> Refusal:
        return Refusal(error, f"{op}: {message}", lambda: call(x, weight, wrong))

    return [
        refused(TypeError, "mask must be a Tensor, got NoneType", None),
        refused(
            TypeError,
            f"{only} float32 with 0.3 at flat index 7; a mask keeps or drops: for soft masks use superposed_linear or multiply "
            "the weight",
            soft,
        ),
        refused(TypeError, f"{only} float64 of zeros and ones; pass mask.bool()", mask.double()),
        refused(TypeError, f"{only} int64; compare first, as in mask != 0", mask.long()),
        refused(ValueError, f"mask shape {tuple(turned.shape)} {match}; did you mean mask.t()?", turned),
        refused(ValueError, f"mask shape {shape[1:]} {match}", mask[0]),
        refused(ValueError, f"mask shape (2, {k}) {match}", mask.flatten(1)[1:]),
        refused(ValueError, f"{packed} (3, {maskmm.row_bytes(k + 64)})", pack(random_mask(3, k + 64))),
        refused(ValueError, f"{packed} {shape}", mask.byte()),
        refused(ValueError, pad, flipped(pack(mask), 1, maskmm.row_bytes(k) - 1, 128)),
        refused(ValueError, "mask is on meta, weight on cpu; move one with .to()", mask.to("meta")),
    ]


def sample_refusals(op: str, x: Tensor, weight: Tensor) -> list[Refusal]:
    """Of scores and options."""
    call, scores = getattr(maskmm, op), weight.clone()

    def refused(error: type[Exception], message: str, given: Any = scores, **options: Any) -> Refusal:
        return Refusal(error, f"{op}: {message}", lambda: call(x, weight, given, **options))

    shape, samplers, rescales = tuple(weight.shape), "('bernoulli', 'topk', 'threshold')", "('dwr', 'dwr_grad')"
    with_nan = scores.clone()
    with_nan.view(-1)[4] = with_nan.view(-1)[-1] = math.nan
    holds = "scores hold 2 NaN, the first at flat index 4; mend them before a mask is made"
    return [
        refused(TypeError, "scores must be a Tensor, got NoneType", None),
        refused(TypeError, "scores must be float16, bfloat16, float32 or float64, got bool", scores.bool()),
        refused(ValueError, "scores must be [N, K] or have a convolution weight's shape, got (3,)", scores.flatten(1)[:, 0]),
        refused(ValueError, f"scores {(2, *shape[1:])} must have weight's shape {shape}", scores[1:]),
        refused(ValueError, "scores are on meta, weight on cpu; move one with .to()", scores.to("meta")),
        refused(ValueError, f"sampler must be one of {samplers}, got 'round'", sampler="round"),
        refused(TypeError, f"sampler must be one of {samplers}, got None", sampler=None),
        refused(ValueError, f"rescale must be one of {rescales}, got 'half'", rescale="half"),
        refused(TypeError, f"rescale must be one of {rescales}, got True", rescale=True),
        refused(TypeError, "signed must be a bool, got 1", signed=1),
        refused(ValueError, "sampler 'topk' needs density, the fraction kept", sampler="topk"),
        refused(ValueError, "density goes with sampler 'topk', got density=0.5 and 'bernoulli'", density=0.5),
        refused(
            ValueError, "density goes with sampler 'topk', got density=0.5 and 'threshold'", density=0.5, sampler="threshold"
        ),
        refused(ValueError, "seed goes with sampler 'bernoulli', got 'topk'", sampler="topk", density=0.5, seed=1),
        refused(ValueError, "signed=True goes with sampler 'topk', got 'bernoulli'", signed=True),
        refused(
            ValueError,
            "rescale='dwr_grad' counts ones and is not defined for signed masks; use 'dwr'",
            sampler="topk",
            density=0.5,
            signed=True,
            rescale="dwr_grad",
        ),
        *density_refusals(op, lambda density: call(x, weight, scores, sampler="topk", density=density)),
        *(
            refused(
                ValueError,
                f"rescale={rescale!r} divides by the number of kept weights, and none is kept; raise scores or density",
                -scores.abs() - 1,
                rescale=rescale,
                **options,
            )
            for rescale, options in (
                ("dwr", {"sampler": "threshold"}),
                ("dwr_grad", {"sampler": "threshold"}),
                ("dwr", {"sampler": "topk", "density": 1e-18}),
            )
        ),
        refused(TypeError, "seed must be an int, got 1.5", seed=1.5),
        refused(TypeError, "seed must be an int or an int64 tensor, got int32", seed=torch.tensor(1, dtype=torch.int32)),
        refused(ValueError, "seed must lie in 0..2**64-1, got -1", seed=-1),
        # What only the values tell, the op underneath tells.
        *(
            Refusal(ValueError, f"{sampler}_mask: {holds}", lambda o=options: call(x, weight, with_nan, **o))
            for sampler, options in (
                ("bernoulli", {}),
                ("topk", {"sampler": "topk", "density": 0.5}),
                ("threshold", {"sampler": "threshold"}),
            )
        ),
    ]


def conv_refusals(op: str, x: Tensor, weight: Tensor, third: Any) -> list[Refusal]:
    """Of a convolution's numbers."""
    call = getattr(maskmm, op)

    def refused(error: type[Exception], message: str, a: Any = x, b: Any = weight, **options: Any) -> Refusal:
        return Refusal(error, f"{op}: {message}", lambda: call(a, b, third, **options))

    got = f"x must be [B, 4, H, W] for weight {tuple(weight.shape)} and groups=1, got"
    return [
        refused(ValueError, "weight must be [Cout, Cin/groups, kh, kw], got (3, 36)", x, weight.flatten(1)),
        refused(ValueError, f"{got} (1, 2, 6, 5)", x[:, 2:]),
        refused(ValueError, f"{got} (6, 5)", x[0, 0]),
        refused(ValueError, f"{got} (1, 1, 4, 6, 5)", x[None]),
        refused(ValueError, "groups must divide the 3 output channels, got 2", groups=2),
        refused(ValueError, "groups must divide the 3 output channels, got 0", groups=0),
        refused(TypeError, "groups must be an int, got 1.0", groups=1.0),
        refused(ValueError, "stride must be an int or two, got (1, 2, 3)", stride=(1, 2, 3)),
        refused(ValueError, "stride must be at least 1, got 0", stride=0),
        refused(TypeError, "stride must be an int, got 1.5", stride=1.5),
        refused(ValueError, "dilation must be at least 1, got (1, 0)", dilation=(1, 0)),
        refused(ValueError, "padding must be at least 0, got -1", padding=-1),
        refused(ValueError, "padding must be one of ('same', 'valid'), got 'full'", padding="full"),
        refused(ValueError, "padding='same' needs stride 1, got (2, 2); give the widths as ints", padding="same", stride=2),
        refused(ValueError, "W of x, 2 with padding 0, is smaller than the kernel, 3 with dilation 1", x[..., :2]),
        refused(ValueError, "H of x, 6 with padding 1, is smaller than the kernel, 3 with dilation 4", padding=1, dilation=4),
    ]


def linear_argument_refusals(op: str, third: Any) -> list[Refusal]:
    call, x, weight = getattr(maskmm, op), torch.zeros(2, 12), torch.zeros(3, 12)
    needs = "weight (3, 12) needs 12; x is [.., K]"
    return [
        Refusal(ValueError, f"{op}: weight must be [N, K], got (36,)", lambda: call(x, weight.flatten(), third)),
        Refusal(ValueError, f"{op}: weight must be [N, K], got (3, 3, 4)", lambda: call(x, weight.view(3, 3, 4), third)),
        Refusal(ValueError, f"{op}: last dimension of x is 3, {needs}", lambda: call(torch.zeros(12, 3), weight, third)),
        Refusal(ValueError, f"{op}: last dimension of x is missing, {needs}", lambda: call(x[0, 0], weight, third)),
    ]


def composite_refusals(op: str) -> list[Refusal]:
    conv = op.endswith("conv2d")
    x, weight = (randn(1, 4, 6, 5), randn(3, 4, 3, 3)) if conv else (randn(2, 12), randn(3, 12))
    x, weight = x.float(), weight.float()
    third = random_mask(*weight.shape) if op.startswith("masked") else weight.clone()
    found = tensors_refusals(op, x, weight, third)
    found += conv_refusals(op, x, weight, third) if conv else linear_argument_refusals(op, third)
    return found + (mask_argument_refusals if op.startswith("masked") else sample_refusals)(op, x, weight)


# ---- what the battery is fed ---------------------------------------------------------------------------------------------

ROWS_TOGETHER = {"exports": "a dynamic batch is one of several tensors at once"}


def large_weight(dtype: torch.dtype) -> tuple[int, int]:
    """Of more than one tile where the type is a wide one."""
    return {torch.float32: (2100, 1050), torch.float64: (1100, 1000)}.get(dtype, (500, 700))


def linear_sizes(of: Any) -> list[Sample]:
    return [of(lead) for lead in (3, 5, 8)]


OPS = (
    Op(
        name="pack_mask",
        call=maskmm.pack_mask,
        reference=REFERENCES["pack_mask"],
        samples=pack_samples,
        small=lambda: [Sample(f"{shape}", (random_mask(*shape),)) for shape in ((2, 3), (2, 1, 5, 13))],
        sizes=lambda: [Sample(f"{shape}", (random_mask(*shape),)) for shape in ((3, 65), (4, 128), (9, 20))],
        dynamic=(0, 1),
        large=lambda _: Sample("large", (random_mask(1500, 2003),)),
        refusals=pack_refusals,
        dtypes=(torch.uint8,),
    ),
    Op(
        name="unpack_mask",
        call=maskmm.unpack_mask,
        reference=REFERENCES["unpack_mask"],
        samples=unpack_samples,
        small=lambda: [Sample(f"{k}", (pack(random_mask(2, k)), k)) for k in (3, 65)],
        sizes=lambda: [Sample(f"{n}", (pack(random_mask(n, 70)), 70)) for n in (3, 4, 9)],
        dynamic=(0,),
        large=lambda _: Sample("large", (pack(random_mask(1500, 2003)), 2003)),
        refusals=unpack_refusals,
        dtypes=(torch.bool,),
    ),
    Op(
        name="bernoulli_mask",
        call=bernoulli,
        reference=bernoulli_exact,
        samples=lambda _: [*of_scores(SEEDS), Sample("at the edge", (at_the_edge(36, 65, 5)[0], 5))],
        small=lambda: small_scores(SEEDS[1:3]),
        sizes=lambda: [Sample(f"{shape}", (scores_of(*shape, dtype=F32), 7)) for shape in ((3, 65), (4, 128), (9, 20))],
        dynamic=(0, 1),
        large=lambda _: Sample("large", (scores_of(500, 1003, dtype=F32), 2**63 + 11, 2**32 - 1000)),
        refusals=bernoulli_refusals,
        dtypes=(torch.uint8,),
    ),
    Op(
        name="topk_mask",
        call=topk,
        reference=lambda scores, density, abs_=True: REFERENCES["topk_mask"](scores, density, abs_),
        samples=lambda _: of_scores(DENSITIES),
        small=lambda: small_scores(DENSITIES[:2]),
        sizes=lambda: [Sample(f"{shape}", (scores_of(*shape, dtype=F32), 0.3)) for shape in ((3, 65), (4, 128), (9, 20))],
        dynamic=(0, 1),
        large=lambda _: Sample("large", (scores_of(500, 1003, dtype=F32), 0.37)),
        refusals=topk_refusals,
        dtypes=(torch.uint8,),
    ),
    Op(
        name="threshold_mask",
        call=maskmm.threshold_mask,
        reference=REFERENCES["threshold_mask"],
        samples=lambda _: of_scores(THRESHOLDS),
        small=lambda: small_scores(THRESHOLDS[:2]),
        sizes=lambda: [Sample(f"{shape}", (scores_of(*shape, dtype=F32),)) for shape in ((3, 65), (4, 128), (9, 20))],
        dynamic=(0, 1),
        large=lambda _: Sample("large", (scores_of(1500, 2003, dtype=F32), 0.1)),
        refusals=threshold_refusals,
        dtypes=(torch.uint8,),
    ),
    Op(
        name="_apply_mask",
        call=apply_mask,
        reference=apply_mask_exact,
        samples=apply_samples,
        small=lambda: [apply_sample(torch.float64, (3, 2), *form) for form in APPLIED[1:3]],
        sizes=lambda: [apply_sample(F32, shape, False, "") for shape in ((3, 65), (4, 128), (9, 20))],
        dynamic=(0, 1),
        large=lambda dtype: apply_sample(dtype, (600, 1003), True, "dwr"),
        refusals=apply_refusals,
        excused=ROWS_TOGETHER,
    ),
    Op(
        name="_mask_gradients",
        call=lambda *args: battery.joined(maskmm._mask_gradients(*args)),
        reference=lambda *args: battery.joined(REFERENCES["_mask_gradients"](*args)),
        samples=gradients_samples,
        small=lambda: [gradients_sample(torch.float64, (3, 2), form, (True, True)) for form in FORMS[6:8]],
        sizes=lambda: [gradients_sample(F32, shape, FORMS[0], (True, True)) for shape in ((3, 65), (4, 128), (9, 20))],
        dynamic=(0, 1),
        large=lambda dtype: gradients_sample(dtype, (500, 1203), FORMS[7], (True, True)),
        refusals=gradients_refusals,
        differentiable=False,
        excused=ROWS_TOGETHER,
    ),
    Op(
        name="_masked_linear",
        call=maskmm._masked_linear,
        reference=linear_exact,
        samples=linear_samples,
        small=small_linear,
        sizes=lambda: linear_sizes(lambda lead: linear_sample(F32, (lead,), (4, 70), FORMS[0])),
        dynamic=(0,),
        large=lambda dtype: linear_sample(dtype, (12,), large_weight(dtype), FORMS[4]),
        refusals=linear_refusals,
        straight_through=4,
    ),
    Op(
        name="_masked_linear_backward",
        call=lambda *args: battery.joined(maskmm._masked_linear_backward(*args)),
        reference=lambda *args: battery.joined(REFERENCES["_masked_linear_backward"](*args)),
        samples=backward_samples,
        small=lambda: [backward_sample(torch.float64, (2,), (3, 2), form, (True, True, True)) for form in FORMS[6:8]],
        sizes=lambda: linear_sizes(lambda lead: backward_sample(F32, (lead,), (4, 70), FORMS[0], (True, True, True))),
        dynamic=(0,),
        large=lambda dtype: backward_sample(dtype, (12,), large_weight(dtype), FORMS[7], (True, True, True)),
        refusals=backward_refusals,
        differentiable=False,
        excused=ROWS_TOGETHER,
    ),
    Op(
        name="masked_linear",
        call=maskmm.masked_linear,
        reference=masked_exact("linear"),
        samples=masked_linear_samples,
        small=small_masked_linear,
        sizes=lambda: linear_sizes(
            lambda m: Sample(f"{m}", (randn(m, 70, dtype=F32), randn(4, 70, dtype=F32), random_mask(4, 70)))
        ),
        dynamic=(0,),
        large=lambda dtype: Sample(
            "large", (randn(40, 900, dtype=dtype), randn(1000, 900, dtype=dtype), random_mask(1000, 900))
        ),
        refusals=lambda: composite_refusals("masked_linear"),
        autocast=in_autocast("linear", supermask=False),
    ),
    Op(
        name="masked_conv2d",
        call=maskmm.masked_conv2d,
        reference=masked_exact("conv2d"),
        samples=masked_conv_samples,
        small=small_masked_conv,
        sizes=lambda: [
            Sample(f"{s}", (randn(*s, dtype=F32), randn(3, 2, 3, 3, dtype=F32), random_mask(3, 2, 3, 3)))
            for s in ((2, 2, 5, 7), (3, 2, 8, 6), (5, 2, 9, 9))
        ],
        dynamic=(0, 2, 3),
        large=lambda dtype: conv_sample(dtype, ((4, 32, 24, 24), (64, 32, 3, 3), 1, 1, 1, 1), random_mask(64, 32, 3, 3), {}),
        refusals=lambda: composite_refusals("masked_conv2d"),
        dtypes=CONVOLVED,
        autocast=in_autocast("conv2d", supermask=False),
    ),
    Op(
        name="supermask_linear",
        call=maskmm.supermask_linear,
        reference=supermask_exact("linear"),
        samples=supermask_linear_samples,
        small=small_supermask_linear,
        sizes=lambda: linear_sizes(
            lambda m: Sample(f"{m}", (randn(m, 70, dtype=F32), randn(4, 70, dtype=F32), keeping(4, 70, dtype=F32)), OPTIONS[0])
        ),
        dynamic=(0,),
        large=lambda dtype: Sample(
            "large",
            (randn(40, 900, dtype=dtype), randn(1000, 900, dtype=dtype), keeping(1000, 900, dtype=dtype)),
            {"sampler": "topk", "density": 0.3},
        ),
        refusals=lambda: composite_refusals("supermask_linear"),
        straight_through=2,
        autocast=in_autocast("linear", supermask=True),
    ),
    Op(
        name="supermask_conv2d",
        call=maskmm.supermask_conv2d,
        reference=supermask_exact("conv2d"),
        samples=supermask_conv_samples,
        small=small_supermask_conv,
        sizes=lambda: [
            Sample(f"{s}", (randn(*s, dtype=F32), randn(3, 2, 3, 3, dtype=F32), keeping(3, 2, 3, 3, dtype=F32)), OPTIONS[0])
            for s in ((2, 2, 5, 7), (3, 2, 8, 6), (5, 2, 9, 9))
        ],
        dynamic=(0, 2, 3),
        large=lambda dtype: conv_sample(
            dtype, ((4, 32, 24, 24), (64, 32, 3, 3), 1, 1, 1, 1), keeping(64, 32, 3, 3, dtype=dtype), OPTIONS[0]
        ),
        refusals=lambda: composite_refusals("supermask_conv2d"),
        dtypes=CONVOLVED,
        straight_through=2,
        autocast=in_autocast("conv2d", supermask=True),
    ),
)

test_op = battery.tests_of(OPS)


@pytest.mark.skipif(len(battery.tiers()) < 2, reason="this machine has one tier")
def test_every_tier_agrees(tmp_path):
    battery.every_tier_agrees("test_maskmm", OPS, tmp_path)


def test_every_error_is_tested():
    assert battery.unreached_raises(OPS, maskmm, []) == []
