"""The user's own part of a stack: what of an exception is worth showing, and where in their files a call came from.

Frames of gradctl, of torch and of the import machinery are left out. Other libraries in site-packages (transformers,
torchvision) count as the user's: they are part of the model that is checked.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import sysconfig
import traceback
import types
from pathlib import Path

import torch

_GRADCTL = str(Path(__file__).parents[1])
_ENTRANCES = (str(Path(_GRADCTL) / "cli") + os.sep, str(Path(_GRADCTL) / "api.py"))
# Where a forked process begins; below it is the stack of its parent.
_FORKING = str(Path(_GRADCTL) / "forms" / "ranks" / "processes.py")
_TORCH = str(Path(torch.__file__).parent)
_FUNCTORCH = str(Path(_TORCH).with_name("functorch"))  # a package of its own in torch's wheel
_IMPORTLIB = str(Path(importlib.__file__).parent)
_NOT_THE_USERS = (_GRADCTL, _TORCH, _FUNCTORCH, _IMPORTLIB)
_STANDARD_LIBRARY = tuple({sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib")})
_SITE_PACKAGES = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_INTERPRETER = "The following operation failed in the TorchScript interpreter"
_RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception): .+)$", re.MULTILINE)
# Text that changes from run to run: addresses, and TorchScript's numbers of classes of one name.
_PASSING = re.compile(r" \(of Python compilation unit at: \w+\)| at 0x[0-9a-f]+|__torch__\.|___torch_mangle_\d+\.")


def user_frames(error: BaseException) -> str:
    """Return the traceback of ``error`` with the user's frames only, and those of what it was raised from.

    A ``SyntaxError`` has no frame in the file it is about; its own text shows the line and the place in it.
    """
    return "".join(_stripped(traceback.TracebackException.from_exception(error)).format()).rstrip()


def keep_user_frames(error: BaseException | None) -> BaseException | None:
    """Return ``error``, its traceback and those of what it was raised from cut to the user's frames; None without any.

    For a caller in Python, who sees the exception itself where the command line prints ``user_frames``.
    """
    seen: set[int] = set()
    shown = error
    while shown is not None and id(shown) not in seen:
        seen.add(id(shown))
        shown.__traceback__ = _users_traceback(shown.__traceback__)
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    return error if error is not None and error.__traceback__ is not None else None


def _users_traceback(entry: types.TracebackType | None) -> types.TracebackType | None:
    if entry is None:
        return None
    rest = _users_traceback(entry.tb_next)
    if not is_users(entry.tb_frame.f_code.co_filename):
        return rest
    return types.TracebackType(rest, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)


def user_location() -> tuple[str, int] | None:
    """Return file and line of the innermost frame that is the user's, from the stack of this call; None if none is.

    The standard library is passed over too (``contextlib`` stands between a decorated function and its caller), and so
    is code that has no file (what torch.fx or a dataclass wrote). What called gradctl itself is nobody's model.
    """
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if is_users(file) and not _is_standard_library(file):
            return file, frame.f_lineno
        if is_entrance(file) or file == _FORKING:
            return None
        frame = frame.f_back  # type: ignore[assignment]  # None at the outermost, which ends the loop
    return None


def raised_at(error: BaseException) -> tuple[str, int] | None:
    """Return file and line of the user's code that raised ``error``, itself or through a library; None if ours did.

    Libraries do not count as the user's here, for they raise where gradctl misuses them too; nor does what a command
    calls itself, which is no model.
    """
    ours, place = "", None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file.startswith(_GRADCTL + os.sep):
            ours, place = file, None
        elif is_users(file) and not file.startswith(_STANDARD_LIBRARY) and not any(p in file for p in _SITE_PACKAGES):
            place = file, line
    return place if not is_entrance(ours) else None


def first_line(error: BaseException) -> str:
    """Return type and first line of an exception: ``ValueError: width must be even``, without a full stop.

    Of what TorchScript's interpreter raises, the last line that names an exception. Addresses are left out.
    """
    message = str(error).strip()
    said = _PASSING.sub("", next(iter(message.splitlines()), "")).rstrip(" .:,")
    if isinstance(error, SyntaxError) and error.filename:
        said = f"{error.msg} ({Path(error.filename).name}, line {error.lineno})"
    if said == _INTERPRETER and (raised := _RAISED.findall(message)):
        return _PASSING.sub("", raised[-1]).rstrip(" .")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _stripped(shown: traceback.TracebackException) -> traceback.TracebackException:
    """Return ``shown``, and every exception it was raised from, with the user's frames only."""
    users = [frame for frame in shown.stack if is_users(frame.filename)]
    # Without a frame of the user's there is no heading either: format() leaves it out for None.
    shown.stack = traceback.StackSummary.from_list(users) if users else None  # type: ignore[assignment]
    for other in (shown.__cause__, shown.__context__, *(getattr(shown, "exceptions", None) or ())):
        if other is not None:
            _stripped(other)
    return shown


@functools.cache
def is_users(file: str) -> bool:
    """Return whether a file is the user's or of another library, not gradctl's, torch's, importlib's or generated."""
    if file.startswith("<"):
        return False
    file = os.path.abspath(file)  # noqa: PTH100  # without following links, as the frames have it
    return not any(file.startswith(folder + os.sep) for folder in _NOT_THE_USERS)


def is_entrance(file: str) -> bool:
    """Return whether a check begins in the file: its callers are not part of a model."""
    return file.startswith(_ENTRANCES)


@functools.cache
def _is_standard_library(file: str) -> bool:
    """Return whether a file is of the standard library; site-packages lies inside its folder and is not."""
    return file.startswith(_STANDARD_LIBRARY) and not any(folder in file for folder in _SITE_PACKAGES)
