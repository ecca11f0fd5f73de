"""Activation checkpointing, reentrant and not: forward runs again in backward. Silent, with dropout too.

Reentrant checkpointing is an ``autograd.Function`` that refuses ``torch.autograd.grad``. Twin: a mistake inside the
checkpointed part is named.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.judged import assert_passes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 8))
        self.last, self.reentrant = nn.Linear(8, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h + checkpoint(self.block, h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_passes(reentrant, dropout):
    assert_passes(judge(Checkpointed(reentrant, dropout), X))


@pytest.mark.parametrize("parameter", ["first.weight", "block.0.weight", "last.weight"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_mistake_in_or_around_a_checkpoint_is_named(reentrant, parameter):
    unit = judge(plant(Checkpointed(reentrant), parameter, "scale 1.001"), X)
    assert wrong_tensors(unit) == [f"param:{parameter}"]
