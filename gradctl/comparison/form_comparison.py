"""One captured form against eager, tensor by tensor: the worst over inputs and calls, and whether it differs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradctl.comparison.outcomes import outcomes
from gradctl.comparison.reference import Reference, Trial
from gradctl.core.names import Quantity
from gradctl.forms.form import CannotCapture, Captured, Form, Outcome
from gradctl.numerics.agreement import agreement, largest_scale
from gradctl.subject.instance import native_dtype
from gradctl.subject.state import State

__all__ = ["FormComparison", "Key", "TensorComparison", "part"]

Key = tuple[Quantity, str]
# Forms that Dynamo compiles: it runs eagerly under a dispatch mode, so their float64 runs do without the promotion.
_COMPILED = ("aot", "compile")
# Where the native budget is below this, a difference in meaning has nowhere to hide (float32; not float16).
_TIGHT = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class TensorComparison:
    """How far one tensor of a form is from eager's, at its worst.

    Attributes:
        error, budget: relative, in the native dtype.
        meaning: relative, both in float64; None if not had.
        trial: the variation where it is worst.
        call: the number of the call there, from 1.
        eager, form: the tensors there; None where one has none.
        persists: for a gradient over its budget: whether it is so on fresh inputs too.
        structure: what differs besides values (shape, dtype), or empty.
        coarsest: the epsilon of the coarsest dtype that constants of the form can have.
        asks: for an output: whether the form's asks for a gradient, where eager's is the other way; else None.
    """

    error: float
    budget: float
    trial: Trial
    call: int
    eager: Tensor | None
    form: Tensor | None
    meaning: float | None = None
    persists: bool = True
    structure: str = ""
    coarsest: float = 0.0
    asks: bool | None = None

    @property
    def is_missing(self) -> bool:
        """Whether one has the tensor and the other does not."""
        return (self.eager is None) != (self.form is None)

    @property
    def means_another(self) -> bool:
        """Whether the form computes something else, whatever the dtype.

        A baked constant is off by half an epsilon of its own dtype (3e-8 in float32, 2e-3 in bfloat16). A form that is
        ten times nearer natively than in float64 has only taken float64 badly.
        """
        return self.meaning is not None and max(1e-6, 8 * self.coarsest) < self.meaning < 10 * self.error

    @property
    def exceeds(self) -> bool:
        """Whether the native difference is more than rounding explains."""
        return self.error > self.budget

    @property
    def differs(self) -> bool:
        """Whether the form is wrong about this tensor, whoever is right."""
        structure = self.is_missing or bool(self.structure) or self.asks is not None
        return structure or self.means_another or (self.exceeds and self.persists)

    @property
    def severity(self) -> float:
        """How bad it is, to keep the worst."""
        if self.is_missing or self.structure:
            return math.inf
        return self.error / self.budget if self.budget else (math.inf if self.error else 0.0)


@dataclass(slots=True)
class FormComparison:
    """Runs ``captured`` on every trial of ``reference`` and keeps the worst of each tensor.

    Attributes:
        state: of the form, as it was captured; put back before each trial.
        tried: variations on which the form ran.
        raised: what the form raises where eager runs, by variation.
        worst: by quantity and name.
    """

    reference: Reference
    captured: Captured
    state: State
    tried: list[str] = field(default_factory=list)
    raised: dict[str, Exception] = field(default_factory=dict)
    worst: dict[Key, TensorComparison] = field(default_factory=dict)

    def compare_natively(self) -> None:
        """Compare in the native dtype, on every trial."""
        for trial in self.reference.trials:
            self._try(trial)
        if not self.raised:
            self._see_what_persists()

    @property
    def outputs_agree(self) -> bool:
        """Whether no output differs."""
        return not any(each.differs for (quantity, _), each in self.worst.items() if quantity == "output")

    def _try(self, trial: Trial) -> None:
        calls = outcomes(
            self.captured,
            trial.instance,
            self.state,
            differentiable=trial.native[0].differentiable,
            calls=len(trial.native),
        )
        error = calls[-1].error
        if error is not None:
            self.raised[trial.name] = error
            return
        self.tried.append(trial.name)
        for number, (native, oracle, call) in enumerate(zip(trial.native, trial.oracle, calls, strict=True)):
            for key, found in self._rows(native, oracle, call, trial, number + 1):
                # The example comes first and is what a person tries: another input must be clearly worse.
                known = self.worst.get(key)
                if known is None or found.severity > 2 * known.severity:
                    self.worst[key] = found if known is None or known.asks is None else replace(found, asks=known.asks)
                elif known.asks is None and found.asks is not None:
                    self.worst[key] = replace(known, asks=found.asks)

    def _rows(
        self, native: Outcome, oracle: Outcome, call: Outcome, trial: Trial, number: int
    ) -> Iterator[tuple[Key, TensorComparison]]:
        for quantity in self.captured.gives:
            mine, truth, theirs = part(native, quantity), part(oracle, quantity), part(call, quantity)
            neighbours = largest_scale(truth.values())
            for name in sorted(mine.keys() | theirs.keys()):
                found = _compared(
                    mine.get(name), truth.get(name), theirs.get(name), neighbours, trial=trial, call=number
                )
                asks = name in call.differentiable
                if quantity == "output" and "gradient" in self.captured.gives and not found.is_missing:
                    found = replace(found, asks=asks if asks != (name in native.differentiable) else None)
                yield (quantity, name), found

    def _see_what_persists(self) -> None:
        """A gradient over its budget whose outputs agree may be one rounding that flipped a relu: ask fresh inputs."""
        over = {
            key for key, each in self.worst.items() if key[0] == "gradient" and each.exceeds and not each.is_missing
        }
        if not over or not self.outputs_agree:
            return
        for trial in self.reference.fresh_trials():
            calls = outcomes(
                self.captured, trial.instance, self.state, differentiable=trial.native[0].differentiable, calls=1
            )
            if calls[0].error is not None:
                continue
            rows = dict(self._rows(trial.native[0], trial.oracle[0], calls[0], trial, 1))
            over = {key for key in over if key in rows and rows[key].exceeds}
        for key, each in self.worst.items():
            if key[0] == "gradient" and each.exceeds and key not in over:
                self.worst[key] = replace(each, persists=False)

    def compare_meaning(self, form: Form) -> None:
        """Compare in float64 each tensor at the trial and call where it is worst; this widens what was captured."""
        compiled = self.captured.form in _COMPILED
        if self.raised or self.reference.trials[0].wide is None or (compiled and not self._is_in_doubt()):
            return
        self.state.restore()
        try:
            wide = form.widened(self.captured, self.reference.instance(promoted=True))
        except CannotCapture:
            return
        context = nullcontext if compiled else self.reference.promoting
        state = State([wide.model])
        for trial in self.reference.trials:
            keys = [key for key, each in self.worst.items() if each.trial is trial]
            if not keys or trial.wide is None:
                continue
            count = max(self.worst[key].call for key in keys)
            truth = self.reference.plainly_wide(trial, count) if compiled else trial.oracle
            if truth is None:
                continue
            differentiable = truth[0].differentiable
            calls = outcomes(wide, trial.wide, state, differentiable=differentiable, calls=count, context=context)
            if calls[-1].error is None:
                for key in keys:
                    number = self.worst[key].call - 1
                    self._note_meaning(key, truth[number], calls[number])

    def _note_meaning(self, key: Key, truth: Outcome, call: Outcome) -> None:
        """Note how far a tensor of the form is from eager's, both in float64."""
        each, theirs = self.worst[key], part(truth, key[0])
        eager, mine = theirs.get(key[1]), part(call, key[0]).get(key[1])
        if eager is None or mine is None or each.eager is None or eager.shape != mine.shape:
            return
        neighbours = largest_scale(theirs.values())
        dtypes = [
            dtype for dtype in (each.eager.dtype, native_dtype(self.reference.subject)) if dtype.is_floating_point
        ]
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
        self.worst[key] = replace(each, meaning=agreement(eager, eager, mine, neighbours)[0], coarsest=coarsest)

    def _is_in_doubt(self) -> bool:
        """Tell whether the native run leaves a question that is worth a second compilation."""
        return any(each.exceeds or each.budget > _TIGHT for each in self.worst.values())


def part(outcome: Outcome, quantity: Quantity) -> dict[str, Tensor | None]:
    """Return the tensors of one quantity that a call gave, by name."""
    parts: dict[Quantity, dict[str, Tensor | None]] = {
        "output": dict(outcome.outputs),
        "gradient": outcome.gradients,
        "buffer": dict(outcome.state),
    }
    return parts[quantity]


def _compared(
    mine: Tensor | None, truth: Tensor | None, theirs: Tensor | None, neighbours: float, *, trial: Trial, call: int
) -> TensorComparison:
    if mine is None or theirs is None:
        return TensorComparison(0.0 if mine is theirs else math.inf, 0.0, trial, call, mine, theirs)
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        structure = f"{_described(theirs)} instead of {_described(mine)}"
        return TensorComparison(math.inf, 0.0, trial, call, mine, theirs, structure=structure)
    error, budget = agreement(mine, mine if truth is None else truth, theirs, neighbours)
    return TensorComparison(error, budget, trial, call, mine, theirs)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
