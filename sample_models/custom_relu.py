"""A ReLU written as ``torch.autograd.Function``, with the right backward, inside a small classifier.

``gradctl gradcheck sample_models/custom_relu.py`` passes, and so does ``sample_models/custom_relu.py:ReLU``, which
checks the Function by itself. ``wrong_backward.py`` is its twin with a mistake.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x > 0)


def ReLU_inputs() -> tuple[Tensor]:
    return (torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ReLU.apply(self.fc1(x)))


def make_model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(8, 12, generator=torch.Generator().manual_seed(1)),)
