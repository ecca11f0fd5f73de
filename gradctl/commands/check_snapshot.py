"""A snapshot that is kept for a target or a test: verified if it exists, and written or rewritten on request."""

from __future__ import annotations

from pathlib import Path

import msgspec

from gradctl.core.allows import Allows
from gradctl.core.assembly import make_unit
from gradctl.core.errors import ResourceError, TargetError
from gradctl.core.findings import Unit, note
from gradctl.core.names import SNAPSHOT
from gradctl.core.target_options import TargetOptions
from gradctl.core.verdicts import describe_changes
from gradctl.snapshots.take_snapshot import take_snapshot
from gradctl.snapshots.verify_snapshot import verify_snapshot
from gradctl.subject.subject import Subject

# A snapshot that cannot be read, that is of a model with other names or shapes, or that has no values.
_REPLACED = ("GC133", "GC134", "GC135")


def check_snapshot(
    path: Path,
    subject: Subject,
    *,
    options: TargetOptions | None = None,
    device: str | None = None,
    dtype: str | None = None,
    update: bool = False,
    allows: Allows | tuple[str, ...] = (),
    fail_on: str = "error",
) -> Unit:
    """Return whether a model still computes what its snapshot holds.

    Args:
        path: of the snapshot.
        subject: the model and its inputs, on the CPU.
        options: those that loaded the subject; None for a model that was given in Python.
        device, dtype: where and in what to run what is compared; None for the CPU and the model's own dtype.
        update: write the snapshot if it is missing or differs, or cannot be compared with this model; on the CPU.
        allows, fail_on: as in ``gradcheck``.

    Raises:
        TargetError: as ``verify_snapshot`` and ``take_snapshot``.
        ResourceError: GC131 if a file cannot be written.
    """
    reason = ""
    if path.exists() or not update:
        try:
            unit = verify_snapshot(
                path,
                subject,
                options=options,
                device=device,
                dtype=dtype,
                update=update,
                allows=allows,
                fail_on=fail_on,
            )
        except TargetError as error:
            if not update or error.code not in _REPLACED:
                raise
            reason = f" in place of one that does not fit: {error}"
        else:
            return _noted(unit, path) if update else unit
    return write_snapshot(path, subject, options=options, reason=reason, allows=allows, fail_on=fail_on)


def write_snapshot(
    path: Path,
    subject: Subject,
    *,
    options: TargetOptions | None = None,
    values: bool = True,
    full: bool = False,
    reason: str = "",
    allows: Allows | tuple[str, ...] = (),
    fail_on: str = "error",
) -> Unit:
    """Write a snapshot, and return a unit with a note that says so, and why; its folder is made.

    Raises:
        TargetError, ResourceError: as ``check_snapshot``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError("GC131", f"{path.parent} cannot be made: {error.strerror}.", exit_code=2) from error
    taken = take_snapshot(subject, path, options=options, values=values, full=full)
    written = note("GC139", f"{path} was written{reason.rstrip('.')}.")
    accepted = allows if isinstance(allows, Allows) else Allows(allows)
    return make_unit(
        subject.target, SNAPSHOT, [*taken.notes, written], (), allows=accepted, fail_on=fail_on, reference=str(path)
    )


def _noted(unit: Unit, path: Path) -> Unit:
    """Return the unit of an update, with a note that says what changed if the snapshot was rewritten."""
    if not any(finding.allowed for finding in unit.findings):
        return unit
    changes = describe_changes(unit.tensors)
    rewritten = note("GC139", f"{path} was rewritten{f', which changes {changes}' if changes else ''}.")
    return msgspec.structs.replace(unit, findings=(*unit.findings, rewritten))
