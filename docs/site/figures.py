"""Figures that pages quote, copied from the stored runs that the pages name: python docs/site/figures.py."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def stored(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def performance(page: str) -> str:
    """In the rows | op | case | allocation | threads | time | the time is that of the run which the page names."""
    run = re.findall(r"`(benchmarks/results/[\w-]+\.json)`", page)[0]
    times = {
        (result["op"], result["label"], result["state"], str(result["threads"])): result["ms"][result["ours"]]["median"]
        for result in stored(run)["results"]
        if "ms" in result
    }

    def row(match: re.Match[str]) -> str:
        if match.groups() not in times:
            raise SystemExit(f"{run} has no time of {' '.join(match.groups())}; quote another row")
        op, *case = match.groups()
        ms = times[match.groups()]
        time = f"{ms * 1e3:.1f} µs" if ms < 0.1 else f"{ms:.3g} ms"  # as in benchmarks.md
        return " | ".join([f"| `{op}`", *case, f"{time} |"])

    return re.sub(r"^\| `(\w+)` \| (.*) \| (fresh|heap|out) \| (\d+) \| .* \|$", row, page, flags=re.M)


def swapping(page: str) -> str:
    """The table before and after, and where it was measured."""
    run = stored("docs/swap_recipes.json")
    where = f"{run['date']}, {run['machine']}, torch {run['torch']}, fourfold {run['fourfold']}"
    page = re.sub(r"(?<=`docs/swap_recipes\.json`\n\()[^)]*(?=\))", where, page)
    head = "| recipe | on | before | after |\n| --- | --- | --- | --- |\n"
    before, after = page.split(head)
    rows = "".join(f"| {' | '.join(row)} |\n" for row in run["rows"])
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
