"""Order statistics, against torch's own kernels and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.joint.decompositions.ordering import TABLE
from gradctl.subject.subject import Subject
from tests.joint.decompositions.substituted import assert_as_torch

aten = torch.ops.aten


def values(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def with_nan() -> Tensor:
    x = values(4, 5)
    x[1, 2] = x[3, 0] = x[3, 4] = torch.nan
    x[2] = torch.nan
    return x


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_medians_and_kth_values_are_those_of_torch(dim, keepdim):
    for x in (values(4, 5), values(3, 6, 2)):
        for name in ("median", "nanmedian"):
            used = {name}
            operator = getattr(torch, name)
            assert_as_torch(TABLE, used, lambda x: tuple(operator(x, dim, keepdim)), x)
        for k in (1, 2):
            assert_as_torch(TABLE, {"kthvalue"}, lambda x: tuple(x.kthvalue(k, dim, keepdim)), x)


@pytest.mark.parametrize("name", ["median", "nanmedian"])
def test_nan_is_last_or_not_counted(name):
    operator = getattr(aten, name)
    for dim in (0, 1):
        found, expected = TABLE[operator.dim](with_nan(), dim, False), operator.dim(with_nan(), dim, False)
        torch.testing.assert_close(found[0], expected[0], equal_nan=True)
        # Where all is NaN torch takes any.
        known = ~with_nan().isnan().all(dim)
        torch.testing.assert_close(found[1][known], expected[1][known])
    torch.testing.assert_close(TABLE[operator.default](with_nan()), operator.default(with_nan()), equal_nan=True)


@pytest.mark.parametrize("name", ["median", "nanmedian"])
def test_the_median_of_all_elements_shares_its_gradient_among_equals(name):
    for x in (values(3, 5), values(3, 4).round(), values()):
        assert_as_torch(TABLE, {name}, getattr(torch, name), x)


def test_integers_and_scalars_are_ordered():
    x = torch.tensor([[3, 1, 2], [5, 4, 9]])
    for name in ("median", "nanmedian"):
        torch.testing.assert_close(TABLE[getattr(aten, name).dim](x, 1), tuple(getattr(torch, name)(x, 1)))
        torch.testing.assert_close(
            TABLE[getattr(aten, name).dim](values(), 0), tuple(getattr(torch, name)(values(), 0))
        )
    torch.testing.assert_close(TABLE[aten.kthvalue.default](values(), 1), tuple(values().kthvalue(1)))
    torch.testing.assert_close(TABLE[aten.topk.default](values(), 1), tuple(values().topk(1)))


def test_orders_are_right_in_onnxruntime():
    def orders(x: Tensor) -> tuple[Tensor, ...]:
        ties = (x * 2).round()
        return (
            ties.sort(stable=True, dim=1, descending=True).indices,
            x.sort(stable=True, dim=0).values,
            x.median(1).values,
            x.median(),
            x.nanmedian(0).values,
            x.kthvalue(2, 1).values,
            x.sum().topk(1).values,
        )

    unit = Comparing(Subject(target="orders", model=orders, args=(values(4, 6).float(),)), Allows(())).form(
        "onnx-joint", named=True
    )
    assert (unit.verdict, unit.reason) == ("pass", None), (unit.details, unit.findings)
