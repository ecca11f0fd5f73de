"""The budget that rounding gets: four times eager's own error, and a floor that is low in narrow dtypes too."""

from __future__ import annotations

import math

import pytest
import torch

from gradctl.numerics.agreement import agreement

NARROW = (torch.float16, torch.bfloat16)
DTYPES = (*NARROW, torch.float32)


def truth(elements: int) -> torch.Tensor:
    return torch.randn(elements, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def exceeds(native: torch.Tensor, oracle: torch.Tensor, candidate: torch.Tensor, neighbours: float = 0.0) -> bool:
    error, budget = agreement(native, oracle, candidate, neighbours)
    return error > budget


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_order_of_a_long_sum_is_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(64, 10_000, dtype=torch.float64, generator=generator).to(dtype)
    candidate = torch.stack([part.sum(-1) for part in terms.split(100, dim=-1)]).sum(0)
    assert not torch.equal(terms.sum(-1), candidate)
    assert not exceeds(terms.sum(-1), terms.double().sum(-1), candidate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tenth_is_not_rounding(dtype):
    oracle = truth(20)
    assert exceeds(oracle.to(dtype), oracle, (1.1 * oracle).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1 + 1e-5), (torch.float16, 1.012), (torch.bfloat16, 1.09)]
)
def test_just_outside_the_floor_is_a_difference_and_just_inside_is_none(dtype, factor):
    oracle = truth(2000)
    assert exceeds(oracle.to(dtype), oracle, (factor * oracle).to(dtype))
    assert not exceeds(oracle.to(dtype), oracle, ((1 + (factor - 1) / 2) * oracle).to(dtype))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("elements", [1, 7])
def test_a_few_elements_that_eager_has_right_by_luck_get_more(dtype, elements):
    oracle = truth(elements).to(dtype).double()
    candidate = ((1 + 20 * torch.finfo(dtype).eps) * oracle).to(dtype)
    assert not exceeds(oracle.to(dtype), oracle, candidate)
    many = oracle.repeat(8)
    assert exceeds(many.to(dtype), many, candidate.repeat(8))


@pytest.mark.parametrize("dtype", NARROW)
def test_without_a_float64_run_nobody_knows_how_far_off_eager_is_and_the_floor_is_higher(dtype):
    native = truth(20).to(dtype)
    candidate = ((1 + 20 * torch.finfo(dtype).eps) * native.double()).to(dtype)
    assert not exceeds(native, native, candidate)
    assert exceeds(native, native.double(), candidate)


def test_what_eager_itself_is_off_by_is_allowed_four_times():
    oracle = truth(20)
    native = (1.001 * oracle).float()
    assert not exceeds(native, oracle, (1.0039 * oracle).float())
    assert exceeds(native, oracle, (1.0041 * oracle).float())


def test_a_tensor_that_is_zero_by_cancellation_is_judged_by_its_neighbours():
    oracle, native = torch.zeros(20, dtype=torch.float64), torch.zeros(20)
    assert not exceeds(native, oracle, torch.full((20,), 1e-7), neighbours=1.0)
    assert exceeds(native, oracle, torch.full((20,), 1e-5), neighbours=1.0)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_a_special_value_in_one_alone_is_infinitely_far(special):
    native = truth(20).float()
    other = native.clone()
    other[3] = special
    assert agreement(native, native.double(), other, 0.0)[0] == math.inf
    assert agreement(other, other.double(), other, 0.0)[0] == 0


def test_integers_and_flags_are_equal_or_infinitely_far():
    counts = torch.tensor([1, 2, 3])
    assert agreement(counts, counts, counts.clone(), 0.0) == (0.0, 0.0)
    assert agreement(counts, counts, counts + 1, 0.0) == (math.inf, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_small_tensor_that_eager_has_right_is_judged_by_itself(dtype):
    oracle = 1e-7 * truth(20)
    assert exceeds(oracle.to(dtype), oracle, (1.1 * oracle).to(dtype), neighbours=1.0)
    assert not exceeds(oracle.to(dtype), oracle, oracle.to(dtype), neighbours=1.0)


@pytest.mark.parametrize("fill", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_elements_beside_a_mask_are_judged_by_themselves(fill):
    oracle = truth(20).repeat(2)
    oracle[20:] = fill
    wrong, rounded = oracle.clone(), oracle.clone()
    wrong[:20] *= 1.001
    rounded[:20] *= 1 + 1e-7
    assert exceeds(oracle.float(), oracle, wrong.float())
    assert agreement(oracle.float(), oracle, wrong, 0.0)[0] == pytest.approx(1e-3)  # both in float64
    assert not exceeds(oracle.float(), oracle, rounded.float())


def test_elements_that_are_zero_by_cancellation_are_judged_by_the_others():
    oracle, noise = truth(40), 1e-9 * torch.ones(20)
    oracle[20:] *= 1e-17
    native, candidate = oracle.float(), oracle.float()
    native[20:], candidate[20:] = noise, -2 * noise
    assert not exceeds(native, oracle, candidate)


def test_a_sum_that_is_zero_by_cancellation_is_judged_by_its_terms():
    terms = torch.tensor([0.1, 0.7, -0.3, -0.5], dtype=torch.float64)
    oracle, native = terms.sum().reshape(1) + 3e-17, terms.float().sum().reshape(1) + 3e-8
    assert agreement(native, oracle, -2 * oracle, 0.0)[0] < 1e-9
    assert agreement(native, oracle, oracle + 1e-5, 0.0)[0] > 1e-6
