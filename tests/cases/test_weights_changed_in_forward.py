"""Weights that forward itself changes in place, outside autograd: clipping, renormalising, power iteration.

To autograd the changed weight is the leaf, and the change is a constant. That holds while no weight meets the bound
(the change is nothing), and is meant where one does. Twin: a mistake in such a weight is named.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.judged import assert_passes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class ClippedByData(nn.Linear):
    """Weight clipping of a Wasserstein critic."""

    bound = 10.0

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-self.bound, self.bound)
        return F.linear(x, self.weight, self.bias).tanh()


class ClippedUnderNoGrad(ClippedByData):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-self.bound, self.bound)
        return F.linear(x, self.weight, self.bias).tanh()


class Renormalised(ClippedByData):
    """Rows longer than the bound are cut down to it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norms = self.weight.norm(dim=1, keepdim=True)
            self.weight.mul_((self.bound / norms).clamp(max=1))
        return F.linear(x, self.weight, self.bias).tanh()


KINDS = (ClippedByData, ClippedUnderNoGrad, Renormalised)


def layer(kind: type[ClippedByData], bound: float) -> nn.Module:
    torch.manual_seed(0)
    model = kind(6, 3)
    model.bound = bound
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_weights_inside_the_bound_pass(kind):
    assert_passes(judge(layer(kind, bound=10.0), X))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_outside_the_bound_pass(kind):
    assert_passes(judge(layer(kind, bound=0.1), X))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_the_bound_pass(kind):
    model = layer(kind, bound=0.1)
    model(X)  # as after the first step of training: what was outside is on the bound
    assert_passes(judge(model, X))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_in_a_weight_inside_the_bound_is_named(kind):
    model = nn.Sequential(nn.Linear(6, 6), layer(kind, bound=10.0))
    assert wrong_tensors(judge(plant(model, "0.weight", "scale 1.001"), X)) == ["param:0.weight"]


def test_spectral_normalisation_in_training_mode_passes():
    torch.manual_seed(0)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)).train()
    assert_passes(judge(model, X))


def test_an_embedding_with_max_norm_passes():
    torch.manual_seed(0)
    assert_passes(judge(nn.Embedding(6, 4, max_norm=1.0), torch.tensor([[1, 4, 0], [0, 3, 3]])))
