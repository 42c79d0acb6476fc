"""The ready recipes: what each makes of dense, pruned and other layers, and the way back."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import fourfold as ff
import pytest
import torch
from fourfold.swapping import Left
from torch import Tensor, nn
from torch.nn.utils import prune

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

SAMPLERS: dict[str, dict[str, Any]] = {
    "bernoulli": {},
    "threshold": {"sampler": "threshold"},
    "topk": {"sampler": "topk", "density": 0.5},
    "signed": {"sampler": "topk", "density": 0.5, "signed": True},
    "eval topk": {"eval_mask": "topk", "density": 0.5},
}


def net() -> nn.Sequential:
    """Images to 5 numbers; a layer without a bias, a strided one, one by groups."""
    return nn.Sequential(
        collections.OrderedDict(
            stem=nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
            act=nn.ReLU(),
            conv=nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            hidden=nn.Linear(8, 16),
            head=nn.Linear(16, 5, bias=False),
        )
    )


NAMES = ("stem", "conv", "hidden", "head")


def pruned_net(amount: float = 0.5) -> nn.Sequential:
    model = net()
    for name in NAMES:
        prune.l1_unstructured(getattr(model, name), "weight", amount)
    model(images())
    return model


def images() -> Tensor:
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def kept_by(layer: Any) -> Tensor:
    """The mask that it uses in eval mode, of weight's shape."""
    training = layer.training
    layer.eval()
    bits = layer.make_mask() if hasattr(layer, "make_mask") else layer.mask_bits
    layer.train(training)
    weight = layer.weight
    return ff.unpack_mask(bits, weight[0].numel()).reshape(weight.shape)


# ---- CoordConv -----------------------------------------------------------------------------------------------------------


def test_coord_conv_into_convolutions_of_every_kind() -> None:
    model = nn.ModuleList([nn.Conv1d(2, 3, 2), nn.Conv2d(2, 3, 2), nn.Conv3d(2, 3, 2), nn.ConvTranspose2d(2, 3, 2)])
    model += [nn.ConvTranspose1d(2, 3, 2), nn.Linear(2, 2)]
    report = ff.swap(model, ff.recipes.coord_conv())
    kinds = [ff.nn.CoordConv1d, ff.nn.CoordConv2d, ff.nn.CoordConv3d, ff.nn.CoordConvTranspose2d]
    assert [type(layer) for layer in model] == [*kinds, nn.ConvTranspose1d, nn.Linear]
    assert all(
        line.split("  ")[-1].startswith("output unchanged on a random input; new: ") for line in str(report).splitlines()
    )
    assert [p.shape[1 if i < 3 else 0] for i, p in enumerate(report.new_parameters)] == [1, 2, 3, 2]
    assert not any(p.any() for p in report.new_parameters)


def test_coord_conv_takes_which_coordinates() -> None:
    spec = ff.CoordSpec(order="ji", norm="none")
    model = net()
    wanted = model(images())
    report = ff.swap(model, ff.recipes.coord_conv(with_r=True, spec=spec), where="conv", example=images())
    assert model.conv.spec == ff.CoordSpec(order="ji", norm="none", r="center")
    assert model.conv.coord_weight.shape == (8, 3, 3, 3)
    assert report.certificate == {"conv": (0, pytest.approx(1, abs=1e-6))}
    assert torch.equal(model(images()), wanted)
    with torch.no_grad():
        model.conv.coord_weight.fill_(1)
    assert not torch.allclose(model(images()), wanted)
    with pytest.raises(TypeError, match="with_r must be a bool, got 3"):
        ff.recipes.coord_conv(with_r=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="spec must be a CoordSpec, got str"):
        ff.recipes.coord_conv(spec="paper")  # type: ignore[arg-type]


# ---- masked --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_masked_keeps_what_pruning_kept(dtype: torch.dtype) -> None:
    model = pruned_net().to(dtype)
    masks = {name: getattr(model, name).weight_mask.bool() for name in NAMES}
    originals = {name: getattr(model, name).weight_orig for name in NAMES}
    report = ff.swap(model, ff.recipes.masked(), example=images().to(dtype))
    assert report.names == NAMES and report.new_parameters == []
    assert report.model_difference is not None
    assert report.model_difference <= 4 * torch.finfo(dtype).eps
    for name in NAMES:
        layer = getattr(model, name)
        assert type(layer) is (ff.nn.MaskedLinear if name in {"hidden", "head"} else ff.nn.MaskedConv2d)
        assert torch.equal(layer.mask, masks[name])
        assert layer.weight is originals[name]
        assert not layer._forward_pre_hooks
    report.undo()
    assert all(getattr(model, name).weight_orig is originals[name] for name in NAMES)
    assert all(len(getattr(model, name)._forward_pre_hooks) == 1 for name in NAMES)


