"""DFT-CCA beyond test_cca.py: its transform, its statistics as a state that is added up and moved, its gradient, refusals."""

from __future__ import annotations

import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from battery import Refusal, unreached_raises
from fourfold.ops import _cca_frequencies as frequencies
from fourfold.ops import _similarity as similarity
from fourfold.ops import cca_dft
from fourfold.ops._cca_frequencies import Frequencies, Grid, Transform
from fourfold.ops.cca_dft import dft_cca
from fourfold.reference import cca as reference
from torch import Tensor

F64 = torch.float64
CPU = torch.device("cpu")
SIZES = [(1, 1), (1, 5), (6, 1), (2, 2), (4, 4), (5, 7), (8, 6), (3, 10)]
of_sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed), dtype=F64)


def images(n: int, cx: int, cy: int, size: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two layers that share some of what they say at every frequency."""
    x = randn(n, cx, *size, seed=seed)
    y = torch.einsum("nchw,dc->ndhw", x, randn(cy, cx, seed=seed + 1)).roll(1, -1)
    return x, y + randn(n, cy, *size, seed=seed + 2)


def close(actual: Tensor, expected: Any, limit: float) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=limit)


def state_of(layers: dict[Any, Tensor], pairs: Any = None, precision: str = "high") -> Frequencies:
    """Statistics of these layers, not updated yet; of all pairs unless some are named."""
    first = next(iter(layers.values()))
    pairs = [(a, b) for a in layers for b in layers] if pairs is None else pairs
    return Frequencies({name: x.shape[1] for name, x in layers.items()}, first.shape[2:], pairs, CPU, precision)


def updated(layers: dict[Any, Tensor], *args: Any, **kwargs: Any) -> Frequencies:
    state = state_of(layers, *args, **kwargs)
    state.update(layers)
    return state


# ---- the transform ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fft_from", [1, 1000], ids=["fft", "products"])
@of_sizes
def test_transform_is_fft2(monkeypatch, size, fft_from):
    """One of each conjugate pair, of images less a pivot, in any grouping of a column's frequencies."""
    monkeypatch.setattr(frequencies, "_FFT_FROM", fft_from)
    x, y = images(9, 3, 2, size)
    x, pivot = x + 100, randn(3, *size) + 100
    expected = torch.cat([torch.fft.fft2(x - pivot), torch.fft.fft2(y)], 1).conj_physical()
    grid = Grid(*size)
    for cache in (1, 1 << 11, 1 << 20):
        monkeypatch.setattr(frequencies, "_CACHE_BYTES", cache)
        transform = Transform(grid, 5, F64, CPU)
        transform.read([x, y], [pivot, torch.zeros(2, *size, dtype=F64)])
        found = torch.full((len(grid), 5, 2, 9), math.nan, dtype=F64)
        for where, z in transform.frequencies():
            assert found[where].isnan().all(), "no frequency comes twice"
            found[where] = z
        found = torch.complex(found[:, :, 0], found[:, :, 1])[grid.index].permute(3, 2, 0, 1)
        # A frequency is its own or its conjugate's.
        apart = torch.minimum((found - expected).abs(), (found.conj() - expected).abs())
        assert apart.max() < 1e-14 * 100 * math.prod(size)
        # Of the first column it is the first half itself.
        own = slice(None), slice(None), slice(0, size[0] // 2 + 1), 0
        close(torch.view_as_real(found[own]), torch.view_as_real(expected[own]), 1e-12 * math.prod(size))


@of_sizes
def test_half_of_the_frequencies_is_enough(size):
    h, w = size
    grid = Grid(h, w)
    own = sum((2 * k) % h == 0 and (2 * l) % w == 0 for k in range(h) for l in range(w))  # noqa: E741
    assert len(grid) == (h * w + own) // 2
    assert grid.index.unique().tolist() == list(range(len(grid)))
    mirrored = grid.index.flip((0, 1)).roll((1, 1), (0, 1))
    assert torch.equal(grid.index, mirrored)


def test_waves_cross_zero_exactly():
    """So that a frequency that is real has no imaginary part, and an image without a wave none of it."""
    for size in (1, 2, 4, 12, 30):
        waves = frequencies.waves(size, F64, CPU)
        assert ((waves == 0) | (waves.abs() > 1e-3)).all()
        along = torch.arange(size, dtype=F64) * (2 * math.pi / size)
        cosines = [(k * along).cos() for k in range(size // 2 + 1)]
        sines = [(k * along).sin() for k in range(1, (size + 1) // 2)]
        close(waves, torch.stack(cosines + sines), 1e-14 * size)


# ---- the similarity --------------------------------------------------------------------------------------------------


@of_sizes
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_matches_reference(size, mean):
    x, y = images(50, 4, 3, size)
    x, y = (x + mean).float(), y * 1e-3 - mean
    rho = dft_cca(x, y, reduce=None)
    close(rho, reference.dft_cca(x, y, reduce=None), 1e-10 if mean else 1e-13)
    assert rho.dtype == F64 and torch.equal(dft_cca(x, y), rho.mean())


def test_matches_reference_on_many_samples():
    """Of several chunks, the last one not full."""
    x, y = images(2 * frequencies._SAMPLES + 31, 3, 4, (32, 32))
    close(dft_cca(x.float(), y.float(), reduce=None), reference.dft_cca(x.float(), y.float(), reduce=None), 1e-13)


@pytest.mark.parametrize("size", [(6, 5), (4, 1)], ids=str)
def test_layouts_give_the_same_bits(size):
    x, y = (t.float() for t in images(50, 4, 3, size))
    expected = dft_cca(x, y, reduce=None)
    reversed_ = y.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(dft_cca(x.to(memory_format=torch.channels_last), reversed_, reduce=None), expected)
    assert torch.equal(dft_cca(torch.stack([x, -x], 4)[..., 0], y.double(), reduce=None), expected)


def translates(x: Tensor) -> Tensor:
    return torch.cat([x.roll((i, j), (2, 3)) for i in range(x.shape[2]) for j in range(x.shape[3])])


def test_theorem_of_circular_convolutions():
    """On all translates of some images, frequencies are uncorrelated: CCA of all neurons is CCA of each frequency."""
    pictures, noise = translates(randn(6, 2, 4, 4)), translates(randn(6, 2, 4, 4, seed=5))
    padded = torch.nn.functional.pad(pictures, (1, 1, 1, 1), mode="circular")
    x, y = (torch.nn.functional.conv2d(padded, randn(2, 2, 3, 3, seed=seed)) for seed in (1, 2))
    y = y + 0.3 * noise
    whole = reference.correlations(*(reference.centre(t.flatten(1)) for t in (x, y)))
    assert whole.rank_x == whole.rank_y == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(dft_cca(x, y), whole.mean, 1e-12)
    assert whole.rho.max() - whole.rho.min() > 0.1


def test_ranks_differ_between_frequencies():
    """Dead, constant, duplicate channels and frequencies, in either layer or both."""
    x, y = images(60, 4, 3, (6, 5))
    waves = torch.fft.fft2(x)
    waves[:, 1, 2, 3] = waves[:, 1, 4, 2] = 0  # one channel lacks one frequency
    waves[:, :, 3, 0] = 0  # all lack another
    waves[:, 2, 1] = waves[:, 0, 1] * (1 + 2j)  # two are the same in one direction
    waves[:, 2, 5] = waves[:, 0, 5] * (1 - 2j)
    x = torch.fft.ifft2(waves)
    x = torch.cat([x.real, torch.zeros_like(x.real[:, :1]), torch.full_like(x.real[:, :1], 0.1)], 1)
    state = updated({"x": x, "y": y})
    ranks = torch.cat([w.ranks for w in state.whiteners("x")])[state.grid.index]
    expected = torch.full((6, 5), 4)
    expected[2, 3] = expected[4, 2] = 3
    expected[3, 0] = 0
    assert torch.equal(ranks[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])
    rho = dft_cca(x, y, reduce=None)
    assert rho[3, 0] == 0
    others = expected == 4
    others[1] = others[5] = False
    close(rho[others], reference.dft_cca(x, y, reduce=None)[others], 1e-11)
    assert rho.isfinite().all() and rho.max() <= 1
    assert torch.equal(dft_cca(torch.full_like(x, 0.3), y, reduce=None), torch.zeros(6, 5, dtype=F64))


def test_whitening_does_not_depend_on_its_neighbours():
    """Matrices of full rank in a batch with others are whitened as they are alone."""
    root = torch.complex(randn(5, 9, 4), randn(5, 9, 4, seed=1))
    root[1, :, 2] = root[1, :, 0]
    root[3] = 0
    scatter = root.mH @ root
    whitener = frequencies._whiten(scatter, 9, similarity.power(scatter))
    assert whitener.ranks.tolist() == [4, 3, 4, 0, 4]
    kept = whitener.root.mH @ scatter @ whitener.root
    wanted = (torch.arange(4) < whitener.ranks.unsqueeze(1)).to(F64).diag_embed()
    close(torch.view_as_real(kept), torch.view_as_real(torch.complex(wanted, torch.zeros_like(wanted))), 1e-12)
    for i in (0, 2, 4):
        alone = scatter[i : i + 1]
        assert torch.equal(whitener.root[i], frequencies._whiten(alone, 9, similarity.power(alone)).root[0])


def test_close_to_singular_is_decided_by_eigenvalues():
    """Just above and just below the cut of n * 2⁻⁵² of the largest eigenvalue, where Cholesky can't be certain."""
    n, basis = 1000, torch.linalg.qr(torch.complex(randn(3, 3), randn(3, 3, seed=1)))[0]
    spectra = torch.tensor([[1, 1e-3, 1.5 * n * similarity.EPS], [1, 1e-3, 0.5 * n * similarity.EPS]], dtype=F64)
    scatter = basis @ (spectra.unsqueeze(-1) * basis.mH)
    assert frequencies._whiten((scatter + scatter.mH) / 2, n, spectra.sum(1)).ranks.tolist() == [3, 2]


@pytest.mark.parametrize("pairs", [[("x", "y"), ("y", "z")], [("x", "x"), ("x", "y"), ("x", "z"), ("y", "z")]])
@pytest.mark.parametrize("size", [(6, 5), (8, 8), (1, 17), (4, 160)], ids=str)
@pytest.mark.parametrize(("precision", "tolerance"), [("high", 1e-12), ("fast", 1e-4)])
def test_ops_and_products_add_up_the_same(monkeypatch, size, pairs, precision, tolerance):
    """However large and wide the layers are."""
    layers = {name: randn(20, c, *size, seed=c) + c for name, c in (("x", 5), ("y", 3), ("z", 9))}
    widths = {name: x.shape[1] for name, x in layers.items()}
    found = []
    for width in (0, 512):
        monkeypatch.setattr(frequencies, "_OPS_WIDTH", width)
        monkeypatch.setattr(frequencies, "_OPS_SIDE", 161)
        state = Frequencies(widths, size, pairs, torch.device("cpu"), precision)
        state.update(layers)
        found.append(state.tensors())
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_fast_precision():
    x, y = images(300, 4, 3, (8, 6))
    x, y = x + 50, y - 50
    high, fast = (updated({"x": x, "y": y}, precision=p) for p in ("high", "fast"))
    error = (fast.map("x", "y") - high.map("x", "y")).abs().max()
    assert 1e-13 < error < 1e-6
    assert fast.sums.dtype == F64


def test_condition_numbers():
    x, y = images(60, 4, 3, (4, 5))
    stretched = x * torch.tensor([1, 1, 1, 1e-3], dtype=F64).view(-1, 1, 1)
    state = updated({"x": stretched, "y": y, "flat": torch.ones_like(x)})
    z = torch.fft.fft2(stretched - stretched.mean(0)).permute(2, 3, 0, 1)
    assert state.kappa("x") == pytest.approx(float(torch.linalg.cond(z).max()), rel=1e-9)
    assert state.kappa("flat") == 0


# ---- the state -------------------------------------------------------------------------------------------------------


def test_batches_add_up():
    x, y = images(100, 3, 4, (4, 5))
    state = state_of({"x": x, "y": y})
    for batch in (1, 0, 37, 62):
        at = state.n
        state.update({"y": y[at : at + batch], "x": x[at : at + batch]})
    assert state.n == 100
    close(state.map("x", "y"), dft_cca(x, y, reduce=None), 1e-14)
    close(state.similarity("x", "y"), dft_cca(x, y), 1e-14)
    close(state.map("y", "x"), dft_cca(x, y, reduce=None), 1e-14)
    close(state.map("x", "x"), torch.ones(4, 5), 1e-13)


def relative(actual: Frequencies, expected: Frequencies, a: str, b: str) -> float:
    """The largest error of a scatter, as a share of the channels' norms."""
    norms = [expected.scatter(name, name).diagonal(dim1=1, dim2=2).real.sqrt() for name in (a, b)]
    error = (actual.scatter(a, b) - expected.scatter(a, b)).abs()
    return float((error / (norms[0][:, :, None] * norms[1][:, None, :])).max())


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_merge_is_exact(drift):
    """Whatever the shards and their order; also where their means are apart."""
    x, y = images(240, 3, 4, (6, 5))
    x, y = x + 100 + drift * torch.arange(240.0).view(-1, 1, 1, 1) / 100, y - 1000
    layers = {"x": x, "y": y}
    whole = updated(layers)
    for cuts in ([240], [1, 2, 237], [30, 50, 100, 60]):
        shards = []
        at = 0
        for length in cuts:
            shards.append(updated({name: t[at : at + length] for name, t in layers.items()}))
            at += length
        for ordered in (shards, shards[::-1]):
            merged = state_of(layers)
            merged.merge(state_of(layers))
            for shard in ordered:
                before = [t.clone() for t in shard.tensors()]
                merged.merge(shard)
                assert all(map(torch.equal, before, shard.tensors())), "the other stays as it was"
            assert merged.n == 240
            for a, b in (("x", "x"), ("x", "y"), ("y", "y")):
                assert relative(merged, whole, a, b) < 5e-15
            close(merged.map("x", "y"), whole.map("x", "y"), 1e-12)


def test_repivot_and_add():
    """What all_reduce does: common pivots, then a sum of tensors."""
    x, y = images(90, 3, 2, (4, 6))
    parts = [updated({"x": x[at], "y": y[at]}) for at in (slice(0, 20), slice(20, 90))]
    pivots = parts[0].pivots
    assert pivots is not None and [p.shape for p in pivots] == [(3, 4, 6), (2, 4, 6)]
    total = state_of({"x": x, "y": y})
    total.repivot(pivots)
    parts[1].repivot(pivots)
    for into, *others in zip(total.tensors(), *(p.tensors() for p in parts), strict=True):
        assert into.is_contiguous()
        into.add_(sum(others))
    total.n = 90
    close(total.map("x", "y"), dft_cca(x, y, reduce=None), 1e-13)


def test_results_follow_what_is_added():
    """Nothing that was computed before is used after."""
    x, y = images(120, 3, 2, (4, 4))
    state = updated({"x": x[:60], "y": y[:60]})
    first = state.map("x", "y")
    other = updated({"x": x[60:], "y": y[60:]})
    state.merge(other)
    close(state.map("x", "y"), dft_cca(x, y, reduce=None), 1e-13)
    assert (state.map("x", "y") - first).abs().max() > 1e-3
    state.load_state_dict(other.state_dict())
    close(state.map("x", "y"), dft_cca(x[60:], y[60:], reduce=None), 1e-13)
    state.update({"x": x[:60], "y": y[:60]})
    close(state.map("x", "y"), dft_cca(x, y, reduce=None), 1e-13)


def test_state_dict_copy_and_pickle():
    x, y = images(60, 3, 2, (4, 4))
    state = updated({"x": x[:30], "y": y[:30]})
    saved = state.state_dict()
    fresh = state_of({"x": x, "y": y})
    fresh.load_state_dict(saved)
    states = [fresh, state.copy(), pickle.loads(pickle.dumps(state))]
    size = len(pickle.dumps(state))
    assert size < 2 * sum(8 * t.numel() for t in [*state.tensors(), *(state.pivots or [])]) + 10000
    state.update({"x": x[30:] + 5, "y": y[30:]})
    for other in states:
        other.update({"x": x[30:], "y": y[30:]})
        close(other.map("x", "y"), dft_cca(x, y, reduce=None), 1e-13)
    empty = state_of({"x": x, "y": y})
    state.load_state_dict(empty.state_dict())
    assert state.n == 0 and state.pivots is None


PAIRS = {
    "all": [(a, b) for a in "pqrs" for b in "pqrs"],
    "cross": [(a, b) for a in "pq" for b in "rs"],
    "apart": [("p", "s"), ("r", "q")],
    "one": [("s", "q")],
    "itself": [("q", "q")],
}


@pytest.mark.parametrize("pairs", PAIRS)
def test_pairs(pairs):
    """Only what is wanted is kept, in whatever order its layers are named."""
    layers = {name: images(60, 2 + i, 1, (3, 4), seed=i)[0] for i, name in enumerate("pqrs")}
    state, shard = (updated({name: x[at] for name, x in layers.items()}, PAIRS[pairs]) for at in (slice(40), slice(40, 60)))
    state.merge(shard)
    for a, b in PAIRS[pairs]:
        close(state.map(a, b), reference.dft_cca(layers[a], layers[b], reduce=None), 1e-12)
        close(state.map(b, a), state.map(a, b), 1e-13)
    wanted = {*PAIRS[pairs], *((b, a) for a, b in PAIRS[pairs]), *((a, a) for a in layers)}
    kept = sum(block.total.numel() for block in state.blocks)
    assert kept == len(state.grid) * sum(layers[a].shape[1] * layers[b].shape[1] for a, b in wanted)
    if pairs == "all":
        assert len(state.blocks) == 1
    else:
        with pytest.raises(KeyError):
            state.map("p", "q")


def test_memory_does_not_grow_with_samples():
    sizes = []
    for n in (300, 900):
        x, y = images(n, 3, 2, (4, 6))
        state = updated({"x": x, "y": y})
        assert state._transform is not None
        sizes.append(sum(t.numel() for t in [*state._transform._memory.values(), *state.tensors()]))
    assert sizes[0] == sizes[1]


def test_chunks_are_bounded(monkeypatch):
    """By bytes, or by samples where images are small."""
    monkeypatch.setattr(frequencies, "_CHUNK_BYTES", 2 * 5 * 20 * 8 * 7)
    x, y = images(30, 3, 2, (4, 5))
    state = updated({"x": x, "y": y})
    assert state._transform is not None
    assert max(t.numel() for t in state._transform._memory.values()) < 10 * 5 * 20, "7 of the 30 images at a time"
    close(state.map("x", "y"), reference.dft_cca(x, y, reduce=None), 1e-13)


def test_threads_agree():
    x, y = images(70, 24, 24, (5, 4))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "dft_cca: n=", UserWarning)
                results.append(dft_cca(x, y, reduce=None))
    finally:
        torch.set_num_threads(before)
    close(results[1], results[0], 1e-13)


def test_autocast_and_grad_mode_change_nothing():
    x, y = (t.float() for t in images(60, 3, 2, (4, 6)))
    expected = dft_cca(x, y, reduce=None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dft_cca(x, y, reduce=None), expected)
        fast = updated({"x": x, "y": y}, precision="fast")
    assert torch.equal(fast.sums, updated({"x": x, "y": y}, precision="fast").sums)
    with torch.inference_mode():
        assert torch.equal(dft_cca(x, y, reduce=None), expected)
    assert torch.equal(dft_cca(x.requires_grad_(), y, reduce=None), expected)


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(call: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x, y = (t.detach().clone().requires_grad_() for t in (x, y))
    return torch.autograd.grad(call(x, y), (x, y))


@of_sizes
def test_gradients_match_reference(size):
    x, y = images(31, 3, 2, size)
    weights = randn(*size)
    for ours, exact in zip(
        gradients(lambda x, y: (dft_cca(x, y, reduce=None) * weights).sum(), x, y),
        gradients(lambda x, y: (reference.dft_cca(x, y, reduce=None) * weights).sum(), x, y),
        strict=True,
    ):
        close(ours, exact, 1e-12)


def test_gradients_of_several_chunks(monkeypatch):
    monkeypatch.setattr(frequencies, "_SAMPLES", 16)
    monkeypatch.setattr(frequencies, "_CACHE_BYTES", 1 << 12)
    monkeypatch.setattr(frequencies, "_PART_BYTES", 1 << 9)
    x, y = images(50, 3, 2, (5, 6))
    for ours, exact in zip(gradients(dft_cca, x + 30, y), gradients(reference.dft_cca, x, y), strict=True):
        close(ours, exact, 1e-12)


def test_gradcheck():
    x, y = images(22, 2, 2, (2, 3))
    assert torch.autograd.gradcheck(dft_cca, (x.requires_grad_(), y.requires_grad_()), atol=1e-8, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_keep_the_dtype(dtype):
    x, y = (t.to(dtype) for t in images(40, 3, 2, (4, 3)))
    exact = gradients(dft_cca, x.double(), y.double())
    for ours, expected in zip(gradients(dft_cca, x.to(memory_format=torch.channels_last), y), exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def test_gradients_are_finite_where_they_are_not_unique():
    """Tied correlations of a layer with itself; channels that are dead, constant or the same; a frequency that is dead."""
    x, y = images(60, 3, 2, (4, 4))
    x = torch.cat([x, x[:, :1], torch.zeros_like(x[:, :1]), torch.full_like(x[:, :1], 0.1)], 1)
    flat = x.mean((2, 3), keepdim=True).expand_as(x)
    for a, b in ((x, x), (x, y), (y, flat), (flat, x), (torch.ones_like(x), y)):
        for gradient in gradients(dft_cca, a, b):
            assert gradient.isfinite().all()
    close(gradients(dft_cca, x, x)[0], torch.zeros_like(x), 1e-13)
    shared = x.clone().requires_grad_()
    close(torch.autograd.grad(dft_cca(shared, shared), shared)[0], torch.zeros_like(x), 1e-13)


def test_gradient_of_one_input():
    x, y = images(40, 3, 2, (4, 3))
    expected = gradients(dft_cca, x, y)
    tracked = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(dft_cca(tracked, y), tracked)
    assert torch.equal(found, expected[0])
    tracked = y.clone().requires_grad_()
    (found,) = torch.autograd.grad(dft_cca(x, tracked), tracked)
    assert torch.equal(found, expected[1])


def test_training_with_it_raises_similarity():
    x, y = images(60, 2, 2, (4, 4))
    weight = torch.zeros(2, 2, 1, 1, dtype=F64).copy_(torch.eye(2).view(2, 2, 1, 1)).requires_grad_()
    noise = randn(60, 2, 4, 4, seed=9)
    optimizer = torch.optim.SGD([weight], lr=2.0)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        value = dft_cca(torch.nn.functional.conv2d(x, weight) + noise, y)
        (-value).backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] > values[0] + 0.05


def test_under_torch_func():
    x, y = images(30, 2, 2, (3, 4))
    found = torch.func.grad(dft_cca, (0, 1))(x, y)
    for ours, expected in zip(found, gradients(dft_cca, x, y), strict=True):
        close(ours, expected, 1e-15)


def test_second_derivative_is_refused():
    x, y = (t.requires_grad_() for t in images(30, 2, 2, (3, 4)))
    (gradient,) = torch.autograd.grad(dft_cca(x, y), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        gradient.sum().backward()


# ---- wrong calls -----------------------------------------------------------------------------------------------------


def spoiled(x: Tensor) -> Tensor:
    x = x.clone()
    x[3, 1, 2, 0], x[5, 0, 0, 1] = math.nan, -math.inf
    return x


def refusals() -> list[Refusal]:
    x, y = images(40, 3, 2, (4, 5))
    meta = torch.empty(40, 2, 4, 5, device="meta")
    few = (
        "dft_cca: n must be larger than the number of channels, got n=3 samples for 3 channels: every correlation would be 1, "
        "whatever the data; use more samples, or cca with every pixel as a sample"
    )
    bad = "must be finite, got 2 NaN or infinite values; leave out the samples with them"
    return [
        Refusal(TypeError, "dft_cca: x must be a Tensor, got list", lambda: dft_cca([1.0], y)),  # type: ignore[arg-type]
        Refusal(TypeError, "dft_cca: y must be float16, bfloat16, float32 or float64, got int64", lambda: dft_cca(x, y.long())),
        Refusal(
            TypeError, "dft_cca: x must be float16, bfloat16, float32 or float64, got complex128", lambda: dft_cca(x + 0j, y)
        ),
        Refusal(ValueError, "dft_cca: x must be [n, c, h, w], got shape (40, 60)", lambda: dft_cca(x.flatten(1), y)),
        Refusal(ValueError, "dft_cca: y must be [n, c, h, w], got shape (40, 2, 20)", lambda: dft_cca(x, y.flatten(2))),
        Refusal(ValueError, "dft_cca: x must have channels and pixels, got shape (40, 0, 4, 5)", lambda: dft_cca(x[:, :0], y)),
        Refusal(
            ValueError, "dft_cca: y must have channels and pixels, got shape (40, 2, 4, 0)", lambda: dft_cca(x, y[..., :0])
        ),
        Refusal(
            TypeError,
            "dft_cca: reduce must be one of ('mean',), got 1",
            lambda: dft_cca(x, y, reduce=1),  # type: ignore[arg-type]
        ),
        Refusal(
            ValueError,
            "dft_cca: reduce must be one of ('mean',), got 'sum'",
            lambda: dft_cca(x, y, reduce="sum"),  # type: ignore[arg-type]
        ),
        Refusal(
            ValueError,
            "dft_cca: x and y must have the same samples, got shapes (39, 3, 4, 5) and (40, 2, 4, 5)",
            lambda: dft_cca(x[1:], y),
        ),
        Refusal(
            ValueError,
            "dft_cca: x and y must have the same height and width, got shapes (40, 3, 3, 5) and (40, 2, 4, 5); crop or pool "
            "the larger one",
            lambda: dft_cca(x[:, :, 1:], y),
        ),
        Refusal(ValueError, "dft_cca: x and y must be on the same device, got cpu and meta", lambda: dft_cca(x, meta)),
        Refusal(ValueError, few, lambda: dft_cca(x[:3], y[:3])),
        Refusal(ValueError, few, lambda: dft_cca(y[:3], x[:3])),
        Refusal(ValueError, f"dft_cca: x {bad}", lambda: dft_cca(spoiled(x), y)),
        Refusal(ValueError, f"dft_cca: y {bad}", lambda: dft_cca(x, spoiled(y).half())),
    ]


@pytest.mark.parametrize("refusal", refusals(), ids=lambda r: r.message[9:60])
def test_refuses_wrong_input(refusal):
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    assert f"{caught.type.__name__}: {caught.value}" == f"{refusal.error.__name__}: {refusal.message}"


def test_every_raise_is_reached():
    assert not unreached_raises((), cca_dft, refusals())


def test_warns_near_chance():
    x, y = images(29, 3, 2, (4, 5))
    with pytest.warns(UserWarning, match=r"^dft_cca: n=29 samples for 3 dimensions; .* r2 = 0\.11 ") as caught:
        dft_cca(x, y)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dft_cca(*images(30, 3, 2, (4, 5)))
