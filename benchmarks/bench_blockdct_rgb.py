"""rgb_to_dct and dct_to_rgb against the plain-torch ways to the same result.

Colour, box filter and transform of rgb_to_dct are linear, so its strongest eager rival is two convolutions with everything
folded into their filters, made beforehand; what it needs on each call is the images in floating point.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import fourfold as ff
import torch
import torch.nn.functional as F
from fourfold.reference import blockdct_rgb as reference
from torch import Tensor

from . import cases as shapes
from .bench_blockdct import compiled, cosines
from .harness import Call, Case, Contestant, Settings, Tolerance, in_fresh_memory, with_backward

FAMILY = "blockdct"
# Coefficients reach 1024, and are sums of up to 768 products of a level and a weight.
FLOAT32 = Tolerance(4e-3, 1e-5)
BFLOAT16 = Tolerance(4e-3, 2**-8)
BFLOAT16_FILTERS = Tolerance(8.0, 2**-6)  # luma's mean before its level shift is up to 2040, and its filter is rounded
LEVELS = Tolerance(2e-3, 1e-5)  # of pixels, 0..255

Pair = tuple[Tensor, Tensor]


def colours() -> Tensor:
    """[3, 3]: Y, Cb and Cr of R, G and B, full-range BT.601."""
    red, green, blue = reference.LUMA
    luma = torch.tensor([red, green, blue], dtype=torch.float64)
    chroma = torch.eye(3, dtype=torch.float64)[[2, 0]] - luma  # B - Y, R - Y
    return torch.stack([luma, chroma[0] / (2 - 2 * blue), chroma[1] / (2 - 2 * red)])


# --- rgb_to_dct -----------------------------------------------------------------------------------------------------------


class Images:
    """RGB images, with the filters that every contestant may prepare."""

    def __init__(
        self,
        size: tuple[int, ...],
        subsampling: str,
        channels_last: bool,
        kind: torch.dtype,
        options: dict[str, object],
        device: torch.device,
    ) -> None:
        self.options = {"subsampling": subsampling, "layout": "planar", "freqs": None, "dtype": torch.float32} | options
        self.cell = reference.SUBSAMPLINGS[subsampling]
        levels = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        self.rgb = levels.to(device, kind).contiguous(memory_format=_memory_format(channels_last))
        (v, h), (height, width) = self.cell, size[2:]
        self.grids = [(-(-height // 8), -(-width // 8)), (-(-height // (8 * v)), -(-width // (8 * h)))]
        self.pads = (-width % (8 * h), -height % (8 * v))
        d = cosines(8)
        self.d = d.to(device, torch.float32)
        self.colours = colours().to(device, torch.float32)
        kept = self.options["freqs"] or range(64)
        basis = torch.einsum("ui,vj->uvij", d, d).reshape(64, 8, 8)[list(kept)]
        cells = basis.repeat_interleave(v, 1).repeat_interleave(h, 2) / (v * h)
        luma = torch.einsum("fij,c->fcij", basis, colours()[0])
        chroma = torch.einsum("fij,kc->kfcij", cells, colours()[1:]).flatten(0, 1)
        shift = torch.tensor([-1024.0 if f == 0 else 0.0 for f in kept])
        self.luma, self.chroma, self.shift = (t.to(device, torch.float32) for t in (luma, chroma, shift))

    def floats(self, memory_format: torch.memory_format, dtype: torch.dtype = torch.float32) -> Tensor:
        """The images in floating point and in whole cells; inside the clock."""
        x = self.rgb.to(dtype, memory_format=memory_format)
        right, below = self.pads
        return F.pad(x, (0, right, 0, below), mode="replicate") if right or below else x

    def cropped(self, y: Tensor, cbcr: Tensor) -> Pair:
        """Without blocks that only the other component's grid has."""
        y, cbcr = (t[..., :rows, :columns] for t, (rows, columns) in zip((y, cbcr), self.grids, strict=True))
        if self.options["layout"] == "blocks":
            return y.permute(0, 2, 3, 1)[:, None], cbcr.unflatten(1, (2, -1)).permute(0, 1, 3, 4, 2)
        return y, cbcr


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def to_dct(p: Images, state: str) -> Call:
    return functools.partial(ff.rgb_to_dct, p.rgb, **p.options)


