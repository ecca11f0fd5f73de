"""Rounding with a straight-through gradient, by ``detach``: the difference to the rounded value is a constant.

``gradctl gradcheck sample_models/straight_through_detach.py`` passes. What the program detaches is held fixed in the
finite differences too, and noted with its line (GC404); ``--fail-on note`` is for those who want none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class QuantizedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(10, 4)
        self.decoder = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        code = 4 * self.encoder(x).tanh()
        return self.decoder(code + (code.round() - code).detach())


def make_model() -> QuantizedAutoencoder:
    torch.manual_seed(0)
    return QuantizedAutoencoder()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(6, 10, generator=torch.Generator().manual_seed(1)),)
