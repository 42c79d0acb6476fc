"""Every example runs: here those on data of scikit-learn; the others, for another process, in test_examples_synthetic.py."""

from __future__ import annotations

import pytest
from pages import EXAMPLES, ROOT, run_example

REAL = [path for path in EXAMPLES if "sklearn" in path.read_text(encoding="utf-8")]


def test_readme_names_every_example():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES if f"(examples/{path.name})" not in readme] == []


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_example_runs(path, tmp_path):
    run_example(path, tmp_path)
