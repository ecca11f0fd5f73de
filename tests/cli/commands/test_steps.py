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
