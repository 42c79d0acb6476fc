"""Which layers of a model swap is to replace, and which of them nobody could."""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._globs import is_glob, matching_names
from ._pages import see
from ._running import compiled_by

OP = "swap"
SEE = see("swapping.md#what-is-refused")


@dataclass(eq=False)
class Layer:
    """A module to be replaced: names has every path that leads to it, places every (parent, attribute) that holds it."""

    module: nn.Module
    kind: type[nn.Module]  # its type, without parametrizations
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]

    def __str__(self) -> str:
        return f"layer {self.name!r} ({self.kind.__name__})"


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The type that it would have without parametrizations."""
    return parametrize.type_before_parametrizations(module)


def check_arguments(model: Any, recipes: Any, where: Any, change_output: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OP}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(recipes, Mapping):
        got = type(recipes).__name__
        if getattr(recipes, "__module__", None) == f"{__package__}.recipes":  # the function that makes a dict
            got = f"the function {recipes.__name__}; call it: ff.recipes.{recipes.__name__}()"
        raise TypeError(
            f"{OP}: recipes must be a dict such as {{torch.nn.Conv2d: fourfold.nn.CoordConv2d.from_conv}}, got {got}"
        )
    if not recipes:
        raise ValueError(f"{OP}: recipes must name at least one type of layer, got an empty dict")
    for kind, recipe in recipes.items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"{OP}: the keys of recipes must be types of torch.nn.Module, got {kind!r}")
        if not callable(recipe):
            raise TypeError(f"{OP}: the recipe for {kind.__name__} must be a function of the layer, got {recipe!r}")
        made_by = [name for name in ("from_conv", "from_linear") if hasattr(recipe, name)]
        if made_by:
            raise TypeError(
                f"{OP}: the recipe for {kind.__name__} must be a function of the layer, got the class {recipe.__name__}; pass "
                f"{recipe.__name__}.{made_by[0]}"
            )
    if not isinstance(change_output, bool):
        raise TypeError(f"{OP}: change_output must be a bool, got {change_output!r}")
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{OP}: new parameters made in torch.inference_mode() could not be trained; call it outside")
    if isinstance(where, type) or not (where is None or callable(where) or isinstance(where, (str, list, tuple))):
        raise TypeError(f"{OP}: where must be a glob, a list of globs or a function (name, module) -> bool, got {where!r}")


def refuse_wrapped(model: nn.Module) -> None:
    """Raises if the model, or a part of it, has been taken over by something that would not see new layers."""
    data_parallel = [nn.DataParallel, *_classes("torch.nn.parallel.distributed", "DistributedDataParallel")]
    sharded = [
        *_classes("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"),
        *_classes("torch.distributed.fsdp", "FSDPModule"),
    ]
    for name, module in model.named_modules():
        which = f"module {name!r}" if name else "the model"
        how = compiled_by(module)
        if how is not None:
            fix = "swap in its _orig_mod" if how == "wrapped" else "swap in a model that was not compiled yet"
            raise ValueError(
                f"{OP}: {which} is compiled by torch.compile, which may not notice new layers; {fix}, then compile{SEE}"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{OP}: {which} is a TorchScript module, whose code is fixed; swap in the model it was made from")
        if isinstance(module, tuple(data_parallel)):
            raise ValueError(
                f"{OP}: {which} is wrapped in {type(module).__name__}, which knows the parameters of the old layers alone; "
                f"swap before it is wrapped{SEE}"
            )
        if isinstance(module, tuple(sharded)):
            raise ValueError(
                f"{OP}: {which} is sharded by FSDP, which knows the parameters of the old layers alone; swap before it is "
                f"sharded{SEE}"
            )


def _classes(module: str, name: str) -> list[Any]:
    """The class if anybody has imported it: else nothing is an instance of it."""
    found = getattr(sys.modules.get(module), name, None)
    return [] if found is None else [found]


def choose(model: nn.Module, recipes: Mapping[type[nn.Module], Any], where: Any) -> tuple[list[Layer], list[Layer]]:
    """The layers to replace, and those passed over since their type only extends a key's."""
    layers: dict[int, Layer] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in itertools.islice(modules.items(), 1, None):  # without the model itself
        layer = layers.setdefault(id(module), Layer(module, kind_of(module)))
        layer.names.append(name)
        prefix, _, attribute = name.rpartition(".")
        if not any(holder is modules[prefix] and at == attribute for holder, at in layer.places):
            layer.places.append((modules[prefix], attribute))
    found = [layer for layer in layers.values() if layer.kind in recipes]
    related = [layer for layer in layers.values() if layer.kind not in recipes and _is_related(layer.kind, recipes)]
    if callable(where):
        chosen = [layer for layer in found if _wanted(where, layer)]
        related = [layer for layer in related if _wanted(where, layer)]
        if not chosen and not related:
            raise ValueError(f"{OP}: where chooses none of the model's layers of type {_types(recipes)}; {_found(found)}")
    elif where is not None:
        names = _names(list(layers.values()), recipes, where)
        chosen = [layer for layer in found if names & set(layer.names)]
        related = [layer for layer in related if names & set(layer.names)]
    else:
        chosen = found
    for layer in related:
        _refuse_uncalled(layer)
        _refuse_unready(layer)
    if not chosen:
        if type(model) in recipes:
            raise ValueError(
                f"{OP}: the model itself is a {type(model).__name__}, and swap replaces layers inside a model; call the recipe "
                "on it"
            )
        raise ValueError(f"{OP}: the model has no layer whose type is exactly {_types(recipes)}; {_contents(layers.values())}")
    return chosen, related


