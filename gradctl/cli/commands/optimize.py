"""``gradctl optimize``: optimisation passes over a graph, each verified by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradctl.cli.help import HelpfulCommand, option, output_option
from gradctl.cli.options import (
    dynamic_option,
    free_sizes_from,
    refuse_other_options,
    subject_from,
    target_options,
    use_threads,
)
from gradctl.cli.reporting import ReportOptions, emit_units, judging, report_options
from gradctl.cli.users_code import users_code
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import TargetOptions

if TYPE_CHECKING:
    from gradctl.commands.optimize import Optimized, Options
    from gradctl.core.allows import Allows

# The parameters that apply to a file; the other options describe a program.
_OF_FILES = ("target", "output", "inputs_file", "seed", "threads", "level", "passes", "opset", "list_passes")
# Files that are neither ONNX nor a program: a name with any other suffix is a TARGET.
_NOT_ONNX = (".pb", ".pt", ".pt2", ".pth", ".ts", ".ort", ".tflite", ".safetensors", ".npz")

_LEVEL = (
    "safe: remove unused nodes. default: also fold constants and fuse nodes into ONNX operators. max: also fuse into "
    "operators of onnxruntime, and optimise for this machine.  [default: default]"
)
_LIST = "List the passes with their levels, and exit."
_PRINTS_AND_EXITS: Any = {"is_flag": True, "is_eager": True, "expose_value": False}
_OPSET = "First convert the graph to this version of ONNX's operators."


def _list_passes(context: click.Context, param: click.Parameter, value: bool) -> Any:
    """Print a line for each pass (name, level, package, description), and exit."""
    if not value:
        return
    from gradctl.passes.table import PASSES

    for each in PASSES.values():
        notes = [each.does, "tied to this machine" if each.tied_to_machine else "", each.missing().rstrip(".")]
        text = "; ".join(note for note in notes if note)
        click.echo(f"{each.name:<18}{each.level or '-':<9}{each.backend:<13}{text}")
    context.exit(0)


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl optimize model.onnx\n"
    "  gradctl optimize model.onnx -o model.opt.onnx\n"
    "  gradctl optimize model.onnx --pass ir-unused --pass ort-basic --opset 20 -o model.opt.onnx\n"
    "  gradctl optimize sample_models/transformer.py --level max -o transformer.onnx",
)
@target_options
@output_option("OUT", "File to write: .onnx. It may be FILE itself. Without it, nothing is written.", is_required=False)
@option("--level", heading="Passes", metavar="LEVEL", type=click.Choice(["safe", "default", "max"]), help=_LEVEL)
@option("--pass", "passes", heading="Passes", metavar="NAME", multiple=True, help="Run this pass. May be repeated.")
@option("--opset", heading="Passes", metavar="N", type=click.IntRange(min=1), help=_OPSET)
@dynamic_option(", with a TARGET")
@option("--list-passes", heading="Passes", callback=_list_passes, help=_LIST, **_PRINTS_AND_EXITS)
@report_options
def optimize(
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    output: Path | None,
    level: str | None,
    passes: tuple[str, ...],
    opset: int | None,
    dynamic: tuple[str, ...],
) -> int:
    """Optimise the ONNX graph of FILE or TARGET; verify each pass.

    The passes are those of onnx-ir, onnxscript, onnxruntime and onnxslim. After each pass, the graphs before and after
    it are run on the same inputs: random ones (or --inputs), other values, other signs, zeros, large and tiny values,
    other sizes. A pass that changes an output is undone and reported, with the first value that it changes and the
    smallest graph that shows the difference. A TARGET is exported first, and the result is compared with eager.

    OUT is written only if the verdict is pass; otherwise an existing OUT is not changed. Without -o this is a trial:
    the report is the same, and no file is written.
    """
    if output is not None and output.suffix.lower() != ".onnx":
        raise click.UsageError(f"{output}: optimize writes .onnx.")
    if level is not None and passes:
        raise click.UsageError("--level and --pass both select the passes. Omit one of them.")
    is_file = _is_file(checking)
    ensure_files(checking, is_program=not is_file)
    with judging(reporting) as (allows, progress):
        options = _options(level, passes, opset, checking, reporting, allows=allows, progress=progress)
        optimized = _file(checking, output, options) if is_file else _target(checking, output, dynamic, options)
    said = f"{output} is {'written' if optimized.written else 'not written'}"
    if output is None:
        said = "trial: no file is written (add -o OUT to write the result)"
    return emit_units([optimized.unit], allows, checking, reporting, preface=f"{said}\n\n")


def _options(
    level: str | None,
    passes: tuple[str, ...],
    opset: int | None,
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    allows: Allows,
    progress: Callable[[str], None],
) -> Options:
    from gradctl.commands.optimize import Options, chosen_passes
    from gradctl.passes.table import pass_named

    chosen_level = level or "default"
    try:
        named = [pass_named(name) for name in passes]
        for each in named:
            if missing := each.missing():
                raise click.UsageError(f"--pass {each.name}: {missing}")
    except ValueError as error:
        raise click.UsageError(f"--pass: {error}") from error
    return Options(
        chosen_passes(chosen_level, named, opset),
        level=None if passes else chosen_level,
        seed=checking.seed,
        allows=allows,
        fail_on=reporting.fail_on,
        progress=progress,
    )


def _file(checking: TargetOptions, output: Path | None, options: Options) -> Optimized:
    from gradctl.commands.optimize import optimize_file

    use_threads(checking)
    return optimize_file(Path(checking.target), output, options, inputs=checking.inputs_file)


def _target(checking: TargetOptions, output: Path | None, dynamic: tuple[str, ...], options: Options) -> Optimized:
    from gradctl.commands.optimize import optimize_target

    free = free_sizes_from(dynamic)
    return optimize_target(subject_from(checking), output, options, dynamic=free, around=users_code)


def _is_file(checking: TargetOptions) -> bool:
    """Return whether the target is a file, not a program; raise if an option does not apply."""
    suffix = Path(checking.target).suffix.lower()
    if suffix in _NOT_ONNX:
        raise click.UsageError(
            f"{checking.target} is neither an .onnx file nor a program: optimize takes an .onnx file, or a TARGET that "
            "it exports."
        )
    if suffix != ".onnx":
        return False
    refuse_other_options(_OF_FILES, "applies to a program, not to a file.")
    return True
