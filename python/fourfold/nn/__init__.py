"""Drop-in modules."""

from .blockdct import BlockDCT2d, BlockIDCT2d

__all__ = ["BlockDCT2d", "BlockIDCT2d"]
