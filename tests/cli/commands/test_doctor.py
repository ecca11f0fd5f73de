"""``gradctl doctor``: what is here, and what is missing with its reason; never a traceback."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from gradctl import __version__
from gradctl.commands.doctor import examine
from tests.cli.command_line import gradctl

RUNTIMES = ["openvino", "openvino-joint", "executorch", "executorch-joint"]
FORMS = ["eager", "trace", "script", "export", "aot", "compile", "onnx", "export-joint", "onnx-joint", *RUNTIMES]
OF_ONNX = ["onnx", "onnx-joint", "openvino", "openvino-joint"]


@pytest.fixture(scope="module")
def examined():
    finished = gradctl("doctor", "--format", "json")
    assert (finished.returncode, finished.stderr) == (0, "")
    return json.loads(finished.stdout)


@pytest.mark.parametrize("package", ["torch", "onnx", "onnxruntime", "onnxscript", "numpy"])
def test_the_version_of_a_package_is_the_installed_one(examined, package):
    assert examined["versions"][package] == importlib.metadata.version(package)


def test_gradctl_and_python_have_their_versions(examined):
    assert (examined["versions"]["gradctl"], examined["versions"]["python"]) == (__version__, platform.python_version())


def test_threads_and_devices_are_those_of_torch(examined):
    assert examined["threads"] == torch.get_num_threads()
    assert examined["devices"][0] == "cpu"
    assert len(examined["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()


def test_every_form_has_an_answer_and_a_reason(examined):
    assert list(examined["forms"]) == FORMS
    assert examined["forms"]["eager"] == {"available": True, "reason": f"torch {torch.__version__}"}
    assert all(can["reason"] for can in examined["forms"].values())


@pytest.mark.parametrize("form", RUNTIMES)
def test_a_runtime_is_there_or_the_line_that_installs_it(examined, form):
    package = form.removesuffix("-joint")
    try:
        expected = {"available": True, "reason": f"{package} {importlib.metadata.version(package)}"}
    except importlib.metadata.PackageNotFoundError:
        missing = f"{package} is not installed: pip install 'gradctl[{package}]'"
        expected = {"available": False, "reason": missing}
    assert examined["forms"][form] == expected


def test_triton_is_missing_or_runs_here(examined):
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        assert examined["triton"] == "missing; pip install 'gradctl[triton]' runs Triton kernels on the CPU"
    else:
        where = "on the GPU" if torch.cuda.is_available() else "on the CPU, by its interpreter"
        assert examined["triton"] == f"{version}, kernels run {where}"


def test_the_console_says_the_same(examined):
    screen = gradctl("doctor").stdout
    assert f"torch        {torch.__version__.partition('+')[0]}" in screen
    assert [line.split()[0] for line in screen.splitlines()[-len(FORMS) :]] == FORMS
    assert max(map(len, screen.splitlines())) <= 120


def test_without_a_compiler_inductor_cannot_run_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    machine = examine()
    assert machine.compiler is None
    assert machine.forms["compile"].available is False
    assert machine.forms["compile"].reason.startswith("inductor needs a C++ compiler: none of ")
    assert machine.forms["compile"].reason.endswith(" is on PATH, and CXX is not set")
    assert machine.forms["aot"].available


def test_the_compiler_that_is_named_is_taken(monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("true"))
    assert examine().compiler == shutil.which("true")


@pytest.mark.parametrize(
    ("package", "error", "without", "reason"),
    [
        ("torch", "ImportError('libtorch.so: not found')", FORMS, "torch cannot be imported: libtorch.so: not found"),
        ("onnxscript", "ValueError('broken\\nmore')", OF_ONNX, "onnxscript cannot be imported: broken"),
        pytest.param(
            *("onnxruntime", "OSError('no file')", OF_ONNX, "onnxruntime cannot be imported: no file"),
            marks=pytest.mark.slow,  # what imports onnxscript imports it too
        ),
    ],
)
def test_a_package_that_is_broken_is_a_reason_and_no_traceback(tmp_path, package, error, without, reason):
    broken = tmp_path / package
    broken.mkdir()
    (broken / "__init__.py").write_text(f"raise {error}")
    finished = gradctl("doctor", "--format", "json", PYTHONPATH=str(tmp_path))
    assert (finished.returncode, finished.stderr) == (0, "")
    forms = json.loads(finished.stdout)["forms"]
    assert [form for form, can in forms.items() if can == {"available": False, "reason": reason}] == without


def test_a_package_whose_import_ends_the_process_is_a_reason_too(tmp_path):
    (tmp_path / "onnxscript.py").write_text("import os\nos.abort()")
    finished = gradctl("doctor", "--format", "json", PYTHONPATH=str(tmp_path))
    assert (finished.returncode, finished.stderr) == (0, "")
    forms = json.loads(finished.stdout)["forms"]
    said = "importing onnx, onnxscript, onnxruntime ended the process with exit code -6"
    assert [form for form, can in forms.items() if can == {"available": False, "reason": said}] == OF_ONNX


def test_the_process_that_prints_imports_neither_onnx_nor_what_compiles():
    script = (
        "import sys; from gradctl.commands.doctor import examine; examine(); "
        "print([name for name in ('onnx', 'onnxscript', 'onnxruntime', 'torch._inductor.compile_fx') "
        "if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"
