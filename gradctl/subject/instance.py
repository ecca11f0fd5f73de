"""A private copy of a subject, with its leaves, that can be run again and again from the same state and seed.

The user's object is never run: ``jit.trace`` advances BatchNorm statistics, a forward can mutate its inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gradctl.core.errors import TargetError
from gradctl.core.names import buffer_name, input_name, output_name, parameter_name
from gradctl.subject.aliasing import clone_as_laid_out, flat_copy, overlaps, reach_of, sharing_groups, storage_key
from gradctl.subject.copies import private_copy
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.inputs.example import input_names
from gradctl.subject.reach import Path, instance_dict, path_name, walk
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import POSITIONAL, function_class, module_of, optimized_inner
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
        self.subject = subject
        self.input_mode = input_mode
        self.without_grad: frozenset[str] = frozenset()
        restore_shared()
        self.model, self._args, self._kwargs, self._loss, hooks, original_ids = _copied(subject)
        function = function_class(self.model)
        if function is not None:  # looked up at each call, where whatever watches Functions stands
            self.model = lambda *args: function.apply(*args)  # type: ignore[no-untyped-call]  # noqa: PLW0108
        module = module_of(self.model)
        given = input_names(subject.model, self._args, self._kwargs)
        closed = [((name,), value) for name, value in given if not isinstance(value, Tensor)]  # a module, perhaps
        held = list(walk([((), self.model), (("loss",), self._loss), *closed]))
        self.shared: dict[str, Any] = {}
        for path, found in held:
            if id(found) in original_ids and (
                found.is_leaf and found.requires_grad if isinstance(found, Tensor) else isinstance(found, nn.Module)
            ):
                name = path_name(path) or type(found).__name__
                if not any(name.startswith(f"{part}.") for part in self.shared):
                    self.shared[name] = found
        borrowed = [each for _, each in held if id(each) in original_ids and not isinstance(each, (Tensor, nn.Module))]
        _shared_state.append(State([], walked=borrowed))
        self.closed_outputs: list[tuple[str, Any]] = []
        reached = [(path, found) for path, found in held if isinstance(found, Tensor)]
        dtypes = {id(tensor): tensor.dtype for _, tensor in reached}
        if promoted:
            _promote([tensor for _, tensor in reached if id(tensor) not in original_ids])
        self.leaves: list[Leaf] = _held_leaves(module, reached, dtypes)
        self._inputs: dict[int, Tensor | _View] = {}
        self._collect_inputs(promoted)
        if keep_hooks and module is not None:
            _copy_parameter_hooks(module, hooks)
        self.disabled_hooks = () if keep_hooks else _disable_module_hooks(subject, module)
        self._state = State(
            [self._args, self._kwargs],
            [tensor for leaf in self.leaves for tensor in leaf.sharing],
            [found for _, found in held],
        )

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
        value = model(*args, **kwargs)
        if self._loss is not None:
            value = call_loss(self._loss, value, args, kwargs)
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

    def restore(self) -> None:
        """Put the state back, as before each run; a leaf that the program froze requires a gradient again."""
        self._state.restore()
        for leaf in self.leaves:
            for tensor in leaf.sharing:
                tensor.requires_grad_(leaf.name not in self.without_grad)

    def _fresh(self, leaf: Any, bases: dict[int, Tensor]) -> Any:
        """Return an input as the model may have it: a leaf or its clone, and clones of what else it might change.

        Args:
            leaf: of the inputs.
            bases: the memory of aliased inputs for this call, by identity of the leaf; filled in.
        """
        if not isinstance(leaf, Tensor):
            return leaf
        working = self._inputs.get(id(leaf), leaf)
        base = working.base if isinstance(working, _View) else working
        if base is leaf or self.input_mode != "leaf":
            taken = base if self.input_mode == "clone" and base is not leaf else base.detach()
            if not isinstance(working, _View):
                return clone_as_laid_out(taken)
            base = bases.setdefault(id(base), clone_as_laid_out(taken))
        return working.of(base) if isinstance(working, _View) else working

    def _collect_inputs(self, promoted: bool) -> None:
        """Make a leaf of each memory that float inputs have: one tensor given twice is one leaf with two names, and so
        are two that overlap, and one that a parameter overlaps.
        """
        model = self.subject.model
        names: dict[tuple[Any, ...], list[str]] = {}
        copies: dict[tuple[Any, ...], list[Tensor]] = {}
        originals: dict[tuple[Any, ...], Tensor] = {}
        given = input_names(model, self.subject.args, self.subject.kwargs)
        for (name, original), (_, value) in zip(given, input_names(model, self._args, self._kwargs), strict=True):
            # A sparse tensor is a constant here: there is no direction to move it along that keeps it sparse.
            is_float = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            if is_float and value.layout == torch.strided:
                key = storage_key(original)
                originals.setdefault(key, original)
                names.setdefault(key, []).append(input_name(name))
                copies.setdefault(key, []).append(value)
        keys = {id(original): key for key, original in originals.items()}
        parameters = self._own_parameters()
        for group in sharing_groups([*originals.values(), *(each for each in parameters.values())]):
            members = [each for each in group if id(each) in keys]
            if not members:
                continue
            dtype = _float64_dtype(members[0].dtype) if promoted else members[0].dtype
            said = [name for each in members for name in names[keys[id(each)]]]
            owner = next((i for i, each in parameters.items() if any(each is other for other in group)), None)
            if owner is not None and self.input_mode != "constant" and _is_within(members, parameters[owner]):
                leaf = self.leaves[owner]
                self.leaves[owner] = replace(leaf, tied=(*leaf.tied, *said))
                base, low = leaf.tensor, reach_of(parameters[owner])[0]
            elif len(members) == 1 and not overlaps(members[0]):
                base, low = clone_as_laid_out(copies[keys[id(members[0])]][0].detach(), dtype), None
            else:
                base, low = flat_copy(members, dtype)
            for each in members:
                view = None if low is None else _View(base, each.shape, each.stride(), reach_of(each)[0] - low)
                self._inputs |= {id(copy): view or base for copy in copies[keys[id(each)]]}
            if base.requires_grad or self.input_mode == "constant":
                continue
            first, *others = said
            self.leaves.append(Leaf(first, base.requires_grad_(), members[0].dtype, tuple(others), (base,)))

    def _own_parameters(self) -> dict[int, Tensor]:
        """Return the user's parameters by the index of their leaf."""
        source = module_of(optimized_inner(self.subject.model))
        parameters = dict(source.named_parameters()) if source is not None else {}
        names = {name.replace("_orig_mod.", ""): parameter for name, parameter in parameters.items()}
        found = ((i, names.get(leaf.name.removeprefix("param:"))) for i, leaf in enumerate(self.leaves))
        return {i: parameter for i, parameter in found if parameter is not None}


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """An input that shares memory with others, or with itself: a view of a leaf, made anew for each call."""

    base: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, base: Tensor) -> Tensor:
        """Return the view of the leaf, or of a copy of it."""
        return base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset)


