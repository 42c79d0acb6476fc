"""The algorithm of SVCCA's reference implementation in numpy, to race against; written by us from its description.

Activations are [neurons, datapoints], as there. What it does: one joint covariance, every block divided by its layer's largest
entry, neurons of next to no variance dropped, epsilon on the diagonal, pseudo-inverses, their square roots by eigh, a full SVD.
Repaired where the reference is broken: its weights of PWCCA are the paper's, and its Fourier form runs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .harness import Absent

Array = NDArray[np.generic]


class Canonical(NamedTuple):
    """Correlations, the rotations, and the square roots of the inverse covariances."""

    rho: Array
    u: Array
    vh: Array
    root_x: Array
    root_y: Array


def follow_torch_threads() -> None:
    """From here on numpy's matrix products take as many threads as torch's."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise Absent("numpy's threads can't be set (pip install threadpoolctl)") from None
    threadpool_limits(torch.get_num_threads(), user_api="blas")


def _root_of_inverse(covariance: Array, epsilon: float) -> Array:
    damped = covariance + epsilon * np.eye(len(covariance))
    w, v = np.linalg.eigh(np.linalg.pinv(damped))
    return (v * np.sqrt(w)) @ v.conj().T


def canonical(x: Array, y: Array, epsilon: float = 0.0) -> Canonical:
    """CCA of x [dx, n] and y [dy, n]; epsilon is relative to a layer's largest covariance."""
    joint, dx = np.cov(x, y), len(x)
    xx, xy, yy = joint[:dx, :dx], joint[:dx, dx:], joint[dx:, dx:]
    largest_x, largest_y = np.abs(xx).max(), np.abs(yy).max()
    xx, xy, yy = xx / largest_x, xy / np.sqrt(largest_x * largest_y), yy / largest_y
    lively_x, lively_y = np.diagonal(xx).real >= epsilon, np.diagonal(yy).real >= epsilon
    root_x = _root_of_inverse(xx[np.ix_(lively_x, lively_x)], epsilon)
    root_y = _root_of_inverse(yy[np.ix_(lively_y, lively_y)], epsilon)
    u, rho, vh = np.linalg.svd(root_x @ (xy[np.ix_(lively_x, lively_y)] @ root_y))
    return Canonical(rho, u, vh, root_x, root_y)


def principal(x: Array, variance: float = 0.99) -> Array:
    """What its users do first for SVCCA: x in its fewest leading directions with that share of the variance, by an SVD."""
    _, s, vh = np.linalg.svd(x - x.mean(1, keepdims=True), full_matrices=False)
    share = np.cumsum(np.square(s, dtype=np.float64))
    kept = int((share / share[-1] < variance).sum()) + 1
    return s[:kept, None] * vh[:kept]


def svcca(x: Array, y: Array) -> Array:
    return canonical(principal(x), principal(y)).rho


def pwcca(x: Array, y: Array) -> Array:
    """The weighted mean of the correlations, weights over x's neurons."""
    found = canonical(x, y)
    centred = x - x.mean(1, keepdims=True, dtype=np.float64)
    variates, _ = np.linalg.qr((found.u.T @ found.root_x @ centred).T)
    weights = np.abs(variates.T @ centred.T).sum(1)[: len(found.rho)]
    return np.asarray((weights * found.rho).sum() / weights.sum())


def fourier(x: Array) -> Array:
    """Of images [n, h, w, c]."""
    return np.fft.fft2(x, axes=(1, 2))


def mean_at_locations(x: Array, y: Array) -> Array:
    """Mean correlation at each location of x [n, locations, cx] and y [n, locations, cy], which are complex."""
    return np.array([canonical(x[:, place].T, y[:, place].T).rho.mean() for place in range(x.shape[1])])
