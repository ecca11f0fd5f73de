"""A linear layer whose Function computes in blocks of rows, as a kernel does, with a mistake that the example hides.

The gradient of the weight is that of the last block: it is assigned where it should be added. Up to 4 rows there is one
block, and ``gradctl gradcheck sample_models/row_blocks.py`` passes; ``--sizes 'batch=1,4,5,8'`` finds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 4


class RowBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.cat([rows @ weight for rows in x.split(_ROWS)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_x, of_weight = torch.empty_like(x), torch.zeros_like(weight)
        for first in range(0, len(x), _ROWS):
            rows = slice(first, first + _ROWS)
            of_x[rows] = gradient[rows] @ weight.T
            of_weight = x[rows].T @ gradient[rows]
        return of_x, of_weight


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return RowBlocks.apply(x, self.weight).tanh()  # type: ignore[no-any-return,no-untyped-call]


def make_model() -> Net:
    torch.manual_seed(0)
    return Net()


def example_inputs(batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, 6, generator=torch.Generator().manual_seed(1)),)
