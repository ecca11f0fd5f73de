"""The console examples of the pages on targets and inputs, typed as they stand: what is printed is what they say."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from gradctl.cli.main import run
from gradctl.rules.catalogue import page

CODES = [
    *("GC101", "GC102", "GC103", "GC104", "GC105", "GC106", "GC107", "GC108", "GC109"),
    *("GC113", "GC121", "GC122", "GC125", "GC128", "GC901", "GC903"),
]
ROOT = Path(__file__).parents[2]


def blocks(code, language):
    return re.findall(f"```{language}\n(.*?)```", page(code), re.DOTALL)


def typed(code):
    """Return each command of a page with the output it shows."""
    lines = "".join(blocks(code, "console"))
    return [part.partition("\n")[::2] for part in re.split(r"^\$ ", lines, flags=re.MULTILINE)[1:]]


def matches(shown, printed):
    """Tell whether ``printed`` is what a page shows: ``…`` stands for anything, and lines may be broken elsewhere."""
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in shown.split("…"))
    return re.fullmatch(pattern.replace(r"\ ", " *"), " ".join(printed.split())) is not None


@pytest.mark.parametrize("code", CODES)
def test_the_console_examples_of_a_page_print_what_they_show(code, write, tmp_path, monkeypatch, capfd):
    files = blocks(code, "python")
    if files:
        write("net.py", files[0])
    else:
        monkeypatch.chdir(ROOT)
    commands = typed(code)
    assert commands
    for command, shown in commands:
        program, *arguments = shlex.split(command)
        if program == "python":
            runpy.run_path(arguments[0], run_name="__main__")
            continue
        exit_code = run(arguments)
        output = capfd.readouterr()
        printed = output.out + output.err
        assert exit_code == (0 if "PASS" in shown else 2), printed
        assert matches(shown, printed), f"{command}\n{printed}"
        assert "PASS" in shown or code in printed
