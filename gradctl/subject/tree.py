"""Nested inputs and outputs: their leaves by path.

What nests: tuples, lists, mappings, dataclasses, whatever torch's pytree knows, and any object that keeps a tensor in
its attributes (a batch of a graph library, a distribution). Modules, functions and classes do not.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradctl.subject.reach import attributes
from gradctl.subject.torch_private import pytree_nodes

# What is a leaf at first sight. Most are one of these, and trees are opened for each call that is watched.
_LEAVES = (
    Tensor, bool, int, float, complex, str, bytes, type, type(None), nn.Module, types.ModuleType, types.FunctionType,
    types.BuiltinFunctionType, types.MethodType, torch.dtype, torch.device, torch.Size, torch.Generator, slice, range,
)  # fmt: skip

# An object that holds more objects than this (a tokenizer, a data set) is not searched for tensors.
_MOST_OBJECTS = 10_000


class _Opened(NamedTuple):
    """A container, opened.

    Attributes:
        children: each with its part of the path, None if it has no name.
        rebuild: takes the shell and new children, in order, and returns the container with these.
        shell: returns a shallow copy to fill in, to which children may refer; None if there is none.
    """

    children: Sequence[tuple[str | None, Any]]
    rebuild: Callable[[Any, Sequence[Any]], Any]
    shell: Callable[[], Any] | None = None


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return every leaf of ``value`` with its path, in order: ``[("mask", …), ("xs.0", …)]``; of a bare leaf ``""``.

    A container that holds itself is not a leaf.
    """
    found: list[tuple[str, Any]] = []
    _collect(value, path, (), found)
    return found


def map_leaves(function: Callable[[str, Any], Any], value: Any, path: str = "") -> Any:
    """Return ``value`` rebuilt with ``function(path, leaf)`` in place of each leaf; containers keep their types."""
    return _mapped(function, value, path, {})


def _collect(value: Any, path: str, inside: tuple[int, ...], found: list[tuple[str, Any]]) -> None:
    if id(value) in inside:
        return
    opened = _opened(value)
    if opened is None:
        found.append((path, value))
        return
    for key, child in opened.children:
        _collect(child, _joined(path, key), (*inside, id(value)), found)


def _mapped(function: Callable[[str, Any], Any], value: Any, path: str, inside: dict[int, Any]) -> Any:
    if id(value) in inside:
        return inside[id(value)]
    opened = _opened(value)
    if opened is None:
        return function(path, value)
    shell = opened.shell() if opened.shell is not None else None
    within = {**inside, id(value): value if shell is None else shell}
    mapped = [_mapped(function, child, _joined(path, key), within) for key, child in opened.children]
    rebuilt = opened.rebuild(shell, mapped)
    for name, reference in attributes(rebuilt).items() if shell is not None else ():
        # Of a part to its whole.
        if type(reference) is weakref.ref and (whole := within.get(id(reference()))) is not None:
            object.__setattr__(rebuilt, name, weakref.ref(whole))
    return rebuilt


def _joined(path: str, key: str | None) -> str:
    return path if key is None else f"{path}.{key}" if path else key


def _opened(value: Any) -> _Opened | None:
    """Return a container opened, or None for a leaf."""
    if isinstance(value, _LEAVES):
        return None
    if isinstance(value, Mapping):
        # A shallow copy keeps the class and what else it carries (defaultdict's factory, ModelOutput's attributes).
        keys = list(value)
        return _Opened(_numbered([value[key] for key in keys], map(str, keys)), _filled(value, keys))
    if isinstance(value, tuple):
        return _opened_tuple(value)
    if isinstance(value, list):
        return _Opened(_numbered(value), _refilled, lambda: copy.copy(value))
    node = pytree_nodes.get(type(value))
    if node is not None:
        parts, context = node.flatten_fn(value)
        keyed = node.flatten_with_keys_fn(value)[0] if node.flatten_with_keys_fn is not None else []
        names = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key, _ in keyed]
        return _Opened(_numbered(parts, names or None), lambda _, new: node.unflatten_fn(list(new), context))
    return _opened_object(value)


