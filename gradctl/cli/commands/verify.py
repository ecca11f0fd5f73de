"""``gradctl verify``: does a model still compute what a snapshot holds?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from gradctl.cli.help import HelpfulCommand, option
from gradctl.cli.options import subject_from
from gradctl.cli.reporting import ReportOptions, emit_units, judging, report_options
from gradctl.cli.users_code import users_code
from gradctl.core.target_files import ensure_files

_DTYPES = ("bf16", "f16", "f32", "f64")
_DEVICE = "Run on this device, and compare with the float64 results of the snapshot."
_DTYPE = f"Run in this dtype, and compare with the float64 results of the snapshot: {', '.join(_DTYPES)}."
_THREADS = "Threads of torch.  [default: torch's]"
_UPDATE = "Rewrite the snapshot if something changed, after the changes are listed."


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl verify mlp.snapshot\n"
    "  gradctl verify mlp.snapshot sample_models/mlp.py --update\n"
    "  gradctl verify mlp.snapshot --device cuda --dtype bf16",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("target", required=False)
@option("--device", heading="Target", metavar="DEVICE", help=_DEVICE)
@option("--dtype", heading="Target", metavar="DTYPE", type=click.Choice(_DTYPES), help=_DTYPE)
@option("--threads", heading="Target", metavar="N", type=click.IntRange(1), help=_THREADS)
@option("--update", heading="Output", is_flag=True, help=_UPDATE)
@report_options
def verify(
    file: Path,
    target: str | None,
    *,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    update: bool,
    reporting: ReportOptions,
) -> int:
    """Compare a model with the snapshot FILE, which gradctl snapshot wrote.

    The target of the snapshot is loaded again with the same options, or TARGET instead. It runs on the parameters,
    buffers and inputs of the snapshot, in its own dtype and in float64, and each output, gradient and buffer update is
    compared. A difference that rounding explains (another order of sums) is none; the snapshot holds how large that is
    for each tensor. Versions, threads and CPU capability that differ are listed.

    With --device or --dtype, the model runs there, and the tolerance is that of the dtype.
    """
    if update and (device or dtype):
        raise click.UsageError("--update rewrites what the CPU computes. Omit --device and --dtype.")
    with judging(reporting) as (allows, progress):
        from gradctl.snapshots.snapshot_file import read
        from gradctl.snapshots.verify_snapshot import options_of, verify_snapshot

        options = options_of(read(file).header, file, target, threads=threads)
        ensure_files(options)
        subject = subject_from(options)
        with users_code():
            unit = verify_snapshot(
                file,
                subject,
                options=options,
                device=device,
                dtype=dtype,
                update=update,
                allows=allows,
                fail_on=reporting.fail_on,
                progress=progress,
            )
    is_rewritten = update and any(each.allowed for each in unit.findings)
    preface = f"{file} is rewritten\n" if is_rewritten else ""
    return emit_units([unit], allows, dataclasses.replace(options, device=device or "cpu"), reporting, preface=preface)
