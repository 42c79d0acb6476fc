"""Similarity of two layers in memory: against the reference, against facts that hold whatever the program, and wrong calls."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import fourfold as ff
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from battery import FLOATING, Refusal, assert_same, storages, unreached_raises, without_page
from fourfold.ops import _cca_pair, _cca_rbf
from fourfold.ops.cca import CCAResult, cca, cka, procrustes, pwcca, rv, svcca
from fourfold.ops.cca_dft import dft_cca
from fourfold.reference import cca as reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

F64 = torch.float64
ours = SimpleNamespace(cca=cca, svcca=svcca, pwcca=pwcca, cka=cka, procrustes=procrustes, rv=rv, dft_cca=dft_cca)

Call = Callable[[Any, Tensor, Tensor], Tensor]

#: Every scalar, of either program.
SCALARS: dict[str, Call] = {
    "cca": lambda of, x, y: of.cca(x, y).mean,
    "cca r2": lambda of, x, y: of.cca(x, y).r2,
    "svcca": lambda of, x, y: of.svcca(x, y).mean,
    "svcca 0.8": lambda of, x, y: of.svcca(x, y, variance=0.8).mean,
    "pwcca x": lambda of, x, y: of.pwcca(x, y),
    "pwcca y": lambda of, x, y: of.pwcca(x, y, weights="y"),
    "cka": lambda of, x, y: of.cka(x, y),
    "cka unbiased": lambda of, x, y: of.cka(x, y, unbiased=True),
    "cka rbf": lambda of, x, y: of.cka(x, y, kernel="rbf"),
    "cka rbf 0.4": lambda of, x, y: of.cka(x, y, kernel="rbf", sigma=0.4),
    "cka rbf unbiased": lambda of, x, y: of.cka(x, y, kernel="rbf", unbiased=True, sigma=2.0),
    "procrustes": lambda of, x, y: of.procrustes(x, y),
    "rv": lambda of, x, y: of.rv(x, y),
}
OF_CCA = [name for name in SCALARS if "cca" in name]
every_scalar = pytest.mark.parametrize("name", SCALARS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed), dtype=F64)


def orthonormal(n: int, d: int, seed: int = 0) -> Tensor:
    """Columns of length 1 and mean 0, orthogonal to each other."""
    x = randn(n, d, seed=seed)
    return torch.linalg.qr(x - x.mean(0))[0]


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(d, d, seed=seed + 50))[0]


def pair(n: int, dx: int, dy: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two layers that share some of what they say: correlations from high to low, all distinct."""
    x = randn(n, dx, seed=seed)
    y = x @ randn(dx, dy, seed=seed + 1) / dx**0.5 + randn(n, dy, seed=seed + 2) * torch.linspace(0.2, 2, dy, dtype=F64)
    return x, y


def planted(n: int, rho: list[float], dx: int, dy: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [n, dx] and y [n, dy] with exactly these canonical correlations, as many as the narrower is wide; not yet mixed."""
    assert len(rho) == min(dx, dy)
    columns, r = orthonormal(n, dx + dy, seed), torch.tensor(rho, dtype=F64)
    x, y = columns[:, :dx].clone(), columns[:, dx:].clone()
    k = len(rho)
    y[:, :k] = r * x[:, :k] + (1 - r * r).sqrt() * y[:, :k]
    return x, y


def conditioned(x: Tensor, kappa: float, seed: int = 0) -> Tensor:
    """Orthonormal x with singular values from 1 down to 1 / kappa, rotated, so that every neuron has some of all."""
    d = x.shape[1]
    return (x * torch.logspace(0, -math.log10(kappa), d, dtype=F64)) @ rotation(d, seed)


def close(actual: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=tolerance, atol=tolerance)


def same_result(actual: CCAResult, expected: Any, tolerance: float = 1e-12) -> None:
    """Every field, against the reference's or another CCAResult."""
    assert (actual.rank_x, actual.rank_y, actual.n) == (expected.rank_x, expected.rank_y, expected.n)
    for field in ("rho", "mean", "r2"):
        close(getattr(actual, field), getattr(expected, field), tolerance)
    assert actual.kappa_x == pytest.approx(expected.kappa_x, rel=1e3 * tolerance)
    assert actual.kappa_y == pytest.approx(expected.kappa_y, rel=1e3 * tolerance)


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage().nbytes() // t.element_size() for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        self.numel = max([self.numel, *made])
        return result


# ---- equal to the reference ----------------------------------------------------------------------------------------------

SHAPES = [(200, 7, 5), (101, 1, 10), (73, 6, 1), (40, 1, 1), (401, 40, 3), (1023, 9, 30), (1025, 20, 33), (3001, 64, 65)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_correlations_match_reference(shape):
    x, y = pair(*shape)
    same_result(cca(x, y), reference.cca(x, y))
    for variance in (0.3, 0.9, 0.99, 1.0):
        same_result(svcca(x, y, variance=variance), reference.svcca(x, y, variance=variance))


@every_scalar
@pytest.mark.parametrize("shape", [(200, 7, 5), (101, 1, 10), (73, 6, 1), (40, 1, 1), (401, 40, 3)], ids=str)
def test_scalars_match_reference(name, shape):
    x, y = pair(*shape)
    close(SCALARS[name](ours, x, y), SCALARS[name](reference, x, y))


@pytest.mark.parametrize("shape", [(1030, 40, 90), (1030, 7, 5), (60, 300, 4), (60, 200, 150)], ids=str)
def test_blocks_of_samples_and_neurons(monkeypatch, shape):
    """What larger layers are computed by: several panels, several slices, in backward too."""
    monkeypatch.setattr(_cca_pair, "_PANEL", 1)
    monkeypatch.setattr(_cca_pair, "_SLICE", 5000)
    n, dx, dy = shape
    x, y = pair(*shape)
    names = ["svcca 0.8", "cka", "cka unbiased", "procrustes", "rv"] + ["cca", "pwcca x", "pwcca y"] * (n >= 10 * max(dx, dy))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "svcca: n=.*chance", UserWarning)
        for name in names:
            close(SCALARS[name](ours, x, y), SCALARS[name](reference, x, y), 1e-11)
            found, exact = (gradients(SCALARS[name], of, x, y) for of in (ours, reference))
            for ours_, expected in zip(found, exact, strict=True):
                torch.testing.assert_close(ours_, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))
    if n > 1000:
        torch.testing.assert_close(cca(x, y, precision="fast").rho, cca(x, y).rho, rtol=0, atol=1e-5)


@every_scalar
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_dtypes(name, dtype):
    """Whatever comes in is computed in float64; x and y needn't be of one type."""
    x, y = pair(200, 7, 5)
    x, y = x.to(dtype), y.to(dtype)
    result = SCALARS[name](ours, x, y)
    assert result.dtype == F64 and result.shape == () and not result.requires_grad
    close(result, SCALARS[name](reference, x, y))
    close(SCALARS[name](ours, x, y.double() + 1e-3), SCALARS[name](reference, x, y.double() + 1e-3))


@every_scalar
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
def test_layouts(name, dtype):
    """Any strides, without a change to the data."""
    x, y = (t.to(dtype) for t in pair(150, 6, 4))
    expected = SCALARS[name](ours, x, y)
    for (label, whole_x, view_x), (_, _, view_y) in zip(storages((150, 6), dtype), storages((150, 4), dtype), strict=True):
        view_x.copy_(x), view_y.copy_(y)
        before = whole_x.clone()
        close(SCALARS[name](ours, view_x, view_y), expected)
        assert_same(whole_x, before, label)


