"""Estimates of operations and memory against numbers worked out by hand, beside each graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from gradctl.passes.size import size_of

FLOAT = np.float32


def model_of(text, inputs, outputs, shapes=None, *, functions="", domains=""):
    """Return a graph with weights of zeros of these shapes."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20{domains}]> g ({inputs}) => ({outputs}) {{ {text} }} {functions}'
    )
    weights = {name: np.zeros(shape, FLOAT) for name, shape in (shapes or {}).items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


PRODUCTS = {
    # 3 x 5 results, each a sum of 4 products: 2 * 15 * 4.
    "MatMul": ("y = MatMul(x, w)", "float[3, 4] x", "float[3, 5] y", {"w": (4, 5)}, 120),
    # Twice as many, the batch of 2.
    "MatMul of a batch": ("y = MatMul(x, w)", "float[2, 3, 4] x", "float[2, 3, 5] y", {"w": (4, 5)}, 240),
    # A vector: 5 results of 4 products.
    "MatMul of a vector": ("y = MatMul(x, w)", "float[4] x", "float[5] y", {"w": (4, 5)}, 40),
    "Gemm": ("y = Gemm(x, w)", "float[3, 4] x", "float[3, 5] y", {"w": (4, 5)}, 120),
    # x is [4, 3] and taken as [3, 4]: again 15 results of 4 products, where its last axis has 3.
    "Gemm with transA": ("y = Gemm<transA = 1>(x, w)", "float[4, 3] x", "float[3, 5] y", {"w": (4, 5)}, 120),
    "Gemm with transB": ("y = Gemm<transB = 1>(x, w)", "float[3, 4] x", "float[3, 5] y", {"w": (5, 4)}, 120),
    # 6 channels of 4 x 4 results, each of 2 channels of 3 x 3: 2 * 96 * 18.
    "Conv": ("y = Conv(x, w)", "float[1, 2, 6, 6] x", "float[1, 6, 4, 4] y", {"w": (6, 2, 3, 3)}, 3456),
    # In 2 groups each result takes 1 of the 2 channels: half of it.
    "Conv in groups": (
        "y = Conv<group = 2>(x, w)", "float[1, 2, 6, 6] x", "float[1, 6, 4, 4] y", {"w": (6, 1, 3, 3)}, 1728,
    ),
    # Depthwise over time: 4 channels of 8 results of 3 products.
    "Conv along one axis": (
        "y = Conv<group = 4>(x, w)", "float[1, 4, 10] x", "float[1, 4, 8] y", {"w": (4, 1, 3)}, 192,
    ),
    # Each of 2 x 3 x 3 elements is spread over 5 channels of 2 x 2: 2 * 18 * 20.
    "ConvTranspose": (
        "y = ConvTranspose<strides = [2, 2]>(x, w)",
        "float[1, 2, 3, 3] x", "float[1, 5, 6, 6] y", {"w": (2, 5, 2, 2)}, 720,
    ),
    # 4 channels in 2 groups: each element is spread over 3 channels of 2 x 2: 2 * 36 * 12.
    "ConvTranspose in groups": (
        "y = ConvTranspose<group = 2>(x, w)",
        "float[1, 4, 3, 3] x", "float[1, 6, 4, 4] y", {"w": (4, 3, 2, 2)}, 864,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_count_two_for_each_multiplication(name):
    text, inputs, outputs, shapes, flops = PRODUCTS[name]
    size = size_of(model_of(text, inputs, outputs, shapes), {})
    assert (size.flops, size.uncounted) == (flops, 0)


def test_a_quantised_convolution_has_its_weight_fourth():
    model = model_of("y = QLinearConv(x, s, z, w, s, z, s, z)", "uint8[1, 2, 6, 6] x", "uint8[1, 6, 4, 4] y", {"s": ()})
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((6, 2, 3, 3), np.uint8), "w"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.uint8(0), "z"))
    assert size_of(model, {}).flops == 3456


def test_other_operators_count_one_an_element_and_views_nothing():
    text = "r = Reshape(x, s)\na = Relu(r)\nu = Unsqueeze(a, k)\ny = Exp(u)"
    model = model_of(text, "float[3, 4] x", "float[1, 2, 6] y")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 6]), "s"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "k"))
    size = size_of(model, {})
    assert (size.flops, size.uncounted, size.nodes) == (12 + 12, 0, 4)


