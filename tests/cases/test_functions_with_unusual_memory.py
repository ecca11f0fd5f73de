"""Functions that are right on contiguous copies of their inputs, and wrong with the memory that they are given.

Each twin differs by the Function alone, which computes the same and has the right backward. A Function that is judged
alone gets copies, so these are found by their own node in a backward of the model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.judged import assert_passes, finding, judge, wrong_tensors

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
BEHIND = ["input:x", "param:fc.bias", "param:fc.weight"]


class Sine(Function):
    """Right; a subclass has its bug in ``derivative``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.is_expanded, ctx.is_gapped = 0 in x.stride(), x.stride(-1) > 1 and not x.is_contiguous()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class CountsCopies(Sine):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (3 if ctx.is_expanded else 1) * Sine.backward(ctx, gradient)


class SkipsGaps(Sine):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (2 if ctx.is_gapped else 1) * Sine.backward(ctx, gradient)


class ReadsMemory(Sine):
    """Reads the memory of the cotangent in its order: another one where the cotangent is transposed."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        strides = torch.empty(gradient.shape).stride()
        same = gradient if 0 in gradient.stride() else gradient.as_strided(gradient.shape, strides)
        return Sine.backward(ctx, same)


class Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, y = ctx.saved_tensors
        return gradient * y, gradient * x


class ForgetsOneOfTwo(Product):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, y = ctx.saved_tensors
        return gradient * y, None if x.data_ptr() == y.data_ptr() else gradient * x


class Finite(Function):
    """A view of its input; no gradient where that was not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.is_finite = x.isfinite()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.where(ctx.is_finite, gradient, 0)


class FiniteWhenRead(Finite):
    """Looks at its input in backward only: what the caller writes to the view has arrived there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.where(ctx.x.isfinite(), gradient, 0)


class Net(nn.Module):
    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.out, self.function = nn.Linear(4, 4), nn.Linear(4, 2), function


class Expanded(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function.apply(self.fc(x)[:, None].expand(6, 3, 4)))


class Sliced(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function.apply(self.fc(x).repeat_interleave(2, dim=-1)[:, ::2]))


class TransposedAfter(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function.apply(self.fc(x)).t().contiguous().t())


class Squared(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return self.out(self.function.apply(h, h))


class WrittenAfter(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.function.apply(self.fc(x))
        output = 2 * h
        h.detach()[:, 1:3].fill_(torch.inf)
        return output


CASES = {
    "expanded": (Expanded, CountsCopies, Sine, "where 'x' is expanded (stride 0)"),
    "not contiguous": (Sliced, SkipsGaps, Sine, "where 'x' is not contiguous"),
    "cotangent": (TransposedAfter, ReadsMemory, Sine, "where its incoming gradient is not contiguous"),
    "shared inputs": (Squared, ForgetsOneOfTwo, Product, "where 'x' and 'y' share memory"),
    "output is a view": (WrittenAfter, FiniteWhenRead, Finite, "'x' and output 0 share memory"),
}


@pytest.mark.parametrize(("model", "wrong", "_", "said"), CASES.values(), ids=CASES)
def test_a_function_that_is_wrong_with_this_memory_is_the_cause(model, wrong, _, said):
    unit = judge(model(wrong), X)
    headline = finding(unit, "GC408")
    assert (headline.severity, headline.allow) == ("error", f"GC408:{wrong.__name__}")
    assert said in headline.message
    assert wrong_tensors(unit) == BEHIND
    assert {each.cause for each in unit.findings if each.code == "GC401"} == {"GC408"}


@pytest.mark.parametrize(("model", "_", "right", "__"), CASES.values(), ids=CASES)
def test_its_right_twin_passes(model, _, right, __):
    assert_passes(judge(model(right), X))


class KeepsItsInput(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.x * gradient


class WritesInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        y = self.function.apply(h)
        h.detach().mul_(3)
        return self.out(y)


def test_what_a_function_keeps_and_the_model_changes_is_named_where_it_is_read():
    unit = judge(WritesInput(KeepsItsInput), X)
    found = [each for each in unit.findings if each.code == "GC401"]
    assert [each.tensor for each in found if "KeepsItsInput.backward reads values that are changed" in each.message]
    assert {each.location.line for each in found} == {KeepsItsInput.backward.__code__.co_firstlineno}
    assert sorted(each.tensor for each in found) == BEHIND
