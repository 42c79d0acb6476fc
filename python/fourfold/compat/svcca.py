"""The functions and dictionary keys of the svcca reference implementation, with the meaning that its documentation gives them.

``from fourfold.compat import svcca`` in place of ``cca_core``, ``pwcca``, ``dft_ccas`` and ``numpy_pls``. Activations are numpy
arrays [neurons, datapoints] (images [n, h, w, channels]); everything is computed in float64 or complex128. New code is better
off with :func:`fourfold.cca` and its siblings, which take [datapoints, neurons].

Where the two give numbers for the same question they agree (to rounding; singular vectors up to sign, and up to rotation where
correlations are tied). Where the reference fails or departs from its documentation:

=============================================  =====================================  ========================================
call                                           reference                              here
=============================================  =====================================  ========================================
a constant or duplicate neuron, a layer of     LinAlgError                            directions without variance have
lower rank                                                                            correlation 0, as of a pseudo-inverse
a layer all constant, or all below epsilon     ValueError of unpacking                the documented dictionary of zeros
NaN or infinity                                ValueError of unpacking                ValueError that counts them
as many neurons as datapoints in ``acts2``     LinAlgError                            ValueError, as for ``acts1``
``threshold=1.0``                              all correlations, by accident          all that are not 0
``compute_coefs=False, compute_dirns=True``    KeyError                               directions without coefficients
``robust_cca_similarity``                      threshold and epsilon change places    its documented arguments; no noise
``compute_pwcca``                              IndexError, or weights of vectors      the paper's weights: canonical variates
                                               that are no canonical variates         and neurons, both centred
``fourier_ccas``                               does not run on Python 3               a list of dictionaries, one a frequency
``fourier_ccas`` of unequal sizes              square images only                     any height and width
``get_pls_similarity``: ``pls_dirns1, 2``      centred over neurons                   centred over datapoints
=============================================  =====================================  ========================================

Nothing is printed: ``verbose`` is accepted and does nothing.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["compute_pwcca", "fourier_ccas", "get_cca_similarity", "get_pls_similarity", "robust_cca_similarity"]

Array = npt.NDArray[Any]

_EPS = 2.0**-52


# ---- CCA -------------------------------------------------------------------------------------------------------------


def get_cca_similarity(
    acts1: Any,
    acts2: Any,
    epsilon: float = 0.0,
    threshold: float = 0.98,
    compute_coefs: bool = True,
    compute_dirns: bool = False,
    verbose: bool = True,
) -> dict[str, Any]:
    """Canonical correlations of two layers (Raghu et al., 2017, arXiv 1706.05806).

    Covariances are divided by their largest entry. Neurons with a variance below epsilon after that are left out, and epsilon
    is added to the variance of the others: it is relative, and lowers correlations by up to about its own size times the
    condition number.

    Args:
        acts1: [d1, n], real or complex, n > d1.
        acts2: [d2, n].
        epsilon: at least 0.
        threshold: in (0, 1]: ``mean`` is of as many leading correlations as it takes for this share of their sum.
        compute_coefs: whether the coefficients are returned.
        compute_dirns: whether the directions are.
        verbose: does nothing.

    Returns:
        A dictionary with these entries.

        - ``cca_coef1``, ``cca_coef2``: the same correlations, descending, as many as the smaller layer has neurons left; those
          beyond the rank are 0.
        - ``mean``: twice the mean of the leading correlations (see threshold); ``sum``: twice the sum of all.
        - ``x_idxs``, ``y_idxs``: bool [d1], [d2], True for neurons that were kept.
        - ``neuron_means1``, ``neuron_means2``: [d1, 1], [d2, 1].
        - with compute_coefs: ``coef_x``, ``coef_y``, whose rows are canonical directions in the space of ``invsqrt_xx``,
          ``invsqrt_yy``, the inverse square roots of the scaled covariances; these of the neurons kept, and ``full_coef_x``,
          ``full_invsqrt_xx``, ``full_coef_y``, ``full_invsqrt_yy`` of all, with zeros for the others.
        - with compute_dirns: ``cca_dirns1`` [d1, n], which is ``full_coef_x @ full_invsqrt_xx @ (acts1 - neuron_means1) +
          neuron_means1``, and ``cca_dirns2``.

        Where no neuron is left: 0 in ``mean``, ``sum``, ``cca_coef1``, ``cca_coef2``, ``idx1`` and ``idx2``, and with
        compute_dirns zeros [1, n].

    Raises:
        TypeError: the activations are no numbers.
        ValueError: not of two dimensions or unequal n; n not above both d; NaN or infinite values; epsilon or threshold out of
            range.
    """
    op = "get_cca_similarity"
    x, y = _layers(op, acts1, acts2)
    return _similarity(_Layer.of(x), _Layer.of(y), *_checked(op, epsilon, threshold), compute_coefs, compute_dirns)


def robust_cca_similarity(
    acts1: Any, acts2: Any, threshold: float = 0.98, epsilon: float = 1e-6, compute_dirns: bool = True
) -> dict[str, Any]:
    """:func:`get_cca_similarity` with an epsilon.

    The reference adds noise and tries again where it does not converge. There is no need to: no layer makes this one fail.

    Raises:
        TypeError, ValueError: as get_cca_similarity.
    """
    op = "robust_cca_similarity"
    x, y = _layers(op, acts1, acts2)
    return _similarity(_Layer.of(x), _Layer.of(y), *_checked(op, epsilon, threshold), True, compute_dirns)


def compute_pwcca(acts1: Any, acts2: Any, epsilon: float = 0.0) -> tuple[float, Array, Array]:
    """Projection-weighted CCA (Morcos et al., 2018, arXiv 1806.05759).

    Correlation i has the weight sum_j |<h_i, z_j>|, h_i the canonical variates and z_j the neurons of acts1, or of acts2 if
    that has fewer neurons left; both centred.

    Args:
        acts1: [d1, n], n > d1.
        acts2: [d2, n].
        epsilon: as of get_cca_similarity.

    Returns:
        (the weighted mean, the weights, which sum up to 1, the correlations), both [k] with k the smaller rank. Where no neuron
        is left: (0.0, [], []).

    Raises:
        TypeError, ValueError: as get_cca_similarity.
    """
    op = "compute_pwcca"
    x, y = map(_Layer.of, _layers(op, acts1, acts2))
    epsilon, _ = _checked(op, epsilon, 1.0)
    wx, wy = _whiten(x, epsilon), _whiten(y, epsilon)
    u, rho, vh = np.linalg.svd(wx.root.conj().T @ _cross(x, y, wx, wy) @ wy.root, full_matrices=False)
    if not len(rho):
        return 0.0, rho, rho
    layer, white, directions = (x, wx, u) if wx.kept.sum() <= wy.kept.sum() else (y, wy, vh.conj().T)
    neurons = layer.centred[white.kept]
    # Already orthonormal but for epsilon; in the order of the correlations.
    variates, _ = np.linalg.qr(neurons.conj().T @ (white.root @ directions))
    weights = np.abs(neurons @ variates).sum(0)
    weights /= weights.sum()
    rho = rho.clip(max=1.0)
    return float(weights @ rho), weights, rho


# ---- convolutions ----------------------------------------------------------------------------------------------------


def fourier_ccas(
    conv_acts1: Any, conv_acts2: Any, return_coefs: bool = False, compute_dirns: bool = False, verbose: bool = False
) -> list[dict[str, Any]]:
    """CCA of two convolutional layers at each spatial frequency.

    For data whose statistics do not change under translation that is the CCA of all their neurons.

    Args:
        conv_acts1: images [n, h1, w1, c1], n > c1.
        conv_acts2: [n, h2, w2, c2]. Of unequal heights, or widths, the frequencies are compared that both layers have. A fully
            connected layer [n, 1, 1, d] is compared with the mean over the image.
        return_coefs: whether coefficients are returned.
        compute_dirns: whether directions are.
        verbose: does nothing.

    Returns:
        For each of min(h1, h2) * min(w1, w2) frequencies, row by row in the order of ``numpy.fft.fftfreq``, the dictionary of
        get_cca_similarity (complex where it holds more than correlations) and ``location``, (i, j). With return_coefs also
        ``neuron_coeffs1`` and ``neuron_coeffs2``, the combinations of channels that the directions are.
        ``pandas.DataFrame(rows)`` is the reference's table.

        Coefficients and directions stay in the frequency domain: the phase of a canonical direction is arbitrary at each
        frequency, so an inverse transform of them would be too.

    Raises:
        TypeError: the activations are no numbers.
        ValueError: not of four dimensions, unequal n, n not above both c, NaN or infinite values.
    """
    op = "fourier_ccas"
    pair = [_numbers(op, name, acts, "[n, h, w, c]") for name, acts in (("conv_acts1", conv_acts1), ("conv_acts2", conv_acts2))]
    n = len(pair[0])
    if len(pair[1]) != n:
        raise ValueError(f"{op}: both must have the same n, got {pair[0].shape} and {pair[1].shape}")
    for name, acts in zip(("conv_acts1", "conv_acts2"), pair, strict=True):
        _refuse_few(op, name, acts.shape, n, acts.shape[3])
    size = [min(pair[0].shape[axis], pair[1].shape[axis]) for axis in (1, 2)]
    layers = []
    for acts in pair:
        rows, columns = (_shared(old, new) for old, new in zip(acts.shape[1:3], size, strict=True))
        # Without its mean, which would drown the other frequencies; [h, w, c, n].
        centred, means = (np.fft.fft2(part, axes=(1, 2)).transpose(1, 2, 3, 0) for part in _centred(acts, 0))
        power = np.abs(centred).max(3, keepdims=True)
        centred[(power <= 16 * _EPS * power.max((0, 1)))[..., 0]] = 0.0  # the transform's own rounding
        layers.append((centred[rows][:, columns], means[rows][:, columns]))
    results = []
    for i in range(size[0]):
        for j in range(size[1]):
            x, y = (_Layer(centred[i, j], means[i, j]) for centred, means in layers)
            found = _similarity(x, y, 0.0, 0.98, return_coefs, compute_dirns)
            if return_coefs and "full_coef_x" in found:
                found["neuron_coeffs1"] = found["full_coef_x"] @ found["full_invsqrt_xx"]
                found["neuron_coeffs2"] = found["full_coef_y"] @ found["full_invsqrt_yy"]
            results.append({**found, "location": (i, j)})
    return results


def _shared(old: int, new: int) -> Array:
    """Where a transform of length old has the frequencies of one of length new, in that one's order."""
    frequencies = np.fft.fftfreq(old, 1 / old)
    return np.flatnonzero((frequencies >= -new / 2) & (frequencies < new / 2))


