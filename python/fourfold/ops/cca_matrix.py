"""CKA of every pair of layers of one batch, in memory.

A layer's part in it is its n x n kernel, or, where there are more samples than neurons in all layers together, its block of one
scatter matrix. Either is made once, whatever the number of layers it is compared with.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._pages import see
from . import _checks as check
from . import _similarity as similarity
from ._cca_ops import _add_wide_, _count_nonfinite, _pack_samples
from ._cca_pair import _products, _pulled_from_products, _strips, centred_norms, exactly, scatter_of
from ._cca_state import pivot_of
from .cca import _LEAST, _MOST, _eager
from .cca_streaming import Name, Similarity

_OP = "cka_matrix"
#: Float32 sums go over at most this many neurons before they are added in float64.
_NEURONS = 8192
#: Elements of a slice of neurons, which should stay in the caches.
_SLICE = 1 << 20
#: Elements of the kernels that are kept at a time where nobody wants a gradient.
_TILE = 1 << 23


@_eager
def cka_matrix(
    layers: Mapping[Name, Tensor],
    other: Mapping[Name, Tensor] | None = None,
    *,
    unbiased: bool = False,
    precision: Literal["high", "fast"] = "high",
) -> Similarity:
    """Linear CKA of every pair of layers on one batch (Kornblith et al., 2019, arXiv 1905.00414).

    The same values as :func:`cka` pair by pair, but what depends on one layer is computed once: for wide layers, whose n is
    small, an n x n kernel each. Activations of more samples than one batch go through :class:`StreamingCCA`.

    Args:
        layers: {name: activations [n, d] or [n, ...]}, samples first, of one n, of any floating dtypes and strides. All
            dimensions but the first are the neurons.
        other: a second model's layers on the same samples; None compares the layers with each other.
        unbiased: the unbiased estimate of HSIC (Song et al., 2012), which can be below 0; needs n >= 4.
        precision: "high" computes in float64 whatever comes in. "fast" multiplies centred activations in float32, blocks of
            at most 8,192 neurons that are added up in float64; warns where an unbiased HSIC is too small a difference for it.

    Returns:
        A :class:`Similarity`: ``matrix`` float64 [len(layers), len(layers)], or [len(layers), len(other)], whose columns are
        ``columns``. Differentiable, once; the kernels, ``8 * n**2`` bytes a layer, are then kept for backward.

    Raises:
        TypeError: not mappings to floating tensors, or an option of the wrong type.
        ValueError: no layers, layers of unequal n or on several devices, NaN or infinite values (naming the layer), and too few
            samples.

    A constant layer, which leaves CKA undefined (0 / 0), is NaN, and a warning names it. So is, with unbiased=True, one all of
    whose samples are equally far from each other.
    """
    check.one_of(_OP, "precision", precision, ("high", "fast"))
    if not isinstance(unbiased, bool):
        raise TypeError(f"{_OP}: unbiased must be a bool, got {unbiased!r}")
    rows = _checked("layers", layers)
    columns = None if other is None else _checked("other", other)
    labels = [*(_Label(repr(name)) for name in rows), *(_Label(f"{name!r} of other") for name in columns or ())]
    flat = [*rows.values(), *(columns or {}).values()]
    n = _check_together(flat, labels)
    least = 4 if unbiased else 2
    if n < least:
        raise ValueError(f"{_OP}: n must be at least {least}{' with unbiased=True' if unbiased else ''}, got n={n} samples")
    flat = [_features(x) for x in flat]
    fast = precision == "fast"
    of_all = _of_kernels if n < sum(x.shape[1] for x in flat) else _of_scatter
    products, norms = of_all(flat, labels, fast)
    products = (products + products.mT) / 2  # as symmetric as it is, to the last bit
    shared = norms @ norms.mT
    hsic = products + shared
    if unbiased:
        # Of centred samples, whose kernels have rows that sum up to 0.
        totals = norms.sum(1)
        hsic = products + totals.outer(totals) / ((n - 1) * (n - 2)) - 2 / (n - 2) * shared
    own = hsic.diagonal()
    defined = _defined(own.detach(), products.detach().diagonal(), norms.detach(), labels, unbiased, fast)
    own = torch.where(defined, own, 1.0).sqrt()
    first, last = (slice(None), slice(None)) if columns is None else (slice(len(rows)), slice(len(rows), None))
    matrix = hsic[first, last] / (own[first, None] * own[None, last])
    matrix = torch.where(defined[first, None] & defined[None, last], matrix, math.nan)
    return Similarity(matrix, tuple(rows), "cka", None if columns is None else tuple(columns))


# ---- arguments -------------------------------------------------------------------------------------------------------


class _Label(str):
    """What a layer is called in a message."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _checked(argument: str, layers: Any) -> dict[Name, Tensor]:
    if not isinstance(layers, Mapping):
        raise TypeError(f"{_OP}: {argument} must be a dict {{name: tensor}}, got {type(layers).__name__}")
    if not layers:
        raise ValueError(f"{_OP}: {argument} must hold at least one layer, got an empty dict")
    for name, x in layers.items():
        check.floating(_OP, f"layer {name!r} of {argument}", x)
        if x.dim() < 2 or 0 in x.shape:
            raise ValueError(
                f"{_OP}: layer {name!r} of {argument} must be [n, d] or [n, ...] with samples and neurons, got shape "
                f"{tuple(x.shape)}"
            )
        if torch._C._functorch.is_batchedtensor(x):
            raise ValueError(
                f"{_OP}: layer {name!r} of {argument} is mapped by torch.func.vmap, which cannot follow constant layers; loop "
                "over the batch"
            )
    return dict(layers)


