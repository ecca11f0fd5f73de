"""Random nets, some exactly at kinks: their joint graphs are neither refused nor wrong."""

from __future__ import annotations

import pytest

from tests.compared import compared, different
from tests.zoo import random_net

# One net of each family, one of them at kinks. All others run with the slow tests.
QUICK = (9, 42, 118, 160)


@pytest.mark.parametrize(
    "seed", [seed if seed in QUICK else pytest.param(seed, marks=pytest.mark.slow) for seed in range(200)]
)
def test_a_random_net_has_a_joint_graph(seed):
    model, args = random_net(seed)
    unit = compared("onnx-joint", model, *args)
    assert (unit.verdict, different(unit)) == ("pass", {}), (unit.reason, unit.findings)
