"""Outputs without a gradient that depend on the leaves all the same, with what the program cuts held fixed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from gradctl.numerics.measures import gaussian_like, same_values
from gradctl.numerics.point import Point
from gradctl.numerics.runner import refusals_ignored

# Seen in float64 in whatever depends smoothly on a leaf; a threshold is seldom so near.
_STEP = 1e-6


def undifferentiated(point: Point, differentiable: Collection[str]) -> list[str]:
    """Return the names of float outputs that move with the leaves, and are not among the ``differentiable`` ones.

    A value that the program cuts (``detach``) is held fixed beside the point, so it does not move.
    """
    candidates = {name: value for name, value in point.outputs if name not in differentiable}
    if not candidates:
        return []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf, value in zip(point.runner.leaves, point.values, strict=True):
            leaf.tensor.copy_(value * (1 + _STEP * gaussian_like(value, generator)))
    beside: dict[str, Tensor] = {}
    with refusals_ignored():
        beside = dict(point.runner.beside())
    return [
        name for name, value in candidates.items() if name in beside and not same_values(value, beside[name].detach())
    ]
