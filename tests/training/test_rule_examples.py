"""The examples of the pages of causes, run as their last comment says: the finding has the cause of the page."""

from __future__ import annotations

import re

import pytest

from gradctl.commands.compare_steps import compare_steps
from gradctl.rules.catalogue import page
from gradctl.subject.subject import Subject


@pytest.mark.parametrize("code", ["GC435", "GC436", "GC437", "GC438", "GC439"])
def test_the_example_has_the_cause_of_its_page(code):
    source = re.search("```python\n(.*?)```", page(code), re.DOTALL)[1]
    steps, variant = re.search(r"# gradctl compare example.py --steps (\d) --variant (\S+)", source).groups()
    names = {"__name__": "example"}
    exec(compile(source, "example.py", "exec"), names)
    subject = Subject(target="example.py", model=names["model"], args=names["example_inputs"]())
    (unit,) = compare_steps(subject, int(steps), variants=[variant])
    (finding,) = unit.findings
    assert (finding.code, finding.cause, finding.allow) == ("GC430", code, f"{code}:{variant}")
    said = re.findall(r"#   This is because (.*?) …", source)
    assert finding.cause_message.startswith(said[0])
    shown = re.search(r"# error GC430 (.*?) …", source)[1]
    assert finding.message.startswith(shown)
