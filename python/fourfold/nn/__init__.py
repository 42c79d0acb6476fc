"""Drop-in modules."""

from .blockdct import BlockDCT2d, BlockIDCT2d, RGBToDCT
from .coordconv import AddCoords, CoordConv1d, CoordConv2d, CoordConv3d, CoordConvTranspose2d
from .maskmm import MaskedConv2d, MaskedLinear, SparseLinear, SupermaskConv2d, SupermaskLinear, SuperposedLinear

__all__ = [
    "AddCoords",
    "BlockDCT2d",
    "BlockIDCT2d",
    "CoordConv1d",
    "CoordConv2d",
    "CoordConv3d",
    "CoordConvTranspose2d",
    "MaskedConv2d",
    "MaskedLinear",
    "RGBToDCT",
    "SparseLinear",
    "SupermaskConv2d",
    "SupermaskLinear",
    "SuperposedLinear",
]
