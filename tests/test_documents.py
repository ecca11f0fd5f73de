"""ARCHITECTURE.md and CONTRIBUTING.md are about the code that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gradctl"
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# For example `forms/artifact.py` `place`.
HOPS = re.findall(r"`([\w/]+\.py)`\s+`([\w.]+)`", ARCHITECTURE)
WALKS = re.findall(r"^\*\*(\w+) .*\*\*\n((?:\d\. .*\n(?: .*\n)*)+)", ARCHITECTURE, re.MULTILINE)
LAYERS = re.findall(r"^\| (`.*) \| ", ARCHITECTURE, re.MULTILINE)


def names_in(file):
    """Return the functions and classes of a file, those of classes too, as ``Class.method``."""
    names = set()
    for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return names


@pytest.mark.parametrize(("file", "name"), HOPS)
def test_a_step_of_a_walk_names_a_function_that_is_there(file, name):
    assert name in names_in(file)


def test_each_walk_has_five_steps():
    numbers = {command: re.findall(r"^(\d)\.", steps, re.MULTILINE) for command, steps in WALKS}
    assert list(numbers) == ["gradcheck", "compare", "verify", "export", "optimize", "check"]
    assert all(each == ["1", "2", "3", "4", "5"] for each in numbers.values())


def test_the_folders_stand_in_the_order_in_which_they_import():
    from tests.test_layers import LAYERS as IN_CODE

    named = [name for row in LAYERS for name in re.findall(r"`(\w+)`", row)]
    assert named == [name for name in IN_CODE if not name.startswith("__")]


def test_each_line_of_a_diff_is_in_its_file():
    for block in re.findall(r"```diff\n(.*?)```", CONTRIBUTING, re.DOTALL):
        for part in re.split(r"^\+\+\+ ", block, flags=re.MULTILINE)[1:]:
            name, *lines = part.rstrip("\n").split("\n")
            source = (ROOT / name).read_text(encoding="utf-8")
            assert [line for line in lines if line.removeprefix("+").strip() not in source] == [], name


def test_the_hooks_for_contributors_run_what_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    ours = [hook["entry"].removesuffix(" --force-exclude") for hook in hooks]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert ours == ["ruff check", "ruff format", "mypy"]
    assert all(f"-m {command}" in ci for command in ours)


def test_the_files_that_ci_names_exist():
    named = re.findall(r" (tests/[\w/.]+)", (ROOT / ".ci/run").read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []
