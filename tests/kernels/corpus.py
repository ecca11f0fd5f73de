"""All pairs, by name."""

from __future__ import annotations

from tests.kernels import activations, attention, indexing, linear, losses, modules, normalisation, recurrence

PAIRS = {
    **attention.PAIRS,
    **normalisation.PAIRS,
    **activations.PAIRS,
    **linear.PAIRS,
    **losses.PAIRS,
    **recurrence.PAIRS,
    **indexing.PAIRS,
    **modules.PAIRS,
}
