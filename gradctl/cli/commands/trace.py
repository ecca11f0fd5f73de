"""``gradctl trace``: a static form in a file that agrees with eager."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradctl.cli.help import HelpfulCommand, choice_option, output_option
from gradctl.cli.options import dynamic_option, target_options
from gradctl.cli.reporting import ReportOptions, report_options
from gradctl.cli.written import keep_unverified_option, write_and_emit
from gradctl.core.target_options import TargetOptions

if TYPE_CHECKING:
    from gradctl.commands.capture_to_file import Written

_FORMS = ("trace", "script", "export")
_SUFFIXES = {"trace": (".pt", ".pth", ".ts"), "script": (".pt", ".pth", ".ts"), "export": (".pt2",)}


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl trace sample_models/mlp.py -o mlp.pt\n"
    "  gradctl trace sample_models/mlp.py --form export --dynamic x:0=batch -o mlp.pt2",
)
@target_options
@output_option("FILE", "File to write: .pt for trace and script, .pt2 for export.")
@choice_option("--form", "FORM", _FORMS, "Form to capture", heading="What to capture")
@dynamic_option(", with --form export")
@keep_unverified_option
@report_options
def trace(checking: TargetOptions, reporting: ReportOptions, *, output: Path, form: str, **options: Any) -> int:
    """Capture TARGET as TorchScript or torch.export, in a verified file.

    The file is written, loaded again, and its outputs, gradients and state are compared with eager. If they differ, or
    the form cannot capture the model, FILE is not written, and an existing FILE is not changed.
    """
    if options["dynamic"] and form != "export":
        raise click.UsageError(f"--dynamic applies to --form export, not to --form {form}.")
    if output.suffix.lower() not in _SUFFIXES[form]:
        raise click.UsageError(f"{output}: --form {form} writes {' or '.join(_SUFFIXES[form])}.")
    return write_and_emit(_trace, output, checking, reporting, form=form, **options)


def _trace(*args: Any, **options: Any) -> Written:
    from gradctl.commands.trace import trace as trace_verified

    return trace_verified(*args, **options)
