"""What changed from one run to another: each case's ratio to a rival, and on the same machine its time, before and after.

A case has changed where the quartiles before and after don't overlap. Ratios say so, where the same rival ran in both: what
makes a machine slower makes both slower. Times of different machines are not compared at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .report import Document, Result, _milliseconds, _spread, command, run_name, unfinished

Spread = dict[str, float]

FASTER, SLOWER, SAME, NEW, GONE = "faster", "slower", "within the spread", "new", "gone"
UNTIMED, APART = "not timed in both", "not compared (times of different machines)"
CHANGES = (FASTER, SLOWER, SAME, UNTIMED, APART, NEW, GONE)


@dataclasses.dataclass(frozen=True)
class Row:
    """A case of either run, what became of it, and in words: how it stands to a rival or a yardstick, its share, its time."""

    name: str
    change: str
    against: str = ""
    share: str = ""
    time: str = ""

    def __str__(self) -> str:
        told = ", ".join(filter(None, (self.against, self.share, self.time)))
        return f"{self.change}: {self.name}" + f": {told}" * bool(told)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """heading: of which runs, and what stands in the way of comparing times."""

    heading: list[str]
    rows: list[Row]

    @property
    def summary(self) -> str:
        counts = {change: sum(row.change == change for row in self.rows) for change in CHANGES}
        return ", ".join(f"{count} {change}" for change, count in counts.items() if count) or "no case in either run"

    def __str__(self) -> str:
        return "\n".join([*self.heading, *(str(row) for row in self.rows), self.summary])


def compare(old: Document, new: Document, old_name: str) -> Comparison:
    """Rows in the order of the new run; then what is gone from the old one, where the new one was to run all that it ran."""
    before = {run_name(result): result for result in old["results"]}
    after = {run_name(result): result for result in new["results"]}
    apart = _difference(old, new)
    rows = [
        _row(name, before[name], result, times=not apart) if name in before else Row(name, NEW)
        for name, result in after.items()
    ]
    gone = [name for name in before if name not in after]
    heading = [f"Compared with {old_name}, of {old['date']}, fourfold {old['fourfold']}: ratios and times before → after"]
    if apart:
        heading.append(f"another machine ({apart}): times are not compared, only ratios taken within each run")
    heading += [f"{name} was {unfinished(run)}" for name, run in ((old_name, old), ("this run", new)) if unfinished(run)]
    if _chosen(old) == _chosen(new) and unfinished(new):
        heading += [f"{len(gone)} cases of {old_name} have no result in this run"] if gone else []
    elif _chosen(old) == _chosen(new):
        rows += [Row(name, GONE) for name in gone]
    elif gone:
        heading.append(f"{len(gone)} cases of {old_name} were not asked for by {command(new)}")
    return Comparison(heading, rows)


def _chosen(document: Document) -> tuple[object, ...]:
    """What decides which cases there are."""
    settings = document["settings"]
    names = ("quick", "device", "family", "op", "match", "random_shapes")
    return (*(settings[name] for name in names), settings["seed"] if settings["random_shapes"] else None)


def _difference(old: Document, new: Document) -> str:
    """What keeps their times from being compared; empty where nothing does."""
    facts = [
        *((name, old["machine"].get(name), new["machine"].get(name)) for name in ("cpu", "cores", "gpu")),
        ("ISA tier", old["capability"], new["capability"]),
    ]
    return "; ".join(f"{name} {a}, now {b}" for name, a, b in facts if a != b)


def _row(name: str, old: Result, new: Result, times: bool) -> Row:
    if "ms" not in old or "ms" not in new:
        return Row(name, UNTIMED)
    return Row(
        name,
        _change(old, new, times),
        "; ".join(_against(old, new)),
        ", ".join(_shares(old, new)),
        _times(old, new) if times else "",
    )


def _change(old: Result, new: Result, times: bool) -> str:
    """By the strongest rival that both have, else by the yardsticks, else by the time itself."""
    for key, sign in (("ratio", 1), ("cost", -1)):
        shared = _shared(old, new, key)
        if shared:
            return _moved(old[key][shared[0]], new[key][shared[0]], sign)
    if "overhead_us" in old and "overhead_us" in new:
        return _moved(old["overhead_us"], new["overhead_us"], -1) if times else APART
    return _moved(old["ms"][old["ours"]], new["ms"][new["ours"]], -1) if times else APART


def _shared(old: Result, new: Result, key: str) -> list[str]:
    """Rivals or yardsticks of both; the strongest now comes first."""
    shared = [name for name in new.get(key, {}) if name in old.get(key, {})]
    return sorted(shared, key=lambda name: new[key][name]["median"]) if key == "ratio" else shared


def _moved(old: Spread, new: Spread, sign: int) -> str:
    """sign: 1 where more is better."""
    if new["q1"] > old["q3"]:
        return FASTER if sign > 0 else SLOWER
    if new["q3"] < old["q1"]:
        return SLOWER if sign > 0 else FASTER
    return SAME


def _against(old: Result, new: Result) -> Iterator[str]:
    shared = _shared(old, new, "ratio")
    if shared:
        yield f"{_spread(old['ratio'][shared[0]], '×')} → {_spread(new['ratio'][shared[0]], '×')} {shared[0]}"
    best = old.get("best_rival"), new.get("best_rival")
    if best[0] != best[1]:
        was, now = (name or "none" for name in best)
        yield f"best rival {was} → {now}"
    for name in _shared(old, new, "cost")[:1]:
        yield f"cost {_spread(old['cost'][name])} → {_spread(new['cost'][name])} of {name}"


def _shares(old: Result, new: Result) -> Iterator[str]:
    """Of what the machine itself gives, which is measured within the run."""
    if "copy_share" in old and "copy_share" in new:
        yield f"{old['copy_share']['median']:.2f} → {new['copy_share']['median']:.2f} of copy_"
    if "gemm_share" in old and "gemm_share" in new:
        yield f"{old['gemm_share']:.2f} → {new['gemm_share']:.2f} of the GEMM peak"


def _times(old: Result, new: Result) -> str:
    if "overhead_us" in old and "overhead_us" in new:
        return f"{_spread(old['overhead_us'], ' µs', 1)} → {_spread(new['overhead_us'], ' µs', 1)} of call overhead"
    was, now = (result["ms"][result["ours"]] for result in (old, new))
    return f"{_of_quartiles(was)} → {_of_quartiles(now)}"


def _of_quartiles(ms: Spread) -> str:
    return f"{_milliseconds(ms['median'])} ({_milliseconds(ms['q1'])}–{_milliseconds(ms['q3'])})"
