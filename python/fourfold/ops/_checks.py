"""Argument errors in one form: the op, what was expected, what came."""

import operator
import os
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from .._pages import see
from ._register import transforming

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_name(x: Any) -> str:
    """A dtype's own name ("int64"), of a tensor or of the dtype."""
    return str(getattr(x, "dtype", x)).removeprefix("torch.")


def tensor(op: str, name: str, x: Any) -> None:
    """Raises TypeError unless x is a dense tensor of this process alone."""
    if not isinstance(x, Tensor):
        fix = "; symbolic tracing (torch.fx) is not supported, use torch.export" if isinstance(x, fx.Proxy) else ""
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}{fix}")
    local(op, name, x)
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be a dense tensor, got a {kind} one; convert it first")


def local(op: str, name: str, x: Tensor) -> None:
    """Raises TypeError for a DTensor, which is a part of a tensor that several processes share."""
    if type(x) is Tensor or type(x) is Parameter or not hasattr(x, "device_mesh"):  # its class may not even be imported
        return
    raise TypeError(
        f"{op}: {name} must be a plain tensor, got a DTensor; pass its .to_local() where each process may work on its own "
        "part, or its .full_tensor(), and leave the layer out of the parallelize plan; fully_shard (FSDP2) gathers parameters "
        f"for forward, elsewhere call the layer's unshard() first{see('scale.md#what-doesnt-work')}"
    )


def contents(x: Tensor) -> bool:
    """Whether to look at x's values.

    On CPU; elsewhere only under FOURFOLD_CHECK=1, because it waits for the device; never while tracing or where a transform
    hides them.
    """
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return x.device.type == "cpu" or (x.device.type != "meta" and os.environ.get("FOURFOLD_CHECK") == "1")


def floating(op: str, name: str, x: Any, convert: bool = False) -> None:
    """Raises TypeError unless x is a tensor of a floating dtype; convert: integers are a likely mistake, and have a remedy."""
    tensor(op, name, x)
    if x.dtype not in FLOATING:
        fix = "; convert it with .float()" if convert and not x.is_complex() and not x.is_floating_point() else ""
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {dtype_name(x)}{fix}")


def integer(op: str, name: str, value: Any) -> Any:
    """Any kind of integer (numpy's too) as an int; raises TypeError for the rest."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an int, got {value!r}") from None


def one_of(op: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises ValueError unless value is one of the allowed ones; TypeError if it is not even of their type."""
    if not isinstance(value, type(allowed[0])):
        raise TypeError(f"{op}: {name} must be one of {allowed}, got {value!r}")
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {allowed}, got {value!r}")


def numbers(op: str, name: str, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor, or a number or nested sequence of numbers, as a real tensor of this dtype and device."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, dtype=dtype, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{op}: {name} must be a tensor or numbers, got {value!r}") from error
    local(op, name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be real, got {dtype_name(value)}")
    if value.device.type == "meta" and device.type != "meta":
        raise ValueError(f"{op}: {name} is a meta tensor without values, the input is on {device}")
    return value.to(device, dtype)


def has_shape(x: Tensor, *sizes: int) -> bool:
    """Whether x has exactly these sizes, compared one by one, as traced sizes must be."""
    return x.dim() == len(sizes) and all(have == want for have, want in zip(x.shape, sizes, strict=True))


def out_tensor(op: str, out: Any, shape: tuple[int, ...], like: Any, *others: Tensor | None) -> None:
    """Checks a caller's out=: exactly this shape, like's dtype and device, memory of its own, no autograd."""
    tensor(op, "out", out)
    if out.dtype != like.dtype:
        raise TypeError(f"{op}: out must be {dtype_name(like)}, got {dtype_name(out)}")
    if tuple(out.shape) != tuple(shape) or out.device != like.device:
        raise ValueError(f"{op}: out must have shape {tuple(shape)} on {like.device}, got {tuple(out.shape)} on {out.device}")
    inputs = [t for t in (like, *others) if isinstance(t, Tensor)]
    if transforming():
        raise ValueError(f"{op}: out= does not support torch.func transforms and forward-mode AD; call it without out=")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, *inputs)):
        raise ValueError(
            f"{op}: out= does not support autograd, but an argument requires a gradient; "
            f"call it under torch.no_grad() or without out={see('performance.md#where-the-result-is-written')}"
        )
    if torch.compiler.is_compiling():
        return  # memory is looked at below, and there is none yet
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{op}: out is an inference tensor; write to it under torch.inference_mode(), or pass out.clone()")
    if out.is_neg():
        raise ValueError(f"{op}: out must not be a view that negates, as x.conj().imag is; pass out.resolve_neg()")
    if any(s == 0 and n > 1 for s, n in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(f"{op}: out must not be an expanded tensor, whose elements share memory; pass out.contiguous()")
    memory = out.untyped_storage().data_ptr()
    if memory and any(t.untyped_storage().data_ptr() == memory for t in inputs):
        raise ValueError(
            f"{op}: out must not share memory with an input; pass a tensor of its own"
            f"{see('performance.md#where-the-result-is-written')}"
        )


def written(out: Tensor) -> Tensor:
    """Tells autograd that out was overwritten, so that a backward that needs its old values raises; returns it."""
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out
