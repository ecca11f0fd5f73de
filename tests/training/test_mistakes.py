"""Each published mistake is named at its first step, with its cause; its clean twin is silent."""

from __future__ import annotations

import pytest

from gradctl.commands.compare_steps import compare_steps
from gradctl.subject.subject import Subject
from tests.training.mistakes import accumulation, checkpointing, lora, resume

MISTAKES = [*accumulation.MISTAKES, *checkpointing.MISTAKES, *lora.MISTAKES, *resume.MISTAKES]
# Enough to resume after half of them.
STEPS = {"resume": 4}


def compared(mistake, wrong):
    args, kwargs = mistake.inputs()
    subject = Subject(target=mistake.name, model=mistake.model(wrong), args=args, kwargs=kwargs, loss=mistake.loss)
    variant = mistake.step(wrong) if mistake.step is not None else mistake.variant
    optimizer = mistake.optimizer(wrong) if mistake.optimizer is not None else "adamw"
    (unit,) = compare_steps(subject, STEPS.get(mistake.variant, 2), optimizer=optimizer, variants=[variant])
    return unit


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_named_at_its_first_step(mistake):
    unit = compared(mistake, wrong=True)
    assert (unit.verdict, unit.training.first_difference) == ("fail", mistake.first_step)
    assert {finding.cause for finding in unit.findings} == {mistake.cause}


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_its_clean_twin_is_silent(mistake):
    unit = compared(mistake, wrong=False)
    assert (unit.verdict, unit.findings) == ("pass", ())
