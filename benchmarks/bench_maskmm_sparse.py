"""Compressed weights against dense ones and every other sparse product, by density and by the rows of x.

The rivals hold the same weight ready in the form that each one wants, with x transposed beforehand where that is faster. A
dense product in bfloat16 is a rival as well: where that precision will do, it is what a sparse weight has to beat. Where
weights are flushed, calls take turns over copies that no cache holds together, as in a network with many layers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fourfold as ff
import torch
import torch.nn.functional as F
from fourfold.reference import maskmm as reference
from torch import Tensor

from . import cases as shapes
from .harness import Call, Case, Contestant, Group, Settings, Tolerance, in_fresh_memory, needed, with_backward

FAMILY = "maskmm"
FLOAT32 = Tolerance(1e-4, 1e-5, of_rms=True)
BFLOAT16 = Tolerance(1e-3, 2**-8, of_rms=True)  # of what x and weight are in bfloat16: the result alone is rounded
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
BATCHES = (1, 8, 64, 512)
FLUSH = 256 << 20  # bytes that no cache holds
PATIENCE = 2**30  # products that the slowest rivals may take

Prepared = tuple[Call, int]  # and the bytes of the weight it reads
Prepare = Callable[["Pruned"], Prepared]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Pruned:
    """A linear layer, some of whose weights are kept."""

    def __init__(self, place: shapes.Linear, density: float, dtype: torch.dtype, backward: bool, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (place.rows, place.columns)
        self.place, self.backward = place, backward
        self.mask = (torch.rand(shape, generator=generator) < density).to(device)
        self.bits, self.numbers = reference.pack_mask(self.mask), self.mask.to(dtype)
        self.weight = (torch.randn(shape, generator=generator) / math.sqrt(place.columns * density)).to(device, dtype)
        self.kept = torch.where(self.mask, self.weight, 0)
        self.x = torch.randn(place.batch, place.columns, generator=generator).to(device, dtype)
        self.grad = torch.randn(place.batch, place.rows, generator=generator).to(device, dtype)
        self.x_t = self.x.t().contiguous()
        self.values: Tensor | None = None  # a parameter, where they are trained
        for leaf in (self.x, self.weight):
            leaf.requires_grad_(backward)

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


# --- contestants ----------------------------------------------------------------------------------------------------------


def ours(p: Pruned, format: str = "auto") -> Prepared:  # noqa: A002
    # A mask of its own: what finds the values is kept once for each mask.
    sparse = ff.compress(p.kept, p.bits.clone(), format=format, batch_hint=p.place.batch)
    return lambda: ff.sparse_linear(p.x, sparse), sparse.nbytes


def ours_float32(p: Pruned) -> Prepared:
    sparse = ff.compress(p.kept.float(), p.bits, batch_hint=p.place.batch)
    x = p.x.float()
    return lambda: ff.sparse_linear(x, sparse), sparse.nbytes


def dense(p: Pruned) -> Prepared:
    kept = p.kept.clone()
    return lambda: F.linear(p.x, kept), kept.nbytes


def dense_bfloat16(p: Pruned) -> Prepared:
    x, kept = p.x.bfloat16(), p.kept.bfloat16()
    return lambda: F.linear(x, kept), kept.nbytes


def times_numbers(p: Pruned) -> Prepared:
    weight, numbers = p.weight.clone(), p.numbers.clone()
    return lambda: F.linear(p.x, weight * numbers), weight.nbytes + numbers.nbytes


def times_numbers_compiled(p: Pruned) -> Prepared:
    run, size = times_numbers(p)
    return torch.compile(run, dynamic=False, fullgraph=True), size


def as_csr(dense: Tensor) -> Tensor:
    """With 32-bit indices, which MKL takes as they are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        csr = dense.to_sparse_csr()
    indices = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(*indices, csr.values(), csr.shape, check_invariants=False)


def _bytes_of_csr(p: Pruned) -> int:
    return int(p.mask.sum()) * 8 + 4 * (len(p.mask) + 1)


def torch_csr(p: Pruned) -> Prepared:
    csr = as_csr(p.kept)
    return lambda: F.linear(p.x, csr), _bytes_of_csr(p)


