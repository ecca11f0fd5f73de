"""Reductions, cumulative operators and order statistics.

Cumulative operators double: after k steps each element has taken in the 2^k before it, in as many steps as the
logarithm of the length, which has to be known (Hillis and Steele, Communications of the ACM 29 (1986) 1170).

Order statistics are TopK of ONNX: the first of two equal elements comes first. torch does not state which of them it
selects, and so which of them has the gradient: here it is the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradctl.joint.decompositions.register import Ints, decomposes

_aten = torch.ops.aten
_Extremes = tuple[Tensor, Tensor]  # values and indices
_MOST_TERMS = 512  # of a sum in one operator
_PART = 128  # of an axis


# The gradient of the bias of a linear layer: as a product, onnxruntime 1.32 takes 0.6 to 0.9 of the time of its
# ReduceSum (64 to 1024 rows, 128 to 1024 columns, 2 threads).
@decomposes(_aten.sum.dim_IntList)
def _sum(x: Tensor, dim: Ints | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """Return the sum of the rows of a matrix as a product with a row of ones; other sums are left to torch."""
    is_float = x.dtype in {torch.float32, torch.float64} and dtype in {None, x.dtype}
    if x.ndim != 2 or not is_float or dim is None or list(dim) not in ([0], [-2]):
        return _in_stages(x, dim, keepdim, dtype=dtype, operator=torch.sum)
    row = torch.ones((1, x.shape[0]), dtype=x.dtype, device=x.device) @ x
    return row if keepdim else row.reshape(x.shape[1])


# onnxruntime 1.32 adds the terms of a sum one after another, those of the last axis in 8 parts: a mean of 262144 values
# near one is off by 1e-5, in these stages by 3e-7. If the axes are not adjacent, stages are faster, too.
@decomposes(_aten.sum.default, operator=torch.sum)
@decomposes(_aten.mean.default, _aten.mean.dim, operator=torch.mean)
def _in_stages(
    x: Tensor, dim: Ints | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, operator: Any
) -> Any:
    """Return a sum or a mean of many terms axis by axis, the last one first, and a long axis in parts."""
    axes = sorted(axis % x.ndim for axis in dim or range(x.ndim))
    sizes = [x.shape[axis] for axis in axes]
    is_small = all(isinstance(size, int) for size in sizes) and math.prod(sizes) <= _MOST_TERMS
    if not x.is_floating_point() or dtype not in {None, x.dtype} or is_small:
        return NotImplemented
    *others, last = axes
    size, part = sizes[-1], 1
    if isinstance(size, int) and size > _PART:
        part = next(each for each in range(_PART, 0, -1) if size % each == 0)
    if part > 1:
        split = x.reshape(*x.shape[:last], size // part, part, *x.shape[last + 1 :])
        found = operator(operator(split, last + 1), axes)
    elif others:
        found = operator(operator(x, last), others)
    else:
        return NotImplemented
    for axis in axes if keepdim else []:
        found = found.unsqueeze(axis)
    return found


# torch.onnx (2.13) rejects an extreme over all axes if none is named; ONNX does not reduce a scalar.
@decomposes(_aten.amax.default, operator=_aten.amax)
@decomposes(_aten.amin.default, operator=_aten.amin)
def _extreme(self: Tensor, dim: Ints = (), keepdim: bool = False, *, operator: Any) -> Any:
    if not self.ndim:
        return self.clone()
    return NotImplemented if len(dim) else operator(self, list(range(self.ndim)), keepdim)


# ONNX has the maximum of numbers only.
@decomposes(_aten.max.dim)
def _max_dim(self: Tensor, dim: int, keepdim: bool = False) -> Any:
    if self.dtype != torch.bool:
        return NotImplemented
    values, indices = _aten.max.dim(self.to(torch.int32), dim, keepdim)
    return values != 0, indices


@decomposes(_aten.logsumexp.default)
def _logsumexp(self: Tensor, dim: Ints, keepdim: bool = False) -> Tensor:
    """Return log sum exp without overflow, as ``torch._refs`` does; ONNX does not reduce a scalar."""
    if not self.ndim:
        return self.clone()
    axes = list(dim) or list(range(self.ndim))
    largest = self.amax(axes, keepdim=True)
    largest = torch.where(largest.abs() == float("inf"), 0, largest)
    total = (self - largest).exp().sum(axes, keepdim=True).log() + largest
    return total if keepdim else total.squeeze(axes)


# torch decomposes it into a Where, which onnxruntime (1.32) computes slowly.
@decomposes(_aten._safe_softmax.default)
def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """Return the softmax, and 0 for rows of -inf alone (torch/_decomp/decompositions.py, safe_softmax).

    Clamped above -inf, such a row is not NaN but uniform; a product with the mask makes it 0.
    """
    x = x if dtype is None else x.to(dtype)
    if x.dtype not in {torch.float32, torch.float64} or x.ndim == 0:
        return NotImplemented
    is_masked = torch.amax(x, dim, keepdim=True) == -torch.inf
    return torch.softmax(x.clamp(min=torch.finfo(x.dtype).min), dim) * is_masked.logical_not().to(x.dtype)


@decomposes(_aten.cumprod.default)
def _cumprod(self: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    return _cumulated(self if dtype is None else self.to(dtype), dim, torch.mul)


@decomposes(_aten.logcumsumexp.default)
def _logcumsumexp(self: Tensor, dim: int) -> Tensor:
    return _cumulated(self, dim, _log_add)


def _cumulated(found: Tensor, dim: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    for shift in _shifts(found, dim):
        head, earlier, later = _split(found, dim, shift)
        found = torch.cat([head, combine(earlier, later)], dim)
    return found


def _log_add(x: Tensor, y: Tensor) -> Tensor:
    """Return log(e^x + e^y)."""
    # The difference of two infinities of one sign is NaN.
    apart = torch.where(x == y, 0, (x - y).abs())
    return torch.maximum(x, y) + torch.log1p(torch.exp(-apart))


@decomposes(_aten.cummax.default, is_taken=torch.ge)
@decomposes(_aten.cummin.default, is_taken=torch.le)
def _cumulative_extreme(self: Tensor, dim: int, *, is_taken: Callable[[Tensor, Tensor], Tensor]) -> _Extremes:
    """Return the extremes up to each element, and the last index of each; NaN is more extreme than any number."""
    if self.ndim == 0:
        return _of_scalar(self)
    shape = [-1 if axis == dim % self.ndim else 1 for axis in range(self.ndim)]
    values, indices = self, torch.arange(self.shape[dim], device=self.device).reshape(shape).expand(self.shape)
    for shift in _shifts(self, dim):
        head, earlier, later = _split(values, dim, shift)
        first, before, after = _split(indices, dim, shift)
        taken = is_taken(later, earlier)
        taken = taken | torch.isnan(later) if self.is_floating_point() else taken
        values = torch.cat([head, torch.where(taken, later, earlier)], dim)
        indices = torch.cat([first, torch.where(taken, after, before)], dim)
    return values.clone(), indices.clone()


def _shifts(tensor: Tensor, dim: int) -> Iterator[int]:
    """Yield 1, 2, 4 … below the length of an axis."""
    shift, length = 1, tensor.shape[dim] if tensor.ndim else 1
    while shift < length:
        yield shift
        shift *= 2


def _split(tensor: Tensor, dim: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first ``shift`` elements; all but the last; all but the first."""
    rest = tensor.shape[dim] - shift
    return tensor.narrow(dim, 0, shift), tensor.narrow(dim, 0, rest), tensor.narrow(dim, shift, rest)


