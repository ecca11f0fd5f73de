"""Case 8: ``torch.normal(mean, std)`` states a gradient of zero, by design.

With the seed held, its value moves with mean and std: autograd's zero is not the derivative, ``reference-wrong``.
Twin: the same draw written as ``mean + std * noise``.
"""

import torch
from torch import Tensor

from tests.judged import assert_passes, judge, wrong_tensors

MEAN, STD = torch.tensor([0.1, -0.4, 2.0]), torch.tensor([0.5, 1.0, 0.2])


def drawn(mean: Tensor, std: Tensor) -> Tensor:
    return torch.normal(mean, std)


def reparameterised(mean: Tensor, std: Tensor) -> Tensor:
    return mean + std * torch.randn_like(mean)


def test_normal_states_a_zero_gradient_that_is_not_the_derivative():
    unit = judge(drawn, MEAN, STD)
    assert (unit.verdict, wrong_tensors(unit)) == ("fail", ["input:mean", "input:std"])


def test_the_reparameterised_draw_is_right():
    assert_passes(judge(reparameterised, MEAN, STD))
