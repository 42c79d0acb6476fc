"""block_dct, block_idct, dct_normalize: samples and refusals for the battery, and what is theirs alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import battery
import fourfold as ff
import numpy as np
import pytest
import scipy.fft
import torch
from battery import Op, Refusal, Sample, assert_close, assert_same
from fourfold.ops import _checks, _frequencies, blockdct
from fourfold.reference import REFERENCES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

SIZES = (2, 4, 8, 16, 32)
LAYOUTS = ("planar", "blocks", "interleaved")
ZIGZAG = ff.zigzag(8)[:24].tolist()


# ---- the references, called as the public functions are ------------------------------------------------------------------


def _rows(values: Any, f: int) -> Tensor | None:
    """A per-frequency argument as float64 [.., F]."""
    return None if values is None else torch.as_tensor(values, dtype=torch.float64).reshape(-1, f)


def _indices(freqs: Any) -> list[int] | None:
    return None if freqs is None else [int(f) for f in freqs]


def reference_dct(x, n=8, *, layout="planar", freqs=None, scale=None, shift=0.0):
    f = n * n if freqs is None else len(freqs)
    return REFERENCES["block_dct"](x, n, layout, _indices(freqs), _rows(scale, f), shift)


def reference_idct(y, n=8, *, layout="planar", channels=None, freqs=None, scale=None, shift=0.0, size=None):
    f = n * n if freqs is None else len(freqs)
    return REFERENCES["block_idct"](y, n, layout, _indices(freqs), _rows(scale, f), shift, size)


def reference_normalize(coefs, qtable, *, mean=None, std=None, freqs=None, layout="planar", dtype=None):
    f = 64 if freqs is None else len(freqs)

    def row(value: Any) -> Tensor | None:
        return None if value is None else torch.as_tensor(value, dtype=torch.float64).expand(f)

    tables = qtable.double().reshape(-1, 64)
    return REFERENCES["dct_normalize"](coefs, tables, row(mean), row(std), _indices(freqs), layout, torch.float64)


# ---- inputs --------------------------------------------------------------------------------------------------------------


def randn(*shape: int, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def factors(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Between 1/2 and 2, of both signs."""
    return (torch.exp2(torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 2 - 1)
            * torch.where(torch.arange(math.prod(shape)).view(shape) % 3 == 0, -1.0, 1.0)).to(dtype)  # fmt: skip


