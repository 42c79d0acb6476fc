"""Digits in JPEG files, told apart by their coefficients: no pixel is ever decoded. Needs scikit-learn and pillow.

python examples/train_on_jpegs.py [--variant late_concat_rfa_thinner] [--size 32] [--epochs 5] [--seed 0] [--quick]

scikit-learn's 1797 digits, in ink and on paper of random colours, are written as 4:2:0 JPEG files into a folder per class. From
there on it is what one would do with any folder of photos: frequency_stats, DctDataset, a DataLoader, dct_resnet50. Five epochs
take about a minute on one core of a quiet machine, and get 95 % of the test digits right.
"""

import argparse
import tempfile
import time
from pathlib import Path

import fourfold as ff
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader


def write_files(root: Path, size: int, count: int, seed: int) -> None:
    """root/train/<digit>/<number>.jpg, and root/test/.. for three in ten."""
    digits, random = load_digits(), np.random.default_rng(seed)
    parts = train_test_split(np.arange(count), test_size=0.3, random_state=0, stratify=digits.target[:count])
    for part, numbers in zip(("train", "test"), parts, strict=True):
        for number in numbers:
            levels = Image.fromarray((digits.images[number] * (255 / 16)).astype(np.uint8)).resize((size, size))
            share = np.asarray(levels)[..., None] / 255
            paper, ink = random.uniform(0, 100, 3), random.uniform(130, 255, 3)
            folder = root / part / str(digits.target[number])
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((paper + share * (ink - paper)).astype(np.uint8))
            picture.save(folder / f"{number:04}.jpg", quality=90, subsampling="4:2:0")


def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """The share of the loader's images that the model gets right."""
    model.eval()
    with torch.no_grad():
        right = [model(y, cbcr).argmax(1) == target for y, cbcr, target in loader]
    return torch.cat(right).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=ff.models.VARIANTS, default="late_concat_rfa_thinner")
    parser.add_argument("--size", type=int, default=32, help="pixels of an image's side")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer images and epochs")
    args = parser.parse_args()
    epochs, count = (2, 300) if args.quick else (args.epochs, 1797)
    torch.manual_seed(args.seed)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_files(root, args.size, count, args.seed)
        files = sorted((root / "train").rglob("*.jpg"))
        size = sum(file.stat().st_size for file in files) / len(files)
        print(f"{count} files of {args.size} x {args.size} pixels, {size:.0f} bytes each")

        mean, std = ff.jpeg.frequency_stats(files, progress=False)
        data = {part: ff.jpeg.DctDataset.from_folder(root / part, mean=mean, std=std) for part in ("train", "test")}
        loaders = {
            part: DataLoader(data[part], 64, shuffle=part == "train", drop_last=part == "train", collate_fn=ff.jpeg.collate)
            for part in data
        }
        model = ff.models.dct_resnet50(args.variant, num_classes=10)
        for module in model.modules():
            if isinstance(module, ff.models.Bottleneck):
                nn.init.zeros_(module.bn3.weight)  # blocks begin as their shortcuts, which few images need
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * len(loaders["train"]))

        print("epoch  loss  test digits right  seconds")
        for epoch in range(1, epochs + 1):
            began, losses = time.perf_counter(), []
            model.train()
            for y, cbcr, target in loaders["train"]:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(y, cbcr), target)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            right = accuracy(model, loaders["test"])
            print(f"{epoch:5}  {np.mean(losses):4.2f}  {right:17.1%}  {time.perf_counter() - began:7.1f}", flush=True)


if __name__ == "__main__":
    main()
