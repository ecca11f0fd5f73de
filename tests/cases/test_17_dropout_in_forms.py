"""Case 17 (pytorch 113169, 158643): random masks. Forms are seeded as eager is before each call, and inductor is told
to draw as eager does, so dropout is the same everywhere. What is baked in at capture is not: a Python random number.
"""

import random

import pytest
import torch
from torch import Tensor, nn

from tests.compared import causes, compared, different

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.dropout = nn.Linear(6, 5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc(x).tanh())


class Noisy(Dropped):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return h * torch.bernoulli(torch.full_like(h, 0.5)) + torch.randn_like(h)


class FromPython(Dropped):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * random.random()


@pytest.mark.parametrize("form", ["trace", "script", "export", "aot", pytest.param("compile", marks=pytest.mark.slow)])
def test_dropout_in_training_mode_is_the_same(form):
    assert compared(form, Dropped().train(), X).verdict == "pass"


@pytest.mark.parametrize("form", ["trace", "script", "export", "aot"])
def test_drawn_noise_is_the_same(form):
    assert compared(form, Noisy(), X).verdict == "pass"


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("form", ["trace", "export"])
def test_a_random_number_of_python_is_baked_in(form, seed):
    random.seed(seed)  # 0 is what each run is seeded with, and a program may seed so when it is imported
    unit = compared(form, FromPython(), X)
    assert different(unit) == {
        "output": "GC301",
        **dict.fromkeys(("input:x", "param:fc.weight", "param:fc.bias"), "GC402"),
    }
    assert causes(unit) == {"GC210"}


def test_aot_calls_python_for_it():
    assert compared("aot", FromPython(), X).verdict == "pass"


class DroppedAfterBranch(Dropped):
    """Another sign takes another graph, which is compiled when it is first met."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if x.sum() > 0:
            h = h * 2
        return self.dropout(h.repeat(3, 3))


@pytest.mark.slow
def test_dropout_in_a_graph_that_is_compiled_later_is_the_same():
    assert compared("compile", DroppedAfterBranch().train(), X).verdict == "pass"
