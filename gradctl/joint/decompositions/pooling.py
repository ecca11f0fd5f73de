"""Pooling and its gradients.

Averages are linear maps, a matrix an axis. A maximum hands its gradient to the element whose index it kept; windows may
overlap, so gradients of one element add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradctl.joint.decompositions.separable import apply, apply_transposed, positions, working_type

__all__ = ["TABLE"]

_aten = torch.ops.aten


def _each(given: Sequence[int], dims: int) -> list[int]:
    """Return an option for each axis; one is for all."""
    return list(given) * (dims // len(given))


def _window_matrix(
    x: Tensor, size: int, out: int, kernel: int, stride: int, padding: int, count_include_pad: bool, divide: bool
) -> Tensor:
    """Return the matrix of an average over windows, as ``aten/src/ATen/native/cpu/AvgPoolKernel.cpp`` counts."""
    start = positions(out, x) * stride - padding
    end = (start + kernel).clamp(max=size + padding)
    at = positions(size, x)
    inside = (at >= start[:, None]) & (at < end[:, None])
    mask = inside.to(working_type(x))
    if not divide:
        return mask
    count = end - start if count_include_pad else end.clamp(max=size) - start.clamp(min=0)
    return mask / count.to(mask.dtype)[:, None]


def _pooled_size(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Return the number of windows, as ``aten/src/ATen/native/Pool.h`` has it: none starts in the right padding."""
    out = (size + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def _average(dims: int) -> Callable[..., Any]:
    def avg_pool(
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        """Return ``aten.avg_pool2d`` or ``3d`` where AveragePool of ONNX counts otherwise, or onnxruntime does."""
        if not ceil_mode and divisor_override is None and not any(padding):
            return NotImplemented
        kernel, pads = _each(kernel_size, dims), _each(padding, dims)
        steps = _each(stride or kernel_size, dims)
        matrices = []
        for size, k, s, p in zip(x.shape[-dims:], kernel, steps, pads, strict=True):
            out = _pooled_size(size, k, s, p, ceil_mode)
            matrices.append(_window_matrix(x, size, out, k, s, p, count_include_pad, divisor_override is None))
        return apply(x, matrices) / (divisor_override or 1)

    return avg_pool


def _average_backward(dims: int) -> Callable[..., Any]:
    def avg_pool_backward(
        dy: Tensor,
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        """Return the gradient of ``aten.avg_pool2d`` or ``3d``."""
        kernel, pads = _each(kernel_size, dims), _each(padding, dims)
        steps = _each(stride or kernel_size, dims)
        matrices = [
            _window_matrix(x, size, out, k, s, p, count_include_pad, divisor_override is None)
            for size, out, k, s, p in zip(x.shape[-dims:], dy.shape[-dims:], kernel, steps, pads, strict=True)
        ]
        return apply_transposed(dy, matrices) / (divisor_override or 1)

    return avg_pool_backward


def _adaptive_matrix(x: Tensor, size: int, out: int) -> Tensor:
    """Return the matrix of averages from floor(o size / out) to ceil((o + 1) size / out), the end not taken."""
    row, at = positions(out, x)[:, None], positions(size, x)
    inside = ((at + 1) * out > row * size) & (at * out < (row + 1) * size)
    mask = inside.to(working_type(x))
    return mask / mask.sum(1, keepdim=True)


def _adaptive_average(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """Return ``aten._adaptive_avg_pool2d`` or ``3d``."""
    dims = len(output_size)
    sizes = x.shape[-dims:]
    if all(size % out == 0 for size, out in zip(sizes, output_size, strict=True)):
        kernel = [size // out for size, out in zip(sizes, output_size, strict=True)]
        found: Tensor = (_aten.avg_pool2d if dims == 2 else _aten.avg_pool3d)(x, kernel, kernel)
        return found
    return apply(x, [_adaptive_matrix(x, size, out) for size, out in zip(sizes, output_size, strict=True)])


def _adaptive_average_backward(dims: int) -> Callable[..., Any]:
    def adaptive_avg_pool_backward(dy: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of ``aten._adaptive_avg_pool2d`` or ``3d``."""
        sizes = zip(x.shape[-dims:], dy.shape[-dims:], strict=True)
        return apply_transposed(dy, [_adaptive_matrix(x, size, out) for size, out in sizes])

    return adaptive_avg_pool_backward


def _to_kept(dims: int, dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Return zeros like ``x``, each ``dy`` added at its index into the flattened spatial axes."""
    lead = x.ndim - dims
    return torch.zeros_like(x).flatten(lead).scatter_add(-1, indices.flatten(lead), dy.flatten(lead)).reshape(x.shape)


def _maximum_backward(dims: int) -> Callable[..., Any]:
    def max_pool_with_indices_backward(
        dy: Tensor,
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
        indices: Tensor,
    ) -> Tensor:
        """Return the gradient of ``aten.max_pool2d_with_indices`` or ``3d``."""
        return _to_kept(dims, dy, x, indices)

    return max_pool_with_indices_backward


def _adaptive_maximum(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return ``aten.adaptive_max_pool2d`` or ``3d``: maxima, and the first index of each.

    Windows that are not all of one size are read with their last row and column repeated: a repeated element comes
    after itself, so that it is never the first.
    """
    dims = len(output_size)
    lead, sizes = x.ndim - dims, x.shape[-dims:]
    if all(size % out == 0 for size, out in zip(sizes, output_size, strict=True)):
        kernel = [size // out for size, out in zip(sizes, output_size, strict=True)]
        pooled = _aten.max_pool2d_with_indices if dims == 2 else _aten.max_pool3d_with_indices
        maxima, kept = pooled(x, kernel, kernel)
        return maxima, kept
    index = torch.zeros((1,) * dims * 2, dtype=torch.int64, device=x.device)
    for axis, (size, out) in enumerate(zip(sizes, output_size, strict=True)):
        row = positions(out, x)
        start = torch.div(row * size, out, rounding_mode="floor")
        last = torch.div((row + 1) * size + (out - 1), out, rounding_mode="floor") - 1
        read = torch.minimum(start[:, None] + positions(size // out + 2, x), last[:, None])
        shape = [1] * (2 * dims)
        shape[axis], shape[axis + dims] = read.shape
        index = index * size + read.reshape(shape)
    index = index.flatten(dims)
    windows = x.flatten(lead).index_select(-1, index.flatten()).reshape(*x.shape[:lead], *index.shape)
    first = windows.argmax(-1, keepdim=True)
    return windows.gather(-1, first).squeeze(-1), index.expand(windows.shape).gather(-1, first).squeeze(-1)


def _adaptive_maximum_backward(dims: int) -> Callable[..., Any]:
    def adaptive_max_pool_backward(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        """Return the gradient of ``aten.adaptive_max_pool2d`` or ``3d``."""
        return _to_kept(dims, dy, x, indices)

    return adaptive_max_pool_backward


TABLE: dict[Any, Callable[..., Any]] = {
    _aten.avg_pool2d.default: _average(2),
    _aten.avg_pool3d.default: _average(3),
    _aten.avg_pool2d_backward.default: _average_backward(2),
    _aten.avg_pool3d_backward.default: _average_backward(3),
    _aten._adaptive_avg_pool2d.default: _adaptive_average,
    _aten._adaptive_avg_pool3d.default: _adaptive_average,
    _aten._adaptive_avg_pool2d_backward.default: _adaptive_average_backward(2),
    _aten._adaptive_avg_pool3d_backward.default: _adaptive_average_backward(3),
    _aten.max_pool2d_with_indices_backward.default: _maximum_backward(2),
    _aten.max_pool3d_with_indices_backward.default: _maximum_backward(3),
    _aten.adaptive_max_pool2d.default: _adaptive_maximum,
    _aten.adaptive_max_pool3d.default: _adaptive_maximum,
    _aten.adaptive_max_pool2d_backward.default: _adaptive_maximum_backward(2),
    _aten.adaptive_max_pool3d_backward.default: _adaptive_maximum_backward(3),
    _aten.fractional_max_pool2d_backward.default: lambda dy, x, kernel_size, output_size, indices: _to_kept(
        2, dy, x, indices
    ),
    _aten.fractional_max_pool3d_backward.default: lambda dy, x, kernel_size, output_size, indices: _to_kept(
        3, dy, x, indices
    ),
}
