"""Similarity of two layers whose activations are in memory.

All measures are computed in float64 from small matrices (`_cca_pair.py`) that `_similarity.py` turns into numbers, the same for
layers in memory and for those that stream by.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from . import _checks as check
from . import _similarity as similarity
from ._cca_ops import _count_nonfinite
from ._cca_pair import Scatter, inner_products_of, principal, rotated, scatter_of, whitened_scatter
from ._cca_rbf import kernel_sums

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _eager(function: _Function) -> _Function:
    """Compilers call it as it is: ranks depend on the data."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # Not around the function itself: that would load torch's compiler, and Triton's, at import.
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(_Function, call)


#: Sizes of numbers whose squares, and sums of these, are in range.
_LEAST, _MOST = 1e-140, 1e140


class _Condition:
    """A condition number that is computed when somebody asks; until then the layer's scatter matrix is kept."""

    def __init__(self, whitener: similarity.Whitener) -> None:
        self._whitener: similarity.Whitener | None = None if whitener.spectrum is not None else whitener
        self._value = whitener.kappa if whitener.spectrum is not None else math.nan

    def value(self) -> float:
        if self._whitener is not None:
            self._value, self._whitener = self._whitener.kappa, None
        return self._value


@dataclass(frozen=True, eq=False, repr=False)
class CCAResult:
    """Canonical correlations of two layers; ``float(result)`` is their mean.

    Attributes:
        rho: the correlations, float64 [min(rank_x, rank_y)], descending.
        mean: the mean of rho, a scalar tensor; 0 where a layer is constant.
        r2: the mean of rho squared.
        rank_x: how many directions of x were kept.
        rank_y: how many of y.
        n: the number of samples.
    """

    rho: Tensor
    mean: Tensor
    r2: Tensor
    rank_x: int
    rank_y: int
    n: int
    _condition_x: _Condition = field(repr=False)
    _condition_y: _Condition = field(repr=False)

    @property
    def kappa_x(self) -> float:
        """The largest singular value of the centred x over the smallest one kept; inf if none is."""
        return self._condition_x.value()

    @property
    def kappa_y(self) -> float:
        """The same of y."""
        return self._condition_y.value()

    def __float__(self) -> float:
        return float(self.mean.detach())

    def __repr__(self) -> str:
        return (
            f"CCAResult(mean={float(self):.6g}, r2={float(self.r2.detach()):.6g}, rank_x={self.rank_x}, rank_y={self.rank_y}, "
            f"n={self.n}, kappa_x={self.kappa_x:.3g}, kappa_y={self.kappa_y:.3g})"
        )


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_pair(op: str, x: Any, y: Any, few: bool = True) -> int:
    """The number of samples of two layers; few: whether they may be as few as the neurons."""
    for name, t in (("x", x), ("y", y)):
        check.floating(op, name, t)
        if t.dim() != 2 or 0 in t.shape:
            hint = "; give the samples of a conv layer as rows, or use StreamingCCA" if t.dim() > 2 else ""
            raise ValueError(f"{op}: {name} must be [n, d] with n and d at least 1, got shape {tuple(t.shape)}{hint}")
        if torch._C._functorch.is_batchedtensor(t):
            raise ValueError(f"{op}: {name} is mapped by torch.func.vmap, which cannot follow ranks; loop over the batch")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"{op}: x and y must have the same samples, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if x.device != y.device:
        raise ValueError(f"{op}: x and y must be on the same device, got {x.device} and {y.device}; move one with .to()")
    if x.is_meta:
        raise ValueError(f"{op}: x and y are on the meta device, which holds no values to compare; pass layers with data")
    n, d = x.shape[0], max(x.shape[1], y.shape[1])
    if not few:
        similarity.refuse_few(op, n, d)
    for name, t in (("x", x),) if x is y else (("x", x), ("y", y)):
        bad = int(_count_nonfinite(t.detach()))
        if bad:
            raise ValueError(f"{op}: {name} must be finite, got {bad} NaN or infinite values of {t.numel()}")
        if t.dtype == torch.float64:  # of the other types no square leaves the range
            size = max(abs(float(end)) for end in t.detach().aminmax())
            if not (size == 0 or _LEAST <= size <= _MOST):
                raise ValueError(
                    f"{op}: {name}'s largest number must lie between {_LEAST} and {_MOST} in size, got {size:.3g}: its square "
                    "leaves the range of float64; multiply the layer by a constant, which changes no similarity"
                )
    return n


def _refuse_constant(op: str, xx: Tensor, yy: Tensor) -> None:
    for name, c in (("x", xx), ("y", yy)):
        if not bool(similarity.power(c) > 0):
            similarity.refuse_constant(op, name)


# ---- canonical correlations ------------------------------------------------------------------------------------------


