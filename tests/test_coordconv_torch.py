"""The CoordConvs inside torch's machinery: transforms, autocast, compilers, exporters, threads."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import battery
import fourfold as ff
import pytest
import torch
import torch.nn.functional as F
from battery import assert_close, assert_same
from fourfold import CoordSpec
from fourfold.ops import _coord_plan
from test_coordconv import geometry, in_channels_last, randn
from test_coordconv_functions import by_concatenation
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

WITH_R = CoordSpec(r="center")


def parameters(dtype: torch.dtype = torch.float64, cin: int = 3, cout: int = 5, nc: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return randn(cout, cin, 3, 3, dtype=dtype), randn(cout, nc, 3, 3, dtype=dtype, seed=1), randn(cout, dtype=dtype)


# ---- transforms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
def test_func_transforms(activation):
    """grad, jvp, dual numbers, vmap over each argument, vmap of grad: as of the definition."""
    options = {"padding": 1, "spec": WITH_R, "activation": activation}
    tensors = (randn(2, 3, 5, 6), *parameters())
    every, tangents = (0, 1, 2, 3), tuple(battery.numbers(t, i) for i, t in enumerate((randn(2, 3, 5, 6), *parameters())))

    def ours(*args: Tensor) -> Tensor:
        return ff.coord_conv2d(*args, **options)

    def exact(*args: Tensor) -> Tensor:
        return by_concatenation(*args, **options)

    weighted = [battery.weighted(f, battery.numbers(exact(*tensors))) for f in (ours, exact)]
    pairs = [*zip(torch.func.grad(weighted[0], every)(*tensors), torch.func.grad(weighted[1], every)(*tensors), strict=True)]
    pairs += zip(torch.func.jvp(ours, tensors, tangents), torch.func.jvp(exact, tensors, tangents), strict=True)
    for i in every:
        with forward_ad.dual_level():
            duals = [*tensors]
            duals[i] = forward_ad.make_dual(tensors[i], tangents[i])
            pairs.append((forward_ad.unpack_dual(ours(*duals)).tangent, forward_ad.unpack_dual(exact(*duals)).tangent))
        in_dims = tuple(0 if k == i else None for k in every)
        stacked = [torch.stack([t, 2 * t]) if k == i else t for k, t in enumerate(tensors)]
        results = torch.func.vmap(ours, in_dims)(*stacked)
        gradients = torch.func.vmap(torch.func.grad(weighted[0], every), in_dims)(*stacked)
        for sample in range(2):
            alone = [t[sample] if k == i else t for k, t in enumerate(stacked)]
            pairs.append((results[sample], exact(*alone)))
            pairs += zip([g[sample] for g in gradients], torch.func.grad(weighted[1], every)(*alone), strict=True)
    for actual, expected in pairs:
        assert_close(actual, expected, str(activation), slack=100)


# ---- autocast, modes, tensors without memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_autocast(activation):
    """x and weight in bfloat16; the map in float32, from the parameters as they are, rounded once with the sum."""
    x, (weight, coord_weight, bias) = randn(2, 3, 8, 700, dtype=torch.float32), parameters(torch.float32)
    coord_weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ff.coord_conv2d(x, weight, coord_weight, bias, padding=1, spec=WITH_R, activation=activation)
    half = [t.bfloat16() for t in (x, weight, bias)]
    expected = ff.coord_conv2d(half[0], half[1], coord_weight, half[2], padding=1, spec=WITH_R, activation=activation)
    assert y.dtype == torch.bfloat16
    assert_same(y, expected, "autocast")
    rounded = ff.coord_conv2d(half[0], half[1], coord_weight.bfloat16(), half[2], padding=1, spec=WITH_R, activation=activation)
    assert not torch.equal(y, rounded)
    y.float().sum().backward()
    assert coord_weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        double = ff.coord_conv2d(x.double(), weight.double(), coord_weight.double(), spec=WITH_R)
    assert double.dtype == torch.float64


def test_autocast_trains_float32_parameters():
    layer = ff.nn.CoordConv2d(3, 5, 3, activation="relu")
    with torch.autocast("cpu", torch.bfloat16):
        layer(randn(2, 3, 6, 6, dtype=torch.float32)).sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_training_after_inference_mode():
    """What is kept between calls serves both, whichever comes first."""
    layer, x = ff.nn.CoordConv2d(3, 5, 3, with_r=True), randn(1, 3, 23, 29, dtype=torch.float32)
    _coord_plan.plan_of.cache_clear(), _coord_plan.kept_radius.cache_clear(), _coord_plan.kept_coordinates.cache_clear()
    with torch.inference_mode():
        y, added = layer(x), ff.add_coords(x)
        assert y.is_inference()
    trained = layer(x)
    trained.sum().backward()
    assert_same(trained.detach(), y.clone(), "result")
    leaf = x.clone().requires_grad_()
    ff.add_coords(leaf).square().sum().backward()
    assert_same(ff.add_coords(x), added.clone(), "add_coords")
    with torch.inference_mode():
        inference = x.clone()
    with torch.no_grad():
        assert_same(layer(inference), y.clone(), "an inference tensor outside")


@pytest.mark.parametrize("keep", [_coord_plan.kept_radius, _coord_plan.kept_coordinates])
def test_what_is_kept_are_ordinary_tensors(keep):
    """Also what is made in inference mode: autograd could not save it later."""
    cpu = torch.device("cpu")
    keep.cache_clear(), _coord_plan.plan_of.cache_clear()
    with torch.inference_mode():
        kept = keep((4, 5), WITH_R, torch.float32, cpu)
        plan = _coord_plan.plan_of(geometry((4, 5)), WITH_R, torch.float32, cpu)
    assert not any(t.is_inference() for t in (kept, plan.taps, plan.valid, plan.classes))


def test_nothing_that_depends_on_a_parameter_is_kept():
    """However the parameter is written."""
    layer, x = ff.nn.CoordConv2d(3, 5, 3), randn(1, 3, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        before = layer(x)
        layer.coord_weight.data.mul_(2)
        after = layer(x)
        assert not torch.equal(before, after)
        assert_same(after, ff.coord_conv2d(x, layer.weight, layer.coord_weight, layer.bias), "written through .data")
        torch.from_numpy(layer.coord_weight.numpy())[:] = 0
        assert_same(layer(x), F.conv2d(x, layer.weight, layer.bias), "written through numpy")


@pytest.mark.parametrize("activation", [None, "silu"])
def test_tensors_without_memory(activation):
    """Fake and meta tensors: shape, dtype, and memory order as of real ones, forward and backward."""
    for layer_class, options in ((ff.nn.CoordConv2d, {"padding": 1}), (ff.nn.CoordConvTranspose2d, {"stride": 2})):
        layer = layer_class(3, 5, 3, with_r=True, activation=activation, **options)
        for x in (randn(2, 3, 6, 7, dtype=torch.float32), in_channels_last(randn(2, 3, 6, 7, dtype=torch.float32), 1)):
            real = layer(x)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = layer(mode.from_tensor(x))
                fake.sum().backward()
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
            layer.zero_grad()
            assert layer_class(3, 5, 3, device="meta", **options)(x.to("meta")).shape == real.shape
    assert ff.add_coords(torch.zeros(2, 3, 4, 5, device="meta")).shape == (2, 5, 4, 5)


def test_empty_batch():
    for activation in (None, "relu", "gelu"):
        for layer in (ff.nn.CoordConv2d(3, 5, 3, with_r=True, activation=activation),
                      ff.nn.CoordConv2d(3, 5, 3, padding=1, padding_mode="reflect", activation=activation),
                      ff.nn.CoordConvTranspose2d(3, 5, 3, activation=activation)):  # fmt: skip
            x = torch.zeros(0, 3, 6, 7, requires_grad=True)
            y = layer(x)
            assert y.shape[:2] == (0, 5)
            y.sum().backward()
            assert x.grad.shape == x.shape
            assert all(not p.grad.any() for p in layer.parameters())
            with torch.no_grad():
                assert layer(x).shape == y.shape


def test_calls_from_several_threads():
    """The same bits as alone, with plans made at the same moment."""
    layer = ff.nn.CoordConv2d(3, 5, 3, padding=1, with_r=True, activation="relu")
    sizes = [(1, 3, n, n + 2) for n in range(5, 25)]
    expected = [torch.autograd.grad(layer(randn(*s, dtype=torch.float32)).sum(), layer.coord_weight)[0] for s in sizes]
    _coord_plan.plan_of.cache_clear()
    wrong: list[Any] = []

    def work() -> None:
        try:
            for size, exact in zip(sizes, expected, strict=True):
                got = torch.autograd.grad(layer(randn(*size, dtype=torch.float32)).sum(), layer.coord_weight)[0]
                if not torch.equal(got, exact):
                    wrong.append(size)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.kernel
def test_any_number_of_threads_gives_the_same_bits():
    """The map, its gradients and the batch sum; the vendor's convolution is left out by a weight of zeros."""
    x, coord_weight = randn(9, 3, 70, 60, dtype=torch.float32), randn(40, 3, 3, 3, dtype=torch.float32).requires_grad_()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for order in (torch.contiguous_format, torch.channels_last):
            batch = x.contiguous(memory_format=order)
            y = ff.coord_conv2d(batch, torch.zeros(40, 3, 3, 3), coord_weight, padding=1, spec=WITH_R)
            results.append((y.detach(), torch.autograd.grad(y, coord_weight, battery.numbers(y))[0][:, :2]))
    for one, two in zip(results[:2], results[2:], strict=True):
        assert_same(two[0], one[0], "result")
        assert_same(two[1], one[1], "gradient")


