"""swap: which layers it takes, what lives on in the new ones, what it refuses, what it certifies, and how it is undone."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import gc
import io
import itertools
import math
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import fourfold as ff
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

CONVS = ff.recipes.coord_conv()
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

dtypes = pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)


def same(layer: nn.Linear) -> nn.Module:
    """A recipe: a MaskedLinear that keeps every weight."""
    return ff.nn.MaskedLinear.from_linear(layer)


def doubled(layer: Any) -> nn.Module:
    """A recipe that changes the output: a copy with twice the weight."""
    new = copy.deepcopy(layer)
    with torch.no_grad():
        new.weight.mul_(2)
    return new


LINEAR = {nn.Linear: same}


def conv_net() -> nn.Sequential:
    """What follows a layer overwrites its output."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.ReLU(inplace=True))


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 9, 9, generator=torch.Generator().manual_seed(1))


class Runs(nn.Module):
    """A model whose forward is the function given, over modules given by name."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Scale(nn.Module):
    """A layer of a type that nobody but its author knows; gives the function of input and scale."""

    def __init__(self, scale: float = 1.0, function: Callable[..., Any] = torch.mul) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x, self.scale)


class Around(nn.Module):
    """A layer that calls another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Wider(nn.Linear):
    """A type of its own."""


def state_of(model: nn.Module) -> dict[str, Any]:
    """All there is to a model, and torch's generator; objects as themselves."""
    found: dict[str, Any] = {"rng": torch.get_rng_state()}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path, "itself"] = module
        for key, value in vars(module).items():
            found[path, key] = value
            if isinstance(value, dict):
                found[path, key, "keys"] = list(value)
                found.update({(path, key, k): v for k, v in value.items()})
    found["values"] = [(key, x if x.is_meta else x.clone()) for key, x in model.state_dict().items()]
    return found


def assert_state(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert list(after) == list(before)
    for key, x in before.items():
        y = after[key]
        if key == "rng":
            assert torch.equal(x, y)
        elif key == "values":
            assert [name for name, _ in x] == [name for name, _ in y]
            assert all(a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num()) for (_, a), (_, b) in zip(x, y, strict=True))
        else:
            # A pruned layer's weight is made anew by every forward.
            made = type(x) is Tensor and key[1] == "weight" and torch.equal(x, y)
            assert x is y or made or (type(x) in {bool, list, str, int} and x == y), key


def assert_refused(message: str, model: Any, recipes: Any, error: type[Exception] = ValueError, **options: Any) -> None:
    """Word for word, and the model is as it was."""
    before = state_of(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error) as caught:
        ff.swap(model, recipes, **options)
    assert str(caught.value).partition(" (see docs/swapping.md#")[0] == message
    if before is not None:
        assert_state(model, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For what torch warns of itself: deprecated norms and TorchScript, parameters without elements."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def close(x: Tensor, y: Tensor) -> bool:
    """Of float64; the sums of a bias's gradient may be made in another order."""
    return torch.allclose(x, y, rtol=0, atol=1e-13)


# ---- which layers --------------------------------------------------------------------------------------------------------


def nested() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": nn.Linear(4, 4),
            "blocks": nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Around(nn.Linear(4, 4))]),
            "head": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        }
    )


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, ("stem", "blocks.0.0", "blocks.1.inner", "head.0", "head.1")),
        ("stem", ("stem",)),
        ("blocks.**", ("blocks.0.0", "blocks.1.inner")),
        ("head.*", ("head.0", "head.1")),
        ("**.0", ("blocks.0.0", "head.0")),
        (["head.1", "stem"], ("stem", "head.1")),
        (("blocks.*.*", "stem"), ("stem", "blocks.0.0", "blocks.1.inner")),
        (lambda name, layer: name.endswith("0") and isinstance(layer, nn.Linear), ("blocks.0.0", "head.0")),
    ],
)
def test_where_chooses(where: Any, expected: tuple[str, ...]) -> None:
    model = nested()
    old = dict(model.named_modules())
    report = ff.swap(model, LINEAR, where=where)
    assert report.names == expected
    now = dict(model.named_modules())
    assert {name for name, module in now.items() if type(module) is ff.nn.MaskedLinear} == set(expected)
    assert all(now[name] is old[name] for name in now if name not in expected)
    assert [report.left, report.certificate, report.model_difference, report.new_parameters] == [{}, {}, None, []]


def test_where_sees_names_and_layers_of_the_keys_alone() -> None:
    seen = []
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Around(nn.Linear(2, 2)))
    ff.swap(model, LINEAR, where=lambda name, layer: seen.append((name, layer)) or True)
    assert [(name, type(layer)) for name, layer in seen] == [("0", nn.Linear), ("2.inner", nn.Linear)]


def test_each_recipe_gets_the_layers_of_exactly_its_type() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Wider(2, 2), nn.Bilinear(2, 2, 2), nn.Conv1d(2, 2, 1))
    report = ff.swap(model, {nn.Linear: same, nn.Conv1d: ff.nn.CoordConv1d.from_conv})
    assert report.names == ("0", "3")
    assert report.left == {"1": "a Wider, which is not exactly a type in recipes"}
    assert [type(layer) for layer in model] == [ff.nn.MaskedLinear, Wider, nn.Bilinear, ff.nn.CoordConv1d]
    model = nn.Sequential(nn.Linear(2, 2), Wider(2, 2))
    assert ff.swap(model, {nn.Linear: same, Wider: copy.deepcopy}).names == ("0", "1")
    # Passed over, and not to be reported: where does not choose it.
    assert ff.swap(nn.Sequential(nn.Linear(2, 2), Wider(2, 2)), LINEAR, where="0").left == {}


def test_a_layer_under_several_names_is_swapped_once_and_stays_shared() -> None:
    for where in (None, "0", "2", "3.*", lambda name, _layer: name == "3.0"):
        layer = nn.Linear(3, 3)
        box = nn.Sequential(layer)
        model = nn.Sequential(layer, nn.ReLU(), layer, box, box)
        calls = []
        report = ff.swap(model, {nn.Linear: lambda old, calls=calls: (calls.append(old), same(old))[1]}, where=where)
        assert calls == [layer]
        assert report.names == ("0",)
        assert model[0] is model[2] is model[3][0] is model[4][0]
        assert model[3] is model[4] is box
        assert type(model[0]) is ff.nn.MaskedLinear
        report.undo()
        assert model[0] is model[2] is box[0] is layer


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("9", "swap: where='9' matches no module of the model; there are '0', '1', '2', '3'"),
        (["0", "x.*"], "swap: where='x.*' matches no module of the model; there are '0', '1', '2', '3'"),
        ("1", "swap: where='1' matches 1 ReLU, and the recipes are for layers whose type is exactly Linear"),
        (["0", "1"], "swap: where='1' matches 1 ReLU, and the recipes are for layers whose type is exactly Linear"),
        ("2", "swap: where='2' matches 1 Wider, and the recipes are for layers whose type is exactly Linear"),
        ([], "swap: where must hold at least one glob for the model, got an empty list"),
        (
            lambda name, _layer: name == "1",
            "swap: where chooses none of the model's layers of type Linear; there are '0'",
        ),
        (
            lambda name, _layer: name == "2",
            "swap: the model has no layer whose type is exactly Linear; it has 1 Linear, 1 ReLU, 1 Wider, 1 LazyLinear",
        ),
        ("3", "swap: layer '3' (LazyLinear) is lazy and has no weight yet; run the model once on an input first"),
        (None, "swap: layer '3' (LazyLinear) is lazy and has no weight yet; run the model once on an input first"),
    ],
)
def test_where_that_chooses_wrongly(where: Any, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that lazy modules are new
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Wider(2, 2), nn.LazyLinear(2))
    with pytest.raises(ValueError, match="swap: ") as caught:
        ff.swap(model, LINEAR, where=where)
    assert str(caught.value) == message
    assert type(model[0]) is nn.Linear


