"""Control flow that depends on the data: a branch on the sign of a sum, a loop until a norm is small.

``gradctl gradcheck sample_models/control_flow.py`` passes: each run builds its own graph, and near the example the
same branch and the same number of turns are taken. A trace of it would bake both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Router(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1)
        self.positive = nn.Linear(width, width)
        self.negative = nn.Linear(width, width)
        self.step = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        expert = self.positive if self.gate(x).sum() > 0 else self.negative
        h = expert(x).tanh()
        while h.norm() > 1:
            h = 0.5 * self.step(h).tanh()
        return h


def make_model() -> Router:
    torch.manual_seed(0)
    return Router()


def example_inputs() -> tuple[Tensor]:
    return (2 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1)),)
