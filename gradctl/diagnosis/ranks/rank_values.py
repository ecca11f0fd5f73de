"""How the tensors of ranks make one of one process: copies, shards along an axis, terms of a sum, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gradctl.numerics.agreement import norm_of_difference, scale_of

Relation = Literal["same", "shard", "sum", "other"]
# Of values inside a model, whose noise is not measured: they only select what an experiment then tests.
_ALIKE = 1e-8


def relation(whole: Tensor, parts: Sequence[Tensor | None], factor: float = 1.0) -> tuple[Relation, int]:
    """Return how the tensors of the ranks make ``factor`` times one of one process, and of shards the axis.

    Args:
        whole: in one process.
        parts: of each rank; None where a rank has none.
        factor: of the parts.
    """
    present = [each / factor for each in parts if each is not None]
    if len(present) < len(parts) or not present:
        return "other", 0
    if all(each.shape == whole.shape for each in present):
        if all(alike(each, whole) for each in present):
            return "same", 0
        return ("sum" if alike(torch.stack(present).sum(0), whole) else "other"), 0
    for axis in range(whole.dim()):
        shapes = [(*each.shape[:axis], *each.shape[axis + 1 :]) for each in present if each.dim() == whole.dim()]
        rest = (*whole.shape[:axis], *whole.shape[axis + 1 :])
        if len(shapes) == len(present) and set(shapes) == {rest} and alike(torch.cat(present, axis), whole):
            return "shard", axis
    return "other", 0


def alike(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors differ by less than 1e-8 of the norm of the second."""
    return one.shape == other.shape and norm_of_difference(one, other) <= _ALIKE * scale_of(other)
