"""Masks, masked, sparse and superposed products: what tests/gpu/check.py checks and measures."""

import functools
import itertools
import math

import fourfold as ff
import torch
import torch.nn.functional as F
from fourfold.reference import maskmm as reference
from gpu.harness import DTYPES, Check, Contest, Speed, assert_close, needs_gpu, needs_memory, rotation, second_gpu

MASKS = "pack_mask, unpack_mask, bernoulli_mask, threshold_mask"
SPARSE = "_mask_starts, _mask_columns, _gather_mask, _scatter_mask, _sparse_linear, _sparse_linear_transposed, sddmm"
SUPERPOSED = "_superpose, _masked_dots, task_linear, _task_linear_transposed, _task_outer"
RESCALES = ("", "dwr", "dwr_grad")
FORMATS = ("bitmap", "csr16", "slab")
# One row and column; one word, one more and one less; rows that begin at each place of a random counter.
SHAPES = ((1, 1), (3, 63), (2, 64), (5, 65), (7, 130), (33, 300), (6, 3, 3, 3))


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def work_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def unpacked(bits, k):
    """Bits of any leading dimensions as bool."""
    return reference.unpack_mask(bits.flatten(0, -2), k).unflatten(0, bits.shape[:-1])


def drawn_mask(shape, density, device):
    return (torch.rand(shape) < density).to(device)


def same_bits(result, expected, what):
    assert result.dtype == torch.uint8
    assert torch.equal(result.cpu(), expected.cpu()), f"{what}: {int((result.cpu() != expected.cpu()).sum())} bytes differ"


# ---- masks ----


def bits_match(ops, device):
    """To bits and back, of masks in several memory orders; bits that don't lie on words."""
    torch.manual_seed(0)
    for shape in (*SHAPES, (0, 5), (4, 0), (2, 0, 3)):
        mask = drawn_mask(shape, 0.4, device)
        k = math.prod(shape[1:])
        for given in (mask, mask.movedim(0, -1).contiguous().movedim(-1, 0)):
            bits = ops.pack_mask(given)
            same_bits(bits, reference.pack_mask(mask), f"pack_mask {shape}")
        memory = torch.zeros(bits.numel() + 1, dtype=torch.uint8, device=device)
        memory[1:] = bits.flatten()
        for given in (bits, memory[1:].view(bits.shape)):
            assert torch.equal(ops.unpack_mask(given, k), mask.reshape(shape[0], k)), f"unpack_mask {shape}"


def samplers_match(ops, dtype, device):
    """The bits of every device: what the reference makes on a CPU."""
    torch.manual_seed(1)
    for shape in SHAPES:
        scores = (torch.randn(shape) * 4).to(dtype)
        edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, 87.0, -87.0, 90.0, -90.0, 1e-30, -1e-30]).to(dtype)
        scores.flatten()[: len(edges)] = edges[: scores.numel()]
        for seed, offset in ((0, 0), (1, 2**32 - 1), (-(2**62) - 5, 2**40 + 3), (2**63 - 1, -2)):
            given = torch.tensor(seed)
            bits = ops.bernoulli_mask(scores.to(device), given.to(device), offset)
            same_bits(bits, reference.bernoulli_mask(scores, given, offset), f"bernoulli_mask {shape} {seed} {offset}")
        for threshold in (0.0, 0.3, -0.7, float(scores.flatten()[-1]), math.inf):
            bits = ops.threshold_mask(scores.to(device), threshold)
            same_bits(bits, reference.threshold_mask(scores, threshold), f"threshold_mask {shape} {threshold}")


def topk_matches(ops, dtype, device, shapes=(*SHAPES, (70, 300))):
    """With ties of all kinds: none, some, nothing but ties, zeros of both signs."""
    torch.manual_seed(2)
    for shape, kind, largest_abs in itertools.product(shapes, ("random", "rounded", "equal", "zeros"), (True, False)):
        scores = torch.randn(shape)
        if kind == "rounded":
            scores = (scores * 2).round()
        elif kind == "equal":
            scores = torch.full(shape, -1.5)
        elif kind == "zeros":
            scores = torch.where(torch.rand(shape) < 0.5, -0.0, 0.0)
        elif scores.numel() > 4:
            scores.flatten()[:4] = torch.tensor([math.inf, -math.inf, 1e-40, -1e-40])
        scores = scores.to(dtype)
        for density in (1e-12, 0.1, 0.5, 1.0):
            bits = ops.topk_mask(scores.to(device), density, largest_abs)
            expected = reference.topk_mask(scores, density, largest_abs)
            same_bits(bits, expected, f"topk_mask {shape} {kind} {density} abs={largest_abs}")
    assert ops.topk_mask(torch.zeros(0, 5, dtype=dtype, device=device), 0.5, True).shape == (0, 8)


# ---- effective weights and products with them ----


def masked_weight(shape, dtype, device, density=0.4):
    """A weight with NaN off the mask, its bits, scores."""
    mask = drawn_mask(shape, density, device)
    mask.flatten()[0] = True
    weight = torch.randn(shape).to(device, dtype)
    return torch.where(mask, weight, math.nan), reference.pack_mask(mask), torch.randn(shape).to(device)


