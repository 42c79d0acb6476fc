"""The tasks that CoordConv was invented for (Liu et al., 2018, arXiv 1807.03247): from a position to its pixel, and back.

python examples/not_so_clevr.py [--task ..] [--split ..] [--rival] [--quick] [--seed 0] [--output FILE.png]. Needs tqdm.

Not-so-Clevr: a 9 x 9 square somewhere in an image of 64 x 64, so 56 x 56 centres. Neither task here shows the square itself.
classification  two numbers -> which of the 4096 pixels is the centre
regression      an image that is 1 at the centre and 0 elsewhere -> two numbers; right if both round to the true pixel
The uniform split tests a random quarter of the centres, the quadrant split the lower right ones: a quarter never seen.
"""

import argparse
import math
import time
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import fourfold as ff
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

SIZE = 64
TASKS = ("classification", "regression")
SPLITS = ("uniform", "quadrant")


# ---- data ------------------------------------------------------------------------------------------------------------


def centres(split: str) -> tuple[Tensor, Tensor]:
    """The centres (row, column) to train on and to test on: int64 [n, 2]."""
    axis = torch.arange(4, SIZE - 4)  # the square fits into the image
    every = torch.cartesian_prod(axis, axis)
    if split == "quadrant":
        held_out = (every >= SIZE // 2 + 1).all(1)
    else:
        held_out = torch.rand(len(every), generator=torch.Generator().manual_seed(0)) < 0.25
    return every[~held_out], every[held_out]


def inputs(task: str, where: Tensor) -> Tensor:
    """What a network sees of the centres [n, 2]: [n, 2, 64, 64], each number on every pixel, or the images [n, 1, 64, 64]."""
    if task == "classification":
        numbers = where * (2 / (SIZE - 1)) - 1  # as ff.CoordSpec() counts
        return numbers[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    images = torch.zeros(len(where), 1, SIZE, SIZE)
    images[torch.arange(len(where)), 0, where[:, 0], where[:, 1]] = 1
    return images


# ---- networks --------------------------------------------------------------------------------------------------------


def coord_conv_net(task: str) -> nn.Sequential:
    """The paper's: the first layer sees coordinates, the others need none."""
    if task == "classification":
        return nn.Sequential(
            ff.nn.CoordConv2d(2, 32, 1, activation="relu"), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.ReLU(),
            nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 1, 1), nn.Flatten(),
        )  # fmt: skip
    return nn.Sequential(
        ff.nn.CoordConv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 2, 3, padding=1), nn.MaxPool2d(SIZE), nn.Flatten(),
    )  # fmt: skip


def rival_net(task: str, kernel: int = 4, width: int = 1) -> nn.Sequential:
    """Convolutions without coordinates, as the paper has them: ten to a hundred times as many weights.

    kernel and, as a factor, width are those of the transposed convolutions, for the classification.
    """
    layers: list[nn.Module] = []
    if task == "classification":
        layers += [nn.AvgPool2d(SIZE)]  # the two numbers as one pixel, which six layers enlarge to 64 x 64
        twice = (kernel, 2, (kernel - 1) // 2, kernel % 2)
        channels = [2, *(width * count for count in (64, 64, 64, 32, 32))]
        for some, out in pairwise(channels):
            layers += [nn.ConvTranspose2d(some, out, *twice), nn.BatchNorm2d(out), nn.ReLU()]
        return nn.Sequential(*layers, nn.ConvTranspose2d(channels[-1], 1, *twice), nn.Flatten())
    for channels in (1, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 2))


def he_init(net: nn.Module) -> None:
    """Normal weights that keep the variance (He et al., 2015), and zeros for biases and coordinates.

    Random coordinates would make some corner of the image the largest value from the start: in regression the bright pixel
    then gets no gradient, as the maximum is taken elsewhere.
    """
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        if isinstance(layer, ff.nn.CoordConv2d):
            nn.init.zeros_(layer.coord_weight)


# ---- training --------------------------------------------------------------------------------------------------------

# Small batches stay in the caches. Weight decay makes the classifier compare positions instead of learning them by heart; in
# regression it would only press the one bright pixel down towards the others. The rivals do better without, and on more images.
SETTINGS = {
    "classification": {"steps": 600, "batch": 4, "weight_decay": 1.0},
    "regression": {"steps": 600, "batch": 8, "weight_decay": 0.0},
}
RIVAL_SETTINGS = {"steps": 600, "batch": 16, "weight_decay": 0.0}


