"""Decompositions of operators that ONNX or torch's exporter lacks or computes wrongly, into operators that it has.

Each file is one family; ``decomposes`` names the overloads above each function. Most of these have no conversion in
torch.onnx (2.13) and no decomposition of torch; if one is there and wrong, a comment says how. A test compares each
with autograd over all its options.
"""

from __future__ import annotations

from gradctl.joint.decompositions import (  # noqa: F401 each registers its operators
    convolution,
    elementwise,
    embedding,
    indexing,
    losses,
    norms,
    pooling,
    reductions,
    resampling,
    special,
)
from gradctl.joint.decompositions.complex_numbers import COMPLEX, with_complex
from gradctl.joint.decompositions.linear_algebra import EARLY
from gradctl.joint.decompositions.register import REAL, Table

__all__ = ["EARLY", "TABLE"]

TABLE: Table = with_complex(REAL, COMPLEX)
