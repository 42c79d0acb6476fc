"""The pages of the documentation with their blocks of code, and the examples, for the tests that run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import fourfold as ff
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A block of a page: Python that runs, "sh" commands, or "text", which is no code. Indented blocks are commands."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    """From the root of the repository; of a guide its file's name."""
    path = page.relative_to(ROOT)
    return path.name if page.parent.name == "docs" else path.as_posix()


def blocks(page: Path) -> list[Block]:
    """All of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = [(match.start(), match[1] or "sh", match[2]) for match in FENCE.finditer(text)]
    prose = FENCE.sub(lambda match: re.sub(r"[^\n]", "x", match[0]), text)
    start = 0
    for paragraph in re.split(r"(\n{2,})", prose):
        lines = paragraph.splitlines()
        if lines and all(re.match(r" {4}", line) for line in lines):
            found.append((start, "sh", re.sub(r"^ {4}", "", paragraph, flags=re.M) + "\n"))
        start += len(paragraph)
    return [Block(name_of(page), text[:at].count("\n") + 1, kind, code) for at, kind, code in sorted(found)]


def python_of(page: Path) -> str:
    """Its Python blocks, in order, as one program."""
    return "\n".join(block.text for block in blocks(page) if block.kind == "python")


# ---- examples ------------------------------------------------------------------------------------------------------------

#: CI runs the demo, and looks at its picture.
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "demo"]


def run_example(path: Path, folder: Path) -> None:
    """As short as it can be; what it stores goes to folder."""
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
    stored = ["--write", str(folder / "run.json")] if '"--write"' in text else []
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # on a busy machine two mostly wait for each other
    command = [sys.executable, str(path), *quick, *stored]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert not stored or (folder / "run.json").stat().st_size
