"""Targets that name a model of a library: ``hf:TYPE[:CLASS][@ATTENTION]``, ``hf:FOLDER…`` and ``timm:NAME``.

They are parsed, and their names checked, without importing the library, which takes seconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

from gradctl.core.errors import TargetError, nearest

# The package that each prefix stands for.
PACKAGES = {"hf": "transformers", "timm": "timm"}
_PARTS = re.compile(r"(?P<name>.+?)(?::(?P<head>[^:@/\\]*))?(?:@(?P<attention>[^:@/\\]*))?")
_FORMATS = {"hf": "hf:TYPE, hf:TYPE:CLASS, hf:TYPE@ATTENTION or hf:FOLDER", "timm": "timm:NAME"}
# In the files of transformers that list its model types.
_TYPE = re.compile(r'"([\w.-]+)"[,:] "\w+Config"')


@dataclass(frozen=True, slots=True)
class LibraryModel:
    """A model of a library.

    Attributes:
        library: the prefix, a key of ``PACKAGES``.
        name: the model type, or the name of the model in the library.
        folder: the folder of a checkpoint, if one is named in place of a type.
        head: the name of the model's class; None takes the first one.
        attention: the attention implementation; None takes the library's default.
    """

    library: str
    name: str
    folder: Path | None = None
    head: str | None = None
    attention: str | None = None


def is_library_target(text: str) -> bool:
    """Return whether a target names a model of a library."""
    return text.partition(":")[0] in PACKAGES and ":" in text


def parse_library_target(text: str) -> LibraryModel:
    """Return the parts of a target that names a model of a library.

    Raises:
        TargetError: GC101 if it has another format, or the folder does not exist; GC125 if the library is not
            installed or has no such model type.
    """
    library, _, rest = text.partition(":")
    parts = _PARTS.fullmatch(rest)
    is_plain = parts is not None and {parts["head"], parts["attention"]} == {None}
    if parts is None or "" in parts.groups() or (library == "timm" and not is_plain):
        raise TargetError("GC101", f"{text!r} is not {_FORMATS[library]}.")
    package = PACKAGES[library]
    spec = find_spec(package)
    if spec is None:
        raise TargetError(
            "GC125", f"{text!r} needs the package {package}, which is not installed: pip install {package}."
        )
    name, head, attention = parts["name"], parts["head"], parts["attention"]
    if library == "hf" and _is_folder(name):
        return LibraryModel(library, name, _folder(name), head, attention)
    return LibraryModel(library, _model_type(name, spec) if library == "hf" else name, None, head, attention)


def _is_folder(name: str) -> bool:
    return name.startswith((".", "~")) or "/" in name or "\\" in name


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        said = f"there is no folder {name!r}. hf:FOLDER is the folder of a checkpoint; nothing is downloaded."
        raise TargetError("GC101", said)
    return folder.resolve()


def _model_type(name: str, spec: ModuleSpec) -> str:
    """Return the model type as the library spells it (``gpt-neox`` is ``gpt_neox``); as given if none are listed."""
    folder = Path(spec.origin or "").parent / "models" / "auto"
    files = [folder / "configuration_auto.py", folder / "auto_mappings.py"]
    types = {each for file in files if file.is_file() for each in _TYPE.findall(file.read_text(encoding="utf-8"))}
    spelled = {_plain(each): each for each in sorted(types)}
    found = name if name in types or not types else spelled.get(_plain(name))
    if found is None:
        near = nearest(name, types) or nearest(_plain(name), spelled)
        said = f"transformers has no model type {name!r}{near}"
        raise TargetError("GC125", f"{said}. A checkpoint is named by its folder: hf:./FOLDER.")
    return found


def _plain(name: str) -> str:
    return re.sub("[-_.]", "", name).casefold()
