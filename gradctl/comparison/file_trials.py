"""Trials of an ONNX file: its outputs on some inputs, and how far rounding moves them.

There is no float64 run of an ONNX file to measure rounding by. So the reference is also run, twice, with its inputs and
weights changed by an ULP up or down: what its outputs move by, another order of the same sums may move them by too
(stochastic arithmetic, Vignes 1993, 10.1016/0378-4754(93)90003-D). Four times that is the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradctl.comparison.program import FileProgram
from gradctl.comparison.trials import FileTrial
from gradctl.core.errors import TargetError
from gradctl.forms.form import Outcome
from gradctl.onnxio.onnx_file import OnnxFile, initializers, session
from gradctl.subject.frames import first_line

_PERTURBED = 2
_WEIGHT_AXES = 2  # a scale of Resize or a bound of Clip has fewer, and one ULP may change a shape


def file_trials(
    file: OnnxFile, inputs: Iterable[tuple[str, Mapping[str, Tensor]]], seed: int, *, optimised: bool = False
) -> list[FileTrial]:
    """Return the trials on which the file runs, also with inputs and weights changed by an ULP.

    Args:
        file: the reference.
        inputs: by name of the trial, the example first.
        seed: of the noise.
        optimised: whether onnxruntime's optimiser is on.

    Raises:
        TargetError: GC602 if onnxruntime cannot run the file; GC104 if not on the first inputs.
    """
    trials = []
    # A call for each session, which holds all weights: one at a time.
    for name, feeds, outcome in _outcomes(file, inputs, optimised=optimised):
        trials.append(FileTrial(name, [outcome], [outcome], feeds=feeds))
    for k in range(_PERTURBED):
        nudged = [(trial.name, _perturbed(trial.feeds, seed + k)) for trial in trials]
        found = _outcomes(file, nudged, optimised=optimised, values=_perturbed_weights(file, seed + k))
        noise = {name: outcome for name, _, outcome in found}
        # A trial that does not run an ULP further says nothing.
        trials = [replace(trial, noisy=[*trial.noisy, noise[trial.name]]) for trial in trials if trial.name in noise]
    return trials


def _outcomes(
    file: OnnxFile, inputs: Iterable[tuple[str, Mapping[str, Tensor]]], **options: Any
) -> list[tuple[str, dict[str, Tensor], Outcome]]:
    """Return the inputs on which the file runs in a new session, and their outcomes; it runs on the first."""
    program = FileProgram(str(file.path), session(file, **options))
    found = []
    for name, feeds in inputs:
        outcome = program.outcome(feeds)
        if outcome.error is None:
            found.append((name, dict(feeds), outcome))
        elif not found:
            raise _does_not_run(file, outcome.error)
    return found


def _does_not_run(file: OnnxFile, error: Exception) -> TargetError:
    said = first_line(error).removeprefix("RuntimeError: ")
    return TargetError("GC104", f"{file.path} does not run on these inputs: {said}.")


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
