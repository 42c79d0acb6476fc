"""JPEG files through Ray Data into batches of coefficients, for who outgrows one machine. Needs ray[data] and pillow.

python examples/stream_jpegs_with_ray.py [--files 2000] [--size 224] [--batch 64] [--cpus 2] [--quick]

One machine, or part of it, stands for the cluster here: ray.init(num_cpus=2). On a cluster, call ray.init() and give
read_binary_files the address of a bucket; nothing else changes. Bytes travel between the tasks, then float32 planes; no pixel
is decoded. On one machine DctDataset in a DataLoader is simpler, and spares batches the way through an object store.
"""

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path

import fourfold as ff
import numpy as np
import ray
import torch
from PIL import Image


def write_files(root: Path, size: int, count: int) -> None:
    """Smooth pictures of random colours, half of them with a grain that tells the two classes apart."""
    random = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
        if number % 2:
            pixels = pixels + random.integers(-20, 21, pixels.shape)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        folder = root / ("grainy" if number % 2 else "smooth")
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{number:06}.jpg", quality=90, subsampling="4:2:0")


def to_planes(batch: dict[str, np.ndarray], mean: np.ndarray, std: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of bytes to normalised planes y [B, 64, h, w] and cbcr [B, 128, h', w']; mean and std [3, 64]."""
    torch.set_num_threads(1)  # Ray runs as many of these side by side as there are CPUs
    files = ff.jpeg.read_batch(batch["bytes"].tolist(), threads=1)
    planes = []
    for c in range(3):  # Y, Cb, Cr
        blocks = torch.stack([file.components[c] for file in files])
        tables = torch.stack([file.qtables[c] for file in files])
        planes.append(ff.dct_normalize(blocks, tables, mean=torch.tensor(mean[c]), std=torch.tensor(std[c])))
    target = [int(Path(path).parent.name == "grainy") for path in batch["path"]]
    return {"y": planes[0].numpy(), "cbcr": torch.cat(planes[1:], 1).numpy(), "target": np.array(target)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller files")
    args = parser.parse_args()
    count, size = (200, 64) if args.quick else (args.files, args.size)

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=args.cpus, include_dashboard=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_files(root, size, count)
        paths = sorted(root.rglob("*.jpg"))
        mean, std = ff.jpeg.frequency_stats(paths, max_images=200, progress=False)

        files = ray.data.read_binary_files(str(root), include_paths=True)
        stream = files.map_batches(to_planes, fn_kwargs={"mean": mean.numpy(), "std": std.numpy()}, batch_size=args.batch)
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 2)  # how strong each frequency is tells grain from none
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for epoch in (1, 2):
            began, seen, right = time.perf_counter(), 0, 0
            for batch in stream.iter_torch_batches(batch_size=args.batch, local_shuffle_buffer_size=4 * args.batch):
                scores = model(batch["y"].abs().mean((2, 3)))
                loss = torch.nn.functional.cross_entropy(scores, batch["target"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                right += int((scores.argmax(1) == batch["target"]).sum())
                seen += len(scores)
            seconds = time.perf_counter() - began
            started = ", the start of its processes included" if epoch == 1 else ""
            print(
                f"epoch {epoch}: {seen} files in {seconds:.1f} s{started}; {right / seen:.0%} right while learning", flush=True
            )
    ray.shutdown()
    shapes = " and ".join(str(list(batch[name].shape[1:])) for name in ("y", "cbcr"))
    print(f"{size} x {size} pixels became {shapes}, at {seen / seconds:.0f} files/s with {args.cpus} CPUs")


if __name__ == "__main__":
    main()
