"""Masks, and layers that wear one: against the idioms of lottery-ticket and supermask code.

People multiply the weight by a mask of numbers, and make that mask anew on every forward pass: by a sort of all scores
(Ramanujan et al., 2019) or by one random number per weight (Zhou et al., 2019). The rivals do so, as published and at their
best; the yardstick is the same layer with a weight that was masked beforehand. A rival that draws its own random mask is
checked against the layer that wears that very mask.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import fourfold as ff
import numpy
import torch
import torch.nn.functional as F
from fourfold.reference import maskmm as reference
from torch import Tensor

from . import cases as shapes
from .harness import Call, Case, Contestant, Group, Settings, Tolerance, in_fresh_memory

FAMILY = "maskmm"
SEED = 2019
# Gradients are sums of up to 61 440 products, and differ in size: errors are measured against a tensor's own.
FLOAT32 = Tolerance(1e-4, 1e-5, of_rms=True)
BFLOAT16 = Tolerance(1e-3, 2**-7, of_rms=True)  # up to three roundings of 2^-9 on the way to a gradient
EXACT = Tolerance(0.0, 0.0)

Draw = Callable[[Tensor], Tensor]  # from probabilities, magnitudes or scores a mask of numbers


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def distinct(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers uniform in +-1 / sqrt(K), as scores start in edge-popup, no two magnitudes equal: so there is one top k."""
    n = math.prod(shape)
    between = torch.rand(n, dtype=torch.float64, generator=generator) / 2 if n <= 2**22 else 0  # more don't fit in float32
    magnitudes = (torch.randperm(n, generator=generator) + 0.5 + between) / (n * math.sqrt(n / shape[0]))
    signs = torch.randint(2, (n,), generator=generator) * 2 - 1
    return (magnitudes * signs).float().view(shape)


def reseed(device: torch.device) -> None:
    """Everyone who draws from torch's generator after this draws the same."""
    of_cuda = torch.cuda.default_generators
    (torch.default_generator if device.type == "cpu" else of_cuda[device.index or 0]).manual_seed(SEED)


# --- layers: problems -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mode:
    """Where the mask comes from.

    limits: for the cost over the layer that was masked beforehand, by M.
    """

    name: str
    sampler: str | None = None  # None: it is given
    density: float | None = None  # kept; of "topk", and of a mask that is given
    limits: tuple[tuple[int, float], ...] = ()

    def group(self, m: int) -> Group:
        return Group(f"{self.name}, M={m}", limit=dict(self.limits).get(m))


FIXED = Mode("fixed mask", density=0.2)
BERNOULLI = Mode("Bernoulli", "bernoulli", limits=((64, 1.5), (512, 1.25)))
EDGE_POPUP = Mode("edge-popup", "topk", 0.5, limits=((64, 1.8), (512, 1.3)))
THRESHOLD = Mode("threshold", "threshold")


class Problem:
    """A layer, its mask or the scores for one, and what every contestant may prepare."""

    def __init__(
        self,
        place: shapes.Linear | shapes.Layer,
        mode: Mode,
        dtype: torch.dtype,
        backward: bool,
        device: torch.device,
        *,
        recorded: bool = False,
    ) -> None:
        self.place, self.mode, self.backward = place, mode, backward
        generator = torch.Generator().manual_seed(0)
        if isinstance(place, shapes.Linear):
            size, shape = (place.batch, place.columns), (place.rows, place.columns)
        else:
            size, shape = place.input, (place.channels, place.input[1], *[place.kernel] * place.rank)
        self.fan_in = math.prod(shape[1:])
        x, weight = torch.randn(size, generator=generator), torch.randn(shape, generator=generator) / math.sqrt(self.fan_in)
        self.x, self.weight = (t.to(device, dtype) for t in (x, weight))
        self.scores = distinct(shape, generator).to(device)
        if mode.sampler == "bernoulli":
            self.scores *= 2 * math.sqrt(self.fan_in)  # so that probabilities differ
        self.keep = weight.numel() - int((1 - (mode.density or 0.5)) * weight.numel())
        mask = (torch.rand(shape, generator=generator) < (mode.density or 0.5)).to(device)
        self.bits = reference.pack_mask(mask)
        self.mask, self.numbers = mask, mask.to(dtype)
        self.kept = torch.where(mask, self.weight, 0)
        with torch.no_grad():
            result = self.apply(self.x, self.kept).shape
        self.grad = torch.randn(result, generator=generator).to(device, dtype)
        self.trained = self.weight if mode.sampler is None else self.scores
        for leaf in (self.x, self.trained, self.kept):
            leaf.requires_grad_(backward or recorded)
        self.drawn: Tensor | None = None  # the mask of a rival that does not draw from torch's generator

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.place, shapes.Linear):
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, self.place.stride, self.place.padding)

    def values(self) -> Tensor:
        """What the mask is made from."""
        if self.mode.sampler == "bernoulli":
            return self.scores.sigmoid()
        return self.scores.abs() if self.mode.sampler == "topk" else self.scores

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


