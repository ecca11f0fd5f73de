"""A function of float64 leaves at one point: random cotangents, autograd's gradient, values along a direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gradctl.numerics.measures import dot, gaussian_like, is_float, norm, relative_error, same_values
from gradctl.numerics.runner import Outputs, Runner, refusals_ignored

# Outputs of one model can differ by many decades (energies and forces); each takes an equal part, but rounding noise
# around zero is not amplified to the size of the others.
_SMALLEST_SHARE = 1e-8
# An element weighs no more than its own rounding allows: of a value v, its noise is then 1e-11 of the objective.
_COARSEST = 1e11
_COARSEST_IN_NARROW_DTYPES = 1e-4
# Steps that measure how much an output moves; the smaller ones only close to the edge of a domain.
_STEPS_OF_OUTPUTS = (3e-2, 1e-4, 1e-7)
# Relative to the values: visible in float64 in any output that depends smoothly on a leaf, and seldom past a threshold.
_STEP_OF_VALUES = 1e-6


_Key = TypeVar("_Key")


class NoGradient(Exception):
    """No output requires a gradient."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One random cotangent for each output that has a gradient, and autograd's VJP of it."""

    cotangents: dict[str, Tensor]
    finite: dict[str, Tensor]  # by output, a mask of its finite elements if not all are (a logit masked with -inf)
    gradients: list[Tensor | None]
    norms: list[float]  # of the gradients
    nonfinite: dict[int, Tensor]  # by leaf, a mask of the elements with a NaN or infinite gradient, which is 0 above
    size: float = 0.0  # norm of the weighted outputs that move: their rounding is the noise of the objective


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """A direction of unit norm in the space of the leaves: one part a leaf, None for leaves that do not move."""

    parts: list[Tensor | None]
    lengths: list[float]


