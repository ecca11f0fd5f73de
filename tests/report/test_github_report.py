"""GitHub annotations, read back by the rules of GitHub's own runner (actions/runner, ActionCommand.cs)."""

from __future__ import annotations

import re

import pytest

from gradctl.core.findings import Finding, Location
from gradctl.report.github import render, step_summary
from tests.report import examples


def parsed(line):
    """Take one command apart as the runner does: properties split at commas, then the escapes undone."""
    command, properties, message = re.fullmatch(r"::(\w+) (.*?)::(.*)", line).groups()

    def plain(text):
        for escape, character in (("%2C", ","), ("%3A", ":"), ("%0A", "\n"), ("%0D", "\r"), ("%25", "%")):
            text = text.replace(escape, character)
        return text

    pairs = (pair.split("=", 1) for pair in properties.split(","))
    return command, {name: plain(value) for name, value in pairs}, plain(message)


def findings(*severities):
    return [
        Finding(code=f"GC4{index:02}", severity=severity, message=f"finding {index}")
        for index, severity in enumerate(severities)
    ]


def annotations(report):
    return [parsed(line) for line in render(report).splitlines() if line.startswith("::")]


def test_an_annotation_points_at_file_and_line():
    command, properties, message = annotations(examples.wrong_weight())[0]
    assert command == "error"
    assert properties == {"file": "net.py", "line": "12", "title": "GC401 param:fc1.weight"}
    assert message == (
        "net.py:make_model, eager: autograd's gradient of param:fc1.weight is off by 62 %.\n"
        "if it is meant: --allow GC401:param:fc1.weight"
    )


def test_a_note_is_a_notice_and_comes_after_errors():
    assert [command for command, _, _ in annotations(examples.wrong_weight())] == ["error", "notice"]


@pytest.mark.parametrize("nasty", ["100%", "a\r\nb", "::error::x", "C:\\a,b=c.py", "%0A"])
def test_what_has_a_meaning_to_the_runner_arrives_as_it_was(nasty):
    found = Finding(code="GC401", severity="error", message=nasty, location=Location(file=nasty, line=1), tensor=nasty)
    ((_, properties, message),) = annotations(examples.report_of(examples.unit("fail", findings=[found])))
    assert properties == {"file": nasty, "line": "1", "title": f"GC401 {nasty}"}
    assert message == f"net.py:make_model, eager: {nasty}"


def test_ten_findings_are_all_shown():
    report = examples.report_of(examples.unit("fail", findings=findings(*["error"] * 10)))
    assert len(annotations(report)) == 10
    assert "more" not in render(report)


def test_of_eleven_the_worst_nine_are_shown_and_the_rest_is_counted():
    report = examples.report_of(examples.unit("fail", findings=findings(*["note"] * 2, *["warning"] * 8, "error")))
    shown = annotations(report)
    assert [command for command, _, _ in shown] == ["error", *["warning"] * 8, "notice"]
    assert shown[-1][2] == "2 more findings; see the log"


def test_an_allowed_finding_is_not_annotated():
    assert annotations(examples.spoiled(allowed=True)) == []


def test_a_crash_is_an_error_even_without_a_finding():
    report = examples.report_of(examples.unit("inconclusive", status="timeout", reason="no answer in 60 s"))
    assert annotations(report) == [
        ("error", {"title": "gradctl timeout"}, "net.py:make_model, eager: no answer in 60 s")
    ]


def test_the_last_line_is_the_verdict_and_no_command():
    report = examples.report_of(examples.unit("skipped", reason="nothing\n::error::injected"))
    assert render(report) == "NOTHING CHECKED: nothing ::error::injected\n"


def test_a_step_summary_stays_below_its_limit_and_says_that_it_was_cut():
    report = examples.report_of(examples.unit("fail", findings=findings(*["error"] * 400)))
    summary = step_summary(report, most_bytes=2000)
    assert 1800 < len(summary.encode()) <= 2000
    assert summary.endswith("\n(cut here: the report is longer than GitHub shows)\n")
    assert summary.startswith("## gradctl gradcheck: fail\n")


def test_a_short_step_summary_is_the_markdown_report():
    assert "cut here" not in step_summary(examples.wrong_weight())
