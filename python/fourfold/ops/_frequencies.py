"""Which frequencies an op keeps: ``freqs``, as a list or as a tensor of row-major indices."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from . import _checks as check

Freqs = Sequence[int] | None


def count(freqs: Freqs, n: int) -> int:
    return n * n if freqs is None else len(freqs)


def listed(op: str, freqs: Any, n: int) -> list[int] | None:
    """freqs as a checked list of row-major indices."""
    if freqs is None:
        return None
    if isinstance(freqs, Tensor):
        check_index(op, freqs)
    if isinstance(freqs, (Tensor, np.ndarray)):
        freqs = freqs.tolist()
    if not isinstance(freqs, (list, tuple, range)):
        raise TypeError(f"{op}: freqs must be a list of ints or a 1-D int64 tensor, got {type(freqs).__name__}")
    indices = [check.integer(op, "each of freqs", f) for f in freqs]
    for f in indices:
        if not 0 <= f < n * n:
            raise ValueError(f"{op}: freqs must lie in 0..{n * n - 1} for block_size {n}, got {f}")
    if not indices:
        raise ValueError(f"{op}: freqs must name at least one frequency, got []; pass None to keep all")
    if len(set(indices)) != len(indices):
        raise ValueError(f"{op}: freqs must not repeat, got {indices}")
    return indices


def check_index(op: str, freqs: Tensor) -> None:
    check.local(op, "freqs", freqs)
    if freqs.dtype != torch.int64 or freqs.dim() != 1:
        raise TypeError(
            f"{op}: freqs must be a list of ints or a 1-D int64 tensor, got {check.dtype_name(freqs)} of shape "
            f"{tuple(freqs.shape)}"
        )


def is_index(freqs: Any, op: str) -> TypeGuard[Tensor]:
    """Whether freqs is a tensor whose values can't be read now: traced, or on a device that would have to be waited for."""
    if not isinstance(freqs, Tensor) or not (torch.compiler.is_compiling() or freqs.device.type != "cpu"):
        return False
    check_index(op, freqs)
    return True


def select(coefs: Tensor, index: Tensor, n: int, layout: str) -> Tensor:
    """The frequencies of a 1-D int64 tensor, out of all."""
    if layout == "blocks":
        return coefs.index_select(-1, index)
    b, planes, h, w = coefs.shape
    return coefs.reshape(b, planes // (n * n), n * n, h, w).index_select(2, index).flatten(1, 2)


def spread(coefs: Tensor, index: Tensor, n: int, layout: str) -> Tensor:
    """The transpose of select: missing frequencies are zero."""
    if layout == "blocks":
        return coefs.new_zeros((*coefs.shape[:-1], n * n)).index_copy(-1, index, coefs)
    b, planes, h, w = coefs.shape
    kept = coefs.reshape(b, planes // index.shape[0], index.shape[0], h, w)
    full = coefs.new_zeros((b, kept.shape[1], n * n, h, w)).index_copy(2, index, kept)
    return full.flatten(1, 2)