def _refined(
    x: Tensor, y: Tensor, pair: Scatter, wx: similarity.Whitener, wy: similarity.Whitener
) -> tuple[similarity.Whitener, similarity.Whitener, Tensor | None]:
    """Whiteners and the whitened cross scatter, from a second look at data whose condition asks for it.

    As in Cholesky QR with one repetition: the error grows with the condition number, no longer with its square.
    """
    if wx is wy or not similarity.ill_conditioned(wx, wy):
        return wx, wy, None
    n = x.shape[0]
    xx, xy, yy = whitened_scatter(x, y, pair, wx.root, wy.root)
    # Nothing is dropped here: the ranks are settled.
    tx, ty = (similarity.whiten(c, n, rtol=0.0).root for c in (xx, yy))
    wx, wy = (replace(w, root=w.root @ t) for w, t in ((wx, tx), (wy, ty)))
    return wx, wy, tx.mT @ xy @ ty


def _result(op: str, rho: Tensor, wx: similarity.Whitener, wy: similarity.Whitener, n: int) -> CCAResult:
    same = wx is wy
    similarity.warn_rankless(op, [name for name, w in (("x", wx), ("y", wy))[: 1 if same else 2] if not w.rank])
    x = _Condition(wx)
    y = x if same else _Condition(wy)
    mean, r2 = similarity.mean_rho(rho, wx, wy), similarity.mean_r2(rho, wx, wy)
    return CCAResult(rho, mean, r2, wx.rank, wy.rank, n, x, y)


def _compared(op: str, x: Tensor, y: Tensor, pair: Scatter, wx: similarity.Whitener, wy: similarity.Whitener) -> CCAResult:
    better_x, better_y, whitened = _refined(x, y, pair, wx, wy)
    rho = similarity.correlations(pair.xx, pair.xy, pair.yy, better_x, better_y, whitened)
    return _result(op, rho, wx, wy, x.shape[0])


def _whiteners(pair: Scatter, n: int, **options: Any) -> tuple[similarity.Whitener, similarity.Whitener]:
    wx = similarity.whiten(pair.xx, n, **options)
    return wx, wx if pair.yy is pair.xx else similarity.whiten(pair.yy, n, **options)


@_eager
def cca(x: Tensor, y: Tensor, *, rtol: float | None = None, precision: Literal["high", "fast"] = "high") -> CCAResult:
    """Canonical correlations of two layers.

    Invariant to every invertible linear map of the neurons of either layer. Constant, duplicate and otherwise dependent neurons
    add no direction: they are left out of the rank.

    Args:
        x: activations, float [n, dx], samples first, of any strides.
        y: those of the other layer on the same samples, float [n, dy]; the dtypes may differ.
        rtol: directions with a variance of at most rtol times the largest are dropped; n * 2⁻⁵² if None.
        precision: "high" computes in float64 whatever comes in. "fast" multiplies blocks in float32, 16-bit inputs as they are,
            and adds these up in float64: enough where the condition numbers are at most 100, else it warns. Where squares
            leave the range of float32 it is "high".

    Returns:
        A :class:`CCAResult`. Its mean, r2 and rho are differentiable with the ranks held fixed; gradients are finite also where
        correlations are tied or zero.

    Raises:
        TypeError: if an input is not a floating tensor, or an option has the wrong type.
        ValueError: for shapes that do not match, NaN or infinite values, and n <= max(dx, dy), where every correlation is 1.

    Warns where n < 10 max(dx, dy), with the level that independent data would reach; and names a constant layer, whose rank is
    0, so that mean and r2 are 0.
    """
    op = "cca"
    rtol = similarity.check_rtol(op, rtol)
    check.one_of(op, "precision", precision, ("high", "fast"))
    n = _check_pair(op, x, y, few=False)
    similarity.warn_chance(op, n, max(x.shape[1], y.shape[1]))
    pair = scatter_of(x, y, precision=precision)
    wx, wy = _whiteners(pair, n, rtol=rtol, precision=precision)
    if precision == "high":
        return _compared(op, x, y, pair, wx, wy)
    for name, w in (("x", wx),) if wx is wy else (("x", wx), ("y", wy)):
        similarity.warn_condition(op, name, w)
    return _result(op, similarity.correlations(pair.xx, pair.xy, pair.yy, wx, wy), wx, wy, n)


