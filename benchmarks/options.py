"""The command line, declared once for `python -m fourfold.benchmarks` and for pytest."""

from __future__ import annotations

import argparse
import math
import os
import random
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .harness import Settings

QUICK_SECONDS = 95.0  # of two minutes; the rest is for imports, the largest case running over, and the report


def thread_counts(text: str) -> tuple[int, ...]:
    """Turns the text 1,2 into (1, 2)."""
    counts = tuple(int(part) for part in text.split(",") if part.strip().isdigit())
    if not counts or 0 in counts or len(counts) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"must be thread counts like 1 or 1,2, got {text!r}")
    return counts


def some_seconds(text: str) -> float:
    """Turns the text 60 into 60.0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, such as 60, got {text!r}")
    return seconds


def add_options(add: Callable[..., Any]) -> None:
    """Every option that chooses what runs; `add` is argparse's add_argument or pytest's addoption."""
    add("--family", help="one family of ops, such as blockdct")
    add("--op", help="one op or several, such as block_dct,block_idct")
    add("--match", help="only cases whose group or label holds this text")
    add("--quick", action="store_true", help="the cases that matter most, within two minutes on 2 cores")
    add("--seconds", type=some_seconds, help="time for the whole run; it is shared out over the cases")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=thread_counts, help="thread counts, such as 1,2 (default: 1, and 2 where there are 2 cores)")
    add("--random-shapes", action="store_true", help="image sizes drawn now instead of the fixed shapes")
    add("--seed", type=int, help="of the random shapes (default: drawn and reported)")
    add("--only-ours", action="store_true", help="no rivals but copy_")
    add("--json", type=Path, metavar="FILE", help="where the results go, rewritten after every case")
    add("--report", type=Path, metavar="FILE.html", help="where the report with charts goes")
    add("--compare", type=Path, metavar="OLD.json", help="say what has changed since this run")


def to_arguments(settings: Settings) -> list[str]:
    """The command line that means `settings`."""
    valued = {
        "--family": settings.family,
        "--op": settings.op,
        "--match": settings.match,
        "--seconds": settings.seconds,
        "--device": settings.device,
        "--threads": ",".join(map(str, settings.threads)),
        "--seed": settings.seed,
    }
    flags = {"--quick": settings.quick, "--random-shapes": settings.random_shapes, "--only-ours": settings.only_ours}
    return [f"{name}={value}" for name, value in valued.items() if value is not None] + [
        name for name, on in flags.items() if on
    ]


def command_of(settings: dict[str, Any]) -> str:
    """The command line that chose these, as a results file holds them, without defaults; a seed only where shapes are drawn."""
    seed = settings["seed"] if settings["random_shapes"] else None
    chosen = to_arguments(Settings(**settings | {"threads": tuple(settings["threads"]), "seed": seed}))
    return shlex.join(["python", "-m", "fourfold.benchmarks", *(word for word in chosen if word != "--device=cpu")])


def to_settings(chosen: Any) -> Settings:
    """`chosen`: a namespace with the options of `add_options`."""
    default_threads = (1,) if chosen.device == "cuda" else (1, 2)[: len(os.sched_getaffinity(0))]
    return Settings(
        quick=chosen.quick,
        device=chosen.device,
        threads=chosen.threads or default_threads,
        family=chosen.family,
        op=chosen.op,
        match=chosen.match,
        random_shapes=chosen.random_shapes,
        seed=random.SystemRandom().randrange(2**31) if chosen.seed is None else chosen.seed,
        only_ours=chosen.only_ours,
        seconds=QUICK_SECONDS if chosen.quick and chosen.seconds is None else chosen.seconds,
    )


def check_places(chosen: Any) -> None:
    """ValueError where what is asked for can't be written: said now, not after the run."""
    files = {"--json": chosen.json, "--report": chosen.report}
    for option, path in files.items():
        if path is not None:
            _check_place(option, path)
    read = {"--compare": chosen.compare, "--from": getattr(chosen, "stored", None)}  # pytest has no --from
    names: dict[Path, str] = {}
    for option, path in (read | files).items():
        if path is None:
            continue
        other = names.setdefault(path.resolve(), option)
        if other != option and option in files:
            raise ValueError(f"{option} {path}: is {other}'s file, which it would overwrite; name another one")


def _check_place(option: str, path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {folder}; make it (mkdir -p {shlex.quote(str(folder))})")
    if path.is_dir():
        raise ValueError(f"{option} {path}: is a folder; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=folder):  # what may be written is known to who tries
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {path}: the folder {folder.resolve()} can't be written to ({error.strerror}); name a file in another one"
        ) from error


def check_device(settings: Settings) -> None:
    """ValueError where there is no such device."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        why = "finds no GPU" if torch.backends.cuda.is_built() else "is built without CUDA"
        raise ValueError(f"--device cuda: torch {torch.__version__} {why}; see python -m fourfold, or take --device cpu")
