"""A private copy of a model and its inputs that reaches nothing of the user's own.

``copy.deepcopy`` keeps functions: a hook, a patched ``forward`` or a stored closure of the copy would still read and
write the original. So each function that reaches a tensor or a module is made anew with the copy's in its place.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from gradctl.subject.aliasing import storage_key
from gradctl.subject.reach import GRAPH_ONLY, global_values, instance_dict, slot_values, walk
from gradctl.subject.signature import optimized_inner, parameters_of
from gradctl.subject.torch_private import CustomOpDef
from gradctl.subject.tree import map_leaves

_KEEPING = (types.FunctionType, functools._lru_cache_wrapper, weakref.ref)  # what deepcopy does not look into


def private_copy(originals: tuple[Any, ...]) -> tuple[tuple[Any, ...], frozenset[int]]:
    """Return a copy of each original, the model first, without torch.compile's wrappers, tied parameters tied again.

    Returns:
        The copies, and the identities of all objects that the originals reach: what a copy reaches of these is shared.

    Raises:
        Exception: whatever ``copy.deepcopy`` raises on them.
    """
    reached = [found for _, found in walk(((), original) for original in originals)]
    with torch.no_grad():  # or the copy of a ScriptModule's parameter keeps a graph to the user's own
        copied, memo = _deep_copy(originals, reached)
        mender = _Mender(memo, frozenset(map(id, reached)))
        if any(mender.is_to_mend(found) for found in reached):
            copied = mender.mend(copied)
    _restore_parameters(originals[0], copied[0])
    return copied, mender.original_ids


def _deep_copy(originals: tuple[Any, ...], reached: Sequence[Any]) -> tuple[tuple[Any, ...], dict[int, Any]]:
    """Return what ``copy.deepcopy`` makes, and its memo. Inputs whose class refuses that are copied leaf by leaf."""
    memo: dict[int, Any] = {id(found): _copy_of(found) for found in reached if _is_refused(found)}
    first = dict(memo)
    try:
        return copy.deepcopy(originals, memo), memo
    except Exception:  # of the user's class: an attribute that raises, a constructor that wants more
        return map_leaves(lambda _, leaf: copy.deepcopy(leaf, first), originals), first


def _is_refused(found: Any) -> bool:
    """Return whether ``copy.deepcopy`` refuses it: a tensor with a history (old weight_norm), a compressed sparse
    tensor, a buffer without a shape, an operator.
    """
    if not isinstance(found, Tensor):
        return isinstance(found, CustomOpDef)
    return isinstance(found, UninitializedBuffer) or not (
        found.is_leaf and found.layout in (torch.strided, torch.sparse_coo)
    )


def _copy_of(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor  # an operator is registered once in a process
    if isinstance(tensor, UninitializedBuffer):
        return UninitializedBuffer(device=tensor.device, dtype=tensor.dtype)  # type: ignore[call-arg]  # of __new__
    return tensor.detach().clone()


class _Mender:
    """Replaces references to the originals in copied objects; ``memo`` is that of ``copy.deepcopy``."""

    def __init__(self, memo: dict[int, Any], original_ids: frozenset[int]) -> None:
        self.memo, self.original_ids = memo, original_ids
        self._done: dict[int, Any] = {}
        self._alive: list[Any] = []  # ids stay unique only while their objects live
        self._tied: dict[int, bool] = {}
        self._cells: dict[int, types.CellType] = {}
        self._globals: dict[int, dict[str, Any]] = {}

    def is_to_mend(self, found: Any) -> bool:
        """Return whether a copy needs mending: of a function that reaches a tensor or module, of a compiled module."""
        return optimized_inner(found) is not found or (isinstance(found, _KEEPING) and self._is_tied(found))

    def mend(self, value: Any) -> Any:
        """Return the value with all that it holds mended, in place where that can be."""
        key = id(value)
        if key in self._done:
            return self._done[key]
        self._alive.append(value)
        self._done[key] = value  # of objects that hold each other
        inner = optimized_inner(value)
        self._done[key] = mended = self._mended(value) if inner is value else self.mend(inner)
        return mended

    def _mended(self, value: Any) -> Any:
        for kind, mended in _MENDED.items():
            if isinstance(value, kind):
                return mended(self, value)
        # Only what is the copy's own is changed. A class may say that its objects are not to be copied.
        if id(value) not in self.original_ids and not isinstance(value, (Tensor, torch.jit.ScriptModule)):
            self._mend_contents(value)
            self._mend_attributes(value)
        return value

    def _method(self, method: types.MethodType) -> types.MethodType:
        function, owner = self.mend(method.__func__), self._own(method.__self__)
        is_same = function is method.__func__ and owner is method.__self__
        return method if is_same else types.MethodType(function, owner)

    def _cached(self, cached: Any) -> Any:
        inner = self.mend(cached.__wrapped__)
        return cached if inner is cached.__wrapped__ else functools.lru_cache(**cached.cache_parameters())(inner)

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        items = [self.mend(item) for item in value]
        is_same = all(new is old for new, old in zip(items, value, strict=True))
        return value if is_same else tuple.__new__(type(value), items)

    def _mend_contents(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            parts = value.func, value.args, value.keywords
            value.__setstate__((*(self.mend(part) for part in parts), vars(value)))  # type: ignore[attr-defined]
        elif isinstance(value, dict):
            self._mend_items(value, value.items())
        elif isinstance(value, (list, deque)):
            self._mend_items(value, enumerate(value))
        elif isinstance(value, set):
            items = [self.mend(item) for item in value]
            if any(item not in value for item in items):
                value.clear()
                value.update(items)

    def _mend_attributes(self, value: Any) -> None:
        own, left = instance_dict(value) or {}, GRAPH_ONLY if isinstance(value, torch.fx.GraphModule) else ()
        self._mend_items(own, ((name, item) for name, item in own.items() if name not in left))
        for name, item in slot_values(value).items():
            if (new := self.mend(item)) is not item:
                object.__setattr__(value, name, new)

    def _mend_items(self, container: Any, items: Iterable[tuple[Any, Any]]) -> None:
        for key, item in list(items):
            if (new := self.mend(item)) is not item:
                container[key] = new

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Return the function over the copy's objects. Functions that share a variable, or a file, still share it."""
        if not self._is_tied(function):
            return function
        cells = function.__closure__ or ()
        closure = tuple(self._cells.setdefault(id(cell), types.CellType()) for cell in cells)
        read = {name: value for name, value in global_values(function).items() if self._is_tied(value)}
        known = function.__globals__
        if read:
            known = self._globals.setdefault(id(known), dict(known))
        rebound = types.FunctionType(function.__code__, known, function.__name__, None, closure)
        self._done[id(function)] = rebound
        rebound.__qualname__, rebound.__module__ = function.__qualname__, function.__module__
        rebound.__annotations__, rebound.__doc__ = function.__annotations__, function.__doc__
        for cell, own in zip(cells, closure, strict=True):
            if cell != types.CellType() and own == types.CellType():
                own.cell_contents = self._own(cell.cell_contents)
        known.update(self._own_values(read))
        rebound.__defaults__ = tuple(map(self._own, function.__defaults__ or ())) or None
        rebound.__kwdefaults__ = self._own_values(function.__kwdefaults__ or {})
        vars(rebound).update(self._own_values(vars(function)))
        return rebound

    def _reference(self, reference: weakref.ref[Any]) -> weakref.ref[Any]:
        """Return a weak reference to the copy of what one refers to."""
        target = self.memo.get(id(reference()))
        if target is None:
            return reference
        if isinstance(reference, weakref.KeyedRef):
            return weakref.KeyedRef(target, reference.__callback__, reference.key)
        return weakref.ref(target, reference.__callback__)

    def _own_values(self, items: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._own(value) for name, value in items.items()}

    def _own(self, value: Any) -> Any:
        """Return the copy of an object that a function refers to; the object itself if it cannot be copied."""
        if id(value) not in self.original_ids:
            return self.mend(value)
        if not self._is_tied(value):
            return value
        try:
            return self.mend(copy.deepcopy(value, self.memo))
        except Exception:  # a class may refuse to be copied in any way
            return value

    def _is_tied(self, found: Any) -> bool:
        """Return whether the copy needs its own: of what is or reaches a module, a trained tensor or anything else that
        was copied, and of a function that uses any tensor.

        A dict that hooks fill with activations stays shared: methods of classes read it too, and are not copied.
        """
        if id(found) not in self._tied:
            nearest = 1 if isinstance(found, types.FunctionType) else 0
            self._tied[id(found)] = any(
                (each.is_leaf and each.requires_grad) or len(path) <= nearest
                if isinstance(each, Tensor)
                else isinstance(each, nn.Module) or self.memo.get(id(each), each) is not each
                for path, each in walk([((), found)])
            )
        return self._tied[id(found)]


# How objects are mended that cannot be changed in place.
_MENDED: dict[type, Callable[[_Mender, Any], Any]] = {
    types.FunctionType: _Mender._function,
    types.MethodType: _Mender._method,
    functools._lru_cache_wrapper: _Mender._cached,
    weakref.ref: _Mender._reference,
    tuple: _Mender._tuple,
}


def _restore_parameters(original: Any, copied: Any) -> None:
    """Set ``requires_grad`` as in the original, which ScriptModules copy without; share storage between parameters of
    the copy where the originals are two objects on one storage.
    """
    copies = parameters_of(copied, remove_duplicate=False)
    first: dict[tuple[Any, ...], nn.Parameter] = {}
    for name, parameter in parameters_of(original, remove_duplicate=False).items():
        own = copies.get(name)
        if own is None:
            continue
        if own.requires_grad != parameter.requires_grad:  # a lazy parameter refuses to be set
            own.requires_grad_(parameter.requires_grad)
        owner = first.setdefault(storage_key(parameter), own)
        if owner is not own:
            own.data = owner.data