def test_masked_of_weights_changed_since_the_last_forward() -> None:
    model = pruned_net()
    with torch.no_grad():
        for name in NAMES:
            getattr(model, name).weight_orig.mul_(-3)
    wanted = [getattr(model, name).weight_orig.detach() * getattr(model, name).weight_mask for name in NAMES]
    report = ff.swap(model, ff.recipes.masked())
    assert report.names == NAMES
    report = ff.swap(model, ff.recipes.plain())
    assert all(torch.equal(getattr(model, name).weight, weight) for name, weight in zip(NAMES, wanted, strict=True))


def test_masked_of_a_dense_model() -> None:
    model = net()
    weights = list(model.parameters())
    report = ff.swap(model, ff.recipes.masked(), example=images())
    assert report.model_difference is not None and report.model_difference < 1e-6
    assert all(bool(getattr(model, name).mask.all()) for name in NAMES)
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))


def test_masked_by_density_asks_for_the_change_itself() -> None:
    model = net()
    prune.random_unstructured(model.hidden, "weight", 0.9)
    mask = model.hidden.weight_mask.bool()
    weight = model.stem.weight.detach()
    ff.swap(model, ff.recipes.masked(density=0.25))
    assert torch.equal(model.hidden.mask, mask)
    for name in ("stem", "conv", "head"):
        assert int(getattr(model, name).mask.sum()) == round(0.25 * getattr(model, name).weight.numel())
    assert weight[model.stem.mask].abs().min() >= weight[~model.stem.mask].abs().max()
    for density in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^recipes.masked: density"):
            ff.recipes.masked(density=density)


def test_what_is_masked_stays_zero_in_training() -> None:
    model = pruned_net()
    ff.swap(model, ff.recipes.masked())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    ff.swap(model, ff.recipes.plain())
    assert type(model.stem) is nn.Conv2d and type(model.head) is nn.Linear
    assert int((model.stem.weight == 0).sum()) == model.stem.weight.numel() // 2


# ---- supermask -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", SAMPLERS)
def test_supermask_of_a_dense_model(which: str) -> None:
    model = net()
    weights = {name: getattr(model, name).weight for name in NAMES}
    report = ff.swap(model, ff.recipes.supermask(**SAMPLERS[which]))
    assert report.names == NAMES
    for name in NAMES:
        layer = getattr(model, name)
        assert torch.equal(layer.weight, weights[name]) and layer.weight is not weights[name]
        assert not layer.weight.requires_grad and layer.scores.requires_grad
        assert layer.sampler == SAMPLERS[which].get("sampler", "bernoulli")
    assert len(report.new_parameters) == 8
    model(images()).square().sum().backward()
    assert all(getattr(model, name).scores.grad.any() for name in NAMES)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("which", SAMPLERS)
def test_supermask_keeps_at_first_what_pruning_kept(which: str, dtype: torch.dtype) -> None:
    model = pruned_net().to(dtype)
    # Large enough for 16-bit scores of 0, and for many that are equal.
    wide = nn.Linear(600, 400).to(dtype)
    prune.random_unstructured(wide, "weight", 0.5)
    model.add_module("wide", wide)
    layers = {name: getattr(model, name) for name in (*NAMES, "wide")}
    ff.swap(model, ff.recipes.supermask(**SAMPLERS[which]))
    for name, old in layers.items():
        new = getattr(model, name)
        assert torch.equal(kept_by(new), old.weight_mask.bool())
        assert torch.equal(new.weight, old.weight_orig)
        assert new.bias is old.bias
        assert not new._forward_pre_hooks
        if which != "signed":
            assert torch.equal(old.weight, new.weight * kept_by(new))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("which", SAMPLERS)