def torch_csr_transposed(p: Pruned) -> Prepared:
    csr = as_csr(p.kept)

    def call() -> Tensor:
        return torch.mv(csr, p.x[0])[None] if p.place.batch == 1 else (csr @ p.x_t).t()

    return call, _bytes_of_csr(p)


def _scipy_csr(p: Pruned) -> Any:
    return needed("scipy.sparse", "scipy").csr_matrix(p.kept.numpy())


def _of_columns(p: Pruned, product: Callable[[Any], Any]) -> Call:
    """From a product with x's columns, or with a vector where there is one row."""
    if p.place.batch == 1:
        vector = p.x[0].numpy()
        return lambda: torch.from_numpy(product(vector))[None]
    columns = p.x_t.numpy()
    return lambda: torch.from_numpy(product(columns)).t()


def scipy_csr(p: Pruned) -> Prepared:
    csr = _scipy_csr(p)
    return _of_columns(p, lambda x: csr @ x), _bytes_of_csr(p)


@functools.cache
def _sparse_dot_mkl() -> Any:
    # Where pip puts MKL, and torch's kind of threads: those of another kind would spin while we are timed.
    libraries = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    if libraries:
        os.environ.setdefault("MKL_RT", str(libraries[-1]))
    os.environ.setdefault("MKL_THREADING_LAYER", "GNU")
    return needed("sparse_dot_mkl", "sparse-dot-mkl mkl", ", or MKL_RT does not name libmkl_rt.so")


def mkl_sparse(p: Pruned) -> Prepared:
    mkl, csr = _sparse_dot_mkl(), _scipy_csr(p)
    mkl.mkl_set_num_threads(torch.get_num_threads())
    return _of_columns(p, functools.partial(mkl.dot_product_mkl, csr)), _bytes_of_csr(p)


def hot(prepare: Prepare) -> Callable[[Pruned, str], Call]:
    return lambda p, state: prepare(p)[0]


