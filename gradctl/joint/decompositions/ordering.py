"""What a tensor is in order: sorted, its median and other order statistics, by TopK of ONNX.

Of two that are equal the first comes first. Which of them torch's order statistics take is not stated, and so which of
them gets the gradient: it is the first here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten
_Ordered = tuple[Tensor, Tensor]


def _sort_stable(self: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> _Ordered:
    """Return the sort, which is stable."""
    found: _Ordered = _aten.sort(self, dim, descending)
    return found


def _topk(self: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """Return a scalar as the largest of its own; ONNX takes a list."""
    if self.ndim:
        return NotImplemented
    values, places = _aten.topk(self.reshape(1), k, 0, largest, sorted)
    return values.reshape(()), places.reshape(())


def _kthvalue(self: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> _Ordered:
    """Return the k-th of the smallest elements, and where it is."""
    if self.ndim == 0:
        return self.clone(), torch.zeros_like(self, dtype=torch.int64)
    values, places = _aten.topk(self, k, dim, False, True)
    values, places = (each.narrow(dim, k - 1, 1) for each in (values, places))
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


def _median_dim(self: Tensor, dim: int = -1, keepdim: bool = False) -> _Ordered:
    """Return the lower median, and where it is; of what holds NaN, the first of these."""
    if self.ndim == 0:
        return self.clone(), torch.zeros_like(self, dtype=torch.int64)
    values, places = _kthvalue(_without_nan(self), (self.shape[dim] + 1) // 2, dim, keepdim)
    if not self.is_floating_point():
        return values, places
    is_nan = torch.isnan(self).to(torch.int64)
    holds = is_nan.amax(dim, keepdim=keepdim) > 0
    return torch.where(holds, torch.nan, values), torch.where(holds, is_nan.argmax(dim, keepdim=keepdim), places)


def _nanmedian_dim(self: Tensor, dim: int = -1, keepdim: bool = False) -> _Ordered:
    """Return the lower median of what is no NaN, and where it is."""
    if self.ndim == 0 or not self.is_floating_point():
        return _median_dim(self, dim, keepdim)
    values, places = _aten.sort(_without_nan(self), dim)
    count = self.shape[dim] - torch.isnan(self).to(torch.int64).sum(dim, keepdim=True)
    middle = torch.div((count - 1).clamp_min(0), 2, rounding_mode="floor")
    found = torch.where(count == 0, torch.nan, values.gather(dim, middle)), places.gather(dim, middle)
    return found if keepdim else (found[0].squeeze(dim), found[1].squeeze(dim))


def _median(self: Tensor) -> Tensor:
    return _median_dim(self.reshape(-1), 0)[0]


def _nanmedian(self: Tensor) -> Tensor:
    return _nanmedian_dim(self.reshape(-1), 0)[0]


def _without_nan(x: Tensor) -> Tensor:
    """Return x with infinity, which comes last, in place of NaN, for which TopK has no place."""
    return torch.where(torch.isnan(x), torch.inf, x) if x.is_floating_point() else x


TABLE: dict[Any, Callable[..., Any]] = {
    _aten.kthvalue.default: _kthvalue,
    _aten.median.default: _median,
    _aten.median.dim: _median_dim,
    _aten.nanmedian.default: _nanmedian,
    _aten.nanmedian.dim: _nanmedian_dim,
    _aten.sort.stable: _sort_stable,
    _aten.topk.default: _topk,
}
