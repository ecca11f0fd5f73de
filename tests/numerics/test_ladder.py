"""The ladder against closed forms: smooth, kinked, noisy, stepped and undefined functions of one variable."""

import math
import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradctl.numerics.ladder import noise_floor, slope_at_zero

SMOOTH = {
    "sin": (lambda t: math.sin(t + 1), math.cos(1)),
    "exp": (math.exp, 1.0),
    "quintic": (lambda t: (t + 1) ** 5, 5.0),
    "reciprocal": (lambda t: 1 / (t + 2), -0.25),
    "steep": (lambda t: math.tanh(30 * t), 30.0),
    "constant": (lambda t: 7.0, 0.0),
    "large value": (lambda t: 1e8 + t, 1.0),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_function_is_resolved_and_the_error_covers_the_truth(name):
    phi, derivative = SMOOTH[name]
    slope = slope_at_zero(phi, noise_floor(phi), scale=max(abs(derivative), 1.0))
    assert abs(slope.derivative - derivative) <= 10 * slope.error
    assert slope.error < 1e-4 * max(abs(derivative), 1.0)
    assert slope.resolved and slope.usable and not slope.kinked


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=7))
def test_the_error_covers_the_truth_for_any_polynomial(coefficients):
    def phi(t: float) -> float:
        return math.fsum(c * t**k for k, c in enumerate(coefficients))

    derivative = coefficients[1] if len(coefficients) > 1 else 0.0
    slope = slope_at_zero(phi, noise_floor(phi), scale=1.0)
    assert abs(slope.derivative - derivative) <= 10 * slope.error + sys.float_info.min  # denormals have no digits
    assert slope.error < 1e-6


@pytest.mark.parametrize(
    "phi", [abs, lambda t: max(t, 0.0), lambda t: max(t, 0.0) + math.sin(t)], ids=["abs", "relu", "relu and sine"]
)
def test_a_kink_at_the_point_is_seen(phi):
    assert slope_at_zero(phi, noise_floor(phi), scale=1.0).kinked


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_a_kink_beside_the_point_does_not_matter(distance):
    def phi(t: float) -> float:
        return max(t - distance, 0.0) + t

    slope = slope_at_zero(phi, noise_floor(phi), scale=1.0)
    assert slope.derivative == pytest.approx(1.0, abs=1e-9)
    assert slope.resolved and not slope.kinked


def test_a_function_in_float32_resolves_nothing_to_speak_of_but_says_so():
    import numpy as np

    def phi(t: float) -> float:
        return float(np.float32(math.sin(1 + t)))

    slope = slope_at_zero(phi, noise_floor(phi), scale=1.0, epsilon=float(np.finfo(np.float32).eps))
    assert abs(slope.derivative - math.cos(1)) <= 10 * slope.error
    assert slope.error > 1e-7


@pytest.mark.parametrize("decimals", [2, 3])
def test_steps_are_not_taken_for_a_slope(decimals):
    slope = slope_at_zero(lambda t: round(1.23 + t, decimals), 0.0, scale=0.0, to_the_end=True)
    assert slope.derivative == pytest.approx(0.0, abs=1e-6) or not slope.usable


@pytest.mark.parametrize("frequency", [1e7, 1e9])
def test_an_oscillation_faster_than_the_steps_calls_nobody_wrong(frequency):
    def phi(t: float) -> float:
        return math.sin(frequency * (t + 0.1))

    assert not slope_at_zero(phi, noise_floor(phi), scale=frequency, to_the_end=True).usable


def test_points_where_the_function_is_undefined_are_passed_over():
    def phi(t: float) -> float:
        return math.log(1 + t) if abs(t) < 1e-3 else math.nan

    slope = slope_at_zero(phi, 0.0, scale=1.0)
    assert slope.derivative == pytest.approx(1.0, abs=1e-9)


def test_a_function_that_is_nowhere_defined_gives_an_infinite_error():
    slope = slope_at_zero(lambda t: math.nan, 0.0, scale=1.0)
    assert math.isnan(slope.derivative) and math.isinf(slope.error) and not slope.resolved


@pytest.mark.parametrize("size", [1e-12, 1e-8, 1e-4])
def test_the_noise_floor_is_that_of_added_noise(size):
    generator = random.Random(0)
    estimates = [noise_floor(lambda t: math.sin(t) + generator.gauss(0, size)) for _ in range(20)]
    assert size / 2 < sorted(estimates)[10] < 2 * size


def test_the_noise_floor_of_float64_is_its_rounding():
    assert noise_floor(lambda t: math.sin(1 + t)) < 1e-15
