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
    """The verdict on one tensor; error and budget are estimated from the probes, None after the joint screen alone."""

    index: int  # among the leaves
    verdict: Verdict
    error: float | None = None  # relative to the norm of the finite difference, of the gradient if that is rounding
    budget: float | None = None  # relative as the error is
    # The user's own point, one beside it (1e-3 off a kink), or one away from it (parameters that are zero are moved).
    where: Where = "here"
    only_here: bool = False  # whether the disagreement at the user's point is gone beside it

    @property
    def is_wrong(self) -> bool:
        """Whether autograd disagrees with the finite differences."""
        return self.verdict in ("wrong", "missing")


class Judge:
    """Judges the gradients of ``runner`` at the present values of its leaves.

    ``point`` is the user's own, and ``here`` the site at it.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        seed: int,  # of cotangents and directions
        probes: int = 2,  # joint probes, and probes a tensor
        rtol: float | None = None,  # an error up to atol + rtol ||g|| is accepted, whatever the probes resolve
        atol: float | None = None,
        epsilon: float = torch.finfo(torch.float64).eps,  # of the dtype in which the function really computes
        sizes: bool = True,  # whether the size of an error matters, and not only whether it is one
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.rtol, self.atol, self.epsilon, self.probes, self.sizes = rtol, atol, epsilon, probes, sizes
        self.point = Point(runner)
        self.scales = [natural_scale(value) for value in self.point.values]
        self._kinked: set[int] = set()
        self._too_small: set[int] = set()
        self._beside: dict[int, Site | None] = {}
        self._sites: dict[int, Site] = {}  # of tensors that are judged elsewhere than at the user's point
        self._points: list[Point] = []
        self.here = self._site(self.point, "here")

    @property
    def samples(self) -> list[Sample]:
        """The random cotangents at the user's own point."""
        return self.here.samples

    @property
    def noise(self) -> float:
        """The noise floor of the objective there, absolute."""
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
        """Return the site at which leaf ``i`` was judged, with the cuts there recorded anew."""
        return self._site_of(i).enter()

    def _site_of(self, i: int) -> Site:
        return self._sites.get(i, self.here)

    # ------------------------------------------------------------------ the joint screen

    def screen(self, indices: Sequence[int]) -> tuple[list[int], float]:
        """Return the tensors that need probes of their own, and the chance that 1 % was missed in one of the others.

        Those are the tensors of a group that alarms or stays unresolved, and those that the joint probes barely move.
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
        """Return whether the function is zero but for rounding (the sum of a LayerNorm): its values are tiny noise."""
        outputs = [value for name, value in self.point.outputs if name in self.samples[0].cotangents]
        largest = max((rms(value) for value in self.point.values), default=0.0)
        return self.noise > _ALL_NOISE * self.here.unit and all(rms(y) < _ZERO * largest for y in outputs)

    def wrong(self, indices: Sequence[int], *, is_settled: bool = False) -> dict[int, TensorJudgement]:
        """Return the verdicts that are ``wrong`` or ``missing``, if ``is_settled`` after a look from other points."""
        judged = self.each(self.screen(indices)[0])[0]
        judged = self.settle(judged) if is_settled else judged
        return {i: each for i, each in judged.items() if each.is_wrong}

    def verdict_of_screen(self, i: int) -> TensorJudgement:
        """Return the verdict on a leaf that the joint screen did not suspect."""
        verdict: Verdict = "too-small" if i in self._too_small else "same"
        return TensorJudgement(i, verdict, where=self._site_of(i).where)

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
        group, probe = self._probe_without_kinks(group, number, site)
        if not group:
            return
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

    def _probe_without_kinks(self, group: list[int], number: int, site: Site) -> tuple[list[int], Probe]:
        """Probe tensors together; at the user's point, only those along which the function has no kink."""
        probe = site.probe(group, number)
        if site is not self.here or not site.is_at_kink(probe, group):
            return group, probe
        kinked = site.with_kinks(group)
        self._kinked |= kinked
        group = [i for i in group if i not in kinked]
        return group, site.probe(group, number) if kinked and group else probe

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
            moved = self._kinked if attempt == 0 and self._kinked else range(len(self.scales))
            points = (self.point.moved(self.generator, moved, size) for size in (1e-3, 1e-5, 1e-7))
            point = next((each for each in points if each is not None), None)
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
            if not (judged.is_wrong or judged.verdict == "approximate") or site.is_linear(i):
                return judged, chance
            judged = replace(judged, verdict="unresolved")
        return judged, chance

    def _sites_to_try(self, i: int) -> Iterator[Site]:
        """Yield where a tensor was screened, and then points off whatever kink was met there."""
        yield self._site_of(i)
        for attempt in range(1, _STEPS_OFF):
            if (site := self._site_beside(attempt)) is not None:
                yield site

    def _weighed(self, i: int, probes: list[Probe], site: Site) -> tuple[TensorJudgement, float]:
        """Return the verdict by a tensor's own probes, and the chance that they missed 1 %."""
        probes = self._enough(i, probes, site)
        count = math.sqrt(site.point.values[i].numel())
        if not all(math.isfinite(p.slope.error) for p in probes):
            return TensorJudgement(i, "unresolved", where=site.where), 0.0
        wrong_by = count * _root_mean_square([p.difference for p in probes])
        slope = count * _root_mean_square([p.slope.derivative for p in probes])
        tolerance = count * max(p.tolerance for p in probes)
        chance = 0.0
        if any(p.alarms and p.slope.usable for p in probes):
            verdict = self._verdict_on_alarm(i, probes, site, wrong_by)
        else:
            verdict, chance = self._verdict_without_alarm(i, probes, site)
        # A finite difference within its tolerance is rounding: nothing is relative to it.
        scale = (slope if slope > tolerance else site.size(i)) or 1.0
        error = 1.0 if verdict == "missing" else wrong_by / scale
        return TensorJudgement(i, verdict, error, tolerance / scale, site.where), chance

    def _verdict_on_alarm(self, i: int, probes: list[Probe], site: Site, wrong_by: float) -> Verdict:
        size = site.size(i)
        if self._is_accepted(wrong_by / self.scales[i], size / self.scales[i]):
            return "same"
        if site.is_rounding(i, probes):
            return "too-small"
        if not site.has_gradient(i):
            return "missing"
        return "approximate" if wrong_by < _APPROXIMATE * size else "wrong"

    def _verdict_without_alarm(self, i: int, probes: list[Probe], site: Site) -> tuple[Verdict, float]:
        """Return the verdict if the probes agree with autograd or resolve no difference, and the chance."""
        is_judged = all(site.is_judged_by(probe, i) for probe in probes)
        chance = 0.0
        if not site.is_silent(i):  # 1 % of zero is zero
            chance = math.prod(site.chance_missed(p, number % self.probes, i) for number, p in enumerate(probes))
        if is_judged and chance <= _BLIND:
            return "same", chance
        return "too-small" if site.is_too_small(i, probes, is_judged=is_judged) else "unresolved", 0.0

    def _enough(self, i: int, probes: list[Probe], site: Site) -> list[Probe]:
        """Return the probes, and more where the size of a small error decides: two can be small by chance."""
        alarmed = any(probe.alarms for probe in probes) and not site.is_silent(i)
        wrong_by = math.sqrt(site.point.values[i].numel()) * _root_mean_square([p.difference for p in probes])
        margin = 30 if self.sizes else 10  # one probe falls below a tenth of the error one time in twelve
        if not alarmed or wrong_by > margin * _APPROXIMATE * site.size(i):
            return probes
        return [*probes, *(site.probe([i], number % self.probes) for number in range(_MORE_PROBES))]

    def _is_accepted(self, wrong_by: float, size: float) -> bool:
        if self.rtol is None and self.atol is None:
            return False
        return wrong_by <= (self.atol or 0.0) + (self.rtol or 0.0) * size

    # ------------------------------------------------------------------ at other points

    def settle(self, judged: dict[int, TensorJudgement]) -> dict[int, TensorJudgement]:
        """Return the verdicts after a look from other points.

        A gradient that is wrong at the user's point alone is marked: ``relu(x) - relu(-x)`` is smooth at 0, where
        autograd adds the gradients of two functions with a kink, and is wrong. A gradient that is exactly zero is
        judged with the parameters that are zero moved: behind a gate of zeros every backward looks right.
        """
        return judged | self._only_here(judged) | self._away(judged)

    def _only_here(self, judged: dict[int, TensorJudgement]) -> dict[int, TensorJudgement]:
        wrong = [i for i, each in judged.items() if each.where == "here" and each.is_wrong]
        site = self._site_beside(_STEPS_OFF - 1) if wrong else None
        if site is None:
            return {}
        suspects, _ = self._screen_at(site, wrong)
        persisting = {i for i in suspects if not site.probe([i], 0).agrees}
        return {i: replace(judged[i], only_here=True) for i in wrong if i not in persisting}

    def _away(self, judged: dict[int, TensorJudgement]) -> dict[int, TensorJudgement]:
        silent = [i for i, each in judged.items() if each.verdict == "same" and self._site_of(i).is_silent(i)]
        zero = [i for i in silent if self.here.has_gradient(i)]
        found = {i: TensorJudgement(i, "too-small" if i in zero else "no-gradient") for i in silent}
        return found | self._judge_without_zeros(zero) if zero else found

    def _judge_without_zeros(self, indices: list[int]) -> dict[int, TensorJudgement]:
        """Judge those tensors whose gradients are no longer zero as the parameters that are zero are moved."""
        gates = [i for i, value in enumerate(self.point.values) if value.numel() and not bool(value.any())]
        point = self.point.moved(self.generator, gates, _AWAY / 0.1) if gates else None
        if point is None:
            return {}
        site = self._site(point, "away")
        reached = [i for i in indices if not site.is_silent(i)]
        self._sites |= dict.fromkeys(reached, site)
        suspects, _ = self._screen_at(site, reached)
        return {i: self.verdict_of_screen(i) for i in reached} | self.each(suspects)[0]

    def _site(self, point: Point, where: Where) -> Site:
        return Site(point, where, self.generator, self.scales, self.epsilon, self._points).draw(self.probes)


def _root_mean_square(values: Sequence[float]) -> float:
    return math.hypot(*values) / math.sqrt(len(values))
