"""Passes that are wrong beyond the example alone: at other sizes, and with integers that it does not have."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from gradctl.commands.optimize import Options, optimize_file
from gradctl.passes.pass_result import Pass
from tests.passes.planted import constant, graph


def written(tmp_path, model):
    onnx.save(model, tmp_path / "a.onnx")
    return tmp_path / "a.onnx"


def test_a_bug_at_another_size_is_found(tmp_path):
    """A size that the graph leaves free is baked in: right at the example's."""
    text = "s = Shape(i)\nk = Slice(s, zero, one)\nn = Cast<to = 1>(k)\nh = Mul(i, n)\ny = Relu(h)"
    ends = {"zero": np.array([0]), "one": np.array([1])}
    model = graph(text, ends, inputs="float[batch, 4] x", outputs="float[batch, 4] y")

    def baked(before):
        changed = onnx.ModelProto()
        changed.CopyFrom(before)
        for node in list(changed.graph.node):
            if node.output[0] == "n":
                changed.graph.node.remove(node)
                changed.graph.initializer.append(onnx.numpy_helper.from_array(np.array([3], np.float32), "n"))
        return changed

    passes = [Pass("baked", None, "tests", "bakes 3 in", baked)]
    (finding,) = optimize_file(written(tmp_path, model), tmp_path / "b.onnx", Options(passes)).unit.findings
    assert (finding.code, finding.message.count("with sizes of one")) == ("GC501", 1)


@pytest.mark.parametrize(
    ("text", "wrong", "trial"),
    [
        ("h = Div(three, x)\ny = Neg(h)", "h = Sub(x, x)", "small integers"),
        ("h = Abs(x)\ny = Neg(h)", "h = Identity(x)", "negative integers"),
        ("h = Equal(x, zero)\nc = Cast<to = 7>(h)\ny = Neg(c)", "h = Less(x, zero)", "lowest integers"),
    ],
)  # fmt: skip
def test_integers_that_the_example_does_not_have_are_tried(text, wrong, trial, tmp_path):
    """``h`` is right on the integers from 36 to 99."""
    constants = {"zero": np.array(0), "three": np.array(3)}
    model = graph(text, constants, inputs="int64[64] x", outputs="int64[64] y")
    other = graph(wrong + "\ny = Neg(h)", constants, inputs="int64[64] x", outputs="int64[64] y").graph.node

    def replaced(before):
        changed = onnx.ModelProto()
        changed.CopyFrom(before)
        for node in changed.graph.node:
            if node.output[0] == "h":
                node.CopyFrom(other[1])
        return changed

    np.savez(tmp_path / "x.npz", x=np.arange(36, 100))
    path = written(tmp_path, model)
    passes = [Pass("wrong", None, "tests", "is wrong", replaced)]
    unit = optimize_file(path, tmp_path / "b.onnx", Options(passes), inputs=tmp_path / "x.npz").unit
    (finding,) = unit.findings
    assert f"with {trial}; the first value it changes is h of " in finding.message


def test_sizes_that_are_equal_in_the_example_alone_are_told_apart(tmp_path):
    """The size of one axis is taken for that of another, and both are 3 where inputs are drawn."""
    text = "s = Shape(i)\nk = Gather(s, axis)\nn = Cast<to = 1>(k)\nh = Mul(i, n)\ny = Relu(h)"
    model = graph(text, {"axis": np.array(1)}, inputs="float[batch, seq] x", outputs="float[batch, seq] y")
    change = constant("axis", lambda axis: axis - 1)

    def other_axis(before):
        changed = onnx.ModelProto()
        changed.CopyFrom(before)
        change(changed, None)
        return changed

    passes = [Pass("axis", None, "tests", "takes another axis", other_axis)]
    (finding,) = optimize_file(written(tmp_path, model), tmp_path / "b.onnx", Options(passes)).unit.findings
    assert "with unequal sizes" in finding.message
