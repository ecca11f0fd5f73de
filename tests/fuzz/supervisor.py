"""A worker that is started again when a file kills it or makes it hang, and what it leaves behind on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Answer", "Supervisor", "faults", "snapshot"]

_EXIT_CODES = (0, 1, 2, 4, 5)
_START_SECONDS = 180
_OURS = re.compile(r"Traceback \(most recent call last\)|internal error of gradctl")
# A worker keeps what libraries leak; after so many commands a fresh one takes over.
_COMMANDS = 400


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one command.

    Attributes:
        code: the exit code; None where the process died or was killed.
        stderr: what it said there.
        ended: how the process ended, if it did.
    """

    code: int | None
    stderr: str
    ended: str = ""


def faults(answer: Answer) -> list[str]:
    """Return what is wrong with an answer; a result or an error in words is right."""
    if answer.code is None:
        return [answer.ended]
    found = [] if answer.code in _EXIT_CODES else [f"exit code {answer.code}"]
    if _OURS.search(answer.stderr):
        found.append("a traceback")
    if answer.code == 2 and not re.search(r"^GC\d{3} \S|^Error: \S", answer.stderr, re.MULTILINE):
        found.append("no sentence with a code")
    return found


def snapshot(folder: Path, *, without: Path) -> dict[str, str]:
    """Return what lies below a folder: a digest by path, without one part of it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path != without and without not in path.parents:
            is_plain = path.is_file() and not path.is_symlink()
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if is_plain else "no plain file"
    return found


class Supervisor:
    """Runs commands in a worker.

    Args:
        folder: where workers run, and keep their temporary files.
        seconds: what one command may take.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self.process: subprocess.Popen[bytes] | None = None
        self.commands = self.started = 0

    def run(self, arguments: list[str]) -> Answer:
        """Return what became of a command line."""
        if self.process is None or self.commands >= _COMMANDS:
            self._start()
        self.commands += 1
        self.requests.write(json.dumps(arguments) + "\n")
        self.requests.flush()
        line = self._answer(self.seconds)
        said = self.stderr.read_text(errors="replace")
        if line is None:
            ended = self._end()
            return Answer(None, said, ended)
        return Answer(json.loads(line), said)

    def close(self) -> None:
        """End the worker."""
        if self.process is not None:
            self._end()

    def _start(self) -> None:
        self.close()
        self.started += 1
        self.commands = 0
        self.stderr = self.folder / f"stderr-{self.started}"
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(self.folder / "tmp")}
        (self.folder / "tmp").mkdir(exist_ok=True)
        asked, requests = os.pipe()
        answers, said = os.pipe()
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", str(asked), str(said)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(asked, said),
                start_new_session=True,
            )
        os.close(asked)
        os.close(said)
        self.requests, self.answers = os.fdopen(requests, "w"), os.fdopen(answers, "rb", buffering=0)

    def _answer(self, seconds: float) -> bytes | None:
        """Return the line that the worker answers; None where it died, or took too long."""
        poll = select.poll()
        poll.register(self.answers, select.POLLIN)
        if not poll.poll((seconds + (_START_SECONDS if self.commands == 1 else 0)) * 1000):
            return None
        return self.answers.readline() or None

    def _end(self) -> str:
        """Kill the worker, and return how it had ended before."""
        assert self.process is not None
        process, self.process = self.process, None
        with suppress(BrokenPipeError):
            self.requests.close()
        self.answers.close()
        try:
            code = process.wait(1)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"no answer in {self.seconds:g} s"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"the process exited with {code}"
