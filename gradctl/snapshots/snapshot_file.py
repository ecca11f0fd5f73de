"""The text of a snapshot: one JSON object in each line, written in one order, and read strictly.

The first line is the header, then a line for each parameter, buffer and input, a line for each output, gradient and
buffer update, and last a digest of all before. ``schema.json`` beside this file is made from the types. No torch.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

import msgspec

from gradctl.core.errors import TargetError
from gradctl.core.findings import json_schema
from gradctl.core.names import Quantity
from gradctl.core.target_files import ensure_plain

SCHEMA_VERSION = 1
Precision = Literal["float64", "native"]
# The text of a snapshot of a thousand tensors has 1 MB; beyond this it is another file.
_MOST_BYTES = 2**28


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the target is loaded. Paths are relative to the folder of the snapshot."""

    target: str
    arguments: tuple[str, ...] = ()
    input_specs: tuple[str, ...] = ()
    inputs_file: str | None = None
    weights: str | None = None
    training: bool | None = None
    loss: str | None = None


class ValuesFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The safetensors file beside the snapshot: its name, size, and digest."""

    name: str
    bytes: int
    sha256: str
    is_full: bool = False


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="line", tag="snapshot"):
    """The conditions of a snapshot.

    ``options`` is absent if the model was given in Python. ``float64_error`` says why there is no float64 run;
    ``islands`` names operators that ran in the native dtype there. ``generators`` are digests of what each random
    generator yields from the seed, ``draws`` the count and the digest of the random numbers that the run drew.
    """

    schema_version: int
    name: str
    options: LoadOptions | None = None
    seed: int
    input_mode: Literal["leaf", "clone", "constant"]
    environment: dict[str, str | int]
    generators: dict[str, str]
    draws: tuple[int, str]
    float64_error: str | None = None
    islands: tuple[str, ...] = ()
    values: ValuesFile | None = None
    without_values: str | None = None


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="line", tag="value"):
    """A parameter, buffer, input, or other tensor of the model before the run."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: str


class TensorRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is kept of one tensor in one precision.

    ``norm`` is over finite elements, ``noise`` the norm of the change when weights and inputs move by one ULP.
    ``nonfinite`` is a digest of which elements are NaN, inf or -inf. Of a tensor of few elements these are kept, of any
    other its projections on Gaussian directions, and the largest elements by their index in memory order.
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str
    norm: float = 0.0
    noise: float = 0.0
    nonfinite: str | None = None
    elements: tuple[float, ...] = ()
    projections: tuple[float, ...] = ()
    largest: tuple[tuple[int, float], ...] = ()


class Recorded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="line", tag="tensor"):
    """An output, gradient or buffer update; of a missing gradient both records are null."""

    quantity: Quantity
    name: str
    requires_grad: bool | None = None
    float64: TensorRecord | None = None
    native: TensorRecord | None = None


class End(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="line", tag="end"):
    """The SHA-256 digest of all lines before."""

    sha256: str


Line = Header | Value | Recorded | End


class SnapshotFile(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a snapshot's text."""

    header: Header
    values: tuple[Value, ...]
    tensors: tuple[Recorded, ...]


def render(content: SnapshotFile) -> bytes:
    """Return the text, with the digest in its last line."""
    lines = [msgspec.json.encode(each) + b"\n" for each in (content.header, *content.values, *content.tensors)]
    text = b"".join(lines)
    return text + msgspec.json.encode(End(sha256=hashlib.sha256(text).hexdigest())) + b"\n"


def read(path: Path) -> SnapshotFile:
    """Return the content of a snapshot.

    Raises:
        TargetError: GC133 if the file is missing, cut off, edited, of another schema, or not a snapshot.
    """
    size = ensure_plain(path, "GC133", "*.snapshot")
    if size > _MOST_BYTES:
        raise _unreadable(path, f"has {size} bytes, and is not a snapshot. Name the file that gradctl snapshot wrote")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}") from error
    return parse(content, path)


def parse(content: bytes, path: Path) -> SnapshotFile:
    """Return the content of a text; ``path`` is what messages call it. Raises as ``read``."""
    content = content.replace(b"\r\n", b"\n")  # git may have converted the ends of lines
    lines = content.splitlines(keepends=True)
    _ensure_snapshot(lines[0] if lines else b"", path)
    parsed = [_parse_line(line, number, path, is_last=line is lines[-1]) for number, line in enumerate(lines, 1)]
    *before, end = parsed
    if not isinstance(end, End):
        raise _cut_off(path)
    if end.sha256 != hashlib.sha256(b"".join(lines[:-1])).hexdigest():
        raise _unreadable(path, "was edited: its content does not have the digest of its last line. Take it again")
    header, *rest = before
    values = tuple(each for each in rest if isinstance(each, Value))
    tensors = tuple(each for each in rest if isinstance(each, Recorded))
    if not isinstance(header, Header) or [*values, *tensors] != rest:
        raise _unreadable(path, "has its lines in another order than gradctl snapshot writes them. Take it again")
    return SnapshotFile(header=header, values=values, tensors=tensors)


def schema() -> str:
    """Return the JSON schema of a line, which the package ships as ``snapshots/schema.json``."""
    return json_schema(Line, "a line of a gradctl snapshot")


def _ensure_snapshot(first: bytes, path: Path) -> None:
    """Raise unless the first line says that this is a snapshot of a schema that can be read."""
    try:
        found = msgspec.json.decode(first, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if first.startswith(b'{"line":"snapshot"'):
            raise _cut_off(path) from error
        found = {}
    if found.get("line") != "snapshot":
        raise _unreadable(path, "is not a snapshot: its first line is not a header. Write one with gradctl snapshot")
    version = found.get("schema_version")
    if version != SCHEMA_VERSION:
        said = f"has schema version {version!r}, and this gradctl reads {SCHEMA_VERSION}. Take it again"
        raise _unreadable(path, said)


def _parse_line(line: bytes, number: int, path: Path, *, is_last: bool) -> Line:
    try:
        return msgspec.json.decode(line, type=Line, strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if is_last:
            raise _cut_off(path) from error
        reason = re.sub(r"^[A-Z](?=[a-z])", lambda first: first[0].lower(), str(error)).rstrip(".")
        raise _unreadable(path, f"is damaged in line {number}: {reason}. Take it again") from error


def _cut_off(path: Path) -> TargetError:
    return _unreadable(path, "is cut off: its last line, with the digest, is missing. Copy it or take it again")


def _unreadable(path: Path, said: str) -> TargetError:
    return TargetError("GC133", f"{path} {said}.")
