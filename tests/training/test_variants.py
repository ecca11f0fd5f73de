"""The variants of the table agree with the plain step on right models, and are named with a planted mistake."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from gradctl.commands.compare_steps import compare_steps
from gradctl.core.names import VARIANTS
from gradctl.subject.subject import Subject
from gradctl.training.variants.table import TABLE

# Those that compile nothing; ``slow`` tests run the others.
EAGER = [
    "accumulate:2",
    "checkpoint",
    "checkpoint-reentrant",
    "amp:bf16",
    "amp:f16",
    "foreach",
    "fused",
    "lora:4",
    "resume",
]


def test_the_names_of_the_table_are_those_of_the_help():
    assert list(TABLE) == list(VARIANTS)


class Blocks(nn.Module):
    def __init__(self, block=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def compared(model, variant, steps=2, **options):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    (unit,) = compare_steps(Subject(target="test", model=model, args=(x,)), steps, variants=[variant], **options)
    return unit


@pytest.mark.parametrize("variant", EAGER)
def test_a_right_model_agrees(variant):
    unit = compared(Blocks(), variant)
    assert (unit.form, unit.verdict, unit.findings) == (variant, "pass", ())
    assert {each.quantity for each in unit.tensors} == {"output", "gradient", "buffer"}


class CountsItsCalls(nn.Linear):
    """Its gradient depends on how many times forward has run: activation checkpointing runs it twice."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.tanh(super().forward(x) * self.calls)


def test_a_block_that_changes_when_it_is_recomputed_is_named():
    unit = compared(Blocks(CountsItsCalls), "checkpoint")
    (finding,) = unit.findings
    assert (unit.verdict, unit.training.first_difference, finding.code) == ("fail", 1, "GC430")
    assert finding.tensor.startswith("param:blocks")


def test_a_variant_that_cannot_apply_is_inconclusive_if_it_is_named():
    unit = compared(nn.Linear(4, 2), "checkpoint")
    assert (unit.verdict, unit.status) == ("inconclusive", "unsupported")
    assert unit.reason == "no list of modules (ModuleList, Sequential) has two modules of one class."


class NormalisedInFloat32(nn.Module):
    """A model that normalises in float32, whatever its dtype is, as the RMSNorm of Llama does."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.fc1(x)
        wide = hidden.to(torch.float32)
        return self.fc2((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype))


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "pass"), (1.001, "fail")])
def test_compiled_model_that_casts_to_float32_inside_is_compared_within_its_rounding(monkeypatch, factor, verdict):
    def compiled(model, **options):
        """Return what a compiler may: the same, in another order of sums, with a wrong backward by a factor."""

        def call(x):
            hidden = model.fc1(x)
            wide = hidden.to(torch.float32)
            norm = torch.rsqrt(wide.square().flip(-1).cumsum(-1)[..., -1:] / 4 + 1e-6)
            out = model.fc2((wide * norm).to(hidden.dtype))
            return out * factor + (out * (1 - factor)).detach()

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr("gradctl.training.variants.compiled_forward.compiled_frames", itertools.count().__next__)
    torch.manual_seed(0)
    subject = Subject(target="net.py:model", model=NormalisedInFloat32(), args=(torch.randn(3, 4),))
    (unit,) = compare_steps(subject, 2, variants=["compile"])
    assert unit.verdict == verdict
