"""coord_conv1d/2d/3d, coord_conv_transpose2d and add_coords against concatenation, and their cost over plain convolution.

Two rivals compute the same: concatenation as published, which makes its coordinates on every call, and at its best, with
coordinates kept in the input's dtype and memory order. The yardstick is the convolution without coordinates: it does less, so
it is checked against its own reference and the cost over it is stated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import fourfold as ff
import torch
import torch.nn.functional as F
from torch import Tensor

from . import cases as shapes
from .harness import Call, Case, Contestant, Group, Settings, Tolerance, in_fresh_memory, with_backward

FAMILY = "coordconv"
# A weight's gradient sums up to 131 072 products, so errors are measured against a tensor's own size.
FLOAT32 = Tolerance(1e-4, 1e-5, of_rms=True)
# Two roundings of at most 2^-8, of the convolution and of the sum; the first may be of something larger than the sum.
BFLOAT16 = Tolerance(2**-6, 2**-7, of_rms=True)

OPS = (ff.coord_conv1d, ff.coord_conv2d, ff.coord_conv3d)
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


@dataclasses.dataclass(frozen=True)
class Mode:
    """What is done with a layer; goals: for the mean cost in float32 and bfloat16."""

    name: str
    relu: bool = False
    backward: bool = False
    compiled: bool = False
    goals: tuple[float | None, float | None] = (None, None)
    limit: float | None = None

    def group(self, dtype: torch.dtype) -> Group:
        return Group(f"{self.name}, {name_of(dtype)}", self.goals[dtype == torch.bfloat16], self.limit)


WITH_RELU = Mode("with ReLU", relu=True, goals=(1.03, 0.85), limit=1.10)
BARE = Mode("bare", goals=(1.14, 1.18))
BACKWARD = Mode("forward and backward", backward=True, goals=(1.06, 1.15))
RELU_BACKWARD = Mode("forward and backward with ReLU", relu=True, backward=True)
COMPILED = Mode("compiled, with ReLU", relu=True, compiled=True, goals=(1.05, 1.05))
MODES = (WITH_RELU, BARE, BACKWARD, RELU_BACKWARD, COMPILED)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def coordinates(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[nc, *size], from -1 to 1 along each axis."""
    lines = (torch.linspace(-1, 1, n, dtype=dtype, device=device) for n in size)
    return torch.stack(torch.meshgrid(*lines, indexing="ij"))


class Problem:
    """A layer and its input, with what every contestant may prepare."""

    def __init__(self, layer: shapes.Layer, dtype: torch.dtype, mode: Mode, gradient: bool, device: torch.device) -> None:
        self.layer, self.mode = layer, mode
        (batch, cin, *self.size), rank = layer.input, layer.rank
        generator = torch.Generator().manual_seed(0)
        bound = 1 / math.sqrt((cin + rank) * layer.kernel**rank)

        def weight(channels: int) -> Tensor:
            ends = (channels, layer.channels) if layer.transposed else (layer.channels, channels)
            return (torch.rand(*ends, *[layer.kernel] * rank, generator=generator) * 2 - 1) * bound

        self.memory_format = MEMORY_FORMATS[rank - 1]
        x, weights = torch.randn(layer.input, generator=generator), [weight(cin), weight(rank)]
        bias = torch.randn(layer.channels, generator=generator)
        if mode.relu and mode.backward:
            # Far from 0 every result stays on its side of it: a gradient that rounding switches on or off could not be judged.
            bias = torch.where(bias < 0, -16.0, 16.0)
        self.channel_dim = 0 if layer.transposed else 1  # of a weight, the one that input channels have
        self.x, self.weight, self.coord_weight, self.both, self.bias = (
            self._laid(t.to(device, dtype)) for t in (x, *weights, torch.cat(weights, self.channel_dim), bias)
        )
        kept = coordinates(tuple(self.size), torch.float32, device).to(dtype)
        self.kept = self._laid(kept.expand(batch, *kept.shape))
        for parameter in (self.weight, self.coord_weight, self.both, self.bias, *[self.x] * (not layer.first)):
            parameter.requires_grad_(gradient)
        with torch.no_grad():
            shape = self.convolve(self.x, self.weight, self.bias).shape
        self.grad = self._laid(torch.randn(shape, generator=generator).to(device, dtype))

    def _laid(self, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=self.memory_format if t.dim() == len(self.layer.input) else torch.contiguous_format)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.layer.transposed:
            return F.conv_transpose2d(x, weight, bias, self.layer.stride, self.layer.padding)
        return CONVOLUTIONS[self.layer.rank - 1](x, weight, bias, self.layer.stride, self.layer.padding)

    def input_leaf(self) -> list[Tensor]:
        return [] if self.layer.first else [self.x]

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


