"""``gradctl bench``: what each form of a model costs and gains, and whether it is right."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from gradctl.cli.help import FiniteRange, HelpfulCommand, option, timeout_option
from gradctl.cli.options import target_options, use_threads
from gradctl.cli.reporting import ReportOptions, emit_units, judging, report_options
from gradctl.cli.users_code import users_code
from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.core.names import DEFAULT_FORMS, FORMS, LONGEST_SECONDS
from gradctl.core.target_files import ensure_files
from gradctl.core.target_options import MeasuringOptions, TargetOptions

if TYPE_CHECKING:
    from gradctl.core.findings import Unit

_STATIC_FORMS = [name for name in FORMS if name != "eager"]
_FORM = f"Form to measure: {', '.join(_STATIC_FORMS)}. May be repeated.  [default: the first {len(DEFAULT_FORMS) - 1}]"
_BATCH = "Batch sizes (axis 0 of the inputs) to measure.  [default: that of the example]"
_SECONDS = "Time for the calls of a form and of eager, in turn, at each batch size."
_TIMEOUT = "Time limit of each form at each batch size."


def _batches(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Return the sizes of ``1,8,64``."""
    try:
        sizes = tuple(dict.fromkeys(int(each) for each in value.split(","))) if value is not None else ()
    except ValueError:
        sizes = (0,)
    if any(each < 1 for each in sizes):
        raise click.BadParameter(f"{value!r} is not a list of positive numbers. Write, for example, 1,8,64.")
    return sizes


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl bench sample_models/transformer.py\n"
    "  gradctl bench sample_models/mlp.py --form export --form onnx --batch 1,8,64 --threads 1",
)
@target_options
@click.option("--form", "forms", metavar="FORM", type=click.Choice(_STATIC_FORMS), multiple=True, help=_FORM)
@option("--batch", "batches", heading="Inputs", metavar="N,N,…", callback=_batches, help=_BATCH)
@click.option(
    "--seconds",
    metavar="SECONDS",
    type=FiniteRange(0.1, LONGEST_SECONDS),
    default=3.0,
    show_default=True,
    help=_SECONDS,
)
@timeout_option(_TIMEOUT)
@report_options
def bench(
    checking: TargetOptions,
    reporting: ReportOptions,
    *,
    forms: tuple[str, ...],
    batches: tuple[int, ...],
    seconds: float,
    timeout: float,
) -> int:
    """Measure what each form of TARGET costs, and whether it is right.

    Each form is captured and called in a process of its own, one after another, in turn with eager: a ratio is the
    median over rounds of the form's time by eager's, with its 95 % confidence interval. Then the form is compared with
    eager as by compare, which decides the verdict and the exit code; no time does. Parameters get gradients; inputs do
    only if there are no parameters. compile starts with empty caches.

    Graph breaks and recompilations are notes with the line of the model. With --batch, a form is captured and measured
    at each batch size; aot and compile are then called at the other sizes, which may compile them again.
    """
    ensure_files(checking)
    with judging(reporting) as (allows, progress), users_code():
        import msgspec

        from gradctl.commands.bench import merged_batches
        from gradctl.isolation.protocol import UnitRequest
        from gradctl.isolation.units import run_units

        use_threads(checking)  # which the report names
        sizes = batches or (None,)
        # A compiled form is called at the other sizes in the process of the first one only.
        chosen = list(dict.fromkeys(("eager", *forms) if forms else DEFAULT_FORMS))
        requests = [
            UnitRequest(
                checking=checking,
                form=form,
                allows=reporting.allows,
                fail_on=reporting.fail_on,
                named=bool(forms),
                measuring=MeasuringOptions(seconds, size, batches[1:] if size == sizes[0] else ()),
                timeout_seconds=timeout,
            )
            for form in chosen
            for size in sizes
        ]

        def started(request: UnitRequest) -> None:
            progress(f"{requests.index(request)} of {len(requests)}  measuring {request.form}")

        def ended(request: UnitRequest, unit: Unit) -> None:
            progress(f"{unit.form}: {unit.verdict} ({unit.seconds:.1f} s)\n")

        # One process at a time: they would take each other's cores.
        run = partial(run_units, on_start=started, on_result=ended)
        first = run(requests[:1])
        _raise_error_of_target(first[0])
        found = iter([*first, *run(requests[1:])])
        units = [
            merged_batches({f"batch={size}" if size is not None else None: next(found) for size in sizes})
            for _ in chosen
        ]
        units = [msgspec.structs.replace(unit, findings=allows.apply(unit.findings)) for unit in units]
    return emit_units(units, allows, checking, reporting)


def _raise_error_of_target(eager: Unit) -> None:
    """Raise what keeps eager from running at all: it would be the reason of every row.

    Raises:
        TargetError: GC1xx; NothingToCheck of GC110.
    """
    code = eager.findings[0].code if eager.status in ("error", "unsupported") and eager.findings else ""
    if code.startswith("GC1"):
        kind = NothingToCheck if eager.status == "unsupported" else TargetError
        raise kind(code, eager.findings[0].message, details=eager.details or "")
