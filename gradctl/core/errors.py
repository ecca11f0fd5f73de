"""The errors a user can meet, as one tree. Each says what, where, the value seen and what to do, in one sentence.

GradctlError                 exit code
├─ TargetError     GC1xx     2   file, name, constructor arguments, inputs, weights, outputs
│  └─ NothingToCheck GC110   5   no differentiable leaf or output
├─ TrustError      GC9xx     2   a file that would run code, or leave its folder
└─ ResourceError   GC8xx     4   out of memory, or a file that cannot be written (2)

An inner function raises what it knows; the boundary that knows the target adds it. Anything that is not a
``GradctlError`` is a fault of gradctl itself (exit code 3).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class GradctlError(Exception):
    """An error with a rule code and an exit code.

    Args:
        code: rule code, for example ``GC104``; ``gradctl explain`` has its page.
        message: one sentence, lower case after the code: what, where, the value seen, what to do.
        details: frames of the user's own code, if their code raised; printed below the message.
        exit_code: overrides the class's own.
    """

    exit_code = 2

    def __init__(self, code: str, message: str, *, details: str = "", exit_code: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details
        if exit_code is not None:
            self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.code} {self.message}"


class TargetError(GradctlError):
    """The target, its arguments, inputs, weights or outputs cannot be used as given."""


class NothingToCheck(TargetError):
    """The target runs, but has no differentiable leaf or output."""

    exit_code = 5


class TrustError(GradctlError):
    """Reading this file would run code from it, or leave its folder."""


class ResourceError(GradctlError):
    """The machine refused: memory, or a path that cannot be written."""

    exit_code = 4


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the candidate nearest to ``word``, or an empty string."""
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the first names, and how many there are beside them: ``a, b and 4 more``; ``none`` of an empty list."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


def first_line_of(error: BaseException) -> str:
    """Return the first line of what an exception says, without a full stop; its type if it says nothing."""
    return (next(iter(str(error).strip().splitlines()), "") or type(error).__name__).rstrip(".")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, without importing torch, whose CPU allocator raises a bare RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (
            isinstance(error, RuntimeError)
            and any(said in str(error) for said in ("can't allocate memory", "bad_alloc"))
        )
    )
