"""``gradctl report``: stored reports in another format, or several as one, without another run."""

from __future__ import annotations

import click

from gradctl.cli.help import HelpfulCommand, option
from gradctl.cli.reporting import ReportOptions, emit, output_options, read_report


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl gradcheck sample_models/mlp.py --report json=gradctl.json\n"
    "  gradctl report gradctl.json --format markdown --report junit=gradctl.xml\n"
    "  gradctl report 1.json 2.json --merge --report json=gradctl.json",
)
@click.argument("stored", metavar="FILE...", nargs=-1, required=True)
@option("--merge", is_flag=True, heading="Output", help="Join the shards of a run, or runs of different units.")
@output_options
def report(stored: tuple[str, ...], merge: bool, reporting: ReportOptions) -> int:
    """Print a stored report in another format.

    FILE was written by --report json=FILE or --format json; - is standard input. Nothing is checked again: verdicts,
    allowed findings and the exit code are those of the run. The exit code is 2 if FILE is not a report.

    With --merge, the reports of all shards of a run (gradctl check --shard) have the report and the exit code of the
    whole run. Reports that are no shards are joined if they are of the same versions and no unit is in two of them.
    """
    if not merge:
        if len(stored) > 1:
            raise click.UsageError(f"{len(stored)} reports are printed as one with --merge only.")
        return emit(read_report(stored[0]), reporting)
    from gradctl.suite.shards import merge as merged

    if len(set(stored)) < len(stored):
        raise click.UsageError("a FILE of --merge is named twice.")
    return emit(merged({file: read_report(file) for file in stored}), reporting)
