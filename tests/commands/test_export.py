"""An ONNX file takes its place only if it verified: what onnxruntime makes of the file is held against eager."""

from __future__ import annotations

import inspect
import os
import resource

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from gradctl.commands.export import export
from gradctl.core.errors import ResourceError, TargetError
from gradctl.forms.onnx import forward as form
from gradctl.subject.subject import Subject


class Flattening(nn.Module):
    """Makes a number of its batch size."""

    def forward(self, x):
        return x.reshape(int(x.shape[0]) * 4).sin()


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def normalised(*, training):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train(training)


def subject_of(model, *args):
    generator = torch.Generator().manual_seed(1)
    return Subject(target="net.py:model", model=model, args=args or (torch.randn(5, 4, generator=generator),))


def run(path, x, name="input"):
    (found,) = onnxruntime.InferenceSession(path).run(None, {name: x.numpy()})
    return found


def assert_close(found, expected):
    # A handful of products and a tanh in float32, summed in another order: a few units in the last place.
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


# ------------------------------------------------------------------ the file and its verdict


def test_a_file_that_agrees_takes_its_place(tmp_path):
    exported = export(subject_of(two_layers()), tmp_path / "net.onnx")
    assert (exported.written, exported.unit.verdict, exported.unit.form) == (True, "pass", "onnx")
    assert {tensor.quantity for tensor in exported.unit.tensors} == {"output"}
    assert names_in(tmp_path) == ["net.onnx"]
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    assert_close(run(tmp_path / "net.onnx", x), two_layers()(x))


def test_a_file_that_agrees_replaces_an_older_one(tmp_path):
    (tmp_path / "net.onnx").write_text("older")
    assert export(subject_of(two_layers()), tmp_path / "net.onnx").written
    onnx.checker.check_model(tmp_path / "net.onnx")


def test_the_graph_is_that_of_the_file(tmp_path):
    graph = export(subject_of(two_layers()), tmp_path / "net.onnx").graph
    assert graph.operators == {"Gemm": 2, "Tanh": 1}
    assert {row.name for row in graph.parameters} == {
        "param:0.weight",
        "param:0.bias",
        "param:2.weight",
        "param:2.bias",
    }
    assert graph.elements == 4 * 3 + 3 + 3 * 2 + 2


def test_the_opset_is_that_of_the_file(tmp_path):
    assert export(subject_of(two_layers()), tmp_path / "net.onnx", opset=18).written
    assert [each.version for each in onnx.load(tmp_path / "net.onnx").opset_import if not each.domain] == [18]


def test_batch_norm_in_training_mode_differs_and_leaves_no_file(tmp_path):
    exported = export(subject_of(normalised(training=True)), tmp_path / "net.onnx")
    assert (exported.written, exported.unit.verdict) == (False, "fail")
    assert [(finding.code, finding.tensor) for finding in exported.unit.findings] == [("GC301", "output")]
    assert names_in(tmp_path) == []


def test_batch_norm_in_evaluation_mode_is_silent(tmp_path):
    exported = export(subject_of(normalised(training=False)), tmp_path / "net.onnx")
    assert (exported.written, exported.unit.findings) == (True, ())


def test_a_file_that_differs_leaves_an_older_one_as_it_was(tmp_path):
    (tmp_path / "net.onnx").write_text("older")
    export(subject_of(normalised(training=True)), tmp_path / "net.onnx")
    assert names_in(tmp_path) == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "older"


def test_a_file_that_differs_is_kept_where_that_is_asked(tmp_path):
    exported = export(subject_of(normalised(training=True)), tmp_path / "net.onnx", keep_unverified=True)
    assert (exported.written, exported.unit.verdict) == (True, "fail")
    (x,) = subject_of(None).args
    assert_close(run(tmp_path / "net.onnx", x), normalised(training=False)(x))  # what torch's exporter makes of it


def test_a_random_number_that_the_file_holds_or_draws_differs(tmp_path):
    def shifted(x):
        return x.sin() + torch.randn(())

    exported = export(subject_of(shifted), tmp_path / "net.onnx")
    assert (exported.written, exported.unit.verdict) == (False, "fail")
    assert [(finding.code, finding.tensor) for finding in exported.unit.findings] == [("GC301", "output")]


def test_a_model_that_cannot_be_exported_says_why_and_an_older_file_stays(tmp_path):
    def branching(x):
        return x.sin() if x.sum() > 0 else x.cos()

    (tmp_path / "net.onnx").write_text("older")
    exported = export(subject_of(branching), tmp_path / "net.onnx", keep_unverified=True)
    assert (exported.written, exported.graph) == (False, None)
    assert (exported.unit.status, exported.unit.verdict) == ("unsupported", "inconclusive")
    assert exported.unit.reason.startswith("torch.export refuses the model: a branch, a loop or a size depends on the")
    assert (tmp_path / "net.onnx").read_text() == "older"


def test_a_file_that_onnxruntime_does_not_run_says_why(tmp_path):
    def sine(x):
        return x.bfloat16().sin().float()

    exported = export(subject_of(sine), tmp_path / "net.onnx", keep_unverified=True)
    assert (exported.written, exported.unit.status, names_in(tmp_path)) == (False, "unsupported", [])
    assert exported.unit.reason.startswith(
        "the model is captured and saved, and cannot be loaded again: the file cannot be run by onnxruntime "
    )


