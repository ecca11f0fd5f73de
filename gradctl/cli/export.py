"""``gradctl export``: an ONNX graph in a file, verified in onnxruntime before it takes its place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradctl.cli.options import TargetOptions, dynamic_option, target_options
from gradctl.cli.reporting import ReportOptions, report_options
from gradctl.cli.written import write_and_emit

if TYPE_CHECKING:
    from gradctl.checks.written import Written

__all__ = ["export"]


@click.command(
    epilog="\b\nExamples:\n"
    "  gradctl export sample_models/mlp.py -o mlp.onnx\n"
    "  gradctl export sample_models/mlp.py --dynamic x:0=batch --opset 20 -o mlp.onnx"
)
@target_options
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The file to write: .onnx. Weights above 2 GiB go to FILE.data beside it.",
)
@click.option("--opset", type=click.IntRange(min=1), help="Of ONNX's own operators.  [default: torch's]")
@dynamic_option("Leave the size of an input free, for example x:0=batch. May be repeated.")
@click.option("--keep-unverified", is_flag=True, help="Write the file also where it does not agree with eager.")
@report_options
def export(
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    output: Path,
    opset: int | None,
    dynamic: tuple[str, ...],
    keep_unverified: bool,
) -> int:
    """Export TARGET to a verified ONNX file.

    The graph computes the forward. Inputs are named as the model names them (x, batch.mask), outputs as reports do
    (output, output.logits). The file is checked, run by onnxruntime and compared with eager on several inputs before it
    takes its place. Where it differs, or the model cannot be exported, no file is left, and an older one is as it was.
    """
    if output.suffix.lower() != ".onnx":
        raise click.UsageError(f"{output}: export writes .onnx.")
    return write_and_emit(
        _export,
        output,
        checking,
        reporting,
        dynamic=dynamic,
        opset=opset,
        keep_unverified=keep_unverified,
    )


def _export(*args: Any, **options: Any) -> Written:
    from gradctl.checks.export import export as export_verified

    return export_verified(*args, **options)
