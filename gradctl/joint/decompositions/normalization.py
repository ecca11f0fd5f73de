"""BatchNorm on the statistics of the batch, in plain arithmetic.

torch's exporter turns these operators into BatchNormalization of ONNX, which divides by other statistics, silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import decompose

from gradctl.joint.decompositions.separable import working_type

__all__ = ["TABLE"]

_aten = torch.ops.aten


def _normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (x - mean) / sqrt(variance + eps) · weight + bias by channel, and 1 / sqrt(variance + eps)."""
    shape = [1, -1] + [1] * (x.ndim - 2)
    inverse = torch.rsqrt(variance + eps)
    found = (x.to(mean.dtype) - mean.reshape(shape)) * inverse.reshape(shape)
    if weight is not None:
        found = found * weight.to(mean.dtype).reshape(shape)
    if bias is not None:
        found = found + bias.to(mean.dtype).reshape(shape)
    return found.to(x.dtype), inverse


def _batch_norm_functional(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``aten._native_batch_norm_legit_functional``: output, statistics that were used, running statistics.

    The running variance takes the unbiased one (Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 2).
    """
    if not training:
        mean, variance = running_mean.to(working_type(x)), running_var.to(working_type(x))
        empty = x.new_zeros((0,))
        return _normalized(x, weight, bias, mean, variance, eps)[0], empty, empty, running_mean, running_var
    found, mean, inverse, variance = _on_batch(x, weight, bias, eps)
    count = math.prod(x.shape) // x.shape[1]
    moved_mean = running_mean * (1 - momentum) + (mean * momentum).to(running_mean.dtype)
    moved_var = running_var * (1 - momentum) + (variance * (momentum * count / (count - 1))).to(running_var.dtype)
    return found, mean, inverse, moved_mean, moved_var


def _batch_norm_without_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``aten._native_batch_norm_legit.no_stats``: output, and the statistics of the batch."""
    return _on_batch(x, weight, bias, eps)[:3]


def _batch_norm_evaluated(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``aten._native_batch_norm_legit_no_training``: its output, and no statistics of the batch.

    torch.onnx (2.13) gives the running statistics for those of the batch.
    """
    with decompose({}):  # or the call below would be this one
        output = _aten._native_batch_norm_legit_no_training(x, weight, bias, running_mean, running_var, momentum, eps)[
            0
        ]
    return output, x.new_zeros((0,)), x.new_zeros((0,))


def _on_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output, mean, 1 / sqrt(variance + eps) and variance of the batch."""
    dims = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(x.to(working_type(x)), dims, correction=0)
    found, inverse = _normalized(x, weight, bias, mean, variance, eps)
    return found, mean, inverse, variance


TABLE: dict[Any, Callable[..., Any]] = {
    _aten._native_batch_norm_legit_functional.default: _batch_norm_functional,
    _aten._native_batch_norm_legit_no_training.default: _batch_norm_evaluated,
    _aten._native_batch_norm_legit.no_stats: _batch_norm_without_statistics,
}
