"""Graphs whose inputs have no shape, none but a number of axes, or no axis: optimised, or refused in a sentence.

ONNX's checker wants the field, and onnxruntime runs a file without it all the same.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gradctl.commands.optimize import Options, optimize_file
from gradctl.core.errors import TargetError
from gradctl.passes.table import passes_of_level
from tests.cases.optimizer_graphs import computed
from tests.passes.planted import normal


def written(folder, shape):
    """Return a file of y = relu(-x), an Identity before it; ``shape`` is said of both."""
    nodes = [
        helper.make_node("Identity", ["x"], ["i"]),
        helper.make_node("Neg", ["i"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    path = folder / "before.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def optimized(folder, path, inputs=None):
    return optimize_file(path, folder / "after.onnx", Options(passes_of_level("max")), inputs=inputs)


@pytest.mark.parametrize("has_inputs", [False, True], ids=["drawn", "with --inputs"])
def test_no_shape_is_a_sentence_that_names_what_has_none(has_inputs, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((3, 4), np.float32))
    path = written(tmp_path, None)
    with pytest.raises(TargetError) as caught:
        optimized(tmp_path, path, tmp_path / "x.npy" if has_inputs else None)
    assert f"{caught.value.code} {caught.value.message}" == (
        f"GC601 {path} is not valid ONNX: Field 'shape' of 'type' is required but missing ('x', 'y'). Give each its "
        "sizes, by name where they are free."
    )
    assert not (tmp_path / "after.onnx").exists()


@pytest.mark.parametrize(
    ("shape", "tried"),
    [((None, None), (2, 3)), (("batch", None), (1, 4)), ((), ()), ((0, 4), (0, 4))],
    ids=["no size", "a name", "no axis", "empty"],
)
def test_sizes_that_are_not_said_are_drawn(shape, tried, tmp_path):
    outcome = optimized(tmp_path, written(tmp_path, shape))
    assert (outcome.unit.verdict, outcome.unit.findings, outcome.written) == ("pass", (), True)
    x = normal(*tried) if tried else np.array(-2, np.float32)
    np.testing.assert_array_equal(computed(tmp_path / "after.onnx", x=x), np.maximum(-x, 0))


def test_sizes_that_are_not_said_are_those_given(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.ones((2, 5), np.float32))
    outcome = optimized(tmp_path, written(tmp_path, (None, None)), tmp_path / "x.npz")
    assert (outcome.unit.verdict, outcome.written) == ("pass", True)
    assert "larger sizes" in outcome.unit.variations
    assert outcome.unit.optimization.after.flops == 2 * 2 * 5
