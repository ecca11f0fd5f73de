"""One call of a model, forward and backward, in its own dtype and in float64, and the noise of one ULP in both.

The user's gradient hooks run: they are part of training. Cotangents come from numpy's frozen generator, each from the
name of its output, so that neither a version of torch nor another output changes them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradctl.comparison.compare import tensors_of
from gradctl.comparison.difference import Key, dtype_name
from gradctl.comparison.program import run_copy
from gradctl.comparison.reference import promoting
from gradctl.core.errors import TargetError
from gradctl.core.names import Quantity
from gradctl.forms.form import Outcome
from gradctl.numerics import agreement
from gradctl.numerics.measures import dense, norm
from gradctl.numerics.repetition import NOISE_SEEDS, repetition_tolerance
from gradctl.snapshots.random_draws import DrawRecorder
from gradctl.snapshots.tensor_records import is_exact
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.instance import InputMode, native_dtype
from gradctl.subject.subject import Subject
from gradctl.tracing.promotion import Promotion

QUANTITIES: tuple[Quantity, ...] = ("output", "gradient", "buffer")


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One call in one precision.

    Attributes:
        tensors: by quantity and name; None for a missing gradient.
        differentiable: names of the outputs that require a gradient.
        noise: norm of the change by one ULP, of each tensor; empty if it was not measured.
    """

    tensors: dict[Key, Tensor | None]
    differentiable: frozenset[str]
    noise: Mapping[Key, float] = field(default_factory=dict)


class SubjectRuns:
    """Runs of a subject.

    Args:
        subject: the model and its inputs; not changed.
        input_mode: how float inputs can be given to this model.
    """

    def __init__(self, subject: Subject, input_mode: InputMode) -> None:
        self.subject, self.input_mode = subject, input_mode
        self._promotion = Promotion(native_dtype(subject))

    @property
    def islands(self) -> tuple[str, ...]:
        """Names of operators that ran in the native dtype in the float64 runs."""
        return tuple(self._promotion.islands)

    def native(self, *, with_noise: bool) -> Run:
        """Return a run in the model's own dtype.

        Raises:
            TargetError: GC111 if the model, its loss or a gradient hook raises.
        """
        outcome = self._outcome(promoted=False)
        if outcome.error is not None:
            raise TargetError(
                "GC111",
                f"{self.subject.target} raises with its gradient hooks: {first_line(outcome.error)}.",
                details=user_frames(outcome.error),
            ) from outcome.error
        return self._run(outcome, promoted=False, with_noise=with_noise)

    def float64(self, *, with_noise: bool) -> Run | Exception:
        """Return a run in float64, or what it raises."""
        outcome = self._outcome(promoted=True)
        return outcome.error or self._run(outcome, promoted=True, with_noise=with_noise)

    def draws(self) -> tuple[int, str]:
        """Return the count and the digest of the random numbers that a native run draws."""
        recorder = DrawRecorder()
        self._outcome(promoted=False, context=lambda: recorder)
        return recorder.summary

    def _outcome(
        self,
        *,
        promoted: bool,
        moved_by: int | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Outcome:
        _, (outcome,) = run_copy(
            "example",
            self.subject,
            self.subject,
            promoted=promoted,
            input_mode=self.input_mode,
            calls=1,
            with_numbers=True,
            context=partial(promoting, self._promotion) if promoted else context,
            moved_by=moved_by,
            cotangents=draw_cotangents,
        )
        return outcome

    def _run(self, outcome: Outcome, *, promoted: bool, with_noise: bool) -> Run:
        tensors = _tensors(outcome)
        if not with_noise:
            return Run(tensors, outcome.differentiable)
        moved = [self._outcome(promoted=promoted, moved_by=seed) for seed in NOISE_SEEDS]
        changed = [_tensors(each) for each in moved if each.error is None]
        noise = {
            key: _noise(tensor, [each.get(key) for each in changed])
            for key, tensor in tensors.items()
            if tensor is not None
        }
        return Run(tensors, outcome.differentiable, noise)


def differing_from_itself(first: Run, second: Run) -> list[tuple[str, float]]:
    """Return the tensors that differ between two runs by more than their tolerance, with the relative error."""
    found = []
    for key, tensor in first.tensors.items():
        other = second.tensors.get(key)
        if tensor is None or other is None:
            found += [] if tensor is other else [(key[1], math.inf)]
            continue
        scale, difference = norm(_wide(tensor)), norm_of_difference(tensor, other)
        if difference > tolerance(scale, first.noise.get(key, 0.0), tensor.dtype):
            found.append((key[1], difference / scale if scale else math.inf))
    return found


def tolerance(scale: float, noise: float, dtype: torch.dtype) -> float:
    """Return the largest norm of the difference of two right runs; integers differ only as far as the noise does."""
    if is_exact(dtype_name(dtype)):
        return 10 * noise
    return repetition_tolerance(scale, noise, dtype)


def norm_of_difference(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference over finite elements; infinite for another shape, or other NaN and Inf."""
    if one.shape != other.shape:
        return math.inf
    return agreement.norm_of_difference(_wide(one), _wide(other))


def draw_cotangents(outputs: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a Gaussian cotangent for each float output, which depends on the seed, the name and the shape alone."""
    return {
        name: _gaussian(tensor, f"{seed} {name}")
        for name, tensor in outputs.items()
        if tensor.is_floating_point() or tensor.is_complex()
    }


def _gaussian(tensor: Tensor, text: str) -> Tensor:
    words = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32)
    shape = (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)
    drawn = torch.from_numpy(np.asarray(np.random.RandomState(words).standard_normal(shape)))
    return (torch.view_as_complex(drawn) if tensor.is_complex() else drawn).to(tensor.device, tensor.dtype)


def _tensors(outcome: Outcome) -> dict[Key, Tensor | None]:
    return {
        (quantity, name): tensor for quantity in QUANTITIES for name, tensor in tensors_of(outcome, quantity).items()
    }


def _noise(tensor: Tensor, moved: Iterable[Tensor | None]) -> float:
    changes = [norm_of_difference(tensor, each) for each in moved if each is not None]
    return max((each for each in changes if math.isfinite(each)), default=0.0)


def _wide(tensor: Tensor) -> Tensor:
    strided = dense(tensor.detach())
    assert strided is not None
    return strided.to(torch.complex128 if strided.is_complex() else torch.float64)
