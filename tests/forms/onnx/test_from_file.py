"""A file as a form of a model: inputs and outputs are matched by name or order, and what does not fit is listed."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.parser import parse_model
from torch import nn

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.core.errors import TargetError
from gradctl.forms.onnx import forward as form
from gradctl.forms.onnx.from_file import free_sizes, wrap_file
from gradctl.onnxio.onnx_file import read
from gradctl.onnxio.session import run
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject

A = torch.arange(6.0).reshape(2, 3)
B = torch.full((2, 3), 10.0)
PORTS = "(float[2,3] a, float[2,3] b) => (float[2,3] output)"


def difference(a, b):
    return a - b


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def subject_of(model=difference, *args, **kwargs):
    return Subject(target="net.py:model", model=model, args=args or (() if kwargs else (A, B)), kwargs=kwargs)


@pytest.fixture
def file(tmp_path):
    """Return a function from a graph in ONNX's text form to a file."""

    def make(text):
        path = tmp_path / "model.onnx"
        path.write_bytes(parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}').SerializeToString())
        return path

    return make


def loaded(path, subject=None):
    return wrap_file(read(path), Instance(subject or subject_of()))


def refusal(path, subject=None):
    with pytest.raises(TargetError) as caught:
        loaded(path, subject)
    assert caught.value.code == "GC141"
    return caught.value.message.replace(str(path), "FILE")


# ------------------------------------------------------------------ matching


def test_inputs_of_the_same_names_match_in_any_order(file):
    path = file("g (float[2,3] b, float[2,3] a) => (float[2,3] output) { output = Sub(a, b) }")
    assert torch.equal(loaded(path).call(A, B), A - B)


def test_a_report_name_is_the_name_of_an_input(tmp_path):
    model = parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {PORTS} {{ output = Sub(a, b) }}')
    for port, name in zip(model.graph.input, ("input:a", "input:b"), strict=True):
        model.graph.node[0].input[list(model.graph.node[0].input).index(port.name)] = name
        port.name = name
    port_b, port_a = copy.deepcopy(model.graph.input[1]), copy.deepcopy(model.graph.input[0])
    del model.graph.input[:]
    model.graph.input.extend([port_b, port_a])
    onnx.save(model, tmp_path / "model.onnx")
    assert torch.equal(loaded(tmp_path / "model.onnx").call(A, B), A - B)


def test_foreign_names_match_by_order(file):
    path = file("g (float[2,3] first, float[2,3] second) => (float[2,3] y) { y = Sub(first, second) }")
    assert torch.equal(loaded(path).call(A, B), A - B)


def test_one_foreign_name_makes_all_match_by_order(file):
    path = file("g (float[2,3] b, float[2,3] second) => (float[2,3] y) { y = Sub(b, second) }")
    assert torch.equal(loaded(path).call(A, B), A - B)


def test_an_input_that_the_graph_does_not_use_may_be_missing(file):
    path = file("g (float[2,3] b) => (float[2,3] output) { output = Neg(b) }")
    assert torch.equal(loaded(path).call(A, B), -B)


def test_inputs_given_by_keyword(file):
    path = file(f"g {PORTS} {{ output = Sub(a, b) }}")
    assert torch.equal(loaded(path, subject_of(b=B, a=A)).call(b=B, a=A), A - B)


def test_outputs_of_the_same_names_match_in_any_order_and_keep_their_structure(file):
    def both(a, b):
        return {"sum": a + b, "rest": [a - b, 7]}

    path = file(
        "g (float[2,3] a, float[2,3] b) => (float[2,3] output_rest_0, float[2,3] output_sum) "
        "{ output_sum = Add(a, b) output_rest_0 = Sub(a, b) }"
    )
    model = onnx.load(path)
    names = {"output_sum": "output.sum", "output_rest_0": "output.rest.0"}
    for value in model.graph.output:
        value.name = names[value.name]
    for node in model.graph.node:
        node.output[0] = names[node.output[0]]
    onnx.save(model, path)
    found = loaded(path, subject_of(both, A, B)).call(A, B)
    assert torch.equal(found["sum"], A + B)
    assert torch.equal(found["rest"][0], A - B)
    assert found["rest"][1] == 7


def test_foreign_outputs_match_by_order(file):
    def both(a, b):
        return a + b, a - b

    path = file("g (float[2,3] a, float[2,3] b) => (float[2,3] p, float[2,3] m) { p = Add(a, b) m = Sub(a, b) }")
    found = loaded(path, subject_of(both, A, B)).call(A, B)
    assert torch.equal(found[0], A + B)
    assert torch.equal(found[1], A - B)


@pytest.mark.parametrize("shape", ["[n,3]", "[2,?]", "[n,k]"])
def test_a_size_that_is_free_or_unknown_fits(file, shape):
    path = file(f"g (float{shape} a, float[2,3] b) => (float{shape} output) {{ output = Sub(a, b) }}")
    assert torch.equal(loaded(path).call(A, B), A - B)


# ------------------------------------------------------------------ what is not of this model


