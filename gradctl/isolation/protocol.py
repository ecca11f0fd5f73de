"""The messages between the supervisor and the process of a unit: one JSON file each way, in a folder of the unit's own.

An answer counts only if it is complete and carries the nonce of its assignment, so that neither a file that a model
writes nor one of an earlier process is taken for it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gradctl.core.findings import Finding, Location, Unit, fingerprint
from gradctl.core.names import UnitStatus
from gradctl.core.target_options import MeasuringOptions, TargetOptions, TrainingOptions

ASSIGNMENT, ANSWER = "assignment.json", "answer.json"

_Message = TypeVar("_Message")

# Messages of Python, torch's allocator, C++ and the dynamic linker when memory runs out.
_REFUSALS = re.compile(
    "MemoryError|can(?:'t|not) allocate memory|Cannot allocate memory|bad_alloc|failed to map segment|out of memory"
)


class UnitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One target in one form, and how to judge it: the request to a process of its own.

    Attributes:
        checking: the target and what goes with it.
        form: ``eager`` for autograd against finite differences, else the form to compare with eager.
        allows: accepted findings, ``CODE`` or ``CODE:NAME``.
        fail_on: the severity from which a finding fails the unit.
        named: whether the user asked for this form by name; then it is not skipped in silence.
        bisect: whether torch is to say which part of its compiler is wrong.
        training: the training steps, if the form is a variant of the training step.
        measuring: how to measure what the form costs, before it is judged; None measures nothing.
        snapshot: the file to verify, of form ``snapshot``; None of any other form.
        update: whether the snapshot is written if it is missing or differs.
        timeout_seconds: when the process is ended, counted from its start.
        memory_limit_bytes: of the address space of the process; on the CPU only.
    """

    checking: TargetOptions
    form: str = "eager"
    allows: tuple[str, ...] = ()
    fail_on: str = "error"
    named: bool = False
    bisect: bool = False
    training: TrainingOptions | None = None
    measuring: MeasuringOptions | None = None
    snapshot: Path | None = None
    update: bool = False
    timeout_seconds: float = 300.0
    memory_limit_bytes: int | None = None


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """A request, the nonce that its answer must carry, and the process id of the supervisor."""

    request: UnitRequest
    nonce: str
    supervisor: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict, and the nonce of the assignment that it answers."""

    nonce: str
    unit: Unit


def write_message(path: Path, message: Any) -> None:
    """Write ``message`` beside ``path`` and move it there: nobody sees half of it. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)  # also anew, where a model has cleaned up
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(encode(message))
    os.replace(part, path)  # noqa: PTH105  # named as what it is: the move that is whole or not at all


def read_message(path: Path, kind: type[_Message]) -> _Message:
    """Return the message at ``path``, read strictly.

    Raises:
        OSError, ValueError: it is missing, incomplete, or of another kind.
    """
    return decode(path.read_bytes(), kind)


def encode(message: Any) -> bytes:
    """Return a message as JSON."""
    return msgspec.json.encode(message, enc_hook=str)


def decode(content: bytes, kind: type[_Message]) -> _Message:
    """Return the message in JSON, read strictly; ValueError if it is incomplete, or of another kind."""
    return msgspec.json.decode(content, type=kind, dec_hook=lambda kind, value: kind(value))


def read_answer(path: Path, nonce: str) -> Unit | None:
    """Return the unit of the answer at ``path``; None if it is missing, incomplete, or has another nonce."""
    try:
        answer = read_message(path, Answer)
    except (OSError, ValueError, RecursionError):
        return None
    return answer.unit if answer.nonce == nonce else None


def inconclusive_unit(
    request: UnitRequest,
    status: UnitStatus,
    code: str,
    reason: str,
    *,
    hint: str = "",
    details: str = "",
    location: Location | None = None,
    seconds: float = 0.0,
) -> Unit:
    """Return the unit of a check without a verdict, with one finding that says why.

    The finding is a warning: an error would fail the unit, and nothing is known about its gradients.
    """
    target = request.checking.target
    finding = Finding(
        code=code,
        severity="warning",
        message=f"{reason.rstrip('.')}.",
        hint=hint,
        location=location,
        fingerprint=fingerprint(code, target, request.form, None, None),
    )
    return Unit(
        target=target,
        form=request.form,
        status=status,
        verdict="inconclusive",
        reason=reason.rstrip("."),
        details=details or None,
        seconds=seconds,
        findings=(finding,),
    )


def mentions_out_of_memory(text: str) -> bool:
    """Return whether the text of an error says that memory ran out."""
    return _REFUSALS.search(text) is not None
