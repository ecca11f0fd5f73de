"""The report as a GitLab code quality report, which merge requests show beside the lines that findings name.

It is a list of issues; GitLab has no place for what passes. https://docs.gitlab.com/ci/testing/code_quality/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import msgspec

from gradctl.core.findings import Finding, Report, Unit, fingerprint
from gradctl.core.names import Severity
from gradctl.report.text.wording import one_line, verdict_line, worst_first

_SEVERITIES: dict[Severity, str] = {"error": "critical", "warning": "minor", "note": "info"}


def render(report: Report) -> str:
    """Return an issue for each finding that is not allowed, each unit without a verdict, and a run that was stopped."""
    issues = [issue for unit in report.units for issue in _issues(unit)]
    if report.status == "interrupted":
        issues.append(_issue("interrupted", "major", verdict_line(report), identity="interrupted", file="."))
    return msgspec.json.format(msgspec.json.encode(issues), indent=2).decode() + "\n"


def file_of_target(unit: Unit) -> str:
    """Return the file of a unit's target, for a finding that names no place: ``net.py`` of ``net.py:make_model``."""
    return unit.target.partition(":")[0] or unit.target


def _issues(unit: Unit) -> Iterator[dict[str, Any]]:
    for finding in worst_first(unit.findings):
        if not finding.allowed:
            yield _of_finding(unit, finding)
    if unit.verdict == "inconclusive" and unit.status != "complete":
        text = f"{unit.target}, {unit.form}: {unit.status}: {unit.reason or 'no reason is known'}"
        identity = fingerprint(unit.status, unit.target, unit.form, None, None)
        yield _issue(unit.status, "major", text, identity=identity, file=file_of_target(unit))


def _of_finding(unit: Unit, finding: Finding) -> dict[str, Any]:
    place = finding.location
    file, line = (place.file, place.line) if place is not None and place.file else (None, None)
    text = f"{unit.target}, {unit.form}: {finding.message}"
    identity = finding.fingerprint or fingerprint(
        finding.code, unit.target, unit.form, finding.quantity, finding.tensor or finding.message
    )
    file = file or file_of_target(unit)
    return _issue(finding.code, _SEVERITIES[finding.severity], text, identity=identity, file=file, line=line)


def _issue(name: str, severity: str, text: str, *, identity: str, file: str, line: int | None = None) -> dict[str, Any]:
    return {
        "description": one_line(text),
        "check_name": name,
        "fingerprint": identity,
        "severity": severity,
        "location": {"path": PurePath(file).as_posix(), "lines": {"begin": max(1, line or 1)}},
    }
