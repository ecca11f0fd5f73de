"""A multilayer perceptron: two hidden layers of 64, ReLU between, 10 classes.

``gradctl gradcheck --verbose sample_models/mlp.py`` passes and prints the probability with which an error of 1 % in any
one of its 7 tensors would have been missed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class MLP(nn.Module):
    def __init__(self, inputs: int = 32, hidden: int = 64, outputs: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


def make_model() -> MLP:
    torch.manual_seed(0)
    return MLP()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(8, 32, generator=torch.Generator().manual_seed(1)),)


def cross_entropy(logits: Tensor) -> Tensor:
    """Return a loss for ``--loss cross_entropy``: the classes are 0, 1, 2 … in the order of the batch."""
    return functional.cross_entropy(logits, torch.arange(logits.shape[0]) % logits.shape[1])