def _check_together(layers: Sequence[Tensor], labels: Sequence[str]) -> int:
    """The number of samples."""
    first = layers[0]
    for x, label in zip(layers, labels, strict=True):
        if len(x) != len(first):
            raise ValueError(
                f"{_OP}: layers must have the same samples, got n={len(first)} for {labels[0]} {tuple(first.shape)} and "
                f"n={len(x)} for {label} {tuple(x.shape)}"
            )
        if x.device != first.device:
            raise ValueError(
                f"{_OP}: layers must be on one device, got {first.device} for {labels[0]} and {x.device} for {label}; move one "
                "with .to()"
            )
    return len(first)


def _check_values(x: Tensor, label: str) -> float:
    """The size of the largest number."""
    size = max(abs(float(end)) for end in x.detach().aminmax())
    if not size < math.inf:
        bad = int(_count_nonfinite(x.detach()))
        raise ValueError(f"{_OP}: layer {label} must be finite, got {bad} NaN or infinite values of {x.numel()}")
    if x.dtype == torch.float64 and not (size == 0 or _LEAST <= size <= _MOST):
        raise ValueError(
            f"{_OP}: the largest number of layer {label} must lie between {_LEAST} and {_MOST} in size, got {size:.3g}: its "
            "square leaves the range of float64; multiply the layer by a constant, which changes no similarity"
        )
    return size


def _features(x: Tensor) -> Tensor:
    """[n, d]: all dimensions but the first as one, in the order of memory, which no similarity sees: mostly a view."""
    if x.dim() == 2:
        return x
    order = sorted(range(1, x.dim()), key=lambda dim: (-x.stride()[dim], dim))
    return x.permute(0, *order).flatten(1)


def _scale(x: Tensor, label: str, fast: bool) -> float:
    """Checks the values; what to multiply them with: the power of 2 that brings what float32 cannot square near 1, else 1."""
    size = _check_values(x, label)
    if not fast or size == 0 or 1e-9 < size < 1e9:
        return 1.0
    return float(math.ldexp(1.0, -round(math.log2(size))))


