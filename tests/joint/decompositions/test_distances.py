"""Distances and their gradients, against torch's own kernels and autograd."""

from __future__ import annotations

import pytest
import torch

from gradctl.joint.decompositions.distances import TABLE
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing

EXACT = "donot_use_mm_for_euclid_dist"


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, torch.inf])
@pytest.mark.parametrize("batches", [((2,), (2,)), ((), (2,)), ((), ())])
def test_distances_of_two_sets_and_a_pair_of_equal_rows(p, batches):
    first, second = rows(*batches[0], 5, 3), rows(*batches[1], 4, 3, seed=1)
    second[..., 0, :] = first[..., 1, :]
    second[..., 1, 1] = first[..., 2, 1]
    used = {"_cdist_forward", "_cdist_backward"}
    assert_as_torch(TABLE, used, lambda a, b: torch.cdist(a, b, p, EXACT), first, second)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, torch.inf])
def test_distances_within_one_set(p):
    first = rows(5, 3)
    first[1] = first[3]
    assert_as_torch(TABLE, {"_pdist_forward", "_pdist_backward"}, lambda a: torch.pdist(a, p), first)


@pytest.mark.parametrize("p", [1.5, 2.0, torch.inf])
def test_distances_are_right_in_onnxruntime(p):
    def distances(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.cdist(a, b, p, EXACT), torch.pdist(a, p)

    assert differing(distances, rows(5, 3).float(), rows(4, 3, seed=1).float()) == []
