"""Gradients are judged down to about 1e-12 of the output; smaller ones are counted apart, and never called the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.judged import assert_passes, judge, wrong_tensors


class Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, factor):
        ctx.save_for_backward(weight)
        ctx.factor = factor
        return (weight**4).sum(0, keepdim=True)

    @staticmethod
    def backward(ctx, gradient):
        return 4 * ctx.factor * ctx.saved_tensors[0] ** 3 * gradient, None


class Regularised(nn.Module):
    """A loss with a penalty of relative size ``size``, whose gradient is ``factor`` times too large."""

    def __init__(self, size, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.weight, self.size, self.factor = nn.Linear(5, 1), nn.Parameter(torch.randn(6)), size, factor

    def forward(self, x):
        return self.a(x)[:, 0] + self.size * Penalty.apply(self.weight, self.factor)


def rows():
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def verdict_of(unit, name):
    return next(tensor.verdict for tensor in unit.tensors if tensor.tensor == name)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-8, 1e-9, 1e-10, 1e-11])
def test_an_error_of_one_percent_in_a_small_gradient_is_named(size):
    assert wrong_tensors(judge(Regularised(size, 1.01), rows())) == ["param:weight"]
    assert_passes(judge(Regularised(size), rows()))


def test_the_verdict_is_monotone_in_the_size():
    verdicts = []
    for exponent in range(16):
        unit = judge(Regularised(10.0**-exponent), rows())
        assert_passes(unit)
        verdicts.append(verdict_of(unit, "param:weight"))
    assert verdicts == sorted(verdicts)  # same …, then too-small
    assert set(verdicts) == {"same", "too-small"}


@pytest.mark.parametrize("size", [1e-8, 1e-9, 1e-10])
def test_a_branch_with_a_tiny_scale_is_judged(size):
    class LayerScale(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.w = nn.Linear(5, 6), nn.Parameter(torch.randn(6))

        def forward(self, x):
            h = self.a(x)
            return h + size * self.w * h.sin()

    unit = judge(LayerScale(), rows())
    assert_passes(unit)
    assert verdict_of(unit, "param:w") == "same"


def test_the_weight_of_a_layer_norm_over_one_element_is_too_small_to_judge():
    torch.manual_seed(0)
    unit = judge(nn.Sequential(nn.Linear(5, 1), nn.LayerNorm(1)), rows()[:2])
    assert_passes(unit)
    assert verdict_of(unit, "param:1.bias") == "same"
    assert "same" not in {verdict_of(unit, name) for name in ("param:0.weight", "param:1.weight", "input:input")}


MINIMA = {
    "cross entropy against itself": lambda h: F.cross_entropy(h, h.detach().softmax(-1)),
    "mse against itself": lambda h: F.mse_loss(h, h.detach()),
    "kl against itself": lambda h: F.kl_div(h.log_softmax(-1), h.detach().softmax(-1), reduction="batchmean"),
    "huber against itself": lambda h: F.huber_loss(h, h.detach()),
    "softmax summed": lambda h: h.softmax(-1).sum(),
    "layer norm summed": lambda h: F.layer_norm(h, (6,)).sum(),
    "gaussian nll against itself": lambda h: F.gaussian_nll_loss(h, h.detach(), torch.ones_like(h)),
    "cosine with itself": lambda h: 1 - F.cosine_similarity(h, h.detach()).mean(),
}


@pytest.mark.parametrize("loss", MINIMA.values(), ids=MINIMA)
def test_a_loss_at_its_minimum_is_not_inconclusive(loss):
    class AtMinimum(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(5, 6)

        def forward(self, x):
            return loss(self.a(x))

    assert_passes(judge(AtMinimum(), rows()))


RESOLVED = {
    "sin(1e5 h)": lambda h: (1e5 * h).sin(),
    "sin(1e3 h)": lambda h: (1e3 * h).sin(),
    "sigmoid at 20": lambda h: (h + 20).sigmoid(),
    "tanh at 8": lambda h: (h + 8).tanh(),
    "softplus at -20": lambda h: F.softplus(h - 20),
}


@pytest.mark.parametrize("function", RESOLVED.values(), ids=RESOLVED)
def test_steep_and_saturated_functions_are_resolved(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(5, 6)

        def forward(self, x):
            return function(self.a(x))

    unit = judge(Net(), rows())
    assert_passes(unit)
    assert {tensor.verdict for tensor in unit.tensors} == {"same"}


def test_time_stamps_are_moved_by_their_spread():
    class Clock(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(1, 4).double()

        def forward(self, seconds):
            return self.a(((seconds - 1.7e9) / 3600)[:, None]).tanh()

    unit = judge(Clock(), 1.7e9 + torch.arange(6, dtype=torch.float64) * 1800)
    assert_passes(unit)
    assert verdict_of(unit, "input:seconds") == "same"
