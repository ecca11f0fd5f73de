"""``gradctl gradcheck``: autograd against finite differences, every gradient, by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from gradctl.cli.help import FormChoice, HelpfulCommand
from gradctl.cli.options import ensure_provider_applies, sizes_of, subject_from, target_options
from gradctl.cli.reporting import ReportOptions, emit_units, judging, report_options
from gradctl.cli.repro import add_repros, repro_option
from gradctl.cli.users_code import users_code
from gradctl.core.names import FORMS
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import TargetOptions

_FORM_CHOICE = FormChoice(FORMS)
_FORM = f"Form whose gradients are compared with finite differences of eager: {_FORM_CHOICE.text}."
_PROBES = "Random directions, along each of which autograd is compared with a finite difference."


def _finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Return a tolerance: NaN would reject every gradient, and infinity accept every one."""
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise click.BadParameter(f"{value!r} is not a finite number of at least 0.")
    return value


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl gradcheck sample_models/mlp.py\n"
    "  gradctl gradcheck sample_models/mlp.py --sizes 'batch=1,2,7,64'\n"
    "  gradctl gradcheck sample_models/straight_through.py --allow GC408:RoundStraightThrough",
)
@target_options
@click.option("--form", metavar="FORM", type=_FORM_CHOICE, default=FORMS[0], show_default=True, help=_FORM)
@click.option("--tensor", default="*", metavar="GLOB", help="Check only these tensors, for example 'param:fc1.*'.")
@click.option("--thorough", is_flag=True, help="Check each tensor alone, not only if all together differ.")
@click.option("--probes", metavar="N", type=click.IntRange(min=1), default=2, show_default=True, help=_PROBES)
@click.option(
    "--rtol", metavar="X", type=float, callback=_finite, help="Accept an error of up to X times a gradient's norm."
)
@click.option("--atol", metavar="X", type=float, callback=_finite, help="Accept an error with a norm of up to X.")
@repro_option
@report_options
def gradcheck(checking: TargetOptions, reporting: ReportOptions, *, repro: Path | None, **settings: Any) -> int:
    """Check whether autograd's gradient is the derivative of TARGET.

    TARGET is path/to/file.py:NAME or package.module:NAME. NAME is an nn.Module, a class or factory of one, a function
    of tensors, an autograd.Function, or an operator (ns::op); by default make_model, model, or the only module in the
    file. Loading TARGET runs its file. hf:TYPE, for example hf:llama, is a small model of transformers.

    The gradient of every parameter and float input is compared with finite differences in float64, along random
    directions. Values that the program excludes from gradients (detach, no_grad) are constants of that check, and
    reported as notes. With --sizes, this is done at each size, the smallest first.
    """
    ensure_files(checking)
    ensure_provider_applies(checking, [settings["form"]])
    with judging(reporting) as (allows, progress):
        from gradctl.gradients.size_sweep import gradcheck_at_sizes as check

        sizes = sizes_of(checking, repro)
        subject = subject_from(checking)
        settings |= {"limit": checking.max_sizes, "allows": allows, "fail_on": reporting.fail_on}
        with users_code():
            unit = check(subject, sizes, progress=progress, **settings)
            units = add_repros([unit], checking, subject, reporting, repro, progress=progress)
    return emit_units(units, allows, checking, reporting)
