"""One unit in a process of its own, seen from the supervisor: start it, keep the end of its output, stop it in time.

Each process leads a session of its own, so that a terminal's Ctrl-C does not reach it, and so that whatever it
starts ends with it; on Linux also what has left that session. Its output goes through a pipe of which the
last part is kept: it cannot fill a disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sysconfig
import threading
import time
from pathlib import Path
from typing import IO

from gradctl.core.findings import Location, Unit
from gradctl.core.names import UnitStatus
from gradctl.isolation.cleanup import Surroundings, kill_processes, python_command, unit_environment
from gradctl.isolation.protocol import (
    ANSWER,
    ASSIGNMENT,
    Assignment,
    UnitRequest,
    inconclusive_unit,
    mentions_out_of_memory,
    read_answer,
    write_message,
)

_PATIENCE_SECONDS = 1.0  # from TERM to KILL
_KEPT_BYTES = 16 * 1024  # room for the 100 frames of a traceback that faulthandler writes

_GRADCTL = str(Path(__file__).parents[1])
_PYTHONS_OWN = tuple({sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib")})
_TORCH = tuple(f"{os.sep}{name}{os.sep}" for name in ("torch", "functorch"))


class UnitProcess:
    """The process of one unit: run once, by one thread, and stopped by any.

    ``folder``, which does not exist yet, holds the assignment and the answer.
    """

    def __init__(self, request: UnitRequest, folder: Path, surroundings: Surroundings | None = None) -> None:
        self._request, self._folder, self._surroundings = request, folder, surroundings or Surroundings()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_late = self._is_stopped = False
        self._killer = threading.Timer(_PATIENCE_SECONDS, self.kill)
        self._killer.daemon = True

    def run(self) -> Unit | None:
        """Return the unit that the process answered, or one that says how it ended; None if it was stopped before."""
        start, nonce = time.perf_counter(), secrets.token_hex(16)
        assignment = Assignment(request=self._request, nonce=nonce, supervisor=os.getpid())
        try:
            write_message(self._folder / ASSIGNMENT, assignment)
            process = self._start()
        except OSError as error:
            reason = f"the process of the unit could not be started: {error.strerror or error}"
            return inconclusive_unit(self._request, "error", "GC801", reason, seconds=time.perf_counter() - start)
        if process is None:
            return None
        tail = _Tail(process.stdout)
        clock = threading.Timer(self._request.timeout_seconds, self._time_out)
        clock.daemon = True
        clock.start()
        # The kernel ends the process with the thread that started it, which therefore waits here for the end.
        exit_status = process.wait()
        clock.cancel()
        self._killer.cancel()
        _signal_group(process.pid, "SIGKILL")  # what it started and left behind
        kill_processes(self._folder)
        said, seconds = tail.text(), time.perf_counter() - start
        unit = read_answer(self._folder / ANSWER, nonce)
        if unit is not None or self._is_stopped:
            return unit
        return _without_answer(self._request, exit_status, is_late=self._is_late, said=said, seconds=seconds)

    def stop(self) -> None:
        """Terminate the process, and kill it a second later; one that has not started never will."""
        with self._lock:
            if self._is_stopped or self._is_late:
                self._is_stopped = True
                return
            self._is_stopped = True
        self._end()

    def kill(self) -> None:
        """End the process and all it has started, now."""
        process = self._process
        if process is not None and process.returncode is None:
            _signal_group(process.pid, "SIGKILL")

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._is_stopped:
                return None
            self._process = subprocess.Popen(
                python_command("gradctl.suite.worker", self._folder, self._surroundings.imports),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
                cwd=self._surroundings.current,
                env=unit_environment(self._folder, self._surroundings.variables),
            )
            return self._process

    def _time_out(self) -> None:
        with self._lock:
            if self._is_stopped:
                return
            self._is_late = True
        self._end()

    def _end(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            _signal_group(process.pid, "SIGTERM")
            self._killer.start()


class _Tail:
    """The last part of what a process writes, read by a thread of its own."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        self._stream, self._kept, self._is_cut = stream, b"", False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def text(self) -> str:
        """Return the last lines, once the writers are gone, or soon after: a process that left its group may stay."""
        self._thread.join(_PATIENCE_SECONDS)
        lines = self._kept.decode(errors="replace").splitlines()
        if self._is_cut and len(lines) > 1:
            lines = ["…", *lines[1:]]
        # faulthandler lists every compiled module that is loaded: some 3 kB that say nothing of the crash.
        return "\n".join(line for line in lines if not line.startswith("Extension modules: ")).strip()

    def _read(self) -> None:
        if self._stream is None:
            return
        with self._stream, contextlib.suppress(OSError):
            while piece := self._stream.read(1 << 16):
                kept = self._kept + piece
                self._is_cut = self._is_cut or len(kept) > _KEPT_BYTES
                self._kept = kept[-_KEPT_BYTES:]


def _signal_group(leader: int, name: str) -> None:
    """Send a signal to the process and to all that it has started; nothing if they are gone."""
    with contextlib.suppress(OSError):  # macOS refuses a group of zombies, where Linux finds none
        if hasattr(os, "killpg"):
            os.killpg(leader, getattr(signal, name))
        else:  # Windows: no groups, and one way to end
            os.kill(leader, signal.SIGTERM)


def _without_answer(request: UnitRequest, exit_status: int, *, is_late: bool, said: str, seconds: float) -> Unit:
    """Return the unit of a process that ended, or was ended, before it had answered."""
    status: UnitStatus = "timeout" if is_late else "crashed"
    hint, location = "", _where(said)
    # What a library says of memory stands before the traceback of its abort.
    last_words = (said.rpartition("Fatal Python error")[0] or said)[-2000:]
    if is_late:
        code, reason = "GC802", f"no answer in {request.timeout_seconds:g} s"
        hint = "use a longer --timeout, or a smaller batch (it runs the same code)."
    elif mentions_out_of_memory(last_words):
        code, reason = "GC803", f"out of memory: {_ending(exit_status)}"
        hint = "use a smaller batch (it runs the same code), or a larger memory limit."
    else:
        code, reason = "GC801", _ending(exit_status)
        if exit_status == -getattr(signal, "SIGKILL", 9):
            hint = "on Linux this is most often the kernel, out of memory: see gradctl explain GC803."
    return inconclusive_unit(request, status, code, reason, hint=hint, details=said, location=location, seconds=seconds)


def _ending(exit_status: int) -> str:
    if exit_status >= 0:
        return f"the process ended with exit status {exit_status} and no answer"
    try:
        name = f" ({signal.Signals(-exit_status).name})"
    except ValueError:  # a real-time signal has no name
        name = ""
    return f"the process died of signal {-exit_status}{name}"


def _where(said: str) -> Location | None:
    """Return the innermost frame of the user's in the traceback that faulthandler wrote last, if it wrote one."""
    _, found, frames = said.rpartition("Current thread 0x")
    if not found:
        return None
    for file, line in re.findall(r'^  File "(.+)", line (\d+) in ', frames.partition("\n\n")[0], re.MULTILINE):
        is_ours = file.startswith((_GRADCTL + os.sep, "<")) or any(part in file for part in _TORCH)
        is_pythons = file.startswith(_PYTHONS_OWN) and "-packages" not in file
        if not is_ours and not is_pythons:
            return Location(file=file, line=int(line))
    return None
