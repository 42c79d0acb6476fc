"""The CoordConv layers: drop-in for torch.nn's, taking over checkpoints of implementations that concatenate."""

from __future__ import annotations

import copy
import math
from typing import Any

import battery
import fourfold as ff
import pytest
import torch
import torch.nn.functional as F
from battery import assert_same
from fourfold import CoordSpec
from test_coordconv import in_channels_last, randn
from torch import Tensor, nn
from torch.nn.utils import prune

LAYERS = {1: ff.nn.CoordConv1d, 2: ff.nn.CoordConv2d, 3: ff.nn.CoordConv3d}
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZE = (6, 7, 5)


def image(rank: int, channels: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(2, channels, *SIZE[:rank], dtype=dtype)


def assert_refused(error: type[Exception], message: str, call: Any) -> None:
    """Word for word."""
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


# ---- from_conv -----------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own, of the plain layer
@pytest.mark.parametrize("dtype", battery.FLOATING)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_from_conv_changes_no_bit(rank, dtype):
    torch.manual_seed(rank)
    for mode in ("zeros", "reflect", "replicate", "circular"):
        for options in ({"padding": 1}, {"padding": "same"}, {"padding": 2, "stride": 2, "groups": 2, "bias": False}):
            conv = PLAIN[rank](4, 6, 3 if "stride" in options else 4, padding_mode=mode, dtype=dtype, **options)
            for with_r in (False, True):
                layer = LAYERS[rank].from_conv(conv, with_r=with_r)
                for x in (image(rank, dtype=dtype), in_channels_last(image(rank, dtype=dtype), 1), image(rank, dtype=dtype)[0]):
                    expected = conv(x)
                    assert torch.equal(layer(x), expected), f"{mode} {options}"
                    with torch.no_grad():
                        assert torch.equal(layer(x), expected)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", battery.FLOATING)
def test_from_transposed_conv_changes_no_bit(dtype):
    for options in ({}, {"stride": 2, "output_padding": 1}, {"groups": 2, "dilation": 2, "padding": 1, "bias": False}):
        conv = nn.ConvTranspose2d(4, 6, 3, dtype=dtype, **options)
        layer = ff.nn.CoordConvTranspose2d.from_conv(conv)
        x = image(2, dtype=dtype)
        assert torch.equal(layer(x), conv(x))
    conv = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dtype=dtype)
    layer = ff.nn.CoordConvTranspose2d.from_conv(conv)
    assert torch.equal(layer(x, output_size=[12, 14]), conv(x, output_size=[12, 14]))


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_from_conv_with_activation(activation):
    conv = nn.Conv2d(4, 6, 3, padding=1)
    layer = ff.nn.CoordConv2d.from_conv(conv, activation=activation, spec=CoordSpec("ji"))
    assert layer.activation == activation
    assert layer.spec == CoordSpec("ji")
    torch.testing.assert_close(layer(image(2)), getattr(F, activation)(conv(image(2))))


def test_from_conv_holds_the_same_parameters():
    conv = nn.Conv2d(4, 6, 3, dtype=torch.bfloat16).eval()
    conv.weight.requires_grad_(False)
    layer = ff.nn.CoordConv2d.from_conv(conv, with_r=True)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert not layer.training
    assert ff.nn.CoordConv2d.from_conv(nn.Conv2d(4, 6, 3)).training
    assert layer.coord_weight.dtype == torch.bfloat16
    assert layer.coord_weight.device == conv.weight.device
    assert not layer.coord_weight.requires_grad
    assert not layer.coord_weight.any()
    assert layer.coord_weight.shape == (6, 3, 3, 3)
    assert ff.nn.CoordConv2d.from_conv(nn.Conv2d(4, 6, 3, device="meta")).coord_weight.is_meta
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "coord_weight"]


