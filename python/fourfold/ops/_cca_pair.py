"""From a pair of layers in memory to the small float64 matrices that its similarity is made of, and back to gradients.

With many samples these are the centred scatter matrices, [d, d]; with few samples the n x n inner products of samples, so that
[d, d] is never made where d is larger than n. Data are read in blocks: nothing of the size of a layer is allocated but the
gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _similarity as similarity
from ._cca_ops import _add_wide_, _gram_, _pack_samples
from ._cca_state import full_precision, near_zero, pivot_of

#: Float32 sums go over at most this many samples before they are added in float64.
_SAMPLES = 1024
#: Elements of a panel of samples, at least _SAMPLES samples.
_PANEL = 1 << 20
#: Features of n samples, or samples of d features, that are read at a time where there is no panel.
_SLICE = 1 << 20


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 and no bfloat16 inside products, whatever the process allows."""
    with full_precision(), torch.autocast(device.type, enabled=False):
        yield


def _strips(width: int, device: torch.device) -> Iterator[slice]:
    """Rows of a triangle of products that are computed at a time, from the diagonal on.

    The blocks on the diagonal are computed whole, which wastes a strip's height over the width; thin products run slower.
    """
    step = 1024 if device.type != "cpu" else 128 if width <= 1024 else 256
    for first in range(0, width, step):
        yield slice(first, min(first + step, width))