def test_bad_arguments() -> None:
    net = mlp(2, 2)
    refused: list[tuple[Any, ...]] = [
        ("model must be a torch.nn.Module, got list", [net], LINEAR),
        (
            "recipes must be a dict such as {torch.nn.Conv2d: fourfold.nn.CoordConv2d.from_conv}, got function",
            net,
            same,
        ),
        *(
            (
                (
                    "recipes must be a dict such as {torch.nn.Conv2d: fourfold.nn.CoordConv2d.from_conv}, got the function "
                    f"{name}; call it: ff.recipes.{name}()"
                ),
                net,
                getattr(ff.recipes, name),
            )
            for name in ("coord_conv", "compress", "plain")
        ),
        ("the keys of recipes must be types of torch.nn.Module, got 'Linear'", net, {"Linear": same}),
        ("the keys of recipes must be types of torch.nn.Module, got <class 'torch.Tensor'>", net, {Tensor: same}),
        ("the recipe for Linear must be a function of the layer, got 3", net, {nn.Linear: 3}),
    ]
    for message, model, recipes in refused:
        assert_refused(f"swap: {message}", model, recipes, TypeError)
    for where in ({"0"}, 3):
        message = f"swap: where must be a glob, a list of globs or a function (name, module) -> bool, got {where!r}"
        assert_refused(message, net, LINEAR, TypeError, where=where)
    assert_refused("swap: where must be a glob or a list of globs, got [3]", net, LINEAR, TypeError, where=[3])
    assert_refused("swap: recipes must name at least one type of layer, got an empty dict", net, {})
    for example, what in (("text", "str"), ({}, "dict"), ((1, None), "tuple")):
        message = f"swap: example must hold a tensor, as the model takes it, got {what}"
        # Before the recipes are called.
        assert_refused(message, net, {nn.Linear: pytest.fail}, TypeError, example=example)
    message = "swap: example is on the meta device, where nothing can be compared; leave it out"
    assert_refused(message, mlp(2, 2).to("meta"), LINEAR, example=torch.ones(1, 2, device="meta"))


def test_a_model_without_such_layers() -> None:
    message = "swap: the model has no layer whose type is exactly Linear; it has 2 ReLU, 1 Tanh"
    assert_refused(message, nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh(), nn.ReLU())), LINEAR)
    assert_refused("swap: the model has no layer whose type is exactly Linear; it has no submodules", nn.ReLU(), LINEAR)
    message = "swap: the model itself is a Linear, and swap replaces layers inside a model; call the recipe on it"
    assert_refused(message, nn.Linear(2, 2), LINEAR)


def test_a_layer_and_what_holds_it() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    recipes = {nn.Sequential: copy.deepcopy, nn.Linear: same}
    message = "swap: layer '0' (Sequential) holds '0' (Linear), which is to be swapped as well; choose one of them with where="
    assert_refused(message, model, recipes)
    assert ff.swap(model, recipes, where="0.0").names == ("0.0",)
    assert ff.swap(model, {nn.Sequential: copy.deepcopy}).names == ("0",)


# ---- what lives on -------------------------------------------------------------------------------------------------------


def trained(model: nn.Module, report: Any, optimizer: Any, x: Tensor, steps: int = 3) -> list[Tensor]:
    if report is not None and report.new_parameters:
        optimizer.add_param_group({"params": report.new_parameters, "lr": 0.0})
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters() if report is None or all(p is not n for n in report.new_parameters)]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_existing_optimizer_trains_the_swapped_model_as_it_would_have_the_old_one(optimizer: Any) -> None:
    plain = conv_net().double()
    start = plain[0].weight.detach().clone()
    model = copy.deepcopy(plain)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    optimizers = [optimizer(each.parameters(), lr=0.1, **options) for each in (plain, model)]
    x = images().double()
    for each, of_each in zip((plain, model), optimizers, strict=True):
        trained(each, None, of_each, x, 2)
    parameters = list(model.parameters())
    report = ff.swap(model, CONVS)
    convs = [model[0], model[2]]
    assert [id(p) for p in report.new_parameters] == [id(conv.coord_weight) for conv in convs]
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters} | {id(p) for p in report.new_parameters}
    wanted = trained(plain, None, optimizers[0], x)
    found = trained(model, report, optimizers[1], x)
    assert all(close(a, b) for a, b in zip(wanted, found, strict=True))
    assert close(plain(x), model(x))
    assert not close(wanted[0], start)
    report.undo()
    # What training did to the Parameters that both hold stays.
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert close(plain(x), model(x))


def test_new_parameters_are_those_that_no_optimizer_knows() -> None:
    model = mlp(4, 4, 4)
    known = {id(p) for p in model.parameters()}
    report = ff.swap(model, ff.recipes.supermask(), where="1")
    assert [id(p) for p in report.new_parameters] == [id(model[1].weight), id(model[1].scores)]
    assert known == {id(p) for p in model.parameters()} - {id(p) for p in report.new_parameters} | {
        id(report._swapped[0].layer.module.weight)
    }
    assert ff.swap(mlp(4, 4), LINEAR).new_parameters == []


