"""The refusal of a joint graph: a sentence, with the user's line."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import FrameType

from gradctl.subject.frames import is_users

_STEP = str(Path(__file__).with_name("step.py"))


class JointExportError(Exception):
    """There is not a joint graph of this model; its text is the reason, in a sentence."""


def here() -> str:
    """Return the user's line that is running, ``" (net.py, line 12)"``; an empty text if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _STEP:  # which calls the model
        if is_users(frame.f_code.co_filename):
            return line_of(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return ""


def raised_by(error: BaseException) -> str:
    """Return the user's line that raised an exception, as ``here``."""
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next((line_of(*place) for place in reversed(places) if is_users(place[0])), "")


def line_of(file: str, line: int | None) -> str:
    """Return a place in a file as the end of a message, ``" (net.py, line 12)"``."""
    return f" ({Path(file).name}, line {line})"
