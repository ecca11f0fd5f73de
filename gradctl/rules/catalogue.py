"""The rule pages: one Markdown file a code beside this module, the manual and ``gradctl explain`` alike."""

from __future__ import annotations

import functools
import re
from importlib.resources import files

from gradctl.core.errors import nearest


@functools.cache
def codes() -> tuple[str, ...]:
    """Return every code that has a page, in order."""
    names = (entry.name for entry in files("gradctl.rules").iterdir())
    return tuple(sorted(name.removesuffix(".md") for name in names if name.startswith("GC") and name.endswith(".md")))


def page(code: str) -> str:
    """Return the page of ``code``, in Markdown.

    Raises:
        KeyError: there is no page for ``code``.
    """
    if code not in codes():
        raise KeyError(code)
    return files("gradctl.rules").joinpath(f"{code}.md").read_text(encoding="utf-8")


def title(code: str) -> str:
    """Return the first line of the page without the code: ``autograd disagrees with finite differences``."""
    return page(code).partition("\n")[0].removeprefix(f"# {code} ").strip()


def allow_problem(text: str, given: str | None = None) -> str:
    """Return what is wrong with the ``CODE`` or ``CODE:NAME`` of an accepted finding, or nothing.

    Args:
        text: with the code in capitals.
        given: as the user wrote it, where that is another.
    """
    code, colon, name = text.partition(":")
    if not re.fullmatch(r"GC\d{3}", code) or (colon and not name):
        shown = text if given is None else given
        return f"{shown!r} is not CODE or CODE:NAME, for example GC408:RoundStraightThrough."
    return "" if code in codes() else f"no rule {code!r}{nearest(code, codes())}; 'gradctl explain' lists them."
