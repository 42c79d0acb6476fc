"""compat.svcca against CCA written out independently: the reference's numbers, its keys, and each place where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fourfold as ff
import numpy as np
import pytest
import torch
from fourfold.compat import svcca
from fourfold.ops.cca import cca, pwcca
from fourfold.ops.cca_dft import dft_cca

COEFS = {"coef_x", "invsqrt_xx", "full_coef_x", "full_invsqrt_xx", "coef_y", "invsqrt_yy", "full_coef_y", "full_invsqrt_yy"}
ALWAYS = {"cca_coef1", "cca_coef2", "x_idxs", "y_idxs", "mean", "sum", "neuron_means1", "neuron_means2"}
DIRNS = {"cca_dirns1", "cca_dirns2"}


def layers(d1: int = 9, d2: int = 6, n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """[neurons, datapoints], with something in common, unequal scales and means far from 0."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(4, n))
    x, y = (random.normal(size=(d, 4)) @ common + random.normal(size=(d, n)) for d in (d1, d2))
    return (x + 20) * np.linspace(0.2, 3, d1)[:, None], (y - 5) * np.linspace(7, 1, d2)[:, None]


def basis(acts: np.ndarray) -> np.ndarray:
    """Orthonormal rows that span the centred neurons, by an SVD of the data itself."""
    _, s, vh = np.linalg.svd(acts - acts.mean(1, keepdims=True), full_matrices=False)
    return vh[s > 1e-10 * s[0]]


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.svd(basis(x) @ basis(y).conj().T, compute_uv=False)


def damped(x: np.ndarray, y: np.ndarray, epsilon: float) -> np.ndarray:
    """With epsilon of the largest covariance of each layer on its diagonal, as a generalised eigenproblem."""
    c, d = np.cov(x, y), len(x)
    xx, yy, xy = c[:d, :d], c[d:, d:], c[:d, d:]
    xx = xx + epsilon * np.abs(xx).max() * np.eye(d)
    yy = yy + epsilon * np.abs(yy).max() * np.eye(len(y))
    squares = np.linalg.eigvals(np.linalg.solve(xx, xy) @ np.linalg.solve(yy, xy.T)).real
    return np.sqrt(np.sort(squares)[::-1][: min(len(x), len(y))])


