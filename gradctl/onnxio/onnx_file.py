"""ONNX files, read as untrusted data: content, external data and checker before onnxruntime reads them.

``onnx.load`` accepts an empty file as a model, and external data may name any path: an absolute one, one above the
folder, a link out of it (GHSA-538c-55jv-c5g9 and similar). All of these are errors here, each with its own message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from gradctl.core.errors import TargetError, TrustError, is_out_of_memory
from gradctl.core.target_files import ensure_plain
from gradctl.onnxio.submodel import select_outputs
from gradctl.onnxio.validation import (
    ensure_ending,
    ensure_filled,
    ensure_readable,
    invalid,
    nodes,
    sizes_text,
    tensor_bytes,
    tensors,
)
from gradctl.subject.frames import first_line

_ONNX_DOMAINS = ("", "ai.onnx")
_CPU = "CPUExecutionProvider"
_SHORT = {"float": "float32", "double": "float64"}


@dataclass(frozen=True, slots=True, eq=False)
class OnnxFile:
    """A model file that was read, whose external data are at allowed paths.

    Attributes:
        path: the file.
        model: its content; external data stay on disk.
    """

    path: Path
    model: onnx.ModelProto

    @property
    def opsets(self) -> dict[str, int]:
        """Return the version of each operator set, ONNX's own as ``ai.onnx``."""
        return {each.domain or "ai.onnx": each.version for each in self.model.opset_import}

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Return the graph's inputs without those that have an initializer."""
        own = {each.name for each in self.model.graph.initializer}
        return [each for each in self.model.graph.input if each.name not in own]


def parse(path: Path) -> OnnxFile:
    """Return the content of a file, valid or not, without its external data.

    Raises:
        TargetError: GC142 if it cannot be read or is not an ONNX model; GC601 if a tensor has impossible sizes.
    """
    model = _parsed(path)
    ensure_readable(path, model)
    return OnnxFile(path, model)


def read(path: Path) -> OnnxFile:
    """Return a file's model, checked so that it can run; its external data are checked too, and not loaded.

    Raises:
        TargetError: GC142 if it cannot be read or is not an ONNX model; GC601 if ONNX's checker rejects it.
        TrustError: GC902 if external data are outside the file's folder, or behind a link.
    """
    file = parse(path)
    for tensor in tensors(file.model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _ensure_in_folder(path, tensor)
    ensure_ending(path, file.model)
    try:
        # By path: otherwise the checker ignores external data, and rejects models above 2 GiB.
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        said = " ".join(str(error).partition("\n\n")[0].split()).rstrip(".")
        said = f"{path} is not valid ONNX: {said}{_shapeless(file.model) if 'shape' in said else ''}."
        raise TargetError("GC601", said) from error
    except Exception as error:  # a domain without a version raises a bare RuntimeError, and so on
        if is_out_of_memory(error):
            raise
        raise TargetError("GC601", f"{path} cannot be checked: {first_line(error)}.") from error
    for tensor in tensors(file.model):
        ensure_filled(path, tensor)
    return file


def session(
    file: OnnxFile,
    *,
    optimised: bool = True,
    values: Mapping[str, np.ndarray[Any, Any]] | None = None,
    provider: str | None = None,
) -> onnxruntime.InferenceSession:
    """Return an onnxruntime session of a file that ``read`` accepted, with torch's number of threads.

    Args:
        file: the file.
        optimised: whether onnxruntime optimises the graph, its default.
        values: of initializers, instead of those in the file.
        provider: execution provider, by default that of the CPU, which also runs the nodes that another one lacks.

    Raises:
        TargetError: GC602 if onnxruntime cannot run it.
    """
    options = session_options("ENABLE_ALL" if optimised else "DISABLE_ALL")
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in (values or {}).items()}
    for name, value in held.items():
        options.add_initializer(name, value)
    try:
        running = onnxruntime.InferenceSession(str(file.path), options, providers=[provider or _CPU])
    except Exception as error:  # onnxruntime has a class for each of its codes, and no common one
        if is_out_of_memory(error):
            raise
        own = {*_ONNX_DOMAINS, *(function.domain for function in file.model.functions)}
        foreign = ", ".join(sorted({node.domain for node in nodes(file.model)} - own))
        hint = f" It has operators of {foreign}, which are not ONNX's own." if foreign else ""
        said = (
            f"{file.path} cannot be run by onnxruntime {onnxruntime.__version__}: {onnxruntime_message(error)}.{hint}"
        )
        raise TargetError("GC602", said) from error
    if provider is not None and provider not in running.get_providers():  # it falls back to the CPU in silence
        raise TargetError("GC602", f"{file.path} cannot be run by {provider}, which onnxruntime could not start.")
    running.held = held  # the session reads them in place
    return running


