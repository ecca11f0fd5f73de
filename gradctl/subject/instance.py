"""A private copy of a subject, with its leaves, that can be run again and again from the same state and seed.

The user's object is never run: ``jit.trace`` advances BatchNorm statistics, a forward can mutate its inputs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gradctl.core.errors import TargetError
from gradctl.core.names import input_name, output_name, parameter_name
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.inputs import input_names
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import POSITIONAL, function_class, module_of, optimized_inner
from gradctl.subject.state import State, overlaps
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves, map_leaves

__all__ = ["InputMode", "Instance", "Leaf", "call_loss", "loss_takes_inputs", "native_dtype"]

InputMode = Literal["leaf", "clone", "constant"]


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """One differentiable tensor of the subject.

    Attributes:
        name: ``param:fc1.weight`` or ``input:x``.
        tied: the other names of the same storage.
        tensor: the working tensor; writing to it changes what the next run reads.
        sharing: every tensor object that collects a gradient for this storage, ``tensor`` among them.
        native_dtype: dtype in the user's own model.
    """

    name: str
    tensor: Tensor
    native_dtype: torch.dtype
    tied: tuple[str, ...] = ()
    sharing: tuple[Tensor, ...] = ()

    def take_gradient(self) -> Tensor | None:
        """Return what backward left in ``.grad``, summed over tied parameters, dense; and clear it."""
        total: Tensor | None = None
        for tensor in self.sharing or (self.tensor,):
            gradient, tensor.grad = tensor.grad, None
            if gradient is not None:
                gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
                total = gradient if total is None else total + gradient
        return total


class Instance:
    """A copy of ``subject`` to run.

    Args:
        subject: what to copy; never changed.
        promoted: whether parameters, buffers, float inputs and float tensors kept as attributes become float64.
        input_mode: how float inputs are given: as leaves that ask for a gradient, as clones of such leaves (for
            programs that change their inputs in place), or as constants.
        keep_hooks: keep backward hooks of modules and gradient hooks of parameters (forms are compared with them).

    Raises:
        TargetError: GC112 if the model cannot be copied.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        promoted: bool = False,
        input_mode: InputMode = "leaf",
        keep_hooks: bool = False,
    ) -> None:
        self.subject = subject
        self.input_mode = input_mode
        self.model, self._args, self._kwargs, self._loss = _copied(subject)
        function = function_class(self.model)
        if function is not None:  # looked up at each call, where whatever watches Functions stands
            self.model = lambda *args: function.apply(*args)  # type: ignore[no-untyped-call]  # noqa: PLW0108
        module = module_of(self.model)
        parameter_dtypes = {name: p.dtype for name, p in module.named_parameters()} if module else {}
        if promoted and module is not None:
            _promote_module(module)
        self.leaves: list[Leaf] = _parameter_leaves(module, parameter_dtypes) if module else []
        self._inputs: dict[int, Tensor] = {}
        self._collect_inputs(promoted)
        if keep_hooks and module is not None:
            _carry_parameter_hooks(subject, module)
        self.set_aside_hooks = () if keep_hooks else _set_aside_module_hooks(subject, module)
        self._state = State(
            [self.model, self._args, self._kwargs, self._loss],
            [tensor for leaf in self.leaves for tensor in leaf.sharing],
        )

    def run(self, context: AbstractContextManager[Any] | None = None) -> list[tuple[str, Tensor]]:
        """Return the tensors that the model gives, by name, from the state and seed of every other run.

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
        args, kwargs = map_leaves(lambda _, leaf: self._fresh(leaf), (self._args, self._kwargs))
        return args, kwargs

    def call(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[str, Tensor]]:
        """Return the tensors that ``model`` (this one, or a form of it) gives on these inputs, the loss applied.

        Random generators are seeded before. Raises as ``run``.
        """
        seed_generators(self.subject.seed)
        value = model(*args, **kwargs)
        if self._loss is not None:
            value = call_loss(self._loss, value, args, kwargs)
        tensors = [(output_name(path), leaf) for path, leaf in leaves(value) if isinstance(leaf, Tensor)]
        if not tensors:
            raise TargetError(
                "GC114",
                f"{self.subject.target} returns {type(value).__name__!r} without a tensor in it; return a tensor, or a "
                "tuple, dict or dataclass of tensors.",
            )
        return tensors

    @contextmanager
    def leaves_kept(self) -> Iterator[None]:
        """Put the leaves' values back on leaving: a model may write to its own weights."""
        saved = [leaf.tensor.detach().clone() for leaf in self.leaves]
        try:
            yield
        finally:
            with torch.no_grad():
                for leaf, value in zip(self.leaves, saved, strict=True):
                    leaf.tensor.copy_(value)

    def restore(self) -> None:
        """Put the state back, as before each run; a leaf that the program froze asks for a gradient again."""
        self._state.restore()
        for leaf in self.leaves:
            for tensor in leaf.sharing:
                if not tensor.requires_grad:
                    tensor.requires_grad_()

    def _fresh(self, leaf: Any) -> Any:
        """Return an input as the model may have it: a leaf or its clone, and clones of what else it might change."""
        if not isinstance(leaf, Tensor):
            return leaf
        working = self._inputs.get(id(leaf), leaf)
        if working is leaf or self.input_mode == "constant":
            return _clone(working.detach())
        return _clone(working) if self.input_mode == "clone" else working

    def _collect_inputs(self, promoted: bool) -> None:
        """Make a leaf of each float input; the same tensor given twice is one leaf with two names."""
        names: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        for name, value in input_names(self.subject.model, self._args, self._kwargs):
            # A sparse tensor is a constant here: there is no direction to move it along that keeps it sparse.
            is_float = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            if is_float and value.layout == torch.strided:
                names.setdefault(id(value), []).append(input_name(name))
                tensors[id(value)] = value
        for key, tensor in tensors.items():
            working = _clone(tensor.detach(), _wide(tensor.dtype) if promoted else tensor.dtype)
            self._inputs[key] = working
            if self.input_mode != "constant":
                first, *others = names[key]
                working.requires_grad_()
                self.leaves.append(Leaf(first, working, tensor.dtype, tuple(others), (working,)))


