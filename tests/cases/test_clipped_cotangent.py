"""A backward that is not linear in the incoming gradient: right for small ones, clipped for those of a large loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.judged import assert_passes, finding, judge

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


class Clip(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-10, 10)


class DropsSmall(Clip):
    @staticmethod
    def backward(ctx, gradient):
        return gradient * (gradient.abs() > 1e-3)


class ThroughBfloat16(Clip):
    """Linear: the cast is rounding, which the float64 check does not make."""

    @staticmethod
    def backward(ctx, gradient):
        return (1.0 * gradient.bfloat16()).to(gradient.dtype)


class Normalised(Clip):
    """Linear, by steps that are not."""

    @staticmethod
    def backward(ctx, gradient):
        size = gradient.abs().max()
        return gradient / size * size


class Last(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.function = nn.Linear(5, 6), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.fc(x))


@pytest.mark.parametrize("function", [Clip, DropsSmall])
def test_a_backward_that_is_not_linear_is_an_error_that_can_be_allowed(function):
    unit = judge(Last(function), X)
    found = finding(unit, "GC408")
    assert found.message.startswith(
        f"{function.__name__}.backward is not linear in the incoming gradient: for one that is 2^"
    )
    assert (found.severity, found.allow, unit.verdict) == ("error", f"GC408:{function.__name__}", "fail")


@pytest.mark.parametrize("function", [ThroughBfloat16, Normalised])
def test_a_linear_backward_is_silent(function):
    assert_passes(judge(Last(function), X))
