"""A point at which gradients are judged: how large they are there, its kinks, and one probe of a few tensors.

A probe compares autograd's <g, v> with a finite difference along a Gaussian direction v of unit norm. In the joint
screen tensors of similar gradients form a group, each tensor's part divided by its gradient's norm, so that a small
wrong one cannot hide behind large ones; small gradients are probed along themselves too, which costs them no factor of
sqrt(n). Tensors without gradient share a probe of their own, where a slope is a lost gradient.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from gradctl.numerics.ladder import LARGEST_STEP, Slope, central_slope, noise_floor, slope_at_zero
from gradctl.numerics.measures import dot, gaussian_like, norm
from gradctl.numerics.point import Direction, Point, Sample

Where = Literal["here", "beside", "away"]

# Within one joint probe gradients differ by no more than this, or the direction would be the smallest tensor's alone.
_SPREAD = 1e-4
# A gradient below this (of an objective that moves by about 1 with its leaves) is probed along itself, and from larger
# steps: float64 resolves it down to about 1e-12.
_SMALL = 1e-7
_LARGEST_STEP_OF_SMALL = 0.49
# Beside a kink, 1e-3 away, larger steps would meet it again.
_PART_BESIDE = 1 / 128
# A disagreement this many times the tolerance is plain.
_PLAINLY = 30
# So many times the leaves are moved by a few ULPs to see how their gradients are rounded.
_ROUNDED = 4
# A tensor in which an error of 1 % would be missed more often than this by the joint probes gets probes of its own.
WEAK = 1e-2
# The second difference of a smooth function at this step is about 1e-5 of its slope; at a kink it is the kink.
_KINK_STEP = 1e-5
_KINKED = 1e-3
# The search for tensors with a kink ends after this many directions of two forwards each; the rest count as kinked.
_MOST_DIRECTIONS = 64
# Slopes at this step add up to this part where the function is smooth: a tie is met only within the step.
_LINEAR_STEP = 1e-6
_LINEAR = 1e-5
# What a change by one ULP does to a gradient counts as rounding up to this; a kink does more.
_LARGEST_ROUNDING = 1e-9
# A gradient that one ULP of the leaves changes by this part is zero by cancellation.
_CANCELLED = 1e-2


@dataclass(frozen=True, slots=True)
class Probe:
    """One comparison of autograd with a finite difference along one direction."""

    slope: Slope
    predicted: float  # <g, v>, by autograd
    tolerance: float  # of the difference: 10 err + 64 eps ||g|| ||v||
    lengths: dict[int, float]  # the norm of the direction's part, by index of the tensor

    @property
    def difference(self) -> float:
        """How far autograd is from the finite difference along this direction, signed."""
        return self.slope.derivative - self.predicted

    @property
    def alarms(self) -> bool:
        """Whether the two disagree."""
        return abs(self.difference) > self.tolerance

    @property
    def agrees(self) -> bool:
        """Whether the finite difference is resolved, and autograd agrees with it."""
        return self.slope.resolved and not self.alarms


@dataclass(slots=True, eq=False)
class Site:
    """A point at which tensors are judged, with random cotangents, their gradients, and the noise of the objective."""

    point: Point
    where: Where
    generator: torch.Generator  # of cotangents and directions
    scales: list[float]  # of the leaves
    epsilon: float  # machine epsilon of the dtype in which the function really computes
    points: list[Point]  # those of all sites of one judge, this one included
    samples: list[Sample] = field(default_factory=list)
    noise: float = math.nan  # standard deviation of the objective's noise, absolute
    step: float | None = None  # one that resolved a joint probe
    _ulp_changes: list[float] | None = None

    def draw(self, probes: int) -> Site:
        """Return this site with so many random samples and its noise."""
        self.points.append(self.point)
        self.samples = [self.point.sample(self.generator) for _ in range(probes)]
        indices = [i for i, value in enumerate(self.point.values) if value.numel()]
        direction = self.direction(indices, self.samples[0], equal_lengths=True)
        self.noise = noise_floor(self.point.along(direction, self.samples[0]))
        return self

    def enter(self) -> Site:
        """Return this site after its cuts and linear maps were recorded anew, where those of another may stand."""
        if len(self.points) > 1:
            self.point.record()
        return self

    @property
    def unit(self) -> float:
        """The size of the objective: gradients and errors are small relative to it."""
        sample = self.samples[0]
        return max(sample.size, math.sqrt(sum(c.numel() for c in sample.cotangents.values())), 1.0)

    def groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Return groups of tensors with gradients of similar size, and last those that have none."""
        loud = sorted((i for i in indices if not self.is_silent(i)), key=lambda i: -self.size(i))
        groups: list[list[int]] = []
        for i in loud:
            if not groups or self.size(i) < _SPREAD * self.size(groups[-1][0]):
                groups.append([])
            groups[-1].append(i)
        silent = [i for i in indices if self.is_silent(i)]
        return [*groups, silent] if silent else groups

    def size(self, i: int) -> float:
        """Return how much the objective changes as leaf ``i`` moves by its own scale."""
        return self.scales[i] * max(sample.norms[i] for sample in self.samples)

    def has_gradient(self, i: int) -> bool:
        """Return whether autograd returns a gradient for a tensor, be it zero."""
        return any(sample.gradients[i] is not None for sample in self.samples)

    def is_silent(self, i: int) -> bool:
        """Return whether a tensor has no gradient, or zero."""
        return self.size(i) == 0

    def is_small(self, i: int) -> bool:
        """Return whether a gradient is so small that it is probed along itself."""
        return 0 < self.size(i) < _SMALL * self.unit

    def is_at_kink(self, probe: Probe, group: Sequence[int]) -> bool:
        """Return whether a probe shows a kink or resolves nothing, though its gradients are not negligible."""
        return probe.slope.kinked and not self.is_negligible(probe, group[0])

    def is_negligible(self, probe: Probe, i: int) -> bool:
        """Return whether gradients are small or zero, and the finite difference allows no larger one."""
        largest = max(probe.slope.error, 0.0 if self.is_small(i) else abs(probe.slope.derivative))
        return (self.is_small(i) or self.is_silent(i)) and largest < _SMALL * self.unit

    def is_judged_by(self, probe: Probe, i: int) -> bool:
        """Return whether a probe of one tensor alone resolves it."""
        if self.is_small(i):
            return not self.is_beyond_sight(probe, i, 1)
        return probe.slope.resolved or (self.is_silent(i) and self.is_negligible(probe, i))

    def is_beyond_sight(self, probe: Probe, i: int, members: int) -> bool:
        """Return whether no probe would resolve an error of 1 % in a small gradient, even along itself and alone."""
        seen = 0.01 * self.size(i) * min(1.0, probe.lengths[i] / self.scales[i] * members)
        return self.is_small(i) and seen < probe.tolerance

    def chance_missed(self, probe: Probe, number: int, i: int) -> float:
        """Return P(an error of 1 % in tensor ``i`` stays below this probe's tolerance): Gaussian, unit norm."""
        size, count = self.samples[number].norms[i], self.point.values[i].numel()
        seen = 0.01 * size * probe.lengths[i] / (math.sqrt(2) if self.is_small(i) else 1)
        return min(1.0, math.sqrt(2 / math.pi) * probe.tolerance * math.sqrt(count) / seen) if seen else 1.0

    def with_kinks(self, group: Sequence[int]) -> set[int]:
        """Return the tensors of a group along which the function has a kink: by halves, two forwards a direction."""
        found: set[int] = set()
        pending, left = [list(group)], _MOST_DIRECTIONS
        while pending:
            part = pending.pop()
            if left and not self._has_kink(part):
                left -= 1
                continue
            left -= left > 0
            if len(part) == 1 or not left:
                found.update(part)
            else:
                pending += [part[: len(part) // 2], part[len(part) // 2 :]]
        return found

    def _has_kink(self, indices: Sequence[int]) -> bool:
        """Return whether the one-sided slopes along a direction differ at a step that is small to a smooth function."""
        sample = self.samples[0]
        silent = self.is_silent(indices[0])
        direction = self.direction(indices, sample, equal_lengths=silent)
        phi = self.point.along(direction, sample)
        forward, backward = phi(_KINK_STEP), phi(-_KINK_STEP)
        slope = max(abs(forward), abs(backward)) / _KINK_STEP
        rounding = self.epsilon * max(sample.size, abs(forward), abs(backward))
        floor = 20 * self._noise_at_least(rounding) / _KINK_STEP
        second = abs(forward + backward) / _KINK_STEP
        return not second <= _KINKED * slope + floor

    def _noise_at_least(self, least: float) -> float:
        return max(self.noise if math.isfinite(self.noise) else 0.0, least)

    def is_linear(self, i: int) -> bool:
        """Return whether the slopes along v and w add up to that along v + w: at a tie of a median they do not.

        There the function is odd along each line, so that no second difference shows the kink.
        """
        self.enter()
        sample = self.samples[0]
        v, w = (self.direction([i], sample, equal_lengths=True).parts[i] for _ in range(2))
        assert v is not None and w is not None
        along_v, along_w, along_both = (
            central_slope(self.point.along(self.point.along_leaf(i, part), sample), _LINEAR_STEP)
            for part in (v, w, v + w)
        )
        noise = self._noise_at_least(self.epsilon * sample.size)
        allowed = _LINEAR * (abs(along_v) + abs(along_w)) + 20 * noise / _LINEAR_STEP
        return not abs(along_both - along_v - along_w) > allowed

    def is_too_small(self, i: int, probes: Sequence[Probe], *, is_judged: bool) -> bool:
        """Return whether a gradient that no probe contradicts is too small, rather than unresolved."""
        if self.is_small(i):
            return all(self.is_negligible(probe, i) for probe in probes)
        return not is_judged and not self.is_silent(i) and self.is_cancelled(i)

    def is_rounding(self, i: int, probes: Sequence[Probe]) -> bool:
        """Return whether an error is rounding: one ULP of the leaves changes the gradient by as much.

        An example is the weight of a LayerNorm over one element, whose true gradient is zero.
        """
        noise = self.ulp_changes()[i]
        return self._is_tiny(i) and all(abs(probe.difference) <= 10 * noise * probe.lengths[i] for probe in probes)

    def is_cancelled(self, i: int) -> bool:
        """Return whether a gradient is zero by cancellation: one ULP of the leaves changes much of it."""
        return self._is_tiny(i) and self.scales[i] * self.ulp_changes()[i] > _CANCELLED * self.size(i)

    def _is_tiny(self, i: int) -> bool:
        """Return whether rounding explains the change by one ULP, which is larger at a kink."""
        return self.scales[i] * self.ulp_changes()[i] < _LARGEST_ROUNDING * self.unit

    def ulp_changes(self) -> list[float]:
        """Return by how much (Euclidean norm) each gradient changes as all leaves move by a few ULPs; measured once.

        The largest of some samples: in one of them two roundings can be the same by chance.
        """
        if self._ulp_changes is None:
            point, sample = self.enter().point, self.samples[0]
            self._ulp_changes = [0.0] * len(sample.gradients)
            for ulps in range(1, _ROUNDED + 1):
                changed = point.gradients_rounded(sample.cotangents, self.generator, ulps)
                for i, (before, now) in enumerate(zip(sample.gradients, changed, strict=True)):
                    if before is not None and now is not None:
                        self._ulp_changes[i] = max(self._ulp_changes[i], norm(now - before))
        return self._ulp_changes

    def probe_at_every_step(self, i: int) -> Probe:
        """Return one comparison of a tensor at every step, for a person; other probes are as they were without it."""
        state = self.generator.get_state()
        try:
            return self.probe([i], 0, at_every_step=True)
        finally:
            self.generator.set_state(state)

    def probe(self, indices: Sequence[int], number: int, *, at_every_step: bool = False) -> Probe:
        """Return one comparison along a random direction over ``indices``, which have gradients of similar size."""
        self.enter()
        sample = self.samples[number]
        silent, small = self.is_silent(indices[0]), self.is_small(indices[0])
        direction = self.direction(indices, sample, equal_lengths=silent, along_themselves=small)
        scale, start = self._expected_slope(indices, sample, direction), self._largest_step(small)
        phi = cache(self.point.along(direction, sample))
        # Where the other tensors do not move, their rounding does not hide a small gradient.
        noise = noise_floor(phi) if small else self.noise
        slope_by = partial(slope_at_zero, phi, noise, scale, self.epsilon, size=sample.size)
        compare = partial(self._compare, indices, sample, direction)
        if at_every_step:
            return compare(slope_by(largest_step=start, to_the_end=True))
        if len(indices) == 1 and not small and self.step is not None:
            probe = compare(slope_by(largest_step=self.step, single_step=True))
            if self._is_plain(probe, indices[0], number, partial(slope_by, largest_step=self.step / 64)):
                return probe
        probe = compare(slope_by(largest_step=start))
        if probe.alarms and probe.slope.resolved:  # make sure, before a gradient is called wrong
            probe = compare(slope_by(largest_step=start, to_the_end=True))
        if probe.slope.resolved and not small:
            self.step = probe.slope.step
        return probe

    def _largest_step(self, small: bool) -> float:
        if self.where == "beside":
            return LARGEST_STEP * _PART_BESIDE
        return _LARGEST_STEP_OF_SMALL if small else LARGEST_STEP

    def _is_plain(self, probe: Probe, i: int, number: int, slope_at_smaller_step: Callable[..., Slope]) -> bool:
        """Return whether the step that resolved a joint probe is enough for a tensor: four forwards in place of thirty.

        It is if the two agree closely enough to miss no error of 1 %, or disagree plainly, at a far smaller step too.
        """
        if not probe.slope.resolved:
            return False
        if not probe.alarms:
            return self.chance_missed(probe, number, i) < WEAK
        if abs(probe.difference) < _PLAINLY * probe.tolerance:
            return False
        smaller = slope_at_smaller_step(single_step=True)
        return abs(smaller.derivative - probe.slope.derivative) <= min(
            10 * (smaller.error + probe.slope.error), abs(probe.difference) / 10
        )

    def _expected_slope(self, indices: Sequence[int], sample: Sample, direction: Direction) -> float:
        """Return the standard deviation of <g, v> over directions like this one; <g, v> along small gradients."""
        if self.is_silent(indices[0]):
            return self._typical_slope(sample)
        if self.is_small(indices[0]):
            return sum(sample.norms[i] * direction.lengths[i] for i in indices) / math.sqrt(2)
        counts = {i: max(self.point.values[i].numel(), 1) for i in indices}
        return math.hypot(*(sample.norms[i] * direction.lengths[i] / math.sqrt(count) for i, count in counts.items()))

    def _typical_slope(self, sample: Sample) -> float:
        """Return the median slope along one tensor with a gradient: a lost gradient is measured by it."""
        slopes = [
            self.scales[i] * norm_of_gradient / math.sqrt(self.point.values[i].numel())
            for i, norm_of_gradient in enumerate(sample.norms)
            if self.size(i) >= _SMALL * self.unit
        ]
        return statistics.median(slopes) if slopes else 0.0

    def _compare(self, indices: Sequence[int], sample: Sample, direction: Direction, slope: Slope) -> Probe:
        predicted, rounding = 0.0, 0.0
        for i in indices:
            gradient, part = sample.gradients[i], direction.parts[i]
            if gradient is not None and part is not None:
                predicted += dot(gradient, part)
                rounding += sample.norms[i] * direction.lengths[i]
        tolerance = 10 * slope.error + 64 * self.epsilon * rounding
        return Probe(slope, predicted, tolerance, {i: direction.lengths[i] for i in indices})

    def direction(
        self, indices: Sequence[int], sample: Sample, *, equal_lengths: bool, along_themselves: bool = False
    ) -> Direction:
        """Return Gaussian parts, each of length 1 / ||g_t||, or all equal; then all scaled to unit norm together.

        Lengths count in units of the leaves' natural scales. ``along_themselves`` turns each part halfway to its
        gradient.
        """
        parts: list[Tensor | None] = [None] * len(self.point.values)
        lengths = [0.0] * len(parts)
        weights = {i: 1.0 if equal_lengths else 1 / (self.scales[i] * sample.norms[i] or 1.0) for i in indices}
        total = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        for i in indices:
            part = self._random_part(i, sample, along_itself=along_themselves)
            lengths[i] = self.scales[i] * weights[i] / total
            parts[i] = part.mul_(lengths[i] / (norm(part) or 1.0))
        return Direction(parts, lengths)

    def _random_part(self, i: int, sample: Sample, *, along_itself: bool) -> Tensor:
        """Return a Gaussian part for leaf ``i``, 0 where its value or its gradient is not finite."""
        part = gaussian_like(self.point.values[i], self.generator)
        gradient = sample.gradients[i]
        if along_itself and gradient is not None and sample.norms[i]:
            part = part / (norm(part) or 1.0) + gradient / sample.norms[i]
        for unusable in (self.point.infinite.get(i), sample.nonfinite.get(i)):
            part = part if unusable is None else torch.where(unusable, 0, part)
        return part
