"""``gradctl explain``: the list of rules, one page, and the nearest code."""

from __future__ import annotations

import re

from gradctl.rules.catalogue import codes, page, title
from tests.cli.command_line import gradctl


def test_without_a_code_every_rule_is_listed_with_its_title():
    finished = gradctl("explain")
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()
    assert [line[2:7] for line in lines if line.startswith("  ")] == list(codes())
    assert f"  GC401  {title('GC401')}" in lines


def test_the_list_is_in_groups():
    lines = gradctl("explain").stdout.splitlines()
    headings = {line[:3]: lines.index(line) for line in lines if line.startswith("GC")}
    assert list(headings) == ["GC1", "GC2", "GC3", "GC4", "GC5", "GC6", "GC7", "GC8", "GC9"]
    assert "GC4xx  gradients" in lines
    for line in lines:
        if line.startswith("  "):
            assert headings[line[2:5]] < lines.index(line)


def test_the_beginning_of_codes_lists_these():
    finished = gradctl("explain", "gc50")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == (f"GC5xx  optimisation passes\n  GC501  {title('GC501')}\n  GC502  {title('GC502')}\n")


def test_words_list_the_rules_whose_pages_have_them_all():
    finished = gradctl("explain", "dropout", "TRAINING")
    assert finished.returncode == 0
    listed = [line[2:7] for line in finished.stdout.splitlines() if line.startswith("  ")]
    assert "GC105" in listed
    assert listed == [code for code in codes() if re.search("dropout", page(code), re.I) and "training" in page(code)]


def test_words_of_one_page_print_it():
    assert [code for code in codes() if "sigsegv" in page(code).lower()] == ["GC801"]
    assert gradctl("explain", "SIGSEGV").stdout == page("GC801")


def test_a_piped_page_is_the_page_itself():
    finished = gradctl("explain", "GC401")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, page("GC401"), "")


def test_small_letters_will_do():
    assert gradctl("explain", "gc401").stdout == page("GC401")


def test_an_unknown_code_names_the_nearest():
    finished = gradctl("explain", "GC150X")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.endswith(
        "Error: no rule matches 'GC150X' (did you mean 'GC150'?). 'gradctl explain' lists all rules.\n"
    )
