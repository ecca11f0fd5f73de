"""One variant of the training step against the plain step: in float64, whatever rounding does, then natively."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradctl.core.errors import is_out_of_memory
from gradctl.training.chosen_variants import ChosenVariant
from gradctl.training.plain_runs import PlainRuns, Precision
from gradctl.training.step_comparison import StepComparison, StepDifference
from gradctl.training.variants.table import CannotApply


@dataclass(slots=True, eq=False)
class VariantComparison:
    """What a variant computes, beside the plain step.

    Attributes:
        variant: which.
        runs: the plain step.
        comparisons: in float64, then natively; without the first if the model or the variant does not run in float64.
        raised: what the variant raises where the plain step runs, and the step, from 1.
        notes: of the variant, and what was not compared.
    """

    variant: ChosenVariant
    runs: PlainRuns
    comparisons: list[StepComparison] = field(default_factory=list)
    raised: tuple[Exception, int] | None = None
    notes: list[str] = field(default_factory=list)

    def compare(self) -> None:
        """Compare in float64, and natively if the variant agrees there.

        Raises:
            CannotApply: the variant cannot apply to this model.
            TargetError: the plain step raises.
        """
        row = self.variant.row
        precision: Precision = "float64" if row.promotes else "unpromoted"
        rounding = row.rounding(self.variant.argument) if callable(row.rounding) else row.rounding
        if rounding is not None:
            pass  # autocast, for example, leaves float64 as it is
        elif self.runs.run("native") is None or self.runs.run(precision) is None:
            self.notes.append("the model does not run in float64; compared in its own dtype only")
        else:
            self._run(precision, None)
        if not self.differs and self.raised is None:
            self._run("native", rounding)

    @property
    def differs(self) -> bool:
        """Whether a step differs."""
        return any(each.differs for each in self.comparisons)

    @property
    def failing(self) -> StepComparison | None:
        """The comparison with a step that differs."""
        return next((each for each in self.comparisons if each.differs), None)

    @property
    def worst(self) -> dict[tuple[str, str], StepDifference]:
        """The largest difference of each tensor, over precisions."""
        found: dict[tuple[str, str], StepDifference] = {}
        for comparison in self.comparisons:
            for key, each in comparison.worst.items():
                known = found.get(key)
                if known is None or (each.differs, each.severity) > (known.differs, known.severity):
                    found[key] = each
        return found

    def _run(self, precision: Precision, rounding: str | None) -> None:
        plain = self.runs.run(precision, rounding)
        assert plain is not None
        trainer = self.runs.trainer(precision)
        name = str(self.runs.dtype).removeprefix("torch.") if precision == "native" else "float64"
        comparison = StepComparison(name, rounding)
        try:
            self.variant.alter(trainer)
            comparison.add(plain, trainer.run(len(plain)))
        except CannotApply:
            raise
        except Exception as error:  # a variant and the user's model may raise anything
            if is_out_of_memory(error):
                raise
            if precision != "native" and self.variant.own is None:
                # Not every kernel has float64: if it raises natively, too, that is what is reported.
                self.notes.append(f"{self.variant.name} does not run in float64; compared in {self.runs.dtype} only")
                return
            self.raised = error, trainer.number + 1
            return
        self.notes += [each for each in trainer.notes if each not in self.notes]
        self.comparisons.append(comparison)
