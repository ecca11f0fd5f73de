"""``--bisect``: torch's own bisector names the part of its compiler that makes a wrong gradient."""

from __future__ import annotations

import os

import pytest
import torch

from gradctl.comparison.form_comparison import form_comparison
from gradctl.comparison.reference import Reference
from gradctl.core.findings import Finding
from gradctl.diagnosis.bisect import bisect_findings
from gradctl.forms.eager import capture
from gradctl.subject.subject import Subject
from tests.cli.command_line import gradctl
from tests.zoo.pooled import POOLED


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the bug needs two threads")
@pytest.mark.skipif(torch.__version__ >= "2.14", reason="pytorch 185509 is mended there")
def test_the_part_of_inductor_that_is_wrong_is_named(tmp_path):
    (tmp_path / "net.py").write_text(POOLED)
    finished = gradctl(
        "compare", "net.py", "--form", "compile", "--bisect", cwd=tmp_path, OMP_NUM_THREADS="2", COLUMNS="200"
    )
    assert finished.returncode == 1
    said = " ".join(finished.stdout.split())
    assert "torch's compiler bisector: backend inductor, subsystem" in said
    assert "at net.py:12, Pooled" in said


def test_what_is_no_error_is_not_bisected():
    note = Finding(code="GC415", severity="note", message="as it was.")
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))
    reference = Reference(Subject(target="test", model=torch.sin, args=(x,)), "leaf")
    captured = capture(reference.instance())
    assert bisect_findings([note], form_comparison(reference, captured)) == [note]
