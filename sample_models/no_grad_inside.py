"""A scale that is measured under ``no_grad`` inside forward: autograd takes it as a constant.

``gradctl gradcheck sample_models/no_grad_inside.py`` passes: what runs under ``no_grad`` is held fixed in the finite
differences as well, and noted with its line (GC404).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SelfScaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        with torch.no_grad():
            scale = h.abs().amax(dim=1, keepdim=True)
        return self.fc2((h / scale).tanh())


def make_model() -> SelfScaling:
    torch.manual_seed(0)
    return SelfScaling()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(6, 10, generator=torch.Generator().manual_seed(1)),)
