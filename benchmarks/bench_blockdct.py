"""block_dct, block_idct and dct_normalize against the plain-torch ways to the same result.

Every rival is given its best form: filters and matrices are prepared outside the clock, out= is used where an op has it, and a
layout that a convolution or a GEMM can produce directly is never permuted to.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import fourfold as ff
import torch
import torch.nn.functional as F
from fourfold.reference import blockdct as reference
from torch import Tensor

from . import cases as shapes
from .harness import Call, Case, Contestant, Settings, Tolerance, in_fresh_memory, needed, with_backward

FAMILY = "blockdct"
# Data are N(0, 1) and the transforms orthonormal, so results are too, up to |6|.
FLOAT32 = Tolerance(2e-5, 1e-5)
BFLOAT16 = Tolerance(1e-4, 2**-8)  # one rounding of the result is 2^-9 of it
BFLOAT16_WEIGHTS = Tolerance(6e-2, 2**-6)  # the filters are rounded as well, and N(0, 1) sums of 64 such products spread

TO_LAYOUT = {"planar": (0, 1, 3, 5, 2, 4), "blocks": (0, 1, 2, 4, 3, 5), "interleaved": (0, 1, 2, 3, 4, 5)}
FROM_LAYOUT = {"planar": (0, 1, 4, 2, 5, 3), "blocks": (0, 1, 2, 4, 3, 5), "interleaved": (0, 1, 2, 3, 4, 5)}


def cosines(n: int) -> Tensor:
    """Orthonormal DCT-II [n, n], row u is frequency u."""
    k = torch.arange(n, dtype=torch.float64)
    d = torch.cos(torch.outer(k, 2 * k + 1) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    d[0] /= math.sqrt(2)
    return d


@dataclasses.dataclass
class Transform:
    """One problem of block_dct or block_idct, with what every contestant may prepare."""

    image: tuple[int, int, int, int]  # B, C, H, W
    n: int
    layout: str
    freqs: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device
    inverse: bool

    def __post_init__(self) -> None:
        b, c, height, width = self.image
        n, self.h, self.w = self.n, -(-height // self.n), -(-width // self.n)
        self.f = n * n if self.freqs is None else len(self.freqs)
        self.whole = (height, width) == (n * self.h, n * self.w)
        self.coefs = {
            "planar": (b, c * self.f, self.h, self.w),
            "blocks": (b, c, self.h, self.w, self.f),
            "interleaved": (b, c, n * self.h, n * self.w),
        }[self.layout]
        self.result = self.image if self.inverse else self.coefs
        # The cells of the coefficient tensor as they lie in memory: TO_LAYOUT of [B, C, h, N, w, N].
        grid = (b, c, self.h, n, self.w, n)
        self.grid, self.cells = grid, tuple(grid[i] for i in TO_LAYOUT[self.layout])
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(self.coefs if self.inverse else self.image, generator=generator).to(self.device, self.dtype)
        d = cosines(n)
        self.d = d.to(self.device, torch.float32)  # [N, N]
        self.dt = self.d.T.contiguous()
        kron = torch.kron(d, d)[list(self.freqs or range(n * n))]
        self.kron = kron.to(self.device, torch.float32)  # [F, N*N]

    def landing(self, state: str) -> Tensor | None:
        """The out= of a contestant; NaN, so that what it leaves unwritten is seen."""
        return torch.full(self.result, math.nan, dtype=self.dtype, device=self.device) if state == "out" else None

    def buffer(self, state: str, *size: int) -> Tensor | None:
        return torch.empty(size, device=self.device) if state == "out" else None

    def padded(self) -> Tensor:
        """The image in whole blocks; inside the clock."""
        if self.whole:
            return self.x
        (_, _, height, width), n = self.image, self.n
        return F.pad(self.x, (0, n * self.w - width, 0, n * self.h - height), mode="replicate")

    def lay(self, view: Tensor, out: Tensor | None) -> Tensor:
        """`view` in the result's shape: into out, or copied where it is not laid out so already."""
        if out is None:
            return view.reshape(self.result)
        out.view(view.shape).copy_(view)
        return out

    def crop(self, image: Tensor) -> Tensor:
        """The result from an image [.., h*N, w*N] of whole blocks, contiguous as every other result is."""
        b, c, height, width = self.image
        image = image.view(b, c, self.n * self.h, self.n * self.w)
        return image if self.whole else image[..., :height, :width].contiguous()


