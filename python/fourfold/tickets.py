"""Lottery tickets: train, prune, rewind, and again (Frankle and Carbin, 2019, arXiv 1803.03635)."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._progress import progress_bar
from .nn.maskmm import MaskedConv2d, MaskedLinear
from .ops import _checks as check
from .ops.maskmm import pack_mask, real
from .ops.maskmm_tickets import SCOPES, check_criterion, keep_by_criterion

REWINDS = ("init", "reinit", "none")

_OP = "prune_and_rewind"


@dataclass(frozen=True)
class Round:
    """One training in :func:`prune_and_rewind`.

    density: the fraction of weights that it trained, of all layers together. result: what train_fn returned. masks: those it
    trained with, packed, by layer name.
    """

    density: float
    result: Any
    masks: dict[str, Tensor] = field(repr=False)


def prune_and_rewind(
    model: nn.Module,
    train_fn: Callable[[Any], Any],
    *,
    rounds: int,
    rate: float | Mapping[str, float],
    criterion: str = "large_final",
    rewind: str | Mapping[str, Tensor] = "init",
    scope: str = "layer",
    seed: int | None = None,
    progress: bool = True,
) -> tuple[Any, list[Round]]:
    """Looks for a lottery ticket: trains, drops a share of the weights, puts the others back to where they began, and again.

    Every ``torch.nn.Linear`` and ``torch.nn.Conv2d`` of a copy of model becomes a :class:`fourfold.nn.MaskedLinear` or
    :class:`fourfold.nn.MaskedConv2d`, whose weight is zero off the mask and stays so (where it is tied to another module's,
    there too). The copy is trained rounds + 1 times, and pruned in between; the model given is left as it is, with the initial
    weights.

    Args:
        model: with its initial weights. Masked layers that it has already go on from their masks.
        train_fn: trains the model that it gets in place, with an optimizer of its own; what it returns goes to the history.
        rounds: how often weights are dropped, at least 1.
        rate: the fraction of a layer's remaining weights to drop each time, in (0, 1); or fractions by layer name, where layers
            without a name stay whole: the paper prunes the last layer at half the rate of the others.
        criterion: which weights to keep; as of :func:`mask_from_criterion`.
        rewind: where the weights go after pruning: "init", back to the model given (buffers too); "reinit", drawn anew by each
            module's reset_parameters; "none", on from where they are; or a state_dict of the model, as of an early step of
            training (Frankle et al., 2020, arXiv 1912.05671).
        scope: "layer" drops the fraction of each layer, "global" of all together.
        seed: of criterion "random".
        progress: shows a bar where tqdm is installed and standard error is a terminal.

    Returns:
        The copy as the last training left it, and the history: a :class:`Round` for each of the rounds + 1 trainings.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: anything else, as a rate out of range, a layer name that there is not, a parametrized weight, or a model
            without such layers.

    Warns:
        UserWarning: training has changed weights off a mask, as happens where the model reads a weight without calling its
            layer; what was trained then was not pruned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(train_fn):
        raise TypeError(f"{_OP}: train_fn must be a function of the model, got {type(train_fn).__name__}")
    rounds = check.integer(_OP, "rounds", rounds)
    if rounds < 1:
        raise ValueError(f"{_OP}: rounds must be at least 1, got {rounds}")
    check.one_of(_OP, "scope", scope, SCOPES)
    generator = check_criterion(_OP, criterion, seed)
    if not isinstance(rewind, Mapping):
        check.one_of(_OP, "rewind", rewind, REWINDS)

    for name, module in model.named_modules():
        if "weight_orig" in module._parameters:
            raise ValueError(
                f"{_OP}: {name or 'the model'} is pruned by torch.nn.utils.prune; take it over first, with "
                "MaskedLinear.from_pruned or MaskedConv2d.from_pruned"
            )
        for label, parameter in module.named_parameters(name, recurse=False):
            check.local(_OP, label, parameter)
    _refuse_parametrized(model, rate)
    ticket, layers = _masked_copy(model)
    rates = _rates(rate, list(layers), scope)
    layers = {name: layer for name, layer in layers.items() if name in rates}
    start = _snapshot(ticket, layers)
    target = start if not isinstance(rewind, Mapping) else _taken_from(rewind, start)
    if rewind == "reinit":
        _check_reinit(ticket)
    began = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    history: list[Round] = []
    bar = progress_bar(rounds + 1, "round") if progress else None
    try:
        for number in range(rounds + 1):
            masks = {name: layer.mask_bits.clone() for name, layer in layers.items()}
            kept = sum(int(layer.mask.sum()) for layer in layers.values())
            density = kept / max(1, sum(layer.weight.numel() for layer in layers.values()))
            ticket.zero_grad()  # what the last training left is of other masks
            history.append(Round(density, train_fn(ticket), masks))
            _warn_of_trained(ticket, layers)
            for layer in layers.values():
                _zero_off_mask(layer)  # a weight tied to another module's may have been trained there
            if bar is not None:
                bar.set_postfix(density=f"{density:.3g}")
                bar.update()
            if number == rounds:
                break
            _prune(layers, began, rates, criterion, scope, generator)
            _rewind(ticket, layers, rewind, target)
            if rewind != "none":
                began = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    finally:
        if bar is not None:
            bar.close()
    return ticket, history


