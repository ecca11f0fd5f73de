"""Rounding averages out over random inputs; a bias does not, in one row either, or inside of the rounding."""

from __future__ import annotations

import pytest
import torch

from gradctl.comparison.precision import bias_of, lost_precision, relative_error_of, rounding_error
from gradctl.forms.form import Outcome

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


def rounded(values, dtype=torch.bfloat16):
    return values.to(dtype).double()


def towards_zero(values):
    return (values.float().view(torch.int32) >> 16 << 16).view(torch.float32).double()


def pairs_of(found, true):
    """Return what ``relative_error_of`` returns of each input: true values have the norm 1 here."""
    return list(zip(found - true, true, strict=True))


def bias(found, true, own=None, dtype=torch.bfloat16):
    return bias_of(pairs_of(found, true), pairs_of(rounded(true) if own is None else own, true), dtype)


def scaled(factor, seed, index=slice(None)):
    """Return the bfloat16 values of a kernel that scales some of its results."""
    values = references(seed).clone()
    values[(slice(None), *index) if isinstance(index, tuple) else index] *= factor
    return rounded(values)


@pytest.mark.parametrize("seed", range(20))
def test_rounding_at_another_place_is_no_bias(seed):
    true = references(seed)
    assert bias(rounded(true + noise(seed, 2e-3)), true) is None
    assert bias(rounded(true), true, own=rounded(true + noise(seed, 2e-3))) is None


@pytest.mark.parametrize("factor", [1.01, 0.99, 1.003])
@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_factor_inside_of_the_rounding_of_bfloat16_is_a_bias_of_its_size(factor, seed):
    assert bias(scaled(factor, seed), references(seed)) == pytest.approx(abs(factor - 1), rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_rounding_towards_zero_is_a_bias(seed):
    true = references(seed)
    assert bias(towards_zero(true), true) == pytest.approx(0.0028, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_an_offset_is_a_bias_though_it_follows_no_factor(seed):
    true = references(seed)
    assert bias(rounded(true + 8e-3 / (16 * 32) ** 0.5), true) == pytest.approx(8e-3, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_rounding_on_each_input_is_no_bias_though_the_reference_is_exact(seed):
    true = references(seed)[:1].expand(N, *SHAPE)  # a tensor that depends on the parameters alone
    assert bias(rounded(true), true, own=true) is None
    assert bias(rounded(1.01 * true), true, own=true) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("index", [(3,), (slice(None), 7), (3, 7)], ids=["row", "column", "element"])
@pytest.mark.parametrize("seed", range(5))
def test_one_row_column_or_element_that_is_zero_is_a_bias(index, seed):
    assert bias(scaled(0, seed, index), references(seed)) > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_a_bias_that_the_reference_has_too_is_not_the_candidates(seed):
    true = references(seed)
    assert bias(towards_zero(true), true, own=towards_zero(true)) is None


def test_a_factor_that_a_rounded_constant_explains_is_no_bias():
    true, dtype = references(0), torch.float32
    assert bias(rounded(true * (1 + 6e-8), dtype), true, own=rounded(true, dtype), dtype=dtype) is None


def test_a_tensor_that_is_zero_by_cancellation_has_no_factor():
    true = references(0) * 1e-8
    assert bias(noise(0, 3e-3), true, own=noise(1, 2e-3)) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_scalar_has_a_bias_if_all_inputs_agree(seed):
    true, one = 1 + torch.rand(N, dtype=torch.float64, generator=random(seed)), torch.ones(N, dtype=torch.float64)
    nearest, larger = rounded(true) / true, rounded(1.05 * true) / true
    assert bias(nearest, one, own=nearest) is None
    assert bias(larger, one, own=nearest) == pytest.approx(0.05, rel=0.1)


def test_a_complex_tensor_has_a_bias_too():
    true = torch.view_as_complex(references(0).unflatten(-1, (16, 2)))
    nearest = torch.view_as_complex(rounded(torch.view_as_real(true)))
    assert bias(nearest, true, own=nearest) is None
    assert bias(1.01 * nearest, true, own=nearest) == pytest.approx(0.01, rel=0.1)


def test_without_an_error_on_each_input_no_bias_is_known():
    true = references(0)
    pairs, own = pairs_of(scaled(1.01, 0), true), pairs_of(rounded(true), true)
    assert bias_of(pairs, own, torch.bfloat16) is not None
    assert bias_of([*pairs[:-1], None], own, torch.bfloat16) is None
    assert bias_of(pairs, [*own[:-1], None], torch.bfloat16) is None
    assert bias_of(pairs[:1], own[:1], torch.bfloat16) is None


def lost(found, true, dtype=torch.bfloat16):
    return lost_precision(pairs_of(found, true), pairs_of(rounded(true, dtype), true), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(5))
def test_an_error_of_several_roundings_is_lost_precision_and_that_of_a_few_is_none(dtype, seed):
    true, epsilon = references(seed), torch.finfo(dtype).eps
    assert lost(rounded(true + noise(seed, 0.5 * epsilon), dtype), true, dtype) is None
    assert lost(rounded(true + noise(seed, 2 * epsilon), dtype), true, dtype) == pytest.approx(2 * epsilon, rel=0.1)


def test_a_wide_dtype_loses_no_precision_and_a_few_elements_are_not_known_well_enough():
    true = references(0)
    assert lost(true + noise(0, 1e-3), true, torch.float32) is None
    assert lost((true + noise(0, 0.1))[:, 0, :7], true[:, 0, :7]) is None
    assert lost((true + noise(0, 0.1))[:, 0, :8], true[:, 0, :8]) is not None


def test_integers_and_booleans_have_no_error():
    for value in (torch.tensor([1, 2]), torch.tensor([True, False])):
        outcome = Outcome(outputs={"output": value})
        assert relative_error_of(("output", "output"), [outcome], [outcome]) is None


def test_a_large_tensor_is_sampled_and_has_the_bias_of_the_whole():
    key, candidates, own = ("output", "output"), [], []
    for seed in range(N):
        true = torch.randn(700, 1001, dtype=torch.float64, generator=random(seed))
        values = true, rounded(true), rounded(1.01 * true)
        oracle, native, wrong = ([Outcome(outputs={"output": each})] for each in values)
        candidates.append(relative_error_of(key, oracle, wrong))
        own.append(relative_error_of(key, oracle, native))
    assert own[0][0].numel() < 700 * 1001 / 2
    assert own[0][1].norm() == pytest.approx(1, rel=0.01)
    assert bias_of(candidates, own, torch.bfloat16) == pytest.approx(0.01, rel=0.02)
    assert bias_of(own, own, torch.bfloat16) is None
