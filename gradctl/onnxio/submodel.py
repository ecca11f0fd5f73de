"""A part of a graph as a graph of its own, and a graph that gives out more values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

__all__ = ["giving", "part", "used_by"]


def giving(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return the graph with these values as its outputs, whatever they were."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def part(
    model: onnx.ModelProto, chosen: Collection[int], output: str, values: Mapping[str, np.ndarray[Any, Any]]
) -> onnx.ModelProto | None:
    """Return some of a graph's nodes as a graph with one output; None where a value that it takes is not known.

    Args:
        model: the graph.
        chosen: the places of the nodes, which keep their order.
        output: what it gives; one of these nodes makes it.
        values: of what may be an input, as a run had it; its types are those of the new inputs.
    """
    nodes = [node for place, node in enumerate(model.graph.node) if place in chosen]
    made = {name for node in nodes for name in node.output}
    taken = dict.fromkeys(name for node in nodes for name in used_by(node) if name and name not in made)
    own = {each.name: each for each in model.graph.initializer}
    inputs = [name for name in taken if name not in own]
    if output not in made or any(name not in values for name in inputs):
        return None
    smaller = onnx.ModelProto()
    smaller.CopyFrom(onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import))
    smaller.functions.extend(model.functions)
    smaller.graph.name = model.graph.name or "part"
    smaller.graph.node.extend(nodes)
    smaller.graph.initializer.extend(own[name] for name in taken if name in own)
    smaller.graph.input.extend(_port(name, values[name]) for name in inputs)
    smaller.graph.output.append(_port(output, values[output]))
    return smaller


def used_by(node: onnx.NodeProto) -> Iterator[str]:
    """Give what a node takes, what its subgraphs take from around them included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inside = {each.name for each in (*graph.input, *graph.initializer)}
            inside.update(name for inner in graph.node for name in inner.output)
            wanted = (name for inner in graph.node for name in used_by(inner))
            yield from (name for name in (*wanted, *(each.name for each in graph.output)) if name not in inside)


def _port(name: str, value: np.ndarray[Any, Any]) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, value.shape)
