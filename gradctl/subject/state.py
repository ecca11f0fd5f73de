"""What a model remembers between calls: buffers, caches, counters, generators. A snapshot that can be put back.

Each run must start from the same state, and a deep copy for each would cost more than the run. So the objects that are
reachable from the model are walked once, what they hold is noted shallowly, and only what changed is put back.
"""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradctl.subject.aliasing import overlaps
from gradctl.subject.reach import DICTS, instance_dict, script_names, slot_values, walk

_Restore = Callable[[], None]


class State:
    """The mutable state reachable from some roots, as it was when this was made.

    ``excluded`` is left as it is: tensors that the caller sets before each run (the leaves). ``walked`` are objects
    that others were found to reach, besides the roots.
    """

    def __init__(self, roots: Iterable[Any], excluded: Iterable[Any] = (), walked: Iterable[Any] = ()) -> None:
        reached = {id(each): each for each in (*walked, *(each for _, each in walk(((), root) for root in roots)))}
        left = {id(each) for each in excluded}
        found = [each for key, each in reached.items() if key not in left]
        self._restorers = [restore for each in found if (restore := _restorer(each)) is not None]

    def restore(self) -> None:
        """Put everything back that changed since the snapshot."""
        with torch.no_grad():
            for restore in self._restorers:
                restore()


def _restorer(found: Any) -> _Restore | None:
    """Return what puts back what ``found`` holds now; None for what cannot change."""
    by_class = (note for kind, note in _SUBCLASS_NOTES if isinstance(found, kind))
    return (_NOTES.get(type(found)) or next(by_class, _note_object))(found)


def _note_tensor(tensor: Tensor) -> _Restore | None:
    if overlaps(tensor):
        return None  # an expanded input: nothing can be written to it in place
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
            if not alike:
                tensor.data = saved.clone()
            elif tensor.layout != torch.strided or tensor.is_quantized or not torch.equal(tensor, saved):
                tensor.copy_(saved)  # only then: a write counts a version, and a graph may have saved the tensor
            version = tensor._version
        if tensor.grad_fn is not None and not has_history and not tensor._is_view():
            tensor.detach_()  # written from a tensor that requires a gradient: the graph of that run is gone
        if tensor.is_leaf and tensor.grad is not grad:
            tensor.grad = grad

    return restore


def _noting(
    save: Callable[[Any], Any], put_back: Callable[[Any, Any], Any], is_same: Callable[[Any, Any], bool] | None = None
) -> Callable[[Any], _Restore]:
    """Return a function that notes an object, by what saves its value and puts it back unless it is the same."""

    def note(found: Any) -> _Restore:
        saved = save(found)

        def restore() -> None:
            if is_same is None or not is_same(found, saved):
                put_back(found, saved)

        return restore

    return note


def _refill(found: Any, saved: Any) -> None:
    found.clear()
    (found.extend if isinstance(saved, list) else found.update)(saved)


def _holds(items: Any, saved: list[Any]) -> bool:
    return len(items) == len(saved) and all(now is before for now, before in zip(items, saved, strict=True))


def _maps(items: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    return len(items) == len(saved) and all(items.get(key, items) is value for key, value in saved.items())


def _note_script(module: torch.jit.ScriptModule) -> _Restore | None:
    """Note buffers and attributes of a script, which live outside Python and may be assigned."""
    saved = {name: getattr(module, name) for name in script_names(module)}

    def restore() -> None:
        for name, value in saved.items():
            now = getattr(module, name)
            if now is not value if isinstance(value, Tensor) else now != value:
                setattr(module, name, value)

    return restore


_note_list = _noting(list, _refill, _holds)
_note_dict = _noting(dict, _refill, _maps)


def _note_object(found: Any, contents: _Restore | None = None) -> _Restore | None:
    """Note the attributes of an object; ``contents`` puts back what it holds beside them."""
    own, slots = instance_dict(found), slot_values(found)
    parts = [part for part in (contents, _note_dict(own) if own is not None else None) if part is not None]
    if not slots and len(parts) < 2:
        return parts[0] if parts else None

    def restore() -> None:
        for part in parts:
            part()
        for name, value in slots.items():
            object.__setattr__(found, name, value)

    return restore


def _note_function(function: types.FunctionType) -> _Restore | None:
    """Note the variables of a closure, which the function may assign (``nonlocal``)."""
    cells = [(cell, cell.cell_contents) for cell in function.__closure__ or () if cell != types.CellType()]

    def restore() -> None:
        for cell, value in cells:
            cell.cell_contents = value

    return restore if cells else None


_NOTES: dict[type, Callable[[Any], _Restore | None]] = {
    list: _note_list,
    deque: _note_list,
    **dict.fromkeys(DICTS, _note_dict),
    set: _noting(set, _refill, lambda items, saved: items == saved),
    np.ndarray: _noting(np.copy, lambda array, saved: np.copyto(array, saved) if array.flags.writeable else None),
    types.FunctionType: _note_function,
}

_SUBCLASS_NOTES: tuple[tuple[Any, Callable[[Any], _Restore | None]], ...] = (
    (torch.jit.ScriptModule, _note_script),
    (torch.fx.GraphModule, lambda module: None),
    (nn.Module, lambda module: _note_dict(module.__dict__)),
    (Tensor, _note_tensor),
    (torch.Generator, _noting(torch.Generator.get_state, torch.Generator.set_state)),
    (
        np.random.Generator,
        _noting(lambda each: each.bit_generator.state, lambda each, saved: setattr(each.bit_generator, "state", saved)),
    ),
    (random.Random, _noting(random.Random.getstate, random.Random.setstate)),
    (list, lambda items: _note_object(items, _note_list(items))),
    (dict, lambda items: _note_object(items, _note_dict(items))),
)
