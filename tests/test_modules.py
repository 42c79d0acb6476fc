"""What torch does to any module, done to each of fourfold's: torch.func, checkpointing, copies, files, devices.

Every test below goes through all modules of ``fourfold.nn`` and ``fourfold.models``; what only one family must do is in its own
tests.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import fourfold as ff
import pytest
import torch
from battery import assert_same, poisoned_memory, run_script
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import prune, skip_init
from torch.utils.checkpoint import checkpoint

F64 = torch.float64
State = dict[str, Tensor]


# ---- the modules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A module and what it takes."""

    label: str
    build: Callable[..., nn.Module]  # by device and dtype
    inputs: tuple[tuple[int, ...], ...]  # shapes, samples first
    draws: bool = False  # masks, from torch's generator
    network: bool = False

    def module(self, seed: int = 0, **options: Any) -> Any:
        torch.manual_seed(seed)
        made = self.build(**options)
        return made.eval() if self.network else made  # batch norms would write into their statistics

    @functools.cached_property
    def _made(self) -> nn.Module:
        module = self.module().to(F64)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_var.uniform_(0.5, 2)
        return module

    def made(self) -> tuple[Any, tuple[Tensor, ...]]:
        """In float64, with an input."""
        return copy.deepcopy(self._made), self.given()

    def given(self, seed: int = 1) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=random, dtype=F64) for shape in self.inputs)


def some_mask(*shape: int, density: float = 0.5, seed: int = 0) -> Tensor:
    """On the CPU, wherever torch would put it."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), device="cpu") < density


def sparse_linear(format: str = "bitmap", device: Any = None, dtype: Any = None) -> nn.Module:  # noqa: A002
    weight = torch.randn(6, 70, device="cpu")
    compressed = ff.compress(weight, some_mask(6, 70), format=format)
    return ff.nn.SparseLinear(compressed, torch.randn(6, device="cpu"), device=device, dtype=dtype)


def scaled(cls: type[nn.Module], shape: tuple[int, ...], **options: Any) -> Callable[..., nn.Module]:
    """With numbers as the scale, so that torch chooses the device where nobody else does."""
    numbers = (1 + torch.arange(torch.Size(shape).numel()) / 7).reshape(shape).tolist()
    return partial(cls, scale=numbers, **options)


CONV = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "circular"}
IMAGE = (3, 4, 7, 8)
VECTORS = (3, 70)
CASES = (
    Case("AddCoords", partial(ff.nn.AddCoords, with_r=True), (IMAGE,)),
    Case("BlockDCT2d", scaled(ff.nn.BlockDCT2d, (2, 10), freqs=list(range(10)), shift=0.5), ((3, 2, 11, 16),)),
    Case("BlockIDCT2d", scaled(ff.nn.BlockIDCT2d, (16,), block_size=4, layout="blocks"), ((3, 2, 3, 2, 16),)),
    Case("CoordConv1d", partial(ff.nn.CoordConv1d, 4, 5, 3, padding=1, activation="silu"), ((3, 4, 9),)),
    Case("CoordConv2d", partial(ff.nn.CoordConv2d, 4, 6, 3, **CONV, with_r=True), (IMAGE,)),
    Case("CoordConv2d relu", partial(ff.nn.CoordConv2d, 4, 6, 3, activation="relu"), (IMAGE,)),
    Case("CoordConv3d", partial(ff.nn.CoordConv3d, 2, 3, 2, bias=False), ((3, 2, 4, 5, 3),)),
    Case("CoordConvTranspose2d", partial(ff.nn.CoordConvTranspose2d, 4, 6, 3, 2, activation="gelu"), (IMAGE,)),
    Case("MaskedConv2d", partial(ff.nn.MaskedConv2d, 4, 6, 3, **CONV, mask=some_mask(6, 18)), (IMAGE,)),
    Case("MaskedLinear", partial(ff.nn.MaskedLinear, 70, 6, mask=some_mask(6, 70)), (VECTORS,)),
    Case("RGBToDCT", scaled(ff.nn.RGBToDCT, (3, 64), dtype=F64), ((3, 3, 19, 21),)),
    Case("SparseLinear", sparse_linear, (VECTORS,)),
    *(Case(f"SparseLinear {f}", partial(sparse_linear, f), (VECTORS,)) for f in ("csr16", "slab", "dense")),
    Case("SupermaskConv2d", partial(ff.nn.SupermaskConv2d, 4, 6, 3, **CONV), (IMAGE,), draws=True),
    Case("SupermaskConv2d threshold", partial(ff.nn.SupermaskConv2d, 4, 6, 3, sampler="threshold"), (IMAGE,)),
    Case("SupermaskLinear", partial(ff.nn.SupermaskLinear, 70, 6, rescale="dwr"), (VECTORS,), draws=True),
    Case(
        "SupermaskLinear topk",
        partial(ff.nn.SupermaskLinear, 70, 6, sampler="topk", density=0.3, signed=True),
        (VECTORS,),
    ),
    Case("SuperposedLinear", partial(ff.nn.SuperposedLinear, 70, 6, masks=some_mask(3, 6, 70)), (VECTORS,)),
    Case("Bottleneck", partial(ff.models.Bottleneck, 8, 4, 16, project=True), ((2, 8, 5, 6),), network=True),
    Case("ResNet", partial(ff.models.resnet50, 10), ((2, 3, 33, 32),), network=True),
    Case(
        "DCTResNet",
        partial(ff.models.dct_resnet50, "downsampling", 10),
        ((2, 64, 4, 3), (2, 128, 2, 2)),
        network=True,
    ),
)

WITHOUT_TENSORS = ("AddCoords", "Bottleneck")  # of their own: like torch.nn.ReLU and torchvision's blocks they have no device
LARGE = ("ResNet", "DCTResNet")
EVERY = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.label, marks=[pytest.mark.slow] if case.label == "ResNet" else []) for case in CASES],
)
HOLDING = [case for case in CASES if case.label not in WITHOUT_TENSORS]
WITH_TENSORS = pytest.mark.parametrize("case", HOLDING, ids=lambda case: case.label)


def test_every_module_has_a_case():
    have = {case.label.split()[0] for case in CASES}
    assert have == {*ff.nn.__all__, *(name for name in ff.models.__all__ if inspect.isclass(getattr(ff.models, name)))}
    for case in CASES:
        name = case.label.split()[0]
        assert isinstance(case.made()[0], getattr(ff.nn, name, None) or getattr(ff.models, name))


# ---- what the tests share ------------------------------------------------------------------------------------------------


def one(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Several results as one tensor."""
    return y if isinstance(y, Tensor) else torch.cat([part.flatten() for part in y])


