"""onnxscript's folding, optimizer and rewrite rules: what each does to a small graph, and what it says of a failure."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from gradctl.passes.onnxscript import fold, optimize, rewrite
from tests.passes.planted import SQUARE, graph, normal, operators_in_order


def constant_of(model, name):
    return onnx.numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == name))


def test_fold_computes_what_hangs_on_constants():
    folded = fold(graph("t = Transpose(w)\ns = Mul(t, two)\ny = MatMul(i, s)", {**SQUARE, "two": np.float32(2)}))
    assert operators_in_order(folded) == ["MatMul"]
    np.testing.assert_array_equal(constant_of(folded, "s"), 2 * SQUARE["w"].T)


def test_fold_does_not_draw_random_numbers():
    folded = fold(graph("r = RandomNormal<shape = [4, 4]>()\ny = Add(i, r)"))
    assert "RandomNormal" in operators_in_order(folded)


def test_fold_knows_shapes_that_are_fixed_and_leaves_free_ones():
    text = "s = Shape(i)\np = ReduceProd<keepdims = 0>(s)\nf = Cast<to = 1>(p)\ny = Div(i, f)"
    assert "Shape" not in operators_in_order(fold(graph(text)))
    free = graph(text, inputs="float[batch, 4] x", outputs="float[batch, 4] y")
    assert "Shape" in operators_in_order(fold(free))


def test_optimize_inlines_folds_and_removes():
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20, "mine" : 1]>
        g (float[4] x) => (float[4] y) { c = Constant<value = float {3.0}>()  d = Neg(c)  y = mine.plus(x, d) }
        <domain: "mine", opset_import: ["" : 20]> plus (a, b) => (c) { e = Exp(a)  c = Add(a, b) }
        """
    )
    optimized = optimize(model)
    assert (operators_in_order(optimized), len(optimized.functions)) == (["Add"], 0)


def test_rewrite_joins_transposes():
    text = "t = Transpose<perm = [1, 2, 0]>(i)\ny = Transpose<perm = [1, 2, 0]>(t)"
    rewritten = rewrite(graph(text, inputs="float[2, 3, 4] x", outputs="float[4, 2, 3] y"))
    (node,) = (node for node in rewritten.graph.node if node.op_type == "Transpose")
    assert list(node.attribute[0].ints) == [2, 0, 1]


def test_what_a_rule_raises_is_what_is_raised():
    """Not that step 0 failed: onnxscript 2836, whose rule looks for a bound of Clip among the Constant nodes only."""
    model = graph("m = Relu(i)\ny = Clip(m, low)", {"low": np.float32(-1)})
    try:
        rewritten = rewrite(model)
    except AttributeError as error:
        assert "numpy" in str(error)
    else:
        assert "Clip" in operators_in_order(rewritten)


@pytest.mark.parametrize("apply", [fold, optimize, rewrite])
def test_the_given_model_is_not_changed_and_nothing_is_printed(apply, capfd):
    model = graph("t = Transpose(w)\nm = MatMul(i, t)\nk = Add(m, b)\ny = Relu(k)", {**SQUARE, "b": normal(4)})
    before = model.SerializeToString(deterministic=True)
    apply(model)
    assert model.SerializeToString(deterministic=True) == before
    assert capfd.readouterr() == ("", "")
