"""Gradient reversal (Ganin & Lempitsky 2015): GC408 by name, once, until it is allowed.

The label branch does not pass through it and is right either way. Twin: the factor +1, which is the derivative.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, codes, finding, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
ALLOW = "GC408:Reverse"


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None


class Adversarial(nn.Module):
    def __init__(self, factor: float = -1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.label, self.domain = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 2)
        self.factor = factor

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.features(x).tanh()
        return {"label": self.label(h), "domain": self.domain(Reverse.apply(h, self.factor))}


def test_gradient_reversal_is_named_with_what_it_spoils():
    unit = judge(Adversarial(), X)
    assert (unit.verdict, finding(unit, "GC408").allow) == ("fail", ALLOW)
    assert wrong_tensors(unit) == ["input:x", "param:features.bias", "param:features.weight"]
    assert {each.cause for each in unit.findings if each.code == "GC401"} <= {"GC408"}


def test_allowed_gradient_reversal_passes():
    unit = judge(Adversarial(), X, allows=[ALLOW])
    assert (unit.verdict, wrong_tensors(unit)) == ("pass", [])


@pytest.mark.parametrize("parameter", ["features.weight", "label.weight", "domain.bias"])
def test_allowed_gradient_reversal_hides_no_other_mistake(parameter):
    unit = judge(plant(Adversarial(), parameter, "scale 1.001"), X, allows=[ALLOW])
    assert wrong_tensors(unit) == [f"param:{parameter}"]


def test_a_factor_of_one_is_the_derivative():
    unit = judge(Adversarial(factor=1.0), X)
    assert_passes(unit)
    assert "GC408" not in codes(unit)