def test_expanded_and_overlapping_inputs():
    x, y = pair(300, 4, 3)
    column = x[:, :1]
    same_result(cca(column.expand(300, 3), y), reference.cca(column.repeat(1, 3), y))
    close(rv(column.expand(300, 3), y), reference.rv(column.repeat(1, 3), y))
    windows = randn(303).as_strided((300, 4), (1, 1))
    same_result(cca(windows, y), reference.cca(windows.contiguous(), y), 1e-10)
    same_result(cca(x.flip(0), y.flip(0)), reference.cca(x, y))
    with pytest.warns(UserWarning, match="^svcca: x must vary"):
        same_result(svcca(x[:1].expand(300, 4), y), reference.svcca(x[:1].repeat(300, 1), y))


def test_samples_in_any_order():
    x, y = pair(600, 12, 9)
    order = torch.randperm(600)
    for call in SCALARS.values():
        close(call(ours, x[order], y[order]), call(ours, x, y))


def test_autocast_changes_nothing():
    x, y = (t.float() for t in pair(200, 7, 5))
    expected = {name: call(ours, x, y) for name, call in SCALARS.items()}
    with torch.autocast("cpu", torch.bfloat16):
        for name, call in SCALARS.items():
            assert_same(call(ours, x, y), expected[name], name)


