"""Networks converge from the bottom up (Raghu et al., 2017, arXiv 1706.05806, section 4.1), on digits.

python examples/cca_convergence_digits.py [--seeds 5] [--level 0.9] [--quick] [--output FILE.png]. Needs scikit-learn, for
the picture matplotlib.

Four convolutions and a linear layer learn scikit-learn's 8 x 8 digits. Afterwards every snapshot of the training is compared,
layer by layer, with the trained network. A layer has converged at the step from which its SVCCA with its final self stays
above the level. The first layers have a head start: what a random convolution keeps of the image is already much of what it
will keep. So the table also shows the step at which a layer has gone half of its own way, from its start to 1.
"""

import argparse
import copy
import time
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import fourfold as ff
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

STEPS = 300
EVERY = 10  # steps between snapshots, in the first half; later little happens
BATCH = 64
DEPTH = 4


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 1, 8, 8] and labels [n] to train on, and to test on."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    seen, tested = train_test_split(range(len(images)), test_size=0.3, random_state=0, stratify=data.target)
    return images[seen], labels[seen], images[tested], labels[tested]


def build(channels: int = 16) -> nn.Sequential:
    """layer1 to layer4, which end in ReLUs, pools after the second and the fourth, and the classifier, head."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, DEPTH + 1):
        convolution = nn.Conv2d(1 if i == 1 else channels, channels, 3, padding=1)
        parts[f"layer{i}"] = nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())
        if i % 2 == 0:
            parts[f"pool{i}"] = nn.MaxPool2d(2)
    return nn.Sequential(parts | {"flat": nn.Flatten(), "head": nn.Linear(channels * 4, 10)})


def train(net: nn.Module, images: Tensor, labels: Tensor, steps: int, every: int) -> dict[int, nn.Module]:
    """The network at some of its steps, by step; the last one is the trained network."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.002)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    snapshots = {0: copy.deepcopy(net)}
    for step in range(1, steps + 1):
        some = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(net(images[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (every if step <= steps // 2 else 4 * every) == 0 or step == steps:
            snapshots[step] = copy.deepcopy(net)
    return snapshots


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (net(images).argmax(1) == labels).float().mean().item()


def similarities(snapshots: dict[int, nn.Module], images: Tensor) -> Tensor:
    """SVCCA of every layer of every snapshot with every layer of the last one: [snapshots, layers, layers]."""
    *_, trained = snapshots.values()
    batches, layers = images.split(200), ["layer*", "head"]
    results = [ff.compare(net, trained, batches, layers=layers, method="svcca", progress=False) for net in snapshots.values()]
    return torch.stack([result.matrix["svcca"] for result in results])


def converged(steps: list[int], curves: Tensor, level: Tensor) -> Tensor:
    """When the curves [snapshots, layers] come to stay above a level [layers], between snapshots by interpolation: [layers]."""
    found = []
    for curve, wanted in zip(curves.T.tolist(), level.tolist(), strict=True):
        below = [i for i, value in enumerate(curve) if value < wanted]
        if not below:
            found.append(float(steps[0]))
            continue
        i = below[-1]  # never the last snapshot, which is the trained network itself
        share = (wanted - curve[i]) / (curve[i + 1] - curve[i])
        found.append(steps[i] + share * (steps[i + 1] - steps[i]))
    return torch.tensor(found)


def in_order(when: Tensor) -> int:
    """Of the adjacent pairs of convolutions, how many converge lower one first. The classifier is left out, as in the paper."""
    return sum(lower < upper for lower, upper in pairwise(when[:DEPTH].tolist()))


def row(values: Tensor, digits: int = 0) -> str:
    """A line of the table."""
    return "".join(f"{value:>9.{digits}f}" for value in values[:-1]) + f"{values[-1]:>12.{digits}f}"


def draw(steps: list[int], matrices: Tensor, level: float, path: Path) -> None:
    """Curves of layers with themselves [seeds, snapshots, layers, layers], and all layers with all at four times."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    ax = left.subplots()
    curves = matrices.diagonal(dim1=2, dim2=3)  # [seeds, snapshots, layers]
    names = [*(f"layer {i}" for i in range(1, DEPTH + 1)), "classifier"]
    colours = ["#440154", "#31688e", "#35b779", "#d8b000", "#999999"]
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        style = "-" if i < DEPTH else "--"
        ax.plot(steps, curves[:, :, i].mean(0), style, color=colour, label=name)
        if i < DEPTH:
            ax.fill_between(steps, curves[:, :, i].amin(0), curves[:, :, i].amax(0), color=colour, alpha=0.12, linewidth=0)
    ax.axhline(level, color="black", linewidth=0.8, linestyle=":")
    ax.set(xlabel="training step", ylabel="SVCCA with the trained layer", xlim=(0, steps[-1] // 2), ylim=(None, 1.005))
    ax.set_title(f"mean of {len(matrices)} seeds; shaded: lowest to highest")
    ax.legend(loc="lower right")

    shown = [0, *(min(range(len(steps)), key=lambda i: abs(steps[i] - steps[-1] * share)) for share in (0.05, 0.25)), -1]
    axes = right.subplots(1, len(shown), sharey=True)
    for ax, place in zip(axes, shown, strict=True):
        image = ax.imshow(matrices[:, place].mean(0).numpy(), vmin=0, vmax=1, origin="lower")
        ticks = [*map(str, range(1, DEPTH + 1)), "c"]
        ax.set(title=f"step {steps[place]}", xticks=range(len(ticks)), yticks=range(len(ticks)), xlabel="layer, trained")
        ax.set_xticklabels(ticks)
        ax.set_yticklabels(ticks)
    axes[0].set_ylabel("layer, at that step")
    right.colorbar(image, ax=axes, label="SVCCA", shrink=0.75)
    figure.savefig(path, dpi=100)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--level", type=float, default=0.9)
    parser.add_argument("--quick", action="store_true", help="one seed, a third of the steps: shows that it runs")
    parser.add_argument("--output", type=Path, help="where a picture goes")
    args = parser.parse_args()
    seeds, steps, every = (1, STEPS // 4, 2 * EVERY) if args.quick else (args.seeds, STEPS, EVERY)

    images, labels, *tested = digits()
    columns = "".join(f"{f'layer {i}':>9}" for i in range(1, DEPTH + 1))
    print(f"{'':<30}{'right':>6}{columns}{'classifier':>12}{'seconds':>9}")
    matrices, ordered, halfway = [], 0, 0
    for seed in range(seeds):
        torch.manual_seed(seed)
        start = time.perf_counter()
        snapshots = train(build(), images, labels, steps, every)
        matrices.append(similarities(snapshots, images[:600]))
        at = list(snapshots)
        curves = matrices[-1].diagonal(dim1=1, dim2=2)
        when = converged(at, curves, torch.full((DEPTH + 1,), args.level))
        half = converged(at, curves, (1 + curves[0]) / 2)
        ordered, halfway = ordered + in_order(when), halfway + in_order(half)
        share, seconds = accuracy(snapshots[steps], *tested), time.perf_counter() - start
        print(f"{f'seed {seed}: SVCCA at the start':<30}{share:>6.0%}" + row(curves[0], 2) + f"{seconds:>9.1f}")
        print(f"{f'        steps to stay above {args.level}':<36}" + row(when))
        print(f"{'        steps to half of its way':<36}" + row(half), flush=True)

    pairs = seeds * (DEPTH - 1)
    mean = torch.stack(matrices).mean(0).diagonal(dim1=1, dim2=2)
    when = converged(at, mean, torch.full((DEPTH + 1,), args.level))
    print(f"{f'mean:   steps to stay above {args.level}':<36}" + row(when))
    print(
        f"lower layer first: {ordered} of {pairs} adjacent pairs by the level, {halfway} of {pairs} by half of the way;",
        end=" ",
    )
    print("by the mean's, bottom-up" if in_order(when) == DEPTH - 1 else "by the mean's, not in the order of depth")
    if args.output:
        draw(at, torch.stack(matrices), args.level, args.output)


if __name__ == "__main__":
    main()
