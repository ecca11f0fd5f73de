"""Writes into a part of a tensor, and what is made empty or of zeros before.

Where one element is written twice, the one that comes last in memory stays, as in eager: what is written is then found
while tracing, so sizes and strides have to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten


def _zeros(
    size: Sequence[int],
    *_: Any,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **_kwargs: Any,
) -> Tensor:
    """Return zeros, whatever ``size`` would be filled with: each value is written before it is read."""
    return torch.full(size, 0, dtype=dtype or torch.get_default_dtype(), device=device)


def _as_strided_scatter(
    self: Tensor, src: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Tensor:
    """Return ``self`` with ``src`` at offset + sum of index times stride, in its memory.

    Raises:
        NotImplementedError: see ``_places``.
    """
    places = _places(self, size, stride, storage_offset)
    # The last of two writes to one place is known here.
    last = {each: position for position, each in enumerate(places)}
    target = torch.tensor(list(last), dtype=torch.int64, device=self.device)
    flat, values = self.reshape(-1), src.reshape(-1)
    if len(last) < len(places):
        values = values.index_select(0, torch.tensor(list(last.values()), dtype=torch.int64, device=self.device))
    written: Tensor = _aten.scatter.src(flat, 0, target, values)
    return written.reshape(self.shape)


def _as_strided(self: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tensor:
    """Return what is at offset + sum of index times stride, read by index: places may overlap.

    Raises:
        NotImplementedError: see ``_places``.
    """
    places = torch.tensor(_places(self, size, stride, storage_offset), dtype=torch.int64, device=self.device)
    return self.reshape(-1).index_select(0, places).reshape(size)


def _places(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None) -> list[int]:
    """Return where the elements of a view are in the memory of a tensor, in their order.

    Raises:
        NotImplementedError: the tensor is not contiguous, or the view reads beside it: no graph keeps memory.
    """
    places = [offset or 0]
    for length, step in zip(size, stride, strict=True):
        places = [start + index * step for start in places for index in range(length)]
    if not tensor.is_contiguous() or tensor.storage_offset() or any(each >= tensor.numel() for each in places):
        raise NotImplementedError("aten.as_strided of a tensor that is not contiguous, or of what is beside it")
    return places


def _diagonal_scatter(self: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """Return ``self`` with ``src`` on a diagonal of the matrices over ``dim1`` and ``dim2``."""
    dim1, dim2 = dim1 % self.ndim, dim2 % self.ndim
    rest = [axis for axis in range(self.ndim) if axis not in (dim1, dim2)]
    order = [*rest, dim1, dim2]
    matrices = self.permute(order)
    rows, columns = matrices.shape[-2:]
    along = torch.arange(src.shape[-1], device=self.device)
    places = (along + max(-offset, 0)) * columns + along + max(offset, 0)
    flat = matrices.reshape(*matrices.shape[:-2], rows * columns)
    written: Tensor = _aten.scatter.src(flat, flat.ndim - 1, places.expand(src.shape), src)
    back = sorted(range(self.ndim), key=order.__getitem__)
    return written.reshape(matrices.shape).permute(back)


def _slice_scatter(
    self: Tensor, src: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """Return ``self`` with ``src`` from ``start`` to ``end``, as what is before it, it, and what is after it.

    torch.onnx (2.13) has none of complex numbers. Other steps, and sizes that are free, are left to it.
    """
    size = self.shape[dim]
    if step != 1 or not all(isinstance(each, int) for each in (size, start or 0, end or 0)):
        return NotImplemented
    first, after, _ = slice(start, end).indices(size)
    pieces = [(self, 0, first), (src, 0, src.shape[dim]), (self, max(first, after), size)]
    return torch.cat([each.narrow(dim, low, high - low) for each, low, high in pieces if high > low], dim)


def _put(self: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """Return ``self`` with ``source`` at places counted in the flattened tensor."""
    flat, places, values = self.reshape(-1), index.reshape(-1), source.reshape(-1)
    places = torch.where(places < 0, places + flat.shape[0], places)
    write = _aten.scatter_add if accumulate else _aten.scatter.src
    written: Tensor = write(flat, 0, places, values)
    return written.reshape(self.shape)


def _index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """Return ``self`` with ``alpha`` times each slice of ``source`` added to the slice that ``index`` names."""
    base, dim, places, values = _slices(self, dim, index, source)
    written: Tensor = _aten.scatter_add(base, dim, places, values if alpha == 1 else values * alpha)
    return written.reshape(self.shape)


def _index_reduce(
    self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Return ``self`` with each slice of ``source`` taken together with the slice that ``index`` names."""
    written: Tensor = _aten.scatter_reduce(*_slices(self, dim, index, source), reduce, include_self=include_self)
    return written.reshape(self.shape)


