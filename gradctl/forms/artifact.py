"""Files of static forms: TorchScript (trace, script) and ``.pt2`` (export). Written whole, told by content, and trusted
only where the user says so: both kinds are code.

``torch.export.load`` of torch 2.13 unpickles with ``weights_only=False`` for weights and constants that are not plain
tensors, and tries that again where the safe loader refused (``torch/_export/serde/serialize.py``): it has no safe mode.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import traceback
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gradctl.core.errors import ResourceError, TargetError, TrustError, nearest
from gradctl.forms.exported.export import of_exported_program
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.silence import silenced
from gradctl.forms.torchscript.scripted_module import of_script
from gradctl.subject.frames import first_line, is_out_of_memory
from gradctl.subject.inputs.archive import ensure_unpacks
from gradctl.subject.instance import Instance
from gradctl.subject.plainfile import ensure_plain
from gradctl.subject.signature import module_of

__all__ = [
    "SUFFIXES",
    "Kind",
    "ensure_loadable",
    "extra_of",
    "fits",
    "kind_of",
    "load",
    "loaded",
    "place",
    "save",
    "staged_file",
    "unreadable",
    "unwritable",
]

Kind = Literal["torchscript", "export"]

# Suffixes of files that are models, for telling a file from a target; what is in them is told by content.
SUFFIXES = (".pt", ".pth", ".ts", ".pt2")

_FEW = 3  # names of each kind that a message lists


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Give a path of the name of ``target``, in a folder of its own beside it.

    Whatever is left of the folder goes when the context ends: what is to stay is moved away with ``place``.

    Raises:
        ResourceError: GC131 if the folder cannot be made.
    """
    target = target.resolve()
    folder = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if target.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        folder.mkdir()
    except OSError as error:
        raise unwritable(target, error) from error
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place(beside: Path, target: Path) -> None:
    """Move a file that ``staged_file`` gave to its target, in one step; what was written next to it goes first.

    Raises:
        ResourceError: GC131 if it cannot be moved; the target is as it was.
    """
    try:
        for other in beside.parent.iterdir():
            if other != beside:
                other.replace(target.resolve().with_name(other.name))
        beside.replace(target.resolve())
    except OSError as error:
        raise unwritable(target, error) from error


def save(captured: Captured, path: Path) -> None:
    """Write the artifact of a captured form.

    Raises:
        CannotCapture: torch cannot save this one.
        ResourceError: GC131 if the disk refuses.
    """
    content = io.BytesIO()  # given a path on a disk that fills up, torch's C++ writer ends the process
    try:
        with silenced():
            if isinstance(captured.artifact, torch.export.ExportedProgram):
                torch.export.save(captured.artifact, content)
            else:
                torch.jit.save(captured.artifact, content)
    except Exception as error:  # serialising may raise anything
        if is_out_of_memory(error):
            raise
        raise CannotCapture(
            f"{captured.form} takes the model, and torch cannot save it: {first_line(error)}", traceback.format_exc()
        ) from error
    try:
        path.write_bytes(content.getbuffer())
    except OSError as error:
        raise unwritable(path, error) from error


def load(path: Path, *, trusted: bool) -> Captured:
    """Return a file as the form that it holds: ``trace`` or ``script`` for TorchScript, ``export`` for ``.pt2``.

    Args:
        path: the file.
        trusted: whether the user vouches for it, or this very run has just written it.

    Raises:
        TargetError: GC142 if it cannot be read or holds no model.
        TrustError: GC901 without ``trusted``.
    """
    return loaded(path, ensure_loadable(path, trusted=trusted))


def loaded(path: Path, kind: Kind) -> Captured:
    """Return a file of this kind as the form that it holds, once ``ensure_loadable`` has let it pass.

    Raises:
        TargetError: GC142 if torch cannot read it.
    """
    try:
        with silenced():
            if kind == "export":
                return of_exported_program(torch.export.load(path))
            form = "trace" if any(name.endswith("/traced_inputs.pkl") for name in _members(path)) else "script"
            return of_script(form, torch.jit.load(str(path)))  # type: ignore[no-untyped-call]
    except Exception as error:  # reading a program may raise anything
        if is_out_of_memory(error):
            raise
        raise unreadable(path, error) from error


def ensure_loadable(path: Path, *, trusted: bool) -> Kind:
    """Return what a file holds, if it is whole and may be loaded; errors are those of ``load``."""
    kind = kind_of(path)
    if not trusted:
        what = "a TorchScript program" if kind == "torchscript" else "an exported program with pickled parts"
        raise TrustError(
            "GC901", f"{path} is {what}, code that runs when loaded. Pass --trust if you trust its author."
        )
    _ensure_undamaged(path)
    return kind