@pytest.mark.parametrize(
    ("ports", "said"),
    [
        (
            "(float[2,3] a, float[2,3] b, float[2,3] c) => (float[2,3] output)",
            "3 inputs (a, b, c), and the model has 2 (a, b)",
        ),
        ("(float[2,3] z) => (float[2,3] output)", "1 inputs (z), and the model has 2 (a, b)"),
        (
            "(float[2,3] a, float[2,3] b) => (float[2,3] output, float[2,3] more)",
            "2 outputs (output, more), and the model has 1 (output)",
        ),
        (
            "(float[2,4] a, float[2,4] b) => (float[2,4] output)",
            "input a is float32[2, 4], not float32[2, 3]; input b is float32[2, 4], not float32[2, 3]; "
            "output output is float32[2, 4], not float32[2, 3]",
        ),
        ("(float[n,4] a, float[2,3] b) => (float[2,3] output)", "input a is float32[n, 4], not float32[2, 3]"),
        ("(double[2,3] a, float[2,3] b) => (float[2,3] output)", "input a is float64[2, 3], not float32[2, 3]"),
        ("(float[6] a, float[2,3] b) => (float[2,3] output)", "input a is float32[6], not float32[2, 3]"),
        ("(float[2,3] a, float[2,3] b) => (float[1,3] output)", "output output is float32[1, 3], not float32[2, 3]"),
        ("(float[2,3] a, float[2,3] b) => (int64[2,3] output)", "output output is int64[2, 3], not float32[2, 3]"),
    ],
    ids=["more inputs", "fewer foreign", "more outputs", "shapes", "free", "dtype", "rank", "output", "output dtype"],
)
def test_what_does_not_fit_is_listed(file, ports, said):
    inputs, results = (re.findall(r"\] (\w+)", half) for half in ports.split("=>"))
    body = " ".join(f"{name} = Identity({inputs[0]})" for name in results)
    path = file(f"g {ports} {{ {body} }}")
    assert refusal(path) == f"FILE is not a form of net.py:model: {said}."


def test_an_input_that_is_no_tensor_is_listed(file):
    path = file("g (seq(float[2,3]) a, float[2,3] b) => (float[2,3] output) { output = Neg(b) }")
    assert refusal(path) == "FILE is not a form of net.py:model: input a is sequence_type, not float32[2, 3]."


def test_an_initializer_of_another_shape_is_named(tmp_path):
    wide = nn.Linear(4, 5)
    form.save(form.export_graph(Instance(subject_of(nn.Linear(4, 3), torch.ones(2, 4)))).artifact, tmp_path / "m.onnx")
    said = refusal(tmp_path / "m.onnx", subject_of(wide, torch.ones(2, 4)))
    assert said == (
        "FILE is not a form of net.py:model: output output is float32[2, 3], not float32[2, 5]; weight has shape "
        "[3, 4], not [5, 4]; bias has shape [3], not [5]."
    )


# ------------------------------------------------------------------ running


def test_a_run_gives_outputs_by_name(file):
    session = onnxruntime.InferenceSession(file(f"g {PORTS} {{ output = Sub(a, b) }}"))
    assert {name: value.tolist() for name, value in run(session, {"a": A, "b": B}).items()} == {
        "output": (A - B).tolist()
    }


def test_an_input_of_another_shape_is_a_refusal_of_onnxruntime(file):
    session = onnxruntime.InferenceSession(file(f"g {PORTS} {{ output = Sub(a, b) }}"))
    with pytest.raises(RuntimeError, match="^onnxruntime: Got invalid dimensions for input: a"):
        run(session, {"a": A[:1], "b": B})


def test_an_output_that_is_no_tensor_is_named(file):
    path = file("g (float[2,3] a) => (seq(float[2,3]) output) { output = SequenceConstruct(a) }")
    with pytest.raises(RuntimeError, match="^output 'output' is a list, not a tensor$"):
        run(onnxruntime.InferenceSession(path), {"a": A})


def test_the_provider_of_the_subject_runs_the_file(file):
    provider = next(iter(onnxruntime.get_available_providers()))  # of the CPU build: AzureExecutionProvider
    path = file(f"g {PORTS} {{ output = Sub(a, b) }}")
    captured = loaded(path, replace(subject_of(), provider=provider))
    assert captured.call.run.args[0].get_providers()[0] == provider
    assert torch.equal(captured.call(A, B), A - B)
    plain = loaded(path)
    assert plain.call.run.args[0].get_providers() == ["CPUExecutionProvider"]


def test_a_provider_that_does_not_start_is_an_error(file):
    """onnxruntime warns, and uses the CPU."""
    path = file(f"g {PORTS} {{ output = Sub(a, b) }}")
    with pytest.raises(TargetError) as caught:
        loaded(path, replace(subject_of(), provider="CUDAExecutionProvider"))
    assert str(caught.value) == (
        f"GC602 {path} cannot be run by CUDAExecutionProvider, which onnxruntime could not start."
    )


