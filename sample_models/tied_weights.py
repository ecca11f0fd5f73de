"""A language model whose output layer is its embedding: one tensor under two names.

``gradctl gradcheck sample_models/tied_weights.py`` passes. The shared storage is moved once, and its gradient, the sum
over both uses, is reported under the first name with the second beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LanguageModel(nn.Module):
    def __init__(self, tokens: int = 24, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(ids)).tanh())


def make_model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel()


def example_inputs() -> tuple[Tensor]:
    return (torch.randint(0, 24, (3, 5), generator=torch.Generator().manual_seed(1)),)
