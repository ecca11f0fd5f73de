"""Operators of one element each that onnxruntime computes slowly as torch writes them.

The gradient of relu is torch's ``where(y <= 0, 0, dy)`` (torch/_decomp/decompositions.py, threshold_backward);
onnxruntime 1.32 takes 40 times as long for a Where as for an addition, and 15 times as long for a Pow as for a product
(tests/benchmarks/joint_speed.py --profile).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten


def _threshold_backward(dy: Tensor, y: Tensor, threshold: float) -> Any:
    """Return dy where y is above 0, and 0 elsewhere, as dy held between -b and b, where b is 0 or infinite.

    A mask of 0 and 1 times dy would be NaN where dy is infinite, which sqrt(relu(x)) is at 0; this one is 0, as eager.

    Other thresholds, and types with few exponents, are left to torch.
    """
    if threshold != 0 or y.dtype not in {torch.float32, torch.float64}:
        return NotImplemented  # in the way of torch._decomp
    # Twice, so that the smallest normal number becomes infinite. y is not negative: it is the output of relu.
    large = torch.finfo(y.dtype).max
    bound = y.relu() * large * large
    return torch.minimum(torch.maximum(dy, -bound), bound)


def _pow(x: Tensor, exponent: float) -> Any:
    """Return small whole powers as products, as eager computes them (aten/src/ATen/native/cpu/PowKernel.cpp)."""
    if exponent not in {1, 2, 3} or not x.is_floating_point():
        return NotImplemented
    return x.clone() if exponent == 1 else x * x if exponent == 2 else x * x * x


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """Return the softmax, and 0 for rows of -inf alone (torch/_decomp/decompositions.py, safe_softmax).

    Held above -inf, such a row is no NaN but even, and its mask takes it out.
    """
    x = x if dtype is None else x.to(dtype)
    if x.dtype not in {torch.float32, torch.float64} or x.ndim == 0:
        return NotImplemented
    lowest = torch.finfo(x.dtype).min
    is_masked = torch.amax(x, dim, keepdim=True) == -torch.inf
    return torch.softmax(x.clamp(min=lowest), dim) * is_masked.logical_not().to(x.dtype)


TABLE: dict[Any, Callable[..., Any]] = {
    _aten.threshold_backward.default: _threshold_backward,
    _aten.pow.Tensor_Scalar: _pow,
    _aten._safe_softmax.default: _safe_softmax,
}
