"""Each line of the JSONL report can be read without the others."""

from __future__ import annotations

import json

from gradctl.report.machine import json as json_report
from gradctl.report.machine.jsonl import render
from tests.report import examples


def lines(report):
    return [json.loads(line) for line in render(report).splitlines()]


def test_the_lines_are_the_run_its_units_their_tensors_and_findings_and_the_summary():
    assert [line["type"] for line in lines(examples.wrong_weight())] == [
        "run", "unit", "tensor", "tensor", "tensor", "finding", "finding", "summary",
    ]  # fmt: skip


def test_a_finding_can_be_found_with_its_target_and_form():
    (found,) = [line for line in lines(examples.wrong_weight()) if line.get("code") == "GC401"]
    assert (found["target"], found["form"], found["tensor"]) == ("net.py:make_model", "eager", "param:fc1.weight")
    assert found["location"] == {"file": "net.py", "line": 12, "module": "fc1", "op": None}


def test_the_last_line_has_the_verdict():
    assert lines(examples.wrong_weight())[-1] == {
        "type": "summary",
        "status": "complete",
        "verdict": "fail",
        "summary": {"pass": 0, "fail": 1, "inconclusive": 0, "skipped": 0},
    }


def test_nothing_is_lost_between_the_lines():
    report = examples.spoiled()
    (unit,) = [line for line in lines(report) if line["type"] == "unit"]
    whole = json.loads(json_report.render(report))
    expected = {key: value for key, value in whole["units"][0].items() if key not in ("tensors", "findings")}
    assert unit == {"type": "unit", **expected}


def test_a_line_break_in_a_name_breaks_no_line():
    report = examples.report_of(examples.unit("pass", target="a\nb.py:make"))
    assert [line["type"] for line in lines(report)] == ["run", "unit", "summary"]


def test_the_last_line_of_a_run_that_was_interrupted_says_so():
    last = lines(examples.report_of(examples.unit("pass"), status="interrupted"))[-1]
    assert (last["status"], last["verdict"]) == ("interrupted", "pass")


def test_mappings_are_sorted_so_that_runs_can_be_compared():
    assert list(lines(examples.passing())[0]["environment"]) == ["onnx", "python", "threads", "torch"]
