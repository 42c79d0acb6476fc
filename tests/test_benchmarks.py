"""The benchmark harness: its statistics, its refusal to time wrong answers, its files, and that no op is without a case."""

import argparse
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fourfold
import pytest
import torch
from fourfold.benchmarks import __main__ as program
from fourfold.benchmarks import (
    bench_cca,
    bench_cca_streaming,
    bench_files,
    bench_jpeg,
    bench_maskmm,
    bench_maskmm_sparse,
    bench_maskmm_superposed,
    cases,
    every_case,
    harness,
    report,
    report_html,
    svcca_numpy,
)
from fourfold.benchmarks.harness import Absent, Case, Contestant, Group, Session, Settings, Tolerance
from fourfold.benchmarks.options import add_options, to_arguments, to_settings

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark; run: pip install pytest-benchmark")

#: pytest-benchmark measures nothing in a process that pytest-xdist shares out tests to; a program started here is none.
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}

ROOT = Path(__file__).parent.parent
TOLERANCE = Tolerance(1e-6, 1e-6)


def doubled(name: str, factor: float = 2.0) -> Contestant:
    return Contestant(name, lambda x, state: lambda: x * factor)


def toy(ours: float = 2.0, rival: float = 2.0, **changes) -> Case:
    """An op that doubles; other factors are wrong."""
    given = {
        "family": "toy",
        "op": "double",
        "label": "100",
        "problem": lambda device: torch.arange(1.0, 101.0, device=device),
        "reference": lambda x: x.double() * 2,
        "ours": doubled("fourfold", ours),
        "rivals": (doubled("sound"), doubled("rival", rival)),
        "tolerance": TOLERANCE,
        "state": "heap",
        "bytes": 800,
        "flops": 100,
    }
    return Case(**(given | changes))


@pytest.fixture
def session():
    threads = torch.get_num_threads()
    yield Session(Settings(quick=True, seconds=0.2), fourfold, runs=1)
    torch.set_num_threads(threads)


# --- statistics -----------------------------------------------------------------------------------------------------------


def test_spread_of_a_known_series():
    assert harness.spread([5, 1, 4, 2, 3]) == {"median": 3, "q1": 2, "q3": 4, "min": 1, "max": 5}


def test_ratios_are_taken_within_each_round():
    # A machine that halves its speed from round to round: each round says 3, the ratio of medians would say 12 / 2 = 6.
    ours, rival = [1, 2, 4], [3, 6, 12]
    assert harness.ratios(rival, ours) == {"median": 3, "q1": 3, "q3": 3, "min": 3, "max": 3}
    assert harness.ratios([3, 12, 6], [1, 2, 4])["median"] == 3  # round by round 3, 6, 1.5


def test_ratios_refuse_series_of_unequal_length():
    with pytest.raises(ValueError, match="shorter"):
        harness.ratios([1, 2], [1])


def test_everybody_starts_in_turn_and_laps_change_direction():
    orders = [harness.turn_order("abc", turn) for turn in range(6)]
    assert ["".join(order) for order in orders] == ["abc", "bca", "cab", "cba", "acb", "bac"]


class FakeClock:
    """A clock on which `name` takes seconds[name] a call, and that remembers who ran."""

    def __init__(self, **seconds: float):
        self.seconds, self.ran = seconds, []

    def call(self, name: str):
        return lambda: self.ran.append(name)

    def __call__(self, call, loops):
        call()
        return self.seconds[self.ran[-1]]


def test_a_race_interleaves_and_loops_short_calls():
    clock = FakeClock(short=harness.TIMING_SECONDS / 10, long=harness.CACHED_SECONDS * 2)
    race = harness.Race({name: clock.call(name) for name in clock.seconds}, clock)
    assert race.loops == {"short": 10, "long": 1}
    assert race.leads == {"short": 10, "long": 0}
    assert race.round_seconds == pytest.approx(2 * harness.TIMING_SECONDS + 2 * harness.CACHED_SECONDS)
    clock.ran.clear()
    race.play_round()
    assert clock.ran == ["short"] * 11 + ["long"]
    race.play_round()
    assert clock.ran[12:] == ["long"] + ["short"] * 11
    assert race.times == {name: [seconds] * 2 for name, seconds in clock.seconds.items()}
    assert race.rounds_within(0.0, fewest=3) == 3
    assert race.rounds_within(race.round_seconds * 20.5, fewest=3) == 20
    assert race.rounds_within(1e9, fewest=3) == harness.LARGEST_ROUNDS


def test_times_of_a_part_are_those_of_the_whole():
    clock = FakeClock(whole=harness.CACHED_SECONDS * 2, part=harness.CACHED_SECONDS * 2)
    race = harness.Race({name: clock.call(name) for name in clock.seconds}, clock, {"part": 0.05})
    race.play_round()
    assert race.times["part"] == [pytest.approx(20 * race.times["whole"][0])]
    assert race.round_seconds == pytest.approx(4 * harness.CACHED_SECONDS)  # which is what it takes


def test_a_slow_call_is_timed_once_beforehand():
    clock = FakeClock(slow=harness.SLOW_SECONDS * 2, short=harness.CACHED_SECONDS * 2)
    harness.Race({name: clock.call(name) for name in clock.seconds}, clock)
    assert clock.ran == ["slow"] * 2 + ["short"] * 3


# --- checking -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "complaint"),
    [
        ([1.0, 2.0], None),
        ([1.0, 2.0 + 2e-6], None),
        ([1.0, 2.0 + 4e-6], "largest error 4e-06, tolerance 1e-06 + 1e-06"),
        ([1.0, math.nan], "largest error inf"),
        ([math.inf, 2.0], "largest error inf"),
        ([1.0], "shape"),
    ],
)
def test_deviation(got, complaint):
    got, expected = (torch.tensor(values, dtype=torch.float64) for values in (got, [1.0, 2.0]))
    _, found = harness.deviation(got, expected, TOLERANCE)
    assert found == complaint if complaint is None else complaint in found


def test_deviation_of_a_number():
    assert harness.deviation(torch.tensor(1.5), torch.tensor(1.0), TOLERANCE)[0] == 0.5


def test_a_tolerance_of_rms_measures_each_tensor_by_itself():
    tolerance = Tolerance(1e-2, 0.0, of_rms=True)
    large, small = torch.tensor([300.0, -400.0], dtype=torch.float64), torch.tensor([3e-3, 4e-3], dtype=torch.float64)
    assert harness.deviation((large + 3, small), (large, small), tolerance)[1] is None  # of an rms of 354
    assert harness.deviation((large, small + 3e-5), (large, small), tolerance)[1] is None
    error, complaint = harness.deviation((large, small + 4e-5), (large, small), tolerance)
    assert error == pytest.approx(4e-5) and complaint == "largest error 4e-05, tolerance 0.01·rms + 0·|reference|"


def tripled(factor: float = 3.0) -> Contestant:
    """A yardstick: right where it triples."""
    return Contestant("tripling", lambda x, state: lambda: x * factor, reference=lambda x: x.double() * 3)


