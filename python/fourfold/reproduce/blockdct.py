"""Faster Neural Networks Straight from JPEG (Gueguen et al., NeurIPS 2018)."""

import io
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fourfold as ff

from ._registry import Run, claim, offline, part, step, threads, verdict
from ._timing import Call, medians

SOURCE = "Gueguen et al. 2018, Faster Neural Networks Straight from JPEG"


def matrix(n: int = 8) -> Tensor:
    """The orthonormal DCT-II as its definition has it: float64 [n, n]."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


@claim(
    "blockdct.transform",
    claim="the transform is JPEG's: orthonormal, and undone by its inverse",
    source="definition of the DCT-II",
    criterion="8 x 8 blocks: within 1e-12 of the matrix definition in float64, 1e-5 in float32, of the largest; the inverse "
    "gives back the image and the energy is kept, within the same; every seed",
)
def transform(seed: int, full: bool) -> Run:
    """Images of 64 x 96."""
    image, d = torch.randn(4, 3, 64, 96, dtype=torch.float64), matrix()
    blocks = image.unfold(2, 8, 8).unfold(3, 8, 8)  # [4, 3, 8, 12, 8, 8]
    wanted = (d @ blocks @ d.T).flatten(4)
    errors = {}
    for dtype in (torch.float64, torch.float32):
        x = image.to(dtype)
        ours = ff.block_dct(x, layout="blocks")
        back = ff.block_idct(ours, layout="blocks")
        energy = ours.square().sum() / x.square().sum() - 1
        errors[str(dtype)[6:]] = max(
            ((ours - wanted).abs().max() / wanted.abs().max()).item(), ((back - x).abs().max() / x.abs().max()).item(),
            abs(energy.item()),
        )  # fmt: skip
    found = f"off by at most {errors['float64']:.0e} in float64, {errors['float32']:.0e} in float32"
    return Run(verdict(errors["float64"] <= 1e-12 and errors["float32"] <= 1e-5), found, errors)


@claim(
    "blockdct.codec",
    claim="coefficients come from the middle of the codec: the integers in the file, before any pixel",
    source=SOURCE,
    criterion="a file by Pillow holds coefficients that give its own decoder's gray levels within 1; written anew and read "
    "again they are the same integers, and Pillow decodes the same pixels; every seed",
    partly="integers and pixels are the same, gray levels further off",
    needs=("PIL", "libjpeg"),
)
def codec(seed: int, full: bool) -> Run:
    """A gray image of smooth noise, 120 x 200 pixels, and one in colours."""
    import numpy as np
    from PIL import Image

    noise = F.interpolate(torch.rand(1, 3, 15, 25), size=(120, 200), mode="bicubic", antialias=True).clamp(0, 1)
    picture = (255 * noise[0]).to(torch.uint8)
    largest, same = 0.0, True
    for image in (Image.fromarray(picture[0].numpy()), Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=80)
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(stream.getvalue()))))
        read = ff.jpeg.read(stream.getvalue())
        if len(read.components) == 1:
            values = read.components[0].float()[None, None] * read.qtables[0]
            levels = ff.block_idct(values, layout="blocks", shift=-128.0, size=(120, 200))[0, 0].round().clamp(0, 255)
            largest = (levels - pixels).abs().max().item()
        written = ff.jpeg.write(read)
        again = ff.jpeg.read(written)
        same &= all(torch.equal(one, other) for one, other in zip(read.components, again.components, strict=True))
        same &= torch.equal(torch.from_numpy(np.array(Image.open(io.BytesIO(written)))), pixels)
    found = f"gray levels off by at most {largest:.0f}; written anew: {'the same' if same else 'other'} integers and pixels"
    return Run(verdict(largest <= 1 and same, same), found, {"levels": largest, "same": float(same)})


@claim(
    "blockdct.linear-equivalence",
    claim="a convolution of 8 x 8 pixels and stride 8 is a 1 x 1 convolution of the coefficients",
    source="linearity of the transform",
    criterion="equal within 1e-12 of the largest output (float64), its weight transformed as the pixels are; every seed",
)
def linear_equivalence(seed: int, full: bool) -> Run:
    """RGB in, 32 channels out."""
    x, weight = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.randn(32, 3, 8, 8, dtype=torch.float64)
    on_pixels = F.conv2d(x, weight, stride=8)
    on_coefficients = F.conv2d(ff.block_dct(x), ff.block_dct(weight))
    apart = ((on_pixels - on_coefficients).abs().max() / on_pixels.abs().max()).item()
    return Run(verdict(apart <= 1e-12), f"apart by at most {apart:.0e}", {"apart": apart})


# ---- speed -----------------------------------------------------------------------------------------------------------


def _ratio(ours: Call, theirs: Call, laps: int) -> tuple[float, float, float]:
    """How many times as fast ours is, and the seconds of both."""
    mine, other = medians((ours, theirs), laps)
    return other / mine, mine, other


VARIANT = "late_concat_rfa_thinner"


def _networks() -> tuple[nn.Module, nn.Module]:
    """On coefficients, and ResNet-50 with its strides as in the paper; random weights, channels_last."""
    ours, theirs = ff.models.dct_resnet50(VARIANT), ff.models.resnet50(stride_in_1x1=True)
    return tuple(net.to(memory_format=torch.channels_last) for net in (ours, theirs))  # type: ignore[call-overload]


@claim(
    "blockdct.1.77x",
    claim="1.77 times as fast as ResNet-50 (LC-RFA-Thinner)",
    source=f"{SOURCE}; an independent implementation measured 1.20 times",
    criterion="reproduced from 1.77 on, partly from 1.20 on: random weights, 224 x 224, the network alone on this CPU, "
    "inference at batch 8 in float32, channels_last; other batches, training and bfloat16 are reported",
    seeded=False,
)
def speed(seed: int, full: bool) -> Run:
    """Both networks have about as many multiply-adds."""
    ours, theirs = _networks()
    ratios = {}
    cases = [("inference", 8, torch.float32), ("inference", 1, torch.float32), ("training", 8, torch.float32)]
    if full:
        cases += [("inference", 32, torch.float32), ("training", 32, torch.float32)]
        cases += [(what, batch, torch.bfloat16) for what in ("inference", "training") for batch in (8, 32)]
    for i, (what, batch, dtype) in enumerate(cases):
        step(i / len(cases))
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        rgb, y, cbcr = (
            torch.randn(batch, *shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for shape in ((3, 224, 224), (64, 28, 28), (128, 14, 14))
        )
        training = what == "training"
        ours.train(training)
        theirs.train(training)

        def forward(net: nn.Module, *x: Tensor, training: bool = training) -> None:
            with torch.set_grad_enabled(training):
                out = net(*x)
            if training:
                out.sum().backward()
                net.zero_grad()

        name = f"{what} {batch}" + (" bfloat16" if dtype == torch.bfloat16 else "")
        laps = 3 if not full else 11 if batch <= 8 else 5
        ratios[name], *_ = _ratio(partial(forward, ours, y, cbcr), partial(forward, theirs, rgb), laps)
    ratio = ratios["inference 8"]
    said = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items() if name != "inference 8")
    found = f"{ratio:.2f} times as fast at batch 8; {said}; {threads()}"
    return Run(verdict(ratio >= 1.77, ratio >= 1.2), found, ratios)


def _files(count: int) -> list[bytes]:
    """224 x 224 pixels of smooth noise with some grain; quality 90, 4:2:0."""
    from PIL import Image

    files = []
    for _ in range(count):
        smooth = F.interpolate(torch.rand(1, 3, 28, 28), size=(224, 224), mode="bicubic")
        picture = (255 * (smooth[0] + 0.03 * torch.randn(3, 224, 224)).clamp(0, 1)).to(torch.uint8)
        stream = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(stream, "JPEG", quality=90, subsampling="4:2:0")
        files.append(stream.getvalue())
    return files


def _coefficients(file: bytes, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of Y, Cb and Cr: [64, h, w], normalised."""
    read = ff.jpeg.read(file)
    return [ff.dct_normalize(plane, table, dtype=dtype) for plane, table in zip(read.components, read.qtables, strict=True)]


