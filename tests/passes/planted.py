"""Passes that change what a graph computes, each in the way of a bug that optimisers have had, and a graph for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from gradctl.passes.pass_result import Pass

__all__ = ["PLANTED", "Planted", "graph", "operators_in_order", "planted"]


@dataclass(frozen=True)
class Planted:
    """A graph, what a pass does to the first node of one operator, and the value that is wrong first."""

    text: str
    operator: str
    change: Callable[[onnx.ModelProto, onnx.NodeProto], None]
    value: str
    constants: dict[str, np.ndarray] | None = None


def graph(text, constants=None, *, inputs="float[4, 4] x", outputs="float[4, 4] y", opset=20):
    """Return a graph whose input goes through an Identity first, which a right pass removes."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ i = Identity(x)\n{text} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (constants or {}).items())
    return model


def operators_in_order(model):
    """Return the operators of the graph, those of its subgraphs left out."""
    return [node.op_type for node in model.graph.node]


def planted(row):
    """Return the pass of a row; on a graph without the operator it does nothing."""

    def apply(model):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        for node in changed.graph.node:
            if node.op_type == row.operator:
                row.change(changed, node)
                break
        return changed

    return Pass("planted", "default", "tests", "is wrong", apply)


def attribute(**values):
    """Return what gives a node these attributes."""

    def change(_, node):
        kept = [each for each in node.attribute if each.name not in values]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in values.items())])

    return change


def constant(name, function):
    """Return what changes one initializer."""

    def change(model, _):
        for each in model.graph.initializer:
            if each.name == name:
                each.CopyFrom(numpy_helper.from_array(function(numpy_helper.to_array(each).copy()), name))

    return change


def swapped(first, second):
    """Return what exchanges two inputs."""

    def change(_, node):
        node.input[first], node.input[second] = node.input[second], node.input[first]

    return change


def dropped(_, node):
    """Let a node give its first input."""
    node.op_type = "Identity"
    del node.input[1:]
    del node.attribute[:]


def replaced(operator, **attributes):
    """Return what makes another operator of a node."""

    def change(_, node):
        node.op_type = operator
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())

    return change


def folded_to_nan(model, node):
    """Compute a node ahead of time, wrongly."""
    model.graph.initializer.append(numpy_helper.from_array(np.full((4, 4), np.nan, np.float32), node.output[0]))
    model.graph.node.remove(node)


def without_truncation(_, node):
    """Cast to a float where an integer was meant, so that nothing is cut off."""
    attribute(to=onnx.TensorProto.FLOAT)(_, node)


def one_further(model, node):
    constant("starts", lambda each: each + 1)(model, node)
    constant("ends", lambda each: each + 1)(model, node)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


