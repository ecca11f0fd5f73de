"""The files that a user names: found and checked without torch, so that a wrong name is reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradctl.core.errors import TargetError, nearest
from gradctl.core.library_targets import LibraryModel, is_library_target, parse_library_target
from gradctl.core.target_options import TargetOptions

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
INPUT_SUFFIXES = (".npz", ".pb", *WEIGHT_SUFFIXES)

_FEW = 8  # files that a message lists


def ensure_files(options: TargetOptions, model_file: Path | None = None, *, is_program: bool = True) -> None:
    """Raise if a file that a command is to read is missing or of the wrong kind; none is opened.

    Args:
        options: target, inputs and weights.
        model_file: an ONNX, TorchScript or ``.pt2`` file beside the target.
        is_program: whether the target is a program; if not, it is such a file.

    Raises:
        TargetError: GC101, GC102 or GC125 as ``parse_target``; GC122 as ``tensor_file``; GC142 for a model file.
    """
    if is_program:
        parse_target(options.target)
    for path in (None if is_program else Path(options.target), model_file):
        if path is not None:
            ensure_plain(path, "GC142", f"*{path.suffix}")
    for file, suffixes in ((options.inputs_file, INPUT_SUFFIXES), (options.weights, WEIGHT_SUFFIXES)):
        if file is not None:
            tensor_file(file, suffixes)


def tensor_file(path: Path, suffixes: Sequence[str]) -> Path:
    """Return the path of a file of tensors: of an ONNX test data set, the first file in its folder.

    Raises:
        TargetError: GC122 if the file is missing, empty, or has none of ``suffixes``.
    """
    first = path / "input_0.pb"
    with _readable(path, "GC122"):
        path = first if ".pb" in suffixes and first.is_file() else path
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise TargetError("GC122", f"{path} has an unsupported suffix; supported: {', '.join(suffixes)}.")
    ensure_plain(path, "GC122", f"*{suffix}")
    return path


def ensure_plain(path: Path, code: str, alike: str) -> int:
    """Return the bytes of a regular file, or of one behind a link: a pipe would block, and a device never ends.

    Raises:
        TargetError: with ``code``, if it is a folder, missing (a file like ``alike``, for example ``*.onnx``, is
            suggested), not a regular file, empty, or the system refuses its name.
    """
    with _readable(path, code):
        if path.is_dir():
            raise TargetError(code, f"{path} is a folder; name a file in it.")
        if not path.exists():
            near = nearest(path.name, (file.name for file in path.parent.glob(alike)))
            raise TargetError(code, f"there is no file {str(path)!r}{near}.")
        if not path.is_file():
            raise TargetError(code, f"{path} is a pipe or a device, not a file. Write its contents to a file.")
        size = path.stat().st_size
    if size == 0:
        raise TargetError(code, f"{path} is empty. Write it again.")
    return size


@contextmanager
def _readable(path: Path, code: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a name too long, a folder that may not be entered
        raise TargetError(code, f"{path} cannot be read: {error.strerror}.") from error


@dataclass(frozen=True, slots=True)
class Target:
    """The parts of ``path/to/file.py:NAME`` or ``package.module:NAME``, or a model of a library (``hf:llama``).

    NAME can be ``ns::op``, an operator.

    Attributes:
        place: the file or module.
        name: the dotted name in it; None takes the default.
        file: the file, if ``place`` is one.
        module_name: for the import: within its package, if it is in one.
        root: the folder to import from.
        model: the model of a library, which no file defines.
    """

    place: str
    name: str | None
    file: Path | None
    module_name: str
    root: Path
    model: LibraryModel | None = None


def parse_target(text: str) -> Target:
    """Return the parts of a target, its file found.

    Raises:
        TargetError: GC101 if the file is missing, a folder or not a Python file, or the module's name is invalid;
            GC102 if what is after the colon is no name; GC125 as ``parse_library_target``.
    """
    if is_library_target(text):
        return Target(text, None, None, text, Path.cwd(), parse_library_target(text))
    place, name = _split_name(text)
    try:
        if _is_file_name(place):
            file = _existing(Path(place))
            return Target(place, name, file, *_package_of(file))
    except OSError as error:  # a name too long, a folder that may not be entered
        raise TargetError("GC101", f"{place!r} cannot be looked up: {error.strerror}.") from error
    if not all(part.isidentifier() for part in place.split(".")):
        raise TargetError("GC101", f"{place!r} is neither a file nor a module. Write FILE.py:NAME or MODULE:NAME.")
    return Target(place, name, None, place, Path.cwd())


def _split_name(text: str) -> tuple[str, str | None]:
    """Return what is before the colon, and the name after it."""
    place, colon, name = text.rpartition(":")
    if place.endswith(":"):  # FILE.py:ns::op, an operator of torch.library
        place, colon, namespace = place.removesuffix(":").rpartition(":")
        parts, name = [namespace, *name.split(".")], f"{namespace}::{name}"
    else:
        parts = name.split(".")
    if not colon or (len(place) == 1 and name[:1] in ("\\", "/")):  # C:\net.py
        return text, None
    if not all(part.isidentifier() or part.isdecimal() for part in parts):
        raise TargetError("GC102", f"{name!r} after the colon of {text!r} is not a name. Write FILE.py:NAME.")
    return place, name


def _is_file_name(place: str) -> bool:
    """Return whether the place is a file or folder, not a module; a package in this folder is a module."""
    path = Path(place)
    is_package = path.is_dir() and (path / "__init__.py").is_file()
    is_written_so = place.endswith(".py") or "/" in place or "\\" in place
    return is_written_so or (bool(place) and path.exists() and not is_package)


def _existing(path: Path) -> Path:
    """Return the absolute path of a Python file, or say what is there instead."""
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.py"))
        names = f" In it: {', '.join(files[:_FEW])}." if files else " It holds no .py file."
        raise TargetError("GC101", f"{str(path)!r} is a folder; name a file in it.{names}")
    if not path.is_file():
        folder = path.parent
        if not folder.is_dir():
            raise TargetError("GC101", f"there is no file {str(path)!r}: there is no folder {str(folder)!r}.")
        near = nearest(path.name, (file.name for file in folder.glob("*.py")))
        raise TargetError("GC101", f"there is no file {str(path)!r}{near}. Paths start at {str(Path.cwd())!r}.")
    if path.suffix != ".py":
        raise TargetError("GC101", f"{str(path)!r} is not a Python file. Name the .py file that makes the model.")
    return path.resolve()


def _package_of(file: Path) -> tuple[str, Path]:
    """Return the dotted name of ``file`` within its packages, and the folder that holds the outermost."""
    parts = [] if file.name == "__init__.py" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts) if parts else file.stem, folder