@pytest.mark.parametrize(
    ("layer", "given", "message"),
    [
        (ff.nn.CoordConv2d, nn.Conv1d(1, 1, 1), "CoordConv2d.from_conv: expected Conv2d, got Conv1d"),
        (ff.nn.CoordConv1d, nn.Linear(1, 1), "CoordConv1d.from_conv: expected Conv1d, got Linear"),
        (ff.nn.CoordConv2d, nn.ConvTranspose2d(1, 1, 1), "CoordConv2d.from_conv: expected Conv2d, got ConvTranspose2d"),
        (ff.nn.CoordConv2d, ff.nn.CoordConv2d(1, 1, 1), "CoordConv2d.from_conv: expected Conv2d, got CoordConv2d"),
        (ff.nn.CoordConv2d, nn.LazyConv2d(1, 1), "CoordConv2d.from_conv: expected Conv2d, got LazyConv2d"),
        (ff.nn.CoordConvTranspose2d, None, "CoordConvTranspose2d.from_conv: expected ConvTranspose2d, got NoneType"),
    ],
)
def test_from_conv_refuses(layer, given, message):
    remedy = "; a layer that is lazy or parametrized must be made an ordinary one first"
    assert_refused(TypeError, message + remedy, lambda: layer.from_conv(given))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("change", [lambda conv: prune.l1_unstructured(conv, "weight", 0.5), nn.utils.weight_norm])
def test_from_conv_refuses_weights_that_are_computed(change):
    message = (
        "CoordConv2d.from_conv: weight of the Conv2d is not a Parameter; make pruning or weight norm permanent first "
        "(torch.nn.utils.prune.remove, remove_weight_norm)"
    )
    assert_refused(TypeError, message, lambda: ff.nn.CoordConv2d.from_conv(change(nn.Conv2d(4, 6, 3))))


def test_from_conv_of_a_pruned_layer_made_permanent():
    conv = prune.remove(prune.l1_unstructured(nn.Conv2d(4, 6, 3), "weight", 0.5), "weight")
    assert ff.nn.CoordConv2d.from_conv(conv).weight is conv.weight


# ---- layers of the implementations that concatenate, written out as these do ---------------------------------------------


def linspace(n: int) -> Tensor:
    """What they all agree on: from -1 to 1."""
    return torch.arange(n, dtype=torch.float32) / (n - 1) * 2 - 1


class Walsvid(nn.Conv2d):
    """A Conv2d that also holds one: its own weight and bias are dead."""

    def __init__(self, cin: int, cout: int, k: int, with_r: bool, **options: Any) -> None:
        super().__init__(cin, cout, k, **options)
        self.with_r = with_r
        self.conv = nn.Conv2d(cin + 2 + with_r, cout, k, **options)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        rows, cols = linspace(h).view(1, 1, h, 1).expand(b, 1, h, w), linspace(w).view(1, 1, 1, w).expand(b, 1, h, w)
        parts = [x, rows, cols]
        if self.with_r:
            parts.append(torch.sqrt((rows - 0.5) ** 2 + (cols - 0.5) ** 2))
        return self.conv(torch.cat(parts, 1))


class Concat(nn.Module):
    """A conv after the function that concatenates."""

    def __init__(self, add: Any, cin: int, cout: int, k: int, with_r: bool, **options: Any) -> None:
        super().__init__()
        self.add, self.with_r = add, with_r
        self.conv = nn.Conv2d(cin + 2 + with_r, cout, k, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.add(x, self.with_r))


def grid(x: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], 1, *x.shape[2:])
    return rows.view(1, 1, -1, 1).expand(shape), cols.view(1, 1, 1, -1).expand(shape)


def add_paper(x: Tensor, with_r: bool) -> Tensor:
    i, j = grid(x, linspace(x.shape[2]), linspace(x.shape[3]))
    return torch.cat([x, i, j] + [(i**2 + j**2).sqrt()] * with_r, 1)


def add_uber(x: Tensor, with_r: bool) -> Tensor:
    """Columns first, each axis divided by the other one's size."""
    h, w = x.shape[2:]
    i, j = grid(x, torch.arange(h) / (w - 1) * 2 - 1, torch.arange(w) / (h - 1) * 2 - 1)
    return torch.cat([x, j, i] + [(i**2 + j**2).sqrt()] * with_r, 1)


def add_centred(x: Tensor, with_r: bool) -> Tensor:
    i, j = grid(x, linspace(x.shape[2]), linspace(x.shape[3]))
    return torch.cat([x, i, j] + [((i - 0.5) ** 2 + (j - 0.5) ** 2).sqrt()] * with_r, 1)


def add_wizaron(x: Tensor, with_r: bool) -> Tensor:
    """Coordinates in front, the radius scaled to its maximum."""
    i, j = grid(x, linspace(x.shape[2]), linspace(x.shape[3]))
    r = (i**2 + j**2).sqrt()
    return torch.cat([i, j] + [r / r.max()] * with_r + [x], 1)


