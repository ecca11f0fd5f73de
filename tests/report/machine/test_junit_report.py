"""The JUnit report, read by two readers that are not ours: junitparser and the XML parser of the standard library."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import junitparser
import pytest
from hypothesis import HealthCheck, given, settings

from gradctl.report.machine.junit import render
from tests.report import examples
from tests.report.any_report import reports

# What junit-10.xsd of jenkinsci/xunit-plugin allows: required attributes, optional ones, and children.
RESULT = (set(), {"type", "message"}, set())
SCHEMA = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "hostname", "id", "package", "file", "log", "url"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "testcase": (
        {"name"},
        {"time", "classname", "group"},
        {"skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": RESULT,
    "error": RESULT,
    "skipped": RESULT,
    "system-out": (set(), set(), set()),
    "system-err": (set(), set(), set()),
}
TIME = re.compile(r"(([0-9]{0,3},)*[0-9]{3}|[0-9]{0,3})*(\.[0-9]*)?")


def faults(root):
    """Return where a document is not as the schema has it; times of a run are never negative, and are not looked at."""
    found = [] if root.tag == "testsuites" else [root.tag]
    for element in root.iter():
        required, optional, children = SCHEMA[element.tag]
        given = set(element.attrib)
        found += [f"{element.tag} lacks {name}" for name in required - given]
        found += [f"{element.tag} has {name}" for name in given - required - optional]
        found += [f"{element.tag} holds {child.tag}" for child in element if child.tag not in children]
        if element.tag in ("testsuites", "testsuite") and (element.text or "").strip():
            found.append(f"{element.tag} holds text")
    return found


def cases(report):
    parsed = junitparser.JUnitXml.fromstring(render(report).encode())
    return [case for suite in parsed for case in suite]


def outcome(report):
    (case,) = cases(report)
    return [(type(each).__name__, each.type, each.message) for each in case.result]


def test_a_unit_that_passes_has_no_result():
    (case,) = cases(examples.passing())
    assert case.is_passed
    assert (case.classname, case.name, case.time) == ("net.py:make_model", "eager", 0.25)


def test_a_failing_finding_is_a_failure():
    line = "FAIL: 1 of 3 gradients is wrong (gradctl explain GC401)"
    assert outcome(examples.wrong_weight()) == [("Failure", "GC401", line)]


def test_a_crash_is_an_error_with_its_reason_and_stack():
    line = "INCONCLUSIVE: crashed: the process died of signal 11 (SIGSEGV) (gradctl explain GC801)"
    assert outcome(examples.crashed()) == [("Error", "crashed", line)]
    (case,) = cases(examples.crashed())
    assert "Fatal Python error[31m: Segmentation fault" in case.result[0].text


@pytest.mark.parametrize("status", ["timeout", "error"])
def test_a_unit_without_an_answer_is_an_error(status):
    report = examples.report_of(examples.unit("inconclusive", status=status, reason="no answer"))
    assert outcome(report) == [("Error", status, f"INCONCLUSIVE: {status}: no answer")]


def test_an_unresolved_gradient_is_an_error_and_not_a_pass():
    report = examples.report_of(examples.unit("inconclusive", [examples.gradient("input:x", "unresolved")]))
    assert outcome(report) == [("Error", "inconclusive", "INCONCLUSIVE: 1 of 1 gradient could not be resolved")]


def test_a_skipped_unit_has_its_reason():
    unit = examples.unit("skipped", status="unsupported", form="script", reason="torch.jit.script refuses **kwargs")
    (case,) = cases(examples.report_of(unit))
    assert case.is_skipped
    assert case.result[0].message == "torch.jit.script refuses **kwargs"


def test_a_suite_is_a_target_and_its_numbers_add_up():
    report = examples.report_of(
        examples.unit("pass", target="a.py:net", seconds=1.0),
        examples.unit("fail", target="a.py:net", form="export", seconds=0.5),
        examples.unit("pass", target="b.py:net"),
    )
    parsed = junitparser.JUnitXml.fromstring(render(report).encode())
    assert [(suite.name, suite.tests, suite.failures, suite.time) for suite in parsed] == [
        ("a.py:net", 2, 1, 1.5),
        ("b.py:net", 1, 0, 0.0),
    ]
    assert (parsed.tests, parsed.failures, parsed.errors, parsed.time) == (3, 1, 0, 1.5)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], derandomize=True, deadline=None)
@given(reports)
def test_any_report_is_well_formed_and_counts_as_many_cases_as_units(report):
    root = ET.fromstring(render(report))
    interruption = int(report.status == "interrupted")
    assert len(root.findall("testsuite/testcase")) == len(report.units) + interruption == int(root.attrib["tests"])
    for kind, verdict in (("failure", "fail"), ("error", "inconclusive"), ("skipped", "skipped")):
        expected = sum(unit.verdict == verdict for unit in report.units) + (interruption if kind == "error" else 0)
        assert len(root.findall(f".//{kind}")) == expected
    assert faults(root) == []


def test_characters_that_xml_cannot_hold_are_left_out():
    report = examples.report_of(examples.unit("pass", target="a\x00b\x1b[31m\ufffe<&>\U0001f600.py"))
    (case,) = cases(report)
    assert case.classname == "ab[31m<&>\U0001f600.py"


def test_a_whole_run_is_as_the_schema_of_jenkins_has_it():
    root = ET.fromstring(render(examples.whole_run(status="interrupted")))
    assert faults(root) == []
    assert all(TIME.fullmatch(each.attrib["time"]) for each in root.iter() if "time" in each.attrib)


def test_the_check_of_the_schema_finds_what_is_none():
    root = ET.fromstring('<testsuites skipped="1"><testsuite name="a" tests="1"><failure/></testsuite></testsuites>')
    assert sorted(faults(root)) == [
        "testsuite holds failure", "testsuite lacks errors", "testsuite lacks failures", "testsuites has skipped",
    ]  # fmt: skip


def test_what_fails_as_expected_passes_and_says_so():
    (case,) = [case for case in cases(examples.whole_run()) if case.name == "export"]
    assert case.is_passed
    assert case.system_out.splitlines() == [
        "PASS: fails as expected: 1 of 1 gradient is wrong, 1 finding allowed",
        "note GC150 --allow GC408:Round accepts nothing.",
        "allowed GC402 x is off.",
    ]


def test_an_interrupted_run_has_an_error_and_counts_it():
    report = examples.report_of(examples.unit("pass"), command="check", status="interrupted")
    parsed = junitparser.JUnitXml.fromstring(render(report).encode())
    assert (parsed.tests, parsed.errors) == (2, 1)
    *_, case = cases(report)
    assert (case.classname, case.name, case.is_passed) == ("gradctl check", "interrupted", False)
    assert [type(each).__name__ for each in case.result] == ["Error"]
    assert case.result[0].message.startswith("INTERRUPTED, the rest was not checked; so far: ")


def test_an_interrupted_run_without_a_unit_is_no_pass():
    (case,) = cases(examples.report_of(status="interrupted"))
    assert not case.is_passed
