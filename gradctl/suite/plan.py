"""Plan, run and judge the units of ``gradctl check``: accepted findings, expected verdicts, unused entries."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from gradctl.core.allows import Allows
from gradctl.core.findings import Allowance, Finding, Unit, fingerprint
from gradctl.core.names import DEFAULT_FORMS, FORMS, RANK_FORMS, SNAPSHOT, UnitVerdict, snapshot_name
from gradctl.core.numbers import format_number
from gradctl.core.verdicts import unit_verdict
from gradctl.isolation.protocol import UnitRequest
from gradctl.isolation.units import Interrupted, run_units
from gradctl.suite.configuration import Accepted, Project, TargetEntry, options_of, parse_size, settings_of
from gradctl.suite.discovery import relative_target
from gradctl.suite.journal import Journal
from gradctl.suite.kept_snapshots import snapshot_folder

# Errors of wrong gradients differ by rounding from run to run; accepted errors are written with three digits.
_NOT_WORSE = 1.01
_TIMEOUT_SECONDS = 300.0
# As ``run_units`` without ``jobs``.
Runner = Callable[..., list[Unit]]
_WORDS: dict[UnitVerdict, str] = {
    "pass": "passed",
    "fail": "failed",
    "inconclusive": "no verdict",
    "skipped": "been skipped",
}


@dataclass(frozen=True, slots=True)
class Planned:
    """One target in one form: ``title`` is its name in reports, ``request`` the message to its process."""

    title: str
    entry: TargetEntry
    form: str
    request: UnitRequest
    accepted: tuple[Accepted, ...] = ()
    expected: UnitVerdict | None = None

    def accepting(self, more: Sequence[Accepted] = (), *, without: Sequence[Accepted] = ()) -> Planned:
        """Return the same with more that is accepted, or with less."""
        applying = [each for each in more if _applies(each, self.entry, self.form)]
        accepted = tuple(each for each in (*self.accepted, *applying) if each not in without)
        texts = tuple(dict.fromkeys(each.finding for each in accepted))
        return replace(self, accepted=accepted, request=msgspec.structs.replace(self.request, allows=texts))


def plan(
    project: Project,
    entries: Sequence[TargetEntry],
    *,
    forms: Sequence[str] = (),
    keywords: Sequence[str] = (),
    allows: Sequence[str] = (),
    snapshots: Path | None = None,
    update: bool = False,
    **overrides: Any,
) -> list[Planned]:
    """Return the units of a run, target by target.

    ``forms`` and ``keywords`` (parts of ``TARGET FORM``, in any case) select units; empty selects all of a target.
    With a folder of ``snapshots``, of the configuration or given, each target has a unit that verifies its snapshot;
    ``update`` writes those that are missing or differ.
    ``overrides`` are ``timeout``, ``memory`` and ``fail_on``, which override the configuration unless they are None.
    """
    words = [word.lower() for word in keywords] or [""]
    folder = snapshot_folder(project, snapshots)
    pairs = [(entry, form) for entry in entries for form in _forms_of(project, entry, forms)]
    units = [_planned(project, entry, form, allows, overrides) for entry, form in pairs]
    if folder is not None and (not forms or SNAPSHOT in forms):
        units += [_planned_snapshot(project, entry, folder, allows, overrides, update=update) for entry in entries]
        order = {entry.title: number for number, entry in enumerate(entries)}
        units.sort(key=lambda each: order[each.entry.title])
    return [each for each in units if any(word in f"{each.title} {each.form}".lower() for word in words)]


def run(
    planned: Sequence[Planned],
    *,
    jobs: int = 1,
    runner: Runner | None = None,
    on_result: Callable[[Unit], None] | None = None,
    journal: Journal | None = None,
) -> list[Unit]:
    """Return the judged units, in their order; those that have ended in the journal are not run again.

    ``runner`` runs them instead of ``run_units``, which runs ``jobs`` at a time.

    Raises:
        Interrupted: with the judged units that were complete.
    """
    earlier = [journal and journal.unit_of(each.request) for each in planned]
    missing = [each.request for each, unit in zip(planned, earlier, strict=True) if unit is None]

    def judged(new: Sequence[Unit | None]) -> list[Unit | None]:
        remaining = iter(new)
        units = [unit or next(remaining) for unit in earlier]
        return [unit and apply_configuration(each, unit) for each, unit in zip(planned, units, strict=True)]

    def ended(request: UnitRequest, unit: Unit) -> None:
        if journal is not None:
            journal.has_ended(request, unit)
        if on_result is not None:
            on_result(unit)

    runner = runner or partial(run_units, jobs=jobs)
    try:
        units = runner(missing, on_start=journal.started if journal else None, on_result=ended)
    except Interrupted as interrupted:
        raise Interrupted(judged(interrupted.units)) from interrupted.__cause__
    return [unit for unit in judged(units) if unit is not None]


def apply_configuration(planned: Planned, unit: Unit) -> Unit:
    """Return a unit under its title, with findings that got worse no longer accepted, compared with ``expect``."""
    findings = [_named(_not_worse(finding, unit, planned.accepted), planned) for finding in unit.findings]
    unit = _with(msgspec.structs.replace(unit, target=planned.title), findings, planned)
    return unit if planned.expected is None else _as_expected(unit, planned.expected)


def note_unused(
    planned: Sequence[Planned], units: Sequence[Unit], everywhere: Sequence[str], every: Sequence[Planned] = ()
) -> tuple[list[Unit], tuple[Allowance, ...]]:
    """Return the units with a note for each entry that accepted nothing, and all entries with whether they did.

    An entry is unused only if all its units ran to their end: those of ``every`` too, the whole configuration if this
    run is a part of it. ``everywhere`` is what the command line accepts.
    """
    noted, allowances = list(units), []
    for accepted in dict.fromkeys(each for unit in planned for each in unit.accepted):
        its = [unit for each, unit in zip(planned, units, strict=True) if accepted in each.accepted]
        allowances.append(Allowance(allow=accepted.finding, applied=_is_used(accepted, its)))
        if not is_unused(accepted, planned, units, every):
            continue
        note = unused_note(accepted.finding, is_option=accepted.finding in everywhere)
        first = next(k for k, each in enumerate(planned) if accepted in each.accepted)
        noted[first] = _with(noted[first], [*noted[first].findings, note], planned[first])
    return noted, tuple(allowances)


def unused_note(allow: str, *, is_option: bool) -> Finding:
    """Return the note that a finding was accepted, by an option or by the configuration, and did not occur."""
    return Finding(
        code="GC150",
        severity="note",
        message=f"{'--allow' if is_option else 'allow'} {allow} accepted nothing in this run.",
        hint="remove it (--write-allows does): what it allowed is gone, or has another name.",
    )


def is_unused(
    accepted: Accepted, planned: Sequence[Planned], units: Sequence[Unit], every: Sequence[Planned] = ()
) -> bool:
    """Return whether all units of an entry, those of ``every`` too, ran to their end, and it accepted nothing."""
    its = [unit for each, unit in zip(planned, units, strict=True) if accepted in each.accepted]
    ran = {(each.title, each.form) for each in planned}
    is_part = any(accepted in each.accepted and (each.title, each.form) not in ran for each in every)
    is_all = bool(its) and not is_part and all(unit.status == "complete" for unit in its)
    return is_all and not _is_used(accepted, its)


def _is_used(accepted: Accepted, units: Iterable[Unit]) -> bool:
    return any(_accepts(accepted, finding) for unit in units for finding in unit.findings)


def _forms_of(project: Project, entry: TargetEntry, chosen: Sequence[str]) -> list[str]:
    """Return the forms of a target, those that are ``chosen`` if some are."""
    every = (*FORMS, *RANK_FORMS) if chosen else DEFAULT_FORMS
    forms: tuple[str, ...] = entry.forms or project.configuration.forms or every
    return [form for form in forms if not chosen or form in chosen]


def _planned_snapshot(
    project: Project,
    entry: TargetEntry,
    folder: Path,
    allows: Sequence[str],
    overrides: dict[str, Any],
    *,
    update: bool,
) -> Planned:
    unit = _planned(project, entry, SNAPSHOT, allows, overrides)
    path = folder / snapshot_name(entry.title)
    return replace(unit, request=msgspec.structs.replace(unit.request, snapshot=path, update=update))


def _planned(
    project: Project, entry: TargetEntry, form: str, allows: Sequence[str], overrides: dict[str, Any]
) -> Planned:
    own = [Accepted(finding=text, target=entry.title) for text in entry.allow]
    general = [each for each in project.configuration.allow if _applies(each, entry, form)]
    given = settings_of(project, entry) | {key: value for key, value in overrides.items() if value is not None}
    request = UnitRequest(
        checking=replace(options_of(project, entry), target=relative_target(project.root, entry.target)),
        form=form,
        fail_on=given.get("fail_on", "error"),
        named=entry.forms is not None,
        timeout_seconds=given.get("timeout", _TIMEOUT_SECONDS),
        memory_limit_bytes=parse_size(given["memory"]) if "memory" in given else None,
    )
    title = relative_target(project.root, entry.target) + (f"[{entry.name}]" if entry.name else "")
    unit = Planned(title, entry, form, request, expected=entry.expect.get(form))  # type: ignore[call-overload]
    return unit.accepting(list(dict.fromkeys([*own, *general, *(Accepted(finding=text) for text in allows)])))


def _with(unit: Unit, findings: Sequence[Finding], planned: Planned) -> Unit:
    """Return a unit with these findings, which may fail it; its verdict also depends on other things."""
    fails = unit_verdict(unit.status, findings, unit.tensors, planned.request.fail_on) == "fail"
    return msgspec.structs.replace(unit, findings=tuple(findings), verdict="fail" if fails else unit.verdict)


def _named(finding: Finding, planned: Planned) -> Finding:
    identity = fingerprint(finding.code, planned.title, planned.form, finding.quantity, finding.tensor)
    return msgspec.structs.replace(finding, fingerprint=identity)


def _not_worse(finding: Finding, unit: Unit, accepted: Sequence[Accepted]) -> Finding:
    """Return a finding, no longer allowed if its error is larger than every entry that accepts it permits."""
    limits = [math.inf if each.error is None else each.error for each in accepted if _accepts(each, finding)]
    largest = max(limits, default=math.inf)
    if not finding.allowed or largest == math.inf or _is_within(finding, unit, largest):
        return finding
    size = f"of {format_number(finding.error)}" if finding.error is not None else "without a size"
    text = f"{finding.message.rstrip('.')}: an error {size}, and accepted is {format_number(largest)}."
    return msgspec.structs.replace(finding, allowed=False, message=text)


def _is_within(finding: Finding, unit: Unit, limit: float) -> bool:
    """Return whether the error of a finding is at most ``limit``, but for rounding."""
    rows = [row for row in unit.tensors if (row.quantity, row.tensor) == (finding.quantity, finding.tensor)]
    rounding = max((row.budget for row in rows if isinstance(row.budget, float)), default=0.0)
    return isinstance(finding.error, float) and finding.error <= limit * _NOT_WORSE + rounding


def _accepts(accepted: Accepted, finding: Finding) -> bool:
    return finding.severity != "note" and bool(Allows([accepted.finding]).matching(finding.allow))


def _applies(accepted: Accepted, entry: TargetEntry, form: str) -> bool:
    """Return whether an entry is for a target in a form; brackets of a title are not a pattern."""
    names = (entry.title, entry.target)
    is_named = accepted.target in names or any(fnmatch.fnmatchcase(name, accepted.target) for name in names)
    return is_named and accepted.form in (None, form)


def _as_expected(unit: Unit, expected: UnitVerdict) -> Unit:
    """Return a unit that passes if it has the expected verdict, and fails if it has another."""
    if unit.verdict == expected:
        findings = tuple(
            each if each.severity == "note" else msgspec.structs.replace(each, allowed=True) for each in unit.findings
        )
        return msgspec.structs.replace(unit, verdict="pass", expected=expected, findings=findings)
    finding = Finding(
        code="GC152",
        severity="error",
        message=f"{unit.form} is expected to have {_WORDS[expected]}, and has {_WORDS[unit.verdict]}.",
        hint=f"take {unit.form} out of 'expect' of this target, or find out what changed.",
        fingerprint=fingerprint("GC152", unit.target, unit.form, None, None),
    )
    return msgspec.structs.replace(unit, verdict="fail", expected=expected, findings=(finding, *unit.findings))
