"""Whether swapped layers compute what the old ones did: on a random input, and on an example of the model's own."""

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from ._pages import see
from ._running import as_it_is, evaluating, memory_of, tensors_in
from ._swap_layers import OP, SEE, Layer
from .nn import SparseLinear
from .ops import _checks as check
from .ops.cca import cka


class Certificate(NamedTuple):
    """How a layer's output on the example differs from before.

    max_difference: the largest absolute difference of an element; NaN where one of the two is NaN. cka: linear CKA of the two,
    samples and positions being the rows; NaN where an output is constant or has fewer than three rows.
    """

    max_difference: float
    cka: float


def difference(before: Sequence[Tensor], after: Sequence[Tensor], what: str) -> float:
    """The largest absolute difference of elements; NaN equals NaN.

    Raises:
        ValueError: the tensors are not of the same number, shapes and dtypes.
    """
    kinds = [[(tuple(x.shape), check.dtype_name(x)) for x in side] for side in (before, after)]
    if kinds[0] != kinds[1]:
        shown = [" and ".join(f"{shape} {dtype}" for shape, dtype in side) or "no tensor" for side in kinds]
        raise ValueError(
            f"{OP}: {what} gave {shown[0]}, and its new layer gives {shown[1]}; a recipe must keep shape and dtype"
        )
    largest = 0.0
    for narrow, other in zip(before, after, strict=True):
        wide = torch.complex128 if narrow.is_complex() else torch.float64
        x, y = narrow.to(wide), other.to(wide)
        same = (x == y) | (x.isnan() & y.isnan())
        if not bool(same.all()):
            apart = (x - y).abs()[~same].max().item()
            largest = apart if math.isnan(apart) else max(largest, apart)
    return largest


def rounding(x: Tensor) -> float:
    """How far results may differ for the order of additions alone: a few units of a 16-bit result, which is rounded once."""
    if x.numel() == 0 or not x.is_floating_point():
        return 0.0
    units = 4 if torch.finfo(x.dtype).bits <= 16 else 256
    return units * torch.finfo(x.dtype).eps * x.double().abs().nan_to_num(0, 0, 0).max().item()


# ---- a random input ------------------------------------------------------------------------------------------------------