def test_parameters_under_no_grad_and_in_inference_mode():
    x, y = pair(200, 7, 5)
    tracked = torch.nn.Parameter(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for call in SCALARS.values():
                close(call(ours, tracked, y), call(ours, x, y))


# ---- facts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dx", "dy"), [(4, 4), (4, 9), (9, 4), (1, 6)])
def test_planted_correlations_are_found(dx, dy):
    """Through any invertible maps, shifts and scales."""
    k = min(dx, dy)
    rho = [1.0, 0.9, 0.9, 0.0][:k]
    x, y = planted(300, rho, dx, dy)
    result = cca(3e3 * x @ randn(dx, dx) + randn(dx), 1e-5 * y @ randn(dy, dy, seed=1) - 1e-5)
    torch.testing.assert_close(result.rho, torch.tensor(rho, dtype=F64), rtol=0, atol=1e-10)
    close(result.mean, sum(rho) / k, 1e-10)
    close(result.r2, sum(r * r for r in rho) / k, 1e-10)
    assert (result.rank_x, result.rank_y, result.n) == (dx, dy, 300)
    assert result.rho.max() <= 1


def test_one_neuron_is_pearson_and_multiple_correlation():
    x, y = pair(100, 1, 6)
    close(cca(x, y[:, :1]).rho[0], abs(np.corrcoef(x[:, 0].numpy(), y[:, 0].numpy())[0, 1]))
    design = np.column_stack([np.ones(100), y.numpy()])
    left = np.linalg.lstsq(design, x[:, 0].numpy(), rcond=None)[1][0]
    close(cca(x, y).r2, 1 - left / ((x - x.mean()) ** 2).sum().item())


@pytest.mark.parametrize("shape", [(300, 8, 5), (500, 3, 50)], ids=str)
def test_correlations_are_cosines_of_principal_angles(shape):
    x, y = pair(*shape)
    angles = scipy.linalg.subspace_angles((x - x.mean(0)).numpy(), (y - y.mean(0)).numpy())
    close(cca(x, y).rho, np.sort(np.cos(angles))[::-1].copy())


def test_procrustes_is_scipys():
    x, y = pair(100, 6, 6)
    disparity = scipy.spatial.procrustes(x.numpy(), y.numpy())[2]
    close(procrustes(x, y).square(), 1 - disparity)


def test_pwcca_of_planted_correlations():
    """Neurons that are the canonical variates, times a length: these are the weights."""
    rho, lengths = [0.95, 0.6, 0.3], torch.tensor([1.0, 5.0, 2.0], dtype=F64)
    x, y = planted(200, rho, 3, 4)
    close(pwcca(x * lengths + 7, y @ randn(4, 4)), (0.95 * 1 + 0.6 * 5 + 0.3 * 2) / 8, 1e-10)
    close(pwcca(y @ randn(4, 4), x * lengths, weights="y"), (0.95 * 1 + 0.6 * 5 + 0.3 * 2) / 8, 1e-10)


@every_scalar
def test_same_layer_is_1(name):
    x, _ = pair(200, 7, 5)
    for other in (x, x.clone()):
        result = SCALARS[name](ours, x, other)
        close(result, 1.0)
        assert result <= 1 + 1e-15
    result = cca(x, x)
    assert result.rank_x == result.rank_y == 7 and result.kappa_x == result.kappa_y


@every_scalar
@pytest.mark.parametrize("scale", [1e-60, 1e-3, -3.0, 1e60])
def test_scale_and_shift_change_nothing(name, scale):
    x, y = pair(200, 7, 5)
    close(SCALARS[name](ours, x * scale + 10 * abs(scale), y - 100), SCALARS[name](ours, x, y), 1e-11)


@pytest.mark.parametrize("name", ["svcca", "cka", "cka unbiased", "cka rbf", "procrustes", "rv"])
def test_rotations_change_nothing(name):
    x, y = pair(200, 7, 5)
    close(SCALARS[name](ours, x @ rotation(7), y @ rotation(5)), SCALARS[name](ours, x, y), 1e-11)


@pytest.mark.parametrize("name", [name for name in SCALARS if not name.startswith("pwcca")])
def test_symmetric(name):
    x, y = pair(200, 7, 5)
    close(SCALARS[name](ours, y, x), SCALARS[name](ours, x, y))


def test_pwcca_of_shared_neurons_is_the_same_in_any_basis():
    """Of tied correlations the variates are any rotation of each other."""
    x = randn(2000, 16) * torch.logspace(0, -1, 16, dtype=F64)
    x[:, 3] += 2 * x[:, 0]
    y = torch.cat([x[:, :6], randn(2000, 10)], 1)
    expected = pwcca(x, y)
    order, rows = torch.randperm(16), torch.randperm(2000)
    for a, b in ((x, y @ randn(16, 16)), (x[:, order], y), (x[rows], y[rows]), (-3 * x + 1, y)):
        close(pwcca(a, b), expected, 1e-9)
        close(pwcca(b, a, weights="y"), expected, 1e-9)
    close(reference.pwcca(x, y @ randn(16, 16)), expected, 1e-9)
    close(pwcca(x, x @ randn(16, 16)), 1.0, 1e-9)
    halves = [ff.StreamingCCA().update({"x": x[part], "y": y[part]}) for part in (slice(700), slice(700, None))]
    close(halves[0].merge(halves[1]).compute("pwcca").matrix[0, 1], expected, 1e-9)


def test_pwcca_of_tied_correlations_has_a_gradient():
    """That of their sum, which is smooth: it is the same whichever variates were found."""
    x = randn(60, 4)
    y = torch.cat([x[:, :3] @ randn(3, 3), randn(60, 2)], 1)
    gradients = []
    for mixed in (y, y @ randn(5, 5)):
        given = x.clone().requires_grad_()
        pwcca(given, mixed).backward()
        gradients.append(given.grad)
    close(gradients[0], gradients[1], 1e-8)


def test_pwcca_is_symmetric_in_its_weights():
    x, y = pair(200, 7, 5)
    close(pwcca(x, y, weights="x"), pwcca(y, x, weights="y"))
    assert abs(pwcca(x, y) - pwcca(y, x)) > 1e-3


@pytest.mark.parametrize("shape", [(200, 7, 5), (20, 50, 3), (20, 3, 50), (20, 50, 70)], ids=str)
def test_rv_is_linear_cka(shape):
    x, y = pair(*shape)
    close(rv(x, y), cka(x, y))
    assert 0 < rv(x, y) < 1


def test_float_is_the_mean():
    x, y = pair(200, 7, 5)
    for result in (cca(x, y), svcca(x, y)):
        assert isinstance(result, CCAResult)
        assert float(result) == float(result.mean) == pytest.approx(float(result.rho.mean()))
        assert isinstance(result.rank_x, int) and isinstance(result.n, int) and isinstance(result.kappa_x, float)
        assert (result.rho.diff() <= 0).all()


# ---- accuracy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 10.0, 1e4])
@pytest.mark.parametrize("kappa", [1e1, 1e2, 1e3, 1e4])
def test_high_precision_is_that_of_qr(kappa, mean):
    """Within 1e-9 of QR in float64 up to a condition of 1e4, whatever the mean (in standard deviations); in float32 too."""
    n, rho = 520, [0.99, 0.8, 0.5, 0.2, 0.1, 0.0]
    x, y = planted(n, rho, 6, 8)
    x, y = conditioned(x, kappa) * n**0.5, conditioned(y, kappa, 1) * n**0.5
    x, y = x + mean * x.std(0), y - mean * y.std(0)
    for a, b in [(x, y), (x.float(), y.float())]:
        result, exact = cca(a, b), reference.cca(a, b)
        assert result.rank_x == exact.rank_x == 6 and result.rank_y == exact.rank_y == 8
        torch.testing.assert_close(result.rho, exact.rho, rtol=0, atol=1e-9)
        assert result.kappa_x == pytest.approx(exact.kappa_x, rel=1e-6)
        assert a.dtype == torch.float32 or result.kappa_x == pytest.approx(kappa, rel=1e-4)
        close(pwcca(a, b), reference.pwcca(a, b), 1e-9)
        for name in ("svcca", "cka", "cka unbiased", "procrustes", "rv"):
            close(SCALARS[name](ours, a, b), SCALARS[name](reference, a, b), 1e-9)


@pytest.mark.parametrize("sides", ["x", "y", "both"])
@pytest.mark.parametrize(("kappa", "bound"), [(1e4, 1e-9), (1e6, 1e-6)])
@pytest.mark.parametrize("order", [1, -1])
def test_planted_correlations_of_ill_conditioned_layers(sides, kappa, bound, order):
    """The faintest directions are the ones that correlate most, or least."""
    rho = torch.tensor([0.9, 0.7, 0.4, 0.1, 0.0], dtype=F64)
    x, y = (t if order > 0 else t.flip(1) for t in planted(1000, rho.tolist(), 5, 5))
    x = conditioned(x, kappa if sides in {"x", "both"} else 1.0)
    y = conditioned(y, kappa if sides in {"y", "both"} else 1.0, 1)
    torch.testing.assert_close(cca(x, y).rho, rho, rtol=0, atol=bound)
    close(pwcca(x, y), reference.pwcca(x, y), bound)


@pytest.mark.parametrize("name", ["cka", "cka unbiased", "cka rbf", "procrustes", "rv"])
def test_means_far_from_zero(name):
    """So far that 16 digits hold none of the squares."""
    x, y = pair(200, 7, 5)
    far_x, far_y = x + 1e8, y - 1e8
    close(SCALARS[name](ours, far_x, far_y), SCALARS[name](ours, far_x - 1e8, far_y + 1e8), 1e-11)


# ---- precision="fast" ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_fast_is_near_where_the_condition_allows(dtype, mean):
    x, y = (t.to(dtype) for t in pair(5000, 20, 30))
    x, y = x + mean, y - mean
    fast, exact = cca(x, y, precision="fast"), reference.cca(x, y)
    assert (fast.rank_x, fast.rank_y) == (20, 30)
    assert fast.rho.dtype == F64
    torch.testing.assert_close(fast.rho, exact.rho, rtol=0, atol=1e-5)
    close(fast.mean, exact.mean, 1e-6)
    assert fast.kappa_x == pytest.approx(exact.kappa_x, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [2.0**power for power in (-110, -80, -60, -50, 50, 60, 70, 120)])
def test_fast_of_any_scale(scale, dtype):
    """Also where squares leave the range of float32: those are computed in float64."""
    x, y = (t.to(dtype) for t in pair(2000, 20, 30))
    for a, b in ((x * scale, y), (x, y * scale), (x * scale, y * scale), (x * scale, y / scale)):
        torch.testing.assert_close(cca(a, b, precision="fast").rho, cca(x, y).rho, rtol=0, atol=1e-5)


def test_fast_computes_in_float32():
    """And so is worth its warning: the two precisions differ."""
    x, y = (t.float() for t in pair(5000, 20, 30))
    assert 1e-12 < (cca(x, y, precision="fast").rho - cca(x, y).rho).abs().max() < 1e-5


@pytest.mark.parametrize("side", ["x", "y"])
def test_fast_warns_with_the_condition(side):
    good, bad = orthonormal(3000, 8), conditioned(orthonormal(3000, 8, 1), 240)
    with pytest.warns(UserWarning, match="condition") as caught:
        result = cca(*((bad, good) if side == "x" else (good, bad)), precision="fast")
    (warning,) = caught
    assert str(warning.message) == (
        f"cca: {side} has a condition number of 240; precision='fast' is meant for up to 100, and errors grow with its square; "
        "use precision='high' (see docs/cca.md#precision)"
    )
    assert warning.filename == __file__
    assert (result.kappa_x if side == "x" else result.kappa_y) == pytest.approx(240, rel=1e-2)
    cca(bad, good)  # high: nothing to warn of
    cca(conditioned(orthonormal(3000, 8, 1), 95), good, precision="fast")


# ---- ranks ---------------------------------------------------------------------------------------------------------------


def damaged() -> dict[str, Callable[[Tensor], Tensor]]:
    """x [n, 6] of rank 6 made into layers of rank 4."""

    def changed(x: Tensor, *columns: Tensor) -> Tensor:
        return torch.cat([x[:, :4], *columns], 1)

    return {
        "constant": lambda x: changed(x, torch.full_like(x[:, :2], 0.1)),
        "constant far away": lambda x: changed(x, torch.full_like(x[:, :1], 1e5 / 3), torch.full_like(x[:, :1], -7e-9)),
        "dead": lambda x: changed(x, torch.zeros_like(x[:, :2])),
        "duplicate": lambda x: changed(x, x[:, :2]),
        "mirrored": lambda x: changed(x, 3 - 2 * x[:, 1:3]),
        "mixtures": lambda x: changed(x, x[:, :4] @ randn(4, 2)),
        "all of them": lambda x: changed(x, x[:, :1], torch.full_like(x[:, :1], 0.3), torch.zeros_like(x[:, :1])),
    }


@pytest.mark.parametrize("kind", damaged())
def test_ranks(kind):
    """Neurons that add no direction are counted out, and change nothing else."""
    x, y = pair(300, 6, 5)
    bad = damaged()[kind](x)
    for a, b in [(bad, y), (bad + 1e3, y), (bad.float(), y)]:
        result = cca(a, b)
        assert (result.rank_x, result.rank_y) == (4, 5)
        assert len(result.rho) == 4
        torch.testing.assert_close(result.rho, cca(x[:, :4], y).rho, rtol=0, atol=1e-6 if a.dtype == torch.float32 else 1e-9)
        other = cca(b, a)
        assert (other.rank_x, other.rank_y) == (5, 4)
        close(other.rho, result.rho)
    close(pwcca(bad, y), reference.pwcca(bad, y), 1e-10)
    close(pwcca(bad, y, weights="y"), pwcca(x[:, :4], y, weights="y"), 1e-10)
    same_result(svcca(bad, y), reference.svcca(bad, y))
    for name in ("cka", "cka unbiased", "cka rbf", "procrustes", "rv"):
        close(SCALARS[name](ours, bad, y), SCALARS[name](reference, bad, y))
    assert cca(bad, bad).rho.tolist() == pytest.approx([1.0] * 4)


def test_rank_of_fast_damaged_neurons():
    x, y = pair(3000, 6, 5)
    bad = torch.cat([x[:, :4], torch.full((3000, 1), 0.1), x[:, :1]], 1)
    result = cca(bad, y, precision="fast")
    assert result.rank_x == 4
    torch.testing.assert_close(result.rho, cca(x[:, :4], y).rho, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e5 / 3])
