"""``gradctl compare --steps`` on the command line."""

from __future__ import annotations

import json
import re

import pytest

from gradctl.rules.catalogue import page
from tests.cli.command_line import gradctl

MLP = "sample_models/mlp.py"


def test_the_table_has_a_line_for_each_variant():
    found = gradctl("compare", MLP, "--steps", 2, "--variant", "foreach", "--variant", "checkpoint", "--format", "json")
    assert found.returncode == 4, found.stderr
    foreach, checkpoint = json.loads(found.stdout)["units"]
    assert (foreach["form"], foreach["verdict"]) == ("foreach", "pass")
    assert foreach["training"]["steps"] == 2
    assert (checkpoint["form"], checkpoint["verdict"]) == ("checkpoint", "inconclusive")


@pytest.mark.parametrize("code", ["GC430", "GC431", "GC432", "GC433", "GC434", "GC143", "GC144", "GC145"])
def test_the_example_of_a_page_prints_what_the_page_says(code, tmp_path):
    source, command = re.findall("```(?:python|console)\n(.*?)```", page(code), re.DOTALL)
    (tmp_path / "net.py").write_text(source, encoding="utf-8")
    line, said = command.splitlines()
    found = gradctl(*line.removeprefix("$ gradctl ").split(), cwd=tmp_path)
    printed = " ".join((found.stdout + found.stderr).split())
    for part in said.split("…"):
        assert part.strip() in printed
    assert found.returncode == {"GC143": 5, "GC434": 0}.get(code, 1 if code >= "GC4" else 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((MLP, "--steps", "0"), "Error: Invalid value for '--steps': 0 is not in the range x>=1."),
        ((MLP, "--variant", "foreach"), "Error: --variant applies to training steps. Add --steps N."),
        ((MLP, "--optimizer", "sgd"), "Error: --optimizer applies to training steps. Add --steps N."),
        ((MLP, "--steps", "1", "--form", "trace"), "Error: --form does not apply to training steps. Omit"),
        ((MLP, "mlp.onnx", "--steps", "1"), "Error: --steps trains a TARGET, and mlp.onnx is a model file."),
        ((MLP, "--steps", "1", "--map", "a=b"), "Error: --map applies to another target as CANDIDATE,"),
        ((MLP, MLP, "--steps", "1", "--map", "a"), "Error: --map 'a' is not OLD=NEW"),
        ((MLP, "--steps", "1", "--optimizer", "adm"), "GC144 there is no optimizer 'adm' (did you mean 'adam'?)."),
        ((MLP, "--steps", "1", "--variant", "foreach:2"), "GC145 the variant foreach takes no argument,"),
        ((MLP, "--steps", "1", "--variant", f"{MLP}:nothing"), "GC145 sample_models/mlp.py has no 'nothing'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, said):
    found = gradctl("compare", *arguments)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.splitlines()[-1].startswith(said)


DRAWN_AT_START = """
import random

import torch
from torch import nn


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.scale = 1 + random.SystemRandom().random()

    def forward(self, x):
        return self.fc(x) * self.scale


def make_model():
    torch.manual_seed(0)
    return Scaled()


def example_inputs():
    return torch.ones(3, 4)
"""


def test_run_is_resumed_in_a_new_process_which_draws_its_own_numbers(tmp_path):
    (tmp_path / "net.py").write_text(DRAWN_AT_START, encoding="utf-8")
    found = gradctl("compare", "net.py", "--steps", 2, "--variant", "resume", "--format", "json", cwd=tmp_path)
    assert found.returncode == 1, found.stderr
    (unit,) = json.loads(found.stdout)["units"]
    assert unit["training"]["first_difference"] == 2
    (finding,) = (each for each in unit["findings"] if each["severity"] == "error")
    assert (finding["code"], finding["cause"]) == ("GC430", "GC439")
    assert "another one in a new process" in finding["cause_message"]


def test_process_that_cannot_continue_is_one_sentence(tmp_path):
    once = """
from pathlib import Path

if Path("loaded").exists():
    raise OSError("loaded before")
Path("loaded").touch()
"""
    (tmp_path / "net.py").write_text(DRAWN_AT_START + once, encoding="utf-8")
    found = gradctl("compare", "net.py", "--steps", 2, "--variant", "resume", cwd=tmp_path)
    assert "Traceback" not in found.stdout + found.stderr
    assert "the new process does not continue the run: " in " ".join(found.stdout.split())
