"""The one line that a person can quote."""

from __future__ import annotations

import msgspec
import pytest

from gradctl.core.findings import Finding, Oracle
from gradctl.core.names import NOT_JUDGED
from gradctl.report.text.wording import detection_limits, differing_tensors, not_judged, printable, verdict_line
from tests.report.examples import crashed, gradient, passing, report_of, spoiled, unit, wrong_weight


def found(code, severity="error", **more):
    return Finding(code=code, severity=severity, message="…", **more)


SAME, WRONG, MISSING = gradient("a"), gradient("b", "reference-wrong"), gradient("c", "missing")
OF_FORM = gradient("b", "wrong")
RIGHT = unit("fail", [SAME, WRONG], [found("GC402", verdict="reference-wrong")], form="export")

LINES = {
    "pass": (
        passing(),
        "PASS: 6 gradients match finite differences",
    ),
    "one gradient": (report_of(unit("pass", [SAME])), "PASS: 1 gradient matches finite differences"),
    "a kink is agreement": (
        report_of(unit("pass", [SAME, gradient("k", "non-differentiable")])),
        "PASS: 2 gradients match finite differences",
    ),
    "approximate": (
        report_of(unit("pass", [SAME, gradient("k", "approximate")])),
        "PASS: 1 gradient matches finite differences, 1 approximately",
    ),
    "allowed": (
        spoiled(allowed=True),
        "PASS: 1 gradient matches finite differences, 1 finding allowed",
    ),
    "accepted as it is": (
        report_of(
            unit(
                "pass",
                [SAME, WRONG, gradient("d", "unresolved")],
                [found("GC401", tensor="b", allowed=True), found("GC406", tensor="d", allowed=True)],
            )
        ),
        "PASS: 1 gradient matches finite differences, 1 wrong, 1 not judged, 2 findings allowed",
    ),
    "what fails is not what was accepted": (
        report_of(
            unit(
                "fail",
                [SAME, WRONG, MISSING],
                [found("GC401", tensor="b", allowed=True), found("GC403", tensor="c")],
            )
        ),
        "FAIL: 1 of 3 gradients is missing (gradctl explain GC403)",
    ),
    "a form": (report_of(unit("pass", [SAME], form="trace")), "PASS: 1 gradient agrees with eager"),
    "one of each class is not judged": (
        report_of(unit("pass", [SAME, *(gradient(each, each) for each in reversed(NOT_JUDGED))])),
        "PASS: 1 gradient matches finite differences; 1 frozen, 1 receives no gradient, 1 too small to judge, "
        "1 not checked: behind a gradient hook",
    ),
    "several of each class are not judged": (
        report_of(unit("pass", [SAME, *(gradient(str(i), each) for each in NOT_JUDGED for i in range(3))])),
        "PASS: 1 gradient matches finite differences; 3 frozen, 3 receive no gradient, 3 too small to judge, "
        "3 not checked: behind a gradient hook",
    ),
    "what is not judged is not counted": (
        report_of(unit("fail", [SAME, WRONG, gradient("f", "frozen")], [found("GC401")])),
        "FAIL: 1 of 2 gradients is wrong (gradctl explain GC401)",
    ),
    "what is not judged could be resolved": (
        report_of(unit("inconclusive", [SAME, gradient("u", "unresolved"), gradient("f", "too-small")])),
        "INCONCLUSIVE: 1 of 2 gradients could not be resolved",
    ),
    "nothing is judged": (
        report_of(unit("skipped", [gradient("f", "frozen"), gradient("b", "no-gradient")])),
        "NOTHING CHECKED: 1 frozen, 1 receives no gradient",
    ),
    "wrong": (wrong_weight(), "FAIL: 1 of 3 gradients is wrong (gradctl explain GC401)"),
    "behind a Function": (spoiled(), "FAIL: 2 of 3 gradients are wrong (gradctl explain GC408)"),
    "missing": (
        report_of(unit("fail", [SAME, MISSING], [found("GC403")])),
        "FAIL: 1 of 2 gradients is missing (gradctl explain GC403)",
    ),
    "wrong and missing": (
        report_of(unit("fail", [WRONG, MISSING], [found("GC401"), found("GC403")])),
        "FAIL: 2 of 2 gradients are wrong or missing (gradctl explain GC401)",
    ),
    "only a finding": (
        report_of(unit("fail", [SAME], [found("GC413"), found("GC404", "note")])),
        "FAIL: 1 finding (gradctl explain GC413)",
    ),
    "a warning that fails": (
        report_of(unit("fail", [gradient("a", "approximate")], [found("GC404", "note"), found("GC410", "warning")])),
        "FAIL: 1 finding (gradctl explain GC410)",
    ),
    "unresolved": (
        report_of(
            unit(
                "inconclusive",
                [SAME, gradient("b", "unresolved")],
                [found("GC404", "note"), found("GC406", "note", verdict="unresolved")],
            )
        ),
        "INCONCLUSIVE: 1 of 2 gradients could not be resolved (gradctl explain GC406)",
    ),
    "nondeterministic": (
        report_of(unit("inconclusive", [gradient("b", "nondeterministic")], [found("GC412")])),
        "INCONCLUSIVE: the model differs from itself when run twice from the same seed (gradctl explain GC412)",
    ),
    "crashed": (
        crashed(),
        "INCONCLUSIVE: crashed: the process died of signal 11 (SIGSEGV) (gradctl explain GC801)",
    ),
    "skipped": (
        report_of(unit("skipped", reason="no float leaf asks\nfor a gradient")),
        "NOTHING CHECKED: no float leaf asks for a gradient",
    ),
    "no units": (report_of(), "NOTHING CHECKED: no form of any target could be checked"),
    "one of two forms": (
        report_of(unit("pass", [SAME]), unit("fail", [OF_FORM], [found("GC402")], form="compile")),
        "FAIL: 1 of 2 forms computes a wrong gradient (gradctl explain GC402)",
    ),
    "eager is wrong and a form is right": (
        report_of(unit("fail", [SAME, WRONG], [found("GC408")]), RIGHT),
        "FAIL: 1 of 2 forms computes a wrong gradient; export is right and differs from eager (gradctl explain GC408)",
    ),
    "eager is wrong and two targets' forms are right": (
        report_of(unit("fail", [WRONG], [found("GC401")]), RIGHT, msgspec.structs.replace(RIGHT, target="b")),
        "FAIL: 1 of 3 units computes a wrong gradient; 2 units are right and differ from eager (gradctl explain GC401)",
    ),
    "eager is wrong on another input than the example": (
        report_of(unit("pass", [SAME]), RIGHT),
        "FAIL: 1 of 2 forms differs from eager, which is wrong (gradctl explain GC402)",
    ),
    "a form that is right, alone": (
        report_of(RIGHT),
        "FAIL: 1 of 2 gradients is right where eager is wrong (gradctl explain GC402)",
    ),
    "less accurate, one of two forms": (
        report_of(unit("pass", [SAME]), unit("pass", [SAME, gradient("b", "less-accurate")], form="compile")),
        "PASS: 1 of 2 forms agrees, 1 less accurate",
    ),
    "less accurate": (
        report_of(unit("pass", [SAME, gradient("b", "less-accurate")], [found("GC305", "warning")], form="compile")),
        "PASS: 1 gradient agrees with eager, 1 less accurate",
    ),
    "an output of one of two units": (
        report_of(unit("pass", target="a"), unit("fail", [], [found("GC301")], target="b")),
        "FAIL: 1 of 2 units fails (gradctl explain GC301)",
    ),
    "all forms": (
        report_of(unit("pass"), unit("pass", form="trace"), unit("skipped", form="script")),
        "PASS: 2 of 3 forms agree, 1 skipped",
    ),
    "a failure that is expected": (
        report_of(unit("pass", [SAME, WRONG], [found("GC402", tensor="b", allowed=True)], expected="fail")),
        "PASS: fails as expected: 1 of 2 gradients is wrong, 1 finding allowed",
    ),
    "only findings that are expected": (
        report_of(unit("pass", [SAME], [found("GC413", allowed=True)], expected="fail")),
        "PASS: fails as expected, 1 finding allowed",
    ),
    "a form that is expected to refuse": (
        report_of(unit("pass", expected="skipped", status="unsupported", reason="refuses **kwargs")),
        "PASS: is skipped as expected: unsupported: refuses **kwargs",
    ),
    "no verdict, as expected": (
        report_of(unit("pass", [SAME, gradient("d", "unresolved")], expected="inconclusive")),
        "PASS: is inconclusive as expected: 1 of 2 gradients could not be resolved",
    ),
    "a pass that is expected": (
        report_of(unit("pass", [SAME], expected="pass")),
        "PASS: 1 gradient matches finite differences",
    ),
    "an expectation that is not met": (
        report_of(unit("fail", [SAME], [found("GC152")], expected="fail")),
        "FAIL: 1 finding (gradctl explain GC152)",
    ),
    "one of three as expected": (
        report_of(unit("pass"), unit("pass", form="export", expected="fail"), unit("skipped", form="script")),
        "PASS: 1 of 3 forms agrees, 1 as expected, 1 skipped",
    ),
    "interrupted": (
        report_of(unit("pass", [SAME]), unit("pass", target="b"), status="interrupted"),
        "INTERRUPTED, the rest was not checked; so far: 2 of 2 units agree",
    ),
    "interrupted after one unit": (
        report_of(unit("pass", [SAME]), status="interrupted"),
        "INTERRUPTED, the rest was not checked; so far: 1 gradient matches finite differences",
    ),
    "interrupted after a failure": (
        report_of(unit("pass"), unit("fail", [OF_FORM], [found("GC402")], form="compile"), status="interrupted"),
        "INTERRUPTED, the rest was not checked; so far: FAIL: 1 of 2 forms computes a wrong gradient "
        "(gradctl explain GC402)",
    ),
    "interrupted before the first unit": (report_of(status="interrupted"), "INTERRUPTED: nothing was checked"),
    "interrupted after two of eight units": (
        report_of(unit("pass"), unit("pass", target="b"), status="interrupted", planned=8),
        "INTERRUPTED: 2 of 8 units done, both pass",
    ),
    "interrupted after one of three units": (
        report_of(unit("pass"), status="interrupted", planned=3),
        "INTERRUPTED: 1 of 3 units done, it passes",
    ),
    "interrupted after three failures": (
        report_of(
            *(unit("fail", [WRONG], [found("GC402")], form=form) for form in "abc"), status="interrupted", planned=4
        ),
        "INTERRUPTED: 3 of 4 units done, all fail (gradctl explain GC402)",
    ),
    "interrupted with several verdicts": (
        report_of(
            unit("pass"),
            unit("pass", form="trace"),
            unit("skipped", form="export"),
            unit("inconclusive", form="onnx"),
            unit("fail", [WRONG], [found("GC402")], form="compile"),
            status="interrupted",
            planned=40,
        ),
        "INTERRUPTED: 5 of 40 units done, 1 fails, 1 is inconclusive, 1 is skipped, 2 pass (gradctl explain GC402)",
    ),
    "interrupted before the first of eight units": (
        report_of(status="interrupted", planned=8),
        "INTERRUPTED: 0 of 8 units done",
    ),
    "one form without an answer": (
        report_of(unit("pass"), unit("inconclusive", form="trace", status="timeout")),
        "INCONCLUSIVE: 1 of 2 forms not decided",
    ),
}