def output(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    torch.manual_seed(5)  # of a mask that is drawn
    return one(module(*inputs))


def output_with(module: nn.Module, state: State, inputs: tuple[Tensor, ...]) -> Tensor:
    torch.manual_seed(5)
    return one(functional_call(module, state, inputs))


def state_of(module: nn.Module) -> State:
    """Parameters and buffers, detached."""
    return {name: value.detach() for name, value in [*module.named_parameters(), *module.named_buffers()]}


def floating(module: nn.Module) -> State:
    """What has a gradient; of large networks the small parameters, which take less memory per sample."""
    return {k: v for k, v in state_of(module).items() if v.is_floating_point() and "running" not in k and v.numel() < 20_000}


def other_numbers(state: State, i: int = 1) -> State:
    """Of the same types: other floating ones, and masks with as many bits."""
    changed = {k: (1 + 0.25 * i) * v + 0.1 * i for k, v in state.items() if v.is_floating_point()}
    return changed | {k: v.roll(i, -2) for k, v in state.items() if v.dtype == torch.uint8}


def holding(module: nn.Module, state: State) -> nn.Module:
    """A copy with other contents."""
    other = copy.deepcopy(module)
    for name, value in [*other.named_parameters(), *other.named_buffers()]:
        if name in state:
            value.data.copy_(state[name])
    return other


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def loss_with(module: nn.Module, state: State, *inputs: Tensor) -> Tensor:
    return output_with(module, state, inputs).square().sum()


def gradients(module: nn.Module, names: list[str], inputs: tuple[Tensor, ...]) -> tuple[State, list[Tensor]]:
    """By autograd, of the module that holds them, in these of its tensors and in the inputs."""
    module = copy.deepcopy(module)
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    leaves = [held[name].requires_grad_() for name in names]
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    found = torch.autograd.grad(output(module, inputs).square().sum(), [*leaves, *inputs])
    return dict(zip(names, found, strict=False)), list(found[len(names) :])


# ---- torch.func ----------------------------------------------------------------------------------------------------------


@EVERY
def test_functional_call(case):
    """Other parameters and buffers for one call give what a module that holds them gives, and leave nothing behind."""
    module, inputs = case.made()
    before = output(module, inputs)
    for learning in (True, False):
        module.requires_grad_(learning)
        replaced = other_numbers(state_of(module))
        result = output_with(module, replaced, inputs)
        assert_same(result, output(holding(module, replaced), inputs), "functional_call")
        assert case.label == "AddCoords" or not torch.equal(result, before)
        remembered = [weakref.ref(value) for value in replaced.values()]
        del replaced, result
        assert all(value() is None for value in remembered)
        assert_same(output(module, inputs), before, "afterwards")


@EVERY
def test_grad(case):
    module, inputs = case.made()
    state = floating(module)
    loss = partial(loss_with, module)
    of_state, *of_inputs = grad(loss, tuple(range(1 + len(inputs))))(state, *inputs)
    expected, expected_of_inputs = gradients(module, list(state), inputs)
    for name in state:
        close(of_state[name], expected[name])
    for actual, wanted in zip(of_inputs, expected_of_inputs, strict=True):
        close(actual, wanted)


@EVERY
def test_per_sample_gradients(case):
    """As differential privacy and influence functions take them. Only a drawn mask has to be told about vmap."""
    module, inputs = case.made()
    state = floating(module)

    def loss(state: State, *sample: Tensor) -> Tensor:
        return loss_with(module, state, *(x[None] for x in sample))

    positions = tuple(range(1 + len(inputs)))
    per_sample = vmap(grad(loss, positions), (None, *(0 for _ in inputs)), randomness="same" if case.draws else "error")
    of_state, *of_inputs = per_sample(state, *inputs)
    for i in range(len(inputs[0])):
        expected, expected_of_inputs = gradients(module, list(state), tuple(x[i : i + 1] for x in inputs))
        for name in state:
            close(of_state[name][i], expected[name])
        for actual, wanted in zip(of_inputs, expected_of_inputs, strict=True):
            close(actual[i], wanted[0])


@pytest.mark.parametrize("case", [c for c in CASES if c.label not in LARGE], ids=lambda case: case.label)
def test_ensemble(case):
    """Models of one kind run as one, each with weights, masks and inputs of its own."""
    module, _ = case.made()
    models = [holding(module, other_numbers(state_of(module), i)) for i in range(3)]
    inputs = [case.given(seed=i) for i in range(3)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(module).to("meta")

    def run(parameters: State, buffers: State, *x: Tensor) -> Tensor:
        return output_with(base, {**parameters, **buffers}, x)

    results = vmap(run, randomness="same" if case.draws else "error")(
        parameters, buffers, *(torch.stack(x) for x in zip(*inputs, strict=True))
    )
    for model, x, result in zip(models, inputs, results, strict=True):
        close(result, output(model, x))


def drawing() -> list[tuple[str, nn.Module]]:
    """Layers of ones, whose results on an identity matrix, or on an image of one pixel per channel, are their masks."""
    layers = []
    for name, training in (("in training", True), ("in evaluation", False)):
        for layer in (
            ff.nn.SupermaskLinear(70, 6, bias=False, eval_mask="sample"),
            ff.nn.SupermaskConv2d(70, 6, 1, bias=False, eval_mask="sample"),
        ):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.scores)
            layers.append((f"{type(layer).__name__} {name}", layer.train(training)))
    return layers


@pytest.mark.parametrize(("label", "layer"), drawing(), ids=lambda value: value if isinstance(value, str) else "")
def test_draws_follow_randomness(label, layer):
    """One mask for all, a mask for each, or torch's error, as for dropout."""
    identity = torch.eye(70)
    batch = torch.stack([identity if "Linear" in label else identity[:, :, None, None]] * 5)
    torch.manual_seed(3)
    alone = layer(batch[0])
    torch.manual_seed(3)
    same = vmap(layer, randomness="same")(batch)
    for result in same:
        assert_same(result, alone, "same")
    torch.manual_seed(3)
    different = vmap(layer, randomness="different")(batch)
    for i, mask in enumerate(different):
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert 0.4 < mask.mean() < 0.6  # scores of 0 keep half; 420 draws deviate by 0.024
        assert all((mask != another).float().mean() > 0.3 for another in different[:i])
    torch.manual_seed(3)
    assert_same(vmap(layer, randomness="different")(batch), different, "different, with the same seed")
    masks = vmap(lambda _: layer.make_mask(), randomness="different")(batch)
    assert len(masks.unique(dim=0)) == 5
    assert vmap(lambda _: layer.make_mask(), randomness="same", out_dims=None)(batch).shape == (6, 16)
    for call in (layer, lambda _: layer.make_mask()):
        with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
            vmap(call)(batch)


def test_tasks_per_sample():
    """SuperposedLinear: a task for each sample, as one batch and by vmap."""
    module, (x,) = next(case for case in CASES if case.label == "SuperposedLinear").made()
    tasks = torch.tensor([2, 0, 2])
    results = vmap(lambda x, task: module(x[None], task[None])[0])(x, tasks)
    close(results, module(x, tasks))
    close(results, torch.stack([module(one, int(task)) for one, task in zip(x, tasks, strict=True)]))


# ---- checkpointing, copies, files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@EVERY
def test_checkpoint(case, reentrant):
    """Computed again in backward, with the same draws, whatever was drawn meanwhile."""
    module, inputs = case.made()
    found = []
    for run in (module, partial(checkpoint, module, use_reentrant=reentrant)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        module.zero_grad()
        torch.manual_seed(5)
        y = one(run(*leaves))
        torch.rand(3)
        y.square().sum().backward()
        found.append([y.detach(), *(x.grad for x in leaves), *(p.grad for p in module.parameters() if p.requires_grad)])
    for actual, expected in zip(*reversed(found), strict=True):
        assert_same(actual, expected, "checkpointed")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@EVERY
def test_copies(case, duplicate):
    """Also of a module that has run, and may remember something."""
    module, inputs = case.made()
    expected = output(module.requires_grad_(False), inputs)
    other = duplicate(module)
    assert repr(other) == repr(module)
    assert_same(output(other, inputs), expected, "copy")
    kept = state_of(module)
    for name, value in state_of(other).items():
        assert value.untyped_storage().data_ptr() != kept[name].untyped_storage().data_ptr()
    changed = holding(other, other_numbers(state_of(other)))
    with torch.no_grad():
        for name, value in state_of(other).items():
            value.copy_(state_of(changed)[name])
    assert_same(output(other, inputs), output(changed, inputs), "the copy, changed")
    assert_same(output(module, inputs), expected, "the original")


@EVERY
def test_state_dict_in_a_file(case):
    """Tensors and nothing else."""
    module, inputs = case.made()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    for assign in (False, True):
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert all(type(value) is Tensor for value in state.values())
        other = holding(module, other_numbers(state_of(module)))
        other = other.to("meta") if assign else other
        assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
        assert_same(output(other, inputs), output(module, inputs), f"assign={assign}")


# ---- devices and types ---------------------------------------------------------------------------------------------------


def reset(module: nn.Module) -> None:
    """As FSDP does it and everybody else: each module that can, for itself."""
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


@WITH_TENSORS
def test_device_and_dtype(case):
    """Of the constructor; there is a repr without contents."""
    for options in ({"device": "meta", "dtype": torch.bfloat16}, {"device": "cpu", "dtype": F64}, {"device": "meta"}, {}):
        module = case.module(**options)
        held = state_of(module)
        assert held and {value.device.type for value in held.values()} == {options.get("device", "cpu")}
        of_results = case.label == "RGBToDCT"  # there dtype is theirs, and no number is rounded
        expected = F64 if of_results else options.get("dtype", torch.float32)
        assert {value.dtype for value in held.values() if value.is_floating_point()} == {expected}
        assert not of_results or module.dtype == options.get("dtype", F64)
        assert repr(module).startswith(f"{type(module).__name__}(")
        assert type(module).extra_repr is not nn.Module.extra_repr


@EVERY
def test_moves(case):
    """To another type, with its gradients, and onto a device without memory. Packed masks stay as they are."""
    module, inputs = case.module(), [x.float() for x in case.given()]
    expected = output(module, inputs)
    bits = {name for name, value in state_of(module).items() if value.dtype == torch.uint8}
    for dtype in (F64,) if case.network else (F64, torch.bfloat16, torch.float16):
        other = copy.deepcopy(module).to(dtype)
        assert {name for name, value in state_of(other).items() if value.dtype == torch.uint8} == bits
        given = [x.to(dtype).requires_grad_() for x in inputs]
        result = output(other, given)
        assert result.dtype == (F64 if case.label == "RGBToDCT" else dtype) and result.shape == expected.shape
        if dtype == F64:
            torch.testing.assert_close(result.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)
        result.sum().backward()
        learned = [*given, *(p for p in other.parameters() if p.requires_grad)]
        assert all(x.grad.dtype == dtype for x in learned)
    on_meta = output(copy.deepcopy(module).to("meta"), [x.to("meta") for x in inputs])
    assert on_meta.is_meta and on_meta.shape == expected.shape


@WITH_TENSORS
def test_from_meta(case):
    """Memory without contents, reset: what the constructor draws, and masks that keep something. Then a file says more."""
    module, inputs = case.made()
    with torch.device("meta"):
        in_context = case.module()
    with poisoned_memory():
        made = [case.module(device="meta").to_empty(device="cpu")]
        if case.label.startswith("SparseLinear"):  # which stays where its values are
            assert {value.device.type for value in state_of(in_context).values()} == {"cpu"}
        else:
            assert all(value.is_meta for value in state_of(in_context).values())
            made.append(in_context.to_empty(device="cpu"))
        if inspect.isclass(getattr(case.build, "func", None)):  # and not a function that builds one
            made.append(skip_init(case.build.func, *case.build.args, **case.build.keywords))
    for other in made:
        assert all(not value.is_meta for value in state_of(other).values())
        reset(other)
        other.to(F64).train(module.training)
        for name, value in state_of(other).items():
            assert not value.is_floating_point() or value.isfinite().all(), name
        result = output(other, inputs)
        assert result.isfinite().all() and result.any()
        other.load_state_dict(module.state_dict())
        assert_same(output(other, inputs), output(module, inputs), "loaded")


def test_masks_from_meta():
    """Whole ones; or of as many values, scattered, and the same ones in every process."""
    weight = ff.compress(torch.randn(60, 100), some_mask(60, 100, density=0.2))
    with poisoned_memory():
        masked = ff.nn.MaskedLinear(70, 6, device="meta", mask=some_mask(6, 70)).to_empty(device="cpu")
        superposed = ff.nn.SuperposedLinear(70, 6, device="meta", masks=some_mask(3, 6, 70)).to_empty(device="cpu")
        sparse = [skip_init(ff.nn.SparseLinear, weight) for _ in range(2)]
    for layer in (masked, superposed):
        assert_same(layer.mask_bits, ff.pack_mask(torch.ones(6, 70).bool()).expand_as(layer.mask_bits), "mask")
    assert superposed.alpha.tolist() == [pytest.approx(1 / 3)] * 3
    masked.set_mask(some_mask(6, 70))
    masked.reset_parameters()
    assert_same(masked.mask, some_mask(6, 70), "mask that was set")
    torch.manual_seed(1)
    sparse[0].reset_parameters()
    assert_same(sparse[0].mask_bits, sparse[1].mask_bits, "mask")
    assert len(sparse[0].values) == len(weight.values)
    kept = ff.unpack_mask(sparse[0].mask_bits, 100)
    assert kept.any(1).all() and kept.any(0).all()  # no output without input, no input without output
    assert 0.09 < sparse[0].values.abs().max() <= 0.1  # as of Linear with 100 inputs


@WITH_TENSORS
def test_reset_parameters(case):
    """A seed gives the same parameters each time: those of the constructor, unless it was given them."""
    module = case.module(seed=4)
    draws = case.label.split()[0] not in {"BlockDCT2d", "BlockIDCT2d", "RGBToDCT"}
    flags = [p.requires_grad for p in module.parameters()]
    at_first = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for value in state_of(module).values():
            if value.is_floating_point():
                value.add_(1)
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        module.reset_parameters()
        states.append(copy.deepcopy(module.state_dict()))
    for name, value in module.state_dict().items():
        assert_same(states[0][name], states[1][name], name)
        if name == "alpha":
            continue
        if not case.label.startswith("SparseLinear"):
            assert_same(value, at_first[name], name)
    assert draws == any(not torch.equal(states[0][name], value) for name, value in module.state_dict().items())
    assert flags == [p.requires_grad for p in module.parameters()]


@EVERY
def test_defaults_of_torch_do_not_matter(case):
    """A model that has been built runs under any default device and dtype."""
    module, inputs = case.made()
    expected = output(module, inputs)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert_same(output(module, inputs), expected, "output")
    finally:
        torch.set_default_dtype(before)


def on_meta() -> dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]]:
    """Each from_*, of a layer on meta, with the shape of an input."""
    linear = lambda: nn.Linear(70, 6, device="meta", dtype=F64)  # noqa: E731
    conv = lambda: nn.Conv2d(4, 6, 3, device="meta", dtype=F64)  # noqa: E731
    pruned = lambda layer, mask: prune.custom_from_mask(layer, "weight", mask)  # noqa: E731
    m, k = some_mask(6, 70), some_mask(6, 4, 3, 3)
    image = (2, 4, 7, 8)
    return {
        "CoordConv1d.from_conv": lambda: (ff.nn.CoordConv1d.from_conv(nn.Conv1d(4, 6, 3, device="meta", dtype=F64)), (2, 4, 7)),
        "CoordConv2d.from_conv": lambda: (ff.nn.CoordConv2d.from_conv(conv()), image),
        "CoordConv3d.from_conv": lambda: (
            ff.nn.CoordConv3d.from_conv(nn.Conv3d(4, 6, 3, device="meta", dtype=F64)),
            (2, 4, 7, 8, 5),
        ),
        "CoordConvTranspose2d.from_conv": lambda: (
            ff.nn.CoordConvTranspose2d.from_conv(nn.ConvTranspose2d(4, 6, 3, device="meta", dtype=F64)),
            image,
        ),
        "MaskedLinear.from_linear": lambda: (ff.nn.MaskedLinear.from_linear(linear(), m), (2, 70)),
        "MaskedLinear.from_pruned": lambda: (ff.nn.MaskedLinear.from_pruned(pruned(linear(), m.to("meta"))), (2, 70)),
        "MaskedConv2d.from_conv": lambda: (ff.nn.MaskedConv2d.from_conv(conv(), k), image),
        "MaskedConv2d.from_pruned": lambda: (ff.nn.MaskedConv2d.from_pruned(pruned(conv(), k.to("meta"))), image),
        "SupermaskLinear.from_linear": lambda: (ff.nn.SupermaskLinear.from_linear(linear()), (2, 70)),
        "SupermaskConv2d.from_conv": lambda: (ff.nn.SupermaskConv2d.from_conv(conv()), image),
        "SparseLinear.from_linear": lambda: (ff.nn.SparseLinear.from_linear(linear(), m), (2, 70)),
        "SuperposedLinear.from_linear": lambda: (ff.nn.SuperposedLinear.from_linear(linear(), [m, ~m]), (2, 70)),
    }


