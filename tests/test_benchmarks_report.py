"""What is made of a run: where we lose, what has changed since another one, and a page that needs nothing beside it."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import fourfold
import pytest
import torch
from fourfold.benchmarks import __main__ as program
from fourfold.benchmarks import comparison, harness, report, report_html
from fourfold.benchmarks import stored as stored_run
from fourfold.benchmarks.options import command_of

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark; run: pip install pytest-benchmark")

ROOT = Path(__file__).parent.parent
Spread = dict[str, float]


def spread(median: float, width: float = 0.01) -> Spread:
    """Quartiles a hundredth off, extremes twice that."""
    steps = {"min": -2, "q1": -1, "median": 0, "q3": 1, "max": 2}
    return {name: median * (1 + width * step) for name, step in steps.items()}


def result(label: str, ms: float = 1.0, **ratios: float) -> report.Result:
    """Of a case with these rivals."""
    times = {"fourfold": spread(ms)} | {name: spread(ms * ratio) for name, ratio in ratios.items()}
    return {
        "family": "toy",
        "op": "double",
        "group": None,
        "label": label,
        "state": "heap",
        "threads": 1,
        "bytes": 800,
        "flops": 100,
        "source": "made up",
        "ours": "fourfold",
        "tolerance": "0 + 0·|reference|",
        "errors": {},
        "wrong": {},
        "absent": {},
        "warnings": [],
        "rounds": 7,
        "ms": times,
        "ratio": {name: spread(ratio) for name, ratio in ratios.items()},
        "cost": {},
        "best_rival": min(ratios, key=ratios.__getitem__) if ratios else None,
        "copy_share": spread(0.5),
        "gemm_share": 0.25,
    }


def document(*results: report.Result, **changes) -> report.Document:
    settings = {"quick": False, "device": "cpu", "threads": [1, 2], "family": None, "op": None, "match": None}
    given = {
        "fourfold_benchmarks": 1,
        "machine": {"cpu": "a processor", "cores": 2, "memory_gib": 8, "kernel": "6.1", "python": "3.11.7"},
        "torch": "2.13.0",
        "fourfold": "0.1.0",
        "build": {"compiler": "a <compiler>"},
        "capability": "avx2",
        "date": "2026-01-02",
        "settings": settings | {"random_shapes": False, "seed": 5, "only_ours": False, "seconds": None},
        "states": harness.STATES,
        "gemm_peak_flops": {"1": 1e11},
        "warnings": [],
        "results": list(results),
    }
    return given | changes


# --- where a run comes from -----------------------------------------------------------------------------------------------


def test_a_run_names_its_command():
    settings = document()["settings"]
    assert command_of(settings) == "python -m fourfold.benchmarks --threads=1,2"
    chosen = settings | {"match": "a b", "quick": True, "seconds": 95.0, "random_shapes": True}
    words = "'--match=a b' --seconds=95.0 --threads=1,2 --seed=5 --quick --random-shapes"
    assert sorted(command_of(chosen).split(" --")) == sorted(f"python -m fourfold.benchmarks {words}".split(" --"))
    assert report.command(document(command="kept")) == "kept"
    assert report.command(document()) == command_of(settings)  # of a run that was stored before commands were


def test_docs_and_readme_name_the_file_that_each_number_comes_from():
    run = document(result("a", sound=2.0), command="python -m fourfold.benchmarks --op=double", commit="abc123 with changes")
    page = report.docs_page({"cpu-toy.json": run})
    assert "Stored in `benchmarks/results/cpu-toy.json` by `python -m fourfold.benchmarks --op=double`" in page
    assert "fourfold 0.1.0 at abc123 with changes; 2026-01-02" in page
    table = report.readme_table({"cpu-toy.json": run})
    assert table.startswith("[cpu-toy](benchmarks/results/cpu-toy.json): a processor, 2 cores, 8 GiB")
    assert all(
        line.endswith("| [cpu-toy](benchmarks/results/cpu-toy.json) |") for line in table.splitlines() if "`double`" in line
    )


def test_readme_has_a_row_for_each_op():
    """With the mean of its cases and their extremes, the weakest by name; what loses or is wrong is counted."""
    results = [
        result("weak", sound=0.5, rival=2.0),
        result("strong", sound=8.0),
        result("strong", sound=3.0) | {"threads": 2},
        result("even", sound=2.0),
        result("wrong") | {"wrong": {"fourfold": "off"}},
    ]
    [row] = [line for line in report.readme_table({"cpu.json": document(*results)}).splitlines() if "`double`" in line]
    link = "[cpu](benchmarks/results/cpu.json)"
    assert row == f"| `double` | 3 of 4 | 2.00× (0.50–8.00) | 3.00× | – | weak [heap], beside sound | {link} |"
    text = report.readme_table({"cpu.json": document(*results)})
    assert "Of 4 stored rows with rivals, one of them is faster by the median in 1, and beyond the quartiles in 1;" in text
    assert "The machine was not quiet" not in text
    loud = document(*results, result("loud", sound=1.0) | {"warnings": ["others worked"]})
    assert "during some rows: 1 of 6 in cpu." in report.readme_table({"cpu.json": loud})


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git repository with something like fourfold in it, and where we are."""
    for path in ("python/fourfold/__init__.py", "benchmarks/__init__.py", "triton_kernels/__init__.py"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("'first'\n")
    for words in (("init", "-q"), ("add", "."), ("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "first")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def installed(checkout: Path) -> Path:
    """As a wheel lays it out."""
    package = checkout / "site" / "fourfold"
    for folder, place in harness.INSTALLED:
        (package / place).mkdir(parents=True, exist_ok=True)
        (package / place / "__init__.py").write_bytes((checkout / folder / "__init__.py").read_bytes())
    return package


def test_a_run_names_the_commit_and_whether_it_is_what_ran(checkout, monkeypatch):
    package = installed(checkout)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True).stdout
    found = harness.commit(package)
    assert found is not None and len(found) == 12 and head.startswith(found)
    (package / "benchmarks" / "__init__.py").write_text("'another'\n")
    assert harness.commit(package) == f"{found} with changes"  # what is installed is not what is checked out
    (checkout / "benchmarks" / "__init__.py").write_text("'another'\n")
    assert harness.commit(package) == f"{found} with changes"  # what is checked out is not what was committed
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout.parent.parent))
    monkeypatch.chdir(checkout.parent)
    assert harness.commit(package) is None


