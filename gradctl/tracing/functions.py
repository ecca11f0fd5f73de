"""Custom ``autograd.Function``s of a program: seen as they are applied, and replaced by the linear map their
backward states.

A Function whose backward is not its derivative on purpose (straight-through, gradient reversal) is judged around:
beside the point it is y0 + J (x - x0), where J is the transpose of its own VJP, u ↦ VJP(u), differentiated in the
cotangent u.

Private to torch: up to 2.13 ``Function.apply`` ends in ``super().apply``, found on ``_SingleLevelFunction``; an
attribute there is met by every apply, also by one bound to a name long ago. In 2.14 ``Function.apply`` is a C method,
and one that was bound to a name before is not seen. A registered operator on lists of tensors passes its flattened
arguments and, last, a ``TensorListMetadata``, on which its forward leaves the structure of its outputs (2.10 to 2.14).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.function import Function, _SingleLevelFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.distributions.dirichlet import _Dirichlet

from gradctl.numerics.measures import dot
from gradctl.subject.frames import user_location
from gradctl.subject.seeding import borrowed_generators
from gradctl.tracing.recorder import BranchChanged, Program, SourceLine

__all__ = ["FunctionCall", "FunctionWatch", "inside_transforms", "is_torch_own", "is_users", "watch_functions"]

Apply = Callable[..., Any]
FunctionClass = type[Function]
Watch = Callable[[FunctionClass, Apply, tuple[Any, ...]], Any]


@dataclass(frozen=True, slots=True, eq=False)
class FunctionCall:
    """One application of a custom Function at the point.

    Attributes:
        function: the class.
        args: what it was given; tensors detached and copied, asking for a gradient where they did.
        place: file and line of the caller.
        module: path of the module that applies it; None outside any, "" for the model itself.
    """

    function: FunctionClass
    args: tuple[Any, ...]
    place: SourceLine | None
    module: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """What a Function's backward states about one application: y0 + J (x - x0).

    Attributes:
        inputs: x0, by position of the argument.
        outputs: y0, and as recorded what is not a differentiable tensor.
        single: whether the Function returns one value, not a tuple.
        cotangents: u, zero; asked for a gradient.
        transposed: VJP(u) by input position, with its graph in u.
        offsets: VJP(0) by input position: a gradient that backward adds from nothing (an auxiliary loss).
    """

    inputs: dict[int, Tensor]
    outputs: tuple[Any, ...]
    single: bool
    cotangents: list[Tensor]
    transposed: dict[int, Tensor]
    offsets: dict[int, Tensor]

    def push(self, tangents: dict[int, Tensor]) -> list[Tensor]:
        """Return J times the tangents, one tensor a differentiable output."""
        used = [i for i, vjp in self.transposed.items() if vjp.requires_grad]
        if not used:
            return [torch.zeros_like(u) for u in self.cotangents]
        found = torch.autograd.grad(
            [self.transposed[i] for i in used],
            self.cotangents,
            [tangents[i] for i in used],
            retain_graph=True,
            allow_unused=True,
        )
        return [torch.zeros_like(u) if c is None else c.detach() for u, c in zip(self.cotangents, found, strict=True)]

    def __call__(self, args: tuple[Any, ...]) -> tuple[Any, float]:
        """Return the outputs beside the point, and what the offsets add to the objective there."""
        if any(not isinstance(args[i], Tensor) or args[i].shape != x0.shape for i, x0 in self.inputs.items()):
            raise BranchChanged
        tangents = {i: args[i].detach() - x0 for i, x0 in self.inputs.items()}
        extra = sum(dot(offset, tangents[i]) for i, offset in self.offsets.items())
        changes = iter(self.push(tangents))
        values = tuple(
            (y.detach() + next(changes)).requires_grad_() if _is_differentiable(y) else y for y in self.outputs
        )
        return (values[0] if self.single else values), extra


@dataclass(frozen=True, slots=True, eq=False)
class _DirichletMap:
    """What the backward of a Dirichlet sample states, an implicit reparameterisation: it is no torch program's.

    ``slopes`` are those of ``torch._dirichlet_grad`` at the concentration and the sample of the point.
    """

    apply: Apply
    concentration: Tensor
    sample: Tensor
    slopes: Tensor

    def __call__(self, args: tuple[Any, ...]) -> tuple[Tensor, float]:
        """Return the sample beside the point; random numbers are drawn as at it."""
        self.apply(self.concentration)
        tangent = self.slopes * (args[0].detach() - self.concentration)
        return (self.sample + tangent - self.sample * tangent.sum(-1, keepdim=True)).requires_grad_(), 0.0


class Observer(Protocol):
    """What sees the applications of Functions, before and after each is made."""

    def before(
        self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...], *, inside: bool = False
    ) -> None:
        """See what application ``number`` is given; ``inside`` a transform of torch.func, what one sample of it is."""

    def after(self, number: int, result: Any) -> None:
        """See what it gives."""


@dataclass(slots=True)
class FunctionWatch:
    """Stands for the Functions of a program: shows them to an observer, and puts linear maps in their places beside
    the point.

    Attributes:
        linearised: tells which classes to replace.
        unjudged: those of them whose backward states no usable linear map; their outputs are cut, and what lies
            behind them is not judged.
        maps: linear maps and cut outputs, by number of the application.
        observer: sees each application in runs at the point and beside it.
        classes: all that were ever applied at the point.
        modules: paths of the model's modules, by identity.
        extra: what the offsets of linear maps add to the objective, since the last ``begin``.
    """

    linearised: Callable[[FunctionClass], bool] = lambda function: False
    unjudged: set[FunctionClass] = field(default_factory=set)
    maps: dict[int, LinearMap | _DirichletMap | tuple[Any, ...] | Tensor] = field(default_factory=dict)
    observer: Observer | None = None
    classes: set[FunctionClass] = field(default_factory=set)
    modules: dict[int, str] = field(default_factory=dict)
    extra: float = 0.0
    _structures: dict[int, Any] = field(default_factory=dict)
    _number: int = 0
    _program: Program | None = None

    @property
    def is_replaying(self) -> bool:
        """Whether this run is one beside the point."""
        return self._program is not None and self._program.replaying

    @property
    def applied(self) -> int:
        """How many Functions were applied since the last ``begin``."""
        return self._number

    def begin(self, program: Program) -> None:
        """Start a run of the program, which ``program`` watches too."""
        self._number, self._program, self.extra = 0, program, 0.0

    def __call__(self, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        """Apply a Function, or what stands for it."""
        program = self._program
        if program is None:
            return apply(*args)
        # A Function inside a Function is part of it; in a transform of torch.func this is one level of it.
        if program.suspended or torch._C._functorch.peek_interpreter_stack() is not None:
            return apply(*args)
        differentiating = program.hooks_only
        if _is_checkpoint(function) and program.opens_checkpoints:
            return args[0](*args[2:])  # reentrant checkpointing hides the cuts of its body, which is the same function
        number, self._number = self._number, self._number + 1
        program.suspended += 1
        try:
            if differentiating:
                return _detached(apply(*args)) if function in self.unjudged else apply(*args)
            if program.replaying:
                return self._replay(number, function, apply, args)
            return self._record(number, function, apply, args)
        finally:
            program.suspended -= 1

    def _record(self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        if function is _Dirichlet and torch.is_grad_enabled() and _is_differentiable(args[0]) and self._program:
            self._program.recording.estimators.append(user_location())
            result = apply(*args)
            x, at = result.detach(), args[0].detach().clone()
            slopes = torch._dirichlet_grad(x, at, at.sum(-1, keepdim=True).expand_as(at))
            self.maps[number] = _DirichletMap(apply, at, x.clone(), slopes)
            return result
        self.classes.add(function)
        if not torch.is_grad_enabled() or not self.linearised(function) or not any(map(_is_differentiable, args)):
            result = self._made(number, function, apply, args)
            if self._program is not None:
                self._program.hold_fixed(number, function, args, result)
            return result
        self._structures[number] = args[-1]
        linear = None
        if function not in self.unjudged:
            with borrowed_generators():  # what it draws is drawn again by the call itself
                linear = linear_map(apply, copied_arguments(args))
        result = self._made(number, function, apply, args)
        if linear is None:
            self.unjudged.add(function)
            self.maps[number] = _detached(result)
            return self.maps[number]
        self.maps[number] = linear
        return result

    def inside(self, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        """Apply a Function to the wrappers of a transform of torch.func; no linear map stands for it there."""
        program = self._program
        if program is None or program.suspended or program.hooks_only or self.linearised(function):
            return apply(*args)
        self.classes.add(function)
        number, self._number = self._number, self._number + 1
        program.suspended += 1
        try:
            if self.observer is None:
                return apply(*args)
            with temporarily_clear_interpreter_stack():
                plain: Apply = function.apply
                self.observer.before(number, function, plain, tuple(map(_one_sample, args)), inside=True)
            result = apply(*args)
            with temporarily_clear_interpreter_stack():
                one = tuple(map(_one_sample, result)) if isinstance(result, tuple) else _one_sample(result)
                self.observer.after(number, one)
            return result
        finally:
            program.suspended -= 1

    def _made(self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        if self.observer is None:
            return apply(*args)
        self.observer.before(number, function, apply, args)
        result = apply(*args)
        self.observer.after(number, result)
        return result

    def _replay(self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        if self._program is not None:
            args = tuple(map(self._program.held_fixed, args))
        stands = self.maps.get(number)
        if stands is None:
            made = self._made(number, function, apply, args)
            return made if self._program is None else self._program.held_result(number, made)
        if hasattr(args[-1], "output_spec"):
            recorded = self._structures[number]
            args[-1].output_spec, args[-1].result_is_tuple = recorded.output_spec, recorded.result_is_tuple
        if not isinstance(stands, LinearMap | _DirichletMap):
            return stands
        values, extra = stands(args)
        self.extra += extra
        return values


def _one_sample(arg: Any) -> Any:
    """Return the tensor inside the wrappers of torch.func, the first of a batch, asking for a gradient if any does."""
    if not isinstance(arg, Tensor) or not torch._C._functorch.is_functorch_wrapped_tensor(arg):
        return arg
    asks, tensor = arg.requires_grad, arg
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        batch = torch._C._functorch.maybe_get_bdim(tensor)
        tensor = torch._C._functorch.get_unwrapped(tensor)
        asks |= tensor.requires_grad
        tensor = tensor if batch < 0 else tensor.select(batch, 0)
    tensor = tensor.detach().requires_grad_(asks)
    return tensor.view_as(tensor)  # no leaf of the model


@contextmanager
def inside_transforms(watch: Watch) -> Iterator[None]:
    """Let ``watch`` stand for the Functions that ``torch.func`` transforms too, where ``apply`` is Python."""
    own = vars(Function)["apply"]
    if not isinstance(own, classmethod):
        yield
        return

    def apply(cls: FunctionClass, *args: Any, **kwargs: Any) -> Any:
        applied = own.__get__(None, cls)
        if torch._C._functorch.peek_interpreter_stack() is None:
            return applied(*args, **kwargs)
        return watch(cls, lambda *given: applied(*given, **kwargs), args)

    Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        Function.apply = own  # type: ignore[assignment]


@contextmanager
def watch_functions(watch: Callable[[FunctionClass, Apply, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Let ``watch`` stand for every application of a Function in Python."""

    def apply(cls: FunctionClass, *args: Any, **kwargs: Any) -> Any:
        own = torch._C._FunctionBase.__dict__["apply"].__get__(None, cls)
        return watch(cls, lambda *given: own(*given, **kwargs), args)

    holder: Any = _SingleLevelFunction if isinstance(vars(Function)["apply"], classmethod) else Function
    before = vars(holder).get("apply")
    holder.apply = classmethod(apply)
    try:
        yield
    finally:
        if before is None:
            del holder.apply
        else:
            holder.apply = before


