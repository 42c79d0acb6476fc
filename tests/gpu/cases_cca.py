"""Representation similarity and the ops underneath: what tests/gpu/check.py checks and measures."""

import functools
import itertools
import math

import fourfold as ff
import torch
from fourfold.ops._cca_state import Moments
from fourfold.reference import cca_ops as reference
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

OPS = "_pack_samples, _add_wide_, _count_nonfinite, _gram_, _image_spectra, _spectra_gram_"
FUNCTIONS = "cca, svcca, pwcca, cka, cka_matrix, procrustes, rv, dft_cca, StreamingCCA"
HALVES = (torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32)
# Images, channels_last, samples innermost but one after the other, with gaps, and rows of odd length.
STYLES = ("contiguous", "last", "neurons", "strided", "unaligned")
SENTINEL = 123.0


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# ---- correctness ----


def in_memory(values, dtype, style):
    """values [N, C, S] between NaNs."""
    if style == "neurons":
        return placed(values.transpose(0, 1), dtype, "contiguous", math.nan)[1].transpose(0, 1)
    return placed(values, dtype, style, math.nan)[1]


# N, C, S, first sample, samples
PANELS = ((1, 1, 1, 0, 1), (3, 5, 7, 4, 11), (2, 70, 25, 3, 40), (40, 3, 1, 39, 1), (3, 9, 40, 1, 0), (2, 0, 5, 2, 8))
MORE_PANELS = ((9, 300, 196, 5, 1700), (5000, 129, 1, 0, 5000))


def pack_matches(ops, dtype, device, panels=PANELS, styles=STYLES):
    """Into a part of a larger panel and with norms in a column of it, of which nothing else may change."""
    torch.manual_seed(0)
    for (n, c, s, first, count), style, wide in itertools.product(panels, styles, WIDE):
        what = f"{(n, c, s)} {first} {count} {style} {name_of(wide)}"
        x = in_memory(torch.randn(n, c, s, dtype=torch.float64, device=device) + 3, dtype, style)
        pivot = torch.randn(c, dtype=torch.float64, device=device) + 3
        memory = torch.full((count + 2, c + 3), SENTINEL, dtype=wide, device=device)
        whole = memory[1:-1, 1:-1]
        start = torch.randn(c + 1, dtype=torch.float64, device=device)
        results = []
        for _ in range(2):
            sums = start.clone()
            ops._pack_samples(x, pivot, first, whole[:, :-1], sums, whole[:, -1])
            results.append((whole.clone(), sums))
        panel, norms, sums = torch.empty(count, c, dtype=wide, device=device), whole.new_empty(count), start.clone()
        reference.pack_samples(x, pivot, first, panel, sums, norms)
        assert torch.equal(whole[:, :-1], panel), f"panel: {what}"
        assert_close(whole[:, -1], panel.double().square().sum(1), f"norms: {what}")
        assert_close(results[0][1], sums, f"sums: {what}")
        assert all(torch.equal(*twice) for twice in zip(*results, strict=True)), f"not the same twice: {what}"
        assert_only_written(memory, whole, SENTINEL)


def add_wide_matches(ops, device):
    torch.manual_seed(1)
    for rows, width in ((1, 1), (3, 5), (70, 600), (0, 4), (4, 0)):
        values = torch.randn(rows, width, dtype=torch.float64, device=device)
        memory, total = placed(values, torch.float64, "unaligned", SENTINEL)
        part = placed(torch.randn_like(values), torch.float32, "unaligned", math.nan)[1]
        ops._add_wide_(total, part)
        assert torch.equal(total, values + part.double()), f"{rows} x {width}"
        assert_only_written(memory, total, SENTINEL)


def count_matches(ops, dtype, device):
    """Of any strides; what lies between counted elements isn't counted."""
    torch.manual_seed(2)
    x = torch.randn(4, 3, 5, 3, 2, 4).to(device, dtype)
    flat = x.view(-1)
    flat[::7], flat[5::11], flat[3::13] = math.nan, -math.inf, math.inf
    views = [x, x[0], x[:, 1], x[:, :, ::2, :, 1], x.permute(5, 3, 2, 0, 1, 4), x[1:, 1:, 1:, 1:, 1:, 1:], flat[0], flat[1]]
    views += [x[:0], x[0, 0, 0, 0, 0].expand(5, 4), flat[: 7 * 131 : 131], flat.view(-1, 8).T, torch.ones_like(x)]
    for view in views:
        count = ops._count_nonfinite(view)
        assert (count.dtype, count.shape) == (torch.int64, ())
        assert count.item() == reference.count_nonfinite(view).item(), f"{tuple(view.shape)} {view.stride()}"


