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


class Vectorised(Loss):
    """torch makes a class of its own of a Function under ``vmap``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: Sine.apply(row, self.factor))(self.fc(x)) * self.scale


class Logarithm(Function):
    """Its backward is 0 / 0 for a value that forward clamps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clamp(min=0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * y / y


class VectorisedLogarithm(Loss):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(Logarithm.apply)(self.fc(x)) * self.scale


PLACES = [Loss, Checkpointed, CheckpointedReentrant]


@pytest.mark.parametrize("model", [*PLACES, Forces, Vectorised])
def test_a_right_function_is_silent(model):
    assert_passes(judge(model(1.0), X))


@pytest.mark.parametrize("model", PLACES)
def test_a_wrong_function_is_named(model):
    unit = judge(model(1.01), X)
    assert "is not the derivative in 'x': off by 1.00e-02" in finding(unit, "GC408").message
    assert {"param:fc.weight", "param:fc.bias"} <= set(wrong_tensors(unit))
    assert "param:scale" not in wrong_tensors(unit)


@pytest.mark.parametrize("model", [Vectorised, Forces])
def test_a_wrong_function_in_a_transform_is_the_cause_of_what_is_behind_it(model):
    unit = judge(model(1.1), X)
    assert finding(unit, "GC408").allow == "GC408:Sine"
    causes = {each.tensor: each.cause for each in unit.findings if each.code == "GC401"}
    assert causes == dict.fromkeys(["input:x", "param:fc.bias", "param:fc.weight"], "GC408")


def test_a_function_that_makes_nan_in_a_transform_has_its_own_name_and_line():
    unit = judge(VectorisedLogarithm(1.0), X)
    found = next(each for each in unit.findings if each.tensor == "param:fc.weight")
    assert "the backward of Logarithm makes the first" in found.message
    line = Logarithm.backward.__code__.co_firstlineno
    assert (found.location.op, found.location.line) == ("Logarithm", line)
    assert found.location.file.endswith("test_functions_in_contexts.py")
