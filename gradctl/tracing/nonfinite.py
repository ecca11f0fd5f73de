"""The origin of the first NaN or infinity: a torch call with finite arguments, or a node with finite gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gradctl.numerics.measures import is_float
from gradctl.subject.tree import leaves
from gradctl.tracing.graph import CallSite, Node, node_of, nodes_behind
from gradctl.tracing.recorder import Recorder
from gradctl.tracing.tracer import Tracer


@dataclass(frozen=True, slots=True)
class Made:
    """How a value came not to be finite."""

    first: CallSite  # the call with finite arguments and a result of NaN or infinity
    nan: CallSite  # the call with infinite arguments and a result of NaN; ``first`` if that has one


class ForwardTrace(Tracer):
    """Follow NaN and infinities from the calls that make them; the body of a custom Function is followed too.

    An infinity that is passed as a number (``masked_fill(mask, -inf)``) is intentional, and its result has no origin.
    """

    def __init__(self, modules: Mapping[int, str]) -> None:
        super().__init__(modules)
        self._made: Any = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> Made | None:
        """Return how ``tensor`` came not to be finite; None if no call was seen to make it so."""
        made: Made | None = self._made.get(tensor)
        return made

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one call and inspect its results."""
        result = func(*args, **kwargs)
        # A call that sets elements returns nothing, and writes to its first argument.
        written = args[0] if getattr(func, "__name__", "") == "__setitem__" else result
        for _, tensor in leaves(written):
            if _is_nonfinite(tensor) and tensor not in self._made:
                arguments = [value for _, value in leaves((args, kwargs)) if value is not tensor]
                self._made[tensor] = self._origin(func, tensor, arguments)
        return result

    def _origin(self, func: Any, tensor: Tensor, arguments: Sequence[Any]) -> Made | None:
        nonfinite = [each for each in arguments if _is_nonfinite(each)]
        if not _has_nan(tensor):
            if any(isinstance(each, float) and not math.isfinite(each) for each in arguments):
                return None
            return self._inherited(nonfinite) if nonfinite else _once(self.call_site(func))
        if nans := list(filter(_has_nan, nonfinite)):
            return self._inherited(nans)
        here = self.call_site(func)
        before = self._inherited(nonfinite)
        return Made(before.first, here) if before is not None else _once(here)

    def _inherited(self, tensors: Sequence[Tensor]) -> Made | None:
        return next((made for each in tensors if (made := self.of(each)) is not None), None)


@dataclass(eq=False)
class _Maker:
    """A node that made a gradient NaN or infinite of finite ones."""

    node: Node
    origin: CallSite


class BackwardTrace(Recorder):
    """Note the call of each node of the graph, and then the nodes of a backward that make NaN or infinities."""

    def __init__(self, modules: Mapping[int, str]) -> None:
        super().__init__(hooks_only=True, modules=modules)
        self.opens_checkpoints = True
        self.makers: list[_Maker] = []  # in the order of the backward
        self._origins: dict[Node, CallSite] = {}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one call and note the nodes that it adds to the graph."""
        before = _nodes((args, kwargs))
        result = super().call(func, args, kwargs)
        made = [node for node in _nodes(result) or _nodes(args) if node not in before]
        if made:
            origin = self.call_site(func)
            known = {*before}
            for node in nodes_behind(made, stops=lambda node: node in known or node in self._origins):
                self._origins[node] = origin
        return result

    @contextmanager
    def watching(self, outputs: Sequence[Tensor]) -> Iterator[None]:
        """Watch the nodes of the graph of ``outputs`` during one backward."""
        handles = [
            node.register_hook(self._hook(node))
            for node in list(nodes_behind(output.grad_fn for output in outputs))
            if not hasattr(node, "variable")
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, node: Node) -> Callable[[Any, Any], None]:
        def after(outgoing: Any, incoming: Any) -> None:
            if any(map(_is_nonfinite, outgoing)) and not any(map(_is_nonfinite, incoming)):
                unseen = CallSite(node.name(), None, None)
                self.makers.append(_Maker(node, self._origins.get(node, unseen)))

        return after


def _nodes(value: Any) -> list[Node]:
    tensors = [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]
    return [node for tensor in tensors if (node := node_of(tensor)) is not None]


def _once(origin: CallSite) -> Made:
    return Made(origin, origin)


def _has_nan(tensor: Tensor) -> bool:
    return bool(torch.isnan(tensor).any())


def _is_nonfinite(value: Any) -> bool:
    return is_float(value) and not bool(torch.isfinite(value).all())
