"""What the report has for a person to look at: the finite differences of a wrong gradient at each step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradctl


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * ctx.factor * x**2, None


class Net(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 6).reshape(2, 3))
        self.factor = factor

    def forward(self, x):
        return x @ Cube.apply(self.weight, self.factor)


def tensors_of(report):
    return {each.tensor: each for unit in report.units for each in unit.tensors if each.ladder or each.errors}


def test_a_right_gradient_has_no_ladder():
    assert tensors_of(gradctl.gradcheck(Net(3.0), torch.ones(4, 2))) == {}


def test_a_wrong_gradient_has_finite_differences_that_agree_with_each_other_and_not_with_it():
    found = tensors_of(gradctl.gradcheck(Net(2.0), torch.ones(4, 2)))
    assert list(found) == ["param:weight"]
    ladder = found["param:weight"].ladder
    steps = [each.step for each in ladder.steps]
    assert len(steps) > 4
    assert steps == sorted(steps, reverse=True)
    # The true derivative is 3/2 of what this backward states.
    assert min(each.error for each in ladder.steps) < 1e-8
    assert all(each.derivative == pytest.approx(1.5 * ladder.reference, rel=1e-5) for each in ladder.steps)
    assert ladder.candidate is None


def test_all_errors_of_a_small_gradient_are_in_its_map():
    errors = tensors_of(gradctl.gradcheck(Net(2.0), torch.eye(2)))["param:weight"].errors
    assert (errors.rows, errors.columns) == (2, 3)
    assert len([each for each in errors.values if each > 0]) == 6


def test_the_same_report_is_made_twice():
    one, two = (gradctl.gradcheck(Net(2.0), torch.ones(4, 2)) for _ in range(2))
    assert tensors_of(one) == tensors_of(two)


def test_a_form_that_loses_a_backward_is_off_the_finite_differences_and_eager_is_not():
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Straight(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3, 3))

        def forward(self, x):
            return Round.apply(x @ self.weight)

    report = gradctl.compare(Straight(), torch.rand(4, 3), forms="export", allow="GC408")
    (found,) = (each for unit in report.units for each in unit.tensors if each.ladder and each.tensor == "param:weight")
    best = min(found.ladder.steps, key=lambda each: each.error)
    assert best.derivative == pytest.approx(found.ladder.reference, rel=1e-5)
    assert abs(best.derivative - found.ladder.candidate) > 0.1 * abs(best.derivative)
    assert (found.errors.rows, found.errors.columns) == (3, 3)
