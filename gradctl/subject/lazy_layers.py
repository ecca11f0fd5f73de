"""Layers that a model builds in its first call, built once, in a copy, so that they are leaves like all others.

The model that comes out is as it was before the call but for what was built.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from gradctl.core.errors import is_out_of_memory
from gradctl.subject.copies import private_copy
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.instance import InputMode, Instance, lazy_parameters
from gradctl.subject.reach import DICTS, instance_dict, walk
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import module_of, optimized_inner
from gradctl.subject.state import State
from gradctl.subject.subject import Subject


def has_lazy_parameters(subject: Subject) -> bool:
    """Return whether parameters or buffers of the model have no shape yet (``nn.LazyLinear``)."""
    return bool(_lazy_names(subject.model))


def infer_shapes(subject: Subject) -> Subject:
    """Return the subject with its lazy modules as its first call makes them; all else is as it was.

    Raises:
        TargetError: GC112 if the call raises, or leaves some without a shape.
    """
    model, args, kwargs = _copy(subject)
    named = _owner(model).named_modules(remove_duplicate=False)
    lazy = {name: child for name, child in named if _is_lazy(child)}
    values: dict[int, dict[str, Tensor]] = {}

    def note(module: nn.Module, given: Any) -> None:  # runs after torch's own hook, which infers the shapes
        values[id(module)] = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    hooks = [child.register_forward_pre_hook(note) for child in set(lazy.values())]
    seed_generators(subject.seed)
    try:
        with torch.enable_grad():
            model(*args, **kwargs)
    except Exception as error:  # the user's model may raise anything
        if is_out_of_memory(error):
            raise
        said, names = (
            f", and its first call raises {first_line(error)}",
            _lazy_names(model) or _lazy_names(subject.model),
        )
        raise lazy_parameters(subject, names, said, user_frames(error)) from error
    if left := _lazy_names(model):
        raise lazy_parameters(subject, left, ", and its first call leaves them so")
    for hook in hooks:
        hook.remove()
    again, *_ = _copy(subject)
    fresh = _owner(again)
    for name, child in lazy.items():
        child.load_state_dict(values[id(child)])
        parent, _, key = name.rpartition(".")
        if name:
            fresh.get_submodule(parent)._modules[key] = child
        else:
            fresh = child
    return dataclasses.replace(subject, model=fresh if isinstance(again, nn.Module) else getattr(fresh, again.__name__))


def build_layers(subject: Subject, input_mode: InputMode) -> Subject:
    """Return the subject with the tensors that its first call makes and later calls keep; itself if it makes none.

    Raises:
        Exception: whatever the model raises.
    """
    instance = Instance(subject, input_mode=input_mode, keep_hooks=True)
    model = instance.model
    before = {id(found): found for _, found in walk([((), model)])}
    leaves = [tensor for leaf in instance.leaves for tensor in leaf.sharing]
    state = State([model], leaves)
    values = State([each for each in before.values() if isinstance(each, Tensor)], leaves)
    with instance.preserve_leaves(), torch.enable_grad():
        instance.run()
        first = _trained_since(model, before)
        instance.call(model, *instance.inputs())
        second = _trained_since(model, before)
        kept = {key: tensor for key, tensor in second.items() if key in first}
        if not kept:
            return subject
        _restore_but(state, before, kept)
        instance.call(model, *instance.inputs())
        again = _trained_since(model, before)
        if len(again.keys() - kept.keys()) > len(second.keys() - kept.keys()):
            values.restore()  # it was built anew: what says that it is there already is kept elsewhere
        else:
            _restore_but(state, before, kept)
    return dataclasses.replace(subject, model=model)


def _restore_but(state: State, before: Mapping[int, Any], kept: Mapping[int, Tensor]) -> None:
    """Put the state of a model back but for what it built, and the flags beside that."""
    owners = [own for found in before.values() for own in _changed(found, before, kept)]
    after = [own.copy() for own in owners]
    state.restore()
    for own, now in zip(owners, after, strict=True):
        filled = _merged(own.copy(), now, kept) if isinstance(own, dict) else now
        own.clear()
        (own.update if isinstance(own, dict) else own.extend)(filled)


def _trained_since(model: Any, before: Mapping[int, Any]) -> dict[int, Tensor]:
    """Return by identity the tensors that require a gradient, and that the model did not hold before."""
    found = (each for _, each in walk([((), model)]) if isinstance(each, Tensor))
    return {id(each): each for each in found if each.is_leaf and each.requires_grad and id(each) not in before}


def _changed(found: Any, before: Mapping[int, Any], kept: Mapping[int, Tensor]) -> list[Any]:
    """Return the dicts and lists by which an object holds what was built: all of a module's if one of them does."""
    parts = [found] if isinstance(found, (list, deque)) or type(found) in DICTS else _tables(found)
    values = [value for part in parts for value in (part.values() if isinstance(part, dict) else part)]
    new = walk(((), value) for value in values if id(value) not in before)
    return parts if any(id(each) in kept for _, each in new) else []


def _tables(found: Any) -> list[dict[Any, Any]]:
    """Return the dicts in which an object keeps its attributes, and a module its parts."""
    is_module = isinstance(found, nn.Module) and not isinstance(found, torch.jit.ScriptModule)
    tables = [vars(found)[name] for name in ("_parameters", "_buffers", "_modules")] if is_module else []
    own = instance_dict(found)
    return tables if own is None else [*tables, own]


def _merged(before: Mapping[Any, Any], after: Mapping[Any, Any], kept: Mapping[int, Tensor]) -> dict[Any, Any]:
    """Return what an object that built something is to hold: its flags as they are now, its tensors as they were."""
    merged = {}
    for key, value in after.items():
        if not isinstance(value, Tensor) or id(value) in kept:
            merged[key] = value
        elif key in before:
            merged[key] = before[key]
        elif value.grad_fn is None:  # a buffer, and no activation
            merged[key] = value
    return merged


def _copy(subject: Subject) -> tuple[Any, ...]:
    return private_copy((optimized_inner(subject.model), subject.args, subject.kwargs))[0]


def _owner(model: Any) -> nn.Module:
    owner = module_of(optimized_inner(model))
    assert owner is not None  # only modules have lazy parameters
    return owner


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _lazy_names(model: Any) -> list[str]:
    owner = module_of(optimized_inner(model))
    tensors = [*owner.named_parameters(), *owner.named_buffers()] if owner is not None else []
    return [name for name, tensor in tensors if is_lazy(tensor)]
