"""What a run looks like: a line per case while it runs, the JSON file, the tables of README and docs."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .harness import Case, Drive, Session, play
from .options import command_of
from .stored import load

try:
    from tqdm import tqdm
except ImportError:  # a bare GPU machine: lines without a bar
    tqdm = None

Result = dict[str, Any]
Document = dict[str, Any]

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
README_RUN = "cpu"  # how the names of the stored runs behind README's tables begin: one run, or one of each family


# --- one result in words --------------------------------------------------------------------------------------------------


def _milliseconds(ms: float) -> str:
    return f"{ms * 1e3:.1f} µs" if ms < 0.1 else f"{ms:.3g} ms"


def _spread(values: dict[str, float], unit: str = "", digits: int = 2) -> str:
    return f"{values['median']:.{digits}f}{unit} ({values['q1']:.{digits}f}–{values['q3']:.{digits}f})"


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count != 1)


def _versus(result: Result) -> str:
    best = result["best_rival"]
    return f"{_spread(result['ratio'][best], '×')} {best}" if best else "–"


def _group(result: Result) -> str | None:
    """The name of its group; runs stored before there were groups don't know the key."""
    return (result.get("group") or {}).get("name")


def run_name(result: Result) -> str:
    """Of the case and its thread count."""
    group = f"{_group(result)}: " if _group(result) else ""
    return f"{result['op']} {group}{result['label']} [{result['state']}] {_threads(result['threads'])}"


def _costs(result: Result) -> str:
    return "; ".join(f"{_spread(cost)} of {yardstick}" for yardstick, cost in result.get("cost", {}).items())


def _rate(result: Result) -> str:
    """How much it handles a second; empty where nothing is counted."""
    if "rate" not in result:
        return ""
    median, what = result["rate"]["per_second"]["median"], result["rate"]["of"]
    if median >= 1e6:
        return f"{median * 1e-6:.0f} M {what}/s"
    return f"{median:.0f} {what}/s" if median >= 100 else f"{median:.3g} {what}/s"


def _share(result: Result) -> str:
    return f"{_spread(result['copy_share'])} of copy_" if "copy_share" in result else ""


def _absences(results: Iterable[Result]) -> list[str]:
    """Who could not take part, and why; runs stored before don't know the key."""
    return list(dict.fromkeys(f"{name}: {why}" for result in results for name, why in result.get("absent", {}).items()))


def _overhead_base(result: Result) -> str:
    base = result.get("overhead_over", "clone")
    return "clone()" if base == "clone" else base


def _saved(result: Result) -> str:
    """What autograd keeps until backward, and how much of it would otherwise be free."""
    return ", ".join(
        f"{who} {saved['bytes'] * 1e-6:.1f} MB ({saved['anew'] * 1e-6:.1f} of it anew)"
        for who, saved in result.get("saved", {}).items()
    )


def _peak(result: Result) -> str:
    """What a call needs in memory beyond what was there before it."""
    return ", ".join(f"{who} {size * 1e-6:.0f} MB" for who, size in result.get("peak", {}).items())


def _gemm_share(result: Result) -> str:
    if "gemm_share" not in result:
        return ""
    dtype = result.get("gemm", "float32")
    return f"{result['gemm_share']:.2f}" + (f" ({dtype})" if dtype != "float32" else "")


def line(result: Result) -> str:
    """A result on the terminal; no speed where the answer was wrong."""
    head = f"{run_name(result)}:"
    for who, complaint in result["wrong"].items():
        head += f" {who} WRONG, no time ({complaint});"
    if result["ours"] in result.get("absent", {}):
        head += f" left out, {result['absent'][result['ours']]}"
    if "ms" not in result:
        return head.rstrip(";")
    ms = _milliseconds(result["ms"][result["ours"]]["median"])
    if "overhead_us" in result:
        goal = result["overhead_goal_us"]
        over = _overhead_base(result).removesuffix("()")
        head += f" {_spread(result['overhead_us'], ' µs', 1)} over {over}" + (f", goal {goal:g} µs" if goal else "")
    else:
        head += " " + ", ".join(filter(None, [ms, _rate(result), _costs(result) or _share(result), _versus(result)]))
        head += f"; {_gemm_share(result)} of the GEMM peak" * ("gemm" in result and result["gemm"] != "float32")
        head += f"; peak memory {_peak(result)}" * ("peak" in result)
    return head + "".join(f"\n    warning: {warning}" for warning in result["warnings"])


