"""A recurrent network: a GRU over 7 steps, a linear layer on its last state.

``gradctl gradcheck sample_models/gru.py`` passes: each weight is used at every step, so its gradient is a sum over
time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SequenceRegressor(nn.Module):
    def __init__(self, features: int = 5, hidden: int = 12) -> None:
        super().__init__()
        self.gru = nn.GRU(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 2)

    def forward(self, series: Tensor) -> Tensor:
        states, _ = self.gru(series)
        return self.head(states[:, -1])


def make_model() -> SequenceRegressor:
    torch.manual_seed(0)
    return SequenceRegressor()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1)),)
