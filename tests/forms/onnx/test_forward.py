"""ONNX from torch's exporter: inputs, outputs and free sizes have the model's names; onnxruntime agrees with eager."""

from __future__ import annotations

import copy
import dataclasses
import resource

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from gradctl.core.errors import ResourceError, TargetError
from gradctl.forms.form import CannotCapture
from gradctl.forms.onnx import forward as form
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Pair:
    first: Tensor
    second: Tensor


class Scaling(nn.Module):
    """Calls a function with a parameter ``weight`` and the inputs."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1.0, 2.0, 4))
        self.function = function

    def forward(self, x, *, scale=None, batch=None, xs=None):
        return self.function(x * self.weight, scale=scale, batch=batch, xs=xs)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def instance_of(model, *args, **kwargs):
    return Instance(Subject(target="net.py:model", model=model, args=args, kwargs=kwargs))


@pytest.fixture
def exported(tmp_path):
    """Return a function that exports to a file and gives its path."""

    def export(model, *args, kwargs=None, **options):
        captured = form.export_graph(instance_of(model, *args, **(kwargs or {})), **options)
        path = tmp_path / "model.onnx"
        form.save(captured.artifact, path)
        onnx.checker.check_model(path, full_check=True)
        return path

    return export


def names_in(path):
    return [each.name for each in onnx.load(path).graph.input]


def names_out(path):
    return [each.name for each in onnx.load(path).graph.output]


def run(path, **feeds):
    """Return the outputs of onnxruntime by name, its optimiser off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    return dict(zip([each.name for each in session.get_outputs()], session.run(None, arrays), strict=True))


def assert_close(found, expected):
    # Four to six products and a tanh in float32, summed in another order: a few units in the last place.
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


def refusal(act):
    with pytest.raises(CannotCapture) as caught:
        act()
    return caught.value.reason


# ------------------------------------------------------------------ names


def test_a_positional_input_and_one_output(exported):
    path = exported(two_layers(), X)
    assert (names_in(path), names_out(path)) == (["input"], ["output"])
    assert {each.name for each in onnx.load(path).graph.initializer} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert_close(run(path, input=X)["output"], two_layers()(X))


def test_keyword_and_nested_inputs_are_named_by_their_path(exported):
    def total(y, *, scale, batch, xs):
        return y * scale + batch["mask"] + xs[0] - xs[1]

    model = Scaling(total)
    kwargs = {
        "scale": torch.tensor(3.0),
        "batch": {"mask": torch.ones(4)},
        "xs": [torch.full((1,), 5.0), torch.full((1,), 7.0)],
    }
    path = exported(model, X, kwargs=kwargs)
    assert names_in(path) == ["x", "scale", "batch.mask", "xs.0", "xs.1"]
    found = run(
        path,
        **{"x": X, "scale": kwargs["scale"], "batch.mask": kwargs["batch"]["mask"]},
        **{f"xs.{index}": value for index, value in enumerate(kwargs["xs"])},
    )
    assert_close(found["output"], model(X, **kwargs))


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda y: y.sin(), ["output"]),
        (lambda y: (y.sin(),), ["output.0"]),
        (lambda y: (y.sin(), [y.cos(), y.exp()]), ["output.0", "output.1.0", "output.1.1"]),
        (lambda y: {"logits": y.sin(), "aux": {"loss": y.sum()}}, ["output.logits", "output.aux.loss"]),
        (lambda y: Pair(y.sin(), y.sum()), ["output.first", "output.second"]),
        (lambda y: (y.sin(), None, 3, y.cos()), ["output.0", "output.3"]),
        (lambda y: (None, {"n": 2, "logits": y.sin()}), ["output.1.logits"]),
    ],
    ids=["tensor", "tuple of one", "nested list", "dict", "dataclass", "None and int", "None in a dict"],
)
def test_outputs_are_named_by_their_path(exported, function, names):
    model = Scaling(lambda y, **_: function(y))
    path = exported(model, X)
    assert names_out(path) == names
    expected = {f"output.{name}" if name else "output": leaf for name, leaf in leaves(model(X))}
    for name, value in run(path, x=X).items():
        assert_close(value, expected[name])


def test_what_is_no_tensor_comes_back_as_eager_gives_it():
    model = Scaling(lambda y, **_: {"logits": y.sin(), "n": 3, "rest": (None, "text")})
    found = form.capture(instance_of(model, X)).call(X)
    assert (found["n"], found["rest"]) == (3, (None, "text"))
    torch.testing.assert_close(found["logits"], model(X)["logits"].detach())


class Clash(nn.Module):
    """Has a parameter of the name of an input, or of the output."""

    def __init__(self, name):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.linspace(1.0, 2.0, 4)))

    def forward(self, weight):
        return weight * next(iter(self.parameters()))