def test_an_opset_that_cannot_be_had_says_why(tmp_path):
    exported = export(subject_of(two_layers()), tmp_path / "net.onnx", opset=99)
    assert exported.unit.reason == "the exporter produces opset 18 and cannot convert it to opset 99."


def test_the_users_model_is_not_changed(tmp_path):
    model = normalised(training=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(subject_of(model), tmp_path / "net.onnx")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_a_model_without_a_gradient_is_verified_by_its_outputs(tmp_path):
    def count(n):
        return n + 1

    exported = export(subject_of(count, torch.arange(3)), tmp_path / "net.onnx")
    assert (exported.written, exported.unit.verdict) == (True, "pass")
    np.testing.assert_array_equal(run(tmp_path / "net.onnx", torch.arange(4, 7), "n"), [5, 6, 7])


# ------------------------------------------------------------------ free sizes


def test_a_free_size_is_tried_at_another_size(tmp_path):
    exported = export(subject_of(two_layers()), tmp_path / "net.onnx", dynamic={"input": {0: "batch"}})
    assert exported.written
    assert "batch + 1" in exported.unit.variations
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    assert_close(run(tmp_path / "net.onnx", x), two_layers()(x))


def test_without_it_no_other_size_is_tried(tmp_path):
    exported = export(subject_of(two_layers()), tmp_path / "net.onnx")
    assert not any("+ 1" in each for each in exported.unit.variations)


def test_a_size_that_the_model_fixes_is_a_refusal(tmp_path):
    exported = export(subject_of(Flattening()), tmp_path / "net.onnx", dynamic={"x": {0: "batch"}})
    line = inspect.getsourcelines(Flattening.forward)[1] + 1
    assert exported.unit.reason == (
        f"torch.export refuses the model: the model fixes the size batch to 5 (test_export.py, line {line}); use "
        "x.shape instead of a number, or omit batch from --dynamic"
    )
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("dynamic", "said"),
    [
        ({"inputs": {0: "batch"}}, "GC104 --dynamic names no input tensor 'inputs' (did you mean 'input'?): input."),
        ({"input": {2: "batch"}}, "GC104 --dynamic input:2: 'input' is [5, 4], which has no axis 2."),
    ],
    ids=["name", "axis"],
)
def test_a_free_size_that_is_not_there_is_named(tmp_path, dynamic, said):
    with pytest.raises(TargetError) as caught:
        export(subject_of(two_layers()), tmp_path / "net.onnx", dynamic=dynamic)
    assert str(caught.value) == said
    assert names_in(tmp_path) == []


# ------------------------------------------------------------------ weights in a second file, and the disk


def test_weights_in_a_second_file_land_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(form, "_LARGEST", 100)
    model = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 2))
    exported = export(subject_of(model), tmp_path / "net.onnx")
    assert exported.written
    assert names_in(tmp_path) == ["net.onnx", "net.onnx.data"]
    (x,) = subject_of(model).args
    np.testing.assert_allclose(run(tmp_path / "net.onnx", x), model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_weights_in_a_second_file_of_a_model_that_differs_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(form, "_LARGEST", 1)
    (tmp_path / "net.onnx").write_text("older")
    (tmp_path / "net.onnx.data").write_text("older weights")
    exported = export(subject_of(normalised(training=True)), tmp_path / "net.onnx")
    assert not exported.written
    assert names_in(tmp_path) == ["net.onnx", "net.onnx.data"]
    assert (tmp_path / "net.onnx.data").read_text() == "older weights"


def test_a_second_file_that_cannot_be_placed_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(form, "_LARGEST", 1)
    (tmp_path / "net.onnx").write_text("older")
    (tmp_path / "net.onnx.data").mkdir()
    with pytest.raises(ResourceError, match=r"^GC131 '.*/net.onnx.*' cannot be written: "):
        export(subject_of(nn.Linear(4, 300)), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_text() == "older"
    assert names_in(tmp_path) == ["net.onnx", "net.onnx.data"]


@pytest.mark.parametrize("largest", [2**31, 1], ids=["one file", "two files"])
def test_a_disk_that_is_full_leaves_an_older_file_as_it_was(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(form, "_LARGEST", largest)
    (tmp_path / "net.onnx").write_text("older")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(
            ResourceError, match=r"^GC131 '.*net\.onnx' cannot be written: File too large\. Give a path"
        ):
            export(subject_of(nn.Linear(4, 3000)), tmp_path / "net.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(tmp_path) == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "older"


def test_a_folder_that_is_not_there(tmp_path):
    output = tmp_path / "no" / "net.onnx"
    with pytest.raises(ResourceError) as caught:
        export(subject_of(two_layers()), output)
    assert str(caught.value) == (
        f"GC131 {str(output)!r} cannot be written: there is no folder {str(output.parent)!r}. "
        "Create it, or use another path."
    )


def test_a_place_that_is_a_folder(tmp_path):
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(ResourceError, match=r"GC131 '.*/net.onnx' cannot be written: it is a folder\."):
        export(subject_of(two_layers()), tmp_path / "net.onnx")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="GC131 .* cannot be written: Permission denied"):
        export(subject_of(two_layers()), tmp_path / "net.onnx")
