"""Facts of this build and this machine."""

from typing import Any

import torch

from . import _C, _load


def build_info() -> dict[str, Any]:
    """How this fourfold was built.

    Returns:
        compiler (str), torch (str: version of the headers), isa_tiers (list of str: tiers with kernels of their own),
        cuda_archs (list of str, empty without the CUDA library), libjpeg (str or None).
    """
    info: dict[str, Any] = _C.build_info()
    return info


def cpu_capability() -> str:
    """The instruction-set tier in use: "baseline", "avx2", "avx512", "avx512_bf16", "amx" or "neon".

    The best one this processor has, unless the environment variable FOURFOLD_CPU_CAPABILITY named a lower one before import.
    """
    tier: str = _C.cpu_capability()
    return tier


def has_jpeg() -> bool:
    """Whether this build was made with libjpeg, which reading and writing JPEG coefficients needs."""
    return build_info()["libjpeg"] is not None


def has_cuda() -> bool:
    """Whether the ops written in CUDA C++ run natively on a GPU here."""
    return torch.cuda.is_available() and "cuda" not in _load.missing


def has_triton() -> bool:
    """Whether the ops written in Triton run natively on a GPU here."""
    return torch.cuda.is_available() and "triton" not in _load.missing
