"""Sparse weights: samples and wrong calls for the battery; formats, what they remember, and what wrong contents can't do."""

from __future__ import annotations

import itertools
from typing import Any

import battery
import pytest
import torch
import torch.nn.functional as F
from battery import FLOATING, Op, Refusal, Sample
from fourfold.ops import maskmm, maskmm_sparse
from fourfold.ops.maskmm_sparse import SparseWeight, compress, sddmm, sparse_linear
from fourfold.reference import maskmm_sparse as reference
from torch import Tensor

#: The public functions over these ops: they have no schema.
COMPOSITES = ("compress", "sparse_linear")

F32 = torch.float32
#: (N, K): one bit, a word but one, a word, a word and one, a real layer, several pieces, nothing.
SIZES = ((1, 1), (3, 63), (2, 64), (5, 65), (10, 784), (37, 130), (0, 5), (4, 0))
#: What x has before K: no batch, each width of a tile and one more, two dimensions, nothing.
LEADS = ((), (1,), (3,), (2, 4), (9,), (17,), (33,), (65,), (130,), (0,), (2, 0))
#: Format and slab; 0 is a slab of all columns.
FORMATS = (("bitmap", 0), ("csr16", 0), ("slab", 64), ("slab", 128), ("slab", 0))


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def random_mask(n: int, k: int, *, share: float = 1 / 3, seed: int = 0) -> Tensor:
    """As many bits in each row, and one in every column at least, so that the battery may exchange rows and its NaN shows."""
    generator = torch.Generator().manual_seed(n + k + seed)
    kept = max(1, -(-k // max(n, 1)), round(share * k))
    order = torch.randperm(k, generator=generator)
    mask = torch.zeros(n, k, dtype=torch.bool)
    for row in range(n if k else 0):
        mask[row, order[(torch.arange(kept) + row * kept) % k]] = True
    return mask


def pack(mask: Tensor) -> Tensor:
    return maskmm.pack_mask(mask)


def structure(mask: Tensor, format: str, slab: int) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: A002
    """bits, starts and columns, by the reference."""
    bits, k = pack(mask), mask.shape[1]
    columns = None if format == "bitmap" else reference.mask_columns(bits, int(mask.sum()))
    return bits, reference.mask_starts(bits, k, slab or max(k, 1)), columns


def product_sample(
    lead: tuple[int, ...],
    mask: Tensor,
    format: str,  # noqa: A002
    slab: int,
    dtype: torch.dtype,
    bias: bool = False,
    label: str = "",
) -> Sample:
    (n, k), nnz = mask.shape, int(mask.sum())
    bits, starts, columns = structure(mask, format, slab)
    args = randn(*lead, k, dtype=dtype), randn(nnz, dtype=dtype, seed=1), bits, starts, columns
    b = randn(n, dtype=dtype, seed=2) if bias else None
    return Sample(f"{lead} x {n} x {k} {format} {slab}{' bias' * bias} {label}", (*args, b, format))


def transposed(sample: Sample) -> Sample:
    """The same for the product with a gradient."""
    x, values, bits, starts, columns, _, format = sample.args  # noqa: A001
    grad = randn(*x.shape[:-1], bits.shape[0], dtype=x.dtype, seed=3)
    return Sample(sample.label, (grad, values, bits, starts, columns, x.shape[-1], format))


def uneven_masks() -> list[Tensor]:
    """Rows without a value and full ones, and a mask of nothing."""
    mask = random_mask(20, 200)
    mask[3:7], mask[10:12], mask[19] = False, True, False
    return [mask, torch.zeros(5, 70, dtype=torch.bool), torch.ones(9, 130, dtype=torch.bool)]


def product_samples(dtype: torch.dtype) -> list[Sample]:
    found = []
    for i, ((n, k), (format, slab)) in enumerate(itertools.product(SIZES, FORMATS)):  # noqa: A001
        found += [product_sample(lead, random_mask(n, k), format, slab, dtype, bias=i % 2 == 0) for lead in LEADS[i % 5 :: 5]]
    for i, (mask, (format, slab)) in enumerate(itertools.product(uneven_masks(), FORMATS)):  # noqa: A001
        found.append(product_sample(((1, 6, 40)[i % 3],), mask, format, slab, dtype, label="some dropped"))
    return found


def small_products() -> list[Sample]:
    places = zip(((2,), (), (2, 1), (3,)), ((3, 5), (2, 4), (4, 66), (3, 130)), FORMATS, strict=False)
    return [
        product_sample(lead, random_mask(*nk), *how, torch.float64, bias=i != 1) for i, (lead, nk, how) in enumerate(places)
    ]


def product_sizes() -> list[Sample]:
    return [product_sample((m, 3), random_mask(6, 70), "slab", 64, F32, bias=True) for m in (2, 5, 9)]


def large_product(dtype: torch.dtype) -> Sample:
    format, slab = FORMATS[1 + FLOATING.index(dtype) % 3]  # noqa: A001
    return product_sample((90,), random_mask(600, 500, share=0.2), format, slab, dtype, bias=True)


# ---- wrong calls of the ops ----------------------------------------------------------------------------------------------


def refused(op: str, message: str, good: tuple[Any, ...], **changes: Any) -> Refusal:
    """The op itself called with one or several of its good arguments changed, by place: a3=.."""
    args = list(good)
    for place, value in changes.items():
        args[int(place[1:])] = value
    return Refusal(ValueError, f"{op}: {message}", lambda: getattr(torch.ops.fourfold, op)(*args))


def weight_refusals(op: str, good: tuple[Any, ...]) -> list[Refusal]:
    """What both products refuse alike; good has 5 x 130 values in slabs of 64, whose number is 3 in a row."""
    values, bits, starts, columns = good[1:5]
    nnz = len(values)
    whole = starts[::3].contiguous()
    return [
        refused(op, "format must be 'bitmap', 'csr16' or 'slab', got 'coo'", good, a6="coo"),
        refused(op, "values must be float16, bfloat16, float32 or float64", good, a1=values.int()),
        refused(op, f"values must be [nnz], got (1, {nnz})", good, a1=values[None]),
        refused(op, "values must have the dtype of the other matrix", good, a1=values.half()),
        refused(op, "bits must be [N, 8 * ceil(K / 64)], got (120,)", good, a2=bits.flatten()),
        refused(op, "bits must be uint8", good, a2=bits.bool()),
        refused(op, "bits of 5 rows of 130 must have 5 rows of 24 bytes, got (5, 16)", good, a2=bits[:, :16]),
        refused(op, "bits must be contiguous", good, a2=bits.t().contiguous().t()),
        refused(op, "starts must be contiguous int64 [N * S + 1]", good, a3=starts.int()),
        refused(op, "starts must be contiguous int64 [N * S + 1]", good, a3=starts[None]),
        refused(op, "starts must be contiguous int64 [N * S + 1]", good, a3=starts.repeat(2)[::2]),
        refused(op, "starts of 5 rows must have a multiple of that and one more, got 15", good, a3=starts[1:]),
        refused(op, "starts of 5 rows must have a multiple of that and one more, got 1", good, a3=starts[:1]),
        refused(op, "starts of 5 rows must have a multiple of that and one more, got 0", good, a3=starts[:0]),
        refused(op, "no slab, a power of two from 64 on, gives 4 pieces of 130 columns", good, a3=starts.new_zeros(21)),
        refused(op, "format 'csr16' has one start a row, got 3", good, a6="csr16"),
        refused(op, "format 'bitmap' has one start a row, got 3", good, a6="bitmap"),
        *(
            refused(op, f"columns must be contiguous int16 [{nnz}] for format 'slab'", good, a4=wrong)
            for wrong in (None, columns.int(), columns[1:], columns[None], columns.repeat(2)[::2])
        ),
        refused(op, f"columns must be contiguous int16 [{nnz}] for format 'csr16'", good, a3=whole, a4=None, a6="csr16"),
    ]  # fmt: skip


def wide_refusals(op: str, good: tuple[Any, ...]) -> list[Refusal]:
    message = "needs pieces of at most 65536 columns, got 65537"
    return [
        refused(op, f"format 'csr16' {message}; use 'slab'", good, a6="csr16"),
        refused(op, f"format 'slab' {message}; give a slab to _mask_starts", good),
    ]


def product_refusals() -> list[Refusal]:
    op = "_sparse_linear"
    good = product_sample((3,), random_mask(5, 130), "slab", 64, F32, bias=True).args
    x, bias = good[0], good[5]
    wide = product_sample((1,), random_mask(1, 65537, share=0), "slab", 0, F32).args
    return [
        *weight_refusals(op, good),
        *wide_refusals(op, wide),
        refused(op, "x must be float16, bfloat16, float32 or float64", good, a0=x.int()),
        refused(op, "x must be [.., K], got ()", good, a0=x[0, 0]),
        refused(op, "bits of 5 rows of 129 must have 5 rows of 24 bytes, got (5, 16)", good, a0=x[:, :129], a2=good[2][:, :16]),
        refused(op, "bias must be [5] in the dtype of x, got (4,)", good, a5=bias[:4]),
        refused(op, "bias must be [5] in the dtype of x, got (1, 5)", good, a5=bias[None]),
        refused(op, "bias must be [5] in the dtype of x, got (5,)", good, a5=bias.double()),
    ]


def transposed_refusals() -> list[Refusal]:
    op = "_sparse_linear_transposed"
    good = transposed(product_sample((3,), random_mask(5, 130), "slab", 64, F32)).args
    wide = transposed(product_sample((1,), random_mask(1, 65537, share=0), "slab", 0, F32)).args
    grad = good[0]
    return [
        *weight_refusals(op, good),
        *wide_refusals(op, wide),
        refused(op, "grad must be float16, bfloat16, float32 or float64", good, a0=grad.int()),
        refused(op, "grad must be [.., N], got ()", good, a0=grad[0, 0]),
        refused(op, "grad must be [.., 5], got (3, 4)", good, a0=grad[:, :4]),
        refused(op, "k must be at least 0, got -1", good, a5=-1),
    ]


# ---- masks as places -----------------------------------------------------------------------------------------------------


def starts_sample(n: int, k: int, slab: int) -> Sample:
    return Sample(f"{n} x {k} by {slab}", (pack(random_mask(n, k)), k, slab))


def starts_samples(_dtype: torch.dtype) -> list[Sample]:
    return [starts_sample(n, k, slab) for n, k in SIZES for slab in (max(k, 1), 64, 128, 1000) if slab >= k or slab != 1000]


def starts_refusals() -> list[Refusal]:
    op, good = "_mask_starts", starts_sample(5, 130, 64).args
    slab = "slab must be a power of two from 64 on, or at least k, got"
    return [
        refused(op, f"{slab} 32 for k 130", good, a2=32),
        refused(op, f"{slab} 96 for k 130", good, a2=96),
        refused(op, f"{slab} 0 for k 130", good, a2=0),
        refused(op, f"{slab} -64 for k 130", good, a2=-64),
        refused(op, f"{slab} 129 for k 130", good, a2=129),
        refused(op, "k must be at least 0, got -1", good, a1=-1),
        refused(op, "bits must be [N, 8 * ceil(K / 64)], got (120,)", good, a0=good[0].flatten()),
        refused(op, "bits must be uint8", good, a0=good[0].int()),
        refused(op, "bits of 5 rows of 200 must have 5 rows of 32 bytes, got (5, 24)", good, a1=200),
    ]


def columns_sample(n: int, k: int) -> Sample:
    mask = random_mask(n, k)
    return Sample(f"{n} x {k}", (pack(mask), int(mask.sum())))


def columns_refusals() -> list[Refusal]:
    op, good = "_mask_columns", columns_sample(5, 130).args
    bits, nnz = good
    return [
        refused(op, "bits must be uint8", good, a0=bits.bool()),
        refused(op, "bits must be [N, 8 * ceil(K / 64)], got (120,)", good, a0=bits.flatten()),
        refused(op, "bits must be [N, 8 * ceil(K / 64)], got (5, 20)", good, a0=bits[:, :20]),
        refused(op, f"nnz must be {nnz}, the number of set bits, got {nnz + 1}", good, a1=nnz + 1),
        refused(op, f"nnz must be {nnz}, the number of set bits, got -1", good, a1=-1),
    ]


def gather_sample(n: int, k: int, dtype: torch.dtype, share: float = 1 / 3) -> Sample:
    mask = random_mask(n, k, share=share)
    if mask.numel():
        mask.view(-1)[mask.numel() * 2 // 3] = True  # where the battery puts a NaN
    return Sample(f"{n} x {k}", (randn(n, k, dtype=dtype), pack(mask), int(mask.sum())))


def gather_samples(dtype: torch.dtype) -> list[Sample]:
    mask = random_mask(6, 18, share=1)
    whole = Sample("of a convolution", (randn(6, 2, 3, 3, dtype=dtype), pack(mask), int(mask.sum())))
    return [whole, *(gather_sample(n, k, dtype) for n, k in (*SIZES, (3, 1000)))]


def gather_refusals() -> list[Refusal]:
    op, good = "_gather_mask", gather_sample(5, 130, F32).args
    weight, bits, nnz = good
    beyond = bits.clone()
    beyond[2, 16] = 4
    pad = "bits has bits set beyond its 130 columns, which must be zero; pack with pack_mask"
    return [
        refused(op, "weight must be float16, bfloat16, float32 or float64", good, a0=weight.int()),
        refused(op, "weight must be [N, K], got (130,)", good, a0=weight[0]),
        refused(op, "bits must be uint8", good, a1=bits.bool()),
        refused(op, "bits of 5 rows of 130 must have 5 rows of 24 bytes, got (4, 24)", good, a1=bits[:4]),
        refused(op, "bits must be contiguous", good, a1=bits.t().contiguous().t()),
        refused(op, f"nnz must be {nnz}, the number of set bits, got {nnz - 1}", good, a2=nnz - 1),
        refused(op, pad, good, a1=beyond, a2=nnz + 1),
    ]


def scatter_sample(n: int, k: int, dtype: torch.dtype) -> Sample:
    mask = random_mask(n, k)
    return Sample(f"{n} x {k}", (randn(int(mask.sum()), dtype=dtype), pack(mask), k))


def scatter_refusals() -> list[Refusal]:
    op, good = "_scatter_mask", scatter_sample(5, 130, F32).args
    values, bits, _ = good
    beyond = bits.clone()
    beyond[4, 23] = 128
    pad = "bits has bits set beyond its 130 columns, which must be zero; pack with pack_mask"
    nnz = len(values)
    return [
        refused(op, "values must be float16, bfloat16, float32 or float64", good, a0=values.int()),
        refused(op, f"values must be [nnz], got (1, {nnz})", good, a0=values[None]),
        refused(op, f"nnz must be {nnz}, the number of set bits, got {nnz - 1}", good, a0=values[1:]),
        refused(op, "bits must be [N, 8 * ceil(K / 64)], got (120,)", good, a1=bits.flatten()),
        refused(op, "bits of 5 rows of 200 must have 5 rows of 32 bytes, got (5, 24)", good, a2=200),
        refused(op, "k must be at least 0, got -130", good, a2=-130),
        refused(op, pad, good, a0=randn(nnz + 1, dtype=F32), a1=beyond),
    ]


# ---- sddmm ---------------------------------------------------------------------------------------------------------------


def pairs(joined: Tensor, mask: Tensor, *, nnz: int) -> Tensor:
    """sddmm of a batch [D, N + K], as it makes the gradient of kept values."""
    n = mask.shape[0]
    return sddmm(joined[:, :n].t(), joined[:, n:].t(), mask, nnz=nnz)


def pairs_exactly(joined: Tensor, mask: Tensor, *, nnz: int) -> Tensor:
    n = mask.shape[0]
    return reference.sddmm(joined[:, :n].t(), joined[:, n:].t(), pack(mask), nnz)


def pairs_sample(depth: int, n: int, k: int, dtype: torch.dtype, share: float = 1 / 3) -> Sample:
    mask = random_mask(n, k, share=share)
    return Sample(f"{depth} x {n} + {k}", (randn(depth, n + k, dtype=dtype), mask), {"nnz": int(mask.sum())})


def pairs_samples(dtype: torch.dtype) -> list[Sample]:
    found = [pairs_sample(depth, n, k, dtype) for n, k in SIZES[:-2] for depth in (1, 7, 33)]
    found += [pairs_sample(*shape, dtype) for shape in ((300, 3, 70), (2500, 2, 130))]
    nothing = [pairs_sample(3, 0, 5, dtype), pairs_sample(3, 4, 0, dtype), pairs_sample(0, 3, 5, dtype)]
    return found + [Sample(f"{sample.label} nothing, all dropped", sample.args, sample.kwargs) for sample in nothing]


def sddmm_refusals() -> list[Refusal]:
    op, mask = "sddmm", random_mask(5, 70)
    nnz = int(mask.sum())
    a, b, bits = randn(5, 3, dtype=F32), randn(70, 3, dtype=F32), pack(mask)
    good = a, b, bits, nnz

    def public(error: type[Exception], message: str, **changes: Any) -> Refusal:
        given = {"a": a, "b": b, "mask": mask, **changes}
        return Refusal(error, f"{op}: {message}", lambda: sddmm(**given))

    kinds = "must be float16, bfloat16, float32 or float64"
    pad = "has bits set beyond its 70 columns, which must be zero; pack with pack_mask"
    beyond = bits.clone()
    beyond[0, -1] = 1
    return [
        public(TypeError, "a must be a Tensor, got list", a=[1.0]),
        public(TypeError, f"b {kinds}, got int64", b=b.long()),
        public(ValueError, "a must be [N, D] and b [K, D], got (3,) and (70, 3)", a=a[0]),
        public(ValueError, "a must be [N, D] and b [K, D], got (5, 3) and (70, 2)", b=b[:, :2]),
        public(TypeError, "b must be float32 as a is, got float64; convert one with .to()", b=b.double()),
        public(ValueError, "b is on meta, a on cpu; move one with .to()", b=b.to("meta")),
        public(ValueError, "mask shape (70, 5) does not match weight shape (5, 70); did you mean mask.t()?", mask=mask.t()),
        public(TypeError, "nnz must be an int, got 1.5", nnz=1.5),
        public(ValueError, "nnz must be at least 0, got -1", nnz=-1),
        public(ValueError, f"nnz must be {nnz}, the number of set bits, got {nnz + 1}", nnz=nnz + 1),
        refused(op, f"a {kinds}", good, a0=a.int()),
        refused(op, "b must have the dtype of a", good, a1=b.double()),
        refused(op, "a must be [N, D] and b [K, D], got (5,) and (70, 3)", good, a0=a[:, 0]),
        refused(op, "a must be [N, D] and b [K, D], got (5, 3) and (70, 2)", good, a1=b[:, :2]),
        refused(op, "bits must be uint8", good, a2=bits.bool()),
        refused(op, "bits of 5 rows of 70 must have 5 rows of 16 bytes, got (4, 16)", good, a2=bits[:4]),
        refused(op, f"nnz must be {nnz}, the number of set bits, got 0", good, a3=0),
        refused(op, f"bits {pad}", good, a2=beyond, a3=nnz + 1),
    ]  # fmt: skip


# ---- public functions ------------------------------------------------------------------------------------------------------


def linear(x: Tensor, values: Tensor, bits: Tensor, k: int, bias: Tensor | None, format: str) -> Tensor:  # noqa: A002
    return sparse_linear(x, SparseWeight(values, bits, (bits.shape[0], k), format), bias)


def linear_exactly(x: Tensor, values: Tensor, bits: Tensor, k: int, bias: Tensor | None, format: str) -> Tensor:  # noqa: A002
    return reference.sparse_linear(x, values, bits, bits, None, bias, format)


def linear_in_bfloat16(x: Tensor, values: Tensor, bits: Tensor, k: int, bias: Tensor | None, format: str) -> Tensor:  # noqa: A002
    x, values, bias = (None if t is None else t.bfloat16().double() for t in (x, values, bias))
    return linear_exactly(x, values, bits, k, bias, format)


def linear_sample(
    lead: tuple[int, ...],
    n: int,
    k: int,
    format: str,  # noqa: A002
    dtype: torch.dtype,
    bias: bool = True,
) -> Sample:
    mask = random_mask(n, k)
    args = randn(*lead, k, dtype=dtype), randn(int(mask.sum()), dtype=dtype, seed=1), pack(mask), k
    return Sample(f"{lead} x {n} x {k} {format}", (*args, randn(n, dtype=dtype, seed=2) if bias else None, format))


def linear_samples(dtype: torch.dtype) -> list[Sample]:
    formats = itertools.cycle(("bitmap", "csr16", "slab"))
    shapes = itertools.product(LEADS[:8], SIZES[1:6:2])
    return [linear_sample(lead, n, k, next(formats), dtype, bias=k != 65) for lead, (n, k) in shapes]


def linear_refusals() -> list[Refusal]:
    op = "sparse_linear"
    weight, x = compress(randn(5, 70, dtype=F32), random_mask(5, 70)), randn(2, 70, dtype=F32)

    def wrong(error: type[Exception], message: str, x: Any = x, w: Any = weight, bias: Any = None) -> Refusal:
        return Refusal(error, f"{op}: {message}", lambda: sparse_linear(x, w, bias))

    kinds = "must be float16, bfloat16, float32 or float64"
    return [
        wrong(TypeError, "x must be a Tensor, got list", [1.0]),
        wrong(TypeError, f"x {kinds}, got int64", x.long()),
        wrong(TypeError, "sparse_weight must be a SparseWeight, got Tensor; make one with fourfold.compress", w=x),
        wrong(ValueError, "last dimension of x is 69, sparse weight (5, 70) needs 70; x is [.., K]", x[:, 1:]),
        wrong(ValueError, "last dimension of x is missing, sparse weight (5, 70) needs 70; x is [.., K]", x[0, 0]),
        wrong(TypeError, f"bias {kinds}, got bool", bias=torch.ones(5, dtype=torch.bool)),
        wrong(ValueError, "bias must be [5], got [4]", bias=torch.ones(4)),
        wrong(ValueError, "bias must be [5], got [1, 5]", bias=torch.ones(1, 5)),
        wrong(ValueError, "sparse_weight is on cpu, x on meta; move one with .to()", x.to("meta")),
        wrong(ValueError, "bias is on meta, x on cpu; move one with .to()", bias=torch.ones(5, device="meta")),
        wrong(TypeError, "sparse_weight must be float64 as x is, got float32; convert one with .to()", x.double()),
        wrong(TypeError, "bias must be float32 as x is, got float64; convert one with .to()", bias=torch.ones(5).double()),
    ]  # fmt: skip


def compress_refusals() -> list[Refusal]:
    weight, mask = randn(5, 70, dtype=F32), random_mask(5, 70)
    values, bits = weight[mask], pack(mask)
    sparse = compress(weight, mask)
    wide, conv = torch.ones(1, 65537), weight.view(5, 7, 10)

    def compressing(error: type[Exception], message: str, w: Any = weight, m: Any = mask, **options: Any) -> Refusal:
        return Refusal(error, f"compress: {message}", lambda: compress(w, m, **options))

    def making(error: type[Exception], message: str, **changes: Any) -> Refusal:
        given = {"values": values, "mask": bits, "shape": (5, 70), "format": "bitmap", **changes}
        return Refusal(error, f"SparseWeight: {message}", lambda: SparseWeight(**given))

    def loading(error: type[Exception], message: str, **state: Any) -> Refusal:
        state = state or {"values": values}
        return Refusal(error, f"SparseWeight: {message}", lambda: object.__new__(SparseWeight).__setstate__(state))

    def exchanging(error: type[Exception], message: str, v: Any) -> Refusal:
        return Refusal(error, f"SparseWeight: {message}", lambda: sparse.with_values(v))

    kinds = "must be float16, bfloat16, float32 or float64"
    choices = ("auto", "tune", "bitmap", "csr16", "slab", "dense")
    beyond = bits.clone()
    beyond[4, 15] = 128
    pad = "mask has bits set beyond its 70 columns, which must be zero; pack with pack_mask"
    too_wide = "format 'csr16' holds at most 65536 columns, got 65537"
    nnz, doubles = len(values), values.double()
    saved = {"values": values, "mask": bits, "shape": (5, 70), "format": "bitmap"}
    on_meta = (
        "weight is a meta tensor, and nothing says how many of its values are kept; give a mask that is none, or compress when "
        "the weight has values"
    )
    return [
        compressing(TypeError, "weight must be a Tensor, got NoneType", None),
        compressing(TypeError, f"weight {kinds}, got int32", weight.int()),
        compressing(ValueError, "weight must be [N, K], got (5, 7, 10); flatten a convolution's with weight.flatten(1)", conv),
        compressing(TypeError, f"format must be one of {choices}, got None", format=None),
        compressing(ValueError, f"format must be one of {choices}, got 'bsr'", format="bsr"),
        compressing(TypeError, "batch_hint must be an int, got 1.5", batch_hint=1.5),
        compressing(ValueError, "batch_hint must be at least 1, got 0", batch_hint=0),
        compressing(ValueError, "mask shape (70, 5) does not match weight shape (5, 70); did you mean mask.t()?", m=mask.t()),
        compressing(ValueError, pad, m=beyond),
        compressing(ValueError, "packed mask for weight (5, 70) must be (5, 16), got (5, 8)", m=bits[:, :8]),
        compressing(ValueError, f"{too_wide}; use 'slab'", wide, None, format="csr16"),
        compressing(ValueError, on_meta, weight.to("meta"), None),
        compressing(ValueError, on_meta, weight.to("meta"), mask.to("meta")),
        making(TypeError, f"values {kinds}, got int64", values=values.long()),
        making(ValueError, f"values must be [nnz], got ({nnz}, 1)", values=values[:, None]),
        making(ValueError, f"values must be one for each of the {nnz} set bits of mask, got {nnz - 1}", values=values[1:]),
        making(ValueError, "packed mask for weight (5, 130) must be (5, 24), got (5, 16)", shape=(5, 130)),
        making(TypeError, "shape must be (N, K), got 5", shape=5),
        making(TypeError, "shape must be (N, K), got (5, 7, 10)", shape=(5, 7, 10)),
        making(TypeError, "each of shape must be an int, got 70.0", shape=(5, 70.0)),
        making(ValueError, "shape must not be negative, got (-5, 70)", shape=(-5, 70)),
        making(ValueError, "format must be one of ('bitmap', 'csr16', 'slab', 'dense'), got 'auto'", format="auto"),
        making(ValueError, pad, mask=beyond),
        making(
            ValueError,
            f"{too_wide}; use 'slab'",
            values=wide[0],
            mask=pack(wide != 0),
            shape=(1, 65537),
            format="csr16",
        ),
        making(ValueError, "shape must have fewer than 2**63 elements, got (8, 1152921504606846976)", shape=(8, 2**60)),
        loading(ValueError, "a saved one holds values, mask, shape, format, reason, batch_hint, got values; save it again"),
        loading(TypeError, "reason must be a str, got int", **saved, reason=3, batch_hint=None),
        loading(ValueError, "batch_hint must be at least 1, got 0", **saved, reason="", batch_hint=0),
        exchanging(ValueError, f"values must be one for each of the {nnz} set bits of mask, got {nnz - 1}", values[1:]),
        exchanging(ValueError, f"values must be [nnz], got (1, {nnz})", values[None]),
        exchanging(TypeError, "values must be float32 as these are, got float64; convert the weight with .to()", doubles),
        exchanging(ValueError, "values are on meta, mask on cpu; move one with .to()", values.to("meta")),
    ]  # fmt: skip


# ---- the battery -----------------------------------------------------------------------------------------------------------

#: Of an internal op whose rows are those of its bits, of which there are as many as its nnz says.
ROWS_OF_BITS = {"exports": "more rows need other bits"}

OPS = (
    Op(
        name="_mask_starts",
        call=lambda *args: maskmm_sparse._mask_starts(*args).double(),
        reference=lambda *args: reference.mask_starts(*args).double(),
        samples=starts_samples,
        small=lambda: [starts_sample(3, 70, 64), starts_sample(2, 5, 5)],
        sizes=lambda: [starts_sample(n, 130, 64) for n in (3, 5, 8)],
        dynamic=(0,),
        large=lambda dtype: starts_sample(700, 3000, 256),
        refusals=starts_refusals,
        dtypes=(torch.float64,),
        differentiable=False,
    ),
    Op(
        name="_mask_columns",
        call=lambda *args: maskmm_sparse._mask_columns(*args).double(),
        reference=lambda *args: reference.mask_columns(*args).double(),
        samples=lambda dtype: [columns_sample(n, k) for n, k in (*SIZES, (2, 70000))],
        small=lambda: [columns_sample(3, 70), columns_sample(2, 5)],
        sizes=lambda: [columns_sample(n, 130) for n in (3, 5, 8)],
        dynamic=(0,),
        large=lambda dtype: columns_sample(700, 3000),
        refusals=columns_refusals,
        dtypes=(torch.float64,),
        differentiable=False,
        excused=ROWS_OF_BITS,
    ),
    Op(
        name="_gather_mask",
        call=lambda *args: maskmm_sparse._gather_mask(*args),  # noqa: PLW0108  (a function refuses out= as Python does)
        reference=reference.gather_mask,
        samples=gather_samples,
        small=lambda: [gather_sample(n, k, torch.float64) for n, k in ((3, 5), (2, 66))],
        sizes=lambda: [gather_sample(n, 70, F32) for n in (3, 5, 8)],
        dynamic=(0,),
        large=lambda dtype: gather_sample(900, 1000, dtype),
        refusals=gather_refusals,
        excused=ROWS_OF_BITS,
    ),
    Op(
        name="_scatter_mask",
        call=lambda *args: maskmm_sparse._scatter_mask(*args),  # noqa: PLW0108
        reference=reference.scatter_mask,
        samples=lambda dtype: [scatter_sample(n, k, dtype) for n, k in (*SIZES, (3, 1000))],
        small=lambda: [scatter_sample(n, k, torch.float64) for n, k in ((3, 5), (2, 66))],
        sizes=lambda: [scatter_sample(n, 70, F32) for n in (3, 5, 8)],
        dynamic=(0,),
        large=lambda dtype: scatter_sample(900, 1000, dtype),
        refusals=scatter_refusals,
        excused=ROWS_OF_BITS,
    ),
    Op(
        name="_sparse_linear",
        call=lambda *args: maskmm_sparse._sparse_linear(*args),  # noqa: PLW0108
        reference=reference.sparse_linear,
        samples=product_samples,
        small=small_products,
        sizes=product_sizes,
        dynamic=(0,),
        large=large_product,
        refusals=product_refusals,
    ),
    Op(
        name="_sparse_linear_transposed",
        call=lambda *args: maskmm_sparse._sparse_linear_transposed(*args),  # noqa: PLW0108
        reference=reference.sparse_linear_transposed,
        samples=lambda dtype: [transposed(sample) for sample in product_samples(dtype)],
        small=lambda: [transposed(sample) for sample in small_products()],
        sizes=lambda: [transposed(sample) for sample in product_sizes()],
        dynamic=(0,),
        large=lambda dtype: transposed(large_product(dtype)),
        refusals=transposed_refusals,
    ),
    Op(
        name="sddmm",
        call=pairs,
        reference=pairs_exactly,
        samples=pairs_samples,
        small=lambda: [pairs_sample(*shape, torch.float64) for shape in ((2, 3, 5), (1, 2, 66))],
        sizes=lambda: [pairs_sample(depth, 4, 70, F32) for depth in (3, 5, 8)],
        dynamic=(0,),
        large=lambda dtype: pairs_sample(90, 600, 500, dtype, share=0.2),
        refusals=sddmm_refusals,
        autocast=lambda joined, mask, *, nnz: pairs_exactly(joined.bfloat16().double(), mask, nnz=nnz),
    ),
    Op(
        name="sparse_linear",
        call=linear,
        reference=linear_exactly,
        samples=linear_samples,
        small=lambda: [linear_sample(*shape, torch.float64) for shape in (((2,), 3, 5, "bitmap"), ((), 2, 66, "slab"))],
        sizes=lambda: [linear_sample((m,), 4, 70, "csr16", F32) for m in (3, 5, 8)],
        dynamic=(0,),
        large=lambda dtype: linear_sample((50,), 500, 400, "slab", dtype),
        refusals=linear_refusals,
        autocast=linear_in_bfloat16,
    ),
)  # fmt: skip

test_op = battery.tests_of(OPS)


@pytest.mark.slow  # the kernel tests run on every tier in CI
@pytest.mark.skipif(len(battery.tiers()) < 2, reason="this machine has one tier")
def test_every_tier_agrees(tmp_path):
    battery.every_tier_agrees("test_maskmm_sparse", OPS, tmp_path)


@pytest.mark.parametrize("refusal", compress_refusals(), ids=lambda refusal: refusal.message)
def test_compress_refuses(refusal):
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    assert battery.without_page(caught.value) == refusal.message


def test_every_error_is_tested():
    assert battery.unreached_raises(OPS, maskmm_sparse, compress_refusals()) == []


# ---- formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("m", [1, 3, 8, 9, 33, 100])
def test_every_format_is_a_linear_layer(m, dtype):
    weight, mask, x, bias = (
        randn(70, 300, dtype=dtype),
        random_mask(70, 300),
        randn(m, 300, dtype=dtype),
        randn(70, dtype=dtype),
    )
    exact = F.linear(x.double(), weight.double() * mask, bias.double())
    for format in maskmm_sparse.FORMATS:  # noqa: A001
        sparse = compress(weight, mask, format=format)
        assert sparse.format == format
        if format == "dense" and dtype in {torch.float16, torch.bfloat16}:
            torch.testing.assert_close(sparse_linear(x, sparse, bias), exact.to(dtype), rtol=2e-2, atol=2e-1)
        else:
            battery.assert_close(sparse_linear(x, sparse, bias), exact, format, slack=2)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
def test_more_columns_than_16_bits_tell_apart(dtype):
    n, k, m = 3, 140_000, 5
    mask = torch.rand(n, k) < 0.002
    mask[:, [0, 65535, 65536, 131071, 131072, k - 1]] = True
    values = randn(int(mask.sum()), dtype=dtype)
    x, grad = randn(m, k, dtype=dtype), randn(m, n, dtype=dtype, seed=1)
    weight = torch.zeros(n, k, dtype=torch.float64).masked_scatter(mask, values.double())
    for format, slab in (("bitmap", 0), ("slab", 512), ("slab", 65536)):  # noqa: A001
        bits, starts, columns = structure(mask, format, slab)
        y = maskmm_sparse._sparse_linear(x, values, bits, starts, columns, None, format)
        battery.assert_close(y, x.double() @ weight.t(), f"{format} {slab}")
        of_x = maskmm_sparse._sparse_linear_transposed(grad, values, bits, starts, columns, k, format)
        battery.assert_close(of_x, grad.double() @ weight, f"{format} {slab}, transposed")
    found = sddmm(grad.t(), x.t(), mask)
    battery.assert_close(found, (grad.double().t() @ x.double())[mask], "sddmm")
    assert torch.equal(maskmm_sparse._scatter_mask(values, pack(mask), k), weight.to(dtype))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("format", "slab"), FORMATS)
def test_threads_change_nothing(format, slab, dtype):  # noqa: A002
    mask = torch.rand(300, 500, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, 300)[:, None]
    for m in (1, 8, 70):
        sample = product_sample((m,), mask, format, slab, dtype, bias=True)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = sample.run(maskmm_sparse._sparse_linear)
            results.append((y, transposed(sample).run(maskmm_sparse._sparse_linear_transposed)))
        for result in results[1:]:
            for actual, expected in zip(result, results[0], strict=True):
                battery.assert_same(actual, expected, f"{m}")


@pytest.mark.parametrize("format", ["bitmap", "csr16", "slab"])
def test_dropped_weights_take_no_part(format):  # noqa: A002
    """An infinity in x goes nowhere where no weight looks at it."""
    mask = random_mask(6, 100)
    mask[:, 40] = False
    mask[2, 40] = True
    for m in (1, 5, 20):
        x = randn(m, 100, dtype=F32)
        x[:, 40] = float("inf")
        y = sparse_linear(x, compress(torch.ones(6, 100), mask, format=format))
        assert y[:, 2].isinf().all()
        assert y[:, [0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.kernel
@pytest.mark.parametrize(("format", "slab"), FORMATS)
def test_wrong_contents_stay_in_bounds(format, slab):  # noqa: A002
    """Starts and columns that are not those of the bits: an error or numbers, and memory that is not theirs is not touched."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(50, 200, generator=generator) < 0.3
    for m, at_end in itertools.product((1, 3, 8, 40), (True, False)):
        sample = product_sample((m,), mask, format, slab, F32)
        for trial in range(4):
            x, values, bits, starts, columns, bias, _ = sample.args
            nnz = values.shape[0]
            ascending = torch.randint(nnz + 1, starts.shape, generator=generator).sort().values
            ascending[0], ascending[-1] = 0, nnz
            if columns is not None:
                columns = torch.randint(-(2**15), 2**15, columns.shape, generator=generator, dtype=torch.int16)
            bits = torch.randint(0, 256, bits.shape, generator=generator, dtype=torch.uint8) if trial > 1 else bits
            x, values, bits, columns = (
                None if t is None else battery.guarded(t.contiguous(), at_end) for t in (x, values, bits, columns)
            )
            grad = battery.guarded(randn(m, 50, dtype=F32), at_end)
            weight = values, bits, battery.guarded(ascending, at_end), columns
            assert torch.ops.fourfold._sparse_linear(x, *weight, bias, format).shape == (m, 50)
            assert torch.ops.fourfold._sparse_linear_transposed(grad, *weight, 200, format).shape == (m, 200)
            for wrong in (starts.flip(0), torch.randint(-(2**62), 2**62, starts.shape, generator=generator), ascending + 1):
                weight = values, bits, battery.guarded(wrong, at_end), columns
                with pytest.raises(ValueError, match="starts must ascend from 0 to"):
                    torch.ops.fourfold._sparse_linear(x, *weight, bias, format)
                with pytest.raises(ValueError, match="starts must ascend from 0 to"):
                    torch.ops.fourfold._sparse_linear_transposed(grad, *weight, 200, format)


# ---- compress ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING)
def test_compress_keeps_mask_and_values(dtype):
    weight, mask = randn(9, 130, dtype=dtype), random_mask(9, 130)
    pruned = weight * mask
    given = ((pruned, None), (weight, mask), (weight, pack(mask)))
    for (source, wanted), format in itertools.product(given, maskmm_sparse.CHOICES):  # noqa: A001
        sparse = compress(source, wanted, format=format)
        assert torch.equal(sparse.values, weight[mask])
        assert torch.equal(sparse.mask, pack(mask))
        assert torch.equal(sparse.decompress(), pruned)
        assert (sparse.shape, sparse.dtype, sparse.device) == ((9, 130), dtype, weight.device)
        assert sparse.format in maskmm_sparse.FORMATS
        assert sparse.density == pytest.approx(mask.double().mean().item())


def test_bytes_of_formats():
    mask = random_mask(40, 1000, share=0.1)
    nnz = int(mask.sum())
    size = {f: compress(torch.ones(40, 1000), mask, format=f).nbytes for f in maskmm_sparse.FORMATS}
    starts = 8 * 41
    assert size["bitmap"] == 4 * nnz + 40 * 128 + starts
    assert size["csr16"] == 6 * nnz + starts
    assert size["slab"] == 6 * nnz + 8 * (40 * 2 + 1)
    assert size["dense"] == 4 * 40 * 1000


@pytest.mark.parametrize("dtype", FLOATING)
def test_auto_follows_its_table(dtype, monkeypatch):
    monkeypatch.setattr(maskmm_sparse, "LEAST_WORK", ((0.0, 0),))
    for batch, density in itertools.product((1, 8, 64, 512), (0.02, 0.2, 0.5, 1.0)):
        mask = random_mask(50, 200, share=density)
        sparse = compress(torch.ones(50, 200, dtype=dtype), mask, batch_hint=batch)
        assert (sparse.format == "dense") >= (density == 1)
        plain = "F.linear, as in a plain Linear, was measured faster than the other formats"
        than = plain if sparse.format == "dense" else "measured faster than F.linear and the other formats"
        assert sparse.reason.startswith(f"{than} at density {sparse.density:.2g} with {batch} row")
        assert sparse.reason in repr(sparse)
        assert repr(sparse.format) in repr(sparse)
    dense = compress(torch.ones(4, 70000, dtype=dtype), batch_hint=64)
    few = compress(torch.ones(1, 70000, dtype=dtype) * (torch.arange(70000) % 99 == 0))
    assert dense.format == "dense"
    assert few.format == "slab"  # csr16 in the table


def test_tables_are_complete():
    """Whatever the batch and the density, and by falling densities."""
    for table in (*maskmm_sparse.TABLE.values(), maskmm_sparse.AMX_TABLE):
        batches = [most for most, _ in table]
        assert batches == sorted(batches)
        assert batches[-1] == float("inf")
        for _, formats in table:
            least = [density for density, _ in formats]
            assert least == sorted(least, reverse=True)
            assert least[-1] == 0
            assert {name for _, name in formats} <= set(maskmm_sparse.FORMATS)


def test_tune_times_once(monkeypatch):
    weight, mask = torch.randn(40, 70), random_mask(40, 70)
    monkeypatch.setattr(maskmm_sparse, "_tuned", {})
    calls = []
    monkeypatch.setattr(maskmm_sparse, "_clock", lambda device: calls.append(device) or float(len(calls)))
    first = compress(weight, mask, format="tune", batch_hint=5)
    than = "timed faster than F.linear (dense) and the other formats with 8 rows of x"
    assert first.reason.startswith(f"{than}, ms: bitmap 1e+03, csr16 1e+03, slab 1e+03, dense 1e+03")
    timed = len(calls)
    assert timed == 2 * 5 * 4
    assert compress(weight, mask, format="tune", batch_hint=8).format == first.format
    assert len(calls) == timed
    compress(weight, mask, format="tune", batch_hint=9)
    assert len(calls) == 2 * timed
    torch.set_num_threads(3)
    compress(weight, mask, format="tune", batch_hint=9)
    assert len(calls) == 3 * timed
    wide = compress(torch.ones(1, 65537), format="tune")
    assert "csr16" not in wide.reason


def test_tune_takes_the_fastest(monkeypatch):
    monkeypatch.setattr(maskmm_sparse, "_tuned", {})
    now, cost = [0.0], {"bitmap": 3.0, "csr16": 2.0, "slab": 1.0, "dense": 4.0}
    monkeypatch.setattr(maskmm_sparse, "_clock", lambda device: now[0])

    def product(x: Tensor, weight: SparseWeight) -> None:
        now[0] += cost[weight.format]

    monkeypatch.setattr(maskmm_sparse, "sparse_linear", product)
    sparse = compress(torch.randn(40, 70), random_mask(40, 70), format="tune")
    assert sparse.format == "slab"
    than, times = "timed faster than F.linear (dense) and the other formats", "bitmap 3e+03, csr16 2e+03, slab 1e+03, dense"
    assert sparse.reason == f"{than} with 1 row of x, ms: {times} 4e+03"
    cost["dense"] = 0.5
    dense = compress(torch.randn(40, 70), random_mask(40, 70), format="tune", batch_hint=2)
    assert dense.format == "dense"
    than = "F.linear, as in a plain Linear, was timed faster than the other formats"
    assert dense.reason == f"{than} with 2 rows of x, ms: {times} 500"


@pytest.mark.parametrize("format", maskmm_sparse.FORMATS)
def test_gradients_reach_the_weight(format):  # noqa: A002
    """Through compress; nothing comes off the mask."""
    weight, mask = randn(4, 66), random_mask(4, 66)
    x, bias = randn(3, 66), randn(4)

    def function(w: Tensor, x: Tensor, b: Tensor) -> Tensor:
        return sparse_linear(x, compress(w, mask, format=format), b)

    given = tuple(t.requires_grad_() for t in (weight, x, bias))
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)
    (of_weight,) = torch.autograd.grad(function(*given).square().sum(), weight)
    assert (of_weight[~mask] == 0).all()
    assert (of_weight[mask] != 0).all()


def test_training_keeps_the_mask():
    """With momentum and decay, on values alone: an optimizer's state is as small as they are, and nothing comes back."""
    weight, mask = torch.randn(6, 70), random_mask(6, 70)
    values = compress(weight, mask).values.detach().requires_grad_()
    optimizer = torch.optim.SGD([values], lr=0.1, momentum=0.9, weight_decay=1e-2)
    x, target = torch.randn(20, 70), torch.randn(20, 6)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(sparse_linear(x, SparseWeight(values, mask, (6, 70), "slab")), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert optimizer.state[values]["momentum_buffer"].shape == values.shape
    assert torch.equal(SparseWeight(values, mask, (6, 70)).decompress() != 0, mask)


# ---- what is remembered --------------------------------------------------------------------------------------------------


def test_places_are_found_once_for_a_mask():
    bits, values = pack(random_mask(6, 70)), torch.randn(6 * 23)
    first = SparseWeight(values, bits, (6, 70), "slab")
    again = SparseWeight(values * 2, bits, (6, 70), "slab")
    assert again._places is first._places
    assert SparseWeight(values, bits, (6, 70), "csr16")._places is not first._places
    assert first.with_values(values * 3)._places is first._places
    assert torch.equal(first.with_values(values * 3).values, values * 3)


def test_a_mask_that_changes_is_looked_at_again():
    one, other = random_mask(6, 70), random_mask(6, 70, seed=1)
    assert not torch.equal(one, other)
    bits, weight, x = pack(one), torch.randn(6, 70), torch.randn(2, 70)
    for format in maskmm_sparse.FORMATS:  # noqa: A001
        bits.copy_(pack(one))
        sparse_linear(x, SparseWeight(weight[one], bits, (6, 70), format))
        bits.copy_(pack(other))
        changed = sparse_linear(x, SparseWeight(weight[other], bits, (6, 70), format))
        torch.testing.assert_close(changed, x @ (weight * other).t())
    bits[0, -1] = 128
    with pytest.raises(ValueError, match="mask has bits set beyond its 70 columns"):
        SparseWeight(weight[other], bits, (6, 70))


def test_dense_follows_its_values():
    weight, mask, x = torch.randn(6, 70), random_mask(6, 70), torch.randn(2, 70)
    sparse = compress(weight, mask, format="dense")
    kept = sparse._decompressed()
    assert sparse._decompressed() is kept
    assert SparseWeight(sparse.values, sparse.mask, (6, 70), "dense")._decompressed() is kept
    sparse.values.mul_(2)
    torch.testing.assert_close(sparse_linear(x, sparse), x @ (2 * weight * mask).t())
    learned = sparse.with_values(sparse.values.clone().requires_grad_())
    sparse_linear(x, learned).sum().backward()
    torch.testing.assert_close(learned.values.grad, x.sum(0).expand(6, 70)[mask])
    with torch.no_grad():  # what trains values may leave no trace, as fused optimizers and writes through .data do
        torch.testing.assert_close(sparse_linear(x, learned), x @ (2 * weight * mask).t())
        learned.values.data.mul_(3)
        torch.testing.assert_close(sparse_linear(x, learned), x @ (6 * weight * mask).t())
    with torch.inference_mode():
        inside = compress(weight, mask, format="dense")
        torch.testing.assert_close(sparse_linear(x, inside), x @ (weight * mask).t())
        torch.testing.assert_close(sparse_linear(x, compress(weight, mask)), x @ (weight * mask).t())


def test_to():
    sparse = compress(torch.randn(6, 70), random_mask(6, 70), format="csr16")
    assert sparse.to(torch.float32) is sparse
    half = sparse.to(torch.float16)
    assert (half.dtype, half.format) == (torch.float16, "csr16")
    assert torch.equal(half.values, sparse.values.half())
    assert sparse.to("meta").device.type == "meta"


def test_compiles_with_a_weight_from_outside():
    """The usual case: a weight made before, and one made in the graph from a layer's values."""
    weight, mask, x = torch.randn(6, 70), random_mask(6, 70), torch.randn(3, 70)
    for format in maskmm_sparse.FORMATS:  # noqa: A001
        sparse = compress(weight, mask, format=format)
        torch.compiler.reset()
        outside = torch.compile(lambda x, w=sparse: sparse_linear(x, w), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(outside(x), x @ (weight * mask).t())
        renewed = torch.compile(
            lambda x, values, w=sparse: sparse_linear(x, w.with_values(values)), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(renewed(x, sparse.values * 2), x @ (2 * weight * mask).t())


def test_sddmm_counts_for_itself():
    a, b, mask = torch.randn(5, 3), torch.randn(70, 3), random_mask(5, 70)
    for given in (mask, pack(mask)):
        torch.testing.assert_close(sddmm(a, b, given), (a @ b.t())[mask])