def assert_refused(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    """Word for word."""
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


# ---- get_cca_similarity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
@pytest.mark.parametrize("sizes", [(9, 6), (6, 9), (5, 5), (1, 4)], ids=str)
def test_correlations(sizes, dtype):
    x, y = (acts.astype(dtype) for acts in layers(*sizes))
    found = svcca.get_cca_similarity(x, y)
    np.testing.assert_allclose(found["cca_coef1"], correlations(x.astype(float), y.astype(float)), rtol=0, atol=1e-11)
    assert found["cca_coef1"] is found["cca_coef2"]
    assert found["cca_coef1"].dtype == np.float64
    library = cca(torch.from_numpy(x.astype(float).T), torch.from_numpy(y.astype(float).T))
    np.testing.assert_allclose(found["cca_coef1"], library.rho.numpy(), rtol=0, atol=1e-11)
    assert found["sum"] == (pytest.approx(found["cca_coef1"].sum()),) * 2


@pytest.mark.parametrize("epsilon", [1e-10, 1e-4, 1e-3])
def test_epsilon_is_relative(epsilon):
    """To the largest covariance of each layer, so that the scale of a layer does not matter."""
    x, y = layers()
    found = svcca.get_cca_similarity(x, y, epsilon=epsilon)
    np.testing.assert_allclose(found["cca_coef1"], damped(x, y, epsilon), rtol=0, atol=1e-9)
    scaled = svcca.get_cca_similarity(x * 1e-7, y * 1e5, epsilon=epsilon)
    np.testing.assert_allclose(scaled["cca_coef1"], found["cca_coef1"], rtol=0, atol=1e-9)


def test_neurons_below_epsilon_are_left_out():
    x, y = layers()
    x[[2, 5]] *= 1e-4
    found = svcca.get_cca_similarity(x, y, epsilon=1e-6, compute_dirns=True)
    kept = np.ones(9, bool)
    kept[[2, 5]] = False
    assert found["x_idxs"].tolist() == kept.tolist()
    assert found["y_idxs"].all()
    np.testing.assert_allclose(found["cca_coef1"], damped(x[kept], y, 1e-6), rtol=0, atol=1e-9)
    assert found["coef_x"].shape == found["invsqrt_xx"].shape == (7, 7)
    for full, part in (("full_coef_x", "coef_x"), ("full_invsqrt_xx", "invsqrt_xx")):
        np.testing.assert_array_equal(found[full][np.ix_(kept, kept)], found[part])
        assert not found[full][~kept].any()
        assert not found[full][:, ~kept].any()
    assert found["neuron_means1"].shape == (9, 1)


@pytest.mark.parametrize(("coefs", "dirns"), [(True, False), (True, True), (False, False), (False, True)])
def test_keys_and_shapes(coefs, dirns):
    """Also directions without coefficients."""
    x, y = layers()
    found = svcca.get_cca_similarity(x, y, compute_coefs=coefs, compute_dirns=dirns)
    assert set(found) == ALWAYS | (COEFS if coefs else set()) | (DIRNS if dirns else set())
    assert found["x_idxs"].dtype == np.bool_
    shapes = {"x": (9, 9), "y": (6, 6), "xx": (9, 9), "yy": (6, 6)}
    for key in COEFS if coefs else ():
        assert found[key].shape == shapes[key.rsplit("_", 1)[1]], key
    if dirns:
        assert found["cca_dirns1"].shape == (9, 400)
        assert found["cca_dirns2"].shape == (6, 400)
        both = svcca.get_cca_similarity(x, y, compute_dirns=True)
        np.testing.assert_array_equal(found["cca_dirns1"], both["cca_dirns1"])


def test_coefficients_and_directions():
    """The variates have the correlations; roots whiten the scaled covariance; means are added back."""
    x, y = layers()
    found = svcca.get_cca_similarity(x, y, compute_dirns=True)
    scaled = np.cov(x) / np.abs(np.cov(x)).max()
    np.testing.assert_allclose(found["invsqrt_xx"] @ scaled @ found["invsqrt_xx"], np.eye(9), rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["invsqrt_xx"], found["invsqrt_xx"].T, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["coef_x"] @ found["coef_x"].T, np.eye(9), rtol=0, atol=1e-12)
    variates = []
    for k, acts, coef, root in (("1", x, "coef_x", "invsqrt_xx"), ("2", y, "coef_y", "invsqrt_yy")):
        means = acts.mean(1, keepdims=True)
        np.testing.assert_allclose(found["neuron_means" + k], means, rtol=1e-14)
        expected = found[coef] @ found[root] @ (acts - means) + means
        np.testing.assert_allclose(found["cca_dirns" + k], expected, rtol=0, atol=1e-9)
        variates.append((found["cca_dirns" + k] - means)[:6])
    between = np.corrcoef(*variates)[:6, 6:]
    np.testing.assert_allclose(between, np.diag(found["cca_coef1"]), rtol=0, atol=1e-9)


def test_subspaces_where_correlations_are_tied():
    """Singular vectors are free there; the projector on their span is not, nor what is reconstructed from it."""
    random = np.random.default_rng(1)
    shared, rest = random.normal(size=(3, 500)), random.normal(size=(4, 500))
    shared, rest = np.split(
        np.linalg.qr((np.vstack([shared, rest]) - np.vstack([shared, rest]).mean(1, keepdims=True)).T)[0].T, [3]
    )
    x = random.normal(size=(5, 5)) @ np.vstack([shared, rest[:2]])
    y = random.normal(size=(5, 5)) @ np.vstack([shared, rest[2:]])
    found = svcca.get_cca_similarity(x, y, compute_dirns=True)
    np.testing.assert_allclose(found["cca_coef1"], [1, 1, 1, 0, 0], rtol=0, atol=1e-7)
    for k in "12":
        variates = (found["cca_dirns" + k] - found["neuron_means" + k])[:3]
        q = np.linalg.qr(variates.T)[0]
        np.testing.assert_allclose(q @ (q.T @ shared.T), shared.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.98, 1.0])
