"""A wrong Function behind a gate that is zero at first (ReZero, LoRA, zero convolutions): no gradient shows it yet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.gradients.test_function_contracts import checked
from tests.judged import assert_passes, finding, judge, wrong_tensors

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


class Square(Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * ctx.factor * gradient * x, None


class ReZero(nn.Module):
    """The gate is behind the Function."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.gate, self.factor = nn.Linear(5, 5), nn.Parameter(torch.zeros(())), factor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * Square.apply(self.a(x), self.factor)


class ZeroTwice(ReZero):
    """Two gates are in front of the Function: its input does not move in first order."""

    def __init__(self, factor: float) -> None:
        super().__init__(factor)
        nn.init.zeros_(self.a.weight)
        nn.init.zeros_(self.a.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + Square.apply(self.gate * self.a(x), self.factor)


MODELS = pytest.mark.parametrize("model", [ReZero, ZeroTwice])


@MODELS
def test_a_wrong_function_is_an_error_with_the_parameters_that_it_will_make_wrong(model):
    unit = judge(model(1.01), X)
    found = finding(unit, "GC408")
    assert (unit.verdict, found.severity) == ("fail", "error")
    assert found.message.startswith("Square.backward is not the derivative ")
    assert {"param:a.bias", "param:a.weight"} <= set(wrong_tensors(unit))
    assert {each.cause for each in unit.findings if each.code == "GC401"} == {"GC408"}


def test_judged_alone_it_says_what_no_gradient_shows_yet():
    (found,) = checked(ReZero(1.01), X, hidden_from={"param:a.bias", "param:a.weight", "param:gate"})
    assert found.message.endswith(
        "; no gradient shows it at this point, but those of param:a.bias, param:a.weight pass it."
    )


@MODELS
def test_the_right_one_is_silent(model):
    assert_passes(judge(model(1.0), X))
