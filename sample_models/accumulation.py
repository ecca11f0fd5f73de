"""A language model, and two ways to accumulate the gradients of micro-batches that have unequal numbers of tokens.

``gradctl compare sample_models/accumulation.py --steps 5 --variant by_tokens --variant mean_of_means`` passes the first
and fails the second, which weights each micro-batch alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PADDING = -100


class LanguageModel(nn.Module):
    def __init__(self, tokens: int = 12, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, tokens)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.hidden(self.embedding(ids))))
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PADDING)


def make_model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel()


def example_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 12, (4, 6), generator=generator)
    labels = torch.randint(0, 12, (4, 6), generator=generator)
    labels[2:, 2:] = PADDING  # two sequences are shorter
    return ids, labels


def by_tokens(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    for part in (slice(0, 2), slice(2, 4)):
        share = (labels[part] != PADDING).sum() / (labels != PADDING).sum()
        loss = model(ids[part], labels[part]) * share
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    return total


def mean_of_means(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    for part in (slice(0, 2), slice(2, 4)):
        loss = model(ids[part], labels[part]) / 2
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    return total
