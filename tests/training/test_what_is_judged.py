"""A pass means that all was compared: frozen parameters, each step, dropout; a right mixed precision step passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradctl.commands.compare_steps import compare_steps
from gradctl.core.errors import TargetError
from gradctl.subject.subject import Subject


def square(outputs):
    return outputs.float().square().mean()


def net(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), *middle, nn.Tanh(), nn.Linear(16, 3))


def compared(step, model=None, steps=2, x=None, **options):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)) if x is None else x
    subject = Subject(target="test", model=model or net(), args=(x,), loss=square)
    (unit,) = compare_steps(subject, steps, variants=[step], **options)
    return unit


def plain(model, optimizer, x):
    optimizer.zero_grad()
    loss = square(model(x))
    loss.backward()
    optimizer.step()
    return loss


def decays_all(model, optimizer, x):
    loss = plain(model, optimizer, x)
    with torch.no_grad():
        for each in model.parameters():
            if not each.requires_grad:
                each.mul_(0.999)
    return loss


def replaces(model, optimizer, x):
    loss = plain(model, optimizer, x)
    model[0].weight = nn.Parameter(model[0].weight.detach() * 0.9, requires_grad=model[0].weight.requires_grad)
    return loss


@pytest.mark.parametrize("step", [decays_all, replaces])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_parameter_that_the_optimizer_does_not_know(step, is_frozen):
    model = net()
    model[0].weight.requires_grad_(not is_frozen)
    unit = compared(step, model, steps=1)
    if step is decays_all and not is_frozen:
        assert unit.verdict == "pass"
        return
    (finding,) = unit.findings
    assert (finding.code, finding.tensor) == ("GC430", "param:0.weight")


def test_dropout_that_a_step_turns_off_is_an_error():
    def evaluates(model, optimizer, x):
        model.eval()
        return plain(model, optimizer, x)

    unit = compared(evaluates, net(nn.Dropout(0.5)))
    (finding,) = unit.findings
    assert (unit.verdict, finding.code, finding.severity) == ("fail", "GC431", "error")
    assert "Dropout is off in this step" in finding.message
    assert compared(plain, net(nn.Dropout(0.5))).verdict == "pass"


def test_a_loss_that_is_not_returned_has_no_row():
    def silent(model, optimizer, x):
        plain(model, optimizer, x)

    unit = compared(silent)
    assert (unit.verdict, unit.reason) == ("pass", "the step returns no loss, which is not compared")
    assert "output" not in {each.quantity for each in unit.tensors}


class LastsTwoSteps(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 if int(self.calls) < 3 else float("nan"))


def test_fewer_steps_than_asked_for_are_no_pass():
    unit = compared(plain, LastsTwoSteps(), steps=5)
    said = "the loss of step 3 is not finite, so that 2 of 5 steps were compared"
    assert (unit.verdict, unit.reason) == ("inconclusive", said)


class Logarithm(nn.Linear):
    def forward(self, x):
        return super().forward(x.log())


def test_fresh_batches_without_a_finite_loss_excuse_nothing():
    def wrong_in_float32(model, optimizer, x):
        optimizer.zero_grad()
        loss = square(model(x))
        loss.backward()
        if model.weight.dtype == torch.float32:
            model.weight.grad *= 1.01
        optimizer.step()
        return loss

    positive = torch.rand(8, 4, generator=torch.Generator().manual_seed(1)) + 0.1
    assert compared(wrong_in_float32, Logarithm(4, 3), x=positive).verdict == "fail"
    assert compared(plain, Logarithm(4, 3), x=positive).verdict == "pass"


def mixed(factor=1.0):
    def autocasts(model, optimizer, x):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(x)
        loss = square(outputs)
        (loss * factor).backward()
        optimizer.step()
        return loss

    return autocasts


def scaled(*, clips_first):
    def scales(model, optimizer, x):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            outputs = model(x)
        loss = square(outputs)
        scaler.scale(loss).backward()
        if not clips_first:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        scaler.step(optimizer)
        scaler.update()
        return loss

    return scales


def test_a_mixed_precision_step_is_compared_within_its_rounding():
    unit = compared(mixed())
    said = "the step runs the model under autocast, and is compared within the rounding of bfloat16"
    assert (unit.verdict, unit.reason, unit.findings) == ("pass", said, ())
    assert compared(mixed(1.01)).verdict == "fail"
    right = compared(scaled(clips_first=False))
    assert (right.verdict, right.findings) == ("pass", ())
    assert right.reason.endswith("within the rounding of float16")
    assert compared(scaled(clips_first=True)).verdict == "fail"


class Indexed(nn.Linear):
    """Writes what autocast has rounded into a tensor in float32."""

    def forward(self, x):
        rows = x.new_zeros(8, 3)
        rows[torch.arange(8)] = super().forward(x)
        return rows


def test_a_nan_of_the_model_is_no_loss_of_zero():
    subject = Subject(target="test", model=LastsTwoSteps(), args=(torch.ones(2, 4),))
    (unit,) = compare_steps(subject, 4, variants=["foreach"])
    assert (unit.verdict, unit.training.steps) == ("inconclusive", 2)


class Product(torch.autograd.Function):
    """Raises in the backward: what it saved is in float32, and the gradient is not."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient


class Multiplies(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x):
        return Product.apply(x, self.weight)


@pytest.mark.parametrize("model", [Indexed(4, 3), Multiplies()])
def test_amp_does_not_apply_to_a_model_that_raises_under_autocast(model):
    unit = compared("amp:bf16", model)
    assert (unit.verdict, unit.status, unit.findings) == ("inconclusive", "unsupported", ())
    assert unit.reason.startswith("the model raises under autocast: ")
    assert compared("amp:bf16", model, is_named=False).verdict == "skipped"


def test_a_scheduler_of_the_loss():
    def plateau(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)

    assert compared(plain, optimizer=plateau, steps=3).verdict == "pass"
    with pytest.raises(TargetError, match="raises in step.*It takes the loss, which the step must return"):
        compared(lambda model, optimizer, x: None, optimizer=plateau)


def test_a_step_that_exits_is_a_finding():
    def exits(model, optimizer, x):
        raise SystemExit(3)

    (finding,) = compared(exits).findings
    assert (finding.code, "SystemExit: 3" in finding.message) == ("GC432", True)