def test_supermask_keeps_it_whatever_scores_are_drawn(which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of exactly 0, which 16-bit numbers do come to, are kept by themselves."""
    layer = nn.Linear(64, 8).to(dtype)
    prune.random_unstructured(layer, "weight", 0.5)
    model = nn.Sequential(layer)
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda x, **_: x.detach().zero_())
    ff.swap(model, ff.recipes.supermask(**SAMPLERS[which]))
    assert torch.equal(kept_by(model[0]), layer.weight_mask.bool())


def test_supermask_topk_of_another_density_keeps_those_first() -> None:
    for density, compares in ((0.2, "fewer"), (0.8, "more")):
        model = pruned_net()
        mask = model.hidden.weight_mask.bool()
        ff.swap(model, ff.recipes.supermask(sampler="topk", density=density), where="hidden")
        kept = kept_by(model.hidden)
        within = kept & mask
        assert torch.equal(within, kept if compares == "fewer" else mask)
        assert abs(int(kept.sum()) - density * kept.numel()) < 1


def test_supermask_options_are_checked_at_once() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sampler": "topk"}, "'topk' needs density"),
        ({"sampler": "coin"}, "sampler must be one of"),
        ({"signed": True}, "signed=True goes with sampler 'topk'"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            ff.recipes.supermask(**options)


# ---- and back ------------------------------------------------------------------------------------------------------------


def as_masked(model: nn.Module) -> None:
    ff.swap(model, ff.recipes.masked())


def as_sparse(model: nn.Module) -> None:
    ff.swap(model, ff.recipes.compress(format="csr16"))


def as_supermask(**options: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        ff.swap(model, ff.recipes.supermask(**options))

    return change


CHANGES = {"masked": as_masked, "compressed": as_sparse, "dwr": as_supermask(rescale="dwr")}
CHANGES |= {which: as_supermask(**options) for which, options in SAMPLERS.items()}


@pytest.mark.parametrize("which", CHANGES)
def test_plain_layers_compute_what_the_others_did_in_eval_mode(which: str) -> None:
    model = pruned_net()
    CHANGES[which](model)
    model.conv.eval()
    model.hidden.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wanted = model.eval()(images())
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    report = ff.swap(model, ff.recipes.plain(), example=images())
    changed = {"hidden", "head"} if which == "compressed" else set(NAMES)
    assert set(report.names) == changed
    for name in changed:
        assert type(getattr(model, name)) is (nn.Linear if name in {"hidden", "head"} else nn.Conv2d)
    assert model.training and model.stem.training and not model.conv.training
    assert torch.allclose(model.eval()(images()), wanted, atol=1e-6)
    assert not any(p.requires_grad for p in model.hidden.parameters())
    report.undo()
    assert torch.equal(model(images()), wanted)


def test_plain_has_no_answer_to_masks_drawn_anew() -> None:
    model = nn.Sequential(nn.Linear(30, 30))
    ff.swap(model, ff.recipes.supermask(eval_mask="sample"))
    with pytest.raises(ValueError, match="layer '0' \\(SupermaskLinear\\) changes what it computes"):
        ff.swap(model, ff.recipes.plain())
    assert ff.swap(model, ff.recipes.plain(), change_output=True).names == ("0",)


# ---- compress ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["pruned", "removed", "masked", "supermask"])
def test_compress_of_whatever_is_zero(source: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.75)
        if source == "removed":
            prune.remove(layer, "weight")
    if source in {"masked", "supermask"}:
        ff.swap(model, getattr(ff.recipes, source)())
    if source == "supermask":
        model.eval()
    x = torch.randn(5, 64)
    wanted = model(x)
    bias = model[0].bias
    report = ff.swap(model, ff.recipes.compress(format="bitmap"), example=x)
    assert [type(layer) for layer in model] == [ff.nn.SparseLinear, nn.ReLU, ff.nn.SparseLinear]
    assert [model[0].values.numel(), model[2].values.numel()] == [512, 64]
    assert model[0].bias is bias and model[2].bias is None
    assert bias.requires_grad
    assert not model[0].values.requires_grad
    assert torch.allclose(model(x), wanted, atol=1e-5)
    report.undo()
    assert torch.equal(model(x), wanted)


def test_compress_leaves_what_would_not_win() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    old = list(model)
    report = ff.swap(model, ff.recipes.compress())
    assert list(model) == old and report.names == () and list(report.left) == ["0", "1"]
    assert len(model[0]._forward_pre_hooks) == 1
    assert all(p.requires_grad for p in model.parameters())
    for name, reason in report.left.items():
        layer = ff.nn.SparseLinear.from_pruned(old[0]) if name == "0" else ff.nn.SparseLinear.from_linear(old[1])
        assert layer.format == "dense"
        assert reason == f"dense is faster: {layer.reason}"
    report.undo()
    assert list(model) == old
    # Asked for by name, it is made.
    assert ff.swap(model, ff.recipes.compress(format="dense")).names == ("0", "1")


def test_compress_finds_where_it_wins_by_the_table() -> None:
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 4))
    for layer in model:
        prune.random_unstructured(layer, "weight", 0.98)
    expected = {name: ff.nn.SparseLinear.from_pruned(layer, batch_hint=1) for name, layer in model.named_children()}
    report = ff.swap(model, ff.recipes.compress(batch_hint=1))
    assert expected["0"].format != "dense"
    assert report.names == tuple(name for name, layer in expected.items() if layer.format != "dense")
    assert model[0].format == expected["0"].format
    assert str(report).splitlines()[0].endswith(f"new: values [{model[0].values.numel()}] frozen")


def test_compress_checks_its_options_at_once() -> None:
    with pytest.raises(ValueError, match=r"recipes.compress: format must be one of"):
        ff.recipes.compress(format="zip")
    with pytest.raises(ValueError, match=r"recipes.compress: batch_hint must be at least 1, got 0"):
        ff.recipes.compress(batch_hint=0)
    with pytest.raises(TypeError, match=r"recipes.compress: batch_hint must be an int, got 1.5"):
        ff.recipes.compress(batch_hint=1.5)  # type: ignore[arg-type]


# ---- what they refuse, and how they are joined ---------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["masked", "supermask", "compress"])
@pytest.mark.parametrize("weight_too", [True, False])
def test_a_pruned_bias_must_be_made_permanent(recipe: str, weight_too: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    layer = model[0]
    prune.l1_unstructured(layer, "bias", 0.5)
    if weight_too:
        prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(ValueError, match="the bias is pruned") as caught:
        ff.swap(model, getattr(ff.recipes, recipe)())
    assert str(caught.value) == (
        f"swap: layer '0' (Linear) could not be swapped, and nothing has changed: recipes.{recipe}: the bias is pruned, and a "
        "mask here is the weight's; make that permanent with torch.nn.utils.prune.remove(layer, 'bias')"
    )
    assert model[0] is layer
    prune.remove(layer, "bias")
    assert ff.swap(model, getattr(ff.recipes, recipe)()).names in (("0",), ())


@pytest.mark.parametrize("recipe", ["masked", "supermask", "compress"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_old_norms_must_be_made_permanent(recipe: str) -> None:
    for norm in (torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm):
        model = nn.Sequential(nn.Linear(8, 8))
        norm(model[0])
        layer = model[0]
        with pytest.raises(ValueError, match=r"weight of the Linear is not a Parameter; .* norm must be made permanent first"):
            ff.swap(model, getattr(ff.recipes, recipe)())
        assert model[0] is layer


def test_recipes_are_dicts_to_be_joined() -> None:
    model = net()
    recipes = ff.recipes.coord_conv() | {nn.Linear: ff.recipes.masked()[nn.Linear]}
    assert ff.swap(model, recipes).names == NAMES
    assert [type(getattr(model, name)).__name__ for name in NAMES] == ["CoordConv2d"] * 2 + ["MaskedLinear"] * 2
    # Each layer's own recipe says whether the output may change.
    model = net()
    joined = ff.recipes.supermask() | {nn.Conv2d: lambda conv: ff.nn.CoordConv2d.from_conv(conv, activation="relu")}
    with pytest.raises(ValueError, match="layer 'stem' \\(Conv2d\\) changes what it computes"):
        ff.swap(model, joined)


def test_a_printed_report_word_for_word() -> None:
    model = nn.Sequential(
        collections.OrderedDict(
            wide=nn.Linear(256, 256, bias=False), act=nn.Identity(), head=nn.Linear(256, 4), odd=nn.Linear(4, 4)
        )
    )
    prune.ln_structured(model.wide, "weight", 0.75, n=2, dim=0)
    with torch.no_grad():
        model.wide.weight_orig.copy_(torch.eye(256))

    def recipe(layer: Any) -> Any:
        if layer.out_features == 256:
            return ff.nn.SparseLinear.from_pruned(layer, format="bitmap")
        return ff.nn.MaskedLinear.from_linear(layer) if layer.in_features == 256 else Left("dense is faster: it is so small")

    report = ff.swap(model, {nn.Linear: recipe}, example=torch.rand(3, 256))
    assert str(report) == (
        "wide  Linear -> SparseLinear  output unchanged, CKA 1.000000; new: values [16384]\n"
        "head  Linear -> MaskedLinear  output unchanged, CKA 1.000000\n"
        "odd   left as it is           dense is faster: it is so small"
    )
