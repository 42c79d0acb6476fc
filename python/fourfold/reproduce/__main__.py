"""``python -m fourfold.reproduce``: the papers' claims that need no download, run again, with a verdict each."""

import argparse
import contextlib
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._progress import progress_bar
from . import _render
from ._registry import FAMILIES, SEEDS, Claim, choose
from ._run import Record, check_target, continued, lacking, new_record, run_claim, runs_of, store, tally


def seeds_of(text: str) -> list[int]:
    """Of the option: "0", or "0,3"."""
    known = {str(seed): seed for seed in SEEDS}
    chosen = text.split(",")
    if not set(chosen) <= set(known):
        raise argparse.ArgumentTypeError(f"seeds are {', '.join(known)}, with commas between them; not {text!r}")
    return [known[one] for one in chosen]


def main(arguments: list[str] | None = None) -> int:
    """Runs what the arguments name. Returns 0; 1 if a claim could not be run because a package is missing; 130 at Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m fourfold.reproduce", description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help="claims, families, or globs such as 'cca.*'; all by default")
    parser.add_argument("--list", action="store_true", help="list the claims and stop")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="one fixed seed each (the default); under 15 minutes on 2 cores")
    mode.add_argument("--full", action="store_true", help="the stated criteria over seeds 0 to 4; hours")
    mode.add_argument("--render", type=Path, metavar="RESULT.json", help="run nothing: the ledger of a stored run, as Markdown")
    parser.add_argument(
        "--seeds", type=seeds_of, metavar="0,1", help="with --full --write: only these seeds now, the others at another time"
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="store each seed as it ends; those that FILE holds already are not run again. With --render the page",
    )
    parser.add_argument("--again", action="store_true", help="with --write: run what FILE holds of these claims once more")
    chosen = parser.parse_args(arguments)
    if chosen.seeds is not None and not (chosen.full and chosen.write):
        parser.error("--seeds leaves some for later, so it goes with --full --write FILE")
    if chosen.again and (chosen.render or not chosen.write):
        parser.error("--again is about what a file holds, so it goes with --write FILE")
    try:
        claims = choose(chosen.names)
        if chosen.list:
            for claim in claims:
                print(f"{claim.name:<28}{claim.claim}" + ("" if claim.run else " (not testable offline)"))
            return 0
        if chosen.render:
            return render(chosen.render, chosen.write)
        record = new_record(chosen.full)
        if chosen.write:  # before the hours, not after them
            check_target(chosen.write)
            record = continued(record, chosen.write, claims, chosen.again)
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
        parser.error(str(error))
    return run(claims, record, chosen.write, chosen.seeds, chosen.again)


def render(source: Path, target: Path | None) -> int:
    """Prints the page of a stored run, or writes it with its pictures."""
    record = _render.load(source)
    if target is None:
        print(_render.page(record))
    else:
        print("\n".join(f"wrote {path}" for path in _render.write(record, target)))
    return 0


def bar_of(seeds: int) -> Any:
    """A bar that counts seeds, and moves within one; None where nobody looks. It guesses no end: seeds take 0 s to an hour."""
    bar = progress_bar(seeds, "seed")
    if bar is not None:
        bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total} seeds, {elapsed}"
        bar.miniters, bar.dynamic_miniters = 0, False  # or steps that are smaller than those before would not show
    return bar


def stopped(claim: Claim | None, kept: int, full: bool, target: Path | None, again: bool) -> str:
    """What is left of a run that was stopped at this claim, and how it goes on."""
    if target is None:
        return "stopped; nothing is kept: --write FILE would keep each seed that ends, and go on after them"
    seeds = "no seed" if claim is None else f"{kept} of {len(claim.seeds(full))} seeds of {claim.name}"
    how = "without --again the same command goes on with what it holds" if again else "the same command goes on"
    return f"stopped; {seeds} {'is' if claim is None else 'are'} kept in {target}, and {how}"


def run(claims: list[Claim], record: Record, target: Path | None, seeds: list[int] | None = None, again: bool = False) -> int:
    """Runs, prints, and stores if there is a target."""
    full, given, missing, start = record["mode"] == "full", [], 0, time.perf_counter()
    bar = bar_of(sum(len(claim.seeds(full)) for claim in claims))
    say: Callable[[str], object] = bar.write if bar is not None else lambda line: print(line, flush=True)
    at, kept = None, 0  # the claim that runs, and its seeds that ended
    try:
        with bar if bar is not None else contextlib.nullcontext():
            family, before = "", 0
            for claim in claims:
                if claim.family != family:
                    family = claim.family
                    say(f"\n{FAMILIES[family]}")
                if remedy := lacking(claim):
                    missing += 1
                    before += len(claim.seeds(full))
                    say(f"  {'NOT RUN':<21} {claim.name}: {remedy}")
                    continue

                def tell(done: float, before: int = before) -> None:
                    if bar is not None:
                        bar.update(before + done - bar.n)

                def keep(result: Record, name: str = claim.name) -> None:
                    nonlocal kept
                    if target:  # after each seed: hours of work survive what comes then
                        store(record, target, name, result)
                    kept = len(result["runs"])

                if bar is not None:
                    bar.set_description(claim.name)
                earlier = runs_of(record["claims"].get(claim.name, {}))
                at, kept = claim, len(earlier)
                result = run_claim(claim, full, earlier, seeds, keep, tell)
                if claim.run is not None:
                    keep(result)
                before += len(claim.seeds(full))
                given.append(result["verdict"])
                say(line(claim, result, full))
    except KeyboardInterrupt:
        print(stopped(at, kept, full, target, again), file=sys.stderr)
        return 130
    said = ", ".join(f"{count} {verdict}" for verdict, count in tally(given).items())
    how = "criteria over seeds 0 to 4" if full else "quick: one seed each, an indication; --full decides"
    print(f"\n{said}; {time.perf_counter() - start:.0f} s ({how})")
    if target:
        print(f"in {target}")
    if missing:
        print(f"{missing} not run, for want of what they need", file=sys.stderr)
    return 1 if missing else 0


def line(claim: Claim, result: Record, full: bool) -> str:
    """Verdict and name, and below what was found."""
    mark = result["verdict"] + ("" if full or claim.run is None else "*")
    head = f"  {mark:<21} {claim.name}: {claim.claim}" + (f" [{result['seconds']:.0f} s]" if claim.run else "")
    return head + "\n" + textwrap.fill(result["found"], 124, initial_indent=" " * 24, subsequent_indent=" " * 24)


def console() -> int:
    """What the shell calls: a reader that has seen enough (`| head`), and Ctrl-C at any time, end it without a traceback."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(console())