@dtypes
def test_dtypes_and_frozen_layers(dtype: torch.dtype) -> None:
    model = conv_net().to(dtype)
    model[0].requires_grad_(False)
    report = ff.swap(model, CONVS, example=images().to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.model_difference == 0
    assert [p.requires_grad for p in report.new_parameters] == [False, True]
    assert [p.requires_grad for p in model[0].parameters()] == [False] * 3
    assert str(report).splitlines()[0].endswith("new: coord_weight [4, 2, 3, 3] frozen")


def test_modes_of_each_layer_are_kept() -> None:
    model = mlp(2, 2, 2, 2)
    model[1].eval()
    old = list(model)
    report = ff.swap(model, LINEAR, example=torch.ones(1, 2))
    assert [layer.training for layer in model] == [True, False, True]
    assert [layer.training for layer in old] == [True, False, True]
    model.eval()
    report.undo()
    assert [layer.training for layer in model] == [False] * 3
    ff.swap(model, {nn.Linear: lambda _: nn.Linear(2, 2)}, change_output=True)
    assert [layer.training for layer in model] == [False] * 3


def test_modes_inside_a_layer_are_kept() -> None:
    """Of frozen norms in a block, say; by a recipe that copies it and by one that builds around it."""
    for recipe in (copy.deepcopy, Around):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
        block = model[0]
        block[1].eval()
        with pytest.raises(ValueError, match="called more often"):
            ff.swap(model, {nn.Sequential: Twice}, example=images())
        report = ff.swap(model, {nn.Sequential: recipe}, example=images())
        assert model[0].training and block[0].training and not block[1].training
        report.undo()
        assert model[0] is block
        assert block.training and block[0].training and not block[1].training
        report = ff.swap(model, {nn.Sequential: recipe})
        model.eval()
        report.undo()
        assert not any(module.training for module in model.modules())


class Twice(nn.Module):
    """Calls itself once more."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.again = True

    def forward(self, x: Tensor) -> Tensor:
        if self.again:
            self.again = False
            self(x)
            self.again = True
        return self.inner(x)


def test_hooks_of_every_kind_go_on_and_their_handles_remove_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    seen: collections.Counter[str] = collections.Counter()
    layer: Any = model[0]
    types: dict[str, set[type]] = collections.defaultdict(set)

    def hook(name: str, result: Any = None) -> Any:
        def called(module: Any, *_args: Any, **_kwargs: Any) -> Any:
            seen[name] += 1
            types[name].add(type(module))
            return result

        return called

    handles = {
        "forward": layer.register_forward_hook(hook("forward")),
        "kwargs": layer.register_forward_hook(lambda *a: hook("kwargs")(*a) or (len(a) == 4 and None), with_kwargs=True),
        "always": layer.register_forward_hook(hook("always"), always_call=True),
        "pre": layer.register_forward_pre_hook(hook("pre")),
        "pre kwargs": layer.register_forward_pre_hook(
            lambda *a: hook("pre kwargs")(*a) or (len(a) == 3 and None), with_kwargs=True
        ),
        "backward": layer.register_full_backward_hook(hook("backward")),
        "backward pre": layer.register_full_backward_pre_hook(hook("backward pre")),
        "state": layer.register_state_dict_post_hook(hook("state")),
        "state pre": layer.register_state_dict_pre_hook(hook("state pre")),
        "load": layer.register_load_state_dict_post_hook(hook("load")),
        "load pre": layer.register_load_state_dict_pre_hook(hook("load pre")),
    }

    def used() -> set[str]:
        seen.clear()
        types.clear()
        model(images().requires_grad_()).sum().backward()
        model.load_state_dict(model.state_dict())
        assert not any(seen[name] != 1 for name in seen)
        assert all(kinds == {type(model[0])} for kinds in types.values())
        return set(seen)

    assert used() == set(handles)
    report = ff.swap(model, CONVS, example=images())
    assert type(model[0]) is ff.nn.CoordConv2d
    gc.collect()
    assert used() == set(handles)
    for name in ("forward", "always", "pre", "backward", "state pre", "load"):
        handles.pop(name).remove()
    assert used() == set(handles)
    later = model[0].register_forward_hook(hook("later"))
    copied = copy.deepcopy(model)
    report.undo()
    assert model[0] is layer
    assert used() == {*handles, "later"}
    for handle in [later, *handles.values()]:
        handle.remove()
    assert used() == set()
    model = copied
    assert used() == {*handles, "later"}


def test_a_hook_before_loading_outlives_the_old_layer() -> None:
    model = conv_net()
    seen = []
    model[0].register_load_state_dict_pre_hook(lambda module, *_args: seen.append(type(module)))
    ff.swap(model, CONVS)
    gc.collect()
    model.load_state_dict(model.state_dict())
    assert seen == [ff.nn.CoordConv2d]


def test_hooks_of_a_new_layer_are_its_own() -> None:
    seen = []

    def recipe(layer: Any) -> nn.Module:
        new = same(layer)
        new.register_forward_hook(lambda *_: seen.append("new"))
        return new

    model = mlp(2, 2)
    handle = model[0].register_forward_hook(lambda *_: seen.append("old"))
    before = state_of(model)
    report = ff.swap(model, {nn.Linear: recipe})
    model(torch.ones(1, 2))
    assert seen == ["old", "new"]
    report.undo()
    assert_state(model, before)
    handle.remove()
    model(torch.ones(1, 2))
    assert seen == ["old", "new"]


def test_a_layer_around_the_old_one_leaves_it_its_hooks() -> None:
    model = mlp(2, 2)
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    old = model[0]
    report = ff.swap(model, {nn.Linear: Around}, example=torch.ones(3, 2))
    seen.clear()
    model(torch.ones(1, 2))
    assert seen == [1]
    assert report.certificate["0"].max_difference == 0
    assert list(model.state_dict()) == ["0.inner.weight", "0.inner.bias"]
    report.undo()
    assert model[0] is old


class Clipped(nn.Module):
    """A parametrization with a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(0.05))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.limit


PARAMETRIZE: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "custom": lambda layer: parametrize.register_parametrization(layer, "weight", Clipped()),
    "two": lambda layer: [
        parametrize.register_parametrization(layer, name, Clipped()) for name in ("weight", "bias", "weight")
    ],
}


@pytest.mark.parametrize("which", PARAMETRIZE)
def test_parametrised_layers_keep_their_parametrizations(which: str) -> None:
    plain = conv_net().double()
    PARAMETRIZE[which](plain[0])
    model = copy.deepcopy(plain)
    layer: Any = model[0]
    before = state_of(model)
    lists = dict(layer.parametrizations.items())
    x = images().double()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (plain, model)]
    report = ff.swap(model, CONVS)
    assert layer.parametrizations is not model[0].parametrizations
    assert parametrize.type_before_parametrizations(model[0]) is ff.nn.CoordConv2d
    assert {name: id(of_name) for name, of_name in model[0].parametrizations.items()} == {
        name: id(of_name) for name, of_name in lists.items()
    }
    assert [p.shape for p in report.new_parameters] == [model[0].coord_weight.shape, model[2].coord_weight.shape]
    assert "new: coord_weight [4, 2, 3, 3]" in str(report).splitlines()[0]
    # The steps of spectral norm are taken by training, not by swap.
    for name, of_name in lists.items():
        for key, value in of_name.state_dict().items():
            assert torch.equal(value, dict(before["values"])[f"0.parametrizations.{name}.{key}"])
    wanted, found = trained(plain, None, optimizers[0], x), trained(model, report, optimizers[1], x)
    assert all(close(a, b) for a, b in zip(wanted, found, strict=True))
    report.undo()
    assert model[0] is layer
    assert all(a is b for a, b in zip(layer.parametrizations.values(), lists.values(), strict=True))
    assert close(plain.eval()(x), model.eval()(x))


def test_parametrised_layers_and_a_recipe_that_copies() -> None:
    model = mlp(3, 3)
    parametrizations.weight_norm(model[0])
    message = (
        "swap: layer '0' (Linear) could not be swapped, and nothing has changed: its weight is parametrized, and the new layer "
        "keeps no such Parameter; call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
    )
    with pytest.raises(ValueError, match="parametrized") as caught:
        ff.swap(model, ff.recipes.supermask())
    assert str(caught.value) == message
    assert type(model[0]).__name__ == "ParametrizedLinear"
    parametrize.remove_parametrizations(model[0], "weight")
    assert ff.swap(model, ff.recipes.supermask()).names == ("0",)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (torch.nn.utils.weight_norm, "weight"),
        (torch.nn.utils.spectral_norm, "weight"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight"),
        (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), "bias"),
    ],
)
def test_weights_made_by_hooks_are_no_parameters(change: Callable[[nn.Module], Any], what: str) -> None:
    model = conv_net()
    with quiet():
        change(model[2])
    message = (
        f"swap: layer '2' (Conv2d) could not be swapped, and nothing has changed: CoordConv2d.from_conv: {what} of the Conv2d "
        "is not a Parameter; make pruning or weight norm permanent first (torch.nn.utils.prune.remove, remove_weight_norm)"
    )
    assert_refused(message, model, CONVS)
    assert ff.swap(model, CONVS, where="0").names == ("0",)


def test_pruning_goes_and_other_hooks_stay() -> None:
    model = mlp(4, 4)
    layer = model[0]
    seen = []
    first = layer.register_forward_pre_hook(lambda *_: seen.append("first"))
    prune.l1_unstructured(layer, "weight", 0.5)
    last = layer.register_forward_pre_hook(lambda *_: seen.append("last"))
    before = state_of(model)
    report = ff.swap(model, ff.recipes.masked(), example=torch.ones(3, 4))
    assert report.model_difference == 0
    seen.clear()
    model(torch.ones(1, 4))
    assert seen == ["first", "last"]
    report.undo()
    assert_state(model, before)
    report = ff.swap(model, ff.recipes.masked())
    first.remove()
    seen.clear()
    model(torch.ones(1, 4))
    assert seen == ["last"]
    with torch.no_grad():
        layer.weight_orig.fill_(3.0)
    report.undo()
    last.remove()
    seen.clear()
    model(torch.ones(1, 4))
    assert seen == []
    assert torch.equal(layer.weight, 3 * layer.weight_mask)  # pruning goes on


def test_a_tensor_of_somebodys_own() -> None:
    for put in ("register_buffer", "register_parameter", "add_module"):
        model = conv_net()
        extra: Any = {
            "register_buffer": torch.ones(2),
            "register_parameter": nn.Parameter(torch.ones(2)),
            "add_module": nn.Tanh(),
        }
        getattr(model[2], put)("mine", extra[put])
        message = (
            "swap: layer '2' (Conv2d) holds 'mine' beside what a Conv2d has, and its CoordConv2d would not; remove it first, "
            "or leave the layer out with where="
        )
        assert_refused(message, model, CONVS)
        assert ff.swap(model, {nn.Conv2d: Around}, where="2").names == ("2",)


