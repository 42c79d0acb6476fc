"""Ready recipes for :func:`fourfold.swap`: ``fourfold.swap(model, fourfold.recipes.coord_conv(), where="neck.**")``.

Each function here returns a dict {type of layer: function of the layer -> new layer}; dicts of several recipes can be joined
with ``|``. For a DCT front end of a ResNet see :func:`fourfold.models.dct_resnet50` and its ``backbone=``.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from . import nn as layers
from .nn.coordconv import _with_radius
from .ops import _checks as check
from .ops._coord_plan import CoordSpec
from .ops.maskmm import check_density, topk_mask
from .ops.maskmm_sparse import CHOICES
from .swapping import Left

__all__ = ["Left", "compress", "coord_conv", "masked", "plain", "supermask"]

Recipe: TypeAlias = Callable[[Any], Any]
Recipes: TypeAlias = dict[type[nn.Module], Recipe]


def coord_conv(*, with_r: bool = False, spec: CoordSpec | None = None) -> Recipes:
    """Every convolution knows where it is: Conv1d, 2d, 3d and ConvTranspose2d become CoordConv layers.

    Their outputs are the same bits at first, as the coordinates' weights are zero. Those are ``report.new_parameters``.

    Args:
        with_r: also the radius channel.
        spec: which coordinates; default ``CoordSpec()``.
    """
    _with_radius("recipes.coord_conv", spec, with_r)  # raises if they are not what they should be
    kinds: list[Any] = [layers.CoordConv1d, layers.CoordConv2d, layers.CoordConv3d, layers.CoordConvTranspose2d]

    def recipe(kind: Any) -> Recipe:
        return lambda layer: kind.from_conv(layer, with_r=with_r, spec=spec)

    return {kind._base: recipe(kind) for kind in kinds}


def masked(*, density: float | None = None) -> Recipes:
    """Linear and Conv2d become MaskedLinear and MaskedConv2d: what is masked is zero, and stays so in training.

    A layer that torch.nn.utils.prune has pruned keeps its mask, and its output. Any other keeps all weights, or with density
    the largest; that is asking for another output.

    Args:
        density: the fraction of weights to keep in each layer that is not pruned, in (0, 1]; None: all.
    """
    if density is not None:
        density = check_density("recipes.masked", density)

    def recipe(layer: Any) -> nn.Module:
        _refuse_pruned_bias("masked", layer)
        linear = isinstance(layer, nn.Linear)
        if _is_pruned(layer):
            return layers.MaskedLinear.from_pruned(layer) if linear else layers.MaskedConv2d.from_pruned(layer)
        mask = None if density is None else topk_mask(layer.weight.detach(), density)
        return layers.MaskedLinear.from_linear(layer, mask) if linear else layers.MaskedConv2d.from_conv(layer, mask)

    return _marked({nn.Linear: recipe, nn.Conv2d: recipe}, changes_output=density is not None)


def supermask(
    *,
    sampler: str = "bernoulli",
    density: float | None = None,
    rescale: str | None = None,
    signed: bool = False,
    eval_mask: str = "round",
) -> Recipes:
    """Linear and Conv2d become SupermaskLinear and SupermaskConv2d: weights are frozen, and training learns which to keep.

    The output changes. Where torch.nn.utils.prune has pruned the layer, the scores are drawn such that what it kept is kept at
    first: by the samplers "bernoulli" (in eval mode) and "threshold" exactly that, by "topk" that before anything else.

    Args:
        sampler: "bernoulli", "topk" or "threshold".
        density: the fraction that "topk" keeps.
        rescale: None, "dwr" or "dwr_grad".
        signed: for "topk", kept weights times the sign of their score.
        eval_mask: "round", "sample" or "topk", in eval mode of "bernoulli".
    """
    options = {"sampler": sampler, "density": density, "rescale": rescale, "signed": signed, "eval_mask": eval_mask}
    try:
        layers.SupermaskLinear(1, 1, device="meta", **options)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:  # options that do not go together
        raise type(error)(str(error).replace("SupermaskLinear", "recipes.supermask", 1)) from None

    def recipe(layer: Any) -> nn.Module:
        new: Any
        _refuse_pruned_bias("supermask", layer)
        source: Any = _without_pruning(layer) if _is_pruned(layer) else layer
        if isinstance(layer, nn.Linear):
            new = layers.SupermaskLinear.from_linear(source, **options)
        else:
            new = layers.SupermaskConv2d.from_conv(source, **options)
        if source is not layer:
            kept = layer.weight_mask != 0
            with torch.no_grad():
                # Not 0, which is kept, and apart by more than 16-bit scores are rounded.
                size = new.scores.abs().clamp(min=torch.finfo(new.scores.dtype).tiny)
                new.scores.copy_(torch.where(kept, size + 2 * size.max() if sampler == "topk" else size, -size))
        return new

    return _marked({nn.Linear: recipe, nn.Conv2d: recipe}, changes_output=True)


def plain() -> Recipes:
    """Masked, supermask and compressed layers become Linear and Conv2d again, with what they compute in eval mode."""

    def linear(layer: Any) -> nn.Module:
        new: nn.Module = layer.to_linear()
        return new

    def conv(layer: Any) -> nn.Module:
        new: nn.Module = layer.to_conv()
        return new

    return {
        layers.MaskedLinear: linear,
        layers.SupermaskLinear: linear,
        layers.SparseLinear: linear,
        layers.MaskedConv2d: conv,
        layers.SupermaskConv2d: conv,
    }


def compress(*, format: str = "auto", batch_hint: int = 1) -> Recipes:  # noqa: A002
    """Linear, MaskedLinear and SupermaskLinear become SparseLinear for inference, where that is faster; else they are left.

    What is zero counts as pruned, be it by torch.nn.utils.prune or for good. The report says of each layer what was chosen and
    why. Convolutions have no compressed form.

    Args:
        format: as of :func:`fourfold.compress`; "tune" measures each layer instead of looking it up.
        batch_hint: the number of rows that inputs will have, batch and positions together.
    """
    check.one_of("recipes.compress", "format", format, CHOICES)
    if check.integer("recipes.compress", "batch_hint", batch_hint) < 1:
        raise ValueError(f"recipes.compress: batch_hint must be at least 1, got {batch_hint}")

    def recipe(layer: Any) -> "nn.Module | Left":
        _refuse_pruned_bias("compress", layer)
        if isinstance(layer, (layers.MaskedLinear, layers.SupermaskLinear)):
            new = layer.compress(format=format, batch_hint=batch_hint)
        elif _is_pruned(layer):
            new = layers.SparseLinear.from_pruned(layer, format=format, batch_hint=batch_hint)
        else:
            new = layers.SparseLinear.from_linear(layer, format=format, batch_hint=batch_hint)
        if new.format == "dense" and format != "dense":
            return Left(f"dense is faster: {new.reason}")
        new.values.requires_grad_(False)
        new.bias = layer.bias  # itself, of a SupermaskLinear too
        return new

    return {nn.Linear: recipe, layers.MaskedLinear: recipe, layers.SupermaskLinear: recipe}


def _marked(recipes: Recipes, *, changes_output: bool) -> Recipes:
    for recipe in recipes.values():
        recipe.changes_output = changes_output  # type: ignore[attr-defined]
    return recipes


def _is_pruned(layer: nn.Module) -> bool:
    return "weight_orig" in layer._parameters and "weight_mask" in layer._buffers


def _refuse_pruned_bias(recipe: str, layer: nn.Module) -> None:
    if "bias_orig" in layer._parameters:
        raise ValueError(
            f"recipes.{recipe}: the bias is pruned, and a mask here is the weight's; make that permanent with "
            "torch.nn.utils.prune.remove(layer, 'bias')"
        )


def _without_pruning(layer: Any) -> nn.Module:
    """A stand-in for a pruned layer, with the weights as they were before."""
    kind: Any = type(layer)
    plain: Any = kind.__new__(kind)
    plain.__dict__.update(layer.__dict__)
    plain.__dict__.pop("weight", None)
    plain._parameters = {"weight": layer.weight_orig, "bias": layer._parameters.get("bias")}
    plain._buffers = {}
    return plain
