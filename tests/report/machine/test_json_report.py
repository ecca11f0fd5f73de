"""The JSON report is the contract: what is written is what is read, and the shipped schema says the same."""

from __future__ import annotations

import json
from importlib.resources import files

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings

from gradctl.core.errors import GradctlError
from gradctl.report.machine.json import load, render, schema
from tests.report import examples
from tests.report.any_report import reports

SHIPPED_TEXT = files("gradctl.report").joinpath("schema.json").read_text(encoding="utf-8")
SHIPPED = json.loads(SHIPPED_TEXT)
EXAMPLES = {
    "passing": examples.passing(),
    "wrong weight": examples.wrong_weight(),
    "spoiled": examples.spoiled(),
    "allowed": examples.spoiled(allowed=True),
    "crashed": examples.crashed(),
    "nothing": examples.report_of(),
}


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], derandomize=True, deadline=None)
@given(reports)
def test_any_report_that_is_written_is_read_back_the_same_and_fits_the_schema(report):
    text = render(report)
    assert load(text.encode()) == report
    jsonschema.validate(json.loads(text), SHIPPED)


def test_the_shipped_schema_is_the_one_of_the_types():
    assert schema() == SHIPPED_TEXT, "write gradctl.report.machine.json.schema() to gradctl/report/schema.json"


def test_the_schema_does_not_depend_on_how_msgspec_reads_docstrings():
    assert [name for name, definition in SHIPPED["$defs"].items() if "description" in definition] == []


def test_the_schema_is_one_itself():
    jsonschema.Draft202012Validator.check_schema(SHIPPED)


@pytest.mark.parametrize("report", EXAMPLES.values(), ids=EXAMPLES)
def test_the_same_report_gives_the_same_bytes_and_ends_in_a_newline(report):
    assert render(report) == render(load(render(report).encode()))
    assert render(report).endswith("}\n")


def test_the_keys_are_those_of_the_contract():
    written = json.loads(render(examples.wrong_weight()))
    assert list(written) == [
        "schema_version", "tool", "command", "status", "verdict", "seed", "environment", "units", "allows", "summary",
        "planned", "shard", "sources",
    ]  # fmt: skip
    assert written["summary"] == {"pass": 0, "fail": 1, "inconclusive": 0, "skipped": 0}
    (unit,) = written["units"]
    assert unit["tensors"][1]["worst"][1] == {
        "index": [0, 1],
        "component": None,
        "reference": 0.0,
        "candidate": None,
        "finite_difference": "nan",
        "absolute_error": "nan",
        "relative_error": None,
    }


def test_mappings_are_sorted_so_that_runs_can_be_compared():
    assert list(json.loads(render(examples.passing()))["environment"]) == ["onnx", "python", "threads", "torch"]


def _changed(**fields):
    return json.dumps({**json.loads(render(examples.passing())), **fields}).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "input data was truncated"),
        (b"PASS: 6 gradients agree", "JSON is malformed: invalid character (byte 0)"),
        (b"[]", "expected `object`, got `array`"),
        (b"{}", "object missing required field `tool`"),
        (_changed(schema_version=2), "expected `int` <= 1 - at `$.schema_version`"),
        (_changed(seed="0"), "expected `int`, got `str` - at `$.seed`"),
        (_changed(verdict="okay"), "invalid enum value 'okay' - at `$.verdict`"),
        (b'{"tool": "\xff"}', "expected `object`, got `str`"),
        (b'{"more": ' + b"[" * 100_000, "maximum recursion depth exceeded"),
    ],
    ids=[
        "empty",
        "console",
        "array",
        "no fields",
        "newer version",
        "text for a number",
        "no verdict",
        "not UTF-8",
        "deep",
    ],
)
def test_what_is_no_report_is_refused_with_the_place(content, says):
    with pytest.raises(GradctlError) as raised:
        load(content)
    assert str(raised.value).lower().startswith(f"GC132 this is not a report of gradctl: {says.lower()}".lower())
    assert str(raised.value).endswith(". Write it anew with --report json=FILE.")
    assert raised.value.exit_code == 2


def test_a_key_of_a_newer_version_is_passed_over():
    assert load(_changed(cost_in_forwards=69)) == examples.passing()