def test_stored_runs_say_where_they_come_from():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        run = report.load(path)
        assert run["date"] and run["fourfold"] and run["machine"]["cpu"], path.name
        assert report.command(run).startswith("python -m fourfold.benchmarks "), path.name


# --- where we lose --------------------------------------------------------------------------------------------------------


def test_a_loss_is_where_the_upper_quartile_is_below_one():
    results = [result("a", near=0.992, far=0.5), result("b", sound=2.0), result("c", near=0.98)]
    assert [(lost["label"], name) for lost, name in report.losses(results)] == [("a", "far"), ("c", "near")]
    page = report.docs_page({"run.json": document(*results)})
    assert "Where we lose: in 2 of 3 rows with rivals one or more of them are faster" in page
    assert "| `double` | a [heap] 1 thread | 0.50× (0.49–0.51) far |" in page
    page = report.docs_page({"run.json": document(results[1])})
    assert "Where we lose: in none of 1 rows with rivals is any of them faster than we are" in page
    assert "No rivals raced in this run." in report.docs_page({"run.json": document(result("alone"))})


# --- what has changed -----------------------------------------------------------------------------------------------------


def changes(old: report.Document, new: report.Document) -> dict[str, str]:
    return {row.name.split()[1]: row.change for row in comparison.compare(old, new, "old.json").rows}


