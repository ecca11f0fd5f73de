"""The journal of ``gradctl check``: the start and the end of each unit, so that a run that died can be resumed.

One JSON line a record, synchronised with the disk before the run goes on. The first line describes the run: a journal
is continued only by a run of the same units, the same code and the same packages. A last line that is not whole is
dropped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import msgspec

from gradctl import __version__
from gradctl.core.assembly import environment
from gradctl.core.errors import GradctlError, ResourceError, listed
from gradctl.core.findings import Unit
from gradctl.isolation.protocol import UnitRequest
from gradctl.suite.configuration import Project
from gradctl.suite.discovery import module_and_name, python_files

SUFFIX = ".journal"
_BEGINNING = b'{"type":"run"'


class _Run(msgspec.Struct, frozen=True, tag="run"):
    """What is run: a digest of the requests, versions of packages, and a digest of each file that units read."""

    journal: Literal[1]
    plan: str
    versions: dict[str, str | int | None]
    files: dict[str, str]


class _Start(msgspec.Struct, frozen=True, tag="start"):
    """The process of a unit is about to start."""

    key: str
    unit: str


class _End(msgspec.Struct, frozen=True, tag="end"):
    """A unit ended; it is not judged by the configuration yet."""

    key: str
    unit: Unit


class Journal:
    """The journal of a run, open for writing.

    Attributes:
        ended: how many units had ended in the earlier run.
        running: names of units that were running when it died.
    """

    def __init__(self, file: IO[bytes], path: Path, ended: dict[str, Unit], running: Sequence[str]) -> None:
        self._ended, self.ended, self.running = ended, len(ended), tuple(running)
        self._file, self._path, self._lock = file, path, threading.Lock()

    def unit_of(self, request: UnitRequest) -> Unit | None:
        """Return the unit of a request that had ended in the earlier run; None if it is to run."""
        return self._ended.get(_key(request))

    def started(self, request: UnitRequest) -> None:
        """Record that the process of a unit is about to start.

        Raises:
            ResourceError: GC131 if the journal cannot be written.
        """
        self._write(_Start(_key(request), f"{request.checking.target} {request.form}"))

    def has_ended(self, request: UnitRequest, unit: Unit) -> None:
        """Record the unit of a process that ended; as ``started``."""
        self._write(_End(_key(request), unit))

    def remove(self) -> None:
        """Remove the journal: the run is complete, and its report is written."""
        self._path.unlink(missing_ok=True)

    def _write(self, record: _Run | _Start | _End) -> None:
        with self._lock:
            try:
                line = msgspec.json.encode(record) + b"\n"
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file.fileno())
            except OSError as error:
                raise _unwritable(self._path, error) from error


def _key(request: UnitRequest) -> str:
    """Return a digest of a request: those that are equal have equal units."""
    return hashlib.sha256(msgspec.json.encode(request, enc_hook=str)).hexdigest()


def versions() -> dict[str, str | int | None]:
    """Return what verdicts may depend on: versions of gradctl, of the packages that run graphs, and of Python."""
    packages = ("torch", "onnx", "onnxruntime", "python")
    return {"gradctl": __version__} | {name: environment("cpu")[name] for name in packages}


def describe_plan(requests: Sequence[UnitRequest]) -> str:
    """Return a digest of the requests of a run, in their order."""
    return hashlib.sha256("".join(map(_key, requests)).encode()).hexdigest()


@contextmanager
def open_journal(path: Path, project: Project, requests: Sequence[UnitRequest], *, resumes: bool) -> Iterator[Journal]:
    """Open the journal at ``path``: begin it, or continue that of an earlier run.

    Args:
        path: the file, which is made.
        project: the folder whose Python files must be those of the earlier run.
        requests: the units of the whole run.
        resumes: whether a journal that is there is continued; else it is replaced.

    Raises:
        GradctlError: GC154 if the file is no journal, is of another run, or another process is writing it.
        ResourceError: GC131 if it cannot be written.
    """
    described = _Run(1, describe_plan(requests), versions(), _digests(project, requests))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from error
    with os.fdopen(descriptor, "r+b", buffering=0) as file:  # a buffer would be written again on closing
        is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)  # a pipe or a device may have no end
        if is_file:
            _lock(file, path)
        earlier, records, length = _read(file.read()) if is_file else (None, [], 1)
        if earlier is None and length:
            raise GradctlError(
                "GC154", f"{str(path)!r} is not a journal of gradctl. Move it away, or rename the report."
            )
        if resumes and earlier is not None:
            _ensure_same(path, earlier, described)
        else:
            records, length = [], 0
        file.seek(length)
        file.truncate()
        ended = {each.key: each.unit for each in records if isinstance(each, _End)}
        running = {each.key: each.unit for each in records if isinstance(each, _Start) and each.key not in ended}
        journal = Journal(file, path, ended, list(running.values()))
        if not length:
            journal._write(described)
        yield journal


def _read(content: bytes) -> tuple[_Run | None, list[_Start | _End], int]:
    """Return the description, the records, and the length of all whole lines.

    If there is no description, the length is that of content of another kind, and 0 of a description that was torn.
    """
    decoder = msgspec.json.Decoder(_Run | _Start | _End)
    described: _Run | None = None
    records: list[_Start | _End] = []
    length = 0
    for line in content.splitlines(keepends=True):
        try:
            record = decoder.decode(line if line.endswith(b"\n") else b"")
        except (msgspec.DecodeError, RecursionError):
            break
        if isinstance(record, _Run):
            described = record
        else:
            records.append(record)
        length += len(line)
    is_torn = b"\n" not in content and content[: len(_BEGINNING)] == _BEGINNING[: len(content)]
    return described, records, length if described is not None or is_torn else len(content)


def _ensure_same(path: Path, earlier: _Run, now: _Run) -> None:
    """Raise unless a journal is of this run."""
    changed = [name for name in {**earlier.files, **now.files} if earlier.files.get(name) != now.files.get(name)]
    other = [
        f"{name} {then} (now {now.versions[name]})"
        for name, then in earlier.versions.items()
        if now.versions.get(name) != then
    ]
    if other:
        what = f"was written with {listed(other)}"
    elif earlier.plan != now.plan:
        what = "is of another configuration: its units, their options or their limits differ from those of this run"
    elif changed:
        what = f"is of other code: {listed(changed)} changed since"
    else:
        return
    raise GradctlError("GC154", f"the journal {str(path)!r} {what}. Run without --resume to check all units again.")


def _digests(project: Project, requests: Sequence[UnitRequest]) -> dict[str, str]:
    """Return digests of the Python files in the folder of the configuration and beside the targets, and size and time
    of files of values.
    """
    digests = {}
    places = [Path(module_and_name(each.checking.target)[0]).absolute() for each in requests]
    beside = {file for folder in {each.parent for each in places if each.is_file()} for file in folder.glob("*.py")}
    for file in {*beside, *(python_files(project.root) if project.file.exists() else ())}:
        with contextlib.suppress(OSError):  # removed meanwhile, or not readable: a unit that needs it says so
            digests[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    options = {each.checking for each in requests}
    for path in {path for each in options for path in (each.weights, each.inputs_file) if path is not None}:
        with contextlib.suppress(OSError):
            digests[str(path)] = f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns} ns"
    return dict(sorted(digests.items()))


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep other runs away from the journal while this process lives."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise GradctlError(
            "GC154", f"another run is writing the journal {str(path)!r}. Wait for its end, or write another report."
        ) from None


def _unwritable(path: Path, error: OSError) -> ResourceError:
    reason = error.strerror or type(error).__name__
    message = f"the journal {str(path)!r} cannot be written: {reason}. Free space, or write the report elsewhere."
    return ResourceError("GC131", message, exit_code=2)
