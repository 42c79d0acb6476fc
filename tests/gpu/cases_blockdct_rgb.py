"""rgb_to_dct and dct_to_rgb: what tests/gpu/check.py checks and measures."""

import functools
import itertools
import math
import random

import fourfold as ff
import torch
import torch.nn.functional as F
from fourfold.reference import blockdct_rgb as reference
from gpu.cases_blockdct import by_gemm, filters, name_of, work_type
from gpu.harness import (
    DTYPES,
    Check,
    Contest,
    Speed,
    assert_close,
    needs_gpu,
    needs_memory,
    rotation,
    second_gpu,
)

SUBSAMPLINGS = tuple(reference.SUBSAMPLINGS)
LAYOUTS = ("planar", "blocks")
PIXELS = (torch.uint8, *DTYPES)
STYLES = ("contiguous", "last", "offset", "crop", "last crop", "gap", "strided")


# ---- correctness ----


def drawn_pixels(shape, dtype, style, device):
    """Pixels in memory whose other elements must not be read: NaN, or for bytes such as no pixel has."""
    b, c, height, width = shape
    values = torch.randint(0, 200, shape) if dtype == torch.uint8 else torch.rand(shape, dtype=torch.float64) * 200
    if style == "contiguous":
        return values.to(device, dtype)
    if style == "last":
        return values.to(device, dtype).contiguous(memory_format=torch.channels_last)
    fill = 255 if dtype == torch.uint8 else math.nan
    if style == "offset":  # by one element: no pair of neighbours is aligned
        view = torch.full((math.prod(shape) + 2,), fill, dtype=dtype, device=device)[1:-1].view(shape)
    elif style == "crop":
        view = torch.full((b, c, height + 2, width + 4), fill, dtype=dtype, device=device)[:, :, 1:-1, 2:-2]
    elif style == "last crop":
        view = torch.full((b, height + 2, width + 4, c), fill, dtype=dtype, device=device)[:, 1:-1, 2:-2].permute(0, 3, 1, 2)
    elif style == "gap":  # of one element between planes, the fourth unused: only every second one is aligned
        memory = torch.full((b, c + 1, height * width + 1), fill, dtype=dtype, device=device)
        view = memory[:, :c, :-1].unflatten(2, (height, width))
    else:
        view = torch.full((b, c, height, 2 * width), fill, dtype=dtype, device=device)[..., ::2]
    return view.copy_(values)


def matches(ops, subsampling, layout, pixels, device, trials=5):
    """`ops` against the float64 reference in every dtype of the results, over drawn shapes, strides and options."""
    draw = random.Random(f"{subsampling} {layout} {pixels}")
    torch.manual_seed(draw.randrange(2**31))
    for dtype, trial in itertools.product(DTYPES, range(trials)):
        size = (32, 48) if trial == 0 else (draw.randint(1, 40), draw.randint(1, 70))
        style = draw.choice(STYLES)
        rgb = drawn_pixels((draw.choice((1, 2, 3)), 3, *size), pixels, style, device)
        freqs = draw.choice((None, None, [5], draw.sample(range(64), draw.randint(1, 64)), draw.sample(range(64), 64)))
        f = 64 if freqs is None else len(freqs)
        work = torch.float64 if torch.float64 in (pixels, dtype) else torch.float32
        scale = None if draw.random() < 0.4 else (torch.rand(3, f) + 0.5).to(device, work)
        exact = None if scale is None else scale.double()
        what = f"{tuple(rgb.shape)} {style} {dtype} freqs={freqs} scale={scale is not None}"
        expected = reference.rgb_to_dct(rgb.double(), subsampling, layout, freqs, exact, torch.float64)
        every = reference.rgb_to_dct(rgb.double(), subsampling, layout, None, None, torch.float64)
        results = ops.rgb_to_dct(rgb, subsampling, layout, freqs, scale, dtype)
        for name, result, right, whole in zip(("y", "cbcr"), results, expected, every, strict=True):
            assert result.dtype == dtype, f"{name} {what}: {result.dtype}"
            assert result.is_contiguous(), f"{name} {what}: strides {result.stride()}"
            assert_close(result, right, f"{name} {what}", largest=whole.abs().max())


