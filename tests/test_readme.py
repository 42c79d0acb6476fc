"""README and the guides say what is so: their Python runs, what they name exists, the tables are complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fourfold as ff
import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "demo"]


def python_of(page: Path) -> str:
    """Its Python blocks, in order, as one program."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))


def stated_shapes(program: str) -> list[tuple[str, list[int]]]:
    """Of its lines `name = ...  # [2, 3 * 64, 13, 29]`."""
    return [(name, eval(shape)) for name, shape in re.findall(r"^(\w+) = .*# (\[[\d, *]+\])$", program, re.M)]


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=lambda page: page.name)
def test_python_runs(page):
    """And the shapes in its comments are the shapes."""
    program = python_of(page)
    names: dict[str, torch.Tensor] = {}
    exec(compile(program, page.name, "exec"), names)
    shapes = stated_shapes(program)
    assert len(shapes) >= 3
    assert [(name, list(names[name].shape)) for name, _ in shapes] == shapes


def test_readme_and_the_guide_have_python():
    assert python_of(ROOT / "README.md")
    assert python_of(ROOT / "docs" / "block_dct.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_exist(page):
    """`csrc/ops.cpp` in backticks, from the root of the repository."""
    named = re.findall(r"`((?:\w+|\.ci)/[\w./]+\.\w+)`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not name.startswith("build/") and not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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


def test_readme_names_every_example():
    assert [path.name for path in EXAMPLES if f"(examples/{path.name})" not in README] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path):
    text = path.read_text(encoding="utf-8")
    if "sklearn" in text:
        pytest.importorskip("sklearn", reason="needs scikit-learn; run: pip install scikit-learn pillow")
        pytest.importorskip("PIL", reason="needs pillow; run: pip install scikit-learn pillow")
    if "ff.jpeg" in text and not ff.has_jpeg():
        pytest.skip("built without libjpeg")
    if "import ray" in text:
        pytest.importorskip("ray", reason="needs Ray; run: pip install 'ray[data]' pillow")
    # What a longer run shows is tested where it belongs.
    quick = ["--quick"] if '"--quick"' in text else []
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # on a busy machine two mostly wait for each other
    result = subprocess.run([sys.executable, str(path), *quick], capture_output=True, text=True, check=False, env=one_thread)
    assert result.returncode == 0, result.stderr
    assert result.stdout
