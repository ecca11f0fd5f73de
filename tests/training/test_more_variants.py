"""Mixed precision, compiled steps, resuming, optimizers and checkpoints: a planted mistake each, and the clean twin."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import Function

from gradctl.commands.compare_steps import compare_steps
from gradctl.subject.subject import Subject


def compared(model, variant, steps=2, loss=None, **options):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    (unit,) = compare_steps(
        Subject(target="test", model=model, args=(x,), loss=loss), steps, variants=[variant], **options
    )
    return unit


class Scaled(Function):
    """The identity, whose backward multiplies by a factor in a narrow dtype."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1.0 if gradient.dtype == torch.float32 else ctx.factor), None


class Net(nn.Module):
    def __init__(self, factor=1.0, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)
        self.factor, self.scale = factor, scale

    def forward(self, x):
        return self.second(torch.tanh(Scaled.apply(self.first(x) * self.scale, self.factor)))


@pytest.mark.parametrize(("variant", "factor"), [("amp:bf16", 3.0), ("amp:f16", 1.1)])
def test_a_backward_that_is_wrong_in_a_narrow_dtype_is_named(variant, factor):
    unit = compared(Net(factor), variant)
    assert (unit.verdict, unit.training.first_difference) == ("fail", 1)
    assert compared(Net(), variant).verdict == "pass"


def test_values_that_overflow_in_float16_are_named():
    unit = compared(nn.Sequential(Net(), Large()), "amp:f16")
    assert unit.verdict == "fail"
    assert "output is NaN or infinite in float16" in unit.reason


def test_a_loss_that_overflows_in_float16_makes_the_scaler_skip_the_step():
    unit = compared(nn.Sequential(Net(), Large()), "amp:f16", loss=lambda outputs: outputs.square().mean())
    assert unit.verdict == "fail"
    assert "GradScaler skips step 1 at each scale from 65536 down" in unit.reason


class Large(nn.Module):
    def forward(self, x):
        return x * 1e6


class OneDtype(nn.Linear):
    def forward(self, x):
        return super().forward(x) @ torch.eye(2, dtype=torch.float32, device=x.device).as_subclass(Strict)


class Strict(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("only float32")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_model_that_raises_under_autocast_is_the_reason():
    unit = compared(OneDtype(8, 2), "amp:bf16")
    assert (unit.verdict, unit.reason) == (
        "inconclusive",
        "the model raises under autocast: RuntimeError: only float32.",
    )


class WrongForeach(torch.optim.SGD):
    """Ignores the momentum if ``foreach`` is set."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["momentum"] = 0.0 if group["foreach"] else 0.9
        return super().step(closure)


class WrongFused(torch.optim.SGD):
    """Doubles the learning rate if ``fused`` is set."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.2 if group["fused"] else 0.1
        return super().step(closure)


@pytest.mark.parametrize(("variant", "optimizer"), [("foreach", WrongForeach), ("fused", WrongFused)])
def test_an_optimizer_that_is_wrong_in_one_implementation_is_named(variant, optimizer):
    unit = compared(Net(), variant, optimizer=lambda parameters: optimizer(parameters, lr=0.1, momentum=0.9))
    assert unit.verdict == "fail"
    assert unit.findings[0].tensor.startswith(("param:", "optimizer:"))


class Own(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=0.1)


@pytest.mark.parametrize("variant", ["foreach", "fused"])
def test_an_optimizer_without_the_option_is_the_reason(variant):
    unit = compared(Net(), variant, optimizer=Own)
    assert (unit.verdict, unit.reason) == ("inconclusive", f"the optimizer Own has no option {variant}.")


def test_one_step_cannot_be_resumed():
    assert compared(Net(), "resume", steps=1).reason == "one step cannot be interrupted; use --steps 2 or more."


def test_a_model_without_linear_layers_has_no_adapter():
    assert compared(nn.LayerNorm(8), "lora:4").reason == "the model has no linear layer."


def test_a_reentrant_checkpoint_behind_frozen_parameters_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert compared(model, "checkpoint-reentrant").verdict == "pass"
    unit = compared(nn.Sequential(nn.Linear(8, 8).requires_grad_(False), model), "checkpoint-reentrant")
    assert (unit.verdict, {finding.cause for finding in unit.findings}) == ("fail", {"GC438"})


class OtherIfCompiled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (1.01 if torch.compiler.is_compiling() else 1.0)


def test_a_model_that_is_another_if_it_is_compiled_is_named():
    unit = compared(OtherIfCompiled(8, 2), "compile")
    assert (unit.verdict, unit.training.first_difference, unit.findings[0].code) == ("fail", 1, "GC430")


class DecaysIfCompiled(torch.optim.SGD):
    """Decays weights only if it is compiled."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["weight_decay"] = 0.1 if torch.compiler.is_compiling() else 0.0
        return super().step(closure)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", DecaysIfCompiled])
def test_a_compiled_optimizer(optimizer):
    is_wrong = optimizer is DecaysIfCompiled
    unit = compared(Net(), "compile-step", optimizer=optimizer if isinstance(optimizer, str) else made)
    assert unit.verdict == ("fail" if is_wrong else "pass")


def made(parameters):
    return DecaysIfCompiled(parameters, lr=0.1)


@pytest.mark.slow
def test_a_compiled_model_with_dropout_agrees():
    assert compared(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)), "compile").verdict == "pass"
