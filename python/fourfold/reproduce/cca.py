"""SVCCA (Raghu et al., 2017, arXiv 1706.05806)."""

import itertools
import statistics
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fourfold as ff

from ._registry import Run, claim, offline, step, threads, verdict
from ._timing import medians

SOURCE = "Raghu et al. 2017, arXiv 1706.05806"


def _of_example(name: str, seed: int, **options: Any) -> Run:
    """A claim that examples/svcca_paper.py tests."""
    from fourfold.examples import svcca_paper

    held, found = svcca_paper.CLAIMS[name](seed, **options)
    return Run(verdict(held), found)


@claim(
    "cca.invariance",
    claim="canonical correlations do not change under invertible affine maps of either layer",
    source=SOURCE,
    criterion="no rho changes by more than 1e-6 (float64) under random invertible maps and shifts of both layers; every seed",
)
def invariance(seed: int, full: bool) -> Run:
    """48 and 32 neurons."""
    return _of_example("invariance", seed)


@claim(
    "cca.shared-directions",
    claim="CCA cannot tell 150 directions of noise from 150 strong ones beside 50 shared ones; SVCCA can",
    source=SOURCE,
    criterion="CCA finds 50 ones and equal means in both cases; SVCCA is over 0.999 with noise and below 0.5 without; every "
    "seed",
)
def shared_directions(seed: int, full: bool) -> Run:
    """Layers of 200 neurons."""
    return _of_example("50 of 200", seed)


@claim(
    "cca.few-directions",
    claim="30 SVCCA directions of a layer of 200 neurons carry its network's output",
    source=f"{SOURCE}, the toy regression",
    criterion="the output from 30 directions has R2 of at least 0.99 with the output from all neurons; every seed",
)
def few_directions(seed: int, full: bool) -> Run:
    """Synthetic regression with four hidden layers."""
    return _of_example("regression", seed)


@claim(
    "cca.theorem",
    claim="with circular convolutions and all translates of the data, a covariance falls apart into a block per frequency",
    source=f"{SOURCE}, theorem on the DFT",
    criterion="covariance between frequencies at most 1e-12 of that within one, and DFT-CCA equals the full CCA; every seed",
)
def theorem(seed: int, full: bool) -> Run:
    """All 64 translates of images of 8 x 8; float64."""
    return _of_example("theorem", seed)


def _bottom_up(runs: list[Run]) -> tuple[str, str]:
    pairs, ordered, half = (int(sum(run.figures[key] for run in runs)) for key in ("pairs", "in_order", "half_in_order"))
    share = ordered / pairs
    found = f"{ordered} of {pairs} adjacent pairs in order of depth by the level 0.9, {half} of {pairs} by half of its own way"
    return verdict(share > 0.5, half / pairs > 0.5), found


@claim(
    "cca.bottom-up",
    claim="networks converge from the bottom up",
    source=f"{SOURCE}, section 4.1",
    criterion="a convolutional network on digits: SVCCA of a layer with its trained self comes to stay above 0.9 in order of "
    "depth for more than half of the adjacent pairs, all seeds together; the classifier is left out, as in the "
    "paper",
    partly="in that order for more than half of the pairs by the step at which a layer has gone half of its own way",
    over_seeds=_bottom_up,
    needs=("sklearn",),
)
def bottom_up(seed: int, full: bool) -> Run:
    """examples/cca_convergence_digits.py."""
    from fourfold.examples import cca_convergence_digits as example

    images, labels, *_ = example.digits()
    torch.manual_seed(seed)
    snapshots = example.train(example.build(), images, labels, example.STEPS, example.EVERY)
    curves = example.similarities(snapshots, images[:600]).diagonal(dim1=1, dim2=2)
    at = list(snapshots)
    when = example.converged(at, curves, torch.full((example.DEPTH + 1,), 0.9))
    half = example.converged(at, curves, (1 + curves[0]) / 2)
    pairs = example.DEPTH - 1
    figures = {"pairs": pairs, "in_order": example.in_order(when), "half_in_order": example.in_order(half)}
    series = {"steps": at, "curves": [[round(value, 4) for value in row] for row in curves.T.tolist()]}
    share = figures["in_order"] / pairs
    return Run(verdict(share > 0.5, figures["half_in_order"] > pairs / 2), "", figures, series)


def _freezing(runs: list[Run]) -> tuple[str, str]:
    usual, frozen, saved = (statistics.mean(run.figures[key] for run in runs) for key in ("usual", "frozen", "backward_saved"))
    found = f"{usual:.1%} of test digits right, {frozen:.1%} with freezing; backward took {saved:.0%} less processor time"
    return verdict(saved > 0 and frozen >= usual - 0.005, saved > 0 and frozen >= usual - 0.01), found


@claim(
    "cca.freeze-training",
    claim="layer i of L may be frozen after a fraction i/L of the training: as accurate, and less to compute",
    source=f"{SOURCE}, section 4.1",
    criterion="a convolutional network on digits loses at most 0.5 points, and backward takes less time; means of all seeds",
    partly="at most 1 point",
    over_seeds=_freezing,
    needs=("sklearn",),
)
def freeze_training(seed: int, full: bool) -> Run:
    """The network of examples/cca_convergence_digits.py, twice: trained as usual, and from the bottom up."""
    from fourfold.examples import cca_convergence_digits as example

    images, labels, *tested = example.digits()
    right: dict[bool, float] = {}
    took: dict[bool, float] = {}
    for freezing in (False, True):
        step(freezing / 2)
        torch.manual_seed(seed)
        net = example.build()
        took[freezing] = _train_freezing(net, images, labels, example.STEPS, freezing)
        right[freezing] = example.accuracy(net.eval(), *tested)
    figures = {"usual": right[False], "frozen": right[True], "backward_saved": 1 - took[True] / took[False]}
    return Run(_freezing([Run("", "", figures)])[0], _freezing([Run("", "", figures)])[1], figures)


