"""From a pair of layers in memory to the small float64 matrices that its similarity is made of, and back to gradients.

With many samples these are the centred scatter matrices, [d, d]; with few samples the n x n inner products of samples, so that
[d, d] is never made where d is larger than n. Data are read in blocks: nothing of the size of a layer is allocated but the
gradients.
"""

from collections.abc import Iterator, Sequence
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


def _panel(n: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for some of n samples of this width, and for their squared lengths."""
    samples = max(_SAMPLES, _PANEL // max(width, 1))
    if device.type == "cpu":
        samples //= 4  # its caches hold no more; float32 sums end sooner by themselves
    elif dtype == torch.float32:
        samples = _SAMPLES
    samples = min(n, samples)
    # Rows a power of 2 apart would fall into the same places of the caches.
    panel = torch.empty(samples, (width + 7) // 8 * 8 + 8, dtype=dtype, device=device)
    return panel[:, :width], panel.new_empty(samples)


def add_products_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ right, float64 [l, r], of samples [n, l] and [n, r]; of a panel by itself the upper triangle at least."""
    if left.device.type == "cpu":
        _gram_(left.unsqueeze(2), right.unsqueeze(2), total)
        return
    for rows in _strips(left.shape[1], left.device) if left is right else (slice(left.shape[1]),):
        column = rows.start or 0
        to, a, b = total[rows, column:], left[:, rows].T, right[:, column:]
        if a.dtype == torch.float64:
            to.addmm_(a, b)
        else:
            _add_wide_(to, a @ b)


def _mirrored(block: Tensor) -> Tensor:
    """A symmetric matrix from its upper triangle."""
    upper = block.triu()
    return upper + upper.triu(1).mT


def scatter(x: Tensor, y: Tensor | None, precision: str, own: bool = True) -> tuple[Tensor, ...]:
    """Centred scatter matrices (xx, xy, yy) of x [n, d] and y, the triangle counted once, their traces, and the means.

    Without y all of x. A mean is [2, d]: a number and what it lacks, so that x less the one and less the other is centred
    however far it lies from 0. own: False leaves xx and yy out; they are empty then. precision: "fast" becomes "high" where
    float32 cannot hold squares.
    """
    layers = [x] if y is None else [x, y]
    n, dtypes = x.shape[0], {t.dtype for t in layers}
    raw = precision == "fast" and own and len(dtypes) == 1 and x.dtype in (torch.bfloat16, torch.float16)
    with exactly(x.device):
        if raw and all(near_zero(t.unsqueeze(2)) for t in layers):
            pivots = [torch.zeros(t.shape[1], dtype=torch.float64, device=x.device) for t in layers]
            total = _raw_products(layers)
            squares = total.diagonal().split([t.shape[1] for t in layers])
            sums = [torch.cat([t.sum(0, dtype=torch.float64), s.sum()[None]]) for t, s in zip(layers, squares, strict=True)]
        else:
            pivots = [pivot_of(t.unsqueeze(2)) for t in layers]
            total, sums = _products(layers, pivots, precision, own)
    if precision == "fast" and own:
        traces = (part.sum() for part in total.diagonal().split([t.shape[1] for t in layers]))
        if any(similarity.beyond_range(trace, n, "fast") for trace in traces):
            return scatter(x, y, "high")
    means = [torch.stack([p, s[:-1] / n]) for p, s in zip(pivots, sums, strict=True)]
    powers = [s[-1] - s[:-1] @ m[1] for s, m in zip(sums, means, strict=True)]
    if not own:
        xy = total.addr_(sums[0][:-1], means[1][1], alpha=-1)
        return xy.new_empty(0), xy, xy.new_empty(0), *powers, *means
    total.addr_(torch.cat([s[:-1] for s in sums]), torch.cat([m[1] for m in means]), alpha=-1)
    d = x.shape[1]
    xx = _mirrored(total[:d, :d])
    if y is None:
        return xx, xx, xx, powers[0], powers[0], means[0], means[0]
    return xx, total[:d, d:].contiguous(), _mirrored(total[d:, d:]), *powers, *means


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
    """Sums of products of the layers' samples less the pivots, beside each other: [D, D], its upper triangle.

    And of each layer the sums of its samples and, beside them, of their squared lengths, [d + 1]. own: False has the products
    of the first layer and the second alone.
    """
    n, device = layers[0].shape[0], layers[0].device
    widths = [t.shape[1] for t in layers]
    panel, norms = _panel(n, sum(widths), torch.float64 if precision == "high" else torch.float32, device)
    sums = [torch.zeros(w + 1, dtype=torch.float64, device=device) for w in widths]
    shape = (sum(widths), sum(widths)) if own else widths
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    for first in range(0, n, panel.shape[0]):
        block = panel[: n - first]
        parts = block.split(widths, 1)
        for layer, pivot, of_layer, part in zip(layers, pivots, sums, parts, strict=True):
            _pack_samples(layer.unsqueeze(2), pivot, first, part, of_layer, norms[: n - first])
        add_products_(total, *((block, block) if own else parts))
    return total, sums


def _centred(x: Tensor, mean: Tensor, part: slice) -> Tensor:
    """Some samples, float64."""
    return (x[part].double() - mean[0]) - mean[1]


def centred_norms(x: Tensor, mean: Tensor) -> Tensor:
    """[n]: the squared lengths of the centred samples."""
    norms = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    for part in _slices(*x.shape):
        norms[part] = _centred(x, mean, part).square().sum(1)
    return norms


def _factors(width: int, first: Tensor | None, second: Tensor | None) -> list[tuple[slice, Tensor]]:
    """Columns of a panel, and what they are multiplied by: the first `width` ones and the others, together if they may."""
    if first is not None and second is not None:
        return [(slice(None), torch.cat([first, second]))]
    both = ((slice(width), first), (slice(width, None), second))
    return [(columns, factor) for columns, factor in both if factor is not None]


def _pulled_back(
    layers: list[Tensor],
    means: list[Tensor],
    factors: list[list[tuple[slice, Tensor]]],
    norms: list[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the layers that are wanted: of the centred layers beside each other some columns times a factor.

    norms: besides, the gradients of the squared lengths of each layer's centred samples, [n], or of their sum, [].
    """
    n, widths = layers[0].shape[0], [t.shape[1] for t in layers]
    results = [torch.empty_like(t) if has else None for t, has in zip(layers, wanted, strict=True)]
    panel, lengths = _panel(n, sum(widths), torch.float64, layers[0].device)
    sums = [t.new_empty(t.shape[1] + 1, dtype=torch.float64) for t in layers]
    shifts = [torch.zeros_like(mean[0]) for mean in means]
    for i, of_norms in enumerate(norms):
        if of_norms is not None and of_norms.dim():  # those of single norms don't sum up to 0 by themselves
            for part in _slices(*layers[i].shape):
                shifts[i] -= of_norms[part] @ _centred(layers[i], means[i], part)
            shifts[i] *= 2 / n
    for first in range(0, n, panel.shape[0]):
        block, part = panel[: n - first], slice(first, first + panel.shape[0])
        centred = block.split(widths, 1)
        for layer, mean, of_layer, to in zip(layers, means, sums, centred, strict=True):
            _pack_samples(layer.unsqueeze(2), mean[0], first, to, of_layer, lengths[: n - first])
            to.sub_(mean[1])
        for result, shift, of_result, of_norms, own in zip(results, shifts, factors, norms, centred, strict=True):
            if result is None:
                continue
            gradient = shift.expand(block.shape[0], -1).clone()
            for columns, factor in of_result:
                add_products_(gradient, block[:, columns].T, factor)
            if of_norms is not None:
                gradient.addcmul_(own, of_norms[part].unsqueeze(1) if of_norms.dim() else of_norms, value=2)
            result[part] = gradient
    return results


class _Scatter(torch.autograd.Function):
    """(xx, xy, yy, k, l, mean_x, mean_y); y None: y is x.

    k and l are the squared lengths of the centred samples if norms are wanted, else their sums.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor | None, precision: str, own: bool, norms: bool) -> tuple[Tensor, ...]:
        xx, xy, yy, k, l, mean_x, mean_y = scatter(x, y, precision, own)  # noqa: E741
        if norms:
            k = centred_norms(x, mean_x)
            l = centred_norms(y, mean_y) if y is not None else l  # noqa: E741
        if y is None:
            xy, yy, l, mean_y = (t.new_empty(0) for t in (xy, yy, l, mean_y))  # noqa: E741
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
            d = x.shape[1]
            own_x, own_y = (c if c is None else c + c.mT for c in (xx, yy))
            with exactly(x.device):
                if y is None:
                    return _pulled_back([x], [mean_x], [_factors(d, own_x, None)], [k], wanted[:1])[0], None
                factors = [_factors(d, own_x, xy if xy is None else xy.mT), _factors(d, xy, own_y)]
                of_x, of_y = _pulled_back([x, y], [mean_x, mean_y], factors, [k, l], wanted[:2])
                return of_x, of_y

        present = [g for g in grads[:5] if g is not None and g.numel() > 0]
        return *similarity.once(formula, x, y, mean_x, mean_y, *present), None, None, None


@dataclass(frozen=True)
class Scatter:
    """Of a pair: the centred scatter matrices, the squared lengths k and l of the centred samples, or their sums, the means."""

    xx: Tensor
    xy: Tensor
    yy: Tensor
    k: Tensor
    l: Tensor  # noqa: E741
    mean_x: Tensor
    mean_y: Tensor


def scatter_of(x: Tensor, y: Tensor, *, precision: str = "high", own: bool = True, norms: bool = False) -> Scatter:
    """Differentiable; own=False leaves xx and yy out, norms=True has every sample's. If x is y nothing is computed twice."""
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
            add_products_(total, panel, panel)
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
            part = _centred_columns(x, columns).T
            add_products_(total, part, part)
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