def test_meta_models() -> None:
    plain = conv_net()
    model = copy.deepcopy(plain).to("meta")
    old = [model[0], model[2]]
    report = ff.swap(model, CONVS)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert str(report).splitlines()[0] == "0  Conv2d -> CoordConv2d  output not compared; new: coord_weight [4, 2, 3, 3]"
    model.to_empty(device="cpu")
    zeros = {f"{i}.coord_weight": torch.zeros_like(model[i].coord_weight) for i in (0, 2)}
    model.load_state_dict({**plain.state_dict(), **zeros})
    assert torch.equal(model(images()), plain(images()))
    report.undo()
    assert [model[0], model[2]] == old
    assert torch.equal(model(images()), plain(images()))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_the_default_device_and_dtype_are_no_matter() -> None:
    for recipes in (CONVS, ff.recipes.masked(), ff.recipes.supermask()):
        model, x = conv_net(), images()
        with torch.device("meta"):
            report = ff.swap(model, recipes, example=x)
        torch.set_default_dtype(F64)
        try:
            ff.swap(model, {type(model[2]): copy.deepcopy}, where="2")
        finally:
            torch.set_default_dtype(F32)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", F32)}
        assert "CKA" in str(report)


# ---- tied weights --------------------------------------------------------------------------------------------------------


def test_tied_weights() -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "middle": nn.Linear(3, 3), "head": nn.Linear(3, 5)})
        model["head"].weight = model["embedding"].weight
        return model

    model: Any = tied()
    ff.swap(model, LINEAR)
    assert model["head"].weight is model["embedding"].weight
    message = (
        "swap: weight of layer 'head' (Linear) is tied to 'embedding.weight', and its SupermaskLinear, which has parameters of "
        "its own, would not be; leave the layer out with where=, or untie it first"
    )
    with pytest.raises(ValueError, match="tied") as caught:
        ff.swap(model := tied(), ff.recipes.supermask())
    assert str(caught.value) == message
    assert [type(module) for module in model.values()] == [nn.Embedding, nn.Linear, nn.Linear]
    assert ff.swap(model, ff.recipes.supermask(), where="middle").names == ("middle",)


def test_weights_tied_across_two_swapped_layers() -> None:
    def tied() -> nn.Sequential:
        model = mlp(3, 3, 3)
        model[1].bias = model[0].bias
        model[1].weight = model[0].weight
        return model

    model = tied()
    report = ff.swap(model, LINEAR)
    assert model[0].weight is model[1].weight and model[0].bias is model[1].bias
    model.to(F64)
    report.undo()
    assert model[0].weight is model[1].weight and model[0].weight.dtype == F64
    message = (
        "swap: weight of layer '0' (Linear) is tied to '1.weight', and its Linear, which has parameters of its own, would not "
        "be; leave the layer out with where=, or untie it first"
    )
    assert_refused(message, tied(), {nn.Linear: copy.deepcopy})
    assert ff.swap(tied(), {nn.Linear: Around}, example=torch.ones(2, 3)).model_difference == 0


# ---- all or none ---------------------------------------------------------------------------------------------------------


def rich_model() -> nn.Sequential:
    """Hooks, modes, a parametrization, a pruned layer, a shared one."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Dropout(), nn.Linear(4, 4), shared, nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *_: None)
    model[3].register_load_state_dict_pre_hook(lambda *_: None)
    model[3].register_forward_pre_hook(lambda *_: None)
    prune.l1_unstructured(model[3], "weight", 0.5)
    model(torch.ones(1, 4)).sum().backward()
    parametrizations.spectral_norm(model[5])
    model[1].eval()
    return model


def on_last(recipe: Callable[[Any], Any]) -> dict[type[nn.Module], Any]:
    """ff.recipes.masked(), but for the sixth layer."""
    masked = ff.recipes.masked()[nn.Linear]
    calls = []

    def either(layer: Any) -> Any:
        calls.append(layer)
        return masked(layer) if len(calls) < 5 else recipe(layer)

    return {nn.Linear: either}


def raises(error: BaseException) -> Callable[..., Any]:
    def recipe(*_args: Any) -> Any:
        raise error

    return recipe


def test_nothing_has_changed_when_the_last_recipe_fails() -> None:
    def resized(layer: Any) -> nn.Module:
        return nn.Linear(4, 5)

    def halved(layer: Any) -> nn.Module:
        return Runs(lambda self, x: self.inner(x).half(), inner=layer)

    failed = "swap: layer '6' (Linear) could not be swapped, and nothing has changed: no luck"
    fails = "swap: the new Linear of layer '6' (Linear) fails on a random input [2, 4]: RuntimeError: "
    not_kept = "a recipe must keep shape and dtype"
    gave = "swap: layer '6' (Linear) gave (2, 4) float32, and its new layer gives"
    cases: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
        (raises(RuntimeError("no luck")), ValueError, failed),
        (
            lambda _: None,
            TypeError,
            "swap: the recipe for layer '6' (Linear) must return a torch.nn.Module or Left, got NoneType",
        ),
        (resized, ValueError, f"{gave} (2, 5) float32; {not_kept}"),
        (halved, ValueError, f"{gave} (2, 4) float16; {not_kept}"),
        (
            lambda _: nn.Linear(3, 4),
            ValueError,
            fails,
        ),
    ]
    for recipe, error, message in cases:
        torch.manual_seed(0)
        model = rich_model()
        rng = torch.get_rng_state()
        before = state_of(model)
        with pytest.raises(error) as caught:
            ff.swap(model, on_last(recipe), example=torch.ones(3, 4))
        assert str(caught.value).startswith(message)
        assert message == fails or str(caught.value) == message
        if recipe is resized or message == fails:
            torch.set_rng_state(rng)  # that recipe has drawn
        assert_state(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory")])
@pytest.mark.parametrize("run", [1, 2])
def test_nothing_has_changed_when_the_example_fails(error: BaseException, run: int) -> None:
    model = rich_model()
    calls = []

    def fails(*_args: Any) -> None:
        calls.append(1)
        if len(calls) == run:
            raise error

    model[6].register_forward_hook(fails)
    before = state_of(model)
    when = ("before any layer was swapped", "with its new layers")[run - 1]
    message = (
        "" if isinstance(error, KeyboardInterrupt) else f"swap: the model fails on the example, {when}: RuntimeError: no memory"
    )
    with pytest.raises(KeyboardInterrupt if not message else ValueError) as caught:
        ff.swap(model, ff.recipes.masked(), example=torch.ones(3, 4))
    assert str(caught.value) == message
    assert len(calls) == run
    assert_state(model, before)


def test_swap_and_undo_leave_no_trace() -> None:
    model = rich_model()
    before = state_of(model)
    report = ff.swap(model, ff.recipes.masked(), example=torch.ones(3, 4))
    assert report.names == ("0", "1", "3", "5", "6")
    assert torch.equal(torch.get_rng_state(), before["rng"])
    report.undo()
    assert_state(model, before)


# ---- the output ----------------------------------------------------------------------------------------------------------


def test_a_change_of_output_must_be_asked_for() -> None:
    model = conv_net()
    fused = {nn.Conv2d: lambda conv: ff.nn.CoordConv2d.from_conv(conv, activation="relu")}
    with pytest.raises(ValueError, match="changes what it computes") as caught:
        ff.swap(model, fused, where="2")
    found = str(caught.value)
    assert found.startswith("swap: the recipe for layer '2' (Conv2d) changes what it computes, by ")
    assert found.endswith("; pass change_output=True if that is meant (see docs/swapping.md#what-is-checked)")
    assert type(model[2]) is nn.Conv2d
    report = ff.swap(model, fused, where="2", change_output=True)
    assert "max difference" in str(report)
    marked: Any = functools.partial(doubled)
    marked.changes_output = True
    assert ff.swap(mlp(2, 2), {nn.Linear: marked}).names == ("0",)
    # Of the layers of one type alone.
    with pytest.raises(ValueError, match="'0' \\(Conv1d\\) changes"):
        ff.swap(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2)), {nn.Linear: marked, nn.Conv1d: doubled})


def test_a_change_that_a_random_input_does_not_show() -> None:
    """A fused ReLU behind a bias so large that nothing is cut off."""
    conv = nn.Conv2d(3, 4, 1)
    nn.init.constant_(conv.bias, 100.0)  # type: ignore[arg-type]
    model = nn.Sequential(conv)
    fused = {nn.Conv2d: lambda conv: ff.nn.CoordConv2d.from_conv(conv, activation="relu")}
    with pytest.raises(ValueError, match=r"layer '0' \(Conv2d\) changes what it computes, by .* on the example"):
        ff.swap(model, fused, example=torch.full((1, 3, 2, 2), -1e4) * conv.weight.sum().sign().detach())
    assert model[0] is conv


def test_calls_that_follow_from_the_output() -> None:
    """As those of experts: more or less of them are no error where outputs may change."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.few, self.many = nn.Linear(2, 1), nn.Linear(2, 2), nn.Linear(2, 2)
            nn.init.constant_(self.gate.weight, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            expert = self.many if float(self.gate(x).detach().sum()) > 0 else self.few
            return cast("Tensor", expert(x))

    def negated(linear: nn.Linear) -> nn.Linear:
        new = copy.deepcopy(linear)
        nn.init.constant_(new.weight, -1.0)
        return new

    with pytest.warns(UserWarning, match="the example does not run layer 'few'; if a parent reads its weight"):
        report = ff.swap(Experts(), {nn.Linear: negated}, example=torch.full((3, 2), 9.0), change_output=True)
    assert list(report.certificate) == ["gate"]


def test_a_change_that_only_the_example_shows() -> None:
    model = nn.Sequential(Scale(2.0), nn.ReLU())
    message = (
        "swap: the recipe for layer '0' (Scale) changes what it computes, by 3 on the example; pass change_output=True if that "
        "is meant"
    )
    assert_refused(message, model, {Scale: lambda _: Scale(3.0)}, example=torch.tensor([[1.0, 3.0]]))
    report = ff.swap(model, {Scale: lambda _: Scale(3.0)}, example=torch.tensor([[1.0, 3.0]]), change_output=True)
    assert report.certificate["0"].max_difference == report.model_difference == 3
    assert str(report) == "0  Scale -> Scale  max difference 3; new: scale []"
    # Without an example nobody can tell, and the report says so.
    report = ff.swap(nn.Sequential(Scale(2.0)), {Scale: lambda _: Scale(3.0)})
    assert str(report) == "0  Scale -> Scale  output not compared; new: scale []"


CONV_LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"),
    lambda: nn.Conv2d(2, 4, 3, padding=2, padding_mode="reflect", groups=2),
    lambda: nn.Conv2d(2, 3, (3, 1), padding=(1, 0), padding_mode="circular", stride=2),
    lambda: nn.Conv2d(2, 3, 5, padding=2, padding_mode="replicate", dilation=3),
    lambda: nn.Conv2d(2, 3, 3, padding=40),
    lambda: nn.Conv2d(2, 3, 4, padding="same", dilation=5),
    lambda: nn.Conv2d(2, 3, 3, padding="valid", bias=False),
    lambda: nn.Conv2d(1, 1, 1, dilation=99),
    lambda: nn.Conv3d(2, 2, 2, stride=3, padding=1),
    lambda: nn.ConvTranspose2d(2, 2, 3, stride=3, padding=1, output_padding=2),
    lambda: nn.ConvTranspose2d(2, 2, 3, padding=7),
    lambda: nn.ConvTranspose2d(4, 2, 2, groups=2, dilation=4),
]


