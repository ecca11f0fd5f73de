"""Which version of torch changed the result of a command: run in one environment after another, and bisected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gradctl.core.errors import ResourceError, listed
from gradctl.core.findings import Finding, Report, Unit, note
from gradctl.core.verdicts import describe_changes
from gradctl.environments.child import Finished
from gradctl.environments.torch_environment import (
    CannotInstall,
    cache_folder,
    environment_of,
    is_installed,
    list_versions,
    run_gradctl,
)
from gradctl.environments.version_search import Change, find_change, most_tries
from gradctl.environments.versions import VersionRange

# Measured with torch 2.13 and 2.14 for Linux and Python 3.11.
_SIZES = "about 0.9 GB for each that is built for the CPU, 6 GB with CUDA"

_Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Tried:
    """One version that was tried: its unit, or the reason why it has no verdict."""

    version: str
    unit: Unit | None
    reason: str = ""

    @property
    def is_passing(self) -> bool | None:
        """Whether it passes; None if it has no verdict."""
        verdicts = {"pass": True, "fail": False}
        return verdicts.get(self.unit.verdict) if self.unit is not None else None

    def __str__(self) -> str:
        return f"{self.version} {_words(self.unit)}" if self.unit is not None else f"{self.version} {self.reason}"


def bisect_torch(
    wanted: VersionRange, arguments: Sequence[str], *, timeout_seconds: float, progress: _Progress
) -> Unit:
    """Return the unit of a command with the first torch that changes its verdict, and notes about the search.

    If no version changes the verdict, it is the unit of the newest version that has one.

    Args:
        wanted: the versions to search.
        arguments: of gradctl: a command that checks one unit.
        timeout_seconds: for the command with one version.
        progress: called with what is done now, and with lines to keep, which end in a newline.

    Raises:
        ResourceError: GC138 if pip lists no version of the range, or none of them has a verdict.
    """
    folder = cache_folder()
    versions = wanted.select(list_versions(folder))
    if not versions:
        raise ResourceError("GC138", f"the index of pip has no torch {wanted} for this Python. Give another range.")
    missing = [version for version in versions if not is_installed(version, folder)]
    tries = most_tries(len(versions))
    progress(
        f"{len(versions)} versions of torch, of which about {tries} are tried; at most {min(tries, len(missing))} are "
        f"installed in {folder}: {_SIZES}\n"
    )
    tried: dict[str, _Tried] = {}

    def judge(version: str) -> bool | None:
        tried[version] = _try(version, folder, arguments, timeout_seconds, progress)
        progress(f"torch {tried[version]}\n")
        return tried[version].is_passing

    change = find_change(versions, judge)
    if change.after is None:
        reasons = listed([f"torch {each}" for each in tried.values()], most=3)
        raise ResourceError("GC138", f"no torch {wanted} has a verdict: {reasons}.")
    unit = tried[change.after].unit
    assert unit is not None
    in_order = [tried[version] for version in versions if version in tried]
    return msgspec.structs.replace(unit, findings=(*unit.findings, *_notes(change, tried, in_order)))


def _try(version: str, folder: Path, arguments: Sequence[str], timeout_seconds: float, progress: _Progress) -> _Tried:
    try:
        if not is_installed(version, folder):
            progress(f"torch {version}: installing")
        python = environment_of(version, folder)
    except CannotInstall as error:
        return _Tried(version, None, f"cannot be installed: {error}")
    progress(f"torch {version}: running")
    try:
        return _answer(version, run_gradctl(version, python, arguments, timeout_seconds=timeout_seconds))
    except OSError as error:
        return _Tried(version, None, f"cannot be started: {error.strerror or error}")


def _answer(version: str, finished: Finished) -> _Tried:
    """Return the unit that a process printed, or how it ended."""
    if finished.exit_status is None:
        return _Tried(version, None, "exceeded its time limit")
    try:
        (unit,) = msgspec.json.decode(finished.output, type=Report).units
    except (ValueError, RecursionError):
        lines = [line.strip() for line in finished.errors.splitlines() if line.strip()]
        said = lines[-1].rstrip(".") if lines else "without a message"
        return _Tried(version, None, f"ended with exit status {finished.exit_status}: {said}")
    return _Tried(version, unit)


def _notes(change: Change, tried: dict[str, _Tried], in_order: Sequence[_Tried]) -> list[Finding]:
    """Return the result of the search, and what was tried."""
    assert change.before is not None and change.after is not None
    before, after = (tried[each].unit for each in (change.before, change.after))
    if change.is_found:
        text = f"torch {change.before} {_words(before)}, torch {change.after} {_words(after)}."
        if change.skipped:
            text += f" Between them are {listed(change.skipped)}, which have no verdict."
    elif change.before == change.after:
        text = f"torch {change.after} {_words(after)}; no other version of the range has a verdict."
    else:
        text = (
            f"torch {change.before} {_words(before)}, and so does torch {change.after}: the change is not between them."
        )
    said = "; ".join(map(str, in_order))
    return [note("GC137", text), note("GC137", f"versions tried: {said}.")]


def _words(unit: Unit | None) -> str:
    """Return what a version does to the result: ``passes``, or how many tensors it changes and the worst of them."""
    assert unit is not None
    changes = describe_changes(unit.tensors)
    if unit.verdict == "fail" and changes:
        return f"changes {changes}"
    reason = f" ({unit.reason})" if unit.reason else ""
    return {"pass": "passes", "fail": "fails"}.get(unit.verdict, f"is {unit.verdict}{reason}")
