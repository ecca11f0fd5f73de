"""Symbolic sizes of a joint graph: those that ``--dynamic`` names, and sizes computed from them.

Private to torch (seen in 2.10 to 2.14): ``SymInt.node``, its ``ShapeEnv`` and the guards in it.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator, Mapping
from traceback import FrameSummary
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_symbols

from gradctl.joint.export_error import JointExportError, line_of
from gradctl.joint.random_inputs import Distribution
from gradctl.subject.frames import is_users
from gradctl.subject.torch_private import decompositions

_SLICE = "_compute_slice_index"  # which clamps
_LARGE = sympy.Integer(10**6)
_SAME_RESULT = ("matmul",)  # decompositions that branch for speed only
# The names of symbolic sizes, by their expressions in shapes.
Sizes = Mapping[Any, str]


def free_sizes(fakes: Mapping[str, Tensor], free: Mapping[str, Mapping[int, str]]) -> Sizes:
    """Return the symbolic sizes of a trace with these inputs; ``free`` are names of sizes, by input and axis.

    Raises:
        JointExportError: a size is fixed, two are equal, or the model branches on one.
    """
    found: dict[Any, str] = {}
    for name, axes in free.items():
        for axis, size in axes.items():
            _ensure_no_branch(size, fakes[name].shape[axis])
            expression = _expression(fakes[name].shape[axis])
            if not free_symbols(fakes[name].shape[axis]):
                instead = " Give an example with two or more: torch fixes a size of one." if expression == 1 else ""
                raise JointExportError(
                    f"the model fixes the size {size} to {expression}, which --dynamic declares as symbolic.{instead}"
                )
            other = found.setdefault(expression, size)
            if other != size:
                raise JointExportError(f"{other} and {size} of --dynamic are always equal: use one name for both.")
    return found


def named_axes(fake: Tensor, sizes: Sizes) -> dict[int, str]:
    """Return the names of a tensor's symbolic axes: ``batch``, or an expression such as ``2*batch``."""
    names = {symbol: sympy.Symbol(name) for symbol, name in sizes.items()}
    return {
        axis: str(_expression(size).xreplace(names))
        for axis, size in enumerate(fake.shape)
        if free_symbols(size) and free_symbols(size) <= names.keys()
    }


def exported_axes(fake: Tensor) -> dict[int, Any] | None:
    """Return ``Dim.AUTO`` for a tensor's symbolic axes, whose range torch.export then infers.

    With named axes it rejects a kernel or a layout that needs more than the smallest of all sizes.
    """
    return {axis: torch.export.Dim.AUTO for axis, size in enumerate(fake.shape) if free_symbols(size)} or None


def with_sizes(distribution: Distribution, sizes: Sizes) -> Distribution:
    """Return a distribution with the names of symbolic sizes in place of their symbols."""
    names = {str(symbol): name for symbol, name in sizes.items()}
    return {key: names.get(value, value) if isinstance(value, str) else value for key, value in distribution.items()}


def _ensure_no_branch(name: str, size: Any) -> None:
    """Raise if the model branches on a size. Branches of torch on layouts, and those that only raise, are allowed."""
    for place, condition in _branches(size):
        wanted = condition.xreplace(dict.fromkeys(size.node._expr.free_symbols, sympy.Symbol(name, integer=True)))
        if place.name == _SLICE and condition.xreplace(dict.fromkeys(condition.free_symbols, _LARGE)) is sympy.false:
            raise JointExportError(f"a slice requires {wanted}: assert this before it, or keep {name} fixed.")
        if is_users(place.filename) and not _only_refuses(place):
            where = line_of(place.filename, place.lineno)
            raise JointExportError(
                f"a branch, a loop or a number depends on {name}{where}: leave {name} fixed, or compute with tensors."
            )
        if place.filename == decompositions.__file__ and place.name not in _SAME_RESULT:
            raise JointExportError(f"what {place.name} does depends on {name}: leave {name} fixed.")


def _branches(size: Any) -> Iterator[tuple[FrameSummary, Any]]:
    """Yield the place and the condition of each branch on a size, if it is symbolic."""
    if isinstance(size, torch.SymInt):
        symbols = size.node._expr.free_symbols  # as before it was specialized to a number
        for guard in size.node.shape_env.guards:
            place = guard.sloc.framework_loc
            if isinstance(place, FrameSummary) and symbols & guard.expr.free_symbols:
                yield place, guard.expr


def _only_refuses(place: FrameSummary) -> bool:
    """Return whether a line is an assertion, or the test of an if that only raises."""
    try:
        tree = ast.parse("".join(linecache.getlines(place.filename)))
    except SyntaxError:
        return False
    line = place.lineno or 0
    return any(
        each.lineno <= line <= (each.end_lineno or each.lineno) for node in ast.walk(tree) for each in _refusal(node)
    )


def _refusal(node: ast.AST) -> tuple[ast.Assert | ast.expr, ...]:
    """Return an assertion, or the test of an if that only raises; else nothing."""
    if isinstance(node, ast.If) and not node.orelse and all(isinstance(each, ast.Raise) for each in node.body):
        return (node.test,)
    return (node,) if isinstance(node, ast.Assert) else ()


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