def _normalised(image: Any, dtype: torch.dtype) -> Tensor:
    """The network's input of an array [224, 224, 3]."""
    return torch.from_numpy(image).permute(2, 0, 1).to(dtype).sub_(127).div_(64)


def _pixels(file: bytes, dtype: torch.dtype = torch.float32) -> Tensor:
    """By Pillow: [3, 224, 224], normalised."""
    import numpy as np
    from PIL import Image

    return _normalised(np.array(Image.open(io.BytesIO(file)).convert("RGB")), dtype)


def _pixels_by_simplejpeg(file: bytes) -> Tensor:
    """The same, by libjpeg-turbo without Pillow's work around it."""
    import simplejpeg

    return _normalised(simplejpeg.decode_jpeg(file), torch.float32)


@claim(
    "blockdct.pipeline",
    claim="reading coefficients instead of pixels saves the decoder's work",
    source=SOURCE,
    criterion="files of 224 x 224 pixels to the input of the network: reading coefficients and normalising them takes less "
    "time than decoding to a normalised float tensor does with the faster one of simplejpeg and Pillow",
    partly="less than with the slower one",
    seeded=False,
    needs=("PIL", "simplejpeg", "libjpeg"),
)
def pipeline(seed: int, full: bool) -> Run:
    """16 files, one after another."""
    files = _files(16)

    def all_of(read: Callable[[bytes], object]) -> None:
        for file in files:
            read(file)

    readers = (_coefficients, _pixels_by_simplejpeg, _pixels)
    mine, *others = medians([partial(all_of, read) for read in readers], 31 if full else 15)
    ratios = {name: other / mine for name, other in zip(("simplejpeg", "Pillow"), others, strict=True)}
    said = ", ".join(
        f"{name} {1e3 * other / 16:.2f} ms ({ratios[name]:.2f} times)" for name, other in zip(ratios, others, strict=True)
    )
    found = f"{1e3 * mine / 16:.2f} ms an image, {said}: {min(ratios.values()):.2f} times as fast as the faster; {threads()}"
    return Run(verdict(min(ratios.values()) > 1, max(ratios.values()) > 1), found, ratios)


