"""The documentation is complete: every public name in the reference, every guide with its picture and its limits.

And it is backed: what was measured names its stored run, and what a message points to is there.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import unicodedata
from importlib import import_module
from pathlib import Path
from types import ModuleType

import fourfold as ff
import pytest
import torch
from pages import PAGES, ROOT, name_of

DOCS = Path(__file__).parents[1] / "docs"
ENTRY = re.compile(r"^::: fourfold\.([\w.]+)$", re.M)
GUIDES = ["block_dct", "jpeg", "coordconv", "maskmm", "cca", "swapping", "models_swapped", "scale"]


def entries() -> list[str]:
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [name for page in pages for name in ENTRY.findall(page.read_text(encoding="utf-8"))]


def public_names(room: ModuleType = ff, prefix: str = "") -> list[str]:
    """Of the package and of its public modules, as users write them. reference has the names of the ops again."""
    own = [name for name, thing in vars(room).items() if getattr(thing, "__module__", "") == room.__name__]
    found = []
    for name in getattr(room, "__all__", [name for name in own if name.islower() and not name.startswith("_")]):
        thing = vars(room).get(name)  # not getattr: CCAMetric imports torchmetrics
        if isinstance(thing, ModuleType):
            found += public_names(thing, f"{prefix}{name}.") if name != "reference" else []
        elif name != "__version__":
            found.append(prefix + name)
    return found


def test_the_reference_has_every_public_name_once():
    names = public_names()
    assert {"cka_matrix", "nn.CoordConv2d", "recipes.Left", "metrics.CCAMetric", "compat.jpeg2dct.load"} < set(names)
    assert sorted(entries()) == sorted(names)


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
    drawn |= {name for name in pictures if name.startswith("claims-")}  # by python -m fourfold.reproduce --render
    assert pictures == set(re.findall(r"\(pictures/([\w.-]+)\)", pages)) == drawn
    assert all((DOCS / "pictures" / name).stat().st_size < 200_000 for name in pictures)


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md"))]
    assert [page for page in pages if not re.search(rf"^ +- (?:.*: )?{re.escape(page)}$", navigation, re.M)] == []


# ---- figures -------------------------------------------------------------------------------------------------------------

#: Times, rates and ratios: what a machine has said. 3×3 and 224 × 224 are sizes.
MEASURED = re.compile(
    r"\d ?(?:ns|µs|ms)\b|\d ?(?:[KMG]B|images|files|frames)(?:/s| a second)|\d×(?! ?\d)"
    r"|\d(?: ?%| percent)? (?:times )?(?:as fast|faster|slower|the speed|of its time|of the time)"
)
GENERATED = {"benchmarks.md", "gpu.md", "claims.md"}  # from their runs, as other tests see to


def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", DOCS / "site" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["docs/performance.md", "docs/swapping.md"])
def test_quoted_figures_are_those_of_the_stored_run(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(MEASURED.findall(text)) >= 7
    assert figures().PAGES[name](text) == text, "run: python docs/site/figures.py"


def test_the_cost_of_a_call_is_hidden_for_no_op():
    """Whatever a stored run has of it is on the page."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    small = {(row["op"], row["label"]) for run in runs for row in run["results"] if row.get("overhead_us")}
    section = (DOCS / "performance.md").read_text(encoding="utf-8").partition("\n## Small inputs\n")[2].partition("\n## ")[0]
    assert len(small) >= 10
    assert set(re.findall(r"^\| `(\w+)` \| (.*?) \| .* [µm]s \| [\w. ()]+ [\d.]+ µs \|$", section, re.M)) == small


def test_ratios_of_swapping_say_which_way():
    """As in the benchmarks above 1 is better, whichever way an older run wrote them."""
    faster = figures().faster
    for after in ("5 ms: 0.25×; 2 left", "5 ms: 4.00× as fast; 2 left"):
        assert faster("20 ms", after) == "5 ms: 4.00× as fast; 2 left"
    assert faster("20 ms", "40 ms: 2.00×") == "40 ms: 0.50× as fast"
    assert faster("67.2 MB file", "34.7 MB") == "34.7 MB"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_sentence_claims_no_gpu_that_the_ledger_has_not(page):
    rows = re.findall(r"^\| `\w+` \| (.*?) \|", (DOCS / "gpu.md").read_text(encoding="utf-8"), re.M)
    assert rows
    first = re.split(r"\.\n", (ROOT / page).read_text(encoding="utf-8").split("\n\n")[1])[0]
    assert ("no GPU has run" in first) == (set(rows) == {"not measured"})


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=name_of)
def test_what_was_measured_names_its_run(page):
    """In its section, or where the page begins."""
    text = re.sub(r"<!-- benchmarks:begin -->.*<!-- benchmarks:end -->", "", page.read_text(encoding="utf-8"), flags=re.S)
    runs = re.findall(r"[Rr]uns? `([\w-]+)`", text)
    assert [run for run in runs if not (ROOT / "benchmarks" / "results" / f"{run}.json").exists()] == []
    beginning, *sections = re.split(r"^(?=##)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)
    named = re.compile(r"[Rr]un `[\w-]+`|`(?:docs|benchmarks)/[\w/-]+\.json`")
    for section in sections if named.search(beginning) is None else ():
        if measured := MEASURED.findall(section):
            assert named.search(section), (section.partition("\n")[0], measured)


def test_tables_of_costs_are_those_that_are_counted():
    """docs/jpeg.md repeats those of the docstring, which tests/test_models.py counts."""
    number = r"(\d+\.\d+)"
    counted = re.findall(rf"^ +(\w+) +{number} M +{number} +{number} ", ff.models.dct_resnet50.__doc__, re.M)
    counted += [
        ("ResNet-50", *re.findall(rf"itself has {number} M, {number} and {number}\.", ff.models.dct_resnet50.__doc__)[0])
    ]
    text = (DOCS / "jpeg.md").read_text(encoding="utf-8")
    assert re.findall(rf"^\| `?([\w-]+)\b.* \| {number} M \| {number} \| {number} \|$", text, re.M) == counted


def test_the_errors_that_cca_states_are_those_that_its_block_asserts():
    text = (DOCS / "cca.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (1[\d,]*) \| (.*) \| (.*) \| (.*) \| (.*) \|$", text, re.M)
    stated = {
        int(kappa.replace(",", "")): tuple(
            1 if "left out" in cell else float(cell.replace("−", "-")) for cell in (high, fast, rounded, streaming)
        )
        for kappa, high, streaming, fast, rounded in rows
    }
    (table,) = re.findall(r"^table = (\{.*?^\})", text, re.M | re.S)
    assert eval(table) == stated
    assert re.findall(r"(\d+) of 64 left out", text) == ["3", "17"]


# ---- what messages point to ----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of its headings, as the site and GitHub name them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M)
    plain = [unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode() for title in titles]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in plain}