def _defined(own: Tensor, products: Tensor, norms: Tensor, labels: Sequence[str], unbiased: bool, fast: bool) -> Tensor:
    """Which layers [L] have an HSIC with themselves above 0; warns of the others, and of those that "fast" is not for."""
    n = norms.shape[1]
    varies = norms.sum(1) > 0
    # What the HSIC is a difference of.
    terms = products + norms.square().sum(1)
    above = own > 4 * n * similarity.EPS * terms
    named = [(label, *found) for label, *found in zip(labels, varies.tolist(), above.tolist(), strict=True)]
    constant = [label for label, moves, _ in named if not moves]
    similarity.warn_constant(_OP, constant)
    alike = [label for label, moves, found in named if moves and not found]
    if alike:
        similarity._warn(
            f"{_OP}: {len(alike)} layers have an HSIC with themselves that is not above 0, and are NaN, the first {alike[0]}: "
            "all its samples are equally far from each other (0 / 0); use more samples",
            None,
        )
    defined = varies & above
    if fast and unbiased:
        loss = torch.where(defined, terms / own, 0.0)
        worst = int(loss.argmax())
        if float(loss[worst]) > similarity.FAST_KAPPA**2:
            similarity._warn(
                f"{_OP}: layer {labels[worst]} has an unbiased HSIC with itself that is a difference of terms "
                f"{float(loss[worst]):.3g} times as large; precision='fast' is meant for up to {similarity.FAST_KAPPA**2:.0f}; "
                f"use precision='high'{see('cca.md#precision')}",
                None,
            )
    return defined


# ---- few samples -----------------------------------------------------------------------------------------------------