def _slices(count: int, width: int) -> Iterator[slice]:
    """Parts of `count` rows of `width` elements."""
    step = max(1, _SLICE // max(width, 1))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _mirrored(block: Tensor) -> Tensor:
    """A symmetric matrix from its upper triangle."""
    upper = block.triu()
    return upper + upper.triu(1).mT


def scatter(x: Tensor, y: Tensor | None, precision: str, own: bool = True) -> tuple[Tensor, ...]:
    """Centred scatter matrices (xx, xy, yy) of x [n, d] and y, the triangle counted once, and the means; without y all of x.

    A mean is [2, d]: a number and what it lacks, so that x less the one and less the other is centred however far it lies from
    0. own: False leaves xx and yy out; they are empty then. precision: "fast" becomes "high" where float32 cannot hold squares.
    """
    layers = [x] if y is None else [x, y]
    n, dtypes = x.shape[0], {t.dtype for t in layers}
    raw = precision == "fast" and own and len(dtypes) == 1 and x.dtype in (torch.bfloat16, torch.float16)
    with exactly(x.device):
        if raw and all(near_zero(t.unsqueeze(2)) for t in layers):
            pivots = [torch.zeros(t.shape[1], dtype=torch.float64, device=x.device) for t in layers]
            sums = [t.sum(0, dtype=torch.float64) for t in layers]
            total = _raw_products(layers)
        else:
            pivots = [pivot_of(t.unsqueeze(2)) for t in layers]
            total, sums = _products(layers, pivots, precision, own)
    if precision == "fast" and own:
        powers = (part.sum() for part in total.diagonal().split([t.shape[1] for t in layers]))
        if any(similarity.beyond_float32(power, n) for power in powers):
            return scatter(x, y, "high")
    means = [torch.stack([p, s / n]) for p, s in zip(pivots, sums, strict=True)]
    if not own:
        xy = total.addr_(sums[0], sums[1], alpha=-1 / n)
        return xy.new_empty(0), xy, xy.new_empty(0), *means
    together = torch.cat(sums)
    total.addr_(together, together, alpha=-1 / n)
    d = x.shape[1]
    xx = _mirrored(total[:d, :d])
    if y is None:
        return xx, xx, xx, means[0], means[0]
    return xx, total[:d, d:].contiguous(), _mirrored(total[d:, d:]), *means


def _raw_products(layers: list[Tensor]) -> Tensor:
    """[D, D], its upper triangle: sums of products of 16-bit numbers as they are."""
    widths = [t.shape[1] for t in layers]
    total = torch.zeros(sum(widths), sum(widths), dtype=torch.float64, device=layers[0].device)
    starts = [0, widths[0]]
    for i, left in enumerate(layers):
        for j, right in enumerate(layers[i:], i):
            part = total[starts[i] : starts[i] + widths[i], starts[j] : starts[j] + widths[j]]
            _gram_(left.unsqueeze(2), right.unsqueeze(2), part)
    return total


def _products(layers: list[Tensor], pivots: list[Tensor], precision: str, own: bool) -> tuple[Tensor, list[Tensor]]:
    """Sums of products of the layers' samples less the pivots, beside each other: [D, D], its upper triangle; and their sums.

    own: False has the products of the first layer and the second alone.
    """
    n, device = layers[0].shape[0], layers[0].device
    widths = [t.shape[1] for t in layers]
    d = sum(widths)
    wide = precision == "high"
    samples = min(n, max(_SAMPLES, _PANEL // max(d, 1)) if wide else _SAMPLES)
    # Rows a power of 2 apart would fall into the same places of the caches.
    panel = torch.empty(samples, (d + 7) // 8 * 8 + 8, dtype=torch.float64 if wide else torch.float32, device=device)
    norms = panel.new_empty(samples)
    sums = [torch.zeros(w + 1, dtype=torch.float64, device=device) for w in widths]
    total = torch.zeros((d, d) if own else (widths[0], widths[1]), dtype=torch.float64, device=device)
    for first in range(0, n, samples):
        block = panel[: min(samples, n - first)]
        start = 0
        for layer, pivot, of_layer in zip(layers, pivots, sums, strict=True):
            end = start + layer.shape[1]
            _pack_samples(layer.unsqueeze(2), pivot, first, block[:, start:end], of_layer, norms[: block.shape[0]])
            start = end
        left, right = (block[:, :d], block[:, :d]) if own else (block[:, : widths[0]], block[:, widths[0] : d])
        for rows in _strips(d, device) if own else (slice(widths[0]),):
            column = rows.start if own else 0
            to, a, b = total[rows, column:], left[:, rows].T, right[:, column:]
            if wide:
                to.addmm_(a, b)
            else:
                _add_wide_(to, a @ b)
    return total, [s[:-1] for s in sums]


def _centred(x: Tensor, mean: Tensor, part: slice) -> Tensor:
    """Some samples, float64."""
    return (x[part].double() - mean[0]) - mean[1]


def centred_norms(x: Tensor, mean: Tensor) -> Tensor:
    """[n]: the squared lengths of the centred samples."""
    norms = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    for part in _slices(*x.shape):
        norms[part] = _centred(x, mean, part).square().sum(1)
    return norms


def _pulled_back(
    x: Tensor,
    mean: Tensor,
    own: Tensor | None,
    norms: Tensor | None,
    other: Tensor | None,
    mean_other: Tensor,
    cross: Tensor | None,
) -> Tensor:
    """The gradient of x, of that of its scatter matrix, of its norms, and of its scatter with the other layer, [d, d_other]."""
    result = torch.empty_like(x)
    factor = None if own is None else own + own.mT
    shift = None
    if norms is not None:  # those of the norms don't sum up to 0 by themselves
        shift = torch.zeros_like(mean[0])
        for part in _slices(*x.shape):
            shift += norms[part] @ _centred(x, mean, part)
        shift *= 2 / x.shape[0]
    for part in _slices(x.shape[0], x.shape[1] + mean_other.shape[-1]):
        centred = _centred(x, mean, part)
        gradient = torch.zeros_like(centred) if factor is None else centred @ factor
        if norms is not None and shift is not None:
            gradient += 2 * norms[part].unsqueeze(1) * centred - shift
        if cross is not None and other is not None:
            gradient += _centred(other, mean_other, part) @ cross.mT
        result[part] = gradient
    return result


class _Scatter(torch.autograd.Function):
    """(xx, xy, yy, k, l, mean_x, mean_y): k and l are the squared lengths of the centred samples, if wanted; y None: y is x."""

    @staticmethod
    def forward(x: Tensor, y: Tensor | None, precision: str, own: bool, norms: bool) -> tuple[Tensor, ...]:
        xx, xy, yy, mean_x, mean_y = scatter(x, y, precision, own)
        if y is None:
            xy, yy, mean_y = (t.new_empty(0) for t in (xy, yy, mean_y))
        k = centred_norms(x, mean_x) if norms else mean_x.new_empty(0)
        l = centred_norms(y, mean_y) if norms and y is not None else mean_x.new_empty(0)  # noqa: E741
        return xx, xy, yy, k, l, mean_x, mean_y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        means = output[5:]
        ctx.mark_non_differentiable(*means)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], *means)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, y, mean_x, mean_y = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        given = [g is not None and g.numel() > 0 for g in grads[:5]]

        def formula(x: Tensor, y: Tensor | None, mean_x: Tensor, mean_y: Tensor, *present: Tensor) -> tuple[Any, Any]:
            rest = iter(present)
            xx, xy, yy, k, l = (next(rest) if has else None for has in given)  # noqa: E741
            with exactly(x.device):
                of_x = _pulled_back(x, mean_x, xx, k, y, mean_y, xy) if wanted[0] else None
                of_y = None
                if y is not None and wanted[1]:
                    of_y = _pulled_back(y, mean_y, yy, l, x, mean_x, None if xy is None else xy.mT)
            return of_x, of_y

        present = [g for g in grads[:5] if g is not None and g.numel() > 0]
        return *similarity.once(formula, x, y, mean_x, mean_y, *present), None, None, None


@dataclass(frozen=True)
class Scatter:
    """Of a pair: the centred scatter matrices, the squared lengths k and l of the centred samples, if wanted, and the means."""

    xx: Tensor
    xy: Tensor
    yy: Tensor
    k: Tensor
    l: Tensor  # noqa: E741
    mean_x: Tensor
    mean_y: Tensor


def scatter_of(x: Tensor, y: Tensor, *, precision: str = "high", own: bool = True, norms: bool = False) -> Scatter:
    """Differentiable; own=False leaves xx and yy out. If x is y nothing is computed twice."""
    found = _Scatter.apply(x, None if x is y else y, precision, own or x is y, norms)
    if x is y:
        xx, _, _, k, _, mean, _ = found
        return Scatter(xx, xx, xx, k, k, mean, mean)
    return Scatter(*found)


def whitened_scatter(x: Tensor, y: Tensor, pair: Scatter, tx: Tensor, ty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scatter matrices of the samples in the directions tx and ty: what rounding left of them from being 1 can be undone."""
    x, y = x.detach(), y.detach()
    kept = tx.shape[1]
    total = torch.zeros(kept + ty.shape[1], kept + ty.shape[1], dtype=torch.float64, device=x.device)
    sums = torch.zeros_like(total[0])
    with exactly(x.device):
        for part in _slices(x.shape[0], x.shape[1] + y.shape[1]):
            panel = torch.cat([_centred(x, pair.mean_x, part) @ tx, _centred(y, pair.mean_y, part) @ ty], 1)
            sums += panel.sum(0)
            for rows in _strips(total.shape[0], x.device):
                total[rows, rows.start :].addmm_(panel[:, rows].T, panel[:, rows.start :])
    total.addr_(sums, sums, alpha=-1 / x.shape[0])
    return _mirrored(total[:kept, :kept]), total[:kept, kept:], _mirrored(total[kept:, kept:])


# ---- fewer samples than neurons ----------------------------------------------------------------------------------------


def _centred_columns(x: Tensor, columns: slice) -> Tensor:
    """Some neurons of all samples, float64; a constant one is exactly 0."""
    part = x[:, columns].double()
    part = part - part[:1]
    return part - part.mean(0)


def inner_products(x: Tensor) -> Tensor:
    """[n, n]: of the centred samples."""
    n, d = x.shape
    total = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    with exactly(x.device):
        for columns in _slices(d, n):
            part = _centred_columns(x, columns)
            for rows in _strips(n, x.device):
                total[rows, rows.start :].addmm_(part[rows], part[rows.start :].T)
    return _mirrored(total)


def _pulled_from_products(x: Tensor, factor: Tensor) -> Tensor:
    """factor @ the centred x, itself centred, in x's dtype."""
    factor = factor - factor.mean(0)
    result = torch.empty_like(x)
    with exactly(x.device):
        for columns in _slices(x.shape[1], x.shape[0]):
            result[:, columns] = factor @ _centred_columns(x, columns)
    return result


class _InnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return inner_products(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return similarity.once(lambda grad, x: _pulled_from_products(x, grad + grad.mT), grad, *ctx.saved_tensors)


def inner_products_of(x: Tensor) -> Tensor:
    """Differentiable: [n, n] inner products of the centred samples."""
    return _InnerProducts.apply(x)


class _Principal(torch.autograd.Function):
    """The principal components [n, r], and what takes the gradient back."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        w, v = torch.linalg.eigh(inner_products(x))
        # What lies below this is rounding, and would be left out of the rank.
        kept = w > x.shape[0] * similarity.EPS * w[-1]
        w, v = w[kept].sqrt(), v[:, kept]
        return v * w, v / w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _back: Tensor) -> Any:
        # The rotation to these components counts as constant: no measure depends on it.
        return similarity.once(lambda grad, x, back: _pulled_from_products(x, grad @ back.mT), grad, *ctx.saved_tensors)


def principal(x: Tensor) -> Tensor:
    """x [n, d] in coordinates [n, r < n], the same but for a rotation; for n <= d. Differentiable."""
    return _Principal.apply(x)[0]


def rotated(x: Tensor) -> Tensor:
    """The same by QR, in [n, n]: without loss of what is small, but slower than `principal`."""
    centred = _centred_columns(x, slice(None))
    if not similarity.tracked(x):
        return torch.linalg.qr(centred.T, mode="r").R.T
    return centred @ torch.linalg.qr(centred.detach().T).Q