def effective_matches(ops, dtype, device, shapes=((5, 65), (6, 3, 3, 3), (33, 300))):
    """_apply_mask, and the gradients of weight and scores; off the mask weights and gradients may be NaN."""
    torch.manual_seed(3)
    for shape, signed, rescale in itertools.product(shapes, (False, True), RESCALES):
        what = f"{shape} signed={signed} {rescale!r}"
        weight, bits, scores = masked_weight(shape, dtype, device)
        scores = scores.to(work_type(dtype))
        scores.flatten()[1] = 0
        for out in {dtype} if dtype == torch.float64 else (dtype, torch.bfloat16):
            exact = reference.apply_mask(weight.double(), bits, scores, signed, rescale, torch.float64)
            assert_close(ops._apply_mask(weight, bits, scores, signed, rescale, out), exact, f"_apply_mask {what}")
        grad = torch.where(reference.kept(bits, weight), torch.randn(shape).to(device), math.nan).to(dtype)
        of_weight, nothing = ops._mask_gradients(grad, weight, bits, scores, "one", signed, rescale, [True, False])
        assert nothing.shape == (0,)
        exact = reference.apply_mask(grad.double(), bits, scores, signed, rescale, torch.float64)
        assert_close(of_weight, exact, f"gradient of weight: {what}")
        off = ~reference.kept(bits, weight)
        assert bool((of_weight[off] == 0).all()), f"the gradient off the mask is not 0: {what}"

        weight, grad = weight.nan_to_num(0.7), torch.randn(shape).to(device, dtype)
        for slope in ("sigmoid", "sign", "one"):
            given = weight, bits, scores, slope, signed, rescale, [False, True]
            nothing, of_scores = ops._mask_gradients(grad, *given)
            assert nothing.shape == (0,)
            assert of_scores.dtype == scores.dtype
            exact = reference.mask_gradients(grad.double(), weight.double(), bits, scores.double(), *given[3:])[1]
            assert_close(of_scores, exact, f"gradient of scores: {slope} {what}")


SIGNS_AND_RESCALES = (False, ""), (True, "dwr"), (False, "dwr_grad")


def linear_matches(
    ops, dtype, device, rows=(1, 5, 40, 150), shapes=((5, 65), (33, 300), (70, 1100)), options=SIGNS_AND_RESCALES
):
    """_masked_linear and its way back, against the effective weight; weights may be wider than x, but the CPU
    rounds the gradient of the effective weight to x's type then."""
    torch.manual_seed(4)
    wider = work_type(dtype) if ops is not torch.ops.fourfold or device.type == "cuda" else dtype
    for m, shape in itertools.product(rows, shapes):
        for signed, rescale in options:
            kinds = {dtype, wider} if rescale else {dtype}
            for kind in kinds:
                weight, bits, scores = masked_weight(shape, kind, device)
                weight, scores = weight.nan_to_num(0.7), scores.to(work_type(dtype))
                x, grad = (torch.randn(m, n).to(device, dtype) for n in shape[::-1])
                bias = torch.randn(shape[0]).to(device, dtype) if m % 2 else None
                what = f"{m} {shape} {name_of(kind)} signed={signed} {rescale!r}"
                effective = reference.effective_for(x, weight, bits, scores, signed, rescale)[0].double()
                y = ops._masked_linear(x, weight, bits, bias, scores, "one", signed, rescale)
                exact = F.linear(x.double(), effective, None if bias is None else bias.double())
                assert_close(y, exact, f"_masked_linear {what}")
                given = "sigmoid", signed, rescale
                results = ops._masked_linear_backward(grad, x, weight, bits, scores, *given, [True] * 3)
                assert_close(results[0], grad.double() @ effective, f"gradient of x: {what}")
                of_effective = grad.double().T @ x.double()
                exact = reference.mask_gradients(of_effective, weight.double(), bits, scores.double(), *given, [True] * 2)
                for result, right, name in zip(results[1:], exact, ("weight", "scores"), strict=True):
                    assert_close(result, right, f"gradient of {name}: {what}")
                again = ops._masked_linear(x, weight, bits, bias, scores, "one", signed, rescale)
                assert torch.equal(again, y), f"not the same twice: {what}"
    nothing = torch.zeros(0, 65, dtype=dtype, device=device)
    weight, bits, _ = masked_weight((5, 65), dtype, device)
    assert ops._masked_linear(nothing, weight, bits, None, None, "one", False, "").shape == (0, 5)


# ---- sparse weights ----


