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
    nodes = [model.graph.node[place] for place in sorted(chosen)]
    used = dict.fromkeys(_free_values(nodes, {""}))
    own = {each.name: each for each in model.graph.initializer if each.name in used}
    inputs = [name for name in used if name not in own]
    if not any(output in node.output for node in nodes) or not values.keys() >= set(inputs):
        return None
    ports = {name: _port(name, values[name]) for name in (*inputs, output)}
    made = ports.pop(output)
    graph = onnx.helper.make_graph(nodes, model.graph.name or "part", [*ports.values()], [made], [*own.values()])
    return onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions, graph=graph
    )


def values_used_by(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the inputs of a node, then the outer values that its subgraphs use."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inside = {each.name for each in (*graph.input, *graph.initializer)}
            yield from _free_values(graph.node, inside, [each.name for each in graph.output])


def _free_values(nodes: Sequence[onnx.NodeProto], inside: set[str], outputs: Sequence[str] = ()) -> Iterator[str]:
    """Return the values that nodes and outputs use, and that neither the nodes compute nor ``inside`` contains."""
    computed = inside.union(*(node.output for node in nodes))
    used = [name for node in nodes for name in values_used_by(node)]
    return (name for name in (*used, *outputs) if name not in computed)


def _port(name: str, value: np.ndarray[Any, Any]) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, value.shape)
