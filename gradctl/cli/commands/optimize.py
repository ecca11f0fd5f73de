"""``gradctl optimize``: optimisation passes over a graph, each verified by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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

# What a file has a use for; the other options build a program.
_OF_FILES = ("target", "output", "inputs_file", "seed", "threads", "level", "passes", "opset", "list_passes")
_OF_REPORTS = ("format", "files", "allows", "fail_on")
# Files that are no programs: with any other suffix, a name is a TARGET.
_NOT_ONNX = (".pb", ".pt", ".pt2", ".pth", ".ts", ".ort", ".tflite", ".safetensors", ".npz")


@click.command(
    epilog="\b\nExamples:\n"
    "  gradctl optimize model.onnx\n"
    "  gradctl optimize model.onnx -o model.opt.onnx\n"
    "  gradctl optimize model.onnx --pass ir-unused --pass ort-basic --opset 20 -o model.opt.onnx\n"
    "  gradctl optimize sample_models/transformer.py --level max -o transformer.onnx"
)
@target_options
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=click.Path(path_type=Path),
    help="The file to write: .onnx. It may be FILE itself. Without it, nothing is written.",
)
@click.option(
    "--level",
    type=click.Choice(["safe", "default", "max"]),
    help="safe removes what is not needed; default also folds and fuses into ONNX's operators; max fuses into "
    "onnxruntime's, and for this machine.  [default: default]",
)
@click.option("--pass", "passes", metavar="NAME", multiple=True, help="Run this pass; may be repeated, in that order.")
@click.option("--opset", type=click.IntRange(min=1), help="Convert to this version of ONNX's operators first.")
@dynamic_option("Leave the size of an input of TARGET free, for example x:0=batch. May be repeated.")
@click.option(
    "--list-passes",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, _, value: _list_passes(context) if value else None,
    help="List the passes of each level, and end.",
)
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
    """Optimise the graph of FILE or TARGET, each pass verified.

    The optimisers are those of onnx-ir, onnxscript, onnxruntime and onnxslim. After each pass the graph is checked and
    run beside the graph before it: on drawn inputs (or --inputs), other values, flipped signs, zeros, large and tiny
    values, other sizes. A pass that changes what the graph computes is undone and named, with the first value that it
    changes and the fewest nodes that show it. A TARGET is exported first, and the result compared with eager.

    OUT is written if the result agrees; otherwise an existing file stays as it is. Without -o it is a trial: the same
    report, and no file.
    """
    if output is not None and output.suffix.lower() != ".onnx":
        raise click.UsageError(f"{output}: optimize writes .onnx.")
    if level is not None and passes:
        raise click.UsageError("--level and --pass both say which passes run. Give one of them.")
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
    """Return whether the target is a file, not a program; raise if the options do not fit."""
    suffix = Path(checking.target).suffix.lower()
    if suffix in _NOT_ONNX:
        raise click.UsageError(
            f"{checking.target} is no ONNX file by its name, and no program: optimize takes .onnx, or a TARGET that it "
            "exports."
        )
    if suffix != ".onnx":
        return False
    refuse_other_options((*_OF_FILES, *_OF_REPORTS), "is for a program; a file is optimised as it is.")
    return True


def _list_passes(context: click.Context) -> Any:
    """Print a line for each pass: name, level, package, what it does; and end."""
    from gradctl.passes.table import PASSES

    for each in PASSES.values():
        notes = [each.does, "tied to this machine" if each.tied_to_machine else "", each.missing().rstrip(".")]
        text = "; ".join(note for note in notes if note)
        click.echo(f"{each.name:<18}{each.level or '-':<9}{each.backend:<13}{text}")
    context.exit(0)
