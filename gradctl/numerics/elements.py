"""Which elements of a wrong gradient are wrong: finite differences of the worst elements, not of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradctl.core.names import Component
from gradctl.numerics.judge import Judge
from gradctl.numerics.ladder import central_slope
from gradctl.numerics.measures import gaussian_like
from gradctl.numerics.point import Point, Sample, natural_scale
from gradctl.numerics.site import Site

# Up to this many elements each gets a finite difference, and the number of wrong ones is known.
_ALL = 64
_STEP = 1e-5
_ROWS = 5


@dataclass(frozen=True, slots=True)
class ElementDifference:
    """One element, or its real or imaginary part: autograd's value and the finite difference."""

    index: tuple[int, ...]
    autograd: float
    finite_difference: float
    component: Component | None = None  # of an element of a complex tensor

    @property
    def error(self) -> float:
        """The absolute difference of the two; infinite where autograd's value is not finite."""
        difference = abs(self.autograd - self.finite_difference)
        return math.inf if math.isnan(difference) else difference


class WorstElements(NamedTuple):
    """The worst elements of a gradient.

    Attributes:
        rows: up to five elements, worst first; a complex one is two.
        wrong: how many elements are wrong, if that is known.
        errors: the absolute error of each element, if all were measured, in the shape of the tensor.
    """

    rows: Sequence[ElementDifference] = ()
    wrong: int | None = None
    errors: Tensor | None = None


def worst_elements(judge: Judge, i: int) -> WorstElements:
    """Return up to five of the worst elements of leaf ``i``, and how many are wrong if that is known.

    A complex element is two, its real and its imaginary part. Elements that are not finite come first. Else small
    tensors are measured whole, and larger ones by halves.
    """
    nonfinite, errors = judge.samples[0].nonfinite.get(i), None
    if nonfinite is not None:
        positions = nonfinite.reshape(-1).nonzero().reshape(-1)[:_ROWS].tolist()
        rows = [part for each in positions for part in _measured(judge.here, i, each)]
        return WorstElements(rows, int(nonfinite.sum()))
    site = judge.site(i)
    if site.point.values[i].numel() <= _ALL:
        positions, wrong, errors = _search_all(site, i)
    else:
        positions, wrong = _search_by_halves(site, judge.generator, i), None
    measured = sorted((_measured(site, i, position) for position in positions), key=_error, reverse=True)
    return WorstElements([part for element in measured for part in element], wrong, errors)


def _search_all(site: Site, i: int) -> tuple[list[int], int, Tensor]:
    """Return the positions of the worst elements, how many are wrong, and all errors: 2 forwards an element."""
    coarse = [_measured(site, i, position, once=True) for position in range(site.point.values[i].numel())]
    parts = [part for element in coarse for part in element]
    size = max(abs(e.autograd) for e in parts) + max(abs(e.finite_difference) for e in parts)
    wrong = sum(_error(element) > 1e-6 * size for element in coarse)
    worst = sorted(range(len(coarse)), key=lambda position: -_error(coarse[position]))[: min(_ROWS, wrong)]
    return worst, wrong, torch.tensor(list(map(_error, coarse))).reshape(site.point.values[i].shape)


def _error(element: list[ElementDifference]) -> float:
    return math.hypot(*(part.error for part in element))


def _search_by_halves(site: Site, generator: torch.Generator, i: int) -> list[int]:
    """Return the positions of elements with large differences, by a beam search over stretches of elements.

    A random direction over a stretch is split in halves, and the five stretches with the largest difference are split
    again, down to elements: 2 forwards a half.
    """
    point, sample, count = site.point, site.samples[0], site.point.values[i].numel()
    weights = gaussian_like(point.values[i], generator).reshape(-1)
    gradient = sample.gradients[i]
    stated = (torch.zeros_like(weights) if gradient is None else gradient.conj().reshape(-1) * weights).real
    totals = torch.cat([torch.zeros(1, dtype=torch.float64), stated.to("cpu", torch.float64).cumsum(0)])

    def difference(begin: int, end: int) -> float:
        part = torch.zeros_like(weights)
        part[begin:end] = weights[begin:end]
        length = (float(torch.linalg.vector_norm(part)) or 1.0) / natural_scale(point.values[i])
        phi = point.along(point.along_leaf(i, part / length), sample)
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


def components_of(tensor: Tensor) -> tuple[Component | None, ...]:
    """Return the components of which an element consists; a real one is its own."""
    return ("real", "imag") if tensor.is_complex() else (None,)


def component_of(element: Tensor, component: Component | None) -> float:
    """Return a component of a tensor of one element."""
    return float(element.imag if component == "imag" else element.real)


def element_slope(
    point: Point, sample: Sample, i: int, position: int, component: Component | None = None, *, once: bool = False
) -> float:
    """Return the finite difference of one element of leaf ``i``, by central differences extrapolated once.

    The element moves by its ``component``. ``once`` leaves out the extrapolation: 2 forwards in place of 4, an error of
    1e-10 of a third derivative.
    """
    part = torch.zeros_like(point.values[i]).reshape(-1)
    scale = natural_scale(point.values[i])
    part[position] = scale
    part = part * 1j if component == "imag" else part
    phi = point.along(point.along_leaf(i, part), sample)
    return ((phi(_STEP) - phi(-_STEP)) / (2 * _STEP) if once else central_slope(phi, _STEP)) / scale


def index_of(position: int, tensor: Tensor) -> tuple[int, ...]:
    """Return the index of an element by its position in the flat tensor."""
    axes = torch.unravel_index(torch.tensor(position), tensor.shape) if tensor.dim() else ()
    return tuple(int(axis) for axis in axes)


def _measured(site: Site, i: int, position: int, *, once: bool = False) -> list[ElementDifference]:
    """Return the components of one element."""
    point, sample = site.point, site.samples[0]
    value = point.values[i]
    gradient = sample.gradients[i]
    index = index_of(position, value)
    found = []
    for component in components_of(value):
        stated = 0.0 if gradient is None else component_of(gradient.reshape(-1)[position], component)
        if i in sample.nonfinite and bool(sample.nonfinite[i].reshape(-1)[position]):
            stated = math.nan
        slope = element_slope(point, sample, i, position, component, once=once)
        found.append(ElementDifference(index, stated, slope, component))
    return found
