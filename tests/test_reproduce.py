"""`python -m fourfold.reproduce`: choosing, judging and storing; the fast claims; that pages say what runs found."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from fourfold import _load
from fourfold.reproduce import __main__ as command
from fourfold.reproduce import _registry, _render, _run, coordconv
from fourfold.reproduce._registry import NOT, OFFLINE, PARTLY, REPRODUCED, Claim, Run

FAST = ["cca.invariance", "cca.theorem", "blockdct.transform", "blockdct.linear-equivalence", "coordconv.zero-weights",
        "supsup.all-masks-at-once"]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def claim_of(run=None, **fields) -> Claim:
    return Claim(
        "cca.x", "cca", claim="c", source="s", criterion="k", run=run or (lambda seed, full: Run(REPRODUCED, "")), **fields
    )


# ---- the list --------------------------------------------------------------------------------------------------------


def test_every_claim_says_what_it_is():
    every = _registry.every_claim()
    assert {claim.family for claim in every.values()} == set(_registry.FAMILIES)
    for name, claim in every.items():
        assert re.fullmatch(r"[a-z]+\.[a-z0-9.-]+", name) and name.startswith(claim.family + ".")
        assert claim.claim and claim.source and claim.criterion


@pytest.mark.parametrize(
    ("names", "some", "others"),
    [
        ([], {"cca.theorem", "coordconv.uniform"}, set()),
        (["cca"], {"cca.theorem", "cca.compression"}, {"coordconv.uniform"}),
        (["*.bytes", "cca.theorem"], {"maskmm.bytes", "supsup.bytes", "cca.theorem"}, {"cca.invariance"}),
    ],
)
def test_choosing(names, some, others):
    chosen = [claim.name for claim in _registry.choose(names)]
    assert some <= set(chosen) and not others & set(chosen) and len(chosen) == len(set(chosen))
    assert chosen == [name for name in _registry.every_claim() if name in chosen]


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["nonsense"])
    assert "no claim or family is named 'nonsense'" in capsys.readouterr().err


def test_two_of_one_name_are_refused():
    existing = _registry.every_claim()["cca.theorem"]
    with pytest.raises(ValueError, match="two claims are named"):
        _registry.register(existing)


def test_list_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(command, "run_claim", lambda *_: pytest.fail("it ran"))
    assert command.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(_registry.every_claim())


# ---- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "at_least", "expected"),
    [
        ([REPRODUCED] * 5, 5, REPRODUCED),
        ([REPRODUCED] * 4 + [NOT], 5, PARTLY),
        ([REPRODUCED] * 4 + [NOT], 4, REPRODUCED),
        ([REPRODUCED] * 3 + [NOT] * 2, 4, PARTLY),
        ([NOT] * 5, 4, NOT),
        ([NOT] * 4 + [PARTLY], 4, PARTLY),
        ([REPRODUCED], 4, REPRODUCED),
        ([PARTLY], 4, PARTLY),
        ([NOT], 4, NOT),
    ],
)
def test_verdict_over_seeds(verdicts, at_least, expected):
    assert claim_of(at_least=at_least).judge([Run(one, "f") for one in verdicts])[0] == expected


def test_seeds_are_0_to_4_or_0_alone():
    assert claim_of().seeds(full=True) == [0, 1, 2, 3, 4] and claim_of().seeds(full=False) == [0]
    assert claim_of(seeded=False).seeds(full=True) == [0]
    every = _registry.every_claim()
    assert every["cca.compression"].seeds(full=True) == [] and every["cca.compression"].judge([])[0] == OFFLINE


def test_each_run_begins_with_its_seed():
    draws = {}

    def run(seed: int, full: bool) -> Run:
        draws[seed] = torch.rand(()).item()
        return Run(REPRODUCED, "")

    result = _run.run_claim(claim_of(run), full=True)
    for seed, drawn in draws.items():
        torch.manual_seed(seed)
        assert drawn == torch.rand(()).item()
    assert [one["seed"] for one in result["runs"]] == list(draws) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", FAST)
def test_fast_claims_are_reproduced(name):
    result = _run.run_claim(_registry.every_claim()[name], full=False)
    assert result["verdict"] == REPRODUCED, result["found"]


@pytest.mark.parametrize("name", ["maskmm.bytes", "supsup.bytes"])
def test_padding_makes_bytes_a_partial_success(name):
    """Rows end at 64 bits: when they no longer do, the claim must say reproduced."""
    result = _run.run_claim(_registry.every_claim()[name], full=False)
    figures = result["runs"][0]["figures"]
    assert result["verdict"] == PARTLY and figures["weights"] / 8 < figures["bytes"] < figures["weights"] / 7


def test_a_claim_can_fail(monkeypatch):
    """The judge looks at what ran: a CoordConv that changes bits is not reproduced."""
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    assert _run.run_claim(_registry.every_claim()["coordconv.zero-weights"], full=False)["verdict"] == NOT


def test_squares_are_nine_wide():
    pytest.importorskip("tqdm", reason="the example needs tqdm; run: pip install tqdm")
    image = coordconv.squares(torch.tensor([[4, 59], [20, 30]])).reshape(2, 64, 64)
    assert image.sum((1, 2)).tolist() == [81, 81]
    assert image[0, 0:9, 55:64].all() and image[1, 16:25, 26:35].all()


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_line_per_claim_and_nothing_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(["supsup.bytes", "supsup.scale"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  partly\* +supsup\.bytes: ", out, re.M) and re.search(
        r"^  not testable offline +supsup\.scale: ", out, re.M
    )
    assert "1 partly, 1 not testable offline" in out and "one seed each" in out
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_said(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    assert command.main(["maskmm.learned", "maskmm.bytes"]) == 1
    out, err = capsys.readouterr()
    assert "NOT RUN" in out and "pip install scikit-learn" in out and "maskmm.bytes" in out and "1 not run" in err


def test_claims_need_what_can_be_said():
    assert {name for claim in _registry.every_claim().values() for name in claim.needs} == {*_run.PACKAGES, "libjpeg"}


def test_a_build_without_jpeg_is_said(capsys, monkeypatch):
    monkeypatch.setattr(_load, "jpeg", None)
    monkeypatch.setitem(_load.missing, "jpeg", "build it with libjpeg")
    assert command.main(["blockdct.codec"]) == 1
    assert "NOT RUN" in (out := capsys.readouterr().out) and "build it with libjpeg" in out


def test_quick_and_full_exclude_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--quick", "--full"])
    assert "not allowed with" in capsys.readouterr().err


def test_write_asks_for_its_folder_first(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_claim", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match="2"):
        command.main(["--write", str(tmp_path / "none" / "x.json")])
    assert "there is no folder" in capsys.readouterr().err


def test_a_run_in_parts(tmp_path, capsys):
    path = tmp_path / "x.json"
    for name in ("supsup.bytes", "maskmm.bytes", "supsup.bytes"):
        assert command.main([name, "--write", str(path)]) == 0
    record = json.loads(path.read_text())
    assert list(record["claims"]) == ["maskmm.bytes", "supsup.bytes"]  # in the ledger's order
    for key, other in (("mode", "full"), ("machine", {"cpu": "another"})):
        path.write_text(json.dumps(record | {key: other}))
        with pytest.raises(SystemExit, match="2"):
            command.main(["cca.compression", "--write", str(path)])
        assert f"holds a run with {key}" in capsys.readouterr().err


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path, capsys) -> Path:
    path = tmp_path / "claims.json"
    assert command.main(["supsup.bytes", "cca.compression", "--write", str(path)]) == 0
    capsys.readouterr()
    return path


def test_page_says_what_was_found(stored, tmp_path, capsys):
    record = json.loads(stored.read_text())
    assert record["mode"] == "quick" and list(record["claims"]) == ["supsup.bytes", "cca.compression"]
    assert command.main(["--render", str(stored)]) == 0
    page = capsys.readouterr().out
    assert record["claims"]["supsup.bytes"]["found"] in page and "**partly** (quick)" in page and "not testable offline" in page
    assert "A quick run" in page
    target = tmp_path / "claims.md"
    assert command.main(["--render", str(stored), "--write", str(target)]) == 0
    assert target.read_text() == page.removesuffix("\n")  # print adds one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claims.json", "claims.md"]  # nothing to draw


def test_a_changed_criterion_needs_a_new_run(stored, capsys):
    record = json.loads(stored.read_text())
    record["claims"]["supsup.bytes"]["criterion"] = "another"
    stored.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="2"):
        command.main(["--render", str(stored)])
    assert "criterion of supsup.bytes has changed" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"fourfold_claims": 0}'])
def test_other_files_are_refused(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is not JSON|holds no run"):
        _render.load(path)


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib; run: pip install matplotlib")
    pytest.importorskip("tqdm", reason="needs tqdm; run: pip install tqdm")
    every = _registry.every_claim()

    def result(name: str, **run: object) -> dict[str, object]:
        words = {"claim": every[name].claim, "source": "", "criterion": every[name].criterion, "verdict": PARTLY, "found": ""}
        return words | {"seconds": 1.0, "runs": [run]}

    record = _run.new_record(full=True)
    record["claims"] = {
        "coordconv.quadrant": result(
            "coordconv.quadrant", series={"split": "quadrant", "coordconv": "1" * 729, "deconv": "0" * 729}
        ),
        "maskmm.criteria": result("maskmm.criteria", figures={"random": 0.1, "large_final": 0.8}),
        "cca.bottom-up": result("cca.bottom-up", series={"steps": [0, 10], "curves": [[0.5, 1.0], [0.4, 1.0]]}),
    }
    written = _render.write(record, tmp_path / "claims.md")
    assert [path.name for path in written] == ["claims.md", "claims_coordconv.png", "claims_maskmm.png", "claims_cca.png"]
    page = written[0].read_text()
    for path in written[1:]:
        assert path.stat().st_size > 1000 and f"](images/{path.name})" in page
