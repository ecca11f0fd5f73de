"""The report as JUnit XML: a test suite is a target, a test case one of its units.

A failing unit is a ``failure``, an inconclusive one an ``error`` (never a pass), a skipped one has its reason. A run
that was interrupted has one more suite, whose only case is an ``error``: readers show cases.
Elements and attributes are those of https://github.com/jenkinsci/xunit-plugin, ``junit-10.xsd``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from gradctl.core.findings import Finding, Report, Unit
from gradctl.report.text.wording import is_as_expected, summary_of, unit_line, verdict_line, why_skipped, worst_first

# What XML 1.0 cannot hold, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> str:
    """Return the report as one ``testsuites`` element."""
    name = f"gradctl {_legal(report.command)}"
    root = ET.Element("testsuites", {"name": name})
    by_target: dict[str, list[Unit]] = {}
    for unit in report.units:
        by_target.setdefault(unit.target, []).append(unit)
    for target, units in by_target.items():
        suite = ET.SubElement(root, "testsuite", {"name": _legal(target), **_counts(units)})
        for unit in units:
            _add_case(suite, unit)
    counts = _counts(report.units)
    if report.status == "interrupted":
        _add_interruption(root, name, report)
        counts |= {"tests": str(len(report.units) + 1), "errors": str(int(counts["errors"]) + 1)}
    root.attrib |= {key: value for key, value in counts.items() if key != "skipped"}
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _counts(units: Sequence[Unit]) -> dict[str, str]:
    verdicts = [unit.verdict for unit in units]
    return {
        "tests": str(len(units)),
        "failures": str(verdicts.count("fail")),
        "errors": str(verdicts.count("inconclusive")),
        "skipped": str(verdicts.count("skipped")),
        "time": f"{sum(unit.seconds for unit in units):.3f}",
    }


def _add_interruption(root: ET.Element, name: str, report: Report) -> None:
    counts = {"tests": "1", "failures": "0", "errors": "1", "skipped": "0", "time": "0.000"}
    suite = ET.SubElement(root, "testsuite", {"name": name, **counts})
    case = ET.SubElement(suite, "testcase", {"classname": name, "name": "interrupted", "time": "0.000"})
    ET.SubElement(case, "error", {"message": _legal(verdict_line(report)), "type": "interrupted"})


def _add_case(suite: ET.Element, unit: Unit) -> None:
    named = {"classname": _legal(unit.target), "name": _legal(unit.form), "time": f"{unit.seconds:.3f}"}
    case = ET.SubElement(suite, "testcase", named)
    findings = worst_first(unit.findings)
    line = _legal(unit_line(unit))
    if unit.verdict == "fail":
        serious = [finding for finding in findings if finding.severity != "note"]
        code = serious[0].code if serious else "fail"
        failure = ET.SubElement(case, "failure", {"message": line, "type": _legal(code)})
        failure.text = _legal("\n".join(map(_finding, serious or findings)))
    elif unit.verdict == "inconclusive":
        kind = "inconclusive" if unit.status == "complete" else unit.status
        error = ET.SubElement(case, "error", {"message": line, "type": kind})
        error.text = _legal("\n".join([*map(_finding, findings), *filter(None, [unit.reason, unit.details])]))
    elif unit.verdict == "skipped":
        ET.SubElement(case, "skipped", {"message": _legal(why_skipped(unit))})
    elif findings or is_as_expected(unit):
        ET.SubElement(case, "system-out").text = _legal("\n".join([line, *map(_finding, findings)]))


def _finding(finding: Finding) -> str:
    allow = f" [--allow {finding.allow}]" if finding.allow and not finding.allowed else ""
    return f"{summary_of(finding)}{allow}"


def _legal(text: str) -> str:
    return _ILLEGAL.sub("", text)
