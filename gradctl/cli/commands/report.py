"""``gradctl report``: a stored report in another format, without a new run."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gradctl.cli.reporting import OutputOptions, emit, output_options
from gradctl.core.errors import GradctlError


@click.command(
    epilog="\b\nExamples:\n"
    "  gradctl gradcheck sample_models/mlp.py --report json=gradctl.json\n"
    "  gradctl report gradctl.json --format markdown --report junit=gradctl.xml"
)
@click.argument("file", metavar="FILE")
@output_options
def report(file: str, reporting: OutputOptions) -> int:
    """Render a stored report again.

    FILE is what --report json=FILE or --format json wrote; - is standard input. Nothing is judged anew: verdicts,
    allowed findings and --fail-on are those of the run.

    The exit code is that of the run too: 0 pass, 1 a finding fails, 4 inconclusive, 5 nothing was checked, 130 it was
    interrupted. It is 2 if FILE is not a report.
    """
    from gradctl.report.machine.json import load

    name = "standard input" if file == "-" else repr(file)
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GradctlError(
            "GC132",
            f"{name} cannot be read: {reason[0].lower()}{reason[1:]}. Give a report that --report json=FILE wrote.",
        ) from error
    return emit(load(content, name), reporting)
