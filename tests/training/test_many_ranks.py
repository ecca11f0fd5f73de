"""Steps on many ranks are those of one process, and mistakes of such steps are named at their first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradctl.commands.compare_steps import compare_steps
from gradctl.core.errors import TargetError
from gradctl.subject.subject import OF_RANKS, Subject
from tests.ranks import not_divided, tied_stages
from tests.ranks.layers import Classifier, samples
from tests.ranks.steps import last_no_sync, local_norm


def compared(variant, target=None, wrong=False, model=None, inputs=None):
    torch.manual_seed(0)
    beside = {name: getattr(target, name) for name in OF_RANKS if hasattr(target, name)}
    subject = Subject(
        target="model",
        model=model or (target.make_model(wrong) if target else Classifier(wrong)),
        args=inputs or (target.example_inputs() if target else samples()),
        beside=beside,
    )
    (unit,) = compare_steps(subject, 2, variants=[variant])
    return unit


def test_a_step_with_fsdp_is_that_of_one_process():
    unit = compared("fsdp:2", local_norm)
    assert (unit.verdict, unit.findings) == ("pass", ())
    assert {row.tensor for row in unit.tensors} >= {"param:fc1.weight", "optimizer:exp_avg.fc1.weight"}


def test_a_norm_of_local_shards_is_the_cause_of_wrong_clipping():
    unit = compared("fsdp:2", local_norm, wrong=True)
    assert (unit.verdict, unit.training.first_difference) == ("fail", 1)
    assert {finding.cause for finding in unit.findings} == {"GC440"}


def test_a_number_of_ranks_that_is_none_is_said():
    with pytest.raises(TargetError, match=r"ddp takes the number of ranks, 2 to 8 \(ddp:2\), not '1'"):
        compared("ddp:1")


def test_more_ranks_than_samples_are_refused():
    unit = compared("ddp:2", inputs=tuple(each[:1] for each in samples()))
    assert (unit.verdict, unit.status) == ("inconclusive", "unsupported")
    assert "a batch of 1, and there are 2 ranks" in unit.reason


def test_statistics_of_a_share_are_refused():
    class Normalised(nn.Sequential):
        def forward(self, x, labels):
            return nn.functional.cross_entropy(super().forward(x), labels)

    unit = compared("ddp:2", model=Normalised(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    assert unit.reason.startswith("1 computes statistics over the batch")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "target"),
    [
        ("ddp:2", None),
        ("ddp:3", None),
        ("fsdp:3", None),
        ("ddp:2", last_no_sync),
        ("ranks:2", not_divided),
        ("ranks:2", tied_stages),
    ],
)
def test_a_right_step_on_many_ranks_is_silent(variant, target):
    unit = compared(variant, target)
    assert (unit.verdict, unit.findings) == ("pass", ())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "target", "words"),
    [
        ("ddp:2", last_no_sync, "rank 1 has another param:fc1.weight than rank 0"),
        ("ranks:2", not_divided, "differs from the plain step's at step 1"),
        ("ranks:2", tied_stages, "rank 1 has another param:embed.weight than rank 0"),
    ],
)
def test_a_wrong_step_is_named_at_its_first_step(variant, target, words):
    unit = compared(variant, target, wrong=True)
    assert (unit.verdict, unit.training.first_difference) in (("fail", 1), ("fail", None))
    assert any(words in finding.message for finding in unit.findings)


def test_outputs_without_a_loss_have_the_weights_of_the_whole_batch():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    unit = compared("ddp:2", model=model, inputs=(torch.randn(5, 6),))
    assert (unit.verdict, unit.findings) == ("pass", ())