@pytest.mark.kernel
def test_gradient_of_a_sum():
    """Its gradient is one number, expanded."""
    for activation in (None, "relu", "silu"):
        x, (weight, coord_weight, bias) = randn(2, 3, 5, 6), parameters()
        tensors = [t.requires_grad_() for t in (x, weight, coord_weight, bias)]
        ours = torch.autograd.grad(ff.coord_conv2d(*tensors, spec=WITH_R, activation=activation).sum(), tensors)
        exact = torch.autograd.grad(by_concatenation(*tensors, spec=WITH_R, activation=activation).sum(), tensors)
        for got, want in zip(ours, exact, strict=True):
            assert_close(got, want, str(activation), slack=100)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradients_of_some(needed, activation):
    tensors = [randn(2, 3, 5, 6), *parameters()]
    for i in needed:
        tensors[i].requires_grad_()
    wanted = [tensors[i] for i in needed]
    ours = torch.autograd.grad(ff.coord_conv2d(*tensors, spec=WITH_R, activation=activation).square().sum(), wanted)
    exact = torch.autograd.grad(by_concatenation(*tensors, spec=WITH_R, activation=activation).square().sum(), wanted)
    for got, want in zip(ours, exact, strict=True):
        assert_close(got, want, str(needed), slack=100)


