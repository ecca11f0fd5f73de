"""A private copy of a subject, with its leaves, that can be run again and again from the same state and seed.

The user's object is never run: ``jit.trace`` advances BatchNorm statistics, a forward can mutate its inputs.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gradctl.core.errors import TargetError
from gradctl.core.names import buffer_name, input_name, output_name, parameter_name
from gradctl.subject.aliasing import (
    clone_as_laid_out,
    flat_copy,
    move_by_ulp,
    overlaps,
    reach_of,
    sharing_groups,
    storage_key,
)
from gradctl.subject.copies import private_copy
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.inputs.example import input_names
from gradctl.subject.reach import Path, instance_dict, path_name, walk
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import POSITIONAL, function_class, module_of, optimized_inner, parameters_of
from gradctl.subject.state import State
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves, map_leaves

InputMode = Literal["leaf", "clone", "constant"]


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """One differentiable tensor of the subject.

    Attributes:
        name: ``param:fc1.weight`` or ``input:x``; ``param:heads.0`` for a tensor that is no registered parameter.
        tied: the other names of the same storage.
        tensor: the working tensor; writing to it changes what the next run reads.
        sharing: every tensor object that collects a gradient for this storage, ``tensor`` among them.
        is_registered: whether it is a parameter of the module, which forms know by its name.
        native_dtype: dtype in the user's own model.
    """

    name: str
    tensor: Tensor
    native_dtype: torch.dtype
    tied: tuple[str, ...] = ()
    sharing: tuple[Tensor, ...] = ()
    is_registered: bool = False

    def take_gradient(self) -> Tensor | None:
        """Return what backward left in ``.grad``, summed over tied parameters, dense; and clear it."""
        total: Tensor | None = None
        for tensor in self.sharing or (self.tensor,):
            gradient, tensor.grad = tensor.grad, None
            if gradient is not None:
                gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
                total = gradient if total is None else total + gradient
        return total


# What the functions of the last instance share with the user's own (a dict that a hook fills): before another is made,
# and at the end of a check, it is as it was.
_shared_state: list[State] = []


def restore_shared() -> None:
    """Put back the lists, dicts and variables of the user's own that runs of the last instance have changed."""
    while _shared_state:
        _shared_state.pop().restore()


