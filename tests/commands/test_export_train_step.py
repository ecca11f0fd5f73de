"""A training step in an ONNX file makes the steps of torch.optim, in whatever loop calls it."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradctl.commands.export_train_step import export_train_step
from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.subject.loading.load import make_subject
from tests.sweeps import sampled
from tests.training.step_runner import StepRunner

STEPS = 20


class RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return RoundStraightThrough.apply(4 * self.fc(x))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        y = self.fc(x)
        return y * y.mean(1, keepdim=True).detach()


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(nn.functional.max_pool2d(self.conv(x).relu(), 2).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.fc = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(self.gru(x)[0][:, -1])


def normalised():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.2), nn.Linear(5, 4))


def mse_of_classes(y):
    return (y - (torch.arange(y.numel()) % 3).reshape(y.shape)).square().mean()


def cross_entropy_of_classes(y):
    return cross_entropy(y, torch.arange(len(y)) % y.shape[1])


# The losses that other exporters get wrong or refuse, by name: model, shape of the input, loss.
LOSSES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (5, 6), mse_of_classes),
    "straight through": (Quantised, (5, 6), mse_of_classes),
    "detach": (Detached, (5, 6), mse_of_classes),
    "batch norm": (normalised, (8, 6), mse_of_classes),
    "cross entropy": (lambda: nn.Linear(6, 4), (5, 6), cross_entropy_of_classes),
    "silu": (lambda: nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 4)), (5, 6), mse_of_classes),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), (2, 3, 8), mse_of_classes),
    "conv and max pool": (Convolved, (3, 2, 4, 4), cross_entropy_of_classes),
    "gru": (Recurrent, (3, 4, 6), cross_entropy_of_classes),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.0, 0.9), amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:], "lr": 3e-2, "weight_decay": 0.0}], lr=1e-2
    ),
}


def made(name):
    torch.manual_seed(0)
    model, shape, loss = LOSSES[name]
    return model(), torch.randn(shape, generator=torch.Generator().manual_seed(1)), loss


def exported(tmp_path, model, x, loss, **options):
    subject = make_subject(model, x, kwargs=None, loss=loss, seed=0)
    return export_train_step(subject, tmp_path / "step.onnx", **options)


# ------------------------------------------------------------------ the steps are those of torch.optim


@pytest.mark.parametrize(
    ("loss", "optimizer"),
    sampled(
        [(loss, optimizer) for loss in LOSSES for optimizer in OPTIMIZERS],
        always=[
            ("mlp", "amsgrad"), ("straight through", "sgd"), ("detach", "dampened"), ("batch norm", "adamw"),
            ("conv and max pool", "nesterov"), ("gru", "adam"),
        ],
    ),
)  # fmt: skip
def test_step_is_that_of_torch(tmp_path, loss, optimizer):
    written = exported(tmp_path, *made(loss), optimizer=OPTIMIZERS[optimizer])
    assert (written.unit.verdict, written.written, written.unit.training.steps) == ("pass", True, STEPS)


def test_loop_of_a_user_ends_where_torch_does(tmp_path):
    model, x, loss = made("conv and max pool")
    assert exported(tmp_path, model, x, loss, optimizer="adamw").written
    runner, optimizer = StepRunner(tmp_path / "step.onnx"), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        expected = loss(model(x))
        expected.backward()
        optimizer.step()
        found = runner.step()
        np.testing.assert_allclose(found["loss"], expected.detach(), rtol=1e-5)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(runner.values[name], parameter.detach(), rtol=1e-4, atol=1e-6)
    assert runner.values["step"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
@pytest.mark.parametrize("name", LOSSES)
def test_200_steps_end_where_torch_does(tmp_path, name, optimizer):
    """The tolerance is 8 epsilons of the norm, and 10 times the noise: of one ULP in the parameters, of float32."""
    model, x, loss = made(name)
    for each in model.modules():  # a file takes its masks from the caller
        for attribute in {"p", "dropout"} & set(vars(each)):
            setattr(each, attribute, 0.0)
    assert exported(tmp_path, model, x, loss, optimizer=OPTIMIZERS[optimizer]).written
    runner = StepRunner(tmp_path / "step.onnx")
    for _ in range(200):
        runner.step()
    expected, *moved = (trained(model, x, loss, OPTIMIZERS[optimizer], seed) for seed in (None, 1, 2))
    moved.append(trained(copy.deepcopy(model).double(), x.double(), loss, OPTIMIZERS[optimizer], None))
    for key, value in expected.items():
        noise = max((other[key] - value).norm() for other in moved)
        error = (torch.from_numpy(runner.values[key]) - value).norm()
        assert error <= 8 * torch.finfo(torch.float32).eps * value.norm() + 10 * noise, key


def trained(model, x, loss, factory, seed):
    """Return the parameters after 200 steps of torch.optim; with a seed, all are moved by one ULP before."""
    model = copy.deepcopy(model)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each in model.parameters():
                sign = torch.randint(2, each.shape, generator=generator) * 2 - 1
                each.copy_(torch.nextafter(each, each + sign))
    optimizer = factory(list(model.parameters()))
    for _ in range(200):
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
    return {name: each.detach() for name, each in model.named_parameters()}


def test_state_of_batch_norm_and_masks_of_dropout_are_ports(tmp_path):
    model, x, loss = made("batch norm")
    exported(tmp_path, model, x, loss)
    file = onnx.load(tmp_path / "step.onnx")
    assert {"1.running_mean", "random.3", "learning_rate", "step", "input.input"} <= {i.name for i in file.graph.input}
    described = json.loads(next(each.value for each in file.metadata_props if each.key == "train_step"))
    assert described["random"] == {"random.3": {"distribution": "bernoulli", "p": 0.8}}
    assert described["batch"] == ["input.input"]
    assert described["feeds"]["next.1.running_mean"] == "1.running_mean"


def test_gradients_are_clipped_together_and_may_be_outputs(tmp_path):
    model, x, loss = made("mlp")
    assert exported(tmp_path, model, x, loss, clip_norm=1e-3, keeps_gradients=True).written
    found = StepRunner(tmp_path / "step.onnx").step()
    gradients = [value for name, value in found.items() if name.startswith("grad.")]
    assert len(gradients) == 4
    assert math.sqrt(sum(float((each**2).sum()) for each in gradients)) == pytest.approx(1e-3, rel=1e-3)


def test_learning_rate_is_an_input(tmp_path):
    model, x, loss = made("mlp")
    exported(tmp_path, model, x, loss, optimizer="sgd")
    runner = StepRunner(tmp_path / "step.onnx")
    before = runner.values["0.weight"]
    np.testing.assert_array_equal(runner.step(learning_rate=np.array(0, np.float32))["next.0.weight"], before)


# ------------------------------------------------------------------ what is trained


def test_frozen_unused_and_unselected_parameters_are_constants(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.adapter, self.unused = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(2, 2)
            self.base.bias.requires_grad_(False)

        def forward(self, x):
            return self.base(x) + self.adapter(x)

    torch.manual_seed(0)
    assert exported(tmp_path, Model(), torch.randn(5, 6), mse_of_classes, wrt=["param:adapter.*"]).written
    values = safetensors.numpy.load_file(tmp_path / "step.safetensors")
    trained = {"adapter.weight", "adapter.bias"}
    assert {name for name in values if name.endswith(("weight", "bias")) and "exp" not in name} == trained


def test_tied_parameter_is_trained_once(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert exported(tmp_path, model, torch.randn(3, 4), mse_of_classes).written
    values = safetensors.numpy.load_file(tmp_path / "step.safetensors")
    assert "0.weight" in values
    assert "2.weight" not in values


# ------------------------------------------------------------------ what cannot be written


def test_step_that_differs_leaves_no_file(tmp_path, monkeypatch):
    from gradctl.joint import optimizer_update

    monkeypatch.setattr(optimizer_update, "_power", lambda base, exponent: base * exponent)  # the same in step 1
    written = exported(tmp_path, *made("mlp"))
    assert (written.unit.verdict, written.written, list(tmp_path.iterdir())) == ("fail", False, [])
    assert written.unit.findings[0].tensor.startswith("param:")
    assert written.unit.training.first_difference == 2


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (torch.optim.RMSprop, "the optimizer RMSprop has no graph: use SGD, Adam or AdamW."),
        (lambda p: type("Mine", (torch.optim.SGD,), {})(p, lr=0.1), "the optimizer Mine has no graph"),
    ],
)
def test_optimizer_without_a_graph_is_named(tmp_path, optimizer, said):
    written = exported(tmp_path, *made("mlp"), optimizer=optimizer)
    assert said in written.unit.reason
    assert (written.unit.status, written.written) == ("unsupported", False)


def test_model_without_a_loss_is_refused(tmp_path):
    with pytest.raises(TargetError, match=r"returns no scalar to minimise\. Add --loss NAME"):
        exported(tmp_path, nn.Linear(6, 4), torch.randn(5, 6), None)


def test_loss_that_is_no_scalar_is_refused(tmp_path):
    with pytest.raises(TargetError, match="not a"):
        exported(tmp_path, nn.Linear(6, 4), torch.randn(5, 6), lambda y: y.square())


def test_model_without_trained_parameters_is_refused(tmp_path):
    model = nn.Linear(6, 4).requires_grad_(False)
    with pytest.raises(NothingToCheck, match="no parameter that requires a gradient"):
        exported(tmp_path, model, torch.randn(5, 6).requires_grad_(), mse_of_classes)


def test_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(TargetError, match=r"--wrt param:bais matches no parameter .* the parameters are"):
        exported(tmp_path, nn.Linear(6, 4), torch.randn(5, 6), mse_of_classes, wrt=["param:bais"])
