"""fourfold on two real photos: what the ops do, how long they take beside plain torch, and a picture of it.

make demo, or: python examples/demo.py [--output FILE.png]
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fourfold as ff
import numpy as np
import torch
import torch.nn.functional as F
from fourfold.benchmarks.harness import LoadWatch, Race, ratios, set_allocation_state, spread
from fourfold.reference.blockdct import dct_matrix
from torch import Tensor

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_sample_images

    PHOTOS = load_sample_images().images  # two uint8 [427, 640, 3]; decoding them needs pillow
except ImportError as error:
    sys.exit(f"the demo needs scikit-learn, pillow and matplotlib ({error}); run: pip install scikit-learn pillow matplotlib")

Call = Callable[[], Tensor]
SECONDS = 0.7  # of timing per row of the table

# The luminance quantisation table of ITU-T T.81, K.1.
LUMINANCE = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
).flatten()


# ---- timing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """Ours beside one plain-torch idiom."""

    op: str
    x: Tensor
    idiom: str
    difference: float  # largest, between the two results
    ours: float  # milliseconds, median
    plain: float
    ratio: float  # plain / ours within a round, median

    HEADER = ("op", "input", "plain torch", "ours ms", "plain ms", "ratio", "max difference")

    def cells(self) -> tuple[str, ...]:
        """As the table shows them."""
        shape = f"{str(self.x.dtype).removeprefix('torch.')} {list(self.x.shape)}"
        times = (f"{self.ours:.3g}", f"{self.plain:.3g}", f"{self.ratio:.1f}")
        return self.op, shape, self.idiom, *times, f"{self.difference:.0e}"


def clock(call: Call, loops: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def compare(op: str, x: Tensor, ours: Call, idioms: dict[str, Call], terms: int = 64) -> list[Row]:
    """Compares results, each value a sum of at most so many products, then lets ours and the idioms take turns."""
    print(f"  timing {op} ...", flush=True)
    result = ours()
    # Every sum is rounded in float32.
    allowed = terms * torch.finfo(torch.float32).eps * result.abs().max().item()
    differences = {name: (call() - result).abs().max().item() for name, call in idioms.items()}
    for name, difference in differences.items():
        if not difference <= allowed:
            sys.exit(f"{op} and {name} differ by {difference:.1e}, more than rounding explains: no time is given")
    race = Race({op: ours, **idioms}, clock)
    for _ in range(race.rounds_within(SECONDS * len(idioms), fewest=5)):
        race.play_round()
    ms = {name: spread(times)["median"] * 1e3 for name, times in race.times.items()}
    ratio = {name: ratios(race.times[name], race.times[op])["median"] for name in idioms}
    return [Row(op, x, name, differences[name], ms[op], ms[name], ratio[name]) for name in idioms]


def print_table(rows: list[Row]) -> None:
    """In aligned columns."""
    lines = [Row.HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in (lines[0], ["-" * width for width in widths], *lines[1:]):
        words = (
            f"{cell:<{width}}" if i < 3 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print(" | ".join(words))
    print("times are medians of each; ratio is the median of plain / ours within a round, which a busy machine disturbs less")


# ---- blockdct --------------------------------------------------------------------------------------------------------


def blockdct(photos: Tensor, panel: Any) -> list[Row]:
    """There and back, few frequencies, a JPEG table; beside convolutions, matrix products and an eager chain."""
    coefs = ff.block_dct(photos, shift=-128.0, layout="blocks")  # [B, 3, h, w, 64]
    back = ff.block_idct(coefs, shift=-128.0, layout="blocks", size=photos.shape[2:])
    print(f"  block_idct(block_dct(photos)) returns the photos to within {(back - photos).abs().max():.0e} of 255 levels")

    order = ff.zigzag()
    energy = coefs.square().mean((1, 2, 3))  # [B, 64]
    kept = energy.mean(0)[order].cumsum(0) / energy.mean(0).sum()
    print(f"  energy: {kept[0]:.1%} in the first zigzag frequency, {kept[5]:.1%} in 6, {kept[23]:.2%} in 24, of 64")
    draw_blockdct(panel, photos, energy)

    quantised, luma = quantise(photos)
    table = LUMINANCE.float()
    decoded = ff.block_idct(
        ff.dct_normalize(quantised, table, layout="blocks"), layout="blocks", shift=-128.0, size=luma.shape[2:]
    )
    zeros = (quantised == 0).float().mean()
    print(
        f"  JPEG's luminance table makes {zeros:.0%} of the int16 coefficients zero; the rest decodes to {psnr(decoded, luma)}"
    )
    return time_transforms(photos) + time_colours(photos) + time_normalize(quantised, table)


def few(photos: Tensor, count: int) -> Tensor:
    """The photos from their first frequencies in zigzag order; the others are never computed."""
    freqs = ff.zigzag()[:count]
    coefs = ff.block_dct(photos, freqs=freqs, shift=-128.0)  # [B, 3 * count, h, w]
    return ff.block_idct(coefs, freqs=freqs, shift=-128.0, size=photos.shape[2:])


def quantise(photos: Tensor) -> tuple[Tensor, Tensor]:
    """The int16 coefficients [B, 1, h, w, 64] that a JPEG file would hold of the photos' luma, and the luma [B, 1, H, W]."""
    luma = torch.einsum("bchw,c->bhw", photos, torch.tensor([0.299, 0.587, 0.114]))[:, None]
    scaled = ff.block_dct(luma, shift=-128.0, layout="blocks", scale=1 / LUMINANCE)
    return scaled.round().to(torch.int16), luma