# N, Cx, Cy, S: whole images in pieces of 16 and 8 bytes, images of odd size, rows, more than two chunks, several tiles
GRAMS = ((3, 24, 40, 8), (2, 70, 66, 36), (5, 9, 13, 49), (70, 16, 12, 1), (2, 8, 16, 1296))
MORE_GRAMS = ((7, 300, 130, 784), (9, 96, 257, 49), (3000, 256, 65, 1), (1, 40, 40, 5000))


def grams_match(ops, dtype, device, shapes=GRAMS, styles=STYLES):
    """Of integers of one sign: 1,024 samples have exact sums in float32, twice as many don't."""
    torch.manual_seed(3)
    for (n, cx, cy, s), (i, style) in itertools.product(shapes, enumerate(styles)):
        what = f"{(n, cx, cy, s)} {style}"
        x = in_memory(torch.randint(65, 128, (n, cx, s), device=device), dtype, style)
        y = in_memory(torch.randint(65, 128, (n, cy, s), device=device), dtype, styles[(i + 1) % len(styles)])
        for right, name in ((y, "x y"), (x, "x x")):
            values = torch.randint(-9, 9, (cx, right.shape[1]), device=device).double()
            exact = values.clone()
            reference.gram_(x, right, exact)
            memory, total = placed(values, torch.float64, "unaligned", SENTINEL)
            ops._gram_(x, right, total)
            # What lies below the diagonal of x x may be left as it was.
            same = torch.equal(total, exact) if right is y else torch.equal(total.triu(), exact.triu())
            assert same, f"{name} {what}: off by {(total - exact).triu().abs().max().item()}"
            assert_only_written(memory, total, SENTINEL)


def gram_rounds_little(ops, dtype, device, shape=(3, 80, 24, 500)):
    """Real numbers: float32 sums of 1,024 products, which tensor cores may truncate."""
    torch.manual_seed(4)
    n, cx, cy, s = shape
    x, y = (torch.randn(n, c, s, device=device).to(dtype) for c in (cx, cy))
    exact, bound, total = (torch.zeros(cx, cy, dtype=torch.float64, device=device) for _ in range(3))
    reference.gram_(x, y, exact)
    reference.gram_(x.abs(), y.abs(), bound)
    ops._gram_(x, y, total)
    again = torch.zeros_like(total)
    ops._gram_(x, y, again)
    assert torch.equal(total, again), "not the same twice"
    assert bool(((total - exact).abs() <= 2.0**-17 * bound).all()), f"{((total - exact).abs() / bound).max().item():.3g}"


def nothing_to_multiply(ops, device):
    for n, cx, cy, s in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        x, y = (torch.zeros(n, c, s, dtype=torch.bfloat16, device=device) for c in (cx, cy))
        total = torch.ones(cx, cy, dtype=torch.float64, device=device)
        ops._gram_(x, y, total)
        assert bool((total == 1).all())


# N, C, H, W: odd and even sizes, sides of 1 and 2, more images than a program takes
IMAGES = ((3, 2, 4, 6), (1, 5, 5, 3), (2, 3, 1, 7), (4, 1, 6, 1), (2, 2, 2, 2), (0, 3, 4, 4), (2, 0, 4, 4), (5, 9, 3, 8))
MORE_IMAGES = ((40, 70, 32, 32), (9, 130, 17, 15))


def spectra_match(ops, dtype, device, shapes=IMAGES, styles=STYLES[:2]):
    """Into some samples and channels of a larger tensor, of which nothing else may change."""
    torch.manual_seed(7)
    for (n, c, h, w), style, wide in itertools.product(shapes, styles, WIDE):
        what = f"{(n, c, h, w)} {style} {name_of(wide)}"
        x = placed(torch.randn(n, c, h, w, dtype=torch.float64, device=device) + 3, dtype, style, math.nan)[1]
        pivot = torch.randn(c, h, w, dtype=torch.float64, device=device) + 3
        frequencies = len(reference.half_plane(h, w))
        memory = torch.full((frequencies, 2, n + 2, c + 3), SENTINEL, dtype=wide, device=device)
        spectra = memory[:, :, 1:-1, 1 : c + 1]
        exact = torch.zeros(frequencies, 2, n, c, dtype=torch.float64, device=device)
        reference.image_spectra(x, pivot, exact)
        results = []
        for _ in range(2):
            ops._image_spectra(x, pivot, spectra)
            results.append(spectra.clone())
        assert_close(results[0], exact, what)
        assert torch.equal(*results), f"not the same twice: {what}"
        assert_only_written(memory, spectra, SENTINEL)


