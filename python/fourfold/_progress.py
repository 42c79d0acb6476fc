"""Progress bars of long work."""

import importlib
import sys
from typing import Any


def progress_bar(total: int | None, unit: str, title: str | None = None) -> Any:
    """A tqdm bar, or None where it is not installed or nobody is looking."""
    if not sys.stderr.isatty():
        return None
    try:
        tqdm = importlib.import_module("tqdm")
    except ImportError:
        return None
    return tqdm.tqdm(total=total, unit=unit, desc=title, dynamic_ncols=True)