def test_threshold_of_the_mean(threshold):
    """The fewest leading correlations with that share of the sum."""
    x, y = layers()
    found = svcca.get_cca_similarity(x, y, threshold=threshold)
    rho = correlations(x, y)
    count = 6 if threshold == 1 else next(i for i in range(7) if rho[:i].sum() >= threshold * rho.sum())
    assert found["mean"] == (pytest.approx(rho[:count].mean(), abs=1e-11),) * 2
    assert found["sum"][0] == pytest.approx(rho.sum(), abs=1e-11)


def test_nothing_is_printed(capsys):
    x, y = layers()
    svcca.get_cca_similarity(x, y, verbose=True)
    svcca.robust_cca_similarity(x, y)
    assert capsys.readouterr() == ("", "")


def test_inputs_stay_as_they_are():
    x, y = layers()
    before = x.copy(), y.copy()
    for array in (x, y):
        array.flags.writeable = False
    svcca.get_cca_similarity(x, y, compute_dirns=True)
    svcca.compute_pwcca(x, y)
    svcca.get_pls_similarity(x, y)
    assert (x == before[0]).all()
    assert (y == before[1]).all()


# ---- where the reference fails -------------------------------------------------------------------------------------------


def deficient(kind: str) -> np.ndarray:
    x, _ = layers()
    if kind == "constant neuron":
        x[3] = 0.1
    elif kind == "duplicate neuron":
        x[3] = x[4]
    elif kind == "dead neuron":
        x[3] = 0
    else:
        x = np.random.default_rng(2).normal(size=(9, 5)) @ x[:5]
    return x


@pytest.mark.parametrize("epsilon", [0.0, 1e-10])
@pytest.mark.parametrize("kind", ["constant neuron", "duplicate neuron", "dead neuron", "low rank"])
def test_deficient_layers(kind, epsilon):
    """Correlations are those of the directions that there are, then zeros, in either argument."""
    x, (_, y) = deficient(kind), layers()
    rank = len(basis(x))
    expected = np.zeros(6)
    expected[: min(rank, 6)] = correlations(x, y)[: min(rank, 6)]
    for pair in ((x, y), (y, x)):
        found = svcca.get_cca_similarity(*pair, epsilon=epsilon, compute_dirns=True)
        np.testing.assert_allclose(found["cca_coef1"], expected, rtol=0, atol=1e-11 if not epsilon else 1e-7)
        assert all(np.isfinite(value).all() for value in found.values())
        if not epsilon:
            assert svcca.get_cca_similarity(*pair, threshold=1.0)["mean"][0] == pytest.approx(expected[: min(rank, 6)].mean())


@pytest.mark.parametrize("dirns", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e9 / 7])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_constant_layers_are_the_documented_zeros(value, dirns, epsilon):
    """Whatever the value: also where its mean has a rounding error."""
    _, y = layers()
    still = np.full((3, 400), value)
    for pair in ((still, y), (y, still), (still, still)):
        found = svcca.get_cca_similarity(*pair, epsilon=epsilon, compute_dirns=dirns)
        assert set(found) == {"mean", "sum", "cca_coef1", "cca_coef2", "idx1", "idx2"} | (DIRNS if dirns else set())
        assert found["mean"] == found["sum"] == (0, 0)
        assert found["cca_coef1"] == found["cca_coef2"] == found["idx1"] == found["idx2"] == 0
        assert isinstance(found["mean"][0], np.ndarray)
        if dirns:
            assert not found["cca_dirns1"].any()
            assert found["cca_dirns1"].shape == found["cca_dirns2"].shape == (1, 400)


def test_all_neurons_below_epsilon():
    x, y = layers()
    assert svcca.get_cca_similarity(x, y, epsilon=2.0)["mean"] == (0, 0)


def test_uncorrelated_layers():
    """Exactly: their mean is 0 and no 0 / 0."""
    x, y = np.array([[1.0, -1, 1, -1]]), np.array([[1.0, 1, -1, -1]])
    found = svcca.get_cca_similarity(x, y)
    assert found["mean"] == (0, 0)
    assert found["cca_coef1"].tolist() == [0]


