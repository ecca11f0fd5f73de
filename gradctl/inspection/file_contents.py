"""The contents of a model file: operators by count, inputs, outputs, parameters, opset. Nothing is compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx
import torch
from torch import Tensor

from gradctl.comparison.difference import dtype_name
from gradctl.core.inspection import BufferRow, Inspection, ParameterRow, Port, Semantic, Source
from gradctl.core.names import buffer_name, parameter_name
from gradctl.forms.artifact import load
from gradctl.forms.form import Captured
from gradctl.graphdiff.graph_view import operators
from gradctl.onnxio.onnx_file import OnnxFile, onnx_dtype_name, parse
from gradctl.onnxio.session import port_text
from gradctl.onnxio.validation import tensor_bytes


def inspect_file(path: Path, *, trusted: bool) -> Inspection:
    """Return the contents of a TorchScript, ``.pt2`` or ONNX file.

    Raises:
        TargetError: GC142 if it cannot be read or contains no model.
        TrustError: GC901 for TorchScript and ``.pt2`` without ``trusted``.
    """
    if path.suffix.lower() == ".onnx":
        return inspect_onnx(parse(path), str(path))
    return inspect_captured(load(path, trusted=trusted), str(path))


def inspect_captured(captured: Captured, name: str) -> Inspection:
    """Return the contents of a captured form, in memory or loaded from a file, with the name ``name``.

    Its parameters and buffers are those of the model; in a joint ONNX file they are inputs, not initializers.
    """
    program = captured.artifact
    is_export = isinstance(program, torch.export.ExportedProgram)
    if isinstance(program, OnnxFile):
        found = inspect_onnx(program, name)
    else:
        inputs, outputs = _export_ports(program) if is_export else _script_ports(program)
        source: Source = "export" if is_export else "torchscript"
        found = Inspection(subject=name, source=source, inputs=inputs, outputs=outputs, operators=captured.operators)
    return msgspec.structs.replace(
        found,
        parameters=parameter_rows(captured.parameters),
        buffers=tuple(
            BufferRow(name=buffer_name(name), **shape_and_dtype(each)) for name, each in captured.buffers.items()
        ),
        elements=element_count(captured.parameters.values()),
        bytes=byte_count([*captured.parameters.values(), *captured.buffers.values()]),
        guards=tuple(_guards(program)) if is_export else (),
    )


def parameter_rows(parameters: dict[str, Tensor], unused: frozenset[str] | None = None) -> tuple[ParameterRow, ...]:
    """Return a row for each storage, tied names together.

    Args:
        parameters: by qualified name.
        unused: names without a gradient after one call and its backward; None if unknown.
    """
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in parameters.items():
        groups.setdefault(_storage(tensor), []).append((parameter_name(name), tensor))

    def row(group: list[tuple[str, Tensor]]) -> ParameterRow:
        (name, tensor), *others = group
        frozen = not tensor.requires_grad
        is_unused = None if unused is None or frozen else name in unused
        tied = tuple(other for other, _ in others)
        return ParameterRow(name=name, **shape_and_dtype(tensor), tied=tied, frozen=frozen, unused=is_unused)

    return tuple(map(row, groups.values()))


def shape_and_dtype(tensor: Tensor) -> dict[str, Any]:
    """Return these two fields of a row."""
    return {"shape": tuple(tensor.shape), "dtype": dtype_name(tensor.dtype)}


def element_count(tensors: Iterable[Tensor]) -> int:
    """Return the elements of some tensors, each storage once."""
    return sum(tensor.numel() for tensor in {_storage(tensor): tensor for tensor in tensors}.values())


def byte_count(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors, each storage once."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in {_storage(tensor): tensor for tensor in tensors}.values()
    )


def _storage(tensor: Tensor) -> int:
    is_plain = tensor.layout == torch.strided and tensor.numel() and tensor.data_ptr()
    return tensor.data_ptr() if is_plain else id(tensor)


def _script_ports(scripted: Any) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    forward = getattr(scripted, "forward", scripted)  # a ScriptFunction is its own forward
    schema = forward.schema
    inputs = [Port(name=each.name, type=str(each.type)) for each in schema.arguments if each.name != "self"]
    return tuple(inputs), tuple(Port(name=each.name, type=str(each.type)) for each in schema.returns)


def _export_ports(program: torch.export.ExportedProgram) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature

    def ports(names: Sequence[Any]) -> tuple[Port, ...]:
        return tuple(port(str(name), values.get(str(name), name)) for name in names)

    return ports(signature.user_inputs), ports(signature.user_outputs)


def port(name: str, value: Any) -> Port:
    """Return an input or output with its type: ``float32[2, 3]``, or the class of a value that is not a tensor."""
    if isinstance(value, Tensor):
        return Port(name=name, type=f"{dtype_name(value.dtype)}[{', '.join(map(str, value.shape))}]")
    return Port(name=name, type=type(value).__name__)


def _guards(program: torch.export.ExportedProgram) -> Iterator[str]:
    """Return the ranges of sizes, by the symbol that the inputs show."""
    for symbol, values in program.range_constraints.items():
        upper = str(values.upper)
        yield f"{symbol} >= {values.lower}" + ("" if "oo" in upper else f" and <= {upper}")


def inspect_onnx(file: OnnxFile, name: str) -> Inspection:
    """Return the contents of an ONNX file; external data are not read.

    Args:
        file: the file.
        name: its name in the inspection.
    """
    own = file.model.graph.initializer
    parameters = [
        ParameterRow(name=parameter_name(each.name), shape=tuple(each.dims), dtype=onnx_dtype_name(each.data_type))
        for each in own
    ]
    return Inspection(
        subject=name,
        source="onnx",
        inputs=tuple(_onnx_port(each) for each in file.inputs),
        outputs=tuple(_onnx_port(each) for each in file.model.graph.output),
        parameters=tuple(parameters),
        elements=sum(math.prod(each.dims) for each in own),
        bytes=sum(tensor_bytes(each) or 0 for each in own),
        semantics=tuple(_random_inputs(file)),
        operators=operators(file.model),
        opsets=file.opsets,
    )


def _random_inputs(file: OnnxFile) -> Iterator[Semantic]:
    """Yield the random inputs, by the distributions in the metadata that ``export --graph joint`` writes."""
    inputs = {each.name for each in file.inputs}
    for entry in file.model.metadata_props:
        if entry.key not in inputs:
            continue
        try:
            (first, name), *parameters = json.loads(entry.value).items()
        except (ValueError, AttributeError):  # metadata of another tool
            continue
        if first == "distribution":
            said = ", ".join([str(name), *(f"{key} = {value}" for key, value in parameters)])
            yield Semantic(kind="random numbers", name=entry.key, message=said)


def _onnx_port(value: onnx.ValueInfoProto) -> Port:
    is_typed = value.type.WhichOneof("value") is not None
    return Port(name=value.name, type=port_text(value).removesuffix("_type") if is_typed else "unknown")
