"""``--form ddp:2`` and its like on the command line: of compare, gradcheck and check, with their exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.command_line import gradctl

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")

SAMPLES = Path(__file__).parents[3] / "sample_models"


def test_the_sample_transformer_passes_on_two_ranks_in_three_forms():
    forms = ("--form", "ddp:2", "--form", "fsdp:2", "--form", "tp:2")
    finished = gradctl("compare", SAMPLES / "transformer.py", *forms)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "PASS: 4 of 4 forms agree" in finished.stdout


def test_a_missing_reduction_fails_with_its_parameters():
    finished = gradctl("compare", SAMPLES / "missing_reduction.py", "--form", "ranks:2", "--format", "json")
    assert finished.returncode == 1
    _, ranks = json.loads(finished.stdout)["units"]
    assert ranks["reference"] == "one process"
    assert {each["tensor"] for each in ranks["findings"]} == {"param:0.bias", "param:2.bias"}


def test_gradcheck_compares_the_gradient_of_ranks_with_finite_differences():
    assert gradctl("gradcheck", SAMPLES / "transformer.py", "--form", "fsdp:2").returncode == 0
    finished = gradctl("gradcheck", SAMPLES / "missing_reduction.py", "--form", "ranks:2")
    assert finished.returncode == 1
    assert "2 of 5 gradients are wrong" in finished.stdout


def test_check_runs_the_ranks_of_a_configuration(tmp_path):
    path = (SAMPLES / "missing_reduction.py").as_posix()
    own = 'forms = ["ddp:2", "ranks:2"]\nexpect = {"ranks:2" = "fail"}'
    (tmp_path / "gradctl.toml").write_text(f'[[targets]]\ntarget = "{path}"\n{own}\n')
    finished = gradctl("check", cwd=tmp_path)
    assert finished.returncode == 0
    assert "PASS: 1 of 2 forms agrees, 1 as expected" in finished.stdout


@pytest.mark.parametrize("form", ["ddp", "ddp:1", "ddp:99", "dp:2"])
def test_another_number_of_ranks_is_a_usage_error(form):
    finished = gradctl("compare", SAMPLES / "mlp.py", "--form", form)
    assert finished.returncode == 2
    assert "ddp:N, fsdp:N, tp:N, ranks:N (N ranks, 2 to 8)" in " ".join(finished.stderr.split())


def test_what_cannot_run_on_ranks_is_said_in_one_sentence(tmp_path):
    finished = gradctl("compare", SAMPLES / "mlp.py", "--form", "tp:2")
    assert finished.returncode == 4
    assert "unsupported: the target states no plan of tensor parallelism." in " ".join(finished.stdout.split())


def test_sizes_of_the_batch_are_compared_and_too_small_ones_listed():
    finished = gradctl("compare", SAMPLES / "transformer.py", "--form", "ddp:2", "--sizes", "batch=1,4")
    assert finished.returncode == 0
    assert "batch=1 (the inputs have a batch of 1, and there are 2 ranks." in " ".join(finished.stdout.split())


@pytest.mark.parametrize("command", ["compare", "check"])
def test_gpus_are_hidden_from_ranks_before_autograd_starts_threads_for_them(tmp_path, command):
    model = (
        "import os\nfrom torch import nn, randn\n\n\ndef make_model():\n"
        "    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''\n    return nn.Linear(4, 3)\n\n\n"
        "def example_inputs():\n    return (randn(4, 4),)\n"
    )
    (tmp_path / "net.py").write_text(model)
    finished = gradctl(command, tmp_path / "net.py", "--form", "ddp:2", cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout
