"""One check at several sizes of the inputs, and one unit that says at which of them each finding occurs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from gradctl.core.errors import TargetError
from gradctl.core.findings import Finding, TensorResult, Unit
from gradctl.gradients.gradcheck import gradcheck
from gradctl.subject.inputs.sizes import MOST_SIZES, Sizes, sized_subjects, without_layout
from gradctl.subject.subject import Subject

_MOST_NAMES = 6
_WORST_FIRST = ("fail", "inconclusive", "pass", "skipped")


def check_at_sizes(
    subject: Subject,
    sizes: Sizes,
    check: Callable[[Subject, Callable[[str], None]], Unit],
    *,
    limit: int,
    progress: Callable[[str], None] | None = None,
) -> Unit:
    """Return one unit for all sizes and layouts: that of the smallest at which the check fails.

    Args:
        subject: the model and its inputs; not changed.
        sizes: of the inputs.
        check: of one subject; its second argument shows progress.
        limit: as in ``sized_subjects``.
        progress: called with what is being done.

    Raises:
        TargetError: as ``sized_subjects``, and what the check raises if it raises at every size.
    """
    subjects = list(sized_subjects(subject, sizes, limit=limit))
    units: dict[str, Unit] = {}
    refused: dict[str, TargetError] = {}

    def say(beginning: str, text: str) -> None:
        if progress is not None:
            progress(f"{beginning}: {text}")

    for number, (name, sized) in enumerate(subjects, 1):
        try:
            if isinstance(sized, TargetError):
                raise sized
            units[name] = check(sized, partial(say, f"{number} of {len(subjects)} sizes, {name}"))
        except TargetError as error:
            refused[name] = error
    if not units:
        name, first = next(iter(refused.items()))
        message = f"none of {len(refused)} sizes can be checked. At {name}: {first.message}"
        raise type(first)(first.code, message, details=first.details, exit_code=first.exit_code) from first
    return merged(units, {name: error.message for name, error in refused.items()})


def gradcheck_at_sizes(
    subject: Subject,
    sizes: Sizes,
    *,
    limit: int = MOST_SIZES,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Unit:
    """Return the verdict of ``gradcheck`` at all sizes, or on the example if there are no ``sizes``.

    Raises:
        TargetError: as ``check_at_sizes``.
    """
    if not sizes:
        return gradcheck(subject, progress=progress, **settings)

    def check(sized: Subject, say: Callable[[str], None]) -> Unit:
        return gradcheck(sized, progress=say, **settings)

    return check_at_sizes(subject, sizes, check, limit=limit, progress=progress)


def merged(units: dict[str, Unit], refused: Mapping[str, str]) -> Unit:
    """Return the unit of the smallest size with the worst verdict, and the findings that other sizes have besides.

    Of units that pass that of the largest size is returned, or the first with a finding that is no note.

    Args:
        units: by name, the smallest first.
        refused: the reasons why other sizes were not tried, by name.
    """
    chosen = min(units.values(), key=_rank)
    if not _is_loud(chosen):
        plain = [unit for name, unit in units.items() if name == without_layout(name)]
        chosen = next((unit for unit in reversed(plain) if _rank(unit) == _rank(chosen)), chosen)
    findings, rows = _with_others(chosen, list(units.values()))
    names = {reason: [name for name, each in refused.items() if each == reason] for reason in refused.values()}
    reasons = [chosen.reason, *(f"not tried: {_listed(at)} ({reason.rstrip('.')})" for reason, at in names.items())]
    return msgspec.structs.replace(
        chosen,
        findings=tuple(_placed(finding, units) for finding in findings),
        tensors=rows,
        variations=tuple(units),
        reason="; ".join(filter(None, reasons)) or None,
        seconds=sum(unit.seconds for unit in units.values()),
    )


def _rank(unit: Unit) -> tuple[int, bool]:
    return _WORST_FIRST.index(unit.verdict), not _is_loud(unit)


def _is_loud(unit: Unit) -> bool:
    return any(finding.severity != "note" for finding in unit.findings)


def _with_others(chosen: Unit, units: Sequence[Unit]) -> tuple[list[Finding], tuple[TensorResult, ...]]:
    """Return findings and rows of a unit, and the findings of others that it does not have, with their rows."""
    findings = {_key(finding): finding for finding in chosen.findings}
    rows = {(row.quantity, row.tensor): row for row in chosen.tensors}
    tensors = {finding.tensor for finding in chosen.findings if finding.severity != "note"}
    for unit in units:
        more = {_key(each): each for each in unit.findings if each.severity != "note" and _key(each) not in findings}
        findings |= more
        new = {each.tensor for each in more.values()} - tensors
        rows |= {(row.quantity, row.tensor): row for row in unit.tensors if row.tensor in new}
        tensors |= new
    return list(findings.values()), tuple(rows.values())


def _key(finding: Finding) -> tuple[object, ...]:
    return finding.code, finding.quantity, finding.tensor, finding.severity == "note" and finding.message


def _placed(finding: Finding, units: Mapping[str, Unit]) -> Finding:
    """Return a finding that says at which sizes it occurs, and at which the check passes; a note is as it is."""
    if finding.severity == "note":
        return finding
    found = [name for name, unit in units.items() if _key(finding) in map(_key, unit.findings)]
    passing = [name for name, unit in units.items() if unit.verdict == "pass" and name not in found]
    text = f"{finding.message.rstrip('.')}. {_places(found, passing, list(units))}"
    return msgspec.structs.replace(finding, message=text)


def _places(found: Sequence[str], passing: Sequence[str], names: Sequence[str]) -> str:
    """Return ``Found from batch=4 on, not at batch=1; batch=2.``"""
    if len(found) == len(names):
        return f"Found at all {len(names)} sizes and layouts." if len(names) > 1 else f"Found at {names[0]}."
    is_ordered = all(name.count("=") == 1 for name in names)
    is_end = list(found) == list(names[len(names) - len(found) :]) and len(passing) == len(names) - len(found)
    place = f"from {found[0]} on" if is_ordered and is_end and len(found) > 1 else f"at {_listed(found)}"
    return f"Found {place}{f', not at {_listed(passing)}' if passing else ''}."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return "; ".join(names[:_MOST_NAMES]) + more
