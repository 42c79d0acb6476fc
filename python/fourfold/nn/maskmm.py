"""Layers whose weight wears a mask: fixed, learned, compressed, or one of many.

Masks are kept as bits, in the state_dict as ``mask_bits``.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _checks as check
from ..ops.maskmm import (
    RESCALES,
    SAMPLERS,
    _apply_mask,
    _convolution,
    _masked_convolution,
    _masked_linear,
    bernoulli_mask,
    check_density,
    check_linear,
    check_pad,
    in_autocast,
    masked_conv2d,
    masked_linear,
    pack_mask,
    packed_bits,
    row_bytes,
    rows_of,
    supermask_conv2d,
    supermask_linear,
    threshold_mask,
    topk_mask,
    unpack_mask,
)
from ..ops.maskmm_sparse import SparseWeight, compress, forget, from_table, sparse_linear
from ..ops.maskmm_superposed import superposed_linear, task_linear

EVAL_MASKS = ("round", "sample", "topk")

_Layer = TypeVar("_Layer", bound="_Plain")
_WithMask = TypeVar("_WithMask", bound="_Masked")


# ---- what the layers share -----------------------------------------------------------------------------------------------


def _bits(op: str, mask: Any, weight: Tensor) -> Tensor:
    """A mask as bits of its own on weight's device, whatever device it comes from."""
    return packed_bits(op, mask.to(weight.device) if isinstance(mask, Tensor) else mask, weight).clone()


def _hard(mask: Tensor) -> Tensor:
    """A mask kept as numbers as bool, if all are 0 or 1; else as it is, on the CPU, where packed_bits says which one isn't."""
    if not mask.is_floating_point():
        return mask
    return mask != 0 if mask.is_meta or bool(((mask == 0) | (mask == 1)).all()) else mask.cpu()


def _of_another_k(op: str, bits: Tensor, k: int) -> str | None:
    """What is wrong with the bits of a file, if anything."""
    if bits.dtype != torch.uint8:
        return f"{op}: mask_bits must be uint8, got {check.dtype_name(bits)}"
    if bits.dim() < 2 or bits.shape[-1] != row_bytes(k):
        return f"{op}: mask_bits {tuple(bits.shape)} are not of K={k} columns, which take {row_bytes(k)} bytes a row"
    try:
        check_pad(op, bits if bits.is_meta else bits.cpu(), k, "mask_bits")
    except ValueError as error:
        return str(error)
    return None


def _keep_all(bits: Tensor, k: int) -> None:
    """Sets the bits of rows of k, whatever was in their memory."""
    whole, part = divmod(k, 8)
    bits.zero_()
    bits[..., :whole] = 255
    if part:
        bits[..., whole] = (1 << part) - 1


def _count(bits: Tensor) -> int:
    """The number of bits that are set."""
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((nibbles + (nibbles >> 4)) & 0x0F).sum())


