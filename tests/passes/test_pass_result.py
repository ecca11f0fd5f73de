"""Whether a pass changed a graph, whatever it says, and what is other in it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from gradctl.graphdiff.graph_view import operators
from gradctl.passes.onnx_ir import PASSES
from gradctl.passes.pass_result import compare_models, difference
from tests.passes.planted import SQUARE, graph, normal

TEXT = "m = MatMul(i, w)\ny = Relu(m)"
BRANCH = """
s = ReduceSum<keepdims = 0>(i)
c = Greater(s, zero)
y = If (c) <
    then_branch = t () => (float[4, 4] a) { n = Neg(i) a = Exp(n) },
    else_branch = e () => (float[4, 4] b) { b = Neg(i) }
>"""


def changed(model, change):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    change(copy)
    return copy


def set_attribute(model):
    model.graph.node[-1].attribute.append(onnx.helper.make_attribute("axis", 0))


def set_weight(model):
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(2 * SQUARE["w"], "w"))


CHANGES = {
    "another operator": lambda model: setattr(model.graph.node[-1], "op_type", "Exp"),
    "another attribute": set_attribute,
    "another weight": set_weight,
    "another input of a node": lambda model: model.graph.node[-1].input.__setitem__(0, "i"),
    "another opset": lambda model: setattr(model.opset_import[0], "version", 21),
    "another size of an input": lambda model: model.graph.input[0].type.tensor_type.shape.dim[0].ClearField("value"),
    "one initializer more": lambda model: model.graph.initializer.append(onnx.numpy_helper.from_array(normal(2), "b")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_is_computed_is_one(name):
    model = graph(TEXT, SQUARE)
    assert compare_models(model, changed(model, CHANGES[name])).modified


NOTES = {
    "nothing": lambda model: None,
    "the name of a node": lambda model: setattr(model.graph.node[-1], "name", "last"),
    "the type of an inner value": lambda model: model.graph.value_info.append(
        onnx.helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, [4, 4])
    ),
    "the producer": lambda model: setattr(model, "producer_name", "someone"),
    "weights as a list of numbers": lambda model: model.graph.initializer[0].CopyFrom(
        onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4, 4], SQUARE["w"].flatten())
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_change_of_what_is_noted_is_none(name):
    model = graph(TEXT, SQUARE)
    made = compare_models(model, changed(model, NOTES[name]))
    assert (made.modified, made.changed) == (False, "")


def then(model):
    return next(each.g for each in model.graph.node[-1].attribute if each.name == "then_branch")


@pytest.mark.parametrize(
    ("change", "modified"),
    [
        (lambda branch: setattr(branch.node[0], "op_type", "Abs"), True),
        (lambda branch: setattr(branch.node[0], "name", "first"), False),
        (lambda branch: branch.value_info.append(onnx.ValueInfoProto(name="n")), False),
        (lambda branch: branch.initializer.append(onnx.numpy_helper.from_array(normal(2), "b")), True),
    ],
    ids=["an operator", "a name", "a type", "an initializer"],
)
def test_branches_are_compared_by_what_they_compute(change, modified):
    model = graph(BRANCH, {"zero": np.float32(0)})
    assert compare_models(model, changed(model, lambda copy: change(then(copy)))).modified == modified


@pytest.mark.parametrize("name", ["unused", "constants", "duplicates", "subexpressions"])
def test_a_pass_that_finds_nothing_in_a_branch_changed_nothing(name):
    model = graph(BRANCH, {"zero": np.float32(0)})
    assert not compare_models(model, PASSES[name][1](model)).modified


def test_operators_are_counted_with_their_domain_in_branches_and_functions_too():
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20, "mine" : 1]>
        g (float[4] x, bool c) => (float[4] y) {
            h = mine.f(x)
            y = If (c) <
                then_branch = t () => (float[4] a) { a = Neg(h) }, else_branch = e () => (float[4] b) { b = Neg(x) }
            >
        }
        <domain: "mine", opset_import: ["" : 20]> f (a) => (b) { b = Exp(a) }
        """
    )
    assert operators(model) == {"Neg": 2, "mine::f": 1, "If": 1, "Exp": 1}


def test_the_difference_has_the_largest_changes_first():
    before = graph("a = Neg(i)\nb = Neg(a)\nc = Exp(b)\ny = MatMul(c, w)", SQUARE)
    after = graph("c = Exp(i)\nd = MatMul(c, w)\ny = Add(d, b)", {**SQUARE, "b": normal(4)}, opset=21)
    assert difference(before, after) == "Neg 2 to 0, Add 0 to 1; initializers 1 to 2; opset 20 to 21"
    assert difference(before, before) == "names, attributes or values"


def test_a_long_difference_is_cut():
    kinds = ("Abs", "Neg", "Exp", "Cos", "Sin", "Tan", "Relu", "Tanh")
    chain = "".join(f"h{place} = {kind}({f'h{place - 1}' if place else 'i'})\n" for place, kind in enumerate(kinds))
    assert difference(graph(f"{chain}y = Ceil(h7)"), graph("y = Ceil(i)")).endswith(" and 2 more")