# ---- PLS -------------------------------------------------------------------------------------------------------------


def get_pls_similarity(acts1: Any, acts2: Any) -> dict[str, Any]:
    """Partial least squares of two layers: the singular value decomposition of their covariance.

    Args:
        acts1: [d1, n], n > d1.
        acts2: [d2, n].

    Returns:
        ``eigenvals``: [k], k = min(d1, d2), the covariances of the directions, descending. ``neuron_coeffs1`` [k, d1],
        ``neuron_coeffs2`` [k, d2]: the directions, of length 1. ``pls_dirns1``, ``pls_dirns2``: [k, n], the activations along
        them, less their means over the datapoints.

    Raises:
        TypeError, ValueError: as get_cca_similarity.
    """
    x, y = map(_Layer.of, _layers("get_pls_similarity", acts1, acts2))
    u, s, vh = np.linalg.svd(_covariance(x.centred, y.centred), full_matrices=False)
    coefs1, coefs2 = u.conj().T, vh
    return {
        "eigenvals": s,
        "neuron_coeffs1": coefs1,
        "neuron_coeffs2": coefs2,
        "pls_dirns1": coefs1 @ x.centred,
        "pls_dirns2": coefs2 @ y.centred,
    }


# ---- what they share -------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """Activations [d, n] less their means, and the means [d, 1]."""

    centred: Array
    means: Array

    @classmethod
    def of(cls, acts: Array) -> "_Layer":
        return cls(*_centred(acts, 1))