def test_a_yardstick_has_its_own_reference_and_is_no_rival(session):
    result = session.run(toy(yardsticks=(tripled(),), group=Group("toys", 1.0, 2.0)), threads=1)
    assert result["wrong"] == {} and set(result["ratio"]) == {"sound", "rival"} and set(result["cost"]) == {"tripling"}
    assert result["group"] == {"name": "toys", "goal": 1.0, "limit": 2.0}
    assert f"{result['cost']['tripling']['median']:.2f} (" in report.line(result) and "of tripling" in report.line(result)


def test_the_cost_is_our_time_over_the_yardsticks(session, monkeypatch):
    clock = FakeClock(fourfold=6e-3, tripling=2e-3, sound=9e-3, rival=9e-3)
    race = harness.Race({name: clock.call(name) for name in clock.seconds}, clock)
    race.play_round()
    case = toy(yardsticks=(tripled(),))
    monkeypatch.setattr(session, "_gemm_peak", lambda threads, dtype: 1.0)
    race.times["copy_"] = [1e-3]
    summary = session._summary(case, race, 1)
    assert summary["cost"]["tripling"]["median"] == pytest.approx(3)
    assert summary["ratio"]["sound"]["median"] == pytest.approx(1.5)


def test_a_share_of_the_work_is_checked_by_itself_and_its_time_scaled(session):
    half = Contestant("half", lambda x, state: lambda: x[:50] * 2, reference=lambda x: x[:50].double() * 2, share=0.5)
    result = session.run(dataclasses.replace(toy(), rivals=(half,)), threads=1)
    assert result["wrong"] == {} and set(result["ratio"]) == {"half"}
    whole = dataclasses.replace(half, reference=None)
    assert session.run(dataclasses.replace(toy(), rivals=(whole,)), threads=1)["wrong"]["half"].startswith("shape")


def test_the_gemm_peak_is_that_of_the_cases_type(session):
    result = session.run(toy(gemm=torch.float64), threads=1)
    document = session.document()
    assert set(document["gemm_peak_flops"]) == {"1 float64"} and result["gemm"] == "float64"
    assert " (float64) of the GEMM peak" in report.line(result)
    assert " (float64) |" in report.docs_page({"run.json": document})
    assert "matmul of that type (float64)" in report._legend(document)
    session.run(toy(), threads=1)
    assert set(session.document()["gemm_peak_flops"]) == {"1 float64", "1"}


PEAK = """
import torch
from fourfold.benchmarks.harness import peak_memory, set_allocation_state
set_allocation_state("fresh")
def call():
    first = torch.ones(2**24)
    second = first * 2
    del first
    return second * 3
call()
print(peak_memory(call, torch.device("cpu")), peak_memory(lambda: torch.ones(10), torch.device("cpu")))
"""


def test_peak_memory_counts_what_lives_at_once():
    # In a process of its own: a kept heap counts its holes as well.
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    two, none = (int(size) / 2**26 for size in done.stdout.split())
    assert 1.98 < two < 2.05 and none < 0.02


def test_peak_memory_is_told(session):
    result = session.run(toy(peak=True), threads=1)
    assert set(result["peak"]) == {"fourfold", "sound", "rival"} and "; peak memory fourfold 0 MB" in report.line(result)
    page = report.docs_page({"run.json": session.document()})
    assert "| peak memory |" in page and "Peak memory is what a call needs" in page


def test_a_wrong_yardstick_gets_no_cost(session):
    result = session.run(toy(yardsticks=(tripled(2.0),)), threads=1)
    assert set(result["wrong"]) == {"tripling"} and result["cost"] == {} and "tripling" not in result["ms"]


def test_saved_for_backward_counts_a_storage_once_and_knows_what_lives_anyway():
    x = torch.ones(1000, requires_grad=True)
    weight = torch.ones(1000)

    def squares():
        y = (x * weight).sigmoid()  # keeps weight, y
        return y, torch.autograd.grad(y, x, torch.ones_like(y))

    assert harness.saved_for_backward(lambda: squares()[0], [x, weight]) == {"bytes": 8000, "anew": 0}
    assert harness.saved_for_backward(lambda: squares()[0].detach().clone(), [x]) == {"bytes": 8000, "anew": 8000}
    # exp's result, whole and in part, and x.
    twice = harness.saved_for_backward(lambda: [(x.exp()[:500] * x[:500]).detach()], [x])
    assert twice == {"bytes": 8000, "anew": 4000}


def test_a_case_with_a_backward_pass_tells_what_is_saved(session):
    def make(x, state):
        leaf = x.clone().requires_grad_()

        def call():
            y = leaf * 2
            return torch.autograd.grad((y * y).sum(), leaf)[0] / (4 * y.detach())

        return call

    case = toy(reference=torch.ones_like, rivals=(), held=lambda x: [x])
    case = dataclasses.replace(case, ours=Contestant("fourfold", make))
    result = session.run(case, threads=1)
    assert result["wrong"] == {} and result["saved"] == {"fourfold": {"bytes": 400, "anew": 400}}
    assert "fourfold 0.0 MB (0.0 of it anew)" in report.docs_page({"run.json": session.document()})


def test_a_sound_case_is_timed(session):
    result = session.run(toy(), threads=1)
    assert result["wrong"] == {} and set(result["ms"]) == {"fourfold", "sound", "rival", "copy_"}
    assert result["rounds"] >= 3 and all(spread["min"] > 0 for spread in result["ms"].values())
    best = min(result["ratio"], key=lambda name: result["ratio"][name]["median"])
    assert result["best_rival"] == best and best in report.line(result)
    assert result["copy_share"]["median"] > 0 and result["gemm_share"] > 0


def test_a_wrong_rival_gets_no_time(session):
    result = session.run(toy(rival=2.001), threads=1)
    assert set(result["wrong"]) == {"rival"} and result["errors"]["rival"] == pytest.approx(0.1, rel=1e-3)
    assert "rival" not in result["ms"] and "rival" not in result["ratio"] and result["best_rival"] == "sound"
    assert "rival WRONG, no time (largest error 0.1" in report.line(result)


def test_no_time_at_all_where_ours_is_wrong(session):
    result = session.run(toy(ours=1.999), threads=1)
    assert set(result["wrong"]) == {"fourfold"} and "ms" not in result and "ratio" not in result
    assert report.line(result).startswith("double 100 [heap] 1 thread: fourfold WRONG, no time (largest error 0.1")


def test_an_overhead_is_the_difference_to_clone(session):
    result = session.run(toy(rivals=(), overhead=True, overhead_goal=1e6), threads=1)
    assert set(result["ms"]) == {"fourfold", "clone"} and "copy_share" not in result
    between = [result["ms"]["fourfold"][key] - result["ms"]["clone"][other] for key, other in (("min", "max"), ("max", "min"))]
    assert between[0] * 1e3 <= result["overhead_us"]["median"] <= between[1] * 1e3


def test_an_overhead_is_over_the_yardstick_where_there_is_one(session):
    result = session.run(toy(rivals=(), overhead=True, yardsticks=(tripled(),)), threads=1)
    assert set(result["ms"]) == {"fourfold", "tripling"} and "over tripling" in report.line(result)
    document = session.document()
    assert "tripling + " in report.docs_page({"run.json": document})
    result = session.run(toy(rivals=(), overhead=True, yardsticks=(tripled(2.0),)), threads=1)
    assert set(result["wrong"]) == {"tripling"} and "ms" not in result


