"""What all tests share: a report of what runs, and a process left as it was found."""

from __future__ import annotations

from collections.abc import Iterator

import fourfold
import pytest
import torch

pytest.register_assert_rewrite("battery")


def pytest_configure(config: pytest.Config) -> None:
    # Warnings are errors; this one is torch's about itself, from inside torch.func, torch.autograd and inductor.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script:DeprecationWarning")


def pytest_report_header() -> str:
    return f"fourfold {fourfold.__version__}, {fourfold.cpu_capability()} kernels, torch {torch.__version__}"


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """Seeds torch's generator; puts threads back as they were."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