class _White(NamedTuple):
    """kept: which k neurons. root [k, r]: rootᴴ C root = 1 for their scaled covariance C plus epsilon, of rank r.

    root vectorsᴴ is C's inverse square root. scale: what the covariance was divided by.
    """

    kept: npt.NDArray[np.bool_]
    root: Array
    vectors: Array
    scale: float


def _centred(acts: Array, axis: int) -> tuple[Array, Array]:
    """Without the means along an axis, and these; what is constant but for the mean's rounding becomes 0."""
    means = acts.mean(axis, keepdims=True)
    centred = acts - means
    constant = np.abs(centred).max(axis, keepdims=True) <= 16 * _EPS * np.abs(means)
    return np.where(constant, 0.0, centred), means


def _numbers(op: str, name: str, acts: Any, dims: str) -> Array:
    """As float64 or complex128, of the dimensions that dims lists."""
    array = np.asarray(acts)
    if array.dtype.kind not in "fiuc":
        raise TypeError(f"{op}: {name} must hold numbers, got {array.dtype}")
    if array.ndim != dims.count(",") + 1 or 0 in array.shape:
        raise ValueError(f"{op}: {name} must be {dims}, got {array.shape}")
    array = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64, copy=False)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise ValueError(f"{op}: {name} holds {bad} NaN or infinite values")
    return array


def _layers(op: str, acts1: Any, acts2: Any) -> tuple[Array, Array]:
    x, y = (_numbers(op, name, acts, "[neurons, datapoints]") for name, acts in (("acts1", acts1), ("acts2", acts2)))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{op}: acts1 and acts2 must have the same datapoints, got {x.shape} and {y.shape}")
    for name, acts in (("acts1", x), ("acts2", y)):
        _refuse_few(op, name, acts.shape, acts.shape[1], acts.shape[0])
    return x, y


