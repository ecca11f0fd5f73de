"""A pair of the corpus in ``gradctl compare``: what is found, by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from gradctl.commands.compare_candidate import compare_candidate
from gradctl.core.findings import Unit
from gradctl.subject.inputs.sizes import sizes_from
from gradctl.subject.subject import Subject
from tests.kernels.pairs import Pair


def compare(
    pair: Pair,
    candidate: Callable[..., Any],
    dtype: torch.dtype,
    seed: int,
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> Unit:
    """Return the comparison of a candidate with the reference of its pair.

    Args:
        pair, candidate, dtype, seed: what is compared.
        sizes: of the inputs; the example has the first of each. None: those of the pair.
    """
    draw = partial(pair.draw, seed, dtype)
    reference, program = pair.programs(candidate, dtype)
    inputs = draw(**{name: values[0] for name, values in (sizes or {}).items()})
    subject = Subject("reference", reference, inputs, seed=seed, inputs_beside=("example_inputs", draw))
    own = Subject("candidate", program, inputs, seed=seed)
    renamed = list(pair.renamed.items())
    return compare_candidate(subject, own, renamed=renamed, sizes=sizes_from(sizes) if sizes else ())


def found_in(unit: Unit) -> dict[str, str]:
    """Return the code of each finding above a note, by tensor; those of no tensor, which name a place, are left out."""
    return {each.tensor: each.code for each in unit.findings if each.severity != "note" and each.tensor}
