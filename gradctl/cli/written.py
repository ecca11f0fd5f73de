"""What ``trace`` and ``export`` share: writing a verified file, and the report below what it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradctl.cli.options import free_sizes_from, subject_from
from gradctl.cli.reporting import ReportOptions, emit_units, judging
from gradctl.cli.users_code import users_code
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import TargetOptions

if TYPE_CHECKING:
    from gradctl.commands.capture_to_file import Written


def write_and_emit(
    write: Callable[..., Written],
    output: Path,
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    dynamic: tuple[str, ...],
    **options: Any,
) -> int:
    """Write a file, print what became of it, and return the exit code of its verdict.

    ``write`` takes the subject, ``output`` and ``options``; torch is imported when it is called.
    """
    ensure_files(checking)
    with judging(reporting) as (allows, progress):
        from gradctl.report.text.inspection import summary

        free = free_sizes_from(dynamic)
        written = write(
            subject_from(checking),
            output,
            dynamic=free,
            allows=allows,
            fail_on=reporting.fail_on,
            progress=progress,
            around=users_code,
            **options,
        )
    lines = [*summary(written.graph), _said(output, written), ""] if written.graph is not None else []
    return emit_units([written.unit], allows, checking, reporting, preface="".join(f"{line}\n" for line in lines))


def _said(output: Path, written: Written) -> str:
    if not written.written:
        return f"{output} is not written"
    return f"{output} is written" if written.unit.verdict == "pass" else f"{output} is written, and not verified"
