"""Models of all kinds: bfloat16, tied, frozen and unused parameters, tensors outside modules, cancelling gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradctl.commands.compare_steps import compare_steps
from gradctl.subject.subject import Subject

SCALE = torch.full((3,), 0.5, requires_grad=True)


def square(outputs):
    return outputs.float().square().mean()


def same(model, optimizer, *args):
    optimizer.zero_grad()
    loss = square(model(*args))
    loss.backward()
    optimizer.step()
    return loss


def larger_by(name, factor):
    """Return a step that scales the gradient of one parameter."""

    def scaled(model, optimizer, *args):
        optimizer.zero_grad()
        loss = square(model(*args))
        loss.backward()
        model.get_parameter(name).grad *= factor
        optimizer.step()
        return loss

    return scaled


def compared(model, *args, step=same, steps=3, **options):
    subject = Subject(target="test", model=model, args=args, loss=square)
    (unit,) = compare_steps(subject, steps, variants=[step], **options)
    return unit


def rows(unit, quantity):
    return {each.tensor: each for each in unit.tensors if each.quantity == quantity}


def x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Attention(nn.Module):
    """The bias of the keys cannot move the output: its gradient is zero by cancellation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return torch.softmax(self.query(x) @ self.key(x).mT, -1) @ self.value(x)


def test_bfloat16():
    model = Tied().bfloat16()
    unit = compared(model, x(6, 4).bfloat16())
    assert (unit.verdict, unit.findings) == ("pass", ())
    wrong = compared(model, x(6, 4).bfloat16(), step=larger_by("second.bias", 1.001))
    assert [each.tensor for each in wrong.findings] == ["param:second.bias"]
    assert wrong.findings[0].message.endswith("float64).")


def test_tied_frozen_and_unused_parameters():
    unit = compared(Tied(), x(6, 4))
    assert unit.verdict == "pass"
    gradients = rows(unit, "gradient")
    assert set(gradients) == {"param:first.weight", "param:second.bias", "param:unused.weight", "param:unused.bias"}
    assert "optimizer:exp_avg.first.weight" in rows(unit, "buffer")
    assert "optimizer:exp_avg.unused.weight" not in rows(unit, "buffer")


def test_weight_decay_of_a_parameter_that_the_plain_step_leaves_alone():
    def zeros(model, optimizer, *args):
        for each in model.parameters():
            each.grad = torch.zeros_like(each)
        return same_without_none(model, optimizer, *args)

    def same_without_none(model, optimizer, *args):
        loss = square(model(*args))
        loss.backward()
        optimizer.step()
        return loss

    (finding,) = compared(Tied(), x(6, 4), step=zeros).findings
    assert (finding.code, finding.tensor) == ("GC430", "param:unused.weight")
    assert "param:unused.weight after the step differs" in finding.message


def test_a_function_with_a_tensor_of_its_own():
    unit = compared(lambda x: x * SCALE, x(5, 3))
    assert unit.verdict == "pass"
    assert rows(unit, "gradient").keys() == {"param:SCALE"}
    assert torch.equal(SCALE, torch.full((3,), 0.5)) and SCALE.grad is None


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", lambda parameters: torch.optim.AdamW(parameters, eps=1e-30)])
def test_a_cancelling_gradient_is_no_difference_and_hides_none(optimizer):
    def in_halves(model, optimizer, x):
        optimizer.zero_grad()
        for half in x.chunk(2):
            (square(model(half)) / 2).backward()
        optimizer.step()

    def in_halves_and_scaled(model, optimizer, x):
        optimizer.zero_grad()
        for half in x.chunk(2):
            (square(model(half)) / 2).backward()
        model.query.bias.grad *= 1.0001
        optimizer.step()

    unit = compared(Attention(), x(4, 5, 8), step=in_halves, steps=4, optimizer=optimizer)
    assert (unit.verdict, unit.findings) == ("pass", ())
    assert rows(unit, "gradient")["param:key.bias"].verdict == "too-small"
    assert rows(unit, "gradient")["param:key.weight"].verdict == "same"
    (finding,) = compared(Attention(), x(4, 5, 8), step=in_halves_and_scaled, optimizer=optimizer).findings
    assert (finding.tensor, finding.quantity) == ("param:query.bias", "gradient")
    assert "at step 1: relative error 1.0e-04" in finding.message


def test_a_model_that_does_not_repeat_is_inconclusive():
    generator = torch.Generator()

    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(3, generator=OWN)

    OWN = generator
    unit = compared(Noisy(4, 3), x(5, 4))
    assert (unit.verdict, unit.reason) == (
        "inconclusive",
        "the model differs from itself when run twice from the same seed",
    )


def test_gradient_hooks_of_the_user_run():
    model = nn.Linear(4, 3)
    model.weight.register_hook(lambda gradient: gradient * 2)
    unit = compared(model, x(5, 4), step=same)
    assert unit.verdict == "pass"
    (row,) = [each for each in unit.tensors if (each.quantity, each.tensor) == ("gradient", "param:weight")]
    assert row.verdict == "same"