def lay_image(p: Transform, grid: Tensor, out: Tensor | None) -> Tensor:
    """[B, C, h, N, w, N], in any strides, to the image; a ragged one is cropped on the way."""
    if p.whole:
        return p.lay(grid, out)
    return p.crop(grid.reshape(p.image[0], p.image[1], p.n * p.h, p.n * p.w))


# --- the forward transform ------------------------------------------------------------------------------------------------


def ours(p: Transform, state: str) -> Call:
    out = p.landing(state)
    freqs = None if p.freqs is None else list(p.freqs)
    if p.inverse:
        size = None if p.whole else p.image[2:]
        return functools.partial(ff.block_idct, p.x, p.n, layout=p.layout, freqs=freqs, size=size, out=out)
    return functools.partial(ff.block_dct, p.x, p.n, layout=p.layout, freqs=freqs, out=out)


def ours_float32(p: Transform, state: str) -> Call:
    return ours(_in_float32(p), state)


def _in_float32(p: Transform) -> Transform:
    wide = dataclasses.replace(p, dtype=torch.float32)
    wide.x = p.x.float()
    return wide


def conv2d(p: Transform, state: str) -> Call:
    """N*N (or F) filters, stride N; planar is what it gives."""
    b, c = p.image[:2]
    weight = p.kron.view(p.f, 1, p.n, p.n).to(p.dtype)
    out = None if p.layout == "planar" else p.landing(state)

    def call() -> Tensor:
        x = p.padded()
        y = F.conv2d(x.view(b * c, 1, *x.shape[2:]), weight, stride=p.n)  # [B*C, F, h, w]
        if p.layout == "planar":
            return y.view(p.result)
        if p.layout == "blocks":
            return p.lay(y.view(b, c, p.f, p.h, p.w).permute(0, 1, 3, 4, 2), out)
        return p.lay(y.view(b, c, p.n, p.n, p.h, p.w).permute(0, 1, 4, 2, 5, 3), out)

    return call


def _as_channels_last(x: Tensor) -> Tensor:
    """One-channel planes [P, 1, H, W] marked channels_last: the same memory, but a convolution then answers in [P, H, W, F]."""
    height, width = x.shape[2:]
    return x.as_strided(x.shape, (height * width, 1, width, 1))


def conv2d_channels_last(p: Transform, state: str) -> Call:
    """The same filters; a channels_last convolution writes the blocks layout directly."""
    b, c = p.image[:2]
    weight = _as_channels_last(p.kron.view(p.f, 1, p.n, p.n))

    def call() -> Tensor:
        x = p.padded()
        y = F.conv2d(_as_channels_last(x.view(b * c, 1, *x.shape[2:])), weight, stride=p.n)
        return y.permute(0, 2, 3, 1).reshape(p.result)

    return call


def two_pass(p: Transform, state: str) -> Call:
    """Rows by one GEMM, columns by a batched one: frequencies interleaved in space; then a permuting copy."""
    b, c = p.image[:2]
    strips, width = b * c * p.h, p.n * p.w
    rows, columns = p.buffer(state, strips * p.n * p.w, p.n), p.buffer(state, strips, p.n, width)
    d = p.d.expand(strips, p.n, p.n)
    out = p.landing(state)
    if p.layout == "interleaved" and out is not None:
        columns = out.view(strips, p.n, width)

    def call() -> Tensor:
        z = torch.mm(p.padded().view(-1, p.n), p.dt, out=rows)
        y = torch.bmm(d, z.view(strips, p.n, width), out=columns)
        if p.layout == "interleaved":
            return y.view(p.result)
        return p.lay(y.view(p.grid).permute(TO_LAYOUT[p.layout]), out)

    return call


