"""What a program does that autograd does not differentiate: cuts, hooks, custom Functions; seen, recorded and replayed.

A **cut** is a top-level torch call with a float argument that asks for a gradient and a float result (tensor or number)
that does not: ``detach``, ``.data``, ``.item()``, anything under ``no_grad``. Autograd treats that value as a
constant, so finite differences must too: calls are numbered, the values of cuts recorded at the point and replayed
beside it. Calls that change a tensor in place behind autograd's back hold the *change* fixed. A leaf that asks for no
gradient for a part of the program (``requires_grad_(False)``) is read there with its value at the point. Another
function at a recorded number means that a branch changed, and the point beside is of no use.

Private to torch (seen in 2.10 to 2.14): ``torch._C._functorch.peek_interpreter_stack``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradctl.subject.frames import user_location
from gradctl.tracing.graph import Node, node_before
from gradctl.tracing.hooks import NoHandle, is_asked_by_program, node_without_hooks, real_nodes

__all__ = ["BranchChanged", "Cut", "Hook", "Program", "Recording", "SourceLine"]

SourceLine = tuple[str, int]


class BranchChanged(Exception):
    """Beside the point the program made other calls than at it."""


@dataclass(slots=True, eq=False)
class Cut:
    """One call whose value, or whose change of a tensor, is held fixed.

    Attributes:
        func: the torch function called.
        value: what to give back: the result at the point, or with ``writes`` one write a target, None for no matter.
        writes: whether the call changes tensors in place.
        place: file and line in the user's program.
        sources: nodes from which a gradient would go on to the tensors that the cut keeps from it.
        alias: the storage that the result shares with a source, if it does.
        moves: whether the value is another beside the point (``zeros_like`` is a cut that never does).
    """

    func: Any
    value: Any
    writes: bool
    place: SourceLine | None
    sources: tuple[Node, ...] = ()
    alias: int | None = None
    moves: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Write:
    """What a call did to one tensor: the change, or the value that it left."""

    value: Tensor
    is_change: bool


@dataclass(frozen=True, slots=True)
class Hook:
    """A hook on a tensor or a node that was set aside, by the place that registers it."""

    place: SourceLine | None


@dataclass(slots=True)
class Recording:
    """What one run at the point showed, for the runs beside it.

    ``aliases`` are storages that the program can reach behind autograd's back, ``written`` those it then wrote to;
    ``estimators`` are the places of samples whose gradient is a documented estimator.
    """

    cuts: dict[int, Cut] = field(default_factory=dict)
    hooks: list[Hook] = field(default_factory=list)
    estimators: list[SourceLine | None] = field(default_factory=list)
    aliases: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)


class Program(TorchFunctionMode):
    """Watch one call of the user's model.

    Args:
        recording: what to replay; None records anew.
        hooks_only: only set hooks aside (for the run that autograd differentiates).
        keeps_hooks: do not even that.
    """

    def __init__(
        self, recording: Recording | None = None, *, hooks_only: bool = False, keeps_hooks: bool = False
    ) -> None:
        super().__init__()
        self.replaying = recording is not None
        self.recording = recording if recording is not None else Recording()
        self.hooks_only = hooks_only or keeps_hooks
        self.keeps_hooks = keeps_hooks
        self.opens_checkpoints = not hooks_only  # reentrant checkpointing hides what its body does
        self.suspended = 0  # > 0 inside Function.forward, which runs under no_grad and is no cut
        self._number = -1
        self._frozen: dict[int, _Frozen] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make one top-level call, or what stands for it."""
        kwargs = kwargs or {}
        if self.suspended or torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        if self.keeps_hooks:
            return func(*args, **kwargs)
        if func in _REGISTER_HOOK:
            self._set_hook_aside()
            return NoHandle()
        if func == _GET_NODE:
            node = func(*args, **kwargs)
            return (
                node_without_hooks(node, self._set_hook_aside) if node is not None and is_asked_by_program() else node
            )
        if func in _TAKE_NODES:
            args, kwargs = real_nodes(args), {key: real_nodes(value) for key, value in kwargs.items()}
        if func is F.embedding:
            args, kwargs = self._without_frequency_scaling(args, kwargs)
        if self.hooks_only:
            return func(*args, **kwargs)
        self._number += 1
        return self._replay(func, args, kwargs) if self.replaying else self._record(func, args, kwargs)

    def watches(self, func: Any) -> bool:
        """Tell whether a call is one of the program's own: not inside a function transform, no hook."""
        return func not in _REGISTER_HOOK and torch._C._functorch.peek_interpreter_stack() is None

    def _without_frequency_scaling(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Set ``scale_grad_by_freq`` aside like a hook: by its documentation it makes the gradient another."""
        if not (args[5] if len(args) > 5 else kwargs.get("scale_grad_by_freq")):
            return args, kwargs
        self._set_hook_aside()
        return args[:5], {key: value for key, value in kwargs.items() if key != "scale_grad_by_freq"} | (
            {"sparse": args[6]} if len(args) > 6 else {}
        )

    def _set_hook_aside(self) -> None:
        if not self.replaying:
            self.recording.hooks.append(Hook(user_location()))

    # ------------------------------------------------------------------ at the point

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:  # a kind of call a line
        if func in _ASK:
            return self._record_asking(func, args, kwargs)
        if torch.is_grad_enabled() and (own := self._own_gradient(func, args, kwargs)) is not None:
            return own(func, args, kwargs)
        if _is_in_place(func, kwargs) and _targets(args, kwargs):
            return self._record_in_place(func, args, kwargs)
        result = func(*args, **kwargs)
        if not _is_float_without_gradient(result):
            return result
        sources = _asking_for_gradient((args, kwargs))
        if not sources:
            return result
        storages = {_storage(source) for source in sources}
        alias = next((_storage(tensor) for tensor in _tensors(result) if _storage(tensor) in storages), None)
        if alias is not None:
            self.recording.aliases.add(alias)
        nodes = tuple(map(node_before, sources))
        self.recording.cuts[self._number] = Cut(func, _frozen(result), False, user_location(), nodes, alias)
        return result

    def hold_fixed(self, number: int, function: Any, args: Any, result: Any) -> None:
        """Record the result of a custom Function that autograd takes for a constant: applied under ``no_grad``, say."""
        sources = _asking_for_gradient(args)
        if sources and _is_float_without_gradient(result):
            nodes = tuple(map(node_before, sources))
            # Functions have numbers of their own.
            self.recording.cuts[-1 - number] = Cut(function, _frozen(result), False, user_location(), nodes)

    def held_result(self, number: int, now: Any) -> Any:
        """Return what a custom Function gave at the point if that is held fixed, else what it gives now."""
        cut = self.recording.cuts.get(-1 - number)
        if cut is None:
            return now
        cut.moves = cut.moves or not _equal(cut.value, now)
        return _thawed(cut.value)

    def _own_gradient(self, func: Any, args: Any, kwargs: Any) -> Callable[[Any, Any, Any], Any] | None:
        """Return what records a call whose gradient is by its documentation not the derivative, None for any other."""
        if func is F.embedding:
            return self._record_embedding
        if func in _STRAIGHT_THROUGH or func is torch._standard_gamma:
            return self._record_elementwise
        return self._record_hard_gumbel if _is_hard_gumbel(func, args, kwargs) else None

    def _record_embedding(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record the rows at ``padding_idx`` and what ``max_norm`` does to the weight: no gradient passes there."""
        _, weight, padding, max_norm = _embedding_arguments(args, kwargs)
        before = weight.detach().clone() if max_norm is not None else None
        result = func(*args, **kwargs)
        if weight.requires_grad and (padding is not None or before is not None):
            change = None if before is None else weight.detach() - before
            self.recording.cuts[self._number] = Cut(func, (result.detach().clone(), change), False, None)
        return result

    def _record_elementwise(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record what torch documents with another gradient than the derivative, elementwise.

        That of fake quantisation is a clamp's, that of a Gamma sample an implicit reparameterisation.
        """
        x = args[0] if args else kwargs["input"]
        result = func(*args, **kwargs)
        if result.requires_grad and x.requires_grad:
            (slope,) = torch.autograd.grad(result, x, torch.ones_like(result), retain_graph=True)
            value = (x.detach().clone(), result.detach().clone(), slope)
            is_sample = func is torch._standard_gamma
            self.recording.cuts[self._number] = Cut(func, value, False, user_location(), moves=not is_sample)
            if is_sample:
                self.recording.estimators.append(user_location())
        return result

    def _record_asking(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record a leaf that no longer asks for a gradient: until it does, its value is held fixed."""
        tensor = args[0]
        asked, source = tensor.requires_grad, node_before(tensor) if tensor.requires_grad else None
        result = func(*args, **kwargs)
        if asked and not tensor.requires_grad and tensor.is_floating_point():
            self.recording.aliases.add(_storage(tensor))  # autograd sees no write to it now
            self.recording.cuts[self._number] = Cut(func, tensor.detach().clone(), False, user_location(), (source,))
        return result

    def _record_hard_gumbel(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record what hard sampling adds to the soft sample: inside, that is straight-through by detach."""
        state = torch.get_rng_state()
        hard = F.gumbel_softmax(*args, **kwargs)
        torch.set_rng_state(state)
        soft = _soft_gumbel(args, kwargs)
        value = (hard - soft).detach()
        self.recording.cuts[self._number] = Cut(F.gumbel_softmax, value, False, user_location(), moves=True)
        return hard

    def _record_in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record what a call does behind autograd's back: a change, or a value from what has a gradient."""
        targets = _targets(args, kwargs)
        before = [t.detach().clone() if self._is_behind(func, t) else None for t in targets]
        others = args if kwargs.get("out") is not None else args[1:]
        result = func(*args, **kwargs)
        sources = _asking_for_gradient((others, kwargs))
        writes = [
            self._write(target, then, bool(sources)) if target.is_floating_point() else None
            for target, then in zip(targets, before, strict=True)
        ]
        if any(write is not None for write in writes):
            moves = any(write is not None and write.is_change and bool(write.value.any()) for write in writes)
            tensors = (*sources, *(t for t in targets if t.requires_grad))
            nodes = tuple(map(node_before, tensors))
            self.recording.cuts[self._number] = Cut(func, writes, True, user_location(), nodes, moves=moves)
        return result

    def _is_behind(self, func: Any, target: Tensor) -> bool:
        """Tell whether autograd does not see a write: through an alias, under no_grad, to a leaf, by ``.data =``."""
        storage = _storage(target)
        if not target.requires_grad and storage in self.recording.aliases:
            self.recording.written.add(storage)
            return True
        return func == _SET_DATA or (target.requires_grad and (target.is_leaf or not torch.is_grad_enabled()))

    def _write(self, target: Tensor, before: Tensor | None, from_gradient: bool) -> _Write | None:
        if before is not None:
            same = target.shape == before.shape and target.dtype == before.dtype
            return _Write(target.detach() - before, True) if same else None
        if from_gradient and not target.requires_grad:
            return _Write(target.detach().clone(), False)
        return None

    # ------------------------------------------------------------------ beside it

    def _replay(self, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: PLR0911  # a kind of call a line
        cut = self.recording.cuts.get(self._number)
        if cut is not None and cut.func != func:
            raise BranchChanged
        if func in _ASK:
            return self._replay_asking(cut, func, args, kwargs)
        if self._frozen:
            args, kwargs = self.held_fixed(args), {key: self.held_fixed(value) for key, value in kwargs.items()}
        if cut is None:
            return func(*args, **kwargs)
        if torch.is_grad_enabled():
            if func is F.embedding:
                return _replay_embedding(cut, func, args, kwargs)
            if func in _STRAIGHT_THROUGH or func is torch._standard_gamma:
                return _replay_elementwise(cut, func, args, kwargs)
            if func is F.gumbel_softmax:
                return _soft_gumbel(args, kwargs) + cut.value
        if cut.writes:
            return _replay_writes(cut, func, args, kwargs)
        # Made all the same: it may draw random numbers, and whether its value moves is to be seen.
        result = func(*args, **kwargs)
        cut.moves = cut.moves or not _equal(cut.value, result)
        # What is written through (``p.data.clamp_()``) must stay the alias that it is.
        return result if cut.alias in self.recording.written else _thawed(cut.value)

    def _replay_asking(self, cut: Cut | None, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        result = func(*args, **kwargs)
        if cut is not None:
            self._frozen[id(tensor)] = _Frozen(cut, tensor, cut.value.clone())
        elif tensor.requires_grad and (frozen := self._frozen.pop(id(tensor), None)) is not None:
            with torch.no_grad():  # what was written to it while it was frozen
                tensor.detach().add_(frozen.value - frozen.cut.value)
        return result

    def held_fixed(self, value: Any) -> Any:
        """Return ``value`` with the leaves in it that ask for no gradient now as they are at the point."""
        if isinstance(value, Tensor):
            frozen = self._frozen.get(id(value))
            if frozen is None:
                return value
            frozen.cut.moves = frozen.cut.moves or not torch.equal(frozen.cut.value, value)
            return frozen.value
        if isinstance(value, dict):
            return {key: self.held_fixed(item) for key, item in value.items()}
        return _map(self.held_fixed, value) if isinstance(value, (tuple, list)) else value


@dataclass(frozen=True, slots=True, eq=False)
class _Frozen:
    """A leaf that asks for no gradient now, and what is read for it; that may be written to."""

    cut: Cut
    leaf: Tensor
    value: Tensor


def _replay_elementwise(cut: Cut, func: Any, args: Any, kwargs: Any) -> Any:
    x0, y0, slope = cut.value
    x: Tensor = args[0] if args else kwargs["input"]
    if x.shape != x0.shape:
        raise BranchChanged
    if func is torch._standard_gamma:
        func(x0, *args[1:], **kwargs)  # a sampler that rejects draws as many numbers as at the point
    return y0 + slope * (x - x0)


def _replay_embedding(cut: Cut, func: Any, args: Any, kwargs: Any) -> Any:
    index, weight, padding, max_norm = _embedding_arguments(args, kwargs)
    recorded, change = cut.value
    if change is not None:
        with torch.no_grad():
            weight.detach().add_(change)
    result = func(index, weight, padding) if max_norm is not None else func(*args, **kwargs)
    if result.shape != recorded.shape:
        raise BranchChanged
    if padding is None:
        return result
    return torch.where((index == padding % weight.shape[0]).unsqueeze(-1), recorded, result)


def _replay_writes(cut: Cut, func: Any, args: Any, kwargs: Any) -> Any:
    """Add the recorded changes instead of making the call; where it set values, make it and set the recorded ones."""
    targets = _targets(args, kwargs)
    if len(targets) != len(cut.value) or any(
        write is not None and write.value.shape != t.shape for write, t in zip(cut.value, targets, strict=True)
    ):
        raise BranchChanged
    changes_only = all(write is not None and write.is_change for write in cut.value)
    result = (args[0] if args else kwargs.get("tensor")) if changes_only else func(*args, **kwargs)
    with torch.no_grad():
        for write, target in zip(cut.value, targets, strict=True):
            if write is None:
                continue
            if not write.is_change:
                cut.moves = cut.moves or not _equal(write.value, target)
                target.copy_(write.value)
            elif changes_only:
                target.detach().add_(write.value)
    return None if getattr(func, "__name__", "") in _NO_RESULT else result


_STRAIGHT_THROUGH = {
    torch.fake_quantize_per_tensor_affine,
    torch.fake_quantize_per_channel_affine,
    torch.fused_moving_avg_obs_fake_quant,
}
_GET_NODE = vars(torch._C.TensorBase)["grad_fn"].__get__
_TAKE_NODES = {torch.autograd.grad, torch.autograd.backward}
_ASK = (Tensor.requires_grad_, vars(torch._C.TensorBase)["requires_grad"].__set__)
_REGISTER_HOOK = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
_NO_RESULT = ("__setitem__", "__set__")


def _gumbel_arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(("logits", "tau", "hard", "eps", "dim"), args, strict=False)), **kwargs}


def _is_hard_gumbel(func: Any, args: Any, kwargs: Any) -> bool:
    return func is F.gumbel_softmax and bool(_gumbel_arguments(args, kwargs).get("hard"))


def _soft_gumbel(args: Any, kwargs: Any) -> Tensor:
    return F.gumbel_softmax(**{**_gumbel_arguments(args, kwargs), "hard": False})


def _targets(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an in-place call writes to: its first argument (a list for ``_foreach``), or ``out``."""
    if kwargs.get("out") is not None:
        return _tensors(kwargs["out"])
    return _tensors(args[0] if args else kwargs.get("tensor"))  # nn.init passes its tensor by name


def _is_in_place(func: Any, kwargs: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name in _WRITES_NOTHING:
        return False
    if name in _NO_RESULT or kwargs.get("out") is not None:
        return func not in _ASSIGN_ASIDE
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS


_WRITES_NOTHING = {"requires_grad_", "retain_grad", "share_memory_", "rename_", "refine_names", "pin_memory"}
_IN_PLACE_OPERATORS = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "pow", "floordiv", "mod", "and", "or", "xor")
}
# Properties that are assigned without touching a value.
_SET_DATA = vars(torch._C.TensorBase)["data"].__set__
_ASSIGN_ASIDE = tuple(vars(torch._C.TensorBase)[name].__set__ for name in ("grad", "requires_grad"))


def _embedding_arguments(args: Any, kwargs: Any) -> tuple[Tensor, Tensor, int | None, float | None]:
    """Return index, weight, padding_idx and max_norm of a call of ``F.embedding``."""
    given = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
    return given["input"], given["weight"], given.get("padding_idx"), given.get("max_norm")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return []


def _asking_for_gradient(value: Any) -> tuple[Tensor, ...]:
    return tuple(t for t in _tensors(value) if t.requires_grad and (t.is_floating_point() or t.is_complex()))


def _is_float_without_gradient(result: Any) -> bool:
    """Tell a float tensor, number or array without a gradient; mixed results count only where none asks for one."""
    if isinstance(result, Tensor):
        return not result.requires_grad and (result.is_floating_point() or result.is_complex())
    if isinstance(result, (float, complex)):
        return True
    if isinstance(result, np.ndarray):
        return result.dtype.kind in "fc"
    if isinstance(result, (tuple, list)) and result and not isinstance(result, torch.Size):
        floats = [item for item in result if _is_float_without_gradient(item)]
        return bool(floats) and not any(tensor.requires_grad for tensor in _tensors(result))
    return False


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list):
        return [_map(function, item) for item in value]
    if isinstance(value, tuple):
        mapped = [_map(function, item) for item in value]
        # torch.return_types (a structseq) takes one sequence, a named tuple its fields.
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return function(value)


def _frozen(result: Any) -> Any:
    return _map(lambda item: item.detach().clone() if isinstance(item, Tensor) else _copied_array(item), result)


def _thawed(value: Any) -> Any:
    return _map(lambda item: item.clone() if isinstance(item, Tensor) else _copied_array(item), value)


def _copied_array(item: Any) -> Any:
    return item.copy() if isinstance(item, np.ndarray) else item


def _equal(recorded: Any, now: Any) -> bool:
    if isinstance(recorded, Tensor):
        if not isinstance(now, Tensor) or recorded.shape != now.shape:
            return False
        return recorded.layout != torch.strided or torch.equal(recorded, now)  # torch compares no sparse tensors
    if isinstance(recorded, np.ndarray):
        return bool(np.array_equal(recorded, now))
    if isinstance(recorded, (tuple, list)):
        return len(recorded) == len(now) and all(map(_equal, recorded, now))
    return bool(recorded == now)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
