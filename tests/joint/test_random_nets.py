"""Random nets, some exactly at kinks: their joint graphs are neither refused nor wrong."""

from __future__ import annotations

import pytest

from tests.compared import compared, different
from tests.sweeps import sampled
from tests.zoo import random_net


# One net, at kinks; tests/commands/test_compare_clean.py has one of each family.
@pytest.mark.parametrize("seed", sampled(range(200), always=[9]))
def test_a_random_net_has_a_joint_graph(seed):
    model, args = random_net(seed)
    unit = compared("onnx-joint", model, *args)
    assert (unit.verdict, different(unit)) == ("pass", {}), (unit.reason, unit.findings)
