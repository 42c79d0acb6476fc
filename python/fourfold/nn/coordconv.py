"""CoordConv layers: torch.nn's convolutions with one more parameter, ``coord_weight``."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .._pages import see
from ..ops import _checks as check
from ..ops._coord_plan import CoordSpec
from ..ops.coordconv import (
    ACTIVATIONS,
    PADDING_MODES,
    add_coords,
    check_sizes,
    coord_conv,
    coord_conv_transpose,
)

_Layer = TypeVar("_Layer", bound="_CoordLayer")


def _with_radius(owner: str, spec: CoordSpec | None, with_r: bool) -> CoordSpec:
    if not isinstance(with_r, bool):
        raise TypeError(f"{owner}: with_r must be a bool, got {with_r!r}; a radius of another kind is CoordSpec(r=...)")
    if spec is not None and not isinstance(spec, CoordSpec):
        raise TypeError(
            f"{owner}: spec must be a CoordSpec, got {type(spec).__name__}; for a preset pass CoordSpec.preset(name)"
        )
    spec = spec or CoordSpec()
    return replace(spec, r="center") if with_r and spec.r is None else spec


class AddCoords(nn.Module):
    """Module form of :func:`fourfold.add_coords`: [B, C, *size] to [B, C + nc, *size].

    Args:
        with_r: also the radius channel: about the centre, unless spec names another.
        spec: which coordinates; default ``CoordSpec()``.
    """

    def __init__(self, *, with_r: bool = False, spec: CoordSpec | None = None) -> None:
        super().__init__()
        self.spec = _with_radius(type(self).__name__, spec, with_r)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C + nc, *size]."""
        return add_coords(x, self.spec)

    def extra_repr(self) -> str:
        """The coordinates."""
        return _spec_repr(self.spec) or "spec=CoordSpec()"


def _spec_repr(spec: CoordSpec) -> str:
    fields = [
        f"{k}={getattr(spec, k)!r}" for k in ("order", "position", "norm", "r") if getattr(spec, k) != getattr(CoordSpec(), k)
    ]
    return f"spec=CoordSpec({', '.join(fields)})" if fields else ""


