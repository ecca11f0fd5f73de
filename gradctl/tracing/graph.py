"""The autograd graph, traversed backward from its nodes, and the place of calls in the user's program."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from gradctl.subject.frames import user_location
from gradctl.subject.instance import Leaf

Node = Any


@dataclass(frozen=True, slots=True)
class CallSite:
    """One call in the user's program."""

    op: str  # the full name of the torch function, or of the module's class
    place: tuple[str, int] | None  # file and line of the user's code that calls it; None if none is on the stack
    module: str | None  # path of the innermost module that is running; None outside any, "" for the model itself


def call_site(func: Any, modules: Mapping[int, str]) -> CallSite:
    """Return where on the present stack ``func`` is called; ``modules`` are paths by identity of the module."""
    op = resolve_name(func) or getattr(func, "__qualname__", str(func))
    return CallSite(op, user_location(), innermost_module(modules))


def modules_by_identity(model: Any) -> dict[int, str]:
    """Return the path of each module of the model; empty for a plain function."""
    return {id(module): name for name, module in model.named_modules()} if isinstance(model, nn.Module) else {}


def node_of(tensor: Tensor) -> Node | None:
    """Return the node that made a tensor; None for a leaf, and for a view whose node torch cannot make anew.

    That is a view from a ``no_grad`` block whose base was written to since (the power iteration of spectral norm).
    """
    with contextlib.suppress(RuntimeError):
        return tensor.grad_fn
    return None


def node_before(tensor: Tensor) -> Node | None:
    """Return a node from which a gradient goes on to ``tensor``, which may be a leaf; None as ``node_of``.

    It owns the graph behind it: the node of a custom Function dies with its tensor, or as that is written to.
    """
    with contextlib.suppress(RuntimeError), torch.enable_grad():
        return tensor.view_as(tensor).grad_fn
    return None


def nodes_behind(starts: Iterable[Node], stops: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
    """Yield ``starts`` and each node that a gradient reaches from them, but neither one that ``stops`` nor past it."""
    seen: set[Node] = set()
    pending = [node for node in starts if node is not None]
    while pending:
        node = pending.pop()
        if node in seen or stops(node):
            continue
        seen.add(node)
        yield node
        pending.extend(following for following, _ in node.next_functions if following is not None)


def leaves_behind(starts: Iterable[Node], leaves: Sequence[Leaf]) -> set[str]:
    """Return the names of the leaves that a gradient reaches from ``starts``."""
    names = {id(tensor): leaf.name for leaf in leaves for tensor in (leaf.sharing or (leaf.tensor,))}
    variables = (getattr(node, "variable", None) for node in nodes_behind(starts))
    return {names[id(variable)] for variable in variables if isinstance(variable, Tensor) and id(variable) in names}


def innermost_module(modules: Mapping[int, str]) -> str | None:
    """Return the path of the innermost module that is running on the present stack, or None outside any."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",) and modules:
            path = modules.get(id(frame.f_locals.get("self")))
            if path is not None:
                return path
        frame = frame.f_back  # type: ignore[assignment]  # None at the outermost, which ends the loop
    return None
