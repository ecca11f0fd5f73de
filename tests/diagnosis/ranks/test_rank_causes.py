"""Causes on many ranks: named if an experiment agrees, and otherwise not; the verdict does not depend on them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradctl.commands.compare import compare_one
from gradctl.subject.subject import Subject
from tests.ranks.layers import Classifier, samples


def compared(parallelize, model=None, inputs=None, form="ranks:2"):
    torch.manual_seed(0)
    subject = Subject(
        target="model",
        model=Classifier(wrong=False) if model is None else model,
        args=samples() if inputs is None else inputs,
        beside={"parallelize": parallelize},
    )
    unit = compare_one(subject, form)
    return unit, {finding.tensor: finding.cause for finding in unit.findings if finding.severity == "error"}


def reducing(change):
    """Return a ``parallelize`` that averages gradients, and then changes them by parameter and rank."""

    def parallelize(model, mesh):
        for name, parameter in model.named_parameters():

            def average(each, name=name):
                dist.all_reduce(each.grad)
                each.grad /= mesh.size()
                change(name, each.grad, mesh.get_local_rank())

            parameter.register_post_accumulate_grad_hook(average)
        return model

    return parallelize


def test_a_shape_that_is_not_known_stays_without_a_cause():
    def change(name, gradient, rank):
        if name == "fc1.weight":
            gradient[0] *= 1.5

    unit, causes = compared(reducing(change))
    assert unit.verdict == "fail"
    assert causes == {"param:fc1.weight": None}


def test_each_parameter_has_the_cause_of_its_own_gradient():
    def change(name, gradient, rank):
        if name == "fc1.weight":
            gradient *= 3
        elif name == "fc2.bias" and rank == 2:
            gradient *= 1.2

    unit, causes = compared(reducing(change), form="ranks:3")
    assert causes == {"param:fc1.weight": "GC221", "param:fc2.bias": "GC223"}
    assert "only ranks 0, 1 of ranks:3" in next(each.cause_message for each in unit.findings if each.cause == "GC223")


def test_a_factor_that_is_no_power_of_the_number_of_ranks_is_not_named():
    unit, causes = compared(reducing(lambda name, gradient, rank: gradient.mul_(1.5)))
    assert unit.verdict == "fail"
    assert set(causes.values()) == {None}


class Routed(nn.Module):
    """Two losses of one batch, whose weights are those of no split of it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.fc(x), labels) + self.fc(x).var()


def test_a_loss_that_is_no_mean_is_no_mean_of_means():
    unit, causes = compared(lambda model, mesh: DistributedDataParallel(model), Routed())
    assert unit.verdict == "fail"
    assert "GC227" not in causes.values()
