"""CCAMetric, in a file of its own because its base class is torchmetrics'."""

import functools
import importlib
import json
import math
from typing import Any, Literal

import torch
from torch import Tensor

from .ops._checks import one_of
from .ops.cca_streaming import _OPTIONS, CONV, METHODS, StreamingCCA

torchmetrics: Any = importlib.import_module("torchmetrics")
_gather: Any = importlib.import_module("torchmetrics.utilities.distributed").gather_all_tensors


class CCAMetric(torchmetrics.Metric):  # type: ignore[misc]
    """The similarity of two layers over all batches, as a torchmetrics metric.

    What :class:`fourfold.StreamingCCA` computes for one pair, from its float64 sums, so that batches, calls of ``forward`` and
    processes add up to what one pass over all samples gives. In a MetricCollection, metrics of one ``conv`` and ``precision``
    share the sums.

        metric = ff.metrics.CCAMetric("cka")
        for batch in loader:
            metric.update(layer1(batch), layer2(batch))
        metric.compute()

    Args:
        method: ``"cca"``, ``"svcca"``, ``"pwcca"`` (weighted by x), ``"cka"`` (linear), ``"procrustes"`` or ``"rv"``; with
            ``conv="dft"`` it is ``"dft_cca"``.
        conv: as of StreamingCCA.
        precision: as of StreamingCCA.
        kwargs: options of the method (``variance`` of svcca, ``unbiased`` of cka, ...), and those of torchmetrics.Metric
            (``sync_on_compute``, ``process_group``, ...).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(
        self,
        method: str = "svcca",
        *,
        conv: Literal["channels", "flatten", "avgpool", "dft"] = "channels",
        precision: Literal["high", "fast"] = "high",
        **kwargs: Any,
    ) -> None:
        op = "CCAMetric"
        one_of(op, "method", method, METHODS)
        options = {name: kwargs.pop(name) for name in _OPTIONS.get(method, ()) if name in kwargs}
        super().__init__(**kwargs)
        one_of(op, "conv", conv, CONV)
        one_of(op, "precision", precision, ("high", "fast"))
        if (method == "dft_cca") != (conv == "dft"):
            raise ValueError(f"{op}: conv={conv!r} cannot give {method!r}; method='dft_cca' and conv='dft' go together")
        self.method, self.conv, self.precision, self.options = method, conv, precision, options
        if options.get("kernel", "linear") != "linear":
            raise ValueError(
                f"{op}: kernel must be 'linear', got {options['kernel']!r}: RBF CKA takes all samples; use fourfold.cka"
            )
        # The sums are either in a stream that nobody else has, or in tensors that nobody writes to: torchmetrics copies,
        # gathers and shares the latter.
        self._stream: StreamingCCA | None = None
        self._parts: list[Tensor] = []
        self.add_state("statistics", default=[], dist_reduce_fx=None)

    @property
    def statistics(self) -> list[Tensor]:
        """The sums as torchmetrics knows them: no tensor, or one."""
        if len(self._parts) > 1:
            self._open()
        if self._stream is not None and self._stream.names and not self._parts:
            self._parts = [_packed(self._stream.state_dict())]
        return list(self._parts)

    @statistics.setter
    def statistics(self, parts: list[Tensor]) -> None:
        self._stream, self._parts = None, list(parts)

    def _new_stream(self) -> StreamingCCA:
        return StreamingCCA(conv=self.conv, precision=self.precision, pairs=[("x", "y")])

    def _open(self) -> StreamingCCA:
        """The stream of all parts."""
        if self._stream is None:
            streams = [self._new_stream().load_state_dict(_unpacked(part)) for part in self._parts]
            self._stream = functools.reduce(StreamingCCA.merge, streams) if streams else self._new_stream()
            if len(self._parts) > 1:
                self._parts = []
        return self._stream

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch: activations of two layers on the same n inputs, [n, d], [n, t, d] or [n, c, h, w].

        Raises:
            TypeError, ValueError: as of ``StreamingCCA.update``; the sums are then as they were before.
        """
        for name, value in (("x", x), ("y", y)):
            if isinstance(value, Tensor) and value.device != self.device:
                raise ValueError(
                    f"CCAMetric: {name} must be on the metric's device {self.device}, got {value.device}; move the metric with "
                    f".to({str(value.device)!r})"
                )
        if self._stream is None and any(part.device != self.device for part in self._parts):  # compute_on_cpu
            self._parts = [part.to(self.device) for part in self._parts]
        self._open().update({"x": x, "y": y})
        self._parts = []

    def compute(self) -> Tensor:
        """The similarity, a float64 scalar.

        Raises:
            ValueError: nothing was added yet, or too few samples for cca or pwcca.

        NaN, with a warning, where a layer is constant and the method needs one that varies.
        """
        try:
            value = self._open().compute(self.method, **self.options).matrix[0, 1]
        except BaseException:
            # torchmetrics would leave the processes' sums in place of this process's own.
            if self._is_synced and self._should_unsync:
                self.unsync()
            raise
        return value.to(self.device)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds a batch and returns the similarity in it alone.

        Raises:
            TypeError, ValueError: as of update and compute (a batch can be too small for cca, where update still takes it); the
                sums are then as they were before.
        """
        parts = self.statistics
        before = dict(self.__dict__)
        try:
            value = super().forward(x, y)
            self._open()  # refuses a batch that does not go with the earlier ones
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            self.statistics = parts
            raise
        return value

    def reset(self) -> None:
        """Forgets all batches."""
        super().reset()
        self.statistics = []

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draws val, a result or a list of them, or the present result: torchmetrics' figure and axes. Needs matplotlib."""
        return self._plot(val, ax)

    # ---- what torchmetrics does with states -----------------------------------------------------------------------------

    def _sync_dist(self, dist_sync_fn: Any = _gather, process_group: Any = None) -> None:
        """Also where a process has no data, and none of torchmetrics' lists with it."""
        mine = (self.statistics or [torch.zeros(0, dtype=torch.float64, device=self.device)])[0]
        parts = dist_sync_fn(mine.to(self.device), group=process_group or self.process_group)
        self.statistics = [part for part in parts if part.numel()]

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Moves the sums with the module, and never changes their type."""
        parts = self.statistics
        self.statistics = []
        try:
            return super()._apply(fn, *args, **kwargs)
        finally:
            self.statistics = [part.to(self.device) for part in parts]

    def __getstate__(self) -> dict[str, Any]:
        parts = self.statistics
        return {**super().__getstate__(), "_parts": parts, "_stream": None}

    def __hash__(self) -> int:
        return hash((type(self).__name__, id(self)))


CCAMetric.__module__ = "fourfold.metrics"


def _packed(state: dict[str, Any]) -> Tensor:
    """A state_dict as one float64 tensor [k]: length and bytes of its JSON, where tensors are shapes, then their elements."""
    tensors: list[Tensor] = []

    def outline(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, dict):
            return {"dict": {key: outline(part) for key, part in value.items()}}
        if isinstance(value, (list, tuple)):
            return [outline(part) for part in value]
        return value

    text = json.dumps(outline({**state, "device": None})).encode()
    flat = [torch.view_as_real(t).flatten() if t.is_complex() else t.flatten().double() for t in tensors]
    device = tensors[0].device if tensors else torch.device("cpu")
    header = torch.tensor([len(text), *text], dtype=torch.float64, device=device)
    return torch.cat([header, *flat])


def _unpacked(packed: Tensor) -> dict[str, Any]:
    length = int(packed[0])
    outline = json.loads(bytes(packed[1 : 1 + length].to(torch.uint8).tolist()))
    place = 1 + length

    def value(part: Any) -> Any:
        nonlocal place
        if isinstance(part, list):
            return [value(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "dict" in part:
            return {key: value(item) for key, item in part["dict"].items()}
        dtype = getattr(torch, part["dtype"])
        count = math.prod(part["shape"]) * (2 if dtype.is_complex else 1)
        flat = packed[place : place + count]
        place += count
        return (torch.view_as_complex(flat.reshape(-1, 2)) if dtype.is_complex else flat.to(dtype)).reshape(part["shape"])

    return {**value(outline), "device": str(packed.device)}
