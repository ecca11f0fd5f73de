"""A captured form compared with eager: natively on every trial, and in float64 where a tensor differs most."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from gradctl.comparison.model_comparison import ModelComparison
from gradctl.comparison.program import FormProgram
from gradctl.comparison.reference import Reference
from gradctl.comparison.trials import ModelTrial
from gradctl.forms.form import CannotCapture, Captured, Form, to_float64

# Forms that Dynamo compiles: it runs eagerly under a dispatch mode, so their float64 runs do without the promotion.
_COMPILED = ("aot", "compile")
# The example comes first and is what a person tries: another input must be clearly worse to be named in its place.
_TIMES_WORSE = 2.0
# If the native budget is below this, a difference in meaning cannot hide (float32; not float16).
_TIGHT = 1e-3


@dataclass(slots=True, eq=False, kw_only=True)
class FormComparison(ModelComparison):
    """A form beside eager.

    Attributes:
        program: the form.
    """

    program: FormProgram

    @property
    def captured(self) -> Captured:
        """The form as it was captured."""
        return self.program.captured

    def compare_meaning(self, form: Form) -> None:
        """Compare in float64 each tensor at the trial and call where it differs most."""
        compiled = self.candidate.name in _COMPILED
        if self.raised or self.reference.trials[0].float64 is None or (compiled and not self._is_in_doubt()):
            return
        program = self.float64_program(form)
        if program is not None:
            for trial in self.reference.trials:
                self._compare_meaning_on(trial, program, compiled=compiled)

    def _compare_meaning_on(self, trial: ModelTrial, program: FormProgram, *, compiled: bool) -> None:
        keys = [key for key, each in self.worst.items() if each.trial is trial]
        if not keys or trial.float64 is None:
            return
        count = max(self.worst[key].call for key in keys)
        oracle = self.reference.unpromoted_float64(trial, count) if compiled else trial.oracle
        if oracle is None:
            return
        calls = program.run(trial, count, differentiable=oracle[0].differentiable)
        if calls[-1].error is None:
            for key in keys:
                number = self.worst[key].call - 1
                self.note_meaning(key, oracle[number], calls[number])

    def float64_program(self, form: Form) -> FormProgram | None:
        """Return the form in float64; None if it cannot be had."""
        self.program.state.restore()  # a conversion copies the buffers, which the native runs have moved
        try:
            captured = to_float64(form, self.captured, self.reference.instance(promoted=True))
        except CannotCapture:
            return None
        context = nullcontext if captured.form in _COMPILED else self.reference.promoting
        return FormProgram(captured, is_float64=True, context=context)

    def _is_in_doubt(self) -> bool:
        """Whether the native run leaves a question that is worth a second compilation."""
        return any(each.exceeds or each.budget > _TIGHT for each in self.worst.values())


def form_comparison(reference: Reference, captured: Captured) -> FormComparison:
    """Return the comparison of a form with eager, before its first run."""
    program = FormProgram(captured)
    return FormComparison(program, reference=reference, program=program, times_worse=_TIMES_WORSE)