def test_robust_cca_similarity():
    """Has its documented arguments: epsilon is epsilon, threshold is threshold, and directions are returned."""
    x, y = layers()
    for options in ({}, {"threshold": 0.5}, {"epsilon": 1e-3}, {"compute_dirns": False}):
        found = svcca.robust_cca_similarity(x, y, **options)
        expected = svcca.get_cca_similarity(x, y, **{"epsilon": 1e-6, "compute_dirns": True, **options})
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
    np.testing.assert_allclose(svcca.robust_cca_similarity(x, y)["cca_coef1"], damped(x, y, 1e-6), rtol=0, atol=1e-9)
    assert svcca.robust_cca_similarity(x, y, 0.5)["mean"] == svcca.get_cca_similarity(x, y, 1e-6, 0.5)["mean"]
    with pytest.raises(ValueError, match="robust_cca_similarity: acts1 holds 1 NaN or infinite values"):
        svcca.robust_cca_similarity(np.where(np.arange(3600).reshape(9, 400) == 7, np.nan, x), y)


# ---- compute_pwcca -------------------------------------------------------------------------------------------------------


def paper(z: np.ndarray, other: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Weighted by the neurons of z."""
    qz, qo = basis(z), basis(other)
    u, rho, _ = np.linalg.svd(qz @ qo.T, full_matrices=False)
    weights = np.abs((u.T @ qz) @ (z - z.mean(1, keepdims=True)).T).sum(1)
    weights /= weights.sum()
    return float(weights @ rho), weights, rho


@pytest.mark.parametrize("sizes", [(6, 9), (9, 6), (5, 5)], ids=str)
def test_pwcca(sizes):
    """The paper's, by the neurons of the layer that has fewer, of acts1 if they have as many."""
    x, y = layers(*sizes)
    smaller, larger = (x, y) if sizes[0] <= sizes[1] else (y, x)
    value, weights, rho = svcca.compute_pwcca(x, y)
    expected = paper(smaller, larger)
    assert value == pytest.approx(expected[0], abs=1e-11)
    np.testing.assert_allclose(weights, expected[1], rtol=0, atol=1e-9)
    np.testing.assert_allclose(rho, expected[2], rtol=0, atol=1e-11)
    library = pwcca(torch.from_numpy(smaller.T), torch.from_numpy(larger.T))
    assert value == pytest.approx(float(library), abs=1e-11)


def test_pwcca_of_deficient_layers():
    x, (_, y) = deficient("low rank"), layers()
    value, weights, rho = svcca.compute_pwcca(x, y)  # y has fewer neurons
    expected = paper(y, x)
    assert len(weights) == len(rho) == 5
    assert value == pytest.approx(expected[0], abs=1e-11)
    constant = np.full((2, 400), 0.1)
    for pair in ((constant, y), (y, constant)):
        value, weights, rho = svcca.compute_pwcca(*pair)
        assert (value, len(weights), len(rho)) == (0.0, 0, 0)


def test_pwcca_with_epsilon():
    x, y = layers(6, 9)
    value, weights, rho = svcca.compute_pwcca(x, y, epsilon=1e-3)
    np.testing.assert_allclose(rho, damped(x, y, 1e-3), rtol=0, atol=1e-9)
    assert weights.sum() == pytest.approx(1)
    assert value == pytest.approx(weights @ rho)
    assert svcca.compute_pwcca(x, y, epsilon=1e-9)[0] == pytest.approx(paper(x, y)[0], abs=1e-6)


# ---- fourier_ccas --------------------------------------------------------------------------------------------------------


def images(h: int, w: int, c: int, n: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, h, w, c)) + 30


@pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 6), (1, 1)])
def test_fourier_ccas(h, w):
    """A row a frequency, of complex CCA; the mean for all of them is DFT-CCA."""
    x, y = images(h, w, 4), 0.3 * images(h, w, 4)[..., :3] + images(h, w, 3, seed=1)
    rows = svcca.fourier_ccas(x, y)
    assert [row["location"] for row in rows] == [(i, j) for i in range(h) for j in range(w)]
    fx, fy = (np.fft.fft2(acts - acts.mean(0), axes=(1, 2)) for acts in (x, y))
    for row in rows:
        assert set(row) == ALWAYS | {"location"}
        i, j = row["location"]
        expected = correlations(fx[:, i, j].T, fy[:, i, j].T)
        np.testing.assert_allclose(row["cca_coef1"], expected, rtol=0, atol=1e-11)
    library = dft_cca(*(torch.from_numpy(acts).permute(0, 3, 1, 2) for acts in (x, y)))
    assert np.mean([row["cca_coef1"].mean() for row in rows]) == pytest.approx(float(library), abs=1e-11)


