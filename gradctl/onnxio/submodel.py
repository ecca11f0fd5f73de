"""Submodels of ONNX graphs: some nodes as a model of its own, and a model with other outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model that can be changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def select_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of a model with these values as its only outputs."""
    copy = copy_of(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def extract(
    model: onnx.ModelProto, chosen: Collection[int], output: str, values: Mapping[str, np.ndarray[Any, Any]]
) -> onnx.ModelProto | None:
    """Return some nodes of a graph as a model with one output; None if an input of it has no known value.

    Args:
        model: the graph.
        chosen: the positions of the nodes, which keep their order.
        output: its output, computed by one of these nodes.
        values: candidates for inputs, from a run; they determine the types of the new inputs.
    """
    nodes = [node for place, node in enumerate(model.graph.node) if place in chosen]
    used = _outer_values(nodes)
    own = {each.name: each for each in model.graph.initializer if each.name in used}
    inputs = [name for name in used if name not in own]
    if not any(output in node.output for node in nodes) or not values.keys() >= set(inputs):
        return None
    graph = onnx.helper.make_graph(
        nodes,
        model.graph.name or "part",
        [_port(name, values[name]) for name in inputs],
        [_port(output, values[output])],
        list(own.values()),
    )
    return onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions, graph=graph
    )


def values_used_by(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the inputs of a node, then the outer values that its subgraphs use."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inside = {each.name for each in (*graph.input, *graph.initializer)}
            inside.update(name for inner in graph.node for name in inner.output)
            used = (name for inner in graph.node for name in values_used_by(inner))
            yield from (name for name in (*used, *(each.name for each in graph.output)) if name not in inside)


def _outer_values(nodes: Sequence[onnx.NodeProto]) -> dict[str, None]:
    """Return the values that these nodes use and do not compute, each once."""
    computed = {"", *(name for node in nodes for name in node.output)}
    return dict.fromkeys(name for node in nodes for name in values_used_by(node) if name not in computed)


def _port(name: str, value: np.ndarray[Any, Any]) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, value.shape)
