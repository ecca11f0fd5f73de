"""Hooks, patched methods and stored functions reach the model that made them, which a copy must not run."""

import functools
import types
import weakref

import pytest
import torch
from torch import Tensor, nn

from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from tests.judged import assert_passes, judge, wrong_tensors

X = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))


class Emphasise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * 1.5

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


class Net(nn.Module):
    """A network that keeps an activation by way of ``keep``; 1.5 is the right factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.seen: dict[str, Tensor] = {}
        self.factor = factor
        self.keep()

    def keep(self) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).relu()
        return self.head(h.amax((2, 3)) + self.seen["activation"].mean((2, 3)))


class HookOverSelf(Net):
    def keep(self):
        self.conv.register_forward_hook(lambda m, i, o: self.seen.update(activation=Emphasise.apply(o, self.factor)))


class HookOverItsDict(Net):
    def keep(self):
        seen, factor = self.seen, self.factor
        self.conv.register_forward_hook(lambda m, i, o: seen.update(activation=Emphasise.apply(o, factor)))


class HookIsAMethod(Net):
    def keep(self):
        self.conv.register_forward_hook(self.see)

    def see(self, module, given, output):
        self.seen["activation"] = Emphasise.apply(output, self.factor)


class HookIsAPartial(Net):
    def keep(self):
        def see(seen, factor, module, given, output):
            seen["activation"] = Emphasise.apply(output, factor)

        self.conv.register_forward_hook(functools.partial(see, self.seen, self.factor))


class PreHookUsesTheLayer(Net):
    """A hook that calls another layer by a variable."""

    def keep(self):
        conv, seen, factor = self.conv, self.seen, self.factor

        def see(module, given):
            seen["activation"] = Emphasise.apply(nn.functional.conv2d(given[0], conv.weight, conv.bias), factor)

        self.conv.register_forward_pre_hook(see)


class PatchedForward(Net):
    def keep(self):
        plain = self.conv.forward

        def forward(x):
            self.seen["activation"] = Emphasise.apply(plain(x), self.factor)
            return plain(x)

        self.conv.forward = forward


class PatchedMethod(Net):
    def keep(self):
        model = self

        def forward(self, x):
            model.seen["activation"] = Emphasise.apply(nn.Conv2d.forward(self, x), model.factor)
            return nn.Conv2d.forward(self, x)

        self.conv.forward = types.MethodType(forward, self.conv)


class WeakParent(Net):
    def keep(self):
        self.conv.parent = weakref.ref(self)
        self.conv.register_forward_hook(
            lambda m, i, o: m.parent().seen.update(activation=Emphasise.apply(o, m.parent().factor))
        )


SEEN: dict[str, Tensor] = {}


class HookOverAGlobalDict(Net):
    """A dict that the hook fills and the method reads, both by a global name, which no copy can change."""

    def keep(self):
        factor = self.factor
        self.conv.register_forward_hook(lambda m, i, o: SEEN.update(activation=Emphasise.apply(o, factor)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).relu()
        return self.head(h.amax((2, 3)) + SEEN["activation"].mean((2, 3)))


KINDS = (
    HookOverAGlobalDict,
    HookOverSelf,
    HookOverItsDict,
    HookIsAMethod,
    HookIsAPartial,
    PreHookUsesTheLayer,
    PatchedForward,
    PatchedMethod,
    WeakParent,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_function_in_a_kept_activation_is_found(kind):
    assert {"param:conv.weight", "param:conv.bias"} <= set(wrong_tensors(judge(kind(3.0), X)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_clean_twin_is_silent_and_the_users_model_untouched(kind):
    model = kind(1.5)
    assert_passes(judge(model, X))
    assert model.seen == {}


@pytest.mark.parametrize("kind", [HookOverAGlobalDict, HookOverItsDict, HookOverSelf])
def test_activations_of_an_earlier_call_change_nothing(kind):
    model = kind(1.5)
    model(X)
    kept = {**model.seen, **SEEN}["activation"]
    assert_passes(judge(model, X))
    assert {**model.seen, **SEEN}["activation"] is kept
    SEEN.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_move_with_the_parameters_of_the_copy_and_not_with_those_of_the_original(kind):
    model = kind(1.5)
    instance = Instance(Subject(target="test", model=model, args=(X,)))
    before = instance.run()[0][1].detach()
    with torch.no_grad():
        model.conv.weight.zero_()
    assert torch.equal(instance.run()[0][1], before)
    with torch.no_grad():
        next(leaf for leaf in instance.leaves if leaf.name == "param:conv.weight").tensor.zero_()
        model.conv.weight.copy_(torch.ones_like(model.conv.weight))
    moved = instance.run()[0][1].detach()
    with torch.no_grad():
        model.conv.weight.zero_()
    assert not torch.equal(moved, before)
    torch.testing.assert_close(moved, model(X).detach())
