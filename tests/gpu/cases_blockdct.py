"""block_dct, block_idct and dct_normalize: what tests/gpu/check.py checks and measures."""

import functools
import itertools
import math
import random

import fourfold as ff
import torch
import torch.nn.functional as F
from fourfold.reference import REFERENCES
from fourfold.reference import blockdct as reference
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

SIZES = (8, 2, 4, 16, 32)
LAYOUTS = ("planar", "blocks", "interleaved")
STYLES = ("contiguous", "last", "strided", "unaligned")
SENTINEL = 123.0


def work_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- correctness ----


def matches(ops, n, layout, dtype, device, trials=4):
    """Forward, inverse, both adjoints and both out= forms of `ops` against the float64 reference, over drawn shapes,
    strides and options; what surrounds an input is NaN, what surrounds an output must stay."""
    draw = random.Random(f"{n} {layout} {dtype}")
    torch.manual_seed(draw.randrange(2**31))

    def normal(shape):
        return torch.randn(shape).to(device)

    for trial in range(trials):
        b, c = draw.choice(((1, 1), (2, 3), (1, 4)))
        size = (draw.randint(1, 3 * n + 1), draw.randint(1, 5 * n + 1)) if trial else (2 * n, 4 * n)
        style = draw.choice(STYLES)
        freqs = None if layout == "interleaved" or draw.random() < 0.5 else draw.sample(range(n * n), draw.randint(1, n * n))
        f = n * n if freqs is None else len(freqs)
        scale = None if draw.random() < 0.4 else (torch.rand(draw.choice((1, c)), f) + 0.5).to(device, work_type(dtype))
        exact = None if scale is None else scale.double()
        shift = draw.choice((0.0, -1.5))
        what = f"n={n} {layout} {(b, c, *size)} {style} freqs={freqs} scale={scale is not None} shift={shift}"

        _, x = placed(normal((b, c, *size)), dtype, style, math.nan)
        expected = reference.block_dct(x.double(), n, layout, freqs, exact, shift)
        assert_close(
            ops.block_dct(x, n, layout, freqs, scale, shift),
            expected,
            f"block_dct {what}",
        )
        memory, out = placed(torch.zeros_like(expected), dtype, style, SENTINEL)
        ops._block_dct_out(x, n, layout, freqs, scale, shift, out)
        assert_close(out, expected, f"_block_dct_out {what}")
        assert_only_written(memory, out, SENTINEL)
        expected = reference.block_idct_backward(x.double(), n, layout, freqs, exact)
        assert_close(
            ops._block_idct_backward(x, n, layout, freqs, scale),
            expected,
            f"_block_idct_backward {what}",
        )

        _, y = placed(normal(expected.shape), dtype, style, math.nan)
        expected = reference.block_idct(y.double(), n, layout, freqs, exact, shift, size)
        assert_close(
            ops.block_idct(y, n, layout, freqs, scale, shift, size),
            expected,
            f"block_idct {what}",
        )
        memory, out = placed(torch.zeros_like(expected), dtype, style, SENTINEL)
        ops._block_idct_out(y, n, layout, freqs, scale, shift, size, out)
        assert_close(out, expected, f"_block_idct_out {what}")
        assert_only_written(memory, out, SENTINEL)
        expected = reference.block_dct_backward(y.double(), n, layout, freqs, exact, size)
        assert_close(
            ops._block_dct_backward(y, n, layout, freqs, scale, size),
            expected,
            f"_block_dct_backward {what}",
        )


def many_tiles(ops, device):
    """28 blocks across, several tiles, planes that share one; channels_last in gives channels_last out."""
    x = torch.randn(2, 3, 72, 224).to(device)
    for layout, last in itertools.product(LAYOUTS, (False, True)):
        image = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        y = ops.block_dct(image, 8, layout, None, None, 0.0)
        assert_close(
            y,
            reference.block_dct(x.double(), 8, layout, None, None, 0.0),
            f"{layout} channels_last={last}",
        )
        assert y.is_contiguous(memory_format=torch.channels_last if last and y.dim() == 4 else torch.contiguous_format)
        assert_close(
            ops.block_idct(y, 8, layout, None, None, 0.0, None),
            x.double(),
            f"inverse {layout} channels_last={last}",
        )


