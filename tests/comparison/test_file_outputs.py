"""Outputs of two graphs beside each other: the worst row of all trials is the one that is judged."""

from __future__ import annotations

import pytest
import torch

from gradctl.comparison.file_outputs import output_rows, worst_rows


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_what_differs_in_a_later_trial_alone_is_the_worst(dtype):
    """A difference of integers has no budget to be measured in: an equal row counted as much as a wrong one."""
    worst = {}
    for trial, given in {"example": [0, 1], "seed": [1, 1], "flipped signs": [0, 1]}.items():
        expected = {"y": torch.tensor([0, 1]).to(dtype)}
        worst_rows(output_rows(trial, expected, {"y": torch.tensor(given).to(dtype)}, [expected]), worst)
    assert (worst["y"].trial, worst["y"].differs) == ("seed", True)
