"""``gradctl gradcheck``: autograd against finite differences, every gradient, by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from gradctl.cli.options import subject_from, target_options
from gradctl.cli.reporting import ReportOptions, emit_units, judging, report_options
from gradctl.cli.repro import add_repros, repro_option
from gradctl.cli.users_code import users_code
from gradctl.core.names import FORMS
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import TargetOptions


def _finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Return a tolerance; NaN compares with nothing, and infinity accepts everything."""
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise click.BadParameter(f"{value!r} is not a finite number from 0.")
    return value


@click.command(
    epilog="\b\nExamples:\n"
    "  gradctl gradcheck sample_models/mlp.py\n"
    "  gradctl gradcheck sample_models/straight_through.py --allow GC408:RoundStraightThrough"
)
@target_options
@click.option(
    "--form",
    type=click.Choice(FORMS),
    default="eager",
    show_default=True,
    help="Whose gradient is judged, against finite differences of eager.",
)
@click.option("--thorough", is_flag=True, help="Probe each tensor by itself, not only on alarm.")
@click.option("--probes", type=click.IntRange(min=1), default=2, show_default=True, help="Random directions tried.")
@click.option("--tensor", default="*", metavar="GLOB", help="Judge only these, for example 'param:fc1.*'.")
@click.option("--rtol", type=float, callback=_finite, help="Accept an error up to this part of a gradient's norm.")
@click.option("--atol", type=float, callback=_finite, help="Accept an error up to this norm.")
@repro_option
@report_options
def gradcheck(checking: TargetOptions, reporting: ReportOptions, *, repro: Path | None, **settings: Any) -> int:
    """Check whether autograd's gradient is the derivative of TARGET.

    TARGET is path/to/file.py:NAME or package.module:NAME: a module, a class or factory, a function of tensors, or an
    autograd.Function. Importing it runs it. Without NAME: make_model, model, or the only module in the file.

    Every parameter and float input is judged in float64 by finite differences along random directions; what the program
    cuts on purpose (detach, no_grad) is held fixed and noted.
    """
    ensure_files(checking)
    with judging(reporting) as (allows, progress):
        from gradctl.gradients.gradcheck import gradcheck as check

        subject = subject_from(checking)
        with users_code():
            unit = check(subject, allows=allows, fail_on=reporting.fail_on, progress=progress, **settings)
            units = add_repros([unit], checking, subject, reporting, repro, progress=progress)
    return emit_units(units, allows, checking, reporting)