class _Plain(nn.Module):
    """What the layers that extend Linear or Conv2d have in common."""

    _base: ClassVar[type[nn.Module]]

    weight: Tensor
    bias: Any
    mask_bits: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        had_no_values = "mask_bits" in self._buffers and self.mask_bits.is_meta
        super()._apply(fn, recurse)
        if had_no_values and not self.mask_bits.is_meta:  # to_empty: no mask came with the memory
            self._begin_masks()
        return self

    def _begin_masks(self) -> None:
        """Keeps every weight."""
        _keep_all(self.mask_bits, rows_of(self.weight)[1])

    @classmethod
    def _check_source(cls, method: str, layer: Any) -> None:
        name = f"{cls.__name__}.{method}"
        if type(layer) is not cls._base:
            raise TypeError(
                f"{name}: expected {cls._base.__name__}, got {type(layer).__name__}; a layer that is lazy or parametrized must "
                "be made an ordinary one first"
            )
        for parameter in ("weight", "bias"):
            if parameter not in layer._parameters:
                raise TypeError(
                    f"{name}: {parameter} of the {cls._base.__name__} is not a Parameter; a pruned layer is for "
                    "MaskedLinear.from_pruned, MaskedConv2d.from_pruned and SparseLinear.from_pruned, and weight norm must be "
                    "made permanent first"
                )
            found = layer._parameters[parameter]
            if found is not None:
                check.floating(name, parameter, found)

    @classmethod
    def _arguments_of(cls, layer: Any) -> dict[str, Any]:
        """For the constructor."""
        if cls._base is nn.Linear:
            names: tuple[str, ...] = ("in_features", "out_features")
        else:
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        return {**{name: getattr(layer, name) for name in names}, "bias": layer.bias is not None}

    @classmethod
    def _empty_like(cls: type[_Layer], layer: Any, **options: Any) -> _Layer:
        """A layer of the same sizes and mode on the meta device, its parameters to be replaced."""
        new: Any = cls(**cls._arguments_of(layer), device="meta", **options)
        new.train(layer.training)
        return new

    def _plain(self, weight: Tensor) -> Any:
        """The torch.nn layer with this weight and a copy of the bias."""
        plain: Any = self._base(**self._arguments_of(self), device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        plain.train(self.training)
        return plain

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        """x and what is left of the padding for a convolution that pads with zeros alone."""
        conv: Any = self
        if conv.padding_mode == "zeros":
            return x, conv.padding
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0


# ---- fixed masks ---------------------------------------------------------------------------------------------------------


class _Masked(_Plain):
    """What MaskedLinear and MaskedConv2d share: the buffer ``mask_bits``."""

    _version = 1

    def _init_mask(self, mask: Any) -> None:
        if mask is None:
            mask = torch.ones_like(self.weight, dtype=torch.bool)
        self.register_buffer("mask_bits", _bits(type(self).__name__, mask, self.weight))

    @classmethod
    def _from_plain(cls: type[_WithMask], method: str, layer: Any, mask: Any) -> _WithMask:
        cls._check_source(method, layer)
        return cls._around(f"{cls.__name__}.{method}", layer, layer.weight, layer.bias, mask)

    @classmethod
    def _around(cls: type[_WithMask], op: str, layer: Any, weight: Any, bias: Any, mask: Any) -> _WithMask:
        new = cls._empty_like(layer)
        new.weight, new.bias = weight, bias
        mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
        new.mask_bits = _bits(op, mask, weight)
        return new

    @classmethod
    def from_pruned(cls: type[_WithMask], layer: Any) -> _WithMask:
        """The layer that torch.nn.utils.prune made of a torch.nn layer, with its mask as bits.

        It holds the Parameter ``weight_orig`` itself, so optimisers and tied weights go on working; the pruned layer is left
        as it is.

        Raises:
            TypeError: layer is not a torch.nn layer of the type that this one extends.
            ValueError: its weight is not pruned, or its bias is.
        """
        weight, mask = _pruned(cls.__name__, cls._base, layer)
        return cls._around(f"{cls.__name__}.from_pruned", layer, weight, layer.bias, mask)

    @property
    def mask(self) -> Tensor:
        """The mask as bool of weight's shape: a copy."""
        return unpack_mask(self.mask_bits, rows_of(self.weight)[1]).reshape(self.weight.shape)

    def set_mask(self, mask: Tensor) -> None:
        """Replaces the mask in place.

        Args:
            mask: bool of weight's shape, bool [N, K], or packed uint8; on any device.

        Raises:
            TypeError: mask is neither bool nor uint8.
            ValueError: it is made for another weight.
        """
        self.mask_bits.copy_(_bits(f"{type(self).__name__}.set_mask", mask, self.weight))

    def _masked_weight(self) -> Tensor:
        return _apply_mask(self.weight.detach(), self.mask_bits, None, False, "", self.weight.dtype)

    def extra_repr(self) -> str:
        """That of the torch.nn layer, and how many weights are kept."""
        kept = "" if self.mask_bits.is_meta else f", kept={_count(self.mask_bits)} of {self.weight.numel()}"
        return super().extra_repr() + kept

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
        try:
            state_dict = _new_names(type(self).__name__, state_dict, prefix, self.weight)
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
            return
        bits = state_dict.get(prefix + "mask_bits")
        if isinstance(bits, Tensor):
            wrong = _of_another_k(type(self).__name__, bits, rows_of(self.weight)[1])
            if wrong:
                error_msgs.append(wrong)
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _pruned(owner: str, base: type[nn.Module], layer: Any) -> tuple[Any, Tensor]:
    """weight_orig and weight_mask of a layer pruned by torch.nn.utils.prune."""
    name = f"{owner}.from_pruned"
    if type(layer) is not base:
        raise TypeError(f"{name}: expected a pruned {base.__name__}, got {type(layer).__name__}")
    mask: Any = getattr(layer, "weight_mask", None)
    if "weight_orig" not in layer._parameters or not isinstance(mask, Tensor):
        raise ValueError(f"{name}: the {base.__name__} has no weight_orig and weight_mask; prune it with torch.nn.utils.prune")
    if "bias" not in layer._parameters:
        raise ValueError(
            f"{name}: the bias is pruned too, and a mask here is the weight's; make that permanent with "
            "torch.nn.utils.prune.remove(layer, 'bias')"
        )
    return layer._parameters["weight_orig"], _hard(mask)


def _new_names(owner: str, state_dict: dict[str, Any], prefix: str, weight: Tensor) -> dict[str, Any]:
    """The entries of torch.nn.utils.prune (weight_orig, weight_mask) or of a bool or float mask under this layer's names."""
    if prefix + "mask_bits" in state_dict:
        return state_dict
    if prefix + "bias_orig" in state_dict:
        raise ValueError(
            f"{owner}: the checkpoint's bias is pruned too, and a mask here is the weight's; save it after "
            "torch.nn.utils.prune.remove(layer, 'bias')"
        )
    for of_weight, of_mask in (("weight_orig", "weight_mask"), ("weight", "mask")):
        if prefix + of_weight in state_dict and prefix + of_mask in state_dict:
            renamed = dict(state_dict)
            renamed[prefix + "weight"] = renamed.pop(prefix + of_weight)
            mask = _hard(renamed.pop(prefix + of_mask))
            renamed[prefix + "mask_bits"] = packed_bits(owner, mask, torch.empty_like(weight, device=mask.device))
            return renamed
    return state_dict


class MaskedLinear(_Masked, nn.Linear):
    """Linear with a fixed mask; see :func:`fourfold.masked_linear`.

    The arguments of ``torch.nn.Linear``, and beside them:

    Args:
        mask: bool [out_features, in_features], or packed; None keeps every weight.

    Parameters as in ``torch.nn.Linear``: ``weight`` is whole, and what it holds off the mask is never used. Its gradient is
    exactly 0 there. Buffer ``mask_bits``: uint8 [out_features, 8 * ceil(in_features / 64)]. The entries of
    torch.nn.utils.prune (``weight_orig``, ``weight_mask``), and ``weight`` with a bool or float ``mask``, load too.
    ``reset_parameters`` leaves the mask as it is; a layer built on the meta device keeps every weight after ``to_empty``, until
    a state_dict or ``set_mask`` tells it its mask.
    """

    _base = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        base: Any = super()
        base.__init__(in_features, out_features, bias, device, dtype)
        self._init_mask(mask)

    @classmethod
    def from_linear(cls: type[_WithMask], linear: nn.Linear, mask: Tensor | None = None) -> _WithMask:
        """A MaskedLinear with the same Parameter objects, so optimisers and tied weights go on working.

        Args:
            linear: exactly a ``torch.nn.Linear``.
            mask: bool of weight's shape, or packed; None keeps every weight.

        Raises:
            TypeError: linear is of another type, or pruned or reparametrised.
            ValueError: the mask is made for another weight.
        """
        return cls._from_plain("from_linear", linear, mask)

    def to_linear(self) -> nn.Linear:
        """The ``torch.nn.Linear`` that computes the same, its weights zero off the mask, with parameters of its own."""
        return self._plain(self._masked_weight())

    def compress(self, *, format: str = "auto", batch_hint: int = 1) -> "SparseLinear":  # noqa: A002
        """The :class:`SparseLinear` that computes the same, with this bias; the arguments are those of fourfold.compress."""
        weight = compress(self.weight.detach(), self.mask_bits, format=format, batch_hint=batch_hint)
        return _sparse(weight, self.bias, self.weight.requires_grad, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_features] -> [.., out_features]."""
        return masked_linear(x, self.weight, self.mask_bits, self.bias)


class MaskedConv2d(_Masked, nn.Conv2d):
    """Conv2d with a fixed mask; see :func:`fourfold.masked_conv2d`.

    The arguments of ``torch.nn.Conv2d``, and beside them:

    Args:
        mask: bool of weight's shape or [out_channels, K], K = in_channels / groups * kh * kw, or packed; None keeps all.

    Parameters, buffer and the checkpoints it loads as for :class:`MaskedLinear`.
    """

    _base = nn.Conv2d

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
        mask: Tensor | None = None,
    ) -> None:
        base: Any = super()
        base.__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_mask(mask)

    @classmethod
    def from_conv(cls: type[_WithMask], conv: nn.Conv2d, mask: Tensor | None = None) -> _WithMask:
        """A MaskedConv2d with the same Parameter objects, so optimisers and tied weights go on working.

        Args:
            conv: exactly a ``torch.nn.Conv2d``.
            mask: bool of weight's shape or [N, K], or packed; None keeps every weight.

        Raises:
            TypeError: conv is of another type, or pruned or reparametrised.
            ValueError: the mask is made for another weight.
        """
        return cls._from_plain("from_conv", conv, mask)

    def to_conv(self) -> nn.Conv2d:
        """The ``torch.nn.Conv2d`` that computes the same, its weights zero off the mask, with parameters of its own."""
        return self._plain(self._masked_weight())

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] or [in_channels, H, W] -> [B, out_channels, Ho, Wo] or [out_channels, Ho, Wo]."""
        x, padding = self._padded(x)
        return masked_conv2d(x, self.weight, self.mask_bits, self.bias, self.stride, padding, self.dilation, self.groups)


# ---- learned masks -------------------------------------------------------------------------------------------------------


class _Supermask(_Plain):
    """What SupermaskLinear and SupermaskConv2d share: a frozen weight, scores, and how a mask is made of them."""

    scores: nn.Parameter
    sampler: str
    density: float | None
    rescale: str | None
    signed: bool
    eval_mask: str

    def _init_scores(self, sampler: str, density: float | None, rescale: str | None, signed: bool, eval_mask: str) -> None:
        op = type(self).__name__
        check.one_of(op, "sampler", sampler, SAMPLERS)
        check.one_of(op, "eval_mask", eval_mask, EVAL_MASKS)
        if rescale is not None:
            check.one_of(op, "rescale", rescale, RESCALES)
        if not isinstance(signed, bool):
            raise TypeError(f"{op}: signed must be a bool, got {signed!r}")
        if sampler != "bernoulli" and eval_mask != "round":
            raise ValueError(
                f"{op}: eval_mask goes with sampler 'bernoulli', got {eval_mask!r} and {sampler!r}, whose mask is the same in "
                "eval mode"
            )
        needed = sampler == "topk" or eval_mask == "topk"
        if needed and density is None:
            raise ValueError(f"{op}: {'sampler' if sampler == 'topk' else 'eval_mask'} 'topk' needs density, the fraction kept")
        if density is not None and not needed:
            raise ValueError(f"{op}: density goes with sampler or eval_mask 'topk', got density={density} and {sampler!r}")
        if signed and sampler != "topk":
            raise ValueError(f"{op}: signed=True goes with sampler 'topk', got {sampler!r}")
        if signed and rescale == "dwr_grad":
            raise ValueError(f"{op}: rescale='dwr_grad' counts ones and is not defined for signed masks; use 'dwr'")
        self.density = None if density is None else check_density(op, density)
        self.sampler, self.rescale, self.signed, self.eval_mask = sampler, rescale, signed, eval_mask
        self.weight.requires_grad_(False)
        self.scores = nn.Parameter(torch.empty_like(self.weight))
        self._draw_scores()

    def _draw_scores(self) -> None:
        nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))

    def reset_parameters(self) -> None:
        """Draws weight, bias and scores."""
        base: Any = super()
        base.reset_parameters()
        if hasattr(self, "scores"):  # not yet when the torch.nn layer's constructor calls this
            self._draw_scores()

    @classmethod
    def _from_plain(cls: type[_Layer], method: str, layer: Any, options: dict[str, Any]) -> _Layer:
        cls._check_source(method, layer)
        new: Any = cls._empty_like(layer, **options)
        new.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        new.bias = layer.bias
        new.scores = nn.Parameter(torch.empty_like(new.weight))
        new._draw_scores()
        return new

    def make_mask(self) -> Tensor:
        """The packed mask that forward uses in the layer's present mode: a fresh one where it is random."""
        scores = self.scores.detach()
        if self.sampler == "topk":
            return topk_mask(scores, self._kept(), abs=True)
        if self.sampler == "threshold":
            return threshold_mask(scores)
        if self.training or self.eval_mask == "sample":
            return bernoulli_mask(scores, torch.randint(2**63 - 1, (), device=scores.device))
        if self.eval_mask == "topk":
            return topk_mask(scores, self._kept(), abs=False)  # the likeliest ones
        return threshold_mask(scores)

    def _kept(self) -> float:
        return 1.0 if self.density is None else self.density

    @property
    def _rounds(self) -> bool:
        """Whether forward makes its mask in another way than the sampler."""
        return self.sampler == "bernoulli" and not self.training and self.eval_mask != "sample"

    def _options(self) -> dict[str, Any]:
        density = self.density if self.sampler == "topk" else None
        return {"sampler": self.sampler, "density": density, "rescale": self.rescale, "signed": self.signed}

    def _eval_weight(self) -> tuple[Tensor, Tensor]:
        """The effective weight in eval mode, and its mask."""
        training = self.training
        self.training = False
        try:
            bits = self.make_mask()
        finally:
            self.training = training
        scores = self.scores.detach() if self.signed else None
        weight = _apply_mask(self.weight.detach(), bits, scores, self.signed, self.rescale or "", self.weight.dtype)
        return weight, bits

    def extra_repr(self) -> str:
        """That of the torch.nn layer, and how masks are made."""
        parts = [super().extra_repr(), f"sampler={self.sampler!r}"]
        for name, default in (("density", None), ("rescale", None), ("signed", False), ("eval_mask", "round")):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)


