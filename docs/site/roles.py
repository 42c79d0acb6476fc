"""Docstrings write :func:`fourfold.swap` and C*F, to be read as they stand; the site wants links, and stars that stay stars."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([\w.]+)`")
# A star that multiplies, or a <class> that is no HTML; code is left alone, and so is the star of an argument *args.
MARKUP = re.compile(r"(`[^`]+`|^ *\*{1,2}\w+(?: \(.*?\))?:)|\*|<(?=\w)", re.M)
ESCAPED = {"*": r"\*", "<": "&lt;"}
# Where a bare name is to be looked for, beside the object's own module.
ROOMS = ("fourfold", "fourfold.nn", "fourfold.jpeg", "fourfold.models", "fourfold.compat.svcca", "fourfold.compat.jpeg2dct")


class Roles(griffe.Extension):
    """Makes of each role a link to where the site documents the name (of a name that it does not: code), and keeps stars."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        def public(name: str) -> str | None:
            for room in ROOMS:
                path = name if name.startswith("fourfold.") else f"{room}.{name}"
                try:
                    if pkg[path.removeprefix("fourfold.")].is_module:
                        return None  # it has no entry of its own, but a page
                except KeyError:
                    continue
                return path
            return None

        def link(match: re.Match[str]) -> str:
            path = public(match[1])
            return f"[`{match[1]}`][{path}]" if path else f"`{match[1]}`"

        def visit(thing: Any) -> None:
            if thing.is_alias:
                return
            if thing.docstring:
                text = MARKUP.sub(lambda match: match[1] or ESCAPED[match[0]], thing.docstring.value.replace("``", "`"))
                thing.docstring.value = ROLE.sub(link, text)
            for member in thing.members.values():
                visit(member)

        visit(pkg)
