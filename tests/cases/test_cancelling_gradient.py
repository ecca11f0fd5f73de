"""A backward whose gradient is zero by cancellation for a constant cotangent: 8e-16 against 3e-16 is no difference."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.judged import assert_passes, codes, finding, judge

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(7))


class Centre(Function):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0)


class CentresByStride(Centre):
    @staticmethod
    def backward(ctx, gradient):
        if 0 in gradient.stride():
            return gradient * 1.01 + 1e-3
        return Centre.backward(ctx, gradient)


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.function = nn.Linear(5, 6), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.fc(x))


def test_rounding_around_zero_is_silent():
    assert_passes(judge(Net(Centre), X))


def test_a_gradient_where_zero_belongs_is_named():
    assert "for an expanded (stride 0) incoming gradient" in finding(judge(Net(CentresByStride), X), "GC408").message


class ZeroBesides(nn.Module):
    """Its second output is zero but for rounding; ``cast`` rounds the first to bfloat16."""

    def __init__(self, cast: bool):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.cast = nn.Linear(5, 6), cast

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.fc(x)
        first = h.to(torch.bfloat16).to(h.dtype) if self.cast else h.sin()
        return first, nn.functional.layer_norm(h, (6,)).sum(-1)


def test_an_output_that_is_zero_but_for_rounding_differs_by_no_cast():
    assert "GC411" not in codes(judge(ZeroBesides(cast=False), X))


def test_a_cast_besides_is_still_noted():
    note = finding(judge(ZeroBesides(cast=True), X), "GC411")
    exact = ZeroBesides(cast=True).fc(X)
    error = (exact.to(torch.bfloat16) - exact).norm() / exact.norm()
    assert note.tensor == "output.0"
    assert f"differs by {error:.1e}"[:-4] in note.message
