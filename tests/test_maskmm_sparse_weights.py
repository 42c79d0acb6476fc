"""Sparse weights in use: damaged, changed, empty, copied and compiled ones; what the battery of their ops doesn't ask."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import battery
import fourfold as ff
import pytest
import torch
import torch.nn.functional as F
from battery import FLOATING, Refusal, Sample
from fourfold.ops import maskmm_sparse
from fourfold.ops.maskmm_sparse import FORMATS, SparseWeight
from fourfold.reference import REFERENCES
from fourfold.reference import maskmm_sparse as reference
from torch import Tensor

# Of torch's about itself, where it compiles an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

F32 = torch.float32
#: The formats that have a kernel of their own.
SPARSE = ("bitmap", "csr16", "slab")

formats = pytest.mark.parametrize("form", FORMATS)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def some_mask(n: int, k: int, kind: str = "random", seed: int = 0) -> Tensor:
    """Half full with a bit in every row and column; "uneven": an empty row, a full one and others; "thin": a few bits."""
    if kind in {"full", "empty"}:
        return torch.full((n, k), kind == "full")
    generator = torch.Generator().manual_seed(n + k + seed)
    mask = torch.rand(n, k, generator=generator) < (0.01 if kind == "thin" else 0.5)
    if kind == "uneven":
        mask[0], mask[-1] = False, True
    elif kind == "random":
        mask |= (torch.arange(n)[:, None] - torch.arange(k)) % max(1, min(n, k)) == 0
    elif mask.numel():
        mask[0, -1] = True
    return mask


def even_mask(n: int, k: int, each: int, seed: int = 0) -> Tensor:
    """With so many bits in each row."""
    order = torch.rand(n, k, generator=torch.Generator().manual_seed(n + k + seed)).argsort(1)
    return torch.zeros(n, k, dtype=torch.bool).scatter_(1, order[:, :each], True)


def pack(mask: Tensor) -> Tensor:
    return REFERENCES["pack_mask"](mask)


def places(bits: Tensor, k: int, nnz: int, form: str, slab: int = 128) -> tuple[Tensor, Tensor | None]:
    """starts and columns of a format."""
    starts = reference.mask_starts(bits, k, slab if form == "slab" else max(k, 1))
    return starts, None if form == "bitmap" else reference.mask_columns(bits, nnz)


def linear_sample(lead: tuple[int, ...], n: int, k: int, dtype: torch.dtype, form: str) -> Sample:
    mask = some_mask(n, k, "uneven")
    bits, nnz = pack(mask), int(mask.sum())
    args = (randn(*lead, k, dtype=dtype), randn(nnz, dtype=dtype, seed=1), bits, *places(bits, k, nnz, form, 64))
    return Sample(form, (*args, randn(n, dtype=dtype, seed=2), form))


def transposed_sample(lead: tuple[int, ...], n: int, k: int, dtype: torch.dtype, form: str) -> Sample:
    _x, *weight, _bias, _form = linear_sample(lead, n, k, dtype, form).args
    return Sample(form, (randn(*lead, n, dtype=dtype), *weight, k, form))


def assert_refused(refusal: Refusal) -> None:
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    assert f"{caught.type.__name__}: {caught.value}" == f"{refusal.error.__name__}: {refusal.message}"


# ---- compress ------------------------------------------------------------------------------------------------------------


def test_compress_keeps_what_is_not_zero():
    """NaN too, but not -0."""
    weight = torch.tensor([[0.0, 1.0, -0.0], [float("nan"), 0.0, -float("inf")]])
    w = ff.compress(weight, format="bitmap")
    battery.assert_same(w.values, torch.tensor([1.0, float("nan"), -float("inf")]), "values")
    battery.assert_same(w.mask[:, 0], torch.tensor([2, 5], dtype=torch.uint8), "mask")


def test_auto_is_the_table(monkeypatch):
    """By dtype, density and batch; it says so; csr16 gives way where it can't hold the columns."""
    table = {
        F32: ((4, ((0.5, "dense"), (0.0, "bitmap"))), (float("inf"), ((0.5, "slab"), (0.0, "csr16")))),
        torch.bfloat16: ((float("inf"), ((0.0, "dense"),)),),
    }
    monkeypatch.setattr(maskmm_sparse, "TABLE", table)
    monkeypatch.setattr(maskmm_sparse, "LEAST_WORK", ((0.0, 0),))
    monkeypatch.setattr(maskmm_sparse, "AMX_TABLE", ((float("inf"), ((0.0, "slab"),)),))
    monkeypatch.setattr(maskmm_sparse._C, "machine_capability", lambda: "avx512")
    weight = randn(4, 64, dtype=F32)

    def chosen(kept: int, batch: int, weight: Tensor = weight) -> SparseWeight:
        mask = torch.arange(weight.numel()).view(weight.shape) < kept
        return ff.compress(weight, mask, batch_hint=batch)

    assert [chosen(kept, 4).format for kept in (0, 127, 128, 256)] == ["bitmap", "bitmap", "dense", "dense"]
    assert [chosen(kept, 5).format for kept in (0, 127, 128, 256)] == ["csr16", "csr16", "slab", "slab"]
    assert ff.compress(weight, torch.zeros_like(weight, dtype=torch.bool)).format == "bitmap"  # batch_hint is 1
    long = chosen(9, 100, randn(1, 65537, dtype=F32))
    assert long.format == "slab"
    assert long.reason == "measured faster than F.linear and the other formats at density 0.00014 with 100 rows of x in float32"
    assert long.reason in repr(long)
    assert (
        chosen(64, 1).reason == "measured faster than F.linear and the other formats at density 0.25 with 1 row of x in float32"
    )
    plain = chosen(9, 1, weight.bfloat16())
    assert plain.format == "dense"  # whose reason is no praise of the layer: a plain one does the same
    said = "F.linear, as in a plain Linear, was measured faster than the other formats at density 0.035 with 1 row of x in"
    assert plain.reason == f"{said} bfloat16"
    monkeypatch.setattr(maskmm_sparse._C, "machine_capability", lambda: "amx")
    tiled = chosen(9, 1, weight.bfloat16())
    assert tiled.format == "slab"
    assert tiled.reason.startswith("expected faster than F.linear and the other formats at density")  # AMX's was not measured
    assert chosen(9, 1).format == "bitmap"


