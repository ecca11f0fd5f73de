"""Parameters that do not ask for a gradient are counted apart, by name, and never as a match."""

from __future__ import annotations

import torch
from torch import nn

from gradctl.core.names import NOT_JUDGED
from tests.judged import assert_passes, judge

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def frozen(unit):
    return [tensor.tensor for tensor in unit.tensors if tensor.verdict == "frozen"]


def judged(unit):
    return [tensor.tensor for tensor in unit.tensors if tensor.verdict not in NOT_JUDGED]


def backbone_and_head():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def test_a_frozen_backbone_is_named():
    unit = judge(backbone_and_head(), X)
    assert_passes(unit)
    assert frozen(unit) == ["param:0.weight", "param:0.bias"]
    assert judged(unit) == ["param:2.weight", "param:2.bias", "input:input"]


def test_a_model_that_asks_for_all_gradients_has_none():
    assert frozen(judge(nn.Linear(4, 2), X)) == []


def test_names_that_are_not_asked_for_are_not_listed():
    unit = judge(backbone_and_head(), X, tensor="param:*.weight")
    assert [tensor.tensor for tensor in unit.tensors] == ["param:2.weight", "param:0.weight"]


def test_a_compiled_model_has_the_names_of_the_model():
    assert frozen(judge(torch.compile(backbone_and_head(), backend="eager"), X)) == ["param:0.weight", "param:0.bias"]


def test_a_layer_that_is_registered_twice_is_listed_once():
    shared = nn.Linear(4, 4).requires_grad_(False)
    unit = judge(nn.Sequential(shared, nn.Tanh(), shared), X)
    assert_passes(unit)
    assert frozen(unit) == ["param:0.weight", "param:0.bias"]
