"""Case 23 (pytorch 13669, 22833, 32385, 108670, 84681): TorchScript's own autodiff, which starts at the second or third
call, once lost a broadcast's reduction and gradients of loops and LayerNorm. All right in torch 2.13: silent.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.compared import compared, different

GENERATOR = torch.Generator().manual_seed(1)


class Broadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return ((x + self.shift) * self.scale).sigmoid() * x - self.shift


class Loop(nn.Module):
    """A recurrent cell whose loop stays a loop in script."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(1), 4, dtype=x.dtype)
        for i in range(x.size(0)):
            h = torch.tanh(self.cell(torch.cat([x[i], h], 1)))
        return h


class Normalised(nn.Module):
    """One LayerNorm used twice, between operators that TorchScript fuses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return self.norm(x).relu() * 2 + x.mean(-1, keepdim=True)


CASES = {
    "broadcast": (Broadcast, torch.randn(3, 4, generator=GENERATOR)),
    "loop": (Loop, torch.randn(5, 2, 4, generator=GENERATOR)),
    "normalised": (Normalised, torch.randn(5, 4, generator=GENERATOR)),
}


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("name", CASES)
def test_three_calls_give_the_gradients_of_eager(name, form):
    model, x = CASES[name]
    unit = compared(form, model(), x)
    assert (unit.verdict, different(unit)) == ("pass", {})
