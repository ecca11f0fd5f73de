"""The user's own files that a ``repro.py`` needs: the target's, and what these import from the same folder."""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from gradctl.core.target_files import Target

_INSTALLED = {"site-packages", "dist-packages"}


def copy_sources(target: Target, folder: Path) -> str:
    """Copy the files of the target into a new folder, and return the import name of its module.

    A module of an installed package is imported by its name, and nothing is copied.
    """
    folder.mkdir()
    start = target.file or _file_of(target.root, target.module_name)
    if start is None or not _INSTALLED.isdisjoint(start.parts):
        return target.module_name
    name = _importable(target.module_name)
    for module, file in _needed_files(target, start).items():
        is_renamed = module == target.module_name != name
        place = folder / (f"{name}.py" if is_renamed else file.relative_to(target.root))
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    return name


def _importable(module: str) -> str:
    """Return a name to import a module by: another one if its own is no identifier, or hides a module of Python."""
    if module not in sys.stdlib_module_names and all(part.isidentifier() for part in module.split(".")):
        return module
    return f"source_{''.join(each if each.isalnum() else '_' for each in module)}"


def _needed_files(target: Target, start: Path) -> dict[str, Path]:
    """Return the files of the target by module: its own, and those imported from the same folder."""
    files = {target.module_name: start}
    pending = [target.module_name]
    while pending:
        module = pending.pop()
        for imported in _imported(module, files[module]):
            file = _file_of(target.root, imported)
            if file is not None and imported not in files:
                files[imported] = file
                pending.append(imported)
    return files


def _file_of(root: Path, module: str) -> Path | None:
    """Return the file below ``root`` that is imported under this name."""
    base = root.joinpath(*module.split("."))
    return next((file for file in (base / "__init__.py", base.with_suffix(".py")) if file.is_file()), None)


def _imported(module: str, file: Path) -> Iterator[str]:
    """Yield the names that a file may import, inside functions too, and their packages."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    yield from _with_packages(package)
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_packages(alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from _with_packages(base)
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


def _with_packages(name: str) -> Iterator[str]:
    parts = name.split(".") if name else []
    yield from (".".join(parts[: count + 1]) for count in range(len(parts)))
