"""The directional derivative of a function at 0, by a ladder of steps that detects kinks.

Central differences C(h), extrapolated R(h) = (4 C(h/2) - C(h)) / 3, and the second difference S(h), which shrinks
with h where the function is smooth and does not at a kink. The noise floor comes from a difference table.

Source: Ridders, Adv. Eng. Software 4 (1982) 75; Moré and Wild, "Estimating computational noise", SIAM J. Sci.
Comput. 33 (2011) 1292.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from gradctl.core.findings import LadderStep, StepLadder
from gradctl.core.numbers import number

LARGEST_STEP = 3.07e-2  # 3e-2 is a whole multiple of the thousandths that programs round to
_SMALLEST_STEP = 2e-7
# Below that only while each smaller step still resolves more (sin(1e5 x), a value close to the edge of a domain).
_LAST_STEP = 1e-11
_RATIO = 1 / 4
# An error above this part of the slope resolves nothing worth saying.
_RESOLVED = 1e-4
# Two neighbouring steps that agree to this part show a slope.
_CONFIRMED = 1e-2
# float32 islands have a relative noise of 1e-7; above this the steps see something else than the derivative.
_NOISIEST = 1e-5
# Units in the last place of |phi| at least: zero-initialised layers make phi exactly linear, and its noise 0.
_LEAST_NOISE_ULPS = 8
# The last operation of each output rounds by 0.3 ULP (standard deviation); what the program rounds more is measured.
_ULPS_OF_A_DIFFERENCE = 0.5
# Far below any step of the ladder, far above the rounding of an argument: high differences see the noise alone.
_NOISE_SPACING = 1e-7


@dataclass(frozen=True, slots=True)
class Level:
    """The finite differences at one step; see the source in ``slope_at_zero``."""

    step: float
    derivative: float
    truncation: float
    error: float
    second: float
    second_half: float
    floor: float


@dataclass(frozen=True, slots=True)
class Slope:
    """A directional derivative."""

    derivative: float  # d/dt phi(t) at 0; NaN if the values are not finite at any step
    error: float  # estimate of its absolute error; then infinite
    kinked: bool  # whether the one-sided slopes differ down to the smallest steps, or no step resolves the derivative
    resolved: bool  # whether the error is small enough to conclude that autograd is right
    # Whether it is small enough to conclude that autograd is wrong: a function that oscillates faster than the steps
    # has a small error by luck, against a derivative that is large with reason.
    usable: bool
    step: float = math.nan  # the larger distance of the central differences that were kept
    levels: tuple[Level, ...] = ()  # the finite differences at all steps, from the largest


def step_ladder(slope: Slope, reference: float, candidate: float | None = None) -> StepLadder | None:
    """Return the finite differences of a slope for a report, beside the derivatives that programs state; None if none.

    Args:
        slope: the finite differences.
        reference, candidate: the derivative along the same direction by eager's autograd, and by that of a form.
    """
    steps = tuple(
        LadderStep(step=each.step, derivative=number(each.derivative), error=number(each.error))
        for each in slope.levels
    )
    return StepLadder(steps=steps, reference=number(reference), candidate=number(candidate)) if steps else None


def central_slope(phi: Callable[[float], float], step: float) -> float:
    """Return the derivative of ``phi`` at 0 by central differences, extrapolated once (4 calls)."""
    coarse = (phi(step) - phi(-step)) / (2 * step)
    fine = (phi(step / 2) - phi(-step / 2)) / step
    return (4 * fine - coarse) / 3


def noise_floor(phi: Callable[[float], float], spacing: float = _NOISE_SPACING) -> float:
    """Return the standard deviation of the noise of ``phi`` near 0 (7 calls), absolute; NaN if a value is not finite.

    sigma_k² = gamma_k mean((Δ^k phi)²) with gamma_k = (k!)² / (2k)!, the largest of k = 4, 5, 6. Where these fall with
    k, they measure the function, close to the edge of its domain, and the spacing is reduced.
    """
    differences = [phi(spacing * offset) for offset in range(-3, 4)]
    sigmas = []
    for order in range(1, 7):
        differences = [right - left for left, right in itertools.pairwise(differences)]
        gamma = math.factorial(order) ** 2 / math.factorial(2 * order)
        sigmas.append(math.sqrt(gamma * sum(d * d for d in differences) / len(differences)))
    if not all(map(math.isfinite, sigmas)):
        return math.nan
    fourth, fifth, sixth = sigmas[3:]
    if 16 * sixth < 4 * fifth < fourth and spacing > _LAST_STEP:
        return noise_floor(phi, spacing / 32)
    return max(sigmas[3:])


def slope_at_zero(
    phi: Callable[[float], float],
    noise: float,
    scale: float,
    epsilon: float = sys.float_info.epsilon,
    *,
    to_the_end: bool = False,
    size: float = 0.0,
    largest_step: float = LARGEST_STEP,
    single_step: bool = False,
) -> Slope:
    """Return the derivative of ``phi`` at 0 with an estimate of its error, from steps 3e-2 down to 2e-7 or less.

    Args:
        phi: the function along one direction of unit norm; NaN where it is not defined (such a step is skipped).
        noise: the absolute noise floor of ``phi``.
        scale: the size a derivative typically has here; 0 if unknown. An error above 1e-4 of it counts as a kink.
        epsilon: machine epsilon of the dtype in which ``phi`` computes.
        to_the_end: use the smallest steps too if larger ones seem sufficient: a function rounded to three decimals
            looks linear to the larger ones, and flat to the smallest.
        size: the size of the numbers whose difference ``phi`` is, if its values do not show it: they round.
        largest_step: the step to begin with.
        single_step: use no other step (4 calls of ``phi``).

    Source: the error of a level is min(|R(h) - C(h/2)|, |R(h) - R(4h)|) + |S(h) - 2 S(h/2)| / 2 plus the noise,
    2 max(noise, 8 eps max|phi|, eps size / 2) / h.
    """
    values: dict[float, float] = {}

    def at(t: float) -> float:
        if t not in values:
            values[t] = phi(t)
        return values[t]

    levels: list[Level] = []
    step = largest_step
    while step > _LAST_STEP:
        level = _level(at, step, noise, epsilon, size)
        if level is not None:
            levels.append(_compared_with_larger(level, levels))
        if single_step or (levels and _is_last(levels, level, step * _RATIO, scale, to_the_end)):
            break
        step *= _RATIO
    if not levels:
        return Slope(math.nan, math.inf, kinked=True, resolved=False, usable=False)
    largest = max(size, *map(abs, filter(math.isfinite, values.values())))
    return _slope(levels, scale, is_quiet=largest == 0 or not noise > _NOISIEST * largest)


def _slope(levels: list[Level], scale: float, *, is_quiet: bool) -> Slope:
    best = _best(levels)
    error = max(best.error, _contradiction(levels, best))
    # Without a typical slope, the slope itself and the noise floor are the measure.
    allowed = _RESOLVED * scale if scale else max(_RESOLVED * abs(best.derivative), 10 * best.floor)
    resolved = is_quiet and error <= allowed
    usable = is_quiet and error <= max(abs(best.derivative) / 10, 1e3 * best.floor)
    return Slope(best.derivative, error, _is_kinked(levels) or not resolved, resolved, usable, best.step, tuple(levels))


def _best(levels: list[Level]) -> Level:
    return min(levels, key=lambda level: level.error)


def _is_last(levels: list[Level], level: Level | None, next_step: float, scale: float, to_the_end: bool) -> bool:
    """Return whether no smaller step is taken: its noise would be above the error, or the smallest steps add nothing.

    ``level`` is that of the present step; None if its values are not finite.
    """
    error = _best(levels).error
    if level is not None and level.floor > error and not to_the_end:
        return True
    return next_step <= _SMALLEST_STEP and (error <= _RESOLVED * scale or not _improves(levels))


def _level(at: Callable[[float], float], step: float, noise: float, epsilon: float, size: float) -> Level | None:
    origin, half = at(0.0), step / 2
    points = [at(step), at(-step), at(half), at(-half)]
    if not all(map(math.isfinite, [origin, *points])):
        return None
    forward, backward, half_forward, half_backward = points
    central, central_half = (forward - backward) / (2 * step), (half_forward - half_backward) / step
    derivative = (4 * central_half - central) / 3
    second = (forward - 2 * origin + backward) / step
    second_half = (half_forward - 2 * origin + half_backward) / half
    least = epsilon * max(_ULPS_OF_A_DIFFERENCE * size, _LEAST_NOISE_ULPS * max(map(abs, [origin, *points])))
    floor = 2 * (max(noise, least) if math.isfinite(noise) else least) / step
    truncation = abs(derivative - central_half)
    error = truncation + abs(second - 2 * second_half) / 2 + floor
    return Level(step, derivative, truncation, error, second, second_half, floor)


def _compared_with_larger(level: Level, levels: list[Level]) -> Level:
    """Return a level with the truncation error by comparison with the next larger step, if that is less.

    The extrapolated derivative at 4 h is off by 256 times as much as the one at h; C(h/2) is off by far more.
    """
    if not levels or levels[-1].step > 4.01 * level.step:
        return level
    truncation = abs(level.derivative - levels[-1].derivative)
    saved = level.truncation - truncation
    return replace(level, truncation=truncation, error=level.error - saved) if saved > 0 else level


def _improves(levels: list[Level]) -> bool:
    """Return whether the last step resolved more than the one before: at a kink none does."""
    return len(levels) < 2 or levels[-1].error < levels[-2].error / 2


def _contradiction(levels: list[Level], best: Level) -> float:
    """Return how far another step that also looks resolved disagrees: a staircase is flat between its steps.

    Larger steps do not count if two neighbours agree: what oscillates within them has any slope, and a small error.
    """
    gaps = [
        (level.step / best.step, abs(level.derivative - best.derivative), level.error + best.error) for level in levels
    ]
    confirmed = any(
        1 / 4.01 <= ratio <= 4.01 and ratio != 1 and gap <= error <= _CONFIRMED * abs(best.derivative)
        for ratio, gap, error in gaps
    )
    return max((gap for ratio, gap, error in gaps if (ratio < 1 or not confirmed) and gap > 10 * error), default=0.0)


def _is_kinked(levels: list[Level]) -> bool:
    """Return whether the second difference no longer shrinks at the smallest steps, far above the noise."""
    clear = [level for level in levels if abs(level.second) > 20 * level.floor]
    if len(clear) < 2 or (clear[-1] is not levels[-1] and len(levels) - len(clear) > 2):
        return False
    return all(abs(level.second_half) > 0.8 * abs(level.second) for level in clear[-2:])