def _wanted(where: Callable[[str, nn.Module], Any], layer: Layer) -> bool:
    try:
        return any(bool(where(name, layer.module)) for name in layer.names)
    except TypeError as error:
        raise TypeError(f"{OP}: where must be a function (name, module) -> bool; called so, it raised {error}") from error


def _names(layers: Sequence[Layer], recipes: Mapping[type[nn.Module], Any], where: Any) -> set[str]:
    """The names that the globs match, each of them at least one that there is a recipe for."""
    kinds = {name: layer.kind for layer in layers for name in layer.names}
    matching_names(OP, "where", where, list(kinds))  # says what is wrong with the globs as such
    chosen: set[str] = set()
    for glob in [where] if isinstance(where, str) else where:
        matched = matching_names(OP, "where", glob, list(kinds))
        fitting = [name for name in matched if kinds[name] in recipes or _is_related(kinds[name], recipes)]
        if not fitting or (not is_glob(glob) and kinds[glob] not in recipes):
            for layer in layers:
                if glob in layer.names:
                    _refuse_unready(layer)
            what = _listed(Counter(_title(kinds[name]) for name in matched))
            raise ValueError(
                f"{OP}: where={glob!r} matches {what}, and the recipes are for layers whose type is exactly {_types(recipes)}"
            )
        chosen.update(fitting)
    return chosen


def _is_related(kind: type[nn.Module], recipes: Mapping[type[nn.Module], Any]) -> bool:
    """Whether it extends a key, or is what quantising makes of one."""
    return issubclass(kind, tuple(recipes)) or (_is_quantised(kind) and any(kind.__name__ == key.__name__ for key in recipes))


def _is_quantised(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))


def _title(kind: type[nn.Module]) -> str:
    return f"quantised {kind.__name__}" if _is_quantised(kind) else kind.__name__


def _types(recipes: Mapping[type[nn.Module], Any]) -> str:
    return " or ".join(kind.__name__ for kind in recipes)


def _listed(count: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in count.most_common(6)) + (" ..." if len(count) > 6 else "")


def _contents(layers: Any) -> str:
    leaves = Counter(layer.kind.__name__ for layer in layers if not layer.module._modules)
    return f"it has {_listed(leaves)}" if leaves else "it has no submodules"


def _found(layers: Sequence[Layer]) -> str:
    names = [layer.name for layer in layers[:6]]
    return f"there are {', '.join(map(repr, names))}{' ...' if len(layers) > 6 else ''}" if names else "there is none"


