"""From findings to a verdict to an exit code."""

from __future__ import annotations

import pytest

from gradctl.core.findings import Finding, TensorResult
from gradctl.core.names import NOT_JUDGED
from gradctl.core.verdicts import EXIT_CODES, run_verdict, summarise, unit_verdict


def found(severity, allowed=False):
    return Finding(code="GC401", severity=severity, message="…", allowed=allowed)


def tensor(verdict):
    return TensorResult(quantity="gradient", tensor="input:x", verdict=verdict, shape=(), dtype="float32")


@pytest.mark.parametrize(
    ("severity", "fail_on", "verdict"),
    [
        ("error", "error", "fail"),
        ("warning", "error", "pass"),
        ("note", "error", "pass"),
        ("error", "warning", "fail"),
        ("warning", "warning", "fail"),
        ("note", "warning", "pass"),
        ("note", "note", "fail"),
    ],
)
def test_a_finding_fails_from_the_severity_asked_for(severity, fail_on, verdict):
    assert unit_verdict("complete", [found(severity)], [], fail_on) == verdict


def test_an_allowed_finding_fails_nothing():
    assert unit_verdict("complete", [found("error", allowed=True)], [], "note") == "pass"


@pytest.mark.parametrize("verdict", ["unresolved", "nondeterministic"])
def test_a_tensor_without_a_verdict_is_no_pass(verdict):
    assert unit_verdict("complete", [], [tensor("same"), tensor(verdict)]) == "inconclusive"


@pytest.mark.parametrize("verdict", ["same", "non-differentiable", "approximate"])
def test_tensors_that_agree_pass(verdict):
    assert unit_verdict("complete", [], [tensor(verdict)]) == "pass"


@pytest.mark.parametrize("verdict", NOT_JUDGED)
def test_a_tensor_that_is_not_judged_is_no_pass_by_itself_and_stands_in_the_way_of_none(verdict):
    # The gradient and the derivative of a tensor that is too small to judge are both known to be nearly zero.
    assert unit_verdict("complete", [], [tensor(verdict)]) == ("pass" if verdict == "too-small" else "skipped")
    assert unit_verdict("complete", [], [tensor(verdict), tensor("same")]) == "pass"
    assert unit_verdict("complete", [], [tensor(verdict), tensor("unresolved")]) == "inconclusive"
    assert unit_verdict("complete", [found("error")], [tensor(verdict)]) == "fail"


@pytest.mark.parametrize(
    ("status", "verdict"),
    [("unsupported", "skipped"), ("error", "inconclusive"), ("timeout", "inconclusive"), ("crashed", "inconclusive")],
)
def test_a_unit_that_is_not_complete_is_no_pass(status, verdict):
    assert unit_verdict(status, [], []) == verdict


def test_a_failing_finding_outweighs_a_crash():
    assert unit_verdict("crashed", [found("error")], []) == "fail"


@pytest.mark.parametrize(
    ("verdicts", "of_the_run"),
    [
        ([], "skipped"),
        (["skipped"], "skipped"),
        (["skipped", "pass"], "pass"),
        (["pass", "inconclusive"], "inconclusive"),
        (["inconclusive", "fail", "pass"], "fail"),
    ],
)
def test_the_worst_verdict_is_that_of_the_run(verdicts, of_the_run):
    assert run_verdict(verdicts) == of_the_run


def test_units_are_counted_by_verdict():
    summary = summarise(["pass", "pass", "fail", "skipped"])
    assert (summary.passed, summary.fail, summary.inconclusive, summary.skipped) == (2, 1, 0, 1)


def test_the_exit_codes_are_those_of_the_contract():
    verdicts = ("pass", "fail", "inconclusive", "skipped")
    assert [EXIT_CODES[verdict] for verdict in verdicts] == [0, 1, 4, 5]