@pytest.mark.parametrize("name", on_meta())
def test_from_a_layer_on_meta(name):
    layer, shape = on_meta()[name]()
    assert state_of(layer) and all(value.is_meta for value in state_of(layer).values())
    y = layer(torch.empty(shape, device="meta", dtype=F64))
    assert y.is_meta and y.dtype == F64 and y.shape[:2] == (2, 6)
    with poisoned_memory():
        layer.to_empty(device="cpu")
    reset(layer)
    assert layer(torch.ones(shape, dtype=F64)).isfinite().all()


def test_every_way_from_a_layer_has_a_case():
    ways = {
        f"{name}.{way}"
        for name in ff.nn.__all__
        for way in ("from_linear", "from_conv", "from_pruned")
        if hasattr(getattr(ff.nn, name), way)
    }
    inherited = {"SparseLinear.from_pruned"}  # on meta the pruned layer has no mask to count
    assert ways - inherited == set(on_meta())
    for call in (
        lambda: ff.nn.SparseLinear.from_linear(nn.Linear(4, 4, device="meta")),
        lambda: ff.nn.SparseLinear.from_pruned(
            prune.custom_from_mask(nn.Linear(4, 4, device="meta"), "weight", torch.ones(4, 4, device="meta"))
        ),
    ):
        with pytest.raises(ValueError, match="compress: weight is a meta tensor, and nothing says how many of its values are"):
            call()