# ---- compilers and exporters ---------------------------------------------------------------------------------------------


def layers() -> dict[str, tuple[nn.Module, Tensor]]:
    x = randn(2, 3, 9, 11, dtype=torch.float32)
    return {
        "relu": (ff.nn.CoordConv2d(3, 5, 3, padding=1, activation="relu"), x),
        "radius": (ff.nn.CoordConv2d(3, 5, 3, stride=2, with_r=True, activation="silu"), x),
        "unitmax": (ff.nn.CoordConv2d(3, 6, 3, groups=3, spec=CoordSpec("ji", "prepend", "dim", "unitmax")), x),
        "1x1": (ff.nn.CoordConv2d(3, 5, 1, activation="gelu"), x),
        "same": (ff.nn.CoordConv2d(3, 5, 4, padding="same"), x),
        "reflect": (ff.nn.CoordConv2d(3, 5, 3, padding=1, padding_mode="reflect"), x),
        "transposed": (ff.nn.CoordConvTranspose2d(3, 5, 3, stride=2, activation="relu"), x),
        "1d": (ff.nn.CoordConv1d(3, 5, 3, padding=1), randn(2, 3, 9, dtype=torch.float32)),
        "3d": (ff.nn.CoordConv3d(3, 5, 3, padding=1), randn(2, 3, 6, 7, 8, dtype=torch.float32)),
        "add_coords": (ff.nn.AddCoords(with_r=True), x),
    }  # fmt: skip


LAYERS = [pytest.param(*pair, id=name) for name, pair in layers().items()]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def longer(x: Tensor) -> Tensor:
    """x in another batch and size."""
    return randn(3, x.shape[1], *(n + 2 + i for i, n in enumerate(x.shape[2:])), dtype=x.dtype)


def assert_compiled(layer: nn.Module, compiled: Any, x: Tensor) -> None:
    """As eager, with the gradients."""
    results = []
    for call in (compiled, layer):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), (leaf, *layer.parameters()))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("layer", "x"), LAYERS)
