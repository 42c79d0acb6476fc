"""Wrong calls of the CoordConvs, word for word."""

from __future__ import annotations

import warnings
from typing import Any

import battery
import fourfold as ff
import pytest
import torch
from battery import Refusal
from fourfold import CoordSpec
from fourfold.ops import _coord_plan, coordconv
from test_coordconv import OPS

WITH_R = CoordSpec(r="center")


def refusals() -> list[Refusal]:
    x, weight, coord_weight, bias = torch.zeros(2, 3, 5, 7), torch.zeros(6, 3, 3, 3), torch.zeros(6, 2, 3, 3), torch.zeros(6)
    op, found = "coord_conv2d", []

    def refuse(error: type[Exception], message: str, *changes: Any, **options: Any) -> None:
        args = dict(enumerate((x, weight, coord_weight, bias)))
        args.update(dict(zip(changes[::2], changes[1::2], strict=True)))
        found.append(Refusal(error, f"{op}: {message}", lambda: ff.coord_conv2d(*args.values(), **options)))

    floating = "must be float16, bfloat16, float32 or float64, got"
    refuse(TypeError, "x must be a Tensor, got list", 0, [1.0])
    refuse(TypeError, "x must be a dense tensor, got a sparse_coo one; convert it first", 0, x.to_sparse())
    refuse(TypeError, "x must be a Tensor, got NoneType", 0, None)
    refuse(TypeError, "weight must be a Tensor, got NoneType", 1, None)
    refuse(TypeError, "coord_weight must be a Tensor, got NoneType", 2, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        nested = torch.nested.as_nested_tensor([torch.zeros(3, 3, 3)] * 6)
    refuse(TypeError, "weight must be a dense tensor, got a nested one; convert it first", 1, nested)
    refuse(TypeError, f"x {floating} int64", 0, x.long())
    refuse(TypeError, f"x {floating} complex64", 0, x * 1j)
    refuse(TypeError, f"weight {floating} int32", 1, weight.int())
    refuse(TypeError, f"coord_weight {floating} bool", 2, coord_weight.bool())
    refuse(TypeError, "bias must be a Tensor, got float", 3, 1.0)
    shapes = "expected 3D (C,H,W) or 4D (N,C,H,W) input, got"
    refuse(ValueError, f"{shapes} 5D of shape (1, 2, 3, 5, 7)", 0, x[None])
    refuse(ValueError, f"{shapes} 2D of shape (5, 7)", 0, x[0, 0])
    refuse(ValueError, "weight must be 4D, got 3D of shape (6, 3, 3)", 1, weight[..., 0])
    refuse(ValueError, "x is on cpu, but coord_weight is on meta; move one with .to()", 2, coord_weight.to("meta"))
    refuse(ValueError, "x is on meta, but weight is on cpu; move one with .to()", 0, x.to("meta"))
    refuse(TypeError, "x is float64, but weight is float32; convert one with .to()", 0, x.double())
    refuse(TypeError, "x is float32, but bias is float16; convert one with .to()", 3, bias.half())
    refuse(ValueError, "activation must be one of ('relu', 'silu', 'gelu'), got 'none'", activation="none")
    refuse(TypeError, "activation must be one of ('relu', 'silu', 'gelu'), got 1", activation=1)
    modes = "padding_mode must be one of ('zeros', 'reflect', 'replicate', 'circular'), got"
    refuse(ValueError, f"{modes} 'constant'", padding_mode="constant")
    refuse(TypeError, f"{modes} None", padding_mode=None)
    refuse(ValueError, "groups_mode must be one of ('shared', 'concat'), got 'all'", groups_mode="all")
    refuse(TypeError, "spec must be a CoordSpec, got str; for a preset pass CoordSpec.preset(name)", spec="paper")
    refuse(ValueError, "groups must divide the 6 output channels, got 4", groups=4)
    refuse(ValueError, "groups must divide the 6 output channels, got 0", groups=0)
    refuse(TypeError, "groups must be an int, got 1.5", groups=1.5)
    coords = "coord_weight must have shape (6, 2, 3, 3) for 2 coordinate channels, got"
    refuse(ValueError, f"{coords} (6, 3, 3, 3)", 2, weight)
    refuse(ValueError, f"{coords} (6, 2, 3)", 2, coord_weight[..., 0])
    refuse(ValueError, "coord_weight must have shape (6, 3, 3, 3) for 3 coordinate channels, got (6, 2, 3, 3)", spec=WITH_R)
    refuse(ValueError, "bias must have shape (6,), got (5,)", 3, bias[1:])
    refuse(ValueError, "expected 3 input channels, got 4", 0, torch.zeros(2, 4, 5, 7))
    refuse(
        ValueError,
        "expected 3 input channels, got 5; weight excludes the 2 coordinate channels, so pass x without AddCoords",
        0,
        torch.zeros(2, 5, 5, 7),
    )
    refuse(ValueError, "expected 6 input channels, got 3", groups=2)
    refuse(ValueError, "stride must be an int or 2 of them, got (1, 2, 3)", stride=(1, 2, 3))
    refuse(ValueError, "stride must be at least 1, got 0", stride=0)
    refuse(TypeError, "stride must be an int, got 1.0", stride=1.0)
    refuse(TypeError, "padding must be an int, got 0.0", padding=(0.0, 0))
    refuse(TypeError, "groups must be an int, got 1.0", groups=1.0)
    refuse(TypeError, "dilation must be an int, got 1.5", dilation=1.5)
    refuse(ValueError, "dilation must be at least 1, got [1, 0]", dilation=[1, 0])
    refuse(ValueError, "padding must be at least 0, got (0, -1)", padding=(0, -1))
    refuse(ValueError, "padding must be one of ('same', 'valid'), got 'full'", padding="full")
    refuse(ValueError, "padding='same' needs stride 1, got (2, 1); give the widths as ints", padding="same", stride=(2, 1))
    refuse(
        ValueError,
        "padding 5 must be less than the input size 5 of axis H in padding_mode='reflect'",
        padding=(5, 1),
        padding_mode="reflect",
    )
    refuse(
        ValueError,
        "padding 8 must be at most the input size 7 of axis W in padding_mode='circular'",
        padding=(1, 8),
        padding_mode="circular",
    )
    small = "the output size would be (-1, 7) for input size (1, 9) and kernel (3, 3); every size must be at least 1"
    refuse(ValueError, small, 0, torch.zeros(2, 3, 1, 9))
    empty = "the output size would be (0, 7) for input size (0, 7) and kernel (3, 3); every size must be at least 1"
    refuse(ValueError, empty, 0, torch.zeros(2, 3, 0, 7), padding=1)
    four = torch.zeros(8, 14, 3, 3)
    refuse(
        ValueError,
        "groups=4 must divide in_channels + coord channels = 66 in groups_mode='concat'",
        0, torch.zeros(1, 64, 5, 5), 1, four, 2, torch.zeros(8, 2, 3, 3), 3, None, groups=4, groups_mode="concat",
    )  # fmt: skip
    refuse(
        ValueError,
        "expected 62 input channels, got 66",
        0, torch.zeros(1, 66, 5, 5), 1, four, 2, torch.zeros(8, 2, 3, 3), 3, None, groups=4, groups_mode="concat",
    )  # fmt: skip
    return [*found, *transposed_refusals(), *add_coords_refusals(), *spec_refusals(), *other_ranks(), *layer_refusals()]


def other_ranks() -> list[Refusal]:
    one = "coord_conv1d: expected 2D (C,L) or 3D (N,C,L) input, got 4D of shape (1, 1, 1, 1)"
    three = "coord_conv3d: expected 4D (C,D,H,W) or 5D (N,C,D,H,W) input, got 3D of shape (1, 1, 1)"
    x = torch.zeros(1, 1, 1, 1)
    return [
        Refusal(ValueError, one, lambda: ff.coord_conv1d(x, x[0], x[0])),
        Refusal(ValueError, three, lambda: ff.coord_conv3d(x[0], x[None], x[None])),
    ]


def transposed_refusals() -> list[Refusal]:
    op, x = "coord_conv_transpose2d", torch.zeros(2, 4, 5, 7)
    weight, coord_weight = torch.zeros(4, 3, 3, 3), torch.zeros(2, 6, 3, 3)

    def call(**changes: Any) -> Any:
        given = {"x": x, "weight": weight, "coord_weight": coord_weight, "groups": 2, **changes}
        return lambda: ff.coord_conv_transpose2d(**given)

    return [
        Refusal(ValueError, f"{op}: groups must divide the 4 input channels, got 3", call(groups=3)),
        Refusal(ValueError, f"{op}: groups must divide the 4 input channels, got -1", call(groups=-1)),
        Refusal(
            ValueError,
            f"{op}: coord_weight must have shape (2, 6, 3, 3) for 2 coordinate channels, got (6, 2, 3, 3)",
            call(coord_weight=coord_weight.transpose(0, 1)),
        ),
        Refusal(ValueError, f"{op}: bias must have shape (6,), got (4,)", call(bias=torch.zeros(4))),
        Refusal(ValueError, f"{op}: expected 4 input channels, got 3", call(x=x[:, 1:])),
        Refusal(
            ValueError,
            f"{op}: output_padding must be smaller than stride or dilation, got (1, 2)",
            call(output_padding=(1, 2), stride=2),
        ),
        Refusal(
            ValueError,
            f"{op}: the output size would be (-1, 1) for input size (5, 7) and kernel (3, 3); every size must be at least 1",
            call(padding=4),
        ),
        Refusal(ValueError, f"{op}: activation must be one of ('relu', 'silu', 'gelu'), got 'x'", call(activation="x")),
        Refusal(TypeError, f"{op}: padding must be an int, got 'same'", call(padding="same")),
    ]


def layer_refusals() -> list[Refusal]:
    """What torch.nn's constructors refuse without the value that came, or accept and stumble over later."""
    groups, kernel = "groups must divide in_channels and out_channels, got", "kernel_size must be an int or"
    two: Any = ff.nn.CoordConv2d
    wrong: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, f"{groups} groups=2 for 3 and 16; take a divisor of 1", (3, 16, 3), {"groups": 2}),
        (ValueError, f"{groups} groups=4 for 8 and 6; take a divisor of 2", (8, 6, 3), {"groups": 4}),
        (ValueError, f"{groups} groups=0 for 4 and 6; take a divisor of 2", (4, 6, 3), {"groups": 0}),
        (TypeError, "groups must be an int, got 2.0", (4, 6, 3), {"groups": 2.0}),
        (TypeError, "in_channels must be an int, got 4.0", (4.0, 6, 3), {}),
        (ValueError, "out_channels must be at least 0, got -1", (4, -1, 3), {}),
        (ValueError, f"{kernel} 2 of them, got (3,)", (4, 6, (3,)), {}),
        (ValueError, f"{kernel} 2 of them, got (3, 3, 3)", (4, 6, [3, 3, 3]), {}),
        (ValueError, "kernel_size must be at least 1, got (3, 0)", (4, 6, (3, 0)), {}),
        (TypeError, "kernel_size must be an int, got '33'", (4, 6, "33"), {}),
        (ValueError, "stride must be an int or 2 of them, got (1, 1, 1)", (4, 6, 3, (1, 1, 1)), {}),
        (ValueError, "dilation must be at least 1, got 0", (4, 6, 3), {"dilation": 0}),
        (ValueError, "padding must be one of ('same', 'valid'), got 'some'", (4, 6, 3), {"padding": "some"}),
        (
            ValueError,
            "padding='same' needs stride 1, got (2, 2); give the widths as ints",
            (4, 6, 3, 2),
            {"padding": "same"},
        ),
        (
            ValueError,
            "padding_mode must be one of ('zeros', 'reflect', 'replicate', 'circular'), got 'zero'",
            (4, 6, 3),
            {"padding_mode": "zero"},
        ),
    ]
    found = [
        Refusal(error, f"CoordConv2d: {message}", lambda args=args, options=options: two(*args, **options))
        for error, message, args, options in wrong
    ]
    transposed: Any = ff.nn.CoordConvTranspose2d
    return [
        *found,
        Refusal(ValueError, f"CoordConv1d: {kernel} 1 of them, got (3, 3)", lambda: ff.nn.CoordConv1d(4, 6, (3, 3))),
        Refusal(ValueError, f"CoordConv3d: {kernel} 3 of them, got (3, 3)", lambda: ff.nn.CoordConv3d(4, 6, (3, 3))),
        Refusal(
            ValueError,
            "CoordConvTranspose2d: padding_mode must be one of ('zeros',), got 'reflect'",
            lambda: transposed(4, 6, 3, padding_mode="reflect"),
        ),
        Refusal(
            ValueError,
            "CoordConvTranspose2d: output_padding must be at least 0, got -1",
            lambda: transposed(4, 6, 3, output_padding=-1),
        ),
        Refusal(
            TypeError,
            "CoordConvTranspose2d: padding must be an int, got 'same'",
            lambda: transposed(4, 6, 3, padding="same"),
        ),
    ]


