"""``gradctl export`` as a process: exit codes, both streams, the folder, and what onnxruntime makes of the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.cli.command_line import gradctl
from tests.sweeps import sampled

SAMPLES = Path(__file__).parents[3] / "sample_models"


SAMPLED = ["linear", "mlp", "resnet", "transformer", "gru", "tied_weights", "no_grad_inside", "straight_through"]


@pytest.mark.parametrize("sample", sampled(SAMPLED, always=["resnet", "straight_through"]))
def test_a_sample_is_exported_and_is_the_model(sample, tmp_path):
    output = tmp_path / f"{sample}.onnx"
    finished = gradctl("export", SAMPLES / f"{sample}.py", "-o", output)
    assert (finished.returncode, finished.stderr) == (0, "")
    *_, written, empty, verdict = finished.stdout.splitlines()
    assert (written, empty, verdict) == (f"{output} is written", "", "PASS: 1 output agrees with eager")
    assert [file.name for file in tmp_path.iterdir()] == [output.name]
    onnx.checker.check_model(output, full_check=True)
    finished = gradctl("compare", SAMPLES / f"{sample}.py", output)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_a_free_size_and_an_opset_are_those_that_were_asked_for(tmp_path):
    output = tmp_path / "mlp.onnx"
    finished = gradctl(
        "export", SAMPLES / "mlp.py", "--dynamic", "x:0=batch", "--opset", 18, "--format", "json", "-o", output
    )
    assert finished.returncode == 0
    assert "batch + 1" in json.loads(finished.stdout)["units"][0]["variations"]
    model = onnx.load(output)
    assert [each.version for each in model.opset_import if each.domain == ""] == [18]
    (given,) = model.graph.input
    assert (given.name, given.type.tensor_type.shape.dim[0].dim_param) == ("x", "batch")
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    assert session.run(["output"], {"x": np.zeros((11, 32), np.float32)})[0].shape == (11, 10)


def test_a_size_that_is_fixed_is_said_to_be(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def model(x):\n    return x.reshape(2, -1) * 2\n"
        "def example_inputs():\n    return (torch.ones(2, 3),)\n"
    )
    finished = gradctl("export", "net.py", "--dynamic", "x:0=batch", "-o", "net.onnx", cwd=tmp_path)
    assert finished.returncode == 4
    said = " ".join(finished.stdout.split())
    assert said.startswith("NOT EXPORTED: torch.export refuses the model: the model fixes the size batch to 2")
    assert said.endswith("use x.shape instead of a number, or omit batch from --dynamic")
    assert not (tmp_path / "net.onnx").exists()


BATCH_NORM = """
import torch
from torch import nn

def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).{mode}()

def example_inputs():
    return (torch.randn(8, 4, generator=torch.Generator().manual_seed(0)),)
