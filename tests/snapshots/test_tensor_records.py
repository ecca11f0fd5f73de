"""What is kept of a tensor: the norm of a difference is estimated from projections, and measured for a small one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradctl.snapshots import tensor_records
from gradctl.snapshots.snapshot_runs import draw_cotangents
from gradctl.snapshots.tensor_records import DIRECTIONS, distance, project, record_tensors


def record(tensor, noise=0.0):
    return record_tensors({"": tensor}, {"": noise})[""]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_projections_are_inner_products_with_the_numbers_of_a_frozen_generator(monkeypatch):
    monkeypatch.setattr(tensor_records, "_CHUNK", 100)
    tensor, short = drawn(250), drawn(3, 50, seed=1)
    directions = np.concatenate(
        [np.random.RandomState(number).standard_normal((100, DIRECTIONS)) for number in range(3)]
    )
    found = project({"a": tensor, "b": short})
    np.testing.assert_allclose(found["a"], tensor.numpy() @ directions[:250], rtol=1e-12)
    np.testing.assert_allclose(found["b"], short.numpy().ravel() @ directions[:150], rtol=1e-12)


def test_the_estimate_is_within_a_factor_of_three():
    base = drawn(40, 25)
    stored = record(base)
    ratios = []
    for seed in range(1, 200):
        moved = base + 1e-6 * drawn(40, 25, seed=seed)
        ratios.append(distance(stored, record(moved)) / float((moved - base).norm()))
    assert 1 / 3 < min(ratios) < max(ratios) < 3
    assert math.sqrt(np.mean(np.square(ratios))) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.roll(1),
        lambda x: -x,
        lambda x: x * torch.where(torch.arange(1000) == 37, -1, 1),
        lambda x: x.view(40, 25).T.reshape(-1),
        lambda x: x.index_fill(0, torch.tensor([5]), torch.nan),
        lambda x: x[:999],
        lambda x: x.float(),
    ],
)
def test_another_tensor_is_far(change):
    tensor = drawn(1000)
    assert distance(record(tensor), record(change(tensor))) > 1e-9 * tensor.norm()


def test_nan_and_infinity_are_compared_by_their_places():
    tensor = drawn(100)
    tensor[3], tensor[4], tensor[5] = math.nan, math.inf, -math.inf
    assert distance(record(tensor), record(tensor.clone())) == 0
    other = tensor.clone()
    other[4] = -math.inf
    assert distance(record(tensor), record(other)) == math.inf
    other = tensor.clone()
    other[50] += 1
    assert 0.3 < distance(record(tensor), record(other)) < 3


def test_a_signed_zero_is_no_difference():
    assert distance(record(torch.zeros(20)), record(-torch.zeros(20))) == 0


def test_the_difference_of_a_small_tensor_is_exact():
    assert distance(record(torch.tensor([1.0, 2.0])), record(torch.tensor([1.0, 2.5]))) == 0.5
    assert distance(record(torch.tensor([1 + 1j])), record(torch.tensor([1 - 1j]))) == 2.0


def test_integers_that_differ_are_infinitely_far_unless_rounding_changes_them():
    one, other = torch.arange(20), torch.arange(20).flip(0)
    assert distance(record(one), record(other)) == math.inf
    assert math.isfinite(distance(record(one, noise=3.0), record(other, noise=3.0)))


def test_empty_tensors_have_records():
    assert distance(record(torch.zeros(0, 3)), record(torch.zeros(0, 3))) == 0


def test_a_cotangent_does_not_depend_on_the_other_outputs():
    y, z = torch.zeros(3), torch.zeros(2, dtype=torch.complex64)
    alone, both = draw_cotangents({"y": y}, 5), draw_cotangents({"z": z, "y": y}, 5)
    assert torch.equal(alone["y"], both["y"])
    assert not torch.equal(both["y"], draw_cotangents({"y": y}, 6)["y"])
    assert both["z"].dtype == torch.complex64
