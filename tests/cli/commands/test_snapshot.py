"""``gradctl snapshot`` and ``gradctl verify`` from end to end, as processes: what they say, and their exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from tests.cli.command_line import gradctl

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "gradctl/report/schema.json").read_text())

NET = """
import torch
from torch import nn

SCALE = 1.0


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.inner, self.outer = nn.Linear(40, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.outer(nn.functional.dropout(self.inner(x), training=self.training))


def make_model(width: int = 3):
    torch.manual_seed(0)
    model = Net(width).eval()
    model.inner.weight.register_hook(lambda gradient: gradient * SCALE)
    return model


def example_inputs():
    return (torch.randn(4, 40),)


def squared(output):
    return output.square().sum()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, its changed twin, and a snapshot in a folder of its own."""
    folder = tmp_path_factory.mktemp("net")
    (folder / "snapshots").mkdir()
    (folder / "net.py").write_text(NET)
    (folder / "scaled.py").write_text(NET.replace("SCALE = 1.0", "SCALE = 1.0001"))
    finished = gradctl("snapshot", "net.py", "-o", "snapshots/net.snapshot", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    assert re.sub(r"\d+\.\d kB", "N kB", finished.stdout) == (
        "snapshots/net.snapshot holds 1 output and 5 gradients in float64, float32 (N kB)\n"
        "the values file beside it holds 4 parameters and 1 input (N kB)\n"
    )
    return folder


def test_the_target_is_found_from_any_folder(folder):
    for cwd, name in ((folder, "snapshots/net.snapshot"), (folder / "snapshots", "net.snapshot")):
        finished = gradctl("verify", name, cwd=cwd)
        assert (finished.returncode, finished.stdout) == (0, f"PASS: 5 gradients agree with {name}\n")


def test_a_changed_gradient_is_named(folder):
    finished = gradctl("verify", "snapshots/net.snapshot", "scaled.py", cwd=folder)
    assert finished.returncode == 1
    lines = re.sub(r"[-+]?\d\.\d+e[-+]\d+", "N", finished.stdout).splitlines()
    assert lines[:2] == ["DIFFERS  param:inner.weight  float64[3, 40]", "relative error N (tolerance N)"]
    assert lines[2].split() == ["index", "snapshot", "now", "abs", "error", "rel", "error"]
    assert "  error GC311 the gradient of param:inner.weight changed in float64: relative" in lines
    assert lines[-1] == "FAIL: 1 of 5 gradients changed (gradctl explain GC311)"


def test_update_shows_the_changes_and_rewrites_the_file(folder, tmp_path):
    for name in ("net.py", "scaled.py"):
        (tmp_path / name).write_text((folder / name).read_text())
    gradctl("snapshot", "net.py", "-o", "net.snapshot", cwd=tmp_path)
    finished = gradctl("verify", "net.snapshot", "scaled.py", "--update", cwd=tmp_path)
    assert finished.returncode == 0
    assert finished.stdout.startswith("net.snapshot is rewritten\n")
    assert "  allowed GC311 the gradient of param:inner.weight changed" in finished.stdout
    assert finished.stdout.endswith("PASS: 4 gradients agree with net.snapshot, 1 changed, 1 finding allowed\n")
    # It is a snapshot of the other target now.
    assert gradctl("verify", "net.snapshot", cwd=tmp_path).returncode == 0
    assert gradctl("verify", "net.snapshot", "net.py", cwd=tmp_path).returncode == 1


def test_another_cpu_capability_draws_other_inputs_and_changes_nothing(folder):
    finished = gradctl("verify", "snapshots/net.snapshot", cwd=folder, ATEN_CPU_CAPABILITY="default")
    said = " ".join(finished.stdout.split())
    assert finished.returncode == 0, finished.stdout
    if "CPU capability" in said:  # this machine has vector instructions
        assert "generators yield other numbers from the seed: uniform_, randn" in said
        assert "note GC314 also different: CPU capability" in said
    assert said.endswith("PASS: 5 gradients agree with snapshots/net.snapshot")


def test_the_report_is_the_same_contract(folder):
    report = folder / "report.json"
    finished = gradctl(
        "verify", "snapshots/net.snapshot", "scaled.py", "--format", "json", "--report", f"junit={report}", cwd=folder
    )
    parsed = json.loads(finished.stdout)
    jsonschema.validate(parsed, SCHEMA)
    (unit,) = parsed["units"]
    assert (unit["form"], unit["reference"], unit["verdict"]) == ("snapshot", "snapshots/net.snapshot", "fail")
    assert [each["tensor"] for each in unit["tensors"] if each["verdict"] == "differs"] == ["param:inner.weight"]
    accepted = gradctl("verify", "snapshots/net.snapshot", "scaled.py", "--allow", "GC311:param:inner.*", cwd=folder)
    assert accepted.returncode == 0


def test_the_options_of_the_target_are_kept(folder, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    options = ("--arg", "width=5", "--input", "f32[2,40]", "--loss", "squared", "--train", "--seed", "3")
    assert gradctl("snapshot", "net.py", *options, "-o", "net.snapshot", cwd=tmp_path).returncode == 0
    header = json.loads((tmp_path / "net.snapshot").read_text().splitlines()[0])
    assert header["options"] == {
        "target": "net.py",
        "arguments": ["width=5"],
        "input_specs": ["f32[2,40]"],
        "inputs_file": None,
        "weights": None,
        "training": True,
        "loss": "squared",
    }
    assert (header["seed"], header["draws"][0]) == (3, 10)
    finished = gradctl("verify", "net.snapshot", cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (0, "PASS: 5 gradients agree with net.snapshot\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("snapshot", "net.py", "-o", "a", "--full", "--no-values"),
            "--full stores every tensor, and --no-values none",
        ),
        (("snapshot", "net.py", "-o", "a", "--device", "cuda"), "a snapshot is taken on the CPU."),
        (("snapshot", "net.py"), "Missing option '-o' / '--output'."),
        (("snapshot", "net.py", "-o", "no/folder/a"), "no/folder/a' cannot be written: there is no folder"),
        (("snapshot", "not.py", "-o", "a"), "GC101 there is no file 'not.py' (did you mean 'net.py'?)"),
        (("verify", "snapshots/nett.snapshot"), "GC133 there is no file 'snapshots/nett.snapshot' (did you mean"),
        (("verify", "net.py"), "GC133 net.py is not a snapshot: its first line is not a header."),
        (
            ("verify", "snapshots/net.snapshot", "--update", "--dtype", "bf16"),
            "--update rewrites what the CPU computes.",
        ),
        (("verify", "snapshots/net.snapshot", "net.py:squared"), "GC134 net.py:squared is not the model of"),
        (("verify", "snapshots/net.snapshot", "no.py"), "GC101 there is no file 'no.py'"),
    ],
)
def test_bad_input_is_one_sentence(folder, arguments, said):
    finished = gradctl(*arguments, cwd=folder)
    assert finished.returncode == 2
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_target_that_moved_is_said(folder, tmp_path):
    for file in (folder / "snapshots").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    finished = gradctl("verify", "net.snapshot", cwd=tmp_path)
    assert finished.returncode == 2
    assert "GC101 there is no file '../net.py'" in finished.stderr
