"""A model that differs from itself on the same input and seed cannot be judged: GC412, inconclusive, never a pass.

Twins: randomness from generators that are seeded before each call (torch, numpy, python), and from a generator that the
module holds, whose state is put back before each call.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, codes, judge

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
CALLS = itertools.count(1)
UNSEEDED, SYSTEM = np.random.default_rng(0), random.SystemRandom()


def counts_its_calls(x: Tensor) -> Tensor:
    return x.tanh() * next(CALLS)


def draws_from_its_own_generator(x: Tensor) -> Tensor:
    return x.tanh() * UNSEEDED.random()


def draws_from_the_system(x: Tensor) -> Tensor:
    return x.tanh() * SYSTEM.uniform(1, 2)


@pytest.mark.parametrize("function", [counts_its_calls, draws_from_its_own_generator, draws_from_the_system])
def test_a_function_that_differs_from_itself_is_inconclusive(function):
    unit = judge(function, X)
    assert unit.verdict == "inconclusive"
    assert "GC412" in codes(unit)


def draws_from_torch(x: Tensor) -> Tensor:
    return x.tanh() * torch.rand_like(x)


def draws_from_numpy(x: Tensor) -> Tensor:
    return x.tanh() * float(np.random.rand())


def draws_from_python(x: Tensor) -> Tensor:
    return x.tanh() * random.random()


@pytest.mark.parametrize("function", [draws_from_torch, draws_from_numpy, draws_from_python])
def test_a_generator_that_can_be_seeded_is_no_matter(function):
    assert_passes(judge(function, X))


@pytest.mark.parametrize(
    "generator",
    [torch.Generator().manual_seed(0), np.random.default_rng(0), random.Random(0)],
    ids=["torch", "numpy", "python"],
)
def test_a_generator_that_the_module_holds_is_put_back(generator):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.generator = nn.Linear(6, 3), generator

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.generator, torch.Generator):
                return self.linear(x) * torch.rand(3, generator=self.generator)
            return self.linear(x) * self.generator.random()

    torch.manual_seed(0)
    assert_passes(judge(Noisy(), X))


def test_dropout_in_training_mode_passes():
    torch.manual_seed(0)
    assert_passes(judge(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), X))


def test_a_module_that_counts_its_calls_passes():
    """Every run is made on a copy, so an attribute that counts starts at the same value each time."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(6, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) / self.calls

    torch.manual_seed(0)
    assert_passes(judge(Counting(), X))
