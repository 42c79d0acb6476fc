"""What the SVCCA paper (Raghu et al., 2017, arXiv 1706.05806) shows, small enough for every run."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from fourfold.ops.cca import cca, svcca
from fourfold.ops.cca_dft import dft_cca
from fourfold.reference import cca as reference
from torch import Tensor, nn

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---- (i) affine invariance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_affine_maps_change_no_correlation(seed):
    """Any invertible ones."""
    x, noise = randn(1000, 24, seed=seed), randn(1000, 32, seed=seed + 10)
    y = x @ randn(24, 32, seed=seed + 20) + 4 * noise
    mapped_x = x @ randn(24, 24, seed=seed + 30) + 100 * randn(24, seed=seed + 40)
    mapped_y = y @ randn(32, 32, seed=seed + 50) - 3
    expected = cca(x, y).rho
    assert expected.min() > 0.05 and expected.max() < 0.999
    torch.testing.assert_close(cca(mapped_x, mapped_y).rho, expected, rtol=0, atol=1e-6)


# ---- (ii) why the singular value step --------------------------------------------------------------------------------


def shared_and_own(size: float) -> tuple[Tensor, Tensor]:
    """Two layers [n, 200], each with 50 directions of both and 150 of its own of this size, turned so that every neuron has
    some of all."""
    shared = randn(2000, 50)
    turns = [torch.linalg.qr(randn(200, 200, seed=seed))[0] for seed in (1, 2)]
    own = [size * randn(2000, 150, seed=seed) for seed in (3, 4)]
    return tuple(torch.cat([shared, o], 1) @ turn for o, turn in zip(own, turns, strict=True))


def test_svcca_tells_noise_from_signal_where_cca_does_not():
    """50 shared and 150 faint directions, or 50 shared and 150 useful ones: CCA finds 50 in common either way."""
    noisy, useful = shared_and_own(0.01), shared_and_own(1.0)
    of_noisy, of_useful = cca(*noisy), cca(*useful)
    torch.testing.assert_close(of_noisy.rho, of_useful.rho, rtol=0, atol=1e-9)
    assert of_noisy.rho[49] > 1 - 1e-9
    assert of_noisy.rho[50] < 0.6  # what 150 dimensions of 2000 samples reach by chance
    cut_noisy, cut_useful = svcca(*noisy), svcca(*useful)
    assert (cut_noisy.rank_x, cut_noisy.rank_y) == (50, 50)
    assert min(cut_useful.rank_x, cut_useful.rank_y) > 190
    assert cut_noisy.mean > 0.999
    assert cut_useful.mean < 0.5


# ---- (iii) the DFT of what is translation invariant ------------------------------------------------------------------


def all_translates(images: Tensor) -> Tensor:
    """[n, c, 8, 8] -> [64 n, c, 8, 8]."""
    return torch.cat([images.roll((i, j), (2, 3)) for i in range(8) for j in range(8)])


class Circular(nn.Module):
    """Two circular convolutions, and what else moves with its input: a nonlinearity, a pooling that keeps the size."""

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular", dtype=F64)
        self.second = nn.Conv2d(6, channels, 5, padding=2, padding_mode="circular", dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, stride=1)
        return self.second(x)


def layers(n: int) -> tuple[Tensor, Tensor]:
    x = all_translates(randn(n, 2, 8, 8))
    with torch.no_grad():
        return Circular(2, 0)(x), Circular(1, 1)(x)


def block_parts(layer: Tensor, keep: slice) -> tuple[float, float]:
    """Of the covariance of all channels at all frequencies: the largest entry within a frequency, and between two."""
    z = torch.fft.fft2(layer - layer.mean(0), norm="ortho")[keep]
    z = z.permute(0, 2, 3, 1).flatten(1)  # frequency-major
    covariance = (z.mH @ z).abs() / len(z)
    within = torch.block_diag(*[torch.ones(layer.shape[1], layer.shape[1])] * 64).bool()
    return covariance[within].max().item(), covariance[~within].max().item()


def test_covariance_of_the_dft_is_block_diagonal():
    """To 1e-12, over all 64 translates; not over fewer."""
    for layer in layers(3):
        within, between = block_parts(layer, slice(None))
        assert between <= 1e-12 * within
        within, between = block_parts(layer, slice(64 * 3 // 2))
        assert between > 1e-2 * within


def test_dft_cca_is_the_cca_of_all_pixels():
    """And 64 problems of 2 x 1 channels stand for one of 128 x 64."""
    x, y = layers(20)
    full, blocks = cca(x.flatten(1), y.flatten(1)), dft_cca(x, y, reduce=None)
    assert (full.rank_x, full.rank_y) == (128, 64)
    # With one channel in y there is one correlation per frequency: they are those of the whole.
    torch.testing.assert_close(blocks.flatten().sort(descending=True).values, full.rho, rtol=0, atol=1e-9)
    torch.testing.assert_close(dft_cca(x, y), full.mean, rtol=0, atol=1e-12)
    assert 0.1 < full.mean < 0.9
    # Images that aren't translation invariant have more in common than each frequency knows.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few samples are the point
        assert abs(dft_cca(x[:400], y[:400]) - cca(x[:400].flatten(1), y[:400].flatten(1)).mean) > 0.01


# ---- (iv) few directions suffice -------------------------------------------------------------------------------------


def target(x: Tensor) -> Tensor:
    return torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:]) + torch.tanh(x[:, :1] * x[:, 1:])


def trained(seed: int, x: Tensor) -> nn.Sequential:
    """Four hidden layers, the last of 200 neurons."""
    torch.manual_seed(seed)
    widths = (2, 64, 64, 64, 200)
    hidden = [part for i in range(4) for part in (nn.Linear(widths[i], widths[i + 1]), nn.ReLU())]
    net = nn.Sequential(*hidden, nn.Linear(200, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(100):
        loss = F.mse_loss(net(x), target(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * target(x).var()
    return net


def test_30_of_200_directions_give_the_whole_output():
    """Of a toy regression, projected on the directions of the last hidden layer that a net of another seed has too."""
    torch.set_num_threads(1)
    seen, tested = randn(2000, 2).float(), randn(2000, 2, seed=1).float()
    nets = [trained(seed, seen) for seed in range(2)]
    with torch.no_grad():
        x, y = (net[:-1](tested) for net in nets)
    centred, weight = reference.centre(x), nets[0][-1].weight.detach().double()
    output = centred @ weight.T

    def explained(directions: Tensor) -> float:
        """R² of the output when the layer keeps only these orthonormal combinations of samples."""
        projected = directions @ (directions.T @ centred)
        return float(1 - (projected @ weight.T - output).square().sum() / output.square().sum())

    def variates(variance: float) -> tuple[Tensor, Tensor]:
        """Those of x, the most correlated first."""
        (qx, _), (qy, _) = (reference.basis(reference.centre(t), None, variance) for t in (x, y))
        u, rho, _ = torch.linalg.svd(qx.T @ qy, full_matrices=False)
        return qx @ u, rho

    result = svcca(x, y)
    directions, rho = variates(0.99)
    torch.testing.assert_close(result.rho, rho, rtol=0, atol=1e-9)
    assert directions.shape[1] == min(result.rank_x, result.rank_y) < 30
    assert explained(directions) >= 0.99

    directions, rho = variates(1.0)
    torch.testing.assert_close(cca(x, y).rho, rho, rtol=0, atol=1e-6)
    assert len(rho) > 100
    assert explained(directions[:, :30]) >= 0.99
    assert explained(directions[:, :2]) < 0.5
    turned = directions @ torch.linalg.qr(randn(len(rho), len(rho)))[0]
    assert explained(turned[:, :30]) < 0.5
