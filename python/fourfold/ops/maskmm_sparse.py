"""Sparse weights: a mask and the values it keeps, multiplied without making the dense weight.

Values stand in row-major order in every format, so that training, files and formats share them; a format is what else is kept
to find them by. The product with x, that with a gradient, and the inner products at the set bits are derivatives of one form:
each one's gradient is made of the other two.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _C
from .._pages import see
from . import _checks as check
from ._register import calls, looped, register, transforming
from .maskmm import check_pad, packed_bits

FORMATS = ("bitmap", "csr16", "slab", "dense")
CHOICES = ("auto", "tune", *FORMATS)


# ---- the ops -------------------------------------------------------------------------------------------------------------


def _mask_starts_fake(bits: Tensor, k: int, slab: int) -> Tensor:
    return bits.new_empty((bits.shape[0] * ((k + slab - 1) // slab) + 1,), dtype=torch.int64)


_mask_starts = register("_mask_starts", fake=_mask_starts_fake, vmap=looped("_mask_starts"))
_mask_columns = register(
    "_mask_columns", fake=lambda bits, nnz: bits.new_empty((nnz,), dtype=torch.int16), vmap=looped("_mask_columns")
)


def _gather_mask_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, bits, ctx.nnz = inputs
    ctx.shape = weight.shape
    ctx.save_for_backward(bits)
    ctx.save_for_forward(bits)


def _gather_mask_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (bits,) = ctx.saved_tensors
    n, k = ctx.shape[0], ctx.shape[1:].numel()
    return _scatter_mask(grad, bits, k).reshape(n, *ctx.shape[1:]), None, None


def _gather_mask_jvp(ctx: Any, weight: Tensor, *others: Any) -> Tensor:
    return _gather_mask(weight, *ctx.saved_tensors, ctx.nnz)


_gather_mask = register(
    "_gather_mask",
    fake=lambda weight, bits, nnz: weight.new_empty((nnz,)),
    setup_context=_gather_mask_setup,
    backward=_gather_mask_vjp,
    jvp=_gather_mask_jvp,
    vmap=looped("_gather_mask"),
)


def _scatter_mask_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, bits, ctx.k = inputs
    ctx.nnz = values.shape[0]
    ctx.save_for_backward(bits)
    ctx.save_for_forward(bits)


def _scatter_mask_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _gather_mask(grad, *ctx.saved_tensors, ctx.nnz), None, None


def _scatter_mask_jvp(ctx: Any, values: Tensor, *others: Any) -> Tensor:
    return _scatter_mask(values, *ctx.saved_tensors, ctx.k)


_scatter_mask = register(
    "_scatter_mask",
    fake=lambda values, bits, k: values.new_empty((bits.shape[0], k)),
    setup_context=_scatter_mask_setup,
    backward=_scatter_mask_vjp,
    jvp=_scatter_mask_jvp,
    vmap=looped("_scatter_mask"),
)


def _rows(x: Tensor) -> Tensor:
    """[.., K] as [M, K]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _columns_of(x: Tensor) -> Tensor:
    """[.., K] as contiguous [K, M]: what inner products are made of."""
    return _rows(x).transpose(0, 1).contiguous()


def _from_bits(bits: Tensor, k: int) -> tuple[Tensor, None]:
    """starts and columns of the format that needs no others."""
    return _mask_starts(bits, k, max(k, 1)), None


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    factor, values, bits, starts, columns, ctx.other, ctx.format = inputs
    ctx.k = factor.shape[-1]
    ctx.save_for_backward(factor, values, bits, starts, columns)
    ctx.save_for_forward(factor, values, bits, starts, columns)


def _remember_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _remember(ctx, inputs, output)
    ctx.has_bias, ctx.other = ctx.other is not None, None


def _sparse_linear_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, bits, starts, columns = ctx.saved_tensors
    of_x = of_values = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = _sparse_linear_transposed(grad, values, bits, starts, columns, ctx.k, ctx.format)
    if ctx.needs_input_grad[1]:
        of_values = _sddmm(_columns_of(grad), _columns_of(x), bits, values.shape[0])
    if ctx.has_bias and ctx.needs_input_grad[5]:
        of_bias = _rows(grad).sum(0)
    return of_x, of_values, None, None, None, of_bias, None


