"""A registered operator that takes a list of tensors: torch wraps its generated Function once more, and flattens them.

Eager's gradient of the right one is right; a wrong backward is named by the operator and the place in the list, and
what does not pass it is judged around it. In torch 2.14 the Function is not seen; the call of the operator is named.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, finding, judge, wrong_tensors
from tests.zoo import plant


@torch.library.custom_op("gradctl_tests::product", mutates_args=())
def product(factors: list[Tensor], scale: float) -> list[Tensor]:
    return [factors[0] * factors[1], scale * factors[1]]


@product.register_fake
def _(factors, scale):
    return [torch.empty_like(factors[0]), torch.empty_like(factors[1])]


def backward(ctx, cotangents):
    first, second = ctx.saved_tensors
    by_first = ctx.wrong * cotangents[0] * second
    return [by_first, cotangents[0] * first + ctx.scale * cotangents[1]], None


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[0])
    ctx.scale = inputs[1]
    ctx.wrong = 1.0 if inputs[1] > 0 else 2.0  # the planted mistake, where the scale is negative


product.register_autograd(backward, setup_context=setup_context)


seen = pytest.mark.skipif(
    not isinstance(vars(torch.autograd.Function)["apply"], classmethod),
    reason="torch 2.14 binds apply in C, and this one before anybody can watch",
)


class Products(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(3, 3), nn.Linear(3, 3), scale

    def forward(self, x: Tensor) -> Tensor:
        left, right = product([self.first(x).sin(), self.second(x).cos()], self.scale)
        return left.exp() + right


def products(scale: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), Products(scale), nn.Linear(3, 2))


def test_the_right_one_is_silent():
    assert_passes(judge(products(2.0), torch.randn(4, 3)))


def test_the_wrong_one_is_named_in_any_version():
    unit = judge(products(-2.0), torch.randn(4, 3))
    own = [each.location for each in unit.findings if each.code in ("GC401", "GC408") and each.cause is None]
    assert {(place.module, "product" in place.op) for place in own} == {("1", True)}


@seen
def test_the_wrong_one_is_named_with_the_place_in_the_list():
    unit = judge(products(-2.0), torch.randn(4, 3))
    head = finding(unit, "GC408")
    assert "gradctl_tests::product.backward is not the derivative in 'factors.0'" in head.message
    assert (head.location.module, head.allow) == ("1", "GC408:gradctl_tests::product")
    behind = {each.tensor: each.cause for each in unit.findings if each.code == "GC401"}
    assert set(behind) == set(wrong_tensors(unit)) and set(behind.values()) == {"GC408"}
    assert not {"param:1.second.weight", "param:2.weight"} & set(behind)


@seen
@pytest.mark.parametrize("parameter", ["0.weight", "1.first.weight", "1.second.bias", "2.weight"])
def test_an_allowed_one_is_judged_around(parameter):
    allowed = ["GC408:gradctl_tests::product"]
    x = torch.randn(4, 3)
    assert wrong_tensors(judge(plant(products(-2.0), parameter, "sign"), x, allows=allowed)) == [f"param:{parameter}"]
    assert judge(products(-2.0), x, allows=allowed).verdict == "pass"
