"""What the site has beside docs/: README and its like, the examples, and the stored runs; and links that lead there.

In the repository a guide links to `../examples/demo.py`, which is where that file is. On the site the example is a page of its
own, so links that leave docs/ are bent to it; one that leads to nothing here fails the build.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PROJECT = {
    "README.md": "project/readme.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
CODE = re.compile(r"^```.*?^```", re.M | re.S)


def example_page(source: Path) -> str:
    return f"# {source.name}\n\n`examples/{source.name}`\n\n```python\n{source.read_text(encoding='utf-8')}```\n"


def example_index(sources: list[Path]) -> str:
    def row(source: Path) -> str:
        summary = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        return f"| [{source.name}]({source.stem}.md) | {summary.splitlines()[0]} |"

    head = "# Examples\n\nShort programs to copy from, in `examples/` of the repository. CI runs each of them.\n\n"
    return head + "| program | |\n| --- | --- |\n" + "\n".join(map(row, sources)) + "\n"


def generated() -> tuple[dict[str, str], dict[str, str]]:
    """The pages that are not in docs/: {their place on the site: text}; and {path in the repository: place on the site}."""
    examples = sorted((ROOT / "examples").glob("*.py"))
    places = PROJECT | {f"examples/{path.name}": f"examples/{path.stem}.md" for path in examples}
    texts = {place: (ROOT / path).read_text(encoding="utf-8") for path, place in PROJECT.items()}
    texts |= {f"examples/{path.stem}.md": example_page(path) for path in examples}
    texts["examples/index.md"] = example_index(examples)
    runs = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    places |= {f"benchmarks/results/{path.name}": f"runs/{path.name}" for path in runs}
    texts |= {f"runs/{path.name}": path.read_text(encoding="utf-8") for path in runs}
    texts["project/license.txt"] = (ROOT / "LICENSE").read_text(encoding="utf-8")
    return texts, places | {"examples": "examples/index.md", "LICENSE": "project/license.txt"}


TEXTS, PLACES = generated()
HOMES = {place: path for path, place in PLACES.items() if path in PROJECT}


def rewritten(markdown: str, place: str) -> str:
    """The links of the page at this place, as they must be on the site."""
    home = HOMES.get(place, f"docs/{place}")

    def target(match: re.Match[str]) -> str:
        link = match[1]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(home), link))
        if path.startswith("docs/"):
            there = path.removeprefix("docs/")
        elif path in PLACES:
            there = PLACES[path]
        else:
            raise PluginError(f"{home}: the link to {link} has no place on the site; give it one in docs/site/hooks.py")
        return posixpath.relpath(there, posixpath.dirname(place) or ".")

    parts, last = [], 0
    for code in CODE.finditer(markdown):  # which may hold brackets that look like links
        parts += [LINK.sub(target, markdown[last : code.start()]), code[0]]
        last = code.end()
    return "".join([*parts, LINK.sub(target, markdown[last:])])


# ---- mkdocs calls these -----------------------------------------------------------------------------------------------


def on_files(files: Files, config: Any) -> Files:
    for place, text in TEXTS.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    place = page.file.src_uri
    if place.startswith("examples/"):
        return markdown
    return rewritten(markdown, place)