def test_a_case_has_changed_where_quartiles_do_not_overlap():
    old = document(*(result(label, sound=2.0) for label in ("faster", "slower", "same", "gone")))
    new = document(
        result("faster", 0.9, sound=2.2), result("slower", 1.1, sound=1.8), result("same", sound=2.03), result("new", sound=1.0)
    )
    assert changes(old, new) == {name: name for name in ("faster", "slower", "new", "gone")} | {"same": "within the spread"}
    found = comparison.compare(old, new, "old.json")
    assert found.summary == "1 faster, 1 slower, 1 within the spread, 1 new, 1 gone"
    text = str(found).splitlines()
    assert text[0] == "Compared with old.json, of 2026-01-02, fourfold 0.1.0: ratios and times before → after"
    assert text[1] == (
        "faster: double faster [heap] 1 thread: 2.00× (1.98–2.02) → 2.20× (2.18–2.22) sound, "
        "0.50 → 0.50 of copy_, 0.25 → 0.25 of the GEMM peak, 1 ms (0.99 ms–1.01 ms) → 0.9 ms (0.891 ms–0.909 ms)"
    )


def test_the_ratio_is_to_a_rival_of_both_and_another_best_one_is_named():
    old = document(result("a", sound=2.0, lost=1.5))
    new = document(result("a", sound=3.0, stronger=1.2))
    [row] = comparison.compare(old, new, "old.json").rows
    assert row.change == "faster" and row.against == "2.00× (1.98–2.02) → 3.00× (2.97–3.03) sound; best rival lost → stronger"


def test_without_a_common_rival_the_yardstick_and_then_the_time_decide():
    old, new = result("a", 1.0, old_one=2.0), result("a", 0.5, new_one=2.0)
    assert changes(document(old), document(new)) == {"a": "faster"}
    costs = [given | {"cost": {"floor": spread(cost)}} for given, cost in ((old, 1.0), (new, 1.2))]
    assert changes(*map(document, costs)) == {"a": "slower"}
    over = [given | {"overhead_us": spread(cost), "cost": {}} for given, cost in ((result("a"), 9.0), (result("a"), 5.0))]
    [row] = comparison.compare(*map(document, over), "old.json").rows
    assert row.change == "faster" and row.time == "9.0 µs (8.9–9.1) → 5.0 µs (5.0–5.0) of call overhead"


@pytest.mark.parametrize("fact", ["machine", "capability"])
def test_times_of_different_machines_are_not_compared(fact):
    old = document(result("a", 1.0, sound=2.0), result("alone", 1.0))
    new = copy.deepcopy(document(result("a", 0.1, sound=2.0), result("alone", 0.1)))
    if fact == "machine":
        new["machine"]["cpu"] = "a newer one"
    else:
        new["capability"] = "avx512"
    found = comparison.compare(old, new, "old.json")
    assert "another machine (" in found.heading[1] and "times are not compared" in found.heading[1]
    assert [row.change for row in found.rows] == ["within the spread", "not compared (times of different machines)"]
    assert found.summary == "1 within the spread, 1 not compared (times of different machines)"
    assert not any(row.time for row in found.rows) and " ms" not in str(found)


def test_a_call_s_cost_is_timed_but_not_compared_with_another_machine_s():
    cost = {"overhead_us": spread(9.0), "overhead_goal_us": None, "ratio": {}, "best_rival": None}
    call = {key: value for key, value in result("a").items() if key not in {"copy_share", "gemm_share"}} | cost
    old, new = document(call), document(call)
    new["machine"] = new["machine"] | {"cores": 4}
    [row] = comparison.compare(old, new, "old.json").rows
    assert str(row) == "not compared (times of different machines): double a [heap] 1 thread"


def test_what_an_interrupted_run_did_not_reach_is_not_gone():
    old = document(result("a", sound=2.0), result("b", sound=2.0), asked=2)
    found = comparison.compare(old, document(result("a", sound=2.0), asked=2), "old.json")
    assert found.summary == "1 within the spread"
    assert found.heading[1:] == [
        "this run was interrupted: 1 of 2 cases",
        "1 cases of old.json have no result in this run",
    ]
    found = comparison.compare(old | {"asked": 5}, old, "old.json")
    assert found.heading[1:] == ["old.json was interrupted: 2 of 5 cases"]


