"""The end that ``trace`` and ``export`` share: the report, below what the file holds and whether it is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gradctl.cli.options import TargetOptions
from gradctl.cli.reporting import ReportOptions, emit

if TYPE_CHECKING:
    from gradctl.checks.allows import Allows
    from gradctl.checks.written import Written

__all__ = ["emit_written"]


def emit_written(
    written: Written, output: Path, allows: Allows, checking: TargetOptions, reporting: ReportOptions
) -> int:
    """Print what became of ``output``, and return the exit code of its verdict."""
    from gradctl.checks.assemble import report_of
    from gradctl.report.inspection import summary

    report = report_of(
        checking.command, [written.unit], allows, seed=checking.seed, device=checking.device, fail_on=reporting.fail_on
    )
    if written.graph is None:
        return emit(report, reporting)
    lines = [*summary(written.graph), _said(output, written), ""]
    return emit(report, reporting, preface="".join(f"{line}\n" for line in lines))


def _said(output: Path, written: Written) -> str:
    if not written.written:
        return f"{output} is not written"
    return f"{output} is written" if written.unit.verdict == "pass" else f"{output} is written, and not verified"
