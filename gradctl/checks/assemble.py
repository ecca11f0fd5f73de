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
from gradctl.core.verdicts import run_verdict, summarise, unit_verdict

__all__ = ["environment", "report_of"]


def report_of(
    command: str,
    units: Sequence[Unit],
    allows: Allows,
    *,
    seed: int,
    device: str = "cpu",
    fail_on: str = "error",
) -> Report:
    """Return the report of a run; an allow that accepted nothing is noted in its first unit, which ``note`` fails."""
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
        first, findings = units[0], (*units[0].findings, *unused)
        verdict = unit_verdict(first.status, findings, first.tensors, fail_on)
        units = [msgspec.structs.replace(first, findings=findings, verdict=verdict), *units[1:]]
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