def headlines(document: Document) -> list[str]:
    """The facts that every number depends on."""
    machine = document["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    settings = document["settings"]
    kind = ", quick run" * settings["quick"] + f", random shapes of seed {settings['seed']}" * settings["random_shapes"]
    commit = document.get("commit")  # not known to runs stored before, nor where there is no checkout
    versions = f"torch {document['torch']}, fourfold {document['fourfold']}" + f" at {commit}" * bool(commit)
    return [
        f"{device}; ISA tier {document['capability']}; {versions}; {document['date']}{kind}",
        *filter(None, [unfinished(document)]),
        *(f"warning: {warning}" for warning in document["warnings"]),
    ]


def unfinished(document: Document) -> str:
    """How much of what was asked for there is; empty where it is all there. Runs stored before don't know the keys."""
    ran, raised = len(document["results"]), document.get("raised", 0)
    asked = document.get("asked", 0)
    words = [f"{raised} of {asked} cases failed with an error and are left out"] * bool(raised)
    if ran + raised < asked:
        words.insert(0, f"interrupted: {ran} of {asked} cases")
    return "; ".join(words)


def command(document: Document) -> str:
    """The command that measured it; runs stored before it was kept hold what it chose."""
    return document.get("command") or command_of(document["settings"])


def losses(results: Iterable[Result]) -> list[tuple[Result, str]]:
    """(result, rival) wherever even the upper quartile of the ratio says that the rival is faster; the worst first."""
    lost = [(result, name) for result in results for name, ratio in result.get("ratio", {}).items() if ratio["q3"] < 1]
    return sorted(lost, key=lambda pair: pair[0]["ratio"][pair[1]]["median"])


class Progress:
    """Runs the cases of a session one by one and tells how far it is."""

    def __init__(self, session: Session) -> None:
        self.session, self.done = session, 0
        self.absences: set[str] = set()  # told once
        on_screen = tqdm is not None and sys.stderr.isatty()  # in a log file the counted lines are the progress
        self.bar = tqdm(total=session.runs, unit="case", dynamic_ncols=True) if on_screen else None
        for text in headlines(session.document() | {"asked": 0}):  # nothing is missing yet
            self.say(text)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def run(self, case: Case, threads: int, drive: Drive = play) -> Result:
        if self.bar is not None:
            self.bar.set_description(f"{case.op} {case.label}"[:48])
        result = self.session.run(case, threads, drive)
        self.done += 1
        self.say(f"{self.done}/{self.session.runs} {line(result)}")
        for absence in set(_absences([result])) - self.absences if "ms" in result else ():
            self.absences.add(absence)
            self.say(f"    absent from here on: {absence}")
        if self.bar is not None:
            self.bar.update()
        return result

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# --- files ----------------------------------------------------------------------------------------------------------------


def save(session: Session, json_path: Path | None) -> None:
    if json_path:
        replace(json_path, _to_json(whole(session)))


def whole(session: Session) -> Document:
    """What the results file holds."""
    document = session.document()
    return {"command": command(document)} | document


def _to_json(document: Document) -> str:
    """A line per result, so that two runs can be compared by eye; four digits, which is more than a timing has."""
    facts = {key: value for key, value in document.items() if key != "results"}
    results = ",\n".join(json.dumps(_rounded(result), ensure_ascii=False) for result in document["results"])
    return json.dumps(_rounded(facts), indent=1, ensure_ascii=False)[:-2] + f',\n "results": [\n{results}\n]}}\n'


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def replace(path: Path, text: str) -> None:
    """Whole or not at all: results are saved after every case, and a killed run leaves what it had."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


# --- tables ---------------------------------------------------------------------------------------------------------------

COLUMNS = (
    "case",
    "allocation",
    "threads",
    "time",
    "rate",
    "cost over the yardstick",
    "share of copy_",
    "share of GEMM peak",
    "against the best rival",
    "other rivals",
    "saved for backward",
    "peak memory",
)
WHERE_KNOWN = {  # columns for some tables only
    "rate": "rate",
    "cost over the yardstick": "cost",
    "share of copy_": "copy_share",
    "share of GEMM peak": "gemm_share",
    "saved for backward": "saved",
    "peak memory": "peak",
}


def _columns(results: Iterable[Result]) -> list[str]:
    raced = [result for result in results if "overhead_us" not in result]
    known = {key for result in raced for key in WHERE_KNOWN.values() if result.get(key) not in (None, {})}
    return [column for column in COLUMNS if WHERE_KNOWN.get(column) in {None, *known}]


def _row(result: Result, columns: Sequence[str] = COLUMNS) -> list[str]:
    wrong = "; ".join(f"{name}: WRONG, {why}" for name, why in result["wrong"].items())
    cells = {"case": result["label"], "allocation": result["state"], "threads": str(result["threads"]), "other rivals": wrong}
    if "ms" in result:
        cells["time"] = _milliseconds(result["ms"][result["ours"]]["median"]) + " ⚠" * bool(result["warnings"])
    if "overhead_us" in result:
        cells["against the best rival"] = f"{_overhead_base(result)} + {_spread(result['overhead_us'], ' µs', 1)}"
    elif "ms" in result:
        others = [f"{name} {ratio['median']:.2f}×" for name, ratio in result["ratio"].items() if name != result["best_rival"]]
        rest = ", ".join(others) + ("; " + wrong if wrong else "")
        cells |= {
            "rate": _rate(result) or "–",
            "cost over the yardstick": _costs(result) or "–",
            "share of copy_": _spread(result["copy_share"]) if "copy_share" in result else "–",
            "share of GEMM peak": _gemm_share(result) or "–",
            "against the best rival": _versus(result),
            "other rivals": rest or "–",
            "saved for backward": _saved(result) or "–",
            "peak memory": _peak(result) or "–",
        }
    return [cells.get(column, "–") for column in columns]


# --- groups ---------------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float], unit: str = "") -> str:
    """Geometric mean and extremes."""
    return f"{statistics.geometric_mean(values):.2f}{unit} ({min(values):.2f}–{max(values):.2f})"


def _goal(group: dict[str, Any]) -> str:
    goals = [("mean", group["goal"]), ("each", group["limit"])]
    return ", ".join(f"{what} ≤ {goal:.2f}" for what, goal in goals if goal is not None) or "–"


def group_table(results: Iterable[Result]) -> str | None:
    """A row for each group: its mean cost over each yardstick, and the mean ratio of each rival to us."""
    grouped = [result for result in results if _group(result)]
    if not grouped:
        return None
    counts = sorted({result["threads"] for result in grouped})
    header = ["op", "cases", "goal"]
    header += [f"{what}, {_threads(count)}" for count in counts for what in ("cost over", "× rivals")]
    rows = []
    for members in _by(grouped, "op", "group").values():
        raced = [result for result in members if "ms" in result]
        labels = {result["label"] for result in members}
        flawless = {label for label in labels if not any(r["wrong"] for r in members if r["label"] == label)}
        number = str(len(labels)) if flawless == labels else f"{len(flawless)} of {len(labels)} without a WRONG"
        row = [f"`{members[0]['op']}`", f"{_group(members[0])}: {number}", _goal(members[0]["group"])]
        for count in counts:
            mine = [result for result in raced if result["threads"] == count]
            for key, unit, of in (("cost", "", "of "), ("ratio", "×", "")):
                medians: dict[str, list[float]] = {}
                for result in mine:
                    for name, ratio in result[key].items():
                        medians.setdefault(name, []).append(ratio["median"])
                row.append("; ".join(f"{_mean(values, unit)} {of}{name}" for name, values in medians.items()) or "–")
        rows.append(row)
    return _markdown_table(header, rows)


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def _by(results: Iterable[Result], *keys: str) -> dict[Any, list[Result]]:
    """Results alike in these; "group" means its name."""
    found: dict[Any, list[Result]] = {}
    for result in results:
        found.setdefault(tuple(_group(result) if key == "group" else result[key] for key in keys), []).append(result)
    return found


def _sections(document: Document) -> Iterator[tuple[str, str | None, list[Result]]]:
    """The results of each op, group by group."""
    for (op,), of in _by(document["results"], "op").items():
        for (group,), results in _by(of, "group").items():
            yield op, group, results


def _heading(op: str, group: str | None) -> str:
    return f"{op}: {group}" if group else op


def _legend(document: Document) -> str:
    used = sorted({result["state"] for result in document["results"]})
    states = " ".join(f"Allocation *{state}*: {document['states'][state]}." for state in used)
    yardsticks = (
        "A yardstick does less than the op, so it is checked against its own reference and no rival; the cost is our time over "
        "its, above 1 we are slower. A group is judged by the geometric mean over its cases, extremes in brackets. Saved for "
        "backward is what autograd keeps, *anew* what neither the arguments nor the results keep alive anyway. A convolution's "
        "flops are those without coordinates. "
    ) * any(result.get("cost") for result in document["results"])
    others = sorted({result.get("gemm", "float32") for result in document["results"]} - {"float32"})
    gemms = f"A share of the GEMM peak with a type in brackets is against a matmul of that type ({', '.join(others)}). "
    peaks = "Peak memory is what a call needs at its height beyond what was there before it, its result included. "
    more = gemms * bool(others) + peaks * any("peak" in result for result in document["results"])
    return (
        "Medians with quartiles in brackets. A ratio is taken within each round, in which ours and every rival run once; "
        "above 1 we are faster. The share of `copy_` is against a copy of as many bytes into a warm tensor, the share of the "
        "GEMM peak against a float32 matmul; flops are those of the matrix form. ⚠: the machine was not quiet. "
        f"{yardsticks}{more}{states}"
    )


def readme_runs(documents: dict[str, Document]) -> dict[str, Document]:
    """The stored runs that README shows: those of one kind of machine."""
    return {name: document for name, document in documents.items() if name.startswith(README_RUN)}


def readme_table(documents: dict[str, Document]) -> str:
    """README's table, a row for each op of each run, so that no case is picked: the mean, the weakest and the strongest."""
    runs = {name: _link(name) for name in documents}
    header = ["op", "cases", "× best rival, 1 thread", "2 threads", "cost over plain", "weakest case", "run"]
    rows, overheads, machines, noise = [], [], {}, []
    for name, document in documents.items():
        results = document["results"]
        machines.setdefault(headlines(document)[0], []).append(runs[name])
        overheads += [(result["overhead_us"]["median"], result) for result in results if "overhead_us" in result]
        cases = [result for result in results if "overhead_us" not in result]
        rows += [[*_digest(of_op), runs[name]] for of_op in _by(cases, "op").values()]
        loud = sum(bool(result["warnings"]) for result in cases)
        noise += [f"{loud} of {len(cases)} in {name.removesuffix('.json')}"] * bool(loud)
    counted = [result for document in documents.values() for result in document["results"] if result.get("ratio")]
    clearly = {id(result) for document in documents.values() for result, _ in losses(document["results"])}
    median = [result for result in counted if any(ratio["median"] < 1 for ratio in result["ratio"].values())]
    parts = ["; ".join(f"{', '.join(links)}: {machine}" for machine, links in machines.items()) + "."]
    parts.append(
        "Geometric means over all cases of an op, in whatever allocation state, extremes in brackets; of each case the ratio "
        "to the strongest rival counts, and above 1 we are faster. Cost over plain: our time over that of the operation "
        "without what we add, such as a convolution without coordinates, at one thread."
    )
    parts.append(_markdown_table(header, rows))
    if overheads:
        (least, first), (most, last) = (choose(overheads, key=lambda pair: pair[0]) for choose in (min, max))
        parts.append(
            f"A call of these ops costs {least:.1f} µs (`{first['op']}` {first['label']}) to {most:.1f} µs (`{last['op']}` "
            f"{last['label']}) more than the plain one."
        )
    parts.append(
        f"Of {len(counted)} stored rows with rivals, one of them is faster by the median in {len(median)}, and beyond the "
        f"quartiles in {len(clearly)}; [docs/benchmarks.md](docs/benchmarks.md) lists those first, then every case with "
        "quartiles, all rivals, memory, and where its shape comes from."
    )
    parts += [f"The machine was not quiet during some rows: {', '.join(noise)}."] * bool(noise)
    return "\n\n".join(parts)


def _link(name: str) -> str:
    return f"[{name.removesuffix('.json')}](benchmarks/results/{name})"


def _digest(results: list[Result]) -> list[str]:
    """One op's cells."""

    def best(result: Result) -> float:
        return float(result["ratio"][result["best_rival"]]["median"])

    def mean(values: list[float], unit: str) -> str:
        return _mean(values, unit) if len(values) > 1 else "".join(f"{value:.2f}{unit}" for value in values) or "–"

    everything, raced = (
        {(_group(r), r["label"], r["state"]) for r in part} for part in (results, [r for r in results if r.get("ratio")])
    )
    cells = [f"`{results[0]['op']}`", str(len(raced)) + f" of {len(everything)}" * (raced != everything)]
    results = [result for result in results if result.get("ratio")]
    for count in (1, 2):
        ratios = [best(result) for result in results if result["threads"] == count and result["best_rival"]]
        cells.append(mean(ratios, "×"))
    if not results:
        return [*cells, "–", "–"]
    one = [result for result in results if result["threads"] == min(r["threads"] for r in results)]
    costs = [cost["median"] for result in one for cost in (result.get("cost") or {}).values()]
    weakest = min((result for result in one if result["best_rival"]), key=best, default=None)
    cells.append(mean(costs, ""))
    if weakest is None:
        return [*cells, "–"]
    group = f"{_group(weakest)}: " if _group(weakest) else ""
    return [*cells, f"{group}{weakest['label']} [{weakest['state']}], beside {weakest['best_rival']}"]


def into_readme(readme: str, documents: dict[str, Document]) -> str:
    """`readme` with what stands between the markers replaced by the tables."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README must hold {BEGIN} and {END} once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{readme_table(documents)}\n{END}{rest.split(END)[1]}"


def docs_page(documents: dict[str, Document]) -> str:
    """docs/benchmarks.md: every case of every stored run. documents: file name -> run."""
    parts = [
        "# Benchmarks",
        (
            "Generated from the runs stored in `benchmarks/results` by `python -m fourfold.benchmarks --render`; not edited "
            "by hand. Run your own with `python -m fourfold.benchmarks`; `--compare OLD.json` then says what has changed since "
            "a stored run, and `--from RUN.json --report FILE.html` makes a page with charts and sortable tables of one."
        ),
    ]
    for name, document in documents.items():
        stored = f"Stored in `benchmarks/results/{name}` by `{command(document)}`"
        parts += [f"## {name.removesuffix('.json')}", "  \n".join([stored, *headlines(document)]), _legend(document)]
        parts += [_where_we_lose(document)]
        summary = group_table(document["results"])
        parts += [summary] * (summary is not None)
        for op, group, results in _sections(document):
            columns = _columns(results)
            parts += [f"### {_heading(op, group)}", _markdown_table(columns, (_row(result, columns) for result in results))]
            parts += ["Absent: " + "; ".join(_absences(results)) + "."] if _absences(results) else []
        parts += [_markdown_table(("shape", "where it comes from"), sorted(_sources(document)))]
    return "\n\n".join(parts) + "\n"


def _where_we_lose(document: Document) -> str:
    """A sentence, and a row for each loss."""
    lost, raced = losses(document["results"]), [result for result in document["results"] if result.get("ratio")]
    if not raced:
        return "No rivals raced in this run."
    rule = "with the upper quartile of their ratio below 1"
    if not lost:
        return f"Where we lose: in none of {len(raced)} rows with rivals is any of them faster than we are, {rule}."
    cases = len({run_name(result) for result, _ in lost})
    rows = [(f"`{result['op']}`", _place(result), f"{_spread(result['ratio'][name], '×')} {name}") for result, name in lost]
    intro = f"Where we lose: in {cases} of {len(raced)} rows with rivals one or more of them are faster, {rule}:"
    return f"{intro}\n\n{_markdown_table(('op', 'case', 'ratio'), rows)}"


def _place(result: Result) -> str:
    """Which case of its op."""
    return run_name(result).removeprefix(f"{result['op']} ")


def _sources(document: Document) -> set[tuple[str, str]]:
    return {(f"{result['op']} {result['label']}", result["source"]) for result in document["results"]}


def render_checkout(root: Path) -> list[Path]:
    """Rewrite README's table and docs/benchmarks.md of the checkout at `root` from its stored runs."""
    stored = sorted((root / "benchmarks" / "results").glob("*.json"), key=lambda path: path.stem)
    documents = {path.name: load(path) for path in stored}
    if not readme_runs(documents):
        raise FileNotFoundError(f"benchmarks/results/{README_RUN}.json is missing: store a run there with --json")
    readme, page = root / "README.md", root / "docs" / "benchmarks.md"
    replace(readme, into_readme(readme.read_text(encoding="utf-8"), readme_runs(documents)))
    replace(page, docs_page(documents))
    return [readme, page]
