"""What every family's arithmetic shares."""

import torch


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in: 16-bit floats in float32, rounded once."""
    return torch.float64 if dtype == torch.float64 else torch.float32