def add_xy(x: Tensor, with_r: bool) -> Tensor:
    assert not with_r
    i, j = grid(x, torch.linspace(-1, 1, x.shape[2]), torch.linspace(-1, 1, x.shape[3]))
    return torch.cat([x, j, i], 1)


def add_paddle_develop(x: Tensor, with_r: bool) -> Tensor:
    """Its precedence of operators: from -1 to -1/2."""
    assert not with_r
    h, w = x.shape[2:]
    i, j = grid(x, torch.arange(h) / ((h - 1) * 2) - 1, torch.arange(w) / ((w - 1) * 2) - 1)
    return torch.cat([x, j, i], 1)


CONCATS = {
    "paper": add_paper, "uber_legacy": add_uber, "mkocabas": add_centred, "wizaron": add_wizaron, "keras": add_centred,
    "solo": add_xy, "paddle": add_xy, "paddle_develop": add_paddle_develop,
}  # fmt: skip
WITHOUT_RADIUS = {"solo", "paddle", "paddle_develop"}
PRESETS = [(name, False) for name in (*CONCATS, "walsvid")]
PRESETS += [(name, True) for name, _ in PRESETS if name not in WITHOUT_RADIUS]


def concat_layer(preset: str, with_r: bool, **options: Any) -> nn.Module:
    if preset == "walsvid":
        return Walsvid(4, 6, 3, with_r, **options)
    return Concat(CONCATS[preset], 4, 6, 3, with_r, **options)


@pytest.mark.parametrize(("preset", "with_r"), PRESETS)
def test_takes_over_a_concat_checkpoint(preset, with_r):
    """Non-square, which tells rows from columns; and back by to_concat_conv."""
    torch.manual_seed(1)
    x = image(2)
    for options in ({"padding": 1}, {"stride": 2, "bias": False}):
        theirs = concat_layer(preset, with_r, **options)
        ours = ff.nn.CoordConv2d(4, 6, 3, with_r=with_r, **options)
        ours.load_concat_state_dict(theirs.state_dict(), preset)
        assert ours.spec == CoordSpec.preset(preset, with_r=with_r)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        back = ours.to_concat_conv()
        assert type(back) is nn.Conv2d
        torch.testing.assert_close(back(ff.add_coords(x, ours.spec)), theirs(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(back.weight, theirs.conv.weight)
        assert back.weight.data_ptr() != ours.weight.data_ptr()
        again = ff.nn.CoordConv2d(4, 6, 3, with_r=with_r, **options)
        again.load_concat_state_dict(back.state_dict(), preset)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_takes_over_any_one_prefix():
    theirs = concat_layer("paper", False)
    ours = ff.nn.CoordConv2d(4, 6, 3)
    parameters = {k.removeprefix("conv."): v for k, v in theirs.state_dict().items()}
    for prefix in ("", "conv.", "stem.0.coordconv."):
        ours.reset_parameters()
        ours.load_concat_state_dict({prefix + k: v for k, v in parameters.items()}, "paper")
        assert torch.equal(ours.coord_weight, parameters["weight"][:, 4:])
        assert torch.equal(ours.bias, parameters["bias"])


def test_takes_over_other_ranks_and_transposed():
    for rank in (1, 3):
        conv, ours = PLAIN[rank](4 + rank, 6, 3), LAYERS[rank](4, 6, 3)
        ours.load_concat_state_dict(conv.state_dict(), "paper")
        torch.testing.assert_close(ours(image(rank)), conv(ff.add_coords(image(rank))))
        assert torch.equal(ours.to_concat_conv().weight, conv.weight)
    conv, ours = nn.ConvTranspose2d(6, 5, 3, stride=2), ff.nn.CoordConvTranspose2d(4, 5, 3, stride=2)
    for preset in ("paper", "wizaron"):
        ours.load_concat_state_dict(conv.state_dict(), preset)
        torch.testing.assert_close(ours(image(2)), conv(ff.add_coords(image(2), CoordSpec.preset(preset))))
        assert torch.equal(ours.to_concat_conv().weight, conv.weight)


@pytest.mark.parametrize(
    ("change", "preset", "message"),
    [
        (
            lambda sd: {"a.weight": sd["weight"], "b.weight": sd["weight"]},
            "paper",
            (
                "coord checkpoint: expected one 'weight', or 'conv.weight', among ['a.weight', 'b.weight']; pass one layer's "
                "entries"
            ),
        ),
        (
            lambda sd: {},
            "paper",
            "coord checkpoint: expected one 'weight', or 'conv.weight', among []; pass one layer's entries",
        ),
        (
            lambda sd: {**sd, "weight": torch.zeros(6, 9, 3, 3)},
            "solo",
            (
                "coord checkpoint: weight has shape (6, 9, 3, 3); expected (6, 6, 3, 3) (4 channels of x + 2 coordinates, "
                "preset='solo')"
            ),
        ),
        (
            lambda sd: {**sd, "weight": torch.zeros(6, 7, 3, 3)},
            "paper",
            (
                "coord checkpoint: weight has shape (6, 7, 3, 3); expected (6, 6, 3, 3) (4 channels of x + 2 coordinates, "
                "preset='paper'); a layer built with_r=True has one coordinate more"
            ),
        ),
        (
            lambda sd: {"weight": sd["weight"]},
            "paper",
            "coord checkpoint: only the layer has a bias; build the layer with bias=False",
        ),
        (
            lambda sd: {**sd, "bias": torch.zeros(5)},
            "paper",
            "coord checkpoint: bias has shape (5,); expected (6,)",
        ),
        (
            lambda sd: sd,
            "nobody",
            (
                "CoordSpec.preset: name must be one of ('paper', 'uber_legacy', 'mkocabas', 'walsvid', 'wizaron', 'keras', "
                "'solo', 'paddle', 'paddle_develop'), got 'nobody'"
            ),
        ),
    ],
)
def test_concat_checkpoint_is_refused(change, preset, message):
    """And leaves the layer as it was."""
    layer = ff.nn.CoordConv2d(4, 6, 3)
    before = copy.deepcopy(layer)
    state_dict = change(nn.Conv2d(6, 6, 3).state_dict())
    assert_refused(ValueError, message, lambda: layer.load_concat_state_dict(state_dict, preset))
    assert layer.spec == before.spec
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), before.parameters(), strict=True))


