from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

from gradctl.cli.options import subject_from, target_options
from gradctl.core.target_options import TargetOptions
from tests.cli.command_line import gradctl

NET = """
import torch
from torch import nn

print("imported, with", torch.get_num_threads(), "threads")


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        print("made")
        self.fc = nn.Linear(width, 2)

    def forward(self, x):
        return self.fc(x)


def square_loss(outputs):
    return outputs.square().sum()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


@click.command
@target_options
@click.option("--another")
def probe(checking, another):
    return checking, another


def parsed(*arguments):
    return probe.main(list(arguments), standalone_mode=False)


def test_all_options_reach_the_command():
    line = "net.py:Net --arg a=1 --arg b=2 --input x=f32[2] --input y=3 --inputs i.npz --weights w.pt --eval --loss l"
    checking, another = parsed(*line.split(), "--seed", "7", "--device", "cuda", "--threads", "2", "--another", "z")
    assert another == "z"
    assert checking == TargetOptions(
        target="net.py:Net",
        arguments=("a=1", "b=2"),
        input_specs=("x=f32[2]", "y=3"),
        inputs_file=Path("i.npz"),
        weights=Path("w.pt"),
        training=False,
        loss="l",
        seed=7,
        device="cuda",
        threads=2,
        command="probe",
    )


def test_what_is_not_given_is_left_open():
    checking, _ = parsed("net.py")
    assert checking == TargetOptions(target="net.py", command="probe")
    assert checking.training is None


@pytest.mark.parametrize(("option", "training"), [("--train", True), ("--eval", False)])
def test_a_mode_is_one_of_two(option, training):
    assert parsed("net.py", option)[0].training is training


def test_a_target_is_needed():
    with pytest.raises(click.MissingParameter, match="target"):
        parsed()


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_threads_are_at_least_one(threads):
    with pytest.raises(click.BadParameter):
        parsed("net.py", "--threads", threads)


def test_the_subject_is_what_the_options_say(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # put back with all that loading adds
    checking = TargetOptions("net.py", ("width=3",), ("x=f32[5,3]@0..1",), loss="square_loss", training=False, seed=4)
    subject = subject_from(checking)
    assert subject.model.fc.in_features == 3
    assert subject.args[0].shape == (5, 3)
    assert (subject.seed, subject.model.training) == (4, False)
    assert subject.loss(torch.tensor([3.0])) == 9


def test_what_the_users_code_prints_is_not_the_report(folder):
    line = ["net.py", "--arg", "width=3", "--input", "x=f32[5,3]", "--threads", "1", "--format", "json"]
    process = gradctl("gradcheck", *line, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["verdict"] == "pass"
    assert "imported, with 1 threads\nmade\n" in process.stderr


def test_a_mistake_ends_with_code_two_and_one_sentence(folder):
    process = gradctl("gradcheck", "net.py", "--arg", "widht=3", cwd=folder)
    assert process.returncode == 2
    assert process.stdout == ""
    said = "GC108 Net has no argument 'widht' (did you mean 'width'?). It takes width.\n"
    assert process.stderr == f"imported, with {torch.get_num_threads()} threads\n{said}"


def test_the_options_do_not_import_torch():
    code = "import sys, gradctl.cli.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("seconds", ["nan", "inf", "1e12"])
@pytest.mark.parametrize(
    ("command", "flag"), [("check", "--timeout"), ("compare", "--timeout"), ("bench", "--seconds")]
)
def test_a_time_that_is_not_finite_or_too_long_is_refused(command, flag, seconds, folder):
    finished = gradctl(command, "net.py", flag, seconds, cwd=folder)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith(f"Error: Invalid value for '{flag}': ")


def test_more_threads_than_a_system_starts_are_refused(folder):
    for command in ("compare", "bench"):
        finished = gradctl(command, "net.py", "--threads", "100000", cwd=folder)
        assert (finished.returncode, "is not in the range 1<=x<=1024" in finished.stderr) == (2, True)
