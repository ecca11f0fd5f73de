"""The corpus of kernels: by plain torch, each mistake is where it is said; ``gradctl compare`` finds it, and no other.

The benchmark tests/benchmarks/kernel_corpus.py tries the right twins from 20 seeds.
"""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch

from tests.kernels.comparison import compare, found_in
from tests.kernels.corpus import PAIRS
from tests.kernels.pairs import in_float64, relative_errors

SAME, DIFFERENT = 1e-10, 1e-6


def mistakes(kind=None, hidden=False):
    """Return the parameters of a test: name of the pair and of each mistake of a kind, or that some sizes hide."""
    return [
        (pair, mistake)
        for pair, each in PAIRS.items()
        for mistake, wrong in each.wrong.items()
        if (wrong.hidden_at if hidden else wrong.kind == kind)
    ]


def strided(inputs):
    """Return the inputs with a stride of 2 in the last axis."""
    return tuple(torch.stack([value, value], -1)[..., 0] for value in inputs)


def errors(name, candidate, dtype=torch.float64, seed=0, on="example", **sizes):
    """Return the errors of a candidate in a dtype against the reference in float64, by tensor."""
    pair = PAIRS[name]
    inputs = pair.draw(seed, dtype, **sizes)
    inputs = strided(inputs) if on == "non-contiguous" else inputs
    candidate = in_float64(candidate) if dtype == torch.float64 else candidate
    true, found = pair.evaluate(candidate, inputs, dtype, seed)
    return relative_errors(found, true)


def test_the_corpus_has_its_size():
    modules = [pair for pair in PAIRS.values() if pair.is_module]
    assert len(PAIRS) >= 40
    assert len(modules) >= 8
    assert sum(len(pair.dtypes) == 3 for pair in PAIRS.values()) >= 30


@pytest.mark.parametrize("name", PAIRS)
def test_a_right_twin_computes_what_the_reference_computes(name):
    for seed in range(3):
        found = errors(name, PAIRS[name].right, seed=seed)
        assert max(found.values()) < SAME, found


@pytest.mark.parametrize("name, mistake", mistakes("meaning"))
def test_a_mistake_changes_the_tensors_that_are_named_and_no_others(name, mistake):
    wrong = PAIRS[name].wrong[mistake]
    found = errors(name, wrong.candidate, on=wrong.on)
    assert {tensor for tensor, error in found.items() if error > DIFFERENT} == wrong.names, found
    assert all(error < SAME for tensor, error in found.items() if tensor not in wrong.names)


@pytest.mark.parametrize("name, mistake", mistakes(hidden=True))
def test_some_sizes_hide_a_mistake(name, mistake):
    wrong = PAIRS[name].wrong[mistake]
    found = errors(name, wrong.candidate, **wrong.hidden_at)
    assert max(found.values()) < SAME, found


@pytest.mark.parametrize("name, mistake", mistakes("bias"))
def test_a_bias_is_in_the_narrow_dtypes_and_in_the_mean_over_inputs(name, mistake):
    pair, wrong = PAIRS[name], PAIRS[name].wrong[mistake]
    assert max(errors(name, wrong.candidate).values()) < SAME
    for dtype in wrong.dtypes:
        own, found = (mean_factors(pair, each, dtype) for each in (pair.right, wrong.candidate))
        assert {tensor for tensor in found if abs(found[tensor]) > 10 * abs(own[tensor])} == wrong.names, (own, found)


def mean_factors(pair, candidate, dtype):
    """Return by how much a candidate's tensors are too large, by regression on float64, in the mean over inputs."""
    total = Counter()
    for seed in range(8):
        true, found = pair.evaluate(candidate, pair.draw(seed, dtype), dtype, seed)
        total.update({k: float(((found[k] - t) * t).sum() / t.square().sum()) / 8 for k, t in true.items()})
    return total