def test_concat_checkpoint_of_groups_or_surplus_bias_is_refused():
    message = (
        "coord checkpoint: groups=2 cut up the concatenated channels there, and every group sees all coordinates here; "
        "use coord_conv2d(..., groups_mode='concat')"
    )
    grouped, theirs = ff.nn.CoordConv2d(4, 6, 3, groups=2), nn.Conv2d(6, 6, 3, groups=2).state_dict()
    assert_refused(ValueError, message, lambda: grouped.load_concat_state_dict(theirs, "paper"))
    without, theirs = ff.nn.CoordConv2d(4, 6, 3, bias=False), nn.Conv2d(6, 6, 3).state_dict()
    message = "coord checkpoint: only the checkpoint has a bias; build the layer with bias=True"
    assert_refused(ValueError, message, lambda: without.load_concat_state_dict(theirs, "paper"))


def test_concat_checkpoint_of_another_type_is_refused():
    layer = ff.nn.CoordConv2d(4, 6, 3)
    name = "CoordConv2d.load_concat_state_dict"
    message = f"{name}: state_dict must be a mapping of tensors, got Conv2d; pass layer.state_dict()"
    assert_refused(TypeError, message, lambda: layer.load_concat_state_dict(nn.Conv2d(6, 6, 3), "paper"))
    arrays = {"weight": torch.zeros(6, 6, 3, 3).numpy(), "bias": torch.zeros(6)}
    assert_refused(
        TypeError, f"{name}: weight must be a Tensor, got ndarray", lambda: layer.load_concat_state_dict(arrays, "paper")
    )


def test_concat_checkpoint_under_a_deeper_prefix():
    """Where the dead weight beside it is not taken for the one that computes."""
    layer, theirs = ff.nn.CoordConv2d(4, 6, 3), nn.Conv2d(6, 6, 3)
    entries = {f"stem.conv.{name}": value for name, value in theirs.state_dict().items()}
    layer.load_concat_state_dict({**entries, "stem.weight": torch.zeros(6, 6, 3, 3), "stem.bias": torch.zeros(6)}, "walsvid")
    x = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(layer(x), theirs(ff.add_coords(x, layer.spec)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (ff.nn.CoordConv2d(4, 6, 3, groups=2), "CoordConv2d.to_concat_conv: needs groups=1, got 2"),
        (
            ff.nn.CoordConv1d(4, 6, 3, activation="silu"),
            (
                "CoordConv1d.to_concat_conv: a torch.nn layer has no activation; build this layer without 'silu' and apply it "
                "after the layer"
            ),
        ),
    ],
)
def test_to_concat_conv_refuses(layer, message):
    assert_refused(ValueError, message, layer.to_concat_conv)


