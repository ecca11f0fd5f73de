"""Pairs of a reference and a candidate: a difference that must be found, beside a right twin on which it is silent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradctl
from gradctl.core.errors import TargetError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def compared(reference, candidate, inputs=X, **options):
    """Return the one unit of a comparison."""
    (unit,) = gradctl.compare(reference, inputs, candidate=candidate, **options).units
    return unit


def errors(unit):
    return {(each.code, each.tensor): each for each in unit.findings if each.severity == "error"}


def two_layers():
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"map": {"0.weight": "{0}"}}, "GC124", "the candidate has no parameter '{0}'"),
        ({"map": {"0.*": "{*"}}, "GC124", "the candidate has no parameter '{weight'"),
        ({"map": {"0.weight": "0.weight", "1.weight": "0.weight"}}, "GC124", "both '0.weight' and '1.weight'"),
        ({"map": 5}, "GC118", "map=5 cannot be. Give a mapping"),
        ({"sizes": 5}, "GC128", "5 is no mapping"),
        ({"sizes": {"batch": 2.5}}, "GC128", "'batch=2.5' is not NAME=N,N"),
    ],
    ids=["braces", "one brace", "two to one", "no mapping", "sizes", "size"],
)
def test_an_invalid_argument_is_one_sentence(options, code, said):
    with pytest.raises(TargetError) as caught:
        compared(two_layers(), two_layers(), **options)
    assert caught.value.code == code
    assert said in caught.value.message


@pytest.mark.parametrize("options", [{"map": {"a": "b"}}, {"own_weights": True}], ids=["map", "own_weights"])
def test_what_applies_to_a_candidate_is_refused_without_one(options):
    with pytest.raises(TargetError, match="It applies to a candidate, and there is none"):
        gradctl.compare(two_layers(), X, forms="trace", **options)


class Tied(nn.Module):
    """Two applications of one weight, which has one name, or two."""

    def __init__(self, *names):
        super().__init__()
        weight = nn.Parameter(torch.eye(6) + 0.1)
        self.names = names
        for name in names:
            self.register_parameter(name, weight)

    def forward(self, x):
        first, last = getattr(self, self.names[0]), getattr(self, self.names[-1])
        return (x @ first).tanh() @ last


@pytest.mark.parametrize(
    ("reference", "candidate", "names"),
    [
        (("a", "b"), ("a",), {}),
        (("a",), ("a", "b"), {}),
        (("a", "b"), ("w",), {"a": "w"}),
        (("a", "b"), ("w",), {"a": "w", "b": "w"}),
    ],
    ids=["in the reference", "in the candidate", "one mapped", "both mapped"],
)
def test_of_the_names_of_a_tied_parameter_one_needs_a_partner(reference, candidate, names):
    unit = compared(Tied(*reference), Tied(*candidate), map=names)
    assert unit.verdict == "pass"
    assert "param:a" in {each.tensor for each in unit.tensors if each.quantity == "gradient"}
    assert not unit.findings
