"""The location in the user's program of a part of a static form, from the metadata of the capture."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from gradctl.subject.frames import is_entrance, is_users

_PYTHON = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_TRACED = re.compile(r"^(?P<file>.+\.py)\((?P<line>\d+)\): ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """The origin of one part of a form, with file and line in the user's code if the form has a record of them."""

    module: str  # path of the innermost module, "" for the model itself
    op: str | None = None  # the operator or custom Function; None if only the module is known
    file: str | None = None
    line: int | None = None


def line_in(stack: str) -> tuple[str, int] | None:
    """Return file and line of the innermost user frame in a printed stack; None if there is none.

    Args:
        stack: as Python prints it, innermost last (``File "net.py", line 7``; torch.export and scripts keep it so), or
            as a trace does, innermost first (``net.py(7): forward``).
    """
    pythons = [(found["file"], int(found["line"])) for found in _PYTHON.finditer(stack)]
    traced = [(found["file"], int(found["line"])) for found in _TRACED.finditer(stack)]
    frames = [*reversed(pythons), *traced]
    within = itertools.takewhile(lambda frame: not is_entrance(frame[0]), frames)
    return next((frame for frame in within if is_users(frame[0])), None)