def nothing_to_do(ops, device):
    def zeros(*shape):
        return torch.zeros(shape, device=device)

    assert ops.block_dct(zeros(0, 3, 8, 8), 8, "planar", None, None, 0.0).shape == (
        0,
        192,
        1,
        1,
    )
    assert ops.block_dct(zeros(2, 1, 8, 8), 8, "blocks", [], None, 0.0).shape == (
        2,
        1,
        1,
        1,
        0,
    )
    assert ops.block_idct(zeros(2, 0, 3, 8), 8, "planar", None, None, 0.0, None).shape == (2, 0, 24, 64)
    only_shift = ops.block_idct(zeros(2, 1, 3, 8, 0), 8, "blocks", [], None, 1.5, None)
    assert_close(
        only_shift,
        torch.full((2, 1, 24, 64), -1.5, device=device).double(),
        "no frequency kept",
    )


def normalize_matches(op, layout, dtype, device, rtol=0.0):
    """dct_normalize bit for bit: it rounds where the reference does. But the CPU multiplies by 1 / std, which is rounded as
    well: a result may be off by two units in the last place of what it is computed in, a 16-bit one by one of its own."""
    on_cpu = device.type == "cpu" and op is torch.ops.fourfold.dct_normalize
    draw = random.Random(f"{layout} {dtype}")
    torch.manual_seed(draw.randrange(2**31))
    work = work_type(dtype)
    for shape in ((1, 1), (7, 9), (2, 3, 4), (2, 3, 5, 17), (3, 8, 8), (1, 1, 1, 65)):
        coefs = torch.randint(-128, 128, (*shape, 64), dtype=torch.int16)
        if draw.random() < 0.3:
            coefs = coefs.transpose(-1, -2).contiguous().transpose(-1, -2)
        lead = shape[:-2]
        qtable = torch.randint(1, 100, (draw.choice((1, lead[0] if lead else 1, math.prod(lead))), 64)).to(work)
        freqs = draw.choice((None, [0], draw.sample(range(64), 24), draw.sample(range(64), 64)))
        f = 64 if freqs is None else len(freqs)
        mean = draw.choice((None, torch.randn(f, dtype=work)))
        std = draw.choice((None, torch.rand(f, dtype=work) + 0.5))
        tensors = [None if t is None else t.to(device) for t in (coefs, qtable, mean, std)]
        result = op(*tensors, freqs, layout, dtype)
        expected = reference.dct_normalize(*tensors, freqs, layout, dtype)
        what = f"{shape} freqs={freqs}"
        allowed = rtol
        if on_cpu and std is not None:
            allowed = 2 * torch.finfo(work).eps if dtype == work else torch.finfo(dtype).eps
        torch.testing.assert_close(result, expected, rtol=allowed, atol=0, msg=f"{what}: {(result - expected).abs().max()}")


def grids_match(op, dtype, device, rtol=0.0):
    """_normalize_grids against its reference: crops of larger images, some of them mirrored."""
    on_cpu = device.type == "cpu" and op is torch.ops.fourfold._normalize_grids
    draw = random.Random(f"grids {dtype}")
    torch.manual_seed(draw.randrange(2**31))
    work = work_type(dtype)
    for images, planes, h, w in ((1, 1, 1, 1), (3, 2, 5, 7), (2, 3, 8, 8), (4, 1, 3, 17)):
        count = images * planes
        coefs = torch.randint(-128, 128, (count, h + 2, w + 3, 64), dtype=torch.int16, device=device)
        grids = [plane[1 : h + 1, k % 3 : k % 3 + w] for k, plane in enumerate(coefs)]
        qtable = torch.randint(1, 100, (count, 64)).to(device, work)
        freqs = draw.choice((None, draw.sample(range(64), 24)))
        f = 64 if freqs is None else len(freqs)
        mean = draw.choice((None, torch.randn(planes, f, dtype=work).to(device)))
        std = draw.choice((None, (torch.rand(planes, f, dtype=work) + 0.5).to(device)))
        given = (grids, qtable, mean, std, planes, list(range(0, count, 2)), freqs, dtype)
        result, expected = op(*given), reference._normalize_grids(*given)
        allowed = rtol
        if on_cpu and std is not None:
            allowed = 2 * torch.finfo(work).eps if dtype == work else torch.finfo(dtype).eps
        torch.testing.assert_close(result, expected, rtol=allowed, atol=0)


def native(op, device):
    """The op runs its own kernels here, not the reference."""
    needs_gpu(device)
    from fourfold import _load

    assert not _load.missing, f"{op}: {_load.missing}"