@pytest.mark.parametrize("build", CONV_LAYERS)
def test_every_convolution_finds_an_input(build: Callable[[], nn.Module]) -> None:
    def shifted(layer: Any) -> nn.Module:
        new = copy.deepcopy(layer)
        new.register_parameter("bias", nn.Parameter(torch.full((new.out_channels,), 3.0)))
        return new

    with quiet():  # torch warns of parameters without elements, and of an uneven "same"
        model = nn.Sequential(build())
        assert "output unchanged on a random input" in str(ff.swap(model, CONVS))
        model = nn.Sequential(build())
        with pytest.raises(ValueError, match=r"changes what it computes, by .* on a random input"):
            ff.swap(model, {type(model[0]): shifted})


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("k", [4096, 3])
def test_rounding_is_no_change(dtype: torch.dtype, k: int) -> None:
    for form in ("bitmap", "csr16", "slab"):
        model = nn.Sequential(nn.Linear(k, 16)).to(dtype)
        prune.l1_unstructured(model[0], "weight", 0.3)
        report = ff.swap(model, ff.recipes.compress(format=form), example=torch.randn(3, k).to(dtype))
        assert type(model[0]) is ff.nn.SparseLinear
        size = report.certificate["0"].max_difference
        assert size < 16 * torch.finfo(dtype).eps
        with pytest.raises(ValueError, match="changes what it computes"):
            ff.swap(nn.Sequential(nn.Linear(k, 16)).to(dtype), {nn.Linear: nudged})


def nudged(layer: Any) -> nn.Module:
    """By a little more than rounding."""
    new = copy.deepcopy(layer)
    with torch.no_grad():
        new.bias.add_(20 * max(torch.finfo(new.bias.dtype).eps, 1e-4))
    return new


def test_layers_with_nothing_or_nonsense_in_them() -> None:
    with quiet():
        model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 0))
        report = ff.swap(model, LINEAR, example=torch.ones(2, 0))
        assert str(report) == "0  Linear -> MaskedLinear  output unchanged\n1  Linear -> MaskedLinear  output unchanged"
        model = nn.Sequential(nn.Conv2d(0, 3, 3))
        assert "CoordConv2d  output unchanged on a random input" in str(ff.swap(model, CONVS))
    for rows in (1, 2):  # between so few the CKA says nothing: of two it is always 1
        report = ff.swap(mlp(3, 3), LINEAR, example=torch.rand(rows, 3))
        assert math.isnan(report.certificate["0"].cka) and "CKA" not in str(report)
    for value in (math.nan, math.inf):
        model = mlp(3, 3, 3)
        with torch.no_grad():
            model[0].weight[1, 1] = value
        report = ff.swap(model, LINEAR, where="0", example=torch.ones(2, 3))
        assert report.certificate["0"].max_difference == 0 and math.isnan(report.certificate["0"].cka)
        model = mlp(3, 3)
        with torch.no_grad():
            model[0].weight[1, 1] = value
        with pytest.raises(ValueError, match="changes what it computes"):
            ff.swap(model, {nn.Linear: lambda layer: nn.Linear(3, 3)})


def test_layers_that_cannot_be_tried() -> None:
    """In a dtype that torch does not multiply in, none is compared, and the report says so."""
    with quiet():
        model = mlp(3, 3).to(torch.complex64)
    assert str(ff.swap(model, {nn.Linear: Around})) == "0  Linear -> Around  output not compared"
    with quiet():
        model = nn.Sequential(nn.Conv2d(3, 0, 3))
    assert str(ff.swap(model, {nn.Conv2d: Around})) == "0  Conv2d -> Around  output not compared"


# ---- an example ----------------------------------------------------------------------------------------------------------


