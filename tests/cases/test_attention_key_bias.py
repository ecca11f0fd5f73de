"""The key bias of attention cannot move the output (softmax ignores a shift): its gradient is zero by cancellation.

Silent, whether it is a tensor of its own or a third of ``in_proj_bias``. A mistake in another tensor is not hidden by
it. Twin: with an additive score that the bias does move, its gradient is judged like any other.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self, additive: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.additive = additive

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT
        if self.additive:
            scores = scores + self.key(x).tanh().sum(-1)[:, None]
        return scores.softmax(-1) @ self.value(x)


def test_a_key_bias_without_effect_passes():
    assert_passes(judge(Attention(), X))


def test_multihead_attention_passes():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    assert_passes(judge(layer, X))


@pytest.mark.parametrize("parameter", ["query.bias", "key.weight", "value.weight"])
def test_a_mistake_beside_the_key_bias_is_named(parameter):
    unit = judge(plant(Attention(), parameter, "scale 1.001"), X)
    assert wrong_tensors(unit) == [f"param:{parameter}"]


def test_a_constant_in_place_of_a_zero_gradient_is_wrong():
    unit = judge(plant(Attention(), "key.bias", "one is added"), X)
    assert wrong_tensors(unit) == ["param:key.bias"]


def test_a_key_bias_that_does_move_the_output_is_judged():
    unit = judge(plant(Attention(additive=True), "key.bias", "scale 1.001"), X)
    assert wrong_tensors(unit) == ["param:key.bias"]
