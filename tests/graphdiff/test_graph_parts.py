"""The parts of two graphs to be drawn: each changed node, with its neighbours and their counterparts."""

from __future__ import annotations

from collections import Counter

from gradctl.graphdiff.graph_difference import compare_structure
from tests.graphdiff.test_graph_difference import model


def parts_of(before, after):
    return compare_structure(model(before), model(after)).structure.parts


def graph(*nodes):
    return f"g (float[2] x) => (float[2] y) {{ {' '.join(nodes)} }}"


def named(nodes):
    return [(node.operator, node.change) for node in nodes]


def test_equal_graphs_have_no_part_that_differs():
    text = graph("a = Relu(x)", "y = Neg(a)")
    assert parts_of(text, text.replace("a ", "b ").replace("(a)", "(b)")) == ()


def test_removed_nodes_are_drawn_between_their_neighbours_in_both_graphs():
    (part,) = parts_of(
        graph("a = Relu(x)", "b = Neg(a)", "c = Neg(b)", "y = Sigmoid(c)"), graph("a = Relu(x)", "y = Sigmoid(a)")
    )
    assert named(part.before) == [("Relu", None), ("Neg", "removed"), ("Neg", "removed"), ("Sigmoid", None)]
    assert named(part.after) == [("Relu", None), ("Sigmoid", None)]
    assert [node.counterpart for node in part.before] == [0, None, None, 1]
    assert [node.counterpart for node in part.after] == [0, 3]
    assert [node.sources for node in part.before] == [(None,), (0,), (1,), (2,)]
    assert (part.alike, part.omitted, part.inside) == (1, 0, None)


def test_a_changed_attribute_is_in_the_node():
    (part,) = parts_of(
        graph("a = Relu(x)", "y = LeakyRelu<alpha=0.1>(a)"), graph("a = Relu(x)", "y = LeakyRelu<alpha=0.3>(a)")
    )
    assert named(part.before) == [("Relu", None), ("LeakyRelu", "attributes")]
    assert [side[1].attributes for side in (part.before, part.after)] == [{"alpha": "0.1"}, {"alpha": "0.3"}]
    assert part.before[1].inputs == ("a",)


def test_parts_that_differ_in_the_same_way_are_drawn_once():
    before, after, last = [], [], "x"
    for layer in range(5):
        before += [f"a{layer} = Sin({last})", f"b{layer} = Neg(a{layer})", f"c{layer} = Neg(b{layer})"]
        before += [f"d{layer} = Cos(c{layer})", f"e{layer} = Tanh(d{layer})"]
        after += [f"a{layer} = Sin({last})", f"d{layer} = Cos(a{layer})", f"e{layer} = Tanh(d{layer})"]
        last = f"e{layer}"
    (part,) = parts_of(graph(*before, f"y = Relu({last})"), graph(*after, f"y = Relu({last})"))
    assert part.alike == 5
    assert Counter(node.operator for node in part.before) == {"Sin": 1, "Neg": 2, "Cos": 1}


def test_a_part_of_two_thousand_changed_nodes_is_cut_and_the_rest_counted():
    nodes = [f"a{n + 1} = Neg(a{n})" for n in range(2000)]
    chain = graph("a0 = Relu(x)", *nodes, "y = Sigmoid(a2000)")
    (part,) = parts_of(chain, graph("a0 = Relu(x)", "y = Sigmoid(a0)"))
    changed = sum(node.change is not None for node in part.before)
    assert part.omitted == 2000 - changed
    assert 10 < len(part.before) < 100


def test_a_part_inside_a_subgraph_says_where_it_is():
    text = """g (bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] u) { %s }, else_branch = e () => (float[2] w) { w = Neg(x) }>
    }"""
    (part,) = parts_of(text % "u = Sin(x)", text % "s = Sin(x) u = Abs(s)")
    assert part.inside is not None
    assert part.inside.startswith("then_branch of If")
    assert named(part.after) == [("Sin", None), ("Abs", "added")]