def _step(n: int) -> int:
    """Neurons of n samples that are read at a time."""
    return max(256, min(_NEURONS, _SLICE // n))


def _kernel(x: Tensor, rows: slice, scale: float, fast: bool) -> tuple[Tensor, Tensor]:
    """[rows, n - rows.start]: inner products of these centred samples with those from the first of them on, float64.

    What lies left of the diagonal means nothing. And a sum of squares of all numbers less the first sample, which says whether
    they are finite and in range.
    """
    n, d = x.shape
    height = rows.stop - rows.start
    kernel = torch.zeros(height, n - rows.start, dtype=torch.float64, device=x.device)
    # The blocks on the diagonal are computed whole; thin products run slower.
    strips = [slice(i, min(i + 64, height)) for i in range(0, height, 64)]
    if x.device.type != "cpu" or height > 512:
        strips = list(_strips(height, x.device))
    # Of the samples less the first one, which makes constant neurons exactly 0; what they lack to the mean is put right in the
    # end. None of those inner products is more than 4 times the largest of the centred samples. In float32 that is too much:
    # they would all be about the first sample's square, and what they differ by would be near its rounding.
    step = min(d, _step(n))
    panel = torch.empty(n, step + 8, dtype=torch.float32 if fast else torch.float64, device=x.device)
    norms, means = panel.new_empty(n), torch.zeros(n, dtype=torch.float64, device=x.device)
    square, power = torch.zeros((), dtype=torch.float64, device=x.device), torch.zeros((), dtype=torch.float64, device=x.device)
    with exactly(x.device):
        for first in range(0, d, step):
            of_x = x[:, first : first + step]
            if scale != 1.0:
                of_x = of_x.double() * scale
            part = panel[:, : of_x.shape[1]]
            sums = torch.zeros(of_x.shape[1] + 1, dtype=torch.float64, device=x.device)
            _pack_samples(of_x.unsqueeze(2), of_x[0].double(), 0, part, sums, norms)
            mean = sums[:-1] / n
            if fast:
                near = mean.to(part.dtype)
                part -= near
                mean -= near
            power += sums[-1]
            square += mean @ mean
            means += part @ mean.to(part.dtype)
            part = part[rows.start :]
            for strip in strips:
                to, left, right = kernel[strip, strip.start :], part[strip], part[strip.start :].T
                if fast:
                    _add_wide_(to, left @ right)
                else:
                    to.addmm_(left, right)
    kernel -= means[rows, None] - square
    kernel -= means[rows.start :]
    return kernel, power


def _usual(power: float, fast: bool) -> bool:
    """Whether squares that have this sum are finite and in the middle of their range."""
    return 1e-25 < power < 1e25 if fast else 1e-270 < power < 1e270


class _Kernel(torch.autograd.Function):
    """The upper triangle of a layer's kernel."""

    @staticmethod
    def forward(x: Tensor, scale: float, fast: bool) -> Tensor:
        return _kernel(x, slice(0, x.shape[0]), scale, fast)[0].triu()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.scale = inputs[1]
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        square = ctx.scale**2

        def formula(grad: Tensor, x: Tensor) -> Tensor:
            upper = grad.triu()
            return _pulled_from_products(x, (upper + upper.mT) * square)

        return similarity.once(formula, grad, *ctx.saved_tensors), None, None


def _of_kernels(layers: Sequence[Tensor], labels: Sequence[str], fast: bool) -> tuple[Tensor, Tensor]:
    """Sums of products of two kernels [L, L], less their diagonals, and the diagonals [L, n]; kernels have a size near 1."""
    n, device = layers[0].shape[0], layers[0].device
    tracked = similarity.tracked(*layers)
    height = n if tracked else min(n, max(64, _TILE // (n * len(layers))))
    products = torch.zeros(len(layers), len(layers), dtype=torch.float64, device=device)
    norms, scales, units = [], [1.0] * len(layers), torch.ones(len(layers), dtype=torch.float64, device=device)
    if tracked:
        scales = [_scale(x, label, fast) for x, label in zip(layers, labels, strict=True)]
    for first in range(0, n, height):
        rows = slice(first, min(first + height, n))
        if tracked:
            tile = torch.stack([_Kernel.apply(x, scale, fast) for x, scale in zip(layers, scales, strict=True)])
            units = similarity.power(tile.detach())
        else:
            tile = products.new_empty(len(layers), rows.stop - first, n - first)
            for i, (x, label) in enumerate(zip(layers, labels, strict=True)):
                tile[i], power = _kernel(x, rows, scales[i], fast)
                if first:
                    continue
                if not _usual(float(power), fast):
                    # Looked at only now, because a second pass over the data takes its time.
                    scales[i] = _scale(x, label, fast)
                    tile[i], power = _kernel(x, rows, scales[i], fast)
                units[i] = power
        # A size of all of a kernel, so that products stay in range; 0 is a constant layer's.
        tile = tile / torch.where(units > 0, units, 1.0)[:, None, None]
        norms.append(tile.diagonal(dim1=1, dim2=2))
        upper = tile.triu(1).flatten(1)
        with exactly(device):
            products = products + 2 * (upper @ upper.mT)
    return products, torch.cat(norms, 1)


# ---- many samples ----------------------------------------------------------------------------------------------------


def _of_scatter(layers: Sequence[Tensor], labels: Sequence[str], fast: bool) -> tuple[Tensor, Tensor]:
    """The same from the scatter matrix [D, D] of all layers' D neurons beside each other."""
    precision = "fast" if fast else "high"
    scales = [_scale(x, label, fast) for x, label in zip(layers, labels, strict=True)]
    layers = [x if scale == 1.0 else x.double() * scale for x, scale in zip(layers, scales, strict=True)]
    widths = [x.shape[1] for x in layers]
    n, device = layers[0].shape[0], layers[0].device
    if similarity.tracked(*layers):
        together = torch.cat([x.double() for x in layers], 1)
        joined = scatter_of(together, together, precision=precision)
        scatter = joined.xx
        centred = (together - joined.mean_x[0]) - joined.mean_x[1]
        norms = torch.stack([(part - part.mean(0)).square().sum(1) for part in centred.split(widths, 1)])
    else:
        with exactly(device):
            pivots = [pivot_of(x.unsqueeze(2)) for x in layers]
            scatter, sums = _products(layers, pivots, precision, True)
            sums = [s[:-1] for s in sums]
            shift = torch.cat(sums)
            scatter.addr_(shift, shift, alpha=-1 / n)
        means = [torch.stack([p, s / n]) for p, s in zip(pivots, sums, strict=True)]
        norms = torch.stack([centred_norms(x, mean) for x, mean in zip(layers, means, strict=True)])
    power = norms.detach().sum(1)
    power = torch.where(power > 0, power, 1.0)
    norms = norms / power.unsqueeze(1)
    # Only the upper triangle is sure to be there.
    blocks = [block.split(widths, 1) for block in scatter.split(widths, 0)]
    rows = []
    for i, row in enumerate(blocks):
        unit = power[i].sqrt() * power.sqrt()
        own = row[i].triu() / power[i]
        found = 2 * own.square().sum() - own.diagonal().square().sum()
        rest = [(block / unit[j]).square().sum() for j, block in enumerate(row[i + 1 :], i + 1)]
        rows.append(torch.stack([torch.zeros_like(found)] * i + [found, *rest]))
    upper = torch.stack(rows)
    return upper + upper.triu(1).mT - norms @ norms.mT, norms