def test_what_messages_point_to_is_there():
    sources = sorted((ROOT / "python" / "fourfold").rglob("*.py"))
    places = {
        place for path in sources for place in re.findall(r"\bsee\([\"']([^\"']*)[\"']\)", path.read_text(encoding="utf-8"))
    }
    assert len(places) >= 10
    for place in places:
        page, _, anchor = place.partition("#")
        assert anchor in anchors(DOCS / page), place
    assert "see docs/" not in "".join(path.read_text(encoding="utf-8") for path in sources if path.name != "_pages.py")


def broken(place: str) -> None:
    """Does what the page explains."""
    x = torch.randn(6, 8)
    match place:
        case "performance.md#where-the-result-is-written":
            ff.block_dct(torch.zeros(1, 1, 8, 8, requires_grad=True), out=torch.empty(1, 64, 1, 1))
        case "cca.md#few-samples":
            ff.cca(x, x)
        case "cca.md#limits":
            ff.cka(x, torch.ones(6, 2))
        case "maskmm.md#masks":
            ff.masked_linear(x, torch.ones(3, 8), torch.full((3, 8), 0.3))
        case "maskmm.md#sparse-inference":
            ff.compress(torch.ones(1, 70_000), torch.ones(1, 70_000, dtype=torch.bool), format="csr16")
        case "swapping.md#what-is-refused":
            ff.swap(torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))), ff.recipes.coord_conv())
        case "coordconv.md#limits":
            ff.nn.CoordConv2d(3, 4, 1).load_state_dict(torch.nn.Conv2d(3, 4, 1).state_dict())
        case "coordconv.md#checkpoints-of-other-implementations":
            ff.nn.CoordConv2d(3, 4, 1).load_state_dict({"weight": torch.zeros(4, 5, 1, 1), "bias": torch.zeros(4)})
        case "jpeg.md#broken-files":
            ff.jpeg.read(b"no JPEG")
        case "jpeg.md#writing":
            table, grid = torch.ones(64, dtype=torch.int32), torch.full((1, 1, 64), 3000, dtype=torch.int16)
            ff.jpeg.write(ff.jpeg.JpegCoefficients((grid,), (table,), (8, 8), ((1, 1),), "gray"))
        case "performance.md#instruction-sets":
            environment = {"FOURFOLD_CPU_CAPABILITY": "fast", "PYTHONPATH": ":".join(sys.path)}
            command = [sys.executable, "-c", "import fourfold"]
            raise ValueError(subprocess.run(command, env=environment, capture_output=True, text=True).stderr.strip())


@pytest.mark.parametrize(
    "place",
    [
        "performance.md#where-the-result-is-written",
        "performance.md#instruction-sets",
        "cca.md#few-samples",
        "cca.md#limits",
        "maskmm.md#masks",
        "maskmm.md#sparse-inference",
        "swapping.md#what-is-refused",
        "coordconv.md#limits",
        "coordconv.md#checkpoints-of-other-implementations",
        "jpeg.md#broken-files",
        "jpeg.md#writing",
    ],
)
def test_messages_end_with_the_page_that_explains_them(place):
    if "jpeg" in place and not ff.has_jpeg():
        pytest.skip("built without libjpeg")
    with pytest.raises((TypeError, ValueError, RuntimeError), match=re.escape(f" (see docs/{place})") + r"\Z"):
        broken(place)


# ---- the site ------------------------------------------------------------------------------------------------------------


def test_tools_are_pinned():
    """The site is the same from one machine to another; signatures are broken by the ruff that formats the sources."""
    project = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    pins = {
        extra: re.findall(r'"([^"]+)"', re.search(rf"^{extra} = \[(.*?)^\]", project, re.M | re.S)[1])
        for extra in ("docs", "lint")
    }
    assert pins["docs"] and all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in pins["docs"])
    assert [pin for pin in pins["docs"] if pin.startswith("ruff")] == [pin for pin in pins["lint"] if pin.startswith("ruff")]
