"""``gradctl compare REFERENCE CANDIDATE`` on the command line."""

from __future__ import annotations

import json

import pytest

from tests.cli.command_line import gradctl

ATTENTION = "sample_models/attention.py"
REFERENCE = f"{ATTENTION}:reference"


def compare(*arguments):
    return gradctl("compare", *arguments)


def test_the_right_pair_of_the_sample_passes():
    found = compare(REFERENCE, f"{ATTENTION}:fused")
    assert (found.returncode, found.stdout) == (0, f"PASS: 3 gradients agree with {REFERENCE}\n")


def test_the_wrong_pair_of_the_sample_fails_with_the_tensor():
    found = compare(REFERENCE, f"{ATTENTION}:fused_wrong", "--format", "json")
    assert found.returncode == 1
    (unit,) = json.loads(found.stdout)["units"]
    assert (unit["target"], unit["form"], unit["reference"]) == (f"{ATTENTION}:fused_wrong", "candidate", REFERENCE)
    assert [row["tensor"] for row in unit["tensors"] if row["verdict"] == "wrong"] == ["input:k"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([REFERENCE, f"{ATTENTION}:fused", "--form", "trace"], "--form applies to the forms of one TARGET"),
        ([REFERENCE, "--map", "a=b"], "--map applies to another target as CANDIDATE, and there is none"),
        (
            [REFERENCE, "net.onnx", "--own-weights"],
            "--own-weights applies to another target as CANDIDATE, and net.onnx",
        ),
        ([REFERENCE, f"{ATTENTION}:fused", "--map", "a"], "--map 'a' is not OLD=NEW"),
        ([REFERENCE, f"{ATTENTION}:fuse"], "did you mean 'fused'"),
        (["net.onnx", f"{ATTENTION}:fused"], "net.onnx is a model file"),
        ([REFERENCE, f"{ATTENTION}:fused", "--candidate-device", "nowhere"], "'nowhere' is no device"),
    ],
    ids=["form", "map", "file", "text", "name", "model file", "device"],
)
def test_arguments_that_do_not_fit_are_usage_errors(arguments, said):
    found = compare(*arguments)
    assert found.returncode == 2
    assert said in found.stderr
