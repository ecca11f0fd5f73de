"""What one run of a program at the point showed that autograd does not differentiate: cuts, hooks, writes; as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradctl.tracing.graph import Node
from gradctl.tracing.tracer import SourceLine, tensors_in


class BranchChanged(Exception):
    """Beside the point the program made other calls than at it."""


@dataclass(slots=True, eq=False)
class Cut:
    """One call whose value, or whose change of a tensor, is held fixed.

    Attributes:
        func: the torch function called.
        value: what to give back: the result at the point, or with ``writes`` one write a target, None for no matter.
        writes: whether the call changes tensors in place.
        place: file and line in the user's program.
        sources: nodes from which a gradient would go on to the tensors that the cut keeps from it.
        alias: the storage that the result shares with a source, if it does.
        moves: whether the value is another beside the point (``zeros_like`` is a cut that never does).
        replay: computes the result of a call whose gradient is documented not to be the derivative; None for others.
    """

    func: Any
    value: Any
    writes: bool
    place: SourceLine | None
    sources: tuple[Node, ...] = ()
    alias: int | None = None
    moves: bool = False
    replay: Callable[[Cut, Any, Any, Any], Any] | None = None

    def compare(self, now: Any) -> None:
        """Note whether the value is another now."""
        self.moves = self.moves or not same_value(self.value, now)


@dataclass(slots=True)
class Recording:
    """What one run at the point showed, for the runs beside it.

    Attributes:
        cuts: by number of the call; those of custom Functions have negative numbers.
        hooks: places that register a hook, which was disabled.
        estimators: places of samples whose gradient is a documented estimator.
        aliases: storages that the program can reach without autograd's knowledge.
        written: those of them that it then wrote to.
    """

    cuts: dict[int, Cut] = field(default_factory=dict)
    hooks: list[SourceLine | None] = field(default_factory=list)
    estimators: list[SourceLine | None] = field(default_factory=list)
    aliases: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)


def requiring_grad(value: Any) -> tuple[Tensor, ...]:
    """Return the float tensors among arguments that require a gradient."""
    return tuple(t for t in tensors_in(value) if t.requires_grad and (t.is_floating_point() or t.is_complex()))


def is_float_without_gradient(result: Any) -> bool:
    """Tell a float tensor, number or array without a gradient; mixed results count only if none requires one."""
    if isinstance(result, Tensor):
        return not result.requires_grad and (result.is_floating_point() or result.is_complex())
    if isinstance(result, (float, complex)):
        return True
    if isinstance(result, np.ndarray):
        return result.dtype.kind in "fc"
    if isinstance(result, (tuple, list)) and result and not isinstance(result, torch.Size):
        floats = [item for item in result if is_float_without_gradient(item)]
        return bool(floats) and not any(tensor.requires_grad for tensor in tensors_in(result))
    return False


def map_nested(function: Callable[[Any], Any], value: Any) -> Any:
    """Return a call's result with ``function`` applied to each item of its lists and tuples."""
    if isinstance(value, list):
        return [map_nested(function, item) for item in value]
    if isinstance(value, tuple):
        mapped = [map_nested(function, item) for item in value]
        # torch.return_types (a structseq) takes one sequence, a named tuple its fields.
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return function(value)


def copied_value(value: Any) -> Any:
    """Return a detached copy of a call's result: tensors, arrays and numbers, nested."""
    return map_nested(_copied, value)


def _copied(item: Any) -> Any:
    return item.detach().clone() if isinstance(item, Tensor) else item.copy() if isinstance(item, np.ndarray) else item


def same_value(recorded: Any, now: Any) -> bool:
    """Return whether two results of one call are equal."""
    if isinstance(recorded, Tensor):
        if not isinstance(now, Tensor) or recorded.shape != now.shape:
            return False
        return recorded.layout != torch.strided or torch.equal(recorded, now)  # torch compares no sparse tensors
    if isinstance(recorded, np.ndarray):
        return bool(np.array_equal(recorded, now))
    if isinstance(recorded, (tuple, list)):
        return len(recorded) == len(now) and all(map(same_value, recorded, now))
    return bool(recorded == now)


def storage_of(tensor: Tensor) -> int:
    """Return what tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
