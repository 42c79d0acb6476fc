"""CUDA implementations written in Triton, a file per family, a launcher per op and named as it. Needs Triton."""

from . import blockdct
from .blockdct import dct_normalize

#: One list per family of (kernel, signature, constants, options): what CI compiles for every supported architecture.
COMPILED = {"blockdct": blockdct.COMPILED}

__all__ = ["COMPILED", "dct_normalize"]
