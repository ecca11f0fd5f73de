"""torch's higher-order operators that loop: ``scan`` and ``map`` run under Dynamo, which ignores what watches them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import map as torch_map
from torch._higher_order_ops import scan

from tests.judged import assert_passes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))


class Scanned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def step(carry: Tensor, row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            carry = torch.tanh(carry + row["x"])
            return carry, carry * 2

        return scan(step, torch.zeros(5, 4, dtype=x.dtype), {"x": self.fc(x)}, dim=1, reverse=True)


class Mapped(Scanned):
    def forward(self, x: Tensor) -> Tensor:
        return torch_map(lambda rows, scale: torch.tanh(rows[0]) * rows[1] * scale, (self.fc(x), x), torch.tensor(2.0))


MODELS = pytest.mark.parametrize("model", [Scanned, Mapped])


@MODELS
def test_a_right_one_passes(model):
    assert_passes(judge(model(), X))


@MODELS
def test_a_wrong_gradient_in_front_of_it_is_named(model):
    assert wrong_tensors(judge(plant(model(), "fc.weight", "scale 1.001"), X)) == ["param:fc.weight"]
