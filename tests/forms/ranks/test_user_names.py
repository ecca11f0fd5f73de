"""The names of tensors in the user's model: the oracle is which tensor of it each one is."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from gradctl.forms.form import named_tensors
from gradctl.forms.ranks.user_names import UserNames
from gradctl.subject.instance import Instance
from tests.forms.ranks.models import small_net, subject_of

pytestmark = pytest.mark.fast


class Wrapper(nn.Module):
    """What users write around a model: its name in the paths is theirs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def as_function(model):
    def call(x):
        return model(x)

    return call


def tied_net():
    net = small_net()
    return nn.Sequential(net, net[1], net)  # a module with two names


def inner(model):
    model[2] = Wrapper(model[2])
    return model


ARRANGED = {
    "the model": (small_net, lambda model: model),
    "a wrapper": (small_net, Wrapper),
    "two wrappers": (small_net, lambda model: nn.Sequential(Wrapper(model))),
    "a wrapper of a module": (small_net, inner),
    "a function": (small_net, as_function),
    "a stage, whose modules have other numbers": (small_net, lambda model: nn.Sequential(model[2])),
    "a module with two names": (tied_net, Wrapper),
}


@pytest.mark.parametrize("case", ARRANGED)
def test_a_tensor_has_its_name_whatever_wraps_or_moves_its_module(case):
    make, arrange = ARRANGED[case]
    instance = Instance(subject_of(make()))
    expected = {name: id(each) for name, each in named_tensors(instance.model)[0].items()}
    names = UserNames(instance)
    found = {name: id(each) for name, each in names.parameters(arrange(instance.model)).items()}
    if case.startswith("a stage"):
        expected = {name: each for name, each in expected.items() if name.startswith("2.")}
    assert found == expected


def test_a_layer_of_the_users_that_replaces_another_has_its_name_and_a_new_one_its_own():
    instance = Instance(subject_of())
    names, model = UserNames(instance), instance.model
    model[2] = nn.Linear(8, 3)
    wrapper = Wrapper(model)
    wrapper.gate = nn.BatchNorm1d(3)
    assert set(names.parameters(wrapper)) == {"0.weight", "0.bias", "2.weight", "2.bias", "gate.weight", "gate.bias"}
    assert set(names.buffers(wrapper)) == {"gate.running_mean", "gate.running_var", "gate.num_batches_tracked"}


def test_a_copy_inside_a_wrapper_of_torch_is_named_by_its_path():
    instance = Instance(subject_of())
    names = UserNames(instance)
    wrapper = nn.Module()
    wrapper.module = copy.deepcopy(instance.model)
    assert set(names.parameters(wrapper)) == {"0.weight", "0.bias", "2.weight", "2.bias"}
