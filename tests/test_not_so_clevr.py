"""The paper's own test of CoordConv: examples/not_so_clevr.py is learned perfectly, and a rival without coordinates fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("tqdm", reason="the example needs tqdm; run: pip install tqdm")

_spec = importlib.util.spec_from_file_location("not_so_clevr", Path(__file__).parents[1] / "examples" / "not_so_clevr.py")
clevr = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(clevr)


def trained(task: str, split: str, *, rival: bool = False, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A network after the example's steps, and the centres to test it on."""
    torch.set_num_threads(1)  # on a busy machine two of them mostly wait for each other
    torch.manual_seed(seed)
    net, (seen, tested) = (clevr.rival_net if rival else clevr.coord_conv_net)(task), clevr.centres(split)
    clevr.train(task, net, seen, **(clevr.RIVAL_SETTINGS if rival else clevr.SETTINGS[task]))
    return net, tested


def test_splits_are_the_papers():
    every = {(i, j) for i in range(4, 60) for j in range(4, 60)}
    for split in clevr.SPLITS:
        seen, tested = (set(map(tuple, part.tolist())) for part in clevr.centres(split))
        assert seen | tested == every and not seen & tested
        if split == "quadrant":
            assert len(seen) == 2407 and tested == {(i, j) for i in range(33, 60) for j in range(33, 60)}
        else:
            assert 0.2 < len(tested) / len(every) < 0.3


def test_networks_have_the_papers_weights():
    def count(net: nn.Module) -> int:
        return sum(parameter.numel() for parameter in net.parameters())

    assert count(clevr.coord_conv_net("classification")) == 7553
    assert count(clevr.coord_conv_net("regression")) == 906
    assert all(count(clevr.rival_net(task)) > 10 * count(clevr.coord_conv_net(task)) for task in clevr.TASKS)


def test_regression_image_is_the_centre_alone():
    where = torch.tensor([[4, 59], [33, 7]])
    images = clevr.inputs("regression", where)
    assert torch.equal(images.flatten(1).argmax(1), where[:, 0] * 64 + where[:, 1]) and images.sum() == 2


@pytest.mark.parametrize("task", clevr.TASKS)
def test_coord_conv_is_perfect_on_the_unseen_quadrant(task):
    net, tested = trained(task, "quadrant")
    assert clevr.accuracy(task, net, tested) == 1.0
    # And it is the coordinates that do it.
    with torch.no_grad():
        net[0].coord_weight.zero_()
    assert clevr.accuracy(task, net, tested) < 0.01


@pytest.mark.parametrize("task", clevr.TASKS)
def test_rival_fails_on_the_unseen_quadrant(task):
    net, tested = trained(task, "quadrant", rival=True)
    assert clevr.accuracy(task, net, tested) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("split", clevr.SPLITS)
@pytest.mark.parametrize("task", clevr.TASKS)
def test_coord_conv_is_perfect_for_every_seed(task, split, seed):
    net, tested = trained(task, split, seed=seed)
    assert clevr.accuracy(task, net, tested) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("task", clevr.TASKS)
def test_rival_fails_on_the_uniform_split(task):
    net, tested = trained(task, "uniform", rival=True)
    assert clevr.accuracy(task, net, tested) < 0.9
