"""Ranks against one process: right arrangements agree to rounding, and each mistake is named with its parameter."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn

from gradctl.commands.compare import compare_one
from gradctl.subject.subject import Subject
from tests.forms.ranks.models import (
    acting,
    all_inputs,
    averaging,
    die_on_rank_one,
    raise_on_rank_one,
    row_parallel,
    small_net,
    subject_of,
    wait_on_rank_zero,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")


def unit_of(subject: Subject, form: str):
    return compare_one(subject, form, named=True, allows=())


def codes(unit) -> set[str]:
    return {each.code for each in unit.findings}


def tensors_with(unit, verdict: str) -> set[str]:
    return {each.tensor for each in unit.tensors if each.verdict == verdict}


def sample(name: str) -> Subject:
    module = importlib.import_module(f"sample_models.{name}")
    beside = {key: value for key in ("parallelize", "tp_plan") if (value := getattr(module, key, None)) is not None}
    return Subject(name, module.make_model(), module.example_inputs(), beside=beside)


@pytest.mark.parametrize("form", ["ddp:2", "fsdp:2", "tp:4"])
def test_the_sample_transformer_agrees_with_one_process(form):
    unit = unit_of(sample("transformer"), form)
    assert (unit.verdict, unit.findings, unit.variations) == ("pass", (), ("example", "seed"))
    assert all(each.error < 1e-13 for each in unit.tensors)


def test_averaging_by_hand_agrees_and_a_forgotten_parameter_is_named():
    assert unit_of(subject_of(parallelize=averaging()), "ranks:2").findings == ()
    unit = unit_of(subject_of(parallelize=averaging("0.bias")), "ranks:2")
    assert unit.verdict == "fail"
    assert {(each.code, each.tensor) for each in unit.findings} == {
        ("GC402", "param:0.bias"),
        ("GC620", "param:0.bias"),
    }
    assert tensors_with(unit, "wrong") == {"param:0.bias"}


def test_gradients_that_are_summed_instead_of_averaged_are_world_size_too_large():
    def parallelize(model, mesh):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda each: torch.distributed.all_reduce(each.grad))
        return model

    subject = subject_of(parallelize=parallelize)
    unit = unit_of(subject, "ranks:3")
    errors = [each.error for each in unit.tensors if each.quantity == "gradient" and each.tensor.startswith("param")]
    assert errors == pytest.approx([2.0] * 4)  # three times as large
    summed = subject_of(parallelize=parallelize, loss_reduction="sum")
    assert unit_of(summed, "ranks:3").verdict == "pass"


def test_a_partial_sum_that_is_not_reduced_is_an_output_that_differs_between_ranks():
    right, wrong = (
        unit_of(subject_of(parallelize=row_parallel(reduces=each), shard_inputs=all_inputs), "ranks:2")
        for each in (True, False)
    )
    assert (right.verdict, wrong.verdict) == ("pass", "fail")
    assert ("GC301", "output") in {(each.code, each.tensor) for each in wrong.findings}


def test_a_mean_loss_is_that_of_the_whole_batch():
    def mean_loss(outputs):
        return outputs.square().mean()

    for form, batch in (("ddp:2", 4), ("fsdp:3", 7)):
        unit = unit_of(subject_of(batch=batch, loss=mean_loss), form)
        assert unit.verdict == "pass"
        assert codes(unit) == ({"GC624"} if batch == 7 else set())


def test_a_sum_as_loss_is_averaged_over_the_ranks_and_too_small():
    def sum_loss(outputs):
        return outputs.square().sum()

    unit = unit_of(subject_of(loss=sum_loss), "ddp:2")
    errors = [each.error for each in unit.tensors if each.tensor.startswith("param")]
    assert errors == pytest.approx([0.5] * 4)


@pytest.mark.parametrize(("form", "batch"), [("ddp:4", 4), ("fsdp:2", 3)])
def test_a_batch_of_one_and_an_uneven_batch_agree(form, batch):
    assert unit_of(subject_of(batch=batch), form).verdict == "pass"


class Branches(nn.Module):
    """The second layer is used by samples with a positive sum only, and a parameter is frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        y = self.first(x)
        return self.second(y) if x.sum() > 0 else y * 2