def test_what_is_no_tensor_is_turned_into_tensors_outside_the_clock(session):
    seen = []

    def unpacked(text):
        seen.append(text)
        return torch.tensor([float(word) for word in text.split()])

    given = {"problem": lambda device: "2 4", "reference": lambda text: torch.tensor([2.0, 4.0], dtype=torch.float64)}
    ours = Contestant("fourfold", lambda text, state: lambda: text, tensors=unpacked)
    wrong = Contestant("wrong", lambda text, state: lambda: "2 5", tensors=unpacked)
    result = session.run(dataclasses.replace(toy(**given), ours=ours, rivals=(wrong,)), threads=1)
    assert set(result["wrong"]) == {"wrong"} and result["rounds"] >= 3 and seen == ["2 4", "2 5"]


def absent(name: str) -> Contestant:
    def make(x, state):
        raise Absent("not installed (pip install it)")

    return Contestant(name, make)


def test_who_is_absent_is_named_and_the_others_race(session):
    case = dataclasses.replace(toy(), rivals=(absent("gone"), doubled("sound")))
    result = session.run(case, threads=1)
    assert result["absent"] == {"gone": "not installed (pip install it)"} and result["wrong"] == {}
    assert set(result["ratio"]) == {"sound"} and "gone" not in result["errors"]
    document = session.document()
    assert "Absent: gone: not installed (pip install it)." in report.docs_page({"run.json": document})
    assert "Absent: gone: not installed" in report_html.render_html(document)


def unreadable(device: torch.device) -> torch.Tensor:
    raise Absent("needs a file")


@pytest.mark.parametrize("changes", [{"problem": unreadable}, {"ours": absent("fourfold")}])
def test_there_is_no_race_where_ours_is_absent(session, changes):
    result = session.run(dataclasses.replace(toy(), **changes), threads=1)
    why = result["absent"]["fourfold"]
    assert "ms" not in result and result["wrong"] == {}
    assert report.line(result) == f"double 100 [heap] 1 thread: left out, {why}"
    document = session.document()
    assert why in report.docs_page({"run.json": document}) and why in report_html.render_html(document)
    assert "| `double` | 0 of 1 | – | – | – | – |" in report.readme_table({"cpu.json": document})


def test_an_absence_is_told_once(session, capsys):
    progress = report.Progress(session)
    for _ in range(2):
        progress.run(dataclasses.replace(toy(), rivals=(absent("gone"), doubled("sound"))), 1)
    progress.close()
    assert capsys.readouterr().out.count("absent from here on: gone: not installed (pip install it)") == 1


def test_no_copy_runs_beside_what_memory_does_not_hold_up(session):
    result = session.run(toy(bytes=0, flops=0, handles=(50, "images")), threads=1)
    assert set(result["ms"]) == {"fourfold", "sound", "rival"} and not {"copy_share", "gemm_share"} & set(result)
    rate, ms = result["rate"], result["ms"]["fourfold"]
    assert rate["of"] == "images" and rate["per_second"]["max"] == pytest.approx(50e3 / ms["min"])
    assert " images/s, " in report.line(result) and "copy_" not in report.line(result)
    page = report.docs_page({"run.json": session.document()})
    assert "| rate |" in page and "share of copy_" not in page.split("### double")[1].split("\n\n")[1]


@pytest.mark.parametrize(
    ("per_second", "words"),
    [(1.234e9, "1234 M pixels/s"), (5.6e6, "6 M pixels/s"), (65432.1, "65432 pixels/s"), (12.345, "12.3 pixels/s")],
)
def test_rates_are_readable(per_second, words):
    assert report._rate({"rate": {"of": "pixels", "per_second": {"median": per_second}}}) == words


def test_one_thread_count_where_threads_are_of_no_use():
    settings = Settings(threads=(2, 3))
    assert settings.threads_of(toy()) == (2, 3)
    assert settings.threads_of(toy(threaded=False)) == settings.threads_of(toy(overhead=True)) == (2,)


def test_the_chart_shows_what_tells_most(session):
    both = session.run(toy(handles=(50, "images")), threads=1)
    rate_only = session.run(toy(bytes=0, handles=(50, "images")), threads=1)
    neither = session.run(toy(bytes=0), threads=1)
    assert report_html._left_bars([both])[0] == "share of copy_"
    assert report_html._left_bars([both, rate_only])[0] == "images/s"
    title, spreads = report_html._left_bars([both, neither])
    assert title == "ms" and spreads == [both["ms"]["fourfold"], neither["ms"]["fourfold"]]


@pytest.mark.parametrize(("changes", "code"), [({}, 0), ({"rival": 3.0}, 1), ({"ours": 3.0}, 1)])
def test_a_wrong_answer_fails_the_run(monkeypatch, tmp_path, capsys, changes, code):
    case = toy(**changes)
    monkeypatch.setattr(program, "every_case", lambda settings: [case])
    monkeypatch.setattr(program, "find_spec", lambda name: None)  # the plain loop: no pytest inside pytest
    written = [tmp_path / "run.json", tmp_path / "run.html"]
    arguments = ["--seconds=0.1", "--threads=1", f"--json={written[0]}", f"--report={written[1]}"]
    assert program.main(arguments) == code
    assert ("WRONG, no time" in capsys.readouterr().out) == bool(code)
    assert bool(report.load(written[0])["results"][0]["wrong"]) == bool(code)
    assert ("WRONG" in written[1].read_text()) == bool(code)


def test_a_wrong_answer_fails_under_pytest(tmp_path):
    bench = tmp_path / "bench_toy.py"
    bench.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from test_benchmarks import toy\n"
        "def cases(settings): return [toy(), toy(rival=3.0, label='wrong')]\n"
        "def test_speed(case, threads, race): race(case, threads)\n"
    )
    options = (
        "-c /dev/null -p fourfold.benchmarks.conftest -p no:cacheprovider --benchmark-json=all.json --seconds=0.2 --threads=1"
    )
    command = [sys.executable, "-m", "pytest", *options.split(), "--benchmark-only", "--rootdir", str(tmp_path), str(bench)]
    done = subprocess.run(command, cwd=tmp_path, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "rival WRONG, no time" in done.stdout
    kept = json.loads((tmp_path / "all.json").read_text())["benchmarks"]
    sound = next(entry["extra_info"] for entry in kept if entry["extra_info"]["label"] == "100")
    assert sound["bytes"] == 800 and sound["flops"] == 100 and set(sound["ratio"]) == {"sound", "rival"}
    assert next(entry for entry in kept if entry["extra_info"] == sound)["stats"]["rounds"] == sound["rounds"]


# --- the machine ----------------------------------------------------------------------------------------------------------


PAGE_FAULTS = """
import torch
from fourfold.benchmarks.harness import page_faults, set_allocation_state
def faults(state):
    set_allocation_state(state)
    for call in range(12):
        if call == 8:
            before = page_faults()
        torch.ones(4_000_000)
    return page_faults() - before
print(faults("fresh"), faults("heap"))
try:
    set_allocation_state("fresh")
except RuntimeError as error:
    print(error)
"""


def test_allocation_states_decide_about_page_faults():
    # In a process of its own: the heap of this one is already kept.
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, check=True)
    counts, refusal = done.stdout.splitlines()
    fresh, kept = map(int, counts.split())
    # 64 MB anew: 16 000 pages of 4 KiB, or 32 of 2 MiB where the kernel gives huge ones.
    assert kept < 16 < 32 <= fresh
    assert refusal.startswith("the allocation state 'fresh' must come first")