def test_auto_leaves_small_products_dense():
    """What F.linear does in the time that a sparse kernel takes to begin, by size, rows and density."""

    def chosen(n: int, rows: int, density: float) -> SparseWeight:
        return ff.compress(torch.ones(n, 512), torch.rand(n, 512) < density, batch_hint=rows)

    torch.manual_seed(0)
    assert chosen(512, 3, 0.1).format == "dense"
    assert chosen(512, 4, 0.1).format == "csr16"
    assert chosen(512, 4, 0.3).format == "dense"
    assert chosen(512, 8, 0.3).format == "csr16"
    said = "F.linear, as in a plain Linear, was measured faster for so small a product, 64 x 512 with 1 row of x"
    assert chosen(64, 1, 0.1).reason == said


def test_tune_does_not_touch_gradients():
    weight = randn(4, 70).requires_grad_()
    w = ff.compress(weight, some_mask(4, 70), format="tune")
    w.values.sum().backward()
    battery.assert_same(weight.grad, some_mask(4, 70).double(), "gradient")


# ---- SparseWeight --------------------------------------------------------------------------------------------------------


def sparse(n: int, k: int, form: str = "bitmap", dtype: torch.dtype = F32, kind: str = "random") -> SparseWeight:
    return ff.compress(randn(n, k, dtype=dtype), some_mask(n, k, kind), format=form)


@formats
def test_with_values(form):
    w, other = sparse(5, 70, form), randn(int(some_mask(5, 70).sum()), dtype=F32, seed=9)
    changed = w.with_values(other)
    assert (changed.format, changed.shape, changed.reason, changed.dtype) == (form, (5, 70), w.reason, F32)
    assert changed.values is other
    assert changed.mask is w.mask
    x = randn(3, 70, dtype=F32)
    exact = F.linear(x.double(), reference.scatter_mask(other.double(), w.mask, 70))
    battery.assert_close(ff.sparse_linear(x, changed), exact, "product")


