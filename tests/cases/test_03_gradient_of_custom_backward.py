"""Case 3 (pytorch 193279): ``torch.func.grad`` inside a compiled function differentiates a custom Function's forward
and forgets its backward. Here the backward is zero, so eager gives 0, and Dynamo cos(x).
"""

from typing import Any

import torch
from torch import Tensor

from tests.compared import causes, compared, different

X = torch.tensor([1.0, 2.0])


class SinWithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0 * gradient


def by_function(x: Tensor) -> Tensor:
    return x * torch.func.grad(lambda y: SinWithoutGradient.apply(y).sum())(x)


def by_formula(x: Tensor) -> Tensor:
    return x * torch.func.grad(lambda y: y.sin().sum())(x)


def test_aot_is_wrong_where_dynamo_forgets_the_backward():
    torch._dynamo.reset()
    forgotten = not torch.allclose(torch.compile(by_function, backend="aot_eager")(X), by_function(X))
    unit = compared("aot", by_function, X)
    assert forgotten, "expected on torch 2.13"
    assert (unit.verdict, different(unit)["output"]) == ("fail", "GC301")
    assert causes(unit) == {"GC204"}


def test_without_a_custom_backward_aot_is_right():
    assert compared("aot", by_formula, X).verdict == "pass"