def test_the_caller_keeps_its_input(file):
    captured = loaded(file(f"g {PORTS} {{ output = Sub(a, b) }}"))
    a = A.clone()
    found = captured.call(a, B)
    found.add_(1)
    assert torch.equal(a, A)


# ------------------------------------------------------------------ values and free sizes


@pytest.fixture
def exported(tmp_path):
    def export(model, *args, dynamic=None):
        path = tmp_path / "model.onnx"
        form.save(form.export_graph(Instance(subject_of(model, *args)), dynamic=dynamic).artifact, path)
        return path

    return export


def test_initializers_stand_for_parameters(exported):
    model, x = two_layers(), torch.ones(5, 4)
    captured = loaded(exported(model, x), subject_of(model, x))
    assert {name: value.tolist() for name, value in captured.parameters.items()} == {
        name: value.tolist() for name, value in model.named_parameters()
    }


def test_a_buffer_stands_for_a_buffer(exported):
    class Shifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.arange(4.0))

        def forward(self, x):
            return x.sin() + self.shift

    captured = loaded(exported(Shifting(), torch.ones(5, 4)), subject_of(Shifting(), torch.ones(5, 4)))
    assert captured.parameters == {}
    assert captured.buffers["shift"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_tied_parameter_has_both_its_names(exported):
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    captured = loaded(exported(model, torch.ones(5, 4)), subject_of(model, torch.ones(5, 4)))
    assert captured.parameters.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_free_sizes_of_a_file_are_those_it_was_exported_with(exported):
    path = exported(two_layers(), torch.ones(5, 4), dynamic={"input": {0: "batch"}})
    assert free_sizes(loaded(path, subject_of(two_layers(), torch.ones(5, 4)))) == {"input": {0: "batch"}}


def test_free_sizes_go_by_the_names_of_the_model(file):
    path = file("g (float[n,3] first, float[n,k] second) => (float[n,k] y) { y = Sub(first, second) }")
    assert free_sizes(loaded(path)) == {"a": {0: "n"}, "b": {0: "n", 1: "k"}}


def test_a_file_without_free_sizes_has_none(file):
    assert free_sizes(loaded(file(f"g {PORTS} {{ output = Sub(a, b) }}"))) == {}


# ------------------------------------------------------------------ a file of another state of the model


def compared(path, model, x):
    return Comparing(subject_of(model, x), Allows(())).file(path, trusted=False)


def test_the_file_of_this_model_passes(exported):
    model, x = two_layers(), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    unit = compared(exported(model, x), model, x)
    assert (unit.verdict, unit.findings) == ("pass", ())


@pytest.mark.parametrize("trained", [["0.weight"], ["2.bias"], ["0.weight", "0.bias", "2.weight", "2.bias"]])
def test_a_model_trained_one_step_further_names_its_parameters(exported, trained):
    model, x = two_layers(), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    path = exported(model, x)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model(x).square().mean().backward()
    torch.optim.SGD([model.get_parameter(name) for name in trained], lr=0.1).step()

    unit = compared(path, model, x)
    stale = {finding.tensor: finding for finding in unit.findings if finding.code == "GC304"}
    assert unit.verdict == "fail"
    assert stale.keys() == {f"param:{name}" for name in trained}
    for name in trained:
        now = model.get_parameter(name).detach()
        off = float(torch.linalg.vector_norm(before[name] - now) / torch.linalg.vector_norm(now))
        said = stale[f"param:{name}"].message.removeprefix(f"param:{name} in {path} is not the model's: off by ")
        assert float(said.removesuffix(" (relative).")) == pytest.approx(off, rel=1e-2)


def test_a_tied_parameter_that_was_trained_is_named(exported):
    layer = nn.Linear(4, 4)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    path = exported(model, x)
    with torch.no_grad():
        layer.weight.add_(0.1)
    assert "param:0.weight" in {each.tensor for each in compared(path, model, x).findings if each.code == "GC304"}


@pytest.mark.parametrize(("divisor", "verdict"), [("n", "pass"), ("five", "fail")])
def test_a_file_with_a_free_size_is_compared_at_another_size(file, divisor, verdict):
    def mean_of_columns(x):
        return x.sum(0) / x.shape[0]

    path = file(
        "g (float[batch,4] x) => (float[4] output) { s = ReduceSum<keepdims=0>(x, axes) shape = Shape(x) "
        "rows = Slice(shape, start, end) n = Cast<to=1>(rows) "
        f"output = Div(s, {divisor}) }}"
    )
    model = onnx.load(path)
    for name, kind, value in (("axes", 7, 0), ("start", 7, 0), ("end", 7, 1), ("five", 1, 5.0)):
        model.graph.initializer.append(onnx.helper.make_tensor(name, kind, [1], [value]))
    onnx.save(model, path)
    unit = compared(path, mean_of_columns, torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
    assert (unit.verdict, unit.variations[-1]) == (verdict, "batch + 1")


def test_numpy_and_torch_agree_on_what_was_written(exported):
    model, x = two_layers(), torch.ones(5, 4)
    (found,) = onnxruntime.InferenceSession(exported(model, x)).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)