class Point:
    """``runner`` at the present values of its leaves."""

    def __init__(self, runner: Runner, values: list[Tensor] | None = None) -> None:
        self.runner = runner
        self.values = values or [leaf.tensor.detach().clone() for leaf in runner.leaves]
        self.infinite = _nonfinite_masks(self.values)  # by index of the leaf; no direction moves these elements
        self.forwards = 0  # how often the function was run
        self._resting: dict[int, int] = {}  # version counter of each leaf that holds its value: others write to it too
        self.absorbed: dict[str, Tensor] = {}  # by output, a mask of elements that are too large to move
        self._movements: tuple[dict[str, Tensor], float] | None = None
        self.outputs: Outputs = self.record()  # of floats
        self._place_leaves()
        again = self._replay()
        self.consistent = all(  # whether a replay at the point itself returns the recorded outputs
            name in again and relative_error(value, again[name]) < 1e-9 for name, value in self.outputs
        )
        # Subtracted element by element, before any sum: masked logits of -1e9 would drown what moves.
        self._base = again or dict(self.outputs)

    def record(self) -> Outputs:
        """Return the float outputs at the point; the runner records anew the values to hold fixed beside it."""
        self._place_leaves()
        # Cloned: an output can be a leaf itself, which moves.
        return [(name, t.detach().clone()) for name, t in self.runner.record() if is_float(t)]

    def sample(self, generator: torch.Generator) -> Sample:
        """Return Gaussian cotangents and autograd's gradient of them.

        Raises:
            NoGradient: no output has a graph.
        """
        changes, step = self._changes(generator)  # before the run whose graph must not see its leaves move
        outputs = self._differentiable_outputs()
        if not outputs:
            raise NoGradient
        values = {name: t.detach() for name, t in outputs.items()}
        scales, moving, self.absorbed = _scales(values, changes, step)
        cotangents, finite, size = {}, {}, 0.0
        for name, value in values.items():
            cotangents[name] = gaussian_like(value, generator) * scales[name]
            mask = torch.isfinite(value)
            if not bool(mask.all()):
                finite[name] = mask
                cotangents[name] = torch.where(mask, cotangents[name], 0)
            size = math.hypot(size, norm(torch.where(mask & moving[name], value, 0) * cotangents[name]))
        gradients = self._vjp(outputs, cotangents)
        nonfinite = _nonfinite_masks(gradients)
        gradients = [
            torch.where(nonfinite[i], 0, each) if each is not None and i in nonfinite else each
            for i, each in enumerate(gradients)
        ]
        norms = [norm(each) if each is not None else 0.0 for each in gradients]
        return Sample(cotangents, finite, gradients, norms, nonfinite, size)

    def gradients(self, cotangents: dict[str, Tensor], generator: torch.Generator | None = None) -> list[Tensor | None]:
        """Return autograd's gradient of the given cotangents; missing ones are random if there is a ``generator``."""
        outputs = self._differentiable_outputs()
        if generator is not None:
            missing = {name: gaussian_like(t, generator) for name, t in outputs.items() if name not in cotangents}
            cotangents = cotangents | missing
        return self._vjp({name: t for name, t in outputs.items() if name in cotangents}, cotangents)

    def along(self, direction: Direction, sample: Sample) -> Callable[[float], float]:
        """Return phi(t) = <cotangents, outputs(values + t direction) - outputs(values)>; NaN where a run fails."""

        def phi(t: float) -> float:
            if t == 0:
                return 0.0
            self._place_leaves(direction, t)
            outputs: dict[str, Tensor] = {}
            with refusals_ignored():  # a probability above 1, say
                outputs = dict(self.runner.beside())
            if not outputs:
                return math.nan
            total = self.runner.extra
            for name, cotangent in sample.cotangents.items():
                output, base = outputs.get(name), self._base.get(name)
                if output is None or base is None or not output.shape == base.shape == cotangent.shape:
                    return math.nan
                change = output.detach().to(cotangent.dtype) - base
                change = torch.where(sample.finite[name], change, 0) if name in sample.finite else change
                total += dot(cotangent, change)
            return total

        return phi

    def along_leaf(self, i: int, part: Tensor) -> Direction:
        """Return the direction that moves leaf ``i`` alone, by ``part`` (any shape of its size)."""
        parts: list[Tensor | None] = [None] * len(self.values)
        parts[i] = part.reshape(self.values[i].shape)
        return Direction(parts, [])

    def moved(self, generator: torch.Generator, indices: Collection[int], size: float) -> Point | None:
        """Return the point beside this one, the leaves ``indices`` moved by ``size`` of their scale: off a kink.

        None if the function is not finite there where it is here: the point lies at the edge of the domain.
        """
        before = dict(self.outputs)
        with refusals_ignored():
            point = Point(self.runner, moved_values(self.values, indices, generator, size))
            if all(_stays_finite(before.get(name), value) for name, value in point.outputs):
                return point
        return None

    def too_large(self) -> dict[str, int]:
        """Return how many elements of each output are too large to move with the leaves, yet have a gradient."""
        gradients = self.gradients(
            {name: mask.to(dict(self.outputs)[name].dtype) for name, mask in self.absorbed.items()}
        )
        reached = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
        return {name: int(mask.sum()) for name, mask in self.absorbed.items()} if reached else {}

    def undifferentiated(self, differentiable: Collection[str]) -> list[str]:
        """Return the names of float outputs that move with the leaves, and are not among the ``differentiable`` ones.

        A value that the program cuts (``detach``) is held fixed beside the point, so it does not move.
        """
        candidates = {name: value for name, value in self.outputs if name not in differentiable}
        if not candidates:
            return []
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for leaf, value in zip(self.runner.leaves, self.values, strict=True):
                leaf.tensor.copy_(value * (1 + _STEP_OF_VALUES * gaussian_like(value, generator)))
        moved = self._replay()
        return [name for name, value in candidates.items() if name in moved and not same_values(value, moved[name])]

    def gradients_rounded(
        self, cotangents: dict[str, Tensor], generator: torch.Generator, ulps: int = 1
    ) -> list[Tensor | None]:
        """Return autograd's gradient with each element of the leaves and of the cotangents moved by about ``ulps``."""

        def rounded(value: Tensor) -> Tensor:
            noise = gaussian_like(value, generator)
            return torch.where(torch.isfinite(value), value * (1 + ulps * torch.finfo(value.dtype).eps * noise), value)

        values = self.values
        try:
            self.values = [rounded(value) for value in values]
            self._resting.clear()
            return self.gradients({name: rounded(cotangent) for name, cotangent in cotangents.items()})
        finally:
            self.values = values
            self._resting.clear()

    def _changes(self, generator: torch.Generator) -> tuple[dict[str, Tensor], float]:
        """Return by how much each output changes as all leaves move by a step, and the step; nothing if all runs fail.

        The step is the largest that finite differences take: of a loss at its minimum the smallest ones show nothing.
        """
        if self._movements is not None:
            return self._movements
        direction = self._direction_of_all(generator)
        self._movements = {}, _STEPS_OF_OUTPUTS[0]
        for step in _STEPS_OF_OUTPUTS:
            self._place_leaves(direction, step)
            moved = self._replay()
            if all(_stays_finite(base, moved.get(name)) for name, base in self._base.items()):
                changes = {
                    name: torch.where(torch.isfinite(base), moved[name] - base, 0).abs()
                    for name, base in self._base.items()
                }
                self._movements = changes, step
                break
        return self._movements

    def _direction_of_all(self, generator: torch.Generator) -> Direction:
        """Return a Gaussian direction in which all leaves move, in units of their scales."""
        parts = [gaussian_like(value, generator) for value in self.values]
        length = math.sqrt(sum(norm(part) ** 2 for part in parts)) or 1.0
        for i, part in enumerate(parts):
            part.mul_(natural_scale(self.values[i]) / length)
            if i in self.infinite:
                part[self.infinite[i]] = 0
        return Direction(list(parts), [])

    def _replay(self) -> dict[str, Tensor]:
        """Return the float outputs with recorded values held fixed, at the leaves' values; empty if that raises."""
        with refusals_ignored():
            # Cloned: an output can be a leaf itself, which moves.
            return {name: t.detach().clone() for name, t in self.runner.beside() if is_float(t)}
        return {}

    def _differentiable_outputs(self) -> dict[str, Tensor]:
        self._place_leaves()
        return {name: t for name, t in self.runner.differentiate() if is_float(t) and t.requires_grad}

    def _vjp(self, outputs: dict[str, Tensor], cotangents: dict[str, Tensor]) -> list[Tensor | None]:
        """Return gradients by ``backward`` into ``.grad``, as in training (reversible nets reject autograd.grad)."""
        with self.runner.promoted():
            # Cloned: a backward that writes to its cotangent would change the objective too.
            torch.autograd.backward(list(outputs.values()), [cotangents[name].clone() for name in outputs])
        return [leaf.take_gradient() for leaf in self.runner.leaves]

    def _place_leaves(self, direction: Direction | None = None, t: float = 0.0) -> None:
        """Write the leaves for the next run: values + t direction. A leaf that still holds its value is not written."""
        self.forwards += 1
        with torch.no_grad():
            for i, (leaf, value) in enumerate(zip(self.runner.leaves, self.values, strict=True)):
                part = direction.parts[i] if direction is not None else None
                if part is not None:
                    torch.add(value, part, alpha=t, out=leaf.tensor)
                    self._resting.pop(i, None)
                elif self.runner.writes or self._resting.get(i) != leaf.tensor._version:
                    leaf.tensor.copy_(value)
                    self._resting[i] = leaf.tensor._version