class _CoordLayer(nn.Module):
    """What the CoordConv layers add to the torch.nn layer that they extend."""

    _base: ClassVar[type[nn.Module]]
    _rank: ClassVar[int]
    _channel_dim: ClassVar[int] = 1  # of weight and coord_weight: where x's channels and the coordinates stand
    _version = 1

    weight: Tensor
    bias: Tensor | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    transposed: bool
    spec: CoordSpec
    activation: str | None
    coord_weight: nn.Parameter

    @classmethod
    def _check_arguments(
        cls, in_channels: Any, out_channels: Any, groups: Any, padding_mode: Any, modes: tuple[str, ...], **sizes: Any
    ) -> None:
        """What torch.nn's constructor accepts and its forward does not, or refuses without saying what came."""
        name = cls.__name__
        for argument, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if check.integer(name, argument, channels) < 0:
                raise ValueError(f"{name}: {argument} must be at least 0, got {channels}")
        groups = check.integer(name, "groups", groups)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{name}: groups must divide in_channels and out_channels, got groups={groups} for {in_channels} and "
                f"{out_channels}; take a divisor of {math.gcd(in_channels, out_channels)}"
            )
        check.one_of(name, "padding_mode", padding_mode, modes)
        # As torch.nn does; to the functions a string is no sequence.
        listed = {key: tuple(v) if isinstance(v, Iterable) and not isinstance(v, str) else v for key, v in sizes.items()}
        check_sizes(name, cls._rank, **listed)

    def _init_coords(self, with_r: bool, spec: CoordSpec | None, activation: str | None) -> None:
        name = type(self).__name__
        if activation is not None:
            check.one_of(name, "activation", activation, ACTIVATIONS)
        self.spec, self.activation = _with_radius(name, spec, with_r), activation
        nc = self.spec.channels(len(self.kernel_size))
        shape = (nc, self.out_channels) if self.transposed else (self.out_channels, nc)
        empty = torch.empty(*shape, *self.kernel_size, device=self.weight.device, dtype=self.weight.dtype)
        self.coord_weight = nn.Parameter(empty)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters as a concatenating layer would: fan-in counts the coordinates."""
        if not hasattr(self, "coord_weight"):
            return  # called by the torch.nn layer's constructor, before there is one
        channels = self.weight.shape[1] + self.coord_weight.shape[self._channel_dim]
        bound = 1 / math.sqrt(max(1, channels * math.prod(self.kernel_size)))
        for parameter in (self.weight, self.coord_weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """That of the torch.nn layer, and what differs from the defaults here."""
        parts = [super().extra_repr(), _spec_repr(self.spec)]
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(part for part in parts if part)

    @classmethod
    def _arguments_of(cls, conv: Any) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        return {name: getattr(conv, name) for name in names}

    @classmethod
    def from_conv(
        cls: type[_Layer],
        conv: nn.Module,
        *,
        with_r: bool = False,
        spec: CoordSpec | None = None,
        activation: str | None = None,
    ) -> _Layer:
        """A CoordConv that computes what conv does, until it is trained: the coordinates' weights are zero.

        It holds the same Parameter objects, so optimisers and tied weights go on working; ``coord_weight`` is new to them, and
        requires a gradient where conv's weight does. Hooks of conv stay with conv.

        Raises:
            TypeError: conv is not exactly a layer of the torch.nn type that this one extends, or it is
                pruned or reparametrised.
        """
        if type(conv) is not cls._base:
            raise TypeError(
                f"{cls.__name__}.from_conv: expected {cls._base.__name__}, got {type(conv).__name__}; a layer that is lazy or "
                "parametrized must be made an ordinary one first"
            )
        for name in ("weight", "bias"):
            if name not in conv._parameters:
                raise TypeError(
                    f"{cls.__name__}.from_conv: {name} of the {cls._base.__name__} is not a Parameter; make pruning or weight "
                    "norm permanent first (torch.nn.utils.prune.remove, remove_weight_norm)"
                )
            parameter = conv._parameters[name]
            if parameter is not None:
                check.floating(f"{cls.__name__}.from_conv", name, parameter)
        new: Any = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            **cls._arguments_of(conv),
            bias=conv.bias is not None,
            device="meta",
            with_r=with_r,
            spec=spec,
            activation=activation,
        )
        weight: Any = conv.weight
        zeros = torch.zeros(new.coord_weight.shape, device=weight.device, dtype=weight.dtype)
        new.coord_weight = nn.Parameter(zeros, requires_grad=weight.requires_grad)
        new.weight, new.bias = conv.weight, conv.bias
        new.train(conv.training)
        return new

    def load_concat_state_dict(self, state_dict: Mapping[str, Tensor], preset: str) -> None:
        """Loads the layer of an implementation that concatenates: ``weight`` and ``bias``, with or without one prefix.

        The layer takes over the preset's coordinates, with its radius if this layer has one, so it computes what that one did.

        Args:
            state_dict: for example ``{"conv.weight": .., "conv.bias": ..}``; dead parameters beside them are ignored.
            preset: a name of :meth:`fourfold.CoordSpec.preset`.

        Raises:
            ValueError: no weight is found, or it does not fit this layer; the layer is unchanged.
        """
        name = f"{type(self).__name__}.load_concat_state_dict"
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"{name}: state_dict must be a mapping of tensors, got {type(state_dict).__name__}; pass layer.state_dict()"
            )
        spec = CoordSpec.preset(preset, with_r=self.spec.r is not None)
        found = [key for key in state_dict if key.rpartition(".")[2] == "weight"]
        # walsvid's layers hold a weight of their own beside the "conv.weight" that computes something.
        inner = [key for key in found if key.endswith("conv.weight")]
        key = inner[0] if len(inner) == 1 else (found[0] if len(found) == 1 else None)
        if key is None:
            raise ValueError(
                f"coord checkpoint: expected one 'weight', or 'conv.weight', among {list(state_dict)}; pass one layer's entries"
            )
        for entry in (key, key.removesuffix("weight") + "bias"):
            if entry in state_dict and not isinstance(state_dict[entry], Tensor):
                raise TypeError(f"{name}: {entry} must be a Tensor, got {type(state_dict[entry]).__name__}")
        weight, bias = state_dict[key], state_dict.get(key.removesuffix("weight") + "bias")
        dim, nc = self._channel_dim, self.spec.channels(len(self.kernel_size))
        own = self.weight.shape[dim]
        shape = list(self.weight.shape)
        shape[dim] = own + nc
        if self.groups > 1:
            raise ValueError(
                f"coord checkpoint: groups={self.groups} cut up the concatenated channels there, and every group sees all "
                "coordinates here; use coord_conv2d(..., groups_mode='concat')"
            )
        if list(weight.shape) != shape:
            radius = ""
            if weight.dim() == len(shape) and abs(weight.shape[dim] - shape[dim]) == 1:
                radius = "; a layer built with_r=True has one coordinate more"
            raise ValueError(
                f"coord checkpoint: {key} has shape {tuple(weight.shape)}; expected {tuple(shape)} ({own} channels of x + {nc} "
                f"coordinates, preset={preset!r}){radius}"
            )
        if (bias is None) != (self.bias is None):
            where = "layer" if bias is None else "checkpoint"
            raise ValueError(f"coord checkpoint: only the {where} has a bias; build the layer with bias={bias is not None}")
        if bias is not None and self.bias is not None and bias.shape != self.bias.shape:
            raise ValueError(f"coord checkpoint: bias has shape {tuple(bias.shape)}; expected {tuple(self.bias.shape)}")
        if spec.position == "append":
            of_x, of_coords = weight.split([own, nc], dim)
        else:
            of_coords, of_x = weight.split([nc, own], dim)
        self.spec = spec
        with torch.no_grad():
            self.weight.copy_(of_x)
            self.coord_weight.copy_(of_coords)
            if bias is not None and self.bias is not None:
                self.bias.copy_(bias)

    def to_concat_conv(self) -> nn.Module:
        """The torch.nn layer that computes the same from ``add_coords(x, layer.spec)``, with weights of its own.

        Raises:
            ValueError: this layer has groups or an activation, which that layer could not have.
        """
        name = type(self).__name__
        if self.groups != 1:
            raise ValueError(f"{name}.to_concat_conv: needs groups=1, got {self.groups}")
        if self.activation is not None:
            raise ValueError(
                f"{name}.to_concat_conv: a torch.nn layer has no activation; build this layer without {self.activation!r} and "
                "apply it after the layer"
            )
        nc = self.spec.channels(len(self.kernel_size))
        conv: Any = self._base(
            self.in_channels + nc,
            self.out_channels,
            self.kernel_size,
            **self._arguments_of(self),
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        parts = [self.weight, self.coord_weight.to(self.weight.dtype)]
        with torch.no_grad():
            conv.weight.copy_(torch.cat(parts if self.spec.position == "append" else parts[::-1], self._channel_dim))
            if self.bias is not None:
                conv.bias.copy_(self.bias)
        conv.train(self.training)
        return conv

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of torch.nn.Module; where a plain convolution's entries are refused, the error names the way to load them."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            weight = state_dict.get("weight")
            lacking = strict and "coord_weight" not in state_dict
            if not (lacking and isinstance(weight, Tensor) and weight.shape == self.weight.shape):
                raise
            name = type(self).__name__
            raise RuntimeError(
                f"{error}\n\tThese are the entries of a {self._base.__name__}, which has no coordinates: "
                f"{name}.from_conv(conv) makes a {name} of one that has loaded them; strict=False leaves coord_weight as it is"
                + see("coordconv.md#limits")
            ) from None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        dim, nc = self._channel_dim, self.spec.channels(len(self.kernel_size))
        weight = state_dict.get(prefix + "weight", state_dict.get(prefix + "conv.weight"))
        if prefix + "coord_weight" not in state_dict and isinstance(weight, Tensor) and weight.dim() == self.weight.dim():
            own = self.weight.shape[dim]
            if weight.shape[dim] == own + nc:
                error_msgs.append(
                    f"coord checkpoint: weight has {own + nc} input channels; expected {own} (conv) or {own + nc} (conv + "
                    "coords, preset='walsvid'); use load_concat_state_dict(..., preset=...)"
                    + see("coordconv.md#checkpoints-of-other-implementations")
                )
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


class _CoordConvNd(_CoordLayer):
    """What CoordConv1d, 2d and 3d share."""

    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    padding_mode: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        with_r: bool = False,
        spec: CoordSpec | None = None,
        activation: str | None = None,
    ) -> None:
        self._check_arguments(
            in_channels, out_channels, groups, padding_mode, PADDING_MODES,
            kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation,
        )  # fmt: skip
        base: Any = super()
        base.__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_coords(with_r, spec, activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, *size] or [in_channels, *size] -> [B, out_channels, *out] or [out_channels, *out]."""
        return coord_conv(
            type(self).__name__, len(self.kernel_size), x, self.weight, self.coord_weight, self.bias, self.stride, self.padding,
            self.dilation, self.groups, self.padding_mode, self.spec, self.activation, excluding="in_channels",
        )  # fmt: skip


