"""dct_downscale2 against the ways to the same result in plain torch: through pixels, and as one prepared linear map.

dct_flip, dct_rot90 and dct_crop are a copy with signs, a copy with signs, and a view.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from fourfold.ops.blockdct_domain import dct_downscale2
from fourfold.reference import blockdct_domain as reference
from fourfold.reference.blockdct import dct_matrix
from torch import Tensor

from . import cases as shapes
from .harness import Call, Case, Contestant, Settings, Tolerance

FAMILY = "blockdct_domain"


class Blocks:
    """float32 blocks [B, h, w, 64], and what a rival may prepare: the bases and the map of four blocks to one."""

    def __init__(self, size: tuple[int, ...], device: torch.device) -> None:
        self.coefs = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
        d = dct_matrix(8, torch.float64, torch.device("cpu"))
        self.basis = torch.kron(d, d).to(device, torch.float32)  # [frequency, pixel]
        pairs = (d.repeat_interleave(2, 1) / 2).unflatten(1, (2, 8)) @ d.T  # [to, block, from]
        fours = torch.einsum("pau,qbv->abuvpq", pairs, pairs).reshape(256, 64)
        self.fours = fours.to(device, torch.float32)
        filters = fours.view(2, 2, 64, 64).permute(3, 2, 0, 1)
        self.filters = filters.to(device, torch.float32).contiguous(memory_format=torch.channels_last)


def ours(p: Blocks, state: str) -> Call:
    return functools.partial(dct_downscale2, p.coefs)


def through_pixels(p: Blocks, state: str) -> Call:
    """IDCT by one product, the mean, DCT by one product."""
    b, h, w, _ = p.coefs.shape

    def call() -> Tensor:
        image = (p.coefs @ p.basis).view(b, h, w, 8, 8).transpose(2, 3).reshape(b, 1, 8 * h, 8 * w)
        half = F.avg_pool2d(image, 2).view(b, h // 2, 8, w // 2, 8)
        return half.transpose(2, 3).reshape(b, h // 2, w // 2, 64) @ p.basis.T

    return call


def one_product(p: Blocks, state: str) -> Call:
    """Four blocks gathered, times the prepared map."""
    b, h, w, _ = p.coefs.shape
    return lambda: p.coefs.view(b, h // 2, 2, w // 2, 128).transpose(2, 3).reshape(b, h // 2, w // 2, 256) @ p.fours


def one_convolution(p: Blocks, state: str) -> Call:
    """Frequencies as channels in channels_last order, 2 x 2 filters of the prepared map."""
    return lambda: F.conv2d(p.coefs.permute(0, 3, 1, 2), p.filters, stride=2).permute(0, 2, 3, 1)


def compiled(make: Callable[[Blocks, str], Call]) -> Callable[[Blocks, str], Call]:
    def make_compiled(p: Blocks, state: str) -> Call:
        torch._dynamo.reset()  # inductor bakes the thread count in
        return torch.compile(make(p, state), dynamic=False)

    return make_compiled


def exact(p: Blocks) -> Tensor:
    return reference.dct_downscale2(p.coefs.double())


def downscale(settings: Settings, shape: shapes.Shape, **flags: bool) -> Case:
    rivals = [
        Contestant("through pixels", through_pixels),
        Contestant("one product, map prepared", one_product),
        Contestant("one convolution, map prepared", one_convolution),
    ]
    if settings.compiles:
        rivals.append(Contestant("through pixels, compiled", compiled(through_pixels)))
    count = math.prod(shape.size)
    return Case(
        family=FAMILY,
        op="dct_downscale2",
        label=f"{shape} float32",
        problem=lambda device: Blocks(shape.size, device),
        reference=exact,
        ours=Contestant("fourfold", ours),
        rivals=tuple(rivals),
        tolerance=Tolerance(2e-5, 1e-5),
        state="heap",
        bytes=count * 5,  # a quarter is written
        flops=count * 2 * 64,
        source=shape.source,
        **flags,
    )


def overhead() -> Case:
    return Case(
        family=FAMILY,
        op="dct_downscale2",
        label="float32 1x2x2x64",
        problem=lambda device: torch.randn(1, 2, 2, 64, generator=torch.Generator().manual_seed(0)).to(device),
        reference=lambda coefs: reference.dct_downscale2(coefs.double()),
        ours=Contestant("fourfold", lambda coefs, state: functools.partial(dct_downscale2, coefs)),
        rivals=(),
        tolerance=Tolerance(2e-5, 1e-5),
        state="heap",
        source="four blocks: only the call costs",
        quick=True,
        overhead=True,
    )


def cases(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for image in shapes.random_images(settings.seed):
            b, _, height, width = image.size
            # Even grids: the rivals know no others.
            shape = shapes.Shape((b, 2 * -(-height // 16), 2 * -(-width // 16), 64), image.source)
            yield downscale(settings, shape, quick=True)
        return
    yield overhead()
    yield downscale(settings, shapes.JPEG_SMALL, quick=True)
    yield downscale(settings, shapes.JPEG_LUMA)


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