def _train_freezing(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, freezing: bool) -> float:
    """Processor seconds in backward. Layers are those with parameters, of which the i-th is frozen from i/L of the steps on."""
    layers = [layer for layer in net.children() if any(True for _ in layer.parameters())]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.002)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    seconds = 0.0
    for i in range(steps):
        if freezing:
            for layer in layers[: i * len(layers) // steps]:
                layer.eval().requires_grad_(False)
        some = torch.randint(len(images), (64,))
        loss = F.cross_entropy(net(images[some]), labels[some])
        optimizer.zero_grad()
        start = time.process_time()  # what others do on this machine does not count
        loss.backward()
        seconds += time.process_time() - start
        optimizer.step()
        schedule.step()
    return seconds


@claim(
    "cca.reference",
    claim="ours gives what the algorithm of the authors' code gives, faster",
    source="github.com/google/svcca, as described there",
    criterion="every rho within 1e-5 of the authors' algorithm in NumPy, and less time on as many threads, for 10,000 samples: "
    "two layers of 512 neurons; two of 4096; and all pairs of eight layers of 256, by their mean rho. Quick: 512 alone",
    partly="every rho that close, but not less time each time",
    seeded=False,
    needs=("threadpoolctl",),
)
def reference(seed: int, full: bool) -> Run:
    """The NumPy function of the benchmarks, which is written from the description."""
    from threadpoolctl import threadpool_limits

    apart, ratios = {}, {}
    with threadpool_limits(torch.get_num_threads(), user_api="blas"):
        apart["512 neurons"], ratios["512 neurons"] = _against_numpy(512, 5 if full else 3)
        if full:
            step(0.1)
            apart["all pairs"], ratios["all pairs"] = _pairs_against_numpy(8, 256, 3)
            step(0.3)
            apart["4096 neurons"], ratios["4096 neurons"] = _against_numpy(4096, 1)
    said = ", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items())
    found = f"rho apart by at most {max(apart.values()):.0e}; times as fast: {said}; {threads()}"
    close = max(apart.values()) <= 1e-5
    figures = {f"apart, {name}": value for name, value in apart.items()} | ratios
    return Run(verdict(close and min(ratios.values()) > 1, close), found, figures)


def _layers(count: int, neurons: int) -> list[torch.Tensor]:
    """Layers with something in common: float64 [10000, neurons]."""
    common = torch.randn(10_000, neurons, dtype=torch.float64)
    mixed = (common @ torch.randn(neurons, neurons, dtype=torch.float64) / neurons**0.5 for _ in range(count))
    return [one + torch.randn(10_000, neurons, dtype=torch.float64) for one in mixed]


def _against_numpy(neurons: int, laps: int) -> tuple[float, float]:
    """How far rho is apart, and how many times as fast ours is; one lap is without another to warm up."""
    import fourfold.benchmarks.svcca_numpy as theirs_in_numpy

    x, y = _layers(2, neurons)
    as_there = (x.T.numpy(), y.T.numpy())
    results: dict[str, torch.Tensor] = {}

    def theirs() -> None:
        results["theirs"] = torch.from_numpy(theirs_in_numpy.canonical(*as_there).rho)

    def ours() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*chance level")  # few samples for 4096 neurons; both get the same
            results["ours"] = ff.cca(x, y).rho

    other, mine = medians((theirs, ours), laps, warm_up=laps > 1)
    return (results["ours"] - results["theirs"]).abs().max().item(), other / mine


def _pairs_against_numpy(count: int, neurons: int, laps: int) -> tuple[float, float]:
    """The same for the mean rho of all pairs of layers: one pass and one matrix, or NumPy's function for each pair."""
    import fourfold.benchmarks.svcca_numpy as theirs_in_numpy

    layers = {f"layer{i}": layer for i, layer in enumerate(_layers(count, neurons))}
    as_there = [layer.T.numpy() for layer in layers.values()]
    results: dict[str, torch.Tensor] = {}

    def theirs() -> None:
        means = torch.eye(count, dtype=torch.float64)
        for i, j in itertools.combinations(range(count), 2):
            means[i, j] = means[j, i] = float(theirs_in_numpy.canonical(as_there[i], as_there[j]).rho.mean())
        results["theirs"] = means

    def ours() -> None:
        state = ff.StreamingCCA()
        state.update(layers)
        results["ours"] = state.compute("cca").matrix

    other, mine = medians((theirs, ours), laps)
    return (results["ours"] - results["theirs"]).abs().max().item(), other / mine


offline(
    "cca.cifar-directions",
    claim="25 directions of CIFAR-10's first dense layer do the work of all 512 neurons; 100 neurons cannot match 20 "
    "directions",
    source=SOURCE,
    why="needs CIFAR-10, a download; cca.few-directions tests the same on synthetic data",
)
offline(
    "cca.compression",
    claim="projecting layers onto their leading directions leaves 0.35 of their size with little loss",
    source=SOURCE,
    why="needs the paper's trained networks on CIFAR-10, a download",
)