def _sum(terms: list[Tensor]) -> Tensor | None:
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total + term
    return total


def _sparse_linear_jvp(ctx: Any, x_t: Tensor | None, values_t: Tensor | None, *tangents: Any) -> Tensor | None:
    x, values, bits, starts, columns = ctx.saved_tensors
    bias_t = tangents[3]
    terms = []
    if x_t is not None:
        terms.append(_sparse_linear(x_t, values, bits, starts, columns, None, ctx.format))
    if values_t is not None:
        terms.append(_sparse_linear(x, values_t, bits, starts, columns, None, ctx.format))
    if bias_t is not None:
        terms.append(bias_t.expand(*x.shape[:-1], bias_t.shape[0]))
    return _sum(terms)


def _in_batch(name: str) -> Any:
    """The vmap rule of a product with [.., K]: a batch of these is one more dimension of it."""
    one_by_one = looped(name)

    def rule(info: Any, in_dims: tuple[Any, ...], factor: Tensor, *others: Any) -> Any:
        if any(dim is not None for dim in in_dims[1:]):
            return one_by_one(info, in_dims, factor, *others)
        return calls[name](factor.movedim(in_dims[0], 0), *others), 0

    return rule


def _sparse_linear_fake(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    starts: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    format: str,  # noqa: A002
) -> Tensor:
    return x.new_empty((*x.shape[:-1], bits.shape[0]))