class Instance:
    """A copy of ``subject`` to run.

    Attributes:
        leaves: what is differentiable.
        shared: the tensors and modules that the copy has to share with the user's own, by name.
        closed_outputs: outputs of the last call that are not tensors, by path.
        without_grad: names of leaves that require no gradient in the runs to come.

    Args:
        promoted: whether parameters, buffers, float inputs and float tensors kept as attributes become float64.
        input_mode: how float inputs are passed: as leaves that require a gradient, as clones of such leaves (for
            programs that change their inputs in place), or as constants.
        keep_hooks: keep backward hooks of modules and gradient hooks of parameters (forms are compared with them).

    Raises:
        TargetError: GC112 if the model cannot be copied.
    """

    def __init__(
        self, subject: Subject, *, promoted: bool = False, input_mode: InputMode = "leaf", keep_hooks: bool = False
    ) -> None:
        self.subject, self.input_mode = subject, input_mode
        self.without_grad: frozenset[str] = frozenset()
        self.closed_outputs: list[tuple[str, Any]] = []
        restore_shared()
        self.model, self._args, self._kwargs, self._loss, hooks, original_ids = _copied(subject)
        function = function_class(self.model)
        if function is not None:  # looked up at each call, where whatever watches Functions stands
            self.model = lambda *args: function.apply(*args)  # type: ignore[no-untyped-call]  # noqa: PLW0108
        module = module_of(self.model)
        given = input_names(subject.model, self._args, self._kwargs)
        closed = [((name,), value) for name, value in given if not isinstance(value, Tensor)]  # a module, perhaps
        held = list(walk([((), self.model), (("loss",), self._loss), *closed]))
        shared = [(path, found) for path, found in held if id(found) in original_ids]
        self.shared = _named_shared(shared)
        _shared_state.append(State([], walked=[each for _, each in shared if not isinstance(each, Tensor | nn.Module)]))
        self.leaves = _held_leaves(module, held)
        if promoted:
            _promote(held, original_ids)
        self._inputs: dict[int, _View] = {}
        self._collect_inputs(promoted)
        self.disabled_hooks = _copy_parameter_hooks(module, hooks) if keep_hooks else _disable_hooks(subject, module)
        self._walked = [found for _, found in held]
        self._own = [found for _, found in held if isinstance(found, Tensor) and id(found) not in original_ids]
        self._state = self._take_state()

    def as_subject(self) -> Subject:
        """Return the copy as a subject, whose tensors may be written to; an ``autograd.Function`` holds none."""
        model = self.subject.model if function_class(self.subject.model) is not None else self.model
        return replace(self.subject, model=model, args=self._args, kwargs=self._kwargs, loss=self._loss)

    def run(self, context: AbstractContextManager[Any] | None = None) -> list[tuple[str, Tensor]]:
        """Return the tensors that the model returns, by name, from the state and seed of every other run.

        Args:
            context: entered around the call of the model only.

        Raises:
            Exception: whatever the user's model raises.
            TargetError: GC114 if the output holds no tensor.
        """
        self.restore()
        args, kwargs = self.inputs()
        with context or nullcontext():
            return self.call(self.model, args, kwargs)

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs for one call, positional and by keyword: leaves as they are, all else copied."""
        bases: dict[int, Tensor] = {}
        args, kwargs = map_leaves(lambda _, leaf: self._fresh(leaf, bases), (self._args, self._kwargs))
        return args, kwargs

    def call(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[str, Tensor]]:
        """Return the tensors that ``model`` (this one, or a form of it) returns on these inputs, the loss applied.

        Random generators are seeded before. Raises as ``run``.
        """
        seed_generators(self.subject.seed)
        return self.call_as_seeded(model, args, kwargs)

    def call_as_seeded(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[str, Tensor]]:
        """Return what ``call`` returns; the random generators go on from where they are."""
        return self.named_outputs(self.value_of(model, args, kwargs))

    def value_of(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what ``model`` returns on these inputs, the loss applied: all of a forward, and nothing else.

        A form that applies the loss itself (``applies_loss``) returns it.
        """
        value = model(*args, **kwargs)
        if self._loss is None or getattr(model, "applies_loss", False):
            return value
        return call_loss(self._loss, value, args, kwargs)

    def named_outputs(self, value: Any) -> list[tuple[str, Tensor]]:
        """Return the tensors of what ``value_of`` returned, by name; raises as ``run``."""
        given = leaves(value)
        self.closed_outputs = [(path, leaf) for path, leaf in given if not isinstance(leaf, Tensor)]
        tensors = [(output_name(path), leaf) for path, leaf in given if isinstance(leaf, Tensor)]
        if not tensors:
            raise TargetError(
                "GC114",
                f"{self.subject.target} returns {type(value).__name__!r} without a tensor in it; return a tensor, or a "
                "tuple, dict or dataclass of tensors.",
            )
        return tensors

    @contextmanager
    def preserve_leaves(self) -> Iterator[None]:
        """Put the leaves' values back on leaving: a model may write to its own weights."""
        saved = [leaf.tensor.detach().clone() for leaf in self.leaves]
        try:
            yield
        finally:
            with torch.no_grad():
                for leaf, value in zip(self.leaves, saved, strict=True):
                    leaf.tensor.copy_(value)

    def move_by_ulp(self, seed: int, part: float | None = None) -> None:
        """Move each float of the copy by one ULP (or ``part``) up or down for all runs: weights, buffers, inputs."""
        leaf_tensors = [tensor for leaf in self.leaves for tensor in leaf.sharing]
        move_by_ulp([*leaf_tensors, *self._own, *(view.base for view in self._inputs.values())], seed, part)
        self._state = self._take_state()

    def restore(self) -> None:
        """Put the state back, as before each run; a leaf that the program froze requires a gradient again."""
        self._state.restore()
        for leaf in self.leaves:
            for tensor in leaf.sharing:
                tensor.requires_grad_(leaf.name not in self.without_grad)

    def _take_state(self) -> State:
        own = [tensor for leaf in self.leaves for tensor in leaf.sharing]
        return State([self._args, self._kwargs], own, self._walked)

    def _fresh(self, leaf: Any, bases: dict[int, Tensor]) -> Any:
        """Return an input as the model may have it: a leaf or its clone, and clones of what else it might change.

        Args:
            leaf: of the inputs.
            bases: the memory of inputs for this call, by identity of the leaf; filled in.
        """
        if not isinstance(leaf, Tensor):
            return leaf
        view = self._inputs.get(id(leaf))
        if view is None:
            return clone_as_laid_out(leaf.detach())
        base = view.base
        if self.input_mode != "leaf":
            taken = base if self.input_mode == "clone" else base.detach()
            base = bases.setdefault(id(base), clone_as_laid_out(taken))
        return view.of(base)

    def _collect_inputs(self, promoted: bool) -> None:
        """Make a leaf of each memory that float inputs have: one tensor given twice is one leaf with two names, and so
        are two that overlap, and one that a parameter overlaps.
        """
        inputs = _float_inputs(self.subject, self._args, self._kwargs)
        owners = self._own_parameters() if self.input_mode != "constant" else {}
        for members, owner in _by_memory(inputs, owners):
            name, *others = [name for each in members for name in each.names]
            low: int | None
            if owner is not None:
                leaf = self.leaves[owner]
                self.leaves[owner] = replace(leaf, tied=(*leaf.tied, name, *others))
                base, low = leaf.tensor, reach_of(owners[owner])[0]
            else:
                base, low = _memory_of(members, promoted)
            if owner is None and self.input_mode != "constant":
                native = members[0].original.dtype
                self.leaves.append(Leaf(name, base.requires_grad_(), native, tuple(others), (base,)))
            for each in members:
                self._inputs |= dict.fromkeys(map(id, each.copies), _View.of_input(base, each.original, low))

    def _own_parameters(self) -> dict[int, Tensor]:
        """Return the user's parameters by the index of their leaf."""
        parameters = {parameter_name(name): each for name, each in parameters_of(self.subject.model).items()}
        return {i: parameters[leaf.name] for i, leaf in enumerate(self.leaves) if leaf.name in parameters}