class SupermaskLinear(_Supermask, nn.Linear):
    """Linear with a frozen weight, of which training learns what to keep; see :func:`fourfold.supermask_linear`.

    The arguments of ``torch.nn.Linear``, and beside them:

    Args:
        sampler: "bernoulli", "topk" or "threshold".
        density: the fraction that "topk" keeps; 0.9 keeps 90% (hidden-networks calls this sparsity).
        rescale: None, "dwr" or "dwr_grad": times n / ones.
        signed: for sampler "topk", kept weights times the sign of their score.
        eval_mask: in eval mode, of sampler "bernoulli": "round" keeps where sigmoid(score) >= 1/2, "topk" the fraction density
            of the largest scores, "sample" draws as in training. Masks of the other samplers are the same in both modes.

    Parameters: ``weight``, which requires no gradient, ``bias``, and ``scores`` of weight's shape, drawn as the layers of
    Ramanujan et al. (2019) draw theirs; for a start at one probability p fill them with log(p / (1 - p)).
    """

    _base = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sampler: str = "bernoulli",
        density: float | None = None,
        rescale: str | None = None,
        signed: bool = False,
        eval_mask: str = "round",
    ) -> None:
        base: Any = super()
        base.__init__(in_features, out_features, bias, device, dtype)
        self._init_scores(sampler, density, rescale, signed, eval_mask)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> "SupermaskLinear":
        """A SupermaskLinear with a frozen copy of linear's weight, its bias (the same Parameter), and new scores.

        Args:
            linear: exactly a ``torch.nn.Linear``.
            **options: sampler, density, rescale, signed, eval_mask.

        Raises:
            TypeError: linear is of another type, or pruned or reparametrised.
            ValueError: an option is not one there is.
        """
        return cls._from_plain("from_linear", linear, options)

    def to_masked(self) -> MaskedLinear:
        """The :class:`MaskedLinear` that computes what this layer does in eval mode; sign and rescaling are in its weight."""
        weight, bits = self._eval_weight()
        return MaskedLinear.from_linear(self._plain(weight), bits)

    def to_linear(self) -> nn.Linear:
        """The ``torch.nn.Linear`` that computes what this layer does in eval mode, with parameters of its own."""
        return self._plain(self._eval_weight()[0])

    def compress(self, *, format: str = "auto", batch_hint: int = 1) -> "SparseLinear":  # noqa: A002
        """The :class:`SparseLinear` that computes what this layer does in eval mode; arguments as fourfold.compress."""
        return self.to_masked().compress(format=format, batch_hint=batch_hint)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_features] -> [.., out_features]."""
        if not self._rounds:
            return supermask_linear(x, self.weight, self.scores, self.bias, **self._options())
        op = type(self).__name__
        check_linear(op, x, self.weight, self.bias)
        x, weight, bias = in_autocast(op, x, self.weight, self.bias)
        return _masked_linear(x, weight, self.make_mask(), bias, self.scores, "sigmoid", False, self.rescale or "")


class SupermaskConv2d(_Supermask, nn.Conv2d):
    """Conv2d with a frozen weight, of which training learns what to keep; see :func:`fourfold.supermask_conv2d`.

    The arguments of ``torch.nn.Conv2d``, and beside them those of :class:`SupermaskLinear`, whose parameters it has too.
    """

    _base = nn.Conv2d

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
        sampler: str = "bernoulli",
        density: float | None = None,
        rescale: str | None = None,
        signed: bool = False,
        eval_mask: str = "round",
    ) -> None:
        base: Any = super()
        base.__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_scores(sampler, density, rescale, signed, eval_mask)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> "SupermaskConv2d":
        """A SupermaskConv2d with a frozen copy of conv's weight, its bias (the same Parameter), and new scores.

        Args:
            conv: exactly a ``torch.nn.Conv2d``.
            **options: sampler, density, rescale, signed, eval_mask.

        Raises:
            TypeError: conv is of another type, or pruned or reparametrised.
            ValueError: an option is not one there is.
        """
        return cls._from_plain("from_conv", conv, options)

    def to_masked(self) -> MaskedConv2d:
        """The :class:`MaskedConv2d` that computes what this layer does in eval mode; sign and rescaling are in its weight."""
        weight, bits = self._eval_weight()
        return MaskedConv2d.from_conv(self._plain(weight), bits)

    def to_conv(self) -> nn.Conv2d:
        """The ``torch.nn.Conv2d`` that computes what this layer does in eval mode, with parameters of its own."""
        return self._plain(self._eval_weight()[0])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] or [in_channels, H, W] -> [B, out_channels, Ho, Wo] or [out_channels, Ho, Wo]."""
        x, padding = self._padded(x)
        sizes = (self.stride, padding, self.dilation, self.groups)
        if not self._rounds:
            return supermask_conv2d(x, self.weight, self.scores, self.bias, *sizes, **self._options())
        op = type(self).__name__
        x, convolution = _convolution(op, x, self.weight, self.bias, *sizes)
        x, weight, bias = in_autocast(op, x, self.weight, self.bias)
        mask_options = ("sigmoid", False, self.rescale or "")
        return _masked_convolution(x, weight, self.make_mask(), bias, self.scores, mask_options, convolution)


