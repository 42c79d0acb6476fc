"""Sufficient statistics of image-shaped layers per spatial frequency, in float64 around a pivot: what conv="dft" adds up.

Images are real, so of each pair of frequencies that are conjugates of each other only one is computed. Ops transform the images
and multiply their spectra. Where images are large or have many channels, and for gradients, the transform is two products with
matrices of cosines and sines, which leave the images sorted by frequency; an FFT would have to be transposed.

A frequency's scatter is C = sum of conj(z) zᵀ over the samples z = r + i q [D]. Its real part is symmetric, its imaginary part
antisymmetric, so the real matrix P = Re C + Im C holds both, and P = [r; q]ᵀ [r + q; q - r] is one real product.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _similarity as similarity
from ._cca_ops import _image_spectra, _spectra_gram_
from ._cca_state import full_precision

Name = Hashable

#: Samples in one product of a frequency: each chunk of them reads and writes all statistics once.
_SAMPLES = 128
#: Samples whose mean is the pivot.
_PIVOT_SAMPLES = 16
#: Bytes of the transformed images of a chunk, unless the statistics themselves are larger.
_CHUNK_BYTES = 1 << 28
#: Bytes of what passes from one step to the next within a cache.
_CACHE_BYTES = 1 << 20
#: Multiplications of a product that keeps a core busy by itself.
_LARGE_PRODUCT = 1 << 17
#: Bytes of the matrices that are factorised together.
_PART_BYTES = 1 << 22
#: Height or width from which on an FFT and a transposition are faster than a product.
_FFT_FROM = 80
#: Where the ops are faster: height and width below this on a CPU, channels of all layers up to this, and enough frequencies.
_OPS_SIDE, _OPS_WIDTH, _OPS_FREQUENCIES = 160, 512, 8


class Grid:
    """The frequencies of h x w images: one of each conjugate pair, by columns l = 0 .. w // 2 of the transform.

    A column holds first k = 0 and, for even h, h / 2, then (k, l), (-k, l) for k = 1 .. (h - 1) // 2; the second ones are left
    out of the columns l = 0 and w / 2, where they are conjugates of the first.
    """

    def __init__(self, h: int, w: int) -> None:
        self.h, self.w = h, w
        self.pairs = (h - 1) // 2
        self.singles = [0, h // 2] if h % 2 == 0 else [0]
        self.columns = range(w // 2 + 1)
        self.starts = _running(len(self.singles) + self.pairs * self.step(column) for column in self.columns)

    def __len__(self) -> int:
        return self.starts[-1]

    def step(self, column: int) -> int:
        """Frequencies for each k that is no single; 1 where the sines along w are all 0."""
        return 1 if (2 * column) % self.w == 0 else 2

    def groups(self, column: int, size: int) -> Iterator["Group"]:
        """A column's frequencies, about `size` together."""
        start, step = self.starts[column], self.step(column)
        yield Group(slice(start, start + len(self.singles)), None)
        start += len(self.singles)
        count = max(1, size // step)
        for k in range(1, self.pairs + 1, count):
            last = min(k + count, self.pairs + 1)
            yield Group(slice(start + (k - 1) * step, start + (last - 1) * step), (k, last))

    @cached_property
    def index(self) -> Tensor:
        """int64 [h, w] in fft2 order: which of these frequencies, or of their conjugates, each is."""
        result = torch.empty(self.h, self.w, dtype=torch.int64)
        for column in self.columns:
            step = self.step(column)
            for k in range(self.h):
                if k in self.singles:
                    place = self.singles.index(k)
                else:
                    second = k > self.pairs and step == 2
                    place = len(self.singles) + (min(k, self.h - k) - 1) * step + second
                result[k, column] = self.starts[column] + place
                result[-k % self.h, -column % self.w] = self.starts[column] + place
        return result


@dataclass(frozen=True)
class Group:
    """Frequencies of a column: which of the grid's, and the k of its pairs, from and to; None for the singles."""

    where: slice
    ks: tuple[int, int] | None

    def __len__(self) -> int:
        return self.where.stop - self.where.start


def waves(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, size]: cosines of the frequencies 0 .. size // 2, then sines of 1 .. (size - 1) // 2."""
    position = torch.arange(size)
    frequency = torch.cat([torch.arange(size // 2 + 1), torch.arange(1, (size + 1) // 2)])
    # In quarters of a turn, whole turns taken off before it is a float: exact where a wave is 0 or 1.
    quarters = 4 * (torch.outer(frequency, position) % size)
    angle = quarters.double() * (math.pi / 2 / size)
    half = size // 2 + 1
    result = torch.cat([angle[:half].cos(), angle[half:].sin()])
    odd = (quarters % (2 * size) == size) & (torch.arange(size) < half).unsqueeze(1)
    even = (quarters % (2 * size) == 0) & (torch.arange(size) >= half).unsqueeze(1)
    return result.masked_fill(odd | even, 0.0).to(device, dtype)


def _along(matrix: Tensor, x: Tensor, out: Tensor) -> None:
    """out [size, N] = matrix of `waves` [size, size] times xᵀ, x [N, size]."""
    size = len(matrix)
    if size < _FFT_FROM:
        torch.mm(matrix, x.T, out=out)
        return
    half = size // 2 + 1
    transformed = torch.view_as_real(torch.fft.rfft(x))
    out[:half] = transformed[..., 0].T
    torch.neg(transformed[:, 1 : (size + 1) // 2, 1].T, out=out[half:])


class Block(NamedTuple):
    """P of some channels against some others, [F, rows, columns]."""

    rows: slice
    columns: slice
    total: Tensor


class Frequencies:
    """n, pivots, and per frequency the sums and scatter of several layers [n, c, h, w] of one size.

    Args:
        widths: channels of each layer.
        size: the height and width of all.
        pairs: the pairs of layers whose cross scatter is wanted.
        device: of the layers.
        precision: "high" computes in float64; "fast" in float32, added up in float64.
    """

    def __init__(
        self,
        widths: Mapping[Name, int],
        size: Sequence[int],
        pairs: Iterable[tuple[Name, Name]],
        device: torch.device,
        precision: str = "high",
    ) -> None:
        self.names = list(widths)
        self.widths = dict(widths)
        self.size = (int(size[0]), int(size[1]))
        self.device, self.precision = device, precision
        self.grid = Grid(*self.size)
        self.n = 0
        self.pivots: list[Tensor] | None = None
        *starts, self.width = _running(widths.values())
        self.starts = dict(zip(self.names, starts, strict=True))
        # [F, D, 2]: sums of real and imaginary parts.
        self.sums = torch.zeros(len(self.grid), self.width, 2, dtype=torch.float64, device=device)
        self.blocks = [
            Block(slice(top, top + rows), slice(left, left + columns), self.sums.new_zeros(len(self.grid), rows, columns))
            for top, rows, left, columns in _rectangles(self.names, self.widths, self.starts, pairs)
        ]
        self._transform: Transform | None = None
        self._whiteners: dict[Name, list[similarity.Whitener]] = {}
        self._powers: dict[Name, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out memory that is only kept for the next update."""
        return {**self.__dict__, "_transform": None, "_whiteners": {}, "_powers": {}}

    # ---- adding samples ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, layers: Mapping[Name, Tensor]) -> None:
        """Adds the images [n, c, h, w] of every layer."""
        images = [layers[name] for name in self.names]
        n = len(images[0])
        if not n:
            return
        self._forget()
        if self.pivots is None:
            self.pivots = [_near_mean(x) for x in images]
        dtype = torch.float64 if self.precision == "high" else torch.float32
        if self._transform is None:
            self._transform = Transform(self.grid, self.width, dtype, self.device)
        step = self._chunk(dtype)
        by_ops = self.width <= _OPS_WIDTH and len(self.grid) >= _OPS_FREQUENCIES
        by_ops = by_ops and (self.device.type != "cpu" or max(self.size) < _OPS_SIDE)
        with full_precision(), torch.autocast(self.device.type, enabled=False):
            for first in range(0, n, step):
                chunk = [x[first : first + step] for x in images]
                if by_ops:
                    self._update_by_ops(chunk, self.pivots, self._transform)
                    continue
                self._transform.read(chunk, self.pivots)
                for where, z in self._transform.frequencies():
                    self._multiply(where, z, self._transform)
        self.n += n

    def _update_by_ops(self, images: Sequence[Tensor], pivots: Sequence[Tensor], transform: "Transform") -> None:
        spectra = transform.buffer("spectra", (len(self.grid), 2, len(images[0]), self.width))
        for name, x, pivot in zip(self.names, images, pivots, strict=True):
            _image_spectra(x, pivot, spectra[..., self._channels(name)])
        whole = len(self.blocks) == 1
        for rows, columns, total in self.blocks:
            _spectra_gram_(spectra[..., rows], spectra[..., columns], total, self.sums if whole else None)
        if not whole:
            self.sums += spectra.sum(2, dtype=torch.float64).mT

    def _chunk(self, dtype: torch.dtype) -> int:
        """Samples that are transformed at once."""
        state = sum(block.total.numel() for block in self.blocks) * 8
        image = self.width * self.grid.h * self.grid.w * dtype.itemsize
        return max(1, min(_SAMPLES, max(_CHUNK_BYTES, state) // (2 * image)))

    def _multiply(self, where: slice, z: Tensor, transform: "Transform") -> None:
        self.sums[where] += z.sum(-1, dtype=torch.float64)
        turned = transform.buffer("turned", z.shape)
        torch.add(z[:, :, 0], z[:, :, 1], out=turned[:, :, 0])
        torch.sub(z[:, :, 1], z[:, :, 0], out=turned[:, :, 1])
        z, turned = z.flatten(2), turned.flatten(2)
        # One by one they run faster on a thread; side by side they keep several busy.
        single = self.device.type == "cpu" and torch.get_num_threads() == 1 and z.dtype == torch.float64
        for rows, columns, total in self.blocks:
            a, b = z[:, rows], turned[:, columns].mT
            if single and total[0].numel() * z.shape[2] >= _LARGE_PRODUCT:
                for into, one, other in zip(total[where], a, b, strict=True):
                    into.addmm_(one, other)
            elif z.dtype == torch.float64:
                total[where].baddbmm_(a, b)
            else:
                total[where].add_(torch.bmm(a, b))

    # ---- adding statistics -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def repivot(self, pivots: Sequence[Tensor]) -> None:
        """Moves the statistics to other pivots, exactly but for rounding."""
        if self.pivots is not None:
            self._forget()
            shifts = [(old - new).unsqueeze(0) for old, new in zip(self.pivots, pivots, strict=True)]
            if any(bool(shift.any()) for shift in shifts):
                self._shift(shifts)
        self.pivots = [p.clone() for p in pivots]

    def _shift(self, shifts: list[Tensor]) -> None:
        transform = Transform(self.grid, self.width, torch.float64, self.device)
        transform.read(shifts, None)
        for where, z in transform.frequencies():
            shift, sums = torch.view_as_complex(z.squeeze(-1).contiguous()), torch.view_as_complex(self.sums[where])
            for rows, columns, total in self.blocks:
                # conj(z + t) (z + t)ᵀ - conj(z) zᵀ, summed
                moved = sums[:, rows, None].conj() * shift[:, None, columns]
                moved += shift[:, rows, None].conj() * (sums[:, None, columns] + self.n * shift[:, None, columns])
                total[where] += moved.real + moved.imag
            sums += self.n * shift

    @torch.no_grad()
    def merge(self, other: "Frequencies") -> None:
        """Adds another's samples to this one's."""
        if other.pivots is None:
            return
        self._forget()
        if self.pivots is None:
            self.pivots = [p.to(self.device, copy=True) for p in other.pivots]
        other = other.copy(self.device)
        other.repivot(self.pivots)
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.add_(theirs)
        self.n += other.n

    def tensors(self) -> list[Tensor]:
        """What is added up when states with the same pivots are added, besides n."""
        self._forget()
        return [self.sums, *(block.total for block in self.blocks)]

    def copy(self, device: torch.device | None = None) -> "Frequencies":
        """The same statistics in memory of their own."""
        result = object.__new__(Frequencies)
        result.__dict__.update(self.__getstate__())
        result.device = device = device or self.device
        result.sums = self.sums.to(device, copy=True)
        result.blocks = [block._replace(total=block.total.to(device, copy=True)) for block in self.blocks]
        return result

    def state_dict(self) -> dict[str, Any]:
        pivots = None if self.pivots is None else [p.clone() for p in self.pivots]
        return {"n": self.n, "pivots": pivots, "tensors": [t.clone() for t in self.tensors()]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for mine, theirs in zip(self.tensors(), state["tensors"], strict=True):
            mine.copy_(theirs)
        self.n = state["n"]
        self.pivots = None if state["pivots"] is None else [p.to(self.device, copy=True) for p in state["pivots"]]

    def _forget(self) -> None:
        """Drops what was computed from statistics that are about to change."""
        self._whiteners.clear()
        self._powers.clear()

    # ---- results -----------------------------------------------------------------------------------------------------

    def _block(self, a: Name, b: Name, where: slice) -> Tensor:
        """P of two layers; KeyError if the pair was not wanted."""
        mine, theirs = self._channels(a), self._channels(b)
        for rows, columns, total in self.blocks:
            if _within(mine, rows) and _within(theirs, columns):
                return total[where, _less(mine, rows.start), _less(theirs, columns.start)]
        raise KeyError((a, b))

    def _channels(self, name: Name) -> slice:
        return slice(self.starts[name], self.starts[name] + self.widths[name])

    def scatter(self, a: Name, b: Name, where: slice = slice(None)) -> Tensor:
        """complex128 [F, c_a, c_b]: the centred scatter of two layers at some of the frequencies."""
        upper, lower = self._block(a, b, where), self._block(b, a, where).mT
        result = torch.complex(upper + lower, upper - lower) / 2
        x, y = (torch.view_as_complex(self.sums[where, self._channels(name)]) for name in (a, b))
        return result - x[:, :, None].conj() * (y[:, None, :] / self.n)

    @cached_property
    def parts(self) -> list[slice]:
        """Frequencies that are handled together."""
        step = max(1, _PART_BYTES // (16 * max(self.widths.values()) ** 2))
        return [slice(i, min(i + step, len(self.grid))) for i in range(0, len(self.grid), step)]

    def power(self, name: Name) -> Tensor:
        """[F]: the trace of a layer's scatter."""
        if name not in self._powers:
            squares = self._block(name, name, slice(None)).diagonal(dim1=1, dim2=2)
            means = self.sums[:, self._channels(name)].square().sum(-1) / self.n
            self._powers[name] = (squares - means).sum(-1)
        return self._powers[name]

    def powers(self) -> dict[Name, tuple[Tensor, Tensor]]:
        """Of each layer the trace of its scatter over all frequencies, and its sums."""
        return {name: (self.power(name).sum(), self.sums[:, self._channels(name)]) for name in self.widths}

    def live(self, name: Name) -> Tensor:
        """bool [F]: where a layer varies by more than what rounding in the transform makes of its other frequencies."""
        power = self.power(name)
        total = power[self.grid.index.to(self.device)].mean()
        return power > (4 * similarity.EPS * sum(self.size)) ** 2 * total

    def whiteners(self, name: Name) -> list[similarity.Whitener]:
        """Of a layer, for every part of the frequencies."""
        if name not in self._whiteners:
            live, power = self.live(name), self.power(name)
            found = []
            for part in self.parts:
                scatter = self.scatter(name, name, part)
                if not bool(live[part].all()):
                    scatter *= live[part, None, None]
                found.append(_whiten(scatter, self.n, power[part]))
            self._whiteners[name] = found
        return self._whiteners[name]

    def kappa(self, name: Name) -> float:
        """The largest condition number of a layer's data at a frequency, of the directions kept; 0 for a constant layer."""
        kappas = torch.cat([w.kappas for w in self.whiteners(name)])
        return float(kappas.masked_fill(kappas.isinf(), 0).max())

    @torch.no_grad()
    def map(self, a: Name, b: Name) -> Tensor:
        """[h, w] in fft2 order: the mean canonical correlation of two layers at each frequency."""
        results = [
            similarity.mean_rho(similarity.correlations(x.scatter, self.scatter(a, b, part), y.scatter, x, y), x, y)
            for part, x, y in zip(self.parts, self.whiteners(a), self.whiteners(b), strict=True)
        ]
        return torch.cat(results)[self.grid.index.to(self.device)]

    def similarity(self, a: Name, b: Name) -> Tensor:
        """The mean of `map`, a scalar."""
        return self.map(a, b).mean()

    def gradients(self, a: Name, b: Name, x: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of a function of `map` in all the images added so far, from that in the map."""
        grad = grad.new_zeros(len(self.grid)).index_add_(0, self.grid.index.to(self.device).flatten(), grad.flatten())
        turns = []  # a frequency's gradient in z is that in its scatter times z, without the mean
        for part, wx, wy in zip(self.parts, self.whiteners(a), self.whiteners(b), strict=True):
            xx, xy, yy = (s.detach().requires_grad_() for s in (wx.scatter, self.scatter(a, b, part), wy.scatter))
            with torch.enable_grad():
                mean = similarity.mean_rho(similarity.correlations(xx, xy, yy, wx, wy), wx, wy)
                xx, xy, yy = torch.autograd.grad(mean, (xx, xy, yy), grad[part])
            turns.append(torch.cat([torch.cat([xx + xx.mH, xy], 2), torch.cat([xy.mH, yy + yy.mH], 2)], 1).mT)
        turn = torch.cat(turns)
        transform = Transform(self.grid, self.width, torch.float64, self.device)

        def pull(where: slice, z: Tensor) -> Tensor:
            centred = z - (self.sums[where] / self.n).unsqueeze(-1)
            return torch.view_as_real(turn[where] @ torch.complex(centred[:, :, 0], centred[:, :, 1]))

        results = [torch.empty_like(x), torch.empty_like(y)]
        step = self._chunk(torch.float64)
        with torch.autocast(self.device.type, enabled=False):
            for first in range(0, len(x), step):
                part = slice(first, first + step)
                transform.read([x[part], y[part]], self.pivots)
                transform.pull(pull, [result[part] for result in results])
        return results[0], results[1]


def _whiten(scatter: Tensor, n: int, power: Tensor) -> similarity.Whitener:
    """`similarity.whiten` of a batch, by Cholesky wherever a matrix is certain to keep all its directions; power: traces."""
    factor, info = torch.linalg.cholesky_ex(scatter)
    identity = torch.eye(scatter.shape[-1], dtype=scatter.dtype, device=scatter.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(scatter), upper=False)
    # The smallest eigenvalue is at least 1 / |L⁻¹|², the largest at most the trace; twice the cut, because both are rounded.
    smallest = torch.linalg.vector_norm(torch.view_as_real(inverse).flatten(1), dim=1).square().reciprocal()
    sure = (info == 0) & (smallest > 2 * max(n, scatter.shape[-1]) * similarity.EPS * power)
    if bool(sure.all()):
        return similarity.Whitener(inverse.mH, torch.full_like(info, scatter.shape[-1], dtype=torch.int64), scatter)
    others = (~sure).nonzero().squeeze(1)
    rest = similarity.whiten(scatter[others], n)
    root, ranks = inverse.mH.clone(), torch.full_like(info, scatter.shape[-1], dtype=torch.int64)
    root[others] = torch.nn.functional.pad(rest.root, (0, scatter.shape[-1] - rest.root.shape[-1]))
    ranks[others] = rest.ranks
    return similarity.Whitener(root, ranks, scatter)


class Transform:
    """The frequencies of a chunk of images, column by column.

    z = r + i q is the sum of x exp(+2 pi i (k u / h + l v / w)): the conjugate of fft2's, which no similarity sees.
    """

    def __init__(self, grid: Grid, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.grid, self.width, self.dtype, self.device = grid, width, dtype, device
        self.along_h = waves(grid.h, dtype, device)
        self.along_w = waves(grid.w, dtype, device)
        self._memory: dict[str, Tensor] = {}
        self._n = 0

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Memory that is kept from call to call."""
        size, dtype = math.prod(shape), dtype or self.dtype
        found = self._memory.get(name)
        if found is None or found.numel() < size:
            found = self._memory[name] = torch.empty(size, dtype=dtype, device=self.device)
        return found[:size].view(shape)

    def read(self, images: Sequence[Tensor], pivots: Sequence[Tensor] | None) -> None:
        """Takes images [n, c, h, w] of all layers, less their pivots, and transforms them along w."""
        h, w = self.grid.h, self.grid.w
        self._n = n = len(images[0])
        self._rows = self.buffer("rows", (w, self.width, n, h))
        start = 0
        for layer, x in enumerate(images):
            for part in self._channels(x):
                given = x[:, part].transpose(0, 1)
                wide = self.buffer("wide", given.shape, torch.float64)
                wide.copy_(given)
                if pivots is not None:
                    wide.sub_(pivots[layer][part].unsqueeze(1))
                if self.dtype != torch.float64:
                    wide = self.buffer("narrow", wide.shape).copy_(wide)
                out = self._rows[:, start : start + len(wide)]
                _along(self.along_w, wide.view(-1, w), out.view(w, -1))
                start += len(wide)

    def _channels(self, x: Tensor) -> Iterator[slice]:
        """Channels that are read together: what a cache holds, and no less than a cache line of those that lie side by side."""
        step = max(1, _CACHE_BYTES // (8 * x[:, :1].numel()), 16 if x.stride(1) == 1 else 1)
        for first in range(0, x.shape[1], step):
            yield slice(first, min(first + step, x.shape[1]))

    def frequencies(self) -> Iterator[tuple[slice, Tensor]]:
        """(which of the grid's, z [f, D, 2, n] with real and imaginary parts), in memory that is used again."""
        for column in self.grid.columns:
            even, odd = self._column(column)
            for group in self.grid.groups(column, self._together):
                yield group.where, self._mix(group, even, odd)

    def pull(self, gradient: Callable[[slice, Tensor], Tensor], results: Sequence[Tensor]) -> None:
        """Writes the gradients of the images [n, c, h, w], given (which of the grid's, z) -> gradient of z [f, D, n, 2]."""
        h, w = self.grid.h, self.grid.w
        for column in self.grid.columns:
            even, odd = self._column(column)
            for group in self.grid.groups(column, self._together):
                self._unmix(group, gradient(group.where, self._mix(group, even, odd)), even, odd)
            for row, product in ((column, even), (w // 2 + column, odd)):
                if product is not None:  # the row is needed no more
                    torch.mm(product.view(h, -1).T, self.along_h, out=self._rows[row].view(-1, h))
        start = 0
        for result in results:
            for part in self._channels(result):
                rows = self._rows[:, start : start + part.stop - part.start]
                images = torch.mm(rows.view(w, -1).T, self.along_w)
                result[:, part] = images.view(rows.shape[1], self._n, h, w).transpose(0, 1)
                start += rows.shape[1]

    @property
    def _together(self) -> int:
        """Frequencies that a cache holds."""
        return max(1, _CACHE_BYTES // (2 * self.width * self._n * self.dtype.itemsize))

    def _column(self, column: int) -> tuple[Tensor, Tensor | None]:
        """A column's products with the cosines and the sines along w, each transformed along h; None for sines of 0."""
        rows = [(column, "even")]
        if self.grid.step(column) == 2:
            rows.append((self.grid.w // 2 + column, "odd"))
        found = []
        for row, name in rows:
            out = self.buffer(name, (self.grid.h, self.width, self._n))
            _along(self.along_h, self._rows[row].view(-1, self.grid.h), out.view(self.grid.h, -1))
            found.append(out)
        return found[0], found[1] if len(found) == 2 else None

    def _mix(self, group: Group, even: Tensor, odd: Tensor | None) -> Tensor:
        """The frequencies of a group from the products of its column."""
        z = self.buffer("z", (len(group), self.width, 2, self._n))
        if group.ks is None:
            for i, k in enumerate(self.grid.singles):
                z[i, :, 0] = even[k]
                z[i, :, 1] = 0 if odd is None else odd[k]
            return z
        cosines, sines = self._places(group.ks)
        if odd is None:
            z[:, :, 0], z[:, :, 1] = even[cosines], even[sines]
            return z
        plus, minus = z[0::2], z[1::2]
        torch.sub(even[cosines], odd[sines], out=plus[:, :, 0])
        torch.add(odd[cosines], even[sines], out=plus[:, :, 1])
        torch.add(even[cosines], odd[sines], out=minus[:, :, 0])
        torch.sub(odd[cosines], even[sines], out=minus[:, :, 1])
        return z

    def _unmix(self, group: Group, grad: Tensor, even: Tensor, odd: Tensor | None) -> None:
        """The transpose of `_mix`, over the products that it read."""
        real, imaginary = grad.unbind(-1)
        if group.ks is None:
            for i, k in enumerate(self.grid.singles):
                even[k] = real[i]
                if odd is not None:
                    odd[k] = imaginary[i]
            return
        cosines, sines = self._places(group.ks)
        if odd is None:
            even[cosines], even[sines] = real, imaginary
            return
        even[cosines], odd[sines] = real[0::2] + real[1::2], real[1::2] - real[0::2]
        odd[cosines], even[sines] = imaginary[0::2] + imaginary[1::2], imaginary[0::2] - imaginary[1::2]

    def _places(self, ks: tuple[int, int]) -> tuple[slice, slice]:
        """The rows of a pair's cosines and sines along h."""
        first, last = ks
        return slice(first, last), slice(self.grid.h // 2 + first, self.grid.h // 2 + last)


def _running(sizes: Iterable[int]) -> list[int]:
    """Where each begins if they lie side by side, and where the last ends."""
    return [0, *itertools.accumulate(sizes)]


def _within(part: slice, whole: slice) -> bool:
    return bool(whole.start <= part.start and part.stop <= whole.stop)


def _less(part: slice, start: int) -> slice:
    return slice(part.start - start, part.stop - start)


def _rectangles(
    names: Sequence[Name], widths: Mapping[Name, int], starts: Mapping[Name, int], pairs: Iterable[tuple[Name, Name]]
) -> list[tuple[int, int, int, int]]:
    """(first row, rows, first column, columns) that cover every layer with itself and both blocks of the wanted pairs."""
    partners: dict[Name, set[Name]] = {name: {name} for name in names}
    for a, b in pairs:
        partners[a].add(b)
        partners[b].add(a)
    found: list[list[int]] = []
    for name in names:
        runs: list[list[int]] = []
        for other in names:
            if other in partners[name]:
                if runs and sum(runs[-1]) == starts[other]:
                    runs[-1][1] += widths[other]
                else:
                    runs.append([starts[other], widths[other]])
        for left, columns in runs:
            above = next((r for r in found if r[2:] == [left, columns] and r[0] + r[1] == starts[name]), None)
            if above is None:
                found.append([starts[name], widths[name], left, columns])
            else:
                above[1] += widths[name]
    return [(top, rows, left, columns) for top, rows, left, columns in found]


def _near_mean(x: Tensor) -> Tensor:
    """[c, h, w] float64 near the mean of the images: of the first few; exactly the value of what is the same in all of them."""
    first = x[0].double()
    return first + (x[:_PIVOT_SAMPLES].double() - first).mean(0)
