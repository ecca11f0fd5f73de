"""Which elements of a wrong gradient are wrong: finite differences where they tell most, not everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradctl.numerics.judge import Judge
from gradctl.numerics.ladder import central_slope
from gradctl.numerics.measures import gaussian_like
from gradctl.numerics.point import Direction, Point, Sample, natural_scale
from gradctl.numerics.site import Site

# Up to this many elements each gets a finite difference, and the number of wrong ones is known.
_ALL = 64
_STEP = 1e-5
_ROWS = 5


@dataclass(frozen=True, slots=True)
class ElementDifference:
    """One element: autograd's value and the finite difference (real part first for complex tensors)."""

    index: tuple[int, ...]
    autograd: float
    finite_difference: float

    @property
    def error(self) -> float:
        """The absolute difference of the two; infinite where autograd's value is not finite."""
        difference = abs(self.autograd - self.finite_difference)
        return math.inf if math.isnan(difference) else difference


def worst_elements(judge: Judge, i: int) -> tuple[list[ElementDifference], int | None]:
    """Return up to five of the worst elements of leaf ``i``, worst first, and how many are wrong if that is known.

    Small tensors are measured whole. In larger ones the differences are followed down: a random direction over a
    stretch of elements is split in halves, the five stretches with the largest difference are split again, down to
    elements.
    """
    nonfinite = judge.samples[0].nonfinite.get(i)
    site = judge.here if nonfinite is not None else judge.site(i)
    count = site.point.values[i].numel()
    if nonfinite is not None:
        positions = nonfinite.reshape(-1).nonzero().reshape(-1)[:_ROWS].tolist()
        return [_measured(site, i, position) for position in positions], int(nonfinite.sum())
    if count <= _ALL:
        coarse = [_measured(site, i, position, once=True) for position in range(count)]
        size = max(abs(e.autograd) for e in coarse) + max(abs(e.finite_difference) for e in coarse)
        wrong = sum(e.error > 1e-6 * size for e in coarse)
        positions = sorted(range(count), key=lambda position: -coarse[position].error)[: min(_ROWS, wrong)]
        return sorted((_measured(site, i, position) for position in positions), key=lambda e: -e.error), wrong
    positions = _followed_down(site, judge.generator, i, count)
    return sorted((_measured(site, i, position) for position in positions), key=lambda e: -e.error), None


def _followed_down(site: Site, generator: torch.Generator, i: int, count: int) -> list[int]:
    """Return positions of elements whose differences dominate, 2 forwards a half: a beam of five stretches."""
    point, sample = site.point, site.samples[0]
    weights = gaussian_like(point.values[i], generator).reshape(-1)
    gradient = sample.gradients[i]
    stated = (weights if gradient is None else (gradient.conj().reshape(-1) * weights).real) * (gradient is not None)
    totals = torch.cat([torch.zeros(1, dtype=torch.float64), stated.real.to("cpu", torch.float64).cumsum(0)])

    def difference(begin: int, end: int) -> float:
        part = torch.zeros_like(weights)
        part[begin:end] = weights[begin:end]
        length = (float(torch.linalg.vector_norm(part)) or 1.0) / natural_scale(point.values[i])
        phi = point.along(along_leaf(point, i, part / length), sample)
        slope = length * (phi(_STEP) - phi(-_STEP)) / (2 * _STEP)
        return slope - float(totals[end] - totals[begin])

    beam = [(0, count, difference(0, count))]
    while any(end - begin > 1 for begin, end, _ in beam):
        halves = []
        for begin, end, whole in beam:
            if end - begin == 1:
                halves.append((begin, end, whole))
                continue
            middle = (begin + end) // 2
            left = difference(begin, middle)
            halves += [(begin, middle, left), (middle, end, whole - left)]
        beam = sorted(halves, key=lambda half: -abs(half[2]))[:_ROWS]
    return [begin for begin, _, _ in beam]


def element_slope(point: Point, sample: Sample, i: int, position: int, *, once: bool = False) -> float:
    """Return the finite difference of one element of leaf ``i``, by central differences extrapolated once.

    ``once`` leaves out the extrapolation: 2 forwards in place of 4, an error of 1e-10 of a third derivative.
    """
    part = torch.zeros_like(point.values[i]).reshape(-1)
    scale = natural_scale(point.values[i])
    part[position] = scale
    phi = point.along(along_leaf(point, i, part), sample)
    return ((phi(_STEP) - phi(-_STEP)) / (2 * _STEP) if once else central_slope(phi, _STEP)) / scale


def _measured(site: Site, i: int, position: int, *, once: bool = False) -> ElementDifference:
    point, sample = site.point, site.samples[0]
    value = point.values[i]
    gradient = sample.gradients[i]
    stated = 0.0 if gradient is None else float(gradient.reshape(-1)[position].real)
    if i in sample.nonfinite and bool(sample.nonfinite[i].reshape(-1)[position]):
        stated = math.nan
    index = tuple(int(axis) for axis in torch.unravel_index(torch.tensor(position), value.shape)) if value.dim() else ()
    return ElementDifference(index, stated, element_slope(point, sample, i, position, once=once))


def along_leaf(point: Point, i: int, part: Tensor) -> Direction:
    """Return the direction that moves leaf ``i`` alone, by ``part`` (any shape of its size)."""
    parts: list[Tensor | None] = [None] * len(point.values)
    parts[i] = part.reshape(point.values[i].shape)
    return Direction(parts, [])
