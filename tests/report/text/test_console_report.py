"""The screen: what differs worst first, the verdict last, 80 columns, and data that is never markup."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from gradctl.core.findings import Element, Finding, Location
from gradctl.report.text.console import render
from gradctl.report.text.wording import printable, verdict_line
from tests.report import examples
from tests.report.any_report import reports

WRONG_WEIGHT = """\
WRONG  param:fc1.weight  float32[4, 3]  12 of 12 elements
relative error 6.21e-01 (tolerance 3.10e-07)
index    autograd  finite diff  abs error  rel error
[2, 0]  -4.18e-01    -1.07e+00   6.52e-01   6.09e-01
[0, 1]          0          nan        nan          -
  error GC401 autograd's gradient of param:fc1.weight is off by 62 %.
    at net.py:12, fc1
    if this is intentional, add --allow GC401:param:fc1.weight
    Check the backward of fc1.

note GC404 detach is held fixed. (net.py:20)
FAIL: 1 of 3 gradients is wrong (gradctl explain GC401)
"""

SPOILED = """\
error GC408 LeakyReLU.backward is not the derivative of its forward.
  at net.py:14, act
  if this is intentional, add --allow GC408:LeakyReLU
  this makes 2 of 3 gradients wrong:
  tensor                 type           verdict  relative error  tolerance
  param:layers.1.weight  float32[4, 3]  WRONG          1.50e+00   1.00e-07
  param:layers.0.weight  float32[4, 3]  WRONG          5.00e-01   1.00e-07
  worst elements of param:layers.1.weight:
  index   autograd  finite diff  abs error  rel error
  [0, 1]  1.00e+00     2.00e+00   1.00e+00          -

FAIL: 2 of 3 gradients are wrong (gradctl explain GC408)
"""

ALLOWED = """\
allowed GC408 LeakyReLU.backward is not the derivative of its forward.
  at net.py:14, act
PASS: 1 gradient matches finite differences, 1 finding allowed
"""

TWO_FORMS = """\
form     outputs  gradients  buffers
eager    -        same       -
compile  -        WRONG      -

compile  WRONG  param:conv.weight  float32[4, 3]
relative error 6.21e-01 (tolerance 3.10e-07)
index       eager    compile  finite diff  abs error  rel error
[2, 1]  -4.18e-01  -1.07e+00    -4.18e-01          -          -

