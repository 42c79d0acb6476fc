"""The HTML report: one file that needs nothing beside it, readable without JavaScript, sortable with it."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .comparison import Comparison, compare
from .harness import Session
from .report import (
    Document,
    Result,
    _absences,
    _columns,
    _gemm_share,
    _heading,
    _legend,
    _milliseconds,
    _place,
    _row,
    _sections,
    _spread,
    command,
    headlines,
    line,
    load,
    losses,
    replace,
    run_name,
    save,
    unfinished,
    whole,
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 2.5rem; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; text-align: left; cursor: pointer; }
th button::after { content: " \\2195"; color: #888; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: " \\2193"; color: inherit; }
dt { font-weight: bold; float: left; clear: left; width: 11rem; }
dd { margin-left: 11.5rem; }
.warning { color: #a40; } .wrong { color: #b00; font-weight: bold; }
svg { max-width: 100%; height: auto; }
"""

# A column with numbers (data-value) sorts by them, largest first at the first click; what has none comes last either way.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      const value = (row) => row.cells[place].dataset.value;
      const numeric = rows.some((row) => value(row) !== undefined);
      const before = head.getAttribute("aria-sort");
      const up = before === null ? !numeric : before === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (numeric) {
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
          return up ? x - y : y - x;
        }
        const order = a.cells[place].textContent.localeCompare(b.cells[place].textContent, "en", { numeric: true });
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
"""

Cell = tuple[str, float | None]  # its text, and what it is sorted by where that is a number


def finish(session: Session, json_path: Path | None, html_path: Path | None, old: Path | None) -> None:
    """At the end of a run, or where it was stopped: its files, and what there is to say of it. Without a result no file."""
    if session.results:
        save(session, json_path)
        publish(whole(session), html_path, old)
    elif unfinished(session.document()):
        print(unfinished(session.document()))


def publish(document: Document, html_path: Path | None, old: Path | None) -> None:
    """Writes the page, says what has changed since the run stored in `old`, and whether there is more to run."""
    comparison = compare(load(old), document, old.name) if old else None
    if html_path:
        replace(html_path, render_html(document, comparison))
    if comparison:
        print(comparison)
    if unfinished(document):
        print(unfinished(document))


def render_html(document: Document, comparison: Comparison | None = None) -> str:
    """Facts, what changed, where we lose, every case in a table; then per op and group two charts and the table under them."""
    escape = html.escape
    first, *warnings = headlines(document)
    body = ["<h1>fourfold benchmarks</h1>", f"<p>{escape(first)}</p>"]
    body += [f'<p class="warning">{escape(text)}</p>' for text in warnings]
    body += [_facts(document), f"<p>{_inline(_legend(document))}</p>"]
    body += _changes(comparison) if comparison else []
    body += _lost(document["results"])
    body += ["<h2>Every case</h2>", _every_case(document["results"])]
    for op, group, results in _sections(document):
        columns = _columns(results)
        body += [f"<h2>{escape(_heading(op, group))}</h2>", _charts(results)]
        rows = [list(zip(_row(result, columns), _numbers(result, columns), strict=True)) for result in results]
        body.append(_table(columns, rows, [bool(result["wrong"]) for result in results]))
        body += [f'<p class="warning">Absent: {escape(text)}</p>' for text in _absences(results)]
    noted = [(line(result).split("\n")[0], text) for result in document["results"] for text in result["warnings"]]
    if noted:
        items = "".join(f"<li>{escape(text)} — {escape(where)}</li>" for where, text in noted)
        body.append(f'<h2>Where the machine was not quiet</h2><ul class="warning">{items}</ul>')
    body.append(f"<h2>Build</h2><pre>{escape(json.dumps(document['build'], indent=1))}</pre>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fourfold benchmarks</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}<script>{SCRIPT}</script></body></html>\n"
    )


def _inline(markdown: str) -> str:
    """The two marks of the legend, which docs/benchmarks.md shares."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(markdown))
    return re.sub(r"\*(\w+)\*", r"<em>\1</em>", text)