def flushed(prepare: Prepare) -> Callable[[Pruned, str], Call]:
    """Call by call the next copy of the weight."""

    def make(p: Pruned, state: str) -> Call:
        first, size = prepare(p)
        turns = itertools.cycle([first, *(prepare(p)[0] for _ in range(FLUSH // size))])

        def call() -> Tensor:
            return next(turns)()

        return call

    return make


def read(p: Pruned, format: str) -> Prepared:  # noqa: A002
    """The bytes of a compressed weight, added up."""
    size = ff.compress(p.kept, p.bits, format=format).nbytes
    numbers = torch.ones(size // 4, device=p.kept.device)
    return lambda: numbers.mean()[None], size


def _exactly(p: Pruned) -> Tensor:
    """In float64."""
    return F.linear(p.x.detach().double(), p.kept.double())


def _exactly_rounded(p: Pruned) -> Tensor:
    """Of x and weight in bfloat16."""
    return F.linear(p.x.bfloat16().double(), p.kept.bfloat16().double())


# --- inference ------------------------------------------------------------------------------------------------------------


def _rivals(settings: Settings, place: shapes.Linear, density: float, dtype: torch.dtype) -> Iterator[Contestant]:
    narrow = dtype == torch.bfloat16
    if settings.compiles and density == 0.1:  # it costs the same at every density
        yield Contestant("weight * float mask, compiled", hot(times_numbers_compiled))
    yield Contestant(f"dense in {name_of(dtype)}" * narrow or "dense", hot(dense))
    if narrow:
        yield Contestant("fourfold in float32", hot(ours_float32))
        yield Contestant("weight * mask", hot(times_numbers))
        return
    yield Contestant("dense in bfloat16", hot(dense_bfloat16), BFLOAT16, _exactly_rounded)
    yield Contestant("weight * float mask", hot(times_numbers))
    fast_enough = place.rows * place.columns * place.batch * density < PATIENCE
    yield Contestant("torch CSR, x transposed", hot(torch_csr_transposed))
    if fast_enough:
        yield Contestant("torch CSR by F.linear", hot(torch_csr))
    if settings.device == "cpu":
        yield Contestant("MKL sparse, x transposed", hot(mkl_sparse))
        if fast_enough:
            yield Contestant("scipy CSR, x transposed", hot(scipy_csr))


def _work(place: shapes.Linear, density: float, dtype: torch.dtype) -> dict[str, int]:
    """Values and the smaller of bits and 16-bit columns; flops of what is kept."""
    weights, elements = place.rows * place.columns, place.batch * (place.rows + place.columns)
    kept = int(weights * density)
    return {"bytes": dtype.itemsize * (elements + kept) + min(weights // 8, 2 * kept), "flops": 2 * place.batch * kept}


def _inference(
    settings: Settings,
    place: shapes.Linear,
    density: float,
    dtype: torch.dtype = torch.float32,
    *,
    grouped: bool = True,
    quick: bool = False,
) -> Case:
    narrow = f", {name_of(dtype)}" * (dtype != torch.float32)
    name = f"{place.rows}x{place.columns}" if grouped else str(place)
    return Case(
        family=FAMILY,
        op="sparse_linear",
        label=f"{name}, density {density}" + narrow * (not grouped),
        problem=functools.partial(Pruned, place, density, dtype, False),
        reference=_exactly,
        ours=Contestant("fourfold", hot(ours)),
        rivals=tuple(_rivals(settings, place, density, dtype)),
        tolerance=BFLOAT16 if narrow else FLOAT32,
        group=Group(f"M={place.batch}{narrow}") if grouped else None,
        state="heap",
        source=place.source,
        quick=quick,
        **_work(place, density, dtype),
    )


def _with_flushed_weights(settings: Settings, density: float, format: str) -> Case:  # noqa: A002
    place = shapes.PROJECTION._replace(batch=1)
    prepared = functools.partial(ours, format=format)
    return Case(
        family=FAMILY,
        op="sparse_linear",
        label=f"{place.rows}x{place.columns}, density {density}",
        problem=functools.partial(Pruned, place, density, torch.float32, False),
        reference=_exactly,
        ours=Contestant(f"fourfold, {format}", flushed(prepared)),
        rivals=(
            Contestant("dense", flushed(dense)),
            Contestant("dense in bfloat16", flushed(dense_bfloat16), BFLOAT16, _exactly_rounded),
        ),
        tolerance=FLOAT32,
        yardsticks=(
            Contestant(
                "a read of its bytes",
                flushed(functools.partial(read, format=format)),
                reference=lambda p: torch.ones(1, dtype=torch.float64, device=p.x.device),
            ),
        ),
        group=Group(f"M=1, weights flushed, {format}", limit=1.25),
        state="heap",
        source=place.source,
        **_work(place, density, torch.float32),
    )


def _inferences(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for place, density in zip(shapes.random_linears(settings.seed), DENSITIES, strict=True):
            yield _inference(settings, place, density, grouped=False, quick=True)
        return
    for dtype in (torch.float32, torch.bfloat16):
        for m in BATCHES:
            for weight in (shapes.PROJECTION, shapes.FEED_FORWARD):
                for density in DENSITIES:
                    chosen = weight is shapes.FEED_FORWARD and dtype == torch.float32 and density in {0.5, 0.1}
                    yield _inference(settings, weight._replace(batch=m), density, dtype, quick=chosen and m in {1, 64})
    for format in ("bitmap", "csr16"):  # noqa: A001
        for density in (0.5, 0.3, 0.1):
            yield _with_flushed_weights(settings, density, format)
    yield in_fresh_memory(_inference(settings, shapes.PROJECTION._replace(batch=8), 0.1, grouped=False))


# --- retraining: what is kept goes on learning ----------------------------------------------------------------------------


def retrain_ours(p: Pruned, state: str) -> Call:
    sparse = ff.compress(p.kept, p.bits, batch_hint=p.place.batch)
    p.values = values = sparse.values.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        y = ff.sparse_linear(p.x, sparse)
        return y, *torch.autograd.grad(y, [values, p.x], p.grad)

    return call


def _retrain(p: Pruned, forward: Callable[[], Tensor]) -> Call:
    def call() -> tuple[Tensor, ...]:
        y = forward()
        return y, *torch.autograd.grad(y, [p.weight, p.x], p.grad)

    return call


def retrain_numbers(p: Pruned, state: str) -> Call:
    return _retrain(p, lambda: F.linear(p.x, p.weight * p.numbers))


def retrain_masked(p: Pruned, state: str) -> Call:
    return _retrain(p, lambda: ff.masked_linear(p.x, p.weight, p.bits))


def retrain_compiled(p: Pruned, state: str) -> Call:
    return _retrain(p, torch.compile(lambda: F.linear(p.x, p.weight * p.numbers), dynamic=False, fullgraph=True))


def retrained(p: Pruned) -> list[Tensor]:
    """The result and the gradients of the whole weight and of x, in float64."""
    grad, x = p.grad.double(), p.x.detach().double()
    return [_exactly(p), (grad.t() @ x) * p.mask, grad @ p.kept.double()]


def retrained_values(p: Pruned) -> list[Tensor]:
    y, of_weight, of_x = retrained(p)
    return [y, of_weight[p.mask][None], of_x]


def values_as_a_row(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Results are compared row by row: values as one row, not one by one."""
    y, of_values, of_x = results
    return y, of_values[None], of_x


def _retraining(settings: Settings, place: shapes.Linear, density: float, **flags: bool) -> Case:
    rivals = [("weight * float mask", retrain_numbers), ("fourfold's masked_linear", retrain_masked)]
    rivals += [("weight * float mask, compiled", retrain_compiled)] * settings.compiles
    work = _work(place, density, torch.float32)
    return Case(
        family=FAMILY,
        op="sparse_linear",
        label=f"{place.rows}x{place.columns}, density {density}",
        problem=functools.partial(Pruned, place, density, torch.float32, True),
        reference=retrained_values,
        ours=Contestant("fourfold", retrain_ours, tensors=values_as_a_row),
        rivals=tuple(Contestant(name, make, reference=retrained) for name, make in rivals),
        tolerance=FLOAT32,
        group=Group(f"retraining, M={place.batch}"),
        held=Pruned.tensors,
        state="heap",
        source=place.source,
        **{key: 3 * value for key, value in work.items()},
        **flags,
    )


def _retrainings(settings: Settings) -> Iterator[Case]:
    for m in (64, 512):
        for weight in (shapes.SQUARE, shapes.FEED_FORWARD):
            for density in (0.5, 0.2, 0.1, 0.05, 0.02):
                quick = weight is shapes.SQUARE and m == 64 and density == 0.1
                yield _retraining(settings, weight._replace(batch=m), density, quick=quick)


# --- sddmm ----------------------------------------------------------------------------------------------------------------


class Pairs:
    """Rows [N, D] and [K, D], and of which pairs the product is wanted."""

    def __init__(self, place: shapes.Linear, density: float, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randn(n, place.batch, generator=generator).to(device) for n in (place.rows, place.columns))
        self.mask = (torch.rand(place.rows, place.columns, generator=generator) < density).to(device)
        self.bits, self.count = reference.pack_mask(self.mask), int(self.mask.sum())

    def clone(self) -> Tensor:
        return self.a.clone()


def sddmm_ours(p: Pairs, state: str) -> Call:
    return lambda: ff.sddmm(p.a, p.b, p.bits, nnz=p.count)


def sampled_addmm(p: Pairs, state: str) -> Call:
    pattern = as_csr(p.mask.float())
    return lambda: torch.sparse.sampled_addmm(pattern, p.a, p.b.t(), beta=0).values()


def selected(p: Pairs, state: str) -> Call:
    return lambda: (p.a @ p.b.t())[p.mask]


def taken_compiled(p: Pairs, state: str) -> Call:
    return torch.compile(taken(p, state), dynamic=False, fullgraph=True)


def taken(p: Pairs, state: str) -> Call:
    """With the flat indices of the pairs kept beside the mask."""
    places = p.mask.flatten().nonzero()[:, 0]
    return lambda: (p.a @ p.b.t()).take(places)


def _pairs_exactly(p: Pairs) -> Tensor:
    return (p.a.double() @ p.b.double().t())[p.mask][None]


def _as_a_row(values: Tensor) -> Tensor:
    return values[None]


def _sddmm(settings: Settings, place: shapes.Linear, density: float, **flags: bool) -> Case:
    weights, count = place.rows * place.columns, int(place.rows * place.columns * density)
    rivals = [
        Contestant("sampled_addmm", sampled_addmm, tensors=_as_a_row),
        Contestant("all products, those of the mask", selected, tensors=_as_a_row),
        Contestant("all products, those of kept indices", taken, tensors=_as_a_row),
    ]
    if settings.compiles and density == 0.1:  # it makes all products at every density
        rivals.append(Contestant("all products, those of kept indices, compiled", taken_compiled, tensors=_as_a_row))
    return Case(
        family=FAMILY,
        op="sddmm",
        label=f"{place.rows}x{place.columns} pairs of {place.batch} numbers, density {density}",
        problem=functools.partial(Pairs, place, density),
        reference=_pairs_exactly,
        ours=Contestant("fourfold", sddmm_ours, tensors=_as_a_row),
        rivals=tuple(rivals),
        tolerance=FLOAT32,
        state="heap",
        bytes=4 * (place.batch * (place.rows + place.columns) + count) + weights // 8,
        flops=2 * place.batch * count,
        source=place.source + ": the gradient of its kept weights",
        **flags,
    )


class TrainedPairs(Pairs):
    """Rows that are learned, as in attention on a mask; the gradients of the products are a row."""

    def __init__(self, place: shapes.Linear, density: float, device: torch.device) -> None:
        super().__init__(place, density, device)
        self.grad = torch.randn(self.count, generator=torch.Generator().manual_seed(1)).to(device)
        for leaf in (self.a, self.b):
            leaf.requires_grad_()

    def tensors(self) -> list[Tensor]:
        """What lives however long a contestant's backward pass is away."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


def _of_rows(make: Callable[[Pairs, str], Call]) -> Callable[[TrainedPairs, str], Call]:
    return lambda p, state: with_backward(make(p, state), [p.a, p.b], [p.grad])


def _pairs_with_gradients(p: TrainedPairs) -> list[Tensor]:
    a, b, of_all = p.a.detach().double(), p.b.detach().double(), torch.zeros(p.mask.shape, dtype=torch.float64)
    of_all = of_all.to(a.device).masked_scatter(p.mask, p.grad.double())
    return [(a @ b.t())[p.mask][None], of_all @ b, of_all.t() @ a]


def _first_as_a_row(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results[0][None], *results[1:]


def _sddmm_training(settings: Settings, place: shapes.Linear, density: float) -> Case:
    # sampled_addmm's own gradient wants sparse tensors throughout.
    case = _sddmm(settings, place, density)
    rivals = [Contestant(rival.name, _of_rows(rival.make), tensors=_first_as_a_row) for rival in case.rivals[1:]]
    return dataclasses.replace(
        case,
        label=f"{case.label}, forward and backward",
        problem=functools.partial(TrainedPairs, place, density),
        reference=_pairs_with_gradients,
        ours=Contestant("fourfold", _of_rows(sddmm_ours), tensors=_first_as_a_row),
        rivals=tuple(rivals),
        held=TrainedPairs.tensors,
        bytes=3 * case.bytes,
        flops=3 * case.flops,
    )


def _sddmms(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for place in shapes.random_linears(settings.seed):
            yield _sddmm(settings, place, 0.1, quick=True)
        return
    for m in (64, 512):
        for weight in (shapes.SQUARE, shapes.FEED_FORWARD):
            for density in (0.2, 0.1, 0.05, 0.02):
                chosen = weight is shapes.SQUARE and density == 0.1
                yield _sddmm(settings, weight._replace(batch=m), density, quick=chosen and m == 64)
    yield _sddmm_training(settings, shapes.SQUARE, 0.1)
    yield in_fresh_memory(_sddmm(settings, shapes.PROJECTION, 0.05))


# --- compress -------------------------------------------------------------------------------------------------------------


def compress_torch(p: Pruned, state: str) -> Call:
    as_csr(p.kept[:1])  # its first use warns
    return p.kept.to_sparse_csr


def compress_scipy(p: Pruned, state: str) -> Call:
    return functools.partial(_scipy_csr, p)


def _compression(settings: Settings, place: shapes.Linear, density: float, format: str, **flags: bool) -> Case:  # noqa: A002
    weights = place.rows * place.columns
    rivals = [Contestant("to_sparse_csr", compress_torch, tensors=lambda csr: csr.to_dense())]
    if settings.device == "cpu":
        rivals.append(Contestant("scipy", compress_scipy, tensors=lambda csr: torch.from_numpy(csr.toarray())))
    return Case(
        family=FAMILY,
        op="compress",
        label=f"{place.rows}x{place.columns}, density {density}, {format}",
        problem=functools.partial(Pruned, place, density, torch.float32, False),
        reference=lambda p: p.kept.double(),
        ours=Contestant(
            "fourfold",
            lambda p, state: functools.partial(ff.compress, p.kept, format=format),
            tensors=lambda sparse: sparse.decompress(),
        ),
        rivals=tuple(rivals),
        tolerance=Tolerance(0.0, 0.0),
        state="heap",
        bytes=4 * weights + int(4 * weights * density) + weights // 8,
        source=place.source,
        **flags,
    )


def _kept_of(gather: Callable[[Pruned], Tensor]) -> Callable[[Pruned, str], Call]:
    """The kept values of a weight, and its gradient where theirs are all 1."""

    def make(p: Pruned, state: str) -> Call:
        ones = torch.ones(int(p.mask.sum()), device=p.weight.device)
        return with_backward(lambda: gather(p), [p.weight], [ones])

    return make


def _compression_training(settings: Settings, place: shapes.Linear, density: float) -> Case:
    """No torch.compile: how many values there are is known from the mask alone."""
    rivals = [
        Contestant("weight[mask]", _kept_of(lambda p: p.weight[p.mask]), tensors=_first_as_a_row),
        Contestant("masked_select", _kept_of(lambda p: p.weight.masked_select(p.mask)), tensors=_first_as_a_row),
    ]
    case = _compression(settings, place, density, "bitmap")
    return dataclasses.replace(
        case,
        label=f"{case.label}, forward and backward",
        problem=functools.partial(Pruned, place, density, torch.float32, True),
        reference=lambda p: [p.weight.detach()[p.mask][None].double(), p.mask.double()],
        ours=Contestant(
            "fourfold", _kept_of(lambda p: ff.compress(p.weight, p.bits, format="bitmap").values), tensors=_first_as_a_row
        ),
        rivals=tuple(rivals),
        held=Pruned.tensors,
        bytes=2 * case.bytes,
    )


def _compressions(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for place in shapes.random_linears(settings.seed):
            yield _compression(settings, place, 0.1, "auto", quick=True)
        return
    for format in ("auto", "bitmap", "csr16", "slab"):  # noqa: A001
        yield _compression(settings, shapes.FEED_FORWARD, 0.1, format, quick=format == "auto")
        yield _compression(settings, shapes.PROJECTION, 0.1, format)
    yield _compression_training(settings, shapes.FEED_FORWARD, 0.1)
    yield in_fresh_memory(_compression(settings, shapes.PROJECTION, 0.1, "bitmap"))


# --- call overhead --------------------------------------------------------------------------------------------------------

TINY = "so small that only the call costs"


def _overheads() -> Iterator[Case]:
    given = {"family": FAMILY, "rivals": (), "state": "heap", "source": TINY, "quick": True, "overhead": True}
    place = shapes.Linear(8, 64, 1, TINY)
    for format in ("bitmap", "csr16"):  # noqa: A001
        yield Case(
            op="sparse_linear",
            label=f"float32 {place}, {format}",
            problem=functools.partial(Pruned, place, 0.5, torch.float32, False),
            reference=_exactly,
            ours=Contestant("fourfold", hot(functools.partial(ours, format=format))),
            tolerance=FLOAT32,
            yardsticks=(Contestant("F.linear", hot(dense)),),
            **given,
        )
    yield Case(
        op="sddmm",
        label="float32 8x64 pairs of 1 number",
        problem=functools.partial(Pairs, place, 0.5),
        reference=_pairs_exactly,
        ours=Contestant("fourfold", sddmm_ours, tensors=_as_a_row),
        tolerance=FLOAT32,
        overhead_goal=12.0,
        **given,
    )
    yield Case(
        op="compress",
        label="float32 8x64",
        problem=lambda device: Pruned(place, 0.5, torch.float32, False, device).kept,
        reference=Tensor.double,
        ours=Contestant("fourfold", lambda w, state: lambda: ff.compress(w), tensors=lambda sparse: sparse.decompress()),
        tolerance=Tolerance(0.0, 0.0),
        **given,
    )


# --- what the harness asks for --------------------------------------------------------------------------------------------


def cases(settings: Settings) -> Iterator[Case]:
    if not settings.random_shapes:
        yield from _overheads()
    yield from _inferences(settings)
    if not settings.random_shapes:
        yield from _retrainings(settings)
    yield from _sddmms(settings)
    yield from _compressions(settings)


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
