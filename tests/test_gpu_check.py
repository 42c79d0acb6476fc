"""What `make gpu-check` runs, here on a CPU: it ends, tells what is wrong, and fills the ledger."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import check
from gpu.harness import Check, Contest, Speed

CHECK = Path(check.__file__)
CPU = torch.device("cpu")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_runs_to_the_end(tmp_path):
    """The budget stops it early; what was not reached is named."""
    command = [
        sys.executable,
        CHECK,
        "--device",
        "cpu",
        "--budget",
        "3",
        "--output",
        tmp_path,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = rows_of(tmp_path)
    assert {row["status"] for row in rows} == {"ok", "skipped"}
    assert all(row["reason"] for row in rows if row["status"] == "skipped")
    assert any(row["kind"] == "correct" and row["status"] == "ok" for row in rows)
    assert result.stdout.splitlines()[-1].startswith(f"{len(rows)} rows, 0 wrong")


@pytest.mark.parametrize("finds", [False, True])
def test_sanitizer(tmp_path, monkeypatch, finds):
    """Every tool sees the program; what one finds makes the whole run fail."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!/bin/sh\necho $2 $PYTORCH_NO_CUDA_MEMORY_CACHING $6 $7 >> {tmp_path}/calls\n"
        f"[ $2 = racecheck ] && exit {check.FOUND_SOMETHING if finds else 0}\nexit 0\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sys, "argv", ["check.py", "--sanitizer", "--device", "cpu", "--output", str(tmp_path / "out")])
    assert check.main() == int(finds)
    verdicts = json.loads((tmp_path / "out/sanitizer.json").read_text())
    assert verdicts == {"memcheck": "clean", "racecheck": "errors, printed above" if finds else "clean"}
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"{name} 1 {CHECK} --first-checks" for name in ("memcheck", "racecheck")]


def test_sanitizer_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="needs compute-sanitizer"):
        check.sanitize(CPU, tmp_path)


def contest(device, small):
    del small
    return Contest(
        [torch.ones(4, device=device)] * 2,
        32,
        torch.clone,
        {"twice": lambda x: x * 2},
        0.5,
        {"nothing": lambda x: x * 0},
    )


def test_wrong_results_are_told(tmp_path):
    def wrong(device):
        raise AssertionError(f"off on {device}")

    run = check.Run(tmp_path, 60)
    check.measure(run, Speed("op", "rival disagrees", contest), CPU, True, 1e9)
    check.check(run, Check("op", "a check", wrong), CPU)
    check.measure(run, Speed("op", "after it", contest), CPU, True, 1e9)
    assert [row["status"] for row in rows_of(tmp_path)] == ["wrong", "wrong", "skipped"]
    assert rows_of(tmp_path)[0]["error"] == "twice differs by 1"  # a floor need not agree
    assert check.summary(run.rows) == {"op": ("no: a check", "not measured")}


def ledger_rows(kind_of_device, status):
    machine = {
        "kind": "facts",
        "op": "",
        "name": "machine",
        "status": "ok",
        "kind_of_device": kind_of_device,
    }
    return [
        {**machine, "device": "A GPU", "date": "2026-01-31"},
        {"kind": "correct", "op": "one, two", "name": "case", "status": status},
        {"kind": "speed", "op": "one", "name": "hot", "status": "ok", "share": 0.876},
        {"kind": "speed", "op": "two", "name": "layer", "status": "ok", "share": None, "of conv": 0.987, "times cat": 3.0},
    ]


def test_launches():
    """Each contestant's time of a call, on the CPU here."""
    found = check.launches(contest(CPU, True))
    assert set(found) == {"launch us ours", "launch us twice"}
    assert all(0 < span < 1e6 for span in found.values())


def test_ledger(tmp_path):
    ledger = tmp_path / "gpu.md"
    start = "".join(f"| `{op}` | not measured | not measured | | |\n" for op in ("one", "two", "three"))
    ledger.write_text(start)
    with pytest.raises(SystemExit, match="not of a GPU"):
        check.write_ledger(ledger_rows("cpu", "ok"), ledger)
    assert ledger.read_text() == start
    check.write_ledger(ledger_rows("cuda", "ok"), ledger)
    assert ledger.read_text().splitlines() == [
        "| `one` | yes, 1 checks | 0.88 of copy (hot) | A GPU | 2026-01-31 |",
        "| `two` | yes, 1 checks | 0.99 of conv (layer) | A GPU | 2026-01-31 |",
        "| `three` | not measured | not measured | | |",
    ]
    check.write_ledger(ledger_rows("cuda", "wrong"), ledger)
    assert "| `two` | no: case |" in ledger.read_text()


def test_ledger_names_every_op():
    """docs/gpu.md has a row for each op that is checked."""
    ledger = (CHECK.parents[2] / "docs/gpu.md").read_text()
    for family in check.FAMILIES:
        for op in {op for case in importlib.import_module(f"gpu.cases_{family}").CHECKS for op in case.op.split(", ")}:
            assert f"| `{op}` |" in ledger