def test_what_was_not_asked_for_is_not_gone():
    old = document(result("a", sound=2.0), result("b", sound=2.0))
    new = document(result("a", sound=2.0))
    new["settings"] = new["settings"] | {"op": "double", "match": "a"}
    found = comparison.compare(old, new, "old.json")
    assert [row.change for row in found.rows] == ["within the spread"]
    assert found.heading[1].startswith("1 cases of old.json were not asked for by python -m fourfold.benchmarks --op=double")


def test_a_wrong_answer_has_no_time_to_compare():
    wrong = {key: value for key, value in result("a", sound=2.0).items() if key not in {"ms", "ratio", "best_rival", "cost"}}
    wrong["wrong"] = {"fourfold": "why"}
    assert changes(document(result("a", sound=2.0)), document(wrong)) == {"a": "not timed in both"}


def stored(folder: Path, name: str, run: report.Document) -> Path:
    (folder / name).write_text(json.dumps(run))
    return folder / name


def test_two_stored_runs_are_compared_without_measuring(tmp_path, capsys):
    old = stored(tmp_path, "old.json", document(result("a", sound=2.0)))
    new = stored(tmp_path, "new.json", document(result("a", sound=3.0)))
    page = tmp_path / "page.html"
    assert program.main([f"--from={new}", f"--compare={old}", f"--report={page}"]) == 0
    told = capsys.readouterr().out
    assert "faster: double a [heap] 1 thread: 2.00×" in told and "1 faster" in told and f"wrote {page}" in told
    assert "What changed" in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "old.json", "page.html"]
    assert program.main([f"--from={new}"]) == 0
    told = capsys.readouterr().out
    assert "a processor, 2 cores" in told and "double a [heap] 1 thread: 1 ms" in told


@pytest.mark.parametrize("option", ["--from", "--compare"])
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "can't be read (No such file or directory)"),
        (b"{}", "must be a results file of fourfold.benchmarks, schema 1"),
        (b"[]", "must be a results file of fourfold.benchmarks, schema 1"),
        (b"no", "it is broken or cut off (Expecting"),
        (b'{"fourfold_benchmarks": 1, "res', "it is broken or cut off (Unterminated string"),
        (b"\x94\x00\xff", "is no text ("),
        (b'{"fourfold_benchmarks": 1}', "the run: 'machine' is missing"),
    ],
)
def test_what_is_no_stored_run_is_refused(tmp_path, capsys, option, text, complaint):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(SystemExit) as stopped:
        program.main([f"{option}={path}"])
    told = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(told) == 2 and f"error: {path}: " in told[1] and complaint in told[1]


def broken_runs() -> Iterator[tuple[report.Document, str]]:
    """A run that lacks something or has something else there, and what is to be said."""
    row = result("a", sound=2.0)
    for key in stored_run.DOCUMENT:
        yield {name: value for name, value in document(row).items() if name != key}, f"the run: {key!r} is missing"
        yield document(row) | {key: 1.5}, f"the run: {key!r} must be "
    for part, keys in (("machine", stored_run.MACHINE), ("settings", stored_run.SETTINGS)):
        for key in keys:
            whole = document(row)[part]
            yield document(row) | {part: {k: v for k, v in whole.items() if k != key}}, f"{part}: {key!r} is missing"
    for key in (*stored_run.ROW, "ratio", "best_rival"):
        yield document(row, {k: v for k, v in row.items() if k != key}), f"result 2 of 2: {key!r} is missing"
    for key in stored_run.SPREAD:
        less = {k: v for k, v in spread(1.0).items() if k != key}
        yield document(row | {"ms": {"fourfold": less}}), f"result 1 of 1: 'ms' of 'fourfold': {key!r} is missing"
        yield document(row | {"ratio": {"sound": less}}), f"result 1 of 1: 'ratio' of 'sound': {key!r} is missing"
        yield document(row | {"copy_share": less}), f"result 1 of 1: 'copy_share': {key!r} is missing"
    yield document(row | {"ms": {"sound": spread(1.0)}}), "result 1 of 1: 'ms' has nothing of 'fourfold'"
    yield document(row | {"ms": {"fourfold": 3}}), "result 1 of 1: 'ms' of 'fourfold' must be an object, got int"
    yield document(row | {"best_rival": "nobody"}), "result 1 of 1: its best rival 'nobody' has no ratio"
    yield document(row | {"state": "solid"}), "result 1 of 1: its state 'solid' is none of out, heap, fresh"
    yield document(row | {"overhead_us": spread(1.0)}), "result 1 of 1: 'overhead_goal_us' is missing"
    yield document(row, 3), "result 2 of 2 must be an object, got int"


