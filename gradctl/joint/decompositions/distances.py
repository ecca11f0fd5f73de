"""Distances between rows in a p-norm, and their gradients; at distance 0 the gradient is 0, as in eager.

Source: aten/src/ATen/native/cpu/DistanceOpsKernel.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten


def _cdist_forward(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None = None) -> Tensor:
    """Return the distances ``[*, P, R]`` of rows ``[*, P, M]`` from rows ``[*, R, M]``."""
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _cdist_backward(grad: Tensor, x1: Tensor, x2: Tensor, p: float, cdist: Tensor) -> Tensor:
    """Return the gradient by ``x1``; autograd sums what was broadcast."""
    return _slope(x1.unsqueeze(-2) - x2.unsqueeze(-3), grad, cdist, p).sum(-2)


def _pdist_forward(self: Tensor, p: float = 2) -> Tensor:
    """Return the distances of all pairs i < j of rows ``[N, M]``, pairs in the order of i, then j."""
    first, second = _pairs(self)
    return _norm(first.matmul(self) - second.matmul(self), p)


def _pdist_backward(grad: Tensor, self: Tensor, p: float, pdist: Tensor) -> Tensor:
    """Return the gradient by the rows."""
    first, second = _pairs(self)
    apart = first - second
    return apart.t().matmul(_slope(apart.matmul(self), grad, pdist, p))


def _norm(apart: Tensor, p: float) -> Tensor:
    distance = apart.abs()
    if p == 0:
        return (distance != 0).to(apart.dtype).sum(-1)
    if p == 1:
        return distance.sum(-1)
    if p == 2:
        return (distance * distance).sum(-1).sqrt()
    if math.isinf(p):
        return distance.amax(-1)
    # A power of 0 is exp(p log 0) to some runtimes, which is no number.
    powers = torch.where(distance == 0, 0, torch.where(distance == 0, 1, distance) ** p)
    total = powers.sum(-1)
    return torch.where(total == 0, 0, torch.where(total == 0, 1, total) ** (1 / p))


def _slope(apart: Tensor, grad: Tensor, distance: Tensor, p: float) -> Tensor:
    """Return the gradient by each difference: of the distance, times ``grad``."""
    grad, distance = grad.unsqueeze(-1), distance.unsqueeze(-1)
    if p == 0:
        return torch.zeros_like(apart) * grad
    if p == 1:
        return torch.sign(apart) * grad
    if math.isinf(p):
        return torch.sign(apart) * (apart.abs() == distance).to(grad.dtype) * grad
    size = apart.abs()
    zero = (distance == 0) | (size == 0)
    ratio = torch.where(zero, 1, size) / torch.where(zero, 1, distance)
    return torch.where(zero, 0, torch.sign(apart) * grad * (ratio if p == 2 else ratio ** (p - 1)))


def _pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return two matrices ``[N (N - 1) / 2, N]`` that choose the first and the second row of each pair."""
    count = rows.shape[0]
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    eye = torch.arange(count, device=rows.device)

    def choosing(which: int) -> Tensor:
        parts = [(eye == pair[which]) for pair in pairs]
        return torch.stack(parts).to(rows.dtype) if parts else rows.new_zeros((0, count))

    return choosing(0), choosing(1)


TABLE: dict[Any, Callable[..., Any]] = {
    _aten._cdist_backward.default: _cdist_backward,
    _aten._cdist_forward.default: _cdist_forward,
    _aten._pdist_backward.default: _pdist_backward,
    _aten._pdist_forward.default: _pdist_forward,
}