SQUARE = {"w": normal(4, 4)}
LINEAR = "m = MatMul(i, w)\n"
PLANTED = {
    "a constant off by 1e-3": Planted(
        LINEAR + "h = Add(m, b)\ny = Relu(h)", "Add", constant("b", lambda b: b + np.float32(1e-3)), "initializer b",
        {**SQUARE, "b": normal(4, seed=1)},
    ),
    "a dropped Cast": Planted(
        LINEAR + "whole = Cast<to = 6>(m)\nh = Cast<to = 1>(whole)\ny = Mul(h, w)", "Cast", without_truncation, "whole",
        SQUARE,
    ),
    "a dropped rounding to float16": Planted(
        LINEAR + "half = Cast<to = 10>(m)\nh = Cast<to = 1>(half)\ny = Mul(h, w)", "Cast", without_truncation, "half",
        SQUARE,
    ),
    "a Transpose of the wrong axes": Planted(
        LINEAR + "t = Reshape(m, cube)\nh = Transpose<perm = [1, 0, 2]>(t)\nf = Reshape(h, flat)\ny = MatMul(f, w)",
        "Transpose", attribute(perm=[0, 1, 2]), "h", {**SQUARE, "cube": ints(2, 2, 4), "flat": ints(4, 4)},
    ),
    "swapped operands of Sub": Planted(LINEAR + "h = Sub(m, w)\ny = Relu(h)", "Sub", swapped(0, 1), "h", SQUARE),
    "a removed Clip that large values reach": Planted(
        LINEAR + "h = Clip(m, low, high)\ny = Neg(h)", "Clip", dropped, "h",
        {**SQUARE, "low": np.float32(-100), "high": np.float32(100)},
    ),
    "a constant folded to NaN": Planted(
        "s = Sqrt(p)\nm = Mul(i, s)\ny = Relu(m)", "Sqrt", folded_to_nan, "s", {"p": np.abs(normal(4, 4))}
    ),
    "a Pad off by one": Planted(
        LINEAR + "h = Pad(m, pads)\ny = Slice(h, starts, ends)", "Pad",
        constant("pads", lambda _: ints(2, 0, 0, 2)), "initializer pads",
        {**SQUARE, "pads": ints(1, 1, 1, 1), "starts": ints(1, 1), "ends": ints(5, 5)},
    ),
    "a fusion for positive values only": Planted(LINEAR + "h = Abs(m)\ny = MatMul(h, w)", "Abs", dropped, "h", SQUARE),
    "a dropped bias": Planted(
        LINEAR + "h = Add(m, b)\ny = Tanh(h)", "Add", dropped, "h", {**SQUARE, "b": normal(4, seed=1)}
    ),
    "a Softmax along the wrong axis": Planted(
        LINEAR + "h = Softmax<axis = 1>(m)\ny = MatMul(h, w)", "Softmax", attribute(axis=0), "h", SQUARE
    ),
    "a Slice off by one": Planted(
        LINEAR + "t = Concat<axis = 0>(m, w)\nh = Slice(t, starts, ends)\ny = Relu(h)", "Slice",
        one_further, "initializer starts", {**SQUARE, "starts": ints(0), "ends": ints(4)},
    ),
    "a larger epsilon of a layer norm": Planted(
        LINEAR + "h = LayerNormalization<epsilon = 1e-5>(m, g, b)\ny = MatMul(h, w)", "LayerNormalization",
        attribute(epsilon=1e-3), "h", {**SQUARE, "g": np.ones(4, np.float32), "b": np.zeros(4, np.float32)},
    ),
    "a slightly smaller epsilon of a layer norm": Planted(
        LINEAR + "h = LayerNormalization<epsilon = 1e-5>(m, g, b)\ny = MatMul(h, w)", "LayerNormalization",
        attribute(epsilon=9e-6), "h", {**SQUARE, "g": np.ones(4, np.float32), "b": np.zeros(4, np.float32)},
    ),
    "GELU by tanh": Planted(
        LINEAR + "h = Gelu(m)\ny = MatMul(h, w)", "Gelu", attribute(approximate="tanh"), "h", SQUARE
    ),
    "a matrix that is not transposed": Planted(
        LINEAR + "h = Gemm<transB = 1>(m, w)\ny = Tanh(h)", "Gemm", attribute(transB=0), "h", SQUARE
    ),
    "a mean over the wrong axis": Planted(
        LINEAR + "h = ReduceMean(m, axes)\ny = Mul(m, h)", "ReduceMean", constant("axes", lambda _: ints(0)),
        "initializer axes", {**SQUARE, "axes": ints(1)},
    ),
    "swapped parts of Where": Planted(
        LINEAR + "c = Less(m, w)\nh = Where(c, m, w)\ny = Neg(h)", "Where", swapped(1, 2), "h", SQUARE
    ),
    "a Gather off by one": Planted(
        LINEAR + "h = Gather(m, rows)\ny = Neg(h)", "Gather", constant("rows", lambda rows: (rows + 1) % 4),
        "initializer rows", {**SQUARE, "rows": ints(3, 1, 0, 2)},
    ),
    "a sum in another order of parts": Planted(
        LINEAR + "t = Concat<axis = 1>(m, w)\nh = MatMul(t, v)\ny = Relu(h)", "Concat", swapped(0, 1), "t",
        {**SQUARE, "v": normal(8, 4, seed=2)},
    ),
    "a leak that is forgotten": Planted(
        LINEAR + "h = LeakyRelu<alpha = 0.01>(m)\ny = MatMul(h, w)", "LeakyRelu", replaced("Relu"), "h", SQUARE
    ),
    "a Mod with the sign of C": Planted(
        LINEAR + "whole = Cast<to = 7>(m)\nr = Mod(whole, three)\nh = Cast<to = 1>(r)\ny = Neg(h)", "Mod",
        attribute(fmod=1), "r", {**SQUARE, "three": ints(3)},
    ),
}  # fmt: skip