def psnr(got: Tensor, expected: Tensor) -> str:
    """Peak signal-to-noise ratio of 8-bit levels."""
    return f"{10 * math.log10(255**2 / (got.clamp(0, 255) - expected).square().mean().item()):.1f} dB"


def time_transforms(photos: Tensor) -> list[Row]:
    """block_dct and block_idct on the photos' whole blocks, so that plain torch need not pad."""
    b, c, height, width = photos.shape
    h, w = height // 8, width // 8
    x = photos[:, :, : h * 8, : w * 8].contiguous()
    y = ff.block_dct(x)  # [B, C * 64, h, w]
    d = dct_matrix(8, x.dtype, x.device)
    filters = torch.kron(d, d).reshape(64, 1, 8, 8)
    strips = b * c * h  # each 8 rows of one plane
    ds, dts = d.expand(strips, 8, 8), d.T.expand(strips, 8, 8)

    def conv2d() -> Tensor:
        return F.conv2d(x.view(b * c, 1, h * 8, w * 8), filters, stride=8).view(b, c * 64, h, w)

    def two_pass() -> Tensor:
        across = x.view(-1, 8) @ d.T
        both = torch.bmm(ds, across.view(strips, 8, w * 8))
        return both.view(b, c, h, 8, w, 8).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 64, h, w)

    def conv_transpose2d() -> Tensor:
        return F.conv_transpose2d(y.view(b * c, 64, h, w), filters, stride=8).view_as(x)

    def two_pass_inverse() -> Tensor:
        laid = y.view(b, c, 8, 8, h, w).permute(0, 1, 4, 2, 5, 3).reshape(strips, 8, w * 8)
        return (torch.bmm(dts, laid).view(-1, 8) @ d).view_as(x)

    return [
        *compare("block_dct", x, lambda: ff.block_dct(x), {"conv2d, stride 8": conv2d, "two-pass GEMM + permute": two_pass}),
        *compare(
            "block_idct",
            y,
            lambda: ff.block_idct(y),
            {"conv_transpose2d": conv_transpose2d, "permute + two-pass GEMM": two_pass_inverse},
        ),
    ]


