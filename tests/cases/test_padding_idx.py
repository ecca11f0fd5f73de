"""Embeddings whose padding row gets no gradient (documented), and embeddings with sparse gradients: silent.

Twin: a mistake in the rows that do get one is named.
"""

import pytest
import torch
from torch import nn

from tests.judged import assert_passes, judge, wrong_tensors
from tests.zoo import plant

IDS = torch.tensor([[1, 4, 0], [0, 3, 3]])


def model(**options) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(6, 4, **options), nn.Tanh(), nn.Linear(4, 2))
    nn.init.normal_(net[0].weight)  # the padding row too: it takes part in forward
    return net


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 0}, {"padding_idx": -3}, {"sparse": True}, {"padding_idx": 0, "sparse": True}],
    ids=str,
)
def test_an_embedding_passes(options):
    assert_passes(judge(model(**options), IDS))


def test_an_embedding_bag_with_padding_passes():
    torch.manual_seed(0)
    assert_passes(judge(nn.EmbeddingBag(6, 4, mode="mean", padding_idx=0), IDS))


def test_gradients_scaled_by_frequency_are_set_aside_as_documented():
    assert_passes(judge(model(scale_grad_by_freq=True), IDS))


@pytest.mark.parametrize("bug", ["scale 1.001", "zeroed row"])
def test_a_mistake_in_an_embedding_with_padding_is_named(bug):
    unit = judge(plant(model(padding_idx=0), "0.weight", bug), IDS)
    assert wrong_tensors(unit) == ["param:0.weight"]
