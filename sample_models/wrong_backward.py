"""A ReLU with a learned slope below zero whose backward is wrong: the slope's gradient is a mean over the batch.

It has to be a sum: the output is right, training runs, and ``act.slope`` learns 8 times too slowly. ``gradctl
gradcheck sample_models/wrong_backward.py`` fails: GC408 names the Function, GC401 ``param:act.slope`` and no other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return torch.where(x > 0, x, slope * x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        to_x = gradient * torch.where(x > 0, 1.0, slope)
        to_slope = (gradient * x.clamp(max=0)).mean(0)  # wrong: .sum(0)
        return to_x, to_slope


class LearnedLeakyReLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return LeakyReLU.apply(x, self.slope)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(12, 16))
    model.add_module("act", LearnedLeakyReLU(16))
    model.add_module("fc2", nn.Linear(16, 3))
    return model


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(8, 12, generator=torch.Generator().manual_seed(1)),)
