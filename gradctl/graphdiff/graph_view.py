"""The computation of a graph, independent of names: nodes, and the sources of their inputs.

Identity and Constant nodes are skipped: the source of a value is a graph's input, a constant (initializer or node), an
output of another node, or a value from around the graph.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from gradctl.onnxio.submodel import values_used_by
from gradctl.onnxio.validation import nodes

Graph = onnx.GraphProto | onnx.FunctionProto
_OWN_DOMAINS = ("", "ai.onnx")
_LONGEST_TEXT = 200


class Source(NamedTuple):
    """The source of a value: ``kind`` is input, constant, node, outer or none; ``of`` its position or name."""

    kind: str
    of: int | str = 0
    slot: int = 0

    @property
    def place(self) -> int:
        """Return the position of an input, constant or node."""
        return int(self.of)


class Consumer(NamedTuple):
    """A use of an output of a node: the position of the using node, or -1 for the graph's outputs, and its input.

    ``slot`` is -1 if a subgraph of the node uses it.
    """

    node: int
    slot: int
    output: int


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """An initializer, or the value of a Constant node.

    Attributes:
        name: of the value.
        tensor: None if it is sparse.
        is_initializer: whether it is an initializer, not a node.
        digest: of dtype, shape and content.
    """

    name: str
    tensor: onnx.TensorProto | None
    is_initializer: bool
    digest: bytes

    @property
    def size(self) -> int:
        """Return the number of elements, 0 for a sparse tensor."""
        return 0 if self.tensor is None else math.prod(self.tensor.dims)


@dataclass(slots=True, eq=False)
class GraphView:
    """The computation of a graph, subgraph or body of a function.

    Attributes:
        graph: the graph.
        folder: the folder of external data.
        nodes: all but Identity and Constant, in their order.
        inputs: the sources of each node's inputs.
        captured: the sources of the outer values that each node's subgraphs use.
        outputs: the sources of the graph's outputs.
        constants: all of them.
        consumers: of each node's outputs.
        input_names: of the inputs without an initializer.
    """

    graph: Graph
    folder: Path
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[tuple[Source, ...]] = field(default_factory=list)
    captured: list[tuple[Source, ...]] = field(default_factory=list)
    outputs: tuple[Source, ...] = ()
    constants: list[Constant] = field(default_factory=list)
    consumers: list[list[Consumer]] = field(default_factory=list)
    input_names: list[str] = field(default_factory=list)
    _sources: dict[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.graph, onnx.FunctionProto):
            inputs, outputs = list(self.graph.input), list(self.graph.output)
        else:
            inputs, outputs = ([each.name for each in ports] for ports in (self.graph.input, self.graph.output))
            for tensor in self.graph.initializer:
                self._add_constant(Constant(tensor.name, tensor, True, _digest(tensor, self.folder)))
            for sparse in self.graph.sparse_initializer:
                self._add_constant(Constant(sparse.values.name, None, True, _serialized(sparse)))
        self.input_names = [name for name in inputs if name not in self._sources]
        self._sources |= {name: Source("input", place) for place, name in enumerate(self.input_names)}
        for node in self.graph.node:
            self._add(node)
        self.outputs = tuple(map(self.source, outputs))
        self._add_consumers()

    def _add_consumers(self) -> None:
        for place, (sources, captured) in enumerate(zip(self.inputs, self.captured, strict=True)):
            for slot, source in (*enumerate(sources), *((-1, each) for each in captured)):
                self._consume(source, place, slot)
        for slot, source in enumerate(self.outputs):
            self._consume(source, -1, slot)

    def source(self, name: str) -> Source:
        """Return the source of a value."""
        return self._sources.get(name, Source("outer", name)) if name else Source("none")

    def name_of(self, source: Source) -> str:
        """Return the name of the value of a source."""
        if source.kind == "node":
            return str(self.nodes[source.place].output[source.slot])
        if source.kind == "constant":
            return self.constants[source.place].name
        if source.kind == "input":
            return self.input_names[source.place]
        return str(source.of) if source.kind == "outer" else ""

    def _add(self, node: onnx.NodeProto) -> None:
        operator = operator_of(node)
        if operator == "Identity" and len(node.input) == 1:
            self._sources[node.output[0]] = self.source(node.input[0])
        elif operator == "Constant" and (constant := _constant(node, self.folder)):
            self._add_constant(constant)
        else:
            self._add_computation(node)

    def _add_computation(self, node: onnx.NodeProto) -> None:
        names = list(node.input)
        captured = filter(None, list(values_used_by(node))[len(names) :])
        while names and not names[-1]:  # inputs that are left out
            names.pop()
        outputs = {name: Source("node", len(self.nodes), slot) for slot, name in enumerate(node.output) if name}
        self.nodes.append(node)
        self.inputs.append(tuple(map(self.source, names)))
        self.captured.append(tuple(dict.fromkeys(map(self.source, captured))))
        self.consumers.append([])
        self._sources |= outputs

    def _add_constant(self, constant: Constant) -> None:
        self._sources[constant.name] = Source("constant", len(self.constants))
        self.constants.append(constant)

    def _consume(self, source: Source, node: int, slot: int) -> None:
        if source.kind == "node":
            self.consumers[source.place].append(Consumer(node, slot, source.slot))


def operator_of(node: onnx.NodeProto) -> str:
    """Return ``Operator``, or ``domain::Operator`` if it is not in ONNX's own domain."""
    return node.op_type if node.domain in _OWN_DOMAINS else f"{node.domain}::{node.op_type}"


def subgraphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """Yield the subgraphs of a node, each with the name of its attribute."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        for number, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}.{number}", graph


def attributes_of(node: onnx.NodeProto, opset: int, folder: Path) -> dict[str, tuple[str, Any]]:
    """Return the text and an identity of each attribute that is not a graph, and differs from its default."""
    defaults = _defaults(node.op_type, node.domain, opset)
    found: dict[str, tuple[str, Any]] = {}
    for attribute in node.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            continue
        described = _attribute(attribute, folder)
        if attribute.name not in defaults or defaults[attribute.name][1] != described[1]:
            found[attribute.name] = shorten(described[0]), described[1]
    return dict(sorted(found.items()))


def default_of(node: onnx.NodeProto, opset: int, attribute: str) -> str | None:
    """Return the text of an attribute's default value, None if it has none."""
    return _defaults(node.op_type, node.domain, opset).get(attribute, (None, None))[0]


def shorten(text: str) -> str:
    """Return a text for a report: its first characters if it is long."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}... ({len(text)} characters)"


@lru_cache(maxsize=2048)
def _defaults(operator: str, domain: str, opset: int) -> dict[str, tuple[str, Any]]:
    try:
        schema = onnx.defs.get_schema(operator, opset, "" if domain in _OWN_DOMAINS else domain)
    except onnx.defs.SchemaError:
        return {}
    return {
        name: _attribute(attribute.default_value, Path())
        for name, attribute in schema.attributes.items()
        if attribute.default_value.type != onnx.AttributeProto.UNDEFINED
    }


def _attribute(attribute: onnx.AttributeProto, folder: Path) -> tuple[str, Any]:
    if attribute.ref_attr_name:
        return f"@{attribute.ref_attr_name}", ("reference", attribute.ref_attr_name)
    if attribute.type == onnx.AttributeProto.TENSOR:
        return _tensor_text(attribute.t, folder), _digest(attribute.t, folder)
    try:
        value = onnx.helper.get_attribute_value(attribute)
    except ValueError:
        value = attribute.SerializeToString(deterministic=True)
    values = value if isinstance(value, list) else [value]
    if all(isinstance(each, float | int | bytes) for each in values):
        return _plain_text(value), (attribute.type, tuple(values))
    plain = onnx.AttributeProto()
    plain.CopyFrom(attribute)
    plain.ClearField("doc_string")
    return "another value", plain.SerializeToString(deterministic=True)


def _plain_text(value: Any) -> str:
    if isinstance(value, list):
        return str([_plain_text(each) if isinstance(each, bytes) else each for each in value])
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _tensor_text(tensor: onnx.TensorProto, folder: Path) -> str:
    text = f"{onnx.TensorProto.DataType.Name(tensor.data_type).lower()}{list(tensor.dims)}"
    if math.prod(tensor.dims) != 1 or tensor.data_type == onnx.TensorProto.STRING:
        return text
    return f"{text} {content(tensor, folder).reshape(-1)[0]}"


def content(tensor: onnx.TensorProto, folder: Path) -> np.ndarray[Any, Any]:
    """Return a tensor's elements; external data are read."""
    array: np.ndarray[Any, Any] = onnx.numpy_helper.to_array(tensor, base_dir=str(folder))
    return array


def _digest(tensor: onnx.TensorProto, folder: Path) -> bytes:
    digest = hashlib.blake2b(f"{tensor.data_type}{list(tensor.dims)}".encode(), digest_size=16)
    if tensor.data_type == onnx.TensorProto.STRING:
        digest.update(repr(list(tensor.string_data)).encode())
    else:
        # A view, not tobytes(): that would copy each weight once more.
        digest.update(np.ascontiguousarray(content(tensor, folder)).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _serialized(message: onnx.SparseTensorProto) -> bytes:
    plain = onnx.SparseTensorProto()
    plain.CopyFrom(message)
    plain.values.ClearField("name")
    plain.indices.ClearField("name")
    return hashlib.blake2b(plain.SerializeToString(deterministic=True), digest_size=16).digest()


def _constant(node: onnx.NodeProto, folder: Path) -> Constant | None:
    """Return the value of a Constant node; None if it is an attribute of the function around it."""
    if len(node.attribute) != 1 or node.attribute[0].ref_attr_name:
        return None
    attribute = node.attribute[0]
    name = node.output[0]
    if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
        return Constant(name, None, False, _serialized(attribute.sparse_tensor))
    if attribute.type == onnx.AttributeProto.TENSOR:
        tensor = attribute.t
    else:
        kind = {"value_f": np.float32, "value_i": np.int64, "value_s": np.object_}[attribute.name[:7]]
        tensor = onnx.numpy_helper.from_array(np.array(onnx.helper.get_attribute_value(attribute), kind), name)
    return Constant(name, tensor, False, _digest(tensor, folder))


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """Return the nodes by operator, most frequent first; those of other domains are ``domain::Operator``."""
    return dict(Counter(operator_of(node) for node in nodes(model)).most_common())
