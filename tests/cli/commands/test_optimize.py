"""``gradctl optimize`` as a process: exit codes, both streams, what lies in the folder; and files that are none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from gradctl.passes.table import PASSES
from tests.cli.command_line import gradctl
from tests.passes.planted import graph

SAMPLES = Path(__file__).parents[3] / "sample_models"


def written(path, model):
    onnx.save(model, path)
    return path


@pytest.fixture
def plain(tmp_path):
    return written(tmp_path / "a.onnx", graph("m = MatMul(i, w)\ny = Relu(m)", {"w": np.eye(4, dtype=np.float32)}))


def test_an_export_is_optimised_and_still_the_model(tmp_path):
    exported, output = tmp_path / "m.onnx", tmp_path / "m.opt.onnx"
    sample = SAMPLES / "transformer.py"
    assert gradctl("export", sample, "-o", exported).returncode == 0
    finished = gradctl("optimize", exported, "-o", output)
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()
    assert (lines[0], lines[-1]) == (f"{output} is written", f"PASS: 1 output agrees with {exported}")
    # Each pass of the level has a row, or is on the line of passes that changed nothing, or was not run.
    rows = [line.split()[0] for line in lines[3 : lines.index("", 3)]]
    (unchanged,) = re.findall(r"^no change: ((?:[\w-]+,\s)*[\w-]+)", finished.stdout, re.MULTILINE)
    selected = [each for each in PASSES.values() if each.level != "max"]
    missing = [each.name for each in selected if each.missing()]
    assert sorted([*rows, *re.split(r",\s", unchanged), *missing]) == sorted(each.name for each in selected)
    assert gradctl("compare", exported, output).returncode == 0
    assert gradctl("compare", sample, output).returncode == 0


def test_a_target_is_exported_optimised_and_held_against_eager(tmp_path):
    output = tmp_path / "mlp.onnx"
    finished = gradctl("optimize", SAMPLES / "mlp.py", "--dynamic", "x:0=batch", "-o", output)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.splitlines()[-1] == "PASS: 1 output agrees with eager"
    assert onnx.load(output).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [each.name for each in tmp_path.iterdir()] == ["mlp.onnx"]


def test_without_an_output_it_is_a_trial_and_no_file_is_written(plain, tmp_path):
    before = plain.read_bytes()
    finished = gradctl("optimize", plain, "--pass", "ir-identity", "--pass", "fold", "--pass", "ir-unused")
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()
    assert lines[0] == "trial: no file is written (add -o OUT to write the result)"
    assert lines[-1] == f"PASS: 1 output agrees with {plain}"
    # One pass removed a node, and has a row; the others are one line.
    assert [line.split()[:3] for line in lines if line.startswith("ir-identity ")] == [["ir-identity", "kept", "2"]]
    assert [line for line in lines if "fold" in line] == ["no change: fold, ir-unused"]
    assert [each.name for each in tmp_path.iterdir()] == [plain.name] and plain.read_bytes() == before


def test_a_trial_that_fails_has_the_exit_code_of_the_verdict(tmp_path):
    path = written(tmp_path / "a.onnx", graph("m = Gelu(i)\ny = Relu(m)"))
    finished = gradctl("optimize", path, "--level", "safe", "--opset", 12)
    assert (finished.returncode, finished.stderr) == (1, "")
    assert finished.stdout.startswith("trial: no file is written")
    assert [each.name for each in tmp_path.iterdir()] == ["a.onnx"]


def test_a_target_without_an_output_is_a_trial(tmp_path):
    finished = gradctl("optimize", SAMPLES / "mlp.py", "--level", "safe", cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith("trial: no file is written")
    assert list(tmp_path.iterdir()) == []


def test_the_passes_that_are_named_run_in_their_order(plain, tmp_path):
    finished = gradctl(
        "optimize", plain, "--pass", "ir-identity", "--pass", "fold", "--format", "json", "-o", tmp_path / "b.onnx"
    )
    assert finished.returncode == 0
    (unit,) = json.loads(finished.stdout)["units"]
    table = unit["optimization"]
    assert [(each["name"], each["status"]) for each in table["passes"]] == [
        ("ir-identity", "kept"), ("fold", "unchanged"),
    ]  # fmt: skip
    assert (table["before"]["nodes"], table["after"]["nodes"], table["level"]) == (3, 2, None)
    # A product of [4, 4] by [4, 4] has 4 * 4 * 4 multiplications and additions, and Relu 16 elements.
    assert (table["after"]["flops"], table["after"]["activation_bytes"]) == (2 * 64 + 16, 2 * 64)
    assert table["after"]["parameters"] == 16 and table["after"]["bytes"] == 64
    latency = table["latency_after"]
    assert 0 < latency["lower_quartile"] <= latency["median"] <= latency["upper_quartile"]


def test_markdown_has_the_same_tables(plain, tmp_path):
    finished = gradctl("optimize", plain, "--level", "safe", "--format", "markdown", "-o", tmp_path / "b.onnx")
    assert finished.returncode == 0
    assert "| pass | result | nodes | error | budget | latency | time |\n|---|---|---:|---:|---:|---:|---:|\n" in (
        finished.stdout
    )
    assert "| nodes | 3 | 2 |\n" in finished.stdout


def test_a_conversion_that_is_none_fails_and_can_be_accepted(tmp_path):
    path, output = written(tmp_path / "a.onnx", graph("m = Gelu(i)\ny = Relu(m)")), tmp_path / "b.onnx"
    finished = gradctl("optimize", path, "--level", "safe", "--opset", 12, "-o", output)
    assert (finished.returncode, finished.stderr, output.exists()) == (1, "", False)
    assert finished.stdout.startswith(f"{output} is not written\n")
    assert "if this is intentional, add --allow GC502:opset-12" in finished.stdout
    assert finished.stdout.splitlines()[-1] == "FAIL: 1 finding (gradctl explain GC502)"
    finished = gradctl("optimize", path, "--level", "safe", "--opset", 12, "--allow", "GC502:opset-12", "-o", output)
    assert (finished.returncode, output.exists()) == (0, True)


def test_a_result_for_this_processor_says_so(plain, tmp_path):
    finished = gradctl("optimize", plain, "--pass", "ort-all", "-o", tmp_path / "b.onnx")
    assert finished.returncode == 0
    assert "\ntied to this machine by ort-all: optimise it again on the machine that runs it\n" in finished.stdout


def test_the_passes_are_listed(tmp_path):
    finished = gradctl("optimize", "--list-passes")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert [line.split()[0] for line in finished.stdout.splitlines()] == list(PASSES)
    assert ("pip install 'gradctl[slim]'" in finished.stdout) == bool(PASSES["slim"].missing())


@pytest.mark.skipif(not PASSES["slim"].missing(), reason="onnxslim is installed")
def test_a_pass_that_is_named_and_not_there_is_a_mistake(plain, tmp_path):
    finished = gradctl("optimize", plain, "--pass", "slim", "-o", tmp_path / "b.onnx")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "Error: --pass slim: onnxslim is not installed: pip install 'gradctl[slim]'." in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--pass", "folds"),
            "Error: --pass: no pass 'folds' (did you mean 'fold'?); 'gradctl optimize --list-passes'",
        ),
        (
            ("--pass", "fold", "--level", "max"),
            "Error: --level and --pass both select the passes. Omit one of them.",
        ),
        (("--arg", "k=1"), "Error: --arg applies to a program, not to a file."),
    ],
)
def test_options_that_do_not_go_together(arguments, said, plain, tmp_path):
    finished = gradctl("optimize", plain, *arguments, "-o", tmp_path / "b.onnx")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert said in finished.stderr


def truncated(path):
    onnx.save(graph("m = MatMul(i, w)\ny = Relu(m)", {"w": np.eye(4, dtype=np.float32)}), path)
    path.write_bytes(path.read_bytes()[:-40])


def external(location):
    def write(path):
        model = graph("y = MatMul(i, w)")
        tensor = model.graph.initializer.add(name="w", data_type=1, dims=[4, 4])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        onnx.save(model, path)

    return write


def foreign(path):
    model = graph("m = Relu(i)\ny = Neg(m)")
    model.graph.node[1].domain = "mine"
    model.opset_import.add(domain="mine", version=1)
    onnx.save(model, path)


def of_opset(version):
    return lambda path: onnx.save(graph("m = Relu(i)\ny = Neg(m)", opset=version), path)


BAD = {
    "empty": (lambda path: path.write_bytes(b""), "GC142 {} is empty. Write it again."),
    "truncated": (truncated, "GC142 {} is damaged, or no ONNX file. Write or copy it again."),
    "missing external data": (external("w.data"), "GC142 {}: the external data of 'w' are in "),
    "external data outside": (external("../w.data"), "GC902 {}: the external data of 'w' are at '../w.data'"),
    "a custom operator": (foreign, "GC602 {} cannot be run by onnxruntime "),
    "an opset of the future": (of_opset(99), "GC602 {} cannot be run by onnxruntime "),
    "an opset of the past": (of_opset(1), "GC60"),
    "a double that onnxruntime has no kernel for": (
        lambda path: onnx.save(graph("y = Erf(i)", inputs="double[4, 4] x", outputs="double[4, 4] y"), path),
        "GC602 {} cannot be run by onnxruntime ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_optimised_is_one_sentence_and_untouched(name, tmp_path):
    write, said = BAD[name]
    path = tmp_path / "a.onnx"
    write(path)
    before = path.read_bytes()
    finished = gradctl("optimize", path, "-o", tmp_path / "b.onnx")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith(said.format(path))
    assert len(finished.stderr.splitlines()) == 1
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.onnx"]


def test_a_file_of_another_kind_is_named(tmp_path):
    finished = gradctl("optimize", tmp_path / "a.pb", "-o", tmp_path / "b.onnx")
    assert finished.returncode == 2
    assert "a.pb is neither an .onnx file nor a program: optimize takes an .onnx file, or a TARGET" in finished.stderr


def test_an_output_of_another_kind_is_named(plain, tmp_path):
    finished = gradctl("optimize", plain, "-o", tmp_path / "b.pb")
    assert (finished.returncode, "b.pb: optimize writes .onnx." in finished.stderr) == (2, True)


def test_loops_and_subgraphs_are_run_through_all_passes(tmp_path):
    branch = """
    s = ReduceSum<keepdims = 0>(i)
    c = Greater(s, zero)
    m = If (c) <
        then_branch = t () => (float[4, 4] a) { n = Neg(i)
 a = Identity(n) },
        else_branch = e () => (float[4, 4] b) { b = Exp(i) }
    >
    y = Relu(m)"""
    path = written(tmp_path / "a.onnx", graph(branch, {"zero": np.float32(0)}))
    finished = gradctl("optimize", path, "--level", "max", "-o", tmp_path / "b.onnx")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert gradctl("compare", path, tmp_path / "b.onnx").returncode == 0