def _transposed_fake(
    grad: Tensor,
    values: Tensor,
    bits: Tensor,
    starts: Tensor,
    columns: Tensor | None,
    k: int,
    format: str,  # noqa: A002
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


_sparse_linear = register(
    "_sparse_linear",
    fake=_sparse_linear_fake,
    setup_context=_remember_linear,
    backward=_sparse_linear_vjp,
    jvp=_sparse_linear_jvp,
    vmap=_in_batch("_sparse_linear"),
)


def _transposed_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    outer, values, bits, starts, columns = ctx.saved_tensors
    of_outer = of_values = None
    if ctx.needs_input_grad[0]:
        of_outer = _sparse_linear(grad, values, bits, starts, columns, None, ctx.format)
    if ctx.needs_input_grad[1]:
        of_values = _sddmm(_columns_of(outer), _columns_of(grad), bits, values.shape[0])
    return of_outer, of_values, None, None, None, None, None


def _transposed_jvp(ctx: Any, outer_t: Tensor | None, values_t: Tensor | None, *tangents: Any) -> Tensor | None:
    outer, values, bits, starts, columns = ctx.saved_tensors
    terms = []
    if outer_t is not None:
        terms.append(_sparse_linear_transposed(outer_t, values, bits, starts, columns, ctx.other, ctx.format))
    if values_t is not None:
        terms.append(_sparse_linear_transposed(outer, values_t, bits, starts, columns, ctx.other, ctx.format))
    return _sum(terms)


_sparse_linear_transposed = register(
    "_sparse_linear_transposed",
    fake=_transposed_fake,
    setup_context=_remember,
    backward=_transposed_vjp,
    jvp=_transposed_jvp,
    vmap=_in_batch("_sparse_linear_transposed"),
)


def _sddmm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, bits, ctx.nnz = inputs
    ctx.save_for_backward(a, b, bits)
    ctx.save_for_forward(a, b, bits)


def _sddmm_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, b, bits = ctx.saved_tensors
    k = b.shape[0]
    found = _from_bits(bits, k)
    of_a = of_b = None
    if ctx.needs_input_grad[0]:
        of_a = _sparse_linear(b.transpose(0, 1), grad, bits, *found, None, "bitmap").transpose(0, 1)
    if ctx.needs_input_grad[1]:
        of_b = _sparse_linear_transposed(a.transpose(0, 1), grad, bits, *found, k, "bitmap").transpose(0, 1)
    return of_a, of_b, None, None


def _sddmm_jvp(ctx: Any, a_t: Tensor | None, b_t: Tensor | None, *tangents: Any) -> Tensor | None:
    a, b, bits = ctx.saved_tensors
    terms = []
    if a_t is not None:
        terms.append(_sddmm(a_t, b, bits, ctx.nnz))
    if b_t is not None:
        terms.append(_sddmm(a, b_t, bits, ctx.nnz))
    return _sum(terms)


_sddmm = register(
    "sddmm",
    fake=lambda a, b, bits, nnz: a.new_empty((nnz,)),
    setup_context=_sddmm_setup,
    backward=_sddmm_vjp,
    jvp=_sddmm_jvp,
    vmap=looped("sddmm"),
)


# ---- what a format keeps besides values and bits ---------------------------------------------------------------------------


class Places(NamedTuple):
    """Where values are found."""

    nnz: int
    starts: Tensor
    columns: Tensor | None


#: Of each mask that is alive: by format, the version of the mask and what was made from it; of values, the dense weight. A
#: layer that makes its SparseWeight anew in each forward finds them again.
_known: Any = WeakTensorKeyDictionary()


def _remembers(x: Tensor) -> bool:
    """Whether something may be kept about a tensor's content: it tells when that changes, and nobody traces."""
    return not (torch.compiler.is_compiling() or transforming() or x.is_inference() or isinstance(x, FakeTensor))


def forget(x: Any) -> None:
    """Drops what is kept about a tensor's content, for whoever knows that it changed."""
    if isinstance(x, Tensor) and _remembers(x):
        _known.pop(x, None)


def slab_of(format: str, k: int, density: float, dtype: torch.dtype) -> int:  # noqa: A002
    """Columns of a piece of a row: what x holds for it stays in a core's first caches, and the piece has work for it."""
    if format != "slab":
        return max(k, 1)
    wide = 2 if dtype == torch.bfloat16 else 1  # there tiles of x are half as large
    return wide * (128 if density >= 0.35 else 256 if density >= 0.15 else 512)


def _look(bits: Tensor, k: int, nnz: int | None, format: str, dtype: torch.dtype) -> Places:  # noqa: A002
    """Without nnz it is counted, for which a GPU is waited for."""
    if nnz is None:
        nnz = int(_mask_starts(bits, k, max(k, 1))[-1])
    starts = _mask_starts(bits, k, slab_of(format, k, nnz / max(bits.shape[0] * k, 1), dtype))
    return Places(nnz, starts, None if format in {"bitmap", "dense"} else _mask_columns(bits, nnz))


@contextlib.contextmanager
def _outliving() -> Iterator[None]:
    """For tensors that are kept: ordinary ones without history, whoever asks for them first."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def places_of(bits: Tensor, k: int, nnz: int | None, format: str, dtype: torch.dtype) -> Places:  # noqa: A002
    """What the format keeps besides values of this dtype and bits, made once for each mask."""
    if not _remembers(bits):
        return _look(bits, k, nnz, format, dtype)
    of_mask = _known.setdefault(bits, {})
    key = format, dtype if format == "slab" else None
    state = bits._version, bits.data_ptr()
    if key not in of_mask or of_mask[key][0] != state:
        with _outliving():
            of_mask[key] = state, _look(bits, k, nnz, format, dtype)
    found: Places = of_mask[key][1]
    return found


# ---- a weight --------------------------------------------------------------------------------------------------------------


class SparseWeight:
    """A weight [N, K] kept as a packed mask and the values that it keeps.

    Made by :func:`compress`, or from what a file holds. ``torch.save`` and pickle keep values, mask, shape and format, which
    ``torch.load(file, weights_only=True)`` reads wherever fourfold is imported; what is read is checked as arguments are.

    Args:
        values: [nnz], row-major, floating; gradients flow to it.
        mask: packed uint8 [N, 8 * ceil(K / 64)], or bool [N, K].
        shape: (N, K).
        format: "bitmap", "csr16", "slab" or "dense": see :func:`compress`. Values and mask are the same in each.
        reason: why it has this format, for its repr.

    Raises:
        TypeError: values are not floating, mask is neither bool nor uint8, or shape is not two ints.
        ValueError: mask doesn't belong to shape, values are not one for each of its set bits, or the format can't hold the
            shape.
    """

    def __init__(
        self,
        values: Tensor,
        mask: Tensor,
        shape: tuple[int, int],
        format: str = "bitmap",  # noqa: A002
        *,
        reason: str = "as given",
    ) -> None:
        # Bits on a GPU are believed, because counting them would wait for it.
        self._begin(values, mask, shape, format, reason, believed=not isinstance(mask, Tensor) or mask.device.type != "cpu")

    def _begin(
        self,
        values: Tensor,
        mask: Tensor,
        shape: tuple[int, int],
        format: str,  # noqa: A002
        reason: str,
        *,
        believed: bool,
    ) -> None:
        op = type(self).__name__
        n, k = _shape(op, shape)
        _check_values(op, values)
        check.one_of(op, "format", format, FORMATS)
        bits = _bits(op, mask, values, n, k)
        _check_columns(op, format, k)
        hidden = torch.compiler.is_compiling() or isinstance(bits, FakeTensor) or bits.is_meta
        hidden = hidden or torch._C._functorch.is_functorch_wrapped_tensor(bits)
        places = places_of(bits, k, values.shape[0] if believed or hidden else None, format, values.dtype)
        self._set(values, bits, (n, k), format, reason, places)

    def _set(
        self,
        values: Tensor,
        mask: Tensor,
        shape: tuple[int, int],
        format: str,  # noqa: A002
        reason: str,
        places: Places,
    ) -> None:
        if not check.has_shape(values, places.nnz):
            raise ValueError(
                f"{type(self).__name__}: values must be one for each of the {places.nnz} set bits of mask, got "
                f"{values.shape[0]}"
            )
        self._values, self._mask, self._shape, self._format = values, mask, shape, format
        self._reason, self._places = reason, places
        self._seen = (mask._version, mask.data_ptr()) if _remembers(mask) else None
        self._batch_hint: int | None = None  # where the format was chosen by it

    def __getstate__(self) -> dict[str, Any]:
        """Nothing that follows from it: a file could hold that wrong."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def __setstate__(self, state: Any) -> None:
        op = type(self).__name__
        if not isinstance(state, dict) or set(state) != set(_STATE):
            raise ValueError(f"{op}: a saved one holds {', '.join(_STATE)}, got {_outline(state)}; save it again")
        mask, reason, hint = state["mask"], state["reason"], state["batch_hint"]
        if not isinstance(reason, str):
            raise TypeError(f"{op}: reason must be a str, got {type(reason).__name__}")
        if hint is not None and check.integer(op, "batch_hint", hint) < 1:
            raise ValueError(f"{op}: batch_hint must be at least 1, got {hint}")
        self._begin(state["values"], mask, state["shape"], state["format"], reason, believed=False)
        if self._mask.device.type not in {"cpu", "meta"}:  # looked at where it stands only under FOURFOLD_CHECK=1
            check_pad(op, self._mask.cpu(), self._shape[1], "mask")
        self._batch_hint = hint

    def _found(self) -> Places:
        """Where values are found, looked up again where somebody has changed the mask."""
        if _remembers(self._mask) and (self._mask._version, self._mask.data_ptr()) != self._seen:
            anew = SparseWeight(self._values, self._mask, self._shape, self._format)
            self._places, self._seen = anew._places, anew._seen
        return self._places

    @property
    def values(self) -> Tensor:
        """[nnz], the kept values in row-major order, whatever the format."""
        return self._values

    @property
    def mask(self) -> Tensor:
        """Packed uint8 [N, 8 * ceil(K / 64)]."""
        return self._mask

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        """Of the values and the mask."""
        return self._values.device

    @property
    def format(self) -> str:
        """One of "bitmap", "csr16", "slab" and "dense"."""
        return self._format

    @property
    def reason(self) -> str:
        """Why it has this format."""
        return self._reason

    @property
    def density(self) -> float:
        """The fraction kept."""
        return self._values.shape[0] / max(self._shape[0] * self._shape[1], 1)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight: values and what finds them, or the dense weight."""
        if self._format == "dense":
            return self._shape[0] * self._shape[1] * self._values.element_size()
        own = self._mask.nbytes if self._format == "bitmap" else 0
        columns = self._places.columns
        return self._values.nbytes + self._places.starts.nbytes + (0 if columns is None else columns.nbytes) + own

    def decompress(self) -> Tensor:
        """The weight [N, K], 0 where the mask is not set; differentiable in the values."""
        result: Tensor = _scatter_mask(self._values, self._mask, self._shape[1])
        return result

    def to(self, *args: Any, **kwargs: Any) -> "SparseWeight":
        """On another device or in another dtype, with the arguments of ``Tensor.to``; differentiable."""
        values = self._values.to(*args, **kwargs)
        if values is self._values:
            return self
        return SparseWeight(values, self._mask.to(values.device), self._shape, self._format, reason=self._reason)

    def with_values(self, values: Tensor) -> "SparseWeight":
        """The same mask and format with other values [nnz] on the same device; shares all that was made from the mask."""
        _check_values(type(self).__name__, values)
        if values.dtype != self.dtype:
            raise TypeError(
                f"{type(self).__name__}: values must be {check.dtype_name(self.dtype)} as these are, got "
                f"{check.dtype_name(values)}; convert the weight with .to()"
            )
        if values.device != self.device:
            raise ValueError(
                f"{type(self).__name__}: values are on {values.device}, mask on {self.device}; move one with .to()"
            )
        other = object.__new__(type(self))
        other._set(values, self._mask, self._shape, self._format, self._reason, self._found())
        return other

    def __repr__(self) -> str:
        dtype, kept = check.dtype_name(self.dtype), self._values.shape[0]
        return (
            f"SparseWeight(shape={self._shape}, {dtype}, kept={kept} ({100 * self.density:.1f}%), format={self._format!r}: "
            f"{self._reason}, {self.nbytes / 2**20:.2f} MiB)"
        )

    def _decompressed(self) -> Tensor:
        """The dense weight, of frozen values kept as long as nobody changes them."""
        values, mask = self._values, self._mask
        # Not of values that are trained: fused optimizers and writes through .data leave no trace.
        if not _remembers(values) or not _remembers(mask) or values.requires_grad:
            return self.decompress()
        found = _known.setdefault(values, {})
        # A module that is moved or converted exchanges what is in its parameters without a new version.
        made_from = values._version, values.data_ptr(), values.dtype, mask._version, mask.data_ptr(), self._shape
        if found.get("mask") is not mask or found["made_from"] != made_from:  # an address might be another mask's by now
            with _outliving():
                found.update(mask=mask, made_from=made_from, dense=self.decompress())
        dense: Tensor = found["dense"]
        return dense


# Files name the class by where users find it, and torch.load may make it of a file that is not trusted.
SparseWeight.__module__ = "fourfold"
torch.serialization.add_safe_globals([SparseWeight])

#: What a file holds of it.
_STATE = ("values", "mask", "shape", "format", "reason", "batch_hint")


def _outline(state: Any) -> str:
    return ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__


def _check_values(op: str, values: Any) -> None:
    check.floating(op, "values", values)
    if values.dim() != 1:
        raise ValueError(f"{op}: values must be [nnz], got {tuple(values.shape)}")


def _shape(op: str, shape: Any) -> tuple[int, int]:
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise TypeError(f"{op}: shape must be (N, K), got {shape!r}")
    n, k = (check.integer(op, "each of shape", size) for size in shape)
    if n < 0 or k < 0:
        raise ValueError(f"{op}: shape must not be negative, got {tuple(shape)}")
    if type(n) is type(k) is int and max(n, 1) * max(k, 1) >= 2**63:
        raise ValueError(f"{op}: shape must have fewer than 2**63 elements, got {tuple(shape)}")
    return n, k


def _bits(op: str, mask: Any, like: Tensor, n: int, k: int) -> Tensor:
    """A mask argument as packed bits of a weight [n, k] on like's device; looked through once, until somebody changes it."""
    if isinstance(mask, Tensor) and _remembers(mask):
        check.local(op, "mask", mask)
        looked_at = mask._version, mask.data_ptr(), n, k, like.device
        if mask.dtype == torch.uint8 and mask.is_contiguous() and _known.get(mask, {}).get("looked_at") == looked_at:
            return mask
    bits = packed_bits(op, mask, like.detach().new_empty(1).expand(n, k))
    if _remembers(bits):
        _known.setdefault(bits, {})["looked_at"] = bits._version, bits.data_ptr(), n, k, like.device
    return bits


def _check_columns(op: str, format: str, k: int) -> None:  # noqa: A002
    if format == "csr16" and k > 65536:
        there = see("maskmm.md#sparse-inference")
        raise ValueError(f"{op}: format 'csr16' holds at most 65536 columns, got {k}; use 'slab'{there}")


# ---- which format ----------------------------------------------------------------------------------------------------------

#: For at most so many rows of x, the format from each density up.
Table = tuple[tuple[float, tuple[tuple[float, str], ...]], ...]

_ANY = float("inf")

#: Measured on one core of a Zen 4 with AVX-512 and BF16 at 4096 x 4096 and at 1024 or 4096 x 1024 (float16 and float64 at the
#: latter alone); "dense" is F.linear.
TABLE: dict[torch.dtype, Table] = {
    torch.float16: (
        (4, ((0.25, "dense"), (0, "csr16"))),
        (32, ((0.9, "dense"), (0.6, "bitmap"), (0, "csr16"))),
        (_ANY, ((0.9, "dense"), (0.15, "slab"), (0, "csr16"))),
    ),
    torch.bfloat16: (
        (4, ((0.8, "dense"), (0.15, "bitmap"), (0, "csr16"))),
        (32, ((0.25, "dense"), (0, "csr16"))),
        (128, ((0.45, "dense"), (0.25, "slab"), (0, "csr16"))),
        (_ANY, ((0.4, "dense"), (0.25, "bitmap"), (0, "csr16"))),
    ),
    torch.float32: (
        (4, ((0.65, "dense"), (0.25, "bitmap"), (0, "csr16"))),
        (32, ((0.65, "dense"), (0, "csr16"))),
        (128, ((0.65, "dense"), (0.15, "slab"), (0, "csr16"))),
        (_ANY, ((0.6, "dense"), (0.07, "slab"), (0, "csr16"))),
    ),
    torch.float64: (
        (4, ((0.65, "dense"), (0, "csr16"))),
        (32, ((0.65, "dense"), (0.4, "slab"), (0, "csr16"))),
        (_ANY, ((0.6, "dense"), (0.2, "bitmap"), (0, "csr16"))),
    ),
}

#: bfloat16 where F.linear has AMX. Not measured: where measurements without AMX, and AMX's advantage over them, put the limits.
AMX_TABLE: Table = (
    (4, ((0.8, "dense"), (0.15, "bitmap"), (0, "csr16"))),
    (128, ((0.15, "dense"), (0, "csr16"))),
    (_ANY, ((0.06, "dense"), (0, "csr16"))),
)


#: By density, the products N * K * rows below which F.linear is done before a sparse kernel has begun, or reads the weight
#: from a cache. Measured from 128 x 128 to 4096 x 4096 with 1 to 256 rows, in float32, bfloat16 and float64.
LEAST_WORK = ((0.25, 2**21), (0.0, 2**20))


#: How a reason for "dense" begins: what a SparseLinear then calls, so that it is no faster than the layer it was made of.
_PLAIN = "F.linear, as in a plain Linear, was "


def from_table(values: Tensor, density: float, batch: int, n: int, k: int) -> tuple[str, str]:
    """(format, reason) for values of this dtype and device."""
    least_work = next(work for least, work in LEAST_WORK if density >= least)
    if n * k * batch < least_work:
        rows = f"{batch} row{'s' * (batch > 1)} of x"
        return "dense", f"{_PLAIN}measured faster for so small a product, {n} x {k} with {rows}"
    tiles = values.dtype == torch.bfloat16 and values.device.type == "cpu" and _C.machine_capability() == "amx"
    table = AMX_TABLE if tiles else TABLE[values.dtype]
    formats = next(formats for most, formats in table if batch <= most)
    format = next(name for least, name in formats if density >= least)  # noqa: A001
    if format == "csr16" and k > 65536:
        format = "slab"  # noqa: A001
    rows = f"{batch} row{'s' * (batch > 1)} of x"
    how = f"{'expected' if tiles else 'measured'} faster than"
    than = "the other formats" if format == "dense" else "F.linear and the other formats"
    return (
        format,
        f"{_PLAIN if format == 'dense' else ''}{how} {than} at density {density:.2g} with {rows} in {check.dtype_name(values)}",
    )


#: What tuning found, by size, density, batch, dtype, device and threads.
_tuned: dict[tuple[Any, ...], tuple[str, str]] = {}


def _by_timing(values: Tensor, bits: Tensor, n: int, k: int, density: float, batch: int) -> tuple[str, str]:
    """(format, reason) of the one whose product is fastest here and now: the least time of several turns."""
    bucket = 1 << max(batch - 1, 0).bit_length()
    key = (n, k, round(density, 2), bucket, values.dtype, values.device, torch.get_num_threads())
    if key not in _tuned:
        names = [name for name in FORMATS if name != "csr16" or k <= 65536]
        candidates = [SparseWeight(values.detach(), bits, (n, k), name) for name in names]
        x = torch.ones(bucket, k, dtype=values.dtype, device=values.device)
        best = dict.fromkeys(names, float("inf"))
        with torch.no_grad():
            for _ in range(5):
                for name, candidate in zip(names, candidates, strict=True):
                    start = _clock(values.device)
                    sparse_linear(x, candidate)
                    best[name] = min(best[name], _clock(values.device) - start)
        times = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in best.items())
        fastest = min(best, key=best.__getitem__)
        how = f"{_PLAIN}timed faster than" if fastest == "dense" else "timed faster than F.linear (dense) and"
        _tuned[key] = fastest, f"{how} the other formats with {bucket} row{'s' * (bucket > 1)} of x, ms: {times}"
    return _tuned[key]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- public functions ------------------------------------------------------------------------------------------------------