@pytest.mark.parametrize(("one", "other"), [((6, 6), (4, 4)), ((7, 5), (4, 8)), ((5, 5), (1, 1))], ids=str)
def test_fourier_ccas_of_unequal_sizes(one, other):
    """On the frequencies that both have."""
    x, y = images(*one, 3), images(*other, 2, seed=1)
    rows = svcca.fourier_ccas(x, y)
    size = [min(a, b) for a, b in zip(one, other, strict=True)]
    assert len(rows) == size[0] * size[1]
    fx, fy = (np.fft.fft2(acts - acts.mean(0), axes=(1, 2)) for acts in (x, y))
    for row in rows:
        # A negative index is a negative frequency, whatever the length.
        i, j = (int(np.fft.fftfreq(n, 1 / n)[k]) for n, k in zip(size, row["location"], strict=True))
        expected = correlations(fx[:, i, j].T, fy[:, i, j].T)
        np.testing.assert_allclose(row["cca_coef1"], expected, rtol=0, atol=1e-11)


def test_fourier_coefficients_and_directions():
    """The combinations of channels give directions with these correlations, at each frequency."""
    x, y = images(3, 3, 4), 0.5 * images(3, 3, 4)[..., :3] + images(3, 3, 3, seed=1)
    rows = svcca.fourier_ccas(x, y, return_coefs=True, compute_dirns=True)
    spectra = [np.fft.fft2(acts, axes=(1, 2)) for acts in (x, y)]
    for row in rows:
        assert set(row) == ALWAYS | COEFS | DIRNS | {"location", "neuron_coeffs1", "neuron_coeffs2"}
        variates = []
        for k, spectrum in zip("12", spectra, strict=True):
            acts = spectrum[:, row["location"][0], row["location"][1]].T
            np.testing.assert_allclose(row["neuron_means" + k], acts.mean(1, keepdims=True), rtol=0, atol=1e-10)
            variate = row["neuron_coeffs" + k] @ (acts - acts.mean(1, keepdims=True))
            np.testing.assert_allclose(row["cca_dirns" + k], variate + row["neuron_means" + k], rtol=0, atol=1e-9)
            variates.append(variate[:3] / np.linalg.norm(variate[:3], axis=1, keepdims=True))
        np.testing.assert_allclose(variates[0] @ variates[1].conj().T, np.diag(row["cca_coef1"]), rtol=0, atol=1e-9)


def test_fourier_ccas_where_nothing_varies():
    """Images that are the same in every place have a first frequency only; the rounding of others is no similarity."""
    random = np.random.default_rng(0)
    flat = np.broadcast_to(random.normal(size=(60, 1, 1, 3)), (60, 4, 4, 3))
    rows = svcca.fourier_ccas(flat, images(4, 4, 2))
    assert [float(row["mean"][0]) > 0 for row in rows] == [True] + [False] * 15
    frames = pytest.importorskip("pandas", reason="needs pandas; run: pip install pandas")
    table = frames.DataFrame(rows)
    assert len(table) == 16
    assert table["location"][5] == (1, 1)


# ---- get_pls_similarity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(6, 9), (9, 6)], ids=str)
def test_pls(sizes):
    x, y = layers(*sizes)
    found = svcca.get_pls_similarity(x, y)
    assert set(found) == {"eigenvals", "neuron_coeffs1", "neuron_coeffs2", "pls_dirns1", "pls_dirns2"}
    between = np.cov(x, y)[: sizes[0], sizes[0] :]
    np.testing.assert_allclose(found["eigenvals"], np.linalg.svd(between, compute_uv=False), rtol=1e-10)
    assert found["neuron_coeffs1"].shape == (6, sizes[0])
    assert found["neuron_coeffs2"].shape == (6, sizes[1])
    np.testing.assert_allclose(
        found["neuron_coeffs1"] @ between @ found["neuron_coeffs2"].T, np.diag(found["eigenvals"]), rtol=0, atol=1e-8
    )
    for k, acts in (("1", x), ("2", y)):
        expected = found["neuron_coeffs" + k] @ (acts - acts.mean(1, keepdims=True))
        np.testing.assert_allclose(found["pls_dirns" + k], expected, rtol=0, atol=1e-10)
    covariances = (found["pls_dirns1"] * found["pls_dirns2"]).sum(1) / 399
    np.testing.assert_allclose(covariances, found["eigenvals"], rtol=0, atol=1e-8)


