"""The example of each rule page, run by the command it shows: it gives its page's code, and no other above a note."""

from __future__ import annotations

import re

import pytest

from gradctl.commands.bench import bench_one
from gradctl.commands.compare import compare_one
from gradctl.core.errors import GradctlError
from gradctl.core.target_options import MeasuringOptions
from gradctl.gradients.gradcheck import gradcheck
from gradctl.rules.catalogue import codes, page
from gradctl.subject.subject import OF_RANKS, Subject


def example(code):
    """Return the first Python block of a page if it defines a model, else None (a command line, or a file)."""
    block = re.search("```python\n(.*?)```", page(code), re.DOTALL)
    return block[1] if block and "def make_model" in block[1] else None


def findings_of(source):
    """Return what the command of an example finds, or the error that it ends in."""
    names = {"__name__": "example"}
    exec(compile(source, "example.py", "exec"), names)
    beside = {name: names[name] for name in OF_RANKS if name in names}
    subject = Subject(target="example.py", model=names["make_model"](), args=names["example_inputs"](), beside=beside)
    if form := re.search(r"# gradctl bench example.py --form (\w+)", source):
        return bench_one(subject, form[1], MeasuringOptions(0.1)).findings
    form = re.search(r"# gradctl compare example.py --form ([\w:]+)", source)
    return compare_one(subject, form[1], named=True, allows=()).findings if form else gradcheck(subject).findings


def codes_given(source):
    """Return the codes that ``gradcheck`` gives: no notes beside something worse, and no tensor that another spoils."""
    try:
        findings = [finding for finding in findings_of(source) if finding.cause not in ("GC407", "GC408")]
    except GradctlError as error:
        return {error.code}
    loud = [finding for finding in findings if finding.severity != "note"]
    return {finding.code for finding in loud or findings}


def is_of_cause(code):
    """Tell the pages of causes, whose code stands beside that of a finding."""
    return code.startswith("GC2") and code != "GC220"


@pytest.mark.parametrize("code", [code for code in codes() if example(code) and not code.startswith("GC2")])
def test_the_example_of_a_page_gives_its_code(code):
    assert codes_given(example(code)) == {code}


@pytest.mark.parametrize("code", [code for code in codes() if example(code) and is_of_cause(code)])
def test_the_example_of_a_cause_gives_it_as_the_cause_of_each_error(code):
    findings = findings_of(example(code))
    assert {finding.cause for finding in findings if finding.severity == "error"} == {code}


def test_the_example_of_the_note_gives_it_before_what_has_no_cause():
    first, *others = findings_of(example("GC220"))
    assert (first.code, first.severity) == ("GC220", "note")
    assert {finding.cause for finding in others} == {None}