# ---- compressed weights --------------------------------------------------------------------------------------------------


class SparseLinear(nn.Module):
    """Linear that keeps only the weights on a mask; see :func:`fourfold.sparse_linear`.

    Args:
        sparse_weight: from :func:`fourfold.compress`.
        bias: [out_features], or None; a Parameter is taken over as it is.
        device: of the layer; None where sparse_weight is. What has to be moved or converted is copied.
        dtype: of values and bias; None that of sparse_weight.

    Parameters: ``values`` [nnz], row-major, and ``bias``; an optimizer's state is as small. Buffer ``mask_bits``. The
    state_dict holds these three and nothing that depends on the format, so a file loads on any machine, also into a layer with
    another number of values, whose format is then chosen anew if "auto" chose it. Of a layer that only infers,
    ``requires_grad_(False)`` spares format "dense" making the dense weight on every call. A layer built on the meta device
    keeps as many weights after ``to_empty``, scattered, the same ones in every process, until a state_dict tells it its mask.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    mask_bits: Tensor

    def __init__(
        self,
        sparse_weight: SparseWeight,
        bias: Tensor | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if not isinstance(sparse_weight, SparseWeight):
            raise TypeError(
                f"{op}: sparse_weight must be a SparseWeight, got {type(sparse_weight).__name__}; make one with "
                "fourfold.compress, or use SparseLinear.from_linear"
            )
        if dtype is not None and dtype not in check.FLOATING:
            raise TypeError(f"{op}: dtype must be float16, bfloat16, float32 or float64, got {check.dtype_name(dtype)}")
        self.out_features, self.in_features = sparse_weight.shape
        self.format, self.reason = sparse_weight.format, sparse_weight.reason
        self._batch_hint = sparse_weight._batch_hint
        self._kept: SparseWeight | None = None
        self.values = self._own(sparse_weight.values, device, dtype)
        self.register_buffer("mask_bits", sparse_weight.mask.to(self.values.device, copy=True))
        if bias is not None:
            check.floating(op, "bias", bias)
            if tuple(bias.shape) != (self.out_features,):
                raise ValueError(f"{op}: bias must be [{self.out_features}], got {list(bias.shape)}")
            bias = self._own(bias, device, dtype)
        self.register_parameter("bias", bias)

    @staticmethod
    def _own(given: Tensor, device: Any, dtype: torch.dtype | None) -> nn.Parameter:
        """A Parameter as it is where it may stay so, else a new one."""
        moved = given.detach().to(given.device if device is None else device, dtype or given.dtype)
        same = moved.device == given.device and moved.dtype == given.dtype
        if isinstance(given, nn.Parameter):
            return given if same else nn.Parameter(moved, requires_grad=given.requires_grad)
        return nn.Parameter(moved.clone() if same else moved)

    def reset_parameters(self) -> None:
        """Draws values and bias as Linear draws its own, from in_features; the mask stays."""
        bound = 1 / math.sqrt(max(1, self.in_features))
        for parameter in (self.values, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mask: Tensor | None = None,
        *,
        format: str = "auto",  # noqa: A002
        batch_hint: int = 1,
    ) -> "SparseLinear":
        """A SparseLinear with a copy of linear's kept weights and its bias (the same Parameter).

        Args:
            linear: exactly a ``torch.nn.Linear``.
            mask: bool of weight's shape, or packed; None keeps the weights that are not 0. For a linear on the meta device it
                is on another one.
            format: as :func:`fourfold.compress`.
            batch_hint: as :func:`fourfold.compress`.

        Raises:
            TypeError: linear is of another type, or pruned or reparametrised.
            ValueError: the mask is made for another weight.
        """
        MaskedLinear._check_source("from_linear", linear)
        weight = linear.weight.detach()
        bits = mask if mask is None or weight.is_meta else _bits(f"{cls.__name__}.from_linear", mask, weight)
        sparse = compress(weight, bits, format=format, batch_hint=batch_hint)
        return _sparse(sparse, linear.bias, linear.weight.requires_grad, linear.training)

    @classmethod
    def from_pruned(cls, layer: Any, *, format: str = "auto", batch_hint: int = 1) -> "SparseLinear":  # noqa: A002
        """A SparseLinear from a Linear that torch.nn.utils.prune pruned, which is left as it is.

        Raises:
            TypeError: layer is not a ``torch.nn.Linear``.
            ValueError: its weight is not pruned, or its bias is.
        """
        weight, mask = _pruned(cls.__name__, nn.Linear, layer)
        bits = _bits(f"{cls.__name__}.from_pruned", mask, weight)
        sparse = compress(weight.detach(), bits, format=format, batch_hint=batch_hint)
        return _sparse(sparse, layer.bias, weight.requires_grad, layer.training)

    @property
    def sparse_weight(self) -> SparseWeight:
        """The weight as :func:`fourfold.sparse_linear` takes it; its values are the Parameter."""
        kept = None if torch.compiler.is_compiling() else self._kept
        if kept is not None and kept.values is self.values and kept.mask is self.mask_bits:
            return kept
        shape = self.out_features, self.in_features
        weight = SparseWeight(self.values, self.mask_bits, shape, self.format, reason=self.reason)
        # Not of tensors that torch.func puts in the Parameter's place for one call.
        if isinstance(self.values, nn.Parameter) and not torch.compiler.is_compiling():
            self._kept = weight
        return weight

    def __setattr__(self, name: str, value: Any) -> None:
        # fully_shard puts a Parameter back whose memory it has filled anew, without a new version.
        if name == "values":
            self._kept = None
            forget(value)
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._kept = None  # the Parameter may stay the same object and get other contents
        had_no_values = self.mask_bits.is_meta
        super()._apply(fn, recurse)
        if had_no_values and not self.mask_bits.is_meta:  # to_empty: no mask came with the memory
            self.mask_bits.copy_(self._scattered())
        return self

    def _scattered(self) -> Tensor:
        """Bits of a mask that keeps as many weights as there are values."""
        size = self.out_features * self.in_features
        order = torch.randperm(size, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        mask = torch.zeros(size, dtype=torch.bool, device="cpu")
        mask[order[: self.values.numel()]] = True
        return pack_mask(mask.view(self.out_features, self.in_features))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def to_linear(self) -> nn.Linear:
        """The ``torch.nn.Linear`` that computes the same, with parameters of its own."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight: Tensor = self.sparse_weight.decompress()
        linear.weight = nn.Parameter(weight.detach(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        linear.train(self.training)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_features] -> [.., out_features]."""
        return sparse_linear(x, self.sparse_weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, how many weights are kept, and the format."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kept={self.values.numel()} of {self.in_features * self.out_features}, format={self.format!r} ({self.reason})"
        )

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
        op = type(self).__name__
        self._kept = None
        bits, values = state_dict.get(prefix + "mask_bits"), state_dict.get(prefix + "values")
        if isinstance(bits, Tensor) and isinstance(values, Tensor):
            wrong = _of_another_k(op, bits, self.in_features)
            if not wrong and bits.shape != self.mask_bits.shape:
                wrong = f"{op}: mask_bits {tuple(bits.shape)} are of another N; expected {tuple(self.mask_bits.shape)}"
            if not wrong and not bits.is_meta and values.shape != (_count(bits),):
                wrong = f"{op}: values {tuple(values.shape)} must be one per bit that is set in mask_bits, ({_count(bits)},)"
            if wrong:
                error_msgs.append(wrong)
                return
            if values.shape != self.values.shape:
                if hasattr(self.values, "device_mesh"):
                    error_msgs.append(
                        f"{op}: values {tuple(self.values.shape)} are sharded and can't become {tuple(values.shape)}; load "
                        "before fully_shard"
                    )
                    return
                if self._batch_hint is not None:
                    density = values.shape[0] / max(self.in_features * self.out_features, 1)
                    self.format, self.reason = from_table(
                        self.values, density, self._batch_hint, self.out_features, self.in_features
                    )
                self.values = nn.Parameter(self.values.new_empty(values.shape), requires_grad=self.values.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _sparse(weight: SparseWeight, bias: Any, requires_grad: bool, training: bool) -> SparseLinear:
    layer = SparseLinear(weight, bias)
    layer.values.requires_grad_(requires_grad)
    layer.train(training)
    return layer


# ---- a mask per task -----------------------------------------------------------------------------------------------------


class SuperposedLinear(_Plain, nn.Linear):
    """Linear with a frozen weight and one mask per task (Wortsman et al., 2020, arXiv 2006.14769).

    The arguments of ``torch.nn.Linear``, and beside them:

    Args:
        masks: T masks, each bool [out_features, in_features] or packed, or a tensor of them; None: none yet, see ``add_task``.

    Parameters: ``weight``, which requires no gradient, and ``bias``. Buffers: ``mask_bits``, uint8 [T, out_features,
    8 * ceil(in_features / 64)], and ``alpha`` [T], the mixture that forward uses when it is not told the task: 1 / T each until
    it is changed. A state_dict of another number of tasks loads. ``reset_parameters`` draws weight and bias and leaves masks
    and alpha as they are; of a layer built on the meta device, masks keep every weight after ``to_empty``, and alpha is as at
    first, until a state_dict says more.
    """

    _base = nn.Linear

    alpha: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        masks: Tensor | Iterable[Tensor] | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight.requires_grad_(False)
        self._init_masks(type(self).__name__, masks)

    def _init_masks(self, op: str, masks: Any) -> None:
        if masks is not None and not isinstance(masks, Iterable):
            raise TypeError(f"{op}: masks must be a list of masks or a tensor of them, got {type(masks).__name__}")
        bits = [_bits(op, mask, self.weight) for mask in ([] if masks is None else masks)]
        n, k = rows_of(self.weight)
        empty = torch.empty(0, n, row_bytes(k), dtype=torch.uint8, device=self.weight.device)
        self.register_buffer("mask_bits", torch.stack(bits) if bits else empty)
        self.register_buffer("alpha", self._uniform(len(bits)))

    def _begin_masks(self) -> None:
        super()._begin_masks()
        self.alpha.fill_(1 / max(1, self.num_tasks))

    def _uniform(self, tasks: int) -> Tensor:
        return self.weight.new_full((tasks,), 1 / max(1, tasks))

    @classmethod
    def from_linear(cls, linear: nn.Linear, masks: Tensor | Iterable[Tensor] | None = None) -> "SuperposedLinear":
        """A SuperposedLinear with a frozen copy of linear's weight, its bias (the same Parameter), and these masks.

        Args:
            linear: exactly a ``torch.nn.Linear``.
            masks: as of the constructor.

        Raises:
            TypeError: linear is of another type, or pruned or reparametrised.
            ValueError: a mask is made for another weight.
        """
        cls._check_source("from_linear", linear)
        new = cls._empty_like(linear)
        new.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        new.bias = linear.bias
        new._init_masks(f"{cls.__name__}.from_linear", masks)
        return new

    @property
    def num_tasks(self) -> int:
        """The number of masks."""
        return self.mask_bits.shape[0]

    def add_task(self, mask: Tensor) -> int:
        """Adds a mask and makes alpha uniform again.

        Args:
            mask: bool [out_features, in_features], or packed; on any device.

        Returns:
            The new task's index.

        Raises:
            TypeError: mask is neither bool nor uint8.
            ValueError: it is made for another weight.
        """
        bits = _bits(f"{type(self).__name__}.add_task", mask, self.weight)
        with torch.inference_mode(False):  # to be trained with later, wherever it is added
            self.mask_bits = torch.cat([self.mask_bits, bits[None]])
            self.alpha = self._uniform(self.num_tasks)
        return self.num_tasks - 1

    def _of_task(self, task: Any) -> Tensor:
        """The bits of one task."""
        op = type(self).__name__
        task = check.integer(op, "task", task)
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"{op}: task must lie in 0..{self.num_tasks - 1}, got {task}")
        return self.mask_bits[task]

    def to_masked(self, task: int) -> MaskedLinear:
        """The :class:`MaskedLinear` of one task, with parameters of its own."""
        return MaskedLinear.from_linear(self._plain(self.weight.detach().clone()), self._of_task(task))

    def to_linear(self, task: int) -> nn.Linear:
        """The ``torch.nn.Linear`` of one task, with parameters of its own."""
        return self.to_masked(task).to_linear()

    def compress(self, task: int, *, format: str = "auto", batch_hint: int = 1) -> SparseLinear:  # noqa: A002
        """The :class:`SparseLinear` of one task; the other arguments as fourfold.compress."""
        return self.to_masked(task).compress(format=format, batch_hint=batch_hint)

    def forward(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        """x [.., in_features] -> [.., out_features].

        Args:
            x: for a tensor of tasks [B, .., in_features].
            task: int: this task's mask, the same bits as :class:`MaskedLinear` with it gives. int64 [B]: one task per sample.
                None: the mixture by alpha.
        """
        if self.num_tasks == 0:
            raise ValueError(f"{type(self).__name__}: there is no mask yet; add one with add_task(mask)")
        if task is None:
            return superposed_linear(x, self.weight, self.mask_bits, self.alpha, self.bias)
        if isinstance(task, Tensor):
            return task_linear(x, self.weight, self.mask_bits, task, self.bias)
        return masked_linear(x, self.weight, self._of_task(task), self.bias)

    def extra_repr(self) -> str:
        """That of Linear, and the number of tasks."""
        return f"{super().extra_repr()}, num_tasks={self.num_tasks}"

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
        op = type(self).__name__
        bits, alpha = state_dict.get(prefix + "mask_bits"), state_dict.get(prefix + "alpha")
        if isinstance(bits, Tensor):
            wrong = _of_another_k(op, bits, self.in_features)
            if not wrong and (bits.dim() != 3 or bits.shape[1] != self.out_features):
                wrong = f"{op}: mask_bits {tuple(bits.shape)} must be [T, {self.out_features}, {row_bytes(self.in_features)}]"
            if not wrong and isinstance(alpha, Tensor) and alpha.shape != bits.shape[:1]:
                wrong = f"{op}: alpha {tuple(alpha.shape)} must be one per mask, ({len(bits)},)"
            if wrong:
                error_msgs.append(wrong)
                return
            if len(bits) != self.num_tasks:
                self.mask_bits = self.mask_bits.new_empty(bits.shape)
                self.alpha = self._uniform(len(bits))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