@formats
def test_to(form):
    w = sparse(5, 70, form)
    assert w.to(F32) is w
    half = w.to(torch.float16)
    assert (half.dtype, half.format, half.shape, half.reason) == (torch.float16, form, (5, 70), w.reason)
    battery.assert_same(half.values, w.values.half(), "values")
    meta = w.to("meta")
    assert meta.device == meta.mask.device == torch.device("meta")
    assert (meta.format, meta.shape) == (form, (5, 70))
    assert ff.sparse_linear(torch.empty(2, 70, device="meta"), meta).shape == (2, 5)
    leaf = w.values.clone().requires_grad_()
    w.with_values(leaf).to(torch.float64).values.sum().backward()
    battery.assert_same(leaf.grad, torch.ones_like(leaf), "gradient")


@formats
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda w: pickle.loads(pickle.dumps(w))])
def test_duplicates(form, duplicate):
    """Also once the product is known, and something of it is kept."""
    w, x = sparse(5, 70, form), randn(3, 70, dtype=F32)
    y = ff.sparse_linear(x, w)
    other = duplicate(w)
    assert repr(other) == repr(w)
    battery.assert_same(other.decompress(), w.decompress(), "weight")
    battery.assert_same(ff.sparse_linear(x, other), y, "product")


def test_memory_is_given_back():
    """What is remembered of a mask goes with it."""
    before = len(maskmm_sparse._known)
    for _ in range(3):
        ff.sparse_linear(randn(2, 70, dtype=F32), sparse(5, 70, "slab"))
    assert len(maskmm_sparse._known) == before


# ---- sparse_linear -------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@formats
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("k", [1, 63, 64, 65, 784, 70000])
def test_formats_give_the_reference_result(k, dtype, form):
    """Rows that are empty and full, and every way of cutting up a batch."""
    n = 5
    mask = some_mask(n, k, "uneven" if k < 70000 else "thin")
    weight, bias = randn(n, k, dtype=dtype), randn(n, dtype=dtype)
    if form == "csr16" and k > 65536:
        message = (
            f"compress: format 'csr16' holds at most 65536 columns, got {k}; use 'slab' (see docs/maskmm.md#sparse-inference)"
        )
        assert_refused(Refusal(ValueError, message, lambda: ff.compress(weight, mask, format=form)))
        return
    w = ff.compress(weight, mask, format=form)
    dropped = torch.where(mask, weight, 0.0)
    for lead in ((), (1,), (2,), (7,), (9,), (33,), (67,), (2, 3), (0,)) if k < 70000 else ((), (1,), (9,)):
        x = randn(*lead, k, dtype=dtype, seed=3)
        y = ff.sparse_linear(x, w, bias)
        assert y.dtype == dtype
        if form == "dense":
            battery.assert_same(y, F.linear(x, w.decompress(), bias), f"{lead}")
        else:
            battery.assert_close(y, F.linear(x.double(), dropped.double(), bias.double()), f"{lead}")


