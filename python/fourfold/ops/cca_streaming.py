"""StreamingCCA: similarity of many layers from one pass over the data."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .._pages import see
from . import _similarity as similarity
from ._cca_frequencies import Frequencies
from ._cca_ops import _count_nonfinite
from ._cca_state import Moments, common_pivots, pooled, samples
from ._checks import contents, floating, one_of

#: A layer's name: a string, or (model, string) for the layers of two models.
Name = Any

METHODS = ("cca", "svcca", "pwcca", "cka", "procrustes", "rv", "dft_cca")
CONV = ("channels", "flatten", "avgpool", "dft")
_WORDS = {"widths": "layers and widths in one order", "places": "way of pooling", "size": "height and width"}
_OPTIONS = {"cca": ("rtol",), "svcca": ("variance",), "pwcca": ("weights",), "cka": ("kernel", "unbiased", "sigma")}


def _keeping_sums(method: Callable[..., "StreamingCCA"]) -> Callable[..., "StreamingCCA"]:
    """Without gradients; and what it makes can be added to later, also where it is called under torch.inference_mode()."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> "StreamingCCA":
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return call


@dataclass(frozen=True)
class Similarity:
    """Similarities of layers.

    Attributes:
        matrix: float64 [L, L] in the order of names; NaN for a pair that was not asked for.
        names: the layers, in the order of the first update.
        method: what was computed.
        columns: the layers of the matrix's columns where they are others than names; else None.
    """

    matrix: Tensor
    names: tuple[Name, ...]
    method: str
    columns: tuple[Name, ...] | None = None


@dataclass(frozen=True)
class _Space:
    """Layers that are compared on equally many samples an item. entries: (layer, grid it is pooled to or None)."""

    entries: tuple[tuple[Name, tuple[int, ...] | None], ...]
    partners: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Layout:
    """Which space holds which pair: places[pair] = (space, entry of the first, entry of the second)."""

    spaces: tuple[_Space, ...]
    places: dict[tuple[Name, Name], tuple[int, int, int]]

    def same_structure(self, other: "_Layout") -> bool:
        return self.places == other.places


def comparable(a: Sequence[int], b: Sequence[int]) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None] | None:
    """What two activations of these shapes are pooled to in conv="channels" (None: nothing), or None if they don't compare."""
    grid_a, grid_b = tuple(a[2:]), tuple(b[2:])
    tokens_a, tokens_b = len(a) == 3, len(b) == 3
    if tokens_a:
        grid_a = (a[1],)
    if tokens_b:
        grid_b = (b[1],)
    if grid_a == grid_b:
        return None, None
    if not grid_a or not grid_b:  # one value a feature: the other's mean over its grid
        return (_ones(grid_a) if grid_a else None), (_ones(grid_b) if grid_b else None)
    if tokens_a or tokens_b or len(grid_a) != len(grid_b):
        return (None, None) if math.prod(grid_a) == math.prod(grid_b) else None
    smaller = tuple(map(min, grid_a, grid_b))
    return (None if grid_a == smaller else smaller), (None if grid_b == smaller else smaller)


