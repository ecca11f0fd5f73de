"""The JUnit report, read by two readers that are not ours: junitparser and the XML parser of the standard library."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import junitparser
import pytest
from hypothesis import HealthCheck, given, settings

from gradctl.report.junit import render
from tests.report import examples
from tests.report.any_report import reports


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
    assert (parsed.tests, parsed.failures, parsed.errors, parsed.skipped) == (3, 1, 0, 0)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], derandomize=True, deadline=None)
@given(reports)
def test_any_report_is_well_formed_and_counts_as_many_cases_as_units(report):
    root = ET.fromstring(render(report))
    assert len(root.findall("testsuite/testcase")) == len(report.units) == int(root.attrib["tests"])
    for kind, verdict in (("failure", "fail"), ("error", "inconclusive"), ("skipped", "skipped")):
        assert len(root.findall(f".//{kind}")) == sum(unit.verdict == verdict for unit in report.units)


def test_characters_that_xml_cannot_hold_are_left_out():
    report = examples.report_of(examples.unit("pass", target="a\x00b\x1b[31m\ufffe<&>\U0001f600.py"))
    (case,) = cases(report)
    assert case.classname == "ab[31m<&>\U0001f600.py"
