"""Bags of embeddings, against torch's own kernels and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.subject.subject import Subject
from tests.joint.decompositions.substituted import assert_as_torch, values
from tests.joint.joined import differing

INDICES = torch.tensor([2, 4, 4, 0, 2, 6])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_a_bag_gives_each_row_its_share(mode, include_last_offset, padding_idx):
    offsets = torch.tensor([0, 2, 2, 6] if include_last_offset else [0, 2, 2])

    def bag(weight: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(
            INDICES, weight, offsets, mode=mode, include_last_offset=include_last_offset, padding_idx=padding_idx
        )

    assert_as_torch({"_embedding_bag"}, bag, values(7, 3))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_weights_of_samples_have_gradients(padding_idx):
    def bag(weight: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        offsets = torch.tensor([0, 2, 2])
        return F.embedding_bag(INDICES, weight, offsets, mode="sum", per_sample_weights=shares, padding_idx=padding_idx)

    used = {"_embedding_bag", "_embedding_bag_per_sample_weights_backward"}
    assert_as_torch(used, bag, values(7, 3), values(6))


class Bag(torch.nn.Module):
    """A bag of fixed indices: those that are drawn anew are not in order."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(7, 3, **options)

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return self.bag(INDICES, torch.tensor([0, 2, 2])) * scale


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_is_right_in_onnxruntime(mode):
    assert differing(Bag(mode=mode, padding_idx=2), torch.ones(3)) == []


def test_a_scale_by_frequency_is_refused():
    subject = Subject(target="bag", model=Bag(scale_grad_by_freq=True), args=(torch.ones(3),))
    unit = Comparing(subject, Allows(())).form("onnx-joint", named=True)
    assert unit.status == "unsupported"
    assert "scale_grad_by_freq" in unit.reason
