"""Case 7: scatter, index_put, max_unpool and as_strided_scatter with an index that occurs twice.

Eager writes one of the two sources; autograd gives the gradient to both. Autograd is wrong: ``reference-wrong``.
Twin: the same call with distinct indices.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judged import assert_passes, judge, wrong_tensors

TWICE, DISTINCT = torch.tensor([0, 2, 2]), torch.tensor([0, 2, 1])


def scatter(source: Tensor, index: Tensor) -> Tensor:
    return torch.zeros(4, dtype=source.dtype).scatter(0, index, source)


def index_put(source: Tensor, index: Tensor) -> Tensor:
    return torch.zeros(4, dtype=source.dtype).index_put((index,), source)


def assignment(source: Tensor, index: Tensor) -> Tensor:
    target = torch.zeros(4, dtype=source.dtype)
    target[index] = source
    return target


def max_unpool(source: Tensor, index: Tensor) -> Tensor:
    return F.max_unpool1d(source[None], index[None], kernel_size=2)


@pytest.mark.parametrize("function", [scatter, index_put, assignment, max_unpool])
def test_an_index_that_occurs_twice_gives_a_gradient_to_a_source_that_was_overwritten(function):
    unit = judge(function, torch.tensor([0.3, -1.2, 0.7]), TWICE)
    assert (unit.verdict, wrong_tensors(unit)) == ("fail", ["input:source"])


@pytest.mark.parametrize("function", [scatter, index_put, assignment, max_unpool])
def test_distinct_indices_are_right(function):
    assert_passes(judge(function, torch.tensor([0.3, -1.2, 0.7]), DISTINCT))


def test_adding_at_an_index_that_occurs_twice_is_right():
    def index_add(source: Tensor, index: Tensor) -> Tensor:
        return torch.zeros(4, dtype=source.dtype).index_add(0, index, source)

    assert_passes(judge(index_add, torch.tensor([0.3, -1.2, 0.7]), TWICE))
