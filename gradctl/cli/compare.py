"""``gradctl compare``: every static form of a model, or a file, against eager: outputs, gradients and state."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gradctl.cli.options import TargetOptions, subject_from, target_options
from gradctl.cli.reporting import ReportOptions, emit, progress_line, report_options
from gradctl.core.names import FORMS

if TYPE_CHECKING:
    from gradctl.checks.allows import Allows
    from gradctl.core.findings import Unit

__all__ = ["compare"]


@click.command(
    epilog="\b\nExamples:\n"
    "  gradctl compare sample_models/mlp.py --form trace --form export\n"
    "  gradctl compare sample_models/mlp.py model.onnx\n"
    "  gradctl compare a.onnx b.onnx --inputs test_data_set_0"
)
@target_options
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--form",
    "forms",
    type=click.Choice([name for name in FORMS if name != "eager"]),
    multiple=True,
    help="Compare only this form; may be repeated.  [default: all]",
)
@click.option("--trust", is_flag=True, help="FILE is a program (.pt2, TorchScript) of an author you trust: load it.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="For each form that runs in a process of its own (compile, onnx).",
)
@report_options
def compare(
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    file: Path | None,
    forms: tuple[str, ...],
    trust: bool,
    timeout: float,
) -> int:
    """Compare the static forms of TARGET with eager: outputs, gradients, state.

    Eager's own gradients are checked first. Then each form is captured from a private copy and run on the example, on
    other values, flipped signs and strided inputs, three calls each; what differs is named, and finite differences say
    who is right. A form that cannot take the model is skipped with its reason, or inconclusive if it was named.

    With FILE (.onnx, .pt2, TorchScript): is it this model? With two .onnx files: do they compute the same?
    """
    if file is not None and forms:
        raise click.UsageError("--form captures TARGET; with a FILE there is nothing to capture. Give one of them.")
    with progress_line() as progress:
        progress("importing torch")
        from gradctl.checks.allows import Allows
        from gradctl.checks.assemble import report_of

        allows = Allows(reporting.allows)
        with contextlib.redirect_stdout(sys.stderr):  # what the model and the compilers print is not the report
            if file is not None and checking.target.endswith(".onnx"):
                units = [_two_files(checking, file)]
            elif file is not None:
                units = _file(checking, file, allows, reporting, trust=trust, progress=progress)
            else:
                units = _forms(checking, forms, allows, reporting, timeout=timeout, progress=progress)
    report = report_of("compare", units, allows, seed=checking.seed, device=checking.device)
    return emit(report, reporting)


def _forms(
    checking: TargetOptions,
    forms: tuple[str, ...],
    allows: Allows,
    reporting: ReportOptions,
    *,
    timeout: float,
    progress: Callable[[str], None],
) -> list[Unit]:
    from gradctl.checks.compare import compare as compare_forms

    return compare_forms(
        subject_from(checking), forms=forms, allows=allows, fail_on=reporting.fail_on, progress=progress
    )


def _file(
    checking: TargetOptions,
    file: Path,
    allows: Allows,
    reporting: ReportOptions,
    *,
    trust: bool,
    progress: Callable[[str], None],
) -> list[Unit]:
    from gradctl.checks.compare import Comparing

    progress(f"comparing {file}")
    return [Comparing(subject_from(checking), allows, fail_on=reporting.fail_on).file(file, trusted=trust)]


def _two_files(checking: TargetOptions, file: Path) -> Unit:
    from gradctl.checks.compare_onnx import compare_files

    return compare_files(Path(checking.target), file, inputs_file=checking.inputs_file, seed=checking.seed)
