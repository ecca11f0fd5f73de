"""Inputs far from 1: lengths in metres at the size of atoms, frequencies, timestamps.

What is large and what is small must not depend on the unit: ||gradient|| ||value|| does not, ||gradient|| does.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, judge, wrong_tensors

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Sine(torch.autograd.Function):
    """sin(factor x), with the gradient multiplied by ``off``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, off: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor, ctx.off = factor, off
        return (factor * x).sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.off * ctx.factor * gradient * (ctx.factor * x).cos(), None, None


class Net(nn.Module):
    def __init__(self, factor: float, off: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.factor, self.off = nn.Linear(4, 3), factor, off

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(Sine.apply(x, self.factor, self.off))


@pytest.mark.parametrize("exponent", [-4, 0, 4, 12])
def test_a_right_gradient_passes_in_any_unit(exponent):
    assert_passes(judge(Net(10.0**-exponent), X * 10.0**exponent))


@pytest.mark.parametrize("exponent", [-9, -6])
def test_a_right_gradient_passes_in_small_units(exponent):
    assert_passes(judge(Net(10.0**-exponent), X * 10.0**exponent))


@pytest.mark.parametrize("exponent", [-4, 0, 4])
def test_a_wrong_gradient_is_named_in_any_unit(exponent):
    assert wrong_tensors(judge(Net(10.0**-exponent, 1.1), X * 10.0**exponent)) == ["input:x"]


def test_a_wrong_gradient_is_named_in_large_units():
    assert wrong_tensors(judge(Net(1e-12, 1.1), X * 1e12)) == ["input:x"]


def test_a_wrong_gradient_is_named_in_small_units():
    assert wrong_tensors(judge(Net(1e9, 1.1), X * 1e-9)) == ["input:x"]
