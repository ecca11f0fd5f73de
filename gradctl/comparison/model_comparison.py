"""A program that runs on the inputs of a model, compared with eager: natively on every trial, and in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from gradctl.comparison.compare import Comparison, call_differences, tensors_of
from gradctl.comparison.difference import Key, ModelDifference
from gradctl.comparison.precision import relative_error_of, rounding_error
from gradctl.comparison.program import CALLS, Program
from gradctl.comparison.reference import Reference
from gradctl.comparison.trials import ModelTrial
from gradctl.forms.form import Outcome
from gradctl.numerics.agreement import agreement, largest_scale
from gradctl.subject.instance import native_dtype

# A relu or a max can flip on one rounding: a gradient over its budget whose outputs agree must be so on as many inputs.
_PERSISTS = 3
# On so many the mean of independent errors is a third of one of them.
RANDOM_INPUTS = 8


class ModelProgram(Program[ModelTrial], Protocol):
    """A program that runs forward and backward on the inputs of a model."""

    def run(
        self, trial: ModelTrial, calls: int = CALLS, *, differentiable: frozenset[str] | None = None
    ) -> list[Outcome]:
        """Return the outcomes of some calls in a row.

        Args:
            trial: the inputs.
            calls: how many.
            differentiable: the outputs that get a cotangent; by default those that require a gradient in eager.
        """


@dataclass(slots=True, eq=False, kw_only=True)
class ModelComparison(Comparison[ModelTrial]):
    """A program beside eager.

    Attributes:
        reference: eager on all inputs.
        program: the candidate.
        reference_name: what messages call the reference.
    """

    reference: Reference
    program: ModelProgram
    reference_name: str = "eager"

    def compare_natively(self) -> None:
        """Compare in the native dtype, on every trial."""
        self.add(self.reference.trials)
        if not self.raised:
            self.test_persistence()

    @property
    def outputs_agree(self) -> bool:
        """Whether no output differs."""
        return not any(each.differs for (quantity, _), each in self.worst.items() if quantity == "output")

    def test_persistence(self) -> None:
        """Try gradients over their budget on fresh inputs, if outputs agree: one rounding may have flipped a relu."""
        over = {key for key, each in self.worst.items() if key[0] == "gradient" and each.exceeds}
        over = {key for key in over if not (self.worst[key].is_missing or self.worst[key].overflows)}
        persisting = set(over)
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

    def may_be_rounding(self, each: ModelDifference) -> bool:
        """Return whether random inputs may show that an error over its budget is rounding."""
        return each.is_native_only

    def test_rounding(self) -> None:
        """Try tensors that differ natively and not in float64 on random inputs: the error of rounding averages out.

        A bias in one of them makes others wrong too, in which it can average out: then none of them is rounding.
        """
        number_of = {key: each.call - 1 for key, each in self.worst.items() if self.may_be_rounding(each)}
        trials = self.reference.fresh_trials(RANDOM_INPUTS) if number_of else []
        if len(trials) < RANDOM_INPUTS:
            return
        runs = [(trial.oracle, self.program.run(trial, max(number_of.values()) + 1)) for trial in trials]
        found = {
            key: rounding_error([relative_error_of(key, oracle[n : n + 1], calls[n : n + 1]) for oracle, calls in runs])
            for key, n in number_of.items()
        }
        if None not in found.values():
            self.worst |= {key: replace(self.worst[key], rounding=rounding) for key, rounding in found.items()}

    def note_meaning(self, key: Key, oracle: Outcome, call: Outcome) -> None:
        """Note the error of a tensor of the program if both run in float64."""
        each, meaning = self.worst[key], meaning_of(key, oracle, call, self.worst[key].reference)
        if meaning is None or each.reference is None:
            return
        dtypes = (each.reference.dtype, native_dtype(self.reference.subject))
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
        self.worst[key] = replace(each, meaning=meaning, coarsest=coarsest)


def meaning_of(
    key: Key, oracle: Outcome, call: Outcome, native: Tensor | None, neighbours: float | None = None
) -> float | None:
    """Return the relative error of a tensor where both programs run in float64; None if either has no such tensor.

    Args:
        key: quantity and name of the tensor.
        oracle, call: the two programs in float64.
        native: the reference's tensor in its own dtype.
        neighbours: the largest scale of the tensors of this kind, if it is known.
    """
    references: dict[str, Tensor | None] = tensors_of(oracle, key[0])
    reference, candidate = references.get(key[1]), tensors_of(call, key[0]).get(key[1])
    if reference is None or candidate is None or reference.shape != candidate.shape:
        return None
    scale = largest_scale(references.values()) if neighbours is None else neighbours
    rounded = native if native is not None and native.shape == reference.shape else reference
    return agreement(rounded, reference, candidate, scale)[0]
