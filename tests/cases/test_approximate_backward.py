"""An adjoint solver: backward integrates the adjoint equation, so it is right to the order of the integrator.

Runge-Kutta with a short step is off by about 4e-6: ``approximate``, the warning GC410, a pass. With a long step it is
off by per cents and fails. Twin: differentiating through the steps, which is exact.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, codes, judge

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def rate(state: Tensor, weight: Tensor) -> Tensor:
    return (state @ weight).tanh()


def runge_kutta(field, states: tuple[Tensor, ...], time: float, steps: int) -> tuple[Tensor, ...]:
    """Return the states after ``time``; ``field`` gives their rates."""

    def moved(rates: tuple[Tensor, ...], distance: float) -> tuple[Tensor, ...]:
        return tuple(state + distance * each for state, each in zip(states, rates, strict=True))

    step = time / steps
    for _ in range(steps):
        k1 = field(*states)
        k2 = field(*moved(k1, step / 2))
        k3 = field(*moved(k2, step / 2))
        k4 = field(*moved(k3, step))
        states = moved(tuple((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)), step)
    return states


class Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, weight: Tensor, time: float, steps: int) -> Tensor:
        (end,) = runge_kutta(lambda state: (rate(state, weight),), (state,), time, steps)
        ctx.save_for_backward(end, weight)
        ctx.time, ctx.steps = time, steps
        return end

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        end, weight = ctx.saved_tensors

        def backwards(state: Tensor, adjoint: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            slope = adjoint * (1 - rate(state, weight) ** 2)
            return -rate(state, weight), slope @ weight.t(), state.t() @ slope

        start = (end, gradient, torch.zeros_like(weight))
        _, to_state, to_weight = runge_kutta(backwards, start, ctx.time, ctx.steps)
        return to_state, to_weight, None, None


class NeuralODE(nn.Module):
    def __init__(self, time: float, steps: int, adjoint: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 2)
        self.time, self.steps, self.adjoint = time, steps, adjoint

    def forward(self, x: Tensor) -> Tensor:
        if self.adjoint:
            return self.head(Adjoint.apply(x, self.weight, self.time, self.steps))
        (end,) = runge_kutta(lambda state: (rate(state, self.weight),), (x,), self.time, self.steps)
        return self.head(end)


def test_an_adjoint_that_is_right_to_a_millionth_is_a_warning():
    unit = judge(NeuralODE(time=0.1, steps=1), X)
    assert unit.verdict == "pass"
    assert codes(unit) == {"GC410"}
    verdicts = {each.tensor: each.verdict for each in unit.tensors}
    assert verdicts["param:weight"] == "approximate"
    assert verdicts["param:head.weight"] == "same"


def test_a_warning_can_be_asked_to_fail():
    assert judge(NeuralODE(time=0.1, steps=1), X, fail_on="warning").verdict == "fail"


def test_an_adjoint_with_one_long_step_is_wrong():
    unit = judge(NeuralODE(time=1.0, steps=1), X)
    assert unit.verdict == "fail"
    assert "GC408" in codes(unit)


@pytest.mark.parametrize("steps", [1, 4])
def test_differentiating_through_the_steps_is_exact(steps):
    unit = judge(NeuralODE(time=1.0, steps=steps, adjoint=False), X)
    assert_passes(unit)
    assert {each.verdict for each in unit.tensors} == {"same"}
