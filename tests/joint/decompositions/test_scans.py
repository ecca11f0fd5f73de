"""Cumulative operators, against torch's own kernels and autograd."""

from __future__ import annotations

import pytest
import torch

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.joint.decompositions.scans import TABLE
from gradctl.subject.subject import Subject
from tests.joint.decompositions.substituted import assert_as_torch

SCANS = {"cumprod": torch.cumprod, "cummax": torch.cummax, "cummin": torch.cummin, "logcumsumexp": torch.logcumsumexp}
AXES = [((7,), 0), ((1,), 0), ((3, 8), 0), ((3, 8), -1), ((2, 5, 4), 1), ((), 0)]


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize(("shape", "dim"), AXES)
@pytest.mark.parametrize("ties", [False, True])
def test_a_scan_takes_in_all_elements_up_to_each(name, shape, dim, ties):
    x = values(*shape).round() if ties else values(*shape)
    found = TABLE[getattr(torch.ops.aten, name).default](x, dim)
    torch.testing.assert_close(found, tuple(SCANS[name](x, dim)) if isinstance(found, tuple) else SCANS[name](x, dim))


@pytest.mark.parametrize("name", SCANS)
def test_nan_and_infinities_go_where_torch_lets_them_go(name):
    x = torch.tensor([1.0, -torch.inf, 2.0, torch.inf, torch.inf, 0.5, torch.nan, 3.0, torch.nan, -torch.inf])
    for row in (x, x[:6], x[1:3], x[5:]):
        found, expected = TABLE[getattr(torch.ops.aten, name).default](row, 0), SCANS[name](row, 0)
        found, expected = (tuple(each) if isinstance(each, tuple) else (each,) for each in (found, expected))
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("name", SCANS)
def test_the_gradient_of_a_scan_is_that_of_torch(name):
    assert_as_torch(
        TABLE, {name}, lambda x: tuple(SCANS[name](x, 1))[:1] if "cumm" in name else SCANS[name](x, 1), values(2, 5, 3)
    )


def test_integers_and_a_dtype():
    x = torch.tensor([3, 1, 4, 1, 5])
    for name in ("cummax", "cummin"):
        torch.testing.assert_close(TABLE[getattr(torch.ops.aten, name).default](x, 0), tuple(SCANS[name](x, 0)))
    found = TABLE[torch.ops.aten.cumprod.default](x, 0, dtype=torch.float64)
    torch.testing.assert_close(found, torch.cumprod(x, 0, dtype=torch.float64))


def test_scans_are_right_in_onnxruntime():
    def scans(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.cumprod(1), x.cummax(1).values, x.cummin(0).values, x.logcumsumexp(1)

    unit = Comparing(Subject(target="scans", model=scans, args=(values(3, 6).float(),)), Allows(())).form(
        "onnx-joint", named=True
    )
    assert (unit.verdict, unit.reason) == ("pass", None), unit.findings
