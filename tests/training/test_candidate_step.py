"""Another implementation trained beside the reference, whose names it has."""

from __future__ import annotations

import torch
from torch import nn

import gradctl


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


class Rewritten(nn.Module):
    """Other names, another order of parameters, and a buffer that the reference has not."""

    def __init__(self, extra=0.0):
        super().__init__()
        self.head, self.body = nn.Linear(6, 2), nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.extra = extra
        self.register_buffer("cache", torch.zeros(3))

    def forward(self, x):
        hidden = self.body(x).clamp(min=0)
        return self.head(hidden) + self.extra * (hidden - hidden.detach()).sum(-1, keepdim=True)


def compared(candidate):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    (unit,) = gradctl.compare(Plain(), x, candidate=candidate, steps=2, map={"norm.*": "body.1.*"}).units
    return unit


def test_a_rewritten_module_trains_the_same():
    unit = compared(Rewritten())
    assert (unit.form, unit.verdict, unit.findings) == ("candidate", "pass", ())
    names = {each.tensor for each in unit.tensors if each.quantity == "buffer"}
    assert {"param:second.weight", "optimizer:exp_avg.second.weight", "buffer:norm.running_mean"} <= names


def test_a_gradient_that_is_wrong_in_backward_only_is_named():
    (finding,) = compared(Rewritten(extra=1e-6)).findings
    assert (finding.code, finding.quantity, finding.tensor) == ("GC430", "gradient", "param:norm.weight")
