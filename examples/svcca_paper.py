"""What the SVCCA paper says of its method, on data made here (Raghu et al., 2017, arXiv 1706.05806).

python examples/svcca_paper.py [--quick]. Seeds 0 to 4, with --quick 0 alone. Prints a verdict per claim.

invariance  Canonical correlations do not change under invertible affine maps of either layer.
50 of 200   Two layers share 50 directions, and have 150 of their own: as strong, or a hundredth of that, like noise. CCA
            cannot tell these cases apart. SVCCA can: it leaves the noise out.
regression  Two networks learn one function from different starts. Of the last hidden layer's 200 neurons, 30 SVCCA directions
            carry the output.
theorem     Circular convolutions of all translates of some images: the covariance of the channels' DFTs has a c x c block for
            each frequency, and zeros elsewhere. So many small CCAs, dft_cca, give what one large CCA gives.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from itertools import pairwise

import fourfold as ff
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- invariance ------------------------------------------------------------------------------------------------------


def invariance(seed: int, n: int = 4000, d: int = 48) -> tuple[bool, str]:
    """Largest change of a rho under random invertible maps and shifts of both layers."""
    torch.manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64)
    y = x[:, :32] @ torch.randn(32, 32, dtype=torch.float64) + torch.randn(n, 32, dtype=torch.float64)

    def mapped(z: Tensor) -> Tensor:
        return z @ torch.randn(z.shape[1], z.shape[1], dtype=z.dtype) + 10 * torch.randn(z.shape[1], dtype=z.dtype)

    before, after = ff.cca(x, y).rho, ff.cca(mapped(x), mapped(y)).rho
    change = (after - before).abs().max().item()
    return change <= 1e-6, f"rho from {before[-1]:.2f} to {before[0]:.2f}; changed by at most {change:.0e}"


# ---- 50 shared directions of 200 -------------------------------------------------------------------------------------


def two_layers(seed: int, noise: float, n: int = 10_000) -> tuple[Tensor, Tensor]:
    """[n, 200] each, neurons that mix 50 shared directions of size 1 and 150 of their own, of size `noise`."""
    torch.manual_seed(seed)
    shared, *own = torch.randn(n, 50), torch.randn(n, 150), torch.randn(n, 150)
    mixing = [torch.linalg.qr(torch.randn(200, 200)).Q for _ in own]
    x, y = (torch.cat([shared, noise * part], 1) @ q for part, q in zip(own, mixing, strict=True))
    return x, y


def shared_directions(seed: int) -> tuple[bool, str]:
    """CCA's and SVCCA's means where the 150 other directions are strong, and where they are weak."""
    strong, weak = two_layers(seed, 1.0), two_layers(seed, 0.01)
    plain = [ff.cca(*layers) for layers in (strong, weak)]
    cut = [ff.svcca(*layers) for layers in (strong, weak)]
    ones = [int((result.rho > 0.999).sum()) for result in plain]
    difference = (plain[0].mean - plain[1].mean).abs().item()
    passed = ones == [50, 50] and difference <= 1e-5 and cut[1].rank_x == 50 and float(cut[1]) > 0.999 and float(cut[0]) < 0.5
    by_cca = f"CCA {float(plain[0]):.4f} and {float(plain[1]):.4f}, {ones[0]} and {ones[1]} ones"
    by_svcca = f"SVCCA {float(cut[0]):.4f} and {float(cut[1]):.4f}, of {cut[0].rank_x} and {cut[1].rank_x} directions"
    return passed, f"{by_cca}; {by_svcca}"


# ---- a toy regression ------------------------------------------------------------------------------------------------


def target(x: Tensor) -> Tensor:
    """[n, 3] to [n, 1]: 40 waves, the same ones for every seed."""
    same = torch.Generator().manual_seed(0)
    waves, phases, sizes = (torch.randn(shape, generator=same).to(x.dtype) for shape in ((3, 40), (40,), (40, 1)))
    return torch.sin(2 * x @ waves + phases) @ sizes / 40**0.5


@torch.enable_grad()
def trained(seed: int, steps: int) -> nn.Sequential:
    """Four hidden layers of 200; float64 from then on."""
    torch.manual_seed(seed)
    widths = (3, 200, 200, 200, 200)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(200, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.002)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = 2 * torch.rand(256, 3) - 1
        optimizer.zero_grad()
        F.mse_loss(net(x), target(x)).backward()
        optimizer.step()
        schedule.step()
    return net.double()


def directions(x: Tensor, y: Tensor, variance: float = 0.999) -> Tensor:
    """SVCCA directions of x's layer, best first, as [n, k] with orthonormal columns: what x's neurons say that y's say, too.

    Each layer [n, d] is cut to that share of its variance, which the functions of the paper's authors leave to their caller.
    99% would leave fewer than 30 directions here.
    """
    cut = []
    for z in (x, y):
        u, s, _ = torch.linalg.svd(z - z.mean(0), full_matrices=False)
        k = int((s.square().cumsum(0) < variance * s.square().sum()).sum()) + 1
        cut.append((u[:, :k] * s[:k]).T.numpy())
    result = ff.compat.svcca.get_cca_similarity(*cut, compute_dirns=True, verbose=False)
    variates = torch.from_numpy(result["cca_dirns1"]).T  # [n, k]
    return torch.linalg.qr(variates - variates.mean(0)).Q


@torch.no_grad()
def regression(seed: int, steps: int = 400, n: int = 4000) -> tuple[bool, str]:
    """R2 of the output from projected neurons with the output from all, by the number of directions they are projected on.

    And with the 30 neurons of the largest activations alone, the others at their means.
    """
    one, other = trained(seed, steps), trained(seed + 100, steps)
    torch.manual_seed(seed)
    x = 2 * torch.rand(n, 3, dtype=torch.float64) - 1
    hidden, rival = (net[:-1](x) for net in (one, other))
    basis, head, mean = directions(hidden, rival), one[-1], hidden.mean(0)
    shares = {}
    for k in (2, 6, 15, 30):
        some = basis[:, :k]
        projected = mean + some @ (some.T @ (hidden - mean))
        shares[k] = r2(head(projected), head(hidden))
    largest = hidden.amax(0).argsort(descending=True)[:30]
    alone = r2(head(mean.expand_as(hidden).index_copy(1, largest, hidden[:, largest])), head(hidden))
    listed = ", ".join(f"{k}: {share:.4f}" for k, share in shares.items())
    found = f"R2 of the full output by directions, of {basis.shape[1]}: {listed}; by the 30 largest neurons {alone:.2f}"
    return basis.shape[1] >= 30 and shares[30] >= 0.99, f"{found}; R2 of the task {r2(head(hidden), target(x)):.4f}"


def r2(found: Tensor, wanted: Tensor) -> float:
    """The share of the variance that is explained."""
    return 1 - (F.mse_loss(found, wanted) / wanted.var(correction=0)).item()


# ---- the theorem -----------------------------------------------------------------------------------------------------


def translates(images: Tensor) -> Tensor:
    """[m, c, h, w] to [m * h * w, c, h, w]."""
    h, w = images.shape[2:]
    return torch.cat([images.roll((i, j), (2, 3)) for i in range(h) for j in range(w)])


def layers(seed: int, padding_mode: str, m: int = 45, c: int = 4) -> list[Tensor]:
    """What the first and the second layer of a random network make of all 64 translates of m images of 8 x 8."""
    torch.manual_seed(seed)
    x, found = translates(torch.randn(m, 3, 8, 8, dtype=torch.float64)), []
    for inputs in (3, c):
        x = nn.Conv2d(inputs, c, 3, padding=1, padding_mode=padding_mode, dtype=torch.float64)(x).relu()
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), mode="circular"), 2, stride=1)  # circular, too
        found.append(x)
    return found


def off_block(x: Tensor, y: Tensor) -> float:
    """Of the covariance of the DFTs of x and y: its largest entry between frequencies over its largest within one."""
    fx, fy = (torch.fft.fft2(z - z.mean(0), norm="ortho").permute(2, 3, 1, 0).flatten(0, 1) for z in (x, y))  # [hw, c, n]
    covariance = torch.einsum("fan,gbn->fgab", fx, fy.conj()).abs()
    within = torch.eye(len(fx), dtype=torch.bool)
    return (covariance[~within].max() / covariance[within].max()).item()


@torch.no_grad()
def theorem(seed: int) -> tuple[bool, str]:
    """With circular padding; and with zeros at the border, where it does not hold."""
    x, y = layers(seed, "circular")
    outside = max(off_block(x, x), off_block(x, y), off_block(y, y))
    full, small = float(ff.cca(x.flatten(1), y.flatten(1))), float(ff.dft_cca(x, y))
    x, y = layers(seed, "zeros")
    broken = off_block(x, y)
    passed = outside <= 1e-12 and abs(full - small) <= 1e-9 and broken > 1e-3
    return passed, (
        f"between frequencies {outside:.0e}, with zero padding {broken:.0e}; one CCA {full:.6f}, 64 small ones {small:.6f}, "
        f"apart by {abs(full - small):.0e}"
    )


CLAIMS: dict[str, Callable[[int], tuple[bool, str]]] = {
    "invariance": invariance,
    "50 of 200": shared_directions,
    "regression": regression,
    "theorem": theorem,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, and a shorter training")
    args = parser.parse_args()
    seeds = range(1 if args.quick else 5)
    warnings.simplefilter("error")  # too few samples, say
    for name, claim in CLAIMS.items():
        start, held = time.perf_counter(), 0
        for seed in seeds:
            passed, found = regression(seed, 200, 2500) if args.quick and claim is regression else claim(seed)
            held += passed
            print(f"  seed {seed}  {found}", flush=True)
        verdict = "holds" if held == len(seeds) else "does not hold"
        print(f"{name}: {verdict}, {held} of {len(seeds)} seeds, {time.perf_counter() - start:.1f} s\n", flush=True)


if __name__ == "__main__":
    main()
