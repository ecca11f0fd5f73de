"""The report as GitHub workflow annotations, and as the page that GitHub shows for a step.

GitHub shows ten annotations a step and silently drops the rest: the worst nine are written, and how many more there
are. https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

from itertools import accumulate

from gradctl.core.findings import Finding, Report, Unit
from gradctl.core.names import SEVERITIES
from gradctl.report.text import markdown
from gradctl.report.text.shared_causes import findings_by_cause
from gradctl.report.text.wording import counted, one_line, verdict_line

_MOST_ANNOTATIONS = 10
_CUT = "\n(cut: GitHub limits the size of this page; --report markdown=FILE has the rest, {} sections)\n"
_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def render(report: Report) -> str:
    """Return at most ten annotations, worst first, and the verdict as a plain last line of the log.

    Of equal severity, the first of each unit precede the second of any: one unit must not hide the others.
    """
    annotations = [
        (SEVERITIES.index(severity), rank, line)
        for unit in report.units
        for rank, (severity, line) in enumerate(_annotations(unit))
    ]
    annotations.sort(key=lambda annotation: annotation[:2])
    verdict = one_line(verdict_line(report))
    lines = [f"::error title=gradctl interrupted::{_message(verdict)}"] if report.status == "interrupted" else []
    room = _MOST_ANNOTATIONS - len(lines)
    shown = room if len(annotations) <= room else room - 1
    lines += [line for _, _, line in annotations[:shown]]
    if rest := annotations[shown:]:
        command = _COMMANDS[SEVERITIES[rest[0][0]]]
        lines.append(f"::{command} title=gradctl::{counted(len(rest), 'more finding')}; see the summary of the job")
    return "".join(f"{line}\n" for line in [*lines, verdict])


def step_summary(report: Report, *, most_bytes: int = 900_000) -> str:
    """Return the Markdown report, cut to ``most_bytes`` (GitHub refuses a summary above 1 MiB).

    It is cut before the unit that does not fit, and within a unit only if that is the first; omitted units are counted.
    """
    *body, foot = markdown.parts(report)
    text = "".join([*body, foot])
    if len(text.encode()) <= most_bytes:
        return text
    room = most_bytes - len((_CUT.format(len(body)) + foot).encode())
    sizes = [len(part.encode()) for part in body]
    whole = sum(size <= room for size in accumulate(sizes))
    kept = "".join(body[:whole])
    if whole < 2 and not body[whole].startswith("<details>"):
        rest = body[whole].encode()[: room - sum(sizes[:whole])]
        kept += (rest.rpartition(b"\n")[0] + b"\n").decode()
    return f"{kept}{_CUT.format(len(body) - whole)}{foot}"


def _annotation(unit: Unit, finding: Finding) -> str:
    place = finding.location
    properties = {
        "file": place.file if place else None,
        "line": str(place.line) if place and place.file and place.line else None,
        "title": " ".join(filter(None, [finding.code, finding.tensor])),
    }
    given = ",".join(f"{name}={_property(value)}" for name, value in properties.items() if value)
    allow = f"\nif this is intentional, add --allow {finding.allow}" if finding.allow else ""
    text = f"{unit.target}, {unit.form}: {finding.message}{allow}"
    return f"::{_COMMANDS[finding.severity]} {given}::{_message(text)}"


def _annotations(unit: Unit) -> list[tuple[str, str]]:
    """Return severity and line of each annotation of a unit, worst first."""
    found: list[tuple[str, str]] = [
        (finding.severity, _annotation(unit, finding)) for finding in findings_by_cause(unit) if not finding.allowed
    ]
    is_told = any(severity == "error" for severity, _ in found)
    is_open = unit.verdict == "inconclusive" and unit.status != "complete" and not is_told
    if not is_open:
        return found
    text = _message(f"{unit.target}, {unit.form}: {unit.reason or unit.status}")
    return [("error", f"::error title={_property(f'gradctl {unit.status}')}::{text}"), *found]


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