def gradients(device):
    """First and second gradients in x and scale, of the transform and of its way back, edges replicated and cropped."""
    x = torch.randn(1, 2, 5, 9, dtype=torch.float64, device=device, requires_grad=True)
    scale = (torch.rand(2, 6, dtype=torch.float64, device=device) + 0.5).requires_grad_()
    for layout in ("planar", "blocks"):
        options = {"block_size": 4, "layout": layout, "freqs": [0, 5, 3, 15, 8, 1]}
        forward = functools.partial(ff.block_dct, **options)
        inverse = functools.partial(ff.block_idct, size=(5, 9), **options)

        def there(x, scale, forward=forward):
            return forward(x, scale=scale)

        def and_back(x, scale, forward=forward, inverse=inverse):
            return inverse(forward(x, scale=scale), scale=scale * 2)

        assert torch.autograd.gradcheck(there, (x, scale), fast_mode=True)
        assert torch.autograd.gradcheck(and_back, (x, scale), fast_mode=True)
        assert torch.autograd.gradgradcheck(and_back, (x, scale), fast_mode=True)


def compiled(device):
    def network(x, coefs, qtable):
        y = ff.block_dct(x, shift=1.0) * 2
        return ff.block_idct(y, size=x.shape[2:]), ff.dct_normalize(coefs, qtable, mean=0.5, std=2.0) + 1

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    x = torch.randn(2, 3, 30, 50, device=device)
    coefs, qtable = (
        torch.randint(-99, 99, (2, 4, 5, 64), dtype=torch.int16, device=device),
        torch.arange(1.0, 65, device=device),
    )
    for ours, expected in zip(
        torch.compile(network, fullgraph=True, backend=backend)(x, coefs, qtable),
        network(x, coefs, qtable),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-5)


