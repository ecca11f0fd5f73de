"""Attention's softmax, as torch has it: rows without any position are zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradctl.joint.decompositions.activation import TABLE
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing


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