def _call(p: Problem, forward: Callable[[], Tensor], leaf: Tensor) -> Call:
    """The result, or the result and the gradients of leaf and x."""
    if not p.backward:
        return forward

    def call() -> tuple[Tensor, ...]:
        y = forward()
        return y, *torch.autograd.grad(y, [leaf, p.x], p.grad)

    return call


# --- layers: contestants --------------------------------------------------------------------------------------------------


def ours(p: Problem, state: str) -> Call:
    mode, place = p.mode, p.place
    if mode.sampler is None:
        op = functools.partial(ff.masked_linear if isinstance(place, shapes.Linear) else ff.masked_conv2d, mask=p.bits)
    else:
        op = functools.partial(
            ff.supermask_linear if isinstance(place, shapes.Linear) else ff.supermask_conv2d,
            scores=p.scores,
            sampler=mode.sampler,
            density=mode.density,
            seed=SEED if mode.sampler == "bernoulli" else None,
        )
    options = {} if isinstance(place, shapes.Linear) else {"stride": place.stride, "padding": place.padding}
    return _call(p, functools.partial(op, p.x, p.weight, **options), p.trained)


def floor(p: Problem, state: str) -> Call:
    return _call(p, lambda: p.apply(p.x, p.kept), p.kept)


def times_numbers(p: Problem, state: str) -> Call:
    return _call(p, lambda: p.apply(p.x, p.weight * p.numbers), p.trained)


def times_bools(p: Problem, state: str) -> Call:
    return _call(p, lambda: p.apply(p.x, p.weight * p.mask), p.trained)


def times_numbers_compiled(p: Problem, state: str) -> Call:
    forward = torch.compile(lambda: p.apply(p.x, p.weight * p.numbers), dynamic=False, fullgraph=True)
    return _call(p, forward, p.trained)


class StraightThrough(torch.autograd.Function):
    """The mask forward, the identity backward."""

    @staticmethod
    def forward(ctx, values: Tensor, draw: Draw) -> Tensor:
        return draw(values)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def by_sort(values: Tensor, keep: int) -> Tensor:
    """As edge-popup is published: all scores sorted, then written by their rank."""
    order = values.flatten().sort().indices
    mask = torch.empty_like(values)
    flat = mask.view(-1)
    flat[order[: len(order) - keep]] = 0
    flat[order[len(order) - keep :]] = 1
    return mask


def by_topk(values: Tensor, keep: int) -> Tensor:
    kept = values.flatten().topk(keep, sorted=False).indices
    return torch.zeros_like(values).view(-1).index_fill_(0, kept, 1).view(values.shape)


def by_kthvalue(values: Tensor, keep: int) -> Tensor:
    cut = values.flatten().kthvalue(values.numel() - keep + 1).values
    return (values >= cut).to(values.dtype)


def by_rand(probabilities: Tensor) -> Tensor:
    return (torch.rand_like(probabilities) < probabilities).to(probabilities.dtype)


def by_sign(scores: Tensor) -> Tensor:
    return (scores >= 0).to(scores.dtype)


