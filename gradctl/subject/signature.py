"""What a model is called with: the parameters of its forward, whatever kind of callable it is."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.autograd import Function

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def call_signature(model: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature that a call of ``model`` follows, without ``self`` and ``ctx``; None for a builtin.

    A module's is its forward's (also inside ``torch.compile``'s wrapper, which takes anything), a Function's
    ``apply`` takes what its ``forward`` takes after ``ctx``.
    """
    model = optimized_inner(model)
    function = function_class(model)
    described: Callable[..., Any] = model
    if function is not None:
        described = function.forward
    elif isinstance(model, nn.Module):
        described = model.forward
    signature = own_signature(described)
    # With setup_context of its own, forward has no ctx (torch 2.0 on).
    if signature is not None and function is not None and function.setup_context is Function.setup_context:
        return signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature


def own_signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of a callable as Python has it; None for a builtin."""
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        return None


def callee_name(model: Callable[..., Any]) -> str:
    """Return how messages call what takes the inputs: ``forward``, ``ReLU.forward``, or the function's name."""
    function = function_class(model)
    if function is not None:
        return f"{function.__name__}.forward"
    if isinstance(model, nn.Module):
        return "forward"
    return getattr(model, "__name__", type(model).__name__)


def function_class(model: Callable[..., Any]) -> type[Function] | None:
    """Return the ``autograd.Function`` whose ``apply`` this is, or None."""
    owner = getattr(model, "__self__", None)
    return owner if is_subclass(owner, Function) and getattr(model, "__name__", "") == "apply" else None


def is_subclass(found: Any, base: type) -> bool:
    """Return whether an object of any kind is a class, and a subclass of ``base``."""
    return isinstance(found, type) and issubclass(found, base)


def module_of(model: Callable[..., Any]) -> nn.Module | None:
    """Return the module that ``model`` is, or whose method it is; None for a function."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def parameters_of(model: Any, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """Return the parameters of a module, or of the one whose method this is, by name; nothing of anything else.

    The names are those of a copy, where modules are without ``torch.compile``'s wrapper.
    """
    module = module_of(optimized_inner(model))
    named = module.named_parameters(remove_duplicate=remove_duplicate) if module is not None else ()
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in named}


def optimized_inner(model: Any) -> Any:
    """Return the module or function inside ``torch.compile``'s wrapper, or ``model``."""
    if isinstance(model, types.FunctionType):
        # torch.compiler.disable wraps like compile, and means that the function is to be run as it is.
        is_disabled = "_torchdynamo_disable" in vars(model)
        return model if is_disabled else vars(model).get("_torchdynamo_orig_callable", model)
    children = vars(model).get("_modules") if isinstance(model, nn.Module) else None
    inner = children["_orig_mod"] if children is not None and "_orig_mod" in children else model
    return inner if isinstance(inner, nn.Module) else model


def required_parameters(signature: inspect.Signature) -> list[inspect.Parameter]:
    """Return the parameters that have no default; ``*args`` and ``**kwargs`` need nothing."""
    return [
        parameter
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty and parameter.kind not in VARIADIC
    ]
