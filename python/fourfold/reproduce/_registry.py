"""What a claim is, and the list of all of them."""

import contextlib
import difflib
import fnmatch
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

FAMILIES = {
    "coordconv": "CoordConv",
    "blockdct": "Networks on JPEG's coefficients",
    "maskmm": "Supermasks",
    "supsup": "Supermasks in superposition",
    "cca": "SVCCA",
}  # each a module of this package, which registers its claims

REPRODUCED, PARTLY, NOT, OFFLINE = "reproduced", "partly", "not reproduced", "not testable offline"
UNFINISHED = "unfinished"  # some of its seeds are still to be run
LOST = "unfinished, can no longer be reproduced"  # whatever these seeds give
VERDICTS = (REPRODUCED, PARTLY, NOT, LOST, UNFINISHED, OFFLINE)
SEEDS = range(5)

_listeners: list[Callable[[float], object]] = []


@contextlib.contextmanager
def listening(listener: Callable[[float], object]) -> Iterator[None]:
    """While it lasts, the listener is told by :func:`step` how much of a seed is done."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def step(share: float) -> None:
    """Says that this share of the seed is done, from 0 to 1. Runs that take a while do, or their bar would stand still."""
    for listener in _listeners:
        listener(share)


def part(index: int, count: int) -> Callable[[float], None]:
    """A :func:`step` for one of several parts of about equal length."""
    return lambda share: step((index + share) / count)


@dataclass
class Run:
    """What one seed gave.

    verdict: of this seed alone: reproduced, partly or not reproduced. found: one sentence. figures: its numbers by name, for
    judging over seeds and for tables. series: lists of numbers that pictures are drawn from. seed, date, seconds, cpu_seconds
    (of all threads: what it takes whoever else is at work): filled in by who runs it.
    """

    verdict: str
    found: str
    figures: dict[str, float] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    date: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class Claim:
    """A published claim, what counts as reproducing it, and the function that tries.

    run: (seed, full) -> Run; None if it cannot be tested without downloads, and `criterion` then says why.
    seeded: False if no seed plays a part, so that one run is enough. negative: it says where the method does not help.
    at_least: how many of the five seeds must reproduce it. over_seeds: instead of counting seeds, a verdict and a sentence on
    all runs together. needs: optional packages, as imported, and "libjpeg". partly: the weaker criterion of that verdict, where
    `criterion` does not state it.
    """

    name: str
    family: str
    claim: str
    source: str
    criterion: str
    run: Callable[[int, bool], Run] | None
    seeded: bool = True
    negative: bool = False
    at_least: int = len(SEEDS)
    over_seeds: Callable[[list[Run]], tuple[str, str]] | None = None
    needs: tuple[str, ...] = ()
    partly: str = ""

    def seeds(self, full: bool) -> list[int]:
        """Never chosen: 0 to 4, or 0 alone."""
        if self.run is None:
            return []
        return list(SEEDS) if full and self.seeded else [0]

    def lost(self, runs: list[Run]) -> bool:
        """Whether these of the five seeds leave too few to reproduce it. Never known of what all give together."""
        missed = sum(run.verdict != REPRODUCED for run in runs)
        return self.over_seeds is None and missed > len(SEEDS) - self.at_least

    def judge(self, runs: list[Run]) -> tuple[str, str]:
        """The verdict on all runs, and a sentence on them. One seed that came near does not make up for most that did not."""
        if self.run is None:
            return OFFLINE, self.criterion
        if self.over_seeds:
            return self.over_seeds(runs)
        held = sum(run.verdict == REPRODUCED for run in runs)
        found = runs[0].found if len(runs) == 1 else f"{held} of {len(runs)} seeds; seed 0: {runs[0].found}"
        # The same share of fewer seeds, rounded up.
        if held >= -(-self.at_least * len(runs) // len(SEEDS)):
            return REPRODUCED, found
        near = sum(run.verdict != NOT for run in runs)
        return (PARTLY if near > len(runs) / 2 else NOT), found


_claims: dict[str, Claim] = {}


def register(claim: Claim) -> None:
    """Adds a claim. Names are unique, and begin with their family's."""
    if claim.name in _claims:
        raise ValueError(f"reproduce: two claims are named {claim.name}")
    _claims[claim.name] = claim


def claim(name: str, **fields: Any) -> Callable[[Callable[[int, bool], Run]], Callable[[int, bool], Run]]:
    """Registers the decorated function as the run of a claim."""

    def decorator(run: Callable[[int, bool], Run]) -> Callable[[int, bool], Run]:
        register(Claim(name, name.partition(".")[0], run=run, **fields))
        return run

    return decorator


def offline(name: str, *, claim: str, source: str, why: str) -> None:
    """Registers a claim that needs what cannot be had without a download."""
    register(Claim(name, name.partition(".")[0], claim=claim, source=source, criterion=why, run=None))


def every_claim() -> dict[str, Claim]:
    """All claims by name, in the order of families and of their modules."""
    for family in FAMILIES:
        importlib.import_module(f"{__package__}.{family}")
    order = list(FAMILIES)  # whichever was imported first
    return dict(sorted(_claims.items(), key=lambda item: order.index(item[1].family)))


def choose(names: Iterable[str]) -> list[Claim]:
    """Claims by name, by family, or by a glob; all for no names, each once and in the ledger's order."""
    every, wanted = every_claim(), list(names)
    if not wanted:
        return list(every.values())
    chosen: set[str] = set()
    for name in wanted:
        found = [key for key, one in every.items() if name == one.family or fnmatch.fnmatchcase(key, name)]
        if not found:
            meant = near(name, [*FAMILIES, *every])
            raise ValueError(
                f"reproduce: no claim or family is named {name!r}; "
                + (f"did you mean {' or '.join(meant)}? --list shows all" if meant else "--list shows them")
            )
        chosen.update(found)
    return [one for key, one in every.items() if key in chosen]


def near(name: str, known: list[str]) -> list[str]:
    """Up to three of the known names that may have been meant: they have it in them, or are like it with or without family."""
    inside = [one for one in known if name and name.lower() in one]
    ends = {one.partition(".")[2] or one: one for one in known}
    like = difflib.get_close_matches(name.lower(), known) + [ends[end] for end in difflib.get_close_matches(name.lower(), ends)]
    return list(dict.fromkeys(inside + like))[:3]


def verdict(passed: bool, partly: bool = False) -> str:
    """Of one seed."""
    return REPRODUCED if passed else PARTLY if partly else NOT


def threads(count: int | None = None) -> str:
    """A count in words; by default of those that torch takes."""
    count = torch.get_num_threads() if count is None else count
    return f"{count} thread{'s' * (count > 1)}"
