"""Counts of a graph, and an estimate of the cost of one run: operations, and memory for inner values.

Shapes come from ONNX's inference for the sizes of the example, and from the types that onnxruntime wrote into the file
for its own operators. A multiply-add counts 2, an element of any other operator 1; calls of other graphs and whole
layers (a recurrence, attention) are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import onnx
from onnx.helper import tensor_dtype_to_np_dtype

from gradctl.core.optimization import GraphSize
from gradctl.graphdiff.graph_view import operators, subgraphs
from gradctl.onnxio.session import static_shape
from gradctl.onnxio.submodel import copy_of, values_used_by

_Shape = tuple[int, ...]
_WITHOUT_OPERATIONS = ("Constant", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Size")
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulInteger", "QLinearMatMul")
# The convolutions, and which of their inputs is the weight.
_CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3, "ConvTranspose": 1}
_WHOLE_LAYERS = {
    *("RNN", "LSTM", "GRU", "Einsum"),
    *("Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention"),
}


def size_of(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> GraphSize:
    """Return counts and estimates.

    Args:
        model: the graph; not changed.
        shapes: of the inputs of the example, by name.
    """
    own = model.graph.initializer
    kinds = operators(model)
    known = _shapes(model, shapes)
    functions = {(each.domain, each.name) for each in model.functions}
    counts = [None if _is_whole(node, functions) else _operations(node, known) for node in model.graph.node]
    return GraphSize(
        operators=kinds,
        nodes=sum(kinds.values()),
        initializers=len(own),
        parameters=sum(math.prod(each.dims) for each in own),
        bytes=sum(math.prod(each.dims) * _item_bytes(each.data_type) for each in own),
        flops=sum(count or 0 for count in counts),
        activation_bytes=_most_alive(model, known),
        uncounted=sum(count is None for count in counts),
    )


def _shapes(model: onnx.ModelProto, given: Mapping[str, Sequence[int]]) -> dict[str, tuple[_Shape, int]]:
    """Return shape and bytes an element of each value whose shape is known."""
    fixed = copy_of(model)
    for port in fixed.graph.input:
        for size, actual in zip(port.type.tensor_type.shape.dim, given.get(port.name, ()), strict=False):
            size.dim_value = int(actual)
    # The types that exporters wrote for inner values have symbolic sizes, which inference would keep.
    kept = [each for each in fixed.graph.value_info if static_shape(each) is not None]
    del fixed.graph.value_info[:]
    fixed.graph.value_info.extend(kept)
    try:
        graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    except Exception:  # an estimate: if inference fails, shapes are unknown
        graph = fixed.graph
    known = {each.name: (tuple(each.dims), _item_bytes(each.data_type)) for each in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dimensions = static_shape(value)
        if dimensions is not None:
            known[value.name] = dimensions, _item_bytes(value.type.tensor_type.elem_type)
    return known


def _is_whole(node: onnx.NodeProto, functions: Collection[tuple[str, str]]) -> bool:
    """Return whether a node represents many: a layer, a call of a function, a branch or a loop."""
    calls = (node.domain, node.op_type) in functions or any(subgraphs(node))
    return calls or node.op_type in _WHOLE_LAYERS


def _operations(node: onnx.NodeProto, known: Mapping[str, tuple[_Shape, int]]) -> int | None:
    """Return the operations of one node; None if a shape that they depend on is not known."""
    if node.op_type in _WITHOUT_OPERATIONS:
        return 0
    inputs, outputs = ([known.get(name, (None, 0))[0] for name in names] for names in (node.input, node.output))
    result = next((shape for shape, name in zip(outputs, node.output, strict=True) if name), None)
    # A transposed convolution multiplies each element of its input, any other operator adds up each one of its output.
    counted = inputs[0] if node.op_type == "ConvTranspose" else result
    each = _operations_of_element(node, inputs)
    return None if result is None or counted is None or each is None else math.prod(counted) * each


def _operations_of_element(node: onnx.NodeProto, inputs: Sequence[_Shape | None]) -> int | None:
    """Return 2 for each term of the sums of a product or convolution, 1 for any other operator."""
    if node.op_type in _PRODUCTS:
        left = inputs[0]
        return 2 * _terms_of_product(node, left) if left else None
    if node.op_type in _CONVOLUTIONS:
        weight = inputs[_CONVOLUTIONS[node.op_type]]
        return None if weight is None else 2 * math.prod(weight[1:])
    return 1


def _terms_of_product(node: onnx.NodeProto, left: _Shape) -> int:
    is_transposed = any(each.name == "transA" and each.i for each in node.attribute)
    return left[-2 if is_transposed and len(left) > 1 else -1]


def _most_alive(model: onnx.ModelProto, known: Mapping[str, tuple[_Shape, int]]) -> int:
    """Return the peak bytes of computed values that later nodes, or the user, still need."""
    last: dict[str, int] = {}
    for place, node in enumerate(model.graph.node):
        last.update(dict.fromkeys(values_used_by(node), place))
    last.update({each.name: len(model.graph.node) for each in model.graph.output})
    alive: dict[str, int] = {}
    most = 0
    for place, node in enumerate(model.graph.node):
        for name in node.output:
            shape, item = known.get(name, ((0,), 0))
            alive[name] = math.prod(shape) * item
        most = max(most, sum(alive.values()))
        for name in [name for name in alive if last.get(name, -1) <= place]:
            del alive[name]
    return most


def _item_bytes(kind: int) -> int:
    try:
        return int(tensor_dtype_to_np_dtype(kind).itemsize)
    except (KeyError, TypeError, ValueError):
        return 0
