"""Free sizes of a joint graph: those that ``--dynamic`` names, and what is computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradctl.joint.draws import Distribution
from gradctl.joint.refusal import CannotJoin

__all__ = ["Sizes", "exported_axes", "free_sizes", "named_axes", "with_sizes"]

# The names of free sizes, by the expressions that stand for them in shapes.
Sizes = Mapping[Any, str]


def free_sizes(fakes: Mapping[str, Tensor], free: Mapping[str, Mapping[int, str]]) -> Sizes:
    """Return the free sizes of a trace.

    Args:
        fakes: what was traced with, by name.
        free: names of sizes, by name and axis.

    Raises:
        CannotJoin: one is not free, or two are one.
    """
    found: dict[Any, str] = {}
    for name, axes in free.items():
        for axis, size in axes.items():
            expression = _expression(fakes[name].shape[axis])
            if not getattr(expression, "free_symbols", ()):
                raise CannotJoin(f"it is fixed to {size}={expression}, and --dynamic asks for any.")
            other = found.setdefault(expression, size)
            if other != size:
                raise CannotJoin(f"{other} and {size} of --dynamic are always equal: give them one name.")
    return found


def named_axes(fake: Tensor, sizes: Sizes) -> dict[int, str]:
    """Return the names of a tensor's free axes, where they are those of an input."""
    expressions = map(_expression, fake.shape)
    return {axis: sizes[each] for axis, each in enumerate(expressions) if each in sizes}


def exported_axes(fake: Tensor, sizes: Sizes) -> dict[int, Any] | None:
    """Return what torch.export is told of a tensor's free axes: of ``2*batch``, it wants to know just that.

    A product of two it finds out by itself, and takes it for a size of its own.
    """
    found = {}
    for axis, size in enumerate(fake.shape):
        expression = _expression(size)
        symbols = list(getattr(expression, "free_symbols", ()))
        if len(symbols) == 1 and symbols[0] in sizes and expression.diff().is_Integer:
            batch, rest = torch.export.Dim(sizes[symbols[0]]), int(expression.subs(symbols[0], 0))
            found[axis] = int(expression.diff()) * batch + rest
        elif symbols:
            found[axis] = torch.export.Dim.AUTO
    return found or None


def with_sizes(distribution: Distribution, sizes: Sizes) -> Distribution:
    """Return a distribution whose parameters have the names of free sizes for their symbols."""
    names = {str(symbol): name for symbol, name in sizes.items()}
    return {key: names.get(value, value) if isinstance(value, str) else value for key, value in distribution.items()}


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
