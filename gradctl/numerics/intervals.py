"""The confidence interval of a median: order statistics, for any distribution."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


def median_interval(samples: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the median of independent samples, and the ends of its confidence interval.

    The k-th smallest and the k-th largest of n samples enclose the median of their distribution, if that is continuous,
    with probability 1 - 2 P(B < k), where B is binomial(n, 1/2); k is the largest for which this is at least 95 %.

    Returns:
        The median and both ends, which are None for fewer than 6 samples: even all of them are not enough.

    Source: Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2.
    """
    ordered, rank = sorted(samples), interval_rank(len(samples))
    ends = (ordered[rank - 1], ordered[-rank]) if rank else (None, None)
    return statistics.median(ordered), *ends


def interval_rank(count: int) -> int:
    """Return the largest k for which the k-th smallest and largest of so many samples enclose the median; 0 if none."""
    outside, rank = 0.0, 0
    for below in range(count // 2):
        outside += 2 * math.comb(count, below) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        rank = below + 1
    return rank