def test_parameters_and_bytes_are_those_of_initializers_of_each_dtype():
    model = model_of("y = Add(x, b)", "float[3, 4] x", "float[3, 4] y", {"b": (4,)})
    for dtype in (np.float16, np.float64, np.int8):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((2, 5), dtype), np.dtype(dtype).name))
    size = size_of(model, {})
    assert (size.initializers, size.parameters, size.bytes) == (4, 4 + 3 * 10, 4 * 4 + 10 * (2 + 8 + 1))


FREE = model_of("h = MatMul(x, w)\ny = Relu(h)", "float[batch, 4] x", "float[batch, 5] y", {"w": (4, 5)})


def test_a_free_size_is_not_counted_unless_the_example_says_it():
    unknown = size_of(FREE, {})
    assert (unknown.flops, unknown.uncounted, unknown.activation_bytes) == (0, 2, 0)
    known = size_of(FREE, {"x": (3, 4)})
    assert (known.flops, known.uncounted, known.activation_bytes) == (120 + 15, 0, 2 * 15 * 4)


def test_sizes_that_an_exporter_noted_by_name_give_way_to_the_example():
    noted = onnx.ModelProto()
    noted.CopyFrom(FREE)
    noted.graph.value_info.append(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["batch", 5]))
    assert size_of(noted, {"x": (3, 4)}).flops == 135


def test_shapes_that_hang_on_values_are_not_counted():
    size = size_of(model_of("n = NonZero(x)\ny = Neg(n)", "float[3, 4] x", "int64[2, found] y"), {})
    assert (size.flops, size.uncounted) == (0, 2)


WHOLE = {
    "a recurrence": ("h, y = GRU<hidden_size = 5>(x, w, r)", "float[7, 1, 4] x", "float[1, 1, 5] y",
                     {"w": (1, 15, 4), "r": (1, 15, 5)}),
    "an Einsum": ('y = Einsum<equation = "ij,jk->ik">(x, w)', "float[3, 4] x", "float[3, 5] y", {"w": (4, 5)}),
    "a branch": (
        "y = If (c) <then_branch = t () => (float[4] a) { a = Neg(x) },"
        " else_branch = e () => (float[4] b) { b = Exp(x) }>",
        "float[4] x, bool c", "float[4] y", {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_whole_layers_and_what_calls_graphs_are_not_counted(name):
    size = size_of(model_of(*WHOLE[name]), {})
    assert (size.flops, size.uncounted) == (0, 1)


def test_a_call_of_a_function_is_not_counted_and_its_nodes_are_listed():
    function = '<domain: "mine", opset_import: ["" : 20]> f (a) => (b) { c = Neg(a)  b = Exp(c) }'
    model = model_of("y = mine.f(x)", "float[4] x", "float[4] y", functions=function, domains=', "mine" : 1')
    size = size_of(model, {})
    assert (size.flops, size.uncounted, size.operators) == (0, 1, {"mine::f": 1, "Neg": 1, "Exp": 1})


def test_the_most_alive_are_those_that_wait_for_one_another():
    """Bytes after each node: a 48, b 48 + 96, c 96 + 96 (a is done), d 96 + 96 + 24 (c waits for y), y 96 + 24 + 96."""
    text = "a = Relu(x)\nb = Concat<axis = 0>(a, a)\nc = Exp(b)\nd = ReduceSum(b, k)\ny = Mul(c, d)"
    model = model_of(text, "float[3, 4] x", "float[6, 4] y")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "k"))
    assert size_of(model, {}).activation_bytes == 96 + 96 + 24


def test_an_output_stays_alive_to_the_end():
    """a is an output: with b, then with c, and never alone; 16 bytes each."""
    model = model_of("a = Relu(x)\nb = Exp(x)\ny = Neg(b)", "float[4] x", "float[4] y, float[4] a")
    assert size_of(model, {}).activation_bytes == 3 * 16


def test_what_a_branch_takes_from_outside_is_alive_until_then():
    then, other = "t () => (float[4] p) { p = Neg(a) }", "e () => (float[4] q) { q = Exp(a) }"
    text = f"a = Relu(x)\nb = Exp(x)\nd = Neg(b)\ny = If (c) <then_branch = {then}, else_branch = {other}>"
    model = model_of(text, "float[4] x, bool c", "float[4] y, float[4] d")
    assert size_of(model, {}).activation_bytes == 3 * 16


def test_the_given_model_is_not_changed():
    before = FREE.SerializeToString(deterministic=True)
    size_of(FREE, {"x": (3, 4)})
    assert FREE.SerializeToString(deterministic=True) == before
