"""The report as JUnit XML: a test suite is a target, a test case one of its units.

A failing unit is a ``failure``, one without a verdict an ``error`` (never a pass), a skipped one says why.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from gradctl.core.findings import Finding, Report, Unit
from gradctl.report.wording import unit_line, worst_first

__all__ = ["render"]

# What XML 1.0 cannot hold, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> str:
    """Return the report as one ``testsuites`` element."""
    root = ET.Element("testsuites", {"name": f"gradctl {_legal(report.command)}", **_counts(report.units)})
    for target in dict.fromkeys(unit.target for unit in report.units):
        units = tuple(unit for unit in report.units if unit.target == target)
        suite = ET.SubElement(root, "testsuite", {"name": _legal(target), **_counts(units)})
        for unit in units:
            _add_case(suite, unit)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _counts(units: tuple[Unit, ...]) -> dict[str, str]:
    verdicts = [unit.verdict for unit in units]
    return {
        "tests": str(len(units)),
        "failures": str(verdicts.count("fail")),
        "errors": str(verdicts.count("inconclusive")),
        "skipped": str(verdicts.count("skipped")),
        "time": f"{sum(unit.seconds for unit in units):.3f}",
    }


def _add_case(suite: ET.Element, unit: Unit) -> None:
    named = {"classname": _legal(unit.target), "name": _legal(unit.form), "time": f"{unit.seconds:.3f}"}
    case = ET.SubElement(suite, "testcase", named)
    findings = worst_first(unit.findings)
    line = _legal(unit_line(unit))
    if unit.verdict == "fail":
        told = [finding for finding in findings if finding.severity != "note"]
        failure = ET.SubElement(case, "failure", {"message": line, "type": _legal(told[0].code if told else "fail")})
        failure.text = _legal("\n".join(map(_finding, told or findings)))
    elif unit.verdict == "inconclusive":
        kind = "inconclusive" if unit.status == "complete" else unit.status
        error = ET.SubElement(case, "error", {"message": line, "type": kind})
        error.text = _legal("\n".join([*map(_finding, findings), *filter(None, [unit.reason, unit.details])]))
    elif unit.verdict == "skipped":
        ET.SubElement(case, "skipped", {"message": _legal(unit.reason or line)})
    elif findings:
        ET.SubElement(case, "system-out").text = _legal("\n".join([line, *map(_finding, findings)]))


def _finding(finding: Finding) -> str:
    word = "allowed" if finding.allowed else finding.severity
    place = f" ({finding.location})" if finding.location is not None and str(finding.location) else ""
    allow = f" [--allow {finding.allow}]" if finding.allow and not finding.allowed else ""
    return f"{word} {finding.code} {finding.message}{place}{allow}"


def _legal(text: str) -> str:
    return _ILLEGAL.sub("", text)
