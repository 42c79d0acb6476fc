"""rgb_to_dct and dct_to_rgb: samples and refusals for the battery, and what is theirs alone."""

from __future__ import annotations

import io
import itertools
from typing import Any

import battery
import fourfold as ff
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from battery import Op, Refusal, Sample
from fourfold.ops import blockdct_rgb
from fourfold.reference import REFERENCES
from fourfold.reference import blockdct_rgb as reference
from torch import Tensor

#: dct_to_rgb has no schema.
COMPOSITES = ("dct_to_rgb",)

KEPT = [0, 8, 1, 63, 10]
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
#: Whole MCUs, parts of them, single pixels, vectors of every tier that are not full, rows cut into several tiles.
SIZES = ((2, 32, 48), (1, 17, 23), (3, 1, 1), (1, 9, 40), (2, 24, 200), (1, 18, 1100), (0, 8, 16))


def pixels(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 255).to(dtype)


def factors(rows: int, f: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows + f)
    scale = (torch.rand(rows, f, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    return scale if rows > 1 else scale[0]


def call(rgb: Tensor, scale: Tensor | None = None, **options: Any) -> Tensor:
    return battery.joined(ff.rgb_to_dct(rgb, scale=scale, **options))


def exact(rgb: Tensor, scale: Tensor | None = None, **options: Any) -> Tensor:
    """In float64 whatever is asked for."""
    f = len(options.get("freqs") or range(64))
    scale = None if scale is None else scale.double().expand(3, f)
    given = (options.get("subsampling", "4:2:0"), options.get("layout", "planar"), options.get("freqs"))
    return battery.joined(REFERENCES["rgb_to_dct"](rgb, *given, scale, torch.float64))


def samples(dtype: torch.dtype) -> list[Sample]:
    kinds = {torch.float32: (torch.uint8, torch.float32), torch.float64: (torch.float64,)}.get(dtype, (torch.uint8, dtype))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    found = []
    for kind, (b, height, width), subsampling in itertools.product(kinds, SIZES, SUBSAMPLINGS):
        rgb = pixels(b, 3, height, width, dtype=kind)
        base = {"subsampling": subsampling, "dtype": dtype}
        found += [
            Sample(f"{kind} {tuple(rgb.shape)} {subsampling} {layout} {freqs or ''} scale {rows}", (rgb,), options)
            for layout, freqs, rows in (("planar", None, 0), ("blocks", KEPT, 3))
            for options in [
                {**base, "layout": layout, "freqs": freqs}
                | ({"scale": factors(rows, len(freqs or range(64)), work)} if rows else {})
            ]
        ]
    others = (("blocks", None, 1), ("planar", KEPT, 3), ("planar", None, 3))
    for layout, freqs, rows in others:
        scale = factors(rows, len(freqs or range(64)), work)
        options = {"layout": layout, "freqs": freqs, "scale": scale, "dtype": dtype}
        found.append(Sample(f"{layout} {freqs or ''} scale {rows}", (pixels(2, 3, 40, 56, dtype=kinds[0]),), options))
    return found


def small() -> list[Sample]:
    options = (
        {"subsampling": "4:2:0"},
        {"subsampling": "4:4:4", "layout": "blocks", "freqs": [0, 9], "scale": factors(3, 2, torch.float64)},
        {"subsampling": "4:2:2", "freqs": [3, 8, 0], "scale": factors(1, 3, torch.float64)},
    )
    return [
        Sample(f"{chosen}", (pixels(1, 3, *size) / 64,), {**chosen, "dtype": torch.float64})
        for size, chosen in zip(((3, 5), (2, 9), (4, 3)), options, strict=True)
    ]


def sizes() -> list[Sample]:
    return [Sample(f"{shape}", (pixels(*shape, dtype=torch.float32),)) for shape in ((2, 3, 17, 33), (3, 3, 40, 50))]


def refusals() -> list[Refusal]:
    rgb = pixels(1, 3, 8, 8, dtype=torch.uint8)

    def refused(error: type[Exception], message: str, image: Any = rgb, **options: Any) -> Refusal:
        return Refusal(error, f"rgb_to_dct: {message}", lambda: ff.rgb_to_dct(image, **options))

    def raw(message: str, image: Tensor, *args: Any) -> Refusal:
        given = args or ("4:2:0", "planar", None, None, torch.float32)
        return Refusal(ValueError, f"rgb_to_dct: {message}", lambda: torch.ops.fourfold.rgb_to_dct(image, *given))

    kinds = "float16, bfloat16, float32 or float64"
    subsamplings = "('4:4:4', '4:2:2', '4:2:0')"
    return [
        refused(TypeError, "rgb must be a Tensor, got list", [1]),
        refused(TypeError, f"rgb must be uint8, or {kinds} in 0..255, got int64", rgb.long()),
        refused(TypeError, f"rgb must be uint8, or {kinds} in 0..255, got int8", rgb.to(torch.int8)),
        refused(TypeError, f"dtype must be {kinds}, got uint8", dtype=torch.uint8),
        refused(ValueError, f"subsampling must be one of {subsamplings}, got '4:1:1'", subsampling="4:1:1"),
        refused(TypeError, f"subsampling must be one of {subsamplings}, got 420", subsampling=420),
        refused(ValueError, "layout must be one of ('planar', 'blocks'), got 'interleaved'", layout="interleaved"),
        refused(ValueError, "rgb must be [B, 3, H, W], got (3, 8, 8); add the missing dimension with rgb[None]", rgb[0]),
        refused(ValueError, "rgb must be [B, 3, H, W], got (1, 8, 8, 3); bring channels forward with rgb.permute(0, 3, 1, 2)",
                rgb.permute(0, 2, 3, 1)),
        refused(ValueError, "rgb must be [B, 3, H, W], got (1, 1, 8, 8)", rgb[:, :1]),
        refused(ValueError, "rgb must have H and W of at least 1, got (1, 3, 0, 8)", rgb[:, :, :0]),
        refused(ValueError, "rgb must have H and W of at least 1, got (1, 3, 8, 0)", rgb[..., :0]),
        refused(ValueError, "freqs must lie in 0..63 for block_size 8, got 64", freqs=[64]),
        refused(ValueError, "freqs must not repeat, got [1, 1]", freqs=[1, 1]),
        refused(ValueError, "scale must be [64] or [3, 64], got [3]", scale=torch.ones(3)),
        refused(ValueError, "scale must be [2] or [3, 2], got [1, 2]", scale=torch.ones(1, 2), freqs=[0, 1]),
        refused(TypeError, "scale must be real, got bool", scale=torch.ones(64, dtype=torch.bool)),
        raw("rgb must be [B, 3, H, W], got (3, 8, 8)", rgb[0]),
        raw("rgb must be float16, bfloat16, float32 or float64", rgb.long()),
        raw("dtype must be float16, bfloat16, float32 or float64", rgb, "4:2:0", "planar", None, None, torch.int16),
        raw("subsampling must be '4:4:4', '4:2:2' or '4:2:0', got '4:1:1'", rgb, "4:1:1", "planar", None, None, torch.half),
        raw("layout must be 'planar' or 'blocks', got 'interleaved'", rgb, "4:2:0", "interleaved", None, None, torch.half),
        raw("freqs must lie in 0..63 for block_size 8, got -1", rgb, "4:2:0", "planar", [-1], None, torch.half),
        raw("scale must be contiguous [3, 64] in float32 (float64 if rgb or dtype is), got (2, 64)",
            rgb, "4:2:0", "planar", None, torch.ones(2, 64), torch.half),
        raw("scale must be contiguous [3, 64] in float32 (float64 if rgb or dtype is), got (3, 64)",
            rgb, "4:2:0", "planar", None, torch.ones(3, 64), torch.double),
    ]  # fmt: skip


OPS = (
    Op(
        name="rgb_to_dct",
        call=call,
        reference=exact,
        samples=samples,
        small=small,
        sizes=sizes,
        dynamic=(0, 2, 3),
        large=lambda dtype: Sample("large", (pixels(5, 3, 270, 330, dtype=torch.uint8),), {"dtype": dtype}),
        refusals=refusals,
    ),
)

test_op = battery.tests_of(OPS)


@pytest.mark.skipif(len(battery.tiers()) < 2, reason="this machine has one tier")
def test_every_tier_agrees(tmp_path):
    battery.every_tier_agrees("test_blockdct_rgb", OPS, tmp_path)


# ---- what rgb_to_dct is ----------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_is_a_convolution(subsampling, memory_format):
    """Colour, box filter and transform folded into two convolutions."""
    v, h = reference.SUBSAMPLINGS[subsampling]
    k = torch.arange(8, dtype=torch.float64)
    rows = torch.cos((2 * k + 1) * k[:, None] * torch.pi / 16) / 2
    rows[0] *= 0.5**0.5
    basis = torch.einsum("ui,vj->uvij", rows, rows).reshape(64, 8, 8)
    colours = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.299 / 1.772, -0.587 / 1.772, 0.5], [0.5, -0.587 / 1.402, -0.114 / 1.402]],
        dtype=torch.float64,
    )
    cells = basis.repeat_interleave(v, 1).repeat_interleave(h, 2) / (v * h)
    rgb = pixels(2, 3, 48, 80, dtype=torch.uint8)
    luma = F.conv2d(rgb.double(), torch.einsum("fij,c->fcij", basis, colours[0]), stride=8)
    luma[:, 0] -= 1024
    chroma = F.conv2d(rgb.double(), torch.einsum("fij,kc->kfcij", cells, colours[1:]).flatten(0, 1), stride=(8 * v, 8 * h))
    y, cbcr = ff.rgb_to_dct(rgb.to(memory_format=memory_format), subsampling=subsampling)
    battery.assert_close(y, luma, "y")
    battery.assert_close(cbcr, chroma, "cbcr")


