"""A fused kernel for float32 and a plain path for the rest: in float64 the kernel is never run, and never judged.

A pass must not speak of code that only the user's own dtype reaches.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, judge

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class FusedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, off: float) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        ctx.off = off
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return ctx.off * gradient * y, None


class Dispatching(nn.Module):
    def __init__(self, off: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.off = nn.Linear(4, 3), off

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return FusedExp.apply(h, self.off) if h.dtype == torch.float32 else h.exp()


class WrongInFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * y * (1.1 if gradient.dtype == torch.float32 else 1.0)


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return WrongInFloat32.apply(self.fc(x))


def test_a_right_kernel_passes():
    assert_passes(judge(Dispatching(1.0), X))


@pytest.mark.xfail(strict=True, reason="the native gradient is never held against the float64 one")
@pytest.mark.parametrize("model", [Dispatching(1.1), Inside()], ids=["dispatch", "inside"])
def test_a_gradient_wrong_in_float32_alone_does_not_pass(model):
    assert judge(model, X).verdict != "pass"
