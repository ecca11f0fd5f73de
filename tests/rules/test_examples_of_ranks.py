"""The examples of the pages about ranks: the command that each shows has the findings that it shows."""

from __future__ import annotations

import re
import sys

import pytest

from gradctl.commands.compare import compare_one
from gradctl.rules.catalogue import page
from gradctl.subject.subject import Subject

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")


@pytest.mark.parametrize("code", [f"GC62{number}" for number in (*range(6), 7)])
def test_the_command_of_an_example_has_the_findings_that_it_shows(code, tmp_path):
    source = re.search("```python\n(.*?)```", page(code), re.DOTALL)[1]
    form = re.search(r"--form (\S+)", page(code))[1]
    shown = re.findall(r"^(error|note) (GC\d+) (.+?)(?: …)?$", page(code), re.MULTILINE)
    (tmp_path / "net.py").write_text(source)
    names = {"__name__": "net"}
    exec(compile(source, str(tmp_path / "net.py"), "exec"), names)
    beside = {name: names[name] for name in ("parallelize", "shard_inputs") if name in names}
    subject = Subject("net.py:model", names["model"], names["example_inputs"](), beside=beside)
    unit = compare_one(subject, form, named=True, allows=())
    found = {(each.severity, each.code): each.message for each in unit.findings if each.code != "GC105"}
    assert {(severity, code) for severity, code, _ in shown} == found.keys()
    if code in ("GC622", "GC623", "GC624", "GC625", "GC627"):
        assert all(found[severity, code].startswith(said.partition(" (net.py")[0]) for severity, code, said in shown)