def _call(p: Problem, forward: Callable[[], Tensor], leaves: list[Tensor]) -> Call:
    """As p's mode wants it: the result, or the result and the gradients of `leaves`."""
    if p.mode.compiled:
        return torch.compile(forward, dynamic=False, fullgraph=True)
    if not p.mode.backward:
        return forward

    def call() -> tuple[Tensor, ...]:
        y = forward()
        return y, *torch.autograd.grad(y, leaves, p.grad)

    return call


def ours(p: Problem, state: str) -> Call:
    layer = p.layer
    op = ff.coord_conv_transpose2d if layer.transposed else OPS[layer.rank - 1]
    activation = "relu" if p.mode.relu else None

    def forward() -> Tensor:
        return op(p.x, p.weight, p.coord_weight, p.bias, layer.stride, layer.padding, activation=activation)

    return _call(p, forward, [p.weight, p.coord_weight, p.bias, *p.input_leaf()])


def plain(p: Problem, state: str) -> Call:
    """Without coordinates; the activation in place."""

    def forward() -> Tensor:
        y = p.convolve(p.x, p.weight, p.bias)
        return y.relu_() if p.mode.relu else y

    return _call(p, forward, [p.weight, p.bias, *p.input_leaf()])


def plain_frozen(p: Problem, state: str) -> Call:
    """Compiled with its weights as constants: inductor packs them beforehand and lets the convolution apply the activation."""
    layer = p.layer
    with torch.device(p.x.device):
        convolution = torch.nn.Conv2d(layer.input[1], layer.channels, layer.kernel, layer.stride, layer.padding)
    convolution.weight, convolution.bias = torch.nn.Parameter(p.weight), torch.nn.Parameter(p.bias)
    compiled = torch.compile(torch.nn.Sequential(convolution, torch.nn.ReLU()).eval(), dynamic=False, fullgraph=True)

    def call() -> Tensor:
        with torch.no_grad():
            return compiled(p.x)

    from torch._inductor import config

    with config.patch(freezing=True):
        call()
    return call


def published_coordinates(x: Tensor) -> Tensor:
    """Made anew on every call, in the usual memory order whatever x's is."""
    lines = (torch.linspace(-1, 1, n, device=x.device) for n in x.shape[2:])
    coords = torch.stack(torch.meshgrid(*lines, indexing="ij")).to(x.dtype)
    return coords.repeat(len(x), *[1] * coords.dim())


def _concat(p: Problem, concatenated: Callable[[], Tensor], compiled: bool = False) -> Call:
    def forward() -> Tensor:
        y = p.convolve(concatenated(), p.both, p.bias)
        return y.relu_() if p.mode.relu else y

    run = torch.compile(forward, dynamic=False, fullgraph=True) if compiled else forward
    call = _call(p, run, [p.both, p.bias, *p.input_leaf()])
    if not p.mode.backward:
        return call

    def call_and_split() -> tuple[Tensor, ...]:
        y, grad, *others = call()
        return y, *grad.split([p.layer.input[1], p.layer.rank], p.channel_dim), *others

    return call_and_split


