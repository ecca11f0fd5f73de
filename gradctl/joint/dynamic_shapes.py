"""Free sizes of a joint graph: those that ``--dynamic`` names, and what is computed from them.

Private to torch (seen in 2.10 to 2.14): ``SymInt.node``, its ``ShapeEnv`` and the guards in it.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Mapping
from pathlib import Path
from traceback import FrameSummary
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

from gradctl.joint.draws import Distribution
from gradctl.joint.export_error import JointExportError
from gradctl.subject.frames import is_users
from gradctl.subject.torch_private import decompositions

__all__ = ["Sizes", "exported_axes", "free_sizes", "named_axes", "with_sizes"]

_SLICE = "_compute_slice_index"  # which clamps
_LARGE = sympy.Integer(10**6)
_DECOMPOSITIONS = (decompositions.__file__,)
_ALIKE = ("matmul",)  # decompositions whose choice is one of speed
# The names of free sizes, by the expressions that stand for them in shapes.
Sizes = Mapping[Any, str]


def free_sizes(fakes: Mapping[str, Tensor], free: Mapping[str, Mapping[int, str]]) -> Sizes:
    """Return the free sizes of a trace.

    Args:
        fakes: what was traced with, by name.
        free: names of sizes, by name and axis.

    Raises:
        JointExportError: one is not free, two are one, or the model does one thing at some sizes and another at others.
    """
    found: dict[Any, str] = {}
    for name, axes in free.items():
        for axis, size in axes.items():
            _ensure_undecided(size, fakes[name].shape[axis])
            expression = _expression(fakes[name].shape[axis])
            if not getattr(expression, "free_symbols", ()):
                instead = " Give an example with two or more: torch fixes a size of one." if expression == 1 else ""
                raise JointExportError(f"it is fixed to {size}={expression}, and --dynamic asks for any.{instead}")
            other = found.setdefault(expression, size)
            if other != size:
                raise JointExportError(f"{other} and {size} of --dynamic are always equal: give them one name.")
    return found


def named_axes(fake: Tensor, sizes: Sizes) -> dict[int, str]:
    """Return the names of a tensor's free axes, ``batch`` or what is computed from it, ``2*batch``."""
    names = {symbol: sympy.Symbol(name) for symbol, name in sizes.items()}
    expressions = {axis: _expression(size) for axis, size in enumerate(fake.shape)}
    return {
        axis: str(each.xreplace(names))
        for axis, each in expressions.items()
        if getattr(each, "free_symbols", ()) and each.free_symbols <= names.keys()
    }


def exported_axes(fake: Tensor) -> dict[int, Any] | None:
    """Return what torch.export is told of a tensor's free axes: that it finds out their sizes by itself.

    Told names, it refuses where a kernel or a layout wants more than the smallest of all sizes.
    """
    free = (axis for axis, size in enumerate(fake.shape) if getattr(_expression(size), "free_symbols", ()))
    return dict.fromkeys(free, torch.export.Dim.AUTO) or None


def with_sizes(distribution: Distribution, sizes: Sizes) -> Distribution:
    """Return a distribution whose parameters have the names of free sizes for their symbols."""
    names = {str(symbol): name for symbol, name in sizes.items()}
    return {key: names.get(value, value) if isinstance(value, str) else value for key, value in distribution.items()}


def _ensure_undecided(name: str, size: int | torch.SymInt) -> None:
    """Raise for what the model does at some sizes only: none of torch's layouts, nor that it raises at others."""
    if not isinstance(size, torch.SymInt):
        return
    symbols = size.node._expr.free_symbols  # as it was before it was found to be a number
    for guard in size.node.shape_env.guards:
        place = guard.sloc.framework_loc
        if not isinstance(place, FrameSummary) or not symbols & guard.expr.free_symbols:
            continue
        wanted = guard.expr.xreplace(dict.fromkeys(symbols, sympy.Symbol(name, integer=True)))
        if place.name == _SLICE and guard.expr.xreplace(dict.fromkeys(guard.expr.free_symbols, _LARGE)) is sympy.false:
            raise JointExportError(f"a slice wants {wanted}: assert that before it, or leave {name} fixed.")
        if is_users(place.filename) and not _only_refuses(place):
            where = f" ({Path(place.filename).name}, line {place.lineno})"
            raise JointExportError(
                f"a branch, a loop or a number depends on {name}{where}: leave {name} fixed, or compute with tensors."
            )
        if place.filename in _DECOMPOSITIONS and place.name not in _ALIKE:
            raise JointExportError(f"what {place.name} does depends on {name}: leave {name} fixed.")


def _only_refuses(place: FrameSummary) -> bool:
    """Return whether a line decides no more than whether to raise."""
    line = place.lineno or 0

    def is_here(node: ast.expr | ast.Assert) -> bool:
        return node.lineno <= line <= (node.end_lineno or node.lineno)

    try:
        tree = ast.parse("".join(linecache.getlines(place.filename)))
    except SyntaxError:
        return False
    found: list[ast.expr | ast.Assert] = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and not node.orelse and all(isinstance(each, ast.Raise) for each in node.body):
            found.append(node.test)
    return any(map(is_here, found))


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
