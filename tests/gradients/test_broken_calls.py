"""NaN and infinity: the call that made the first one is named, forward or backward, with its module and line."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, codes, finding, judge


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rooted = x.sqrt()
        return torch.where(x > 0, rooted, x)


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        length = (x - x).square().sum().sqrt()
        return x * length


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        grown = (x + 1000).exp()
        return grown - grown


class Masked(nn.Module):
    """A whole row masked: softmax divides by zero there."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(3) < self.columns
        return x.masked_fill(mask, float("-inf")).softmax(-1)


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.half().float() * 1e6


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 0


def line_of(text: str, source: object) -> int:
    lines, first = inspect.getsourcelines(source)
    (offset,) = [number for number, line in enumerate(lines) if text in line]
    return first + offset


def place(found):
    where = found.location
    return where.file, where.line, where.module, where.op


def after_a_layer(part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(part), nn.Tanh())


@pytest.mark.parametrize("part", [Root, Norm])
def test_the_backward_that_makes_nan_is_named(part):
    unit = judge(after_a_layer(part()), torch.tensor([1.0, -2.0, 0.5]))
    found = [each for each in unit.findings if each.code == "GC407"]
    here = ("tests/gradients/test_broken_calls.py", line_of("sqrt()", part), "1.0", "torch.Tensor.sqrt")
    assert {place(each) for each in found} == {here}
    assert all(each.message.endswith(": the backward of torch.Tensor.sqrt makes the first.") for each in found)


def test_a_functions_backward_that_makes_nan_is_named_by_its_class():
    unit = judge(lambda x: Broken.apply(x.sin()).cos(), torch.randn(3))
    found = finding(unit, "GC407")
    assert place(found) == ("tests/gradients/test_broken_calls.py", line_of("def backward", Broken) - 1, None, "Broken")


def test_the_forward_call_that_overflows_is_named_and_the_one_that_makes_nan_of_it():
    unit = judge(after_a_layer(Overflow()), torch.randn(3))
    found = next(each for each in unit.findings if each.quantity == "output")
    here = ("tests/gradients/test_broken_calls.py", line_of("exp()", Overflow), "1.0", "torch.Tensor.exp")
    assert place(found) == here
    assert "torch.Tensor.exp makes the first infinity, torch.Tensor.sub NaN of it" in found.message
    assert f"test_broken_calls.py:{line_of('grown - grown', Overflow)}" in found.message


def test_an_infinity_that_is_given_as_a_number_is_not_blamed():
    found = next(each for each in judge(after_a_layer(Masked(3)), torch.randn(3)).findings if each.quantity == "output")
    assert found.location.op == "torch.Tensor.softmax"


def test_a_row_masked_in_part_is_right():
    assert_passes(judge(after_a_layer(Masked(2)), torch.randn(3)))


def test_an_overflow_of_the_models_own_dtype_is_named():
    torch.manual_seed(0)
    unit = judge(nn.Sequential(nn.Linear(3, 3), Half()), torch.randn(3))
    found = [each for each in unit.findings if each.code == "GC407"]
    assert {each.location.op for each in found} == {"torch.Tensor.float"}
    assert "GC401" not in codes(unit)


def test_nan_among_the_inputs_is_no_calls_fault():
    unit = judge(after_a_layer(nn.Identity()), torch.tensor([1.0, float("nan"), 0.5]))
    found = next(each for each in unit.findings if each.quantity == "output")
    assert found.location is None
