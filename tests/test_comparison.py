"""compare: what it measures, what it is given, what it leaves behind, and what it refuses. Globs over module names."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import io
import itertools
import pickle
import random
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fourfold.comparison
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fourfold._globs import matching_names
from fourfold.comparison import Comparison, compare
from fourfold.ops.cca_dft import dft_cca
from torch import Tensor, nn

TOLERANCE = 1e-9


def assert_refused(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    """Word for word."""
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


# ---- models and data -----------------------------------------------------------------------------------------------------


def conv_net(width: int = 8, inplace: bool = True) -> nn.Sequential:
    """Grids of 8 x 8 and 4 x 4, then [n, d]; what follows a layer overwrites its output."""
    return nn.Sequential(
        collections.OrderedDict(
            conv1=nn.Conv2d(3, width, 3, padding=1),
            norm=nn.BatchNorm2d(width),
            relu1=nn.ReLU(inplace),
            conv2=nn.Conv2d(width, 6, 3, stride=2, padding=1),
            relu2=nn.ReLU(inplace),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(6, 5),
        )
    )


def mlp(*widths: int) -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh())))


def images(*sizes: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 8, 8, generator=generator) for n in sizes]


def vectors(*sizes: int, d: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, d, generator=generator) for n in sizes]


class Named(nn.Module):
    """A model whose forward is the function given, over modules given by name."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Returns(nn.Module):
    """A layer whose output is the function of its input."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


# ---- what is measured ----------------------------------------------------------------------------------------------------


def activations(model: nn.Module, batches: list[Tensor], names: list[str]) -> dict[str, Tensor]:
    """Of all batches, copied where they arise."""
    model = copy.deepcopy(model).eval()
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: found[name].append(out.clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


def samples(x: Tensor, y: Tensor, conv: str) -> tuple[np.ndarray, np.ndarray]:
    """[samples, features] of a pair, as the documentation says it."""
    x, y = x.double(), y.double()
    if conv == "flatten":
        return x.flatten(1).numpy(), y.flatten(1).numpy()
    if conv == "channels" and x.dim() == y.dim() == 4:
        grid = min(x.shape[2], y.shape[2])
        x, y = (F.adaptive_avg_pool2d(t, grid).movedim(1, 3).flatten(0, 2) for t in (x, y))
        return x.numpy(), y.numpy()
    return tuple(t.flatten(2).mean(2).numpy() if t.dim() == 4 else t.numpy() for t in (x, y))


def basis(x: np.ndarray, variance: float | None = None) -> np.ndarray:
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    power = s**2
    rank = int((power > len(x) * 2.0**-52 * power[0]).sum())
    if variance is not None:
        rank = min(rank, int((power.cumsum() < variance * power.sum()).sum()) + 1)
    return u[:, :rank]


def measure(method: str, x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    if method == "procrustes":
        return np.linalg.svd(x.T @ y, compute_uv=False).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    if method in {"cka", "rv"}:
        return np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    qx, qy = (basis(t, 0.99 if method == "svcca" else None) for t in (x, y))
    u, rho, _ = np.linalg.svd(qx.T @ qy, full_matrices=False)
    if method == "pwcca":
        weights = np.abs((qx @ u).T @ x).sum(1)
        return float((weights * rho).sum() / weights.sum())
    return float(rho.mean())


@pytest.mark.parametrize("conv", ["channels", "avgpool", "flatten"])
def test_matrices_are_those_of_all_activations_at_once(conv):
    """All methods from one pass over uneven batches, against numpy on everything concatenated."""
    a, b = conv_net(8), conv_net(7)
    a[1].running_mean.normal_()  # eval mode shows
    names = ["norm", "conv2", "head"] if conv != "flatten" else ["pool", "flat", "head"]
    batches = images(60, 37, 3)
    methods = ["cca", "svcca", "pwcca", "cka", "procrustes", "rv"]
    found = compare(a, b, batches, layers=names, method=methods, conv=conv)
    assert (found.layers_a, found.layers_b, list(found.matrix)) == (tuple(names), tuple(names), methods)
    x, y = activations(a, batches, names), activations(b, batches, names)
    for method in methods:
        expected = [[measure(method, *samples(x[p], y[q], conv)) for q in names] for p in names]
        assert found.matrix[method].dtype == torch.float64
        np.testing.assert_allclose(found.matrix[method].numpy(), expected, rtol=0, atol=TOLERANCE, err_msg=method)


def test_dft_cca_at_every_size():
    """Layers of one height and width are compared; those of another are NaN to them, and compared with their own kind."""
    a, b = conv_net(4), conv_net(5)
    batches = images(70, 30)
    with pytest.warns(UserWarning, match=r"4 of 8 pairs .* \(70, 4, 8, 8\) and 'conv2' of model_b \(70, 6, 4, 4\)"):
        found = compare(a, b, batches, layers=(["conv*", "relu*"], "conv*"), method="dft_cca", conv="dft").matrix["dft_cca"]
    x = activations(a, batches, ["conv1", "relu1", "conv2", "relu2"])
    y = activations(b, batches, ["conv1", "conv2"])
    for i, p in enumerate(x.values()):
        for j, q in enumerate(y.values()):
            if p.shape[2] == q.shape[2]:
                assert abs(found[i, j] - dft_cca(p, q)) < TOLERANCE
            else:
                assert found[i, j].isnan()


def test_a_model_and_itself():
    """It runs once a batch; the diagonal is 1, and the matrix that of two copies."""
    model = conv_net()
    calls = []
    model.conv1.register_forward_pre_hook(lambda *_: calls.append(1))
    batches = images(50, 50)
    alone = compare(model, model, batches, layers="*", method=["svcca", "pwcca"])
    assert len(calls) == 2
    two = compare(model, copy.deepcopy(model), batches, layers="*", method=["svcca", "pwcca"])
    assert alone.layers_a == two.layers_a == ("conv1", "norm", "relu1", "conv2", "relu2", "pool", "flat", "head")
    for method, matrix in alone.matrix.items():
        torch.testing.assert_close(matrix, two.matrix[method], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(matrix.diagonal(), torch.ones(8, dtype=torch.float64), rtol=0, atol=TOLERANCE)
    some = compare(model, model, batches, layers=(["head", "conv1"], "conv*"), method="pwcca")
    torch.testing.assert_close(some.matrix["pwcca"], alone.matrix["pwcca"][[0, 7]][:, [0, 3]], rtol=0, atol=TOLERANCE)


def test_models_that_share_a_module():
    """Each one's run counts for itself."""
    stem = nn.Linear(4, 6)
    a, b = nn.Sequential(stem, nn.Tanh(), nn.Linear(6, 3)), nn.Sequential(nn.Linear(4, 4), stem)
    batches = vectors(100)
    found = compare(a, b, batches, method="cka")
    assert (found.layers_a, found.layers_b) == (("0", "2"), ("0", "1"))
    x, y = activations(a, batches, ["0"]), activations(b, batches, ["1"])
    assert abs(found.matrix["cka"][0, 1] - measure("cka", *samples(x["0"], y["1"], "channels"))) < TOLERANCE


