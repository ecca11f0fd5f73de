"""Elements that are not finite are the same as their own kind, and as nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from gradctl.numerics.measures import relative_error, same_values

NAN, INF = math.nan, math.inf
LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("pair", [(NAN, 0.0), (INF, LARGEST), (-INF, -LARGEST), (INF, -INF), (NAN, INF)])
def test_what_is_not_finite_is_no_number(pair):
    one, other = (torch.tensor([1.0, value]) for value in pair)
    for left, right in ((one, other), (other, one)):
        assert not same_values(left, right)
        assert relative_error(left, right) == math.inf


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_is_itself(value):
    tensor = torch.tensor([1.0, value])
    assert same_values(tensor, tensor.clone())
    assert relative_error(tensor, torch.tensor([1.5, value])) == 0.5


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.complex64])
def test_other_types_are_compared_by_their_elements(dtype):
    tensor = torch.tensor([0, 1]).to(dtype)
    assert same_values(tensor, tensor.clone())
    assert not same_values(tensor, torch.tensor([1, 1]).to(dtype))