def session_options(level: str) -> onnxruntime.SessionOptions:
    """Return options for a silent session with torch's number of threads; ``level`` as in ``ORT_ENABLE_ALL``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    return options


def session_with_outputs(file: OnnxFile, names: Sequence[str]) -> onnxruntime.InferenceSession:
    """Return a session of the graph without optimisation, with these values as its outputs.

    Raises:
        TargetError: GC602 if onnxruntime cannot run it.
    """
    options = session_options("DISABLE_ALL")
    folder = os.path.abspath(file.path.parent)  # noqa: PTH100  # a link stays one
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    content = select_outputs(file.model, names).SerializeToString()
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each of its codes, and no common one
        raise TargetError("GC602", f"{file.path} cannot be run: {onnxruntime_message(error)}.") from error


def onnxruntime_message(error: Exception) -> str:
    """Return an error of onnxruntime without its codes: ``[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not …``."""
    said = first_line(error).rpartition("[ONNXRuntimeError] : ")[2].split(" : ", 2)[-1].rstrip(".")
    said = re.sub(r"^Load model from .*? failed: ?", "", said)
    return re.sub(r"/\S+\.(?:cc|h):\d+ .*?\) ", "", said)  # line and signature of its C++ function


def onnx_dtype_name(number: int) -> str:
    """Return torch's name of an element type of ONNX: ``float32``."""
    if number not in onnx.TensorProto.DataType.values():
        return f"type {number}"
    name = str(onnx.TensorProto.DataType.Name(number)).lower()
    return _SHORT.get(name, name)


def initializers(file: OnnxFile) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the graph's initializers by name; those of a type that torch does not have are skipped."""
    for proto in file.model.graph.initializer:
        try:
            array = onnx.numpy_helper.to_array(proto, base_dir=str(file.path.parent))
            yield proto.name, torch.from_numpy(array.copy())
        except TypeError:  # strings, and types of less than 8 bits
            continue


def _shapeless(model: onnx.ModelProto) -> str:
    """Return the inputs and outputs without a shape, which the checker rejects without naming them."""
    ports = [
        repr(port.name)
        for port in (*model.graph.input, *model.graph.output)
        if port.type.HasField("tensor_type") and not port.type.tensor_type.HasField("shape")
    ]
    return f" ({', '.join(ports)}). Give each its sizes, by name where they are free" if ports else ""


def _parsed(path: Path) -> onnx.ModelProto:
    try:
        size = ensure_plain(path, "GC142", "*.onnx")
        if size > onnx.checker.MAXIMUM_PROTOBUF:
            said = f"{path} has {size / 2**30:.1f} GiB, and an ONNX file at most 2. Write its weights as external data."
            raise TargetError("GC142", said)
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise TargetError("GC142", f"{path} cannot be read: {error.strerror or first_line(error)}.") from error
    except DecodeError as error:
        raise TargetError("GC142", f"{path} is damaged, or no ONNX file. Write or copy it again.") from error
    if not model.opset_import or not model.HasField("graph"):
        raise TargetError("GC142", f"{path} holds no ONNX graph with an opset. Write it again.")
    return model


def _ensure_in_folder(path: Path, tensor: onnx.TensorProto) -> None:
    """Raise unless a tensor's external data are part of a regular file in the model's folder, of the right size."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    says = f"{path}: the external data of {tensor.name!r}"
    if not location or "\0" in location:
        raise invalid(f"{says} have no file name as their location")
    data = path.parent / location
    try:
        if problem := _trust_problem(path.parent, location):
            raise TrustError("GC902", f"{says} are at {problem} beside the file.")
        if not data.is_file():
            kind = "is no plain file" if data.exists() else "is not there"
            raise TargetError("GC142", f"{says} are in {str(data)!r}, which {kind}. Copy it beside the model.")
        status = data.stat()
    except OSError as error:
        raise TargetError("GC142", f"{says} cannot be read: {error.strerror or first_line(error)}.") from error
    if status.st_nlink > 1:
        raise TrustError(
            "GC902",
            f"{says} are in {location!r}, which has {status.st_nlink} hard links: it may be a file of another folder. "
            "Copy it.",
        )
    _ensure_inside(says, tensor, entries, status.st_size)


def _trust_problem(folder: Path, location: str) -> str:
    """Return the reason why external data must not be read, and the remedy; an empty text if they may be read."""
    paths = PurePosixPath(location), PureWindowsPath(location)
    if any(path.is_absolute() for path in paths):
        return f"the absolute path {location!r}. Put them"
    if any(".." in path.parts for path in paths):
        return f"{location!r}, outside its folder. Put them"
    if not Path(os.path.realpath(folder / location)).is_relative_to(os.path.realpath(folder)):
        return f"{location!r}, a link out of its folder. Copy them"
    # The checker rejects links too.
    return f"{location!r}, a symbolic link. Copy them" if (folder / location).is_symlink() else ""


def _ensure_inside(says: str, tensor: onnx.TensorProto, entries: dict[str, str], size: int) -> None:
    needed = tensor_bytes(tensor)
    if needed is None:
        raise invalid(f"{says} are of {onnx_dtype_name(tensor.data_type)}, which no file holds")
    offset = _number(says, entries, "offset", 0)
    length = _number(says, entries, "length", max(needed, size - offset))  # by default to the end of the file
    if offset < 0 or length < 0 or offset + length > size:
        raise TargetError(
            "GC142",
            f"{says} are bytes {offset} to {offset + length} of {entries['location']!r}, which has {size}. "
            "Write or copy it again.",
        )
    if length != needed:
        raise invalid(f"{says} have {length} bytes, and {sizes_text(tensor)} takes {needed}")


def _number(says: str, entries: dict[str, str], key: str, default: int) -> int:
    try:
        return int(entries.get(key, default))
    except ValueError as error:
        raise invalid(f"{says} have the {key} {entries[key][:40]!r}, which is no number") from error
