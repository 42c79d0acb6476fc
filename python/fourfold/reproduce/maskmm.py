"""Supermasks (Zhou et al., 2019, arXiv 1905.01067), on scikit-learn's digits in place of MNIST."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fourfold as ff

from ._registry import Run, claim, offline, part, step, threads, verdict
from ._timing import medians

SOURCE = "Zhou et al. 2019, arXiv 1905.01067"


def _net(seed: int, build: Any, train: Any, *data: Tensor, epochs: int) -> Any:
    torch.manual_seed(seed)
    net = build()
    train(net, *data, epochs)
    return net


@claim(
    "maskmm.criteria",
    claim="a mask made from what training did to the weights lifts the untrained network far above chance, best by large "
    "final magnitude of the same sign",
    source=f"{SOURCE}: 86% on MNIST",
    criterion="untrained 64-300-100-10 on digits, half of the weights kept: large_final_same_sign at least 60% and above "
    "large_final, which is above random, which is near chance (below 20%); every seed",
    partly="large_final_same_sign at least 60% and above random",
    needs=("sklearn",),
)
def criteria(seed: int, full: bool) -> Run:
    """examples/lottery_ticket_digits.py, its first part."""
    from fourfold.examples import lottery_ticket_digits as example

    images, labels, *tested = example.digits()
    torch.manual_seed(seed)
    untrained = example.build()
    trained = copy.deepcopy(untrained)
    example.train(trained, images, labels, 50)
    right = {
        criterion: example.accuracy(example.masked(untrained, trained, criterion, 0.5, seed), *tested)
        for criterion in example.CRITERIA
    }
    same, large, random = (right[name] for name in ("large_final_same_sign", "large_final", "random"))
    found = f"large_final_same_sign {same:.0%}, large_final {large:.0%}, random {random:.0%}"
    return Run(verdict(same >= 0.6 and same > large > random and random < 0.2, same >= 0.6 and same > random), found, right)


def _supermasks(seed: int, *names: str) -> dict[str, float]:
    """Shares of test digits right, by the names of examples/supermask_digits.py."""
    from fourfold.examples import supermask_digits as example

    images, labels, *tested = example.digits()
    right = {}
    for i, name in enumerate(names):
        step(i / len(names))
        net = _net(seed, example.NETS[name], example.train, images, labels, epochs=example.EPOCHS)
        right[name] = example.accuracy(net, *tested)
    return right


TRAINED, FULL = "trained weights", "supermask: signs, rescaled"
NO_RESCALING, NO_SIGNS = "supermask: signs", "supermask: rescaled"


@claim(
    "maskmm.learned",
    claim="a learned mask on frozen random weights reads digits as well as trained weights do",
    source=f"{SOURCE}: 98.0% on MNIST with signed constants and rescaling; 97.4% trained",
    criterion="64-300-100-10 on digits: at most 2 points below the trained network; every seed",
    needs=("sklearn",),
)
def learned(seed: int, full: bool) -> Run:
    """Bernoulli masks, weights of one magnitude per layer, rescaled."""
    right = _supermasks(seed, TRAINED, FULL)
    found = f"trained {right[TRAINED]:.1%}, masked {right[FULL]:.1%}"
    return Run(verdict(right[FULL] >= right[TRAINED] - 0.02), found, right)


def _ablated(runs: list[Run]) -> tuple[str, str]:
    mean = {key: sum(run.figures[key] for run in runs) / len(runs) for key in runs[0].figures}
    rescaling, signs = mean[NO_RESCALING] < mean[FULL], mean[NO_SIGNS] < mean[FULL]
    found = f"both {mean[FULL]:.1%}, without rescaling {mean[NO_RESCALING]:.1%}, without signed constants {mean[NO_SIGNS]:.1%}"
    return verdict(rescaling and signs, rescaling or signs), found


@claim(
    "maskmm.ablation",
    claim="a learned mask needs both: rescaling, and weights of one magnitude",
    source=f"{SOURCE}: 95.3% on MNIST without, 98.0% with both",
    criterion="leaving out either lowers the accuracy on digits; means of all seeds",
    partly="leaving out one of the two does",
    over_seeds=_ablated,
    needs=("sklearn",),
)
def ablation(seed: int, full: bool) -> Run:
    """The same networks, with one thing left out."""
    run = Run("", "", _supermasks(seed, FULL, NO_RESCALING, NO_SIGNS))
    run.verdict, run.found = _ablated([run])
    return run


class _Frozen(nn.Module):
    """A linear layer without bias whose weights off the mask [N, K] (bool) stay at their first values."""

    def __init__(self, linear: nn.Linear, mask: Tensor) -> None:
        super().__init__()
        self.masked = ff.nn.MaskedLinear.from_linear(linear, mask)
        self.register_buffer("rest", linear.weight.detach() * ~mask)
        self.rest: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape [.., in_features]."""
        return self.masked(x) + F.linear(x, self.rest)


