"""A function of float64 leaves at one point: random cotangents, autograd's gradient, values along a direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradctl.numerics.measures import dot, gaussian_like, norm, relative_error
from gradctl.numerics.runner import Outputs, Runner
from gradctl.subject.frames import is_out_of_memory

__all__ = ["Direction", "NoGradient", "Point", "Sample", "natural_scale", "rms"]

# Outputs of one model can differ by many decades (energies and forces); each takes an equal part, but rounding noise
# around zero is not blown up to the size of the others.
_SMALLEST_SHARE = 1e-8


class NoGradient(Exception):
    """No output asks for a gradient."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One random cotangent for each output that has a gradient, and the VJP that autograd makes of it.

    ``finite`` marks, by output name, elements that take part (a logit masked with -inf takes none). ``broken``
    marks, by index of the leaf, elements whose gradient is NaN or infinite; in ``gradients`` they are 0.
    """

    cotangents: dict[str, Tensor]
    finite: dict[str, Tensor]
    gradients: list[Tensor | None]
    norms: list[float]
    broken: dict[int, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """A direction of unit norm in the space of the leaves: one part a leaf, None for leaves that rest."""

    parts: list[Tensor | None]
    lengths: list[float]


class Point:
    """``runner`` at the present values of its leaves.

    Attributes:
        values: the leaves' values at the point.
        infinite: by index, where a leaf's value is not finite (a mask of -inf): no direction moves there.
        outputs: names and values of the float outputs at the point.
        forwards: how often the function was run.
        consistent: whether replaying at the point itself gives what was recorded there.
    """

    def __init__(self, runner: Runner, values: list[Tensor] | None = None) -> None:
        self.runner = runner
        self.values = values or [leaf.tensor.detach().clone() for leaf in runner.leaves]
        masks = {i: ~torch.isfinite(value) for i, value in enumerate(self.values)}
        self.infinite = {i: mask for i, mask in masks.items() if bool(mask.any())}
        self.forwards = 0
        self._resting: dict[int, int] = {}  # version counter of each leaf that holds its value: others write to it too
        self.outputs: Outputs = self.record()
        self._place(None, 0.0)
        self.forwards += 1
        again = self._replayed()
        self.consistent = all(
            name in again and relative_error(value, again[name]) < 1e-9 for name, value in self.outputs
        )

    def record(self) -> Outputs:
        """Return the float outputs at the point, and have the runner note anew what must be held fixed beside it."""
        self._place(None, 0.0)
        self.forwards += 1
        # Cloned: an output can be a leaf itself, which moves.
        return [(name, t.detach().clone()) for name, t in self.runner.record() if _is_float(t)]

    def sample(self, generator: torch.Generator) -> Sample:
        """Return Gaussian cotangents and autograd's gradient of them.

        Raises:
            NoGradient: no output has a graph.
        """
        outputs = self._differentiable_outputs()
        if not outputs:
            raise NoGradient
        sizes = {name: rms(t.detach()) for name, t in outputs.items()}
        largest = max(sizes.values())
        cotangents, finite = {}, {}
        for name, output in outputs.items():
            share = max(sizes[name], _SMALLEST_SHARE * largest) or 1.0
            cotangents[name] = gaussian_like(output, generator) / share
            mask = torch.isfinite(output.detach())
            if not bool(mask.all()):
                finite[name] = mask
                cotangents[name] = torch.where(mask, cotangents[name], 0)
        gradients = self._vjp(outputs, cotangents)
        broken = {}
        for i, gradient in enumerate(gradients):
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                broken[i] = ~torch.isfinite(gradient)
                gradients[i] = torch.where(broken[i], 0, gradient)
        norms = [norm(gradient) if gradient is not None else 0.0 for gradient in gradients]
        return Sample(cotangents, finite, gradients, norms, broken)

    def gradients(self, cotangents: dict[str, Tensor], generator: torch.Generator | None = None) -> list[Tensor | None]:
        """Return autograd's gradient of the given cotangents; ``generator`` draws those that are missing."""
        outputs = self._differentiable_outputs()
        if generator is not None:
            missing = {name: gaussian_like(t, generator) for name, t in outputs.items() if name not in cotangents}
            cotangents = cotangents | missing
        return self._vjp({name: t for name, t in outputs.items() if name in cotangents}, cotangents)

    def along(self, direction: Direction, sample: Sample) -> Callable[[float], float]:
        """Return phi(t) = <cotangents, outputs(values + t direction)>; NaN where the function is not to be had."""

        def phi(t: float) -> float:
            self._place(direction, t)
            self.forwards += 1
            try:
                outputs = dict(self.runner.beside())
            except Exception as error:  # the model may refuse a value beside the point (a probability above 1)
                if is_out_of_memory(error):
                    raise
                return math.nan
            total = self.runner.extra
            for name, cotangent in sample.cotangents.items():
                output = outputs.get(name)
                if output is None or output.shape != cotangent.shape:
                    return math.nan
                output = output.detach().to(cotangent.dtype)
                total += dot(
                    cotangent, torch.where(sample.finite[name], output, 0) if name in sample.finite else output
                )
            return total

        return phi

    def moved(self, generator: torch.Generator) -> Point:
        """Return the point beside this one, every leaf moved by 1e-3 of its rms (1e-4 at least): off a kink."""
        values = []
        for value in self.values:
            size = 1e-3 * natural_scale(value) if natural_scale(value) != 1.0 else max(1e-3 * rms(value), 1e-4)
            values.append(value + torch.where(torch.isfinite(value), size * gaussian_like(value, generator), 0))
        point = Point(self.runner, values)
        point.forwards += self.forwards
        return point

    def _replayed(self) -> dict[str, Tensor]:
        """Return the outputs with what was recorded held fixed, at the point itself; nothing if that raises."""
        try:
            return dict(self.runner.beside())
        except Exception as error:  # a replay of a program that hides what it does may raise anything
            if is_out_of_memory(error):
                raise
            return {}

    def _differentiable_outputs(self) -> dict[str, Tensor]:
        self._place(None, 0.0)
        self.forwards += 1
        return {name: t for name, t in self.runner.differentiate() if _is_float(t) and t.requires_grad}

    def _vjp(self, outputs: dict[str, Tensor], cotangents: dict[str, Tensor]) -> list[Tensor | None]:
        """Take gradients as training takes them: ``backward`` into ``.grad`` (reversible nets refuse autograd.grad)."""
        with self.runner.promoted():
            # Cloned: a backward that writes to its cotangent would change the objective too.
            torch.autograd.backward(list(outputs.values()), [cotangents[name].clone() for name in outputs])
        return [leaf.take_gradient() for leaf in self.runner.leaves]

    def _place(self, direction: Direction | None, t: float) -> None:
        """Write the leaves for one run: values + t direction. What still holds its value is left as it is."""
        with torch.no_grad():
            for i, (leaf, value) in enumerate(zip(self.runner.leaves, self.values, strict=True)):
                part = direction.parts[i] if direction is not None else None
                if part is not None:
                    torch.add(value, part, alpha=t, out=leaf.tensor)
                    self._resting.pop(i, None)
                elif self.runner.writes or self._resting.get(i) != leaf.tensor._version:
                    leaf.tensor.copy_(value)
                    self._resting[i] = leaf.tensor._version


def rms(tensor: Tensor) -> float:
    """Return the root mean square of the finite elements, 0 if there is none."""
    finite = tensor[torch.isfinite(tensor)] if not bool(torch.isfinite(tensor).all()) else tensor
    return norm(finite) / math.sqrt(finite.numel()) if finite.numel() else 0.0


def natural_scale(tensor: Tensor) -> float:
    """Return the unit in which a leaf is moved: 1, or the rms of a leaf whose values are all large or all tiny."""
    size = rms(tensor)
    return 1.0 if size == 0 or 1e-3 <= size <= 1e3 else size


def _is_float(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and (tensor.is_floating_point() or tensor.is_complex())
