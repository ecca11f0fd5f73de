"""The report as GitHub workflow annotations, and as the page that GitHub shows for a step.

GitHub shows ten annotations a step and drops the rest in silence: here the worst nine stand, and how many more there
are. https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

from gradctl.core.findings import Finding, Report, Unit
from gradctl.core.names import SEVERITIES
from gradctl.report import markdown
from gradctl.report.wording import counted, one_line, verdict_line

__all__ = ["render", "step_summary"]

_MOST_ANNOTATIONS = 10
_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def render(report: Report) -> str:
    """Return the annotations, worst first and ten at most, and the verdict as a plain last line of the log."""
    annotations = [
        (SEVERITIES.index(severity), line)
        for unit in report.units
        for severity, line in [
            *((finding.severity, _annotation(unit, finding)) for finding in unit.findings if not finding.allowed),
            *([("error", _undecided(unit))] if unit.verdict == "inconclusive" and unit.status != "complete" else []),
        ]
    ]
    annotations.sort(key=lambda annotation: annotation[0])
    lines = [line for _, line in annotations]
    if len(lines) > _MOST_ANNOTATIONS:
        kept = _MOST_ANNOTATIONS - 1
        command = _COMMANDS[SEVERITIES[annotations[kept][0]]]
        lines[kept:] = [f"::{command} title=gradctl::{counted(len(lines) - kept, 'more finding')}; see the log"]
    return "".join(f"{line}\n" for line in [*lines, one_line(verdict_line(report))])


def step_summary(report: Report, *, most_bytes: int = 900_000) -> str:
    """Return the Markdown report, cut after a line to ``most_bytes`` (GitHub refuses a summary above 1 MiB)."""
    text = markdown.render(report)
    if len(text.encode()) <= most_bytes:
        return text
    notice = "\n(cut here: the report is longer than GitHub shows)\n"
    kept = text.encode()[: most_bytes - len(notice)].rpartition(b"\n")[0]
    return kept.decode() + notice


def _annotation(unit: Unit, finding: Finding) -> str:
    place = finding.location
    properties = {
        "file": place.file if place else None,
        "line": str(place.line) if place and place.file and place.line else None,
        "title": " ".join(filter(None, [finding.code, finding.tensor])),
    }
    given = ",".join(f"{name}={_property(value)}" for name, value in properties.items() if value)
    allow = f"\nif it is meant: --allow {finding.allow}" if finding.allow else ""
    text = f"{unit.target}, {unit.form}: {finding.message}{allow}"
    return f"::{_COMMANDS[finding.severity]} {given}::{_message(text)}"


def _undecided(unit: Unit) -> str:
    text = f"{unit.target}, {unit.form}: {unit.reason or unit.status}"
    return f"::error title={_property(f'gradctl {unit.status}')}::{_message(text)}"


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
