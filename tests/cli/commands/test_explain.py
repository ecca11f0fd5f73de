"""``gradctl explain``: the list of rules, one page, and the nearest code."""

from __future__ import annotations

from gradctl.rules.catalogue import codes, page
from tests.cli.command_line import gradctl


def test_without_a_code_every_rule_is_listed_with_its_title():
    finished = gradctl("explain")
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()
    assert [line[:5] for line in lines] == list(codes())
    assert "GC401  autograd disagrees with finite differences" in lines


def test_a_piped_page_is_the_page_itself():
    finished = gradctl("explain", "GC401")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, page("GC401"), "")


def test_small_letters_will_do():
    assert gradctl("explain", "gc401").stdout == page("GC401")


def test_an_unknown_code_names_the_nearest():
    finished = gradctl("explain", "GC150X")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.endswith("Error: no rule 'GC150X' (did you mean 'GC150'?); 'gradctl explain' lists them.\n")
