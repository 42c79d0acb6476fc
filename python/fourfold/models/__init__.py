"""ResNet-50 on pixels, and on the coefficients of JPEG files."""

from .dct_resnet import VARIANTS, DCTResNet, dct_resnet50
from .resnet import Bottleneck, ResNet, resnet50

__all__ = ["VARIANTS", "Bottleneck", "DCTResNet", "ResNet", "dct_resnet50", "resnet50"]