def _refuse_few(op: str, name: str, shape: tuple[int, ...], n: int, d: int) -> None:
    if n <= d:
        raise ValueError(
            f"{op}: {name} must have more datapoints than neurons, got n={n} for {d} in {shape}: every correlation would be 1; "
            "use more datapoints, or transpose it if it is the other way round"
        )


def _checked(op: str, epsilon: Any, threshold: Any) -> tuple[float, float]:
    for name, value in (("epsilon", epsilon), ("threshold", threshold)):
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not 0 <= epsilon < np.inf:
        raise ValueError(f"{op}: epsilon must be at least 0, got {epsilon}")
    if not 0 < threshold <= 1:
        raise ValueError(f"{op}: threshold must lie in (0, 1], got {threshold}")
    return float(epsilon), float(threshold)


def _covariance(x: Array, y: Array) -> Array:
    return x @ y.conj().T / (x.shape[1] - 1)


def _whiten(layer: _Layer, epsilon: float) -> _White:
    n = layer.centred.shape[1]
    covariance = _covariance(layer.centred, layer.centred)
    scale = float(np.abs(covariance).max())
    if scale > 0:
        covariance = covariance / scale
    kept = covariance.diagonal().real >= epsilon
    kept &= scale > 0
    covariance = covariance[np.ix_(kept, kept)]
    w, v = np.linalg.eigh(covariance + epsilon * np.eye(len(covariance)))
    large = w > n * _EPS * w.max(initial=0.0)
    w, v = w[large], v[:, large]
    return _White(kept, v / np.sqrt(w), v, scale)


def _cross(x: _Layer, y: _Layer, wx: _White, wy: _White) -> Array:
    """The scaled covariance of the neurons kept."""
    scale = np.sqrt(wx.scale) * np.sqrt(wy.scale)
    return _covariance(x.centred[wx.kept], y.centred[wy.kept]) / (scale or 1.0)


def _similarity(x: _Layer, y: _Layer, epsilon: float, threshold: float, coefs: bool, dirns: bool) -> dict[str, Any]:
    """The dictionary of get_cca_similarity."""
    wx, wy = _whiten(x, epsilon), _whiten(y, epsilon)
    if not wx.kept.any() or not wy.kept.any():
        return _zeros(x.centred.shape[1], dirns)
    ix, iy = (w.root @ w.vectors.conj().T for w in (wx, wy))
    u, rho, vh = np.linalg.svd(ix @ _cross(x, y, wx, wy) @ iy)
    rho = rho.clip(max=1.0)
    rho[min(wx.root.shape[1], wy.root.shape[1]) :] = 0.0  # but for rounding
    leading = rho[: _count(rho, threshold)]
    result = {
        "cca_coef1": rho,
        "cca_coef2": rho,
        "x_idxs": wx.kept,
        "y_idxs": wy.kept,
        "mean": (leading.mean(),) * 2,
        "sum": (rho.sum(),) * 2,
        "neuron_means1": x.means,
        "neuron_means2": y.means,
    }
    coef_x, coef_y = u.conj().T, vh
    full = {
        "full_coef_x": _full(coef_x, wx.kept),
        "full_invsqrt_xx": _full(ix, wx.kept),
        "full_coef_y": _full(coef_y, wy.kept),
        "full_invsqrt_yy": _full(iy, wy.kept),
    }
    if coefs:
        result |= {"coef_x": coef_x, "invsqrt_xx": ix, "coef_y": coef_y, "invsqrt_yy": iy, **full}
    if dirns:
        result["cca_dirns1"] = full["full_coef_x"] @ full["full_invsqrt_xx"] @ x.centred + x.means
        result["cca_dirns2"] = full["full_coef_y"] @ full["full_invsqrt_yy"] @ y.centred + y.means
    return result


def _count(rho: Array, threshold: float) -> int:
    """How many leading ones hold that share of the sum."""
    total = np.cumsum(rho)
    if not total[-1]:
        return len(rho)
    return int(np.argmax(total >= threshold * total[-1])) + 1


def _full(matrix: Array, kept: npt.NDArray[np.bool_]) -> Array:
    """Over all neurons, zero where one was left out."""
    result = np.zeros((len(kept), len(kept)), matrix.dtype)
    result[np.ix_(kept, kept)] = matrix
    return result


def _zeros(n: int, dirns: bool) -> dict[str, Any]:
    zero = np.asarray(0)
    result: dict[str, Any] = {
        "mean": (zero, zero),
        "sum": (zero, zero),
        "cca_coef1": zero,
        "cca_coef2": zero,
        "idx1": 0,
        "idx2": 0,
    }
    if dirns:
        result |= {"cca_dirns1": np.zeros((1, n)), "cca_dirns2": np.zeros((1, n))}
    return result
