"""Eager's JVP and HVP, judged: a backward that autograd cannot differentiate is found, its corrected twin is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradctl.core.allows import Allows
from gradctl.gradients.directional.products import check_directional
from gradctl.subject.subject import Subject

pytestmark = pytest.mark.fast


class Detaching(torch.autograd.Function):
    """Its gradient is right; the derivative of its gradient lacks a part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3 * ctx.x**2


class Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3 * ctx.saved_tensors[0] ** 2


class Scaled(torch.autograd.Function):
    """Its cotangent passes a value without a graph in part: the transpose is 1 % off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.99 * gradient + 0.01 * gradient.detach()


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class WrongJvp(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3 * ctx.saved_tensors[0] ** 2

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * 2 * ctx.saved_tensors[0] ** 2


class Model(nn.Module):
    def __init__(self, function: Any, scalar: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.function, self.scalar = nn.Linear(4, 3), function, scalar

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.fc(x).sin())
        return y.square().sum() if self.scalar else y


def verdict(graph: str, function: Any, wrt: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    subject = Subject(target="net.py:model", model=Model(function, graph == "hvp"), args=(x,))
    unit = check_directional(subject, graph, wrt, allows=Allows(()))
    return unit.verdict, sorted({each.code for each in unit.findings})


@pytest.mark.parametrize(
    ("graph", "function", "expected"),
    [
        ("hvp", Detaching.apply, ("fail", ["GC426"])),
        ("hvp", Saving.apply, ("pass", [])),
        ("hvp", Round.apply, ("fail", ["GC426"])),
        ("hvp", lambda h: h + (h.round() - h).detach(), ("pass", [])),
        ("hvp", torch.relu, ("pass", [])),
        ("jvp", Detaching.apply, ("pass", [])),
        ("jvp", Scaled.apply, ("fail", ["GC426"])),
        ("jvp", Round.apply, ("pass", [])),
        ("jvp", torch.relu, ("pass", [])),
    ],
)
def test_the_verdict_on_a_model_with(graph, function, expected):
    assert verdict(graph, function) == expected
    assert verdict(graph, function, ("param:*", "input:*"))[0] == expected[0]


def test_a_jvp_that_forward_mode_would_use_and_that_differs_is_named():
    assert "GC413" in verdict("jvp", WrongJvp.apply)[1]
    assert verdict("jvp", Saving.apply)[1] == []
