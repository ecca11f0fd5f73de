"""What is computed under ``no_grad`` is a constant to autograd, whichever kind of call computes it."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import nn

from tests.judged import assert_passes, judge, wrong_tensors


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


CALLS = {
    "custom Function": lambda h: Doubled.apply(h, 2.0),
    "hard Gumbel softmax": lambda h: F.gumbel_softmax(h, hard=True),
    "fake quantisation": lambda h: torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -8, 7),
    "embedding with padding": lambda h: F.embedding(torch.arange(4), h, padding_idx=0),
    "sample of a Dirichlet": lambda h: D.Dirichlet(F.softplus(h) + 1).sample(),
    "sample of a Beta": lambda h: D.Beta(F.softplus(h) + 1, F.softplus(-h) + 1).sample(),
    "sample of a Chi2": lambda h: D.Chi2(F.softplus(h) + 1).sample(),
    "sample of a StudentT": lambda h: D.StudentT(F.softplus(h) + 3).sample(),
}


class Net(nn.Module):
    def __init__(self, call, factor=2.0):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.call, self.factor = nn.Linear(5, 6), nn.Linear(5, 6), call, factor

    def forward(self, x):
        h = self.a(x)
        with torch.no_grad():
            held = self.call(h)
        return h * held + Doubled.apply(self.b(x), self.factor)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_it_is_held_fixed(call):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    assert_passes(judge(Net(call), x))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_wrong_gradient_beside_it_is_named(call):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    assert wrong_tensors(judge(Net(call, 2.02), x)) == ["input:x", "param:b.bias", "param:b.weight"]
