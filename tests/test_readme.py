"""README and the guides say what is so: what they name exists, the tables are complete."""

from __future__ import annotations

import re

import fourfold as ff
import pytest
from pages import PAGES, ROOT, name_of

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_exist(page):
    """`csrc/ops.cpp` in backticks, from the root of the repository."""
    named = re.findall(r"`((?:\w+|\.ci)/[\w./]+\.\w+)`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not name.startswith("build/") and not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    said = set(re.findall(r"(?:^|[`$] *|^    )make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M))
    assert said <= targets


def test_every_function_and_module_has_a_row():
    without_speeds = re.sub(r"<!-- benchmarks:begin -->.*<!-- benchmarks:end -->", "", README, flags=re.S)
    rows = re.findall(r"^\| `([\w.]+)`", without_speeds, re.M)
    rooms = ("fourfold.ops.", "fourfold.tickets", "fourfold.comparison", "fourfold.swapping")
    modules = {name: getattr(getattr(ff, name), "__module__", "") for name in ff.__all__}
    functions = [name for name, module in modules.items() if module == "fourfold" or module.startswith(rooms)]
    assert functions
    named = {"nn": ff.nn.__all__, "jpeg": ff.jpeg.__all__, "models": ("dct_resnet50", "resnet50"), "compat": ff.compat.__all__}
    named |= {"metrics": ("CCAMetric",), "recipes": ff.recipes.__all__}
    assert sorted(rows) == sorted([*functions, *(f"{module}.{name}" for module, names in named.items() for name in names)])
