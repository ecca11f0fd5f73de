"""Case 20 (pytorch 147380): one tensor under two names. The gradient is the sum over both uses.

The shared storage is moved once; the report has one entry with both names. A mistake in one of the uses is named.
"""

import torch
from torch import Tensor, nn

from tests.judged import assert_passes, judge, wrong_tensors
from tests.zoo import plant

IDS = torch.tensor([[1, 4, 2], [0, 3, 3]])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).tanh())


def test_tied_weights_pass_as_one_tensor_with_two_names():
    unit = judge(Tied(), IDS)
    assert_passes(unit)
    (tied,) = [each for each in unit.tensors if each.tied]
    assert {tied.tensor, *tied.tied} == {"param:embedding.weight", "param:head.weight"}


def test_a_mistake_in_one_of_the_two_uses_is_named():
    unit = judge(plant(Tied(), "head.weight", "scale 1.1"), IDS)
    assert wrong_tensors(unit) == ["param:embedding.weight"]


class Shared(nn.Module):
    """One parameter whose transposed view is a second parameter on the same storage."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode = nn.Parameter(torch.randn(5, 3))
        self.decode = nn.Parameter(self.encode.detach().t())

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.encode).tanh() @ self.decode


def test_a_parameter_that_is_a_view_of_another_passes():
    """Two leaves on one storage: autograd gives each its own part, and moving the storage moves both."""
    assert_passes(judge(Shared(), torch.randn(4, 5, generator=torch.Generator().manual_seed(1))))
