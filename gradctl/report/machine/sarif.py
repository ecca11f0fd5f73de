"""The report as SARIF 2.1.0, which GitHub code scanning, Azure and editors read.

The rules that are used are in the file, with their pages. https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any
from urllib.parse import quote

import msgspec

from gradctl.core.findings import Finding, Report, Unit
from gradctl.report.machine.gitlab import file_of_target
from gradctl.report.text.wording import verdict_line, worst_first
from gradctl.rules.catalogue import codes, page, title

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def render(report: Report) -> str:
    """Return a log of one run: a result for each finding, a notification for each unit without a verdict."""
    used = sorted({finding.code for unit in report.units for finding in unit.findings})
    notifications = [
        {"level": "error", "message": {"text": f"{unit.target}, {unit.form}: {unit.reason or unit.status}"}}
        for unit in report.units
        if unit.verdict == "inconclusive" and unit.status != "complete"
    ]
    is_complete = report.status == "complete"
    if not is_complete:
        notifications.append({"level": "error", "message": {"text": verdict_line(report)}})
    run = {
        "tool": {"driver": {"name": "gradctl", "version": report.tool.version, "rules": list(map(_rule, used))}},
        "invocations": [{"executionSuccessful": is_complete, "toolExecutionNotifications": notifications}],
        "results": [
            _result(unit, finding, used.index(finding.code))
            for unit in report.units
            for finding in worst_first(unit.findings)
        ],
        "properties": {"command": report.command, "verdict": report.verdict, "seed": report.seed},
    }
    log = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}
    return msgspec.json.format(msgspec.json.encode(log), indent=2).decode() + "\n"


def _rule(code: str) -> dict[str, Any]:
    if code not in codes():
        return {"id": code}
    text = page(code)
    return {"id": code, "shortDescription": {"text": title(code)}, "help": {"text": text, "markdown": text}}


def _result(unit: Unit, finding: Finding, number: int) -> dict[str, Any]:
    result = {
        "ruleId": finding.code,
        "ruleIndex": number,
        "level": finding.severity,
        "message": {"text": f"{unit.target}, {unit.form}: {finding.message}"},
        "locations": [_location(unit, finding)],
        "properties": {"target": unit.target, "form": unit.form, "tensor": finding.tensor, "cause": finding.cause},
    }
    if finding.fingerprint:
        result["partialFingerprints"] = {"gradctl/v1": finding.fingerprint}
    if finding.allowed:
        result["suppressions"] = [{"kind": "external", "justification": f"--allow {finding.allow or finding.code}"}]
    return result


def _location(unit: Unit, finding: Finding) -> dict[str, Any]:
    place = finding.location
    file = place.file if place is not None and place.file else file_of_target(unit)
    physical: dict[str, Any] = {"artifactLocation": {"uri": _uri(file)}}
    if place is not None and place.file and place.line and place.line > 0:
        physical["region"] = {"startLine": place.line}
    location: dict[str, Any] = {"physicalLocation": physical}
    if place is not None and place.module:
        location["logicalLocations"] = [{"fullyQualifiedName": place.module, "kind": "module"}]
    return location


def _uri(file: str) -> str:
    path = PurePath(file)
    return f"file://{quote(path.as_posix())}" if path.is_absolute() else quote(path.as_posix())
