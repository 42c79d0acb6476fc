"""Globs over dotted module names: ``layers=`` of compare, ``where=`` of swap."""

import difflib
import re
from collections.abc import Sequence
from typing import Any


def is_glob(text: str) -> bool:
    """Whether it matches by pattern, as opposed to a name in full."""
    return "*" in text


def matching_names(op: str, argument: str, globs: Any, names: Sequence[str], *, of: str = "the model") -> list[str]:
    """The names that a glob, or one of a list of them, matches, in the order of names.

    ``*`` stands for any characters within one component, ``**`` also for dots; as a component of its own it is any number of
    components, none included.

    Raises:
        TypeError: globs is neither a str nor a list of them.
        ValueError: a glob matches nothing, or there is none; naming the op, the argument, the glob and the names most like it.
    """
    chosen = [globs] if isinstance(globs, str) else globs
    if not isinstance(chosen, (list, tuple)) or not all(isinstance(glob, str) for glob in chosen):
        raise TypeError(f"{op}: {argument} must be a glob or a list of globs, got {globs!r}")
    if not chosen:
        raise ValueError(f"{op}: {argument} must hold at least one glob for {of}, got an empty list")
    found: set[str] = set()
    for glob in chosen:
        pattern = _pattern(glob)
        matches = [name for name in names if pattern.fullmatch(name + ".")]
        if not matches:
            raise ValueError(f"{op}: {argument}={glob!r} matches no module of {of}; {_advice(glob, names)}")
        found.update(matches)
    return [name for name in names if name in found]


def _pattern(glob: str) -> re.Pattern[str]:
    """Of a name with a dot at its end, so that every component ends in one."""
    parts = []
    for component in glob.split("."):
        if component == "**":
            parts.append(r"(?:[^.]+\.)*")
        else:
            stars = {"*": "[^.]*", "**": ".*"}
            pieces = re.split(r"(\*\*|\*)", component)
            parts.append("".join(stars.get(piece, re.escape(piece)) for piece in pieces) + r"\.")
    return re.compile("".join(parts), re.DOTALL)


def _advice(glob: str, names: Sequence[str]) -> str:
    """The names most like it, else the first ones."""
    bare = glob.replace("*", "").strip(".")
    close = [name for name in names if bare and name.endswith("." + bare)][:3]
    like = difflib.get_close_matches(bare, names)
    close += [name for name in names if name in like and name not in close]
    if close:
        return f"did you mean {' or '.join(map(repr, close[:3]))}?"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"there are {', '.join(map(repr, names[:8]))}{more}" if names else "it has no submodules"
