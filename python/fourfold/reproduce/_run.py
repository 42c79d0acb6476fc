"""Running claims, and the record of it, which is what files hold."""

import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch

import fourfold as ff
from fourfold import _load

from ._registry import LOST, REPRODUCED, UNFINISHED, VERDICTS, Claim, Run, every_claim, listening

SCHEMA = 2
# Optional ones, as imported and as pip names them.
PACKAGES = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "simplejpeg": "simplejpeg",
    "tqdm": "tqdm",
    "threadpoolctl": "threadpoolctl",
}

Record = dict[str, Any]


def processor() -> str:
    """The processor's name, as Linux has it, with family and model where it has these; names alone may say little."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())  # of the first core
    name = fields.get("model name") or fields.get("CPU part") or platform.machine()
    return f"{name} family {fields['cpu family']} model {fields['model']}" if {"cpu family", "model"} <= fields.keys() else name


def today() -> str:
    """The date, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def new_record(full: bool) -> Record:
    """A record without claims: where and how they run.

    ``claims`` maps a name to what :func:`result_of` gives.
    """
    return {
        "fourfold_claims": SCHEMA,
        "mode": "full" if full else "quick",
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


def check_target(path: Path) -> None:
    """A ValueError unless :func:`store` can write there, which hours of work would otherwise find out."""
    if not path.parent.is_dir():
        raise ValueError(f"reproduce: there is no folder {path.parent} to write to")
    if path.exists() and not path.is_file():
        raise ValueError(f"reproduce: {path} is no file that could be written anew; name another file")
    trial = _beside(path)
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"reproduce: {path} cannot be written ({error.strerror}); name another file") from None


def _beside(path: Path) -> Path:
    """Where what is to replace the file is written."""
    return path.with_name(path.name + ".new")


def _same_machine(earlier: Record, now: Record) -> bool:
    """Records once had the processor's name without family and model."""
    return earlier == now or earlier == now | {"cpu": now["cpu"].partition(" family ")[0]}


def continued(record: Record, path: Path, claims: Iterable[Claim] = (), again: bool = False) -> Record:
    """The record, with the seeds that an earlier run left in that file, judged anew: hours of work may be done in parts.

    A ValueError if that run was of the other mode, or of another machine, torch or fourfold, whose numbers belong into another
    file; or if one of these claims had another criterion then. again: without what it left of these claims.
    """
    if not path.exists():
        return record
    earlier = read_record(path)
    for key, same in (
        ("mode", earlier["mode"] == record["mode"]),
        ("machine", _same_machine(earlier["machine"], record["machine"])),
    ):
        if not same:
            raise ValueError(f"reproduce: {path} holds a run with {key} {earlier[key]}, not {record[key]}; name another file")
    every = every_claim()
    if gone := set(earlier["claims"]) - set(every):
        raise ValueError(f"reproduce: {path} has a claim {min(gone)} that is no more; take it out, or name another file")
    for claim in claims:
        if again:
            earlier["claims"].pop(claim.name, None)
        elif claim.name in earlier["claims"] and earlier["claims"][claim.name]["criterion"] != claim.criterion:
            raise ValueError(
                f"reproduce: the criterion of {claim.name} has changed since {path} was made; --again runs its seeds anew"
            )
    for name, result in earlier["claims"].items():
        if result["criterion"] == every[name].criterion:
            earlier["claims"][name] = result_of(every[name], record["mode"] == "full", runs_of(result))
    return record | {"machine": earlier["machine"], "claims": earlier["claims"]}


def store(record: Record, path: Path, name: str, result: Record) -> None:
    """Puts one claim's result beside what the file holds, in the ledger's order; a kill leaves the old file or the new one."""
    held = continued(record | {"claims": {}}, path)
    claims = held["claims"] | {name: result}
    held["claims"] = {name: claims[name] for name in every_claim() if name in claims}
    whole = _beside(path)
    try:
        whole.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)


def lacking(claim: Claim) -> str:
    """What to do so that the claim can run here; empty if it can."""
    if "libjpeg" in claim.needs and not ff.has_jpeg():
        return _load.missing["jpeg"]
    packages = [PACKAGES[name] for name in claim.needs if name in PACKAGES and importlib.util.find_spec(name) is None]
    return f"run pip install {' '.join(packages)}" if packages else ""


def runs_of(result: Record) -> list[Run]:
    """The seeds that a result holds."""
    return [Run(**run) for run in result.get("runs", [])]


def result_of(claim: Claim, full: bool, runs: list[Run]) -> Record:
    """The claim as it stands, verdict, found (a sentence), seconds, cpu_seconds, and ``runs``: a :class:`Run` a seed."""
    runs = sorted(runs, key=lambda run: run.seed)
    seeds = claim.seeds(full)
    if len(runs) == len(seeds):
        verdict, found = claim.judge(runs)
    elif runs:
        verdict, so_far = UNFINISHED, f"{len(runs)} of {len(seeds)} seeds so far"
        if claim.lost(runs):
            held = sum(run.verdict == REPRODUCED for run in runs)
            verdict, so_far = LOST, f"{so_far}, {held} of them as claimed, where {claim.at_least} have to be"
        found = f"{so_far}; seed {runs[0].seed}: {runs[0].found}"
    else:
        verdict, found = UNFINISHED, "no seed so far"
    return {
        "claim": claim.claim,
        "source": claim.source,
        "criterion": claim.criterion,
        "verdict": verdict,
        "found": found,
        "seconds": round(sum(run.seconds for run in runs), 1),
        "cpu_seconds": round(sum(run.cpu_seconds for run in runs), 1),
        "runs": [{key: value for key, value in dataclasses.asdict(run).items() if value != {}} for run in runs],
    }


def run_claim(
    claim: Claim,
    full: bool,
    earlier: Iterable[Run] = (),
    only: Collection[int] | None = None,
    keep: Callable[[Record], object] = lambda result: None,
    tell: Callable[[float], object] = lambda seeds: None,
) -> Record:
    """Runs the seeds that no earlier run has, and gives the claim's result.

    only: no other seeds than these. keep: called with the result so far after each seed that ran. tell: called with how many
    seeds are done, in fractions too.
    """
    runs = {run.seed: run for run in earlier}
    for done, seed in enumerate(claim.seeds(full)):
        if seed not in runs and (only is None or seed in only):
            assert claim.run is not None
            torch.manual_seed(seed)
            start, busy = time.perf_counter(), time.process_time()
            with listening(lambda share, done=done: tell(done + share)):  # type: ignore[misc]
                run = claim.run(seed, full)
            run.seed, run.date = seed, today()
            run.seconds, run.cpu_seconds = round(time.perf_counter() - start, 1), round(time.process_time() - busy, 1)
            runs[seed] = run
            keep(result_of(claim, full, list(runs.values())))
        tell(done + 1)
    return result_of(claim, full, list(runs.values()))


def tally(verdicts: Iterable[str], *more: str) -> dict[str, int]:
    """How often each verdict was given, most favourable first; more: words that stand in for one."""
    given = [verdict.removesuffix(" (quick)") for verdict in verdicts]
    return {one: given.count(one) for one in (*VERDICTS, *more) if one in given}