@pytest.mark.parametrize(("report", "line"), LINES.values(), ids=LINES)
def test_the_verdict_line(report, line):
    assert verdict_line(report) == line


BOUND = Oracle(dtype="float64", missed_with_probability=6e-5)
AT_THIS_INPUT = "at this input, an error of 1 % in any one of these tensors would have been missed with probability "


@pytest.mark.parametrize(
    ("units", "sentences"),
    [
        ([unit("pass", [SAME], oracle=BOUND)], [f"{AT_THIS_INPUT}6e-05"]),
        (
            [unit("pass", [SAME], oracle=Oracle(dtype="float64", missed_with_probability=1.0, of_error=0.005))],
            [f"{AT_THIS_INPUT.replace('1 %', '0.5 %')}1"],
        ),
        ([unit("pass", [SAME], oracle=Oracle(dtype="float64"))], []),
        ([unit("fail", [WRONG], oracle=BOUND)], []),
        (
            [unit("pass", [SAME], oracle=BOUND), unit("pass", [SAME], form="trace")],
            [f"net.py:make_model, eager: {AT_THIS_INPUT}6e-05"],
        ),
    ],
    ids=["pass", "a bound that says nothing", "without a bound", "fail", "of two forms"],
)
def test_what_a_pass_could_have_missed(units, sentences):
    assert detection_limits(units) == sentences


def test_the_first_eight_names_of_each_class_are_listed():
    tensors = [SAME, gradient("b", "no-gradient"), *(gradient(f"f{i}", "frozen") for i in range(10))]
    assert not_judged(tensors) == [
        "10 frozen (f0, f1, f2, f3, f4, f5, f6, f7 and 2 more)",
        "1 receives no gradient (b)",
    ]


def test_what_differs_is_sorted_worst_first():
    tensors = [
        gradient("same"),
        gradient("approximate", "approximate", error=1e-5),
        gradient("small", "reference-wrong", error=0.1),
        gradient("unresolved", "unresolved", error=9.0),
        gradient("large", "reference-wrong", error=0.9),
        gradient("nan", "reference-wrong", error="nan"),
        gradient("missing", "missing"),
        *(gradient(each, each) for each in NOT_JUDGED),
    ]
    names = [tensor.tensor for tensor in differing_tensors(tensors)]
    assert names == ["missing", "nan", "large", "small", "unresolved", "approximate"]


def test_control_characters_are_written_out_and_line_breaks_kept():
    assert printable("a\x1b[31mb\rc\x00\nd\té") == "a\\x1b[31mb\\rc\\x00\nd\té"