@dataclass(frozen=True, slots=True, eq=False)
class _FloatInput:
    """One memory among the inputs: the user's tensor, the names under which it is given, and their copies."""

    original: Tensor
    names: list[str] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """An input as a part of a leaf, made anew for each call; the leaf itself if ``offset`` is None."""

    base: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | None

    @classmethod
    def of_input(cls, base: Tensor, original: Tensor, low: int | None) -> _View:
        """Return the part of a leaf that an input is; the leaf begins at ``low`` in the storage of the input."""
        offset = None if low is None else reach_of(original)[0] - low
        return cls(base, original.shape, original.stride(), offset)

    def of(self, base: Tensor) -> Tensor:
        """Return the view of the leaf, or of a copy of it."""
        if self.offset is None:
            return base
        return base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset)


def _float_inputs(subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_FloatInput]:
    """Return the float inputs, each memory once; ``args`` and ``kwargs`` are copies of the subject's.

    A sparse tensor is a constant here: there is no direction to move it along that keeps it sparse.
    """
    found: dict[tuple[Any, ...], _FloatInput] = {}
    given = input_names(subject.model, subject.args, subject.kwargs)
    for (name, original), (_, copied) in zip(given, input_names(subject.model, args, kwargs), strict=True):
        is_float = isinstance(copied, Tensor) and (copied.is_floating_point() or copied.is_complex())
        if is_float and copied.layout == torch.strided:
            each = found.setdefault(storage_key(original), _FloatInput(original))
            each.names.append(input_name(name))
            each.copies.append(copied)
    return list(found.values())


