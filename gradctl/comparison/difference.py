"""The difference of one tensor between two programs: how large, how large by rounding alone, and what it means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gradctl.comparison.trials import FileTrial, ModelTrial, Trial
from gradctl.core.names import Quantity
from gradctl.numerics.agreement import agreement
from gradctl.numerics.measures import same_values

Key = tuple[Quantity, str]
# An error that is rounding shrinks in float64 by the ratio of the machine epsilons, 2e-9 for float32.
_VANISHES = 1e-3
T = TypeVar("T", bound=Trial)


@dataclass(frozen=True, slots=True, eq=False)
class TensorDifference(Generic[T]):
    """One tensor of a candidate beside that of the reference, where it differs most.

    Attributes:
        name: of the tensor.
        trial: the inputs on which it differs most.
        call: the number of the call there, from 1.
        reference, candidate: the tensors; None if a program has none.
        error, budget: relative to the norm of the reference, in the native dtype; rounding explains the budget.
        meaning: relative error if both run in float64; None if that is not known.
        persists: for a gradient over its budget: whether it is over it on fresh inputs too.
        coarsest: machine epsilon of the coarsest dtype that constants of the candidate can have.
        requires_grad: for an output: whether the candidate's requires a gradient, if the reference's does not agree.
        rounding: root mean square of the error over random inputs, if it averages out and is not there in float64.
        bias: relative size of an error that does not average out over random inputs, though each is within its budget.
        float64: the tensors of reference and candidate in float64 where they differ most there, if that was asked.
        is_unstable: an integer that a change of the inputs by one ULP also changes: either value is right.
    """

    name: str
    trial: T
    call: int
    reference: Tensor | None
    candidate: Tensor | None
    error: float
    budget: float
    meaning: float | None = None
    persists: bool = True
    coarsest: float = 0.0
    requires_grad: bool | None = None
    rounding: float | None = None
    bias: float | None = None
    float64: tuple[Tensor, Tensor] | None = None
    is_unstable: bool = False

    @property
    def is_missing(self) -> bool:
        """Whether one program has the tensor and the other does not."""
        return (self.reference is None) != (self.candidate is None)

    @property
    def structure(self) -> str:
        """The difference in shape or dtype, or an empty text."""
        if self.reference is None or self.candidate is None or _same_type(self.reference, self.candidate):
            return ""
        return f"{_describe(self.candidate)} instead of {_describe(self.reference)}"

    @property
    def means_another(self) -> bool:
        """Whether the candidate computes something else, whatever the dtype.

        A baked constant is off by half an epsilon of its own dtype (3e-8 in float32, 2e-3 in bfloat16). A candidate
        that is ten times nearer natively than in float64 was only converted badly.
        """
        return self.meaning is not None and max(1e-6, 8 * self.coarsest) < self.meaning < 10 * self.error

    @property
    def exceeds(self) -> bool:
        """Whether the native difference is more than rounding explains."""
        return self.error > self.budget

    @property
    def overflows(self) -> bool:
        """Whether the candidate has NaN or infinity where the reference is finite, which no flipped relu makes."""
        if self.reference is None or self.candidate is None or math.isfinite(self.error):
            return False
        return bool(torch.isfinite(self.reference).all()) and not bool(torch.isfinite(self.candidate).all())

    @property
    def is_other_than_bias(self) -> bool:
        """Whether the two programs differ in more than a bias within the budget."""
        structure = self.is_missing or bool(self.structure) or self.requires_grad is not None
        return structure or self.means_another or (self.exceeds and self.persists and self.rounding is None)

    @property
    def differs(self) -> bool:
        """Whether the two programs do not agree on this tensor, whichever is right."""
        return self.is_other_than_bias or self.bias is not None

    @property
    def judged(self) -> tuple[Tensor | None, Tensor | None]:
        """The tensors on which it is decided who is right: in float64 if they differ there, and are known."""
        if self.float64 is not None and self.means_another:
            return self.float64
        return self.reference, self.candidate

    @property
    def is_native_only(self) -> bool:
        """Whether the tensor differs in the native dtype only: in float64 the error is less than a thousandth of it."""
        return self.is_open and self.meaning is not None and self.meaning < _VANISHES * self.error

    @property
    def is_open(self) -> bool:
        """Whether the error is finite, over its budget, and known in float64."""
        is_error = self.differs and self.exceeds and math.isfinite(self.error) and self.requires_grad is None
        return is_error and self.meaning is not None

    @property
    def severity(self) -> float:
        """The error in budgets, by which the worst is kept; infinite for a tensor of another type or none."""
        if self.is_missing or self.structure:
            return math.inf
        return self.error / self.budget if self.budget else (math.inf if self.error else 0.0)


ModelDifference = TensorDifference[ModelTrial]
FileDifference = TensorDifference[FileTrial]


def tensor_difference(
    name: str,
    reference: Tensor | None,
    candidate: Tensor | None,
    *,
    oracle: Tensor | None,
    neighbours: float,
    trial: T,
    call: int = 1,
    noisy: Sequence[Tensor | None] = (),
) -> TensorDifference[T]:
    """Return the difference of one tensor.

    Args:
        name: of the tensor.
        reference, candidate: in the native dtype.
        oracle: the reference's in float64; None if the reference's own is the best that is known.
        neighbours: the largest norm among tensors of its kind (``agreement.largest_scale``).
        trial: the inputs.
        call: the number of the call.
        noisy: the reference's tensor where inputs and weights are changed by an ULP: the noise, if there is no oracle.
    """
    if reference is None or candidate is None or not _same_type(reference, candidate):
        error = 0.0 if reference is candidate else math.inf
        return TensorDifference(name, trial, call, reference, candidate, error, 0.0)
    error, budget = agreement(reference, reference if oracle is None else oracle, candidate, neighbours)
    samples = [value for value in noisy if value is not None and value.shape == reference.shape]
    budget = max([budget, *(agreement(value, reference, candidate, neighbours)[1] for value in samples)])
    is_unstable = _is_unstable(reference, samples, error)
    return TensorDifference(name, trial, call, reference, candidate, error, budget, is_unstable=is_unstable)


def _is_unstable(reference: Tensor, samples: Sequence[Tensor], error: float) -> bool:
    is_exact = not (reference.is_floating_point() or reference.is_complex())
    return is_exact and error > 0 and not all(same_values(value, reference) for value in samples)


def is_identical(reference: Tensor | None, candidate: Tensor | None) -> bool:
    """Return whether both are tensors of one type with equal elements; False if there is a NaN in one of them."""
    if reference is None or candidate is None or not _same_type(reference, candidate):
        return False
    comparable = reference.layout == candidate.layout == torch.strided and reference.dtype != torch.complex32
    return comparable and torch.equal(reference, candidate)  # it has no kernel for the others


def _same_type(reference: Tensor, candidate: Tensor) -> bool:
    return reference.shape == candidate.shape and reference.dtype == candidate.dtype


def _describe(tensor: Tensor) -> str:
    """Return ``float32[2, 3]``."""
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
