"""The safetensors file beside a snapshot: inputs, parameters and buffers, and with ``--full`` all recorded tensors.

Its name holds its digest, so that a text and its values are a pair at any moment: the new values are written under
another name first, then the text that names them is moved into place, then the old values are removed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gradctl.comparison.difference import Key
from gradctl.core.errors import TargetError
from gradctl.core.target_files import ensure_plain
from gradctl.forms.artifact import place, staged_file, unwritable
from gradctl.snapshots.snapshot_file import Precision, SnapshotFile, TensorRecord, ValuesFile
from gradctl.snapshots.tensor_records import plain

# Values that need more are left out, unless --full asks for all.
MOST_BYTES = 64 * 2**20


def full_name(precision: Precision, key: Key) -> str:
    """Return the name of a recorded tensor in a values file."""
    quantity, name = key
    return f"{precision}/{quantity}/{name}"


def size_of(values: Mapping[str, Tensor]) -> int:
    """Return the bytes of the elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in values.values())


def pack(values: Mapping[str, Tensor]) -> bytes:
    """Return the content of a safetensors file; a complex tensor is one of pairs."""
    stored = {}
    for name, tensor in values.items():
        found = plain(tensor)
        found = torch.view_as_real(found) if found.is_complex() else found
        stored[name] = found.contiguous().clone()
    return safetensors.torch.save(stored)


def describe(path: Path, content: bytes, *, is_full: bool) -> ValuesFile:
    """Return what the header says of the values beside the snapshot at ``path``."""
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"{path.name}.{sha256[:8]}.safetensors"
    return ValuesFile(name=name, bytes=len(content), sha256=sha256, is_full=is_full)


def write_pair(path: Path, text: bytes, values: ValuesFile | None, content: bytes | None) -> None:
    """Write a snapshot and its values, the values first, and remove values that no snapshot of this name needs.

    A process that is ended between two steps leaves the old snapshot with its values, or the new one with its own.

    Args:
        path: of the snapshot.
        text: of the snapshot.
        values: what its header says of the values; None if it has none.
        content: of the values; None if the file is there already.

    Raises:
        ResourceError: GC131 if a file cannot be written.
    """
    with staged_file(path) as beside:
        try:
            if values is not None and content is not None:
                beside.with_name(values.name).write_bytes(content)
            beside.write_bytes(text)
        except OSError as error:
            raise unwritable(path, error) from error
        place(beside, path)
    kept = values.name if values is not None else ""
    own = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.safetensors")
    for other in path.resolve().parent.iterdir():
        if own.fullmatch(other.name) and other.name != kept:
            other.unlink(missing_ok=True)


def read_values(path: Path, snapshot: SnapshotFile) -> dict[str, Tensor]:
    """Return the stored tensors by name; none if the snapshot has no values file.

    Raises:
        TargetError: GC133 if the file is missing, or not the one that the snapshot was written with.
    """
    described = snapshot.header.values
    if described is None:
        return {}
    file = path.resolve().with_name(Path(described.name).name)
    remedy = f"Copy it from where {path.name} was taken, or take the snapshot again"
    if not file.is_file():
        raise TargetError("GC133", f"{file}, the values of {path}, is missing. {remedy}.")
    size = ensure_plain(file, "GC133", "*.safetensors")
    content = file.read_bytes() if size == described.bytes else b""
    if hashlib.sha256(content).hexdigest() != described.sha256:
        said = f"has {size} bytes, not {described.bytes}" if size != described.bytes else "has another digest"
        raise TargetError("GC133", f"{file} is not the values file that {path} was written with: it {said}. {remedy}.")
    try:
        stored = safetensors.torch.load(content)
    except SafetensorError as error:
        raise TargetError("GC133", f"{file} is not a safetensors file: {error}. {remedy}.") from error
    dtypes = {value.name: value.dtype for value in snapshot.values}
    for each in snapshot.tensors:
        of_each: dict[Precision, TensorRecord | None] = {"float64": each.float64, "native": each.native}
        for precision, record in of_each.items():
            if record is not None:
                dtypes[full_name(precision, (each.quantity, each.name))] = record.dtype
    return {name: _as_recorded(tensor, dtypes, name) for name, tensor in stored.items()}


def storable(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a file can hold: strided ones, not quantized."""
    return {name: each for name, each in values.items() if each.layout == torch.strided and not each.is_quantized}


def _as_recorded(tensor: Tensor, dtypes: Mapping[str, str], name: str) -> Tensor:
    return torch.view_as_complex(tensor) if dtypes.get(name, "").startswith("complex") else tensor
