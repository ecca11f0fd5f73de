"""Constructor arguments: ``--arg key=value`` read, checked against a signature, and given to a class or a factory."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from gradctl.core.errors import GradctlError, TargetError, is_out_of_memory, nearest
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.signature import VARIADIC, own_signature, required_parameters

_LITERALS = (int, float, str, bool, complex, bytes, tuple, list, dict, set, type(None), object)


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the value of each ``key=value``: a Python literal where it is one, else the text itself.

    Raises:
        TargetError: GC108 if one is not ``key=value``, or a key is given twice.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise TargetError("GC108", f"{argument!r} is not KEY=VALUE. Write, for example, --arg width=64.")
        if key in values:
            raise TargetError("GC108", f"argument {key!r} is given twice. Give it once.")
        try:
            values[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            values[key] = text
    return values


def call_with(callee: Callable[..., Any], name: str, values: dict[str, Any], *, otherwise: str = "") -> Any:
    """Return what ``callee`` returns for ``values``, after checking them against its signature.

    ``otherwise`` is a sentence to add if arguments are missing: what else the user may have meant.

    Raises:
        TargetError: GC108 for an unknown or missing argument, a word where True or False is meant, or if ``callee``
            raises; then with the user's frames.
    """
    signature = own_signature(callee)
    args: tuple[Any, ...] = ()
    kwargs = values
    if signature is not None:
        _ensure_accepted(signature, name, values)
        _ensure_complete(signature, name, values, otherwise)
        args, kwargs = _bound(signature, values)
    try:
        return callee(*args, **kwargs)
    except (Exception, SystemExit) as error:
        if isinstance(error, GradctlError) or is_out_of_memory(error):
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in values.items())
        said = f"{name}({given}) raised {first_line(error)}."
        raise TargetError("GC108", said, details=user_frames(error)) from error


def _ensure_accepted(signature: inspect.Signature, name: str, values: dict[str, Any]) -> None:
    """Raise for an argument that the signature does not have, with the nearest name, and for a word as a flag."""
    parameters = signature.parameters.values()
    named = {parameter.name: parameter for parameter in parameters if parameter.kind not in VARIADIC}
    takes_any = inspect.Parameter.VAR_KEYWORD in {parameter.kind for parameter in parameters}
    for key, value in values.items():
        if key in named and isinstance(value, str) and _is_bool(named[key]):
            raise TargetError("GC108", f"argument {key!r} of {name} is True or False, and {value!r} is a word.")
        if key not in named and not takes_any:
            takes = ", ".join(named) or "no arguments"
            raise TargetError("GC108", f"{name} has no argument {key!r}{nearest(key, named)}. It takes {takes}.")


def _ensure_complete(signature: inspect.Signature, name: str, values: dict[str, Any], otherwise: str) -> None:
    """Raise for arguments that are missing, with the options to type."""
    missing = [parameter for parameter in required_parameters(signature) if parameter.name not in values]
    if missing:
        names = " and ".join(repr(parameter.name) for parameter in missing)
        options = " ".join(f"--arg {parameter.name}={_placeholder(parameter)}" for parameter in missing)
        remedy = f"Add {options}.{otherwise}"
        if any(_is_beyond_literals(parameter) for parameter in missing):
            remedy = f"--arg gives only Python literals: write a function make_model() that returns {name}(…)."
        raise TargetError("GC108", f"{name} needs {names}. {remedy}")


def _bound(signature: inspect.Signature, values: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return args and kwargs, so that positional-only parameters are given as such; the rest goes by keyword."""
    positional_only = {p.name: p.default for p in signature.parameters.values() if p.kind is p.POSITIONAL_ONLY}
    args = tuple(values.get(name, default) for name, default in positional_only.items())
    return args, {key: value for key, value in values.items() if key not in positional_only}


def _is_bool(parameter: inspect.Parameter) -> bool:
    """Return whether the parameter is a flag: ``--arg bias=false`` would be the word 'false', which is true."""
    if parameter.annotation is parameter.empty:
        return isinstance(parameter.default, bool)
    return parameter.annotation in (bool, "bool")


def _placeholder(parameter: inspect.Parameter) -> str:
    """Return what to write for a value: INT for ``width: int``."""
    plain = (kind.__name__ for kind in _LITERALS if parameter.annotation in (kind, kind.__name__))
    return next(plain, "VALUE").upper()


def _is_beyond_literals(parameter: inspect.Parameter) -> bool:
    """Return whether the parameter needs an object of some class (``config: BertConfig``)."""
    return inspect.isclass(parameter.annotation) and parameter.annotation not in (parameter.empty, *_LITERALS)
