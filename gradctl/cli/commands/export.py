"""``gradctl export``: an ONNX graph in a file, verified in onnxruntime before it takes its place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradctl.cli.options import dynamic_option, target_options
from gradctl.cli.reporting import ReportOptions, report_options
from gradctl.cli.written import write_and_emit
from gradctl.core.target_options import TargetOptions

if TYPE_CHECKING:
    from gradctl.commands.capture_to_file import Written
    from gradctl.subject.subject import Subject


@click.command(
    epilog="\b\nExamples:\n"
    "  gradctl export sample_models/mlp.py -o mlp.onnx\n"
    "  gradctl export sample_models/mlp.py --dynamic x:0=batch --opset 20 -o mlp.onnx\n"
    "  gradctl export sample_models/mlp.py --graph joint -o joint.onnx"
)
@target_options
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The file to write: .onnx, or .pt2 of --graph joint. Weights above 2 GiB go to FILE.data beside it.",
)
@click.option(
    "--graph",
    type=click.Choice(("forward", "joint")),
    default="forward",
    show_default=True,
    help="What the graph computes: outputs, or gradients too.",
)
@click.option(
    "--wrt",
    metavar="NAME",
    multiple=True,
    help="Differentiate by this only: input:x, param:fc1.*; may be repeated. Of --graph joint.  [default: all]",
)
@click.option("--freeze", is_flag=True, help="Parameters are constants of the graph, not inputs. Of --graph joint.")
@click.option("--opset", type=click.IntRange(min=1), help="Of ONNX's own operators.  [default: torch's]")
@dynamic_option("Leave the size of an input free, for example x:0=batch. May be repeated.")
@click.option("--keep-unverified", is_flag=True, help="Write the file also where it does not agree with eager.")
@report_options
def export(
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    output: Path,
    graph: str,
    wrt: tuple[str, ...],
    freeze: bool,
    **options: Any,
) -> int:
    """Export TARGET to a verified ONNX file.

    The graph computes the forward. Inputs are named as the model names them (x, batch.mask), outputs as reports do
    (output, output.logits). The file is checked, run by onnxruntime and compared with eager on several inputs before it
    takes its place. Where it differs, or the model cannot be exported, no file is left, and an older one is as it was.

    With --graph joint it computes gradients too, as eager's autograd does. It takes parameters (fc1.weight), inputs
    (input.x) and cotangents (grad_output), and gives outputs, gradients (grad.fc1.weight, grad.input.x), and what the
    forward changes (updated.bn.running_mean). A --loss goes into the graph: its output is that scalar then.
    """
    suffix = output.suffix.lower()
    if suffix != ".onnx" and (suffix, graph) != (".pt2", "joint"):
        raise click.UsageError(f"{output}: export writes .onnx, and .pt2 of --graph joint.")
    if suffix == ".pt2" and (freeze or options["opset"]):
        raise click.UsageError(f"{'--freeze' if freeze else '--opset'} is of .onnx; a .pt2 takes its parameters.")
    if graph == "joint":
        options.update(wrt=wrt or ("*",), frozen=freeze)
    elif wrt or freeze:
        raise click.UsageError(f"{'--wrt' if wrt else '--freeze'} is of --graph joint; a forward has no gradients.")
    return write_and_emit(_joint if graph == "joint" else _forward, output, checking, reporting, **options)


def _forward(subject: Subject, *args: Any, **options: Any) -> Written:
    from gradctl.commands.export import export as export_verified
    from gradctl.core.errors import TargetError

    # torch.onnx converts dropout and batch normalisation for inference: after the capture, the outputs would differ.
    for note in (each for each in subject.notes if each.code == "GC105"):
        active = note.message.partition(";")[0]
        remedy = "Add --eval to export it for inference, or --train to try it as it is."
        raise TargetError("GC105", f"{subject.target}: {active}. {remedy}")
    return export_verified(subject, *args, **options)


def _joint(*args: Any, **options: Any) -> Written:
    from gradctl.commands.export import export_joint

    return export_joint(*args, **options)
