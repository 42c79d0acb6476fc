"""Sufficient statistics of layers that share their samples, in float64 around a pivot: what StreamingCCA adds up.

A layer's sample x is kept as z = [x - p, |x - p|^2], p a pivot near the mean: without it the sums would cancel where the mean
is large, and the last entry is what exact unbiased CKA needs besides the scatter. Another pivot is an affine map of z, so
states with different pivots can be added exactly.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._facts import cpu_capability

#: Rows of one product. The diagonal block of a triangle is computed whole, which wastes this much over its width.
_ROWS = 256
#: Samples in a panel: enough for the product to run at full speed, few enough for float32 sums.
_SAMPLES = 1024
#: Bytes of the 64-bit copy through which a layer is pooled.
_POOL_BYTES = 1 << 24


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 inside float32 products, whatever the process allows, by whichever of torch's two switches."""
    matmul = torch.backends.cuda.matmul
    if matmul.fp32_precision != "tf32":
        yield
        return
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer switch is set, and the older one may not even be read
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = "tf32"
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def samples(x: Tensor) -> Tensor:
    """An activation as [N, C, S]: a view wherever its memory allows one. [n, d], tokens [n, t, d], or [n, c, ...]."""
    if x.dim() == 2:
        return x.unsqueeze(2)
    if x.dim() == 3:
        return x.transpose(1, 2)
    return x.flatten(2)


