"""``gradctl verify``: does a model still compute what a snapshot holds?"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradctl.cli.help import HelpfulCommand, option
from gradctl.cli.options import subject_from
from gradctl.cli.reporting import ReportOptions, emit_units, judging, progress_line, report_options
from gradctl.cli.users_code import users_code
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import MOST_THREADS, TargetOptions

if TYPE_CHECKING:
    from gradctl.environments.versions import VersionRange

_DTYPES = ("bf16", "f16", "f32", "f64")
_DEVICE = "Run on this device, and compare with the float64 results of the snapshot."
_DTYPE = f"Run in this dtype, and compare with the float64 results of the snapshot: {', '.join(_DTYPES)}."
_THREADS = "Threads of torch.  [default: torch's]"
_UPDATE = "Rewrite the snapshot if something changed, after the changes are listed."
_BISECT = (
    "Find the version of torch that changed a result: run with versions of this range, each installed in an "
    "environment of its own, which is kept in the cache folder (0.9 GB each for the CPU)."
)
_VERIFY_SECONDS = 3600.0  # with one version of torch


def _range(ctx: click.Context, param: click.Parameter, value: str | None) -> VersionRange | None:
    """Return the versions of ``--bisect-torch``."""
    if value is None:
        return None
    from gradctl.environments.versions import parse_range

    try:
        return parse_range(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl verify mlp.snapshot\n"
    "  gradctl verify mlp.snapshot sample_models/mlp.py --update\n"
    "  gradctl verify mlp.snapshot --device cuda --dtype bf16\n"
    "  gradctl verify mlp.snapshot --bisect-torch 2.10..2.14",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("target", required=False)
@option("--device", heading="Target", metavar="DEVICE", help=_DEVICE)
@option("--dtype", heading="Target", metavar="DTYPE", type=click.Choice(_DTYPES), help=_DTYPE)
@option("--threads", heading="Target", metavar="N", type=click.IntRange(1, MOST_THREADS), help=_THREADS)
@option("--update", heading="Output", is_flag=True, help=_UPDATE)
@click.option("--bisect-torch", "versions", metavar="FIRST..LAST", callback=_range, help=_BISECT)
@report_options
def verify(
    file: Path,
    target: str | None,
    *,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    update: bool,
    versions: VersionRange | None,
    reporting: ReportOptions,
) -> int:
    """Check whether a model still computes what a snapshot holds.

    FILE is what gradctl snapshot wrote. The target of the snapshot is loaded again with the same options, or TARGET
    instead. It runs on the parameters, buffers and inputs of the snapshot, in its own dtype and in float64, and each
    output, gradient and buffer update is compared. A difference that rounding explains (another order of sums) is
    accepted; the snapshot has its size for each tensor. Versions, threads and CPU capability that differ are listed.

    With --device or --dtype, the model runs there, and the tolerance is that of the dtype.

    With --bisect-torch 2.10..2.14, the oldest and the newest version of torch in the range are tried, then those
    between them, until the version is found that changes the result. Your own environment does not change.
    """
    if versions is not None:
        if update:
            raise click.UsageError(
                "--update rewrites the snapshot, and --bisect-torch only compares. Omit one of them."
            )
        given = {"--device": device, "--dtype": dtype, "--threads": threads}
        return _bisect(versions, file, target, given, reporting)
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


def _bisect(
    versions: VersionRange, file: Path, target: str | None, given: Mapping[str, Any], reporting: ReportOptions
) -> int:
    """Report on this command with the first version of torch that changes its verdict; ``given`` are its options."""
    import msgspec

    from gradctl.core.allows import Allows
    from gradctl.environments.torch_bisection import bisect_torch
    from gradctl.snapshots.snapshot_file import read

    header = read(file).header
    arguments = ["verify", str(file), *([target] if target else []), "--format=json", f"--fail-on={reporting.fail_on}"]
    arguments += [f"--allow={each}" for each in reporting.allows]
    arguments += [f"{flag}={value}" for flag, value in given.items() if value is not None]
    allows = Allows(reporting.allows)
    with progress_line(is_shown=not reporting.quiet) as progress:

        def say(line: str) -> None:
            if sys.stderr is not None and sys.stderr.isatty():
                progress(line)
            elif not reporting.quiet:
                click.echo(line.rstrip(), err=True)

        unit = bisect_torch(versions, arguments, timeout_seconds=_VERIFY_SECONDS, progress=say)
    # What was accepted there is marked here too, or an allow that was needed would be called unused.
    unit = msgspec.structs.replace(unit, findings=allows.apply(unit.findings))
    checking = TargetOptions(
        target or header.name, seed=header.seed, device=given["--device"] or "cpu", command="verify"
    )
    return emit_units([unit], allows, checking, reporting)
