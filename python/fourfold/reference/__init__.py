"""The meaning of every op in plain torch, written to be read; float64-capable, on any device, as slow as it may be.

``REFERENCES`` maps each op of ``torch.ops.fourfold`` to a function of the same arguments. Kernels are tested against these, and
CUDA tensors run them where the native implementation is missing.
"""

from collections.abc import Callable
from typing import Any

from . import blockdct, blockdct_rgb, cca, cca_ops, coordconv, maskmm, maskmm_sparse, maskmm_superposed

REFERENCES: dict[str, Callable[..., Any]] = {
    "block_dct": blockdct.block_dct,
    "block_idct": blockdct.block_idct,
    "_block_dct_backward": blockdct.block_dct_backward,
    "_block_idct_backward": blockdct.block_idct_backward,
    "_block_dct_out": blockdct.block_dct_out,
    "_block_idct_out": blockdct.block_idct_out,
    "dct_normalize": blockdct.dct_normalize,
    "_normalize_grids": blockdct._normalize_grids,
    "rgb_to_dct": blockdct_rgb.rgb_to_dct,
    "_coord_tables": coordconv.coord_tables,
    "_coord_tables_backward": coordconv.coord_tables_backward,
    "_add_map_": coordconv.add_map_,
    "_batch_sum": coordconv.batch_sum,
    "pack_mask": maskmm.pack_mask,
    "unpack_mask": maskmm.unpack_mask,
    "bernoulli_mask": maskmm.bernoulli_mask,
    "topk_mask": maskmm.topk_mask,
    "threshold_mask": maskmm.threshold_mask,
    "_apply_mask": maskmm.apply_mask,
    "_mask_gradients": maskmm.mask_gradients,
    "_masked_linear": maskmm.masked_linear,
    "_masked_linear_backward": maskmm.masked_linear_backward,
    "_mask_starts": maskmm_sparse.mask_starts,
    "_mask_columns": maskmm_sparse.mask_columns,
    "_gather_mask": maskmm_sparse.gather_mask,
    "_scatter_mask": maskmm_sparse.scatter_mask,
    "_sparse_linear": maskmm_sparse.sparse_linear,
    "_sparse_linear_transposed": maskmm_sparse.sparse_linear_transposed,
    "sddmm": maskmm_sparse.sddmm,
    "_superpose": maskmm_superposed.superpose,
    "_masked_dots": maskmm_superposed.masked_dots,
    "task_linear": maskmm_superposed.task_linear,
    "_task_linear_transposed": maskmm_superposed.task_linear_transposed,
    "_task_outer": maskmm_superposed.task_outer,
    "_pack_samples": cca_ops.pack_samples,
    "_add_wide_": cca_ops.add_wide_,
    "_count_nonfinite": cca_ops.count_nonfinite,
    "_gram_": cca_ops.gram_,
    "_image_spectra": cca_ops.image_spectra,
    "_spectra_gram_": cca_ops.spectra_gram_,
}

__all__ = [
    "REFERENCES",
    "blockdct",
    "blockdct_rgb",
    "cca",
    "cca_ops",
    "coordconv",
    "maskmm",
    "maskmm_sparse",
    "maskmm_superposed",
]
