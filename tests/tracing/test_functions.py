"""Custom Functions: seen also by a bound name, and replaced by exactly the linear map that their backward states."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradctl.tracing.functions import FunctionWatch
from gradctl.tracing.linear_map import linear_map
from gradctl.tracing.recorder import Recorder


class Triple(torch.autograd.Function):
    """x², stated to have the derivative 3, of the first output only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x**2, y.clone()

    @staticmethod
    def backward(ctx: Any, to_square: Tensor, to_copy: Tensor) -> tuple[Tensor, Tensor]:
        return 3 * to_square, to_copy + to_square


class Auxiliary(torch.autograd.Function):
    """The identity, whose backward adds a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + 5


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1, 1)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


triple = Triple.apply
X, Y = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([5.0, 7.0], dtype=torch.float64)


def asking(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def test_the_linear_map_is_what_backward_states_not_what_forward_does():
    linear = linear_map(Triple.apply, asking(X, Y))
    assert linear is not None
    (square, copy), extra = linear((X + 1, Y + 10))
    assert square.tolist() == [1 + 3 + 10, 4 + 3 + 10]  # y0 + J (x - x0), J from the transpose of backward
    assert copy.tolist() == [15.0, 17.0]
    assert extra == 0


def test_a_gradient_that_backward_adds_from_nothing_adds_to_the_objective():
    linear = linear_map(Auxiliary.apply, asking(X))
    assert linear is not None
    value, extra = linear((X + 1,))
    assert value.tolist() == [2.0, 3.0]
    assert extra == 10.0


@pytest.mark.parametrize("function", [Clip, Once])
def test_a_backward_that_is_not_affine_or_not_differentiable_states_no_map(function):
    assert linear_map(function.apply, asking(X)) is None


@pytest.mark.skipif(
    not isinstance(vars(torch.autograd.Function)["apply"], classmethod), reason="torch 2.14 binds apply in C, unseen"
)
def test_a_function_is_seen_under_a_name_bound_long_ago():
    watch = FunctionWatch()
    program = Recorder()
    watch.begin(program)
    with program.functions(), program:
        triple(*asking(X, Y))
    assert watch.classes == {Triple}


def test_nothing_is_left_behind_in_torch():
    before, apply = Triple.apply(*asking(X, Y))[0].grad_fn, vars(torch.autograd.Function)["apply"]
    with pytest.raises(ZeroDivisionError), Recorder().functions():
        raise ZeroDivisionError
    assert vars(torch.autograd.Function)["apply"] is apply
    assert type(Triple.apply(*asking(X, Y))[0].grad_fn) is type(before)