def test_the_watch_sees_others_and_a_slower_machine(monkeypatch):
    monkeypatch.setattr(harness, "_calibration", iter([1.0, 1.5]).__next__)
    monkeypatch.setattr(harness, "_cpu_ticks", iter([(0, 0, 0), (600_000, 50_000, 1_000_000)]).__next__)
    slower, others, stolen = harness.LoadWatch().warnings()
    assert slower == "a fixed loop ran 50% slower after the case than before it"
    assert others == "other processes took 60% of the machine"
    assert stolen == "5% of the machine's time was stolen by its host"


def test_the_watch_is_silent_on_a_quiet_machine(monkeypatch):
    monkeypatch.setattr(harness, "_calibration", lambda: 1.0)
    monkeypatch.setattr(harness, "_cpu_ticks", iter([(0, 0, 0), (10_000, 0, 1_000_000)]).__next__)
    assert harness.LoadWatch().warnings() == []


# --- files ----------------------------------------------------------------------------------------------------------------


def test_the_json_holds_what_a_reader_needs(session, tmp_path):
    session.run(toy(), threads=1)
    report.save(session, tmp_path / "run.json")
    document = report.load(tmp_path / "run.json")
    [stored], [kept] = document["results"], session.results
    assert stored.keys() == kept.keys() and stored["bytes"] == kept["bytes"] and stored["tolerance"] == kept["tolerance"]
    assert stored["ratio"]["rival"]["median"] == pytest.approx(kept["ratio"]["rival"]["median"], rel=1e-3)
    assert document["torch"] == torch.__version__ and document["capability"] == fourfold.cpu_capability()
    assert document["build"] == json.loads(json.dumps(fourfold.build_info()))
    assert document["states"].keys() == {"out", "heap", "fresh"} and document["gemm_peak_flops"]["1"] > 0
    assert {"cpu", "cores", "memory_gib"} <= document["machine"].keys()
    assert list(tmp_path.iterdir()) == [tmp_path / "run.json"]


def test_the_json_says_how_much_was_asked_for_and_what_failed(tmp_path):
    threads = torch.get_num_threads()
    session = Session(Settings(quick=True, seconds=0.2), fourfold, runs=3)
    session.run(toy(), threads=1)
    report.save(session, tmp_path / "run.json")
    document = report.load(tmp_path / "run.json")
    assert document["asked"] == 3 and "raised" not in document and report.unfinished(document) == "interrupted: 1 of 3 cases"
    with pytest.raises(ZeroDivisionError):
        session.run(toy(problem=lambda device: 1 / 0), threads=1)
    document = session.document()
    assert report.unfinished(document) == "interrupted: 1 of 3 cases; 1 of 3 cases failed with an error and are left out"
    session.run(toy(), threads=1)
    assert report.unfinished(session.document()) == "1 of 3 cases failed with an error and are left out"
    torch.set_num_threads(threads)


