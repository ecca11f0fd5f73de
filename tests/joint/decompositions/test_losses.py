"""Losses and their gradients, against torch's own kernels and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.joint.decompositions.losses import TABLE
from gradctl.subject.subject import Subject
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing

REDUCTIONS = ("none", "mean", "sum")


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_soft_margin_keeps_its_digits_on_both_sides(reduction, scale):
    signs = rows(5, 4).sign()
    used = {"soft_margin_loss", "soft_margin_loss_backward"}
    assert_as_torch(TABLE, used, lambda x: F.soft_margin_loss(x, signs, reduction=reduction), rows(5, 4) * scale)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("margin", [1.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_a_multi_margin_has_the_gradient_of_torch(reduction, p, margin, weighted, batched):
    weight, target = rows(4).abs() if weighted else None, torch.tensor([3, 0, 0, 2, 1])
    x = rows(5, 4) if batched else rows(4)
    target = target if batched else target[0]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.multi_margin_loss(x, target, p, margin, weight, reduction=reduction)

    assert_as_torch(TABLE, {"multi_margin_loss_backward"}, loss, x)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batched", [False, True])
def test_labels_of_a_multilabel_margin_end_at_the_first_minus_one(reduction, batched):
    labels = torch.tensor([[0, 3, -1, 1], [-1, 0, 1, 2], [3, 2, 1, 0], [1, -1, -1, -1], [2, 0, 1, -1]])
    x, target = (rows(5, 4), labels) if batched else (rows(4), labels[0])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.multilabel_margin_loss(x, target, reduction=reduction)

    assert_as_torch(TABLE, {"multilabel_margin_loss_forward", "multilabel_margin_loss_backward"}, loss, x)


def test_labels_that_end_early_are_so_in_onnxruntime():
    labels = torch.tensor([[0, 3, -1, 1], [-1, 0, 1, 2], [1, -1, -1, -1]])
    assert differing(F.multilabel_margin_loss, rows(3, 4).float(), labels) == []


def test_the_losses_are_right_in_onnxruntime():
    def losses(x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        signs = torch.where(target.unsqueeze(1) == 0, -20.0, 1.0)
        return F.soft_margin_loss(x, signs), F.multi_margin_loss(x, target), F.multilabel_margin_loss(x, x.argsort())

    subject = Subject(target="losses", model=losses, args=(rows(5, 4).float(), torch.tensor([3, 0, 0, 2, 1])))
    unit = Comparing(subject, Allows(())).form("onnx-joint", named=True)
    assert (unit.verdict, unit.reason) == ("pass", None), unit.findings
