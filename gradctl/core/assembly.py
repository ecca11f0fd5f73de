"""From findings to a unit, and from units to the report of a run."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from gradctl import __version__
from gradctl.core.allows import Allows
from gradctl.core.findings import Allowance, Finding, Report, TensorResult, Tool, Unit, fingerprint
from gradctl.core.verdicts import run_verdict, summarise, unit_verdict


def make_unit(
    target: str,
    form: str,
    findings: Sequence[Finding],
    tensors: Iterable[TensorResult],
    *,
    allows: Allows,
    fail_on: str,
    **fields: Any,
) -> Unit:
    """Return a complete unit: findings with their fingerprints, those that are allowed marked, and the verdict."""
    accepted = tuple(
        each
        if each.fingerprint
        else msgspec.structs.replace(each, fingerprint=fingerprint(each.code, target, form, each.quantity, each.tensor))
        for each in allows.apply(findings)
    )
    tensors = tuple(tensors)
    verdict = unit_verdict("complete", accepted, tensors, fail_on)
    return Unit(target=target, form=form, verdict=verdict, tensors=tensors, findings=accepted, **fields)


def make_report(
    command: str, units: Sequence[Unit], allows: Allows, *, seed: int, device: str = "cpu", fail_on: str = "error"
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
    return assemble_report(command, units, allows.allowances(), seed=seed, device=device)


def assemble_report(
    command: str,
    units: Sequence[Unit],
    allowances: Sequence[Allowance],
    *,
    seed: int,
    device: str = "cpu",
    threads: int | None = None,
    planned: int | None = None,
) -> Report:
    """Return the report of units as they are.

    ``planned`` is how many there were to be if the run was interrupted, which is then no pass, whatever was checked.
    """
    interrupted = planned is not None
    verdicts = [unit.verdict for unit in units]
    verdict = run_verdict(verdicts)
    return Report(
        tool=Tool(version=__version__),
        command=command,
        status="interrupted" if interrupted else "complete",
        verdict="inconclusive" if interrupted and verdict != "fail" else verdict,
        planned=planned,
        seed=seed,
        environment=environment(device, threads),
        units=tuple(units),
        allows=tuple(allowances),
        summary=summarise(verdicts),
    )


def environment(device: str, threads: int | None = None) -> dict[str, str | int | None]:
    """Return versions, threads and device; None for a package that is not installed, and for threads as torch has them.

    Does not import torch: units that run in processes of their own import it there.
    """
    torch = sys.modules.get("torch")
    return {
        **{package: _version(package) for package in ("torch", "onnx", "onnxruntime")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads() if threads is None and torch is not None else threads,
        "device": device,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
