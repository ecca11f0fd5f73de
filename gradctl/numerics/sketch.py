"""A tensor as a few numbers, by which two programs' values are compared without keeping either.

Projections on Gaussian directions keep distances (Johnson & Lindenstrauss 1984): with three, two tensors that lie
further apart than a hundred tolerances pass as one with a probability of about 1e-6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_PROJECTIONS = 3
# Directions are generated again for a size that was not seen lately: a convolutional net has few sizes.
_SIZES_KEPT = 4


@dataclass(frozen=True, slots=True)
class Sketch:
    """A tensor's shape, projections of its finite elements and of where it is not finite, and its norm.

    ``nonfinite`` counts the elements that are NaN or infinite.
    """

    shape: tuple[int, ...]
    numbers: tuple[float, ...]
    norm: float
    nonfinite: int

    def distance(self, other: Sketch) -> float:
        """Return about ||self - other|| / ||self||; infinite for another shape, or NaN in other places."""
        if self.shape != other.shape or self.nonfinite != other.nonfinite:
            return math.inf
        scale = max(self.norm, other.norm)
        if not scale:
            return 0.0
        squares = ((left - right) / scale for left, right in zip(self.numbers, other.numbers, strict=True))
        return math.sqrt(sum(each * each for each in squares) / _PROJECTIONS)


class Sketcher:
    """Projects on the same directions for the same number of elements, so that its sketches can be compared."""

    def __init__(self) -> None:
        self._directions = lru_cache(_SIZES_KEPT)(_random_directions)

    def __call__(self, tensor: Tensor) -> Sketch:
        """Return the sketch of a strided tensor of any dtype."""
        with torch.no_grad():
            flat = tensor.detach().resolve_conj().reshape(-1)
            flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
            flat = flat.to("cpu", torch.float64)
            finite = torch.isfinite(flat)
            nonfinite = int((~finite).sum())
            if nonfinite:
                flat = torch.where(finite, flat, 0)
            directions = self._directions(flat.numel())
            numbers = directions @ flat
            if nonfinite:
                numbers = numbers + directions @ (~finite).to(torch.float64)
            return Sketch(tuple(tensor.shape), tuple(numbers.tolist()), float(flat.norm()), nonfinite)


def _random_directions(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(_PROJECTIONS, size, dtype=torch.float64, generator=generator)
