"""Gradients of slices of one tensor, concatenated instead of added up.

The backward of ``q, k, v = qkv.chunk(3)`` is three tensors of zeros with a gradient in one third of each, and two
additions. If the slices do not overlap, it is one concatenation, with zeros between them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import fx

from gradctl.tracing.operators import writes

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A gradient of the elements from ``start`` to ``stop`` of an axis; without the axis, if one was selected."""

    gradient: fx.Node
    start: int
    stop: int
    is_selected: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """Gradients of parts of a tensor of ``size`` along ``axis``, in their order, without overlap."""

    size: tuple[int, ...]
    axis: int
    parts: tuple[_Part, ...]


def join_parts(graph: fx.GraphModule) -> None:
    """Replace sums of gradients of parts of one tensor with concatenations, in place; unused nodes are kept.

    The graph is a traced backward in which ``slice_backward`` and ``select_backward`` are not decomposed.
    """
    found: dict[fx.Node, _Parts] = {}
    for node in graph.graph.nodes:
        parts = _part(node) or _sum(node, found)
        if parts is not None:
            found[node] = parts
    for node, parts in found.items():
        if not any(user in found for user in node.users):
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(_joined(graph.graph, parts))
    graph.recompile()


def _part(node: fx.Node) -> _Parts | None:
    """Return the part whose gradient a node is, if it is one."""
    if node.target not in {_aten.slice_backward.default, _aten.select_backward.default}:
        return None
    gradient, size, axis, *place = cast(list[Any], node.args)
    is_written = any(writes(user.target) for user in gradient.users)
    if is_written or not all(isinstance(each, int) for each in (*size, *place)):
        return None
    axis %= len(size)
    is_selected = node.target is _aten.select_backward.default
    if is_selected:
        start = place[0] % size[axis]
        stop = start + 1
    else:
        start, stop, step = slice(*place).indices(size[axis])
        if step != 1 or start >= stop:
            return None
    return _Parts(tuple(size), axis, (_Part(gradient, start, stop, is_selected),))


def _sum(node: fx.Node, found: dict[fx.Node, _Parts]) -> _Parts | None:
    """Return the parts whose gradients a node adds, if they do not overlap."""
    if node.target not in {_aten.add.Tensor, operator.add} or node.kwargs:
        return None
    terms = [found[each] for each in node.all_input_nodes if each in found and len(each.users) == 1]
    if len(terms) != 2:
        return None
    one, other = terms
    parts = tuple(sorted((*one.parts, *other.parts), key=lambda part: part.start))
    overlap = any(before.stop > after.start for before, after in pairwise(parts))
    same = (one.size, one.axis) == (other.size, other.axis)
    return _Parts(one.size, one.axis, parts) if same and not overlap else None


def _joined(graph: fx.Graph, found: _Parts) -> fx.Node:
    """Return the concatenation of the parts, with zeros between them."""
    pieces, end = [], 0
    for part in (*found.parts, None):
        start = found.size[found.axis] if part is None else part.start
        if start > end:
            gap = [start - end if axis == found.axis else size for axis, size in enumerate(found.size)]
            pieces.append(graph.call_function(_aten.new_zeros.default, (found.parts[0].gradient, gap)))
        if part is not None:
            whole = (part.gradient, found.axis)
            pieces.append(graph.call_function(_aten.unsqueeze.default, whole) if part.is_selected else part.gradient)
            end = part.stop
    return pieces[0] if len(pieces) == 1 else graph.call_function(_aten.cat.default, (pieces, found.axis))
