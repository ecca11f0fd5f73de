from __future__ import annotations

import pytest
import torch
from torch import nn

from gradctl.subject.inputs.misfit import first_layer_remedy, given_inputs


class Reader(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask=None):
        return self.layer(x)


def test_the_tensors_that_were_given_are_listed():
    reader = Reader(nn.Linear(6, 4))
    given = given_inputs(reader, (torch.ones(3, 7),), {"mask": torch.ones(3, dtype=torch.bool)})
    assert given == "x=f32[3,7], mask=bool[3]"
    assert given_inputs(reader, ([torch.ones(()), torch.ones(2).to(torch.uint16)],), {}) == "x.0=f32[], x.1=uint16[2]"


def test_of_many_tensors_the_first_few_are_listed():
    given = given_inputs(lambda *xs: xs, [torch.ones(2)] * 6, {})
    assert given == "xs.0=f32[2], xs.1=f32[2], xs.2=f32[2], xs.3=f32[2] and 2 more"


def test_no_tensor_is_just_the_inputs():
    assert given_inputs(Reader(nn.Linear(6, 4)), (3,), {}) == "its inputs"


LAYERS = {
    "another width": (nn.Linear(6, 4), torch.ones(3, 7), "x=f32[8,6]"),
    "another dtype": (nn.Linear(6, 4), torch.ones(3, 6).double(), "x=f32[8,6]"),
    "no width at all": (nn.Linear(6, 4), torch.ones(()), "x=f32[8,6]"),
    "other channels": (nn.Conv2d(3, 4, 3), torch.ones(2, 1, 9, 9), "x=f32[4,3,32,32]"),
    "numbers for an embedding": (nn.Embedding(5, 4), torch.ones(3), "x=i64[8,16]@0..5"),
    "words that are not in it": (nn.Embedding(5, 4), torch.tensor([1, 5]), "x=i64[8,16]@0..5"),
    "features of a sequence": (nn.GRU(6, 4), torch.ones(3, 2, 7), "x=f32[16,8,6]"),
}


@pytest.mark.parametrize("what", LAYERS)
def test_an_input_that_the_first_layer_does_not_take_is_told_one_that_it_takes(what):
    layer, given, wanted = LAYERS[what]
    with pytest.raises((RuntimeError, IndexError)):
        layer(given)
    assert first_layer_remedy(Reader(layer), (given,), {}) == f" Layer 'layer' takes, for example, --input '{wanted}'."


@pytest.mark.parametrize(
    ("layer", "given"),
    [
        (nn.Linear(6, 4), torch.ones(2, 3, 6)),
        (nn.Conv2d(3, 4, 3), torch.ones(3, 9, 9)),
        (nn.Embedding(5, 4), torch.tensor([0, 4], dtype=torch.int32)),
    ],
    ids=["more dimensions", "no batch", "short integers"],
)
def test_an_input_that_it_takes_is_no_misfit(layer, given):
    layer(given)
    assert first_layer_remedy(Reader(layer), (given,), {}) == ""


def test_a_layer_that_is_the_model_is_it():
    assert first_layer_remedy(nn.Linear(6, 4), (torch.ones(7),), {}) == (
        " It takes, for example, --input 'input=f32[8,6]'."
    )


def test_without_a_layer_nothing_is_proposed():
    assert first_layer_remedy(torch.relu, (torch.ones(7),), {}) == ""
    assert first_layer_remedy(nn.ReLU(), (torch.ones(7),), {}) == ""
