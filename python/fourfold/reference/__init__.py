"""The meaning of every op in plain torch, written to be read; float64-capable, on any device, as slow as it may be.

``REFERENCES`` maps each op of ``torch.ops.fourfold`` to a function of the same arguments. Kernels are tested against these, and
CUDA tensors run them where the native implementation is missing.
"""

from collections.abc import Callable
from typing import Any

from . import blockdct, blockdct_rgb, coordconv

REFERENCES: dict[str, Callable[..., Any]] = {
    "block_dct": blockdct.block_dct,
    "block_idct": blockdct.block_idct,
    "_block_dct_backward": blockdct.block_dct_backward,
    "_block_idct_backward": blockdct.block_idct_backward,
    "_block_dct_out": blockdct.block_dct_out,
    "_block_idct_out": blockdct.block_idct_out,
    "dct_normalize": blockdct.dct_normalize,
    "rgb_to_dct": blockdct_rgb.rgb_to_dct,
    "_coord_tables": coordconv.coord_tables,
    "_coord_tables_backward": coordconv.coord_tables_backward,
    "_add_map_": coordconv.add_map_,
    "_batch_sum": coordconv.batch_sum,
}

__all__ = ["REFERENCES", "blockdct", "blockdct_rgb", "coordconv"]
