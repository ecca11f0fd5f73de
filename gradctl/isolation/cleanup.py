"""End the processes and remove the files that units leave behind, also if the supervisor is killed.

Each process of a unit has the unit's folder in its environment, which its children inherit: a daemon leaves its
parent, its group and its session, and keeps that. Only Linux shows the environment of other processes (/proc).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gradctl.core.names import PASSIVE_WAIT

UNIT_FOLDER = "GRADCTL_UNIT"  # the variable
_MOST_SCANS, _SCAN_SECONDS = 10, 0.005


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a unit's process does not inherit from its supervisor.

    Attributes:
        current: its current folder; None for the supervisor's.
        imports: folders at the end of its search path.
        variables: of its environment; one with the value None is removed.
    """

    current: Path | None = None
    imports: tuple[str, ...] = ()
    variables: Mapping[str, str | None] = field(default_factory=dict)


def unit_environment(folder: Path, variables: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Return the environment of a unit's process: ours, passive waits unless another policy is set, and the folder.

    ``variables`` replace ours; one with the value None is removed.
    """
    given = {**dict([PASSIVE_WAIT]), **os.environ, **(variables or {}), UNIT_FOLDER: str(folder)}
    return {name: value for name, value in given.items() if value is not None}


def python_command(module: str, folder: Path, imports: Sequence[str] = ()) -> list[str]:
    """Return the command of a process that runs ``main`` of a module for a folder.

    Its search path is ours from the first import on, or a file in the current folder could shadow a module; folders of
    ``imports`` follow.
    """
    path = list(dict.fromkeys(entry for entry in (*sys.path, *imports) if isinstance(entry, str)))
    start = f"import sys; sys.path[:] = {path!r}; from {module} import main; main()"
    return [sys.executable, "-P", "-c", start, str(folder)]


def kill_processes(folder: Path) -> None:
    """Kill every process of the unit with this folder, or of all units with a folder in it.

    Repeats until two scans find none: a process may start another meanwhile, and has no environment while it does.
    """
    clean = 0
    for _ in range(_MOST_SCANS):
        found = [int(each.parent.name) for each in Path("/proc").glob("[0-9]*/environ") if _has_mark(each, folder)]
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        clean = 0 if found else clean + 1
        if clean == 2:
            return
        time.sleep(_SCAN_SECONDS)


@contextmanager
def remove_at_end(folder: Path) -> Iterator[None]:
    """Remove the folder of a run at the end, with all processes of its units; by a process that outlives a kill -9.

    It waits for the end of a pipe that this process holds, in a session of its own.
    """
    with subprocess.Popen(
        python_command("gradctl.isolation.cleanup", folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ):
        yield


def main() -> None:
    """Wait for the end of standard input, and clear the folder that ``sys.argv`` names."""
    folder = Path(sys.argv[1])
    sys.stdin.buffer.read()
    kill_processes(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _has_mark(environment: Path, folder: Path) -> bool:
    """Return whether the environment of a process has the folder, or one in it; False if it cannot be read."""
    try:
        entries = environment.read_bytes().split(b"\0")
    except OSError:
        return False
    wanted = os.fsencode(f"{UNIT_FOLDER}={folder}")
    return any(entry == wanted or entry.startswith(wanted + os.fsencode(os.sep)) for entry in entries)
