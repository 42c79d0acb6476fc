"""Modules of the blockwise DCT."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import _checks as check
from ..ops.blockdct import block_dct, block_idct, check_options


class _BlockTransform(torch.nn.Module):
    """What both directions share: the arguments of the function, checked on construction."""

    block_size: int
    layout: str
    freqs: list[int] | None
    shift: float
    scale: Tensor | None

    def __init__(
        self,
        block_size: int = 8,
        *,
        layout: str = "planar",
        freqs: Sequence[int] | Tensor | None = None,
        scale: Tensor | Sequence[float] | None = None,
        shift: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if scale is not None and not isinstance(scale, Tensor):
            scale = check.numbers(name, "scale", scale, dtype or torch.get_default_dtype(), torch.device(device or "cpu"))
        elif scale is not None and not isinstance(scale, torch.nn.Parameter):
            scale = check.numbers(name, "scale", scale, dtype or scale.dtype, torch.device(device or scale.device))
        for option, value in check_options(name, block_size, layout, freqs, scale, shift).items():
            setattr(self, option, value)
        if isinstance(scale, torch.nn.Parameter):
            self.scale = scale
        else:
            self.register_buffer("scale", scale)

    def _options(self) -> dict[str, Any]:
        return {
            "block_size": self.block_size,
            "layout": self.layout,
            "freqs": self.freqs,
            "scale": self.scale,
            "shift": self.shift,
        }

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults."""
        parts = [f"block_size={self.block_size}", f"layout={self.layout!r}"]
        if self.freqs is not None:
            parts.append(f"freqs={self.freqs}" if len(self.freqs) <= 8 else f"freqs=[{len(self.freqs)} frequencies]")
        if self.scale is not None:
            parts.append(f"scale={tuple(self.scale.shape)}")
        if self.shift:
            parts.append(f"shift={self.shift}")
        return ", ".join(parts)


class BlockDCT2d(_BlockTransform):
    """Module form of :func:`fourfold.block_dct`: [B, C, H, W] to coefficients.

    ``scale`` is a buffer, or trained if given as a ``torch.nn.Parameter``; the other arguments are fixed.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> coefficients in the layout."""
        return block_dct(x, **self._options())


class BlockIDCT2d(_BlockTransform):
    """Module form of :func:`fourfold.block_idct`: coefficients to [B, C, H, W], the inverse of :class:`BlockDCT2d`."""

    def forward(self, y: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """y in the layout -> image [B, C, H, W]; size: (H, W) to crop to."""
        return block_idct(y, size=size, **self._options())
