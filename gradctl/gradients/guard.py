"""The guard around what explains a finding: an exception there is a note of the report, and never the end of a check.

The verdict stands before anything is explained, so a mistake in an explanation costs that explanation only.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from gradctl.core.errors import is_out_of_memory
from gradctl.core.findings import Finding, note
from gradctl.subject.frames import first_line


class Unexplained:
    """What the explanations of one unit raised."""

    def __init__(self) -> None:
        self._notes: dict[str, Finding] = {}
        self._tracebacks: list[str] = []

    def add(self, what: str, error: Exception) -> None:
        """Note that ``what`` has no explanation for ``error``."""
        message = f"{what} could not be explained: {first_line(error)}."
        if isinstance(error, TimeoutError):  # it was stopped, and nothing broke
            self._notes[message] = note("GC419", message)
            return
        self._tracebacks.append("".join(traceback.format_exception(error)))
        hint = "the verdict holds without it; report this with the traceback in 'details' of the JSON report."
        self._notes[message] = note("GC419", message, hint)

    def notes(self) -> list[Finding]:
        """Return one note for each message."""
        return list(self._notes.values())

    def details(self) -> str | None:
        """Return the tracebacks for the report, or None if nothing was raised."""
        return "\n".join(self._tracebacks) or None


_collector: ContextVar[Unexplained | None] = ContextVar("gradctl_unexplained", default=None)


@contextmanager
def unexplained() -> Iterator[Unexplained]:
    """Collect what ``explaining`` catches until the end of this context: entered once for each unit of the report."""
    collector = Unexplained()
    token = _collector.set(collector)
    try:
        yield collector
    finally:
        _collector.reset(token)


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Run one explanation, which may fail: its exception is collected, and the caller goes on with its default.

    Outside ``unexplained`` the exception is raised, and everywhere if the machine is out of memory. ``what`` is the
    subject of "… could not be explained".
    """
    try:
        yield
    except Exception as error:  # anything: this is where our own mistakes end
        collector = _collector.get()
        if collector is None or is_out_of_memory(error):
            raise
        collector.add(what, error)
