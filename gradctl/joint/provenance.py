"""The user's line of each traced operator, and refusals of programs that no graph can express, with that line.

An operator of the backward has the line of the forward operator that it differentiates: autograd numbers both alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.traceback import annotate

from gradctl.joint.export_error import JointExportError, here
from gradctl.subject.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    current_autograd_node,
    sequence_number,
)
from gradctl.tracing.operators import OperatorMode, name_of, writes

_KEY = "gradctl"
_aten = torch.ops.aten


class Places(OperatorMode):
    """Annotate each traced node with the user's line.

    Raises:
        JointExportError: for an operator that returns values to Python, or whose sizes torch cannot leave symbolic;
            raised by the operator.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._forward: dict[int, str] = {}
        self.writes: dict[int, str] = {}  # the user's line that last wrote to a storage, by its address
        self.sized = ""  # the first operator whose output size depends on values, in a sentence

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        place, node = here(), current_autograd_node()
        if node is None:
            self._forward[sequence_number() - 1] = place
        elif not place:  # otherwise it is the user's own backward, or a checkpoint
            place = self._forward.get(node._sequence_nr(), "").replace(" (", " (the backward of ", 1)
        if writes(func):
            self.writes.update({each.untyped_storage()._cdata: place for each in args[:1] if isinstance(each, Tensor)})
        with annotate({_KEY: place}):
            return self._run(func, args, kwargs or {}, place)

    def _run(self, func: Any, args: Any, kwargs: Any, place: str) -> Any:
        if func is _aten._pack_padded_sequence.default:
            raise JointExportError(
                f"a packed sequence has sizes that depend on values{place}: pad it, and mask the result."
            )
        tags = set(getattr(func, "tags", ())) & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if not tags:
            return func(*args, **kwargs)
        said, instead = _SAID.get(func, (name_of(func), "keep all of it, and multiply by a mask or use torch.where"))
        sized = f"the size of the result of {said} depends on values{place}: {instead}."
        try:
            value = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise JointExportError(sized if torch.Tag.dynamic_output_shape in tags else _values(place)) from error
        if free_unbacked_symbols(value):
            if torch.Tag.dynamic_output_shape not in tags:
                raise JointExportError(_values(place))
            self.sized = self.sized or sized
        return value


def _values(place: str) -> str:
    return (
        f"a branch, a loop, a size or a number depends on the values of a tensor{place}: keep it a tensor, and choose "
        "with torch.where."
    )


# The user's name of an operator, and what to write instead.
_SAID = {
    _aten.bincount.default: ("bincount", "sum one_hot over the rows"),
    _aten.index.Tensor: ("an index by a mask", "multiply by the mask, or use torch.where"),
    _aten.repeat_interleave.Tensor: ("repeat_interleave", "pass output_size"),
}


def place_of(node: fx.Node) -> str:
    """Return the user's line of a node of the trace, as ``here``."""
    place: str = node.meta.get("custom", {}).get(_KEY, "")
    return place


def places_by_operator(graph: fx.GraphModule) -> dict[str, str]:
    """Return for each operator of a trace the user's line of its first node."""
    found: dict[str, str] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function":
            found.setdefault(str(node.target), place_of(node))
    return found