def compress(
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    format: str = "auto",  # noqa: A002
    batch_hint: int = 1,
) -> SparseWeight:
    """A weight as its mask and kept values, in the format that suits its density and the batch.

    Formats differ in speed alone: values and mask are the same in each. "bitmap" finds values from the mask's bits, which is
    small, and good for a few rows of x; "csr16" keeps 16 bits of each value's column, good for few values (at most 65536
    columns); "slab" also cuts rows into pieces whose part of x stays in a cache, good for many rows; "dense" makes the dense
    weight, good where nothing beats F.linear.

    Args:
        weight: [N, K], float16, bfloat16, float32 or float64.
        mask: bool [N, K] or packed uint8 [N, 8 * ceil(K / 64)]; None keeps what is not 0. For a weight on the meta device it
            is on another one, where its bits can be counted.
        format: one of these; "auto" for the one that was measured fastest at this density, batch_hint and dtype; or "tune" to
            time them here, once for each size, density, batch, dtype and number of threads. The result's ``format`` and
            ``reason`` say which and why.
        batch_hint: the rows of x to expect.

    Returns:
        A :class:`SparseWeight`, whose ``values`` [nnz] are differentiable in weight.

    Raises:
        TypeError: weight is not floating, mask is neither bool nor uint8, format not a str or batch_hint not an int.
        ValueError: weight is not [N, K], the mask is made for another, or format or batch_hint is out of range.
    """
    op = "compress"
    check.floating(op, "weight", weight)
    check.one_of(op, "format", format, CHOICES)
    batch = check.integer(op, "batch_hint", batch_hint)
    if batch < 1:
        raise ValueError(f"{op}: batch_hint must be at least 1, got {batch}")
    if weight.dim() != 2:
        raise ValueError(
            f"{op}: weight must be [N, K], got {tuple(weight.shape)}; flatten a convolution's with weight.flatten(1)"
        )
    n, k = weight.shape
    like = weight
    if weight.is_meta:
        if mask is None or (isinstance(mask, Tensor) and mask.is_meta):
            raise ValueError(
                f"{op}: weight is a meta tensor, and nothing says how many of its values are kept; give a mask that is none, "
                "or compress when the weight has values"
            )
        if isinstance(mask, Tensor):
            like = weight.new_empty(1, device=mask.device).expand(n, k)
    bits = packed_bits(op, weight.detach() != 0 if mask is None else mask, like)
    _check_columns(op, format, k)
    nnz = places_of(bits, k, None, "bitmap", weight.dtype).nnz
    bits = bits.to(weight.device)
    values = _gather_mask(weight, bits, nnz)
    density = nnz / max(n * k, 1)
    chosen, reason = format, "asked for"
    if format == "auto" or (format == "tune" and weight.is_meta):
        chosen, reason = from_table(values, density, batch, n, k)
    elif format == "tune":
        chosen, reason = _by_timing(values, bits, n, k, density, batch)
    result = SparseWeight(values, bits, (n, k), chosen, reason=reason)
    result._batch_hint = batch if format == "auto" else None
    return result


