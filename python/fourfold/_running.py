"""Running models that others wrote, for compare and swap: in eval mode, and keeping what their layers give."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def compiled_by(module: nn.Module) -> str | None:
    """How torch.compile has taken the module over, if it has: "wrapped" (torch.compile) or "in place" (its compile())."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        return "wrapped"
    return "in place" if module._compiled_call_impl is not None else None


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """In eval mode; every module is then put back into the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            if any(module.training for module in model.modules()):
                model.eval()
        yield
    finally:
        # Parents come first: train() of a class of its own may do more than set a flag, and sets that of its children.
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)
        for module, mode in modes:
            module.training = mode


def memory_of(x: Tensor) -> int:
    """Which memory a tensor is in; asking for its address would end copy-on-write."""
    return x.untyped_storage()._cdata if x.layout is torch.strided and not x.is_nested else id(x)


def as_it_is(x: Tensor, owned: set[int]) -> Tensor:
    """What x holds now, whatever is written into it later.

    No copy is made if nothing is: memory is shared until someone writes. That is done to memory of this forward alone; the
    models' and the loader's own is copied.
    """
    lazy_clone = getattr(torch, "_lazy_clone", None)
    if lazy_clone is None or type(x) is not Tensor or memory_of(x) in owned:
        return x.clone()
    try:
        return lazy_clone(x)
    except RuntimeError:  # memory that torch has not allocated itself, as numpy's
        return x.clone()


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in a tensor, and in tuples, lists, dicts and dataclasses of any depth, in order."""
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, Mapping):
        parts: Iterable[Any] = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
    else:
        return
    for part in parts:
        yield from tensors_in(part)
