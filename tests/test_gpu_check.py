"""What `make gpu-check` runs, here on a CPU: it ends, tells what is wrong, and fills the ledger."""

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
    from gpu import cases_blockdct, cases_blockdct_rgb, cases_cca, cases_coordconv, cases_maskmm

    ledger = (CHECK.parents[2] / "docs/gpu.md").read_text()
    for family in (cases_blockdct, cases_blockdct_rgb, cases_coordconv, cases_maskmm, cases_cca):
        for op in {op for case in family.CHECKS for op in case.op.split(", ")}:
            assert f"| `{op}` |" in ledger
