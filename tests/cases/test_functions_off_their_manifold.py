"""Functions that are right for the inputs that a model gives them, and not for all: symmetric matrices, probabilities.

A warning, never a failure and never a culprit. Twin: the same, wrong along the directions in which its inputs move.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.judged import finding, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class LogDeterminant(Function):
    """By Cholesky, which reads half of the matrix."""

    @staticmethod
    def forward(ctx, matrix, factor):
        triangle = torch.linalg.cholesky(matrix)
        ctx.save_for_backward(triangle)
        ctx.factor = factor
        return 2 * triangle.diagonal().log().sum()

    @staticmethod
    def backward(ctx, gradient):
        (triangle,) = ctx.saved_tensors
        return ctx.factor * gradient * torch.cholesky_inverse(triangle), None


class Entropy(Function):
    """Its gradient is off by a constant, which moves no probabilities."""

    @staticmethod
    def forward(ctx, p, factor):
        ctx.save_for_backward(p)
        ctx.factor = factor
        return -(p * p.log()).sum(-1)

    @staticmethod
    def backward(ctx, gradient):
        (p,) = ctx.saved_tensors
        return -ctx.factor * gradient[:, None] * p.log(), None


class Gaussian(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.b, self.fc, self.factor = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 2), factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        covariance = self.b @ self.b.T + torch.eye(4, dtype=x.dtype)
        return LogDeterminant.apply(covariance, self.factor), self.fc(x)


class Classifier(Gaussian):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return Entropy.apply((x @ self.b).softmax(-1), self.factor), self.fc(x)


MODELS = pytest.mark.parametrize("model", [Gaussian, Classifier])


@MODELS
def test_right_in_its_model_it_is_a_warning(model):
    unit = judge(model(1.0), X)
    found = finding(unit, "GC408")
    assert (unit.verdict, found.severity) == ("pass", "warning")
    assert found.message.startswith("latent: ")
    assert found.message.endswith("; this model moves its inputs along directions in which it is right.")


@MODELS
def test_it_is_no_culprit_of_another_mistake(model):
    unit = judge(plant(model(1.0), "fc.weight", "scale 1.1"), X)  # the mistake is a custom Function too
    assert wrong_tensors(unit) == ["param:fc.weight"]
    severities = {each.location.op: each.severity for each in unit.findings if each.code == "GC408"}
    assert {op: severity for op, severity in severities.items() if op in ("LogDeterminant", "Entropy")} in (
        {"LogDeterminant": "warning"},
        {"Entropy": "warning"},
    )


@MODELS
def test_wrong_in_its_model_it_is_an_error(model):
    unit = judge(model(1.01), X)
    assert (finding(unit, "GC408").severity, "param:b" in wrong_tensors(unit)) == ("error", True)
