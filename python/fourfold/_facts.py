"""Facts of this build and this machine."""

from typing import Any

import torch

from . import _C, _load


def build_info() -> dict[str, Any]:
    """How this fourfold was built.

    Returns:
        compiler (str), torch (str: version of the headers), isa_tiers (list of str: tiers with kernels of their own),
        cuda_archs (list of str, empty without the CUDA library), libjpeg (str: its version; None where it is missing).
    """
    return {**_C.build_info(), "libjpeg": _load.jpeg.version() if _load.jpeg else None}


def cpu_capability() -> str:
    """The instruction-set tier in use: "baseline", "avx2", "avx512", "avx512_bf16", "amx" or "neon".

    The best one this processor has, unless the environment variable FOURFOLD_CPU_CAPABILITY named a lower one before import.
    """
    tier: str = _C.cpu_capability()
    return tier


def has_jpeg() -> bool:
    """Whether JPEG files can be read and written: this build was made with libjpeg, and it is there."""
    return _load.jpeg is not None


def has_cuda() -> bool:
    """Whether the ops written in CUDA C++ run natively on a GPU here."""
    return torch.cuda.is_available() and "cuda" not in _load.missing


def has_triton() -> bool:
    """Whether the ops written in Triton run natively on a GPU here."""
    return torch.cuda.is_available() and "triton" not in _load.missing