def linear_map(apply: Apply, args: tuple[Any, ...]) -> LinearMap | None:
    """Return the linear map that a Function's backward states at ``args``, or None where it cannot be had.

    It cannot be had where backward cannot be differentiated in its cotangent (``once_differentiable``, numpy
    inside), or is not affine in it (gradient clipping).
    """
    leaves = {i: arg for i, arg in enumerate(args) if _is_differentiable(arg) and arg.layout == torch.strided}
    with torch.enable_grad(), keeps_what_it_saves():
        result = apply(*[leaves[i].clone() if i in leaves else arg for i, arg in enumerate(args)])
        outputs = result if isinstance(result, tuple) else (result,)
        cotangents = [torch.zeros_like(y).requires_grad_() for y in outputs if _is_differentiable(y)]
        transposed = _vjp_with_graph(outputs, leaves, cotangents) if cotangents else None
    if transposed is None:
        return None
    offsets = {i: value.detach() for i, value in transposed.items() if bool(value.detach().any())}
    inputs = {i: leaf.detach() for i, leaf in leaves.items() if i in transposed}
    linear = LinearMap(inputs, outputs, not isinstance(result, tuple), cotangents, transposed, offsets)
    return linear if _is_affine(leaves, linear) else None


def keeps_what_it_saves() -> AbstractContextManager[None]:
    """Return a context in which tensors are saved as they are: a checkpoint around it counts what its body saves."""
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:  # torch.func takes none
        return nullcontext()
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _vjp_with_graph(
    outputs: tuple[Any, ...], leaves: dict[int, Tensor], cotangents: list[Tensor]
) -> dict[int, Tensor] | None:
    """Return VJP(u) by input position, with its graph in u; None if backward raises."""
    differentiable = [y for y in outputs if _is_differentiable(y)]
    try:
        found = torch.autograd.grad(
            differentiable, list(leaves.values()), cotangents, create_graph=True, allow_unused=True
        )
    except Exception:  # the user's backward may raise anything; then it states no map
        return None
    dense = (g.to_dense() if g is not None and g.layout != torch.strided else g for g in found)
    return {i: value for i, value in zip(leaves, dense, strict=True) if value is not None}