def _is_within(inputs: Sequence[Tensor], parameter: Tensor) -> bool:
    """Return whether the inputs lie within the memory of a parameter."""
    low, high = reach_of(parameter)
    return not overlaps(parameter) and all(low <= reach_of(each)[0] and reach_of(each)[1] <= high for each in inputs)


def native_dtype(subject: Subject) -> torch.dtype:
    """Return the float dtype of most of the subject's elements, parameters and inputs; the default if it has none."""
    module = module_of(subject.model)
    tensors: list[Tensor] = list(module.parameters()) if module is not None else []
    tensors += [leaf for _, leaf in leaves((subject.args, subject.kwargs)) if isinstance(leaf, Tensor)]
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + 1 + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.get_default_dtype()


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
    model = optimized_inner(subject.model)
    for name, value in input_names(subject.model, subject.args, subject.kwargs):
        if isinstance(value, Iterator) and instance_dict(value) is None:  # an object restarts, its state put back
            kind = "a generator" if isinstance(value, Generator) else f"an iterator ({type(value).__name__!r})"
            raise TargetError("GC104", f"input {name!r} is {kind}: it is empty after one run. Give a list or tuple.")
    source = module_of(model)
    parameters = dict(source.named_parameters()) if source is not None else {}
    lazy = [name for name, parameter in parameters.items() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise TargetError(
            "GC112",
            f"{subject.target} has lazy parameters, without a shape yet ({', '.join(lazy[:3])}); run it once on an "
            "input in its factory.",
        )
    # Post-accumulate hooks stay behind: they are made to step an optimizer of the user's own parameters.
    hooks = {
        name.replace("_orig_mod.", ""): list(parameter._backward_hooks.values())
        for name, parameter in parameters.items()
        if parameter._backward_hooks
    }
    try:
        copied, original_ids = private_copy((model, subject.args, subject.kwargs, subject.loss, hooks))
    except Exception as error:
        raise TargetError(
            "GC112",
            f"{subject.target} cannot be copied, and a check never runs your own object: {first_line(error)}. "
            "Build such members in forward, or give the class a __deepcopy__.",
            details=user_frames(error),
        ) from error
    return (*copied, original_ids)


def _held_leaves(
    module: nn.Module | None, reached: Sequence[tuple[Path, Tensor]], native_dtypes: dict[int, torch.dtype]
) -> list[Leaf]:
    """Return a leaf for each storage that requires a gradient, with all its names: parameters first, as the module
    names them, then tensors in attributes, containers, closures and buffers, by where they are.
    """
    registered = module.named_parameters(remove_duplicate=False) if module is not None else ()
    named: list[tuple[str, Tensor]] = [(parameter_name(name), tensor) for name, tensor in registered]
    known, keys = {id(tensor) for _, tensor in named}, {name: storage_key(tensor) for name, tensor in named}
    for path, tensor in reached:
        if id(tensor) not in known and tensor.is_leaf and tensor.requires_grad:
            name = buffer_name(path_name(path)) if path[-2:-1] == ("_buffers",) else parameter_name(path_name(path))
            key = storage_key(tensor)
            if keys.setdefault(name, key) != key:
                name = f"{name}~{len(named)}"
            named.append((name, tensor))
    names: dict[tuple[Any, ...], list[str]] = {}
    tensors: dict[tuple[Any, ...], list[Tensor]] = {}
    for name, tensor in named:
        if tensor.requires_grad:
            key = storage_key(tensor)
            names[key] = list(dict.fromkeys([*names.get(key, ()), name]))
            if not any(tensor is other for other in tensors.setdefault(key, [])):
                tensor.grad = None
                tensors[key].append(tensor)
    return [
        Leaf(
            first,
            tensors[key][0],
            native_dtypes.get(id(tensors[key][0]), tensors[key][0].dtype),
            tuple(others),
            tuple(tensors[key]),
            is_registered=any(id(tensor) in known for tensor in tensors[key]),
        )
        for key, (first, *others) in names.items()
    ]


def _promote(tensors: Sequence[Tensor]) -> None:
    """Make float tensors float64 in place, wherever they are kept; what was tied stays so."""
    promoted: dict[tuple[Any, ...], Tensor] = {}
    for tensor in tensors:
        if _float64_dtype(tensor.dtype) != tensor.dtype:
            tensor.grad = None
            tensor.data = promoted.setdefault(storage_key(tensor), tensor.detach().to(_float64_dtype(tensor.dtype)))


def _copy_parameter_hooks(module: nn.Module, hooks: Mapping[str, Sequence[Any]]) -> None:
    """Register the gradient hooks of the user's parameters on the copies, which ``copy.deepcopy`` does not."""
    copies = dict(module.named_parameters())
    for name, own in hooks.items():
        if name in copies:
            for hook in own:
                copies[name].register_hook(hook)  # type: ignore[no-untyped-call]


def _disable_module_hooks(subject: Subject, module: nn.Module | None) -> tuple[str, ...]:
    """Take backward hooks off the copy's modules; return the names of what had one, parameters too."""
    source = module_of(optimized_inner(subject.model))
    if module is None or source is None:
        return ()
    hooked = [
        parameter_name(name)
        for name, parameter in source.named_parameters()
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]
    for name, child in module.named_modules():
        if child._backward_hooks or child._backward_pre_hooks:
            hooked.append(name or type(child).__name__)
            child._backward_hooks.clear()
            child._backward_pre_hooks.clear()
    return tuple(hooked)
