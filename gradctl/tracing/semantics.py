"""The semantics of a program that a static form may lose or fix: noted in one eager run, suppressed in another.

If suppressed, a custom backward is replaced by the derivative of its forward, a hook is not registered, ``detach`` and
``no_grad`` let gradients through, and Python queries have the results that they had on other inputs. If eager then
computes the same as a form, the form has lost these semantics.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradctl.subject.frames import user_location
from gradctl.subject.torch_private import SingleLevelFunction, set_grad_enabled
from gradctl.tracing.functions import is_torch_own
from gradctl.tracing.hooks import NoHandle
from gradctl.tracing.recording import BranchChanged
from gradctl.tracing.tracer import REGISTER_HOOK, Apply, FunctionClass, SourceLine, Tracer, tensors_in

StateQuery = tuple[str, SourceLine | None]  # name of a call, and its place in the user's program


@dataclass(frozen=True, slots=True)
class QueryResult:
    """The result of a call that returns no tensor to Python: a truth value, a number, sizes."""

    question: StateQuery
    value: Any


@dataclass(slots=True)
class ProgramEvents:
    """The events of one run, in order."""

    calls: list[StateQuery] = field(default_factory=list)  # top-level torch calls
    answers: list[QueryResult] = field(default_factory=list)
    functions: dict[FunctionClass, SourceLine | None] = field(default_factory=dict)  # with the first application
    hooks: list[SourceLine | None] = field(default_factory=list)  # places that register a hook
    no_grads: list[SourceLine | None] = field(default_factory=list)  # where a block starts that uses such a tensor
    detaches: list[SourceLine | None] = field(default_factory=list)  # places that detach a tensor with a gradient


@dataclass(frozen=True, slots=True)
class Suppressed:
    """The semantics that a run omits, by class or by place."""

    functions: frozenset[FunctionClass] = frozenset()
    hooks: frozenset[SourceLine | None] = frozenset()
    no_grads: frozenset[SourceLine | None] = frozenset()
    detaches: frozenset[SourceLine | None] = frozenset()
    answers: Mapping[StateQuery, tuple[Any, ...]] = field(
        default_factory=dict
    )  # that replace those of queries, in order


@contextmanager
def watching(events: ProgramEvents, suppressed: Suppressed | None = None) -> Iterator[None]:
    """Note the events of what runs in this context, without the ``suppressed`` semantics."""
    tracer = _SemanticsTracer(events, suppressed or Suppressed())
    with tracer.functions(), tracer:
        yield


class _SemanticsTracer(Tracer):
    """Notes the events of a run, and makes each call, or the one that replaces it."""

    def __init__(self, events: ProgramEvents, suppressed: Suppressed) -> None:
        super().__init__()
        self.events, self.suppressed = events, suppressed
        self._answers = {question: deque(values) for question, values in suppressed.answers.items()}
        self._no_grad: SourceLine | None = None  # where the block starts that is running now

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one top-level call."""
        place = user_location()
        if func is set_grad_enabled:
            self._no_grad = None if args[0] else place
            return func(*args, **kwargs)
        if func in REGISTER_HOOK:
            _note(self.events.hooks, place)
            return NoHandle() if place in self.suppressed.hooks else func(*args, **kwargs)
        return self._call_tensors((_name(func), place), func, args, kwargs)

    def _call_tensors(self, question: StateQuery, func: Any, args: Any, kwargs: Any) -> Any:
        self.events.calls.append(question)
        if question in self._answers:
            return self._answer(question, func, args, kwargs)
        if any(tensor.requires_grad for tensor in tensors_in((args, kwargs))):
            self._note_cut(question)
            if question[0] in _DETACHES and question[1] in self.suppressed.detaches:
                return args[0] if question[0] == "detach_" else args[0].view_as(args[0])
        if not torch.is_grad_enabled() and self._no_grad in self.suppressed.no_grads:
            with torch.enable_grad():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if _is_python_value(result):
            self.events.answers.append(QueryResult(question, result))
        return result

    def _note_cut(self, question: StateQuery) -> None:
        """Note a ``detach`` or a ``no_grad`` that stops the gradient of an argument."""
        if question[0] in _DETACHES:
            _note(self.events.detaches, question[1])
        if not torch.is_grad_enabled():
            _note(self.events.no_grads, self._no_grad)

    def _answer(self, question: StateQuery, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result that the query had in another run.

        Raises:
            BranchChanged: that run had fewer such queries, or this result is of another type.
        """
        if self._answers[question]:
            answer = self._answers[question].popleft()
            if type(func(*args, **kwargs)) is type(answer):
                return answer
        raise BranchChanged

    def apply(self, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        """Apply a Function, or let its forward be differentiated as any code."""
        if is_torch_own(function):
            return apply(*args)
        self.events.functions.setdefault(function, user_location())
        with self.body_hidden():
            return differentiably(function, args) if function in self.suppressed.functions else apply(*args)


class _Context:
    """A ``ctx`` that ignores the calls of a ``forward``."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        """Save nothing: there is no backward."""

    save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_backward


def differentiably(function: FunctionClass, args: tuple[Any, ...]) -> Any:
    """Return the result of a Function whose forward runs as a program that autograd differentiates."""
    forward: Any = function.forward
    with torch.enable_grad():
        if function.setup_context != SingleLevelFunction.setup_context:
            return forward(*args)
        context = _Context()
        context.needs_input_grad = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        return forward(context, *args)


_DETACHES = ("detach", "data", "detach_")


def _name(func: Any) -> str:
    """Return ``stride``, or ``shape`` for a property that is read."""
    name = getattr(func, "__name__", type(func).__name__)
    return str(getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name)


def _note(places: list[SourceLine | None], place: SourceLine | None) -> None:
    if place not in places:
        places.append(place)


def _is_python_value(result: Any) -> bool:
    if isinstance(result, (tuple, list)):
        return all(map(_is_python_value, result))
    return isinstance(result, (bool, int, float, complex))
