"""Similarity in memory, from inside: gradients, whitening, blocks and tiles, and what torch does with functions like these."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fourfold.ops import _cca_pair, _cca_rbf
from fourfold.ops import _similarity as similarity
from fourfold.ops.cca import CCAResult, cca, cka, procrustes, pwcca, rv, svcca
from torch import Tensor
from torch.autograd import forward_ad, gradcheck

F64, C128 = torch.float64, torch.complex128

Measure = Callable[[Tensor, Tensor], Tensor]

MEASURES: dict[str, Measure] = {
    "cca": lambda x, y: cca(x, y).mean,
    "svcca": lambda x, y: svcca(x, y, variance=0.9).mean,
    "pwcca": pwcca,
    "cka": cka,
    "cka unbiased": lambda x, y: cka(x, y, unbiased=True),
    "cka rbf": lambda x, y: cka(x, y, kernel="rbf", sigma=0.8),
    "cka rbf unbiased": lambda x, y: cka(x, y, kernel="rbf", unbiased=True),
    "procrustes": procrustes,
    "rv": rv,
}
WIDE = [name for name in MEASURES if name not in ("cca", "pwcca")]
every_measure = pytest.mark.parametrize("name", MEASURES)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed), dtype=dtype)


def pair(n: int, dx: int, dy: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Layers that share something, of unequal variances."""
    shared = randn(n, min(dx, dy), dtype=dtype)
    x, y = randn(n, dx, seed=1, dtype=dtype), randn(n, dy, seed=2, dtype=dtype)
    x[:, : shared.shape[1]] += shared
    y[:, : shared.shape[1]] += shared
    return x * torch.linspace(1, 3, dx, dtype=F64), y * torch.linspace(2, 1, dy, dtype=F64)


def centred_scatter(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, y = x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)
    return x.mH @ x, x.mH @ y, y.mH @ y


def gradients(call: Measure, *tensors: Tensor) -> tuple[Tensor, ...]:
    tracked = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(call(*tracked), tracked)


def same(actual: tuple[Tensor, ...] | Tensor, expected: tuple[Tensor, ...] | Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several panels, slices and tiles of a few samples."""
    monkeypatch.setattr(_cca_pair, "_SAMPLES", 16)
    monkeypatch.setattr(_cca_pair, "_PANEL", 16)
    monkeypatch.setattr(_cca_pair, "_SLICE", 50)
    monkeypatch.setattr(_cca_rbf, "_DIRECT", 10)
    monkeypatch.setattr(_cca_rbf, "_TILE", 7)
    monkeypatch.setattr(_cca_rbf, "_COLLECTED", 3)


# ---- gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
@pytest.mark.parametrize("variance", [None, 0.6, 0.9])
def test_gradcheck_of_correlations(dtype, variance):
    """Of every single one, real and complex, with and without directions cut off."""
    x, y = pair(20, 4, 3, dtype)

    def rho(x: Tensor, y: Tensor) -> Tensor:
        xx, xy, yy = centred_scatter(x, y)
        wx, wy = (similarity.whiten(c, 20, variance=variance) for c in (xx, yy))
        assert (wx.rank < 4) is (variance is not None)
        return similarity.correlations(xx, xy, yy, wx, wy)

    assert gradcheck(rho, (x.requires_grad_(), y.requires_grad_()), check_batched_grad=False)


@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 2, 3)], ids=str)
def test_gradcheck_of_nuclear_norm(dtype, shape):
    m = randn(*shape, dtype=dtype).requires_grad_()
    assert gradcheck(similarity.nuclear_norm, (m,))
    same(similarity.nuclear_norm(m), torch.linalg.svdvals(m).sum(-1))


def test_nuclear_norm_on_its_null_space():
    """The subgradient of least norm: nothing along directions without singular value."""
    m = torch.diag(torch.tensor([3.0, 2.0, 0.0, 1e-17], dtype=F64)).requires_grad_()
    (gradient,) = torch.autograd.grad(similarity.nuclear_norm(m), m)
    same(gradient, torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=F64)))
    zero = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    assert not torch.autograd.grad(similarity.nuclear_norm(zero), zero)[0].any()
    # Of what is summed from numbers of size 1, 1e-15 is zero.
    (gradient,) = torch.autograd.grad(similarity.nuclear_norm(1e-15 * m, torch.ones((), dtype=F64)), m)
    assert not gradient.any()


def test_pwcca_with_its_weights_frozen():
    x, y = pair(40, 4, 3)
    for weights in ("x", "y"):
        xx, xy, yy = centred_scatter(x, y)
        wx, wy = similarity.whiten(xx, 40), similarity.whiten(yy, 40)
        u, rho, vh = torch.linalg.svd(wx.root.T @ xy @ wy.root, full_matrices=False)
        a = similarity.pwcca_weights(*((xx, wx, u) if weights == "x" else (yy, wy, vh.mH)), rho)

        def frozen(x: Tensor, y: Tensor, a: Tensor = a) -> Tensor:
            return cca(x, y).rho @ a / a.sum()

        same(pwcca(x, y, weights=weights), frozen(x, y))
        same(gradients(lambda x, y, w=weights: pwcca(x, y, weights=w), x, y), gradients(frozen, x, y))
        assert gradcheck(frozen, (x.clone().requires_grad_(), y.clone().requires_grad_()))


@pytest.mark.parametrize("unbiased", [False, True])
def test_gradcheck_of_rbf_with_its_bandwidth_frozen(unbiased):
    x, y = pair(11, 3, 2)
    scales = [-1 / (2 * 0.8**2 * _cca_rbf.Distances(t).median()) for t in (x, y)]

    def frozen(x: Tensor, y: Tensor) -> Tensor:
        kernels = [((t[:, None] - t).square().sum(2) * s).exp() for t, s in zip((x, y), scales, strict=True)]
        if unbiased:
            n = len(x)
            kernels = [k - k.diag().diag() for k in kernels]

            def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
                return (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * k.sum(0) @ l.sum(0) / (n - 2)
        else:

            def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
                return ((k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()) * l).sum()

        k, l = kernels  # noqa: E741
        return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return cka(x, y, kernel="rbf", unbiased=unbiased, sigma=0.8)

    same(ours(x, y), frozen(x, y))
    same(gradients(ours, x, y), gradients(frozen, x, y))


@every_measure
@pytest.mark.parametrize("shape", [(60, 5, 4), (9, 40, 30), (9, 40, 2)], ids=str)
@pytest.mark.filterwarnings("ignore:.*chance level:UserWarning")
def test_gradient_points_uphill(name, shape):
    """Against a difference quotient along it, where nothing is a constant."""
    if (shape[0] < shape[1] and name not in WIDE) or "rbf" in name or name == "pwcca":
        return
    x, y = pair(*shape)
    along = gradients(MEASURES[name], x, y)
    step = 1e-4
    ends = [MEASURES[name](x + s * along[0], y + s * along[1]) for s in (step, -step)]
    slope = sum(g.square().sum() for g in along)
    assert slope > 1e-6
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-5, atol=0)


@every_measure
def test_same_tensor_twice_is_two_that_are_equal(name):
    """Where nothing is computed twice, gradients are those of both together."""
    x, _ = pair(60, 5, 4)
    same(MEASURES[name](x, x), MEASURES[name](x, x.clone()))

    def through(f: Measure, other: Measure) -> Tensor:
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(f(x, other(x, x)), x)
        x.requires_grad_(False)
        return gradient

    def shifted(a: Tensor, b: Tensor) -> Tensor:
        return 1 - MEASURES[name](a, b)

    assert through(shifted, lambda a, _: a).abs().max() < 1e-10
    assert through(shifted, lambda a, _: a.clone()).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["cca", "pwcca", "svcca"])
def test_gradients_of_ill_conditioned_layers(name, monkeypatch):
    """Which are looked at twice: of the same function, whose value then has more digits."""
    x, y = pair(90, 4, 3)
    x[:, 1] = x[:, 0] + 1e-3 * x[:, 1]
    once = MEASURES[name](x, y), *gradients(MEASURES[name], x, y)
    monkeypatch.setattr(similarity, "REFINE", 0.0)
    twice = MEASURES[name](x, y), *gradients(MEASURES[name], x, y)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max()))


@every_measure
def test_gradients_from_blocks(name, small_blocks):
    x, y = pair(60, 5, 4)
    found = MEASURES[name](x, y), *gradients(MEASURES[name], x, y)
    pytest.MonkeyPatch().undo()
    same(found, reference_of(name, x, y), 1e-11)
    half = gradients(MEASURES[name], x.half(), y.bfloat16())
    assert [g.dtype for g in half] == [torch.float16, torch.bfloat16]


def reference_of(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Of the reference program, which knows no blocks."""
    from fourfold.reference import cca as reference

    calls: dict[str, Measure] = {
        "cca": lambda x, y: reference.cca(x, y).mean,
        "svcca": lambda x, y: reference.svcca(x, y, variance=0.9).mean,
        "pwcca": reference.pwcca,
        "cka": reference.cka,
        "cka unbiased": lambda x, y: reference.cka(x, y, unbiased=True),
        "cka rbf": lambda x, y: reference.cka(x, y, kernel="rbf", sigma=0.8),
        "cka rbf unbiased": lambda x, y: reference.cka(x, y, kernel="rbf", unbiased=True),
        "procrustes": reference.procrustes,
        "rv": reference.rv,
    }
    return calls[name](x, y), *gradients(calls[name], x, y)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.filterwarnings("ignore:.*chance level:UserWarning")
def test_wide_layers_from_blocks(name, small_blocks):
    x, y = pair(12, 33, 20)
    same((MEASURES[name](x, y), *gradients(MEASURES[name], x, y)), reference_of(name, x, y), 1e-10)


@pytest.mark.parametrize("name", ["cka", "cca"])
def test_layers_learn_to_be_alike(name):
    """The loss of a training in float32 falls, from where both are independent."""
    target, source = randn(150, 4, dtype=torch.float32), randn(150, 4, seed=1, dtype=torch.float32)
    source[:, :2] += target[:, :2]
    network = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    with torch.no_grad():
        for i, p in enumerate(network.parameters()):
            p.copy_(0.5 * randn(*p.shape, seed=i, dtype=torch.float32))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = 1 - MEASURES[name](network(source), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


# ---- torch's machinery -----------------------------------------------------------------------------------------------------


@every_measure
@pytest.mark.filterwarnings("ignore:.*chance level:UserWarning")
def test_in_transforms(name):
    for shape in ((60, 5, 4), (9, 40, 30)) if name in WIDE else ((60, 5, 4),):
        x, y = pair(*shape)
        same(torch.func.grad(MEASURES[name], (0, 1))(x, y), gradients(MEASURES[name], x, y))
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(MEASURES[name], (x, y), (x, y))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            MEASURES[name](x, forward_ad.make_dual(y, y))
        with pytest.raises(ValueError, match=r"x is mapped by torch\.func\.vmap"):
            torch.func.vmap(MEASURES[name])(torch.stack([x, x]), torch.stack([y, y]))
        # A second derivative would miss what the first takes for constant.
        with pytest.raises(NotImplementedError, match="once, not twice"):
            torch.func.grad(lambda x, y=y: torch.func.grad(MEASURES[name])(x, y).square().sum())(x)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(MEASURES[name](x, y), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="once, not twice"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["cca", "cka", "cka rbf"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own look at it
def test_in_compiled_functions(name):
    x, y = pair(60, 5, 4)

    def loss(weight: Tensor) -> Tensor:
        return 1 - MEASURES[name](torch.tanh(x @ weight), y * 2).sin()

    weight = torch.eye(5, dtype=F64)
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    same(compiled(weight), loss(weight))
    same(gradients(compiled, weight), gradients(loss, weight))


def test_warnings_show_the_callers_line():
    x, y = pair(60, 20, 4)
    with pytest.warns(UserWarning, match="n=60 samples for 20 dimensions; independent data would reach .* 0.34") as caught:
        cca(x, y)
    assert [w.filename for w in caught] == [__file__]


# ---- whitening -------------------------------------------------------------------------------------------------------------


def spread(kappa: float, d: int = 6) -> Tensor:
    """A scatter matrix of data with this condition number."""
    q = torch.linalg.qr(randn(d, d))[0]
    c = (q * torch.logspace(0, -2 * math.log10(kappa), d, dtype=F64)) @ q.T
    return (c + c.T) / 2


@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("n", [10, 1000])
def test_shortcut_is_taken_only_with_full_rank(kappa, n):
    c = spread(kappa)
    w = similarity.whiten(c, n)
    assert w.rank == int((torch.linalg.eigvalsh(c) > n * similarity.EPS).sum())
    assert w.root.shape == (6, w.rank)
    if kappa <= 1e2:
        assert w.spectrum is None
    if kappa <= 1e5:
        same(w.root.T @ c @ w.root, torch.eye(w.rank, dtype=F64), 1e-15 * kappa**2 + 1e-13)
    if w.bound is not None:
        assert w.kappa**2 <= w.bound
    if w.rank == 6:
        assert w.kappa == pytest.approx(kappa, rel=1e-15 * kappa**2 + 1e-12)


def test_a_batch_is_its_matrices():
    x, y = randn(3, 70, 6), randn(3, 70, 5, seed=1)
    y[..., :2] += x[..., :2]
    y[0, :, 4] = y[0, :, 3]
    y[2] = 0.5
    xx, xy, yy = centred_scatter(x, y)
    for variance in (None, 0.8):
        wx, wy = similarity.whiten(xx, 70, variance=variance), similarity.whiten(yy, 70, variance=variance)
        rho = similarity.correlations(xx, xy, yy, wx, wy)
        means, squares = similarity.mean_rho(rho, wx, wy), similarity.mean_r2(rho, wx, wy)
        for i in range(3):
            ux, uy = (similarity.whiten(c[i], 70, variance=variance) for c in (xx, yy))
            alone = similarity.correlations(xx[i], xy[i], yy[i], ux, uy)
            assert (ux.rank, uy.rank) == (wx.ranks[i], wy.ranks[i])
            same(rho[i, : len(alone)], alone)
            assert not rho[i, len(alone) :].any()
            same((means[i], squares[i]), (similarity.mean_rho(alone, ux, uy), similarity.mean_r2(alone, ux, uy)))
            assert wy.kappas[i] == pytest.approx(uy.kappa)
            same(similarity.linear_cka(xx, xy, yy)[:2], torch.stack([rv(x[i], y[i]) for i in range(2)]))
            same(similarity.procrustes_similarity(xx, xy, yy)[:2], torch.stack([procrustes(x[i], y[i]) for i in range(2)]))


@pytest.mark.parametrize(("d", "value"), [(0, 0.0), (3, 0.0), (2, -1e-20)])
def test_nothing_to_whiten(d, value):
    c = value * torch.eye(d, dtype=F64)
    w = similarity.whiten(c, 5)
    assert w.rank == 0 and w.kappa == math.inf and w.root.shape == (c.shape[0], 0)
    rho = similarity.correlations(c, c, c, w, w)
    assert len(rho) == 0 and similarity.mean_rho(rho, w, w) == 0
    tracked = c.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(similarity.correlations(tracked, tracked, tracked, w, w).sum(), tracked)
    assert not gradient.any()


def test_unbiased_hsic_from_sums_with_any_shift():
    n = 25
    x, y = pair(n, 4, 3)
    k, l = (t @ t.T - (t @ t.T).diag().diag() for t in (x, y))  # noqa: E741
    expected = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * k.sum(0) @ l.sum(0) / (n - 2)
    for shift in (0.0, 3.0):
        a, b = x - shift, y + shift
        p, q = a.square().sum(1), b.square().sum(1)
        sums = similarity.Sums(a.T @ b, a.sum(0), b.sum(0), p.sum(), q.sum(), p @ q, q @ a, p @ b)
        same(similarity.unbiased_hsic(n, sums), expected, 1e-11)


def test_condition_numbers_wait_until_asked_for():
    x, y = pair(60, 5, 4)
    result = cca(x, y)
    assert result._condition_x._whitener is not None
    exact = torch.linalg.svdvals(x - x.mean(0))
    assert result.kappa_x == pytest.approx(float(exact[0] / exact[-1]))
    assert result._condition_x._whitener is None
    assert repr(result).startswith(f"CCAResult(mean={float(result):.6g}, r2=")
    assert f"kappa_x={result.kappa_x:.3g}" in repr(result)
    assert isinstance(result, CCAResult)


# ---- tiles of the n x n kernel -----------------------------------------------------------------------------------------------


def distances_without_products(x: Tensor) -> Tensor:
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


def clusters() -> Tensor:
    """Far from 0 and apart, with duplicates and near ones."""
    centre = 1e3 + 50 * randn(4, 8).repeat_interleave(10, 0)
    x = centre + 1e-3 * randn(40, 8, seed=1)
    x[7] = x[3]
    x[31] = x[2]
    x[35] = x[34] + 1e-9
    return x


@pytest.mark.parametrize("parts", [1, 6])
def test_distances_are_those_of_differences(parts, monkeypatch):
    if parts > 1:
        monkeypatch.setattr(_cca_rbf, "_DIRECT", 10)
        monkeypatch.setattr(_cca_rbf, "_TILE", 7)
    x = clusters()
    distances = _cca_rbf.Distances(x)
    assert len(distances.parts) == parts
    exact = distances_without_products(x)
    for rows, columns in distances.places():
        # x less a constant is rounded, by about 1e-16 of the distance to it.
        torch.testing.assert_close(distances.tile(rows, columns), exact[rows, columns], rtol=1e-9, atol=1e-18)
    tile = distances.tile(distances.parts[0], distances.parts[0])
    assert not tile.diagonal().any() and (parts > 1 or tile[7, 3] == tile[2, 31] == 0)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 40, 41])
@pytest.mark.parametrize("collected", [0, 3, 1 << 22])
def test_median_is_exact(n, collected, monkeypatch):
    """As torch.median finds it among all of them, whatever bits decide; ties included."""
    monkeypatch.setattr(_cca_rbf, "_DIRECT", 16)
    monkeypatch.setattr(_cca_rbf, "_TILE", 9)
    monkeypatch.setattr(_cca_rbf, "_COLLECTED", collected)
    for x in (randn(n, 3), 1e-120 * randn(n, 2), randn(n, 3).round(), torch.arange(n, dtype=F64).unsqueeze(1)):
        distances = _cca_rbf.Distances(x)
        every = torch.cat([t.flatten() for t in distances._values()])
        assert len(every) == n * (n - 1) // 2
        assert distances.median() == every.median()


def test_median_of_zero_is_refused():
    x, y = randn(9, 3), randn(9, 2, seed=1)
    x[:7] = 1.5
    for a, b, name in ((x, y, "x"), (y, x, "y"), (x, x, "x")):
        with pytest.raises(ValueError, match=f"cka: {name} must have a median distance above 0"):
            cka(a, b, kernel="rbf")
    x[5] = 2.0  # now half of the pairs differ
    assert cka(x, x, kernel="rbf") == pytest.approx(1)


def test_wide_kernels_keep_their_digits():
    """Nearly 1 everywhere: then CKA is that of distances, which is linear CKA."""
    x, y = pair(50, 4, 3)
    same(cka(x, y, kernel="rbf", sigma=1e5), cka(x, y), 1e-8)


def test_memory_of_rbf_is_linear(monkeypatch):
    monkeypatch.setattr(_cca_rbf, "_DIRECT", 128)
    monkeypatch.setattr(_cca_rbf, "_TILE", 64)
    monkeypatch.setattr(_cca_rbf, "_COLLECTED", 256)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.numel() != 1 << _cca_rbf._BINS:
                largest = max(largest, result.numel())
            return result

    x, y = (t.requires_grad_() for t in pair(700, 4, 3))
    with Watch():
        cka(x, y, kernel="rbf").backward()
    assert 700 * 4 <= largest <= 2 * 64 * 64


@pytest.mark.parametrize("name", WIDE)
def test_memory_of_wide_layers(name):
    """Nothing of d x d, in backward neither."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else (result,):
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return result

    x, y = (t.requires_grad_() for t in pair(12, 900, 700))
    with Watch(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*chance level", UserWarning)
        MEASURES[name](x, y).backward()
    assert 12 * 900 <= largest <= 2 * 12 * 900
