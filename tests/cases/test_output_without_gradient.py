"""A float output that a Function marks as not differentiable, though it moves with the input: noted (GC418)."""

import pytest
import torch
from torch import nn
from torch.autograd import Function

from tests.judged import assert_passes, codes, finding, judge

X = torch.tensor([0.3, -0.7, 1.1])


class Normalise(Function):
    @staticmethod
    def forward(ctx, x, marked):
        norm = x.norm()
        ctx.save_for_backward(x, norm)
        if marked:
            ctx.mark_non_differentiable(norm)
        return x / norm, norm

    @staticmethod
    def backward(ctx, gradient, of_norm):
        x, norm = ctx.saved_tensors
        return gradient / norm - x * (gradient * x).sum() / norm**3 + of_norm * x / norm, None


class Net(nn.Module):
    def __init__(self, marked):
        super().__init__()
        self.marked = marked

    def forward(self, x):
        return Normalise.apply(x, self.marked)


def test_an_output_that_is_marked_though_it_moves_is_noted():
    unit = judge(Net(marked=True), X)
    assert unit.verdict == "pass"
    assert finding(unit, "GC418").tensor == "output.1"


def test_an_output_with_a_gradient_is_not_noted():
    unit = judge(Net(marked=False), X)
    assert_passes(unit)
    assert "GC418" not in codes(unit)


@pytest.mark.parametrize(
    "second",
    [lambda x: x.norm().detach(), lambda x: (x > 0).double().mean(), lambda x: x.argmax().float()],
    ids=["detached", "share", "index"],
)
def test_what_is_cut_or_moves_in_steps_is_not_noted(second):
    unit = judge(lambda x: (x.sin(), second(x)), X)
    assert_passes(unit)
    assert "GC418" not in codes(unit)
