"""Domain-adversarial training: a Function that passes values on and turns the gradient round.

``gradctl gradcheck sample_models/gradient_reversal.py`` fails with GC408: a reversed gradient is not the derivative.
It is meant: with ``--allow GC408:ReverseGradient`` it passes, and everything around the Function is still judged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class DomainAdversarial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(10, 8)
        self.label = nn.Linear(8, 3)
        self.domain = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x).tanh()
        return self.label(h), self.domain(ReverseGradient.apply(h))


def make_model() -> DomainAdversarial:
    torch.manual_seed(0)
    return DomainAdversarial()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(6, 10, generator=torch.Generator().manual_seed(1)),)
