"""Batch norm, weight norm, vector norms, and distances in a p-norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import decompose

from gradctl.joint.decompositions.register import decomposes
from gradctl.joint.decompositions.separable import accumulation_type

_aten = torch.ops.aten
_Affine = Tensor | None  # weight or bias, ``[C]``


# torch.onnx (2.13) exports batch norms in training as BatchNormalization of ONNX, which divides by other statistics.
@decomposes(_aten._native_batch_norm_legit_functional.default)
def _batch_norm(
    x: Tensor,
    weight: _Affine,
    bias: _Affine,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the statistics it was computed with, and the running statistics.

    The running variance is an average of unbiased ones (Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 2).
    """
    if not training:
        mean, variance = (each.to(accumulation_type(x)) for each in (running_mean, running_var))
        empty = x.new_zeros((0,))
        return _normalized(x, weight, bias, mean, variance, eps)[0], empty, empty, running_mean, running_var
    found, mean, inverse, variance = _batch_normalized(x, weight, bias, eps)
    count = math.prod(x.shape) // x.shape[1]
    moved_mean = running_mean * (1 - momentum) + (mean * momentum).to(running_mean.dtype)
    moved_var = running_var * (1 - momentum) + (variance * (momentum * count / (count - 1))).to(running_var.dtype)
    return found, mean, inverse, moved_mean, moved_var


@decomposes(_aten._native_batch_norm_legit.no_stats)
def _batch_norm_without_statistics(
    x: Tensor, weight: _Affine, bias: _Affine, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_normalized(x, weight, bias, eps)[:3]


# torch.onnx (2.13) returns the running statistics in place of those of the batch, which are empty.
@decomposes(_aten._native_batch_norm_legit_no_training.default)
def _batch_norm_in_eval_mode(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    with decompose({}):  # otherwise the call below is this one
        output = _aten._native_batch_norm_legit_no_training(x, *others)[0]
    return output, x.new_zeros((0,)), x.new_zeros((0,))


def _batch_normalized(x: Tensor, weight: _Affine, bias: _Affine, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output, mean, 1 / sqrt(variance + eps) and variance of the batch."""
    variance, mean = torch.var_mean(x.to(accumulation_type(x)), [0, *range(2, x.ndim)], correction=0)
    found, inverse = _normalized(x, weight, bias, mean, variance, eps)
    return found, mean, inverse, variance


def _normalized(
    x: Tensor, weight: _Affine, bias: _Affine, mean: Tensor, variance: Tensor, eps: float
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


@decomposes(_aten._weight_norm_interface_backward.default)
def _weight_norm_backward(
    grad_w: Tensor, saved_v: Tensor, saved_g: Tensor, saved_norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of g v / |v| by v and g, the norm over all axes but ``dim``.

    Source: torch/csrc/autograd/FunctionsManual.cpp and aten/src/ATen/native/WeightNorm.cpp.
    """
    others = [axis for axis in range(saved_v.ndim) if axis != dim]
    along = (saved_v * grad_w).sum(others, keepdim=True)
    by_v = saved_g / saved_norms * (grad_w - saved_v * (along / (saved_norms * saved_norms)))
    return by_v, along / saved_norms


# torch.onnx (2.13) ignores ``keepdim`` if no axis is named.
@decomposes(_aten.linalg_vector_norm.default)
def _vector_norm(
    self: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    axes = list(range(self.ndim))
    if not axes or (dim is not None and dim != []):
        return NotImplemented
    return _aten.linalg_vector_norm(self, ord, axes, keepdim, dtype=dtype)


@decomposes(_aten._cdist_forward.default)
def _cdist(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None = None) -> Tensor:
    """Return the distances ``[*, P, R]`` of rows ``[*, P, M]`` from rows ``[*, R, M]``."""
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


@decomposes(_aten._cdist_backward.default)
def _cdist_backward(grad: Tensor, x1: Tensor, x2: Tensor, p: float, cdist: Tensor) -> Tensor:
    """Return the gradient by ``x1``; autograd sums over broadcast axes."""
    return _norm_backward(x1.unsqueeze(-2) - x2.unsqueeze(-3), grad, cdist, p).sum(-2)


@decomposes(_aten._pdist_forward.default)
def _pdist(self: Tensor, p: float = 2) -> Tensor:
    """Return the distances of all pairs i < j of rows ``[N, M]``, in the order of i, then j."""
    first, second = _pairs(self)
    return _norm(first.matmul(self) - second.matmul(self), p)


@decomposes(_aten._pdist_backward.default)
def _pdist_backward(grad: Tensor, self: Tensor, p: float, pdist: Tensor) -> Tensor:
    first, second = _pairs(self)
    difference = first - second
    return difference.t().matmul(_norm_backward(difference.matmul(self), grad, pdist, p))


def _norm(difference: Tensor, p: float) -> Tensor:
    """Return the p-norm over the last axis (aten/src/ATen/native/cpu/DistanceOpsKernel.cpp)."""
    size = difference.abs()
    if p == 0:
        return (size != 0).to(size.dtype).sum(-1)
    if p == 1:
        return size.sum(-1)
    if p == 2:
        return (size * size).sum(-1).sqrt()
    if math.isinf(p):
        return size.amax(-1)
    # Some runtimes compute a power of 0 as exp(p log 0), which is NaN.
    total = torch.where(size == 0, 0, torch.where(size == 0, 1, size) ** p).sum(-1)
    return torch.where(total == 0, 0, torch.where(total == 0, 1, total) ** (1 / p))


def _norm_backward(difference: Tensor, grad: Tensor, norm: Tensor, p: float) -> Tensor:
    """Return the gradient by each difference; 0 at norm 0, as in eager."""
    grad, norm = grad.unsqueeze(-1), norm.unsqueeze(-1)
    if p == 0:
        return torch.zeros_like(difference) * grad
    size, sign = difference.abs(), torch.sign(difference)
    if p == 1:
        return sign * grad
    if math.isinf(p):
        return sign * (size == norm).to(grad.dtype) * grad
    zero = (norm == 0) | (size == 0)
    ratio = torch.where(zero, 1, size) / torch.where(zero, 1, norm)
    return torch.where(zero, 0, sign * grad * (ratio if p == 2 else ratio ** (p - 1)))


def _pairs(rows: Tensor) -> list[Tensor]:
    """Return two matrices ``[N (N - 1) / 2, N]`` that select the first and the second row of each pair."""
    count = rows.shape[0]
    along = torch.arange(count, device=rows.device)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    if not pairs:
        return [rows.new_zeros((0, count))] * 2
    return [torch.stack([along == pair[which] for pair in pairs]).to(rows.dtype) for which in (0, 1)]