def independent(rgb, subsampling):
    """Planar coefficients from the definitions, one basis function after the other: shares nothing with the reference."""
    v, h = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}[subsampling]
    height, width = rgb.shape[2:]
    grid_y, grid_c = (-(-height // 8), -(-width // 8)), (-(-height // (8 * v)), -(-width // (8 * h)))
    rows = torch.arange(grid_c[0] * 8 * v).clamp(max=height - 1)
    columns = torch.arange(grid_c[1] * 8 * h).clamp(max=width - 1)
    red, green, blue = rgb.double()[:, :, rows][..., columns].unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue - 128
    cb = -0.299 / 1.772 * red - 0.587 / 1.772 * green + 0.5 * blue
    cr = 0.5 * red - 0.587 / 1.402 * green - 0.114 / 1.402 * blue

    def averaged(x):
        return sum(x[:, i::v, j::h] for i in range(v) for j in range(h)) / (v * h)

    def coefficients(x, grid):
        x = x[:, : 8 * grid[0], : 8 * grid[1]]
        planes = torch.zeros(x.shape[0], 64, *grid, dtype=torch.float64)
        for u, w, i, j in itertools.product(range(8), repeat=4):
            norm = (0.25 if u and w else 0.125 if u == w else math.sqrt(0.03125)) * math.cos((2 * i + 1) * u * math.pi / 16)
            planes[:, 8 * u + w] += norm * math.cos((2 * j + 1) * w * math.pi / 16) * x[:, i::8, j::8]
        return planes

    return coefficients(luma, grid_y), torch.cat([coefficients(averaged(c), grid_c) for c in (cb, cr)], 1)


def many_tiles(ops, device):
    """Several tiles of 28 blocks across and a last one that is not full, planar and interleaved, luma of odd size."""
    for subsampling, size in itertools.product(SUBSAMPLINGS, ((80, 224), (88, 168), (40, 225))):
        rgb = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8).to(device)
        expected = independent(rgb.cpu(), subsampling)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            results = ops.rgb_to_dct(
                rgb.contiguous(memory_format=memory_format), subsampling, "planar", None, None, torch.float32
            )
            for result, right in zip(results, expected, strict=True):
                assert_close(result, right.to(device), f"{subsampling} {size} {memory_format}")


def nothing_to_do(ops, device):
    def shapes(*args):
        return [tuple(result.shape) for result in ops.rgb_to_dct(*args, None, torch.float32)]

    def zeros(*shape):
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    assert shapes(zeros(0, 3, 17, 8), "4:2:0", "planar", None) == [(0, 64, 3, 1), (0, 128, 2, 1)]
    assert shapes(zeros(0, 3, 17, 8), "4:2:2", "blocks", [7, 1]) == [(0, 1, 3, 1, 2), (0, 2, 3, 1, 2)]
    assert shapes(zeros(2, 3, 17, 8), "4:4:4", "planar", []) == [(2, 0, 3, 1), (2, 0, 3, 1)]
    assert shapes(zeros(2, 3, 17, 8), "4:2:0", "blocks", []) == [(2, 1, 3, 1, 0), (2, 2, 2, 1, 0)]


def there_and_back(dtype, device):
    """dct_to_rgb against its reference, and as the inverse of rgb_to_dct where no chroma is lost."""
    torch.manual_seed(0)
    for subsampling, size in itertools.product(SUBSAMPLINGS, ((16, 32), (25, 41), (1, 1))):
        rgb = torch.rand(2, 3, *size, dtype=torch.float64).mul(255).to(device, dtype)
        y, cbcr = ff.rgb_to_dct(rgb, subsampling=subsampling, dtype=dtype)
        back = ff.dct_to_rgb(y, cbcr, subsampling=subsampling, size=size)
        expected = reference.dct_to_rgb(y.double(), cbcr.double(), subsampling, size)
        assert_close(back, expected, f"{subsampling} {size}")
        if subsampling == "4:4:4" and dtype == work_type(dtype):
            assert_close(back, rgb.double(), f"{size} and back")


def gradients(device):
    """First and second gradients in rgb and scale, and of the way back, with edges replicated and cropped."""
    rgb = torch.rand(1, 3, 9, 17, dtype=torch.float64, device=device).mul(255).requires_grad_()
    scale = (torch.rand(3, 4, dtype=torch.float64, device=device) + 0.5).requires_grad_()
    for subsampling, layout in itertools.product(SUBSAMPLINGS, LAYOUTS):
        options = {"subsampling": subsampling, "layout": layout, "freqs": [0, 9, 3, 62], "dtype": torch.float64}

        def there(rgb, scale, options=options):
            return ff.rgb_to_dct(rgb, scale=scale, **options)

        def and_back(rgb, subsampling=subsampling):
            coefs = ff.rgb_to_dct(rgb, subsampling=subsampling, dtype=torch.float64)
            return ff.dct_to_rgb(*coefs, subsampling=subsampling, size=(9, 17))

        assert torch.autograd.gradcheck(there, (rgb, scale), fast_mode=True)
        assert torch.autograd.gradgradcheck(there, (rgb, scale), fast_mode=True)
        assert torch.autograd.gradcheck(and_back, (rgb,), fast_mode=True)


def compiled(device):
    def network(rgb):
        y, cbcr = ff.rgb_to_dct(rgb)
        return ff.dct_to_rgb(y * 2, cbcr, size=rgb.shape[2:]) + 1

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    rgb = torch.randint(0, 256, (2, 3, 30, 50), dtype=torch.uint8, device=device)
    result = torch.compile(network, fullgraph=True, backend=backend)(rgb)
    torch.testing.assert_close(result, network(rgb), rtol=1e-6, atol=1e-3)


def captured(device):
    """A CUDA graph that holds the op gives the right results when it is replayed on new data."""
    needs_gpu(device)
    rgb = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8, device=device)

    def work():
        y, cbcr = ff.rgb_to_dct(rgb)
        return y, cbcr, ff.dct_to_rgb(y, cbcr)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    rgb.random_(0, 256)
    graph.replay()
    torch.cuda.synchronize()
    for replayed, expected in zip(results, work(), strict=True):
        assert torch.equal(replayed, expected)