def _by_memory(
    inputs: Sequence[_FloatInput], parameters: Mapping[int, Tensor]
) -> Iterator[tuple[list[_FloatInput], int | None]]:
    """Yield the inputs that share memory, with the index of the parameter in whose memory they lie, or None."""
    for group in sharing_groups([*(each.original for each in inputs), *parameters.values()]):
        ids = set(map(id, group))
        members = [each for each in inputs if id(each.original) in ids]
        owner = next((index for index, each in parameters.items() if id(each) in ids), None)
        if members:
            yield members, owner if owner is not None and _is_within(members, parameters[owner]) else None


def _is_within(inputs: Sequence[_FloatInput], parameter: Tensor) -> bool:
    low, high = reach_of(parameter)
    reaches = [reach_of(each.original) for each in inputs]
    return not overlaps(parameter) and all(low <= first and end <= high for first, end in reaches)


def _memory_of(inputs: Sequence[_FloatInput], promoted: bool) -> tuple[Tensor, int | None]:
    """Return a copy of the memory of inputs, and the place in the storage it begins at; None if it is the input."""
    original = inputs[0].original
    dtype = _float64_dtype(original.dtype) if promoted else original.dtype
    if len(inputs) == 1 and not overlaps(original):
        return clone_as_laid_out(inputs[0].copies[0].detach(), dtype), None
    return flat_copy([each.original for each in inputs], dtype)


def _named_shared(shared: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """Return the trained tensors and the modules among what a copy shares with the user's own, the outermost only."""
    named: dict[str, Any] = {}
    for path, found in shared:
        name = path_name(path) or type(found).__name__
        is_inside = name.startswith(tuple(f"{part}." for part in named))
        if (_is_trained(found) or isinstance(found, nn.Module)) and not is_inside:
            named[name] = found
    return named


def native_dtype(subject: Subject) -> torch.dtype:
    """Return the float dtype of most of the subject's elements, parameters and inputs; the default if it has none."""
    inputs = [leaf for _, leaf in leaves((subject.args, subject.kwargs)) if isinstance(leaf, Tensor)]
    sizes: Counter[torch.dtype] = Counter()
    for tensor in (*parameters_of(subject.model).values(), *inputs):
        if tensor.is_floating_point():
            sizes[tensor.dtype] += 1 + tensor.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.get_default_dtype())


def _float64_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for a real float dtype, complex128 for a complex one, any other as it is."""
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype


def call_loss(loss: Callable[..., Any], value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``loss(outputs)``, or ``loss(outputs, *args, **kwargs)`` where it takes the inputs too."""
    return loss(value, *args, **kwargs) if loss_takes_inputs(loss) else loss(value)


def loss_takes_inputs(loss: Callable[..., Any]) -> bool:
    """Return whether a loss takes more than the outputs."""
    positional = inspect.signature(loss).parameters.values()
    required = [p for p in positional if p.default is p.empty and p.kind in (*POSITIONAL, p.VAR_POSITIONAL)]
    return len(required) > 1


def _copied(subject: Subject) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any, dict[str, Any], frozenset[int]]:
    """Return private copies of the model, the inputs, the loss, and the gradient hooks of parameters by their names;
    and the identities of what the originals reach.
    """
    _refuse_iterators(subject)
    parameters = parameters_of(subject.model)
    if lazy := [name for name, parameter in parameters.items() if isinstance(parameter, UninitializedParameter)]:
        raise lazy_parameters(subject, lazy)
    # Post-accumulate hooks stay behind: they are made to step an optimizer of the user's own parameters.
    hooks = {name: list(each._backward_hooks.values()) for name, each in parameters.items() if each._backward_hooks}
    try:
        originals = (optimized_inner(subject.model), subject.args, subject.kwargs, subject.loss, hooks)
        copied, original_ids = private_copy(originals)
    except Exception as error:
        raise TargetError(
            "GC112",
            f"{subject.target} cannot be copied, and a check never runs your own object: {first_line(error)}. "
            "Build such members in forward, or define __deepcopy__ in the class.",
            details=user_frames(error),
        ) from error
    return (*copied, original_ids)