def _scales(
    outputs: dict[str, Tensor], changes: dict[str, Tensor], step: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the weight of each output element, which elements move as the leaves do, and which are too large to.

    An output weighs by how much it moves, so that each takes an equal part whatever its unit; an element by its own
    rounding, if that is coarser. One that is too large to move at all (``h + mask * finfo.min``) has no weight.
    """
    rates = {name: rms(changes[name]) / step for name in outputs if name in changes}
    smallest = _SMALLEST_SHARE * max(rates.values(), default=0.0)
    scales, moving, absorbed = {}, {}, {}
    for name, value in outputs.items():
        magnitude = torch.where(torch.isfinite(value), value, 0).abs()
        rate = max(rates.get(name, 0.0), smallest) or rms(value) or 1.0
        rounding = torch.finfo(value.dtype).eps
        moving[name] = changes.get(name, torch.ones_like(magnitude)) != 0
        absorbed[name] = ~moving[name] & (rounding * magnitude > 0.1 * step * rate)
        coarse = min(_COARSEST * rounding, _COARSEST_IN_NARROW_DTYPES)
        scales[name] = torch.where(absorbed[name], 0, 1 / (rate + coarse * magnitude))
    if not any(map(torch.any, scales.values())):
        scales = {name: torch.full_like(scale, 1 / (rms(outputs[name]) or 1.0)) for name, scale in scales.items()}
    return scales, moving, _not_empty(absorbed)


def _stays_finite(before: Tensor | None, after: Tensor | None) -> bool:
    """Return whether ``after`` has the shape of ``before``, and finite elements where that has them."""
    if before is None or after is None or before.shape != after.shape:
        return False
    return bool(torch.isfinite(after[torch.isfinite(before)]).all())


def _nonfinite_masks(tensors: Iterable[Tensor | None]) -> dict[int, Tensor]:
    """Return for each tensor with NaN or infinite elements a mask of these, by index."""
    return _not_empty({i: ~torch.isfinite(tensor) for i, tensor in enumerate(tensors) if tensor is not None})


def _not_empty(masks: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
    return {key: mask for key, mask in masks.items() if bool(mask.any())}


def moved_values(
    values: Sequence[Tensor], indices: Collection[int], generator: torch.Generator, size: float
) -> list[Tensor]:
    """Return the leaves' values, those of ``indices`` moved by ``size`` of their scale at random."""
    moved = list(values)
    for i in indices:
        unit = natural_scale(values[i])
        unit = unit if unit != 1.0 else max(rms(values[i]), 0.1)
        step = size * unit * gaussian_like(values[i], generator)
        moved[i] = values[i] + torch.where(torch.isfinite(values[i]), step, 0)
    return moved


def rms(tensor: Tensor) -> float:
    """Return the root mean square of the finite elements, 0 if there is none."""
    finite = tensor[torch.isfinite(tensor)] if not bool(torch.isfinite(tensor).all()) else tensor
    return norm(finite) / math.sqrt(finite.numel()) if finite.numel() else 0.0


def natural_scale(tensor: Tensor) -> float:
    """Return the unit in which a leaf is moved: 1; the rms of tiny values; the spread of large ones, as time stamps."""
    size = rms(tensor)
    if size > _LARGE:
        finite = tensor[torch.isfinite(tensor)]
        spread = rms(finite - finite.mean())
        size = spread if spread > _SMALLEST_SPREAD * size else size
    return 1.0 if size == 0 or _TINY <= size <= _LARGE else size


_TINY, _LARGE = 1e-3, 1e3
# A spread below this is the rounding of equal values.
_SMALLEST_SPREAD = 1e-12