@claim(
    "blockdct.file-to-scores",
    claim="1.77 times as fast as ResNet-50, decoding included",
    source=f"{SOURCE}, which has the coefficients from the middle of the decoder",
    criterion="reproduced from 1.77 on, partly from 1.20 on: files of 224 x 224 pixels to class scores, 8 at a time, in "
    "float32; Pillow decodes for ResNet-50; bfloat16 is reported",
    seeded=False,
    needs=("PIL", "libjpeg"),
)
def file_to_scores(seed: int, full: bool) -> Run:
    """The networks of blockdct.1.77x and the readers of blockdct.pipeline."""
    files = _files(8)
    ours, theirs = (net.eval() for net in _networks())
    ratios = {}

    @torch.no_grad()
    def by_coefficients(dtype: torch.dtype) -> None:
        planes = [_coefficients(file, dtype) for file in files]
        y = torch.stack([one[0] for one in planes]).contiguous(memory_format=torch.channels_last)
        cbcr = torch.stack([torch.cat(one[1:]) for one in planes]).contiguous(memory_format=torch.channels_last)
        ours(y, cbcr)

    @torch.no_grad()
    def by_pixels(dtype: torch.dtype) -> None:
        theirs(torch.stack([_pixels(file, dtype) for file in files]).contiguous(memory_format=torch.channels_last))

    for i, dtype in enumerate((torch.float32, torch.bfloat16) if full else (torch.float32,)):
        step(i / 2)
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        ratios[str(dtype)[6:]], *_ = _ratio(partial(by_coefficients, dtype), partial(by_pixels, dtype), 11 if full else 3)
    ratio = ratios["float32"]
    said = f"; {ratios['bfloat16']:.2f} in bfloat16" if full else ""
    return Run(verdict(ratio >= 1.77, ratio >= 1.2), f"{ratio:.2f} times as fast{said}; {threads()}", ratios)


# ---- learning --------------------------------------------------------------------------------------------------------


