"""Sums over the Gaussian kernels of a pair's samples, a tile of n x n at a time: memory is linear in n.

The kernel less 1 is what is summed: a constant changes no HSIC, and wide kernels, which are nearly 1 everywhere, keep their
digits.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _similarity as similarity
from ._cca_pair import exactly

#: Up to this many samples the distances are kept, in one tile.
_DIRECT = 2048
_TILE = 1024
#: Squared distances below this share of the squared lengths have lost digits in the product and are computed again.
_NEAR = 2.0**-8
#: Distances that the median is looked for among at once.
_COLLECTED = 1 << 22
#: Distances that tell about where the median is: within 4 standard deviations of that guess.
_DRAWN = 2048
_BINS = 21  # bits


class Distances:
    """Squared distances between the samples of x [n, d], float64, in tiles."""

    def __init__(self, x: Tensor) -> None:
        points = x.detach().double()
        points = points - points[:1]
        self.points = points - points.mean(0)
        self.norms = self.points.square().sum(1)
        n = x.shape[0]
        step = n if n <= _DIRECT else _TILE
        self.parts = [slice(first, min(first + step, n)) for first in range(0, n, step)]
        self._kept: Tensor | None = None
        self._memory: dict[str, Tensor] = {}

    def places(self) -> Iterator[tuple[slice, slice]]:
        """The tiles on and above the diagonal."""
        for i, rows in enumerate(self.parts):
            for columns in self.parts[i:]:
                yield rows, columns

    def _empty(self, name: str, rows: slice, columns: slice) -> Tensor:
        """The memory of a tile, which is used again: fresh one costs as much as a product."""
        shape = rows.stop - rows.start, columns.stop - columns.start
        if name not in self._memory:
            most = self.parts[0].stop
            self._memory[name] = self.points.new_empty(most * most)
        return self._memory[name][: shape[0] * shape[1]].view(shape)

    def kernel(self, rows: slice, columns: slice, scale: float) -> Tensor:
        """[rows, columns] of exp(scale * distance) - 1, until the next call."""
        return torch.mul(self.tile(rows, columns), scale, out=self._empty("kernel", rows, columns)).expm1_()

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """[rows, columns], until the next call; not to be written to."""
        if self._kept is not None:
            return self._kept
        result = self._tile(rows, columns)
        if len(self.parts) == 1:
            self._kept = result
        return result

    def _tile(self, rows: slice, columns: slice) -> Tensor:
        a, b = self.points[rows], self.points[columns]
        lengths = torch.add(self.norms[rows].unsqueeze(1), self.norms[columns], out=self._empty("lengths", rows, columns))
        result = torch.addmm(lengths, a, b.T, alpha=-2, out=self._empty("tile", rows, columns))
        near = result <= lengths.mul_(_NEAR)
        if rows == columns:
            near.fill_diagonal_(False)
            result.fill_diagonal_(0)
        if not bool(near.any()):
            return result
        i, j = near.nonzero(as_tuple=True)
        if 8 * i.numel() > result.numel():
            return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square_()
        step = max(1, (1 << 20) // max(1, a.shape[1]))
        for first in range(0, i.numel(), step):
            p, q = i[first : first + step], j[first : first + step]
            result[p, q] = (a[p] - b[q]).square().sum(1)
        return result

    def _values(self) -> Iterator[Tensor]:
        """The distances of two different samples, each once."""
        for rows, columns in self.places():
            tile = self.tile(rows, columns)
            if rows == columns:
                above = torch.ones_like(tile, dtype=torch.bool).triu_(1)
                yield tile[above]
            else:
                yield tile.flatten().clone()  # the tile's memory is used again

    def _bracket(self) -> tuple[Tensor, Tensor]:
        """Between which two numbers the squared median distance is likely to be, by distances drawn at random."""
        n = self.points.shape[0]
        if n * (n - 1) // 2 <= 2 * _DRAWN:
            return self.norms.new_zeros(()), self.norms.new_full((), math.inf)
        places = torch.randint(n, (2, _DRAWN), generator=torch.Generator().manual_seed(0)).to(self.points.device)
        parts = [(self.points[i] - self.points[j]).square_().sum(1) for i, j in places.split(n, 1)]
        drawn = torch.cat(parts)[places[0] != places[1]].sort().values
        middle, off = len(drawn) // 2, 2 * math.isqrt(_DRAWN)
        return drawn[middle - off], drawn[middle + off]

    def median(self) -> float:
        """The squared median distance, the lower one of an even number: exact."""
        n = self.points.shape[0]
        rank = (n * (n - 1) // 2 - 1) // 2
        low, high = self._bracket()
        below, collected, size = 0, [], 0
        for rows, columns in self.places():
            tile = self.tile(rows, columns)
            under, inside = tile < low, tile <= high
            inside ^= under
            if rows == columns:  # of two different samples, each pair once
                under.triu_(1), inside.triu_(1)
            below += int(under.count_nonzero())
            collected.append(tile[inside])
            size += len(collected[-1])
            if size > _COLLECTED or below > rank:
                return self._median_by_bits(rank)
        if rank >= below + size:
            return self._median_by_bits(rank)
        return float(torch.cat(collected).kthvalue(rank - below + 1).values)

    def _median_by_bits(self, rank: int) -> float:
        """The squared distance that so many are before.

        The bits of a positive number are in its order. A histogram of the leading ones tells where to look on; after two
        or three of them the number is known.
        """
        prefix = 0
        for shift in (2 * _BINS, _BINS, 0):
            bins = torch.zeros(1 << _BINS, dtype=torch.int64, device=self.points.device)
            for values in self._with_prefix(prefix, shift + _BINS):
                bins += ((values.view(torch.int64) >> shift) & ((1 << _BINS) - 1)).bincount(minlength=1 << _BINS)
            below = bins.cumsum(0)
            found = int((below <= rank).sum())
            rank -= int(below[found] - bins[found])
            prefix = prefix << _BINS | found
            if int(bins[found]) <= _COLLECTED:
                values = torch.cat(list(self._with_prefix(prefix, shift)))
                return float(values.kthvalue(rank + 1).values)
        return float(torch.tensor(prefix).view(torch.float64))

    def _with_prefix(self, prefix: int, shift: int) -> Iterator[Tensor]:
        for values in self._values():
            yield values if shift == 3 * _BINS else values[(values.view(torch.int64) >> shift) == prefix]


class _Sums(torch.autograd.Function):
    """(kk, kl, ll, k, l): sums over all pairs of samples of products of kernels less 1, and over each one's row.

    y None: of x alone, kl, ll and l empty. distances: of x and y; scales: their -1 / (2 bandwidth^2).
    """

    @staticmethod
    def forward(
        x: Tensor, y: Tensor | None, of_x: Distances, of_y: Distances | None, scale_x: float, scale_y: float
    ) -> tuple[Tensor, ...]:
        zero = torch.zeros((), dtype=torch.float64, device=x.device)
        kk, kl, ll = zero.clone(), zero.clone(), zero.clone()
        k = torch.zeros_like(of_x.norms)
        l = torch.zeros_like(k)  # noqa: E741
        with exactly(x.device):
            for rows, columns in of_x.places():
                twice = 1 if rows == columns else 2
                a = of_x.kernel(rows, columns, scale_x)
                kk += twice * torch.dot(a.view(-1), a.view(-1))
                _add_rows(k, a, rows, columns)
                if of_y is not None:
                    b = of_y.kernel(rows, columns, scale_y)
                    ll += twice * torch.dot(b.view(-1), b.view(-1))
                    kl += twice * torch.dot(a.view(-1), b.view(-1))
                    _add_rows(l, b, rows, columns)
        return kk, kl, ll, k, l

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, ctx.of_x, ctx.of_y, ctx.scale_x, ctx.scale_y = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, y = ctx.saved_tensors
        of_x, of_y, scale_x, scale_y, wanted = ctx.of_x, ctx.of_y, ctx.scale_x, ctx.scale_y, ctx.needs_input_grad

        def formula(x: Tensor, y: Tensor | None, kk: Tensor, kl: Tensor, ll: Tensor, k: Tensor, l: Tensor) -> Any:  # noqa: E741
            to_x = torch.zeros_like(of_x.points)
            to_y = None if of_y is None else torch.zeros_like(of_y.points)
            with exactly(x.device):
                for rows, columns in of_x.places():
                    a = of_x.kernel(rows, columns, scale_x)
                    b = None if of_y is None else of_y.kernel(rows, columns, scale_y)
                    if wanted[0]:
                        weight = 4 * kk * a + (k[rows].unsqueeze(1) + k[columns])
                        weight = weight if b is None else weight + 2 * kl * b
                        _pull(to_x, of_x.points, 2 * scale_x * weight * (a + 1), rows, columns)
                    if b is not None and to_y is not None and of_y is not None and wanted[1]:
                        weight = 4 * ll * b + 2 * kl * a + (l[rows].unsqueeze(1) + l[columns])
                        _pull(to_y, of_y.points, 2 * scale_y * weight * (b + 1), rows, columns)
            return to_x.to(x.dtype), None if y is None or to_y is None else to_y.to(y.dtype)

        return *similarity.once(formula, x, y, *grads), None, None, None, None


def _add_rows(to: Tensor, tile: Tensor, rows: slice, columns: slice) -> None:
    to[rows] += tile.sum(1)
    if rows != columns:
        to[columns] += tile.sum(0)


def _pull(to: Tensor, points: Tensor, weight: Tensor, rows: slice, columns: slice) -> None:
    """Adds sum_j weight_ij (point_i - point_j), for both sides of a tile."""
    to[rows] += weight.sum(1, keepdim=True) * points[rows] - weight @ points[columns]
    if rows != columns:
        to[columns] += weight.sum(0).unsqueeze(1) * points[columns] - weight.T @ points[rows]


def kernel_sums(
    x: Tensor, y: Tensor, sigma: float, undefined: Callable[[str], None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiable (kk, kl, ll, k, l); the bandwidth sigma * the median distance is a constant.

    undefined: called with an input's name if its median distance is 0.
    """
    with exactly(x.device):
        of_x = Distances(x)
        of_y = None if x is y else Distances(y)
        scales = []
        for name, distances in (("x", of_x), ("y", of_y)):
            median = 0.0 if distances is None else distances.median()
            if distances is not None and median == 0:
                undefined(name)
            scales.append(-1 / (2 * sigma * sigma * median) if median else 0.0)
    kk, kl, ll, k, l = _Sums.apply(x, None if x is y else y, of_x, of_y, *scales)  # noqa: E741
    return (kk, kk, kk, k, k) if x is y else (kk, kl, ll, k, l)
