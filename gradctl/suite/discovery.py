"""The targets of a run: those of the configuration, and files with a ``make_model`` at the given paths."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.suite.configuration import Project, TargetEntry

_NOT_LOOKED_INTO = ("__pycache__", "node_modules", "site-packages", "build", "dist", "venv")


def select_entries(project: Project, paths: Sequence[str]) -> list[TargetEntry]:
    """Return the targets of a run, in their order.

    Args:
        project: without ``paths``, all targets of its configuration, or what is found in its folder if it has none.
        paths: folders, to look in for files with a ``make_model``; files; targets. What the configuration says of
            these holds.

    Raises:
        TargetError: GC101 if there is no such path.
        NothingToCheck: GC110 if no target is found.
    """
    configured = project.configuration.targets
    if paths or not configured:
        found = [entry for path in paths or [str(project.root)] for entry in _at(project, path)]
    else:
        found = list(configured)
    if not found:
        where = ", ".join(paths) or str(project.root)
        raise NothingToCheck("GC110", f"no Python file in {where} has a make_model. Name a target: FILE.py:NAME.")
    return list({entry.title: entry for entry in found}.values())


def module_and_name(target: str) -> tuple[str, str]:
    """Return file or module, and the name after the colon or nothing."""
    place, colon, name = target.rpartition(":")
    return (place, name) if colon and len(place) > 1 else (target, "")


def relative_target(root: Path, target: str) -> str:
    """Return a target of a configuration with its path relative to the current folder."""
    place, name = module_and_name(target)
    if not _is_file(place):
        return target
    file = _absolute(root / place)
    here = Path.cwd()
    text = str(file.relative_to(here) if file.is_relative_to(here) else file)
    return f"{text}:{name}" if name else text


def _at(project: Project, path: str) -> Iterator[TargetEntry]:
    configured = project.configuration.targets
    if Path(path).is_dir():
        folder = Path(path).resolve()
        inside = [entry for entry in configured if (file := _file_of(project, entry)) and file.is_relative_to(folder)]
        yield from inside
        known = {_file_of(project, entry) for entry in inside}
        found = _with_make_model(_absolute(Path(path)))
        yield from (_named(project, str(file)) for file in found if file.resolve() not in known)
        return
    place, name = module_and_name(path)
    if _is_file(place) and not Path(place).is_file():
        raise TargetError("GC101", f"there is no {place!r}. Give a folder, a file, or a target.")
    given = _named(project, path)
    same = [
        entry
        for entry in configured
        if _is_same(project, entry, given) and name in ("", module_and_name(entry.target)[1])
    ]
    yield from same or [given]


def _is_same(project: Project, entry: TargetEntry, other: TargetEntry) -> bool:
    """Return whether two entries name one file, by whatever links and dots, or one module."""
    file = _file_of(project, entry)
    if file is not None:
        return file == _file_of(project, other)
    return module_and_name(entry.target)[0] == module_and_name(other.target)[0]


def _named(project: Project, target: str) -> TargetEntry:
    """Return the entry of a target that is named from the current folder, its path relative to the configuration."""
    try:
        target.encode()
    except UnicodeEncodeError as error:
        raise TargetError("GC101", f"the name {target!r} is not UTF-8, which reports are. Rename it.") from error
    place, name = module_and_name(target)
    if _is_file(place):
        place = Path(os.path.relpath(place, project.root)).as_posix()
    return TargetEntry(target=f"{place}:{name}" if name else place)


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place


def _file_of(project: Project, entry: TargetEntry) -> Path | None:
    place, _ = module_and_name(entry.target)
    return (project.root / place).resolve() if _is_file(place) else None


def _absolute(path: Path) -> Path:
    """Return a path from the root, without dots; links stay as they are named."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # Path.absolute leaves the dots


def _with_make_model(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders that define ``make_model``, sorted; none is imported."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if _is_looked_into(Path(root) / each))
        for name in sorted(files):
            if name.endswith(".py") and _defines_make_model(Path(root) / name):
                yield Path(root) / name


def _is_looked_into(folder: Path) -> bool:
    hidden = folder.name.startswith(".") or folder.name in _NOT_LOOKED_INTO
    return not hidden and not (folder / "pyvenv.cfg").exists()


def _defines_make_model(file: Path) -> bool:
    try:
        source = file.read_bytes()
        if b"make_model" not in source:
            return False
        body = ast.parse(source).body
    except (SyntaxError, ValueError):  # a mistake in it is for the check to name
        return True
    except OSError:
        return False
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    assigned = (target for node in body if isinstance(node, ast.Assign) for target in node.targets)
    return "make_model" in functions | {target.id for target in assigned if isinstance(target, ast.Name)}
