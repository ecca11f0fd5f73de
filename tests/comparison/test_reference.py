"""Eager on all trials: how often it is run, and what it keeps."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from tests.compared import comparing

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


CALLS = Counter()  # by dtype of the input; no state of the model, which each run would put back


class Net(nn.Linear):
    """A layer that may count its calls in a buffer."""

    def __init__(self, *, has_state):
        super().__init__(4, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.has_state = has_state

    def forward(self, x):
        CALLS[x.dtype] += 1
        if self.has_state:
            self.steps += 1
        return super().forward(x) * (1 + self.steps)


@pytest.mark.parametrize(("has_state", "float64_calls"), [(False, 1), (True, 3)])
def test_a_model_whose_calls_repeat_runs_once_in_float64_on_each_trial(has_state, float64_calls):
    CALLS.clear()
    reference = comparing(Net(has_state=has_state), X).reference
    assert len(reference.trials) == 4
    assert CALLS[torch.float64] == 4 * float64_calls
    for trial in reference.trials:
        assert len(trial.native) == len(trial.oracle) == 3
        scales = [
            float(call.outputs["output"].norm() / trial.oracle[0].outputs["output"].norm()) for call in trial.oracle
        ]
        assert scales == pytest.approx([1, 1.5, 2] if has_state else [1, 1, 1])