def concat_published(p: Problem, state: str) -> Call:
    return _concat(p, lambda: torch.cat([p.x, published_coordinates(p.x)], 1))


def concat_best(p: Problem, state: str) -> Call:
    return _concat(p, lambda: torch.cat([p.x, p.kept], 1))


def concat_best_compiled(p: Problem, state: str) -> Call:
    return _concat(p, lambda: torch.cat([p.x, p.kept], 1), compiled=True)


# --- references -----------------------------------------------------------------------------------------------------------


def _exact(p: Problem, with_coordinates: bool) -> list[Tensor]:
    """The definition in float64, and its gradients where p wants them."""
    x, weight, coord_weight, bias = (
        t.detach().double().contiguous().requires_grad_(p.mode.backward and t.requires_grad)
        for t in (p.x, p.weight, p.coord_weight, p.bias)
    )
    if with_coordinates:
        coords = coordinates(tuple(p.size), torch.float64, x.device)
        both = torch.cat([weight, coord_weight], p.channel_dim)
        y = p.convolve(torch.cat([x, coords.expand(len(x), *coords.shape)], 1), both, bias)
    else:
        y = p.convolve(x, weight, bias)
    if p.mode.relu:
        y = y.relu()
    if not p.mode.backward:
        return [y]
    leaves = [weight, *[coord_weight] * with_coordinates, bias, *[x] * (not p.layer.first)]
    return [y.detach(), *torch.autograd.grad(y, leaves, p.grad.double())]


def with_coordinates(p: Problem) -> list[Tensor]:
    return _exact(p, True)


def without_coordinates(p: Problem) -> list[Tensor]:
    return _exact(p, False)


# --- cases of the convolutions --------------------------------------------------------------------------------------------


def _op_name(layer: shapes.Layer) -> str:
    return "coord_conv_transpose2d" if layer.transposed else f"coord_conv{layer.rank}d"


