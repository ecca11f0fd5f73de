"""Interpolation, reading an image at the places of a grid, and their gradients.

Interpolation is a linear map of each axis; its matrices follow ``aten/src/ATen/native/UpSample.h`` and
``cpu/UpSampleKernel.cpp``. Gradients are those of the forward, also if torch's kernels differ from it: with a given
scale and a size that it rounds to the input's (or, for nearest, to twice that), the backwards of ``nearest`` in one and
three dimensions and of ``bicubic`` ignore the scale, and their forwards do not.

A grid reads taps along each axis: elements, their weights, and the slopes of the weights by the place. A value is the
sum over all combinations of one tap an axis, and its gradient by a place takes the slope as the weight of that axis.
Places, padding and slopes follow ``aten/src/ATen/native/GridSampler.h``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradctl.joint.decompositions.register import Ints, decomposes
from gradctl.joint.decompositions.separable import accumulation_type, apply, apply_transposed, positions

_aten = torch.ops.aten
_Matrix = Callable[[Tensor, int, int, bool, float | None], Tensor]

_NEAREST, _BICUBIC = 1, 2  # interpolation modes of a grid; bilinear is 0
_ZEROS, _BORDER = 0, 1  # padding modes of a grid; reflection is 2


def _scale(size: int, out: int, align_corners: bool, scale: float | None) -> float:
    """Return the distance of neighbouring outputs in the input."""
    if align_corners:
        return (size - 1) / (out - 1) if out > 1 else 0.0
    return 1.0 / scale if scale is not None and scale > 0 else size / out


def _sources(x: Tensor, size: int, out: int, align_corners: bool, scale: float | None) -> Tensor:
    """Return the place of each output in the input."""
    at, ratio = positions(out, x, accumulation_type(x)), _scale(size, out, align_corners, scale)
    return at * ratio if align_corners else (at + 0.5) * ratio - 0.5


def _linear(x: Tensor, size: int, out: int, align_corners: bool, scale: float | None) -> Tensor:
    # The kernels copy an axis of unchanged size, whatever the given scale.
    at = _sources(x, size, out, align_corners, None if out == size else scale).clamp(0, size - 1)
    return (1 - (at[:, None] - positions(size, x)).abs()).clamp(min=0)


def _cubic(x: Tensor, size: int, out: int, align_corners: bool, scale: float | None) -> Tensor:
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
    """Return the weights of cubic convolution (Keys 1981, doi 10.1109/TASSP.1981.1163711)."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))


def _lanczos(distance: Tensor) -> Tensor:
    found = torch.sinc(distance) * torch.sinc(distance / 3)
    return torch.where(distance < 3, found, torch.zeros_like(found))


def _antialiased(weigh: Callable[[Tensor], Tensor], half_width: int) -> _Matrix:
    """Return the matrix of a filter that is as wide as the part of the input that an output covers."""

    def matrix(x: Tensor, size: int, out: int, align_corners: bool, scale: float | None) -> Tensor:
        ratio = _scale(size, out, align_corners, scale)
        stretch = max(ratio, 1.0)
        center = (positions(out, x, accumulation_type(x)) + 0.5)[:, None] * ratio
        at = positions(size, x)
        start = (center - half_width * stretch + 0.5).trunc().clamp(min=0)
        end = (center + half_width * stretch + 0.5).trunc().clamp(max=size)
        weight = weigh(((at - center + 0.5) / stretch).abs())
        weight = weight * ((at >= start) & (at < end)).to(weight.dtype)
        return weight / weight.sum(1, keepdim=True)

    return matrix


# torch.onnx (2.13) ignores given scales.
def _upsample(x: Tensor, output_size: Ints, align_corners: bool, *scales: float | None, matrix: _Matrix) -> Tensor:
    sizes = _by_axis(x.shape, output_size, scales)
    return apply(x, [matrix(x, size, out, align_corners, scale) for size, out, scale in sizes])


def _upsample_backward(
    dy: Tensor, output_size: Ints, input_size: Ints, align_corners: bool, *scales: float | None, matrix: _Matrix
) -> Tensor:
    sizes = _by_axis(input_size, output_size, scales)
    return apply_transposed(dy, [matrix(dy, size, out, align_corners, scale) for size, out, scale in sizes])


