"""Hooks on nodes of the autograd graph, disabled.

The methods ``register_hook`` and ``register_prehook`` of a node are C code that cannot be replaced. So the program's
``grad_fn`` returns an object that is the node in all but these two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.modules.module
import torch.utils.hooks

from gradctl.subject.frames import is_users
from gradctl.tracing.graph import Node
from gradctl.tracing.tracer import map_nested

# Module hooks become hooks on nodes here. Elsewhere torch passes nodes to C code, which accepts no other object.
_HOOKING_FILES = (torch.nn.modules.module.__file__, torch.utils.hooks.__file__)


class NoHandle:
    """The handle of a hook that is disabled."""

    id = 0

    def remove(self) -> None:
        """Nothing is registered, so nothing is removed."""

    def __enter__(self) -> NoHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _NodeWithoutHooks:
    """A node that calls ``disable`` instead of registering a hook, and whose next nodes do so too."""

    def __init__(self, node: Node, disable: Callable[[], None]) -> None:
        object.__setattr__(self, "_node", node)
        object.__setattr__(self, "_disable", disable)

    @property  # type: ignore[misc]  # of object it can be assigned
    def __class__(self) -> Any:  # what isinstance reads
        return type(self._node)

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        """Return the next nodes, which register no hooks either."""
        following = self._node.next_functions
        return tuple(
            (None if node is None else node_without_hooks(node, self._disable), index) for node, index in following
        )

    def register_hook(self, hook: Any) -> NoHandle:
        """Disable a hook."""
        self._disable()
        return NoHandle()

    register_prehook = register_hook

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_node"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._node, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._node(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return bool(self._node == real_nodes(other))

    def __hash__(self) -> int:
        return hash(self._node)

    def __repr__(self) -> str:
        return repr(self._node)


def node_without_hooks(node: Node, disable: Callable[[], None]) -> Any:
    """Return an object that is ``node`` except that registering a hook calls ``disable``."""
    return type(type(node).__name__, (_NodeWithoutHooks,), {})(node, disable)


def real_nodes(value: Any) -> Any:
    """Return ``value`` with the nodes that its objects wrap, in containers too (a GradientEdge is a named tuple)."""
    return map_nested(
        lambda item: object.__getattribute__(item, "_node") if issubclass(type(item), _NodeWithoutHooks) else item,
        value,
    )


def is_programs_call() -> bool:
    """Return whether the present call is one of the program, or one by which torch registers its modules' hooks."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith("gradctl."):
        frame = frame.f_back  # type: ignore[assignment]  # the program is further out
    file = frame.f_code.co_filename
    return is_users(file) or file in _HOOKING_FILES
