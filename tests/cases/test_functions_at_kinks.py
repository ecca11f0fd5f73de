"""What a custom Function gives at single points: wrong where it is smooth is an error, also if there is a kink nearby;
at a kink a value outside those around it is a warning.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from tests.judged import assert_passes, finding, judge

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


class Square(Function):
    """x + x², with a slope at 0 of its own."""

    @staticmethod
    def forward(ctx, x, at_zero):
        ctx.save_for_backward(x)
        ctx.at_zero = at_zero
        return x + x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.where(x == 0, ctx.at_zero, 1 + 2 * x), None


class Relu(Square):
    @staticmethod
    def forward(ctx, x, at_zero):
        ctx.save_for_backward(x)
        ctx.at_zero = at_zero
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.where(x == 0, ctx.at_zero, (x > 0).to(x.dtype)), None


class Largest(Function):
    """The maximum, whose gradient is shared between equal elements."""

    @staticmethod
    def forward(ctx, x, _):
        y = x.amax(-1, keepdim=True)
        ctx.save_for_backward(x == y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (largest,) = ctx.saved_tensors
        return gradient * largest / largest.sum(-1, keepdim=True), None


class Net(nn.Module):
    def __init__(self, function: type[Function], at_zero: float, *, kink: bool = False) -> None:
        super().__init__()
        self.p, self.z = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
        self.function, self.at_zero, self.kink = function, at_zero, kink

    def forward(self, x: Tensor) -> Tensor:
        y = self.function.apply(self.p, self.at_zero) * x
        return y + F.relu(self.z) * x if self.kink else y


@pytest.mark.parametrize("kink", [False, True])
def test_a_wrong_value_where_the_function_is_smooth_is_an_error(kink):
    unit = judge(Net(Square, 0.0, kink=kink), X)
    found = finding(unit, "GC408")
    assert (unit.verdict, found.severity) == ("fail", "error")
    assert found.message.startswith("Square.backward is not the derivative in 'x': off by 1.00e+00 (relative)")


def test_the_right_value_there_is_silent():
    assert_passes(judge(Net(Square, 1.0, kink=True), X))


def test_a_value_at_a_kink_outside_those_around_it_is_a_warning():
    unit = judge(Net(Relu, 5.0), X)
    found = finding(unit, "GC408")
    assert (unit.verdict, found.severity, found.allow) == ("pass", "warning", "GC408:Relu")
    assert found.message.startswith("Relu.backward gives ")
    assert "for an element of 'x' at a kink, around which it gives " in found.message


@pytest.mark.parametrize("at_zero", [0.0, 0.5, 1.0])
def test_any_value_between_those_around_it_is_right(at_zero):
    assert_passes(judge(Net(Relu, at_zero), X))


def test_equal_elements_may_share_the_gradient_of_their_maximum():
    assert_passes(judge(Net(Largest, 0.0), X))
