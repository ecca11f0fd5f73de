"""What ``trace`` and ``export`` share: writing a verified file, and the report below what it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradctl.cli.options import TargetOptions, free_sizes_from, subject_from
from gradctl.cli.reporting import ReportOptions, emit, progress_line
from gradctl.cli.users_code import users_code

if TYPE_CHECKING:
    from gradctl.commands.capture_to_file import Written

__all__ = ["write_and_emit"]


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

    Args:
        write: takes subject and output; torch is imported when it is called.
        output: where the file is to be.
        checking: what is captured.
        reporting: where the report goes.
        dynamic: ``--dynamic`` as given.
        options: for ``write``.
    """
    with progress_line() as progress:
        progress("importing torch")
        from gradctl.core.allows import Allows
        from gradctl.core.assembly import report_of
        from gradctl.report.text.inspection import summary

        free = free_sizes_from(dynamic)
        allows = Allows(reporting.allows)
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
