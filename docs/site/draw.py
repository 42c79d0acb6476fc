"""The pictures of the guides, from runs of the library: python docs/site/draw.py [NAME ...].

Needs fourfold, matplotlib, scikit-learn, pillow and tqdm (the extra `test`). Seeds are fixed; each picture takes seconds, but
coordconv.png minutes. They are stored in docs/pictures, so that building the site needs none of this.
"""

import io
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import cca_convergence_digits as convergence  # noqa: E402
import fourfold as ff  # noqa: E402
import not_so_clevr  # noqa: E402
import supermask_digits as supermasks  # noqa: E402

mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "fourfold"})
COLOURS = ["#3f51b5", "#e8710a", "#188038", "#a142f4"]
DRAWN: dict[str, Callable[[], Figure]] = {}


def picture(name: str) -> Callable[[Callable[[], Figure]], Callable[[], Figure]]:
    def remember(draw: Callable[[], Figure]) -> Callable[[], Figure]:
        DRAWN[name] = draw
        return draw

    return remember


def panels(columns: int, width: float = 9.6, height: float = 2.7, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def show(ax: Any, image: Tensor, title: str, **options: Any) -> Any:
    ax.set(title=title, xticks=(), yticks=())
    return ax.imshow(image, **({"cmap": "gray", "vmin": 0, "vmax": 255} | options))


def card_of(size: int = 128) -> Tensor:
    """Rings that are finer the further out, and two edges: every frequency, everywhere another one. [size, size] in 0..255."""
    axis = torch.arange(size) - size / 2
    y, x = axis[:, None], axis[None, :]
    rings = 127.5 + 120 * torch.cos((x**2 + y**2) * (math.pi / 2 / size))
    rings[: size // 4, : size // 4] = 255
    rings[: size // 8, : size // 8] = 0
    return rings


# ---- one function for each picture -----------------------------------------------------------------------------------


@picture("block_dct.png")
def block_dct() -> Figure:
    card = card_of()[None, None]
    figure, axes = panels(4)
    show(axes[0], card[0, 0], "128 × 128 pixels")
    coefs = ff.block_dct(card, layout="interleaved", shift=-128.0)
    show(axes[1], coefs[0, 0].abs().add(1).log(), "coefficients, interleaved", cmap="magma", vmin=None, vmax=None)
    for ax, count in zip(axes[2:], (24, 6), strict=True):
        low = ff.zigzag()[:count].tolist()
        kept = ff.block_idct(ff.block_dct(card, freqs=low), freqs=low)
        show(ax, kept[0, 0].clamp(0, 255), f"from the {count} lowest of 64")
    return figure


@picture("jpeg.svg")
def jpeg() -> Figure:
    figure, axes = panels(3, 8.4, 3.0)
    pixels = Image.fromarray(card_of(512).round().byte().numpy())
    for ax, quality in zip(axes, (30, 60, 90), strict=True):
        file = io.BytesIO()
        pixels.save(file, "JPEG", quality=quality)
        (blocks,) = ff.jpeg.read(file.getvalue()).components
        share = (blocks != 0).double().mean((0, 1)).view(8, 8)
        mesh = ax.imshow(share, cmap="magma", vmin=0, vmax=1)
        title = f"quality {quality}: {len(file.getvalue()) / 1024:.0f} KiB, {share.mean():.0%} not 0"
        ax.set(title=title, xticks=(0, 7), yticks=(0, 7), xlabel="frequency across")
    axes[0].set_ylabel("frequency down")
    figure.colorbar(mesh, ax=axes, label="blocks in which it is not 0")
    return figure


@picture("coordconv.png")
def coordconv() -> Figure:
    figure, axes = panels(2, 8.0, 4.6)
    size = not_so_clevr.SIZE
    seen, tested = not_so_clevr.centres("quadrant")
    nets = {"CoordConv": not_so_clevr.coord_conv_net, "convolutions": not_so_clevr.rival_net}
    for ax, (name, build) in zip(axes, nets.items(), strict=True):
        torch.manual_seed(0)
        net = build("classification")
        settings = not_so_clevr.SETTINGS["classification"] if name == "CoordConv" else not_so_clevr.RIVAL_SETTINGS
        not_so_clevr.train("classification", net, seen, **settings, name=name)
        predicted = not_so_clevr.predict("classification", net, tested)
        right = (predicted == tested).all(1)
        for points, colour, label in (
            (seen, "lightgrey", "trained on"),
            (tested[right], "tab:green", "tested, right"),
            (predicted[~right], "tab:red", "predicted, wrong"),
        ):
            ax.scatter(points[:, 1], points[:, 0], s=3, c=colour, label=label)
        weights = sum(p.numel() for p in net.parameters())
        ax.set_title(f"{name}, {weights:,} weights: {right.float().mean():.1%} right", fontsize=9)
        ax.set(xlim=(-1, size), ylim=(size, -1), xticks=(0, 63), yticks=(0, 63), aspect="equal")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=4)
    return figure


@picture("maskmm.svg")
def maskmm() -> Figure:
    torch.manual_seed(0)
    figure, axes = panels(4, 9.6, 2.7, width_ratios=(1, 1, 1, 1.5))
    scores = torch.randn(24, 24) + torch.linspace(-2, 2, 24)
    masks = {
        "threshold, scores ≥ 0": ff.threshold_mask(scores),
        "bernoulli, by σ(score)": ff.bernoulli_mask(scores, 0),
        "topk, the 10% of largest |score|": ff.topk_mask(scores, 0.1),
    }
    for ax, (name, bits) in zip(axes, masks.items(), strict=False):
        show(ax, ff.unpack_mask(bits, 24), name, cmap="gray_r", vmin=0, vmax=1)
        ax.title.set_fontsize(8)
    images, labels, others, answers = supermasks.digits()
    densities, before, after = (0.02, 0.05, 0.1, 0.2, 0.5), [], []
    for density in densities:
        torch.manual_seed(0)
        net = supermasks.plain_net(constant=True)
        # The magnitude that keeps the variance of the weights that are left; scores of any order make a random mask.
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.weight.data = layer.weight.data.sign() * math.sqrt(2 / (layer.in_features * density))
        ff.swap(net, ff.recipes.supermask(sampler="topk", density=density))
        before.append(supermasks.accuracy(net, others, answers))
        train_scores(net, images, labels)
        after.append(supermasks.accuracy(net, others, answers))
    axes[3].plot(densities, after, "o-", c=COLOURS[0], label="learned mask")
    axes[3].plot(densities, before, "o-", c=COLOURS[1], label="random mask")
    axes[3].set(xscale="log", xlabel="weights kept", ylim=(0, 1), title="digits, no weight trained: test accuracy")
    axes[3].set_xticks(densities, [f"{d:.0%}" for d in densities])
    axes[3].title.set_fontsize(8)
    axes[3].minorticks_off()
    axes[3].legend()
    return figure


def train_scores(net: nn.Module, images: Tensor, labels: Tensor, epochs: int = 20, batch: int = 64) -> None:
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    for _ in range(epochs):
        for some in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(net(images[some]), labels[some]).backward()
            optimizer.step()


@picture("cca.svg")
def cca() -> Figure:
    figure, axes = panels(3, 9.6, 3.0, width_ratios=(1, 1, 1.3))
    images, labels, others, _ = convergence.digits()
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(convergence.build())
        *_, trained = convergence.train(nets[-1], images, labels, 150, 150).values()
        nets[-1] = trained
    found = ff.compare(*nets, others.split(200), layers=["layer*", "head"], method=("svcca", "cka"), progress=False)
    for ax, method in zip(axes, ("svcca", "cka"), strict=False):
        mesh = ax.imshow(found.matrix[method], cmap="magma", vmin=0, vmax=1)
        ticks = range(len(found.layers_a)), [name.removeprefix("layer") for name in found.layers_a]
        ax.set_xticks(*ticks)
        ax.set_yticks(*ticks)
        ax.set(title=f"{method}, two networks", xlabel="layer of seed 1")
    axes[0].set_ylabel("layer of seed 0")
    figure.colorbar(mesh, ax=axes[:2])
    torch.manual_seed(0)
    counts = [96, 128, 192, 256, 384, 640, 1280, 2560, 6400]
    pairs = [(torch.randn(n, 64), torch.randn(n, 64)) for n in counts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few samples are what is shown
        axes[2].plot(counts, [float(ff.cca(x, y).r2) for x, y in pairs], "o-", c=COLOURS[1], label="cca, r2")
    axes[2].plot(counts, [64 / (n - 1) for n in counts], "k:", label="64 / (n − 1)")
    axes[2].plot(counts, [float(ff.cka(x, y)) for x, y in pairs], "o-", c=COLOURS[2], label="cka")
    unbiased = [float(ff.cka(x, y, unbiased=True)) for x, y in pairs]
    axes[2].plot(counts, unbiased, "o-", c=COLOURS[0], label="cka, unbiased")
    axes[2].set(xscale="log", xlabel="n samples of 64 neurons", title="layers that have nothing in common")
    axes[2].legend()
    return figure


@picture("swapping.svg")
def swapping() -> Figure:
    figure, ax = panels(1, 8.4, 3.2)
    example = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    cases = {"coord_conv()": ff.recipes.coord_conv()}
    cases |= {f"masked(density={density})": ff.recipes.masked(density=density) for density in (0.8, 0.5, 0.2)}
    for colour, (name, recipe) in zip(COLOURS, cases.items(), strict=True):
        torch.manual_seed(0)
        model = ff.models.resnet50(num_classes=10)
        report = ff.swap(model, recipe, example=example, change_output=True)
        similar = [report.certificate[layer].cka for layer in report.certificate]
        ax.plot(similar, ".-", c=colour, label=name, lw=1, ms=4)
    ax.set(xlabel="layer of a ResNet-50, in the order of the report", ylabel="CKA with before", ylim=(0, 1.03))
    ax.legend()
    return figure


@picture("models_swapped.svg")
def models_swapped() -> Figure:
    text = (ROOT / "docs" / "models_swapped.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    head, rows = lines[0], lines[2:]
    model, swapped, changed, compiled = (head.index(n) for n in ("model", "swapped", "swap changed by", "compiled, apart by"))
    names = list(dict.fromkeys(row[model] for row in rows))
    figure, ax = panels(1, 8.4, 4.2)
    kinds = {"coord_conv": "CoordConv", "masked": "masked, half of the weights", "supermask": "supermask, half kept"}
    for colour, (kind, label) in zip(COLOURS, kinds.items(), strict=False):
        of_kind = [row for row in rows if row[swapped].startswith(f"`{kind}(")]
        at = [names.index(row[model]) for row in of_kind]
        ax.plot([max(float(row[changed]), 1e-9) for row in of_kind], at, "o", c=colour, label=f"{label}: the swap changed by")
        ax.plot([float(row[compiled]) for row in of_kind], at, "x", c=colour, label=f"{label}: compiled is apart by")
    ax.set_yticks(range(len(names)), names)
    ax.set(xscale="log", xlabel="largest difference (0 is at the left edge)", xlim=(5e-10, 10))
    ax.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


@picture("scale.svg")
def scale() -> Figure:
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            mp.spawn(train_shared, (count, folder), nprocs=count)
        one, two = (torch.load(Path(folder) / f"{count}.pt", weights_only=True) for count in (1, 2))
    figure, axes = panels(2, 8.4, 2.9)
    axes[0].plot(one, c=COLOURS[0], lw=3, label="one process, batch of 32")
    axes[0].plot(two, "--", c=COLOURS[1], label="two processes, 16 each")
    axes[0].set(xlabel="step", title="loss of the whole batch, float64")
    axes[0].legend()
    axes[1].plot((one - two).abs().clamp(min=1e-18), c=COLOURS[1])
    axes[1].set(yscale="log", xlabel="step", title="the two losses apart by", ylim=(1e-18, 1e-9))
    return figure


def train_shared(rank: int, count: int, folder: str) -> None:
    """Steps of DistributedDataParallel on this process's part of each batch."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{count}", rank=rank, world_size=count)
    torch.manual_seed(0)
    net = nn.Sequential(
        ff.nn.CoordConv2d(1, 8, 3, padding=1, activation="relu"),
        ff.nn.SupermaskConv2d(8, 16, 3, stride=2, padding=1, sampler="topk", density=0.5),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        ff.nn.MaskedLinear(256, 10, mask=torch.rand(10, 256) < 0.3),
    ).double()
    images, labels, *_ = convergence.digits()
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for step in range(80):
        some = torch.arange(32 * step, 32 * (step + 1)) % len(images)
        mine = some[rank::count]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[mine].double()), labels[mine])
        loss.backward()
        optimizer.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole / count)
    if rank == 0:
        torch.save(torch.stack(losses), Path(folder) / f"{count}.pt")
    del model
    dist.destroy_process_group()


def main() -> None:
    names = sys.argv[1:] or list(DRAWN)
    if unknown := set(names) - set(DRAWN):
        sys.exit(f"no picture is called {', '.join(sorted(unknown))}; there are: {', '.join(DRAWN)}")
    for name in names:
        path = ROOT / "docs" / "pictures" / name
        options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
        DRAWN[name]().savefig(path, dpi=110, **options)
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.convert("RGB").quantize(64).save(path, optimize=True)
        else:  # matplotlib leaves spaces at the ends of lines
            path.write_text(re.sub(r" +$", "", path.read_text(encoding="utf-8"), flags=re.M), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