def test_sparse_layer_of_another_device_and_dtype():
    """What can stay stays the same Parameter."""
    weight, bias = ff.compress(torch.randn(6, 70), some_mask(6, 70)), nn.Parameter(torch.randn(6), requires_grad=False)
    source = ff.nn.SparseLinear(weight, bias)
    again = ff.nn.SparseLinear(source.sparse_weight, source.bias, device="cpu", dtype=torch.float32)
    assert again.values is source.values and again.bias is source.bias is bias
    double = ff.nn.SparseLinear(source.sparse_weight, source.bias, dtype=F64)
    assert double.values.dtype == double.bias.dtype == F64 and double.values.requires_grad and not double.bias.requires_grad
    assert_same(double.values.detach(), weight.values.to(F64), "values")
    assert (double.format, double.in_features, double.out_features) == (source.format, 70, 6)
    plain = ff.nn.SparseLinear(weight)
    assert plain.values.untyped_storage().data_ptr() != weight.values.untyped_storage().data_ptr()
    assert plain.mask_bits.data_ptr() != weight.mask.data_ptr()
    with pytest.raises(TypeError, match="SparseLinear: dtype must be float16, bfloat16, float32 or float64, got int64"):
        ff.nn.SparseLinear(weight, dtype=torch.int64)


@pytest.mark.parametrize("cls", [ff.nn.BlockDCT2d, ff.nn.RGBToDCT])
def test_scales(cls):
    """A Parameter stays where it is; what was given comes back, unless nothing was."""
    numbers = [1 + i / 3 for i in range(64)]
    trained = nn.Parameter(torch.tensor(numbers))
    module = cls(scale=trained)
    assert module.scale is trained and module.scale.dtype == torch.float32
    trained.data.zero_()
    module.reset_parameters()
    assert module.scale is trained
    assert_same(trained.detach(), torch.tensor(numbers), "scale")
    module = module.to(F64)
    module.reset_parameters()
    assert_same(module.scale.detach(), torch.tensor(numbers).to(F64), "scale of another type")
    with pytest.raises(ValueError, match="scale is a Parameter, which is taken as it is, float64 on cpu; leave out device and"):
        cls(scale=trained, device="meta")
    meta = cls(scale=torch.empty(64, device="meta"))
    meta.to_empty(device="cpu").reset_parameters()
    assert_same(meta.scale, torch.ones(64), "scale that nobody knew")
    assert cls().scale is None
    cls().reset_parameters()