_Masked = MaskedLinear | MaskedConv2d


def _refuse_parametrized(model: nn.Module, rate: Any) -> None:
    """A layer whose weight is computed from other Parameters, if it is to be pruned."""
    for name, module in model.named_modules():
        wanted = not isinstance(rate, Mapping) or name in rate
        if wanted and isinstance(module, (nn.Linear, nn.Conv2d)) and parametrize.is_parametrized(module, "weight"):
            raise ValueError(
                f"{_OP}: the weight of {name or 'the model'} is parametrized, so it cannot be pruned; take that off first, by "
                "torch.nn.utils.parametrize.remove_parametrizations, or give rates by name, without this layer"
            )


def _warn_of_trained(ticket: nn.Module, layers: dict[str, _Masked]) -> None:
    """Gradients are 0 off the mask, so what is not 0 there came by another way than the layer's own call."""
    owners = Counter(id(p) for module in ticket.modules() for p in module._parameters.values() if p is not None)
    for name, layer in layers.items():
        outside = int((layer.weight.detach()[~layer.mask] != 0).sum())
        if outside and owners[id(layer.weight)] == 1:
            warnings.warn(
                f"{_OP}: training changed {outside} weights of {name or 'the model'} off its mask; a model that reads a weight "
                "without calling its layer (F.linear(x, layer.weight), layers in a plain list) trains them all, unmasked: call "
                "the layer, as a submodule",
                stacklevel=3,
            )