def test_gray_image():
    """Level g: luma's mean is 8 (g - 128), everything else is zero."""
    y, cbcr = ff.rgb_to_dct(torch.full((1, 3, 20, 20), 200, dtype=torch.uint8))
    torch.testing.assert_close(y[:, 0], torch.full((1, 3, 3), 8.0 * 72))
    torch.testing.assert_close(y[:, 1:], torch.zeros(1, 63, 3, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(cbcr, torch.zeros(1, 128, 2, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(48, 64), (37, 51)])
def test_against_an_encoder(size, subsampling):
    """What Pillow's encoder writes at quality 100 differs by rounding, to integers of samples and of coefficients."""
    Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    if not ff.has_jpeg():
        pytest.skip("built without libjpeg-turbo")
    ramp = (np.add.outer(np.arange(size[0]), np.arange(size[1]))[..., None] * np.array([2, 1, 3]) % 256).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "JPEG", quality=100, subsampling=subsampling)
    coefs = ff.jpeg.read(file.getvalue())
    rgb = torch.from_numpy(ramp).permute(2, 0, 1)[None]
    y, cbcr = ff.rgb_to_dct(rgb, subsampling=SUBSAMPLINGS[subsampling], layout="blocks")
    read = [c.double() * q for c, q in zip(coefs.components, coefs.qtables, strict=True)]
    for ours, theirs in zip([y[0, 0], cbcr[0, 0], cbcr[0, 1]], read, strict=True):
        assert ours.shape == theirs.shape
        # Uniform rounding errors of variance 1/12 of samples and again of coefficients, and chroma's biased one of two samples.
        assert (ours - theirs).square().mean().sqrt() < 0.6
        assert (ours - theirs).abs().max() < 8


@pytest.mark.parametrize("dtype", [torch.uint8, *battery.FLOATING])
def test_reads_crops_in_place(dtype):
    """Of planar and of interleaved images, wherever they start: the same numbers as from a copy."""
    for image in (pixels(2, 3, 40, 44, dtype=dtype), pixels(2, 40, 44, 3, dtype=dtype).permute(0, 3, 1, 2)):
        crop = image[:, :, 3:36, 5:42]
        expected = ff.rgb_to_dct(crop.contiguous())
        for result, wanted in zip(ff.rgb_to_dct(crop), expected, strict=True):
            battery.assert_same(result, wanted, f"{dtype}")


def test_scale_is_a_parameter():
    module = ff.nn.RGBToDCT(scale=torch.nn.Parameter(torch.ones(3, 64)))
    y, cbcr = module(pixels(1, 3, 16, 16, dtype=torch.uint8))
    (y.square().sum() + cbcr.square().sum()).backward()
    assert (module.scale.grad[0, 0] != 0).all()
    assert list(module.state_dict()) == ["scale"]


def test_small_tangents():
    """In float32, to its own precision: nothing large is added and taken away again."""
    rgb, tangent = pixels(1, 3, 20, 30, dtype=torch.float32), pixels(1, 3, 20, 30, seed=1) * 1e-8
    function = lambda x: call(x, subsampling="4:2:0")  # noqa: E731
    _, result = torch.func.jvp(function, (rgb,), (tangent.float(),))
    _, wanted = torch.func.jvp(lambda x: call(x, dtype=torch.float64), (rgb.double(),), (tangent.float().double(),))
    battery.assert_close(result * 1e8, wanted * 1e8, "tangent", slack=4)


def test_on_a_small_stack():
    """Of 128 KiB, as block_dct runs on."""
    script = """
import threading
import fourfold as ff
import torch

threading.stack_size(128 * 1024)
for dtype in (torch.float32, torch.float64):
    thread = threading.Thread(target=lambda: ff.rgb_to_dct(torch.zeros(1, 3, 64, 64), dtype=dtype))
    thread.start()
    thread.join()
"""
    battery.run_script(script, OMP_NUM_THREADS="1")


def test_module_keeps_the_precision_of_its_scale():
    rgb, scale = pixels(1, 3, 16, 16), factors(3, 64, torch.float64)
    wanted = ff.rgb_to_dct(rgb, scale=scale, dtype=torch.float64)
    for given in (scale, scale.tolist()):
        module = ff.nn.RGBToDCT(scale=given, dtype=torch.float64)
        assert module.scale.dtype == torch.float64
        for result, expected in zip(module(rgb), wanted, strict=True):
            battery.assert_same(result, expected, "module")


def test_module_is_the_function():
    options = {"subsampling": "4:2:2", "layout": "blocks", "freqs": KEPT, "dtype": torch.bfloat16}
    rgb = pixels(2, 3, 20, 30, dtype=torch.uint8)
    module = ff.nn.RGBToDCT(**options, scale=[1.0, 2, 3, 4, 5])
    for result, wanted in zip(module(rgb), ff.rgb_to_dct(rgb, **options, scale=[1.0, 2, 3, 4, 5]), strict=True):
        battery.assert_same(result, wanted, "module")
    shown = "subsampling='4:2:2', layout='blocks', freqs=[0, 8, 1, 63, 10], scale=(5,), dtype=torch.bfloat16"
    assert repr(module) == f"RGBToDCT({shown})"
    with pytest.raises(ValueError, match=r"^RGBToDCT: scale must be \[64\] or \[3, 64\], got \[5\]$"):
        ff.nn.RGBToDCT(scale=[1.0, 2, 3, 4, 5])


@pytest.mark.parametrize("layout", ["planar", "blocks"])
def test_frequencies_as_a_tensor_under_compile(layout):
    rgb, scale = pixels(1, 3, 20, 30, dtype=torch.float32), factors(3, 24, torch.float32)

    def chosen(x: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
        return ff.rgb_to_dct(x, freqs=freqs, layout=layout, scale=scale)

    torch.compiler.reset()
    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")(rgb, ff.zigzag()[:24])
    for result, wanted in zip(compiled, chosen(rgb, ff.zigzag()[:24]), strict=True):
        torch.testing.assert_close(result, wanted)


# ---- dct_to_rgb ------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", battery.FLOATING)
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("size", [None, (31, 45), (1, 3)])
def test_dct_to_rgb(size, subsampling, dtype):
    generator = torch.Generator().manual_seed(0)
    v, h = reference.SUBSAMPLINGS[subsampling]
    rows, columns = (3, 5) if size is None else (-(-size[0] // 8), -(-size[1] // 8))
    y = torch.randn(2, 64, rows, columns, generator=generator, dtype=torch.float64).to(dtype) * 40
    cbcr = torch.randn(2, 128, -(-rows // v), -(-columns // h), generator=generator, dtype=torch.float64).to(dtype) * 40
    result = ff.dct_to_rgb(y, cbcr, subsampling=subsampling, size=size)
    assert result.dtype == dtype
    wanted = reference.dct_to_rgb(y.double(), cbcr.double(), subsampling, size)
    battery.assert_close(result, wanted, f"{subsampling} {size}", slack=2)


@pytest.mark.parametrize("size", [(16, 24), (13, 22)])
def test_there_and_back(size):
    """Exact for 4:4:4; with subsampling for images whose chroma is constant over its cells."""
    rgb = pixels(2, 3, *size)
    again = ff.dct_to_rgb(*ff.rgb_to_dct(rgb, subsampling="4:4:4", dtype=torch.float64), subsampling="4:4:4", size=size)
    torch.testing.assert_close(again, rgb, rtol=0, atol=1e-10)
    for subsampling in ("4:2:2", "4:2:0"):
        v, h = reference.SUBSAMPLINGS[subsampling]
        colour = pixels(2, 3, -(-size[0] // v), -(-size[1] // h), seed=1).repeat_interleave(v, 2).repeat_interleave(h, 3)
        smooth = colour[..., : size[0], : size[1]] + pixels(2, 1, *size)  # luma alone varies within a cell
        coefs = ff.rgb_to_dct(smooth, subsampling=subsampling, dtype=torch.float64)
        torch.testing.assert_close(ff.dct_to_rgb(*coefs, subsampling=subsampling, size=size), smooth, rtol=0, atol=1e-10)


def test_dct_to_rgb_gradients():
    y, cbcr = torch.randn(1, 64, 2, 1, dtype=torch.float64), torch.randn(1, 128, 1, 1, dtype=torch.float64)
    given = (y.requires_grad_(), cbcr.requires_grad_())
    function = lambda *coefs: ff.dct_to_rgb(*coefs, size=(9, 6))  # noqa: E731
    assert torch.autograd.gradcheck(function, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


def test_dct_to_rgb_compiles_and_exports():
    def round_trip(rgb: Tensor) -> Tensor:
        return ff.dct_to_rgb(*ff.rgb_to_dct(rgb), size=tuple(rgb.shape[2:]))

    class Module(torch.nn.Module):
        def forward(self, rgb: Tensor) -> Tensor:
            return round_trip(rgb)

    rgb = pixels(2, 3, 20, 30, dtype=torch.float32)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(round_trip, fullgraph=True, backend="aot_eager")(rgb), round_trip(rgb))
    torch.testing.assert_close(torch.export.export(Module(), (rgb,)).module()(rgb), round_trip(rgb))


def inverse_refusals() -> list[Refusal]:
    y, cbcr = torch.zeros(1, 64, 2, 3), torch.zeros(1, 128, 1, 2)

    def refused(error: type[Exception], message: str, *coefs: Any, **options: Any) -> Refusal:
        given = (*coefs, *(y, cbcr)[len(coefs) :])
        return Refusal(error, f"dct_to_rgb: {message}", lambda: ff.dct_to_rgb(*given, **options))

    subsamplings = "('4:4:4', '4:2:2', '4:2:0')"
    return [
        refused(ValueError, f"subsampling must be one of {subsamplings}, got '4:1:1'", subsampling="4:1:1"),
        refused(TypeError, "y must be float16, bfloat16, float32 or float64, got int16", y.short()),
        refused(TypeError, "cbcr must be a Tensor, got NoneType", y, None),
        refused(TypeError, "cbcr must be float32 as y is, got float64", y, cbcr.double()),
        refused(ValueError, "y must be [B, 64, h, w], got (1, 24, 2, 3)", y[:, :24]),
        refused(ValueError, "y must be [B, 64, h, w], got (64, 2, 3)", y[0]),
        refused(
            ValueError, "cbcr must be (1, 128, 2, 3) for y (1, 64, 2, 3) and 4:4:4, got (1, 128, 1, 2)", subsampling="4:4:4"
        ),
        refused(ValueError, "cbcr is on meta, y on cpu; move one with .to()", y, cbcr.to("meta")),
        refused(ValueError, "y must have h and w of at least 1, got (1, 64, 0, 3)", y[:, :, :0], cbcr[:, :, :0]),
        refused(TypeError, "size must be (H, W), got 8", size=8),
        refused(TypeError, "each of size must be an int, got 9.5", size=(9.5, 20)),
        refused(ValueError, "size (17, 20) must round up to the 2 x 3 blocks of y, (16, 24)", size=(17, 20)),
    ]


@pytest.mark.parametrize("refusal", inverse_refusals(), ids=lambda refusal: refusal.message)
def test_dct_to_rgb_refuses(refusal):
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    assert str(caught.value) == refusal.message


def test_every_error_is_tested():
    assert battery.unreached_raises(OPS, blockdct_rgb, inverse_refusals()) == []
