"""Conversions of opsets, up by onnxscript and down by ONNX's own converter."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from gradctl.passes.opset import conversion
from gradctl.passes.pass_result import NotApplicable
from tests.passes.planted import SQUARE, graph, normal, operators_in_order


def opset(model):
    return {each.domain: each.version for each in model.opset_import}[""]


def output(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )


@pytest.mark.parametrize("version", [18, 21, 22, 23])
def test_axes_that_were_attributes_become_an_input(version):
    before = graph("m = MatMul(i, w)\ny = ReduceMax<axes = [1]>(m)", SQUARE, outputs="float[4, 1] y", opset=13)
    after = conversion(version).apply(before)
    assert opset(after) == version
    (node,) = (node for node in after.graph.node if node.op_type == "ReduceMax")
    assert (len(node.input), [each.name for each in node.attribute]) == (2, [])
    x = normal(4, 4, seed=1)
    np.testing.assert_allclose(output(after, x), output(before, x), rtol=1e-6)


def test_a_conversion_down_to_an_opset_that_has_the_operators():
    before = graph(
        "m = MatMul(i, w)\ny = LayerNormalization(m, one)", {**SQUARE, "one": np.ones(4, np.float32)}, opset=21
    )
    after = conversion(17).apply(before)
    assert (opset(after), operators_in_order(after)) == (17, ["Identity", "MatMul", "LayerNormalization"])
    onnx.checker.check_model(after)


def test_the_version_that_it_has_is_nothing_to_do():
    with pytest.raises(NotApplicable) as caught:
        conversion(20).apply(graph("y = Neg(i)"))
    assert str(caught.value) == "the graph has opset 20 already."


def test_an_operator_that_the_older_opset_lacks_is_an_error():
    with pytest.raises(Exception, match="Gelu"):
        conversion(18).apply(graph("y = Gelu(i)"))


def test_it_is_named_by_its_version_and_may_make_more_nodes():
    each = conversion(22)
    assert (each.name, each.level, each.may_grow, each.does) == ("opset-22", None, True, "converts to opset 22")


@pytest.mark.parametrize("version", [18, 22])
def test_the_given_model_is_not_changed_and_nothing_is_printed(version, capfd):
    model = graph("m = MatMul(i, w)\ny = Relu(m)", SQUARE)
    before = model.SerializeToString(deterministic=True)
    conversion(version).apply(model)
    assert model.SerializeToString(deterministic=True) == before
    assert capfd.readouterr() == ("", "")
