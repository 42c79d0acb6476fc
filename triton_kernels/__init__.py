"""CUDA implementations written in Triton, a file per family, a launcher per op and named as it. Needs Triton."""

from . import blockdct, cca, coordconv, maskmm
from .blockdct import dct_normalize, normalize_grids
from .cca import add_wide, count_nonfinite, gram, image_spectra, pack_samples, spectra_gram
from .coordconv import add_map, batch_sum, coord_tables, coord_tables_backward
from .maskmm import (
    apply_mask,
    bernoulli_mask,
    mask_gradients,
    masked_dots,
    masked_linear,
    masked_linear_backward,
    pack_mask,
    sddmm,
    superpose,
    task_linear,
    task_linear_transposed,
    task_outer,
    threshold_mask,
    unpack_mask,
)

#: One list per family of (kernel, signature, constants, options): what CI compiles for every supported architecture.
COMPILED = {
    "blockdct": blockdct.COMPILED,
    "coordconv": coordconv.COMPILED,
    "maskmm": maskmm.COMPILED,
    "cca": cca.COMPILED,
}

__all__ = [
    "COMPILED",
    "add_map",
    "add_wide",
    "apply_mask",
    "batch_sum",
    "bernoulli_mask",
    "coord_tables",
    "coord_tables_backward",
    "count_nonfinite",
    "dct_normalize",
    "gram",
    "image_spectra",
    "mask_gradients",
    "masked_dots",
    "masked_linear",
    "masked_linear_backward",
    "normalize_grids",
    "pack_mask",
    "pack_samples",
    "sddmm",
    "spectra_gram",
    "superpose",
    "task_linear",
    "task_linear_transposed",
    "task_outer",
    "threshold_mask",
    "unpack_mask",
]
