"""masked_linear, masked_conv2d, supermask_linear, supermask_conv2d: their gradients, what they keep, and torch's machinery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from battery import FLOATING, assert_same
from fourfold.ops.maskmm import (
    _apply_mask,
    bernoulli_mask,
    masked_conv2d,
    masked_linear,
    pack_mask,
    supermask_conv2d,
    supermask_linear,
    threshold_mask,
    topk_mask,
    unpack_mask,
)
from test_maskmm import OPTIONS, keeping, randn, random_mask
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# Of torch's about itself, where it compiles an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

KINDS = ("linear", "conv2d")
MASKED = {"linear": masked_linear, "conv2d": masked_conv2d}
SUPERMASK = {"linear": supermask_linear, "conv2d": supermask_conv2d}
PRODUCT = {"linear": F.linear, "conv2d": F.conv2d}


def tensors(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, scores, bias."""
    x, shape = (randn(6, 70, dtype=dtype), (9, 70)) if kind == "linear" else (randn(2, 3, 8, 7, dtype=dtype), (9, 3, 3, 3))
    return x, randn(*shape, dtype=dtype, seed=1), keeping(*shape, dtype=dtype), randn(9, dtype=dtype, seed=3)


def mask_of(weight: Tensor, scores: Tensor, **options: Any) -> Tensor:
    """The mask of a supermask, bool of weight's shape."""
    scores, sampler = scores.detach(), options.get("sampler", "bernoulli")
    if sampler == "bernoulli":
        bits = bernoulli_mask(scores, options["seed"])
    else:
        bits = topk_mask(scores, options["density"]) if sampler == "topk" else threshold_mask(scores)
    return unpack_mask(bits, weight[0].numel()).reshape(weight.shape)


def ones_of(mask: Tensor) -> Tensor:
    return mask.sum(dtype=torch.float64)


