"""Similarity of two layers' activations, from the data itself: by SVD and QR, and by the n x n kernels of CKA.

x [n, d1] and y [n, d2] hold the same n samples, of any floating type; everything is computed in float64 and keeps the graph.
SVCCA: Raghu et al., 2017, arXiv 1706.05806. PWCCA: Morcos et al., 2018, arXiv 1806.05759. CKA: Kornblith et al., 2019, arXiv
1905.00414; its unbiased estimator: Song et al., 2012.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Correlations nearer to each other than this are tied.
TIED = 1e-8


class Correlations(NamedTuple):
    """Canonical correlations rho [min(rank_x, rank_y)], descending; the means of rho and rho²; what was kept of x and y.

    kappa: the largest singular value of the centred data over the smallest one kept.
    """

    rho: Tensor
    mean: Tensor
    r2: Tensor
    rank_x: int
    rank_y: int
    n: int
    kappa_x: float
    kappa_y: float


def centre(x: Tensor) -> Tensor:
    """In float64, minus the mean over samples; a constant neuron becomes exactly 0."""
    x = x.double()
    x = x - x[:1]
    return x - x.mean(0)


def kept(power: Tensor, n: int, rtol: float | None, variance: float | None) -> int:
    """How many directions: those with more than rtol of the largest variance; of these, the fewest with that share of all."""
    rank = int((power > (n * 2.0**-52 if rtol is None else rtol) * power.max()).sum()) if power.numel() else 0
    if variance is None or rank == 0:
        return rank
    # A sum of exactly this share counts, however it was rounded.
    return min(rank, int((power.cumsum(0) < variance * (1 - 1e-14) * power.sum()).sum()) + 1)


def basis(x: Tensor, rtol: float | None = None, variance: float | None = None) -> tuple[Tensor, float]:
    """An orthonormal basis [n, rank] of what is kept of the centred x, and kappa."""
    # What all of x spans doesn't depend on the directions chosen to name it: they are constants of its gradient.
    _, s, vh = torch.linalg.svd(x if variance is not None else x.detach(), full_matrices=False)
    s = s.detach()
    rank = kept(s.square(), len(x), rtol, variance)
    q, _ = torch.linalg.qr(x @ vh[:rank].mH)
    return q, float(s[0] / s[rank - 1]) if rank else math.inf


def correlations(x: Tensor, y: Tensor, rtol: float | None = None, variance: float | None = None) -> Correlations:
    """Of centred x and y: singular values of the product of their bases."""
    (qx, kappa_x), (qy, kappa_y) = basis(x, rtol, variance), basis(y, rtol, variance)
    rho = torch.linalg.svdvals(qx.mH @ qy)
    count = max(1, len(rho))
    return Correlations(rho, rho.sum() / count, rho.square().sum() / count, qx.shape[1], qy.shape[1], len(x), kappa_x, kappa_y)


# ---- the measures ----------------------------------------------------------------------------------------------------------


def cca(x: Tensor, y: Tensor, *, rtol: float | None = None) -> Correlations:
    """Canonical correlations of x and y."""
    return correlations(centre(x), centre(y), rtol)


def svcca(x: Tensor, y: Tensor, *, variance: float = 0.99) -> Correlations:
    """The same between the fewest principal directions of x and of y that hold this share of its variance."""
    return correlations(centre(x), centre(y), None, variance)


def pwcca(x: Tensor, y: Tensor, *, weights: str = "x") -> Tensor:
    """The mean of rho, each weighted with sum_j |<its canonical variate in z, neuron j of z>|; z is x or y.

    Variates of tied correlations are the principal directions of z among them.
    """
    z, other = (centre(x), centre(y)) if weights == "x" else (centre(y), centre(x))
    qz, qo = basis(z)[0], basis(other)[0]
    u, rho, _ = torch.linalg.svd(qz.mH @ qo, full_matrices=False)
    projections = (qz @ u).mH @ z.detach()
    weight = torch.zeros_like(rho)
    tied = torch.cat([rho.new_zeros(1), (rho.detach()[:-1] - rho.detach()[1:] > TIED).cumsum(0)])
    for group in tied.unique():
        _, s, vh = torch.linalg.svd(projections[tied == group], full_matrices=False)
        weight[tied == group] = (s @ vh.abs()).sum().detach() / int((tied == group).sum())
    return (weight * rho).sum() / weight.sum()


def kernel_matrix(x: Tensor, kernel: str, sigma: float | None) -> Tensor:
    """[n, n]; rbf: exp(-distance² / 2 b²) with b = sigma * the (lower) median distance of two samples, a constant."""
    if kernel == "linear":
        return centre(x) @ centre(x).mH
    distance = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    apart = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    bandwidth = (1.0 if sigma is None else sigma) * distance.detach()[apart].median()
    return torch.exp(-(distance / bandwidth).square() / 2)


def hsic(k_x: Tensor, k_y: Tensor, unbiased: bool) -> Tensor:
    """The Hilbert-Schmidt independence criterion of two kernels, up to a factor that depends on n alone."""
    n = len(k_x)
    if not unbiased:
        h = torch.eye(n, dtype=k_x.dtype, device=k_x.device) - 1 / n
        return (h @ k_x @ h * k_y).sum()
    k_x, k_y = k_x - k_x.diag().diag(), k_y - k_y.diag().diag()
    return (k_x * k_y).sum() + k_x.sum() * k_y.sum() / ((n - 1) * (n - 2)) - 2 * (k_x.sum(0) @ k_y.sum(0)) / (n - 2)


def cka(x: Tensor, y: Tensor, *, kernel: str = "linear", unbiased: bool = False, sigma: float | None = None) -> Tensor:
    """HSIC(x, y) / sqrt(HSIC(x, x) * HSIC(y, y))."""
    k_x, k_y = kernel_matrix(x, kernel, sigma), kernel_matrix(y, kernel, sigma)
    return hsic(k_x, k_y, unbiased) / (hsic(k_x, k_x, unbiased) * hsic(k_y, k_y, unbiased)).sqrt()


def cka_matrix(layers: Mapping[Any, Tensor], other: Mapping[Any, Tensor] | None = None, *, unbiased: bool = False) -> Tensor:
    """Linear cka of every layer with every one, or every one of other, each [n, ...]; NaN where a layer is constant."""
    rows, columns = ([x.flatten(1) for x in found.values()] for found in (layers, layers if other is None else other))
    return torch.stack([torch.stack([cka(x, y, unbiased=unbiased) for y in columns]) for x in rows])


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """The nuclear norm of x'y over |x| |y|, centred: how well the best rotation and scale take one to the other."""
    x, y = centre(x), centre(y)
    return torch.linalg.svdvals(x.mH @ y).sum() / (x.norm() * y.norm())


def rv(x: Tensor, y: Tensor) -> Tensor:
    """|x'y|² / (|x'x| |y'y|), centred."""
    x, y = centre(x), centre(y)
    return (x.mH @ y).norm().square() / ((x.mH @ x).norm() * (y.mH @ y).norm())


def dft_cca(x: Tensor, y: Tensor, *, reduce: str | None = "mean") -> Tensor:
    """x [n, c1, h, w], y [n, c2, h, w]: the mean of rho at each spatial frequency, [h, w] in the order of fft2; or its mean."""
    fx, fy = (torch.fft.fft2(centre(t)).flatten(2).unbind(2) for t in (x, y))
    rho = torch.stack([correlations(a, b).mean for a, b in zip(fx, fy, strict=True)]).reshape(x.shape[2:])
    return rho.mean() if reduce == "mean" else rho
