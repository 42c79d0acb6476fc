"""Supermasks in superposition (Wortsman et al., 2020, arXiv 2006.14769), on permuted digits."""

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import fourfold as ff

from ._registry import SEEDS, Run, claim, offline, step, verdict

SOURCE = "Wortsman et al. 2020, arXiv 2006.14769"
TASKS = 20


@lru_cache(maxsize=len(SEEDS))  # two claims look at the same banks
def _bank(seed: int, tasks: int = TASKS) -> tuple[Any, list[Any], list[Tensor], Tensor, Tensor]:
    """The network with all masks, the networks of one mask each, the orders of pixels, the test images and labels."""
    from fourfold.examples import supsup_permuted_digits as example

    torch.manual_seed(seed)
    images, labels, test_images, test_labels = example.digits()
    layers = example.frozen_layers()
    bank = example.Net([ff.nn.SuperposedLinear.from_linear(layer) for layer in layers])
    orders = [torch.randperm(64) for _ in range(tasks)]
    alone = []
    for i, order in enumerate(orders):
        step(i / tasks)
        alone.append(example.learned(layers, images[:, order], labels, 5))
        example.learn_task(bank, alone[-1])
    return bank, alone, orders, test_images, test_labels


@claim(
    "supsup.no-forgetting",
    claim="one frozen network holds many tasks, and forgets none",
    source=f"{SOURCE}: 92.4% on five permuted MNISTs, no drop",
    criterion=f"{TASKS} tasks of permuted digits: every task within 1 point of a mask trained alone; every seed",
    needs=("sklearn", "tqdm"),
)
def no_forgetting(seed: int, full: bool) -> Run:
    """examples/supsup_permuted_digits.py."""
    from fourfold.examples import supsup_permuted_digits as example

    bank, alone, orders, images, labels = _bank(seed)
    together = [example.accuracy(bank, images[:, order], labels, task) for task, order in enumerate(orders)]
    apart = [example.accuracy(net, images[:, order], labels) for net, order in zip(alone, orders, strict=True)]
    drop = max(one - other for one, other in zip(apart, together, strict=True))
    mean, worst = sum(together) / TASKS, min(together)
    found = f"{mean:.1%} right on average, {worst:.1%} at worst; largest drop from the mask alone {100 * drop:.1f} points"
    return Run(verdict(drop <= 0.01), found, {"mean": mean, "worst": worst, "drop": drop})


@claim(
    "supsup.task-inference",
    claim="the task is found from the data, by one gradient of the entropy",
    source=SOURCE,
    criterion=f"{TASKS} tasks of permuted digits: one-shot inference finds at least 99% of batches of 16; every seed. For "
    "single images it is reported",
    partly="at least 90%",
    needs=("sklearn", "tqdm"),
)
def task_inference(seed: int, full: bool) -> Run:
    """Ten batches of each task."""
    from fourfold.examples import supsup_permuted_digits as example

    bank, _, orders, images, _ = _bank(seed)
    torch.manual_seed(seed)
    shares = {
        f"{method} {batch}": example.inferred(bank, orders, images, batch, 10, method)
        for batch in (1, 16)
        for method in ("oneshot", "binary")
    }
    found = (
        f"batches of 16: {shares['oneshot 16']:.1%} at once, {shares['binary 16']:.1%} by halving; "
        f"single images: {shares['oneshot 1']:.1%} and {shares['binary 1']:.1%}"
    )
    return Run(verdict(shares["oneshot 16"] >= 0.99, shares["oneshot 16"] >= 0.9), found, shares)


@claim(
    "supsup.single-images",
    claim="among five tasks, one image is enough to find its task",
    source=f"{SOURCE}: 100% of 250 single images, five tasks of permuted MNIST",
    criterion="five tasks of permuted digits: one-shot inference is right for at least 99% of 250 single images; every seed",
    partly="at least 90%",
    needs=("sklearn", "tqdm"),
)
def single_images(seed: int, full: bool) -> Run:
    """An image of 64 pixels says less than one of 784."""
    from fourfold.examples import supsup_permuted_digits as example

    bank, _, orders, images, _ = _bank(seed, 5)
    torch.manual_seed(seed)
    shares = {method: example.inferred(bank, orders, images, 1, 50, method) for method in ("oneshot", "binary")}
    found = f"{shares['oneshot']:.1%} at once, {shares['binary']:.1%} by halving; digits have 64 pixels, MNIST 784"
    return Run(verdict(shares["oneshot"] >= 0.99, shares["oneshot"] >= 0.9), found, shares)


