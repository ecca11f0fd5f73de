"""The Markdown report: verdict first, and nothing in a name or message is markup."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt

from gradctl.core.findings import Finding
from gradctl.report.text.markdown import render
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
    assert "if this is intentional, add `--allow GC408:LeakyReLU`" in render(examples.spoiled())


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


def rows(page):
    """Return the cells of the first table of a page."""
    table = re.search("<table>(.*?)</table>", page, re.DOTALL)[1]
    return [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]


def test_of_a_whole_run_a_table_of_targets_and_forms_comes_first():
    page = html(examples.whole_run())
    assert rows(page) == [
        ["target", *(f"<code>{form}</code>" for form in ("eager", "script", "export", "trace"))],
        ["<code>models/vision/net.py:make_model</code>", "FAIL", "skipped", "-", "-"],
        ["<code>models/ste.py:make_model</code>", "pass", "skipped", "expected", "-"],
        ["<code>models/old.py:Net</code>", "-", "-", "-", "?"],
    ]
    assert page.index("<table>") < page.index("<h3>")
    assert "<li>script skipped in 2 targets: torch.jit.script refuses **kwargs</li>" in page


def test_of_a_whole_run_only_units_that_do_not_pass_have_a_section_the_worst_first():
    heads = re.findall("<h3>(.*)</h3>", html(examples.whole_run()))
    assert heads == [
        "<code>models/vision/net.py:make_model</code>, <code>eager</code>: fail",
        "<code>models/old.py:Net</code>, <code>trace</code>: inconclusive",
    ]


def test_what_was_found_in_units_that_pass_is_folded_at_the_end():
    before, _, folded = html(examples.whole_run()).partition(
        "<details>\n<summary>4 lines about units that pass</summary>"
    )
    ste = "<code>models/ste.py:make_model</code>"
    assert before.count("<h3>") == 2
    assert re.findall("<li>(.*)</li>", folded) == [
        f"{ste}, <code>eager</code>: <strong>note GC404</strong> detach is held fixed.",
        f"{ste}, <code>export</code>: PASS: fails as expected: 1 of 1 gradient is wrong, 1 finding allowed",
        f"{ste}, <code>export</code>: <strong>note GC150</strong> --allow GC408:Round accepts nothing.",
        f"{ste}, <code>export</code>: <strong>allowed GC402</strong> x is off.",
    ]


def test_the_title_of_an_interrupted_run_is_no_verdict():
    report = examples.report_of(examples.unit("pass"), examples.unit("pass", target="b.py"), status="interrupted")
    lines = render(report).splitlines()
    assert lines[0] == "## gradctl gradcheck: interrupted"
    assert lines[2] == "INTERRUPTED, the rest was not checked; so far: 2 of 2 units agree"


def test_markup_in_the_names_of_many_targets_is_text():
    nasty = "a|b `c` <img src=x>\n| d *e*"
    report = examples.report_of(examples.unit("pass", target=nasty, form=nasty), examples.unit("pass", target="b.py"))
    page = html(report)
    assert [len(row) for row in rows(page)] == [3, 3, 3]
    assert "<img" not in page and "<em>" not in page
