"""What a model remembers between calls: buffers, caches, counters, generators. A snapshot that can be put back.

Each run must start from the same state, and a deep copy for each would cost more than the run. So the objects that are
reachable from the model are walked once, what they hold is noted shallowly, and only what changed is put back.
"""

from __future__ import annotations

import enum
import random
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["State", "overlaps"]

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, type, enum.Enum, torch.dtype, torch.device, torch.Size, range,
    types.ModuleType, types.BuiltinFunctionType, types.CodeType,
)  # fmt: skip

# A model that keeps a data set or a tokenizer is walked no further than this; what lies beyond is not put back.
_MOST_OBJECTS = 200_000


class State:
    """The mutable state reachable from some roots, as it was when this was made.

    Args:
        roots: models, inputs, callables.
        excluded: tensors that the caller sets itself before each run (the leaves).
    """

    def __init__(self, roots: Iterable[Any], excluded: Iterable[Tensor] = ()) -> None:
        self._restorers: list[Callable[[], None]] = []
        self._seen: set[int] = {id(tensor) for tensor in excluded}
        self._alive: list[Any] = []  # ids stay unique only while their objects live
        pending = deque(roots)
        while pending and len(self._alive) < _MOST_OBJECTS:
            found = pending.popleft()
            if isinstance(found, _ATOMS) or id(found) in self._seen:
                continue
            self._seen.add(id(found))
            self._alive.append(found)
            pending.extend(self._note(found))

    def restore(self) -> None:
        """Put everything back that changed since the snapshot."""
        with torch.no_grad():
            for restore in self._restorers:
                restore()

    def _note(self, found: Any) -> Iterable[Any]:
        """Note what ``found`` holds, and return what to walk next."""
        note = _NOTES.get(type(found))
        if note is None:
            note = next((note for kind, note in _SUBCLASS_NOTES if isinstance(found, kind)), _note_object)
        restore, children = note(found)
        if restore is not None:
            self._restorers.append(restore)
        return children


_Note = tuple[Callable[[], None] | None, Iterable[Any]]


def _note_tensor(tensor: Tensor) -> _Note:
    if overlaps(tensor):
        return None, ()  # an expanded input: nothing can be written to it in place
    saved, version = tensor.detach().clone(), tensor._version
    grad, has_history = (tensor.grad if tensor.is_leaf else None), tensor.grad_fn is not None
    # A version counts no write through ``.data``, nor batch_norm's to its statistics. A frozen weight is big and seldom
    # written: it is looked at once or twice, and put back always if it was found changed.
    looks, always = 2, not isinstance(tensor, nn.Parameter)

    def restore() -> None:
        nonlocal version, looks, always
        alike = tensor.shape == saved.shape and tensor.dtype == saved.dtype
        if looks and not always:
            looks -= 1
            always = not alike or not torch.equal(tensor, saved)
        if always or tensor._version != version or not alike:
            if alike:
                tensor.copy_(saved)
            else:
                tensor.data = saved.clone()
            version = tensor._version
        if tensor.grad_fn is not None and not has_history and not tensor._is_view():
            tensor.detach_()  # written from what asks for a gradient: the graph of that run is gone
        if tensor.is_leaf and tensor.grad is not grad:
            tensor.grad = grad

    return restore, () if grad is None else (grad,)  # backward adds to it in place


def overlaps(tensor: Tensor) -> bool:
    """Tell a tensor whose elements share memory: an expanded one, or sliding windows."""
    if tensor.layout != torch.strided or not tensor.numel():
        return False
    reach = 0  # of the axes with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _note_list(items: Any) -> _Note:
    saved = list(items)

    def restore() -> None:
        if len(items) != len(saved) or any(now is not before for now, before in zip(items, saved, strict=True)):
            items.clear()
            items.extend(saved)

    return restore, saved


def _note_set(items: set[Any]) -> _Note:
    saved = set(items)

    def restore() -> None:
        if items != saved:
            items.clear()
            items.update(saved)

    return restore, saved


def _note_dict(items: dict[Any, Any]) -> _Note:
    saved = dict(items)

    def restore() -> None:
        if len(items) != len(saved) or any(items.get(key, items) is not value for key, value in saved.items()):
            items.clear()
            items.update(saved)

    return restore, saved.values()


def _note_graph(module: torch.fx.GraphModule) -> _Note:
    """Note what a captured graph holds. Not the graph: its nodes carry fake tensors, which have no values."""
    own = {name: value for name, value in vars(module).items() if name not in ("_graph", "meta")}
    return None, own.values()


def _note_script(module: torch.jit.ScriptModule) -> _Note:
    """Note buffers and attributes of a script, which live outside Python and may be assigned."""
    concrete = getattr(module, "_concrete_type", None)  # a script from a file has none, and buffers all the same
    names = {*(concrete.get_attributes() if concrete is not None else ()), *dict(module.named_buffers(recurse=False))}
    saved = {name: getattr(module, name) for name in sorted(names)}

    def restore() -> None:
        for name, value in saved.items():
            now = getattr(module, name)
            if now is not value if isinstance(value, Tensor) else now != value:
                setattr(module, name, value)

    return restore, [*saved.values(), *module.parameters(recurse=False), *module.children()]


def _note_object(found: Any) -> _Note:
    attributes = getattr(found, "__dict__", None)
    return _note_dict(attributes) if isinstance(attributes, dict) else (None, ())


def _note_function(function: types.FunctionType) -> _Note:
    """Walk what a function closes over, and the tensors and modules it reads by a global name."""
    closed_over = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    global_names = (function.__globals__.get(name) for name in function.__code__.co_names)
    return None, [*closed_over, *(value for value in global_names if isinstance(value, _GLOBALS_WORTH_KEEPING))]


def _note_torch_generator(generator: torch.Generator) -> _Note:
    saved = generator.get_state()

    def restore() -> None:
        generator.set_state(saved)

    return restore, ()


def _note_numpy_generator(generator: np.random.Generator) -> _Note:
    saved = generator.bit_generator.state

    def restore() -> None:
        generator.bit_generator.state = saved

    return restore, ()


def _note_python_generator(generator: random.Random) -> _Note:
    saved = generator.getstate()
    return (lambda: generator.setstate(saved)), ()


def _note_array(array: np.ndarray[Any, Any]) -> _Note:
    saved = array.copy()

    def restore() -> None:
        if array.flags.writeable:
            np.copyto(array, saved)

    return restore, ()


_GLOBALS_WORTH_KEEPING = (Tensor, nn.Module)

_NOTES: dict[type, Callable[[Any], _Note]] = {
    list: _note_list,
    deque: _note_list,
    dict: _note_dict,
    set: _note_set,
    tuple: lambda items: (None, items),
    np.ndarray: _note_array,
    types.FunctionType: _note_function,
    types.MethodType: lambda method: (None, [method.__self__]),
}

_SUBCLASS_NOTES: tuple[tuple[Any, Callable[[Any], _Note]], ...] = (
    (torch.jit.ScriptModule, _note_script),
    (torch.fx.GraphModule, _note_graph),
    (nn.Module, lambda module: _note_dict(module.__dict__)),
    (Tensor, _note_tensor),
    (torch.Generator, _note_torch_generator),
    (np.random.Generator, _note_numpy_generator),
    (random.Random, _note_python_generator),
    (tuple, lambda items: (None, items)),
    (list, _note_list),
    (dict, _note_dict),
)
