"""Tiny models of the `transformers` library: their joint graphs give the gradients of autograd."""

from __future__ import annotations

import pytest

from tests.joint.joined import differing
from tests.zoo.transformers import TRANSFORMERS

# One text encoder, one decoder, one of images: a few seconds each. All others run with the slow tests.
QUICK = ("distilbert", "llama", "resnet")
RTOL = 1e-4  # some dozen layers deep, where 1e-5 is what one layer adds


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TRANSFORMERS]
)
def test_gradients_are_those_of_autograd(name):
    model, args, kwargs = TRANSFORMERS[name]()
    assert differing(model, *args, rtol=RTOL, **kwargs) == []
