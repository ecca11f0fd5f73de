"""From a parsed target to the object that it names; ``gradctl.subject.loading.factory`` makes a model of that."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from gradctl.core.errors import TargetError, is_out_of_memory, nearest
from gradctl.core.target_files import Target, parse_target
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.libraries.library_target import library_module
from gradctl.subject.loading.library_operator import find_operator
from gradctl.subject.loading.triton_interpreter import switch_on_interpreter
from gradctl.subject.signature import is_subclass

_FEW = 8  # names that a message lists; of more, only the nearest


@contextlib.contextmanager
def on_import_path(root: Path) -> Iterator[None]:
    """Let ``root`` come first on ``sys.path``, as for a script; afterwards last, unless it was there before.

    It stays because a forward may import its neighbours only when it is called; last, it shadows nothing.
    """
    entry = str(root)
    was_there = entry in sys.path
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have taken it off
            sys.path.remove(entry)
        if not was_there:
            sys.path.append(entry)


def import_target(target: Target) -> ModuleType:
    """Return the target's module, imported: this runs the user's code.

    A file of a package is imported as part of it. A plain file is run anew each time, under its own name.

    Raises:
        TargetError: GC101 if there is no such module; GC103 if the user's code raises, with their frames, or if
            python has another file under this name.
    """
    if target.model is not None:
        return library_module(target.model, target.place)
    switch_on_interpreter()
    try:
        if target.file is not None and target.root == target.file.parent:
            return _run_file(target.file, target.module_name)
        _refuse_taken_package(target)
        return importlib.import_module(target.module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, TargetError) or is_out_of_memory(error):
            raise
        raise _import_error(target, error) from error


def find_target(target: Target, module: ModuleType) -> tuple[str, Any]:
    """Return name and object of the target: what it names, else ``make_model``, ``model``, the only module class.

    Raises:
        TargetError: GC102 if there is no such name, with the nearest, or nothing to take, with the candidates.
    """
    if target.name is not None and "::" in target.name:
        return target.name, find_operator(target.name, target.place)
    if target.name is not None:
        return target.name, find_in(module, target.name, target.place, "GC102")
    for name in ("make_model", "model"):
        if hasattr(module, name):
            return name, getattr(module, name)
    place, defined = target.place, _defined(module)
    classes = [name for name in defined if is_subclass(getattr(module, name), nn.Module)]
    if len(classes) == 1:
        return classes[0], getattr(module, classes[0])
    if classes:
        said = f"no make_model and no model, and {len(classes)} modules: {', '.join(classes)}. Say which one"
        raise TargetError("GC102", f"{place} has {said}: {place}:{classes[-1]}.")
    define = f"Name what it defines ({', '.join(defined[:_FEW])})" if defined else "Add one"
    said = f"no make_model, no model and no nn.Module class of its own. {define}"
    raise TargetError("GC102", f"{place} has {said}: {place}:NAME.")


def find_by_text(text: str, code: str, beside: str | None = None) -> Any:
    """Return the object that ``FILE:NAME`` names, or ``NAME`` in the file or module of the target ``beside``.

    A file that the process has run already is not run again.

    Raises:
        TargetError: with ``code`` if there is no such name; GC101 to GC103 if the file cannot be imported.
    """
    target = parse_target(text if beside is None else beside)
    name = target.name if beside is None else text
    if name is None:
        raise TargetError(code, f"{text!r} names no function. Write FILE:NAME.")
    with on_import_path(target.root):
        return find_in(_loaded(target) or import_target(target), name, target.place, code)


def _loaded(target: Target) -> ModuleType | None:
    """Return the module of a file that was run in this process."""
    files = ((module, getattr(module, "__file__", None)) for module in list(sys.modules.values()))
    return next((each for each, file in files if file and target.file and Path(file).resolve() == target.file), None)


def find_in(module: ModuleType, name: str, place: str, code: str) -> Any:
    """Return the object with a (dotted) name in ``module``.

    Raises:
        TargetError: with ``code``, if there is none; the names that there are, or the nearest.
    """
    found: Any = module
    within = place
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise TargetError(code, _no_name(found, within, part)) from error
        except Exception as error:  # a module that imports its names when they are asked for
            said = first_line(error)
            raise TargetError("GC103", f"{within}:{part} raised {said}.", details=user_frames(error)) from error
        within = f"{within}:{part}" if within == place else f"{within}.{part}"
    return found


def _refuse_taken_package(target: Target) -> None:
    """Raise where python already has another package under the name of the file's: it would be taken for the user's."""
    package = target.module_name.partition(".")[0]
    taken = sys.modules.get(package)
    if target.file is None or taken is None:
        return
    folders = [Path(folder).resolve() for folder in getattr(taken, "__path__", ())]
    if target.root / package not in folders:
        where = folders[0] if folders else getattr(taken, "__file__", None) or "one of its own"
        raise TargetError(
            "GC103",
            f"{target.place} would be imported as {target.module_name!r}, but python has {where} under the name "
            f"{package!r}. Rename the folder of the package, or remove its __init__.py.",
        )


def _run_file(file: Path, name: str) -> ModuleType:
    """Return a module freshly made by running a plain file; in ``sys.modules``, where dataclasses look for it."""
    name = _free_name(file, name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    return module


def _free_name(file: Path, name: str) -> str:
    """Return the file's own name, or one with a suffix where that would shadow another module (``random.py``)."""
    taken = sys.modules.get(name)
    own = getattr(taken, "__file__", None)
    is_taken = taken is not None and (own is None or Path(own).resolve() != file)
    if is_taken or name in sys.stdlib_module_names or not name.isidentifier():
        return f"{name.replace('.', '_')}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    return name


