from collections.abc import Sequence
from typing import Any

def version() -> str: ...
def read(
    sources: Sequence[Any], strict: bool, max_pixels: int, max_scans: int, threads: int, stop: bool
) -> list[tuple[Any, ...] | str | int | None]: ...
def write(
    components: Sequence[Any],
    qtables: Sequence[Any],
    size: tuple[int, int],
    sampling: Sequence[tuple[int, int]],
    color_space: int,
    progressive: bool,
    optimize: bool,
    arithmetic: bool = False,
    restart_interval: int = 0,
) -> bytes | str: ...
