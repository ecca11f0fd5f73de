"""A pair of the corpus in ``gradctl compare``: what is found, by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradctl.commands.compare_candidate import compare_candidate
from gradctl.core.findings import Unit
from gradctl.subject.subject import Subject
from tests.kernels.pairs import Pair


def compare(pair: Pair, candidate: Callable[..., Any], dtype: torch.dtype, seed: int) -> Unit:
    """Return the comparison of a candidate with the reference of its pair."""
    reference, program = pair.programs(candidate, dtype)
    subjects = (
        Subject(target, each, pair.draw(seed, dtype), seed=seed)
        for target, each in (("reference", reference), ("candidate", program))
    )
    return compare_candidate(*subjects, renamed=list(pair.renamed.items()))


def found_in(unit: Unit) -> dict[str, str]:
    """Return the code of each finding above a note, by tensor; those of no tensor, which name a place, are left out."""
    return {each.tensor: each.code for each in unit.findings if each.severity != "note" and each.tensor}
