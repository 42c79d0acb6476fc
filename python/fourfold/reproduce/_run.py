"""Running claims, and the record of it, which is what files hold."""

import datetime
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import fourfold as ff
from fourfold import _load

from ._registry import VERDICTS, Claim, Run, every_claim

SCHEMA = 1
PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow", "tqdm": "tqdm"}  # optional ones, as imported and as pip names them

Record = dict[str, Any]


def processor() -> str:
    """The processor's name, as Linux has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"model name", "CPU part"}:
            return value.strip()
    return platform.machine()


def new_record(full: bool) -> Record:
    """A record without claims: when, where and how they run.

    ``claims`` maps a name to claim, source and criterion as they stood, verdict, found (a sentence), seconds, cpu_seconds
    (of all threads: what it takes whoever else is at work), and ``runs``: per seed what :class:`Run` holds, with its seconds.
    """
    return {
        "fourfold_claims": SCHEMA,
        "mode": "full" if full else "quick",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {
            "cpu": processor(),
            "threads": torch.get_num_threads(),
            "capability": ff.cpu_capability(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fourfold": ff.__version__,
        },
        "claims": {},
    }


def read_record(path: Path) -> Record:
    """What :func:`store` wrote; a ValueError for other files."""
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"reproduce: {path} is not JSON ({error}); --write makes such files") from None
    if not isinstance(record, dict) or record.get("fourfold_claims") != SCHEMA:
        raise ValueError(f"reproduce: {path} holds no run of this version; make one with --write")
    return record


def continued(record: Record, path: Path) -> Record:
    """The record, with the claims of an earlier run in that file: hours of work may be done in parts.

    A ValueError if that run was of the other mode or of another machine, whose numbers belong on another page.
    """
    if not path.exists():
        return record
    earlier = read_record(path)
    for key in ("mode", "machine"):
        if earlier[key] != record[key]:
            raise ValueError(f"reproduce: {path} holds a run with {key} {earlier[key]}, not {record[key]}; name another file")
    return record | {"claims": earlier["claims"]}


def store(record: Record, path: Path) -> None:
    """Writes it, claims in the ledger's order."""
    order = [name for name in every_claim() if name in record["claims"]]
    record = record | {"claims": {name: record["claims"][name] for name in order}}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def lacking(claim: Claim) -> str:
    """What to do so that the claim can run here; empty if it can."""
    if "libjpeg" in claim.needs and not ff.has_jpeg():
        return _load.missing["jpeg"]
    packages = [PACKAGES[name] for name in claim.needs if name in PACKAGES and importlib.util.find_spec(name) is None]
    return f"run pip install {' '.join(packages)}" if packages else ""


def run_claim(claim: Claim, full: bool, step: Callable[[], object] = lambda: None) -> Record:
    """Runs every seed; step is called after each."""
    runs: list[Run] = []
    seconds: list[float] = []
    busy = time.process_time()
    for seed in claim.seeds(full):
        assert claim.run is not None
        torch.manual_seed(seed)
        start = time.perf_counter()
        runs.append(claim.run(seed, full))
        seconds.append(round(time.perf_counter() - start, 1))
        step()
    verdict, found = claim.judge(runs)
    return {
        "claim": claim.claim,
        "source": claim.source,
        "criterion": claim.criterion,
        "verdict": verdict,
        "found": found,
        "seconds": round(sum(seconds), 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "runs": [
            {"seed": seed, "verdict": run.verdict, "found": run.found, "seconds": took}
            | ({"figures": run.figures} if run.figures else {})
            | ({"series": run.series} if run.series else {})
            for seed, run, took in zip(claim.seeds(full), runs, seconds, strict=True)
        ],
    }


def tally(verdicts: Iterable[str]) -> dict[str, int]:
    """How often each verdict was given, most favourable first."""
    given = list(verdicts)
    return {one: given.count(one) for one in VERDICTS if one in given}