def test_a_scale_in_another_type():
    with pytest.raises(ValueError, match="BlockIDCT2d: scale is a Parameter, which is taken as it is, float32 on cpu; leave"):
        ff.nn.BlockIDCT2d(scale=nn.Parameter(torch.ones(64)), dtype=F64)
    assert ff.nn.BlockIDCT2d(scale=torch.ones(64), dtype=F64).scale.dtype == F64


def test_networks_and_backbones_on_meta():
    """Under any default device; device and dtype are the backbone's."""
    backbone = ff.models.resnet50(10, device="meta", dtype=torch.bfloat16)
    model = ff.models.dct_resnet50("dct24", 10, backbone=backbone)
    assert all(value.is_meta and value.dtype in {torch.bfloat16, torch.int64} for value in state_of(model).values())
    assert model.layer4[2].conv3.weight is backbone.layer4[2].conv3.weight
    backbone = next(case for case in CASES if case.label == "ResNet").made()[0]
    with torch.device("meta"):
        model = ff.models.dct_resnet50("dct24", 10, backbone=backbone)
    assert not any(value.is_meta for value in state_of(model).values())
    for options in ({"device": "cpu"}, {"dtype": F64}):
        with pytest.raises(ValueError, match="dct_resnet50: the backbone decides device and dtype; leave them out, and move"):
            ff.models.dct_resnet50("dct24", 10, backbone=backbone, **options)


