"""The user's own point is judged where the function is smooth there; only what has a kink is judged beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import RelaxedOneHotCategorical

from tests.judged import assert_passes, codes, judge, wrong_tensors


class Shifted(torch.autograd.Function):
    """Return x + x²; its backward gives ``at_zero`` where x is 0, and 1 is right there."""

    @staticmethod
    def forward(ctx, x, at_zero):
        ctx.save_for_backward(x)
        ctx.at_zero = at_zero
        return x + x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.where(x == 0, ctx.at_zero, 1 + 2 * x), None


class KinkBesideSmooth(nn.Module):
    def __init__(self, at_zero, kink=True):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(1)))
        self.p, self.z = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
        self.at_zero, self.kink = at_zero, kink

    def forward(self, x):
        return Shifted.apply(self.p, self.at_zero) * self.w * x + (F.relu(self.z) * x if self.kink else 0)


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kink", [True, False])
def test_a_backward_that_is_wrong_at_zero_alone_is_found_beside_a_kink(kink):
    assert wrong_tensors(judge(KinkBesideSmooth(0.0, kink), rows(4, 5))) == ["param:p"]
    assert_passes(judge(KinkBesideSmooth(1.0, kink), rows(4, 5)))


def test_only_what_has_the_kink_is_judged_beside_it():
    verdicts = {tensor.tensor: tensor.verdict for tensor in judge(KinkBesideSmooth(1.0), rows(4, 5)).tensors}
    assert verdicts == {"param:w": "same", "param:p": "same", "param:z": "non-differentiable", "input:x": "same"}


COMPOSED = {
    "relu(x) - relu(-x)": lambda x: F.relu(x) - F.relu(-x),
    "clamp from both sides": lambda x: x.clamp(min=0) + x.clamp(max=0),
    "maximum and minimum": lambda x: torch.maximum(x, torch.zeros_like(x)) + torch.minimum(x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("function", COMPOSED.values(), ids=COMPOSED)
def test_right_parts_whose_kinks_compose_to_a_smooth_function_are_no_alarm(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.w = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))

        def forward(self, y):
            return function(self.x) * self.w * y + self.w

    assert_passes(judge(Net(), rows(3, 4)))


TIES = {
    "median": lambda p: p.median(-1).values,
    "median of all": lambda p: p.median() + p.sum(-1),
    "nanmedian": lambda p: p.nanmedian(-1).values,
    "quantile": lambda p: p.quantile(0.5, dim=-1),
    "kthvalue": lambda p: p.kthvalue(3, dim=-1).values,
    "sorted middle": lambda p: p.sort(-1).values[..., 2],
    "trimmed mean": lambda p: p.sort(-1).values[..., 1:-1].mean(-1),
    "difference of maxima": lambda p: p[..., :3].amax(-1) - p[..., 3:].amax(-1),
    "range": lambda p: p.max(-1).values + p.min(-1).values,
    "difference of max pools": lambda p: F.max_pool1d(p[None], 2) + -F.max_pool1d(-p[None], 2),
}


@pytest.mark.parametrize("function", TIES.values(), ids=TIES)
def test_ties_of_order_statistics_are_no_alarm(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            return function(x) * self.k

    assert_passes(judge(Net(), torch.ones(4, 5)))


@pytest.mark.parametrize("function", TIES.values(), ids=TIES)
def test_a_wrong_gradient_beside_a_tie_is_named(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.p = nn.Parameter(torch.tensor(0.7)), nn.Parameter(rows(5))

        def forward(self, x):
            return function(x * self.k), Doubled.apply(self.p * self.k)

    assert wrong_tensors(judge(Net(), torch.ones(4, 5))) == ["param:k", "param:p"]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_log_probabilities_near_the_edge_of_the_simplex_are_judged():
    """pytorch 187554: finite differences and points beside leave the domain of log."""

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(4, 5)

        def forward(self, x, action):
            temperature = torch.tensor(0.3, dtype=x.dtype)
            found = RelaxedOneHotCategorical(temperature, logits=self.net(x), validate_args=False)
            return found.log_prob(action)

    torch.manual_seed(1)
    x = torch.randn(6, 4)
    action = RelaxedOneHotCategorical(torch.tensor(0.3), logits=torch.randn(6, 5)).sample()
    unit = judge(Policy(), x, action)
    assert_passes(unit)
    assert "GC407" not in codes(unit)


EDGES = {
    "log": lambda x: x.log(),
    "logit": lambda x: x.clamp(max=0.9).logit(),
    "erfinv": lambda x: torch.erfinv(1 - x),
    "sqrt": lambda x: x.sqrt(),
    "acos": lambda x: torch.acos(1 - x),
}


@pytest.mark.parametrize("function", EDGES.values(), ids=EDGES)
def test_values_close_to_the_edge_of_a_domain_are_judged(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return function(x) * self.w + F.relu(self.w - 1)  # with a kink, off which a step would leave the domain

    unit = judge(Net(), torch.tensor([0.3, 1e-3, 1e-6, 0.2], dtype=torch.float64))
    assert_passes(unit)
    assert "GC407" not in codes(unit)
