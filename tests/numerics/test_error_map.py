"""Where a tensor is off: the largest error of each block."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradctl.numerics.error_map import error_map


@pytest.mark.parametrize("shape", [(3, 4), (7,), (), (2, 3, 4), (100, 130), (1, 1000), (17, 25), (16, 24)], ids=str)
def test_each_cell_is_the_largest_error_of_its_block(shape):
    errors = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = error_map(errors)
    matrix = np.atleast_2d(errors.numpy())
    matrix = matrix.reshape(matrix.shape[0], -1)
    expected = [
        matrix[row : row + found.block_rows, column : column + found.block_columns].max()
        for row in range(0, matrix.shape[0], found.block_rows)
        for column in range(0, matrix.shape[1], found.block_columns)
    ]
    assert len(found.values) == found.rows * found.columns <= 16 * 24
    np.testing.assert_allclose(found.values, expected, rtol=6e-3)


def test_what_is_not_finite_is_the_error_of_its_block():
    errors = torch.zeros(40, 10)
    errors[3, 1], errors[39, 9] = math.nan, math.inf
    found = error_map(errors)
    assert found.values[1 * found.columns + 1] == "nan"
    assert found.values[-1] == "inf"
    assert sum(value == 0 for value in found.values) == len(found.values) - 2


def test_a_tensor_without_elements_has_no_map():
    assert error_map(torch.zeros(0, 3)) is None
