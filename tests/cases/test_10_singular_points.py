"""Case 10: points where the slope is infinite or has no limit.

``sqrt`` of a sum of squares and ``abs().pow(0.5)`` at 0 have a NaN gradient: GC407. ``atan2(0, 0)`` states 0 while
slopes beside it reach 1e6: non-differentiable, judged beside the point. Twins: an epsilon inside; torch's own norm.
"""

import pytest
import torch
from torch import Tensor

from tests.judged import assert_passes, codes, judge


def length(x: Tensor) -> Tensor:
    return (x**2).sum().sqrt()


def root(x: Tensor) -> Tensor:
    return x.abs().pow(0.5)


@pytest.mark.parametrize("function", [length, root])
def test_an_infinite_slope_at_zero_is_a_nan_gradient(function):
    unit = judge(function, torch.zeros(3))
    assert unit.verdict == "fail"
    assert "GC407" in codes(unit)


@pytest.mark.parametrize("function", [length, root])
def test_the_same_functions_away_from_zero_are_right(function):
    assert_passes(judge(function, torch.tensor([0.3, -1.0, 2.0])))


def test_an_epsilon_inside_the_root_is_right_at_zero():
    assert_passes(judge(lambda x: ((x**2).sum() + 1e-3).sqrt(), torch.zeros(3)))


def test_atan2_at_the_origin_is_not_differentiable_and_no_mistake():
    unit = judge(torch.atan2, torch.zeros(3), torch.zeros(3))
    assert_passes(unit)
    assert "GC405" in codes(unit)
