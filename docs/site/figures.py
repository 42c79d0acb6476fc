"""Figures that pages quote, copied from the stored runs that the pages name: python docs/site/figures.py."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(benchmarks/results/[\w-]+\.json)`")
OURS = "ours"


def stored(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def measured(run: str) -> dict[tuple[str, ...], dict[str, float]]:
    """Of each row of a benchmark the milliseconds of ours, by the name OURS, and of each rival."""
    return {
        (result["op"], result["label"], result["state"], str(result["threads"])): {
            OURS if name == result["ours"] else name: times["median"] for name, times in result["ms"].items()
        }
        for result in stored(run)["results"]
        if "ms" in result
    }


def performance(page: str) -> str:
    """In the rows | op | case | allocation | threads | time | the time is that of the run which the page names.

    That is the first, or one that the row's section names before it. A sixth cell names a rival, and gets its time too.
    """
    runs = {name: measured(name) for name in re.findall(NAMED, page)}
    usual = next(iter(runs))

    def quoted(ms: float) -> str:
        return f"{ms * 1e3:.1f} µs" if ms < 0.1 else f"{ms:.3g} ms"  # as in benchmarks.md

    def row(match: re.Match[str]) -> str:
        section = page[: match.start()].rpartition("\n## ")[2]
        run = [usual, *re.findall(NAMED, section)][-1]
        *what, rival = match.groups()
        of_rivals = runs[run].get(tuple(what), {})
        if not of_rivals.keys() >= {OURS, rival or OURS}:
            raise SystemExit(f"{run} has no time of {' '.join(filter(None, match.groups()))}; quote another row")
        op, *case = what
        beside = [] if rival is None else [f"{rival} {quoted(of_rivals[rival])}"]
        return " | ".join([f"| `{op}`", *case, quoted(of_rivals[OURS]), *beside]) + " |"

    return re.sub(
        r"^\| `(\w+)` \| ([^|]*) \| (fresh|heap|out) \| (\d+) \| [^|]* \|(?: ([\w.]+) [^|]* \|)?$", row, page, flags=re.M
    )


def faster(before: str, after: str) -> str:
    """Where both are times, after with how many times as fast it is: above 1 is better, as in the benchmarks."""
    old, new = (re.match(r"([\d.]+) ms(?::|$)", cell) for cell in (before, after))
    if old is None or new is None:
        return after
    return re.sub(r"(?<= ms: )[\d.]+×(?: as fast)?", f"{float(old[1]) / float(new[1]):.2f}× as fast", after)


def swapping(page: str) -> str:
    """The table before and after, and where it was measured."""
    run = stored("docs/swap_recipes.json")
    where = f"{run['date']}, {run['machine']}, torch {run['torch']}, fourfold {run['fourfold']}"
    page = re.sub(r"(?<=`docs/swap_recipes\.json`\n\()[^)]*(?=\))", where, page)
    head = "| recipe | on | before | after |\n| --- | --- | --- | --- |\n"
    before, after = page.split(head)
    rows = "".join(f"| {' | '.join([*what, old, faster(old, new)])} |\n" for *what, old, new in run["rows"])
    return before + head + rows + re.sub(r"\A(?:\|.*\n)*", "", after)


PAGES: dict[str, Callable[[str], str]] = {"docs/performance.md": performance, "docs/swapping.md": swapping}


def main() -> None:
    for name, filled in PAGES.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        path.write_text(filled(text), encoding="utf-8")
        print(f"{name}: {'as it was' if filled(text) == text else 'changed'}")


if __name__ == "__main__":
    main()
