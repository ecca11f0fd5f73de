"""``gradctl inspect``: what a program or a model file consists of, and what affects its gradients."""

from __future__ import annotations

from pathlib import Path

import click

from gradctl.cli.help import WITHOUT_VERDICT, HelpfulCommand, choice_option, option
from gradctl.cli.options import refuse_other_options, subject_from, target_options
from gradctl.cli.reporting import progress_line, terminal_width
from gradctl.cli.users_code import users_code
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import TargetOptions

_FILE_SUFFIXES = (".pt", ".pth", ".ts", ".pt2", ".onnx")


@click.command(
    cls=HelpfulCommand,
    exit_codes=WITHOUT_VERDICT,
    epilog="\b\nExamples:\n  gradctl inspect sample_models/no_grad_inside.py\n  gradctl inspect model.onnx",
)
@target_options
@option("--trust", heading="Target", is_flag=True, help="Load a TorchScript or .pt2 file although it contains code.")
@choice_option("--format", "FORMAT", ("console", "json"), "Format of standard output", heading="Output")
def inspect(checking: TargetOptions, trust: bool, format: str) -> int:
    """Show what affects the gradients of TARGET.

    One call of the model is recorded: parameters, buffers, custom Functions and operators, hooks, values excluded from
    gradients (detach, no_grad), branches on data, random numbers, modules in training mode, each with its line.

    Of a FILE (.onnx, .pt2, TorchScript), inputs, outputs, parameters and operators are shown; it is not run.
    """
    file = Path(checking.target)
    is_file = file.suffix.lower() in _FILE_SUFFIXES
    if is_file:
        refuse_other_options(("target", "trust", "format"), "applies to a program, not to a file.")
    ensure_files(checking, is_program=not is_file)
    with progress_line() as progress:
        progress("importing torch")
        from gradctl.report.text.inspection import render, render_json

        if is_file:
            from gradctl.inspection.file_contents import inspect_file

            with users_code():
                inspection = inspect_file(file, trusted=trust)
        else:
            from gradctl.inspection.model import inspect as inspect_program

            subject = subject_from(checking)
            with users_code():
                inspection = inspect_program(subject)
    text = render_json(inspection) if format == "json" else render(inspection, width=terminal_width())
    click.echo(text, nl=False)
    return 0