def streamed(device):
    """Work goes to the current stream, where it waits for what comes first, here a long sleep and then the data."""
    needs_gpu(device)
    data = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, device=device)
    expected = ff.rgb_to_dct(data)
    rgb = torch.zeros_like(data)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        rgb.copy_(data)
        results = ff.rgb_to_dct(rgb)
    torch.cuda.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


def second_device(device):
    rgb = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, device=second_gpu(device))
    expected = reference.rgb_to_dct(rgb.double(), "4:2:0", "planar", None, None, torch.float64)
    for result, right in zip(ff.rgb_to_dct(rgb), expected, strict=True):
        assert_close(result, right)


def large_batch(shape, subsampling, freqs, device):
    """Images of zeros but for the first and the last, which are compared; of the others luma is -128 and chroma is 0."""
    f = 64 if freqs is None else len(freqs)
    samples, blocks = math.prod(shape), shape[0] * math.ceil(shape[2] / 8) * math.ceil(shape[3] / 8)
    # pixels, results, a mask of these, and what the reference makes of one image
    needs_memory(device, samples + 2 * 3 * f * blocks + 3 * f * blocks + 100 * samples // shape[0])
    rgb = torch.zeros(shape, dtype=torch.uint8, device=device)
    for end in (0, -1):
        rgb[end].random_(0, 256)
    results = ff.rgb_to_dct(rgb, subsampling=subsampling, freqs=freqs, dtype=torch.bfloat16)
    for end in (slice(0, 1), slice(-1, None)):
        expected = reference.rgb_to_dct(rgb[end].double(), subsampling, "planar", freqs, None, torch.float64)
        for result, right in zip(results, expected, strict=True):
            assert_close(result[end], right, f"{end}")
    y, cbcr = (result[1:-1] for result in results)
    assert bool((y[:, 0] == -1024).all()), "luma of the images between"
    assert int(y[:, 1:].count_nonzero()) == 0 and int(cbcr.count_nonzero()) == 0, "other coefficients of the images between"


CHECKS = [
    Check("rgb_to_dct", "many tiles", lambda device: many_tiles(torch.ops.fourfold, device), hot=True),
    *(
        Check(
            "rgb_to_dct",
            f"{name_of(pixels)} {subsampling} {layout}",
            lambda device, case=(subsampling, layout, pixels): matches(torch.ops.fourfold, *case, device),
            hot=pixels == torch.uint8,
        )
        for pixels, subsampling, layout in itertools.product(PIXELS, SUBSAMPLINGS, LAYOUTS)
    ),
    Check("rgb_to_dct", "empty", lambda device: nothing_to_do(torch.ops.fourfold, device)),
    *(Check("dct_to_rgb", name_of(dtype), functools.partial(there_and_back, dtype), hot=True) for dtype in DTYPES),
    Check("rgb_to_dct, dct_to_rgb", "gradients", gradients),
    Check("rgb_to_dct", "stream", streamed),
    Check("rgb_to_dct, dct_to_rgb", "CUDA graph", captured),
    Check("rgb_to_dct, dct_to_rgb", "torch.compile", compiled),
    Check(
        "rgb_to_dct",
        "more than 2**31 elements",
        functools.partial(large_batch, (46, 3, 4096, 4096), "4:4:4", None),
    ),
    Check(
        "rgb_to_dct",
        "more than 2**31 blocks",
        functools.partial(large_batch, (2**31 + 7, 3, 1, 1), "4:2:0", [0]),
    ),
    Check("rgb_to_dct", "second device", second_device),
]


# ---- speed ----


def colour(device):
    """Rows Y, Cb, Cr of the conversion [3, 3]."""
    r, g, b = reference.LUMA
    rows = [[r, g, b], [-r / (2 - 2 * b), -g / (2 - 2 * b), 0.5], [0.5, -g / (2 - 2 * r), -b / (2 - 2 * r)]]
    return torch.tensor(rows, device=device)


def folded(subsampling, dtype, device):
    """Colour, level shift, box filter and transform as two convolutions: (weight, bias) of luma, weight of chroma."""
    v, h = reference.SUBSAMPLINGS[subsampling]
    basis = filters(8, torch.zeros((), device=device))  # [64, 1, 8, 8]
    weights = colour(device)
    luma = weights[0, :, None, None] * basis
    bias = torch.zeros(64, device=device)
    bias[0] = -1024
    spread = basis.repeat_interleave(v, 2).repeat_interleave(h, 3) / (v * h)
    chroma = (weights[1:, None, :, None, None] * spread).flatten(0, 1)
    return luma.to(dtype), bias.to(dtype), chroma.to(dtype)


def contest(shape, subsampling, last, dtype, device, small):
    shape = (2, 3, 32, 64) if small else shape
    v, h = reference.SUBSAMPLINGS[subsampling]
    rgb = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    rgb = rgb.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    pixels = rgb.numel() // 3
    moved = 3 * pixels + (pixels + 2 * pixels // (v * h)) * dtype.itemsize
    luma, bias, chroma = folded(subsampling, dtype, device)
    weights = colour(device)
    basis = ff.reference.blockdct.dct_matrix(8, torch.float32, device)

    def padded(x):
        rows, columns = -x.shape[2] % (8 * v), -x.shape[3] % (8 * h)
        return F.pad(x, (0, columns, 0, rows), mode="replicate") if rows or columns else x

    def two_convolutions(rgb):
        x = padded(rgb.to(dtype))
        return (
            F.conv2d(x, luma, bias, stride=8).contiguous(),
            F.conv2d(x, chroma, stride=(8 * v, 8 * h)).contiguous(),
        )

    def steps(rgb):
        ycc = torch.einsum("kc,bchw->bkhw", weights, padded(rgb.float()))
        y = by_gemm((ycc[:, :1] - 128).contiguous(), basis, "planar")
        cbcr = F.avg_pool2d(ycc[:, 1:], (v, h)).contiguous()
        return y.to(dtype), by_gemm(cbcr, basis, "planar").to(dtype)

    rivals = {"two convolutions": two_convolutions, "steps": steps}
    if device.type == "cuda":
        rivals["compiled convolutions"] = torch.compile(two_convolutions)
        rivals["compiled steps"] = torch.compile(steps)
    # 16-bit convolutions round their filters too: 2**-9 of a sum of up to 2040, beside the results' own rounding.
    tolerance = 1e-2 if dtype == torch.float32 else 12.0
    inputs = [rgb.clone() for _ in range(rotation(moved, device))]
    return Contest(inputs, moved, lambda rgb: ff.rgb_to_dct(rgb, subsampling=subsampling, dtype=dtype), rivals, tolerance)


def inverse_contest(shape, device, small):
    """4:2:0 in float32. An input is y and cbcr one after the other in one tensor."""
    b, _, height, width = (2, 3, 32, 64) if small else shape
    rgb = torch.randint(0, 256, (b, 3, height, width), dtype=torch.uint8, device=device)
    y, cbcr = ff.rgb_to_dct(rgb)
    coefs = torch.cat([y.flatten(), cbcr.flatten()])

    def split(coefs):
        return coefs[: y.numel()].view(y.shape), coefs[y.numel() :].view(cbcr.shape)

    basis = filters(8, y)
    back = torch.linalg.inv(colour(device))  # columns Y, Cb, Cr
    luma = back[:, 0, None, None] * basis
    chroma = back.T[1:, None, :, None, None] * basis.repeat_interleave(2, 2).repeat_interleave(2, 3)
    chroma = chroma.flatten(0, 1)

    def two_convolutions(coefs):
        y, cbcr = split(coefs)
        return F.conv_transpose2d(y, luma, stride=8) + F.conv_transpose2d(cbcr, chroma, stride=16) + 128

    rivals = {"two convolutions": two_convolutions}
    if device.type == "cuda":
        rivals["compiled convolutions"] = torch.compile(two_convolutions)
    moved = 4 * (coefs.numel() + rgb.numel())
    inputs = [coefs.clone() for _ in range(rotation(moved, device))]
    return Contest(inputs, moved, lambda coefs: ff.dct_to_rgb(*split(coefs)), rivals, 1e-2)


CLASSIFIER, PHOTO, LARGE = (256, 3, 224, 224), (64, 3, 256, 256), (32, 3, 512, 512)


def speed(shape, subsampling, dtype=torch.float32, last=False, hot=False):
    name = f"uint8 {list(shape)}{' channels_last' if last else ''} {subsampling} to {name_of(dtype)}"
    return Speed("rgb_to_dct", name, functools.partial(contest, shape, subsampling, last, dtype), hot)


SPEEDS = [
    speed(CLASSIFIER, "4:2:0", hot=True),
    speed(CLASSIFIER, "4:2:0", last=True, hot=True),
    speed(CLASSIFIER, "4:2:0", torch.bfloat16, hot=True),
    speed(CLASSIFIER, "4:2:0", torch.bfloat16, last=True),
    speed(LARGE, "4:2:0"),
    speed(LARGE, "4:4:4"),
    speed(LARGE, "4:2:2"),
    speed(PHOTO, "4:2:0"),
    speed((64, 3, 320, 320), "4:2:0"),
    speed((64, 3, 250, 250), "4:4:4"),
    Speed("dct_to_rgb", f"float32 {list(CLASSIFIER)} 4:2:0", functools.partial(inverse_contest, CLASSIFIER)),
]
