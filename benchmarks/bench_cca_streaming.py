"""StreamingCCA, its Gram kernel and compare: all pairs of layers, memory, and two models.

Rivals do what people do without them: the reference algorithm pair by pair, one covariance of everything in float64, or all
activations collected first.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import fourfold as ff
import torch
from torch import Tensor, nn

from . import cases as shapes
from . import svcca_numpy as published
from .bench_cca import (
    FAST,
    HIGH,
    REFERENCE,
    SINGLE,
    VARIANCE,
    basis_by_svd,
    by_gram,
    centred,
    cka_of_features,
    exact_basis,
    kept_of,
    spectrum,
    whitening,
)
from .harness import Call, Case, Contestant, Settings, Tolerance, needed

FAMILY = "cca"
PAIRS_TIMED = 5  # of the reference loop, scaled to all
FULL_SIZE = 3072  # images: 2.5 GB of activations, 16 GB in the reference's way; only where --match asks for them


# --- all pairs ------------------------------------------------------------------------------------------------------------


class Network:
    """Float32 activations [n, d] of many layers, each a mixture of causes that drift from layer to layer."""

    def __init__(self, count: int, features: int, samples: int, batch: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        scales = spectrum(features)
        causes = torch.randn(samples, features, generator=generator)
        self.batch, self.device, self.layers = batch, device, {}
        for index in range(count):
            causes.mul_(0.9).add_(torch.randn(causes.shape, generator=generator), alpha=math.sqrt(1 - 0.9**2))
            weight = torch.randn(features, features, generator=generator) / math.sqrt(features)
            noise = torch.randn(causes.shape, generator=generator)
            self.layers[f"layer{index}"] = ((causes * scales) @ weight).add_(noise, alpha=0.05).add_(1.0).to(device)

    @property
    def few(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of different layers, near and far."""
        layers = list(self.layers.values())
        pairs = list(itertools.combinations(layers, 2))
        return pairs[:: len(pairs) // PAIRS_TIMED][:PAIRS_TIMED]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        length = len(next(iter(self.layers.values())))
        for start in range(0, length, self.batch):
            yield {name: t[start : start + self.batch] for name, t in self.layers.items()}


def stream(p: Network, precision: str) -> ff.StreamingCCA:
    accumulator = ff.StreamingCCA(precision=precision)
    for batch in p.batches():
        accumulator.update(batch)
    return accumulator


def all_pairs_ours(precision: str) -> Callable[[Network, str], Call]:
    return lambda p, state: lambda: stream(p, precision).compute("cca").matrix


def exact_pairs(p: Network) -> Tensor:
    bases = [exact_basis(t)[0] for t in p.layers.values()]
    return torch.stack([torch.stack([torch.linalg.svdvals(a.T @ b).mean() for b in bases]) for a in bases])


def exact_few(p: Network) -> Tensor:
    return torch.stack([torch.linalg.svdvals(exact_basis(x)[0].T @ exact_basis(y)[0]).mean() for x, y in p.few])


def loop_over_pairs(p: Network, state: str) -> Call:
    published.follow_torch_threads()
    pairs = [tuple(t.cpu().numpy().T for t in pair) for pair in p.few]
    return lambda: [float(published.canonical(*pair).rho.mean()) for pair in pairs]


def _one_tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_gram(p: Network, state: str) -> Call:
    """Everything side by side in float64, one product, batched whitening and singular values."""

    def call() -> Tensor:
        count = len(p.layers)
        x = centred(torch.cat(list(p.layers.values()), 1).double())
        blocks = (x.T @ x).unflatten(0, (count, -1)).unflatten(2, (count, -1)).transpose(1, 2)
        w, v = torch.linalg.eigh(torch.stack([blocks[i, i] for i in range(count)]))
        roots = v / w.sqrt()[:, None]
        first, second = torch.triu_indices(count, count)
        rho = torch.linalg.svdvals(roots[first].mT @ blocks[first, second] @ roots[second])
        matrix = x.new_empty(count, count)
        matrix[first, second] = matrix[second, first] = rho.mean(1)
        return matrix

    return call


def _all_pairs(count: int, features: int, samples: int, batch: int, precision: str, **flags: bool) -> Case:
    pairs = count * (count + 1) // 2
    rivals = [
        Contestant(
            f"reference loop, numpy ({PAIRS_TIMED} of {pairs} pairs, extrapolated)",
            loop_over_pairs,
            REFERENCE,
            reference=exact_few,
            tensors=_one_tensor,
            share=PAIRS_TIMED / pairs,
        )
    ]
    rivals += [Contestant("one Gram + batched eigh, float64", one_gram)] * (precision == "high")
    return Case(
        family=FAMILY,
        op="StreamingCCA",
        label=f'all {pairs} pairs of {count} layers, {features}x{samples} in batches of {batch}, precision="{precision}"',
        problem=functools.partial(Network, count, features, samples, batch),
        reference=exact_pairs,
        ours=Contestant("fourfold", all_pairs_ours(precision)),
        rivals=tuple(rivals),
        tolerance=HIGH if precision == "high" else FAST,
        state="heap",
        handles=(pairs, "pairs"),
        source="a network's layers on CIFAR's test set; the reference loop is timed on some pairs",
        **flags,
    )


# --- the Gram phase -------------------------------------------------------------------------------------------------------


def exact_covariances(p: Network) -> Tensor:
    """RV of all pairs: nothing but covariances goes into it."""
    layers = [centred(t.double()) for t in p.layers.values()]
    inner = torch.stack([torch.stack([(a.T @ b).square().sum() for b in layers]) for a in layers])
    own = inner.diagonal().sqrt()
    return inner / (own[:, None] * own)


def side_by_side(dtype: torch.dtype, compiled: bool = False) -> Callable[[Network, str], Call]:
    """All samples at once, and all of the product."""

    def make(p: Network, state: str) -> Call:
        def call() -> Tensor:
            x = centred(torch.cat(list(p.layers.values()), 1).to(dtype))
            return x.T @ x

        return torch.compile(call, dynamic=False, fullgraph=True) if compiled else call

    return make


def rv_of_gram(count: int, gram: Tensor) -> Tensor:
    blocks = gram.double().unflatten(0, (count, -1)).unflatten(2, (count, -1)).transpose(1, 2)
    inner = blocks.square().sum((2, 3))
    own = inner.diagonal().sqrt()
    return inner / (own[:, None] * own)


def matmul_of_as_many(dtype: torch.dtype) -> Callable[[Network, str], Call]:
    """A product of the layers side by side, over half of the samples: as many flops as the triangle over all of them."""

    def make(p: Network, state: str) -> Call:
        x = half_of(p).to(dtype)
        transposed, result = x.T.contiguous(), x.new_empty(x.shape[1], x.shape[1])
        return lambda: torch.mm(transposed, x, out=result)

    return make


def half_of(p: Network) -> Tensor:
    x = torch.cat(list(p.layers.values()), 1)
    return x[: len(x) // 2]


def exact_half(p: Network) -> Tensor:
    x = half_of(p).double()
    return x.T @ x


def _update(settings: Settings, count: int, features: int, samples: int, batch: int, precision: str, **flags: bool) -> Case:
    dtype = torch.float64 if precision == "high" else torch.float32
    width, name = count * features, str(dtype).removeprefix("torch.")
    rivals = {f"side by side, one {name} matmul": side_by_side(dtype)}
    if settings.compiles:
        rivals[f"side by side, one {name} matmul, compiled"] = side_by_side(dtype, compiled=True)
    return Case(
        family=FAMILY,
        op="StreamingCCA.update",
        label=f'{count} layers, {features}x{samples} in batches of {batch}, precision="{precision}"',
        problem=functools.partial(Network, count, features, samples, batch),
        reference=exact_covariances,
        ours=Contestant(
            "fourfold",
            lambda p, state: lambda: stream(p, precision),
            tensors=lambda accumulator: accumulator.compute("rv").matrix,
        ),
        rivals=tuple(
            Contestant(rival, make, HIGH if precision == "high" else SINGLE, tensors=functools.partial(rv_of_gram, count))
            for rival, make in rivals.items()
        ),
        yardsticks=(
            Contestant(
                f"{name} matmul of as many flops",
                matmul_of_as_many(dtype),
                Tolerance(1e-4, 1e-5, of_rms=True),
                reference=exact_half,
            ),
        ),
        tolerance=HIGH if precision == "high" else FAST,
        state="heap",
        flops=samples * width * (width + 1),
        gemm=dtype,
        handles=(samples, "samples"),
        source="the triangle is counted once; goal: at most 1.18 of the matmul, a share of 0.85",
        **flags,
    )


# --- Gram of 16-bit maps --------------------------------------------------------------------------------------------------


class Maps:
    """Activations [n, c, h * w] as a ReLU leaves them."""

    def __init__(self, place: shapes.Maps, dtype: torch.dtype, device: torch.device) -> None:
        n, c, h, w, _ = place
        x = torch.randn(n, c, h * w, generator=torch.Generator().manual_seed(0))
        self.x = x.relu_().to(device, dtype)
        self.total = torch.zeros(c, c, dtype=torch.float64, device=device)


def gram_ours(p: Maps, state: str) -> Call:
    def call() -> Tensor:
        torch.ops.fourfold._gram_(p.x, p.x, p.total.zero_())
        return p.total

    return call


def gram_permuted(dtype: torch.dtype) -> Callable[[Maps, str], Call]:
    def make(p: Maps, state: str) -> Call:
        def call() -> Tensor:
            samples = p.x.to(dtype).permute(0, 2, 1).reshape(-1, p.x.shape[1])
            return samples.T @ samples

        return call

    return make


def gram_by_image(p: Maps, state: str) -> Call:
    def call() -> Tensor:
        total = torch.zeros(p.total.shape, device=p.x.device)
        for image in p.x.float():
            total.addmm_(image, image.T)
        return total

    return call


def exact_gram(p: Maps) -> Tensor:
    total = torch.zeros_like(p.total)
    for image in p.x.double():
        total.addmm_(image, image.T)
    return total.triu()


def _gram(place: shapes.Maps, dtype: torch.dtype, **flags: bool) -> Case:
    samples = place.images * place.height * place.width
    name, bfloat16 = str(dtype).removeprefix("torch."), dtype == torch.bfloat16
    # Its result is rounded to 16 bits, which no correlation survives. In float16 torch multiplies 50 times slower on the CPU.
    wrong = Contestant(
        "permute + bfloat16 matmul, a wrong result",
        gram_permuted(dtype),
        Tolerance(0.05, 0.05, of_rms=True),
        tensors=torch.triu,
    )
    return Case(
        family=FAMILY,
        op="_gram_",
        label=f"{name} {place}",
        problem=functools.partial(Maps, place, dtype),
        reference=exact_gram,
        ours=Contestant("fourfold", gram_ours, tensors=torch.triu),
        rivals=(
            Contestant("permute + float32 matmul", gram_permuted(torch.float32), tensors=torch.triu),
            Contestant("float32 addmm_ of each image", gram_by_image, tensors=torch.triu),
            Contestant("permute + float64 matmul", gram_permuted(torch.float64), tensors=torch.triu),
        ),
        yardsticks=(wrong,) * bfloat16,
        tolerance=Tolerance(1e-5, 1e-5, of_rms=True),
        state="heap",
        flops=samples * place.channels * (place.channels + 1),
        gemm=dtype if bfloat16 else torch.float32,
        handles=(place.images, "images"),
        source=place.source,
        **flags,
    )


# --- memory ---------------------------------------------------------------------------------------------------------------


class Stream:
    """Two convolutional layers' float32 activations, which come batch by batch; only the batch at hand lives."""

    BATCH = 32

    def __init__(self, images: int, channels: int, side: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (self.BATCH, channels, side, side)
        scales = spectrum(channels).view(-1, 1, 1)
        weights = [torch.randn(channels, channels, 1, 1, generator=generator) / math.sqrt(channels) for _ in range(2)]

        def ends() -> tuple[Tensor, Tensor]:
            causes = torch.randn(shape, generator=generator) * scales
            x, y = (nn.functional.conv2d(causes, weight) for weight in weights)
            y = 0.7 * y + 0.3 * torch.randn(shape, generator=generator)
            return (x + 0.05 * torch.randn(shape, generator=generator) + 1).to(device), (y + 1).to(device)

        self.first, self.last = ends(), ends()
        self.count = images // self.BATCH

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """From the first to the last, each another mixture."""
        x, y = (torch.lerp(a, b, index / self.count) for a, b in zip(self.first, self.last, strict=True))
        return x, y


def stream_ours(precision: str) -> Callable[[Stream, str], Call]:
    def make(p: Stream, state: str) -> Call:
        def call() -> Tensor:
            accumulator = ff.StreamingCCA(precision=precision, pairs=[("x", "y")])
            for index in range(p.count):
                x, y = p.batch(index)
                accumulator.update({"x": x, "y": y})
            return accumulator.compute("cca").matrix[0, 1]

        return call

    return make


def as_samples(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def collect_in_numpy(p: Stream, state: str) -> Call:
    """Collect, concatenate, and the reference algorithm."""
    published.follow_torch_threads()

    def call() -> float:
        kept = [p.batch(index) for index in range(p.count)]
        x, y = (as_samples(torch.cat(parts)).cpu().numpy().T for parts in zip(*kept, strict=True))
        return float(published.canonical(x, y).rho.mean())

    return call


def moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums, and sums of products, in float64."""
    samples = torch.cat([as_samples(x), as_samples(y)], 1).double()
    return samples.sum(0), samples.T @ samples


def by_hand(p: Stream, state: str, compiled: bool = False) -> Call:
    """Sums of products batch by batch."""
    of_batch = torch.compile(moments, dynamic=False, fullgraph=True) if compiled else moments

    def call() -> Tensor:
        total, gram, n = 0.0, 0.0, 0
        for index in range(p.count):
            x, y = p.batch(index)
            of_x, of_xx = of_batch(x, y)
            total, gram, n = total + of_x, gram + of_xx, n + x.numel() // x.shape[1]
        return mean_of_moments(gram - torch.outer(total, total) / n)

    return call


def mean_of_moments(scatter: Tensor) -> Tensor:
    d = len(scatter) // 2
    xx, xy, yy = scatter[:d, :d], scatter[:d, d:], scatter[d:, d:]
    return torch.linalg.svdvals(whitening(xx).T @ xy @ whitening(yy)).mean()


def exact_stream(p: Stream) -> Tensor:
    """Two passes: the mean, then products of what is centred."""

    def samples() -> Iterator[Tensor]:
        for index in range(p.count):
            yield torch.cat([as_samples(t) for t in p.batch(index)], 1).double()

    mean = torch.stack([part.mean(0) for part in samples()]).mean(0)
    return mean_of_moments(torch.stack([(part - mean).T @ (part - mean) for part in samples()]).sum(0))


def _memory(settings: Settings, images: int, channels: int, side: int, precision: str, **flags: bool) -> Case:
    size = 2 * images * channels * side**2 * 4
    rivals = [
        Contestant("collect all, then the reference algorithm, numpy", collect_in_numpy, REFERENCE, tensors=torch.tensor),
        Contestant("float64 sums of permuted batches", by_hand),
    ]
    if settings.compiles:
        rivals.append(Contestant("float64 sums of permuted batches, compiled", functools.partial(by_hand, compiled=True)))
    return Case(
        family=FAMILY,
        op="StreamingCCA",
        label=f'2 layers of {channels}x{side}x{side}, {images} images ({size * 1e-6:.0f} MB), precision="{precision}"',
        problem=functools.partial(Stream, images, channels, side),
        reference=exact_stream,
        ours=Contestant("fourfold", stream_ours(precision)),
        rivals=tuple(rivals),
        tolerance=HIGH if precision == "high" else FAST,
        state="fresh",
        peak=True,
        handles=(images, "images"),
        source=f"batches of {Stream.BATCH}; at full size, --match '{FULL_SIZE} images', the reference takes 16 GB",
        **flags,
    )


# --- a torchmetrics metric ---------------------------------------------------------------------------------------------------


def metric_ours(p: Network, state: str) -> Call:
    needed("torchmetrics", "torchmetrics")

    def call() -> Tensor:
        metric = ff.metrics.CCAMetric("cca").to(p.device)
        for x, y in pairs_of_batches(p):
            metric.update(x, y)
        return metric.compute()

    return call


def pairs_of_batches(p: Network) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in p.batches():
        x, y = batch.values()
        yield x, y


def metric_of_lists(p: Network, state: str) -> Call:
    """All activations kept by two of torchmetrics' metrics, and whitened at the end."""
    metrics = needed("torchmetrics", "torchmetrics")

    def call() -> Tensor:
        kept = [metrics.CatMetric(nan_strategy="disable").to(p.device) for _ in range(2)]
        for batch in pairs_of_batches(p):
            for metric, t in zip(kept, batch, strict=True):
                metric.update(t)
        return by_gram(*(metric.compute().double() for metric in kept)).mean()

    return call


def metric_of_covariances(p: Network, state: str) -> Call:
    """The Fréchet distance's sums for both layers, float64 as well; of x with y it keeps nothing."""
    distance = needed("torchmetrics.image.fid", "torchmetrics").FrechetInceptionDistance
    as_it_comes = nn.Identity()
    as_it_comes.num_features = next(iter(p.layers.values())).shape[1]

    def call() -> list[Tensor]:
        metric = distance(feature=as_it_comes).to(p.device)
        for x, y in pairs_of_batches(p):
            metric.update(x, real=True)
            metric.update(y, real=False)
        return [metric.real_features_cov_sum, metric.fake_features_cov_sum]

    return call


def exact_metric(p: Network) -> Tensor:
    return exact_pairs(p)[0, 1]


def exact_products(p: Network) -> list[Tensor]:
    return [t.double().T @ t.double() for t in p.layers.values()]


def _metric(features: int, samples: int, batch: int, **flags: bool) -> Case:
    """Of torchmetrics' own metrics none compares activations; the rival collects with one, the yardstick is one that sums."""
    return Case(
        family=FAMILY,
        op="metrics.CCAMetric",
        label=f'"cca", {features}x{samples} in batches of {batch}',
        problem=functools.partial(Network, 2, features, samples, batch),
        reference=exact_metric,
        ours=Contestant("fourfold", metric_ours),
        rivals=(Contestant("two torchmetrics.CatMetric, then Gram + eigh, float64", metric_of_lists),),
        yardsticks=(
            Contestant("torchmetrics' FrechetInceptionDistance.update", metric_of_covariances, reference=exact_products),
        ),
        tolerance=HIGH,
        state="fresh",
        peak=True,
        handles=(samples, "samples"),
        source="two layers of a CIFAR network on its test set, in the batches that a validation loop has",
        **flags,
    )


# --- two models -----------------------------------------------------------------------------------------------------------


class Models:
    """Two small convolutional networks and batches of images; their activations are compared after each GELU."""

    def __init__(self, widths: tuple[int, int], depth: int, batches: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.networks = [self._network(width, depth).to(device) for width in widths]
        self.layers = [str(2 * index + 1) for index in range(depth)]
        self.loader = [torch.randn(32, 3, 16, 16).to(device) for _ in range(batches)]

    def _network(self, width: int, depth: int) -> nn.Sequential:
        channels = [3] + [width] * depth
        blocks = [(nn.Conv2d(a, b, 3, padding=1), nn.GELU()) for a, b in itertools.pairwise(channels)]
        return nn.Sequential(*itertools.chain.from_iterable(blocks)).eval()

    def collect(self) -> list[list[Tensor]]:
        """Of each network its layers' activations as [samples, channels], all of them."""
        with torch.no_grad():
            kept = [[self._activations(network, batch) for batch in self.loader] for network in self.networks]
        return [[as_samples(torch.cat(parts)) for parts in zip(*of, strict=True)] for of in kept]

    def _activations(self, network: nn.Sequential, x: Tensor) -> list[Tensor]:
        found = []
        for layer in network:
            x = layer(x)
            found += [x] * isinstance(layer, nn.GELU)
        return found


def compare_ours(p: Models, state: str) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        found = ff.compare(*p.networks, p.loader, layers=p.layers, method=("svcca", "cka"), progress=False)
        return found.matrix["svcca"], found.matrix["cka"]

    return call


def _matrix(of: Callable[[Any, Any], Any], first: list[Any], second: list[Any]) -> Tensor:
    return torch.tensor([[float(of(a, b)) for b in second] for a in first], dtype=torch.float64)


def collect_and_loop(p: Models, state: str) -> Call:
    """Pair by pair as published."""
    published.follow_torch_threads()

    def svcca(x: Tensor, y: Tensor) -> float:
        return float(published.svcca(x.cpu().numpy().T, y.cpu().numpy().T).mean())

    def call() -> tuple[Tensor, Tensor]:
        first, second = p.collect()
        return _matrix(svcca, first, second), _matrix(cka_of_features, first, second)

    return call


def collect_in_torch(p: Models, state: str) -> Call:
    """Each layer's SVD once, in float64."""

    def call() -> tuple[Tensor, Tensor]:
        first, second = ([t.double() for t in of] for of in p.collect())
        bases = [[basis_by_svd(t) for t in of] for of in (first, second)]
        return _matrix(lambda a, b: torch.linalg.svdvals(a.T @ b).mean(), *bases), _matrix(cka_of_features, first, second)

    return call


def exact_comparison(p: Models) -> tuple[Tensor, Tensor]:
    collected = p.collect()
    bases = [[basis[:, : kept_of(s.square(), VARIANCE)] for basis, s in map(exact_basis, of)] for of in collected]
    layers = [[t.double() for t in of] for of in collected]
    return _matrix(lambda a, b: torch.linalg.svdvals(a.T @ b).mean(), *bases), _matrix(cka_of_features, *layers)


def _compare(widths: tuple[int, int], depth: int, batches: int, **flags: bool) -> Case:
    return Case(
        family=FAMILY,
        op="compare",
        label=f"svcca and cka of {depth}x{depth} layers, {widths[0]} and {widths[1]} channels of 16x16, {32 * batches} images",
        problem=functools.partial(Models, widths, depth, batches),
        reference=exact_comparison,
        ours=Contestant("fourfold", compare_ours),
        rivals=(
            Contestant("collect all, then pair by pair, numpy", collect_and_loop, SINGLE),
            Contestant("collect all, an SVD of each, float64", collect_in_torch),
        ),
        # Both run the same float32 networks, whose activations may be rounded otherwise where other work surrounds them.
        tolerance=Tolerance(1e-6, 1e-6),
        state="fresh",
        peak=True,
        handles=(32 * batches, "images"),
        source="two small convolutional networks; their forward passes are counted",
        **flags,
    )


# --- what the harness asks for --------------------------------------------------------------------------------------------


def cases(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for place in shapes.random_pairs(settings.seed):
            yield _all_pairs(4, place.features, place.samples, 1000, "high", quick=True)
        return
    yield _all_pairs(6, 64, 2000, 500, "high", quick=True)
    for precision in ("high", "fast"):
        yield _all_pairs(20, 256, 10000, 1000, precision)
    yield _all_pairs(20, 256, 10000, 250, "high")
    yield _update(settings, 6, 64, 4000, 1000, "high", quick=True)
    for precision in ("high", "fast"):
        yield _update(settings, 20, 256, 10000, 1000, precision)
    for place in shapes.RESIDUAL_MAPS:
        yield _gram(place, torch.bfloat16, quick=place == shapes.RESIDUAL_MAPS[0])
    yield _gram(shapes.RESIDUAL_MAPS[1], torch.float16)
    yield _memory(settings, 64, 32, 14, "high", quick=True)
    for precision in ("high", "fast"):
        yield _memory(settings, 384, 128, 28, precision)
        if settings.match is not None and f"{FULL_SIZE} images" in settings.match:
            yield _memory(settings, FULL_SIZE, 128, 28, precision)
    yield _metric(64, 2000, 250, quick=True)
    yield _metric(256, 10000, 250)
    yield _compare((16, 24), 2, 2, quick=True)
    yield _compare((32, 48), 4, 6)


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
