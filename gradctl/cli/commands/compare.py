"""``gradctl compare``: every static form of a model, or a file, against eager: outputs, gradients and state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradctl.cli.help import HelpfulCommand
from gradctl.cli.options import refuse_other_options, subject_from, target_options, use_threads
from gradctl.cli.reporting import ReportOptions, emit_units, judging, report_options
from gradctl.cli.repro import add_repros, repro_option
from gradctl.cli.users_code import users_code
from gradctl.core.names import FORMS, NEEDS_PROCESS
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import TargetOptions

if TYPE_CHECKING:
    from gradctl.core.allows import Allows
    from gradctl.core.findings import Unit

_Progress = Callable[[str], None]
_STATIC_FORMS = [name for name in FORMS if name != "eager"]
_FORM = f"Form to compare: {', '.join(_STATIC_FORMS)}. May be repeated.  [default: all without -joint]"
_TIMEOUT = "Time limit of each form that runs in its own process: compile, onnx, onnx-joint."
_BISECT = "If compile is wrong, find the module and the part of torch's compiler. Slow."
_MODEL_FILES = (".onnx", ".pt", ".pt2", ".pth", ".ts")
# The parameters that apply to two files; the other options describe a program.
_OF_FILES = ("target", "file", "inputs_file", "seed", "threads")


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl compare sample_models/mlp.py --form trace --form export\n"
    "  gradctl compare sample_models/mlp.py mlp.pt2 --trust\n"
    "  gradctl compare a.onnx b.onnx --inputs test_data_set_0",
)
@target_options
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--form", "forms", metavar="FORM", type=click.Choice(_STATIC_FORMS), multiple=True, help=_FORM)
@click.option("--trust", is_flag=True, help="Load FILE (.pt2, TorchScript) although it contains code.")
@click.option("--timeout", metavar="SECONDS", type=click.FloatRange(1), default=300.0, show_default=True, help=_TIMEOUT)
@click.option("--bisect", is_flag=True, help=_BISECT)
@repro_option
@report_options
def compare(
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    file: Path | None,
    forms: tuple[str, ...],
    trust: bool,
    repro: Path | None,
    **settings: Any,
) -> int:
    """Compare the static forms of TARGET with eager.

    A form is one way to capture the model: trace, script, export, aot, compile or onnx. First the gradients of eager
    are checked. Then each form is captured from a copy of the model and run three times on each of several inputs: the
    example, other values, other signs, other strides. Outputs, gradients and state are compared with eager, and finite
    differences decide which of the two is right. A form that cannot capture the model is skipped with the reason, and
    inconclusive if --form names it.

    With FILE (.onnx, .pt2, TorchScript), TARGET is compared with that file. With two .onnx files, their outputs are
    compared on --inputs or on random inputs.
    """
    if Path(checking.target).suffix.lower() in _MODEL_FILES:
        _ensure_two_onnx_files(checking, file)
    if file is not None and forms:
        raise click.UsageError("--form selects what is captured, and a FILE is captured already. Omit one of them.")
    if file is not None and repro is not None:
        raise click.UsageError("--repro applies to forms, not to a FILE. Use --form with the form of the file instead.")
    is_onnx = _is_onnx(Path(checking.target))
    ensure_files(checking, file, is_program=not is_onnx)
    with judging(reporting) as (allows, progress), users_code():  # what model and compilers print is not the report
        if file is not None and is_onnx:
            units = [_files(checking, file, allows, reporting, progress=progress)]
        elif file is not None:
            units = _file(checking, file, allows, reporting, trust=trust, progress=progress)
        else:
            units = _forms(checking, forms, allows, reporting, repro=repro, progress=progress, **settings)
    return emit_units(units, allows, checking, reporting)


def _forms(
    checking: TargetOptions,
    forms: tuple[str, ...],
    allows: Allows,
    reporting: ReportOptions,
    *,
    timeout: float,
    bisect: bool,
    repro: Path | None,
    progress: _Progress,
) -> list[Unit]:
    import msgspec

    from gradctl.commands.compare import DEFAULT_STATIC_FORMS
    from gradctl.commands.compare import compare as compare_forms
    from gradctl.isolation.protocol import UnitRequest
    from gradctl.isolation.units import start_units

    chosen = forms or DEFAULT_STATIC_FORMS
    subject = subject_from(checking)
    requests = [
        UnitRequest(
            checking=checking,
            form=form,
            allows=reporting.allows,
            fail_on=reporting.fail_on,
            named=bool(forms),
            bisect=bisect,
            timeout_seconds=timeout,
        )
        for form in chosen
        if form in NEEDS_PROCESS
    ]
    done: list[Unit] = []

    def say(text: str) -> None:
        progress(f"{len(done)} of {len(chosen) + 1} forms  {text}")

    def complete(unit: Unit) -> None:
        done.append(unit)
        progress(f"{unit.form}: {unit.verdict} ({unit.seconds:.1f} s)\n")
        say("")

    with start_units(requests) as wait:  # they run beside the forms that need no process of their own
        units = compare_forms(
            subject,
            forms=[form for form in chosen if form not in NEEDS_PROCESS],
            named=bool(forms),
            allows=allows,
            fail_on=reporting.fail_on,
            progress=say,
            on_unit=complete,
        )
        say(f"waiting for {', '.join(request.form for request in requests)}")
        # What was accepted there is marked here too, or an allow that was needed would be called unused.
        units += [msgspec.structs.replace(unit, findings=allows.apply(unit.findings)) for unit in wait(complete)]
    return add_repros(units, checking, subject, reporting, repro, progress=progress)


def _file(
    checking: TargetOptions, file: Path, allows: Allows, reporting: ReportOptions, *, trust: bool, progress: _Progress
) -> list[Unit]:
    from gradctl.commands.compare import Comparing

    progress(f"comparing {file}")
    comparing = Comparing(subject_from(checking), allows, fail_on=reporting.fail_on, outputs_only=_is_onnx(file))
    return [comparing.file(file, trusted=trust)]


def _files(
    checking: TargetOptions, file: Path, allows: Allows, reporting: ReportOptions, *, progress: _Progress
) -> Unit:
    from gradctl.commands.compare_files import compare_files

    use_threads(checking)
    return compare_files(
        Path(checking.target),
        file,
        inputs=checking.inputs_file,
        seed=checking.seed,
        allows=allows,
        fail_on=reporting.fail_on,
        progress=progress,
    )


def _is_onnx(path: Path) -> bool:
    return path.suffix.lower() == ".onnx"


def _ensure_two_onnx_files(checking: TargetOptions, file: Path | None) -> None:
    """Raise unless both are ONNX, and every option applies to files."""
    if not _is_onnx(Path(checking.target)) or file is None or not _is_onnx(file):
        raise click.UsageError(
            f"{checking.target} is a model file: compare takes a TARGET and a FILE, or two .onnx files."
        )
    refuse_other_options(_OF_FILES, "applies to a program, not to two files.")
