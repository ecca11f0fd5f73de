"""How the joint graph of a model is refused."""

from __future__ import annotations

from pathlib import Path

from gradctl.subject.frames import user_location

__all__ = ["CannotJoin", "here"]


class CannotJoin(Exception):
    """There is no joint graph of this model; says why, in a sentence."""


def here() -> str:
    """Return the user's line that is running, ``" (net.py, line 12)"``; nothing where none is."""
    place = user_location()
    return f" ({Path(place[0]).name}, line {place[1]})" if place is not None else ""
