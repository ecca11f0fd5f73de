"""``gradctl snapshot``: record what a model computes, in a file that ``gradctl verify`` compares with later."""

from __future__ import annotations

from pathlib import Path

import click

from gradctl.cli.help import WITHOUT_VERDICT, HelpfulCommand, option, output_option
from gradctl.cli.options import subject_from, target_options
from gradctl.cli.reporting import progress_line
from gradctl.cli.users_code import users_code
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import TargetOptions

_FULL = "Store every recorded tensor, too: verify then compares them exactly, and prints the worst elements."
_NO_VALUES = "Store only digests of parameters, buffers and inputs. verify needs the same values then."


@click.command(
    cls=HelpfulCommand,
    exit_codes=WITHOUT_VERDICT,
    epilog="\b\nExamples:\n"
    "  gradctl snapshot sample_models/mlp.py -o mlp.snapshot\n"
    "  gradctl snapshot hf:llama --eval -o llama.snapshot --full",
)
@target_options
@output_option("FILE", "File to write; the values are written beside it.")
@option("--full", heading="Output", is_flag=True, help=_FULL)
@option("--no-values", heading="Output", is_flag=True, help=_NO_VALUES)
def snapshot(checking: TargetOptions, output: Path, full: bool, no_values: bool) -> int:
    """Record the outputs and gradients of TARGET in a file.

    gradctl verify later compares a model with FILE, its buffer updates, too. The model runs forward and backward on the
    CPU, in its own dtype and in float64, with its gradient hooks. FILE is text with one tensor in each line (shape,
    norm, noise of rounding, digest, random projections, largest elements), made for version control. The parameters,
    buffers and inputs are stored beside it (FILE.*.safetensors, up to 64 MB), so that verify starts from the same
    values on every machine.
    """
    if full and no_values:
        raise click.UsageError("--full stores every tensor, and --no-values none. Omit one of them.")
    if checking.device != "cpu":
        raise click.UsageError(
            "a snapshot is taken on the CPU. Compare another device with it: gradctl verify --device."
        )
    ensure_files(checking)
    with progress_line() as progress:
        progress("importing torch")
        from gradctl.snapshots.summary import summary_lines
        from gradctl.snapshots.take_snapshot import take_snapshot

        subject = subject_from(checking)
        with users_code():
            taken = take_snapshot(subject, output, options=checking, values=not no_values, full=full, progress=progress)
    click.echo("\n".join(summary_lines(taken)))
    return 0