def test_constant_layer(value):
    """No direction, nothing in common."""
    x, y = torch.full((100, 3), value, dtype=F64), randn(100, 4)
    fast = partial(cca, precision="fast")
    cases = [(f, *pair) for f in (cca, fast, svcca) for pair in ((x, y, "x"), (y, x, "y"), (x, x, "x"), (x, x + 1, "x and y"))]
    for function, a, b, named in cases:
        with pytest.warns(UserWarning, match="rank 0") as caught:
            result = function(a, b)
        op = "svcca" if function is svcca else "cca"
        (told,) = caught
        assert str(told.message) == (
            f"{op}: {named} must vary, got the same value in every sample: rank 0, so that every mean is 0 whatever the other "
            "layer is; leave such a layer out (see docs/cca.md#limits)"
        )
        assert told.filename == __file__
        assert len(result.rho) == 0 and min(result.rank_x, result.rank_y) == 0
        assert result.mean == result.r2 == 0 == float(result)
        assert (result.kappa_x if a is x else result.kappa_y) == math.inf


def test_rtol():
    """Directions with at most that share of the largest one's variance go."""
    x = orthonormal(200, 4) * torch.tensor([1.0, 1e-1, 1e-2, 1e-3], dtype=F64)
    y = randn(200, 2)
    for rtol, rank, kappa in (
        (None, 4, 1e3),
        (0.0, 4, 1e3),
        (0.9e-6, 4, 1e3),
        (1.1e-6, 3, 1e2),
        (1e-3, 2, 10.0),
        (0.5, 1, 1.0),
    ):
        result = cca(x @ rotation(4), y, rtol=rtol)
        assert (result.rank_x, result.rank_y) == (rank, 2)
        assert result.kappa_x == pytest.approx(kappa, rel=1e-9)
        assert len(result.rho) == min(rank, 2)
        same_result(result, reference.cca(x @ rotation(4), y, rtol=rtol))
    # Of integers, to the last bit: variances 1 and 4, so a share of exactly a quarter goes.
    signs = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]], dtype=F64).repeat(10, 1)
    assert cca(signs, y[:40, :1], rtol=0.25).rank_x == 1
    assert cca(signs, y[:40, :1], rtol=0.24999999).rank_x == 2


# ---- svcca ---------------------------------------------------------------------------------------------------------------


def with_variances(*variances: int) -> Tensor:
    """[n, d] of orthogonal columns of mean 0 with exactly these sums of squares times a power of 2, in some order."""
    d = len(variances)
    signs = torch.from_numpy(scipy.linalg.hadamard(64)[:, 1 : d + 1].astype(float))
    return signs * torch.tensor(variances, dtype=F64).sqrt()


@pytest.mark.parametrize(
    ("variances", "variance", "rank"),
    [
        ((81, 18, 1), 0.99, 2),  # exactly 0.99
        ((1, 18, 81), 0.99, 2),
        ((81, 18, 1), math.nextafter(0.99, 1) + 1e-12, 3),
        ((81, 18, 1), 0.989, 2),
        ((81, 18, 1), 0.81, 1),
        ((81, 18, 1), 0.82, 2),
        ((81, 18, 1), 1.0, 3),
        ((4, 4, 4, 4), 0.5, 2),
        ((4, 4, 4, 4), 0.5000001, 3),
        ((4, 4, 4, 4), 0.75, 3),
        ((1, 0, 1, 0), 1.0, 2),  # never more than the rank
        ((99, 1), 0.99, 1),
        ((99, 1), 0.9901, 2),
        ((1, 1), 1e-9, 1),
    ],
)
def test_truncation_is_by_variance_and_inclusive(variances, variance, rank):
    x, y = with_variances(*variances), orthonormal(64, 1)
    result = svcca(x, y, variance=variance)
    assert result.rank_x == rank
    assert result.rank_y == 1
    largest = sorted(variances)[::-1]
    assert result.kappa_x == pytest.approx((largest[0] / largest[rank - 1]) ** 0.5)
    assert svcca(y, x, variance=variance).rank_y == rank
    assert svcca(x / 1024, y, variance=variance).rank_x == rank


def test_default_share_is_99_percent():
    x, y = with_variances(81, 18, 1), orthonormal(64, 1)
    assert svcca(x, y).rank_x == 2
    same_result(svcca(x, y), svcca(x, y, variance=0.99))


def test_svcca_is_cca_of_principal_components():
    x, y = pair(400, 12, 9)
    result = svcca(x, y, variance=0.7)
    scores = []
    for t, k in ((x, result.rank_x), (y, result.rank_y)):
        values, vectors = np.linalg.eigh(np.cov(t.numpy().T))
        assert values[-k:].sum() >= 0.7 * values.sum() > values[-k:][1:].sum()
        scores.append(t @ torch.from_numpy(vectors[:, -k:].copy()))
    expected = cca(*scores)
    close(result.rho, expected.rho, 1e-11)


def test_svcca_with_all_the_variance_is_cca():
    x, y = pair(400, 12, 9)
    same_result(svcca(x, y, variance=1.0), cca(x, y), 1e-11)


