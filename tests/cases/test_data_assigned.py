"""``tensor.data = …``: the value is replaced behind autograd's back, and its gradient stays the identity.

ActNorm initialises itself so (normflows), losses move their proxies to a dtype so (pytorch-metric-learning, where the
new value is the old one), straight-through quantisers round so. Like an in-place write under ``no_grad``, the *change*
is what finite differences must hold fixed.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.judged import assert_passes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))


class ToItself(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.second.weight.data = self.second.weight.data.to(x.dtype)
        return self.second(self.first(x)).tanh()


class Normalised(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.first.weight.data = F.normalize(self.first.weight.data, dim=1)
        return self.second(self.first(x).tanh())


class Rounded(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        rounded = h.clone()
        rounded.data = h.data.round()
        return self.second(rounded)


class ActNorm(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.shift.data, self.scale.data = -h.mean(0).detach(), 1 / h.std(0).detach()
        return (h + self.shift) * self.scale


@pytest.mark.parametrize("net", [ToItself, Normalised, Rounded, ActNorm])
def test_a_value_replaced_through_data_passes(net):
    assert_passes(judge(net(), X))


def test_a_wrong_gradient_beside_it_is_named():
    assert wrong_tensors(judge(plant(ToItself(), "second.bias", "scale 1.1"), X)) == ["param:second.bias"]


class RoundedInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        rounded = h.clone()
        rounded.data.copy_(h.data.round())
        return self.second(rounded)


class NormalisedUnderNoGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight /= self.first.weight.norm(dim=1, keepdim=True)
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("net", [RoundedInPlace, NormalisedUnderNoGrad])
def test_the_same_written_in_place_passes(net):
    assert_passes(judge(net(), X))


class InitialisedInForward(Net):
    def forward(self, x: Tensor) -> Tensor:
        nn.init.constant_(self.first.bias, 0.3)
        return self.first(x).tanh()


def test_a_bias_initialised_in_forward_passes():
    assert_passes(judge(InitialisedInForward(), X))
