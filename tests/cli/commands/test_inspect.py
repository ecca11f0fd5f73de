"""``gradctl inspect`` as a process: of a program and of files."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from gradctl.core.inspection import Inspection
from tests.cli.command_line import gradctl

SAMPLES = Path(__file__).parents[3] / "sample_models"


@pytest.mark.parametrize(
    ("sample", "line", "text"),
    [
        ("straight_through", "custom function: RoundStraightThrough", "code = RoundStraightThrough.apply("),
        ("gradient_reversal", "custom function: ReverseGradient", "self.domain(ReverseGradient.apply(h))"),
        ("straight_through_detach", "cut: detach", ".detach()"),
        ("no_grad_inside", "cut: abs", "scale = h.abs()"),
        ("control_flow", "control flow: bool 2 times", "while h.norm() > 1:"),
    ],
)
def test_a_sample_shows_what_its_gradients_hang_on_with_the_line(sample, line, text):
    finished = gradctl("inspect", SAMPLES / f"{sample}.py", cwd=SAMPLES)
    assert (finished.returncode, finished.stderr) == (0, "")
    (found,) = [shown for shown in finished.stdout.splitlines() if shown.startswith(f"{line} (")]
    number = int(found.rpartition(":")[2].rstrip(")"))
    assert text in (SAMPLES / f"{sample}.py").read_text().splitlines()[number - 1]


def test_a_plain_model_on_the_screen():
    finished = gradctl("inspect", SAMPLES / "tied_weights.py")
    assert finished.stdout == (
        "        name       type\n"
        "input   input:ids  int64[3, 5]\n"
        "output  output     float32[3, 5, 24]\n"
        "\n"
        "parameter               type\n"
        "param:embedding.weight  float32[24, 12]  tied with param:head.weight\n"
        "param:mix.weight        float32[12, 12]\n"
        "param:mix.bias          float32[12]\n"
        "\n"
        "3 parameters, 444 elements; 0 buffers; 1.78 kB\n"
        "no custom Function, hook, detach, no_grad, random number or branch on data\n"
    )


def test_the_json_is_an_inspection_read_strictly():
    finished = gradctl("inspect", SAMPLES / "resnet.py", "--train", "--format", "json")
    inspection = msgspec.json.decode(finished.stdout, type=Inspection, strict=True)
    assert (inspection.schema_version, inspection.source) == (1, "program")
    assert {row.name for row in inspection.buffers if row.changes} >= {"buffer:block1.bn1.running_mean"}
    assert set(json.loads(finished.stdout)) == set(Inspection.__struct_fields__)


@pytest.mark.parametrize(
    ("form", "suffix", "operators"),
    [
        ("trace", ".pt", "5 operators: linear 3, relu 2\n"),
        ("script", ".pt", "5 operators: linear 3, relu 2\n"),
        ("export", ".pt2", "5 operators: aten.linear 3, aten.relu 2\nguards: none, every size is fixed\n"),
    ],
)
def test_a_file_shows_its_graph_with_trust_and_nothing_without(form, suffix, operators, tmp_path):
    file = f"mlp{suffix}"
    gradctl("trace", SAMPLES / "mlp.py", "--form", form, "-o", file, cwd=tmp_path)
    trusted = gradctl("inspect", file, "--trust", cwd=tmp_path)
    assert trusted.returncode == 0
    assert trusted.stdout.endswith(f"6 parameters, 6922 elements; 0 buffers; 27.7 kB\n{operators}")
    refused = gradctl("inspect", file, cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"GC901 {file} is ")


def test_an_option_of_programs_is_not_passed_over_for_a_file(tmp_path):
    finished = gradctl("inspect", "net.onnx", "--input", "f32[1]", cwd=tmp_path)
    assert finished.returncode == 2
    assert "Error: --input applies to a program, not to a file." in finished.stderr


def test_a_file_that_is_missing(tmp_path):
    finished = gradctl("inspect", "net.pt2", "--trust", cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (2, "GC142 there is no file 'net.pt2'.\n")
