"""The pytest side: options, one test per case and thread count, pytest-benchmark as the driver of the rounds.

`pytest benchmarks/bench_blockdct.py --benchmark-only --quick`, or `python -m fourfold.benchmarks --quick`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import fourfold
import pytest

from . import report
from .harness import Case, Session, Settings, fresh_first
from .options import add_options, check_device, check_places, to_settings
from .report_html import finish

SESSION = pytest.StashKey[Session]()
SETTINGS = pytest.StashKey[Settings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser.getgroup("fourfold", "fourfold benchmarks").addoption)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SETTINGS] = to_settings(config.option)
    try:
        check_device(config.stash[SETTINGS])
        check_places(config.option)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "race" not in metafunc.fixturenames:
        return
    settings = metafunc.config.stash[SETTINGS]
    runs = [
        (case, threads) for case in settings.choose(metafunc.module.cases(settings)) for threads in settings.threads_of(case)
    ]
    names = [f"{case.name}-{threads}t".replace(" ", "-") for case, threads in runs]
    metafunc.parametrize(("case", "threads"), runs, ids=names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    race_items = [item for item in items if "race" in getattr(item, "fixturenames", ())]
    others = [item for item in items if item not in race_items]
    # Of a file without a case chosen, pytest makes an item that would be skipped.
    races = [item for item in race_items if isinstance(item.callspec.params["case"], Case)]
    items[:] = others + sorted(races, key=lambda item: fresh_first(item.callspec.params["case"]))  # across the files
    config.stash[SESSION] = Session(config.stash[SETTINGS], fourfold, len(races))


@pytest.fixture(scope="session")
def progress(pytestconfig: pytest.Config) -> Iterator[report.Progress]:
    with _uncaptured(pytestconfig):
        progress = report.Progress(pytestconfig.stash[SESSION])
    yield progress
    with _uncaptured(pytestconfig):
        progress.close()


@pytest.fixture
def race(pytestconfig: pytest.Config, progress: report.Progress, benchmark) -> Callable[[Case, int], None]:
    """Runs a case; pytest-benchmark drives the rounds, and its JSON carries our result as extra_info."""
    session = pytestconfig.stash[SESSION]

    def drive(play_round: Callable[[], None], rounds: int) -> None:
        benchmark.pedantic(play_round, rounds=rounds, iterations=1)

    def run(case: Case, threads: int) -> None:
        with _uncaptured(pytestconfig):
            result = progress.run(case, threads, drive)
        benchmark.extra_info.update(result)
        report.save(session, pytestconfig.option.json)
        if result["wrong"]:
            pytest.fail(report.line(result), pytrace=False)

    return run


@pytest.hookimpl(trylast=True)  # after the bar is closed
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if SESSION in config.stash and not config.option.collectonly:
        with _uncaptured(config):
            finish(config.stash[SESSION], config.option.json, config.option.report, config.option.compare)


def _uncaptured(config: pytest.Config) -> AbstractContextManager:
    """Progress is for the terminal, not for the captured output of a test."""
    return config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled()
