"""The interval of a median is made of order statistics with the coverage that it states, for any distribution."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradctl.numerics.intervals import interval_rank, median_interval

SAMPLES = st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=40)


# From tables of the sign test (Conover, table A3): the k-th smallest and largest, at 95 %.
@pytest.mark.parametrize(("count", "rank"), [(0, 0), (5, 0), (6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (25, 8)])
def test_the_ranks_are_those_of_the_sign_test(count, rank):
    assert interval_rank(count) == rank


@pytest.mark.parametrize("count", range(6, 15))
def test_the_coverage_is_at_least_95_percent_and_that_of_the_next_rank_is_not(count):
    # Each sample lies below the median of its distribution with probability 1/2: all cases are as likely.
    below = [sum(case) for case in itertools.product((0, 1), repeat=count)]

    def coverage(rank):
        return sum(rank <= each <= count - rank for each in below) / 2**count

    assert coverage(interval_rank(count)) >= 0.95 > coverage(interval_rank(count) + 1)


@given(SAMPLES)
def test_the_interval_encloses_the_median(samples):
    median, lower, upper = median_interval(samples)
    assert median == statistics.median(samples)
    assert (lower is None) == (upper is None) == (len(samples) < 6)
    assert lower is None or min(samples) <= lower <= median <= upper <= max(samples)


@given(SAMPLES, st.floats(0.5, 2.0))
def test_the_interval_does_not_depend_on_order_and_scales(samples, factor):
    median, lower, upper = median_interval(samples)
    assert median_interval(samples[::-1]) == (median, lower, upper)
    scaled = median_interval([factor * each for each in samples])
    expected = (factor * each if each is not None else None for each in (median, lower, upper))
    assert all(a == b or math.isclose(a, b, rel_tol=1e-12) for a, b in zip(scaled, expected, strict=True))
