"""The layers under masks: drop-in for torch.nn's, taking over pruned layers and old checkpoints."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import battery
import fourfold as ff
import pytest
import torch
import torch.nn.functional as F
from battery import assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

N, K = 6, 70  # a row is 16 bytes with 58 pad bits


def assert_refused(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    """Word for word."""
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def assert_not_loaded(layer: nn.Module, state: dict[str, Tensor], message: str) -> None:
    """And the layer is as it was."""
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(state)
    assert message in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def some_mask(*shape: int, density: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def pruned(layer: nn.Module, name: str = "weight") -> nn.Module:
    return prune.random_unstructured(layer, name, amount=0.4)


def close(actual: Tensor, expected: Tensor) -> None:
    """Up to the order of additions."""
    rtol = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}.get(actual.dtype, 1e-5)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def layers() -> list[tuple[nn.Module, Tensor]]:
    """Each with an input."""
    x, image = torch.randn(5, K), torch.randn(2, 4, 7, 8)
    conv = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "circular"}
    return [
        (ff.nn.MaskedLinear(K, N, mask=some_mask(N, K)), x),
        (ff.nn.MaskedConv2d(4, 6, 3, **conv, mask=some_mask(6, 18)), image),
        (ff.nn.SupermaskLinear(K, N, rescale="dwr"), x),
        (ff.nn.SupermaskConv2d(4, 6, 3, **conv, sampler="topk", density=0.3, signed=True), image),
        (ff.nn.SparseLinear.from_linear(nn.Linear(K, N), some_mask(N, K, density=0.2)), x),
        (ff.nn.SuperposedLinear.from_linear(nn.Linear(K, N), some_mask(3, N, K)), x),
    ]


LAYERS = [type(layer).__name__ for layer, _ in layers()]


@pytest.fixture(params=range(len(LAYERS)), ids=LAYERS)
def layer_and_input(request):
    return layers()[request.param]


# ---- taken over from torch.nn's layers -----------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", battery.FLOATING)
def test_masked_layers_share_parameters(dtype):
    linear, mask = nn.Linear(K, N, dtype=dtype).eval(), some_mask(N, K)
    x = torch.randn(3, 5, K).to(dtype)
    for given in (mask, ff.pack_mask(mask)):
        layer = ff.nn.MaskedLinear.from_linear(linear, given)
        assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
        assert_same(layer.mask, mask, "mask")
        close(layer(x), F.linear(x, linear.weight * mask, linear.bias))
    close(ff.nn.MaskedLinear.from_linear(linear)(x), linear(x))

    image = torch.randn(2, 4, 7, 8).to(dtype)
    for mode in ("zeros", "reflect", "replicate", "circular"):
        for options in ({"padding": "same"}, {"padding": (2, 1), "stride": 2, "dilation": 2, "groups": 2, "bias": False}):
            conv = nn.Conv2d(4, 6, 3, padding_mode=mode, dtype=dtype, **options)
            mask = some_mask(*conv.weight.shape)
            for given in (mask, mask.flatten(1), ff.pack_mask(mask)):
                layer = ff.nn.MaskedConv2d.from_conv(conv, given)
                assert layer.weight is conv.weight and layer.bias is conv.bias and layer.training
            plain = copy.deepcopy(conv)
            plain.weight.data.mul_(mask)
            for x in (image, image[0]):
                close(layer(x), plain(x))


def test_frozen_weights_are_copies():
    """The layer that they come from may go on training; its bias, which trains in both, is one Parameter."""
    linear = nn.Linear(K, N).eval()
    for layer in (ff.nn.SupermaskLinear.from_linear(linear), ff.nn.SuperposedLinear.from_linear(linear, some_mask(2, N, K))):
        assert_same(layer.weight, linear.weight, "weight")
        assert layer.weight is not linear.weight and layer.weight.data_ptr() != linear.weight.data_ptr()
        assert not layer.weight.requires_grad and layer.bias is linear.bias and layer.bias.requires_grad and not layer.training
    conv = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64)
    layer = ff.nn.SupermaskConv2d.from_conv(conv, sampler="threshold")
    assert layer.weight.dtype == layer.scores.dtype == torch.float64 and layer.groups == 2 and layer.bias is conv.bias
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias", "scores"]


def test_optimizers_and_tied_weights_go_on():
    first, second = nn.Linear(K, K), nn.Linear(K, K)
    second.weight = first.weight
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    layer = ff.nn.MaskedLinear.from_linear(first, some_mask(K, K))
    before = second.weight.clone()
    layer(torch.randn(3, K)).sum().backward()
    optimizer.step()
    moved = second.weight != before
    assert moved.any() and not (moved & ~layer.mask).any()


@pytest.mark.parametrize("bias", [True, False])
def test_from_pruned(bias):
    """Of torch.nn.utils.prune; which keeps its hooks, its masks and its Parameters."""
    x, image = torch.randn(5, K), torch.randn(2, 4, 7, 8)
    for plain, take, given in (
        (nn.Linear(K, N, bias), ff.nn.MaskedLinear.from_pruned, x),
        (nn.Conv2d(4, 6, 3, bias=bias), ff.nn.MaskedConv2d.from_pruned, image),
    ):
        layer = pruned(plain).eval()
        expected, names, hooks = layer(given), list(layer.state_dict()), dict(layer._forward_pre_hooks)
        new = take(layer)
        close(new(given), expected)
        assert new.weight is layer.weight_orig and new.bias is layer.bias and not new.training
        assert_same(new.mask, layer.weight_mask.bool(), "mask")
        assert list(layer.state_dict()) == names and layer._forward_pre_hooks == hooks
        assert_same(layer(given), expected, "the pruned layer")
    layer = pruned(nn.Linear(K, N, bias))
    sparse = ff.nn.SparseLinear.from_pruned(layer)
    close(sparse(x), layer(x))
    assert sparse.values.shape == (int(layer.weight_mask.sum()),) and sparse.bias is layer.bias


def test_from_refuses():
    linear = nn.Linear(K, N)
    for cls in (ff.nn.MaskedLinear, ff.nn.SupermaskLinear, ff.nn.SuperposedLinear):
        name = f"{cls.__name__}.from_linear"
        message = (
            f"{name}: expected Linear, got Conv2d; a layer that is lazy or parametrized must be made an ordinary one first"
        )
        assert_refused(TypeError, message, lambda cls=cls: cls.from_linear(nn.Conv2d(1, 1, 1)))
        message = (
            f"{name}: weight of the Linear is not a Parameter; a pruned layer is for MaskedLinear.from_pruned, "
            "MaskedConv2d.from_pruned and SparseLinear.from_pruned, and weight norm must be made permanent first"
        )
        assert_refused(TypeError, message, lambda cls=cls: cls.from_linear(pruned(nn.Linear(K, N))))
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match="expected Conv2d, got ParametrizedConv2d"):
        ff.nn.SupermaskConv2d.from_conv(normed)
    assert_refused(
        ValueError,
        "MaskedLinear.from_pruned: the Linear has no weight_orig and weight_mask; prune it with torch.nn.utils.prune",
        lambda: ff.nn.MaskedLinear.from_pruned(linear),
    )
    assert_refused(
        TypeError,
        "MaskedConv2d.from_pruned: expected a pruned Conv2d, got Linear",
        lambda: ff.nn.MaskedConv2d.from_pruned(pruned(linear)),
    )
    # A bias has a mask of its own, and a layer here has none for it: it would come back.
    assert_refused(
        ValueError,
        "MaskedLinear.from_pruned: the bias is pruned too, and a mask here is the weight's; make that permanent with "
        "torch.nn.utils.prune.remove(layer, 'bias')",
        lambda: ff.nn.MaskedLinear.from_pruned(pruned(linear, "bias")),
    )


# ---- masks ---------------------------------------------------------------------------------------------------------------


def test_wrong_masks():
    linear = nn.Linear(300, 784)
    name = "MaskedLinear.from_linear"
    assert_refused(
        ValueError,
        f"{name}: mask shape (300, 784) does not match weight shape (784, 300); did you mean mask.t()?",
        lambda: ff.nn.MaskedLinear.from_linear(linear, some_mask(300, 784)),
    )
    soft = torch.ones(784, 300)
    soft[1, 5] = 0.3
    assert_refused(
        TypeError,
        f"{name}: mask must be bool or packed uint8, got float32 with 0.3 at flat index 305; a mask keeps or drops: for soft "
        "masks use superposed_linear or multiply the weight (see docs/maskmm.md#masks)",
        lambda: ff.nn.MaskedLinear.from_linear(linear, soft),
    )
    bits = ff.pack_mask(some_mask(784, 301))
    bits[:, 37] |= 1 << 4
    message = f"{name}: mask has bits set beyond its 300 columns, which must be zero; pack with pack_mask"
    assert_refused(ValueError, message, lambda: ff.nn.MaskedLinear.from_linear(linear, bits))
    message = f"{name}: packed mask for weight (784, 300) must be (784, 40), got (784, 48) (see docs/maskmm.md#masks)"
    other = ff.pack_mask(some_mask(784, 350))
    assert_refused(ValueError, message, lambda: ff.nn.MaskedLinear.from_linear(linear, other))
    layer = ff.nn.MaskedLinear(K, N)
    message = "MaskedLinear.set_mask: mask shape (6, 69) does not match weight shape (6, 70)"
    assert_refused(ValueError, message, lambda: layer.set_mask(some_mask(N, 69)))
    assert layer.mask.all()


def test_masks_are_the_layers_own():
    bits = ff.pack_mask(some_mask(N, K))
    layer = ff.nn.MaskedLinear(K, N, mask=bits)
    bits.zero_()
    assert layer.mask.any()
    mask, place = some_mask(N, K, seed=1), layer.mask_bits.data_ptr()
    layer.set_mask(mask)
    assert_same(layer.mask, mask, "set_mask")
    assert layer.mask_bits.data_ptr() == place  # a compiled graph or an optimizer hook reads the new one


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
    ids=["momentum", "momentum and decay", "AdamW"],
)
def test_optimizers_cannot_revive_a_pruned_weight(optimizer):
    """Pruned in the middle of training, while momentum still pushes: what the layer computes with stays 0 off the mask.

    From then on gradients are exactly 0 there. Momentum and decay may go on changing what the Parameter holds; it doesn't show.
    """
    layer = ff.nn.MaskedLinear(K, N)
    steps = optimizer(layer.parameters())
    mask = some_mask(N, K)
    for step in range(8):
        if step == 3:
            layer.set_mask(mask)
        steps.zero_grad()
        layer(torch.randn(20, K)).square().sum().backward()
        steps.step()
    assert (layer.weight.grad[~mask] == 0).all() and (layer.weight.grad[mask] != 0).all()
    assert (layer.weight[~mask] != 0).all()  # the optimizer did push
    assert (layer.to_linear().weight[~mask] == 0).all()
    x = torch.randn(4, K)
    close(layer(x), F.linear(x, layer.weight * mask, layer.bias))


def test_momentum_leaves_pruned_weights_alone():
    """Pruned before training, and without decay, the Parameter keeps its first values there to the bit."""
    layer = ff.nn.MaskedLinear(K, N, mask=some_mask(N, K))
    before = layer.weight.clone()
    steps = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        steps.zero_grad()
        layer(torch.randn(20, K)).square().sum().backward()
        steps.step()
    same = layer.weight == before
    assert same[~layer.mask].all() and not same[layer.mask].any()


def test_weights_frozen_at_their_first_values():
    """What a published layer does with masked-off weights is a second masked layer; a bias is never masked."""
    trained, first, mask, x = nn.Linear(K, N), torch.randn(N, K), some_mask(N, K), torch.randn(4, K)
    expected = F.linear(x, torch.where(mask, trained.weight, first), trained.bias)
    frozen = ff.masked_linear(x, first, ~mask)
    close(ff.nn.MaskedLinear.from_linear(trained, mask)(x) + frozen, expected)


# ---- checkpoints ---------------------------------------------------------------------------------------------------------


def test_state_dicts_hold_bits():
    layer = ff.nn.MaskedLinear(784, 300)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "weight": (300, 784), "bias": (300,), "mask_bits": (300, 104),
    }  # fmt: skip
    assert layer.mask_bits.dtype == torch.uint8
    assert list(ff.nn.SupermaskConv2d(1, 1, 1).state_dict()) == ["weight", "bias", "scores"]
    sparse = ff.nn.SparseLinear.from_linear(nn.Linear(K, N), some_mask(N, K))
    assert sorted(sparse.state_dict()) == ["bias", "mask_bits", "values"]
    bank = ff.nn.SuperposedLinear(K, N, masks=some_mask(3, N, K))
    assert sorted(bank.state_dict()) == ["alpha", "bias", "mask_bits", "weight"]


@pytest.mark.parametrize("kind", ["prune", "bool", "float"])
def test_loads_old_checkpoints(kind):
    """And leaves the state_dict as it is."""
    linear, mask, x = nn.Linear(K, N), some_mask(N, K), torch.randn(4, K)
    if kind == "prune":
        state = dict(prune.custom_from_mask(copy.deepcopy(linear), "weight", mask).state_dict())
        assert "weight_orig" in state and state["weight_mask"].dtype == torch.float32
    else:
        state = {**linear.state_dict(), "mask": mask if kind == "bool" else mask.float()}
    state = {f"0.{name}": value for name, value in state.items()}
    names = list(state)
    model = nn.Sequential(ff.nn.MaskedLinear(K, N))
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    assert list(state) == names
    assert_same(model[0].mask, mask, "mask")
    assert_same(model[0].weight, linear.weight, "weight")
    close(model(x), F.linear(x, linear.weight * mask, linear.bias))


def test_loads_a_pruned_convolution():
    conv, image = pruned(nn.Conv2d(4, 6, 3, groups=2)), torch.randn(2, 4, 7, 8)
    layer = ff.nn.MaskedConv2d(4, 6, 3, groups=2)
    layer.load_state_dict(conv.state_dict())
    close(layer(image), conv(image))


def test_refuses_wrong_checkpoints():
    layer, good = ff.nn.MaskedLinear(K, N), dict(ff.nn.MaskedLinear(K, N, mask=some_mask(N, K)).state_dict())
    padded = good["mask_bits"].clone()
    padded[2, 15] = 1
    assert_not_loaded(
        layer,
        {**good, "mask_bits": padded},
        "MaskedLinear: mask_bits has bits set beyond its 70 columns, which must be zero; pack with pack_mask",
    )
    other = ff.pack_mask(some_mask(N, 64))
    message = "MaskedLinear: mask_bits (6, 8) are not of K=70 columns, which take 16 bytes a row"
    assert_not_loaded(layer, {**good, "mask_bits": other}, message)
    message = "MaskedLinear: mask_bits must be uint8, got int32"
    assert_not_loaded(layer, {**good, "mask_bits": good["mask_bits"].int()}, message)
    message = "size mismatch for mask_bits"
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({**good, "mask_bits": ff.pack_mask(some_mask(N + 1, K))})
    plain = {name: good[name] for name in ("weight", "bias")}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "mask_bits"'):
        layer.load_state_dict(plain)
    soft = torch.full((N, K), 0.5)
    message = "MaskedLinear: mask must be bool or packed uint8, got float32 with 0.5 at flat index 0; a mask keeps or drops"
    assert_not_loaded(layer, {**plain, "mask": soft}, message)
    message = "MaskedLinear: mask shape (70, 6) does not match weight shape (6, 70); did you mean mask.t()?"
    assert_not_loaded(layer, {**plain, "mask": some_mask(K, N)}, message)
    both = pruned(pruned(nn.Linear(K, N)), "bias").state_dict()
    message = "MaskedLinear: the checkpoint's bias is pruned too, and a mask here is the weight's; save it after"
    assert_not_loaded(layer, both, message)


def test_loads_scores_of_the_reference_layers():
    """Whose layers hold `weight` and `scores` too."""
    state = {"weight": torch.randn(6, 4, 3, 3), "scores": torch.randn(6, 4, 3, 3)}
    layer = ff.nn.SupermaskConv2d(4, 6, 3, bias=False, sampler="topk", density=0.3).eval()
    layer.load_state_dict(state)
    keep = state["scores"].abs() >= state["scores"].abs().flatten().topk(216 - int(0.7 * 216)).values[-1]
    x = torch.randn(2, 4, 7, 8)
    close(layer(x), F.conv2d(x, state["weight"] * keep))


# ---- learned masks -------------------------------------------------------------------------------------------------------


def test_density_is_the_fraction_kept():
    """`sparsity` in hidden-networks; of 101 weights 0.9 drops int(0.1 * 101) = 10."""
    layer = ff.nn.SupermaskLinear(101, 1, sampler="topk", density=0.9)
    assert ff.unpack_mask(layer.make_mask(), 101).sum() == 91
    for density in (0.0, 1.5, 90.0):
        assert_refused(
            ValueError,
            f"SupermaskLinear: density must lie in (0, 1], got {density}: it is the fraction kept, 0.9 keeps 90% "
            "(hidden-networks calls this sparsity)",
            lambda density=density: ff.nn.SupermaskLinear(K, N, sampler="topk", density=density),
        )


def test_eval_masks_are_not_drawn():
    """A published layer draws at test time too; here only eval_mask="sample" does."""
    x = torch.randn(5, K)
    layer = ff.nn.SupermaskLinear(K, N, rescale="dwr")
    with torch.no_grad():
        layer.scores[0, 0] = 0.0  # half is enough
        layer.scores[0, 1] = -0.0
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    kept = layer.scores >= 0
    assert_same(layer(x), layer(x), "twice")
    assert_same(ff.unpack_mask(layer.make_mask(), K), kept, "mask")
    close(layer(x), F.linear(x, layer.weight * kept * (kept.numel() / kept.sum()), layer.bias))

    layer = ff.nn.SupermaskLinear(K, N, eval_mask="sample").eval()
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert_same(layer(x), first, "the same seed")

    # The likeliest are kept, not the largest magnitudes, whose score may say that they go.
    layer = ff.nn.SupermaskLinear(K, N, eval_mask="topk", density=0.25).eval()
    kept = torch.zeros(N * K, dtype=torch.bool)
    kept[layer.scores.flatten().argsort(descending=True, stable=True)[: N * K - int(0.75 * N * K)]] = True
    assert_same(ff.unpack_mask(layer.make_mask(), K).flatten(), kept, "topk")
    close(layer(x), F.linear(x, layer.weight * kept.reshape(N, K), layer.bias))


@pytest.mark.parametrize("options", [{"sampler": "topk", "density": 0.3}, {"sampler": "threshold"}], ids=["topk", "threshold"])
def test_other_samplers_are_the_same_in_eval(options):
    linear, conv = ff.nn.SupermaskLinear(K, N, **options), ff.nn.SupermaskConv2d(4, 6, 3, **options)
    for layer, x in ((linear, torch.randn(5, K)), (conv, torch.randn(2, 4, 7, 8))):
        first = layer(x)
        assert_same(layer.eval()(x), first, "eval")


@pytest.mark.parametrize("eval_mask", ["round", "topk"])
def test_eval_passes_the_samplers_gradient(eval_mask):
    """Fine-tuning with frozen statistics goes on in eval mode: straight through, times sigmoid'(score), dense."""
    density = 0.4 if eval_mask == "topk" else None
    layer = ff.nn.SupermaskLinear(K, N, eval_mask=eval_mask, density=density).double().eval()
    conv = ff.nn.SupermaskConv2d(4, 6, 3, eval_mask=eval_mask, density=density).double().eval()
    x, image = torch.randn(5, K, dtype=torch.float64), torch.randn(2, 4, 7, 8, dtype=torch.float64)
    for module, given in ((layer, x), (conv, image)):
        module(given).square().sum().backward()
        kept = ff.unpack_mask(module.make_mask(), module.weight[0].numel()).reshape(module.weight.shape)
        weight = (module.weight * kept).requires_grad_()
        out = F.linear(given, weight, module.bias) if given is x else F.conv2d(given, weight, module.bias)
        out.square().sum().backward()
        s = module.scores.detach().sigmoid()
        close(module.scores.grad, weight.grad * module.weight * s * (1 - s))
        assert module.weight.grad is None


