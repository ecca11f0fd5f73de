"""Stochastic rounding with a straight-through gradient: a Function that draws, accepted, and judged around."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.judged import codes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
ALLOW = ["GC408:StochasticRound"]


class StochasticRound(Function):
    @staticmethod
    def forward(ctx, x):
        return torch.floor(x * 4 + torch.rand_like(x)) / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(StochasticRound.apply(self.a(x)))


def test_an_accepted_function_that_draws_is_judged_around():
    unit = judge(Net(), X, allows=ALLOW)
    # That it draws once more where its linear map is taken is not seen in what the model draws.
    assert (unit.verdict, codes(unit)) == ("pass", {"GC408"})


def test_a_mistake_beside_it_is_named():
    assert wrong_tensors(judge(plant(Net(), "b.weight", "scale 1.001"), X, allows=ALLOW)) == ["param:b.weight"]
