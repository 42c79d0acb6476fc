"""Masked matmul: masks as bits, masks made from scores, and weights that wear them.

Bits are uint8 [N, 8 * ceil(K / 64)]: bit k of a row is bit k % 8 of byte k // 8, pad bits are zero. A weight, scores or mask
[N, ...] counts as N rows of K. Nothing here looks at a value on the host, so that a GPU never waits.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtypes import accumulate_type

WORD = 0xFFFFFFFF


# ---- bits ------------------------------------------------------------------------------------------------------------


def row_bytes(k: int) -> int:
    """Bytes of a packed row of k bits: whole 64-bit words."""
    return 8 * ((k + 63) // 64)


def pack_mask(mask: Tensor) -> Tensor:
    """Bool [N, ...] to bits."""
    n, k = mask.shape[0], math.prod(mask.shape[1:])
    padded = F.pad(mask.reshape(n, k).to(torch.uint8), (0, 8 * row_bytes(k) - k))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.reshape(n, row_bytes(k), 8) * powers).sum(-1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, k: int) -> Tensor:
    """Bits to bool [N, k]."""
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] & powers) != 0).flatten(1)[:, :k]


# ---- masks from scores -----------------------------------------------------------------------------------------------


def philox(counters: int, seed: Tensor, offset: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., 2011) at counters offset, offset + 1, ..: [counters, 4] words of 32 bits as int64.

    Counter words 0 and 1 are the counter's 64 bits, 2 and 3 are zero; the key is the seed's 64 bits. int64 arithmetic wraps,
    which leaves the bits of unsigned arithmetic.
    """
    counter = torch.arange(counters, device=seed.device) + offset
    c0, c1 = counter & WORD, (counter >> 32) & WORD
    c2 = c3 = torch.zeros_like(counter)
    key = seed.reshape(())
    k0, k1 = key & WORD, (key >> 32) & WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & WORD ^ c1 ^ k0, p1 & WORD, (p0 >> 32) & WORD ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return torch.stack([c0, c1, c2, c3], 1)


def sigmoid(scores: Tensor) -> Tensor:
    """The probability in float32 by the sequence that every device repeats; within 2^-20 of the exact one.

    Each operation is rounded on its own, none is fused with the next; constants are rounded to float32. With a = min(|s|, 87)
    and n = round(a / ln 2), e^-a is a polynomial in r = n ln 2 - a times 2^-n.
    """
    s = scores.to(torch.float32)
    a = torch.where(s.abs() < 87, s.abs(), 87.0)
    n = (a * 1.44269502 + 12582912.0) - 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, ties to even
    r = (n * 0.693359375 - a) + n * -2.12194440e-4
    e = torch.full_like(r, 1 / 720)
    for c in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        e = e * r + c
    e = (e.view(torch.int32) - (n.to(torch.int32) << 23)).view(torch.float32)
    return torch.where(s < 0, e, 1.0) / (1.0 + e)


