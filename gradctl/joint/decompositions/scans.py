"""Cumulative operators that ONNX lacks, by doubling: after k steps each element has taken in the 2^k before it.

The steps are as many as the logarithm of the length, which has to be known. Source: Hillis and Steele, Communications
of the ACM 29 (1986) 1170.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten
_Extremes = tuple[Tensor, Tensor]


def _cumprod(self: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the products of the elements up to each."""
    product = self if dtype is None else self.to(dtype)
    for shift in _shifts(self, dim):
        head, earlier, later = _split(product, dim, shift)
        product = torch.cat([head, earlier * later], dim)
    return product


def _logcumsumexp(self: Tensor, dim: int) -> Tensor:
    """Return log sum exp of the elements up to each, without overflow."""
    total = self
    for shift in _shifts(self, dim):
        head, earlier, later = _split(total, dim, shift)
        larger = torch.maximum(earlier, later)
        # Two infinities of one sign have a difference that is no number.
        apart = torch.where(earlier == later, 0, (earlier - later).abs())
        total = torch.cat([head, larger + torch.log1p(torch.exp(-apart))], dim)
    return total


def _cummax(self: Tensor, dim: int) -> _Extremes:
    """Return the largest elements up to each, and where the last of them is; NaN is larger than all."""
    return _extremes(self, dim, lambda earlier, later: later >= earlier)


def _cummin(self: Tensor, dim: int) -> _Extremes:
    """Return the smallest elements up to each, and where the last of them is; NaN is smaller than all."""
    return _extremes(self, dim, lambda earlier, later: later <= earlier)


def _extremes(self: Tensor, dim: int, takes: Callable[[Tensor, Tensor], Tensor]) -> _Extremes:
    if self.ndim == 0:
        return self.clone(), torch.zeros_like(self, dtype=torch.int64)
    shape = [-1 if axis == dim % self.ndim else 1 for axis in range(self.ndim)]
    may_be_nan = self.is_floating_point()
    values, places = self, torch.arange(self.shape[dim], device=self.device).reshape(shape).expand(self.shape)
    for shift in _shifts(self, dim):
        head, earlier, later = _split(values, dim, shift)
        first, before, after = _split(places, dim, shift)
        taken = takes(earlier, later)
        taken = taken | torch.isnan(later) if may_be_nan else taken
        values = torch.cat([head, torch.where(taken, later, earlier)], dim)
        places = torch.cat([first, torch.where(taken, after, before)], dim)
    return values.clone(), places.clone()


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


TABLE: dict[Any, Callable[..., Any]] = {
    _aten.cummax.default: _cummax,
    _aten.cummin.default: _cummin,
    _aten.cumprod.default: _cumprod,
    _aten.logcumsumexp.default: _logcumsumexp,
}
