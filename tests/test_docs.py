"""The documentation is complete: every public name in the reference, every guide with its picture and its limits."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import fourfold as ff
import pytest

DOCS = Path(__file__).parents[1] / "docs"
ENTRY = re.compile(r"^::: fourfold\.([\w.]+)$", re.M)
GUIDES = ["block_dct", "jpeg", "coordconv", "maskmm", "cca", "swapping", "models_swapped", "scale"]
ROOMS = ["nn", "jpeg", "models", "metrics", "recipes"]


def entries() -> list[str]:
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [name for page in pages for name in ENTRY.findall(page.read_text(encoding="utf-8"))]


def public_names() -> list[str]:
    modules = {"compat", "reference", *ROOMS}
    names = [name for name in ff.__all__ if name not in modules and name != "__version__"]
    names += [f"{room}.{name}" for room in ROOMS for name in getattr(ff, room).__all__]
    names += [f"compat.svcca.{name}" for name in ff.compat.svcca.__all__]
    return [*names, "compat.jpeg2dct.load", "compat.jpeg2dct.loads"]


def test_the_reference_has_every_public_name_once():
    assert sorted(entries()) == sorted(public_names())


@pytest.mark.parametrize("name", [name for name in public_names() if name != "metrics.CCAMetric"])
def test_what_the_reference_shows_has_a_docstring(name):
    """Which is all that the reference shows."""
    room, _, attribute = f"fourfold.{name}".rpartition(".")
    thing = getattr(import_module(room), attribute)
    if name != "models.VARIANTS":
        assert thing.__doc__ and not thing.__doc__.startswith(f"{attribute}(")  # as dataclasses make up theirs


def test_the_index_of_the_reference_names_them_all():
    index = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^\]]*\]\((\w+\.md)\) \| (.*) \|$", index, re.M)
    listed = {page: re.findall(r"`([\w.]+)`", names) for page, names in rows}
    pages = {page.name: ENTRY.findall(page.read_text(encoding="utf-8")) for page in (DOCS / "reference").glob("*.md")}
    assert listed == {name: names for name, names in pages.items() if name != "index.md"}


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_has_a_picture_and_says_when_not_to_use_it(guide):
    text = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    assert "\n## When not to use this\n" in text
    assert re.search(r"!\[[^\]]{20,}\]\(pictures/\w+\.(?:svg|png)\)", text)  # with words for who can't see it


def test_pictures_are_drawn_and_shown():
    pictures = {path.name for path in (DOCS / "pictures").glob("*.*")}
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    drawn = set(re.findall(r'^@picture\("([\w.]+)"\)$', (DOCS / "site" / "draw.py").read_text(encoding="utf-8"), re.M))
    assert pictures == set(re.findall(r"\(pictures/([\w.]+)\)", pages)) == drawn
    assert all((DOCS / "pictures" / name).stat().st_size < 200_000 for name in pictures)


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md"))]
    assert [page for page in pages if not re.search(rf"^ +- (?:.*: )?{re.escape(page)}$", navigation, re.M)] == []


def test_figures_quoted_are_in_the_benchmarks():
    """Those of the performance guide: op, case, allocation, threads, time."""
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    run = text.partition("\n## cpu\n")[2].partition("\n## ")[0]  # the one that the guide names
    quoted = re.findall(r"^\| `(\w+)` \| (.*) \|$", (DOCS / "performance.md").read_text(encoding="utf-8"), re.M)
    assert len(quoted) >= 10
    for op, row in quoted:
        measured = run.partition(f"\n### {op}\n")[2].partition("\n### ")[0]
        assert re.search(rf"^\| {re.escape(row)}(?: ⚠)? \|", measured, re.M), f"{op}: {row}"


def test_tools_are_pinned():
    """The site is the same from one machine to another; signatures are broken by the ruff that formats the sources."""
    project = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    pins = {
        extra: re.findall(r'"([^"]+)"', re.search(rf"^{extra} = \[(.*?)^\]", project, re.M | re.S)[1])
        for extra in ("docs", "lint")
    }
    assert pins["docs"] and all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in pins["docs"])
    assert [pin for pin in pins["docs"] if pin.startswith("ruff")] == [pin for pin in pins["lint"] if pin.startswith("ruff")]
