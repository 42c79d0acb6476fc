"""`python -m fourfold.benchmarks`: measure, check, report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fourfold
from fourfold import _C

from . import bench_files, every_case, near, report
from .harness import Session, Settings
from .options import add_options, check_device, check_places, to_arguments, to_settings
from .report_html import finish, publish

CAPABILITY = "FOURFOLD_CPU_CAPABILITY"
INTERRUPTED, UNREAD = 130, 141  # as a shell tells of SIGINT and SIGPIPE
LAPS = 3  # of whole processes, for --compare-capabilities


def main(arguments: list[str] | None = None) -> int:
    try:
        code = _main(arguments)
        sys.stdout.flush()  # here, where it can be caught, and not at exit
        return code
    except KeyboardInterrupt:  # before the first case, or while the files of an interrupted run were written
        print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our lines, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD


def _main(arguments: list[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    usage = "%(prog)s [OPTION...]; --help lists them"
    parser = argparse.ArgumentParser(prog="python -m fourfold.benchmarks", usage=usage, description=__doc__, allow_abbrev=False)
    add_options(parser.add_argument)
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--capability", metavar="TIER", help="run in a process lowered to this ISA tier, such as avx2")
    parser.add_argument("--compare-capabilities", metavar="TIERS", help="ours in two or more tiers, such as avx512,avx2")
    parser.add_argument("--from", type=Path, metavar="RUN.json", dest="stored", help="measure nothing: report on this run")
    parser.add_argument("--render", action="store_true", help="rewrite README's table and docs/benchmarks.md of this checkout")
    chosen = parser.parse_args(arguments)
    if chosen.json is None and chosen.report is None and not (chosen.stored or chosen.compare_capabilities):
        chosen.json, chosen.report = Path("fourfold-benchmarks.json"), Path("fourfold-benchmarks.html")
    try:
        settings = to_settings(chosen)
        if chosen.render:
            print("\n".join(str(path) for path in report.render_checkout(Path.cwd())))
            return 0
        if chosen.compare:
            report.load(chosen.compare)  # what is wrong with it shall be said now, not after the run
        if not chosen.list:
            check_places(chosen)
        if chosen.stored:
            if chosen.json:
                raise ValueError("--from measures nothing that --json could store; leave one of them out")
            return tell(report.load(chosen.stored), chosen.report, chosen.compare)
        tiers = chosen.compare_capabilities.split(",") if chosen.compare_capabilities else []
        check_tiers("--capability", [chosen.capability] if chosen.capability else [])
        check_tiers("--compare-capabilities", tiers)
        if len(tiers) == 1 or len(tiers) != len(set(tiers)):
            raise ValueError(f"--compare-capabilities: must be two or more different tiers, got {chosen.compare_capabilities}")
        check_ops(settings)
        chosen_cases = every_case(settings)
        if not chosen_cases:
            raise ValueError(why_none(settings))
        if not chosen.list:
            check_device(settings)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if chosen.list:
        print("\n".join(case.name for case in chosen_cases))
        return 0
    if tiers:
        return compare_capabilities(tiers, chosen, settings)
    if chosen.capability and os.environ.get(CAPABILITY) != chosen.capability:
        # The tier is chosen when the library is loaded: only a new process can have another.
        os.execve(sys.executable, [sys.executable, "-m", __package__, *arguments], os.environ | {CAPABILITY: chosen.capability})
    if chosen.capability and fourfold.cpu_capability() != chosen.capability:
        parser.error(f"--capability {chosen.capability}: this machine gives {fourfold.cpu_capability()}")
    files = {path: _stamp(path) for path in (chosen.json, chosen.report) if path}
    try:
        return run(settings, chosen.json, chosen.report, chosen.compare)
    finally:
        for path, before in files.items():
            if _stamp(path) != before:
                print(f"wrote {path}")


def _stamp(path: Path) -> tuple[int, int] | None:
    """Another one once the file is written anew; None: there is none."""
    if not path.exists():
        return None
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns


def check_tiers(option: str, words: list[str]) -> None:
    """ValueError where a word is no tier that this build and this machine have."""
    built, best = fourfold.build_info()["isa_tiers"], _C.machine_capability()
    tiers = built[: built.index(best) + 1]
    for word in words:
        if word not in tiers:
            raise ValueError(f"{option}: this build and this machine have {', '.join(tiers)}; got {word!r}{near(word, tiers)}")


def check_ops(settings: Settings) -> None:
    """ValueError where an op that was asked for has no cases at all."""
    everything = list(dict.fromkeys(case.op for case in every_case(Settings(device=settings.device))))
    for op in settings.op.split(",") if settings.op is not None else []:
        if op not in everything:
            meant = near(op, everything) or f"; ops with cases: {', '.join(everything)}"
            raise ValueError(f"--op: {op} has no cases{meant}")


def why_none(settings: Settings) -> str:
    """Why no case fits, and what would."""
    given = {"--family": settings.family, "--op": settings.op, "--match": settings.match}
    words = [f"{name} {value}" for name, value in given.items() if value is not None] + ["--quick"] * settings.quick
    return f"no case fits {' and '.join(words)}; --list with fewer of them shows what there is"


def tell(document: report.Document, html_path: Path | None, old: Path | None) -> int:
    """A stored run: its page, what changed since an older one, or without either what the terminal showed."""
    if html_path is None and old is None:
        print("\n".join([*report.headlines(document), *map(report.line, document["results"])]))
    if html_path or old:
        publish(document, html_path, old)
    if html_path:
        print(f"wrote {html_path}")
    return 0


def run(settings: Settings, json_path: Path | None, html_path: Path | None, old: Path | None = None) -> int:
    """The bench files under pytest, where pytest-benchmark drives, else in a plain loop. 0: every answer was right."""
    if find_spec("pytest") and find_spec("pytest_benchmark"):
        return _run_pytest(settings, json_path, html_path, old)
    print("pytest-benchmark is missing, a plain loop drives the rounds (pip install 'fourfold[bench]')")
    runs = [(case, threads) for case in every_case(settings) for threads in settings.threads_of(case)]
    session = Session(settings, fourfold, len(runs))
    progress = report.Progress(session)
    try:
        for case, threads in runs:
            progress.run(case, threads)
            report.save(session, json_path)
    except KeyboardInterrupt:
        progress.close()
        finish(session, json_path, html_path, old)
        return INTERRUPTED
    progress.close()
    finish(session, json_path, html_path, old)
    return int(any(result["wrong"] for result in session.results))


class _Quiet:
    """The progress bar says it all, and a line at the end whether it was stopped."""

    def __init__(self) -> None:
        self.collected = self.interrupted = False

    def pytest_configure(self, config: Any) -> None:
        self.config = config

    def pytest_collection_finish(self) -> None:
        self.collected = True

    def pytest_keyboard_interrupt(self, excinfo: Any) -> None:
        self.interrupted = True
        self.config.pluginmanager.unregister(name="terminalreporter")  # which would show where it was stopped

    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        return ("passed", "", "") if report.passed and report.when == "call" else None


def _run_pytest(settings: Settings, json_path: Path | None, html_path: Path | None, old: Path | None) -> int:
    import pytest

    here = Path(__file__).parent
    # Nothing of the project that happens to surround us: not its pytest settings, not its conftest, not its plugins.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    house = ["-c", os.devnull, "--rootdir", str(here), "--confcutdir", str(here), "-p", "pytest_benchmark.plugin"]
    house += ["-p", "no:cacheprovider", "-q", "-s", "--no-header", "--disable-warnings"]
    house += ["--benchmark-only", "--benchmark-quiet"]
    files = [str(path) for path in bench_files(settings.family)]
    files_of_ours = {"--json": json_path, "--report": html_path, "--compare": old}
    ours = [f"{name}={path}" for name, path in files_of_ours.items() if path]
    quiet = _Quiet()
    with tempfile.TemporaryDirectory() as storage:  # else pytest-benchmark makes .benchmarks here
        house.append(f"--benchmark-storage=file://{storage}")
        code = pytest.main([*house, *to_arguments(settings), *ours, *files], plugins=[quiet])
    if quiet.interrupted and not quiet.collected:
        raise KeyboardInterrupt
    return INTERRUPTED if quiet.interrupted else int(code)


def compare_capabilities(tiers: list[str], chosen: argparse.Namespace, settings: Settings) -> int:
    """Whole processes take turns, tier by tier; prints time over the first tier's, median and extremes over the laps."""
    times: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for lap in range(LAPS):
            for tier in tiers if lap % 2 == 0 else tiers[::-1]:
                path = Path(folder) / "lap.json"
                print(f"lap {lap + 1} of {LAPS}: {tier}", flush=True)
                command = [sys.executable, "-m", str(__package__), f"--capability={tier}", f"--json={path}"]
                ours = dataclasses.replace(settings, only_ours=True)
                done = subprocess.run([*command, *to_arguments(ours)], stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    print(done.stdout)
                    return done.returncode
                for result in (result for result in report.load(path)["results"] if "ms" in result):
                    of = times.setdefault(report.run_name(result), {})
                    of.setdefault(tier, []).append(result["ms"][result["ours"]]["median"])
    ratios = {
        name: {tier: [t / f for t, f in zip(of[tier], of[tiers[0]], strict=True)] for tier in tiers[1:]}
        for name, of in times.items()
    }
    for name, of in ratios.items():
        words = [
            f"{tier} {statistics.median(r):.2f} ({min(r):.2f}–{max(r):.2f}) of {tiers[0]}'s time" for tier, r in of.items()
        ]
        print(f"{name}: {', '.join(words)}")
    if chosen.json:
        chosen.json.write_text(json.dumps({"tiers": tiers, "ms": times}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
