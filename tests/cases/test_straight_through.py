"""Backwards that are not the derivative on purpose: straight-through, clipped and scaled gradients, as Functions.

GC408 until allowed. When allowed, the rest is judged as strictly as before: a mistake of a thousandth between two uses
of the Function is named. What lies behind a backward that states no linear map (it cannot be differentiated, or it
clips) is not judged: inconclusive, never ``same``.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tests.judged import finding, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Binarize(torch.autograd.Function):
    """The sign, with the gradient of a clamp (Courbariaux et al. 2016)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


class ScaleGradient(torch.autograd.Function):
    """The identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None


class ClipGradient(torch.autograd.Function):
    """The identity whose gradient is clamped: its backward is not even linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.1, 0.1)


class RoundOnce(torch.autograd.Function):
    """Straight-through rounding whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Net(nn.Module):
    """The Function twice, with a linear layer before, between and after."""

    def __init__(self, function: type[torch.autograd.Function], *constants: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.between, self.after = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.function, self.constants = function, constants

    def forward(self, x: Tensor) -> Tensor:
        h = self.function.apply(self.before(x).tanh(), *self.constants)
        return self.after(self.function.apply(self.between(h).tanh(), *self.constants))


ON_PURPOSE = {"Binarize": (Binarize,), "ScaleGradient": (ScaleGradient, 0.5), "ClipGradient": (ClipGradient,)}


@pytest.mark.parametrize("name", [*ON_PURPOSE, "RoundOnce"])
def test_a_backward_that_is_no_derivative_is_one_headline_with_the_line_to_allow_it(name):
    unit = judge(Net(*ON_PURPOSE.get(name, (RoundOnce,))), X)
    assert unit.verdict == "fail"
    assert finding(unit, "GC408").allow == f"GC408:{name}"
    assert not set(wrong_tensors(unit)) & {"param:after.weight", "param:after.bias"}


@pytest.mark.parametrize("name", ["Binarize", "ScaleGradient"])
def test_allowed_it_passes(name):
    unit = judge(Net(*ON_PURPOSE[name]), X, allows=[f"GC408:{name}"])
    assert (unit.verdict, wrong_tensors(unit)) == ("pass", [])


@pytest.mark.parametrize("parameter", ["before.weight", "between.weight", "after.bias"])
@pytest.mark.parametrize("name", ["Binarize", "ScaleGradient"])
def test_allowed_it_hides_no_other_mistake(name, parameter):
    model = plant(Net(*ON_PURPOSE[name]), parameter, "scale 1.001")
    assert wrong_tensors(judge(model, X, allows=[f"GC408:{name}"])) == [f"param:{parameter}"]


@pytest.mark.parametrize("function", [RoundOnce, ClipGradient])
def test_behind_a_backward_that_states_no_linear_map_nothing_is_called_the_same(function):
    unit = judge(Net(function), X, allows=[f"GC408:{function.__name__}"])
    verdicts = {each.tensor: each.verdict for each in unit.tensors}
    assert (unit.verdict, wrong_tensors(unit)) == ("inconclusive", [])
    assert verdicts["param:after.weight"] == "same"
    assert {verdicts[f"param:{layer}.weight"] for layer in ("before", "between")} == {"unresolved"}


@pytest.mark.parametrize("function", [RoundOnce, ClipGradient])
def test_after_a_backward_that_states_no_linear_map_a_mistake_is_named(function):
    model = plant(Net(function), "after.weight", "scale 1.001")
    assert wrong_tensors(judge(model, X, allows=[f"GC408:{function.__name__}"])) == ["param:after.weight"]