@pytest.mark.parametrize("name, mistake", mistakes("precision"))
def test_lost_precision_is_in_the_narrow_dtypes_only(name, mistake):
    wrong = PAIRS[name].wrong[mistake]
    assert max(errors(name, wrong.candidate).values()) < SAME
    for dtype in wrong.dtypes:
        found, own = (errors(name, each, dtype) for each in (wrong.candidate, PAIRS[name].right))
        assert {tensor for tensor, error in found.items() if error > 2 * own[tensor]} == wrong.names, (own, found)


def dtypes_of(name, mistake=None):
    """Return the dtypes of a pair or a mistake, the narrow ones first."""
    pair = PAIRS[name]
    dtypes = pair.dtypes if mistake is None else pair.wrong[mistake].dtypes or pair.dtypes
    return sorted(dtypes, key=lambda dtype: torch.finfo(dtype).eps, reverse=True)


def cases(names):
    """Return a parameter for each dtype; the first dtype of each sixth is tested always, the others are slow."""
    for number, name in enumerate(names):
        each = name if isinstance(name, tuple) else (name,)
        for dtype in dtypes_of(*each):
            is_fast = dtype is dtypes_of(*each)[0] and number % 6 == 0
            marks = () if is_fast else pytest.mark.slow
            yield pytest.param(*each, dtype, marks=marks, id="-".join((*each, str(dtype).removeprefix("torch."))))


@pytest.mark.parametrize("name, dtype", cases(PAIRS))
def test_compare_is_silent_on_a_right_twin(name, dtype):
    unit = compare(PAIRS[name], PAIRS[name].right, dtype, seed=0)
    assert (unit.verdict, found_in(unit)) == ("pass", {})


@pytest.mark.parametrize("name, mistake, dtype", cases(mistakes("meaning")))
def test_compare_names_the_tensors_that_a_mistake_changes_and_no_others(name, mistake, dtype):
    unit = compare(PAIRS[name], PAIRS[name].wrong[mistake].candidate, dtype, seed=0)
    assert unit.verdict == "fail"
    assert set(found_in(unit)) == PAIRS[name].wrong[mistake].names


@pytest.mark.parametrize("name, mistake", mistakes("bias"))
def test_compare_finds_a_bias_inside_of_the_rounding(name, mistake):
    wrong = PAIRS[name].wrong[mistake]
    for dtype in wrong.dtypes:
        assert found_in(compare(PAIRS[name], wrong.candidate, dtype, seed=0)) == dict.fromkeys(wrong.names, "GC306")


@pytest.mark.parametrize("name, mistake", mistakes("precision"))
def test_compare_names_what_lost_precision(name, mistake):
    wrong = PAIRS[name].wrong[mistake]
    for dtype in wrong.dtypes:
        assert set(found_in(compare(PAIRS[name], wrong.candidate, dtype, seed=0))) == wrong.names


def hidden_by_sizes():
    """Return the parameters of a test: each sixth mistake that a size of at least 1 hides; the others are slow."""
    names = [(pair, each) for pair, each in mistakes(hidden=True) if min(PAIRS[pair].wrong[each].hidden_at.values())]
    return [pytest.param(*each, marks=() if n % 6 == 0 else pytest.mark.slow) for n, each in enumerate(names)]


@pytest.mark.parametrize("name, mistake", hidden_by_sizes())
def test_compare_finds_at_another_size_what_the_example_hides(name, mistake):
    pair, wrong = PAIRS[name], PAIRS[name].wrong[mistake]
    usual = inspect.signature(pair.inputs).parameters
    sizes = {size: (value, usual[size].default) for size, value in wrong.hidden_at.items()}
    small = {size: values[:1] for size, values in sizes.items()}
    assert found_in(compare(pair, wrong.candidate, torch.float32, 0, small)) == {}
    assert found_in(compare(pair, pair.right, torch.float32, 0, sizes)) == {}
    unit = compare(pair, wrong.candidate, torch.float32, 0, sizes)
    assert set(found_in(unit)) == wrong.names
    (size, (_, value)), *_ = sizes.items()
    assert all(f"smallest size that differs is {size}={value}" in each.message for each in serious(unit))


def serious(unit):
    return [each for each in unit.findings if each.severity != "note" and each.tensor]
