"""Logits masked with -1e9, finfo.min or -inf are ordinary outputs; what absorbs a perturbation is never wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.judged import assert_passes, judge, wrong_tensors

MASK = torch.arange(6) > 3
LARGE = {"-1e9": -1e9, "finfo.min": torch.finfo(torch.float32).min, "-inf": -torch.inf}


class Scaled(torch.autograd.Function):
    """Return x; its backward is ``factor`` times too large."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class Masked(nn.Module):
    def __init__(self, value, how, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.value, self.how, self.factor = nn.Linear(5, 6), value, how, factor

    def forward(self, x):
        h = Scaled.apply(self.a(x), self.factor)
        return h.masked_fill(MASK, self.value) if self.how == "filled" else h + MASK * self.value


def rows():
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("value", LARGE.values(), ids=LARGE)
def test_masked_logits_are_judged(value):
    unit = judge(Masked(value, "filled"), rows())
    assert_passes(unit)
    assert {tensor.verdict for tensor in unit.tensors} == {"same"}


@pytest.mark.parametrize("factor", [1.01, -1.0])
@pytest.mark.parametrize("value", LARGE.values(), ids=LARGE)
def test_a_wrong_gradient_of_the_logits_beside_them_is_named(value, factor):
    assert wrong_tensors(judge(Masked(value, "filled", factor), rows())) == [
        "input:x",
        "param:a.bias",
        "param:a.weight",
    ]


@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float32).min, -1e12, -1e16])
def test_a_mask_that_is_added_and_absorbs_the_logits_is_no_alarm(value):
    assert_passes(judge(Masked(value, "added"), rows()))
    assert wrong_tensors(judge(Masked(value, "added", -1.0), rows())) == ["input:x", "param:a.bias", "param:a.weight"]


def test_an_output_in_large_numbers_is_judged_beside_one_in_small_ones():
    class Energies(nn.Module):
        def __init__(self, factor=1.0):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.factor = nn.Linear(5, 3), nn.Linear(5, 3), factor

        def forward(self, x):
            return 1e8 + self.a(x), 1e-6 * Scaled.apply(self.b(x), self.factor)

    assert_passes(judge(Energies(), rows()))
    assert wrong_tensors(judge(Energies(1.01), rows())) == ["input:x", "param:b.bias", "param:b.weight"]


def test_a_mask_that_is_an_input_may_overflow_where_no_gradient_is_asked():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.l = nn.Linear(8, 8)

        def forward(self, x, mask):
            q = self.l(x)
            scores = q @ q.transpose(1, 2) + (mask * torch.finfo(x.dtype).min)[:, None]
            return scores.softmax(-1) @ q

    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0.0]])
    assert_passes(judge(Attention(), x, mask))
    assert judge(Attention(), x, mask.clone().requires_grad_()).verdict == "fail"
