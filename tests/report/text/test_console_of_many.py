"""The screen of a whole run: many targets and forms in a bounded number of lines of 80 columns."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from gradctl.core.findings import Finding
from gradctl.report.text.console import render
from tests.report import examples
from tests.report.any_report import reports

WHOLE_RUN = """\
target                           form    verdict   outputs  gradients
models/vision/net.py:make_model  eager   FAIL      -        WRONG
                                 script  skipped   -        -
models/ste.py:make_model         eager   pass      -        same
                                 export  expected  -        WRONG
                                 script  skipped   -        -
models/old.py:Net                trace   ?         crashed  -

models/vision/net.py:make_model, eager
FAIL: 1 of 3 gradients is wrong (gradctl explain GC401)
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

models/old.py:Net, trace
INCONCLUSIVE: crashed: the process died of signal 11 (SIGSEGV) (gradctl explain
GC801)
error GC801 the process died of signal 11.

script skipped in 2 targets: torch.jit.script refuses **kwargs
models/ste.py:make_model, export: note GC150 --allow GC408:Round accepts
nothing.
in units that pass: 1 allowed, 1 noted (--verbose prints all)
FAIL: 1 of 6 units computes a wrong gradient (gradctl explain GC401)
"""


def test_the_screen():
    assert render(examples.whole_run()) == WHOLE_RUN


def test_an_interrupted_run_differs_in_its_last_line():
    assert render(examples.whole_run(status="interrupted")).splitlines() == [
        *WHOLE_RUN.splitlines()[:-1],
        "INTERRUPTED, the rest was not checked; so far: FAIL: 1 of 6 units computes a wrong gradient "
        "(gradctl explain GC401)",
    ]


@pytest.mark.parametrize("fails", [lambda index: index % 9 == 4, lambda index: True], ids=["some fail", "all fail"])
def test_500_units_fit_on_a_few_screens_of_80_columns(fails):
    lines = render(examples.many(500, 50, fails), width=80).splitlines()
    assert len(lines) < 320
    assert max(map(len, lines[:-1])) <= 120  # a target that heads its unit is not broken, everything else is
    assert [line for line in lines[:-1] if len(line) > 80 and not line.startswith("packages/")] == []


def test_of_more_units_than_rows_the_matrix_has_those_that_fail_and_counts_the_others():
    lines = render(examples.many(500, 1, lambda index: index in (17, 444))).splitlines()
    (counted,) = [line for line in lines if "more units" in line]
    assert counted == "and 460 more units: 460 pass (--verbose prints all)"
    assert sum("FAIL  " in line for line in lines[: lines.index(counted)]) == 2


def test_on_a_terminal_a_long_path_is_folded_beside_its_forms_and_nothing_of_it_is_lost():
    report = examples.many(14, 1, lambda index: False)
    rows = render(report, width=80).splitlines()[1:]
    rows = rows[: next(k for k, row in enumerate(rows) if "group_1" in row)]
    width = rows[0].index("eager")
    lines = [line for row in rows if (line := row[:width].strip())]
    assert "".join(lines) == report.units[0].target
    assert len(lines) > 1
    assert all(line.endswith(("/", ".", ":")) for line in lines[:-1])
    assert [row[width:].split()[0] for row in rows if row[width:]] == [unit.form for unit in report.units[:7]]


def test_each_unit_is_headed_by_target_and_form():
    lines = render(examples.many(14, 1, lambda index: index in (1, 8))).splitlines()
    heads = [f"packages/vision/models/group_{n}/a_long_folder_name/network_{n}.py:make_model, trace" for n in (0, 1)]
    assert [line for line in lines if line in heads] == heads
    assert lines[lines.index(heads[0]) + 1] == "FAIL: 1 of 1 gradient is wrong (gradctl explain GC402)"


def test_units_beyond_the_worst_six_have_a_line_each():
    lines = render(examples.many(63, 1, lambda index: index % 7 == 3)).splitlines()
    assert sum(line.endswith(":make_model, export") for line in lines) == 6
    assert sum("wrong (gradctl explain GC402)" in line for line in lines[:-1]) == 9


def test_a_warning_of_a_unit_that_passes_is_told_and_its_notes_are_counted():
    warning = Finding(code="GC410", severity="warning", message="approximate.")
    notes = [Finding(code="GC404", severity="note", message=f"cut {index}.") for index in range(3)]
    screen = render(
        examples.report_of(
            examples.unit("pass", [examples.gradient("a")], [*notes, warning], target="a.py"),
            examples.unit("pass", [examples.gradient("a")], target="b.py"),
        )
    )
    assert screen.splitlines()[-3:] == [
        "a.py, eager: warning GC410 approximate.",
        "in units that pass: 3 noted (--verbose prints all)",
        "PASS: 2 of 2 units agree",
    ]


def test_hundreds_of_findings_of_one_unit_are_cut_and_counted():
    findings = [Finding(code="GC413", severity="error", message=f"jvp {index} is wrong.") for index in range(300)]
    one = render(examples.report_of(examples.unit("fail", findings=findings)))
    assert one.count("jvp") == 20
    assert "and 280 more findings (--verbose prints all)\n" in one
    several = examples.report_of(examples.unit("fail", findings=findings), examples.unit("pass", target="b.py"))
    assert render(several).count("jvp") == 4


STRANGE = ["", " ", "a\nb\tc", "[red]x[/red]", "网络" * 30, "\x1b[2J", "x" * 500, "|`*_<b>", "a/" * 60]


@pytest.mark.parametrize("name", STRANGE, ids=ascii)
def test_a_strange_name_neither_breaks_the_columns_nor_moves_the_cursor(name):
    report = examples.report_of(
        examples.unit("pass", target=name), examples.unit("fail", target="b.py", form=name), command="check"
    )
    screen = render(report, width=80)
    assert "\x1b" not in screen + render(report)
    rows = screen.partition("\n\n")[0].splitlines()
    assert max(map(len, rows)) <= 80
    assert sum("FAIL" in row for row in rows) == 1


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], derandomize=True, deadline=None)
@given(reports)
def test_any_report_is_rendered_the_same_twice(report):
    assert render(report) == render(report)
