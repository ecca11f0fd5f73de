"""Tensors that train and are no registered parameters: in lists, attributes, buffers, closures and other objects."""

import functools
import types

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, judge, wrong_tensors

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Scale(torch.autograd.Function):
    """``x w``, whose gradient for ``w`` is ``factor`` times what it should be."""

    @staticmethod
    def forward(ctx, x, w, factor):
        ctx.save_for_backward(x, w)
        ctx.factor = factor
        return x * w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w, ctx.factor * (gradient * x).sum(0), None


def weight() -> Tensor:
    return torch.randn(6, generator=torch.Generator().manual_seed(2)).requires_grad_()


class Holder:
    def __init__(self, w: Tensor) -> None:
        self.w = w


class Slotted:
    __slots__ = ("w",)

    def __init__(self, w: Tensor) -> None:
        self.w = w


class Net(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.factor = nn.Linear(6, 6), factor

    def forward(self, x: Tensor) -> Tensor:
        return Scale.apply(self.linear(x).tanh(), self.weight(), self.factor)


class InList(Net):
    def __init__(self, factor: float) -> None:
        super().__init__(factor)
        self.heads = [nn.Parameter(weight().detach())]

    def weight(self):
        return self.heads[0]


class InAttribute(Net):
    def __init__(self, factor: float) -> None:
        super().__init__(factor)
        self.t = weight()

    def weight(self):
        return self.t


class InBuffer(Net):
    def __init__(self, factor: float) -> None:
        super().__init__(factor)
        self.register_buffer("b", weight())

    def weight(self):
        return self.b


class InObject(Net):
    def __init__(self, factor: float, kind: type = Holder) -> None:
        super().__init__(factor)
        self.holder = kind(weight())

    def weight(self):
        return self.holder.w


class InModuleList(Net):
    """A layer in a plain list, which ``parameters()`` does not give."""

    def __init__(self, factor: float) -> None:
        super().__init__(factor)
        self.layers = [nn.Linear(6, 1, bias=False)]

    def weight(self):
        return self.layers[0].weight[0]


def patched_forward(factor: float) -> nn.Module:
    model, w = Net(factor), weight()
    model.forward = types.MethodType(lambda self, x: Scale.apply(self.linear(x).tanh(), w, factor), model)
    return model


def closure(factor: float):
    w = weight()
    return lambda x: Scale.apply(x.tanh(), w, factor)


def partial(factor: float):
    return functools.partial(lambda x, w: Scale.apply(x.tanh(), w, factor), w=weight())


def default(factor: float):
    return lambda x, w=weight(): Scale.apply(x.tanh(), w, factor)


W = weight()


def of_a_global(factor: float):
    return (lambda x: Scale.apply(x.tanh(), W, 1.0)) if factor == 1.0 else (lambda x: Scale.apply(x.tanh(), W, 2.0))


HEADS = [nn.Linear(6, 1, bias=False)]


def head() -> Tensor:
    return HEADS[0].weight[0]


def of_a_helper(factor: float):
    """A function whose helper reads a list of modules by a global name."""
    return lambda x: Scale.apply(x.tanh(), head(), factor)


PLACES = {
    "list": (InList, "param:heads.0"),
    "attribute": (InAttribute, "param:t"),
    "buffer": (InBuffer, "buffer:b"),
    "object": (InObject, "param:holder.w"),
    "slots": (functools.partial(InObject, kind=Slotted), "param:holder.w"),
    "module in a list": (InModuleList, "param:layers.0.weight"),
    "patched forward": (patched_forward, "param:w"),
    "closure": (closure, "param:w"),
    "partial": (partial, "param:w"),
    "default": (default, "param:w"),
    "global": (of_a_global, "param:W"),
    "list of a helper": (of_a_helper, "param:head.HEADS.0.weight"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_gradient_is_named_wherever_the_tensor_is_kept(place):
    make, name = PLACES[place]
    assert wrong_tensors(judge(make(2.0), X)) == [name]


@pytest.mark.parametrize("place", PLACES)
def test_the_clean_twin_is_silent_and_has_the_tensor_among_those_that_agree(place):
    make, name = PLACES[place]
    unit = judge(make(1.0), X)
    assert_passes(unit)
    assert name in [row.tensor for row in unit.tensors]


@pytest.mark.parametrize("place", PLACES)
def test_the_users_own_tensors_stay_as_they_were(place):
    model = PLACES[place][0](1.0)
    before = model(X).detach().clone()
    judge(model, X)
    assert torch.equal(model(X), before) and model(X).dtype == torch.float32