def kron_gemm(p: Transform, state: str) -> Call:
    """Blocks gathered into rows (or columns, for planar), times the N*N x N*N matrix."""
    b, c = p.image[:2]
    cells = p.h * p.w
    out = p.landing(state)
    if p.layout == "planar":
        gathered = p.buffer(state, b * c, p.n * p.n, cells)
        kron = p.kron.expand(b * c, p.f, p.n * p.n)
        target = None if out is None else out.view(b * c, p.f, cells)

        def call() -> Tensor:
            z = p.padded().view(p.grid).permute(TO_LAYOUT["planar"])
            z = z.reshape(b * c, -1, cells) if gathered is None else _copied(z, gathered)
            return torch.bmm(kron, z, out=target).view(p.result)

        return call
    gathered = p.buffer(state, b * c * cells, p.n * p.n)
    kron_t = p.kron.T.contiguous()
    target = None if out is None else out.view(-1, p.f)

    def call_blocks() -> Tensor:
        z = p.padded().view(p.grid).permute(TO_LAYOUT["blocks"])
        z = z.reshape(-1, p.n * p.n) if gathered is None else _copied(z, gathered)
        return torch.mm(z, kron_t, out=target).view(p.result)

    return call_blocks


def _copied(view: Tensor, into: Tensor) -> Tensor:
    into.view(view.shape).copy_(view)
    return into


EINSUM = {"planar": "bcuvhw", "blocks": "bchwuv", "interleaved": "bchuwv"}


def einsum(p: Transform, state: str) -> Call:
    out = p.landing(state)
    return lambda: p.lay(torch.einsum(f"ui,bchiwj,vj->{EINSUM[p.layout]}", p.d, p.padded().view(p.grid), p.d), out)


def scipy_dctn(p: Transform, state: str) -> Call:
    from scipy import fft

    out = p.landing(state)
    transform = fft.idctn if p.inverse else fft.dctn

    def call() -> Tensor:
        if p.inverse:
            z = p.x.view(p.cells).permute(FROM_LAYOUT[p.layout]).numpy()
            return lay_image(p, torch.from_numpy(transform(z, axes=(3, 5), norm="ortho", workers=torch.get_num_threads())), out)
        y = transform(p.padded().view(p.grid).numpy(), axes=(3, 5), norm="ortho", workers=torch.get_num_threads())
        return p.lay(torch.from_numpy(y).permute(TO_LAYOUT[p.layout]), out)

    return call


def torch_dct(p: Transform, state: str) -> Call:
    """The library of that name, which goes through an FFT, on blocks side by side. Its like, dctorch, is the einsum."""
    library, out = needed("torch_dct", "torch-dct"), p.landing(state)

    def call() -> Tensor:
        if p.inverse:
            z = library.idct_2d(p.x.view(p.cells).permute(FROM_LAYOUT[p.layout]).transpose(3, 4), norm="ortho")
            return lay_image(p, z.transpose(3, 4), out)
        y = library.dct_2d(p.padded().view(p.grid).transpose(3, 4), norm="ortho").transpose(3, 4)
        return p.lay(y.permute(TO_LAYOUT[p.layout]), out)

    return call


def compiled(make: Callable[[Transform, str], Call]) -> Callable[[Transform, str], Call]:
    """The torch.compile'd form; buffers are the compiler's own affair, so the contestant allocates in every state."""

    def make_compiled(p: Transform, state: str) -> Call:
        torch._dynamo.reset()  # inductor bakes the thread count in
        return torch.compile(make(p, "heap"), dynamic=False)

    return make_compiled


# --- the inverse ----------------------------------------------------------------------------------------------------------