def time_colours(photos: Tensor) -> list[Row]:
    """rgb_to_dct of the photos' bytes, in whole MCUs, beside colours, chroma's averages and transform as two convolutions."""
    height, width = (length // 16 * 16 for length in photos.shape[2:])
    rgb = photos[:, :, :height, :width].to(torch.uint8).contiguous()
    d = dct_matrix(8, torch.float64, rgb.device)
    basis = torch.einsum("ui,vj->uvij", d, d).reshape(64, 8, 8)
    cells = basis.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4
    y, cb, cr = torch.tensor([[0.299, 0.587, 0.114], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    colours = torch.stack([(cb - y) / 1.772, (cr - y) / 1.402])
    luma = torch.einsum("fij,c->fcij", basis, y).float()
    chroma = torch.einsum("fij,kc->kfcij", cells, colours).flatten(0, 1).float()
    shift = torch.zeros(64).index_fill(0, torch.tensor(0), -128.0 * 8)

    def together(y: Tensor, cbcr: Tensor) -> Tensor:
        return torch.cat([y.flatten(), cbcr.flatten()])

    def convolutions() -> Tensor:
        x = rgb.float()
        return together(F.conv2d(x, luma, shift, stride=8), F.conv2d(x, chroma, stride=16))

    return compare("rgb_to_dct", rgb, lambda: together(*ff.rgb_to_dct(rgb)), {"two convolutions": convolutions})


def time_normalize(coefs: Tensor, table: Tensor) -> list[Row]:
    """dct_normalize to network input, with the statistics of these very photos."""
    values = coefs * table
    mean = values.mean((0, 1, 2, 3))
    std = values.std((0, 1, 2, 3)).clamp(min=1)  # a frequency quantised away altogether has none

    def chain() -> Tensor:
        return ((coefs.float() * table - mean) / std).permute(0, 1, 4, 2, 3).contiguous()

    return compare("dct_normalize", coefs, lambda: ff.dct_normalize(coefs, table, mean=mean, std=std), {"eager chain": chain})


def draw_blockdct(panel: Any, photos: Tensor, energy: Tensor) -> None:
    """A detail of each photo from ever more frequencies, and where its energy [B, 64] is."""
    columns = [("original", photos), *((f"{count} of 64 frequencies", few(photos, count)) for count in (1, 6, 24))]
    v, u = ff.zigzag()[:24] % 8, ff.zigzag()[:24] // 8
    power = energy.clamp(min=1e-3).log10()
    axes = panel.subplots(len(photos), len(columns) + 1, width_ratios=[1, 1, 1, 1, 0.8])
    top, left, height, width = 100, 180, 216, 320
    for row, line in enumerate(axes):
        for ax, (name, images) in zip(line[:-1], columns, strict=True):
            detail = images[row, :, top : top + height, left : left + width].clamp(0, 255)
            ax.imshow(detail.permute(1, 2, 0).to(torch.uint8).numpy(), interpolation="nearest")
            ax.set_title(name if images is photos else f"{name}, photo {psnr(images[row], photos[row])}")
            ax.set_axis_off()
        ax = line[-1]
        shown = ax.imshow(power[row].reshape(8, 8).numpy(), vmin=power.min().item(), vmax=power.max().item())
        ax.plot(v.numpy(), u.numpy(), color="white", marker=".", linewidth=1)
        ax.set_title("energy (log10), zigzag to 24")
        ax.set(xticks=range(8), yticks=range(8), ylabel="frequency down")
        panel.colorbar(shown, ax=ax)
    axes[-1, -1].set_xlabel("frequency across")


# ---- coordconv -------------------------------------------------------------------------------------------------------


def coordconv(photos: Tensor, panel: Any) -> list[Row]:
    """Swapped into a network, painting a photo from coordinates alone; beside plain convolution and concatenation."""
    images = (photos / 255).contiguous(memory_format=torch.channels_last)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 3, padding=1))
    with torch.no_grad():
        before = network(images)
        for place in (0, 2):
            network[place] = ff.nn.CoordConv2d.from_conv(network[place])
        same = torch.equal(network(images), before)
    if not same:
        sys.exit("from_conv changed the output of a network")
    print("  from_conv: both convolutions of a network know where they are now; its output is bit-identical")
    draw_coordconv(panel, F.interpolate(images, size=(64, 96), mode="area"))
    return time_coordconv(images)


def painter(layer: Any) -> torch.nn.Module:
    """Pointwise layers from a constant to colours; only the first may know where it is."""
    widths = (64, 64, 64)
    rest = [m for a, b in zip(widths, (*widths[1:], 3), strict=True) for m in (torch.nn.ReLU(), torch.nn.Conv2d(a, b, 1))]
    return torch.nn.Sequential(layer(1, widths[0], 1), *rest)


def paint(layer: Any, target: Tensor, steps: int = 150) -> Tensor:
    """What such a network makes of an image of ones when it is to give the target."""
    torch.manual_seed(0)
    network, ones = painter(layer), torch.ones(1, 1, *target.shape[2:])
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        F.mse_loss(network(ones), target).backward()
        optimiser.step()
    with torch.no_grad():
        result: Tensor = network(ones)
    return result


def draw_coordconv(panel: Any, small: Tensor) -> None:
    """Each photo, and what pointwise convolutions and CoordConvs learn to paint from a constant image."""
    axes = panel.subplots(len(small), 3)
    layers = {"torch.nn.Conv2d": torch.nn.Conv2d, "nn.CoordConv2d": ff.nn.CoordConv2d}
    for line, target in zip(axes, small.split(1), strict=True):
        painted = {"64 x 96 pixels": target, **{f"{name}, 1 x 1": paint(layer, target) for name, layer in layers.items()}}
        for ax, (name, image) in zip(line, painted.items(), strict=True):
            error = (image - target).square().mean().sqrt().item()
            ax.imshow(image[0].clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set_title(name if image is target else f"{name}: 150 steps from a constant, error {error:.2f}")
            ax.set_axis_off()


def time_coordconv(images: Tensor) -> list[Row]:
    """A CoordConv with ReLU beside both ways to concatenate."""
    torch.manual_seed(0)
    weight, coord_weight, bias = torch.randn(32, 3, 3, 3) / 5, torch.randn(32, 2, 3, 3) / 5, torch.randn(32)
    both = torch.cat([weight, coord_weight], 1)
    batch, _, height, width = images.shape
    cached = ff.add_coords(images[:, :1])[:, 1:].contiguous(memory_format=torch.channels_last)

    def published() -> Tensor:
        i = torch.linspace(-1, 1, height).view(1, 1, height, 1).repeat(batch, 1, 1, width)
        j = torch.linspace(-1, 1, width).view(1, 1, 1, width).repeat(batch, 1, height, 1)
        return F.conv2d(torch.cat([images, i, j], 1), both, bias, padding=1).relu_()

    def best() -> Tensor:
        return F.conv2d(torch.cat([images, cached], 1), both, bias, padding=1).relu_()

    def ours() -> Tensor:
        return ff.coord_conv2d(images, weight, coord_weight, bias, padding=1, activation="relu")

    with torch.no_grad():
        return compare("coord_conv2d", images, ours, {"concatenation, as published": published, "concatenation, cached": best})


# ---- maskmm ----------------------------------------------------------------------------------------------------------


def maskmm(photos: Tensor, panel: Any) -> list[Row]:
    """One network of random weights that are never trained, and a learned mask per photo, which makes it paint the photo."""
    small = F.interpolate(photos / 255, size=(48, 72), mode="area")
    torch.manual_seed(0)
    x = waves(*small.shape[2:], count=128)  # [pixels, 256]
    weights = [torch.nn.Linear(a, b, bias=False) for a, b in ((256, 256), (256, 256), (256, 3))]
    for layer in weights:
        torch.nn.init.normal_(layer.weight, std=(4 / layer.in_features) ** 0.5)  # He's, and half of them will be dropped
    bank = [ff.nn.SuperposedLinear.from_linear(layer) for layer in weights]

    painted = []
    for photo in small:
        network = learn_masks(weights, x, photo.flatten(1).T)
        with torch.no_grad():
            painted.append(network(x))
        for layer, learned in zip(bank, network[::2], strict=True):
            layer.add_task(learned.make_mask())
    with torch.no_grad():
        for task, alone in enumerate(painted):
            if not torch.equal(through(bank, x, task), alone):
                sys.exit("a mask among others gives another result than alone")
        first, second, third = weights
        maskless = third(second(first(x).relu()).relu())
    count = sum(layer.weight.numel() for layer in bank)
    bits = sum(layer.mask_bits[0].numel() for layer in bank)
    print(f"  {len(small)} masks over {count} frozen weights each paint their photo, with the same bits as alone;")
    print(f"  a mask takes {bits / 1024:.3g} KiB, as a float mask {4 * count / 1024:.3g}")
    draw_maskmm(panel, small, maskless, painted, bank[1])
    return time_maskmm(photos)


def waves(height: int, width: int, count: int) -> Tensor:
    """[height * width, 2 * count]: sines and cosines of every pixel's place, of random frequencies."""
    places = torch.cartesian_prod(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width))
    phases = places @ (5 * torch.randn(2, count))
    return torch.cat([phases.sin(), phases.cos()], 1)


def learn_masks(weights: list[torch.nn.Linear], x: Tensor, target: Tensor, steps: int = 100) -> torch.nn.Sequential:
    """The network of these weights, half of them kept: those that paint the target [pixels, 3]."""
    first, second, third = (ff.nn.SupermaskLinear.from_linear(layer, sampler="topk", density=0.5) for layer in weights)
    network = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), third)
    optimiser = torch.optim.Adam([layer.scores for layer in (first, second, third)], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        some = torch.randint(len(x), (384,))
        optimiser.zero_grad()
        F.mse_loss(network(x[some]), target[some]).backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def through(bank: list[Any], x: Tensor, task: int) -> Tensor:
    """The network of one task."""
    first, second, third = bank
    result: Tensor = third(second(first(x, task).relu(), task).relu(), task)
    return result


def draw_maskmm(panel: Any, small: Tensor, maskless: Tensor, painted: list[Tensor], layer: Any) -> None:
    """Each photo, what the weights paint by themselves and under its mask, and a part of the mask."""
    axes = panel.subplots(len(small), 4)
    for task, (line, target) in enumerate(zip(axes, small, strict=True)):
        alone, without = (image.T.reshape(target.shape) for image in (painted[task], maskless))
        error = (alone - target).square().mean().sqrt().item()
        bits = ff.unpack_mask(layer.mask_bits[task], layer.in_features)[:48, :72]
        columns = {
            f"{target.shape[1]} x {target.shape[2]} pixels": target,
            "random weights, no mask": without,
            f"the same weights, half of them kept by mask {task}: error {error:.2f}": alone,
            f"a part of mask {task}": bits.expand(3, -1, -1).float(),
        }
        for ax, (name, image) in zip(line, columns.items(), strict=True):
            ax.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set_title(name)
            ax.set_axis_off()


def time_maskmm(photos: Tensor) -> list[Row]:
    """A training step of a supermask layer on the photos' gray tiles, and a pruned layer, beside what people write."""
    torch.manual_seed(0)
    b, _, height, width = photos.shape
    h, w = height // 32, width // 32
    gray = photos[:, :, : h * 32, : w * 32].mean(1) / 255 - 0.5
    tiles = gray.view(b, h, 32, w, 32).permute(0, 1, 3, 2, 4).reshape(-1, 1024)
    weight, scores = torch.randn(1024, 1024) / 32, torch.randn(1024, 1024, requires_grad=True)
    density = 0.1
    dropped = int((1 - density) * scores.numel())

    def step(y: Tensor) -> Tensor:
        return torch.autograd.grad(y, scores, y.detach())[0]  # that of the sum of squares, halved

    def popup(mask: Tensor) -> Tensor:
        magnitude = scores.abs()
        return step(F.linear(tiles, weight * (mask + (magnitude - magnitude.detach()))))

    def sorting() -> Tensor:
        order = scores.detach().abs().flatten().argsort()
        return popup(torch.zeros(scores.numel()).index_fill_(0, order[dropped:], 1).view_as(scores))

    def selecting() -> Tensor:
        magnitude = scores.detach().abs()
        return popup((magnitude > magnitude.flatten().kthvalue(dropped).values).float())

    def ours() -> Tensor:
        return step(ff.supermask_linear(tiles, weight, scores, sampler="topk", density=density))

    few = tiles[:8]
    mask = ff.unpack_mask(ff.topk_mask(scores, density), 1024)
    pruned, floats = weight * mask, mask.float()
    sparse = ff.compress(weight, mask, batch_hint=len(few))
    mib, dense = (size / 2**20 for size in (sparse.nbytes, weight.nbytes))
    print(f"  compress keeps {density:.0%} of a layer as {sparse.format!r}: {mib:.2g} of {dense:.2g} MiB")
    return [
        *compare("supermask_linear, trained", tiles, ours, {"sort": sorting, "kthvalue": selecting}, 1024 + len(tiles)),
        *compare(
            "sparse_linear",
            few,
            lambda: ff.sparse_linear(few, sparse),
            {
                "linear(x, W * mask)": lambda: F.linear(few, weight * floats),
                "linear(x, W), zeros in W": lambda: F.linear(few, pruned),
            },
            1024,
        ),
    ]


# ---- cca -------------------------------------------------------------------------------------------------------------


def cca(photos: Tensor, panel: Any) -> list[Row]:
    """Two networks learn to clean noisy crops of the photos, from different starts: which layers come to say the same."""
    torch.manual_seed(0)
    crops = corners(photos / 255 - 0.5, count=64, size=32)
    noisy = crops + 0.2 * torch.randn_like(crops)
    one, two = cleaner(), cleaner()
    before = ff.compare(one, two, noisy.split(16), layers="layer*", progress=False)
    for network in (one, two):
        learn_to_clean(network, noisy, crops)
    after = ff.compare(one, two, noisy.split(16), layers="layer*", progress=False)

    with torch.no_grad():
        x, y = (network[0](noisy).movedim(1, 3).flatten(0, 2) for network in (one, two))  # [samples, 16]
    mixed = y @ torch.randn(16, 16) + torch.randn(16)
    changes = {
        "CCA": (ff.cca(x, mixed).rho - ff.cca(x, y).rho).abs().max(),
        "CKA": (ff.cka(x, mixed) - ff.cka(x, y)).abs(),
    }
    listed = ", ".join(f"{name} by {change:.0e}" for name, change in changes.items())
    print(f"  a random linear map of a layer's neurons changes {listed}")
    layers = len(before.layers_a)
    for method in ("svcca", "cka"):
        means = [result.matrix[method].diagonal().mean() for result in (before, after)]
        print(f"  {method} of the {layers} layers with their counterparts: {means[0]:.2f} untrained, {means[1]:.2f} trained")
    draw_cca(panel, before, after)
    return time_cca(photos)


def corners(photos: Tensor, count: int, size: int) -> Tensor:
    """[count, 3, size, size]: random crops of the photos, by turns."""
    height, width = photos.shape[2:]
    tops, lefts = torch.randint(height - size, (count,)).tolist(), torch.randint(width - size, (count,)).tolist()
    places = enumerate(zip(tops, lefts, strict=True))
    return torch.stack([photos[i % len(photos), :, top : top + size, left : left + size] for i, (top, left) in places])


def cleaner() -> torch.nn.Sequential:
    """Four convolutions with ReLUs, layer1 to layer4, and one that makes an image of them."""
    network = torch.nn.Sequential()
    for i in range(4):
        convolution = torch.nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1)
        network.add_module(f"layer{i + 1}", torch.nn.Sequential(convolution, torch.nn.ReLU()))
    network.add_module("image", torch.nn.Conv2d(16, 3, 3, padding=1))
    return network