class CoordConv1d(_CoordConvNd, nn.Conv1d):
    """Conv1d that also sees coordinates; arguments and parameters as for :class:`CoordConv2d`."""

    _base, _rank = nn.Conv1d, 1


class CoordConv2d(_CoordConvNd, nn.Conv2d):
    """Conv2d that also sees coordinates; see :func:`fourfold.coord_conv2d` (Liu et al., 2018, arXiv 1807.03247).

    The arguments of ``torch.nn.Conv2d``, of which ``in_channels`` excludes the coordinates, and beside them:

    Args:
        with_r: also the radius channel: about the centre, unless spec names another.
        spec: which coordinates; default ``CoordSpec()``: one channel per spatial axis, first axis first, from -1 to 1.
        activation: None, "relu", "silu" or "gelu" (exact), fused into the layer.

    Parameters: ``weight`` and ``bias`` as in ``torch.nn.Conv2d``, and ``coord_weight`` [out_channels, nc, kh, kw] for the nc
    coordinate channels; drawn as in a layer of in_channels / groups + nc channels.
    """

    _base, _rank = nn.Conv2d, 2


class CoordConv3d(_CoordConvNd, nn.Conv3d):
    """Conv3d that also sees coordinates; arguments and parameters as for :class:`CoordConv2d`."""

    _base, _rank = nn.Conv3d, 3


