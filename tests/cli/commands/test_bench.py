"""``gradctl bench`` as a command: one row for each form, whatever its process does."""

from __future__ import annotations

import json

import pytest

from tests.cli.command_line import gradctl

CRASHING = """
import os, signal
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if torch.jit.is_tracing():
            os.kill(os.getpid(), signal.SIGSEGV)
        return self.fc(x)

def make_model():
    return Net()

def example_inputs():
    return (torch.ones(2, 4),)
"""

BRANCHING = (
    CRASHING.partition("        if torch.jit")[0]
    + """
        return self.fc(x) * 2 if x[0, 0] > 0 else self.fc(x)
"""
    + CRASHING.partition("return self.fc(x)")[2]
)


def test_a_form_that_crashes_ends_its_row_only(tmp_path):
    (tmp_path / "net.py").write_text(CRASHING)
    options = ("--seconds", 0.1, "--form", "trace", "--form", "export", "--format", "json")
    finished = gradctl("bench", "net.py", *options, cwd=tmp_path)
    assert finished.returncode == 4, finished.stderr
    units = {each["form"]: each for each in json.loads(finished.stdout)["units"]}
    assert {form: (each["status"], each["verdict"]) for form, each in units.items()} == {
        "eager": ("complete", "pass"),
        "trace": ("crashed", "inconclusive"),
        "export": ("complete", "pass"),
    }
    (crashed,), (measured,) = units["trace"]["measurements"], units["export"]["measurements"]
    assert (crashed["status"], crashed["forward"]) == ("crashed", None)
    assert "SIGSEGV" in crashed["reason"]
    assert measured["training_ratio"]["median"] > 0


@pytest.mark.slow
def test_each_batch_size_is_a_row_and_the_wrong_form_is_named_first(tmp_path):
    (tmp_path / "net.py").write_text(BRANCHING)
    finished = gradctl("bench", "net.py", "--seconds", 0.1, "--form", "trace", "--batch", "1,3", cwd=tmp_path)
    assert finished.returncode == 1, finished.stderr
    rows = [line.split()[:3] for line in finished.stdout.splitlines()]
    for batch in ("batch=1", "batch=3"):
        assert ["eager", batch, "yes"] in rows
        assert ["trace", batch, "WRONG"] in rows
    assert "FAIL: 1 of 2 forms" in finished.stdout


@pytest.mark.parametrize("value", ["0", "1,x", "-1", ""])
def test_a_batch_that_is_no_list_of_sizes_is_a_usage_error(value):
    finished = gradctl("bench", "sample_models/mlp.py", "--batch", value)
    assert finished.returncode == 2
    assert f"{value!r} is not a list of positive numbers. Write, for example, 1,8,64." in finished.stderr


def test_a_target_that_does_not_exist_ends_the_command():
    finished = gradctl("bench", "sample_models/mpl.py")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "GC101 there is no file 'sample_models/mpl.py' (did you mean 'mlp.py'?)" in finished.stderr


@pytest.mark.parametrize(
    ("body", "exit_code", "said"),
    [
        ("x[:, 9]", 2, "GC111 net.py raises on x=f32[2,4]: IndexError"),
        ("x.argmax(-1)", 5, "GC110 net.py has no differentiable leaf"),
    ],
)
def test_what_keeps_eager_from_running_ends_the_command_and_is_said_once(body, exit_code, said, tmp_path):
    dtype = "float" if exit_code == 2 else "int64"
    lines = ["import torch", "def make_model():", f"    return lambda x: {body}", "def example_inputs():"]
    (tmp_path / "net.py").write_text("\n".join([*lines, f"    return (torch.ones(2, 4, dtype=torch.{dtype}),)"]))
    finished = gradctl("bench", "net.py", "--seconds", 0.1, cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (exit_code, ""), finished.stderr
    assert finished.stderr.count(said) == 1
