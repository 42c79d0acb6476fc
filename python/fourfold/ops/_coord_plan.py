"""Where the coordinates of a CoordConv come from: CoordSpec, the coordinate values, and a convolution's plan.

A plan holds what a coordinate map needs besides the weights, one axis at a time. Nothing here depends on a parameter, so
coordinates and plans are kept between calls; everything that does depend on one is computed anew on every call.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference._dtypes import accumulate_type

ORDERS = ("ij", "ji")
POSITIONS = ("append", "prepend")
NORMS = ("corners", "dim", "centers", "none", "corners_swapped", "corners_quarter")
RADII = (None, "center", "offset0.5", "unitmax")

_PRESETS = {  # order, position, norm, and the radius with with_r=True
    "paper": ("ij", "append", "corners", "center"),
    "uber_legacy": ("ji", "append", "corners_swapped", "center"),
    "mkocabas": ("ij", "append", "corners", "offset0.5"),
    "walsvid": ("ij", "append", "corners", "offset0.5"),
    "wizaron": ("ij", "prepend", "corners", "unitmax"),
    "keras": ("ij", "append", "corners", "offset0.5"),
    "solo": ("ji", "append", "corners", None),
    "paddle": ("ji", "append", "corners", None),
    "paddle_develop": ("ji", "append", "corners_quarter", None),
}


@dataclass(frozen=True)
class CoordSpec:
    """Which coordinate channels a layer sees.

    Args:
        order: "ij": the first spatial axis comes first; "ji": the last one does.
        position: "append" puts the coordinates after x's channels, "prepend" before them (where there is a concatenation).
        norm: what index k of n becomes: "corners" 2k/(n-1) - 1, "dim" 2k/n - 1, "centers" (2k+1)/n - 1, "none" k,
            "corners_swapped" 2k/(m-1) - 1 with m the size of the mirrored axis, "corners_quarter" k/(2(n-1)) - 1. On an axis
            of size 1 it is 0 under every norm.
        r: one more channel, last: the distance from 0 ("center"), from the point (0.5, ..., 0.5) ("offset0.5"), or from 0
            divided by its maximum over the image ("unitmax"); None: no such channel.

    Raises:
        ValueError: a field has none of these values.
    """

    order: str = "ij"
    position: str = "append"
    norm: str = "corners"
    r: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("order", ORDERS), ("position", POSITIONS), ("norm", NORMS), ("r", RADII)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"CoordSpec.{name} must be one of {allowed}, got {getattr(self, name)!r}")

    @classmethod
    def preset(cls, name: str, with_r: bool = False) -> "CoordSpec":
        """The coordinates of a published implementation, with its radius channel if with_r.

        Args:
            name: paper, uber_legacy, mkocabas, walsvid, wizaron, keras, solo, paddle or paddle_develop.
            with_r: with the radius channel; solo, paddle and paddle_develop have none.

        Raises:
            ValueError: there is no such preset, or it has no radius.
        """
        if name not in _PRESETS:
            raise ValueError(f"CoordSpec.preset: name must be one of {tuple(_PRESETS)}, got {name!r}")
        order, position, norm, r = _PRESETS[name]
        if with_r and r is None:
            raise ValueError(f"CoordSpec.preset: {name!r} has no radius channel; use with_r=False")
        return cls(order, position, norm, r if with_r else None)

    def channels(self, rank: int) -> int:
        """The number of coordinate channels of an image with that many spatial axes."""
        return rank + (self.r is not None)

    def channel_of_axis(self, rank: int) -> tuple[int, ...]:
        """The coordinate channel of each spatial axis."""
        return tuple(range(rank)) if self.order == "ij" else tuple(reversed(range(rank)))


# ---- coordinates -----------------------------------------------------------------------------------------------------


def _ends(n: int, mirrored: int, norm: str) -> tuple[float, float]:
    """The value of the first index and the step from one to the next, on an axis of n; mirrored: size of the mirrored axis."""
    if n == 1 or (norm == "corners_swapped" and mirrored == 1):
        return 0.0, 0.0
    if norm == "corners":
        return -1.0, 2 / (n - 1)
    if norm == "dim":
        return -1.0, 2 / n
    if norm == "centers":
        return 1 / n - 1, 2 / n
    if norm == "none":
        return 0.0, 1.0
    if norm == "corners_swapped":
        return -1.0, 2 / (mirrored - 1)
    return -1.0, 0.5 / (n - 1)


def _values_of_any_size(index: Tensor, mirrored: Tensor, norm: str) -> Tensor:
    """The same for sizes that an exported graph leaves open, size 1 among them; index, mirrored: 0, 1, .. along both axes."""
    last = index[-1]
    of = mirrored[-1] if norm == "corners_swapped" else last
    steps = of.clamp(min=1)
    if norm == "none":
        values = index
    elif norm == "dim":
        values = 2 * index / (last + 1) - 1
    elif norm == "centers":
        values = (2 * index + 1) / (last + 1) - 1
    elif norm == "corners_quarter":
        values = index / (2 * steps) - 1
    else:
        values = 2 * index / steps - 1
    return torch.where((last > 0) & (of > 0), values, torch.zeros_like(values))


def axis_values(size: Sequence[int], axis: int, spec: CoordSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The coordinates along one axis of an image of that spatial size, rounded once to dtype: [size[axis]]."""
    n, mirrored = size[axis], size[len(size) - 1 - axis]
    index = torch.arange(n, dtype=torch.float64, device=device)
    if type(n) is int and type(mirrored) is int:
        first, step = _ends(n, mirrored, spec.norm)
        return (index * step + first).to(dtype)
    other = torch.arange(mirrored, dtype=torch.float64, device=device)
    return _values_of_any_size(index, other, spec.norm).to(dtype)


