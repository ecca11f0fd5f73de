"""``gradctl report``: a stored report in another format, without another run."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gradctl.cli.help import HelpfulCommand
from gradctl.cli.reporting import ReportOptions, emit, output_options
from gradctl.core.errors import GradctlError


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl gradcheck sample_models/mlp.py --report json=gradctl.json\n"
    "  gradctl report gradctl.json --format markdown --report junit=gradctl.xml",
)
@click.argument("file", metavar="FILE")
@output_options
def report(file: str, reporting: ReportOptions) -> int:
    """Print a stored report in another format.

    FILE was written by --report json=FILE or --format json; - is standard input. Nothing is checked again: verdicts,
    allowed findings and the exit code are those of the run. The exit code is 2 if FILE is not a report.
    """
    from gradctl.report.machine.json import load

    name = "standard input" if file == "-" else repr(file)
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GradctlError(
            "GC132",
            f"{name} cannot be read: {reason[0].lower()}{reason[1:]}. FILE is a report written by --report json=FILE.",
        ) from error
    return emit(load(content, name), reporting)
