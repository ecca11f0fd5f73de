"""One program compared with the reference on all trials: the largest difference of each tensor is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

from gradctl.comparison.difference import Key, TensorDifference, is_identical, tensor_difference
from gradctl.comparison.program import Program
from gradctl.comparison.trials import Trial
from gradctl.core.names import Quantity
from gradctl.forms.form import Outcome
from gradctl.numerics.agreement import largest_scale

T = TypeVar("T", bound=Trial)


@dataclass(slots=True, eq=False)
class Comparison(Generic[T]):
    """A candidate beside the reference.

    Attributes:
        candidate: the program.
        tried: variations on which the candidate ran.
        raised: what the candidate raises where the reference runs, by variation.
        worst: the largest difference by quantity and name.
        outcomes: of the candidate, by variation, if they are kept.
        differs_on: the variations on which a tensor differs.
        times_worse: a difference replaces one that is smaller by more than this factor, or within its budget.
    """

    candidate: Program[T]
    tried: list[str] = field(default_factory=list)
    raised: dict[str, Exception] = field(default_factory=dict)
    worst: dict[Key, TensorDifference[T]] = field(default_factory=dict)
    outcomes: dict[str, Sequence[Outcome]] = field(default_factory=dict)
    differs_on: dict[Key, set[str]] = field(default_factory=dict)
    times_worse: float = 1.0

    def add(self, trials: Sequence[T], *, keep_outcomes: bool = False) -> None:
        """Run the candidate on these trials, and keep the largest difference of each tensor."""
        for trial in trials:
            calls = self.candidate.run(trial, len(trial.native))
            error = calls[-1].error
            if error is not None:
                self.raised[trial.name] = error
                continue
            self.tried.append(trial.name)
            if keep_outcomes:
                self.outcomes[trial.name] = calls
            for number in range(len(calls)):
                for key, found in call_differences(trial, number, calls[number], self.candidate.quantities):
                    self._keep(key, found)

    @property
    def differing(self) -> list[TensorDifference[T]]:
        """The tensors on which the programs do not agree, worst first."""
        return [each for each in self.by_severity if each.differs]

    @property
    def by_severity(self) -> list[TensorDifference[T]]:
        """All tensors, worst first."""
        return sorted(self.worst.values(), key=lambda each: each.severity, reverse=True)

    def _keep(self, key: Key, found: TensorDifference[T]) -> None:
        known = self.worst.get(key)
        if found.differs:
            self.differs_on.setdefault(key, set()).add(found.trial.name)
        if known is None or (found.differs and not known.differs) or found.severity > self.times_worse * known.severity:
            keeps = known is not None and known.requires_grad is not None
            self.worst[key] = replace(found, requires_grad=known.requires_grad) if known and keeps else found
        elif known.requires_grad is None and found.requires_grad is not None:
            self.worst[key] = replace(known, requires_grad=found.requires_grad)


def call_differences(
    trial: T, number: int, call: Outcome, quantities: frozenset[Quantity]
) -> Iterator[tuple[Key, TensorDifference[T]]]:
    """Yield the difference of each tensor of one call, the ``number``-th from 0."""
    native = trial.native[number]
    for quantity in quantities & trial.quantities:
        reference, candidate = tensors_of(native, quantity), tensors_of(call, quantity)
        oracle = tensors_of(trial.oracle[number], quantity)
        noisy = [tensors_of(outcome, quantity) for outcome in trial.noisy]
        neighbours = trial.compute_once((number, quantity), partial(largest_scale, oracle.values()))
        for name in sorted(reference.keys() | candidate.keys()):
            own = reference.get(name)
            difference_to = partial(
                tensor_difference,
                name,
                own,
                oracle=oracle.get(name),
                neighbours=neighbours,
                trial=trial,
                call=number + 1,
                noisy=[each.get(name) for each in noisy],
            )
            value = candidate.get(name)
            if is_identical(own, value):
                found = trial.compute_once((number, quantity, name), partial(difference_to, own))
            else:
                found = difference_to(value)
            is_judged = quantity == "output" and "gradient" in quantities and not found.is_missing
            if is_judged and name in call.differentiable ^ native.differentiable:
                found = replace(found, requires_grad=name in call.differentiable)
            yield (quantity, name), found


def tensors_of(outcome: Outcome, quantity: Quantity) -> dict[str, Tensor | None]:
    """Return the tensors of one quantity that a call gave, by name."""
    if quantity == "gradient":
        return outcome.gradients
    return dict(outcome.outputs if quantity == "output" else outcome.state)
