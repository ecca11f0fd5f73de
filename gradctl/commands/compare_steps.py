"""``gradctl compare --steps``: is each variant of the training step the same step, step after step?

The plain step (zero_grad, forward, backward, optimizer.step) runs on private copies, natively and in float64, and twice
in each with weights and inputs moved by one ULP: that is the noise. Each variant runs from the same state, on the same
batches and seeds, and is compared after each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypedDict

import msgspec
from torch import Tensor

from gradctl.commands.compare import silenced_run
from gradctl.core.allows import Allows
from gradctl.core.assembly import make_unit
from gradctl.core.errors import NothingToCheck, TargetError, is_out_of_memory
from gradctl.core.findings import Unit
from gradctl.core.target_options import TargetOptions
from gradctl.forms.form import CannotCapture
from gradctl.gradients.baseline import Baseline, first_run
from gradctl.gradients.guard import explaining, unexplained
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.instance import InputMode, Instance
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves
from gradctl.training.candidate_step import candidate_variant
from gradctl.training.chosen_variants import ChosenVariant, choose_variants
from gradctl.training.optimizers import OptimizerChoice, optimizer_choice
from gradctl.training.plain_runs import PlainRuns, PlainStep
from gradctl.training.recipe import TrainingRecipe, trained
from gradctl.training.step_causes import explain_steps
from gradctl.training.step_findings import step_findings, step_rows, summarise_training
from gradctl.training.trainer import Trainer
from gradctl.training.variant_comparison import VariantComparison
from gradctl.training.variants.table import CannotApply

_UNREPEATED = "the model differs from itself when run twice from the same seed"


class TrainedCandidate(TypedDict):
    """Another implementation, and how its parameters are paired (as ``pair`` takes them)."""

    candidate: Subject
    renamed: Sequence[tuple[str, str]]
    own_values: bool


def compare_steps(
    subject: Subject,
    steps: int,
    *,
    optimizer: str | Callable[[Sequence[Tensor]], Any] = "adamw",
    variants: Sequence[str | Callable[..., Any]] = (),
    candidate: TrainedCandidate | None = None,
    is_named: bool | None = None,
    target: str | None = None,
    loading: TargetOptions | None = None,
    allows: Allows | Sequence[str] = (),
    fail_on: str = "error",
    progress: Callable[[str], None] | None = None,
    on_unit: Callable[[Unit], None] | None = None,
) -> list[Unit]:
    """Return a unit for each variant of the training step, in this process.

    Args:
        subject: the model and its example; not changed.
        steps: how many, at least 1.
        optimizer: a name, ``FILE:FACTORY``, or ``factory(parameters)``.
        variants: names, or functions ``step(model, optimizer, *args, **kwargs) -> loss``; none: all of the table.
        candidate: another implementation, whose plain step is compared, too; without variants, alone.
        is_named: whether the user asked for just these; None: whether there are any.
        target: what names of functions are beside.
        loading: how a new process loads the subject, to resume there; None: it cannot.
        allows, fail_on, progress: as in ``gradcheck``.
        on_unit: called with each unit as soon as it is complete.

    Raises:
        TargetError: GC111 or GC113 if the plain step raises or has no loss; GC143 no parameter is trained; GC144 for
            the optimizer, GC145 for a variant.
    """
    say, told = progress or (lambda text: None), on_unit or (lambda unit: None)
    accepted = allows if isinstance(allows, Allows) else Allows(allows)
    made_by = optimizer_choice(optimizer)
    chosen = choose_variants(variants, target) if variants or candidate is None else []
    units: list[Unit] = []
    with silenced_run(), ExitStack() as finally_:
        say("running the model")
        baseline = first_run(subject, finally_)
        training = _Training(subject, baseline, steps, made_by, allows=accepted, fail_on=fail_on)
        training.recipe.loading = loading if isinstance(optimizer, str) else None
        say("running the plain step")
        if candidate is not None:
            chosen.append(candidate_variant(training.subject, **candidate))
        for variant in chosen:
            say(f"comparing {variant.name}")
            named = bool(variants) if is_named is None else is_named
            units.append(training.unit(variant, is_named=named))
            told(units[-1])
    return units


@contextmanager
def plain_runs(
    subject: Subject,
    steps: int,
    optimizer: str | Callable[[Sequence[Tensor]], Any],
    alter: Callable[[Trainer], None],
) -> Iterator[PlainRuns]:
    """Provide the plain steps of a model, to be run inside; ``alter`` changes them.

    Raises:
        CannotCapture: the model differs from itself.
        TargetError, NothingToCheck: as ``compare_steps``.
    """
    made_by = optimizer_choice(optimizer)
    with silenced_run(), ExitStack() as finally_:
        baseline = first_run(subject, finally_)
        if baseline is not None and baseline.unrepeated:
            raise CannotCapture(_UNREPEATED)
        training = _Training(subject, baseline, steps, made_by, allows=Allows(()), fail_on="error")
        yield PlainRuns(training.recipe, steps, alter)


def plain_steps(runs: PlainRuns) -> list[PlainStep]:
    """Return the plain steps in the model's own dtype; none if the loss of the first is not finite.

    Raises:
        TargetError: GC111 if the model raises; others as of ``compare_steps``.
    """
    try:
        return runs.run("native") or []
    except (TargetError, CannotApply):
        raise
    except Exception as error:  # the user's model may raise anything
        if is_out_of_memory(error):
            raise
        said = f"{runs.recipe.subject.target} raises in a training step: {first_line(error)}."
        raise TargetError("GC111", said, details=user_frames(error)) from error


class _Training:
    """The plain step of one model, with which variants are compared."""

    def __init__(
        self,
        subject: Subject,
        baseline: Baseline | None,
        steps: int,
        optimizer: OptimizerChoice,
        *,
        allows: Allows,
        fail_on: str,
    ) -> None:
        self.allows, self.fail_on, self.steps, self.baseline = allows, fail_on, steps, baseline
        self.subject = baseline.subject if baseline is not None else subject
        given = [leaf for _, leaf in leaves((subject.args, subject.kwargs)) if isinstance(leaf, Tensor)]
        mode: InputMode = "leaf" if any(each.requires_grad for each in given) else "constant"
        self.recipe = TrainingRecipe(self.subject, optimizer, mode)
        if not trained(Instance(self.subject, input_mode=self.recipe.input_mode)):
            raise NothingToCheck(
                "GC143",
                f"{subject.target} has no parameter that requires a gradient, so that no step can be made. Unfreeze a "
                "parameter, or check the gradients of the inputs with gradctl gradcheck.",
            )
        self.runs = PlainRuns(self.recipe, steps)

    def unit(self, variant: ChosenVariant, *, is_named: bool) -> Unit:
        """Return the verdict on one variant."""
        start = time.perf_counter()
        if self.baseline is not None and self.baseline.unrepeated:
            return self._open(variant.name, _UNREPEATED, start)
        with unexplained() as failures:
            own = variant.alter_plain()
            runs = self.runs if own is None else PlainRuns(self.recipe, self.steps, own)
            compared = VariantComparison(variant, runs)
            try:
                plain = self._plain(runs)
                if isinstance(plain, str):
                    return self._open(variant.name, plain, start)
                compared.compare()
            except CannotApply as refusal:
                unit = self._open(variant.name, refusal.reason, start, status="unsupported")
                return unit if is_named else msgspec.structs.replace(unit, verdict="skipped")
            found, rows = step_findings(compared), step_rows(compared)
            with explaining(f"why {variant.name} differs"):
                found = explain_steps(found, compared)
        unit = make_unit(
            self.subject.target,
            variant.name,
            [*found, *failures.notes()],
            rows,
            allows=self.allows,
            fail_on=self.fail_on,
            reference="the plain step",
            reason="; ".join(compared.notes) or None,
            details=failures.details(),
            seconds=time.perf_counter() - start,
            training=summarise_training(compared, plain),
        )
        done = runs.shortest
        if unit.verdict != "pass" or done == self.steps:
            return unit
        said = f"the loss of step {done + 1} is not finite, so that {done} of {self.steps} steps were compared"
        return msgspec.structs.replace(unit, verdict="inconclusive", reason="; ".join([said, *compared.notes]))

    def _plain(self, runs: PlainRuns) -> int | str:
        """Return the number of plain steps that ran, or why no step can be compared."""
        plain = plain_steps(runs)
        return len(plain) if plain else "the loss of the first step is not finite"

    def _open(self, form: str, reason: str, start: float, **fields: Any) -> Unit:
        return Unit(
            target=self.subject.target,
            form=form,
            verdict="inconclusive",
            reason=reason,
            reference="the plain step",
            seconds=time.perf_counter() - start,
            tensors=self.baseline.unrepeated if self.baseline else (),
            **fields,
        )
