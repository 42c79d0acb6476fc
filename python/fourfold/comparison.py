"""compare: the similarity of every layer of one model with every layer of another, from one pass over the data."""

import contextlib
import importlib
import itertools
import math
import os
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ._globs import is_glob, matching_names
from ._progress import progress_bar
from ._running import as_it_is, compiled_by, evaluating, memory_of, tensors_in
from .ops import _checks as check
from .ops.cca_streaming import CONV, METHODS, StreamingCCA, comparable

_OP = "compare"

Globs: TypeAlias = str | Sequence[str] | None


# ---- the result ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        matrix: {method: float64 [len(layers_a), len(layers_b)]}; 1 means the same to that measure, NaN that the two layers
            cannot be compared.
        layers_a: the layers of model_a, in the order of its named_modules: the rows.
        layers_b: those of model_b: the columns.
    """

    matrix: dict[str, Tensor]
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.matrix)}: {len(self.layers_a)} x {len(self.layers_b)} layers)"

    def to_pandas(self) -> dict[str, Any]:
        """{method: DataFrame} with the layers' names as index and columns. Needs pandas."""
        pandas = _optional("pandas", "Comparison.to_pandas")
        return {
            method: pandas.DataFrame(matrix.numpy().copy(), index=list(self.layers_a), columns=list(self.layers_b))
            for method, matrix in self.matrix.items()
        }

    def plot(self, ax: Any = None) -> list[Any]:
        """One heatmap a method, on a scale from 0 to 1; pairs that cannot be compared are grey. Needs matplotlib.

        Args:
            ax: the Axes to draw on, or a list with one for each method; None makes a figure.

        Returns:
            The Axes, in the order of ``matrix``; ``plot()[0].figure.savefig(path)`` saves the picture.
        """
        op = "Comparison.plot"
        matplotlib = _optional("matplotlib", op)
        rows, columns, count = len(self.layers_a), len(self.layers_b), len(self.matrix)
        if ax is None:
            pyplot = importlib.import_module("matplotlib.pyplot")
            size = (count * max(4.0, 2.5 + 0.2 * columns), max(3.5, 2.0 + 0.2 * rows))
            axes = list(pyplot.subplots(1, count, squeeze=False, figsize=size, layout="constrained")[1][0])
        else:
            axes = list(ax.flat) if hasattr(ax, "flat") else list(ax) if isinstance(ax, (list, tuple)) else [ax]
        if len(axes) != count:
            raise ValueError(f"{op}: ax must be one Axes for each of {', '.join(self.matrix)}, got {len(axes)}")
        colours = matplotlib.colormaps["magma"].with_extremes(bad="0.75")
        for axis, (method, matrix) in zip(axes, self.matrix.items(), strict=True):
            image = axis.imshow(matrix.numpy(), vmin=0, vmax=1, cmap=colours, aspect="auto", interpolation="nearest")
            axis.set(title=method, xlabel="model_b", ylabel="model_a")
            axis.set_xticks(range(columns), self.layers_b, rotation=90, fontsize=7)
            axis.set_yticks(range(rows), self.layers_a, fontsize=7)
            if ax is None:
                axis.figure.colorbar(image, ax=axis)
        return axes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file for :meth:`load`."""
        state = {"matrix": self.matrix, "layers_a": list(self.layers_a), "layers_b": list(self.layers_b)}
        torch.save({"fourfold.Comparison": 1, **state}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Comparison":
        """Reads what :meth:`save` wrote. Nothing in the file is run.

        Raises:
            ValueError: the file holds something else.
        """
        other = f"Comparison.load: the file must be one of Comparison.save, got something else in {path}"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:  # no such file, or none that may be read
            raise
        except Exception as error:  # bytes that are no pickle can make an unpickler raise anything
            # Without the cause: it advises to load with weights_only=False, which runs what is in the file.
            raise ValueError(f"{other}, which torch.load does not read ({type(error).__name__})") from None
        parts = {"matrix", "layers_a", "layers_b"}
        if not (isinstance(state, dict) and state.get("fourfold.Comparison") == 1 and parts <= state.keys()):
            raise ValueError(other)
        return cls(state["matrix"], tuple(state["layers_a"]), tuple(state["layers_b"]))


def _optional(package: str, op: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{op} needs {package}; run: pip install {package}") from error


# ---- compare ---------------------------------------------------------------------------------------------------------


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    layers: Globs | tuple[Globs, Globs] = None,
    method: str | Sequence[str] = ("svcca", "cka"),
    conv: Literal["channels", "flatten", "avgpool", "dft"] = "channels",
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Comparison:
    """Compares every chosen layer of model_a with every one of model_b on the same inputs, in one pass over loader.

    A layer's activation is its output, or the first tensor in it (in nested tuples, dicts and dataclasses too), as it was when
    the layer returned: operations in place that follow do not matter. All methods are computed from the same statistics, whose
    memory does not depend on the number of samples; of activations, those of one batch are kept.

    Models run in eval mode and without gradients, and come back as they were, each module in the mode it was in and without
    hooks, also where an error or an interrupt ends the pass. Nothing random is drawn. A model compared with itself runs once a
    batch.

    Args:
        model_a: any module that torch.compile has not compiled, which would not call hooks. Its layers are the rows.
        model_b: the same for the columns; may be model_a.
        loader: gives batches; an iterator will do. A batch is a tensor, a tuple or list led by the input, or a dict of keyword
            arguments.
        layers: which modules to compare: a glob or a list of globs over the names in named_modules (``*`` within one component,
            ``**`` across components), or a tuple (for model_a, for model_b) of such. None: every module that has parameters and
            no children. One named in full must run; those that a glob or None picks are left out where they do not run in the
            first batch, or return no tensor.
        method: one or several of ``"cca"``, ``"svcca"``, ``"pwcca"`` (weighted by model_a's layer), ``"cka"`` (linear),
            ``"procrustes"`` and ``"rv"``, as of :class:`StreamingCCA`; with ``conv="dft"`` it is ``"dft_cca"``.
        conv: what is a sample of a convolutional layer or of tokens; as of :class:`StreamingCCA`. Pairs of layers whose samples
            do not correspond are NaN, and a warning counts them.
        max_batches: ends the pass after so many batches; no more are drawn.
        device: where batches are moved to; the models must be there. None leaves batches where they are.
        progress: shows a bar where tqdm is installed and standard error is a terminal.

    Returns:
        A :class:`Comparison`: ``matrix[method]`` [La, Lb], ``layers_a`` and ``layers_b``, ``to_pandas``, ``plot`` and ``save``.

    Raises:
        TypeError: an argument, a batch or an activation has the wrong type; naming the layer.
        ValueError: a layer that there is not, does not run, or runs twice in a batch; NaN or infinite activations (with layer,
            batch and count); no pair of layers that can be compared; no batch; too few samples for cca or pwcca.
    """
    methods = _methods(method, conv)
    if max_batches is not None and check.integer(_OP, "max_batches", max_batches) < 1:
        raise ValueError(f"{_OP}: max_batches must be at least 1, got {max_batches}")
    if isinstance(loader, (Tensor, Mapping, str)) or not isinstance(loader, Iterable):
        raise TypeError(f"{_OP}: loader must give batches, got {type(loader).__name__}; a single batch x is passed as [x]")
    if isinstance(layers, tuple) and len(layers) != 2:
        raise ValueError(f"{_OP}: layers as a tuple must be (for model_a, for model_b), got {layers!r}; pass globs as a list")
    for_a, for_b = layers if isinstance(layers, tuple) else (layers, layers)
    sides = (_Side("model_a", model_a, for_a), _Side("model_b", model_b, for_b))
    target = _target(device, sides)
    # A model compared with itself runs once; its layers are then known by their name alone.
    runs = [_Run("the model", sides)] if model_a is model_b else [_Run(side.label, [side]) for side in sides]

    pairs: _Pairs | None = None
    bar = progress_bar(_batches(loader, max_batches), "batch", _OP) if progress else None
    try:
        with evaluating(model_a, model_b):
            for number, batch in enumerate(itertools.islice(loader, max_batches)):
                args, kwargs = _inputs(batch, number)
                if target is not None:
                    args, kwargs = _moved(args, target), _moved(kwargs, target)
                found: dict[Hashable, Tensor] = {}
                for run in runs:
                    found.update(run.activations(args, kwargs))
                if not found or any(x.shape[:1] != (0,) for x in found.values()):
                    if pairs is None:
                        pairs = _Pairs(sides, found, conv)
                    pairs.update(found, number)
                if bar is not None:
                    bar.update()
    finally:
        if bar is not None:
            bar.close()
    if pairs is None:
        raise ValueError(f"{_OP}: loader must give a batch with samples, got none; an iterator can be used only once")
    return Comparison(pairs.compute(methods), tuple(sides[0].names), tuple(sides[1].names))


def _methods(method: Any, conv: str) -> list[str]:
    check.one_of(_OP, "conv", conv, CONV)
    methods = [method] if isinstance(method, str) else method
    if not isinstance(methods, (list, tuple)) or not methods:
        raise TypeError(f"{_OP}: method must be one of {METHODS} or a list of them, got {method!r}")
    for name in methods:
        check.one_of(_OP, "method", name, METHODS)
        if (name == "dft_cca") != (conv == "dft"):
            raise ValueError(f"{_OP}: conv={conv!r} cannot give {name!r}; method='dft_cca' and conv='dft' go together")
    return list(dict.fromkeys(methods))


# ---- which layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A layer's name among those of two models, which reads well in an error."""

    model: str
    name: str

    def __repr__(self) -> str:
        return f"{self.name!r} of {self.model}"


class _Side:
    """One of the two models, the layers chosen in it, and which of them were named in full."""

    run: "_Run"

    def __init__(self, label: str, model: Any, globs: Any) -> None:
        self.label, self.model = label, model
        if not isinstance(model, nn.Module):
            raise TypeError(f"{_OP}: {label} must be a torch.nn.Module, got {type(model).__name__}")
        _refuse_compiled(label, model)
        self.modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        if globs is None:
            chosen = [name for name, module in self.modules.items() if not module._modules and _has_parameters(module)]
            if not chosen:
                raise ValueError(
                    f"{_OP}: {label} must have submodules with parameters, got {type(model).__name__}; a single layer is "
                    "passed as torch.nn.Sequential(layer)"
                )
        else:
            chosen = matching_names(_OP, "layers", globs, list(self.modules), of=label)
        self.in_full = {glob for glob in ([globs] if isinstance(globs, str) else globs or []) if not is_glob(glob)}
        # A module with two names is one layer, under the one that was asked for.
        names: dict[int, str] = {}
        for name in sorted(chosen, key=lambda name: name not in self.in_full):
            names.setdefault(id(self.modules[name]), name)
        self.names = [name for name in chosen if names[id(self.modules[name])] == name]

    def keys(self) -> list[Hashable]:
        return [self.run.key(name) for name in self.names]


def _has_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _refuse_compiled(label: str, model: nn.Module) -> None:
    for name, module in model.named_modules():
        how = compiled_by(module)
        if how is not None:
            which = f"{name!r} of {label}" if name else label
            fix = "the module that was compiled, its _orig_mod" if how == "wrapped" else "a copy made before its compile()"
            raise ValueError(f"{_OP}: {which} is compiled by torch.compile, which does not call hooks reliably; pass {fix}")


def _target(device: Any, sides: Sequence[_Side]) -> torch.device | None:
    """The device to move batches to, where both models are."""
    if device is None:
        homes = [{p.device for p in side.model.parameters()} for side in sides]
        if all(len(home) == 1 for home in homes) and homes[0] != homes[1]:
            a, b = (next(iter(home)) for home in homes)
            raise ValueError(f"{_OP}: both models must be on one device, got {a} and {b}; move one of them with .to(device)")
        return None
    try:
        target = torch.empty(0, device=device).device  # with the index of the current one where that is not said
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"{_OP}: device must be one that this torch has, got {device!r} ({error})") from error
    for side in sides:
        for name, parameter in side.model.named_parameters():
            if parameter.device != target:
                raise ValueError(
                    f"{_OP}: {side.label} must be on {target}, as device= says, but its {name!r} is on {parameter.device}; "
                    f"move it with {side.label}.to({str(target)!r})"
                )
    return target


