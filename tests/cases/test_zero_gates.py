"""Behind a gate of zeros every gradient is zero: what lies there is judged where the gate is open, or named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.judged import assert_passes, judge, wrong_tensors


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos() * ctx.factor, None


class ReZero(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.gate, self.factor = nn.Linear(5, 5), nn.Parameter(torch.zeros(())), factor

    def forward(self, x):
        return x + self.gate * Sine.apply(self.a(x), self.factor)


class Lora(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.base, self.down, self.factor = nn.Linear(5, 5), nn.Linear(5, 2, bias=False), factor
        self.up = nn.Parameter(torch.zeros(2, 5))

    def forward(self, x):
        return self.base(x) + Sine.apply(self.down(x), self.factor) @ self.up


def rows():
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", [ReZero, Lora])
def test_the_right_model_passes_and_all_of_it_is_judged(model):
    unit = judge(model(), rows())
    assert_passes(unit)
    assert {tensor.verdict for tensor in unit.tensors} == {"same"}


@pytest.mark.parametrize("factor", [1.05, -1.0])
def test_a_function_behind_a_gate_is_named(factor):
    assert {"param:a.bias", "param:a.weight"} <= set(wrong_tensors(judge(ReZero(factor), rows())))
    assert "param:down.weight" in wrong_tensors(judge(Lora(factor), rows()))


def test_trainable_parameters_that_reach_no_output_are_counted_apart():
    class Bypassed(nn.Module):
        """state-spaces/mamba 279, peft 1612: a fast path reads only the weight of a wrapped layer."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.base, self.lora_a = nn.Linear(5, 5), nn.Parameter(torch.randn(2, 5))

        def forward(self, x):
            return x @ self.base.weight.t() + self.base.bias

    unit = judge(Bypassed(), rows())
    assert_passes(unit)
    verdicts = {tensor.tensor: tensor.verdict for tensor in unit.tensors}
    assert verdicts["param:lora_a"] == "no-gradient"
    assert verdicts["param:base.weight"] == "same"
