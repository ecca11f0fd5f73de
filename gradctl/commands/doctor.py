"""What a machine can run: asked of the packages themselves, each question on its own, so that one answer that is
missing takes no other with it. ``torch._dynamo.is_dynamo_supported`` is private to torch (seen in 2.10 to 2.14).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gradctl import __version__
from gradctl.core.names import FORMS

_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy", "safetensors")
_COMPILERS = ("cl",) if sys.platform == "win32" else ("g++", "clang++", "c++")


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a form can run here, and why (not)."""

    available: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found. A version is None where the package is missing; threads are None without torch."""

    versions: dict[str, str | None]
    platform: str
    threads: int | None
    devices: tuple[str, ...]
    compiler: str | None
    forms: dict[str, Availability]

    def as_mapping(self) -> dict[str, Any]:
        """Return the same as plain mappings, for JSON."""
        return asdict(self)


def examine() -> Machine:
    """Return what this machine can run; nothing that is missing or broken raises."""
    torch, why_no_torch = _imported("torch")
    compiler = _compiler()
    return Machine(
        versions={"gradctl": __version__, "python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
        platform=platform.platform(),
        threads=_answer(lambda: int(torch.get_num_threads())) if torch else None,
        devices=_devices(torch),
        compiler=compiler,
        forms=_forms(torch, why_no_torch, compiler),
    )


def _forms(torch: Any, why_no_torch: str, compiler: str | None) -> dict[str, Availability]:
    if not torch:
        missing = Availability(False, f"torch cannot be imported: {why_no_torch}")
        return dict.fromkeys(FORMS, missing)
    dynamo = _dynamo(torch)
    onnx = _onnx() if dynamo.available else dynamo
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
    }


def _torchscript(attempt: Callable[[], Any]) -> Availability:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, which is no reason here
            attempt()
    except Exception as error:
        return Availability(False, f"TorchScript: {_first_line(error)}")
    return Availability(True, "TorchScript works")


def _dynamo(torch: Any) -> Availability:
    try:
        importlib.import_module("torch._dynamo")
        supported = torch._dynamo.is_dynamo_supported()
    except Exception as error:
        return Availability(False, f"Dynamo cannot be loaded: {_first_line(error)}")
    version = platform.python_version()
    return Availability(supported, f"Dynamo {'supports' if supported else 'does not support'} Python {version}")


def _inductor(compiler: str | None) -> Availability:
    if compiler is None:
        return Availability(
            False, f"inductor needs a C++ compiler: none of {', '.join(_COMPILERS)} on PATH, CXX not set"
        )
    return Availability(True, f"inductor with {compiler}")


def _onnx() -> Availability:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        module, why = _imported(package)
        if not module:
            return Availability(False, f"{package} cannot be imported: {why}")
    return Availability(True, f"onnxruntime {_version('onnxruntime')}")


def _devices(torch: Any) -> tuple[str, ...]:
    """Return ``cpu`` and what else torch can compute on here."""
    if not torch:
        return ()
    cuda = _answer(lambda: [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())])
    mps = _answer(lambda: ["mps"] if torch.backends.mps.is_available() else [])
    return ("cpu", *(cuda or []), *(mps or []))


def _compiler() -> str | None:
    """Return the C++ compiler that inductor would take: ``CXX``, else the first on PATH."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, _COMPILERS)), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _imported(package: str) -> tuple[Any, str]:
    """Return the module and no reason, or None and why it cannot be imported; a broken package raises anything."""
    try:
        return importlib.import_module(package), ""
    except Exception as error:
        return None, _first_line(error)


def _answer(question: Callable[[], Any]) -> Any:
    """Return an answer of torch, or None: a driver that is half installed may raise anything."""
    try:
        return question()
    except Exception:
        return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
