"""Operators of ``torch.library`` as functions of tensors, whose parameters are those of the operator's schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from gradctl.core.errors import TargetError, nearest
from gradctl.subject.torch_private import CustomOpDef, OpOverload, OpOverloadPacket, registered_operators


def find_operator(name: str, place: str) -> Any:
    """Return the operator ``ns::op`` or ``ns::op.overload``.

    Raises:
        TargetError: GC102 if it is not registered, after ``place`` was imported.
    """
    namespace, _, path = name.partition("::")
    found: Any = getattr(torch.ops, namespace)
    try:
        for part in path.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        registered = sorted({each.partition(".")[0] for each in registered_operators()})
        near = nearest(name, registered)
        said = f"after the import of {place} there is no operator {name!r}{near}. Register it in {place}."
        raise TargetError("GC102", said) from error
    return found


def operator_function(found: Any) -> Callable[..., Any] | None:
    """Return a function that calls an operator, by the parameters of its schema; None for any other object.

    A copy of the operator itself is not possible, and its parameters have no names.
    """
    operator = getattr(found, "_opoverload", found) if isinstance(found, CustomOpDef) else found
    if isinstance(operator, OpOverloadPacket) and len(operator.overloads()) == 1:
        operator = getattr(operator, operator.overloads()[0])
    if not isinstance(operator, (OpOverload, OpOverloadPacket)):
        return None

    def call(*args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs)

    call.__name__ = call.__qualname__ = str(operator).removesuffix(".default").replace(".", "::", 1)
    if isinstance(operator, OpOverload):
        call.__signature__ = _signature(operator)  # type: ignore[attr-defined]  # read by inspect.signature
    return call


def _signature(operator: Any) -> inspect.Signature:
    by_position, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            inspect.Parameter(
                each.name,
                by_name if each.kwarg_only else by_position,
                default=each.default_value if each.has_default_value() else inspect.Parameter.empty,
            )
            for each in operator._schema.arguments
        ]
    )
