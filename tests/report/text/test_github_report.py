"""GitHub annotations, read back by the rules of GitHub's own runner (actions/runner, ActionCommand.cs)."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings

from gradctl.core.findings import Finding, Location
from gradctl.report.text import markdown
from gradctl.report.text.github import render, step_summary
from tests.report import examples
from tests.report.any_report import reports


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
        "if this is intentional, add --allow GC401:param:fc1.weight"
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
    assert shown[-1][2] == "2 more findings; see the summary of the job"


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


def test_each_unit_is_annotated_before_any_twice():
    def failed(target, *severities):
        return examples.unit("fail", findings=findings(*severities), target=target)

    report = examples.report_of(failed("a.py", *["error"] * 20), failed("b.py", "error"), failed("c.py", "warning"))
    shown = annotations(report)
    assert [message.partition(":")[0] for _, _, message in shown[:3]] == ["a.py, eager", "b.py, eager", "a.py, eager"]
    assert (len(shown), shown[-1][2]) == (10, "13 more findings; see the summary of the job")


def test_a_crash_with_a_finding_is_annotated_once():
    assert [message for _, _, message in annotations(examples.crashed())] == [
        "net.py:make_model, eager: the process died of signal 11."
    ]


def test_an_interrupted_run_is_an_error_before_everything_else_and_no_eleventh_annotation():
    report = examples.report_of(
        examples.unit("fail", findings=findings(*["error"] * 20)),
        examples.unit("pass", form="aot"),
        status="interrupted",
    )
    (command, properties, message), *others = annotations(report)
    assert (command, properties) == ("error", {"title": "gradctl interrupted"})
    assert message.startswith("INTERRUPTED, the rest was not checked; so far: FAIL")
    assert (len(others), others[-1][2]) == (9, "12 more findings; see the summary of the job")
    assert render(report).splitlines()[-1].startswith("INTERRUPTED")


def test_a_step_summary_stays_below_its_limit_and_says_that_it_was_cut():
    report = examples.report_of(examples.unit("fail", findings=findings(*["error"] * 400)))
    summary = step_summary(report, most_bytes=2000)
    assert 1800 < len(summary.encode()) <= 2000
    assert summary.startswith("## gradctl gradcheck: fail\n")
    *_, finding, _, cut, foot = summary.splitlines()
    assert re.fullmatch(r"- \*\*error GC4\d\d\*\* finding \d+", finding)
    assert cut == "(cut: GitHub limits the size of this page; --report markdown=FILE has the rest, 1 sections)"
    assert foot == "<sub>gradctl 0.1.0, seed 0</sub>"


def test_a_step_summary_of_500_failing_units_is_cut_between_units():
    report = examples.many(500, 50, lambda index: True)
    summary = step_summary(report)
    assert 850_000 < len(summary.encode()) <= 900_000
    shown = summary.count("\n### ")
    assert summary.endswith(
        f"\n(cut: GitHub limits the size of this page; --report markdown=FILE has the rest, {500 - shown} sections)\n"
        "<sub>gradctl 0.1.0, seed 0</sub>\n"
    )
    assert summary.partition("\n(cut: ")[0].endswith(" see the module.\n\n")
    assert summary.count("| WRONG |") == 50 * shown


def test_what_is_folded_is_left_out_whole():
    notes = [Finding(code="GC404", severity="note", message="cut " * 100) for _ in range(30)]
    report = examples.report_of(*(examples.unit("pass", findings=notes, target=name) for name in ("a.py", "b.py")))
    summary = step_summary(report, most_bytes=5000)
    assert "details>" not in summary
    assert "has the rest, 1 sections" in summary


@pytest.mark.parametrize("most_bytes", range(700, 3000, 97))
def test_a_cut_breaks_no_character_and_no_limit(most_bytes):
    nasty = [Finding(code="GC401", severity="error", message="β→網" * length) for length in range(1, 40)]
    report = examples.report_of(
        examples.unit("fail", findings=nasty, target="ä.py"), examples.unit("pass", target="b.py")
    )
    assert len(step_summary(report, most_bytes=most_bytes).encode()) <= most_bytes


def test_a_short_step_summary_is_the_markdown_report():
    assert step_summary(examples.whole_run()) == markdown.render(examples.whole_run())


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], derandomize=True, deadline=None)
@given(reports)
def test_any_report_is_ten_commands_at_most_and_a_verdict_that_is_none(report):
    *commands, verdict, end = re.split("[\r\n]", render(report))
    assert end == ""
    assert len(commands) <= 10
    assert all(re.match(r"::(error|warning|notice) (\w+=[^,]*,?)*::", command) for command in commands)
    assert not verdict.startswith("::")
