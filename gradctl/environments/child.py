"""A program in a process of its own, with a time limit; all that it starts ends with it, also if gradctl is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradctl.isolation.cleanup import kill_processes, remove_at_end, unit_environment


@dataclass(frozen=True, slots=True)
class Finished:
    """How a process ended: its exit status, None if it exceeded its time limit, and what it wrote."""

    exit_status: int | None
    output: str
    errors: str


def run_child(
    command: Sequence[str],
    *,
    timeout_seconds: float,
    folder: Path | None = None,
    variables: Mapping[str, str | None] | None = None,
) -> Finished:
    """Run a command without standard input, and wait for its end.

    Args:
        command: the program and its arguments.
        timeout_seconds: when the process is killed, counted from its start.
        folder: of temporary files; the system's without it.
        variables: environment variables that it has besides ours; None removes one of ours.

    Raises:
        OSError: it cannot be started.
    """
    own = Path(tempfile.mkdtemp(prefix="gradctl-", dir=folder)).resolve()
    environment = unit_environment(own, variables)
    # Files, not pipes: a process that has left its group could keep a pipe open for ever.
    with remove_at_end(own), (own / "output").open("w+b") as output, (own / "errors").open("w+b") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, start_new_session=True
        )
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout_seconds)
        finally:
            _kill(process)
            kill_processes(own)
        texts = []
        for stream in (output, errors):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return Finished(status, *texts)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process, and what it has started and left behind."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows has no groups
            process.kill()
    process.wait()