ROUNDS = (8, 12, 16)


def _zeroed(runs: list[Run]) -> tuple[str, str]:
    mean = {key: sum(run.figures[key] for run in runs) / len(runs) for key in runs[0].figures}
    better = [mean[f"zero {n}"] > mean[f"frozen {n}"] for n in ROUNDS]
    found = "; ".join(f"{0.8**n:.0%} kept: zero {mean[f'zero {n}']:.1%}, frozen {mean[f'frozen {n}']:.1%}" for n in ROUNDS)
    return verdict(all(better), any(better)), found


@claim(
    "maskmm.zero-action",
    claim="pruned weights are better set to zero than frozen at their first values",
    source=f"{SOURCE}, mask-0 actions",
    criterion="digits, large_final tickets: a fifth of the weights pruned per round, a tenth in the last layer, the others "
    "back to their first values; zero is better after 8, 12 and 16 rounds (17%, 7% and 3% kept); means of all "
    "seeds",
    partly="zero is better after one or two of the three",
    over_seeds=_zeroed,
    needs=("sklearn",),
)
def zero_action(seed: int, full: bool) -> Run:
    """Normal weights; each way finds masks of its own."""
    from fourfold.examples import supermask_digits as example

    images, labels, *tested = example.digits()
    torch.manual_seed(seed)
    untrained = example.plain_net()
    linear = [i for i, layer in enumerate(untrained) if isinstance(layer, nn.Linear)]
    figures = {}
    for k, action in enumerate(("zero", "frozen")):
        tell = part(k, 2)
        masks = {i: torch.ones(untrained[i].weight.shape, dtype=torch.bool) for i in linear}
        for prunings in range(ROUNDS[-1] + 1):
            tell(prunings / (ROUNDS[-1] + 1))
            net = copy.deepcopy(untrained)
            for i in linear:
                net[i] = (ff.nn.MaskedLinear.from_linear if action == "zero" else _Frozen)(net[i], masks[i])
            torch.manual_seed(seed)
            example.train(net, images, labels, 50 if full else 10)
            if prunings in ROUNDS:
                figures[f"{action} {prunings}"] = example.accuracy(net, *tested)
            for i in linear:
                weight = net[i].weight if action == "zero" else net[i].masked.weight
                density = (0.9 if i == linear[-1] else 0.8) ** (prunings + 1)
                # Weights that were pruned rank last, whatever their first values.
                kept = torch.where(masks[i], weight.detach(), 0.0)
                keep = ff.mask_from_criterion(untrained[i].weight, kept, "large_final", density)
                masks[i] = ff.unpack_mask(keep, weight.shape[1])
    run = Run("", "", figures)
    run.verdict, run.found = _zeroed([run])
    return run


@claim(
    "maskmm.bytes",
    claim="a mask takes one bit per weight: the network 784-300-100-10 takes 33,275 bytes, a thirty-second of its weights",
    source="266,200 weights of the paper's network, divided by 8",
    criterion="the packed masks take 33,275 bytes, 32 times less than float32 weights",
    partly="at least 28 times less",
    seeded=False,
)
def size(seed: int, full: bool) -> Run:
    """Rows are padded to 64 bits, so that kernels can read words."""
    shapes = list(pairwise((784, 300, 100, 10)))
    weights = sum(inputs * outputs for inputs, outputs in shapes)
    packed = sum(ff.pack_mask(torch.rand(outputs, inputs) < 0.5).numel() for inputs, outputs in shapes)
    found = f"{packed:,} bytes, {4 * weights / packed:.1f} times less: rows are padded to 64 bits"
    return Run(verdict(packed <= weights / 8, 4 * weights / packed >= 28), found, {"bytes": packed, "weights": weights})


