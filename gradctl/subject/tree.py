"""Nested inputs and outputs: their leaves by path. Tuples, lists, mappings, named tuples and dataclasses nest."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["leaves", "map_leaves"]


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return every leaf of ``value`` with its path, in order: ``[("mask", …), ("xs.0", …)]``; of a bare leaf ``""``."""
    children = _children(value)
    if children is None:
        return [(path, value)]
    return [leaf for key, child in children for leaf in leaves(child, f"{path}.{key}" if path else str(key))]


def map_leaves(function: Callable[[str, Any], Any], value: Any, path: str = "") -> Any:
    """Return ``value`` rebuilt with ``function(path, leaf)`` in place of each leaf; containers keep their types."""
    children = _children(value)
    if children is None:
        return function(path, value)
    mapped = {key: map_leaves(function, child, f"{path}.{key}" if path else str(key)) for key, child in children}
    if isinstance(value, Mapping):
        # A shallow copy keeps the class and what else it carries (defaultdict's factory, ModelOutput's attributes).
        rebuilt = copy.copy(value)
        for key, child in mapped.items():
            rebuilt[key] = child  # type: ignore[index]
        return rebuilt
    if isinstance(value, tuple):
        return type(value)(*mapped.values()) if hasattr(value, "_fields") else type(value)(mapped.values())
    if isinstance(value, list):
        return type(value)(mapped.values())
    rebuilt = copy.copy(value)
    for key, child in mapped.items():
        object.__setattr__(rebuilt, str(key), child)
    return rebuilt


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the keys and children of a container, or None for a leaf."""
    if isinstance(value, Mapping):
        return list(value.items())
    # Other subclasses of tuple are values (a shape, e3nn's Irreps); torch's own results (topk, max) are structures.
    if type(value) is tuple or hasattr(value, "_fields") or type(value).__module__ == "torch.return_types":
        return list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    if isinstance(value, list):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    return None
