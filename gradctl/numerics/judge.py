"""Is this gradient the derivative? Joint probes over all tensors first, tensor by tensor on alarm.

A probe compares autograd's <g, v> with a finite difference along a Gaussian direction v of unit norm. In the joint
screen tensors of similar gradients form a group, each tensor's part divided by its gradient's norm, so that a small
wrong one cannot hide behind large ones; small gradients are probed along themselves too, which costs them no factor of
sqrt(n). Tensors without gradient share a probe of their own, where a slope is a lost gradient.

All that is smooth at the user's point is judged there; tensors along which the function has a kink are judged beside
it, with only those moved.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from gradctl.numerics.ladder import LARGEST_STEP, Slope, noise_floor, slope_at_zero
from gradctl.numerics.measures import dot, gaussian_like, norm
from gradctl.numerics.point import Direction, Point, Sample, natural_scale, rms
from gradctl.numerics.runner import Runner

__all__ = ["Judge", "Probe", "Site", "TensorJudgement"]

Verdict = Literal["same", "approximate", "wrong", "missing", "unresolved", "too-small", "no-gradient"]
Where = Literal["here", "beside", "away"]

# Within one joint probe gradients differ by no more than this, or the direction would be the smallest tensor's alone.
_SPREAD = 1e-4
# A gradient below this (of an objective that moves by about 1 with its leaves) is probed along itself, and from larger
# steps: float64 resolves it down to about 1e-12.
_SMALL = 1e-7
_LARGEST_STEP_OF_SMALL = 0.49
_STEPS_OFF = 3
# Beside a kink, 1e-3 away, larger steps would meet it again.
_PART_BESIDE = 1 / 128
_APPROXIMATE = 1e-4
_MORE_PROBES = 6
# A disagreement this many times the tolerance is plain.
_PLAINLY = 30
# So many times the leaves are moved by a few ULPs to see how their gradients are rounded.
_ROUNDED = 4
# A tensor in which an error of 1 % would be missed more often than this by the joint probes gets probes of its own;
# where even those would miss it every second time, nothing was judged.
_WEAK = 1e-2
_BLIND = 0.5
# The second difference of a smooth function at this step is about 1e-5 of its slope; at a kink it is the kink.
_KINK_STEP = 1e-5
_KINKED = 1e-3
# Looking for the tensors with a kink stops after this many directions of two forwards each; the rest count as kinked.
_MOST_DIRECTIONS = 64
# Slopes at this step add up to this part where the function is smooth: a tie is met only within the step.
_LINEAR_STEP = 1e-6
_LINEAR = 1e-5
# What a change by one ULP does to a gradient counts as rounding up to this; a kink does more.
_LARGEST_ROUNDING = 1e-9
# A gradient that one ULP of the leaves changes by this part is zero by cancellation.
_CANCELLED = 1e-2
# Noise of this part of the objective, in values of this part of the leaves, is all there is.
_ALL_NOISE = 1e-3
_ZERO = 1e-12
# How far parameters that are zero are moved to judge what lies behind them.
_AWAY = 0.3


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
    the probes, None where only the joint screen has judged. ``where`` is the point at which the verdict was reached:
    the user's own, one beside it (1e-3 off a kink), or one away from it (parameters that are zero are moved).
    ``only_here`` marks a disagreement at the user's point that is gone beside it.
    """

    index: int
    verdict: Verdict
    error: float | None = None
    budget: float | None = None
    where: Where = "here"
    only_here: bool = False


@dataclass(slots=True, eq=False)
class Site:
    """A point at which tensors are judged, its random cotangents with their gradients, and the noise of its objective.

    ``rounding`` is, by leaf, the norm by which one ULP of the leaves changes the gradient; made when first asked for.
    ``step`` is one that resolved a joint probe.
    """

    point: Point
    samples: list[Sample]
    where: Where = "here"
    noise: float = math.nan
    rounding: list[float] | None = None
    step: float | None = None

    @property
    def unit(self) -> float:
        """The size of the objective: gradients and errors are small relative to it."""
        sample = self.samples[0]
        return max(sample.size, math.sqrt(sum(c.numel() for c in sample.cotangents.values())), 1.0)


