"""The figures: where shapes stand, and what they say of a report that makes no sense."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradctl.core.findings import Element, ErrorMap, Timing
from gradctl.core.structure import DrawnNode, GraphPart
from gradctl.report.figures.drawing import HEATS, Decades, Dot, Line, Rectangle, Text, fitted
from gradctl.report.figures.error_strips import error_scale, error_strip
from gradctl.report.figures.graph_layout import edges_of, lay_out, pairs_of
from gradctl.report.figures.graph_picture import graph_picture
from gradctl.report.figures.heat_map import heat_map
from gradctl.report.figures.timing_bars import Bar, bar_chart, call_bars
from tests.report.examples import gradient, unit


def node(sources=(), counterpart=None, change=None):
    return DrawnNode(operator="Add", name="", value="v", sources=sources, counterpart=counterpart, change=change)


@st.composite
def parts(draw):
    """Draw two acyclic graphs; some nodes are matched, in order, so that the graph of both is acyclic too."""
    sizes = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    count = draw(st.integers(0, min(sizes)))
    pairs = [sorted(draw(st.permutations(range(size)))[:count]) for size in sizes]
    twins = dict(zip(*pairs, strict=True)), dict(zip(*reversed(pairs), strict=True))
    sides = [
        tuple(
            node(tuple(draw(st.sets(st.integers(0, place - 1), max_size=3))) if place else (), twin.get(place))
            for place in range(size)
        )
        for size, twin in zip(sizes, twins, strict=True)
    ]
    return GraphPart(before=sides[0], after=sides[1])


@given(parts())
@settings(max_examples=150, derandomize=True)
def test_nodes_stand_above_their_users_and_matched_nodes_side_by_side(part):
    layout = lay_out(part)
    for nodes, places in ((part.before, layout.before), (part.after, layout.after)):
        assert len(set(places)) == len(nodes)  # none on another
        assert all(places[one][0] < places[other][0] for one, other in edges_of(nodes))
        assert all(row < layout.rows and column < layout.columns for row, column in places)
    assert all(layout.before[one] == layout.after[other] for one, other in pairs_of(part).items())


def test_a_cycle_of_the_merged_graphs_is_laid_out():
    before = (node((), 1), node((0,), 0))
    after = (node((), 1), node((0,), 0))
    layout = lay_out(GraphPart(before=before, after=after))
    assert layout.before[0] == layout.after[1]
    assert layout.before[1] == layout.after[0]


def test_a_chain_and_its_shorter_twin_are_one_column():
    before = (node((), 0), node((0,), None, "removed"), node((1,), 1))
    after = (node((), 0), node((0,), 2))
    layout = lay_out(GraphPart(before=before, after=after))
    assert layout.before == [(0, 0), (1, 0), (2, 0)]
    assert layout.after == [(0, 0), (2, 0)]


def test_positions_that_no_node_has_are_ignored():
    part = GraphPart(before=(node((5, -1, None), 9),), after=(node((0, 2**62), -3),))
    drawing = graph_picture(part, "g")
    assert edges_of(part.before) == edges_of(part.after) == []
    assert drawing.height > 0


def test_an_error_within_its_tolerance_is_a_good_dot_inside_the_band():
    tensor = gradient("a", error=1e-9, budget=1e-7)
    scale = error_scale([tensor, gradient("b", error=0.5, budget=1e-7)])
    shapes = error_strip(tensor, scale).shapes
    (dot,) = (each for each in shapes if isinstance(each, Dot))
    (band,) = (each for each in shapes if isinstance(each, Rectangle))
    assert dot.role == "good"
    assert band.x <= dot.x < band.x + band.width


@pytest.mark.parametrize(("error", "kind"), [(0.5, Dot), ("inf", Line), ("nan", Line)])
def test_an_error_beyond_its_tolerance_is_bad_and_beyond_the_band(error, kind):
    tensor = gradient("a", error=error, budget=1e-7)
    shapes = error_strip(tensor, error_scale([tensor])).shapes
    (band,) = (each for each in shapes if isinstance(each, Rectangle))
    (mark,) = (each for each in shapes if isinstance(each, kind) and each.role == "bad")
    x = mark.x if isinstance(mark, Dot) else mark.points[-1][0]
    assert x > band.x + band.width


@given(st.lists(st.floats(allow_nan=True) | st.sampled_from(["nan", "inf", None]), max_size=6), st.floats(0, 1e300))
@settings(derandomize=True)
def test_every_value_has_a_place_on_its_axis(values, value):
    scale = Decades.around(values, 10.0, 110.0)
    assert 10 <= scale.place(value) <= 110
    assert 1 <= len(scale.ticks(4)) <= 4
    assert scale.high - scale.low >= 3


def test_powers_of_ten_are_evenly_spaced():
    scale = Decades.around([1e-8, 1.0], 0.0, 80.0)
    assert [scale.place(10.0**-n) for n in range(9)] == pytest.approx([80 - 10 * n for n in range(9)])


def test_the_largest_error_is_darkest_and_zero_lightest():
    errors = ErrorMap(rows=1, columns=4, block_rows=1, block_columns=1, values=(0.0, 1e-3, 2.0, "nan"))
    cells = [each for each in heat_map(gradient("a", shape=(4,), errors=errors)).shapes if isinstance(each, Rectangle)]
    roles = [each.fill for each in cells[:4]]
    assert (roles[0], roles[2], roles[3]) == (HEATS[0], HEATS[-1], HEATS[-1])
    assert HEATS.index(roles[0]) < HEATS.index(roles[1]) < HEATS.index(roles[2])


def test_elements_that_were_not_measured_are_hollow():
    worst = tuple(Element(index=(row, 1), reference=0.0, absolute_error=error) for row, error in ((0, 1.0), (2, 0.5)))
    drawing = heat_map(gradient("a", shape=(3, 2), worst=worst))
    cells = [each.fill for each in drawing.shapes if isinstance(each, Rectangle)][:6]
    assert [fill != "blank" for fill in cells] == [False, True, False, False, False, True]


@pytest.mark.parametrize(
    "tensor",
    [
        gradient("a"),
        gradient("a", errors=ErrorMap(rows=2, columns=2, block_rows=1, block_columns=1, values=(1.0,))),
        gradient("a", errors=ErrorMap(rows=-1, columns=2**60, block_rows=0, block_columns=0, values=())),
        gradient("a", shape=(2**60, 3), worst=(Element(index=(1,), reference=0.0),)),
        gradient("a", shape=(0, 3), worst=(Element(index=(0, 0), reference=0.0),)),
    ],
    ids=["no elements", "too few", "negative", "other rank", "empty"],
)
def test_a_map_that_makes_no_sense_is_not_drawn(tensor):
    assert heat_map(tensor) is None


def test_bars_are_as_long_as_their_times():
    drawing = bar_chart("times", [Bar("a", 1.0), Bar("b", 4.0, spread=(3.0, 5.0))])
    bars = [each.width for each in drawing.shapes if isinstance(each, Rectangle)]
    assert bars[1] == pytest.approx(4 * bars[0])


@pytest.mark.parametrize("seconds", [[], [0.0], [math.inf], [-1.0]])
def test_times_that_are_none_have_no_bars(seconds):
    assert bar_chart("times", [Bar("a", each) for each in seconds]) is None


def test_of_many_bars_the_longest_are_drawn_and_the_rest_counted():
    drawing = bar_chart("times", [Bar(str(n), 1.0 + n) for n in range(100)])
    assert len([each for each in drawing.shapes if isinstance(each, Rectangle)]) == 24
    assert drawing.shapes[-1].text == "and 76 more, which took less"


def test_a_text_that_does_not_fit_ends_in_an_ellipsis():
    assert fitted("abc", 100) == "abc"
    assert fitted("a" * 100, 61) == "a" * 9 + "…"


def test_calls_of_forms_stand_beside_those_of_eager_if_there_is_one_target():
    timing = Timing(capture=0.5, forward=1e-3, eager_forward=2e-3)
    units = [unit("pass", form=form, timing=timing) for form in ("trace", "export")]
    labels = [each.text for each in call_bars(units).shapes if isinstance(each, Text) and each.role == "ink"]
    assert labels == [
        *("trace, forward", "eager, forward, beside trace"),
        *("export, forward", "eager, forward, beside export"),
    ]
    assert call_bars([*units, unit("pass", target="other.py", timing=timing)]) is None
