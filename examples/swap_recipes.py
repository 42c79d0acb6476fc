"""The recipes of fourfold.swap on whole networks, with numbers from before and after.

python examples/swap_recipes.py [--quick] [--write FILE.json]

Times are medians of rounds in which both networks take turns, on one thread; the ratio is what carries over to other machines.
"""

import argparse
import copy
import datetime
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import fourfold as ff
import torch
from torch import nn
from torch.nn.utils import prune

ROWS: list[tuple[str, str, str, str]] = []


def milliseconds(before: Callable[[], object], after: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Medians of both, which take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for number in range(rounds + 1):
            for call, spent in zip((before, after), times, strict=True):
                start = time.perf_counter()
                call()
                if number:  # the first round warms up
                    spent.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def file_bytes(model: nn.Module) -> int:
    """What torch.save writes for its state_dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def mlp(width: int) -> nn.Sequential:
    """Three layers, of which the last is small."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)).eval()


def pruned(width: int, amount: float) -> nn.Sequential:
    """The same with all but the largest weights of its large layers pruned."""
    model = mlp(width)
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", amount)
    return model


def show(recipe: str, what: str, before: str, after: str) -> None:
    """A row of the table."""
    ROWS.append((recipe, what, before, after))
    print(f"| {recipe} | {what} | {before} | {after} |", flush=True)


def show_times(recipe: str, what: str, times: tuple[float, float], more: str = "") -> None:
    """A row with two times."""
    show(recipe, what, f"{times[0]:.3g} ms", f"{times[1]:.3g} ms: {times[0] / times[1]:.2f}× as fast{more}")


def coord_conv(size: int, rounds: int) -> None:
    """A ResNet-50 all of whose convolutions know where they are."""
    model, x = ff.models.resnet50().eval(), torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    report = ff.swap(model, ff.recipes.coord_conv(), example=x)
    assert report.model_difference == 0
    t = milliseconds(lambda: plain(x), lambda: model(x), rounds)
    new = sum(p.numel() for p in report.new_parameters)
    layers = f"ResNet-50, all {len(report.names)} convolutions"
    show("`coord_conv()`", layers, "no coordinates", f"{new:,} new weights, the same output")
    show_times("", f"2 × 3 × {size} × {size}, inference", t)


def masked(width: int) -> None:
    """A pruned network whose masks become bits, and the way back."""
    model = pruned(width, 0.9)
    before = file_bytes(model)
    report = ff.swap(model, ff.recipes.masked(), where=["0", "2"], example=torch.randn(16, width))
    assert report.model_difference is not None
    show("`masked()`", f"MLP {width}, 90% pruned", f"{before / 1e6:.1f} MB file", f"{file_bytes(model) / 1e6:.1f} MB")
    back = ff.swap(model, ff.recipes.plain(), example=torch.randn(16, width))
    said = f"plain `Linear`, max difference {back.model_difference:.1g}"
    show("`plain()`", "the same, back", "masked", said)


def compress(width: int, amount: float, rows: int, rounds: int) -> None:
    """A pruned network for inference."""
    dense, x = pruned(width, amount), torch.randn(rows, width)
    for layer in (dense[0], dense[2]):
        prune.remove(layer, "weight")  # what people run: a dense weight with zeros in it
    model = copy.deepcopy(dense)
    report = ff.swap(model, ff.recipes.compress(batch_hint=rows), example=x)
    t = milliseconds(lambda: dense(x), lambda: model(x), rounds)
    left = f"; {len(report.names)} layers swapped, {len(report.left)} left"
    show_times("`compress()`", f"MLP {width}, {amount:.0%} pruned, {rows} row{'s' * (rows > 1)}", t, left)


def supermask(width: int) -> None:
    """A network that trains scores instead of weights."""
    model = mlp(width)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report = ff.swap(model, ff.recipes.supermask(sampler="topk", density=0.5), where=["0", "2"], example=torch.randn(64, width))
    cka = report.certificate["2"].cka
    after = sum(p.numel() for p in model.parameters() if p.requires_grad)
    show(
        "`supermask(..)`",
        f"MLP {width}, half kept",
        f"{trained:,} weights trained",
        f"{after:,} scores and biases; CKA with before {cka:.2f}",
    )


def dct_front_end(size: int, rounds: int) -> None:
    """A ResNet-50 that takes JPEG's coefficients in place of pixels."""
    resnet = ff.models.resnet50().eval()
    model = ff.models.dct_resnet50("late_concat_rfa_thinner", backbone=resnet).eval()
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    x = (pixels / 255).contiguous(memory_format=torch.channels_last)
    y, cbcr = (c.contiguous(memory_format=torch.channels_last) for c in ff.rgb_to_dct(pixels))
    t = milliseconds(lambda: resnet(x), lambda: model(y, cbcr), rounds)
    kept = {id(p) for p in resnet.parameters()}
    shared = sum(p.numel() for p in model.parameters() if id(p) in kept)
    total = sum(p.numel() for p in model.parameters())
    show_times("`dct_resnet50(.., backbone=)`", f"ResNet-50, 2 × {size} × {size}, inference", t)
    show("", "its weights", "25.6 M", f"{shared / 1e6:.1f} of {total / 1e6:.1f} M carry over")


def main() -> None:
    """Prints the table, and stores it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small networks, few rounds")
    parser.add_argument("--write", type=Path, metavar="FILE.json", help="store the table")
    arguments = parser.parse_args()
    quick = arguments.quick
    torch.manual_seed(0)
    torch.set_num_threads(1)
    size, width, rounds = (64, 256, 2) if quick else (224, 2048, 15)
    print("| recipe | on | before | after |\n| --- | --- | --- | --- |")
    coord_conv(size, rounds)
    masked(width)
    supermask(width)
    for amount, rows in ((0.9, 1), (0.9, 64), (0.5, 1), (0.5, 64)):
        compress(width, amount, rows, 4 * rounds)
    dct_front_end(size, rounds)
    if arguments.write:
        run = {
            "command": "python examples/swap_recipes.py" + " --quick" * quick,
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()} with {ff.cpu_capability()}, one thread",
            "torch": torch.__version__,
            "fourfold": ff.__version__,
            "rows": ROWS,
        }
        arguments.write.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
