"""Running the user's code inside a command: nothing it prints is the report, and no exit of its own is a verdict."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import click


@contextlib.contextmanager
def users_code() -> Iterator[None]:
    """Send standard output to stderr, also that of C code and of child processes, and refuse to be ended in silence.

    ``--format json | jq`` must parse whatever a model prints, and ``os._exit(0)`` in it must not read as a pass.
    """
    from gradctl.core.exits import intercept_exits

    with contextlib.redirect_stdout(sys.stderr), _standard_output_elsewhere(), intercept_exits(_told):
        yield


@contextlib.contextmanager
def _standard_output_elsewhere() -> Iterator[None]:
    """Point the process's standard output at its stderr, below Python too; where either is closed, change nothing."""
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    try:
        _flush()
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Write out what waits in Python's buffers and in C's."""
    import ctypes

    for stream in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(OSError, ValueError):  # a reader that left, a stream that is closed
            if stream is not None:
                stream.flush()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no C library by this way on Windows
        ctypes.CDLL(None).fflush(None)


def _told(status: int, file: str, line: int) -> int:
    """Say who called ``os._exit``, and return 4, inconclusive."""
    with contextlib.suppress(OSError):
        click.echo(
            f"GC801 the program that is checked ended the process: os._exit({status}) at {file}:{line}. Raise an "
            "exception there instead.",
            err=True,
        )
    return 4
