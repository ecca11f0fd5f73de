"""A Function that is wrong in one of many applications (the 18th step of a recurrence): it is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.gradients.test_function_contracts import checked

X = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(7))


class Step(Function):
    @staticmethod
    def forward(ctx, h, number, wrong):
        y = torch.tanh(h)
        ctx.save_for_backward(y)
        ctx.factor = 1.03 if number == wrong else 1.0
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return ctx.factor * gradient * (1 - y * y), None, None


class Recurrent(nn.Module):
    def __init__(self, wrong: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.of_x, self.of_h, self.wrong = nn.Linear(4, 8), nn.Linear(8, 8), wrong

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[1], 8, dtype=x.dtype)
        for number in range(len(x)):
            h = Step.apply(self.of_x(x[number]) + self.of_h(h), number, self.wrong)
        return h


@pytest.mark.parametrize("wrong", [0, 7, 17, 19])
def test_a_function_that_is_wrong_in_one_step_is_named(wrong):
    (found,) = checked(Recurrent(wrong), X)
    assert (found.severity, found.message) == (
        "error",
        "Step.backward is not the derivative in 'h': off by 3.00e-02 (relative).",
    )


def test_the_right_one_is_silent():
    assert checked(Recurrent(None), X) == []
