"""``gradctl trace`` as a process: exit codes, both streams, and what lies in the folder afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.command_line import gradctl
from tests.sweeps import sampled

SAMPLES = Path(__file__).parents[3] / "sample_models"
SUFFIX = {"trace": ".pt", "script": ".pt", "export": ".pt2"}

# What each form takes of the sample models, and keeps outputs, gradients and state of.
AGREE = [
    *(
        (sample, form)
        for sample in ("linear", "mlp", "resnet", "transformer", "gru", "tied_weights")
        for form in SUFFIX
    ),
    ("no_grad_inside", "export"),
    ("straight_through_detach", "trace"),
    ("straight_through_detach", "export"),
]


# Each form, and the two of which one form alone, or only two, keep the gradients.
ALWAYS = [("resnet", "trace"), ("gru", "script"), ("transformer", "export"), *AGREE[-3:]]


@pytest.mark.parametrize(("sample", "form"), sampled(AGREE, 2, always=ALWAYS))
def test_a_sample_that_the_form_takes_is_written(sample, form, tmp_path):
    output = tmp_path / f"{sample}{SUFFIX[form]}"
    finished = gradctl("trace", SAMPLES / f"{sample}.py", "--form", form, "-o", output)
    assert (finished.returncode, finished.stderr) == (0, "")
    *_, written, empty, verdict = finished.stdout.splitlines()
    assert (written, empty) == (f"{output} is written", "")
    assert verdict.startswith("PASS: ")
    assert [file.name for file in tmp_path.iterdir()] == [output.name]


@pytest.mark.parametrize(
    ("sample", "form", "code"),
    [
        ("no_grad_inside", "trace", "GC201"),
        ("straight_through", "export", "GC204"),
        ("gradient_reversal", "export", "GC204"),
        ("control_flow", "trace", "GC205"),
    ],
)
def test_a_sample_that_the_form_changes_is_not_written(sample, form, code, tmp_path):
    output = tmp_path / f"{sample}{SUFFIX[form]}"
    output.write_text("older")
    finished = gradctl("trace", SAMPLES / f"{sample}.py", "--form", form, "-o", output)
    assert finished.returncode == 1
    assert f"{output} is not written\n" in finished.stdout
    assert f"error {code} " in finished.stdout
    assert finished.stdout.splitlines()[-1].startswith("FAIL: ")
    assert output.read_text() == "older"
    assert [file.name for file in tmp_path.iterdir()] == [output.name]


def test_the_summary_of_a_trace(tmp_path):
    finished = gradctl("trace", SAMPLES / "mlp.py", "-o", "mlp.pt", cwd=tmp_path)
    assert finished.stdout.splitlines()[:3] == [
        "6 parameters, 6922 elements; 0 buffers; 27.7 kB",
        "5 operators: linear 3, relu 2",
        "mlp.pt is written",
    ]


def test_the_guards_of_an_export_with_a_free_size(tmp_path):
    options = ("--form", "export", "--dynamic", "x:0=batch", "-o", "mlp.pt2")
    finished = gradctl("trace", SAMPLES / "mlp.py", *options, cwd=tmp_path)
    assert finished.returncode == 0
    assert finished.stdout.splitlines()[2].startswith("guards: s")


def test_a_file_that_differs_is_kept_where_that_is_asked_and_still_fails(tmp_path):
    options = ("-o", "net.pt", "--keep-unverified")
    finished = gradctl("trace", SAMPLES / "no_grad_inside.py", *options, cwd=tmp_path)
    assert finished.returncode == 1
    assert "net.pt is written, and not verified\n" in finished.stdout
    assert (tmp_path / "net.pt").stat().st_size > 0


def test_a_form_that_cannot_take_the_model_is_inconclusive_with_its_reason(tmp_path):
    finished = gradctl("trace", SAMPLES / "control_flow.py", "--form", "export", "-o", "net.pt2", cwd=tmp_path)
    assert finished.returncode == 4
    assert finished.stdout.startswith("NOT CAPTURED: torch.export refuses the model: ")
    assert list(tmp_path.iterdir()) == []


def test_the_report_as_json_has_one_unit_and_no_other_words(tmp_path):
    finished = gradctl("trace", SAMPLES / "mlp.py", "-o", "mlp.pt", "--format", "json", cwd=tmp_path)
    report = json.loads(finished.stdout)
    assert (report["command"], report["verdict"]) == ("trace", "pass")
    assert [unit["form"] for unit in report["units"]] == ["trace"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "Error: Missing option '-o' / '--output'."),
        (("-o", "m.pt", "--dynamic", "x:0=batch"), "Error: --dynamic applies to --form export, not to --form trace."),
        (("-o", "m.pt2"), "Error: m.pt2: --form trace writes .pt or .pth or .ts."),
        (("-o", "m.pt", "--form", "export"), "Error: m.pt: --form export writes .pt2."),
        (
            ("-o", "m.pt2", "--form", "export", "--dynamic", "x=batch"),
            "Error: --dynamic 'x=batch' is not NAME:AXIS=SIZE, for example x:0=batch.",
        ),
        (
            ("-o", "m.pt2", "--form", "export", "--dynamic", "x:0=a", "--dynamic", "x:0=b"),
            "Error: --dynamic axis 0 of 'x' is named twice; name it once.",
        ),
        (
            ("-o", "m.pt2", "--form", "export", "--dynamic", "y:0=a"),
            "GC104 --dynamic names no input tensor 'y': x.",
        ),
        (
            ("-o", "no/such/m.pt"),
            "cannot be written: there is no folder",
        ),
    ],
)
def test_a_wrong_option_is_named(options, said, tmp_path):
    finished = gradctl("trace", SAMPLES / "mlp.py", *options, cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert said in finished.stderr
    assert list(tmp_path.iterdir()) == []