@decomposes(_aten.sort.stable)
def _sort_stable(self: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> Any:
    return _aten.sort(self, dim, descending)  # which is stable in ONNX


# The input of ONNX's TopK is no scalar.
@decomposes(_aten.topk.default)
def _topk(self: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if self.ndim:
        return NotImplemented
    values, indices = _aten.topk(self.reshape(1), k, 0, largest, sorted)
    return values.reshape(()), indices.reshape(())


@decomposes(_aten.kthvalue.default)
def _kthvalue(self: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> _Extremes:
    if self.ndim == 0:
        return _of_scalar(self)
    values, indices = (each.narrow(dim, k - 1, 1) for each in _aten.topk(self, k, dim, False, True))
    return _squeezed(values, indices, dim, keepdim)


@decomposes(_aten.median.dim)
def _median_dim(self: Tensor, dim: int = -1, keepdim: bool = False) -> _Extremes:
    """Return the lower median and its index; the first NaN, if there is one."""
    if self.ndim == 0:
        return _of_scalar(self)
    values, indices = _kthvalue(_without_nan(self), (self.shape[dim] + 1) // 2, dim, keepdim)
    if not self.is_floating_point():
        return values, indices
    is_nan = torch.isnan(self).to(torch.int64)
    holds = is_nan.amax(dim, keepdim=keepdim) > 0
    return torch.where(holds, torch.nan, values), torch.where(holds, is_nan.argmax(dim, keepdim=keepdim), indices)


@decomposes(_aten.nanmedian.dim)
def _nanmedian_dim(self: Tensor, dim: int = -1, keepdim: bool = False) -> _Extremes:
    if self.ndim == 0 or not self.is_floating_point():
        return _median_dim(self, dim, keepdim)
    values, indices = _aten.sort(_without_nan(self), dim)
    count = self.shape[dim] - torch.isnan(self).to(torch.int64).sum(dim, keepdim=True)
    middle = torch.div((count - 1).clamp_min(0), 2, rounding_mode="floor")
    medians = torch.where(count == 0, torch.nan, values.gather(dim, middle))
    return _squeezed(medians, indices.gather(dim, middle), dim, keepdim)


@decomposes(_aten.median.default, median_dim=_median_dim)
@decomposes(_aten.nanmedian.default, median_dim=_nanmedian_dim)
def _median(self: Tensor, *, median_dim: Callable[[Tensor, int], _Extremes]) -> Tensor:
    return median_dim(self.reshape(-1), 0)[0]


def _of_scalar(x: Tensor) -> _Extremes:
    return x.clone(), torch.zeros_like(x, dtype=torch.int64)


def _squeezed(values: Tensor, indices: Tensor, dim: int, keepdim: bool) -> _Extremes:
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


def _without_nan(x: Tensor) -> Tensor:
    """Return x with infinity, which sorts last, in place of NaN, which TopK does not order."""
    return torch.where(torch.isnan(x), torch.inf, x) if x.is_floating_point() else x
