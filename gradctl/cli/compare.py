"""``gradctl compare``: every static form of a model against eager, outputs, gradients and state."""

from __future__ import annotations

import contextlib
import sys

import click

from gradctl.cli.options import TargetOptions, subject_from, target_options
from gradctl.cli.reporting import ReportOptions, emit, progress_line, report_options
from gradctl.core.names import FORMS

__all__ = ["compare"]


@click.command(
    epilog="\b\nExamples:\n"
    "  gradctl compare sample_models/mlp.py --form trace --form export\n"
    "  gradctl compare sample_models/straight_through.py --form export --allow GC408:RoundStraightThrough"
)
@target_options
@click.option(
    "--form",
    "forms",
    type=click.Choice([name for name in FORMS if name != "eager"]),
    multiple=True,
    help="Compare only this form; may be repeated.  [default: all]",
)
@report_options
def compare(checking: TargetOptions, reporting: ReportOptions, forms: tuple[str, ...]) -> int:
    """Compare the static forms of TARGET with eager: outputs, gradients, state.

    Eager's own gradients are checked first. Then each form is captured from a private copy and run on the example, on
    other values, flipped signs and strided inputs, three calls each; what differs is named, and finite differences say
    who is right. A form that cannot take the model is skipped with its reason, or inconclusive if it was named.
    """
    with progress_line() as progress:
        progress("importing torch")
        from gradctl.checks.allows import Allows
        from gradctl.checks.assemble import report_of
        from gradctl.checks.compare import compare as compare_forms

        allows = Allows(reporting.allows)
        subject = subject_from(checking)
        with contextlib.redirect_stdout(sys.stderr):  # what the model and the compilers print is not the report
            units = compare_forms(subject, forms=forms, allows=allows, fail_on=reporting.fail_on, progress=progress)
    report = report_of("compare", units, allows, seed=checking.seed, device=checking.device)
    return emit(report, reporting)
