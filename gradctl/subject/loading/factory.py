"""From the object that a target names to a model: a module, a class, a factory, a function of tensors, a Function, an
operator of ``torch.library``.

Is a function a factory, which is called once for the model, or a function of tensors, which is the model? First rule
that holds:

1. It is named ``make_model``, or says that it returns an ``nn.Module`` (``-> Net``): a factory.
2. It says that it returns a tensor, or inputs name its own parameters (``--input 'x=…'`` for ``def f(x)``): of tensors.
3. ``--arg`` passes arguments to it: a factory.
4. It takes parameters without a default, or ``*args``: of tensors; except where each of them is annotated with a plain
   type (``width: int``) and there is no ``--input``, ``--inputs`` or ``NAME_inputs()``: a factory that lacks arguments.
5. It needs nothing: a factory.

A factory returns a module, a function of tensors, or a Function. A builtin without a signature (``torch.relu``) is a
function of tensors.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from gradctl.core.errors import TargetError
from gradctl.subject.loading.arguments import call_with
from gradctl.subject.loading.library_operator import operator_function
from gradctl.subject.signature import is_subclass, own_signature, required_parameters

_PLAIN_TYPES = (int, float, str, bool)


@dataclass(frozen=True, slots=True)
class KnownInputs:
    """What is known of the inputs before the model exists: names from ``--input``; whether any are for this target."""

    names: frozenset[str] = frozenset()
    are_given: bool = False


def build_model(found: Any, name: str, arguments: dict[str, Any], inputs: KnownInputs) -> Callable[..., Any]:
    """Return the model: an ``nn.Module``, a function of tensors, or a Function's ``apply``.

    ``inputs`` distinguish a function of tensors from a factory; ``arguments`` are those of ``--arg``.

    Raises:
        TargetError: GC108 if the arguments do not fit or the user's code raises; GC109 if ``found``, or what a
            factory returns, is no model.
    """
    if (operator := operator_function(found)) is not None:
        _refuse_arguments(arguments, f"{name!r} is an operator of torch.library", as_input=True)
        return operator
    if is_subclass(found, nn.Module):
        return _module_or_function(call_with(found, name, arguments), f"{name}(…)")
    is_function = is_subclass(found, Function)
    if inspect.isclass(found) and not is_function:
        raise TargetError(
            "GC109",
            f"{name!r} is a class, but neither an nn.Module nor an autograd.Function. Name one of these, or a function "
            "that makes one.",
        )
    if callable(found) and not isinstance(found, nn.Module) and not is_function:
        if is_factory(found, name, arguments, inputs):
            otherwise = f" If {name} is a function of tensors, use --input instead."
            return _module_or_function(call_with(found, name, arguments, otherwise=otherwise), f"{name}()")
        _refuse_arguments(arguments, f"{name!r} is taken as a function of tensors", as_input=True)
        return typing.cast(Callable[..., Any], found)
    what = "an autograd.Function" if is_function else "neither a class nor a factory"
    _refuse_arguments(arguments, f"{name!r} is {what}")
    return _module_or_function(found, repr(name))


def is_factory(function: Callable[..., Any], name: str, arguments: dict[str, Any], inputs: KnownInputs) -> bool:
    """Return whether a function makes a model, by the rules at the head of this file."""
    signature = own_signature(function)
    if signature is None:
        return False
    annotated = _annotated(function)
    returns = annotated.get("return")
    if name.rpartition(".")[2] == "make_model" or is_subclass(returns, nn.Module):
        return True
    if returns is Tensor or not inputs.names.isdisjoint(signature.parameters):
        return False
    if arguments:
        return True
    if required := required_parameters(signature):
        return not inputs.are_given and all(annotated.get(each.name) in _PLAIN_TYPES for each in required)
    return all(each.kind is not each.VAR_POSITIONAL for each in signature.parameters.values())


def _annotated(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations as types, or nothing where one names what cannot be found."""
    try:
        return typing.get_type_hints(function)
    except Exception:  # evaluates the user's annotations
        return {}


def _module_or_function(made: Any, source: str) -> Callable[..., Any]:
    """Return ``made`` as a callable model, or say what it is instead."""
    if isinstance(made, nn.Module):
        return made
    if is_subclass(made, Function):
        return made.apply  # type: ignore[no-any-return]
    if callable(made) and not inspect.isclass(made):
        return typing.cast(Callable[..., Any], made)
    if made is None:
        what = f"{source} is None. Return the model from it"
    elif isinstance(made, tuple):
        what = f"{source} is a tuple of {len(made)}. Return the model alone, and the inputs from example_inputs()"
    else:
        kind = type(made).__name__
        what = f"{source} is of type {kind!r}. Name an nn.Module, a function of tensors, or what makes one"
    raise TargetError("GC109", f"{what}.")


def _refuse_arguments(arguments: dict[str, Any], what: str, *, as_input: bool = False) -> None:
    """Raise for ``--arg`` where nothing is called with it."""
    if arguments:
        key, value = next(iter(arguments.items()))
        option = f"Give --input {f'{key}={value!r}'!r} instead" if as_input else f"Leave out --arg {key}"
        raise TargetError("GC108", f"{what}: it has no constructor arguments. {option}.")
