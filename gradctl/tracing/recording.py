"""Data of one run at the point that autograd does not differentiate: cuts, hooks, writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradctl.tracing.graph import Node
from gradctl.tracing.tracer import SourceLine, map_nested, tensors_in


class BranchChanged(Exception):
    """Beside the point the program made other calls than at it."""


@dataclass(slots=True, eq=False)
class Cut:
    """One call whose value, or whose change of a tensor, is held fixed."""

    func: Any  # the torch function that is called
    value: Any  # the result at the point; with ``writes`` a ``Write`` for each target, None if it is not held fixed
    writes: bool  # whether the call changes tensors in place
    place: SourceLine | None
    sources: tuple[Node, ...] = ()  # nodes from which a gradient would go on to the tensors before the cut
    alias: int | None = None  # the storage that the result shares with a source, if it does
    moves: bool = False  # whether the value is another beside the point (that of ``zeros_like`` never is)
    # Computes the result of a call whose gradient is documented not to be the derivative; None for others.
    replay: Callable[[Cut, Any, Any, Any], Any] | None = None

    def compare(self, recorded: Any, now: Any) -> None:
        """Note that the value moves if it, or the part of it that is ``recorded``, is another now."""
        self.moves = self.moves or not same_value(recorded, now)


@dataclass(slots=True)
class Recording:
    """The observations of one run at the point, for the runs beside it."""

    cuts: dict[int, Cut] = field(default_factory=dict)  # by number of the call; negative for custom Functions
    hooks: list[SourceLine | None] = field(default_factory=list)  # places that register a hook, which was disabled
    estimators: list[SourceLine | None] = field(default_factory=list)  # samples with a documented gradient estimator
    aliases: set[int] = field(default_factory=set)  # storages that the program can reach without autograd's knowledge
    written: set[int] = field(default_factory=set)  # those of them that it then wrote to


def requiring_grad(value: Any) -> tuple[Tensor, ...]:
    """Return the float tensors among arguments that require a gradient."""
    return tuple(tensor for tensor in tensors_in(value) if tensor.requires_grad and _has_float_dtype(tensor))


def _has_float_dtype(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def is_float_without_gradient(result: Any) -> bool:
    """Return whether a result is a float tensor, number or array without a gradient, or holds one and none with."""
    if isinstance(result, Tensor):
        return not result.requires_grad and _has_float_dtype(result)
    if isinstance(result, np.ndarray):
        return result.dtype.kind in "fc"
    if isinstance(result, (tuple, list)):
        has_floats = any(map(is_float_without_gradient, result))
        return has_floats and not any(tensor.requires_grad for tensor in tensors_in(result))
    return isinstance(result, (float, complex))


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
    """Return a number that tensors which share memory have in common."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