def _work(layer: shapes.Layer, mode: Mode, dtype: torch.dtype) -> dict[str, int]:
    """bytes and flops of the plain convolution."""
    pixels_in, pixels = layer.input[0] * math.prod(layer.input[2:]), layer.input[0]
    for n in layer.input[2:]:
        pixels *= n * layer.stride if layer.transposed else -(-n // layer.stride)
    read, written = pixels_in * layer.input[1], pixels * layer.channels
    products = (pixels_in if layer.transposed else pixels) * layer.input[1] * layer.channels * layer.kernel**layer.rank
    if not mode.backward:
        return {"bytes": (read + written) * dtype.itemsize, "flops": 2 * products}
    # Backward reads the gradient and the input, a ReLU's result as well, and writes the input's gradient.
    elements = (2 + (not layer.first)) * read + (2 + mode.relu) * written
    return {"bytes": elements * dtype.itemsize, "flops": 2 * products * (2 + (not layer.first))}


def _yardsticks(settings: Settings, layer: shapes.Layer, mode: Mode) -> Iterator[Contestant]:
    name = _op_name(layer).removeprefix("coord_")
    yield Contestant(name + ", relu_" * mode.relu + ", compiled" * mode.compiled, plain, reference=without_coordinates)
    if mode == WITH_RELU and layer in shapes.LAYERS and settings.compiles and settings.device == "cpu":
        yield Contestant("the same frozen by inductor", plain_frozen, reference=without_coordinates)


def _convolution(
    settings: Settings,
    layer: shapes.Layer,
    mode: Mode = BARE,
    dtype: torch.dtype = torch.float32,
    *,
    grouped: bool = True,
    quick: bool = False,
) -> Case:
    words = f", {mode.name}" * (mode != BARE)
    rivals = [Contestant("concat at its best", concat_best), Contestant("concat as published", concat_published)]
    if settings.compiles and not grouped:  # among the groups, one is of compiled forms
        rivals.append(Contestant("concat at its best, compiled", concat_best_compiled))
    return Case(
        family=FAMILY,
        op=_op_name(layer),
        label=str(layer) if grouped else f"{layer}, {name_of(dtype)}{words}",
        problem=functools.partial(Problem, layer, dtype, mode, mode.backward),
        reference=with_coordinates,
        ours=Contestant("fourfold", ours),
        rivals=tuple(rivals),
        tolerance=BFLOAT16 if dtype == torch.bfloat16 else FLOAT32,
        yardsticks=tuple(_yardsticks(settings, layer, mode)),
        group=mode.group(dtype) if grouped else None,
        held=Problem.tensors if mode.backward else None,
        state="heap",
        source=layer.source,
        quick=quick,
        **_work(layer, mode, dtype),
    )


def _convolutions(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for mode in (WITH_RELU, BACKWARD):
            for layer in shapes.random_layers(settings.seed):
                yield _convolution(settings, layer, mode, quick=True)
        return
    for mode in MODES:
        for dtype in (torch.float32, torch.bfloat16):
            for layer in shapes.LAYERS if settings.compiles or not mode.compiled else ():
                chosen = layer in (shapes.PAPER, shapes.SQUARE_1X1, shapes.STRIDED)
                quick = chosen and mode in (WITH_RELU, BACKWARD) and dtype == torch.float32
                yield _convolution(settings, layer, mode, dtype, quick=quick)
    for layer in (shapes.SERIES, shapes.VOLUME, shapes.DECODER):
        for mode in (BARE, WITH_RELU, BACKWARD):
            yield _convolution(settings, layer, mode, grouped=False, quick=mode == WITH_RELU)
    yield _convolution(settings, shapes.WIDE_3X3, BACKWARD, grouped=False)
    for layer in (shapes.SERIES, shapes.WIDE_3X3, shapes.VOLUME, shapes.DECODER):
        yield in_fresh_memory(_convolution(settings, layer, WITH_RELU, grouped=False))


# --- add_coords -----------------------------------------------------------------------------------------------------------


class Image:
    """An input for add_coords."""

    def __init__(
        self, size: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: torch.device, *, gradient: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(size, generator=generator)
        kept = coordinates(size[2:], torch.float32, device)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.x, self.kept = (
            t.to(device, dtype).contiguous(memory_format=memory_format) for t in (x, kept.expand(size[0], *kept.shape))
        )
        self.x.requires_grad_(gradient)
        self.grad = torch.randn(size[0], size[1] + len(kept), *size[2:], generator=generator).to(device, dtype)
        self.grad = self.grad.contiguous(memory_format=memory_format)

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [self.x, self.kept, self.grad]


def _with_coords(x: Tensor) -> Tensor:
    """In float64."""
    coords = coordinates(tuple(x.shape[2:]), torch.float64, x.device)
    return torch.cat([x.double(), coords.expand(len(x), *coords.shape)], 1)


def add_to(p: Image, state: str) -> Call:
    return functools.partial(ff.add_coords, p.x)


def cat_kept(p: Image, state: str) -> Call:
    return lambda: torch.cat([p.x, p.kept], 1)


def cat_published(p: Image, state: str) -> Call:
    return lambda: torch.cat([p.x, published_coordinates(p.x)], 1)


def compiled(make: Callable[[Image, str], Call]) -> Callable[[Image, str], Call]:
    return lambda p, state: torch.compile(make(p, state), dynamic=False, fullgraph=True)


def gradient_of_image(make: Callable[[Image, str], Call]) -> Callable[[Image, str], Call]:
    return lambda p, state: with_backward(make(p, state), [p.x], [p.grad])


def with_coords_and_gradient(p: Image) -> list[Tensor]:
    """The gradient of a copy is the part of it that x got."""
    return [_with_coords(p.x.detach()), p.grad[:, : p.x.shape[1]].double()]


def _add_coords(
    settings: Settings,
    shape: tuple[int, ...],
    source: str,
    channels_last: bool,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    **flags: bool,
) -> Case:
    name = "x".join(map(str, shape))
    rivals = {"cat with kept coordinates": cat_kept, "as published": cat_published}
    if settings.compiles:
        rivals["as published, compiled"] = compiled(cat_published)
    form = gradient_of_image if backward else (lambda make: make)
    return Case(
        family=FAMILY,
        op="add_coords",
        label=f"{'channels_last' if channels_last else 'contiguous'} {name} {name_of(dtype)}"
        + ", forward and backward" * backward,
        problem=functools.partial(Image, shape, channels_last, dtype, gradient=backward),
        reference=with_coords_and_gradient if backward else (lambda p: _with_coords(p.x)),
        ours=Contestant("fourfold", form(add_to)),
        rivals=tuple(Contestant(name, form(make)) for name, make in rivals.items()),
        held=Image.tensors if backward else None,
        tolerance=Tolerance(1e-6, 2**-8 if dtype == torch.bfloat16 else 1e-6),
        state="heap",
        bytes=(2 * math.prod(shape) + shape[0] * (len(shape) - 2) * math.prod(shape[2:])) * dtype.itemsize,
        source=source,
        **flags,
    )


def _additions(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for layer in shapes.random_layers(settings.seed):
            yield _add_coords(settings, layer.input, layer.source, True, torch.float32, quick=True)
        return
    layer = shapes.SQUARE_1X1
    for channels_last in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            quick = channels_last and dtype == torch.float32
            yield _add_coords(settings, layer.input, layer.source, channels_last, dtype, quick=quick)
    yield _add_coords(settings, shapes.PAPER.input, shapes.PAPER.source, True, torch.float32)
    yield _add_coords(settings, layer.input, layer.source, True, torch.float32, backward=True)
    yield in_fresh_memory(_add_coords(settings, layer.input, layer.source, True, torch.float32))


# --- call overhead --------------------------------------------------------------------------------------------------------


def _overhead(layer: shapes.Layer, gradient: bool = False) -> Case:
    return Case(
        family=FAMILY,
        op=_op_name(layer),
        label=f"float32 {'x'.join(map(str, layer.input))}" + ", gradient recorded" * gradient,
        problem=functools.partial(Problem, layer, torch.float32, BARE, gradient),
        reference=with_coordinates,
        ours=Contestant("fourfold", ours),
        rivals=(),
        tolerance=FLOAT32,
        yardsticks=(Contestant(_op_name(layer).removeprefix("coord_"), plain, reference=without_coordinates),),
        state="heap",
        source=layer.source,
        quick=True,
        overhead=True,
    )


def _overheads() -> Iterator[Case]:
    source = "so small that only the call costs"
    yield _overhead(shapes.Layer((1, 8, 8), 8, 1, 1, source))
    yield _overhead(shapes.Layer((1, 8, 8, 8), 8, 1, 1, source))
    yield _overhead(shapes.Layer((1, 8, 8, 8), 8, 1, 1, source), gradient=True)
    yield _overhead(shapes.Layer((1, 8, 8, 8, 8), 8, 1, 1, source))
    yield _overhead(shapes.Layer((1, 8, 8, 8), 8, 2, 2, source, transposed=True))
    yield Case(
        family=FAMILY,
        op="add_coords",
        label="float32 1x1x8x8",
        problem=lambda device: torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device),
        reference=_with_coords,
        ours=Contestant("fourfold", lambda x, state: functools.partial(ff.add_coords, x)),
        rivals=(),
        tolerance=Tolerance(1e-6, 1e-6),
        state="heap",
        source=source,
        quick=True,
        overhead=True,
    )


# --- what the harness asks for --------------------------------------------------------------------------------------------


def cases(settings: Settings) -> Iterator[Case]:
    if not settings.random_shapes:
        yield from _overheads()
    yield from _convolutions(settings)
    yield from _additions(settings)


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