def test_parameters_that_are_unused_on_one_rank_or_frozen_agree_under_ddp():
    torch.manual_seed(0)
    x = torch.cat([torch.ones(2, 4), -3 * torch.ones(2, 4)])
    x += 0.1 * torch.randn(x.shape)

    class PerHalf(Branches):
        def forward(self, x):  # so that one process takes each half's branch
            return torch.cat([super(PerHalf, self).forward(each) for each in x.split(2)])

    unit = unit_of(Subject("branches", PerHalf(), (x,)), "ddp:2")
    assert (unit.verdict, unit.findings) == ("pass", ())


def test_batch_normalisation_of_each_share_is_named_and_everything_else_compared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    unit = unit_of(subject_of(model), "ddp:2")
    assert (unit.verdict, codes(unit)) == ("pass", {"GC623"})
    assert {each.tensor for each in unit.tensors if each.quantity == "buffer"} >= {"buffer:1.running_mean"}
    assert unit_of(subject_of(model.eval()), "ddp:2").findings == ()


def test_dropout_is_replaced_by_its_mean():
    model = nn.Sequential(small_net(), nn.Dropout(0.5))
    unit = unit_of(subject_of(model), "ddp:2")
    assert (unit.verdict, codes(unit)) == ("pass", {"GC625"})


def test_random_numbers_without_a_mean_are_refused():
    class Shuffles(nn.Linear):
        def forward(self, x):
            return super().forward(x)[torch.randperm(len(x))]

    unit = unit_of(subject_of(Shuffles(4, 3)), "ddp:2")
    assert unit.status == "unsupported"
    assert "random numbers that have no mean" in unit.reason


def test_mixed_precision_of_fsdp_is_compared_in_float64():
    def parallelize(model, mesh):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    unit = unit_of(subject_of(parallelize=parallelize), "ranks:2")
    assert unit.verdict == "pass"


