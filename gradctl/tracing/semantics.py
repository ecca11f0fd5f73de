"""What of a program a static form may lose or bake in: seen in one eager run, and undone in another, one by one.

Suppressed, a custom backward gives way to the derivative of its forward, a hook is not registered, ``detach`` and
``no_grad`` let gradients through, and Python is told what it was told on other inputs. If eager, so altered, computes
what a form does, that is what the form has done.

Private to torch (seen in 2.10 to 2.14): ``torch._C._functorch.peek_interpreter_stack``, ``_SingleLevelFunction``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction
from torch.overrides import TorchFunctionMode

from gradctl.subject.frames import user_location
from gradctl.tracing.functions import FunctionClass, inside_transforms, is_torch_own, watch_functions
from gradctl.tracing.hooks import NoHandle
from gradctl.tracing.recorder import BranchChanged, SourceLine

__all__ = ["ProgramEvents", "QueryResult", "StateQuery", "Suppressed", "watching"]

StateQuery = tuple[str, SourceLine | None]
Apply = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class QueryResult:
    """What Python was told by a call that gives no tensor: a truth value, a number, sizes.

    Attributes:
        question: name of the call, and its place in the user's program.
        value: the answer.
    """

    question: StateQuery
    value: Any


@dataclass(slots=True)
class ProgramEvents:
    """What one run did.

    Attributes:
        calls: top-level torch calls, in order, by name and place.
        answers: what Python was told, in order.
        functions: custom Functions, with the place of the first application.
        hooks, no_grads, detaches: places that register a hook, start a ``no_grad`` under which something that asks for
            a gradient is used, or detach such a thing.
    """

    calls: list[StateQuery] = field(default_factory=list)
    answers: list[QueryResult] = field(default_factory=list)
    functions: dict[FunctionClass, SourceLine | None] = field(default_factory=dict)
    hooks: list[SourceLine | None] = field(default_factory=list)
    no_grads: list[SourceLine | None] = field(default_factory=list)
    detaches: list[SourceLine | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Suppressed:
    """What a run does without, by class or by place.

    Attributes:
        answers: what Python is told instead, in order, by question.
    """

    functions: frozenset[FunctionClass] = frozenset()
    hooks: frozenset[SourceLine | None] = frozenset()
    no_grads: frozenset[SourceLine | None] = frozenset()
    detaches: frozenset[SourceLine | None] = frozenset()
    answers: Mapping[StateQuery, tuple[Any, ...]] = field(default_factory=dict)


@contextmanager
def watching(seen: ProgramEvents, undone: Suppressed | None = None) -> Iterator[None]:
    """Note in ``seen`` what is run in this context, and run it without what is to be undone."""
    program = _Program(seen, undone or Suppressed())
    with watch_functions(program.apply), inside_transforms(program.apply), program:
        yield


class _Program(TorchFunctionMode):
    """Sees the top-level calls of a run, and makes each, or what stands for it."""

    def __init__(self, seen: ProgramEvents, undone: Suppressed) -> None:
        super().__init__()
        self.seen, self.undone = seen, undone
        self._told = {question: deque(values) for question, values in undone.answers.items()}
        self._suspended = 0  # > 0 inside Function.forward, which runs under no_grad of its own
        self._no_grad: SourceLine | None = None  # where the block starts that is running now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: PLR0911  # a kind of call a line
        """Make one top-level call."""
        kwargs = kwargs or {}
        if self._suspended or torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        place = user_location()
        if func is torch._C._set_grad_enabled:
            self._no_grad = None if args[0] else place
            return func(*args, **kwargs)
        if func in _REGISTER_HOOK:
            _note(self.seen.hooks, place)
            return NoHandle() if place in self.undone.hooks else func(*args, **kwargs)
        question = (_name(func), place)
        self.seen.calls.append(question)
        if question in self._told:
            return self._tell(question, func, args, kwargs)
        if _asks((args, kwargs)):
            self._note_cut(question)
            if question[0] in _DETACHES and place in self.undone.detaches:
                return args[0] if question[0] == "detach_" else args[0].view_as(args[0])
        if not torch.is_grad_enabled() and self._no_grad in self.undone.no_grads:
            with torch.enable_grad():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if _is_pythons(result):
            self.seen.answers.append(QueryResult(question, result))
        return result

    def _note_cut(self, question: StateQuery) -> None:
        """Note what keeps the gradient from a call with an argument that asks for one."""
        if question[0] in _DETACHES:
            _note(self.seen.detaches, question[1])
        if not torch.is_grad_enabled():
            _note(self.seen.no_grads, self._no_grad)

    def _tell(self, question: StateQuery, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the answer to a question that was asked in another run."""
        if not self._told[question]:
            raise BranchChanged
        answer = self._told[question].popleft()
        if type(func(*args, **kwargs)) is not type(answer):
            raise BranchChanged
        return answer

    def apply(self, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        """Apply a Function, or let its forward be differentiated as any code."""
        if is_torch_own(function) or self._suspended:
            return apply(*args)
        self.seen.functions.setdefault(function, user_location())
        self._suspended += 1
        try:
            return _plainly(function, args) if function in self.undone.functions else apply(*args)
        finally:
            self._suspended -= 1


class _Context:
    """Takes what a ``forward`` tells its ``ctx``, for nobody."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        """Nothing is saved: no backward will ask."""

    save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_backward


def _plainly(function: FunctionClass, args: tuple[Any, ...]) -> Any:
    """Return what the forward of a Function computes, as a program that autograd differentiates."""
    forward: Any = function.forward
    with torch.enable_grad():
        if function.setup_context != _SingleLevelFunction.setup_context:
            return forward(*args)
        context = _Context()
        context.needs_input_grad = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        return forward(context, *args)


_REGISTER_HOOK = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
_DETACHES = ("detach", "data", "detach_")


def _name(func: Any) -> str:
    """Return ``stride``, or ``shape`` for a property that is read."""
    name = getattr(func, "__name__", type(func).__name__)
    return str(getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name)


def _note(places: list[SourceLine | None], place: SourceLine | None) -> None:
    if place not in places:
        places.append(place)


def _asks(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(map(_asks, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_asks, value))


def _is_pythons(result: Any) -> bool:
    if isinstance(result, (tuple, list)):
        return all(map(_is_pythons, result))
    return isinstance(result, (bool, int, float, complex))