def compare_alone(layer: Layer, new: nn.Module, change_output: bool) -> float | None:
    """The difference for a random input, or None where none can be made up.

    Raises:
        ValueError: the outputs differ by more than rounding, and are not to.
    """
    old = layer.module
    with evaluating(old, new), torch.no_grad(), keeping_random_state(old), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = _random_input(layer)
        if x is None:
            return None
        for hook in old._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                hook(old, ())  # the pruned weight, which is otherwise as of the last call
        try:
            before = list(tensors_in(old.forward(x)))
        except RuntimeError:  # what torch raises where it has no such layer of these sizes, or of this dtype
            return None
        try:
            after = list(tensors_in(new.forward(x)))
        except Exception as error:
            raise ValueError(
                f"{OP}: the new {type(new).__name__} of {layer} fails on a random input {list(x.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
    apart = difference(before, after, str(layer))
    if not change_output and not apart <= rounding(before[0]):
        raise ValueError(
            f"{OP}: the recipe for {layer} changes what it computes, by {apart:.3g} on a random input where the largest output "
            f"is {before[0].abs().max().item():.3g}; pass change_output=True if that is meant"
            f"{see('swapping.md#what-is-checked')}"
        )
    return apart


def _random_input(layer: Layer) -> Tensor | None:
    module: Any = layer.module
    if not layer.kind.__module__.startswith(("torch.nn.modules.", "fourfold.nn.")):
        return None  # its forward may take anything
    weight = module.values if isinstance(module, SparseLinear) else getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return None
    if isinstance(module, (nn.Linear, SparseLinear)):
        shape = [2, module.in_features]
    elif isinstance(module, nn.modules.conv._ConvNd):
        pads = [0] * len(module.kernel_size) if isinstance(module.padding, str) else module.padding
        sizes = zip(module.kernel_size, module.stride, module.dilation, pads, strict=True)
        # Two places of the kernel, and more than the padding on both sides, as what is transposed needs.
        shape = [2, module.in_channels, *(max(d * (k - 1) + 1 + s, 2 * p + 1) for k, s, d, p in sizes)]
    else:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(weight.device, weight.dtype)


@contextlib.contextmanager
def keeping_random_state(module: nn.Module) -> Iterator[None]:
    """Random numbers drawn inside are those that come next anyway, and are given back."""
    devices = {p.device for p in module.parameters() if p.is_cuda}
    with torch.random.fork_rng([device.index for device in devices]):
        yield


# ---- an example ----------------------------------------------------------------------------------------------------------


class Example:
    """A model run on the same inputs before and after its layers are swapped."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        if isinstance(example, Mapping):
            self._args, self._kwargs = [], dict(example)
        else:
            self._args, self._kwargs = list(example) if isinstance(example, (tuple, list)) else [example], {}
        given = list(tensors_in([self._args, self._kwargs]))
        if not given:
            raise TypeError(f"{OP}: example must hold a tensor, as the model takes it, got {type(example).__name__}")
        if any(x.shape[:1] == (0,) for x in given):
            shapes = [tuple(x.shape) for x in given]
            raise ValueError(f"{OP}: example must hold samples, got {shapes}; nothing would be compared")
        if any(x.is_meta for x in given):
            raise ValueError(f"{OP}: example is on the meta device, where nothing can be compared; leave it out")
        self.called: set[str] = set()
        self._model = model
        self._outputs: dict[str, list[list[Tensor]]] = {}
        self._of_model: list[Tensor] = []

    def before(self, layers: Mapping[str, nn.Module]) -> None:
        """Keeps the outputs of the layers and of the model."""
        given = [*self._model.parameters(), *self._model.buffers(), *tensors_in([self._args, self._kwargs])]
        owned = {memory_of(t) for t in given}

        def keep(name: str, output: Any) -> None:
            self.called.add(name)
            found = list(tensors_in(output))
            if any(x.numel() for x in found) and not any(bool(x.isfinite().any()) for x in found):
                raise ValueError(
                    f"{OP}: layer {name!r} gives no finite number for the example, so nothing can be compared; take others"
                )
            self._outputs.setdefault(name, []).append([as_it_is(x.detach(), owned) for x in found])

        with _naming("before any layer was swapped"):
            self._of_model = [x.clone() for x in self._run(layers, keep, {}, None)]
            self._refuse_read({name: module for name, module in layers.items() if name not in self.called})

    def _refuse_read(self, silent: Mapping[str, nn.Module]) -> None:
        """Raises if a Parameter of a layer that is not called is used all the same."""
        owners = Counter(id(p) for module in self._model.modules() for p in module._parameters.values())
        names = {id(p): name for name, module in silent.items() for p in module.parameters() if owners[id(p)] == 1}
        if not names:
            return
        with _Reads(names) as reads:
            self._run({}, None, {}, None)
        for name in silent:
            if name in reads.found:
                raise ValueError(
                    f"{OP}: the model reads the weight of layer {name!r} and never calls it, so a new layer there would do "
                    f"nothing; leave it out with where={SEE}"
                )

    def after(
        self, layers: Mapping[str, nn.Module], originals: Mapping[str, nn.Module], may_change: bool
    ) -> tuple[dict[str, Certificate], dict[str, float], float | None]:
        """Certificates by layer, the largest difference that rounding explains by layer, and the model's own difference.

        Args:
            layers: the new ones.
            originals: those that should not be called any more.
            may_change: outputs may change, and with them how often a layer is called, as that of an expert.

        Raises:
            ValueError: the model fails, an output has another shape, or a layer isn't called as often as the original was.
        """
        rows: dict[str, list[tuple[Tensor | None, Tensor | None]]] = {}
        similar: dict[str, float] = {}
        apart: dict[str, float] = {}
        allowed: dict[str, float] = {}

        def compare(name: str, output: Any) -> None:
            if not self._outputs.get(name):
                if may_change:
                    return
                raise ValueError(f"{OP}: layer {name!r} is called more often than before it was swapped")
            before, after = self._outputs[name].pop(0), list(tensors_in(output))
            here = difference(before, after, f"layer {name!r}")
            if not before:
                return
            apart[name] = here if math.isnan(here) else max(apart.get(name, 0.0), here)
            allowed[name] = max([allowed.get(name, 0.0), *map(rounding, before)])
            rows.setdefault(name, []).append((_rows(layers[name], before[0]), _rows(layers[name], after[0])))
            if not self._outputs[name]:  # at once, to keep no rows until the end
                similar[name] = _cka(rows.pop(name))

        def still_called(name: str) -> None:
            raise ValueError(
                f"{OP}: the model still calls the old layer {name!r}, by a reference that is not a submodule, so a new layer "
                f"there would do nothing; leave it out with where={SEE}"
            )

        with _naming("with its new layers"):
            outputs = self._run(layers, compare, originals, still_called)
            of_model = difference(self._of_model, outputs, "the model") if self._of_model else None
            for name, left in self._outputs.items():
                if left and not may_change:
                    raise ValueError(f"{OP}: layer {name!r} is called less often than before it was swapped")
        return {name: Certificate(apart[name], similar.get(name, math.nan)) for name in apart}, allowed, of_model

    def _run(
        self, layers: Mapping[str, nn.Module], call: Any, others: Mapping[str, nn.Module], call_other: Any
    ) -> list[Tensor]:
        handles = []
        try:
            for name, module in layers.items():
                hook = lambda _m, _a, output, name=name: call(name, output)  # noqa: E731
                handles.append(module.register_forward_hook(hook))
            for name, module in others.items():  # whose hooks are those of the new layers by now
                module.__dict__["forward"] = lambda *_a, name=name, **_k: call_other(name)
            with evaluating(self._model), torch.no_grad(), keeping_random_state(self._model), _keeping_buffers(self._model):
                args, kwargs = _copied(self._args), _copied(self._kwargs)  # a model may write into its inputs
                return list(tensors_in(self._model(*args, **kwargs)))
        finally:
            for handle in handles:
                handle.remove()
            for module in others.values():
                module.__dict__.pop("forward", None)


@contextlib.contextmanager
def _keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers that a forward pass writes or replaces are put back."""
    owned = [(module._buffers, name, b) for module in model.modules() for name, b in module._buffers.items() if b is not None]
    kept = [(b._version, b.clone()) for _, _, b in owned]
    try:
        yield
    finally:
        for (buffers, name, b), (version, value) in zip(owned, kept, strict=True):
            buffers[name] = b
            if b._version != version:
                b.copy_(value)


class _Reads(TorchFunctionMode):
    """Notes which of some tensors torch's functions make tensors of; names are by their ids."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.found |= {self.names[id(x)] for x in tensors_in([args, kwargs or {}]) if id(x) in self.names}
        return result


@contextlib.contextmanager
def _naming(when: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{OP}:"):
            raise
        raise ValueError(f"{OP}: the model fails on the example, {when}: {type(error).__name__}: {error}") from error


def _copied(x: Any) -> Any:
    """With tensors of its own, in lists, tuples and dicts."""
    if isinstance(x, Tensor):
        return x.clone()
    if type(x) in {list, tuple}:
        return type(x)(map(_copied, x))
    return {key: _copied(value) for key, value in x.items()} if type(x) is dict else x


def _rows(layer: nn.Module, x: Tensor) -> Tensor | None:
    """An output as [samples and positions, features], in memory of its own; None where it has no such form."""
    if x.dtype not in check.FLOATING or x.layout is not torch.strided or not bool(x.isfinite().all()):
        return None
    of_channels = x.dim() > 3  # of layers that anybody wrote; tokens have their features last
    if isinstance(layer, (nn.Linear, SparseLinear)):
        of_channels = False
    elif isinstance(layer, nn.modules.conv._ConvNd):
        of_channels = x.dim() == len(layer.kernel_size) + 2
    if x.dim() < 2 or x.numel() == 0:
        return None
    rows = x.movedim(1, -1) if of_channels else x
    return rows.reshape(-1, rows.shape[-1]).clone()


def _cka(pairs: Sequence[tuple[Tensor | None, Tensor | None]]) -> float:
    """Linear CKA over a layer's calls."""
    before, after = ([pair[side] for pair in pairs] for side in (0, 1))
    x, y = ([rows for rows in side if rows is not None] for side in (before, after))
    if len(x) < len(pairs) or len(y) < len(pairs) or len({rows.shape[1] for rows in x}) > 1:
        return math.nan
    if sum(map(len, x)) < 3:  # of two rows it is 1, whatever they hold
        return math.nan
    try:
        return float(cka(torch.cat(x), torch.cat(y)))
    except ValueError:  # a constant layer
        return math.nan