def _slices(self: Tensor, dim: int, index: Tensor, source: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    """Return what a scatter takes for slices of ``source`` at those that ``index`` names; a scalar is a list of one."""
    base = self.reshape(1) if self.ndim == 0 else self
    values = source.reshape(1) if self.ndim == 0 else source
    dim = dim % base.ndim
    places = index.reshape([-1 if axis == dim else 1 for axis in range(base.ndim)]).expand(values.shape)
    return base, dim, places, values


def _repeat_interleave(repeats: Tensor, *, output_size: int | None = None) -> Any:
    """Return each index as often as ``repeats`` says, where it is known how many these are."""
    if not isinstance(output_size, int):
        return NotImplemented
    ends = repeats.cumsum(0)
    at = torch.arange(output_size, device=repeats.device, dtype=ends.dtype)
    return (at.unsqueeze(1) >= ends).to(repeats.dtype).sum(1)


def _scatter_reduce(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """Return the mean of what is scattered to one place as sum by count; other reductions are ONNX's own.

    torch.onnx (2.13) takes the sum for the mean.
    """
    if reduce != "mean":
        return NotImplemented
    base, ones = self, torch.ones_like(self)
    if not include_self:
        base, ones = (_aten.scatter.value(each, dim, index, 0) for each in (base, ones))
    values = src if src.shape == index.shape else src[tuple(slice(size) for size in index.shape)]
    total = _aten.scatter_add(base, dim, index, values)
    return total / _aten.scatter_add(ones, dim, index, torch.ones_like(values)).clamp_min(1)


def _masked_scatter_backward(grad: Tensor, mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the gradient by the source of ``masked_scatter``: its k-th element went to the k-th true of the mask."""
    chosen = mask.expand(grad.shape).reshape(-1)
    places = torch.where(chosen, torch.cumsum(chosen.to(torch.int64), 0) - 1, 0)
    values = torch.where(chosen, grad.reshape(-1), 0)
    source = torch.full(sizes, 0, dtype=grad.dtype, device=grad.device)
    written: Tensor = _aten.scatter_add(source.reshape(-1), 0, places, values)
    return written.reshape(sizes)


def _scatter_add(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Any:
    """Return the sum with what is scattered; ONNX's operator takes no scalar, which is a list of one here."""
    if self.ndim:
        return NotImplemented
    return _aten.scatter_add(self.reshape(1), 0, index.reshape(-1), src.reshape(-1)).reshape(())


def _scatter(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Any:
    """Return ``self`` with ``src`` at the places of ``index``; a scalar as ``_scatter_add`` takes it."""
    if self.ndim:
        return NotImplemented
    return _aten.scatter.src(self.reshape(1), 0, index.reshape(-1), src.reshape(-1)).reshape(())


def _scatter_value(self: Tensor, dim: int, index: Tensor, value: float) -> Any:
    """Return ``self`` with ``value`` at the places of ``index``; a scalar as ``_scatter_add`` takes it."""
    if self.ndim:
        return NotImplemented
    return _aten.scatter.value(self.reshape(1), 0, index.reshape(-1), value).reshape(())


def _unfold_backward(grad_in: Tensor, input_sizes: Sequence[int], dim: int, size: int, step: int) -> Tensor:
    """Return the sum of the gradients of all windows that an element was in."""
    found = torch.full(input_sizes, 0, dtype=grad_in.dtype, device=grad_in.device)
    if found.ndim == 0:
        return grad_in.sum()
    dim = dim % found.ndim
    starts = torch.arange(grad_in.shape[dim], device=grad_in.device) * step
    places = (starts.unsqueeze(1) + torch.arange(size, device=grad_in.device)).reshape(-1)
    windows = grad_in.movedim(-1, dim + 1).flatten(dim, dim + 1)
    # istft has the windows of one row for all.
    windows = windows.expand([-1 if axis == dim else size for axis, size in enumerate(found.shape)])
    along = places.reshape([-1 if axis == dim else 1 for axis in range(found.ndim)])
    total: Tensor = _aten.scatter_add(found, dim, along.expand(windows.shape), windows)
    return total


def _masked_select(self: Tensor, mask: Tensor) -> Tensor:
    """Return the elements where ``mask`` holds, in their order (torch/_refs, as an index)."""
    shape = torch.broadcast_shapes(self.shape, mask.shape)  # type: ignore[no-untyped-call]
    return self.expand(shape)[mask.expand(shape)]


TABLE: dict[Any, Callable[..., Any]] = {
    _aten._efficientzerotensor.default: _zeros,
    _aten.as_strided.default: _as_strided,
    _aten.as_strided_scatter.default: _as_strided_scatter,
    _aten.diagonal_scatter.default: _diagonal_scatter,
    _aten.empty_permuted.default: _zeros,
    _aten.index_add.default: _index_add,
    _aten.index_reduce.default: _index_reduce,
    _aten.masked_scatter_backward.default: _masked_scatter_backward,
    _aten.put.default: _put,
    _aten.repeat_interleave.Tensor: _repeat_interleave,
    _aten.scatter.src: _scatter,
    _aten.scatter.value: _scatter_value,
    _aten.scatter_add.default: _scatter_add,
    _aten.scatter_reduce.two: _scatter_reduce,
    _aten.slice_scatter.default: _slice_scatter,
    _aten.masked_select.default: _masked_select,
    _aten.unfold_backward.default: _unfold_backward,
}