@pytest.mark.parametrize("key", ["0.weight", "0.conv.weight"])
def test_load_state_dict_of_a_concat_layer_says_what_to_do(key):
    model = nn.Sequential(ff.nn.CoordConv2d(64, 8, 3, bias=False))
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict({key: torch.zeros(8, 66, 3, 3)})
    assert (
        "coord checkpoint: weight has 66 input channels; expected 64 (conv) or 66 (conv + coords, preset='walsvid'); "
        "use load_concat_state_dict(..., preset=...)"
    ) in str(caught.value)


def test_load_state_dict_of_a_plain_layer():
    """A torch.nn checkpoint lacks the coordinates' weights and nothing else."""
    conv, layer = nn.Conv2d(4, 6, 3), ff.nn.CoordConv2d(4, 6, 3)
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(conv.state_dict())
    assert str(caught.value) == (
        'Error(s) in loading state_dict for CoordConv2d:\n\tMissing key(s) in state_dict: "coord_weight". \n\t'
        "These are the entries of a Conv2d, which has no coordinates: CoordConv2d.from_conv(conv) makes a CoordConv2d of one "
        "that has loaded them; strict=False leaves coord_weight as it is (see docs/coordconv.md#limits)"
    )
    # What lacks more than that, or is another layer's, has torch's error alone.
    for entries in ({}, {"bias": conv.bias}, nn.Conv2d(4, 6, 5).state_dict(), {**layer.state_dict(), "more": conv.bias}):
        with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for CoordConv2d") as caught:
            layer.load_state_dict(entries)
        assert "from_conv" not in str(caught.value)
    result = layer.load_state_dict(conv.state_dict(), strict=False)
    assert result.missing_keys == ["coord_weight"]
    assert result.unexpected_keys == []
    assert torch.equal(layer.weight, conv.weight)
    layer.load_state_dict(ff.nn.CoordConv2d.from_conv(conv).state_dict(), assign=True)
    assert not layer.coord_weight.any()


# ---- as torch.nn's layers ------------------------------------------------------------------------------------------------


def layers() -> list[tuple[nn.Module, Tensor]]:
    return [
        (ff.nn.CoordConv1d(4, 5, 3, padding="same", padding_mode="circular"), image(1)),
        (ff.nn.CoordConv2d(4, 6, 3, stride=2, groups=2, with_r=True, activation="relu"), image(2)),
        (ff.nn.CoordConv3d(4, 5, 2, bias=False, spec=CoordSpec("ji")), image(3)),
        (ff.nn.CoordConvTranspose2d(4, 6, 3, stride=2, activation="gelu"), image(2)),
        (ff.nn.AddCoords(with_r=True), image(2)),
    ]


@pytest.mark.parametrize(("layer", "x"), layers()[:4], ids=lambda value: type(value).__name__)
def test_layer_is_a_torch_layer(layer, x):
    assert isinstance(layer, getattr(nn, type(layer).__name__.replace("Coord", "")))
    names = ["weight", "bias", "coord_weight"] if layer.bias is not None else ["weight", "coord_weight"]
    assert [name for name, _ in layer.named_parameters()] == names
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


def test_layers_equal_the_functions():
    x = image(2)
    layer = ff.nn.CoordConv2d(4, 6, (3, 2), (1, 2), (1, 0), (2, 1), 2, False, "reflect", with_r=True, activation="silu")
    expected = ff.coord_conv2d(
        x, layer.weight, layer.coord_weight, None, (1, 2), (1, 0), (2, 1), 2, padding_mode="reflect",
        spec=CoordSpec(r="center"), activation="silu",
    )  # fmt: skip
    assert_same(layer(x), expected, "CoordConv2d")
    assert_same(ff.nn.AddCoords(spec=CoordSpec(r="unitmax"))(x), ff.add_coords(x, CoordSpec(r="unitmax")), "AddCoords")


