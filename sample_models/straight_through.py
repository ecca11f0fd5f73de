"""Rounding with a straight-through gradient, as a Function: forward rounds, backward pretends it did not.

``gradctl gradcheck sample_models/straight_through.py`` cannot tell this from a mistake and fails with GC408. It is
meant, so say so: with ``--allow GC408:RoundStraightThrough`` the rest is judged as strictly as before, and passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class QuantizedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(10, 4)
        self.decoder = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        code = RoundStraightThrough.apply(4 * self.encoder(x).tanh())
        return self.decoder(code)


def make_model() -> QuantizedAutoencoder:
    torch.manual_seed(0)
    return QuantizedAutoencoder()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(6, 10, generator=torch.Generator().manual_seed(1)),)
