"""swap: replace layers of a model that somebody else wrote, in place, checked, and to be undone."""

import contextlib
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ._pages import see
from ._progress import progress_bar
from ._running import evaluating
from ._swap_check import Certificate, Example, compare_alone
from ._swap_layers import OP, Layer, check_arguments, choose, kind_of, refuse, refuse_losing, refuse_wrapped

Recipes: TypeAlias = Mapping[type[nn.Module], Callable[[Any], Any]]
Where: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], Any] | None

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Left:
    """What a recipe returns to leave a layer as it is, and why; the report says so."""

    reason: str


class _Swapped:
    """A layer and what stands in its place."""

    def __init__(self, layer: Layer, new: nn.Module) -> None:
        self.layer, self.new = layer, new
        self.difference: float | None = None  # of the outputs for a random input; None where none was tried
        homes = {id(p): (owner, name) for owner in new.modules() for name, p in owner._parameters.items() if p is not None}
        old = [(owner, name, p) for owner in layer.module.modules() for name, p in owner._parameters.items() if p is not None]
        self._shared = [(owner, name, *homes[id(p)]) for owner, name, p in old if id(p) in homes]
        self._home = _home(new)
        self._hooks: dict[str, dict[int, Any]] = {}  # by kind, those that the two had before
        self._own: set[int] = set()  # new's

    def put(self) -> None:
        for parent, attribute in self.layer.places:
            parent._modules[attribute] = self.new
        if all(module is not self.layer.module for module in self.new.modules()):
            self._move_hooks()  # else new is built around old, which goes on being called

    def stands(self) -> bool:
        return all(parent._modules.get(attribute) is self.new for parent, attribute in self.layer.places)

    def lost(self) -> str | None:
        """The name of a Parameter that both had, and the new layer has no more."""
        return next((name for _, _, owner, name in self._shared if owner._parameters.get(name) is None), None)

    def take_back(self) -> None:
        original = self.layer.module
        for parent, attribute in self.layer.places:
            parent._modules[attribute] = original
        if original.training != self.new.training:
            original.train(self.new.training)
        self._take_back_hooks()
        # A move between unlike devices, as from meta, makes new Parameter objects.
        for owner, name, new_owner, new_name in self._shared:
            owner._parameters[name] = new_owner._parameters[new_name]
        home = _home(self.new)
        if home is not None and home != self._home and not any(t.is_meta for t in _held(original)):
            original.to(*home)

    def _move_hooks(self) -> None:
        """The old layer's dicts themselves become the new one's, so that the handles of hooks still remove them."""
        old, new = self.layer.module, self.new
        for kind in _HOOKS:
            hooks, own = getattr(old, kind), getattr(new, kind)
            self._hooks[kind] = dict(hooks)
            self._own.update(own)
            for key in _pruning(old) if kind.startswith("_forward_pre_hooks") else ():
                hooks.pop(key, None)
            hooks.update(own)
            setattr(new, kind, hooks)
        _tell_hooks(old, new)
        if old._is_full_backward_hook is not None:
            new._is_full_backward_hook = old._is_full_backward_hook

    def _take_back_hooks(self) -> None:
        """Leaves the old layer those that it had and nobody removed, those of pruning, and what came since."""
        old = self.layer.module
        pruning = {key for key, hook in self._hooks.get("_forward_pre_hooks", {}).items() if _prunes(hook)}
        for kind, had in self._hooks.items():
            hooks = getattr(old, kind)
            now = dict(hooks)
            hooks.clear()
            hooks.update({key: hook for key, hook in had.items() if key in now or key in pruning})
            hooks.update({key: hook for key, hook in now.items() if key not in had and key not in self._own})
        _tell_hooks(self.new, old)


def _prunes(hook: Any) -> bool:
    return isinstance(hook, prune.BasePruningMethod)


def _pruning(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if _prunes(hook)]


def _tell_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hooks before a load_state_dict keep a weak reference to their layer."""
    for hook in new._load_state_dict_pre_hooks.values():
        held = getattr(hook, "module", None)
        if isinstance(held, weakref.ref) and held() is old:
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]


def _said(difference: float) -> str:
    return "output unchanged" if difference == 0 else f"max difference {difference:.3g}"


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _home(module: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype of its first tensor of numbers."""
    return next(((t.device, t.dtype) for t in _held(module) if t.is_floating_point()), None)


