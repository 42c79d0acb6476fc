"""Similarity of convolutional layers by canonical correlations at each spatial frequency."""

from typing import Any, Literal

import torch
from torch import Tensor

from . import _checks as check
from . import _similarity as similarity
from ._cca_frequencies import Frequencies


def dft_cca(x: Tensor, y: Tensor, *, reduce: Literal["mean"] | None = "mean") -> Tensor:
    """Mean canonical correlation of two convolutional layers at each spatial frequency.

    The images are centred and transformed by a 2-D DFT, and at each of the h * w frequencies the complex coefficients of their
    channels are compared by CCA over the n samples (Raghu et al., 2017, arXiv 1706.05806). For data whose distribution does not
    change when images are shifted this is CCA of all c * h * w neurons, at a fraction of its cost. Directions without variance,
    of dead or duplicate channels for instance, are left out frequency by frequency; a frequency at which a layer never varies
    has the value 0. Memory beyond the input does not depend on n.

    Args:
        x: float [n, c1, h, w], of any strides.
        y: float [n, c2, h, w], likewise; the dtypes may differ.
        reduce: "mean", or None for the values of all frequencies.

    Returns:
        float64: the mean over the frequencies, a scalar; or [h, w] in the order of ``torch.fft.fft2``. Differentiable with the
        ranks held fixed; its gradients are finite also where correlations are tied or zero.

    Raises:
        TypeError: if an input is not a floating tensor.
        ValueError: for shapes that do not match, NaN or infinite values, and n <= max(c1, c2), where every correlation is 1.

    Warns where n < 10 max(c1, c2), with the level that independent data would reach.
    """
    op = "dft_cca"
    for name, t in (("x", x), ("y", y)):
        check.floating(op, name, t)
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} must be [n, c, h, w], got shape {tuple(t.shape)}")
        if 0 in t.shape[1:]:
            raise ValueError(f"{op}: {name} must have channels and pixels, got shape {tuple(t.shape)}")
    if reduce is not None:
        check.one_of(op, "reduce", reduce, ("mean",))
    shapes = f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"{op}: x and y must have the same samples, {shapes}")
    if x.shape[2:] != y.shape[2:]:
        raise ValueError(f"{op}: x and y must have the same height and width, {shapes}; crop or pool the larger one")
    if x.device != y.device:
        raise ValueError(f"{op}: x and y must be on the same device, got {x.device} and {y.device}")
    n, c = len(x), max(x.shape[1], y.shape[1])
    if n <= c:
        raise ValueError(
            f"{op}: n must be larger than the number of channels, got n={n} samples for {c} channels: every correlation would "
            "be 1, whatever the data; use more samples, or cca with every pixel as a sample"
        )
    for name, t in (("x", x), ("y", y)):
        bad = int(torch.ops.fourfold._count_nonfinite(t.detach()))
        if bad:
            raise ValueError(f"{op}: {name} must be finite, got {bad} NaN or infinite values; leave out the samples with them")
    similarity.warn_chance(op, n, c)
    result = _Map.apply(x, y, _Kept()) if similarity.tracked(x, y) else _statistics(x, y).map("x", "y")
    return result if reduce is None else result.mean()


def _statistics(x: Tensor, y: Tensor) -> Frequencies:
    state = Frequencies({"x": x.shape[1], "y": y.shape[1]}, x.shape[2:], [("x", "y")], x.device)
    state.update({"x": x, "y": y})
    return state


class _Kept:
    """What the forward hands the backward besides tensors."""

    statistics: Frequencies


class _Map(torch.autograd.Function):
    """The map over the frequencies. Its gradient needs the statistics, which are kept, and no transformed image."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, kept: _Kept) -> Tensor:
        kept.statistics = _statistics(x, y)
        return kept.statistics.map("x", "y")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, ctx.kept = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        def formula(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return ctx.kept.statistics.gradients("x", "y", x, y, grad)

        return *similarity.once(formula, grad, *ctx.saved_tensors), None