# ---- running a model -------------------------------------------------------------------------------------------------


class _Run:
    """A model that runs once a batch, for one side or, compared with itself, for both."""

    def __init__(self, label: str, sides: Sequence[_Side]) -> None:
        self.label, self.model, self.both = label, sides[0].model, len(sides) == 2
        self.modules = {name: side.modules[name] for side in sides for name in side.names}
        own = itertools.chain(self.model.parameters(), self.model.buffers())
        self.owned = {memory_of(t) for t in own if not nn.parameter.is_lazy(t)}
        for side in sides:
            side.run = self

    def key(self, name: str) -> Hashable:
        return name if self.both else _Layer(self.label, name)

    def activations(self, args: list[Any], kwargs: dict[str, Any]) -> dict[Hashable, Tensor]:
        """The layers' outputs for a batch, of those that run."""
        found: dict[Hashable, Tensor] = {}
        ran: set[str] = set()
        owned = self.owned | {memory_of(t) for t in tensors_in([args, kwargs])}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                if name in ran:
                    raise ValueError(
                        f"{_OP}: layer {name!r} of {self.label} runs twice in one forward; name layers that run once in layers="
                    )
                ran.add(name)
                x = next(tensors_in(output), None)
                if x is not None:
                    check.tensor(_OP, f"the output of layer {name!r} of {self.label}", x)
                    found[self.key(name)] = as_it_is(x.detach(), owned)

            return hook

        handles: list[Any] = []
        try:
            for name, module in self.modules.items():
                handles.append(module.register_forward_hook(keep(name)))
            with torch.no_grad():
                self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return found


