"""The example of each rule page, run by the command it shows: it gives its page's code, and no other above a note."""

from __future__ import annotations

import re

import pytest

from gradctl.checks.compare import compare_one
from gradctl.checks.gradcheck import gradcheck
from gradctl.core.errors import GradctlError
from gradctl.rules.catalogue import codes, page
from gradctl.subject.subject import Subject


def example(code):
    """Return the first Python block of a page if it defines a model, else None (a command line, or a file)."""
    block = re.search("```python\n(.*?)```", page(code), re.DOTALL)
    return block[1] if block and "def make_model" in block[1] else None


def codes_given(source):
    """Return the codes that ``gradcheck`` gives: no notes beside something worse, and nothing that has a cause."""
    names = {"__name__": "example"}
    exec(compile(source, "example.py", "exec"), names)
    subject = Subject(target="example.py", model=names["make_model"](), args=names["example_inputs"]())
    form = re.search(r"# gradctl compare example.py --form (\w+)", source)
    try:
        unit = compare_one(subject, form[1], named=True, allows=()) if form else gradcheck(subject)
        findings = [finding for finding in unit.findings if finding.cause is None]
    except GradctlError as error:
        return {error.code}
    loud = [finding for finding in findings if finding.severity != "note"]
    return {finding.code for finding in loud or findings}


@pytest.mark.parametrize("code", [code for code in codes() if example(code)])
def test_the_example_of_a_page_gives_its_code(code):
    assert codes_given(example(code)) == {code}
