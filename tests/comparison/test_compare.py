"""Two programs on all trials: the worst difference of each tensor is the one that is judged."""

from __future__ import annotations

import pytest
import torch

from gradctl.comparison.compare import Comparison
from gradctl.comparison.difference import is_identical
from gradctl.comparison.trials import Trial
from gradctl.forms.form import Outcome


class Given:
    """A candidate whose outputs are known."""

    name, quantities = "given", frozenset({"output"})

    def __init__(self, **outputs):
        self.outputs = outputs

    def run(self, trial, calls=1):
        return [Outcome({"y": self.outputs[trial.name]})]


def compared(reference, noisy=None, times_worse=1.0, **candidates):
    """Return the worst difference of one output, of trials by name."""
    native, moved = [Outcome({"y": reference})], [] if noisy is None else [Outcome({"y": noisy})]
    comparison = Comparison(Given(**candidates), times_worse=times_worse)
    comparison.add([Trial(name, native, native, moved) for name in candidates])
    return comparison.worst["output", "y"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_what_differs_in_a_later_trial_alone_is_the_worst(dtype):
    """A difference of integers has no budget to be measured in: an equal row counted as much as a wrong one."""
    right, wrong = torch.tensor([0, 1]).to(dtype), torch.tensor([1, 1]).to(dtype)
    worst = compared(right, example=right, seed=wrong, flipped=right)
    assert (worst.trial.name, worst.differs) == ("seed", True)


@pytest.mark.parametrize(("times_worse", "named"), [(1.0, "seed"), (2.0, "example")])
def test_another_input_is_named_if_it_is_so_many_times_worse(times_worse, named):
    right = torch.ones(4)
    assert compared(right, None, times_worse, example=right + 0.01, seed=right + 0.015).trial.name == named
    assert compared(right, None, times_worse, example=right + 0.01, seed=right + 0.03).trial.name == "seed"


@pytest.mark.parametrize("times_worse", [1.0, 2.0])
def test_an_output_that_is_wrong_in_a_later_trial_alone_is_found_however_near_the_example_is_to_its_budget(times_worse):
    right = torch.ones(4)
    assert compared(right, right + 0.01, times_worse, example=right + 0.035, seed=right + 0.05).differs is True


def test_what_an_ulp_of_the_inputs_moves_is_rounding():
    right = torch.ones(4)
    assert compared(right, right + 0.01, example=right + 0.03).differs is False
    assert compared(right, right + 0.01, example=right + 0.05).differs is True


def test_an_index_that_an_ulp_of_the_inputs_moves_is_unstable():
    tie, other = torch.tensor([2]), torch.tensor([3])
    assert compared(tie, other, example=other).is_unstable is True
    assert compared(tie, tie, example=other).is_unstable is False


@pytest.mark.parametrize(
    ("candidate", "structure"),
    [(torch.ones(2, 2), "float32[2, 2] instead of float32[4]"), (torch.ones(4).double(), "float64[4] instead of")],
)
def test_another_shape_or_dtype_is_infinitely_far(candidate, structure):
    worst = compared(torch.ones(4), example=candidate)
    assert worst.structure.startswith(structure)
    assert (worst.differs, worst.severity) == (True, float("inf"))


def test_what_equals_the_reference_has_the_rounding_error_of_the_reference_in_every_candidate():
    oracle = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    native = oracle.float()
    trial = Trial("example", [Outcome({"y": native})], [Outcome({"y": oracle})])
    rounding = float((native.double() - oracle).norm() / oracle.norm())
    for candidate in (native.clone(), native + 0.1, native.clone()):
        comparison = Comparison(Given(example=candidate))
        comparison.add([trial])
        worst = comparison.worst["output", "y"]
        assert worst.error == pytest.approx(float((candidate.double() - oracle).norm() / oracle.norm()), rel=1e-6)
        assert worst.budget == pytest.approx(4 * rounding + 64 * torch.finfo(torch.float32).eps, rel=1e-6)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_dtype_or_a_layout_without_a_kernel_for_equality_is_identical_to_nothing():
    for value in (torch.zeros(2).to(torch.complex32), torch.eye(2).to_sparse()):
        assert not is_identical(value, value.clone())


def test_nan_is_not_identical_and_yet_no_difference():
    right = torch.tensor([float("nan"), 1.0])
    assert not is_identical(right, right.clone())
    assert compared(right, example=right.clone()).differs is False
