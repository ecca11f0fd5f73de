"""The targets of a run: those of the configuration, and files with a ``make_model`` at the given paths."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.core.library_targets import is_library_target
from gradctl.suite.configuration import Project, TargetEntry

_NOT_LOOKED_INTO = ("__pycache__", "node_modules", "site-packages", "build", "dist", "venv")
# Statements of a module that do no more than define something.
_DEFINITIONS = {ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If, ast.Try}


def select_entries(project: Project, paths: Sequence[str]) -> list[TargetEntry]:
    """Return the targets of a run, in their order.

    Args:
        project: without ``paths``, all targets of its configuration, or the files with a ``make_model`` in its folder
            if it has no targets.
        paths: folders, of which files with a ``make_model`` are targets; files; targets. An entry of the configuration
            for one of them replaces it.

    Raises:
        TargetError: GC101 if a path is neither a folder, nor a file, nor a module that can be found.
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


def find_models(project: Project) -> list[TargetEntry]:
    """Return a target for each file of the project's folder and its subfolders that may define a model.

    Those are files with a ``make_model``, and files that define a ``model`` or a module class and do nothing else: to
    import a script could start a training. None is imported here.
    """
    files = _files(project.root, lambda file: _defines_make_model(file) or _only_defines_model(file))
    return [_named(project, str(file)) for file in files]


def python_files(folder: Path) -> Iterator[Path]:
    """Yield all Python files of a folder that may be of its project, sorted; those of environments are not."""
    return _files(folder, lambda file: True)


def every_file(folder: Path) -> Iterator[Path]:
    """Yield all files of a folder that may be of its project, sorted: not those of caches, environments, and so on."""
    for root, folders, files in os.walk(absolute(folder)):
        folders[:] = sorted(each for each in folders if _is_looked_into(Path(root) / each))
        yield from (Path(root) / name for name in sorted(files))


def module_and_name(target: str) -> tuple[str, str]:
    """Return file or module, and the name after the colon or nothing."""
    if is_library_target(target):
        return target, ""
    place, colon, name = target.rpartition(":")
    return (place, name) if colon and len(place) > 1 else (target, "")


def relative_target(root: Path, target: str) -> str:
    """Return a target of a configuration with its path relative to the current folder."""
    place, name = module_and_name(target)
    if not _is_file(place):
        return _with_absolute_folder(root, target)
    file = absolute(root / place)
    here = Path.cwd()
    text = str(file.relative_to(here) if file.is_relative_to(here) else file)
    return f"{text}:{name}" if name else text


def _with_absolute_folder(root: Path, target: str) -> str:
    """Return a target with the absolute path of a checkpoint's folder (``hf:./FOLDER``); any other as it is."""
    library, _, folder = target.partition(":")
    return f"{library}:{absolute(root / folder)}" if is_library_target(target) and folder[:1] == "." else target


def _at(project: Project, path: str) -> list[TargetEntry]:
    """Return the entries of a folder, a file or a target."""
    if Path(path).is_dir():
        return _in_folder(project, Path(path))
    place, name = module_and_name(path)
    is_there = Path(place).is_file() if _is_file(place) else _is_module(project, place)
    if not is_there and not is_library_target(path):
        raise TargetError("GC101", f"{place!r} does not exist. Give a folder, a file, or a target: FILE.py:NAME.")
    given = _named(project, path)
    place_of = partial(_place_of, project)
    same = [entry for entry in project.configuration.targets if place_of(entry) == place_of(given)]
    return [entry for entry in same if name in ("", module_and_name(entry.target)[1])] or [given]


def _in_folder(project: Project, folder: Path) -> list[TargetEntry]:
    """Return the entries of the configuration in a folder, and those of other files with a ``make_model``."""
    places = [(entry, _place_of(project, entry)) for entry in project.configuration.targets]
    inside = [(entry, place) for entry, place in places if Path(place).is_relative_to(folder.resolve())]
    known = {place for _, place in inside}
    found = [file for file in _files(folder, _defines_make_model) if file.resolve() not in known]
    return [*(entry for entry, _ in inside), *(_named(project, str(file)) for file in found)]


def _is_module(project: Project, name: str) -> bool:
    """Return whether a module may exist: its top-level package is found. Nothing is imported."""
    package = name.partition(".")[0]
    if not package.isidentifier():
        return False
    # A unit's process also looks in these folders.
    here = PathFinder.find_spec(package, [str(Path.cwd()), str(project.root)])
    return here is not None or package in sys.modules or find_spec(package) is not None


def _named(project: Project, target: str) -> TargetEntry:
    """Return the entry of a target that is named from the current folder, its path relative to the configuration."""
    try:
        target.encode()
    except UnicodeEncodeError as error:
        raise TargetError("GC101", f"the name {target!r} is not UTF-8, which reports are. Rename it.") from error
    place, name = module_and_name(_with_absolute_folder(Path.cwd(), target))
    if _is_file(place):
        place = Path(os.path.relpath(place, project.root)).as_posix()
    return TargetEntry(target=f"{place}:{name}" if name else place)


def _is_file(place: str) -> bool:
    return not is_library_target(place) and (place.endswith(".py") or "/" in place or os.sep in place)


def _place_of(project: Project, entry: TargetEntry) -> Path | str:
    """Return the file of an entry, the same by whatever links and dots; or its module."""
    place, _ = module_and_name(entry.target)
    return (project.root / place).resolve() if _is_file(place) else place


def absolute(path: Path) -> Path:
    """Return a path from the root, without dots; links stay as they are named."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # Path.absolute leaves the dots


def _files(folder: Path, is_wanted: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield the Python files of a folder and its subfolders that are wanted, sorted; none is imported."""
    yield from (path for path in every_file(folder) if path.name.endswith(".py") and is_wanted(path))


def _is_looked_into(folder: Path) -> bool:
    hidden = folder.name.startswith(".") or folder.name in _NOT_LOOKED_INTO
    return not hidden and not (folder / "pyvenv.cfg").exists()


def _defines_make_model(file: Path) -> bool:
    try:
        source = file.read_bytes()
        return b"make_model" in source and "make_model" in _top_level_names(ast.parse(source))
    except (SyntaxError, ValueError):  # the check reports the mistake
        return True
    except OSError:
        return False


def _only_defines_model(file: Path) -> bool:
    try:
        source = file.read_bytes()
        module = ast.parse(source if b"torch" in source else b"")
    except (OSError, SyntaxError, ValueError):
        return False
    has_class = b"torch" in source and re.search(rb"^class \w+\([^)]*Module\b", source, re.MULTILINE)
    has_model = has_class or "model" in _top_level_names(module)
    # A constant is a docstring.
    kinds = {type(node.value if isinstance(node, ast.Expr) else node) for node in module.body}
    return bool(has_model) and kinds <= {ast.Constant, *_DEFINITIONS} and not file.name.startswith("test_")


def _top_level_names(module: ast.Module) -> set[str]:
    """Return the names of the functions and variables that a module defines at its top level."""
    targets = [target for node in module.body if isinstance(node, ast.Assign) for target in node.targets]
    functions = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
    return functions | {target.id for target in targets if isinstance(target, ast.Name)}