def to_dct_float32(p: Images, state: str) -> Call:
    return functools.partial(ff.rgb_to_dct, p.rgb, **p.options | {"dtype": torch.float32})


def two_convolutions(channels_last: bool, dtype: torch.dtype = torch.float32) -> Callable[[Images, str], Call]:
    """Results stay in the memory order in which the convolutions give them."""
    memory_format = _memory_format(channels_last)

    def make(p: Images, state: str) -> Call:
        v, h = p.cell
        luma, chroma = (w.to(dtype).contiguous(memory_format=memory_format) for w in (p.luma, p.chroma))
        shift = p.shift.to(dtype)

        def call() -> Pair:
            x = p.floats(memory_format, dtype)
            return p.cropped(F.conv2d(x, luma, shift, stride=8), F.conv2d(x, chroma, stride=(8 * v, 8 * h)))

        return call

    return make


def two_passes(x: Tensor, d: Tensor) -> Tensor:
    """The 8 x 8 DCT of [B, C, H, W], planar: rows by one GEMM, columns by a batched one, then a permuting copy."""
    b, c, height, width = x.shape
    strips = b * c * height // 8
    z = torch.mm(x.reshape(-1, 8), d.T).view(strips, 8, width)
    z = torch.bmm(d.expand(strips, 8, 8), z)
    return z.view(b, c, height // 8, 8, width // 8, 8).permute(0, 1, 3, 5, 2, 4).reshape(b, 64 * c, height // 8, width // 8)


def gemms(p: Images, state: str) -> Call:
    """Colour by a matmul, chroma by avg_pool2d, the transform by two GEMMs."""

    def call() -> Pair:
        x = p.floats(torch.contiguous_format)
        ycc = torch.matmul(p.colours, x.flatten(2)).view(x.shape)
        y = two_passes(ycc[:, :1], p.d)
        y[:, 0] -= 1024
        return p.cropped(y, two_passes(F.avg_pool2d(ycc[:, 1:], p.cell), p.d))

    return call


def _coefficients(p: Images) -> Pair:
    """In float64, image by image."""
    given = (p.options["subsampling"], p.options["layout"], p.options["freqs"], None, torch.float64)
    parts = [reference.rgb_to_dct(image, *given) for image in p.rgb.split(1)]
    y, cbcr = (torch.cat(part) for part in zip(*parts, strict=True))
    return y, cbcr


def _to_dct(
    settings: Settings,
    shape: shapes.Shape,
    *,
    subsampling: str = "4:2:0",
    channels_last: bool = False,
    kind: torch.dtype = torch.uint8,
    compile_too: bool = False,
    quick: bool = False,
    **options: object,
) -> Case:
    b, _, height, width = shape.size
    narrow = options.get("dtype") == torch.bfloat16
    rivals = [
        Contestant("two convolutions", two_convolutions(False)),
        Contestant("two convolutions, channels_last", two_convolutions(True)),
    ]
    if narrow:
        rivals = [
            Contestant("fourfold in float32", to_dct_float32, FLOAT32),
            Contestant("two convolutions", two_convolutions(False, torch.bfloat16), BFLOAT16_FILTERS),
            Contestant("two convolutions, channels_last", two_convolutions(True, torch.bfloat16), BFLOAT16_FILTERS),
        ]
    elif options.get("freqs") is None:  # where few are wanted, the separable form is no rival: it computes all
        rivals.append(Contestant("GEMMs", gemms))
    if compile_too and settings.compiles:
        rivals += [Contestant(f"{rival.name}, compiled", compiled(rival.make)) for rival in rivals]
    v, h = reference.SUBSAMPLINGS[subsampling]
    f = len(options.get("freqs") or range(64))
    blocks = b * (-(-height // 8) * -(-width // 8) + 2 * -(-height // (8 * v)) * -(-width // (8 * h)))
    pixels = b * height * width
    itemsize = 2 if narrow else 4
    words = [
        "channels_last" if channels_last else "contiguous",
        str(shape),
        str(kind).removeprefix("torch."),
        subsampling,
        *(["blocks"] if options.get("layout") == "blocks" else []),
        *(["to bfloat16"] if narrow else []),
        *([f"first {f} zigzag frequencies"] if f < 64 else []),
    ]
    return Case(
        family=FAMILY,
        op="rgb_to_dct",
        label=" ".join(words),
        problem=functools.partial(Images, shape.size, subsampling, channels_last, kind, options),
        reference=_coefficients,
        ours=Contestant("fourfold", to_dct),
        rivals=tuple(rivals),
        tolerance=BFLOAT16 if narrow else FLOAT32,
        state="heap",
        bytes=3 * pixels * kind.itemsize + blocks * f * itemsize,
        flops=18 * pixels + blocks * 4 * 8**3,
        handles=(pixels, "pixels"),
        source=shape.source,
        quick=quick,
    )


def with_gradient_of_rgb(p: Images) -> list[Tensor]:
    given = (p.options["subsampling"], p.options["layout"], p.options["freqs"], None, torch.float64)
    rgb = p.rgb.detach().double().requires_grad_()
    results = reference.rgb_to_dct(rgb, *given)
    return [*(t.detach() for t in results), *torch.autograd.grad(results, [rgb], [g.double() for g in p.grads])]


class TrainedImages(Images):
    """Float images that a network before this one gives."""

    def __init__(self, size: tuple[int, ...], device: torch.device) -> None:
        super().__init__(size, "4:2:0", False, torch.float32, {}, device)
        self.rgb.requires_grad_()
        generator = torch.Generator().manual_seed(1)
        counts = zip((64, 128), self.grids, strict=True)
        self.grads = [torch.randn(size[0], f, *grid, generator=generator).to(device) for f, grid in counts]

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [*self.grads, *(value for value in vars(self).values() if isinstance(value, Tensor))]


def of_rgb(make: Callable[[Images, str], Call]) -> Callable[[TrainedImages, str], Call]:
    return lambda p, state: with_backward(make(p, state), [p.rgb], p.grads)


def _to_dct_training(settings: Settings, shape: shapes.Shape) -> Case:
    case = _to_dct(settings, shape, kind=torch.float32, compile_too=True)
    return dataclasses.replace(
        case,
        label=f"{case.label}, forward and backward",
        problem=functools.partial(TrainedImages, shape.size),
        reference=with_gradient_of_rgb,
        ours=Contestant("fourfold", of_rgb(to_dct)),
        rivals=tuple(Contestant(rival.name, of_rgb(rival.make)) for rival in case.rivals),
        held=TrainedImages.tensors,
        bytes=2 * case.bytes,
        flops=2 * case.flops,
    )


def _forward(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for shape in _random_images(settings):
            for channels_last in (False, True):
                yield _to_dct(settings, shape, channels_last=channels_last, quick=True)
        return
    for shape in shapes.PIXELS:
        for channels_last in (False, True):
            quick = shape is shapes.CLASSIFIER
            yield _to_dct(settings, shape, channels_last=channels_last, compile_too=True, quick=quick)
    make = functools.partial(_to_dct, settings, shapes.CLASSIFIER)
    yield make(subsampling="4:4:4")
    yield make(subsampling="4:2:2")
    yield make(kind=torch.float32)
    yield make(layout="blocks")
    yield make(dtype=torch.bfloat16)
    yield make(freqs=tuple(ff.zigzag(8)[:24].tolist()))
    yield _to_dct(settings, shapes.RAGGED)
    yield _to_dct_training(settings, shapes.CLASSIFIER)
    yield in_fresh_memory(_to_dct(settings, shapes.RETEST))


def _random_images(settings: Settings) -> Iterator[shapes.Shape]:
    """RGB ones."""
    for shape in shapes.random_images(settings.seed):
        b, _, height, width = shape.size
        yield shapes.Shape((b, 3, height, width), shape.source)


# --- dct_to_rgb -----------------------------------------------------------------------------------------------------------


class Coefficients:
    """Those of RGB images, 4:2:0, with the filters that every contestant may prepare."""

    def __init__(self, size: tuple[int, ...], device: torch.device) -> None:
        self.size = size[2:]
        levels = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(0), dtype=torch.uint8).to(device)
        self.y, self.cbcr = reference.rgb_to_dct(levels, "4:2:0", "planar", None, None, torch.float32)
        d = cosines(8)
        back = torch.linalg.inv(colours())  # [RGB, YCbCr]
        basis = torch.einsum("ui,vj->uvij", d, d).reshape(64, 8, 8)
        cells = basis.repeat_interleave(2, 1).repeat_interleave(2, 2)
        luma = torch.einsum("fij,c->fcij", basis, back[:, 0])
        chroma = torch.einsum("fij,ck->kfcij", cells, back[:, 1:]).flatten(0, 1)
        self.d, self.back, self.luma, self.chroma = (t.to(device, torch.float32) for t in (d, back, luma, chroma))
        self.shift = torch.full((3,), 128.0, device=device)

    def cropped(self, image: Tensor) -> Tensor:
        height, width = self.size
        return image[..., :height, :width]


def to_rgb(p: Coefficients, state: str) -> Call:
    return functools.partial(ff.dct_to_rgb, p.y, p.cbcr, size=p.size)


def two_transposed_convolutions(p: Coefficients, state: str) -> Call:
    """The filters of the two convolutions, transposed: inverse DCT, upsampling and colour at once."""

    def call() -> Tensor:
        luma = p.cropped(F.conv_transpose2d(p.y, p.luma, p.shift, stride=8))
        return luma + p.cropped(F.conv_transpose2d(p.cbcr, p.chroma, stride=16))

    return call


def _to_colours(p: Coefficients, luma: Tensor, chroma: Tensor) -> Tensor:
    """RGB of Y [B, 1, H, W] and of Cb, Cr [B, 2, H/2, W/2]."""
    chroma = p.cropped(chroma.repeat_interleave(2, 2).repeat_interleave(2, 3))
    ycc = torch.cat([p.cropped(luma) + 128, chroma], 1)
    return torch.matmul(p.back, ycc.flatten(2)).view(ycc.shape)


def two_passes_back(coefs: Tensor, d: Tensor) -> Tensor:
    """The inverse of two_passes."""
    b, channels, h, w = coefs.shape
    c, strips = channels // 64, b * channels // 64 * h
    z = coefs.view(b, c, 8, 8, h, w).permute(0, 1, 4, 2, 5, 3).reshape(strips, 8, 8 * w)
    z = torch.bmm(d.T.expand(strips, 8, 8), z)
    return torch.mm(z.view(-1, 8), d).view(b, c, 8 * h, 8 * w)


def gemms_back(p: Coefficients, state: str) -> Call:
    """The transform by two GEMMs, colour by a matmul."""
    return lambda: _to_colours(p, two_passes_back(p.y, p.d), two_passes_back(p.cbcr, p.d))


def einsum_back(p: Coefficients, state: str) -> Call:
    def image(coefs: Tensor) -> Tensor:
        b, channels, h, w = coefs.shape
        cells = coefs.view(b, channels // 64, 8, 8, h, w)
        return torch.einsum("ui,bcuvhw,vj->bchiwj", p.d, cells, p.d).reshape(b, channels // 64, 8 * h, 8 * w)

    return lambda: _to_colours(p, image(p.y), image(p.cbcr))


def _rgb(p: Coefficients) -> Tensor:
    return reference.dct_to_rgb(p.y.double(), p.cbcr.double(), "4:2:0", p.size)


def _to_rgb(settings: Settings, shape: shapes.Shape, **flags: bool) -> Case:
    rivals = [Contestant("two transposed convolutions", two_transposed_convolutions), Contestant("GEMMs", gemms_back)]
    if not settings.quick:
        rivals.append(Contestant("einsum", einsum_back))
    if settings.compiles and not settings.random_shapes:
        rivals += [Contestant(f"{rival.name}, compiled", compiled(rival.make)) for rival in rivals[1:]]
    b, _, height, width = shape.size
    pixels = b * height * width
    blocks = b * (-(-height // 8) * -(-width // 8) + 2 * -(-height // 16) * -(-width // 16))
    return Case(
        family=FAMILY,
        op="dct_to_rgb",
        label=f"{shape} float32 4:2:0",
        problem=functools.partial(Coefficients, shape.size),
        reference=_rgb,
        ours=Contestant("fourfold", to_rgb),
        rivals=tuple(rivals),
        tolerance=LEVELS,
        state="heap",
        bytes=4 * (3 * pixels + 64 * blocks),
        flops=18 * pixels + blocks * 4 * 8**3,
        handles=(pixels, "pixels"),
        source=shape.source,
        **flags,
    )


class TrainedCoefficients(Coefficients):
    """Coefficients that a network gives, with a loss on pixels."""

    def __init__(self, size: tuple[int, ...], device: torch.device) -> None:
        super().__init__(size, device)
        for leaf in (self.y, self.cbcr):
            leaf.requires_grad_()
        self.grad = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device)

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


def _of_coefficients(make: Callable[[Coefficients, str], Call]) -> Callable[[TrainedCoefficients, str], Call]:
    return lambda p, state: with_backward(make(p, state), [p.y, p.cbcr], [p.grad])


def _with_gradient_of_coefficients(p: TrainedCoefficients) -> list[Tensor]:
    y, cbcr = (t.detach().double().requires_grad_() for t in (p.y, p.cbcr))
    image = reference.dct_to_rgb(y, cbcr, "4:2:0", p.size)
    return [image.detach(), *torch.autograd.grad(image, [y, cbcr], [p.grad.double()])]


def _to_rgb_training(settings: Settings, shape: shapes.Shape) -> Case:
    case = _to_rgb(settings, shape)
    return dataclasses.replace(
        case,
        label=f"{case.label}, forward and backward",
        problem=functools.partial(TrainedCoefficients, shape.size),
        reference=_with_gradient_of_coefficients,
        ours=Contestant("fourfold", _of_coefficients(to_rgb)),
        rivals=tuple(Contestant(rival.name, _of_coefficients(rival.make)) for rival in case.rivals),
        held=TrainedCoefficients.tensors,
        bytes=2 * case.bytes,
        flops=2 * case.flops,
    )


def _back(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for shape in _random_images(settings):
            yield _to_rgb(settings, shape, quick=True)
        return
    yield _to_rgb(settings, shapes.CLASSIFIER, quick=True)
    yield _to_rgb(settings, shapes.POWER_OF_TWO)
    yield _to_rgb_training(settings, shapes.CLASSIFIER)
    yield in_fresh_memory(_to_rgb(settings, shapes.POWER_OF_TWO))


# --- call overhead --------------------------------------------------------------------------------------------------------


def _overhead(
    op: str,
    label: str,
    small: Callable[[torch.device], Tensor],
    make: Callable[[Tensor, str], Call],
    exact: Callable[[Tensor], Tensor | Pair],
    goal: float | None = None,
) -> Case:
    return Case(
        family=FAMILY,
        op=op,
        label=label,
        problem=small,
        reference=exact,
        ours=Contestant("fourfold", make),
        rivals=(),
        tolerance=FLOAT32,
        state="heap",
        source="so small that only the call costs",
        quick=True,
        overhead=True,
        overhead_goal=goal,
    )


def _one_image(device: torch.device) -> Tensor:
    return torch.arange(192, dtype=torch.uint8, device=device).view(1, 3, 8, 8)


def _one_block(device: torch.device) -> Tensor:
    return torch.arange(64, dtype=torch.float32, device=device).view(1, 64, 1, 1)


def _overheads() -> Iterator[Case]:
    def coefficients(rgb: Tensor) -> Pair:
        return reference.rgb_to_dct(rgb, "4:2:0", "planar", None, None, torch.float64)

    def image(y: Tensor) -> Tensor:
        return reference.dct_to_rgb(y.double(), torch.cat([y, y], 1).double(), "4:2:0", None)

    def make_image(y: Tensor, state: str) -> Call:
        return functools.partial(ff.dct_to_rgb, y, torch.cat([y, y], 1))

    def make_coefficients(rgb: Tensor, state: str) -> Call:
        return functools.partial(ff.rgb_to_dct, rgb)

    yield _overhead("rgb_to_dct", "uint8 1x3x8x8", _one_image, make_coefficients, coefficients, 10.0)
    yield _overhead("dct_to_rgb", "float32 1x64x1x1", _one_block, make_image, image)


# --- what the harness asks for --------------------------------------------------------------------------------------------


def cases(settings: Settings) -> Iterator[Case]:
    if not settings.random_shapes:
        yield from _overheads()
    yield from _forward(settings)
    yield from _back(settings)


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
