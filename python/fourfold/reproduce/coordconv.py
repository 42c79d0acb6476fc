"""CoordConv (Liu et al., 2018, arXiv 1807.03247): its Not-so-Clevr tasks, which need no data but positions."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fourfold as ff

from ._registry import NOT, Run, claim, offline, part, step, verdict

SOURCE = "Liu et al. 2018, arXiv 1807.03247"
NEEDS = ("tqdm",)  # of the example
QUICK_GRID = ((4, 0.01),)
FULL_GRID = tuple((kernel, rate) for kernel in (2, 3, 4) for rate in (0.002, 0.01))


def _trained(
    build: Any, task: str, seed: int, where: Tensor, tell: Callable[[float], None], **settings: Any
) -> tuple[nn.Module, float]:
    """A network after a training of examples/not_so_clevr.py, and the processor seconds that took."""
    from fourfold.examples import not_so_clevr as example

    torch.manual_seed(seed)
    net = build(task)
    start = time.process_time()
    example.train(task, net, where, **settings, tell=tell)
    return net, time.process_time() - start


def _classification(split: str, seed: int, full: bool) -> tuple[float, float, dict[str, float], dict[str, Any]]:
    """Accuracy of CoordConv, and of the best of the deconvolutions; seconds; per centre 1 if right, as text."""
    from fourfold.examples import not_so_clevr as example

    seen, tested = example.centres(split)
    grid = FULL_GRID if full else QUICK_GRID
    ours, seconds = _trained(
        example.coord_conv_net, "classification", seed, seen, part(0, 1 + len(grid)), **example.SETTINGS["classification"]
    )
    predicted = {"coordconv": example.predict("classification", ours, tested)}
    best = -1.0
    for i, (kernel, rate) in enumerate(grid, 1):
        settings = example.RIVAL_SETTINGS | {"rate": rate} | ({"steps": 3000} if full else {})
        build, tell = partial(example.rival_net, kernel=kernel), part(i, 1 + len(grid))
        rival, _ = _trained(build, "classification", seed, seen, tell, **settings)
        points = example.predict("classification", rival, tested)
        share = (points == tested).all(1).float().mean().item()
        if share > best:
            best, predicted["deconv"] = share, points
    right = (predicted["coordconv"] == tested).all(1).float().mean().item()
    series = {}
    if seed == 0:
        hits = {key: (points == tested).all(1).int().tolist() for key, points in predicted.items()}
        series = {"split": split, **{key: "".join(map(str, ones)) for key, ones in hits.items()}}
    return right, best, {"coordconv": right, "deconv": best, "seconds": seconds}, series


GRID = (
    "The six are a part of the authors' grid: kernels 2, 3 and 4, rates 0.002 and 0.01, the fewest channels, no weight decay, "
    "and 3000 steps of 16 centres, which is 20 times through the data where the authors went 1000 to 2000 times. Quick: "
    "kernel 4, rate 0.01, 600 steps"
)


@claim(
    "coordconv.uniform",
    claim="from a position to its pixel: CoordConv learns it perfectly, transposed convolutions never do",
    source=f"{SOURCE}, supervised coordinate classification",
    criterion="7,553 weights get all held-out centres of the uniform split right in 4 of 5 seeds; the best "
    f"of six networks of transposed convolutions stays below 90%. {GRID}",
    partly="CoordConv gets all of them right, or more than the best of the six",
    at_least=4,
    needs=NEEDS,
)
def uniform(seed: int, full: bool) -> Run:
    """A random quarter of the centres is held out."""
    ours, best, figures, series = _classification("uniform", seed, full)
    found = f"CoordConv {ours:.1%} in {figures['seconds']:.0f} processor seconds, transposed convolutions {best:.1%}"
    return Run(verdict(ours == 1 and best < 0.9, ours == 1 or ours > best), found, figures, series)


@claim(
    "coordconv.quadrant",
    claim="CoordConv generalises to a quadrant it never saw; transposed convolutions not at all",
    source=f"{SOURCE}, supervised coordinate classification",
    criterion="7,553 weights get all centres of the unseen quadrant right in 4 of 5 seeds; the best of six networks of "
    f"transposed convolutions stays below 5%. {GRID}",
    partly="CoordConv gets more of them right than the best of the six",
    at_least=4,
    needs=NEEDS,
)
def quadrant(seed: int, full: bool) -> Run:
    """The lower right quarter of the canvas is held out."""
    ours, best, figures, series = _classification("quadrant", seed, full)
    found = f"CoordConv {ours:.1%} in {figures['seconds']:.0f} processor seconds, transposed convolutions {best:.1%}"
    return Run(verdict(ours == 1 and best < 0.05, ours > best), found, figures, series)


@claim(
    "coordconv.150x",
    claim="CoordConv learns 150 times faster",
    source=f"{SOURCE}, abstract of its article",
    criterion="processor time until all training centres are right: transposed convolutions take at least 150 times as long, "
    "or don't get there in that time; 4 of 5 seeds. Quick gives them 12 times as long, so that it can only say "
    "partly",
    partly="at least 10 times as long",
    at_least=4,
    needs=NEEDS,
)
def speed(seed: int, full: bool) -> Run:
    """The uniform split; kernel 4."""
    from fourfold.examples import not_so_clevr as example

    seen, _ = example.centres("uniform")
    settings = example.SETTINGS["classification"]
    ours, seconds = _trained(example.coord_conv_net, "classification", seed, seen, lambda share: None, **settings)
    right = example.accuracy("classification", ours, seen)
    if right < 1:
        return Run(NOT, f"CoordConv itself got only {right:.1%} of the training centres right")
    budget = (150 if full else 12) * seconds
    took, best = _until_perfect(seed, seen, budget)
    ratio = (budget if took is None else took) / seconds
    said = f"not there after {ratio:.0f} times as long ({best:.1%} right)" if took is None else f"{ratio:.0f} times as long"
    found = f"CoordConv {seconds:.1f} processor seconds; transposed convolutions {said}"
    return Run(
        verdict(ratio >= 150, ratio >= 10), found, {"seconds": seconds, "ratio": ratio, "reached": float(took is not None)}
    )


def _until_perfect(seed: int, seen: Tensor, budget: float) -> tuple[float | None, float]:
    """Trains transposed convolutions until all centres are right.

    Returns:
        Processor seconds of training, None if over budget; and the best share of centres right.
    """
    from fourfold.examples import not_so_clevr as example

    torch.manual_seed(seed)
    net = example.rival_net("classification")
    example.he_init(net)
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0)
    took, best = 0.0, 0.0
    while took < budget:
        start = time.process_time()
        net.train()
        for _ in range(200):
            some = seen[torch.randint(len(seen), (16,))]
            loss = example.loss_of("classification", net(example.inputs("classification", some)), some)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if time.process_time() - start > budget - took:
                break
        took += time.process_time() - start
        step(min(1.0, took / budget))
        some = seen[torch.randperm(len(seen))[:100]]  # looking does not count, but should not take for ever either
        share = example.accuracy("classification", net, some)
        if share == 1:
            share = example.accuracy("classification", net, seen)
            if share == 1:
                return took, 1.0
        best = max(best, share)
        for group in optimizer.param_groups:  # down to a hundredth at the end
            group["lr"] = 0.01 * 0.01 ** min(1.0, took / budget)
    return None, best


@claim(
    "coordconv.parameters",
    claim="with ten to a hundred times fewer weights",
    source=f"{SOURCE}, abstract of its article",
    criterion="the networks of the classification: of the nine sizes of transposed convolutions that the authors tried, of "
    "kernels 2, 3, 4 and 1 to 3 times as many channels, most have 10 to 100 times as many weights as CoordConv's 7,553",
    partly="one to four of the nine, or another count than 7,553",
    seeded=False,
    needs=NEEDS,
)
def parameters(seed: int, full: bool) -> Run:
    """Nothing is trained."""
    from fourfold.examples import not_so_clevr as example

    def count(net: nn.Module) -> int:
        return sum(weights.numel() for weights in net.parameters())

    ours = count(example.coord_conv_net("classification"))
    theirs = [count(example.rival_net("classification", *size)) for size in product((2, 3, 4), (1, 2, 3))]
    within = sum(10 <= one / ours <= 100 for one in theirs)
    found = (
        f"{ours:,} weights, and {min(theirs):,} to {max(theirs):,}: {min(theirs) / ours:.0f} to {max(theirs) / ours:.0f} "
        f"times as many, {within} of 9 between 10 and 100 times"
    )
    figures: dict[str, float] = {"ours": ours, "smallest": min(theirs), "largest": max(theirs), "within": within}
    return Run(verdict(ours == 7553 and within > 4, within > 0), found, figures)


# ---- rendering -------------------------------------------------------------------------------------------------------


def squares(where: Tensor) -> Tensor:
    """The images of 9 x 9 squares: float [n, 64 * 64]."""
    from fourfold.examples import not_so_clevr as example

    axis = torch.arange(example.SIZE)
    rows, columns = ((axis - where[:, k, None]).abs() <= 4 for k in (0, 1))
    return (rows[:, :, None] & columns[:, None, :]).float().flatten(1)


def _rendering(
    net: nn.Module, seen: Tensor, tested: Tensor, tell: Callable[[float], None], steps: int, batch: int, decay: float
) -> float:
    """Mean intersection over union on the tested centres, after training."""
    from fourfold.examples import not_so_clevr as example

    example.he_init(net)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    net.train()
    for i in range(steps):
        tell(i / steps)
        some = seen[torch.randint(len(seen), (batch,))]
        loss = F.binary_cross_entropy_with_logits(net(example.inputs("classification", some)), squares(some))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    shares = []
    with torch.no_grad():
        for part in tested.split(16):
            drawn, wanted = net(example.inputs("classification", part)) > 0, squares(part) > 0
            shares.append((drawn & wanted).sum(1) / (drawn | wanted).sum(1))
    return torch.cat(shares).mean().item()


@claim(
    "coordconv.rendering",
    claim="from a position to the image of a square: CoordConv draws better than transposed convolutions",
    source=f"{SOURCE}, supervised rendering",
    criterion="mean intersection over union on held-out centres at least 0.99 with CoordConv on both splits; transposed "
    "convolutions lower on both, and below half of it on the quadrant; 4 of 5 seeds. Steps and weight decay were "
    "chosen on seed 0",
    partly="transposed convolutions lower as said, CoordConv below 0.99",
    at_least=4,
    needs=NEEDS,
)
def rendering(seed: int, full: bool) -> Run:
    """The networks of the classification, with a sigmoid per pixel, and their weight decay."""
    from fourfold.examples import not_so_clevr as example

    figures = {}
    for i, split in enumerate(example.SPLITS):
        seen, tested = example.centres(split)
        torch.manual_seed(seed)
        net = example.coord_conv_net("classification")
        figures[f"coordconv {split}"] = _rendering(net, seen, tested, part(2 * i, 4), 1200, batch=4, decay=1.0)
        torch.manual_seed(seed)
        net, steps = example.rival_net("classification"), 3000 if full else 600
        figures[f"deconv {split}"] = _rendering(net, seen, tested, part(2 * i + 1, 4), steps, batch=16, decay=0.0)
    ours, theirs = ([figures[f"{name} {split}"] for split in example.SPLITS] for name in ("coordconv", "deconv"))
    lower = theirs[0] < ours[0] and theirs[1] < ours[1] / 2
    found = f"uniform {ours[0]:.3f} and {theirs[0]:.3f}, quadrant {ours[1]:.3f} and {theirs[1]:.3f}"
    return Run(verdict(min(ours) >= 0.99 and lower, lower), found, figures)


# ---- regression ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _distance(net: nn.Module, where: Tensor) -> float:
    """Mean distance of the positions said from the true ones, in pixels."""
    from fourfold.examples import not_so_clevr as example

    net.eval()
    out = torch.cat([net(example.inputs("regression", part)) for part in where.split(8)])
    return (out * (example.SIZE - 1) - where).norm(dim=1).mean().item()


@claim(
    "coordconv.regression",
    claim="from an image to the position of its bright pixel: 906 weights with coordinates do better than a convolutional "
    "network",
    source=f"{SOURCE}, supervised regression",
    criterion="mean error on held-out centres below 1 pixel on both splits; larger without coordinates on the quadrant; "
    "every seed",
    partly="one of the two",
    needs=NEEDS,
)
def regression(seed: int, full: bool) -> Run:
    """The rival has convolutions, pools and dense layers."""
    from fourfold.examples import not_so_clevr as example

    errors = {}
    for i, split in enumerate(example.SPLITS):
        seen, tested = example.centres(split)
        net, _ = _trained(example.coord_conv_net, "regression", seed, seen, part(2 * i, 4), **example.SETTINGS["regression"])
        errors[f"coordconv {split}"] = _distance(net, tested)
        rival, _ = _trained(example.rival_net, "regression", seed, seen, part(2 * i + 1, 4), **example.RIVAL_SETTINGS)
        errors[f"conv {split}"] = _distance(rival, tested)
    found = "; ".join(
        f"{split}: {errors[f'coordconv {split}']:.2f} pixels, without coordinates {errors[f'conv {split}']:.2f}"
        for split in example.SPLITS
    )
    small = max(errors[f"coordconv {split}"] for split in example.SPLITS) < 1
    better = errors["conv quadrant"] > errors["coordconv quadrant"]
    return Run(verdict(small and better, small or better), found, errors)


# ---- where coordinates do not help -----------------------------------------------------------------------------------


def _host(coordinates: bool) -> nn.Sequential:
    """Digits anywhere on a canvas, through layers that halve the size; the first may see coordinates."""
    first = ff.nn.CoordConv2d(1, 16, 3, stride=2, padding=1) if coordinates else nn.Conv2d(1, 16, 3, stride=2, padding=1)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(16), nn.ReLU()]
    for channels in (16, 32):
        layers += [nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def _placed(images: Tensor, corner: Tensor) -> Tensor:
    """[n, 8, 8] on canvases [n, 1, 24, 24], their upper left corners at [n, 2]."""
    canvas = torch.zeros(len(images), 24, 24)
    axis, n = torch.arange(8), torch.arange(len(images))
    canvas[n[:, None, None], corner[:, 0, None, None] + axis[:, None], corner[:, 1, None, None] + axis] = images
    return canvas[:, None]


def _downsampled(runs: list[Run]) -> tuple[str, str]:
    plain, coords = ([run.figures[key] for run in runs] for key in ("conv", "coordconv"))
    worse = sum(one < other for one, other in zip(coords, plain, strict=True))
    found = (
        f"{statistics.mean(coords):.1%} with coordinates, {statistics.mean(plain):.1%} without, on the quadrant never seen; "
        f"worse with them in {worse} of {len(runs)} seed{'s' * (len(runs) > 1)}"
    )
    return verdict(worse >= 0.8 * len(runs), worse > 0.5 * len(runs)), found


@claim(
    "coordconv.downsampling",
    claim="before layers that halve the size, coordinates do harm where the position says nothing",
    source="an independent test of CoordConv in networks that downsample",
    criterion="digits on a canvas through three convolutions of stride 2, tested in the quadrant where none was in training: "
    "the network whose first layer sees coordinates is worse in 4 of 5 seeds",
    partly="in 3 of 5",
    negative=True,
    over_seeds=_downsampled,
    needs=("sklearn",),
)
def downsampling(seed: int, full: bool) -> Run:
    """Training digits are anywhere but in the lower right quadrant; digits of the test are there."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    seen, tested = train_test_split(range(len(images)), test_size=0.3, random_state=0, stratify=data.target)
    corners = torch.cartesian_prod(torch.arange(17), torch.arange(17))
    held_out = (corners > 8).all(1)
    figures = {}
    for i, name in enumerate(("conv", "coordconv")):
        tell = part(i, 2)
        torch.manual_seed(seed)
        net = _host(name == "coordconv")
        steps = 1500 if full else 600
        optimizer = torch.optim.Adam(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
        for k in range(steps):
            tell(k / steps)
            some = torch.tensor(seen)[torch.randint(len(seen), (64,))]
            where = corners[~held_out][torch.randint(int((~held_out).sum()), (64,))]
            loss = F.cross_entropy(net(_placed(images[some], where)), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        torch.manual_seed(seed)
        where = corners[held_out][torch.randint(int(held_out.sum()), (len(tested),))]
        with torch.no_grad():
            figures[name] = (net.eval()(_placed(images[tested], where)).argmax(1) == labels[tested]).float().mean().item()
    run = Run("", "", figures)
    run.verdict, run.found = _downsampled([run])
    return run


@claim(
    "coordconv.zero-weights",
    claim="with coordinate weights of zero, CoordConv is the convolution",
    source="stands in for the paper's ImageNet control, which needs a download",
    criterion="a convolution and the CoordConv made from it give the same bits; every seed",
)
def zero_weights(seed: int, full: bool) -> Run:
    """As a layer of ResNet-50's stem, and 1 x 1."""
    same = True
    for convolution in (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.Conv2d(64, 8, 1)):
        x = torch.randn(2, convolution.in_channels, 56, 56)
        same &= torch.equal(ff.nn.CoordConv2d.from_conv(convolution)(x), convolution(x))
    return Run(verdict(same), "the same bits" if same else "other bits")


offline(
    "coordconv.imagenet",
    claim="one CoordConv layer in ResNet-50 changes ImageNet's top-5 by 0.04%, which is not significant",
    source=SOURCE,
    why="needs ImageNet; coordconv.zero-weights tests that such a layer can begin as what it replaces",
)
offline(
    "coordconv.detection",
    claim="24% better IOU in detection with Faster R-CNN; less mode collapse of GANs; Atari games",
    source=SOURCE,
    why="needs MNIST, LSUN and Atari, downloads",
)
