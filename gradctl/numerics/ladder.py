"""The directional derivative of a function at 0, by a ladder of steps that knows a kink when it meets one.

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
class Slope:
    """A directional derivative.

    Attributes:
        derivative: d/dt phi(t) at 0; NaN if no step gave finite values.
        error: estimate of its absolute error; infinite if no step gave finite values.
        kinked: whether the one-sided slopes differ down to the smallest steps, or no step resolves the derivative.
        resolved: whether the error is small enough to say that autograd is right.
        usable: whether it is small enough to say that autograd is wrong: a function that oscillates faster than the
            steps has a small error by luck, against a derivative that is large with reason.
        step: the larger distance of the central differences that were kept.
    """

    derivative: float
    error: float
    kinked: bool
    resolved: bool
    usable: bool
    step: float = math.nan


@dataclass(frozen=True, slots=True)
class _Level:
    step: float
    derivative: float
    truncation: float
    error: float
    second: float
    second_half: float
    floor: float


def central_slope(phi: Callable[[float], float], step: float) -> float:
    """Return the derivative of ``phi`` at 0 by central differences, extrapolated once (4 calls)."""
    coarse = (phi(step) - phi(-step)) / (2 * step)
    fine = (phi(step / 2) - phi(-step / 2)) / step
    return (4 * fine - coarse) / 3


def noise_floor(phi: Callable[[float], float], spacing: float = _NOISE_SPACING) -> float:
    """Return the standard deviation of the noise of ``phi`` near 0 (7 calls), absolute; NaN if a value is not finite.

    sigma_k² = gamma_k mean((Δ^k phi)²) with gamma_k = (k!)² / (2k)!, the largest of k = 4, 5, 6. Where these fall with
    k, it is the function that is seen, close to the edge of its domain, and the spacing is made smaller.
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
        phi: the function along one direction of unit norm; NaN where it is not defined (such a step is passed over).
        noise: the absolute noise floor of ``phi``.
        scale: the size a derivative typically has here; 0 if unknown. An error above 1e-4 of it counts as a kink.
        epsilon: machine epsilon of the dtype in which ``phi`` computes.
        to_the_end: take the smallest steps too where larger ones seem to do: a function rounded to three decimals is
            linear to those, and flat to these.
        size: the size of the numbers whose difference ``phi`` is, if its values do not show it: they round.
        largest_step: the step to begin with.
        single_step: take no other step (4 calls of ``phi``).

    Source: the error of a level is min(|R(h) - C(h/2)|, |R(h) - R(4h)|) + |S(h) - 2 S(h/2)| / 2 plus the noise,
    2 max(noise, 8 eps max|phi|, eps size / 2) / h.
    """
    values: dict[float, float] = {}

    def at(t: float) -> float:
        if t not in values:
            values[t] = phi(t)
        return values[t]

    levels: list[_Level] = []
    best: _Level | None = None
    step = largest_step
    while step > _LAST_STEP:
        level = _level(at, step, noise, epsilon, size)
        if level is not None:
            level = _compared_with_larger(level, levels)
            levels.append(level)
            best = level if best is None or level.error < best.error else best
            if level.floor > best.error and not to_the_end:
                break
        step *= _RATIO
        if single_step:
            break
        if step <= _SMALLEST_STEP and best is not None and (best.error <= _RESOLVED * scale or not _improves(levels)):
            break
    if best is None:
        return Slope(math.nan, math.inf, kinked=True, resolved=False, usable=False)
    error = max(best.error, _contradiction(levels, best))
    # Where nothing has a slope to measure by, the noise floor is the measure.
    resolved = error <= _RESOLVED * scale or (
        scale == 0 and error <= max(_RESOLVED * abs(best.derivative), 10 * best.floor)
    )
    largest = max(size, *map(abs, filter(math.isfinite, values.values())))
    quiet = largest == 0 or not noise > _NOISIEST * largest
    usable = quiet and error <= max(abs(best.derivative) / 10, 1e3 * best.floor)
    resolved = resolved and quiet
    return Slope(best.derivative, error, _is_kinked(levels) or not resolved, resolved, usable, best.step)


def _level(at: Callable[[float], float], step: float, noise: float, epsilon: float, size: float) -> _Level | None:
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
    return _Level(step, derivative, truncation, error, second, second_half, floor)


def _compared_with_larger(level: _Level, levels: list[_Level]) -> _Level:
    """Return a level whose truncation error is taken from the next larger step, if that is less.

    The extrapolated derivative at 4 h is off by 256 times as much as the one at h; C(h/2) is off by far more.
    """
    if not levels or levels[-1].step > 4.01 * level.step:
        return level
    truncation = abs(level.derivative - levels[-1].derivative)
    saved = level.truncation - truncation
    return replace(level, truncation=truncation, error=level.error - saved) if saved > 0 else level


def _improves(levels: list[_Level]) -> bool:
    """Tell whether the last step resolved more than the one before: at a kink none does."""
    return len(levels) < 2 or levels[-1].error < levels[-2].error / 2


def _contradiction(levels: list[_Level], best: _Level) -> float:
    """Return how far another step that also looks resolved disagrees: a staircase is flat between its steps.

    Larger steps do not count if two neighbours agree: what oscillates within them has any slope, and a small error.
    """
    neighbours = [level for level in levels if 1 / 4.01 <= level.step / best.step <= 4.01 and level is not best]
    confirmed = any(
        abs(level.derivative - best.derivative) <= level.error + best.error <= _CONFIRMED * abs(best.derivative)
        for level in neighbours
    )
    others = [level for level in levels if level.step < best.step or not confirmed]
    gaps = ((abs(level.derivative - best.derivative), level.error + best.error) for level in others)
    return max((gap for gap, error in gaps if gap > 10 * error), default=0.0)


def _is_kinked(levels: list[_Level]) -> bool:
    """Tell whether the second difference stops shrinking with the step, far above the noise, at the smallest steps."""
    clear = [level for level in levels if abs(level.second) > 20 * level.floor]
    if len(clear) < 2 or (clear[-1] is not levels[-1] and len(levels) - len(clear) > 2):
        return False
    return all(abs(level.second_half) > 0.8 * abs(level.second) for level in clear[-2:])