# F, n, channels
SPECTRA_GRAMS = ((2, 5, 7, 9), (1, 1, 1, 1), (3, 20, 17, 33), (1, 0, 3, 4), (0, 4, 3, 4), (2, 4, 3, 0), (2, 4, 0, 3))
MORE_SPECTRA_GRAMS = ((17, 130, 64, 64), (5, 100, 200, 70))


def spectra_grams_match(ops, dtype, device, shapes=SPECTRA_GRAMS):
    """Of eighths, whose sums are exact in float32 too; with the sums and without."""
    torch.manual_seed(8)
    for (f, n, rows, columns), style, with_sums in itertools.product(shapes, ("contiguous", "strided"), (True, False)):
        what = f"{(f, n, rows, columns)} {style} {with_sums}"
        a, b = (
            placed(torch.randint(-24, 25, (f, 2, n, c), device=device) / 8, dtype, style, math.nan)[1] for c in (rows, columns)
        )
        start = torch.randint(-9, 9, (f, rows, columns), device=device).double()
        exact, exact_sums = start.clone(), torch.ones(f, rows, 2, dtype=torch.float64, device=device)
        sums = exact_sums.clone()
        reference.spectra_gram_(a, b, exact, exact_sums if with_sums else None)
        memory, total = placed(start, torch.float64, "unaligned", SENTINEL)
        ops._spectra_gram_(a, b, total, sums if with_sums else None)
        assert torch.equal(total, exact), f"{what}: off by {(total - exact).abs().max().item()}"
        assert torch.equal(sums, exact_sums), f"sums: {what}"
        assert_only_written(memory, total, SENTINEL)


def example(device):
    torch.manual_seed(5)
    return torch.randn(4, 24, 48, device=device).to(torch.bfloat16)


def every_op(x):
    """What the ops make of x [N, C, S] bfloat16, in tensors of their own."""
    ops, c = torch.ops.fourfold, x.shape[1]
    samples = x.shape[0] * x.shape[2]
    total, sums = (torch.zeros(size, dtype=torch.float64, device=x.device) for size in ((c, c), (c + 1,)))
    panel, norms = (torch.empty(size, device=x.device) for size in ((samples, c), (samples,)))
    ops._pack_samples(x, torch.ones(c, dtype=torch.float64, device=x.device), 0, panel, sums, norms)
    ops._gram_(x, x, total)
    ops._add_wide_(total, panel[:c])
    images = x.unflatten(2, (6, 8))
    spectra = torch.empty(26, 2, x.shape[0], c, dtype=torch.float64, device=x.device)
    ops._image_spectra(images.nan_to_num(posinf=0), torch.ones(c, 6, 8, dtype=torch.float64, device=x.device), spectra)
    products, moments = (torch.zeros(26, c, size, dtype=torch.float64, device=x.device) for size in (c, 2))
    ops._spectra_gram_(spectra, spectra, products, moments)
    return [panel, norms, sums, total, products, moments, ops._count_nonfinite(x)]