def learn_to_clean(network: torch.nn.Module, noisy: Tensor, clean: Tensor, steps: int = 80) -> None:
    """A few steps of Adam."""
    optimiser = torch.optim.Adam(network.parameters(), lr=0.005)
    for _ in range(steps):
        some = torch.randint(len(noisy), (8,))
        optimiser.zero_grad()
        F.mse_loss(network(noisy[some]), clean[some]).backward()
        optimiser.step()


def draw_cca(panel: Any, before: Any, after: Any) -> None:
    """All layers of one network with all of the other, before and after training, by both measures."""
    axes = panel.subplots(1, 4)
    for place, (when, result) in enumerate({"untrained": before, "trained": after}.items()):
        result.plot(axes[2 * place : 2 * place + 2])
        for ax, (method, matrix) in zip(axes[2 * place : 2 * place + 2], result.matrix.items(), strict=True):
            for i, line in enumerate(matrix.tolist()):
                for j, value in enumerate(line):
                    ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
            ax.set(title=f"{method}, {when}", xlabel="second network", ylabel="first network", aspect="equal")
            ax.tick_params(labelsize=10, labelrotation=0)


def time_cca(photos: Tensor) -> list[Row]:
    """CCA of two convolutional layers on crops of the photos, beside what people write: all activations as rows of a matrix."""
    torch.manual_seed(1)
    crops = corners(photos / 255 - 0.5, count=16, size=56)
    with torch.no_grad():
        x, y = (F.conv2d(crops, torch.randn(64, 3, 3, 3) / 5, padding=1).relu() for _ in range(2))

    def ours() -> Tensor:
        stream = ff.StreamingCCA(pairs=[("x", "y")])
        for a, b in zip(x.split(4), y.split(4), strict=True):
            stream.update({"x": a, "y": b})
        return stream.compute("cca").matrix[0, 1]

    def rows(z: Tensor) -> Tensor:
        z = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).double()
        return z - z.mean(0)

    def decomposed() -> Tensor:
        bases = [torch.linalg.qr(rows(z)).Q for z in (x, y)]
        return torch.linalg.svdvals(bases[0].T @ bases[1]).mean()

    def covariance() -> Tensor:
        a, b = (rows(z).numpy() for z in (x, y))
        roots = []
        for z in (a, b):
            values, vectors = np.linalg.eigh(z.T @ z)
            roots.append(vectors / np.sqrt(values))
        return torch.tensor(np.linalg.svd(roots[0].T @ (a.T @ b) @ roots[1], compute_uv=False).mean())

    return compare("StreamingCCA, cca", x, ours, {"permute + numpy eigh, svd": covariance, "permute + QR, svdvals": decomposed})