# What is wrong with the input: form, batch, what is beside the target, and the reason.
REFUSED = {
    "more ranks than samples": ("ddp:8", {}, "the inputs have a batch of 4, and there are 8 ranks"),
    "no parallelize": ("ranks:2", {}, "ranks:N needs a function parallelize(model, mesh) -> model"),
    "parallelize raises": ("ranks:2", {"parallelize": lambda model, mesh: 1 / 0}, "rank 0 raises ZeroDivisionError"),
    "parallelize returns nothing": (
        "ranks:2",
        {"parallelize": lambda model, mesh: None},
        "parallelize returns nothing instead of the model",
    ),
    "a backend that is not there": (
        "ranks:2",
        {"parallelize": lambda model, mesh: torch.distributed.new_group(backend="nccl")},
        "Distributed package doesn't have NCCL",
    ),
    "no plan": ("tp:2", {}, "the target states no plan of tensor parallelism. Write tp_plan ="),
    "a plan that names no module": ("tp:2", {"tp_plan": {"3": "colwise"}}, "tp_plan names '3', and the model has no"),
    "an unknown style": ("tp:2", {"tp_plan": {"2": "diagonal"}}, "tp_plan has the style 'diagonal' for '2'"),
    "shares of another kind": (
        "ranks:2",
        {"parallelize": averaging(), "shard_inputs": lambda inputs, rank, world: inputs[0]},
        "shard_inputs fails for rank 0: shard_inputs returns 'Tensor'",
    ),
    "outputs that do not fit": (
        "ranks:2",
        {"parallelize": lambda model, mesh: lambda x: model(x)[:1]},
        "output has the shapes [1, 3], [1, 3] on the ranks, which do not make [4, 3]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_arranged_is_refused_in_one_sentence(case):
    form, beside, reason = REFUSED[case]
    unit = unit_of(subject_of(**beside), form)
    assert (unit.status, unit.verdict) == ("unsupported", "inconclusive")
    assert reason in unit.reason


@pytest.mark.parametrize(
    ("act", "code", "words"),
    [
        (raise_on_rank_one, "GC621", "rank 1 raises RuntimeError: no first layer here (models.py, line "),
        (die_on_rank_one, "GC621", "rank 1 died of signal 11 (SIGSEGV) (models.py, line "),
        (
            wait_on_rank_zero,
            "GC622",
            "the ranks wait for each other: rank 0 waits in all_reduce (collective 1, in forward) (models.py, line ",
        ),
    ],
)
def test_a_rank_that_does_not_answer_ends_the_unit_with_its_words(act, code, words):
    unit = unit_of(subject_of(parallelize=acting(act)), "ranks:2")
    (finding,) = unit.findings
    assert (unit.verdict, finding.code, finding.severity) == ("fail", code, "error")
    assert words in finding.message
    assert finding.location.file.endswith("models.py")


def test_the_loss_of_each_rank_is_computed_there():
    """A mean over tokens that are not padding is not the mean of the means of shares with other numbers of them."""

    def masked_mean(outputs, x):
        mask = (x[:, :1] > 0).to(outputs.dtype)
        return (outputs.square() * mask).sum() / mask.sum()

    subject = subject_of(batch=6, loss=masked_mean)
    subject.args[0][:, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])  # three tokens on rank 0, one on rank 1
    unit = unit_of(subject, "ddp:2")
    assert unit.verdict == "fail"
    assert "output" in {each.tensor for each in unit.findings}


def test_outputs_are_gathered_by_the_users_function():
    """Shares in another order: the last samples are on the first rank."""

    def shard_inputs(inputs, rank, world):
        return tuple(each.chunk(world)[world - 1 - rank] for each in inputs)

    def gathered(order):
        return lambda name, parts: torch.cat(parts[::order]) if name == "output" else None

    own = {"parallelize": averaging(), "shard_inputs": shard_inputs}
    assert unit_of(subject_of(**own, gather=gathered(-1)), "ranks:2").verdict == "pass"
    assert unit_of(subject_of(**own, gather=gathered(1)), "ranks:2").verdict == "fail"


def test_a_target_that_is_a_function_is_refused_by_wrappers():
    unit = unit_of(Subject("f", torch.sin, (torch.randn(4),)), "ddp:2")
    assert unit.status == "unsupported"
    assert "ddp wraps an nn.Module" in unit.reason


class Centred(nn.Linear):
    """Subtracts the mean over the batch: the samples of a batch affect each other."""

    def forward(self, x):
        return super().forward(x - x.mean(0)).tanh()


def test_a_model_whose_samples_affect_each_other_is_compared_share_by_share():
    unit = unit_of(subject_of(Centred(4, 3)), "ddp:2")
    assert (unit.verdict, codes(unit)) == ("pass", {"GC623"})
    wrong = unit_of(subject_of(Centred(4, 3), parallelize=averaging("bias")), "ranks:2")
    assert {each.tensor for each in wrong.findings if each.severity == "error"} == {"param:bias"}


def test_a_mean_over_the_whole_batch_agrees_with_the_whole_batch():
    def parallelize(model, mesh):
        def forward(x):
            mean = MeanOverRanks.apply(x.mean(0))
            return nn.functional.linear(x - mean, model.weight, model.bias).tanh()

        model.forward = forward
        return averaging()(model, mesh)

    unit = unit_of(subject_of(Centred(4, 3), parallelize=parallelize), "ranks:2")
    assert (unit.verdict, unit.findings) == ("pass", ())


class MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total / torch.distributed.get_world_size()

    backward = forward


def test_the_python_api_compares_ranks_and_lists_them_once_if_a_form_is_unknown():
    import gradctl

    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    assert gradctl.compare(model, torch.randn(4, 4), forms=["ddp:2"]).verdict == "pass"
    with pytest.raises(gradctl.GradctlError, match="ddp:N, fsdp:N, tp:N, ranks:N"):
        gradctl.compare(model, torch.randn(4, 4), forms=["ddp:9"])
