"""Modules of the blockwise DCT."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import _checks as check
from ..ops import _frequencies as frequencies
from ..ops.blockdct import block_dct, block_idct, check_options
from ..ops.blockdct_rgb import check_options as check_rgb_options
from ..ops.blockdct_rgb import rgb_to_dct


def _repr_of(freqs: list[int] | None, scale: Tensor | None) -> list[str]:
    parts = []
    if freqs is not None:
        parts.append(f"freqs={freqs}" if len(freqs) <= 8 else f"freqs=[{len(freqs)} frequencies]")
    if scale is not None:
        parts.append(f"scale={tuple(scale.shape)}")
    return parts


class _Scaled(torch.nn.Module):
    """What the modules with a scale share: a buffer, or the Parameter that was given."""

    scale: Tensor | None
    _given: Tensor | None  # the values of scale on construction, on the CPU; None where it had none

    def _init_scale(self, scale: Any, device: Any, dtype: torch.dtype | None) -> None:
        name = type(self).__name__
        if scale is not None and not isinstance(scale, Tensor):
            scale = check.numbers(name, "scale", scale, dtype or torch.get_default_dtype(), torch.device("cpu"))
            device = device or torch.get_default_device()
        self._given = None if scale is None or scale.is_meta else scale.detach().to("cpu", copy=True)
        if isinstance(scale, torch.nn.Parameter):
            wanted = torch.device(device or scale.device)
            moves = wanted.type != scale.device.type or wanted.index not in {None, scale.device.index}
            if moves or (dtype or scale.dtype) != scale.dtype:
                raise ValueError(
                    f"{name}: scale is a Parameter, which is taken as it is, {check.dtype_name(scale)} on {scale.device}; "
                    "leave out device and dtype, and move the module with .to()"
                )
            self.scale = scale
            return
        if scale is not None:
            scale = check.numbers(name, "scale", scale, dtype or scale.dtype, torch.device(device or scale.device))
        self.register_buffer("scale", scale)

    def reset_parameters(self) -> None:
        """Puts scale back to the values that the constructor was given; to 1 where it was given a meta tensor."""
        if self.scale is not None:
            with torch.no_grad():
                self.scale.fill_(1) if self._given is None else self.scale.copy_(self._given)


class _BlockTransform(_Scaled):
    """What both directions share: the arguments of the function, checked on construction."""

    block_size: int
    layout: str
    freqs: list[int] | None
    shift: float

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
        self._init_scale(scale, device, dtype)
        for option, value in check_options(type(self).__name__, block_size, layout, freqs, self.scale, shift).items():
            setattr(self, option, value)

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
        parts += _repr_of(self.freqs, self.scale)
        if self.shift:
            parts.append(f"shift={self.shift}")
        return ", ".join(parts)


class BlockDCT2d(_BlockTransform):
    """Module form of :func:`fourfold.block_dct`: [B, C, H, W] to coefficients.

    ``scale`` is a buffer of this ``device`` and ``dtype``, or trained if given as a ``torch.nn.Parameter``, which is taken as
    it is; the other arguments are fixed. ``reset_parameters`` puts scale back to what was given.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> coefficients in the layout."""
        return block_dct(x, **self._options())


class BlockIDCT2d(_BlockTransform):
    """Module form of :func:`fourfold.block_idct`: coefficients to [B, C, H, W], the inverse of :class:`BlockDCT2d`."""

    def forward(self, y: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """y in the layout -> image [B, C, H, W]; size: (H, W) to crop to."""
        return block_idct(y, size=size, **self._options())


class RGBToDCT(_Scaled):
    """Module form of :func:`fourfold.rgb_to_dct`: RGB [B, 3, H, W] to (y, cbcr), for ``network(*module(rgb))``.

    ``scale`` is a buffer, or trained if given as a ``torch.nn.Parameter``; the other arguments are fixed. ``dtype`` is that of
    the results and stays when the module is moved to another; ``device`` is that of the buffer, as in :class:`BlockDCT2d`.
    """

    def __init__(
        self,
        *,
        subsampling: str = "4:2:0",
        layout: str = "planar",
        freqs: Sequence[int] | Tensor | None = None,
        scale: Tensor | Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        super().__init__()
        check_rgb_options("RGBToDCT", subsampling, layout, dtype)
        self.subsampling, self.layout, self.dtype = subsampling, layout, dtype
        self.freqs = frequencies.listed("RGBToDCT", freqs, 8)
        f = frequencies.count(self.freqs, 8)
        self._init_scale(scale, device, None if isinstance(scale, Tensor) else torch.float64)
        if self.scale is not None and tuple(self.scale.shape) not in {(f,), (3, f)}:
            raise ValueError(f"RGBToDCT: scale must be [{f}] or [3, {f}], got {list(self.scale.shape)}")

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults."""
        parts = [f"subsampling={self.subsampling!r}", f"layout={self.layout!r}"]
        parts += _repr_of(self.freqs, self.scale)
        if self.dtype != torch.float32:
            parts.append(f"dtype={self.dtype}")
        return ", ".join(parts)

    def forward(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """rgb [B, 3, H, W], uint8 or floating in 0..255 -> (y, cbcr)."""
        return rgb_to_dct(
            rgb, subsampling=self.subsampling, layout=self.layout, freqs=self.freqs, scale=self.scale, dtype=self.dtype
        )
