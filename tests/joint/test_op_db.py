"""No operator of torch's own table gets a joint graph that is silently wrong, and those that are right stay right.

The default run takes a sample, and the operators that once were wrong; ``tests/benchmarks/joint_coverage.py`` prints
the whole table.
"""

from __future__ import annotations

import random

import pytest

from tests.benchmarks.joint_coverage import OPERATORS, cases

# Wrong, without a word, in torch.onnx 2.13: in its forward (log_ndtr, index_add, the mean of scatter_reduce, a norm
# that keeps its axes), or in a gradient.
ONCE_WRONG = (
    "as_strided",
    "index_add",
    "linalg.norm",
    "nn.functional.soft_margin_loss",
    "scatter_reduce.mean",
    "special.log_ndtr",
)

# Right on all of three samples.
RIGHT = (
    "add",
    "addmm",
    "amax",
    "cdist",
    "cummax",
    "cumprod",
    "diagonal",
    "logcumsumexp",
    "masked_scatter",
    "matmul",
    "nn.functional.bilinear",
    "nn.functional.cross_entropy",
    "nn.functional.embedding_bag",
    "nn.functional.layer_norm",
    "nn.functional.multi_margin_loss",
    "nn.functional.softshrink",
    "prod",
    "softmax",
    "special.erfcx",
    "unfold_copy",
)
SAMPLED = (*ONCE_WRONG, *random.Random(0).sample(sorted(OPERATORS), 6))


def states(names: list[str], count: int) -> dict[str, list[tuple[str, str, str]]]:
    found = [case for of_one in cases(names, count, jobs=2) for case in of_one]
    return {
        state: [(case.operator, case.sample, case.reason) for case in found if case.state == state]
        for state in {case.state for case in found}
    }


def test_no_operator_of_a_sample_is_wrong():
    found = states(list(SAMPLED), 1)
    assert found["right"]
    assert not found.get("WRONG")


def test_operators_that_are_right_stay_right():
    found = states(random.Random(0).sample(RIGHT, 8), 1)
    assert set(found) == {"right"}, {state: each for state, each in found.items() if state != "right"}


@pytest.mark.slow
def test_no_operator_is_wrong():
    assert not states(sorted(OPERATORS), 3).get("WRONG")


@pytest.mark.slow
def test_options_of_operators_that_are_right_are_right():
    assert set(states(list(RIGHT), 3)) == {"right"}