def pooled(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[N, C, S] float64: the means of an activation over the cells of a grid; (1,) also for tokens."""
    if x.dim() == 3:
        x, grid = x.transpose(1, 2), (1,)
    pool: Any = functional.adaptive_avg_pool2d if x.dim() == 4 else functional.adaptive_avg_pool3d
    cells = 1
    for size in grid:
        cells *= size
    result = x.new_empty(len(x), x.shape[1], cells, dtype=torch.float64)
    step = max(1, _POOL_BYTES // max(1, 8 * x[:1].numel()))
    for i in range(0, len(x), step):
        part = x[i : i + step].double()
        result[i : i + step] = part.flatten(2).mean(2, keepdim=True) if cells == 1 else pool(part, grid).flatten(2)
    return result


def _some(x: Tensor, samples: int = _SAMPLES) -> Tensor:
    """Some items of [N, C, S], all of their samples, in float64."""
    items = max(1, samples // max(1, x.shape[2]))
    return x[:: max(1, len(x) // items)].double()


def pivot_of(x: Tensor) -> Tensor:
    """[C]: near each feature's mean over the samples [N, C, S], which is all that is needed, and exactly a constant one."""
    first = x[:1, :, :1].double()
    return (first + (_some(x, _SAMPLES // 4) - first).mean((0, 2), keepdim=True)).flatten()


def near_zero(x: Tensor) -> bool:
    """Whether means are small enough beside the deviations that the pivot may be 0, which is the only one in 16 bits."""
    some = _some(x)
    mean = some.mean((0, 2), keepdim=True)
    return bool((mean.square() <= 4 * (some - mean).square().mean((0, 2), keepdim=True)).all())


class Moments:
    """n, pivots, sums and scatter of layers with one number of samples.

    partners[i] are the layers j >= i whose product with layer i is wanted, i itself first.
    """

    def __init__(self, widths: Sequence[int], partners: Sequence[Sequence[int]], device: torch.device) -> None:
        self.widths, self.partners, self.device = list(widths), [list(p) for p in partners], device
        self.n = 0
        self.pivots: list[Tensor] | None = None
        self.raw = False  # the pivots are 0
        self.sums = [self._zeros(width + 1) for width in widths]
        # Sums of (x_i - p_i) (x_j - p_j)^T of layer i against its partners j, side by side. Of its own block only the upper
        # triangle of row blocks is kept up. What belongs to |x - p|^2 lies apart, because a product of a round number of
        # columns is faster: one row a layer against the features of all layers, then against all |x - p|^2.
        self.strips = [self._zeros(w, sum(widths[j] for j in p)) for w, p in zip(widths, partners, strict=True)]
        self.norms = self._zeros(len(widths), sum(widths) + len(widths))
        self.starts = [sum(widths[:i]) for i in range(len(widths))]

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=self.device)

    @cached_property
    def _products(self) -> list[tuple[int, int, int, int, int, int, int]]:
        """(strip, its first row, rows, its first column, columns, first row and first column in the panel) of each product."""
        products = []
        for i, partners in enumerate(self.partners):
            runs: list[list[int]] = []  # [column in the strip, columns, column in the panel]
            column = 0
            for j in partners:
                if runs and runs[-1][2] + runs[-1][1] == self.starts[j]:
                    runs[-1][1] += self.widths[j]
                else:
                    runs.append([column, self.widths[j], self.starts[j]])
                column += self.widths[j]
            for first in range(0, self.widths[i], _ROWS):
                rows = min(_ROWS, self.widths[i] - first)
                for number, (to, width, source) in enumerate(runs):
                    skip = first if number == 0 else 0  # the triangle of its own block
                    products.append((i, first, rows, to + skip, width - skip, self.starts[i] + first, source + skip))
        return products

    def update(self, layers: Sequence[Tensor], fast: bool, scratch: dict[str, Tensor]) -> None:
        """Adds the samples of one activation [N, C, S] per layer; scratch keeps the panels from call to call."""
        total = layers[0].shape[0] * layers[0].shape[2]
        # Products of 16-bit numbers are taken of the values as they are, which a pivot would have to round.
        direct = fast and multiplied_directly(layers)
        if self.pivots is None:
            self.raw = direct and all(map(near_zero, layers))
            self.pivots = [self._zeros(x.shape[1]) if self.raw else pivot_of(x) for x in layers]
        direct = direct and self.raw
        dtype = torch.float32 if fast else torch.float64
        rows, width, count = min(total, _SAMPLES), sum(self.widths), len(self.widths)
        # Rows a power of 2 apart would fall into the same places of the caches.
        stride = width + 8
        panel = _buffer(scratch, f"panel {dtype}", rows * stride, dtype, self.device).view(rows, stride)[:, :width]
        norms = _buffer(scratch, f"norms {dtype}", rows * count, dtype, self.device).view(rows, count)
        with full_precision(), torch.autocast(self.device.type, enabled=False):
            for first in range(0, total, _SAMPLES):
                end = min(_SAMPLES, total - first)
                block, squares = panel[:end], norms[:end]
                for i, x in enumerate(layers):
                    part = block[:, self.starts[i] : self.starts[i] + self.widths[i]]
                    torch.ops.fourfold._pack_samples(x, self.pivots[i], first, part, self.sums[i], squares[:, i])
                self._add_product(self.norms[:, :width], squares, block, scratch)
                self._add_product(self.norms[:, width:], squares, squares, scratch)
                if not direct:
                    for strip, row, height, column, columns, top, left in self._products:
                        into = self.strips[strip][row : row + height, column : column + columns]
                        self._add_product(into, block[:, top : top + height], block[:, left : left + columns], scratch)
            if direct:
                for i, partners in enumerate(self.partners):
                    for j in partners:
                        torch.ops.fourfold._gram_(layers[i], layers[j], self._features(i, j))
        self.n += total

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor, scratch: dict[str, Tensor]) -> None:
        """Adds a^T b to total."""
        if a.dtype == torch.float64:
            total.addmm_(a.T, b)
            return
        part = _buffer(scratch, "product", total.numel(), a.dtype, self.device).view(total.shape)
        torch.mm(a.T, b, out=part)
        torch.ops.fourfold._add_wide_(total, part)

    def _features(self, i: int, j: int) -> Tensor:
        """Sum of (x_i - p_i) (x_j - p_j)^T, j a partner of i, as it lies in the strip."""
        before = self.partners[i][: self.partners[i].index(j)]
        start = sum(self.widths[k] for k in before)
        return self.strips[i][:, start : start + self.widths[j]]

    def _against(self, i: int, j: int) -> Tensor:
        """[d_j]: sum of |x_i - p_i|^2 (x_j - p_j), as it lies in the norms."""
        return self.norms[i, self.starts[j] : self.starts[j] + self.widths[j]]

    def augmented(self, i: int, j: int) -> Tensor:
        """[d_i + 1, d_j + 1]: sum of z_i z_j^T, for a wanted pair."""
        if j not in self.partners[i]:
            return self.augmented(j, i).T
        block = self._zeros(self.widths[i] + 1, self.widths[j] + 1)
        features = self._features(i, j)
        block[:-1, :-1] = features if i != j else features.triu() + features.triu(1).T
        block[:-1, -1], block[-1, :-1] = self._against(j, i), self._against(i, j)
        block[-1, -1] = self.norms[i, sum(self.widths) + j]
        return block

    def _store(self, i: int, j: int, block: Tensor) -> None:
        self._features(i, j).copy_(block[:-1, :-1])
        self._against(j, i).copy_(block[:-1, -1])
        self._against(i, j).copy_(block[-1, :-1])
        self.norms[i, sum(self.widths) + j] = self.norms[j, sum(self.widths) + i] = block[-1, -1]

    def cross(self, i: int, j: int) -> Tensor:
        """[d_i, d_j]: the centred scatter of a wanted pair."""
        if i == j:
            upper = self._features(i, i).triu()
            features = upper + upper.triu(1).T
        else:
            features = self._features(i, j) if j in self.partners[i] else self._features(j, i).T
        return features - torch.outer(self.sums[i][:-1], self.sums[j][:-1]) / self.n

    def repivot(self, pivots: list[Tensor]) -> None:
        """Moves the statistics to other pivots, exactly but for rounding."""
        if self.pivots is not None:
            shifts = [old - new for old, new in zip(self.pivots, pivots, strict=True)]
            if any(bool(shift.any()) for shift in shifts):
                self._shift(shifts)
        self._take_pivots(pivots)

    def _take_pivots(self, pivots: Sequence[Tensor]) -> None:
        self.pivots = [p.to(self.device, copy=True) for p in pivots]
        self.raw = not any(bool(p.any()) for p in pivots)

    def _shift(self, shifts: list[Tensor]) -> None:
        # z' = T z + t with T = [[I, 0], [2 shift^T, 1]] and t = [shift, |shift|^2].
        offsets = [torch.cat([shift, shift.square().sum().view(1)]) for shift in shifts]
        mapped = [_mapped(s, shift) for s, shift in zip(self.sums, shifts, strict=True)]
        for i, partners in enumerate(self.partners):
            for j in partners:
                block = _mapped(_mapped(self.augmented(i, j), shifts[i]).T, shifts[j]).T
                block = block + torch.outer(mapped[i], offsets[j]) + torch.outer(offsets[i], mapped[j])
                self._store(i, j, block.addr(offsets[i], offsets[j], alpha=self.n))
        for into, m, t in zip(self.sums, mapped, offsets, strict=True):
            into.copy_(m + self.n * t)

    def means(self) -> list[Tensor]:
        """Of each layer; its pivot where there are no samples."""
        assert self.pivots is not None
        return [p + s[:-1] / max(self.n, 1) for p, s in zip(self.pivots, self.sums, strict=True)]

    def merge(self, other: "Moments") -> None:
        """Adds another state of the same layers."""
        if other.pivots is None:
            return
        other = other.copy(self.device)
        if self.pivots is None:
            self._take_pivots(other.pivots or [])
        if not (self.raw and other.raw):
            # Around the common mean nothing cancels, however far the two are from each other.
            pivots = common_pivots([(self.n, self.means()), (other.n, other.means())])
            self.repivot(pivots)
            other.repivot(pivots)
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.add_(theirs)
        self.n += other.n

    def tensors(self) -> list[Tensor]:
        """What is added up when states with the same pivots are added, besides n."""
        return [*self.sums, *self.strips, self.norms]

    def copy(self, device: torch.device | None = None) -> "Moments":
        device = device or self.device
        result = Moments(self.widths, self.partners, device)
        result.load_state_dict(self.state_dict())
        return result

    def state_dict(self) -> dict[str, object]:
        pivots = None if self.pivots is None else [p.clone() for p in self.pivots]
        return {"n": self.n, "pivots": pivots, "tensors": [t.clone() for t in self.tensors()]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        pivots, tensors = state["pivots"], state["tensors"]
        assert isinstance(tensors, list) and isinstance(state["n"], int)
        for mine, theirs in zip(self.tensors(), tensors, strict=True):
            mine.copy_(theirs)
        self.n = state["n"]
        if pivots is not None:
            self._take_pivots(pivots)  # type: ignore[arg-type]


def common_pivots(parts: Sequence[tuple[int, Sequence[Tensor]]]) -> list[Tensor]:
    """The means of all samples, from the number and the means of each part."""
    total = max(1, sum(n for n, _ in parts))
    common = [torch.zeros_like(mean) for mean in parts[0][1]]
    for n, means in parts:
        for into, mean in zip(common, means, strict=True):
            into.add_(mean, alpha=n / total)
    return common


def multiplied_directly(layers: Sequence[Tensor]) -> bool:
    """Whether precision="fast" multiplies activations as they lie in memory: 16-bit, where that is faster than float32."""
    x = layers[0]
    if any(y.dtype != x.dtype for y in layers):
        return False
    if x.device.type == "cpu":
        return x.dtype == torch.bfloat16 and cpu_capability() == "avx512_bf16"
    return x.dtype in (torch.bfloat16, torch.float16)


def _mapped(z: Tensor, shift: Tensor) -> Tensor:
    """T z for the rows of z [d + 1, ...]."""
    result = z.clone()
    result[-1] += 2 * shift @ z[:-1]
    return result


def _buffer(scratch: dict[str, Tensor], name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """At least so many elements, kept from call to call: fresh memory costs as much as a product of few samples."""
    found = scratch.get(name)
    if found is None or found.numel() < size or found.device != device:
        found = scratch[name] = torch.empty(size, dtype=dtype, device=device)
    return found[:size]
