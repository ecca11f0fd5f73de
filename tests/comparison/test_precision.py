"""Rounding averages out over random inputs; a bias does not, in one row either."""

from __future__ import annotations

import pytest
import torch

from gradctl.comparison.precision import rounding_error

N, SHAPE = 8, (16, 32)


def random(seed):
    return torch.Generator().manual_seed(seed)


def references(seed):
    values = torch.randn(N, *SHAPE, dtype=torch.float64, generator=random(seed))
    return values / values.flatten(1).norm(dim=1).reshape(-1, 1, 1)


def noise(seed, size):
    """Errors whose norm is ``size`` of the reference's, independent of input and element."""
    return torch.randn(N, *SHAPE, dtype=torch.float64, generator=random(1000 + seed)) * size / (16 * 32) ** 0.5


def measured(errors, reference):
    return rounding_error(list(zip(errors, reference, strict=True)))


@pytest.mark.parametrize("seed", range(20))
def test_independent_errors_are_rounding_of_their_root_mean_square(seed):
    assert measured(noise(seed, 1e-4), references(seed)) == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize("seed", range(20))
def test_a_wrong_factor_is_a_bias_though_its_mean_over_random_inputs_is_zero(seed):
    reference = references(seed)
    assert measured(1e-4 * reference + noise(seed, 5e-5), reference) is None


def test_an_offset_is_a_bias():
    assert measured(noise(0, 5e-5) + 1e-4 / (16 * 32) ** 0.5, references(0)) is None


@pytest.mark.parametrize("seed", range(20))
def test_one_wrong_row_does_not_hide_in_the_rounding_of_the_others(seed):
    reference = references(seed)
    wrong = torch.zeros_like(reference)
    wrong[:, 3] = 2e-4 * reference[:, 3]
    assert measured(wrong + noise(seed, 5e-5), reference) is None


def test_a_large_error_is_not_called_rounding():
    assert measured(noise(0, 2e-3), references(0)) is None


def test_an_error_that_is_missing_on_an_input_is_no_rounding():
    pairs = list(zip(noise(0, 1e-4), references(0), strict=True))
    assert rounding_error([*pairs[:-1], None]) is None


def test_an_element_that_is_always_zero_has_no_factor():
    reference = references(0)
    reference[:, 0, 0] = 0
    assert measured(noise(0, 1e-4), reference) == pytest.approx(1e-4, rel=0.05)


def test_a_scalar_is_judged_by_its_inputs_alone():
    errors = 1e-4 * torch.tensor([1, -1, 1, -1, -1, 1, 1, -1], dtype=torch.float64)
    assert rounding_error([(each, torch.tensor(1.0).double()) for each in errors]) == pytest.approx(1e-4)
    assert rounding_error([(abs(each), torch.tensor(1.0).double()) for each in errors]) is None
