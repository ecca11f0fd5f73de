"""What an object holds, as the leaves, the snapshot and the private copy of a model see it: one walk for all three."""

from __future__ import annotations

import dis
import enum
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.subject.signature import optimized_inner
from gradctl.subject.torch_private import CustomOpDef, OpOverload, OpOverloadPacket

# What holds nothing that a run could read or change.
_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, type, enum.Enum, torch.dtype, torch.device, torch.Size, range,
    types.ModuleType, types.BuiltinFunctionType, types.CodeType,
)  # fmt: skip

_COMMON_ATOMS = frozenset({type(None), bool, int, float, str, type, types.BuiltinFunctionType})

# A model that keeps a data set or a tokenizer is walked no further than this.
_MOST_OBJECTS = 200_000

DICTS = frozenset({dict, OrderedDict, defaultdict})  # most of what a module holds are these
GRAPH_ONLY = ("_graph", "meta")  # of a GraphModule: nodes and metadata, whose fake tensors have no values
_TABLES = ("_parameters", "_buffers", "_modules")

Path = tuple[str, ...]


def walk(roots: Iterable[tuple[Path, Any]]) -> Iterator[tuple[Path, Any]]:
    """Yield each object that can be reached from the roots once, with its shortest path."""
    pending = deque(roots)
    alive: dict[int, Any] = {}  # ids stay unique only while their objects live
    while pending and len(alive) < _MOST_OBJECTS:
        path, found = pending.popleft()
        if id(found) in alive or isinstance(found, _ATOMS):
            continue
        alive[id(found)] = found
        yield path, found
        for key, child in held(found):
            if type(child) not in _COMMON_ATOMS and id(child) not in alive:
                pending.append(((*path, key), child))


def path_name(path: Path) -> str:
    """Return what a report calls the object at a path: ``fc1.weight``, without the tables that modules keep.

    What the model's own forward closes over has the name of its variable.
    """
    path = path[1:] if path[:1] == ("forward",) else path
    return ".".join(key for key in path if key and key not in _TABLES)


def held(found: Any) -> Iterable[tuple[str, Any]]:
    """Return what ``found`` holds, each with its key; nothing for what is opaque."""
    if type(found) in DICTS:
        return [(str(key), value) for key, value in found.items()]
    inner = optimized_inner(found)
    if inner is not found:
        return [("", inner)]
    parts = next((parts for kind, parts in _PARTS if isinstance(found, kind)), None)
    if parts is not None:
        return parts(found)
    items: list[tuple[str, Any]] = []
    if isinstance(found, dict):
        items = [(str(key), value) for key, value in found.items()]
    elif isinstance(found, (list, tuple, deque, set, frozenset)):
        items = _numbered(found)
    return [*items, *attributes(found).items()]


def attributes(found: Any) -> dict[str, Any]:
    """Return what an object keeps in its ``__dict__`` and ``__slots__``; no property of it is called."""
    own, slots = instance_dict(found), slot_values(found)
    return {**slots, **(own or {})} if slots else own or {}


def instance_dict(found: Any) -> dict[Any, Any] | None:
    """Return the ``__dict__`` of an object, or None if it has none."""
    try:
        own = object.__getattribute__(found, "__dict__")
    except Exception:  # a class may define __dict__ as it likes
        return None
    return own if isinstance(own, dict) else None


def slot_values(found: Any) -> dict[str, Any]:
    """Return what an object keeps in its ``__slots__``, by name."""
    kept: dict[str, Any] = {}
    for name, member in _slot_members(type(found)):  # type: ignore[arg-type]  # a class is hashable
        try:
            kept[name] = member.__get__(found)
        except AttributeError:  # not assigned
            continue
    return kept


@functools.lru_cache(maxsize=4096)
def _slot_members(kind: type) -> tuple[tuple[str, types.MemberDescriptorType], ...]:
    """Return the slots of a class, those of its bases too. A class written in C has members as well, and no slots."""
    return tuple(
        (name, member)
        for base in kind.__mro__
        if "__slots__" in base.__dict__
        for name, member in base.__dict__.items()
        if isinstance(member, types.MemberDescriptorType)
    )


def _numbered(items: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(str(index), value) for index, value in enumerate(items)]


def script_names(module: torch.jit.ScriptModule) -> list[str]:
    """Return the names of a script's attributes and buffers."""
    concrete = getattr(module, "_concrete_type", None)  # a script from a file has none, and buffers all the same
    return sorted(
        {*(concrete.get_attributes() if concrete is not None else ()), *dict(module.named_buffers(recurse=False))}
    )


def _held_by_script(module: torch.jit.ScriptModule) -> list[tuple[str, Any]]:
    """Return attributes, buffers, parameters and children of a script, which live outside Python."""
    own = [(name, getattr(module, name)) for name in script_names(module)]
    return [*own, *module.named_parameters(recurse=False), *module.named_children()]


def _held_by_function(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Return what a function closes over, its defaults, and what it reads by a global name.

    Of the latter tensors, modules, and the functions of the same file: all else is shared with the whole program.
    """
    closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    found = [(name, cell.cell_contents) for name, cell in closure if cell != types.CellType()]
    named = function.__code__.co_varnames[: function.__code__.co_argcount]
    found += zip(reversed(named), reversed(function.__defaults__ or ()), strict=False)
    found += (function.__kwdefaults__ or {}).items()
    found += vars(function).items()
    return [*found, *global_values(function).items()]


def global_values(function: types.FunctionType) -> Mapping[str, Any]:
    """Return what a function reads by a global name: tensors, modules, lists and dicts, which may hold these, and the
    functions of the same file, which read more.
    """
    known = function.__globals__
    file = known.get("__name__")  # a function made anew has globals of its own
    if str(file).startswith("torch."):
        return {}
    return {
        name: value
        for name in global_names(function.__code__)
        if isinstance(value := known.get(name), (Tensor, nn.Module, list, dict, tuple))
        or (isinstance(value, types.FunctionType) and value.__globals__.get("__name__") == file)
    }


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Return the global names that code reads, that of functions and comprehensions inside it too."""
    names = [each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"]
    inner = [
        name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in global_names(constant)
    ]
    return tuple(dict.fromkeys([*names, *inner]))


_PARTS: tuple[tuple[type, Callable[[Any], list[tuple[str, Any]]]], ...] = (
    (Tensor, lambda tensor: [("grad", tensor.grad)] if tensor.is_leaf and tensor.grad is not None else []),
    (torch.jit.ScriptModule, _held_by_script),
    (torch.fx.GraphModule, lambda module: [each for each in vars(module).items() if each[0] not in GRAPH_ONLY]),
    (types.FunctionType, _held_by_function),
    (types.MethodType, lambda method: [("", method.__self__), ("", method.__func__)]),
    (
        functools.partial,
        lambda found: [("", found.func), *_numbered(found.args), *found.keywords.items(), *attributes(found).items()],
    ),
    (functools._lru_cache_wrapper, lambda cached: [("", cached.__wrapped__)]),
    (weakref.ref, lambda reference: [("", reference())]),
    # One for the process: a state that is put back would be that of another version of its kernels.
    (OpOverload, lambda operator: []),
    (OpOverloadPacket, lambda operator: []),
    (CustomOpDef, lambda operator: []),
)