def _refuse_iterators(subject: Subject) -> None:
    for name, value in input_names(subject.model, subject.args, subject.kwargs):
        if isinstance(value, Iterator) and instance_dict(value) is None:  # an object restarts, its state put back
            kind = "a generator" if isinstance(value, Generator) else f"an iterator ({type(value).__name__!r})"
            raise TargetError("GC104", f"input {name!r} is {kind}: it is empty after one run. Give a list or tuple.")


def lazy_parameters(subject: Subject, names: Sequence[str], said: str = "", details: str = "") -> TargetError:
    """Return GC112 for parameters without a shape; ``said`` is the result of an attempt to infer it."""
    return TargetError(
        "GC112",
        f"{subject.target} has lazy parameters, without a shape yet ({', '.join(names[:3])}){said}; run it once on an "
        "input in its factory.",
        details=details,
    )


def _held_leaves(module: nn.Module | None, held: Iterable[tuple[Path, Any]]) -> list[Leaf]:
    """Return a leaf for each storage that requires a gradient, with all its names: parameters first, as the module
    names them, then tensors in attributes, containers, closures and buffers, by where they are.
    """
    registered = parameters_of(module, remove_duplicate=False)
    named: list[tuple[str, Tensor]] = [(parameter_name(name), tensor) for name, tensor in registered.items()]
    known, first = set(map(id, registered.values())), dict(named)
    for path, tensor in held:
        if id(tensor) not in known and _is_trained(tensor):
            name = buffer_name(path_name(path)) if path[-2:-1] == ("_buffers",) else parameter_name(path_name(path))
            is_new = storage_key(first.setdefault(name, tensor)) == storage_key(tensor)
            named.append((name if is_new else f"{name}~{len(named)}", tensor))
    groups: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        if tensor.requires_grad:
            tensor.grad = None
            groups.setdefault(storage_key(tensor), []).append((name, tensor))
    return [_held_leaf(group, known) for group in groups.values()]


def _is_trained(found: Any) -> bool:
    return isinstance(found, Tensor) and found.is_leaf and found.requires_grad


def _held_leaf(group: Sequence[tuple[str, Tensor]], registered: Collection[int]) -> Leaf:
    """Return the leaf of one storage, from its names and tensors; ``registered`` are the ids of parameters."""
    first, *others = dict.fromkeys(name for name, _ in group)
    tensors = tuple({id(tensor): tensor for _, tensor in group}.values())
    is_registered = any(id(tensor) in registered for tensor in tensors)
    return Leaf(first, tensors[0], tensors[0].dtype, tuple(others), tensors, is_registered=is_registered)


def _promote(held: Iterable[tuple[Path, Any]], original_ids: frozenset[int]) -> None:
    """Make float tensors float64 in place, wherever they are kept, but the user's own; what was tied stays so."""
    promoted: dict[tuple[Any, ...], Tensor] = {}
    for _, tensor in held:
        is_own = isinstance(tensor, Tensor) and id(tensor) not in original_ids
        if is_own and _float64_dtype(tensor.dtype) != tensor.dtype:
            tensor.grad = None
            tensor.data = promoted.setdefault(storage_key(tensor), tensor.detach().to(_float64_dtype(tensor.dtype)))


def _copy_parameter_hooks(module: nn.Module | None, hooks: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    """Register the gradient hooks of the user's parameters on the copies, which ``copy.deepcopy`` does not."""
    copies = parameters_of(module)
    for name, own in hooks.items():
        for hook in own if name in copies else ():
            copies[name].register_hook(hook)  # type: ignore[no-untyped-call]
    return ()


def _disable_hooks(subject: Subject, module: nn.Module | None) -> tuple[str, ...]:
    """Take backward hooks off the copy's modules; return the names of what had one, parameters too."""
    hooked = [
        parameter_name(name)
        for name, parameter in parameters_of(subject.model).items()
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]
    for name, child in module.named_modules() if module is not None else ():
        if child._backward_hooks or child._backward_pre_hooks:
            hooked.append(name or type(child).__name__)
            child._backward_hooks.clear()
            child._backward_pre_hooks.clear()
    return tuple(hooked)
