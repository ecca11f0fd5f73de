"""Random ONNX graphs of tensors of [4, 4], the same with other names and in another order, and single changes of them.

A graph here is a list of nodes with names for values; all of them count, since what no node takes is an output.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Graph", "RandomNode", "drawn", "file_of", "renamed"]

_UNARY = ("Relu", "Sigmoid", "Tanh", "Neg", "LeakyRelu", "Softmax")
_BINARY = ("Add", "Sub", "Mul", "MatMul")


@dataclass(frozen=True)
class RandomNode:
    name: str
    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Graph:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[RandomNode, ...]
    constants: dict[str, np.ndarray]

    def with_node(self, place, node):
        return replace(self, nodes=(*self.nodes[:place], node, *self.nodes[place + 1 :]))

    def makers(self):
        return {node.output: node for node in self.nodes}


def drawn(seed, most=40):
    """Return a graph in which no two nodes compute the same."""
    source = random.Random(seed)
    inputs = tuple(f"x{k}" for k in range(source.randint(1, 3)))
    values, nodes, constants, seen = list(inputs), [], {}, set()
    for number in range(source.randint(4, most)):
        recent = values[-6:] if source.random() < 0.7 else values
        taken = [source.choice(recent)]
        operator = source.choice(_UNARY if source.random() < 0.5 else _BINARY)
        attributes = ()
        if operator == "LeakyRelu":
            attributes = (("alpha", source.choice((0.1, 0.2, 0.3))),)
        if operator == "Softmax":
            attributes = (("axis", source.choice((0, 1))),)
        if operator in _BINARY and source.random() < 0.5:
            name = f"w{number}"
            values_of = np.random.default_rng(source.randint(0, 10**6))
            constants[name] = values_of.standard_normal((4, 4)).astype(np.float32)
            taken.insert(source.randint(0, 1), name)
        elif operator in _BINARY:
            taken.append(source.choice(values))
        if (operator, tuple(taken), attributes) in seen:
            continue
        seen.add((operator, tuple(taken), attributes))
        node = RandomNode(f"node{number}", operator, tuple(taken), f"v{number}", attributes)
        nodes.append(node)
        values.append(node.output)
    used = {name for node in nodes for name in node.inputs}
    return Graph(inputs, tuple(node.output for node in nodes if node.output not in used), tuple(nodes), constants)


def renamed(graph, seed):
    """Return the graph with its inner names dealt out anew, and its nodes in another order that runs.

    All names stay in use, each for something else: none says what it said before.
    """
    source = random.Random(seed)
    kept = {*graph.inputs, *graph.outputs}
    inner = [node.output for node in graph.nodes if node.output not in kept]
    inner += [name for name in graph.constants if name not in kept]
    others, names = list(inner), [node.name for node in graph.nodes]
    source.shuffle(others)
    source.shuffle(names)
    new = dict(zip(inner, others, strict=True))
    pending = [
        replace(node, name=name, inputs=tuple(new.get(each, each) for each in node.inputs),
                output=new.get(node.output, node.output))
        for node, name in zip(graph.nodes, names, strict=True)
    ]  # fmt: skip
    constants = {new.get(name, name): value for name, value in graph.constants.items()}
    known, ordered = {*graph.inputs, *constants}, []
    while pending:
        ready = [node for node in pending if known.issuperset(node.inputs)]
        node = source.choice(ready)
        pending.remove(node)
        ordered.append(node)
        known.add(node.output)
    shuffled = list(constants.items())
    source.shuffle(shuffled)
    return Graph(graph.inputs, graph.outputs, tuple(ordered), dict(shuffled))


def file_of(graph, path):
    """Write the graph."""

    def ports(names):
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in names]

    nodes = [
        helper.make_node(node.operator, node.inputs, [node.output], node.name, **dict(node.attributes))
        for node in graph.nodes
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in graph.constants.items()]
    proto = helper.make_graph(nodes, "random", ports(graph.inputs), ports(graph.outputs), initializers)
    onnx.save(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
