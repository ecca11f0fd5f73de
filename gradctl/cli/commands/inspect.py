"""``gradctl inspect``: what a program or a model file consists of, and what affects its gradients."""

from __future__ import annotations

from pathlib import Path

import click

from gradctl.cli.options import refuse_other_options, subject_from, target_options
from gradctl.cli.reporting import progress_line
from gradctl.cli.users_code import users_code
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import TargetOptions

_FILE_SUFFIXES = (".pt", ".pth", ".ts", ".pt2", ".onnx")


@click.command(epilog="\b\nExamples:\n  gradctl inspect sample_models/no_grad_inside.py\n  gradctl inspect model.onnx")
@target_options
@click.option("--trust", is_flag=True, help="Load a TorchScript or .pt2 file, which is code.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(("console", "json")),
    default="console",
    show_default=True,
    help="What standard output gets.",
)
def inspect(checking: TargetOptions, trust: bool, format_name: str) -> int:
    """Show what the gradients of TARGET hang on.

    Parameters, buffers and gradient semantics; of a FILE, its graph.

    One eager call is watched, before anything is captured: custom Functions and operators, hooks, values that are cut
    from the gradient, branches on data, random numbers, modules in training mode, each with its line. A FILE (.onnx,
    .pt2, TorchScript) is not run.
    """
    file = Path(checking.target)
    is_file = file.suffix.lower() in _FILE_SUFFIXES
    if is_file:
        refuse_other_options(("target", "trust", "format_name"), "is for a program; a file has its own.")
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
    click.echo(render(inspection) if format_name == "console" else render_json(inspection), nl=False)
    return 0
