"""The rule pages: one Markdown file a code beside this module, the manual and ``gradctl explain`` alike."""

from __future__ import annotations

import functools
from importlib.resources import files

__all__ = ["codes", "page", "title"]


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