def captured(device):
    """A CUDA graph that holds the ops gives the right results when it is replayed on new data."""
    needs_gpu(device)
    x = torch.randn(2, 3, 40, 56, device=device)
    coefs = torch.randint(-99, 99, (2, 4, 5, 64), dtype=torch.int16, device=device)
    qtable = torch.arange(1.0, 65, device=device)

    def work():
        y = ff.block_dct(x, freqs=list(range(24)))
        return (
            y,
            ff.block_idct(y, freqs=list(range(24))),
            ff.dct_normalize(coefs, qtable, freqs=[5, 1, 0]),
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    x.normal_()
    coefs.random_(-99, 99)
    graph.replay()
    torch.cuda.synchronize()
    for replayed, expected in zip(results, work(), strict=True):
        assert torch.equal(replayed, expected)


def streamed(device):
    """Work goes to the current stream, where it waits for what comes first, here a long sleep and then the data."""
    needs_gpu(device)
    data = torch.randn(2, 3, 64, 64, device=device)
    coefs = torch.randint(1, 99, (2, 4, 5, 64), dtype=torch.int16, device=device)
    qtable = torch.arange(1.0, 65, device=device)
    expected = (
        ff.block_dct(data),
        ff.block_idct(ff.block_dct(data)),
        ff.dct_normalize(coefs, qtable),
    )
    x, y, late = (
        torch.zeros_like(data),
        torch.zeros_like(expected[0]),
        torch.zeros_like(coefs),
    )
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        x.copy_(data)
        y.copy_(expected[0])
        late.copy_(coefs)
        results = ff.block_dct(x), ff.block_idct(y), ff.dct_normalize(late, qtable)
    torch.cuda.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


def second_device(device):
    x = torch.randn(2, 3, 16, 16, device=second_gpu(device))
    assert_close(ff.block_dct(x), reference.block_dct(x.double(), 8, "planar", None, None, 0.0))


def beyond_31_bits(n, batch, device):
    """Images with more than 2**31 elements (n = 8) or blocks (n = 2); the first and the last are compared."""
    side = 4096
    needs_memory(device, 3 * 2 * batch * side * side)
    x = torch.zeros(batch, 1, side, side, dtype=torch.bfloat16, device=device)
    for end in (0, -1):
        x[end].normal_()
    y = ff.block_dct(x, n)
    back = ff.block_idct(y, n)
    for end in (slice(0, 1), slice(-1, None)):
        assert_close(
            y[end],
            reference.block_dct(x[end].double(), n, "planar", None, None, 0.0),
            f"{end}",
        )
        assert_close(
            back[end],
            reference.block_idct(y[end].double(), n, "planar", None, None, 0.0, None),
            f"inverse {end}",
        )
    assert int(y[1:-1].count_nonzero()) == 0


def normalize_beyond_31_bits(device):
    batch, grid = 9, 2048
    needs_memory(device, 6 * batch * grid * grid * 64)
    coefs = torch.zeros(batch, grid, grid, 64, dtype=torch.int16, device=device)
    for end in (0, -1):
        coefs[end].random_(-99, 99)
    qtable = torch.arange(1.0, 65, device=device)
    y = ff.dct_normalize(coefs, qtable, mean=1.0, std=3.0, dtype=torch.bfloat16)
    for end in (slice(0, 1), slice(-1, None)):
        table, mean, std = (
            qtable[None],
            torch.ones(64, device=device),
            torch.full((64,), 3.0, device=device),
        )
        assert torch.equal(
            y[end],
            reference.dct_normalize(coefs[end], table, mean, std, None, "planar", torch.bfloat16),
        )


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


CHECKS = [
    *(Check(op, "native", functools.partial(native, op), hot=True) for op in REFERENCES if not op.startswith("_")),
    *(
        Check(
            "block_dct, block_idct",
            f"{name_of(dtype)} {layout} n={n}",
            lambda device, case=(n, layout, dtype): matches(torch.ops.fourfold, *case, device),
            hot=n == 8,
        )
        for dtype, n, layout in itertools.product(DTYPES, SIZES, LAYOUTS)
    ),
    Check(
        "block_dct, block_idct",
        "many tiles",
        lambda device: many_tiles(torch.ops.fourfold, device),
        hot=True,
    ),
    Check(
        "block_dct, block_idct",
        "empty",
        lambda device: nothing_to_do(torch.ops.fourfold, device),
    ),
    *(
        Check(
            "dct_normalize",
            f"{name_of(dtype)} {layout}",
            lambda device, case=(layout, dtype): normalize_matches(torch.ops.fourfold.dct_normalize, *case, device),
            hot=True,
        )
        for dtype, layout in itertools.product(DTYPES, ("planar", "blocks"))
    ),
    *(
        Check(
            "_normalize_grids",
            name_of(dtype),
            lambda device, dtype=dtype: grids_match(torch.ops.fourfold._normalize_grids, dtype, device),
        )
        for dtype in DTYPES
    ),
    Check("block_dct, block_idct", "gradients", gradients),
    Check("block_dct, block_idct, dct_normalize", "stream", streamed),
    Check("block_dct, block_idct, dct_normalize", "CUDA graph", captured),
    Check("block_dct, block_idct, dct_normalize", "torch.compile", compiled),
    Check(
        "block_dct, block_idct",
        "more than 2**31 elements",
        functools.partial(beyond_31_bits, 8, 130),
    ),
    Check(
        "block_dct, block_idct",
        "more than 2**31 blocks",
        functools.partial(beyond_31_bits, 2, 520),
    ),
    Check("dct_normalize", "more than 2**31 elements", normalize_beyond_31_bits),
    Check("block_dct", "second device", second_device),
]


# ---- speed ----


def images(shape, dtype, device, small):
    shape = (1, shape[1], 32, 64) if small else shape
    x = torch.randn(shape, device=device).to(dtype)
    moved = 2 * x.numel() * x.element_size()
    return [x.clone() for _ in range(rotation(moved, device))], moved


def basis(n, like):
    return reference.dct_matrix(n, torch.float32, like.device).to(like.dtype)


def filters(n, like):
    """The transform as n * n convolution filters [n*n, 1, n, n]."""
    d = basis(n, like)
    return torch.einsum("ui,vj->uvij", d, d).reshape(n * n, 1, n, n)


def by_conv(x, weight):
    b, c, height, width = x.shape
    return F.conv2d(x.reshape(b * c, 1, height, width), weight, stride=weight.shape[-1]).unflatten(0, (b, c)).flatten(1, 2)


def by_gemm(x, d, layout):
    """Rows, then columns, then one permutation."""
    b, c, height, width = x.shape
    n = len(d)
    y = d @ (x.reshape(-1, n) @ d.T).reshape(-1, n, width)
    if layout == "interleaved":
        return y.reshape(x.shape)
    y = y.reshape(b, c, height // n, n, width // n, n)
    if layout == "blocks":
        return y.transpose(3, 4).reshape(b, c, height // n, width // n, n * n)
    return y.permute(0, 1, 3, 5, 2, 4).reshape(b, c * n * n, height // n, width // n)


def forward_contest(shape, n, layout, dtype, device, small):
    inputs, moved = images(shape, dtype, device, small)
    d, weight = basis(n, inputs[0]), filters(n, inputs[0])
    rivals = {
        "two-pass GEMM": lambda x: by_gemm(x, d, layout),
        "compiled GEMM": torch.compile(lambda x: by_gemm(x, d, layout)),
    }
    if layout == "planar":
        rivals["conv2d"] = lambda x: by_conv(x, weight)
    if device.type != "cuda":
        del rivals["compiled GEMM"]
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    return Contest(inputs, moved, lambda x: ff.block_dct(x, n, layout=layout), rivals, tolerance)


def by_conv_transpose(y, weight):
    b, _, h, w = y.shape
    n = weight.shape[-1]
    return F.conv_transpose2d(y.reshape(-1, n * n, h, w), weight, stride=n).reshape(b, -1, h * n, w * n)


def by_gemm_back(y, d):
    b, _, h, w = y.shape
    n = len(d)
    rows = y.reshape(b, -1, n, n, h, w).permute(0, 1, 4, 2, 5, 3).reshape(-1, n) @ d
    return (d.T @ rows.reshape(-1, n, w * n)).reshape(b, -1, h * n, w * n)


def inverse_contest(shape, n, dtype, device, small):
    pixels, moved = images(shape, dtype, device, small)
    inputs = [ff.block_dct(x, n) for x in pixels]
    d, weight = basis(n, inputs[0]), filters(n, inputs[0])
    rivals = {
        "two-pass GEMM": lambda y: by_gemm_back(y, d),
        "compiled GEMM": torch.compile(lambda y: by_gemm_back(y, d)),
        "conv_transpose2d": lambda y: by_conv_transpose(y, weight),
    }
    if device.type != "cuda":
        del rivals["compiled GEMM"]
    return Contest(
        inputs,
        moved,
        lambda y: ff.block_idct(y, n),
        rivals,
        1e-4 if dtype == torch.float32 else 0.1,
    )


def normalize_contest(layout, dtype, device, small):
    shape = (2, 4, 4, 64) if small else (256, 64, 64, 64)
    coefs = torch.randint(-99, 99, shape, dtype=torch.int16, device=device)
    qtable = torch.arange(1.0, 65, device=device)
    mean, std = torch.randn(64, device=device), torch.rand(64, device=device) + 0.5

    def eager(coefs):
        y = ((coefs.float() * qtable - mean) / std).to(dtype)
        return y.movedim(-1, -3).contiguous() if layout == "planar" else y

    rivals = {"eager": eager}
    if device.type == "cuda":
        rivals["compiled"] = torch.compile(eager)
    moved = coefs.numel() * (2 + dtype.itemsize)
    inputs = [coefs.clone() for _ in range(rotation(moved, device))]
    ours = functools.partial(ff.dct_normalize, qtable=qtable, mean=mean, std=std, layout=layout, dtype=dtype)
    return Contest(inputs, moved, ours, rivals, 1e-4 if dtype == torch.float32 else 2.0)


LARGE, CLASSIFIER, PHOTO = (32, 3, 512, 512), (64, 3, 224, 224), (8, 3, 256, 256)


def forward_speed(shape, n, layout, dtype, hot=False):
    name = f"{name_of(dtype)} {list(shape)} n={n} {layout}"
    return Speed(
        "block_dct",
        name,
        functools.partial(forward_contest, shape, n, layout, dtype),
        hot,
    )


def inverse_speed(shape, n, dtype, hot=False):
    name = f"{name_of(dtype)} {list(shape)} n={n} planar"
    return Speed("block_idct", name, functools.partial(inverse_contest, shape, n, dtype), hot)


def normalize_speed(layout, dtype, hot=False):
    return Speed(
        "dct_normalize",
        f"{name_of(dtype)} [256, 64, 64, 64] {layout}",
        functools.partial(normalize_contest, layout, dtype),
        hot,
    )


SPEEDS = [
    forward_speed(LARGE, 8, "planar", torch.float32, hot=True),
    inverse_speed(LARGE, 8, torch.float32, hot=True),
    normalize_speed("planar", torch.float32, hot=True),
    forward_speed(LARGE, 8, "blocks", torch.float32, hot=True),
    forward_speed(LARGE, 8, "planar", torch.bfloat16, hot=True),
    forward_speed(CLASSIFIER, 8, "planar", torch.float32),
    forward_speed(PHOTO, 8, "planar", torch.float32),
    inverse_speed(CLASSIFIER, 8, torch.float32),
    inverse_speed(LARGE, 8, torch.bfloat16),
    normalize_speed("blocks", torch.float32),
    normalize_speed("planar", torch.bfloat16),
    forward_speed(LARGE, 8, "interleaved", torch.float32),
    *(forward_speed(LARGE, n, "planar", torch.float32) for n in (16, 4, 32, 2)),
    *(inverse_speed(LARGE, n, torch.float32) for n in (16, 4, 32, 2)),
]