# ---- layers that cannot be swapped ---------------------------------------------------------------------------------------


def refuse(layers: Sequence[Layer]) -> None:
    """Raises for a layer that no recipe could replace with the effect that is expected."""
    chosen = {id(layer.module): layer for layer in layers}
    for layer in layers:
        _refuse_state(layer)
        _refuse_uncalled(layer)
        for name, inside in layer.module.named_modules():
            if inside is not layer.module and id(inside) in chosen:
                raise ValueError(
                    f"{OP}: {layer} holds {name!r} ({kind_of(inside).__name__}), which is to be swapped as well; choose one of "
                    "them with where="
                )


def _refuse_state(layer: Layer) -> None:
    module = layer.module
    if "forward" in module.__dict__:
        raise ValueError(
            f"{OP}: {layer} has a forward of its own, put on this one object (as offloading hooks do), which the new layer "
            f"would not have; remove it first{SEE}"
        )
    _refuse_unready(layer)
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        inside = x.data if type(x) is nn.Parameter else x
        if "DTensor" in type(inside).__name__:
            raise ValueError(f"{OP}: {name} of {layer} is a DTensor; swap in the model before it is sharded")
        if x.is_quantized or type(inside) not in {Tensor, nn.Parameter, nn.Buffer}:
            raise ValueError(
                f"{OP}: {name} of {layer} is {'quantised' if x.is_quantized else 'a ' + type(inside).__name__}; swap in the "
                "model as it was before that"
            )


def _refuse_unready(layer: Layer) -> None:
    if any(map(nn.parameter.is_lazy, [*layer.module.parameters(recurse=False), *layer.module.buffers(recurse=False)])):
        raise ValueError(f"{OP}: {layer} is lazy and has no weight yet; run the model once on an input first")
    if _is_quantised(layer.kind):
        raise ValueError(f"{OP}: {layer} is quantised; swap in the model before it is quantised")


def refuse_losing(layer: Layer, new: nn.Module) -> None:
    """Raises if somebody gave a torch.nn layer a tensor or submodule of his own that the new layer has not."""
    module = layer.module
    if layer.kind.__module__ not in {nn.Linear.__module__, nn.Conv2d.__module__}:
        return
    if any(part is module for part in new.modules()):
        return
    for name in (*module._parameters, *module._buffers, *module._modules):
        # weight_mask and weight_g are the recipe's affair, as parametrizations are swap's.
        if name.partition("_")[0] not in {"weight", "bias", "parametrizations"} and not hasattr(new, name):
            raise ValueError(
                f"{OP}: {layer} holds {name!r} beside what a {layer.kind.__name__} has, and its {kind_of(new).__name__} would "
                "not; remove it first, or leave the layer out with where="
            )


def _refuse_uncalled(layer: Layer) -> None:
    """Raises if a parent reads the layer's weight and doesn't call it, so that a new layer would do nothing."""
    for parent, attribute in layer.places:
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{OP}: {layer} is read, and never called, by its MultiheadAttention, so a new layer would do nothing; leave "
                f"it out with where=lambda name, layer: not name.endswith({attribute!r}){SEE}"
            )
        if isinstance(parent, nn.TransformerEncoderLayer) and _has_fast_path(parent):
            raise ValueError(
                f"{OP}: {layer} is read, and not called, by its TransformerEncoderLayer's fast path in inference, so a new "
                "layer would do nothing there; call torch.backends.mha.set_fastpath_enabled(False) first, or leave it out "
                f"with where={SEE}"
            )


def _has_fast_path(parent: Any) -> bool:
    """Whether there are inputs for which the encoder layer hands its weights to one fused kernel."""
    attention = parent.self_attn
    return bool(
        torch.backends.mha.get_fastpath_enabled()
        and type(parent).forward is nn.TransformerEncoderLayer.forward
        and isinstance(attention, nn.MultiheadAttention)
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and parent.activation_relu_or_gelu
        and parent.norm1.eps == parent.norm2.eps
    )
