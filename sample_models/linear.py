"""A linear layer by hand, 784 inputs and 10 outputs: ``x.mm(W) + b``.

``gradctl gradcheck sample_models/linear.py`` passes: the gradients of W (7840 elements), b and x are all the
derivative, and the last line says how small an error would still have been seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    def __init__(self, inputs: int = 784, outputs: int = 10) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x.mm(self.W) + self.b


def make_model() -> Linear:
    torch.manual_seed(0)
    return Linear()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(5, 784, generator=torch.Generator().manual_seed(1)),)