# ---- activations as they were ----------------------------------------------------------------------------------------------


def _data(x: Tensor) -> Tensor:
    x.data.mul_(3).abs_()
    return x


def _half(x: Tensor) -> Tensor:
    """Writes to a part, through a view."""
    x.view(-1)[: x.numel() // 2].zero_()
    return x


def _numpy(x: Tensor) -> Tensor:
    np.abs(x.detach().numpy(), out=x.detach().numpy())
    return x


def _residual(x: Tensor) -> Tensor:
    x += torch.linspace(-3, 3, x.numel()).view_as(x)
    return x


IN_PLACE = {
    "relu": torch.relu_,
    "residual": _residual,
    "data": _data,
    "a part": _half,
    "numpy": _numpy,
    "out=": lambda x: torch.exp(x, out=x),
}


@pytest.mark.parametrize("lazily", [True, False], ids=["copy on write", "copies"])
@pytest.mark.parametrize("kind", IN_PLACE)
def test_operations_in_place_come_too_late(kind, lazily, monkeypatch):
    """A layer's output is compared as it was returned, whatever the model writes into it."""
    if not lazily:
        monkeypatch.delattr(torch, "_lazy_clone")
    a = Named(lambda self, x: IN_PLACE[kind](self.layer(x)), layer=nn.Linear(4, 5))
    b = mlp(4, 6)
    batches = vectors(80, 70)
    x, y = activations(a, batches, ["layer"]), activations(b, batches, ["0"])
    found = compare(a, b, batches, method="cka").matrix["cka"]
    assert abs(found[0, 0] - measure("cka", x["layer"].double().numpy(), y["0"].double().numpy())) < TOLERANCE


def test_memory_of_others_is_left_alone():
    """Outputs that are a parameter, a buffer, the batch, or numpy's memory: compared as they were, and nothing is moved."""
    table = np.random.default_rng(0).normal(size=(64, 4))

    def forward(self: Any, x: Tensor) -> Tensor:
        same = self.same(x)
        outputs = [self.parameter(x), self.buffer(x), self.foreign(x)]
        return sum(outputs, same.double())

    parameter, buffer = nn.Parameter(torch.randn(64, 4)), torch.randn(64, 4)
    a = Named(
        forward,
        same=nn.Identity(),
        parameter=Returns(lambda _: parameter),
        buffer=Returns(lambda _: buffer.view(4, 64).t()),
        foreign=Returns(lambda _: torch.from_numpy(table)),
    )
    a.register_parameter("weight", parameter)
    a.register_buffer("kept", buffer)
    x = torch.randn(64, 4)
    addresses = [torch._C._data_address(t) for t in (parameter, buffer, x)]
    values = {"same": x, "parameter": parameter.detach(), "buffer": buffer.view(4, 64).t(), "foreign": torch.from_numpy(table)}
    found = compare(a, a, [x], layers=list(values), method="cka").matrix["cka"]
    expected = [[measure("cka", p.double().numpy(), q.double().numpy()) for q in values.values()] for p in values.values()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=TOLERANCE)
    assert not any(torch._C._is_cow_tensor(t) for t in (parameter, buffer, x))
    with torch.no_grad():
        parameter.add_(1)
    assert [torch._C._data_address(t) for t in (parameter, buffer, x)] == addresses


def test_what_nobody_writes_to_is_not_copied():
    x = torch.randn(3, 4)
    kept = fourfold._running.as_it_is(x, set())
    assert torch._C._data_address(kept) == torch._C._data_address(x)
    x.zero_()
    assert torch._C._data_address(kept) != torch._C._data_address(x)
    assert kept.count_nonzero() == 12


def test_activations_of_one_batch_are_kept(monkeypatch):
    """None of an earlier batch is alive when a model runs again."""
    kept: list[weakref.ref[Tensor]] = []
    original = fourfold.comparison.as_it_is

    def recorded(*args: Any) -> Tensor:
        x = original(*args)
        kept.append(weakref.ref(x))
        return x

    def forward(self: Any, x: Tensor) -> Tensor:
        alive.append((len(kept), sum(x() is not None for x in kept)))
        return self.inner(x)

    alive: list[tuple[int, int]] = []
    monkeypatch.setattr(fourfold.comparison, "as_it_is", recorded)
    compare(Named(forward, inner=mlp(4, 6, 5)), mlp(4, 3), vectors(70, 70, 70), method="cka")
    assert alive == [(0, 0), (3, 0), (6, 0)]


# ---- what a layer's activation is ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    loss: Tensor | None
    states: tuple[Any, ...]


OUTPUTS = {
    "tuple": lambda x: (x, 2),
    "nested": lambda x: [None, ({"ignored": "text", "first": x}, torch.zeros(1))],
    "dict": lambda x: {"none": None, "first": x, "second": x[:, :1]},
    "user dict": lambda x: collections.UserDict(first=x),
    "dataclass": lambda x: Output(None, ((x,),)),
    "namedtuple": lambda x: collections.namedtuple("Pair", "first second")(x, None),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_first_tensor_of_an_output(kind):
    a = Named(lambda self, x: self.layer(torch.tanh(x)) and None, layer=Returns(OUTPUTS[kind]))
    b = mlp(4, 4)
    batches = vectors(90)
    y = activations(b, batches, ["0"])["0"].double().numpy()
    found = compare(a, b, batches, method="cka").matrix["cka"]
    assert abs(found[0, 0] - measure("cka", batches[0].tanh().double().numpy(), y)) < TOLERANCE


def test_lstm_and_attention():
    """Which return tuples; an encoder's fast path still calls its layers, but attention never calls its projection."""
    a = Named(lambda self, x: self.encoder(x), encoder=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    b = Named(lambda self, x: self.lstm(x), lstm=nn.LSTM(8, 6, batch_first=True))
    batches = [torch.randn(40, 5, 8) for _ in range(3)]
    found = compare(a, b, batches, layers=(None, "lstm"))
    assert found.layers_a == ("encoder.linear1", "encoder.linear2", "encoder.norm1", "encoder.norm2")
    assert found.matrix["svcca"].isfinite().all()
    assert compare(a, b, batches, layers="*").layers_a == ("encoder",)
    name = "encoder.self_attn.out_proj"
    assert_refused(
        ValueError,
        f"compare: layer '{name}' of model_a does not run, or returns no tensor; name another in layers=",
        lambda: compare(a, b, batches, layers=(name, None)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    """16-bit activations are compared as they are, in float64; the models may differ in dtype."""
    a, b = mlp(4, 5).to(dtype), mlp(4, 3)
    batches = vectors(64)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.inner(x.to(dtype))

    found = compare(Named(forward, inner=a), b, batches, layers=("inner.0", "0"), method="cka").matrix["cka"]
    x = activations(a, [batches[0].to(dtype)], ["0"])["0"].double().numpy()
    y = activations(b, batches, ["0"])["0"].double().numpy()
    assert abs(found[0, 0] - measure("cka", x, y)) < TOLERANCE


def test_autocast_and_inference_mode():
    a, b = mlp(4, 5), mlp(4, 3)
    batches = vectors(64)
    expected = compare(a, b, batches, method="cka").matrix["cka"]
    with torch.inference_mode():
        assert torch.equal(compare(a, b, batches, method="cka").matrix["cka"], expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = compare(a, b, batches, method="cka").matrix["cka"]
        x, y = (activations(m, batches, ["0"])["0"] for m in (a, b))
    assert x.dtype == torch.bfloat16
    assert abs(found[0, 0] - measure("cka", x.double().numpy(), y.double().numpy())) < TOLERANCE


# ---- which layers --------------------------------------------------------------------------------------------------------

NAMES = ["stem", "stages", "stages.0", "stages.0.conv", "stages.0.conv.pad", "stages.1", "stages.1.conv", "head", "a[b]c"]


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ("stem", [0]),
        ("*", [0, 1, 7, 8]),
        ("**", list(range(9))),
        ("stages.*", [2, 5]),
        ("stages.**", [1, 2, 3, 4, 5, 6]),
        ("**.conv", [3, 6]),
        ("**.conv.**", [3, 4, 6]),
        ("stages.*.conv", [3, 6]),
        ("s*", [0, 1]),
        ("s**", [0, 1, 2, 3, 4, 5, 6]),
        ("st*s.1", [5]),
        ("stages.0**", [2, 3, 4]),
        ("**.**", list(range(9))),
        ("a[b]c", [8]),
        (["head", "stem", "s*"], [0, 1, 7]),
        (("head", "head"), [7]),
    ],
    ids=str,
)
def test_globs(globs, expected):
    """``*`` within a component, ``**`` across; anything else stands for itself; the result in the order of the names."""
    assert matching_names("op", "layers", globs, NAMES) == [NAMES[i] for i in expected]


@pytest.mark.parametrize(
    ("globs", "error", "message"),
    [
        ("stm", ValueError, "op: layers='stm' matches no module of model_a; did you mean 'stem'?"),
        (
            "conv",
            ValueError,
            "op: layers='conv' matches no module of model_a; did you mean 'stages.0.conv' or 'stages.1.conv'?",
        ),
        ("stage.0.conv", ValueError, None),
        (
            "stage.*",
            ValueError,
            "op: layers='stage.*' matches no module of model_a; did you mean 'stages' or 'stages.0' or 'stages.1'?",
        ),
        (
            "zzz",
            ValueError,
            (
                "op: layers='zzz' matches no module of model_a; there are 'stem', 'stages', 'stages.0', 'stages.0.conv', "
                "'stages.0.conv.pad', 'stages.1', 'stages.1.conv', 'head' and 1 more"
            ),
        ),
        ("a?b?c", ValueError, None),
        ("", ValueError, None),
        ([], ValueError, "op: layers must hold at least one glob for model_a, got an empty list"),
        (3, TypeError, "op: layers must be a glob or a list of globs, got 3"),
        (["stem", 3], TypeError, "op: layers must be a glob or a list of globs, got ['stem', 3]"),
    ],
    ids=str,
)
def test_globs_that_match_nothing(globs, error, message):
    with pytest.raises(error) as caught:
        matching_names("op", "layers", globs, NAMES, of="model_a")
    assert message is None or str(caught.value) == message
    assert repr(globs) in str(caught.value) or globs == []


def test_layers_by_default():
    """Those with parameters and no children, in the order of named_modules."""
    a = Named(
        lambda self, x: self.z(self.a(x)),
        z=nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
        a=nn.Linear(4, 4),
        unused=nn.Linear(1, 1),
    )
    found = compare(a, mlp(4, 6, 6), vectors(100), method="cka")
    assert (found.layers_a, found.layers_b) == (("z.0", "a"), ("0", "2"))


def test_layers_for_each_model():
    a, b = conv_net(), mlp(4, 6)
    b = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 6))
    found = compare(a, b, images(130), layers=(["conv*", "head"], None), method="cka")
    assert (found.layers_a, found.layers_b) == (("conv1", "conv2", "head"), ("2",))
    assert_refused(
        ValueError,
        "compare: layers='conv*' matches no module of model_b; there are '0', '1', '2'",
        lambda: compare(a, b, images(130), layers="conv*"),
    )


def test_a_module_with_two_names_is_one_layer():
    """Named by the first, or by the one that was asked for."""
    layer = nn.Linear(4, 4)
    a = Named(lambda self, x: self.one(x), one=layer, two=layer)
    for layers, names in ((None, ("one",)), ("*", ("one",)), ("two", ("two",)), (["*", "two"], ("two",))):
        assert compare(a, mlp(4, 3), vectors(60), layers=(layers, None), method="cka").layers_a == names


def test_layers_that_do_not_run_are_left_out_of_a_glob():
    silent = {"silent": nn.Linear(4, 4), "wordless": Returns(lambda _: "text")}
    a = Named(lambda self, x: (self.wordless(x), self.layer(x)), layer=nn.Linear(4, 4), **silent)
    assert compare(a, mlp(4, 3), vectors(60), layers=("*", None), method="cka").layers_a == ("layer",)
    for name in silent:
        assert_refused(
            ValueError,
            f"compare: layer '{name}' of model_a does not run, or returns no tensor; name another in layers=",
            lambda name=name: compare(a, mlp(4, 3), vectors(60), layers=(["layer", name], None)),
        )
    assert_refused(
        ValueError,
        "compare: none of the layers chosen in model_a runs and returns a tensor; choose others with layers=",
        lambda: compare(a, mlp(4, 3), vectors(60), layers=("s*", None)),
    )


def test_layers_that_run_twice_or_not_always():
    twice = Named(lambda self, x: self.b(self.a(self.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert_refused(
        ValueError,
        "compare: layer 'a' of model_a runs twice in one forward; name layers that run once in layers=",
        lambda: compare(twice, mlp(4, 3), vectors(60)),
    )
    assert compare(twice, mlp(4, 3), vectors(60), layers=("b", None)).layers_a == ("b",)
    assert not any(module._forward_hooks for module in twice.modules())
    sometimes = Named(lambda self, x: self.a(x) if len(x) == 60 else x, a=nn.Linear(4, 4))
    assert_refused(
        ValueError,
        "compare: layer 'a' of model_b ran in the first batch but not in batch 1; leave it out with layers=",
        lambda: compare(mlp(4, 3), sometimes, vectors(60, 50)),
    )
    later = Named(lambda self, x: self.b(self.a(x) if len(x) == 50 else x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert compare(later, mlp(4, 3), vectors(60, 50)).layers_a == ("b",)


# ---- pairs that cannot be compared -----------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """An image in patches of 4 x 4, so 2 x 2 = 4 tokens in row order, and optionally one more in front."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 4, stride=4)
        self.mix = nn.Linear(6, 7)
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.mix(F.pad(tokens, (0, 0, self.extra, 0)))


def test_tokens_and_grids():
    """As many tokens as positions are compared one by one; else the pair is NaN, and one warning says so."""
    a, b = Tokens(0), Tokens(1)
    batches = images(60, 60)
    found = compare(a, a, batches, method="cka").matrix["cka"]
    x = activations(a, batches, ["patch", "mix"])
    grid, tokens = x["patch"].movedim(1, 3).flatten(0, 2), x["mix"].flatten(0, 1)
    assert abs(found[0, 1] - measure("cka", grid.double().numpy(), tokens.double().numpy())) < TOLERANCE
    with pytest.warns(UserWarning, match="2 of 4 pairs") as caught:
        found = compare(a, b, batches, method=["cka", "svcca"])
    assert [str(w.message) for w in caught] == [
        (
            "compare: 2 of 4 pairs of layers do not have the same samples with conv='channels' and are NaN, the first "
            "'patch' of model_a (60, 6, 2, 2) and 'mix' of model_b (60, 5, 7); use conv='avgpool'"
        )
    ]
    assert caught[0].filename == __file__
    for matrix in found.matrix.values():
        assert matrix.isnan().tolist() == [[False, True], [False, True]]
    assert compare(a, b, batches, method="cka", conv="avgpool").matrix["cka"].isfinite().all()
    assert_refused(
        ValueError,
        "compare: no pair of layers has the same samples with conv='channels', as 'mix' of model_a (60, 4, 7) and 'mix' of "
        "model_b (60, 5, 7); use conv='avgpool'",
        lambda: compare(a, b, batches, layers="mix"),
    )


def test_dead_layers():
    """Have no direction in common with anything; where that makes 0 / 0, it is NaN, and a warning names the layer."""
    a, b = Named(lambda self, x: self.last(self.dead(x)), dead=nn.Linear(4, 3), last=nn.Linear(3, 2)), mlp(4, 3)
    nn.init.zeros_(a.dead.weight)
    with pytest.warns(UserWarning, match="'dead'") as caught:
        found = compare(a, b, vectors(60), method=["svcca", "cca"])
    told = "2 layers have the same value in every sample, and have rank 0 and a similarity of 0, the first 'dead' of model_a"
    page = "; leave them out (see docs/cca.md#limits)"
    assert [str(w.message) for w in caught] == [f"compare: {method}: {told}{page}" for method in ("svcca", "cca")]
    assert all(not matrix.any() for matrix in found.matrix.values())
    with pytest.warns(UserWarning, match=r"cka.*'dead'"):
        assert compare(a, b, vectors(60), method="cka").matrix["cka"].isnan().all()


def test_layers_of_another_batch():
    """As a table of positions has: compared with its like, and NaN to all others."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.layer = nn.Embedding(30, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.positions(torch.arange(30)[None]))

    a, b = Positions(), Positions()
    batches = [torch.randn(4, 30, 4), torch.randn(3, 30, 4)]
    with pytest.warns(
        UserWarning, match=r"2 of 4 pairs .* 'positions' of model_a \(1, 30, 4\) and 'layer' of model_b \(4, 30, 5\)"
    ):
        found = compare(a, b, batches, method="cka").matrix["cka"]
    assert found.isnan().tolist() == [[False, True], [True, False]]
    tables = [m.positions.weight.detach().double().numpy() for m in (a, b)]
    assert abs(found[0, 0] - measure("cka", *tables)) < TOLERANCE
    with pytest.raises(ValueError, match="their batches differ; choose other layers with layers="):
        compare(a, b, batches, layers=("positions", "layer"))


# ---- batches -------------------------------------------------------------------------------------------------------------


def test_kinds_of_batches():
    a, b = mlp(4, 5), mlp(4, 3)
    xs = vectors(50, 50)
    expected = compare(a, b, xs, method="cka").matrix["cka"]
    keyword = [Named(lambda self, *, x, scale=1: self.inner(x * scale), inner=m) for m in (a, b)]
    dataset = torch.utils.data.TensorDataset(torch.cat(xs), torch.arange(100))
    kinds: dict[str, tuple[list[Any], Any]] = {
        "tuples": ([a, b], [(x, torch.zeros(50)) for x in xs]),
        "lists": ([a, b], [[x] for x in xs]),
        "generator": ([a, b], (x for x in xs)),
        "iterator": ([a, b], iter(xs)),
        "loader": ([a, b], torch.utils.data.DataLoader(dataset, batch_size=50)),
        "dicts": (keyword, [{"x": x / 2, "scale": 2} for x in xs]),
        "user dicts": (keyword, [collections.UserDict(x=x) for x in xs]),
        "dict and target": (keyword, [({"x": x}, torch.zeros(50)) for x in xs]),
        "list of tensors": (
            [Named(lambda self, x: self.inner(torch.stack(x)), inner=m) for m in (a, b)],
            [(list(x), 0) for x in xs],
        ),
    }
    for kind, (models, loader) in kinds.items():
        found = compare(*models, loader, method="cka", device="cpu")
        assert torch.equal(found.matrix["cka"], expected), kind


def test_max_batches_draws_no_more():
    a, b = mlp(4, 5), mlp(4, 3)
    xs = vectors(50, 50, 50)
    drawn = iter(xs)
    found = compare(a, b, drawn, method="cka", max_batches=2)
    assert next(drawn) is xs[2]
    assert torch.equal(found.matrix["cka"], compare(a, b, xs[:2], method="cka").matrix["cka"])
    assert torch.equal(
        compare(a, b, xs, method="cka", max_batches=7).matrix["cka"], compare(a, b, xs, method="cka").matrix["cka"]
    )


def test_empty_batches_change_nothing():
    a, b = mlp(4, 5), mlp(4, 3)
    xs = vectors(0, 50, 0, 50)
    assert torch.equal(compare(a, b, xs, method="cka").matrix["cka"], compare(a, b, xs[1::2], method="cka").matrix["cka"])


@pytest.mark.parametrize("loader", [[], iter(()), vectors(0, 0)], ids=["none", "spent iterator", "empty batches"])
def test_no_batch(loader):
    assert_refused(
        ValueError,
        "compare: loader must give a batch with samples, got none; an iterator can be used only once",
        lambda: compare(mlp(4, 5), mlp(4, 3), loader),
    )


# ---- what is left behind ---------------------------------------------------------------------------------------------------


class Merging(nn.Linear):
    """Whose train() does more than set a flag, as adapters that are merged for evaluation."""

    merged = False

    def train(self, mode: bool = True) -> Merging:
        if self.merged == mode:
            self.merged = not mode
            with torch.no_grad():
                self.weight.mul_(0.5 if mode else 2)
        return super().train(mode)


def state_of(model: nn.Module) -> list[Any]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [
        [m.training for m in model.modules()],
        hooks,
        [p.tolist() for p in model.parameters()],
        [b.tolist() for b in model.buffers()],
    ]


@contextlib.contextmanager
def interrupted(error: BaseException | None) -> Iterator[None]:
    if error is None:
        yield
        return
    with pytest.raises(type(error)) as caught:
        yield
    assert caught.value is error


@pytest.mark.parametrize("where", ["nowhere", "forward", "loader"])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_models_come_back_as_they_were(where, error):
    """Mode module by module, buffers, hooks; also where the pass ends early."""

    def raises(*_: Any) -> None:
        if where == "forward" and len(seen) == 2:
            raise error

    def loader() -> Iterator[Tensor]:
        for x in images(20, 20, 20):
            seen.append(x)
            if where == "loader" and len(seen) == 2:
                raise error
            yield x

    seen: list[Tensor] = []
    a, b = conv_net(), conv_net()
    a.add_module("extra", Merging(5, 5))
    b.add_module("extra", Merging(5, 5).eval())
    a.train()
    a.norm.eval()  # frozen statistics
    b.conv2.train()
    a.head.register_forward_hook(raises)
    before = state_of(a), state_of(b)
    with interrupted(None if where == "nowhere" else error):
        compare(a, b, loader(), layers="**", method="cka")
    assert (state_of(a), state_of(b)) == before
    assert [a.extra.merged, b.extra.merged] == [False, True]
    assert len(seen) == (3 if where == "nowhere" else 2)


def test_models_run_in_eval_mode_without_gradients():
    modes = []

    def forward(self: Any, x: Tensor) -> Tensor:
        modes.append((self.training, self.inner.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return self.inner(x)

    a = Named(forward, inner=mlp(4, 5))
    compare(a, mlp(4, 3), vectors(60, 60))
    assert modes == [(False, False, False, False)] * 2
    assert all(p.grad is None and not p.is_inference() for p in a.parameters())


def test_nothing_random_is_drawn():
    a, b = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)), mlp(4, 3)
    before = torch.get_rng_state(), random.getstate()
    compare(a, b, vectors(60), method=["svcca", "cka"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_gradients_of_the_caller_are_not_touched():
    """In a training loop: a graph made before is still good."""
    a = mlp(4, 5)
    loss = a(vectors(10)[0]).sum()
    compare(a, mlp(4, 3), vectors(60), method="cka")
    loss.backward()
    assert all(p.grad is not None for p in a.parameters())


# ---- the result ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def found() -> Comparison:
    matrix = torch.tensor([[0.9, 0.1, float("nan")], [0.2, 0.8, 0.5]], dtype=torch.float64)
    return Comparison({"svcca": matrix, "cka": matrix / 2}, ("a.0", "a.1"), ("b.0", "b.1", "b.2"))


def test_save_and_load(found, tmp_path):
    found.save(tmp_path / "found.pt")
    again = Comparison.load(tmp_path / "found.pt")
    assert (again.layers_a, again.layers_b, list(again.matrix)) == (found.layers_a, found.layers_b, ["svcca", "cka"])
    for method, matrix in found.matrix.items():
        torch.testing.assert_close(again.matrix[method], matrix, rtol=0, atol=0, equal_nan=True)
    buffer = io.BytesIO()
    found.save(buffer)
    buffer.seek(0)
    assert repr(Comparison.load(buffer)) == repr(found) == "Comparison(svcca, cka: 2 x 3 layers)"
    torch.save({"matrix": 3}, tmp_path / "other.pt")
    assert_refused(
        ValueError,
        f"Comparison.load: the file must be one of Comparison.save, got something else in {tmp_path / 'other.pt'}",
        lambda: Comparison.load(tmp_path / "other.pt"),
    )


def test_load_of_junk_names_the_file(tmp_path):
    """And never advises to run what is in it."""
    files = {
        "empty": b"",
        "text": b"epoch,loss\n1,0.5\n",
        "pickle": pickle.dumps(sys.exit),
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "zip": b"PK\x03\x04" + bytes(100),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save(nn.Linear(2, 2), tmp_path / "model")
    buffer = io.BytesIO()
    Comparison({"cka": torch.ones(2, 2)}, ("a", "b"), ("a", "b")).save(buffer)
    (tmp_path / "cut").write_bytes(buffer.getvalue()[:-100])
    torch.save({"fourfold.Comparison": 1, "matrix": {}}, tmp_path / "half")
    for name in (*files, "model", "cut", "half"):
        with pytest.raises(ValueError, match=r"Comparison\.load: ") as caught:
            Comparison.load(tmp_path / name)
        said = f"Comparison.load: the file must be one of Comparison.save, got something else in {tmp_path / name}"
        assert str(caught.value).startswith(said)
        assert "weights_only" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None  # which is torch's advice
    with pytest.raises(FileNotFoundError):
        Comparison.load(tmp_path / "nothing")


def test_pandas(found):
    pytest.importorskip("pandas", reason="needs pandas; run: pip install pandas")
    frames = found.to_pandas()
    assert list(frames) == ["svcca", "cka"]
    assert list(frames["cka"].index) == ["a.0", "a.1"]
    assert list(frames["cka"].columns) == ["b.0", "b.1", "b.2"]
    assert frames["svcca"].loc["a.1", "b.2"] == 0.5
    frames["svcca"].loc["a.1", "b.2"] = 0
    assert found.matrix["svcca"][1, 2] == 0.5


def test_plot(found, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    axes = found.plot()
    axes[0].figure.savefig(tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 5000
    assert [axis.get_title() for axis in axes] == ["svcca", "cka"]
    assert [label.get_text() for label in axes[1].get_yticklabels()] == ["a.0", "a.1"]
    assert [label.get_text() for label in axes[1].get_xticklabels()] == ["b.0", "b.1", "b.2"]
    pyplot.close(axes[0].figure)
    ours = Figure().subplots(1, 2)
    assert found.plot(ours) == list(ours)
    drawn = ours[0].images[0]
    np.testing.assert_array_equal(drawn.get_array().filled(np.nan), found.matrix["svcca"].numpy())
    assert drawn.get_clim() == (0, 1)
    red, green, blue, _ = drawn.cmap(drawn.norm(drawn.get_array()))[0, 2]
    assert red == green == blue == 0.75
    one = Comparison({"cka": found.matrix["cka"]}, found.layers_a, found.layers_b)
    axis = Figure().subplots()
    assert one.plot(axis) == [axis]
    assert not pyplot.get_fignums()
    assert_refused(
        ValueError,
        "Comparison.plot: ax must be one Axes for each of svcca, cka, got 1",
        lambda: found.plot(Figure().subplots()),
    )


@pytest.mark.parametrize(("package", "call"), [("pandas", "to_pandas"), ("matplotlib", "plot")])
def test_optional_packages(package, call, found, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert_refused(ImportError, f"Comparison.{call} needs {package}; run: pip install {package}", getattr(found, call))


class Bar:
    """Of tqdm, what is used."""

    made: list[Bar]

    def __init__(self, **options: Any) -> None:
        self.options, self.count, self.closed = options, 0, False
        self.made.append(self)

    def update(self) -> None:
        self.count += 1

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("loader", "max_batches", "total"),
    [
        (lambda: vectors(30, 30, 30), None, 3),
        (lambda: vectors(30, 30, 30), 2, 2),
        (lambda: iter(vectors(30)), None, None),
        (lambda: iter(vectors(30)), 5, 5),
    ],
)
def test_progress_bar(loader, max_batches, total, monkeypatch):
    made: list[Bar] = []
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=type("Made", (Bar,), {"made": made})))
    options = {"max_batches": max_batches, "method": "cka"}
    compare(mlp(4, 3), mlp(4, 3), loader(), **options)
    assert not made  # nobody is looking
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    compare(mlp(4, 3), mlp(4, 3), loader(), progress=False, **options)
    assert not made
    compare(mlp(4, 3), mlp(4, 3), loader(), **options)
    assert [(bar.options["total"], bar.closed) for bar in made] == [(total, True)]
    assert made[0].count == (total if max_batches is None and total else {None: 1, 2: 2, 5: 1}[max_batches])
    monkeypatch.setitem(sys.modules, "tqdm", None)
    compare(mlp(4, 3), mlp(4, 3), loader(), **options)


def test_the_bar_is_closed_after_an_error(monkeypatch):
    made: list[Bar] = []
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=type("Made", (Bar,), {"made": made})))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(TypeError):
        compare(mlp(4, 3), mlp(4, 3), [*vectors(30), "text"])
    assert [(bar.count, bar.closed) for bar in made] == [(1, True)]


# ---- refusals --------------------------------------------------------------------------------------------------------------


def bad_values(count: int, value: float) -> nn.Module:
    """The second batch's activations hold so many of them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        if len(x) == 59:
            x.view(-1)[:count] = value
        return self.last(x)

    return Named(forward, first=nn.Linear(4, 4), last=Returns(lambda x: x))


A, B = mlp(4, 5), mlp(4, 3)
METHODS = ("cca", "svcca", "pwcca", "cka", "procrustes", "rv", "dft_cca")
SHAPES = "[n, d], [n, t, d] or [n, c, h, w]"
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "model": (
        TypeError,
        "compare: model_b must be a torch.nn.Module, got function",
        lambda: compare(A, lambda x: x, vectors(60)),
    ),
    "loader": (
        TypeError,
        "compare: loader must give batches, got Tensor; a single batch x is passed as [x]",
        lambda: compare(A, B, vectors(60)[0]),
    ),
    "loader of nothing": (
        TypeError,
        "compare: loader must give batches, got int; a single batch x is passed as [x]",
        lambda: compare(A, B, 3),
    ),
    "batch": (
        TypeError,
        "compare: batch 0 must be a tensor, a tuple led by the input, or a dict of keyword arguments, got ndarray",
        lambda: compare(A, B, [np.zeros((60, 4))]),
    ),
    "batch led by": (
        TypeError,
        "compare: batch 1 must be a tensor, a tuple led by the input, or a dict of keyword arguments, got tuple led by str",
        lambda: compare(A, B, [*vectors(60), ("text", vectors(60))]),
    ),
    "empty tuple": (
        ValueError,
        "compare: batch 0 must be led by the input, got an empty tuple",
        lambda: compare(A, B, [()]),
    ),
    "method": (
        ValueError,
        f"compare: method must be one of {METHODS}, got 'ccka'",
        lambda: compare(A, B, vectors(60), method=["svcca", "ccka"]),
    ),
    "no method": (
        TypeError,
        f"compare: method must be one of {METHODS} or a list of them, got ()",
        lambda: compare(A, B, vectors(60), method=()),
    ),
    "conv": (
        ValueError,
        "compare: conv must be one of ('channels', 'flatten', 'avgpool', 'dft'), got 'pool'",
        lambda: compare(A, B, vectors(60), conv="pool"),
    ),
    "method and conv": (
        ValueError,
        "compare: conv='dft' cannot give 'svcca'; method='dft_cca' and conv='dft' go together",
        lambda: compare(A, B, vectors(60), conv="dft"),
    ),
    "dft of vectors": (
        ValueError,
        (
            "compare: no pair of layers has the same samples with conv='dft', as '0' of model_a (60, 5) and '0' of model_b "
            "(60, 3); conv='dft' needs [n, c, h, w] of one height and width; use conv='avgpool', or other layers"
        ),
        lambda: compare(A, B, vectors(60), conv="dft", method="dft_cca"),
    ),
    "max_batches": (
        ValueError,
        "compare: max_batches must be at least 1, got 0",
        lambda: compare(A, B, vectors(60), max_batches=0),
    ),
    "layers in threes": (
        ValueError,
        "compare: layers as a tuple must be (for model_a, for model_b), got ('0', '1', '2'); pass globs as a list",
        lambda: compare(A, B, vectors(60), layers=("0", "1", "2")),
    ),
    "unknown layer": (
        ValueError,
        "compare: layers='con1' matches no module of model_a; did you mean 'conv1' or 'conv2'?",
        lambda: compare(conv_net(), conv_net(), images(60), layers="con1"),
    ),
    "single layer": (
        ValueError,
        (
            "compare: model_a must have submodules with parameters, got Linear; a single layer is passed as "
            "torch.nn.Sequential(layer)"
        ),
        lambda: compare(A[0], B, vectors(60)),
    ),
    "device": (
        ValueError,
        "compare: model_b must be on cpu, as device= says, but its '0.weight' is on meta; move it with model_b.to('cpu')",
        lambda: compare(A, copy.deepcopy(B).to("meta"), vectors(60), device="cpu"),
    ),
    "two devices": (
        ValueError,
        "compare: both models must be on one device, got cpu and meta; move one of them with .to(device)",
        lambda: compare(A, copy.deepcopy(B).to("meta"), vectors(60)),
    ),
    "NaN": (
        ValueError,
        "compare: layer 'last' of model_b holds 3 NaN or infinite values in batch 1 of shape (59, 4)",
        lambda: compare(A, bad_values(3, float("nan")), vectors(60, 59), layers=(None, "last")),
    ),
    "infinity": (
        ValueError,
        "compare: layer 'last' of model_a holds 2 NaN or infinite values in batch 1 of shape (59, 4)",
        lambda: compare(bad_values(2, float("inf")), B, vectors(60, 59), layers=("last", None)),
    ),
    "NaN of a model and itself": (
        ValueError,
        "compare: layer 'last' holds 5 NaN or infinite values in batch 1 of shape (59, 4)",
        lambda: compare(*[bad_values(5, float("nan"))] * 2, vectors(60, 59), layers="last"),
    ),
    "integers": (
        TypeError,
        "compare: the output of layer 'layer' of model_a must be float16, bfloat16, float32 or float64, got int64",
        lambda: compare(Named(lambda self, x: self.layer(x), layer=Returns(lambda x: x.argmax(1))), B, vectors(60)),
    ),
    "complex": (
        TypeError,
        "compare: the output of layer 'layer' of model_a must be float16, bfloat16, float32 or float64, got complex64",
        lambda: compare(Named(lambda self, x: self.layer(x), layer=Returns(torch.fft.fft)), B, vectors(60)),
    ),
    "sparse": (
        TypeError,
        "compare: the output of layer 'layer' of model_a must be a dense tensor, got a sparse_coo one; convert it first",
        lambda: compare(Named(lambda self, x: self.layer(x), layer=Returns(Tensor.to_sparse)), B, vectors(60)),
    ),
    "one dimension": (
        ValueError,
        f"compare: the output of layer 'layer' of model_b must be {SHAPES}, got (60,); leave it out with layers=",
        lambda: compare(A, Named(lambda self, x: self.layer(x), layer=Returns(lambda x: x.sum(1))), vectors(60)),
    ),
    "scalar": (
        ValueError,
        f"compare: the output of layer 'layer' of model_b must be {SHAPES}, got (); leave it out with layers=",
        lambda: compare(A, Named(lambda self, x: self.layer(x), layer=Returns(torch.sum)), vectors(60)),
    ),
    "few samples": (
        ValueError,
        (
            "compare: cca of layer '0' of model_a: n must be larger than the number of dimensions, got n=5 samples for 5 "
            "dimensions: every correlation would be 1, whatever the data; use more samples, svcca, or cka with unbiased=True "
            "(see docs/cca.md#few-samples)"
        ),
        lambda: compare(A, B, vectors(3, 2), method="cca"),
    ),
    "other widths": (
        ValueError,
        "compare: layer 'layer' of model_b must have 4 features, as in the first update, got 2",
        lambda: compare(
            A, Named(lambda self, x: self.layer(x), layer=Returns(lambda x: x if len(x) == 60 else x[:, :2])), vectors(60, 50)
        ),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    """Word for word; the models are left as they were."""
    error, message, call = REFUSED[case]
    before = state_of(A), state_of(B)
    assert_refused(error, message, call)
    assert (state_of(A), state_of(B)) == before


def test_compiled_models_are_refused():
    a, b = mlp(4, 5), mlp(4, 3)
    assert_refused(
        ValueError,
        "compare: model_b is compiled by torch.compile, which does not call hooks reliably; pass the module that was compiled, "
        "its _orig_mod",
        lambda: compare(a, torch.compile(b), vectors(60)),
    )
    a[0].compile()
    assert_refused(
        ValueError,
        "compare: '0' of model_a is compiled by torch.compile, which does not call hooks reliably; pass a copy made before its "
        "compile()",
        lambda: compare(a, b, vectors(60)),
    )


def test_few_samples_warn_once_a_method():
    """With the chance level, in the name of compare and at the line that calls it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compare(mlp(4, 5), mlp(4, 3), vectors(30), method=["cca", "pwcca", "cka"])
    assert [w.filename for w in caught] == [__file__] * 2
    assert str(caught[0].message) == (
        "compare: cca of layer '0' of model_a: n=30 samples for 4 dimensions; independent data would reach a chance level of "
        "r2 = 0.14 (d / (n - 1)); use at least 40 samples (see docs/cca.md#few-samples)"
    )
    assert str(caught[1].message).startswith("compare: pwcca of layer '0' of model_a: n=30")


# ---- models that nobody here wrote -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    return pytest.importorskip("transformers", reason="needs transformers; run: pip install transformers")


def test_transformers_resnet_and_vit(hugging_face):
    """Random weights from small configurations; outputs are dataclasses, batches their own kind of dict."""
    resnet = hugging_face.ResNetModel(
        hugging_face.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic")
    )
    vit = hugging_face.ViTModel(
        hugging_face.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
        )
    )
    before = state_of(resnet), state_of(vit)
    pixels = [torch.randn(48, 3, 16, 16) for _ in range(4)]
    batches = [hugging_face.BatchFeature({"pixel_values": x}) for x in pixels]
    found = compare(resnet, vit, batches, layers=("encoder.stages.*", "layers.*"), conv="avgpool", method=["svcca", "cka"])
    assert (found.layers_a, found.layers_b) == (("encoder.stages.0", "encoder.stages.1"), ("layers.0", "layers.1"))
    one, other = (copy.deepcopy(model).eval() for model in (resnet, vit))  # which keeps hooks once asked for hidden states
    with torch.no_grad():
        x = torch.cat([one(p).last_hidden_state for p in pixels]).double().mean((2, 3))
        y = torch.cat([other(p, output_hidden_states=True).hidden_states[1] for p in pixels]).double().mean(1)
    for method, matrix in found.matrix.items():
        assert abs(matrix[1, 0] - measure(method, x.numpy(), y.numpy())) < TOLERANCE
    every = compare(resnet, vit, batches, conv="avgpool", method="cka")
    assert len(every.layers_a) == sum(isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) for m in resnet.modules())
    assert len(every.layers_b) == sum(isinstance(m, (nn.Conv2d, nn.Linear, nn.LayerNorm)) for m in vit.modules())
    assert every.matrix["cka"].isfinite().all()
    assert (state_of(resnet), state_of(vit)) == before


def test_transformers_bert(hugging_face):
    """Text, by keywords; its table of positions has a batch of its own."""
    config = hugging_face.BertConfig(
        vocab_size=50,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    a, b = hugging_face.BertModel(config), hugging_face.BertModel(config)
    batches = [
        hugging_face.BatchEncoding({"input_ids": torch.randint(50, (24, 10)), "token_type_ids": torch.randint(2, (24, 10))})
        for _ in range(3)
    ]
    with pytest.warns(UserWarning, match="pairs of layers do not have the same samples"):
        found = compare(a, b, batches, method="cka")
    positions = found.layers_a.index("embeddings.position_embeddings")
    pooler = found.layers_a.index("pooler.dense")
    others = [i for i in range(len(found.layers_a)) if i not in (positions, pooler)]
    matrix = found.matrix["cka"]
    assert matrix[others][:, others].isfinite().all()
    assert matrix[positions, others].isnan().all()
    assert matrix[positions, positions].isfinite()


def test_path_of_a_saved_picture(tmp_path: Path) -> None:
    """From models to a file in three lines."""
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot

    axes = compare(conv_net(), conv_net(), images(80), layers=["conv*", "head"]).plot()
    axes[0].figure.savefig(tmp_path / "layers.png")
    pyplot.close(axes[0].figure)
    assert (tmp_path / "layers.png").exists()
