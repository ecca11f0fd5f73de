"""Sums over rows, as torch sums them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from gradctl.joint.decompositions.linear import TABLE
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing


@pytest.mark.parametrize(("dim", "keepdim"), list(itertools.product((0, -2, 1, (0, 1)), (False, True))))
@pytest.mark.parametrize("shape", [(5, 3), (1, 3), (0, 3)])
def test_sums_of_a_matrix_by_any_axis(dim: int | tuple[int, ...], keepdim: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    used = {"sum"} if dim in {0, -2} else set()
    assert_as_torch(TABLE, used, lambda x: x.sum(dim, keepdim), x)


def test_infinite_entries_stay_in_their_column() -> None:
    x = torch.tensor([[float("inf"), 1.0, float("nan")], [1.0, 2.0, 3.0]], dtype=torch.float64)
    found = TABLE[torch.ops.aten.sum.dim_IntList](x, [0])
    torch.testing.assert_close(found, torch.tensor([float("inf"), 3.0, float("nan")]).double(), equal_nan=True)


def test_the_bias_of_a_linear_layer_has_the_gradient_of_autograd() -> None:
    assert differing(nn.Linear(4, 3), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))) == []
