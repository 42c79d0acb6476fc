"""coord_conv1d/2d/3d, coord_conv_transpose2d, add_coords, CoordSpec: what they compute, in which dtype and memory order."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import battery
import fourfold as ff
import pytest
import torch
import torch.nn.functional as F
from battery import assert_close, assert_same
from fourfold import CoordSpec
from fourfold.ops import coordconv
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_coordconv import in_channels_last, randn
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
COORD_CONV = {1: ff.coord_conv1d, 2: ff.coord_conv2d, 3: ff.coord_conv3d}
ACTIVATIONS = {None: lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
NORMS = ("corners", "dim", "centers", "none", "corners_swapped", "corners_quarter")
RADII = (None, "center", "offset0.5", "unitmax")
PRESETS = ("paper", "uber_legacy", "mkocabas", "walsvid", "wizaron", "keras", "solo", "paddle", "paddle_develop")


# ---- the definition, written for these tests -----------------------------------------------------------------------------


def coordinate(k: int, n: int, mirrored: int, norm: str) -> float:
    """Of index k on an axis of n."""
    if n == 1 or (norm == "corners_swapped" and mirrored == 1):
        return 0.0
    return {
        "corners": lambda: 2 * k / (n - 1) - 1,
        "dim": lambda: 2 * k / n - 1,
        "centers": lambda: (2 * k + 1) / n - 1,
        "none": lambda: float(k),
        "corners_swapped": lambda: 2 * k / (mirrored - 1) - 1,
        "corners_quarter": lambda: k / (2 * (n - 1)) - 1,
    }[norm]()


def coordinates(size: tuple[int, ...], spec: CoordSpec) -> Tensor:
    """[nc, *size] in float64, position by position."""
    rows = []
    for index in itertools.product(*map(range, size)):
        values = [coordinate(k, n, m, spec.norm) for k, n, m in zip(index, size, reversed(size), strict=True)]
        centre = 0.5 if spec.r == "offset0.5" else 0.0
        radius = [math.sqrt(sum((v - centre) ** 2 for v in values))] if spec.r else []
        rows.append((values if spec.order == "ij" else values[::-1]) + radius)
    channels = torch.tensor(rows, dtype=torch.float64).T
    if spec.r == "unitmax" and channels[-1].max() > 0:
        channels[-1] /= channels[-1].max()
    return channels.reshape(-1, *size)


def concatenated(
    x: Tensor, weight: Tensor, coord_weight: Tensor, groups: int, mode: str, spec: CoordSpec
) -> tuple[Tensor, Tensor]:
    """The input and weight of the convolution that coord_conv equals."""
    rank = weight.dim() - 2
    coords = coordinates(tuple(x.shape[-rank:]), spec).to(x.dtype).expand(x.shape[0], -1, *x.shape[-rank:])
    if mode == "shared":
        channels = [part for group in x.chunk(groups, 1) for part in (group, coords)]
        return torch.cat(channels, 1), torch.cat([weight, coord_weight], 1)
    if spec.position == "append":
        return torch.cat([x, coords], 1), torch.cat([weight, coord_weight], 1)
    return torch.cat([coords, x], 1), torch.cat([coord_weight, weight], 1)


def by_concatenation(
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    spec: CoordSpec | None = None,
    activation: str | None = None,
    groups_mode: str = "shared",
) -> Tensor:
    rank, spec = weight.dim() - 2, spec or CoordSpec()
    if x.dim() == rank + 1:
        options = {"padding_mode": padding_mode, "spec": spec, "activation": activation, "groups_mode": groups_mode}
        return by_concatenation(x[None], weight, coord_weight, bias, stride, padding, dilation, groups, **options)[0]
    both, whole = concatenated(x, weight, coord_weight, groups, groups_mode, spec)
    dilations = (dilation,) * rank if isinstance(dilation, int) else dilation
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        widths = [(t // 2, t - t // 2) for t in totals]
    else:
        given = 0 if padding == "valid" else padding
        widths = [(p, p) for p in ((given,) * rank if isinstance(given, int) else given)]
    flat = [w for pair in reversed(widths) for w in pair]
    both = F.pad(both, flat, mode="constant" if padding_mode == "zeros" else padding_mode)
    return ACTIVATIONS[activation](CONV[rank](both, whole, bias, stride, 0, dilation, groups))


def transposed_by_concatenation(
    x: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    spec: CoordSpec | None = None,
    activation: str | None = None,
) -> Tensor:
    if x.dim() == 3:
        options = (stride, padding, output_padding, groups, dilation)
        return transposed_by_concatenation(x[None], weight, coord_weight, bias, *options, spec=spec, activation=activation)[0]
    coords = coordinates(tuple(x.shape[2:]), spec or CoordSpec()).to(x.dtype).expand(x.shape[0], -1, -1, -1)
    both = torch.cat([part for group in x.chunk(groups, 1) for part in (group, coords)], 1)
    parts = zip(weight.chunk(groups, 0), coord_weight.chunk(groups, 1), strict=True)
    whole = torch.cat([part for pair in parts for part in pair], 0)
    y = F.conv_transpose2d(both, whole, bias, stride, padding, output_padding, groups, dilation)
    return ACTIVATIONS[activation](y)


# ---- equal to the definition ---------------------------------------------------------------------------------------------

EXACT = 1e-12


def assert_equal(actual: Tensor, expected: Tensor, label: str) -> None:
    """To 1e-12 of the largest value."""
    assert actual.shape == expected.shape, label
    assert actual.dtype == expected.dtype, label
    largest = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=EXACT * largest, msg=lambda text: f"{label}: {text}")


def assert_equals_definition(call: Any, definition: Any, tensors: list[Tensor | None], twice: bool, **options: Any) -> None:
    """The result with and without autograd, all gradients, and all gradients of these."""
    ours = [None if t is None else t.detach().requires_grad_() for t in tensors]
    theirs = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y, expected = call(*ours, **options), definition(*theirs, **options)
    assert_equal(y, expected, "result")
    with torch.no_grad():
        assert_equal(call(*ours, **options), expected, "result without autograd")
    inputs, leaves = ([t for t in side if t is not None] for side in (ours, theirs))
    weights = battery.numbers(expected)
    # In the other memory order too: what follows a layer decides how its gradient lies.
    if expected.dim() == 4:
        swapped = in_channels_last(weights, 1)
        once = torch.autograd.grad(call(*ours, **options), inputs, swapped)
        wanted = torch.autograd.grad(definition(*theirs, **options), leaves, weights)
        for i, (got, want) in enumerate(zip(once, wanted, strict=True)):
            assert_equal(got, want, f"gradient {i} from channels_last")
    first = torch.autograd.grad(y, inputs, weights, create_graph=twice)
    wanted = torch.autograd.grad(expected, leaves, weights, create_graph=twice)
    for i, (got, want) in enumerate(zip(first, wanted, strict=True)):
        assert_equal(got, want, f"gradient {i}")
    if not twice:
        return
    second = torch.autograd.grad(sum((g.square()).sum() for g in first), inputs, allow_unused=True)
    wanted = torch.autograd.grad(sum((g.square()).sum() for g in wanted), leaves, allow_unused=True)
    for i, (got, want) in enumerate(zip(second, wanted, strict=True)):
        if want is None:
            assert got is None or not got.any(), f"second gradient {i}"
        else:
            assert_equal(torch.zeros_like(want) if got is None else got, want, f"second gradient {i}")


specs = st.builds(
    CoordSpec,
    order=st.sampled_from(("ij", "ji")),
    position=st.sampled_from(("append", "prepend")),
    norm=st.sampled_from(NORMS),
    r=st.sampled_from(RADII),
)
ranks = st.sampled_from((1, 2, 2, 2, 3))


@st.composite
def calls(draw: Any) -> tuple[list[Tensor | None], dict[str, Any]]:
    rank, spec = draw(ranks), draw(specs)
    nc, groups, mode = spec.channels(rank), draw(st.sampled_from((1, 1, 2, 3))), draw(st.sampled_from(("shared", "concat")))
    cout = groups * draw(st.sampled_from((1, 2, 5)))

    def per_axis(*values: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(rank))

    kernel, size, dilation = per_axis(1, 2, 3, 4, 5), per_axis(1, 2, 4, 5, 7, 10), per_axis(1, 1, 2, 3)
    padding_mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular")))
    padding = draw(st.one_of(st.sampled_from(("same", "valid", 0, 1, 2)), st.just(per_axis(0, 1, 2, 5))))
    stride = (1,) * rank if padding == "same" else per_axis(1, 1, 2, 3)
    # padding has to leave room for the kernel, and its mode has limits of its own.
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    widths = {"same": [t - t // 2 for t in spans], "valid": [0] * rank}.get(padding) if isinstance(padding, str) else (
        [padding] * rank if isinstance(padding, int) else padding)  # fmt: skip
    if padding != "same":
        assume(all(n + 2 * w > t for n, w, t in zip(size, widths, spans, strict=True)))
    assume(padding_mode != "reflect" or all(w < n for n, w in zip(size, widths, strict=True)))
    assume(padding_mode != "circular" or all(w <= n for n, w in zip(size, widths, strict=True)))
    if mode == "concat" and groups > 1:
        per_group = draw(st.sampled_from((nc, nc + 1, nc + 2)))  # of them, one group's own channels
        cin, own = per_group * groups - nc, per_group - nc
    else:
        own = draw(st.sampled_from((1, 2, 3)))
        cin = own * groups
    x = randn(draw(st.sampled_from((1, 2, 3))), cin, *size, seed=draw(st.integers(0, 9)))
    form = draw(st.sampled_from(("batch", "batch", "channels_last", "unbatched")))
    x = x[0] if form == "unbatched" else in_channels_last(x, 1) if form == "channels_last" else x
    bias = randn(cout, seed=3) if draw(st.booleans()) else None
    tensors = [x, randn(cout, own, *kernel), randn(cout, nc, *kernel, seed=1), bias]
    options = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": padding_mode,
        "spec": spec, "activation": draw(st.sampled_from((None, "relu", "silu", "gelu"))), "groups_mode": mode,
    }  # fmt: skip
    return tensors, options


def check_call(call: tuple[list[Tensor | None], dict[str, Any]], twice: bool) -> None:
    tensors, options = call
    rank = tensors[1].dim() - 2
    assert_equals_definition(COORD_CONV[rank], by_concatenation, tensors, twice, **options)


@pytest.mark.kernel
@settings(derandomize=True, deadline=None, max_examples=120, database=None)
@given(calls(), st.booleans())
def test_equals_the_definition(call, twice):
    check_call(call, twice)


@st.composite
def transposed_calls(draw: Any) -> tuple[list[Tensor | None], dict[str, Any]]:
    spec, groups = draw(specs), draw(st.sampled_from((1, 1, 2, 3)))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), draw(pair), draw(pair)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    size = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    axes = zip(size, stride, padding, dilation, kernel, extra, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + e + 1 >= 1 for n, s, p, d, k, e in axes))
    own = draw(st.sampled_from((1, 3)))
    x = randn(draw(st.sampled_from((1, 2))), 2 * groups, *size)
    form = draw(st.sampled_from(("batch", "channels_last", "unbatched")))
    x = x[0] if form == "unbatched" else in_channels_last(x, 1) if form == "channels_last" else x
    bias = randn(own * groups, seed=3) if draw(st.booleans()) else None
    tensors = [x, randn(2 * groups, own, *kernel), randn(spec.channels(2), own * groups, *kernel, seed=1), bias]
    activation = draw(st.sampled_from((None, "relu", "silu", "gelu")))
    return tensors, {
        "stride": stride, "padding": padding, "output_padding": extra, "groups": groups, "dilation": dilation, "spec": spec,
        "activation": activation,
    }  # fmt: skip


@pytest.mark.kernel
@settings(derandomize=True, deadline=None, max_examples=50, database=None)
@given(transposed_calls(), st.booleans())
def test_transposed_equals_the_definition(call, twice):
    assert_equals_definition(ff.coord_conv_transpose2d, transposed_by_concatenation, call[0], twice, **call[1])


@pytest.mark.slow
@settings(deadline=None, max_examples=2000, database=None, print_blob=True)
@given(calls(), transposed_calls(), st.booleans())
def test_many_calls_equal_the_definition(call, transposed, twice):
    """Others on every run; a failure prints how to repeat it."""
    check_call(call, twice)
    assert_equals_definition(ff.coord_conv_transpose2d, transposed_by_concatenation, transposed[0], twice, **transposed[1])


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize("rank", [1, 2])
def test_gradients_by_finite_differences(rank, activation):
    spec, k = CoordSpec(r="offset0.5"), (3, 2)[:rank]

    def call(*tensors: Tensor) -> Tensor:
        return COORD_CONV[rank](*tensors, padding=1, stride=2, spec=spec, activation=activation)

    tensors = (randn(2, 1, *(4, 3)[:rank]), randn(2, 1, *k), randn(2, rank + 1, *k), randn(2))
    tracked = tuple(t.requires_grad_() for t in tensors)
    assert gradcheck(call, tracked, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, tracked)


@pytest.mark.parametrize("position", ["append", "prepend"])
@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
def test_a_group_of_coordinates_alone(padding_mode, position):
    """The published grouping may leave no channel of x beside them."""
    spec = CoordSpec(position=position)
    for groups, cin in ((2, 2), (3, 4)):
        tensors = [randn(2, cin, 5, 6), randn(2 * groups, 0, 3, 3), randn(2 * groups, 2, 3, 3), randn(2 * groups)]
        options = {"padding": 1, "groups": groups, "padding_mode": padding_mode, "spec": spec, "groups_mode": "concat"}
        assert_equals_definition(ff.coord_conv2d, by_concatenation, tensors, True, **options)


def test_padding_two_ways_is_the_same():
    x, weight, coord_weight = randn(1, 2, 5, 6), randn(3, 2, 3, 5), randn(3, 2, 3, 5)
    expected = by_concatenation(x, weight, coord_weight, None, 1, (1, 2))
    for padding in ((1, 2), [1, 2], "same", torch.Size([1, 2])):
        assert_equal(ff.coord_conv2d(x, weight, coord_weight, padding=padding), expected, str(padding))
    assert_equal(ff.coord_conv2d(x, weight, coord_weight, None, (1,), (1, 2), (1,)), expected, "one number for all axes")


# ---- rounding ------------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("dtype", battery.FLOATING)
def test_dtypes_and_memory_orders(dtype, activation):
    """x's own dtype, memory order and nothing lost but two roundings: the convolution's and the result's."""
    for r, size, kernel, batch, stride in (
        (None, (9, 12), 3, 2, 1), ("center", (5, 33), 3, 3, 2), (None, (7, 8), 1, 1, 1), (None, (1, 9), 3, 2, 1),
        ("unitmax", (2, 2), 5, 2, 1), (None, (6, 5), 3, 0, 1),
    ):  # fmt: skip
        spec = CoordSpec(r=r)
        tensors = [randn(batch, 3, *size), randn(17, 3, kernel, kernel), randn(17, spec.channels(2), kernel, kernel), randn(17)]
        tensors = [t.to(dtype) for t in tensors]
        options = {"padding": kernel // 2, "stride": stride, "spec": spec, "activation": activation}
        for place, x in places(tensors[0]):
            exact = by_concatenation(*[t.double() for t in (x, *tensors[1:])], **options)
            plain = F.conv2d(x, tensors[1], tensors[3], stride, kernel // 2)
            for grad in (False, True):
                y = ff.coord_conv2d(x, *tensors[1:3], tensors[3].clone().requires_grad_(grad), **options)
                label = f"{place}, {size}, batch {batch}, grad {grad}"
                assert y.dtype == dtype, label
                assert y.stride() == plain.stride(), label
                # The vendor's convolution of numbers of this size, then one more rounding.
                share = 4 * torch.finfo(dtype).eps
                scale = F.conv2d(x.double().abs(), tensors[1].double().abs(), tensors[3].double().abs(), stride, kernel // 2)
                error = (y.double() - exact).abs()
                assert (error <= share * (scale + exact.abs() + 1)).all(), f"{label}: {error.max()}"


def places(x: Tensor) -> list[tuple[str, Tensor]]:
    found = [(name, view.copy_(x)) for name, _whole, view in battery.storages(tuple(x.shape), x.dtype)]
    return [*found, ("expanded", x[:1].expand_as(x))]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_map_is_rounded_once(dtype):
    """With a convolution that is exact in dtype, the result is the float64 one, rounded."""
    x = (torch.randint(-4, 5, (2, 3, 40, 50)) / 4).to(dtype)
    weight, coord_weight = torch.zeros(8, 3, 3, 3, dtype=dtype), randn(8, 3, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = 1
    exact = by_concatenation(x.double(), weight.double(), coord_weight.double(), padding=1, spec=CoordSpec(r="center"))
    for order in (torch.contiguous_format, torch.channels_last):
        y = ff.coord_conv2d(x.contiguous(memory_format=order), weight, coord_weight, padding=1, spec=CoordSpec(r="center"))
        assert_close(y, exact, str(order), slack=1 if dtype != torch.float32 else 4)
    float_map = ff.coord_conv2d(x, weight, coord_weight.float(), padding=1, spec=CoordSpec(r="center"))
    assert_close(float_map, exact, "coord_weight kept in float32", slack=1 if dtype != torch.float32 else 4)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_coordinates_do_not_collide(dtype, axis):
    """At 1333 pixels neighbours stay apart; in a concatenation they fall together.

    The weight takes the difference of neighbours, so that what is seen is how exactly they were known.
    """
    n = 1333
    size = (n, 1) if axis == 0 else (1, n)
    x = torch.zeros(1, 1, *size, dtype=dtype)
    coord_weight = torch.zeros(1, 2, *((2, 1) if axis == 0 else (1, 2)), dtype=dtype)
    coord_weight[0, axis].view(-1)[0], coord_weight[0, axis].view(-1)[1] = -1, 1
    weight = torch.zeros(1, 1, *coord_weight.shape[2:], dtype=dtype)
    steps = ff.coord_conv2d(x, weight, coord_weight).double().flatten()
    assert steps.numel() == n - 1
    assert (steps > 0).all()
    assert ((steps - 2 / (n - 1)).abs() < 1e-5).all()
    as_aten = torch.func.vmap(lambda x: ff.coord_conv2d(x, weight, coord_weight))(x[None])[0].double().flatten()
    assert ((as_aten - 2 / (n - 1)).abs() < 1e-5).all()
    concat = F.conv2d(ff.add_coords(x), torch.cat([weight, coord_weight], 1)).double().flatten()
    if dtype == torch.bfloat16:
        assert (concat == 0).sum() > 400
    assert ((concat - 2 / (n - 1)).abs().max() > 10 * (steps - 2 / (n - 1)).abs().max()).item()


@pytest.mark.kernel
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
def test_nan_stays_in_its_place(activation):
    x = randn(2, 2, 9, 10, dtype=torch.float32)
    x[1, 0, 4, 5] = float("nan")
    weight, coord_weight = randn(4, 2, 3, 3, dtype=torch.float32), randn(4, 2, 3, 3, dtype=torch.float32)
    for order in (torch.contiguous_format, torch.channels_last):
        y = ff.coord_conv2d(x.contiguous(memory_format=order), weight, coord_weight, padding=1, activation=activation)
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[1, :, 3:6, 4:7] = True
        assert torch.equal(y.isnan(), expected)


# ---- what is kept for backward -------------------------------------------------------------------------------------------


def kept(function: Any) -> list[tuple[int, int]]:
    """(address, bytes) of what is saved for backward."""
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    saved.pop(0, None)
    assert result.requires_grad
    return sorted(saved.items())


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_what_the_plain_convolution_keeps(dtype, order, activation):
    """And no more than coord_weight beside it."""
    x = randn(2, 16, 32, 32, dtype=dtype).contiguous(memory_format=order).requires_grad_()
    layer = ff.nn.CoordConv2d(16, 8, 3, padding=1, with_r=True, activation=activation, dtype=dtype)
    plain = kept(lambda: ACTIVATIONS[activation](F.conv2d(x, layer.weight, layer.bias, padding=1)))
    ours = kept(lambda: layer(x))
    assert len(ours) <= len(plain) + 1
    sizes, expected = sum(size for _, size in ours), sum(size for _, size in plain)
    assert expected > 16 * 2 * 32 * 32 * dtype.itemsize
    assert sizes <= expected + layer.coord_weight.numel() * dtype.itemsize
    assert x.data_ptr() in dict(ours)


# ---- CoordSpec -----------------------------------------------------------------------------------------------------------


def test_spec_is_a_value():
    spec = CoordSpec("ji", r="center")
    assert spec == CoordSpec(order="ji", position="append", norm="corners", r="center")
    assert spec != CoordSpec()
    assert len({spec, CoordSpec("ji", r="center"), CoordSpec()}) == 2
    assert repr(spec) == "CoordSpec(order='ji', position='append', norm='corners', r='center')"
    assert eval(repr(spec)) == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.order = "ij"


def test_presets():
    fields = {name: dataclasses.astuple(CoordSpec.preset(name)) for name in PRESETS}
    assert fields == {
        "paper": ("ij", "append", "corners", None),
        "uber_legacy": ("ji", "append", "corners_swapped", None),
        "mkocabas": ("ij", "append", "corners", None),
        "walsvid": ("ij", "append", "corners", None),
        "wizaron": ("ij", "prepend", "corners", None),
        "keras": ("ij", "append", "corners", None),
        "solo": ("ji", "append", "corners", None),
        "paddle": ("ji", "append", "corners", None),
        "paddle_develop": ("ji", "append", "corners_quarter", None),
    }
    radii = {name: CoordSpec.preset(name, with_r=True).r for name in PRESETS[:6]}
    assert radii == {"paper": "center", "uber_legacy": "center", "mkocabas": "offset0.5", "walsvid": "offset0.5",
                     "wizaron": "unitmax", "keras": "offset0.5"}  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("r", RADII)
def test_axis_of_size_one_is_zero(norm, r):
    """Never NaN, and the radius neither."""
    spec = CoordSpec(norm=norm, r=r)
    for size in ((1, 1), (1, 5), (5, 1)):
        coords = ff.add_coords(torch.ones(1, 1, *size), spec)[0, 1:]
        assert coords.isfinite().all()
        for axis in range(2):
            if size[axis] == 1:
                assert not coords[axis].any()
        weight = torch.ones(2, 1, 3, 3)
        layer = ff.coord_conv2d(torch.ones(1, 1, *size), weight, torch.ones(2, spec.channels(2), 3, 3), padding=1, spec=spec)
        assert layer.isfinite().all()


# ---- add_coords ----------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", battery.FLOATING)
@pytest.mark.parametrize("size", [(7,), (5, 6), (2, 3, 4), (1, 4)])
def test_add_coords(size, dtype):
    for order, position, norm, r in itertools.product(("ij", "ji"), ("append", "prepend"), NORMS, RADII):
        spec = CoordSpec(order, position, norm, r)
        coords = coordinates(size, spec).to(dtype)
        for channels, last in ((3, False), (3, True), (6, True)):  # in channels_last order, few go another way than many
            x = randn(2, channels, *size, dtype=dtype)
            x = in_channels_last(x, 1) if last else x
            result = ff.add_coords(x, spec)
            parts = (result[:, :channels], result[:, channels:])
            own, added = parts if position == "append" else (result[:, -channels:], result[:, :-channels])
            assert result.dtype == dtype
            assert torch.equal(own, x)
            torch.testing.assert_close(added, coords.expand_as(added), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("preset", PRESETS)
def test_add_coords_of_presets(preset):
    for with_r in (False, True) if preset in PRESETS[:6] else (False,):
        spec = CoordSpec.preset(preset, with_r=with_r)
        result = ff.add_coords(torch.zeros(1, 1, 4, 7, dtype=torch.float64), spec)
        added = result[0, :-1] if spec.position == "prepend" else result[0, 1:]
        assert_equal(added, coordinates((4, 7), spec), preset)


@pytest.mark.parametrize("position", ["append", "prepend"])
def test_add_coords_keeps_the_memory_order(position):
    spec = CoordSpec(position=position)
    for channels in (3, 6):
        for size, order in (((5, 6), torch.channels_last), ((4, 5, 6), torch.channels_last_3d)):
            x = randn(2, channels, *size)
            assert ff.add_coords(x, spec).is_contiguous()
            assert ff.add_coords(x.contiguous(memory_format=order), spec).is_contiguous(memory_format=order)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_add_coords_of_batches_of_any_size(order, monkeypatch):
    """What is kept for one is not used for another, nor is it needed."""
    x = randn(5, 6, 3, 4).contiguous(memory_format=order)
    whole = ff.add_coords(x)
    for samples in (1, 2, 5):
        assert torch.equal(ff.add_coords(x[:samples]), whole[:samples])
    monkeypatch.setattr(coordconv, "_KEPT_POSITIONS", 0)
    assert torch.equal(ff.add_coords(x), whole)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_add_coords_passes_the_gradient_on(order):
    x = randn(2, 3, 4, 5).contiguous(memory_format=order).requires_grad_()
    result = ff.add_coords(x)
    assert result.is_contiguous(memory_format=order)
    weights = battery.numbers(result)
    (gradient,) = torch.autograd.grad(result, x, weights)
    assert_same(gradient, weights[:, :3], "gradient")
    assert gradcheck(ff.add_coords, (x,), check_forward_ad=True)
