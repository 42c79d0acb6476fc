"""A network that is never trained, only masked, reads digits as well as a trained one (Zhou et al., 2019, arXiv 1905.01067).

python examples/supermask_digits.py [--seeds 5] [--epochs 50] [--quick]. Needs scikit-learn.

64-300-100-10 without biases, on scikit-learn's 8 x 8 digits. Training learns with which probability to keep each weight, and
nothing else. "signs": all weights of a layer have one magnitude and a random sign; "rescaled": times n / ones, so that dropping
weights doesn't make signals smaller.
"""

import argparse
import math
import time
from itertools import pairwise

import fourfold as ff
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SIZES = (64, 300, 100, 10)
EPOCHS = 50
BATCH = 64


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 64] and labels [n] to train on, and to test on."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    seen, tested = train_test_split(range(len(images)), test_size=0.3, random_state=0, stratify=data.target)
    return images[seen], labels[seen], images[tested], labels[tested]


def plain_net(constant: bool = False) -> nn.Sequential:
    """Normal weights that keep the variance forth and back (Glorot and Bengio, 2010), or their signs times one magnitude."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        linear, scale = nn.Linear(inputs, outputs, bias=False), math.sqrt(2 / (inputs + outputs))
        nn.init.normal_(linear.weight, std=scale)
        if constant:
            linear.weight.data = linear.weight.data.sign() * scale
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def supermask_net(constant: bool = True, rescale: str | None = "dwr") -> nn.Sequential:
    """The same with frozen weights and scores, which begin at 0: each weight is kept with probability 1/2."""
    net = plain_net(constant)
    for i, layer in enumerate(net):
        if isinstance(layer, nn.Linear):
            net[i] = ff.nn.SupermaskLinear.from_linear(layer, rescale=rescale)
            nn.init.zeros_(net[i].scores)
    return net


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int = EPOCHS) -> None:
    """What requires a gradient: weights, or scores, whose sigmoids move slowly at a small rate."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    masked = any(isinstance(layer, ff.nn.SupermaskLinear) for layer in net.modules())
    rate = 0.2 if masked else 0.003
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * (len(images) // BATCH))
    net.train()
    for _ in range(epochs):
        for some in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(net(images[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In eval mode, where a mask keeps what is likelier kept than not."""
    return (net.eval()(images).argmax(1) == labels).float().mean().item()


NETS = {
    "trained weights": plain_net,
    "supermask: signs, rescaled": supermask_net,
    "supermask: signs": lambda: supermask_net(rescale=None),
    "supermask: rescaled": lambda: supermask_net(constant=False),
    "supermask": lambda: supermask_net(constant=False, rescale=None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs: shows that it runs, not what it learns")
    args = parser.parse_args()
    seeds, epochs = (1, 5) if args.quick else (args.seeds, args.epochs)

    images, labels, *tested = digits()
    print(f"{'':<30}{'test digits right':>20}{'weights kept':>15}{'seconds':>10}")
    for name, build in NETS.items():
        right, start = [], time.perf_counter()
        for seed in range(seeds):
            torch.manual_seed(seed)
            net = build()
            train(net, images, labels, epochs)
            right.append(accuracy(net, *tested))
        seconds = (time.perf_counter() - start) / seeds
        weights = torch.cat([layer.weight.flatten() for layer in net if isinstance(layer, nn.Linear)])
        if isinstance(net[0], ff.nn.SupermaskLinear):
            weights = torch.cat([layer.to_linear().weight.flatten() for layer in net if isinstance(layer, nn.Linear)])
        kept = (weights != 0).float().mean().item()
        print(f"{name:<30}{sum(right) / seeds:>20.1%}{kept:>15.0%}{seconds:>10.1f}", flush=True)
    compressed = nn.Sequential(*(layer.compress() if hasattr(layer, "compress") else layer for layer in net))
    print(f"\nThe last one, compressed:\n{compressed}")


if __name__ == "__main__":
    main()
