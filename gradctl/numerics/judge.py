"""Is this gradient the derivative? Joint probes over all tensors first, tensor by tensor on alarm.

All that is smooth at the user's point is judged there; tensors along which the function has a kink are judged beside
it, with only those moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gradctl.numerics.point import Point, Sample, natural_scale, rms
from gradctl.numerics.runner import Runner
from gradctl.numerics.site import WEAK, Probe, Site, Where

Verdict = Literal["same", "approximate", "wrong", "missing", "unresolved", "too-small", "no-gradient"]

_STEPS_OFF = 3
_APPROXIMATE = 1e-4
_MORE_PROBES = 6
# If probes of a tensor alone would miss an error of 1 % more often than this, nothing was judged.
_BLIND = 0.5
# Noise of this part of the objective, in values of this part of the leaves, is all there is.
_ALL_NOISE = 1e-3
_ZERO = 1e-12
# How far parameters that are zero are moved to judge what lies behind them.
_AWAY = 0.3


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


class Judge:
    """Judges the gradients of ``runner`` at the present values of its leaves.

    Args:
        runner: what to judge.
        seed: for cotangents and directions.
        probes: joint probes, and probes a tensor.
        rtol, atol: accept an error of a tensor up to atol + rtol ||g||, in Euclidean norm, whatever the probes resolve.
        epsilon: machine epsilon of the dtype in which the function really computes.
        sizes: whether the size of an error matters, and not only whether it is one.

    Attributes:
        point: the user's own.
        here: the site at it.
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
        self.point = Point(runner)
        self.scales = [natural_scale(value) for value in self.point.values]
        self._kinked: set[int] = set()
        self._too_small: set[int] = set()
        self._beside: dict[int, Site | None] = {}
        self._sites: dict[int, Site] = {}  # of tensors that are not judged at the user's point
        self._points: list[Point] = []
        self.here = self._site(self.point, "here")

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
        return self._sites.get(i, self.here).enter()

    # ------------------------------------------------------------------ the joint screen

    def screen(self, indices: Sequence[int]) -> tuple[list[int], float]:
        """Return the tensors that want probes of their own, and the chance that 1 % was missed in one of the others.

        Those are the tensors of a group that alarms or stays unresolved, and those that the joint probes barely see.
        """
        if self._is_rounding_alone():
            self._too_small.update(indices)
            return [], 0.0
        suspects, chances = self._screen_at(self.here, indices)
        if kinked := [i for i in indices if i in self._kinked]:
            suspects |= self._screen_beside(kinked, chances)
        suspects.update(i for i, chance in chances.items() if chance > WEAK and i not in self._too_small)
        unseen = suspects | self._too_small
        return sorted(suspects), max((chance for i, chance in chances.items() if i not in unseen), default=0.0)

    def _is_rounding_alone(self) -> bool:
        """Tell a function that is zero but for rounding (the sum of a LayerNorm): its values are noise, and tiny."""
        outputs = [value for name, value in self.point.outputs if name in self.samples[0].cotangents]
        largest = max((rms(value) for value in self.point.values), default=0.0)
        return self.noise > _ALL_NOISE * self.here.unit and all(rms(y) < _ZERO * largest for y in outputs)

    def wrong(self, indices: Sequence[int], *, is_settled: bool = False) -> dict[int, TensorJudgement]:
        """Return the verdicts that are ``wrong`` or ``missing``, if ``is_settled`` after a look from other points."""
        judged = self.each(self.screen(indices)[0])[0]
        judged = self.settle(judged) if is_settled else judged
        return {i: each for i, each in judged.items() if each.verdict in ("wrong", "missing")}

    def verdict_of_screen(self, i: int) -> TensorJudgement:
        """Return the verdict on a leaf that the joint screen did not suspect."""
        verdict: Verdict = "too-small" if i in self._too_small else "same"
        return TensorJudgement(i, verdict, where=self._sites.get(i, self.here).where)

    def _screen_at(self, site: Site, indices: Sequence[int]) -> tuple[set[int], dict[int, float]]:
        """Return the tensors that are suspect at one point, and the chance that 1 % was missed in the others."""
        suspects, chances = set[int](), dict[int, float]()
        for number in range(self.probes):
            left = suspects | (self._kinked if site is self.here else set())
            for group in site.groups([i for i in indices if i not in left]):
                self._screen_group(group, number, site, suspects, chances)
        return suspects, chances

    def _screen_group(
        self, group: list[int], number: int, site: Site, suspects: set[int], chances: dict[int, float]
    ) -> None:
        """Probe tensors together: note those that are suspect, too small or at a kink, and the chance for the rest."""
        probe = site.probe(group, number)
        if site.is_at_kink(probe, group) and site is self.here:
            found = site.with_kinks(group)
            self._kinked.update(found)
            if not (group := [i for i in group if i not in found]):
                return
            probe = site.probe(group, number) if found else probe
        if probe.alarms or site.is_at_kink(probe, group):
            suspects.update(group)
        elif not site.is_silent(group[0]):
            for i in group:
                if site.is_beyond_sight(probe, i, len(group)):
                    self._too_small.add(i)
                elif not probe.slope.resolved:
                    suspects.add(i)
                else:
                    chances[i] = chances.get(i, 1.0) * site.chance_missed(probe, number, i)

    def _screen_beside(self, kinked: list[int], chances: dict[int, float]) -> set[int]:
        """Judge the tensors with a kink beside it: only those moved, and if that is not enough, all."""
        suspects: set[int] = set()
        for attempt in range(_STEPS_OFF):
            site = self._site_beside(attempt)
            if site is None:
                continue
            suspects, found = self._screen_at(site, kinked)
            self._sites |= dict.fromkeys(kinked, site)
            if not suspects:
                chances |= found
                return suspects
        return suspects or set(kinked)

    def _site_beside(self, attempt: int) -> Site | None:
        """Return a point beside the user's, where the tensors with a kink are moved, or from the second on all."""
        if attempt not in self._beside:
            everything = range(len(self.scales))
            moved = self._kinked if attempt == 0 and self._kinked else everything
            for size in (1e-3, 1e-5, 1e-7):
                point = self.point.moved(self.generator, moved, size)
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
            probes = [site.probe([i], number) for number in range(self.probes)]
            judged, chance = self._weighed(i, probes, site)
            self._sites[i] = site
            if judged.verdict != "too-small" and any(site.is_at_kink(probe, [i]) for probe in probes):
                continue
            if judged.verdict not in ("wrong", "missing", "approximate") or site.is_linear(i):
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
        size = site.size(i)
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
        size = site.size(i)
        if self._is_accepted(wrong_by / self.scales[i], size / self.scales[i]):
            return "same"
        if site.is_rounding(i, probes):
            return "too-small"
        if all(sample.gradients[i] is None for sample in site.samples):
            return "missing"
        return "approximate" if wrong_by < _APPROXIMATE * size else "wrong"

    def _verdict_without_alarm(self, i: int, probes: list[Probe], site: Site) -> tuple[Verdict, float]:
        """Return what probes mean that agree with autograd, or do not resolve the difference; and the chance."""
        if site.is_silent(i):
            is_judged = all(p.slope.resolved or site.is_negligible(p, i) for p in probes)
            return "same" if is_judged else "unresolved", 0.0
        weak: Verdict = "unresolved"
        if site.is_small(i):
            weak = "too-small" if all(site.is_negligible(p, i) for p in probes) else "unresolved"
            is_judged = not any(site.is_beyond_sight(p, i, 1) for p in probes)
        else:
            is_judged = all(p.slope.resolved for p in probes)
            weak = "too-small" if not is_judged and site.is_cancelled(i) else "unresolved"
        chance = math.prod(site.chance_missed(probe, number % self.probes, i) for number, probe in enumerate(probes))
        return ("same", chance) if is_judged and chance <= _BLIND else (weak, 0.0)

    def _enough(self, i: int, probes: list[Probe], site: Site) -> list[Probe]:
        """Return the probes, and more where the size of a small error decides: two can be small by chance."""
        alarmed = any(probe.alarms for probe in probes) and not site.is_silent(i)
        differences = math.sqrt(sum(p.difference**2 for p in probes) / len(probes) * site.point.values[i].numel())
        margin = 30 if self.sizes else 10  # one probe falls below a tenth of the error one time in twelve
        if not alarmed or differences > margin * _APPROXIMATE * site.size(i):
            return probes
        return [*probes, *(site.probe([i], number % self.probes) for number in range(_MORE_PROBES))]

    def _is_accepted(self, wrong_by: float, size: float) -> bool:
        if self.rtol is None and self.atol is None:
            return False
        return wrong_by <= (self.atol or 0.0) + (self.rtol or 0.0) * size

    # ------------------------------------------------------------------ at other points

    def settle(self, judged: dict[int, TensorJudgement]) -> dict[int, TensorJudgement]:
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
        persisting, _ = self._screen_at(site, wrong)
        alone = {i: site.probe([i], 0) for i in persisting}
        gone = {i for i, probe in alone.items() if not probe.alarms and probe.slope.resolved}
        return {i: replace(judged[i], only_here=True) for i in wrong if i not in persisting - gone}

    def _away(self, judged: dict[int, TensorJudgement]) -> dict[int, TensorJudgement]:
        silent = [
            i for i, each in judged.items() if each.verdict == "same" and self._sites.get(i, self.here).is_silent(i)
        ]
        zero = [i for i in silent if any(sample.gradients[i] is not None for sample in self.samples)]
        found = {i: TensorJudgement(i, "too-small" if i in zero else "no-gradient") for i in silent}
        gates = [i for i, value in enumerate(self.point.values) if value.numel() and not bool(value.any())]
        point = self.point.moved(self.generator, gates, _AWAY / 0.1) if zero and gates else None
        if point is None:
            return found
        site = self._site(point, "away")
        reached = [i for i in zero if not site.is_silent(i)]
        self._sites |= dict.fromkeys(reached, site)
        suspects, _ = self._screen_at(site, reached)
        found |= {i: self.verdict_of_screen(i) for i in reached}
        return found | self.each(suspects)[0]

    def _site(self, point: Point, where: Where) -> Site:
        return Site(point, where, self.generator, self.scales, self.epsilon, self._points).draw(self.probes)
