"""Masks from what training did to the weights: the criteria of Zhou et al. (2019, arXiv 1905.01067).

They are from their definitions in the paper. A criterion is a score per weight; the largest scores are kept.
"""

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ..reference._dtypes import accumulate_type
from . import _checks as check
from .maskmm import check_density, pack_mask, topk_mask, unpack_mask

SIGNED = ("large_final", "magnitude_increase")
CRITERIA = (
    "large_final",
    "small_final",
    "random",
    "large_init",
    "small_init",
    "large_init_large_final",
    "small_init_small_final",
    "magnitude_increase",
    "movement",
    *(f"{criterion}_{sign}" for criterion in SIGNED for sign in ("same_sign", "diff_sign")),
)
SCOPES = ("layer", "global")


def _scaled(final: Tensor, init: Tensor, rank: int) -> Tensor:
    """|final| times the number that makes its rank-th smallest element equal that of |init|.

    Then either of the two alone would cut off equally many weights.
    """
    cut_init, cut_final = (w.kthvalue(rank).values.double() for w in (init, final))
    ratio = torch.where(cut_final > 0, cut_init / cut_final, 1.0).nan_to_num(nan=1.0, posinf=math.inf)  # inf / inf: no ratio
    return torch.where(final == 0, 0.0, final.double() * ratio)  # 0 stays 0 where the number is infinite


def _score(criterion: str, init: Tensor, final: Tensor, keep: int) -> Tensor:
    """The criterion of flat weights, without its sign."""
    i, f = init.abs(), final.abs()
    if criterion == "large_final":
        return f
    if criterion == "small_final":
        return -f
    if criterion == "large_init":
        return i
    if criterion == "small_init":
        return -i
    if criterion == "large_init_large_final":
        return torch.minimum(_scaled(f, i, len(f) - keep + 1), i)
    if criterion == "small_init_small_final":
        return -torch.maximum(_scaled(f, i, keep), i)
    if criterion == "magnitude_increase":
        return f - i
    return (final - init).abs()  # movement


def _largest(scores: Tensor, keep: int) -> Tensor:
    """The bool mask of the keep largest of flat scores; among equals the lowest index wins."""
    n = len(scores)
    if keep == 0 or n == 0:
        return torch.zeros(n, dtype=torch.bool, device=scores.device)
    # In the middle between two counts, where no rounding of the density can reach the next one.
    return unpack_mask(topk_mask(scores[None], (keep - 0.5) / n, abs=False), n)[0]


def keep_by_criterion(
    criterion: str, init: Tensor, final: Tensor, keep: int, candidates: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """The bool mask of the `keep` weights that a criterion prefers, among the candidates (bool, None: all): all flat.

    A sign variant takes the weights of the right sign first, by the criterion, and then the others, by the criterion again.
    """
    if candidates is not None:  # only they are ranked, and only they say where two cuts agree
        kept = keep_by_criterion(criterion, init[candidates], final[candidates], keep, None, generator)
        return torch.zeros_like(candidates).masked_scatter(candidates, kept)
    if keep == 0:
        return torch.zeros(len(init), dtype=torch.bool, device=init.device)
    if criterion == "random":
        # On the CPU in float64: the same mask on every device, and no two scores are equal.
        return _largest(torch.rand(len(init), dtype=torch.float64, generator=generator).to(init.device), keep)
    work = torch.promote_types(accumulate_type(init.dtype), accumulate_type(final.dtype))
    init, final = init.to(work), final.to(work)
    base = next((base for base in SIGNED if criterion.startswith(base)), criterion)
    score = _score(base, init, final, keep)
    if criterion == base:
        return _largest(score, keep)
    first = (init.sign() == final.sign()) == criterion.endswith("same_sign")
    count = int(first.sum())
    if keep <= count:
        return torch.zeros_like(first).masked_scatter(first, _largest(score[first], keep))
    others = torch.zeros_like(first).masked_scatter(~first, _largest(score[~first], keep - count))
    return first | others


def _weights(op: str, name: str, weights: Any) -> list[Tensor]:
    weights = [weights] if isinstance(weights, Tensor) else weights
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise TypeError(f"{op}: {name} must be a Tensor or a list of them, got {type(weights).__name__}")
    for index, weight in enumerate(weights):
        label = name if len(weights) == 1 else f"{name}[{index}]"
        check.floating(op, label, weight)
        if weight.dim() < 2:
            raise ValueError(f"{op}: {label} must be [N, K] or have a convolution weight's shape, got {tuple(weight.shape)}")
        if weight.is_meta:
            raise ValueError(f"{op}: {label} is on meta, without values")
        nan = weight.isnan()
        if bool(nan.any()):
            first = int(nan.flatten().nonzero()[0])
            raise ValueError(f"{op}: {label} holds {int(nan.sum())} NaN, the first at flat index {first}")
    return [weight.detach() for weight in weights]


def check_criterion(op: str, criterion: Any, seed: Any) -> torch.Generator | None:
    """Raises unless the two go together; the generator of a seed."""
    check.one_of(op, "criterion", criterion, CRITERIA)
    if seed is None:
        return None
    if criterion != "random":
        raise ValueError(f"{op}: seed goes with criterion 'random', got {criterion!r}")
    if isinstance(seed, bool):
        raise TypeError(f"{op}: seed must be an int, got {seed!r}")
    seed = check.integer(op, "seed", seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"{op}: seed must lie in 0..2**64-1, got {seed}")
    return torch.Generator().manual_seed(seed)


@overload
def mask_from_criterion(
    w_init: Tensor, w_final: Tensor, criterion: str, density: float, *, scope: str = "layer", seed: int | None = None
) -> Tensor: ...
@overload
def mask_from_criterion(
    w_init: Sequence[Tensor],
    w_final: Sequence[Tensor],
    criterion: str,
    density: float,
    *,
    scope: str = "layer",
    seed: int | None = None,
) -> list[Tensor]: ...
def mask_from_criterion(
    w_init: Tensor | Sequence[Tensor],
    w_final: Tensor | Sequence[Tensor],
    criterion: str,
    density: float,
    *,
    scope: str = "layer",
    seed: int | None = None,
) -> Tensor | list[Tensor]:
    """The packed mask of the weights that training singled out (Zhou et al., 2019, arXiv 1905.01067).

    With i a weight's initial and f its final value, the weights with the largest of these are kept: large_final |f|,
    small_final -|f|, large_init |i|, small_init -|i|, large_init_large_final min(a |f|, |i|), small_init_small_final
    -max(a |f|, |i|) (a makes both cuts equally deep), magnitude_increase |f| - |i|, movement |f - i|, random. large_final and
    magnitude_increase also exist as .._same_sign and .._diff_sign: all weights of the other kind come after those of this kind.
    Among equals the lowest flat index wins.

    Args:
        w_init: weights [N, K], or a convolution's [N, ...], before training; one, or a list of them.
        w_final: the same after it.
        criterion: one of the names above.
        density: the fraction kept, in (0, 1]: n - int((1 - density) * n) of n weights.
        scope: "layer" keeps this fraction of each weight, "global" of a list of weights together.
        seed: of "random", an int in 0..2**64-1, the same mask on every device; None draws from torch's generator of the CPU.

    Returns:
        uint8 [N, 8 * ceil(K / 64)] as :func:`pack_mask`, or a list of these for lists.

    Raises:
        TypeError: a weight is not a floating tensor, or an option has the wrong type.
        ValueError: shapes differ, weights hold NaN, or an option is not one there is.
    """
    op = "mask_from_criterion"
    init, final = _weights(op, "w_init", w_init), _weights(op, "w_final", w_final)
    check.one_of(op, "scope", scope, SCOPES)
    generator = check_criterion(op, criterion, seed)
    density = check_density(op, density)
    single = isinstance(w_final, Tensor)
    if isinstance(w_init, Tensor) != single or len(init) != len(final):
        counts = ["a Tensor" if isinstance(w, Tensor) else f"a list of {len(w)}" for w in (w_init, w_final)]
        raise ValueError(f"{op}: w_init is {counts[0]} and w_final {counts[1]}; pass two Tensors, or two lists of one length")
    if single and scope == "global":
        raise ValueError(f"{op}: scope='global' ranks a list of weights together, got one Tensor; pass two lists")
    for index, (i, f) in enumerate(zip(init, final, strict=True)):
        label = "" if single else f" at {index}"
        if i.shape != f.shape:
            hint = "; did you mean w_init.t()?" if tuple(i.shape) == tuple(f.shape[::-1]) else ""
            raise ValueError(f"{op}: w_init {tuple(i.shape)} and w_final {tuple(f.shape)}{label} must have one shape{hint}")
        if i.device != f.device or (scope == "global" and f.device != final[0].device):
            place = i.device if i.device != f.device else final[0].device
            raise ValueError(f"{op}: weights are on {place} and {f.device}{label}; move one with .to()")

    groups = [list(range(len(final)))] if scope == "global" else [[index] for index in range(len(final))]
    masks: list[Tensor] = [torch.empty(0)] * len(final)
    for group in groups:
        if not group:
            continue
        sizes = [final[index].numel() for index in group]
        flat_init, flat_final = (torch.cat([w[index].flatten() for index in group]) for w in (init, final))
        keep = sum(sizes) - int((1 - density) * sum(sizes))
        flat = keep_by_criterion(criterion, flat_init, flat_final, keep, None, generator)
        for index, mask in zip(group, flat.split(sizes), strict=True):
            masks[index] = pack_mask(mask.reshape(final[index].shape))
    return masks[0] if single else masks
