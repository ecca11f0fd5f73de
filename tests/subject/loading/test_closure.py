"""Functions that use modules from around them: the modules are theirs, by the names of their variables."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gradctl.subject.instance import Instance
from gradctl.subject.loading.closure import adopt_modules
from gradctl.subject.signature import call_signature
from gradctl.subject.subject import Subject
from tests.judged import judge, wrong_tensors

GLOBAL = nn.Linear(3, 2)
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Planted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.fc(x)) + x.sum()


def over_a_variable():
    net = nn.Linear(3, 2)
    return (lambda x: net(x).sin()), {"net.weight", "net.bias"}


def over_a_global():
    return (lambda x: GLOBAL(x).sin()), {"GLOBAL.weight", "GLOBAL.bias"}


def over_a_global_inside_a_comprehension():
    return (lambda x: sum(GLOBAL(row) for row in x)), {"GLOBAL.weight", "GLOBAL.bias"}


def over_two_with_a_keyword():
    net, head = nn.Linear(3, 2), nn.Linear(2, 1)

    def model(x: Tensor, *, scale: float = 2.0) -> Tensor:
        return head(net(x).sin()) * scale

    return model, {"net.weight", "net.bias", "head.weight", "head.bias"}


def over_a_compiled_one():
    net = torch.compile(nn.Linear(3, 2), backend="eager")
    return (lambda x: net(x).sin()), {"net.weight", "net.bias"}


FUNCTIONS = [
    over_a_variable,
    over_a_global,
    over_a_global_inside_a_comprehension,
    over_two_with_a_keyword,
    over_a_compiled_one,
]


@pytest.mark.parametrize("make", FUNCTIONS, ids=lambda make: make.__name__)
def test_its_parameters_have_the_names_of_its_variables_and_it_computes_the_same(make):
    function, names = make()
    owned = adopt_modules(function)
    assert {name for name, _ in owned.named_parameters()} == names
    assert torch.equal(owned(X), function(X))
    assert call_signature(owned) == call_signature(function)


@pytest.mark.parametrize("make", FUNCTIONS, ids=lambda make: make.__name__)
def test_a_copy_uses_modules_of_its_own(make):
    function, _ = make()
    before = function(X).detach().clone()
    copied = copy.deepcopy(adopt_modules(function))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(function(X), before)
    assert not copied(X).any()


def test_one_module_under_two_names_stays_one():
    net = nn.Linear(3, 2)
    again = net
    owned = adopt_modules(lambda x: net(x) + again(x))
    (weight, _, _) = Instance(Subject("over", owned, (X,))).leaves
    assert {weight.name, *weight.tied} == {"param:net.weight", "param:again.weight"}


def test_a_wrong_gradient_behind_a_variable_is_named_and_its_clean_twin_is_silent():
    planted, clean = Planted(), nn.Linear(3, 2)
    unit = judge(adopt_modules(lambda x: planted(x) + clean(x)), X)
    assert wrong_tensors(unit) == ["input:x", "param:planted.fc.bias", "param:planted.fc.weight"]
    assert wrong_tensors(judge(adopt_modules(lambda x: clean(x) + 1), X)) == []


def test_a_module_of_the_name_of_an_attribute_is_no_part():
    net = nn.ModuleDict({"GLOBAL": nn.Tanh()})
    owned = adopt_modules(lambda x: net.GLOBAL(x) + 1)
    assert [name for name, _ in owned.named_children()] == ["net"]


@pytest.mark.parametrize(
    "model",
    [torch.sin, lambda x: x * 2, nn.Linear(3, 2), nn.Linear(3, 2).forward, Doubled.apply],
    ids=["a builtin", "a lambda", "a module", "a method", "a Function"],
)
def test_what_uses_no_module_or_is_no_function_stays_what_it_is(model):
    assert adopt_modules(model) is model