def test_a_run_that_lacks_something_is_refused_with_the_name_of_its_file(tmp_path):
    cases = list(broken_runs())
    assert len(cases) > 50
    for run, complaint in cases:
        with pytest.raises(ValueError, match=re.escape(complaint)) as refused:
            report.load(stored(tmp_path, "broken.json", run))
        assert str(refused.value).startswith(f"{tmp_path / 'broken.json'}: {complaint}"), complaint


def test_a_stored_run_that_was_interrupted_says_so(tmp_path, capsys):
    run = document(result("a", sound=2.0), result("b", sound=2.0), asked=16)
    path, page = stored(tmp_path, "run.json", run), tmp_path / "page.html"
    words = "interrupted: 2 of 16 cases"
    assert program.main([f"--from={path}"]) == 0 and capsys.readouterr().out.splitlines().count(words) == 1
    assert program.main([f"--from={path}", f"--report={page}"]) == 0
    assert capsys.readouterr().out.splitlines() == [words, f"wrote {page}"]
    assert f'<p class="warning">{words}</p>' in page.read_text(encoding="utf-8")
    assert f"  \n{words}\n" in report.docs_page({"run.json": run})
    for whole in (run | {"asked": 2}, {key: value for key, value in run.items() if key != "asked"}):
        assert "interrupted" not in report.docs_page({"run.json": whole}) + report_html.render_html(whole)


def test_a_stored_run_is_not_stored_again(tmp_path, capsys):
    path = stored(tmp_path, "run.json", document(result("a", sound=2.0)))
    with pytest.raises(SystemExit):
        program.main([f"--from={path}", f"--json={tmp_path / 'another.json'}"])
    assert "--from measures nothing that --json could store" in capsys.readouterr().err


