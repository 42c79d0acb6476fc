"""ResNet-50 (He et al., 2015), module for module torchvision's, so that weights go from one to the other."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import _checks as check

# Of torchvision's layer1 to layer4, the paper's stages 2 to 5: the width inside a block, the channels it gives, the blocks.
LAYERS = {"layer1": (64, 256, 3), "layer2": (128, 512, 4), "layer3": (256, 1024, 6), "layer4": (512, 2048, 3)}


class Bottleneck(nn.Module):
    """A residual block: convolutions 1×1, k×k and 1×1, each with a batch norm, added to the block's input.

    A kernel of 2 has no middle: it sees a pixel and its neighbours to the right and below, and the row and column of zeros that
    keep the size are added there.

    Args:
        channels: of the input.
        width: channels between the convolutions.
        out_channels: of the output.
        stride: 2 halves the size, rounded up.
        kernel_size: of the middle convolution, 1, 2 or 3.
        stride_in_1x1: the first convolution has the stride, as in the paper, and not the second, as in torchvision.
        project: a 1×1 convolution brings the input to the shape of the output; otherwise it is added as it is.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        out_channels: int,
        *,
        stride: int = 1,
        kernel_size: int = 3,
        stride_in_1x1: bool = False,
        project: bool = False,
    ) -> None:
        super().__init__()
        first, middle = (stride, 1) if stride_in_1x1 else (1, stride)
        self.pad_to_right_and_below = kernel_size == 2
        self.conv1 = nn.Conv2d(channels, width, 1, stride=first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size, stride=middle, padding=(kernel_size - 1) // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if project:
            shortcut = nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, channels, h, w] -> [B, out_channels, h / stride, w / stride], rounded up."""
        out = self.relu(self.bn1(self.conv1(x)))
        if self.pad_to_right_and_below:
            out = F.pad(out, (0, 1, 0, 1))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def stage(
    channels: int, width: int, out_channels: int, *, kernel_sizes: Sequence[int], stride: int = 1, stride_in_1x1: bool = False
) -> nn.Sequential:
    """One block per kernel size; the first one brings the input to out_channels, at this stride."""
    options: dict[str, Any] = {"stride_in_1x1": stride_in_1x1}
    blocks = [Bottleneck(channels, width, out_channels, stride=stride, kernel_size=kernel_sizes[0], project=True, **options)]
    blocks += [Bottleneck(out_channels, width, out_channels, kernel_size=k, **options) for k in kernel_sizes[1:]]
    return nn.Sequential(*blocks)


def layer(name: str, channels: int, *, stride: int = 2, stride_in_1x1: bool = False) -> nn.Sequential:
    """The layer of that name, for an input of so many channels."""
    width, out_channels, blocks = LAYERS[name]
    return stage(channels, width, out_channels, kernel_sizes=[3] * blocks, stride=stride, stride_in_1x1=stride_in_1x1)


def initialize(model: nn.Module) -> None:
    """Draws the convolutions' weights as the paper does; batch norms begin as they are built, with gain 1 and shift 0."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def reset(model: nn.Module) -> None:
    """Draws everything anew, as on construction."""
    for module in model.modules():
        if module is not model and callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()  # type: ignore[operator]
    initialize(model)


@contextlib.contextmanager
def made_on(device: Any) -> Iterator[None]:
    """What is built inside stands on this device; None: on torch's default."""
    with contextlib.nullcontext() if device is None else torch.device(device):
        yield


def check_arguments(op: str, num_classes: Any, stride_in_1x1: Any) -> None:
    """Raises unless num_classes is an int of 1 or more and stride_in_1x1 a bool."""
    if check.integer(op, "num_classes", num_classes) < 1:
        raise ValueError(f"{op}: num_classes must be 1 or more, got {num_classes}")
    if not isinstance(stride_in_1x1, bool):
        raise TypeError(f"{op}: stride_in_1x1 must be a bool, got {stride_in_1x1!r}")


class ResNet(nn.Module):
    """What :func:`resnet50` builds."""

    def __init__(self, num_classes: int, stride_in_1x1: bool) -> None:
        super().__init__()
        self.stride_in_1x1 = stride_in_1x1
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = layer("layer1", 64, stride=1, stride_in_1x1=stride_in_1x1)
        self.layer2 = layer("layer2", 256, stride_in_1x1=stride_in_1x1)
        self.layer3 = layer("layer3", 512, stride_in_1x1=stride_in_1x1)
        self.layer4 = layer("layer4", 1024, stride_in_1x1=stride_in_1x1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, num_classes)
        initialize(self)

    def reset_parameters(self) -> None:
        """Draws all weights anew, as they are at first; batch norms forget what they have seen."""
        reset(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> scores [B, num_classes]."""
        check.floating("resnet50", "x", x)
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"resnet50: x must be [B, 3, H, W], got {tuple(x.shape)}; a single image needs x[None]")
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def extra_repr(self) -> str:
        """The stride convention."""
        return f"stride_in_1x1={self.stride_in_1x1}"


def resnet50(
    num_classes: int = 1000, *, stride_in_1x1: bool = False, device: Any = None, dtype: torch.dtype | None = None
) -> ResNet:
    """ResNet-50 on pixels, torchvision's to the bit: its ``state_dict`` loads, and gives its outputs.

    25.6 million parameters; for 224 × 224 pixels 4.09 G multiply-adds in the convolutions and the last layer, 3.86 G with
    ``stride_in_1x1``. Weights are random, drawn as torchvision draws them.

    Args:
        num_classes: scores per image.
        stride_in_1x1: where the layers that halve the size do so: in their first 1×1 convolution, as the paper has it (also
            called version 1), or in the 3×3 one, as torchvision does (version 1.5).
        device: of the network.
        dtype: of its parameters and statistics.
    """
    check_arguments("resnet50", num_classes, stride_in_1x1)
    with made_on(device):
        return ResNet(num_classes, stride_in_1x1).to(dtype=dtype)