def extra_of(path: Path, name: str) -> bytes | None:
    """Return a file of this name beside the program of a ``.pt2``, if it has one."""
    with zipfile.ZipFile(path) as archive:
        found = [member for member in archive.namelist() if member.endswith(f"extra/{name}")]
        return archive.read(found[0]) if found else None


def unreadable(path: Path, error: BaseException) -> TargetError:
    """Return GC142 for what torch raised."""
    return TargetError("GC142", f"{path} cannot be loaded by torch {torch.__version__}: {first_line(error)}.")


def kind_of(path: Path) -> Kind:
    """Return what a file holds, by the members of its archive; nothing in it is run.

    Raises:
        TargetError: GC142 if it is missing, empty, cut off, or no model.
        TrustError: GC903 if it unpacks to far more than it has.
    """
    members = [name.partition("/")[2] for name in _members(path)] + _members(path)
    if "constants.pkl" in members and any(name.startswith("code/") for name in members):
        return "torchscript"
    if "serialized_exported_program.json" in members or any(name.startswith("models/") for name in members):
        return "export"
    if any(name.startswith("data/aotinductor/") for name in members):
        raise _no_model(path, "a compiled package (AOTInductor) without its program", "Save it with torch.export.save.")
    if "data.pkl" in members:
        raise _no_model(path, "what torch.save wrote, weights or a pickled object", "Give weights with --weights.")
    raise _no_model(path, "a zip archive of another kind", "A model file is TorchScript, .pt2 or .onnx.")


def fits(captured: Captured, instance: Instance, name: str = "the file") -> None:
    """Return if parameters and buffers are those of the model, by name and shape.

    Args:
        captured: what was loaded.
        instance: a private copy of the model.
        name: what messages call the file.

    Raises:
        TargetError: GC141 with the names that are missing, unknown or of another shape.
    """
    module = module_of(instance.model)
    expected: dict[str, Tensor] = {}
    if module is not None:
        expected = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    found = {**captured.parameters, **captured.buffers}
    missing = [each for each in expected if each not in found]
    unknown = [f"{each}{nearest(each, missing)}" for each in found if each not in expected]
    reshaped = [
        f"{each} ({list(tensor.shape)}, not {list(expected[each].shape)})"
        for each, tensor in found.items()
        if each in expected and tensor.shape != expected[each].shape
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
    listed = "; ".join(f"{kind} {_listed(names)}" for kind, names in kinds.items() if names)
    if listed:
        count = f"{sum(map(len, kinds.values()))} of {len(expected.keys() | found.keys())} names"
        frozen = " It holds none at all: was it frozen?" if missing and not found else ""
        raise TargetError("GC141", f"{name} is no form of {instance.subject.target}: {count} differ: {listed}.{frozen}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def _members(path: Path) -> list[str]:
    """Return the names in a file's archive."""
    try:
        ensure_plain(path, "GC142", f"*{path.suffix}")
        with zipfile.ZipFile(path) as archive:
            # Cut off, a .pt2 still ends in the directory of another archive: the example inputs are one inside it.
            if min((member.header_offset for member in archive.infolist()), default=0) > 0:
                raise zipfile.BadZipFile
            ensure_unpacks(path, archive)
            return archive.namelist()
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            begins_well = file.read(2) == b"PK"
        if begins_well:
            raise TargetError(
                "GC142",
                f"{path} is cut off: it begins like a zip archive, and its end is missing. Write or copy it again.",
            ) from error
        raise _no_model(path, "no zip archive", "A model file is TorchScript, .pt2 or .onnx.") from error
    except (ValueError, NotImplementedError, struct.error) as error:  # names, versions and extra fields of members
        raise TargetError("GC142", f"{path} is damaged ({first_line(error)}). Write or copy it again.") from error
    except OSError as error:
        raise TargetError("GC142", f"{path} cannot be read: {error.strerror or first_line(error)}.") from error


def _ensure_undamaged(path: Path) -> None:
    """Compare the checksums that torch writes and does not look at when it loads."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # damaged lengths and offsets come out as any error
        raise TargetError("GC142", f"{path} is damaged ({first_line(error)}). Write or copy it again.") from error
    if bad is not None:
        raise TargetError("GC142", f"{path} is damaged: {bad!r} does not have its checksum. Write or copy it again.")


def _no_model(path: Path, what: str, remedy: str) -> TargetError:
    return TargetError("GC142", f"{path} holds no model: it is {what}. {remedy}")


def unwritable(path: Path, error: OSError) -> ResourceError:
    """Return what to raise where the disk refuses a file."""
    if not path.parent.exists():
        reason = f"there is no folder {str(path.parent)!r}. Create it, or give another path."
    else:
        reason = f"{error.strerror or type(error).__name__}. Give a path that you may write to."
    return ResourceError("GC131", f"{str(path)!r} cannot be written: {reason}", exit_code=2)
