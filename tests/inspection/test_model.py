"""Each thing that gradients hang on is found, with its line, and a plain model is silent."""

from __future__ import annotations

from pathlib import Path

import onnx.parser
import pytest
import torch
from torch import nn

from gradctl.core.errors import TargetError
from gradctl.inspection.file_contents import inspect_file
from gradctl.inspection.model import inspect
from gradctl.subject.subject import Subject

SOURCE = Path(__file__).read_text(encoding="utf-8").splitlines()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@torch.library.custom_op("gradctl_test::tripled", mutates_args=())
def tripled(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


def inspected(model, *args):
    generator = torch.Generator().manual_seed(1)
    return inspect(Subject(target="net.py:model", model=model, args=args or (torch.randn(5, 4, generator=generator),)))


def found(model, *args):
    """Return kind, name, and the text of the line, of all that is found."""
    return [
        (each.kind, each.name, SOURCE[each.location.line - 1].partition("  # ")[0].strip())
        for each in inspected(model, *args).semantics
    ]


def test_a_plain_model_is_silent():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)).eval()
    assert inspected(model).semantics == ()


# ------------------------------------------------------------------ one thing each


def test_a_custom_function():
    def model(x):
        return Doubled.apply(x).sin()

    assert found(model) == [("custom function", "Doubled", "return Doubled.apply(x).sin()")]


def test_an_operator_of_another_library():
    def model(x):
        return tripled(x.detach()) * x

    assert ("custom operator", "gradctl_test::tripled", "return tripled(x.detach()) * x") in found(model)


def test_a_tensor_hook():
    def model(x):
        y = 2 * x
        y.register_hook(lambda g: 10 * g)
        return y

    assert found(model) == [("hook", "register_hook", "y.register_hook(lambda g: 10 * g)")]


def test_a_hook_on_a_module_and_one_on_a_parameter():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    model[0].register_full_backward_hook(lambda *_: None)  # of the module
    model[0].bias.register_hook(lambda g: 2 * g)  # of the bias
    assert found(model) == [
        ("hook", "0", "model[0].register_full_backward_hook(lambda *_: None)"),
        ("hook", "param:0.bias", "model[0].bias.register_hook(lambda g: 2 * g)"),
    ]


@pytest.mark.parametrize(
    ("call", "name"),
    [(lambda x: x.detach(), "detach"), (lambda x: x.data, "data"), (lambda x: x.sum().item(), "item")],
    ids=["detach", "data", "item"],
)
def test_a_cut_by_the_call_that_makes_it(call, name):
    semantics = inspected(lambda x: x * call(x)).semantics
    assert [each.name for each in semantics if each.kind == "cut"] == [name]


def test_a_cut_under_no_grad_and_whom_it_leaves_without_gradient():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            with torch.no_grad():
                scale = self.scale(x)
            return self.fc(x) * scale

    (cut,) = inspected(Scaled()).semantics
    assert (cut.kind, cut.name, cut.tensors) == ("cut", "linear", ("param:scale.bias", "param:scale.weight"))
    assert SOURCE[cut.location.line - 1].strip() == "scale = self.scale(x)"


def test_a_constant_made_from_a_tensor_is_no_cut():
    assert inspected(lambda x: torch.where(x > 0, x, torch.zeros_like(x))).semantics == ()


def test_a_branch_on_data_is_counted_by_its_line():
    def model(x):
        for _ in range(3):
            if x.sum() > -1e9:  # always
                x = x.sin()
        return x

    (branch,) = inspected(model).semantics
    assert (branch.kind, branch.name, branch.count) == ("control flow", "bool", 3)
    assert "if x.sum() > -1e9:" in SOURCE[branch.location.line - 1]


def test_random_numbers():
    assert found(lambda x: x + torch.randn_like(x))[0][:2] == ("random numbers", "randn_like")


def test_attention_without_dropout_draws_none():
    def attention(dropout):
        return lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=dropout)

    assert inspected(attention(0.0)).semantics == ()
    assert {each.kind for each in inspected(attention(0.5)).semantics} == {"random numbers"}


def test_modules_in_training_mode_by_kind():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Dropout(0.0))
    (training,) = inspected(model).semantics
    assert (training.kind, training.name, training.tensors) == ("training mode", "BatchNorm1d", ("1", "2"))


