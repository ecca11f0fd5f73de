"""Models that a user wraps, moves or renames for the ranks: the right ones agree, and their mistakes are named."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradctl.commands.compare import compare_one
from tests.forms.ranks.models import all_inputs, averaging, small_net, subject_of
from tests.forms.ranks.test_user_names import Wrapper, as_function

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")


def unit_of(subject, form="ranks:2"):
    return compare_one(subject, form, named=True, allows=())


def wrong(unit) -> set[str]:
    return {each.tensor for each in unit.findings if each.severity == "error"}


@pytest.mark.parametrize("wrap", [Wrapper, as_function])
def test_a_wrapper_or_function_of_the_users_agrees_and_hides_no_mistake(wrap):
    right, one_left_out = averaging(), averaging("2.weight")
    assert unit_of(subject_of(parallelize=lambda model, mesh: wrap(right(model, mesh)))).findings == ()
    unit = unit_of(subject_of(parallelize=lambda model, mesh: wrap(one_left_out(model, mesh))))
    assert (unit.verdict, wrong(unit)) == ("fail", {"param:2.weight"})


def test_parameters_under_unknown_names_are_not_judged():
    def rename(model, mesh):
        net = Wrapper(nn.Sequential(*small_net().to(model[0].weight.dtype)))
        net.other, net.net = net.net, None
        net.forward = net.other.forward
        return DistributedDataParallel(net)

    unit = unit_of(subject_of(parallelize=rename))
    assert unit.verdict == "inconclusive"
    assert "no rank has param:0.weight" in unit.reason
    assert "other.0.weight" in unit.reason


class FromFirst(torch.autograd.Function):
    """Sends the activation of rank 0 to all, and the gradient back."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale, x = scale, x.clone()
        dist.broadcast(x, 0)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return ctx.scale * gradient, None


class Stage(nn.Module):
    def __init__(self, model, rank, scale):
        super().__init__()
        self.layers, self.rank, self.scale = nn.Sequential(*(model[:2], model[2:])[rank]), rank, scale

    def forward(self, x):
        hidden = self.layers(x) if self.rank == 0 else x.new_zeros(len(x), 8, requires_grad=True)
        hidden = FromFirst.apply(hidden, self.scale)
        return self.layers(hidden) if self.rank == 1 else hidden[:, :3] * 0


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_a_pipeline_has_the_gradient_of_the_input_on_its_first_rank(scale):
    subject = subject_of(
        parallelize=lambda model, mesh: Stage(model, mesh.get_rank(), scale),
        shard_inputs=all_inputs,
        gather=lambda name, parts: parts[1] if name.startswith("output") else None,
    )
    subject.args[0].requires_grad_()
    unit = unit_of(subject)
    assert wrong(unit) == (set() if scale == 1 else {"input:input", "param:0.weight", "param:0.bias"})
    assert unit.verdict == ("pass" if scale == 1 else "fail")


class SecondAxis(nn.Module):
    """Its batch is the second axis, and the first has a fixed size."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x.T)


def test_shares_on_which_one_process_raises_too_are_no_error_of_the_ranks():
    unit = unit_of(subject_of(SecondAxis()), "ddp:2")
    assert (unit.verdict, unit.findings) == ("inconclusive", ())
    assert unit.reason.startswith("one process raises on a share of the first axis of the inputs, too: RuntimeError")


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.drop, self.norm = small_net(), nn.Dropout(0.5), nn.Identity().eval()

    def forward(self, x):
        return self.drop(self.net(x))


@pytest.mark.parametrize("evaluating", [(), (1,), (0, 1)])
def test_a_rank_in_evaluation_mode_is_found_though_random_numbers_are_means(evaluating):
    def parallelize(model, mesh):
        if mesh.get_rank() in evaluating:
            model.eval()
        return DistributedDataParallel(model)

    unit = unit_of(subject_of(WithDropout(), parallelize=parallelize))
    errors = [each for each in unit.findings if each.severity == "error"]
    assert [each.code for each in errors] == ["GC626"] * bool(evaluating)
    assert all(f"rank {evaluating[0]} draws no random numbers" in each.message for each in errors)


def test_a_frozen_parameter_that_a_rank_trains_has_a_gradient_too_many():
    model = small_net()
    model[0].requires_grad_(False)
    right = unit_of(subject_of(model, parallelize=lambda model, mesh: DistributedDataParallel(model)))
    assert right.verdict == "pass"
    unit = unit_of(subject_of(model, parallelize=lambda model, mesh: DistributedDataParallel(model.requires_grad_())))
    assert (unit.verdict, wrong(unit)) == ("fail", {"param:0.weight", "param:0.bias"})
