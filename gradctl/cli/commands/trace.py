"""``gradctl trace``: a static form in a file, verified against eager before it takes its place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradctl.cli.options import dynamic_option, target_options
from gradctl.cli.reporting import ReportOptions, report_options
from gradctl.cli.written import write_and_emit
from gradctl.core.target_options import TargetOptions

if TYPE_CHECKING:
    from gradctl.commands.capture_to_file import Written

_FORMS = ("trace", "script", "export")
_SUFFIXES = {"trace": (".pt", ".pth", ".ts"), "script": (".pt", ".pth", ".ts"), "export": (".pt2",)}


@click.command(
    epilog="\b\nExamples:\n"
    "  gradctl trace sample_models/mlp.py -o mlp.pt\n"
    "  gradctl trace sample_models/mlp.py --form export --dynamic x:0=batch -o mlp.pt2"
)
@target_options
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The file to write: .pt for trace and script, .pt2 for export.",
)
@click.option("--form", type=click.Choice(_FORMS), default="trace", show_default=True, help="What to capture.")
@dynamic_option("Leave the size of an input free, for example x:0=batch; with --form export. May be repeated.")
@click.option("--keep-unverified", is_flag=True, help="Write the file also where it does not agree with eager.")
@report_options
def trace(
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    output: Path,
    form: str,
    dynamic: tuple[str, ...],
    keep_unverified: bool,
) -> int:
    """Capture a static form of TARGET in a verified file.

    Outputs, gradients and state are verified: the file is loaded again and compared with eager before it takes its
    place. Where it differs, or the form cannot take the model, no file is left, and an older one is as it was.
    """
    if dynamic and form != "export":
        raise click.UsageError(f"--dynamic is for --form export, not for {form}.")
    if output.suffix.lower() not in _SUFFIXES[form]:
        raise click.UsageError(f"{output}: --form {form} writes {' or '.join(_SUFFIXES[form])}.")
    return write_and_emit(
        _trace, output, checking, reporting, dynamic=dynamic, form=form, keep_unverified=keep_unverified
    )


def _trace(*args: Any, **options: Any) -> Written:
    from gradctl.commands.trace import trace as trace_verified

    return trace_verified(*args, **options)
