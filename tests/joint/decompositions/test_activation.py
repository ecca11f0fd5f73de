"""Attention's softmax, as torch has it: rows without any position are zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradctl.joint.decompositions.activation import TABLE
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing, joint_graph


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("masked", ["nothing", "entries", "row and column", "everything"])
def test_softmax_of_rows_with_masked_positions(dim: int, masked: str) -> None:
    x = 10 * torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = {"nothing": [], "entries": [(0, 1), (2, 2)], "everything": [...]}.get(masked, [(1,), (slice(None), 2)])
    for place in hidden:
        x[place] = -torch.inf
    assert_as_torch(TABLE, {"_safe_softmax"}, lambda x: torch.ops.aten._safe_softmax(x, dim), x)


class Masked(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def test_attention_of_a_row_that_sees_nothing() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    assert differing(Masked(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), mask) == []


@pytest.mark.parametrize("exponent", [1, 2, 3, 2.0])
def test_small_powers(exponent: float) -> None:
    x = torch.tensor([-2.5, -0.0, 0.0, 1e-200, 3.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    assert_as_torch(TABLE, {"pow"}, lambda x: x**exponent, x[:5])
    torch.testing.assert_close(TABLE[torch.ops.aten.pow.Tensor_Scalar](x, exponent), x**exponent, equal_nan=True)


def test_other_powers_are_left_to_torch() -> None:
    power = TABLE[torch.ops.aten.pow.Tensor_Scalar]
    assert {power(torch.ones(2), exponent) for exponent in (0, 0.5, -1, 4, 2.5)} == {NotImplemented}
    assert power(torch.ones(2, dtype=torch.int64), 2) is NotImplemented


def test_a_relu_is_computed_once() -> None:
    graph = joint_graph(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
    assert [node.op_type for node in graph.graph.node].count("Relu") == 1
