"""Files of tensors, read without running anything from them: ``.safetensors``, ``.pt`` (weights-only), ``.npz``, and
ONNX's test data sets (a folder of ``input_0.pb``, ``input_1.pb``, …).
"""

from __future__ import annotations

import lzma
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gradctl.core.errors import GradctlError, TargetError, TrustError, is_out_of_memory
from gradctl.core.expansion import Endless, expanded_size
from gradctl.core.target_files import tensor_file
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.archive import ensure_unpacks, read_array

# A RuntimeError stands for what is encrypted, or packed as Python's zipfile does not unpack.
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, struct.error, RuntimeError)
_DEEPEST = 100  # lists and dicts in each other, as code that follows them can
_MOST_CONTAINERS = 2**20


def read_tensors(path: Path, suffixes: Sequence[str], remedy: str) -> Any:
    """Return what a file holds, its tensors on the CPU: a dict of tensors, or for ``.pt`` whatever plain value it is.

    Args:
        path: the file; of a data set its folder, or the first of its files.
        suffixes: those that are understood here.
        remedy: what to do if the file holds pickled code; a sentence.

    Raises:
        TargetError: GC122 if the file is missing, of another kind, empty, truncated or not what its suffix says.
        TrustError: GC901 if it could only be read by running code from it.
    """
    path = tensor_file(path, suffixes)
    readers = {".npz": _read_npz, ".pb": _read_data_set, ".safetensors": _read_safetensors}
    read: Callable[[Path, str], Any] = readers.get(path.suffix.lower(), _read_pickled_weights)
    try:
        return read(path, remedy)
    except OSError as error:
        raise TargetError("GC122", f"{path} cannot be read: {error.strerror or first_line(error)}.") from error


def _read_safetensors(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise _damaged(path, "safetensors", str(error)) from error


def _read_npz(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    if not zipfile.is_zipfile(path):
        raise _damaged(path, "npz", "it is no zip archive")
    tensors = {}
    try:
        with zipfile.ZipFile(path) as archive:
            ensure_unpacks(path, archive)
            for each in archive.infolist():
                name = each.filename.removesuffix(".npy")
                with archive.open(each) as member:
                    tensors[name] = _as_tensor(path, name, read_array(member, each.file_size))
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise TrustError("GC901", f"{path} holds pickled objects, which run code when loaded. {remedy}") from error
        raise _damaged(path, "npz", str(error)) from error
    except _ZIP_ERRORS as error:
        raise _damaged(path, "npz", str(error)) from error
    return tensors


def _read_data_set(path: Path, remedy: str) -> tuple[torch.Tensor, ...]:
    """Return the tensor of a file, or those of ``input_0.pb`` and of what follows it, in order."""
    import onnx  # seldom needed, and it takes a moment
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    paths = [path]
    if path.name == "input_0.pb":
        while (following := path.with_name(f"input_{len(paths)}.pb")).is_file():
            paths.append(following)
    tensors = []
    for each in paths:
        try:
            proto = onnx.TensorProto.FromString(each.read_bytes())
            if proto.data_location == onnx.TensorProto.EXTERNAL:
                raise TrustError("GC902", f"{each} keeps its numbers in another file, which is not read. {remedy}")
            if any(size < 0 for size in proto.dims):
                raise ValueError(f"its sizes are {list(proto.dims)}")
            tensors.append(_as_tensor(each, proto.name, onnx.numpy_helper.to_array(proto)))
        except KeyError as error:
            raise _damaged(each, "ONNX tensor", f"its type is {error}, which ONNX does not have") from error
        except (DecodeError, TypeError, ValueError) as error:
            raise _damaged(each, "ONNX tensor", first_line(error)) from error
    return tuple(tensors)


def _as_tensor(path: Path, name: str, array: Any) -> torch.Tensor:
    try:
        # Of a byte order of its own where that is not this machine's; torch knows no other.
        return torch.from_numpy(np.asarray(array).astype(array.dtype.newbyteorder("="), copy=True, order="C"))
    except TypeError:
        said = f"{path}: {name!r} is an array of {array.dtype}, which torch has no tensor for. Store numbers."
        raise TargetError("GC122", said) from None


def _read_pickled_weights(path: Path, remedy: str) -> Any:
    """Return the result of ``torch.load(weights_only=True)``, which fails in many ways, some by a wrong byte."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                ensure_unpacks(path, archive)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a TorchScript archive looks like one: refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
        _ensure_ending(content)
        return content
    except (OSError, TrustError):
        raise
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error), remedy) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "weights_only=True" in str(error):  # TorchScript, and the tar archives of torch 0.1
            what = "TorchScript program" if "TorchScript" in str(error) else "program"
            raise TrustError("GC901", f"{path} is a {what}, which runs when loaded. {remedy}") from error
        raise _damaged(path, "torch.save", str(error)) from error


def _refused(path: Path, said: str, remedy: str) -> GradctlError:
    """Return GC901 for a file whose pickle would run code, or GC122 for one that is no pickle."""
    classes = _pickled_classes(path, said)
    if not classes and not _looks_pickled(path):
        return _damaged(path, "torch.save", said)
    named = f" ({', '.join(classes[:3])}{', …' if len(classes) > 3 else ''})" if classes else ""
    return TrustError("GC901", f"{path} holds pickled code{named}, which runs when loaded. {remedy}")


def _ensure_ending(content: Any) -> None:
    """Raise where lists and dicts hold each other without end, or each the next one twice."""
    found = {id(content): content}  # by which objects are known, and kept

    def inside(key: int) -> list[int]:
        value = found[key]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        held = {id(part): part for part in parts if isinstance(part, dict | list | tuple)}
        found.update(held)
        return [id(part) for part in parts if id(part) in held]

    try:
        count = expanded_size(id(content), inside, _DEEPEST)
    except Endless as error:
        raise ValueError(f"of its lists and dicts, one is such that {error}") from error
    if count > _MOST_CONTAINERS:
        raise ValueError(f"its lists and dicts hold each other {count:.1e} times")


def _pickled_classes(path: Path, said: str) -> list[str]:
    """Return the classes and functions that loading would call: torch lists them, or names one in its refusal."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it reads only zip archives, and only whole ones
        return re.findall(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", said)[:1]


def _looks_pickled(path: Path) -> bool:
    """Return whether a file is a pickle (from protocol 2 on it starts with this byte), bare or in a zip archive."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def _damaged(path: Path, kind: str, said: str) -> TargetError:
    """Return GC122 for bytes that are not what they should be; ``said`` by the reader, its first sentence."""
    sentence = re.split(r"\.\s|\n", said.strip())[0].rstrip(" .:")
    why = f" ({sentence})" if sentence else ""
    return TargetError("GC122", f"{path} is damaged, or no {kind} file{why}. Write or copy it again.")
