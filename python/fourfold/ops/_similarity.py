"""From centred scatter matrices to similarities: what the measures in memory, streaming and per frequency share.

A scatter matrix is Xᴴ Y of centred samples [n, d], float64 or complex128, not divided by n; xx, xy and yy are those of a pair.
Batches of them stand in leading dimensions. Gradients have no 1 / (s_i - s_j) anywhere, so they stay finite where correlations
are tied or zero.
"""

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._pages import see

EPS = 2.0**-52

#: Modules that a warning is never about: this library, and what torch.compiler.disable puts around its functions.
_OURS = (__name__.split(".")[0] + ".", "torch._dynamo.")

#: Errors of correlations are near the rounding of a scatter matrix, times the square of the data's condition number. What can
#: read the data again does so above this.
REFINE = 2.0**-31

#: Correlations nearer to each other than this are tied: in the sums of one pass, single ones are not known better.
TIED = 1e-8

#: The condition number of the data up to which float32 blocks are enough; their error grows with its square.
FAST_KAPPA = 100.0

#: Directions with less than this share of the largest variance cannot be told from the rounding of float32 blocks.
FAST_RTOL = 2.0**-20


# ---- refusals and warnings -------------------------------------------------------------------------------------------


def refuse_few(op: str, n: int, d: int) -> None:
    """Raises ValueError where every correlation is 1 whatever the data are."""
    if n <= d:
        raise ValueError(
            f"{op}: n must be larger than the number of dimensions, got n={n} samples for {d} dimensions: every correlation "
            "would be 1, whatever the data; use more samples, svcca, or cka with unbiased=True" + see("cca.md#few-samples")
        )


def _warn(message: str, stacklevel: int | None) -> None:
    """stacklevel: of the caller's; None: of the line outside of the library that caused it, however deep inside it arose."""
    if stacklevel is None:
        frame, stacklevel = sys._getframe(1), 1
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
            frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(message, stacklevel=stacklevel + 1)


def warn_chance(op: str, n: int, d: int, stacklevel: int | None = None) -> None:
    """Warns where independent data would look similar, with the level that they would reach."""
    if d and n < 10 * d:
        level = min(1.0, d / max(n - 1, 1))
        _warn(
            f"{op}: n={n} samples for {d} dimensions; independent data would reach a chance level of r2 = {level:.2g} "
            f"(d / (n - 1)); use at least {10 * d} samples{see('cca.md#few-samples')}",
            stacklevel if stacklevel is None else stacklevel + 1,
        )


def warn_condition(op: str, name: str, whitener: "Whitener", stacklevel: int | None = None) -> None:
    """Warns where precision="fast" is not enough for the condition number of the data."""
    lost = whitener.lost
    kappa = FAST_RTOL**-0.5 if lost else whitener.kappa
    if kappa > FAST_KAPPA and not math.isinf(kappa):
        found = f"above {kappa:.3g} ({lost} of its directions are left out)" if lost else f"of {kappa:.3g}"
        _warn(
            f"{op}: {name} has a condition number {found}; precision='fast' is meant for up to {FAST_KAPPA:.0f}, and "
            f"errors grow with its square; use precision='high'{see('cca.md#precision')}",
            stacklevel if stacklevel is None else stacklevel + 1,
        )


def beyond_range(power: Tensor, n: int, precision: str) -> bool:
    """Whether sums of products with this trace left their range, or are so small that the smaller ones were lost.

    Of float32 products with precision "fast", else of float64.
    """
    return not n * 2.0 ** (-100 if precision == "fast" else -930) < float(power) < math.inf


def warn_constant(op: str, names: list[Any], found: str = "are NaN (0 / 0)") -> None:
    """Warns of layers that do not vary; found: what that makes of them."""
    if names:
        _warn(
            f"{op}: {len(names)} layers have the same value in every sample, and {found}, the first {names[0]!r}; "
            f"leave them out{see('cca.md#limits')}",
            None,
        )


def warn_rankless(op: str, names: list[str]) -> None:
    """Warns where inputs do not vary, which have no direction to correlate."""
    if names:
        _warn(
            f"{op}: {' and '.join(names)} must vary, got the same value in every sample: rank 0, so that every mean is 0 "
            f"whatever the other layer is; leave such a layer out{see('cca.md#limits')}",
            None,
        )


def refuse_constant(op: str, name: str) -> None:
    """Raises the ValueError of a measure that a constant input leaves undefined."""
    there = see("cca.md#limits")
    raise ValueError(f"{op}: {name} must vary, got the same value in every sample (0 / 0); leave such a layer out{there}")


