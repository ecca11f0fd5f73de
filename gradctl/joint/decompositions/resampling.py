"""Interpolation and its gradients, as linear maps of each axis.

Gradients are those of the forward, also where torch's own kernels differ from it: with a scale that is given and a size
that it rounds to the input's (or, for nearest, to twice that), ``nearest`` in one and three dimensions and ``bicubic``
take a shortcut in the backward only.

The matrices follow ``aten/src/ATen/native/UpSample.h`` and ``cpu/UpSampleKernel.cpp``: where an output lies,
and what its neighbours in the input weigh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradctl.joint.decompositions.separable import apply, apply_transposed, positions, working_type

__all__ = ["TABLE"]

_aten = torch.ops.aten
_Matrix = Callable[[Tensor, int, int, bool, float | None], Tensor]


def _scale(size: int, out: int, align_corners: bool, scale: float | None) -> float:
    """Return the distance of neighbouring outputs in the input."""
    if align_corners:
        return (size - 1) / (out - 1) if out > 1 else 0.0
    return 1.0 / scale if scale is not None and scale > 0 else size / out


def _sources(x: Tensor, size: int, out: int, align_corners: bool, scale: float | None) -> Tensor:
    """Return where each output lies in the input."""
    at, ratio = positions(out, x, working_type(x)), _scale(size, out, align_corners, scale)
    return at * ratio if align_corners else (at + 0.5) * ratio - 0.5


def _linear(x: Tensor, size: int, out: int, align_corners: bool, scale: float | None) -> Tensor:
    # The kernels copy an axis whose size stays, whatever scale is given.
    at = _sources(x, size, out, align_corners, None if out == size else scale).clamp(0, size - 1)
    return (1 - (at[:, None] - positions(size, x)).abs()).clamp(min=0)


def _cubic(x: Tensor, size: int, out: int, align_corners: bool, scale: float | None) -> Tensor:
    """Return the matrix of cubic convolution with a = -0.75 (Keys 1981, doi 10.1109/TASSP.1981.1163711)."""
    at = _sources(x, size, out, align_corners, scale)
    first = at.floor().clamp(max=size - 1)
    part = (at - first).clamp(0, 1)
    matrix = torch.zeros((out, size), dtype=at.dtype, device=x.device)
    for tap in (-1, 0, 1, 2):
        read = (first + tap).clamp(0, size - 1)
        weight = _keys((part - tap).abs(), -0.75)
        matrix = matrix + (read[:, None] == positions(size, x)).to(at.dtype) * weight[:, None]
    return matrix


def _keys(distance: Tensor, a: float) -> Tensor:
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0)


def _cubic_filter(distance: Tensor) -> Tensor:
    return _keys(distance, -0.5)


def _lanczos(distance: Tensor) -> Tensor:
    found = torch.sinc(distance) * torch.sinc(distance / 3)
    return torch.where(distance < 3, found, torch.zeros_like(found))


def _antialiased(weigh: Callable[[Tensor], Tensor], reach: int) -> _Matrix:
    """Return the matrix of a filter that is as wide as what an output covers; ``reach`` is its half width."""

    def matrix(x: Tensor, size: int, out: int, align_corners: bool, scale: float | None) -> Tensor:
        ratio = _scale(size, out, align_corners, scale)
        stretch = max(ratio, 1.0)
        center = (positions(out, x, working_type(x)) + 0.5)[:, None] * ratio
        at = positions(size, x)
        start = (center - reach * stretch + 0.5).trunc().clamp(min=0)
        end = (center + reach * stretch + 0.5).trunc().clamp(max=size)
        weight = weigh(((at - center + 0.5) / stretch).abs())
        weight = weight * ((at >= start) & (at < end)).to(weight.dtype)
        return weight / weight.sum(1, keepdim=True)

    return matrix


def _nearest_indices(dims: int, x: Tensor, size: int, out: int, exact: bool, scale: float | None) -> Tensor:
    """Return which element each output is; in float32 for every type, as torch has it."""
    if dims == 2 and not exact and (out == size or out == 2 * size):
        scale = None  # the kernel for images has a shortcut there, whatever scale is given
    at = positions(out, x, torch.float32)
    return ((at + 0.5 if exact else at) * _scale(size, out, False, scale)).floor().clamp(max=size - 1).to(torch.int64)


def _nearest(dims: int, exact: bool) -> Callable[..., Any]:
    def upsample_nearest(x: Tensor, output_size: Sequence[int], *scales: float | None) -> Tensor:
        """Return ``aten.upsample_nearest1d``, ``2d``, ``3d``, or the exact variant."""
        given = scales or (None,) * dims
        for axis, (out, scale) in enumerate(zip(output_size, given, strict=True), start=x.ndim - dims):
            x = x.index_select(axis, _nearest_indices(dims, x, x.shape[axis], out, exact, scale))
        return x

    return upsample_nearest


def _nearest_backward(dims: int, exact: bool) -> Callable[..., Any]:
    def upsample_nearest_backward(
        dy: Tensor, output_size: Sequence[int], input_size: Sequence[int], *scales: float | None
    ) -> Tensor:
        """Return the gradient of ``aten.upsample_nearest1d``, ``2d``, ``3d``, or of the exact variant."""
        given, sizes = scales or (None,) * dims, input_size[-dims:]
        matrices = [
            (_nearest_indices(dims, dy, size, out, exact, scale)[:, None] == positions(size, dy)).to(working_type(dy))
            for size, out, scale in zip(sizes, output_size, given, strict=True)
        ]
        return apply_transposed(dy, matrices)

    return upsample_nearest_backward


def _smooth(dims: int, matrix: _Matrix) -> Callable[..., Any]:
    def upsample(x: Tensor, output_size: Sequence[int], align_corners: bool, *scales: float | None) -> Tensor:
        """Return an interpolation of ``aten``: (x, size of the output, align_corners, a scale an axis)."""
        given = scales or (None,) * dims
        sizes = zip(x.shape[-dims:], output_size, given, strict=True)
        return apply(x, [matrix(x, size, out, align_corners, scale) for size, out, scale in sizes])

    return upsample


def _smooth_backward(dims: int, matrix: _Matrix) -> Callable[..., Any]:
    def upsample_backward(
        dy: Tensor,
        output_size: Sequence[int],
        input_size: Sequence[int],
        align_corners: bool,
        *scales: float | None,
    ) -> Tensor:
        """Return the gradient of an interpolation of ``aten``."""
        given = scales or (None,) * dims
        sizes = zip(input_size[-dims:], output_size, given, strict=True)
        return apply_transposed(dy, [matrix(dy, size, out, align_corners, scale) for size, out, scale in sizes])

    return upsample_backward


_SMOOTH: dict[str, tuple[int, _Matrix]] = {
    "upsample_linear1d": (1, _linear),
    "upsample_bilinear2d": (2, _linear),
    "upsample_trilinear3d": (3, _linear),
    "upsample_bicubic2d": (2, _cubic),
    "_upsample_bilinear2d_aa": (2, _antialiased(_triangle, 1)),
    "_upsample_bicubic2d_aa": (2, _antialiased(_cubic_filter, 2)),
    "_upsample_lanczos2d_aa": (2, _antialiased(_lanczos, 3)),
}


def _operator(name: str) -> Any:
    return getattr(_aten, name).default


def _table() -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = {}
    for dims in (1, 2, 3):
        for exact, name in ((False, f"upsample_nearest{dims}d"), (True, f"_upsample_nearest_exact{dims}d")):
            table[_operator(name)] = _nearest(dims, exact)
            table[_operator(f"{name}_backward")] = _nearest_backward(dims, exact)
    for name, (dims, matrix) in _SMOOTH.items():
        if hasattr(_aten, name):  # Lanczos came after torch 2.10
            table[_operator(name)] = _smooth(dims, matrix)
            table[_operator(f"{name}_backward")] = _smooth_backward(dims, matrix)
    return table


TABLE = _table()
