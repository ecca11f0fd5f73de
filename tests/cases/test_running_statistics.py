"""Running statistics that forward updates outside autograd, and then uses: a constant to autograd, silent here.

They are written in several ways; the value differs on each call unless each run starts from the same buffers.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


class Centred(nn.Module):
    """A linear layer whose outputs are centred by a running mean."""

    def __init__(self, update) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.update = nn.Linear(6, 3), update
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        with torch.no_grad():
            self.update(self, h)
        return (h - self.mean).tanh()


def copy_of_a_mean(module: Centred, h: Tensor) -> None:
    module.mean.copy_(0.9 * module.mean + 0.1 * h.mean(0))


def lerp(module: Centred, h: Tensor) -> None:
    module.mean.lerp_(h.mean(0), 0.1)


def copy_of_a_row(module: Centred, h: Tensor) -> None:
    module.mean.copy_(h[0])


def in_place_with_a_live_argument(module: Centred, h: Tensor) -> None:
    torch.sum(h, 0, out=module.mean)


def assignment(module: Centred, h: Tensor) -> None:
    module.mean = 0.9 * module.mean + 0.1 * h.mean(0)


def slice_assignment(module: Centred, h: Tensor) -> None:
    module.mean[:] = h.mean(0)


def by_data(module: Centred, h: Tensor) -> None:
    module.mean.data = h.data.mean(0)


UPDATES = (
    copy_of_a_mean,
    lerp,
    copy_of_a_row,
    in_place_with_a_live_argument,
    assignment,
    slice_assignment,
    by_data,
)


@pytest.mark.parametrize("update", UPDATES)
def test_a_running_mean_that_is_used_at_once_passes(update):
    assert_passes(judge(Centred(update), X))


@pytest.mark.parametrize("update", UPDATES)
def test_a_mistake_beside_a_running_mean_is_named(update):
    unit = judge(plant(Centred(update), "linear.weight", "scale 1.001"), X)
    assert wrong_tensors(unit) == ["param:linear.weight"]


class LastBatch(nn.Module):
    """The whole activation is kept in a buffer with one in-place call, and multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 3)
        self.register_buffer("kept", torch.zeros(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).tanh()
        with torch.no_grad():
            self.kept.copy_(h)
        return h * self.kept


def test_an_activation_kept_in_a_buffer_passes():
    assert_passes(judge(LastBatch(), X))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None), nn.InstanceNorm1d(5)], ids=str)
def test_batch_statistics_in_training_mode_pass(norm):
    assert_passes(judge(nn.Sequential(norm.train(), nn.Tanh()), X if isinstance(norm, nn.BatchNorm1d) else X[None]))
