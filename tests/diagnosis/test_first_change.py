"""What a pass changed first: a constant by its name, a shape or dtype where it changes, and what was folded wrongly."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gradctl.commands.optimize import Options, optimize_file
from gradctl.passes.pass_result import Pass
from tests.passes.planted import LINEAR, PLANTED, SQUARE, Planted, attribute, graph, ints, planted

TWO_OUTPUTS = "float[4, 4] y, float[4, 4] z"


def said(tmp_path, row, **options):
    """Return what the finding of a planted pass says between the output that differs and how it ends."""
    onnx.save(graph(row.text, row.constants, **options), tmp_path / "a.onnx")
    (finding,) = optimize_file(tmp_path / "a.onnx", tmp_path / "b.onnx", Options([planted(row)])).unit.findings
    assert finding.code == "GC501"
    return re.search("the first value it changes is (.*?)(?:; | It was undone)", finding.message)[1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a Pad off by one", "initializer pads of Pad: [2, 0, 0, 2] instead of [1, 1, 1, 1]"),
        ("a Slice off by one", "initializer starts of Slice: [1] instead of [0]"),
        ("a mean over the wrong axis", "initializer axes of ReduceMean: [0] instead of [1]"),
        ("a Gather off by one", "initializer rows of Gather: [0, 2, 1, 3] instead of [3, 1, 0, 2]"),
    ],
)
def test_a_few_whole_numbers_are_shown(name, text, tmp_path):
    assert said(tmp_path, PLANTED[name]) == text


def test_a_changed_bias_is_named_with_how_far_it_is_off(tmp_path):
    row = PLANTED["a constant off by 1e-3"]
    bias = row.constants["b"].astype(np.float64)
    error = np.linalg.norm((row.constants["b"] + np.float32(1e-3)) - bias) / np.linalg.norm(bias)
    assert said(tmp_path, row) == f"initializer b of Add: off by {error:.2e}"


def test_a_constant_of_another_shape_is_named(tmp_path):
    """The output keeps its shape: what was added to each row is now added to each column."""

    def turned(model, _):
        (bias,) = (each for each in model.graph.initializer if each.name == "b")
        bias.dims[:] = [4, 1]

    row = Planted(LINEAR + "h = Add(m, b)\ny = Neg(h)", "Add", turned, "", {**SQUARE, "b": np.ones(4, np.float32) * 2})
    row.constants["b"][0] = 0
    assert said(tmp_path, row) == "initializer b of Add: float32[4, 1] instead of float32[4]"


def test_a_constant_that_the_node_no_longer_takes_is_not_blamed(tmp_path):
    """The pass writes another b, right for what it makes of the node, and forgets the Neg after it."""

    def fused(model, node):
        numbers = numpy_helper.to_array(model.graph.initializer[-1])
        model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(2 * numbers, "b"))
        node.op_type = "Sub"

    row = Planted(LINEAR + "h = Add(m, b)\ny = Neg(h)", "Add", fused, "", {**SQUARE, "b": np.ones(4, np.float32)})
    assert said(tmp_path, row).startswith("h of Add: off by ")


def test_a_constant_folded_wrongly_is_named_by_what_made_it(tmp_path):
    assert said(tmp_path, PLANTED["a constant folded to NaN"]).startswith("s of Sqrt: off by ")


def test_an_inner_shape_is_named_where_it_changes(tmp_path):
    """Only a sum further down has other numbers: the Unsqueeze is not what they change at, but what is wrong."""
    text = LINEAR + "r = ReduceMean(m, last)\nh = Transpose<perm = [1, 0]>(r)\nn = Neg(h)\ny = Add(m, n)"
    row = Planted(text, "Transpose", attribute(perm=[0, 1]), "", {**SQUARE, "last": ints(1)})
    assert said(tmp_path, row) == "h of Transpose: float32[4, 1] instead of float32[1, 4]"


def test_an_inner_dtype_is_named_where_it_changes(tmp_path):
    text = LINEAR + "h = Cast<to = 6>(m)\nk = Cast<to = 1>(h)\ny = Mul(k, w)"
    row = Planted(text, "Cast", attribute(to=onnx.TensorProto.FLOAT), "", SQUARE)
    assert said(tmp_path, row) == "h of Cast: float32[4, 4] instead of int32[4, 4]"


def test_an_inner_layout_that_a_right_pass_chose_is_passed_over(tmp_path):
    """It keeps m the other way round, which is its right; that it also takes the bias for a factor is not."""

    def transposed(model):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        makers = {node.output[0]: node for node in changed.graph.node}
        if "m" not in makers or any(port.name == "m" for port in changed.graph.output):
            return changed
        del changed.graph.node[:]
        made = graph("t = Transpose(i)\nm = MatMul(v, t)\nn = Transpose(m)\nh = Mul(n, b)\ny = Tanh(h)")
        changed.graph.node.extend(made.graph.node)
        changed.graph.initializer.append(numpy_helper.from_array(weight.T.copy(), "v"))
        return changed

    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    model = graph(
        "m = MatMul(i, w)\nh = Add(m, b)\ny = Tanh(h)",
        {"w": weight, "b": np.ones(3, np.float32) * 2},
        outputs="float[4, 3] y",
    )
    onnx.save(model, tmp_path / "a.onnx")
    passes = [Pass("turns", None, "tests", "keeps a value transposed", transposed, may_grow=True)]
    (finding,) = optimize_file(tmp_path / "a.onnx", tmp_path / "b.onnx", Options(passes)).unit.findings
    assert "the first value it changes is h of Add: off by " in finding.message


def test_a_named_node_is_named(tmp_path):
    def renamed(_, node):
        node.input[0], node.input[1] = node.input[1], node.input[0]

    model = graph(LINEAR + "h = Sub(m, w)\ny = Relu(h)", SQUARE)
    model.graph.node[2].name = "decoder.residual"
    onnx.save(model, tmp_path / "a.onnx")
    row = Planted("", "Sub", renamed, "h")
    (finding,) = optimize_file(tmp_path / "a.onnx", tmp_path / "b.onnx", Options([planted(row)])).unit.findings
    assert "the first value it changes is h of Sub 'decoder.residual': off by " in finding.message


def test_a_value_below_two_outputs_is_one_finding(tmp_path):
    def doubled(_, node):
        node.attribute.append(helper.make_attribute("alpha", 0.02))

    text = LINEAR + "h = LeakyRelu(m)\ny = Neg(h)\nz = Exp(h)"
    assert said(tmp_path, Planted(text, "LeakyRelu", doubled, "", SQUARE), outputs=TWO_OUTPUTS).startswith(
        "h of LeakyRelu: off by "
    )
