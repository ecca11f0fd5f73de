"""Two graphs: nothing is said where only names and order differ, and one change is named as what it is."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from gradctl.forms.onnx_file import OnnxFile, read
from gradctl.passes.structure import compare_structure
from tests.passes.random_graphs import RandomNode, drawn, file_of, renamed

SEEDS = range(60)


def structure(a, b):
    return compare_structure(a, b).structure


def compared(one, other, folder):
    return structure(read(file_of(one, folder / "a.onnx")), read(file_of(other, folder / "b.onnx")))


def model(text, constants=None):
    """Return a graph of floats from its text."""
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20, "own" : 1]> {text}')
    parsed.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (constants or {}).items())
    return OnnxFile(Path("model.onnx"), parsed)


def said(found):
    """Return each change as its kind and the operators before and after."""
    return [
        (change.kind, [node.operator for node in change.before], [node.operator for node in change.after])
        for change in found.changes
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_other_names_and_another_order_are_no_difference(seed, tmp_path):
    graph = drawn(seed)
    found = compared(graph, renamed(graph, seed), tmp_path)
    assert (found.changes, found.initializers, found.model) == ((), (), ())
    assert found.matched == found.nodes_before == len(graph.nodes)


def planted_attribute(graph, source):
    places = [place for place, node in enumerate(graph.nodes) if node.attributes]
    place = source.choice(places)
    node = graph.nodes[place]
    name, value = node.attributes[0]
    other = {"alpha": 0.7, "axis": 1 - value}[name]
    return graph.with_node(place, replace(node, attributes=((name, other),))), (node, name, value, other)


def planted_entry(graph, source):
    name = source.choice(list(graph.constants))
    value = graph.constants[name].copy()
    value[1, 2] += 0.5
    return replace(graph, constants=graph.constants | {name: value}), (name, graph.constants[name])


def planted_swap(graph, source):
    places = [place for place, node in enumerate(graph.nodes) if len(set(node.inputs)) == 2]
    place = source.choice(places)
    node = graph.nodes[place]
    return graph.with_node(place, replace(node, inputs=node.inputs[::-1])), node


def planted_removal(graph, source):
    """Let those who take a value take its maker's input instead; of equal nodes in a row any may be the one."""
    kinds = {node.output: (node.operator, node.attributes) for node in graph.nodes}
    in_a_row = {name for node in graph.nodes for name in node.inputs if kinds.get(name) == kinds[node.output]}
    in_a_row |= {node.output for node in graph.nodes if in_a_row.intersection(node.inputs)}
    places = [
        place
        for place, node in enumerate(graph.nodes)
        if node.output not in (*graph.outputs, *in_a_row) and len(node.inputs) == 1
    ]
    place = source.choice(places)
    node = graph.nodes[place]
    nodes = tuple(
        replace(each, inputs=tuple(node.inputs[0] if name == node.output else name for name in each.inputs))
        for each in graph.nodes
        if each is not node
    )
    return replace(graph, nodes=nodes), node


def planted_insertion(graph, source):
    """Put a node before one input of another."""
    place = source.randrange(len(graph.nodes))
    node = graph.nodes[place]
    slot = source.randrange(len(node.inputs))
    new = RandomNode("new", source.choice(("Relu", "Abs", "Tanh")), (node.inputs[slot],), "new_value")
    inputs = (*node.inputs[:slot], "new_value", *node.inputs[slot + 1 :])
    nodes = (*graph.nodes[:place], new, replace(node, inputs=inputs), *graph.nodes[place + 1 :])
    return replace(graph, nodes=nodes), new


def cases(plant):
    """Give graphs, each with one change, as it is and with other names; and what was changed."""
    for seed in SEEDS:
        graph = drawn(seed)
        try:
            other, what = plant(graph, random.Random(seed))
        except IndexError:  # nothing to choose from
            continue
        yield graph, other, what
        yield graph, renamed(other, seed), what


def test_a_changed_attribute_is_named_with_both_values(tmp_path):
    for graph, other, (node, name, old, new) in cases(planted_attribute):
        found = compared(graph, other, tmp_path)
        assert [(change.kind, change.before[0].name) for change in found.changes] == [("attributes", node.name)]
        (difference,) = found.changes[0].differences
        assert (difference.what, difference.before, difference.after) == (name, f"{old:.6g}", f"{new:.6g}")
        assert found.initializers == ()


def test_a_changed_entry_is_named_with_its_size(tmp_path):
    for graph, other, (name, old) in cases(planted_entry):
        found = compared(graph, other, tmp_path)
        assert found.changes == ()
        (change,) = found.initializers
        assert (change.kind, change.name, change.type_before) == ("changed", name, "float32[4, 4]")
        assert change.max_abs == pytest.approx(0.5, rel=1e-5)
        assert change.error == pytest.approx(0.5 / np.linalg.norm(old.astype(np.float64)), rel=1e-5)


def test_swapped_inputs_are_named(tmp_path):
    for graph, other, node in cases(planted_swap):
        found = compared(graph, other, tmp_path)
        assert [(change.kind, change.before[0].name) for change in found.changes] == [("rewired", node.name)]
        differences = [(each.what, each.before) for each in found.changes[0].differences]
        assert differences == [("input 0", node.inputs[0]), ("input 1", node.inputs[1])]
        assert found.initializers == ()


def test_a_removed_node_is_named(tmp_path):
    for graph, other, node in cases(planted_removal):
        found = compared(graph, other, tmp_path)
        assert [(change.kind, [each.name for each in change.before]) for change in found.changes] == [
            ("removed", [node.name])
        ]
        assert (found.changes[0].after, found.initializers) == ((), ())


def test_an_inserted_node_is_named(tmp_path):
    for graph, other, node in cases(planted_insertion):
        found = compared(graph, other, tmp_path)
        assert [(change.kind, [each.operator for each in change.after]) for change in found.changes] == [
            ("added", [node.operator])
        ]
        assert (found.changes[0].before, found.initializers) == ((), ())
