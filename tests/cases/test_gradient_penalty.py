"""Models that differentiate in their forward (a gradient penalty, forces): a wrong double backward is their cause.

The backward of the activation is right, but treats a saved value as a constant: the gradient of a gradient is wrong,
and with it that of every layer in front of the activation. Twin: the same formula of saved tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.judged import assert_passes, finding, judge, wrong_tensors

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


class Tanh(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


class TanhOfConstant(Tanh):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].detach().tanh() ** 2)


class Net(nn.Module):
    def __init__(self, activation: type[Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after, self.activation = nn.Linear(4, 8), nn.Linear(8, 1), activation

    def run(self, x: Tensor) -> Tensor:
        return self.after(self.activation.apply(self.before(x)))


class Penalty(Net):
    """WGAN-GP: the gradient of the critic has norm 1 on points between real and fake."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.run(x).sum(), x, create_graph=True)
        return (gradient.norm(dim=-1) - 1).pow(2).mean()


class Forces(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        energy = self.run(x).sum()
        (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
        return energy, -gradient


@pytest.mark.parametrize("model", [Penalty, Forces])
def test_a_wrong_double_backward_is_the_cause_of_what_is_in_front_of_it(model):
    unit = judge(model(TanhOfConstant), X)
    headline = finding(unit, "GC414")
    assert (unit.verdict, headline.severity, headline.location.op) == ("fail", "error", "TanhOfConstant")
    assert "the double backward of TanhOfConstant is wrong in 'x'" in headline.message
    assert wrong_tensors(unit) == ["param:before.bias", "param:before.weight"]
    about = [each for each in unit.findings if each.tensor in wrong_tensors(unit)]
    assert {each.cause for each in about} == {"GC414"}


@pytest.mark.parametrize("model", [Penalty, Forces])
def test_a_right_double_backward_passes(model):
    assert_passes(judge(model(Tanh), X))


def test_where_nothing_differentiates_a_gradient_it_is_a_note():
    unit = judge(Net.run.__get__(Net(TanhOfConstant)), X)
    assert (unit.verdict, finding(unit, "GC414").severity) == ("pass", "note")
