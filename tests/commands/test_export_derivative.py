"""JVP and Hessian-vector products in a file: onnxruntime alone against torch.autograd.functional on other inputs.

A custom backward that autograd cannot differentiate, or differentiates to something else, leaves no file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gradctl.commands.export_derivative import export_derivative
from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.subject.subject import Subject
from tests.gradients.directional.test_products import Detaching, Round, Saving


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3 * ctx.saved_tensors[0] ** 2


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between = nn.Linear(4, 6), nn.Linear(6, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(torch.tanh(self.a(x))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x[None])[0]


def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)


def loss(output: Tensor) -> Tensor:
    return output.square().mean()


def points(rows: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def subject_of(model: Any, **options: Any) -> Subject:
    return Subject(target="net.py:model", model=model, args=(points(),), **options)


def run(path: Any, **feeds: Any) -> dict[str, np.ndarray]:
    """Return the outputs by name; the values of parameters are inputs of the file, too."""
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_outputs()]
    return dict(
        zip(names, session.run(names, {name: each.detach().numpy() for name, each in feeds.items()}), strict=True)
    )


def assert_close(found: np.ndarray, expected: Tensor) -> None:
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


SMOOTH = {
    "mlp": Net,
    "saved tensors": lambda: Net(Saving.apply),
    "LSTM": Recurrent,
    "attention": attention,
    "straight-through by detach": lambda: Net(lambda h: h + (h.round() - h).detach()),
}
SLOW = ["LSTM", "attention"]


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in SMOOTH])
@pytest.mark.parametrize("graph", ["jvp", "hvp"])
def test_onnxruntime_alone_computes_the_products_of_autograd(graph, name, tmp_path):
    model, path = SMOOTH[name](), tmp_path / "net.onnx"
    subject = subject_of(model, loss=loss if graph == "hvp" else None)
    written = export_derivative(subject, path, graph=graph)
    assert (written.written, written.unit.verdict, written.unit.form) == (True, "pass", f"onnx-{graph}")
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    argument = onnx.load(path).graph.input[-1].name.removeprefix("tangent.input.")
    x, v = points(seed=2), points(seed=3)
    feeds = {**dict(model.named_parameters()), f"input.{argument}": x, f"tangent.input.{argument}": v}
    found = run(path, **feeds)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        if graph == "jvp":
            output, product = torch.autograd.functional.jvp(model, x, v)
            assert found.keys() == {"output", "jvp.output"}
            assert_close(found["output"], output)
            assert_close(found["jvp.output"], product)
            return
        leaf = x.clone().requires_grad_()
        value = loss(model(leaf))
        (gradient,) = torch.autograd.grad(value, leaf)
        assert found.keys() == {"output", f"grad.input.{argument}", f"hvp.input.{argument}"}
        assert_close(found["output"], value)
        assert_close(found[f"grad.input.{argument}"], gradient)
        assert_close(found[f"hvp.input.{argument}"], torch.autograd.functional.hvp(lambda x: loss(model(x)), x, v)[1])


def test_parameters_with_a_free_batch_against_the_dense_hessian(tmp_path):
    model, path = Net(), tmp_path / "net.onnx"
    wrt = ("param:b.*",)
    written = export_derivative(
        subject_of(model, loss=loss), path, graph="hvp", wrt=wrt, dynamic={"x": {0: "batch"}}, frozen=False
    )
    assert written.written
    tangents = {f"tangent.{name}": torch.randn_like(each) for name, each in model.b.named_parameters(prefix="b")}
    x = points(rows=9)
    found = run(path, **dict(model.named_parameters()), **tangents, **{"input.x": x})
    h = torch.tanh(model.a(x))
    blocks = torch.autograd.functional.hessian(
        lambda weight, bias: loss(nn.functional.linear(h, weight, bias)), (model.b.weight, model.b.bias)
    )
    for row, name in zip(blocks, ("b.weight", "b.bias"), strict=True):
        products = (
            torch.tensordot(block, tangents[f"tangent.{other}"], tangents[f"tangent.{other}"].ndim)
            for block, other in zip(row, ("b.weight", "b.bias"), strict=True)
        )
        assert_close(found[f"hvp.{name}"], sum(products))


def test_frozen_parameters_are_constants_and_the_jvp_is_that_of_the_transposed_backward(tmp_path):
    model, path = Net(Round.apply), tmp_path / "net.onnx"
    assert export_derivative(subject_of(model), path, graph="jvp", frozen=True).written
    x, v = points(seed=2), points(seed=3)
    found = run(path, **{"input.x": x, "tangent.input.x": v})
    # The backward of the rounding is the identity: the JVP is that of the net without it.
    assert_close(found["jvp.output"], torch.autograd.functional.jvp(Net(), x, v)[1])


@pytest.mark.fast
def test_a_dropout_mask_is_an_input(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).train()
    path = tmp_path / "net.onnx"
    assert export_derivative(subject_of(model), path, graph="jvp").written
    x, v, mask = points(seed=2), points(seed=3), (torch.rand(5, 6) < 0.5).float()
    feeds = {"input.input": x, "tangent.input.input": v, "random.1": mask}
    found = run(path, **dict(model.named_parameters()), **feeds)
    masked = lambda x: model[3](torch.tanh(model[0](x) * mask * 2))  # noqa: E731
    assert_close(found["jvp.output"], torch.autograd.functional.jvp(masked, x, v)[1])


def test_a_pt2_computes_the_same(tmp_path):
    model, path = Net(), tmp_path / "net.pt2"
    written = export_derivative(subject_of(model), path, graph="jvp", dynamic={"x": {0: "batch"}})
    assert (written.written, written.unit.form) == (True, "export-jvp")
    x, v = points(rows=3, seed=2), points(rows=3, seed=3)
    _, product = torch.export.load(path).module()(*model.parameters(), x, v)
    torch.testing.assert_close(product, torch.autograd.functional.jvp(model, x, v)[1])


@pytest.mark.fast
@pytest.mark.parametrize(("graph", "function"), [("hvp", Detaching), ("hvp", Once), ("hvp", Round), ("jvp", Once)])
def test_a_wrong_product_leaves_no_file(graph, function, tmp_path):
    subject = subject_of(Net(function.apply), loss=loss if graph == "hvp" else None)
    written = export_derivative(subject, tmp_path / "net.onnx", graph=graph)
    assert (written.written, written.unit.verdict, list(tmp_path.iterdir())) == (False, "fail", [])
    assert {each.code for each in written.unit.findings} == {"GC426"}


def test_an_accepted_product_is_compared_with_eager(tmp_path):
    subject = subject_of(Net(Round.apply), loss=loss)
    written = export_derivative(subject, tmp_path / "net.onnx", graph="hvp", allows=("GC426:input:x",))
    assert (written.written, written.unit.verdict) == (True, "pass")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("model", "graph", "wrt", "said"),
    [
        (nn.Embedding(4, 2), "jvp", (), "--graph jvp differentiates by float inputs, and net.py:model has none."),
        (Net(), "hvp", (), "--graph hvp is of one scalar that requires a gradient, and net.py:model returns output of"),
        (Net(), "jvp", ("param:z",), "--wrt param:z matches nothing that requires a gradient"),
    ],
)
def test_what_cannot_be_differentiated_is_said(model, graph, wrt, said, tmp_path):
    args = (torch.tensor([1, 2]),) if isinstance(model, nn.Embedding) else (points(),)
    subject = Subject(target="net.py:model", model=model, args=args)
    with pytest.raises(TargetError, match=said):
        export_derivative(subject, tmp_path / "net.onnx", graph=graph, wrt=wrt)


@pytest.mark.fast
def test_outputs_without_a_gradient_are_nothing_to_check(tmp_path):
    with pytest.raises(NothingToCheck, match="has a gradient"):
        export_derivative(subject_of(lambda x: x.detach().sin()), tmp_path / "net.onnx", graph="jvp")
