"""``python -m fourfold.reproduce``: the papers' claims that need no download, run again, with a verdict each."""

import argparse
import contextlib
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from .._progress import progress_bar
from . import _render
from ._registry import FAMILIES, Claim, choose
from ._run import Record, continued, lacking, new_record, run_claim, store, tally


def main(arguments: list[str] | None = None) -> int:
    """Runs what the arguments name. Returns 0; 1 if a claim could not be run because a package is missing."""
    parser = argparse.ArgumentParser(prog="python -m fourfold.reproduce", description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help="claims, families, or globs such as 'cca.*'; all by default")
    parser.add_argument("--list", action="store_true", help="list the claims and stop")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="one fixed seed each (the default); under 15 minutes on 2 cores")
    mode.add_argument("--full", action="store_true", help="the stated criteria over seeds 0 to 4; hours")
    mode.add_argument("--render", type=Path, metavar="RESULT.json", help="run nothing: the ledger of a stored run, as Markdown")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="store the run, beside what the file holds of earlier ones; with --render the page",
    )
    chosen = parser.parse_args(arguments)
    try:
        claims = choose(chosen.names)
        if chosen.render:
            return render(chosen.render, chosen.write)
        record = new_record(chosen.full)
        if chosen.write and not chosen.list:  # before the hours, not after them
            if not chosen.write.parent.is_dir():
                raise ValueError(f"reproduce: there is no folder {chosen.write.parent} to write to")
            record = continued(record, chosen.write)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if chosen.list:
        for claim in claims:
            print(f"{claim.name:<28}{claim.claim}" + ("" if claim.run else " (not testable offline)"))
        return 0
    return run(claims, record, chosen.write)


def render(source: Path, target: Path | None) -> int:
    """Prints the page of a stored run, or writes it with its pictures."""
    record = _render.load(source)
    if target is None:
        print(_render.page(record))
    else:
        print("\n".join(f"wrote {path}" for path in _render.write(record, target)))
    return 0


def run(claims: list[Claim], record: Record, target: Path | None) -> int:
    """Runs, prints, and stores if there is a target."""
    full, given, missing, start = record["mode"] == "full", [], 0, time.perf_counter()
    bar = progress_bar(sum(len(claim.seeds(full)) for claim in claims), "run")
    say: Callable[[str], object] = bar.write if bar is not None else lambda line: print(line, flush=True)
    with bar if bar is not None else contextlib.nullcontext():
        family = ""
        for claim in claims:
            if claim.family != family:
                family = claim.family
                say(f"\n{FAMILIES[family]}")
            if bar is not None:
                bar.set_description(claim.name)
            if remedy := lacking(claim):
                missing += 1
                say(f"  {'NOT RUN':<21} {claim.name}: {remedy}")
                continue
            result = run_claim(claim, full, bar.update if bar is not None else lambda: None)
            record["claims"][claim.name] = result
            given.append(result["verdict"])
            say(line(claim, result, full))
            if target:  # after each claim: hours of work survive what comes then
                store(record, target)
    said = ", ".join(f"{count} {verdict}" for verdict, count in tally(given).items())
    how = "criteria over seeds 0 to 4" if full else "quick: one seed each, an indication; --full decides"
    print(f"\n{said}; {time.perf_counter() - start:.0f} s ({how})")
    if target:
        print(f"wrote {target}")
    if missing:
        print(f"{missing} not run, for want of what they need", file=sys.stderr)
    return 1 if missing else 0


def line(claim: Claim, result: Record, full: bool) -> str:
    """Verdict and name, and below what was found."""
    mark = result["verdict"] + ("" if full or claim.run is None else "*")
    head = f"  {mark:<21} {claim.name}: {claim.claim}" + (f" [{result['seconds']:.0f} s]" if claim.run else "")
    return head + "\n" + textwrap.fill(result["found"], 124, initial_indent=" " * 24, subsequent_indent=" " * 24)


if __name__ == "__main__":
    sys.exit(main())