@_eager
def svcca(x: Tensor, y: Tensor, *, variance: float = 0.99) -> CCAResult:
    """Canonical correlations of the leading principal directions of two layers (SVCCA; Raghu et al., 2017, arXiv 1706.05806).

    Each layer is centred and cut to the fewest of its principal directions that hold this share of its variance (the sum of
    their squared singular values, inclusive).

    Args:
        x: activations, float [n, dx], samples first, of any strides; n may be smaller than dx.
        y: those of the other layer on the same samples, float [n, dy]; the dtypes may differ.
        variance: the share to keep, in (0, 1].

    Returns:
        A :class:`CCAResult`, whose ranks are the directions kept. Differentiable with the ranks held fixed, the directions
        moving; gradients are finite also where correlations are tied or zero.

    Raises:
        TypeError: if an input is not a floating tensor, or variance is no number.
        ValueError: for shapes that do not match, NaN or infinite values, and a share out of range.

    Warns where n is less than ten times the directions kept, with the level that independent data would reach; and names a
    constant layer, whose rank is 0, so that mean and r2 are 0.
    """
    op = "svcca"
    variance = similarity.check_variance(op, variance)
    n = _check_pair(op, x, y)
    few = [principal(t) if n <= t.shape[1] else t for t in ((x,) if x is y else (x, y))]
    pair = scatter_of(few[0], few[-1])
    wx, wy = _whiteners(pair, n, variance=variance)
    similarity.warn_chance(op, n, max(wx.rank, wy.rank))
    return _compared(op, few[0], few[-1], pair, wx, wy)


@_eager
def pwcca(x: Tensor, y: Tensor, *, weights: Literal["x", "y"] = "x") -> Tensor:
    """Projection-weighted CCA (Morcos et al., 2018, arXiv 1806.05759).

    The mean of the canonical correlations rho_i, each weighted with sum_j abs(<h_i, z_j>), where the h_i are the canonical
    variates, of length 1, and the z_j the centred neurons of one layer. Where correlations are tied, as those of neurons that
    both layers share, the variates are not unique: then they are the principal directions of the z_j among them.

    Args:
        x: activations, float [n, dx], samples first, of any strides.
        y: those of the other layer on the same samples, float [n, dy]; the dtypes may differ.
        weights: the layer over whose neurons is summed, "x" or "y".

    Returns:
        A float64 scalar. Differentiable in the correlations; the weights are constants in backward.

    Raises:
        TypeError: if an input is not a floating tensor.
        ValueError: for shapes that do not match, NaN or infinite values, a constant layer, and n <= max(dx, dy), where every
            correlation is 1.

    Warns where n < 10 max(dx, dy), with the level that independent data would reach.
    """
    op = "pwcca"
    check.one_of(op, "weights", weights, ("x", "y"))
    n = _check_pair(op, x, y, few=False)
    similarity.warn_chance(op, n, max(x.shape[1], y.shape[1]))
    pair = scatter_of(x, y)
    _refuse_constant(op, pair.xx, pair.yy)
    wx, wy, whitened = _refined(x, y, pair, *_whiteners(pair, n))
    return similarity.projection_weighted(pair.xx, pair.xy, pair.yy, wx, wy, whitened, weights=weights)


# ---- inner products --------------------------------------------------------------------------------------------------


def _linear(op: str, x: Tensor, y: Tensor, unbiased: bool) -> Tensor:
    """CKA with linear kernels, from whichever matrices are smaller."""
    n = x.shape[0]
    if n < x.shape[1] + (0 if x is y else y.shape[1]):
        xx = inner_products_of(x)
        yy = xx if x is y else inner_products_of(y)
        _refuse_constant(op, xx, yy)
        # Of any size of numbers the squares are in range.
        xx, yy = (c / similarity.power(c).detach() for c in (xx, yy))
        products = [(xx * yy).sum(), (xx * xx).sum(), (yy * yy).sum()]
        k, l = xx.diagonal(), yy.diagonal()  # noqa: E741
    else:
        pair = scatter_of(x, y, norms=unbiased)
        _refuse_constant(op, pair.xx, pair.yy)
        ux, uy = (similarity.power(c).detach().sqrt() for c in (pair.xx, pair.yy))
        products = [(pair.xy / ux / uy).square().sum(), (pair.xx / ux / ux).square().sum(), (pair.yy / uy / uy).square().sum()]
        k, l = pair.k / ux / ux, pair.l / uy / uy  # noqa: E741
    if unbiased:
        # Of centred samples, whose sums are 0.
        own = n / (n - 2)
        totals = 1 / ((n - 1) * (n - 2))
        products = [
            s - own * (a * b).sum() + totals * a.sum() * b.sum()
            for s, (a, b) in zip(products, ((k, l), (k, k), (l, l)), strict=True)
        ]
    return _quotient(op, *products)


