"""The CoordConv functions and the four ops underneath: what tests/gpu/check.py checks and measures."""

import functools
import itertools
import math
import random

import fourfold as ff
import torch
import torch.nn.functional as F
from fourfold.ops import _coord_plan
from fourfold.reference import coordconv as reference
from gpu.harness import (
    DTYPES,
    Check,
    Contest,
    Speed,
    assert_close,
    assert_only_written,
    needs_gpu,
    needs_memory,
    placed,
    rotation,
    second_gpu,
)

FUNCTIONS = "coord_conv1d, coord_conv2d, coord_conv3d, coord_conv_transpose2d"
OPS = "_coord_tables, _add_map_, _batch_sum, _coord_tables_backward"
STYLES = ("contiguous", "last")
ACTIVATIONS = ("none", "relu", "silu", "gelu")
SENTINEL = 123.0


def work_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# ---- correctness ----


def in_order(t, last, channel=1):
    """t in a memory of its own, its channels innermost if last."""
    return t.movedim(channel, -1).contiguous().movedim(-1, channel) if last else t.contiguous()


def drawn_geometry(draw, rank):
    """Borders and phases of all kinds: several classes per axis, one, and as many as there are outputs."""

    def each(*values):
        return tuple(draw.choice(values) for _ in range(rank))

    size, kernel, stride, dilation = each(1, 3, 6, 9), each(1, 2, 3, 3 if rank == 3 else 5), each(1, 1, 2, 3), each(1, 1, 2)
    mode = draw.choice(("zeros", "zeros", "transposed", "circular"))
    before = tuple(draw.choice((0, (k - 1) * d // 2)) for k, d in zip(kernel, dilation, strict=True))
    # Any number of outputs has a meaning to a plan.
    out_size = each(1, 2, 4, 5) if rank == 3 else each(1, 2, 7, 8, 16)
    return _coord_plan.Geometry(size, out_size, kernel, stride, before, dilation, mode)


def drawn_plans(draw, rank, device, dtype):
    """A plan as the op gets it, the same in float64, and the number of coordinate channels."""
    spec = _coord_plan.CoordSpec(order=draw.choice(("ij", "ji")), norm=draw.choice(("corners", "none")))
    geometry = drawn_geometry(draw, rank)
    plans = [_coord_plan.plan_of(geometry, spec, kind, device) for kind in (work_type(dtype), torch.float64)]
    return *plans, rank + draw.choice((0, 1))


def tables_match(ops, rank, dtype, device, trials=6):
    """_coord_tables, of weights in several memory orders, and its way back, against float64."""
    draw = random.Random(f"{rank} {dtype}")
    torch.manual_seed(draw.randrange(2**31))
    for _ in range(trials):
        plan, exact, nc = drawn_plans(draw, rank, device, dtype)
        out, counts, kernel = plan.geometry.out_size, plan.class_count, plan.geometry.kernel
        cout = draw.choice((1, 3, 8, 20))
        what = f"{plan.geometry} cout={cout}"
        weight = torch.randn(cout, nc, *kernel).to(device, dtype)
        if draw.random() < 0.5:  # as a transposed convolution's comes
            weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
        expected = reference.coord_tables(weight.double(), exact.taps, exact.valid, out, counts, plan.channels, False)
        for last in (False, True):
            tables = ops._coord_tables(weight, plan.taps, plan.valid, out, counts, plan.channels, last)
            assert_close(tables, expected, f"_coord_tables {what}")
            assert (tables.T if last else tables).is_contiguous(), f"the order of {what}"

        for last in (False, True):
            grad = in_order(torch.randn(cout, *out).to(device, work_type(dtype)), last, 0)
            given = plan.valid, plan.classes, kernel, counts, plan.channels, nc
            results = ops._coord_tables_backward(grad, plan.taps, *given)
            expected_results = reference.coord_tables_backward(grad.double(), exact.taps, exact.valid, *given[1:])
            for result, right, name in zip(results, expected_results, ("coord_weight", "bias"), strict=True):
                assert result.is_contiguous()
                assert_close(result, right, f"gradient of {name}: {what} last={last}")


def add_map_matches(ops, rank, dtype, device, trials=2, rtol=None):
    """_add_map_ with each activation (in two dimensions; else one drawn, for each is compiled anew), in place and beside;
    nothing around y is written."""
    draw = random.Random(f"{rank} {dtype} added")
    torch.manual_seed(draw.randrange(2**31))
    work = work_type(dtype)
    for trial, style in itertools.product(range(trials), STYLES[: 1 if rank == 1 else 2]):
        plan, _, _ = drawn_plans(draw, rank, device, dtype)
        out, counts = plan.geometry.out_size, plan.class_count
        batch, cout = draw.choice((1, 2, 3, 5, 9)), draw.choice((1, 3, 8, 16))
        values = torch.randn(batch, cout, *out).to(device)
        what = f"{plan.geometry} batch={batch} cout={cout} {style}"
        # A single channel or output lies in both orders, and is then contiguous.
        last = not placed(values, dtype, style, 0.0)[1].is_contiguous()
        tables = in_order(torch.randn(cout, plan.table_length, dtype=work).to(device), last, 0)
        dense = in_order(torch.randn(cout, *out, dtype=work).to(device), last, 0) if trial % 2 else None
        given = tables, plan.classes, counts, dense
        _, plain = placed(values, dtype, style, SENTINEL)
        exact = plain.double() + reference.coord_map(tables.double(), plan.classes, out, counts)
        if dense is not None:
            exact = exact + dense.double()
        ops._add_map_(plain, *given, "none", None)
        assert_close(plain, exact, what, rtol)
        for activation in ACTIVATIONS[1:] if rank == 2 else draw.sample(ACTIVATIONS[1:], 1):
            memory, y = placed(values, dtype, style, SENTINEL)
            ops._add_map_(y, *given, activation, None)
            assert_close(y, reference.ACTIVATIONS[activation](plain.double()), f"{activation}: {what}", rtol)
            result = y.clone()
            assert_only_written(memory, y, SENTINEL)
            (memory, y), (beside, activated) = (placed(values, dtype, style, SENTINEL) for _ in range(2))
            ops._add_map_(y, *given, activation, activated)
            assert torch.equal(y, plain), f"{activation} beside: {what}"
            assert torch.equal(activated, result), f"{activation} beside: {what}"
            assert_only_written(memory, y, SENTINEL)
            assert_only_written(beside, activated, SENTINEL)


def add_map_to_many(ops, dtype, last, device, rtol=None):
    """So much of it that a program takes several images, and not all programs the same number."""
    torch.manual_seed(4)
    plan = plan_of_layer((64, 64), 3, device)
    tables = in_order(torch.randn(64, plan.table_length).to(device), last, 0)
    y = in_order(torch.randn(18, 64, 64, 64).to(device, dtype), last)
    exact = y.double() + reference.coord_map(tables.double(), plan.classes, (64, 64), plan.class_count)
    ops._add_map_(y, tables, plan.classes, plan.class_count, None, "relu", None)
    assert_close(y, exact.relu(), f"last={last}", rtol)


def batch_sum_matches(ops, dtype, device):
    torch.manual_seed(3)
    shapes = [
        (1, 3, 7),
        (70, 2, 9),
        (5, 8, 4, 6),
        (3, 1, 5, 1),
        (17, 3, 5, 7),
        (9, 8, 19, 19),
        (2, 16, 3, 4, 5),
        (33, 4, 2, 2, 3),
    ]
    for shape, style, relu in itertools.product(shapes, STYLES, (False, True)):
        if len(shape) == 3 and style == "last":
            continue
        _, grad = placed(torch.randn(shape).to(device), dtype, style, math.nan)
        output = None
        if relu:  # zero, below it, and NaN, which keeps its gradient
            output = torch.randn(shape).to(device, dtype).relu_()
            output.flatten()[:: max(1, output.numel() // 3)] = math.nan
            output.flatten()[1::7] = -1
            output = in_order(output, not grad.is_contiguous())
        what = f"{shape} {style} relu={relu}"
        total, kept = ops._batch_sum(grad, output)
        expected_total, expected_kept = reference.batch_sum(grad.double(), output)
        assert_close(total, expected_total, what)
        assert total.dtype == work_type(dtype)
        assert torch.equal(kept, expected_kept.to(dtype)), f"kept: {what}"
        last = not grad.is_contiguous()
        assert (total.movedim(0, -1) if last else total).is_contiguous(), what
        assert not relu or kept.stride() == grad.stride(), what
        again, _ = ops._batch_sum(grad, output)
        assert torch.equal(again, total), f"not the same twice: {what}"


def nothing_to_do(ops, device):
    """Batches of none, through every op that has a batch."""
    plan = plan_of_layer((4, 5), 3, device)
    tables = torch.randn(6, plan.table_length).to(device)
    y = torch.zeros(0, 6, 4, 5, device=device)
    ops._add_map_(y, tables, plan.classes, plan.class_count, None, "relu", None)
    assert y.shape == (0, 6, 4, 5)
    for output in (None, y):
        total, kept = ops._batch_sum(y, output)
        assert torch.equal(total, torch.zeros(6, 4, 5, device=device))
        assert kept.shape == ((0,) if output is None else y.shape)


def not_numbers(ops, device):
    """NaN stays NaN through every activation, and nothing else becomes one."""
    plan = plan_of_layer((8, 8), 1, device)
    tables = torch.randn(16, plan.table_length).to(device)
    for activation, dtype in itertools.product(ACTIVATIONS, (torch.float32, torch.float16)):
        y = torch.randn(3, 16, 8, 8).to(device, dtype)
        y.flatten()[::5] = math.nan
        where = y.isnan()
        ops._add_map_(y, tables, plan.classes, plan.class_count, None, activation, None)
        assert torch.equal(y.isnan(), where), activation


@functools.cache
def layers():
    """(public function, its rank, the plain convolution, options of both), one by one."""
    spec = ff.CoordSpec(order="ji", norm="dim", r="center")
    transposed = ff.coord_conv_transpose2d, F.conv_transpose2d
    return [
        (ff.coord_conv1d, F.conv1d, {"padding": 2, "dilation": 2}, {}),
        (ff.coord_conv1d, F.conv1d, {"stride": 2, "padding": 1}, {"spec": spec, "activation": "relu"}),
        (ff.coord_conv2d, F.conv2d, {"padding": 1}, {"activation": "relu"}),
        (ff.coord_conv2d, F.conv2d, {"stride": 2, "padding": 1, "groups": 2}, {"spec": spec, "activation": "gelu"}),
        (ff.coord_conv2d, F.conv2d, {"padding": (1, 0)}, {"activation": "silu"}),
        (ff.coord_conv3d, F.conv3d, {"padding": 1, "stride": (1, 2, 1)}, {"activation": "relu"}),
        (*transposed, {"stride": 2, "padding": 1, "output_padding": 1}, {"activation": "relu"}),
        (*transposed, {"stride": 3, "groups": 2, "dilation": 2}, {"spec": spec, "activation": "silu"}),
    ]


def whole_matches(dtype, last, device):
    """Each function and its gradients against the concatenation in float64, in the memory format that came in.

    float64 is compared strictly. Coarser types bring the vendor's own rounding: of the convolution (twice, in 16 bits, once
    more than the result's), and of the products in its gradients.
    """
    torch.manual_seed(1)
    share = {torch.float64: None, torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    for function, convolve, options, more in layers():
        rank = int(function.__name__[-2])
        if last and rank == 1:
            continue
        spec, activation = more.get("spec") or ff.CoordSpec(), more.get("activation")
        size, groups = (7, 10, 6)[:rank], options.get("groups", 1)
        nc, transposed = spec.channels(rank), convolve is F.conv_transpose2d
        shape = (4, 6 // groups, *(3,) * rank) if transposed else (6, 4 // groups, *(3,) * rank)
        coord_shape = (nc, 6, *(3,) * rank) if transposed else (6, nc, *(3,) * rank)
        given = [torch.randn(s).to(device, dtype) for s in ((3, 4, *size), shape, coord_shape, (6,))]
        given[0] = in_order(given[0], last)
        ours = [t.clone().requires_grad_() for t in given]
        exact = [t.double().requires_grad_() for t in given]
        y = function(*ours, **options, **more)
        coords = _coord_plan.coordinates(size, spec, torch.float64, device)
        expected = concatenated(*exact, coords, groups, convolve, {k: v for k, v in options.items() if k != "groups"})
        if activation == "relu":  # what 16 bits round to the other side of zero has another gradient, and rightly
            expected = expected * (y > 0)
        elif activation:
            expected = reference.ACTIVATIONS[activation](expected)
        grad = in_order(torch.randn(expected.shape).to(device, dtype), last)
        y.backward(grad)
        expected.backward(grad.double())
        what = f"{function.__name__} {options} {more}"
        # In three dimensions the vendor decides about the order, and not all of them know channels_last there.
        order = convolve(*(t.detach() for t in (ours[0], ours[1], ours[3])), **options).stride()
        assert y.stride() == order and (not last or rank == 3 or not y.is_contiguous()), f"{what}: channels_last is lost"
        compare = assert_close if share is None else functools.partial(assert_near, share=share)
        compare(y.detach(), expected.detach(), what)
        for mine, right, name in zip(ours, exact, ("x", "weight", "coord_weight", "bias"), strict=True):
            assert mine.grad.dtype == dtype
            compare(mine.grad, right.grad, f"gradient of {name}: {what}")


def concatenated(x, weight, coord_weight, bias, coords, groups, convolve, options):
    """What the function stands for, as it is written down; a transposed convolution has its input channels first."""
    if convolve is not F.conv_transpose2d:
        call = functools.partial(convolve, **options)
        return reference.coord_conv(x, coords, weight, coord_weight, groups, lambda a, w, g: call(a, w, bias, groups=g))
    # A group's input channels are its share of x's and all coordinates; its weight's columns are its outputs.
    parts = []
    for g, (xs, ws, cs) in enumerate(zip(x.chunk(groups, 1), weight.chunk(groups), coord_weight.chunk(groups, 1), strict=True)):
        both = torch.cat([xs, coords.expand(len(x), *coords.shape)], 1)
        size = weight.shape[1]
        parts.append(convolve(both, torch.cat([ws, cs]), bias[g * size : (g + 1) * size], **options))
    return torch.cat(parts, 1)


def assert_near(result, expected, what, share):
    error = (result.double() - expected).abs().max()
    bound = share * (1 + expected.abs().max())
    assert bool(error <= bound), f"{what}: off by {(error / bound).item():.3g} times what is allowed"


def example(device, dtype=torch.float32):
    torch.manual_seed(2)
    last = torch.channels_last
    x = torch.randn(4, 8, 20, 28, device=device).to(dtype, memory_format=last)
    weights = [torch.randn(16, 8, 3, 3, device=device), torch.randn(16, 2, 3, 3, device=device), torch.randn(16, device=device)]
    return x.requires_grad_(), [w.to(dtype).requires_grad_() for w in weights]


def training_step(x, weights):
    """A result and its gradients."""
    y = ff.coord_conv2d(x, *weights, padding=1, activation="relu")
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], y.detach())]


def second_device(device):
    """Ops follow their tensors, whichever device is current."""
    second = second_gpu(device)
    x, weights = example(device)
    expected = training_step(x, weights)
    there = training_step(x.detach().to(second).requires_grad_(), [w.detach().to(second).requires_grad_() for w in weights])
    assert all(result.device == second for result in there)
    for result, right in zip(there, expected, strict=True):
        assert_near(result.to(device), right, "on the second device", 1e-4)


def captured(device):
    """A CUDA graph that holds a training step gives the right results when it is replayed on new data."""
    needs_gpu(device)
    x, weights = example(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            training_step(x, weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = training_step(x, weights)
    with torch.no_grad():
        for t in (x, *weights):
            t.normal_()
    graph.replay()
    torch.cuda.synchronize()
    for replayed, expected in zip(results, training_step(x, weights), strict=True):
        assert_near(replayed, expected.double(), "replayed", 1e-5)


def streamed(device):
    """Work goes to the current stream, where it waits for what comes first, here a long sleep and then the data."""
    needs_gpu(device)
    data, weights = example(device)
    expected = training_step(data, weights)
    x = torch.zeros_like(data)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        x.copy_(data.detach())
        results = training_step(x.requires_grad_(), weights)
    torch.cuda.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert_near(result, right.double(), "on another stream", 1e-5)


def unsynchronised(device):
    """No op waits for the device."""
    needs_gpu(device)
    x, weights = example(device)
    training_step(x, weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(x, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def add_map_beyond_31_bits(shape, last, device):
    """Images, or one image, of more than 2**31 elements; the first and the last channels are compared."""
    elements = math.prod(shape)
    needs_memory(device, 3 * elements)
    plan = plan_of_layer(shape[2:], 3, device)
    tables = in_order(torch.randn(shape[1], plan.table_length, device=device), last, 0)
    order = [shape[0], *shape[2:], shape[1]] if last else list(shape)
    y = torch.ones(order, dtype=torch.bfloat16, device=device)
    y = y.movedim(-1, 1) if last else y
    torch.ops.fourfold._add_map_(y, tables, plan.classes, plan.class_count, None, "relu", None)
    for channel in (slice(0, 1), slice(-1, None)):
        exact = reference.coord_map(tables[channel].double(), plan.classes, shape[2:], plan.class_count)
        for image in (0, -1):
            assert_close(y[image, channel], (1 + exact).relu(), f"{shape} last={last} {image} {channel}")


def batch_sum_beyond_31_bits(shape, device):
    elements = math.prod(shape)
    needs_memory(device, 4 * elements + 5 * elements // shape[0])
    grad = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    for end in (0, -1):
        grad[end].fill_(1.5)
        grad[end, -1, -1, -1] = -2
    total, kept = torch.ops.fourfold._batch_sum(grad, grad)
    count = min(2, shape[0])
    assert bool((total[:-1] == 1.5 * count).all())
    assert total[-1, -1, -2].item() == 1.5 * count
    assert total[-1, -1, -1].item() == 0
    assert kept[-1, -1, -1, -1].item() == 0
    assert kept[-1, -1, -1, -2].item() == 1.5


def compiled(device):
    x, weights = example(device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"

    def network(x, weight, coord_weight, bias):
        return ff.coord_conv2d(x, weight, coord_weight, bias, padding=1, activation="relu") * 2

    expected = network(x, *weights).double()
    assert_near(torch.compile(network, fullgraph=True, backend=backend)(x, *weights), expected, "compiled", 1e-5)


CHECKS = [
    *(
        Check(
            "_coord_tables, _coord_tables_backward",
            f"{name_of(dtype)} {rank}d",
            lambda device, case=(rank, dtype): tables_match(torch.ops.fourfold, *case, device),
            hot=rank == 2,
        )
        for dtype, rank in itertools.product((torch.float32, torch.float64), (2, 1, 3))
    ),
    *(
        Check(
            "_add_map_",
            f"{name_of(dtype)} {rank}d",
            lambda device, case=(rank, dtype): add_map_matches(torch.ops.fourfold, *case, device),
            hot=rank == 2,
        )
        for dtype, rank in itertools.product(DTYPES, (2, 1, 3))
    ),
    *(
        Check(
            "_add_map_",
            f"{name_of(dtype)} many images{', channels_last' if last else ''}",
            lambda device, case=(dtype, last): add_map_to_many(torch.ops.fourfold, *case, device),
            hot=True,
        )
        for dtype, last in itertools.product((torch.bfloat16, torch.float32), (True, False))
    ),
    *(
        Check(
            "_batch_sum",
            name_of(dtype),
            lambda device, dtype=dtype: batch_sum_matches(torch.ops.fourfold, dtype, device),
            hot=True,
        )
        for dtype in DTYPES
    ),
    Check("_add_map_, _batch_sum", "empty", lambda device: nothing_to_do(torch.ops.fourfold, device)),
    Check("_add_map_", "NaN", lambda device: not_numbers(torch.ops.fourfold, device)),
    *(
        Check(
            FUNCTIONS,
            f"{name_of(dtype)} against the concatenation{', channels_last' if last else ''}",
            functools.partial(whole_matches, dtype, last),
            hot=dtype in (torch.float64, torch.bfloat16),
        )
        for dtype, last in itertools.product((torch.float64, torch.bfloat16, torch.float32, torch.float16), (False, True))
    ),
    Check(f"{OPS}, coord_conv2d", "stream", streamed),
    Check(f"{OPS}, coord_conv2d", "CUDA graph", captured),
    Check(f"{OPS}, coord_conv2d", "second device", second_device),
    Check(f"{OPS}, coord_conv2d", "no synchronisation", unsynchronised),
    Check("coord_conv2d", "torch.compile", compiled),
    *(
        Check(
            "_add_map_",
            f"more than 2**31 elements {list(shape)}{' channels_last' if last else ''}",
            functools.partial(add_map_beyond_31_bits, shape, last),
        )
        for shape, last in itertools.product(((9, 64, 2048, 2048), (1, 136, 4096, 4096)), (False, True))
    ),
    *(
        Check("_batch_sum", f"more than 2**31 elements {list(shape)}", functools.partial(batch_sum_beyond_31_bits, shape))
        for shape in ((9, 64, 2048, 2048), (1, 136, 4096, 4096))
    ),
]


# ---- speed ----

# name, batch, channels in and out, kernel, stride, size: the layers that design and CPU benchmarks are measured on
LAYERS = {
    "paper 1x1": (32, 2, 32, 1, 1, (64, 64)),
    "stem 3x3": (32, 3, 64, 3, 1, (64, 64)),
    "3x3 64": (16, 64, 64, 3, 1, (64, 64)),
    "1x1 64": (32, 64, 64, 1, 1, (64, 64)),
    "1x1 256": (16, 256, 64, 1, 1, (64, 64)),
    "3x3 stride 2": (16, 16, 32, 3, 2, (128, 128)),
    "SOLO 3x3": (1, 256, 256, 3, 1, (50, 76)),
    "CondInst 1x1": (16, 8, 8, 1, 1, (100, 136)),
    "PP-YOLO 1x1": (8, 512, 256, 1, 1, (19, 19)),
}


def layer_shapes(layer, small):
    """Shapes of x and y, and the kernel and stride."""
    batch, cin, cout, kernel, stride, size = LAYERS[layer]
    batch, size = (1, tuple(min(n, 16) for n in size)) if small else (batch, size)
    return (batch, cin, *size), (batch, cout, *(math.ceil(n / stride) for n in size)), kernel, stride


def in_channels_last(shape, dtype, device):
    return torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)


def with_gradients(call, leaves):
    """call, and the gradients of its sum's square in x and leaves; the first leaf's comes back."""

    def step(x):
        x = x.detach().requires_grad_()
        y = call(x)
        return torch.autograd.grad(y, [*leaves, x], y.detach())[0]

    return step


def without_gradients(call):
    def step(x):
        with torch.no_grad():
            return call(x)

    return step


def layer_contest(layer, dtype, backward, device, small):
    """A CoordConv with ReLU, against the convolution with ReLU alone and against the concatenation.

    Coordinates count for nothing here (their weights are zero), so that all give one result; no speed depends on that.
    """
    x_shape, y_shape, kernel, stride = layer_shapes(layer, small)
    cin, cout = x_shape[1], y_shape[1]
    scale = (cin * kernel * kernel) ** -0.5
    weight = (in_channels_last((cout, cin, kernel, kernel), torch.float32, device) * scale).to(dtype).requires_grad_(backward)
    bias = torch.zeros(cout, dtype=dtype, device=device, requires_grad=backward)
    coord_weight = torch.zeros(cout, 2, kernel, kernel, dtype=dtype, device=device, requires_grad=backward)
    options = {"stride": stride, "padding": kernel // 2}
    spec = ff.CoordSpec()
    coords = _coord_plan.coordinates(x_shape[2:], spec, torch.float32, device).to(dtype)[None]
    coords = coords.expand(x_shape[0], *coords.shape[1:]).contiguous(memory_format=torch.channels_last)

    def ours(x):
        return ff.coord_conv2d(x, weight, coord_weight, bias, **options, activation="relu")

    def plain(x):
        return F.relu(F.conv2d(x, weight, bias, **options), inplace=True)

    def concatenation(x):
        both = torch.cat([weight, coord_weight], 1).contiguous(memory_format=torch.channels_last)
        return F.relu(F.conv2d(torch.cat([x, coords], 1), both, bias, **options), inplace=True)

    def timed(call, *leaves):
        return with_gradients(call, leaves) if backward else without_gradients(call)

    inputs = [in_channels_last(x_shape, dtype, device)]
    moved = (math.prod(x_shape) + math.prod(y_shape)) * dtype.itemsize
    inputs += [inputs[0].clone() for _ in range(rotation(moved, device) - 1)]
    everything = weight, bias, coord_weight
    size = scale * math.prod(y_shape) / cout if backward else 1.0  # of a result
    return Contest(
        inputs,
        None,
        timed(ours, *everything),
        {"concatenation": timed(concatenation, *everything)},
        size * (1e-4 if dtype == torch.float32 else 2**-4),
        floor={"conv + ReLU": timed(plain, weight, bias)},
    )


def plan_of_layer(size, kernel, device):
    """With padding that keeps the size."""
    geometry = _coord_plan.Geometry(size, size, (kernel,) * 2, (1, 1), (kernel // 2,) * 2, (1, 1), "zeros")
    return _coord_plan.plan_of(geometry, _coord_plan.CoordSpec(), torch.float32, device)


def add_map_contest(layer, dtype, device, small):
    """Tables of zeros, so that a call in place can be repeated; the rival adds a map and applies ReLU in place."""
    _, shape, kernel, _ = layer_shapes(layer, small)
    plan = plan_of_layer(shape[2:], kernel, device)
    tables = torch.zeros(plan.table_length, shape[1], device=device).T
    image = in_order(torch.zeros(shape[1:], dtype=dtype, device=device), True, 0)
    y = in_channels_last(shape, dtype, device).relu_()
    moved = 2 * y.numel() * y.element_size()

    def ours(y):
        torch.ops.fourfold._add_map_(y, tables, plan.classes, plan.class_count, None, "relu", None)
        return y

    inputs = [y.clone() for _ in range(rotation(moved, device))]
    return Contest(inputs, moved, ours, {"add_ and relu_": lambda y: y.add_(image).relu_()}, 0.0)


def batch_sum_contest(layer, dtype, device, small):
    """With relu's gradient: grad and output are read, grad is written."""
    _, shape, _, _ = layer_shapes(layer, small)
    grad = in_channels_last(shape, dtype, device)
    output = in_channels_last(shape, dtype, device).relu_()
    moved = 3 * grad.numel() * grad.element_size() + math.prod(shape[1:]) * 4

    def eager(grad):
        return torch.ops.aten.threshold_backward(grad, output, 0).sum(0, dtype=torch.float32)

    inputs = [grad.clone() for _ in range(rotation(moved, device))]
    ours = functools.partial(torch.ops.fourfold._batch_sum, relu_output=output)
    return Contest(inputs, moved, lambda grad: ours(grad)[0], {"threshold_backward and sum": eager}, 1e-3)


def tables_contest(layer, backward, device, small):
    """Small ones: what counts is that they take microseconds."""
    _, shape, kernel, _ = layer_shapes(layer, small)
    plan = plan_of_layer(shape[2:], kernel, device)
    given = plan.taps, plan.valid
    if backward:
        inputs = [in_order(torch.randn(shape[1:], device=device), True, 0) for _ in range(3)]
        rest = plan.classes, (kernel,) * 2, plan.class_count, plan.channels, 2
        calls = [torch.ops.fourfold._coord_tables_backward, reference.coord_tables_backward]
        ours, rival = (lambda grad, call=call: call(grad, *given, *rest)[0] for call in calls)
        tolerance = 1e-4 * math.prod(shape[1:])
    else:
        inputs = [torch.randn(shape[1], 2, kernel, kernel, device=device) for _ in range(3)]
        rest = shape[2:], plan.class_count, plan.channels, True
        calls = [torch.ops.fourfold._coord_tables, reference.coord_tables]
        ours, rival = (lambda weight, call=call: call(weight, *given, *rest) for call in calls)
        tolerance = 1e-4
    return Contest(inputs, None, ours, {"plain torch": rival}, tolerance)


def layer_speed(layer, dtype, backward, hot=False):
    name = f"{name_of(dtype)} {layer} forward{' + backward' if backward else ''}"
    return Speed("coord_conv2d", name, functools.partial(layer_contest, layer, dtype, backward), hot)


def add_map_speed(layer, dtype, hot=False):
    return Speed("_add_map_", f"{name_of(dtype)} y of {layer}", functools.partial(add_map_contest, layer, dtype), hot)


def batch_sum_speed(layer, dtype, hot=False):
    return Speed("_batch_sum", f"{name_of(dtype)} y of {layer}", functools.partial(batch_sum_contest, layer, dtype), hot)


BOTH = (torch.bfloat16, torch.float32)
SPEEDS = [
    add_map_speed("1x1 64", torch.bfloat16, hot=True),
    layer_speed("1x1 64", torch.bfloat16, False, hot=True),
    batch_sum_speed("1x1 64", torch.bfloat16, hot=True),
    Speed("_coord_tables", "float32 3x3 64", functools.partial(tables_contest, "3x3 64", False), hot=True),
    Speed("_coord_tables_backward", "float32 3x3 64", functools.partial(tables_contest, "3x3 64", True), hot=True),
    *(
        layer_speed(layer, dtype, backward)
        for layer, dtype, backward in itertools.product(LAYERS, BOTH, (False, True))
        if (layer, dtype, backward) != ("1x1 64", torch.bfloat16, False)
    ),
    *(add_map_speed(layer, dtype) for layer, dtype in itertools.product(LAYERS, BOTH) if (layer, dtype) != ("1x1 64", BOTH[0])),
    batch_sum_speed("1x1 64", torch.float32),
    batch_sum_speed("SOLO 3x3", torch.bfloat16),
    Speed("_coord_tables", "float32 SOLO 3x3", functools.partial(tables_contest, "SOLO 3x3", False)),
    Speed("_coord_tables_backward", "float32 SOLO 3x3", functools.partial(tables_contest, "SOLO 3x3", True)),
]