def test_a_new_run_is_compared_at_its_end(tmp_path):
    command = [sys.executable, "-m", "fourfold.benchmarks", "--op=dct_normalize", "--match=1x1x64", "--seconds=0.5"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    for words in (["--json=old.json"], ["--json=new.json", "--report=new.html", "--compare=old.json"]):
        done = subprocess.run([*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "Compared with old.json" in done.stdout and "of call overhead" in done.stdout
    run = report.load(tmp_path / "new.json")
    assert run["command"].startswith(
        "python -m fourfold.benchmarks --op=dct_normalize --match=1x1x64 --seconds=0.5 --threads=1"
    )
    assert run["commit"] is None and run["fourfold"] == fourfold.__version__ and run["torch"] == torch.__version__
    assert "What changed" in (tmp_path / "new.html").read_text(encoding="utf-8")


# --- the page -------------------------------------------------------------------------------------------------------------


OUTWARD = ("src", "href", "xlink:href", "srcset", "data")


class Page(HTMLParser):
    """Tables by the heading above them, as rows of (text, data-value); and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[tuple[str, list[list[tuple[str, str | None]]]]] = []
        self.fetched: list[str] = []
        self.scripts, self.facts, self.open = 0, "", []
        self.heading = self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.fetched += [f"{tag} {name}" for name in OUTWARD if not given.get(name, "#").startswith("#")]
        self.fetched += [tag] * (tag in {"link", "iframe", "object", "img"})
        if tag in {"meta", "path", "use", "br"}:
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append((self.heading, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in {"td", "th"}:
            self.value = given.get("data-value")
        if tag in {"td", "th", "h1", "h2", "dl"}:
            self.text = ""

    def handle_startendtag(self, tag, attributes):
        self.fetched += [f"{tag} {name}" for name, value in attributes if name in OUTWARD and not value.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in {"td", "th"}:
            self.tables[-1][1][-1].append((self.text, self.value))
        elif tag in {"h1", "h2"}:
            self.heading = self.text
        elif tag == "dl":
            self.facts = self.text
        self.scripts += tag == "script"

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_beside_it_and_reads_without_its_script():
    lost, won = result("lost", 2.0, sound=0.5), result("won <3>", 0.05, sound=4.0, other=8.0)
    alone = result("alone", 1.0) | {"gemm": "bfloat16"}
    run = document(lost, won, alone, commit="abc123", command="python -m fourfold.benchmarks --op=double")
    text = report_html.render_html(run, comparison.compare(document(result("lost", sound=1.0)), run, "old.json"))
    page = Page(text)
    assert page.fetched == [] and page.scripts == 1 and "@import" not in text and "url(http" not in text
    for words in ("a processor, 2 cores, ISA tier avx2", "100 GFLOP/s measured", "abc123", "--op=double", "6.1", "8 GiB"):
        assert words in page.facts, words
    tables = dict(page.tables)
    assert list(tables) == ["What changed", "Where we lose", "Every case", "double"]
    assert [row[0][0] for row in tables["What changed"]] == ["change", "slower", "new", "new"]
    [lost_row] = tables["Where we lose"][1:]
    assert [cell for cell, _ in lost_row] == ["double", "lost [heap] 1 thread", "sound", "0.50× (0.49–0.51)", "2 ms"]
    head, *rows = tables["Every case"]
    assert [name for name, _ in head] == list(report_html.EVERY) and len(rows) == 3
    columns = {name: place for place, (name, _) in enumerate(head)}
    first, second, third = (dict(zip(columns, row, strict=True)) for row in rows)
    assert second["case"][0] == "won <3> [heap] 1 thread" and second["time"] == ("50.0 µs", "0.05")
    assert second["rival's time / ours"] == ("4.00× (3.96–4.04)", "4") and second["best rival"][0] == "sound"
    assert first["share of copy_"] == ("0.50 (0.49–0.51)", "0.5") and third["share of GEMM peak"] == ("0.25 (bfloat16)", "0.25")
    assert third["rival's time / ours"] == ("–", None)
    assert all(len(row) == len(head) for row in rows)


def test_the_page_has_its_own_marks_and_not_those_of_the_docs(monkeypatch):
    monkeypatch.setattr(report_html, "_charts", lambda results: "")
    run = document(result("a <b>", sound=2.0) | {"cost": {"floor": spread(1.0)}})
    assert "*heap*" in report._legend(run) and "*anew*" in report._legend(run) and "`copy_`" in report._legend(run)
    text = report_html.render_html(run).split("<h2>")[0].split("</style>")[1]
    assert "<em>heap</em>" in text and "<em>anew</em>" in text and "<code>copy_</code>" in text
    assert "*" not in text and "`" not in text
    assert report_html._inline("`a<b` & *c*, 2 * 3") == "<code>a&lt;b</code> &amp; <em>c</em>, 2 * 3"


def test_nothing_is_lost_where_no_rival_is_faster():
    page = Page(report_html.render_html(document(result("won", sound=2.0))))
    assert "Where we lose" not in dict(page.tables)
    assert "In 0 of 1 rows" in report_html.render_html(document(result("won", sound=2.0)))


def test_stored_runs_make_pages(monkeypatch):
    monkeypatch.setattr(report_html, "_charts", lambda results: "")  # which take most of the time, and are tested above
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        run = report.load(path)
        tables = dict(Page(report_html.render_html(run)).tables)
        assert len(tables["Every case"]) == 1 + len(run["results"]), path.name
        assert len(tables.get("Where we lose", [None])) == 1 + len(report.losses(run["results"])), path.name