def idiom(draw: Callable[..., Tensor], *, compiled: bool = False, tells: bool = False) -> Callable[[Problem, str], Call]:
    """Scores to a mask of numbers, times the weight, all recorded by autograd.

    tells: which mask it was, to the problem: compiled code draws from a generator of its own. It keeps the mask for backward
    anyway.
    """

    def make(p: Problem, state: str) -> Call:
        drawn = functools.partial(draw, keep=p.keep) if p.mode.sampler == "topk" else draw

        def forward() -> tuple[Tensor, Tensor | None]:
            mask = StraightThrough.apply(p.values(), drawn)
            return p.apply(p.x, p.weight * mask.to(p.weight.dtype)), mask.detach() if tells else None

        run = torch.compile(forward, dynamic=False, fullgraph=True) if compiled else forward

        def call() -> tuple[Tensor, ...]:
            if p.mode.sampler == "bernoulli":
                reseed(p.x.device)
            y, p.drawn = run()
            return y, *torch.autograd.grad(y, [p.scores, p.x], p.grad)

        if tells:
            call()
        return call

    return make


# --- layers: references ---------------------------------------------------------------------------------------------------


def _exact(p: Problem, mask: Tensor, slope: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    """In float64: the result, and the gradients of what is trained and of x; slope None: of the masked weight."""
    x, weight, scores = (t.detach().double() for t in (p.x, p.weight, p.scores))
    x, masked = x.requires_grad_(p.backward), (weight * mask).requires_grad_(p.backward)
    y = p.apply(x, masked)
    if not p.backward:
        return [y]
    of_masked, of_x = torch.autograd.grad(y, [masked, x], p.grad.double())
    return [y.detach(), of_masked if slope is None else of_masked * weight * slope(scores), of_x]


def masked_beforehand(p: Problem) -> list[Tensor]:
    return _exact(p, p.mask, None)


def with_fixed_mask(p: Problem) -> list[Tensor]:
    results = _exact(p, p.mask, None)
    return [results[0], results[1] * p.mask, results[2]] if len(results) > 1 else results


def _sigmoid_slope(scores: Tensor) -> Tensor:
    return scores.sigmoid() * (-scores).sigmoid()


def with_our_draw(p: Problem) -> list[Tensor]:
    bits = reference.bernoulli_mask(p.scores, torch.tensor(SEED, device=p.scores.device), 0)
    return _exact(p, reference.kept(bits, p.weight), _sigmoid_slope)


def with_the_draw_of(draw: Draw) -> Callable[[Problem], list[Tensor]]:
    def exact(p: Problem) -> list[Tensor]:
        reseed(p.x.device)
        return _exact(p, draw(p.values()), _sigmoid_slope)

    return exact


def with_the_mask_told(p: Problem) -> list[Tensor]:
    assert p.drawn is not None
    return _exact(p, p.drawn, _sigmoid_slope)


def with_largest(p: Problem) -> list[Tensor]:
    magnitudes = p.scores.detach().abs()
    cut = magnitudes.flatten().sort(descending=True).values[p.keep - 1]
    return _exact(p, magnitudes >= cut, torch.sign)


def with_reached(p: Problem) -> list[Tensor]:
    return _exact(p, p.scores.detach() >= 0, torch.ones_like)


REFERENCES = {None: with_fixed_mask, "bernoulli": with_our_draw, "topk": with_largest, "threshold": with_reached}


# --- layers: cases --------------------------------------------------------------------------------------------------------


def _rivals(settings: Settings, mode: Mode) -> Iterator[Contestant]:
    compiles = settings.compiles
    if mode.sampler is None:
        yield Contestant("weight * float mask", times_numbers)
        yield Contestant("weight * bool mask", times_bools)
        if compiles:
            yield Contestant("weight * float mask, compiled", times_numbers_compiled)
    elif mode.sampler == "bernoulli":
        for name, draw in (("torch.bernoulli", torch.bernoulli), ("rand < p", by_rand)):
            yield Contestant(name, idiom(draw), reference=with_the_draw_of(draw))
        if compiles:
            yield Contestant("rand < p, compiled", idiom(by_rand, compiled=True, tells=True), reference=with_the_mask_told)
    elif mode.sampler == "topk":
        yield Contestant("sort, as published", idiom(by_sort))
        yield Contestant("torch.topk", idiom(by_topk))
        yield Contestant("kthvalue", idiom(by_kthvalue))
        if compiles:
            yield Contestant("kthvalue, compiled", idiom(by_kthvalue, compiled=True))
    else:
        yield Contestant("scores >= 0 as numbers", idiom(by_sign))
        if compiles:
            yield Contestant("scores >= 0 as numbers, compiled", idiom(by_sign, compiled=True))


def _work(place: shapes.Linear | shapes.Layer, mode: Mode, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """bytes and flops of the layer without a mask; scores count as a weight."""
    if isinstance(place, shapes.Linear):
        read, written = place.batch * place.columns, place.batch * place.rows
        weights, products = place.rows * place.columns, place.batch * place.rows * place.columns
    else:
        batch, channels, *size = place.input
        pixels = batch * math.prod(-(-n // place.stride) for n in size)
        read, written = math.prod(place.input), pixels * place.channels
        weights = channels * place.channels * place.kernel**place.rank
        products = weights * pixels
    scores = 4 * weights * (mode.sampler is not None)
    if not backward:
        return {"bytes": (read + written + weights) * dtype.itemsize + scores, "flops": 2 * products}
    # Backward reads the gradient, x, weight and scores, and writes the gradients of x and of weight or scores.
    trained = 4 * weights if scores else dtype.itemsize * weights
    elements = 3 * read + 2 * written + 2 * weights
    return {"bytes": elements * dtype.itemsize + 2 * scores + trained, "flops": 6 * products}


def _layer(
    settings: Settings,
    place: shapes.Linear | shapes.Layer,
    mode: Mode,
    *,
    dtype: torch.dtype = torch.float32,
    backward: bool = True,
    grouped: bool = False,
    quick: bool = False,
) -> Case:
    linear = isinstance(place, shapes.Linear)
    words = f"{place}" + f", {mode.name}" * (mode.sampler is not None) + f", {name_of(dtype)}" * (dtype != torch.float32)
    label = f"{place.rows}x{place.columns}" if grouped and isinstance(place, shapes.Linear) else words
    group = mode.group(place.batch) if grouped and isinstance(place, shapes.Linear) else None
    if group and not backward:
        group = dataclasses.replace(group, name=f"forward, {group.name}", limit=None)
    return Case(
        family=FAMILY,
        op=("masked_" if mode.sampler is None else "supermask_") + ("linear" if linear else "conv2d"),
        label=label + ", forward" * (not backward and not grouped),
        problem=functools.partial(Problem, place, mode, dtype, backward),
        reference=REFERENCES[mode.sampler],
        ours=Contestant("fourfold", ours),
        rivals=tuple(_rivals(settings, mode)),
        tolerance=BFLOAT16 if dtype == torch.bfloat16 else FLOAT32,
        yardsticks=(Contestant("masked beforehand", floor, reference=masked_beforehand),),
        group=group,
        held=Problem.tensors if backward else None,
        state="heap",
        source=place.source,
        quick=quick,
        **_work(place, mode, dtype, backward),
    )


def _layers(settings: Settings) -> Iterator[Case]:
    make = functools.partial(_layer, settings)
    if settings.random_shapes:
        for place in shapes.random_linears(settings.seed):
            for mode in (FIXED, BERNOULLI, EDGE_POPUP):
                yield make(place, mode, quick=True)
        return
    for mode in (FIXED, BERNOULLI, EDGE_POPUP):
        for m in (64, 512):
            for place in (shapes.SQUARE, shapes.FEED_FORWARD):
                yield make(place._replace(batch=m), mode, grouped=True, quick=place is shapes.SQUARE and m == 64)
    for m in (64, 512):
        for place in (shapes.SQUARE, shapes.FEED_FORWARD):
            yield make(place._replace(batch=m), FIXED, backward=False, grouped=True)
        yield make(shapes.SQUARE._replace(batch=m), FIXED, dtype=torch.bfloat16)
        yield make(shapes.SQUARE._replace(batch=m), BERNOULLI, dtype=torch.bfloat16)
    for mode in (FIXED, BERNOULLI, EDGE_POPUP):
        yield make(shapes.PROJECTION, mode)  # for the memory that backward holds
    yield make(shapes.SQUARE, THRESHOLD)
    for place in shapes.LENET:
        for mode in (FIXED, BERNOULLI, EDGE_POPUP):
            yield make(place, mode)
    for layer in shapes.CONV6:
        for mode in (FIXED, BERNOULLI, EDGE_POPUP):
            last = layer is shapes.CONV6[-1]
            yield make(layer, mode, quick=last and mode is not BERNOULLI)
    for mode in (FIXED, BERNOULLI):
        yield in_fresh_memory(make(shapes.PROJECTION, mode))
        yield in_fresh_memory(make(shapes.CONV6[-1], mode))


# --- masks alone ----------------------------------------------------------------------------------------------------------

DENSITY = 0.5


class Scores:
    """Scores [N, K], and a mask of that shape."""

    def __init__(self, shape: tuple[int, int], normal: bool, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(shape, generator=generator) if normal else distinct(shape, generator)
        self.scores = scores.to(device)
        self.keep = scores.numel() - int((1 - DENSITY) * scores.numel())
        self.mask = (torch.rand(shape, generator=generator) < DENSITY).to(device)
        self.bits = reference.pack_mask(self.mask)


def packed(mask: Tensor) -> Tensor:
    """A mask of numbers or bools as bits, to compare; outside the clock."""
    return reference.pack_mask(mask != 0)


def kept_by_score(drawn: tuple[Tensor, Tensor]) -> Tensor:
    """How many of the weights with the lowest scores a mask keeps, the next ones, and so on: [16]."""
    scores, mask = drawn
    order = scores.flatten().argsort()[: scores.numel() // 16 * 16]
    return mask.flatten().double()[order].view(16, -1).mean(1)


def expected_by_score(p: Scores) -> Tensor:
    return kept_by_score((p.scores, p.scores.double().sigmoid()))


def _odds(count: int) -> Tolerance:
    """Six standard deviations of one of sixteen means of `count` draws in all."""
    return Tolerance(6 * 0.5 / math.sqrt(count / 16), 0.0)


def told(draw: Callable[[Tensor], Tensor]) -> Callable[[Scores, str], Call]:
    """A random mask, with the scores it was drawn from."""
    return lambda p, state: lambda: (p.scores, draw(p.scores))


def below_numpy(p: Scores, state: str) -> Call:
    """SFC64, the fastest of numpy's generators."""
    generator = numpy.random.Generator(numpy.random.SFC64(SEED))

    def call() -> tuple[Tensor, Tensor]:
        numbers = generator.random(tuple(p.scores.shape), dtype=numpy.float32)
        return p.scores, torch.from_numpy(numbers) < p.scores.sigmoid()

    return call


def partition_numpy(p: Scores, state: str) -> Call:
    def call() -> Tensor:
        magnitudes = p.scores.abs()
        place = magnitudes.numel() - p.keep
        cut = numpy.partition(magnitudes.view(-1).numpy(), place)[place]
        return magnitudes >= float(cut)

    return call


def packbits_numpy(source: Callable[[Scores], Tensor]) -> Callable[[Scores, str], Call]:
    """Bits of whole rows: where K is a multiple of 64 they are packed masks as they are."""

    def make(p: Scores, state: str) -> Call:
        return lambda: torch.from_numpy(numpy.packbits(source(p).numpy(), axis=1, bitorder="little"))

    return make


def unpackbits_numpy(p: Scores, state: str) -> Call:
    bits = p.bits.numpy()
    return lambda: torch.from_numpy(numpy.unpackbits(bits, axis=1, bitorder="little")).view(torch.bool)


def pack_torch(p: Scores, state: str) -> Call:
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=p.mask.device)
    return lambda: (p.mask.unflatten(1, (-1, 8)) * powers).sum(-1, dtype=torch.uint8)


def unpack_torch(p: Scores, state: str) -> Call:
    shifts = torch.arange(8, dtype=torch.uint8, device=p.mask.device)
    return lambda: ((p.bits[..., None] >> shifts) & 1).flatten(1).view(torch.bool)


def _compiled(make: Callable[[Any, str], Call]) -> Callable[[Any, str], Call]:
    return lambda p, state: torch.compile(make(p, state), dynamic=False, fullgraph=True)


def by_cut(p: Scores, state: str) -> Call:
    return lambda: by_kthvalue(p.scores.abs(), p.keep)


def bools(p: Scores, state: str) -> Call:
    return lambda: p.scores >= 0


def _rivals_of_bernoulli(settings: Settings, weight: shapes.Linear) -> Iterator[Contestant]:
    """Judged by how often they keep weights of like scores: what they draw is their own."""
    count = weight.rows * weight.columns
    given = {"tolerance": _odds(count), "reference": expected_by_score, "tensors": kept_by_score}
    below = told(lambda scores: torch.rand_like(scores) < scores.sigmoid())
    yield Contestant("torch.bernoulli", told(lambda scores: torch.bernoulli(scores.sigmoid())), **given)
    yield Contestant("rand < p", below, **given)
    if settings.device == "cpu":
        yield Contestant("numpy random < p", below_numpy, **given)
    if settings.compiles:
        yield Contestant("rand < p, compiled", _compiled(below), **given)


def _rivals_of_topk(settings: Settings, weight: shapes.Linear) -> Iterator[Contestant]:
    for name, draw in (("sort, as published", by_sort), ("torch.topk", by_topk), ("kthvalue", by_kthvalue)):
        yield Contestant(name, lambda p, state, draw=draw: lambda: draw(p.scores.abs(), p.keep), tensors=packed)
    if settings.device == "cpu":
        yield Contestant("numpy partition", partition_numpy, tensors=packed)
    if settings.compiles:
        yield Contestant("kthvalue, compiled", _compiled(by_cut), tensors=packed)


def _rivals_of_threshold(settings: Settings, weight: shapes.Linear) -> Iterator[Contestant]:
    yield Contestant("scores >= 0 as bools", bools, tensors=packed)
    if settings.device == "cpu" and weight.columns % 64 == 0:
        yield Contestant("numpy packbits", packbits_numpy(lambda p: p.scores >= 0))
    if settings.compiles:
        yield Contestant("scores >= 0 as bools, compiled", _compiled(bools), tensors=packed)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """An op that makes a mask from scores."""

    op: str
    call: Callable[[Scores], Tensor]
    exact: Callable[[Scores], Tensor]
    rivals: Callable[[Settings, shapes.Linear], Iterator[Contestant]]
    normal: bool = True  # its scores; else no two magnitudes are equal


SAMPLERS = (
    Sampler(
        "bernoulli_mask",
        lambda p: ff.bernoulli_mask(p.scores, SEED),
        lambda p: reference.bernoulli_mask(p.scores, torch.tensor(SEED, device=p.scores.device), 0),
        _rivals_of_bernoulli,
    ),
    Sampler(
        "topk_mask",
        lambda p: ff.topk_mask(p.scores, DENSITY),
        lambda p: reference.topk_mask(p.scores, DENSITY, True),
        _rivals_of_topk,
        normal=False,
    ),
    Sampler(
        "threshold_mask",
        lambda p: ff.threshold_mask(p.scores),
        lambda p: reference.threshold_mask(p.scores, 0.0),
        _rivals_of_threshold,
    ),
)


def _mask_of_scores(settings: Settings, sampler: Sampler, weight: shapes.Linear, **flags: bool) -> Case:
    shape = (weight.rows, weight.columns)
    return Case(
        family=FAMILY,
        op=sampler.op,
        label=f"{weight.rows}x{weight.columns}",
        problem=functools.partial(Scores, shape, sampler.normal),
        reference=lambda p: sampler.exact(p).double(),
        ours=Contestant("fourfold", lambda p, state: functools.partial(sampler.call, p)),
        rivals=tuple(sampler.rivals(settings, weight)),
        tolerance=EXACT,
        state="heap",
        bytes=4 * math.prod(shape) + math.prod(shape) // 8,
        source=weight.source,
        **flags,
    )


def _bits(settings: Settings, op: str, weight: shapes.Linear, **flags: bool) -> Case:
    shape = (weight.rows, weight.columns)
    packing = op == "pack_mask"
    numpy_rival, torch_rival = (packbits_numpy(lambda p: p.mask), pack_torch) if packing else (unpackbits_numpy, unpack_torch)
    rivals = [Contestant("torch shifts and sums", torch_rival)]
    rivals += [Contestant("torch shifts and sums, compiled", _compiled(torch_rival))] * settings.compiles
    rivals += [Contestant("numpy", numpy_rival)] * (settings.device == "cpu")

    def call(p: Scores, state: str) -> Call:
        return (lambda: ff.pack_mask(p.mask)) if packing else (lambda: ff.unpack_mask(p.bits, shape[1]))

    return Case(
        family=FAMILY,
        op=op,
        label=f"{weight.rows}x{weight.columns}",
        problem=functools.partial(Scores, shape, True),
        reference=lambda p: (p.bits if packing else p.mask).double(),
        ours=Contestant("fourfold", call),
        rivals=tuple(rivals),
        tolerance=EXACT,
        state="heap",
        bytes=math.prod(shape) * 9 // 8,
        source=weight.source,
        **flags,
    )


def _masks(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for weight in shapes.random_linears(settings.seed):
            for sampler in SAMPLERS:
                yield _mask_of_scores(settings, sampler, weight, quick=True)
        return
    for weight in (shapes.SQUARE, shapes.FEED_FORWARD):
        flags = {"quick": weight is shapes.SQUARE}
        for sampler in SAMPLERS:
            yield _mask_of_scores(settings, sampler, weight, **flags)
        for op in ("pack_mask", "unpack_mask"):
            yield _bits(settings, op, weight, **flags)
    for sampler in SAMPLERS:
        yield in_fresh_memory(_mask_of_scores(settings, sampler, shapes.FEED_FORWARD))
    for op in ("pack_mask", "unpack_mask"):
        yield in_fresh_memory(_bits(settings, op, shapes.FEED_FORWARD))


# --- masks from what training did -----------------------------------------------------------------------------------------


class Trained:
    """A weight before and after training; no two magnitudes of the latter are equal."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.initial = torch.randn(shape, generator=generator).to(device)
        self.final = distinct(shape, generator).to(device)
        self.keep = self.final.numel() - int((1 - TICKET) * self.final.numel())


TICKET = 0.2  # a winning ticket's usual density


def pruned_by_topk(p: Trained, state: str) -> Call:
    """The smallest magnitudes dropped: what torch.nn.utils.prune's l1_unstructured does."""

    def call() -> Tensor:
        mask = torch.ones_like(p.final)
        dropped = p.final.abs().view(-1).topk(mask.numel() - p.keep, largest=False).indices
        mask.view(-1)[dropped] = 0
        return mask

    return call


def kept_by_kthvalue(p: Trained, state: str) -> Call:
    return lambda: by_kthvalue(p.final.abs(), p.keep)


def cut_by_numpy(p: Trained, state: str) -> Call:
    """All magnitudes sorted in numpy and cut: what lottery-ticket code does."""

    def call() -> Tensor:
        magnitudes = p.final.abs().numpy()
        cut = numpy.sort(magnitudes, axis=None)[magnitudes.size - p.keep]
        return torch.from_numpy((magnitudes >= cut).astype(numpy.float32))

    return call


def _criterion(settings: Settings, weight: shapes.Linear, **flags: bool) -> Case:
    shape = (weight.rows, weight.columns)
    rivals = [Contestant("torch.topk of the smallest", pruned_by_topk, tensors=packed)]
    rivals += [Contestant("kthvalue", kept_by_kthvalue, tensors=packed)]
    rivals += [Contestant("numpy sort", cut_by_numpy, tensors=packed)] * (settings.device == "cpu")
    if settings.compiles:
        rivals.append(Contestant("kthvalue, compiled", _compiled(kept_by_kthvalue), tensors=packed))
    return Case(
        family=FAMILY,
        op="mask_from_criterion",
        label=f"large_final {weight.rows}x{weight.columns}, density {TICKET}",
        problem=functools.partial(Trained, shape),
        reference=lambda p: reference.topk_mask(p.final, TICKET, True).double(),
        ours=Contestant("fourfold", lambda p, state: lambda: ff.mask_from_criterion(p.initial, p.final, "large_final", TICKET)),
        rivals=tuple(rivals),
        tolerance=EXACT,
        state="heap",
        bytes=4 * math.prod(shape) + math.prod(shape) // 8,
        source=weight.source,
        **flags,
    )


def _criteria(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for weight in shapes.random_linears(settings.seed):
            yield _criterion(settings, weight, quick=True)
        return
    for weight in (shapes.SQUARE, shapes.FEED_FORWARD):
        yield _criterion(settings, weight, quick=weight is shapes.SQUARE)
    yield in_fresh_memory(_criterion(settings, shapes.FEED_FORWARD))


# --- call overhead --------------------------------------------------------------------------------------------------------

TINY = "so small that only the call costs"


def _tiny(
    op: str,
    label: str,
    problem: Callable[[torch.device], Tensor],
    call: Callable[[Tensor], Tensor],
    exact: Callable[[Tensor], Tensor],
    goal: float | None,
) -> Case:
    """Beside the clone of a tensor."""
    return Case(
        family=FAMILY,
        op=op,
        label=label,
        problem=problem,
        reference=exact,
        ours=Contestant("fourfold", lambda x, state: functools.partial(call, x)),
        rivals=(),
        tolerance=EXACT,
        state="heap",
        source=TINY,
        quick=True,
        overhead=True,
        overhead_goal=goal,
    )


def _tiny_scores(device: torch.device) -> Tensor:
    return distinct((8, 64), torch.Generator().manual_seed(0)).to(device)


def _tiny_layer(place: shapes.Linear | shapes.Layer, mode: Mode, recorded: bool = False) -> Case:
    """Beside the same layer with a weight that was masked beforehand."""
    kind = "linear" if isinstance(place, shapes.Linear) else "conv2d"
    return Case(
        family=FAMILY,
        op=("masked_" if mode.sampler is None else "supermask_") + kind,
        label=f"float32 {place}" + f", {mode.name}" * (mode.sampler is not None) + ", gradient recorded" * recorded,
        problem=functools.partial(Problem, place, mode, torch.float32, False, recorded=recorded),
        reference=REFERENCES[mode.sampler],
        ours=Contestant("fourfold", ours),
        rivals=(),
        tolerance=FLOAT32,
        yardsticks=(Contestant(f"F.{kind}", floor, reference=masked_beforehand),),
        state="heap",
        source=TINY,
        quick=True,
        overhead=True,
    )


def _overheads() -> Iterator[Case]:
    linear, conv = shapes.Linear(8, 64, 1, TINY), shapes.Layer((1, 8, 8, 8), 8, 1, 1, TINY)
    for mode in (FIXED, BERNOULLI, EDGE_POPUP):
        yield _tiny_layer(linear, mode)
        yield _tiny_layer(conv, mode)
    for mode in (FIXED, BERNOULLI):
        yield _tiny_layer(linear, mode, recorded=True)
    seed = torch.tensor(SEED)

    def bools(scores: Tensor) -> Tensor:
        return scores >= 0

    def mask(device: torch.device) -> Tensor:
        return bools(_tiny_scores(device))

    def bits(device: torch.device) -> Tensor:
        return reference.pack_mask(mask(device))

    make, of = _tiny, "float32 8x64"
    yield make("pack_mask", "8x64", mask, ff.pack_mask, lambda m: reference.pack_mask(m).double(), 8.0)
    yield make(
        "unpack_mask", "8x64", bits, lambda b: ff.unpack_mask(b, 64), lambda b: reference.unpack_mask(b, 64).double(), 8.0
    )
    yield make(
        "bernoulli_mask",
        of,
        _tiny_scores,
        lambda s: ff.bernoulli_mask(s, SEED),
        lambda s: reference.bernoulli_mask(s, seed.to(s.device), 0).double(),
        10.0,
    )
    yield make(
        "topk_mask",
        of,
        _tiny_scores,
        lambda s: ff.topk_mask(s, DENSITY),
        lambda s: reference.topk_mask(s, DENSITY, True).double(),
        8.0,
    )
    yield make("threshold_mask", of, _tiny_scores, ff.threshold_mask, lambda s: reference.threshold_mask(s, 0.0).double(), 8.0)
    yield make(
        "mask_from_criterion",
        f"large_final {of}",
        _tiny_scores,
        lambda w: ff.mask_from_criterion(w, w, "large_final", DENSITY),
        lambda w: reference.topk_mask(w, DENSITY, True).double(),
        None,
    )


# --- what the harness asks for --------------------------------------------------------------------------------------------


def cases(settings: Settings) -> Iterator[Case]:
    if not settings.random_shapes:
        yield from _overheads()
    yield from _layers(settings)
    yield from _masks(settings)
    yield from _criteria(settings)


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