"""


def test_batch_norm_in_training_mode_leaves_no_file_and_an_older_one_as_it_was(tmp_path):
    (tmp_path / "net.py").write_text(BATCH_NORM.format(mode="train"))
    (tmp_path / "net.onnx").write_text("older")
    finished = gradctl("export", "net.py", "--train", "-o", "net.onnx", cwd=tmp_path)
    assert finished.returncode == 1
    assert "net.onnx is not written\n" in finished.stdout
    assert "error GC301 output differs from eager's in onnx" in finished.stdout
    assert (tmp_path / "net.onnx").read_text() == "older"
    assert gradctl("export", "net.py", "--eval", "-o", "net.onnx", cwd=tmp_path).returncode == 0


def test_a_file_of_a_model_trained_one_step_further_is_told_by_its_parameters(tmp_path):
    assert gradctl("export", SAMPLES / "mlp.py", "-o", "mlp.onnx", cwd=tmp_path).returncode == 0
    assert gradctl("trace", SAMPLES / "mlp.py", "--form", "export", "-o", "mlp.pt2", cwd=tmp_path).returncode == 0
    (tmp_path / "further.py").write_text(
        f"import sys; sys.path.insert(0, {str(SAMPLES)!r})\n"
        "import torch, mlp\n"
        "def make_model():\n"
        "    model = mlp.make_model()\n"
        "    model(*mlp.example_inputs()).square().mean().backward()\n"
        "    torch.optim.SGD(model.parameters(), 0.01).step()\n"
        "    model.zero_grad()\n"
        "    return model\n"
        "example_inputs = mlp.example_inputs\n"
    )
    for file, trust in (("mlp.onnx", ()), ("mlp.pt2", ("--trust",))):
        finished = gradctl("compare", "further.py", file, *trust, "--format", "json", cwd=tmp_path)
        assert finished.returncode == 1
        findings = json.loads(finished.stdout)["units"][0]["findings"]
        stale = {each["tensor"] for each in findings if each["code"] == "GC304"}
        assert stale == {f"param:{layer}.{kind}" for layer in ("fc1", "fc2", "fc3") for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "net.pt"), "Error: net.pt: export writes .onnx, and .pt2 but for --graph train-step."),
        (("-o", "net.onnx", "--dynamic", "x"), "Error: --dynamic 'x' is not NAME:AXIS=SIZE, for example x:0=batch."),
        (("-o", "net.onnx", "--opset", "0"), "Error: Invalid value for '--opset': 0 is not in the range x>=1."),
        ((), "Error: Missing option '-o' / '--output'."),
        (("-o", "net.onnx", "--dynamic", "y:0=batch"), "GC104 --dynamic names no input tensor 'y': x."),
        (("-o", "no/net.onnx"), "GC131 'no/net.onnx' cannot be written: there is no folder"),
    ],
)
def test_bad_options_are_one_sentence(arguments, said, tmp_path):
    finished = gradctl("export", SAMPLES / "mlp.py", *arguments, cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert said in finished.stderr.splitlines()[-1].replace(str(tmp_path) + "/", "")
    assert list(tmp_path.iterdir()) == []


def test_an_opset_that_the_exporter_does_not_reach_is_inconclusive(tmp_path):
    finished = gradctl("export", SAMPLES / "mlp.py", "--opset", 99, "-o", "mlp.onnx", cwd=tmp_path)
    assert finished.returncode == 4
    assert "opset" in finished.stdout
    assert "99" in finished.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_comes_out_is_named_as_in_a_report(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def model(x, batch):\n    return {'logits': x * batch['mask'], 'ids': x.argmax(-1), 'none': None}\n"
        "def example_inputs():\n    return (torch.ones(2, 3), {'mask': torch.ones(3)})\n"
    )
    assert gradctl("export", "net.py", "-o", "net.onnx", cwd=tmp_path).returncode == 0
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["x", "batch.mask"]
    assert [each.name for each in session.get_outputs()] == ["output.logits", "output.ids"]
    x, mask = torch.randn(2, 3), torch.randn(3)
    logits, ids = session.run(None, {"x": x.numpy(), "batch.mask": mask.numpy()})
    assert np.array_equal(logits, (x * mask).numpy())
    assert np.array_equal(ids, x.argmax(-1).numpy())


def test_a_model_in_training_mode_is_refused_before_it_is_run(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.norm, self.drop = torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)\n"
        "    def forward(self, x):\n"
        "        return self.drop(self.norm(x)) if self.training else self.norm(x)\n"
        "def example_inputs():\n    return (torch.randn(4, 3),)\n"
    )
    refused = gradctl("export", "net.py", "-o", "net.onnx", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert " ".join(refused.stderr.split()).endswith(
        "GC105 net.py: the model is in training mode: 1 BatchNorm and 1 Dropout modules are active. "
        "Add --eval to export it for inference, or --train to try it as it is."
    )
    inference = gradctl("export", "net.py", "--eval", "-o", "net.onnx", cwd=tmp_path)
    assert (inference.returncode, (tmp_path / "net.onnx").exists()) == (0, True)