_INTERPOLATIONS = {
    "upsample_linear1d": _linear,
    "upsample_bilinear2d": _linear,
    "upsample_trilinear3d": _linear,
    "upsample_bicubic2d": _cubic,
    "_upsample_bilinear2d_aa": _antialiased(lambda distance: (1 - distance).clamp(min=0), 1),
    "_upsample_bicubic2d_aa": _antialiased(lambda distance: _keys(distance, -0.5), 2),
    "_upsample_lanczos2d_aa": _antialiased(_lanczos, 3),  # not in torch 2.10
}
for _name, _matrix in _INTERPOLATIONS.items():
    if hasattr(_aten, _name):
        decomposes(getattr(_aten, _name).default, matrix=_matrix)(_upsample)
        decomposes(getattr(_aten, f"{_name}_backward").default, matrix=_matrix)(_upsample_backward)


def _upsample_nearest(x: Tensor, output_size: Ints, *scales: float | None, exact: bool) -> Tensor:
    sizes = _by_axis(x.shape, output_size, scales)
    for axis, (size, out, scale) in enumerate(sizes, start=x.ndim - len(sizes)):
        x = x.index_select(axis, _nearest_indices(len(sizes), x, size, out, exact, scale))
    return x


def _upsample_nearest_backward(
    dy: Tensor, output_size: Ints, input_size: Ints, *scales: float | None, exact: bool
) -> Tensor:
    sizes = _by_axis(input_size, output_size, scales)
    matrices = []
    for size, out, scale in sizes:
        read = _nearest_indices(len(sizes), dy, size, out, exact, scale)
        matrices.append((read[:, None] == positions(size, dy)).to(accumulation_type(dy)))
    return apply_transposed(dy, matrices)


for _name, _exact in (("upsample_nearest", False), ("_upsample_nearest_exact", True)):
    for _dims in (1, 2, 3):
        decomposes(getattr(_aten, f"{_name}{_dims}d").default, exact=_exact)(_upsample_nearest)
        decomposes(getattr(_aten, f"{_name}{_dims}d_backward").default, exact=_exact)(_upsample_nearest_backward)


def _nearest_indices(dims: int, x: Tensor, size: int, out: int, exact: bool, scale: float | None) -> Tensor:
    """Return the element of each output, computed in float32 for every dtype, as torch does."""
    if dims == 2 and not exact and (out == size or out == 2 * size):
        scale = None  # for images the kernel ignores a given scale in this case
    at = positions(out, x, torch.float32)
    return ((at + 0.5 if exact else at) * _scale(size, out, False, scale)).floor().clamp(max=size - 1).to(torch.int64)


def _by_axis(
    input_size: Ints, output_size: Ints, scales: Sequence[float | None]
) -> list[tuple[int, int, float | None]]:
    """Return size of the input, size of the output, and scale, of each spatial axis."""
    dims = len(output_size)
    return list(zip(input_size[-dims:], output_size, scales or (None,) * dims, strict=True))


class _Tap(NamedTuple):
    """The elements that are read along one axis, inside the image; their weights, and the slope of these by place."""

    read: Tensor
    weight: Tensor
    slope: Tensor


@decomposes(_aten.grid_sampler_2d.default, _aten.grid_sampler_3d.default)
def _grid_sampler(x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool) -> Tensor:
    flat, found = x.flatten(2), x.new_zeros(())
    for index, chosen in _combinations(x, grid, mode, padding, align_corners):
        found = found + flat.gather(2, index.expand(-1, x.shape[1], -1)) * _weight(chosen)[:, None]
    return found.reshape(*x.shape[:2], *grid.shape[1:-1])