def outputs_of(model: nn.Module, names: list[str], *args: Any) -> dict[str, list[Tensor]]:
    """Of each call, copied where they arise."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    model = copy.deepcopy(model).eval()
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: found[name].append(out.clone()))
    with torch.no_grad():
        model(*args)
    return found


#: A model, what changes a layer of it, and how an output becomes rows.
MEASURED: dict[str, Any] = {
    "conv2d": (conv_net, nn.Conv2d, (2, 3, 9, 9), lambda x: x.movedim(1, -1).flatten(0, -2)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 5, 2), nn.ReLU(inplace=True), nn.Conv1d(5, 2, 2)),
        nn.Conv1d,
        (3, 2, 9),
        lambda x: x.movedim(1, -1).flatten(0, -2),
    ),
    "unbatched": (lambda: nn.Sequential(nn.Conv2d(2, 5, 1)), nn.Conv2d, (2, 3, 4), lambda x: x.flatten(0, -2)),
    "linear": (lambda: mlp(3, 4, 2), nn.Linear, (7, 3), lambda x: x),
    "tokens": (lambda: mlp(3, 4, 2), nn.Linear, (2, 5, 3), lambda x: x.flatten(0, -2)),
    "channels last": (lambda: mlp(3, 4, 2), nn.Linear, (2, 5, 4, 3), lambda x: x.flatten(0, -2)),
    "wide": (lambda: mlp(9, 3000), nn.Linear, (5, 9), lambda x: x),
    "twice": (
        lambda: Runs(lambda self, x: self.a(self.a(x)[:, :2].relu_()), a=nn.Linear(3, 3)),
        nn.Linear,
        (2, 3, 3),
        lambda x: x.flatten(0, -2),
    ),
}


@pytest.mark.parametrize("which", MEASURED)
def test_certificates_are_those_of_all_outputs_at_once(which: str) -> None:
    build, kind, shape, rows = MEASURED[which]
    model = build()
    x = torch.randn(shape)

    def noisy(layer: Any) -> nn.Module:
        new = copy.deepcopy(layer)
        with torch.no_grad():
            new.weight.add_(0.3 * torch.randn(new.weight.shape, generator=torch.Generator().manual_seed(3)))
        return new

    names = [name for name, module in model.named_modules() if type(module) is kind]
    before = outputs_of(model, [*names, ""], x)
    report = ff.swap(model, {kind: noisy}, example=x, change_output=True)
    after = outputs_of(model, [*names, ""], x)
    assert list(report.certificate) == names
    for name in names:
        old, new = (torch.cat([rows(each) for each in side[name]]) for side in (before, after))
        found = report.certificate[name]
        assert found.max_difference == (old.double() - new.double()).abs().max().item() > 0
        assert abs(found.cka - ff.cka(old.double(), new.double()).item()) < 1e-5
        assert found.cka < 0.9999
        assert f"max difference {found.max_difference:.3g}, CKA {found.cka:.6f}" in str(report)
    assert report.model_difference == (before[""][0].double() - after[""][0].double()).abs().max().item()


def test_examples_are_tensors_tuples_or_dicts() -> None:
    def forward(self: Any, x: Tensor, *, twice: bool = False, extra: Any = None) -> Tensor:
        assert self.training is False and not torch.is_grad_enabled()
        x = x if extra is None else x + extra["more"][0]
        return self.a(x) * (2 if twice else 1)

    ones = torch.ones(2, 3)
    examples: list[Any] = [ones, (ones,), [ones], {"x": ones}, {"x": ones, "twice": True}]
    examples += [collections.OrderedDict(x=ones, extra={"more": (ones, None)})]
    for example in examples:
        model = Runs(forward, a=nn.Linear(3, 3))
        report = ff.swap(model, LINEAR, example=example)
        assert report.certificate["a"].max_difference == 0
        assert model.training


def test_an_example_is_not_written_into() -> None:
    model = Runs(lambda self, x, more: self.a(x.sub_(1)) + more["y"].add_(1), a=nn.Linear(3, 3))
    x, y = torch.zeros(2, 3), torch.zeros(2, 3)
    report = ff.swap(model, LINEAR, example=(x, {"y": y}))
    assert report.model_difference == 0 and report.certificate["a"].max_difference == 0
    assert not x.any() and not y.any()


def test_layers_that_do_not_run_and_outputs_without_tensors() -> None:
    class Box:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    model = Runs(
        lambda self, x: Box(self.a(self.b(x).x)),
        a=nn.Linear(3, 3),
        b=Scale(1.0, lambda x, _scale: Box(x)),
        c=nn.Linear(3, 3),
    )
    with pytest.warns(UserWarning, match="the example does not run layer 'c'; if a parent reads its weight and never calls it"):
        report = ff.swap(model, {**LINEAR, Scale: copy.deepcopy}, example=torch.ones(2, 3))
    assert list(report.certificate) == ["a"]
    assert report.model_difference is None
    assert str(report).splitlines() == [
        "a  Linear -> MaskedLinear  output unchanged",
        "b  Scale -> Scale          output not compared; new: scale []",
        "c  Linear -> MaskedLinear  not run by the example",
    ]


@pytest.mark.parametrize("form", [tuple, list, dict])
def test_outputs_in_tuples_lists_and_dicts(form: Any) -> None:
    def several(x: Tensor, scale: Tensor) -> Any:
        parts = {"a": x * scale, "b": (x + scale, [x.long()]), "c": None}
        return parts if form is dict else form(parts.values())

    model = nn.Sequential(Scale(1.0, several))
    recipes = {Scale: lambda old: Scale(old.scale.item() + 0.25, several)}
    report = ff.swap(model, recipes, example=torch.tensor([[1.0, 2.0], [3.0, 9.0]]), change_output=True)
    assert report.certificate["0"].max_difference == report.model_difference == 2.25
    fewer = Scale(1.0, lambda x, _scale: (x,))
    with pytest.raises(ValueError, match=r"layer '0' gave .* and its new layer gives \(2, 2\) float32; a recipe must keep"):
        ff.swap(model, {Scale: lambda _: fewer}, example=torch.ones(2, 2), change_output=True)


def test_random_models_draw_the_same_numbers() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a(nn.functional.dropout(x, 0.5) + torch.rand_like(x)) + torch.rand(3)

    model = Runs(forward, a=nn.Linear(3, 3), drop=nn.Dropout())
    rng = torch.get_rng_state()
    report = ff.swap(model, LINEAR, example=torch.ones(4, 3))
    assert report.model_difference == report.certificate["a"].max_difference == 0
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_layer_that_is_called_behind_the_models_back() -> None:
    def build() -> Runs:
        model = Runs(lambda self, x: self.layers[0](x), a=nn.Linear(3, 3))
        model.layers = [model.a]
        return model

    message = (
        "swap: the model still calls the old layer 'a', by a reference that is not a submodule, so a new layer there would do "
        "nothing; leave it out with where="
    )
    assert_refused(message, build(), LINEAR, example=torch.ones(2, 3))
    hooked = build()
    hooked.a.register_forward_hook(lambda *_: None)
    assert_refused(message, hooked, LINEAR, example=torch.ones(2, 3))


def test_examples_that_show_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    gelu: Any = {nn.ReLU: lambda _: nn.GELU()}
    message = "swap: layer '1' gives no finite number for the example, so nothing can be compared; take others"
    assert_refused(message, model, gelu, example=torch.full((2, 3), math.nan))
    message = "swap: example must hold samples, got [(0, 3)]; nothing would be compared"
    assert_refused(message, model, gelu, example=torch.ones(0, 3))


def test_buffers_that_a_model_writes_are_put_back() -> None:
    """In place or by another tensor; both runs begin with the same."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.count += 1
        self.last = self.count * x.detach().mean()
        return cast("Tensor", self.a(x) * self.count)

    model = Runs(forward, a=nn.Linear(3, 3))
    model.register_buffer("count", torch.zeros(()))
    model.register_buffer("last", torch.zeros(()))
    count, last = model.count, model.last
    report = ff.swap(model, LINEAR, example=torch.ones(2, 3))
    assert report.model_difference == 0
    assert model.count is count and model.last is last
    assert float(count) == float(last) == 0


