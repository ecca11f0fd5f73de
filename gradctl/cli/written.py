"""What ``trace`` and ``export`` share: writing a verified file, and printing its contents and the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradctl.cli.help import option
from gradctl.cli.options import free_sizes_from, subject_from
from gradctl.cli.reporting import ReportOptions, emit_units, judging
from gradctl.cli.users_code import users_code
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import TargetOptions

if TYPE_CHECKING:
    from gradctl.commands.capture_to_file import Written

keep_unverified_option = option(
    "--keep-unverified", heading="Output", is_flag=True, help="Write FILE even if it does not agree with eager."
)


def write_and_emit(
    write: Callable[..., Written],
    output: Path,
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    dynamic: tuple[str, ...],
    **options: Any,
) -> int:
    """Write a file, print whether it is written, and return the exit code of its verdict.

    ``write`` is called with the subject, ``output`` and ``options``; torch is imported then.
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
    lines = [*summary(written.graph), _result(output, written), ""] if written.graph is not None else []
    return emit_units([written.unit], allows, checking, reporting, preface="".join(f"{line}\n" for line in lines))


def _result(output: Path, written: Written) -> str:
    unverified = "" if written.unit.verdict == "pass" else ", and not verified"
    return f"{output} is written{unverified}" if written.written else f"{output} is not written"
