"""What a machine can run. Each package is tried by itself: one that is missing or broken hides no other.

``torch._dynamo.is_dynamo_supported`` is private to torch (seen in 2.10 to 2.14).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from gradctl import __version__
from gradctl.core.names import FORMS, RUNTIME_FORMS

_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy", "safetensors")
_OF_ONNX = ("onnx", "onnxscript", "onnxruntime")
_IMPORT = "import sys; from gradctl.commands.doctor import import_failure; print(import_failure(*sys.argv[1:]))"
_COMPILERS = ("cl",) if sys.platform == "win32" else ("g++", "clang++", "c++")


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a form can run here, and the reason."""

    available: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Machine:
    """Versions (None if a package is missing), threads (None without torch), devices, the C++ compiler, where Triton
    kernels run, and forms.
    """

    versions: dict[str, str | None]
    platform: str
    threads: int | None
    devices: tuple[str, ...]
    compiler: str | None
    triton: str
    forms: dict[str, Availability]


def examine() -> Machine:
    """Return what this machine can run; a missing or broken package raises nothing."""
    # The packages of ONNX take a second to import: another process does that while torch is imported here.
    command = [sys.executable, "-P", "-c", _IMPORT, *_OF_ONNX]
    same_path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdout=pipe, stderr=nowhere, text=True, env=same_path) as of_onnx:
        failure = import_failure("torch")
        torch = None if failure else importlib.import_module("torch")
        compiler = _compiler()
        forms = _forms(torch, failure, compiler, of_onnx)
    return Machine(
        versions={"gradctl": __version__, "python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
        platform=platform.platform(),
        threads=_answer(lambda: int(torch.get_num_threads())) if torch else None,
        devices=_devices(torch),
        compiler=compiler,
        triton=_triton(torch),
        forms=forms,
    )


def import_failure(*packages: str) -> str:
    """Return why one of the packages cannot be imported, the first in order; or an empty string."""
    for package in packages:
        if failure := _failure(partial(importlib.import_module, package)):
            return f"{package} cannot be imported: {failure}"
    return ""


def _failure(attempt: Callable[[], Any]) -> str:
    """Return the first line of what is raised: a broken package may raise anything; or an empty string."""
    try:
        attempt()
    except Exception as error:
        return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return ""


def _forms(torch: Any, failure: str, compiler: str | None, of_onnx: subprocess.Popen[str]) -> dict[str, Availability]:
    if not torch:
        return dict.fromkeys(FORMS, Availability(False, failure))
    dynamo = _dynamo(torch)
    onnx = _onnx(of_onnx) if dynamo.available else dynamo
    return {
        "eager": Availability(True, f"torch {torch.__version__}"),
        "trace": _torchscript(lambda: torch.jit.trace(torch.nn.Identity(), torch.ones(1))),
        "script": _torchscript(lambda: torch.jit.script(torch.nn.Identity())),
        "export": dynamo,
        "aot": dynamo,
        "compile": _inductor(compiler) if dynamo.available else dynamo,
        "onnx": onnx,
        "export-joint": dynamo,
        "onnx-joint": onnx,
        **{form: _runtime(form.removesuffix("-joint"), onnx) for form in RUNTIME_FORMS if "openvino" in form},
        **{form: _runtime(form.removesuffix("-joint"), dynamo) for form in RUNTIME_FORMS if "executorch" in form},
    }


def _torchscript(attempt: Callable[[], Any]) -> Availability:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, which is no reason here
        failure = _failure(attempt)
    return Availability(not failure, f"TorchScript: {failure}" if failure else "TorchScript works")


def _dynamo(torch: Any) -> Availability:
    if failure := _failure(lambda: importlib.import_module("torch._dynamo").is_dynamo_supported):
        return Availability(False, f"Dynamo cannot be loaded: {failure}")
    supported, version = torch._dynamo.is_dynamo_supported(), platform.python_version()
    return Availability(supported, f"Dynamo {'supports' if supported else 'does not support'} Python {version}")


def _inductor(compiler: str | None) -> Availability:
    missing = f"inductor needs a C++ compiler: none of {', '.join(_COMPILERS)} is on PATH, and CXX is not set"
    return Availability(compiler is not None, f"inductor with {compiler}" if compiler else missing)


def _onnx(of_onnx: subprocess.Popen[str]) -> Availability:
    failure = of_onnx.communicate()[0].strip()
    if of_onnx.returncode:
        failure = f"importing {', '.join(_OF_ONNX)} ended the process with exit code {of_onnx.returncode}"
    return Availability(not failure, failure or f"onnxruntime {_version('onnxruntime')}")


def _runtime(package: str, needed: Availability) -> Availability:
    if not needed.available:
        return needed
    version = _version(package)  # it is not imported, which takes seconds
    missing = f"{package} is not installed: pip install 'gradctl[{package}]'"
    return Availability(version is not None, missing if version is None else f"{package} {version}")


def _devices(torch: Any) -> tuple[str, ...]:
    """Return ``cpu`` and the other devices on which torch can compute here."""
    if not torch:
        return ()
    cuda = _answer(lambda: [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())])
    mps = _answer(lambda: ["mps"] if torch.backends.mps.is_available() else [])
    return ("cpu", *(cuda or []), *(mps or []))


def _triton(torch: Any) -> str:
    """Return where Triton kernels run: ``subject/loading/triton_interpreter.py`` decides as this."""
    version = _version("triton")
    if version is None:
        return "missing; pip install 'gradctl[triton]' runs Triton kernels on the CPU"
    has_gpu = torch and _answer(lambda: torch.cuda.is_available() or torch.xpu.is_available())
    return f"{version}, kernels run {'on the GPU' if has_gpu else 'on the CPU, by its interpreter'}"


def _compiler() -> str | None:
    """Return the C++ compiler that inductor uses: ``CXX``, else the first on PATH."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, _COMPILERS)), None)


def _version(package: str) -> Any:
    return _answer(lambda: importlib.metadata.version(package))


def _answer(question: Callable[[], Any]) -> Any:
    """Return an answer, or None: a driver or package that is half installed may raise anything."""
    try:
        return question()
    except Exception:
        return None
