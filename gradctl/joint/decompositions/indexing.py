"""Views, slices, and writes to parts of a tensor.

If two writes go to one element, the last one in memory order stays, as in eager. The last one is found while tracing,
so sizes and strides must be known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradctl.joint.decompositions.register import Ints, decomposes

_aten = torch.ops.aten


# A gradient of torch's kernel may be laid out as channels_last, and ours of the same operator is contiguous: a view of
# one needs a copy of the other. ONNX has no layouts, so that the copy costs nothing there.
@decomposes(_aten.view.default, _aten._unsafe_view.default)
def _view(x: Tensor, size: Ints) -> Any:
    if x.is_contiguous():
        return NotImplemented
    return _aten.clone(x, memory_format=torch.contiguous_format).view(size)


@decomposes(torch.ops.prims.view_of.default)
def _view_of(x: Tensor) -> Tensor:
    return x.clone()


# The body of a Scan may write to the slice.
@decomposes(_aten.slice_copy.Tensor)
def _slice_copy(x: Tensor, *place: Any, **named: Any) -> Any:
    return _aten.slice.Tensor(x, *place, **named).clone()


# torch.onnx (2.13) exports the source in its own shape.
@decomposes(_aten.copy.default)
def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Return ``source`` in the shape and dtype of ``x`` (torch/_decomp/decompositions.py, copy)."""
    return source.to(x.dtype).expand(x.shape)


# torch decomposes a squeeze of one axis into this one; ONNX squeezes no scalar.
@decomposes(_aten.squeeze.dims)
def _squeeze_dims(self: Tensor, dim: Ints) -> Tensor:
    if not self.ndim:
        return self.clone()
    axes = {each % self.ndim for each in dim}
    return self.reshape([size for axis, size in enumerate(self.shape) if axis not in axes or size != 1])


@decomposes(_aten._efficientzerotensor.default, _aten.empty_permuted.default)
def _zeros(
    size: Ints, *_: Any, dtype: torch.dtype | None = None, device: torch.device | None = None, **_kwargs: Any
) -> Tensor:
    """Return zeros, also for an empty tensor: each value is written before it is read."""
    return torch.full(size, 0, dtype=dtype or torch.get_default_dtype(), device=device)


# torch.onnx (2.13) reads the elements of a non-contiguous tensor in their logical order, not that of the memory.
@decomposes(_aten.as_strided.default)
def _as_strided(self: Tensor, size: Ints, stride: Ints, storage_offset: int | None = None) -> Tensor:
    """Return the elements at offset + sum of index times stride, selected by index: they may overlap."""
    places = torch.tensor(_places(self, size, stride, storage_offset), dtype=torch.int64, device=self.device)
    return self.reshape(-1).index_select(0, places).reshape(size)


@decomposes(_aten.as_strided_scatter.default)
def _as_strided_scatter(
    self: Tensor, src: Tensor, size: Ints, stride: Ints, storage_offset: int | None = None
) -> Tensor:
    """Return ``self`` with ``src`` at offset + sum of index times stride."""
    places = _places(self, size, stride, storage_offset)
    last = {each: position for position, each in enumerate(places)}  # of two writes to one element
    target, kept = (torch.tensor(list(each), dtype=torch.int64, device=self.device) for each in (last, last.values()))
    values = src.reshape(-1).index_select(0, kept) if len(last) < len(places) else src.reshape(-1)
    return _written(_aten.scatter.src, self, target, values)


def _places(tensor: Tensor, size: Ints, stride: Ints, offset: int | None) -> list[int]:
    """Return the positions of the elements of a view in the memory of a tensor.

    Raises:
        NotImplementedError: the tensor is not contiguous, or the view reads beside it: a graph has no memory layout.
    """
    places = [offset or 0]
    for length, step in zip(size, stride, strict=True):
        places = [start + index * step for start in places for index in range(length)]
    if not tensor.is_contiguous() or tensor.storage_offset() or any(each >= tensor.numel() for each in places):
        raise NotImplementedError(
            "aten.as_strided of a tensor that is not contiguous, or that reads other elements of its memory"
        )
    return places


def _written(operator: Any, tensor: Tensor, index: Tensor, values: Any) -> Tensor:
    """Return the result of a scatter to positions in the flattened tensor."""
    found: Tensor = operator(tensor.reshape(-1), 0, index.reshape(-1), values)
    return found.reshape(tensor.shape)


