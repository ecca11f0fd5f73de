"""From findings to a unit, and from units to the report of a run."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gradctl import __version__
from gradctl.core.allows import Allows
from gradctl.core.findings import Allowance, Finding, Report, SourceExcerpt, TensorResult, Tool, Unit, fingerprint
from gradctl.core.verdicts import run_verdict, summarise, unit_verdict

# Lines of a source file before and after the one that a finding names.
_LINES_BEFORE, _LINES_AFTER = 4, 5
_MOST_EXCERPTS = 400
_LONGEST_LINE = 200
# Only these are shown: a finding can be located in a binary file too.
_SOURCES = (".py", ".pyi", ".cpp", ".cu", ".cuh", ".h")


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
        sources=_source_excerpts(named_places(units)),
    )


def named_places(units: Iterable[Unit]) -> list[tuple[str, int]]:
    """Return the places (file, line) that the findings of units name, each once."""
    locations = (each.location for unit in units for each in unit.findings if each.location is not None)
    return list(dict.fromkeys((each.file, each.line) for each in locations if each.file and each.line))


def _source_excerpts(places: Iterable[tuple[str, int]]) -> tuple[SourceExcerpt, ...]:
    """Return the lines around each place; files that cannot be read are left out."""
    excerpts: list[SourceExcerpt] = []
    for file, line in places:
        if len(excerpts) < _MOST_EXCERPTS and Path(file).suffix in _SOURCES and (excerpt := _excerpt(file, line)):
            excerpts.append(excerpt)
    return tuple(excerpts)


def _excerpt(file: str, line: int) -> SourceExcerpt | None:
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError):
        return None
    if not 1 <= line <= len(lines):
        return None
    first = max(1, line - _LINES_BEFORE)
    shown = [each[:_LONGEST_LINE] for each in lines[first - 1 : line + _LINES_AFTER]]
    return SourceExcerpt(file=file, line=line, first_line=first, lines=tuple(shown))


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
