"""What the SVCCA paper says, in examples/svcca_paper.py and examples/cca_convergence_digits.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    return example("svcca_paper")


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    pytest.importorskip("sklearn", reason="needs scikit-learn; run: pip install scikit-learn")
    return example("cca_convergence_digits")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine two mostly wait for each other
    yield
    torch.set_num_threads(before)


# ---- the paper's claims ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("claim", ["invariance", "50 of 200", "theorem"])
def test_claim(paper, claim, seed):
    passed, found = paper.CLAIMS[claim](seed)
    assert passed, found


def test_regression_with_few_directions(paper):
    passed, found = paper.regression(0, steps=200, n=2500)
    assert passed, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_regression_with_few_directions_for_every_seed(paper, seed):
    passed, found = paper.regression(seed)
    assert passed, found


def test_noise_is_the_same_data_made_small(paper):
    """So that CCA cannot but give the same."""
    strong, weak = paper.two_layers(0, 1.0, n=500), paper.two_layers(0, 0.01, n=500)
    for a, b in zip(strong, weak, strict=True):
        assert torch.linalg.matrix_rank(torch.cat([a, b], 1).double(), rtol=1e-5) == 200
        assert b.var(0).sum() < 0.3 * a.var(0).sum()


def test_translates_are_all_of_them(paper):
    image = torch.arange(6.0).view(1, 1, 2, 3)
    found = paper.translates(image)
    assert found.shape == (6, 1, 2, 3)
    assert sorted(found[:, 0, 0, 0].tolist()) == list(range(6)) and len(found.unique(dim=0)) == 6


def test_covariance_between_frequencies_is_found(paper):
    """Of images whose first frequencies say the same, as translates don't."""
    torch.manual_seed(0)
    x = torch.randn(4000, 1, 1, 4, dtype=torch.float64)
    waves = x[..., :1] * (1 + torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64))
    assert paper.off_block(x, x) < 0.1 and paper.off_block(waves, waves) > 0.9


# ---- convergence -----------------------------------------------------------------------------------------------------


def test_when_a_curve_stays_above(digits):
    curves = torch.tensor([[0.0, 0.5, 0.2], [0.8, 0.95, 0.9], [0.6, 0.97, 0.95], [1.0, 1.0, 1.0]])
    level = torch.tensor([0.7, 0.5, 0.9])
    assert digits.converged([0, 10, 20, 40], curves, level).tolist() == pytest.approx([25, 0, 10])


def test_pairs_in_order(digits):
    assert digits.in_order(torch.tensor([1.0, 2, 3, 4, 0])) == 3
    assert digits.in_order(torch.tensor([2.0, 1, 3, 3, 9])) == 1


def test_training_converges_from_the_bottom_up(digits, tmp_path):
    pytest.importorskip("matplotlib", reason="draws; run: pip install matplotlib")
    images, labels, *tested = digits.digits()
    matrices = []
    for seed in range(2):
        torch.manual_seed(seed)
        snapshots = digits.train(digits.build(), images, labels, steps=160, every=10)
        matrices.append(digits.similarities(snapshots, images[:600]))
    *_, trained = snapshots.values()
    assert digits.accuracy(trained, *tested) > 0.9

    both = torch.stack(matrices)
    curves = both.mean(0).diagonal(dim1=1, dim2=2)
    when = digits.converged(list(snapshots), curves, torch.full((digits.DEPTH + 1,), 0.9))
    assert digits.in_order(when) == digits.DEPTH - 1, when
    assert torch.allclose(curves[-1], torch.ones_like(curves[-1]))

    picture = tmp_path / "convergence.png"
    digits.draw(list(snapshots), both, 0.9, picture)
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(header[16:20], "big") > 1000


@pytest.mark.slow
def test_example_says_bottom_up(digits, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cca_convergence_digits.py"])
    digits.main()
    assert "by the mean's, bottom-up" in capsys.readouterr().out
