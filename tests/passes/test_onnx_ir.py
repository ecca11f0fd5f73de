"""The passes of onnx-ir on graphs so small that what should come out is plain."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from gradctl.passes.onnx_ir import PASSES, without_unused_opsets
from tests.passes.planted import SQUARE, graph, normal, operators_in_order


def applied(name, model):
    return PASSES[name][1](model)


def with_function():
    """Return a graph that calls a function of its file, and has one more that nothing calls."""
    return onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20, "mine" : 1]>
        g (float[4] x) => (float[4] y) { y = mine.twice(x) }
        <domain: "mine", opset_import: ["" : 20]> twice (a) => (b) { b = Add(a, a) }
        <domain: "mine", opset_import: ["" : 20]> never (a) => (b) { b = Neg(a) }
        """
    )


def test_inline_leaves_no_function_and_no_opset_of_one():
    inlined = applied("inline", with_function())
    assert (operators_in_order(inlined), len(inlined.functions)) == (["Add"], 0)
    assert [each.domain for each in inlined.opset_import] == [""]


def test_unused_removes_nodes_initializers_functions_and_opsets():
    model = with_function()
    model.graph.node.append(onnx.helper.make_node("Exp", ["x"], ["nobody"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(normal(3), "unwanted"))
    model.opset_import.add(domain="other", version=1)
    cleaned = applied("unused", model)
    assert operators_in_order(cleaned) == ["twice"]
    assert [each.name for each in cleaned.functions] == ["twice"]
    assert (len(cleaned.graph.initializer), {each.domain for each in cleaned.opset_import}) == (0, {"", "mine"})


def test_identity_goes_but_for_an_input_that_is_an_output():
    assert operators_in_order(applied("identity", graph("m = Identity(i)\nn = Relu(m)\ny = Identity(n)"))) == ["Relu"]
    passed_on = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[4] x) => (float[4] y) { y = Identity(x) }'
    )
    assert operators_in_order(applied("identity", passed_on)) == ["Identity"]


def test_constants_become_initializers_with_their_names():
    lifted = applied("constants", graph("c = Constant<value = float[1] {2.0}>()\ny = Mul(i, c)"))
    assert operators_in_order(lifted) == ["Identity", "Mul"]
    (constant,) = lifted.graph.initializer
    assert (constant.name, onnx.numpy_helper.to_array(constant).tolist()) == ("c", [2.0])


def test_duplicates_are_shared_where_dtype_shape_and_bytes_are_alike():
    zeros = np.zeros(4, np.float32)
    constants = {"a": zeros, "b": zeros, "whole": zeros.astype(np.int32), "tall": zeros[:, None], "minus": -zeros}
    model = graph("k = Cast<to = 1>(whole)\ny = Sum(i, a, b, k, tall, minus)", constants)
    shared = applied("duplicates", model)
    assert {each.name for each in shared.graph.initializer} == {"a", "whole", "tall", "minus"}
    assert list(shared.graph.node[-1].input) == ["i", "a", "a", "k", "tall", "minus"]


def test_subexpressions_are_computed_once():
    text = "a = MatMul(i, w)\nb = MatMul(i, w)\nc = Softmax<axis = 0>(a)\nd = Softmax<axis = 1>(b)\ny = Add(c, d)"
    assert operators_in_order(applied("subexpressions", graph(text, SQUARE))) == [
        "Identity", "MatMul", "Softmax", "Softmax", "Add",
    ]  # fmt: skip


def test_random_numbers_are_not_computed_once():
    text = "a = RandomNormalLike(i)\nb = RandomNormalLike(i)\ny = Sub(a, b)"
    assert operators_in_order(applied("subexpressions", graph(text))).count("RandomNormalLike") == 2


def test_an_opset_that_is_used_stays():
    model = with_function()
    model.opset_import.add(domain="com.microsoft", version=1)
    assert {each.domain for each in without_unused_opsets(model).opset_import} == {"", "mine"}


@pytest.mark.parametrize("name", PASSES)
def test_the_given_model_is_not_changed(name):
    model = with_function()
    model.graph.node.append(onnx.helper.make_node("Exp", ["x"], ["nobody"]))
    before = model.SerializeToString(deterministic=True)
    applied(name, model)
    assert model.SerializeToString(deterministic=True) == before


def test_an_output_keeps_its_name():
    text = "g (float[n, 4] x) => (float[rows, 4] y) <float[n, 4] h> { h = Neg(x) y = Identity(h) }"
    without = applied("identity", onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}'))
    assert operators_in_order(without) == ["Neg"]
    (output,) = without.graph.output
    assert output.name == "y"


def test_an_output_that_an_equal_node_makes_keeps_its_type():
    model = graph("a = Relu(i)\ny = Relu(i)\nz = Tanh(a)", outputs="float[4, 4] y, float[4, 4] z")
    merged = applied("subexpressions", model)
    assert operators_in_order(merged) == ["Identity", "Relu", "Tanh"]
    assert [each.type for each in merged.graph.output] == [each.type for each in model.graph.output]
    onnx.checker.check_model(merged)