def radius(size: Sequence[int], spec: CoordSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The radius channel [*size]."""
    centre = 0.5 if spec.r == "offset0.5" else 0.0
    total = torch.zeros((), dtype=torch.float64, device=device)
    for axis in range(len(size)):
        values = axis_values(size, axis, spec, torch.float64, device) - centre
        total = total + (values * values).reshape(-1, *[1] * (len(size) - 1 - axis))
    distance = total.sqrt()
    if spec.r == "unitmax":
        largest = distance.max()
        distance = distance / torch.where(largest > 0, largest, torch.ones_like(largest))
    return distance.to(dtype)


def _channels(size: Sequence[int], spec: CoordSpec, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The coordinate channels of an image of that spatial size, each [*size]."""
    rank = len(size)
    channels = [
        axis_values(size, axis, spec, dtype, device).reshape(-1, *[1] * (rank - 1 - axis)).expand(tuple(size))
        for axis in (range(rank) if spec.order == "ij" else reversed(range(rank)))
    ]
    if spec.r is not None:
        channels.append(radius(size, spec, dtype, device))
    return channels


def coordinates(size: Sequence[int], spec: CoordSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All coordinate channels of an image of that spatial size: [nc, *size]."""
    return torch.stack(_channels(size, spec, dtype, device))


def coordinate_batch(size: Sequence[int], spec: CoordSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """coordinates() as a convolution's input: [1, nc, *size].

    Not coordinates()[None]: inductor can't order the strides of a view with symbolic sizes that it keeps for backward.
    """
    return torch.cat([channel[None, None] for channel in _channels(size, spec, dtype, device)], 1)


# ---- plans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """A convolution as its coordinates see it; tuples of one number per spatial axis.

    Output o of an axis reads the input at o * stride - before + tap * dilation; a transposed one at the i for which
    i * stride - before + tap * dilation is o. mode: what lies outside, "zeros", "reflect", "replicate" or "circular", or
    "transposed".
    """

    size: tuple[int, ...]
    out_size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    dilation: tuple[int, ...]
    mode: str

    def source(self, axis: int) -> Tensor:
        """The input index that output o reads at tap k, or -1: int64 [out, k]."""
        n = self.size[axis]
        o = torch.arange(self.out_size[axis], device="cpu")[:, None]
        tap = torch.arange(self.kernel[axis], device="cpu")[None] * self.dilation[axis]
        if self.mode == "transposed":
            i = o + self.before[axis] - tap
            inside = (i % self.stride[axis] == 0) & (i >= 0) & (i < n * self.stride[axis])
            return torch.where(inside, i.div(self.stride[axis], rounding_mode="floor"), -1)
        i = o * self.stride[axis] - self.before[axis] + tap
        if self.mode == "zeros":
            return torch.where((i >= 0) & (i < n), i, -1)
        if self.mode == "replicate":
            return i.clamp(0, n - 1)
        if self.mode == "circular":
            return i % n
        i = i.abs()
        return torch.where(i < n, i, 2 * (n - 1) - i)


@dataclass(frozen=True)
class Plan:
    """What a coordinate map needs besides the weights.

    Outputs of an axis at which the same taps fall inside the image form a class: few, since only borders (and the phases of
    a transposed convolution) differ. The map of axis a then depends on its own position and on the others' classes only.

    taps     per axis [k, out]: the coordinate that a tap reads, 0 outside; of all axes, flattened one after the other.
    valid    per axis [classes, k]: 1 where the tap falls inside; likewise.
    classes  per axis [out]: int32 number of the output's class; likewise.
    """

    geometry: Geometry
    spec: CoordSpec
    taps: Tensor
    valid: Tensor
    classes: Tensor
    class_count: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def table_length(self) -> int:
        """Columns of the tables: for each axis its outputs times the classes of the others."""
        return sum(
            out * math.prod(self.class_count[:axis] + self.class_count[axis + 1 :])
            for axis, out in enumerate(self.geometry.out_size)
        )


@lru_cache(maxsize=512)
def plan_of(geometry: Geometry, spec: CoordSpec, dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan of a convolution; dtype: that of the map, float32 or float64."""
    cpu = torch.device("cpu")
    # Kept tensors must serve autograd later, whatever mode the first call was made in.
    with torch.inference_mode(False), torch.no_grad():
        taps, valid, classes = [], [], []
        for axis in range(len(geometry.size)):
            source = geometry.source(axis)
            inside = source >= 0
            values = axis_values(geometry.size, axis, spec, dtype, cpu)
            taps.append(torch.where(inside, values[source.clamp_min(0)], 0).T)
            patterns, number = torch.unique(inside, dim=0, return_inverse=True)
            valid.append(patterns.to(dtype))
            classes.append(number.to(torch.int32))
        return Plan(
            geometry,
            spec,
            torch.cat([t.reshape(-1) for t in taps]).to(device),
            torch.cat([v.reshape(-1) for v in valid]).to(device),
            torch.cat(classes).to(device),
            tuple(v.shape[0] for v in valid),
            spec.channel_of_axis(len(geometry.size)),
        )


@lru_cache(maxsize=8)  # whole images, unlike plans
def kept_radius(size: tuple[int, ...], spec: CoordSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """radius() kept between calls, as a convolution's input: [1, 1, *size]."""
    with torch.inference_mode(False), torch.no_grad():
        return radius(size, spec, dtype, torch.device("cpu")).to(device)[None, None]


@lru_cache(maxsize=8)
def kept_coordinates(
    size: tuple[int, ...],
    spec: CoordSpec,
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool = False,
    samples: int = 1,
) -> Tensor:
    """coordinates() kept between calls for that many samples, in one of the two memory orders: [samples, nc, *size].

    A dtype of less than its accumulation type gets them rounded to that first.
    """
    with torch.inference_mode(False), torch.no_grad():
        coords = coordinates(size, spec, accumulate_type(dtype), torch.device("cpu")).to(device, dtype)
        coords = coords.expand(samples, *coords.shape)
        return coords.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else coords.contiguous()


# ---- padding ---------------------------------------------------------------------------------------------------------


def pad_widths(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Paddings per axis in the order of F.pad: the last axis first."""
    return list(itertools.chain.from_iterable(zip(reversed(before), reversed(after), strict=True)))


def pad(x: Tensor, before: Sequence[int], after: Sequence[int], mode: str) -> Tensor:
    """x [B, C, *size] padded as a padding_mode says."""
    return F.pad(x, pad_widths(before, after), mode="constant" if mode == "zeros" else mode)