@decomposes(_aten.grid_sampler_2d_backward.default, _aten.grid_sampler_3d_backward.default)
def _grid_sampler_backward(
    dy: Tensor, x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool, output_mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients by image and grid, each if its mask is set."""
    flat, dy = x.flatten(2), dy.flatten(2)
    by_x = torch.zeros_like(flat)
    by_place = [grid.new_zeros(()) for _ in x.shape[2:]]
    for index, chosen in _combinations(x, grid, mode, padding, align_corners):
        spread = index.expand(-1, x.shape[1], -1)
        if output_mask[0]:
            by_x = by_x.scatter_add(2, spread, dy * _weight(chosen)[:, None])
        if output_mask[1]:
            read = (flat.gather(2, spread) * dy).sum(1)
            for axis, tap in enumerate(chosen):
                others = [other.weight for each, other in enumerate(chosen) if each != axis]
                by_place[axis] = by_place[axis] + read * math.prod(others, start=tap.slope)
    by_grid = torch.stack(by_place[::-1], -1).reshape(grid.shape) if output_mask[1] else None
    return by_x.reshape(x.shape) if output_mask[0] else None, by_grid


def _combinations(
    x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool
) -> Iterator[tuple[Tensor, tuple[_Tap, ...]]]:
    """Yield each combination of one tap an axis, with its index into the flattened image, ``[N, 1, places]``."""
    sizes, places = x.shape[2:], grid.flatten(1, -2)
    # The last axis of a grid holds the coordinate of the last axis of the image first.
    taps = [_taps(places[..., -1 - axis], size, mode, padding, align_corners) for axis, size in enumerate(sizes)]
    for chosen in itertools.product(*taps):
        index = chosen[0].read
        for tap, size in zip(chosen[1:], sizes[1:], strict=True):
            index = index * size + tap.read
        yield index[:, None], chosen


def _weight(chosen: Sequence[_Tap]) -> Tensor:
    return math.prod((tap.weight for tap in chosen[1:]), start=chosen[0].weight)


def _taps(places: Tensor, size: int, mode: int, padding: int, align_corners: bool) -> list[_Tap]:
    """Return the taps of one axis at places from -1 to 1."""
    per_place = (size - 1) / 2 if align_corners else size / 2
    at = (places + 1) * per_place - (0.0 if align_corners else 0.5)
    factor = torch.ones_like(at)
    if mode == _BICUBIC:  # pads each tap, not the place
        at = at.clamp(-4, size + 3) if padding == _ZEROS else at
        first = at.floor()
        taps = [(first + tap, *_keys_with_slope(at - first, tap)) for tap in (-1, 0, 1, 2)]
    else:
        at, factor = _padded(at, size, padding, align_corners)
        one = torch.ones_like(at)
        first = at.floor()
        taps = [(first, first + 1 - at, -one), (first + 1, at - first, one)]
        if mode == _NEAREST:
            taps = [(at.round(), one, torch.zeros_like(at))]
    found = []
    for read, weight, slope in taps:
        if padding == _ZEROS:
            counted = ((read >= 0) & (read < size)).to(weight.dtype)
            weight, slope = weight * counted, slope * factor * per_place * counted  # noqa: PLW2901
        else:
            read, slope = _padded(read, size, padding, align_corners)[0], slope * factor * per_place  # noqa: PLW2901
        found.append(_Tap(read.clamp(0, size - 1).to(torch.int64), weight, slope))
    return found


def _keys_with_slope(part: Tensor, tap: int) -> tuple[Tensor, Tensor]:
    """Return the weight of a tap of cubic convolution, and its slope, a = -0.75."""
    a = -0.75
    side = 1.0 if tap <= 0 else -1.0
    distance = (part - tap) * side
    if tap in {0, 1}:
        weight = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        slope = (3 * (a + 2) * distance - 2 * (a + 3)) * distance
    else:
        weight = ((distance - 5) * distance + 8) * distance * a - 4 * a
        slope = a * ((3 * distance - 10) * distance + 8)
    return weight, slope * side


def _padded(at: Tensor, size: int, padding: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Return places as the padding mode moves them, and the slope of that."""
    if padding == _ZEROS:
        # Nothing is read beyond 2 elements from the border; this keeps far places within the integers.
        return at.clamp(-4, size + 3), torch.ones_like(at)
    at, sign = (at, 1.0) if padding == _BORDER else _reflected(at, size, align_corners)
    return at.clamp(0, size - 1), sign * ((at > 0) & (at < size - 1)).to(at.dtype)


def _reflected(at: Tensor, size: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Return places mirrored into the image, and the sign of their slope."""
    low, span = (0.0, size - 1) if align_corners else (-0.5, size)
    if span == 0:
        return torch.zeros_like(at), torch.zeros_like(at)
    moved = at - low
    sign = torch.where(moved < 0, -1.0, 1.0).to(at.dtype)
    distance = moved.abs()
    flips, rest = (distance / span).floor(), torch.fmod(distance, span)
    even = torch.fmod(flips, 2) == 0
    return torch.where(even, rest, span - rest) + low, torch.where(even, sign, -sign)


@decomposes(_aten.affine_grid_generator.default)
def _affine_grid(theta: Tensor, size: Ints, align_corners: bool) -> Tensor:
    """Return the grid of an affine map; torch has its gradient in plain arithmetic."""
    sizes = size[2:]
    columns = []
    for axis, length in enumerate(sizes):
        at = positions(length, theta, theta.dtype)
        corners = at * (2 / (length - 1)) - 1 if length > 1 else at
        line = corners if align_corners else (at * 2 + 1) / length - 1
        columns.append(line.reshape([-1 if each == axis else 1 for each in range(len(sizes))]).expand(sizes).flatten())
    # The places of an image from -1 to 1, the last axis first, and 1: [places, axes + 1].
    homogeneous = torch.stack([*columns[::-1], torch.ones_like(columns[0])], -1)
    return torch.matmul(homogeneous, theta.mT).reshape(size[0], *sizes, len(sizes))
