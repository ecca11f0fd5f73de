"""The size of an error: it and its tolerance are relative to one norm, and complex elements have two components."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.judged import assert_passes, judge

X = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (9,), generator=torch.Generator().manual_seed(2))


class SoftmaxRegression(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        logp = torch.log_softmax(x @ w.t() + b, -1)
        ctx.save_for_backward(x, w, b, y, logp)
        return -logp.gather(1, y[:, None]).mean()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, _, y, logp = ctx.saved_tensors
        delta = (logp.exp() - nn.functional.one_hot(y, w.shape[0])) * g / x.shape[0]
        return delta @ w, delta.t() @ x, delta.sum(0), None


class SummedOverAll(SoftmaxRegression):
    """One sum over everything for each class: the probabilities add up to 1, so it is zero but for rounding."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, _ = SoftmaxRegression.backward(ctx, g)
        return x, w, b.sum().expand_as(b), None


class Regression(nn.Module):
    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias, self.function = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(3)), function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function.apply(x, self.weight, self.bias, y)


def test_error_and_tolerance_of_a_gradient_that_is_all_rounding_are_relative_to_the_derivative():
    (row,) = [each for each in judge(Regression(SummedOverAll), X, LABELS).tensors if each.tensor == "param:bias"]
    assert row.verdict == "reference-wrong"
    assert row.error == pytest.approx(1.0, rel=1e-3)  # 0 in place of the derivative
    assert row.budget < 1e-6


def test_its_right_twin_passes():
    assert_passes(judge(Regression(SoftmaxRegression), X, LABELS))


class Square(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2 * ctx.saved_tensors[0].conj()


class WithoutConjugate(Square):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2 * ctx.saved_tensors[0]


class Complex(nn.Module):
    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.z, self.function = nn.Parameter(torch.randn(3, dtype=torch.complex64)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.z) * x


def test_an_element_of_a_complex_tensor_has_a_row_for_each_component():
    model = Complex(WithoutConjugate)
    (row,) = [each for each in judge(model, X[:2, :3]).tensors if each.tensor == "param:z"]
    assert (row.verdict, row.elements_wrong) == ("reference-wrong", 3)
    parts = {(*each.index, each.component): each for each in row.worst}
    assert sorted(parts) == [(i, part) for i in range(3) for part in ("imag", "real")]
    for i, z in enumerate(model.z.tolist()):  # each is 2 w z or 2 w conj(z), of one w
        real, imag = parts[i, "real"], parts[i, "imag"]
        stated = complex(real.reference, imag.reference)
        found = complex(real.finite_difference, imag.finite_difference)
        assert stated * z.conjugate() == pytest.approx(found * z, rel=1e-6)


def test_a_right_complex_function_passes():
    assert_passes(judge(Complex(Square), X[:2, :3]))