# ---- compressed weights in files -----------------------------------------------------------------------------------------


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("format", ["auto", "bitmap", "csr16", "slab", "dense"])
def test_sparse_weight_in_a_file(format):  # noqa: A002
    """As weights_only reads it, also among other things, as a Parameter's, and after it has run."""
    weight, x = ff.compress(torch.randn(6, 70), some_mask(6, 70), format=format), torch.randn(3, 70)
    expected = ff.sparse_linear(x, weight)
    for value in (weight, weight.with_values(nn.Parameter(weight.values))):
        loaded = torch.load(saved({"layers": [value]}), weights_only=True)["layers"][0]
        assert type(loaded) is ff.SparseWeight and repr(loaded) == repr(weight)
        assert_same(ff.sparse_linear(x, loaded).detach(), expected, "product")
        assert loaded.values.requires_grad == value.values.requires_grad
    meta = torch.load(saved(weight), weights_only=True, map_location="meta")
    assert meta.device.type == "meta" and repr(meta).startswith("SparseWeight(shape=(6, 70)")


def test_sparse_weight_in_a_file_knows_who_chose_its_format():
    """The table, which is asked again when a layer gets other values, or the user."""
    whole, thin = torch.randn(1200, 2000), some_mask(1200, 2000, density=0.05)
    thinner = ff.nn.SparseLinear(ff.compress(whole, thin))
    assert thinner.format != "bitmap"
    for format in ("auto", "bitmap"):  # noqa: A001
        weight = torch.load(saved(ff.compress(whole, format=format)), weights_only=True)
        layer = ff.nn.SparseLinear(weight)
        layer.load_state_dict(thinner.state_dict())
        assert (layer.format, layer.reason) == (
            (thinner.format, thinner.reason) if format == "auto" else ("bitmap", "asked for")
        )