def _quotient(op: str, xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    for name, own in (("x", xx), ("y", yy)):
        if not bool(own > 0):
            raise ValueError(
                f"{op}: x and y must have an HSIC with themselves above 0, got {float(own.detach()):.3g} for {name}: all its "
                "samples are equally far from each other (0 / 0); use more samples"
            )
    return similarity.unbiased_cka(xy, xx, yy)


def _rbf(op: str, x: Tensor, y: Tensor, unbiased: bool, sigma: float) -> Tensor:
    n = x.shape[0]

    def undefined(name: str) -> None:
        raise ValueError(
            f"{op}: {name} must have a median distance above 0, got more than half of all pairs of samples equal: there is no "
            "bandwidth for kernel='rbf'; leave such a layer out or use kernel='linear'"
        )

    kk, kl, ll, k, l = kernel_sums(x, y, sigma, undefined)  # noqa: E741

    def hsic(products: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if unbiased:
            return products + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a @ b)
        return products + a.sum() * b.sum() / (n * n) - 2 / n * (a @ b)

    return _quotient(op, hsic(kl, k, l), hsic(kk, k, k), hsic(ll, l, l))


@_eager
def cka(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Literal["linear", "rbf"] = "linear",
    unbiased: bool = False,
    sigma: float | None = None,
) -> Tensor:
    """Centred kernel alignment of two layers (Kornblith et al., 2019, arXiv 1905.00414).

    HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)): 1 for layers that are the same but for rotation, shift and one scale. The biased
    estimate is far above 0 for independent layers where n is not much larger than d.

    Args:
        x: activations, float [n, dx], samples first, of any strides; n may be smaller than dx.
        y: those of the other layer on the same samples, float [n, dy]; the dtypes may differ.
        kernel: "linear", or "rbf": exp(-distance² / (2 b²)). The latter works in tiles of the n x n kernel: time grows with n²,
            memory with n.
        unbiased: the unbiased estimate of HSIC (Song et al., 2012), which can be below 0; needs n >= 4.
        sigma: of "rbf": the bandwidth b as a multiple of each layer's median distance of two samples (of an
            even number of distances the lower of the two in the middle); 1 if None.

    Returns:
        A float64 scalar. Differentiable; the bandwidth counts as a constant.

    Raises:
        TypeError: if an input is not a floating tensor, or an option has the wrong type.
        ValueError: for shapes that do not match, NaN or infinite values, a constant layer, and too few samples.
    """
    op = "cka"
    check.one_of(op, "kernel", kernel, ("linear", "rbf"))
    if not isinstance(unbiased, bool):
        raise TypeError(f"{op}: unbiased must be a bool, got {unbiased!r}")
    if sigma is not None:
        sigma = similarity.number(op, "sigma", sigma)
        if kernel == "linear":
            raise ValueError(f"{op}: sigma is of kernel='rbf', got sigma={sigma} with kernel='linear'")
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"{op}: sigma must be above 0 and finite, got {sigma}: it is a multiple of the median distance")
    n = _check_pair(op, x, y)
    least = 4 if unbiased else 2
    if n < least:
        raise ValueError(f"{op}: n must be at least {least}{' with unbiased=True' if unbiased else ''}, got n={n} samples")
    if kernel == "linear":
        return _linear(op, x, y, unbiased)
    return _rbf(op, x, y, unbiased, 1.0 if sigma is None else sigma)


@_eager
def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """Procrustes similarity of two layers: how well the best rotation and scale take one to the other.

    The nuclear norm of xᵀy over the Frobenius norms of x and y, all centred. The squared Procrustes distance of layers of
    norm 1 is 2 - 2 times this.

    Args:
        x: activations, float [n, dx], samples first, of any strides; n may be smaller than dx.
        y: those of the other layer on the same samples, float [n, dy]; the dtypes may differ.

    Returns:
        A float64 scalar. Differentiable; its gradient is finite also where singular values are tied or zero.

    Raises:
        TypeError: if an input is not a floating tensor.
        ValueError: for shapes that do not match, NaN or infinite values, and a constant layer.
    """
    op = "procrustes"
    n = _check_pair(op, x, y)
    few = [rotated(t) if n <= t.shape[1] else t for t in ((x,) if x is y else (x, y))]
    pair = scatter_of(few[0], few[-1], own=False)
    for name, power in (("x", pair.k), ("y", pair.l)):
        if not bool(power > 0):
            similarity.refuse_constant(op, name)
    size = pair.k.sqrt() * pair.l.sqrt()
    return similarity.nuclear_norm(pair.xy, size) / size


@_eager
def rv(x: Tensor, y: Tensor) -> Tensor:
    """The RV coefficient of two layers (Robert and Escoufier, 1976), which is linear, biased CKA.

    Args:
        x: activations, float [n, dx], samples first, of any strides; n may be smaller than dx.
        y: those of the other layer on the same samples, float [n, dy]; the dtypes may differ.

    Returns:
        A float64 scalar. Differentiable.

    Raises:
        TypeError: if an input is not a floating tensor.
        ValueError: for shapes that do not match, NaN or infinite values, and a constant layer.
    """
    op = "rv"
    _check_pair(op, x, y)
    return _linear(op, x, y, unbiased=False)
