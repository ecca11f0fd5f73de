"""A model's inputs: from ``--input``, from a file, or from a function beside the target; fitted to what it takes, and
described if the model refuses them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradctl.core.errors import TargetError, is_out_of_memory, listed, nearest
from gradctl.core.names import input_name
from gradctl.core.target_files import INPUT_SUFFIXES
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.inputs.proposal import first_layer, proposed_input
from gradctl.subject.inputs.specification import InputSpec, TensorSpec, draw, short_dtype
from gradctl.subject.inputs.tensor_file import read_tensors
from gradctl.subject.signature import (
    POSITIONAL,
    call_signature,
    callee_name,
    function_class,
    required_parameters,
)
from gradctl.subject.tree import leaves

_POSITIONAL_ONLY, _KEYWORD_ONLY = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY
_VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL
_POSITION = re.compile(r"(?:arg_|arr_)?(\d+)")  # numpy.savez names positional arrays arr_0, arr_1, …


class Inputs(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def input_names(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return every leaf of the inputs by name: the parameter of forward, then the path within the value.

    ``("x", …)``, ``("batch.mask", …)``, ``("xs.0", …)``; what goes into ``*args`` is ``args.0``, ``args.1``, and so is
    everything given by position to a callable without a signature.
    """
    signature = call_signature(function)
    positional = _names(signature, POSITIONAL)
    (rest,) = _names(signature, [_VAR_POSITIONAL]) or ["args"]
    names = positional + [f"{rest}.{index}" for index in range(max(0, len(args) - len(positional)))]
    given = [*zip(names, args, strict=False), *kwargs.items()]
    return [leaf for name, value in given for leaf in leaves(value, name)]


def trained_inputs(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[str]:
    """Return the names (``input:x``) of the inputs that are given with ``requires_grad``."""
    named = input_names(function, args, kwargs)
    return {input_name(name) for name, value in named if isinstance(value, Tensor) and value.requires_grad}


def inputs_from_specs(specs: Sequence[InputSpec], model: Callable[..., Any], seed: int) -> Inputs:
    """Return the inputs of ``--input``, drawn in order from one generator seeded by ``seed``.

    Raises:
        TargetError: GC104 if a name is given twice, or names or number do not fit what the model takes.
    """
    generator = torch.Generator().manual_seed(seed)
    unnamed: list[Any] = []
    named: dict[str, Any] = {}
    for spec in specs:
        value = draw(spec.value, generator) if isinstance(spec.value, TensorSpec) else spec.value
        if spec.name is None:
            unnamed.append(value)
        elif spec.name in named:
            raise TargetError("GC104", f"input {spec.name!r} is given twice. Give it once.")
        else:
            named[spec.name] = value
    return _fitted(model, tuple(unnamed), named, by_position=True)


def inputs_from_file(path: Path, model: Callable[..., Any]) -> Inputs:
    """Return the inputs that a file holds: by the names of forward's parameters, or by position (``0``, ``arg_0``).

    Raises:
        TargetError: GC122 if the file cannot be read; GC104 if what it holds does not fit what the model takes.
        TrustError: GC901 if it holds pickled objects.
    """
    content = read_tensors(
        path, INPUT_SUFFIXES, "Save tensors only: in a dict by name, with torch.save or numpy.savez."
    )
    if isinstance(content, Tensor):
        content = (content,)
    if isinstance(content, (tuple, list)):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping):
        said = f"{path} holds {type(content).__name__!r}. Save a dict of tensors by name, a tuple, or one tensor."
        raise TargetError("GC104", said)
    signature = call_signature(model)
    parameters = signature.parameters if signature else {}
    named: dict[str, Any] = {}
    positions: dict[int, Any] = {}
    for key, value in content.items():
        position = _POSITION.fullmatch(str(key))
        if position and str(key) not in parameters:
            positions[int(position[1])] = value
        else:
            named[str(key)] = value
    if missing := set(range(len(positions))) - positions.keys():
        said = f"{path} has inputs by position, and number {min(missing)} is missing. Count from 0."
        raise TargetError("GC104", said)
    return _fitted(model, tuple(positions[index] for index in sorted(positions)), named, by_position=True)


def inputs_beside(module: ModuleType, name: str) -> tuple[str, Any] | None:
    """Return name and object of the source of the inputs: ``NAME_inputs``, else ``example_inputs``, else None.

    Those of an operator ``ns::op`` are ``op_inputs``.
    """
    for candidate in (f"{name.rpartition('::')[2].replace('.', '_')}_inputs", "example_inputs"):
        if hasattr(module, candidate):
            return candidate, getattr(module, candidate)
    return None


def inputs_from_beside(name: str, found: Any, model: Callable[..., Any]) -> Inputs:
    """Return the result of ``NAME_inputs()``: a tuple by position, a dict by keyword, anything else as the one input.

    Raises:
        TargetError: GC104 if the user's function raises, with their frames, gives None or a list, or what it gives
            does not fit what the model takes.
    """
    try:
        value = found() if callable(found) else found
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        said = f"{name}() raised {first_line(error)}."
        raise TargetError("GC104", said, details=user_frames(error)) from error
    if value is None or isinstance(value, (list, str)):
        kind = "None" if value is None else f"a {type(value).__name__}"
        said = (
            f"{name}() returns {kind}. Return a tuple of the inputs in order, a dict of keyword inputs, or one tensor."
        )
        raise TargetError("GC104", said)
    if isinstance(value, Mapping):
        return _fitted(model, (), {str(key): child for key, child in value.items()}, by_position=False)
    return _fitted(model, value if isinstance(value, tuple) else (value,), {}, by_position=False)


