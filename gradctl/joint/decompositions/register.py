"""The table of decompositions: from each overload of an ATen operator to the function that computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from gradctl.subject.torch_private import OpOverload

_Function = TypeVar("_Function", bound=Callable[..., Any])
Ints = Sequence[int]  # ``int[]`` of a schema
Table = dict[OpOverload, Callable[..., Any]]
REAL: Table = {}


def decomposes(*overloads: OpOverload, table: Table = REAL, **bound: Any) -> Callable[[_Function], _Function]:
    """Register a function as the decomposition of overloads. It returns ``NotImplemented`` to leave a call to torch.

    Its arguments are those of the overloads, and ``bound`` ones, such as the number of spatial axes.

    Raises:
        ValueError: an overload has a decomposition already.
    """

    def register(function: _Function) -> _Function:
        for overload in overloads:
            if overload in table:
                raise ValueError(f"{overload} has two decompositions")
            table[overload] = partial(function, **bound) if bound else function
        return function

    return register
