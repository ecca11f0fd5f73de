"""RMSNorm as two Triton kernels, forward and backward, beside the same in plain PyTorch, ``reference``.

Without a GPU, Triton's interpreter runs the kernels on the CPU: ``pip install triton``, and nothing else. ``fused`` is
right, and ``fused_wrong`` adds no gradient for the scale that the row's own mean square has: ``gradctl compare
sample_models/triton_kernel.py:reference sample_models/triton_kernel.py:fused_wrong`` fails and names ``input:x``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

EPSILON = 1e-6


@triton.jit
def forward_kernel(x_ptr, weight_ptr, y_ptr, scale_ptr, width, EPSILON: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside, at = columns < width, tl.program_id(0) * width + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    scale = 1 / tl.sqrt(tl.sum(x * x) / width + EPSILON)
    tl.store(scale_ptr + row, scale)
    tl.store(y_ptr + at, x * scale * weight, mask=inside)


@triton.jit
def backward_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    gradient_ptr,
    to_x_ptr,
    to_weight_ptr,
    width,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside, at = columns < width, tl.program_id(0) * width + columns
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + row)
    normal = tl.load(x_ptr + at, mask=inside, other=0.0) * scale
    to_normal = gradient * tl.load(weight_ptr + columns, mask=inside, other=0.0)
    along = tl.sum(to_normal * normal) / width if CENTRED else 0.0
    tl.store(to_x_ptr + at, scale * (to_normal - along * normal), mask=inside)
    tl.store(to_weight_ptr + at, gradient * normal, mask=inside)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, centred: bool = True) -> Tensor:
        x, weight, width = x.contiguous(), weight.contiguous(), x.shape[1]
        y, scale = torch.empty_like(x), x.new_empty(len(x))
        block = triton.next_power_of_2(width)
        forward_kernel[(len(x),)](x, weight, y, scale, width, EPSILON=EPSILON, BLOCK=block)
        ctx.save_for_backward(x, weight, scale)
        ctx.centred = centred
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        to_x, to_weight, width = torch.empty_like(x), torch.empty_like(x), x.shape[1]
        arguments = (x, weight, scale, gradient.contiguous(), to_x, to_weight, width)
        backward_kernel[(len(x),)](*arguments, CENTRED=ctx.centred, BLOCK=triton.next_power_of_2(width))
        return to_x, to_weight.sum(0), None


def reference(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


def fused(x: Tensor, weight: Tensor) -> Tensor:
    return RMSNorm.apply(x, weight)


def fused_wrong(x: Tensor, weight: Tensor) -> Tensor:
    return RMSNorm.apply(x, weight, False)  # wrong: the mean square depends on x too


def example_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(1)), torch.linspace(0.5, 1.5, 20)
