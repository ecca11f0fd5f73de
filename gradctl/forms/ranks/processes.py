"""The processes of the ranks: forked from this one, joined by gloo, asked one request at a time, and always ended.

They are forked, not spawned: torch is imported and the model is loaded already, which saves seconds for each rank, and
what they need is inherited, not pickled. They meet in a file in memory (``memfd_create``) and talk over the loopback
interface, so that nothing is left on the disk or the network, also if this process is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import pickle
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist

from gradctl.core.exits import intercept_exits
from gradctl.forms.form import CannotCapture
from gradctl.subject.frames import first_line, is_users, raised_at

FailureKind = Literal["raised", "died", "hung", "late"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 0.2
# The ranks use less than a hundredth of a processor for so long, and none has answered: they wait for each other. A
# rank that was not in a collective last may wait for a file or a lock: it has more time.
_IDLE_SECONDS, _IDLE_ELSEWHERE_SECONDS, _IDLE_PART = 10.0, 60.0, 0.01
_IN_COLLECTIVE = ("waits in", "gathers")
# A rank that ends breaks the connections of the others, whose errors arrive at about the same time.
_ECHO_SECONDS = 0.5
_ECHO = re.compile(r"[Cc]onnection (closed|reset|refused)|closed by peer|gloo")
_NOTE_BYTES = 256
_KEPT_BYTES = 16 * 1024
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
# The variables that a launcher sets (torchrun), which programs read.
_VARIABLES = {"RANK": "{rank}", "LOCAL_RANK": "{rank}", "WORLD_SIZE": "{world}", "LOCAL_WORLD_SIZE": "{world}"}


class RankFailed(Exception):
    """A rank did not answer.

    Args:
        rank: which.
        kind: it raised, died, waits for the others, or has not ended in time.
        reason: one sentence without a full stop, which names the rank.
        place: file and line of the user's code, if known.
        details: stack traces and the end of what the rank wrote.
    """

    def __init__(
        self, rank: int, kind: FailureKind, reason: str, *, place: tuple[str, int] | None = None, details: str = ""
    ) -> None:
        super().__init__(reason)
        self.rank, self.kind, self.reason, self.place, self.details = rank, kind, reason, place, details


@dataclass(frozen=True, slots=True, eq=False)
class Rank:
    """One rank, seen from inside.

    Attributes:
        number: from 0.
        world: how many there are.
        notes: memory shared with the parent: what the rank is doing, for the message if it does not end.
    """

    number: int
    world: int
    notes: mmap.mmap

    def note(self, text: str) -> None:
        """Let the parent know what this rank is doing, at most 250 bytes."""
        start = self.number * _NOTE_BYTES
        self.notes[start : start + _NOTE_BYTES] = text.encode()[:_NOTE_BYTES].ljust(_NOTE_BYTES, b"\0")


# Called in each rank; returns the function that answers its requests.
Serve = Callable[[Rank], Callable[[Any], Any]]


@dataclass(slots=True, eq=False)
class _Process:
    """One rank, seen from the parent."""

    pid: int
    pipe: Connection
    written: int  # file descriptor of what it writes to standard error
    status: int | None = None

    def is_alive(self) -> bool:
        return self.wait(os.WNOHANG) is None

    def wait(self, options: int = 0) -> int | None:
        """Return how it ended, as ``os.waitpid`` has it; None if it has not."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, options)
            self.status = status if pid else None
        return self.status

    def kill(self) -> None:
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def seconds_used(self) -> float:
        """Return its processor time."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def said(self) -> str:
        """Return the end of what it wrote to standard error."""
        size = os.fstat(self.written).st_size
        text = os.pread(self.written, _KEPT_BYTES, max(0, size - _KEPT_BYTES)).decode(errors="replace")
        return text.partition("\nExtension modules: ")[0].strip()  # faulthandler lists every compiled module


@dataclass(slots=True, eq=False)
class RankProcesses:
    """Ranks that each run ``serve`` and answer requests, as a context manager, which ends them.

    Args:
        world: how many.
        serve: called in each rank, after its process group is initialised, with what the parent has in memory.
        seconds: the time limit of each request, and of the start.

    Raises:
        RankFailed: a rank does not come up to its first request.
        OSError: the system cannot fork.
    """

    world: int
    serve: Serve
    seconds: float = 300.0
    _processes: list[_Process] = field(default_factory=list)
    _notes: mmap.mmap = field(init=False)

    def __post_init__(self) -> None:
        self._notes = mmap.mmap(-1, self.world * _NOTE_BYTES)
        meeting = os.memfd_create("gradctl-ranks")
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            for number in range(self.world):
                self._processes.append(self._fork(Rank(number, self.world, self._notes), meeting))
            self._answers()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(meeting)

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, requests: Sequence[Any]) -> list[Any]:
        """Return the answers of all ranks, one request for each.

        Raises:
            RankFailed: a rank raises, dies, or does not answer; the others are ended.
        """
        for process, request in zip(self._processes, requests, strict=True):
            with contextlib.suppress(OSError):  # it has died, as is found below
                process.pipe.send_bytes(pickle.dumps(request))
        return self._answers()

    def close(self) -> None:
        """End all ranks, whatever they are doing."""
        for process in self._processes:
            process.kill()
            process.pipe.close()
            os.close(process.written)
        self._processes.clear()

    def _fork(self, rank: Rank, meeting: int) -> _Process:
        own, other = Pipe()
        written, parent = os.memfd_create("gradctl-rank"), os.getpid()
        pid = os.fork()
        if pid == 0:
            where = f"/proc/self/fd/{meeting}"
            _run(rank, self.serve, other, written=written, meeting=where, parent=parent, seconds=self.seconds)
        other.close()
        return _Process(pid, own, written)

    def _answers(self) -> list[Any]:
        """Return one answer of each rank, as soon as all are there.

        Raises:
            RankFailed: as ``ask``.
        """
        answers: dict[int, Any] = {}
        failures: list[RankFailed] = []
        since, used = time.monotonic(), self._seconds_used()
        deadline = since + self.seconds
        while len(answers) < self.world:
            waiting = {each.pipe: n for n, each in enumerate(self._processes) if n not in answers}
            for pipe in wait(list(waiting), _POLL_SECONDS):
                number = waiting[pipe]  # type: ignore[index]  # a connection, as given
                answer = self._received(number)
                answers[number] = answer
                if isinstance(answer, RankFailed):
                    failures.append(answer)
                    deadline = min(deadline, time.monotonic() + _ECHO_SECONDS)
            now = time.monotonic()
            if failures and (now > deadline or failures[-1].kind == "died"):
                break
            left = sorted(waiting.values() - answers.keys())
            is_in_collectives = all(self._note(n).startswith(_IN_COLLECTIVE) for n in left)
            if now > deadline or now - since > (_IDLE_SECONDS if is_in_collectives else _IDLE_ELSEWHERE_SECONDS):
                total = self._seconds_used()
                if left and (now > deadline or total - used < _IDLE_PART * (now - since)):
                    raise self._unanswered(left, is_late=now > deadline)
                since, used = now, total
        if failures:
            raise min(failures, key=_order)
        return [answers[n] for n in range(self.world)]

    def _received(self, number: int) -> Any:
        """Return what a rank has sent, or what became of it."""
        process = self._processes[number]
        try:
            kind, value = pickle.loads(process.pipe.recv_bytes())
        except (OSError, EOFError):
            status = process.wait()
            assert status is not None
            said, how = process.said(), "ended without an answer"
            if os.WIFSIGNALED(status):
                signalled = os.WTERMSIG(status)
                how = f"died of signal {signalled} ({signal.Signals(signalled).name})"
            # What a library wrote before it aborted.
            words = said.partition("Fatal Python error")[0].strip().splitlines()
            place = _place_in(said)
            reason = f"rank {number} {how}{f': {words[-1].strip()}' if words else ''}{_shown(place)}"
            return RankFailed(number, "died", reason.rstrip(". "), place=place, details=said)
        if kind == "answer":
            return value
        said, place, details = value
        reason = said if kind == "refused" else f"rank {number} raises {said}{_shown(place)}"
        return RankFailed(number, "raised", reason, place=place, details=details)

    def _unanswered(self, waiting: Sequence[int], *, is_late: bool) -> RankFailed:
        """Return what the ranks without an answer are doing, by their notes and the stacks that they write now."""
        notes = [self._note(n) for n in range(self.world)]
        stacks = {}
        for number in waiting:
            process = self._processes[number]
            os.kill(process.pid, signal.SIGTERM)  # faulthandler writes the stack, and the process ends
            until = time.monotonic() + 1.0
            while process.is_alive() and time.monotonic() < until:
                time.sleep(0.01)
            stacks[number] = process.said()
        parts = []
        for number in range(self.world):
            if number not in stacks:
                parts.append(f"rank {number} has finished")
                continue
            place = _place_in(stacks[number])
            parts.append(f"rank {number} {notes[number] or 'has not started'}{_shown(place)}")
        said = f"no answer in {self.seconds:g} s" if is_late else "the ranks wait for each other"
        first = waiting[0]
        details = "\n".join(f"rank {number}:\n{text.strip()}" for number, text in stacks.items())
        kind: FailureKind = "late" if is_late else "hung"
        return RankFailed(first, kind, f"{said}: {'; '.join(parts)}", place=_place_in(stacks[first]), details=details)

    def _seconds_used(self) -> float:
        return sum(each.seconds_used() for each in self._processes)

    def _note(self, number: int) -> str:
        start = number * _NOTE_BYTES
        return self._notes[start : start + _NOTE_BYTES].rstrip(b"\0").decode(errors="replace")


def _shown(place: tuple[str, int] | None) -> str:
    return f" ({Path(place[0]).name}, line {place[1]})" if place is not None else ""


def _order(failure: RankFailed) -> tuple[bool, bool, int]:
    """Return what puts the origin before its echoes in the other ranks, whose connections break."""
    return failure.kind != "died", _ECHO.search(failure.reason) is not None, failure.rank


def _run(
    rank: Rank, serve: Serve, pipe: Connection, *, written: int, meeting: str, parent: int, seconds: float
) -> NoReturn:
    """Be a rank: never return to the parent's code."""
    leave = os._exit
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            leave(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _redirect(written)
        with intercept_exits(_say_exit):
            _answer_requests(rank, serve, pipe, meeting, seconds)
    finally:
        leave(1)


def _redirect(written: int) -> None:
    """Let standard output go nowhere, and standard error to a file of the parent's, with the stacks of crashes."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, nowhere), (1, nowhere), (2, written)):
        os.dup2(source, target)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    faulthandler.enable(file=2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.register(signal.SIGTERM, file=2, all_threads=False, chain=True)


def _say_exit(status: int, file: str, line: int) -> int:
    os.write(2, f"os._exit({status}) in {file}, line {line}\n".encode())  # sys.stderr may be silenced
    return status


def _answer_requests(rank: Rank, serve: Serve, pipe: Connection, meeting: str, seconds: float) -> None:
    torch.set_num_threads(1)  # the threads of the parent do not exist here
    os.environ |= {name: text.format(rank=rank.number, world=rank.world) for name, text in _VARIABLES.items()}
    os.environ["GLOO_SOCKET_IFNAME"] = next((n for _, n in socket.if_nameindex() if n.startswith("lo")), "lo")
    try:
        rank.note("starts")
        store = dist.FileStore(  # type: ignore[attr-defined]
            meeting, rank.world
        )
        _ensure_autograd_runs()
        limit = timedelta(seconds=seconds)
        dist.init_process_group("gloo", store=store, rank=rank.number, world_size=rank.world, timeout=limit)
        answer = serve(rank)
        rank.note("has finished")
        pipe.send_bytes(pickle.dumps(("answer", None)))
        while True:
            request = pickle.loads(pipe.recv_bytes())
            rank.note("computes")
            reply = pickle.dumps(("answer", answer(request)))
            rank.note("has finished")
            pipe.send_bytes(reply)
    except EOFError:
        return  # the parent has closed the pipe
    except BaseException as error:  # whatever the user's code raises
        details = "".join(traceback.format_exception(error))
        said = f"SystemExit: {error.code}" if isinstance(error, SystemExit) else first_line(error)
        kind, said = ("refused", error.reason) if isinstance(error, CannotCapture) else ("raised", said)
        pipe.send_bytes(pickle.dumps((kind, (said, raised_at(error), details))))
        time.sleep(_ECHO_SECONDS)  # the connections of the others stay, so that this error is the first


def _ensure_autograd_runs() -> None:
    """Raise if autograd cannot run in this forked process, because it has started threads in the parent.

    Raises:
        CannotCapture: with what to do.
    """
    try:
        torch.autograd.backward(torch.ones(1, requires_grad=True).sum())
    except RuntimeError as error:
        raise CannotCapture(
            "autograd has started threads in this process, as it does on a machine with a GPU, and ranks cannot be "
            "forked from it. Set CUDA_VISIBLE_DEVICES= (empty) in the environment"
        ) from error


def _place_in(said: str) -> tuple[str, int] | None:
    """Return the user's innermost frame in the stack that faulthandler wrote last."""
    frames = re.findall(r'^  File "(.+)", line (\d+) in ', said.rpartition("(most recent call first)")[2], re.MULTILINE)
    standard = os.path.dirname(os.__file__)  # noqa: PTH120
    for file, line in frames:
        if file == __file__:
            return None  # below it is the stack of the parent
        if is_users(file) and not (file.startswith(standard) and "-packages" not in file):
            return file, int(line)
    return None
