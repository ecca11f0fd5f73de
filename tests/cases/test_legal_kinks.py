"""Points where a function has no derivative and autograd picks a legal answer: silent, but for the note GC405.

Ties in amax share the gradient, max and sort give it to one; relu, abs and norm take 0 at 0; clamp passes it at its
bound. Beside the point the derivative exists and is judged: a wrong slope there is found.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judged import assert_passes, judge, wrong_tensors

ZEROS = torch.zeros(4, 6)
TIES = torch.tensor([[1.0, 1.0, 0.5, 1.0, -2.0, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
BOUNDS = torch.tensor([[-1.0, 1.0, 0.3, 1.0, -2.0, 0.5]])
IMAGE = torch.full((2, 3, 6, 6), 0.5)

KINKS = {
    "relu at 0": (torch.relu, ZEROS),
    "relu twice at 0": (lambda x: torch.relu(torch.relu(x) - x), ZEROS),
    "leaky relu at 0": (lambda x: F.leaky_relu(x, 0.2), ZEROS),
    "abs at 0": (torch.abs, ZEROS),
    "norm at 0": (lambda x: x.norm(dim=1), ZEROS),
    "cdist of equal rows": (lambda x: torch.cdist(x, x + 0), torch.ones(3, 2)),
    "clamp at its bounds": (lambda x: x.clamp(-1, 1), BOUNDS),
    "hardtanh at its bounds": (F.hardtanh, BOUNDS),
    "relu6 at 0": (F.relu6, ZEROS),
    "hardshrink at its bound": (lambda x: F.hardshrink(x, 1.0), BOUNDS),
    "softshrink at its bound": (lambda x: F.softshrink(x, 0.5), BOUNDS),
    "ties in amax": (lambda x: x.amax(1), TIES),
    "ties in max": (lambda x: x.max(1).values, TIES),
    "ties in max over all": (lambda x: x.max(), TIES),
    "ties in sort": (lambda x: x.sort(1).values, TIES),
    "ties in topk": (lambda x: x.topk(2, 1).values, TIES),
    "ties in median": (lambda x: x.median(1).values, TIES),
    "ties in maximum": (lambda x: torch.maximum(x, x.flip(1)), TIES),
    "ties in cummax": (lambda x: x.cummax(1).values, TIES),
    "max pooling over equal values": (lambda x: F.max_pool2d(x, 2), IMAGE),
    "adaptive max pooling over equal values": (lambda x: F.adaptive_max_pool2d(x, 2), IMAGE),
    "hinge at its corner": (lambda x: F.relu(1 - x), torch.ones(3, 4)),
    "smooth l1 at its bound": (lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)), torch.ones(3, 4)),
    "l1 loss at its target": (lambda x: F.l1_loss(x, torch.ones(3, 4, dtype=x.dtype)), torch.ones(3, 4)),
    "remainder at a multiple": (lambda x: torch.remainder(x, 1.0), torch.tensor([1.0, 2.0, 0.3])),
    "round at a half": (torch.round, torch.tensor([0.5, 1.5, 0.3])),
    "sign at 0": (lambda x: x.sign() * x, ZEROS),
}


@pytest.mark.parametrize("name", KINKS)
def test_a_legal_choice_at_a_kink_passes(name):
    function, x = KINKS[name]
    assert_passes(judge(function, x))


@torch.library.custom_op("gradctl_tests::relu_wrong_below_zero", mutates_args=())
def relu_wrong_below_zero(x: Tensor) -> Tensor:
    return x.relu()


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return gradient * torch.where(x > 0, 1.0, 0.1)


relu_wrong_below_zero.register_autograd(_backward, setup_context=_keep)


@pytest.mark.parametrize("x", [ZEROS, TIES, BOUNDS, -torch.ones(2, 3)], ids=["zeros", "ties", "bounds", "negative"])
def test_a_wrong_slope_below_zero_is_found_at_a_kink_too(x):
    def function(x: Tensor) -> Tensor:
        return relu_wrong_below_zero(x)

    unit = judge(function, x)
    assert (unit.verdict, wrong_tensors(unit)) == ("fail", ["input:x"])
