"""The report as one HTML file: complete, escaped, with the figures that a finding needs."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from gradctl.check_report import CheckReport
from gradctl.core.structure import GraphPart, Structure
from gradctl.report.html.page import render
from gradctl.report.html.rule_pages import rule_page
from gradctl.rules.catalogue import codes
from tests.report import examples
from tests.report.html.pages import Page, everything, hostile, ladder, located, optimized, two_graphs, with_evidence

_MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&{{ 7 * 7 }}"
_MOST_BYTES = 3_000_000


def test_a_page_is_well_formed_and_complete_in_itself():
    html = render(everything())
    page = Page(html)
    assert page.is_balanced
    assert [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "embed", "base")] == []
    assert [attributes for _, attributes in page.tags if {"src", "srcset", "style"} & attributes.keys()] == []
    assert len(page.of("script")) == len(page.of("style")) == 1
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp", html)


def test_text_of_a_report_is_never_markup():
    plain, page = Page(render(hostile(everything(), " x"))), Page(render(hostile(everything(), _MARKUP)))
    assert page.is_balanced
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    names = {name for _, attributes in page.tags for name in attributes}
    assert names == {name for _, attributes in plain.tags for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert "49" not in "".join(text for tag, text in page.text if tag == "code")  # it is no template either
    assert any(_MARKUP in text for _, text in page.text)


def test_a_tensor_that_is_named_like_a_script_is_shown_as_it_is_named():
    name = "param:<script>alert(document.domain)</script>"
    html = render(examples.report_of(examples.unit("pass", [examples.gradient(name, error=1e-9, budget=1e-7)])))
    assert "<script>alert" not in html
    assert name in [text for tag, text in Page(html).text if tag == "code"]


def test_each_link_inside_the_page_has_its_place_and_no_place_is_there_twice():
    page = Page(render(everything()))
    places = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(places) == len(set(places))
    links = [attributes["href"] for attributes in page.of("a")]
    assert {link[1:] for link in links if link.startswith("#")} - set(places) == set()
    assert all(link.startswith(("#", "https://")) for link in links)
    twins = [attributes["data-twin"] for attributes in page.of("g") if attributes.get("data-twin")]
    assert set(twins) - set(places) == set()


def test_the_matrix_has_a_cell_for_each_unit_that_says_what_is_wrong():
    report = examples.whole_run()
    page = Page(render(report))
    cells = [attributes for attributes in page.of("td") if "data-form" in attributes]
    targets, forms = ({getattr(unit, name) for unit in report.units} for name in ("target", "form"))
    assert len(cells) == len(targets) * len(forms)
    assert "gradients WRONG" in [attributes.get("title") for attributes in page.of("abbr")]
    assert len([each for each in page.of("a") if re.fullmatch(r"#u\d+", each["href"])]) == len(report.units)


def test_the_line_that_a_finding_names_is_marked_among_its_neighbours():
    page = Page(render(located()))
    assert [text for tag, text in page.text if tag == "mark"] == ["    return gradient  # wrong: * 2"]
    assert any("def backward(ctx, gradient):" in text for tag, text in page.text if tag == "pre")


@pytest.mark.parametrize(("stated", "role"), [(2.0, "good"), (1.0, "bad")])
def test_the_ladder_of_steps_shows_whether_finite_differences_exclude_a_derivative(stated, role):
    html = render(with_evidence(examples.wrong_weight(), ladder(stated)))
    chart = html[html.index("finite differences of ") :]
    assert "distance from autograd" in chart
    assert re.findall(r'class="s-(good|bad)"', chart[: chart.index("</svg>")])[0] == role


def test_a_form_that_is_wrong_and_eager_that_is_right_have_their_own_lines():
    html = render(with_evidence(examples.wrong_weight(), ladder(2.0, 0.5)))
    chart = html[html.index("finite differences of ") :]
    assert re.findall(r'class="s-(good|bad)"', chart[: chart.index("</svg>")])[:2] == ["good", "bad"]
    assert "distance from eager" in chart


@pytest.mark.parametrize("report", [two_graphs(), optimized()], ids=["compare", "optimize"])
def test_nodes_of_a_graph_are_reached_by_keyboard_and_have_names_and_attributes(report):
    nodes = [attributes for attributes in Page(render(report)).of("g") if attributes.get("class") == "node"]
    assert len(nodes) == 6
    assert all(each["tabindex"] == "0" and each["role"] == "img" for each in nodes)
    assert nodes[1]["aria-label"] == "before: Neg n1 (removed); axis = 1; inputs: v0; output: v1"


def test_a_pass_of_an_interrupted_run_is_not_called_one():
    report = examples.report_of(
        examples.unit("pass", target="a"), examples.unit("pass", target="b"), status="interrupted"
    )
    assert "PASS" not in render(report)
    assert "<title>gradctl gradcheck: interrupted</title>" in render(report)


@pytest.mark.parametrize("code", codes())
def test_every_rule_page_is_html_with_headings_below_that_of_the_rules(code):
    _, html = rule_page(code)
    page = Page(str(html))
    assert page.is_balanced
    assert {tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)} <= {"h3", "h4"}
    assert not [text for tag, text in page.text if tag not in ("code", "pre") and re.search(r"^#+ |```|\*\*", text)]


def test_a_rule_without_a_page_is_named_and_not_linked():
    finding = replace(examples.wrong_weight().units[0].findings[1], code="GC999", cause="GC998")
    report = examples.report_of(examples.unit("fail", [], [finding]))
    assert "GC999" in render(report)
    assert "#GC99" not in render(report)


def test_five_hundred_units_are_a_page_of_less_than_three_megabytes():
    html = render(examples.many(500, 40))
    assert len(html.encode()) < _MOST_BYTES
    assert len(set(re.findall(r'id="(u\d+)"', html))) == 500


def test_two_thousand_nodes_that_all_differ_are_a_page_of_less_than_three_megabytes():
    part = two_graphs().units[0].structure.parts[0]
    parts = tuple(GraphPart(before=part.before, after=part.after) for _ in range(2000 // 4))
    structure = Structure(nodes_before=2000, nodes_after=1000, matched=1000, parts=parts)
    report = examples.report_of(examples.unit("pass", form="onnx", structure=structure))
    assert len(render(report).encode()) < _MOST_BYTES


def test_a_notebook_shows_the_page_in_a_frame_that_keeps_its_styles_to_itself():
    report = everything()
    frame = Page(CheckReport.of(report)._repr_html_())
    ((tag, attributes),) = frame.tags
    assert (tag, frame.is_balanced) == ("iframe", True)
    assert attributes["srcdoc"] == render(report)
    assert attributes["title"] == "gradctl report"