@formats
@pytest.mark.parametrize(("n", "k"), [(0, 5), (4, 0), (0, 0), (4, 5)])
def test_empty_weights(form, n, k):
    """No rows, no columns, nothing kept: the bias alone, forward and backward."""
    w = ff.compress(randn(n, k), torch.zeros(n, k, dtype=torch.bool), format=form)
    assert w.values.shape == (0,)
    assert w.density == 0
    for lead in ((), (3,), (0,), (2, 0)):
        leaves = [randn(*lead, k).requires_grad_(), w.values.clone().requires_grad_(), randn(n).requires_grad_()]
        y = ff.sparse_linear(leaves[0], w.with_values(leaves[1]), leaves[2])
        battery.assert_same(y, leaves[2].expand(*lead, n), f"{lead}")
        battery.assert_same(ff.sparse_linear(leaves[0], w), torch.zeros(*lead, n, dtype=torch.float64), f"{lead} no bias")
        of_x, of_values, of_bias = torch.autograd.grad(y.sum(), leaves)
        battery.assert_same(of_x, torch.zeros_like(leaves[0]), "gradient of x")
        battery.assert_same(of_values, torch.zeros(0, dtype=torch.float64), "gradient of values")
        battery.assert_same(of_bias, torch.full((n,), float(y.numel() // n if n else 0), dtype=torch.float64), "of bias")


@pytest.mark.parametrize("form", SPARSE)
def test_a_dropped_weight_takes_no_part(form):
    """Unlike a zero it makes no NaN of an infinity, forward or backward."""
    mask, x = torch.tensor([[True, False, True]] * 2), torch.tensor([[1.0, float("inf"), 2.0]] * 10)
    w = ff.compress(torch.ones(2, 3), mask, format=form)
    for batch in (1, 2, 10):
        leaf, values = x[:batch].clone().requires_grad_(), w.values.clone().requires_grad_()
        y = ff.sparse_linear(leaf, w.with_values(values))
        battery.assert_same(y.detach(), torch.full((batch, 2), 3.0), f"{batch} rows")
        (y * torch.tensor([float("inf"), 1.0])).sum().backward()
        inf = float("inf")
        battery.assert_same(leaf.grad, torch.tensor([[inf, 0.0, inf]]).expand(batch, 3), "gradient of x")
        battery.assert_same(values.grad, torch.tensor([inf, inf, 1.0, 2.0]) * torch.tensor([1, 1, batch, batch]), "of values")


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("lead", [(1,), (5,), (40,)])
def test_formats_have_the_same_gradients(dtype, lead):
    """Of x, values and bias: values' are those of the dense weight where it is kept."""
    n, k = 9, 200
    mask, weight = some_mask(n, k, "uneven"), randn(n, k, dtype=dtype)
    x, bias, grad = randn(*lead, k, dtype=dtype, seed=1), randn(n, dtype=dtype), randn(*lead, n, dtype=dtype, seed=2)
    dense = [t.double().requires_grad_() for t in (x, torch.where(mask, weight, 0.0), bias)]
    exact = list(torch.autograd.grad(F.linear(*dense), dense, grad.double()))
    exact[1] = exact[1][mask]
    for form in SPARSE:
        w = ff.compress(weight, mask, format=form)
        leaves = [t.clone().requires_grad_() for t in (x, w.values, bias)]
        y = ff.sparse_linear(leaves[0], w.with_values(leaves[1]), leaves[2])
        for actual, expected, name in zip(torch.autograd.grad(y, leaves, grad), exact, ("x", "values", "bias"), strict=True):
            assert actual.dtype == dtype
            battery.assert_close(actual, expected, f"{form}, gradient of {name}", slack=2)


@pytest.mark.kernel
@pytest.mark.parametrize("form", SPARSE)
@pytest.mark.parametrize("dtype", FLOATING)
def test_results_do_not_depend_on_threads(form, dtype):
    """Nor those of backward: the same bits."""
    mask = some_mask(700, 900, "uneven")
    w = ff.compress(randn(700, 900, dtype=dtype), mask, format=form)
    for batch in (3, 70):
        x, grad = randn(batch, 900, dtype=dtype), randn(batch, 700, dtype=dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_(), w.values.clone().requires_grad_()]
            y = ff.sparse_linear(leaves[0], w.with_values(leaves[1]))
            results.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
        for other in results[1:]:
            for actual, expected in zip(other, results[0], strict=True):
                battery.assert_same(actual, expected, f"{batch} rows")


@formats
def test_autocast(form):
    """All arguments in autocast's type; gradients in their own."""
    w, x, bias = sparse(5, 70, form), randn(4, 70, dtype=F32).requires_grad_(), randn(5, dtype=F32)
    values = w.values.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ff.sparse_linear(x, w.with_values(values), bias)
    battery.assert_same(y, ff.sparse_linear(x.bfloat16(), w.to(torch.bfloat16), bias.bfloat16()), "autocast")
    y.sum().backward()
    assert x.grad.dtype == values.grad.dtype == F32


# ---- what is changed behind a weight's back ------------------------------------------------------------------------------


def changed_weight(form: str, change: Callable[[Tensor], Any]) -> SparseWeight:
    """Of which somebody changes the mask, once it has been multiplied with."""
    w = ff.compress(randn(6, 70, dtype=F32), some_mask(6, 70, "uneven"), format=form)
    ff.sparse_linear(randn(2, 70, dtype=F32), w)
    change(w.mask)
    return w


def upside_down(bits: Tensor) -> None:
    """As many bits, but in other rows."""
    bits.copy_(bits.flip(0))


def changed_refusals() -> list[Refusal]:
    nnz = int(some_mask(6, 70, "uneven").sum())
    one_each = f"SparseWeight: values must be one for each of the {{}} set bits of mask, got {nnz}"
    beyond = "SparseWeight: mask has bits set beyond its 70 columns, which must be zero; pack with pack_mask"
    changes = {
        one_each.format(0): lambda bits: bits.zero_(),
        one_each.format(nnz - 1): lambda bits: bits[-1, 0].bitwise_xor_(1),
        beyond: lambda bits: bits[0, 15].fill_(128),
    }

    def use(form: str, change: Callable[[Tensor], Any]) -> Tensor:
        return maskmm_sparse.sparse_linear(randn(3, 70, dtype=F32), changed_weight(form, change))

    return [
        Refusal(ValueError, message, lambda form=form, change=change: use(form, change))
        for form in FORMATS
        for message, change in changes.items()
    ]


@pytest.mark.parametrize("refusal", changed_refusals(), ids=lambda refusal: refusal.message[:90])
def test_a_mask_that_no_longer_fits_is_refused(refusal):
    """Though it was changed in place, after a product that it did fit."""
    assert_refused(refusal)


@formats
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_a_mask_changed_in_place_counts(form, batch):
    """In the product, its gradients, and what is made of the weight: they all are of the mask as it is."""
    w = changed_weight(form, upside_down)
    dense, x = reference.scatter_mask(w.values.double(), w.mask, 70), randn(batch, 70, dtype=F32)
    for weight in (w, w.with_values(w.values.clone()), SparseWeight(w.values, w.mask, (6, 70), form), copy.deepcopy(w)):
        battery.assert_close(ff.sparse_linear(x, weight), F.linear(x.double(), dense), "product")
    leaf, values = x.clone().requires_grad_(), w.values.clone().requires_grad_()
    ff.sparse_linear(leaf, w.with_values(values)).sum().backward()
    kept = REFERENCES["unpack_mask"](w.mask, 70)
    battery.assert_close(leaf.grad, dense.sum(0).expand(batch, 70), "gradient of x", slack=2)
    battery.assert_close(values.grad, x.double().sum(0).expand(6, 70)[kept], "gradient of values", slack=2)


@pytest.mark.kernel
@formats
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_a_mask_changed_in_secret_stays_in_bounds(form, batch):
    """Through .data nobody is told. Results may be of either mask, or refused, but no memory is read that isn't theirs."""
    mask = some_mask(6, 70, "uneven")
    for fill in (0, 255):
        bits = battery.guarded(pack(mask), at_end=True)
        values = battery.guarded(randn(int(mask.sum()), dtype=F32), at_end=True).requires_grad_()
        w = SparseWeight(values, bits, (6, 70), form)
        x = battery.guarded(randn(batch, 70, dtype=F32), at_end=True).requires_grad_()
        before = ff.sparse_linear(x, w)
        bits.data.fill_(fill)
        for use in (lambda w=w, x=x: ff.sparse_linear(x, w), lambda before=before: before.sum().backward(), w.decompress):
            with contextlib.suppress(ValueError):
                use()


def test_a_mask_that_is_known_is_not_looked_through_again(monkeypatch):
    bits = pack(some_mask(6, 70))
    values = randn(int(some_mask(6, 70).sum()))
    SparseWeight(values, bits, (6, 70), "csr16")

    def refuse(*args: Any) -> None:
        raise AssertionError("looked through again")

    monkeypatch.setattr(maskmm_sparse, "packed_bits", refuse)
    SparseWeight(values, bits, (6, 70), "csr16")
    bits[0, 0] ^= 1
    with pytest.raises(AssertionError, match="looked through again"):
        SparseWeight(values, bits, (6, 70), "csr16")


def test_a_dense_weight_is_of_its_own_mask():
    """Not of one whose memory it was given, nor of another shape."""
    values, x = randn(40, dtype=F32), randn(3, 70, dtype=F32)
    for seed in range(20):
        mask = even_mask(4, 70, 10, seed)
        y = ff.sparse_linear(x, SparseWeight(values, mask, (4, 70), "dense"))
        battery.assert_same(y, F.linear(x, torch.zeros(4, 70).masked_scatter(mask, values)), f"mask {seed}")
    bits = pack(mask)
    for k in (70, 100):
        y = ff.sparse_linear(torch.ones(1, k), SparseWeight(values, bits, (4, k), "dense"))
        battery.assert_close(y, values.double().view(1, 4, 10).sum(-1), f"{k} columns")


@formats
def test_values_changed_in_place_count(form):
    w, x = sparse(5, 70, form), randn(3, 70, dtype=F32)
    y = ff.sparse_linear(x, w)
    w.values.mul_(2)
    battery.assert_same(ff.sparse_linear(x, w), y * 2, "product")


@formats
def test_a_changed_mask_before_backward(form):
    """Autograd says so itself, or backward doesn't need the mask's memory."""
    w = sparse(5, 70, form)
    values = w.values.clone().requires_grad_()
    y = ff.sparse_linear(randn(3, 70, dtype=F32), w.with_values(values))
    w.mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- damaged arguments of the ops themselves -----------------------------------------------------------------------------

SAMPLE_OF = {"_sparse_linear": linear_sample, "_sparse_linear_transposed": transposed_sample}
products = pytest.mark.parametrize("op", list(SAMPLE_OF))


def between_walls(op: str, args: list[Any] | tuple[Any, ...], **changes: Tensor) -> Iterator[Callable[[], Tensor]]:
    """Calls whose stray accesses would end the process; a3=.. changes arguments by place."""
    args = list(args)
    for place, value in changes.items():
        args[int(place[1:])] = value
    for at_end in (True, False):
        given = [battery.guarded(a, at_end) if isinstance(a, Tensor) else a for a in args]
        yield lambda given=given: getattr(torch.ops.fourfold, op)(*given)


def damaged_starts(starts: Tensor, nnz: int) -> list[Tensor]:
    """Beyond nnz, short of it, late, negative, huge, falling, and with one that is none of its neighbours' business."""
    huge = torch.full_like(starts, 2**62)
    return [
        starts + nnz,
        torch.cat([starts[:-1], starts[-1:] + 1]),
        torch.cat([starts[:-1], starts[-1:] - 1]),
        torch.cat([starts[:1] + 1, starts[1:]]),
        starts - nnz - 5,
        huge,
        -huge,
        starts.flip(0),
        torch.zeros_like(starts),
        *(starts.index_fill(0, torch.tensor(2), wrong) for wrong in (nnz, -1, 2**40, -(2**40))),
    ]


@pytest.mark.kernel
@products
@pytest.mark.parametrize("form", SPARSE)
@pytest.mark.parametrize("lead", [(1,), (9,), (70,)])
def test_starts_that_do_not_ascend_are_refused(op, form, lead):
    """From 0 to the number of values: no value is read twice, and none that isn't there."""
    for dtype in FLOATING:
        good = SAMPLE_OF[op](lead, 5, 200, dtype, form).args
        nnz = good[1].shape[0]
        for starts in damaged_starts(good[3], nnz):
            for call in between_walls(op, good, a3=starts):
                assert_refused(Refusal(ValueError, f"{op}: starts must ascend from 0 to {nnz}, the number of values", call))


@pytest.mark.kernel
@products
@pytest.mark.parametrize("form", SPARSE)
@pytest.mark.parametrize("lead", [(1,), (9,), (70,)])
def test_values_that_do_not_fit_the_starts_are_refused(op, form, lead):
    """Fewer or more than there are starts for, and none."""
    for dtype in FLOATING:
        good = SAMPLE_OF[op](lead, 5, 200, dtype, form).args
        values, columns = good[1], good[4]
        for some in (values[:-1], values[:7], values[:0], F.pad(values, (0, 3))):
            nnz = some.shape[0]
            others = {} if columns is None else {"a4": F.pad(columns, (0, 3))[:nnz].clone()}
            for call in between_walls(op, good, a1=some, **others):
                assert_refused(Refusal(ValueError, f"{op}: starts must ascend from 0 to {nnz}, the number of values", call))


@pytest.mark.kernel
@products
@pytest.mark.parametrize("form", ["csr16", "slab"])
@pytest.mark.parametrize("k", [200, 4096, 65536])
def test_damaged_columns_stay_in_bounds(op, form, k):
    """To look through them would cost as much as the product: whatever they hold, no memory is touched that isn't theirs."""
    generator = torch.Generator().manual_seed(k)
    for dtype in FLOATING:
        for lead in ((1,), (9,), (70,)) if k == 200 else ((9,),):
            good = SAMPLE_OF[op](lead, 3, k, dtype, form).args
            columns = good[4]
            anything = torch.randint(-(2**15), 2**15, columns.shape, generator=generator).to(columns)
            for other in (torch.full_like(columns, -1), columns.flip(0), anything, torch.full_like(columns, k % 65536)):
                for call in between_walls(op, good, a4=other):
                    assert call().shape == (*lead, 3 if op == "_sparse_linear" else k)


@pytest.mark.kernel
@products
@pytest.mark.parametrize("lead", [(1,), (3,), (8,), (9,), (70,)])
def test_bits_of_another_mask_stay_in_bounds(op, lead):
    """More bits than values, fewer, other ones, and such as lie beyond k."""
    for dtype in FLOATING:
        good = SAMPLE_OF[op](lead, 5, 200, dtype, "bitmap").args
        bits = good[2]
        for other in (torch.zeros_like(bits), pack(some_mask(5, 200, "full")), torch.full_like(bits, 255), bits.flip(0)):
            for call in between_walls(op, good, a2=other):
                assert call().shape == (*lead, 5 if op == "_sparse_linear" else 200)


# ---- compilers -----------------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("learning", [True, False])
def test_a_layer_compiles_in_one_graph(form, learning):
    """With the bits of eager, forward and backward, and with one graph for several batches."""
    linear = torch.nn.Linear(70, 11)
    layer = ff.nn.SparseLinear.from_linear(linear, some_mask(11, 70), format=form).requires_grad_(learning)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 8, 40):
        x = randn(batch, 70, dtype=F32)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = layer(other)
        y = compiled(mine)
        battery.assert_same(y, expected, f"{batch} rows")
        y.sin().sum().backward()
        of_values = layer.values.grad
        layer.values.grad = None
        expected.sin().sum().backward()
        battery.assert_same(mine.grad, other.grad, "gradient of x")
        if learning:
            battery.assert_same(of_values, layer.values.grad, "gradient of values")
        layer.zero_grad()


@formats
def test_a_layer_exports(form):
    layer = ff.nn.SparseLinear.from_linear(torch.nn.Linear(70, 11), some_mask(11, 70), format=form)
    x = randn(4, 70, dtype=F32)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (4, 9):
        x = randn(batch, 70, dtype=F32)
        battery.assert_same(program.module()(x), layer(x), f"{batch} rows")


def test_sddmm_looks_at_no_other_pairs():
    a, b = torch.tensor([[1.0], [float("nan")]]), torch.tensor([[2.0], [float("inf")], [3.0]])
    mask = torch.tensor([[True, False, True], [False, False, False]])
    battery.assert_same(ff.sddmm(a, b, mask), torch.tensor([2.0, 3.0]), "sddmm")