def coef_shape(b: int, c: int, height: int, width: int, n: int, layout: str, f: int) -> tuple[int, ...]:
    h, w = -(-height // n), -(-width // n)
    return {"planar": (b, c * f, h, w), "blocks": (b, c, h, w, f), "interleaved": (b, c, h * n, w * n)}[layout]


# (block_size, image [B, C, H, W], options): what both directions are tested on.
CASES: list[tuple[str, int, tuple[int, int, int, int], dict[str, Any]]] = [
    *((f"N={n} {layout}", n, (2, 2, n + 1, 3 * n - 1), {"layout": layout}) for n in SIZES for layout in LAYOUTS),
    *((f"N={n} one pixel {layout}", n, (1, 1, 1, 1), {"layout": layout}) for n in (2, 8) for layout in LAYOUTS),
    *((f"28 blocks across {layout}", 8, (1, 2, 16, 224), {"layout": layout}) for layout in LAYOUTS),
    *((f"odd {layout}", 8, (3, 1, 61, 97), {"layout": layout}) for layout in LAYOUTS),
    ("more blocks than a tile", 4, (1, 1, 66, 275), {}),
    ("many narrow rows", 2, (1, 2, 301, 3), {"layout": "blocks"}),
    ("24 frequencies planar", 8, (2, 3, 19, 37), {"freqs": ZIGZAG}),
    ("24 frequencies blocks", 8, (2, 3, 19, 37), {"freqs": ZIGZAG, "layout": "blocks"}),
    ("one frequency", 16, (2, 1, 17, 49), {"freqs": [255], "layout": "blocks"}),
    ("frequencies backwards", 4, (1, 2, 9, 35), {"freqs": list(range(15, -1, -1))}),
    ("scale [F] planar", 8, (1, 3, 9, 35), {"scale": factors(64, dtype=torch.float32)}),
    ("scale [C, F] planar", 8, (2, 3, 9, 35), {"scale": factors(3, 64, dtype=torch.float32)}),
    ("scale [C, F] blocks", 4, (2, 3, 9, 35), {"scale": factors(3, 16), "layout": "blocks"}),
    ("scale [C, F] interleaved", 8, (2, 3, 9, 35), {"scale": factors(3, 64), "layout": "interleaved"}),
    ("scale in float16", 2, (1, 1, 5, 7), {"scale": factors(4, dtype=torch.float16)}),
    ("scale of integers", 2, (1, 1, 5, 7), {"scale": [1, 2, 3, 4]}),
    ("scale of numbers", 2, (1, 1, 5, 7), {"scale": [0.1, 0.2, 0.3, 0.7]}),
    ("scale and frequencies", 8, (2, 2, 13, 21), {"scale": factors(2, 24), "freqs": ZIGZAG, "layout": "blocks"}),
    ("JPEG's shift", 8, (1, 3, 20, 36), {"shift": -128.0}),
    ("integer shift, edge", 32, (1, 1, 33, 65), {"shift": 3}),
]  # fmt: skip
EMPTY: list[tuple[str, int, tuple[int, int, int, int], dict[str, Any]]] = [
    *((f"no images {layout}", 8, (0, 3, 9, 9), {"layout": layout}) for layout in LAYOUTS),
    *((f"no channels {layout}", 4, (2, 0, 9, 9), {"layout": layout}) for layout in LAYOUTS),
    ("no images, scale", 4, (0, 3, 9, 9), {"scale": factors(3, 16)}),
    ("no channels, scale", 4, (1, 0, 9, 9), {"scale": factors(16)}),
]


def dct_samples(dtype: torch.dtype) -> list[Sample]:
    return [Sample(label, (randn(*size, dtype=dtype), n), options) for label, n, size, options in CASES + EMPTY]


def idct_samples(dtype: torch.dtype) -> list[Sample]:
    samples = []
    for i, (label, n, size, options) in enumerate(CASES + EMPTY):
        f = len(options["freqs"]) if "freqs" in options else n * n
        y = randn(*coef_shape(*size, n, options.get("layout", "planar"), f), dtype=dtype)
        cropped = {"size": size[2:]} if i % 3 else {}
        samples.append(Sample(label, (y, n), {"channels": size[1], **options, **cropped}))
    return samples


def _op_options(options: dict[str, Any], n: int, dtype: torch.dtype) -> tuple[str, Any, Tensor | None]:
    """layout, freqs and scale as the ops take them."""
    freqs = _indices(options.get("freqs"))
    scale = _rows(options.get("scale"), n * n if freqs is None else len(freqs))
    return options.get("layout", "planar"), freqs, None if scale is None else scale.to(battery.ACCUMULATE[dtype])


def dct_backward_samples(dtype: torch.dtype) -> list[Sample]:
    samples = []
    for label, n, size, options in CASES + EMPTY:
        layout, freqs, scale = _op_options(options, n, dtype)
        grad = randn(*coef_shape(*size, n, layout, n * n if freqs is None else len(freqs)), dtype=dtype)
        samples.append(Sample(label, (grad, n, layout, freqs, scale, list(size[2:]))))
    return samples


def idct_backward_samples(dtype: torch.dtype) -> list[Sample]:
    return [
        Sample(label, (randn(*size, dtype=dtype), n, *_op_options(options, n, dtype)))
        for label, n, size, options in CASES + EMPTY
    ]


def _small(make: Any) -> list[Sample]:
    """One sample per layout, with and without scale."""
    cases = (
        (4, (2, 2, 5, 9), {"layout": "planar", "freqs": [0, 3, 1, 7, 12]}),
        (2, (1, 2, 3, 5), {"layout": "blocks", "scale": factors(2, 4)}),
        (2, (2, 2, 3, 4), {"layout": "interleaved", "scale": factors(4)}),
        (4, (1, 3, 5, 4), {"layout": "planar", "scale": factors(3, 2), "freqs": [4, 1]}),
    )
    return [make(f"{layout_of(options)} N={n}", n, size, options) for n, size, options in cases]


def layout_of(options: dict[str, Any]) -> str:
    return options.get("layout", "planar")


def _frequencies_of(n: int, options: dict[str, Any]) -> int:
    return len(options["freqs"]) if "freqs" in options else n * n


def dct_small() -> list[Sample]:
    return _small(lambda label, n, size, options: Sample(label, (randn(*size), n), {"shift": 0.5, **options}))


def idct_small() -> list[Sample]:
    def make(label: str, n: int, size: tuple[int, ...], options: dict[str, Any]) -> Sample:
        y = randn(*coef_shape(*size, n, layout_of(options), _frequencies_of(n, options)))
        return Sample(label, (y, n), {"shift": 0.5, "size": size[2:], **options})

    return _small(make)


def dct_backward_small() -> list[Sample]:
    def make(label: str, n: int, size: tuple[int, ...], options: dict[str, Any]) -> Sample:
        grad = randn(*coef_shape(*size, n, layout_of(options), _frequencies_of(n, options)))
        return Sample(label, (grad, n, *_op_options(options, n, torch.float64), list(size[2:])))

    return _small(make)


def idct_backward_small() -> list[Sample]:
    return _small(lambda label, n, size, options: Sample(label, (randn(*size), n, *_op_options(options, n, torch.float64))))


def images(make: Any) -> list[Sample]:
    sizes = ((2, 3, 37, 53), (3, 3, 41, 30), (5, 3, 64, 72), (4, 3, 9, 130))
    return [Sample(str(size), make(randn(*size, dtype=torch.float32))) for size in sizes]


def coefficients(make: Any) -> list[Sample]:
    sizes = ((2, 3 * 64, 5, 7), (3, 3 * 64, 2, 9), (4, 3 * 64, 8, 8))
    return [Sample(str(size), make(randn(*size, dtype=torch.float32))) for size in sizes]


def _large_size(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """An image of 17 MB."""
    return (2, 3, 8 * 105, 840 * 4 // dtype.itemsize)


def large_image(dtype: torch.dtype) -> Tensor:
    return randn(*_large_size(dtype), dtype=dtype)


def large_coefficients(dtype: torch.dtype) -> Tensor:
    return randn(*coef_shape(*_large_size(dtype), 8, "planar", 64), dtype=dtype)


# ---- wrong calls ---------------------------------------------------------------------------------------------------------


def transform_refusals(op: str, name: str, call: Any, raw: Any) -> list[Refusal]:
    """What block_dct and block_idct refuse alike. call: the function; raw: the op, its last arguments given."""
    x = torch.zeros(1, 64, 8, 8)
    layouts = "('planar', 'blocks', 'interleaved')"
    floating = f"{op}: {name} must be float16, bfloat16, float32 or float64"
    return [
        Refusal(TypeError, f"{op}: {name} must be a Tensor, got list", lambda: call([1.0])),
        Refusal(TypeError, f"{floating}, got int64; convert it with .float()", lambda: call(x.long())),
        Refusal(TypeError, f"{floating}, got uint8; convert it with .float()", lambda: call(x.byte())),
        Refusal(TypeError, f"{floating}, got complex64", lambda: call(x * 1j)),
        Refusal(
            TypeError,
            f"{op}: {name} must be a Tensor, got Proxy; symbolic tracing (torch.fx) is not supported, use torch.export",
            lambda: torch.fx.symbolic_trace(call),
        ),
        Refusal(ValueError, f"{op}: block_size must be one of (2, 4, 8, 16, 32), got 5", lambda: call(x, 5)),
        Refusal(TypeError, f"{op}: block_size must be an int, got 8.0", lambda: call(x, 8.0)),
        Refusal(
            TypeError,
            f"{op}: {name} must be a dense tensor, got a sparse_coo one; convert it first",
            lambda: call(x.to_sparse()),
        ),
        Refusal(ValueError, f"{op}: layout must be one of {layouts}, got 'plane'", lambda: call(x, layout="plane")),
        Refusal(TypeError, f"{op}: layout must be one of {layouts}, got None", lambda: call(x, layout=None)),
        Refusal(
            ValueError,
            f"{op}: layout 'interleaved' keeps every frequency in place; drop freqs",
            lambda: call(x, layout="interleaved", freqs=[0]),
        ),
        Refusal(
            TypeError,
            f"{op}: freqs must be a list of ints or a 1-D int64 tensor, got float32 of shape (2,)",
            lambda: call(x, freqs=torch.zeros(2)),
        ),
        Refusal(
            TypeError,
            f"{op}: freqs must be a list of ints or a 1-D int64 tensor, got int",
            lambda: call(x, freqs=5),
        ),
        Refusal(TypeError, f"{op}: each of freqs must be an int, got 1.0", lambda: call(x, freqs=[0, 1.0])),
        Refusal(
            ValueError,
            f"{op}: scale is a meta tensor without values, the input is on cpu",
            lambda: call(x, scale=torch.ones(64, device="meta")),
        ),
        Refusal(ValueError, f"{op}: freqs must lie in 0..63 for block_size 8, got 64", lambda: call(x, freqs=[0, 64])),
        Refusal(ValueError, f"{op}: freqs must lie in 0..15 for block_size 4, got -1", lambda: call(x, 4, freqs=[-1])),
        Refusal(
            ValueError,
            f"{op}: freqs must name at least one frequency, got []; pass None to keep all",
            lambda: call(x, freqs=[]),
        ),
        Refusal(ValueError, f"{op}: freqs must not repeat, got [1, 2, 1]", lambda: call(x[:, :63], freqs=[1, 2, 1])),
        Refusal(
            TypeError,
            f"{op}: scale must be real, got complex64",
            lambda: call(x, scale=torch.ones(64, dtype=torch.complex64)),
        ),
        Refusal(TypeError, f"{op}: scale must be a tensor or numbers, got 'a'", lambda: call(x, scale="a")),
        Refusal(TypeError, f"{op}: scale must be a tensor or numbers, got [None]", lambda: call(x, scale=[None])),
        Refusal(TypeError, f"{op}: scale must be real, got bool", lambda: call(x, scale=torch.ones(64, dtype=torch.bool))),
        Refusal(
            TypeError,
            f"{op}: shift must be a number, got a Tensor; add a tensor to the input yourself",
            lambda: call(x, shift=torch.tensor(1.0)),
        ),
        Refusal(
            TypeError,
            f"{op}: shift must be a number, got str",
            lambda: call(x, shift="1"),
        ),
        Refusal(
            ValueError,
            f"{op}: shift must be within the range of float64, got {10**400}",
            lambda: call(x, shift=10**400),
        ),
        # The op itself, called past the Python checks.
        *raw_refusals(op, name, raw),
    ]


def raw_refusals(op: str, name: str, raw: Any) -> list[Refusal]:
    """What every op of the family refuses when called directly, in C++."""
    x = torch.zeros(1, 64, 8, 8)
    return [
        Refusal(
            ValueError,
            f"{op}: {name} must be float16, bfloat16, float32 or float64",
            lambda: raw(x.int(), 8, "planar", None, None),
        ),
        Refusal(ValueError, f"{op}: block_size must be 2, 4, 8, 16 or 32, got 64", lambda: raw(x, 64, "planar", None, None)),
        Refusal(ValueError, f"{op}: block_size must be 2, 4, 8, 16 or 32, got -8", lambda: raw(x, -8, "planar", None, None)),
        Refusal(
            ValueError,
            f"{op}: layout must be 'planar', 'blocks' or 'interleaved', got 'plane'",
            lambda: raw(x, 8, "plane", None, None),
        ),
        Refusal(
            ValueError,
            f"{op}: layout 'interleaved' keeps every frequency in place; drop freqs",
            lambda: raw(x, 8, "interleaved", [0], None),
        ),
        Refusal(ValueError, f"{op}: freqs must lie in 0..63 for block_size 8, got 64", lambda: raw(x, 8, "planar", [64], None)),
        Refusal(ValueError, f"{op}: freqs must lie in 0..63 for block_size 8, got -1", lambda: raw(x, 8, "planar", [-1], None)),
        Refusal(ValueError, f"{op}: freqs must not repeat, got 3 twice", lambda: raw(x, 8, "planar", [3, 3], None)),
        Refusal(
            ValueError,
            f"{op}: scale must be float32 (float64 for a float64 input)",
            lambda: raw(x, 8, "interleaved", None, torch.ones(1, 64).double()),
        ),
        Refusal(
            ValueError,
            f"{op}: scale must be float32 (float64 for a float64 input)",
            lambda: raw(x.double(), 8, "interleaved", None, torch.ones(1, 64)),
        ),
        Refusal(
            ValueError,
            f"{op}: scale must be [1, 64] or [64, 64], got (64,)",
            lambda: raw(x, 8, "interleaved", None, torch.ones(64)),
        ),
        Refusal(
            ValueError,
            f"{op}: scale must be [1, 64] or [64, 64], got (2, 64)",
            lambda: raw(x, 8, "interleaved", None, torch.ones(2, 64)),
        ),
        Refusal(
            ValueError,
            f"{op}: scale must be contiguous",
            lambda: raw(x, 8, "interleaved", None, torch.ones(64, 64).T),
        ),
    ]


def raw_dct(x, n, layout, freqs, scale):
    return torch.ops.fourfold.block_dct(x, n, layout, freqs, scale, 0.0)


def raw_idct(y, n, layout, freqs, scale):
    return torch.ops.fourfold.block_idct(y, n, layout, freqs, scale, 0.0, None)


def raw_dct_backward(grad, n, layout, freqs, scale):
    return torch.ops.fourfold._block_dct_backward(grad, n, layout, freqs, scale, [8, 8])


def raw_out_refusals(op: str, raw: Any) -> list[Refusal]:
    """raw(out) writes a [1, 1, 8, 8] in layout interleaved."""
    return [
        Refusal(ValueError, f"{op}: out must have the input's dtype", lambda: raw(torch.zeros(1, 1, 8, 8).double())),
        Refusal(ValueError, f"{op}: out has shape (1, 1, 8), not that of the result", lambda: raw(torch.zeros(1, 1, 8))),
        Refusal(ValueError, f"{op}: out has shape (1, 1, 8, 9), not that of the result", lambda: raw(torch.zeros(1, 1, 8, 9))),
    ]


def dct_refusals() -> list[Refusal]:
    op, x, call = "block_dct", torch.zeros(1, 3, 8, 8), ff.block_dct
    missing_batch = "; add the batch dimension with x[None]"
    pixel = torch.zeros(1, 1, 8, 8)
    out = torch.ops.fourfold._block_dct_out
    return [
        *transform_refusals(op, "x", call, raw_dct),
        Refusal(ValueError, f"{op}: x must be [B, C, H, W], got (3, 8, 8){missing_batch}", lambda: call(x[0])),
        Refusal(ValueError, f"{op}: x must be [B, C, H, W], got ()", lambda: call(torch.tensor(1.0))),
        Refusal(
            ValueError, f"{op}: x must have H and W of at least 1, got (1, 3, 0, 7)", lambda: call(x.new_zeros(1, 3, 0, 7))
        ),
        Refusal(
            ValueError, f"{op}: x must have H and W of at least 1, got (1, 3, 7, 0)", lambda: call(x.new_zeros(1, 3, 7, 0))
        ),
        Refusal(ValueError, f"{op}: scale must be [64] or [3, 64], got [63]", lambda: call(x, scale=torch.ones(63))),
        Refusal(ValueError, f"{op}: scale must be [64] or [3, 64], got [1, 64]", lambda: call(x, scale=torch.ones(1, 64))),
        Refusal(ValueError, f"{op}: scale must be [2] or [3, 2], got []", lambda: call(x, scale=1.0, freqs=[0, 1])),
        Refusal(ValueError, f"{op}: x must be [B, C, H, W], got (8, 8)", lambda: raw_dct(x[0, 0], 8, "planar", None, None)),
        Refusal(
            ValueError,
            f"{op}: the image must have H and W of at least 1, got (1, 3, 0, 7)",
            lambda: raw_dct(x.new_zeros(1, 3, 0, 7), 8, "planar", None, None),
        ),
        *raw_out_refusals(op, lambda y: out(pixel, 8, "interleaved", None, None, 0.0, y)),
    ]


def idct_refusals() -> list[Refusal]:
    op, call = "block_idct", ff.block_idct
    planar, blocks, pixels = torch.zeros(1, 192, 2, 3), torch.zeros(1, 3, 2, 3, 64), torch.zeros(1, 3, 16, 24)
    pixel = torch.zeros(1, 1, 8, 8)
    out = torch.ops.fourfold._block_idct_out
    raw = torch.ops.fourfold.block_idct
    fit = "does not fit 2 x 3 blocks of 8; it must round up to (16, 24)"
    return [
        *transform_refusals(op, "y", call, raw_idct),
        Refusal(
            ValueError,
            f"{op}: y must be 4-D in layout 'planar', got (192, 2, 3); add the batch dimension with y[None]",
            lambda: call(planar[0]),
        ),
        Refusal(
            ValueError,
            f"{op}: y must be 4-D in layout 'planar', got (1, 3, 2, 3, 64); [B, C, h, w, F] is layout='blocks'",
            lambda: call(blocks),
        ),
        Refusal(
            ValueError,
            f"{op}: y must be 5-D in layout 'blocks', got (1, 192, 2, 3); [B, C*F, h, w] is layout='planar'",
            lambda: call(planar, layout="blocks"),
        ),
        Refusal(ValueError, f"{op}: y must be 4-D in layout 'planar', got (2, 3)", lambda: call(planar[0, 0])),
        Refusal(
            ValueError,
            f"{op}: planar y must have channels * 64 planes, got 191; check block_size, freqs and layout",
            lambda: call(planar[:, 1:]),
        ),
        Refusal(
            ValueError,
            f"{op}: the last dimension of y must be 64 frequencies, got (1, 3, 2, 3, 63)",
            lambda: call(blocks[..., 1:], layout="blocks"),
        ),
        Refusal(
            ValueError,
            f"{op}: y must be whole blocks of 8 in layout 'interleaved', got (1, 3, 16, 23)",
            lambda: call(pixels[..., 1:], layout="interleaved"),
        ),
        Refusal(ValueError, f"{op}: y must have at least one block, got (1, 192, 0, 3)", lambda: call(planar[:, :, :0])),
        Refusal(
            ValueError,
            f"{op}: channels=4, but y of shape (1, 192, 2, 3) has 3 in layout 'planar'",
            lambda: call(planar, channels=4),
        ),
        Refusal(ValueError, f"{op}: size must be (H, W), two ints, got (16,)", lambda: call(planar, size=(16,))),
        Refusal(TypeError, f"{op}: size must be (H, W), two ints, got 16", lambda: call(planar, size=16)),
        Refusal(TypeError, f"{op}: each of size must be an int, got 16.0", lambda: call(planar, size=(16.0, 24))),
        Refusal(ValueError, f"{op}: size (17, 24) {fit}", lambda: call(planar, size=(17, 24))),
        Refusal(ValueError, f"{op}: size (16, 16) {fit}", lambda: call(planar, size=(16, 16))),
        Refusal(ValueError, f"{op}: scale must be [64] or [3, 64], got [4, 64]", lambda: call(planar, scale=torch.ones(4, 64))),
        Refusal(
            ValueError,
            f"{op}: y must be 5-D in layout 'blocks', got (1, 192, 2, 3)",
            lambda: raw_idct(planar, 8, "blocks", None, None),
        ),
        Refusal(ValueError, f"{op}: size must be (H, W)", lambda: raw(planar, 8, "planar", None, None, 0.0, [16])),
        Refusal(
            ValueError,
            f"{op}: size (17, 24) must round up to the 2 x 3 blocks of y",
            lambda: raw(planar, 8, "planar", None, None, 0.0, [17, 24]),
        ),
        Refusal(
            ValueError,
            f"{op}: y of shape (1, 191, 2, 3) does not hold whole blocks of 64 frequencies in layout 'planar'",
            lambda: raw_idct(planar[:, 1:], 8, "planar", None, None),
        ),
        Refusal(
            ValueError,
            f"{op}: y of shape (1, 3, 16, 23) does not hold whole blocks of 64 frequencies in layout 'interleaved'",
            lambda: raw(pixels[..., 1:], 8, "interleaved", None, None, 0.0, [16, 16]),
        ),
        Refusal(
            ValueError,
            f"{op}: y of shape (1, 3, 2, 3, 64) does not hold whole blocks of 1 frequencies in layout 'blocks'",
            lambda: raw_idct(blocks, 8, "blocks", [0], None),
        ),
        Refusal(
            ValueError,
            f"{op}: the image must have H and W of at least 1, got (1, 3, 0, 24)",
            lambda: raw_idct(planar[:, :, :0], 8, "planar", None, None),
        ),
        *raw_out_refusals(op, lambda y: out(pixel, 8, "interleaved", None, None, 0.0, None, y)),
    ]


def normalize_refusals() -> list[Refusal]:
    op, call = "dct_normalize", ff.dct_normalize
    coefs, table = torch.zeros(2, 3, 4, 5, 64, dtype=torch.int16), torch.ones(64)
    shapes = "qtable must be [64], or one table per image as [B, 64] or [B, C, 64]"

    def raw(coefs=coefs, table=table[None], mean=None, std=None, freqs=None, layout="planar", dtype=torch.float32):
        return torch.ops.fourfold.dct_normalize(coefs, table, mean, std, freqs, layout, dtype)

    kind = "in float32 (float64 for dtype float64)"
    return [
        Refusal(TypeError, f"{op}: coefs must be a Tensor, got list", lambda: call([1], table)),
        Refusal(TypeError, f"{op}: qtable must be a Tensor, got list", lambda: call(coefs, [1.0] * 64)),
        Refusal(TypeError, f"{op}: coefs must be int16 quantised coefficients, got int32", lambda: call(coefs.int(), table)),
        Refusal(
            ValueError,
            f"{op}: layout must be one of ('planar', 'blocks'), got 'interleaved'",
            lambda: call(coefs, table, layout="interleaved"),
        ),
        Refusal(
            TypeError,
            f"{op}: dtype must be float16, bfloat16, float32 or float64, got int16",
            lambda: call(coefs, table, dtype=torch.int16),
        ),
        Refusal(ValueError, f"{op}: coefs must be [.., h, w, 64], got (5, 64)", lambda: call(coefs[0, 0, 0], table)),
        Refusal(ValueError, f"{op}: coefs must be [.., h, w, 64], got (2, 3, 4, 5, 63)", lambda: call(coefs[..., 1:], table)),
        Refusal(TypeError, f"{op}: qtable must hold numbers, got bool", lambda: call(coefs, table.bool())),
        Refusal(TypeError, f"{op}: qtable must hold numbers, got complex64", lambda: call(coefs, table * 1j)),
        Refusal(ValueError, f"{op}: {shapes}, got [63] for coefs (2, 3, 4, 5, 64)", lambda: call(coefs, table[1:])),
        Refusal(
            ValueError, f"{op}: {shapes}, got [3, 64] for coefs (2, 3, 4, 5, 64)", lambda: call(coefs, table.expand(3, 64))
        ),
        Refusal(ValueError, f"{op}: {shapes}, got [] for coefs (2, 3, 4, 5, 64)", lambda: call(coefs, table[0])),
        Refusal(
            ValueError,
            f"{op}: {shapes}, got [2, 3, 4, 64] for coefs (2, 3, 4, 5, 64)",
            lambda: call(coefs, table.expand(2, 3, 4, 64)),
        ),
        Refusal(
            ValueError,
            f"{op}: qtable is on meta, coefs on cpu; move one with .to()",
            lambda: call(coefs, table.to("meta")),
        ),
        Refusal(ValueError, f"{op}: freqs must not repeat, got [1, 1]", lambda: call(coefs, table, freqs=[1, 1])),
        Refusal(ValueError, f"{op}: mean must be a number or [64], got [63]", lambda: call(coefs, table, mean=table[1:])),
        Refusal(
            ValueError, f"{op}: std must be a number or [2], got [64]", lambda: call(coefs, table, std=table, freqs=[0, 1])
        ),
        Refusal(TypeError, f"{op}: mean must be real, got complex64", lambda: call(coefs, table, mean=table * 1j)),
        Refusal(TypeError, f"{op}: mean must be a tensor or numbers, got 1j", lambda: call(coefs, table, mean=1j)),
        Refusal(TypeError, f"{op}: std must be a tensor or numbers, got '1'", lambda: call(coefs, table, std="1")),
        # The op itself, called past the Python checks.
        Refusal(
            ValueError,
            f"{op}: layout must be 'planar' or 'blocks', got 'interleaved'",
            lambda: raw(layout="interleaved"),
        ),
        Refusal(
            ValueError,
            f"{op}: layout must be 'planar', 'blocks' or 'interleaved', got 'plane'",
            lambda: raw(layout="plane"),
        ),
        Refusal(ValueError, f"{op}: freqs must lie in 0..63 for block_size 8, got 64", lambda: raw(freqs=[64])),
        Refusal(ValueError, f"{op}: freqs must not repeat, got 1 twice", lambda: raw(freqs=[1, 1])),
        Refusal(ValueError, f"{op}: coefs must be int16 quantised coefficients", lambda: raw(coefs.int())),
        Refusal(ValueError, f"{op}: coefs must be [.., h, w, 64], got (5, 64)", lambda: raw(coefs[0, 0, 0])),
        Refusal(ValueError, f"{op}: dtype must be float16, bfloat16, float32 or float64", lambda: raw(dtype=torch.int64)),
        Refusal(ValueError, f"{op}: qtable must be contiguous [G, 64] {kind}, got shape (64,)", lambda: raw(table=table)),
        Refusal(
            ValueError,
            f"{op}: qtable must be contiguous [G, 64] {kind}, got shape (2, 64)",
            lambda: raw(table=torch.ones(64, 2).T),
        ),
        Refusal(
            ValueError,
            f"{op}: mean must be contiguous [F] {kind}, got shape (63,)",
            lambda: raw(mean=table[1:]),
        ),
        Refusal(
            ValueError,
            f"{op}: std must be contiguous [F] {kind}, got shape (64,)",
            lambda: raw(std=table.double()),
        ),
        Refusal(ValueError, f"{op}: 4 tables don't divide 6 leading planes of coefs", lambda: raw(table=torch.ones(4, 64))),
        Refusal(ValueError, f"{op}: 0 tables don't divide 6 leading planes of coefs", lambda: raw(table=torch.ones(0, 64))),
    ]


def zigzag_refusals() -> list[Refusal]:
    sizes = "zigzag: block_size must be one of (2, 4, 8, 16, 32)"
    return [
        Refusal(ValueError, f"{sizes}, got 3", lambda: ff.zigzag(3)),
        Refusal(TypeError, f"{sizes}, got 8.0", lambda: ff.zigzag(8.0)),
    ]


def backward_refusals(op: str, raw: Any) -> list[Refusal]:
    return raw_refusals(op, "grad", raw)


# ---- dct_normalize's samples ---------------------------------------------------------------------------------------------


def quantised(*shape: int) -> Tensor:
    coefs = torch.randint(-200, 200, shape, generator=torch.Generator().manual_seed(3), dtype=torch.int16)
    if coefs.numel() > 2:
        coefs.view(-1)[0], coefs.view(-1)[-1] = -32768, 32767
    return coefs


def table(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    # 1 for the extreme values above, so that float16 can hold the product.
    q = torch.randint(1, 100, shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    q[..., 0], q[..., -1] = 1, 1
    return q


def normalize_samples(dtype: torch.dtype) -> list[Sample]:
    mean, std = randn(64, dtype=torch.float32, spread=20), factors(64, dtype=torch.float32)
    cases = [
        ("one block", quantised(1, 1, 64), table(64), {}),
        ("3-D planar", quantised(5, 7, 64), table(64), {}),
        ("3-D blocks", quantised(5, 7, 64), table(64), {"layout": "blocks"}),
        ("integer table", quantised(2, 3, 5, 64), table(64, dtype=torch.int32), {"mean": mean, "std": std}),
        ("uint8 table", quantised(2, 3, 5, 64), table(64, dtype=torch.uint8), {"layout": "blocks", "std": std}),
        ("28 blocks across", quantised(2, 28, 28, 64), table(64), {"mean": mean, "std": std}),
        ("table per image planar", quantised(2, 3, 4, 5, 64), table(2, 64), {"mean": mean}),
        ("table per image blocks", quantised(2, 3, 4, 5, 64), table(2, 64), {"layout": "blocks", "std": std}),
        ("table per plane planar", quantised(2, 3, 4, 5, 64), table(2, 3, 64), {"std": std}),
        ("table per plane blocks", quantised(2, 3, 4, 5, 64), table(2, 3, 64), {"layout": "blocks", "mean": mean}),
        ("6-D", quantised(2, 1, 3, 2, 5, 64), table(2, 64, dtype=torch.float64), {"mean": mean.double(), "std": std}),
        ("numbers", quantised(3, 9, 11, 64), table(64), {"mean": 0.1, "std": 0.7}),
        ("integers", quantised(3, 9, 11, 64), table(64), {"mean": 3, "std": 2, "layout": "blocks"}),
        ("0-dim tensors", quantised(1, 2, 3, 64), table(64), {"mean": torch.tensor(1.5), "std": torch.tensor(4)}),
        ("24 frequencies planar, dropped", quantised(2, 5, 7, 64), table(64), {"freqs": ZIGZAG, "mean": mean[:24]}),
        (
            "24 frequencies blocks, dropped",
            quantised(2, 5, 7, 64),
            table(2, 64),
            {"freqs": ZIGZAG, "std": std[:24], "layout": "blocks"},
        ),
        ("backwards", quantised(9, 9, 64), table(64), {"freqs": list(range(63, -1, -1)), "layout": "blocks"}),
        ("one frequency, dropped", quantised(2, 9, 9, 64), table(64), {"freqs": [63], "mean": 5.0}),
        ("no images", quantised(0, 3, 5, 7, 64), table(0, 64), {}),
        ("no blocks", quantised(2, 0, 7, 64), table(2, 64), {"layout": "blocks", "mean": mean}),
    ]
    return [Sample(label, (coefs, q), {**options, "dtype": dtype}) for label, coefs, q, options in cases]


def normalize_small() -> list[Sample]:
    double = {"dtype": torch.float64}
    statistics = {"mean": randn(64), "std": factors(64)}
    few = {"freqs": [5, 0, 9], "mean": randn(3), "std": factors(3)}
    return [
        Sample("table", (quantised(2, 1, 2, 64) // 200, table(64, dtype=torch.float64)), double),
        Sample("table per image, statistics", (quantised(2, 2, 1, 2, 64) // 200, table(2, 64, dtype=torch.float64)),
               {**double, "freqs": [5, 0, 9], "mean": randn(3), "std": factors(3)}),
        Sample("blocks, few", (quantised(2, 1, 2, 64) // 200, table(64, dtype=torch.float64)),
               {**double, **few, "layout": "blocks"}),
        Sample("std alone", (quantised(1, 2, 64) // 200, table(64, dtype=torch.float64)), {**double, "std": statistics["std"]}),
    ]  # fmt: skip


def normalize_sizes() -> list[Sample]:
    sizes = ((2, 5, 7, 64), (3, 2, 9, 64), (5, 8, 8, 64))
    return [Sample(str(size), (quantised(*size), table(64)), {"mean": randn(64, dtype=torch.float32)}) for size in sizes]


def normalize_large(dtype: torch.dtype) -> Sample:
    return Sample("large", (quantised(3, 150, 151, 64), table(3, 64)), {"mean": 0.5, "std": factors(64), "dtype": dtype})


# ---- _normalize_grids: images whose planes lie apart ---------------------------------------------------------------------


def grids_of(op: Callable[..., Tensor], coefs: Tensor, *args: Any) -> Tensor:
    """Each plane of coefs by itself."""
    return op(list(coefs), *args)


def reference_grids(coefs, qtable, mean, std, *rest):
    statistics = (None if t is None else t.double() for t in (mean, std))
    return REFERENCES["_normalize_grids"](list(coefs), qtable.double(), *statistics, *rest[:-1], torch.float64)


def grids_samples(dtype: torch.dtype) -> list[Sample]:
    work = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std = randn(3, 64, dtype=work, spread=20), factors(3, 64, dtype=work)
    large = quantised(6, 11, 12, 64)
    crops = large[:, 1:9, 2:11]
    cases = [
        ("one block", quantised(1, 1, 1, 64), None, None, 1, [], None),
        ("mirrored", quantised(2, 2, 3, 64), None, None, 1, [1], None),
        ("28 blocks across", quantised(3, 28, 28, 64), mean[:1], std[:1], 1, [0, 2], None),
        ("two planes", quantised(6, 5, 7, 64), mean[:2], std[:2], 2, [2, 3], None),
        ("three planes, crops", crops, mean, None, 3, [0, 1, 2], None),
        ("crops, dropped", crops, None, std[:2, :24].contiguous(), 2, [5], ZIGZAG),
        ("frequencies apart", crops.transpose(-1, -2).contiguous().transpose(-1, -2), mean, std, 3, [0], None),
        ("rows from below", large.flip(1), mean[:1, :2].contiguous(), None, 1, [4], [63, 0]),
        ("no frequency", quantised(2, 3, 3, 64), None, None, 2, [], []),
        ("no blocks", quantised(2, 0, 3, 64), mean[:1], None, 1, [0], None),
        ("the same twice", quantised(1, 3, 3, 64).expand(2, 3, 3, 64), None, std[:1], 1, [1], None),
    ]
    return [Sample(label, (coefs, table(len(coefs), 64, dtype=work), *rest, dtype)) for label, coefs, *rest in cases]


def grids_small() -> list[Sample]:
    given = (factors(2, 64), randn(1, 2), None, 1, [1], [5, 0], torch.float64)
    return [Sample("crops", (quantised(2, 2, 3, 64) // 200, *given))]


def grids_sizes() -> list[Sample]:
    given = (factors(4, 64, dtype=torch.float32), None, None, 2, [2, 3], None, torch.float32)
    return [Sample(str(size), (quantised(4, *size, 64), *given)) for size in ((5, 7), (2, 9), (8, 8))]


def grids_refusals() -> list[Refusal]:
    coefs, rows = torch.zeros(4, 2, 3, 64, dtype=torch.int16), torch.ones(4, 64)

    def refused(
        message: str,
        *,
        grids: Any = coefs,
        table: Tensor = rows,
        mean=None,
        std=None,
        planes=2,
        mirrored=(),
        dtype=torch.float32,
    ):
        return Refusal(
            ValueError,
            f"_normalize_grids: {message}",
            lambda: torch.ops.fourfold._normalize_grids(list(grids), table, mean, std, planes, list(mirrored), [0, 1], dtype),
        )

    kind = "in float32 (float64 for dtype float64), got shape"
    return [
        refused("grids must be those of whole images of 3 planes, got 4", planes=3),
        refused("grids must be those of whole images of 0 planes, got 4", planes=0),
        refused("grids must be those of whole images of 2 planes, got 0", grids=[]),
        refused("dtype must be float16, bfloat16, float32 or float64", dtype=torch.int16),
        refused("grids must be [h, w, 64], got (2, 3)", grids=coefs[..., 0]),
        refused("grids must be [h, w, 64], got (2, 3, 63)", grids=coefs[..., 1:]),
        refused("grids must be int16 quantised coefficients", grids=coefs.int()),
        refused("grids must have one shape, got (2, 3, 64) and (1, 3, 64)", grids=[*coefs[:3], coefs[3, :1]]),
        refused("grids must have one shape, got (2, 3, 64) and (2, 3, 63)", grids=[*coefs[:3], coefs[3, ..., 1:]]),
        refused("mirrored must hold numbers of grids below 4, got 4", mirrored=[4]),
        refused("mirrored must hold numbers of grids below 4, got -1", mirrored=[-1]),
        refused(f"qtable must be contiguous [grids, 64] {kind} (3, 64)", table=rows[1:]),
        refused(f"qtable must be contiguous [grids, 64] {kind} (4, 64)", table=rows.double()),
        refused(f"mean must be contiguous [planes, F] {kind} (2, 64)", mean=rows[:2]),
        refused(f"std must be contiguous [planes, F] {kind} (1, 2)", std=rows[:1, :2].contiguous()),
    ]


# ---- what the battery is fed ---------------------------------------------------------------------------------------------

OPS = (
    Op(
        name="block_dct",
        call=ff.block_dct,
        reference=reference_dct,
        out="_block_dct_out",
        samples=dct_samples,
        small=dct_small,
        sizes=lambda: images(lambda x: (x,)),
        dynamic=(0, 2, 3),
        large=lambda dtype: Sample("large", (large_image(dtype),), {"scale": factors(64)}),
        refusals=dct_refusals,
    ),
    Op(
        name="block_idct",
        call=ff.block_idct,
        reference=reference_idct,
        out="_block_idct_out",
        samples=idct_samples,
        small=idct_small,
        sizes=lambda: coefficients(lambda y: (y,)),
        dynamic=(0, 2, 3),
        large=lambda dtype: Sample("large", (large_coefficients(dtype),)),
        refusals=idct_refusals,
    ),
    Op(
        name="_block_dct_backward",
        call=blockdct._block_dct_backward,
        reference=REFERENCES["_block_dct_backward"],
        samples=dct_backward_samples,
        small=dct_backward_small,
        sizes=lambda: coefficients(lambda y: (y, 8, "planar", None, None, [8 * y.shape[2], 8 * y.shape[3]])),
        dynamic=(0, 2, 3),
        large=lambda dtype: Sample("large", (large_coefficients(dtype), 8, "planar", None, None, list(_large_size(dtype)[2:]))),
        refusals=lambda: backward_refusals("_block_dct_backward", raw_dct_backward),
    ),
    Op(
        name="_block_idct_backward",
        call=blockdct._block_idct_backward,
        reference=REFERENCES["_block_idct_backward"],
        samples=idct_backward_samples,
        small=idct_backward_small,
        sizes=lambda: images(lambda x: (x, 8, "planar", None, None)),
        dynamic=(0, 2, 3),
        large=lambda dtype: Sample("large", (large_image(dtype), 8, "planar", None, None)),
        refusals=lambda: backward_refusals("_block_idct_backward", torch.ops.fourfold._block_idct_backward),
    ),
    Op(
        name="dct_normalize",
        call=ff.dct_normalize,
        reference=reference_normalize,
        samples=normalize_samples,
        small=normalize_small,
        sizes=normalize_sizes,
        dynamic=(0, 1, 2),
        large=normalize_large,
        refusals=normalize_refusals,
    ),
    Op(
        name="_normalize_grids",
        call=functools.partial(grids_of, blockdct._normalize_grids),
        reference=reference_grids,
        samples=grids_samples,
        small=grids_small,
        sizes=grids_sizes,
        dynamic=(1, 2),
        large=lambda dtype: Sample(
            "large",
            (
                quantised(6, 75, 151, 64),
                table(6, 64, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
                None,
                None,
                2,
                [1, 4],
                None,
                dtype,
            ),
        ),
        refusals=grids_refusals,
        differentiable=False,
        excused={"exports": "asks for a dynamic number of planes, which a list of them has not"},
    ),
)

test_op = battery.tests_of(OPS)


def test_every_refusal_is_tested():
    """No `raise` in the family's file, nor in the checks it uses, is without a wrong call that reaches it."""
    x, tracked = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8, requires_grad=True)

    def into(out: Any, x: Tensor = x) -> Tensor:
        return ff.block_dct(x, layout="interleaved", out=out)

    with torch.inference_mode():
        untracked = torch.zeros(1, 1, 8, 8)

    class Distributed(torch.Tensor):
        """What tells a DTensor; real ones need processes, and are in test_distributed.py."""

        device_mesh = placements = ()

    # Their texts are looked at by the battery's out_argument_is_refused.
    out_refusals = [
        Refusal(TypeError, "", lambda: ff.block_dct(x.as_subclass(Distributed))),
        Refusal(TypeError, "", lambda: into([1.0])),
        Refusal(TypeError, "", lambda: into(x.double())),
        Refusal(ValueError, "", lambda: into(torch.zeros(1, 1, 8, 9))),
        Refusal(ValueError, "", lambda: into(torch.zeros(1, 1, 1, 1).expand(1, 1, 8, 8))),
        Refusal(ValueError, "", lambda: into(torch.zeros(1, 1, 8, 8, dtype=torch.complex64).conj().imag)),
        Refusal(ValueError, "", lambda: into(x)),
        Refusal(ValueError, "", lambda: into(untracked)),
        Refusal(ValueError, "", lambda: ff.nn.BlockDCT2d(scale=torch.ones(3))),
        Refusal(ValueError, "", lambda: into(x, tracked)),
        Refusal(ValueError, "", lambda: torch.func.jvp(lambda t: into(torch.zeros(1, 1, 8, 8), t), (x,), (x,))),
    ]
    for module in (blockdct, _checks, _frequencies):
        assert battery.unreached_raises(OPS, module, [*zigzag_refusals(), *out_refusals]) == []


@pytest.mark.parametrize("refusal", zigzag_refusals(), ids=lambda refusal: refusal.message)
def test_zigzag_refuses(refusal):
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    assert str(caught.value) == refusal.message


@pytest.mark.skipif(len(battery.tiers()) < 2, reason="this machine has one tier")
def test_every_tier_agrees(tmp_path):
    battery.every_tier_agrees("test_blockdct", OPS, tmp_path)


# ---- independent oracles -------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("n", SIZES)
def test_against_scipy(n):
    x = randn(2, 3, 3 * n, 2 * n)
    blocks = x.view(2, 3, 3, n, 2, n).permute(0, 1, 2, 4, 3, 5).numpy()
    expected = torch.from_numpy(scipy.fft.dctn(blocks, axes=(-2, -1), norm="ortho")).flatten(-2)
    assert_close(ff.block_dct(x, n, layout="blocks"), expected, f"N={n}", slack=4)
    assert_close(ff.block_idct(expected.contiguous(), n, layout="blocks"), x, f"inverse N={n}", slack=10)


@pytest.mark.kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", SIZES)
def test_inverse_undoes_transform(n, layout):
    """At odd sizes too: the crop takes off what replication added."""
    x = randn(2, 3, 3 * n - 1, 2 * n + 1)
    options = {"layout": layout, "scale": factors(3, n * n), "shift": -0.5}
    y = ff.block_dct(x, n, **options)
    assert_close(ff.block_idct(y, n, size=x.shape[2:], channels=3, **options), x, "round trip", slack=20)


@pytest.mark.kernel
def test_jpeg_example():
    """A flat block at gray 255: after the level shift of -128 its only coefficient is 8 * 127, and its inverse is exact."""
    x = torch.full((1, 1, 8, 8), 255.0)
    y = ff.block_dct(x, shift=-128.0)
    assert y[0, 0].item() == pytest.approx(8 * 127, rel=1e-6)
    assert y[0, 1:].abs().max() < 1e-3
    assert_close(ff.block_idct(y, shift=-128.0), x.double(), "inverse")


JPEG_ZIGZAG = [
    [0, 1, 5, 6, 14, 15, 27, 28],
    [2, 4, 7, 13, 16, 26, 29, 42],
    [3, 8, 12, 17, 25, 30, 41, 43],
    [9, 11, 18, 24, 31, 40, 44, 53],
    [10, 19, 23, 32, 39, 45, 52, 54],
    [20, 22, 33, 38, 46, 51, 55, 60],
    [21, 34, 37, 47, 50, 56, 59, 61],
    [35, 36, 48, 49, 57, 58, 62, 63],
]  # ITU-T T.81, figure A.6: at (u, v) the coefficient's place in the sequence


def test_zigzag_is_the_standards():
    assert_same(ff.zigzag(), torch.tensor(JPEG_ZIGZAG).flatten().argsort(), "zigzag")
    assert ff.zigzag().dtype == torch.int64


@pytest.mark.parametrize("n", SIZES)
def test_zigzag_walks_the_diagonals(n):
    order = [divmod(f, n) for f in ff.zigzag(n).tolist()]
    assert sorted(order) == sorted(itertools.product(range(n), repeat=2))
    assert order[:2] == [(0, 0), (0, 1)]
    for (u, v), (next_u, next_v) in itertools.pairwise(order):
        step = (next_u - u, next_v - v)
        assert step in {(1, -1), (-1, 1)} or (step in {(0, 1), (1, 0)} and {u, v} & {0, n - 1})


def test_zigzag_gives_a_tensor_of_ones_own():
    ff.zigzag()[0] = 99
    assert ff.zigzag()[0] == 0


any_call = given(
    n=st.sampled_from(SIZES),
    size=st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 70), st.integers(1, 150)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(battery.FLOATING),
    kept=st.one_of(st.none(), st.integers(1, 4)),
    scaled=st.sampled_from((None, "F", "CF")),
    shift=st.sampled_from((0.0, -128.0, 0.25)),
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)


@pytest.mark.kernel
@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@any_call
def test_any_size_and_options(n, size, layout, dtype, kept, scaled, shift, channels_last, seed):
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"layout": layout, "shift": shift}
    f = n * n
    if kept is not None and layout != "interleaved":
        # The lowest frequency stays: without it, what is left of a shift is rounding alone.
        options["freqs"] = [0, *(1 + torch.randperm(n * n - 1, generator=generator)[: kept - 1]).tolist()]
        f = kept
    if scaled is not None:
        options["scale"] = factors(*((f,) if scaled == "F" else (size[1], f)))
    order = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(size, generator=generator).to(dtype).contiguous(memory_format=order)
    assert_close(ff.block_dct(x, n, **options), reference_dct(x.double(), n, **options), "block_dct")
    y = torch.randn(coef_shape(*size, n, layout, f), generator=generator).to(dtype)
    back = {**options, "size": size[2:]}
    assert_close(ff.block_idct(y, n, **back), reference_idct(y.double(), n, **back), "block_idct")


@pytest.mark.slow
@settings(deadline=None, max_examples=3000, database=None, print_blob=True)
@any_call
def test_many_sizes_and_options(**call):
    """Others on every run; a failure prints how to repeat it."""
    test_any_size_and_options.hypothesis.inner_test(**call)


@pytest.mark.kernel
def test_frequencies_as_a_tensor():
    x, coefs, q = randn(2, 3, 19, 37), quantised(2, 5, 7, 64), table(64)
    kept = ff.zigzag()[:24]
    y = ff.block_dct(x, freqs=ZIGZAG)
    assert_same(ff.block_dct(x, freqs=kept), y, "block_dct")
    assert_same(ff.block_idct(y, freqs=kept), ff.block_idct(y, freqs=ZIGZAG), "block_idct")
    assert_same(ff.dct_normalize(coefs, q, freqs=kept), ff.dct_normalize(coefs, q, freqs=ZIGZAG), "dct_normalize")


@pytest.mark.parametrize("layout", ["planar", "blocks"])
def test_frequencies_as_a_tensor_under_compile(layout):
    """Where their values can't be read, the frequencies are picked out of all."""
    torch.compiler.reset()
    x, coefs, q = randn(2, 3, 19, 37), quantised(2, 5, 7, 64), table(64, dtype=torch.float64)
    scale, mean, std = factors(3, 24), randn(24), factors(24)

    def transform(x: Tensor) -> Tensor:
        return ff.block_dct(x, freqs=ff.zigzag()[:24], scale=scale, shift=0.5, layout=layout)

    def invert(y: Tensor) -> Tensor:
        return ff.block_idct(y, freqs=ff.zigzag()[:24], scale=scale, shift=0.5, layout=layout, size=(19, 37))

    def normalize(coefs: Tensor) -> Tensor:
        options = {"mean": mean, "std": std, "layout": layout, "dtype": torch.float64}
        return ff.dct_normalize(coefs, q, freqs=ff.zigzag()[:24], **options)

    for function, value in ((transform, x), (invert, transform(x)), (normalize, coefs)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_close(compiled(value), function(value), function.__name__, slack=4)


# ---- memory formats ------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", battery.FLOATING)
def test_channels_last_in_channels_last_out(dtype):
    x = randn(2, 3, 19, 37, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for layout in ("planar", "interleaved"):
        y = ff.block_dct(x, layout=layout)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert not y.is_contiguous()
        assert ff.block_idct(y, layout=layout).is_contiguous(memory_format=torch.channels_last)
    assert ff.block_dct(x, layout="blocks").is_contiguous()


# ---- modules -------------------------------------------------------------------------------------------------------------


def modules() -> list[tuple[torch.nn.Module, Tensor]]:
    options = {"scale": factors(64, dtype=torch.float32), "shift": -0.5}
    return [
        (ff.nn.BlockDCT2d(**options), randn(2, 3, 19, 37, dtype=torch.float32)),
        (ff.nn.BlockIDCT2d(**options), randn(2, 192, 3, 5, dtype=torch.float32)),
    ]


def test_modules_equal_the_functions():
    x = randn(2, 3, 19, 37, dtype=torch.float32)
    options = {"layout": "blocks", "freqs": ff.zigzag()[:10], "scale": [0.5] * 10, "shift": 1.0}
    y = ff.nn.BlockDCT2d(8, **options)(x)
    assert_same(y, ff.block_dct(x, 8, **options), "BlockDCT2d")
    back = ff.nn.BlockIDCT2d(8, **options)
    assert_same(back(y, size=(19, 37)), ff.block_idct(y, 8, size=(19, 37), **options), "BlockIDCT2d")
    assert back(y).shape == (2, 3, 24, 40)


def test_module_repr():
    assert repr(ff.nn.BlockDCT2d()) == "BlockDCT2d(block_size=8, layout='planar')"
    few = ff.nn.BlockIDCT2d(4, layout="blocks", freqs=torch.tensor([2, 0]), scale=[1.0, 2.0], shift=-1.0)
    assert repr(few) == "BlockIDCT2d(block_size=4, layout='blocks', freqs=[2, 0], scale=(2,), shift=-1.0)"
    assert repr(ff.nn.BlockDCT2d(freqs=ZIGZAG)) == "BlockDCT2d(block_size=8, layout='planar', freqs=[24 frequencies])"


def test_module_checks_when_it_is_built():
    with pytest.raises(ValueError, match="BlockDCT2d: block_size must be one of"):
        ff.nn.BlockDCT2d(5)
    with pytest.raises(ValueError, match="BlockIDCT2d: scale must be"):
        ff.nn.BlockIDCT2d(scale=torch.ones(3))
    with pytest.raises(TypeError, match="BlockDCT2d: scale must be a tensor or numbers, got 'x'"):
        ff.nn.BlockDCT2d(scale="x")
    with pytest.raises(TypeError, match="BlockDCT2d: scale must be real, got complex64"):
        ff.nn.BlockDCT2d(scale=torch.ones(64, dtype=torch.complex64))


def test_module_keeps_the_precision_of_a_scale():
    scale = torch.full((64,), 0.1, dtype=torch.float64)
    x = randn(1, 1, 8, 8)
    assert torch.equal(ff.nn.BlockDCT2d(scale=scale)(x), ff.block_dct(x, scale=scale))


@pytest.mark.parametrize("op", [ff.block_dct, ff.block_idct])
def test_out_counts_as_a_write_for_autograd(op):
    x = torch.rand(1, 64, 8, 8)
    buffer = torch.empty_like(op(x))
    weight = torch.ones_like(buffer).requires_grad_()
    product = (weight * buffer).sum()
    op(x, out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_out_must_not_be_an_inference_tensor_outside_inference_mode():
    x = torch.rand(1, 1, 8, 8)
    with torch.inference_mode():
        buffer = torch.empty(1, 64, 1, 1)
        assert ff.block_dct(x, out=buffer) is buffer
    with pytest.raises(ValueError, match="block_dct: out is an inference tensor"):
        ff.block_dct(x, out=buffer)


def test_numpy_numbers_are_numbers():
    x = torch.rand(1, 1, 13, 16)
    y = ff.block_dct(x, np.int64(8), freqs=np.arange(3), shift=np.float32(0.5))
    assert torch.equal(y, ff.block_dct(x, 8, freqs=[0, 1, 2], shift=0.5))
    image = ff.block_idct(y, np.int32(8), freqs=list(np.arange(3)), size=(np.int64(13), 16))
    assert torch.equal(image, ff.block_idct(y, freqs=[0, 1, 2], size=(13, 16)))


def test_running_out_of_memory_says_so():
    huge = torch.ones(1, 1, 1, 1).expand(1, 1, 2**24, 2**24)
    with pytest.raises(RuntimeError, match=r"block_dct: out of memory: cannot allocate a result of shape \(1, 64, "):
        ff.block_dct(huge)


def test_scale_as_parameter_is_trained():
    scale = torch.nn.Parameter(torch.ones(3, 64))
    module = ff.nn.BlockDCT2d(scale=scale)
    assert list(module.parameters()) == [scale]
    x, goal = randn(2, 3, 16, 16, dtype=torch.float32), 2.0
    target = ff.block_dct(x) * goal
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean(dim=(0, 2, 3)).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 1e-2


def test_module_compiles():
    torch.compiler.reset()
    for module, x in modules():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x), module(x), type(module).__name__)


# ---- dct_normalize -------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_dct_normalize_by_hand():
    """One block whose coefficient k is k, table 2, mean 1, std 4: (2k - 1) / 4."""
    coefs = torch.arange(64, dtype=torch.int16).view(1, 1, 64)
    result = ff.dct_normalize(coefs, torch.full((64,), 2), mean=1, std=4)
    assert result.shape == (64, 1, 1)
    assert result.flatten().tolist() == [(2 * k - 1) / 4 for k in range(64)]


@pytest.mark.kernel
@pytest.mark.parametrize("layout", ["planar", "blocks"])
@pytest.mark.parametrize(("dtype", "images"), [(torch.float32, 5), (torch.bfloat16, 9)])
def test_dct_normalize_larger_than_the_caches(dtype, images, layout):
    """The first results get memory as the system gives it, later ones such as was used before: all equal those of the parts."""
    coefs, q = quantised(images, 120, 125, 64), table(64)
    parts = torch.cat([ff.dct_normalize(part, q, std=3, layout=layout, dtype=dtype) for part in coefs.split(1)])
    for _ in range(4):
        assert torch.equal(ff.dct_normalize(coefs, q, std=3, layout=layout, dtype=dtype), parts)


@pytest.mark.kernel
def test_dct_normalize_then_inverse_gives_the_picture():
    """What a JPEG decoder does: dequantise, inverse transform, level shift."""
    x = randn(1, 1, 24, 40, dtype=torch.float32, spread=40) + 128
    q = table(64)
    coefs = (ff.block_dct(x, layout="blocks", shift=-128.0) / q).round().to(torch.int16)
    decoded = ff.block_idct(ff.dct_normalize(coefs, q).flatten(1, 2), shift=-128.0)
    numpy_blocks = (coefs.numpy() * q.numpy().astype(np.float64)).reshape(3, 5, 8, 8)
    expected = scipy.fft.idctn(numpy_blocks, axes=(-2, -1), norm="ortho").transpose(0, 2, 1, 3).reshape(24, 40) + 128
    assert_close(decoded[0, 0], torch.from_numpy(expected), "decoded", slack=4)
