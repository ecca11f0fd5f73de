"""``gradctl export``: an ONNX graph in a file that agrees with eager when onnxruntime runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradctl.cli.help import FiniteRange, HelpfulCommand, choice_option, option, output_option
from gradctl.cli.options import dynamic_option, target_options
from gradctl.cli.reporting import ReportOptions, report_options
from gradctl.cli.written import keep_unverified_option, write_and_emit
from gradctl.core.names import OPTIMIZERS
from gradctl.core.target_options import TargetOptions

if TYPE_CHECKING:
    from gradctl.commands.capture_to_file import Written
    from gradctl.subject.subject import Subject

_CAPTURE = "What to capture"
_WRT = (
    "Differentiate only with respect to these, for example input:x or 'param:fc1.*'. May be repeated.  [default: all; "
    "inputs with --graph jvp and hvp]"
)
_FREEZE = "Make parameters constants of the graph, not inputs; with --graph joint, jvp and hvp."
_GRAPHS = ("forward", "joint", "train-step", "jvp", "hvp")
_STEP = "Training steps"
_OPTIMIZER = f"Optimizer: {', '.join(OPTIMIZERS)}, or FILE:FACTORY.  [default: {OPTIMIZERS[0]}]"
_CLIP = "Clip the norm of all gradients together to X.  [default: no limit]"
_GRADIENTS = "Return the gradients, too."
_OPSET = "Version of ONNX's operators.  [default: torch's]"


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl export sample_models/mlp.py -o mlp.onnx\n"
    "  gradctl export sample_models/mlp.py --dynamic x:0=batch --opset 20 -o mlp.onnx\n"
    "  gradctl export sample_models/mlp.py --graph joint -o joint.onnx",
)
@target_options
@output_option(
    "FILE",
    "File to write: .onnx, or .pt2 but for --graph train-step. Weights above 2 GiB are written to FILE.data beside it.",
)
@choice_option("--graph", "GRAPH", _GRAPHS, "Graph to export", heading=_CAPTURE)
@option("--wrt", heading=_CAPTURE, metavar="GLOB", multiple=True, help=_WRT)
@option("--freeze", heading=_CAPTURE, is_flag=True, help=_FREEZE)
@option("--opset", heading=_CAPTURE, metavar="N", type=click.IntRange(min=1), help=_OPSET)
@option("--optimizer", heading=_STEP, metavar="NAME", help=_OPTIMIZER)
@option("--clip-norm", heading=_STEP, metavar="X", type=FiniteRange(0, min_open=True), help=_CLIP)
@option("--with-gradients", heading=_STEP, is_flag=True, help=_GRADIENTS)
@dynamic_option()
@keep_unverified_option
@report_options
def export(
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    output: Path,
    graph: str,
    wrt: tuple[str, ...],
    freeze: bool,
    optimizer: str | None,
    clip_norm: float | None,
    with_gradients: bool,
    **options: Any,
) -> int:
    """Export TARGET to a verified ONNX file.

    The graph computes the forward pass. Inputs have the names of the model's arguments (x, batch.mask), outputs those
    in reports (output, output.logits). The file is run by onnxruntime and compared with eager on several inputs. If
    they differ, or the model cannot be exported, FILE is not written, and an existing FILE is not changed. A model that
    differentiates in its forward (forces by torch.autograd.grad) is exported with its inner backward.

    With --graph joint the graph computes gradients too, as autograd does in eager. Its inputs are parameters
    (fc1.weight), inputs (input.x) and the gradients of the loss with respect to the outputs (grad_output); its outputs
    are outputs, gradients (grad.fc1.weight, grad.input.x) and the buffers that the forward pass changes
    (updated.bn.running_mean). With --loss, the loss is part of the graph, and its output is that scalar.

    With --graph train-step the graph makes a whole training step on --loss, or on the loss that the model returns: its
    inputs are parameters, optimizer state (exp_avg.fc1.weight), step, learning_rate and a batch; its outputs are loss
    and the next value of each (next.fc1.weight). FILE.safetensors has the first state. 20 steps are compared with
    torch.optim. --wrt selects the parameters to train; all others are constants.

    With --graph jvp the graph takes a tangent for each float input (tangent.input.x) and returns the outputs and their
    directional derivatives (jvp.output). With --graph hvp, of a scalar or of --loss, it returns the scalar, its
    gradient (grad.input.x) and the Hessian-vector product (hvp.input.x). --wrt selects others, and parameters. Both are
    two backward passes of autograd, which are compared with its VJP, or with finite differences of its gradient.
    """
    step = {"--optimizer": optimizer, "--clip-norm": clip_norm, "--with-gradients": with_gradients}
    _ensure_applicable(output, graph, {"--wrt": wrt, "--freeze": freeze, "--opset": options["opset"], **step})
    derivatives = ("jvp", "hvp")
    if graph != "forward":
        options.update(wrt=wrt or (() if graph in derivatives else ("*",)))
    if graph in ("joint", *derivatives):
        options.update(frozen=freeze)
    if graph in derivatives:
        options.update(graph=graph)
    if graph == "train-step":
        options.update(optimizer=optimizer or OPTIMIZERS[0], clip_norm=clip_norm, keeps_gradients=with_gradients)
    writers = {"forward": _forward, "joint": _joint, "train-step": _train_step, "jvp": _derivative, "hvp": _derivative}
    return write_and_emit(writers[graph], output, checking, reporting, **options)


def _ensure_applicable(output: Path, graph: str, given: dict[str, Any]) -> None:
    """Raise for a file, or for one of the options ``given``, that does not apply to the graph."""
    kind = output.suffix.lower(), graph
    if kind[0] not in (".onnx", ".pt2") or kind == (".pt2", "train-step"):
        raise click.UsageError(f"{output}: export writes .onnx, and .pt2 but for --graph train-step.")
    refused: dict[str, tuple[str, ...]] = {}
    if kind[0] == ".pt2":
        refused["an .onnx file, not to .pt2"] = ("--freeze", "--opset")
    if graph == "forward":
        refused["graphs with derivatives: a forward graph has no gradients"] = ("--wrt",)
    if graph in ("forward", "train-step"):
        refused[f"--graph joint, jvp and hvp, not to {graph}"] = ("--freeze",)
    if graph != "train-step":
        refused["--graph train-step"] = ("--optimizer", "--clip-norm", "--with-gradients")
    for condition, names in refused.items():
        for name in names:
            if given[name]:
                raise click.UsageError(f"{name} applies to {condition}.")


def _forward(subject: Subject, output: Path, **options: Any) -> Written:
    from gradctl.commands.export import export as export_verified
    from gradctl.core.errors import TargetError

    # torch.onnx converts dropout and batch normalisation for inference: after the capture, the outputs would differ.
    active_layers = (each for each in subject.notes if each.code == "GC105")
    for note in active_layers if output.suffix.lower() == ".onnx" else ():
        active = note.message.partition(";")[0]
        remedy = "Add --eval to export it for inference, or --train to try it as it is."
        raise TargetError("GC105", f"{subject.target}: {active}. {remedy}")
    return export_verified(subject, output, **options)


def _joint(*args: Any, **options: Any) -> Written:
    from gradctl.commands.export import export_joint

    return export_joint(*args, **options)


def _derivative(*args: Any, **options: Any) -> Written:
    from gradctl.commands.export_derivative import export_derivative

    return export_derivative(*args, **options)


def _train_step(*args: Any, **options: Any) -> Written:
    from gradctl.commands.export_train_step import export_train_step

    return export_train_step(*args, **options)
