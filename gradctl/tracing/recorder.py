"""Calls of a program that autograd does not differentiate: cuts, hooks, custom Functions; recorded and replayed.

A **cut** is a top-level torch call with a float argument that requires a gradient and a float result (tensor or number)
that does not: ``detach``, ``.data``, ``.item()``, anything under ``no_grad``. Autograd treats that value as a
constant, so finite differences must too: calls are numbered, the values of cuts recorded at the point and replayed
beside it. Of calls that change a tensor in place without autograd's knowledge the *change* is held fixed. A leaf that
requires no gradient for a part of the program (``requires_grad_(False)``) is read there with its value at the point.
Another function at a recorded number means that a branch changed, and the point beside is of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradctl.subject.frames import user_location
from gradctl.subject.torch_private import TensorBase, standard_gamma
from gradctl.tracing.documented_gradients import RecordCut, documented_gradient
from gradctl.tracing.graph import node_before
from gradctl.tracing.hooks import NoHandle, is_programs_call, node_without_hooks, real_nodes
from gradctl.tracing.recording import (
    BranchChanged,
    Cut,
    Recording,
    copied_value,
    is_float_without_gradient,
    requiring_grad,
    storage_of,
)
from gradctl.tracing.tracer import REGISTER_HOOK, Apply, FunctionClass, Tracer, map_nested, tensors_in


@dataclass(frozen=True, slots=True, eq=False)
class _Write:
    """The effect of a call on one tensor: its change, or the value that it has afterwards."""

    value: Tensor
    is_change: bool

    @property
    def changes_value(self) -> bool:
        """Whether it is a change other than zero."""
        return self.is_change and bool(self.value.any())

    @classmethod
    def of(cls, target: Tensor, before: Tensor | None, has_sources: bool) -> _Write | None:
        """Return the write to hold fixed, or None; ``before`` is the value before a write that autograd cannot see."""
        if not target.is_floating_point():
            return None
        if before is not None:
            same = target.shape == before.shape and target.dtype == before.dtype
            return cls(target.detach() - before, True) if same else None
        return cls(target.detach().clone(), False) if has_sources and not target.requires_grad else None


@dataclass(frozen=True, slots=True, eq=False)
class _FrozenLeaf:
    """A leaf that requires no gradient now, and the value that is read and written in its place."""

    cut: Cut
    leaf: Tensor
    value: Tensor


class Recorder(Tracer):
    """Watch one call of the user's model."""

    def __init__(
        self,
        recording: Recording | None = None,  # the one to replay; None starts another one
        *,
        hooks_only: bool = False,  # only disable hooks, for the run that autograd differentiates
        keeps_hooks: bool = False,  # not even that
        modules: Mapping[int, str] | None = None,  # paths of the model's modules, by identity
    ) -> None:
        super().__init__(modules)
        self.replaying = recording is not None
        self.recording = recording if recording is not None else Recording()
        self.hooks_only = hooks_only or keeps_hooks
        self.keeps_hooks = keeps_hooks
        self.opens_checkpoints = not hooks_only  # reentrant checkpointing hides the calls of its body
        self.on_function: Callable[[FunctionClass, Apply, tuple[Any, ...]], Any] | None = None
        self._number = -1
        self._frozen: dict[int, _FrozenLeaf] = {}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one top-level call, or the one that replaces it."""
        if self.keeps_hooks:
            return func(*args, **kwargs)
        if func in REGISTER_HOOK:
            self._disable_hook()
            return NoHandle()
        if func == _GET_NODE:
            node = func(*args, **kwargs)
            return node_without_hooks(node, self._disable_hook) if node is not None and is_programs_call() else node
        if func in _TAKE_NODES:
            args, kwargs = real_nodes((args, kwargs))
        if func is F.embedding:
            args, kwargs = self._without_frequency_scaling(args, kwargs)
        if self.hooks_only:
            return func(*args, **kwargs)
        self._number += 1
        return self._replay(func, args, kwargs) if self.replaying else self._record(func, args, kwargs)

    def apply(self, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        """Apply a Function, or a linear map that replaces it."""
        return apply(*args) if self.on_function is None else self.on_function(function, apply, args)

    def _without_frequency_scaling(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Disable ``scale_grad_by_freq`` like a hook: it is documented to change the gradient."""
        if not (args[5] if len(args) > 5 else kwargs.get("scale_grad_by_freq")):
            return args, kwargs
        self._disable_hook()
        return args[:5], {key: value for key, value in kwargs.items() if key != "scale_grad_by_freq"} | (
            {"sparse": args[6]} if len(args) > 6 else {}
        )

    def _disable_hook(self) -> None:
        if not self.replaying:
            self.recording.hooks.append(user_location())

    # ------------------------------------------------------------------ at the point

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _SET_REQUIRES_GRAD:
            return self._record_requires_grad(func, args, kwargs)
        if torch.is_grad_enabled() and (record := documented_gradient(func, args, kwargs)) is not None:
            return self._record_documented(record, func, args, kwargs)
        if _is_in_place(func, kwargs) and _targets(args, kwargs):
            return self._record_in_place(func, args, kwargs)
        result = func(*args, **kwargs)
        cut = self._record_cut(self._number, func, (args, kwargs), result)
        if cut is not None:
            storages = set(map(storage_of, requiring_grad((args, kwargs))))
            cut.alias = next((each for each in map(storage_of, tensors_in(result)) if each in storages), None)
            if cut.alias is not None:
                self.recording.aliases.add(cut.alias)
        return result

    def _record_cut(self, number: int, func: Any, arguments: Any, result: Any) -> Cut | None:
        """Record the result of a call if autograd treats it as a constant; return the cut, else None."""
        sources = requiring_grad(arguments) if is_float_without_gradient(result) else ()
        if not sources:
            return None
        cut = Cut(func, copied_value(result), False, user_location(), tuple(map(node_before, sources)))
        self.recording.cuts[number] = cut
        return cut

    def hold_fixed(self, number: int, function: Any, args: Any, result: Any) -> None:
        """Record the result of a custom Function if autograd treats it as a constant, as under ``no_grad``."""
        self._record_cut(-1 - number, function, args, result)

    def held_result(self, number: int, now: Any) -> Any:
        """Return the result of a custom Function at the point if that is held fixed, else the present result."""
        cut = self.recording.cuts.get(-1 - number)
        if cut is None:
            return now
        cut.compare(cut.value, now)
        return copied_value(cut.value)

    def _record_documented(self, record: RecordCut, func: Any, args: Any, kwargs: Any) -> Any:
        result, cut = record(func, args, kwargs)
        if cut is not None:
            self.recording.cuts[self._number] = cut
            if func is standard_gamma:
                self.recording.estimators.append(cut.place)
        return result

    def _record_requires_grad(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record a leaf that no longer requires a gradient: until it does, its value is held fixed."""
        tensor = args[0]
        before, source = tensor.requires_grad, node_before(tensor) if tensor.requires_grad else None
        result = func(*args, **kwargs)
        if before and not tensor.requires_grad and tensor.is_floating_point():
            self.recording.aliases.add(storage_of(tensor))  # autograd sees no write to it now
            self.recording.cuts[self._number] = Cut(func, tensor.detach().clone(), False, user_location(), (source,))
        return result

    def _record_in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record the writes of a call that autograd does not see, or that copy a value with a gradient."""
        targets = _targets(args, kwargs)
        before = [t.detach().clone() if self._is_unseen(func, t) else None for t in targets]
        result = func(*args, **kwargs)
        sources = requiring_grad((args if kwargs.get("out") is not None else args[1:], kwargs))
        writes = [_Write.of(target, old, bool(sources)) for target, old in zip(targets, before, strict=True)]
        if any(writes):
            moves = any(write is not None and write.changes_value for write in writes)
            nodes = tuple(map(node_before, (*sources, *(t for t in targets if t.requires_grad))))
            self.recording.cuts[self._number] = Cut(func, writes, True, user_location(), nodes, moves=moves)
        return result

    def _is_unseen(self, func: Any, target: Tensor) -> bool:
        """Return whether autograd does not see a write: through an alias, under no_grad, to a leaf, by ``.data =``."""
        storage = storage_of(target)
        if not target.requires_grad and storage in self.recording.aliases:
            self.recording.written.add(storage)
            return True
        return func == _SET_DATA or (target.requires_grad and (target.is_leaf or not torch.is_grad_enabled()))

    # ------------------------------------------------------------------ beside it

    def _replay(self, func: Any, args: Any, kwargs: Any) -> Any:
        cut = self.recording.cuts.get(self._number)
        if cut is not None and cut.func != func:
            raise BranchChanged
        if func in _SET_REQUIRES_GRAD:
            return self._replay_requires_grad(cut, func, args, kwargs)
        args, kwargs = self.held_fixed((args, kwargs))
        if cut is None:
            return func(*args, **kwargs)
        if cut.replay is not None and torch.is_grad_enabled():
            return cut.replay(cut, func, args, kwargs)
        if cut.writes:
            return _replay_writes(cut, func, args, kwargs)
        # Called all the same: it may use random numbers, and its value may move.
        result = func(*args, **kwargs)
        cut.compare(cut.value, result)
        # A result through which the program writes (``p.data.clamp_()``) must stay an alias.
        return result if cut.alias in self.recording.written else copied_value(cut.value)

    def _replay_requires_grad(self, cut: Cut | None, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        result = func(*args, **kwargs)
        if cut is not None:
            self._frozen[id(tensor)] = _FrozenLeaf(cut, tensor, cut.value.clone())
        elif tensor.requires_grad and (frozen := self._frozen.pop(id(tensor), None)) is not None:
            with torch.no_grad():  # the writes to it while it was frozen
                tensor.detach().add_(frozen.value - frozen.cut.value)
        return result

    def held_fixed(self, value: Any) -> Any:
        """Return ``value`` with the leaves in it that require no gradient now as they are at the point."""
        return map_nested(self._at_point, value) if self._frozen else value

    def _at_point(self, value: Any) -> Any:
        frozen = self._frozen.get(id(value))
        if frozen is None:
            return value
        frozen.cut.compare(frozen.cut.value, value)
        return frozen.value


def _replay_writes(cut: Cut, func: Any, args: Any, kwargs: Any) -> Any:
    """Add the recorded changes in place of the call; if it set values, call it, and then set the recorded ones."""
    pairs = _recorded_writes(cut, _targets(args, kwargs))
    changes_only = all(write and write.is_change for write in cut.value)
    result = _first(args, kwargs) if changes_only else func(*args, **kwargs)
    with torch.no_grad():
        for write, target in pairs:
            if not write.is_change:
                cut.compare(write.value, target)
                target.copy_(write.value)
            elif changes_only:
                target.detach().add_(write.value)
    return None if getattr(func, "__name__", "") in _NO_RESULT else result


def _recorded_writes(cut: Cut, targets: list[Tensor]) -> list[tuple[_Write, Tensor]]:
    """Return the recorded writes with their targets.

    Raises:
        BranchChanged: they have other targets, or of other shapes.
    """
    if len(targets) != len(cut.value):
        raise BranchChanged
    pairs = [(write, target) for write, target in zip(cut.value, targets, strict=True) if write is not None]
    if any(write.value.shape != target.shape for write, target in pairs):
        raise BranchChanged
    return pairs


_GET_NODE = vars(TensorBase)["grad_fn"].__get__
_TAKE_NODES = {torch.autograd.grad, torch.autograd.backward}
_SET_REQUIRES_GRAD = (Tensor.requires_grad_, vars(TensorBase)["requires_grad"].__set__)
_SET_DATA = vars(TensorBase)["data"].__set__
# Properties that are assigned without touching a value.
_SET_OTHERS = tuple(vars(TensorBase)[name].__set__ for name in ("grad", "requires_grad"))
_NO_RESULT = ("__setitem__", "__set__")
_WRITES_NOTHING = {"requires_grad_", "retain_grad", "share_memory_", "rename_", "refine_names", "pin_memory"}
_IN_PLACE_OPERATORS = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "pow", "floordiv", "mod", "and", "or", "xor")
}


def _targets(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an in-place call writes to: its first argument (a list for ``_foreach``), or ``out``."""
    out = kwargs.get("out")
    return tensors_in(_first(args, kwargs) if out is None else out)


def _first(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("tensor")  # nn.init passes its tensor by name


def _is_in_place(func: Any, kwargs: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name in _WRITES_NOTHING:
        return False
    if name in _NO_RESULT or kwargs.get("out") is not None:
        return func not in _SET_OTHERS
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS
