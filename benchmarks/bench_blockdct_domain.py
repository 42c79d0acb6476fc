"""dct_flip, dct_rot90, dct_crop and dct_downscale2 against the way through pixels, and dct_downscale2 against one prepared map.

On coefficients the first three are a copy with signs, the same with blocks transposed, and a view; halving is linear, four
blocks to one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import fourfold as ff
import torch
import torch.nn.functional as F
from fourfold.reference import blockdct_domain as reference
from torch import Tensor

from . import cases as shapes
from .bench_blockdct import compiled, cosines
from .harness import Call, Case, Contestant, Settings, Tolerance, in_fresh_memory, with_backward

FAMILY = "blockdct"
EXACT = Tolerance(0.0, 0.0)
FLOAT32 = Tolerance(2e-3, 1e-5)  # coefficients reach 1000


class Blocks:
    """[B, h, w, 64] with the spectrum of photographs, and what a contestant may prepare: the bases, the map of four to one."""

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        rank = torch.arange(64) // 8 + torch.arange(64) % 8
        values = torch.randn(size, generator=torch.Generator().manual_seed(0)) * (300 / (1 + rank.float()) ** 1.5)
        self.coefs = values.round().to(device, dtype)
        d = cosines(8)
        pairs = (d.repeat_interleave(2, 1) / 2).unflatten(1, (2, 8)) @ d.T  # [to, block, from]
        fours = torch.einsum("pau,qbv->abuvpq", pairs, pairs).reshape(256, 64)
        filters = fours.view(2, 2, 64, 64).permute(3, 2, 0, 1)
        self.d, self.basis, self.fours = (t.to(device, torch.float32) for t in (d, torch.kron(d, d), fours))
        self.filters = filters.to(device, torch.float32).contiguous(memory_format=torch.channels_last)


def inner(h: int, w: int) -> tuple[int, int, int, int]:
    """The middle quarter of h x w blocks: (top, left, height, width)."""
    return h // 4, w // 4, max(1, h // 2), max(1, w // 2)


def inner_pixels(image: Tensor) -> Tensor:
    top, left, height, width = (8 * side for side in inner(image.shape[-2] // 8, image.shape[-1] // 8))
    return image[..., top : top + height, left : left + width]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One of the functions.

    arguments: beside the coefficients of h x w blocks.
    on_pixels: what it does to images [.., H, W].
    traffic: bytes read and written for each coefficient that there is.
    dtype: of coefficients, in and out.
    """

    name: str
    words: str
    arguments: Callable[[int, int], tuple[object, ...]]
    on_pixels: Callable[[Tensor], Tensor]
    traffic: int
    dtype: torch.dtype = torch.int16

    def ours(self, coefs: Tensor) -> Call:
        return functools.partial(getattr(ff, self.name), coefs, *self.arguments(*coefs.shape[1:3]))

    def on_coefficients(self, p: Blocks, state: str) -> Call:
        operate = self.ours(p.coefs)
        return lambda: operate().contiguous()  # a crop is a view: its result shall lie in memory, as everybody's

    def by_fourfold(self, p: Blocks, state: str) -> Call:
        """To pixels and back by our own transforms."""

        def call() -> Tensor:
            image = ff.block_idct(p.coefs[:, None].float(), layout="blocks")
            return self._finished(ff.block_dct(self.on_pixels(image), layout="blocks")[:, 0])

        return call

    def by_einsum(self, p: Blocks, state: str) -> Call:
        b, h, w, _ = p.coefs.shape

        def call() -> Tensor:
            cells = p.coefs.view(b, h, w, 8, 8).float()
            image = torch.einsum("ui,bhwuv,vj->bhiwj", p.d, cells, p.d).reshape(b, 8 * h, 8 * w)
            z = self._cells(self.on_pixels(image))
            return self._finished(torch.einsum("ui,bhiwj,vj->bhwuv", p.d, z, p.d).flatten(3))

        return call

    def by_products(self, p: Blocks, state: str) -> Call:
        """IDCT and DCT of whole blocks by one product each."""
        b, h, w, _ = p.coefs.shape

        def call() -> Tensor:
            image = (p.coefs.float() @ p.basis).view(b, h, w, 8, 8).transpose(2, 3).reshape(b, 8 * h, 8 * w)
            return self._finished(self._cells(self.on_pixels(image)).transpose(2, 3).flatten(3) @ p.basis.T)

        return call

    def _cells(self, image: Tensor) -> Tensor:
        b, height, width = image.shape
        return image.reshape(b, height // 8, 8, width // 8, 8)

    def _finished(self, coefs: Tensor) -> Tensor:
        return coefs if self.dtype.is_floating_point else coefs.round().to(self.dtype)

    def exact(self, coefs: Tensor) -> Tensor:
        arguments = self.arguments(*coefs.shape[1:3])
        wide = coefs.double() if self.dtype.is_floating_point else coefs
        return getattr(reference, self.name)(wide, *arguments).double()


HALVE = Operation("dct_downscale2", "to half", lambda h, w: (), lambda image: F.avg_pool2d(image, 2), 5, torch.float32)
OPERATIONS = (
    Operation("dct_flip", "left to right", lambda h, w: (-2,), lambda image: image.flip(-1), traffic=4),
    Operation("dct_rot90", "by one quarter", lambda h, w: (1,), lambda image: torch.rot90(image, 1, (-2, -1)), traffic=4),
    Operation("dct_crop", "to the inner quarter", lambda h, w: (inner(h, w),), inner_pixels, traffic=1),
    HALVE,
)


def one_product(p: Blocks, state: str) -> Call:
    """Four blocks gathered, times the prepared map."""
    b, h, w, _ = p.coefs.shape
    return lambda: p.coefs.view(b, h // 2, 2, w // 2, 128).transpose(2, 3).reshape(b, h // 2, w // 2, 256) @ p.fours


def one_convolution(p: Blocks, state: str) -> Call:
    """Frequencies as channels in channels_last order, 2 x 2 filters of the prepared map."""
    return lambda: F.conv2d(p.coefs.permute(0, 3, 1, 2), p.filters, stride=2).permute(0, 2, 3, 1)


def _case(settings: Settings, operation: Operation, shape: shapes.Shape, **flags: bool) -> Case:
    rivals = [
        Contestant("through pixels by fourfold", operation.by_fourfold),
        Contestant("through pixels by GEMMs", operation.by_products),
        Contestant("through pixels by einsum", operation.by_einsum),
    ]
    if operation is HALVE:
        rivals += [Contestant("one prepared GEMM", one_product), Contestant("one prepared convolution", one_convolution)]
    if settings.compiles and not settings.random_shapes:
        rivals += [Contestant(f"{rival.name}, compiled", compiled(rival.make)) for rival in rivals[1:3]]
    count = math.prod(shape.size)
    floating = operation.dtype.is_floating_point
    return Case(
        family=FAMILY,
        op=operation.name,
        label=f"{operation.words}, {shape} {str(operation.dtype).removeprefix('torch.')}",
        problem=functools.partial(Blocks, shape.size, operation.dtype),
        reference=lambda p: operation.exact(p.coefs),
        ours=Contestant("fourfold", operation.on_coefficients),
        rivals=tuple(rivals),
        tolerance=FLOAT32 if floating else EXACT,
        state="heap",
        bytes=operation.traffic * count,
        flops=2 * 64 * count if floating else 0,  # of the prepared map
        source=shape.source,
        **flags,
    )


class TrainedBlocks(Blocks):
    """Float coefficients that a network gives, and the gradient of what `operation` makes of them."""

    def __init__(self, size: tuple[int, ...], operation: Operation, device: torch.device) -> None:
        super().__init__(size, torch.float32, device)
        result = operation.exact(self.coefs).shape
        self.grad = torch.randn(result, generator=torch.Generator().manual_seed(1)).to(device)
        self.coefs.requires_grad_()

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


def _backward(make: Callable[[Blocks, str], Call]) -> Callable[[TrainedBlocks, str], Call]:
    return lambda p, state: with_backward(make(p, state), [p.coefs], [p.grad])


def _training(settings: Settings, operation: Operation, shape: shapes.Shape) -> Case:
    operation = dataclasses.replace(operation, dtype=torch.float32)
    case = _case(settings, operation, shape)

    def exact(p: TrainedBlocks) -> list[Tensor]:
        coefs = p.coefs.detach().double().requires_grad_()
        y = operation.exact(coefs)
        return [y.detach(), *torch.autograd.grad(y, [coefs], [p.grad.double()])]

    return dataclasses.replace(
        case,
        label=f"{case.label}, forward and backward",
        problem=functools.partial(TrainedBlocks, shape.size, operation),
        reference=exact,
        ours=Contestant("fourfold", _backward(operation.on_coefficients)),
        rivals=tuple(Contestant(rival.name, _backward(rival.make)) for rival in case.rivals),
        held=TrainedBlocks.tensors,
        bytes=2 * case.bytes,
        flops=2 * case.flops,
    )


def _overhead(operation: Operation) -> Case:
    """Four blocks; of a crop the view alone."""
    return Case(
        family=FAMILY,
        op=operation.name,
        label=f"{str(operation.dtype).removeprefix('torch.')} 1x2x2x64",
        problem=lambda device: torch.arange(256, dtype=operation.dtype, device=device).view(1, 2, 2, 64),
        reference=operation.exact,
        ours=Contestant("fourfold", lambda coefs, state: operation.ours(coefs)),
        rivals=(),
        tolerance=FLOAT32,
        state="heap",
        source="four blocks: only the call costs",
        quick=True,
        overhead=True,
    )


def cases(settings: Settings) -> Iterator[Case]:
    for operation in OPERATIONS:
        if settings.random_shapes:
            for image in shapes.random_images(settings.seed):
                b, _, height, width = image.size
                # Even grids: the rivals know no others.
                shape = shapes.Shape((b, 2 * -(-height // 16), 2 * -(-width // 16), 64), image.source)
                yield _case(settings, operation, shape, quick=True)
            continue
        yield _overhead(operation)
        yield _case(settings, operation, shapes.JPEG_SMALL, quick=True)
        yield _case(settings, operation, shapes.JPEG_LUMA)
        yield _training(settings, operation, shapes.JPEG_SMALL)
        yield in_fresh_memory(_case(settings, operation, shapes.JPEG_LUMA))


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
