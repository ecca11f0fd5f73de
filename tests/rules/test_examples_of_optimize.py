"""The examples of the pages of ``gradctl optimize``, run: the finding is what the comment below each says."""

from __future__ import annotations

import re

import pytest

from gradctl.rules.catalogue import codes, page

PAGES = [code for code in codes() if code.startswith("GC5")]


def example(code):
    """Return the Python block of a page, and what its last comment says, on one line."""
    source = re.search("```python\n(.*?)```", page(code), re.DOTALL)[1]
    said = re.search(r"((?:^# .*\n)+)\Z", source, re.MULTILINE)[1]
    return source, " ".join(line.removeprefix("# ") for line in said.splitlines())


@pytest.mark.parametrize("code", PAGES)
def test_an_example_gives_the_finding_that_it_shows(code, tmp_path):
    source, said = example(code)
    names = {"__name__": "example"}
    exec(compile(source, "example.py", "exec"), names)
    outcome = names["optimized"](tmp_path)
    (finding,) = outcome.unit.findings
    assert f"{finding.severity} {finding.code} {finding.message}" == said
    assert (outcome.unit.verdict, outcome.written) == ("fail", False)
