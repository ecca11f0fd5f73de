"""pytorch 13350: spectral norm in training mode, whose buffers move at each forward, used twice. Right: a pass.

Its power iteration writes to the base of views that a ``no_grad`` block made, of which torch gives no ``grad_fn``.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from tests.judged import assert_passes, codes, judge, wrong_tensors
from tests.zoo import plant

REAL, FAKE = torch.randn(2, 4, 2, 6, generator=torch.Generator().manual_seed(1))


class Critic(nn.Module):
    def __init__(self, normalised):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = normalised(nn.Conv1d(2, 4, 3, padding=1))
        self.linear = normalised(nn.Linear(24, 1))

    def score(self, x):
        return self.linear(nn.functional.leaky_relu(self.convolution(x), 0.2).flatten(1))

    def forward(self, real, fake):
        return self.score(real).mean() - self.score(fake).mean()


@pytest.mark.parametrize("normalised", [spectral_norm, parametrizations.spectral_norm])
def test_spectral_norm_in_two_forwards_passes(normalised):
    unit = judge(Critic(normalised), REAL, FAKE)
    assert_passes(unit)
    assert "GC419" not in codes(unit)


def test_a_mistake_beside_spectral_norm_is_named():
    unit = judge(plant(Critic(spectral_norm), "convolution.bias", "scale 1.1"), REAL, FAKE)
    assert wrong_tensors(unit) == ["param:convolution.bias"]