def test_only_a_results_file_is_loaded(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: must be a results file"):
        report.load(tmp_path / "other.json")


def test_the_html_report_is_one_file_with_charts(session):
    pytest.importorskip("matplotlib", reason="needs matplotlib; run: pip install matplotlib")
    result = session.run(toy(label="<100>"), threads=1)
    result["warnings"] = ["other processes took 60% of the machine"]
    page = report_html.render_html(session.document())
    assert page.count("<svg") == 1 and "&lt;100&gt;" in page and "<100>" not in page and "60% of the machine" in page


def test_readme_is_changed_between_the_markers_only(session):
    session.run(toy(), threads=1)
    session.run(toy(op="other"), threads=1)
    documents = {"cpu.json": session.document()}
    filled = report.into_readme(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", documents)
    assert filled == f"before\n{report.BEGIN}\n{report.readme_table(documents)}\n{report.END}\nafter\n"
    assert "`double`" in filled and "`other`" in filled
    assert "[cpu](benchmarks/results/cpu.json): " in filled
    assert report.into_readme(filled, documents) == filled
    with pytest.raises(ValueError, match="once each"):
        report.into_readme("no markers", documents)


def grouped(label: str, cost: float, ratio: float, threads: int = 1, group: str = "toys") -> report.Result:
    result = {"op": "double", "label": label, "state": "heap", "threads": threads, "family": "toy"}
    spreads = {"cost": {"tripling": {"median": cost}}, "ratio": {"rival": {"median": ratio}}}
    return result | spreads | {"ms": {}, "wrong": {}, "group": {"name": group, "goal": 1.05, "limit": 1.1}}


def test_a_group_is_judged_by_its_geometric_mean():
    results = [grouped("a", 1.0, 2.0), grouped("b", 4.0, 8.0), grouped("a", 9.0, 3.0, threads=2)]
    header, _, row = report.group_table(results).splitlines()
    assert (
        header
        == "| op | cases | goal | cost over, 1 thread | × rivals, 1 thread | cost over, 2 threads | × rivals, 2 threads |"
    )
    means = "2.00 (1.00–4.00) of tripling | 4.00× (2.00–8.00) rival | 9.00 (9.00–9.00) of tripling | 3.00× (3.00–3.00) rival"
    assert row == f"| `double` | toys: 2 | mean ≤ 1.05, each ≤ 1.10 | {means} |"
    assert report.group_table([results[0] | {"group": None}]) is None


def test_a_group_says_how_many_of_its_cases_are_missing():
    wrong = {key: value for key, value in grouped("b", 4.0, 8.0).items() if key not in {"ms", "cost", "ratio"}}
    table = report.group_table([grouped("a", 1.0, 2.0), wrong | {"wrong": {"fourfold": "why"}}])
    assert "toys: 1 of 2 without a WRONG" in table and "1.00 (1.00–1.00) of tripling" in table


def test_readme_and_docs_show_two_families(session):
    session.run(toy(family="first"), threads=1)
    group = {"family": "second", "op": "redouble", "yardsticks": (tripled(),), "group": Group("toys", 1.05)}
    session.run(toy(label="small", **group), threads=1)
    session.run(toy(label="large", **group), threads=1)
    document = session.document()
    both = report.readme_table({"cpu.json": document})
    assert [line.split(" | ")[:2] for line in both.splitlines() if line.startswith("| `")] == [
        ["| `double`", "1"],
        ["| `redouble`", "2"],
    ]
    page = report.docs_page({"cpu.json": document})
    double, redouble = page.split("### double\n")[1].split("### redouble: toys\n")
    assert "cost over the yardstick" not in double and "| cost over the yardstick |" in redouble and "| small |" in redouble
    assert "A yardstick does less" in page and "| `redouble` | toys: 2 | mean ≤ 1.05 |" in page


def test_readme_shows_the_runs_of_this_kind_of_machine_one_or_one_per_family():
    run: report.Document = {"results": []}
    assert list(report.readme_runs({"cpu.json": run, "cpu-toys.json": run, "gpu.json": run})) == ["cpu.json", "cpu-toys.json"]


def _stored() -> dict[str, report.Document]:
    stored = sorted((ROOT / "benchmarks" / "results").glob("*.json"), key=lambda path: path.stem)
    return {path.name: report.load(path) for path in stored}


def test_readme_shows_the_stored_run():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    runs = report.readme_runs(_stored())
    assert runs, f"store a run as benchmarks/results/{report.README_RUN}.json with --json"
    assert report.into_readme(readme, runs) == readme, "run python -m fourfold.benchmarks --render"


def test_docs_show_the_stored_runs():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert report.docs_page(_stored()) == page, "run python -m fourfold.benchmarks --render"


def test_a_stored_run_holds_no_wrong_answer_and_no_path():
    for name, document in _stored().items():
        assert not any(result["wrong"] for result in document["results"]), name
        assert str(Path.home()) not in json.dumps(document) and str(Path.cwd()) not in json.dumps(document), name


# --- the command line -----------------------------------------------------------------------------------------------------


def test_list(capsys):
    assert program.main(["--list", "--quick", "--op", "block_dct"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert "block_dct planar 8x3x224x224 N=8 float32 [out]" in names and all(name.startswith("block_dct ") for name in names)
    assert len(set(names)) == len(names)
    assert program.main(["--list", "--quick", "--op", "block_dct,block_idct"]) == 0
    assert {name.split()[0] for name in capsys.readouterr().out.splitlines()} == {"block_dct", "block_idct"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--family", "nope"],
            (
                "--family: must be one of blockdct, blockdct_domain, blockdct_rgb, cca, cca_streaming, coordconv, jpeg, "
                "maskmm, maskmm_sparse, maskmm_superposed, nn, got 'nope'"
            ),
        ),
        (["--family", "blockdtc"], "got 'blockdtc'; did you mean blockdct or "),
        (["--op", "nope"], "--op: nope has no cases; ops with cases: block_dct, block_idct, "),
        (["--op", "block_dct,nope"], "--op: nope has no cases; ops with cases: block_dct, block_idct, "),
        (["--op", "zigzag"], "--op: zigzag has no cases; ops with cases: block_dct, block_idct, "),
        (["--op", "dct_flop"], "--op: dct_flop has no cases; did you mean dct_flip or dct_crop?"),
        (["--op", "block_dct", "--family", "cca"], "no case fits --family cca and --op block_dct; --list with fewer"),
        (["--match", "nope", "--quick"], "no case fits --match nope and --quick; --list with fewer"),
        *((["--seconds", text], f"seconds above 0, such as 60, got '{text}'") for text in ("-3", "0", "nan", "inf", "soon")),
        (["--capability", "avx9"], "--capability: this build and this machine have baseline"),
        (["--compare-capabilities", "baseline,avx9"], "--compare-capabilities: this build and this machine have baseline"),
        (["--compare-capabilities", "baseline"], "must be two or more different tiers, got baseline"),
        (["--compare-capabilities", "baseline,baseline"], "must be two or more different tiers, got baseline,baseline"),
        (["--threads", "0"], "must be thread counts like 1 or 1,2, got '0'"),
        (["--threads", "1,two"], "must be thread counts like 1 or 1,2, got '1,two'"),
    ],
)
def test_wrong_options(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as stopped:
        program.main([*arguments, "--list"])
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


def test_the_tiers_are_those_of_build_and_machine(monkeypatch):
    monkeypatch.setattr(fourfold, "build_info", lambda: {"isa_tiers": ["baseline", "avx2", "avx512"]})
    monkeypatch.setattr(program, "_C", SimpleNamespace(machine_capability=lambda: "avx2"))
    program.check_tiers("--capability", ["avx2", "baseline"])
    with pytest.raises(ValueError, match=r"^--capability: this build and this machine have baseline, avx2; got 'avx512'; did"):
        program.check_tiers("--capability", ["avx512"])


@pytest.fixture
def idle(monkeypatch):
    """Whatever would take time fails the test."""
    for name in ("run", "compare_capabilities", "publish"):
        monkeypatch.setattr(program, name, lambda *given, name=name: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_what_cannot_be_written_is_said_before_any_work(tmp_path, capsys, idle, option):
    (tmp_path / "old.json").write_text(json.dumps({}))
    missing = tmp_path / "a folder"
    places = {
        missing / "run": f"there is no folder {missing}; make it (mkdir -p '{missing}')",
        tmp_path: "is a folder; name a file in it",
        Path("/proc/run"): "the folder /proc can't be written to (",
    }
    for path, complaint in places.items():
        with pytest.raises(SystemExit) as stopped:
            program.main([f"{option}={path}", "--op=dct_normalize"])
        told = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and len(told) == 2 and f"error: {option} {path}: {complaint}" in told[1]
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


@pytest.mark.parametrize("others", [("--json", "--report"), ("--compare", "--json"), ("--from", "--report")])
def test_no_file_is_written_over_another(tmp_path, capsys, idle, others):
    stored = max((ROOT / "benchmarks" / "results").glob("*.json"))
    path = tmp_path / "run.json"
    path.write_bytes(stored.read_bytes())
    with pytest.raises(SystemExit) as stopped:
        program.main([f"{option}={path}" for option in others])
    assert stopped.value.code == 2 and f"{others[1]} {path}: is {others[0]}'s file" in capsys.readouterr().err
    assert path.read_bytes() == stored.read_bytes()


def test_a_gpu_that_is_not_there_is_said_before_any_work(tmp_path, monkeypatch, capsys, idle):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        program.main(["--device=cuda", "--op=dct_normalize"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and f"error: --device cuda: torch {torch.__version__} " in err and out == ""
    assert program.main(["--device=cuda", "--op=dct_normalize", "--list"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_pytest_refuses_in_a_line_too(tmp_path):
    options = "-c /dev/null -p fourfold.benchmarks.conftest -p no:cacheprovider --json=nowhere/run.json"
    command = [sys.executable, "-m", "pytest", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, env=ALONE, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "Traceback" not in done.stderr
    assert "ERROR: --json nowhere/run.json: there is no folder nowhere; make it" in done.stderr


def test_only_what_this_run_wrote_is_said_to_be_written(tmp_path, monkeypatch, capsys):
    written, left = tmp_path / "run.json", tmp_path / "run.html"
    for path in (written, left):
        path.write_text("an older one")

    def run(settings, json_path, html_path, old):
        report.replace(json_path, "an older one")  # the same again
        return 3

    monkeypatch.setattr(program, "run", run)
    assert program.main([f"--json={written}", f"--report={left}", "--op=dct_normalize"]) == 3
    assert capsys.readouterr().out == f"wrote {written}\n"


def test_a_run_is_stopped_in_a_line(tmp_path, monkeypatch, capsys):
    def stop(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "every_case", lambda settings: [toy(), toy(label="stopped", problem=stop), toy(label="never")])
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    written = [tmp_path / "run.json", tmp_path / "run.html"]
    arguments = ["--seconds=0.1", "--threads=1", f"--json={written[0]}", f"--report={written[1]}"]
    assert program.main(arguments) == 130
    out = capsys.readouterr().out
    assert out.splitlines()[-3:] == ["interrupted: 1 of 3 cases", *(f"wrote {path}" for path in written)]
    assert out.count("interrupted") == 1
    document = report.load(written[0])
    assert document["asked"] == 3 and len(document["results"]) == 1
    assert '<p class="warning">interrupted: 1 of 3 cases</p>' in written[1].read_text(encoding="utf-8")
    monkeypatch.setattr(program, "every_case", lambda settings: stop(None))
    assert program.main(arguments) == 130 and capsys.readouterr().out == "interrupted\n"


STOPPED = """
import signal, sys
from fourfold.benchmarks import __main__ as program, harness
signal.signal(signal.SIGINT, signal.default_int_handler)
run = harness.Session._run
def run_once(session, *given):
    if session.results:
        signal.raise_signal(signal.SIGINT)
    return run(session, *given)
harness.Session._run = run_once
sys.exit(program.main(["--op=dct_normalize", "--quick", "--only-ours", "--seconds=0.5", "--threads=1"]))
"""


def test_a_run_under_pytest_is_stopped_in_a_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", STOPPED], cwd=tmp_path, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "", done.stdout + done.stderr
    document = report.load(tmp_path / "fourfold-benchmarks.json")
    assert document["asked"] > 1 == len(document["results"])
    *_, line, first, second = done.stdout.splitlines()
    assert line == f"interrupted: 1 of {document['asked']} cases" and "KeyboardInterrupt" not in done.stdout
    assert [first, second] == ["wrote fourfold-benchmarks.json", "wrote fourfold-benchmarks.html"]
    assert {path.name for path in tmp_path.iterdir()} == {"fourfold-benchmarks.json", "fourfold-benchmarks.html"}


def test_a_reader_may_go_away():
    command = [sys.executable, "-m", "fourfold.benchmarks", "--list", "--op=dct_normalize"]
    buffered = {name: value for name, value in ALONE.items() if name != "PYTHONUNBUFFERED"}  # to meet it as late as possible
    with subprocess.Popen(command, env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as listing:
        listing.stdout.close()
        assert listing.stderr.read() == "" and listing.wait() == 141


def test_settings_survive_the_way_through_pytest():
    parser = argparse.ArgumentParser()
    add_options(parser.add_argument)
    settings = Settings(True, "cpu", (1, 3), "blockdct", "block_dct", "8x3", True, 7, True, 12.5)
    assert to_settings(parser.parse_args(to_arguments(settings))) == settings


def test_random_shapes_lie_in_the_stated_range_and_follow_the_seed():
    assert cases.random_images(1) == cases.random_images(1) != cases.random_images(2)
    for seed in range(50):
        for (b, c, height, width), _ in cases.random_images(seed):
            assert b % 2 == 1 and 1 <= b <= 15 and 1 <= c <= 4 and 97 <= height <= 640 and 97 <= width <= 640
    sizes = [image.size for image in cases.random_images(5)]
    blocks = [(b, -(-height // 8), -(-width // 8)) for b, _, height, width in sizes]
    pairs_of_blocks = [(b, 2 * -(-height // 16), 2 * -(-width // 16)) for b, _, height, width in sizes]
    allowed = {
        "bench_blockdct": [*sizes, *((*grid, 64) for grid in blocks)],
        "bench_blockdct_rgb": [(b, 3, height, width) for b, _, height, width in sizes],
        "bench_blockdct_domain": [(*grid, 64) for grid in pairs_of_blocks],
    }
    for path in bench_files("blockdct"):
        family = path.stem.removeprefix("bench_")
        drawn = {case.label for case in every_case(Settings(random_shapes=True, seed=5, family=family)) if case.rivals}
        words = ["x".join(map(str, size)) for name, of in allowed.items() if name.startswith(path.stem) for size in of]
        assert drawn and all(any(f"{word} " in f"{label} " for word in words) for label in drawn), path.stem
    photos = {case.label for case in every_case(Settings(random_shapes=True, seed=5, family="jpeg"))}
    assert photos and all(any(f" {width}x{height}," in label for *_, height, width in sizes) for label in photos)


def test_a_family_has_all_its_files():
    assert [path.stem for path in bench_files("blockdct")] == ["bench_blockdct", "bench_blockdct_domain", "bench_blockdct_rgb"]
    assert [path.stem for path in bench_files("blockdct_rgb")] == ["bench_blockdct_rgb"]
    assert len(bench_files()) == len({*Path(harness.__file__).parent.glob("bench_*.py")})


def test_random_layers_lie_in_the_stated_range_and_follow_the_seed():
    assert cases.random_layers(1) == cases.random_layers(1) != cases.random_layers(2)
    for seed in range(50):
        for layer in cases.random_layers(seed):
            b, c, height, width = layer.input
            assert b % 2 == 1 and 1 <= b <= 15 and 1 <= c <= 96 and 1 <= layer.channels <= 96
            assert 17 <= height <= 160 and 17 <= width <= 160 and layer.kernel in {1, 3} and layer.stride in {1, 2}
    for seed in range(50):
        for rows, columns, batch, _ in cases.random_linears(seed):
            assert 33 <= rows <= 2000 and 33 <= columns <= 2000 and 1 <= batch <= 200
    drawn = every_case(Settings(random_shapes=True, seed=5, family="maskmm"))
    sizes = {f"{rows}x{columns}" for rows, columns, *_ in cases.random_linears(5)}
    assert drawn and all(any(size in case.label for size in sizes) for case in drawn)
    for seed in range(50):
        for features, samples, _ in cases.random_pairs(seed):
            assert 16 <= features <= 300 and 12 * features <= samples <= 40 * features
    drawn = every_case(Settings(random_shapes=True, seed=5, family="cca"))
    sizes = {str(pair) for pair in cases.random_pairs(5)}
    assert drawn and all(any(size in case.label for size in sizes) for case in drawn)
    drawn = every_case(Settings(random_shapes=True, seed=5, family="coordconv"))
    sizes = {layer.input for layer in cases.random_layers(5)}
    assert drawn and all(any("x".join(map(str, size)) in case.label for size in sizes) for case in drawn)


def test_the_whole_program_on_one_case(tmp_path):
    command = [sys.executable, "-m", "fourfold.benchmarks", "--op=dct_normalize", "--match=1x1x64", "--seconds=0.5"]
    done = subprocess.run(command, cwd=tmp_path, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1/1 dct_normalize int16 1x1x64" in done.stdout and "over clone" in done.stdout
    document = report.load(tmp_path / "fourfold-benchmarks.json")
    assert [result["op"] for result in document["results"]] == ["dct_normalize"]
    assert (tmp_path / "fourfold-benchmarks.html").read_text().startswith("<!doctype html>")
    assert {path.name for path in tmp_path.iterdir()} == {"fourfold-benchmarks.json", "fourfold-benchmarks.html"}
    assert document["asked"] == 1 and "interrupted" not in done.stdout


# --- layers with coordinates ---------------------------------------------------------------------------------------------


def test_coord_conv_races_the_nine_layers_in_every_mode_against_both_concatenations():
    chosen = [case for case in every_case(Settings(family="coordconv")) if case.group]
    groups = {}
    for case in chosen:
        groups.setdefault(case.group.name, set()).add(case.label)
        assert {rival.name for rival in case.rivals} == {"concat at its best", "concat as published"}
        assert case.yardsticks[0].reference is not None and case.state == "heap"
        assert (case.held is not None) == ("backward" in case.group.name)
    modes = ("with ReLU", "bare", "forward and backward", "forward and backward with ReLU", "compiled, with ReLU")
    wanted = {f"{mode}, {dtype}" for mode in modes for dtype in ("float32", "bfloat16")}
    compiles = Settings().compiles
    assert set(groups) == {name for name in wanted if compiles or not name.startswith("compiled")}
    labels = {str(layer) for layer in cases.LAYERS}
    assert len(labels) == 9 and all(found == labels for found in groups.values())


# --- masks ----------------------------------------------------------------------------------------------------------------

SMALL_LINEAR = cases.Linear(20, 70, 5, "rows that don't fill whole words")
SMALL_CONV = cases.Layer((2, 3, 7, 6), 4, 3, 1, "small")


def test_sparse_inference_races_the_whole_grid():
    found = {}
    for case in every_case(Settings(family="maskmm_sparse")):
        if case.group and case.group.name in {f"M={m}" for m in (1, 8, 64, 512)}:
            found.setdefault(case.group.name, set()).add(case.label)
            names = {rival.name for rival in case.rivals}
            assert {"dense", "dense in bfloat16", "weight * float mask", "MKL sparse, x transposed"} <= names
            assert any("torch CSR" in name for name in names)
    densities = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
    grid = {f"{size}, density {density}" for size in ("4096x4096", "4096x1024") for density in densities}
    assert found == {f"M={m}": grid for m in (1, 8, 64, 512)}
    flushed = [case for case in every_case(Settings(family="maskmm_sparse")) if case.group and "flushed" in case.group.name]
    assert len(flushed) == 6 and all(case.group.limit == 1.25 and case.yardsticks for case in flushed)


def test_what_backward_saves_is_told_of_every_trained_mask():
    for case in every_case(Settings(family="maskmm")):
        trained = case.op.startswith(("masked_", "supermask_")) and "forward" not in case.title and not case.overhead
        told = trained or any(words in case.title for words in ("retraining", "gradient of alpha", "forward and backward"))
        assert (case.held is not None) == told
        assert not trained or case.yardsticks[0].reference is not None


def _small_mask_cases(monkeypatch) -> list[Case]:
    monkeypatch.setattr(cases, "random_linears", lambda seed: [SMALL_LINEAR] * 6)
    settings = Settings(quick=True, random_shapes=True, family="maskmm")
    drawn = {case.name: case for case in every_case(settings)}  # the six are one
    modes = (bench_maskmm.FIXED, bench_maskmm.BERNOULLI, bench_maskmm.EDGE_POPUP, bench_maskmm.THRESHOLD)
    given = [bench_maskmm._layer(settings, place, mode) for place in (SMALL_LINEAR, SMALL_CONV) for mode in modes]
    given += [bench_maskmm._bits(settings, op, SMALL_LINEAR._replace(columns=128)) for op in ("pack_mask", "unpack_mask")]
    given += [bench_maskmm_sparse._retraining(settings, SMALL_LINEAR, 0.3)]
    given += [bench_maskmm_sparse._inference(settings, SMALL_LINEAR._replace(batch=1), 0.3)]
    given += [bench_maskmm_sparse._inference(settings, SMALL_LINEAR, 0.3, torch.bfloat16)]
    given += [bench_maskmm_superposed._inference(settings, (70, 20, 10), 5, "small")]
    return [*drawn.values(), *given]


def test_every_contestant_for_masks_is_right_on_a_small_layer(session, monkeypatch):
    torch.set_num_threads(1)
    small = _small_mask_cases(monkeypatch)
    assert len({case.op for case in small}) == 16
    for case in small:
        calls, _, wrong, absent = session._entrants(case)
        assert not wrong, (case.name, wrong)
        assert set(absent) <= {"MKL sparse, x transposed"}, (case.name, absent)
        assert case.ours.name in calls and len(calls) + len(absent) == 1 + len(case.rivals) + len(case.yardsticks)


def test_a_sampler_of_other_odds_is_wrong():
    p = bench_maskmm.Scores((128, 512), True, torch.device("cpu"))
    expected, tolerance = bench_maskmm.expected_by_score(p), bench_maskmm._odds(p.scores.numel())

    def judged(probabilities):
        torch.manual_seed(1)  # another seed than the scores'
        drawn = p.scores, torch.bernoulli(probabilities)
        return harness.deviation(bench_maskmm.kept_by_score(drawn), expected, tolerance)[1]

    assert judged(p.scores.sigmoid()) is None
    assert judged((1.2 * p.scores).sigmoid()) is not None
    assert judged(torch.full_like(p.scores, 0.5)) is not None  # as many on the whole


def test_scores_have_one_top_k():
    for shape in ((20, 70), (300, 784), (1024, 1024)):
        scores = bench_maskmm.distinct(shape, torch.Generator().manual_seed(0))
        assert scores.abs().unique().numel() == scores.numel() and scores.abs().max() <= 1 / math.sqrt(shape[1])
        assert abs((scores > 0).double().mean() - 0.5) < 0.05


def test_flushed_weights_take_turns(monkeypatch):
    monkeypatch.setattr(bench_maskmm_sparse, "FLUSH", 300)
    made = []

    def prepare(p):
        number = len(made)
        made.append(number)
        return (lambda: number), 100

    call = bench_maskmm_sparse.flushed(prepare)(None, "heap")
    assert [call() for _ in range(6)] == [0, 1, 2, 3, 0, 1] and len(made) == 4


# --- similarity ------------------------------------------------------------------------------------------------------------

SMALL_PAIR = cases.Pair(12, 200, "small")


def _small_similarities() -> list[Case]:
    settings = Settings(quick=True)  # without compiled forms
    given = [make(settings, SMALL_PAIR) for make in (bench_cca._cca, bench_cca._svcca, bench_cca._pwcca, bench_cca._cka)]
    given += [make(SMALL_PAIR) for make in (bench_cca._cca_fast, bench_cca._cka_unbiased, bench_cca._cka_rbf)]
    given += [bench_cca._features(settings, op, SMALL_PAIR) for op in ("procrustes", "rv")]
    given += [bench_cca._loss(op, SMALL_PAIR) for op in bench_cca.LOSSES]
    given += [bench_cca._all_cka(settings, 3, 24, 48), bench_cca._all_cka_training(settings, 3, 24, 48)]
    given += [bench_cca._dft(100, 5, 6, "small"), bench_cca._dft_loss(100, 5, 6, "small")]
    given += [bench_cca_streaming._metric(12, 300, 128)]
    for precision in ("high", "fast"):
        given += [
            bench_cca_streaming._all_pairs(4, 12, 300, 128, precision),
            bench_cca_streaming._update(settings, 4, 12, 300, 128, precision),
        ]
        given += [bench_cca_streaming._memory(settings, 64, 5, 6, precision)]
    maps = cases.Maps(3, 20, 5, 7, "small")
    given += [bench_cca_streaming._gram(maps, dtype) for dtype in (torch.bfloat16, torch.float16)]
    return [*given, bench_cca_streaming._compare((5, 7), 2, 2)]


def test_every_contestant_for_similarity_is_right_on_small_layers(session):
    torch.set_num_threads(1)
    small = _small_similarities()
    assert {case.op for case in small} == {case.op for case in every_case(Settings(family="cca"))}
    for case in small:
        calls, _, wrong, absent = session._entrants(case)
        assert not wrong and not absent, (case.name, wrong, absent)
        assert len(calls) == 1 + len(case.rivals) + len(case.yardsticks)


def test_pairs_race_at_the_sizes_of_the_goals():
    labels = {case.label for case in every_case(Settings(family="cca")) if case.op == "cca"}
    assert {"256x10000", "1024x20000"} <= labels
    loops = [case for case in every_case(Settings(family="cca")) if case.op == "StreamingCCA" and "210 pairs" in case.label]
    for case in loops:
        [loop] = [rival for rival in case.rivals if "reference loop" in rival.name]
        assert loop.share == 5 / 210 and "(5 of 210 pairs, extrapolated)" in loop.name
    assert len(loops) == 3
    shown = {case.label for case in every_case(Settings(family="cca")) if case.op == "_gram_"}
    assert {f"bfloat16 {size}" for size in ("64x64x56x56", "128x256x28x28", "256x512x14x14", "256x2048x7x7")} < shown


def test_the_full_size_races_where_it_is_asked_for():
    asked = every_case(Settings(family="cca", match="3072 images"))
    assert len(asked) == 2 and all("(2466 MB)" in case.label for case in asked)
    assert not any("3072" in case.label for case in every_case(Settings(family="cca", match="2 layers")))


def test_the_reference_algorithm_drops_still_neurons_and_damps():
    pair = bench_cca.Pair(SMALL_PAIR, False, torch.device("cpu"))
    x, y = pair.x.double().numpy().T, pair.y.double().numpy().T
    rho = svcca_numpy.canonical(x, y).rho
    torch.testing.assert_close(torch.from_numpy(rho), bench_cca.exact_cca(pair), rtol=0, atol=1e-12)
    still = x.copy()
    still[3] = still[3].mean() + 1e-6 * (still[3] - still[3].mean())
    assert svcca_numpy.canonical(still, y, 1e-10).root_x.shape == (11, 11)
    assert (svcca_numpy.canonical(x, y, 1e-2).rho < rho).all()


def test_the_reference_algorithm_keeps_the_leading_directions():
    pair = bench_cca.Pair(SMALL_PAIR, False, torch.device("cpu"))
    kept = svcca_numpy.principal(pair.x.double().numpy().T)
    s = bench_cca.exact_basis(pair.x)[1]
    share = (s.square().cumsum(0) / s.square().sum()).tolist()
    assert share[len(kept) - 2] < 0.99 <= share[len(kept) - 1] and 1 < len(kept) < 12


# --- files and networks ---------------------------------------------------------------------------------------------------

needs_jpeg = pytest.mark.skipif(not fourfold.has_jpeg(), reason="built without libjpeg-turbo")
SMALL = cases.Photos(75, 101, 90, count=3)
ABSENCES = ("not installed (pip install ", "no C compiler", "jpeglib is not safe in threads")


def test_photographs_are_crops_of_one_size_and_quality():
    image = pytest.importorskip("PIL.Image", reason="needs pillow; run: pip install pillow")
    pytest.importorskip("sklearn", reason="needs scikit-learn; run: pip install scikit-learn")
    for photos in (SMALL, SMALL._replace(sampling="4:4:4", quality=75), SMALL._replace(progressive=True)):
        made = bench_jpeg.files(photos)
        assert len(set(made)) == photos.count
        for file in made:
            opened = image.open(io.BytesIO(file))
            assert opened.size == (101, 75) and bool(opened.info.get("progressive")) == photos.progressive
            sampling = ((2, 2), (1, 1)) if photos.sampling == "4:2:0" else ((1, 1), (1, 1))
            assert tuple(layer[1:3] for layer in opened.layer[:2]) == sampling
    assert len(bench_jpeg.files(SMALL._replace(quality=75))[0]) < len(bench_jpeg.files(SMALL)[0])


@needs_jpeg
@pytest.mark.parametrize("photos", [SMALL, SMALL._replace(sampling="4:4:4"), SMALL._replace(progressive=True)], ids=str)
def test_what_files_hold_does_not_depend_on_who_says_it(photos, monkeypatch):
    """libjpeg in a C loop or, without a compiler, ourselves; and Pillow's pixels are what those coefficients mean."""
    try:
        bench_jpeg.bare_loop()
    except Absent as reason:
        pytest.skip(f"the C loop: {reason}")
    album = bench_jpeg.Album(photos, torch.device("cpu"))
    told = album.coefficients
    try:
        monkeypatch.setenv("CC", "false")
        bench_jpeg.bare_loop.cache_clear()
        with pytest.raises(Absent, match=r"^false can't build it \(no message\); install libjpeg-turbo's headers$"):
            bench_jpeg.bare_loop()
        by_us = bench_jpeg.Album(photos, torch.device("cpu")).coefficients
        assert len(told) == len(by_us) == 9 and all(torch.equal(a, b) for a, b in zip(told, by_us, strict=True))
    finally:
        bench_jpeg.bare_loop.cache_clear()
    pixels = bench_jpeg.copies(bench_jpeg.decode_pillow(album, "heap")())
    assert harness.deviation(pixels, album.pixels, bench_jpeg.LEVELS)[1] is None
    swapped = [image.flip(-1) for image in pixels]
    assert harness.deviation(swapped, album.pixels, bench_jpeg.LEVELS)[1] is not None


@needs_jpeg
@pytest.mark.parametrize("threads", [1, 2])
def test_every_installed_reader_and_loader_is_right(session, threads):
    """Of files of an odd size, and of a batch that two threads can't halve."""
    reading = bench_jpeg._reading(SMALL, batch=True)
    loading = bench_jpeg._pipeline(Settings())
    loading = dataclasses.replace(loading, problem=lambda device: bench_jpeg.Pipeline(SMALL, device))
    for case in (reading, loading):
        result = session.run(case, threads)
        assert result["wrong"] == {} and "ms" in result
        by_pillow = {name for name in result["ratio"] if "Pillow" in name}
        assert by_pillow and set(result["absent"]) <= {rival.name for rival in case.rivals} - by_pillow
        assert all(why.startswith(ABSENCES) for why in result["absent"].values())


def test_folded_batch_norms_change_nothing():
    model = fourfold.models.resnet50(10).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
        x = torch.randn(1, 3, 64, 64, generator=generator)
        expected = model(x)
        bench_jpeg.fold_batch_norms(model)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    mixed = fourfold.models.dct_resnet50(bench_jpeg.VARIANT, 10).eval()
    bench_jpeg.fold_batch_norms(mixed)
    left = [name for name, module in mixed.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert left == ["bn_y", "bn_cbcr"]  # which follow no convolution


def test_networks_run_from_bytes_and_alone_in_every_mode_and_type():
    labels = [case.label for case in every_case(Settings(family="jpeg")) if case.op == "models.dct_resnet50"]
    modes = bench_jpeg.MODES if Settings().compiles else bench_jpeg.MODES[:2]
    for dtype in ("float32", "bfloat16"):
        for mode in modes:
            for what in ("bytes to scores", "batch to scores"):
                assert sum(f"{what}, {dtype} channels_last {mode}" in label for label in labels) == 1
    assert len(labels) == 4 * len(modes)
    quick = [case for case in every_case(Settings(quick=True)) if case.op == "models.dct_resnet50"]
    assert len(quick) == 1 and ", 1 of 224x224, bytes to scores" in quick[0].label
