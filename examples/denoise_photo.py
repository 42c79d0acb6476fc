"""Denoises a photo by dropping its small DCT coefficients, averaged over shifted block grids. Needs scikit-learn and pillow.

The average over shifts hides the block edges (Coifman and Donoho, "Translation-invariant de-noising", 1995).
"""

import math

import fourfold as ff
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor

SIGMA = 20.0  # of the noise, in levels


def denoise(x: Tensor, threshold: float, step: int = 2) -> Tensor:
    """x [B, C, H, W] without the coefficients below the threshold; step: pixels from one block grid to the next."""
    total = torch.zeros_like(x)
    for down in range(0, 8, step):
        for across in range(0, 8, step):
            shifted = F.pad(x, (across, 0, down, 0), mode="replicate")
            coefs = ff.block_dct(shifted)
            kept = torch.where(coefs.abs() > threshold, coefs, 0.0)
            total += ff.block_idct(kept, size=shifted.shape[2:])[..., down:, across:]
    return total / (8 // step) ** 2


def psnr(x: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of 8-bit levels."""
    return 10 * math.log10(255**2 / (x - clean).square().mean().item())


torch.manual_seed(0)
clean = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[None].float()  # [1, 3, 427, 640], levels 0..255
noisy = clean + SIGMA * torch.randn_like(clean)
print(f"noisy: {psnr(noisy, clean):.1f} dB")
for factor in (2.0, 2.7, 3.5):
    # The DCT is orthonormal: noise of that sigma per pixel has it per coefficient too.
    print(f"coefficients below {factor} sigma dropped: {psnr(denoise(noisy, factor * SIGMA), clean):.1f} dB")
