"""Models that differentiate in their forward, in a file of the forward: outputs of onnxruntime alone against eager's.

``torch.export`` rejects them, so gradctl traces them with their inner backward. What it takes is exported by it.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from gradctl.commands.compare import compare_one
from gradctl.commands.export import export
from gradctl.subject.subject import Subject

TRACED = re.compile(r"^the model differentiates in its forward, which torch.(export|onnx) refuses: traced by gradctl")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))


class Forces(Net):
    def forward(self, x: Tensor) -> dict[str, Any]:
        x = x if x.requires_grad else x.clone().requires_grad_()
        energy = self.fc(x).sum()
        return {"energy": energy, "forces": -torch.autograd.grad(energy, x, create_graph=True)[0], "count": 3}


class FreedGraph(Net):
    """As at inference: the backward of the energy is not possible any more."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        energy = self.fc(x).sum()
        return energy, torch.autograd.grad(energy, x)[0]


class Guidance(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.fc(z).sum(), z)
        return x - 0.1 * slope


class Penalty(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = self.fc(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.mean() + (slope.norm(dim=-1) - 1).square().mean()


class HalfDetached(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_() if not x.requires_grad else x
        h = self.fc[0](x)
        y = self.fc[2](torch.tanh(h) * h.detach())
        return y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]


class FunctionalGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: self.fc(y).sum())(x)


class Jacobian(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(self.fc))(x)


class Tangents(Net):
    """Forward mode, which torch.export takes, and torch.onnx refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jvp(self.fc, (x,), (torch.ones_like(x),))[1]


class LinearTangents(Net):
    """Forward mode, which torch.export and torch.onnx take."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jvp(self.fc[0], (x,), (torch.ones_like(x),))[1]


class Normalised(nn.Module):
    """BatchNorm in training mode: the forward updates its buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.clone().requires_grad_()
        return torch.autograd.grad(self.fc(x).sum(), x, create_graph=True)[0]


class WithHook(Forces):
    """A hook of the whole module, which must have its effect once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, inputs, found: {**found, "energy": found["energy"] * 10})


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = (x + torch.randn_like(x)).detach().requires_grad_()
        return torch.autograd.grad(self.fc(x).sum(), x, create_graph=True)[0]


def points(rows: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


def subject_of(model: nn.Module) -> Subject:
    return Subject(target="net.py:model", model=model, args=(points(),))


def tensors(value: Any) -> list[Tensor]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
    return [each for each in values if isinstance(each, Tensor)]


SLOW = pytest.mark.slow
TRACED_MODELS = [
    Forces,
    FreedGraph,
    Guidance,
    pytest.param(Penalty, marks=SLOW),
    pytest.param(HalfDetached, marks=SLOW),
    pytest.param(FunctionalGradient, marks=SLOW),
    Jacobian,
    Tangents,
    WithHook,
]


@pytest.mark.parametrize("kind", TRACED_MODELS)
def test_onnxruntime_alone_computes_the_outputs_of_eager(kind, tmp_path):
    path = tmp_path / "net.onnx"
    exported = export(subject_of(kind()), path)
    assert (exported.written, exported.unit.verdict, exported.unit.form) == (True, "pass", "onnx")
    assert TRACED.search(exported.unit.reason)
    file = onnx.load(path)
    assert {node.domain for node in file.graph.node} <= {"", "ai.onnx"}
    assert [each.name for each in file.graph.input] == ["x"]
    x = points(seed=2)
    found = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    for one, other in zip(found, tensors(kind()(x)), strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.fast
def test_what_torch_export_takes_is_captured_by_it(tmp_path):
    exported = export(subject_of(LinearTangents()), tmp_path / "net.onnx")
    assert (exported.written, exported.unit.reason) == (True, None)


def test_a_free_batch(tmp_path):
    path = tmp_path / "net.onnx"
    exported = export(subject_of(Forces()), path, dynamic={"x": {0: "batch"}})
    assert (exported.written, exported.unit.verdict) == (True, "pass")
    for rows in (2, 9):
        x = points(rows)
        found = onnxruntime.InferenceSession(path).run(["output.forces"], {"x": x.numpy()})
        np.testing.assert_allclose(found[0], Forces()(x)["forces"].detach().numpy(), rtol=1e-4, atol=1e-6)


# What the program detaches stays a constant, and what autograd detaches inside does not: gradients agree with eager's.
@pytest.mark.parametrize("kind", [Forces, Penalty, HalfDetached, FunctionalGradient, Normalised])
def test_the_program_in_a_pt2_has_the_gradients_of_eager(kind, tmp_path):
    path = tmp_path / "net.pt2"
    exported = export(subject_of(kind()), path)
    assert (exported.written, exported.unit.verdict, exported.unit.form) == (True, "pass", "export")
    assert {"output", "gradient"} <= {tensor.quantity for tensor in exported.unit.tensors}
    model, loaded, x = kind(), torch.export.load(path).module(), points(seed=2)
    assert dict(loaded.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for each in (model, loaded):
        torch.autograd.backward([found.sum() for found in tensors(each(x.clone().requires_grad_()))])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name).grad, parameter.grad, msg=name)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(loaded.get_buffer(name), buffer, msg=name)


def test_a_model_whose_backward_raises_is_compared_by_its_outputs(tmp_path):
    exported = export(subject_of(FreedGraph()), tmp_path / "net.pt2")
    assert (exported.written, exported.unit.verdict) == (True, "pass")
    assert {tensor.quantity for tensor in exported.unit.tensors} == {"output"}


@pytest.mark.fast
def test_random_numbers_are_refused_in_a_sentence(tmp_path):
    exported = export(subject_of(Noisy()), tmp_path / "net.onnx")
    assert (exported.written, exported.unit.status) == (False, "unsupported")
    assert exported.unit.reason == (
        "the model differentiates in its forward, and it draws random numbers (random): draw them outside, and pass "
        "them as an input."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["export", "onnx"])
def test_compare_says_how_the_form_was_captured(form):
    unit = compare_one(subject_of(Forces()), form)
    assert unit.verdict == "pass"
    assert TRACED.search(unit.reason)


class Branch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


@pytest.mark.fast
def test_a_refusal_of_a_model_that_does_not_differentiate_is_that_of_torch_export(tmp_path):
    unit = export(subject_of(Branch()), tmp_path / "net.onnx").unit
    assert unit.reason.startswith("torch.export refuses the model: a branch")
