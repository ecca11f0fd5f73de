"""``gradctl compare`` as a process: forms, files, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tests.cli.command_line import gradctl

SAMPLES = Path(__file__).parents[3] / "sample_models"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Give a folder with the MLP sample as an ONNX file and as an exported program."""
    folder = tmp_path_factory.mktemp("files")
    assert gradctl("export", SAMPLES / "mlp.py", "-o", "mlp.onnx", cwd=folder).returncode == 0
    assert gradctl("trace", SAMPLES / "mlp.py", "--form", "export", "-o", "mlp.pt2", cwd=folder).returncode == 0
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "half.onnx").write_bytes((folder / "mlp.onnx").read_bytes()[:3000])
    (folder / "weights.pt").write_bytes(b"")
    torch.save(nn.Linear(2, 2).state_dict(), folder / "weights.pt")
    return folder


def test_a_lost_gradient_is_found_in_the_form_that_loses_it():
    finished = gradctl(
        "compare", SAMPLES / "straight_through.py", "--form", "trace", "--form", "export", "--format", "json"
    )
    assert finished.returncode == 1
    eager, trace, export = json.loads(finished.stdout)["units"]
    assert {each["code"] for each in eager["findings"]} == {"GC408", "GC401"}
    assert (trace["verdict"], trace["findings"]) == ("pass", [])
    assert {each["verdict"] for each in export["tensors"] if each["quantity"] == "output"} == {"same"}
    lost = {each["tensor"] for each in export["findings"] if each["code"] in ("GC402", "GC403")}
    assert lost == {"input:x", "param:encoder.weight", "param:encoder.bias"}


def test_the_matrix_has_a_line_for_each_form():
    finished = gradctl("compare", SAMPLES / "mlp.py", "--form", "trace", "--form", "onnx")
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()
    lines = lines if lines[0].startswith("form") else lines[1:]  # "forward speedup" takes two, if there is one
    assert lines[0].split()[:5] == ["form", "outputs", "gradients", "buffers", "capture"]
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["eager", "-", "same"],
        ["trace", "same", "same"],
        ["onnx", "same", "-"],
    ]
    assert lines[-1] == "PASS: 3 of 3 forms agree"


@pytest.mark.parametrize(
    ("provider", "options", "said"),
    [
        (
            "CUDAExecutionProvidr",
            ("--form", "onnx"),
            "GC106 onnxruntime has no execution provider 'CUDAExecutionProvidr' here. It has "
            f"{', '.join(onnxruntime.get_available_providers())}.\n",
        ),
        (
            "CPUExecutionProvider",
            ("--form", "trace"),
            "Error: --provider applies to the forms onnx and onnx-joint, and to .onnx files. Omit it.\n",
        ),
    ],
)
def test_a_provider_that_is_not_there_or_does_not_apply_is_a_usage_error(provider, options, said):
    finished = gradctl("compare", SAMPLES / "mlp.py", *options, "--provider", provider)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.endswith(said)


def test_two_files_are_compared_by_their_outputs(files):
    finished = gradctl("compare", "mlp.onnx", "mlp.onnx", cwd=files)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.splitlines() == [
        "the graphs are equal: 5 nodes, 6 initializers",
        "PASS: 1 output agrees with mlp.onnx",
    ]


def test_two_files_that_differ_are_told_apart_down_to_the_weight(files):
    model = onnx.load(files / "mlp.onnx")
    weight = next(each for each in model.graph.initializer if len(each.dims) == 2)
    value = onnx.numpy_helper.to_array(weight).copy()
    value[0, 0] += 1
    weight.CopyFrom(onnx.numpy_helper.from_array(value, weight.name))
    onnx.save(model, files / "other.onnx")
    finished = gradctl("compare", "mlp.onnx", "other.onnx", cwd=files)
    assert finished.returncode == 1
    lines = finished.stdout.splitlines()
    assert lines[:2] == ["graph: 5 nodes, 5 of them matched; 6 initializers", "  constants: 1 changed"]
    assert lines[2].startswith(f"    {weight.name} float32[") and "max 1.00e+00" in lines[2]
    assert "The first value that differs, " in " ".join(finished.stdout.split())
    assert lines[-1] == "FAIL: 1 of 1 output is wrong (gradctl explain GC301)"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mlp.onnx",), "Error: mlp.onnx is a model file: compare takes a TARGET and a FILE, or two .onnx files."),
        (("mlp.pt2", "mlp.onnx"),
         "Error: mlp.pt2 is a model file: compare takes a TARGET and a FILE, or two .onnx files."),
        (("mlp.onnx", "mlp.onnx", "--weights", "w.pt"),
         "Error: --weights applies to a program, not to two files."),
        (("mlp.onnx", "empty.onnx"), "GC142 empty.onnx is empty. Write it again."),
        (("mlp.onnx", "half.onnx"), "GC142 half.onnx is damaged, or no ONNX file. Write or copy it again."),
        (("mlp.onnx", "mpl.onnx"), "GC142 there is no file 'mpl.onnx' (did you mean 'mlp.onnx'?)."),
        (("mlp.onnx", "mlp.onnx", "--inputs", "none.npz"), "GC122 there is no file 'none.npz'."),
        ((SAMPLES / "mlp.py", "empty.onnx"), "GC142 empty.onnx is empty. Write it again."),
        ((SAMPLES / "mlp.py", "mlp.pt2"),
         "GC901 mlp.pt2 is an exported program with pickled parts, code that runs when loaded. "
         "Pass --trust if you trust its author."),
        ((SAMPLES / "mlp.py", "mlp.onnx", "--form", "trace"),
         "Error: --form selects what is captured, and a FILE is captured already. Omit one of them."),
        ((SAMPLES / "mlp.py", "--form", "tensorrt"), "Error: Invalid value for '--form': 'tensorrt' is not one of"),
        ((SAMPLES / "mlp.py", "weights.pt"),
         "GC142 weights.pt holds no model: it is what torch.save wrote, weights or a pickled object. "
         "Give weights with --weights."),
        ((SAMPLES / "linear.py", "mlp.onnx"), "GC141 mlp.onnx is not a form of "),
        ((SAMPLES / "linear.py", "mlp.pt2", "--trust"), "GC141 mlp.pt2 is not a form of "),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_sentence(files, arguments, said):
    finished = gradctl("compare", *arguments, cwd=files)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.splitlines()[-1].startswith(said)
    assert "Traceback" not in finished.stderr