def _kept(forward: Callable[[], Tensor], given: list[Tensor]) -> int:
    """Bytes that a forward pass keeps for backward, beside those of the tensors that were given."""
    kept: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        out = forward()  # until here it holds what was seen, so that no two share an address
    known = {tensor.untyped_storage().data_ptr() for tensor in (*given, out)}
    return sum(size for place, size in kept.items() if place not in known)


@claim(
    "maskmm.memory",
    claim="a masked layer needs no second matrix: the baseline keeps the product of weight and mask for backward",
    source="no paper's; the product is what their code makes",
    criterion="three linear layers, 784-300-100-10, 64 samples: beside inputs, weights and results, masked_linear keeps at "
    "most a sixteenth of what F.linear(x, weight * mask) keeps",
    partly="less, but more than a sixteenth",
    seeded=False,
)
def memory(seed: int, full: bool) -> Run:
    """Masks are bool; ours packs them in the call."""
    ours = theirs = 0
    for inputs, outputs in pairwise((784, 300, 100, 10)):
        x, weight = torch.randn(64, inputs, requires_grad=True), torch.randn(outputs, inputs, requires_grad=True)
        mask = torch.rand(outputs, inputs) < 0.5
        ours += _kept(partial(ff.masked_linear, x, weight, mask), [x, weight, mask])
        theirs += _kept(lambda x=x, w=weight, m=mask: F.linear(x, w * m), [x, weight, mask])  # type: ignore[misc]
    found = f"{ours:,} bytes, {theirs:,} with the product"
    return Run(verdict(16 * ours <= theirs, ours < theirs), found, {"ours": ours, "theirs": theirs})


DENSITIES, ROWS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9), (1, 16, 256)
SPARSE = ("bitmap", "csr16", "slab")


@claim(
    "maskmm.crossover",
    claim="a layer under a mask of few ones is not only smaller than the dense one but faster",
    source="no paper's: theirs multiply dense matrices; masks of their accuracies keep 0.6% to 93% of the weights",
    criterion="2048 x 2048, float32: with a tenth of the weights kept, sparse_linear takes less time than F.linear for 1, 16 "
    "and 256 rows of x. Reported: up to which density that holds, of 2%, 5%, 10%, 20%, 30%, 50%, 70% and 90%",
    partly="for one or two of these",
    seeded=False,
)
def crossover(seed: int, full: bool) -> Run:
    """The fastest format at each density; masks are random."""
    weight, figures = torch.randn(2048, 2048), {}
    for i, rows in enumerate(ROWS):
        tell = part(i, len(ROWS))
        x, won = torch.randn(rows, 2048), 0.0
        for k, density in enumerate(DENSITIES):
            tell(k / len(DENSITIES))
            mask = torch.rand(2048, 2048) < density
            dense = weight * mask
            formats = [ff.compress(weight, mask, format=name) for name in SPARSE]
            calls = [partial(F.linear, x, dense), *(partial(ff.sparse_linear, x, one) for one in formats)]
            with torch.no_grad():
                theirs, *ours = medians(calls, 21 if full else 7, at_least=0.005)
            figures[f"{rows} rows, {density:.0%}"] = theirs / min(ours)
            if theirs > min(ours) and (k == 0 or won == DENSITIES[k - 1]):
                won = density
        figures[f"{rows} rows, up to"] = won
    at_a_tenth = {rows: figures[f"{rows} rows, 10%"] for rows in ROWS}
    found = "; ".join(
        f"{rows} row{'s' * (rows > 1)}: {ratio:.1f} times as fast at 10%, faster up to {figures[f'{rows} rows, up to']:.0%}"
        for rows, ratio in at_a_tenth.items()
    )
    faster = [ratio > 1 for ratio in at_a_tenth.values()]
    return Run(verdict(all(faster), any(faster)), f"{found}; {threads()}", figures)


offline(
    "maskmm.mnist-cifar",
    claim="86% on MNIST and 41% on CIFAR-10 by criterion; 98.0% and 76.5% by learned masks",
    source=SOURCE,
    why="needs MNIST and CIFAR-10, downloads; maskmm.criteria and maskmm.learned test the same on digits",
)
