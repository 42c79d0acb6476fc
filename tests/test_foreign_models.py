"""Models of other libraries are swapped, run, compiled, exported, trained, saved, loaded and undone, as a page of docs says."""

from __future__ import annotations

import dataclasses
import importlib
import socket
from typing import Any

import foreign_models
import fourfold as ff
import pytest
import torch
from foreign_models import CASES, COMPRESS, COORD, HEADINGS, MASKED, MEASURED, Case, Row, build, images, outputs, quiet

#: Dynamo makes an instance of autograd.Function in some versions of torch, which another part of torch warns about.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

WHY = {
    "transformers": "needs transformers; run: pip install transformers",
    "timm": "needs timm and torchvision, built for this torch; run: pip install timm",
    "torchvision": "needs torchvision, built for this torch; run: pip install torchvision",
}


@pytest.fixture(autouse=True)
def _without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is to be downloaded, and nobody asked for."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"a connection to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


def imported(name: str) -> Any:
    """Or the test is skipped: a torchvision that was built for another torch raises what it likes."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{WHY[name]} ({error})")


def without_measures(row: Row) -> dict[str, str]:
    return {name: cell for name, cell in dataclasses.asdict(row).items() if name not in MEASURED}


def check(case: Case, backend: str) -> None:
    with quiet(case.library):
        row = foreign_models.examine(case, backend)
    stored = foreign_models.stored_rows().get((row.model, row.swapped))
    assert stored is not None, "docs/models_swapped.md has no such row; run: python tests/foreign_models.py --write"
    assert without_measures(row) == without_measures(stored), "run: python tests/foreign_models.py --write"


@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: case.name)
def test_model(case):
    imported(case.library)
    check(case, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_model_compiled_by_inductor(case):
    imported(case.library)
    check(case, "inductor")


def test_the_table_has_the_cases_and_nothing_else():
    assert [*foreign_models.stored_rows()] == [(f"{case.library} {case.model}", case.written) for case in CASES]
    heads = [text for text in foreign_models.PAGE.read_text(encoding="utf-8").splitlines() if text.startswith("| model |")]
    assert heads == ["| " + " | ".join(HEADINGS.values()) + " |"]
    for (model, swapped), row in foreign_models.stored_rows().items():
        assert foreign_models.line(row) in foreign_models.PAGE.read_text(encoding="utf-8"), (model, swapped)
        assert all(getattr(row, name) for name in HEADINGS), (model, swapped)


# ---- what the page says beside ---------------------------------------------------------------------------------------------


def test_an_ordinary_checkpoint_lacks_the_new_tensors(tmp_path):
    imported("transformers")
    case = Case("transformers", "ResNet", (COORD,))
    model: Any = case.build()
    with quiet(case.library):
        model.save_pretrained(tmp_path)
        swapped, found = foreign_models.swapping_class(case, type(model)).from_pretrained(tmp_path, output_loading_info=True)
        assert found["missing_keys"] == {name for name in swapped.state_dict() if name.endswith("coord_weight")}
        # Into the original class first, and then swapped:
        loaded = type(model).from_pretrained(tmp_path)
    x = images()
    before = outputs(loaded, x)
    case.swap(loaded)
    assert all(map(torch.equal, outputs(loaded, x), before))
    assert all(map(torch.equal, before, outputs(model, x)))


def test_tied_heads():
    imported("transformers")
    model = build("transformers", "Deformable DETR")
    modules = [*model.modules()]
    for recipe in (ff.recipes.supermask(), ff.recipes.compress(format="bitmap")):
        with pytest.raises(ValueError, match=r"^swap: weight of layer 'class_embed.0' .* is tied to 'class_embed.1.weight'"):
            ff.swap(model, recipe)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    ff.swap(model, foreign_models.RECIPES[MASKED])
    heads: Any = model.class_embed
    assert heads[0] is not heads[1]
    assert heads[0].weight is heads[1].weight and torch.equal(heads[0].mask_bits, heads[1].mask_bits)


def test_layers_that_are_never_called():
    imported("torchvision")
    model = build("torchvision", "ViT")
    with pytest.raises(ValueError, match=r"^swap: layer '.*self_attention.out_proj' .* is read, and never called"):
        ff.swap(model, foreign_models.RECIPES[MASKED])


def test_a_weight_that_is_asked_for():
    """T5 asks for ``wo.weight.dtype``, and a SparseLinear has no weight: found out by the example, and nothing has changed."""
    transformers = imported("transformers")
    config = transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = transformers.T5EncoderModel(config).eval()
    words = torch.arange(5)[None]
    modules, before = [*model.modules()], outputs(model, words)
    with pytest.raises(ValueError, match=r"^swap: the model fails on the example, with its new layers: .*'weight'"):
        ff.swap(model, foreign_models.RECIPES[COMPRESS], example=words)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(map(torch.equal, outputs(model, words), before))
    others = ["**.q", "**.k", "**.v", "**.o", "**.wi"]
    report = ff.swap(model, foreign_models.RECIPES[COMPRESS], where=others, example=words)
    assert len(report.names) == 5
