"""``while_loop`` and ``cond`` compile themselves, which refuses to be watched: they pass, and mistakes are named."""

import pytest
import torch
from torch import nn

from tests.judged import assert_passes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))


def looped(x, weight):
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(
        lambda count, h: count < 3, lambda count, h: (count + 1, torch.tanh(h @ weight)), (torch.tensor(0), x)
    )[1]


def branched(x, weight):
    return torch.cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: (x @ w).sin(), (x, weight))


OPERATORS = [looped, branched]


class Net(nn.Module):
    def __init__(self, operator):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.last, self.operator = nn.Linear(3, 3), nn.Linear(3, 2), operator

    def forward(self, x):
        return self.last(self.operator(self.linear(x), self.linear.weight))


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_of_control_flow_passes(operator):
    assert_passes(judge(Net(operator), X))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_mistake_beside_an_operator_of_control_flow_is_named(operator):
    unit = judge(plant(Net(operator), "last.weight", "scale 1.1"), X)
    assert wrong_tensors(unit) == ["param:last.weight"]
