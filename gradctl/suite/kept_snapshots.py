"""The snapshots of ``gradctl check``: a folder with a file for each target, named after its title."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from gradctl.core.errors import NothingToCheck, listed
from gradctl.core.findings import Unit, note
from gradctl.core.names import SNAPSHOT, SNAPSHOT_SUFFIX, snapshot_name
from gradctl.suite.configuration import Project, TargetEntry


def snapshot_folder(project: Project, given: Path | None = None) -> Path | None:
    """Return the folder that is given, else that of the configuration; None if there is neither."""
    configured = project.configuration.snapshots
    return given if given is not None or configured is None else project.root / configured


def ensure_exists(path: Path) -> None:
    """Raise if a snapshot is missing.

    Raises:
        NothingToCheck: GC139 with the line that writes it.
    """
    if not path.exists():
        line = f"gradctl check --snapshot {path.parent} --form {SNAPSHOT} --update"
        raise NothingToCheck("GC139", f"{path.parent} has no snapshot of this target. Write it: {line}.")


def note_unused_files(folder: Path, entries: Collection[TargetEntry], units: Sequence[Unit]) -> list[Unit]:
    """Return the units, the first of a snapshot with a note on the files of the folder that belong to no target."""
    known = {snapshot_name(entry.title) for entry in entries}
    unused = sorted(each.name for each in folder.glob(f"*{SNAPSHOT_SUFFIX}") if each.name not in known)
    first = next((number for number, unit in enumerate(units) if unit.form == SNAPSHOT), None)
    if not unused or first is None:
        return list(units)
    said = f"{listed(unused)} in {folder} belong{'s' if len(unused) == 1 else ''} to no target of the configuration."
    found = note("GC139", said, "remove what belongs to a target that was removed or renamed.")
    noted = msgspec.structs.replace(units[first], findings=(*units[first].findings, found))
    return [*units[:first], noted, *units[first + 1 :]]
