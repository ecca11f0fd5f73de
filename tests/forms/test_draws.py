"""Dropout in a training step: other masks are said first, and do not hide another difference."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradctl.commands.compare_steps import compare_steps
from gradctl.subject.subject import Subject


def mean_square(outputs):
    return outputs.square().mean()


def compared(step, steps=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    (unit,) = compare_steps(Subject(target="test", model=model, args=(x,), loss=mean_square), steps, variants=[step])
    return unit


def halves(model, optimizer, x):
    optimizer.zero_grad()
    total = 0.0
    for half in x.chunk(2):
        part = mean_square(model(half)) / 2
        part.backward()
        total += part.item()
    optimizer.step()
    return total


def halves_not_divided(model, optimizer, x):
    optimizer.zero_grad()
    for half in x.chunk(2):
        mean_square(model(half)).backward()
    optimizer.step()


def recomputed(model, optimizer, x, **options):
    optimizer.zero_grad()
    loss = mean_square(checkpoint(model, x, use_reentrant=False, **options))
    loss.backward()
    optimizer.step()
    return loss


def recomputed_with_other_masks(model, optimizer, x):
    return recomputed(model, optimizer, x, preserve_rng_state=False)


def test_micro_batches_with_other_masks_agree_without_them():
    unit = compared(halves)
    (finding,) = unit.findings
    assert (unit.verdict, finding.code, finding.severity) == ("pass", "GC431", "warning")
    assert "it makes 4 calls of aten.bernoulli_.float ([4, 16]), and the plain step makes 2 calls" in finding.message


def test_another_difference_is_named_after_the_masks():
    unit = compared(halves_not_divided)
    assert (unit.verdict, [each.code for each in unit.findings]) == ("fail", ["GC431", "GC430"])


def test_a_recomputation_with_the_same_masks_is_silent():
    assert (compared(recomputed).verdict, compared(recomputed).findings) == ("pass", ())


def test_a_recomputation_with_other_masks_fails():
    unit = compared(recomputed_with_other_masks)
    masks, difference = unit.findings
    assert (unit.verdict, masks.code, difference.code) == ("fail", "GC431", "GC430")
    assert "it makes 2 calls of aten.bernoulli_.float ([8, 16]) after those of the plain step" in masks.message
    assert difference.quantity == "gradient"