def _inputs(batch: Any, number: int) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments."""
    inside = batch
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError(f"{_OP}: batch {number} must be led by the input, got an empty {type(batch).__name__}")
        inside = batch[0]
    if isinstance(inside, Mapping):
        return [], {**inside}
    if isinstance(inside, Tensor) or (inside is not batch and isinstance(inside, (tuple, list))):
        return [inside], {}
    kind = type(batch).__name__ + (f" led by {type(inside).__name__}" if inside is not batch else "")
    raise TypeError(
        f"{_OP}: batch {number} must be a tensor, a tuple led by the input, or a dict of keyword arguments, got {kind}"
    )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    if type(value) in {tuple, list}:
        return type(value)(_moved(part, device) for part in value)
    return value


def _batches(loader: Iterable[Any], max_batches: int | None) -> int | None:
    """How many there will be, if anybody knows."""
    try:
        total: int | None = len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # an iterator, or a stream of data
        total = None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    return total


# ---- which pairs -----------------------------------------------------------------------------------------------------


class _Pairs:
    """The pairs of layers that can be compared, as the first batch shows, and their statistics."""

    def __init__(self, sides: Sequence[_Side], found: Mapping[Hashable, Tensor], conv: str) -> None:
        for side in sides:
            _leave_out_silent(side, found)
        for key, x in found.items():
            check.floating(_OP, f"the output of layer {key!r}", x)
            if x.dim() < 2:
                raise ValueError(
                    f"{_OP}: the output of layer {key!r} must be [n, d], [n, t, d] or [n, c, h, w], got {tuple(x.shape)}; "
                    "leave it out with layers="
                )
        self.rows, self.columns = (side.keys() for side in sides)
        # Layers of one accumulator share the batch size, and for DFT-CCA the grid.
        groups: dict[Hashable, list[tuple[Hashable, Hashable]]] = {}
        odd: list[tuple[Hashable, Hashable]] = []
        for a, b in itertools.product(self.rows, self.columns):
            x, y = found[a], found[b]
            if _comparable(x, y, conv):
                groups.setdefault((len(x), x.shape[2:] if conv == "dft" else None), []).append((a, b))
            else:
                odd.append((a, b))
        if odd:
            self._report(odd, found, conv)
        self.groups = [(list(dict.fromkeys(itertools.chain(*pairs))), pairs) for pairs in groups.values()]
        self.streams = [StreamingCCA(conv=conv, pairs=pairs) for _, pairs in self.groups]  # type: ignore[arg-type]
        # What cannot be compared with anything needs no hook any more.
        used = {key for keys, _ in self.groups for key in keys}
        for run in {side.run for side in sides}:
            run.modules = {name: module for name, module in run.modules.items() if run.key(name) in used}

    def _report(self, odd: list[tuple[Hashable, Hashable]], found: Mapping[Hashable, Tensor], conv: str) -> None:
        a, b = odd[0]
        x, y = found[a], found[b]
        if len(x) != len(y):
            fix = "their batches differ; choose other layers with layers="
        elif conv == "dft":
            fix = "conv='dft' needs [n, c, h, w] of one height and width; use conv='avgpool', or other layers"
        else:
            fix = "use conv='avgpool'"
        example = f"{a!r} {tuple(x.shape)} and {b!r} {tuple(y.shape)}"
        total = len(self.rows) * len(self.columns)
        if len(odd) == total:
            raise ValueError(f"{_OP}: no pair of layers has the same samples with conv={conv!r}, as {example}; {fix}")
        warnings.warn(
            f"{_OP}: {len(odd)} of {total} pairs of layers do not have the same samples with conv={conv!r} and are NaN, the "
            f"first {example}; {fix}",
            stacklevel=4,
        )

    def update(self, found: Mapping[Hashable, Tensor], number: int) -> None:
        for (keys, _), stream in zip(self.groups, self.streams, strict=True):
            for key in keys:
                if key not in found:
                    raise ValueError(
                        f"{_OP}: layer {key!r} ran in the first batch but not in batch {number}; leave it out with layers="
                    )
            with _errors_renamed():
                stream.update({key: found[key] for key in keys})

    def compute(self, methods: Sequence[str]) -> dict[str, Tensor]:
        row = {key: i for i, key in enumerate(self.rows)}
        column = {key: j for j, key in enumerate(self.columns)}
        result = {}
        for method in methods:
            with _errors_renamed(), _warnings_renamed():
                found = [stream.compute(method) for stream in self.streams]
            matrix = torch.full((len(row), len(column)), math.nan, dtype=torch.float64)
            for (_, pairs), similarity in zip(self.groups, found, strict=True):
                place = {name: i for i, name in enumerate(similarity.names)}
                values = similarity.matrix.tolist()
                for a, b in pairs:
                    matrix[row[a], column[b]] = values[place[a]][place[b]]
            result[method] = matrix
        return result


def _leave_out_silent(side: _Side, found: Mapping[Hashable, Tensor]) -> None:
    silent = [name for name in side.names if side.run.key(name) not in found]
    for name in silent:
        if name in side.in_full:
            raise ValueError(
                f"{_OP}: layer {name!r} of {side.label} does not run, or returns no tensor; name another in layers="
            )
    side.names = [name for name in side.names if name not in silent]
    if not side.names:
        raise ValueError(
            f"{_OP}: none of the layers chosen in {side.label} runs and returns a tensor; choose others with layers="
        )


def _comparable(x: Tensor, y: Tensor, conv: str) -> bool:
    if len(x) != len(y):
        return False
    if conv == "dft":
        return x.dim() == y.dim() == 4 and x.shape[2:] == y.shape[2:]
    return conv != "channels" or comparable(x.shape, y.shape) is not None


@contextlib.contextmanager
def _errors_renamed() -> Iterator[None]:
    """Errors of the accumulator in the name of compare, which is what was called."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(_renamed(error)) from error


@contextlib.contextmanager
def _warnings_renamed() -> Iterator[None]:
    """The same for its warnings: of several, the first and their number."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [w for w in caught if "StreamingCCA" in str(w.message)]
    for w in caught:
        if w not in ours:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    if ours:
        more = f" (and {len(ours) - 1} more)" if len(ours) > 1 else ""
        warnings.warn(_renamed(ours[0].message) + more, stacklevel=5)


def _renamed(message: object) -> str:
    return str(message).replace("StreamingCCA.update", _OP, 1).replace("StreamingCCA.compute", _OP, 1)
