"""Files of static forms: TorchScript (trace, script) and ``.pt2`` (export). Written in one step, recognised by content,
and loaded only if the user trusts them: both formats contain code.

``torch.export.load`` of torch 2.13 unpickles with ``weights_only=False`` for weights and constants that are not plain
tensors, and as a fallback if the safe loader fails (``torch/_export/serde/serialize.py``): it has no safe mode.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from gradctl.core.errors import ResourceError, TargetError, TrustError, is_out_of_memory, listed, nearest
from gradctl.core.target_files import ensure_plain
from gradctl.forms.exported.export import wrap_exported_program
from gradctl.forms.form import CannotCapture, Captured, named_tensors
from gradctl.forms.silence import silenced
from gradctl.forms.torchscript.scripted_module import wrap_script
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.archive import ensure_unpacks
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of

ArtifactFormat = Literal["torchscript", "export"]

# Suffixes that distinguish a model file from a target; its format is recognised by content.
SUFFIXES = (".pt", ".pth", ".ts", ".pt2")

_FEW = 3  # names of each kind that a message lists


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a path with the name of ``target``, in a temporary folder next to it.

    The folder is removed when the context ends; ``place`` moves the files to keep out of it.

    Raises:
        ResourceError: GC131 if the folder cannot be made.
    """
    target = target.resolve()
    folder = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if target.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if target.exists() and not target.is_file():
            raise OSError(22, "it is a device or a pipe, and not a regular file")  # root would replace /dev/null
        folder.mkdir()
    except OSError as error:
        raise unwritable(target, error) from error
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place(beside: Path, target: Path) -> None:
    """Move a file that ``staged_file`` yielded to its target, in one step, after the files written next to it.

    Raises:
        ResourceError: GC131 if it cannot be moved; the target is unchanged then.
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
        ResourceError: GC131 if the file cannot be written.
    """
    is_export = isinstance(captured.artifact, torch.export.ExportedProgram)
    write = torch.export.save if is_export else torch.jit.save
    save_by_torch(lambda content: write(captured.artifact, content), path, f"{captured.form} takes the model")


def save_by_torch(write: Callable[[io.BytesIO], object], path: Path, done: str) -> None:
    """Write a file with a function of torch; ``done`` opens the message if torch cannot serialise the program.

    Raises:
        CannotCapture: torch cannot save this one.
        ResourceError: GC131 if the file cannot be written.
    """
    content = io.BytesIO()  # given a path on a full disk, torch's C++ writer terminates the process
    try:
        with silenced():
            write(content)
    except Exception as error:  # serialising may raise anything
        if is_out_of_memory(error):
            raise
        raise CannotCapture(f"{done}, and torch cannot save it: {first_line(error)}", traceback.format_exc()) from error
    try:
        path.write_bytes(content.getbuffer())
    except OSError as error:
        raise unwritable(path, error) from error


def load(path: Path, *, trusted: bool) -> Captured:
    """Return the form in a file: ``trace`` or ``script`` for TorchScript, ``export`` for ``.pt2``.

    ``trusted``: the user trusts it, or this very run wrote it.

    Raises:
        TargetError: GC142 if it cannot be read or contains no model.
        TrustError: GC901 without ``trusted``.
    """
    return load_format(path, ensure_loadable(path, trusted=trusted))


def load_format(path: Path, file_format: ArtifactFormat) -> Captured:
    """Return the form in a file of this format that ``ensure_loadable`` accepted.

    Raises:
        TargetError: GC142 if torch cannot read it.
    """
    with reading(path):
        if file_format == "export":
            return wrap_exported_program(torch.export.load(path))
        form = "trace" if any(name.endswith("/traced_inputs.pkl") for name in _members(path)) else "script"
        return wrap_script(form, torch.jit.load(str(path)))  # type: ignore[no-untyped-call]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Silence torch while it reads a file, and turn its errors into GC142."""
    try:
        with silenced():
            yield
    except Exception as error:  # reading a program may raise anything
        if is_out_of_memory(error):
            raise
        raise unreadable(path, error) from error


