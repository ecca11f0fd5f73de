"""One variant of the training step against the plain step: in float64, whatever rounding does, then natively."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradctl.comparison.difference import Key
from gradctl.core.errors import TargetError, is_out_of_memory
from gradctl.forms.draws import Draw, RecordedDraws, describe_draws, repeats
from gradctl.training.chosen_variants import ChosenVariant
from gradctl.training.plain_runs import PlainRuns, Precision
from gradctl.training.step_comparison import StepComparison, StepDifference
from gradctl.training.trainer import Trainer
from gradctl.training.variants.table import CannotApply

# A relu or a max can flip on one rounding: what differs natively only must do so on as many fresh batches.
_PERSISTS = 3


@dataclass(slots=True, eq=False)
class VariantComparison:
    """What a variant computes, beside the plain step.

    Attributes:
        variant: which.
        runs: the plain step.
        comparisons: in float64, then natively; without the first if the model or the variant does not run in float64.
        raised: what the variant raises where the plain step runs, and the step, from 1.
        draws: how its random numbers differ from those of the plain step, if a step differs.
        has_means: whether it is compared with random numbers replaced by their means, because they differ.
        draws_nothing: whether the user's step draws no random number, and the plain step does.
        flipped: what differs natively on the example's batches, and not on fresh ones.
        notes: of the variant, and what was not compared.
    """

    variant: ChosenVariant
    runs: PlainRuns
    comparisons: list[StepComparison] = field(default_factory=list)
    raised: tuple[Exception, int] | None = None
    draws: str = ""
    has_means: bool = False
    draws_nothing: bool = False
    flipped: StepDifference | None = None
    notes: list[str] = field(default_factory=list)

    def compare(self) -> None:
        """Compare in float64, and natively if the variant agrees there.

        Raises:
            CannotApply: the variant cannot apply to this model.
            TargetError: the plain step raises.
        """
        self._compare(self.runs)
        failing = self.failing
        if failing is None or not failing.draws:
            return
        plain, own = self._draws(failing.steps)
        self.draws = describe_draws(plain, own)
        self.draws_nothing = self.variant.own is not None and bool(plain) and not own
        if self.draws and not repeats(plain, own):
            self.comparisons, self.has_means, self.flipped = [], True, None
            self._compare(self.runs.with_means)

    @property
    def failing(self) -> StepComparison | None:
        """The comparison with a step that differs."""
        return next((each for each in self.comparisons if each.differs), None)

    @property
    def worst(self) -> dict[Key, StepDifference]:
        """The largest difference of each tensor, over precisions."""
        found: dict[Key, StepDifference] = {}
        for comparison in self.comparisons:
            for key, each in comparison.worst.items():
                known = found.get(key)
                if known is None or (each.differs, each.severity) > (known.differs, known.severity):
                    found[key] = each
        return found

    def _compare(self, runs: PlainRuns) -> None:
        row = self.variant.row
        precision: Precision = "float64" if row.promotes else "unpromoted"
        rounding = row.rounding(self.variant.argument) if callable(row.rounding) else row.rounding
        runs.run("native")
        if rounding is not None:
            pass  # autocast, for example, leaves float64 as it is
        elif runs.run(precision) is None:
            self._note("the model does not run in float64")
        else:
            self._add(runs, precision, None)
            if precision == "unpromoted" and self.failing is not None and _casts_inside(runs):
                self.comparisons.clear()
                self._add(runs, precision, _narrower(runs.dtype))
        if self.failing is not None or self.raised is not None:
            return
        self._add(runs, "native", rounding)
        # Not of a narrower dtype: its noise has such flips in it.
        if len(self.comparisons) == 2 and self.comparisons[1].first and not self._persists(runs, rounding):
            native = self.comparisons[1]
            self.flipped, native.first = native.first[0], []
            native.worst = {key: replace(each, is_flipped=True) for key, each in native.worst.items()}

    def _add(self, runs: PlainRuns, precision: Precision, rounding: str | None) -> None:
        compared = self._compared(runs, precision, rounding)
        if isinstance(compared, StepComparison):
            self.comparisons.append(compared)
            return
        error, _ = compared
        if precision != "native" and not (self.variant.own is not None and isinstance(error, TargetError)):
            # Not every kernel has float64, nor a GradScaler: if it raises natively, too, that is what is reported.
            self._note(f"{self.variant.name} does not run in float64")
        elif isinstance(error, TargetError) and error.code != "GC113":  # a variant may lose the gradient of the loss
            raise error
        else:
            self.raised = compared

    def _compared(
        self, runs: PlainRuns, precision: Precision, rounding: str | None = None
    ) -> StepComparison | tuple[Exception, int]:
        """Return the comparison in one precision, or what the variant raises and at which step."""
        plain = runs.run(precision, rounding)
        assert plain is not None
        trainer = runs.trainer(precision)
        name = str(runs.dtype).removeprefix("torch.") if precision == "native" else "float64"
        comparison = StepComparison(name, rounding, runs.order)
        try:
            self.variant.alter(trainer)
            comparison.add(plain, trainer.run(len(plain)))
        except CannotApply:
            raise
        except Exception as error:  # a variant and the user's model may raise anything
            if is_out_of_memory(error):
                raise
            return error, trainer.number + 1
        for each in trainer.notes:
            self._note(each)
        if trainer.autocast is not None and precision == "native" and rounding is None and comparison.differs:
            self._note(
                f"the step runs the model under autocast, and is compared within the rounding of {trainer.autocast}"
            )
            return self._compared(runs, precision, trainer.autocast)
        return comparison

    def _persists(self, runs: PlainRuns, rounding: str | None) -> bool:
        """Return whether what differs natively differs on fresh batches, too."""
        steps = self.comparisons[-1].steps
        for number in range(1, _PERSISTS + 1):
            try:
                compared = self._compared(runs.fresh(number, steps), "native", rounding)
            except Exception as error:  # not every batch is one that the model takes
                if is_out_of_memory(error):
                    raise
                continue
            # Fewer steps, because a loss is not finite, do not show that the variant agrees.
            if isinstance(compared, StepComparison) and not compared.differs and compared.steps == steps:
                return False
        return True

    def _draws(self, steps: int) -> tuple[list[Draw], list[Draw]]:
        """Return the random numbers of the plain step and of the variant in the last of some steps."""
        found = []
        for alter in (self.runs.alter, self.variant.alter):
            trainer, recorded = self.runs.trainer("native"), RecordedDraws()
            trainer.recipe = replace(trainer.recipe, loading=None)  # those of another process are not recorded
            alter(trainer)
            _record_last(trainer, recorded, steps)
            for _ in trainer.run(steps):
                pass
            found.append(recorded.draws)
        return found[0], found[1]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _casts_inside(runs: PlainRuns) -> bool:
    """Return whether a model casts to a narrower dtype inside (RMSNorm in Llama): the promotion changes its result."""
    promoted, unpromoted = runs.run("float64"), runs.run("unpromoted")
    if not promoted or not unpromoted:
        return True
    compared = StepComparison("float64", None, runs.order)
    compared.add(promoted[:1], [unpromoted[0].record])
    return compared.differs


def _narrower(dtype: torch.dtype) -> str:
    """Return the name of the dtype that a float64 copy may round to inside: the native one, or float32."""
    return str(max(torch.float32, dtype, key=lambda each: torch.finfo(each).eps)).removeprefix("torch.")


def _record_last(trainer: Trainer, recorded: RecordedDraws, steps: int) -> None:
    """Let a run record the random numbers of its last step."""
    step = trainer.step

    def run(*args: Any, **kwargs: Any) -> Tensor | None:
        if trainer.number < steps - 1:
            return step(*args, **kwargs)
        with recorded:
            return step(*args, **kwargs)

    trainer.step = run
