"""Lottery tickets on digits (Frankle and Carbin, 2019, arXiv 1803.03635; Zhou et al., 2019, arXiv 1905.01067).

python examples/lottery_ticket_digits.py [--rounds 15] [--seed 0] [--quick]. Needs scikit-learn; shows a bar with tqdm.

1. What a mask alone is worth: weights before training, masked by what training made of them. Nothing is trained under the mask.
2. The ticket: train, drop a fifth of the weights that are left, put the others back to their first values, and again. Beside it
   networks masked in the same way whose weights are drawn anew each time, as torch.nn.Linear draws them.
"""

import argparse
import copy
import math
from itertools import pairwise

import fourfold as ff
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SIZES = (64, 300, 100, 10)
CRITERIA = (
    "large_final_same_sign", "large_final", "large_final_diff_sign", "magnitude_increase", "movement",
    "large_init_large_final", "large_init", "small_init", "small_init_small_final", "small_final", "random",
)  # fmt: skip


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 64] and labels [n] to train on, and to test on."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    seen, tested = train_test_split(range(len(images)), test_size=0.3, random_state=0, stratify=data.target)
    return images[seen], labels[seen], images[tested], labels[tested]


def build() -> nn.Sequential:
    """Weights of one magnitude per layer and random sign (Zhou et al.'s signed constant)."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        linear = nn.Linear(inputs, outputs, bias=False)
        linear.weight.data = linear.weight.data.sign() * math.sqrt(2 / (inputs + outputs))
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
    net.train()
    for _ in range(epochs):
        for some in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(net(images[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (net.eval()(images).argmax(1) == labels).float().mean().item()


def masked(untrained: nn.Sequential, trained: nn.Sequential, criterion: str, density: float, seed: int = 0) -> nn.Sequential:
    """The untrained network, masked by what training did to it."""
    net = copy.deepcopy(untrained)
    for i, (before, after) in enumerate(zip(untrained, trained, strict=True)):
        if isinstance(before, nn.Linear):
            option = {"seed": seed + i} if criterion == "random" else {}
            mask = ff.mask_from_criterion(before.weight, after.weight, criterion, density, **option)
            net[i] = ff.nn.MaskedLinear.from_linear(net[i], mask)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two rounds of few epochs: shows that it runs")
    args = parser.parse_args()
    rounds, epochs = (2, 3) if args.quick else (args.rounds, 50)
    images, labels, *tested = digits()

    torch.manual_seed(args.seed)
    untrained = build()
    trained = copy.deepcopy(untrained)
    train(trained, images, labels, epochs)
    print(f"test digits right: untrained {accuracy(untrained, *tested):.1%}, trained {accuracy(trained, *tested):.1%}\n")
    print(f"{'mask on the untrained network':<32}{'70% kept':>10}{'50% kept':>10}{'30% kept':>10}")
    for criterion in CRITERIA:
        shares = (accuracy(masked(untrained, trained, criterion, density), *tested) for density in (0.7, 0.5, 0.3))
        print(f"{criterion:<32}" + "".join(f"{share:>10.1%}" for share in shares))

    def train_ticket(net: nn.Module) -> float:
        train(net, images, labels, max(1, epochs // 5))
        return accuracy(net, *tested)

    rates = {"0": 0.2, "2": 0.2, "4": 0.1}  # by layer; the last one at half the rate, as in the paper
    history = {}
    for rewind in ("init", "reinit"):
        torch.manual_seed(args.seed)
        _, history[rewind] = ff.prune_and_rewind(
            untrained, train_ticket, rounds=rounds, rate=rates, criterion="large_final", rewind=rewind
        )
    print(f"\n{'weights kept':>12}{'rewound':>10}{'drawn anew':>12}")
    for ours, anew in zip(history["init"], history["reinit"], strict=True):
        print(f"{ours.density:>12.1%}{ours.result:>10.1%}{anew.result:>12.1%}")


if __name__ == "__main__":
    main()