class Judge:
    """Judges the gradients of ``runner`` at the present values of its leaves.

    Args:
        runner: what to judge.
        seed: for cotangents and directions.
        probes: joint probes, and probes a tensor.
        rtol, atol: accept an error of a tensor up to atol + rtol ||g||, in Euclidean norm, whatever the probes resolve.
        epsilon: machine epsilon of the dtype in which the function really computes.
        sizes: whether the size of an error is asked for, and not only whether it is one.

    Attributes:
        here: the user's own point.
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
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.rtol, self.atol, self.epsilon, self.probes = rtol, atol, epsilon, probes
        self.sizes = sizes
        self.origin = Point(runner)
        self.scales = [natural_scale(value) for value in self.origin.values]
        self._kinked: set[int] = set()
        self._too_small: set[int] = set()
        self._beside: dict[int, Site | None] = {}
        self._sites: dict[int, Site] = {}  # of tensors that are not judged at the user's point
        self._points: list[Point] = []
        self.here = self._site(self.origin, "here")

    @property
    def point(self) -> Point:
        """The user's own point."""
        return self.origin

    @property
    def samples(self) -> list[Sample]:
        """The random cotangents at the user's own point."""
        return self.here.samples

    @property
    def noise(self) -> float:
        """The noise floor of the objective at the user's own point, absolute."""
        return self.here.noise

    @property
    def forwards(self) -> int:
        """How often the function was run."""
        return sum(point.forwards for point in self._points)

    @property
    def relative_noise(self) -> float:
        """The noise floor relative to the size of the objective."""
        return self.noise / self.here.unit

    def site(self, i: int) -> Site:
        """Return where leaf ``i`` was judged, with what must be held fixed there recorded anew."""
        return self._entered(self._sites.get(i, self.here))

    # ------------------------------------------------------------------ the joint screen

    def screen(self, indices: Sequence[int]) -> tuple[list[int], float]:
        """Return the tensors that want probes of their own, and the chance that 1 % was missed in one of the others.

        Those are the tensors of a group that alarms or stays unresolved, and those that the joint probes barely see.
        """
        suspects: set[int] = set()
        chances: dict[int, float] = {}
        if self._is_rounding_alone():
            self._too_small.update(indices)
            return [], 0.0
        for number in range(self.probes):
            for group in self._groups([i for i in indices if i not in suspects | self._kinked], self.here):
                self._screen_group(group, number, self.here, suspects, chances)
        if kinked := [i for i in indices if i in self._kinked]:
            suspects |= self._screen_beside(kinked, chances)
        suspects.update(i for i, chance in chances.items() if chance > _WEAK and i not in self._too_small)
        unseen = suspects | self._too_small
        return sorted(suspects), max((chance for i, chance in chances.items() if i not in unseen), default=0.0)

    def _is_rounding_alone(self) -> bool:
        """Tell a function that is zero but for rounding (the sum of a LayerNorm): its values are noise, and tiny."""
        outputs = [value for name, value in self.origin.outputs if name in self.samples[0].cotangents]
        largest = max((rms(value) for value in self.origin.values), default=0.0)
        return self.noise > _ALL_NOISE * self.here.unit and all(rms(y) < _ZERO * largest for y in outputs)

    def screened(self, i: int) -> TensorJudgement:
        """Return the verdict on a leaf that the joint screen did not suspect."""
        verdict: Verdict = "too-small" if i in self._too_small else "same"
        return TensorJudgement(i, verdict, where=self._sites.get(i, self.here).where)

    def _screen_group(
        self, group: list[int], number: int, site: Site, suspects: set[int], chances: dict[int, float]
    ) -> None:
        """Probe tensors together: note those that are suspect, too small or at a kink, and the chance for the rest."""
        probe = self.probe(group, number, site)
        if self._is_at_kink(probe, group, site) and site is self.here:
            found = self._with_kinks(group, site)
            self._kinked.update(found)
            if not (group := [i for i in group if i not in found]):
                return
            probe = self.probe(group, number, site) if found else probe
        if probe.alarms or self._is_at_kink(probe, group, site):
            suspects.update(group)
        elif not self._is_silent(group[0], site):
            for i in group:
                if self._is_beyond_sight(probe, i, len(group), site):
                    self._too_small.add(i)
                elif not probe.slope.resolved:
                    suspects.add(i)
                else:
                    chances[i] = chances.get(i, 1.0) * self._chance_missed(probe, number, i, site)

    def _screen_beside(self, kinked: list[int], chances: dict[int, float]) -> set[int]:
        """Judge the tensors with a kink beside it: only those moved, and if that is not enough, all."""
        suspects: set[int] = set()
        for attempt in range(_STEPS_OFF):
            site = self._site_beside(attempt)
            if site is None:
                continue
            suspects, found = set(), dict[int, float]()
            for number in range(self.probes):
                for group in self._groups([i for i in kinked if i not in suspects], site):
                    self._screen_group(group, number, site, suspects, found)
            self._sites |= dict.fromkeys(kinked, site)
            if not suspects:
                chances |= found
                return suspects
        return suspects or set(kinked)

    def _groups(self, indices: Sequence[int], site: Site) -> list[list[int]]:
        """Return groups of tensors with gradients of similar size, and last those that have none."""
        loud = sorted((i for i in indices if not self._is_silent(i, site)), key=lambda i: -self._size(i, site))
        groups: list[list[int]] = []
        for i in loud:
            if not groups or self._size(i, site) < _SPREAD * self._size(groups[-1][0], site):
                groups.append([])
            groups[-1].append(i)
        silent = [i for i in indices if self._is_silent(i, site)]
        return [*groups, silent] if silent else groups

    def _size(self, i: int, site: Site) -> float:
        """Return how much the objective changes as leaf ``i`` moves by its own scale."""
        return self.scales[i] * max(sample.norms[i] for sample in site.samples)

    def _is_silent(self, i: int, site: Site) -> bool:
        return self._size(i, site) == 0

    def _is_small(self, i: int, site: Site) -> bool:
        return 0 < self._size(i, site) < _SMALL * site.unit

    def _is_at_kink(self, probe: Probe, group: Sequence[int], site: Site) -> bool:
        """Tell a kink, or what no step resolves, from a gradient that is too small for any step."""
        return probe.slope.kinked and not self._is_negligible(probe, group[0], site)

    def _is_negligible(self, probe: Probe, i: int, site: Site) -> bool:
        """Tell a probe of small or no gradients whose finite difference leaves room for nothing but a small one."""
        largest = max(probe.slope.error, 0.0 if self._is_small(i, site) else abs(probe.slope.derivative))
        return (self._is_small(i, site) or self._is_silent(i, site)) and largest < _SMALL * site.unit

    def _is_beyond_sight(self, probe: Probe, i: int, members: int, site: Site) -> bool:
        """Tell a gradient in which no probe would see an error of 1 %, not even along itself and alone."""
        seen = 0.01 * self._size(i, site) * min(1.0, probe.lengths[i] / self.scales[i] * members)
        return self._is_small(i, site) and seen < probe.tolerance

    def _chance_missed(self, probe: Probe, number: int, i: int, site: Site, of_error: float = 0.01) -> float:
        """Return P(an error of 1 % in tensor ``i`` stays below this probe's tolerance): Gaussian, unit norm."""
        size, count = site.samples[number].norms[i], site.point.values[i].numel()
        seen = of_error * size * probe.lengths[i] / (math.sqrt(2) if self._is_small(i, site) else 1)
        return min(1.0, math.sqrt(2 / math.pi) * probe.tolerance * math.sqrt(count) / seen) if seen else 1.0

    # ------------------------------------------------------------------ kinks

    def _with_kinks(self, group: Sequence[int], site: Site) -> set[int]:
        """Return the tensors of a group along which the function has a kink: by halves, two forwards a direction."""
        found: set[int] = set()
        pending, left = [list(group)], _MOST_DIRECTIONS
        while pending:
            part = pending.pop()
            if left and not self._has_kink(part, site):
                left -= 1
                continue
            left -= left > 0
            if len(part) == 1 or not left:
                found.update(part)
            else:
                pending += [part[: len(part) // 2], part[len(part) // 2 :]]
        return found

    def _has_kink(self, indices: Sequence[int], site: Site) -> bool:
        """Tell whether the one-sided slopes along a direction differ at a step that is small to a smooth function."""
        sample = site.samples[0]
        silent = self._is_silent(indices[0], site)
        direction = self._direction(indices, site, sample, equal_lengths=silent)
        phi = site.point.along(direction, sample)
        forward, backward = phi(_KINK_STEP), phi(-_KINK_STEP)
        slope = max(abs(forward), abs(backward)) / _KINK_STEP
        least = self.epsilon * max(sample.size, abs(forward), abs(backward))
        floor = 20 * max(self.here.noise if math.isfinite(self.here.noise) else 0.0, least) / _KINK_STEP
        second = abs(forward + backward) / _KINK_STEP
        return not second <= _KINKED * slope + floor

    def _site_beside(self, attempt: int) -> Site | None:
        """Return a point beside the user's, where the tensors with a kink are moved, or from the second on all."""
        if attempt not in self._beside:
            everything = range(len(self.scales))
            moved = self._kinked if attempt == 0 and self._kinked else everything
            for size in (1e-3, 1e-5, 1e-7):
                point = self.origin.moved(self.generator, moved, size)
                if point is not None:
                    break
            self._beside[attempt] = self._site(point, "beside") if point is not None else None
        return self._beside[attempt]

    # ------------------------------------------------------------------ tensor by tensor

    def each(self, indices: Iterable[int]) -> tuple[dict[int, TensorJudgement], float]:
        """Return a verdict on each tensor by probes of its own, and the chance that 1 % was missed in one of them."""
        judged, missed = {}, 0.0
        for i in indices:
            judged[i], chance = self._alone(i)
            missed = max(missed, chance)
        return judged, missed

    def _alone(self, i: int) -> tuple[TensorJudgement, float]:
        """Judge one tensor at the user's point if the function is smooth along it there, else beside."""
        judged, chance = TensorJudgement(i, "unresolved"), 0.0
        for site in self._sites_to_try(i):
            probes = [self.probe([i], number, site) for number in range(self.probes)]
            judged, chance = self._weighed(i, probes, site)
            self._sites[i] = site
            if judged.verdict != "too-small" and any(self._is_at_kink(probe, [i], site) for probe in probes):
                continue
            if judged.verdict not in ("wrong", "missing", "approximate") or self._is_linear(i, site):
                return judged, chance
            judged = replace(judged, verdict="unresolved")
        return judged, chance

    def _sites_to_try(self, i: int) -> Iterator[Site]:
        """Yield where a tensor was screened, and then points off whatever kink was met there."""
        yield self._sites.get(i, self.here)
        for attempt in range(1, _STEPS_OFF):
            if (site := self._site_beside(attempt)) is not None:
                yield site

    def _weighed(self, i: int, probes: list[Probe], site: Site) -> tuple[TensorJudgement, float]:
        """Return the verdict that a tensor's own probes give, and the chance that they missed 1 %."""
        probes = self._enough(i, probes, site)
        count = math.sqrt(site.point.values[i].numel())
        size = self._size(i, site)
        wrong_by = count * math.sqrt(sum(p.difference**2 for p in probes) / len(probes))
        slope = count * math.sqrt(sum(p.slope.derivative**2 for p in probes) / len(probes))
        tolerance = count * max(p.tolerance for p in probes)
        error = wrong_by / slope if slope else wrong_by
        budget = tolerance / size if size else tolerance
        if not all(math.isfinite(p.slope.error) for p in probes):
            return TensorJudgement(i, "unresolved", where=site.where), 0.0
        chance = 0.0
        if any(p.alarms and p.slope.usable for p in probes):
            verdict = self._verdict_on_alarm(i, probes, site, wrong_by)
        else:
            verdict, chance = self._verdict_without_alarm(i, probes, site)
        return TensorJudgement(i, verdict, 1.0 if verdict == "missing" else error, budget, site.where), chance

    def _verdict_on_alarm(self, i: int, probes: list[Probe], site: Site, wrong_by: float) -> Verdict:
        size = self._size(i, site)
        if self._is_accepted(wrong_by / self.scales[i], size / self.scales[i]):
            return "same"
        if self._is_rounding(i, probes, site):
            return "too-small"
        if all(sample.gradients[i] is None for sample in site.samples):
            return "missing"
        return "approximate" if wrong_by < _APPROXIMATE * size else "wrong"

    def _verdict_without_alarm(self, i: int, probes: list[Probe], site: Site) -> tuple[Verdict, float]:
        """Return what probes mean that agree with autograd, or do not resolve the difference; and the chance."""
        if self._is_silent(i, site):
            is_judged = all(p.slope.resolved or self._is_negligible(p, i, site) for p in probes)
            return "same" if is_judged else "unresolved", 0.0
        weak: Verdict = "unresolved"
        if self._is_small(i, site):
            weak = "too-small" if all(self._is_negligible(p, i, site) for p in probes) else "unresolved"
            is_judged = not any(self._is_beyond_sight(p, i, 1, site) for p in probes)
        else:
            is_judged = all(p.slope.resolved for p in probes)
            weak = "too-small" if not is_judged and self._is_cancelled(i, site) else "unresolved"
        chance = math.prod(
            self._chance_missed(probe, number % self.probes, i, site) for number, probe in enumerate(probes)
        )
        return ("same", chance) if is_judged and chance <= _BLIND else (weak, 0.0)

    def _enough(self, i: int, probes: list[Probe], site: Site) -> list[Probe]:
        """Return the probes, and more where the size of a small error decides: two can be small by chance."""
        alarmed = any(probe.alarms for probe in probes) and not self._is_silent(i, site)
        differences = math.sqrt(sum(p.difference**2 for p in probes) / len(probes) * site.point.values[i].numel())
        margin = 30 if self.sizes else 10  # one probe falls below a tenth of the error one time in twelve
        if not alarmed or differences > margin * _APPROXIMATE * self._size(i, site):
            return probes
        return [*probes, *(self.probe([i], number % self.probes, site) for number in range(_MORE_PROBES))]

    def _is_accepted(self, wrong_by: float, size: float) -> bool:
        if self.rtol is None and self.atol is None:
            return False
        return wrong_by <= (self.atol or 0.0) + (self.rtol or 0.0) * size

    def _is_rounding(self, i: int, probes: Sequence[Probe], site: Site) -> bool:
        """Tell an error that is rounding: one ULP of the leaves changes the gradient as much as it is off.

        So it is for the weight of a LayerNorm over one element, whose true gradient is zero.
        """
        noise = self._rounding(site)[i]
        return self._is_tiny(i, site) and all(
            abs(probe.difference) <= 10 * noise * probe.lengths[i] for probe in probes
        )

    def _is_tiny(self, i: int, site: Site) -> bool:
        """Tell a change by one ULP that rounding explains from one that a kink makes."""
        return self.scales[i] * self._rounding(site)[i] < _LARGEST_ROUNDING * site.unit

    def _is_cancelled(self, i: int, site: Site) -> bool:
        """Tell a gradient that is zero by cancellation: one ULP of the leaves changes much of it."""
        return self._is_tiny(i, site) and self.scales[i] * self._rounding(site)[i] > _CANCELLED * self._size(i, site)

    def _rounding(self, site: Site) -> list[float]:
        """Return by how much (Euclidean norm) each gradient changes as all leaves move by a few ULPs; measured once.

        The largest of some samples: in one of them two roundings can be the same by chance.
        """
        if site.rounding is None:
            point, sample = self._entered(site).point, site.samples[0]
            site.rounding = [0.0] * len(sample.gradients)
            for ulps in range(1, _ROUNDED + 1):
                changed = point.gradients_rounded(sample.cotangents, self.generator, ulps)
                for i, (before, now) in enumerate(zip(sample.gradients, changed, strict=True)):
                    if before is not None and now is not None:
                        site.rounding[i] = max(site.rounding[i], norm(now - before))
        return site.rounding

    def _is_linear(self, i: int, site: Site) -> bool:
        """Tell whether the slopes along v and w add up to that along v + w: at a tie of a median they do not.

        There the function is odd along each line, so that no second difference shows the kink.
        """
        self._entered(site)
        sample, unit = site.samples[0], self._direction([i], site, site.samples[0], equal_lengths=True)
        other = self._direction([i], site, sample, equal_lengths=True)
        v, w = unit.parts[i], other.parts[i]
        assert v is not None and w is not None
        slopes = []
        for part in (v, w, v + w):
            parts: list[Tensor | None] = [None] * len(unit.parts)
            parts[i] = part
            phi = site.point.along(Direction(parts, []), sample)
            coarse = (phi(_LINEAR_STEP) - phi(-_LINEAR_STEP)) / (2 * _LINEAR_STEP)
            fine = (phi(_LINEAR_STEP / 2) - phi(-_LINEAR_STEP / 2)) / _LINEAR_STEP
            slopes.append((4 * fine - coarse) / 3)
        along_v, along_w, along_both = slopes
        noise = max(site.noise if math.isfinite(site.noise) else 0.0, self.epsilon * sample.size)
        allowed = _LINEAR * (abs(along_v) + abs(along_w)) + 20 * noise / _LINEAR_STEP
        return not abs(along_both - along_v - along_w) > allowed

    # ------------------------------------------------------------------ at other points

    def settled(self, judged: dict[int, TensorJudgement]) -> dict[int, TensorJudgement]:
        """Return the verdicts after a look from other points.

        What is wrong at the user's point alone is marked: at a kink that right parts compose, ``relu(x) - relu(-x)`` at
        0, the whole is smooth and autograd's answer is none of its slopes. A gradient that is exactly zero is judged
        where the parameters that are zero are not: behind a gate of zeros every backward looks right.
        """
        return judged | self._only_here(judged) | self._away(judged)

    def _only_here(self, judged: dict[int, TensorJudgement]) -> dict[int, TensorJudgement]:
        wrong = [i for i, each in judged.items() if each.where == "here" and each.verdict in ("wrong", "missing")]
        site = self._site_beside(_STEPS_OFF - 1) if wrong else None
        if site is None:
            return {}
        persisting, chances = set[int](), dict[int, float]()
        for number in range(self.probes):
            for group in self._groups([i for i in wrong if i not in persisting], site):
                self._screen_group(group, number, site, persisting, chances)
        alone = {i: self.probe([i], 0, site) for i in persisting}
        gone = {i for i, probe in alone.items() if not probe.alarms and probe.slope.resolved}
        return {i: replace(judged[i], only_here=True) for i in wrong if i not in persisting - gone}

    def _away(self, judged: dict[int, TensorJudgement]) -> dict[int, TensorJudgement]:
        silent = [
            i
            for i, each in judged.items()
            if each.verdict == "same" and self._is_silent(i, self._sites.get(i, self.here))
        ]
        zero = [i for i in silent if any(sample.gradients[i] is not None for sample in self.samples)]
        found = {i: TensorJudgement(i, "too-small" if i in zero else "no-gradient") for i in silent}
        gates = [i for i, value in enumerate(self.origin.values) if value.numel() and not bool(value.any())]
        point = self.origin.moved(self.generator, gates, _AWAY / 0.1) if zero and gates else None
        if point is None:
            return found
        site = self._site(point, "away")
        reached = [i for i in zero if not self._is_silent(i, site)]
        self._sites |= dict.fromkeys(reached, site)
        suspects, chances = set[int](), dict[int, float]()
        for number in range(self.probes):
            for group in self._groups([i for i in reached if i not in suspects], site):
                self._screen_group(group, number, site, suspects, chances)
        found |= {i: self.screened(i) for i in reached}
        return found | self.each(suspects)[0]

    def _site(self, point: Point, where: Where) -> Site:
        """Return a site with its samples drawn and its noise measured."""
        self._points.append(point)
        site = Site(point, [], where)
        site.samples = [point.sample(self.generator) for _ in range(self.probes)]
        indices = [i for i, value in enumerate(point.values) if value.numel()]
        direction = self._direction(indices, site, site.samples[0], equal_lengths=True)
        site.noise = noise_floor(point.along(direction, site.samples[0]))
        return site

    def _entered(self, site: Site) -> Site:
        """Return a site after its cuts and linear maps were recorded anew, where those of another may stand."""
        if len(self._points) > 1:
            site.point.record()
        return site

    # ------------------------------------------------------------------ one probe

    def probe(self, indices: Sequence[int], number: int, site: Site | None = None) -> Probe:
        """Return one comparison along a random direction over ``indices``, which have gradients of similar size."""
        site = self._entered(site or self.here)
        sample = site.samples[number]
        silent, small = self._is_silent(indices[0], site), self._is_small(indices[0], site)
        direction = self._direction(indices, site, sample, equal_lengths=silent, along_themselves=small)
        scale = self._typical_slope(site, sample) if silent else self._expected_slope(indices, sample, direction, small)
        phi = cache(site.point.along(direction, sample))
        # The rounding of the others' motion would hide a small gradient: alone it stands still.
        noise = noise_floor(phi) if small else site.noise
        slope_by = partial(slope_at_zero, phi, noise, scale, self.epsilon, size=sample.size)
        if len(indices) == 1 and not small and site.step is not None:
            probe = self._compared(indices, sample, direction, slope_by(largest_step=site.step, single_step=True))
            if self._is_plain(probe, indices[0], number, site, slope_by):
                return probe
        start = _LARGEST_STEP_OF_SMALL if small else LARGEST_STEP
        start = start if site.where != "beside" else LARGEST_STEP * _PART_BESIDE
        slope = slope_by(largest_step=start)
        probe = self._compared(indices, sample, direction, slope)
        if probe.alarms and slope.resolved:  # make sure, before anybody is called wrong
            slope = slope_by(largest_step=start, to_the_end=True)
            probe = self._compared(indices, sample, direction, slope)
        if slope.resolved and not small:
            site.step = slope.step
        return probe

    def _is_plain(self, probe: Probe, i: int, number: int, site: Site, slope_by: Callable[..., Slope]) -> bool:
        """Tell whether one step, which served a joint probe, settles a tensor: four forwards in place of thirty.

        It does if the two agree closely enough to miss no error of 1 %, or disagree plainly, at a far smaller step too.
        """
        if not probe.slope.resolved:
            return False
        if not probe.alarms:
            return self._chance_missed(probe, number, i, site) < _WEAK
        assert site.step is not None
        if abs(probe.difference) < _PLAINLY * probe.tolerance:
            return False
        smaller = slope_by(largest_step=site.step / 64, single_step=True)
        return abs(smaller.derivative - probe.slope.derivative) <= min(
            10 * (smaller.error + probe.slope.error), abs(probe.difference) / 10
        )

    def _expected_slope(self, indices: Sequence[int], sample: Sample, direction: Direction, small: bool) -> float:
        """Return the standard deviation of <g, v> over directions like this one, or what it is along themselves."""
        if small:
            return sum(sample.norms[i] * direction.lengths[i] for i in indices) / math.sqrt(2)
        return math.sqrt(
            sum((sample.norms[i] * direction.lengths[i]) ** 2 / max(self.origin.values[i].numel(), 1) for i in indices)
        )

    def _typical_slope(self, site: Site, sample: Sample) -> float:
        """Return the slope that a tensor with a gradient typically has: what a lost gradient is measured by."""
        loud = [i for i in range(len(sample.norms)) if self._size(i, site) >= _SMALL * site.unit]
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

    def _direction(
        self,
        indices: Sequence[int],
        site: Site,
        sample: Sample,
        *,
        equal_lengths: bool,
        along_themselves: bool = False,
    ) -> Direction:
        """Return Gaussian parts, each of length 1 / ||g_t||, or all equal; then all scaled to unit norm together.

        Lengths count in units of the leaves' natural scales. ``along_themselves`` turns each part halfway to its
        gradient.
        """
        point = site.point
        parts: list[Tensor | None] = [None] * len(point.values)
        lengths = [0.0] * len(parts)
        weights = {i: 1.0 if equal_lengths else 1 / (self.scales[i] * sample.norms[i] or 1.0) for i in indices}
        total = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        for i in indices:
            part = gaussian_like(point.values[i], self.generator)
            gradient = sample.gradients[i]
            if along_themselves and gradient is not None and sample.norms[i]:
                part = part / (norm(part) or 1.0) + gradient / sample.norms[i]
            for unusable in (point.infinite.get(i), sample.broken.get(i)):
                part = part if unusable is None else torch.where(unusable, 0, part)
            lengths[i] = self.scales[i] * weights[i] / total
            parts[i] = part.mul_(lengths[i] / (norm(part) or 1.0))
        return Direction(parts, lengths)
