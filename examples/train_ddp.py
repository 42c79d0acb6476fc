"""A network of fourfold layers trained by several processes, with checkpoints and the similarity of its layers on the way.

torchrun --nproc-per-node 2 examples/train_ddp.py [--fsdp] [--epochs 8] [--checkpoint FOLDER] [--seed 0] [--quick]

DistributedDataParallel, or fully_shard (FSDP2) with --fsdp; on GPUs with NCCL, else on the CPU with gloo. Without torchrun it
is one process, and the same program. --checkpoint saves after each epoch and goes on from the last that the folder holds,
whatever number of processes has saved it, and whichever of the two they used. A bright dot lies in one of four quarters of a
noisy image: a convolution that knows where it is tells which, and half of the next one's random weights are enough to pass it
on. The batch is 256 images, of which each process takes its share, so any number of processes that divides 256 prints the same.
"""

import argparse
import os
from pathlib import Path

import fourfold as ff
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def start() -> torch.device:
    """Joins the processes that torchrun has started, or is the only one; the device of this one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # before the group: NCCL takes the current device
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    return device


def dots(count: int, seed: int) -> TensorDataset:
    """Noisy images [count, 1, 16, 16] with a bright dot, and its quarter."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(count, 1, 16, 16, generator=generator)
    rows, columns = torch.randint(16, (2, count), generator=generator)
    images[torch.arange(count), 0, rows, columns] = 3.0
    return TensorDataset(images, 2 * (rows // 8) + columns // 8)


def build() -> nn.Sequential:
    return nn.Sequential(
        ff.nn.CoordConv2d(1, 16, 3, padding=1, activation="relu"),
        ff.nn.SupermaskConv2d(16, 32, 3, stride=2, padding=1, sampler="topk", density=0.5),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def distribute(model: nn.Sequential, fsdp: bool) -> nn.Module:
    if not fsdp:
        return DistributedDataParallel(model)
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fsdp", action="store_true", help="shard parameters instead of copying them")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--checkpoint", help="a folder that all processes see")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer images and epochs")
    args = parser.parse_args()
    epochs, count = (2, 512) if args.quick else (args.epochs, 4096)

    device = start()
    first = dist.get_rank() == 0
    torch.manual_seed(args.seed)  # the same weights, frozen ones too, in every process
    layers = build().to(device)
    model = distribute(layers, args.fsdp)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)

    seen: dict[str, Tensor] = {}  # the layers' activations in this step
    for name, layer in (("coordinates", layers[0]), ("supermask", layers[1])):
        layer.register_forward_hook(lambda _layer, _args, result, name=name: seen.update({name: result.detach()}))

    epoch = 0
    saved = sorted(Path(args.checkpoint).glob("*/.metadata")) if args.checkpoint else []
    if saved:  # of these, what was interrupted is none
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)) | {"epoch": torch.tensor(0)}
        dcp.load(state, checkpoint_id=saved[-1].parent)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        epoch = int(state["epoch"])

    data = dots(count, args.seed)
    sampler = DistributedSampler(data, seed=args.seed)
    loader = DataLoader(data, 256 // dist.get_world_size(), sampler=sampler)
    for number in range(epoch + 1, epochs + 1):
        sampler.set_epoch(number)  # another order in every epoch
        stream = ff.StreamingCCA(conv="avgpool")
        total = torch.zeros(2, device=device)  # right, of
        for images, target in loader:
            scores = model(images.to(device))
            optimizer.zero_grad()
            F.cross_entropy(scores, target.to(device)).backward()
            optimizer.step()
            stream.update(seen)
            total += torch.tensor([(scores.argmax(1) == target.to(device)).sum(), len(target)], device=device)
        dist.all_reduce(total)
        similarity = stream.all_reduce().compute("cka").matrix[0, 1]  # over all images, the same in every process
        if first:
            right = (total[0] / total[1]).item()
            print(f"epoch {number}: {right:.1%} right while learning, CKA of the layers {similarity:.3f}", flush=True)
        if args.checkpoint:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(state | {"epoch": torch.tensor(number)}, checkpoint_id=Path(args.checkpoint, f"{number:04}"))
    if first:
        how = "fully_shard" if args.fsdp else "DistributedDataParallel"
        print(f"{dist.get_world_size()} processes, {how}, {dist.get_backend()}")
    del model, layers, optimizer  # DDP holds the group, and gloo's threads want Python when it goes: before the end, not at it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