@claim(
    "supsup.many-tasks",
    claim="one gradient finds the task among a hundred",
    source=f"{SOURCE}: 250 permutations of MNIST, task inferred, at about 94.9%; and 2,500 tasks",
    criterion="100 tasks of permuted digits, a part of theirs: one-shot inference finds at least 99% of batches of 16, and "
    "with the tasks found accuracy is within 1 point of that with the tasks given; every seed. Quick: 30 tasks",
    partly="at least 90% of the batches, whatever the accuracy",
    needs=("sklearn", "tqdm"),
)
def many_tasks(seed: int, full: bool) -> Run:
    """Four batches of each task."""
    from fourfold.examples import supsup_permuted_digits as example

    tasks = 100 if full else 30
    torch.manual_seed(seed)
    images, labels, test_images, test_labels = example.digits()
    layers = example.frozen_layers()
    bank = example.Net([ff.nn.SuperposedLinear.from_linear(layer) for layer in layers])
    orders = [torch.randperm(64) for _ in range(tasks)]
    for task, order in enumerate(orders):
        step(0.7 * task / tasks)
        example.learn_task(bank, example.learned(layers, images[:, order], labels, 5))
    counts = {"found": 0, "given": 0, "inferred": 0}
    for task, order in enumerate(orders):
        step(0.7 + 0.3 * task / tasks)
        for some in torch.randperm(len(test_images))[:64].split(16):
            x, wanted = test_images[some][:, order], test_labels[some]
            said = ff.infer_task(bank, x)
            with torch.no_grad():
                counts["given"] += int((bank(x, task).argmax(1) == wanted).sum())
                counts["inferred"] += int((bank(x, said).argmax(1) == wanted).sum())
            counts["found"] += said == task
    shares = {"found": counts["found"] / (4 * tasks)} | {key: counts[key] / (64 * tasks) for key in ("given", "inferred")}
    found = (
        f"{shares['found']:.1%} of batches among {tasks} tasks; {shares['inferred']:.1%} right with the tasks found, "
        f"{shares['given']:.1%} with those given"
    )
    return Run(
        verdict(shares["found"] >= 0.99 and shares["inferred"] >= shares["given"] - 0.01, shares["found"] >= 0.9), found, shares
    )


@claim(
    "supsup.bytes",
    claim="a task takes one bit per weight",
    source=SOURCE,
    criterion="the packed masks of 64-400-400-100 take 28,200 bytes, an eighth of the number of weights",
    partly="at least 28 times less than float32 weights",
    seeded=False,
)
def size(seed: int, full: bool) -> Run:
    """Rows are padded to 64 bits."""
    shapes = list(pairwise((64, 400, 400, 100)))
    weights = sum(inputs * outputs for inputs, outputs in shapes)
    packed = sum(ff.pack_mask(torch.rand(outputs, inputs) < 0.5).numel() for inputs, outputs in shapes)
    found = f"{packed:,} bytes, {4 * weights / packed:.1f} times less than float32: rows are padded to 64 bits"
    return Run(verdict(packed <= weights / 8, 4 * weights / packed >= 28), found, {"bytes": packed, "weights": weights})


@claim(
    "supsup.all-masks-at-once",
    claim="one backward gives the gradient with respect to all tasks' coefficients",
    source=SOURCE,
    criterion="superposed_linear's gradient to 250 coefficients equals that of the masks one by one, within 1e-10 (float64)",
    seeded=False,
)
def all_at_once(seed: int, full: bool) -> Run:
    """Of a layer 400-400."""
    weight, x, g = (torch.randn(shape, dtype=torch.float64) for shape in ((400, 400), (16, 400), (16, 400)))
    masks = [torch.rand(400, 400) < 0.2 for _ in range(250)]
    alpha = torch.full((250,), 1 / 250, dtype=torch.float64, requires_grad=True)
    out = ff.superposed_linear(x, weight, torch.stack([ff.pack_mask(mask) for mask in masks]), alpha)
    (ours,) = torch.autograd.grad(out, alpha, g)
    one_by_one = torch.stack([(g * (x @ (weight * mask).T)).sum() for mask in masks])
    apart = ((ours - one_by_one).abs().max() / one_by_one.abs().max()).item()
    return Run(verdict(apart <= 1e-10), f"250 masks; apart by at most {apart:.0e} of the largest", {"apart": apart})


offline(
    "supsup.scale",
    claim="250 permutations of MNIST at about 94.9%; 2,500 tasks; SplitCIFAR100",
    source=SOURCE,
    why="needs MNIST and CIFAR-100, downloads; the other claims test the same on digits",
)