def add_coords_refusals() -> list[Refusal]:
    op, x = "add_coords", torch.zeros(1, 2, 3, 4)
    form = "x must be [B, C, *size] with 1 to 3 spatial axes, got"
    return [
        Refusal(TypeError, f"{op}: x must be a Tensor, got NoneType", lambda: ff.add_coords(None)),
        Refusal(TypeError, f"{op}: x must be float16, bfloat16, float32 or float64, got uint8",
                lambda: ff.add_coords(x.byte())),
        Refusal(TypeError, f"{op}: spec must be a CoordSpec, got str; for a preset pass CoordSpec.preset(name)",
                lambda: ff.add_coords(x, "paper")),
        Refusal(ValueError, f"{op}: {form} 2D of shape (1, 2)", lambda: ff.add_coords(x[..., 0, 0])),
        Refusal(ValueError, f"{op}: {form} 6D of shape (1, 1, 1, 2, 3, 4)", lambda: ff.add_coords(x[None, None])),
        Refusal(ValueError, f"{op}: every spatial size of x must be at least 1, got (1, 2, 0, 4)",
                lambda: ff.add_coords(x[:, :, :0])),
    ]  # fmt: skip


def spec_refusals() -> list[Refusal]:
    norms = "('corners', 'dim', 'centers', 'none', 'corners_swapped', 'corners_quarter')"
    presets = "('paper', 'uber_legacy', 'mkocabas', 'walsvid', 'wizaron', 'keras', 'solo', 'paddle', 'paddle_develop')"
    return [
        Refusal(ValueError, f"CoordSpec.norm must be one of {norms}, got 'foo'", lambda: CoordSpec(norm="foo")),
        Refusal(ValueError, "CoordSpec.order must be one of ('ij', 'ji'), got 'xy'", lambda: CoordSpec("xy")),
        Refusal(ValueError, "CoordSpec.position must be one of ('append', 'prepend'), got None",
                lambda: CoordSpec(position=None)),
        Refusal(ValueError, "CoordSpec.r must be one of (None, 'center', 'offset0.5', 'unitmax'), got True",
                lambda: CoordSpec(r=True)),
        Refusal(ValueError, f"CoordSpec.preset: name must be one of {presets}, got 'Paper'", lambda: CoordSpec.preset("Paper")),
        Refusal(ValueError, "CoordSpec.preset: 'solo' has no radius channel; use with_r=False",
                lambda: CoordSpec.preset("solo", with_r=True)),
    ]  # fmt: skip


