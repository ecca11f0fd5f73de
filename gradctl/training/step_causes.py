"""The cause of a difference between a variant and the plain step: experiments of the variant, run until one agrees."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import msgspec

from gradctl.core.errors import is_out_of_memory
from gradctl.core.findings import Finding
from gradctl.training.plain_runs import PlainRuns, Precision
from gradctl.training.step_comparison import StepComparison
from gradctl.training.step_experiments import Alter, Experiment, Experiments
from gradctl.training.trainer import Trainer
from gradctl.training.variant_comparison import VariantComparison


def explain_steps(findings: Sequence[Finding], compared: VariantComparison) -> list[Finding]:
    """Return the findings with their cause, if an experiment shows it: ``--allow CAUSE:VARIANT`` accepts them then."""
    cause = cause_of(compared) if findings and compared.variant.row.module else None
    if cause is None:
        return list(findings)
    fields = {"cause": cause.code, "cause_message": f"{cause.said()} ({cause.code}).", "hint": cause.hint}
    allow = f"{cause.code}:{compared.variant.name}"
    return [
        msgspec.structs.replace(each, **fields, allow=allow) if each.severity == "error" else each for each in findings
    ]


def cause_of(compared: VariantComparison) -> Experiment | None:
    """Return the last experiment in which the variant agrees with the plain step; None without one."""
    row = compared.variant.row
    experiments: Callable[..., Experiments] | None = getattr(importlib.import_module(row.module), "experiments", None)
    if experiments is None:
        return None
    # Several rows of one file are told apart by their functions.
    entry = [] if row.entry == "alter" else [row.entry]
    running, found = experiments(compared.variant.argument, *entry), None
    try:
        experiment = next(running)
        while True:
            agrees = _agrees(compared, experiment)
            found = experiment if agrees else found
            experiment = running.send(agrees)
    except StopIteration:
        return found


def _agrees(compared: VariantComparison, experiment: Experiment) -> bool:
    """Return whether the variant agrees with the plain step, up to the step at which it differed or raised."""
    failing, argument = compared.failing, compared.variant.argument
    is_native = failing is None or failing.precision != "float64"
    precision: Precision = "native" if is_native else "float64" if compared.variant.row.promotes else "unpromoted"
    rounding = failing.rounding if failing is not None else None
    steps = failing.steps if failing is not None else compared.raised[1] if compared.raised is not None else 1
    runs = compared.runs.with_means if compared.has_means else compared.runs
    if experiment.plain is not None:
        runs = PlainRuns(runs.recipe, runs.steps, _with_argument(experiment.plain, argument), has_means=runs.has_means)
    try:
        plain = runs.run(precision, rounding)
        if plain is None:
            return False
        trainer = runs.trainer(precision)
        experiment.alter(trainer, argument)
        comparison = StepComparison("", rounding, runs.order)
        comparison.add(plain[:steps], trainer.run(len(plain)))
    except Exception as error:  # of the model, run in a way that it may not be made for
        if is_out_of_memory(error):
            raise
        return False
    return not comparison.differs


def _with_argument(alter: Alter, argument: str | None) -> Callable[[Trainer], None]:
    return lambda trainer: alter(trainer, argument)
