"""A second network that follows the first (MoCo, BYOL): its frozen weights are moved in forward, in several ways.

The weights move once a call: two runs from one state are equal, and what they were moved by is held fixed.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.judged import assert_passes, judge

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Followed(nn.Module):
    def __init__(self, follow: Callable[[list[Tensor], list[Tensor]], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.online, self.target = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)
        self.follow = follow

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.follow(list(self.target.parameters()), list(self.online.parameters()))
            wanted = self.target(x)
        return F.mse_loss(self.online(x), wanted)


def by_lerp(targets: list[Tensor], online: list[Tensor]) -> None:
    for target, source in zip(targets, online, strict=True):
        target.lerp_(source, 0.1)


def by_copy(targets: list[Tensor], online: list[Tensor]) -> None:
    for target, source in zip(targets, online, strict=True):
        target.copy_(0.9 * target + 0.1 * source)


def by_data(targets: list[Tensor], online: list[Tensor]) -> None:
    for target, source in zip(targets, online, strict=True):
        target.data.mul_(0.9).add_(source.data, alpha=0.1)


def by_assigning_data(targets: list[Tensor], online: list[Tensor]) -> None:
    for target, source in zip(targets, online, strict=True):
        target.data = 0.9 * target.data + 0.1 * source.data


def by_foreach(targets: list[Tensor], online: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, online, 0.1)


def by_foreach_of_detached(targets: list[Tensor], online: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, [source.detach() for source in online], 0.1)


@pytest.mark.parametrize("follow", [by_lerp, by_copy])
def test_weights_that_follow_in_place_pass(follow):
    assert_passes(judge(Followed(follow), X))


@pytest.mark.parametrize("follow", [by_data, by_assigning_data])
def test_weights_that_follow_through_data_pass(follow):
    assert_passes(judge(Followed(follow), X))


@pytest.mark.parametrize("follow", [by_foreach, by_foreach_of_detached])
def test_weights_that_follow_all_at_once_pass(follow):
    assert_passes(judge(Followed(follow), X))


class Decayed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter in self.fc.parameters():
                parameter.mul_(0.9)
        return self.fc(x).tanh()


def test_a_model_that_shrinks_its_own_weights_repeats_itself():
    assert_passes(judge(Decayed(), X))