def _is_affine(leaves: dict[int, Tensor], linear: LinearMap) -> bool:
    """Tell whether <VJP(u), p> = <VJP(0), p> + <u, J p> at random u, small and large."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(like: Tensor, size: float) -> Tensor:
        return size * torch.randn(like.shape, dtype=torch.float64, generator=generator).to(like.device, like.dtype)

    tangents = {i: gaussian(x, 1.0) for i, x in linear.inputs.items()}
    try:
        pushed = linear.push(tangents)
    except RuntimeError:  # once_differentiable speaks up only now
        return False
    offset = sum(dot(value, tangents[i]) for i, value in linear.offsets.items())
    for size in (1e-3, 1e3):
        cotangents = [gaussian(u, size).requires_grad_() for u in linear.cotangents]
        with torch.enable_grad(), keeps_what_it_saves():
            vjp = _vjp_with_graph(linear.outputs, leaves, cotangents)
        if vjp is None or vjp.keys() != linear.transposed.keys():
            return False
        left = sum(dot(value.detach(), tangents[i]) for i, value in vjp.items())
        right = offset + sum(dot(u.detach(), c) for u, c in zip(cotangents, pushed, strict=True))
        weight = sum(dot(value.detach().abs(), tangents[i].abs()) for i, value in vjp.items())
        if not abs(left - right) <= 1e-9 * (weight + abs(right)):
            return False
    return True


def copied_arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a Function's arguments as they are now: tensors detached and copied, asking for a gradient as they did."""
    return tuple(
        arg.detach().clone().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args
    )


def is_torch_own(function: FunctionClass) -> bool:
    """Tell torch's own Functions (checkpointing, module hooks, compiled graphs) from the user's."""
    return function.__module__.split(".")[0] == "torch"


def is_users(function: FunctionClass) -> bool:
    """Tell the user's Functions and registered operators, for which torch makes the Function (2.10 to 2.14)."""
    return not is_torch_own(function) or function.__name__.startswith("GeneratedBackwardFor_")


def _is_checkpoint(function: FunctionClass) -> bool:
    return function.__module__ == "torch.utils.checkpoint" and function.__name__ == "CheckpointFunction"


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _detached(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_detached, result))
    return result.detach() if isinstance(result, Tensor) else result
