"""The README is run: what its console blocks show is what is printed, and its two lines are complete by themselves."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gradctl.cli.main import COMMANDS
from tests.cli.command_line import gradctl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSOLE = re.findall(r"```console\n\$ gradctl (.*?)\n(.*?)```", README, flags=re.DOTALL)


def masked(text: str) -> str:
    """Return text without the digits of numbers and sizes, whose last ones differ between machines."""
    return re.sub(r"[-+]?\d(\.\d+)?e[-+]\d+|\d+\.\d kB", "N", text)


@pytest.mark.parametrize(("command", "output"), CONSOLE, ids=[command for command, _ in CONSOLE])
def test_a_console_block_shows_what_is_printed(command, output):
    finished = gradctl(*shlex.split(command), cwd=ROOT)
    assert masked(re.sub(" +", " ", finished.stdout)) == masked(re.sub(" +", " ", output))


def line(marker: str) -> str:
    (block,) = re.findall(rf"<!-- {marker} -->\n```sh\n(.*?)\n```", README, flags=re.DOTALL)
    return block


@pytest.mark.parametrize("marker", ["run-it", "test-it"])
def test_the_two_lines_are_one_line_each_and_make_their_own_environment(marker):
    assert "\n" not in line(marker)
    assert line(marker).startswith("python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt ")


def of_the_plugin() -> str:
    """Return what ``pytest --help`` says of our options."""
    command = [sys.executable, "-m", "pytest", "-p", "gradctl.pytest_plugin", "--help"]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    helped = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=alone).stdout
    (ours,) = re.findall(r"^gradctl:\n(.*?)\n\n", helped, flags=re.DOTALL | re.MULTILINE)
    return ours


def test_every_option_and_sample_that_is_named_exists():
    named = set(re.findall(r"sample_models/\w+\.py", README))
    assert all((ROOT / name).is_file() for name in named)
    helped = "".join(gradctl(command, "--help", cwd=ROOT).stdout for command in COMMANDS)
    helped += of_the_plugin()
    assert {option for option in re.findall(r"--[a-z]+(?:-[a-z]+)?", README) if option not in helped} == set()


def test_the_pictures_are_there_and_part_of_the_sources():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 2
    assert all((ROOT / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    sources = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {Path(picture).parts[0] for picture in pictures} <= set(sources)