@decomposes(_aten.diagonal_scatter.default)
def _diagonal_scatter(self: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """Return ``self`` with ``src`` on a diagonal of the matrices over ``dim1`` and ``dim2``."""
    dim1, dim2 = dim1 % self.ndim, dim2 % self.ndim
    matrices = self.movedim((dim1, dim2), (-2, -1))
    rows, columns = matrices.shape[-2:]
    along = torch.arange(src.shape[-1], device=self.device)
    places = (along + max(-offset, 0)) * columns + along + max(offset, 0)
    flat = matrices.reshape(*matrices.shape[:-2], rows * columns)
    written: Tensor = _aten.scatter.src(flat, flat.ndim - 1, places.expand(src.shape), src)
    return written.reshape(matrices.shape).movedim((-2, -1), (dim1, dim2))


# torch.onnx (2.13) has no slice_scatter of complex numbers. Other steps, and symbolic sizes, are left to it.
@decomposes(_aten.slice_scatter.default)
def _slice_scatter(
    self: Tensor, src: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """Return the concatenation of the elements before ``start``, ``src``, and the elements from ``end``."""
    size = self.shape[dim]
    if step != 1 or not all(isinstance(each, int) for each in (size, start or 0, end or 0)):
        return NotImplemented
    first, after, _ = slice(start, end).indices(size)
    pieces = [(self, 0, first), (src, 0, src.shape[dim]), (self, max(first, after), size)]
    return torch.cat([each.narrow(dim, low, high - low) for each, low, high in pieces if high > low], dim)


@decomposes(_aten.put.default)
def _put(self: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    places = torch.where(index < 0, index + self.numel(), index)
    return _written(_aten.scatter_add if accumulate else _aten.scatter.src, self, places, source.reshape(-1))


# With torch's own decomposition, index_add to a scalar is wrong in torch.onnx (2.13).
@decomposes(_aten.index_add.default)
def _index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    base, dim, places, values = _slices(self, dim, index, source)
    written: Tensor = _aten.scatter_add(base, dim, places, values if alpha == 1 else values * alpha)
    return written.reshape(self.shape)


@decomposes(_aten.index_reduce.default)
def _index_reduce(
    self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    written: Tensor = _aten.scatter_reduce(*_slices(self, dim, index, source), reduce, include_self=include_self)
    return written.reshape(self.shape)


def _slices(self: Tensor, dim: int, index: Tensor, source: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    """Return the arguments of a scatter of slices of ``source`` to those of ``self`` by index; a scalar is a list."""
    base, values = (each.reshape(1) if self.ndim == 0 else each for each in (self, source))
    dim = dim % base.ndim
    return base, dim, _along(index, base.ndim, dim).expand(values.shape), values


def _along(values: Tensor, ndim: int, dim: int) -> Tensor:
    """Return a list as a tensor with ``ndim`` axes, along one of them."""
    return values.reshape([-1 if axis == dim else 1 for axis in range(ndim)])


# ONNX's scatters take no scalar: it is a list of one element here.
@decomposes(_aten.scatter_add.default, operator=_aten.scatter_add)
@decomposes(_aten.scatter.src, operator=_aten.scatter.src)
@decomposes(_aten.scatter.value, operator=_aten.scatter.value)
def _scatter(self: Tensor, dim: int, index: Tensor, values: Any, *, operator: Any) -> Any:
    if self.ndim:
        return NotImplemented
    return _written(operator, self, index, values.reshape(-1) if isinstance(values, Tensor) else values)


# torch.onnx (2.13) exports the sum in place of the mean; other reductions are ONNX's own.
@decomposes(_aten.scatter_reduce.two)
def _scatter_reduce(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """Return the mean of the values scattered to one element, as sum by count."""
    if reduce != "mean":
        return NotImplemented
    base, ones = self, torch.ones_like(self)
    if not include_self:
        base, ones = (_aten.scatter.value(each, dim, index, 0) for each in (base, ones))
    values = src if src.shape == index.shape else src[tuple(slice(size) for size in index.shape)]
    total = _aten.scatter_add(base, dim, index, values)
    return total / _aten.scatter_add(ones, dim, index, torch.ones_like(values)).clamp_min(1)


@decomposes(_aten.repeat_interleave.Tensor)
def _repeat_interleave(repeats: Tensor, *, output_size: int | None = None) -> Any:
    """Return each index as often as its number in ``repeats``, if the total is known."""
    if not isinstance(output_size, int):
        return NotImplemented
    ends = repeats.cumsum(0)
    at = torch.arange(output_size, device=repeats.device, dtype=ends.dtype)
    return (at.unsqueeze(1) >= ends).to(repeats.dtype).sum(1)


@decomposes(_aten.masked_select.default)
def _masked_select(self: Tensor, mask: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(self.shape, mask.shape)  # type: ignore[no-untyped-call]
    return self.expand(shape)[mask.expand(shape)]


@decomposes(_aten.masked_scatter_backward.default)
def _masked_scatter_backward(grad: Tensor, mask: Tensor, sizes: Ints) -> Tensor:
    """Return the gradient by the source of ``masked_scatter``: its k-th element went to the k-th true of the mask."""
    chosen = mask.expand(grad.shape).reshape(-1)
    places = torch.where(chosen, torch.cumsum(chosen.to(torch.int64), 0) - 1, 0)
    source = torch.full(sizes, 0, dtype=grad.dtype, device=grad.device)
    return _written(_aten.scatter_add, source, places, torch.where(chosen, grad.reshape(-1), 0))


@decomposes(_aten.unfold_backward.default)
def _unfold_backward(grad_in: Tensor, input_sizes: Ints, dim: int, size: int, step: int) -> Any:
    """Return for each element the sum of the gradients of the windows that contain it."""
    found = torch.full(input_sizes, 0, dtype=grad_in.dtype, device=grad_in.device)
    if found.ndim == 0:
        return grad_in.sum()
    dim = dim % found.ndim
    starts = torch.arange(grad_in.shape[dim], device=grad_in.device) * step
    places = (starts.unsqueeze(1) + torch.arange(size, device=grad_in.device)).reshape(-1)
    windows = grad_in.movedim(-1, dim + 1).flatten(dim, dim + 1)
    # istft passes the windows of one row for all.
    windows = windows.expand([-1 if axis == dim else size for axis, size in enumerate(found.shape)])
    return _aten.scatter_add(found, dim, _along(places, found.ndim, dim).expand(windows.shape), windows)
