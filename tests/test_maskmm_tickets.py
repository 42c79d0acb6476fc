"""Masks from training, the lottery-ticket loop, and what the papers found, on digits: examples/*_digits.py."""

from __future__ import annotations

import copy
import importlib.util
import io
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import fourfold as ff
import pytest
import torch
from battery import assert_same
from fourfold.ops.maskmm_tickets import CRITERIA
from torch import Tensor, nn
from torch.nn.utils import prune

N, K = 7, 11


def assert_refused(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    """Word for word."""
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Before and after training."""
    shape = shape or (N, K)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def kept(init: Tensor, final: Tensor, criterion: str, density: float, **options: Any) -> Tensor:
    """The mask as bool of the weight's shape."""
    bits = ff.mask_from_criterion(init, final, criterion, density, **options)
    return ff.unpack_mask(bits, init[0].numel()).reshape(init.shape)


# ---- criteria ------------------------------------------------------------------------------------------------------------


def order_of(criterion: str, init: Tensor, final: Tensor, keep: int) -> list[int]:
    """Flat indices, the best first, from the definitions, in Python's own numbers."""
    i, f = init.double().flatten().tolist(), final.double().flatten().tolist()
    n = len(i)
    base = criterion.removesuffix("_same_sign").removesuffix("_diff_sign")

    def cut(values: list[float], rank: int) -> float:
        return sorted(abs(v) for v in values)[rank - 1]

    high = cut(i, n - keep + 1) / cut(f, n - keep + 1)
    low = cut(i, keep) / cut(f, keep)
    score = {
        "large_final": lambda a, b: abs(b),
        "small_final": lambda a, b: -abs(b),
        "large_init": lambda a, b: abs(a),
        "small_init": lambda a, b: -abs(a),
        "large_init_large_final": lambda a, b: min(high * abs(b), abs(a)),
        "small_init_small_final": lambda a, b: -max(low * abs(b), abs(a)),
        "magnitude_increase": lambda a, b: abs(b) - abs(a),
        "movement": lambda a, b: abs(b - a),
    }[base]

    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    def key(index: int) -> tuple[bool, float, int]:
        same = sign(i[index]) == sign(f[index])
        right = base == criterion or same == criterion.endswith("same_sign")
        return not right, -score(i[index], f[index]), index

    return sorted(range(n), key=key)


@pytest.mark.parametrize("shape", [(N, K), (4, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("criterion", [criterion for criterion in CRITERIA if criterion != "random"])
def test_criteria_are_the_definitions(criterion, shape):
    init, final = weights(*shape, dtype=torch.float64)
    n = init.numel()
    for density in (0.02, 0.3, 0.5, 0.77, 1.0):
        keep = n - int((1 - density) * n)
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order_of(criterion, init, final, keep)[:keep]] = True
        assert_same(kept(init, final, criterion, density), expected.reshape(shape), f"density {density}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", [criterion for criterion in CRITERIA if criterion != "random"])
def test_16_bit_weights_are_compared_in_float32(criterion, dtype):
    """Their differences are not rounded to ties."""
    init, final = weights(40, 50, dtype=dtype)
    assert_same(kept(init, final, criterion, 0.3), kept(init.float(), final.float(), criterion, 0.3), "upcast")


def test_equal_weights_are_kept_from_the_front():
    """Every criterion with a score for each weight alone: the lowest flat index wins, also within a sign."""
    init, final = torch.ones(3, 5), torch.ones(3, 5)
    for criterion in CRITERIA:
        if criterion != "random":
            mask = kept(init, final, criterion, 0.4).flatten()
            assert mask.tolist() == [True] * 6 + [False] * 9, criterion
    final[0] = -1
    assert kept(init, final, "large_final_same_sign", 0.4).flatten().nonzero().flatten().tolist() == [5, 6, 7, 8, 9, 10]
    assert kept(init, final, "large_final_diff_sign", 0.4).flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_zeros_have_a_sign_of_their_own():
    init, final = torch.tensor([[0.0, 1.0, 0.0, 2.0]]), torch.tensor([[0.0, 0.0, 3.0, 1.0]])
    assert kept(init, final, "large_final_same_sign", 0.5).tolist() == [[True, False, False, True]]
    assert kept(init, final, "large_final_diff_sign", 0.5).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuts_almost_at_zero(dtype):
    """A factor beyond the dtype's range; of infinite weights there is none."""
    tiny = 1e-42 if dtype == torch.float32 else 1e-310
    init, final = torch.arange(1.0, 9, dtype=dtype).reshape(2, 4), torch.full((2, 4), tiny, dtype=dtype)
    final[0, 0] = 0
    final[1, 3] = 5
    for criterion in ("large_init_large_final", "small_init_small_final"):
        assert kept(init, final, criterion, 0.5).sum() == 4
    assert kept(init, final, "large_init_large_final", 0.25)[1, 3]
    assert not kept(init, final, "large_init_large_final", 0.75)[0, 0]
    endless = torch.full((2, 4), math.inf, dtype=dtype)
    assert kept(endless, endless, "large_init_large_final", 0.5).sum() == 4


def test_cuts_at_zero():
    """Where training left most weights at 0 there is no factor that aligns the cuts."""
    init, final = torch.arange(1.0, 9).reshape(2, 4), torch.zeros(2, 4)
    final[0, 0] = 5
    assert kept(init, final, "large_init_large_final", 0.25).sum() == 2
    assert kept(init, final, "large_init_large_final", 0.25)[0, 0]
    assert kept(init, final, "small_init_small_final", 0.25).flatten().tolist() == [False, True, True] + [False] * 5


def test_random_masks():
    init, final = weights(30, 40)
    first = kept(init, final, "random", 0.3, seed=1)
    assert first.sum() == 1200 - int(0.7 * 1200)
    assert_same(kept(final, init, "random", 0.3, seed=1), first, "whatever the weights")
    assert not torch.equal(kept(init, final, "random", 0.3, seed=2), first)
    one, other = ff.mask_from_criterion([init, init], [final, final], "random", 0.3, seed=1)
    assert not torch.equal(one, other)
    torch.manual_seed(4)
    drawn = kept(init, final, "random", 0.3)
    assert not torch.equal(kept(init, final, "random", 0.3), drawn)
    torch.manual_seed(4)
    assert_same(kept(init, final, "random", 0.3), drawn, "torch.manual_seed")
    # Each place is kept about equally often.
    times = torch.stack([kept(init, final, "random", 0.3, seed=seed) for seed in range(200)]).sum(0)
    assert (times - 60).abs().max() < 6 * math.sqrt(200 * 0.3 * 0.7)


@pytest.mark.parametrize("criterion", [criterion for criterion in CRITERIA if criterion != "random"])
def test_global_scope(criterion):
    """A list of weights as one: layers of smaller numbers lose more."""
    init, final = [torch.randn(4, 6), 0.1 * torch.randn(2, 3, 2, 2)], [torch.randn(4, 6), 0.1 * torch.randn(2, 3, 2, 2)]
    masks = ff.mask_from_criterion(init, final, criterion, 0.35, scope="global")
    assert [tuple(mask.shape) for mask in masks] == [(4, 8), (2, 8)]
    together = torch.cat([mask.flatten() for mask in (ff.unpack_mask(masks[0], 6), ff.unpack_mask(masks[1], 12))])
    joined = [torch.cat([w.flatten() for w in weights])[None] for weights in (init, final)]
    assert_same(together, kept(*joined, criterion, 0.35)[0], "as one weight")
    by_layer = ff.mask_from_criterion(init, final, criterion, 0.35)
    for mask, i, f in zip(by_layer, init, final, strict=True):
        assert_same(mask, ff.mask_from_criterion(i, f, criterion, 0.35), "scope='layer'")
    assert ff.mask_from_criterion([], [], criterion, 0.35, scope="global") == []


def test_takes_parameters():
    layer = nn.Conv2d(4, 6, 3)
    bits = ff.mask_from_criterion(layer.weight, layer.weight, "large_final", 0.25)
    assert not bits.requires_grad
    assert ff.nn.MaskedConv2d.from_conv(layer, bits).mask.sum() == 216 - int(0.75 * 216)


REFUSALS = {
    "criterion": (
        lambda: kept(*weights(), "largest", 0.5),
        ValueError,
        f"criterion must be one of {CRITERIA}, got 'largest'",
    ),
    "scope": (
        lambda: kept(*weights(), "movement", 0.5, scope="model"),
        ValueError,
        "scope must be one of ('layer', 'global'), got 'model'",
    ),
    "nothing kept": (
        lambda: kept(*weights(), "movement", 0.0),
        ValueError,
        "density must lie in (0, 1], got 0.0: it is the fraction kept, 0.9 keeps 90% (hidden-networks calls this sparsity)",
    ),
    "percent": (
        lambda: kept(*weights(), "movement", 20.0),
        ValueError,
        "density must lie in (0, 1], got 20.0: it is the fraction kept, 0.9 keeps 90% (hidden-networks calls this sparsity)",
    ),
    "transposed": (
        lambda: kept(torch.ones(2, 3), torch.ones(3, 2), "movement", 0.5),
        ValueError,
        "w_init (2, 3) and w_final (3, 2) must have one shape; did you mean w_init.t()?",
    ),
    "shape in a list": (
        lambda: ff.mask_from_criterion([torch.ones(2, 3)] * 2, [torch.ones(2, 3), torch.ones(2, 4)], "movement", 0.5),
        ValueError,
        "w_init (2, 3) and w_final (2, 4) at 1 must have one shape",
    ),
    "lengths": (
        lambda: ff.mask_from_criterion([torch.ones(2, 3)] * 2, [torch.ones(2, 3)], "movement", 0.5),
        ValueError,
        "w_init is a list of 2 and w_final a list of 1; pass two Tensors, or two lists of one length",
    ),
    "tensor and list": (
        lambda: ff.mask_from_criterion(torch.ones(2, 3), [torch.ones(2, 3)], "movement", 0.5),
        ValueError,
        "w_init is a Tensor and w_final a list of 1; pass two Tensors, or two lists of one length",
    ),
    "global of one": (
        lambda: kept(*weights(), "movement", 0.5, scope="global"),
        ValueError,
        "scope='global' ranks a list of weights together, got one Tensor; pass two lists",
    ),
    "integers": (
        lambda: kept(torch.ones(2, 3).int(), torch.ones(2, 3), "movement", 0.5),
        TypeError,
        "w_init must be float16, bfloat16, float32 or float64, got int32",
    ),
    "no tensor": (
        lambda: ff.mask_from_criterion(nn.Linear(2, 2), torch.ones(2, 2), "movement", 0.5),
        TypeError,
        "w_init must be a Tensor or a list of them, got Linear",
    ),
    "vector": (
        lambda: kept(torch.ones(3), torch.ones(3), "movement", 0.5),
        ValueError,
        "w_init must be [N, K] or have a convolution weight's shape, got (3,)",
    ),
    "NaN": (
        lambda: kept(torch.ones(2, 3), torch.tensor([[1, 2, 3], [4, float("nan"), float("nan")]]), "movement", 0.5),
        ValueError,
        "w_final holds 2 NaN, the first at flat index 4",
    ),
    "NaN in a list": (
        lambda: ff.mask_from_criterion([torch.ones(1, 1), torch.tensor([[math.nan]])], [torch.ones(1, 1)] * 2, "movement", 1),
        ValueError,
        "w_init[1] holds 1 NaN, the first at flat index 0",
    ),
    "seed": (
        lambda: kept(*weights(), "movement", 0.5, seed=1),
        ValueError,
        "seed goes with criterion 'random', got 'movement'",
    ),
    "seed of a float": (lambda: kept(*weights(), "random", 0.5, seed=1.0), TypeError, "seed must be an int, got 1.0"),
    "seed below": (
        lambda: kept(*weights(), "random", 0.5, seed=-1),
        ValueError,
        "seed must lie in 0..2**64-1, got -1",
    ),
    "devices": (
        lambda: kept(torch.ones(2, 3), torch.ones(2, 3, device="meta"), "movement", 0.5),
        ValueError,
        "w_final is on meta, without values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_mask_from_criterion_refuses(case):
    call, error, message = REFUSALS[case]
    assert_refused(error, f"mask_from_criterion: {message}", call)


# ---- the loop ------------------------------------------------------------------------------------------------------------


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, groups=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3)
    )


def shake(net: nn.Module) -> str:
    """A training whose result doesn't matter: one that pushes every Parameter, with momentum and decay."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    net.train()
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 1, 6, 6)).square().sum().backward()
        optimizer.step()
    return "shaken"


def masked_layers(net: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in net.named_modules() if isinstance(m, (ff.nn.MaskedLinear, ff.nn.MaskedConv2d))}


def test_ticket():
    """Trained rounds + 1 times; a fifth of what is left goes each time, never to come back; the model given is as it was."""
    net = small_net().eval()
    before = copy.deepcopy(net.state_dict())
    seen: list[dict[str, Tensor]] = []

    def train(model: nn.Module) -> str:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return shake(model)

    ticket, history = ff.prune_and_rewind(net, train, rounds=3, rate=0.2, criterion="large_final")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and not net.training
    assert type(net[0]) is nn.Conv2d
    assert list(masked_layers(ticket)) == ["0", "4", "6"] and len(history) == len(seen) == 4
    assert [entry.result for entry in history] == ["shaken"] * 4

    counts = {"0": 36, "4": 1280, "6": 60}
    for number, (entry, state) in enumerate(zip(history, seen, strict=True)):
        assert entry.density == pytest.approx(sum(counts.values()) / 1376)
        for name, count in counts.items():
            weight = before[f"{name}.weight"]
            mask = ff.unpack_mask(entry.masks[name], weight[0].numel()).reshape(weight.shape)
            assert mask.sum() == count
            # Rewound to the first values, and zero off the mask.
            assert_same(state[f"{name}.weight"], weight * mask, f"weight {name} in round {number}")
            assert_same(state[f"{name}.bias"], before[f"{name}.bias"], "bias")
            counts[name] -= int(0.2 * count)
        for name in ("1.running_mean", "1.running_var", "1.weight", "1.num_batches_tracked"):
            assert_same(state[name], before[name], name)
    for earlier, later in pairwise(history):
        for name in counts:
            assert not (later.masks[name] & ~earlier.masks[name]).any()
    for layer in masked_layers(ticket).values():
        assert (layer.weight[~layer.mask] == 0).all() and (layer.weight[layer.mask] != 0).all()
    assert_same(masked_layers(ticket)["4"].mask_bits, history[-1].masks["4"], "the last mask")


def test_first_pruning_is_the_criterions():
    net = small_net()
    after: dict[str, Tensor] = {}

    def train(model: nn.Module) -> None:
        shake(model)
        after.update({name: layer.weight.detach().clone() for name, layer in masked_layers(model).items() if name not in after})

    for criterion in ("large_final", "magnitude_increase_same_sign", "large_init_large_final"):
        after.clear()
        _, history = ff.prune_and_rewind(net, train, rounds=1, rate=0.5, criterion=criterion)
        for name in ("0", "4", "6"):
            weight = net.get_submodule(name).weight
            assert_same(history[1].masks[name], ff.mask_from_criterion(weight, after[name], criterion, 0.5), criterion)


def test_pruned_weights_are_not_ranked_again():
    """small_final likes zeros, and those it dropped are zero."""
    net = nn.Sequential(nn.Linear(10, 10))
    _, history = ff.prune_and_rewind(net, lambda model: None, rounds=3, rate=0.5, criterion="small_final")
    order = net[0].weight.detach().abs().flatten().argsort(stable=True)
    for entry, count in zip(history, (100, 50, 25, 13), strict=True):
        assert sorted(order[:count].tolist()) == ff.unpack_mask(entry.masks["0"], 10).flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("rewind", ["init", "reinit", "none", "state_dict"])
def test_rewind(rewind):
    net = small_net()
    early = copy.deepcopy(net)
    shake(early)
    starts: list[Tensor] = []
    ends: list[Tensor] = []

    def train(model: nn.Module) -> None:
        starts.append(model[4].weight.detach().clone())
        shake(model)
        ends.append(model[4].weight.detach().clone())

    option = early.state_dict() if rewind == "state_dict" else rewind
    ticket, history = ff.prune_and_rewind(net, train, rounds=2, rate=0.3, criterion="large_final", rewind=option)
    assert_same(starts[0], net[4].weight, "the first training begins from the model")
    for number in (1, 2):
        mask = ff.unpack_mask(history[number].masks["4"], 64)
        if rewind == "reinit":
            assert (starts[number][~mask] == 0).all() and (starts[number][mask] != 0).all()
            for other in (net[4].weight, ends[number - 1], *starts[:number]):
                assert not (starts[number] == other)[mask].any()
        else:
            source = {"init": net[4].weight, "none": ends[number - 1], "state_dict": early[4].weight}[rewind]
            assert_same(starts[number], source * mask, f"round {number}")
    assert ticket[4].mask.sum() == 1280 - 384 - 268


def test_rates_by_layer_and_global():
    net = small_net()
    ticket, history = ff.prune_and_rewind(net, shake, rounds=2, rate={"4": 0.5, "6": 0.1}, criterion="movement")
    assert [int(layer.mask.sum()) for layer in masked_layers(ticket).values()] == [36, 320, 49]
    assert list(history[-1].masks) == ["4", "6"] and history[-1].density == pytest.approx((320 + 49) / 1340)

    ticket, history = ff.prune_and_rewind(net, shake, rounds=1, rate=0.4, criterion="large_final", scope="global")
    counts = [int(layer.mask.sum()) for layer in masked_layers(ticket).values()]
    assert sum(counts) == 1376 - int(0.4 * 1376) and counts[0] > 0.6 * 36  # a convolution's weights are larger


def test_random_pruning_with_a_seed():
    net = small_net()
    runs = [ff.prune_and_rewind(net, shake, rounds=2, rate=0.4, criterion="random", seed=seed)[1] for seed in (3, 3, 4)]
    assert_same(runs[0][2].masks["4"], runs[1][2].masks["4"], "the same seed")
    assert not torch.equal(runs[0][2].masks["4"], runs[2][2].masks["4"])


def test_masked_layers_go_on_from_their_masks():
    """And a shared module stays shared."""
    shared = nn.Linear(8, 8)
    given = ff.nn.MaskedLinear(8, 8, mask=torch.eye(8).bool())
    net = nn.Sequential(shared, given, shared)
    ticket, history = ff.prune_and_rewind(net, lambda model: None, rounds=1, rate=0.25, criterion="large_final")
    assert ticket[0] is ticket[2] and list(history[0].masks) == ["0", "1"]
    assert ticket[1].mask.sum() == 6 and not (ticket[1].mask & ~torch.eye(8).bool()).any()
    assert given.mask.sum() == 8
    alone, _ = ff.prune_and_rewind(nn.Linear(8, 8), lambda model: None, rounds=1, rate=0.25, criterion="large_final")
    assert isinstance(alone, ff.nn.MaskedLinear) and alone.mask.sum() == 48


def test_layers_whose_forward_is_not_called_are_pruned_too():
    """torch's fused encoder layer reads the weights itself in eval mode; they are zero off the mask."""
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    ticket, _ = ff.prune_and_rewind(net, lambda model: None, rounds=1, rate=0.5, criterion="large_final")
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(ticket.eval()(x), ticket.train()(x))


class Reads(nn.Module):
    """Has layers, and reads their weights itself."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(nn.functional.linear(x, self.first.weight))


def test_a_weight_trained_without_its_layer_is_told():
    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    with pytest.warns(
        UserWarning, match=r"prune_and_rewind: training changed 32 weights of first off its mask; a model that reads"
    ):
        ticket, _ = ff.prune_and_rewind(Reads(), train, rounds=1, rate=0.5)
    assert not ticket.first.weight[~ticket.first.mask].any()


def test_parametrized_layers_are_refused_where_they_would_be_pruned():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 3))
    with pytest.raises(
        ValueError, match="prune_and_rewind: the weight of 0 is parametrized, so it cannot be pruned; take that"
    ):
        ff.prune_and_rewind(model, lambda model: None, rounds=1, rate=0.5)
    ticket, _ = ff.prune_and_rewind(model, lambda model: None, rounds=1, rate={"2": 0.5})
    assert ticket[2].mask.sum() == 24


def test_a_model_that_cannot_be_copied_is_named():
    class Keeps(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.seen = self.weight * 2

    with pytest.raises(ValueError, match=r"prune_and_rewind: Keeps cannot be copied \(Only Tensors created explicitly"):
        ff.prune_and_rewind(Keeps(), lambda model: None, rounds=1, rate=0.5)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_progress(monkeypatch, progress):
    pytest.importorskip("tqdm", reason="the bar needs tqdm; run: pip install tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    ff.prune_and_rewind(small_net(), shake, rounds=2, rate=0.5, criterion="movement", progress=progress)
    shown = sys.stderr.getvalue()
    assert ("3/3" in shown and "density=0.25" in shown) == progress and bool(shown) == progress


def call_with(**changes: Any) -> Callable[[], Any]:
    options = {"rounds": 1, "rate": 0.2, "criterion": "large_final", **changes}
    model, train = options.pop("model", small_net()), options.pop("train_fn", shake)
    return lambda: ff.prune_and_rewind(model, train, **options)


class NoReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))


LOOP_REFUSALS = [
    ({"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
    ({"train_fn": None}, TypeError, "train_fn must be a function of the model, got NoneType"),
    ({"rounds": 0}, ValueError, "rounds must be at least 1, got 0"),
    ({"rounds": 1.0}, TypeError, "rounds must be an int, got 1.0"),
    ({"rate": 20}, ValueError, "rate must lie in (0, 1), got 20: it is the fraction dropped, 0.2 keeps 80%"),
    ({"rate": {"4": 0.0}}, ValueError, "rate must lie in (0, 1), got 0.0: it is the fraction dropped, 0.2 keeps 80%"),
    ({"rate": "0.2"}, TypeError, "rate must be a number, got '0.2'"),
    (
        {"rate": {"fc": 0.2}},
        ValueError,
        "rate names 'fc', which is no Linear or Conv2d of the model; there are ['0', '4', '6']",
    ),
    (
        {"rate": {"4": 0.2}, "scope": "global"},
        ValueError,
        "scope='global' drops one fraction of all layers together; pass rate as a number",
    ),
    ({"scope": "all"}, ValueError, "scope must be one of ('layer', 'global'), got 'all'"),
    ({"rewind": "start"}, ValueError, "rewind must be one of ('init', 'reinit', 'none'), got 'start'"),
    ({"rewind": {}}, ValueError, "the state_dict of rewind has no '0.weight'; pass model.state_dict() of an early step"),
    (
        {"rewind": {**small_net().state_dict(), "6.bias": torch.zeros(4)}},
        ValueError,
        "'6.bias' in the state_dict of rewind has shape (4,); expected (3,)",
    ),
    ({"seed": 1}, ValueError, "seed goes with criterion 'random', got 'large_final'"),
    ({"criterion": "big"}, ValueError, f"criterion must be one of {CRITERIA}, got 'big'"),
    ({"model": nn.ReLU()}, ValueError, "ReLU has no Linear or Conv2d to prune"),
    (
        {"model": NoReset(), "rewind": "reinit"},
        ValueError,
        "rewind='reinit' calls reset_parameters, which the model (NoReset) has not",
    ),
    (
        {"train_fn": lambda model: model[6].weight.data[0, :2].fill_(float("nan"))},
        ValueError,
        "training left 2 NaN in the weights of 6",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), LOOP_REFUSALS, ids=[case[2][:40] for case in LOOP_REFUSALS])
def test_prune_and_rewind_refuses(changes, error, message):
    assert_refused(error, f"prune_and_rewind: {message}", call_with(**changes))


# ---- what the papers found, on digits ------------------------------------------------------------------------------------


def example(name: str) -> ModuleType:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's; run: pip install scikit-learn")
    pytest.importorskip("tqdm", reason="the example needs tqdm; run: pip install tqdm")
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)  # on a busy machine two of them mostly wait for each other
    return module


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_masks_of_training_are_worth_something_on_their_own():
    """Zhou et al., figure 6: an untrained network under large_final_same_sign > large_final > random; random is chance."""
    digits = example("lottery_ticket_digits")
    images, labels, *tested = digits.digits()
    right: dict[str, list[float]] = {"large_final_same_sign": [], "large_final": [], "random": []}
    for seed in range(3):
        torch.manual_seed(seed)
        untrained = digits.build()
        trained = copy.deepcopy(untrained)
        digits.train(trained, images, labels, 50)
        for criterion, shares in right.items():
            shares.append(digits.accuracy(digits.masked(untrained, trained, criterion, 0.7, seed), *tested))
    same_sign, large, random = map(mean, right.values())
    assert same_sign > large + 0.01
    assert same_sign > 0.85
    assert large > random + 0.5
    assert random < 0.2


def supermask_gap(seeds: range) -> tuple[float, float]:
    """Test digits right: of trained weights, and of a learned mask."""
    digits = example("supermask_digits")
    images, labels, *tested = digits.digits()
    right = {}
    for build in (digits.plain_net, digits.supermask_net):
        shares = []
        for seed in seeds:
            torch.manual_seed(seed)
            net = build()
            digits.train(net, images, labels)
            shares.append(digits.accuracy(net, *tested))
        right[build] = mean(shares)
    return right[digits.plain_net], right[digits.supermask_net]


def test_a_learned_mask_is_as_good_as_trained_weights():
    trained, masked = supermask_gap(range(1))
    assert trained > 0.95
    assert masked > trained - 0.02


@pytest.mark.slow
def test_learned_masks_are_as_good_as_trained_weights():
    """Mean of seeds 0 to 4."""
    trained, masked = supermask_gap(range(5))
    assert trained > 0.95
    assert masked > trained - 0.02


@pytest.mark.slow
def test_rescaling_and_signs_help():
    """Zhou et al., table 1: each of them raises what a learned mask reaches."""
    digits = example("supermask_digits")
    images, labels, *tested = digits.digits()
    right = {}
    for options in ((True, "dwr"), (True, None), (False, "dwr"), (False, None)):
        shares = []
        for seed in range(5):
            torch.manual_seed(seed)
            net = digits.supermask_net(*options)
            digits.train(net, images, labels)
            shares.append(digits.accuracy(net, *tested))
        right[options] = mean(shares)
    assert right[True, "dwr"] > right[True, None] + 0.01
    assert right[False, "dwr"] > right[False, None] + 0.01
    assert right[True, None] > right[False, None]


def test_many_tasks_on_one_network():
    """Wortsman et al.: 20 permutations of digits; nothing is forgotten, to the bit, and the task is told from 16 of them."""
    supsup = example("supsup_permuted_digits")
    torch.manual_seed(0)
    images, labels, test_images, test_labels = supsup.digits()
    layers = supsup.frozen_layers()
    frozen = [layer.weight.clone() for layer in layers]
    bank = supsup.Net([ff.nn.SuperposedLinear.from_linear(layer) for layer in layers])
    orders, alone = [], []
    for _ in range(20):
        orders.append(torch.randperm(64))
        net = supsup.learned(layers, images[:, orders[-1]], labels, 5)
        supsup.learn_task(bank, net)
        alone.append(net(test_images[:, orders[-1]]).detach())
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(bank.layers, frozen, strict=True))
    for task, order in enumerate(orders):
        assert_same(bank(test_images[:, order], task).detach(), alone[task], f"task {task}")
    right = [supsup.accuracy(bank, test_images[:, order], test_labels, task) for task, order in enumerate(orders)]
    assert min(right) > 0.9
    assert mean(right) > 0.95
    wrong = supsup.accuracy(bank, test_images[:, orders[0]], test_labels, 1)
    assert wrong < 0.5  # it is the mask that knows the task
    assert supsup.inferred(bank, orders, test_images, batch=16, batches=10) >= 0.99


@pytest.mark.slow
def test_a_ticket_outlives_weights_drawn_anew():
    """Frankle and Carbin: at a few percent of the weights it is the first values that make the difference."""
    digits = example("lottery_ticket_digits")
    images, labels, *tested = digits.digits()

    def train(net: nn.Module) -> float:
        digits.train(net, images, labels, 10)
        return digits.accuracy(net, *tested)

    last = {}
    for rewind in ("init", "reinit"):
        torch.manual_seed(0)
        _, history = ff.prune_and_rewind(
            digits.build(), train, rounds=14, rate={"0": 0.2, "2": 0.2, "4": 0.1}, criterion="large_final", rewind=rewind
        )
        last[rewind] = mean([entry.result for entry in history[-3:]])
        assert history[-1].density < 0.05
    assert last["init"] > last["reinit"] + 0.01


def test_prune_and_rewind_keeps_shared_modules_and_hooks():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU())
    model.again = model[0]
    called = []
    model[0].register_forward_hook(lambda *_: called.append(1))
    ticket, history = ff.prune_and_rewind(model, lambda m: m(torch.randn(2, 16)), rounds=2, rate=0.5)
    assert [r.density for r in history] == [1, 0.5, 0.25]
    assert ticket.again is ticket[0]
    assert len(called) == 6  # again is a child too, and called as one


def test_weights_tied_to_another_module_stay_off_the_mask():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = torch.nn.Embedding(10, 8), torch.nn.Linear(8, 10, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, x):
            return self.out(self.embedding(x))

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.arange(10)).square().sum().backward()
        optimizer.step()

    ticket, _ = ff.prune_and_rewind(Tied(), train, rounds=1, rate=0.5)
    assert ticket.embedding.weight is ticket.out.weight
    assert not ticket.out.weight[~ticket.out.mask].any()


def test_prune_and_rewind_names_a_pruned_layer():
    model = torch.nn.Sequential(torch.nn.Linear(20, 10))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"prune_and_rewind: 0 is pruned by torch\.nn\.utils\.prune; take it over first"):
        ff.prune_and_rewind(model, lambda model: None, rounds=1, rate=0.5)
