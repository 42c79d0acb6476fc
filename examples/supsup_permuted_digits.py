"""One frozen network, a mask per task, and the task found out from the data (Wortsman et al., 2020, arXiv 2006.14769).

python examples/supsup_permuted_digits.py [--tasks 20] [--epochs 5] [--seed 0] [--quick]. Needs scikit-learn and tqdm.

A task is scikit-learn's digits with their 64 pixels in an order of its own. The network 64-400-400-100 has random weights that
are never trained; a task is a mask that keeps a fifth of them: one bit per weight. Nothing is forgotten, because nothing that
changes is shared. Which task a batch belongs to is told by the entropy of the output of all masks mixed: by the mask along
which it falls fastest. The 90 outputs that no class needs make that sharper.
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
from tqdm import tqdm

SIZES = (64, 400, 400, 100)
DENSITY = 0.2
BATCH = 64


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 64], centred, and labels [n] to train on, and to test on."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    seen, tested = train_test_split(range(len(images)), test_size=0.3, random_state=0, stratify=data.target)
    images = (images - images[seen].mean(0)) / images[seen].std()
    return images[seen], labels[seen], images[tested], labels[tested]


class Net(nn.Module):
    """Linear layers with ReLU between them, which know their task or don't."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *task: int | Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x, *task))
        return self.layers[-1](x, *task)


def frozen_layers() -> list[nn.Linear]:
    """Random signs times one magnitude per layer, small enough for a network that mixes all masks to be unsure."""
    layers = [nn.Linear(*sizes, bias=False) for sizes in pairwise(SIZES)]
    for layer in layers:
        layer.weight.data = layer.weight.data.sign() * 0.8 * math.sqrt(2 / layer.in_features)
    return layers


def learned(layers: list[nn.Linear], images: Tensor, labels: Tensor, epochs: int) -> Net:
    """The frozen layers under masks that were learned for one task."""
    net = Net([ff.nn.SupermaskLinear.from_linear(layer, sampler="topk", density=DENSITY) for layer in layers])
    optimizer = torch.optim.Adam([layer.scores for layer in net.layers], lr=0.03)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=epochs * (len(images) // BATCH))
    for _ in range(epochs):
        for some in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(net(images[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def learn_task(bank: Net, net: Net) -> None:
    """Keeps a task's masks."""
    for layer, of_task in zip(bank.layers, net.layers, strict=True):
        layer.add_task(of_task.make_mask())


@torch.no_grad()
def accuracy(net: Net, images: Tensor, labels: Tensor, *task: int) -> float:
    return (net(images, *task).argmax(1) == labels).float().mean().item()


def inferred(bank: Net, orders: list[Tensor], images: Tensor, batch: int, batches: int, method: str = "oneshot") -> float:
    """The share of batches, of each task equally many, whose task is found."""
    right = 0
    for task, order in enumerate(orders):
        for some in torch.randperm(len(images))[: batch * batches].split(batch):
            right += ff.infer_task(bank, images[some][:, order], method=method) == task
    return right / (len(orders) * batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three tasks of one epoch: shows that it runs, not what it learns")
    args = parser.parse_args()
    tasks, epochs = (3, 1) if args.quick else (args.tasks, args.epochs)
    torch.manual_seed(args.seed)
    images, labels, test_images, test_labels = digits()

    layers = frozen_layers()
    bank = Net([ff.nn.SuperposedLinear.from_linear(layer) for layer in layers])
    orders, alone, start = [], [], time.perf_counter()
    for _ in tqdm(range(tasks), desc="tasks", disable=None):
        order = torch.randperm(64)
        net = learned(layers, images[:, order], labels, epochs)
        learn_task(bank, net)
        orders.append(order)
        alone.append(net)
    print(f"{tasks} tasks learned in {time.perf_counter() - start:.1f} s")

    right = [accuracy(bank, test_images[:, order], test_labels, task) for task, order in enumerate(orders)]
    same = all(
        torch.equal(bank(test_images[:, order], task), net(test_images[:, order]))
        for task, (order, net) in enumerate(zip(orders, alone, strict=True))
    )
    size = sum(layer.mask_bits[0].numel() for layer in bank.layers)
    print(f"test digits right: {sum(right) / tasks:.1%} on average, {min(right):.1%} at worst")
    print(f"outputs have the same bits as of the mask alone: {same}")
    print(f"a task takes {size} bytes; its weights would take {4 * sum(layer.weight.numel() for layer in layers)}")
    print("task found, by size of the batch:")
    for batch in (1, 4, 16):
        shares = (f"{method} {inferred(bank, orders, test_images, batch, 10, method):.1%}" for method in ("oneshot", "binary"))
        print(f"{batch:>4}: " + ", ".join(shares))


if __name__ == "__main__":
    main()
