"""Validation of an ONNX file before a library processes it: texts, types, sizes, functions that terminate.

ONNX's checker accepts data that are longer than their tensor, and functions that call themselves; Python's protobuf
returns bytes for a text that is not UTF-8.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import Message  # type: ignore[import-untyped]

from gradctl.core.errors import TargetError
from gradctl.core.expansion import Endless, expanded_size

_PACKED_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
_LARGEST = 2**63 - 1  # the range of sizes in the libraries
_FEW = 8  # dimensions that a message lists

# Exporters write graphs of up to some 100 000 nodes; functions that call each other twice reach any number.
_MOST_NODES = 2**20
_DEEPEST_CALLS = 100  # protobuf's limit of nested messages


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Return every node, those of subgraphs and of functions too."""
    for top in (model.graph, *model.functions):
        yield from _nodes_of(top)


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Return every tensor: initializers and attributes, sparse ones, those of subgraphs and functions too."""
    return (message for message in _messages(model) if isinstance(message, onnx.TensorProto))


def invalid(problem: str) -> TargetError:
    """Return GC601 for a file with invalid content; ``problem`` is the message without its remedy."""
    return TargetError("GC601", f"{problem}. Write the file again.")


def tensor_bytes(tensor: onnx.TensorProto) -> int | None:
    """Return the bytes of the elements of a tensor, or None if they are strings or of an unknown type."""
    if tensor.data_type not in onnx.TensorProto.DataType.values():
        return None
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    if name in ("UNDEFINED", "STRING"):
        return None
    count: int = math.prod(tensor.dims)
    if name in _PACKED_BITS:
        return math.ceil(count * _PACKED_BITS[name] / 8)
    return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def sizes_text(tensor: onnx.TensorProto) -> str:
    """Return the shape of a tensor for a message."""
    return f"[{', '.join([*map(str, tensor.dims[:_FEW]), *(['…'] if len(tensor.dims) > _FEW else [])])}]"


def ensure_readable(path: Path, model: onnx.ModelProto) -> None:
    """Raise if a text is not UTF-8, or a tensor has impossible sizes.

    Raises:
        TargetError: GC142 for a text, GC601 for sizes.
    """
    for text in _texts(model):
        if isinstance(text, bytes):
            said = f"{path} is damaged: the text {text[:40]!r} is no UTF-8. Write or copy it again."
            raise TargetError("GC142", said)
    for tensor in tensors(model):
        if any(size < 0 for size in tensor.dims) or _is_beyond(tensor.dims):
            raise invalid(f"{path}: the tensor {tensor.name!r} has the sizes {sizes_text(tensor)}, as none has")


def ensure_filled(path: Path, tensor: onnx.TensorProto) -> None:
    """Raise unless a tensor has as many data as its type and shape require; external data are not checked.

    Raises:
        TargetError: GC601.
    """
    says = f"{path}: the tensor {tensor.name!r}"
    if tensor.data_type not in onnx.TensorProto.DataType.values():
        raise invalid(f"{says} has elements of type {tensor.data_type}, which ONNX does not have")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    needed = tensor_bytes(tensor)
    if tensor.HasField("raw_data"):
        given, unit = len(tensor.raw_data), "bytes"
    else:
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        given, unit = len(getattr(tensor, field)), "values"
        needed = _value_count(tensor, needed)
    if needed is not None and given != needed:
        raise invalid(f"{says} holds {given} {unit}, and {sizes_text(tensor)} takes {needed}")


def ensure_ending(path: Path, model: onnx.ModelProto) -> None:
    """Raise if a function of the file calls itself, or inlining all functions gives too large a graph.

    Raises:
        TargetError: GC601.
    """
    bodies = {(each.domain, each.name, each.overload): each for each in model.functions}

    def calls(key: tuple[str, str, str]) -> list[tuple[str, str, str]]:
        return [_callee(node) for node in _nodes_of(bodies[key])] if key in bodies else []

    sizes: dict[tuple[str, str, str], int] = {}
    try:
        for key in bodies:
            expanded_size(key, calls, _DEEPEST_CALLS, sizes)
    except Endless as error:
        how = "calls itself" if error.is_cycle else f"lies in {_DEEPEST_CALLS} others"
        raise invalid(f"{path}: the function {error.key[1]!r} {how}") from error
    total = sum(sizes.get(_callee(node), 1) for node in _nodes_of(model.graph))
    if total > _MOST_NODES:
        raise TargetError(
            "GC601",
            f"{path} has {total:.1e} nodes with its functions put in their places, and at most {_MOST_NODES} are "
            "run here. Write it with fewer.",
        )


def _callee(node: onnx.NodeProto) -> tuple[str, str, str]:
    return node.domain, node.op_type, node.overload


def _nodes_of(top: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    pending: list[Any] = [top]
    while pending:
        for node in pending.pop().node:
            yield node
            for attribute in node.attribute:
                pending.extend((attribute.g, *attribute.graphs))


def _messages(message: Message) -> Iterator[Message]:
    """Yield a message and all that are in it, depth first."""
    yield message
    for kind, value in _fields(message):
        if kind == FieldDescriptor.TYPE_MESSAGE:
            for part in [value] if isinstance(value, Message) else value:
                yield from _messages(part)


def _texts(model: onnx.ModelProto) -> Iterator[str | bytes]:
    for message in _messages(model):
        for kind, value in _fields(message):
            if kind == FieldDescriptor.TYPE_STRING:
                yield from [value] if isinstance(value, str | bytes) else value


def _fields(message: Message) -> Iterator[tuple[int, Any]]:
    """Return type and value of the fields that are set; of a tensor without its numbers, which would be copied."""
    if isinstance(message, onnx.TensorProto):
        yield FieldDescriptor.TYPE_STRING, [message.name, message.doc_string]
        yield FieldDescriptor.TYPE_MESSAGE, message.external_data
    else:
        yield from ((field.type, value) for field, value in message.ListFields())


def _is_beyond(sizes: Any) -> bool:
    """Return whether the size in bytes of elements of 16 bytes exceeds the range; no larger product is computed."""
    products = itertools.accumulate((size or 1 for size in sizes), operator.mul, initial=16)
    return any(product > _LARGEST for product in products)


def _value_count(tensor: onnx.TensorProto, held_bytes: int | None) -> int | None:
    """Return the number of values in the field of a tensor's type: a packed byte, or a part of a complex, is one."""
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    if name == "UNDEFINED":
        return None
    if name in _PACKED_BITS:
        return held_bytes
    return int(math.prod(tensor.dims)) * (2 if name.startswith("COMPLEX") else 1)
