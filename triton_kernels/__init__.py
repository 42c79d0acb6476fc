"""CUDA implementations written in Triton, a file per family, a launcher per op and named as it. Needs Triton."""

from . import blockdct, coordconv
from .blockdct import dct_normalize
from .coordconv import add_map, batch_sum, coord_tables, coord_tables_backward

#: One list per family of (kernel, signature, constants, options): what CI compiles for every supported architecture.
COMPILED = {"blockdct": blockdct.COMPILED, "coordconv": coordconv.COMPILED}

__all__ = ["COMPILED", "add_map", "batch_sum", "coord_tables", "coord_tables_backward", "dct_normalize"]