def test_compiles(layer, x, dynamic):
    """In one graph, of aten nodes only, and in one for all sizes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=dynamic)
    assert_compiled(layer, compiled, x)
    if dynamic:
        graphs = counter.frame_count
        assert_compiled(layer, compiled, longer(x))
        assert counter.frame_count == graphs
    assert not [n for graph in counter.graphs for n in graph.graph.nodes if "fourfold" in str(n.target)]


@pytest.mark.parametrize("name", ["relu", *(pytest.param(name, marks=pytest.mark.slow) for name in layers() if name != "relu")])
def test_compiles_with_inductor(name):
    layer, x = layers()[name]
    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
        for size in (x, longer(x)) if dynamic else (x,):
            assert_compiled(layer, compiled, size)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("layer", "x"), LAYERS)
def test_exports(layer, x, dynamic):
    """To aten alone; with dynamic sizes too."""
    dims = {0: torch.export.Dim("batch")} | {i: torch.export.Dim(f"size{i}", min=6, max=99) for i in range(2, x.dim())}
    program = torch.export.export(layer, (x,), dynamic_shapes=(dims,) if dynamic else None)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls
    assert all(name.startswith(("aten.", "<built-in function", "sym_", "<function sym")) for name in calls), calls
    for size in (x, longer(x)) if dynamic else (x,):
        torch.testing.assert_close(program.module()(size), layer(size), **CLOSE)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
def test_traces():
    layer, x = layers()["relu"]
    traced = torch.jit.trace(layer, (x,))
    torch.testing.assert_close(traced(x), layer(x), **CLOSE)
    assert not [node for node in traced.inlined_graph.nodes() if "fourfold" in node.kind()]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("norm", _coord_plan.NORMS)
def test_open_sizes_may_be_one(norm):
    """A graph made at one size gives 0 on an axis of size 1 too, under every norm."""
    layer = ff.nn.CoordConv2d(3, 4, 1, spec=CoordSpec(norm=norm, r="unitmax"))
    x = randn(2, 3, 9, 11, dtype=torch.float32)
    dims = {2: torch.export.Dim("height", min=1), 3: torch.export.Dim("width", min=1)}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(dims,)).module()
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    for size in ((9, 11), (1, 6), (5, 1), (1, 1), (4, 7)):
        x = randn(2, 3, *size, dtype=torch.float32)
        torch.testing.assert_close(exported(x), layer(x), **CLOSE)
        torch.testing.assert_close(traced(x), layer(x), **CLOSE)


def test_default_device_does_not_matter():
    """Tensors of ours are made where the input is, whatever device is the default at the first call."""
    layer, x = ff.nn.CoordConv2d(3, 4, (5, 2), with_r=True), randn(2, 3, 19, 23, dtype=torch.float32)
    with torch.device("meta"):
        y = layer(x)
    torch.testing.assert_close(y, layer(x))


#: What is left of a layer whose sizes are constants: its map is folded into one.
STATIC_NODES = {
    "relu": ["Add", "Conv", "Relu"], "radius": ["Add", "Conv", "Mul", "Sigmoid"], "unitmax": ["Add", "Conv"],
    "1x1": ["Add", "Conv", "Gelu"], "same": ["Add", "Conv"], "reflect": ["Add", "Conv", "Pad"],
    "transposed": ["Add", "ConvTranspose", "Relu"], "1d": ["Add", "Conv"], "3d": ["Add", "Conv"],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the exporter warns about itself
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", STATIC_NODES)
def test_onnx(name, dynamic):
    """Standard nodes only; under onnxruntime at two sizes."""
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime; run: pip install onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript; run: pip install onnxscript")
    layer, x = layers()[name]
    dims = ({0: "batch", **{i: f"size{i}" for i in range(2, x.dim())}},) if dynamic else None
    model = torch.onnx.export(layer.eval(), (x,), dynamo=True, dynamic_shapes=dims, verbose=False).model_proto
    assert {node.domain for node in model.graph.node} == {""}
    nodes = Counter(node.op_type for node in model.graph.node)
    if not dynamic:
        assert sorted(nodes.elements()) == STATIC_NODES[name]
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in (x, longer(x)) if dynamic else (x,):
        (result,) = session.run(None, {session.get_inputs()[0].name: size.numpy()})
        torch.testing.assert_close(torch.from_numpy(result), layer(size), **CLOSE)
