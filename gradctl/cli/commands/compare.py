"""``gradctl compare``: static forms of a model, a file, or another implementation against eager."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradctl.cli.help import FormChoice, HelpfulCommand, option, timeout_option
from gradctl.cli.options import (
    ensure_provider_applies,
    refuse_other_options,
    sizes_of,
    subject_from,
    target_options,
    use_threads,
)
from gradctl.cli.reporting import ReportOptions, emit_units, judging, report_options
from gradctl.cli.repro import add_repros, repro_option
from gradctl.cli.users_code import users_code
from gradctl.core.names import (
    DEFAULT_FORMS,
    FORMS,
    NEEDS_PROCESS,
    NO_GPU,
    OPTIMIZERS,
    RANK_FORMS,
    VARIANTS,
    VARIANTS_IN_PROCESS,
)
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import TargetOptions, TrainingOptions

if TYPE_CHECKING:
    from gradctl.core.allows import Allows
    from gradctl.core.findings import Unit
    from gradctl.isolation.protocol import UnitRequest

_Progress = Callable[[str], None]
_STATIC_FORMS = [name for name in FORMS if name != "eager"]
_FORM_CHOICE = FormChoice(_STATIC_FORMS)
_FORM = f"Form to compare: {_FORM_CHOICE.text}. May be repeated.  [default: the first {len(DEFAULT_FORMS) - 1}]"
_TIMEOUT = f"Time limit of each form or variant that runs in its own process: {', '.join(NEEDS_PROCESS)}; of ranks."
_TRAINING = "Training steps"
_STEPS = "Compare variants of the training step with the plain one for N steps."
_OPTIMIZER = f"Optimizer: {', '.join(OPTIMIZERS)}, or FILE:FACTORY.  [default: {OPTIMIZERS[0]}]"
_ALL_VARIANTS = [name if value is None else f"{name}:{value}" for name, value in VARIANTS.items()]
_VARIANT = (
    f"Variant of the step: {', '.join(_ALL_VARIANTS)}; or a function step(model, optimizer, *args, **kwargs) -> loss "
    "in TARGET's file, or FILE:NAME. May be repeated.  [default: all but functions and ranks]"
)
_BISECT = "If compile is wrong, find the module and the part of torch's compiler. Slow."
_PAIR = "Another implementation"
_MAP = "Name of a parameter in TARGET and in CANDIDATE; '*' stands for any text. May be repeated."
_OWN = "Leave the parameters of CANDIDATE as they are.  [default: those of TARGET are copied]"
_MODEL_FILES = (".onnx", ".pt", ".pt2", ".pth", ".ts")
# The parameters that apply to two files; the other options describe a program.
_OF_FILES = ("target", "candidate", "inputs_file", "seed", "threads")


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl compare sample_models/mlp.py --form trace --form export\n"
    "  gradctl compare sample_models/mlp.py mlp.pt2 --trust\n"
    "  gradctl compare sample_models/attention.py:reference sample_models/attention.py:fused\n"
    "  gradctl compare sample_models/transformer.py --steps 2 --variant foreach\n"
    "  gradctl compare a.onnx b.onnx --inputs test_data_set_0",
)
@target_options
@click.argument("candidate", required=False, metavar="[CANDIDATE]", type=click.Path(path_type=Path))
@click.option("--form", "forms", metavar="FORM", type=_FORM_CHOICE, multiple=True, help=_FORM)
@option("--map", "renamed", heading=_PAIR, metavar="OLD=NEW", multiple=True, help=_MAP)
@option("--own-weights", heading=_PAIR, is_flag=True, help=_OWN)
@option("--candidate-device", heading=_PAIR, metavar="DEVICE", help="Device of CANDIDATE.  [default: --device]")
@option("--reference-device", heading=_PAIR, metavar="DEVICE", help="Device of TARGET.  [default: --device]")
@option("--steps", heading=_TRAINING, metavar="N", type=click.IntRange(1), help=_STEPS)
@option("--optimizer", heading=_TRAINING, metavar="NAME", default=OPTIMIZERS[0], help=_OPTIMIZER)
@option("--variant", "variants", heading=_TRAINING, metavar="NAME", multiple=True, help=_VARIANT)
@click.option("--trust", is_flag=True, help="Load a file (.pt2, TorchScript) although it contains code.")
@timeout_option(_TIMEOUT)
@click.option("--bisect", is_flag=True, help=_BISECT)
@repro_option
@report_options
def compare(
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    candidate: Path | None,
    forms: tuple[str, ...],
    trust: bool,
    repro: Path | None,
    renamed: tuple[str, ...],
    own_weights: bool,
    candidate_device: str | None,
    reference_device: str | None,
    steps: int | None,
    optimizer: str,
    variants: tuple[str, ...],
    **settings: Any,
) -> int:
    """Compare the static forms of TARGET with eager, or another implementation with TARGET.

    A form is one way to capture the model: trace, script, export, aot, compile or onnx. First the gradients of eager
    are checked. Then each form is captured from a copy of the model and run three times on each of several inputs: the
    example, other values, other signs, other strides. Outputs, gradients and state are compared with eager, and finite
    differences decide which of the two is right. A form that cannot capture the model is skipped with the reason, and
    inconclusive if --form names it.

    With --sizes, eager and the forms that pass are checked again at each size: script, aot and compile as captured on
    the example; the other forms captured again, at the smallest, a middle and the largest size and in each layout.
    A CANDIDATE runs at each size.

    CANDIDATE is another target (a fused kernel, a refactored module), which gets the inputs, the seed and the
    parameters of TARGET: they are paired by name, by --map, else by order and shape. Both run in their own dtype and in
    float64, so that rounding is distinguished from an error.

    CANDIDATE may be a file (.onnx, .pt2, TorchScript): is it this model? With two .onnx files, their outputs are
    compared on --inputs or on random inputs.

    With --steps, variants of the training step (checkpointing, a foreach optimizer, a step of your own) are compared
    with the plain step: loss, gradients, parameters, optimizer state and buffers after each of N steps. A CANDIDATE is
    trained in the plain way, too: does it train like TARGET?
    """
    own_forms = (forms or DEFAULT_FORMS) if candidate is None and steps is None else ()
    ensure_provider_applies(checking, ["onnx"] if candidate is not None and _is_onnx(candidate) else own_forms)
    if steps is not None:
        _refuse_other_than_steps(candidate)
        return _steps(
            checking,
            TrainingOptions(steps, optimizer),
            variants,
            reporting,
            timeout=settings["timeout"],
            candidate=candidate,
            renamed=renamed,
            own_values=own_weights,
        )
    for name in ("optimizer", "variants"):
        _refuse(name, "applies to training steps. Add --steps N.")
    if Path(checking.target).suffix.lower() in _MODEL_FILES:
        _ensure_two_onnx_files(checking, candidate)
    devices = candidate_device, reference_device
    if candidate is not None and candidate.suffix.lower() not in _MODEL_FILES:
        _refuse_form_options()
        return _candidate(checking, str(candidate), renamed, devices, reporting, own_weights=own_weights)
    _refuse_pair_options(candidate)
    file = candidate
    if file is not None and forms:
        raise click.UsageError("--form selects what is captured, and a FILE is captured already. Omit one of them.")
    if file is not None and repro is not None:
        raise click.UsageError("--repro applies to forms, not to a FILE. Use --form with the form of the file instead.")
    if file is not None and checking.sizes is not None:
        raise click.UsageError("--sizes applies to forms, not to a FILE. Omit one of them.")
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


def _candidate(
    checking: TargetOptions,
    target: str,
    renamed: tuple[str, ...],
    devices: tuple[str | None, str | None],
    reporting: ReportOptions,
    *,
    own_weights: bool,
) -> int:
    import dataclasses

    own = dataclasses.replace(checking, target=target, input_specs=(), inputs_file=None, loss=None)
    sizes = sizes_of(checking, None)
    for each in (checking, own):
        ensure_files(each)
    with judging(reporting) as (allows, progress), users_code():
        from gradctl.commands.compare_candidate import compare_candidate
        from gradctl.subject.inputs.example import Inputs
        from gradctl.subject.loading.load import load_subject, usable_device

        pairs = _pairs(renamed)
        on, other = (each or checking.device for each in devices)
        reference = subject_from(dataclasses.replace(checking, device=other))
        candidate = load_subject(dataclasses.replace(own, device=on), Inputs(reference.args, reference.kwargs))
        unit = compare_candidate(
            reference,
            candidate,
            renamed=pairs,
            own_values=own_weights or checking.weights is not None,
            device=None if on == other else usable_device(on),
            sizes=sizes,
            max_sizes=checking.max_sizes,
            allows=allows,
            fail_on=reporting.fail_on,
            progress=progress,
        )
    return emit_units([unit], allows, checking, reporting)


def _steps(
    checking: TargetOptions,
    training: TrainingOptions,
    variants: tuple[str, ...],
    reporting: ReportOptions,
    *,
    timeout: float,
    candidate: Path | None,
    renamed: tuple[str, ...],
    own_values: bool,
) -> int:
    import dataclasses

    import msgspec

    from gradctl.isolation.units import start_units

    own = dataclasses.replace(checking, target=str(candidate), input_specs=(), inputs_file=None, loss=None)
    for each in (checking, *([own] if candidate is not None else ())):
        ensure_files(each)
    chosen = list(dict.fromkeys(variants)) or ([] if candidate is not None else _ALL_VARIANTS)
    apart = [each for each in chosen if each.partition(":")[0] in VARIANTS_IN_PROCESS]
    here = [each for each in chosen if each not in apart]
    with judging(reporting) as (allows, progress), users_code():
        from gradctl.commands.compare_steps import TrainedCandidate, compare_steps
        from gradctl.subject.inputs.example import Inputs
        from gradctl.subject.loading.load import load_subject

        subject = subject_from(checking)
        other: TrainedCandidate | None = None
        if candidate is not None:
            loaded = load_subject(own, Inputs(subject.args, subject.kwargs))
            other = {"candidate": loaded, "renamed": _pairs(renamed), "own_values": own_values}
        settings = {"named": bool(variants), "timeout_seconds": timeout, "training": training}
        requests = _requests(apart, checking, reporting, **settings)
        with start_units(requests) as wait:  # they run beside the variants that need no process of their own
            units = (
                []
                if not here and other is None
                else compare_steps(
                    subject,
                    training.steps,
                    optimizer=training.optimizer,
                    variants=here,
                    candidate=other,
                    is_named=bool(variants),
                    target=checking.target,
                    loading=checking,
                    allows=allows,
                    fail_on=reporting.fail_on,
                    progress=progress,
                )
            )
            progress(f"waiting for {', '.join(apart)}" if apart else "")
            units += [msgspec.structs.replace(unit, findings=allows.apply(unit.findings)) for unit in wait(None)]
    order = {name: number for number, name in enumerate(chosen)}  # a candidate comes last
    units.sort(key=lambda unit: order.get(unit.form, len(order)))
    return emit_units(units, allows, checking, reporting)


def _requests(
    forms: Iterable[str], checking: TargetOptions, reporting: ReportOptions, **settings: Any
) -> list[UnitRequest]:
    """Return a request for each form or variant that runs in a process of its own."""
    from gradctl.isolation.protocol import UnitRequest

    judged = {"allows": reporting.allows, "fail_on": reporting.fail_on, **settings}
    return [UnitRequest(checking=checking, form=form, **judged) for form in forms]


def _pairs(renamed: tuple[str, ...]) -> list[tuple[str, str]]:
    from gradctl.comparison.candidates.pairing import parse_map

    try:
        return parse_map(renamed)
    except ValueError as error:
        raise click.UsageError(f"--map {error}") from error


def _refuse_other_than_steps(candidate: Path | None) -> None:
    """Raise for an option that applies to forms, files or another target only."""
    if candidate is not None and candidate.suffix.lower() in _MODEL_FILES:
        raise click.UsageError(f"--steps trains a TARGET, and {candidate} is a model file. Omit one of them.")
    if candidate is None:
        _refuse_pair_options(candidate)
    for name in ("forms", "trust", "bisect", "repro", "sizes", "candidate_device", "reference_device"):
        _refuse(name, "does not apply to training steps. Omit one of it and --steps.")


def _refuse_form_options() -> None:
    """Raise for an option that applies to forms and files only."""
    for name in ("forms", "trust", "timeout", "bisect", "repro"):
        _refuse(name, "applies to the forms of one TARGET, and CANDIDATE is another target. Omit one of them.")


def _refuse_pair_options(candidate: Path | None) -> None:
    """Raise for an option that applies to two targets only."""
    said = "there is none" if candidate is None else f"{candidate} is a file"
    for name in ("renamed", "own_weights", "candidate_device", "reference_device"):
        _refuse(name, f"applies to another target as CANDIDATE, and {said}.")


def _refuse(name: str, reason: str) -> None:
    context = click.get_current_context()
    if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
        parameter = next(each for each in context.command.params if each.name == name)
        raise click.UsageError(f"{parameter.opts[0]} {reason}")


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
    from gradctl.commands.compare_sizes import compare_at_sizes
    from gradctl.isolation.units import start_units

    chosen = forms or DEFAULT_STATIC_FORMS
    sizes = sizes_of(checking, repro)
    if checking.device == "cpu" and not set(RANK_FORMS).isdisjoint(chosen):
        os.environ.update([NO_GPU])
    subject = subject_from(checking)
    settings = {"named": bool(forms), "timeout_seconds": timeout, "bisect": bisect}
    requests = _requests([form for form in chosen if form in NEEDS_PROCESS], checking, reporting, **settings)
    done: list[Unit] = []

    def say(text: str) -> None:
        progress(f"{len(done)} of {len(chosen) + 1} forms  {text}")

    def complete(unit: Unit) -> None:
        done.append(unit)
        progress(f"{unit.form}: {unit.verdict} ({unit.seconds:.1f} s)\n")
        say("")

    with start_units(requests) as wait:  # they run beside the forms that need no process of their own
        units = compare_at_sizes(
            subject,
            sizes,
            limit=checking.max_sizes,
            forms=[form for form in chosen if form not in NEEDS_PROCESS],
            named=bool(forms),
            allows=allows,
            fail_on=reporting.fail_on,
            progress=say,
            on_unit=complete,
            rank_seconds=timeout,
        )
        say(f"waiting for {', '.join(request.form for request in requests)}")
        # What was accepted there is marked here too, or an allow that was needed would be called unused.
        units += [
            msgspec.structs.replace(unit, findings=allows.apply(unit.findings))
            for unit in wait(lambda _, unit: complete(unit))
        ]
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