def _masked_copy(model: nn.Module) -> tuple[nn.Module, dict[str, _Masked]]:
    """A copy whose layers are masked, and these by name."""
    try:
        ticket = copy.deepcopy(model)
    except RuntimeError as error:  # torch's old weight_norm keeps a tensor of a graph
        raise ValueError(f"{_OP}: {type(model).__name__} cannot be copied ({error})") from error
    layers: dict[str, _Masked] = {}
    masked: dict[int, nn.Module] = {}
    for name, module in ticket.named_modules():
        new: _Masked
        if type(module) is nn.Linear:
            new = MaskedLinear.from_linear(module)
        elif type(module) is nn.Conv2d:
            new = MaskedConv2d.from_conv(module)
        elif isinstance(module, (MaskedLinear, MaskedConv2d)):
            new = module
        else:
            continue
        if new is not module:  # hooks go on being called
            hooks = {key: value for key, value in vars(module).items() if key.endswith(("_hooks", "_with_kwargs"))}
            vars(new).update(hooks)
        layers[name], masked[id(module)] = new, new
    if not layers:
        raise ValueError(f"{_OP}: {type(model).__name__} has no Linear or Conv2d to prune")
    for parent in list(ticket.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in masked:
                parent._modules[name] = masked[id(child)]
    root = masked.get(id(ticket), ticket)
    for layer in layers.values():
        _zero_off_mask(layer)
    return root, layers


def _rates(rate: Any, names: list[str], scope: str) -> dict[str, float]:
    """Fractions to drop by layer name."""
    if isinstance(rate, Mapping):
        unknown = [name for name in rate if name not in names]
        if unknown:
            raise ValueError(f"{_OP}: rate names {unknown[0]!r}, which is no Linear or Conv2d of the model; there are {names}")
        if scope == "global":
            raise ValueError(f"{_OP}: scope='global' drops one fraction of all layers together; pass rate as a number")
    rates = dict(rate) if isinstance(rate, Mapping) else dict.fromkeys(names, rate)
    for value in rates.values():
        if not 0 < real(_OP, "rate", value) < 1:
            raise ValueError(f"{_OP}: rate must lie in (0, 1), got {value}: it is the fraction dropped, 0.2 keeps 80%")
    return {name: float(value) for name, value in rates.items()}


def _prune(
    layers: dict[str, _Masked],
    began: dict[str, Tensor],
    rates: dict[str, float],
    criterion: str,
    scope: str,
    generator: torch.Generator | None,
) -> None:
    """Drops a share of what every layer, or all of them, still has."""
    groups = [list(layers)] if scope == "global" else [[name] for name in layers]
    for group in groups:
        kept = torch.cat([layers[name].mask.flatten() for name in group])
        init = torch.cat([began[name].flatten() for name in group])
        final = torch.cat([layers[name].weight.detach().flatten() for name in group])
        nan = final.isnan()
        if bool(nan.any()):
            raise ValueError(f"{_OP}: training left {int(nan.sum())} NaN in the weights of {', '.join(group)}")
        count = int(kept.sum())
        mask = keep_by_criterion(criterion, init, final, count - int(rates[group[0]] * count), kept, generator)
        for name, part in zip(group, mask.split([layers[name].weight.numel() for name in group]), strict=True):
            layers[name].set_mask(pack_mask(part.reshape(layers[name].weight.shape)))


@torch.no_grad()
def _zero_off_mask(layer: _Masked) -> None:
    """So that norms, decay and code that reads the weight itself see what forward sees; gradients keep it so."""
    layer.weight.masked_fill_(~layer.mask, 0)


def _snapshot(ticket: nn.Module, layers: dict[str, _Masked]) -> dict[str, Tensor]:
    """A copy of the state that rewinding restores: all but the masks, whatever names they have."""
    masks = {id(layer.mask_bits) for layer in layers.values()}
    state = ticket.state_dict(keep_vars=True)
    return {name: value.detach().clone() for name, value in state.items() if id(value) not in masks}


def _taken_from(state: Mapping[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    missing = [name for name in start if name not in state and not name.endswith("mask_bits")]
    if missing:
        raise ValueError(f"{_OP}: the state_dict of rewind has no {missing[0]!r}; pass model.state_dict() of an early step")
    for name, value in start.items():
        if name in state and state[name].shape != value.shape:
            got = tuple(state[name].shape)
            raise ValueError(f"{_OP}: {name!r} in the state_dict of rewind has shape {got}; expected {tuple(value.shape)}")
    return {name: state[name].detach().clone() for name in start if name in state}


def _check_reinit(ticket: nn.Module) -> None:
    for name, module in ticket.named_modules():
        if next(module.parameters(recurse=False), None) is not None and not hasattr(module, "reset_parameters"):
            raise ValueError(
                f"{_OP}: rewind='reinit' calls reset_parameters, which {name or 'the model'} ({type(module).__name__}) has not"
            )


def _rewind(ticket: nn.Module, layers: dict[str, _Masked], rewind: Any, target: dict[str, Tensor]) -> None:
    if rewind == "reinit":
        for module in ticket.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    elif rewind != "none":
        ticket.load_state_dict(target, strict=False)
    for layer in layers.values():
        _zero_off_mask(layer)
