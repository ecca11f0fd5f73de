"""One part of a program (a torch call, a module, a custom Function) as the oracle judges it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradctl.numerics.judge import Judge
from gradctl.numerics.ladder import central_slope, slope_at_zero
from gradctl.numerics.measures import dense, dot, gaussian_like, norm
from gradctl.numerics.point import Direction
from gradctl.numerics.runner import Outputs, refusals_ignored
from gradctl.subject.instance import Leaf

# A step of 1e-3 has an error of about 1e-12 after one extrapolation where the function is tame, and 1e-13 of rounding.
_STEP = 1e-3
_PLAINLY = 1e-7

# Whose rule is wrong: the VJP (forward mode agrees with finite differences), both, or unknown.
Vote = Literal["vjp", "both"] | None
Cotangents = Callable[[list[Tensor]], list[Tensor]]


class Part:
    """A function of its leaves, which are copies; a ``Runner`` without cuts unless a subclass records some."""

    extra = 0.0
    writes = False
    leaves: Sequence[Leaf]

    def evaluate(self, tensors: Sequence[Tensor]) -> Outputs:
        """Return the outputs at these tensors in place of the leaves."""
        raise NotImplementedError

    def differentiate(self) -> Outputs:
        """Return the outputs with their graph. The leaves are cloned, because a part may write to its inputs."""
        with torch.enable_grad():
            return self.evaluate([leaf.tensor.clone() for leaf in self.leaves])

    def record(self) -> Outputs:
        """Return the outputs at the point."""
        return self.differentiate()

    def beside(self) -> Outputs:
        """Return the outputs beside the point."""
        return self.differentiate()

    def promoted(self) -> AbstractContextManager[None]:
        """Return the context of a backward."""
        return nullcontext()

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the leaves."""
        return max((torch.finfo(leaf.tensor.dtype).eps for leaf in self.leaves), default=torch.finfo(torch.float64).eps)

    def pull(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the VJP, dense, by leaf; None for a leaf without one."""
        with self.promoted():
            found = torch.autograd.grad(
                outputs, [leaf.tensor for leaf in self.leaves], list(cotangents), allow_unused=True
            )
            return [dense(gradient) for gradient in found]

    def push(self, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return J times the tangents by output name, in forward mode; raises if there is no rule for that."""
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, v) for p, v in zip(primals, tangents, strict=True)]  # type: ignore[no-untyped-call]
            pushed = {name: forward_ad.unpack_dual(t).tangent for name, t in self.evaluate(duals)}  # type: ignore[no-untyped-call]
        return {name: tangent for name, tangent in pushed.items() if tangent is not None}

    def is_plainly_right(self, seed: int) -> bool:
        """Tell a part that is right, or has no gradient: 4 forwards along one direction over all its leaves.

        Any doubt (a kink, noise, a leaf without gradient that has a slope) is left to a ``Judge``, which is ten times
        as expensive.
        """
        generator = torch.Generator().manual_seed(seed)
        outputs = differentiable(self.differentiate())
        if not outputs:
            return True
        cotangents = {name: gaussian_like(t, generator) for name, t in outputs.items()}
        start = {name: t.detach().clone() for name, t in outputs.items()}
        gradients = self.pull(list(outputs.values()), [w.clone() for w in cotangents.values()])
        norms = [0.0 if gradient is None else norm(gradient) for gradient in gradients]
        directions = self._directions(norms, generator)
        slope = self._slope(directions, cotangents, start)
        stated = sum(dot(g, v) for g, v in zip(gradients, directions, strict=True) if g is not None)
        typical = sum((s * norm(v)) ** 2 / max(v.numel(), 1) for s, v in zip(norms, directions, strict=True)) ** 0.5
        return bool(abs(slope - stated) <= _PLAINLY * typical)

    def _directions(self, norms: Sequence[float], generator: torch.Generator) -> list[Tensor]:
        """Return one direction over all leaves, of unit norm.

        As in the joint screen, each leaf has an equal share of the slope, one without a gradient that of the largest.
        """
        largest = max(norms) or 1.0
        directions = [
            gaussian_like(leaf.tensor, generator) / ((leaf.tensor.numel() or 1) ** 0.5 * (size or largest))
            for leaf, size in zip(self.leaves, norms, strict=True)
        ]
        return _normalized(directions)

    def _slope(self, directions: Sequence[Tensor], cotangents: dict[str, Tensor], start: dict[str, Tensor]) -> float:
        """Return the finite difference of <cotangents, outputs - start> along the directions."""
        points = [leaf.tensor.detach().clone() for leaf in self.leaves]
        self.record()

        def phi(t: float) -> float:
            self.place([point + t * v for point, v in zip(points, directions, strict=True)])
            values = dict(self.beside())
            return sum(dot(w, values[name].detach() - start[name]) for name, w in cotangents.items())

        try:
            return central_slope(phi, _STEP)
        finally:
            self.place(points)

    def place(self, values: Sequence[Tensor]) -> None:
        """Write the leaves."""
        with torch.no_grad():
            for leaf, value in zip(self.leaves, values, strict=True):
                leaf.tensor.copy_(value)


def differentiable(outputs: Outputs) -> dict[str, Tensor]:
    """Return the outputs that a dense cotangent can be given for."""
    return {name: t for name, t in outputs if t.requires_grad and t.layout == torch.strided}


def gaussian(outputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Return Gaussian cotangents, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    return [gaussian_like(t, generator) for t in outputs]


def expanded(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return cotangents with stride 0, as ``sum`` gives them."""
    return [torch.full((), 0.7, dtype=t.dtype, device=t.device).expand(t.shape) for t in outputs]


def forward_mode_vote(judge: Judge, push: Callable[[Sequence[Tensor], Sequence[Tensor]], dict[str, Tensor]]) -> Vote:
    """Return whose rule is wrong, if reverse mode is known to be; None if forward mode has no rule.

    Along one random direction v, <w, J v> from forward mode is compared with the finite difference.
    """
    point, sample = judge.point, judge.samples[0]
    tangents = _random_direction(judge)
    pushed: dict[str, Tensor] | None = None
    with refusals_ignored():  # no rule, or a wrong one that raises
        pushed = push([value.clone() for value in point.values], tangents)
    if pushed is None:
        return None
    for name in sample.finite.keys() & pushed.keys():
        pushed[name] = torch.where(sample.finite[name], pushed[name], 0)
    products = [(w, pushed[name]) for name, w in sample.cotangents.items() if name in pushed]
    stated = sum(dot(w, tangent) for w, tangent in products)
    weight = sum(norm(w) * norm(tangent) for w, tangent in products)
    slope = slope_at_zero(point.along(Direction(list(tangents), []), sample), judge.noise, weight, judge.epsilon)
    if not slope.usable:
        return None
    return "vjp" if abs(stated - slope.derivative) <= 10 * slope.error + 64 * judge.epsilon * weight else "both"


def _random_direction(judge: Judge) -> list[Tensor]:
    """Return a direction over all leaves, of unit norm and zero where a value is not finite."""
    tangents = [gaussian_like(value, judge.generator) for value in judge.point.values]
    for i, mask in judge.point.infinite.items():
        tangents[i] = torch.where(mask, 0, tangents[i])
    return _normalized(tangents)


def _normalized(directions: Sequence[Tensor]) -> list[Tensor]:
    """Return the directions, scaled together to unit norm."""
    length = sum(norm(v) ** 2 for v in directions) ** 0.5 or 1.0
    return [v / length for v in directions]