def bernoulli_mask(scores: Tensor, seed: Tensor, offset: int) -> Tensor:
    """Bit = word < sigmoid(score) * 2^32; word j of the counter offset + i belongs to flat index 4 i + j."""
    n = scores.numel()
    words = philox((n + 3) // 4, seed, offset).flatten()[:n].reshape(scores.shape)
    return pack_mask(words < (sigmoid(scores) * 2.0**32).to(torch.int64))


def topk_mask(scores: Tensor, density: float, abs: bool) -> Tensor:  # noqa: A002
    """The n - int((1 - density) * n) largest; among equals the lowest flat index wins."""
    n = scores.numel()
    values = scores.flatten()
    values = values.abs() if abs else values + 0.0  # -0 + 0 is +0
    order = values.sort(descending=True, stable=True).indices
    mask = torch.zeros(n, dtype=torch.bool, device=scores.device)
    return pack_mask(mask.index_fill(0, order[: n - int((1 - density) * n)], True).reshape(scores.shape))


def threshold_mask(scores: Tensor, threshold: float) -> Tensor:
    """Bit = score >= threshold, in float64: the threshold need not be a number of the scores' type."""
    return pack_mask(scores.to(torch.float64) >= threshold)


# ---- weights that wear a mask ----------------------------------------------------------------------------------------


def kept(bits: Tensor, weight: Tensor) -> Tensor:
    """The mask as bool of weight's shape."""
    return unpack_mask(bits, math.prod(weight.shape[1:])).reshape(weight.shape)


def apply_mask(weight: Tensor, bits: Tensor, scores: Tensor | None, signed: bool, rescale: str, dtype: torch.dtype) -> Tensor:
    """The effective weight: weight where the bit is set, else 0 whatever it holds.

    signed: times the sign of scores, 0 counting as +; rescale "dwr" or "dwr_grad": times n / ones.
    """
    mask = kept(bits, weight)
    result = weight.to(accumulate_type(weight.dtype))
    if signed and scores is not None:
        result = torch.where(scores < 0, -result, result)
    if rescale:
        result = result * (mask.numel() / mask.sum(dtype=torch.float64))
    return torch.where(mask, result, 0.0).to(dtype).contiguous()


def slope_of(scores: Tensor, slope: str) -> Tensor:
    """What the straight-through gradient is multiplied by."""
    if slope == "sigmoid":
        return scores.sigmoid() * (-scores).sigmoid()
    if slope == "sign":
        return torch.where(scores.isnan(), scores, scores.sign())
    return torch.ones_like(scores)


def mask_gradients(
    grad: Tensor,
    weight: Tensor,
    bits: Tensor,
    scores: Tensor | None,
    slope: str,
    signed: bool,
    rescale: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """From the gradient of the effective weight those of weight and scores, as wanted; the others are empty.

    That of weight is the effective weight's map again, which is its own adjoint. That of scores is what the mask would get if
    it were real numbers, times the slope: dense, since a dropped weight may come back. "dwr" takes n / ones for a constant,
    "dwr_grad" differentiates it too, through the mask.
    """
    of_weight, of_scores = weight.new_empty(0), weight.new_empty(0)
    if wanted[0]:
        of_weight = apply_mask(grad, bits, scores, signed, rescale, weight.dtype)
    if wanted[1] and scores is not None:
        work = torch.promote_types(accumulate_type(weight.dtype), accumulate_type(scores.dtype))
        mask, product = kept(bits, weight), grad.to(work) * weight.to(work)
        if rescale:
            ones = mask.sum(dtype=torch.float64)
            c = mask.numel() / ones
            through_count = torch.where(mask, product, 0.0).sum() * (c / ones)
            product = product * c - through_count if rescale == "dwr_grad" else product * c
        of_scores = (product * slope_of(scores.to(work), slope)).to(scores.dtype).contiguous()
    return of_weight, of_scores


def rows(x: Tensor) -> Tensor:
    """[.., K] as [M, K]."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def effective_for(
    x: Tensor, weight: Tensor, bits: Tensor, scores: Tensor | None, signed: bool, rescale: str
) -> tuple[Tensor, torch.dtype]:
    """The effective weight in the type that x is computed in, and that type.

    A weight of another type than x (float32 under autocast) is first rounded to x's.
    """
    work = accumulate_type(x.dtype)
    rounded = work if weight.dtype == x.dtype else x.dtype
    return apply_mask(weight, bits, scores, signed, rescale, rounded).to(work), work


def masked_linear(
    x: Tensor,  # [.., K]
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    slope: str,
    signed: bool,
    rescale: str,
) -> Tensor:
    """x @ effective weight^T + bias: [.., N]. slope concerns the gradient alone."""
    effective, work = effective_for(x, weight, bits, scores, signed, rescale)
    return F.linear(x.to(work), effective, None if bias is None else bias.to(work)).to(x.dtype)


def masked_linear_backward(
    grad: Tensor,  # [.., N]
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    scores: Tensor | None,
    slope: str,
    signed: bool,
    rescale: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and scores, as wanted; the others are empty."""
    effective, work = effective_for(x, weight, bits, scores, signed, rescale)
    of_x = (grad.to(work) @ effective).to(x.dtype) if wanted[0] else x.new_empty(0)
    of_effective = rows(grad.to(work)).mT @ rows(x.to(work))
    return of_x, *mask_gradients(of_effective, weight, bits, scores, slope, signed, rescale, wanted[1:])
