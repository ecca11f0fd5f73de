"""Case 4 (pytorch 190758, 190717): with a memory budget of 0 the partitioner draws the dropout mask afresh where it
computes it again in the backward, so elements that were dropped get a gradient. Twin: the same budget, no dropout.
"""

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.nn import functional as F

from tests.compared import causes, compared, different, verdicts

X = torch.randn(200, generator=torch.Generator().manual_seed(1))


def dropped(x: Tensor) -> Tensor:
    return F.dropout(x.sin(), 0.5).cos()


def kept(x: Tensor) -> Tensor:
    return (0.5 * x.sin()).cos()


def dropped_with_gradient() -> float:
    """Return the share of dropped elements that get a gradient in plain torch; 0 is right."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = X.clone().requires_grad_()
    y = torch.compile(dropped, backend="aot_eager")(x)
    y.sum().backward()
    return float(((y == 1) & (x.grad != 0)).float().mean())


def test_a_mask_that_is_drawn_again_is_a_wrong_gradient():
    with functorch_config.patch(activation_memory_budget=0.0):
        assert dropped_with_gradient() > 0.1, "expected on torch 2.13"
        unit = compared("aot", dropped, X)
    assert different(unit) == {"input:x": "GC402"}
    assert verdicts(unit) == {"input:x": "wrong"}
    assert causes(unit) == {"GC210"}


def test_without_dropout_the_same_budget_is_right():
    with functorch_config.patch(activation_memory_budget=0.0):
        assert compared("aot", kept, X).verdict == "pass"


def test_with_the_usual_budget_dropout_is_right():
    assert dropped_with_gradient() == 0
    assert compared("aot", dropped, X).verdict == "pass"