def _ones(grid: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * len(grid)


class StreamingCCA:
    """Similarity of many layers in one pass over the data; memory does not depend on the number of samples.

    Kept are float64 sums around a pivot (about half of ``8 * sum(widths)**2`` bytes where all pairs are wanted), from which
    every method follows: SVCCA (Raghu et al., 2017, arXiv 1706.05806), PWCCA (Morcos et al., 2018, arXiv 1806.05759), linear
    CKA, also its unbiased form over all samples (Kornblith et al., 2019, arXiv 1905.00414), Procrustes, RV, and DFT-CCA.

        stream = ff.StreamingCCA()
        for batch in loader:
            stream.update({"conv1": conv1(batch), "conv2": conv2(batch)})
        stream.compute("svcca").matrix

    Args:
        conv: what is a sample. ``"channels"``: an activation [n, c, h, w] is n * h * w samples of c features, tokens [n, t, d]
            are n * t samples of d, and [n, d] is n samples of d. Of two layers with different h x w the larger is adaptively
            average-pooled to the smaller, to 1 x 1 where the other is [n, d]. ``"flatten"``: n samples of c * h * w.
            ``"avgpool"``: n samples of c, averaged over h x w or t. ``"dft"``: statistics of each spatial frequency, for
            ``dft_cca``.
        precision: ``"high"``: float64 sums of float64 products, whatever the dtype. ``"fast"``: float32 products in blocks of
            at most 1,024 samples, added up in float64; warns where the condition number is too high for that, and refuses a
            layer whose squares leave the range of float32.
        pairs: ``"all"``, ``"cross"`` (names are (model, layer); only pairs of different models), or a list of (name, name).

    Raises:
        TypeError, ValueError: for arguments outside of these, naming the layer.
    """

    def __init__(
        self,
        *,
        conv: Literal["channels", "flatten", "avgpool", "dft"] = "channels",
        precision: Literal["high", "fast"] = "high",
        pairs: Literal["all", "cross"] | Iterable[tuple[Name, Name]] = "all",
    ) -> None:
        one_of("StreamingCCA", "conv", conv, CONV)
        one_of("StreamingCCA", "precision", precision, ("high", "fast"))
        self.conv, self.precision = conv, precision
        self.pairs = _pairs(pairs)
        self._widths: dict[Name, int] = {}
        self._layout: _Layout | None = None
        self._states: list[Moments] = []
        self._frequencies: Frequencies | None = None
        self._broken = False
        self._found: Tensor | None = None  # int64 [2, L]: NaN or infinite values nobody was told of, their batch
        self._batches = 0
        self._layouts: dict[object, _Layout] = {}  # by the shapes of a batch
        self._scratch: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[Name, ...]:
        """The layers, in the order of the first update."""
        return tuple(self._widths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scratch": {}, "_layouts": {}}

    def __repr__(self) -> str:
        pairs = repr(self.pairs) if isinstance(self.pairs, str) else f"[{len(self.pairs)} pairs]"
        return (
            f"StreamingCCA(conv={self.conv!r}, precision={self.precision!r}, pairs={pairs}): "
            f"{len(self._widths)} layers, {self._batches} batches"
        )

    # --- adding ----------------------------------------------------------------------------------------------------------

    @_keeping_sums
    def update(self, activations: Mapping[Name, Tensor]) -> "StreamingCCA":
        """Adds a batch.

        Args:
            activations: {layer: [n, d], [n, t, d], [n, c, h, w] or [n, c, d, h, w]} with one n, any floating dtype and strides.
                Names and widths are those of the first call. An empty batch changes nothing.

        Raises:
            TypeError: not a mapping to floating tensors.
            ValueError: other layers or widths than before, unequal n, NaN or infinite values (naming the layer, the batch and
                how many), or layers that don't have the same samples. The statistics are then as they were before.
        """
        op = "StreamingCCA.update"
        if self._broken:
            self._check_whole(op)
        if not isinstance(activations, Mapping):
            raise TypeError(f"{op}: activations must be a dict {{name: tensor}}, got {type(activations).__name__}")
        layers = self._checked(op, activations)
        widths = {name: self._width(x) for name, x in layers.items()}
        if self._widths and set(widths) != set(self._widths):
            missing, new = set(self._widths) - set(widths), set(widths) - set(self._widths)
            raise ValueError(
                f"{op}: layers must be those of the first update; missing are {sorted(map(str, missing))}, new are "
                f"{sorted(map(str, new))}"
            )
        for name, width in widths.items():
            if width != self._widths.get(name, width):
                raise ValueError(
                    f"{op}: layer {name!r} must have {self._widths[name]} features, as in the first update, got {width}"
                )
        order = self._widths or widths
        layers = {name: layers[name] for name in order}
        self._check_finite(op, layers)
        if self.conv == "dft":
            self._update_frequencies(op, layers, widths)
        else:
            self._update_moments(op, layers, widths)
        return self

    def _checked(self, op: str, activations: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
        """The activations, checked one by one and against each other."""
        if not activations:
            raise ValueError(f"{op}: activations must hold at least one layer, got an empty dict")
        for name, x in activations.items():
            floating(op, f"layer {name!r}", x)
            dims = (4,) if self.conv == "dft" else (2, 3, 4, 5)
            if x.dim() not in dims:
                wanted = "[n, c, h, w] for conv='dft'" if self.conv == "dft" else "[n, d], [n, t, d] or [n, c, h, w]"
                raise ValueError(f"{op}: layer {name!r} must be {wanted}, got {tuple(x.shape)}")
            if 0 in x.shape[1:]:
                raise ValueError(f"{op}: layer {name!r} must have features and positions, got {tuple(x.shape)}")
        counts = {name: len(x) for name, x in activations.items()}
        first = next(iter(counts))
        for name, count in counts.items():
            if count != counts[first]:
                raise ValueError(
                    f"{op}: layers must share the batch, got n={counts[first]} for {first!r} "
                    f"{tuple(activations[first].shape)} and n={count} for {name!r} {tuple(activations[name].shape)}"
                )
        devices = {x.device for x in activations.values()} | ({self._device} if self._device else set())
        if len(devices) > 1:
            raise ValueError(f"{op}: layers must be on one device, got {sorted(map(str, devices))}; move them with .to(device)")
        if activations[first].is_meta:
            raise ValueError(f"{op}: layers are on the meta device, which holds no values; pass activations with data")
        return dict(activations)

    def _check_finite(self, op: str, activations: Mapping[Name, Tensor]) -> None:
        """Raises at once on CPU; elsewhere what was found is kept on the device until something waits for it anyway."""
        counts = [_count_nonfinite(x) for x in activations.values()]
        if all(map(contents, activations.values())):
            for (name, x), count in zip(activations.items(), counts, strict=True):
                if int(count):
                    raise ValueError(
                        f"{op}: layer {name!r} holds {int(count)} NaN or infinite values in batch {self._batches} of shape "
                        f"{tuple(x.shape)}"
                    )
            return
        found = torch.stack(counts)
        if self._found is None:
            self._found = torch.stack([found, torch.full_like(found, self._batches)])
        else:
            first = (self._found[0] == 0) & (found > 0)
            self._found[0] += found
            self._found[1].masked_fill_(first, self._batches)

    @property
    def _device(self) -> torch.device | None:
        if self._frequencies is not None:
            return self._frequencies.device
        return self._states[0].device if self._states else None

    def _width(self, x: Tensor) -> int:
        if self.conv == "flatten":
            return math.prod(x.shape[1:])
        return x.shape[2] if x.dim() == 3 else x.shape[1]

    def _update_moments(self, op: str, layers: dict[Name, Tensor], widths: dict[Name, int]) -> None:
        layout = self._layout_of(op, layers)
        if self._layout is not None and not layout.same_structure(self._layout):
            raise ValueError(
                f"{op}: batches may differ in height and width only where the layers' sizes keep their order; in batch "
                f"{self._batches} layers are pooled otherwise than in the first. Use conv='avgpool', or batches of one size"
            )
        if not len(next(iter(layers.values()))):
            self._widths = widths
            return
        device = next(iter(layers.values())).device
        if self._layout is None:
            self._states = [Moments([widths[name] for name, _ in s.entries], s.partners, device) for s in layout.spaces]
            self._layout = layout
        self._widths = widths
        self._broken = True  # until every space has the batch
        for state, space in zip(self._states, layout.spaces, strict=True):
            views = [self._view(layers[name], grid) for name, grid in space.entries]
            state.update(views, self.precision == "fast", self._scratch)
        self._broken = False
        self._batches += 1

    def _view(self, x: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        if self.conv == "flatten":
            return x.flatten(1).unsqueeze(2)
        if self.conv == "avgpool" and x.dim() > 2:
            return pooled(x, _ones(tuple(x.shape[2:])))
        return samples(x) if grid is None else pooled(x, grid)

    def _layout_of(self, op: str, layers: dict[Name, Tensor]) -> _Layout:
        key = tuple((name, tuple(x.shape[1:])) for name, x in layers.items())
        if key not in self._layouts:
            self._layouts = {key: self._new_layout(op, layers)}
        return self._layouts[key]

    def _new_layout(self, op: str, layers: dict[Name, Tensor]) -> _Layout:
        """Groups the wanted pairs by the number of samples that an item gives them."""
        entries: dict[int, dict[tuple[Name, tuple[int, ...] | None], None]] = {}
        wanted: list[tuple[int, tuple[Name, Any], tuple[Name, Any]]] = []
        for a, b in self._wanted(op, tuple(layers)):
            x, y = layers[a], layers[b]
            grids = comparable(x.shape, y.shape) if self.conv == "channels" else (None, None)
            if grids is None:
                raise ValueError(
                    f"{op}: layers {a!r} {tuple(x.shape)} and {b!r} {tuple(y.shape)} have different samples; use "
                    f"conv='avgpool', or name the pairs to compare with pairs={see('cca.md#convolutional-layers-and-tokens')}"
                )
            count = math.prod(grids[0]) if grids[0] is not None else self._positions(x)
            ends = (a, grids[0]), (b, grids[1])
            for end in ends:
                entries.setdefault(count, {})[end] = None
            wanted.append((count, *ends))
        order = {name: i for i, name in enumerate(layers)}
        # Pooled layers first: then those that are not, which are all compared with each other, lie side by side.
        sorted_entries = {
            count: tuple(sorted(found, key=lambda entry: (entry[1] is None, order[entry[0]])))
            for count, found in entries.items()
        }
        numbers = {count: number for number, count in enumerate(sorted_entries)}
        partners = {count: [{i} for i in range(len(found))] for count, found in sorted_entries.items()}
        places = {}
        for count, first, second in wanted:
            i, j = sorted_entries[count].index(first), sorted_entries[count].index(second)
            partners[count][min(i, j)].add(max(i, j))
            places[first[0], second[0]] = (numbers[count], i, j)
        spaces = [_Space(found, tuple(tuple(sorted(p)) for p in partners[count])) for count, found in sorted_entries.items()]
        return _Layout(tuple(spaces), places)

    def _positions(self, x: Tensor) -> int:
        """Samples an item gives."""
        if self.conv != "channels" or x.dim() == 2:
            return 1
        return x.shape[1] if x.dim() == 3 else math.prod(x.shape[2:])

    def _wanted(self, op: str, names: tuple[Name, ...]) -> list[tuple[Name, Name]]:
        """The pairs to compute, each once, in the order of names."""
        if self.pairs == "all":
            return [(a, b) for i, a in enumerate(names) for b in names[i:]]
        if self.pairs == "cross":
            for name in names:
                if not (isinstance(name, tuple) and len(name) == 2):
                    raise ValueError(f"{op}: pairs='cross' needs names (model, layer), got {name!r}")
            models = {name[0] for name in names if isinstance(name, tuple)}
            if len(models) != 2:
                raise ValueError(f"{op}: pairs='cross' needs the layers of two models, got those of {sorted(map(str, models))}")
            return [
                (a, b)
                for i, a in enumerate(names)
                for b in names[i:]
                if isinstance(a, tuple) and isinstance(b, tuple) and a[0] != b[0]
            ]
        unknown = {name for pair in self.pairs for name in pair} - set(names)
        if unknown:
            raise ValueError(
                f"{op}: pairs must name layers of the update, got {sorted(map(str, unknown))}; there are "
                f"{list(map(str, names))}"
            )
        order = {name: i for i, name in enumerate(names)}
        pairs = {tuple(sorted(pair, key=order.__getitem__)): None for pair in self.pairs}
        return [(a, b) for a, b in pairs]

    def _update_frequencies(self, op: str, layers: dict[Name, Tensor], widths: dict[Name, int]) -> None:
        sizes = {name: tuple(x.shape[2:]) for name, x in layers.items()}
        first = next(iter(sizes))
        size = self._frequencies.size if self._frequencies is not None else sizes[first]
        for name, found in sizes.items():
            if found != size:
                raise ValueError(
                    f"{op}: conv='dft' needs one height and width for all layers and batches, got {size} for {first!r} and "
                    f"{found} for {name!r}; crop or pool the larger"
                )
        x = layers[first]
        wanted = self._wanted(op, tuple(layers))
        if self._frequencies is None and len(x):
            self._frequencies = Frequencies(widths, size, wanted, x.device, self.precision)
        self._widths = widths
        if len(x):
            assert self._frequencies is not None
            self._broken = True
            self._frequencies.update(layers)
            self._broken = False
            self._batches += 1

    def _check_whole(self, op: str) -> None:
        if self._broken:
            raise ValueError(f"{op}: an earlier update was interrupted, so the statistics are incomplete; start a new one")
        if self._found is not None:
            for name, count, batch in zip(self._widths, *self._found.tolist(), strict=True):
                if count:
                    raise ValueError(
                        f"{op}: layer {name!r} got {count} NaN or infinite values from batch {batch} on, which the statistics "
                        "hold; start a new StreamingCCA, with FOURFOLD_CHECK=1 to be told at once"
                    )
            self._found = None

    # --- sharding --------------------------------------------------------------------------------------------------------

    @_keeping_sums
    def merge(self, other: "StreamingCCA") -> "StreamingCCA":
        """Adds another accumulator's samples to this one's. Both must have the same conv, precision, pairs and layers."""
        op = "StreamingCCA.merge"
        if not isinstance(other, StreamingCCA):
            raise TypeError(f"{op}: other must be a StreamingCCA, got {type(other).__name__}")
        self._check_whole(op)
        other._check_whole(op)
        self._check_alike(op, other._header())
        if other._states or other._frequencies is not None:
            if not self._states and self._frequencies is None:
                self.load_state_dict(other.state_dict())
            elif self._frequencies is not None and other._frequencies is not None:
                self._frequencies.merge(other._frequencies)
                self._batches += other._batches
            else:
                for mine, theirs in zip(self._states, other._states, strict=True):
                    mine.merge(theirs)
                self._batches += other._batches
        self._widths = self._widths or dict(other._widths)
        return self

    def _header(self) -> dict[str, Any]:
        """What two accumulators must share, and how many batches this one has."""
        return {
            "conv": self.conv,
            "precision": self.precision,
            "pairs": self.pairs,
            "widths": dict(self._widths),
            "places": None if self._layout is None else self._layout.places,
            "size": None if self._frequencies is None else self._frequencies.size,
            "batches": self._batches,
        }

    def _check_alike(self, op: str, other: Mapping[str, Any]) -> None:
        mine = self._header()
        for key in ("conv", "precision", "pairs", "widths", "places", "size"):
            optional = key in ("widths", "places", "size")
            if optional and (not mine[key] or not other[key]):
                continue
            same = mine[key] == other[key] and (key != "widths" or list(mine[key]) == list(other[key]))
            if not same:
                raise ValueError(f"{op}: both must have the same {_WORDS.get(key, key)}, got {mine[key]} and {other[key]}")

    @_keeping_sums
    def all_reduce(self, group: Any = None) -> "StreamingCCA":
        """Gives every process of a torch.distributed group the statistics of all their samples.

        A process without any data may take part. Sums travel on the device that they are on; where the group's backend can't
        reach it, as NCCL can't reach the CPU, by way of the current one of its own. Not to be called twice without new data in
        between that only one process has: what was added up once is then everywhere, and would be counted again.
        """
        import torch.distributed as dist

        op = "StreamingCCA.all_reduce"
        self._check_whole(op)
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f"{op}: needs an initialised process group; call torch.distributed.init_process_group first")
        world = dist.get_world_size(group)
        # Whatever fails on one process must fail on all, or the others would wait for it.
        headers: list[Any] = [None] * world
        empty = not self._parts()
        dist.all_gather_object(headers, (self._header(), None if empty else self._skeleton()), group)
        full = [(header, skeleton) for header, skeleton in headers if skeleton is not None]
        for header, _ in headers:
            self._check_alike(op, header)
        if not full:
            return self
        header, skeleton = full[0]
        for other, _ in full[1:]:
            for key in ("widths", "places", "size"):
                if other[key] != header[key] or list(other["widths"]) != list(header["widths"]):
                    raise ValueError(f"{op}: processes must have the same layers and sizes, got {header[key]} and {other[key]}")
        # One type of device for all, or some would wait in one backend and some in another.
        kind = _reachable(dist.get_backend_config(group), full[0][1]["device"])
        if empty:
            self._become(header, skeleton, _current(kind))
        for number, state in enumerate(self._parts()):
            parts = [(other["n"][number], other["means"][number]) for _, other in full]
            state.repivot([p.to(state.device) for p in common_pivots(parts)])
            for t in state.tensors():
                if t.device.type == kind:
                    dist.all_reduce(t, group=group)
                else:
                    moved = t.to(_current(kind))
                    dist.all_reduce(moved, group=group)
                    t.copy_(moved)
            state.n = sum(n for n, _ in parts)
        self._batches = sum(header["batches"] for header, _ in headers)
        return self

    def _parts(self) -> list[Any]:
        return [self._frequencies] if self._frequencies is not None else list(self._states)

    def _skeleton(self) -> dict[str, Any]:
        """What a process without data needs to take part."""
        means = [
            [mean.cpu() for mean in (part.means() if isinstance(part, Moments) else part.pivots)] for part in self._parts()
        ]
        device = self._device
        assert device is not None
        return {"layout": self._layout, "means": means, "n": [part.n for part in self._parts()], "device": device.type}

    def _become(self, header: Mapping[str, Any], skeleton: Mapping[str, Any], device: torch.device) -> None:
        """An accumulator of this layout without samples."""
        self._widths = dict(header["widths"])
        if header["size"] is not None:
            wanted = self._wanted("StreamingCCA", self.names)
            self._frequencies = Frequencies(self._widths, header["size"], wanted, device, self.precision)
        else:
            self._layout = skeleton["layout"]
            assert self._layout is not None
            self._states = [
                Moments([self._widths[name] for name, _ in s.entries], s.partners, device) for s in self._layout.spaces
            ]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings, which ``torch.load(weights_only=True)`` reads."""
        layout = self._layout
        spaces = None
        if layout is not None:
            spaces = {
                "entries": [list(map(list, s.entries)) for s in layout.spaces],
                "partners": [list(map(list, s.partners)) for s in layout.spaces],
                "places": [[*pair, *place] for pair, place in layout.places.items()],
            }
        return {
            "version": 1,
            "conv": self.conv,
            "precision": self.precision,
            "pairs": self.pairs if isinstance(self.pairs, str) else [list(pair) for pair in self.pairs],
            "widths": [[name, width] for name, width in self._widths.items()],
            "batches": self._batches,
            "spaces": spaces,
            "size": None if self._frequencies is None else list(self._frequencies.size),
            "states": [part.state_dict() for part in self._parts()],
        }

    @_keeping_sums
    def load_state_dict(self, state: Mapping[str, Any]) -> "StreamingCCA":
        """Takes over a `state_dict` of an accumulator with the same conv, precision and pairs; what was here is lost."""
        op = "StreamingCCA.load_state_dict"
        broken = f"{op}: state must be what StreamingCCA.state_dict returns"
        try:
            version, batches, states = state["version"], state["batches"], state["states"]
            pairs = state["pairs"] if isinstance(state["pairs"], str) else tuple(tuple(pair) for pair in state["pairs"])
            found = {"conv": state["conv"], "precision": state["precision"], "pairs": pairs}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{broken}; {error!r} in reading it") from None
        if not (type(version) is int and type(batches) is int and isinstance(states, list)):
            raise ValueError(
                f"{broken}, with a version and batches that are numbers and a list of states; got {type(version).__name__}, "
                f"{type(batches).__name__} and {type(states).__name__}"
            )
        if version != 1:
            raise ValueError(f"{op}: state has version {version!r}, this fourfold reads 1; update fourfold")
        for key, value in found.items():
            if value != getattr(self, key):
                raise ValueError(f"{op}: the state was made with {key}={value!r}, this has {key}={getattr(self, key)!r}")
        fresh = StreamingCCA(conv=self.conv, precision=self.precision, pairs=self.pairs)
        fresh._batches = batches
        try:
            fresh._take_over(state)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{broken}; {error!r} in reading it") from error
        self.__dict__.update(fresh.__dict__)
        return self

    def _take_over(self, state: Mapping[str, Any]) -> None:
        """Fills this, which is new, from a state_dict."""
        self._widths = widths = dict(map(tuple, state["widths"]))
        size, spaces, states = state["size"], state["spaces"], state["states"]
        if not states:
            return
        layout = None
        if spaces is not None:
            parts = [
                _Space(
                    tuple((name, None if grid is None else tuple(grid)) for name, grid in entries),
                    tuple(map(tuple, partners)),
                )
                for entries, partners in zip(spaces["entries"], spaces["partners"], strict=True)
            ]
            places = {(a, b): (space, i, j) for a, b, space, i, j in spaces["places"]}
            layout = _Layout(tuple(parts), places)
        header = {"widths": widths, "size": None if size is None else tuple(size)}
        # Where the tensors were loaded to, which torch.load's map_location decides.
        self._become(header, {"layout": layout}, states[0]["tensors"][0].device)
        for part, saved in zip(self._parts(), states, strict=True):
            part.load_state_dict(saved)

    # --- results ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compute(self, method: str, **options: Any) -> Similarity:
        """The similarity of every wanted pair, from the sums alone.

        Args:
            method: ``"cca"`` and ``"svcca"`` (mean rho), ``"pwcca"`` ([i, j] is weighted by layer i), ``"cka"`` (linear; also
                ``unbiased=True``, over all samples), ``"procrustes"``, ``"rv"``; with ``conv="dft"`` only ``"dft_cca"``.
            options: those of the function of that name: ``rtol``, ``variance``, ``weights``, ``unbiased``.

        Raises:
            TypeError: an option that the method does not have.
            ValueError: nothing was updated; too few samples for cca, pwcca or dft_cca (naming the layer); ``kernel="rbf"``,
                which is no function of sums.

        A constant layer, which leaves pwcca, cka, procrustes and rv undefined, is NaN there; for cca and svcca its rank is 0,
        and so are its similarities. A warning names it.
        """
        op = "StreamingCCA.compute"
        one_of(op, "method", method, METHODS)
        for option in options:
            if option not in _OPTIONS.get(method, ()):
                raise TypeError(f"{op}: {method} has no option {option!r}; it has {_OPTIONS.get(method, ())}")
        if (method == "dft_cca") != (self.conv == "dft"):
            raise ValueError(f"{op}: conv={self.conv!r} cannot give {method!r}; dft_cca and conv='dft' go together")
        if method == "cka" and (options.get("kernel", "linear") != "linear" or options.get("sigma") is not None):
            one_of(op, "kernel", options.get("kernel", "linear"), ("linear", "rbf"))
            raise ValueError(f"{op}: cka with kernel='rbf' needs all samples at once; call fourfold.cka(x, y, kernel='rbf')")
        self._check_whole(op)
        if not self._parts():
            raise ValueError(f"{op}: nothing was updated yet; call update first")
        matrix = torch.full((len(self._widths),) * 2, math.nan, dtype=torch.float64)
        place = {name: i for i, name in enumerate(self._widths)}
        for (a, b), (ab, ba) in self._similarities(op, method, options).items():
            matrix[place[a], place[b]], matrix[place[b], place[a]] = ab, ba
        return Similarity(matrix, self.names, method)

    def _similarities(self, op: str, method: str, options: dict[str, Any]) -> dict[tuple[Name, Name], tuple[Any, Any]]:
        """{(a, b): (similarity of a and b, of b and a)}."""
        if self._frequencies is not None:
            for name, width in self._widths.items():
                similarity.refuse_few(f"{op}: dft_cca of layer {name!r}", self._frequencies.n, width)
            widest = max(self._widths, key=self._widths.__getitem__)
            of = f"{op}: dft_cca of layer {widest!r}"
            similarity.warn_chance(of, self._frequencies.n, self._widths[widest])
            for name, (power, sums) in self._frequencies.powers().items():
                _refuse_beyond_range(op, name, power, sums, self._frequencies.n, self.precision)
            values = {pair: self._frequencies.similarity(*pair) for pair in self._wanted(op, self.names)}
            return {pair: (value, value) for pair, value in values.items()}
        assert self._layout is not None
        measures = [_Measures(op, method, options, self.precision, state, space) for state, space in self._measured()]
        found = {pair: measures[space].of(i, j) for pair, (space, i, j) in self._layout.places.items()}
        constant = list(dict.fromkeys(name for m in measures for name in m.constant))
        found_as = "have rank 0 and a similarity of 0" if method in ("cca", "svcca") else "are NaN (0 / 0)"
        similarity.warn_constant(f"{op}: {method}", constant, found_as)
        return found

    def _measured(self) -> list[tuple[Moments, _Space]]:
        assert self._layout is not None
        return list(zip(self._states, self._layout.spaces, strict=True))


class _Measures:
    """One method on the layers of one space: what depends on one layer alone is computed once."""

    def __init__(self, op: str, method: str, options: dict[str, Any], precision: str, state: Moments, space: _Space) -> None:
        self.op, self.method, self.options, self.state, self.space = op, method, options, state, space
        self.names = [name for name, _ in space.entries]
        self.scatters = [state.cross(i, i) for i in range(len(self.names))]
        self.whiteners: list[similarity.Whitener] = []
        #: Layers that do not vary, of the pairs that were asked for.
        self.constant: list[Name] = []
        for name, scatter, sums in zip(self.names, self.scatters, state.sums, strict=True):
            _refuse_beyond_range(op, name, similarity.power(scatter), sums[:-1], state.n, precision)
        if method not in ("cca", "svcca", "pwcca"):
            return
        chosen = {key: value for key, value in options.items() if key in ("rtol", "variance")}
        if method == "svcca":
            chosen = {"variance": 0.99, **chosen}
        else:
            for name, width in zip(self.names, state.widths, strict=True):
                similarity.refuse_few(f"{op}: {method} of layer {name!r}", state.n, width)
        self.whiteners = [similarity.whiten(scatter, state.n, precision=precision, **chosen) for scatter in self.scatters]
        widest = max(range(len(self.names)), key=lambda i: self.whiteners[i].rank)
        similarity.warn_chance(f"{op}: {method} of layer {self.names[widest]!r}", state.n, self.whiteners[widest].rank)
        if precision == "fast":
            for name, whitener in zip(self.names, self.whiteners, strict=True):
                similarity.warn_condition(f"{op}: {method}", f"layer {name!r}", whitener)

    def of(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """The similarity of entries i and j, and of j and i."""
        xx, yy = self.scatters[i], self.scatters[j]
        xy = self.state.cross(i, j) if i != j else xx
        if self.whiteners:
            wx, wy = self.whiteners[i], self.whiteners[j]
            if self.method == "pwcca" and self._undefined(i, j):
                return (torch.tensor(math.nan),) * 2
            if self.method != "pwcca":
                self.constant += [self.names[k] for k in (i, j) if not self.whiteners[k].rank]
            if i == j:
                return (torch.tensor(1.0 if wx.rank else 0.0),) * 2
            if self.method == "pwcca":
                both = similarity.projection_weighted(xx, xy, yy, wx, wy, weights="both")
                return (both[0], both[1]) if self.options.get("weights", "x") == "x" else (both[1], both[0])
            rho = similarity.correlations(xx, xy, yy, wx, wy)
            return (similarity.mean_rho(rho, wx, wy),) * 2
        if self._undefined(i, j):
            return (torch.tensor(math.nan),) * 2
        if self.method == "procrustes":
            return (similarity.procrustes_similarity(xx, xy, yy),) * 2
        if self.method == "cka" and self.options.get("unbiased", False):
            if self.state.n < 4:
                raise ValueError(f"{self.op}: cka with unbiased=True needs at least 4 samples, got {self.state.n}")
            values = [self._hsic(*ends) for ends in ((i, j), (i, i), (j, j))]
            return (similarity.unbiased_cka(*values),) * 2
        return (similarity.linear_cka(xx, xy, yy),) * 2

    def _hsic(self, i: int, j: int) -> Tensor:
        block, x, y = self.state.augmented(i, j), self.state.sums[i], self.state.sums[j]
        sums = similarity.Sums(
            xy=block[:-1, :-1], x=x[:-1], y=y[:-1], k=x[-1], l=y[-1], kl=block[-1, -1], lx=block[:-1, -1], ky=block[-1, :-1]
        )
        return similarity.unbiased_hsic(self.state.n, sums)

    def _undefined(self, i: int, j: int) -> bool:
        """Whether the measure is 0 / 0, because a layer does not vary."""
        constant = [self.names[k] for k in (i, j) if not bool(similarity.power(self.scatters[k]) > 0)]
        self.constant += constant
        return bool(constant)


def _refuse_beyond_range(op: str, name: Name, power: Tensor, sums: Tensor, n: int, precision: str) -> None:
    """power: the trace of the scatter. A constant layer, whose sums are 0 around its pivot, is another matter."""
    if similarity.beyond_range(power, n, precision) and (not float(power) <= 0 or bool(sums.any())):
        of, way_out = ("float32 with precision='fast'", ", or use precision='high'") if precision == "fast" else ("float64", "")
        raise ValueError(
            f"{op}: the squares of layer {name!r} must lie in the range of {of}, got a sum of {float(power):.3g} over {n} "
            f"samples; multiply the layer by a constant, which changes no similarity{way_out}"
        )


def _reachable(config: str, wanted: str) -> str:
    """The type of device to reduce on: the wanted one if the group's backends ("cpu:gloo,cuda:nccl") reach it, or theirs.

    A backend without a device in front of it is for all.
    """
    kinds = [part.partition(":")[0] for part in config.split(",") if ":" in part]
    return wanted if wanted in kinds or not kinds else kinds[0]


def _current(kind: str) -> torch.device:
    """The device of this type that the process works on."""
    return torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device(kind)


def _pairs(pairs: Any) -> Any:
    if isinstance(pairs, str):
        one_of("StreamingCCA", "pairs", pairs, ("all", "cross"))
        return pairs
    try:
        found = tuple((a, b) for a, b in pairs)
    except (TypeError, ValueError):
        raise TypeError(f"StreamingCCA: pairs must be 'all', 'cross' or a list of (name, name), got {pairs!r}") from None
    if not found:
        raise ValueError("StreamingCCA: pairs must name at least one pair, got an empty list")
    return found