def conv_transpose2d(p: Transform, state: str) -> Call:
    """The same filters, transposed; a blocks tensor is read as channels_last planes, without a copy."""
    b, c = p.image[:2]
    weight = p.kron.view(p.f, 1, p.n, p.n).to(p.dtype)

    def call() -> Tensor:
        planar = p.layout == "planar"
        y = p.x.view(b * c, p.f, p.h, p.w) if planar else p.x.view(b * c, p.h, p.w, p.f).permute(0, 3, 1, 2)
        return p.crop(F.conv_transpose2d(y, weight, stride=p.n).contiguous())

    return call


def two_pass_inverse(p: Transform, state: str) -> Call:
    """A permuting copy to the interleaved layout, columns by a batched GEMM, rows by one."""
    b, c = p.image[:2]
    strips, width = b * c * p.h, p.n * p.w
    gathered = p.buffer(state, *p.grid)
    columns = p.buffer(state, strips, p.n, width)
    out = p.landing(state) if p.whole else None
    rows = None if out is None else out.view(-1, p.n)
    dt = p.dt.expand(strips, p.n, p.n)

    def call() -> Tensor:
        z = p.x.view(p.cells)
        if p.layout != "interleaved":
            z = z.permute(FROM_LAYOUT[p.layout])
            z = z.contiguous() if gathered is None else gathered.copy_(z)
        z = torch.bmm(dt, z.view(strips, p.n, width), out=columns)
        return p.crop(torch.mm(z.view(-1, p.n), p.d, out=rows))

    return call


def kron_gemm_inverse(p: Transform, state: str) -> Call:
    """Times the transposed N*N x N*N matrix, then the blocks copied to their places."""
    b, c = p.image[:2]
    cells = p.h * p.w
    out = p.landing(state)
    if p.layout == "planar":
        kron_t = p.kron.T.contiguous().expand(b * c, p.n * p.n, p.f)
        buffer = p.buffer(state, b * c, p.n * p.n, cells)

        def call() -> Tensor:
            z = torch.bmm(kron_t, p.x.view(b * c, p.f, cells), out=buffer)
            return lay_image(p, z.view(b, c, p.n, p.n, p.h, p.w).permute(FROM_LAYOUT["planar"]), out)

        return call
    buffer = p.buffer(state, b * c * cells, p.n * p.n)

    def call_blocks() -> Tensor:
        z = torch.mm(p.x.view(-1, p.f), p.kron, out=buffer)
        return lay_image(p, z.view(b, c, p.h, p.w, p.n, p.n).permute(FROM_LAYOUT["blocks"]), out)

    return call_blocks


def einsum_inverse(p: Transform, state: str) -> Call:
    out = p.landing(state)
    return lambda: lay_image(p, torch.einsum(f"ui,{EINSUM[p.layout]},vj->bchiwj", p.d, p.x.view(p.cells), p.d), out)


# --- cases of the transforms ----------------------------------------------------------------------------------------------


def _rivals(settings: Settings, layout: str, freqs: bool, inverse: bool, compile_too: bool) -> Iterator[Contestant]:
    if inverse:
        if layout != "interleaved":
            yield Contestant("conv_transpose2d", conv_transpose2d)
            yield Contestant("kron GEMM", kron_gemm_inverse)
    else:
        yield Contestant("conv2d", conv2d)
        if layout == "blocks":
            yield Contestant("conv2d channels_last", conv2d_channels_last)
        if layout != "interleaved":
            yield Contestant("kron GEMM", kron_gemm)
    if freqs:
        return  # the separable forms compute all frequencies: no rivals where few are wanted
    separable, contraction = (two_pass_inverse, einsum_inverse) if inverse else (two_pass, einsum)
    yield Contestant("two-pass GEMM", separable)
    if settings.quick:
        return
    yield Contestant("einsum", contraction)
    if settings.device == "cpu" and find_spec("scipy"):
        yield Contestant("scipy", scipy_dctn)
    if compile_too:
        yield Contestant("torch-dct", torch_dct)
    if compile_too and settings.compiles:
        yield Contestant("einsum, compiled", compiled(contraction))
        yield Contestant("two-pass GEMM, compiled", compiled(separable))