class SwapReport:
    """What :func:`swap` did; printed, one line per layer.

    Attributes:
        names: of the layers that were replaced, in the model's order; of a layer with several names the first.
        left: {name: reason} of the layers that stay as they are, though where= chose them.
        certificate: {name: :class:`Certificate`} of those that the example ran, if there was one, and that gave tensors.
        model_difference: the largest absolute difference of the model's own outputs on the example; None where there are none.
        new_parameters: the Parameters that the model did not have before: hand them to the optimizer with
            ``optimizer.add_param_group({"params": report.new_parameters})``. All others are the same objects as before.
    """

    def __init__(self, model: nn.Module, swapped: list[_Swapped], left: dict[str, str], known: set[int]) -> None:
        self.names = tuple(each.layer.name for each in swapped)
        self.left = left
        self.certificate: dict[str, Certificate] = {}
        self.model_difference: float | None = None
        self._new = {name: p for name, p in model.named_parameters() if id(p) not in known}
        self._swapped, self._undone = swapped, False
        self._called: set[str] | None = None  # the layers that the example ran, if there was one

    @property
    def new_parameters(self) -> list[nn.Parameter]:
        """The Parameters that the model did not have before."""
        return list(self._new.values())

    def __repr__(self) -> str:
        return f"SwapReport({len(self.names)} swapped, {len(self.left)} left, {len(self._new)} new parameters)"

    def __str__(self) -> str:
        rows = [
            (each.layer.name, f"{each.layer.kind.__name__} -> {kind_of(each.new).__name__}", self._line(each))
            for each in self._swapped
        ]
        rows += [(name, "left as it is", reason) for name, reason in self.left.items()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else [0, 0]
        return "\n".join(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {text}".rstrip() for name, kind, text in rows)

    def _line(self, each: _Swapped) -> str:
        certificate = self.certificate.get(each.layer.name)
        if certificate is not None:
            parts = [_said(certificate.max_difference)]
            parts[0] += "" if math.isnan(certificate.cka) else f", CKA {certificate.cka:.6f}"
        elif self._called is not None and each.layer.name not in self._called:
            parts = ["not run by the example"]
        elif each.difference is None:
            parts = ["output not compared"]
        else:
            parts = [_said(each.difference) + " on a random input"]
        inside = {id(p) for p in each.new.parameters()}
        new = [
            f"{name.removeprefix(each.layer.name + '.')} {list(p.shape)}{'' if p.requires_grad else ' frozen'}"
            for name, p in self._new.items()
            if id(p) in inside
        ]
        return "; ".join(parts + (["new: " + ", ".join(new)] if new else []))

    def undo(self) -> None:
        """Puts the very same original modules back, in the mode, dtype and device that the model is in by now.

        What training did meanwhile to the Parameters that both layers hold, and to all others, stays.

        Raises:
            ValueError: this was done before, another module stands in a layer's place by now, or a Parameter is no longer one
                (as by pruning since) or is sharded; nothing has changed.
        """
        if self._undone:
            raise ValueError(f"{OP}: this swap has been undone already")
        for each in self._swapped:
            if not each.stands():
                raise ValueError(
                    f"{OP}: in the place of {each.layer} stands another module than swap put there; undo later changes first"
                )
            if any(hasattr(p, "device_mesh") for p in each.new.parameters()):
                raise ValueError(
                    f"{OP}: {each.layer} has been sharded since, with the new layer's parameters; undo before that"
                )
            lost = each.lost()
            if lost is not None:
                raise ValueError(
                    f"{OP}: {lost} in the place of {each.layer} is no longer a Parameter of the new layer, which was pruned or "
                    "reparametrised since; remove that first"
                )
        for each in self._swapped:
            each.take_back()
        self._undone = True


def swap(
    model: nn.Module, recipes: Recipes, *, where: Where = None, example: Any = None, change_output: bool = False
) -> SwapReport:
    """Replaces layers of a model in place, all that are chosen or none, with a report that can undo it.

    A new layer keeps the Parameter objects that its recipe hands on, so optimizers go on working, and the old one's training
    mode, hooks and parametrizations (``torch.nn.utils.parametrize``). A layer held in several places is swapped once and stays
    shared. Ready recipes are in :mod:`fourfold.recipes`.

    Args:
        model: any module; a compiled or sharded one, or one wrapped for data parallel, is refused.
        recipes: {type: function of the layer -> new layer} for layers whose type is exactly the key. A function must not write
            into the layer; it may return the layer itself, or :class:`Left`, to leave it as it is.
        where: which of these layers: a glob on dotted names (``*`` within one component, ``**`` across), a list of globs, or
            a function (name, module) -> bool. A layer with several names is chosen by any of them. None: all.
        example: inputs of the model: a tensor, a tuple or list of positional or a dict of keyword arguments. The model runs on
            it before and after, in eval mode, and the report certifies each layer: largest output difference and linear CKA.
            Buffers that it writes are put back; a model must keep no other state between runs.
        change_output: allow recipes after which a layer computes something else. Recipes that cannot do without, as
            ``fourfold.recipes.supermask``, ask for it themselves. Without it every new layer is run beside the old one on a
            random input (of layers other than Linear, Conv and ConvTranspose only the example can tell), and a difference
            beyond rounding is an error. On the meta device nothing can be compared.

    Returns:
        A :class:`SwapReport`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: nothing is chosen; a layer is lazy, quantised, sharded, never called by its parent, or holds tensors that a
            new one would not; a recipe fails, unties a tied weight or changes an output unasked. The layer is named, and the
            model is as it was.
    """
    check_arguments(model, recipes, where, change_output)
    refuse_wrapped(model)
    run = None if example is None else Example(model, example)
    chosen, related = choose(model, recipes, where)
    refuse(chosen)
    known = {id(p) for p in model.parameters()}
    swapped, left = _new_layers(chosen, recipes, change_output)
    _refuse_shared(model, swapped)
    _refuse_untying(model, swapped)
    if run is not None and swapped:
        run.before({each.layer.name: each.layer.module for each in swapped})
    for each in swapped:
        each.put()
    left.update({layer.name: f"a {layer.kind.__name__}, which is not exactly a type in recipes" for layer in related})
    report = SwapReport(model, swapped, left, known)
    if run is not None and swapped:
        try:
            _certify(report, run, swapped, recipes, change_output)
        except BaseException:
            report.undo()
            raise
    return report


def _new_layers(layers: Sequence[Layer], recipes: Recipes, change_output: bool) -> tuple[list[_Swapped], dict[str, str]]:
    """What the recipes make of the layers, each compared with the old one; the model is not touched."""
    swapped, left = [], {}
    bar = progress_bar(len(layers), "layer", OP)
    with bar if bar is not None else contextlib.nullcontext():
        for layer in layers:
            new = _new_layer(layer, recipes[layer.kind])
            if isinstance(new, Left):
                left[layer.name] = new.reason
            else:
                refuse_losing(layer, new)
                each = _Swapped(layer, new)
                each.difference = compare_alone(layer, new, _may_change(layer, recipes, change_output))
                swapped.append(each)
            if bar is not None:
                bar.update()
    return swapped, left


def _may_change(layer: Layer, recipes: Recipes, change_output: bool) -> bool:
    """Whether it was asked for: by the caller, or by a recipe whose name says so."""
    return change_output or bool(getattr(recipes[layer.kind], "changes_output", False))


def _new_layer(layer: Layer, recipe: Callable[[Any], Any]) -> "nn.Module | Left":
    source = layer.module
    if parametrize.is_parametrized(source):
        source = _without_parametrizations(source, layer.kind)
    held = _held(source)
    written = [t._version for t in held]
    try:
        new = recipe(source)
    except Exception as error:
        raise ValueError(f"{OP}: {layer} could not be swapped, and nothing has changed: {error}") from error
    if written != [t._version for t in held]:
        raise ValueError(
            f"{OP}: the recipe for {layer} writes into the layer's own tensors, which is not taken back; let it copy what it "
            "changes"
        )
    if new is source:
        return Left("its recipe gave it back")
    if isinstance(new, Left):
        return new
    if not isinstance(new, nn.Module):
        raise TypeError(f"{OP}: the recipe for {layer} must return a torch.nn.Module or Left, got {type(new).__name__}")
    modes = [(module, module.training) for module in layer.module.modules()]
    new.train(layer.module.training)
    for module, mode in modes:  # new may be built around it
        module.training = mode
    if source is not layer.module:
        _parametrize_as(layer, source, new)
    return new


# ---- what moves from the old layer to the new one ------------------------------------------------------------------------


def _without_parametrizations(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A stand-in with ordinary Parameters, for recipes to read; all else is the layer's own."""
    plain: Any = kind.__new__(kind)
    plain.__dict__.update(module.__dict__)
    lists: Any = module.parametrizations
    plain._modules = {name: child for name, child in module._modules.items() if child is not lists}
    plain._parameters = dict(module._parameters)
    # Some parametrizations, as spectral norm's, step on whenever they are read in training.
    with evaluating(module), torch.no_grad():
        for name, of_name in lists.items():
            grad = any(p.requires_grad for p in of_name.parameters())
            plain._parameters[name] = nn.Parameter(getattr(module, name).detach(), requires_grad=grad)
    return plain


def _parametrize_as(layer: Layer, source: nn.Module, new: nn.Module) -> None:
    """Gives new the old layer's own parametrizations, with their Parameters."""
    lists: Any = layer.module.parametrizations
    for name in lists:
        if new._parameters.get(name) is not source._parameters[name]:
            raise ValueError(
                f"{OP}: {layer} could not be swapped, and nothing has changed: its {name} is parametrized, and the new layer "
                f"keeps no such Parameter; call torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) first"
            )
        parametrize.register_parametrization(new, name, nn.Identity())
        new_lists: Any = new.parametrizations
        new_lists[name] = lists[name]


def _refuse_shared(model: nn.Module, swapped: Sequence[_Swapped]) -> None:
    """Raises where a new layer is another one too, or is somewhere in the model already."""
    taken = {id(module): f"the model's {name!r}" for name, module in model.named_modules()}
    for each in swapped:
        if id(each.new) in taken:
            raise ValueError(
                f"{OP}: the recipe for {each.layer} gave a module that is also {taken[id(each.new)]}; make a new one for each"
            )
        taken[id(each.new)] = f"that for {each.layer}"


def _refuse_untying(model: nn.Module, swapped: Sequence[_Swapped]) -> None:
    """Raises where a Parameter that other layers hold too is not held by the new layer."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, f"{prefix}.{name}" if prefix else name))
    for each in swapped:
        inside = {id(module) for module in each.layer.module.modules()}
        kept = {id(p) for p in each.new.parameters()}
        for name, parameter in each.layer.module.named_parameters():
            others = [place for owner, place in owners[id(parameter)] if id(owner) not in inside]
            if others and id(parameter) not in kept:
                raise ValueError(
                    f"{OP}: {name} of {each.layer} is tied to {others[0]!r}, and its {kind_of(each.new).__name__}, which has "
                    "parameters of its own, would not be; leave the layer out with where=, or untie it first"
                )


def _certify(report: SwapReport, run: Example, swapped: Sequence[_Swapped], recipes: Recipes, change_output: bool) -> None:
    names = {each.layer.name: each for each in swapped}
    replaced = {
        name: each.layer.module
        for name, each in names.items()
        if not any(module is each.layer.module for module in each.new.modules())
    }
    may_change = any(_may_change(each.layer, recipes, change_output) for each in swapped)
    new = {name: each.new for name, each in names.items()}
    certificate, allowed, report.model_difference = run.after(new, replaced, may_change)
    report._called = run.called
    silent = [name for name in names if name not in run.called]
    if silent:
        more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
        warnings.warn(
            f"{OP}: the example does not run layer {silent[0]!r}{more}; if a parent reads its weight and never calls it, the "
            "new layer does nothing",
            stacklevel=3,
        )
    report.certificate = {name: certificate[name] for name in names if name in certificate}
    if may_change:
        return  # what follows a layer that may change its output changes too
    for name, (apart, _) in report.certificate.items():
        # Behind layers that round otherwise differences add up; these were compared alone before.
        if not apart <= allowed[name] * (1 if names[name].difference is None else 100):
            raise ValueError(
                f"{OP}: the recipe for {names[name].layer} changes what it computes, by {apart:.3g} on the example; pass "
                f"change_output=True if that is meant{see('swapping.md#what-is-checked')}"
            )