# ------------------------------------------------------------------ parameters and buffers


def test_tied_frozen_and_unused_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(1, 1)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)

        def forward(self, x):
            return self.second(self.first(x))

    inspection = inspected(Net())
    rows = {row.name.removeprefix("param:"): (row.tied, row.frozen, row.unused) for row in inspection.parameters}
    assert rows == {
        "first.weight": (("param:second.weight",), False, False),
        "first.bias": ((), True, None),
        "second.bias": ((), False, False),
        "unused.weight": ((), False, True),
        "unused.bias": ((), False, True),
    }
    assert (inspection.elements, inspection.bytes) == (16 + 4 + 4 + 2, 4 * 26)


def test_buffers_that_change_in_a_call():
    model = nn.BatchNorm1d(4)
    model.register_buffer("constant", torch.ones(2))
    changes = {row.name: row.changes for row in inspected(model).buffers}
    assert changes == {
        "buffer:running_mean": True,
        "buffer:running_var": True,
        "buffer:num_batches_tracked": True,
        "buffer:constant": False,
    }
    assert not any(row.changes for row in inspected(model.eval()).buffers)


def test_the_users_model_is_not_changed():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inspected(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_a_gradient_is_shown_all_the_same():
    inspection = inspected(lambda n: n + 1, torch.arange(3))
    assert [port.type for port in (*inspection.inputs, *inspection.outputs)] == ["int64[3]", "int64[3]"]
    assert inspection.notes[0].startswith("net.py:model has no differentiable leaf")


def test_inputs_and_outputs_by_name():
    inspection = inspected(lambda x: {"a": x, "b": (x.sum(), x > 0)})
    assert [(port.name, port.type) for port in inspection.outputs] == [
        ("output.a", "float32[5, 4]"),
        ("output.b.0", "float32[]"),
        ("output.b.1", "bool[5, 4]"),
    ]


# ------------------------------------------------------------------ ONNX files (TorchScript and .pt2: test_trace.py)

MODEL = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
net (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w> {
  h = MatMul(x, w)
  g = com.microsoft.Gelu(h)
  y = Relu(g)
}
"""


def test_an_onnx_file(tmp_path):
    model = onnx.parser.parse_model(MODEL)
    model.graph.initializer.append(onnx.numpy_helper.from_array(torch.ones(4, 3).numpy(), "w"))
    onnx.save(model, tmp_path / "net.onnx")
    inspection = inspect_file(tmp_path / "net.onnx", trusted=False)
    assert inspection.operators == {"MatMul": 1, "com.microsoft::Gelu": 1, "Relu": 1}
    assert inspection.opsets == {"ai.onnx": 21, "com.microsoft": 1}
    assert [(port.name, port.type) for port in inspection.inputs] == [("x", "float32[N, 4]")]
    assert [(port.name, port.type) for port in inspection.outputs] == [("y", "float32[N, 3]")]
    assert [(row.name, row.shape, row.dtype) for row in inspection.parameters] == [("param:w", (4, 3), "float32")]
    assert (inspection.elements, inspection.bytes) == (12, 48)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty. Write it again."),
        (b"\xff\xff\xff", "is damaged, or no ONNX file. Write or copy it again."),
        (onnx.ModelProto(ir_version=10).SerializeToString(), "holds no ONNX graph with an opset. Write it again."),
    ],
    ids=["empty", "damaged", "no graph"],
)
def test_a_file_that_is_no_onnx_says_so(tmp_path, content, said):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(TargetError) as caught:
        inspect_file(path, trusted=False)
    assert str(caught.value) == f"GC142 {path} {said}"


def test_an_onnx_file_that_is_missing_names_the_nearest(tmp_path):
    (tmp_path / "net.onnx").touch()
    with pytest.raises(TargetError, match=r"GC142 there is no file '.*/nett.onnx' \(did you mean 'net.onnx'\?\)\."):
        inspect_file(tmp_path / "nett.onnx", trusted=False)
    with pytest.raises(TargetError, match=r"GC142 .* is a folder; name a file in it\."):
        (tmp_path / "folder.onnx").mkdir()
        inspect_file(tmp_path / "folder.onnx", trusted=False)