def test_scores_at_one_probability():
    """A constant start, as the reference code's sigmoid_bias, is a fill."""
    layer = ff.nn.SupermaskLinear(400, 300)
    nn.init.constant_(layer.scores, math.log(0.8 / 0.2))
    kept = ff.unpack_mask(layer.make_mask(), 400).float().mean()
    assert abs(kept - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 120000)


def test_reset_parameters_draws_all():
    layer = ff.nn.SupermaskLinear(K, N)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert not any(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert not layer.weight.requires_grad
    bound = 1 / math.sqrt(K)
    assert 0.9 * bound < layer.scores.abs().max() <= bound


def test_forward_leaves_no_trace(layer_and_input):
    """No counter of steps or tasks anywhere: what a layer is stands in its parameters and buffers."""
    layer, x = layer_and_input

    def held() -> dict[str, int]:  # besides what SparseLinear remembers of its own parameters, which no copy of it holds
        remembered = {"_kept"} if isinstance(layer, ff.nn.SparseLinear) else set()
        return {name: id(value) for name, value in vars(layer).items() if name not in remembered}

    before, names = copy.deepcopy(layer.state_dict()), held()
    layer(x)
    layer(x)
    assert held() == names
    assert not isinstance(layer, ff.nn.SparseLinear) or copy.deepcopy(layer)._kept is None
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sampler": "top"}, ValueError, "sampler must be one of ('bernoulli', 'topk', 'threshold'), got 'top'"),
        ({"eval_mask": "mean"}, ValueError, "eval_mask must be one of ('round', 'sample', 'topk'), got 'mean'"),
        ({"rescale": True}, TypeError, "rescale must be one of ('dwr', 'dwr_grad'), got True"),
        ({"signed": 1}, TypeError, "signed must be a bool, got 1"),
        ({"signed": True}, ValueError, "signed=True goes with sampler 'topk', got 'bernoulli'"),
        ({"sampler": "topk"}, ValueError, "sampler 'topk' needs density, the fraction kept"),
        ({"eval_mask": "topk"}, ValueError, "eval_mask 'topk' needs density, the fraction kept"),
        (
            {"density": 0.5},
            ValueError,
            "density goes with sampler or eval_mask 'topk', got density=0.5 and 'bernoulli'",
        ),
        (
            {"sampler": "threshold", "eval_mask": "sample"},
            ValueError,
            "eval_mask goes with sampler 'bernoulli', got 'sample' and 'threshold', whose mask is the same in eval mode",
        ),
        (
            {"sampler": "topk", "density": 0.5, "signed": True, "rescale": "dwr_grad"},
            ValueError,
            "rescale='dwr_grad' counts ones and is not defined for signed masks; use 'dwr'",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_supermask_refuses(options, error, message):
    """At once, not in the first forward."""
    assert_refused(error, f"SupermaskLinear: {message}", lambda: ff.nn.SupermaskLinear(K, N, **options))
    conv = nn.Conv2d(1, 1, 1)
    assert_refused(error, f"SupermaskConv2d: {message}", lambda: ff.nn.SupermaskConv2d.from_conv(conv, **options))


def test_nan_scores_are_named():
    layer = ff.nn.SupermaskLinear(K, N, sampler="topk", density=0.5)
    with torch.no_grad():
        layer.scores[2, 3] = layer.scores[4, 0] = float("nan")
    with pytest.raises(ValueError, match="scores hold 2 NaN, the first at flat index 143"):
        layer(torch.randn(2, K))


def test_nothing_kept_cannot_be_rescaled():
    layer = ff.nn.SupermaskLinear(K, N, rescale="dwr").eval()
    nn.init.constant_(layer.scores, -1)
    with pytest.raises(ValueError, match="none"):
        layer(torch.randn(2, K))


# ---- back to plain layers, and compressed --------------------------------------------------------------------------------


OPTIONS = [
    {},
    {"rescale": "dwr"},
    {"sampler": "topk", "density": 0.3, "signed": True, "rescale": "dwr"},
    {"sampler": "threshold"},
    {"eval_mask": "topk", "density": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_supermask_becomes_plain(options):
    """What it becomes computes what it does in eval mode, whatever mode it is in."""
    layer, x = ff.nn.SupermaskLinear(K, N, **options), torch.randn(5, K)
    conv = ff.nn.SupermaskConv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect", **options)
    image = torch.randn(2, 4, 7, 8)
    for module, given in ((layer, x), (conv, image)):
        expected = copy.deepcopy(module).eval()(given)
        plain = module.to_linear() if given is x else module.to_conv()
        assert type(plain) is (nn.Linear if given is x else nn.Conv2d) and plain.training
        close(plain(given), expected)
        masked = module.to_masked()
        close(masked(given), expected)
        assert_same(masked.mask_bits, copy.deepcopy(module).eval().make_mask(), "mask")
        assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in module.parameters()}
        assert module.training
    close(layer.compress()(x), copy.deepcopy(layer).eval()(x))


def test_masked_becomes_plain():
    layer, conv = ff.nn.MaskedLinear(K, N, mask=some_mask(N, K)), ff.nn.MaskedConv2d(4, 6, 3, mask=some_mask(6, 36))
    x, image = torch.randn(5, K), torch.randn(2, 4, 7, 8)
    close(layer.to_linear()(x), layer(x))
    close(conv.to_conv()(image), conv(image))
    assert (layer.to_linear().weight[~layer.mask] == 0).all()


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["auto", "bitmap", "csr16", "slab", "dense"])
def test_compressed(kind):
    layer, x = ff.nn.MaskedLinear(K, N, mask=some_mask(N, K, density=0.2)).eval(), torch.randn(5, K)
    sparse = layer.compress(format=kind)
    assert sparse.bias is layer.bias and not sparse.training
    assert_same(sparse.values, layer.weight[layer.mask], "values")
    close(sparse(x), layer(x))
    close(sparse.to_linear()(x), layer(x))
    sparse(x).square().sum().backward()
    layer(x).square().sum().backward()
    close(sparse.values.grad, layer.weight.grad[layer.mask])
    optimizer = torch.optim.SGD([sparse.values], lr=0.1, momentum=0.9)
    optimizer.step()
    assert optimizer.state[sparse.values]["momentum_buffer"].shape == (int(layer.mask.sum()),)
    close(sparse(x), F.linear(x, sparse.to_linear().weight, sparse.bias))


def test_sparse_files_are_portable():
    """No trace of the format in them; they load into a layer of any format and any number of values."""
    linear, x = nn.Linear(K, N), torch.randn(5, K)
    source = ff.nn.SparseLinear.from_linear(linear, some_mask(N, K, density=0.3), format="csr16")
    saved = io.BytesIO()
    torch.save(source.state_dict(), saved)
    for kind in ("bitmap", "csr16", "slab", "dense"):
        saved.seek(0)
        other = ff.nn.SparseLinear.from_linear(nn.Linear(K, N), some_mask(N, K, density=0.6, seed=1), format=kind)
        close(other(x), other.to_linear()(x))
        other.load_state_dict(torch.load(saved))
        assert other.values.requires_grad
        close(other(x), source(x))
        same_count = ff.nn.SparseLinear.from_linear(linear, source.to_linear().weight == 0, format=kind)
        values = same_count.values
        same_count.load_state_dict(same_count.state_dict())
        assert same_count.values is values  # an optimizer may hold it


@pytest.mark.parametrize("kind", ["bitmap", "dense"])
def test_frozen_sparse_weights_follow_changes(kind):
    """What a layer that only infers keeps is made again when its values or mask change."""
    layer, x = ff.nn.SparseLinear.from_linear(nn.Linear(K, N), some_mask(N, K), format=kind), torch.randn(5, K)
    layer.requires_grad_(False)
    layer(x)
    assert layer.sparse_weight is layer.sparse_weight
    other = ff.nn.SparseLinear.from_linear(nn.Linear(K, N), some_mask(N, K, seed=1), format=kind)
    changes = (
        lambda: layer.values.mul_(2),
        lambda: layer.load_state_dict(other.state_dict()),
        layer.double,
        lambda: setattr(layer, "values", nn.Parameter(torch.ones_like(layer.values), requires_grad=False)),
        lambda: layer.requires_grad_(True),
    )
    for change in changes:
        change()
        given = x.to(layer.values.dtype)
        close(layer(given), F.linear(given, layer.to_linear().weight, layer.bias))


def test_sparse_refuses():
    linear = nn.Linear(K, N)
    layer = ff.nn.SparseLinear.from_linear(linear, some_mask(N, K))
    good = dict(layer.state_dict())
    count = len(good["values"])
    message = f"SparseLinear: values ({count - 1},) must be one per bit that is set in mask_bits, ({count},)"
    assert_not_loaded(layer, {**good, "values": good["values"][1:]}, message)
    padded = good["mask_bits"].clone()
    padded[0, 8] |= 64
    message = "SparseLinear: mask_bits has bits set beyond its 70 columns, which must be zero; pack with pack_mask"
    assert_not_loaded(layer, {**good, "mask_bits": padded}, message)
    message = "SparseLinear: mask_bits (5, 16) are of another N; expected (6, 16)"
    assert_not_loaded(layer, {**good, "mask_bits": good["mask_bits"][1:]}, message)
    assert_refused(
        TypeError,
        "SparseLinear: sparse_weight must be a SparseWeight, got Linear; make one with fourfold.compress, or use "
        "SparseLinear.from_linear",
        lambda: ff.nn.SparseLinear(linear),
    )
    weight = ff.compress(linear.weight.detach())
    message = "SparseLinear: bias must be [6], got [5]"
    assert_refused(ValueError, message, lambda: ff.nn.SparseLinear(weight, torch.zeros(5)))


def test_sparse_of_a_weight_with_zeros():
    linear = nn.Linear(K, N)
    linear.weight.data.mul_(some_mask(N, K))
    layer, x = ff.nn.SparseLinear.from_linear(linear), torch.randn(5, K)
    assert len(layer.values) == int((linear.weight != 0).sum())
    close(layer(x), linear(x))
    direct = ff.nn.SparseLinear(ff.compress(linear.weight.detach()), linear.bias)
    assert direct.bias is linear.bias
    close(direct(x), linear(x))


# ---- a mask per task -----------------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_superposed_forms():
    linear, masks, x = nn.Linear(K, N), some_mask(4, N, K), torch.randn(5, K)
    layer = ff.nn.SuperposedLinear.from_linear(linear, masks)
    assert layer.num_tasks == 4 and layer.alpha.tolist() == [0.25] * 4
    close(layer(x), F.linear(x, linear.weight * masks.float().mean(0), linear.bias))
    for task in range(4):
        alone = ff.nn.MaskedLinear.from_linear(linear, masks[task])
        assert_same(layer(x, task), alone(x), "the same bits as the mask alone")
        assert_same(layer.to_masked(task)(x), alone(x), "to_masked")
        close(layer.to_linear(task)(x), alone(x))
        close(layer.compress(task)(x), alone(x))
        layer.alpha = torch.eye(4)[task]  # the published layers skip masks of alpha 0
        close(layer(x), alone(x))
    tasks = torch.tensor([3, 0, 0, 2, 1])
    expected = torch.stack([layer(x[i], int(task)) for i, task in enumerate(tasks)])
    close(layer(x, tasks), expected)
    assert_same(ff.nn.SuperposedLinear.from_linear(linear, list(masks)).mask_bits, layer.mask_bits, "a list")
    packed = [ff.pack_mask(mask) for mask in masks]
    assert_same(ff.nn.SuperposedLinear.from_linear(linear, packed).mask_bits, layer.mask_bits, "packed")


def test_banks_grow():
    layer, masks, x = ff.nn.SuperposedLinear(K, N), some_mask(3, N, K), torch.randn(5, K)
    message = "SuperposedLinear: there is no mask yet; add one with add_task(mask)"
    assert_refused(ValueError, message, lambda: layer(x))
    first = None
    for task, mask in enumerate(masks):
        assert layer.add_task(mask) == task
        first = layer(x, 0) if first is None else first
        assert_same(layer(x, 0), first, "nothing is forgotten")
        assert layer.alpha.tolist() == [pytest.approx(1 / (task + 1))] * (task + 1)
    for tasks in (0, 2, 5):
        other = ff.nn.SuperposedLinear(K, N, masks=some_mask(tasks, N, K, seed=9))
        assert str(other.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
        assert other.num_tasks == 3 and not other.weight.requires_grad
        assert_same(other(x), layer(x), f"from {tasks} tasks")


def test_a_task_added_in_inference_mode_can_be_trained_with():
    layer = ff.nn.SuperposedLinear(8, 4)
    with torch.inference_mode():
        layer.add_task(torch.rand(4, 8) < 0.5)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x, torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert x.grad is not None and bool(x.grad.any())


def test_superposed_refuses():
    layer, x = ff.nn.SuperposedLinear(K, N, masks=some_mask(3, N, K)), torch.randn(5, K)
    name = "SuperposedLinear"
    assert_refused(ValueError, f"{name}: task must lie in 0..2, got 3", lambda: layer(x, 3))
    assert_refused(ValueError, f"{name}: task must lie in 0..2, got -1", lambda: layer(x, -1))
    assert_refused(TypeError, f"{name}: task must be an int, got 1.0", lambda: layer(x, 1.0))
    message = f"{name}.add_task: mask shape (70, 6) does not match weight shape (6, 70); did you mean mask.t()?"
    assert_refused(ValueError, message, lambda: layer.add_task(some_mask(K, N)))
    message = f"{name}.from_linear: masks must be a list of masks or a tensor of them, got int"
    assert_refused(TypeError, message, lambda: ff.nn.SuperposedLinear.from_linear(nn.Linear(K, N), 3))
    good = dict(layer.state_dict())
    message = f"{name}: alpha (2,) must be one per mask, (3,)"
    assert_not_loaded(layer, {**good, "alpha": torch.ones(2)}, message)
    message = f"{name}: mask_bits (3, 5, 16) must be [T, 6, 16]"
    assert_not_loaded(layer, {**good, "mask_bits": good["mask_bits"][:, 1:]}, message)
    padded = good["mask_bits"].clone()
    padded[1, 0, 15] = 1
    message = f"{name}: mask_bits has bits set beyond its 70 columns, which must be zero; pack with pack_mask"
    assert_not_loaded(layer, {**good, "mask_bits": padded}, message)


def test_inference_finds_the_layers():
    model = nn.Sequential(ff.nn.SuperposedLinear(K, 20, masks=some_mask(3, 20, K)), nn.ReLU())
    model.append(ff.nn.SuperposedLinear(20, 10, masks=some_mask(3, 10, 20)))
    model[0].alpha.copy_(torch.tensor([0.5, 0.25, 0.25]))
    before = copy.deepcopy(model.state_dict())
    assert ff.infer_task(model, torch.randn(4, K)) in range(3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0].alpha.requires_grad


# ---- as torch.nn's layers ------------------------------------------------------------------------------------------------


def output(layer: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(5)  # of a mask that is drawn
    return layer(x)


def test_layers_are_torch_layers():
    for (layer, x), base in zip(layers(), (nn.Linear, nn.Conv2d, nn.Linear, nn.Conv2d, nn.Module, nn.Linear), strict=True):
        assert isinstance(layer, base)
        layer(x).sum().backward()
        assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be")  # of torch.compile itself
@pytest.mark.parametrize("training", [True, False])
def test_compiles(layer_and_input, training):
    """As one graph, with gradients; drawn masks differ from call to call, and nothing is traced a second time."""
    layer, x = layer_and_input
    layer.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    drawn = isinstance(layer, ff.nn.SupermaskLinear) and training
    if drawn:
        assert not torch.equal(compiled(x), compiled(x))
    else:
        close(compiled(x), layer(x))
        compiled(x).square().sum().backward()
        parameters = [p for p in layer.parameters() if p.requires_grad]
        expected = torch.autograd.grad(layer(x).square().sum(), parameters)
        for parameter, gradient in zip(parameters, expected, strict=True):
            close(parameter.grad, gradient)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)
        layer.zero_grad()
        compiled(x + 1)


def test_autocast(layer_and_input):
    layer, x = layer_and_input
    with torch.autocast("cpu", torch.bfloat16):
        y = output(layer, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), output(layer, x), rtol=0.05, atol=0.1)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)


DISTRIBUTED = """
import copy, os, sys
import torch
from test_maskmm_nn import close, layers

rank = int(sys.argv[2])
store = torch.distributed.FileStore(sys.argv[1], 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
torch.manual_seed(0)
for layer, x in layers():
    inputs = [x, 2 * x]
    alone = copy.deepcopy(layer)
    if rank == 1:  # overwritten by the first rank's when training begins
        with torch.no_grad():
            for value in layer.state_dict().values():
                value.zero_()
    model = torch.nn.parallel.DistributedDataParallel(layer)
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in layer.state_dict().items())
    torch.manual_seed(rank)
    model(inputs[rank]).square().sum().backward()
    for seed, given in enumerate(inputs):
        torch.manual_seed(seed)
        alone(given).square().sum().div(2).backward()
    for (name, parameter), expected in zip(layer.named_parameters(), alone.parameters()):
        if parameter.requires_grad:
            close(parameter.grad, expected.grad)
sys.stdout.flush()
os._exit(0)  # destructors of process groups may wait for one another
"""


def test_distributed(tmp_path):
    """DistributedDataParallel: the first process's bits in all of them, random masks of their own, and the mean gradient."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DISTRIBUTED, str(tmp_path / "store")]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context((tmp_path / f"{rank}.log").open("w")) for rank in range(2)]
        processes = [
            stack.enter_context(subprocess.Popen([*command, str(rank)], stdout=log, stderr=log, env=environment))
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert codes == [0, 0], "".join((tmp_path / f"{rank}.log").read_text() for rank in range(2))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrized():
    for (layer, x), name in zip(layers()[:4], ("weight", "weight", "scores", "scores"), strict=True):
        expected = copy.deepcopy(layer)
        with torch.no_grad():
            getattr(expected, name).mul_(2)
        parametrize.register_parametrization(layer, name, Doubled())
        close(output(layer, x), output(expected, x))
        output(layer, x).sum().backward()
        parametrize.remove_parametrizations(layer, name)
        close(output(layer, x), output(expected, x))


def test_reprs():
    assert repr(ff.nn.MaskedLinear(4, 2)) == "MaskedLinear(in_features=4, out_features=2, bias=True, kept=8 of 8)"
    mask = torch.eye(4).bool()
    assert repr(ff.nn.MaskedConv2d(4, 4, 1, bias=False, mask=mask)) == (
        "MaskedConv2d(4, 4, kernel_size=(1, 1), stride=(1, 1), bias=False, kept=4 of 16)"
    )
    assert repr(ff.nn.SupermaskLinear(4, 2, sampler="topk", density=0.1, signed=True)) == (
        "SupermaskLinear(in_features=4, out_features=2, bias=True, sampler='topk', density=0.1, signed=True)"
    )
    sparse = ff.nn.SparseLinear.from_linear(nn.Linear(4, 4), mask, format="bitmap")
    assert repr(sparse) == "SparseLinear(in_features=4, out_features=4, bias=True, kept=4 of 16, format='bitmap' (asked for))"
    assert repr(ff.nn.SuperposedLinear(4, 2, masks=torch.ones(3, 2, 4).bool())) == (
        "SuperposedLinear(in_features=4, out_features=2, bias=True, num_tasks=3)"
    )


@pytest.mark.parametrize("k", [1, 7, 63, 64, 65, 128, 784])
def test_counts_of_bits(k):
    """That of the repr, at every padding."""
    mask = some_mask(5, k)
    assert f"kept={int(mask.sum())} of {5 * k}" in repr(ff.nn.MaskedLinear(k, 5, mask=mask))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's own, of the plain layer too
def test_without_rows_or_columns():
    for n, k in ((0, 3), (3, 0)):
        layer = ff.nn.MaskedLinear.from_linear(nn.Linear(k, n))
        assert layer(torch.zeros(2, k)).shape == (2, n) and "kept=0 of 0" in repr(layer)


def test_sparse_layer_of_an_evaluation_can_be_trained():
    """What is remembered of a mask outlives the inference mode in which it was first asked for."""
    x = torch.randn(4, 300)
    for format in ("bitmap", "csr16", "slab", "dense"):  # noqa: A001
        layer = ff.nn.SparseLinear.from_linear(torch.nn.Linear(300, 100), torch.rand(100, 300) < 0.1, format=format)
        with torch.inference_mode():
            expected = layer(x)
        y = layer(x)
        assert torch.equal(y, expected)
        y.sum().backward()
        assert layer.values.grad is not None


def test_sparse_layer_chooses_its_format_anew_on_loading():
    source = ff.nn.SparseLinear.from_linear(torch.nn.Linear(900, 100), torch.rand(100, 900) < 0.05, batch_hint=16)
    whole = ff.nn.SparseLinear.from_linear(torch.nn.Linear(900, 100), batch_hint=16)
    assert (source.format, whole.format) == ("csr16", "dense")
    whole.load_state_dict(source.state_dict())
    assert (whole.format, whole.reason) == (source.format, source.reason)
    asked = ff.nn.SparseLinear.from_linear(torch.nn.Linear(900, 100), format="bitmap")
    asked.load_state_dict(source.state_dict())
    assert asked.format == "bitmap"
