"""What a results file must hold before anything is told of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUMBER = (int, float)
WORDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number", NUMBER: "a number"}
DOCUMENT = {
    "machine": dict,
    "torch": str,
    "fourfold": str,
    "build": dict,
    "capability": str,
    "date": str,
    "settings": dict,
    "states": dict,
    "gemm_peak_flops": dict,
    "warnings": list,
    "results": list,
}
MACHINE = {"cpu": str, "cores": int, "memory_gib": NUMBER, "kernel": str, "python": str}
SETTINGS = ("quick", "device", "threads", "family", "op", "match", "random_shapes", "seed", "only_ours", "seconds")
ROW = {
    "op": str,
    "label": str,
    "state": str,
    "threads": int,
    "source": str,
    "ours": str,
    "wrong": dict,
    "warnings": list,
}
TIMED = {"ms": dict, "ratio": dict}
SPREAD = {"median": NUMBER, "q1": NUMBER, "q3": NUMBER}


def load(path: Path) -> dict[str, Any]:
    """The document of a results file. ValueError with the file's name where there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: must be a results file, but can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be a results file in JSON, but is no text ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: must be a results file in JSON; it is broken or cut off ({error})") from error
    complaint = next(_complaints(document), None)
    if complaint:
        raise ValueError(f"{path}: {complaint}; store a run anew with --json")
    return document


def _complaints(document: Any) -> Iterator[str]:
    """Whatever would stop a report half-way. The first one counts: those after it may rest on it."""
    if not isinstance(document, dict) or document.get("fourfold_benchmarks") != 1:
        yield "must be a results file of fourfold.benchmarks, schema 1"
        return
    yield from _lacking(document, DOCUMENT, "the run")
    yield from _lacking(document["machine"], MACHINE, "machine")
    yield from (f"settings: {name!r} is missing" for name in SETTINGS if name not in document["settings"])
    for place, row in enumerate(document["results"], 1):
        where = f"result {place} of {len(document['results'])}"
        if not isinstance(row, dict):
            yield f"{where} must be an object, got {type(row).__name__}"
        yield from _lacking(row, ROW, where)
        if row["state"] not in document["states"]:
            yield f"{where}: its state {row['state']!r} is none of {', '.join(document['states'])}"
        if "ms" in row:
            yield from _timed(row, where)


def _timed(row: dict[str, Any], where: str) -> Iterator[str]:
    yield from _lacking(row, TIMED, where)
    yield from (f"{where}: {key!r} has nothing of {row['ours']!r}" for key in ("ms", "saved", "peak") if _without_us(row, key))
    for key in ("ms", "ratio", "cost"):
        for name, spread in row.get(key, {}).items():
            yield from _spread(spread, f"{where}: {key!r} of {name!r}")
    for key in ("copy_share", "overhead_us"):
        if key in row:
            yield from _spread(row[key], f"{where}: {key!r}")
    if "overhead_us" in row and "overhead_goal_us" not in row:
        yield f"{where}: 'overhead_goal_us' is missing"
    if row.get("best_rival") not in (None, *row["ratio"]):
        yield f"{where}: its best rival {row['best_rival']!r} has no ratio"
    if "best_rival" not in row:
        yield f"{where}: 'best_rival' is missing"


def _without_us(row: dict[str, Any], key: str) -> bool:
    return key in row and row["ours"] not in row[key]


def _spread(spread: Any, where: str) -> Iterator[str]:
    if not isinstance(spread, dict):
        yield f"{where} must be an object, got {type(spread).__name__}"
    yield from _lacking(spread, SPREAD, where)


def _lacking(of: dict[str, Any], wanted: dict[str, Any], where: str) -> Iterator[str]:
    for key, kind in wanted.items():
        if key not in of:
            yield f"{where}: {key!r} is missing"
        elif not isinstance(of[key], kind):
            yield f"{where}: {key!r} must be {WORDS[kind]}, got {type(of[key]).__name__}"