@pytest.mark.parametrize("name", ["weight", "output"])
def test_a_parameter_gives_way_to_an_input_or_output_of_its_name(exported, name):
    model = Clash(name)
    path = exported(model, X)
    assert (names_in(path), names_out(path)) == (["weight"], ["output"])
    assert_close(run(path, weight=X)["output"], model(X))


def test_an_input_named_output_keeps_its_name(exported):
    def double(output):
        return output * 2

    path = exported(double, X)
    assert names_in(path) == ["output"]
    torch.testing.assert_close(form.capture(instance_of(double, X)).call(X), 2 * X)


def test_the_same_tensor_returned_twice_has_two_names(exported):
    path = exported(Scaling(lambda y, **_: (y, y)), X)
    assert names_out(path) == ["output.0", "output.1"]
    found = run(path, x=X)
    np.testing.assert_array_equal(found["output.0"], found["output.1"])


def test_an_input_returned_as_it_came(exported):
    path = exported(lambda x: (x, x.sin()), X)
    assert (names_in(path), names_out(path)) == (["x"], ["output.0", "output.1"])
    np.testing.assert_array_equal(run(path, x=X)["output.0"], X.numpy())


def test_a_parameter_returned_as_it_is():
    model = Scaling(lambda y, **_: y)
    model.forward = lambda x: (model.weight, x * model.weight)  # type: ignore[method-assign]
    found = form.capture(instance_of(model, X)).call(X)
    torch.testing.assert_close(found[0], model.weight.detach())


def test_an_unused_input_is_still_one(exported):
    def first(a, b):
        return a.sin()

    path = exported(first, X, torch.ones(3))
    assert names_in(path) == ["a", "b"]
    assert_close(run(path, a=X, b=torch.zeros(3))["output"], X.sin())


def test_the_same_tensor_given_twice_is_two_inputs(exported):
    def difference(a, b):
        return a - b

    path = exported(difference, X, X)
    assert_close(run(path, a=X, b=2 * X)["output"], -X)


def test_a_number_among_the_inputs_is_fixed(exported):
    path = exported(lambda a, k: a * k, X, 3)
    assert names_in(path) == ["a"]
    assert_close(run(path, a=X)["output"], 3 * X)


def test_inputs_that_torch_export_does_not_know_are_refused_in_a_sentence():
    model = Scaling(lambda y, *, batch, **_: y + batch.first)
    said = refusal(lambda: form.export_graph(instance_of(model, X, batch=Pair(X, X))))
    assert said.startswith("torch.export refuses the model: ")
    assert "Unsupported input type" in said


# ------------------------------------------------------------------ opsets


@pytest.mark.parametrize("opset", [18, 20, 21])
def test_the_opset_is_the_one_that_is_asked_for(exported, opset):
    path = exported(two_layers(), X, opset=opset)
    assert [(each.domain, each.version) for each in onnx.load(path).opset_import if not each.domain] == [("", opset)]
    assert_close(run(path, input=X)["output"], two_layers()(X))


@pytest.mark.parametrize("opset", [11, 99])
def test_an_opset_that_cannot_be_had_is_refused(opset):
    said = refusal(lambda: form.export_graph(instance_of(two_layers(), X), opset=opset))
    assert said == f"the exporter produces opset 18 and cannot convert it to opset {opset}."


# ------------------------------------------------------------------ free sizes


def sizes(path):
    return {
        each.name: [size.dim_param or size.dim_value for size in each.type.tensor_type.shape.dim]
        for each in onnx.load(path).graph.input
    }


def test_without_a_free_size_all_are_fixed(exported):
    assert sizes(exported(two_layers(), X)) == {"input": [5, 4]}


def test_a_free_batch_takes_any_number_of_rows(exported):
    path = exported(two_layers(), X, dynamic={"input": {0: "batch"}})
    assert sizes(path) == {"input": ["batch", 4]}
    for rows in (1, 2, 5, 64):
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
        assert_close(run(path, input=x)["output"], two_layers()(x))


def test_one_name_on_two_inputs_is_one_size(exported):
    def product(a, b):
        return a.sin() @ b

    b = torch.randn(4, 6)
    path = exported(product, X, b, dynamic={"a": {0: "batch", 1: "k"}, "b": {0: "k", 1: "n"}})
    assert sizes(path) == {"a": ["batch", "k"], "b": ["k", "n"]}
    a, b = torch.randn(2, 7), torch.randn(7, 3)
    assert_close(run(path, a=a, b=b)["output"], product(a, b))


def test_a_free_size_of_a_nested_input(exported):
    model = Scaling(lambda y, *, batch, **_: y * batch["mask"])
    batch = {"mask": torch.ones(5, 1)}
    path = exported(model, X, kwargs={"batch": batch}, dynamic={"x": {0: "rows"}, "batch.mask": {0: "rows"}})
    assert sizes(path) == {"x": ["rows", 4], "batch.mask": ["rows", 1]}


def test_a_free_size_of_no_input_is_named():
    with pytest.raises(TargetError) as caught:
        form.export_graph(instance_of(two_layers(), X), dynamic={"inputs": {0: "batch"}})
    assert str(caught.value) == "GC104 --dynamic names no input tensor 'inputs' (did you mean 'input'?): input."