def native_dtype(subject: Subject) -> torch.dtype:
    """Return the float dtype of most of the subject's elements, parameters and inputs; the default if it has none."""
    module = module_of(subject.model)
    tensors: list[Tensor] = list(module.parameters()) if module else []
    tensors += [leaf for _, leaf in leaves((subject.args, subject.kwargs)) if isinstance(leaf, Tensor)]
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + 1 + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.get_default_dtype()


def _clone(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a differentiable copy with the same strides, gaps included: programs ask ``is_contiguous()``, or view."""
    dtype = dtype or tensor.dtype
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter) or overlaps(tensor):
        return tensor.clone().to(dtype)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device).copy_(tensor)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for a real float dtype, complex128 for a complex one, any other as it is."""
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype


def call_loss(loss: Callable[..., Any], value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``loss(outputs)``, or ``loss(outputs, *args, **kwargs)`` where it takes the inputs too."""
    return loss(value, *args, **kwargs) if loss_takes_inputs(loss) else loss(value)


def loss_takes_inputs(loss: Callable[..., Any]) -> bool:
    """Tell whether a loss wants more than the outputs."""
    positional = inspect.signature(loss).parameters.values()
    required = [p for p in positional if p.default is p.empty and p.kind in (*POSITIONAL, p.VAR_POSITIONAL)]
    return len(required) > 1


def _copied(subject: Subject) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any]:
    """Return a deep copy, with torch.compile's wrappers taken off and tied parameters tied again."""
    originals = (optimized_inner(subject.model), subject.args, subject.kwargs, subject.loss)
    memo: dict[int, Any] = {}
    for tensor in _uncopyable_tensors(originals):
        memo[id(tensor)] = tensor.detach().clone()
    try:
        with torch.no_grad():  # or the copy of a ScriptModule's parameter keeps a graph to the user's own
            copied = copy.deepcopy(originals, memo)
    except Exception as error:
        raise TargetError(
            "GC112",
            f"{subject.target} cannot be copied, and a check never runs your own object: {first_line(error)}. "
            "Build such members in forward, or give the class a __deepcopy__.",
            details=user_frames(error),
        ) from error
    source, module = module_of(originals[0]), module_of(copied[0])
    lazy = [name for name, p in source.named_parameters() if isinstance(p, UninitializedParameter)] if source else []
    if lazy:
        raise TargetError(
            "GC112",
            f"{subject.target} has lazy parameters, without a shape yet ({', '.join(lazy[:3])}); run it once on an "
            "input in its factory.",
        )
    if source is not None and module is not None:
        _ask_again(source, module)
        _tie_again(source, module)
        _unwrap_children(module)
    return copied


def _unwrap_children(module: nn.Module) -> None:
    """Take torch.compile's wrapper off every submodule, in place, so that names have no ``_orig_mod.``."""
    for name, child in module.named_children():
        inner = optimized_inner(child)
        if inner is not child:
            setattr(module, name, inner)
        _unwrap_children(inner)  # type: ignore[arg-type]  # a module in, a module out


def _uncopyable_tensors(originals: Any) -> list[Tensor]:
    """Return what ``copy.deepcopy`` refuses: tensors with a history (old weight_norm), and compressed sparse ones."""
    model, args, kwargs, _ = originals
    module = module_of(model)
    kept = [vars(child) for child in module.modules()] if module else []
    buffers = [child._buffers for child in module.modules()] if module else []
    found = [leaf for _, leaf in leaves([args, kwargs, *kept, *buffers]) if isinstance(leaf, Tensor)]
    return [tensor for tensor in found if not tensor.is_leaf or tensor.layout not in (torch.strided, torch.sparse_coo)]


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors share exactly when they are the same memory seen the same way."""
    if tensor.layout != torch.strided or not tensor.numel() or not tensor.data_ptr():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _ask_again(source: nn.Module, module: nn.Module) -> None:
    """Let each parameter of the copy ask for a gradient as the original does; ScriptModules copy without."""
    copies = dict(module.named_parameters())
    for name, parameter in source.named_parameters():
        if name in copies and copies[name].requires_grad != parameter.requires_grad:
            copies[name].requires_grad_(parameter.requires_grad)


def _tie_again(source: nn.Module, module: nn.Module) -> None:
    """Share storage between parameters of the copy where the originals are two objects on one storage."""
    copies = dict(module.named_parameters(remove_duplicate=False))
    first: dict[tuple[Any, ...], nn.Parameter] = {}
    for name, parameter in source.named_parameters(remove_duplicate=False):
        mine = copies.get(name.replace("_orig_mod.", ""), copies.get(name))
        if mine is None:
            continue
        owner = first.setdefault(_storage_key(parameter), mine)
        if owner is not mine:
            mine.data = owner.data


def _parameter_leaves(module: nn.Module, native_dtypes: dict[str, torch.dtype]) -> list[Leaf]:
    """Return a leaf for each trainable storage, with all its names."""
    names: dict[tuple[Any, ...], list[str]] = {}
    tensors: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            key = _storage_key(parameter)
            names.setdefault(key, []).append(parameter_name(name))
            if not any(parameter is known for known in tensors.setdefault(key, [])):
                tensors[key].append(parameter)
    return [
        Leaf(
            first,
            tensors[key][0],
            native_dtypes.get(first.removeprefix("param:"), tensors[key][0].dtype),
            tuple(others),
            tuple(tensors[key]),
        )
        for key, (first, *others) in names.items()
    ]


def _promote_module(module: nn.Module) -> None:
    """Make float parameters, buffers and float tensors kept as plain attributes float64, in place, ties kept."""
    promoted: dict[tuple[Any, ...], Tensor] = {}

    def promote(tensor: Tensor) -> Tensor:
        return promoted.setdefault(_storage_key(tensor), tensor.detach().to(_wide(tensor.dtype)))

    for parameter in module.parameters():
        parameter.data = promote(parameter)
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = promote(buffer)
        for name, value in vars(child).items():
            if name not in _MODULE_TABLES and any(isinstance(leaf, Tensor) for _, leaf in leaves(value)):
                vars(child)[name] = map_leaves(
                    lambda _, leaf: (
                        promote(leaf).requires_grad_(leaf.requires_grad)
                        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)
                        else leaf
                    ),
                    value,
                )


_MODULE_TABLES = frozenset(vars(nn.Module()))


def _carry_parameter_hooks(subject: Subject, module: nn.Module) -> None:
    """Give the copy's parameters the gradient hooks of the user's, which ``copy.deepcopy`` leaves behind.

    Post-accumulate hooks stay behind: they are made to step an optimizer of the user's own parameters.
    """
    source = module_of(optimized_inner(subject.model))
    if source is None:
        return
    copies, children = dict(module.named_parameters()), dict(module.named_modules())
    names = {id(child): name.replace("_orig_mod.", "") for name, child in source.named_modules()}
    memo: dict[int, Any] = {key: children[name] for key, name in names.items() if name in children}
    for name, parameter in source.named_parameters():
        mine = copies.get(name.replace("_orig_mod.", ""))
        if mine is not None:
            for hook in (parameter._backward_hooks or {}).values():
                mine.register_hook(copy.deepcopy(hook, memo))  # type: ignore[no-untyped-call]


def _set_aside_module_hooks(subject: Subject, module: nn.Module | None) -> tuple[str, ...]:
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
