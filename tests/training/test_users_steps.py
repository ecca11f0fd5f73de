"""Steps that users write: published mistakes are named at their first step, and right ones agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradctl.commands.compare_steps import compare_steps
from gradctl.subject.subject import Subject

LABELS = torch.tensor([1, 0, 2, 1, 0, 2, -100, -100])
HALVES = (slice(0, 4), slice(4, 8))


def loss(outputs):
    return cross_entropy(outputs, LABELS)


def compared(step, *, steps=2, model=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    (unit,) = compare_steps(
        Subject(target="test", model=model, args=(x,), loss=loss), steps, variants=[step], **options
    )
    return unit


def by_tokens(model, optimizer, x):
    optimizer.zero_grad()
    total = 0.0
    for half in HALVES:
        part = cross_entropy(model(x[half]), LABELS[half], reduction="sum") / (LABELS != -100).sum()
        part.backward()
        total += part.detach()
    optimizer.step()
    return total


def plain(model, optimizer, x):
    optimizer.zero_grad(set_to_none=False)
    value = loss(model(x))
    value.backward()
    optimizer.step()
    return value


@pytest.mark.parametrize("step", [by_tokens, plain])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_right_step_agrees(step, optimizer):
    unit = compared(step, optimizer=optimizer, steps=3)
    assert (unit.verdict, unit.findings, unit.training.first_difference) == ("pass", (), None)


def mean_of_means(model, optimizer, x):
    optimizer.zero_grad()
    for half in HALVES:
        (cross_entropy(model(x[half]), LABELS[half]) / 2).backward()
    optimizer.step()


def zero_grad_inside(model, optimizer, x):
    for half in HALVES:
        optimizer.zero_grad()
        (cross_entropy(model(x[half]), LABELS[half], reduction="sum") / (LABELS != -100).sum()).backward()
    optimizer.step()


def not_divided(model, optimizer, x):
    optimizer.zero_grad()
    for half in HALVES:
        cross_entropy(model(x[half]), LABELS[half]).backward()
    optimizer.step()


def clipped_for_each(model, optimizer, x):
    optimizer.zero_grad()
    for half in HALVES:
        (cross_entropy(model(x[half]), LABELS[half], reduction="sum") / (LABELS != -100).sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


def never_zeroed(model, optimizer, x):
    loss(model(x)).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("step", "first"),
    [(mean_of_means, 1), (zero_grad_inside, 1), (not_divided, 1), (clipped_for_each, 1), (never_zeroed, 2)],
)
def test_a_wrong_gradient_is_named_at_its_first_step(step, first):
    unit = compared(step)
    assert unit.training.first_difference == first
    (finding,) = unit.findings
    assert (finding.code, finding.quantity) == ("GC430", "gradient")
    assert (
        f"{step.__name__}: the gradient of {finding.tensor} differs from the plain step's at step {first}"
        in finding.message
    )


def step_for_each(model, optimizer, x):
    for half in HALVES:
        optimizer.zero_grad()
        (cross_entropy(model(x[half]), LABELS[half], reduction="sum") / (LABELS != -100).sum()).backward()
        optimizer.step()


def test_a_step_of_the_optimizer_for_each_micro_batch_is_counted():
    unit = compared(step_for_each)
    assert [each.code for each in unit.findings] == ["GC433", "GC430"]
    assert (
        unit.findings[0].message == "step_for_each calls optimizer.step() 2 times in step 1, and the plain step 1 time."
    )


def raising(model, optimizer, x):
    optimizer.step()
    return x.view(3, -1)


def test_a_step_that_raises_is_named():
    (finding,) = compared(raising).findings
    assert finding.code == "GC432"
    assert finding.message.startswith("raising raises at step 1, where the plain step runs: RuntimeError: shape")
