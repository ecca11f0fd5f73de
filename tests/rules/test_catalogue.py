"""The rule pages: one form, one page for every code in use, and examples that are Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import gradctl.rules
from gradctl.rules.catalogue import codes, page, title

PACKAGE = Path(gradctl.rules.__file__).parents[1]
SECTIONS = ["What it means", "Why it matters", "Example", "Instead", "Known limits", "References"]


def codes_in_use():
    """Return every rule code that stands as a string of its own in the code of the package."""
    return {
        node.value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"GC\d{3}", node.value)
    }


def test_every_code_in_use_has_a_page():
    assert sorted(codes_in_use() - set(codes())) == []


def test_the_codes_are_sorted_and_are_the_files():
    assert list(codes()) == sorted(path.stem for path in (PACKAGE / "rules").glob("GC*.md"))


def test_the_title_is_the_first_line_without_the_code():
    assert title("GC401") == "autograd disagrees with finite differences"


def test_a_code_without_a_page_is_a_key_error():
    with pytest.raises(KeyError, match="GC999"):
        page("GC999")


@pytest.mark.parametrize("code", codes())
def test_a_page_has_its_title_and_sections_in_order(code):
    lines = page(code).splitlines()
    assert re.fullmatch(rf"# {code} \S.*[^.]", lines[0])
    prose = re.sub("```.*?```", "", page(code), flags=re.DOTALL)
    assert re.findall(r"^## (.*)$", prose, re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("code", codes())
def test_no_section_of_a_page_is_empty(code):
    sections = re.split(r"^## .*$", re.sub("^# .*$", "x", page(code), count=1, flags=re.MULTILINE), flags=re.MULTILINE)
    assert all(section.strip() for section in sections)


@pytest.mark.parametrize("code", codes())
def test_the_example_names_its_code(code):
    example = page(code).split("## Example\n")[1].split("## Instead\n")[0]
    assert code in example


@pytest.mark.parametrize("code", codes())
def test_an_example_in_python_is_python(code):
    example = page(code).split("## Example\n")[1].split("## Instead\n")[0]
    for block in re.findall("```python\n(.*?)```", example, re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("code", codes())
def test_a_page_names_no_code_that_has_none(code):
    assert sorted(set(re.findall(r"GC\d{3}", page(code))) - set(codes())) == []
