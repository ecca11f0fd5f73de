"""A sketch tells tensors apart by their distance, whatever their dtype, and sees where they are not finite."""

import math

import pytest
import torch

from gradctl.numerics.sketch import Sketcher

VALUE = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e-1])
def test_the_distance_of_two_sketches_is_about_that_of_the_tensors(size):
    sketch = Sketcher()
    noise = torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = VALUE + size * noise * VALUE.norm() / noise.norm()
    assert 0.2 * size < sketch(VALUE).distance(sketch(other)) < 3 * size


def test_equal_tensors_have_no_distance_whatever_their_strides():
    sketch = Sketcher()
    assert sketch(VALUE).distance(sketch(VALUE.t().contiguous().t())) == 0.0


def test_another_order_of_the_same_elements_is_another_tensor():
    sketch = Sketcher()
    assert sketch(VALUE).distance(sketch(VALUE.flip(0))) > 0.1


def test_another_shape_is_infinitely_far():
    sketch = Sketcher()
    assert math.isinf(sketch(VALUE).distance(sketch(VALUE.reshape(40, 5))))


def test_nan_in_another_place_is_another_tensor_and_in_the_same_place_is_not():
    sketch = Sketcher()
    first, same, other = VALUE.clone(), VALUE.clone(), VALUE.clone()
    first[1, 2] = same[1, 2] = other[3, 3] = math.nan
    assert (sketch(first).nonfinite, sketch(first).distance(sketch(same))) == (1, 0.0)
    assert sketch(first).distance(sketch(other)) > 1e-2
    assert math.isinf(sketch(first).distance(sketch(VALUE)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.complex64])
def test_every_dtype_has_a_sketch(dtype):
    sketch = Sketcher()
    value = VALUE.to(dtype)
    assert sketch(value).distance(sketch(value.clone())) == 0.0
    assert sketch(value).distance(sketch(torch.zeros_like(value))) > 0.1