def test_recipes_that_share_or_write() -> None:
    one = nn.Linear(3, 3)
    gave = "gave a module that is also"
    message = f"swap: the recipe for layer '1' (Linear) {gave} that for layer '0' (Linear); make a new one for each"
    assert_refused(message, mlp(3, 3, 3), {nn.Linear: lambda _: one}, change_output=True, where=["0", "1"])
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity())
    message = f"swap: the recipe for layer '0' (Linear) {gave} the model's '1'; make a new one for each"
    assert_refused(message, model, {nn.Linear: lambda _: model[1]}, change_output=True)

    def writes(linear: nn.Linear) -> nn.Linear:
        with torch.no_grad():
            linear.weight.mul_(1)
        return copy.deepcopy(linear)

    message = (
        "swap: the recipe for layer '0' (Linear) writes into the layer's own tensors, which is not taken back; let it copy "
        "what it changes"
    )
    assert_refused(message, model, {nn.Linear: writes})


def test_arguments_that_are_not_what_they_should_be() -> None:
    model = conv_net()
    cases: list[tuple[str, dict[str, Any]]] = [
        (
            "swap: the recipe for Conv2d must be a function of the layer, got the class CoordConv2d; pass CoordConv2d.",
            {"recipes": {nn.Conv2d: ff.nn.CoordConv2d}},
        ),
        ("swap: change_output must be a bool, got 'yes'", {"recipes": CONVS, "change_output": "yes"}),
        ("swap: where must be a glob, a list of globs or a function", {"recipes": CONVS, "where": nn.Conv2d}),
        (
            "swap: where must be a function (name, module) -> bool; called so, it raised",
            {"recipes": CONVS, "where": lambda n: n},
        ),
    ]
    for message, arguments in cases:
        with pytest.raises(TypeError) as caught:
            ff.swap(model, **arguments)
        assert str(caught.value).startswith(message)
    with torch.inference_mode(), pytest.raises(ValueError, match="new parameters made in torch"):
        ff.swap(model, CONVS)