def test_layers_take_what_torch_takes():
    """One number for all axes as a tuple, any iterable, ranks' own kernels, no channels but the coordinates."""
    x = torch.zeros(1, 4, 8, 8)
    for given in ({"stride": (2,)}, {"padding": [1]}, {"dilation": torch.Size([1, 2])}, {"kernel_size": range(2, 4)}):
        options: dict[str, Any] = {"kernel_size": 3, **given}
        assert ff.nn.CoordConv2d(4, 6, **options)(x).shape == torch.nn.Conv2d(4, 6, **options)(x).shape
    assert ff.nn.CoordConv1d(4, 6, (3,))(x[0, 0, :4]).shape == (6, 6)  # a signal of 4 channels, 8 long
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a weight without elements
        assert ff.nn.CoordConv2d(0, 6, 3).coord_weight.shape == (6, 2, 3, 3)


@pytest.mark.parametrize("refusal", refusals(), ids=lambda refusal: refusal.message)
def test_refuses(refusal):
    """After good calls as before them: what is remembered of these lets nothing else through."""
    x, weight, coord_weight, bias = torch.zeros(2, 3, 5, 7), torch.zeros(6, 3, 3, 3), torch.zeros(6, 2, 3, 3), torch.zeros(6)
    ff.coord_conv2d(x, weight, coord_weight, bias)
    ff.coord_conv_transpose2d(x[:, :2], weight[:2], torch.zeros(2, 3, 3, 3))
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    assert f"{caught.type.__name__}: {caught.value}" == f"{refusal.error.__name__}: {refusal.message}"


def test_every_refusal_is_tested():
    """No `raise` in the family's files is without a wrong call that reaches it."""
    for module in (coordconv, _coord_plan):
        assert battery.unreached_raises(OPS, module, refusals()) == []