def _reference(p: Transform) -> Tensor:
    """In float64, one image at a time: the intermediate tensors of a large batch would not fit."""
    freqs = None if p.freqs is None else list(p.freqs)
    exact = reference.block_dct
    if p.inverse:
        exact = functools.partial(reference.block_idct, size=p.image[2:])
    given = {"block_size": p.n, "layout": p.layout, "freqs": freqs, "scale": None, "shift": 0.0}
    return torch.cat([exact(part.double(), **given) for part in p.x.split(1)])


def _transform(
    settings: Settings,
    shape: shapes.Shape,
    layout: str,
    n: int = 8,
    *,
    inverse: bool = False,
    freqs: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    state: str = "out",
    compile_too: bool = False,
    quick: bool = False,
) -> Case:
    b, c, height, width = shape.size
    f = n * n if freqs is None else len(freqs)
    blocks = b * c * -(-height // n) * -(-width // n)
    narrow = dtype != torch.float32
    if narrow:
        half = (
            Contestant("conv_transpose2d", conv_transpose2d, BFLOAT16_WEIGHTS)
            if inverse
            else Contestant("conv2d", conv2d, BFLOAT16_WEIGHTS)
        )
        rivals: tuple[Contestant, ...] = (Contestant("fourfold in float32", ours_float32, FLOAT32), half)
    else:
        rivals = tuple(_rivals(settings, layout, freqs is not None, inverse, compile_too))
    kept = "" if freqs is None else f" first {f} zigzag frequencies"
    return Case(
        family=FAMILY,
        op="block_idct" if inverse else "block_dct",
        label=f"{layout} {shape} N={n} {str(dtype).removeprefix('torch.')}{kept}",
        problem=lambda device: Transform(shape.size, n, layout, freqs, dtype, device, inverse),
        reference=_reference,
        ours=Contestant("fourfold", ours),
        rivals=rivals,
        tolerance=BFLOAT16 if narrow else FLOAT32,
        state=state,
        bytes=(b * c * height * width + blocks * f) * dtype.itemsize,
        flops=blocks * 4 * n**3,  # two N x N by N x N products
        source=shape.source,
        quick=quick,
    )


class Trained(Transform):
    """With a gradient of x: the transform inside a network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.x.requires_grad_()
        self.grad = torch.randn(self.result, generator=torch.Generator().manual_seed(1)).to(self.device, self.dtype)

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


def backward(make: Callable[[Transform, str], Call], compiled: bool = False) -> Callable[[Trained, str], Call]:
    """out= takes no part where a gradient is recorded."""

    def made(p: Trained, state: str) -> Call:
        forward = make(p, "heap")
        return with_backward(torch.compile(forward, dynamic=False) if compiled else forward, [p.x], [p.grad])

    return made


def exactly_with_gradient(p: Trained) -> list[Tensor]:
    exact = dataclasses.replace(p, dtype=torch.float64)
    exact.x = p.x.detach().double().requires_grad_()
    y = _reference(exact)
    return [y.detach(), *torch.autograd.grad(y, [exact.x], [p.grad.double()])]


def _with_backward(settings: Settings, shape: shapes.Shape, layout: str, inverse: bool, *, quick: bool = False) -> Case:
    forward = _transform(settings, shape, layout, inverse=inverse, state="heap", quick=quick)
    differentiable = [rival for rival in forward.rivals if rival.name != "scipy"]
    rivals = [Contestant(rival.name, backward(rival.make)) for rival in differentiable]
    if settings.compiles:
        separable = two_pass_inverse if inverse else two_pass
        rivals.append(Contestant("two-pass GEMM, compiled", backward(separable, compiled=True)))
    return dataclasses.replace(
        forward,
        label=f"{forward.label}, forward and backward",
        problem=lambda device: Trained(shape.size, 8, layout, None, torch.float32, device, inverse),
        reference=exactly_with_gradient,
        ours=Contestant("fourfold", backward(ours)),
        rivals=tuple(rivals),
        held=Trained.tensors,
        bytes=2 * forward.bytes,  # the gradient's transform moves as much again
        flops=2 * forward.flops,
    )


def _transforms(settings: Settings, inverse: bool) -> Iterator[Case]:
    make = functools.partial(_transform, settings, inverse=inverse)
    if settings.random_shapes:
        for shape in shapes.random_images(settings.seed):
            for layout in ("planar", "blocks"):
                yield make(shape, layout, quick=True)
        return
    for shape in (shapes.CLASSIFIER, shapes.POWER_OF_TWO, shapes.LARGE):
        for layout in ("planar", "blocks"):
            quick = shape is shapes.CLASSIFIER or (shape is shapes.LARGE and layout == "planar")
            yield make(shape, layout, quick=quick, compile_too=True)
            yield make(shape, layout, state="heap", quick=quick and shape is shapes.CLASSIFIER and not inverse)
        yield make(shape, "interleaved", quick=shape is shapes.CLASSIFIER and not inverse)
    yield dataclasses.replace(make(shapes.LARGE, "planar", state="fresh"), peak=True)
    for layout in ("planar", "blocks"):
        yield _with_backward(settings, shapes.CLASSIFIER, layout, inverse, quick=layout == "planar" and not inverse)
    for n in (2, 4, 16, 32):
        yield make(shapes.POWER_OF_TWO, "planar", n, quick=True)
        yield make(shapes.POWER_OF_TWO, "blocks", n)
    yield make(shapes.CLASSIFIER, "planar", dtype=torch.bfloat16, quick=True)
    yield make(shapes.LARGE, "planar", dtype=torch.bfloat16)
    yield make(shapes.CLASSIFIER, "planar", freqs=tuple(ff.zigzag(8)[:24].tolist()), quick=True)
    yield make(shapes.RAGGED, "planar", quick=not inverse)
    yield make(shapes.RAGGED, "blocks")


# --- dct_normalize --------------------------------------------------------------------------------------------------------


class Quantised:
    """int16 blocks with one table per image, and per-frequency statistics."""

    def __init__(self, size: tuple[int, ...], layout: str, device: torch.device) -> None:
        b, h, w, f = size
        generator = torch.Generator().manual_seed(0)
        rank = torch.arange(f) // 8 + torch.arange(f) % 8  # frequencies grow, coefficients fall along the diagonals
        spectrum = 300 / (1 + rank.float()) ** 1.5
        self.qtable = (4 + 3 * rank + torch.randint(0, 4, (b, f), generator=generator)).to(device, torch.int32)
        values = torch.randn(size, generator=generator).to(device) * spectrum.to(device)
        self.coefs = (values / self.qtable[:, None, None, :]).round().to(torch.int16)
        self.mean = torch.randn(f, generator=generator).to(device)
        self.std = spectrum.to(device)
        self.layout = layout
        self.result = (b, f, h, w) if layout == "planar" else size
        # Folded: coefs * gain + offset.
        self.gain = (self.qtable / self.std)[:, None, None, :]  # [B, 1, 1, F]
        self.offset = -self.mean / self.std  # [F]

    def landing(self, state: str) -> Tensor | None:
        return torch.full(self.result, math.nan, device=self.coefs.device) if state == "out" else None

    def laid(self, blocks: Tensor) -> Tensor:
        """[B, h, w, F] as the result is laid out, without a copy."""
        return blocks.permute(0, 3, 1, 2) if self.layout == "planar" else blocks


def normalize_ours(p: Quantised, state: str) -> Call:
    return functools.partial(ff.dct_normalize, p.coefs, p.qtable, mean=p.mean, std=p.std, layout=p.layout)


def normalize_eager(p: Quantised, state: str) -> Call:
    """The idiom: dequantise, normalise, permute."""
    table = p.qtable[:, None, None, :].float()
    return lambda: p.laid((p.coefs.float() * table - p.mean) / p.std).contiguous()


def normalize_folded(p: Quantised, state: str) -> Call:
    """Gain and offset folded beforehand, widened and permuted by one copy, then finished in place."""
    gain, offset = (p.laid(t.expand(len(p.coefs), 1, 1, -1)).contiguous() for t in (p.gain, p.offset))
    buffer = p.landing(state)

    def call() -> Tensor:
        y = torch.empty(p.result, device=p.coefs.device) if buffer is None else buffer
        return y.copy_(p.laid(p.coefs)).mul_(gain).add_(offset)

    return call


def normalize_addcmul(p: Quantised, state: str) -> Call:
    """Gain and offset folded beforehand, one pass of arithmetic that writes through the permuted view."""
    buffer = p.landing(state)
    gain, offset = p.laid(p.gain), p.laid(p.offset.expand(1, 1, 1, -1))

    def call() -> Tensor:
        y = torch.empty(p.result, device=p.coefs.device) if buffer is None else buffer
        return torch.addcmul(offset, p.laid(p.coefs.float()), gain, out=y)

    return call


def _normalized(p: Quantised) -> Tensor:
    mean, std = p.mean.double(), p.std.double()
    return reference.dct_normalize(p.coefs, p.qtable.double(), mean, std, None, p.layout, torch.float64)


def _normalize(settings: Settings, shape: shapes.Shape, layout: str, state: str, **flags: bool) -> Case:
    rivals = [
        Contestant("eager chain", normalize_eager),
        Contestant("folded, in place", normalize_folded),
        Contestant("folded addcmul", normalize_addcmul),
    ]
    if settings.compiles:
        rivals.append(Contestant("eager chain, compiled", compiled(normalize_eager)))
    count = math.prod(shape.size)

    return Case(
        family=FAMILY,
        op="dct_normalize",
        label=f"{layout} {shape} int16 to float32",
        problem=lambda device: Quantised(shape.size, layout, device),
        reference=_normalized,
        ours=Contestant("fourfold", normalize_ours),
        rivals=tuple(rivals),
        tolerance=Tolerance(1e-5, 1e-5),
        state=state,
        bytes=count * (2 + 4),
        flops=count * 3,
        source=shape.source,
        **flags,
    )


class TrainedStatistics(Quantised):
    """With mean and std as parameters."""

    def __init__(self, size: tuple[int, ...], layout: str, device: torch.device) -> None:
        super().__init__(size, layout, device)
        for parameter in (self.mean, self.std):
            parameter.requires_grad_()
        self.grad = torch.randn(self.result, generator=torch.Generator().manual_seed(1)).to(device)

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


def _normalize_backward(make: Callable[[Quantised, str], Call]) -> Callable[[TrainedStatistics, str], Call]:
    return lambda p, state: with_backward(make(p, state), [p.mean, p.std], [p.grad])


def _normalized_with_gradients(p: TrainedStatistics) -> list[Tensor]:
    mean, std = (t.detach().double().requires_grad_() for t in (p.mean, p.std))
    y = reference.dct_normalize(p.coefs, p.qtable.double(), mean, std, None, p.layout, torch.float64)
    return [y.detach(), *torch.autograd.grad(y, [mean, std], [p.grad.double()])]


def _normalize_training(settings: Settings, shape: shapes.Shape, layout: str) -> Case:
    rivals = [Contestant("eager chain", _normalize_backward(normalize_eager))]
    if settings.compiles:
        rivals.append(Contestant("eager chain, compiled", _normalize_backward(compiled(normalize_eager))))
    case = _normalize(settings, shape, layout, "heap")
    return dataclasses.replace(
        case,
        label=f"{case.label}, forward and backward of mean and std",
        problem=lambda device: TrainedStatistics(shape.size, layout, device),
        reference=_normalized_with_gradients,
        ours=Contestant("fourfold", _normalize_backward(normalize_ours)),
        rivals=tuple(rivals),
        # A gradient is a sum over all blocks of all images.
        tolerance=Tolerance(1e-4, 1e-4, of_rms=True),
        held=TrainedStatistics.tensors,
        bytes=case.bytes + math.prod(shape.size) * (2 + 4),
        flops=2 * case.flops,
    )


def _normalizations(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for image in shapes.random_images(settings.seed):
            b, _, height, width = image.size
            shape = shapes.Shape((b, -(-height // 8), -(-width // 8), 64), image.source)
            yield _normalize(settings, shape, "planar", "heap", quick=True)
        return
    for shape in (shapes.JPEG_SMALL, shapes.JPEG_LUMA):
        yield _normalize(settings, shape, "planar", "heap", quick=True)
        yield _normalize(settings, shape, "blocks", "heap")
    yield _normalize_training(settings, shapes.JPEG_SMALL, "planar")
    yield in_fresh_memory(_normalize(settings, shapes.JPEG_LUMA, "planar", "heap"))


# --- call overhead --------------------------------------------------------------------------------------------------------


def _overhead(
    op: str,
    label: str,
    small: Callable[[torch.device], Tensor],
    call: Contestant,
    exact: Callable[[Tensor], Tensor],
    goal: float,
) -> Case:
    """A call on an input so small that nothing but the call is timed, beside x.clone()."""
    return Case(
        family=FAMILY,
        op=op,
        label=label,
        problem=small,
        reference=exact,
        ours=call,
        rivals=(),
        tolerance=FLOAT32,
        state="heap",
        source="one block: only the call costs",
        quick=True,
        overhead=True,
        overhead_goal=goal,
    )


def _overheads() -> Iterator[Case]:
    def dct(x: Tensor) -> Tensor:
        return reference.block_dct(x.detach().double(), 8, "planar", None, None, 0.0)

    def idct(y: Tensor) -> Tensor:
        return reference.block_idct(y.detach().double(), 8, "interleaved", None, None, 0.0, None)

    def table(coefs: Tensor) -> Tensor:
        return torch.full((64,), 3, device=coefs.device)

    def normalized(coefs: Tensor) -> Tensor:
        return reference.dct_normalize(coefs, table(coefs).double()[None], None, None, None, "planar", torch.float64)

    call_dct = Contestant("fourfold", lambda x, state: lambda: ff.block_dct(x))
    call_idct = Contestant("fourfold", lambda y, state: lambda: ff.block_idct(y, layout="interleaved"))
    call_normalize = Contestant("fourfold", lambda coefs, state: functools.partial(ff.dct_normalize, coefs, table(coefs)))
    for op, call, exact in (("block_dct", call_dct, dct), ("block_idct", call_idct, idct)):
        yield _overhead(op, "float32 1x1x8x8", functools.partial(_one_block, False), call, exact, 8.0)
        yield _overhead(op, "float32 1x1x8x8, gradient recorded", functools.partial(_one_block, True), call, exact, 25.0)
    yield _overhead("dct_normalize", "int16 1x1x64", _one_quantised_block, call_normalize, normalized, 8.0)


def _one_block(grad: bool, device: torch.device) -> Tensor:
    return torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_(grad)


def _one_quantised_block(device: torch.device) -> Tensor:
    return torch.arange(64, dtype=torch.int16, device=device).view(1, 1, 64)


# --- what the harness asks for --------------------------------------------------------------------------------------------


def cases(settings: Settings) -> Iterator[Case]:
    if not settings.random_shapes:
        yield from _overheads()
    yield from _transforms(settings, inverse=False)
    yield from _transforms(settings, inverse=True)
    yield from _normalizations(settings)


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
