"""Case 22: a Function keeps its output as an attribute of ctx; the output is later changed through a detached alias.

Nothing watches attributes of ctx, so backward uses the changed values without a word: 5 times the gradient, and the
user is wrong: ``reference-wrong``. Alone the Function is right, so it is not blamed. Twin: the alias is left alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tests.judged import assert_passes, codes, judge, wrong_tensors

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = x.exp()
        return ctx.y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.y


class Net(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.in_place = nn.Linear(6, 5), nn.Linear(5, 3), in_place

    def forward(self, x: Tensor) -> Tensor:
        h = Exp.apply(self.fc1(x))
        output = self.fc2(h + 0)
        if self.in_place:
            h.detach().mul_(5)
        return output


def test_an_output_changed_behind_the_back_of_its_function_spoils_what_is_before_it():
    unit = judge(Net(in_place=True), X)
    assert unit.verdict == "fail"
    assert wrong_tensors(unit) == ["input:x", "param:fc1.bias", "param:fc1.weight"]
    assert "GC408" not in codes(unit)


def test_the_same_function_left_alone_is_right():
    assert_passes(judge(Net(in_place=False), X))
