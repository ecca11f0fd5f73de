"""Tiny models of the `transformers` library: their joint graphs give the gradients of autograd."""

from __future__ import annotations

import pytest

from tests.joint.joined import differing
from tests.sweeps import sampled
from tests.zoo.transformers import TRANSFORMERS

RTOL = 1e-4  # some dozen layers deep, where 1e-5 is what one layer adds


@pytest.mark.parametrize("name", sampled(TRANSFORMERS, always=["llama"]))
def test_gradients_are_those_of_autograd(name):
    model, args, kwargs = TRANSFORMERS[name]()
    assert differing(model, *args, rtol=RTOL, **kwargs) == []