@pytest.mark.parametrize("shape", [(40, 40, 4), (40, 100, 4), (40, 3, 200), (41, 300, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_fewer_samples_than_neurons(shape, dtype):
    """Two or three directions hold the 99 %; the rest is faint."""
    n, dx, dy = shape

    def layer(d: int, seed: int) -> Tensor:
        strong = orthonormal(n, 3)[:, : min(d, 3)] + 0.3 * orthonormal(n, 3, seed)[:, : min(d, 3)]
        return (strong @ randn(strong.shape[1], d, seed=seed) + 1e-3 * randn(n, d, seed=seed + 1) + 5).to(dtype)

    x, y = layer(dx, 1), layer(dy, 2)
    result, exact = svcca(x, y), reference.svcca(x, y)
    assert result.rank_x <= 3
    same_result(result, exact, 1e-10)
    for name in ("cka", "cka unbiased", "cka rbf", "procrustes", "rv"):
        close(SCALARS[name](ours, x, y), SCALARS[name](reference, x, y), 1e-11)


def test_fewer_samples_than_neurons_keep_n_minus_1_directions():
    x, y = randn(30, 200), randn(30, 2, seed=1)
    with pytest.warns(UserWarning, match="chance"):
        result = svcca(x, y, variance=1.0)
    assert (result.rank_x, result.rank_y) == (29, 2)
    close(result.rho, torch.ones(2), 1e-9)


@pytest.mark.parametrize("name", ["svcca", "cka", "cka unbiased", "cka rbf", "procrustes", "rv"])
def test_wide_layers_take_no_square_of_their_width(name):
    x, y = pair(30, 20, 3000)
    y = y.float().requires_grad_()
    with Largest() as largest, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "svcca: n=.*chance", UserWarning)
        for other in (x, x.repeat(1, 150)):
            SCALARS[name](ours, other, y).backward()
    assert largest.numel <= 3000 * 30


# ---- cka -----------------------------------------------------------------------------------------------------------------


def textbook_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al., 2012, equation 5, term by term."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    kl = k @ l
    return (np.trace(kl) + one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ kl @ one)) / (
        n * (n - 3)
    )


@pytest.mark.parametrize("shape", [(4, 3, 2), (5, 1, 1), (37, 6, 60), (60, 100, 80), (1030, 5, 8)], ids=str)
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_unbiased_cka_is_the_textbooks(shape, shift):
    x, y = pair(*shape)
    k, l = ((t @ t.T).numpy() for t in (x, y))  # noqa: E741
    expected = textbook_hsic(k, l) / math.sqrt(textbook_hsic(k, k) * textbook_hsic(l, l))
    close(cka(x + shift, y - shift, unbiased=True), expected, 1e-10)


def test_unbiased_cka_of_independent_layers_is_around_0():
    """Where the biased one says that they are alike."""
    biased, unbiased = (
        torch.stack([cka(randn(20, 30, seed=s), randn(20, 25, seed=-s - 1), unbiased=u) for s in range(60)])
        for u in (False, True)
    )
    assert biased.min() > 0.4
    assert abs(unbiased.mean()) < 3 * unbiased.std() / 60**0.5
    assert unbiased.min() < 0 < unbiased.max()


def test_chance_level_of_r2():
    """The warning's formula: d / (n - 1) on the average."""
    d, n = 20, 200
    r2 = torch.stack([cca(randn(n, d, seed=s), randn(n, 5, seed=-s - 1)).r2 for s in range(40)])
    assert abs(r2.mean() - d / (n - 1)) < 3 * r2.std() / 40**0.5


def test_biased_cka_is_the_kernels():
    x, y = pair(50, 6, 4)
    h = np.eye(50) - 1 / 50
    k, l = (h @ (t @ t.T).numpy() @ h for t in (x, y))  # noqa: E741
    close(cka(x, y), (k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l))


@pytest.mark.parametrize("n", [2, 3, 4, 50, 300])
@pytest.mark.parametrize("sigma", [None, 0.3, 1.0, 4.0])
def test_rbf(n, sigma):
    x, y = pair(n, 6, 9)
    for unbiased in (False, True) if n >= 4 else (False,):
        options = {"kernel": "rbf", "sigma": sigma, "unbiased": unbiased}
        close(cka(x, y, **options), reference.cka(x, y, **options), 1e-11)
        close(cka(x.float() + 3, y.half(), **options), reference.cka(x.float() + 3, y.half(), **options), 1e-11)


def test_rbf_is_scipys():
    x, y = (t.numpy() for t in pair(60, 5, 3))

    def kernel(z: np.ndarray) -> np.ndarray:
        distances = scipy.spatial.distance.pdist(z)
        median = np.sort(distances)[(len(distances) - 1) // 2]  # the lower one of an even number
        return np.exp(-(scipy.spatial.distance.squareform(distances) ** 2) / (2 * (0.5 * median) ** 2))

    h = np.eye(60) - 1 / 60
    k, l = (h @ kernel(z) @ h for z in (x, y))  # noqa: E741
    close(
        cka(torch.from_numpy(x), torch.from_numpy(y), kernel="rbf", sigma=0.5),
        (k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l),
    )


def clustered(n: int) -> tuple[Tensor, Tensor]:
    """Two layers of tight clusters far apart: with duplicates, and with nothing but equal distances."""
    x, y = pair(n, 5, 4)
    corners = 100 * torch.eye(5, dtype=F64)[torch.arange(n) % 5]
    return corners + x * 10.0 ** -(torch.arange(n) % 3 * 2)[:, None], y.sign().clamp(min=0)


@pytest.mark.parametrize("n", [16, 17, 50])
@pytest.mark.parametrize(
    "layers", [lambda n: pair(n, 6, 4), lambda n: pair(n, 80, 90), clustered], ids=["plain", "wide", "clusters"]
)
def test_rbf_in_tiles(monkeypatch, n, layers):
    """What large n are computed by: tiles, and a median that is looked for in several passes."""
    x, y = layers(n)
    monkeypatch.setattr(_cca_rbf, "_DIRECT", 16)
    monkeypatch.setattr(_cca_rbf, "_TILE", 16)
    for collected in (1, 100):
        monkeypatch.setattr(_cca_rbf, "_COLLECTED", collected)
        close(cka(x, y, kernel="rbf", sigma=0.3), reference.cka(x, y, kernel="rbf", sigma=0.3), 1e-10)
    monkeypatch.setattr(_cca_rbf, "_COLLECTED", 1 << 20)
    call = SCALARS["cka rbf unbiased"]
    close(call(ours, x, y), call(reference, x, y), 1e-10)
    for ours_, exact in zip(gradients(call, ours, x, y), gradients(call, reference, x, y), strict=True):
        torch.testing.assert_close(ours_, exact, rtol=1e-7, atol=1e-9 * float(exact.abs().max()))


@pytest.mark.parametrize("guess", [None, (0.0, 1.0), (1e6, 1e9), (0.0, math.inf)], ids=str)
@pytest.mark.parametrize("tile", [150, 40])
def test_rbf_wherever_the_median_is_looked_for(monkeypatch, guess, tile):
    """Distances drawn at random guess right; a wrong guess costs time."""
    x, y = pair(150, 9, 7)
    monkeypatch.setattr(_cca_rbf, "_DIRECT", tile)
    monkeypatch.setattr(_cca_rbf, "_TILE", tile)
    if guess is None:
        monkeypatch.delattr(_cca_rbf.Distances, "_median_by_bits")
        monkeypatch.setattr(_cca_rbf, "_COLLECTED", 150 * 149 // 8)  # a quarter of all
    else:
        monkeypatch.setattr(_cca_rbf.Distances, "_bracket", lambda self: torch.tensor(guess, dtype=F64))
    close(cka(x, y, kernel="rbf"), reference.cka(x, y, kernel="rbf"), 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("more", [0, 1])
def test_rbf_around_the_size_of_one_tile(more):
    x, y = pair(_cca_rbf._DIRECT + more, 6, 4)
    close(cka(x, y, kernel="rbf"), reference.cka(x, y, kernel="rbf"), 1e-11)


def test_rbf_of_equal_distances():
    """Three of four are exactly the square root of 2, and so is the median."""
    groups = torch.eye(4, dtype=F64)[torch.arange(300) % 4]
    close(cka(groups, groups @ rotation(4), kernel="rbf"), 1.0)
    x, y = groups, groups[:, :2] + pair(300, 2, 2)[0]
    close(cka(x, y, kernel="rbf"), reference.cka(x, y, kernel="rbf"), 1e-11)


def test_rbf_takes_memory_linear_in_n():
    x, y = pair(2600, 3, 2)
    for n in (2600, 1500):
        tracked = x[:n].clone().requires_grad_()
        with Largest() as largest:
            cka(tracked, y[:n], kernel="rbf").backward()
        assert largest.numel < n * n / 2 if n > _cca_rbf._DIRECT else largest.numel >= n * n


# ---- dft_cca: more is in test_cca_dft.py ---------------------------------------------------------------------------------


def images(n: int, cx: int, cy: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Two conv layers with something in common at every frequency."""
    x, y = randn(n, cx, h, w), randn(n, cy, h, w, seed=1)
    return x, torch.einsum("ncij,dc->ndij", x, randn(cy, cx)).roll(1, 3) + y


def test_dft_of_one_pixel_is_cca():
    x, y = pair(200, 7, 5)
    close(dft_cca(x[..., None, None], y[..., None, None]), cca(x, y).mean)


def test_dft_at_one_frequency_is_numpys():
    x, y = images(60, 3, 2, 4, 6)
    u, v = (np.fft.fft2((t - t.mean(0)).numpy())[:, :, 1, 4] for t in (x, y))
    close(dft_cca(x, y, reduce=None)[1, 4], np.cos(scipy.linalg.subspace_angles(u, v)).mean(), 1e-11)


def test_dft_loses_no_faint_frequency():
    """A filter that takes all but a 1e-5th of most of them changes nothing."""
    x, y = images(60, 3, 2, 4, 4)
    strength = torch.logspace(0, -5, 16, dtype=F64).reshape(4, 4)
    strength = (strength + strength.flip(0, 1).roll((1, 1), (0, 1))) / 2
    filtered = torch.fft.ifft2(torch.fft.fft2(x) * strength).real
    close(dft_cca(filtered, y, reduce=None), dft_cca(x, y, reduce=None), 1e-9)


# ---- gradients -----------------------------------------------------------------------------------------------------------


def gradients(call: Call, of: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    tracked = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(call(of, *tracked), tracked)


@every_scalar
@pytest.mark.parametrize("shape", [(80, 5, 4), (70, 3, 7), (50, 1, 1)], ids=str)
def test_gradients_match_reference(name, shape):
    x, y = pair(*shape)
    for ours_, exact in zip(gradients(SCALARS[name], ours, x, y), gradients(SCALARS[name], reference, x, y), strict=True):
        assert exact.abs().max() > 1e-5
        torch.testing.assert_close(ours_, exact, rtol=1e-9, atol=1e-10 * float(exact.abs().max()))


def test_gradients_of_single_correlations():
    x, y = pair(80, 5, 4)
    weights = randn(4)

    def weighted(of: Any, x: Tensor, y: Tensor) -> Tensor:
        return of.cca(x, y).rho @ weights + of.svcca(x, y, variance=0.95).rho[0] * 2

    for ours_, exact in zip(gradients(weighted, ours, x, y), gradients(weighted, reference, x, y), strict=True):
        torch.testing.assert_close(ours_, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "name", ["svcca", "svcca 0.8", "cka", "cka unbiased", "cka rbf", "cka rbf unbiased", "procrustes", "rv"]
)
@pytest.mark.parametrize("shape", [(30, 30, 40), (24, 60, 3)], ids=str)
def test_gradients_of_fewer_samples_than_neurons(name, shape):
    x, y = pair(*shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "svcca: n=.*chance", UserWarning)
        found = gradients(SCALARS[name], ours, x, y)
    for ours_, exact in zip(found, gradients(SCALARS[name], reference, x, y), strict=True):
        torch.testing.assert_close(ours_, exact, rtol=1e-8, atol=1e-9 * float(exact.abs().max()))


@pytest.mark.parametrize("name", [name for name in SCALARS if not name.startswith(("pwcca", "cka rbf"))])
@pytest.mark.parametrize("shape", [(42, 4, 3), (30, 1, 3)], ids=str)
def test_gradcheck(name, shape):
    inputs = [t.requires_grad_() for t in pair(*shape)]
    assert torch.autograd.gradcheck(lambda x, y: SCALARS[name](ours, x, y), inputs, atol=1e-7, fast_mode=True)


def test_weights_of_pwcca_are_constants_in_backward():
    """Its gradient is that of the mean weighted with fixed numbers, and not its derivative."""
    x, y = pair(80, 5, 4)
    z = (x - x.mean(0)).detach()
    q, p = torch.linalg.qr(z)[0], torch.linalg.qr(y - y.mean(0))[0]
    a = ((q @ torch.linalg.svd(q.T @ p)[0][:, :4]).T @ z).abs().sum(1)
    found = gradients(lambda of, x, y: of.pwcca(x, y), ours, x, y)
    for ours_, exact in zip(found, gradients(lambda of, x, y: of.cca(x, y).rho @ a / a.sum(), ours, x, y), strict=True):
        torch.testing.assert_close(ours_, exact, rtol=1e-9, atol=1e-12)
    along = randn(80, 5, seed=9)
    slope = (pwcca(x + 1e-5 * along, y) - pwcca(x - 1e-5 * along, y)) / 2e-5
    assert abs(slope - (found[0] * along).sum()) > 1e-4


def test_bandwidth_is_a_constant_in_backward():
    """The gradient of an rbf CKA is that at a fixed bandwidth."""
    x, y = pair(42, 4, 3)
    bandwidths = [torch.pdist(t).sort().values[42 * 41 // 4].square() for t in (x, y)]

    def fixed(x: Tensor, y: Tensor) -> Tensor:
        k, l = (torch.exp(-torch.cdist(t, t).square() / (2 * b)) for t, b in zip((x, y), bandwidths, strict=True))  # noqa: E741
        return reference.hsic(k, l, False) / (reference.hsic(k, k, False) * reference.hsic(l, l, False)).sqrt()

    close(cka(x, y, kernel="rbf"), fixed(x, y))
    found = gradients(SCALARS["cka rbf"], ours, x, y)
    for ours_, exact in zip(found, gradients(lambda _, x, y: fixed(x, y), ours, x, y), strict=True):
        torch.testing.assert_close(ours_, exact, rtol=1e-9, atol=1e-12)


@every_scalar
def test_gradients_in_their_inputs_dtype_and_layout(name):
    x, y = pair(80, 5, 4)
    exact = gradients(SCALARS[name], reference, x.float(), y.half())
    found = gradients(SCALARS[name], ours, x.float(), y.half())
    for ours_, expected in zip(found, exact, strict=True):
        assert ours_.dtype == expected.dtype
        bound = 1e-6 if ours_.dtype == torch.float32 else 1e-3
        torch.testing.assert_close(ours_, expected, rtol=bound, atol=bound * float(expected.abs().max()))
    tracked = x.clone().requires_grad_()
    (through_views,) = torch.autograd.grad(SCALARS[name](ours, tracked.T.contiguous().T[:, :], y.T.contiguous().T), tracked)
    torch.testing.assert_close(through_views, gradients(SCALARS[name], ours, x, y)[0], rtol=1e-9, atol=1e-11)


@every_scalar
def test_gradient_of_one_side_alone(name):
    x, y = pair(80, 5, 4)
    both = gradients(SCALARS[name], ours, x, y)
    for i in range(2):
        args = [x.clone(), y.clone()]
        args[i].requires_grad_()
        (alone,) = torch.autograd.grad(SCALARS[name](ours, *args), args[i])
        torch.testing.assert_close(alone, both[i], rtol=1e-9, atol=1e-12)


@every_scalar
def test_gradient_of_the_same_layer_is_0(name):
    """Which is as alike as it gets; all correlations are tied there."""
    x, _ = pair(80, 5, 4)
    for gradient in gradients(SCALARS[name], ours, x, x.clone()):
        assert gradient.abs().max() < 1e-9
    tracked = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(SCALARS[name](ours, tracked, tracked), tracked)
    assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("name", [*OF_CCA, "procrustes"])
def test_gradients_at_ties(name):
    """The mean of tied correlations is smooth: finite, and the slope that is measured along a random direction."""
    x, y = planted(200, [0.7, 0.7, 0.7, 0.2], 4, 4)
    x, y = x @ rotation(4) * 14, y @ rotation(4, 1) * 14
    found = gradients(SCALARS[name], ours, x, y)
    assert all(gradient.isfinite().all() for gradient in found)
    if name in {"pwcca x", "pwcca y", "svcca 0.8"}:
        return  # a constant, or a cut between equal variances: no derivative
    along = randn(200, 4, seed=9)
    step = 1e-5
    slope = (SCALARS[name](ours, x + step * along, y) - SCALARS[name](ours, x - step * along, y)) / (2 * step)
    close((found[0] * along).sum(), slope, 1e-7)


@pytest.mark.parametrize("name", [*OF_CCA, "procrustes", "cka", "rv"])
def test_gradients_at_zero_correlations(name):
    """The subgradient of least norm, which is 0, where two layers have nothing in common."""
    signs = torch.from_numpy(scipy.linalg.hadamard(64)[:, 1:8].astype(float))
    x, y = signs[:, :3].clone(), signs[:, 3:].clone()
    assert SCALARS[name](ours, x, y).abs() < 1e-15
    for gradient in gradients(SCALARS[name], ours, x, y):
        assert gradient.abs().max() < 1e-12
    x, y = 2 * x @ rotation(3) + 0.3, y @ rotation(4) - 5  # zero up to rounding
    assert SCALARS[name](ours, x, y).abs() < 1e-14
    for gradient in gradients(SCALARS[name], ours, x, y):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("kind", damaged())
def test_gradients_of_damaged_layers_are_finite(name, kind):
    x, y = pair(120, 6, 5)
    bad = damaged()[kind](x)
    for gradient in (*gradients(SCALARS[name], ours, bad, y), *gradients(SCALARS[name], ours, bad, bad.clone())):
        assert gradient.isfinite().all()
    if kind != "all of them":
        return
    # Where the cut is a constant, what spans nothing gets no gradient.
    assert gradients(SCALARS["cca"], ours, bad, y)[0][:, 5].abs().max() < 1e-9


def test_gradient_of_a_constant_layer_is_0():
    x, y = torch.full((100, 3), 0.1, dtype=F64), randn(100, 4)
    for name in ("cca", "svcca"):
        with pytest.warns(UserWarning, match=f"^{name}: x must vary"):
            found = gradients(SCALARS[name], ours, x, y)
        for gradient in found:
            assert gradient.abs().max() == 0


@pytest.mark.parametrize("name", ["cca", "svcca 0.8", "cka", "cka rbf", "procrustes"])
def test_trains(name):
    """As a loss: a layer learns to say what the other says."""
    y = randn(100, 4)
    weight = torch.nn.Parameter(randn(4, 4, seed=4))
    noise = randn(100, 4, seed=5)
    source = y + noise * torch.tensor([0.0, 0.0, 5.0, 5.0], dtype=F64)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    history = []
    for _ in range(40):
        loss = 1 - SCALARS[name](ours, torch.tanh(source @ weight), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


@every_scalar
def test_under_torch_func(name):
    x, y = pair(80, 5, 4)
    found = torch.func.grad(lambda x, y: SCALARS[name](ours, x, y), (0, 1))(x, y)
    for ours_, expected in zip(found, gradients(SCALARS[name], ours, x, y), strict=True):
        assert_same(ours_, expected, name)


@every_scalar
@pytest.mark.parametrize("shape", [(80, 5, 4), (30, 5, 40)], ids=str)
def test_second_derivatives_are_refused(name, shape):
    if shape[0] < 40 and not name.startswith(("cka", "procrustes", "rv")):
        return
    x, y = pair(*shape)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(SCALARS[name](ours, x, y), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        gradient.square().sum().backward()


# ---- few samples ---------------------------------------------------------------------------------------------------------


def test_few_samples_warn_with_the_chance_level():
    x, y = pair(69, 7, 5)
    text = (
        "n=69 samples for 7 dimensions; independent data would reach a chance level of r2 = 0.1 (d / (n - 1)); "
        "use at least 70 samples (see docs/cca.md#few-samples)"
    )
    calls = {"cca": lambda: cca(x, y), "pwcca": lambda: pwcca(y, x), "svcca": lambda: svcca(x, y, variance=1.0)}
    for op, call in calls.items():
        with pytest.warns(UserWarning, match="chance") as caught:
            call()
        assert [str(w.message) for w in caught] == [f"{op}: {text}"]
        assert caught[0].filename == __file__
    x, y = pair(70, 7, 5)
    for call in (lambda: cca(x, y), lambda: pwcca(x, y), lambda: svcca(x, y, variance=1.0)):
        call()  # enough: warnings are errors here


def test_svcca_warns_by_the_directions_kept():
    x = torch.cat([3 * orthonormal(40, 2), 1e-3 * orthonormal(40, 28, 1)], 1)
    y = orthonormal(40, 1, 2)
    assert svcca(x, y).rank_x == 2
    with pytest.warns(
        UserWarning,
        match=r"^svcca: n=40 samples for \d+ dimensions; .* r2 = 0\.\d+ \(d / \(n - 1\)\); use at least \d+0 samples \(see .+$",
    ):
        svcca(x, y, variance=1.0)
    for call in (cka, procrustes, rv):
        call(x, y)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_one_two_three_samples(n):
    """What can be said of them is said; the rest is refused, below."""
    x, y = randn(n, 3), randn(n, 2, seed=1)
    with pytest.warns(UserWarning, match="svcca: n=.*chance" if n > 1 else "svcca: x and y must vary"):
        result = svcca(x, y, variance=1.0)
    assert (result.rank_x, result.rank_y, result.n) == (n - 1, min(n - 1, 2), n)
    close(result.rho, torch.ones(min(n - 1, 2)))
    if n == 2:
        for call in (cka, procrustes, rv):
            close(call(x, y), 1.0)
    if n == 3:
        for name in ("cka", "cka rbf", "procrustes", "rv"):
            close(SCALARS[name](ours, x, y), SCALARS[name](reference, x, y))


# ---- wrong calls ---------------------------------------------------------------------------------------------------------

X, Y = pair(100, 4, 3)
EVERY = {"cca": cca, "svcca": svcca, "pwcca": pwcca, "cka": cka, "procrustes": procrustes, "rv": rv}


def spoiled(t: Tensor) -> Tensor:
    t = t.clone()
    t[3, 1], t[50, 0], t[50, 1] = math.nan, math.inf, -math.inf
    return t


def pair_refusals(op: str) -> list[Refusal]:
    """What all measures refuse alike."""
    f = EVERY[op]
    floats, few = "float16, bfloat16, float32 or float64", "[n, d] with n and d at least 1"
    conv = "; give the samples of a conv layer as rows, or use StreamingCCA"

    def of(error: type[Exception], message: str, x: Any, y: Any) -> Refusal:
        return Refusal(error, f"{op}: {message}", lambda: f(x, y))

    return [
        *(
            of(TypeError, f"x must be {floats}, got {n}", X.to(getattr(torch, n)), Y)
            for n in ("int64", "uint8", "bool", "complex64")
        ),
        of(TypeError, f"y must be {floats}, got int32", X, Y.int()),
        of(TypeError, "x must be a Tensor, got ndarray", X.numpy(), Y),
        of(TypeError, "y must be a Tensor, got NoneType", X, None),
        of(TypeError, "x must be a dense tensor, got a sparse_coo one; convert it first", X.to_sparse(), Y),
        of(ValueError, f"x must be {few}, got shape (100,)", X[:, 0], Y),
        of(ValueError, f"y must be {few}, got shape (100, 3, 1, 1){conv}", X, Y[..., None, None]),
        of(ValueError, f"x must be {few}, got shape (100, 0)", X[:, :0], Y),
        of(ValueError, f"y must be {few}, got shape (100, 0)", X, Y[:, :0]),
        of(ValueError, f"x must be {few}, got shape (0, 4)", X[:0], Y[:0]),
        of(ValueError, "x and y must have the same samples, got shapes (100, 4) and (99, 3)", X, Y[1:]),
        of(ValueError, "x and y must have the same samples, got shapes (4, 100) and (100, 3)", X.T, Y),
        of(
            ValueError,
            "x and y must be on the same device, got cpu and meta; move one with .to()",
            X,
            torch.empty(100, 3, device="meta"),
        ),
        of(ValueError, "x must be finite, got 3 NaN or infinite values of 400", spoiled(X), Y),
        of(ValueError, "y must be finite, got 3 NaN or infinite values of 300", X, spoiled(Y).half()),
        *(
            of(
                ValueError,
                f"{name}'s largest number must lie between 1e-140 and 1e+140 in size, got {size}: its square leaves the range "
                "of float64; multiply the layer by a constant, which changes no similarity",
                *layers,
            )
            for name, size, layers in (
                ("x", "1e+160", (X.sign() * 1e160, Y)),
                ("x", "1e-160", (X.sign() * 1e-160, Y)),
                ("y", "1e+160", (X, -1e160 * Y.sign().abs())),
            )
        ),
        of(ValueError, "y must be finite, got 100 NaN or infinite values of 300", X, torch.cat([Y[:, :2], X[:, :1] / 0], 1)),
    ]


def few_refusals(op: str) -> list[Refusal]:
    f = EVERY[op]

    def of(x: Tensor, y: Tensor, n: int, d: int) -> Refusal:
        message = (
            f"{op}: n must be larger than the number of dimensions, got n={n} samples for {d} dimensions: every correlation "
            "would be 1, whatever the data; use more samples, svcca, or cka with unbiased=True"
        )
        return Refusal(ValueError, message, lambda: f(x, y))

    return [of(X[:4], Y[:4], 4, 4), of(Y[:2], X[:2], 2, 4), of(X[:1], Y[:1], 1, 4), of(X[:1, :1], Y[:1, :1], 1, 1)]


def constant_refusals(op: str) -> list[Refusal]:
    f = EVERY[op]
    why = "must vary, got the same value in every sample (0 / 0); leave such a layer out"
    flat, wide = torch.full_like(X, 0.1), torch.full((100, 300), 0.1)
    found = [
        Refusal(ValueError, f"{op}: x {why}", lambda: f(flat, Y)),
        Refusal(ValueError, f"{op}: y {why}", lambda: f(X, flat)),
    ]
    if op == "pwcca":
        return found
    return [
        *found,
        Refusal(ValueError, f"{op}: y {why}", lambda: f(X, wide)),
        Refusal(ValueError, f"{op}: x {why}", lambda: f(X[:1].expand(100, 4), wide)),
    ]


def option_refusals() -> list[Refusal]:
    share = "it is a share of the largest variance"
    kept = "it is the share kept, 0.99 keeps 99%"
    choice = "cca: precision must be one of ('high', 'fast'), got"
    alone = "all its samples are equally far from each other (0 / 0); use more samples"
    apart = (
        "must have a median distance above 0, got more than half of all pairs of samples equal: there is no bandwidth for "
        "kernel='rbf'; leave such a layer out or use kernel='linear'"
    )
    step = torch.zeros(100, 1, dtype=F64)
    step[0] = 1
    three = torch.eye(4, dtype=F64)
    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            ValueError,
            "rv: x and y are on the meta device, which holds no values to compare; pass layers with data",
            lambda: rv(X.to("meta"), Y.to("meta")),
        ),
        (TypeError, "cca: rtol must be a number, got '0'", lambda: cca(X, Y, rtol="0")),
        (TypeError, "cca: rtol must be a number, got True", lambda: cca(X, Y, rtol=True)),
        (ValueError, f"cca: rtol must lie in [0, 1), got -0.1: {share}", lambda: cca(X, Y, rtol=-0.1)),
        (ValueError, f"cca: rtol must lie in [0, 1), got 1.0: {share}", lambda: cca(X, Y, rtol=1)),
        (ValueError, f"cca: rtol must lie in [0, 1), got nan: {share}", lambda: cca(X, Y, rtol=math.nan)),
        (ValueError, f"{choice} 'low'", lambda: cca(X, Y, precision="low")),
        (TypeError, f"{choice} None", lambda: cca(X, Y, precision=None)),
        (TypeError, "svcca: variance must be a number, got None", lambda: svcca(X, Y, variance=None)),
        (ValueError, f"svcca: variance must lie in (0, 1], got 0.0: {kept}", lambda: svcca(X, Y, variance=0)),
        (ValueError, f"svcca: variance must lie in (0, 1], got 99.0: {kept}", lambda: svcca(X, Y, variance=99)),
        (ValueError, f"svcca: variance must lie in (0, 1], got nan: {kept}", lambda: svcca(X, Y, variance=math.nan)),
        (ValueError, "pwcca: weights must be one of ('x', 'y'), got 'z'", lambda: pwcca(X, Y, weights="z")),
        (TypeError, "pwcca: weights must be one of ('x', 'y'), got None", lambda: pwcca(X, Y, weights=None)),
        (ValueError, "cka: kernel must be one of ('linear', 'rbf'), got 'cosine'", lambda: cka(X, Y, kernel="cosine")),
        (TypeError, "cka: unbiased must be a bool, got 1", lambda: cka(X, Y, unbiased=1)),
        (TypeError, "cka: sigma must be a number, got '1'", lambda: cka(X, Y, kernel="rbf", sigma="1")),
        (ValueError, "cka: sigma is of kernel='rbf', got sigma=2.0 with kernel='linear'", lambda: cka(X, Y, sigma=2)),
        *(
            (
                ValueError,
                f"cka: sigma must be above 0 and finite, got {value}: it is a multiple of the median distance",
                lambda value=value: cka(X, Y, kernel="rbf", sigma=value),
            )
            for value in (0.0, -1.0, math.inf, math.nan)
        ),
        (ValueError, "cka: n must be at least 2, got n=1 samples", lambda: cka(X[:1], Y[:1])),
        (ValueError, "cka: n must be at least 2, got n=1 samples", lambda: cka(X[:1], Y[:1], kernel="rbf")),
        *(
            (
                ValueError,
                "cka: n must be at least 4 with unbiased=True, got n=3 samples",
                lambda kernel=kernel: cka(X[:3], Y[:3], unbiased=True, kernel=kernel),
            )
            for kernel in ("linear", "rbf")
        ),
        (ValueError, f"cka: x {apart}", lambda: cka(step, Y, kernel="rbf")),
        (ValueError, f"cka: y {apart}", lambda: cka(X, step.repeat(1, 200), kernel="rbf")),
        (
            ValueError,
            f"cka: x and y must have an HSIC with themselves above 0, got 0 for x: {alone}",
            lambda: cka(three, X[:4], kernel="rbf", unbiased=True),
        ),
    ]
    return [Refusal(error, message, call) for error, message, call in calls]


def mapped_refusal(op: str) -> Refusal:
    message = f"{op}: y is mapped by torch.func.vmap, which cannot follow ranks; loop over the batch"
    return Refusal(ValueError, message, lambda: torch.func.vmap(lambda y: EVERY[op](X, y))(torch.stack([Y, Y])))


REFUSALS = [
    *(mapped_refusal(op) for op in EVERY),
    *(refusal for op in EVERY for refusal in pair_refusals(op)),
    *(refusal for op in ("cca", "pwcca") for refusal in few_refusals(op)),
    *(refusal for op in ("pwcca", "cka", "procrustes", "rv") for refusal in constant_refusals(op)),
    *option_refusals(),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.message[:50])
def test_refuses_wrong_input(refusal):
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    assert f"{caught.type.__name__}: {without_page(caught.value)}" == f"{refusal.error.__name__}: {refusal.message}"


def test_every_raise_is_reached():
    import fourfold.ops.cca as module

    assert unreached_raises((), module, REFUSALS) == []
