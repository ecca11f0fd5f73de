"""``--dynamic 'x:0=batch'``: the sizes of inputs that a static form is to leave free."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from gradctl.core.errors import TargetError, nearest
from gradctl.subject.inputs.example import input_names
from gradctl.subject.tree import map_leaves

# Input name → axis → name of the size.
Dynamic = Mapping[str, Mapping[int, str]]

_TEXT = re.compile(r"(?:input:)?(?P<input>[\w.]+):(?P<axis>\d+)=(?P<size>[A-Za-z]\w*)")


def parse_dynamic(texts: Iterable[str]) -> dict[str, dict[int, str]]:
    """Return the free sizes by input and axis; one name on several axes is one size.

    Raises:
        ValueError: a text is not NAME:AXIS=SIZE, or an axis is named twice.
    """
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not NAME:AXIS=SIZE, for example x:0=batch.")
        axes, axis = found.setdefault(match["input"], {}), int(match["axis"])
        if axis in axes:
            raise ValueError(f"axis {axis} of {match['input']!r} is named twice; name it once.")
        axes[axis] = match["size"]
    return found


def by_leaf(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Dynamic,
    make: Callable[[Mapping[int, str]], Any],
    *,
    option: str = "--dynamic",
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs with ``make(its free axes)`` in place of each tensor, and None in place of all else.

    ``option`` names the sizes in messages.

    Raises:
        TargetError: GC104 if an input is unknown or no tensor, or has no such axis.
    """
    named = input_names(model, args, kwargs)
    _ensure_axes({name: value for name, value in named if isinstance(value, Tensor)}, dynamic, option)
    names = iter([name for name, _ in named])

    def replaced(_: str, leaf: Any) -> Any:
        name = next(names)
        return make(dynamic.get(name, {})) if isinstance(leaf, Tensor) else None

    args, kwargs = map_leaves(replaced, (args, kwargs))
    return args, kwargs


def _ensure_axes(tensors: Mapping[str, Tensor], dynamic: Dynamic, option: str) -> None:
    for name, axes in dynamic.items():
        if name not in tensors:
            known = ", ".join(tensors) or "none"
            raise TargetError("GC104", f"{option} names no input tensor {name!r}{nearest(name, tensors)}: {known}.")
        for axis in axes:
            if axis >= tensors[name].ndim:
                shape = list(tensors[name].shape)
                raise TargetError("GC104", f"{option} {name}:{axis}: {name!r} is {shape}, which has no axis {axis}.")
