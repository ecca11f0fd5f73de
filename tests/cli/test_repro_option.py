"""``--repro DIR`` on the command line: where programs lie is said on the screen and in JSON."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.command_line import gradctl

MODELS = Path(__file__).parents[2] / "sample_models"


def test_the_report_says_where_a_program_lies_and_an_old_one_is_replaced_whole(tmp_path):
    old = tmp_path / "bugs" / "gc408-eager-LeakyReLU"
    old.mkdir(parents=True)
    (old / "left_over.txt").write_text("", encoding="utf-8")
    report = tmp_path / "report.json"
    finished = gradctl(
        "gradcheck", MODELS / "wrong_backward.py", "--repro", "bugs", "--report", f"json={report}", cwd=tmp_path
    )
    assert finished.returncode == 1, finished.stderr
    assert "  repro: bugs/gc408-eager-LeakyReLU/repro.py\n" in finished.stdout
    (unit,) = json.loads(report.read_text(encoding="utf-8"))["units"]
    repros = {finding["code"]: finding["repro"] for finding in unit["findings"]}
    assert repros == {"GC408": "bugs/gc408-eager-LeakyReLU/repro.py", "GC401": None}
    assert {path.name for path in old.iterdir()} == {"repro.py", "tensors.safetensors", "source"}
    assert [path.name for path in (tmp_path / "bugs").iterdir()] == [old.name]


def test_a_pass_writes_nothing(tmp_path):
    finished = gradctl("gradcheck", MODELS / "linear.py", "--repro", "bugs", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_captured_anew(tmp_path):
    finished = gradctl("compare", MODELS / "mlp.py", "mlp.pt2", "--repro", "bugs", cwd=tmp_path)
    assert finished.returncode == 2
    assert "--repro applies to forms, not to a FILE" in finished.stderr
