"""Superposed masks (Wortsman et al., 2020, arXiv 2006.14769): many tasks' masks over one weight.

masks are packed bits [T, N, 8 * ceil(K / 64)] of a weight [N, K]. A mask selects: what lies off it counts as 0, NaN too.
"""

import torch
from torch import Tensor

from ._dtypes import accumulate_type
from .maskmm import unpack_mask


def unpack_masks(masks: Tensor, k: int) -> Tensor:
    """Bits [T, N, ..] to bool [T, N, k]."""
    return unpack_mask(masks.flatten(0, 1), k).unflatten(0, masks.shape[:2])


# ---- all masks at once -----------------------------------------------------------------------------------------------


def superpose(weight: Tensor, masks: Tensor, alpha: Tensor) -> Tensor:
    """Weight times the sum over t of alpha[t] * mask t. The sum comes first: NaN times a sum of 0 is NaN."""
    total = torch.where(unpack_masks(masks, weight.shape[1]), alpha[:, None, None], 0).sum(0)
    return (weight.to(alpha.dtype) * total).to(weight.dtype)


def masked_dots(a: Tensor, b: Tensor, masks: Tensor) -> Tensor:
    """[T]: the sum of a * b [N, K] over the set bits of each mask."""
    kind = accumulate_type(a.dtype)
    return torch.where(unpack_masks(masks, a.shape[1]), a.to(kind) * b.to(kind), 0).sum((1, 2))


# ---- a mask per sample -----------------------------------------------------------------------------------------------


def of_samples(weight: Tensor, masks: Tensor, task: Tensor) -> Tensor:
    """[B, N, K]: what each sample's mask leaves of a weight [N, K], or of a [B, N, K]."""
    return torch.where(unpack_masks(masks[task], weight.shape[-1]), weight, 0)


def task_linear(x: Tensor, weight: Tensor, masks: Tensor, task: Tensor, bias: Tensor | None) -> Tensor:
    """y_b = x_b @ (weight on mask task_b).T + bias; x [B, .., K]."""
    kind = accumulate_type(x.dtype)
    y = torch.einsum("b...k,bnk->b...n", x.to(kind), of_samples(weight.to(kind), masks, task))
    return (y if bias is None else y + bias.to(kind)).to(x.dtype)


def task_linear_transposed(grad: Tensor, weight: Tensor, masks: Tensor, task: Tensor) -> Tensor:
    """x_b = grad_b @ (weight on mask task_b); grad [B, .., N]."""
    kind = accumulate_type(grad.dtype)
    x = torch.einsum("b...n,bnk->b...k", grad.to(kind), of_samples(weight.to(kind), masks, task))
    return x.to(grad.dtype)


def task_outer(grad: Tensor, x: Tensor, masks: Tensor, task: Tensor) -> Tensor:
    """[N, K]: the sum over samples of the outer product of grad_b and x_b on mask task_b."""
    kind = accumulate_type(x.dtype)
    products = torch.einsum("b...n,b...k->bnk", grad.to(kind), x.to(kind))
    return of_samples(products, masks, task).sum(0).to(x.dtype)
