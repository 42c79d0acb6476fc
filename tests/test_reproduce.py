"""`python -m fourfold.reproduce`: choosing, judging and storing; the fast claims; that pages say what runs found."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fourfold import _load
from fourfold.reproduce import __main__ as command
from fourfold.reproduce import _registry, _render, _run, _timing, blockdct, coordconv
from fourfold.reproduce._registry import LOST, NOT, OFFLINE, PARTLY, REPRODUCED, UNFINISHED, Claim, Run

DOCS = Path(__file__).parents[1] / "docs"
FAST = ["cca.invariance", "cca.theorem", "blockdct.transform", "blockdct.linear-equivalence", "coordconv.zero-weights",
        "coordconv.parameters", "maskmm.memory", "supsup.all-masks-at-once"]  # fmt: skip


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
        assert not claim.criterion.endswith(".") and not claim.partly.endswith(".")  # the page adds it


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


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("nonsense", "--list shows them"),
        ("", "--list shows them"),
        ("cca.invarience", "did you mean cca.invariance"),
        ("single-images", "did you mean supsup.single-images"),
        ("Cordconv", "did you mean coordconv"),
        ("CCA.theorem", "did you mean cca.theorem"),
        ("dowsampling", "did you mean coordconv.downsampling"),
    ],
)
def test_an_unknown_name_is_refused(name, meant, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([name])
    err = capsys.readouterr().err
    assert f"no claim or family is named {name!r}; " in err and meant in err


def test_two_of_one_name_are_refused():
    existing = _registry.every_claim()["cca.theorem"]
    with pytest.raises(ValueError, match="two claims are named"):
        _registry.register(existing)


def test_list_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(command, "run_claim", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(_render, "write", lambda *_: pytest.fail("it wrote"))
    for more in ([], ["--full", "--write", "none/x.json"], ["--render", "none.json", "--write", "none.md"]):
        assert command.main(["--list", *more]) == 0
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
        ([NOT, PARTLY, NOT, NOT, NOT], 5, NOT),
        ([NOT] * 3 + [REPRODUCED] * 2, 5, NOT),
        ([NOT] * 2 + [PARTLY] * 3, 5, PARTLY),
        ([NOT] * 2 + [PARTLY] + [REPRODUCED] * 2, 5, PARTLY),
        ([REPRODUCED], 4, REPRODUCED),
        ([PARTLY], 4, PARTLY),
        ([NOT], 4, NOT),
    ],
)
def test_verdict_over_seeds(verdicts, at_least, expected):
    assert claim_of(at_least=at_least).judge([Run(one, "f") for one in verdicts])[0] == expected


@pytest.mark.parametrize(
    ("verdicts", "at_least", "expected"),
    [
        ([REPRODUCED] * 4, 5, UNFINISHED),
        ([REPRODUCED] * 3 + [PARTLY], 5, LOST),
        ([PARTLY], 5, LOST),
        ([NOT], 4, UNFINISHED),
        ([REPRODUCED, NOT, NOT], 4, LOST),
    ],
)
def test_some_seeds_can_settle_what_more_cannot_change(verdicts, at_least, expected):
    runs = [Run(one, "f", seed=seed) for seed, one in enumerate(verdicts)]
    result = _run.result_of(claim_of(at_least=at_least), True, runs)
    assert result["verdict"] == expected
    assert (f"{verdicts.count(REPRODUCED)} of them as claimed, where {at_least} have to be" in result["found"]) == (
        expected == LOST
    )
    together = claim_of(at_least=at_least, over_seeds=lambda runs: (PARTLY, "means"))
    assert _run.result_of(together, True, runs)["verdict"] == UNFINISHED


def test_downsampling_counts_seeds():
    def judged(worse: int) -> tuple[str, str]:
        return coordconv._downsampled([Run("", "", {"conv": 0.5, "coordconv": 0.4 if i < worse else 0.6}) for i in range(5)])

    assert [judged(worse)[0] for worse in range(6)] == [NOT, NOT, NOT, PARTLY, REPRODUCED, REPRODUCED]
    assert judged(3)[1].endswith("worse with them in 3 of 5 seeds")


@pytest.mark.parametrize(
    ("simplejpeg", "pillow", "expected"), [(2.0, 3.0, REPRODUCED), (0.9, 3.0, PARTLY), (3.0, 0.9, PARTLY), (0.8, 0.9, NOT)]
)
def test_coefficients_race_the_faster_decoder(simplejpeg, pillow, expected, monkeypatch):
    pytest.importorskip("PIL", reason="needs Pillow; run: pip install pillow")
    monkeypatch.setattr(blockdct, "medians", lambda calls, laps: [16e-3, 16e-3 * simplejpeg, 16e-3 * pillow])
    run = blockdct.pipeline(0, full=True)
    assert run.verdict == expected and run.figures == pytest.approx({"simplejpeg": simplejpeg, "Pillow": pillow})
    assert f"simplejpeg {simplejpeg:.2f} ms" in run.found and f"Pillow {pillow:.2f} ms" in run.found
    assert f"{min(simplejpeg, pillow):.2f} times as fast as the faster" in run.found


def test_decoders_give_the_same_input():
    pytest.importorskip("PIL", reason="needs Pillow; run: pip install pillow")
    pytest.importorskip("simplejpeg", reason="needs simplejpeg; run: pip install simplejpeg")
    torch.manual_seed(0)
    (file,) = blockdct._files(1)
    one, other = blockdct._pixels(file), blockdct._pixels_by_simplejpeg(file)
    assert one.shape == other.shape == (3, 224, 224)
    assert (one - other).abs().max() <= 3 / 64  # their upsampling of chroma and rounding may differ


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
    claim = _registry.every_claim()[name]
    if "tqdm" in claim.needs:
        pytest.importorskip("tqdm", reason="the example needs tqdm; run: pip install tqdm")
    result = _run.run_claim(claim, full=False)
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
    project = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    (extra,) = re.findall(r"^reproduce = \[(.*)\]$", project, re.M)
    assert set(re.findall(r'"([\w-]+)"', extra)) == {*_run.PACKAGES.values(), "matplotlib"}  # for the page's pictures


def test_the_examples_that_claims_run_are_installed():
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(_run.__file__).parent.glob("*.py"))
    names = set(re.findall(r"from fourfold\.examples import (\w+)", sources))
    assert len(names) >= 6
    for name in names:
        assert importlib.util.find_spec(f"fourfold.examples.{name}") is not None, name


def test_a_build_without_jpeg_is_said(capsys, monkeypatch):
    monkeypatch.setattr(_load, "jpeg", None)
    monkeypatch.setitem(_load.missing, "jpeg", "build it with libjpeg")
    assert command.main(["blockdct.codec"]) == 1
    assert "NOT RUN" in (out := capsys.readouterr().out) and "build it with libjpeg" in out


def test_quick_and_full_exclude_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--quick", "--full"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("none/x.json", "there is no folder"),
        (".", "is no file that could be written anew"),
        ("/dev/null", "is no file that could be written anew"),
        ("/proc/x.json", "/proc/x.json cannot be written"),
    ],
)
def test_write_asks_for_its_place_first(target, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_claim", lambda *_: pytest.fail("it ran"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--write", target])
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_write_asks_for_a_folder_that_lets_it(capsys, tmp_path, monkeypatch):
    """Whoever may write everywhere cannot be refused, so a refusal stands in."""
    monkeypatch.setattr(command, "run_claim", lambda *_: pytest.fail("it ran"))

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--write", str(tmp_path / "x.json")])
    assert "x.json cannot be written (Permission denied)" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_said(stored, capsys):
    for target in ("/proc/x.md", str(stored.parent)):
        with pytest.raises(SystemExit, match="2"):
            command.main(["--render", str(stored), "--write", target])
        assert target in capsys.readouterr().err


def test_a_reader_may_have_enough():
    """As `| head -n 1` has."""
    with subprocess.Popen(
        [sys.executable, "-m", "fourfold.reproduce", "--list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()  # before the first line
        assert process.stderr.read() == ""
    assert process.returncode == 128 + 13


def test_the_processor_has_family_and_model(monkeypatch):
    shown = {
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel\t\t: 18\n":
            "AMD EPYC family 25 model 17",
        "processor\t: 0\nCPU part\t: 0xd4f\n": "0xd4f",
        "": _run.platform.machine(),
    }  # fmt: skip
    for text, name in shown.items():
        monkeypatch.setattr(Path, "read_text", lambda _, text=text: text)
        assert _run.processor() == name


def test_a_record_without_family_and_model_goes_on(tmp_path, capsys, monkeypatch):
    """And is left to say of its machine what it said."""
    path = tmp_path / "x.json"
    monkeypatch.setattr(_run, "processor", lambda: "AMD EPYC")
    assert command.main(["supsup.bytes", "--write", str(path)]) == 0
    before = json.loads(path.read_text())["machine"]
    monkeypatch.setattr(_run, "processor", lambda: "AMD EPYC family 25 model 17")
    assert command.main(["maskmm.bytes", "--write", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["machine"] == before and before["cpu"] == "AMD EPYC" and len(record["claims"]) == 2
    monkeypatch.setattr(_run, "processor", lambda: "AMD EPYC 9 family 25 model 17")
    with pytest.raises(SystemExit, match="2"):
        command.main(["maskmm.bytes", "--write", str(path)])
    assert "holds a run with machine" in capsys.readouterr().err


def test_a_run_in_parts(tmp_path, capsys):
    path = tmp_path / "x.json"
    for name in ("supsup.bytes", "maskmm.bytes", "supsup.bytes"):
        assert command.main([name, "--write", str(path)]) == 0
    record = json.loads(path.read_text())
    assert list(record["claims"]) == ["maskmm.bytes", "supsup.bytes"]  # in the ledger's order
    versions = {**record["machine"], "fourfold": "0.0.1"}
    for key, other in (("mode", "full"), ("machine", {"cpu": "another"}), ("machine", versions)):
        path.write_text(json.dumps(record | {key: other}))
        with pytest.raises(SystemExit, match="2"):
            command.main(["maskmm.bytes", "--write", str(path)])
        assert f"holds a run with {key}" in capsys.readouterr().err


class Counted:
    """A claim that can break at a seed, and keeps the seeds that it ran."""

    def __init__(self, monkeypatch) -> None:
        self.ran: list[int] = []
        self.breaks_at = -1
        self.claim = claim_of(self.run)
        every = _registry.every_claim() | {"cca.x": self.claim}
        for module in (_registry, _run, _render):
            monkeypatch.setattr(module, "every_claim", lambda: every)

    def run(self, seed: int, full: bool) -> Run:
        if seed == self.breaks_at:
            raise KeyboardInterrupt
        self.ran.append(seed)
        return Run(REPRODUCED if seed else NOT, f"seed {seed}", {"value": float(seed)})


def test_finished_seeds_are_not_run_again(tmp_path, capsys, monkeypatch):
    path, counted = tmp_path / "x.json", Counted(monkeypatch)
    counted.breaks_at = 2
    assert command.main(["cca.x", "--full", "--write", str(path)]) == 130
    assert capsys.readouterr().err == f"stopped; 2 of 5 seeds of cca.x are kept in {path}, and the same command goes on\n"
    result = json.loads(path.read_text())["claims"]["cca.x"]
    assert [run["seed"] for run in result["runs"]] == [0, 1] and result["verdict"] == LOST
    counted.breaks_at = -1
    assert command.main(["cca.x", "--full", "--seeds", "3,4", "--write", str(path)]) == 0
    assert "4 of 5 seeds so far" in capsys.readouterr().out
    assert command.main(["cca.x", "--full", "--write", str(path)]) == 0
    assert counted.ran == [0, 1, 3, 4, 2]
    result = json.loads(path.read_text())["claims"]["cca.x"]
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2, 3, 4] and result["verdict"] == PARTLY
    assert [run["figures"]["value"] for run in result["runs"]] == [0, 1, 2, 3, 4] and "4 of 5 seeds" in result["found"]
    assert command.main(["cca.x", "--full", "--write", str(path)]) == 0
    assert len(counted.ran) == 5
    assert command.main(["cca.x", "--full", "--again", "--seeds", "0", "--write", str(path)]) == 0
    assert counted.ran[5:] == [0] and len(json.loads(path.read_text())["claims"]["cca.x"]["runs"]) == 1
    assert [one.name for one in tmp_path.iterdir()] == ["x.json"]


def test_stopping_says_what_is_kept(capsys, tmp_path, monkeypatch):
    path, counted = tmp_path / "x.json", Counted(monkeypatch)
    counted.breaks_at = 1
    assert command.main(["cca.x", "--full"]) == 130
    assert capsys.readouterr().err.startswith("stopped; nothing is kept: --write FILE would")
    for more, seeds in ((["--seeds", "3"], 1), ([], 2), (["--again"], 1)):
        command.main(["cca.x", "--full", "--write", str(path), *more])
        held = len(json.loads(path.read_text())["claims"]["cca.x"]["runs"])
        err = capsys.readouterr().err
        assert held == seeds and ("--seeds" in more or f"stopped; {held} of 5 seeds of cca.x are kept in {path}, and" in err)
        assert ("without --again the same command goes on" in err) == ("--again" in more)
    assert [one.name for one in tmp_path.iterdir()] == ["x.json"]


def test_a_broken_write_leaves_the_old_file(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.json"
    assert command.main(["supsup.bytes", "--write", str(path)]) == 0
    before = path.read_text()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_run.os, "replace", interrupt)
    assert command.main(["supsup.bytes", "--again", "--write", str(path)]) == 130
    assert [one.name for one in tmp_path.iterdir()] == ["x.json"] and path.read_text() == before


def test_seeds_of_another_criterion_are_not_mixed_in(tmp_path, capsys, monkeypatch):
    path, counted = tmp_path / "x.json", Counted(monkeypatch)
    assert command.main(["cca.x", "--full", "--seeds", "0", "--write", str(path)]) == 0
    record = json.loads(path.read_text())
    record["claims"]["cca.x"]["criterion"] = "another"
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="2"):
        command.main(["cca.x", "--full", "--write", str(path)])
    assert "criterion of cca.x has changed" in capsys.readouterr().err and counted.ran == [0]
    assert command.main(["cca.x", "--full", "--again", "--write", str(path)]) == 0
    assert counted.ran == [0, 0, 1, 2, 3, 4]
    record["claims"]["cca.gone"] = record["claims"]["cca.x"]
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="2"):
        command.main(["cca.x", "--full", "--write", str(path)])
    assert "cca.gone that is no more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--full --write"),
        (["--full", "--seeds", "0"], "--full --write"),
        (["--full", "--write", "x.json", "--seeds", "5"], "seeds are 0, 1, 2, 3, 4"),
        (["--full", "--write", "x.json", "--seeds", "0-2"], "seeds are 0, 1, 2, 3, 4"),
        (["--again"], "--write FILE"),
        (["--render", "x.json", "--again"], "--write FILE"),
    ],
)
def test_options_that_make_no_sense(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_bar_moves_within_a_seed(monkeypatch):
    tqdm = pytest.importorskip("tqdm", reason="the bar needs tqdm; run: pip install tqdm")
    seen = []

    def run(seed: int, full: bool) -> Run:
        for share in (0.25, 0.5):
            _registry.step(share)
            seen.append(bar.n)
        inner = _registry.part(1, 2)
        inner(0.5)
        seen.append(bar.n)
        return Run(REPRODUCED, "f")

    bar = tqdm.tqdm(total=4, disable=False, file=io.StringIO())
    monkeypatch.setattr(command, "bar_of", lambda seeds: bar)
    record = _run.new_record(full=False)
    assert command.run([claim_of(run), claim_of(run)], record, None) == 0
    assert seen == [0.25, 0.5, 0.75, 1.25, 1.5, 1.75] and bar.n == 2
    _registry.step(0.5)  # nobody listens any more
    assert bar.n == 2


def test_a_training_says_how_far_it_is():
    pytest.importorskip("tqdm", reason="the example needs tqdm; run: pip install tqdm")
    from fourfold.examples import not_so_clevr as example

    seen, _ = example.centres("uniform")
    shares = []
    with _registry.listening(shares.append):
        coordconv._trained(
            example.coord_conv_net, "regression", 0, seen, _registry.part(1, 2), steps=4, batch=2, weight_decay=0.0
        )
    assert shares == [0.5, 0.625, 0.75, 0.875]


def test_the_bar_counts_seeds(monkeypatch):
    tqdm = pytest.importorskip("tqdm", reason="the bar needs tqdm; run: pip install tqdm")
    shown = io.StringIO()
    monkeypatch.setattr(
        command, "progress_bar", lambda total, unit: tqdm.tqdm(total=total, unit=unit, file=shown, mininterval=0)
    )
    with command.bar_of(7) as bar:
        for share in (1.0, 1.01, 1.02):
            bar.update(share - bar.n)
    assert "1.02/7 seeds" in shown.getvalue()


def test_timings_take_turns():
    order = []
    first, second = _timing.medians([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert order == ["a", "b"] * 4 and first >= 0 and second >= 0
    order.clear()
    _timing.medians([lambda: order.append("a")], 1, warm_up=False)
    assert order == ["a"]
    order.clear()
    (seconds,) = _timing.medians([lambda: order.append("a")], 1, at_least=0.001)
    assert len(order) > 10 and seconds < 0.001


def test_one_thread_is_timed_by_the_processor():
    """Which does not count what it waits."""
    (seconds,) = _timing.medians([lambda: time.sleep(0.05)], 1)
    torch.set_num_threads(2)
    (waited,) = _timing.medians([lambda: time.sleep(0.05)], 1)
    assert seconds < 0.03 < 0.05 <= waited


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path, capsys) -> Path:
    path = tmp_path / "claims.json"
    assert command.main(["supsup.bytes", "cca.compression", "--write", str(path)]) == 0
    capsys.readouterr()
    return path


def test_page_says_what_was_found(stored, tmp_path, capsys):
    record = json.loads(stored.read_text())
    assert record["mode"] == "quick" and list(record["claims"]) == ["supsup.bytes"]  # cca.compression cannot run
    assert command.main(["--render", str(stored)]) == 0
    page = capsys.readouterr().out
    assert record["claims"]["supsup.bytes"]["found"] in page and "**partly (quick)**" in page
    assert "This was a quick run" in page and "as it needs the paper's trained networks" in page
    target = tmp_path / "claims.md"
    assert command.main(["--render", str(stored), "--write", str(target)]) == 0
    assert target.read_text() == page.removesuffix("\n")  # print adds one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claims.json", "claims.md"]  # nothing to draw


def test_the_page_has_every_claim(stored):
    """Those that have not run yet as well, and says so."""
    page = _render.page(_render.load(stored))
    for name, claim in _registry.every_claim().items():
        entry = page.partition(f"\n### `{name}`\n")[2].partition("\n#")[0]
        assert claim.claim[1:] in entry and claim.source in entry and claim.criterion in entry
        said = OFFLINE if claim.run is None else "partly (quick)" if name == "supsup.bytes" else "not yet run"
        assert f"Verdict: **{said}**" in entry
        assert f"[`{name}`](#{_render._anchor(name)}) | {said} |" in page


def test_the_page_names_what_did_not_hold_and_seeds_still_to_run(tmp_path, monkeypatch):
    path, counted = tmp_path / "x.json", Counted(monkeypatch)
    for seeds in ("0,3", "1,2,4"):
        assert command.main(["cca.x", "--full", "--seeds", seeds, "--write", str(path)]) == 0
        page = _render.page(_render.load(path))
        first = seeds == "0,3"
        assert (f"**{LOST}** (seeds 0, 3; still to be run: 1, 2, 4; " in page) == first
        assert (f"- [`cca.x`](#ccax), {LOST}: c. 2 of 5" in page) == first
        assert ("- [`cca.x`](#ccax), partly: c. 4 of 5" in page) == (not first)
        assert (f"Of the others 1 {LOST} and " in page) == first
        assert "[`cca.x`](#ccax). This page says nothing" not in page  # it does
    assert "value 2 (0 to 4)" in page and counted.ran == [0, 3, 1, 2, 4]


def test_verdicts_are_what_the_seeds_give(stored, capsys):
    record = json.loads(stored.read_text())
    record["claims"]["supsup.bytes"]["verdict"] = REPRODUCED
    stored.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="2"):
        command.main(["--render", str(stored)])
    assert "what its seeds do not give" in capsys.readouterr().err
    for name in ("supsup.bytes", "maskmm.bytes"):  # itself, or any other: all that the file holds are judged anew
        stored.write_text(json.dumps(record))
        assert command.main([name, "--write", str(stored)]) == 0
        assert json.loads(stored.read_text())["claims"]["supsup.bytes"]["verdict"] == PARTLY


def test_the_page_begins_with_what_is_not_known_yet_and_what_verdicts_mean(stored):
    page = _render.page(_render.load(stored))
    intro, meanings = page.split("\n\n")[2:4]
    every = _registry.every_claim()
    waiting = [name for name, claim in every.items() if claim.run is not None and name != "supsup.bytes"]
    offline = len(every) - len(waiting) - 1
    assert f"Of {len(every)} claims **{len(waiting)} not yet run**: " in intro
    assert f"Of the others 1 partly and {offline} not testable offline." in intro
    assert all(f"[`{name}`](#{_render._anchor(name)})" in intro for name in waiting)
    for verdict in (*_registry.VERDICTS, _render.NOT_YET):
        assert verdict in meanings
    verdicts = {"cca.a": NOT, "cca.b": LOST, "coordconv.150x": _render.NOT_YET, "coordconv.uniform": UNFINISHED}
    assert _render._standing(verdicts) == (
        "Of 4 claims **1 not yet run and 1 unfinished, above all CoordConv's trainings**: [`coordconv.150x`](#coordconv150x), "
        "[`coordconv.uniform`](#coordconvuniform). This page says nothing on whether these hold. Of the others 1 not "
        f"reproduced and 1 {LOST}."
    )
    assert "trainings" not in _render._standing(dict.fromkeys(["coordconv.150x", "cca.a"], _render.NOT_YET))
    assert every.keys() >= _render.TRAININGS
    assert _render._standing({"cca.d": NOT}) == "Of 1 claims 1 not reproduced."


def test_partly_is_defined_wherever_it_was_given():
    record = _render.load(DOCS / "claims.json")
    every = _registry.every_claim()
    for name, result in record["claims"].items():
        if PARTLY in {result["verdict"], *(run["verdict"] for run in result["runs"])}:
            assert every[name].partly or "partly" in every[name].criterion, name


def test_the_documentation_shows_the_stored_run():
    """docs/claims.md is what --render makes of docs/claims.json, with the pictures that it shows."""
    record = _render.load(DOCS / "claims.json")
    assert record["mode"] == "full"
    page = (DOCS / "claims.md").read_text(encoding="utf-8")
    assert page == _render.page(record)
    assert sorted(re.findall(r"\(pictures/(claims-[\w.]+)\)", page)) == sorted(p.name for p in DOCS.glob("pictures/claims-*"))


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
    record = _run.new_record(full=True)
    for name, run in {
        "coordconv.quadrant": Run(PARTLY, "", series={"split": "quadrant", "coordconv": "1" * 729, "deconv": "0" * 729}),
        "maskmm.criteria": Run(PARTLY, "", {"random": 0.1, "large_final": 0.8}),
        "cca.bottom-up": Run(PARTLY, "", series={"steps": [0, 10], "curves": [[0.5, 1.0], [0.4, 1.0]]}),
    }.items():
        record["claims"][name] = _run.result_of(every[name], True, [run])
    written = _render.write(record, tmp_path / "claims.md")
    assert [path.name for path in written] == ["claims.md", "claims-coordconv.png", "claims-maskmm.svg", "claims-cca.svg"]
    page = written[0].read_text()
    for path in written[1:]:
        assert path.stat().st_size > 1000 and f"](pictures/{path.name})" in page
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in _render.write(record, tmp_path / "claims.md")] == before


def test_pictures_need_matplotlib(tmp_path, monkeypatch):
    record = _run.new_record(full=True)
    claim = _registry.every_claim()["maskmm.criteria"]
    record["claims"][claim.name] = _run.result_of(claim, True, [Run(PARTLY, "", {"random": 0.1})])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        _render.write(record, tmp_path / "claims.md")