def _table(columns: Iterable[str], rows: Iterable[Sequence[Cell]], wrong: Iterable[bool] = ()) -> str:
    """With a head that the script makes sortable."""
    marks = iter(wrong)
    lines = []
    for row in rows:
        kind = ' class="wrong"' if next(marks, False) else ""
        lines.append(f"<tr{kind}>{''.join(_td(*cell) for cell in row)}</tr>")
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _td(text: str, value: float | None) -> str:
    number = "" if value is None else f' data-value="{value:.6g}"'
    return f"<td{number}>{html.escape(text)}</td>"


def _facts(document: Document) -> str:
    """Of the machine, of what ran on it, and how."""
    machine = document["machine"]
    peaks = {
        f"GEMM peak, threads {key}": f"{peak * 1e-9:.0f} GFLOP/s measured" for key, peak in document["gemm_peak_flops"].items()
    }
    facts = {
        "command": command(document),
        "date": document["date"],
        "fourfold": " at ".join(filter(None, (document["fourfold"], document.get("commit")))),
        "torch": document["torch"],
        "processor": f"{machine['cpu']}, {machine['cores']} cores, ISA tier {document['capability']}",
        **({"GPU": machine["gpu"]} if "gpu" in machine else {}),
        "memory": f"{machine['memory_gib']} GiB",
        "kernel": machine["kernel"],
        "Python": machine["python"],
        **peaks,
    }
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items()) + "</dl>"


def _changes(comparison: Comparison) -> list[str]:
    columns = ("change", "case", "ratio or cost, before → after", "share of the machine", "time")
    rows = [[(text, None) for text in (row.change, row.name, row.against, row.share, row.time)] for row in comparison.rows]
    words = "; ".join([*comparison.heading, comparison.summary])
    return ["<h2>What changed</h2>", f"<p>{html.escape(words)}.</p>", _table(columns, rows)]


def _lost(results: list[Result]) -> list[str]:
    lost, raced = losses(results), sum(bool(result.get("ratio")) for result in results)
    cases = len({run_name(result) for result, _ in lost})
    words = (
        f"In {cases} of {raced} rows with rivals one or more of them are faster than we are: the upper quartile of their ratio "
        "is below 1."
    )
    parts = ["<h2>Where we lose</h2>", f"<p>{words}</p>"]
    rows = [
        [(result["op"], None), (_place(result), None), (name, None), _ratio(result, name), _time(result)]
        for result, name in lost
    ]
    return [*parts, _table(("op", "case", "rival", "rival's time / ours", "our time"), rows)] if lost else parts


def _ratio(result: Result, rival: str) -> Cell:
    return _spread(result["ratio"][rival], "×"), result["ratio"][rival]["median"]


def _time(result: Result) -> Cell:
    ms = result["ms"][result["ours"]]["median"]
    return _milliseconds(ms), ms


EVERY = ("op", "case", "time", "rival's time / ours", "best rival", "share of copy_", "share of GEMM peak", "call overhead")
NOTHING: Cell = ("–", None)


def _every_case(results: list[Result]) -> str:
    """A row for each: time, ratio to the best rival with its quartiles, shares of what the machine gives."""
    rows: list[list[Cell]] = []
    for result in results:
        best, copied, over = result.get("best_rival"), result.get("copy_share"), result.get("overhead_us")
        rows.append(
            [
                (result["op"], None),
                (_place(result), None),
                _time(result) if "ms" in result else NOTHING,
                _ratio(result, best) if best else NOTHING,
                (best or "–", None),
                (_spread(copied), copied["median"]) if copied else NOTHING,
                (_gemm_share(result), result["gemm_share"]) if "gemm_share" in result else NOTHING,
                (_spread(over, " µs", 1), over["median"]) if over else NOTHING,
            ]
        )
    return _table(EVERY, rows, [bool(result["wrong"]) for result in results])


