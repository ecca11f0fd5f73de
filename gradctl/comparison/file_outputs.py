"""Outputs of two ONNX graphs beside each other, and how far rounding lets them be apart.

There is no float64 run of an ONNX file to measure rounding by. So the first graph is also run, twice, with its inputs
and weights changed by an ULP up or down: what its outputs move by, another order of the same sums may move them by too
(stochastic arithmetic, Vignes 1993, 10.1016/0378-4754(93)90003-D). Four times that is the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from gradctl.core.findings import TensorResult, number
from gradctl.core.names import TensorVerdict
from gradctl.numerics.agreement import agreement, largest_scale
from gradctl.numerics.measures import same_values
from gradctl.onnxio.onnx_file import OnnxFile, initializers, session
from gradctl.onnxio.session import run

__all__ = [
    "OutputRow",
    "noisy_outputs",
    "noisy_trials",
    "output_rows",
    "perturbed_sessions",
    "severity",
    "tensor_result",
    "worst_rows",
]

_PERTURBED = 2
_WEIGHT_AXES = 2  # a scale of Resize or a bound of Clip has fewer, and one ULP may change a shape


@dataclass(frozen=True, slots=True, eq=False)
class OutputRow:
    """One output at its worst: the trial, what differs, and what rounding explains of it."""

    name: str
    trial: str
    error: float
    budget: float
    expected: Tensor
    given: Tensor
    unstable: bool = False

    @property
    def structure(self) -> str:
        """Return what is wrong with shape or dtype, or nothing."""
        alike = self.expected.shape == self.given.shape and self.expected.dtype == self.given.dtype
        return "" if alike else f"{_kind(self.given)} instead of {_kind(self.expected)}"

    @property
    def differs(self) -> bool:
        """Return whether it is more than rounding."""
        return bool(self.structure) or self.error > self.budget


def output_rows(
    trial: str,
    expected: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    noisy: Sequence[Mapping[str, Tensor]],
) -> Iterator[OutputRow]:
    """Give a row for each output of one trial.

    Args:
        trial: its name.
        expected: what is right.
        given: what is judged, under the same names.
        noisy: what the first graph gives where inputs and weights are an ULP off.
    """
    neighbours = largest_scale(expected.values())
    for name, mine in expected.items():
        theirs = given[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            yield OutputRow(name, trial, float("inf"), 0.0, mine, theirs)
            continue
        budget = 0.0
        unstable = False
        for value in (each[name] for each in noisy):
            if value.shape != mine.shape:
                continue
            error, allowed = agreement(value, mine, theirs, neighbours)
            budget = max(budget, allowed)
            unstable = unstable or not same_values(value, mine)
        is_exact = not (mine.is_floating_point() or mine.is_complex())
        error, floor = agreement(mine, mine, theirs, neighbours)
        # An index that one ULP moves (a tie of argmax) may lie either way: then nothing can be said of it.
        yield OutputRow(name, trial, error, max(budget, floor), mine, theirs, unstable and is_exact and error > 0)


def worst_rows(rows: Iterator[OutputRow], worst: dict[str, OutputRow]) -> None:
    """Keep in ``worst`` the worst row of each output."""
    for row in rows:
        if row.name not in worst or severity(row) > severity(worst[row.name]):
            worst[row.name] = row


def severity(row: OutputRow) -> float:
    """Return the error in budgets; integers have none, so theirs is 0 or infinite."""
    if not row.differs:
        return row.error / row.budget if row.budget else 0.0
    return row.error / row.budget if row.budget and not row.structure else float("inf")


def tensor_result(row: OutputRow) -> TensorResult:
    """Return the row as the report has it."""
    verdict: TensorVerdict = "same" if not row.differs else "unresolved" if row.unstable else "differs"
    return TensorResult(
        quantity="output",
        tensor=row.name,
        verdict=verdict,
        shape=tuple(row.expected.shape),
        dtype=str(row.expected.dtype).removeprefix("torch."),
        error=number(row.error),
        budget=number(row.budget),
    )


def perturbed_sessions(file: OnnxFile, seed: int, *, optimised: bool) -> list[onnxruntime.InferenceSession]:
    """Return sessions of a file whose weights are an ULP up or down.

    Raises:
        TargetError: GC602 if onnxruntime cannot run it.
    """
    return [session(file, optimised=optimised, values=_perturbed_weights(file, seed + k)) for k in range(_PERTURBED)]


def noisy_trials(
    file: OnnxFile, feeds: Mapping[str, Mapping[str, Tensor]], seed: int
) -> dict[str, list[dict[str, Tensor]]]:
    """Return such outputs for each trial on which they can be had, onnxruntime's optimiser off.

    Each session holds all weights, so there is one at a time.

    Raises:
        TargetError: GC602 if onnxruntime cannot run the file.
    """
    noisy: dict[str, list[dict[str, Tensor]]] = {trial: [] for trial in feeds}
    for k in range(_PERTURBED):
        running = session(file, optimised=False, values=_perturbed_weights(file, seed + k))
        for trial in list(noisy):
            try:
                noisy[trial].append(run(running, _perturbed(feeds[trial], seed + k)))
            except RuntimeError:  # an ULP further it does not run
                del noisy[trial]
        del running
    return noisy


def noisy_outputs(
    perturbed: Sequence[onnxruntime.InferenceSession], feeds: Mapping[str, Tensor], seed: int
) -> list[dict[str, Tensor]]:
    """Return the outputs of such sessions for inputs that are an ULP up or down."""
    return [run(each, _perturbed(feeds, seed + k)) for k, each in enumerate(perturbed)]


def _perturbed(values: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return floats changed by an ULP up or down."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _nudged(value, generator) for name, value in values.items()}


def _nudged(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    up_or_down = torch.randint(0, 2, value.shape, generator=generator, dtype=value.dtype).mul_(2).sub_(1)
    return up_or_down.mul_(torch.finfo(value.dtype).eps).mul_(value).add_(value)


def _perturbed_weights(file: OnnxFile, seed: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _nudged(value, generator).numpy()
        for name, value in initializers(file)
        if value.is_floating_point() and value.ndim >= _WEIGHT_AXES
    }


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
