"""ResNet-50 on the DCT coefficients that JPEG files hold: Gueguen et al. (2018) and Xu et al. (2020)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import _checks as check
from .resnet import LAYERS, Bottleneck, check_arguments, initialize, layer, made_on, reset, resnet50, stage

VARIANTS = (
    "upsampling",
    "upsampling_rfa",
    "deconvolution_rfa",
    "downsampling",
    "late_concat",
    "late_concat_rfa",
    "late_concat_rfa_thinner",
    "dct24",
)


def _norm(channels: int) -> nn.BatchNorm2d:
    """Directly on coefficients. The 1×1 convolutions that follow have a gain per frequency, and their batch norms a shift."""
    return nn.BatchNorm2d(channels, affine=False)


def _rfa(channels: int, out_channels: int) -> nn.Sequential:
    """Receptive field aware: a block of coefficients has seen 8 × 8 pixels already, so kernels grow from 1 to 3."""
    return stage(channels, 256, out_channels, kernel_sizes=(1, 2, 3))


def _twice(x: Tensor, like: Tensor) -> Tensor:
    """Each position four times; where like has an odd size, the last ones lie outside of the image."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")[..., : like.shape[2], : like.shape[3]]


class DCTResNet(nn.Module):
    """What :func:`dct_resnet50` builds.

    Attributes:
        variant: its name.
        stride_in_1x1: the stride convention.
        freqs: the frequencies, in row-major order, that suffice as input; None if all 64 are needed. Readers may be restricted
            to them: ``DctDataset(.., freqs=model.freqs)``, ``rgb_to_dct(rgb, freqs=model.freqs)``.
    """

    layer4: nn.Module
    fc: nn.Linear
    freqs: tuple[int, ...] | None = None
    _carried: tuple[str, ...] = ("layer2", "layer3", "layer4")  # that a backbone's weights fit
    _new_input = "layer2"  # the one of them whose first block sees other channels here than there

    def __init__(self, variant: str, num_classes: int, stride_in_1x1: bool) -> None:
        super().__init__()
        self.variant, self.stride_in_1x1 = variant, stride_in_1x1
        self._begin()
        self.layer4 = self._layer("layer4", 1024)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, num_classes)
        initialize(self)

    def reset_parameters(self) -> None:
        """Draws all weights anew, as they are at first without a backbone; batch norms forget what they have seen."""
        reset(self)

    def _begin(self) -> None:
        """Builds what stands before layer4."""
        raise NotImplementedError

    def _layer(self, name: str, channels: int, stride: int = 2) -> nn.Sequential:
        return layer(name, channels, stride=stride, stride_in_1x1=self.stride_in_1x1)

    def forward(self, y: Tensor, cbcr: Tensor) -> Tensor:
        """Coefficients y [B, 64, h, w] and cbcr [B, 128, h / 2, w / 2], rounded up -> scores [B, num_classes]."""
        self._check(y, cbcr)
        x = self.layer4(self._front(y, cbcr))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def _front(self, y: Tensor, cbcr: Tensor) -> Tensor:
        """What layer4 sees: 1024 channels."""
        raise NotImplementedError

    def _check(self, y: Tensor, cbcr: Tensor) -> None:
        op = f"dct_resnet50 {self.variant}"
        check.floating(op, "y", y)
        check.floating(op, "cbcr", cbcr)
        counts = (64,) if self.freqs is None else (64, len(self.freqs))
        if y.dim() != 4 or y.shape[1] not in counts:
            wanted = " or ".join(map(str, counts))
            raise ValueError(
                f"{op}: y must be planar coefficients [B, {wanted}, h, w], got {tuple(y.shape)}; ff.rgb_to_dct(rgb) gives y "
                "and cbcr, and ff.jpeg.DctDataset those of files"
            )
        batch, channels, h, w = y.shape
        halved = check.has_shape(cbcr, batch, 2 * channels, (h + 1) // 2, (w + 1) // 2)
        if not (halved or (self.freqs is not None and check.has_shape(cbcr, batch, 2 * channels, h, w))):
            expected = (batch, 2 * channels, (h + 1) // 2, (w + 1) // 2)
            full = "" if self.freqs is None else f", or {(*expected[:2], h, w)}"
            raise ValueError(
                f"{op}: cbcr must have shape {expected}{full} beside y {tuple(y.shape)}, got {tuple(cbcr.shape)}; pass the "
                "cbcr that came with y, of subsampling='4:2:0'"
            )

    def extra_repr(self) -> str:
        """The variant and the stride convention."""
        return f"{self.variant!r}, stride_in_1x1={self.stride_in_1x1}"


class _Upsampling(DCTResNet):
    """Chroma brought to the grid of y: upsampling, upsampling_rfa, deconvolution_rfa."""

    def _begin(self) -> None:
        if self.variant == "deconvolution_rfa":  # no bias: bn would take it away again
            self.deconv_cb = nn.ConvTranspose2d(64, 64, 2, stride=2, bias=False)
            self.deconv_cr = nn.ConvTranspose2d(64, 64, 2, stride=2, bias=False)
        self.bn = _norm(192)
        self.rfa = nn.Sequential() if self.variant == "upsampling" else _rfa(192, 1024)
        self.layer2 = self._layer("layer2", 192 if self.variant == "upsampling" else 1024, stride=1)
        self.layer3 = self._layer("layer3", 512)

    def _front(self, y: Tensor, cbcr: Tensor) -> Tensor:
        if self.variant == "deconvolution_rfa":
            both = torch.cat([self.deconv_cb(cbcr[:, :64]), self.deconv_cr(cbcr[:, 64:])], 1)
            chroma = both[..., : y.shape[2], : y.shape[3]]
        else:
            chroma = _twice(cbcr, y)
        x = self.bn(torch.cat([y, chroma], 1))
        return self.layer3(self.layer2(self.rfa(x)))


class _Downsampling(DCTResNet):
    """Y brought to the grid of chroma by a learned convolution."""

    def _begin(self) -> None:
        self.bn_y, self.bn_cbcr = _norm(64), _norm(128)
        self.conv_y = nn.Conv2d(64, 256, 2, stride=2, bias=False)
        self.layer2 = self._layer("layer2", 256 + 128, stride=1)
        self.layer3 = self._layer("layer3", 512, stride=1)

    def _front(self, y: Tensor, cbcr: Tensor) -> Tensor:
        y = F.pad(self.bn_y(y), (0, y.shape[3] % 2, 0, y.shape[2] % 2))  # zero is a coefficient's mean now
        return self.layer3(self.layer2(torch.cat([self.conv_y(y), self.bn_cbcr(cbcr)], 1)))


class _LateConcat(DCTResNet):
    """Y halved by a path of its own: late_concat, late_concat_rfa, late_concat_rfa_thinner."""

    def _begin(self) -> None:
        rfa, thinner = "_rfa" in self.variant, self.variant.endswith("_thinner")
        of_y, of_cbcr = (768, 256) if thinner else (512, 512)  # 1024 together, as layer3's second block wants
        self.bn_y, self.bn_cbcr = _norm(64), _norm(128)
        self.rfa = _rfa(64, 384 if thinner else 1024) if rfa else nn.Sequential()
        if thinner:
            self.layer2 = stage(384, 128, 384, kernel_sizes=(3, 3, 3, 3))
            self._carried, self._new_input = ("layer3", "layer4"), ""
        else:
            self.layer2 = self._layer("layer2", 1024 if rfa else 64, stride=1)
        of_layer2 = 384 if thinner else 512
        self.halve_y = Bottleneck(of_layer2, 128, of_y, stride=2, stride_in_1x1=self.stride_in_1x1, project=True)
        self.block_cbcr = Bottleneck(128, 128, of_cbcr, kernel_size=1 if rfa else 3, project=True)
        self.layer3 = self._layer("layer3", 512)[1:]  # named 1 to 5 as there; the concatenation stands for block 0

    def _front(self, y: Tensor, cbcr: Tensor) -> Tensor:
        y = self.halve_y(self.layer2(self.rfa(self.bn_y(y))))
        return self.layer3(torch.cat([y, self.block_cbcr(self.bn_cbcr(cbcr))], 1))


class _DCT24(DCTResNet):
    """The lowest frequencies only, on a grid twice as fine, in place of the stem."""

    freqs = tuple(8 * u + v for u in range(4) for v in range(4))
    _carried = ("layer1", "layer2", "layer3", "layer4")
    _new_input = "layer1"

    def _begin(self) -> None:
        self.bn_y, self.bn_cbcr = _norm(16), _norm(8)
        self.layer1 = self._layer("layer1", 24, stride=1)
        self.layer2 = self._layer("layer2", 256)
        self.layer3 = self._layer("layer3", 512)

    def _front(self, y: Tensor, cbcr: Tensor) -> Tensor:
        side = 8 if y.shape[1] == 64 else 4
        y = self.bn_y(y.unflatten(1, (side, side))[:, :4, :4].flatten(1, 2))
        chroma = self.bn_cbcr(cbcr.unflatten(1, (2, side, side))[:, :, :2, :2].flatten(1, 3))
        if not check.has_shape(chroma, y.shape[0], 8, y.shape[2], y.shape[3]):
            chroma = _twice(chroma, y)
        return self.layer3(self.layer2(self.layer1(torch.cat([y, chroma], 1))))


# ---- a backbone's weights ------------------------------------------------------------------------------------------------

_PLAIN = (nn.ReLU, nn.Identity, nn.Sequential)  # what a ResNet-50 has inside its blocks besides convolutions and batch norms
_SETTINGS = ("kernel_size", "padding", "dilation", "groups", "padding_mode")
_CONVENTIONS = {((2, 2), (1, 1)): True, ((1, 1), (2, 2)): False}  # strides of conv1 and conv2 -> stride_in_1x1


def _not_a_backbone(error: type[Exception], problem: str) -> Exception:
    return error(
        f"dct_resnet50: backbone must be a torchvision-style ResNet-50, but {problem}; pass torchvision.models.resnet50() or "
        "ff.models.resnet50()"
    )


def _convention_of(backbone: Any) -> bool:
    """The stride_in_1x1 of a plain ResNet-50; raises for anything else."""
    if not isinstance(backbone, nn.Module):
        raise _not_a_backbone(TypeError, f"got {type(backbone).__name__}")
    found = dict(backbone.named_modules())
    for name, (_, _, blocks) in LAYERS.items():
        have = len(list(found[name].children())) if name in found else 0
        if have != blocks:
            raise _not_a_backbone(ValueError, f"{type(backbone).__name__} has {have} blocks in {name} instead of {blocks}")
    strides: set[Any] = {
        tuple(getattr(found.get(f"{name}.0.{conv}"), "stride", None) for conv in ("conv1", "conv2"))
        for name in ("layer2", "layer3", "layer4")
    }
    convention = _CONVENTIONS.get(next(iter(strides))) if len(strides) == 1 else None
    if convention is None:
        raise _not_a_backbone(
            ValueError, f"the strides of conv1 and conv2 where layer2, layer3 and layer4 begin are {sorted(map(str, strides))}"
        )
    with torch.device("meta"):
        expected = dict(resnet50(stride_in_1x1=convention).named_modules())
    for name, layer_there in expected.items():
        if name.startswith("layer"):
            _check_layer(name, found.get(name), layer_there)
    for name, module in found.items():
        if name.startswith("layer") and name not in expected and not isinstance(module, _PLAIN):
            raise _not_a_backbone(TypeError, f"{name} is a {type(module).__name__}")
    return convention


def _check_layer(name: str, module: nn.Module | None, expected: nn.Module) -> None:
    """Raises unless it is the same kind of layer with the same numbers, where that kind has any."""
    if not isinstance(expected, (nn.Conv2d, nn.BatchNorm2d)):
        return
    if module is None or type(module) is not type(expected):
        raise _not_a_backbone(TypeError, f"{name} is {'missing' if module is None else 'a ' + type(module).__name__}")
    for key, want in expected.state_dict().items():
        have = (module._parameters | module._buffers).get(key)
        if have is None or have.shape != want.shape:
            said = "missing, pruned or reparametrised" if have is None else f"of shape {tuple(have.shape)}"
            raise _not_a_backbone(ValueError, f"{name}.{key} is {said}, not of shape {tuple(want.shape)}")
    for setting in _SETTINGS:
        have, want = getattr(module, setting, None), getattr(expected, setting, None)
        if have != want:
            raise _not_a_backbone(ValueError, f"{name} has {setting}={have!r} instead of {want!r}")


def _take_over(model: DCTResNet, backbone: Any) -> None:
    """Puts the Parameters and statistics of the backbone's layers into the model's."""
    found = dict(backbone.named_modules())
    new = tuple(f"{model._new_input}.0.{part}" for part in ("conv1", "bn1", "downsample"))
    for name, module in model.named_modules():
        has_weights = isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
        if has_weights and name.split(".")[0] in model._carried and not (model._new_input and name.startswith(new)):
            _share(module, found[name])
    fc = found.get("fc")
    if type(fc) is nn.Linear and fc.bias is not None and fc.weight.shape == model.fc.weight.shape:
        _share(model.fc, fc)


def _share(module: nn.Module, other: nn.Module) -> None:
    module._parameters.update(other._parameters)
    module._buffers.update(other._buffers)
    if isinstance(module, nn.BatchNorm2d) and isinstance(other, nn.BatchNorm2d):
        module.eps, module.momentum = other.eps, other.momentum


_CLASSES: dict[str, type[DCTResNet]] = {
    "upsampling": _Upsampling,
    "upsampling_rfa": _Upsampling,
    "deconvolution_rfa": _Upsampling,
    "downsampling": _Downsampling,
    "late_concat": _LateConcat,
    "late_concat_rfa": _LateConcat,
    "late_concat_rfa_thinner": _LateConcat,
    "dct24": _DCT24,
}


def dct_resnet50(
    variant: str,
    num_classes: int = 1000,
    *,
    backbone: nn.Module | None = None,
    stride_in_1x1: bool = True,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> DCTResNet:
    """ResNet-50 on DCT coefficients, as :func:`fourfold.rgb_to_dct` and ``fourfold.jpeg.DctDataset`` give them.

    ``model(y, cbcr)`` takes planar, dequantised coefficients of 4:2:0 images of any size, y [B, 64, h, w] and cbcr
    [B, 128, h / 2, w / 2], rounded up. They need no normalisation: every variant begins with batch norms on them, which have no
    gain and shift (deconvolution_rfa with its deconvolutions, and then these).

    ======================= ======= ========= ========= ==================================================================
    variant                 params  GMAC, 1×1 GMAC, 3×3 what is before ResNet-50's later layers
    ======================= ======= ========= ========= ==================================================================
    upsampling              25.3 M  3.04      3.19      chroma doubled in size; layer2 begins with both, at stride 1
    upsampling_rfa          28.3 M  5.40      5.55      three blocks with kernels 1, 2, 3 before layer2
    deconvolution_rfa       28.3 M  5.40      5.56      the same, chroma doubled by learned 2×2 deconvolutions
    downsampling            25.5 M  2.39      2.47      y halved by a 2×2 convolution; layer2 and layer3 at stride 1
    late_concat             24.5 M  2.84      2.96      y through layer2 and a block that halves it; then chroma joins it
    late_concat_rfa         27.3 M  5.11      5.23      three blocks with kernels 1, 2, 3 before layer2
    late_concat_rfa_thinner 25.9 M  3.98      4.09      the same with fewer channels
    dct24                   25.5 M  3.70      3.93      24 frequencies in place of the stem; layer1 begins with them
    ======================= ======= ========= ========= ==================================================================

    GMAC: 10⁹ multiply-adds of convolutions and the last layer, for 1000 classes and 224 × 224 pixels (dct24: 448 × 448), where
    layers halve the size in their first 1×1 convolution or in their 3×3 one. ResNet-50 itself has 25.6 M, 3.86 and 4.09.

    The first seven are of Gueguen et al., "Faster Neural Networks Straight from JPEG" (2018). Where a size is odd, chroma that
    was doubled is cropped to y, and y that is halved is rounded up. dct24 is of Xu et al., "Learning in the Frequency Domain"
    (2020), which shows the network images twice as large: of y the 16 lowest frequencies, ``model.freqs``, and 4 each of Cb
    and Cr. There y and cbcr may be restricted to those 16, [B, 16, h, w] and [B, 32, ..], and cbcr may be as large as y, as
    subsampling="4:4:4" gives it.

    A backbone's layer2 to layer4 carry over, in dct24 its layer1 too, and its fc if it gives num_classes scores. New are layer2
    in late_concat_rfa_thinner, and in the others the two 1×1 convolutions that see other channels than there, with their batch
    norms; in all late_concat variants the concatenation replaces layer3's first block. What carries over has the backbone's
    names in ``state_dict`` and is shared, Parameters and running statistics: training changes the backbone too, unless it was
    given as ``copy.deepcopy(backbone)``. The model is on the backbone's device, in its dtype and in its training mode.

    Args:
        variant: one of the table's.
        num_classes: scores per image.
        backbone: torchvision's ResNet-50, :func:`resnet50`, or another one with the same layers and names, such as timm's.
        stride_in_1x1: layers that halve the size do so in their first 1×1 convolution, as in the papers' networks, not in the
            3×3 one. A backbone decides it.
        device: of the network. A backbone decides it.
        dtype: of its parameters and statistics. A backbone decides it.

    Raises:
        ValueError: the variant is unknown; backbone is another network; it has its strides in the 1×1 convolutions and
            ``stride_in_1x1=False`` was given; or device or dtype was given beside it.
    """
    check.one_of("dct_resnet50", "variant", variant, VARIANTS)
    check_arguments("dct_resnet50", num_classes, stride_in_1x1)
    if backbone is None:
        with made_on(device):
            return _CLASSES[variant](variant, num_classes, stride_in_1x1).to(dtype=dtype)
    if device is not None or dtype is not None:
        raise ValueError("dct_resnet50: the backbone decides device and dtype; leave them out, and move the model with .to()")
    convention = _convention_of(backbone)
    if convention and not stride_in_1x1:
        raise ValueError(
            "dct_resnet50: stride_in_1x1=False was given, but the backbone has its strides in the 1×1 convolutions; leave the "
            "argument out"
        )
    weight: Any = dict(backbone.named_modules())["layer4.0.conv1"].weight
    # Drawn on the CPU for every device that has values, so that these don't depend on it.
    with made_on("meta" if weight.is_meta else "cpu"):
        model = _CLASSES[variant](variant, num_classes, convention)
    model.to(weight.device, weight.dtype)
    _take_over(model, backbone)
    return model.train(backbone.training)
