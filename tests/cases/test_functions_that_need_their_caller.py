"""Functions that cannot be judged alone: checkpointing and reversible nets, as published packages write them.

They close over the parameters that they are also given, refuse ``autograd.grad``, or raise for an input that asks for
no gradient (which their only caller never hands them). None of that makes a gradient of this model wrong.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradctl.core.errors import NothingToCheck
from tests.judged import assert_passes, finding, judge, wrong_tensors

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Recompute(torch.autograd.Function):
    """Checkpointing as guided-diffusion writes it: gradients of the parameters that ``run`` closes over."""

    @staticmethod
    def forward(ctx: Any, run: Any, length: int, *args: Tensor) -> Tensor:
        ctx.run, ctx.inputs, ctx.parameters = run, list(args[:length]), list(args[length:])
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            output = ctx.run(*[x.view_as(x) for x in inputs])
        return None, None, *torch.autograd.grad(output, inputs + ctx.parameters, gradient, allow_unused=True)


class RecomputeStrictly(Recompute):
    """The same without ``allow_unused``: it raises when its parameters are replaced by copies."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            output = ctx.run(*inputs)
        return None, None, *torch.autograd.grad(output, inputs + ctx.parameters, gradient)


class RefusesGrad(torch.autograd.Function):
    """As memcnn: only ``backward`` is taken."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("not compatible with .grad()")
        (x,) = ctx.saved_tensors
        return gradient * x.exp()


class Net(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after, self.function = nn.Linear(4, 4), nn.Linear(3, 2), function
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        if self.function is RefusesGrad:
            return self.after(self.inner(RefusesGrad.apply(h)))
        return self.after(self.function.apply(self.inner, 1, h, *self.inner.parameters()))


@pytest.mark.parametrize("function", [Recompute, RecomputeStrictly, RefusesGrad])
def test_a_right_function_that_cannot_stand_alone_passes(function):
    assert_passes(judge(Net(function), X))


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (1 + 9 * x**2)


class Spiking(nn.Module):
    """As snntorch: the first reset is computed from a constant membrane potential."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.out = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        membrane = torch.zeros(5, 3)
        for _ in range(3):
            reset = Step.apply(membrane - 1).detach()
            membrane = 0.9 * membrane + self.fc(x) - reset
        return Step.apply(membrane - 1), self.out(membrane)


def test_an_allowed_function_that_also_meets_a_constant_passes():
    unit = judge(Spiking(), X, allows=["GC408:Step"])
    assert (unit.verdict, wrong_tensors(unit)) == ("pass", [])


class RoundOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class RoundsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return RoundOnce.apply(self.fc(x))


def test_where_everything_lies_behind_an_allowed_function_nothing_is_judged():
    with pytest.raises(NothingToCheck, match="RoundOnce"):
        judge(RoundsLast(), X, allows=["GC408:RoundOnce"])


class Stabilised(nn.Module):
    """A softmax whose maximum is detached, and a constant that makes it matter (Performer's features)."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.checkpointed = nn.Linear(4, 3), checkpointed

    def run(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return (h - h.amax().detach()).exp() + 0.1

    def forward(self, x: Tensor) -> Tensor:
        return Recompute.apply(self.run, 1, x, *self.fc.parameters()) if self.checkpointed else self.run(x)


def test_a_detached_maximum_passes():
    assert_passes(judge(Stabilised(checkpointed=False), X))


def test_a_detached_maximum_inside_a_function_is_one_headline_with_the_line_to_allow_it():
    assert finding(judge(Stabilised(checkpointed=True), X), "GC408").allow == "GC408:Recompute"
