"""Every op against the plain-torch idiom, interleaved and checked: `python -m fourfold.benchmarks --help`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path

from .harness import Case, Settings

__all__ = ["Case", "Settings", "bench_files", "every_case", "near"]


def near(name: str, names: Iterable[str]) -> str:
    """What was meant, where something is near it."""
    found = difflib.get_close_matches(name, list(names), cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def bench_files(family: str | None = None) -> list[Path]:
    """The bench_<family>.py files, or those of `family`: bench_blockdct_rgb.py is a part of blockdct."""
    files = {path.stem.removeprefix("bench_"): path for path in sorted(Path(__file__).parent.glob("bench_*.py"))}
    if family is not None and family not in files:
        raise ValueError(f"--family: must be one of {', '.join(files)}, got {family!r}{near(family, files)}")
    return [path for name, path in files.items() if family is None or f"{name}_".startswith(f"{family}_")]


def every_case(settings: Settings) -> list[Case]:
    """The cases that `settings` chooses, in the order in which they run."""
    modules = (importlib.import_module(f".{path.stem}", __name__) for path in bench_files(settings.family))
    return settings.choose(case for module in modules for case in module.cases(settings))
