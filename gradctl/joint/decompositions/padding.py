"""Gradients of padding with the values at the border: what was copied from an element is added to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten


def _replication_backward(dy: Tensor, x: Tensor, padding: Sequence[int]) -> Any:
    """Return the gradient of ``aten.replication_pad1d``, ``2d`` or ``3d``; a negative padding takes elements away."""
    pairs = list(zip(padding[::2], padding[1::2], strict=True))
    for axis, (before, after) in enumerate(pairs):
        dim = x.ndim - 1 - axis
        size = x.shape[dim] + min(before, 0) + min(after, 0)
        if size < 1:
            return NotImplemented  # the border that is copied lies outside what is left
        dy = _gathered(dy, dim, max(before, 0), size)
    if any(each < 0 for each in padding):
        dy = _aten.constant_pad_nd(dy, [max(-each, 0) for each in padding])
    return dy


def _gathered(dy: Tensor, dim: int, before: int, size: int) -> Tensor:
    """Return the ``size`` elements of an axis, each with what was copied from it; ``before`` precede the first."""
    if size == 1:
        return dy.sum(dim, keepdim=True)
    first = dy.narrow(dim, 0, before + 1).sum(dim, keepdim=True)
    inner = dy.narrow(dim, before + 1, size - 2)
    start = before + size - 1
    last = dy.narrow(dim, start, dy.shape[dim] - start).sum(dim, keepdim=True)
    return torch.cat([first, inner, last], dim)


TABLE: dict[Any, Callable[..., Any]] = {
    _aten.replication_pad1d_backward.default: _replication_backward,
    _aten.replication_pad2d_backward.default: _replication_backward,
    _aten.replication_pad3d_backward.default: _replication_backward,
}