class CoordConvTranspose2d(_CoordLayer, nn.ConvTranspose2d):
    """ConvTranspose2d that also sees coordinates; see :func:`fourfold.coord_conv_transpose2d`.

    Arguments and parameters as for :class:`CoordConv2d`, with those of ``torch.nn.ConvTranspose2d``; ``coord_weight`` is
    [nc, out_channels, kh, kw].
    """

    _base, _rank = nn.ConvTranspose2d, 2
    _channel_dim = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        with_r: bool = False,
        spec: CoordSpec | None = None,
        activation: str | None = None,
    ) -> None:
        self._check_arguments(
            in_channels, out_channels, groups, padding_mode, ("zeros",),
            kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, output_padding=output_padding,
        )  # fmt: skip
        base: Any = super()
        base.__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode,
            device, dtype,
        )  # fmt: skip
        self._init_coords(with_r, spec, activation)

    @classmethod
    def _arguments_of(cls, conv: Any) -> dict[str, Any]:
        return {**super()._arguments_of(conv), "output_padding": conv.output_padding}

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x [B, in_channels, H, W] or unbatched -> [B, out_channels, Ho, Wo]; output_size as in torch.nn.ConvTranspose2d."""
        extra: Any = self.output_padding
        if output_size is not None:
            layer: Any = self  # torch's annotation wants lists where torch itself passes tuples
            extra = layer._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)
        return coord_conv_transpose(
            type(self).__name__, x, self.weight, self.coord_weight, self.bias, self.stride, self.padding, extra, self.groups,
            self.dilation, self.spec, self.activation, excluding="in_channels",
        )  # fmt: skip