def loss_of(task: str, out: Tensor, where: Tensor) -> Tensor:
    """Cross-entropy over the pixels, or the squared error of positions counted from 0 to 1."""
    if task == "classification":
        return F.cross_entropy(out, where[:, 0] * SIZE + where[:, 1])
    return F.mse_loss(out, where / (SIZE - 1))


def train(
    task: str,
    net: nn.Module,
    where: Tensor,
    steps: int,
    batch: int,
    weight_decay: float,
    rate: float = 0.01,
    name: str = "",
    tell: Callable[[float], object] | None = None,
) -> None:
    """A fixed number of steps on random centres, learning rate up and down again.

    name: of the bar; none without. tell: called in each step with the share that is done, for bars of others.
    """
    he_init(net)
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    net.train()
    progress = tqdm(range(steps), desc=name, disable=None if name else True)
    for step in progress:
        if tell is not None:
            tell(step / steps)
        some = where[torch.randint(len(where), (batch,))]
        loss = loss_of(task, net(inputs(task, some)), some)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.1e}", refresh=False)


@torch.no_grad()
def predict(task: str, net: nn.Module, where: Tensor) -> Tensor:
    """The pixels that the network says: int64 [n, 2]."""
    net.eval()
    out = torch.cat([net(inputs(task, part)) for part in where.split(8)])
    if task == "classification":
        best = out.argmax(1)
        return torch.stack([best // SIZE, best % SIZE], 1)
    return (out * (SIZE - 1)).round().long()


def accuracy(task: str, net: nn.Module, where: Tensor) -> float:
    """The share of centres whose pixel is predicted exactly."""
    return (predict(task, net, where) == where).all(1).float().mean().item()


# ---- the table and the picture ---------------------------------------------------------------------------------------


def draw(panels: list[tuple[str, Tensor, Tensor, Tensor]], path: Path) -> None:
    """Per network which centres it was trained on, which test centres it gets right, and where it puts the others."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, (title, seen, tested, predicted) in zip(axes, panels, strict=False):
        right = (predicted == tested).all(1)
        wrong = predicted[~right].clamp(-8, SIZE + 8)
        for points, colour, label in (
            (seen, "lightgrey", "trained on"),
            (tested[right], "tab:green", "tested, right"),
            (wrong, "tab:red", "predicted, wrong"),
        ):
            ax.scatter(points[:, 1], points[:, 0], s=3, c=colour, label=label)
        ax.set(title=title, xlim=(-9, SIZE + 9), ylim=(SIZE + 9, -9), aspect="equal", xticks=(0, 63), yticks=(0, 63))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=4)
    figure.savefig(path, dpi=100)
    print(f"picture: {path}")


def main() -> None:
    """Trains what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("both", *TASKS), default="both")
    parser.add_argument("--split", choices=("both", *SPLITS), default="quadrant")
    parser.add_argument("--rival", action="store_true", help="also a network without coordinates, for as many steps")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps: shows that it runs, not what it learns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where a picture goes, if matplotlib is installed")
    args = parser.parse_args()

    tasks = TASKS if args.task == "both" else (args.task,)
    splits = SPLITS if args.split == "both" else (args.split,)
    nets = {"CoordConv": coord_conv_net, **({"rival": rival_net} if args.rival else {})}
    print(f"{'task':<15}{'split':<10}{'network':<10}{'weights':>8}{'steps':>7}{'seconds':>9}{'train':>9}{'test':>9}")
    panels = []
    for task, split, (name, build) in product(tasks, splits, nets.items()):
        torch.manual_seed(args.seed)
        net, (seen, tested) = build(task), centres(split)
        settings = dict(RIVAL_SETTINGS if name == "rival" else SETTINGS[task])
        settings["steps"] //= 10 if args.quick else 1
        start = time.perf_counter()
        train(task, net, seen, **settings, name=f"{task}, {split}, {name}")
        seconds = time.perf_counter() - start
        count = sum(parameter.numel() for parameter in net.parameters())
        shares = "".join(f"{accuracy(task, net, where):>9.2%}" for where in (seen, tested))
        print(f"{task:<15}{split:<10}{name:<10}{count:>8}{settings['steps']:>7}{seconds:>9.1f}{shares}", flush=True)
        panels.append((f"{task}, {name}", seen, tested, predict(task, net, tested)))
    if args.output:
        draw(panels, args.output)


if __name__ == "__main__":
    main()