def _numbers(result: Result, columns: Sequence[str]) -> list[float | None]:
    """What each cell of a row is sorted by, where that is a number."""
    ours, found = result["ours"], {"threads": result["threads"]}
    if "ms" in result:
        found["time"] = result["ms"][ours]["median"]
    if "rate" in result:
        found["rate"] = result["rate"]["per_second"]["median"]
    if result.get("cost"):
        found["cost over the yardstick"] = next(iter(result["cost"].values()))["median"]
    if "copy_share" in result:
        found["share of copy_"] = result["copy_share"]["median"]
    if "gemm_share" in result:
        found["share of GEMM peak"] = result["gemm_share"]
    if result.get("best_rival"):
        found["against the best rival"] = result["ratio"][result["best_rival"]]["median"]
    if "saved" in result:
        found["saved for backward"] = result["saved"][ours]["bytes"]
    if "peak" in result:
        found["peak memory"] = result["peak"][ours]
    return [found.get(column) for column in columns]


def _charts(results: list[Result]) -> str:
    """Two bar charts as inline SVG: cost over the yardstick, share of copy_ or rate, and the ratio to each rival."""
    raced = [result for result in results if "ms" in result and "overhead_us" not in result]
    if not raced:
        return ""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError:
        return '<p class="warning">No charts: matplotlib is missing (pip install "fourfold[plot]").</p>'
    labels = [f"{result['label']} [{result['state']}] {result['threads']}t" for result in raced]
    rivals = list(dict.fromkeys(name for result in raced for name in result["ratio"]))
    most = max(1, *(len(result["ratio"]) for result in raced))
    figure = Figure(figsize=(14, 1.2 + len(raced) * (0.18 + 0.1 * most)), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(raced))

    def whiskers(spreads: list[dict[str, float]]) -> list[list[float]]:
        return [[s["median"] - s["q1"] for s in spreads], [s["q3"] - s["median"] for s in spreads]]

    title, shares = _left_bars(raced)
    left.barh(rows, [s["median"] for s in shares], xerr=whiskers(shares), height=0.6, color="#3b6ea5")
    if "/s" not in title:
        left.axvline(1, color="#888", linewidth=0.8)
    left.set(title=f"{title} (whiskers: quartiles)", yticks=rows, yticklabels=labels, ylim=(len(raced) - 0.4, -0.6))
    height = 0.85 / most
    for name in rivals:
        mine = [(row, list(result["ratio"]).index(name), result) for row, result in enumerate(raced) if name in result["ratio"]]
        places = [row + (place - (len(result["ratio"]) - 1) / 2) * height for row, place, result in mine]
        spreads = [result["ratio"][name] for *_, result in mine]
        # From 1 on: a bar to the right is a rival slower than we are, one to the left a faster one.
        right.barh(places, [s["median"] - 1 for s in spreads], left=1, xerr=whiskers(spreads), height=height, label=name)
    right.axvline(1, color="#888", linewidth=0.8)
    right.set(title="time of a rival / ours", xscale="log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.xaxis.set_minor_locator(NullLocator())
    if rivals:
        figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    return drawing.getvalue()[drawing.getvalue().index("<svg") :]


def _left_bars(raced: list[Result]) -> tuple[str, list[dict[str, float]]]:
    """What tells most among what all of these results have."""
    if all(result.get("cost") for result in raced):
        return "cost over the yardstick", [next(iter(result["cost"].values())) for result in raced]
    if all("copy_share" in result for result in raced):
        return "share of copy_", [result["copy_share"] for result in raced]
    if all("rate" in result for result in raced):
        return f"{raced[0]['rate']['of']}/s", [result["rate"]["per_second"] for result in raced]
    return "ms", [result["ms"][result["ours"]] for result in raced]