SECTIONS = [blockdct, coordconv, maskmm, cca]  # one per family: prints what it finds, draws its panel, gives its rows


def main() -> None:
    """Runs the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("fourfold_demo.png"), help="where the picture goes")
    output = parser.parse_args().output

    threads = torch.get_num_threads()
    print(f"fourfold {ff.__version__}, {ff.cpu_capability()} kernels, torch {torch.__version__}, {threads} threads")
    set_allocation_state("heap")
    photos = torch.stack([torch.tensor(image) for image in PHOTOS]).permute(0, 3, 1, 2).float().contiguous()  # [B, 3, H, W]
    figure = Figure(figsize=(18, 5.2 * len(SECTIONS)), layout="constrained")
    panels = figure.subfigures(len(SECTIONS), 1, squeeze=False)[:, 0]
    rows, watch = [], LoadWatch()
    for section, panel in zip(SECTIONS, panels, strict=True):
        print(f"{section.__name__}: {len(photos)} photos of {photos.shape[3]} x {photos.shape[2]}")
        rows += section(photos, panel)
    print()
    print_table(rows)
    print("Medians of rounds in which all take turns; every call allocates its result, in a heap that keeps its pages.")
    for warning in watch.warnings():
        print(f"Not a quiet machine, so don't trust these times: {warning}.")
    figure.savefig(output, dpi=100)
    print(f"picture: {output}")


if __name__ == "__main__":
    main()