# ------------------------------------------------------------------ weights in a second file


def test_weights_above_the_limit_go_beside_the_file(exported, tmp_path, monkeypatch):
    # Of two_layers: 23 float32 are 92 bytes.
    monkeypatch.setattr(form, "_LARGEST", 91)
    model = nn.Sequential(nn.Linear(4, 300), nn.Linear(300, 2))
    path = exported(model, X)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    held = onnx.load(path, load_external_data=False).graph.initializer
    assert {entry.value for each in held for entry in each.external_data if entry.key == "location"} == {
        "model.onnx.data"
    }
    np.testing.assert_allclose(run(path, input=X)["output"], model(X).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_weights_at_the_limit_stay_in_the_file(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(form, "_LARGEST", 92)
    exported(two_layers(), X)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("largest", [2**31, 1], ids=["one file", "two files"])
def test_a_disk_that_is_full_is_said_to_be(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(form, "_LARGEST", largest)
    captured = form.export_graph(instance_of(nn.Linear(4, 3000), X))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(ResourceError) as caught:
            form.save(captured.artifact, tmp_path / "model.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == (
        f"GC131 {str(tmp_path / 'model.onnx')!r} cannot be written: File too large. Give a path that you may write to."
    )


# ------------------------------------------------------------------ recurrent layers


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.parametrize(
    ("kind", "options", "operator"),
    [
        (nn.LSTM, {"num_layers": 2}, "LSTM"),
        (nn.GRU, {"bidirectional": True}, "GRU"),
        (nn.RNN, {}, "Scan"),
        (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}, "Scan"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_recurrent_layer_has_any_number_of_steps(exported, kind, options, operator):
    torch.manual_seed(0)
    model = Recurrent(kind(4, 5, batch_first=True, **options))
    path = exported(model, torch.randn(2, 7, 4), dynamic={"x": {0: "batch", 1: "time"}})
    graph = onnx.load(path).graph
    assert operator in {node.op_type for node in graph.node}
    sizes = graph.output[0].type.tensor_type.shape.dim
    assert [size.dim_param for size in sizes[:2]] == ["batch", "time"]
    for batch, steps in ((2, 7), (3, 12), (1, 1)):
        x = torch.randn(batch, steps, 4)
        assert_close(run(path, x=x)["output"], model(x))


# ------------------------------------------------------------------ refusals


def test_a_complex_model_is_refused_in_a_sentence():
    said = refusal(lambda: form.capture(instance_of(lambda a: a.sin(), X + 1j)))
    assert said.startswith("torch.onnx refuses the model: ")
    assert "complex" in said
    assert "\n" not in said


def test_a_bfloat16_model_is_refused_in_a_sentence():
    said = refusal(lambda: form.capture(instance_of(lambda a: a.sin(), X.bfloat16())))
    assert said.startswith(
        f"the model is exported, and the exported file cannot be run by onnxruntime {onnxruntime.__version__}: "
    )
    assert "bfloat16" in said
    assert "\n" not in said


def test_a_branch_on_data_is_refused_with_the_reason_of_torch_export():
    said = refusal(lambda: form.capture(instance_of(lambda a: a.sin() if a.sum() > 0 else a.cos(), X)))
    assert said.startswith("torch.export refuses the model: a branch, a loop or a size depends on the values")


def test_an_operator_without_a_conversion_is_refused():
    said = refusal(lambda: form.capture(instance_of(lambda a: torch.special.bessel_j0(a + 1), X)))
    assert said.startswith("torch.onnx refuses the model: ")
    assert "bessel_j0" in said


def test_float64_is_refused():
    instance = instance_of(two_layers(), X)
    assert refusal(lambda: form.to_float64(form.capture(instance), instance)) == (
        "onnxruntime has no float64 kernels for many operators; outputs are compared in the model's own dtype."
    )


# ------------------------------------------------------------------ the form


def test_the_form_gives_what_the_model_gives():
    captured = form.capture(instance_of(two_layers(), X))
    assert (captured.form, captured.quantities) == ("onnx", {"output"})
    torch.testing.assert_close(captured.call(X), two_layers()(X).detach())
    assert captured.parameters.keys() == dict(two_layers().named_parameters()).keys()


def test_the_users_model_is_not_changed():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    before, x = copy.deepcopy(model.state_dict()), X.clone()
    form.capture(instance_of(model, x))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training
    assert torch.equal(x, X)


def test_two_exports_in_one_process_are_apart(exported, tmp_path):
    first, second = two_layers(), Scaling(lambda y, **_: y.cos())
    assert_close(run(exported(first, X), input=X)["output"], first(X))
    assert_close(run(exported(second, X), x=X)["output"], second(X))
    again = onnx.load(exported(first, X))
    assert again.SerializeToString() == onnx.load(exported(first, X)).SerializeToString()
