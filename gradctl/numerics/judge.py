"""Is this gradient the derivative? Joint probes over all tensors first, tensor by tensor on alarm.

A probe compares autograd's <g, v> with a finite difference along a Gaussian direction v of unit norm. In the joint
screen each tensor's part is divided by its gradient's norm, so that a small wrong one cannot hide behind large ones;
tensors whose gradient is zero or nearly so share a probe of their own, where a slope is a lost gradient.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gradctl.numerics.ladder import Slope, noise_floor, slope_at_zero
from gradctl.numerics.measures import dot, gaussian_like, norm
from gradctl.numerics.point import Direction, Point, Sample, natural_scale
from gradctl.numerics.runner import Runner

__all__ = ["Judge", "Probe", "TensorJudgement"]

Verdict = Literal["same", "approximate", "wrong", "missing", "unresolved"]

# A tensor whose gradient is this much smaller than the largest is zero but for rounding (a bias before BatchNorm).
_QUIET = 1e-10
# Within one joint probe gradients differ by no more than this, or the direction would be the smallest tensor's alone.
_SPREAD = 1e-4
_STEPS_OFF = 3
_APPROXIMATE = 1e-4
_MORE_PROBES = 6
# A tensor in which an error of 1 % would be missed more often than this by the joint probes gets probes of its own;
# where even those would miss it every second time, nothing was judged.
_WEAK = 1e-2
_BLIND = 0.5


@dataclass(frozen=True, slots=True)
class Probe:
    """One comparison along one direction.

    Attributes:
        slope: the finite difference.
        predicted: <g, v>, which autograd says.
        tolerance: what the finite difference and rounding leave open: 10 err + 64 eps ||g|| ||v||.
        lengths: the norm of the direction's part, by index of the tensor.
    """

    slope: Slope
    predicted: float
    tolerance: float
    lengths: dict[int, float]

    @property
    def difference(self) -> float:
        """How far autograd is from the finite difference along this direction, signed."""
        return self.slope.derivative - self.predicted

    @property
    def alarms(self) -> bool:
        """Whether the two disagree."""
        return abs(self.difference) > self.tolerance


@dataclass(frozen=True, slots=True)
class TensorJudgement:
    """The verdict on the tensor with this index among the leaves.

    ``error`` is relative to the finite difference's norm, ``budget`` relative to the gradient's; both estimated from
    the probes, None where only the joint screen has judged.
    """

    index: int
    verdict: Verdict
    error: float | None = None
    budget: float | None = None


class Judge:
    """Judges the gradients of ``runner`` at the present values of its leaves.

    Args:
        runner: what to judge.
        seed: for cotangents and directions.
        probes: joint probes, and probes a tensor.
        rtol, atol: accept an error of a tensor up to atol + rtol ||g||, in Euclidean norm, whatever the probes resolve.
        epsilon: machine epsilon of the dtype in which the function really computes.
        sizes: whether the size of an error is asked for, and not only whether it is one.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        seed: int,
        probes: int = 2,
        rtol: float | None = None,
        atol: float | None = None,
        epsilon: float = torch.finfo(torch.float64).eps,
        sizes: bool = True,
    ) -> None:
        self.point = Point(runner)
        self.origin = self.point
        self.scales = [natural_scale(value) for value in self.origin.values]
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.rtol, self.atol, self.epsilon, self.probes = rtol, atol, epsilon, probes
        self.sizes = sizes
        self.steps_off = 0
        self._resolved_beside = False
        self.noise = math.nan
        self.samples: list[Sample] = []
        self._draw_samples()

    @property
    def kinked(self) -> bool:
        """Whether the judging was done beside the point, which is a kink, and resolved there what it did not at it."""
        return self._resolved_beside

    @property
    def relative_noise(self) -> float:
        """The noise floor relative to the size of the objective."""
        size = math.sqrt(sum(c.numel() for c in self.samples[0].cotangents.values()))
        return self.noise / size if size else self.noise

    # ------------------------------------------------------------------ the joint screen

    def screen(self, indices: Sequence[int]) -> tuple[list[int], float]:
        """Return the tensors that want probes of their own, and the chance that 1 % was missed in one of the others.

        Those are the tensors of a group that alarms or stays unresolved, and those that the joint probes barely see.
        """
        suspects: set[int] = set()
        chances: dict[int, float] = {}
        for number in range(self.probes):
            for group, is_quiet in self._groups([i for i in indices if i not in suspects]):
                probe = self.probe(group, number)
                if probe.alarms or not probe.slope.resolved:
                    suspects.update(group)
                elif not is_quiet:
                    for i in group:
                        chances[i] = chances.get(i, 1.0) * self._chance_missed(probe, number, i)
        suspects.update(i for i, chance in chances.items() if chance > _WEAK)
        return sorted(suspects), max((chance for i, chance in chances.items() if i not in suspects), default=0.0)

    def _groups(self, indices: Sequence[int]) -> list[tuple[list[int], bool]]:
        """Return groups of tensors with gradients of similar size, and last those with none to speak of."""
        loud = sorted((i for i in indices if not self._is_quiet(i)), key=lambda i: -self._size(i))
        groups: list[tuple[list[int], bool]] = []
        for i in loud:
            if not groups or self._size(i) < _SPREAD * self._size(groups[-1][0][0]):
                groups.append(([], False))
            groups[-1][0].append(i)
        quiet = [i for i in indices if self._is_quiet(i)]
        return [*groups, (quiet, True)] if quiet else groups

    def _size(self, i: int) -> float:
        """Return how much the objective changes as leaf ``i`` moves by its own scale."""
        return self.scales[i] * max(sample.norms[i] for sample in self.samples)

    def _is_quiet(self, i: int) -> bool:
        return self._size(i) <= _QUIET * max(map(self._size, range(len(self.scales))))

    def _chance_missed(self, probe: Probe, number: int, i: int, of_error: float = 0.01) -> float:
        """Return P(an error of 1 % in tensor ``i`` stays below this probe's tolerance): Gaussian, unit norm."""
        size, count = self.samples[number].norms[i], self.origin.values[i].numel()
        seen = of_error * size * probe.lengths[i]
        return min(1.0, math.sqrt(2 / math.pi) * probe.tolerance * math.sqrt(count) / seen) if seen else 1.0

    # ------------------------------------------------------------------ tensor by tensor

    def each(self, indices: Iterable[int]) -> tuple[dict[int, TensorJudgement], float]:
        """Return a verdict on each tensor by probes of its own, and the chance that 1 % was missed in one of them."""
        judged, missed = {}, 0.0
        for i in indices:
            probes = []
            for number in range(self.probes):
                probes.append(self.probe([i], number))
            judged[i] = self._weigh(i, self._enough(i, probes))
            if judged[i].verdict == "same" and not self._is_quiet(i):
                chance = math.prod(self._chance_missed(probe, number, i) for number, probe in enumerate(probes))
                if chance > _BLIND:
                    judged[i] = replace(judged[i], verdict="unresolved")
                else:
                    missed = max(missed, chance)
        return judged, missed

    def _weigh(self, i: int, probes: list[Probe]) -> TensorJudgement:
        count = math.sqrt(self.origin.values[i].numel())
        size = self._size(i)
        wrong_by = count * math.sqrt(sum(p.difference**2 for p in probes) / len(probes))
        slope = count * math.sqrt(sum(p.slope.derivative**2 for p in probes) / len(probes))
        tolerance = count * max(p.tolerance for p in probes)
        error = wrong_by / slope if slope else wrong_by
        budget = tolerance / size if size else tolerance
        if not all(math.isfinite(p.slope.error) for p in probes):
            return TensorJudgement(i, "unresolved", None, None)
        if not any(p.alarms and p.slope.usable for p in probes):
            verdict: Verdict = "same" if all(p.slope.resolved for p in probes) else "unresolved"
            return TensorJudgement(i, verdict, error, budget)
        if self._is_accepted(wrong_by / self.scales[i], size / self.scales[i]):
            return TensorJudgement(i, "same", error, budget)
        if all(sample.gradients[i] is None for sample in self.samples):
            return TensorJudgement(i, "missing", 1.0, budget)
        return TensorJudgement(i, "approximate" if wrong_by < _APPROXIMATE * size else "wrong", error, budget)

    def _enough(self, i: int, probes: list[Probe]) -> list[Probe]:
        """Return the probes, and more where the size of a small error decides: two can be small by chance."""
        alarmed = any(probe.alarms for probe in probes) and not self._is_quiet(i)
        differences = math.sqrt(sum(p.difference**2 for p in probes) / len(probes) * self.origin.values[i].numel())
        margin = 1e3 if self.sizes else 10  # one probe falls below a tenth of the error one time in twelve
        if not alarmed or differences > margin * _APPROXIMATE * self._size(i):
            return probes
        return [*probes, *(self.probe([i], number % len(self.samples)) for number in range(_MORE_PROBES))]

    def _is_accepted(self, wrong_by: float, size: float) -> bool:
        if self.rtol is None and self.atol is None:
            return False
        return wrong_by <= (self.atol or 0.0) + (self.rtol or 0.0) * size

    # ------------------------------------------------------------------ one probe

    def probe(self, indices: Sequence[int], number: int) -> Probe:
        """Return one comparison along a random direction over ``indices``, beside the point if it is at a kink."""
        while True:
            sample = self.samples[number]
            quiet = all(map(self._is_quiet, indices))
            direction = self._direction(indices, sample, equal_lengths=quiet)
            scale = self._typical_slope(sample) if quiet else self._expected_slope(indices, sample, direction)
            phi = self.point.along(direction, sample)
            slope = slope_at_zero(phi, self.noise, scale, self.epsilon)
            probe = self._compared(indices, sample, direction, slope)
            if probe.alarms and slope.resolved:  # make sure, before anybody is called wrong
                slope = slope_at_zero(phi, self.noise, scale, self.epsilon, to_the_end=True)
                probe = self._compared(indices, sample, direction, slope)
            if not slope.kinked or self.steps_off >= _STEPS_OFF:
                self._resolved_beside |= self.steps_off > 0 and slope.resolved
                return probe
            self._step_off()

    def _expected_slope(self, indices: Sequence[int], sample: Sample, direction: Direction) -> float:
        """Return the standard deviation of <g, v> over directions like this one."""
        return math.sqrt(
            sum((sample.norms[i] * direction.lengths[i]) ** 2 / max(self.origin.values[i].numel(), 1) for i in indices)
        )

    def _typical_slope(self, sample: Sample) -> float:
        """Return the slope that a tensor with a gradient typically has: what a lost gradient is measured by."""
        loud = [i for i in range(len(sample.norms)) if not self._is_quiet(i)]
        return (
            statistics.median(self.scales[i] * sample.norms[i] / math.sqrt(self.origin.values[i].numel()) for i in loud)
            if loud
            else 0.0
        )

    def _compared(self, indices: Sequence[int], sample: Sample, direction: Direction, slope: Slope) -> Probe:
        predicted, rounding = 0.0, 0.0
        for i in indices:
            gradient, part = sample.gradients[i], direction.parts[i]
            if gradient is not None and part is not None:
                predicted += dot(gradient, part)
                rounding += sample.norms[i] * direction.lengths[i]
        tolerance = 10 * slope.error + 64 * self.epsilon * rounding
        return Probe(slope, predicted, tolerance, {i: direction.lengths[i] for i in indices})

    def _direction(self, indices: Sequence[int], sample: Sample, *, equal_lengths: bool) -> Direction:
        """Return Gaussian parts, each of length 1 / ||g_t||, or all equal; then all scaled to unit norm together.

        Lengths count in units of the leaves' natural scales.
        """
        parts: list[Tensor | None] = [None] * len(self.point.values)
        lengths = [0.0] * len(parts)
        weights = {i: 1.0 if equal_lengths else 1 / (self.scales[i] * sample.norms[i] or 1.0) for i in indices}
        total = math.sqrt(sum(weight**2 for weight in weights.values()))
        for i in indices:
            part = gaussian_like(self.point.values[i], self.generator)
            for unusable in (self.point.infinite.get(i), sample.broken.get(i)):
                part = part if unusable is None else torch.where(unusable, 0, part)
            lengths[i] = self.scales[i] * weights[i] / total
            parts[i] = part.mul_(lengths[i] / (norm(part) or 1.0))
        return Direction(parts, lengths)

    def _step_off(self) -> None:
        self.steps_off += 1
        point = self.origin.moved(self.generator)
        point.forwards = self.point.forwards + point.forwards - self.origin.forwards
        self.point = point
        self._draw_samples()

    def _draw_samples(self) -> None:
        self.samples = []  # freed before the new ones are made: a sample is a copy of all gradients
        self.samples = [self.point.sample(self.generator) for _ in range(self.probes)]
        indices = [i for i, value in enumerate(self.point.values) if value.numel()]
        direction = self._direction(indices, self.samples[0], equal_lengths=True)
        self.noise = noise_floor(self.point.along(direction, self.samples[0]))