FAIL: 1 of 2 forms computes a wrong gradient
"""


def two_forms():
    worst = (examples.Element(index=(2, 1), reference=-0.418, candidate=-1.07, finite_difference=-0.418),)
    tensor = examples.gradient("param:conv.weight", "wrong", error=0.621, budget=3.1e-7, worst=worst)
    eager = examples.unit("pass", [examples.gradient("param:conv.weight")])
    return examples.report_of(eager, examples.unit("fail", [tensor], form="compile"), command="compare")


@pytest.mark.parametrize(
    ("report", "screen"),
    [
        (examples.wrong_weight(), WRONG_WEIGHT),
        (examples.spoiled(), SPOILED),
        (examples.spoiled(allowed=True), ALLOWED),
        (two_forms(), TWO_FORMS),
    ],
    ids=["wrong weight", "spoiled by a Function", "allowed", "two forms"],
)
def test_the_screen(report, screen):
    assert render(report) == screen


def test_tensors_that_agree_are_only_counted():
    assert render(examples.passing()) == "PASS: 6 gradients match finite differences\n"


def test_what_a_pass_could_have_missed_is_said_if_it_is_asked_for():
    screen = render(examples.passing(), is_verbose=True)
    assert screen.endswith(
        "at this input, an error of 1 % in any one of these tensors would have been\n"
        "missed with probability 6e-05\n"
        "PASS: 6 gradients match finite differences\n"
    )


def test_verbose_prints_every_tensor_also_those_that_agree():
    tensors = [examples.gradient("param:a", error=2e-9, budget=1e-7), examples.gradient("param:b", "frozen")]
    screen = render(examples.report_of(examples.unit("pass", tensors)), is_verbose=True)
    assert screen == (
        "1 frozen (param:b)\n"
        "tensor   type           verdict  relative error  tolerance\n"
        "param:a  float32[4, 3]  same           2.00e-09   1.00e-07\n"
        "param:b  float32[4, 3]  frozen                -          -\n"
        "\n"
        "PASS: 1 gradient matches finite differences; 1 frozen\n"
    )


def test_verbose_cuts_nothing_and_prints_the_traceback():
    several = render(examples.spoiled(count=30), is_verbose=True)
    assert all(f"param:layers.{index}.weight" in several for index in range(30))
    assert "more tensors" not in several
    crashed = render(examples.crashed(), is_verbose=True)
    assert "Fatal Python error\\x1b[31m: Segmentation fault\n" in crashed


def test_quiet_prints_the_verdict_line_only():
    assert render(examples.wrong_weight(), is_quiet=True) == (
        "FAIL: 1 of 3 gradients is wrong (gradctl explain GC401)\n"
    )


def test_tensors_that_are_not_judged_are_named_before_the_verdict():
    tensors = [examples.gradient("input:x"), examples.gradient("param:a", "frozen")]
    assert render(examples.report_of(examples.unit("pass", tensors))) == (
        "1 frozen (param:a)\nPASS: 1 gradient matches finite differences; 1 frozen\n"
    )


@pytest.mark.parametrize("status", ["error", "timeout", "crashed", "complete"])
def test_inconclusive_is_never_printed_as_a_pass(status):
    tensors = [examples.gradient("input:x", "unresolved")] if status == "complete" else []
    screen = render(examples.report_of(examples.unit("inconclusive", tensors, status=status, reason="…")))
    assert "PASS" not in screen
    assert screen.splitlines()[-1].startswith("INCONCLUSIVE: ")


def test_in_the_block_of_the_worst_spoiled_tensor_the_elements_are_counted():
    report = examples.spoiled(count=1)
    (unit,) = report.units
    tensor = msgspec.structs.replace(unit.tensors[1], elements_wrong=7)
    screen = render(examples.report_of(msgspec.structs.replace(unit, tensors=(unit.tensors[0], tensor))))
    assert "  worst elements of param:layers.0.weight (7 of 12 elements are wrong):\n" in screen


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], derandomize=True, deadline=None)
@given(reports)
def test_of_any_report_the_last_line_is_the_verdict(report):
    assert render(report).splitlines()[-1].rstrip() == printable(verdict_line(report)).rstrip()


def test_square_brackets_in_a_name_are_not_markup():
    found = Finding(code="GC401", severity="error", message="[error] in [/x] and :smile:")
    screen = render(examples.report_of(examples.unit("fail", findings=[found])))
    assert "error GC401 [error] in [/x] and :smile:" in screen


def test_a_name_cannot_colour_or_clear_the_screen():
    found = Finding(code="GC401", severity="error", message="\x1b[2Jgone\x07")
    assert "\\x1b[2Jgone\\x07" in render(examples.report_of(examples.unit("fail", findings=[found])))


def test_an_output_that_is_nan_comes_before_the_gradients_that_are_nan_for_it():
    spoiled = examples.gradient("param:fc.weight", "reference-wrong")
    of_output = Finding(code="GC407", severity="error", quantity="output", tensor="output", message="output is NaN.")
    of_gradient = Finding(
        code="GC407",
        cause="GC407",
        severity="error",
        quantity="gradient",
        tensor="param:fc.weight",
        message="so is it.",
    )
    screen = render(examples.report_of(examples.unit("fail", [spoiled], [of_gradient, of_output])))
    first, second, _, fourth, *_ = screen.splitlines()
    assert (first, second) == ("error GC407 output is NaN.", "  this makes 1 of 1 gradient wrong:")
    assert fourth.startswith("  param:fc.weight  ")
    assert "so is it" not in screen


def failed(code, message, names, cause=None, location=None):
    """A unit in which each of the tensors has a finding with this message, and an error of its own."""
    findings = [
        Finding(
            code=code,
            cause=cause,
            severity="error",
            message=message.format(name=name, error=f"{index + 1}.00e-01"),
            tensor=name,
            allow=f"{code}:{name}",
            location=location,
        )
        for index, name in enumerate(names)
    ]
    tensors = [
        examples.gradient(name, "differs", error=(index + 1) / 10, worst=(Element(index=(index,), reference=1.0),))
        for index, name in enumerate(names)
    ]
    return examples.report_of(examples.unit("fail", tensors, findings))


NAMES = ["param:fc1.weight", "param:fc1.bias", "input:x"]
OTHER = "another gradient (relative difference {error}) for {name}."


@pytest.mark.parametrize(
    ("code", "cause", "location"),
    [
        ("GC417", None, None),
        ("GC402", "GC204", None),
        ("GC407", None, Location(file="net.py", line=8, op="Log")),
    ],
)
def test_findings_of_one_cause_are_one_block_with_a_list_of_tensors(code, cause, location):
    screen = render(failed(code, OTHER, NAMES, cause, location))
    assert screen.count(f"error {code}") == 1
    assert "--allow " + " --allow ".join(f"{code}:{name}" for name in NAMES) in screen
    listed = [line.split()[0] for line in screen.splitlines() if " DIFFERS " in line]
    assert listed == NAMES[::-1]  # the worst first
    assert screen.count("index") == 1  # the elements of the worst
    assert screen.splitlines()[-1].endswith(f"(gradctl explain {cause or code})")


def test_a_wrong_double_backward_stands_before_the_tensors_that_it_makes_wrong():
    headline = Finding(code="GC414", severity="error", message="the double backward of Act is wrong.")
    (unit,) = failed("GC401", "{name} is off by {error}.", NAMES, cause="GC414").units
    unit = msgspec.structs.replace(unit, findings=(*unit.findings, headline))
    lines = render(examples.report_of(unit)).splitlines()
    assert lines[0] == "error GC414 the double backward of Act is wrong."
    assert [line.split()[0] for line in lines if " DIFFERS " in line] == NAMES[::-1]
    assert not any("GC401" in line for line in lines)
    assert lines[-1].endswith("(gradctl explain GC414)")


def test_tensors_that_are_wrong_for_no_known_cause_have_a_block_each():
    screen = render(failed("GC401", OTHER, NAMES))
    assert (screen.count("error GC401"), screen.count("index")) == (3, 3)


def test_a_terminal_folds_long_names_and_cuts_no_number():
    name = "param:" + ".".join(f"encoder_layer_{index}" for index in range(8)) + ".weight"
    report = examples.spoiled()
    tensor = examples.gradient(name, "reference-wrong", error=0.621, budget=3.1e-7)
    spoiling = Finding(code="GC401", cause="GC408", severity="error", message="…", tensor=name)
    unit = examples.unit("fail", [tensor], [*report.units[0].findings, spoiling])
    screen = render(examples.report_of(unit), width=80)
    lines = screen.splitlines()[:-1]
    assert max(map(len, lines)) <= 80
    assert any(re.search(r"WRONG +6.21e-01 +3.10e-07$", line) for line in lines)
    start = next(index for index, line in enumerate(lines) if "param:encoder" in line)
    assert "".join(line.split()[0] for line in lines[start:-1]) == name


def test_a_piped_report_breaks_no_name():
    name = "param:" + ".".join(f"encoder_layer_{index}" for index in range(8)) + ".weight"
    tensors = [examples.gradient(f"{name}{index}", "reference-wrong", error=1.0) for index in range(7)]
    found = Finding(code="GC401", severity="error", message=f"the gradient of {name}0 is wrong.", tensor=f"{name}0")
    one = render(examples.report_of(examples.unit("fail", tensors, [found])))
    assert all(f"{name}{index}" in one for index in range(7))
    assert f"gradient of\n  {name}0\n  is wrong." in one
    target = "models/" + "folder_of_models/" * 6 + "net.py:make_model"
    several = render(examples.report_of(examples.unit("pass", target=target), examples.unit("pass", target="b.py")))
    assert any(line.startswith(f"{target}  eager") for line in several.splitlines())


def test_what_is_there_to_be_pasted_stays_on_one_line():
    long = "GC408:" + "VeryLongName" * 10
    path = "/home/user/" + "folder/" * 15 + "net.py"
    found = Finding(
        code="GC408", severity="error", message="word " * 40, allow=long, location=Location(file=path, line=3)
    )
    lines = render(examples.report_of(examples.unit("fail", findings=[found]))).splitlines()
    assert f"  if this is intentional, add --allow {long}" in lines
    assert f"  at {path}:3" in lines
    assert all(len(line) <= 80 for line in lines if "word" in line)


def test_a_wall_of_tensors_is_cut_and_counted():
    screen = render(examples.spoiled(count=30))
    assert screen.count("WRONG") == 20
    assert "  and 10 more tensors (--verbose prints all)\n" in screen


def test_after_five_tensors_the_rest_is_one_line_each():
    tensors = [examples.gradient(f"param:{index}", "reference-wrong", error=1.0 / (index + 1)) for index in range(7)]
    screen = render(examples.report_of(examples.unit("fail", tensors)))
    assert screen.count("\nrelative error ") == 5
    assert "\nparam:5  float32[4, 3]  WRONG          1.67e-01          -\n" in screen


def test_notes_come_after_errors_without_hints():
    note = Finding(code="GC404", severity="note", message="held fixed.", hint="long advice")
    error = Finding(code="GC413", severity="error", message="jvp is wrong.")
    screen = render(examples.report_of(examples.unit("fail", findings=[note, error])))
    assert screen.index("GC413") < screen.index("GC404")
    assert "long advice" not in screen


def test_colour_repeats_the_words_and_nothing_else():
    plain, coloured = render(examples.wrong_weight()), render(examples.wrong_weight(), colour=True)
    assert "\x1b[" not in plain
    assert "\x1b[" in coloured
    stripped = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert [line.rstrip() for line in stripped.splitlines()] == plain.splitlines()


def test_what_explains_most_stands_before_the_numbers():
    weight = examples.gradient("param:fc1.weight", "wrong", error=0.5, budget=1e-7)
    usual = Finding(code="GC220", severity="note", message="before the numbers: the model computes in bfloat16.")
    other = Finding(code="GC404", severity="note", message="detach is held fixed.")
    screen = render(examples.report_of(examples.unit("fail", [weight], [other, usual], form="trace")))
    lines = screen.splitlines()
    assert lines[0] == "note GC220 before the numbers: the model computes in bfloat16."
    assert lines.index("note GC404 detach is held fixed.") > lines.index(
        next(line for line in lines if "error" in line)
    )
    assert screen.count("GC220") == 1


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("it differs.", "error GC402 (GC204) it differs."),
        (
            "it differs. This is because … (GC204), net.py:3.",
            "error GC402 it differs. This is because … (GC204), net.py:3.",
        ),
    ],
)
def test_a_cause_is_told_once(message, shown):
    weight = examples.gradient("param:fc1.weight", "wrong", error=0.5, budget=1e-7)
    found = Finding(code="GC402", cause="GC204", severity="error", message=message, tensor="param:fc1.weight")
    screen = render(examples.report_of(examples.unit("fail", [weight], [found], form="export")))
    assert shown in [line.strip() for line in screen.splitlines()]