def inputs_from_call(inputs: Any, kwargs: Mapping[str, Any], model: Callable[..., Any]) -> Inputs:
    """Return the inputs of a program: a tuple or list by position, a mapping by keyword, a tensor as the one input.

    Raises:
        TargetError: GC104 if ``inputs`` is of another type, or does not fit the model.
    """
    if isinstance(inputs, Mapping):
        named = {str(name): value for name, value in inputs.items()}
        for name in kwargs:
            if name in named:
                raise TargetError("GC104", f"input {name!r} is given twice: in inputs, and in kwargs. Give it once.")
        args, named = (), {**named, **kwargs}
    elif isinstance(inputs, (Tensor, tuple, list)):
        args, named = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), dict(kwargs)
    else:
        raise TargetError(
            "GC104",
            f"inputs is of type {type(inputs).__name__!r}. Give a tensor, a tuple or list of the inputs in order, or a "
            "mapping of keyword inputs; put any other single input into a tuple.",
        )
    return _fitted(model, args, named, by_position=False, remedy="Add it to the inputs.")


def _fitted(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    by_position: bool,
    remedy: str | None = None,
) -> Inputs:
    """Return the inputs after checking them against what ``model`` takes.

    ``by_position`` passes named inputs by position if the signature allows it: hooks, tracing and exporters see those.
    ``remedy`` says how to add a missing input; None proposes the ``--input`` to type.
    """
    signature = call_signature(model)
    if signature is None:
        return Inputs(args, kwargs)
    _ensure_known(signature, callee_name(model), args, kwargs)
    _ensure_complete(signature, model, args, kwargs, remedy)
    # apply takes nothing by keyword
    must = function_class(model) is not None or not kwargs.keys().isdisjoint(_names(signature, [_POSITIONAL_ONLY]))
    if not kwargs or not (by_position or must):
        return Inputs(args, kwargs)
    bound, others = signature.bind_partial(*args), dict(kwargs)
    bound.arguments.update({name: others.pop(name) for name in signature.parameters if name in kwargs})
    if must:
        bound.apply_defaults()  # a gap before a named one
    return Inputs(bound.args, {**bound.kwargs, **others})


def _ensure_known(signature: inspect.Signature, callee: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise for inputs that a call would refuse, by name: unknown, given twice, too many."""
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    named, positional = _names(signature), _names(signature, POSITIONAL)
    for name in kwargs:
        if name in positional[: len(args)]:
            number = positional.index(name) + 1
            raise TargetError("GC104", f"input {name!r} is given twice: by name, and without one as number {number}.")
        if name not in named and inspect.Parameter.VAR_KEYWORD not in kinds:
            near = nearest(name, named)
            raise TargetError("GC104", f"input {name!r} does not exist: {callee} takes {listed(named)}{near}.")
    if len(args) > len(positional) and _VAR_POSITIONAL not in kinds:
        said = f"{len(args)} inputs are given by position, and {callee} takes {listed(positional)}."
        raise TargetError("GC104", said)


def _ensure_complete(
    signature: inspect.Signature,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    remedy: str | None,
) -> None:
    """Raise for an input that is missing, with how to add it."""
    named = _names(signature)
    given = {*_names(signature, POSITIONAL)[: len(args)], *kwargs}
    for parameter in required_parameters(signature):
        if parameter.name not in given:
            takes = f"{callee_name(model)} takes {listed(named)}"
            add = remedy or f"Add, for example, --input '{proposed_input(model, parameter)}'."
            raise TargetError("GC104", f"input {parameter.name!r} is missing: {takes}. {add}")


def _names(signature: inspect.Signature | None, kinds: Collection[Any] = (*POSITIONAL, _KEYWORD_ONLY)) -> list[str]:
    """Return the parameters of these kinds; without ``kinds``, of all that have a name of their own."""
    parameters = signature.parameters if signature is not None else {}
    return [name for name, parameter in parameters.items() if parameter.kind in kinds]


def given_inputs(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return the tensors among the inputs, ``x=f32[3,7], mask=bool[3,7]``, or ``its inputs`` if there are none."""
    named = input_names(function, args, kwargs)
    specs = [f"{name}={_spec(value)}" for name, value in named if isinstance(value, Tensor)]
    return listed(specs, 4) if specs else "its inputs"


def first_layer_remedy(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return a sentence with the ``--input`` that the model's first layer takes, if the first tensor does not fit."""
    name, layer, wanted = first_layer(function)
    tensors = [each for each in input_names(function, args, kwargs) if isinstance(each[1], Tensor)]
    if layer is None or not tensors or not _is_misfit(tensors[0][1], layer, wanted):
        return ""
    who = f"Layer {name!r}" if name else "It"
    return f" {who} takes, for example, --input '{tensors[0][0]}={wanted}'."


def _is_misfit(given: Tensor, layer: nn.Module, wanted: TensorSpec) -> bool:
    """Return whether dtype or width differ from what the layer takes, or numbers are beyond an embedding."""
    if wanted.between is not None:
        is_integer = given.dtype in (torch.int32, torch.int64)
        low, high = wanted.between
        return not is_integer or bool(((given < low) | (given >= high)).any())
    width = 1 - len(wanted.shape) if isinstance(layer, nn.modules.conv._ConvNd) else -1
    is_narrow = given.ndim < -width
    return _spec(given).dtype != wanted.dtype or is_narrow or given.shape[width] != wanted.shape[width]


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(short_dtype(tensor.dtype), tuple(tensor.shape))