def _import_error(target: Target, error: BaseException) -> TargetError:
    """Return GC103 with what the user can do about it; GC101 if it is the target's own module that is missing."""
    missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if target.file is None and f"{target.module_name}.".startswith(f"{missing}."):
        return TargetError("GC101", _no_module(target.module_name, missing))
    remedy = ""
    if isinstance(error, SystemExit):
        said = f"it called sys.exit({error.code!r})"
        remedy = " Put what it does as a script under: if __name__ == '__main__'."
    else:
        said = first_line(error)
    if missing:
        remedy = f" Install it beside gradctl, or start where python finds {missing!r}."
    elif isinstance(error, ImportError) and "no known parent package" in str(error):
        remedy = " Relative imports need an __init__.py in the folder of the file."
    return TargetError("GC103", f"{target.place} cannot be imported: {said}.{remedy}", details=user_frames(error))


def _no_module(name: str, missing: str) -> str:
    """Return the sentence for a module that is not there, with the nearest in the package or folder looked in."""
    parent, _, last = missing.rpartition(".")
    folders = list(getattr(sys.modules.get(parent), "__path__", ())) if parent else [str(Path.cwd())]
    near = nearest(last, (found.name for found in pkgutil.iter_modules(folders)))
    within = f" in {parent!r}" if parent else ""
    return (
        f"there is no module {name!r}: python finds no {last!r}{within}{near}. Write FILE.py:NAME, or start in the "
        "folder that holds the package."
    )


def _no_name(owner: Any, within: str, name: str) -> str:
    """Return the sentence for a name that is not there: the few that there are, or the nearest of many."""
    if isinstance(owner, ModuleType):
        names, verb = _defined(owner), "It defines"
    else:
        names, verb = [child for child, _ in owner.named_children()] if isinstance(owner, nn.Module) else [], "It has"
    near = nearest(name, names) or nearest(name, (each for each in dir(owner) if not each.startswith("_")))
    listed = f". {verb} {', '.join(names)}" if 0 < len(names) <= _FEW else ""
    return f"{within} has no {name!r}{listed}{near}."


def _defined(module: ModuleType) -> list[str]:
    """Return what the file itself defines: its classes and functions, once each, and modules made in it."""
    names: dict[int, str] = {}
    for name, value in vars(module).items():
        is_own = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
        if not name.startswith("__") and (is_own or isinstance(value, nn.Module)):
            names.setdefault(id(value), name)
    return list(names.values())
