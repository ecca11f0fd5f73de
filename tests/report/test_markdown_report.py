"""The Markdown report: verdict first, and nothing in a name or message is markup."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt

from gradctl.core.findings import Finding
from gradctl.report.markdown import render
from tests.report import examples


def html(report):
    return MarkdownIt("commonmark").enable("table").render(render(report))


def test_the_verdict_is_the_first_thing_read():
    lines = render(examples.wrong_weight()).splitlines()
    assert lines[0] == "## gradctl gradcheck: fail"
    assert lines[2] == "FAIL: 1 of 3 gradients is wrong (gradctl explain GC401)"


def test_the_table_has_the_tensor_that_differs_and_only_that():
    (body,) = re.findall("<tbody>(.*)</tbody>", html(examples.wrong_weight()), re.DOTALL)
    assert re.findall("<td[^>]*>(.*)</td>", body) == [
        "<code>param:fc1.weight</code>", "<code>float32[4, 3]</code>", "WRONG", "6.21e-01", "3.10e-07", "12",
    ]  # fmt: skip


def test_a_finding_has_the_line_to_paste():
    assert "if it is meant: `--allow GC408:LeakyReLU`" in render(examples.spoiled())


def test_an_allowed_finding_says_so_and_offers_no_line():
    page = render(examples.spoiled(allowed=True))
    assert "**allowed GC408**" in page
    assert "--allow" not in page


def test_markup_in_names_and_messages_is_text():
    nasty = "a|b `c` <img src=x> *d* [e](f) #1 @team &amp;"
    tensor = examples.gradient(f"param:{nasty}", "reference-wrong")
    found = Finding(code="GC401", severity="error", message=nasty)
    page = html(examples.report_of(examples.unit("fail", [tensor], [found], target=nasty)))
    assert "<img" not in page and "<a " not in page and "<em>" not in page
    assert page.count("<td") == 6
    assert "a|b `c` &lt;img src=x&gt; *d* [e](f) #1 @team &amp;amp;" in page
