"""A captured form compared with eager: natively on every trial, and in float64 where a tensor differs most."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from gradctl.comparison.compare import Comparison, call_differences, tensors_of
from gradctl.comparison.difference import Key
from gradctl.comparison.precision import relative_error_of, rounding_error
from gradctl.comparison.program import FormProgram
from gradctl.comparison.reference import Reference
from gradctl.comparison.trials import ModelTrial
from gradctl.forms.form import CannotCapture, Captured, Form, Outcome, to_float64
from gradctl.numerics.agreement import agreement, largest_scale
from gradctl.subject.instance import native_dtype

# Forms that Dynamo compiles: it runs eagerly under a dispatch mode, so their float64 runs do without the promotion.
_COMPILED = ("aot", "compile")
# The example comes first and is what a person tries: another input must be clearly worse to be named in its place.
_TIMES_WORSE = 2.0
# A relu or a max can flip on one rounding: a gradient over its budget whose outputs agree must be so on as many inputs.
_PERSISTS = 3
# If the native budget is below this, a difference in meaning cannot hide (float32; not float16).
_TIGHT = 1e-3
# On so many the mean of independent errors is a third of one of them.
_RANDOM_INPUTS = 8


@dataclass(slots=True, eq=False, kw_only=True)
class FormComparison(Comparison[ModelTrial]):
    """A form beside eager.

    Attributes:
        reference: eager on all inputs.
        program: the form.
    """

    reference: Reference
    program: FormProgram

    @property
    def captured(self) -> Captured:
        """The form as it was captured."""
        return self.program.captured

    def compare_natively(self) -> None:
        """Compare in the native dtype, on every trial."""
        self.add(self.reference.trials)
        if not self.raised:
            self._test_persistence()

    @property
    def outputs_agree(self) -> bool:
        """Whether no output differs."""
        return not any(each.differs for (quantity, _), each in self.worst.items() if quantity == "output")

    def _test_persistence(self) -> None:
        """Try gradients over their budget on fresh inputs, if outputs agree: one rounding may have flipped a relu."""
        over = {key for key, each in self.worst.items() if key[0] == "gradient" and each.exceeds}
        persisting = {key for key in over if not self.worst[key].is_missing}
        if not persisting or not self.outputs_agree:
            return
        for trial in self.reference.fresh_trials(_PERSISTS):
            persisting = self._persisting_on(trial, persisting)
        for key in over - persisting:
            self.worst[key] = replace(self.worst[key], persists=False)

    def _persisting_on(self, trial: ModelTrial, keys: set[Key]) -> set[Key]:
        """Return those of some tensors that are over their budget on a trial; all of them if the form raises there."""
        (call,) = self.program.run(trial, calls=1)
        if call.error is not None:
            return keys
        found = call_differences(trial, 0, call, self.candidate.quantities)
        return keys & {key for key, each in found if each.exceeds}

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
                self._note_meaning(key, oracle[number], calls[number])

    def test_rounding(self) -> None:
        """Try tensors that differ natively and not in float64 on random inputs: the error of rounding averages out.

        A bias in one of them makes others wrong too, in which it can average out: then none of them is rounding.
        """
        number_of = {key: each.call - 1 for key, each in self.worst.items() if each.is_native_only}
        trials = self.reference.fresh_trials(_RANDOM_INPUTS) if number_of else []
        if len(trials) < _RANDOM_INPUTS:
            return
        runs = [(trial.oracle, self.program.run(trial, max(number_of.values()) + 1)) for trial in trials]
        found = {
            key: rounding_error([relative_error_of(key, oracle[n : n + 1], calls[n : n + 1]) for oracle, calls in runs])
            for key, n in number_of.items()
        }
        if None not in found.values():
            self.worst |= {key: replace(self.worst[key], rounding=rounding) for key, rounding in found.items()}

    def float64_program(self, form: Form) -> FormProgram | None:
        """Return the form in float64; None if it cannot be had."""
        self.program.state.restore()  # a conversion copies the buffers, which the native runs have moved
        try:
            captured = to_float64(form, self.captured, self.reference.instance(promoted=True))
        except CannotCapture:
            return None
        context = nullcontext if captured.form in _COMPILED else self.reference.promoting
        return FormProgram(captured, is_float64=True, context=context)

    def _note_meaning(self, key: Key, oracle: Outcome, call: Outcome) -> None:
        """Note the error of a tensor of the form if both run in float64."""
        each, references = self.worst[key], tensors_of(oracle, key[0])
        reference, candidate = references.get(key[1]), tensors_of(call, key[0]).get(key[1])
        if reference is None or candidate is None or each.reference is None or reference.shape != candidate.shape:
            return
        neighbours = largest_scale(references.values())
        dtypes = (each.reference.dtype, native_dtype(self.reference.subject))
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
        meaning, _ = agreement(reference, reference, candidate, neighbours)
        self.worst[key] = replace(each, meaning=meaning, coarsest=coarsest)

    def _is_in_doubt(self) -> bool:
        """Whether the native run leaves a question that is worth a second compilation."""
        return any(each.exceeds or each.budget > _TIGHT for each in self.worst.values())


def form_comparison(reference: Reference, captured: Captured) -> FormComparison:
    """Return the comparison of a form with eager, before its first run."""
    program = FormProgram(captured)
    return FormComparison(program, reference=reference, program=program, times_worse=_TIMES_WORSE)
