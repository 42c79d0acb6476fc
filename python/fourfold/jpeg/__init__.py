"""JPEG files as DCT coefficients, and the input pipeline on them."""

from .dataset import DctDataset, collate, frequency_stats
from .files import JpegCoefficients, JpegError, read, read_batch, write

__all__ = ["DctDataset", "JpegCoefficients", "JpegError", "collate", "frequency_stats", "read", "read_batch", "write"]