def _opened_tuple(value: tuple[Any, ...]) -> _Opened | None:
    """Return a tuple opened; a subclass that holds no tensor is a value (e3nn's Irreps)."""
    kind: Any = type(value)
    if hasattr(value, "_fields"):
        return _Opened(_numbered(value, kind._fields), lambda _, new: kind(*new))
    if kind is tuple or kind.__module__ == "torch.return_types":  # torch's own results (topk, max)
        return _Opened(_numbered(value), lambda _, new: kind(new))
    if not any(_holds_tensor(item) for item in value):
        return None

    # The constructor is not called: it may require other arguments.
    return _Opened(_numbered(value), lambda _, new: _with_attributes(tuple.__new__(kind, new), attributes(value)))


def _opened_object(value: Any) -> _Opened | None:
    """Return the fields of a dataclass, and what holds tensors of the attributes of any object.

    The name of an object's only such attribute is not said if it is private: that of a store (``data.pos``).
    """
    own, fields = attributes(value), _fields(value)
    others = [name for name, child in _open_attributes(value).items() if name not in fields and _holds_tensor(child)]
    names = [*fields, *others]
    if not names:
        return None
    is_store = not fields and len(names) == 1 and names[0].startswith("_") and not isinstance(own[names[0]], Tensor)
    children = [(None if is_store else name, own.get(name)) for name in names]

    def rebuild(shell: Any, new: Sequence[Any]) -> Any:
        return _with_attributes(shell, dict(zip(names, new, strict=True)))

    return _Opened(children, rebuild, lambda: _copied(value))


def _open_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object; nothing of torch's own, except of distributions."""
    module = type(value).__module__
    is_torchs = module.startswith("torch.") and not module.startswith("torch.distributions")
    return {} if is_torchs else attributes(value)


def _with_attributes(value: Any, kept: Mapping[str, Any]) -> Any:
    """Return the object with these attributes, whatever its class does when one is set."""
    for name, child in kept.items():
        object.__setattr__(value, name, child)
    return value


def _fields(value: Any) -> list[str]:
    """Return the names of the fields of a dataclass; none of any other object, whatever its class says if asked."""
    try:
        return [each.name for each in dataclasses.fields(value)]
    except Exception:
        return []


def _holds_tensor(value: Any) -> bool:
    """Return whether a tensor is in a value, its containers and the attributes of its objects."""
    pending, seen = [value], {id(value): value}
    while pending and len(seen) < _MOST_OBJECTS:
        found = pending.pop()
        if isinstance(found, Tensor):
            return True
        for child in _parts(found):
            if id(child) not in seen:
                seen[id(child)] = child
                pending.append(child)
    return False


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, _LEAVES):
        return ()
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list)):
        return value
    return _open_attributes(value).values()


def _numbered(values: Iterable[Any], keys: Iterable[str] | None = None) -> list[tuple[str | None, Any]]:
    items = list(values)
    return list(zip(map(str, range(len(items))) if keys is None else keys, items, strict=True))


def _filled(value: Any, keys: Sequence[Any]) -> Callable[[Any, Sequence[Any]], Any]:
    def rebuild(_: Any, new: Sequence[Any]) -> Any:
        try:
            rebuilt = copy.copy(value)
            for key, child in zip(keys, new, strict=True):
                rebuilt[key] = child
        except TypeError:  # a read-only mapping
            return type(value)(dict(zip(keys, new, strict=True)))
        return rebuilt

    return rebuild


def _refilled(shell: Any, new: Sequence[Any]) -> Any:
    shell[:] = new
    return shell


def _copied(value: Any) -> Any:
    """Return a shallow copy, whatever the class's own constructor or ``__copy__`` wants."""
    try:
        return copy.copy(value)
    except Exception:  # of the user's class
        return _with_attributes(object.__new__(type(value)), attributes(value))