def ensure_loadable(path: Path, *, trusted: bool) -> ArtifactFormat:
    """Return the format of a file if it is complete and may be loaded; errors are those of ``load``."""
    file_format = artifact_format(path)
    if not trusted:
        what = "a TorchScript program" if file_format == "torchscript" else "an exported program with pickled parts"
        raise TrustError(
            "GC901", f"{path} is {what}, code that runs when loaded. Pass --trust if you trust its author."
        )
    _ensure_undamaged(path)
    return file_format


def read_extra(path: Path, name: str) -> bytes | None:
    """Return the content of an extra file of a ``.pt2``, or None."""
    with zipfile.ZipFile(path) as archive:
        found = [member for member in archive.namelist() if member.endswith(f"extra/{name}")]
        return archive.read(found[0]) if found else None


def unreadable(path: Path, error: BaseException) -> TargetError:
    """Return GC142 for an error of torch."""
    return TargetError("GC142", f"{path} cannot be loaded by torch {torch.__version__}: {first_line(error)}.")


def artifact_format(path: Path) -> ArtifactFormat:
    """Return the format of a file, by the members of its archive; no code in it runs.

    Raises:
        TargetError: GC142 if it is missing, empty, truncated, or not a model.
        TrustError: GC903 if it unpacks to far more than its size.
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


def ensure_fits(captured: Captured, instance: Instance, name: str = "the file") -> None:
    """Raise unless parameters and buffers are those of the model, by name and shape.

    Raises:
        TargetError: GC141 with the missing and unknown names, and those of another shape.
    """
    parameters, buffers = named_tensors(module_of(instance.model))
    expected = {**parameters, **buffers}
    found = {**captured.parameters, **captured.buffers}
    missing = [each for each in expected if each not in found]
    unknown = [f"{each}{nearest(each, missing)}" for each in found if each not in expected]
    reshaped = [
        f"{each} ({list(tensor.shape)}, not {list(expected[each].shape)})"
        for each, tensor in found.items()
        if each in expected and tensor.shape != expected[each].shape
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
    if differing := "; ".join(f"{kind} {listed(names, _FEW)}" for kind, names in kinds.items() if names):
        count = f"{sum(map(len, kinds.values()))} of {len(expected.keys() | found.keys())} names"
        frozen = " It holds none at all: was it frozen?" if missing and not found else ""
        raise TargetError(
            "GC141", f"{name} is not a form of {instance.subject.target}: {count} differ: {differing}.{frozen}"
        )


def _members(path: Path) -> list[str]:
    """Return the names in a file's archive."""
    try:
        ensure_plain(path, "GC142", f"*{path.suffix}")
        with zipfile.ZipFile(path) as archive:
            # A truncated .pt2 may still end in the directory of a nested archive, that of its example inputs.
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
    """Compare the checksums that torch writes but does not check when it loads."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # damaged lengths and offsets may raise anything
        raise TargetError("GC142", f"{path} is damaged ({first_line(error)}). Write or copy it again.") from error
    if bad is not None:
        raise TargetError("GC142", f"{path} is damaged: {bad!r} does not have its checksum. Write or copy it again.")


def _no_model(path: Path, what: str, remedy: str) -> TargetError:
    return TargetError("GC142", f"{path} holds no model: it is {what}. {remedy}")


def unwritable(path: Path, error: OSError) -> ResourceError:
    """Return GC131 for a file that cannot be written."""
    if not path.parent.exists():
        reason = f"there is no folder {str(path.parent)!r}. Create it, or use another path."
    else:
        reason = f"{error.strerror or type(error).__name__}. Give a path that you may write to."
    return ResourceError("GC131", f"{str(path)!r} cannot be written: {reason}", exit_code=2)
