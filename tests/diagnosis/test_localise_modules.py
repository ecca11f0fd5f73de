"""The children of a module that are captured alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradctl.diagnosis.localise_modules import called_children


class Holder(nn.Module):
    """Holds modules for others to call, and has no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Tanh()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.holder, self.listed = Holder(), nn.ModuleList([nn.Linear(2, 2)])
        self.block, self.scripted = nn.Sequential(nn.Linear(2, 2)), torch.jit.script(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.holder.second(self.holder.first(x))
        return self.scripted(self.block(self.listed[0](x)))


def test_the_children_of_a_container_that_is_never_called_stand_in_its_place():
    assert list(called_children(Model(), "")) == ["holder.first", "holder.second", "listed.0", "block", "scripted"]


def test_a_child_that_is_called_has_children_of_its_own():
    assert list(called_children(Model(), "block")) == ["block.0"]
