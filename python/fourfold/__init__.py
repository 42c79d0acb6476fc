"""fourfold: CoordConv, blockwise DCT, sparse masked matmul and fast CCA as native ops for PyTorch.

``import fourfold as ff``; functions are flat (``ff.block_dct``), modules are in ``ff.nn``. Every function that touches tensors
is an op of ``torch.ops.fourfold`` or composed of such ops; ``fourfold.reference`` holds their meaning in plain torch.
"""

from importlib.metadata import version as _version

from . import _load as _load
from . import compat as compat
from . import jpeg as jpeg
from . import metrics as metrics
from . import models as models
from . import nn as nn
from . import recipes as recipes
from . import reference as reference
from ._facts import build_info, cpu_capability, has_cuda, has_jpeg, has_triton
from .comparison import Comparison, compare
from .ops._coord_plan import CoordSpec
from .ops.blockdct import block_dct, block_idct, dct_normalize, zigzag
from .ops.blockdct_domain import dct_crop, dct_downscale2, dct_flip, dct_rot90
from .ops.blockdct_rgb import dct_to_rgb, rgb_to_dct
from .ops.cca import CCAResult, cca, cka, procrustes, pwcca, rv, svcca
from .ops.cca_dft import dft_cca
from .ops.cca_matrix import cka_matrix
from .ops.cca_streaming import Similarity, StreamingCCA
from .ops.coordconv import add_coords, coord_conv1d, coord_conv2d, coord_conv3d, coord_conv_transpose2d
from .ops.maskmm import (
    bernoulli_mask,
    masked_conv2d,
    masked_linear,
    pack_mask,
    supermask_conv2d,
    supermask_linear,
    threshold_mask,
    topk_mask,
    unpack_mask,
)
from .ops.maskmm_sparse import SparseWeight, compress, sddmm, sparse_linear
from .ops.maskmm_superposed import infer_task, superposed_linear, task_linear
from .ops.maskmm_tickets import mask_from_criterion
from .swapping import SwapReport, swap
from .tickets import prune_and_rewind

__version__ = _version("fourfold")

__all__ = [
    "CCAResult",
    "Comparison",
    "CoordSpec",
    "Similarity",
    "SparseWeight",
    "StreamingCCA",
    "SwapReport",
    "__version__",
    "add_coords",
    "bernoulli_mask",
    "block_dct",
    "block_idct",
    "build_info",
    "cca",
    "cka",
    "cka_matrix",
    "compare",
    "compat",
    "compress",
    "coord_conv1d",
    "coord_conv2d",
    "coord_conv3d",
    "coord_conv_transpose2d",
    "cpu_capability",
    "dct_crop",
    "dct_downscale2",
    "dct_flip",
    "dct_normalize",
    "dct_rot90",
    "dct_to_rgb",
    "dft_cca",
    "has_cuda",
    "has_jpeg",
    "has_triton",
    "infer_task",
    "jpeg",
    "mask_from_criterion",
    "masked_conv2d",
    "masked_linear",
    "metrics",
    "models",
    "nn",
    "pack_mask",
    "procrustes",
    "prune_and_rewind",
    "pwcca",
    "recipes",
    "reference",
    "rgb_to_dct",
    "rv",
    "sddmm",
    "sparse_linear",
    "supermask_conv2d",
    "supermask_linear",
    "superposed_linear",
    "svcca",
    "swap",
    "task_linear",
    "threshold_mask",
    "topk_mask",
    "unpack_mask",
    "zigzag",
]
