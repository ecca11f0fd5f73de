"""Findings of one cause are one message: the cause, the tensors that it affects, and the option that accepts them."""

from __future__ import annotations

import pytest

from gradctl.core.findings import Finding
from gradctl.report.text.console import render
from gradctl.report.text.github import render as annotations
from gradctl.report.text.markdown import render as markdown
from tests.report.examples import gradient, report_of, unit

NAMES = [f"param:{index}.weight" for index in range(10)]


def found(name, code="GC402", cause="GC209", words="export has the model in evaluation mode.", **more):
    """Return a finding on one tensor."""
    return Finding(
        code=code,
        severity="error",
        message=f"the gradient of {name} differs …",
        tensor=name,
        quantity="gradient",
        cause=cause,
        cause_message=words,
        hint="call train() before.",
        allow=f"{code}:{name}",
        **more,
    )


def a_report(findings, verdict="wrong"):
    tensors = [gradient(each.tensor, verdict, error=1.0) for each in findings]
    return report_of(unit("fail", [gradient("same"), *tensors], findings, form="export"))


ONE_CAUSE = """\
error GC209 export has the model in evaluation mode.
  if this is intentional, add --allow GC402:param:0.weight (and 3 more)
  call train() before.
  this makes 4 of 5 gradients wrong:
"""


def test_the_screen_has_one_block_for_a_cause_and_the_verdict_cites_it():
    screen = render(a_report([*(found(name) for name in NAMES[:3]), found(NAMES[3], code="GC403")]))
    assert screen.startswith(ONE_CAUSE)
    assert [screen.count(name) for name in NAMES[:4]] == [2, 1, 1, 1]  # in the list, and once to be accepted
    assert screen.splitlines()[-1] == "FAIL: 4 of 5 gradients are wrong (gradctl explain GC209)"


def test_up_to_three_findings_are_accepted_by_name():
    screen = render(a_report([found(name) for name in NAMES[:2]]))
    assert "add --allow GC402:param:0.weight --allow GC402:param:1.weight\n" in screen


def test_of_a_form_that_is_right_the_screen_says_that_eager_is_wrong():
    screen = render(a_report([found(name, verdict="reference-wrong") for name in NAMES[:2]], "reference-wrong"))
    assert "for this reason 2 of 3 gradients differ from eager, which is wrong:" in screen
    assert "right (differs from eager)" in screen


def test_of_a_form_that_is_less_accurate_the_warning_has_a_list():
    words = "compile is less accurate than eager."
    findings = [
        Finding(
            code="GC305", severity="warning", message="…", tensor=name, cause="GC305", cause_message=words, allow="…"
        )
        for name in NAMES[:2]
    ]
    tensors = [gradient(name, "less-accurate", error=1e-4) for name in NAMES[:2]]
    screen = render(report_of(unit("pass", [gradient("same"), *tensors], findings, form="compile")))
    assert screen.startswith(f"warning GC305 {words}\n")
    assert "this applies to 2 of 3 gradients:" in screen
    assert screen.splitlines()[-1] == "PASS: 1 gradient agrees with eager, 2 less accurate"


@pytest.mark.parametrize(
    "findings",
    [
        [found(NAMES[0])],
        [found(NAMES[0]), found(NAMES[1], words="export drops a hook.")],
        [found(NAMES[0]), found(NAMES[1], cause="GC204")],
        [found(NAMES[0]), found(NAMES[1], words="")],
        [found(NAMES[0]), found(NAMES[1], allowed=True)],
    ],
    ids=["one finding", "other words", "another cause", "a cause without words", "one is allowed"],
)
def test_findings_that_share_no_cause_keep_their_own_messages(findings):
    screen = render(a_report(findings))
    assert all(each.message in screen for each in findings)


@pytest.mark.parametrize("rendered", [markdown, annotations])
def test_markdown_and_annotations_name_the_first_tensors_of_a_cause(rendered):
    text = rendered(a_report([found(name) for name in NAMES]))
    assert text.count("export has the model in evaluation mode") == 1
    assert "This affects param:0.weight, param:1.weight" in text.replace("\\", "")
    assert "param:7.weight and 2 more" in text.replace("\\", "")
