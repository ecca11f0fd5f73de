"""Reading an image at given places, and the gradients by image and places; the places that an affine map gives.

Each axis has taps: elements that are read, what they weigh, and the slope of that by the place. A value is the sum over
all choices of a tap an axis, and its gradient by a place takes the slope for the weight of that axis. Places, padding
and slopes follow ``aten/src/ATen/native/GridSampler.h``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradctl.joint.decompositions.separable import positions

__all__ = ["TABLE"]

_aten = torch.ops.aten

_NEAREST, _BICUBIC = 1, 2
_ZEROS, _BORDER = 0, 1


class _Tap(NamedTuple):
    """What one axis reads: indices inside the image, weights, and the slope of these by the place."""

    read: Tensor
    weight: Tensor
    slope: Tensor


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


def _clipped(at: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return places clipped to the image, and their slope: 0 from the borders on."""
    return at.clamp(0, size - 1), ((at > 0) & (at < size - 1)).to(at.dtype)


def _padded(at: Tensor, size: int, padding: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Return places as the padding mode moves them, and the slope of that."""
    if padding == _ZEROS:
        # Nothing is read beyond 2 elements from the border; no place is too far for an integer.
        return at.clamp(-4, size + 3), torch.ones_like(at)
    if padding == _BORDER:
        return _clipped(at, size)
    mirrored, sign = _reflected(at, size, align_corners)
    clipped, inside = _clipped(mirrored, size)
    return clipped, sign * inside


def _keys(part: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return weights of the taps -1 to 2 and their slopes, a = -0.75 (Keys 1981, doi 10.1109/TASSP.1981.1163711)."""
    a = -0.75
    found = []
    for tap in (-1, 0, 1, 2):
        side = 1.0 if tap <= 0 else -1.0
        distance = (part - tap) * side
        if tap in {0, 1}:
            weight = ((a + 2) * distance - (a + 3)) * distance * distance + 1
            slope = (3 * (a + 2) * distance - 2 * (a + 3)) * distance
        else:
            weight = ((distance - 5) * distance + 8) * distance * a - 4 * a
            slope = a * ((3 * distance - 10) * distance + 8)
        found.append((weight, slope * side))
    return found


def _taps(places: Tensor, size: int, mode: int, padding: int, align_corners: bool) -> list[_Tap]:
    """Return the taps of one axis at places from -1 to 1."""
    per_place = (size - 1) / 2 if align_corners else size / 2
    at = (places + 1) * per_place - (0.0 if align_corners else 0.5)
    if mode == _BICUBIC:  # pads each tap, not the place
        at, factor = (at.clamp(-4, size + 3), torch.ones_like(at)) if padding == _ZEROS else (at, torch.ones_like(at))
        first = at.floor()
        taps = [
            (first + tap, weight, slope) for tap, (weight, slope) in zip((-1, 0, 1, 2), _keys(at - first), strict=True)
        ]
    else:
        at, factor = _padded(at, size, padding, align_corners)
        if mode == _NEAREST:
            taps = [(at.round(), torch.ones_like(at), torch.zeros_like(at))]
        else:
            first = at.floor()
            one = torch.ones_like(at)
            taps = [(first, first + 1 - at, -one), (first + 1, at - first, one)]
    return [
        _inside(read, weight, slope * factor * per_place, size, padding, align_corners) for read, weight, slope in taps
    ]


def _inside(read: Tensor, weight: Tensor, slope: Tensor, size: int, padding: int, align_corners: bool) -> _Tap:
    """Return a tap that reads inside the image; outside, it weighs nothing or is moved."""
    if padding == _ZEROS:
        seen = ((read >= 0) & (read < size)).to(weight.dtype)
        weight, slope = weight * seen, slope * seen
    else:
        read, _ = _padded(read, size, padding, align_corners)
    return _Tap(read.clamp(0, size - 1).to(torch.int64), weight, slope)


def _choices(taps: Sequence[Sequence[_Tap]], sizes: Sequence[int]) -> Iterator[tuple[Tensor, tuple[_Tap, ...]]]:
    """Yield each choice of a tap an axis, with its index into the flattened image, ``[N, 1, places]``."""
    for chosen in itertools.product(*taps):
        index = chosen[0].read
        for tap, size in zip(chosen[1:], sizes[1:], strict=True):
            index = index * size + tap.read
        yield index[:, None], chosen


def _prepared(
    x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool
) -> tuple[Tensor, list[list[_Tap]], Sequence[int]]:
    """Return the flattened image, taps by axis, and its sizes; the last axis of a grid counts from the last one."""
    sizes, places = x.shape[2:], grid.flatten(1, -2)
    taps = [_taps(places[..., -1 - axis], size, mode, padding, align_corners) for axis, size in enumerate(sizes)]
    return x.flatten(2), taps, sizes


def _grid_sampler(x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool) -> Tensor:
    """Return ``aten.grid_sampler_2d`` or ``3d``."""
    flat, taps, sizes = _prepared(x, grid, mode, padding, align_corners)
    found = x.new_zeros(())
    for index, chosen in _choices(taps, sizes):
        weight = math.prod((tap.weight for tap in chosen[1:]), start=chosen[0].weight)
        found = found + flat.gather(2, index.expand(-1, x.shape[1], -1)) * weight[:, None]
    return found.reshape(*x.shape[:2], *grid.shape[1:-1])


def _grid_sampler_backward(
    dy: Tensor,
    x: Tensor,
    grid: Tensor,
    mode: int,
    padding: int,
    align_corners: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of ``aten.grid_sampler_2d`` or ``3d`` by image and grid; None for what is not wanted."""
    flat, taps, sizes = _prepared(x, grid, mode, padding, align_corners)
    given = dy.flatten(2)
    by_x = torch.zeros_like(flat)
    by_place = [grid.new_zeros(()) for _ in sizes]
    for index, chosen in _choices(taps, sizes):
        spread = index.expand(-1, x.shape[1], -1)
        if output_mask[0]:
            weight = math.prod((tap.weight for tap in chosen[1:]), start=chosen[0].weight)
            by_x = by_x.scatter_add(2, spread, given * weight[:, None])
        if output_mask[1]:
            read = (flat.gather(2, spread) * given).sum(1)
            for axis, tap in enumerate(chosen):
                others = [other.weight for each, other in enumerate(chosen) if each != axis]
                by_place[axis] = by_place[axis] + read * math.prod(others, start=tap.slope)
    by_grid = torch.stack(by_place[::-1], -1).reshape(grid.shape) if output_mask[1] else None
    return by_x.reshape(x.shape) if output_mask[0] else None, by_grid


def _homogeneous(theta: Tensor, sizes: Sequence[int], align_corners: bool) -> Tensor:
    """Return the places of an image from -1 to 1, the last axis first, and 1: ``[places, axes + 1]``."""
    columns = []
    for axis, size in enumerate(sizes):
        at = positions(size, theta, theta.dtype)
        corners = at * (2 / (size - 1)) - 1 if size > 1 else at
        line = corners if align_corners else (at * 2 + 1) / size - 1
        columns.append(line.reshape([-1 if each == axis else 1 for each in range(len(sizes))]).expand(sizes).flatten())
    return torch.stack([*columns[::-1], torch.ones_like(columns[0])], -1)


def _affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Return ``aten.affine_grid_generator``, whose gradient torch has in plain arithmetic."""
    sizes = size[2:]
    found = torch.matmul(_homogeneous(theta, sizes, align_corners), theta.mT)
    return found.reshape(size[0], *sizes, len(sizes))


TABLE: dict[Any, Callable[..., Any]] = {
    _aten.affine_grid_generator.default: _affine_grid,
    _aten.grid_sampler_2d.default: _grid_sampler,
    _aten.grid_sampler_3d.default: _grid_sampler,
    _aten.grid_sampler_2d_backward.default: _grid_sampler_backward,
    _aten.grid_sampler_3d_backward.default: _grid_sampler_backward,
}
