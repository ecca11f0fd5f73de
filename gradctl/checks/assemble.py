"""From units to the report of a run: summary, verdict, environment, and allows that no longer apply."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

import msgspec
import torch

from gradctl import __version__
from gradctl.checks.allows import Allows
from gradctl.core.findings import Finding, Report, Tool, Unit
from gradctl.core.verdicts import run_verdict, summarise

__all__ = ["environment", "report_of"]


def report_of(command: str, units: Sequence[Unit], allows: Allows, *, seed: int, device: str = "cpu") -> Report:
    """Return the report of a run; an allow that accepted nothing is noted in its first unit."""
    unused = [
        Finding(
            code="GC150",
            severity="note",
            message=f"--allow {text} accepted nothing in this run.",
            hint="remove it: what it allowed is gone, or has another name.",
        )
        for text in allows.unused()
    ]
    if unused and units:
        units = [msgspec.structs.replace(units[0], findings=(*units[0].findings, *unused)), *units[1:]]
    verdicts = [unit.verdict for unit in units]
    return Report(
        tool=Tool(version=__version__),
        command=command,
        verdict=run_verdict(verdicts),
        seed=seed,
        environment=environment(device),
        units=tuple(units),
        allows=allows.allowances(),
        summary=summarise(verdicts),
    )


def environment(device: str) -> dict[str, str | int | None]:
    """Return versions, threads and device; None for a package that is not installed."""
    return {
        "torch": str(torch.__version__),
        "onnx": _version("onnx"),
        "onnxruntime": _version("onnxruntime"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": device,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
