"""Case 9 (pytorch 187297, 23395, 52248): ``where(x > 0, sqrt(x), x)`` has a NaN gradient where sqrt is not taken.

The value is finite: 0 * inf arises in backward alone. GC407 in every form. Twin: sqrt of a safe argument.
"""

import pytest
import torch
from torch import Tensor

from tests.judged import assert_passes, finding, judge


def branch_not_taken(x: Tensor) -> Tensor:
    return torch.where(x > 0, x.sqrt(), x)


def safe_argument(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), x)


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_the_branch_not_taken_makes_the_gradient_nan(value):
    unit = judge(branch_not_taken, torch.tensor([4.0, value]))
    assert unit.verdict == "fail"
    assert finding(unit, "GC407").tensor == "input:x"


def test_a_safe_argument_is_right():
    assert_passes(judge(safe_argument, torch.tensor([4.0, -1.0])))


def test_the_branch_that_is_taken_is_right():
    assert_passes(judge(branch_not_taken, torch.tensor([4.0, 2.5])))
