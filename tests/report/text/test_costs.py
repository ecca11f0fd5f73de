"""The table of costs: whether a form is right stands before its numbers, in console and Markdown."""

from __future__ import annotations

import pytest

from gradctl.core.allows import Allows
from gradctl.core.assembly import make_report
from gradctl.core.findings import Estimate, Finding, Measurement, TensorResult, Unit
from gradctl.report.formats import render
from gradctl.report.machine.json import load
from gradctl.report.text.costs import cost_table
from gradctl.report.text.markdown import render as markdown

RATIO = Estimate(median=0.612, lower=0.59, upper=0.641)
EMPTY = {"capture", "first_call", "forward", "fwd+bwd"}


def unit(form, verdict="pass", *, tensors=(), findings=(), **cost):
    status = cost.get("status", "complete")
    cost = Measurement(verdict=verdict, **cost)
    return Unit(
        target="net.py", form=form, verdict=verdict, status=status, measurements=(cost,), tensors=tensors,
        findings=findings,
    )  # fmt: skip


def cells(*units):
    """Return the rows by heading, without line breaks."""
    headings, rows = cost_table(units)
    names = [each.replace("\n", " ").strip() for each in headings]
    return [dict(zip(names, row, strict=True)) for row in rows]


FAST = {
    "capture": 1.5, "first_call": 0.002, "forward": Estimate(median=1e-3), "training": Estimate(median=3e-3),
    "training_ratio": RATIO, "rounds": 20, "loaded_bytes": 350_000_000, "peak_bytes": 412_000_000,
    "artifact_bytes": 35_900, "nodes": 42, "pays_after": 801,
}  # fmt: skip


def test_a_row_has_all_numbers_with_their_units():
    assert cells(unit("export", **FAST)) == [
        {
            "form": "export", "right?": "yes", "capture": "1.5 s", "first call": "2 ms", "forward": "1 ms",
            "fwd+bwd": "3 ms", "time / eager": "0.61x ± 0.03", "peak memory": "412 MB", "file": "35.9 kB",
            "nodes": "42", "pays after": "801",
        }
    ]  # fmt: skip


def test_a_fast_form_that_is_wrong_is_wrong_before_its_numbers():
    headings, (row,) = cost_table([unit("export", "fail", **FAST)])
    assert row[:2] == ["export", "WRONG"]
    assert headings[:2] == ["form", "right?"]


def test_a_form_that_is_right_where_eager_is_wrong_only_differs():
    tensor = TensorResult(quantity="gradient", tensor="param:w", verdict="reference-wrong", shape=(1,), dtype="float32")
    finding = Finding(code="GC402", severity="error", message="differs", verdict="reference-wrong")
    (row,) = cells(unit("export", "fail", tensors=(tensor,), findings=(finding,), **FAST))
    assert row["right?"] == "DIFFERS"


@pytest.mark.parametrize("status", ["crashed", "timeout", "unsupported", "error"])
def test_what_was_not_measured_has_its_status_and_no_number(status):
    (row,) = cells(unit("compile", "inconclusive", status=status))
    assert (row.pop("form"), row.pop("right?")) == ("compile", status)
    assert set(row.values()) == {"-"}


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (Estimate(median=1.5, lower=1.2, upper=1.9), "never"),
        (Estimate(median=1.0, lower=0.9, upper=1.1), "-"),
        (Estimate(median=1.5), "-"),
    ],
)
def test_a_form_never_pays_only_if_its_whole_interval_is_slower(ratio, said):
    (row,) = cells(unit("trace", training_ratio=ratio))
    assert row["pays after"] == said


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (Estimate(median=0.5), "0.50x"),
        (Estimate(median=12.34, lower=12.0, upper=13.5), "12.3x ± 1.2"),
        (Estimate(median=1234.5, lower=1.0, upper=1300.0), "1234x (1 to 1300)"),
    ],
)
def test_a_ratio_has_three_digits_and_its_larger_margin(ratio, said):
    assert cells(unit("aot", forward_ratio=ratio))[0]["time / eager"] == said


def test_each_batch_size_has_a_row_and_the_sizes_a_column():
    first, second = Measurement(verdict="pass", sizes="batch=1"), Measurement(verdict="fail", sizes="batch=8")
    of_both = Unit(target="net.py", form="export", verdict="fail", measurements=(first, second))
    assert [(row["inputs"], row["right?"]) for row in cells(of_both)] == [("batch=1", "yes"), ("batch=8", "WRONG")]


def report_of(*units):
    return make_report("bench", units, Allows([]), seed=0)


def test_the_console_has_the_table_what_the_numbers_are_and_the_verdict():
    *_, last = screen = render(report_of(unit("eager"), unit("export", "fail", **FAST)), "console").splitlines()
    assert any(line.split()[:3] == ["export", "WRONG", "1.5"] for line in screen)
    assert "median of 20 rounds in turn with eager" in " ".join(" ".join(screen).split())
    assert last.startswith("FAIL: 1 of 2 forms")


def test_markdown_has_the_table_before_the_units():
    text = markdown(report_of(unit("eager"), unit("export", **FAST)))
    assert "| export | yes | 1.5 s | 2 ms | 1 ms | 3 ms | 0.61x ± 0.03 |" in text
    assert text.index("| form | right? |") < text.index("### `net.py`, `eager`")


def test_json_keeps_seconds_and_bytes():
    report = report_of(unit("export", **FAST))
    assert load(render(report, "json").encode()) == report