# ---- refusals ------------------------------------------------------------------------------------------------------------

X, Y = layers()
BAD = X.copy()
BAD[1, 2], BAD[3, 4] = np.nan, np.inf
FEW = "every correlation would be 1; use more datapoints, or transpose it if it is the other way round"
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "NaN": (
        ValueError,
        "get_cca_similarity: acts2 holds 2 NaN or infinite values",
        lambda: svcca.get_cca_similarity(Y, BAD),
    ),
    "other datapoints": (
        ValueError,
        "get_cca_similarity: acts1 and acts2 must have the same datapoints, got (9, 400) and (6, 399)",
        lambda: svcca.get_cca_similarity(X, Y[:, 1:]),
    ),
    "few datapoints": (
        ValueError,
        f"get_cca_similarity: acts1 must have more datapoints than neurons, got n=9 for 9 in (9, 9): {FEW}",
        lambda: svcca.get_cca_similarity(X[:, :9], Y[:, :9]),
    ),
    "few datapoints for the second alone": (
        ValueError,
        f"compute_pwcca: acts2 must have more datapoints than neurons, got n=8 for 9 in (9, 8): {FEW}",
        lambda: svcca.compute_pwcca(Y[:, :8], X[:, :8]),
    ),
    "transposed": (
        ValueError,
        f"get_pls_similarity: acts1 must have more datapoints than neurons, got n=9 for 400 in (400, 9): {FEW}",
        lambda: svcca.get_pls_similarity(X.T, X.T),
    ),
    "dimensions": (
        ValueError,
        "compute_pwcca: acts1 must be [neurons, datapoints], got (9, 20, 20)",
        lambda: svcca.compute_pwcca(X.reshape(9, 20, 20), Y),
    ),
    "no neuron": (
        ValueError,
        "get_cca_similarity: acts1 must be [neurons, datapoints], got (0, 400)",
        lambda: svcca.get_cca_similarity(X[:0], Y),
    ),
    "words": (
        TypeError,
        "get_cca_similarity: acts1 must hold numbers, got object",
        lambda: svcca.get_cca_similarity(X.astype(object), Y),
    ),
    "truth values": (
        TypeError,
        "get_pls_similarity: acts2 must hold numbers, got bool",
        lambda: svcca.get_pls_similarity(X, Y > 0),
    ),
    "threshold": (
        ValueError,
        "get_cca_similarity: threshold must lie in (0, 1], got 0",
        lambda: svcca.get_cca_similarity(X, Y, threshold=0),
    ),
    "large threshold": (
        ValueError,
        "robust_cca_similarity: threshold must lie in (0, 1], got 98",
        lambda: svcca.robust_cca_similarity(X, Y, threshold=98),
    ),
    "epsilon": (
        ValueError,
        "compute_pwcca: epsilon must be at least 0, got -1e-06",
        lambda: svcca.compute_pwcca(X, Y, epsilon=-1e-6),
    ),
    "epsilon in words": (
        TypeError,
        "get_cca_similarity: epsilon must be a number, got 'small'",
        lambda: svcca.get_cca_similarity(X, Y, epsilon="small"),
    ),
    "images": (
        ValueError,
        "fourier_ccas: conv_acts1 must be [n, h, w, c], got (9, 400)",
        lambda: svcca.fourier_ccas(X, Y),
    ),
    "few images": (
        ValueError,
        f"fourier_ccas: conv_acts2 must have more datapoints than neurons, got n=3 for 4 in (3, 2, 2, 4): {FEW}",
        lambda: svcca.fourier_ccas(images(2, 2, 2, n=3), images(2, 2, 4, n=3)),
    ),
    "other images": (
        ValueError,
        "fourier_ccas: both must have the same n, got (9, 2, 2, 2) and (8, 2, 2, 2)",
        lambda: svcca.fourier_ccas(images(2, 2, 2, n=9), images(2, 2, 2, n=8)),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    assert_refused(*REFUSED[case])


def test_is_in_the_package():
    assert ff.compat.svcca is svcca
    assert all(callable(getattr(svcca, name)) for name in svcca.__all__)