def starts_of(mask, slab):
    n, k = mask.shape
    pieces = -(-k // slab)
    counts = F.pad(mask, (0, pieces * slab - k)).reshape(n * pieces, slab).sum(1)
    return F.pad(counts.cumsum(0), (1, 0))


def places_match(ops, dtype, device, shapes=((1, 1), (5, 65), (7, 200), (40, 700), (3, 9000))):
    torch.manual_seed(5)
    for shape, density in itertools.product(shapes, (0.0, 0.02, 0.5, 1.0)):
        what = f"{shape} {density}"
        mask = drawn_mask(shape, density, device)
        bits, nnz = reference.pack_mask(mask), int(mask.sum())
        for slab in (64, 256, 2**20):
            assert torch.equal(ops._mask_starts(bits, shape[1], slab), starts_of(mask, slab)), f"_mask_starts {what} {slab}"
        columns = ops._mask_columns(bits, nnz)
        assert columns.dtype == torch.int16
        assert torch.equal(columns.int() & 0xFFFF, mask.nonzero()[:, 1].int() & 0xFFFF), f"_mask_columns {what}"
        weight = torch.randn(shape).to(device, dtype)
        values = ops._gather_mask(weight, bits, nnz)
        assert torch.equal(values, weight[mask]), f"_gather_mask {what}"
        assert torch.equal(ops._scatter_mask(values, bits, shape[1]), torch.where(mask, weight, 0)), f"_scatter_mask {what}"


def sparse_matches(ops, dtype, device, rows=(1, 3, 8, 20, 70), shapes=((1, 1), (9, 130), (70, 700))):
    torch.manual_seed(6)
    for m, format_, shape in itertools.product(rows, FORMATS, shapes):
        for density in (0.0, 0.05, 0.5):
            what = f"{m} {format_} {shape} {density}"
            n, k = shape
            mask = drawn_mask(shape, density, device)
            bits = reference.pack_mask(mask)
            weight = torch.where(mask, torch.randn(shape).to(device), 0).to(dtype)
            starts = starts_of(mask, 256 if format_ == "slab" else max(k, 1))
            columns = None if format_ == "bitmap" else mask.nonzero()[:, 1].to(torch.int16)
            sparse = weight[mask], bits, starts, columns
            x, grad = (torch.randn(m, size).to(device, dtype) for size in (k, n))
            bias = torch.randn(n).to(device, dtype) if m % 2 else None
            y = ops._sparse_linear(x, *sparse, bias, format_)
            exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            assert_close(y, exact, f"_sparse_linear {what}")
            back = ops._sparse_linear_transposed(grad, *sparse, k, format_)
            assert_close(back, grad.double() @ weight.double(), f"_sparse_linear_transposed {what}")
            assert torch.equal(ops._sparse_linear(x, *sparse, bias, format_), y), f"not the same twice: {what}"


def wrong_counts(ops, device):
    """Nothing looks at the number of set bits in time, so it may be wrong: what there is is right, the rest is 0."""
    torch.manual_seed(12)
    mask = drawn_mask((9, 130), 0.4, device)
    bits, nnz, weight = reference.pack_mask(mask), int(mask.sum()), torch.randn(mask.shape).to(device)
    values, columns = weight[mask], mask.nonzero()[:, 1].to(torch.int16)
    for count in (1, nnz - 5, nnz + 7, mask.numel()):
        there, extra = min(count, nnz), max(0, count - nnz)
        for result, exact in ((ops._gather_mask(weight, bits, count), values), (ops._mask_columns(bits, count), columns)):
            assert torch.equal(result, F.pad(exact[:there], (0, extra)))
    few = values[: nnz - 5].clone()
    dense = torch.zeros_like(weight).masked_scatter_(mask, F.pad(few, (0, 5)))
    assert torch.equal(ops._scatter_mask(few, bits, 130), dense)
    x, grad = torch.randn(3, 130).to(device), torch.randn(3, 9).to(device)
    for format_, given in (("bitmap", None), ("csr16", columns[: nnz - 5].clone())):
        sparse = few, bits, starts_of(mask, 130), given
        assert_close(ops._sparse_linear(x, *sparse, None, format_), x.double() @ dense.double().T, format_)
        back = ops._sparse_linear_transposed(grad, *sparse, 130, format_)
        assert_close(back, grad.double() @ dense.double(), format_)
    bits[:, -1] = 255  # pad bits
    values = torch.ones(nnz + 9 * 8, device=device)
    assert bool(ops._sparse_linear(x, values, bits, starts_of(mask, 130), None, None, "bitmap").isfinite().all())


def off_words(ops, device):
    """Bits that don't lie on 64-bit words."""
    mask = drawn_mask((5, 200), 0.5, device)
    bits, weight = reference.pack_mask(mask), torch.randn(5, 200).to(device)
    memory = torch.zeros(bits.numel() + 1, dtype=torch.uint8, device=device)
    memory[1:] = bits.flatten()
    assert torch.equal(ops._gather_mask(weight, memory[1:].view(bits.shape), int(mask.sum())), weight[mask])


def wide_rows_match(ops, device):
    """More than 65536 columns, of which 16 bits don't tell them all apart."""
    mask = drawn_mask((3, 70000), 0.01, device)
    weight = torch.where(mask, torch.randn(mask.shape).to(device), 0)
    columns = mask.nonzero()[:, 1].to(torch.int16)
    sparse = weight[mask], reference.pack_mask(mask), starts_of(mask, 65536), columns
    x, grad = torch.randn(2, 70000).to(device), torch.randn(2, 3).to(device)
    assert_close(ops._sparse_linear(x, *sparse, None, "slab"), x.double() @ weight.double().T, "_sparse_linear")
    back = ops._sparse_linear_transposed(grad, *sparse, 70000, "slab")
    assert_close(back, grad.double() @ weight.double(), "_sparse_linear_transposed")


def sddmm_matches(op, dtype, device):
    torch.manual_seed(7)
    for shape, depth, density in itertools.product(((1, 1), (9, 130), (70, 200)), (1, 37, 150), (0.05, 0.5)):
        mask = drawn_mask(shape, density, device)
        a, b = (torch.randn(size, depth).to(device, dtype) for size in shape)
        values = op(a, b, reference.pack_mask(mask), int(mask.sum()))
        assert_close(values, (a.double() @ b.double().T)[mask], f"sddmm {shape} {depth} {density}")


# ---- superposed masks ----


def superposed_match(ops, dtype, device):
    torch.manual_seed(8)
    for tasks, shape in ((1, (5, 65)), (7, (33, 100)), (40, (9, 300))):
        what = f"{tasks} {shape}"
        masks = drawn_mask((tasks, *shape), 0.5, device)
        bits = torch.stack([reference.pack_mask(mask) for mask in masks])
        weight, other = (torch.randn(shape).to(device, dtype) for _ in range(2))
        alpha = torch.randn(tasks).to(device, work_type(dtype))
        exact = weight.double() * torch.einsum("t,tnk->nk", alpha.double(), masks.double())
        assert_close(ops._superpose(weight, bits, alpha), exact, f"_superpose {what}")
        dots = ops._masked_dots(weight, other, bits)
        assert dots.dtype == work_type(dtype)
        assert_close(dots, torch.einsum("nk,tnk->t", weight.double() * other.double(), masks.double()), f"_masked_dots {what}")
        assert torch.equal(ops._masked_dots(weight, other, bits), dots), f"not the same twice: {what}"


def tasks_match(ops, dtype, device, leads=((1,), (5,), (3, 2), (2, 9), (2, 2, 40)), shapes=((5, 65), (33, 100), (40, 300))):
    torch.manual_seed(9)
    for lead, shape in itertools.product(leads, shapes):
        what = f"{lead} {shape}"
        masks = drawn_mask((6, *shape), 0.5, device)
        bits = torch.stack([reference.pack_mask(mask) for mask in masks])
        weight = torch.randn(shape).to(device, dtype)
        x, grad = (torch.randn(*lead, size).to(device, dtype) for size in shape[::-1])
        task = torch.randint(6, lead[:1]).to(device)
        bias = torch.randn(shape[0]).to(device, dtype) if len(lead) == 1 else None
        each = masks[task].double()
        exact = torch.einsum("b...k,bnk->b...n", x.double(), weight.double() * each)
        exact = exact if bias is None else exact + bias.double()
        assert_close(ops.task_linear(x, weight, bits, task, bias), exact, f"task_linear {what}")
        back = ops._task_linear_transposed(grad, weight, bits, task)
        exact = torch.einsum("b...n,bnk->b...k", grad.double(), weight.double() * each)
        assert_close(back, exact, f"_task_linear_transposed {what}")
        outer = torch.einsum("bpn,bpk->bnk", *(t.double().reshape(lead[0], -1, t.shape[-1]) for t in (grad, x)))
        assert_close(ops._task_outer(grad, x, bits, task), (outer * each).sum(0), f"_task_outer {what}")


def unknown_tasks(ops, device):
    """A sample whose task there is not gets NaN; the others are as ever."""
    torch.manual_seed(10)
    masks = drawn_mask((2, 5, 70), 0.5, device)
    bits = torch.stack([reference.pack_mask(mask) for mask in masks])
    weight = torch.randn(5, 70).to(device)
    for lead in ((3,), (3, 10)):
        x, task = torch.randn(*lead, 70).to(device), torch.tensor([1, 2, -1], device=device)
        y = ops.task_linear(x, weight, bits, task, None)
        assert bool(y[1:].isnan().all())
        assert_close(y[:1], x[:1].double() @ (weight * masks[1]).double().T)


# ---- whole functions ----


def example(device):
    torch.manual_seed(11)
    x = torch.randn(48, 200, device=device, requires_grad=True)
    weight = torch.randn(96, 200, device=device, requires_grad=True)
    scores = torch.randn(96, 200, device=device, requires_grad=True)
    return x, weight, scores


def training_step(x, weight, scores, seed):
    """Results and gradients of one supermask layer of each kind."""
    results = []
    for options in ({"seed": seed, "rescale": "dwr"}, {"sampler": "topk", "density": 0.3}, {"sampler": "threshold"}):
        y = ff.supermask_linear(x, weight, scores, **options)
        results += [y.detach(), *torch.autograd.grad(y, [x, weight, scores], y.detach())]
    return results


def assert_near(results, expected, what):
    for result, right in zip(results, expected, strict=True):
        error, largest = (result.double() - right.double()).abs().max(), right.abs().max()
        assert bool(error <= 1e-5 * (1 + largest)), f"{what}: off by {error.item():.3g}"


def like_the_cpu(device):
    """The public functions on this device and on the CPU give the same masks and so, up to rounding, the same results."""
    leaves = example(torch.device("cpu"))
    expected = training_step(*leaves, torch.tensor(5))
    here = [t.detach().to(device).requires_grad_() for t in leaves]
    results = [t.cpu() for t in training_step(*here, torch.tensor(5, device=device))]
    assert_near(results, expected, "against the CPU")


def captured(device):
    """A CUDA graph that holds a training step gives the right results when it is replayed on new data and a new seed."""
    needs_gpu(device)
    leaves, seed = example(device), torch.tensor(1, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            training_step(*leaves, seed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = training_step(*leaves, seed)
    with torch.no_grad():
        for t in leaves:
            t.normal_()
        seed.fill_(77)
    graph.replay()
    torch.cuda.synchronize()
    assert_near(results, training_step(*leaves, seed), "replayed")


def streamed(device):
    """Work goes to the current stream, where it waits for what comes first, here a long sleep and then the data."""
    needs_gpu(device)
    data, weight, scores = example(device)
    seed = torch.tensor(3, device=device)
    expected = training_step(data, weight, scores, seed)
    late = torch.zeros_like(scores)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        late.copy_(scores.detach())
        results = training_step(data, weight, late.requires_grad_(), seed)
    torch.cuda.synchronize()
    assert_near(results, expected, "on another stream")


def every_op(device):
    """Each op once."""
    ops, n, k = torch.ops.fourfold, 48, 200
    x, weight, scores = (t.detach() for t in example(device))
    grad = torch.randn(48, 96, device=device)
    bits = ops.topk_mask(scores, 0.3, True)
    nnz = weight.numel() - int((1 - 0.3) * weight.numel())
    values, starts = ops._gather_mask(weight, bits, nnz), ops._mask_starts(bits, k, k)
    columns = ops._mask_columns(bits, nnz)
    masks = bits[None].repeat(3, 1, 1)
    task = torch.zeros(n, dtype=torch.int64, device=device)
    alpha = torch.ones(3, device=device)
    sparse = values, bits, starts, columns
    seed = torch.zeros((), dtype=torch.int64, device=device)
    return [
        ops.pack_mask(ops.unpack_mask(bits, k)),
        ops.bernoulli_mask(scores, seed, 0),
        ops.threshold_mask(scores, 0.0),
        ops._apply_mask(weight, bits, None, False, "dwr", torch.float32),
        *ops._masked_linear_backward(grad, x, weight, bits, scores, "sigmoid", False, "dwr_grad", [True] * 3),
        ops._masked_linear(x, weight, bits, None, scores, "one", False, ""),
        ops._scatter_mask(values, bits, k),
        ops._sparse_linear(x, *sparse, None, "csr16"),
        ops._sparse_linear_transposed(grad, *sparse, k, "csr16"),
        ops.sddmm(grad.T, x.T, bits, nnz),
        ops._superpose(weight, masks, alpha),
        ops._masked_dots(weight, weight, masks),
        ops.task_linear(x, weight, masks, task, None),
        ops._task_linear_transposed(grad, weight, masks, task),
        ops._task_outer(grad, x, masks, task),
    ]


def second_device(device):
    """Ops follow their tensors, whichever device is current."""
    second = second_gpu(device)
    assert all(result.device == second for result in every_op(second))
    tensors = [t.detach() for t in example(device)]
    here, there = (
        ff.supermask_linear(*(t.to(where) for t in tensors), sampler="topk", density=0.3) for where in (device, second)
    )
    assert_near([there.cpu()], [here.cpu()], "on the second device")


def unsynchronised(device):
    """No op waits for the device."""
    needs_gpu(device)
    every_op(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_op(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled(device):
    x, weight, scores = example(device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"

    def network(x, weight, scores):
        return ff.supermask_linear(x, weight, scores, sampler="topk", density=0.3) * 2

    y = torch.compile(network, fullgraph=True, backend=backend)(x, weight, scores)
    assert_near([y], [network(x, weight, scores)], "compiled")


def beyond_31_bits(device):
    """Weights of more than 2**31 elements; the first and the last rows are compared, with reference bits of these alone."""
    n, k = 33000, 65536
    needs_memory(device, 14 * n * k)
    ops = torch.ops.fourfold
    scores = torch.zeros(n, k, dtype=torch.bfloat16, device=device)
    for end in (0, -1):
        scores[end].normal_()
    first, last = slice(0, 1), slice(-1, None)
    seed = torch.tensor(9, device=device)
    bits = ops.bernoulli_mask(scores, seed, 0)
    counters = (n - 1) * k // 4  # of the rows before the last
    for end, offset in ((first, 0), (last, counters)):
        same_bits(bits[end], reference.bernoulli_mask(scores[end].cpu(), seed.cpu(), offset), f"bernoulli_mask {end}")
    bits = ops.topk_mask(scores, k / (n * k), True)
    kept = reference.unpack_mask(bits[[0, -1]], k)
    assert int(kept.sum()) == n * k - int((1 - k / (n * k)) * n * k)
    bits = ops.threshold_mask(scores, 0.25)
    for end in (first, last):
        same_bits(bits[end], reference.threshold_mask(scores[end].cpu(), 0.25), f"threshold_mask {end}")
    nnz = int((scores >= 0.25).sum())
    values = ops._gather_mask(scores, bits, nnz)
    assert torch.equal(values, scores[[0, -1]][scores[[0, -1]] >= 0.25])
    effective = ops._apply_mask(scores, bits, None, False, "", torch.bfloat16)
    assert torch.equal(ops._scatter_mask(values, bits, k), effective)
    x = torch.randn(2, k, dtype=torch.bfloat16, device=device)
    y = ops._masked_linear(x, scores, bits, None, None, "one", False, "")
    starts = ops._mask_starts(bits, k, k)
    for result in (y, ops._sparse_linear(x, values, bits, starts, None, None, "bitmap")):
        for end in (first, last):
            assert_close(result[:, end], x.double() @ effective[end].double().T, f"{end}")


def only_on_gpu(run):
    """A CPU looks at values, and refuses."""

    def check(device):
        needs_gpu(device)
        run(torch.ops.fourfold, device)

    return check


CHECKS = [
    Check("pack_mask, unpack_mask", "bits", lambda device: bits_match(torch.ops.fourfold, device), hot=True),
    *(
        Check(
            "bernoulli_mask, threshold_mask",
            f"{name_of(dtype)} the CPU's bits",
            lambda device, dtype=dtype: samplers_match(torch.ops.fourfold, dtype, device),
            hot=True,
        )
        for dtype in DTYPES
    ),
    *(
        Check(
            "topk_mask", name_of(dtype), lambda device, dtype=dtype: topk_matches(torch.ops.fourfold, dtype, device), hot=True
        )
        for dtype in DTYPES
    ),
    *(
        Check(
            "_apply_mask, _mask_gradients",
            name_of(dtype),
            lambda device, dtype=dtype: effective_matches(torch.ops.fourfold, dtype, device),
            hot=True,
        )
        for dtype in DTYPES
    ),
    *(
        Check(
            "_masked_linear, _masked_linear_backward",
            name_of(dtype),
            lambda device, dtype=dtype: linear_matches(torch.ops.fourfold, dtype, device),
            hot=True,
        )
        for dtype in DTYPES
    ),
    *(
        Check(ops, name_of(dtype), lambda device, run=run, dtype=dtype: run(torch.ops.fourfold, dtype, device), hot=True)
        for (ops, run), dtype in itertools.product(
            (
                ("_mask_starts, _mask_columns, _gather_mask, _scatter_mask", places_match),
                ("_sparse_linear, _sparse_linear_transposed", sparse_matches),
                ("sddmm", lambda ops, dtype, device: sddmm_matches(ops.sddmm, dtype, device)),
                ("_superpose, _masked_dots", superposed_match),
                ("task_linear, _task_linear_transposed, _task_outer", tasks_match),
            ),
            DTYPES,
        )
    ),
    Check(
        "_sparse_linear, _sparse_linear_transposed",
        "more than 65536 columns",
        lambda device: wide_rows_match(torch.ops.fourfold, device),
    ),
    Check(SPARSE.rpartition(", ")[0], "wrong counts", only_on_gpu(wrong_counts)),
    Check("_gather_mask", "bits off words", lambda device: off_words(torch.ops.fourfold, device)),
    Check("task_linear", "tasks that there are not", only_on_gpu(unknown_tasks)),
    Check("supermask_linear", "like the CPU", like_the_cpu, hot=True),
    Check("supermask_linear", "stream", streamed),
    Check("supermask_linear", "CUDA graph", captured),
    Check("supermask_linear", "torch.compile", compiled),
    Check("supermask_linear", "second device", second_device),
    Check(
        f"{MASKS}, topk_mask, _apply_mask, _mask_gradients, _masked_linear, _masked_linear_backward, {SPARSE}, {SUPERPOSED}",
        "no synchronisation",
        unsynchronised,
    ),
    Check(
        f"{MASKS}, topk_mask, _apply_mask, _masked_linear, _gather_mask, _scatter_mask, _sparse_linear",
        "more than 2**31 elements",
        beyond_31_bits,
    ),
]


# ---- speed ----


def side_of(size, small):
    return 256 if small else size


def copies(x, moved):
    return [x] + [x.clone() for _ in range(rotation(moved, x.device) - 1)]


def bits_of_density(n, k, density, device):
    return torch.ops.fourfold.pack_mask(torch.rand(n, k, device=device) < density)


def sampler_contest(sampler, size, device, small):
    """Scores to bits; the rivals make float masks, as published code does."""
    n = side_of(size, small)
    scores = torch.randn(n, n, device=device)
    ops, keep = torch.ops.fourfold, n * n - int(0.9 * n * n)
    moved = scores.numel() * 4 + scores.numel() // 8
    if sampler == "topk":

        def by_sort(s):
            order = s.abs().flatten().sort(descending=True, stable=True).indices
            return torch.zeros_like(s).flatten().index_fill(0, order[:keep], 1).view_as(s)

        def by_topk(s):
            return torch.zeros_like(s).flatten().index_fill(0, s.abs().flatten().topk(keep).indices, 1).view_as(s)

        rivals = {"sort": lambda s: ops.pack_mask(by_sort(s) != 0), "torch.topk": lambda s: ops.pack_mask(by_topk(s) != 0)}
        return Contest(copies(scores, moved), moved, lambda s: ops.topk_mask(s, 0.1, True), rivals, 0.0)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    # Other draws: they can't agree, so nothing is asked of them.
    rivals = {
        "torch.bernoulli": lambda s: ops.pack_mask(torch.bernoulli(s.sigmoid()) != 0),
        "rand < sigmoid": lambda s: ops.pack_mask(torch.rand_like(s) < s.sigmoid()),
    }
    return Contest(copies(scores, moved), moved, lambda s: ops.bernoulli_mask(s, seed, 0), rivals, 255.0)


def bits_contest(op, size, device, small):
    """Bools to bits and back, and scores to bits; plain torch's best for each."""
    n = side_of(size, small)
    ops, mask = torch.ops.fourfold, torch.rand(n, n, device=device) < 0.5
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=device)

    def packed(mask):
        return (mask.view(n, n // 8, 8) * powers).sum(2, dtype=torch.uint8)

    if op == "pack_mask":
        moved = mask.numel() + mask.numel() // 8
        return Contest(copies(mask, moved), moved, ops.pack_mask, {"multiply and sum": packed}, 0.0)
    if op == "unpack_mask":
        bits = ops.pack_mask(mask)
        moved = mask.numel() + bits.numel()
        rivals = {"and": lambda b: (b[..., None] & powers).bool().view(n, n)}
        return Contest(copies(bits, moved), moved, lambda b: ops.unpack_mask(b, n), rivals, 0.0)
    scores = torch.randn(n, n, device=device)
    moved = scores.numel() * 4 + scores.numel() // 8
    rivals = {"compare, then multiply and sum": lambda s: packed(s >= 0)}
    return Contest(copies(scores, moved), moved, lambda s: ops.threshold_mask(s, 0.0), rivals, 0.0)


def apply_contest(size, dtype, device, small):
    n = side_of(size, small)
    weight, bits = torch.randn(n, n, device=device).to(dtype), bits_of_density(n, n, 0.5, device)
    mask = reference.unpack_mask(bits, n).to(dtype)
    moved = 2 * weight.numel() * weight.element_size() + bits.numel()

    def ours(w):
        return torch.ops.fourfold._apply_mask(w, bits, None, False, "", dtype)

    return Contest(copies(weight, moved), moved, ours, {"W * mask": lambda w: w * mask}, 0.0)


def gradients_contest(size, device, small):
    n = side_of(size, small)
    grad, weight, scores = (torch.randn(n, n, device=device) for _ in range(3))
    bits = bits_of_density(n, n, 0.5, device)
    mask = reference.unpack_mask(bits, n).float()
    moved = 5 * grad.numel() * 4 + bits.numel()

    def ours(g):
        return torch.ops.fourfold._mask_gradients(g, weight, bits, scores, "sigmoid", False, "", [True, True])

    def plain(g):
        p = scores.sigmoid()
        return g * mask, g * weight * (p * (1 - p))

    return Contest(copies(grad, moved), moved, ours, {"plain torch": plain}, 1e-4)


def layer_contest(sampler, m, size, dtype, device, small):
    """A supermask layer forward and backward, as it is trained, against the same layer without a mask (the floor)."""
    n = side_of(size, small)
    x = torch.randn(m, n, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(n, n, device=device) / n**0.5).to(dtype)
    scores, grad = torch.randn(n, n, device=device), torch.randn(m, n, device=device).to(dtype)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    options = {"density": 0.5} if sampler == "topk" else {"seed": seed}
    copied = [scores, scores.clone()]

    def ours(s):
        s = s.detach().requires_grad_()
        y = ff.supermask_linear(x, weight, s, sampler=sampler, **options)
        return torch.autograd.grad(y, [x, s], grad)

    def plain(s):
        """The mask as a float matrix, of ours: other draws could not agree."""
        s = s.detach().requires_grad_()
        if sampler == "topk":
            bits = torch.ops.fourfold.topk_mask(s.detach(), 0.5, True)
            through = s.abs()
        else:
            bits = torch.ops.fourfold.bernoulli_mask(s.detach(), seed, 0)
            through = s.sigmoid()
        mask = torch.ops.fourfold.unpack_mask(bits, n).float() + (through - through.detach())
        return torch.autograd.grad(F.linear(x, (weight * mask).to(dtype)), [x, s], grad)

    def dense(s):
        w = weight.detach().requires_grad_()
        return torch.autograd.grad(F.linear(x, w), [x, w], grad)

    tolerance = 2**-4 * n**0.5 if dtype != torch.float32 else 1e-3 * n**0.5
    return Contest(copied, None, ours, {"float mask, made by ours": plain}, tolerance, floor={"dense layer": dense})


def linear_contest(m, size, dtype, device, small):
    """The floor is the vendor's product with a weight that is masked already."""
    n = side_of(size, small)
    weight, bits = torch.randn(n, n, device=device).to(dtype), bits_of_density(n, n, 0.5, device)
    mask = reference.unpack_mask(bits, n)
    ready, factor = torch.where(mask, weight, 0), mask.to(dtype)
    x = torch.randn(m, n, device=device).to(dtype)
    moved = weight.numel() * weight.element_size() + bits.numel() + 2 * x.numel() * x.element_size()
    # The weight is what is large: it is what goes round.
    weights = copies(weight, moved)

    def ours(w):
        return torch.ops.fourfold._masked_linear(x, w, bits, None, None, "one", False, "")

    tolerance = 1e-3 * n**0.5 if dtype == torch.float32 else 2**-5 * n**0.5
    return Contest(
        weights,
        moved,
        ours,
        {"W * mask": lambda w: F.linear(x, w * factor)},
        tolerance,
        floor={"cuBLAS": lambda w: F.linear(x, ready)},
    )


def sparse_contest(m, size, density, format_, dtype, device, small):
    """Against the dense product, and torch's CSR; at half of the weights also against 2:4, whose pattern ours then has."""
    n = side_of(size, small)
    ops, pattern = torch.ops.fourfold, density == 0.5 and dtype != torch.float32 and device.type == "cuda"
    if pattern:
        order = torch.rand(n, n // 4, 4, device=device).argsort(-1)
        mask = (order < 2).reshape(n, n)
    else:
        mask = torch.rand(n, n, device=device) < density
    bits = ops.pack_mask(mask)
    weight = torch.where(mask, torch.randn(n, n, device=device), 0).to(dtype)
    nnz = int(mask.sum())
    values, starts = ops._gather_mask(weight, bits, nnz), ops._mask_starts(bits, n, n)
    columns = None if format_ == "bitmap" else ops._mask_columns(bits, nnz)
    moved = nnz * dtype.itemsize + (bits.numel() if columns is None else 2 * nnz) + 2 * m * n * dtype.itemsize
    x = torch.randn(m, n, device=device).to(dtype)
    rivals = {"cuBLAS": lambda v: F.linear(x, weight)}
    if dtype == torch.float32:
        csr = weight.to_sparse_csr()
        rivals["torch CSR"] = lambda v: (csr @ x.T).T
    if pattern:
        half = torch.sparse.to_sparse_semi_structured(weight)
        rivals["torch 2:4"] = lambda v: F.linear(x, half)
    tolerance = 1e-3 * n**0.5 if dtype == torch.float32 else 2**-5 * n**0.5

    def ours(v):
        return ops._sparse_linear(x, v, bits, starts, columns, None, format_)

    return Contest(copies(values, moved), moved, ours, rivals, tolerance)


def sddmm_contest(m, size, density, dtype, device, small):
    n = side_of(size, small)
    mask = torch.rand(n, n, device=device) < density
    bits, nnz = torch.ops.fourfold.pack_mask(mask), int(mask.sum())
    a, b = (torch.randn(n, m, device=device).to(dtype) for _ in range(2))
    rivals = {"dense product and gather": lambda a: torch.ops.fourfold._gather_mask(a @ b.T, bits, nnz)}
    if dtype == torch.float32:
        pattern = mask.float().to_sparse_csr()
        rivals["sampled_addmm"] = lambda a: torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()
    inputs = [a] + [a.clone() for _ in range(2)]
    tolerance = 1e-3 * m**0.5 if dtype == torch.float32 else 2**-5 * m**0.5
    return Contest(inputs, None, lambda a: torch.ops.fourfold.sddmm(a, b, bits, nnz), rivals, tolerance)


def superposed_contest(backward, tasks, size, device, small):
    """The rivals keep masks as floats, up to 100 of them."""
    n = 64 if small else size
    weight, other = (torch.randn(n, n, device=device) for _ in range(2))
    masks = torch.randint(256, (tasks, n, n // 8), dtype=torch.uint8, device=device)
    alpha = torch.rand(tasks, device=device) / tasks
    moved = masks.numel() + 2 * weight.numel() * 4
    ops, rivals = torch.ops.fourfold, {}
    if tasks <= 100:
        floats = unpacked(masks, n).float()
        if backward:
            rivals["multiply and sum"] = lambda w: (floats * (w * other)).sum((1, 2))
            rivals["matrix times vector"] = lambda w: floats.view(tasks, -1) @ (w * other).flatten()
        else:
            rivals["multiply and sum"] = lambda w: w * (alpha[:, None, None] * floats).sum(0)
            rivals["tensordot"] = lambda w: w * torch.tensordot(alpha, floats, 1)

    def ours(w):
        return ops._masked_dots(w, other, masks) if backward else ops._superpose(w, masks, alpha)

    return Contest([weight] + [weight.clone() for _ in range(2)], moved, ours, rivals, 1e-1 if backward else 1e-4)


def task_contest(batch, size, dtype, device, small):
    n = 64 if small else size
    weight = torch.randn(n, n, device=device).to(dtype)
    masks = torch.randint(256, (10, n, n // 8), dtype=torch.uint8, device=device)
    task, floats = torch.randint(10, (batch,), device=device), unpacked(masks, n).to(dtype)
    x = torch.randn(batch, n, device=device).to(dtype)

    def each(x):
        return torch.bmm(weight * floats[task], x[:, :, None])[..., 0]

    def all_tasks(x):  # groups by task cannot be formed without waiting for the device
        y = torch.einsum("bk,tnk->tbn", x, weight * floats)
        return y[task, torch.arange(batch, device=device)]

    inputs = [x] + [x.clone() for _ in range(2)]
    tolerance = 1e-3 * n**0.5 if dtype == torch.float32 else 2**-5 * n**0.5
    rivals = {"bmm": each, "every task": all_tasks}
    return Contest(inputs, None, lambda x: torch.ops.fourfold.task_linear(x, weight, masks, task, None), rivals, tolerance)


def speed(op, name, make, *options, hot=False):
    return Speed(op, name, functools.partial(make, *options), hot)


BF16, F32 = torch.bfloat16, torch.float32
SPEEDS = [
    speed("topk_mask", "float32 4096²", sampler_contest, "topk", 4096, hot=True),
    speed("bernoulli_mask", "float32 4096²", sampler_contest, "bernoulli", 4096, hot=True),
    speed("_apply_mask", "bfloat16 4096²", apply_contest, 4096, BF16, hot=True),
    speed("_mask_gradients", "float32 4096²", gradients_contest, 4096, hot=True),
    speed("_masked_linear", "bfloat16 4096² M=16", linear_contest, 16, 4096, BF16, hot=True),
    speed("_sparse_linear", "bfloat16 bitmap 8192² d=.5 M=1", sparse_contest, 1, 8192, 0.5, "bitmap", BF16, hot=True),
    speed("supermask_linear", "bfloat16 4096² M=512, topk", layer_contest, "topk", 512, 4096, BF16, hot=True),
    speed("_superpose", "float32 1024² T=100", superposed_contest, False, 100, 1024, hot=True),
    speed("_masked_dots", "float32 1024² T=100", superposed_contest, True, 100, 1024, hot=True),
    speed("task_linear", "float32 1024² B=8", task_contest, 8, 1024, F32, hot=True),
    speed("sddmm", "bfloat16 4096² d=.1 D=512", sddmm_contest, 512, 4096, 0.1, BF16, hot=True),
    *(
        speed("_masked_linear", f"{name_of(dtype)} 4096² M={m}", linear_contest, m, 4096, dtype)
        for dtype, m in itertools.product((BF16, F32), (1, 16, 32, 64, 128, 512))
        if (dtype, m) != (BF16, 16)
    ),
    *(
        speed("_sparse_linear", f"{name_of(dtype)} {f} 8192² d={d} M={m}", sparse_contest, m, 8192, d, f, dtype)
        for dtype, d, f, m in itertools.product((BF16, F32), (0.5, 0.3, 0.1, 0.02), FORMATS[:2], (1, 8, 16, 32, 64))
        if (dtype, d, f, m) != (BF16, 0.5, "bitmap", 1)
    ),
    *(
        speed("sddmm", f"{name_of(dtype)} 4096² d={d} D={m}", sddmm_contest, m, 4096, d, dtype)
        for dtype, d, m in itertools.product((BF16, F32), (0.1, 0.01), (64, 512))
        if (dtype, d, m) != (BF16, 0.1, 512)
    ),
    speed("_masked_dots", "float32 1024² T=2500", superposed_contest, True, 2500, 1024),
    speed("_superpose", "float32 1024² T=2500", superposed_contest, False, 2500, 1024),
    *(speed("task_linear", f"bfloat16 1024² B={b}", task_contest, b, 1024, BF16) for b in (8, 64, 256)),
    *(
        speed("supermask_linear", f"{name_of(dtype)} 4096² M={m}, {sampler}", layer_contest, sampler, m, 4096, dtype)
        for dtype, m, sampler in itertools.product((BF16, F32), (64, 512), ("topk", "bernoulli"))
        if (dtype, m, sampler) != (BF16, 512, "topk")
    ),
    *(speed(op, "4096²", bits_contest, op, 4096) for op in ("pack_mask", "unpack_mask", "threshold_mask")),
    speed("topk_mask", "float32 1024²", sampler_contest, "topk", 1024),
    speed("bernoulli_mask", "float32 1024²", sampler_contest, "bernoulli", 1024),
    speed("_apply_mask", "float32 4096²", apply_contest, 4096, F32),
]