# ---- straight-through gradients ------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """As the published codes do it: the mask forward, the gradient as it is backward."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def published(kind: str, x: Tensor, weight: Tensor, scores: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """A supermask written out: what people write, the mask as a float tensor, autograd doing the rest.

    Zhou et al. pass the gradient to the sigmoid of the scores, Ramanujan et al. to their absolute values, supsup to themselves.
    """
    mask, sampler = mask_of(weight, scores, **options), options.get("sampler", "bernoulli")
    if options.get("signed"):
        wearing = StraightThrough.apply(scores, torch.where(scores < 0, -1, 1) * mask)
    elif sampler == "bernoulli":
        wearing = StraightThrough.apply(scores.sigmoid(), mask)
    else:
        wearing = StraightThrough.apply(scores.abs() if sampler == "topk" else scores, mask)
    effective = weight * wearing
    if options.get("rescale"):
        ones = wearing.sum() if options["rescale"] == "dwr_grad" else ones_of(mask)
        effective = effective * (mask.numel() / ones)
    return PRODUCT[kind](x, effective, bias)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_published_form(kind, options, dtype):
    """Of the result and of every input, by a straight-through autograd.Function of this file's own."""
    given = [t.requires_grad_() for t in tensors(kind, dtype)]
    ours, theirs = SUPERMASK[kind](*given, **options), published(kind, *given, **options)
    tolerance = {"rtol": 1e-4, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(ours, theirs, **tolerance)
    weights = randn(*ours.shape, dtype=dtype, seed=7)
    gradients = [torch.autograd.grad(y, given, weights) for y in (ours, theirs)]
    for name, got, wanted in zip(("x", "weight", "scores", "bias"), *gradients, strict=True):
        torch.testing.assert_close(got, wanted, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    assert not gradients[0][1][~mask_of(given[1], given[2], **options)].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_second_gradients(kind, options):
    """Of the gradients' squares: slope and count are constants there, everything else is not."""
    given = [t.requires_grad_() for t in tensors(kind)]
    second = []
    for call in (SUPERMASK[kind], lambda *args, **kw: published_with_slopes(kind, *args, **kw)):
        y = call(*given, **options)
        first = torch.autograd.grad(y, given, randn(*y.shape, seed=7), create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first[:3]), given[:2]))
    for got, wanted in zip(*second, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def published_with_slopes(kind: str, x: Tensor, weight: Tensor, scores: Tensor, bias: Tensor, **options: Any) -> Tensor:
    """The same with slope and count written as constants."""
    mask, sampler = mask_of(weight, scores, **options), options.get("sampler", "bernoulli")
    s = scores.detach()
    slope = torch.ones_like(s)
    if sampler == "bernoulli":
        slope = s.sigmoid() * (1 - s.sigmoid())
    elif sampler == "topk" and not options.get("signed"):
        slope = s.sign()
    sign = torch.where(s < 0, -1, 1) if options.get("signed") else 1
    step = (scores - s) * slope  # zeros, but for their derivative
    rescale = options.get("rescale")
    c = mask.numel() / ones_of(mask) if rescale else 1.0
    effective = weight * c * (mask * sign + step)
    if rescale == "dwr_grad":
        effective = effective - weight * mask * (c / ones_of(mask)) * step.sum()
    return PRODUCT[kind](x, effective, bias)


def score_gradient(weight: Tensor, scores: Tensor, grad: Tensor, x: Tensor, **options: Any) -> Tensor:
    scores = scores.clone().requires_grad_()
    supermask_linear(x, weight, scores, **options).backward(grad)
    return scores.grad


def test_score_gradient_is_dense():
    """A weight that is dropped learns too: otherwise none came back."""
    x, weight, scores, _ = tensors("linear")
    for options in OPTIONS:
        gradient = score_gradient(weight, scores, randn(6, 9), x, **options)
        assert (gradient[~mask_of(weight, scores, **options)] != 0).all(), options


def test_bernoulli_slope_is_that_of_the_sigmoid():
    """Trap: published code sends the gradient through the probability; dS = G W sigma'(s), kept or not."""
    x, weight, scores, _ = tensors("linear")
    scores[0, :3] = torch.tensor([0.0, 100.0, -100.0])
    grad = randn(6, 9)
    expected = (grad.T @ x) * weight * scores.sigmoid() * (1 - scores.sigmoid())
    torch.testing.assert_close(score_gradient(weight, scores, grad, x, seed=1), expected, rtol=1e-11, atol=1e-13)


def test_topk_slope_carries_the_sign():
    """Trap: abs() sits outside the straight-through step, so a negative score's gradient is turned; at 0 it is 0."""
    x, weight, scores, _ = tensors("linear")
    scores[0, 1] = 0.0
    grad, options = randn(6, 9), {"sampler": "topk", "density": 0.5}
    gradient = score_gradient(weight, scores, grad, x, **options)
    torch.testing.assert_close(gradient, (grad.T @ x) * weight * scores.sign(), rtol=1e-11, atol=1e-13)
    assert gradient[0, 1] == 0
    signed = score_gradient(weight, scores, grad, x, signed=True, **options)
    torch.testing.assert_close(signed, (grad.T @ x) * weight, rtol=1e-11, atol=1e-13)


def test_threshold_slope_is_one():
    """Trap: the fast variant keeps scores >= 0, without abs and without a count, and passes the gradient as it is."""
    x, weight, scores, _ = tensors("linear")
    scores[0, 1] = 0.0
    grad = randn(6, 9)
    gradient = score_gradient(weight, scores, grad, x, sampler="threshold")
    torch.testing.assert_close(gradient, (grad.T @ x) * weight, rtol=1e-11, atol=1e-13)
    dense = torch.where(scores >= 0, weight, 0.0)
    torch.testing.assert_close(supermask_linear(x, weight, scores, sampler="threshold"), x @ dense.T, rtol=1e-12, atol=1e-12)


def test_count_is_differentiated_where_asked():
    """Trap: published code rescales by n / mask.sum() of the straight-through mask.

    That is a term -(c / ones) <G, W M> sigma'(s) more.
    """
    x, weight, scores, _ = tensors("linear")
    grad, mask = randn(6, 9), mask_of(weight, scores, seed=2)
    constant = score_gradient(weight, scores, grad, x, seed=2, rescale="dwr")
    through = score_gradient(weight, scores, grad, x, seed=2, rescale="dwr_grad")
    c, slope = mask.numel() / ones_of(mask), scores.sigmoid() * (1 - scores.sigmoid())
    g = grad.T @ x
    torch.testing.assert_close(constant, g * weight * slope * c, rtol=1e-10, atol=1e-12)
    term = -(c / ones_of(mask)) * (g * weight * mask).sum() * slope
    torch.testing.assert_close(through - constant, term, rtol=1e-9, atol=1e-11)
    assert term.abs().max() > 1e-3


def test_rescale_is_per_layer():
    """n over the ones of this mask, whatever the density asked for."""
    x, weight, scores, _ = tensors("linear")
    for options in ({"seed": 3}, {"sampler": "topk", "density": 0.21}, {"sampler": "threshold"}):
        mask = mask_of(weight, scores, **options)
        plain, scaled = (supermask_linear(x, weight, scores, rescale=r, **options) for r in (None, "dwr"))
        torch.testing.assert_close(scaled, plain * (mask.numel() / ones_of(mask)), rtol=1e-12, atol=1e-12)


def test_sampling_goes_on_in_evaluation():
    """Trap: published code samples at test time too. The functions have no mode: layers choose."""
    x, weight, scores, _ = tensors("linear")
    with torch.no_grad():
        assert (supermask_linear(x, weight, scores * 0) != supermask_linear(x, weight, scores * 0)).any()


def test_nan_scores_are_named():
    """Trap: torch.bernoulli says "Expected p_in >= 0 && p_in <= 1 to be true, but got false"."""
    x, weight, scores, _ = tensors("linear")
    scores[3, 5] = scores[4, 0] = float("nan")
    for sampler, options in (("bernoulli", {}), ("topk", {"density": 0.5}), ("threshold", {})):
        message = f"^{sampler}_mask: scores hold 2 NaN, the first at flat index 215; mend them before a mask is made$"
        with pytest.raises(ValueError, match=message):
            supermask_linear(x, weight, scores, sampler=sampler, **options)


def test_frozen_weights_are_a_second_product():
    """Trap: in published code a mask may hold dropped weights at their initial values, y = x (W M + W0 (1 - M))."""
    x, weight, _, bias = tensors("linear")
    initial, mask = randn(9, 70, seed=11).requires_grad_(), random_mask(9, 70)
    y = masked_linear(x, weight.requires_grad_(), mask, bias) + masked_linear(x, initial, ~mask)
    torch.testing.assert_close(y, F.linear(x, torch.where(mask, weight, initial), bias), rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    assert not weight.grad[~mask].any()
    assert not initial.grad[mask].any()


# ---- the mask selects ----------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_does_not_matter(kind, dtype):
    """NaN and infinity off the mask do not show: masks select, they do not multiply."""
    x, weight, _, bias = tensors(kind, dtype)
    mask = random_mask(*weight.shape)
    expected = MASKED[kind](x, weight, mask, bias)
    for value in (float("nan"), float("inf"), -float("inf")):
        assert_same(MASKED[kind](x, torch.where(mask, weight, value), mask, bias), expected, f"{value}")
    assert expected.isfinite().all()


@pytest.mark.kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_gradient_is_zero_off_the_mask(kind, dtype, value):
    """Exactly, whatever x and the gradient hold."""
    x, weight, scores, _ = tensors(kind, dtype)
    x.view(-1)[x.numel() // 3] = value
    x.view(-1)[5] = -float("inf")
    weight.requires_grad_()
    mask = random_mask(*weight.shape)
    calls: list[tuple[Callable[[], Tensor], Tensor]] = [(lambda: MASKED[kind](x, weight, mask), mask)]
    calls += [
        (lambda o=options: SUPERMASK[kind](x, weight, scores, **o), mask_of(weight, scores, **options)) for options in OPTIONS
    ]
    for call, of_call in calls:
        (gradient,) = torch.autograd.grad(call().sum(), weight)
        assert (gradient[~of_call] == 0).all()
        assert not gradient[of_call].isfinite().all()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop], ids=lambda o: o.__name__)
def test_momentum_revives_nothing(optimizer):
    """Dropped weights stay bit for bit as they were, and their state stays zero."""
    options = {"momentum": 0.9} if optimizer is not torch.optim.Adam else {}
    weight, mask = randn(9, 70, dtype=torch.float32).requires_grad_(), random_mask(9, 70)
    before = weight.detach().clone()
    training = optimizer([weight], lr=0.01, **options)
    for step in range(10):
        x, wanted = randn(20, 70, dtype=torch.float32, seed=step), randn(20, 9, dtype=torch.float32, seed=step)
        training.zero_grad()
        F.mse_loss(masked_linear(x, weight, mask), wanted).backward()
        training.step()
    assert torch.equal(weight.detach()[~mask], before[~mask])
    assert (weight.detach()[mask] != before[mask]).all()
    for state in training.state[weight].values():
        assert not isinstance(state, Tensor) or state.dim() == 0 or not state[~mask].any()


def test_momentum_from_before_pruning_does_not_show():
    """It moves the parameter, and never the layer's output."""
    weight, mask, x = randn(9, 70).requires_grad_(), random_mask(9, 70), randn(5, 70)
    training = torch.optim.SGD([weight], lr=0.01, momentum=0.9)
    for step in range(4):
        training.zero_grad()
        (F.linear(x, weight) if step < 2 else masked_linear(x, weight, mask)).square().sum().backward()
        training.step()
    at_zero = torch.where(mask, weight, 0.0)
    torch.testing.assert_close(masked_linear(x, weight, mask), F.linear(x, at_zero), rtol=1e-12, atol=1e-12)


# ---- equal to the vendor's -----------------------------------------------------------------------------------------------

# Padding of every kind, dilation, groups, channels_last, without a batch.
CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = [
    ((2, 4, 7, 6), (6, 2, 3, 3), (2, 1, 1, 2)),
    ((3, 6, 8), (5, 3, 3, 2), ((1, 2), (2, 0), 1, 1)),
    ((2, 2, 9, 9), (2, 2, 3, 3), (1, 2, (2, 3), 1)),
    ((2, 7, 6, 5), (8, 7, 3, 3), (1, "same", 1, 1)),
    ((1, 2, 5, 6), (3, 2, 2, 4), (1, "same", 1, 1)),
    ((4, 3, 6), (3, 4, 2, 2), (1, "same", (1, 2), 1)),
    ((2, 3, 5, 6), (4, 3, 1, 1), (2, "valid", 1, 1)),
    ((0, 2, 5, 6), (3, 2, 2, 2), (1, 1, 1, 1)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(
    ("size", "shape", "convolution", "channels_last"),
    [(*case, last) for case in CONVOLUTIONS for last in (False, True) if len(case[0]) == 4 or not last],
)
def test_convolution_is_the_vendors(size, shape, convolution, channels_last, dtype):
    """Of the masked weight, with its bits and its memory format; all gradients too."""
    x, weight = randn(*size, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    if channels_last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    bias, mask = randn(shape[0], dtype=dtype, seed=3).requires_grad_(), random_mask(*shape)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    wearing = torch.where(mask, weight, 0.0)
    wearing = wearing.contiguous(memory_format=torch.channels_last) if channels_last else wearing
    given = (bias, *convolution)
    ours, theirs = masked_conv2d(x, weight, pack_mask(mask), *given), F.conv2d(x, wearing, *given)
    assert ours.is_contiguous(memory_format=torch.channels_last) == theirs.is_contiguous(memory_format=torch.channels_last)
    assert_same(ours.detach(), theirs.detach(), "result")
    grad = randn(*ours.shape, dtype=dtype, seed=5)
    for name, got, wanted in zip(
        ("x", "weight", "bias"), *(torch.autograd.grad(y, (x, weight, bias), grad) for y in (ours, theirs)), strict=True
    ):
        assert_same(got, wanted, name)


@pytest.mark.kernel
@pytest.mark.parametrize(("x_dtype", "weight_dtype"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)])
@pytest.mark.parametrize("rescale", ["", "dwr"])
def test_wider_weights(x_dtype, weight_dtype, rescale):
    """As under autocast: the effective weight is rounded to x's type, gradients are in each tensor's own."""
    x, weight, scores, bias = tensors("linear", torch.float32)
    x, bias = x.to(x_dtype).requires_grad_(), bias.to(x_dtype)
    weight, scores = weight.requires_grad_(), scores.requires_grad_()
    bits = bernoulli_mask(scores, 5)
    y = torch.ops.fourfold._masked_linear(x, weight, bits, bias, scores, "sigmoid", False, rescale)
    assert y.dtype == x_dtype
    mask = unpack_mask(bits, 70)
    c = mask.numel() / ones_of(mask) if rescale else 1.0
    exact = F.linear(x.double(), torch.where(mask, weight * c, 0.0).to(x_dtype).double(), bias.double())
    limit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[x_dtype]
    torch.testing.assert_close(y.double(), exact, rtol=limit, atol=1e-4)
    gradients = torch.autograd.grad(y.sum(), (x, weight, scores))
    assert [g.dtype for g in gradients] == [x_dtype, weight_dtype, torch.float32]
    g = torch.ones(6, 9, dtype=torch.float64).T @ x.detach().double()
    torch.testing.assert_close(gradients[1].double(), g * mask * c, rtol=2 * limit, atol=1e-4)
    slope = scores.double().sigmoid() * (1 - scores.double().sigmoid())
    torch.testing.assert_close(gradients[2].double(), g * weight.double() * slope * c, rtol=2 * limit, atol=1e-4)


# ---- memory --------------------------------------------------------------------------------------------------------------


def saved_by(call: Callable[[], Tensor]) -> list[Tensor]:
    """One of each storage that autograd keeps."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return list(kept.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [None, *OPTIONS[:5], {}], ids=str)
def test_saved_for_backward(kind, options):
    """x, weight, scores and bits, nothing else: 1/32 of a float32 weight beyond what there is anyway."""
    shape = (1024, 1024) if kind == "linear" else (256, 64, 8, 8)
    x = randn(*((8, 1024) if kind == "linear" else (1, 64, 9, 9)), dtype=torch.float32).requires_grad_()
    weight, bias = randn(*shape, dtype=torch.float32).requires_grad_(), torch.zeros(shape[0], requires_grad=True)
    scores = keeping(*shape, dtype=torch.float32).requires_grad_()
    if options is None:
        bits, inputs = pack_mask(random_mask(*shape)), (x, weight)
        saved = saved_by(lambda: MASKED[kind](x, weight, bits, bias))
    else:
        inputs = (x, weight, scores)
        saved = saved_by(lambda: SUPERMASK[kind](x, weight, scores, bias, **options))
    own = {t.untyped_storage().data_ptr() for t in inputs}
    others = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert len(saved) - len(others) == len(inputs)
    assert [t.dtype for t in others] == [torch.uint8]
    assert others[0].untyped_storage().nbytes() == weight.numel() // 8


# ---- seeds and torch's generator -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_seed_none_draws_from_torchs_generator(kind):
    """As dropout does: calls differ, manual_seed repeats them, and one number is drawn per call."""
    x, weight, scores, _ = tensors(kind)
    call = lambda seed=None: SUPERMASK[kind](x, weight, scores, seed=seed)  # noqa: E731
    torch.manual_seed(3)
    first, second, after = call(), call(), torch.get_rng_state()
    assert (first != second).any()
    torch.manual_seed(3)
    seeds = [torch.randint(2**63 - 1, ()) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(call(seeds[0]), first)
    assert torch.equal(call(int(seeds[1])), second)
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert torch.equal(call(5), call(5))  # a seed leaves the generator alone
    assert torch.equal(call(), second)


def test_other_samplers_draw_nothing():
    x, weight, scores, _ = tensors("linear")
    before = torch.get_rng_state()
    supermask_linear(x, weight, scores, sampler="topk", density=0.5)
    supermask_linear(x, weight, scores, sampler="threshold")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_seed_none(backend):
    """In one graph; calls differ, and follow torch.manual_seed."""
    x, weight, scores, _ = tensors("linear")
    scores = (scores * 0).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(lambda: supermask_linear(x, weight, scores), fullgraph=True, backend=backend)
    torch.manual_seed(3)
    first, second = compiled(), compiled()
    assert (first != second).any()
    torch.manual_seed(3)
    assert torch.equal(compiled(), first)
    assert torch.equal(compiled(), second)
    # Backward's mask is forward's: dW is zero where the output does not depend on W.
    weight = weight.requires_grad_()
    grad = torch.autograd.grad(compiled().sum(), weight)[0]
    assert 0.3 < (grad == 0).double().mean() < 0.7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS[1:5], ids=str)
def test_compiled_is_eager(kind, options):
    given = [t.requires_grad_() for t in tensors(kind, torch.float32)]
    torch.compiler.reset()
    compiled = torch.compile(SUPERMASK[kind], fullgraph=True, backend="aot_eager")
    calls = [call(*given, **options) for call in (compiled, SUPERMASK[kind])]
    assert_same(*(y.detach() for y in calls), "result")
    gradients = [torch.autograd.grad(y.square().sum(), given) for y in calls]
    for got, wanted in zip(*gradients, strict=True):
        assert_same(got, wanted, "gradient")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_draws_the_same_mask_again(kind, reentrant):
    x, weight, scores, bias = (t.requires_grad_() for t in tensors(kind))

    def twice(x: Tensor) -> Tensor:
        """Two draws, so that the second must continue where the first stopped."""
        y = SUPERMASK[kind](x, weight, scores, bias)
        return y + SUPERMASK[kind](x.square(), weight, scores, rescale="dwr")

    results = []
    for call in (twice, lambda x: checkpoint(twice, x, use_reentrant=reentrant)):
        torch.manual_seed(11)
        y = call(x)
        y.square().sum().backward()
        results.append((y, *(t.grad for t in (x, weight, scores, bias))))
        x.grad = weight.grad = scores.grad = bias.grad = None
    for got, wanted in zip(*results, strict=True):
        assert_same(got.detach(), wanted.detach(), "checkpointed")


def test_ranks_with_one_seed_are_one_big_batch():
    """As DistributedDataParallel trains: the mean of the gradients is that of the whole batch under the same mask."""
    x, weight, scores, _ = tensors("linear")
    scores = scores.requires_grad_()

    def gradient(batch: Tensor) -> Tensor:
        torch.manual_seed(17)
        return torch.autograd.grad(supermask_linear(batch, weight, scores).square().mean(), scores)[0]

    ranks = [gradient(part) for part in x.chunk(2)]
    torch.testing.assert_close((ranks[0] + ranks[1]) / 2, gradient(x), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_draws(kind):
    """torch.vmap's randomness chooses, as for torch's own random functions."""
    x, weight, scores, _ = tensors(kind)
    call = lambda x: SUPERMASK[kind](x, weight, scores)  # noqa: E731
    batch = torch.stack([x] * 3)
    torch.manual_seed(5)
    same = torch.vmap(call, randomness="same")(batch)
    torch.manual_seed(5)
    torch.testing.assert_close(same, torch.stack([call(x)] * 3), rtol=1e-12, atol=1e-12)
    different = torch.vmap(call, randomness="different")(batch)
    assert (different[0] != different[1]).any()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(call)(batch)


def test_per_sample_gradients():
    """torch.func as people use it: of every sample's loss, in the scores."""
    x, weight, scores, _ = tensors("linear")
    loss = lambda s, one: supermask_linear(one, weight, s, seed=3).square().sum()  # noqa: E731
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(scores, x)
    for one, got in zip(x, each, strict=True):
        torch.testing.assert_close(got, torch.func.grad(loss)(scores, one), rtol=1e-11, atol=1e-12)


# ---- autocast ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    """x in bfloat16, scores in float32: the mask is the one without autocast; gradients come in each parameter's type."""
    x, weight, scores, bias = tensors(kind, torch.float32)
    scores = scores + 2.0**-12 * randn(*scores.shape, dtype=torch.float32, seed=9)  # numbers that bfloat16 does not hold
    given = [t.requires_grad_() for t in (x, weight, scores, bias)]
    for options in OPTIONS:
        mask = mask_of(weight, scores, **options)
        with torch.autocast("cpu", torch.bfloat16):
            y = SUPERMASK[kind](*given, **options)
        assert y.dtype == torch.bfloat16
        gradients = torch.autograd.grad(y.float().sum(), given)
        assert [g.dtype for g in gradients] == [torch.float32] * 4
        assert torch.equal(gradients[1] == 0, ~mask), options


def test_autocast_does_not_round_scores():
    """Two scores that are one in bfloat16: the larger one is kept."""
    scores = torch.tensor([[1.0, 1.0 + 2.0**-20]])
    with torch.autocast("cpu", torch.bfloat16):
        y = supermask_linear(torch.eye(2), torch.ones(1, 2), scores, sampler="topk", density=0.5)
    assert y.flatten().tolist() == [0.0, 1.0]


# ---- only what is needed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 2), (1, 2), (1, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_some(kind, needed):
    given = tensors(kind)
    for options in OPTIONS[1:5]:
        everything = [t.detach().clone().requires_grad_() for t in given]
        y = SUPERMASK[kind](*everything, **options)
        grad = randn(*y.shape, seed=2)
        wanted = torch.autograd.grad(y, everything, grad)
        some = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate(given)]
        got = torch.autograd.grad(SUPERMASK[kind](*some, **options), [some[i] for i in needed], grad)
        for i, gradient in zip(needed, got, strict=True):
            torch.testing.assert_close(gradient, wanted[i], rtol=1e-12, atol=1e-12)


def test_any_form_of_mask():
    """Bool of the weight's shape, bool [N, K], packed: one layer."""
    x, weight, _, bias = tensors("conv2d")
    mask = random_mask(*weight.shape)
    results = [masked_conv2d(x, weight, m, bias) for m in (mask, mask.flatten(1), pack_mask(mask), pack_mask(mask.flatten(1)))]
    assert all(torch.equal(result, results[0]) for result in results[1:])
    strided = pack_mask(mask).t().contiguous().t()
    assert torch.equal(masked_conv2d(x, weight, strided, bias), results[0])


class Names(TorchDispatchMode):
    """Keeps the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_pad_bits_are_looked_at_once():
    """Until somebody changes the mask, or has it for other columns."""
    x, weight, _, _ = tensors("linear")
    bits = pack_mask(random_mask(9, 70))
    masked_linear(x, weight, bits)
    with Names() as again:
        masked_linear(x, weight, bits)
    assert again.names == ["fourfold::_masked_linear"]
    with pytest.raises(ValueError, match="mask has bits set beyond its 65 columns"):
        masked_linear(x[:, :65], weight[:, :65], bits)
    bits[3, 15] = 1
    with pytest.raises(ValueError, match="mask has bits set beyond its 70 columns"):
        masked_linear(x, weight, bits)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_gradients_are_recorded_by_the_quick_function(kind):
    """Not by torch.library's; without gradients nothing is recorded."""
    x, weight, _, _ = tensors(kind)
    bits = pack_mask(random_mask(*weight.shape))
    assert MASKED[kind](x, weight, bits).grad_fn is None
    recorded = MASKED[kind](x, weight.requires_grad_(), bits).grad_fn
    assert recorded.name() == {"linear": "_masked_linearBackward", "conv2d": "masked_conv2dBackward"}[kind]
    with torch.no_grad():
        assert MASKED[kind](x, weight, bits).grad_fn is None


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
def test_traces():
    """The op is in the trace, where a Python function could not be saved."""
    _, weight, _, _ = tensors("linear")
    bits = pack_mask(random_mask(9, 70))
    options = None, False, "", torch.float64
    traced = torch.jit.trace(lambda w: _apply_mask(w, bits, *options), (weight.requires_grad_(),), check_trace=False)
    assert "fourfold::_apply_mask" in {node.kind() for node in traced.inlined_graph.nodes()}
    assert torch.equal(traced(2 * weight), _apply_mask(2 * weight, bits, *options))


def test_gradients_flow_through_inference_made_masks():
    """A mask made under inference_mode serves in training."""
    x, weight, _, _ = tensors("linear")
    with torch.inference_mode():
        bits = pack_mask(random_mask(9, 70))
    weight = weight.requires_grad_()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        masked_linear(x, weight, bits)
    masked_linear(x, weight, bits.clone()).sum().backward()
    assert not weight.grad[~random_mask(9, 70)].any()


def test_transforms_outside_of_vmap():
    """A vmap rule hands its call on to the transforms around it."""
    x, weight, mask = randn(3, 7), randn(4, 7), random_mask(4, 7)

    def loss(w: Tensor) -> Tensor:
        return masked_linear(x, w, mask).pow(3).sum()

    def plain(w: Tensor) -> Tensor:
        return F.linear(x, w * mask).pow(3).sum()

    torch.testing.assert_close(torch.func.hessian(loss)(weight), torch.func.hessian(plain)(weight))
    many, step = randn(5, 4, 7), randn(5, 4, 7, seed=1)
    for transform in (
        lambda f: torch.func.jvp(torch.func.vmap(f), (many,), (step,))[1],
        lambda f: torch.func.grad(lambda w: torch.func.vmap(f)(w).sum())(many),
    ):
        torch.testing.assert_close(transform(loss), transform(plain))
