"""Losses and their gradients, against torch's own kernels, autograd and the sum over all paths."""

from __future__ import annotations

import itertools
import math

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensorMode

from gradctl.forms.onnx.joint import export_graph
from gradctl.joint.decompositions import TABLE
from gradctl.joint.decompositions.losses import fake_ctc_loss
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from tests.joint.decompositions.substituted import assert_as_torch, assert_right_in_onnxruntime, values
from tests.joint.joined import by_autograd, by_onnxruntime, differing

REDUCTIONS = ("none", "mean", "sum")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_soft_margin_keeps_its_digits_on_both_sides(reduction, scale):
    signs = values(5, 4).sign()
    used = {"soft_margin_loss", "soft_margin_loss_backward"}
    assert_as_torch(used, lambda x: F.soft_margin_loss(x, signs, reduction=reduction), values(5, 4) * scale)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("margin", [1.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_a_multi_margin_has_the_gradient_of_torch(reduction, p, margin, weighted, batched):
    weight, target = values(4).abs() if weighted else None, torch.tensor([3, 0, 0, 2, 1])
    x = values(5, 4) if batched else values(4)
    target = target if batched else target[0]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.multi_margin_loss(x, target, p, margin, weight, reduction=reduction)

    assert_as_torch({"multi_margin_loss_backward"}, loss, x)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batched", [False, True])
def test_labels_of_a_multilabel_margin_end_at_the_first_minus_one(reduction, batched):
    labels = torch.tensor([[0, 3, -1, 1], [-1, 0, 1, 2], [3, 2, 1, 0], [1, -1, -1, -1], [2, 0, 1, -1]])
    x, target = (values(5, 4), labels) if batched else (values(4), labels[0])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.multilabel_margin_loss(x, target, reduction=reduction)

    assert_as_torch({"multilabel_margin_loss_forward", "multilabel_margin_loss_backward"}, loss, x)


def test_labels_that_end_early_are_so_in_onnxruntime():
    labels = torch.tensor([[0, 3, -1, 1], [-1, 0, 1, 2], [1, -1, -1, -1]])
    assert differing(F.multilabel_margin_loss, values(3, 4).float(), labels) == []


def test_the_losses_are_right_in_onnxruntime():
    def losses(x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        signs = torch.where(target.unsqueeze(1) == 0, -20.0, 1.0)
        return F.soft_margin_loss(x, signs), F.multi_margin_loss(x, target), F.multilabel_margin_loss(x, x.argsort())

    assert_right_in_onnxruntime(losses, values(5, 4).float(), torch.tensor([3, 0, 0, 2, 1]))


TIME, BATCH, CLASSES, LENGTH = 7, 6, 5, 3


FRAMES, LENGTHS = [7, 5, 6, 7, 4, 3], [3, 2, 0, 1, 3, 1]


OPERATORS = ("_ctc_loss", "_ctc_loss_backward")


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(blank: int = 0) -> torch.Tensor:
    """Labels that repeat, none of them the blank; what is after the end of a target is no class."""
    drawn = torch.randint(1, CLASSES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    drawn[0] = torch.tensor([2, 2, 2])
    drawn = torch.where(drawn == blank, (blank + 1) % CLASSES, drawn)
    drawn[4] = torch.tensor([1, 2, 1]) if blank not in (1, 2) else torch.tensor([4, 3, 4])
    return torch.where(torch.arange(LENGTH) < torch.tensor(LENGTHS).unsqueeze(1), drawn, -1)


def joined(targets: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[:length] for row, length in zip(targets, LENGTHS, strict=True)])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("in_one_row", [False, True])
@pytest.mark.parametrize("blank", [0, 2, 4])
def test_the_loss_and_its_gradient_are_those_of_torch(reduction, zero_infinity, as_tensors, in_one_row, blank):
    frames, lengths = (torch.tensor(FRAMES), torch.tensor(LENGTHS)) if as_tensors else (FRAMES, LENGTHS)
    targets = joined(labels(blank)) if in_one_row else labels(blank)

    def loss(x: torch.Tensor) -> torch.Tensor:
        options = {"blank": blank, "reduction": reduction, "zero_infinity": zero_infinity}
        return F.ctc_loss(x.log_softmax(-1), targets, frames, lengths, **options)

    assert_as_torch(set(OPERATORS), loss, scores(TIME, BATCH, CLASSES))


def test_one_sequence_needs_no_batch():
    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(x.log_softmax(-1), torch.tensor([1, 1, 2]), torch.tensor(7), torch.tensor(3))

    assert_as_torch(set(OPERATORS), loss, scores(TIME, CLASSES))


def test_the_loss_is_the_sum_over_all_paths():
    x, target = scores(4, 1, 3).log_softmax(-1), [1, 1]
    total = torch.zeros(())
    for path in itertools.product(range(3), repeat=4):
        if [label for label, _ in itertools.groupby(path) if label] == target:
            total = total + math.exp(sum(float(x[time, 0, label]) for time, label in enumerate(path)))
    given = TABLE[torch.ops.aten._ctc_loss.default](x, torch.tensor([target]), [4], [2])[0]
    torch.testing.assert_close(given, -total.log().double().reshape(1))


# Each a change of log-probabilities, frames or lengths that eager gives infinities or NaN for, or takes with care.
def nothing(x, frames, lengths): ...


def too_few_frames(x, frames, lengths):
    frames[0], frames[4] = 4, 1


def no_frames(x, frames, lengths):
    frames[0] = frames[2] = 0


def an_impossible_class(x, frames, lengths):
    x[2, 1, 3], x[:, 3, 1:] = -math.inf, -math.inf


def a_class_that_is_all_but_impossible(x, frames, lengths):
    x[:4] = (x[:4] * 300).log_softmax(-1)


def nan_beyond_the_end(x, frames, lengths):
    x[6, 1] = x[5, 4] = math.nan


def nan_before_the_end(x, frames, lengths):
    x[3, 1, 2] = math.nan


@pytest.mark.parametrize(
    "change",
    [
        nothing,
        too_few_frames,
        no_frames,
        an_impossible_class,
        a_class_that_is_all_but_impossible,
        nan_beyond_the_end,
        nan_before_the_end,
    ],
)
@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinities_and_nan_are_where_torch_has_them(change, zero_infinity, dtype):
    aten = torch.ops.aten
    x, frames, lengths = scores(TIME, BATCH, CLASSES).to(dtype), torch.tensor(FRAMES), torch.tensor(LENGTHS)
    x = x.log_softmax(-1)
    change(x, frames, lengths)
    arguments = (x, labels().int(), frames, lengths, 0, zero_infinity)
    expected, found = aten._ctc_loss.Tensor(*arguments), TABLE[aten._ctc_loss.Tensor](*arguments)
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    cotangent, operator = scores(BATCH).to(dtype), aten._ctc_loss_backward.Tensor
    given, wanted = (
        each(cotangent, *arguments[:4], *inner, *arguments[4:])
        for each, inner in ((TABLE[operator], found), (operator, expected))
    )
    # Logarithms of some -1000 in float32, whose last digit is 1e-4.
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(given, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


class Head(nn.Module):
    """A linear layer and the loss."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.options = nn.Linear(6, CLASSES), options

    def forward(self, x, targets, frames, lengths):
        return F.ctc_loss(self.fc(x).log_softmax(-1), targets, frames, lengths, **self.options)


def batch(time: int = TIME, count: int = BATCH) -> tuple[torch.Tensor, ...]:
    frames, lengths = (torch.tensor(each)[:count] for each in (FRAMES, LENGTHS))
    return scores(time, count, 6).float(), labels()[:count], frames + time - TIME, lengths


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "zero_infinity": True}], ids=["default", "each"])
def test_a_head_is_right_in_onnxruntime(options):
    assert differing(Head(**options), *batch()) == []


def test_lengths_that_are_integers_and_targets_in_one_row_are_right_in_onnxruntime():
    targets = joined(labels())

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(x.log_softmax(-1), targets, FRAMES, LENGTHS)

    assert differing(loss, scores(TIME, BATCH, CLASSES).float()) == []


def test_the_number_of_frames_and_the_batch_may_be_free():
    model, inputs = Head(), batch()
    dynamic = {
        "x": {0: "time", 1: "batch"},
        "targets": {0: "batch"},
        "frames": {0: "batch"},
        "lengths": {0: "batch"},
    }
    instance = Instance(Subject(target="test", model=model, args=inputs, kwargs={}), keep_hooks=True)
    proto = ir.to_proto(export_graph(instance, dynamic=dynamic).artifact)
    onnx.checker.check_model(proto, full_check=True)
    assert len(proto.graph.node) < 200  # and not some for each frame
    for time, count in ((TIME, BATCH), (40, 2), (300, 5)):
        model.zero_grad()
        values, expected = by_autograd(model, *batch(time, count))
        found = by_onnxruntime(proto, values)
        for name, wanted in expected.items():
            # Logarithms of some -500 in float32.
            largest = float(wanted.detach().abs().max())
            torch.testing.assert_close(found[name], wanted.detach(), rtol=1e-3, atol=1e-4 * largest)


def test_torch_is_as_it_was_after_a_run_without_data():
    before = dict(op_implementations_dict)
    mode = FakeTensorMode()
    x, targets, frames, lengths = (mode.from_tensor(each) for each in batch())
    composite = torch.ops.aten.ctc_loss.IntList
    with fake_ctc_loss(), mode:
        assert torch.ops.aten._ctc_loss.Tensor(x, targets, frames, lengths)[0].shape == (BATCH,)
    assert dict(op_implementations_dict) == before
    assert not composite.py_kernels
    with mode, pytest.raises(RuntimeError):
        torch.ops.aten._ctc_loss.Tensor(x, targets, frames, lengths)
