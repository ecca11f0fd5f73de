"""A custom Function in the places where models put one: a loss, a checkpoint, a transform of ``torch.func``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tests.judged import assert_passes, finding, judge, wrong_tensors

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


class SquaredSum(Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.pow(2).sum()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return ctx.factor * 2 * x * gradient, None


class Sine(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return ctx.factor * gradient * x.cos(), None


class Loss(nn.Module):
    """Ends in a Function whose output has no dimension."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.factor = nn.Linear(5, 6), factor
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return SquaredSum.apply(self.fc(x), self.factor)


class Checkpointed(Loss):
    """Beside another operation, whose saved tensors the checkpoint counts too."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda z: Sine.apply(z, self.factor) * self.scale, self.fc(x), use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class Forces(Loss):
    """The gradient of each row's energy is the output."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda row: Sine.apply(row, self.factor).pow(2).sum()))(self.fc(x))


PLACES = [Loss, Checkpointed, CheckpointedReentrant]


@pytest.mark.parametrize("model", [*PLACES, Forces])
def test_a_right_function_is_silent(model):
    assert_passes(judge(model(1.0), X))


@pytest.mark.parametrize("model", PLACES)
def test_a_wrong_function_is_named(model):
    unit = judge(model(1.01), X)
    assert "is not the derivative in 'x': off by 1.00e-02" in finding(unit, "GC408").message
    assert {"param:fc.weight", "param:fc.bias"} <= set(wrong_tensors(unit))
    assert "param:scale" not in wrong_tensors(unit)