def test_a_layer_that_is_read_and_never_called() -> None:
    """A weight of its own that is used; not one that is looked at, nor one that another layer uses."""
    read = Runs(lambda self, x: nn.functional.linear(self.b(x), self.a.weight), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    message = (
        "swap: the model reads the weight of layer 'a' and never calls it, so a new layer there would do nothing; leave it out "
        "with where="
    )
    assert_refused(message, read, LINEAR, example=torch.ones(2, 3))
    ff.swap(read, LINEAR, where="b", example=torch.ones(2, 3))
    looked_at = Runs(lambda self, x: self.b(x.to(self.a.weight.dtype)), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="does not run layer 'a'"):
        ff.swap(looked_at, LINEAR, example=torch.ones(2, 3))
    tied = Runs(lambda self, x: self.b(x), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    tied.a.weight = tied.b.weight
    with pytest.warns(UserWarning, match="does not run layer 'a'"):
        ff.swap(tied, LINEAR, example=torch.ones(2, 3))


def test_calls_that_the_new_layer_gets_too_few_of() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a(x) if type(self.a) is nn.Linear else x

    model = Runs(forward, a=nn.Linear(3, 3))
    message = "swap: layer 'a' is called less often than before it was swapped"
    assert_refused(message, model, LINEAR, example=torch.ones(2, 3))


# ---- what cannot be swapped ----------------------------------------------------------------------------------------------


def test_compiled_models() -> None:
    how = "is compiled by torch.compile, which may not notice new layers"
    inner, fresh = "swap in its _orig_mod, then compile", "swap in a model that was not compiled yet, then compile"
    assert_refused(f"swap: the model {how}; {inner}", torch.compile(conv_net()), CONVS)
    model = conv_net()
    model[1] = torch.compile(model[1])
    assert_refused(f"swap: module '1' {how}; {inner}", model, CONVS)
    model = conv_net()
    model.compile()
    assert_refused(f"swap: the model {how}; {fresh}", model, CONVS)
    model = nn.Sequential(conv_net())
    model[0][2].compile()
    assert_refused(f"swap: module '0.2' {how}; {fresh}", model, CONVS)


def test_models_whose_code_is_fixed() -> None:
    with quiet():
        models = [torch.jit.script(conv_net()), torch.jit.trace(conv_net(), images())]
        part = nn.Sequential(models[0])
    for model in models:
        with pytest.raises(
            ValueError, match="the model is a TorchScript module, whose code is fixed; swap in the model it was"
        ):
            ff.swap(model, CONVS)
    with pytest.raises(ValueError, match="module '0' is a TorchScript module"):
        ff.swap(part, CONVS)


def test_data_parallel() -> None:
    knows = "which knows the parameters of the old layers alone; swap before it is wrapped"
    assert_refused(f"swap: the model is wrapped in DataParallel, {knows}", nn.DataParallel(conv_net()), CONVS)
    assert_refused(f"swap: module '0' is wrapped in DataParallel, {knows}", nn.Sequential(nn.DataParallel(conv_net())), CONVS)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of this process."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore")  # torch's about CPUs and its own older classes
def test_distributed_models() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    knows = "which knows the parameters of the old layers alone"
    wrapped = nn.parallel.DistributedDataParallel(mlp(4, 4))
    assert_refused(
        f"swap: the model is wrapped in DistributedDataParallel, {knows}; swap before it is wrapped", wrapped, LINEAR
    )
    mesh = init_device_mesh("cpu", (1,))
    sharded = mlp(4, 4, 4)
    fully_shard(sharded[1], mesh=mesh)
    assert_refused(f"swap: module '1' is sharded by FSDP, {knows}; swap before it is sharded", sharded, LINEAR)
    older = FullyShardedDataParallel(mlp(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=f"the model is sharded by FSDP, {knows}; swap before it is sharded"):
        ff.swap(older, LINEAR)
    parallel = mlp(4, 4, 4)
    parallelize_module(parallel, mesh, {"1": ColwiseParallel()})
    message = "swap: weight of layer '1' (Linear) is a DTensor; swap in the model before it is sharded"
    with pytest.raises(ValueError, match="DTensor") as caught:
        ff.swap(parallel, LINEAR)
    assert str(caught.value) == message
    assert ff.swap(parallel, LINEAR, where="0").names == ("0",)


def test_lazy_layers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        models = [nn.Sequential(nn.Linear(2, 2), layer) for layer in (nn.LazyLinear(2), nn.LazyConv2d(2, 1))]
    for model, recipes, name in ((models[0], LINEAR, "LazyLinear"), (models[1], {**CONVS, **LINEAR}, "LazyConv2d")):
        message = f"swap: layer '1' ({name}) is lazy and has no weight yet; run the model once on an input first"
        for options in ({}, {"where": "*"}, {"where": "1"}):
            with pytest.raises(ValueError, match="lazy") as caught:
                ff.swap(model, recipes, **options)
            assert str(caught.value) == message
        with pytest.raises(ValueError, match="lazy") as caught:
            ff.swap(model, {type(model[1]): same})
        assert str(caught.value) == message
        assert ff.swap(model, LINEAR, where="0").names == ("0",)
    models[0](torch.ones(1, 2))
    assert ff.swap(models[0], LINEAR).names == ("1",)


def test_quantised_layers() -> None:
    from torch.ao.nn.quantized import Linear as QuantisedLinear

    with quiet():
        dynamic = torch.ao.quantization.quantize_dynamic(mlp(4, 4, 4), {"0"}, torch.qint8)
        static = nn.Sequential(nn.Linear(4, 4), QuantisedLinear(4, 4))
    message = "swap: layer {!r} (Linear) is quantised; swap in the model before it is quantised"
    for model, name in ((dynamic, "0"), (static, "1")):
        for options in ({}, {"where": name}, {"where": "*"}):
            with quiet(), pytest.raises(ValueError, match="quantised") as caught:
                ff.swap(model, LINEAR, **options)
            assert str(caught.value) == message.format(name)
    with quiet(), pytest.raises(ValueError, match="quantised") as caught:
        ff.swap(static, {QuantisedLinear: same})
    assert str(caught.value) == message.format("1")
    model = mlp(4, 4)
    model[0].register_buffer("weight_scale", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    with (
        quiet(),
        pytest.raises(ValueError, match="weight_scale of layer '0' \\(Linear\\) is quantised; swap in the model as"),
    ):
        ff.swap(model, LINEAR)


class Strange(Tensor):
    """Some other library's weights."""


def test_weights_of_another_class() -> None:
    model = mlp(4, 4)
    model[0].weight = nn.Parameter(torch.ones(4, 4).as_subclass(Strange))
    message = "swap: weight of layer '0' (Linear) is a Strange; swap in the model as it was before that"
    with pytest.raises(ValueError, match="Strange") as caught:
        ff.swap(model, LINEAR)
    assert str(caught.value) == message


def test_a_forward_of_one_object() -> None:
    model = mlp(3, 3)
    model[0].forward = model[0].forward
    message = (
        "swap: layer '0' (Linear) has a forward of its own, put on this one object (as offloading hooks do), which the new "
        "layer would not have; remove it first"
    )
    assert_refused(message, model, LINEAR)


def test_attention_never_calls_its_projection() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    message = (
        "swap: layer '0.out_proj' (NonDynamicallyQuantizableLinear) is read, and never called, by its MultiheadAttention, so a "
        "new layer would do nothing; leave it out with where=lambda name, layer: not name.endswith('out_proj')"
    )
    assert_refused(message, model, LINEAR)
    kind = type(model[0].out_proj)
    assert_refused(message, model, {kind: same})
    assert ff.swap(model, LINEAR, where=lambda name, _layer: not name.endswith("out_proj")).names == ("1",)


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_encoder_layers_that_have_a_fast_path() -> None:
    def calls_linear1(layer: Any) -> bool:
        """Whether it is run in inference, where nothing but the layer itself is hooked."""
        seen = []
        own = layer.linear1.forward
        layer.linear1.forward = lambda x: (seen.append(1), own(x))[1]
        try:
            with torch.no_grad():
                layer(torch.ones(2, 3, 8))
        finally:
            del layer.linear1.forward
        return bool(seen)

    message = (
        "swap: layer 'linear1' (Linear) is read, and not called, by its TransformerEncoderLayer's fast path in inference, so a "
        "new layer would do nothing there; call torch.backends.mha.set_fastpath_enabled(False) first, or leave it out with "
        "where="
    )
    fast: list[Any] = [{}, {"norm_first": True}, {"activation": "gelu"}]
    slow: list[Any] = [{"batch_first": False}, {"activation": torch.tanh}, {"bias": False}, {"nhead": 1}]
    for options in [*fast, *slow]:
        layer = nn.TransformerEncoderLayer(**{"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True, **options})
        layer.eval()
        assert calls_linear1(layer) == (options in slow)
        if calls_linear1(layer):
            assert ff.swap(layer, LINEAR, where="linear*").names == ("linear1", "linear2")
        else:
            assert_refused(message, layer, LINEAR, where="linear*")
            with without_fast_path():
                assert calls_linear1(layer)
                report = ff.swap(layer, LINEAR, where="linear*", example=torch.ones(2, 3, 8))
            assert report.names == ("linear1", "linear2") and list(report.certificate) == ["linear1", "linear2"]


# ---- undo ----------------------------------------------------------------------------------------------------------------


def test_undo_gives_back_the_same_objects_in_the_present_state() -> None:
    model = conv_net()
    before = state_of(model)
    keys = list(model.state_dict())
    report = ff.swap(model, CONVS)
    assert list(model.state_dict()) != keys
    report.undo()
    assert_state(model, before)
    assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="swap: this swap has been undone already"):
        report.undo()
    assert_state(model, before)


@pytest.mark.parametrize("recipe", ["shares", "copies"])
@pytest.mark.parametrize("move", ["half", "double", "overwritten"])
def test_undo_after_a_move(recipe: str, move: str) -> None:
    model = mlp(3, 3)
    layer = model[0]
    weight = layer.weight.detach().clone()
    report = ff.swap(model, LINEAR if recipe == "shares" else ff.recipes.supermask())
    if move == "overwritten":
        torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.half() if move == "half" else model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    bias = model[0].bias
    report.undo()
    assert model[0] is layer
    assert {p.dtype for p in layer.parameters()} == {F16 if move == "half" else F64}
    assert layer.bias is bias
    assert torch.equal(layer.weight, weight.to(layer.weight.dtype))


def test_undo_in_the_order_of_swaps() -> None:
    model = mlp(3, 3, 3)
    before = state_of(model)
    first = ff.swap(model, LINEAR)
    second = ff.swap(model, ff.recipes.plain(), where="1")
    between = state_of(model)
    message = "swap: in the place of layer '1' (Linear) stands another module than swap put there; undo later changes first"
    with pytest.raises(ValueError, match="stands another") as caught:
        first.undo()
    assert str(caught.value) == message
    assert_state(model, between)
    second.undo()
    first.undo()
    assert_state(model, before)


@pytest.mark.parametrize("change", [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), parametrizations.weight_norm])
def test_undo_when_a_shared_parameter_is_gone(change: Callable[[nn.Module], Any]) -> None:
    model = conv_net()
    report = ff.swap(model, CONVS)
    change(model[2])
    message = (
        "swap: weight in the place of layer '2' (Conv2d) is no longer a Parameter of the new layer, which was pruned or "
        "reparametrised since; remove that first"
    )
    now = list(model)
    with pytest.raises(ValueError, match="no longer") as caught:
        report.undo()
    assert str(caught.value) == message
    assert all(a is b for a, b in zip(model, now, strict=True))
    if parametrize.is_parametrized(model[2]):
        parametrize.remove_parametrizations(model[2], "weight")
    else:
        prune.remove(model[2], "weight")
    weight = model[2].weight
    report.undo()
    assert type(model[2]) is nn.Conv2d and model[2].weight is weight


def test_copies_files_and_checkpointing_of_swapped_models() -> None:
    model = conv_net()
    report = ff.swap(model, CONVS)
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    wanted = model(images())
    report.undo()
    assert type(model[0]) is nn.Conv2d
    for other in (copied, pickled):
        assert type(other[0]) is ff.nn.CoordConv2d
        assert other[0].weight is not model[0].weight
        assert torch.equal(other(images()), wanted)
    again = conv_net()
    ff.swap(again, CONVS)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(checkpoint(again, images(), use_reentrant=False), wanted)


# ---- the report ----------------------------------------------------------------------------------------------------------


def test_a_printed_report_word_for_word() -> None:
    model = nn.Sequential(
        collections.OrderedDict(stem=nn.Conv2d(3, 4, 3), block=nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)))
    )
    model.block[1].requires_grad_(False)

    def recipe(conv: Any) -> Any:
        return ff.swapping.Left("too small") if conv is model.block[0] else ff.nn.CoordConv2d.from_conv(conv, with_r=True)

    report = ff.swap(model, {nn.Conv2d: recipe}, example=images())
    assert str(report).splitlines() == [
        "stem     Conv2d -> CoordConv2d  output unchanged, CKA 1.000000; new: coord_weight [4, 3, 3, 3]",
        "block.1  Conv2d -> CoordConv2d  output unchanged, CKA 1.000000; new: coord_weight [4, 3, 1, 1] frozen",
        "block.0  left as it is          too small",
    ]
    assert repr(report) == "SwapReport(2 swapped, 1 left, 2 new parameters)"
    report.undo()
    report = ff.swap(model, {nn.Conv2d: lambda conv: conv})
    assert report.names == ()
    assert str(report).splitlines() == [
        "stem     left as it is  its recipe gave it back",
        "block.0  left as it is  its recipe gave it back",
        "block.1  left as it is  its recipe gave it back",
    ]


@pytest.mark.parametrize("watched", [True, False])
def test_a_bar_for_those_who_watch(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return watched

    pytest.importorskip("tqdm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    ff.swap(mlp(2, 2, 2), LINEAR)
    assert ("2/2" in screen.getvalue() and "swap" in screen.getvalue()) == watched