@claim(
    "blockdct.digits",
    claim="a linear classifier learns from coefficients what it learns from pixels",
    source="the transform is a rotation",
    criterion="digits, one block each: the classifiers agree on at least 99.5% of the test digits, and in accuracy within "
    "half a point; every seed",
    partly="in accuracy within half a point, but agreed on fewer",
    needs=("sklearn",),
)
def digits(seed: int, full: bool) -> Run:
    """Logistic regression by gradient descent, from zero, on batches of one order."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    seen, tested = train_test_split(range(len(images)), test_size=0.3, random_state=seed, stratify=data.target)
    said, right = {}, {}
    for name, x in (("pixels", images.flatten(1)), ("coefficients", ff.block_dct(images).flatten(1))):
        torch.manual_seed(seed)
        net = nn.Linear(64, 10)
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for _ in range(30):
            for some in torch.tensor(seen)[torch.randperm(len(seen))].split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[some]), labels[some]).backward()
                optimizer.step()
        said[name] = net(x[tested]).argmax(1)
        right[name] = (said[name] == labels[tested]).float().mean().item()
    agreed = (said["pixels"] == said["coefficients"]).float().mean().item()
    found = f"pixels {right['pixels']:.1%}, coefficients {right['coefficients']:.1%}; agreed on {agreed:.1%}"
    close = abs(right["pixels"] - right["coefficients"]) <= 0.005
    return Run(verdict(agreed >= 0.995 and close, close), found, right | {"agreed": agreed})


def textures(count: int, classes: int, noise: float) -> tuple[Tensor, Tensor]:
    """Gratings of an angle and a wavelength per class, in any phase and two random colours: [count, 3, 64, 64] in 0..255."""
    labels = torch.randint(classes, (count,))
    angle, wave = (labels % 6) * (math.pi / 6), 5.0 + 3.0 * (labels // 6)
    axis = torch.arange(64.0)
    along = angle.cos()[:, None, None] * axis[:, None] + angle.sin()[:, None, None] * axis
    phase = 2 * math.pi * torch.rand(count, 1, 1)
    share = 0.5 + 0.5 * torch.sin(2 * math.pi * along / wave[:, None, None] + phase)
    one, other = 255 * torch.rand(2, count, 3, 1, 1)
    image = one + share[:, None] * (other - one) + noise * torch.randn(count, 3, 64, 64)
    return image.round().clamp(0, 255), labels


class _Stem(nn.Module):
    """64 channels per block of 8 x 8 pixels, of RGB or of coefficients, then layers that are the same."""

    def __init__(self, of_coefficients: bool, classes: int) -> None:
        super().__init__()
        self.of_coefficients = of_coefficients
        self.norm = nn.BatchNorm2d(192 if of_coefficients else 3, affine=False)
        self.stem = nn.Conv2d(192, 64, 1) if of_coefficients else nn.Conv2d(3, 64, 8, stride=8)
        self.rest = nn.Sequential(
            nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """RGB [n, 3, 64, 64] in 0..255; coefficients are made here, chroma at half the size."""
        if self.of_coefficients:
            y, cbcr = ff.rgb_to_dct(x)
            x = torch.cat([y, F.interpolate(cbcr, scale_factor=2.0)], 1)
        return self.rest(self.stem(self.norm(x)))


def _textured(runs: list[Run]) -> tuple[str, str]:
    rgb, dct = (statistics.mean(run.figures[key] for run in runs) for key in ("rgb", "coefficients"))
    found = f"RGB {rgb:.1%} of 12,288 numbers an image, coefficients {dct:.1%} of 6,144"
    return verdict(dct >= rgb - 0.01, dct >= rgb - 0.05), found


@claim(
    "blockdct.textures",
    claim="a stem on 4:2:0 coefficients does as well as one on RGB, with half as many numbers in",
    source=f"{SOURCE}, where it is ImageNet",
    criterion="synthetic textures of 18 classes in noise: at most 1 point below the RGB stem of as many weights; means of "
    "all seeds",
    partly="at most 5 points below",
    over_seeds=_textured,
)
def texture(seed: int, full: bool) -> Run:
    """Gratings of 64 x 64 pixels, drawn anew for each step."""
    figures = {}
    for i, name in enumerate(("rgb", "coefficients")):
        tell = part(i, 2)
        torch.manual_seed(seed)
        net = _Stem(name == "coefficients", 18)
        steps = 600 if full else 250
        optimizer = torch.optim.Adam(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
        torch.manual_seed(seed + 1000)
        for k in range(steps):
            tell(k / steps)
            images, labels = textures(64, 18, 60.0)
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            schedule.step()
        torch.manual_seed(seed + 2000)
        images, labels = textures(1000, 18, 60.0)
        with torch.no_grad():
            figures[name] = (net.eval()(images).argmax(1) == labels).float().mean().item()
    run = Run("", "", figures)
    run.verdict, run.found = _textured([run])
    return run


offline(
    "blockdct.imagenet",
    claim="ImageNet top-5 as of ResNet-50 or better: 92.65 for ResNet-50, 92.81 for LC-RFA, 92.57 for LC-RFA-Thinner",
    source=SOURCE,
    why="needs ImageNet, and months of processors",
)
offline(
    "blockdct.1.77x-gpu",
    claim="1.77 times as fast on the paper's GPU",
    source=SOURCE,
    why="needs that GPU and its software; blockdct.1.77x measures the ratio here",
)
