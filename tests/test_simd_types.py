"""16-bit floats into and out of the kernels: every bit pattern, on every tier, as torch converts it."""

from __future__ import annotations

import battery
import fourfold as ff
import pytest
import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Signs of zero included; NaN payloads are free."""
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN elsewhere"
    wrong = (actual.view(torch.int16) != expected.view(torch.int16)) & ~expected.isnan()
    assert not wrong.any(), f"{what}: {int(wrong.sum())} wrong, first {expected[wrong][0]} became {actual[wrong][0]}"


def check_writing() -> None:
    """float32 to 16 bits: every value there is, the middle between two of them, and the float32 numbers beside that."""
    for dtype in DTYPES:
        values = every_pattern(dtype).float()
        below = values.view(torch.int32) & ~0x1FFF if dtype == torch.float16 else values.view(torch.int32)
        middle = (below | (0x1000 if dtype == torch.float16 else 0x8000)).view(torch.float32)
        beside = [middle.nextafter(torch.tensor(direction)) for direction in (-torch.inf, torch.inf)]
        # Below float16's normal numbers the middles are elsewhere: at odd multiples of half its smallest number.
        small = (torch.arange(0, 2**12, dtype=torch.float32) - 2**11) * 2.0**-25
        tables = torch.cat([values, middle, *beside, small]).view(-1, 64)
        ones = torch.ones(len(tables), 1, 1, 64, dtype=torch.int16)
        for layout in ("blocks", "planar"):
            # 1 * table, and nothing is subtracted or divided: the conversion alone is left.
            written = ff.dct_normalize(ones, tables, layout=layout, dtype=dtype)
            assert_same_bits(written.flatten(), tables.flatten().to(dtype), f"{dtype} written, {layout}")


def check_reading() -> None:
    """16 bits to float32, in whole vectors and at the ends of rows."""
    for dtype in DTYPES:
        values = every_pattern(dtype)
        largest = torch.finfo(dtype).max / 4  # whose sum float32 holds
        for across in (2**15, 3):  # blocks in a row
            padded = torch.cat([values, values.new_zeros(-len(values) % across)]).view(1, 1, -1, across)
            for layout in ("planar", "blocks"):
                # The mean of four equal pixels, in float32 within a rounding: to 16 bits, the pixel itself.
                pixels = padded.repeat_interleave(2, 2).repeat_interleave(2, 3)
                mean = ff.block_dct(pixels, 2, freqs=[0], scale=[0.5], layout=layout).flatten()[: len(values)]
                fits = ~(values.abs() > largest) | values.isinf()
                # Adding the shift of zero took the sign off -0.
                assert_same_bits(mean[fits], values[fits] + 0, f"{dtype} as pixels, {layout}, {across} in a row")
                # A block of one frequency: its pixels are half of that, which 16 bits hold exactly for normal numbers.
                coefs = padded if layout == "planar" else padded[..., None]
                half = ff.block_idct(coefs, 2, freqs=[0], layout=layout)[..., ::2, ::2].flatten()[: len(values)]
                normal = ~(values.abs() < 4 * torch.finfo(dtype).smallest_normal)
                wanted = (values.float() / 2).to(dtype)
                assert_same_bits(half[normal], wanted[normal], f"{dtype} as coefficients, {layout}, {across} in a row")


@pytest.mark.kernel
def test_writing():
    check_writing()


@pytest.mark.kernel
def test_reading():
    check_reading()


@pytest.mark.parametrize("tier", battery.tiers())
def test_on_tier(tier):
    battery.run_script(
        f"import fourfold, test_simd_types as t; assert fourfold.cpu_capability() == {tier!r}; "
        "t.check_writing(); t.check_reading()",
        FOURFOLD_CPU_CAPABILITY=tier,
    )
