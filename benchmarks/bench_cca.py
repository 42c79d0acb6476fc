"""cca, svcca, pwcca, cka, cka_matrix, procrustes, rv and dft_cca of activations in memory.

Rivals: the algorithm of SVCCA's reference implementation (svcca_numpy), and what one writes in torch: a QR of each layer and
the singular values of their product, or covariances and their eigenvalues. CKA's published forms make an n x n matrix of each
layer. Of other libraries none that measures similarity is in the bench extra (netrep, anatome and cca-zoo do not race) but
scikit-learn, whose iterative CCA races where it ends within seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fourfold as ff
import torch
from torch import Tensor

from . import cases as shapes
from . import svcca_numpy as published
from .harness import Absent, Call, Case, Contestant, Settings, Tolerance, in_fresh_memory, with_backward

FAMILY = "cca"
HIGH = Tolerance(1e-9, 1e-9)
REFERENCE = Tolerance(1e-7, 1e-7)  # the reference algorithm inverts, then takes roots: it loses as much again
SINGLE = Tolerance(1e-5, 1e-5)  # float32 all the way through
FAST = Tolerance(1e-5, 1e-6)  # float32 products of float32 data: condition numbers are below 100
GRADIENT = Tolerance(1e-6, 1e-6, of_rms=True)  # gradients are rounded to float32
VARIANCE = 0.99
COMPILED = shapes.PAIR.features  # of the pairs at which idioms race compiled as well: compiling takes seconds


# --- activations ----------------------------------------------------------------------------------------------------------


def spectrum(features: int) -> Tensor:
    """Scales of independent causes: an eighth of them strong, the others falling."""
    return 1 / (1 + torch.arange(features) / (features / 8))


class Pair:
    """Two layers' float32 activations [n, d] on the same n samples. Half of what one sees the other sees; means are not 0."""

    def __init__(self, place: shapes.Pair, gradient: bool, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        d, n = place.features, place.samples
        scales = spectrum(d)

        def layer(causes: Tensor) -> Tensor:
            weight = torch.randn(d, d, generator=generator) / math.sqrt(d)
            noise = torch.randn(n, d, generator=generator)
            return ((causes * scales) @ weight).add_(noise, alpha=0.05).add_(1.0).to(device).requires_grad_(gradient)

        own, common = (torch.randn(n, d, generator=generator) for _ in range(2))
        self.x, self.y = layer(common), layer(common.mul_(0.7).add_(own, alpha=0.7))

    def clone(self) -> Tensor:
        return self.x.clone()


def in_numpy(compute: Callable[..., Any]) -> Callable[[Any, str], Call]:
    """A function of svcca_numpy on x and y as [neurons, datapoints]."""

    def make(p: Pair, state: str) -> Call:
        published.follow_torch_threads()
        x, y = (t.detach().cpu().numpy().T for t in (p.x, p.y))
        return lambda: compute(x, y)

    return make


def in_torch(compute: Callable[[Tensor, Tensor], Any], dtype: torch.dtype = torch.float64) -> Callable[[Any, str], Call]:
    """A function of x and y, which it gets in this type."""
    return lambda p, state: lambda: compute(p.x.to(dtype), p.y.to(dtype))


def compiled(settings: Settings, place: shapes.Pair, compute: Callable[[Tensor, Tensor], Any], name: str) -> list[Contestant]:
    """What inductor makes of it: the factorisations stay library calls."""
    if not settings.compiles or place.features != COMPILED:
        return []

    def make(p: Pair, state: str) -> Call:
        return torch.compile(lambda: compute(p.x.double(), p.y.double()), dynamic=False, fullgraph=True)

    return [Contestant(f"{name}, compiled", make)]


rho_in_numpy = in_numpy(lambda x, y: published.canonical(x, y).rho)


def _of_numpy(result: Any) -> Tensor:
    return torch.from_numpy(result)


def correlations(result: Any) -> Tensor:
    return result.rho


# --- the same in plain torch ----------------------------------------------------------------------------------------------


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def kept_of(power: Tensor, variance: float) -> int:
    """How many of these, which fall, hold that share."""
    share = power.cumsum(0)
    return int((share / share[-1] < variance).sum()) + 1


def by_qr(x: Tensor, y: Tensor) -> Tensor:
    """Canonical correlations."""
    return torch.linalg.svdvals(torch.linalg.qr(centred(x))[0].T @ torch.linalg.qr(centred(y))[0])


def basis_by_svd(x: Tensor, variance: float = VARIANCE) -> Tensor:
    u, s, _ = torch.linalg.svd(centred(x), full_matrices=False)
    return u[:, : kept_of(s.square(), variance)]


def svcca_by_svd(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.svdvals(basis_by_svd(x).T @ basis_by_svd(y))


def whitening(gram: Tensor, variance: float | None = None) -> Tensor:
    """gram^-1/2 by eigh, of its leading directions where a share of the variance is given."""
    return _inverse_root(*torch.linalg.eigh(gram), variance)


def _inverse_root(w: Tensor, v: Tensor, variance: float | None) -> Tensor:
    kept = len(w) if variance is None else kept_of(w.flip(0), variance)
    return v[:, -kept:] / w[-kept:].sqrt()


def by_gram(x: Tensor, y: Tensor, variance: float | None = None) -> Tensor:
    x, y = centred(x), centred(y)
    return torch.linalg.svdvals(whitening(x.T @ x, variance).T @ (x.T @ y) @ whitening(y.T @ y, variance))


def _weighted(u: Tensor, rho: Tensor, basis: Tensor, x: Tensor) -> Tensor:
    weights = (u.T @ (basis.T @ x)).abs().sum(1)
    return (weights * rho).sum() / weights.sum()


def svcca_compiled(p: Pair, state: str) -> Call:
    """All but the choice of directions, whose number is in the data."""

    @functools.partial(torch.compile, dynamic=False, fullgraph=True)
    def products() -> tuple[Tensor, ...]:
        x, y = centred(p.x.double()), centred(p.y.double())
        return *torch.linalg.eigh(x.T @ x), x.T @ y, *torch.linalg.eigh(y.T @ y)

    def call() -> Tensor:
        wx, vx, xy, wy, vy = products()
        return torch.linalg.svdvals(_inverse_root(wx, vx, VARIANCE).T @ xy @ _inverse_root(wy, vy, VARIANCE))

    return call


def pwcca_by_qr(x: Tensor, y: Tensor) -> Tensor:
    x = centred(x)
    basis = torch.linalg.qr(x)[0]
    u, rho, _ = torch.linalg.svd(basis.T @ torch.linalg.qr(centred(y))[0])
    return _weighted(u, rho, basis, x)


def pwcca_by_gram(x: Tensor, y: Tensor) -> Tensor:
    x, y = centred(x), centred(y)
    gram = x.T @ x
    root = whitening(gram)
    u, rho, _ = torch.linalg.svd(root.T @ (x.T @ y) @ whitening(y.T @ y))
    weights = (u.T @ (root.T @ gram)).abs().sum(1)
    return (weights * rho).sum() / weights.sum()


def cka_of_features(x: Tensor, y: Tensor) -> Tensor:
    x, y = centred(x), centred(y)
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def procrustes_of_features(x: Tensor, y: Tensor) -> Tensor:
    x, y = centred(x), centred(y)
    return torch.linalg.svdvals(x.T @ y).sum() / (x.norm() * y.norm())


def doubly_centred(k: Tensor) -> Tensor:
    return k - k.mean(0, keepdim=True) - k.mean(1, keepdim=True) + k.mean()


def hsic_biased(k: Tensor, m: Tensor) -> Tensor:
    return (doubly_centred(k) * doubly_centred(m)).sum()


def hsic_unbiased(k: Tensor, m: Tensor) -> Tensor:
    """HSIC_1 of kernel matrices without their diagonals, as its equation stands (Song et al., 2012)."""
    n, one = len(k), k.new_ones(len(k), 1)
    both = k @ m
    crossed = (one.T @ k @ one) * (one.T @ m @ one) / ((n - 1) * (n - 2))
    return ((both.trace() + crossed - 2 / (n - 2) * (one.T @ both @ one)) / (n * (n - 3))).squeeze()


def hsic_by_elements(k: Tensor, m: Tensor) -> Tensor:
    """The same without a product of matrices."""
    n = len(k)
    crossed = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
    return ((k * m).sum() + crossed) / (n * (n - 3))


def alignment(hsic: Callable[[Tensor, Tensor], Tensor], k: Tensor, m: Tensor) -> Tensor:
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


def kernel(x: Tensor) -> Tensor:
    return x @ x.T


def without_diagonal(x: Tensor) -> Tensor:
    return kernel(x).fill_diagonal_(0)


def rbf(x: Tensor) -> Tensor:
    """The bandwidth is the median of the distances between different samples."""
    distance = torch.cdist(x, x)
    rows, columns = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return torch.exp(distance.square() / (-2 * distance[rows, columns].median() ** 2))


def cka_of_kernels(make: Callable[[Tensor], Tensor], hsic: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: alignment(hsic, make(x), make(y))


# --- references -----------------------------------------------------------------------------------------------------------


def exact_basis(x: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of the centred x in float64."""
    q, r = torch.linalg.qr(centred(x.detach().double()))
    u, s, _ = torch.linalg.svd(r)
    return q @ u, s


def exact_cca(p: Pair) -> Tensor:
    return torch.linalg.svdvals(exact_basis(p.x)[0].T @ exact_basis(p.y)[0])


def exact_svcca(p: Pair) -> Tensor:
    bases = [basis[:, : kept_of(s.square(), VARIANCE)] for basis, s in map(exact_basis, (p.x, p.y))]
    return torch.linalg.svdvals(bases[0].T @ bases[1])


def exact_pwcca(p: Pair) -> Tensor:
    basis, other = (exact_basis(t)[0] for t in (p.x, p.y))
    u, rho, _ = torch.linalg.svd(basis.T @ other)
    return _weighted(u, rho, basis, centred(p.x.detach().double()))


def exactly(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Pair], Tensor]:
    return lambda p: compute(p.x.detach().double(), p.y.detach().double())


# --- one pair -------------------------------------------------------------------------------------------------------------


def _pair_case(op: str, place: shapes.Pair, words: str = "", **changes: Any) -> Case:
    gradient = changes.pop("gradient", False)
    given = {
        "family": FAMILY,
        "op": op,
        "label": f"{place}{words}",
        "problem": functools.partial(Pair, place, gradient),
        "tolerance": HIGH,
        "state": "heap",
        "handles": (1, "pairs"),
        "source": place.source,
    }
    return Case(**(given | changes))


def _cca(settings: Settings, place: shapes.Pair, **flags: bool) -> Case:
    rivals = [
        Contestant("reference algorithm, numpy", rho_in_numpy, REFERENCE, tensors=_of_numpy),
        Contestant("Gram + eigh, float64", in_torch(by_gram)),
        Contestant("QR + svdvals, float32", in_torch(by_qr, torch.float32), SINGLE),
    ]
    if place.features <= (64 if settings.quick else 512):
        rivals.append(Contestant("QR + svdvals, float64", in_torch(by_qr)))  # always behind the Gram; 8 s at 1024 x 20000
    rivals += compiled(settings, place, by_gram, "Gram + eigh, float64")
    if place.features <= 64 and not settings.quick:
        rivals.append(Contestant("scikit-learn's CCA", by_sklearn, Tolerance(1e-3, 0.0), tensors=_of_numpy))
    return _pair_case(
        "cca",
        place,
        reference=exact_cca,
        ours=Contestant("fourfold", lambda p, state: lambda: ff.cca(p.x, p.y), tensors=correlations),
        rivals=tuple(rivals),
        flops=place.samples * 2 * place.features * (2 * place.features + 1),
        gemm=torch.float64,
        **flags,
    )


def by_sklearn(p: Pair, state: str) -> Call:
    """Component by component."""
    try:
        from sklearn.cross_decomposition import CCA
    except ImportError:
        raise Absent("not installed (pip install scikit-learn)") from None
    import numpy as np

    published.follow_torch_threads()
    x, y = (t.double().cpu().numpy() for t in (p.x, p.y))

    def call() -> Any:
        a, b = CCA(x.shape[1], max_iter=2000, tol=1e-10).fit(x, y).transform(x, y)
        a, b = (v / np.linalg.norm(v, axis=0) for v in (a, b))
        return np.sort((a * b).sum(0))[::-1].copy()

    return call


def _cca_fast(place: shapes.Pair, **flags: bool) -> Case:
    return _pair_case(
        "cca",
        place,
        ', precision="fast"',
        reference=exact_cca,
        ours=Contestant("fourfold", lambda p, state: lambda: ff.cca(p.x, p.y, precision="fast"), tensors=correlations),
        rivals=(
            Contestant("reference algorithm, numpy", rho_in_numpy, REFERENCE, tensors=_of_numpy),
            Contestant("QR + svdvals, float32", in_torch(by_qr, torch.float32), SINGLE),
            Contestant("Gram + eigh, float32", in_torch(by_gram, torch.float32), Tolerance(1e-2, 0.0)),
        ),
        tolerance=FAST,
        flops=place.samples * 2 * place.features * (2 * place.features + 1),
        **flags,
    )


def _svcca(settings: Settings, place: shapes.Pair, **flags: bool) -> Case:
    truncated = functools.partial(by_gram, variance=VARIANCE)
    rivals = [Contestant("Gram + eigh, float64", in_torch(truncated))]
    if settings.compiles and place.features == COMPILED:
        rivals.append(Contestant("Gram + eigh, float64, compiled", svcca_compiled))
    if place.features <= 512:  # an SVD of every sample takes half a minute at 1024 x 20000
        rivals += [
            Contestant("SVD of each, then the reference, numpy", in_numpy(published.svcca), SINGLE, tensors=_of_numpy),
            Contestant("SVD of each + svdvals, float64", in_torch(svcca_by_svd)),
        ]
    return _pair_case(
        "svcca",
        place,
        reference=exact_svcca,
        ours=Contestant("fourfold", lambda p, state: lambda: ff.svcca(p.x, p.y, variance=VARIANCE), tensors=correlations),
        rivals=tuple(rivals),
        **flags,
    )


def _pwcca(settings: Settings, place: shapes.Pair, **flags: bool) -> Case:
    return _pair_case(
        "pwcca",
        place,
        reference=exact_pwcca,
        ours=Contestant("fourfold", lambda p, state: lambda: ff.pwcca(p.x, p.y)),
        rivals=(
            Contestant("reference algorithm, weights repaired, numpy", in_numpy(published.pwcca), REFERENCE, tensors=_of_numpy),
            Contestant("Gram + eigh, float64", in_torch(pwcca_by_gram)),
            *compiled(settings, place, pwcca_by_gram, "Gram + eigh, float64"),
            *[Contestant("QR + svd, float64", in_torch(pwcca_by_qr))] * (place.features <= 512),
        ),
        **flags,
    )


def _cka(settings: Settings, place: shapes.Pair, **flags: bool) -> Case:
    of_kernels = cka_of_kernels(kernel, hsic_biased)
    return _pair_case(
        "cka",
        place,
        reference=exactly(cka_of_features),
        ours=Contestant("fourfold", lambda p, state: lambda: ff.cka(p.x, p.y)),
        rivals=(
            Contestant("n x n matrices, float64", in_torch(of_kernels)),
            Contestant("d x d matrices, float64", in_torch(cka_of_features)),
            *compiled(settings, place, cka_of_features, "d x d matrices, float64"),
        ),
        **flags,
    )


def _cka_unbiased(place: shapes.Pair, **flags: bool) -> Case:
    by_elements = cka_of_kernels(without_diagonal, hsic_by_elements)
    return _pair_case(
        "cka",
        place,
        ", unbiased",
        reference=exactly(by_elements),
        ours=Contestant("fourfold", lambda p, state: lambda: ff.cka(p.x, p.y, unbiased=True)),
        rivals=(
            Contestant("n x n matrices as published, float64", in_torch(cka_of_kernels(without_diagonal, hsic_unbiased))),
            Contestant("n x n matrices, elementwise, float64", in_torch(by_elements)),
        ),
        **flags,
    )


def _cka_rbf(place: shapes.Pair, **flags: bool) -> Case:
    of_kernels = cka_of_kernels(rbf, hsic_biased)
    return _pair_case(
        "cka",
        place,
        ", rbf",
        reference=exactly(of_kernels),
        ours=Contestant("fourfold", lambda p, state: lambda: ff.cka(p.x, p.y, kernel="rbf")),
        rivals=(
            Contestant("n x n matrices, float64", in_torch(of_kernels)),
            Contestant("n x n matrices, float32", in_torch(of_kernels, torch.float32), SINGLE),
        ),
        state="fresh",
        peak=True,
        **flags,
    )


def _features(settings: Settings, op: str, place: shapes.Pair, **flags: bool) -> Case:
    """procrustes and rv."""
    compute = procrustes_of_features if op == "procrustes" else cka_of_features
    return _pair_case(
        op,
        place,
        reference=exactly(compute),
        ours=Contestant("fourfold", lambda p, state: lambda: getattr(ff, op)(p.x, p.y)),
        rivals=(
            Contestant("d x d matrices, float64", in_torch(compute)),
            *compiled(settings, place, compute, "d x d matrices, float64"),
        ),
        **flags,
    )


# --- as a loss ------------------------------------------------------------------------------------------------------------


def _with_gradients(p: Pair, compute: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype | None = None) -> Call:
    def call() -> tuple[Tensor, ...]:
        value = compute(p.x, p.y) if dtype is None else compute(p.x.to(dtype), p.y.to(dtype))
        return value, *torch.autograd.grad(value, [p.x, p.y])

    return call


def _mean_by_qr(x: Tensor, y: Tensor) -> Tensor:
    return by_qr(x, y).mean()


def _mean_by_svd(x: Tensor, y: Tensor) -> Tensor:
    return svcca_by_svd(x, y).mean()


def _weights_held(x: Tensor, y: Tensor) -> Tensor:
    """PWCCA by QR; the weights of the correlations are constants in backward."""
    x, y = centred(x), centred(y)
    basis = torch.linalg.qr(x)[0]
    u, rho, _ = torch.linalg.svd(basis.T @ torch.linalg.qr(y)[0])
    weights = (u.T @ (basis.T @ x)).abs().sum(1).detach()
    return (weights * rho).sum() / weights.sum()


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], str]] = {
    "cca": (lambda x, y: ff.cca(x, y).mean, _mean_by_qr, "autograd through QR and svdvals"),
    "svcca": (lambda x, y: ff.svcca(x, y, variance=VARIANCE).mean, _mean_by_svd, "autograd through SVDs"),
    "pwcca": (ff.pwcca, _weights_held, "autograd through QR and svd"),
    "cka": (ff.cka, cka_of_features, "autograd through d x d matrices"),
    "rv": (ff.rv, cka_of_features, "autograd through d x d matrices"),
    "procrustes": (ff.procrustes, procrustes_of_features, "autograd through svdvals"),
}


def _loss(op: str, place: shapes.Pair, **flags: bool) -> Case:
    ours, plain, words = LOSSES[op]

    def exact(p: Pair) -> list[Tensor]:
        x, y = (t.detach().double().requires_grad_() for t in (p.x, p.y))
        value = plain(x, y)
        return [value.detach(), *torch.autograd.grad(value, [x, y])]

    return _pair_case(
        op,
        place,
        ", forward and backward",
        gradient=True,
        reference=exact,
        ours=Contestant("fourfold", lambda p, state: _with_gradients(p, ours)),
        rivals=(
            Contestant(f"{words}, float64", lambda p, state: _with_gradients(p, plain, torch.float64)),
            Contestant(f"{words}, float32", lambda p, state: _with_gradients(p, plain), Tolerance(1e-2, 1e-2, of_rms=True)),
        ),
        held=lambda p: [p.x, p.y],
        tolerance=GRADIENT,
        **flags,
    )


# --- all pairs of CKA -----------------------------------------------------------------------------------------------------


class Layers:
    """One batch's float32 activations of many layers, [n, d] each; neighbours are alike."""

    def __init__(self, count: int, samples: int, features: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(samples, features, generator=generator)
        self.layers = []
        for _ in range(count):
            h = (0.8 * h + 0.6 * torch.randn(samples, features, generator=generator)).relu()
            self.layers.append(h.to(device))
        self.one = torch.ones((), dtype=torch.float64, device=device)

    def clone(self) -> Tensor:
        return self.layers[0].clone()


def every_pair(layers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Unbiased CKA of all pairs; every kernel once."""
    kernels = [without_diagonal(t.to(dtype)) for t in layers]
    rows = [[hsic_by_elements(k, m) for m in kernels] for k in kernels]
    matrix = torch.stack([torch.stack(row) for row in rows])
    own = matrix.diagonal().sqrt()
    return matrix / (own[:, None] * own)


def every_pair_compiled(p: Layers, state: str) -> Call:
    return torch.compile(lambda: every_pair(p.layers, torch.float64), dynamic=False, fullgraph=True)


def loop_of_cka(p: Layers, state: str) -> Call:
    """What torch_cka does with a batch: of every pair the second kernel, and its HSIC with itself, anew."""

    def call() -> Tensor:
        matrix = torch.empty(len(p.layers), len(p.layers))
        for i, x in enumerate(p.layers):
            k = without_diagonal(x)
            own_k = hsic_unbiased(k, k)
            for j, y in enumerate(p.layers):
                m = without_diagonal(y)
                matrix[i, j] = hsic_unbiased(k, m) / (own_k.sqrt() * hsic_unbiased(m, m).sqrt())
        return matrix

    return call


def _all_cka(settings: Settings, count: int, samples: int, features: int, precision: str = "high", **flags: bool) -> Case:
    def ours(p: Layers, state: str) -> Call:
        named = dict(enumerate(p.layers))
        return lambda: ff.cka_matrix(named, unbiased=True, precision=precision).matrix  # type: ignore[arg-type]

    rivals = [
        # ReLUs have means: in float32 these cancel badly without centring.
        Contestant("torch_cka's loop, float32", loop_of_cka, Tolerance(2e-2, 0.0)),
        Contestant("every kernel once, float64", lambda p, state: lambda: every_pair(p.layers, torch.float64)),
    ]
    if settings.compiles and count <= 4:  # of twelve layers inductor unrolls 144 products
        rivals.append(Contestant("every kernel once, float64, compiled", every_pair_compiled))
    words = ', precision="fast"' if precision == "fast" else ""
    return Case(
        family=FAMILY,
        op="cka_matrix",
        label=f"all pairs of {count} layers, {features}x{samples}, unbiased{words}",
        problem=functools.partial(Layers, count, samples, features),
        reference=lambda p: every_pair(p.layers, torch.float64),
        ours=Contestant("fourfold", ours),
        rivals=tuple(rivals),
        tolerance=FAST if precision == "fast" else HIGH,
        state="heap",
        handles=(count * (count + 1) // 2, "pairs"),
        source="torch_cka on one batch of 128 images; a layer of 8192 is 32 channels of 16 x 16",
        **flags,
    )


def _all_cka_training(settings: Settings, count: int, samples: int, features: int) -> Case:
    """The mean over all pairs as a loss."""

    def leaves(p: Layers) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in p.layers]

    def ours(p: Layers, state: str) -> Call:
        layers = leaves(p)
        named = {str(index): t for index, t in enumerate(layers)}

        def mean() -> Tensor:
            return ff.cka_matrix(named, unbiased=True).matrix.mean()

        return with_backward(mean, layers, [p.one])

    def plain(p: Layers, state: str) -> Call:
        layers = leaves(p)
        return with_backward(lambda: every_pair(layers, torch.float64).mean(), layers, [p.one])

    def exact(p: Layers) -> list[Tensor]:
        layers = [t.double().requires_grad_() for t in p.layers]
        value = every_pair(layers, torch.float64).mean()
        return [value.detach(), *torch.autograd.grad(value, layers)]

    case = _all_cka(settings, count, samples, features)
    return dataclasses.replace(
        case,
        label=f"{case.label}, forward and backward of the mean",
        reference=exact,
        ours=Contestant("fourfold", ours),
        rivals=(Contestant("autograd through every kernel once, float64", plain),),
        held=lambda p: p.layers,
        tolerance=GRADIENT,
    )


# --- dft_cca --------------------------------------------------------------------------------------------------------------

PART = 16  # the reference's Fourier form races with a PARTth of the images and of the locations


class Images:
    """Two convolutional layers' float32 activations [n, c, h, w]; every channel has a mean."""

    def __init__(self, samples: int, channels: int, side: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        scales = spectrum(channels).view(-1, 1, 1)

        def mixed(causes: Tensor) -> Tensor:
            weight = torch.randn(channels, channels, generator=generator) / math.sqrt(channels)
            images = torch.einsum("nchw,cd->ndhw", causes * scales, weight)
            return images.add_(torch.randn(causes.shape, generator=generator), alpha=0.05).add_(1.0).contiguous()

        causes = torch.randn(samples, channels, side, side, generator=generator)
        x = mixed(causes)
        y = mixed(causes.mul_(0.7).add_(torch.randn(causes.shape, generator=generator), alpha=0.7))
        self.x, self.y = x.to(device), y.to(device)
        self.side = side
        self.one = torch.ones((), dtype=torch.float64, device=device)

    @functools.cached_property
    def places(self) -> Tensor:
        """A PARTth of the locations, in fft2 order."""
        return torch.arange(0, self.side**2, PART)

    def clone(self) -> Tensor:
        return self.x.clone()


def _spectra(x: Tensor, dtype: torch.dtype, transform: Callable[..., Tensor]) -> Tensor:
    """[frequencies, n, c], of the centred images; by parts, as a transform of all takes gigabytes."""
    x = x.to(dtype)
    x = x - x.mean((0, 2, 3), keepdim=True)  # of each channel: the zero frequency loses the least
    parts = [transform(part).flatten(2).permute(2, 0, 1) for part in x.split(128)]
    return torch.cat(parts, 1)


def _mean_by_frequency(x: Tensor, y: Tensor) -> Tensor:
    """Mean correlation of complex x and y [frequencies, n, c]; in float64 from the covariances on."""
    x, y = (t - t.mean(1, keepdim=True) for t in (x, y))
    xx, xy, yy = (torch.matmul(a.mH, b).to(torch.complex128) for a, b in ((x, x), (x, y), (y, y)))
    roots = []
    for gram in (xx, yy):
        w, v = torch.linalg.eigh(gram)
        roots.append(v / w.sqrt()[:, None])
    return torch.linalg.svdvals(roots[0].mH @ xy @ roots[1]).mean(1)


def exact_frequencies(p: Images) -> Tensor:
    """All of them, the conjugate ones too; by QR, row by row of frequencies."""
    rows = []
    x, y = (torch.fft.fft(t.double() - t.double().mean(0), dim=3) for t in (p.x, p.y))
    for column in range(p.side):
        spectra = [torch.fft.fft(t[..., column], dim=2).permute(2, 0, 1) for t in (x, y)]
        bases = [torch.linalg.qr(t)[0] for t in spectra]
        rows.append(torch.linalg.svdvals(bases[0].mH @ bases[1]).mean(1))
    return torch.stack(rows, 1)


def _exact_places(p: Images) -> Tensor:
    return exact_frequencies(p).flatten()[p.places]


def half_plane(dtype: torch.dtype) -> Callable[[Images, str], Call]:
    """rfft2 and covariances of each frequency; the other half is conjugate."""

    def make(p: Images, state: str) -> Call:
        def call() -> Tensor:
            half = _mean_by_frequency(_spectra(p.x, dtype, torch.fft.rfft2), _spectra(p.y, dtype, torch.fft.rfft2))
            half = half.view(p.side, -1)
            rows = -torch.arange(p.side, device=half.device) % p.side
            columns = torch.arange(half.shape[1], p.side, device=half.device)
            return torch.cat([half, half[rows][:, p.side - columns]], 1)

        return call

    return make


def part_of_reference(p: Images, state: str) -> Call:
    """The transform of a PARTth of the images, and a PARTth of the locations, whose spectra lie ready."""
    published.follow_torch_threads()
    images = [t[: len(t) // PART].permute(0, 2, 3, 1).contiguous().cpu().numpy() for t in (p.x, p.y)]
    ready = []
    for t in (p.x, p.y):
        parts = [torch.fft.fft2(part.double()).flatten(2)[..., p.places] for part in t.split(128)]
        ready.append(torch.cat(parts).transpose(1, 2).contiguous().cpu().numpy())

    def call() -> Any:
        for t in images:
            published.fourier(t)
        return published.mean_at_locations(*ready)

    return call


def _dft(samples: int, channels: int, side: int, source: str, **flags: bool) -> Case:
    rivals = [
        Contestant(
            f"reference repaired, numpy (a {PART}th, extrapolated)",
            part_of_reference,
            REFERENCE,
            reference=_exact_places,
            tensors=_of_numpy,
            share=1 / PART,
        ),
        Contestant("rfft2, batched Gram + eigh, complex64", half_plane(torch.float32), Tolerance(1e-4, 0.0)),
        Contestant("rfft2, batched Gram + eigh, complex128", half_plane(torch.float64)),
    ]
    return Case(
        family=FAMILY,
        op="dft_cca",
        label=f"{samples}x{channels}x{side}x{side}",
        problem=functools.partial(Images, samples, channels, side),
        reference=exact_frequencies,
        ours=Contestant("fourfold", lambda p, state: lambda: ff.dft_cca(p.x, p.y, reduce=None)),
        rivals=tuple(rivals),
        tolerance=HIGH,
        state="heap",
        handles=(side**2, "frequencies"),
        source=source,
        **flags,
    )


def _mean_over_frequencies(x: Tensor, y: Tensor) -> Tensor:
    """By QR, every frequency as it comes."""
    spectra = (torch.fft.fft2(t - t.mean(0)).flatten(2).permute(2, 0, 1) for t in (x, y))
    bases = [torch.linalg.qr(t)[0] for t in spectra]
    return torch.linalg.svdvals(bases[0].mH @ bases[1]).mean()


def _dft_loss(samples: int, channels: int, side: int, source: str) -> Case:
    def exact(p: Images) -> list[Tensor]:
        x, y = (t.detach().double().requires_grad_() for t in (p.x, p.y))
        value = _mean_over_frequencies(x, y)
        return [value.detach(), *torch.autograd.grad(value, [x, y])]

    def ours(p: Images, state: str) -> Call:
        x, y = (t.detach().requires_grad_() for t in (p.x, p.y))
        return with_backward(lambda: ff.dft_cca(x, y), [x, y], [p.one])

    def plain(p: Images, state: str) -> Call:
        x, y = (t.detach().requires_grad_() for t in (p.x, p.y))
        return with_backward(lambda: _mean_over_frequencies(x.double(), y.double()), [x, y], [p.one])

    case = _dft(samples, channels, side, source)
    return dataclasses.replace(
        case,
        label=f"{case.label}, forward and backward",
        reference=exact,
        ours=Contestant("fourfold", ours),
        rivals=(Contestant("autograd through fft2 and batched QR, complex128", plain),),
        held=lambda p: [p.x, p.y],
        tolerance=GRADIENT,
    )


# --- call overhead --------------------------------------------------------------------------------------------------------

TINY = shapes.Pair(4, 64, "so small that only the call costs")


def _overheads() -> Iterator[Case]:
    given: dict[str, Any] = {"rivals": (), "quick": True, "overhead": True, "handles": None}
    entries: list[tuple[str, Callable[[Pair], Tensor]]] = [
        ("cca", exact_cca),
        ("svcca", exact_svcca),
        ("pwcca", exact_pwcca),
        ("cka", exactly(cka_of_features)),
        ("procrustes", exactly(procrustes_of_features)),
        ("rv", exactly(cka_of_features)),
    ]
    for op, reference in entries:
        tensors = correlations if op in {"cca", "svcca"} else None
        ours = Contestant("fourfold", functools.partial(_call_of, op), tensors=tensors)
        yield _pair_case(op, TINY, reference=reference, ours=ours, **given)
    yield Case(
        family=FAMILY,
        op="dft_cca",
        label="64x4x2x2",
        problem=functools.partial(Images, 64, 4, 2),
        reference=exact_frequencies,
        ours=Contestant("fourfold", lambda p, state: lambda: ff.dft_cca(p.x, p.y, reduce=None)),
        tolerance=HIGH,
        state="heap",
        source=TINY.source,
        **given,
    )
    yield Case(
        family=FAMILY,
        op="cka_matrix",
        label="2 layers, 4x64",
        problem=functools.partial(Layers, 2, 64, 4),
        reference=lambda p: every_pair(p.layers, torch.float64),
        ours=Contestant("fourfold", lambda p, state: lambda: ff.cka_matrix(dict(enumerate(p.layers)), unbiased=True).matrix),
        tolerance=HIGH,
        state="heap",
        source=TINY.source,
        **given,
    )


def _call_of(op: str, p: Pair, state: str) -> Call:
    return lambda: getattr(ff, op)(p.x, p.y)


# --- what the harness asks for --------------------------------------------------------------------------------------------


def cases(settings: Settings) -> Iterator[Case]:
    if settings.random_shapes:
        for place in shapes.random_pairs(settings.seed):
            yield _cca(settings, place, quick=True)
            yield _svcca(settings, place, quick=True)
        return
    yield from _overheads()
    for place in shapes.PAIRS:
        narrow = place == shapes.NARROW_PAIR
        yield _cca(settings, place, quick=narrow or place == shapes.PAIR)
        yield _cca_fast(place, quick=narrow)
        yield _svcca(settings, place, quick=narrow)
        yield _pwcca(settings, place, quick=narrow)
    for place in (shapes.NARROW_PAIR, shapes.PAIR):
        narrow = place == shapes.NARROW_PAIR
        yield _cka(settings, place._replace(samples=min(place.samples, 4000)), quick=narrow)
        yield _cka_unbiased(place._replace(samples=1000 if narrow else 2000), quick=narrow)
        for op in ("procrustes", "rv"):
            yield _features(settings, op, place, quick=narrow)
        for op in LOSSES:
            yield _loss(op, place, quick=narrow and op in {"cca", "cka"})
    yield _cka_rbf(shapes.NARROW_PAIR._replace(samples=500), quick=True)
    yield _cka_rbf(shapes.PAIR._replace(samples=5000))
    for precision in ("fast", "high"):
        yield _all_cka(settings, 4, 64, 512, precision, quick=True)
        yield _all_cka(settings, 12, 128, 8192, precision)
    yield _all_cka_training(settings, 4, 128, 2048)
    yield in_fresh_memory(_all_cka(settings, 12, 128, 8192))
    yield in_fresh_memory(_cca(settings, shapes.PAIR))
    yield in_fresh_memory(_svcca(settings, shapes.PAIR))
    yield in_fresh_memory(_pwcca(settings, shapes.PAIR))
    yield in_fresh_memory(_cka(settings, shapes.PAIR._replace(samples=4000)))
    for op in ("procrustes", "rv"):
        yield in_fresh_memory(_features(settings, op, shapes.PAIR))
    yield _dft(400, 16, 8, "small maps", quick=True)
    yield _dft_loss(400, 16, 8, "small maps, as a loss")
    yield in_fresh_memory(_dft(2000, 64, 16, "a CIFAR network's middle layers on 2000 images"))
    yield _dft(2000, 64, 32, "a CIFAR network's first layers on 2000 images")


def test_speed(case: Case, threads: int, race: Callable[[Case, int], None]) -> None:
    race(case, threads)
