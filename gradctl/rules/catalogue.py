"""The rule pages: one Markdown file for each code beside this module, which ``gradctl explain`` prints."""

from __future__ import annotations

import functools
import re
from importlib.resources import files

from gradctl.core.errors import nearest

# By the beginning of their codes.
GROUPS = {
    "GC1": "target, inputs and configuration",
    "GC2": "why a form differs from eager",
    "GC3": "outputs, state and files",
    "GC4": "gradients",
    "GC5": "optimisation passes",
    "GC6": "exported files",
    "GC7": "what a form costs",
    "GC8": "processes and resources",
    "GC9": "files that cannot be trusted",
}


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


def matching_codes(text: str) -> list[str]:
    """Return the codes that begin with ``text``, or whose pages contain all its words; all codes for no text."""
    starting = [code for code in codes() if code.startswith(text.upper())]
    words = text.casefold().split()
    return starting or [code for code in codes() if all(word in page(code).casefold() for word in words)]


def allow_problem(text: str, given: str | None = None) -> str:
    """Return the error in the ``CODE`` or ``CODE:NAME`` of an accepted finding, as it was ``given``; or nothing."""
    code, colon, name = text.partition(":")
    if not re.fullmatch(r"GC\d{3}", code) or (colon and not name):
        shown = text if given is None else given
        return f"{shown!r} is not CODE or CODE:NAME, for example GC408:RoundStraightThrough."
    return "" if code in codes() else f"no rule {code!r}{nearest(code, codes())}. 'gradctl explain' lists all rules."
