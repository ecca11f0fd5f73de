"""The examples of the pages of ``gradctl snapshot`` and ``verify``: their commands print the last comment."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from gradctl.cli.main import run
from gradctl.rules.catalogue import page

PAGES = [*(f"GC{number}" for number in range(133, 137)), *(f"GC{number}" for number in range(310, 318))]


@pytest.mark.parametrize("code", PAGES)
def test_the_commands_of_an_example_print_its_last_comment(code, tmp_path, monkeypatch, capsys):
    source = re.search("```python\n(.*?)```", page(code).split("## Instead")[0], re.DOTALL)[1]
    *commands, said = re.findall(r"^# (.*)$", source, re.MULTILINE)
    (tmp_path / "example.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "gradctl":
            run(arguments)
        else:
            subprocess.run([program, *arguments], check=True)
    printed = capsys.readouterr()
    assert said in " ".join(f"{printed.out} {printed.err}".split())
