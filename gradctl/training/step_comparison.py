"""A variant of the training step beside the plain step: after each step, each tensor, in float64 and natively."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradctl.comparison.difference import Key, dtype_name
from gradctl.numerics.agreement import norm_of_difference
from gradctl.numerics.repetition import repetition_tolerance
from gradctl.training.plain_runs import QUANTITIES, PlainStep, is_zero_by_cancellation, kind_of, named
from gradctl.training.trainer import LOSS, StepRecord

_LOSS: Key = ("output", LOSS)


@dataclass(frozen=True, slots=True, eq=False)
class StepDifference:
    """One tensor after one step of a variant.

    Attributes:
        key: quantity and name.
        step: its number, from 1.
        shape, dtype: of the plain step's tensor, or the variant's if that has none.
        error, tolerance: relative to the norm of the plain step's tensor.
        structure: how they differ in more than values: shape, dtype, or one of them is missing.
        is_missing: whether one of them is.
        is_cancelled: whether the tensor is zero by cancellation.
        is_flipped: whether it differs on this batch only, because a relu or a max took the other side.
    """

    key: Key
    step: int
    shape: tuple[int, ...]
    dtype: str
    error: float
    tolerance: float
    structure: str = ""
    is_missing: bool = False
    is_cancelled: bool = False
    is_flipped: bool = False

    @property
    def differs(self) -> bool:
        """Whether the difference is more than rounding explains."""
        return bool(self.structure) or not (self.error <= self.tolerance or self.is_flipped)

    @property
    def severity(self) -> float:
        """The error in tolerances."""
        if self.structure or math.isnan(self.error):
            return math.inf
        return self.error / self.tolerance if self.tolerance else (math.inf if self.error else 0.0)


@dataclass(slots=True, eq=False)
class StepComparison:
    """The steps of a variant in one precision, until the first that differs.

    Attributes:
        precision: what messages call it.
        order: number of each parameter in the order in which backward computes the gradients.
        rounding: name of a dtype to which the variant rounds on purpose; None: each tensor's own.
        worst: the largest difference of each tensor.
        first: what differs after the first step that differs, in the order in which a step computes it.
        steps: how many were compared.
        updates: calls of ``optimizer.step()`` in the plain step and the variant, if the numbers differ.
        draws: whether random numbers are drawn in the last step that was compared, in either run.
    """

    precision: str
    rounding: str | None = None
    order: Mapping[str, int] = field(default_factory=dict)
    worst: dict[Key, StepDifference] = field(default_factory=dict)
    first: list[StepDifference] = field(default_factory=list)
    steps: int = 0
    updates: tuple[int, int] | None = None
    draws: bool = False

    def add(self, plain: Iterable[PlainStep], records: Iterable[StepRecord]) -> None:
        """Compare the steps of a variant with the plain ones, as they are made."""
        for number, (step, record) in enumerate(zip(plain, records, strict=False), 1):
            self.steps = number
            own, others = step.tensors, named(record)
            if _LOSS not in others:  # a step need not return it
                own = {key: each for key, each in own.items() if key != _LOSS}
            if record.is_renamed:  # the buffers of another implementation need no partner
                others = {**{key: each for key, each in own.items() if kind_of(key) == "buffer buffer"}, **others}
            for key in [*own, *(key for key in others if key not in own)]:
                self._keep(self._difference(step, key, own.get(key), others.get(key), number))
            self.first = sorted((each for each in self._present if each.differs), key=self._computed)
            self.draws = record.draws or step.record.draws
            if record.updates != step.record.updates:
                self.updates = step.record.updates, record.updates
            if self.first or self.updates:
                return

    @property
    def differs(self) -> bool:
        """Whether a step differs."""
        return bool(self.first) or self.updates is not None

    def _computed(self, each: StepDifference) -> tuple[int, int]:
        """Return the place of a tensor in the order in which a step computes them."""
        quantity, name = each.key
        return QUANTITIES.index(quantity), self.order.get(name, len(self.order)) if quantity == "gradient" else 0

    _present: list[StepDifference] = field(default_factory=list)

    def _keep(self, each: StepDifference) -> None:
        if not self._present or self._present[0].step != each.step:
            self._present = []
        self._present.append(each)
        known = self.worst.get(each.key)
        if known is None or each.severity > known.severity:
            self.worst[each.key] = each

    def _difference(
        self, step: PlainStep, key: Key, plain: Tensor | None, found: Tensor | None, number: int
    ) -> StepDifference:
        shown = plain if plain is not None else found
        shape, dtype = (tuple(shown.shape), dtype_name(shown.dtype)) if shown is not None else ((), "none")
        if plain is None or found is None:
            # A gradient of zeros instead of none is seen in what the optimizer makes of it.
            is_same = shown is None or (key[0] == "gradient" and not bool(shown.any()))
            structure = "" if is_same else "exists in the plain step only" if found is None else "exists there only"
            error = math.inf if structure else 0.0
            return StepDifference(key, number, shape, dtype, error, 0.0, structure, is_missing=bool(structure))
        if plain.shape != found.shape or (plain.dtype != found.dtype and key[0] != "output"):
            structure = f"is {dtype_name(found.dtype)}{list(found.shape)} instead of {dtype}{list(shape)}"
            return StepDifference(key, number, shape, dtype, math.inf, 0.0, structure)
        if not (plain.is_floating_point() or plain.is_complex()):
            return StepDifference(key, number, shape, dtype, 0.0 if torch.equal(plain, found) else math.inf, 0.0)
        cancelled = is_zero_by_cancellation(step, key)
        scale, noise = step.scales[key], step.noise.get(key, 0.0)
        # The sign of an element near zero decides a whole step of Adam: where rounding may change it, the gradients are
        # what is judged by themselves.
        is_rounded = self.rounding is not None or dtype not in ("float64", "complex128")
        if cancelled or (is_rounded and key[0] == "buffer"):
            scale = max(scale, step.neighbours[kind_of(key)])
        dtype_here = self._dtype_of(plain)
        tolerance = repetition_tolerance(scale, noise, dtype_here)
        if not noise:  # an exact zero in the plain step may be the rest of a cancellation in another order of sums
            tolerance += torch.finfo(dtype_here).eps * step.neighbours[kind_of(key)]
        distance, scale = _distance(plain, found), scale or 1.0
        return StepDifference(key, number, shape, dtype, distance / scale, tolerance / scale, is_cancelled=cancelled)

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        if self.rounding is None:
            return tensor.dtype
        rounding: torch.dtype = getattr(torch, self.rounding)
        return max(rounding, tensor.dtype, key=lambda each: torch.finfo(each).eps)


def _distance(plain: Tensor, found: Tensor) -> float:
    """Return the norm of the difference, which is known for equal tensors without copies in float64."""
    is_equal = plain.dtype == found.dtype and torch.equal(plain, found)
    return 0.0 if is_equal else norm_of_difference(found, plain)
