"""Custom ``autograd.Function``s of a program, observed as they are applied, or replaced by linear maps.

A registered operator on lists of tensors passes its flattened arguments and, last, a ``TensorListMetadata``, in which
its forward stores the structure of its outputs (torch 2.10 to 2.14).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gradctl.subject.frames import user_location
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.torch_private import Dirichlet, batch_dimension, is_wrapped_tensor, unwrapped, without_transforms
from gradctl.tracing.linear_map import DirichletMap, LinearMap, is_differentiable, linear_map
from gradctl.tracing.recorder import Recorder
from gradctl.tracing.tracer import Apply, FunctionClass, SourceLine, is_in_transform


@dataclass(frozen=True, slots=True, eq=False)
class FunctionCall:
    """One application of a custom Function at the point."""

    function: FunctionClass
    args: tuple[Any, ...]  # tensors are detached copies, and require a gradient as the arguments did
    place: SourceLine | None  # of the caller
    module: str | None = None  # path of the module that applies it; None outside any, "" for the model itself


class FunctionObserver(Protocol):
    """Observes the applications of Functions, before and after each."""

    def before(
        self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...], *, inside: bool = False
    ) -> None:
        """Observe the arguments of application ``number``; ``inside`` a transform, those of one sample."""

    def after(self, number: int, result: Any) -> None:
        """Observe its result."""


@dataclass(slots=True)
class FunctionWatch:
    """Shows the Functions of a program to an observer, and replaces them by linear maps beside the point."""

    linearised: Callable[[FunctionClass], bool] = lambda function: False  # whether to replace a class
    # Replaced classes whose backward states no usable linear map: gradient flow stops at their outputs, so that the
    # gradients behind them are not judged.
    unjudged: set[FunctionClass] = field(default_factory=set)
    # Linear maps and detached outputs, by number of the application.
    maps: dict[int, LinearMap | DirichletMap | tuple[Any, ...] | Tensor] = field(default_factory=dict)
    observer: FunctionObserver | None = None  # of each application, at the point and beside it
    classes: set[FunctionClass] = field(default_factory=set)  # all that were ever applied at the point
    modules: dict[int, str] = field(default_factory=dict)  # paths of the model's modules, by identity
    extra: float = 0.0  # that the offsets of linear maps add to the objective, since the last ``begin``
    _structures: dict[int, Any] = field(default_factory=dict)
    _number: int = 0
    _program: Recorder = field(default_factory=Recorder)

    @property
    def is_replaying(self) -> bool:
        """Whether this run is one beside the point."""
        return self._program.replaying

    @property
    def applied(self) -> int:
        """How many Functions were applied since the last ``begin``."""
        return self._number

    def begin(self, program: Recorder) -> None:
        """Start a run of the program, which ``program`` watches too."""
        self._number, self._program, self.extra = 0, program, 0.0
        program.on_function = self._apply

    def _apply(self, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        program = self._program
        if _is_checkpoint(function) and program.opens_checkpoints:
            return args[0](*args[2:])  # reentrant checkpointing hides the cuts of its body, which is the same function
        number, self._number = self._number, self._number + 1
        is_transformed = is_in_transform()
        if is_transformed and (program.hooks_only or self.linearised(function)):
            return apply(*args)  # no linear map replaces a Function on the wrappers of a transform
        with program.body_hidden():
            if program.hooks_only:
                return _detached(apply(*args)) if function in self.unjudged else apply(*args)
            if is_transformed:
                return self._transform(number, function, apply, args)
            if program.replaying:
                return self._replay(number, function, apply, args)
            return self._record(number, function, apply, args)

    def _record(self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        if function is Dirichlet and torch.is_grad_enabled() and is_differentiable(args[0]):
            self._program.recording.estimators.append(user_location())
            result = apply(*args)
            self.maps[number] = DirichletMap.of(apply, args[0], result)
            return result
        self.classes.add(function)
        if not torch.is_grad_enabled() or not self.linearised(function) or not any(map(is_differentiable, args)):
            result = self._make(number, function, apply, args)
            self._program.hold_fixed(number, function, args, result)
            return result
        self._structures[number] = args[-1]
        with preserve_generators():  # the call itself generates the same random numbers again
            linear = None if function in self.unjudged else linear_map(apply, copied_arguments(args))
        result = self._make(number, function, apply, args)
        if linear is None:
            self.unjudged.add(function)
            result = _detached(result)
        self.maps[number] = result if linear is None else linear
        return result

    def _transform(self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        """Apply a Function to the wrappers of a transform of torch.func; an observer gets one sample."""
        self.classes.add(function)
        if self.observer is None:
            return apply(*args)
        with without_transforms():
            plain: Apply = function.apply
            self.observer.before(number, function, plain, tuple(map(_one_sample, args)), inside=True)
        result = apply(*args)
        with without_transforms():
            one = tuple(map(_one_sample, result)) if isinstance(result, tuple) else _one_sample(result)
            self.observer.after(number, one)
        return result

    def _make(self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        if self.observer is None:
            return apply(*args)
        self.observer.before(number, function, apply, args)
        result = apply(*args)
        self.observer.after(number, result)
        return result

    def _replay(self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        args = self._program.held_fixed(args)
        replacement = self.maps.get(number)
        if replacement is None:
            return self._program.held_result(number, self._make(number, function, apply, args))
        if hasattr(args[-1], "output_spec"):
            recorded = self._structures[number]
            args[-1].output_spec, args[-1].result_is_tuple = recorded.output_spec, recorded.result_is_tuple
        if not isinstance(replacement, LinearMap | DirichletMap):
            return replacement
        values, extra = replacement(args)
        self.extra += extra
        return values


def _one_sample(arg: Any) -> Any:
    """Return the tensor inside the wrappers of torch.func, the first of a batch, requiring a gradient if any does.

    It keeps its graph outside the transform.
    """
    if not isinstance(arg, Tensor) or not is_wrapped_tensor(arg):
        return arg
    requires_grad, tensor = arg.requires_grad, arg
    while is_wrapped_tensor(tensor):
        batch = batch_dimension(tensor)
        tensor = unwrapped(tensor)
        requires_grad |= tensor.requires_grad
        tensor = tensor if batch < 0 else tensor.select(batch, 0)
    if not tensor.requires_grad:
        tensor = tensor.detach().requires_grad_(requires_grad)
    return tensor.view_as(tensor)  # no leaf of the model


def copied_arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a Function's arguments as they are now: tensors detached and copied, requiring a gradient as they did."""
    return tuple(
        arg.detach().clone().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args
    )


def is_torch_own(function: FunctionClass) -> bool:
    """Return whether a Function is torch's own (checkpointing, module hooks, compiled graphs)."""
    return function.__module__.split(".")[0] == "torch"


def is_users(function: FunctionClass) -> bool:
    """Return whether a Function is the user's, or that of a registered operator, which torch makes (2.10 to 2.14)."""
    return not is_torch_own(function) or is_registered_operator(function)


def is_registered_operator(function: FunctionClass) -> bool:
    """Return whether a Function is one that torch makes for ``torch.library.register_autograd``."""
    return function.__name__.startswith("GeneratedBackwardFor_")


def _is_checkpoint(function: FunctionClass) -> bool:
    return function.__module__ == "torch.utils.checkpoint" and function.__name__ == "CheckpointFunction"


def _detached(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_detached, result))
    return result.detach() if isinstance(result, Tensor) else result