def sparse_linear(x: Tensor, sparse_weight: SparseWeight, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with a sparse weight.

    Args:
        x: [.., K], float16, bfloat16, float32 or float64.
        sparse_weight: from :func:`compress`, of the same dtype.
        bias: [N], or None.

    Returns:
        [.., N] in x's dtype; 16-bit ones are computed in float32. Twice differentiable in x, ``sparse_weight.values`` and bias;
        nothing of the dense weight's size is made in backward either, but in format "dense". Under autocast all take autocast's
        type. A dropped weight takes no part, but in format "dense", where 0 times an infinity in x is NaN.

    Raises:
        TypeError: x or bias is not floating, sparse_weight is not a SparseWeight, or they differ in dtype.
        ValueError: x's last dimension is not K, bias is not [N], or they are on different devices.
    """
    op = "sparse_linear"
    check.floating(op, "x", x)
    if not isinstance(sparse_weight, SparseWeight):
        raise TypeError(
            f"{op}: sparse_weight must be a SparseWeight, got {type(sparse_weight).__name__}; make one with fourfold.compress"
        )
    w = sparse_weight
    n, k = w.shape
    if x.dim() < 1 or x.shape[-1] != k:
        got = x.shape[-1] if x.dim() else "missing"
        raise ValueError(f"{op}: last dimension of x is {got}, sparse weight {w.shape} needs {k}; x is [.., K]")
    if bias is not None:
        check.floating(op, "bias", bias)
        if not check.has_shape(bias, n):
            raise ValueError(f"{op}: bias must be [{n}], got {list(bias.shape)}")
    for name, tensor in (("sparse_weight", w), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {x.device}; move one with .to()")
    dtype = _autocast_type(x)
    if dtype is not None:
        x, bias = _lowered(x, dtype), None if bias is None else _lowered(bias, dtype)
        w = w if w.dtype in {dtype, torch.float64} else w.to(dtype)
    for name, tensor in (("sparse_weight", w), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{op}: {name} must be {check.dtype_name(x)} as x is, got {check.dtype_name(tensor)}; convert one with .to()"
            )
    places = w._found()
    if w.format == "dense":
        return F.linear(x, w._decompressed(), bias)
    result: Tensor = _sparse_linear(x, w.values, w.mask, places.starts, places.columns, bias, w.format)
    return result


def _autocast_type(x: Tensor) -> torch.dtype | None:
    """The type that autocast wants, where it is on."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(dtype)


def sddmm(a: Tensor, b: Tensor, mask: Tensor, *, nnz: int | None = None) -> Tensor:
    """Inner products of rows of a and b where a mask is set: the entries of a @ b.T that are wanted, and no others.

    Args:
        a: [N, D], float16, bfloat16, float32 or float64.
        b: [K, D] of the same dtype.
        mask: bool [N, K], or packed uint8 [N, 8 * ceil(K / 64)].
        nnz: how many bits are set, if known; without it they are counted, for which a GPU is waited for. Needed under
            torch.compile.

    Returns:
        [nnz] in row-major order; 16-bit ones are computed in float32. Twice differentiable in a and b. Under autocast both take
        autocast's type.

    Raises:
        TypeError: a or b is not floating or they differ in dtype, mask is neither bool nor uint8, or nnz not an int.
        ValueError: a and b are not [N, D] and [K, D], mask is not [N, K], nnz is wrong, or they are on different devices.
    """
    op = "sddmm"
    check.floating(op, "a", a)
    check.floating(op, "b", b)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{op}: a must be [N, D] and b [K, D], got {tuple(a.shape)} and {tuple(b.shape)}")
    if b.device != a.device:
        raise ValueError(f"{op}: b is on {b.device}, a on {a.device}; move one with .to()")
    dtype = _autocast_type(a)
    if dtype is not None:
        a, b = _lowered(a, dtype), _lowered(b, dtype)
    if b.dtype != a.dtype:
        raise TypeError(f"{op}: b must be {check.dtype_name(a)} as a is, got {check.dtype_name(b)}; convert one with .to()")
    n, k = a.shape[0], b.shape[0]
    bits = packed_bits(op, mask, a.detach().new_empty(1).expand(n, k))
    count = int(_mask_starts(bits, k, max(k, 1))[-1]) if nnz is None else check.integer(op, "nnz", nnz)
    if count < 0:
        raise ValueError(f"{op}: nnz must be at least 0, got {count}")
    result: Tensor = _sddmm(a, b, bits, count)
    return result