def test_sparse_weight_needs_nothing_but_the_import(tmp_path):
    """A fresh process, which has not touched torch.serialization."""
    torch.save(ff.compress(torch.eye(4)), tmp_path / "weight.pt")
    script = "import sys, torch, fourfold; print(torch.load(sys.argv[1], weights_only=True).decompress().tolist())"
    done = run_script(script, str(tmp_path / "weight.pt"))
    assert done.stdout.strip() == str(torch.eye(4).tolist())


def tampered() -> dict[str, tuple[type[Exception], str, Any]]:
    """What a file may hold, and what is said about it."""
    values, mask = torch.randn(int(some_mask(6, 70).sum())), ff.pack_mask(some_mask(6, 70))
    padded = mask.clone()
    padded[0, 15] = 1
    count = len(values)
    return {
        "too few values": (ValueError, f"values must be one for each of the {count} set bits", {"values": values[:-1]}),
        "too many values": (ValueError, f"values must be one for each of the {count} set bits", {"values": torch.ones(99)}),
        "one value for all": (ValueError, "values must be one for each", {"values": torch.ones(1).expand(10**9)}),
        "values of integers": (TypeError, "values must be float16, bfloat16", {"values": values.long()}),
        "values of two dimensions": (ValueError, r"values must be \[nnz\]", {"values": values[None]}),
        "no tensor": (TypeError, "values must be a Tensor, got list", {"values": [1.0]}),
        "values elsewhere": (ValueError, "mask is on cpu, weight on meta", {"values": values.to("meta")}),
        "a mask elsewhere": (ValueError, "mask is on meta, weight on cpu", {"mask": mask.to("meta")}),
        "a mask of more": (ValueError, "values must be one for each of the 420", {"mask": torch.ones(6, 70).bool()}),
        "a short mask": (ValueError, "packed mask for weight", {"mask": mask[:, :8]}),
        "pad bits": (ValueError, "mask has bits set beyond its 70 columns", {"mask": padded}),
        "a mask of numbers": (TypeError, "mask must be bool or packed uint8", {"mask": mask.long()}),
        "another shape": (ValueError, "packed mask for weight", {"shape": (60, 70)}),
        "a huge shape": (ValueError, "packed mask for weight", {"shape": (6, 2**60)}),
        "too huge a shape": (ValueError, r"shape must have fewer than 2\*\*63 elements", {"shape": (0, 2**63)}),
        "a negative shape": (ValueError, "shape must not be negative", {"shape": (6, -70)}),
        "a shape of floats": (TypeError, "each of shape must be an int", {"shape": (6.0, 70.0)}),
        "a shape of a word": (TypeError, r"shape must be \(N, K\)", {"shape": "67"}),
        "no such format": (ValueError, "format must be one of", {"format": "coo"}),
        "a format of numbers": (TypeError, "format must be one of", {"format": 3}),
        "a reason of numbers": (TypeError, "reason must be a str, got int", {"reason": 3}),
        "a hint of 0": (ValueError, "batch_hint must be at least 1, got 0", {"batch_hint": 0}),
        "a hint of a word": (TypeError, "batch_hint must be an int, got 'many'", {"batch_hint": "many"}),
        "more than that": (ValueError, "a saved one holds values, mask, shape, format, reason, batch_hint, got", {"places": 1}),
        "a number": (ValueError, "a saved one holds values, mask, shape, format, reason, batch_hint, got int", 3),
    }


@pytest.mark.parametrize("name", tampered())
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_tampered_sparse_weight_is_refused(monkeypatch, name, weights_only):
    """When it is read, and not when a kernel follows it out of bounds."""
    error, message, change = tampered()[name]
    weight = ff.compress(torch.randn(6, 70), some_mask(6, 70))
    good = weight.__getstate__()
    forged = {**good, **change} if isinstance(change, dict) else change
    for state in (good, forged):
        monkeypatch.setattr(ff.SparseWeight, "__getstate__", lambda _, state=state: state)
        file = saved(weight)
        if state is good:
            assert repr(torch.load(file, weights_only=weights_only)) == repr(weight)
        else:
            with pytest.raises(error, match=f"SparseWeight: {message}"):
                torch.load(file, weights_only=weights_only)
