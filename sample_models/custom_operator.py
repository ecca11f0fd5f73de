"""A registered operator, ``sample::soft_clip``, whose gradient is 10 % too large: ``torch.library.opcheck`` passes it.

``opcheck`` tests what the operator registers (schema, autograd key, fake kernel), and no value of a gradient. ``gradctl
gradcheck sample_models/custom_operator.py:sample::soft_clip`` fails with GC408, which names the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.library.custom_op("sample::soft_clip", mutates_args=())
def soft_clip(x: Tensor, limit: Tensor) -> Tensor:
    return limit * (x / limit).tanh()


@soft_clip.register_fake
def _(x: Tensor, limit: Tensor) -> Tensor:
    return torch.empty_like(x)


def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, limit = ctx.saved_tensors
    ratio = x / limit
    slope = 1 - ratio.tanh() ** 2
    to_limit = 1.1 * (gradient * (ratio.tanh() - ratio * slope)).sum(0)  # wrong: no factor
    return gradient * slope, to_limit


soft_clip.register_autograd(backward, setup_context=setup_context)


def soft_clip_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), torch.linspace(0.5, 2.5, 5)


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 5)
        self.limit = nn.Parameter(torch.linspace(0.5, 2.5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return soft_clip(self.fc(x), self.limit)


def Clipped_inputs() -> tuple[Tensor]:
    return (torch.randn(8, 6, generator=torch.Generator().manual_seed(1)),)
