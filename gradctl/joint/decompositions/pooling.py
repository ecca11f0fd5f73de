"""Pooling and its gradients.

Averages are linear maps, a matrix for each axis. The gradient of a maximum goes to the element whose index was kept;
windows may overlap, so the gradients of one element add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradctl.joint.decompositions.register import Ints, decomposes
from gradctl.joint.decompositions.separable import accumulation_type, apply, apply_transposed, positions

_aten = torch.ops.aten


# AveragePool of ONNX, or onnxruntime, counts padding, ceil_mode and divisors otherwise.
@decomposes(_aten.avg_pool2d.default, dims=2)
@decomposes(_aten.avg_pool3d.default, dims=3)
def _avg_pool(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = (),
    padding: Ints = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dims: int,
) -> Any:
    if not ceil_mode and divisor_override is None and not any(padding):
        return NotImplemented
    axes = _axes(x.shape[-dims:], kernel_size, stride or kernel_size, padding)
    outputs = [_pooled_size(axis, ceil_mode) for axis in axes]
    return apply(x, _windows(x, axes, outputs, count_include_pad, divisor_override)) / (divisor_override or 1)


@decomposes(_aten.avg_pool2d_backward.default, dims=2)
@decomposes(_aten.avg_pool3d_backward.default, dims=3)
def _avg_pool_backward(
    dy: Tensor,
    x: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    *,
    dims: int,
) -> Tensor:
    axes = _axes(x.shape[-dims:], kernel_size, stride or kernel_size, padding)
    matrices = _windows(x, axes, dy.shape[-dims:], count_include_pad, divisor_override)
    return apply_transposed(dy, matrices) / (divisor_override or 1)


def _axes(sizes: Ints, *options: Ints) -> list[Ints]:
    """Return size, kernel, stride and padding of each axis; an option of one number is for all axes."""
    each = (list(option) * (len(sizes) // len(option)) for option in options)
    return list(zip(sizes, *each, strict=True))


def _pooled_size(axis: Ints, ceil_mode: bool) -> int:
    """Return the number of windows, none of which starts in the right padding (aten/src/ATen/native/Pool.h)."""
    size, kernel, stride, padding = axis
    out = (size + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def _windows(
    x: Tensor, axes: Sequence[Ints], outputs: Ints, count_include_pad: bool, divisor_override: int | None
) -> list[Tensor]:
    """Return the matrices of averages over windows, or of sums (aten/src/ATen/native/cpu/AvgPoolKernel.cpp)."""
    matrices = []
    for (size, kernel, stride, padding), out in zip(axes, outputs, strict=True):
        start = positions(out, x) * stride - padding
        end = (start + kernel).clamp(max=size + padding)
        at = positions(size, x)
        matrix = ((at >= start[:, None]) & (at < end[:, None])).to(accumulation_type(x))
        if divisor_override is None:
            count = end - start if count_include_pad else end.clamp(max=size) - start.clamp(min=0)
            matrix = matrix / count.to(matrix.dtype)[:, None]
        matrices.append(matrix)
    return matrices


@decomposes(_aten._adaptive_avg_pool2d.default, pool=_aten.avg_pool2d)
@decomposes(_aten._adaptive_avg_pool3d.default, pool=_aten.avg_pool3d)
def _adaptive_avg_pool(x: Tensor, output_size: Ints, *, pool: Any) -> Any:
    kernel = _divided(x, output_size)
    return pool(x, kernel, kernel) if kernel else apply(x, _adaptive_windows(x, output_size))


@decomposes(_aten._adaptive_avg_pool2d_backward.default, dims=2)
@decomposes(_aten._adaptive_avg_pool3d_backward.default, dims=3)
def _adaptive_avg_pool_backward(dy: Tensor, x: Tensor, *, dims: int) -> Tensor:
    return apply_transposed(dy, _adaptive_windows(x, dy.shape[-dims:]))


def _divided(x: Tensor, output_size: Ints) -> list[int] | None:
    """Return the sizes of windows if they are all of one size."""
    pairs = list(zip(x.shape[-len(output_size) :], output_size, strict=True))
    return [size // out for size, out in pairs] if all(size % out == 0 for size, out in pairs) else None


def _adaptive_windows(x: Tensor, output_size: Ints) -> list[Tensor]:
    """Return the matrices of averages from floor(o size / out) to ceil((o + 1) size / out), the end excluded."""
    matrices = []
    for size, out in zip(x.shape[-len(output_size) :], output_size, strict=True):
        row, at = positions(out, x)[:, None], positions(size, x)
        inside = ((at + 1) * out > row * size) & (at * out < (row + 1) * size)
        mask = inside.to(accumulation_type(x))
        matrices.append(mask / mask.sum(1, keepdim=True))
    return matrices


@decomposes(_aten.adaptive_max_pool2d.default, pool=_aten.max_pool2d_with_indices)
@decomposes(_aten.adaptive_max_pool3d.default, pool=_aten.max_pool3d_with_indices)
def _adaptive_max_pool(x: Tensor, output_size: Ints, *, pool: Any) -> tuple[Tensor, Tensor]:
    """Return maxima, and the first index of each.

    Windows of several sizes are read with their last row and column repeated: a repeated element comes after itself,
    so that it is never the first.
    """
    kernel = _divided(x, output_size)
    if kernel:
        maxima, indices = pool(x, kernel, kernel)
        return maxima, indices
    dims = len(output_size)
    lead = x.ndim - dims
    index = torch.zeros((1,) * dims * 2, dtype=torch.int64, device=x.device)
    for axis, (size, out) in enumerate(zip(x.shape[-dims:], output_size, strict=True)):
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


@decomposes(_aten.max_pool2d_with_indices_backward.default, dims=2)
@decomposes(_aten.max_pool3d_with_indices_backward.default, dims=3)
@decomposes(_aten.adaptive_max_pool2d_backward.default, dims=2)
@decomposes(_aten.adaptive_max_pool3d_backward.default, dims=3)
@decomposes(_aten.fractional_max_pool2d_backward.default, dims=2)
@decomposes(_aten.fractional_max_pool3d_backward.default, dims=3)
def _max_pool_backward(dy: Tensor, x: Tensor, *options: Any, dims: int) -> Tensor:
    """Return zeros like ``x``, each ``dy`` added at its index, the last option, into the flattened spatial axes."""
    lead = x.ndim - dims
    indices = options[-1].flatten(lead)
    return torch.zeros_like(x).flatten(lead).scatter_add(-1, indices, dy.flatten(lead)).reshape(x.shape)