def test_with_r_and_spec():
    assert ff.nn.CoordConv2d(1, 1, 1, with_r=True).spec == CoordSpec(r="center")
    assert ff.nn.CoordConv2d(1, 1, 1, with_r=True, spec=CoordSpec("ji")).spec == CoordSpec("ji", r="center")
    assert ff.nn.CoordConv2d(1, 1, 1, with_r=True, spec=CoordSpec(r="unitmax")).spec.r == "unitmax"
    assert ff.nn.CoordConv2d(1, 1, 1, spec=CoordSpec(r="unitmax")).coord_weight.shape == (1, 3, 1, 1)
    assert ff.nn.AddCoords(with_r=True).spec.r == "center"
    layer = ff.nn.CoordConv2d(2, 3, 1, device="meta", dtype=torch.float16)
    assert layer.coord_weight.is_meta
    assert layer.coord_weight.dtype == torch.float16


def test_reprs():
    assert repr(ff.nn.AddCoords()) == "AddCoords(spec=CoordSpec())"
    assert repr(ff.nn.CoordConv2d(3, 8, 3, padding=1)) == "CoordConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    layer = ff.nn.CoordConv2d(3, 8, 1, with_r=True, activation="relu")
    assert repr(layer) == "CoordConv2d(3, 8, kernel_size=(1, 1), stride=(1, 1), spec=CoordSpec(r='center'), activation='relu')"


def test_initial_weights_are_those_of_a_concat_layer():
    """Uniform within 1 / sqrt of a fan-in that counts the coordinates; drawn anew by reset_parameters."""
    layer = ff.nn.CoordConv2d(14, 400, 3, with_r=True, spec=CoordSpec())
    bound = 1 / math.sqrt((14 + 3) * 9)
    for parameter in layer.parameters():
        largest = parameter.abs().max().item()
        assert 0.98 * bound < largest <= bound
        assert parameter.mean().abs() < 0.1 * bound
    before = layer.coord_weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.coord_weight, before)
    grouped = ff.nn.CoordConv2d(14, 400, 1, groups=2)
    assert 0.98 / 3 < grouped.weight.abs().max() <= 1 / 3  # 7 channels of a group and 2 coordinates
    transposed = ff.nn.CoordConvTranspose2d(2, 14, 3)
    assert transposed.weight.abs().max() <= 1 / math.sqrt(14 * 9)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: ff.nn.CoordConv2d(1, 1, 1, activation="tanh"),
            ValueError,
            "CoordConv2d: activation must be one of ('relu', 'silu', 'gelu'), got 'tanh'",
        ),
        (
            lambda: ff.nn.CoordConv3d(1, 1, 1, spec="paper"),
            TypeError,
            "CoordConv3d: spec must be a CoordSpec, got str; for a preset pass CoordSpec.preset(name)",
        ),
        (
            lambda: ff.nn.AddCoords(spec={}),
            TypeError,
            "AddCoords: spec must be a CoordSpec, got dict; for a preset pass CoordSpec.preset(name)",
        ),
        (
            lambda: ff.nn.CoordConv2d(64, 8, 3)(torch.zeros(1, 66, 9, 9)),
            ValueError,
            (
                "CoordConv2d: expected 64 input channels, got 66; in_channels excludes the 2 coordinate channels, so pass x "
                "without AddCoords"
            ),
        ),
        (
            lambda: ff.nn.CoordConvTranspose2d(4, 8, 3, with_r=True)(torch.zeros(1, 7, 9, 9)),
            ValueError,
            (
                "CoordConvTranspose2d: expected 4 input channels, got 7; in_channels excludes the 3 coordinate channels, so "
                "pass x without AddCoords"
            ),
        ),
        (
            lambda: ff.nn.CoordConv2d(4, 8, 3)(torch.zeros(1, 1, 4, 9, 9)),
            ValueError,
            "CoordConv2d: expected 3D (C,H,W) or 4D (N,C,H,W) input, got 5D of shape (1, 1, 4, 9, 9)",
        ),
        (
            lambda: ff.nn.CoordConv2d(4, 8, 3, with_r="unitmax"),
            TypeError,
            "CoordConv2d: with_r must be a bool, got 'unitmax'; a radius of another kind is CoordSpec(r=...)",
        ),
    ],
)
def test_layer_refuses(build, error, message):
    assert_refused(error, message, build)


def test_layer_trains_to_a_position():
    """A 1x1 layer learns which column a pixel is in, which no 1x1 convolution can."""
    x = torch.zeros(1, 1, 8, 16)
    target = torch.linspace(-1, 1, 16).expand(1, 1, 8, 16)

    def loss_of(layer: nn.Module) -> float:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert loss_of(ff.nn.CoordConv2d(1, 1, 1)) < 1e-3
    assert loss_of(nn.Conv2d(1, 1, 1)) > 0.3