def number(op: str, name: str, value: Any) -> float:
    """Any kind of real number as a float; raises TypeError for the rest."""
    if isinstance(value, (bool, str, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    return float(value)


def check_rtol(op: str, rtol: Any) -> float | None:
    """rtol, or None for the default."""
    if rtol is None:
        return None
    rtol = number(op, "rtol", rtol)
    if not 0 <= rtol < 1:
        raise ValueError(f"{op}: rtol must lie in [0, 1), got {rtol}: it is a share of the largest variance")
    return rtol


def check_variance(op: str, variance: Any) -> float:
    """The share of the variance that svcca keeps."""
    variance = number(op, "variance", variance)
    if not 0 < variance <= 1:
        raise ValueError(f"{op}: variance must lie in (0, 1], got {variance}: it is the share kept, 0.99 keeps 99%")
    return variance


# ---- gradients -------------------------------------------------------------------------------------------------------


class _Once(torch.autograd.Function):
    """A gradient formula that refuses to be differentiated again, under torch.func too: constants of it depend on the input."""

    @staticmethod
    def forward(formula: Callable[..., Any], *tensors: Tensor) -> Any:
        return formula(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("fourfold: similarity measures can be differentiated once, not twice")


def once(formula: Callable[..., Any], *tensors: Tensor) -> Any:
    """formula(*tensors), for a backward; a second derivative through it is an error."""
    return _Once.apply(formula, *tensors)


def tracked(*tensors: Tensor) -> bool:
    """Whether anyone may want a gradient: of autograd, of torch.func, or forward-mode, which then is an error."""
    from ._register import transforming

    return transforming() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


# ---- whitening -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Whitener:
    """Takes a layer to uncorrelated directions of length 1: rootᴴ C root = 1 on the directions kept.

    root: [..., d, r]; in a batch r is the largest rank, and columns beyond a matrix's own rank are 0.
    ranks: int64 [...], the directions kept.
    scatter: C. spectrum, vectors: its eigenvalues, descending, [..., d], and eigenvectors; None if they were not needed.
    moving: the gradient follows the subspace kept (svcca); else the cut is constant.
    bound: if given, what the squares of the condition numbers are at most.
    """

    root: Tensor
    ranks: Tensor
    scatter: Tensor = field(repr=False)
    spectrum: Tensor | None = field(default=None, repr=False)
    vectors: Tensor | None = field(default=None, repr=False)
    moving: bool = False
    bound: float | None = field(default=None, repr=False)

    @cached_property
    def rank(self) -> int:
        """The directions kept of a single matrix."""
        return int(self.ranks)

    @cached_property
    def lost(self) -> int:
        """Directions that FAST_RTOL drops although they are more than float64's rounding: they may be data."""
        w = self.spectrum
        if w is None or not w.numel():
            return 0
        share = w.abs() / w[..., :1].clamp(min=torch.finfo(w.dtype).tiny)
        return int(((share <= FAST_RTOL) & (share > FAST_RTOL**2)).sum())

    @cached_property
    def kappas(self) -> Tensor:
        """[...]: the largest over the smallest singular value kept, of the data; inf where none is kept."""
        w = self.spectrum
        if w is None:
            w = torch.linalg.eigvalsh(self.scatter).flip(-1)
        if not w.shape[-1]:
            return w.new_full(w.shape[:-1], math.inf)
        last = w.gather(-1, (self.ranks - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(self.ranks > 0, (w[..., 0] / last).sqrt(), math.inf)

    @cached_property
    def kappa(self) -> float:
        """The condition number of a single matrix's data, on the directions kept."""
        return float(self.kappas)


def whiten(
    scatter: Tensor, n: int, *, rtol: float | None = None, variance: float | None = None, precision: str = "high"
) -> Whitener:
    """The whitener of scatter [..., d, d], of n samples.

    rtol: directions with an eigenvalue of at most rtol times the largest are dropped; n * 2⁻⁵² if None.
    precision: how the scatter was summed; "fast" also drops what float32 cannot tell from rounding.
    variance: keeps only the fewest leading directions whose eigenvalues sum up to this share of all, inclusive.
    """
    c = scatter.detach()
    cut = n * EPS if rtol is None else rtol
    if precision == "fast":
        cut = max(cut, FAST_RTOL)
    if variance is None:
        sure = _whiten_full_rank(c, cut)
        if sure is not None:
            return sure
    w, v = torch.linalg.eigh(c)
    w, v = w.flip(-1), v.flip(-1)
    if precision == "high":
        w = w.clamp(min=0)  # the rest is rounding
    if not w.shape[-1]:
        return Whitener(v, w.new_zeros(w.shape[:-1], dtype=torch.int64), c, w, v)
    ranks = (w > cut * w[..., :1]).sum(-1)
    if variance is not None and variance < 1:
        # Without the last few bits, so that a sum of exactly this share counts however it was rounded.
        short = w.cumsum(-1) < (variance * (1 - 16 * EPS)) * w.sum(-1, keepdim=True)
        ranks = torch.minimum(ranks, short.sum(-1) + 1)
    most = int(ranks.max()) if ranks.numel() else 0
    kept = torch.arange(most, device=w.device) < ranks.unsqueeze(-1)
    scale = torch.where(kept, w[..., :most], math.inf).rsqrt()
    return Whitener(v[..., :most] * scale.unsqueeze(-2), ranks, c, w, v, moving=variance is not None)


def _whiten_full_rank(c: Tensor, cut: float) -> Whitener | None:
    """By Cholesky, at a fraction of eigh's cost, where every matrix is certain to keep all its directions; else None."""
    d = c.shape[-1]
    if not d or not c.numel():
        return None
    factor, info = torch.linalg.cholesky_ex(c)
    if bool(info.any()):
        return None
    identity = torch.eye(d, dtype=c.dtype, device=c.device).expand_as(c)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    # The smallest eigenvalue is at least 1 / |L⁻¹|²; the largest is at most |C|. Twice the rounding of both keeps it certain.
    bound = float((torch.linalg.matrix_norm(inverse).square() * torch.linalg.matrix_norm(c)).max())
    if not bound * 2 * max(cut, d * EPS) < 1:
        return None
    return Whitener(inverse.mH, torch.full(c.shape[:-2], d, dtype=torch.int64, device=c.device), c, bound=bound)


def ill_conditioned(wx: Whitener, wy: Whitener) -> bool:
    """Whether the scatter matrices of a pair, as exact as they are, leave errors near 1e-9 in its correlations."""
    limit = REFINE / EPS
    return any((w.bound is None or w.bound > limit) and w.rank > 0 and w.kappa**2 > limit for w in (wx, wy))


# ---- canonical correlations ------------------------------------------------------------------------------------------


def _polar(u: Tensor, s: Tensor, vh: Tensor, weights: Tensor, zero: Tensor | float) -> Tensor:
    """U diag(weights) Vᴴ over singular values that are not numerically zero: of the subgradients, that of least norm."""
    weights = torch.where(s > zero, weights, 0.0)
    return (u * weights.unsqueeze(-2)) @ vh


def _turn(w: Whitener, towards: Tensor) -> Tensor | None:
    """The gradient of the scatter matrix because the subspace kept moves; towards: df/droot."""
    if not w.moving or w.spectrum is None or w.vectors is None:
        return None
    r = w.root.shape[-1]
    place = torch.arange(w.spectrum.shape[-1], device=w.spectrum.device)
    kept = place < w.ranks.unsqueeze(-1)  # [..., d]
    gap = w.spectrum[..., None, :r] - w.spectrum[..., :, None]  # [..., dropped, kept]
    # Where the cut goes between equal variances there is no derivative; such a pair counts as not moving.
    tied = gap <= w.spectrum.shape[-1] * EPS * w.spectrum[..., :1, None]
    open_ = kept[..., None, :r] & ~kept[..., :, None] & ~tied
    scale = torch.where(open_, gap * w.spectrum[..., None, :r].sqrt(), math.inf).reciprocal()
    turn = w.vectors @ ((w.vectors.mH @ towards) * scale) @ w.vectors[..., :r].mH
    return (turn + turn.mH) / 2


class _Correlations(torch.autograd.Function):
    """rho, and the singular vectors u and v of the whitened cross scatter, which have no gradient."""

    @staticmethod
    def forward(
        xx: Tensor, xy: Tensor, yy: Tensor, tx: Tensor, ty: Tensor, m: Tensor, wx: Whitener, wy: Whitener
    ) -> tuple[Tensor, ...]:
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        return s, u, vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, xy, _, tx, ty, _, ctx.wx, ctx.wy = inputs
        s, u, vh = output
        ctx.mark_non_differentiable(u, vh)
        ctx.save_for_backward(xy, tx, ty, s, u, vh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _u: Tensor, _vh: Tensor) -> tuple[Any, ...]:
        wx, wy, wanted = ctx.wx, ctx.wy, ctx.needs_input_grad

        def formula(grad: Tensor, xy: Tensor, tx: Tensor, ty: Tensor, s: Tensor, u: Tensor, vh: Tensor) -> tuple[Any, ...]:
            zero = 8 * EPS * max(*tx.shape[-2:], *ty.shape[-2:])
            p = _polar(u, s, vh, grad, zero)
            gs = torch.where(s > zero, grad * s, 0.0).unsqueeze(-2)
            of_xx = of_xy = of_yy = None
            if wanted[0]:
                left = tx @ u
                of_xx = (left * (gs / -2)) @ left.mH
                turn = _turn(wx, xy @ (ty @ p.mH))
                of_xx = of_xx if turn is None else of_xx + turn
            if wanted[1]:
                of_xy = tx @ p @ ty.mH
            if wanted[2]:
                right = ty @ vh.mH
                of_yy = (right * (gs / -2)) @ right.mH
                turn = _turn(wy, xy.mH @ (tx @ p))
                of_yy = of_yy if turn is None else of_yy + turn
            return of_xx, of_xy, of_yy

        return *once(formula, grad, *ctx.saved_tensors), None, None, None, None, None


def correlations(xx: Tensor, xy: Tensor, yy: Tensor, wx: Whitener, wy: Whitener, whitened: Tensor | None = None) -> Tensor:
    """Canonical correlations rho [..., min(r_x, r_y)], descending, from whiteners of xx and yy.

    In a batch, those beyond a pair's own ranks are 0. Differentiable in the scatter matrices, the ranks held fixed. whitened:
    root_xᴴ xy root_y, for who knows it better.
    """
    return _correlations(xx, xy, yy, wx, wy, whitened, vectors=False)[0]


def _whitened(xx: Tensor, xy: Tensor, wx: Whitener, wy: Whitener) -> Tensor:
    if wx is wy and xy is xx:  # the same layer
        place = torch.arange(wx.root.shape[-1], device=xx.device)
        return torch.diag_embed((place < wx.ranks.unsqueeze(-1)).to(xx.dtype))
    return wx.root.mH @ xy.detach() @ wy.root


def _correlations(
    xx: Tensor, xy: Tensor, yy: Tensor, wx: Whitener, wy: Whitener, whitened: Tensor | None, vectors: bool
) -> tuple[Tensor, ...]:
    m = _whitened(xx, xy, wx, wy) if whitened is None else whitened
    if tracked(xx, xy, yy):
        s, u, vh = _Correlations.apply(xx, xy, yy, wx.root, wy.root, m, wx, wy)
    elif vectors:
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
    else:
        u = vh = s = torch.linalg.svdvals(m)
    # Rounding can take a correlation past 1; the gradient there stays that of the correlation.
    s = s - (s.detach() - 1).clamp(min=0)
    if s.dim() > 1:
        place = torch.arange(s.shape[-1], device=s.device)
        s = torch.where(place < torch.minimum(wx.ranks, wy.ranks).unsqueeze(-1), s, 0.0)
    return s, u, vh


def mean_rho(rho: Tensor, wx: Whitener, wy: Whitener) -> Tensor:
    """The mean of the correlations [...]; 0 where there is none."""
    return rho.sum(-1) / torch.minimum(wx.ranks, wy.ranks).clamp(min=1)


def mean_r2(rho: Tensor, wx: Whitener, wy: Whitener) -> Tensor:
    """The mean of the squared correlations [...]; 0 where there is none."""
    return rho.square().sum(-1) / torch.minimum(wx.ranks, wy.ranks).clamp(min=1)


def pwcca_weights(scatter: Tensor, w: Whitener, directions: Tensor, rho: Tensor) -> Tensor:
    """The weights [k] of the correlations rho [k]: how much of the layer's neurons lies along each canonical variate.

    scatter: of the layer; directions: [r, k], its singular vectors of the whitened cross scatter. Sum_j |<h_i, z_j>| is a
    function of the scatter alone, because h = Z root u.

    Of tied correlations any rotation of the variates is as good, and would have other weights. Those taken are the principal
    directions of the neurons' projections on the variates, whose weights no order, scale or map of the data changes; they
    share them evenly, so that the gradient is that of the sum of these correlations.
    """
    projections = directions.mH @ (w.root.mH @ scatter.detach())
    weights = projections.abs().sum(-1)
    apart = (rho.detach()[:-1] - rho.detach()[1:] > TIED).tolist()
    ends = [i + 1 for i, is_apart in enumerate(apart) if is_apart]
    for first, last in zip([0, *ends], [*ends, len(rho)], strict=True):
        if last - first > 1:
            _, s, vh = torch.linalg.svd(projections[first:last], full_matrices=False)
            weights[first:last] = (s @ vh.abs()).sum() / (last - first)
    return weights


def projection_weighted(
    xx: Tensor,
    xy: Tensor,
    yy: Tensor,
    wx: Whitener,
    wy: Whitener,
    whitened: Tensor | None = None,
    *,
    weights: str = "x",
) -> Tensor:
    """PWCCA of one pair: the mean of the correlations weighted by x's or y's neurons, or with "both" the two, [2]."""
    rho, u, vh = _correlations(xx, xy, yy, wx, wy, whitened, vectors=True)
    results = []
    for layer, scatter, w, directions in (("x", xx, wx, u), ("y", yy, wy, vh.mH)):
        if weights in (layer, "both"):
            a = pwcca_weights(scatter, w, directions, rho)
            results.append((a * rho).sum() / a.sum())
    return torch.stack(results) if weights == "both" else results[0]


# ---- nuclear norm ----------------------------------------------------------------------------------------------------


class _NuclearNorm(torch.autograd.Function):
    @staticmethod
    def forward(m: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        if scale is None:
            scale = s[..., :1].sum(-1)
        zero = 8 * EPS * max(m.shape[-2:]) * scale.unsqueeze(-1)
        return s.sum(-1), _polar(u, s, vh, torch.ones_like(s), zero)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _polar: Tensor) -> Any:
        return once(lambda grad, polar, _m: grad[..., None, None] * polar, grad, *ctx.saved_tensors), None


def nuclear_norm(m: Tensor, scale: Tensor | None = None) -> Tensor:
    """The sum of the singular values of m [..., a, b], real or complex.

    Its gradient is the polar factor, 0 on the null space. scale: [...], the size of what m was summed from, which says how
    small a zero is; the largest singular value if None.
    """
    if tracked(m):
        return _NuclearNorm.apply(m, scale if scale is None else scale.detach())[0]
    return torch.linalg.svdvals(m).sum(-1)


# ---- from sums -------------------------------------------------------------------------------------------------------


def power(scatter: Tensor) -> Tensor:
    """The trace [...]: the squared Frobenius norm of the centred data."""
    return scatter.diagonal(dim1=-2, dim2=-1).real.sum(-1)


def _unit(scatter: Tensor) -> Tensor:
    """What takes a scatter matrix's numbers near 1, so that their squares stay in range; a constant."""
    return power(scatter).detach().sqrt()[..., None, None]


def linear_cka(xx: Tensor, xy: Tensor, yy: Tensor) -> Tensor:
    """Biased linear CKA [...], which is the RV coefficient."""
    ux, uy = _unit(xx), _unit(yy)
    xx, xy, yy = xx / ux / ux, xy / ux / uy, yy / uy / uy
    norms = [torch.linalg.matrix_norm(c) for c in (xx, yy)]
    return (xy * xy).sum((-2, -1)) / (norms[0] * norms[1])


def procrustes_similarity(xx: Tensor, xy: Tensor, yy: Tensor) -> Tensor:
    """The nuclear norm of xy over the norms of the data [...]."""
    size = power(xx).sqrt() * power(yy).sqrt()
    return nuclear_norm(xy, size) / size


@dataclass(frozen=True)
class Sums:
    """What the unbiased HSIC of a pair wants to know of its n samples x_i and y_i, both less a shift of any kind.

    k_i = |x_i|² and l_i = |y_i|². xy: sum of x_i y_iᵀ, not centred; x, y: of the samples; k, l, kl: of k_i, l_i and k_i l_i;
    lx, ky: of l_i x_i and of k_i y_i.
    """

    xy: Tensor
    x: Tensor
    y: Tensor
    k: Tensor
    l: Tensor  # noqa: E741
    kl: Tensor
    lx: Tensor
    ky: Tensor


def unbiased_hsic(n: int, sums: Sums) -> Tensor:
    """n (n - 3) times the unbiased HSIC of linear kernels (Song et al., 2012), from sums over any number of batches."""
    s = sums
    square = (s.xy * s.xy).sum((-2, -1))
    totals = ((s.x * s.x).sum(-1) - s.k) * ((s.y * s.y).sum(-1) - s.l) / ((n - 1) * (n - 2))
    along = ((s.x.unsqueeze(-2) @ s.xy).squeeze(-2) * s.y).sum(-1)
    rows = along - (s.x * s.lx).sum(-1) - (s.y * s.ky).sum(-1) + s.kl
    return square - s.kl + totals - 2 * rows / (n - 2)


def unbiased_cka(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Unbiased CKA [...] from the three unbiased HSICs, or common multiples of them."""
    return xy / (xx.sqrt() * yy.sqrt())