def assert_same(results, expected):
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def captured(device):
    """A CUDA graph gives the right results when it is replayed on new data."""
    needs_gpu(device)
    x = example(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            every_op(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = every_op(x)
    x.normal_()
    x.view(-1)[3] = math.inf
    graph.replay()
    torch.cuda.synchronize()
    assert results[-1].item() == 1
    x.view(-1)[3] = 0
    graph.replay()
    assert_same(results, every_op(x))


def second_device(device):
    """Ops follow their tensors, whichever device is current."""
    x = example(device)
    assert_same([result.to(device) for result in every_op(x.to(second_gpu(device)))], every_op(x))


def streamed(device):
    """Work goes to the current stream, where it waits for what comes first, here a long sleep and then the data."""
    needs_gpu(device)
    data = example(device)
    expected = every_op(data)
    x = torch.zeros_like(data)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        x.copy_(data)
        results = every_op(x)
    torch.cuda.synchronize()
    assert_same(results, expected)


def unsynchronised(device):
    """No op waits for the device."""
    needs_gpu(device)
    x = example(device)
    every_op(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_op(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pack_beyond_31_bits(last, device):
    """The last samples of more than 2**31 elements; those of the last image, and of the last but one."""
    n, c, s = 9, 64, 1 << 22
    needs_memory(device, 2 * n * c * s)
    shape = (n, s, c) if last else (n, c, s)
    x = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    x = x.transpose(1, 2) if last else x
    for end in (s, 1):
        count = 100
        first = (n - 1) * s + end - count
        x[-1, :, max(end - count, 0) : end] = torch.randn(c, min(end, count), device=device)
        x[-2, :, -count:] = torch.randn(c, count, device=device)
        panel, norms = torch.empty(count, c, device=device), torch.empty(count, device=device)
        sums = torch.zeros(c + 1, dtype=torch.float64, device=device)
        torch.ops.fourfold._pack_samples(x, sums[:-1].clone(), first, panel, sums, norms)
        own = x[-1, :, max(end - count, 0) : end]
        exact = own if end == s else torch.cat([x[-2, :, 1 - count :], own], 1)
        assert torch.equal(panel, exact.T.float())
        assert_close(sums[:-1], exact.double().sum(1), "sums")


def gram_beyond_31_bits(size, last, device):
    """More than 2**31 elements. Channels are constants, but for the last image."""
    n, c, s = size
    needs_memory(device, 2 * n * c * s)
    shape = (n, s, c) if last else (n, c, s)
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    x = x.transpose(1, 2) if last else x
    constant = torch.arange(c, device=device) % 5 + 1.0
    x.copy_(constant[:, None])
    x[-1] += 2
    total = torch.zeros(c, c, dtype=torch.float64, device=device)
    torch.ops.fourfold._gram_(x, x, total)
    constant, other = constant.double(), constant.double() + 2
    exact = (torch.outer(constant, constant) * (n - 1) + torch.outer(other, other)) * s
    assert torch.equal(total.triu(), exact.triu())


def count_beyond_31_bits(device):
    elements = (1 << 31) + 5000
    needs_memory(device, 2 * elements)
    x = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    x[[0, 1 << 30, -1]] = math.nan
    assert torch.ops.fourfold._count_nonfinite(x).item() == 3
    assert torch.ops.fourfold._count_nonfinite(x.view(-1, 8)[:, 1:]).item() == 1


def add_wide_beyond_31_bits(device):
    """Rows that are more than 2**31 elements apart."""
    stride = (1 << 31) + 7
    needs_memory(device, 12 * (stride + 100))
    total, part = (torch.empty(stride + 100, dtype=dtype, device=device).as_strided((2, 100), (stride, 1)) for dtype in WIDE)
    total.fill_(1)
    part.copy_(torch.arange(200, device=device).view(2, 100))
    torch.ops.fourfold._add_wide_(total, part)
    assert torch.equal(total, part.double() + 1)


def related(n, widths, device):
    """Layers [n, d] float32 of some common causes, with means."""
    generator = torch.Generator().manual_seed(6)
    causes = torch.randn(n, 24, generator=generator)
    layers = [causes @ torch.randn(24, d, generator=generator) / 5 + torch.randn(n, d, generator=generator) for d in widths]
    return [(x + i).to(device) for i, x in enumerate(layers)]


def functions_match(device):
    """The functions in memory on a device against a CPU, and CCA's gradient."""
    x, y = related(900, (40, 30), device)
    calls = {
        "cca": lambda x, y: ff.cca(x, y).rho,
        "svcca": lambda x, y: ff.svcca(x, y).rho,
        "pwcca": ff.pwcca,
        "cka": ff.cka,
        "cka rbf": lambda x, y: ff.cka(x, y, kernel="rbf"),
        "cka unbiased": lambda x, y: ff.cka(x, y, unbiased=True),
        "cka_matrix": lambda x, y: ff.cka_matrix({"x": x, "y": y}).matrix,
        "cka_matrix of few samples": lambda x, y: ff.cka_matrix({"x": x[:50], "y": y[:50]}, unbiased=True).matrix,
        "procrustes": ff.procrustes,
        "rv": ff.rv,
        "dft_cca": lambda x, y: ff.dft_cca(*(t[:, :8].reshape(450, 4, 2, 2) for t in (x, y))),
    }
    for name, call in calls.items():
        result = call(x, y)
        assert result.dtype == torch.float64
        error = (result.cpu() - call(x.cpu(), y.cpu())).abs().max().item()
        assert error < 1e-9, f"{name}: {error:.3g}"
    gradients = []
    for given in ((x, y), (x.cpu(), y.cpu())):
        leaves = [t.detach().double().requires_grad_() for t in given]
        gradients.append([g.cpu() for g in torch.autograd.grad(ff.cca(*leaves).mean, leaves)])
    for mine, right in zip(*gradients, strict=True):
        assert_close(mine, right, "gradient", largest=torch.tensor(1.0))


METHODS = ("cca", "svcca", "pwcca", "cka", "procrustes", "rv")


def streaming_matches(precision, dtype, device):
    """Of images in two memory orders, in batches; against a CPU in float64."""
    layers = [x.to(dtype) for x in related(1200, (24, 16, 9), device)]
    images = {f"{i}": x.view(48, 25, -1).transpose(1, 2).reshape(48, -1, 5, 5) for i, x in enumerate(layers)}
    images["1"] = images["1"].to(memory_format=torch.channels_last)
    mine, right = ff.StreamingCCA(precision=precision), ff.StreamingCCA()
    for first in range(0, 48, 20):
        batch = {name: x[first : first + 20] for name, x in images.items()}
        mine.update(batch)
        right.update({name: x.cpu() for name, x in batch.items()})
    for method in METHODS:
        error = (mine.compute(method).matrix.cpu() - right.compute(method).matrix).abs().max().item()
        assert error < (1e-9 if precision == "high" else 1e-5), f"{method}: {error:.3g}"


def without_tf32(device):
    """Float32 products stay float32 products where the process allows TF32, said in the old way and in the new."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    for allow, forbid in (
        (lambda: setattr(matmul, "allow_tf32", True), lambda: setattr(matmul, "allow_tf32", False)),
        (lambda: setattr(matmul, "fp32_precision", "tf32"), lambda: setattr(matmul, "fp32_precision", before)),
    ):
        allow()
        try:
            streaming_matches("fast", torch.float32, device)
            x, y = related(900, (40, 30), device)
            error = (ff.cca(x, y, precision="fast").rho - ff.cca(x, y).rho).abs().max().item()
            assert error < 1e-5, f"cca: {error:.3g}"
            assert matmul.fp32_precision == "tf32"
        finally:
            forbid()


def reduced(device):
    """A group of one process, over NCCL on a GPU: sums that lie there, and on the CPU, which NCCL doesn't reach."""
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for place in {device.type: device, "cpu": torch.device("cpu")}.values():
            x, y = related(900, (24, 16), place)
            stream = ff.StreamingCCA().update({"x": x, "y": y})
            alone = stream.compute("svcca").matrix
            error = (stream.all_reduce().compute("svcca").matrix - alone).abs().max().item()
            assert error < 1e-12, f"sums on {place}: {error:.3g}"
            assert {t.device.type for state in stream._states for t in state.tensors()} == {place.type}
    finally:
        dist.destroy_process_group()


CHECKS = [
    *(
        Check(
            "_pack_samples", name_of(dtype), lambda device, dtype=dtype: pack_matches(torch.ops.fourfold, dtype, device), True
        )
        for dtype in DTYPES
    ),
    Check("_add_wide_", "float32", lambda device: add_wide_matches(torch.ops.fourfold, device), hot=True),
    *(
        Check("_count_nonfinite", name_of(dtype), lambda device, dtype=dtype: count_matches(torch.ops.fourfold, dtype, device))
        for dtype in DTYPES
    ),
    *(
        Check("_gram_", name_of(dtype), lambda device, dtype=dtype: grams_match(torch.ops.fourfold, dtype, device), hot=True)
        for dtype in HALVES
    ),
    *(
        Check(
            "_gram_",
            f"{name_of(dtype)} larger",
            lambda device, dtype=dtype: grams_match(torch.ops.fourfold, dtype, device, MORE_GRAMS, STYLES[:3]),
            hot=True,
        )
        for dtype in HALVES
    ),
    *(
        Check("_gram_", f"{name_of(dtype)} real", lambda device, d=dtype: gram_rounds_little(torch.ops.fourfold, d, device))
        for dtype in HALVES
    ),
    Check("_gram_", "empty", lambda device: nothing_to_multiply(torch.ops.fourfold, device)),
    *(
        Check("_image_spectra", name_of(dtype), lambda device, dtype=dtype: spectra_match(torch.ops.fourfold, dtype, device))
        for dtype in DTYPES
    ),
    Check(
        "_image_spectra",
        "float32 larger",
        lambda device: spectra_match(torch.ops.fourfold, torch.float32, device, MORE_IMAGES),
        hot=True,
    ),
    *(
        Check(
            "_spectra_gram_",
            name_of(dtype),
            lambda device, dtype=dtype: spectra_grams_match(
                torch.ops.fourfold, dtype, device, SPECTRA_GRAMS + MORE_SPECTRA_GRAMS
            ),
            hot=True,
        )
        for dtype in WIDE
    ),
    Check(OPS, "stream", streamed),
    Check(OPS, "CUDA graph", captured),
    Check(OPS, "second device", second_device),
    Check(OPS, "no synchronisation", unsynchronised),
    Check(FUNCTIONS, "against a CPU", functions_match),
    *(
        Check("StreamingCCA", f"{name_of(dtype)} {precision}", functools.partial(streaming_matches, precision, dtype))
        for precision, dtype in (("high", torch.float32), ("fast", torch.float32), ("fast", torch.bfloat16))
    ),
    Check("StreamingCCA, cca", "no TF32", without_tf32),
    Check("StreamingCCA.all_reduce", "a group of one process", reduced),
    *(
        Check("_pack_samples", f"more than 2**31 elements{', last' * last}", functools.partial(pack_beyond_31_bits, last))
        for last in (False, True)
    ),
    *(
        Check("_gram_", f"more than 2**31 elements {size}{', last' * last}", functools.partial(gram_beyond_31_bits, size, last))
        for size, last in (((9, 64, 1 << 22), False), ((9, 64, 1 << 22), True), ((2, 1, (1 << 30) + 8), False))
    ),
    Check("_count_nonfinite", "more than 2**31 elements", count_beyond_31_bits),
    Check("_add_wide_", "more than 2**31 elements apart", add_wide_beyond_31_bits),
]


# ---- speed ----

# name: images, channels, positions
LAYERS = {
    "56x56 256": (64, 256, 3136),
    "28x28 512": (64, 512, 784),
    "14x14 1024": (128, 1024, 196),
    "7x7 2048": (256, 2048, 49),
    "tokens 768": (65536, 768, 1),
}


def activations(layer, dtype, last, device, small):
    """Inputs [N, C, S] of one layer, enough of them to leave the cache."""
    n, c, s = LAYERS[layer]
    n, c = (4, min(c, 64)) if small else (n, c)
    x = torch.randn(n, c, s, device=device).to(dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if last else x
    return [x, *(x.clone() for _ in range(rotation(x.numel() * x.element_size(), device) - 1))]


def rows_of(x):
    return x.transpose(1, 2).reshape(-1, x.shape[1])


def wide_product(a, b):
    """a @ b, of 16-bit ones in float32."""
    if a.device.type == "cuda" and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def gram_contest(layer, dtype, last, cross, device, small):
    """The floor is the vendor's product of samples that lie in rows already: a full one, where x x^T takes ours half of it."""
    inputs = activations(layer, dtype, last, device, small)
    other = inputs[0].clone()
    rows = rows_of(inputs[0]).contiguous()

    def ours(x):
        total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=device)
        torch.ops.fourfold._gram_(x, other if cross else x, total)
        return total[0]

    def eager(x):
        return wide_product(rows_of(x).T, rows_of(other) if cross else rows_of(x))[0]

    def single(x):
        return (rows_of(x).float().T @ rows_of(other if cross else x).float())[0]

    floor = {"cuBLAS GEMM": lambda x: wide_product(rows.T, rows)}
    rivals = {"permute and GEMM": eager, "permute and float32 GEMM": single}
    return Contest(inputs, None, ours, rivals, 2**-7 * len(rows), floor)


def scatter_contest(layer, dtype, last, device, small):
    """Float64 all the way: pivot, panel, product. The floor is the vendor's product alone."""
    inputs = activations(layer, dtype, last, device, small)
    rows = rows_of(inputs[0]).double()

    def ours(x):
        state = Moments([x.shape[1]], [[0]], device)
        state.update([x], False, {})
        return state.cross(0, 0)[0]

    def eager(x):
        centred = rows_of(x).double()
        centred -= centred.mean(0)
        return (centred.T @ centred)[0]

    return Contest(inputs, None, ours, {"permute and float64 GEMM": eager}, 1e-6, {"dgemm": lambda x: rows.T @ rows})


def pack_contest(layer, dtype, last, wide, device, small):
    inputs = activations(layer, dtype, last, device, small)
    c, count = inputs[0].shape[1], min(8192, inputs[0].shape[0] * inputs[0].shape[2])
    pivot = torch.randn(c, dtype=torch.float64, device=device)
    moved = count * c * (dtype.itemsize + wide.itemsize)
    panels = {id(x): torch.empty(count, c + 1, dtype=wide, device=device) for x in inputs}

    def ours(x):
        panel, sums = panels[id(x)], torch.zeros(c + 1, dtype=torch.float64, device=device)
        torch.ops.fourfold._pack_samples(x, pivot, 0, panel[:, :-1], sums, panel[:, -1])
        return sums[:-1]

    def eager(x):
        return (rows_of(x)[:count] - pivot).to(wide).sum(0, dtype=torch.float64)

    return Contest(inputs, moved, ours, {"plain torch, without norms": eager}, 1e-6)


def count_contest(dtype, device, small):
    x = torch.randn(1 << (16 if small else 26), device=device).to(dtype)
    moved = x.numel() * dtype.itemsize
    inputs = [x, *(x.clone() for _ in range(rotation(moved, device) - 1))]
    count = torch.ops.fourfold._count_nonfinite
    return Contest(inputs, moved, count, {"isfinite and sum": lambda x: (~x.isfinite()).sum()}, 0.0)


def add_wide_contest(device, small):
    size = 64 if small else 4096
    total = torch.zeros(size, size, dtype=torch.float64, device=device)
    part = torch.randn(size, size, device=device)
    inputs = [part, *(part.clone() for _ in range(2))]

    def ours(part):
        torch.ops.fourfold._add_wide_(total, part)
        return part[0]

    def eager(part):
        total.add_(part)
        return part[0]

    return Contest(inputs, 20 * part.numel(), ours, {"add_": eager}, 0.0)


def spectra_contest(wide, device, small):
    """Of images of 64 channels; what is compared is one frequency."""
    n, c, side = (4, 8, 6) if small else (128, 64, 32)
    x = torch.randn(n, c, side, side, device=device)
    pivot = torch.randn(c, side, side, dtype=torch.float64, device=device)
    spectra = torch.empty(side * side // 2 + 2, 2, n, c, dtype=wide, device=device)
    moved = 4 * x.numel() + spectra.numel() * wide.itemsize
    inputs = [x, *(x.clone() for _ in range(rotation(moved, device) - 1))]

    def ours(x):
        torch.ops.fourfold._image_spectra(x, pivot, spectra)
        return spectra[side // 2 + 1]  # k = 0, l = 1, after the first column

    def eager(x):
        transformed = torch.fft.rfft2((x - pivot).to(wide)).flatten(2).permute(2, 0, 1)
        return torch.stack([transformed.real, -transformed.imag], 1)[1]

    return Contest(inputs, moved, ours, {"rfft2 and a transposition": eager}, 1e-4)


def spectra_gram_contest(wide, device, small):
    frequencies, n, c = (6, 20, 16) if small else (514, 128, 128)
    a = torch.randn(frequencies, 2, n, c, device=device).to(wide)
    inputs = [a, *(a.clone() for _ in range(2))]

    def ours(a):
        total = torch.zeros(frequencies, c, c, dtype=torch.float64, device=device)
        torch.ops.fourfold._spectra_gram_(a, a, total, None)
        return total

    def eager(a):
        turned = torch.stack([a[:, 0] + a[:, 1], a[:, 1] - a[:, 0]], 1)
        return torch.bmm(a.flatten(1, 2).mT, turned.flatten(1, 2)).double()

    return Contest(inputs, None, ours, {"bmm": eager}, 1e-4)


def all_pairs_contest(method, precision, device, small):
    """20 layers of 256 at once, on 10,000 samples, against one Gram matrix in float64 and batched decompositions in torch."""
    count, d, n = (3, 16, 200) if small else (20, 256, 10000)
    inputs = [torch.cat(related(n, (d,) * count, device), 1)]
    first, second = torch.triu_indices(count, count, device=device)

    def ours(x):
        stream = ff.StreamingCCA(precision=precision)
        for batch in x.split(2048):
            stream.update({f"{i}": layer for i, layer in enumerate(batch.split(d, 1))})
        return stream.compute(method).matrix

    def whitened(x):
        x = x.double()
        x = x - x.mean(0)
        gram = (x.T @ x).view(count, d, count, d).transpose(1, 2)
        w, v = torch.linalg.eigh(gram.diagonal().permute(2, 0, 1))
        if method == "svcca":
            kept = w.cumsum(1) > (1 - 0.99) * w.sum(1, keepdim=True)
            w = torch.where(kept, w, math.inf)
        root = v * w.rsqrt()[:, None]
        ranks = w.isfinite().sum(1)
        return root[first].mT @ gram[first, second] @ root[second], torch.minimum(ranks[first], ranks[second])

    def batched(x):
        products, ranks = whitened(x)
        matrix = torch.empty(count, count, dtype=torch.float64, device=device)
        matrix[first, second] = matrix[second, first] = torch.linalg.svdvals(products).sum(1) / ranks
        return matrix

    def pair_by_pair(x):
        bases = [torch.linalg.qr(layer - layer.mean(0))[0] for layer in x.double().split(d, 1)]
        matrix = torch.empty(count, count, dtype=torch.float64, device=device)
        for i, j in itertools.combinations_with_replacement(range(count), 2):
            matrix[i, j] = matrix[j, i] = torch.linalg.svdvals(bases[i].T @ bases[j]).mean()
        return matrix

    rivals = {"torch, one Gram": batched} | ({"torch, pair by pair": pair_by_pair} if method == "cca" else {})
    return Contest(inputs, None, ours, rivals, 1e-5 if precision == "fast" else 1e-8, graph=False)


def newton_schulz(m, iterations, dtype):
    """The nuclear norms [...] of m, whose singular values are at most 1, by products alone: its polar factor times it."""
    x = m = m.to(dtype)
    for _ in range(iterations):
        x = torch.baddbmm(x, x, x.mT @ x, beta=1.5, alpha=-0.5)
    return (x * m).sum((-2, -1), dtype=torch.float64)


def nuclear_contest(pairs, d, device, small):
    """Mean correlations of many pairs at once. ours is what the library does; what is faster here should take its place.

    Iterations that leave small singular values behind (10 of them 3e-4 in a mean, 15 of them 8e-6) stand among what does less.
    """
    pairs, d = (4, 16) if small else (pairs, d)
    layers = related(40 * d, (d,) * 4, device)
    bases = [torch.linalg.qr((x - x.mean(0)).double())[0] for x in layers]
    few = [a.T @ b for a, b in itertools.combinations_with_replacement(bases, 2)]
    m = torch.stack([few[i % len(few)] for i in range(pairs)])

    def of(call):
        return lambda m: call(m) / d

    return Contest(
        [m],
        None,
        of(lambda m: torch.linalg.svdvals(m).sum(-1)),
        {
            "eigvalsh": of(lambda m: torch.linalg.eigvalsh(m @ m.mT).clamp(min=0).sqrt().sum(-1)),
            "svdvals on the CPU": of(lambda m: torch.linalg.svdvals(m.cpu()).sum(-1).to(device)),
            "Newton-Schulz float64 30": of(lambda m: newton_schulz(m, 30, torch.float64)),
        },
        1e-7,
        {
            f"Newton-Schulz {name_of(dtype)} {iterations}": of(
                functools.partial(newton_schulz, iterations=iterations, dtype=dtype)
            )
            for dtype, iterations in itertools.product((torch.float32, torch.float64), (10, 15))
        },
        graph=False,
    )


def speed(op, name, make, *options, hot=False):
    return Speed(op, name, functools.partial(make, *options), hot)


BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SPEEDS = [
    speed("_gram_", "bfloat16 28x28 512", gram_contest, "28x28 512", BF16, False, False, hot=True),
    speed("StreamingCCA", "float32 28x28 512, one layer's scatter", scatter_contest, "28x28 512", F32, False, hot=True),
    speed("cca", "210 nuclear norms d=256", nuclear_contest, 210, 256, hot=True),
    speed("StreamingCCA", "cca of 20 layers d=256 n=10000", all_pairs_contest, "cca", "high", hot=True),
    speed("_pack_samples", "bfloat16 28x28 512 to float64", pack_contest, "28x28 512", BF16, False, F64, hot=True),
    speed("_count_nonfinite", "bfloat16 2**26", count_contest, BF16, hot=True),
    speed("_add_wide_", "float32 4096²", add_wide_contest, hot=True),
    speed("_image_spectra", "128 images 32x32 64 to float64", spectra_contest, F64, hot=True),
    speed("_spectra_gram_", "514 frequencies, 128 channels, float64", spectra_gram_contest, F64, hot=True),
    *(
        speed("_gram_", f"{name_of(dtype)} {layer}{', last' * last}{', x y' * cross}", gram_contest, layer, dtype, last, cross)
        for layer, dtype, last, cross in itertools.product(LAYERS, HALVES, (False, True), (False, True))
        if (layer, dtype, last, cross) != ("28x28 512", BF16, False, False)
        and (dtype == BF16 or layer == "28x28 512")
        and not (last and layer == "tokens 768")
    ),
    *(
        speed("StreamingCCA", f"{name_of(dtype)} {layer}, one layer's scatter", scatter_contest, layer, dtype, False)
        for layer, dtype in itertools.product(LAYERS, (F32, BF16))
        if (layer, dtype) != ("28x28 512", F32)
    ),
    *(
        speed("StreamingCCA", f"{method} of 20 layers d=256 n=10000, {precision}", all_pairs_contest, method, precision)
        for method, precision in (("cca", "fast"), ("svcca", "high"))
    ),
    *(
        speed("_pack_samples", f"{name_of(d)} {layer}{', last' * last} to {name_of(wide)}", pack_contest, layer, d, last, wide)
        for layer, d, last, wide in itertools.product(("28x28 512", "7x7 2048"), (BF16, F32), (False, True), WIDE)
        if (layer, d, last, wide) != ("28x28 512", BF16, False, F64)
    ),
    speed("_count_nonfinite", "float32 2**26", count_contest, F32),
    speed("_image_spectra", "128 images 32x32 64 to float32", spectra_contest, F32),
    speed("_spectra_gram_", "514 frequencies, 128 channels, float32", spectra_gram_contest, F32),
]
