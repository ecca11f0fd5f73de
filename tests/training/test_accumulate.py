"""``accumulate:K``: which losses, random numbers and axes it takes, and the reason if it cannot apply."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradctl.commands.compare_steps import compare_steps
from gradctl.core.errors import TargetError
from gradctl.subject.subject import Subject


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def compared(model, *args, variant="accumulate:2", loss=None, steps=2):
    subject = Subject(target="test", model=model, args=args, loss=loss)
    (unit,) = compare_steps(subject, steps, variants=[variant])
    return unit


def mean_square(outputs):
    return outputs.square().mean()


def sum_of_squares(outputs):
    return outputs.square().sum()


@pytest.mark.parametrize("loss", [None, mean_square, sum_of_squares])
@pytest.mark.parametrize("variant", ["accumulate:2", "accumulate:5"])
def test_a_mean_and_a_sum_over_five_samples_agree(loss, variant):
    assert compared(nn.Linear(4, 2), rows(5, 4), loss=loss, variant=variant).verdict == "pass"


def test_dropout_of_micro_batches_has_the_masks_of_the_batch():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.4, batch_first=True)
    assert compared(layer, rows(4, 3, 4)).verdict == "pass"


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, ids, labels):
        logits = self.head(self.embed(ids))[:, :-1]
        return {"loss": cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}


def test_labels_that_the_model_shifts_are_counted_as_shifted():
    ids = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :3] = -100  # two of them are counted
    (finding,) = compared(LanguageModel(), ids, labels).findings
    assert finding.cause == "GC435"
    assert "shifted by one" in finding.cause_message


def test_labels_of_equal_lengths_agree():
    ids = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(1))
    assert compared(LanguageModel(), ids, ids.clone()).verdict == "pass"


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_rows_that_affect_each_other_are_the_reason_with_the_module():
    unit = compared(nn.Sequential(nn.Linear(4, 4), Centred()), rows(4, 4))
    assert (unit.verdict, unit.status) == ("inconclusive", "unsupported")
    assert unit.reason == "the rows of axis 0 affect each other, in 1 (Centred): output changes if they are split."


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 3)

    def forward(self, x):
        return self.gru(x)[0]


def test_time_steps_along_axis_0_are_no_batch():
    reason = compared(Recurrent(), rows(6, 2, 4)).reason
    assert reason == "the rows of axis 0 affect each other, in gru (GRU): output changes if they are split."


class Total(nn.Linear):
    def forward(self, x):
        return super().forward(x), x.sum()


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.Linear(4, 2), (1, 4), "the batch has 1 samples (axis 0 of the first input), fewer than 2."),
        (Total(4, 2), (3, 4), "output.1 has the shape [], not a row for each of 3 samples."),
        (nn.Unflatten(0, (2, 2)), (4, 4), "no parameter"),
    ],
)
def test_a_batch_that_cannot_be_split_is_the_reason(model, shape, reason):
    if reason == "no parameter":
        model, reason = nn.Sequential(nn.Linear(4, 4), model), "the model raises on 2 samples: RuntimeError"
    unit = compared(model, rows(*shape))
    assert unit.verdict == "inconclusive"
    assert unit.reason.startswith(reason)


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("accumulate:one", "accumulate takes the number of micro-batches, at least 2"),
        ("lora:0", "lora takes the rank, at least 1"),
        ("amp:f8", "amp takes the dtype bf16 or f16"),
    ],
)
def test_an_argument_that_is_none_is_one_sentence(variant, said):
    with pytest.raises(TargetError, match=f"GC145 {said}"):
        compared(nn.Linear(4, 2), rows(4, 4), variant=variant)
