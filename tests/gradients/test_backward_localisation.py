"""On right nets no part is blamed, kinks or not, though each is judged alone on cotangents that the net never makes."""

from __future__ import annotations

import pytest
import torch

from gradctl.gradients.backward_localisation import find_wrong_parts
from gradctl.gradients.baseline import run_native
from gradctl.gradients.float64 import oracle_runner
from gradctl.subject.subject import Subject
from gradctl.tracing.functions import FunctionWatch
from tests.zoo import plant
from tests.zoo.random_nets import random_net

SETTINGS = {"seed": 0, "epsilon": torch.finfo(torch.float64).eps}


def blamed(model, *args):
    subject = Subject(target="test", model=model, args=args, kwargs={})
    runner = oracle_runner(subject, run_native(subject).input_mode, FunctionWatch()).runner
    before = [leaf.tensor.clone() for leaf in runner.leaves]
    found = [(each.origin.module, each.origin.op, each.vote) for each in find_wrong_parts(runner, SETTINGS)]
    assert all(map(torch.equal, before, [leaf.tensor for leaf in runner.leaves]))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_no_part_of_a_right_net_is_blamed(seed):
    model, args = random_net(seed)[:2]
    assert blamed(model, *args) == []


def test_the_planted_part_is():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    found = blamed(plant(model, "2.weight", "off by one", "native"), torch.randn(3, 4))
    assert found == [("2", "torch.Tensor.scatter", "vjp")]
