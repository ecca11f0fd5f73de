"""The regime that is judged is the one that trains: inputs ask for no gradient there, and some gradients are lost then.

Reentrant checkpointing around the first layer, and a custom backward that looks at the wrong flag, are errors.
"""

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tests.judged import assert_passes, codes, finding, judge, serious, wrong_tensors

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


class Checkpointed(nn.Module):
    def __init__(self, around="first", reentrant=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.around, self.reentrant = around, reentrant

    def run(self, name, x):
        part = getattr(self, name)
        if name != self.around:
            return part(x).tanh()
        return checkpoint(lambda z: part(z).tanh(), x, use_reentrant=self.reentrant)

    def forward(self, x):
        return self.run("last", self.run("middle", self.run("first", x)))


def test_a_reentrant_checkpoint_around_the_first_layer_loses_its_gradients_in_training():
    unit = judge(Checkpointed(), X)
    assert wrong_tensors(unit) == ["param:first.bias", "param:first.weight"]
    assert {each.code for each in unit.findings if each.severity == "error"} == {"GC416"}
    assert (
        serious(unit)[0] == "GC416 in training, where the inputs require no gradient, param:first.weight receives none."
    )


def test_all_of_a_model_in_a_reentrant_checkpoint_is_not_trained():
    model = nn.Sequential(nn.Linear(5, 3))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=True)

    assert wrong_tensors(judge(Whole(), X)) == ["param:inner.0.bias", "param:inner.0.weight"]


@pytest.mark.parametrize(("around", "reentrant"), [("middle", True), ("first", False)])
def test_its_clean_twins_pass(around, reentrant):
    unit = judge(Checkpointed(around, reentrant), X)
    assert_passes(unit)
    assert "GC416" not in codes(unit)


def test_an_input_that_asks_for_a_gradient_in_training_too_is_no_finding():
    assert_passes(judge(Checkpointed(), X.clone().requires_grad_()))


class Product(Function):
    @staticmethod
    def forward(ctx, x, weight, asked):
        ctx.save_for_backward(x, weight)
        ctx.asked = asked
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight.t() if ctx.needs_input_grad[0] else None
        return of_x, x.t() @ gradient if ctx.needs_input_grad[ctx.asked] else None, None


class ByHand(nn.Module):
    def __init__(self, asked):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.ones(5, 2)), asked

    def forward(self, x):
        return Product.apply(x, self.weight, self.asked)


def test_a_backward_that_asks_whether_another_argument_needs_a_gradient_is_named():
    assert wrong_tensors(judge(ByHand(asked=0), X)) == ["param:weight"]


def test_a_backward_that_asks_for_its_own_argument_passes():
    assert_passes(judge(ByHand(asked=1), X))


class Forces(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x):
        energy = self.energy(x).sum()
        return energy, torch.autograd.grad(energy, x, create_graph=True)[0]


def test_a_model_that_needs_the_gradient_of_its_input_is_judged_with_it_and_a_note():
    unit = judge(Forces(), X)
    assert_passes(unit)
    assert "raises an error if its inputs require no gradient" in finding(unit, "GC416").message


class PenalisedIfAsked(Forces):
    def forward(self, x):
        energy = self.energy(x).sum()
        if not x.requires_grad:
            return energy
        return energy + torch.autograd.grad(energy, x, create_graph=True)[0].square().sum()


def test_a_model_that_computes_another_value_is_judged_as_it_is_given():
    unit = judge(PenalisedIfAsked(), X)
    assert_passes(unit)
    assert "computes another result" in finding(unit, "GC416").message
    assert codes(unit) == {"GC416"}  # nothing raises, and in float64 it computes the same
    assert "input:x" not in {tensor.tensor for tensor in unit.tensors}


def test_a_function_of_inputs_alone_has_no_other_regime():
    unit = judge(torch.sin, X)
    assert_passes(unit)
    assert "GC416" not in codes(unit)
