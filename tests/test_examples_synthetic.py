"""Every example runs: here those that make up their data."""

from __future__ import annotations

import pytest
from pages import EXAMPLES, run_example
from test_examples import REAL


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path not in REAL], ids=lambda path: path.name)
def test_example_runs(path, tmp_path):
    run_example(path, tmp_path)
